"""Linkage disequilibrium, as the specification: counts by matrix product of 0 and 1, then the textbook formula.

With c11 the number of haplotypes that carry ALT at both sites, ca and cb the numbers at each, and n haplotypes:
x = n c11 - ca cb, v = c (n - c), r2 = x^2 / (va vb) (Hill and Robertson, Theor. Appl. Genet. 38, 1968, eq. 3, multiplied
out by n^4 so that only integers enter). It is computed in float64 as (x / va) (x / vb), each quotient as a product with
the rounded reciprocal; the other implementations do exactly the same and agree bit for bit. NaN where v is 0.
"""

from __future__ import annotations

import numpy as np


def r2(bits_lw: np.ndarray, n: int, other_mw: np.ndarray | None = None) -> np.ndarray:
    """float32 (L, L), or (L, M) against a second set of sites."""
    return _r2(bits_lw, n, bits_lw if other_mw is None else other_mw).astype(np.float32)


def r2_pairs(bits_lw: np.ndarray, n: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """float32 (P,): r2 of site i[p] with site j[p]."""
    return _r2(bits_lw, n, bits_lw)[i, j].astype(np.float32)


def r2_decay(
    bits_lw: np.ndarray, n: int, position_bp: np.ndarray, edges_bp: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of r2 (float64) and number of pairs (int64) per distance bin [edges[b], edges[b + 1]), monomorphic sites left out."""
    r2_ll = _r2(bits_lw, n, bits_lw)
    first, second = np.triu_indices(len(position_bp), k=1)
    values, distance_bp = r2_ll[first, second], position_bp[second] - position_bp[first]
    sums, pairs = np.zeros(len(edges_bp) - 1), np.zeros(len(edges_bp) - 1, dtype=np.int64)
    for b in range(len(sums)):
        inside = (distance_bp >= edges_bp[b]) & (distance_bp < edges_bp[b + 1]) & ~np.isnan(values)
        sums[b], pairs[b] = values[inside].sum(), inside.sum()
    return sums, pairs


def _r2(bits_lw: np.ndarray, n: int, other_mw: np.ndarray) -> np.ndarray:
    alleles_ln, other_mn = _alleles(bits_lw, n), _alleles(other_mw, n)
    count_l, count_m = alleles_ln.sum(axis=1), other_mn.sum(axis=1)
    x_lm = n * (alleles_ln @ other_mn.T) - count_l[:, None] * count_m
    return (x_lm * _reciprocal(count_l, n)[:, None]) * (x_lm * _reciprocal(count_m, n))


def _alleles(bits_lw: np.ndarray, n: int) -> np.ndarray:
    """float64 (L, n) of 0 and 1; every integer below 2**53 is exact in float64."""
    octets = np.ascontiguousarray(bits_lw).view(np.uint8).reshape(len(bits_lw), 8 * bits_lw.shape[1])
    return np.unpackbits(octets, axis=1, bitorder="little")[:, :n].astype(np.float64)


def _reciprocal(count_l: np.ndarray, n: int) -> np.ndarray:
    """1 / (c (n - c)); NaN for a monomorphic site."""
    variance_l = count_l * (n - count_l)
    return np.divide(1.0, variance_l, out=np.full(len(count_l), np.nan), where=variance_l > 0)
