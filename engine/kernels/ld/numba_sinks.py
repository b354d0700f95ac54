"""What becomes of tiles when no matrix is wanted, on the CPU: lists of pairs above a threshold, LD scores, decay by distance.

Each block row is a task of its own; whatever the number of threads, lists come in the same order and sums are made in the same.
"""

from __future__ import annotations

import numba
import numpy as np

from engine.kernels.bits.tiles import BLOCK, trailing_zeros
from engine.kernels.ld.checks import Sites
from engine.kernels.ld.numba_tiles import (
    CODES,
    PHASED_MISSING,
    Planes,
    blocks,
    each,
    formula,
    judge,
    run,
    tile,
    tile_sums,
)

_ROWS = 4  # block rows of a task: what it costs to begin one is little beside them


def threshold(
    first: Sites, other: Sites | None, end_l: np.ndarray | None, least: np.float32, measure: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """i, j int64 and value float32 where |value| >= least: i < j < end_l[i] of one set, or every pair of two; by i, then j."""
    a, b = blocks(first, other)
    here = len(first.bits_lw)
    if other is not None:
        end_l = np.full(here, len(other.bits_lw), dtype=np.int64)
    assert end_l is not None
    code, count = CODES[measure], len(a.p0)
    found = list(
        each(
            lambda k: _above(code, a, b, other is None, end_l, least, k * _ROWS, min(count, (k + 1) * _ROWS)),
            -(-count // _ROWS),
        )
    )
    if not found:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    i, j, value = (np.concatenate(part) for part in zip(*found))
    return i, j, value


@numba.njit(cache=True, nogil=True)
def _above(
    code: int, a: Planes, b: Planes, same: bool, end_l: np.ndarray, least: np.float32, first: int, last: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs of block rows [first, last), sorted: the hits of a block row come tile by tile, are counted, and laid out."""
    counts, values = np.empty(6 * BLOCK * BLOCK, dtype=np.int32), np.empty((BLOCK, BLOCK), dtype=np.float32)
    near = np.empty(BLOCK, dtype=np.uint32)
    rows, columns, kept = np.empty(256, dtype=np.uint8), np.empty(256, dtype=np.int64), np.empty(256, dtype=np.float32)
    at_i, at_j, out = np.empty(256, dtype=np.int64), np.empty(256, dtype=np.int64), np.empty(256, dtype=np.float32)
    found = 0
    for i in range(first, last):
        i0, i1 = i * BLOCK, min(len(end_l), (i + 1) * BLOCK)
        per_row, hits = np.zeros(BLOCK, dtype=np.int64), 0
        for j in range(i if same else 0, (end_l[i1 - 1] + BLOCK - 1) // BLOCK):
            j0 = j * BLOCK
            judged = _near(code, a, i, b, j, least, counts, values, near)
            for r in range(i1 - i0):
                begin, end = max(i0 + r + 1, j0) - j0 if same else 0, min(end_l[i0 + r] - j0, BLOCK)
                word = np.uint64(near[r])
                if word == 0 or begin >= end:
                    continue
                word &= ((np.uint64(1) << np.uint64(end)) - np.uint64(1)) >> np.uint64(begin) << np.uint64(begin)
                if hits + BLOCK > len(kept):
                    rows, columns, kept = _doubled(rows), _doubled(columns), _doubled(kept)
                while word != 0:
                    c = np.int64(trailing_zeros(word))  # type: ignore[call-arg]
                    word &= word - np.uint64(1)
                    value = _r2(a, i0 + r, b, j0 + c, counts[r * BLOCK + c]) if judged else values[r, c]
                    if np.abs(value) >= least:
                        rows[hits], columns[hits], kept[hits] = r, j0 + c, value
                        hits += 1
                        per_row[r] += 1
        while found + hits > len(out):
            at_i, at_j, out = _doubled(at_i), _doubled(at_j), _doubled(out)
        place = np.full(BLOCK, found, dtype=np.int64)
        for r in range(1, BLOCK):
            place[r] = place[r - 1] + per_row[r - 1]
        for k in range(hits):
            r = rows[k]
            at_i[place[r]], at_j[place[r]], out[place[r]] = i0 + r, columns[k], kept[k]
            place[r] += 1
        found += hits
    return at_i[:found], at_j[:found], out[:found]


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
        tile_sums(a, i, b, j, counts)
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
    for i, (along, across) in enumerate(each(lambda k: _score_row(code, a, end_l, k), len(a.p0))):
        sums_l[i * BLOCK : (i + 1) * BLOCK] += along
        sums_l[i * BLOCK : i * BLOCK + len(across)] += across
    own_l = np.empty(len(end_l))
    _own(a, own_l)
    return sums_l[: len(end_l)] + own_l


@numba.njit(cache=True, nogil=True)
def _score_row(code: int, a: Planes, end_l: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of block row i, for its own sites (32,) and for the sites of its window, from its first site on."""
    counts, values = np.empty(6 * BLOCK * BLOCK, dtype=np.int32), np.empty((BLOCK, BLOCK))
    i0, i1 = i * BLOCK, min(len(end_l), (i + 1) * BLOCK)
    last = max(i + 1, (end_l[i1 - 1] + BLOCK - 1) // BLOCK)
    along, across = np.zeros(BLOCK), np.zeros((last - i) * BLOCK)
    for j in range(i, last):
        j0 = j * BLOCK
        tile(code, a, i, a, j, counts, values, 0, 0)
        for r in range(i1 - i0):
            site = i0 + r
            begin, end = max(site + 1, j0) - j0, min(end_l[site] - j0, BLOCK)
            if begin < end:
                along[r] += _add_row(values, r, begin, end, across, j0 - i0)
    return along, across


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


@numba.njit(cache=True, nogil=True)
def _own(a: Planes, own_l: np.ndarray) -> None:
    """1, the r2 of a site with itself, or NaN where it does not vary: the diagonal of the diagonal tiles."""
    counts, values = np.empty(6 * BLOCK * BLOCK, dtype=np.int32), np.empty((BLOCK, BLOCK))
    for i in range(a.p0.shape[0]):
        tile(0, a, i, a, i, counts, values, 0, 0)
        for r in range(min(BLOCK, len(own_l) - i * BLOCK)):
            own_l[i * BLOCK + r] = values[r, r]


def decay(first: Sites, position_l: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of r2 (float64) and number of pairs (int64) per distance bin; the matrix is never held."""
    a, _ = blocks(first)
    sums, counts = np.zeros((len(a.p0), len(edges) - 1)), np.zeros((len(a.p0), len(edges) - 1), dtype=np.int64)
    run(lambda k: _decay_row(a, position_l, edges, sums[k], counts[k], k), len(a.p0))
    return sums.sum(axis=0), counts.sum(axis=0)


@numba.njit(cache=True, nogil=True)
def _decay_row(
    a: Planes, position_l: np.ndarray, edges: np.ndarray, sums: np.ndarray, pairs: np.ndarray, i: int
) -> None:
    """Histogram of block row i. Positions rise along a row, so the bin only moves up, and what falls into one lies together."""
    counts, values = np.empty(6 * BLOCK * BLOCK, dtype=np.int32), np.empty((BLOCK, BLOCK))
    sites, bins = len(position_l), len(edges) - 1
    i0, i1 = i * BLOCK, min(sites, (i + 1) * BLOCK)
    bin_r = np.zeros(BLOCK, dtype=np.int64)
    for j in range(i, a.p0.shape[0]):
        j0, j1 = j * BLOCK, min(sites, (j + 1) * BLOCK)
        if position_l[j1 - 1] - position_l[i0] < edges[0]:
            continue
        if position_l[j0] - position_l[i1 - 1] >= edges[bins]:
            break
        tile(0, a, i, a, j, counts, values, 0, 0)
        for r in range(i1 - i0):
            b = bin_r[r]
            c, end = max(j0, i0 + r + 1) - j0, j1 - j0
            start = position_l[i0 + r]
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
            bin_r[r] = b
