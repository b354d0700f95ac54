"""Nearest rows of bits in each of many windows of sites on the GPU, all windows in one pass.

As on the CPU (`numba_windows`): the edges of all windows cut the sites into segments that begin at words, and differing
bits are counted segment by segment. Here the running totals at all edges are written down for a tile of pairs, as large
as the scratch memory allows; a window is the difference of two of them. A kernel keeps the nearest of each group of
columns of that difference, and the few groups that can hold one of the k nearest are looked up again.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from engine.kernels.bits.triton_tiles import popcount
from engine.kernels.nearest.numba_windows import Plan, plan
from engine.kernels.nearest.triton_shared import (
    FAR,
    LAST_KEY,
    NOT_SELF,
    SCRATCH_BYTES,
    Exclude,
    exclusion,
    merged,
    parameters,
    pieces,
    smallest_groups,
    split_keys,
)

_QUERIES = 64  # at a time, so that a tile of totals is wide


def hamming_windows_topk(
    query_nw: torch.Tensor,
    database_mw: torch.Tensor,
    windows_v2: np.ndarray,
    k: int,
    exclude_self: bool,
    exclude: Exclude,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance int32 (N, V, k) and index int64 (N, V, k)."""
    n, m, v, device = len(query_nw), len(database_mw), len(windows_v2), query_nw.device
    keys = torch.full((n * v, k), LAST_KEY, dtype=torch.int64, device=device)
    if keys.numel() and m:
        given = parameters("windows", device)
        steps = plan(windows_v2)
        edges, words = (torch.from_numpy(x).to(device) for x in (steps.edge_e, steps.word_e))
        ends = torch.from_numpy(np.searchsorted(steps.edge_e, windows_v2)).to(device)
        query, database = (_cut(x, steps, edges, words) for x in (query_nw, database_mw))
        wide = SCRATCH_BYTES // (4 * (len(edges) + v) * min(n, _QUERIES))
        for part in pieces(0, n, 1, _QUERIES):
            slots = slice(part.start * v, part.stop * v)
            for tile in pieces(0, m, 1, max(given["rows"], wide // given["rows"] * given["rows"])):
                queries, members = part.stop - part.start, tile.stop - tile.start
                total = torch.empty((len(edges), queries, members), dtype=torch.int32, device=device)
                grid = (triton.cdiv(queries, given["queries"]), triton.cdiv(members, given["rows"]))
                how = {"num_warps": given["warps"], "num_stages": given["stages"]}
                totals_kernel[grid](
                    query[:, part].contiguous(), database[:, tile].contiguous(), words, total, queries, members, len(edges),
                    QUERIES=given["queries"], ROWS=given["rows"], **how,
                )  # fmt: skip
                groups = exclusion(exclude, part, tile, device)
                shift = part.start - tile.start if exclude_self else NOT_SELF
                columns = triton.cdiv(members, given["group"])
                minima = torch.empty((queries * v, columns), dtype=torch.int32, device=device)
                limited = {"GROUPS": exclude is not None, "GROUP": given["group"]}
                minima_kernel[(queries * v, triton.cdiv(columns, 32))](
                    total,
                    ends,
                    *groups,
                    queries,
                    members,
                    shift,
                    minima,
                    columns,
                    v,
                    COLUMNS=32,
                    **limited,
                    num_warps=4,
                )
                chosen = smallest_groups(minima, min(k, columns))
                found = torch.empty((len(minima), chosen.shape[1] * given["group"]), dtype=torch.int64, device=device)
                members_kernel[chosen.shape](
                    total, ends, *groups, queries, members, shift, chosen, found, chosen.shape[1], v, tile.start,
                    **limited, num_warps=1,
                )  # fmt: skip
                keys[slots], _ = merged([(keys[slots], keys[slots, :0]), (found, found[:, :0])], device, k)
    distance, index = split_keys(keys)
    return distance.reshape(n, v, k), index.reshape(n, v, k)


def _cut(bits_nw: torch.Tensor, steps: Plan, edges: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """int32 words (V, rows): every segment moved to the beginning of a 64-bit word, as two halves."""
    out = torch.empty((2 * int(steps.word_e[-1]), len(bits_nw)), dtype=torch.int32, device=bits_nw.device)
    if out.numel():
        halves = bits_nw.reshape(-1).view(torch.int32).reshape(len(bits_nw), -1)
        segment = np.repeat(np.arange(len(steps.edge_e)), np.diff(steps.word_e))
        first = torch.from_numpy(segment).to(bits_nw.device)
        cut_kernel[(out.shape[0], triton.cdiv(out.shape[1], 128))](
            halves, edges, words, first, out, halves.shape[1], len(bits_nw), BLOCK=128
        )
    return out


@triton.jit
def cut_kernel(bits_ptr, edge_ptr, word_ptr, segment_ptr, out_ptr, words, rows, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One half word of all rows: 32 bits from its first site, no further than the next edge."""
    half = tl.program_id(0)
    n = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    segment = tl.load(segment_ptr + half // 2)
    site = tl.load(edge_ptr + segment) + 32 * (half - 2 * tl.load(word_ptr + segment))
    left = tl.load(edge_ptr + segment + 1) - site
    at, by = site // 32, (site % 32).to(tl.int32)
    low = tl.load(bits_ptr + n * words + at, mask=(n < rows) & (at < words) & (left > 0), other=0)
    high = tl.load(bits_ptr + n * words + at + 1, mask=(n < rows) & (at + 1 < words) & (left > 0), other=0)
    low, high = low.to(tl.uint32, bitcast=True), high.to(tl.uint32, bitcast=True)
    value = (low >> by) | tl.where(by > 0, high << ((32 - by) % 32), 0)
    kept = tl.minimum(tl.maximum(left, 0), 32).to(tl.int32)
    ones = tl.where(kept < 32, (tl.full((BLOCK,), 1, tl.uint32) << (kept % 32)) - 1, 0xFFFFFFFF)
    tl.store(out_ptr + tl.cast(half, tl.int64) * rows + n, (value & ones).to(tl.int32, bitcast=True), mask=n < rows)


@triton.jit
def totals_kernel(  # type: ignore[no-untyped-def]
    query_ptr, database_ptr, word_ptr, total_ptr, queries, members, edges, QUERIES: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """total int32 (edges, queries, members): differing bits of all segments before each edge."""
    n = (tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)).to(tl.int64)
    m = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = (n < queries)[:, None] & (m < members)[None, :]
    total = tl.zeros((QUERIES, ROWS), dtype=tl.int32)
    for edge in range(0, edges):
        at = tl.cast(edge, tl.int64) * queries * members
        tl.store(total_ptr + at + n[:, None] * members + m[None, :], total, mask=inside)
        for word in range(2 * tl.load(word_ptr + edge), 2 * tl.load(word_ptr + edge + 1)):
            a = tl.load(query_ptr + tl.cast(word, tl.int64) * queries + n, mask=n < queries, other=0)
            b = tl.load(database_ptr + tl.cast(word, tl.int64) * members + m, mask=m < members, other=0)
            total += popcount(a[:, None] ^ b[None, :])


@triton.jit
def window_distance(total_ptr, ends_ptr, n, v, m, inside, queries, members):  # type: ignore[no-untyped-def]
    """int32: the total at the window's last edge less that at its first."""
    row, edge = n * members + m, tl.cast(queries, tl.int64) * members
    start, stop = tl.load(ends_ptr + 2 * v), tl.load(ends_ptr + 2 * v + 1)
    before = tl.load(total_ptr + start * edge + row, mask=inside, other=0)
    return tl.load(total_ptr + stop * edge + row, mask=inside, other=0) - before


@triton.jit
def minima_kernel(  # type: ignore[no-untyped-def]
    total_ptr, ends_ptr, query_group_ptr, database_group_ptr, queries, members, shift, minima_ptr, columns, windows,
    COLUMNS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """minima int32 (queries * windows, columns): the smallest distance of each group of columns, FAR where none is
    allowed.
    """
    line = tl.program_id(0).to(tl.int64)
    n, v = line // windows, line % windows
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m = (column[:, None] * GROUP + tl.arange(0, GROUP)[None, :]).to(tl.int64)
    distance = window_distance(total_ptr, ends_ptr, n, v, m, m < members, queries, members)
    allowed = (m < members) & (n + shift != m)
    if GROUPS:
        group = tl.load(database_group_ptr + m, mask=m < members, other=0)
        allowed = allowed & (group != tl.load(query_group_ptr + n))
    small = tl.min(tl.where(allowed, distance, FAR), axis=1)
    tl.store(minima_ptr + line * columns + column, small, mask=column < columns)


@triton.jit
def members_kernel(  # type: ignore[no-untyped-def]
    total_ptr, ends_ptr, query_group_ptr, database_group_ptr, queries, members, shift, chosen_ptr, keys_ptr, slots, windows,
    first, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Keys of all members of one chosen group of one query and window; row 0 of the tile is row `first` of the
    database.
    """
    line, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, v = line // windows, line % windows
    m = tl.load(chosen_ptr + line * slots + slot).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    distance = window_distance(total_ptr, ends_ptr, n, v, m, m < members, queries, members)
    allowed = (m < members) & (n + shift != m)
    if GROUPS:
        group = tl.load(database_group_ptr + m, mask=m < members, other=0)
        allowed = allowed & (group != tl.load(query_group_ptr + n))
    key = tl.where(allowed, (distance.to(tl.int64) << 32) | (m + first), 0x7FFFFFFFFFFFFFFF)
    tl.store(keys_ptr + (line * slots + slot) * GROUP + tl.arange(0, GROUP), key)
