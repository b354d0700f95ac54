"""Counts of many register tiles by looking up what nibbles have in common (`bits.lookups`), for processors that have AVX2 and
no vector popcount: what popcount does there in nine operations for 256 pairs of bits, two do for 128, and only where a row is
not zero.

The rows of a strip of blocks are lists of the nibbles that have the rarer value; four blocks of columns at a time are laid out
by places. The counts are those of `tiles.and_tile` and `tiles.dot_tile`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from engine.kernels.bits import lookups
from engine.kernels.bits.tiles import BLOCK, WIDE

_LISTED_FROM, _LISTED_TO = 8, 1024  # words of a row: shorter ones are counted sooner; 16 MiB for the lists of 256 rows
_WORDS_AT_ONCE = 96  # 192 KiB of columns, which a second-level cache holds
_BLOCKS = lookups.LANES // BLOCK


class Room(NamedTuple):
    """What a task looks up: lists, uint32 (rows, entries), of `lengths`, int64 (rows,), which are of zeros where `inverse`,
    bool (rows,); of the strip that begins with block `listed`, int64 (1,). Where: columns, uint8 (1, places, 128). And what
    that gives: found, int32 (rows, 128).
    """

    lists: np.ndarray
    lengths: np.ndarray
    inverse: np.ndarray
    listed: np.ndarray
    columns: np.ndarray
    found: np.ndarray


def preferred(words: int) -> bool:
    """Whether rows of so many words are better looked up than counted."""
    return lookups.AVAILABLE and not WIDE and _LISTED_FROM <= words <= _LISTED_TO


@numba.njit(cache=True, nogil=True)
def new_room(blocks: int, words: int) -> Room:
    """For strips of up to so many blocks of rows; 0 where nothing is looked up."""
    rows = blocks * BLOCK
    return Room(
        np.empty((rows, 16 * words + lookups.SPARE), dtype=np.uint32),
        np.empty(rows, dtype=np.int64),
        np.empty(rows, dtype=np.bool_),
        np.full(1, -1, dtype=np.int64),
        lookups.new_columns(min(blocks, 1), min(words, _WORDS_AT_ONCE)),
        np.empty((rows, lookups.LANES), dtype=np.int32),
    )


@numba.njit(cache=True, nogil=True)
def _look_up(
    dosages: bool,
    n: int,
    packed: np.ndarray,
    sum_l: np.ndarray,
    i0: int,
    other: np.ndarray,
    other_sum_l: np.ndarray,
    j0: int,
    j1: int,
    reach: np.ndarray,
    room: Room,
    sums: np.ndarray,
) -> None:
    """sums[i, j], int32 (1024,): counts of block i0 + i with block j0 + j of the other set: common ones or, of `dosages`, sums
    of products of what people have who own two bits each, less one.

    n: bits, or people. packed, other: uint64 (blocks, W, 32), nothing beyond the last bit. sum_l: float64, ones of each row,
    or sums of dosages less one. reach: int64 (rows, 2); for row i only the blocks from reach[i, 0] to before reach[i, 1] are
    wanted, of those from `j0` to before `j1`; other sums mean nothing. room: lists are kept from one call to the next of the
    same i0.
    """
    words = packed.shape[1]
    if room.listed[0] != i0:
        room.listed[0] = i0
        for row in range(len(reach) * BLOCK):
            total = sum_l[i0 * BLOCK + row]
            room.inverse[row] = total > 0 if dosages else 2 * total > n
            bits_rw, r = packed[i0 + row // BLOCK].T, row % BLOCK
            room.lengths[row] = lookups.list_nibbles(bits_rw, r, n << dosages, room.inverse[row], room.lists, row)
    for j in range(j0, j1, _BLOCKS):
        blocks = min(_BLOCKS, j1 - j)
        for begin in range(0, words, _WORDS_AT_ONCE):
            end = min(words, begin + _WORDS_AT_ONCE)
            lookups.fill_blocks(other, j, blocks, begin, end, room.columns[0])
            for i in range(len(reach)):
                first, last = max(j, reach[i, 0]) - j, min(j + blocks, reach[i, 1]) - j
                if first < last:
                    _add(i, begin, end, words, first, last, dosages, room)
        for i in range(len(reach)):
            first, last = max(j, reach[i, 0]), min(j + blocks, reach[i, 1])
            for row in range(i * BLOCK, (i + 1) * BLOCK):
                for block in range(first, last):
                    at, to = (block - first) * BLOCK, row % BLOCK * BLOCK
                    _restore(
                        dosages, n, sum_l[i0 * BLOCK + row], room.inverse[row],
                        other_sum_l[block * BLOCK : (block + 1) * BLOCK], room.found[row, at : at + BLOCK],
                        sums[i, block - j0, to : to + BLOCK],
                    )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def _add(i: int, begin: int, end: int, words: int, first: int, last: int, dosages: bool, room: Room) -> None:
    """To what was found of block row i, from words [begin, end) and the blocks [first, last) of the columns laid out."""
    entries, pitch, columns = room.lists.reshape(-1), room.lists.shape[1], room.columns.reshape(-1)
    base = first * BLOCK - begin * 16 * lookups.LANES
    for row in range(i * BLOCK, (i + 1) * BLOCK):
        listed = room.lists[row, : room.lengths[row]]
        k0 = np.searchsorted(listed, np.uint32(begin << 8)) if begin else 0
        k1 = np.searchsorted(listed, np.uint32(end << 8)) if end < words else len(listed)
        if begin == 0:
            room.found[row] = 0
        at = row * pitch
        lookups.add_sums(entries, at + k0, at + k1, columns, base, last - first, int(dosages), room.found[row])


@numba.njit(cache=True, nogil=True)
def _restore(
    dosages: bool, n: int, sx: float, inverse: bool, sum_j: np.ndarray, found: np.ndarray, sums: np.ndarray
) -> None:
    """Counts of what was found, which is of zeros where `inverse`. With y ones there are 1 - y or 2 - y zeros."""
    sign = np.int32(-1 if inverse else 1)
    of_j, fixed = np.int32(inverse), np.int32(0)
    if dosages:
        of_j, fixed = -sign, np.int32(-sign * n - sx)
    for c in range(BLOCK):
        sums[c] = sign * found[c] + of_j * np.int32(sum_j[c]) + fixed


@numba.njit(cache=True, nogil=True)
def _not_here(*_: Any) -> None:
    """In place of `_look_up` where its instructions cannot be compiled; nobody calls it."""


look_up = _look_up if lookups.AVAILABLE else _not_here
