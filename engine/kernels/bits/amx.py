"""The matrix unit of a CPU (Intel AMX), and sums of products of values in {-1, 0, 1} made on it, for rooms that count pairs.

A block of 32 rows times a block of 32 columns and 64 observations at a time: four tile registers hold the 32 x 32 sums, two
each the values of rows and of columns. Values are spread from the bits of two planes (not zero, negative) when they are
needed, in stretches of 512 observations that stay in the caches; they never lie in memory as a whole.

The unit multiplies rows of 64 bytes of the left side by 4-byte groups of the right one: on the right, row k of a register has
observations 4 k to 4 k + 3 of 16 columns. As bits that is a transposition of 16 x 16 nibbles (`_nibbles_transposed`).

Linux hands the registers out on demand (`granted`). A function that uses them sets their shapes first and gives them back at
its end, so that other libraries that use the unit (oneDNN in PyTorch) find it as they left it.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.bits.tiles import BLOCK, FEATURES, dot_tile

COMPILED = all(f"+{name}" in FEATURES for name in ("amx-tile", "amx-int8", "amx-bf16", "avx512bw"))
STRETCH = 8  # words of a stretch: 32 x 512 bytes of one side fit the first-level cache beside as many of the other
STEP = BLOCK * 64  # bytes of a block's values in one word of its planes
_ASK, _TILE_DATA = 0x1023, 18  # ARCH_REQ_XCOMP_PERM of arch_prctl, and the state that is asked for
_ARCH_PRCTL = 158


@cache
def granted() -> bool:
    """Whether this process may use the matrix unit: the code knows it, and Linux lets the process have it (asked once)."""
    if not COMPILED or platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None, use_errno=True).syscall(_ARCH_PRCTL, _ASK, _TILE_DATA) == 0


def _call(builder: Any, name: str, kinds: list[Any], values: list[Any]) -> None:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), kinds), f"llvm.x86.{name}")
    builder.call(function, values)


_BYTE, _INDEX = ir.IntType(8), ir.IntType(64)
_ADDRESS = _BYTE.as_pointer()
_SUMS = ((0, 0, 0), (1, 0, 16), (2, 16, 0), (3, 16, 16))  # registers, with the row and column of what they hold
_LEFT, _RIGHT = (4, 5), (6, 7)


def _data(context: Any, builder: Any, kind: Any, array: Any, start: Any) -> Any:
    return builder.bitcast(builder.gep(context.make_array(kind)(context, builder, array).data, [start]), _ADDRESS)


@intrinsic
def take_unit(typingctx: Any, shape: Any) -> Any:
    """Take the unit; `shape`: uint8 (64,), `SHAPE`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "ldtilecfg", [_ADDRESS], [_data(context, builder, signature.args[0], args[0], _INDEX(0))])
        return context.get_dummy_value()

    return types.void(shape), codegen


@intrinsic
def give_back(typingctx: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "tilerelease", [], [])
        return context.get_dummy_value()

    return types.void(), codegen


def _move_sums(name: str) -> Any:
    """Intrinsic (sums, at, pitch): 32 x 32 sums to or from the registers; the first is element `at` of an array of 32-bit
    elements, rows are `pitch` elements apart (0: one row for all)."""

    def move(typingctx: Any, sums: Any, at: Any, pitch: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            stride = builder.mul(args[2], _INDEX(4))
            for register, row, column in _SUMS:
                start = builder.add(args[1], builder.add(builder.mul(args[2], _INDEX(row)), _INDEX(column)))
                place = _data(context, builder, signature.args[0], args[0], start)
                _call(builder, name, [_BYTE, _ADDRESS, _INDEX], [_BYTE(register), place, stride])
            return context.get_dummy_value()

        return types.void(sums, types.intp, types.intp), codegen

    return intrinsic(move)


load_sums, store_sums = _move_sums("tileloadd64"), _move_sums("tilestored64")


@intrinsic
def clear_sums(typingctx: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for register, _, _ in _SUMS:
            _call(builder, "tilezero", [_BYTE], [_BYTE(register)])
        return context.get_dummy_value()

    return types.void(), codegen


def _adds_products(instruction: str) -> Any:
    """Intrinsic (left, left_at, left_half, right, right_at, right_half, pitch): the sums in the registers += 32 rows of `left`
    times 32 columns of `right`, 64 bytes of each.

    `left_at` and `right_at` are the elements where the first 16 begin, the other 16 begin `..._half` elements on. Rows of the
    left side lie one behind the other, 64 bytes each; rows of the right one, of 16 columns, are `pitch` bytes apart.
    """

    def add(
        typingctx: Any, left: Any, left_at: Any, left_half: Any, right: Any, right_at: Any, right_half: Any, pitch: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            for half in (0, 1):
                for side, registers, stride in ((0, _LEFT, _INDEX(64)), (3, _RIGHT, args[6])):
                    start = builder.add(args[side + 1], args[side + 2]) if half else args[side + 1]
                    place = _data(context, builder, signature.args[side], args[side], start)
                    _call(builder, "tileloadd64", [_BYTE, _ADDRESS, _INDEX], [_BYTE(registers[half]), place, stride])
            for register, row, column in _SUMS:
                one, two = _LEFT[row // 16], _RIGHT[column // 16]
                _call(builder, instruction, [_BYTE] * 3, [_BYTE(register), _BYTE(one), _BYTE(two)])
            return context.get_dummy_value()

        number = types.intp
        return types.void(left, number, number, right, number, number, number), codegen

    return intrinsic(add)


add_products = _adds_products("tdpbssd")  # int8 of both sides, to int32
add_unsigned = _adds_products("tdpbusd")  # uint8 on the left, int8 on the right, to int32
add_bfloat16 = _adds_products("tdpbf16ps")  # to float32; subnormal numbers count as zero


@intrinsic
def _spread(typingctx: Any, nonzero: Any, negative: Any, values: Any, at: Any) -> Any:
    """values int8 from element `at`: 64 values in {-1, 0, 1} of the bits of two words."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask, line = ir.VectorType(ir.IntType(1), 64), ir.VectorType(_BYTE, 64)
        some, minus = builder.bitcast(args[0], mask), builder.bitcast(args[1], mask)
        value = builder.select(minus, ir.Constant(line, [-1] * 64), ir.Constant(line, [1] * 64))
        value = builder.select(some, value, ir.Constant(line, [0] * 64))
        place = _data(context, builder, signature.args[2], args[2], args[3])
        builder.store(value, builder.bitcast(place, line.as_pointer()), align=64)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, values, types.intp), codegen


@intrinsic
def _nibbles_transposed(typingctx: Any, words: Any, at: Any, out: Any) -> Any:
    """Nibble k of words[at + n] to nibble n of out[k // 2 + 8 (k % 2)], for k and n < 16; uint64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line, lanes = ir.VectorType(_BYTE, 64), ir.VectorType(ir.IntType(32), 64)
        place = _data(context, builder, signature.args[0], args[0], args[1])
        first = builder.load(builder.bitcast(place, line.as_pointer()), align=8)
        second = builder.load(builder.bitcast(builder.gep(place, [_INDEX(64)]), line.as_pointer()), align=8)

        def gathered(odd: int) -> Any:  # bytes b of words odd, odd + 2, ..., for each b
            order = [8 * (2 * m + odd) + b for b in range(8) for m in range(8)]
            return builder.shuffle_vector(first, second, ir.Constant(lanes, order))

        def all_of(value: int) -> Any:
            return ir.Constant(line, [value] * 64)

        even, odd = gathered(0), gathered(1)
        low = builder.or_(builder.and_(even, all_of(15)), builder.shl(odd, all_of(4)))
        high = builder.or_(builder.lshr(even, all_of(4)), builder.and_(odd, all_of(0xF0)))
        for k, value in enumerate((low, high)):
            target = _data(context, builder, signature.args[2], args[2], _INDEX(8 * k))
            builder.store(value, builder.bitcast(target, line.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(words, types.intp, out), codegen


def _shape() -> np.ndarray:
    """What LDTILECFG reads: palette 1, eight registers of 16 rows of 64 bytes."""
    shape = np.zeros(64, dtype=np.uint8)
    shape[0], shape[16:32:2], shape[48:56] = 1, 64, 16
    return shape


SHAPE = _shape()


@numba.njit(cache=True, nogil=True)
def _left(
    nonzero: np.ndarray, negative: np.ndarray, block: int, begin: int, end: int, values: np.ndarray, at: int
) -> None:
    for w in range(begin, end):
        for r in range(BLOCK):
            _spread(nonzero[block, w, r], negative[block, w, r], values, at)  # type: ignore[call-arg]
            at += 64


@numba.njit(cache=True, nogil=True)
def _right(
    nonzero: np.ndarray, negative: np.ndarray, block: int, begin: int, end: int, values: np.ndarray, at: int
) -> None:
    some, minus = np.empty(16, dtype=np.uint64), np.empty(16, dtype=np.uint64)
    for w in range(begin, end):
        for half in range(0, BLOCK, 16):
            start = (block * nonzero.shape[1] + w) * BLOCK + half
            _nibbles_transposed(nonzero, start, some)  # type: ignore[call-arg]
            _nibbles_transposed(negative, start, minus)  # type: ignore[call-arg]
            for k in range(16):
                place = (k >> 1) + 8 * (k & 1)
                _spread(some[place], minus[place], values, at)  # type: ignore[call-arg]
                at += 64


@numba.njit(cache=True, nogil=True)
def _dot_tiles_multiplied(
    nonzero: np.ndarray,
    negative: np.ndarray,
    i0: int,
    other_nonzero: np.ndarray,
    other_negative: np.ndarray,
    j0: int,
    j1: int,
    reach: np.ndarray,
    values: np.ndarray,
    sums: np.ndarray,
) -> None:
    """sums[i, j], int32 (1024,): `tiles.dot_tile` of block i0 + i with block j0 + j of the other set.

    reach: int64 (rows, 2); for row i only the blocks from reach[i, 0] to before reach[i, 1] are wanted, of those from `j0` to
    before `j1`; other sums mean nothing. values: int8, scratch of `STEP * STRETCH * (rows + j1 - j0)` bytes that begin on a
    cache line. sums: int32 (rows or more, j1 - j0 or more, 1024), contiguous. The process must have been `granted` the unit.
    """
    words, rows, columns = nonzero.shape[1], len(reach), j1 - j0
    flat, pitch, right = sums.reshape(-1), sums.shape[1] * BLOCK * BLOCK, rows * STRETCH * STEP
    if words == 0:
        sums[:rows, :columns] = 0
        return
    take_unit(SHAPE)  # type: ignore[call-arg]
    for begin in range(0, words, STRETCH):
        end = min(words, begin + STRETCH)
        for i in range(rows):
            _left(nonzero, negative, i0 + i, begin, end, values, i * STRETCH * STEP)
        for j in range(columns):
            _right(other_nonzero, other_negative, j0 + j, begin, end, values, right + j * STRETCH * STEP)
        for i in range(rows):
            for j in range(max(j0, reach[i, 0]) - j0, min(j1, reach[i, 1]) - j0):
                at = i * pitch + j * BLOCK * BLOCK
                if begin == 0:
                    clear_sums()
                else:
                    load_sums(flat, at, BLOCK)
                a, b = i * STRETCH * STEP, right + j * STRETCH * STEP
                for _ in range(begin, end):
                    add_products(values, a, STEP // 2, values, b, STEP // 2, 64)
                    a += STEP
                    b += STEP
                store_sums(flat, at, BLOCK)
    give_back()


@numba.njit(cache=True, nogil=True)
def _dot_tiles_counted(
    nonzero: np.ndarray,
    negative: np.ndarray,
    i0: int,
    other_nonzero: np.ndarray,
    other_negative: np.ndarray,
    j0: int,
    j1: int,
    reach: np.ndarray,
    values: np.ndarray,
    sums: np.ndarray,
) -> None:
    """As `_dot_tiles_multiplied`, by popcount; `values` is not used."""
    for i in range(len(reach)):
        for j in range(max(j0, reach[i, 0]), min(j1, reach[i, 1])):
            dot_tile(nonzero, negative, i0 + i, other_nonzero, other_negative, j, sums[i, j - j0])


dot_tiles = _dot_tiles_multiplied if COMPILED else _dot_tiles_counted
