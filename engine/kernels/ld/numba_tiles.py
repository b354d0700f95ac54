"""Values of one 32 x 32 tile of pairs on the CPU: counts by `bits.tiles`, then the formulas of reference_values.py in vectors.

Everything else in this room (matrix, band, lists, histograms, scores) is a sink that asks for tiles here. Sinks are ordinary
Numba functions without threads; `each` runs them over block rows in threads, in an order that no thread count changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numba
import numpy as np

from engine.kernels import bits
from engine.kernels.bits import amx, tile_lookups
from engine.kernels.bits.tiles import BLOCK, and_tile, ctpop, dot_tile, interleaved
from engine.kernels.ld.checks import Sites

CODES = {"r2": 0, "r": 1, "d": 2, "d_prime": 3, "r2_adjusted": 4}
PHASED, UNPHASED, PHASED_MISSING, UNPHASED_MISSING = 0, 1, 2, 3
COUNTED, MULTIPLIED, LOOKED_UP = 0, 1, 2  # how sums are made: the same integers
STRIP, AHEAD = 8, 16  # block rows of a task, and block columns that it looks at before it goes on
_MULTIPLIED_FROM = 256  # people; with fewer, spreading the values costs what multiplying them gains
Result = TypeVar("Result")


class Planes(NamedTuple):
    """Sites as the kernels read them.

    kind: one of the four above. n: haplotypes or people. p0 ... p3: uint64, interleaved (blocks, W, 32) or rows (L, W):
    the alleles, or `nonzero`, `negative` of dosage - 1; where something is missing also `positive`, `observed`; planes that
    a kind does not need are p0 again. sum_l, variance_l: float64 (L,) or (blocks * 32,), of what each site has: sum, and n
    times the sum of squares less the square of the sum. way: how sums are made: COUNTED, one tile after the other by popcount;
    MULTIPLIED, many at a time on the matrix unit (`bits.amx`); LOOKED_UP, many at a time by looking up what nibbles have in
    common (`bits.tile_lookups`), for which p0 has the alleles of dosages too.
    """

    kind: int
    n: int
    p0: np.ndarray
    p1: np.ndarray
    p2: np.ndarray
    p3: np.ndarray
    sum_l: np.ndarray
    variance_l: np.ndarray
    way: int


class Scratch(NamedTuple):
    """What a task works in; empty where it is not used. counts: int32 (6 * 1024,), sums of one tile. sums: int32 (STRIP, AHEAD,
    1024), those of many. values: int8, what the matrix unit multiplies. lookups: what is looked up.
    """

    counts: np.ndarray
    sums: np.ndarray
    values: np.ndarray
    lookups: tile_lookups.Room


def rows(sites: Sites, missing: bool) -> Planes:
    """Planes with a row for each site; `missing`: of a missing kind, whether or not this set misses anything."""
    length, n = len(sites.bits_lw), sites.n // 2 if sites.unphased else sites.n
    sum_l, variance_l = np.empty(length), np.empty(length)
    if sites.unphased and not missing:
        p0, p1 = (np.empty((length, (n + 63) // 64), dtype=np.uint64) for _ in range(2))
        _dosages(sites.bits_lw, n, p0, p1, sum_l, variance_l)
        return Planes(UNPHASED, n, p0, p1, p0, p0, sum_l, variance_l, COUNTED)
    if sites.unphased:
        made = bits.dosage_planes(sites.bits_lw, sites.n, sites.missing_lw, implementation="numba")
        p0, p1, p2, p3 = made.nonzero_lw, made.negative_lw, made.nonzero_lw & ~made.negative_lw, made.observed_lw
    else:
        p0 = p3 = _masked(sites.bits_lw, n)
        if missing:
            called = np.full_like(p0, np.uint64(2**64 - 1)) if sites.missing_lw is None else ~sites.missing_lw
            p3 = _masked(called, n)
            p0 = p0 & p3
        p1 = p2 = p0
    kind = int(sites.unphased) + 2 * int(missing)
    _moments(kind, n, p0, p1, p3, sum_l, variance_l)
    return Planes(kind, n, p0, p1, p2, p3, sum_l, variance_l, COUNTED)


def blocks(sites: Sites, other: Sites | None = None) -> tuple[Planes, Planes]:
    """Interleaved planes of both sets (the same object twice where `other` is None)."""
    missing = misses(sites) or (other is not None and misses(other))

    def of(one: Sites) -> Planes:
        planes = rows(one, missing)
        way = _way(planes, one.bits_lw.shape[1])
        if way == LOOKED_UP and planes.kind == UNPHASED:
            alleles = _masked(one.bits_lw, one.n)
            planes = planes._replace(p0=alleles, p1=alleles, p2=alleles, p3=alleles)
        return blocks_of(planes)._replace(way=way)

    first = of(sites)
    return first, first if other is None else of(other)


def _way(planes: Planes, words: int) -> int:
    if planes.kind == UNPHASED and planes.n >= _MULTIPLIED_FROM and amx.granted():
        return MULTIPLIED
    if planes.kind < PHASED_MISSING and tile_lookups.preferred(words):
        return LOOKED_UP
    return COUNTED


def misses(sites: Sites) -> bool:
    """Whether a genotype is missing at all: a plane of zeros takes the fast path and gives the same values."""
    return sites.missing_lw is not None and bool(_masked(sites.missing_lw, sites.n).any())


def blocks_of(planes: Planes) -> Planes:
    """Planes with a row for each site, interleaved."""
    done: dict[int, np.ndarray] = {}
    for plane in planes[2:6]:
        if id(plane) not in done:
            done[id(plane)] = interleaved(plane)
    p0, p1, p2, p3 = (done[id(plane)] for plane in planes[2:6])
    sum_l, variance_l = np.zeros(len(p0) * BLOCK), np.zeros(len(p0) * BLOCK)
    sum_l[: len(planes.sum_l)], variance_l[: len(planes.sum_l)] = planes.sum_l, planes.variance_l
    return Planes(planes.kind, planes.n, p0, p1, p2, p3, sum_l, variance_l, COUNTED)


def _masked(bits_lw: np.ndarray, n: int) -> np.ndarray:
    """`bits_lw` with nothing beyond haplotype n; a copy only where there was something."""
    if n % 64 and bits_lw.size and (bits_lw[:, -1] >> np.uint64(n % 64)).any():
        bits_lw = bits_lw.copy()
        bits_lw[:, -1] &= np.uint64((1 << (n % 64)) - 1)
    return bits_lw


def each(task: Callable[[int], Result], count: int) -> Iterator[Result]:
    """task(0), task(1), ... in this order, computed by `numba.get_num_threads()` threads, few of them ahead of the reader.

    The tasks are compiled functions that release the interpreter. Threads of Python, not Numba's: a task may return an array
    of a size that it alone knows, and the reader may pass it on before the last one is done.
    """
    threads = min(numba.get_num_threads(), count)
    if threads <= 1:
        yield from map(task, range(count))
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead = [pool.submit(task, k) for k in range(min(count, 4 * threads))]
        for k in range(count):
            yield ahead.pop(0).result()
            if k + 4 * threads < count:
                ahead.append(pool.submit(task, k + 4 * threads))


def run(task: Callable[[int], None], count: int) -> None:
    """`each` for tasks that write their result where it belongs."""
    for _ in each(task, count):
        pass


@numba.njit(cache=True, nogil=True)
def _dosages(
    bits_lw: np.ndarray, n: int, p0: np.ndarray, p1: np.ndarray, sum_l: np.ndarray, variance_l: np.ndarray
) -> None:
    """Planes of `bits.dosage_planes` and their moments in one pass, several words at a time: where few pairs are asked for, it
    is what costs. The dosage less one is nonzero where two neighbouring bits are alike, and negative where both are 0.
    """
    columns, last = bits_lw.shape[1], p0.shape[1] - 1
    whole = ~np.uint64(0) if n % 64 == 0 else (np.uint64(1) << np.uint64(n % 64)) - np.uint64(1)
    one, half = np.uint64(1), np.uint64(32)
    for site in range(bits_lw.shape[0]):
        row, nonzero, negative = bits_lw[site], p0[site], p1[site]
        for w in range(columns // 2):
            a, b = row[2 * w], row[2 * w + 1]
            nonzero[w] = _even_bits(~(a ^ (a >> one))) | (_even_bits(~(b ^ (b >> one))) << half)
            negative[w] = _even_bits(~(a | (a >> one))) | (_even_bits(~(b | (b >> one))) << half)
        if columns % 2:
            a = row[columns - 1]
            nonzero[last], negative[last] = _even_bits(~(a ^ (a >> one))), _even_bits(~(a | (a >> one)))
        if columns:
            nonzero[last] &= whole
            negative[last] &= whole
        ones = ones_in_row(p0, site)
        total = np.float64(ones - 2 * ones_in_row(p1, site))
        sum_l[site] = total
        variance_l[site] = n * np.float64(ones) - total * total


@numba.njit(cache=True, nogil=True)
def _even_bits(x: np.uint64) -> np.uint64:
    """Bits 0, 2, 4, ... of a word, moved together (Hacker's Delight, section 7-4)."""
    x &= np.uint64(0x5555555555555555)
    x = (x | (x >> np.uint64(1))) & np.uint64(0x3333333333333333)
    x = (x | (x >> np.uint64(2))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    x = (x | (x >> np.uint64(4))) & np.uint64(0x00FF00FF00FF00FF)
    x = (x | (x >> np.uint64(8))) & np.uint64(0x0000FFFF0000FFFF)
    return (x | (x >> np.uint64(16))) & np.uint64(0x00000000FFFFFFFF)


@numba.njit(cache=True, nogil=True)
def _moments(
    kind: int, n: int, p0: np.ndarray, p1: np.ndarray, p3: np.ndarray, sum_l: np.ndarray, variance_l: np.ndarray
) -> None:
    for site in range(p0.shape[0]):
        ones = ones_in_row(p0, site)
        total = np.float64(ones - 2 * ones_in_row(p1, site) if kind & 1 else ones)
        seen = ones_in_row(p3, site) if kind >= PHASED_MISSING else n
        sum_l[site] = total
        variance_l[site] = seen * np.float64(ones) - total * total


@numba.njit(cache=True, nogil=True)
def ones_in_row(plane: np.ndarray, row: int) -> int:
    ones = np.uint64(0)
    for w in range(plane.shape[1]):
        ones += ctpop(plane[row, w])  # type: ignore[call-arg]
    return np.int64(ones)  # type: ignore[return-value]


@numba.njit(cache=True, nogil=True, error_model="numpy", inline="always")
def formula(code: int, n: float, halves: float, sx: float, sy: float, vx: float, vy: float, x: float) -> float:
    """The value of one pair, float64, as reference_values.py defines it; `halves` is 2 for dosages, 1 for haplotypes."""
    if code == 0:
        return x * x / (vx * vy)
    if code == 1:
        return x / np.sqrt(vx * vy)
    if code == 2:
        return x / (n * n * halves)
    if code == 3:
        if x > 0:
            return x / min(sx * (n - sy), (n - sx) * sy)
        return x / min(sx * sy, (n - sx) * (n - sy))
    r2 = x * x / (vx * vy)
    return r2 - (1.0 - r2) / (n - 2.0) if n > 2 else np.nan


_CELLS = BLOCK * BLOCK


@numba.njit(cache=True, nogil=True)
def scratch(a: Planes) -> Scratch:
    rows = STRIP if a.way != COUNTED else 0
    values = np.empty(amx.STEP * amx.STRETCH * (rows + AHEAD) + 64 if a.way == MULTIPLIED else 0, dtype=np.int8)
    values = values[-values.ctypes.data % 64 :]
    return Scratch(
        np.empty(6 * _CELLS, dtype=np.int32),
        np.empty((rows, AHEAD, _CELLS), dtype=np.int32),
        values,
        tile_lookups.new_room(rows if a.way == LOOKED_UP else 0, a.p0.shape[1]),
    )


@numba.njit(cache=True, nogil=True)
def reach_of(a: Planes, same: bool, end_l: np.ndarray, first: int) -> np.ndarray:
    """int64 (rows, 2): the block columns [from, to) that the block rows of a strip from `first` on ask for, where site i is
    compared with the sites before end_l[i], and those after itself where both sets are the `same`."""
    rows = min(STRIP, a.p0.shape[0] - first)
    reach = np.empty((rows, 2), dtype=np.int64)
    for i in range(rows):
        end = end_l[min(len(end_l), (first + i + 1) * BLOCK) - 1]
        reach[i, 0] = first + i if same else 0
        reach[i, 1] = max(reach[i, 0], (end + BLOCK - 1) // BLOCK)
    return reach


@numba.njit(cache=True, nogil=True)
def look_ahead(a: Planes, i0: int, b: Planes, j0: int, reach: np.ndarray, room: Scratch) -> None:
    """Before `sums_of` the tiles of block rows from `i0` and block columns [j0, j0 + AHEAD); reach: int64 (rows, 2), the block
    columns [from, to) that each row will ask for, the last row for the furthest."""
    j1 = min(reach[-1, 1], j0 + AHEAD)
    if a.way == MULTIPLIED:
        amx.dot_tiles(a.p0, a.p1, i0, b.p0, b.p1, j0, j1, reach, room.values, room.sums)
    elif a.way == LOOKED_UP:
        tile_lookups.look_up(
            a.kind == UNPHASED, a.n, a.p0, a.sum_l, i0, b.p0, b.sum_l, j0, j1, reach, room.lookups, room.sums
        )  # fmt: skip


@numba.njit(cache=True, nogil=True, forceinline=True)
def sums_of(a: Planes, i: int, i0: int, b: Planes, j: int, j0: int, room: Scratch) -> np.ndarray:
    """Sums of block i with block j as `tile_sums` lays them out, int32, after `look_ahead` from (i0, j0); the next call may
    overwrite them."""
    if a.way != COUNTED:
        return room.sums[i - i0, j - j0]
    tile_sums(a, i, b, j, room.counts)
    return room.counts


@numba.njit(cache=True, nogil=True, forceinline=True)
def tile(
    code: int, a: Planes, i: int, b: Planes, j: int, counts: np.ndarray, out: np.ndarray, r0: int, c0: int
) -> None:
    """out[r0 : r0 + 32, c0 : c0 + 32], float32 or float64: values of block i of `a` against block j of `b`, of their sums.

    Lanes beyond the last site get values that mean nothing.
    """
    halves = 2.0 if a.kind & 1 else 1.0
    if a.kind == PHASED or a.kind == UNPHASED:
        i0, i1, j0, j1 = i * BLOCK, (i + 1) * BLOCK, j * BLOCK, (j + 1) * BLOCK
        _complete(
            code, np.float64(a.n), halves, a.sum_l[i0:i1], a.variance_l[i0:i1], b.sum_l[j0:j1], b.variance_l[j0:j1],
            counts, out, r0, c0,
        )  # fmt: skip
    else:
        _observed(code, halves, counts, out, r0, c0)


@numba.njit(cache=True, nogil=True, forceinline=True)
def tile_sums(a: Planes, i: int, b: Planes, j: int, counts: np.ndarray) -> None:
    """counts, int32 (6 * 1024,): sums of products, and where something is missing sx, sxx, sy, syy and n after it."""
    if a.kind == PHASED:
        and_tile(a.p0, i, b.p0, j, counts[:_CELLS])
    elif a.kind == UNPHASED:
        dot_tile(a.p0, a.p1, i, b.p0, b.p1, j, counts[:_CELLS])
    elif a.kind == PHASED_MISSING:
        and_tile(a.p0, i, b.p0, j, counts[:_CELLS])
        and_tile(a.p0, i, b.p3, j, counts[_CELLS : 2 * _CELLS])
        and_tile(a.p3, i, b.p0, j, counts[3 * _CELLS : 4 * _CELLS])
        counts[2 * _CELLS : 3 * _CELLS] = counts[_CELLS : 2 * _CELLS]
        counts[4 * _CELLS : 5 * _CELLS] = counts[3 * _CELLS : 4 * _CELLS]
        and_tile(a.p3, i, b.p3, j, counts[5 * _CELLS :])
    else:
        dot_tile(a.p0, a.p1, i, b.p0, b.p1, j, counts[:_CELLS])
        and_tile(a.p2, i, b.p3, j, counts[_CELLS : 2 * _CELLS])
        and_tile(a.p1, i, b.p3, j, counts[2 * _CELLS : 3 * _CELLS])
        and_tile(a.p3, i, b.p2, j, counts[3 * _CELLS : 4 * _CELLS])
        and_tile(a.p3, i, b.p1, j, counts[4 * _CELLS : 5 * _CELLS])
        for at in (_CELLS, 3 * _CELLS):  # dosage - 1 is 1 in p2 and -1 in p1: sum, and sum of squares
            for k in range(at, at + _CELLS):
                ones, negatives = counts[k], counts[k + _CELLS]
                counts[k] = ones - negatives
                counts[k + _CELLS] = ones + negatives
        and_tile(a.p3, i, b.p3, j, counts[5 * _CELLS :])


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _complete(
    code: int,
    n: float,
    halves: float,
    sum_i: np.ndarray,
    variance_i: np.ndarray,
    sum_j: np.ndarray,
    variance_j: np.ndarray,
    counts: np.ndarray,
    out: np.ndarray,
    r0: int,
    c0: int,
) -> None:
    """`formula` over a tile where nothing is missing. The measure is asked for once a row, so that the loops have no branch."""
    for r in range(BLOCK):
        sx, vx = sum_i[r], variance_i[r]
        row, sxy = (
            out[r0 + r, c0 : c0 + BLOCK],
            counts[r * BLOCK : (r + 1) * BLOCK],
        )  # a slice: else values are scattered
        if code == 0:
            for c in range(BLOCK):
                x = n * np.float64(sxy[c]) - sx * sum_j[c]
                row[c] = formula(0, n, halves, sx, sum_j[c], vx, variance_j[c], x)
        elif code == 1:
            for c in range(BLOCK):
                x = n * np.float64(sxy[c]) - sx * sum_j[c]
                row[c] = formula(1, n, halves, sx, sum_j[c], vx, variance_j[c], x)
        elif code == 2:
            for c in range(BLOCK):
                x = n * np.float64(sxy[c]) - sx * sum_j[c]
                row[c] = formula(2, n, halves, sx, sum_j[c], vx, variance_j[c], x)
        elif code == 3:
            for c in range(BLOCK):
                x = n * np.float64(sxy[c]) - sx * sum_j[c]
                row[c] = formula(3, n, halves, sx, sum_j[c], vx, variance_j[c], x)
        else:
            for c in range(BLOCK):
                x = n * np.float64(sxy[c]) - sx * sum_j[c]
                row[c] = formula(4, n, halves, sx, sum_j[c], vx, variance_j[c], x)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _observed(code: int, halves: float, counts: np.ndarray, out: np.ndarray, r0: int, c0: int) -> None:
    """`formula` over a tile of counts sxy, sx, sxx, sy, syy, n, each int32 (1024,)."""
    sums = counts.reshape(6, BLOCK, BLOCK)
    for r in range(BLOCK):
        row = out[r0 + r, c0 : c0 + BLOCK]
        for c in range(BLOCK):
            sx, sy, n = np.float64(sums[1, r, c]), np.float64(sums[3, r, c]), np.float64(sums[5, r, c])
            x = n * np.float64(sums[0, r, c]) - sx * sy
            vx, vy = n * np.float64(sums[2, r, c]) - sx * sx, n * np.float64(sums[4, r, c]) - sy * sy
            row[c] = formula(code, n, halves, sx, sy, vx, vy, x)


@numba.njit(cache=True, nogil=True)
def judge(a: Planes, i: int, b: Planes, j: int, most: float, counts: np.ndarray, linked: np.ndarray) -> None:
    """linked uint32 (32,): bit c of r where x x > most vx vy, for the sums of one tile. No quotient, and a bit for a pair."""
    if a.kind >= PHASED_MISSING:
        sums = counts.reshape(6, BLOCK, BLOCK)
        for r in range(BLOCK):
            word = np.uint32(0)
            for c in range(BLOCK):
                sx, sy, n = np.float64(sums[1, r, c]), np.float64(sums[3, r, c]), np.float64(sums[5, r, c])
                x = n * np.float64(sums[0, r, c]) - sx * sy
                vx, vy = n * np.float64(sums[2, r, c]) - sx * sx, n * np.float64(sums[4, r, c]) - sy * sy
                word |= np.uint32(x * x > most * vx * vy) << np.uint32(c)
            linked[r] = word
        return
    n, products = np.float64(a.n), counts[:_CELLS].reshape(BLOCK, BLOCK)
    sum_j, variance_j = b.sum_l[j * BLOCK : (j + 1) * BLOCK], b.variance_l[j * BLOCK : (j + 1) * BLOCK]
    for r in range(BLOCK):
        sx, bound, word = a.sum_l[i * BLOCK + r], most * a.variance_l[i * BLOCK + r], np.uint32(0)
        for c in range(BLOCK):
            x = n * np.float64(products[r, c]) - sx * sum_j[c]
            word |= np.uint32(x * x > bound * variance_j[c]) << np.uint32(c)
        linked[r] = word
