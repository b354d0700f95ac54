"""Greedy passes on the host, over pairs that were judged before: the inner loops of pruning, clumping and blocks.

`rows` holds one bit per pair that has r2 above the bound, uint32 (ring, words): for the forward order bit j % 32 of
rows[i % ring, (j // 32) % words], for the backward order bit i % 32 of rows[j % ring, (i // 32) % words]. Both are circular:
pairs are never further apart than a window. Who makes the bits (numba_prune.py as they are asked for, triton_sinks.py all at
once) is left to the callers.
"""

from __future__ import annotations

import numba
import numpy as np

from engine.kernels.bits.tiles import leading_zeros, trailing_zeros
from engine.kernels.ld.checks import EPSILON


@numba.njit(cache=True, nogil=True)
def _next(word: int, least: int) -> int:
    """Lowest one of a word of 32 at or above bit `least`; 64 or more where there is none."""
    return np.int64(trailing_zeros(np.uint64(word) >> np.uint64(least) << np.uint64(least)))  # type: ignore


@numba.njit(cache=True, nogil=True)
def last_one(word: int, below: int) -> int:
    """Highest one of a word of 32 below bit `below`; -1 where there is none."""
    kept = np.uint64(word) & ((np.uint64(1) << np.uint64(below)) - np.uint64(1))
    return 63 - np.int64(leading_zeros(kept))  # type: ignore


@numba.njit(cache=True, nogil=True)
def next_site(alive: np.ndarray, at: int, end: int) -> int:
    """First living site from `at` on; `end` where there is none before it. `alive`: uint32 words of 32 sites."""
    while at < end:
        bit = _next(alive[at >> 5], at & 31)
        if bit < 32:
            return min(end, (at >> 5 << 5) + bit)
        at = (at >> 5) + 1 << 5
    return end


@numba.njit(cache=True, nogil=True)
def kill(alive: np.ndarray, site: int) -> None:
    alive[site >> 5] &= ~(np.uint32(1) << np.uint32(site & 31))


@numba.njit(cache=True, nogil=True)
def forward_window(
    rows: np.ndarray, alive: np.ndarray, major_l: np.ndarray, unchecked: np.ndarray, start: int, end: int
) -> None:
    """Each site is held against the later ones until one of the two goes; over and over until none goes."""
    ring, words = rows.shape
    gone = True
    while gone:
        gone = False
        i = next_site(alive, start, end)
        while i < end:
            j = max(i + 1, unchecked[i])
            hit = -1
            while j < end and hit < 0:
                w = j >> 5
                bit = _next(rows[i % ring, w % words] & alive[w], j & 31)
                if bit < 32:
                    hit = (w << 5) + bit
                j = w + 1 << 5
            if hit < 0 or hit >= end:
                unchecked[i] = end
            else:
                gone = True
                if major_l[i] > major_l[hit] * (1 + EPSILON):
                    kill(alive, i)
                else:
                    kill(alive, hit)
                    unchecked[i] = next_site(alive, hit + 1, end)
            i = next_site(alive, i + 1, end)


@numba.njit(cache=True, nogil=True)
def backward_window(
    rows: np.ndarray, alive: np.ndarray, major_l: np.ndarray, start: int, end: int, carried: int, held: np.ndarray
) -> None:
    """Each new site from the last, nearest earlier ones first. One that went as the earlier of a pair still has its turn."""
    ring, words = rows.shape
    count = 0
    j = next_site(alive, max(start, carried), end)
    while j < end:
        held[count] = j
        count += 1
        j = next_site(alive, j + 1, end)
    for k in range(count - 1, -1, -1):
        j = held[k]
        i = j  # pairs (i', j) with i' >= i were looked at
        while i > start:
            w = (i - 1) >> 5
            bit = last_one(rows[j % ring, w % words] & alive[w], i - (w << 5))
            if bit < 0:
                i = w << 5
                continue
            i = (w << 5) + bit
            if i < start:
                break
            if not major_l[i] > major_l[j] * (1 + EPSILON):
                kill(alive, j)
                break
            kill(alive, i)


@numba.njit(cache=True, nogil=True)
def prune_rows(
    rows: np.ndarray, backward: bool, alive: np.ndarray, major_l: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> None:
    """All windows, over rows that were all made before."""
    unchecked, held = np.zeros(len(major_l), dtype=np.int64), np.empty(len(major_l), dtype=np.int64)
    carried = 0
    for k in range(len(starts)):
        if backward:
            backward_window(rows, alive, major_l, starts[k], ends[k], carried, held)
            carried = ends[k]
        else:
            forward_window(rows, alive, major_l, unchecked, starts[k], ends[k])


def bits_of(flags_l: np.ndarray) -> np.ndarray:
    """uint32 words of 32 flags."""
    padded = np.zeros(-(-len(flags_l) // 32) * 32 + 32, dtype=np.uint8)
    padded[: len(flags_l)] = flags_l
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)


def flags_of(words: np.ndarray, length: int) -> np.ndarray:
    """bool (length,), inverse of `bits_of`."""
    octets = np.ascontiguousarray(words.astype("<u4")).view(np.uint8)
    return np.unpackbits(octets, count=length, bitorder="little").astype(bool)
