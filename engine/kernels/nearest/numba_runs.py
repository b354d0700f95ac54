"""Longest stretch of sites on which a row of bits equals some row of a set, on the CPU.

A run that beats the best so far must contain one of a few short anchor windows; only those are looked at, and only a
window without a difference is extended to its whole run. The set is streamed in parts in the order of its rows, and a
later row must be strictly better, so ties go to the smallest index for any tiling and any number of threads.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from engine.kernels.bits.tiles import leading_zeros, trailing_zeros
from engine.kernels.nearest.rows import NOT_SELF, Exclude, groups, read_words, skipped, tiles

_QUERY_BYTES, _DATABASE_BYTES = 2**28, 2**26  # of words held at a time


def longest_run(
    query_nw: Any, database_mw: Any, length: int, position_bp: np.ndarray, exclude_self: bool, exclude: Exclude
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """run_bp, run_sites, index, all int64 (N,)."""
    n, row_bytes = query_nw.shape[0], 8 * query_nw.shape[1]
    run_bp, run_sites, index = (np.full(n, fill, dtype=np.int64) for fill in (-1, 0, -1))
    for part in tiles(n, row_bytes, _QUERY_BYTES, 1) if length else ():
        query = read_words(query_nw, part)
        for tile in tiles(database_mw.shape[0], row_bytes, _DATABASE_BYTES, 1):
            shift = part.start - tile.start if exclude_self else NOT_SELF
            _longest_run(
                query, read_words(database_mw, tile), position_bp, shift, *groups(exclude, part, tile), tile.start,
                run_bp[part], run_sites[part], index[part],
            )  # fmt: skip
    return run_bp, run_sites, index


@numba.njit(cache=True, nogil=True)
def _anchors(position_bp: np.ndarray, best_bp: int, anchors: np.ndarray) -> tuple[int, int]:
    """Windows such that every run longer than `best_bp` contains one: (sites per window, number), first sites in
    `anchors`.

    A run that contains neither of two neighbouring windows lies strictly between the first site of the one and the last
    site of the other; windows are set as far apart as that stretch stays within `best_bp`. The widest window
    that allows it is taken.
    """
    length = len(position_bp)
    width = 64
    while True:
        number, start = 0, -1  # a run lies after site `start`
        while start + 1 < length and position_bp[length - 1] - position_bp[start + 1] > best_bp:
            after = start // width + 1 if start >= 0 else 0
            furthest = -1
            while (after + 1) * width <= length:
                last = (after + 1) * width - 1
                if last - 1 > start and position_bp[last - 1] - position_bp[start + 1] > best_bp:
                    break
                furthest = after
                after += 1
            if furthest < 0:
                number = -1
                break
            anchors[number] = furthest * width
            number += 1
            start = furthest * width
        if number >= 0:
            return width, number
        width //= 2


@numba.njit(cache=True, nogil=True)
def _run_of_query(
    query_w: np.ndarray,
    database_mw: np.ndarray,
    position_bp: np.ndarray,
    n: int,
    shift: int,
    query_group: np.ndarray,
    database_group: np.ndarray,
    first: int,
    best_bp: int,
    best_sites: int,
    best_index: int,
) -> tuple[int, int, int]:
    """What is best after this part of the database, whose first row is row `first` of all."""
    length = len(position_bp)
    anchors = np.empty(length, dtype=np.int64)
    width, number = _anchors(position_bp, best_bp, anchors)
    for m in range(database_mw.shape[0]):
        if skipped(n, m, shift, query_group, database_group):
            continue
        reached, before = -1, best_bp
        for a in range(number):
            site = anchors[a]
            if site < reached:
                continue
            word = site >> 6
            window = (query_w[word] ^ database_mw[m, word]) >> np.uint64(site & 63)
            if window << np.uint64(64 - width):
                continue
            end = site + width  # first site behind the run
            while end < length:
                rest = (query_w[end >> 6] ^ database_mw[m, end >> 6]) >> np.uint64(end & 63)
                if rest:
                    end += np.int64(trailing_zeros(rest))  # type: ignore[call-arg]
                    break
                end = ((end >> 6) + 1) << 6
            end = min(end, length)
            reached = end
            start = site - 1  # last site before the run
            while start >= 0:
                rest = (query_w[start >> 6] ^ database_mw[m, start >> 6]) << np.uint64(63 - (start & 63))
                if rest:
                    start -= np.int64(leading_zeros(rest))  # type: ignore[call-arg]
                    break
                start = ((start >> 6) << 6) - 1
            span_bp = position_bp[end - 1] - position_bp[start + 1]
            if span_bp > best_bp:
                best_bp, best_sites, best_index = span_bp, end - 1 - start, first + m
        if best_bp > before:
            width, number = _anchors(position_bp, best_bp, anchors)
    return best_bp, best_sites, best_index


@numba.njit(cache=True, nogil=True, parallel=True)
def _longest_run(
    query_nw: np.ndarray,
    database_mw: np.ndarray,
    position_bp: np.ndarray,
    shift: int,
    query_group: np.ndarray,
    database_group: np.ndarray,
    first: int,
    run_bp: np.ndarray,
    run_sites: np.ndarray,
    index: np.ndarray,
) -> None:
    for n in numba.prange(query_nw.shape[0]):
        run_bp[n], run_sites[n], index[n] = _run_of_query(
            query_nw[n], database_mw, position_bp, n, shift, query_group, database_group, first,
            run_bp[n], run_sites[n], index[n],
        )  # fmt: skip
