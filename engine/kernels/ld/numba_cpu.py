"""Linkage disequilibrium on the CPU: AND and popcount in register tiles (`bits.tiles`), r2 from the counts at once.

What a sink does with the counts of a 32 x 32 tile (matrix, histogram) is ordinary Numba below the tile.
Work is shared by block rows, i together with the last but i, and every sum is made in an order that no thread count changes.
"""

from __future__ import annotations

import numba
import numpy as np

from engine.kernels.bits.tiles import BLOCK as _BLOCK
from engine.kernels.bits.tiles import and_tile, ctpop, interleaved

_GROUP = 4  # block rows whose mirror images are written together: lines of 512 bytes, not 128


def r2(bits_lw: np.ndarray, n: int, other_mw: np.ndarray | None = None) -> np.ndarray:
    """float32 (L, L), or (L, M) against a second set of sites."""
    packed, count_l, reciprocal_l = _prepare(bits_lw, n)
    if other_mw is None:
        out = np.empty((len(bits_lw), len(bits_lw)), dtype=np.float32)
        if out.size:
            _r2_triangle(packed, count_l, reciprocal_l, n, out)
        return out
    other, count_m, reciprocal_m = _prepare(other_mw, n)
    out = np.empty((len(bits_lw), len(other_mw)), dtype=np.float32)
    if out.size:
        _r2_rectangle(packed, count_l, reciprocal_l, other, count_m, reciprocal_m, n, out)
    return out


def r2_pairs(bits_lw: np.ndarray, n: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """float32 (P,): r2 of site i[p] with site j[p]."""
    out = np.empty(len(i), dtype=np.float32)
    if out.size:
        bits_lw = _masked(bits_lw, n)
        count_l = np.empty(len(bits_lw))
        reciprocal_l = np.empty(len(bits_lw))
        _moments(bits_lw, n, count_l, reciprocal_l)
        _r2_pairs(bits_lw, count_l, reciprocal_l, n, i, j, out)
    return out


def r2_decay(
    bits_lw: np.ndarray, n: int, position_bp: np.ndarray, edges_bp: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of r2 (float64) and number of pairs (int64) per distance bin; the matrix is never held."""
    packed, count_l, reciprocal_l = _prepare(bits_lw, n)
    blocks, bins = len(packed), len(edges_bp) - 1
    sums, pairs = np.zeros((blocks, bins)), np.zeros((blocks, bins), dtype=np.int64)
    if blocks:
        _r2_decay(packed, count_l, reciprocal_l, n, position_bp, edges_bp, sums, pairs)
    return sums.sum(axis=0), pairs.sum(axis=0)


def _masked(bits_lw: np.ndarray, n: int) -> np.ndarray:
    """`bits_lw` with nothing beyond haplotype n; a copy only where there was something."""
    if n % 64 and bits_lw.size and (bits_lw[:, -1] >> np.uint64(n % 64)).any():
        bits_lw = bits_lw.copy()
        bits_lw[:, -1] &= np.uint64((1 << (n % 64)) - 1)
    return bits_lw


def _prepare(bits_lw: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Interleaved words (blocks, W, 32), ALT counts and reciprocal variances (blocks * 32,), float64, NaN where monomorphic."""
    bits_lw = _masked(bits_lw, n)
    packed = interleaved(bits_lw)
    count_l, reciprocal_l = np.zeros(len(packed) * _BLOCK), np.full(len(packed) * _BLOCK, np.nan)
    _moments(bits_lw, n, count_l, reciprocal_l)
    return packed, count_l, reciprocal_l


@numba.njit(cache=True, nogil=True)
def _r2_tile(
    counts: np.ndarray,
    count_i: np.ndarray,
    reciprocal_i: np.ndarray,
    count_j: np.ndarray,
    reciprocal_j: np.ndarray,
    n: int,
    out: np.ndarray,
) -> None:
    """r2 in `out`'s type (32, 32) from the counts of one tile."""
    for r in range(_BLOCK):
        for c in range(_BLOCK):
            x = n * np.float64(counts[r * _BLOCK + c]) - count_i[r] * count_j[c]
            out[r, c] = (x * reciprocal_i[r]) * (x * reciprocal_j[c])


@numba.njit(cache=True, nogil=True)
def _write(values: np.ndarray, out: np.ndarray, at: int, to: int) -> None:
    """Copy what of `values` lies inside `out` to rows from `at`, columns from `to`."""
    rows, columns = min(values.shape[0], out.shape[0] - at), min(values.shape[1], out.shape[1] - to)
    for r in range(rows):
        for c in range(columns):
            out[at + r, to + c] = values[r, c]


@numba.njit(cache=True, nogil=True)
def _triangle_row(
    packed: np.ndarray, count_l: np.ndarray, reciprocal_l: np.ndarray, n: int, out: np.ndarray, group: int
) -> None:
    """Rows of `_GROUP` blocks from the diagonal on, and their mirror image below it, gathered to long writes first."""
    counts, values = np.empty(_BLOCK * _BLOCK, dtype=np.int32), np.empty((_BLOCK, _BLOCK), dtype=np.float32)
    mirror = np.empty((_BLOCK, _GROUP * _BLOCK), dtype=np.float32)
    first, last = group * _GROUP, min(packed.shape[0], (group + 1) * _GROUP)
    for j in range(first, packed.shape[0]):
        j0 = j * _BLOCK
        for i in range(first, last):
            i0 = i * _BLOCK
            and_tile(packed, i, packed, j, counts)
            _r2_tile(counts, count_l[i0:], reciprocal_l[i0:], count_l[j0:], reciprocal_l[j0:], n, values)
            _write(values, out, i0, j0)
            for c in range(_BLOCK):
                for r in range(_BLOCK):
                    mirror[c, i0 - first * _BLOCK + r] = values[r, c]
        if j >= last:
            _write(mirror, out, j0, first * _BLOCK)


@numba.njit(cache=True, nogil=True, parallel=True)
def _r2_triangle(packed: np.ndarray, count_l: np.ndarray, reciprocal_l: np.ndarray, n: int, out: np.ndarray) -> None:
    groups = (packed.shape[0] + _GROUP - 1) // _GROUP
    for i in numba.prange((groups + 1) // 2):
        _triangle_row(packed, count_l, reciprocal_l, n, out, i)
        if i != groups - 1 - i:
            _triangle_row(packed, count_l, reciprocal_l, n, out, groups - 1 - i)


@numba.njit(cache=True, nogil=True)
def _rectangle_row(
    packed: np.ndarray,
    count_l: np.ndarray,
    reciprocal_l: np.ndarray,
    other: np.ndarray,
    count_m: np.ndarray,
    reciprocal_m: np.ndarray,
    n: int,
    out: np.ndarray,
    i: int,
) -> None:
    counts, values = np.empty(_BLOCK * _BLOCK, dtype=np.int32), np.empty((_BLOCK, _BLOCK), dtype=np.float32)
    i0 = i * _BLOCK
    for j in range(other.shape[0]):
        j0 = j * _BLOCK
        and_tile(packed, i, other, j, counts)
        _r2_tile(counts, count_l[i0:], reciprocal_l[i0:], count_m[j0:], reciprocal_m[j0:], n, values)
        _write(values, out, i0, j0)


@numba.njit(cache=True, nogil=True, parallel=True)
def _r2_rectangle(
    packed: np.ndarray,
    count_l: np.ndarray,
    reciprocal_l: np.ndarray,
    other: np.ndarray,
    count_m: np.ndarray,
    reciprocal_m: np.ndarray,
    n: int,
    out: np.ndarray,
) -> None:
    for i in numba.prange(packed.shape[0]):
        _rectangle_row(packed, count_l, reciprocal_l, other, count_m, reciprocal_m, n, out, i)


@numba.njit(cache=True, nogil=True)
def _decay_row(
    packed: np.ndarray,
    count_l: np.ndarray,
    reciprocal_l: np.ndarray,
    n: int,
    position_bp: np.ndarray,
    edges_bp: np.ndarray,
    sums: np.ndarray,
    pairs: np.ndarray,
    i: int,
) -> None:
    """Histogram of block row i. Positions rise along a row, so the bin only moves up: no search per pair."""
    counts, values = np.empty(_BLOCK * _BLOCK, dtype=np.int32), np.empty((_BLOCK, _BLOCK))
    sites, bins = len(position_bp), len(edges_bp) - 1
    i0, i1 = i * _BLOCK, min(sites, (i + 1) * _BLOCK)
    bin_r = np.zeros(_BLOCK, dtype=np.int64)
    for j in range(i, packed.shape[0]):
        j0, j1 = j * _BLOCK, min(sites, (j + 1) * _BLOCK)
        if position_bp[j1 - 1] - position_bp[i0] < edges_bp[0]:
            continue
        if position_bp[j0] - position_bp[i1 - 1] >= edges_bp[bins]:
            break
        and_tile(packed, i, packed, j, counts)
        _r2_tile(counts, count_l[i0:], reciprocal_l[i0:], count_l[j0:], reciprocal_l[j0:], n, values)
        for r in range(i1 - i0):
            b = bin_r[r]
            start = position_bp[i0 + r]
            for c in range(max(j0, i0 + r + 1) - j0, j1 - j0):
                distance_bp = position_bp[j0 + c] - start
                if distance_bp < edges_bp[0]:
                    continue
                while b < bins and distance_bp >= edges_bp[b + 1]:
                    b += 1
                if b == bins:
                    break
                value = values[r, c]
                if value == value:
                    sums[b] += value
                    pairs[b] += 1
            bin_r[r] = b


@numba.njit(cache=True, nogil=True, parallel=True)
def _r2_decay(
    packed: np.ndarray,
    count_l: np.ndarray,
    reciprocal_l: np.ndarray,
    n: int,
    position_bp: np.ndarray,
    edges_bp: np.ndarray,
    sums: np.ndarray,
    pairs: np.ndarray,
) -> None:
    blocks = packed.shape[0]
    for i in numba.prange((blocks + 1) // 2):
        _decay_row(packed, count_l, reciprocal_l, n, position_bp, edges_bp, sums[i], pairs[i], i)
        k = blocks - 1 - i
        if i != k:
            _decay_row(packed, count_l, reciprocal_l, n, position_bp, edges_bp, sums[k], pairs[k], k)


@numba.njit(cache=True, nogil=True)
def _moments(bits_lw: np.ndarray, n: int, count_l: np.ndarray, reciprocal_l: np.ndarray) -> None:
    for site in range(bits_lw.shape[0]):
        total = np.uint64(0)
        for w in range(bits_lw.shape[1]):
            total += ctpop(bits_lw[site, w])  # type: ignore[call-arg]
        count = np.float64(total)
        variance = count * (n - count)
        count_l[site] = count
        reciprocal_l[site] = 1.0 / variance if variance > 0 else np.nan


@numba.njit(cache=True, nogil=True, parallel=True)
def _r2_pairs(
    bits_lw: np.ndarray,
    count_l: np.ndarray,
    reciprocal_l: np.ndarray,
    n: int,
    i: np.ndarray,
    j: np.ndarray,
    out: np.ndarray,
) -> None:
    for p in numba.prange(len(i)):
        a, b = i[p], j[p]
        both = np.uint64(0)
        for w in range(bits_lw.shape[1]):
            both += ctpop(bits_lw[a, w] & bits_lw[b, w])  # type: ignore[call-arg]
        x = n * np.float64(both) - count_l[a] * count_l[b]
        out[p] = (x * reciprocal_l[a]) * (x * reciprocal_l[b])
