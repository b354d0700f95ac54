"""Linkage disequilibrium, as the specification: sums over the complete observations of a pair by matrix products, then the
textbook formulas.

An observation is a haplotype with its allele, 0 or 1, or (unphased) a person with its dosage, 0, 1 or 2. With n of them where
both sites are called, sums sx, sy, sums of squares sxx, syy and of products sxy over these:

    x = n sxy - sx sy    vx = n sxx - sx^2    vy = n syy - sy^2                      (integers below 2**53, exact in float64)
    r2       x x / (vx vy)                      Hill and Robertson, Theor. Appl. Genet. 38, 1968, eq. 3, multiplied out by n^4
    r        x / sqrt(vx vy)
    d        x / (n n), or unphased x / (2 n n) the composite disequilibrium, half the covariance: Weir, Biometrics 35, 1979
    d_prime  x / min(sx (n - sy), (n - sx) sy) where x > 0, else x / min(sx sy, (n - sx) (n - sy)): Lewontin, Genetics 49, 1964

in float64 in this order, rounded once to float32; the other implementations do exactly the same and agree bit for bit. NaN
where a denominator is 0: no common observation, or (but for d) a site that does not vary among them.
Greedy passes over these values (pruning, clumping, blocks) are in reference_greedy.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.kernels.ld.checks import Sites


class Sums(NamedTuple):
    """float64 (L, M), each an exact integer."""

    n: np.ndarray
    sx: np.ndarray
    sy: np.ndarray
    sxx: np.ndarray
    syy: np.ndarray
    sxy: np.ndarray


def matrix(first: Sites, other: Sites | None, measure: str, out: np.ndarray | None = None) -> np.ndarray:
    """float32 (L, L), or (L, M) against a second set of sites; into `out` where it is given."""
    made = values(first, first if other is None else other, measure).astype(np.float32)
    if out is None:
        return made
    out[:] = made
    return out


def pairs(first: Sites, i: np.ndarray, j: np.ndarray, measure: str) -> np.ndarray:
    """float32 (P,): site i[p] with site j[p]."""
    return values(first, first, measure)[i, j].astype(np.float32)


def band(first: Sites, end_l: np.ndarray, width: int, measure: str) -> np.ndarray:
    """float32 (L, width): [i, k] is site i with site i + 1 + k where that is before end_l[i], else NaN."""
    all_ll = matrix(first, None, measure)
    out = np.full((len(end_l), width), np.nan, dtype=np.float32)
    for i, end in enumerate(end_l):
        inside = all_ll[i, i + 1 : end][:width]
        out[i, : len(inside)] = inside
    return out


def threshold(
    first: Sites, other: Sites | None, end_l: np.ndarray | None, least: np.float32, measure: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """i, j int64 and value float32 where |value| >= least: i < j < end_l[i] of one set, or every pair of two; by i, then j."""
    all_lm = matrix(first, other, measure)
    wanted = np.abs(all_lm) >= least
    if end_l is not None:
        j = np.arange(all_lm.shape[1])
        wanted &= (j > j[:, None]) & (j < end_l[:, None])
    i, j = np.nonzero(wanted)
    return i, j, all_lm[i, j]


def score(first: Sites, end_l: np.ndarray, adjusted: bool) -> np.ndarray:
    """float64 (L,): sum of r2 with the site itself and with every site in whose window it is or that is in its window."""
    r2_ll = values(first, first, "r2_adjusted" if adjusted else "r2")
    j = np.arange(len(end_l))
    near = (j > j[:, None]) & (j < end_l[:, None])
    sums_l = 1.0 + np.where(near | near.T, np.nan_to_num(r2_ll), 0.0).sum(axis=1)
    return np.where(np.isnan(np.diagonal(values(first, first, "r2"))), np.nan, sums_l)


def decay(first: Sites, position_l: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of r2 (float64) and number of pairs (int64) per distance bin [edges[b], edges[b + 1]); pairs without r2 left out."""
    i, j = np.triu_indices(len(position_l), k=1)
    r2, distance = values(first, first, "r2")[i, j], position_l[j] - position_l[i]
    sums, counts = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1, dtype=np.int64)
    for b in range(len(sums)):
        inside = (distance >= edges[b]) & (distance < edges[b + 1]) & ~np.isnan(r2)
        sums[b], counts[b] = r2[inside].sum(), inside.sum()
    return sums, counts


def values(first: Sites, other: Sites, measure: str) -> np.ndarray:
    """float64 (L, M), not yet rounded. "r2_adjusted": r2 - (1 - r2) / (n - 2), NaN for n <= 2 (Bulik-Sullivan et al. 2015)."""
    s = sums(first, other)
    x, vx, vy = s.n * s.sxy - s.sx * s.sy, s.n * s.sxx - s.sx * s.sx, s.n * s.syy - s.sy * s.sy
    with np.errstate(divide="ignore", invalid="ignore"):
        if measure == "r2":
            return x * x / (vx * vy)
        if measure == "r2_adjusted":
            r2 = x * x / (vx * vy)
            return np.where(s.n > 2, r2 - (1.0 - r2) / (s.n - 2.0), np.nan)
        if measure == "r":
            return x / np.sqrt(vx * vy)
        if measure == "d":
            return x / (s.n * s.n * (2.0 if first.unphased else 1.0))
        above = np.minimum(s.sx * (s.n - s.sy), (s.n - s.sx) * s.sy)
        below = np.minimum(s.sx * s.sy, (s.n - s.sx) * (s.n - s.sy))
        return x / np.where(x > 0, above, below)


def sums(first: Sites, other: Sites) -> Sums:
    """Sums over the observations where both sites are called."""
    (x_ln, seen_ln), (y_mn, seen_mn) = observations(first), observations(other)
    return Sums(
        n=seen_ln @ seen_mn.T, sx=x_ln @ seen_mn.T, sy=seen_ln @ y_mn.T,
        sxx=(x_ln * x_ln) @ seen_mn.T, syy=seen_ln @ (y_mn * y_mn).T, sxy=x_ln @ y_mn.T,
    )  # fmt: skip


def observations(sites: Sites) -> tuple[np.ndarray, np.ndarray]:
    """Alleles or dosages, and 1 where called, both float64 (L, haplotypes or people) and 0 elsewhere."""
    seen_ln = (
        np.ones((len(sites.bits_lw), sites.n)) if sites.missing_lw is None else 1.0 - _bits(sites.missing_lw, sites.n)
    )
    x_ln = _bits(sites.bits_lw, sites.n)
    if sites.unphased:
        seen_ln = seen_ln[:, 0::2] * seen_ln[:, 1::2]
        x_ln = x_ln[:, 0::2] + x_ln[:, 1::2]
    return x_ln * seen_ln, seen_ln


def _bits(plane_lw: np.ndarray, n: int) -> np.ndarray:
    """float64 (L, n) of 0 and 1; every integer below 2**53 is exact in float64."""
    octets = np.ascontiguousarray(plane_lw).view(np.uint8).reshape(len(plane_lw), 8 * plane_lw.shape[1])
    return np.unpackbits(octets, axis=1, bitorder="little")[:, :n].astype(np.float64)
