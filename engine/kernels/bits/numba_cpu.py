"""Bits on the CPU. The transpose goes in 64 x 64 blocks (Hacker's Delight, section 7-3); nothing is unpacked.

Eight word columns are read at a time: a cache line of the input serves eight blocks.
"""

from __future__ import annotations

import numba
import numpy as np

_COLUMNS = 8  # words of 8 bytes in a cache line of 64 bytes


def pack(alleles_ln: np.ndarray) -> np.ndarray:
    """uint8 or bool (L, N) of 0 and 1 -> uint64 (L, ceil(N / 64))."""
    sites, n = alleles_ln.shape
    bits_lw = np.empty((sites, (n + 63) // 64), dtype=np.uint64)
    _pack(np.ascontiguousarray(alleles_ln).view(np.uint8), bits_lw)
    return bits_lw


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


@numba.njit(cache=True, nogil=True)
def _pack(alleles_ln: np.ndarray, bits_lw: np.ndarray) -> None:
    sites, n = alleles_ln.shape
    for site in range(sites):
        for word in range(bits_lw.shape[1]):
            first = word * 64
            value = np.uint64(0)
            for bit in range(min(64, n - first)):
                value |= np.uint64(alleles_ln[site, first + bit]) << np.uint64(bit)
            bits_lw[site, word] = value


@numba.njit(cache=True, nogil=True)
def _unpack(bits_lw: np.ndarray, alleles_ln: np.ndarray) -> None:
    sites, n = alleles_ln.shape
    for site in range(sites):
        for word in range(bits_lw.shape[1]):
            first = word * 64
            value = bits_lw[site, word]
            for bit in range(min(64, n - first)):
                alleles_ln[site, first + bit] = (value >> np.uint64(bit)) & np.uint64(1)


@numba.njit(cache=True, nogil=True)
def _transpose_block(block: np.ndarray) -> None:
    """Transpose 64 words as a 64 x 64 bit matrix, in place: swap halves, quarters, ... single bits."""
    width = np.uint64(32)
    mask = np.uint64(0x00000000FFFFFFFF)
    while width != np.uint64(0):
        row = np.uint64(0)
        while row < np.uint64(64):
            # bit (row, column + width) changes place with bit (row + width, column)
            other = row | width
            swap = ((block[row] >> width) ^ block[other]) & mask
            block[row] ^= swap << width
            block[other] ^= swap
            row = (other + np.uint64(1)) & ~width
        width >>= np.uint64(1)
        mask ^= mask << width


@numba.njit(cache=True, nogil=True)
def _transpose(bits_lw: np.ndarray, bits_nw: np.ndarray) -> None:
    sites, columns = bits_lw.shape
    n, out_words = bits_nw.shape
    blocks = np.zeros((_COLUMNS, 64), dtype=np.uint64)
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
                _transpose_block(blocks[column])
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
