"""All pairs, two sets, bands and listed pairs on the CPU: values of tiles (numba_tiles.py), written where they belong.

Where a matrix is larger than the caches, writing it costs as much as computing it. So tiles are gathered to squares of
256 x 256, mirrored in registers, and written by streaming stores in whole cache lines, which spares reading what is about to
be overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from engine.kernels.bits.tiles import BLOCK, WIDE, ctpop
from engine.kernels.ld.checks import Sites
from engine.kernels.ld.numba_tiles import (
    AHEAD,
    CODES,
    PHASED,
    PHASED_MISSING,
    STRIP,
    UNPHASED,
    Planes,
    blocks,
    each,
    formula,
    look_ahead,
    misses,
    ones_in_row,
    reach_of,
    rows,
    run,
    scratch,
    sums_of,
    tile,
)  # fmt: skip

_SIDE = STRIP * BLOCK  # sites along a square: two of them and the words of its blocks fit a second-level cache
_LINE = 16  # float32 in a cache line
_WIDTH = 16 if WIDE else 8  # float32 in a register
_PAIRS_AT_ONCE = 65536


def matrix(first: Sites, other: Sites | None, measure: str, out: np.ndarray | None = None) -> np.ndarray:
    """float32 (L, L), or (L, M) against a second set of sites; into `out` where it is given."""
    a, b = blocks(first, other)
    shape = (len(first.bits_lw), len(first.bits_lw if other is None else other.bits_lw))
    out = _aligned(shape) if out is None else out
    if out.size:
        squares, code = -(-shape[0] // _SIDE), CODES[measure]
        if other is None:
            run(lambda k: _triangle_squares(code, a, out, k), squares)
        else:
            run(lambda k: _rectangle_squares(code, a, b, out, k), squares)
    return out


def _aligned(shape: tuple[int, int]) -> np.ndarray:
    """float32, its first element on a cache line; NumPy asks for huge pages by itself."""
    size = shape[0] * shape[1]
    storage = np.empty(size + _LINE, dtype=np.float32)
    start = (-storage.ctypes.data % 64) // 4
    return storage[start : start + size].reshape(shape)


@intrinsic
def _stream_line(typingctx: Any, source: Any, at: Any, target: Any, to: Any) -> Any:
    """16 float32 of `source` from element `at` to `target` from element `to`, a multiple of 64 bytes, past the caches."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line = ir.VectorType(ir.FloatType(), _LINE)
        pointers = []
        for k in (0, 2):
            data = context.make_array(signature.args[k])(context, builder, args[k]).data
            pointers.append(builder.bitcast(builder.gep(data, [args[k + 1]]), line.as_pointer()))
        store = builder.store(builder.load(pointers[0], align=4), pointers[1], align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), codegen


@intrinsic
def _fence(typingctx: Any) -> Any:
    """What was streamed is seen by every thread that is told of it from here on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _transpose(typingctx: Any, source: Any, at: Any, pitch: Any, target: Any, to: Any) -> Any:
    """_WIDTH x _WIDTH float32 of `source` from element `at`, mirrored into `target` from element `to`; rows `pitch` apart.

    In log2(_WIDTH) rounds, each of which exchanges the squares off the diagonal of every 2 x 2 of squares.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector, index = ir.VectorType(ir.FloatType(), _WIDTH), ir.IntType(64)

        def row(k: int, start: Any, r: int) -> Any:
            data = context.make_array(signature.args[k])(context, builder, args[k]).data
            where = builder.add(start, builder.mul(args[2], ir.Constant(index, r)))
            return builder.bitcast(builder.gep(data, [where]), vector.as_pointer())

        def mixed(x: Any, y: Any, lanes: list[int]) -> Any:
            return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), _WIDTH), lanes))

        held = [builder.load(row(0, args[1], r), align=4) for r in range(_WIDTH)]
        step = 1
        while step < _WIDTH:
            upper = [c if not c & step else _WIDTH + c - step for c in range(_WIDTH)]
            lower = [c + step if not c & step else _WIDTH + c for c in range(_WIDTH)]
            for r in range(_WIDTH):
                if not r & step:
                    x, y = held[r], held[r + step]
                    held[r], held[r + step] = mixed(x, y, upper), mixed(x, y, lower)
            step *= 2
        for r in range(_WIDTH):
            builder.store(held[r], row(3, args[4], r), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp), codegen


@numba.njit(cache=True, nogil=True)
def _mirror(square: np.ndarray, r0: int, c0: int, mirrored: np.ndarray) -> None:
    """The tile at (r0, c0) of `square` to (c0, r0) of `mirrored`."""
    pitch = square.shape[1]
    for r in range(r0, r0 + BLOCK, _WIDTH):
        for c in range(c0, c0 + BLOCK, _WIDTH):
            _transpose(square, r * pitch + c, pitch, mirrored, c * pitch + r)  # type: ignore[call-arg]


@numba.njit(cache=True, nogil=True)
def _write(square: np.ndarray, out: np.ndarray, at: int, to: int) -> None:
    """Copy what of `square` lies inside `out` to rows from `at`, columns from `to`: whole lines past the caches."""
    height, width = min(_SIDE, out.shape[0] - at), min(_SIDE, out.shape[1] - to)
    pitch, base = square.shape[1], out.ctypes.data
    for r in range(height):
        start = (at + r) * out.shape[1] + to
        head = min(width, ((-(base + 4 * start)) % 64) // 4)
        lines = (width - head) // _LINE
        for c in range(head):
            out[at + r, to + c] = square[r, c]
        for k in range(lines):
            _stream_line(square, r * pitch + head + k * _LINE, out, start + head + k * _LINE)  # type: ignore[call-arg]
        for c in range(head + lines * _LINE, width):
            out[at + r, to + c] = square[r, c]


@numba.njit(cache=True, nogil=True)
def _triangle_squares(code: int, a: Planes, out: np.ndarray, row: int) -> None:
    """Squares of one row of squares from the diagonal on, and their mirror images below it."""
    per, count = _SIDE // BLOCK, a.p0.shape[0]
    room, ahead = scratch(a), row * per
    square = np.empty(
        (_SIDE, _SIDE + _LINE), dtype=np.float32
    )  # rows 2**n bytes apart would share few lines of the cache
    mirrored = np.empty((_SIDE, _SIDE + _LINE), dtype=np.float32)
    first, last = row * per, min(count, (row + 1) * per)
    reach = np.empty((last - first, 2), dtype=np.int64)
    reach[:, 0], reach[:, 1] = np.arange(first, last), count
    for column in range(row, (count + per - 1) // per):
        begin, end = column * per, min(count, (column + 1) * per)
        if (begin - first) % AHEAD == 0:
            ahead = begin
            look_ahead(a, first, a, ahead, reach, room)
        for j in range(begin, end):
            for i in range(first, min(last, j + 1)):
                r0, c0 = (i - first) * BLOCK, (j - begin) * BLOCK
                tile(code, a, i, a, j, sums_of(a, i, first, a, j, ahead, room), square, r0, c0)
                _mirror(square, r0, c0, square if column == row and i != j else mirrored)
        _write(square, out, row * _SIDE, column * _SIDE)
        if column != row:
            _write(mirrored, out, column * _SIDE, row * _SIDE)
    _fence()  # type: ignore[call-arg]


@numba.njit(cache=True, nogil=True)
def _rectangle_squares(code: int, a: Planes, b: Planes, out: np.ndarray, row: int) -> None:
    per, count = _SIDE // BLOCK, b.p0.shape[0]
    room, ahead = scratch(a), 0
    square = np.empty((_SIDE, _SIDE + _LINE), dtype=np.float32)
    first, last = row * per, min(a.p0.shape[0], (row + 1) * per)
    reach = np.empty((last - first, 2), dtype=np.int64)
    reach[:, 0], reach[:, 1] = 0, count
    for begin in range(0, count, per):
        if begin % AHEAD == 0:
            ahead = begin
            look_ahead(a, first, b, ahead, reach, room)
        for j in range(begin, min(count, begin + per)):
            for i in range(first, last):
                counts = sums_of(a, i, first, b, j, ahead, room)
                tile(code, a, i, b, j, counts, square, (i - first) * BLOCK, (j - begin) * BLOCK)
        _write(square, out, row * _SIDE, begin * BLOCK)
    _fence()  # type: ignore[call-arg]


def triangle(first: Sites, measure: str, rows: int) -> Iterator[np.ndarray]:
    """float32 (K,): the next rows of the lower triangle, at most `rows` and a strip's."""
    a, _ = blocks(first)
    sites, at_once = len(first.bits_lw), min(rows, _SIDE)
    at_once -= (
        at_once % BLOCK if at_once > BLOCK else 0
    )  # or a strip would begin within a block and have one more of them
    starts = range(0, sites, at_once)
    yield from each(lambda k: _lower_rows(CODES[measure], a, starts[k], min(starts[k] + at_once, sites)), len(starts))


@numba.njit(cache=True, nogil=True)
def _lower_rows(code: int, a: Planes, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of the lower triangle, one behind the other: squares are made as for a rectangle and cut off."""
    out = np.empty((stop * (stop + 1) - start * (start + 1)) // 2, dtype=np.float32)
    per, first, last = _SIDE // BLOCK, start // BLOCK, (stop + BLOCK - 1) // BLOCK
    square, ahead = np.empty((_SIDE, _SIDE + _LINE), dtype=np.float32), 0
    room = scratch(a)
    reach = np.empty((last - first, 2), dtype=np.int64)
    reach[:, 0], reach[:, 1] = 0, np.arange(first, last) + 1
    for begin in range(0, last, per):
        if begin % AHEAD == 0:
            ahead = begin
            look_ahead(a, first, a, ahead, reach, room)
        for j in range(begin, min(last, begin + per)):
            for i in range(max(first, j), last):
                counts = sums_of(a, i, first, a, j, ahead, room)
                tile(code, a, i, a, j, counts, square, (i - first) * BLOCK, (j - begin) * BLOCK)
        for site in range(start, stop):
            at = (site * (site + 1) - start * (start + 1)) // 2 + begin * BLOCK
            width = min(_SIDE, site + 1 - begin * BLOCK)
            if width > 0:
                out[at : at + width] = square[site - first * BLOCK, :width]
    return out


def band(first: Sites, end_l: np.ndarray, width: int, measure: str) -> np.ndarray:
    """float32 (L, width): [i, k] is site i with site i + 1 + k where that is before end_l[i], else NaN."""
    a, _ = blocks(first)
    out = np.empty((len(end_l), width), dtype=np.float32)
    if out.size:
        run(lambda k: _band_rows(CODES[measure], a, end_l, out, k * STRIP), -(-len(a.p0) // STRIP))
    return out


@numba.njit(cache=True, nogil=True)
def _band_rows(code: int, a: Planes, end_l: np.ndarray, out: np.ndarray, first: int) -> None:
    room, values = scratch(a), np.empty((BLOCK, BLOCK), dtype=np.float32)
    reach = reach_of(a, True, end_l, first)
    for site in range(first * BLOCK, min(len(end_l), (first + len(reach)) * BLOCK)):
        out[site, max(0, end_l[site] - site - 1) :] = np.nan
    for j0 in range(first, reach[-1, 1], AHEAD):
        look_ahead(a, first, a, j0, reach, room)
        for i in range(first, first + len(reach)):
            for j in range(max(j0, i), min(j0 + AHEAD, reach[i - first, 1])):
                tile(code, a, i, a, j, sums_of(a, i, first, a, j, j0, room), values, 0, 0)
                for r in range(min(BLOCK, len(end_l) - i * BLOCK)):
                    site = i * BLOCK + r
                    for c in range(max(site + 1, j * BLOCK), min(end_l[site], (j + 1) * BLOCK)):
                        out[site, c - site - 1] = values[r, c - j * BLOCK]


def pairs(first: Sites, i: np.ndarray, j: np.ndarray, measure: str) -> np.ndarray:
    """float32 (P,): site i[p] with site j[p]."""
    return pair_values(prepare(first), i, j, measure).astype(np.float32)


def prepare(first: Sites) -> Planes:
    """What the functions on listed pairs read."""
    return rows(first, misses(first))


def pair_values(planes: Planes, i: np.ndarray, j: np.ndarray, measure: str) -> np.ndarray:
    """float64 (P,): site i[p] with site j[p], not rounded to float32."""
    out = np.empty(len(i))
    run(lambda k: _pairs(CODES[measure], planes, i, j, out, k * _PAIRS_AT_ONCE), -(-len(i) // _PAIRS_AT_ONCE))
    return out


def pair_tables(planes: Planes, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """float64 (P, 5): haplotypes of site i[p] and site j[p] by their alleles, as likelihood.py takes them."""
    out = np.empty((len(i), 5))
    run(lambda k: _tables(planes, i, j, out, k * _PAIRS_AT_ONCE), -(-len(i) // _PAIRS_AT_ONCE))
    return out


def major_frequency(planes: Planes) -> tuple[np.ndarray, np.ndarray]:
    """Frequency of the commoner allele among the called ones, float64 (L,), and whether the site varies, bool (L,)."""
    major_l, varies_l = np.empty(len(planes.sum_l)), np.empty(len(planes.sum_l), dtype=bool)
    _frequencies(planes, major_l, varies_l)
    return major_l, varies_l


@numba.njit(cache=True, nogil=True)
def _frequencies(planes: Planes, major_l: np.ndarray, varies_l: np.ndarray) -> None:
    for site in range(len(major_l)):
        seen = ones_in_row(planes.p3, site) if planes.kind >= PHASED_MISSING else planes.n
        share = planes.sum_l[site] / max(seen, 1)
        if planes.kind & 1:
            share = (planes.sum_l[site] + seen) / max(2 * seen, 1)
        major_l[site] = max(share, 1 - share)
        varies_l[site] = planes.variance_l[site] > 0


@numba.njit(cache=True, nogil=True)
def _pairs(code: int, planes: Planes, i: np.ndarray, j: np.ndarray, out: np.ndarray, start: int) -> None:
    for p in range(start, min(start + _PAIRS_AT_ONCE, len(out))):
        out[p] = pair(code, planes, i[p], j[p])


@numba.njit(cache=True, nogil=True)
def _tables(rows: Planes, i: np.ndarray, j: np.ndarray, out: np.ndarray, start: int) -> None:
    for p in range(start, min(start + _PAIRS_AT_ONCE, len(out))):
        x, y, n = i[p], j[p], rows.n
        alt_x, alt_y = int(rows.sum_l[x]), int(rows.sum_l[y])
        if rows.kind >= PHASED_MISSING:
            n = _common(rows.p3, x, rows.p3, y)
        if not rows.kind & 1:
            both = _common(rows.p0, x, rows.p0, y)
            if rows.kind == PHASED_MISSING:
                alt_x, alt_y = _common(rows.p0, x, rows.p3, y), _common(rows.p3, x, rows.p0, y)
            out[p, 0], out[p, 1], out[p, 2] = n - alt_x - alt_y + both, alt_y - both, alt_x - both
            out[p, 3], out[p, 4] = both, 0
            continue
        # people homozygous at both sites, by their alleles; then those homozygous for REF or ALT at one, whatever the other
        ref_ref = _common(rows.p1, x, rows.p1, y)
        ref_alt = _common(rows.p1, x, rows.p0, y) - ref_ref
        alt_ref = _common(rows.p0, x, rows.p1, y) - ref_ref
        alt_alt = _common(rows.p0, x, rows.p0, y) - ref_ref - ref_alt - alt_ref
        if rows.kind == UNPHASED:
            ref_x, ref_y = ones_in_row(rows.p1, x), ones_in_row(rows.p1, y)
            alt_x, alt_y = alt_x + ref_x, alt_y + ref_y
        else:
            ref_x, ref_y = _common(rows.p1, x, rows.p3, y), _common(rows.p3, x, rows.p1, y)
            alt_x, alt_y = _common(rows.p2, x, rows.p3, y), _common(rows.p3, x, rows.p2, y)
        out[p, 0], out[p, 1] = ref_x + ref_y - ref_alt - alt_ref, ref_x + alt_y - ref_ref - alt_alt
        out[p, 2], out[p, 3] = alt_x + ref_y - ref_ref - alt_alt, alt_x + alt_y - ref_alt - alt_ref
        out[p, 4] = n - ref_x - alt_x - ref_y - alt_y + ref_ref + ref_alt + alt_ref + alt_alt


@numba.njit(cache=True, nogil=True)
def _common(plane: np.ndarray, i: int, other: np.ndarray, j: int) -> int:
    ones = np.uint64(0)
    for w in range(plane.shape[1]):
        ones += ctpop(plane[i, w] & other[j, w])  # type: ignore[call-arg]
    return np.int64(ones)  # type: ignore[return-value]


@numba.njit(cache=True, nogil=True)
def _product(nonzero: np.ndarray, negative: np.ndarray, i: int, j: int) -> int:
    """Sum of products of values in {-1, 0, 1}, as `bits.tiles.dot_tile`."""
    both, unlike = np.uint64(0), np.uint64(0)
    for w in range(nonzero.shape[1]):
        word = nonzero[i, w] & nonzero[j, w]
        both += ctpop(word)  # type: ignore[call-arg]
        unlike += ctpop(word & (negative[i, w] ^ negative[j, w]))  # type: ignore[call-arg]
    return np.int64(both) - 2 * np.int64(unlike)  # type: ignore[return-value]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def pair(code: int, rows: Planes, i: int, j: int) -> float:
    """float64 value of two rows, without a tile."""
    halves = 2.0 if rows.kind & 1 else 1.0
    if rows.kind == PHASED or rows.kind == UNPHASED:
        both = _common(rows.p0, i, rows.p0, j) if rows.kind == PHASED else _product(rows.p0, rows.p1, i, j)
        n, sx, sy = np.float64(rows.n), rows.sum_l[i], rows.sum_l[j]
        return formula(code, n, halves, sx, sy, rows.variance_l[i], rows.variance_l[j], n * np.float64(both) - sx * sy)
    n = np.float64(_common(rows.p3, i, rows.p3, j))
    if rows.kind == PHASED_MISSING:
        both = _common(rows.p0, i, rows.p0, j)
        sx = sxx = np.float64(_common(rows.p0, i, rows.p3, j))
        sy = syy = np.float64(_common(rows.p3, i, rows.p0, j))
    else:
        both = _product(rows.p0, rows.p1, i, j)
        positive_x, negative_x = _common(rows.p2, i, rows.p3, j), _common(rows.p1, i, rows.p3, j)
        positive_y, negative_y = _common(rows.p3, i, rows.p2, j), _common(rows.p3, i, rows.p1, j)
        sx, sxx = np.float64(positive_x - negative_x), np.float64(positive_x + negative_x)
        sy, syy = np.float64(positive_y - negative_y), np.float64(positive_y + negative_y)
    return formula(code, n, halves, sx, sy, n * sxx - sx * sx, n * syy - sy * sy, n * np.float64(both) - sx * sy)
