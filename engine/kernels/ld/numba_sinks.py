"""What becomes of tiles when no matrix is wanted, on the CPU: lists of pairs above a threshold, LD scores, decay by distance.

Each strip of block rows is a task of its own; whatever the number of threads, lists come in the same order and sums are made in
the same.
"""

from __future__ import annotations

import numba
import numpy as np

from engine.kernels.bits.tiles import BLOCK, trailing_zeros
from engine.kernels.ld.checks import Sites
from engine.kernels.ld.numba_tiles import (
    AHEAD,
    CODES,
    PHASED_MISSING,
    STRIP,
    Planes,
    blocks,
    each,
    formula,
    judge,
    look_ahead,
    reach_of,
    run,
    scratch,
    sums_of,
    tile,
)  # fmt: skip


def threshold(
    first: Sites, other: Sites | None, end_l: np.ndarray | None, least: np.float32, measure: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """i, j int64 and value float32 where |value| >= least: i < j < end_l[i] of one set, or every pair of two; by i, then j."""
    a, b = blocks(first, other)
    here = len(first.bits_lw)
    if other is not None:
        end_l = np.full(here, len(other.bits_lw), dtype=np.int64)
    assert end_l is not None
    code = CODES[measure]
    found = list(each(lambda k: _above(code, a, b, other is None, end_l, least, k * STRIP), -(-len(a.p0) // STRIP)))
    if not found:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    i, j, value = (np.concatenate(part) for part in zip(*found))
    return i, j, value


@numba.njit(cache=True, nogil=True)
def _above(
    code: int, a: Planes, b: Planes, same: bool, end_l: np.ndarray, least: np.float32, first: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs of the strip from block row `first` on, sorted: hits come tile by tile, are counted, and laid out by rows."""
    room, values = scratch(a), np.empty((BLOCK, BLOCK), dtype=np.float32)
    near = np.empty(BLOCK, dtype=np.uint32)
    rows, columns, kept = np.empty(256, dtype=np.uint16), np.empty(256, dtype=np.int64), np.empty(256, dtype=np.float32)
    reach = reach_of(a, same, end_l, first)
    per_row, hits, i0 = np.zeros(STRIP * BLOCK, dtype=np.int64), 0, first * BLOCK
    for ahead in range(reach[0, 0], reach[-1, 1], AHEAD):
        look_ahead(a, first, b, ahead, reach, room)
        for i in range(first, first + len(reach)):
            for j in range(max(ahead, reach[i - first, 0]), min(ahead + AHEAD, reach[i - first, 1])):
                j0, counts = j * BLOCK, sums_of(a, i, first, b, j, ahead, room)
                judged = _near(code, a, i, b, j, least, counts, values, near)
                for r in range(min(BLOCK, len(end_l) - i * BLOCK)):
                    site = i * BLOCK + r
                    begin, end = max(site + 1, j0) - j0 if same else 0, min(end_l[site] - j0, BLOCK)
                    word = np.uint64(near[r])
                    if word == 0 or begin >= end:
                        continue
                    word &= ((np.uint64(1) << np.uint64(end)) - np.uint64(1)) >> np.uint64(begin) << np.uint64(begin)
                    if hits + BLOCK > len(kept):
                        rows, columns, kept = _doubled(rows), _doubled(columns), _doubled(kept)
                    while word != 0:
                        c = np.int64(trailing_zeros(word))  # type: ignore[call-arg]
                        word &= word - np.uint64(1)
                        value = _r2(a, site, b, j0 + c, counts[r * BLOCK + c]) if judged else values[r, c]
                        if np.abs(value) >= least:
                            rows[hits], columns[hits], kept[hits] = site - i0, j0 + c, value
                            hits += 1
                            per_row[site - i0] += 1
    place = np.zeros(STRIP * BLOCK, dtype=np.int64)
    for r in range(1, len(place)):
        place[r] = place[r - 1] + per_row[r - 1]
    at_i, at_j, out = np.empty(hits, dtype=np.int64), np.empty(hits, dtype=np.int64), np.empty(hits, dtype=np.float32)
    for k in range(hits):
        to = place[rows[k]]
        at_i[to], at_j[to], out[to] = i0 + np.int64(rows[k]), columns[k], kept[k]
        place[rows[k]] += 1
    return at_i, at_j, out


@numba.njit(cache=True, nogil=True)
def _near(
    code: int,
    a: Planes,
    i: int,
    b: Planes,
    j: int,
    least: np.float32,
    counts: np.ndarray,
    values: np.ndarray,
    near: np.ndarray,
) -> bool:
    """near uint32 (32,): bit c of r where a pair may reach `least`. True: r2 was held against a bound that needs no quotient,
    and only the sums are there; False: the values are, and the bits are final.
    """
    if code == 0 and a.kind < PHASED_MISSING:
        judge(a, i, b, j, np.float64(least) * (1 - 2.0**-20) if least > 0 else -1.0, counts, near)
        return True
    tile(code, a, i, b, j, counts, values, 0, 0)
    for r in range(BLOCK):
        word = np.uint32(0)
        for c in range(BLOCK):
            word |= np.uint32(np.abs(values[r, c]) >= least) << np.uint32(c)
        near[r] = word
    return False


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _r2(a: Planes, i: int, b: Planes, j: int, sxy: int) -> np.float32:
    n, sx, sy = np.float64(a.n), a.sum_l[i], b.sum_l[j]
    return np.float32(formula(0, n, 1.0, sx, sy, a.variance_l[i], b.variance_l[j], n * np.float64(sxy) - sx * sy))


@numba.njit(cache=True, nogil=True)
def _doubled(array: np.ndarray) -> np.ndarray:
    longer = np.empty(2 * len(array), dtype=array.dtype)
    longer[: len(array)] = array
    return longer


def score(first: Sites, end_l: np.ndarray, adjusted: bool) -> np.ndarray:
    """float64 (L,): sum of r2 with the site itself and with every site in whose window it is or that is in its window."""
    a, _ = blocks(first)
    code = CODES["r2_adjusted" if adjusted else "r2"]
    sums_l = np.zeros(len(a.p0) * BLOCK)
    for k, sums in enumerate(each(lambda k: _score_rows(code, a, end_l, k * STRIP), -(-len(a.p0) // STRIP))):
        sums_l[k * STRIP * BLOCK :][: len(sums)] += sums
    # and 1, the r2 of a site with itself, or NaN where it does not vary
    return sums_l[: len(end_l)] + np.where(a.variance_l[: len(end_l)] > 0, 1.0, np.nan)


@numba.njit(cache=True, nogil=True)
def _score_rows(code: int, a: Planes, end_l: np.ndarray, first: int) -> np.ndarray:
    """Sums of a strip of block rows, for its own sites and those of their windows, from its first site on."""
    room, values = scratch(a), np.empty((BLOCK, BLOCK))
    reach = reach_of(a, True, end_l, first)
    sums = np.zeros((max(reach[-1, 1], first + len(reach)) - first) * BLOCK)
    for ahead in range(first, reach[-1, 1], AHEAD):
        look_ahead(a, first, a, ahead, reach, room)
        for i in range(first, first + len(reach)):
            for j in range(max(ahead, i), min(ahead + AHEAD, reach[i - first, 1])):
                j0 = j * BLOCK
                tile(code, a, i, a, j, sums_of(a, i, first, a, j, ahead, room), values, 0, 0)
                for r in range(min(BLOCK, len(end_l) - i * BLOCK)):
                    site = i * BLOCK + r
                    begin, end = max(site + 1, j0) - j0, min(end_l[site] - j0, BLOCK)
                    if begin < end:
                        sums[site - first * BLOCK] += _add_row(values, r, begin, end, sums, j0 - first * BLOCK)
    return sums


@numba.njit(cache=True, nogil=True, fastmath={"reassoc"})
def _add_row(values: np.ndarray, r: int, begin: int, end: int, across: np.ndarray, at: int) -> float:
    """Sum of values[r, begin:end], which are also added to `across` from `at` on; NaN counts as 0."""
    total = 0.0
    for c in range(begin, end):
        value = values[r, c]
        value = value if value == value else 0.0
        across[at + c] += value
        total += value
    return total


@numba.njit(cache=True, nogil=True, fastmath={"reassoc"})
def _sum_row(values: np.ndarray, r: int, begin: int, end: int) -> tuple[float, int]:
    """Sum and number of values[r, begin:end] that are not NaN."""
    total, count = 0.0, 0
    for c in range(begin, end):
        value = values[r, c]
        total += value if value == value else 0.0
        count += value == value
    return total, count


def decay(first: Sites, position_l: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of r2 (float64) and number of pairs (int64) per distance bin; the matrix is never held."""
    a, _ = blocks(first)
    strips = -(-len(a.p0) // STRIP)
    sums, counts = np.zeros((strips, len(edges) - 1)), np.zeros((strips, len(edges) - 1), dtype=np.int64)
    run(lambda k: _decay_rows(a, position_l, edges, sums[k], counts[k], k * STRIP), strips)
    return sums.sum(axis=0), counts.sum(axis=0)


@numba.njit(cache=True, nogil=True)
def _decay_rows(
    a: Planes, position_l: np.ndarray, edges: np.ndarray, sums: np.ndarray, pairs: np.ndarray, first: int
) -> None:
    """Histogram of a strip. Positions rise along a row, so the bin only moves up, and what falls into one lies together."""
    room, values = scratch(a), np.empty((BLOCK, BLOCK))
    sites, bins = len(position_l), len(edges) - 1
    reach = _within(a, position_l, edges, first)
    bin_r = np.zeros(STRIP * BLOCK, dtype=np.int64)
    for ahead in range(reach[0, 0], reach[-1, 1], AHEAD):
        look_ahead(a, first, a, ahead, reach, room)
        for i in range(first, first + len(reach)):
            for j in range(max(ahead, reach[i - first, 0]), min(ahead + AHEAD, reach[i - first, 1])):
                tile(0, a, i, a, j, sums_of(a, i, first, a, j, ahead, room), values, 0, 0)
                j0, j1 = j * BLOCK, min(sites, (j + 1) * BLOCK)
                for r in range(min(BLOCK, sites - i * BLOCK)):
                    site = i * BLOCK + r
                    b = bin_r[site - first * BLOCK]
                    c, end = max(j0, site + 1) - j0, j1 - j0
                    start = position_l[site]
                    while c < end and position_l[j0 + c] - start < edges[0]:
                        c += 1
                    while c < end and b < bins:  # the stretch of the tile's row that falls into one bin
                        stop = c
                        if position_l[j0 + end - 1] - start < edges[b + 1]:
                            stop = end
                        while stop < end and position_l[j0 + stop] - start < edges[b + 1]:
                            stop += 1
                        if stop > c:
                            total, count = _sum_row(values, r, c, stop)
                            sums[b] += total
                            pairs[b] += count
                        c = stop
                        if c < end:
                            b += 1
                    bin_r[site - first * BLOCK] = b


@numba.njit(cache=True, nogil=True)
def _within(a: Planes, position_l: np.ndarray, edges: np.ndarray, first: int) -> np.ndarray:
    """int64 (rows, 2): the block columns [from, to) of each block row of a strip where a distance may fall into a bin."""
    sites, blocks = len(position_l), a.p0.shape[0]
    reach = np.empty((min(STRIP, blocks - first), 2), dtype=np.int64)
    for k in range(len(reach)):
        i0, i1 = (first + k) * BLOCK, min(sites, (first + k + 1) * BLOCK)
        j = first + k
        while j < blocks and position_l[min(sites, (j + 1) * BLOCK) - 1] - position_l[i0] < edges[0]:
            j += 1
        reach[k, 0] = j
        while j < blocks and position_l[j * BLOCK] - position_l[i1 - 1] < edges[-1]:
            j += 1
        reach[k, 1] = j
    return reach
