"""Nearest rows of bits in each of many windows of sites on the CPU, all windows in one pass.

The edges of all windows cut the sites into segments. Rows are packed again so that every segment begins a word; for a
tile of 32 x 32 pairs the differing bits are counted segment by segment in a running total, each segment once however
many windows overlap it. A window is the total at its last edge less the total at its first, of which a copy is kept in
a slot for as long as a window that began there is open: the slots, not the windows, bound the memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from engine.kernels.bits.tiles import BLOCK, interleaved, xor_words
from engine.kernels.nearest.rows import NOT_SELF, Exclude, groups, insert, merged, read_words, skipped, tiles

_QUERY_BYTES, _DATABASE_BYTES = 2**28, 2**26  # of words held at a time
_FAR = np.iinfo(np.int32).max


class Plan(NamedTuple):
    """What happens at each of E edges, in order: windows close, a slot is filled, the segment up to the next edge is
    counted.

    edge_e: site of the edge. word_e: first word of the segment behind it, of E + 1 (the last is the number of words);
    segments in no window have no words. slot_e: the slot filled, or -1. close_e: where the windows that close begin in
    `window_v`, of E + 1. window_v, slot_v: the windows in the order in which they close, and their slots. slots: how
    many there are.
    """

    edge_e: np.ndarray
    word_e: np.ndarray
    slot_e: np.ndarray
    close_e: np.ndarray
    window_v: np.ndarray
    slot_v: np.ndarray
    slots: int


def plan(windows_v2: np.ndarray) -> Plan:
    """Slots are used again as soon as the last window that began at their edge has closed."""
    start_v, stop_v = windows_v2[:, 0], windows_v2[:, 1]
    edge_e, at = np.unique(windows_v2, return_inverse=True)
    at = at.reshape(windows_v2.shape)
    window_v = np.argsort(stop_v, kind="stable")
    close_e = np.searchsorted(stop_v[window_v], np.append(edge_e, edge_e[-1:] + 1))
    covered = np.zeros(len(edge_e) + 1, dtype=np.int64)
    np.add.at(covered, at[:, 0], 1)
    np.add.at(covered, at[:, 1], -1)
    sites_e = np.append(np.diff(edge_e), 0) * (np.cumsum(covered)[: len(edge_e)] > 0)
    last_stop: dict[int, int] = {}
    for start, stop in zip(start_v.tolist(), stop_v.tolist()):
        last_stop[start] = max(stop, last_stop.get(start, stop))
    free: list[int] = []
    held: dict[int, list[int]] = {}  # stop -> slots that are free from there on
    slot_of: dict[int, int] = {}
    slot_e, slots = np.full(len(edge_e), -1), 0
    for e, edge in enumerate(edge_e.tolist()):
        free += held.pop(edge, [])
        if edge in last_stop:
            if not free:
                free, slots = [slots], slots + 1
            slot_of[edge] = slot_e[e] = free.pop()
            held.setdefault(last_stop[edge], []).append(slot_of[edge])
    slot_v = np.array([slot_of[start] for start in start_v[window_v].tolist()], dtype=np.int64)
    word_e = np.concatenate([[0], np.cumsum(-(-sites_e // 64))]).astype(np.int64)
    return Plan(edge_e.astype(np.int64), word_e, slot_e, close_e, window_v, slot_v, slots)


def hamming_windows_topk(
    query_nw: Any, database_mw: Any, windows_v2: np.ndarray, k: int, exclude_self: bool, exclude: Exclude
) -> tuple[np.ndarray, np.ndarray]:
    """Distance int32 (N, V, k) and index int64 (N, V, k). Few queries share the work by parts of the database."""
    n, m, v = query_nw.shape[0], database_mw.shape[0], len(windows_v2)
    distance, index = np.full((n, v, k), -1, dtype=np.int32), np.full((n, v, k), -1, dtype=np.int64)
    if not v:
        return distance, index
    steps = plan(windows_v2)
    row_bytes = 8 * max(query_nw.shape[1], int(steps.word_e[-1]))
    for part in tiles(n, row_bytes + 12 * v * k, _QUERY_BYTES, BLOCK):
        packed, rows = _packed(query_nw, part, steps), part.stop - part.start
        parts = max(1, min(-(-m // BLOCK), -(-4 * numba.get_num_threads() // (-(-rows // BLOCK)))))
        values, indices = np.full((rows, v, parts, k), _FAR, dtype=np.int32), np.full((rows, v, parts, k), -1)
        for tile in tiles(m, row_bytes, _DATABASE_BYTES, BLOCK):
            shift = part.start - tile.start if exclude_self else NOT_SELF
            _windows_tile(
                packed, _packed(database_mw, tile, steps), tile.stop - tile.start, steps, shift,
                *groups(exclude, part, tile), tile.start, values, indices,
            )  # fmt: skip
        nearest = merged(values.reshape(rows * v, parts, k), indices.reshape(rows * v, parts, k), k)
        distance[part], index[part] = (x.reshape(rows, v, k) for x in nearest)
    return distance, index


def _packed(bits_nw: Any, part: slice, steps: Plan) -> np.ndarray:
    words = np.empty((part.stop - part.start, int(steps.word_e[-1])), dtype=np.uint64)
    _cut(read_words(bits_nw, part), steps.edge_e, steps.word_e, words)
    return interleaved(words)


@numba.njit(cache=True, nogil=True)
def _cut(bits_nw: np.ndarray, edge_e: np.ndarray, word_e: np.ndarray, out: np.ndarray) -> None:
    """Every segment moved to the beginning of a word."""
    one = np.uint64(1)
    for e in range(len(edge_e) - 1):
        for w in range(word_e[e + 1] - word_e[e]):
            site = edge_e[e] + 64 * w
            at, by, left = site >> 6, np.uint64(site & 63), min(64, edge_e[e + 1] - site)
            mask = ~np.uint64(0) if left == 64 else (one << np.uint64(left)) - one
            beyond = by > 0 and at + 1 < bits_nw.shape[1]
            for n in range(len(bits_nw)):
                word = bits_nw[n, at] >> by
                if beyond:
                    word |= bits_nw[n, at + 1] << (np.uint64(64) - by)
                out[n, word_e[e] + w] = word & mask


@numba.njit(cache=True, nogil=True)
def _windows_row(
    query: np.ndarray,
    database: np.ndarray,
    members: int,
    steps: Plan,
    shift: int,
    query_group: np.ndarray,
    database_group: np.ndarray,
    first: int,
    value_nvpk: np.ndarray,
    index_nvpk: np.ndarray,
    i: int,
    part: int,
) -> None:
    """Query block i against part `part` of this piece of the database, whose first row is row `first` of all."""
    total, near = np.empty(BLOCK * BLOCK, dtype=np.int32), np.empty(BLOCK, dtype=np.int32)
    slots = np.empty((steps.slots, BLOCK * BLOCK), dtype=np.int32)
    parts, k, blocks = value_nvpk.shape[2], value_nvpk.shape[3], database.shape[0]
    for j in range(part * blocks // parts, (part + 1) * blocks // parts):
        total[:] = 0
        columns = min(BLOCK, members - j * BLOCK)
        for e in range(len(steps.edge_e)):
            for closed in range(steps.close_e[e], steps.close_e[e + 1]):
                v, before = steps.window_v[closed], slots[steps.slot_v[closed]]
                for r in range(min(BLOCK, value_nvpk.shape[0] - i * BLOCK)):
                    n = i * BLOCK + r
                    worst, hits = value_nvpk[n, v, part, k - 1], 0
                    for c in range(BLOCK):
                        near[c] = total[r * BLOCK + c] - before[r * BLOCK + c]
                        hits += near[c] < worst
                    if hits == 0:
                        continue
                    kept = value_nvpk[n, v, part]
                    for c in range(columns):
                        m = j * BLOCK + c
                        if near[c] < kept[k - 1] and not skipped(n, m, shift, query_group, database_group):
                            insert(kept, index_nvpk[n, v, part], near[c], first + m)
            if steps.slot_e[e] >= 0:
                slots[steps.slot_e[e]] = total
            xor_words(query, i, database, j, steps.word_e[e], steps.word_e[e + 1], total)


@numba.njit(cache=True, nogil=True, parallel=True)
def _windows_tile(
    query: np.ndarray,
    database: np.ndarray,
    members: int,
    steps: Plan,
    shift: int,
    query_group: np.ndarray,
    database_group: np.ndarray,
    first: int,
    value_nvpk: np.ndarray,
    index_nvpk: np.ndarray,
) -> None:
    parts = value_nvpk.shape[2]
    for job in numba.prange(query.shape[0] * parts):
        _windows_row(
            query, database, members, steps, shift, query_group, database_group, first, value_nvpk, index_nvpk,
            job // parts, job % parts,
        )  # fmt: skip
