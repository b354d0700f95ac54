"""Bits on the CPU. Sixty-four alleles become one word, and one word sixty-four alleles, by a vector comparison in LLVM IR,
which is `vptestmb` and `vpmovm2b` with AVX-512 and whatever serves elsewhere.

The transpose goes in 64 x 64 blocks (Hacker's Delight, section 7-3), a block in eight vectors; nothing is unpacked. Eight word
columns are read at a time: a cache line of the input serves eight blocks.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_COLUMNS = 8  # words of 8 bytes in a cache line of 64 bytes


def pack(alleles_ln: np.ndarray) -> tuple[np.ndarray, bool]:
    """uint8 or bool (L, N) of 0 and 1 -> uint64 (L, ceil(N / 64)), and whether there was nothing but 0 and 1."""
    sites, n = alleles_ln.shape
    bits_lw = np.empty((sites, (n + 63) // 64), dtype=np.uint64)
    return bits_lw, _pack(np.ascontiguousarray(alleles_ln).view(np.uint8), bits_lw)


def unpack(bits_lw: np.ndarray, n: int) -> np.ndarray:
    """uint64 (L, W) -> uint8 (L, n)."""
    alleles_ln = np.empty((bits_lw.shape[0], n), dtype=np.uint8)
    _unpack(bits_lw, alleles_ln)
    return alleles_ln


def transpose(bits_lw: np.ndarray, n: int) -> np.ndarray:
    """uint64 (L, W) -> uint64 (n, ceil(L / 64))."""
    bits_nw = np.empty((n, (bits_lw.shape[0] + 63) // 64), dtype=np.uint64)
    _transpose(bits_lw, bits_nw)
    return bits_nw


def popcount_rows(bits_lw: np.ndarray) -> np.ndarray:
    """int64 (L,) number of ones in each row."""
    counts_l = np.empty(bits_lw.shape[0], dtype=np.int64)
    _popcount_rows(bits_lw, counts_l)
    return counts_l


def dosage_planes(bits_lw: np.ndarray, samples: int, missing_lw: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """As the door's `dosage_planes`."""
    planes = tuple(np.empty((bits_lw.shape[0], (samples + 63) // 64), dtype=np.uint64) for _ in range(3))
    missing = np.empty((0, 0), dtype=np.uint64) if missing_lw is None else missing_lw
    _dosage_planes(bits_lw, missing, samples, *planes)
    return planes


def _load_where(comparison: str, limit: int) -> Any:
    """Intrinsic (alleles, at): the word whose bit i is set where the allele (uint8) at `at` + i compares so with `limit`."""

    def load_word(typingctx: Any, alleles: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            octets = ir.VectorType(ir.IntType(8), 64)
            data = builder.gep(context.make_array(signature.args[0])(context, builder, args[0]).data, [args[1]])
            values = builder.load(builder.bitcast(data, octets.as_pointer()), align=1)
            ones = builder.icmp_unsigned(comparison, values, ir.Constant(octets, [limit] * 64))
            return builder.bitcast(ones, ir.IntType(64))

        return types.uint64(alleles, types.intp), codegen

    return intrinsic(load_word)


_load_word, _load_wrong = _load_where("!=", 0), _load_where(">", 1)


@intrinsic
def _store_word(typingctx: Any, word: Any, alleles: Any, at: Any) -> Any:
    """Bit i of the word as the allele (uint8, 0 or 1) at `at` + i."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        octets = ir.VectorType(ir.IntType(8), 64)
        data = builder.gep(context.make_array(signature.args[1])(context, builder, args[1]).data, [args[2]])
        ones = builder.bitcast(args[0], ir.VectorType(ir.IntType(1), 64))
        builder.store(builder.zext(ones, octets), builder.bitcast(data, octets.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, alleles, types.intp), codegen


@intrinsic
def transpose_block(typingctx: Any, words: Any, at: Any) -> Any:
    """Transpose the 64 words (uint64) from `at` as a 64 x 64 bit matrix, in place: swap halves, quarters, ... single bits.

    Rows 8 v .. 8 v + 7 are vector v: halves of 32, 16 and 8 rows change places between vectors, the others between lanes.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, lane = ir.IntType(64), ir.IntType(32)
        vector = ir.VectorType(word, 8)
        data = builder.gep(context.make_array(signature.args[0])(context, builder, args[0]).data, [args[1]])

        def same(value: int) -> Any:
            return ir.Constant(vector, [value] * 8)

        places = [builder.bitcast(builder.gep(data, [ir.Constant(word, 8 * v)]), vector.as_pointer()) for v in range(8)]
        rows = [builder.load(place, align=8) for place in places]
        for width in (32, 16, 8, 4, 2, 1):
            low = sum(1 << bit for bit in range(64) if not bit & width)  # columns whose partner lies `width` higher
            low_v, high_v, width_v = same(low), same(low << width), same(width)
            if width >= 8:
                for v in range(8):
                    other = v | (width // 8)
                    if v != other:
                        a, b = rows[v], rows[other]
                        swap = builder.and_(builder.xor(builder.lshr(a, width_v), b), low_v)
                        rows[v] = builder.xor(a, builder.shl(swap, width_v))
                        rows[other] = builder.xor(b, swap)
                continue
            partner = ir.Constant(ir.VectorType(lane, 8), [k ^ width for k in range(8)])
            first = ir.Constant(ir.VectorType(ir.IntType(1), 8), [not k & width for k in range(8)])
            for v in range(8):
                there = builder.shuffle_vector(rows[v], ir.Constant(vector, ir.Undefined), partner)
                up = builder.or_(builder.and_(rows[v], low_v), builder.shl(builder.and_(there, low_v), width_v))
                down = builder.or_(builder.and_(rows[v], high_v), builder.lshr(builder.and_(there, high_v), width_v))
                rows[v] = builder.select(first, up, down)
        for row, place in zip(rows, places, strict=True):
            builder.store(row, place, align=8)
        return context.get_dummy_value()

    return types.void(words, types.intp), codegen


@numba.njit(cache=True, nogil=True)
def _pack(alleles_ln: np.ndarray, bits_lw: np.ndarray) -> bool:
    sites, n = alleles_ln.shape
    flat = alleles_ln.reshape(-1)
    wrong = np.uint64(0)
    for site in range(sites):
        for word in range(n // 64):
            at = site * n + word * 64
            bits_lw[site, word] = _load_word(flat, at)
            wrong |= _load_wrong(flat, at)
        if n % 64:
            value = np.uint64(0)
            for bit in range(n % 64):
                allele = np.uint64(flat[site * n + n // 64 * 64 + bit])
                value |= (allele & np.uint64(1)) << np.uint64(bit)
                wrong |= allele >> np.uint64(1)
            bits_lw[site, n // 64] = value
    return wrong == np.uint64(0)


@numba.njit(cache=True, nogil=True)
def _unpack(bits_lw: np.ndarray, alleles_ln: np.ndarray) -> None:
    sites, n = alleles_ln.shape
    flat = alleles_ln.reshape(-1)
    for site in range(sites):
        for word in range(n // 64):
            _store_word(bits_lw[site, word], flat, site * n + word * 64)  # type: ignore[call-arg]
        for bit in range(n % 64):
            flat[site * n + n // 64 * 64 + bit] = (bits_lw[site, n // 64] >> np.uint64(bit)) & np.uint64(1)


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
def _dosage_planes(
    bits_lw: np.ndarray,
    missing_lw: np.ndarray,
    samples: int,
    nonzero_lw: np.ndarray,
    negative_lw: np.ndarray,
    observed_lw: np.ndarray,
) -> None:
    one = np.uint64(1)
    for site in range(bits_lw.shape[0]):
        for word in range(nonzero_lw.shape[1]):
            first, second, called = np.uint64(0), np.uint64(0), ~np.uint64(0)
            for half in range(min(2, bits_lw.shape[1] - 2 * word)):
                shift = np.uint64(32 * half)
                pair = bits_lw[site, 2 * word + half]
                first |= _even_bits(pair) << shift
                second |= _even_bits(pair >> one) << shift
                if missing_lw.size:
                    pair = missing_lw[site, 2 * word + half]
                    called &= ~((_even_bits(pair) | _even_bits(pair >> one)) << shift)
            left = samples - 64 * word
            if left < 64:
                called &= (one << np.uint64(left)) - one
            observed_lw[site, word] = called
            nonzero_lw[site, word] = ~(first ^ second) & called
            negative_lw[site, word] = ~(first | second) & called


@numba.njit(cache=True, nogil=True)
def _transpose(bits_lw: np.ndarray, bits_nw: np.ndarray) -> None:
    sites, columns = bits_lw.shape
    n, out_words = bits_nw.shape
    blocks = np.zeros((_COLUMNS, 64), dtype=np.uint64)
    flat = blocks.reshape(-1)
    for first_column in range(0, columns, _COLUMNS):
        count = min(_COLUMNS, columns - first_column)
        for out_word in range(out_words):
            first_site = out_word * 64
            rows = min(64, sites - first_site)
            blocks[:] = np.uint64(0)
            for row in range(rows):
                for column in range(count):
                    blocks[column, row] = bits_lw[first_site + row, first_column + column]
            for column in range(count):
                transpose_block(flat, column * 64)  # type: ignore[call-arg]
                first = (first_column + column) * 64
                for bit in range(min(64, n - first)):
                    bits_nw[first + bit, out_word] = blocks[column, bit]


@numba.njit(cache=True, nogil=True)
def _popcount_rows(bits_lw: np.ndarray, counts_l: np.ndarray) -> None:
    # shift-and-mask count, which LLVM recognises and turns into popcnt
    for site in range(bits_lw.shape[0]):
        total = np.int64(0)
        for word in range(bits_lw.shape[1]):
            x = bits_lw[site, word]
            x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
            x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
            x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
            total += np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))
        counts_l[site] = total
