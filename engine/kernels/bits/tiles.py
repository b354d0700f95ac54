"""Register tiles on the CPU: counts of bit pairs between every row of one block of 32 and every row of another.

Rows are regrouped in blocks of 32, the words of a block interleaved ([block, word, row]), so that one vector holds the same
word of 8 (AVX-512) or 4 (AVX2) neighbouring rows and a lane never needs a horizontal sum. A tile is written as LLVM IR with
generic vectors: `llvm.ctpop` becomes `vpopcntq` where the processor has it and a byte shuffle elsewhere.

`and_tile` counts common ones, `xor_tile` differing bits (`xor_words` those of some words, `observed_tile` those of two planes
where both rows are observed), `dot_tile` sums products of values in {-1, 0, 1} given as two planes (not zero, negative). What
becomes of the 32 x 32 counts is left to the rooms that call these: linkage disequilibrium and nearest neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

BLOCK = 32
FEATURES = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES  # type: ignore[attr-defined]
WIDE = "+avx512vpopcntdq" in FEATURES
_LANES, _ROWS = (8, 4) if WIDE else (4, 2)
_VECTORS = 4  # of one accumulator each: 16 of 32 registers, or 8 of 16
_DOT_VECTORS = 2  # of two accumulators each
_WORDS_AT_ONCE = 1024  # a block of 32 rows is then 256 KiB, which a second-level cache holds


@intrinsic
def ctpop(typingctx: Any, value: Any) -> Any:
    """Number of ones in a uint64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


@intrinsic
def leading_zeros(typingctx: Any, value: Any) -> Any:
    """Zeros above the highest one of a uint64; 64 for 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), codegen


@intrinsic
def trailing_zeros(typingctx: Any, value: Any) -> Any:
    """Zeros below the lowest one of a uint64; 64 for 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), codegen


def interleaved(bits_nw: np.ndarray) -> np.ndarray:
    """uint64 (N, W) -> (ceil(N / 32), W, 32): words of 32 rows side by side, zeros for the rows that fill the last block."""
    blocks, words = -(-len(bits_nw) // BLOCK), bits_nw.shape[1]
    storage = np.empty(blocks * words * BLOCK + 8, dtype=np.uint64)
    start = (-storage.ctypes.data % 64) // 8  # vectors must not straddle cache lines
    packed = storage[start : start + blocks * words * BLOCK].reshape(blocks, words, BLOCK)
    if packed.size:
        _interleave(bits_nw, packed)
    return packed


@numba.njit(cache=True, nogil=True)
def _interleave(bits_nw: np.ndarray, packed: np.ndarray) -> None:
    for block in range(packed.shape[0]):
        for r in range(BLOCK):
            row = block * BLOCK + r
            for w in range(packed.shape[1]):
                packed[block, w, r] = bits_nw[row, w] if row < bits_nw.shape[0] else np.uint64(0)


Combine = Callable[[Any, list[Any], list[Any]], list[Any]]


def _pair_counts(planes: int, vectors: int, weights: tuple[int, ...], combine: Combine) -> Callable[..., Any]:
    """Intrinsic (a, b, a_at, b_at, words, counts, at): counts[r * 32 + c] += sum over the weights and the words w of
    weight * popcount(combine(a planes [w, r], b planes [w, c])), for r < _ROWS and c < _LANES * vectors.

    `a`, `b`: tuples of `planes` arrays of interleaved uint64 words, read from elements `a_at`, `b_at`; `counts`: int32, from
    element `at`. `combine` gives one vector for each weight.
    """

    def pair_counts(typingctx: Any, a: Any, b: Any, a_at: Any, b_at: Any, words: Any, counts: Any, at: Any) -> Any:
        integer = types.intp
        signature = types.void(a, b, integer, integer, integer, counts, integer)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            word, count, index = ir.IntType(64), ir.IntType(32), ir.IntType(64)
            vector, narrow = ir.VectorType(word, _LANES), ir.VectorType(count, _LANES)

            def data(array_type: Any, array: Any, start: Any) -> Any:
                return builder.gep(context.make_array(array_type)(context, builder, array).data, [start])

            def plane_data(k: int, start: Any) -> list[Any]:
                arrays = cgutils.unpack_tuple(builder, args[k], planes)
                return [data(kind, one, start) for kind, one in zip(signature.args[k], arrays, strict=True)]

            a_ptrs, b_ptrs = plane_data(0, args[2]), plane_data(1, args[3])
            out = data(signature.args[5], args[5], args[6])
            popcount = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector]), f"llvm.ctpop.v{_LANES}i64"
            )
            lanes = ir.Constant(ir.VectorType(count, _LANES), [0] * _LANES)
            zero = ir.Constant(vector, [0] * _LANES)

            def place(r: int, v: int) -> Any:
                where = ir.Constant(index, r * BLOCK + v * _LANES)
                return builder.bitcast(builder.gep(out, [where]), narrow.as_pointer())

            def splat(one: Any) -> Any:
                single = builder.insert_element(ir.Constant(vector, ir.Undefined), one, ir.Constant(count, 0))
                return builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), lanes)

            cells = [(r, v) for r in range(_ROWS) for v in range(vectors)]
            entry = builder.block
            head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
            builder.branch(head)

            builder.position_at_end(head)
            w = builder.phi(index)
            w.add_incoming(ir.Constant(index, 0), entry)
            sums = [builder.phi(vector) for _ in cells for _ in weights]
            for total in sums:
                total.add_incoming(zero, entry)
            builder.cbranch(builder.icmp_signed("<", w, args[4]), body, done)

            builder.position_at_end(body)
            row = builder.mul(w, ir.Constant(index, BLOCK))
            columns = []
            for v in range(vectors):
                where = builder.add(row, ir.Constant(index, v * _LANES))
                columns.append(
                    [
                        builder.load(builder.bitcast(builder.gep(ptr, [where]), vector.as_pointer()), align=8)
                        for ptr in b_ptrs
                    ]
                )
            after: list[Any] = []
            for r in range(_ROWS):
                where = builder.add(row, ir.Constant(index, r))
                same = [splat(builder.load(builder.gep(ptr, [where]), align=8)) for ptr in a_ptrs]
                for v in range(vectors):
                    for value in combine(builder, same, columns[v]):
                        after.append(builder.add(sums[len(after)], builder.call(popcount, [value])))
            for total, value in zip(sums, after, strict=True):
                total.add_incoming(value, body)
            w.add_incoming(builder.add(w, ir.Constant(index, 1)), body)
            builder.branch(head)

            builder.position_at_end(done)
            for cell, (r, v) in enumerate(cells):
                total = builder.sext(builder.load(place(r, v), align=4), vector)
                for k, weight in enumerate(weights):
                    part = builder.mul(sums[cell * len(weights) + k], ir.Constant(vector, [weight] * _LANES))
                    total = builder.add(total, part)
                builder.store(builder.trunc(total, narrow), place(r, v), align=4)
            return context.get_dummy_value()

        return signature, codegen

    return intrinsic(pair_counts)


_and_counts = _pair_counts(1, _VECTORS, (1,), lambda builder, a, b: [builder.and_(a[0], b[0])])
_xor_counts = _pair_counts(1, _VECTORS, (1,), lambda builder, a, b: [builder.xor(a[0], b[0])])


def _both_and_unlike(builder: Any, a: list[Any], b: list[Any]) -> list[Any]:
    both = builder.and_(a[0], b[0])
    return [both, builder.and_(both, builder.xor(a[1], b[1]))]


_dot_counts = _pair_counts(2, _DOT_VECTORS, (1, -2), _both_and_unlike)


def _unlike_where_both(builder: Any, a: list[Any], b: list[Any]) -> list[Any]:
    both = builder.and_(a[2], b[2])
    return [builder.and_(both, builder.xor(a[plane], b[plane])) for plane in (0, 1)]


_observed_counts = _pair_counts(3, _DOT_VECTORS, (1, 1), _unlike_where_both)


@numba.njit(cache=True, nogil=True)
def and_tile(packed: np.ndarray, i: int, other: np.ndarray, j: int, counts: np.ndarray) -> None:
    """counts int32 (1024,): common ones of the rows of block i of `packed` and of block j of `other`, row by row."""
    words = packed.shape[1]
    counts[:] = 0
    for begin in range(0, words, _WORDS_AT_ONCE):
        length = min(_WORDS_AT_ONCE, words - begin)
        a_at, b_at = (i * words + begin) * BLOCK, (j * words + begin) * BLOCK
        for r in range(0, BLOCK, _ROWS):
            for c in range(0, BLOCK, _LANES * _VECTORS):
                _and_counts((packed,), (other,), a_at + r, b_at + c, length, counts, r * BLOCK + c)


@numba.njit(cache=True, nogil=True)
def xor_tile(packed: np.ndarray, i: int, other: np.ndarray, j: int, counts: np.ndarray) -> None:
    """counts int32 (1024,): differing bits of the rows of block i of `packed` and of block j of `other`, row by row."""
    words = packed.shape[1]
    counts[:] = 0
    for begin in range(0, words, _WORDS_AT_ONCE):
        length = min(_WORDS_AT_ONCE, words - begin)
        a_at, b_at = (i * words + begin) * BLOCK, (j * words + begin) * BLOCK
        for r in range(0, BLOCK, _ROWS):
            for c in range(0, BLOCK, _LANES * _VECTORS):
                _xor_counts((packed,), (other,), a_at + r, b_at + c, length, counts, r * BLOCK + c)


@numba.njit(cache=True, nogil=True)
def xor_words(packed: np.ndarray, i: int, other: np.ndarray, j: int, first: int, last: int, counts: np.ndarray) -> None:
    """Adds to counts int32 (1024,) the differing bits of words [first, last) of block i of `packed` and block j of `other`."""
    words = packed.shape[1]
    for begin in range(first, last, _WORDS_AT_ONCE):
        length = min(_WORDS_AT_ONCE, last - begin)
        a_at, b_at = (i * words + begin) * BLOCK, (j * words + begin) * BLOCK
        for r in range(0, BLOCK, _ROWS):
            for c in range(0, BLOCK, _LANES * _VECTORS):
                _xor_counts((packed,), (other,), a_at + r, b_at + c, length, counts, r * BLOCK + c)


@numba.njit(cache=True, nogil=True)
def dot_tile(
    nonzero: np.ndarray,
    negative: np.ndarray,
    i: int,
    other_nonzero: np.ndarray,
    other_negative: np.ndarray,
    j: int,
    counts: np.ndarray,
) -> None:
    """counts int32 (1024,): sums of products of values in {-1, 0, 1} of block i with those of block j, row by row.

    A value is 0 where `nonzero` is 0, else -1 where `negative` is 1, else 1; `negative` is not read where `nonzero` is 0.
    """
    words = nonzero.shape[1]
    counts[:] = 0
    for begin in range(0, words, _WORDS_AT_ONCE // 2):
        length = min(_WORDS_AT_ONCE // 2, words - begin)
        a_at, b_at = (i * words + begin) * BLOCK, (j * words + begin) * BLOCK
        for r in range(0, BLOCK, _ROWS):
            for c in range(0, BLOCK, _LANES * _DOT_VECTORS):
                _dot_counts(
                    (nonzero, negative), (other_nonzero, other_negative), a_at + r, b_at + c, length, counts, r * BLOCK + c
                )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def observed_tile(
    one: np.ndarray,
    two: np.ndarray,
    observed: np.ndarray,
    i: int,
    other_one: np.ndarray,
    other_two: np.ndarray,
    other_observed: np.ndarray,
    j: int,
    counts: np.ndarray,
) -> None:
    """counts int32 (1024,): bits of two planes that differ where both rows are observed, block i with block j, row by row."""
    words = one.shape[1]
    counts[:] = 0
    for begin in range(0, words, _WORDS_AT_ONCE // 2):
        length = min(_WORDS_AT_ONCE // 2, words - begin)
        a_at, b_at = (i * words + begin) * BLOCK, (j * words + begin) * BLOCK
        a, b = (one, two, observed), (other_one, other_two, other_observed)
        for r in range(0, BLOCK, _ROWS):
            for c in range(0, BLOCK, _LANES * _DOT_VECTORS):
                _observed_counts(a, b, a_at + r, b_at + c, length, counts, r * BLOCK + c)
