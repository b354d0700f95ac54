"""Sparse rows against columns, by looking up four bits at once: for processors that have AVX2 and no vector popcount.

A row is a list of its nibbles that are not zero, as entries (place << 4 | nibble), uint32. Columns stand side by side in
groups of 128, one nibble to a byte ([group, place, column]), so that one byte shuffle finds what the row's nibble and those of
32 columns add to a sum. What is zero in the row costs nothing: where one haplotype in twenty carries an allele, 5 nibbles of 6
are zero. `TABLES` say what two nibbles add.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from engine.kernels.bits.tiles import ctpop, trailing_zeros

LANES = 128  # columns of a group
VECTOR = 32  # columns of one lookup
SPARE = 4  # entries that are written beyond the last one
_STRETCH = 31  # lookups of up to 8 each that a byte holds
_LONGEST = 256 * _STRETCH  # and that 16 bits hold


def _products(i: int, j: int) -> tuple[int, int]:
    """Of two nibbles: common ones, and the sum of products of what two people have who own two bits each."""
    people = sum(((i >> at) & 3).bit_count() * ((j >> at) & 3).bit_count() for at in (0, 2))
    return (i & j).bit_count(), people


TABLES = np.array(
    [[[_products(i, j)[kind] for j in range(16)] for i in range(16)] for kind in range(2)], dtype=np.uint8
)
"""uint8 (2, 16, 16): of haplotypes, of dosages."""


def _has_byte_shuffle() -> bool:
    """Whether what Numba compiles for has AVX2, whose name and features may have been set by hand: asked of LLVM."""
    binding = llvmlite.binding
    triple = binding.get_default_triple()
    if not triple.startswith("x86_64"):
        return False
    name, features = config.CPU_NAME, config.CPU_FEATURES  # type: ignore[attr-defined]
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_triple(triple).create_target_machine(
        cpu=binding.get_host_cpu_name() if name is None else name,
        features=binding.get_host_cpu_features().flatten() if features is None else features,
    )
    sum_of_two = "define <4 x i64> @f(<4 x i64> %a, <4 x i64> %b) {\n %c = add <4 x i64> %a, %b\n ret <4 x i64> %c\n}"
    return re.search(r"vpaddq\s.*ymm", machine.emit_assembly(binding.parse_assembly(sum_of_two))) is not None


AVAILABLE = _has_byte_shuffle()


def _lookups(vectors: int) -> Callable[..., Any]:
    """Intrinsic (entries, begin, end, columns, base, tables, table, counts): counts[c], c < 32 * vectors, += sum over
    entries[begin:end] of what a table has for the entry's nibble and for column c's nibble at the entry's place.

    `entries`: uint32, at most _LONGEST. `columns`: uint8, `base` the element where column 0 has place 0. `tables`: uint8,
    up to 8, `table` the first element of one. `counts`: int32.
    """

    def lookups(
        typingctx: Any,
        entries: Any,
        begin: Any,
        end: Any,
        columns: Any,
        base: Any,
        tables: Any,
        table: Any,
        counts: Any,
    ) -> Any:
        integer = types.intp
        signature = types.void(entries, integer, integer, columns, integer, tables, integer, counts)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            byte, half, count, index = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
            line, octets = ir.VectorType(byte, 16), ir.VectorType(byte, VECTOR)
            halves, words = ir.VectorType(half, VECTOR // 2), ir.VectorType(count, VECTOR)

            def data(k: int) -> Any:
                return context.make_array(signature.args[k])(context, builder, args[k]).data

            def number(value: int) -> Any:
                return ir.Constant(index, value)

            def same(kind: Any, value: int) -> Any:
                return ir.Constant(kind, [value] * kind.count)

            def vector_at(pointer: Any, element: int, kind: Any) -> Any:
                return builder.bitcast(builder.gep(pointer, [number(element)]), kind.as_pointer())

            shuffle = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(octets, [octets, octets]), "llvm.x86.avx2.pshuf.b"
            )
            row, column, row_tables, out = (
                data(0),
                builder.gep(data(3), [args[4]]),
                builder.gep(data(5), [args[6]]),
                data(7),
            )
            entry = builder.block
            head, body, each, tail, done = (
                builder.append_basic_block(name) for name in ("head", "body", "each", "tail", "done")
            )
            builder.branch(head)

            builder.position_at_end(head)  # sums of 16 bits: of columns 0, 2, ... and 1, 3, ... of each vector
            first = builder.phi(index)
            first.add_incoming(args[1], entry)
            wide = [builder.phi(halves) for _ in range(2 * vectors)]
            for total in wide:
                total.add_incoming(same(halves, 0), entry)
            builder.cbranch(builder.icmp_signed("<", first, args[2]), body, done)

            builder.position_at_end(body)
            following = builder.add(first, number(_STRETCH))
            stop = builder.select(builder.icmp_signed("<", following, args[2]), following, args[2])
            builder.branch(each)

            builder.position_at_end(each)  # sums of 8 bits
            p = builder.phi(index)
            p.add_incoming(first, body)
            narrow = [builder.phi(octets) for _ in range(vectors)]
            one = builder.zext(builder.load(builder.gep(row, [p])), index)
            where = builder.mul(builder.and_(one, number(15)), number(16))
            found = builder.load(builder.bitcast(builder.gep(row_tables, [where]), line.as_pointer()), align=1)
            twice = builder.shuffle_vector(
                found, ir.Constant(line, ir.Undefined), ir.Constant(words, [k % 16 for k in range(VECTOR)])
            )
            place = builder.gep(column, [builder.mul(builder.lshr(one, number(4)), number(LANES))])
            after = []
            for v, total in enumerate(narrow):
                nibbles = builder.load(vector_at(place, v * VECTOR, octets), align=VECTOR)
                after.append(builder.add(total, builder.call(shuffle, [twice, nibbles])))
                total.add_incoming(same(octets, 0), body)
                total.add_incoming(after[v], each)
            following = builder.add(p, number(1))
            p.add_incoming(following, each)
            builder.cbranch(builder.icmp_signed("<", following, stop), each, tail)

            builder.position_at_end(tail)
            for v in range(vectors):
                pairs = builder.bitcast(after[v], halves)
                even, odd = builder.and_(pairs, same(halves, 255)), builder.lshr(pairs, same(halves, 8))
                for k, part in ((2 * v, even), (2 * v + 1, odd)):
                    wide[k].add_incoming(builder.add(wide[k], part), tail)
            first.add_incoming(stop, tail)
            builder.branch(head)

            builder.position_at_end(done)
            in_turn = ir.Constant(words, [k // 2 + k % 2 * (VECTOR // 2) for k in range(VECTOR)])
            for v in range(vectors):
                sums = builder.zext(builder.shuffle_vector(wide[2 * v], wide[2 * v + 1], in_turn), words)
                pointer = vector_at(out, v * VECTOR, words)
                builder.store(builder.add(builder.load(pointer, align=4), sums), pointer, align=4)
            return context.get_dummy_value()

        return signature, codegen

    return intrinsic(lookups)


_one, _two, _three, _four = (_lookups(vectors) for vectors in (1, 2, 3, 4))


@numba.njit(cache=True, nogil=True)
def sums(
    entries: np.ndarray,
    row: int,
    length: int,
    columns: np.ndarray,
    group: int,
    first: int,
    vectors: int,
    table: int,
    counts: np.ndarray,
) -> None:
    """counts int32 (128,): [c], c < 32 * vectors, is the sum of TABLES[table] over the first `length` entries of a row and
    column `first` + c of a group of `columns` (made by `new_columns`); `first` is a multiple of 32.
    """
    counts[: vectors * VECTOR] = 0
    start = row * entries.shape[1]
    add_sums(entries, start, start + length, columns, group * columns.shape[1] * LANES + first, vectors, table, counts)


@numba.njit(cache=True, nogil=True)
def add_sums(
    entries: np.ndarray,
    first: int,
    last: int,
    columns: np.ndarray,
    base: int,
    vectors: int,
    table: int,
    counts: np.ndarray,
) -> None:
    """counts int32 (128,) or longer: [c], c < 32 * vectors, += the sum of TABLES[table] over the entries [first, last) of all,
    and the columns from element `base` of `columns` on, which is where the first one has place 0, or would have it.
    """
    at = table * 256
    for begin in range(first, last, _LONGEST):
        end = min(last, begin + _LONGEST)
        if vectors == 1:
            _one(entries, begin, end, columns, base, TABLES, at, counts)
        elif vectors == 2:
            _two(entries, begin, end, columns, base, TABLES, at, counts)
        elif vectors == 3:
            _three(entries, begin, end, columns, base, TABLES, at, counts)
        else:
            _four(entries, begin, end, columns, base, TABLES, at, counts)


@numba.njit(cache=True, nogil=True)
def list_nibbles(bits_lw: np.ndarray, site: int, n: int, inverse: bool, entries: np.ndarray, row: int) -> int:
    """Write the list of the n bits of a site, or of their complement, to a row of entries (16 W + SPARE); its length."""
    words, length = bits_lw.shape[1], 0
    flip = ~np.uint64(0) if inverse else np.uint64(0)
    for w in range(words):
        x = bits_lw[site, w] ^ flip
        if w == words - 1:
            x &= ~np.uint64(0) >> np.uint64((64 * words - n) & 63)
        some = x | (x >> np.uint64(1))
        some = (some | (some >> np.uint64(2))) & np.uint64(0x1111111111111111)
        following = length + np.int64(ctpop(some))  # type: ignore[call-arg]
        while length < following:  # four at a time, so that the branch is foreseen; what is too many is written over
            for k in range(SPARE):
                bit = trailing_zeros(some) & np.uint64(63)  # type: ignore[call-arg]
                place = np.uint64(w * 64) + bit  # four times the nibble's
                entries[row, length + k] = np.uint32((place << np.uint64(2)) | ((x >> bit) & np.uint64(15)))
                some &= some - np.uint64(1)
            length += SPARE
        length = following
    return length


@intrinsic
def _spread(typingctx: Any, packed: Any, at: Any, columns: Any, to: Any) -> Any:
    """Nibble k of 32 words packed[at:] to columns[to + 128 k :], for k < 16: bytes of eight registers are brought together as
    in a transposition, by pairs, fours, eights and sixteens of words, and each is split in two."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, index = ir.IntType(8), ir.IntType(64)
        octets, line = ir.VectorType(byte, VECTOR), ir.VectorType(byte, 16)

        def data(k: int, start: Any) -> Any:
            array = context.make_array(signature.args[k])(context, builder, args[k])
            return builder.bitcast(builder.gep(array.data, [start]), byte.as_pointer())

        def shuffled(one: Any, two: Any, order: list[int]) -> Any:
            return builder.shuffle_vector(one, two, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order))

        def woven(one: Any, two: Any, size: int, half: int) -> Any:
            """In each 16 bytes, units of `size` from one half of `one` and of `two` by turns."""
            units = [(u // 2 * size, u % 2) for u in range(16 // size)]
            order = [
                side * 32 + lane + 8 * half + start + k
                for lane in (0, 16)
                for start, side in units
                for k in range(size)
            ]
            return shuffled(one, two, order)

        source, out = data(0, args[1]), data(2, args[3])

        def load(word: int) -> Any:
            place = builder.gep(source, [ir.Constant(index, 8 * word)])
            return builder.load(builder.bitcast(place, line.as_pointer()), align=8)

        # words 2 m, 2 m + 1 in one half and 16 + 2 m, 17 + 2 m in the other; then bytes k of both words side by side
        pairs = [shuffled(load(2 * m), load(16 + 2 * m), list(range(32))) for m in range(8)]
        parts = [[shuffled(v, v, [lane + k // 2 + 8 * (k % 2) for lane in (0, 16) for k in range(16)]) for v in pairs]]
        for size in (2, 4, 8):  # parts: of bytes 0 to 7; of 0 to 3 and 4 to 7; ...
            parts = [
                [woven(part[m], part[m + 1], size, half) for m in range(0, len(part), 2)]
                for part in parts
                for half in (0, 1)
            ]
        low = ir.Constant(octets, [15] * VECTOR)
        halves = ir.VectorType(ir.IntType(16), VECTOR // 2)
        for k, (value,) in enumerate(parts):
            high = builder.lshr(builder.bitcast(value, halves), ir.Constant(halves, [4] * (VECTOR // 2)))
            for odd, nibbles in enumerate((value, builder.bitcast(high, octets))):
                place = builder.gep(out, [ir.Constant(index, (2 * k + odd) * LANES)])
                builder.store(builder.and_(nibbles, low), builder.bitcast(place, octets.as_pointer()), align=VECTOR)
        return context.get_dummy_value()

    return types.void(packed, types.intp, columns, types.intp), codegen


@numba.njit(cache=True, nogil=True)
def fill_blocks(packed: np.ndarray, block: int, blocks: int, begin: int, end: int, columns: np.ndarray) -> None:
    """columns uint8 (16 (end - begin) or more, 128), of one group: nibbles of words [begin, end) of up to four blocks of 32
    rows that `tiles.interleaved` made, from `block` on. columns: a group that `new_columns` made.
    """
    words = packed.shape[1]
    flat = columns.reshape(-1)
    for b in range(blocks):
        for w in range(begin, end):
            at = ((block + b) * words + w) * VECTOR
            _spread(packed, at, flat, 16 * (w - begin) * LANES + b * VECTOR)  # type: ignore[call-arg]


@numba.njit(cache=True, nogil=True)
def fill_columns(bits_lw: np.ndarray, member: np.ndarray, columns: np.ndarray) -> None:
    """columns uint8 (16 W, 128), of one group: nibbles of up to 128 rows of bits_lw, those that `member` names, in this order.

    columns: a group that `new_columns` made. Those after the last vector that is begun keep what they had; in it they are zero.
    """
    count, words = len(member), bits_lw.shape[1]
    vectors = (count + VECTOR - 1) // VECTOR * VECTOR
    line, flat = np.zeros((8, LANES), dtype=np.uint64), columns.reshape(-1)
    for begin in range(0, words, 8):  # a cache line of each row, whatever the distance of the rows is
        end = min(words, begin + 8)
        for c in range(count):
            row = bits_lw[member[c]]
            for w in range(begin, end):
                line[w - begin, c] = row[w]
        for w in range(begin, end):
            for c in range(0, vectors, VECTOR):
                _spread(line, (w - begin) * LANES + c, flat, 16 * w * LANES + c)  # type: ignore[call-arg]


@numba.njit(cache=True, nogil=True)
def new_columns(groups: int, words: int) -> np.ndarray:
    """uint8 (groups, 16 * words, 128), not filled; vectors do not straddle cache lines."""
    size = groups * 16 * words * LANES
    storage = np.empty(size + 64, dtype=np.uint8)
    start = -storage.ctypes.data % 64
    return storage[start : start + size].reshape(groups, 16 * words, LANES)
