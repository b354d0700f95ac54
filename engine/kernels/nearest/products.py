"""Matrix products on the CPU that tell which pairs of rows may be near: register tiles in LLVM vectors, and rows packed
for them.

A row a is replaced by a coarser one a' of type int8, bfloat16 or float32 times a scale of its own, and what that costs
is kept: `rest`, a proven bound on |a - a'|. With P = a'.b', which is exact for int8 and has a proven error otherwise,
the triangle inequality bounds the true distance: | |a - b| - |a' - b'| | <= rest_a + rest_b. So a coarse product loses
time where it is too coarse, never an answer. What is done with the bounds is left to `numba_features`.

int8 runs at four times the rate of float32 where the processor has `vpdpbusd` (AVX512-VNNI), bfloat16 at twice with
`vdpbf16ps` (AVX512-BF16). Elsewhere the same tiles are written with generic vectors: slow for int8, but with the same
answer. On the matrix unit of newer Intel processors (`bits.amx`) both run several times faster still, 32 rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.bits import amx
from engine.kernels.bits.tiles import FEATURES

Product = Literal["int8", "bfloat16", "float32"]
INT8, BFLOAT16, FLOAT32 = 0, 1, 2
KINDS: dict[str, int] = {"int8": INT8, "bfloat16": BFLOAT16, "float32": FLOAT32}

_WIDE = "+avx512f" in FEATURES
_LANES = 16 if _WIDE else 8
_VECTORS = 4 if _WIDE else 2
ROWS = 6  # times _VECTORS accumulators: 24 of 32 registers, or 12 of 16
COLUMNS = _LANES * _VECTORS
UNIT = 16  # rows of a register of the matrix unit, and 32-bit elements in one of them
_VNNI = _WIDE and "+avx512vnni" in FEATURES
_BF16 = _WIDE and "+avx512bf16" in FEATURES
_HAS: dict[Product, bool] = {"int8": _VNNI, "bfloat16": _BF16, "float32": True}
FASTER = tuple(name for name, has in _HAS.items() if has)  # from the coarsest on: faster than the next finer one here

_MOST_LEVELS = 127
_MOST_NORM = 46000.0  # of an int8 row: |a'||b'| < 2**31, so that sums that wrap around are right in the end


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def per_element(kind: int) -> int:
    """Values in one 32-bit element of packed rows."""
    return (4, 2, 1)[kind]


def _product_tile(kind: int) -> Callable[..., Any]:
    """Intrinsic (a, a_at, b, b_at, steps, begin, begin_at, stride, out, at, pitch): out[at + r * pitch + c] =
    begin[begin_at + r * stride + c] + sum over the steps of a[a_at + step, r] . b[b_at + step, c].

    `a`: int32 elements packed [step, ROWS]; `b`: [step, COLUMNS]; `begin`, `out`: arrays of 32-bit elements that hold
    int32 for int8 and float32 otherwise. int8 takes `a` as unsigned.
    """

    def product(
        typingctx: Any, a: Any, a_at: Any, b: Any, b_at: Any, steps: Any,
        begin: Any, begin_at: Any, stride: Any, out: Any, at: Any, pitch: Any,
    ) -> Any:  # fmt: skip
        integer = types.intp
        signature = types.void(a, integer, b, integer, integer, begin, integer, integer, out, integer, integer)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            i32, index, real = ir.IntType(32), ir.IntType(64), ir.FloatType()
            word, floats = ir.VectorType(i32, _LANES), ir.VectorType(real, _LANES)
            octets, halves = ir.VectorType(ir.IntType(8), 4 * _LANES), ir.VectorType(_BFloat(), 2 * _LANES)
            total = word if kind == INT8 else floats

            def data(k: int) -> Any:
                return context.make_array(signature.args[k])(context, builder, args[k]).data

            def call(name: str, result: Any, values: list[Any]) -> Any:
                function = ir.FunctionType(result, [value.type for value in values])
                return builder.call(cgutils.get_or_insert_function(builder.module, function, name), values)

            def splat(one: Any) -> Any:
                single = builder.insert_element(ir.Constant(word, ir.Undefined), one, ir.Constant(i32, 0))
                lanes = ir.Constant(ir.VectorType(i32, _LANES), [0] * _LANES)
                return builder.shuffle_vector(single, ir.Constant(word, ir.Undefined), lanes)

            def constant(value: int) -> Any:
                return ir.Constant(word, [value] * _LANES)

            def multiply_add(x: Any, y: Any, acc: Any) -> Any:
                values = [builder.bitcast(x, floats), builder.bitcast(y, floats), acc]
                return call(f"llvm.fmuladd.v{_LANES}f32", floats, values)

            def step(x: Any, y: Any, acc: Any) -> Any:
                if kind == FLOAT32:
                    return multiply_add(x, y, acc)
                if kind == BFLOAT16 and _BF16:
                    pair = [acc, builder.bitcast(x, halves), builder.bitcast(y, halves)]
                    return call("llvm.x86.avx512bf16.dpbf16ps.512", floats, pair)
                if kind == BFLOAT16:
                    low = [builder.shl(z, constant(16)) for z in (x, y)]
                    high = [builder.and_(z, constant(-65536)) for z in (x, y)]
                    return multiply_add(high[0], high[1], multiply_add(low[0], low[1], acc))
                if _VNNI:
                    pair = [acc, builder.bitcast(x, octets), builder.bitcast(y, octets)]
                    return call("llvm.x86.avx512.vpdpbusd.512", word, pair)
                for octet in range(4):
                    up = constant(24 - 8 * octet)
                    u = builder.lshr(builder.shl(x, up), constant(24))
                    acc = builder.add(acc, builder.mul(u, builder.ashr(builder.shl(y, up), constant(24))))
                return acc

            a_ptr, b_ptr = (builder.bitcast(data(k), i32.as_pointer()) for k in (0, 2))
            begin_ptr = builder.gep(builder.bitcast(data(5), i32.as_pointer()), [args[6]])
            out_ptr = builder.gep(builder.bitcast(data(8), i32.as_pointer()), [args[9]])
            cells = [(r, v) for r in range(ROWS) for v in range(_VECTORS)]

            def place(start: Any, r: int, stride: Any, v: int) -> Any:
                where = builder.add(builder.mul(ir.Constant(index, r), stride), ir.Constant(index, v * _LANES))
                return builder.bitcast(builder.gep(start, [where]), total.as_pointer())

            before = [builder.load(place(begin_ptr, r, args[7], v), align=4) for r, v in cells]
            entry = builder.block
            head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
            builder.branch(head)

            builder.position_at_end(head)
            s = builder.phi(index)
            s.add_incoming(ir.Constant(index, 0), entry)
            sums = [builder.phi(total) for _ in cells]
            for cell, value in zip(sums, before, strict=True):
                cell.add_incoming(value, entry)
            builder.cbranch(builder.icmp_signed("<", s, args[4]), body, done)

            builder.position_at_end(body)
            column = builder.add(args[3], builder.mul(s, ir.Constant(index, COLUMNS)))
            row = builder.add(args[1], builder.mul(s, ir.Constant(index, ROWS)))
            columns = []
            for v in range(_VECTORS):
                where = builder.gep(b_ptr, [builder.add(column, ir.Constant(index, v * _LANES))])
                columns.append(builder.load(builder.bitcast(where, word.as_pointer()), align=4))
            after: list[Any] = []
            for r in range(ROWS):
                same = splat(builder.load(builder.gep(a_ptr, [builder.add(row, ir.Constant(index, r))]), align=4))
                after += [step(same, columns[v], sums[len(after) + v]) for v in range(_VECTORS)]
            for cell, value in zip(sums, after, strict=True):
                cell.add_incoming(value, body)
            s.add_incoming(builder.add(s, ir.Constant(index, 1)), body)
            builder.branch(head)

            builder.position_at_end(done)
            for (r, v), cell in zip(cells, sums, strict=True):
                builder.store(cell, place(out_ptr, r, args[10], v), align=4)
            return context.get_dummy_value()

        return signature, codegen

    return intrinsic(product)


_int8_tile, _bfloat16_tile, _float32_tile = (_product_tile(kind) for kind in (INT8, BFLOAT16, FLOAT32))


def _near_columns(kind: int) -> Callable[..., Any]:
    """Intrinsic (products, at, scale, square, first, twice, least) -> uint64: bit c is set unless
    products[at + c] * (twice * scale[first + c]) - square[first + c] < least, in float32. Not a number is set.
    """

    def near(typingctx: Any, out: Any, at: Any, scale: Any, square: Any, first: Any, twice: Any, least: Any) -> Any:
        integer, real = types.intp, types.float32
        signature = types.uint64(out, integer, scale, square, integer, real, real)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            i64, bits = ir.IntType(64), ir.IntType(_LANES)
            floats, word = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(ir.IntType(32), _LANES)
            counts = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)

            def load(k: int, start: Any, vector: int, kind: Any) -> Any:
                data = context.make_array(signature.args[k])(context, builder, args[k]).data
                data = builder.bitcast(data, ir.IntType(32).as_pointer())
                where = builder.gep(data, [builder.add(start, ir.Constant(i64, vector * _LANES))])
                return builder.load(builder.bitcast(where, kind.as_pointer()), align=4)

            def splat(one: Any) -> Any:
                single = builder.insert_element(ir.Constant(floats, ir.Undefined), one, ir.Constant(ir.IntType(32), 0))
                return builder.shuffle_vector(single, ir.Constant(floats, ir.Undefined), counts)

            twice, least, mask = splat(args[5]), splat(args[6]), ir.Constant(i64, 0)
            for v in range(_VECTORS):
                value = load(0, args[1], v, word if kind == INT8 else floats)
                if kind == INT8:
                    value = builder.sitofp(value, floats)
                value = builder.fmul(value, builder.fmul(twice, load(2, args[4], v, floats)))
                value = builder.fsub(value, load(3, args[4], v, floats))
                part = builder.bitcast(builder.fcmp_unordered(">=", value, least), bits)
                part = builder.shl(builder.zext(part, i64), ir.Constant(i64, v * _LANES))
                mask = builder.or_(mask, part)
            return mask

        return signature, codegen

    return intrinsic(near)


_near_whole, _near_real = _near_columns(INT8), _near_columns(FLOAT32)


@numba.njit(cache=True, nogil=True)
def near_columns(
    kind: int,
    out: np.ndarray,
    at: int,
    scale_n: np.ndarray,
    square_n: np.ndarray,
    first: int,
    twice: float,
    least: float,
) -> int:
    """Bits of the columns c of one row of a tile for which product * (twice * scale) - square is not less than
    `least`.
    """
    if kind == INT8:
        return _near_whole(out, at, scale_n, square_n, first, twice, least)
    return _near_real(out, at, scale_n, square_n, first, twice, least)


@numba.njit(cache=True, nogil=True)
def tile(
    kind: int,
    a: np.ndarray,
    a_at: int,
    b: np.ndarray,
    b_at: int,
    steps: int,
    begin: np.ndarray,
    begin_at: int,
    stride: int,
    out: np.ndarray,
    at: int,
    pitch: int,
) -> None:
    """One tile of ROWS x COLUMNS products, as `_product_tile` says."""
    if kind == INT8:
        _int8_tile(a, a_at, b, b_at, steps, begin, begin_at, stride, out, at, pitch)
    elif kind == BFLOAT16:
        _bfloat16_tile(a, a_at, b, b_at, steps, begin, begin_at, stride, out, at, pitch)
    else:
        _float32_tile(a, a_at, b, b_at, steps, begin, begin_at, stride, out, at, pitch)


@numba.njit(cache=True, nogil=True)
def multiplied_tiles(
    kind: int,
    a: np.ndarray,
    a_at: int,
    b: np.ndarray,
    b_at: int,
    b_steps: int,
    panels: int,
    steps: int,
    begin: np.ndarray,
    begin_at: int,
    stride: int,
    out: np.ndarray,
    at: int,
    pitch: int,
) -> None:
    """2 * UNIT rows times `panels` of COLUMNS on the matrix unit, which the caller has taken: as `tile` for int8 or bfloat16.

    `a`: two panels of (b_steps, UNIT), packed by rows, from their element `a_at`; `b`: panels of (b_steps, COLUMNS), from
    `b_at`. `steps`, a multiple of UNIT, are taken of each. `begin` goes from panel to panel like `out` does, by COLUMNS.
    """
    for panel in range(panels):
        for half in range(0, COLUMNS, 2 * UNIT):
            amx.load_sums(begin, begin_at + panel * COLUMNS + half, stride)
            x, y = a_at, b_at + panel * b_steps * COLUMNS + half
            if kind == INT8:
                for _ in range(0, steps, UNIT):
                    amx.add_unsigned(a, x, b_steps * UNIT, b, y, UNIT, 4 * COLUMNS)
                    x += UNIT * UNIT
                    y += UNIT * COLUMNS
            else:
                for _ in range(0, steps, UNIT):
                    amx.add_bfloat16(a, x, b_steps * UNIT, b, y, UNIT, 4 * COLUMNS)
                    x += UNIT * UNIT
                    y += UNIT * COLUMNS
            amx.store_sums(out, at + panel * COLUMNS + half, pitch)


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})
def _centred(
    row_d: np.ndarray, gain: float, shift: float, centre_d: np.ndarray, out_d: np.ndarray
) -> tuple[float, float]:
    """out = row * gain - shift - centre, rounded to float32; sums of squares of that and of row * gain."""
    square, raw = 0.0, 0.0
    for axis in range(len(row_d)):
        scaled = np.float64(row_d[axis]) * gain
        value = scaled - shift - centre_d[axis]
        out_d[axis] = value
        square += value * value
        raw += scaled * scaled
    return square, raw


@intrinsic
def _prefetch(typingctx: Any, rows_nd: Any, row: Any) -> Any:
    """Ask for the lines of one row of a contiguous float32 matrix, the first 4 KiB of them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        i32, line = ir.IntType(32), 16
        axes = builder.extract_value(array.shape, 1)
        start = builder.gep(array.data, [builder.mul(args[1], axes)])
        pointer = ir.IntType(8).as_pointer()
        function = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        prefetch = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
        stop = builder.select(builder.icmp_signed("<", axes, axes.type(1024)), axes, axes.type(1024))
        with cgutils.for_range_slice(builder, axes.type(0), stop, axes.type(line)) as (at, _):
            where = builder.bitcast(builder.gep(start, [at]), pointer)
            builder.call(prefetch, [where, i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(rows_nd, types.intp), codegen


@numba.njit(cache=True, nogil=True)
def prefetch(rows_nd: np.ndarray, row: int) -> None:
    """Have a row of contiguous float32 rows on its way to the cache while something else is computed."""
    _prefetch(rows_nd, row)  # type: ignore[call-arg]


@numba.njit(cache=True, nogil=True)
def _largest(row_d: np.ndarray) -> float:
    """Largest magnitude: the bits of floats >= 0 rise with their value, and integers are compared in vectors."""
    top = np.zeros(1, dtype=np.int32)
    bits = row_d.view(np.int32)
    most: Any = np.int32(0)
    for axis in range(len(row_d)):
        most = max(most, np.int32(bits[axis] & np.int32(0x7FFFFFFF)))
    top[0] = most
    return top.view(np.float32)[0]


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})
def _to_int8(row_d: np.ndarray, scale: float, out: np.ndarray) -> tuple[float, int, int]:
    """Levels of a row; the sum of squares of what is lost, of the levels, and the sum of the levels."""
    lost = 0.0
    square: Any = 0
    total: Any = 0
    inverse = np.float32(1) / np.float32(scale)
    for axis in range(len(row_d)):
        level = np.rint(row_d[axis] * inverse)
        step = np.float64(row_d[axis]) - np.float64(level) * scale
        lost += step * step
        whole = np.int32(level)
        square += whole * whole
        total += whole
        out[axis] = whole
    return lost, square, total


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})
def _to_bfloat16(row_d: np.ndarray, inverse: float, rounded: np.ndarray, out: np.ndarray) -> tuple[float, float]:
    """bfloat16 bits of row * inverse, nearest and even; sums of squares of what is lost and of what is kept, both
    scaled.
    """
    bits = rounded.view(np.uint32)
    for axis in range(len(row_d)):
        rounded[axis] = row_d[axis] * np.float32(inverse)
        up = bits[axis] + np.uint32(0x7FFF) + ((bits[axis] >> np.uint32(16)) & np.uint32(1))
        bits[axis] = up & np.uint32(0xFFFF0000)
        out[axis] = np.uint16(up >> np.uint32(16))
    lost, square = 0.0, 0.0
    for axis in range(len(row_d)):
        step = np.float64(row_d[axis]) * inverse - np.float64(rounded[axis])
        lost += step * step
        square += np.float64(rounded[axis]) * np.float64(rounded[axis])
    return lost, square


@numba.njit(cache=True, nogil=True)
def pack(
    rows_nd: np.ndarray,
    gain_n: np.ndarray,
    shift_n: np.ndarray,
    extra_n: np.ndarray,
    centre_d: np.ndarray,
    kind: int,
    unsigned: bool,
    by_rows: bool,
    packed: np.ndarray,
    scale_n: np.ndarray,
    square_n: np.ndarray,
    rest_n: np.ndarray,
    whole_n: np.ndarray,
    start_n: np.ndarray,
) -> None:
    """Rows a = row * gain - shift - centre, made coarse and packed: int32 (panels, steps, rows of a panel), zeros beyond.
    Packed `by_rows`, for the left side of the matrix unit, UNIT steps of UNIT rows lie one row after the other.

    float32 scale_n: a' = scale * (what is packed). square_n: |a'|^2 + extra, where `extra` is the square of a part
    orthogonal to every axis that no product sees. rest_n: no less than |a - a'|. whole_n: |a|^2 + extra. int32 start_n:
    what sums of products with an unsigned row begin with (unsigned levels are 128 too high).
    """
    axes, width = rows_nd.shape[1], packed.shape[2]
    values, rounded = np.empty(axes, dtype=np.float32), np.empty(axes, dtype=np.float32)
    elements = np.zeros(packed.shape[1], dtype=np.int32)  # what lies beyond the axes stays 0
    octets, halves = elements.view(np.int8), elements.view(np.uint16)
    floats = elements.view(np.float32)
    middle = np.sqrt((centre_d * centre_d).sum())
    packed[:] = 0
    for n in range(len(rows_nd)):
        square, raw = _centred(rows_nd[n], gain_n[n], shift_n[n], centre_d, values)
        # values are float32 of float64: 2**-24 of each, and what float64 lost before
        lost = (
            np.sqrt(square) * 2.0**-24
            + (np.sqrt(raw) + abs(shift_n[n]) * np.sqrt(axes) + middle) * (axes + 8) * 2.0**-52
        )
        top = np.float64(_largest(values))
        scale: Any = np.float32(1)
        kept = 0.0
        start_n[n] = 0
        if kind == INT8:
            # The smallest scale lets a reciprocal stay finite; rows this small are all rest.
            scale = np.float32(max(top / _MOST_LEVELS, np.sqrt(square) / _MOST_NORM, 2.0**-120))
            away, levels, total = _to_int8(values, scale, octets)
            if unsigned:
                for octet in range(axes):
                    octets[octet] ^= np.int8(-128)
            kept = np.float64(levels) * scale * scale
            start_n[n] = -128 * total
            lost += np.sqrt(away)
        else:
            power = np.float64(2.0) ** np.ceil(np.log2(max(top, 2.0**-120)))
            scale = np.float32(power)
            if kind == BFLOAT16:
                away, kept = _to_bfloat16(values, 1.0 / power, rounded, halves)
                lost += np.sqrt(away) * power
                kept *= power * power
            else:
                for axis in range(axes):
                    floats[axis] = values[axis] * np.float32(1.0 / power)
                kept = square
        panel, column = n // width, n % width
        if by_rows:
            for step in range(len(elements)):
                packed[panel, step // UNIT * UNIT + column, step % UNIT] = elements[step]
        else:
            for step in range(len(elements)):
                packed[panel, step, column] = elements[step]
        scale_n[n], square_n[n] = scale, kept + extra_n[n]
        rest_n[n], whole_n[n] = lost * (1 + 2.0**-20) + 2.0**-140, square + extra_n[n]
