"""Nearest rows of bits on the GPU: Hamming distance, and IBS distance of unphased genotypes.

Bits are spread to int8 on the fly and the tensor cores count the common ones; distance = ones + ones - 2 common.
(`method` = "popcount" counts differing bits instead.) A first kernel keeps of every tile the nearest row of each group
of some columns, a second counts again the few groups that can hold one of the k nearest. So the large kernel keeps no
lists, and no matrix is in memory.

IBS where some are missing: with x, y the dosages and x1, x2 their two bits, all 0 where not observed, and a, b 1 where
observed, sum |x - y| over the sites observed in both = x.b + a.y - 2 (x1.y1 + x2.y2), because min(x, y) = x1 y1 + x2
y2; sites = a.b.

Range: one pass counts per row and tile, a second writes where the counts say; so rows come in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from engine.kernels.bits.triton_tiles import count_ones, popcount, spread
from engine.kernels.nearest.rows import ibs_limit
from engine.kernels.nearest.triton_shared import (
    FAR,
    FILLED,
    LAST,
    LAST_KEY,
    NOT_SELF,
    SCRATCH_BYTES,
    TILE_BYTES,
    Devices,
    Exclude,
    allowed_pairs,
    bits_on,
    exclusion,
    home,
    merged,
    merged_pairs,
    over,
    parameters,
    pieces,
    smallest_groups,
    split_keys,
    tile_of,
)

Method = Literal["tensor", "popcount"]
Planes = tuple[Any, Any, Any]
TENSOR, POPCOUNT, OBSERVED = (tl.constexpr(mode) for mode in range(3))
_MODES = {"tensor": 0, "popcount": 1, "observed": 2}
_KERNELS = ("bits", "popcount", "observed")  # names of launch parameters, by mode


class _Set(NamedTuple):
    """Rows that are compared: how many, bytes of each, and how a part of them comes to a device: words and ones of each
    row.

    int32 words: (rows, V); for OBSERVED (3, rows, V), both bits of a dosage and observed, all 0 where it is not.
    """

    length: int
    row_bytes: int
    read: Callable[[slice, torch.device], tuple[torch.Tensor, torch.Tensor]]


def hamming_cross(query_nw: torch.Tensor, database_mw: torch.Tensor) -> torch.Tensor:
    """int32 (N, M): number of differing bits."""
    return _cross(_bits(query_nw), _bits(database_mw), query_nw.device, 0)[0]


def hamming_topk(
    query_nw: Any,
    database_mw: Any,
    k: int,
    exclude_self: bool,
    exclude: Exclude,
    devices: Devices = None,
    method: Method = "tensor",
) -> tuple[Any, Any]:
    """Distance int32 (N, k) and index int64 (N, k)."""
    keys, _ = _topk(query_nw, _bits(query_nw), _bits(database_mw), k, exclude_self, exclude, devices, _MODES[method])
    distance, index = home(query_nw, *split_keys(keys))
    return distance, index


def hamming_range(
    query_nw: Any,
    database_mw: Any,
    radius: int,
    exclude_self: bool,
    exclude: Exclude,
    devices: Devices = None,
    method: Method = "tensor",
) -> tuple[Any, Any, Any]:
    """Offsets int64 (N + 1,), index int64 (R,), distance int32 (R,)."""
    found = _range(
        query_nw, _bits(query_nw), _bits(database_mw), radius, exclude_self, exclude, devices, _MODES[method]
    )
    offsets, index, distance, _ = home(query_nw, *found)
    return offsets, index, distance


def ibs_cross(query: Planes, database: Planes, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance and sites, int32 (N, M)."""
    query_set, database_set, mode = _genotypes(query, database, length)
    distance, sites = _cross(query_set, database_set, query[0].device, mode)
    return distance, sites if mode == _MODES["observed"] else torch.full_like(distance, length)


def ibs_topk(
    query: Planes, database: Planes, length: int, k: int, exclude_self: bool, exclude: Exclude, devices: Devices = None
) -> tuple[Any, Any, Any]:
    """Distance and sites int32 (N, k), index int64 (N, k)."""
    query_set, database_set, mode = _genotypes(query, database, length)
    keys, both = _topk(query[0], query_set, database_set, k, exclude_self, exclude, devices, mode)
    distance, index = split_keys(keys)
    sites = torch.full_like(distance, length)
    if mode == _MODES["observed"]:
        distance, sites = (both >> 32).to(torch.int32), (both & 0xFFFFFFFF).to(torch.int32)
    distance, sites, index = home(query[0], *(x.masked_fill(index < 0, -1) for x in (distance, sites)), index)
    return distance, sites, index


def ibs_range(
    query: Planes,
    database: Planes,
    length: int,
    radius: float,
    exclude_self: bool,
    exclude: Exclude,
    devices: Devices = None,
) -> tuple[Any, Any, Any, Any]:
    """Offsets int64 (N + 1,), index int64 (R,), distance and sites int32 (R,)."""
    query_set, database_set, mode = _genotypes(query, database, length)
    limit = ibs_limit(radius, length, mode == _MODES["observed"])
    found = _range(query[0], query_set, database_set, limit, exclude_self, exclude, devices, mode)
    offsets, index, distance, sites = home(query[0], *found)
    return offsets, index, distance, sites if mode == _MODES["observed"] else sites + length


def _bits(bits_nw: Any) -> _Set:
    def read(part: slice, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        words = bits_on(bits_nw, part, device)
        return words, count_ones(words)

    return _Set(bits_nw.shape[0], 8 * bits_nw.shape[1], read)


def _genotypes(query: Planes, database: Planes, length: int) -> tuple[_Set, _Set, int]:
    """Both sides and the mode: three planes where either side may be missing, else the two bits side by side."""
    observed = query[2] is not None or database[2] is not None
    inside = np.full(-(-length // 64), np.uint64(2**64 - 1))
    if length % 64:
        inside[-1] >>= np.uint64(64 - length % 64)

    def of(planes: Planes) -> _Set:
        def read(part: slice, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
            mask = bits_on(inside[None], slice(0, 1), device)
            one, two = (bits_on(plane, part, device) & mask for plane in planes[:2])
            if not observed:
                words = torch.cat([one, two], dim=1)
                return words, count_ones(words)
            seen = mask.expand_as(one) if planes[2] is None else bits_on(planes[2], part, device) & mask
            return torch.stack([one & seen, two & seen, seen]), torch.empty(1, dtype=torch.int32, device=device)

        return _Set(planes[0].shape[0], 24 * planes[0].shape[1], read)

    return of(query), of(database), _MODES["observed" if observed else "tensor"]


def _cross(query: _Set, database: _Set, device: torch.device, mode: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = query.length, database.length
    out = torch.empty(shape, dtype=torch.int32, device=device)
    sites = torch.empty(shape if mode == _MODES["observed"] else (1, 1), dtype=torch.int32, device=device)
    if out.numel():
        given = parameters(_KERNELS[mode], device)
        words = _sides(query.read(slice(0, shape[0]), device), database.read(slice(0, shape[1]), device), mode)
        cross_kernel[_grid(*shape, given)](*words, out, sites, *shape, words[0].shape[-1], **_launch(mode, given))
    return out, sites


def _topk(
    home_of: Any,
    query: _Set,
    database: _Set,
    k: int,
    exclude_self: bool,
    exclude: Exclude,
    devices: Devices,
    mode: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys int64 (N, k) and, for OBSERVED, distance << 32 | sites."""

    def search(device: torch.device, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        given = parameters(_KERNELS[mode], device)
        keys = torch.full((query.length, k), LAST_KEY, dtype=torch.int64, device=device)
        both = torch.zeros((query.length, k if mode == _MODES["observed"] else 0), dtype=torch.int64, device=device)
        minimum_bytes = -(-min(database.length, TILE_BYTES // max(1, database.row_bytes)) // given["group"]) * 12
        most_bytes = max(query.row_bytes, minimum_bytes, 16 * k * given["group"])
        for part in pieces(0, query.length, most_bytes, SCRATCH_BYTES):
            held = query.read(part, device)
            for tile in pieces(rows.start, rows.stop, database.row_bytes, TILE_BYTES):
                shift = part.start - tile.start if exclude_self else NOT_SELF
                groups = exclusion(exclude, part, tile, device)
                other = database.read(tile, device)
                shape = part.stop - part.start, tile.stop - tile.start
                pairs = (*_sides(held, other, mode), *groups, *shape, held[0].shape[-1], shift)
                columns = triton.cdiv(shape[1], given["rows"]) * (given["rows"] // given["group"])
                minima = torch.empty((shape[0], columns), dtype=torch.int32, device=device)
                limited = {"GROUPS": exclude is not None}
                minima_kernel[_grid(*shape, given)](
                    *pairs, minima, **limited, GROUP=given["group"], **_launch(mode, given)
                )
                chosen = smallest_groups(minima, min(k, columns))
                more = [
                    torch.empty((shape[0], chosen.shape[1] * given["group"]), dtype=torch.int64, device=device)
                    for _ in range(2)
                ]
                # The counts that differ are those of words as they lie: not transposed as POPCOUNT has them.
                plain = (
                    (held[0], other[0], *pairs[4:]) if mode == _MODES["popcount"] else (pairs[0], pairs[2], *pairs[4:])
                )
                members_kernel[chosen.shape](
                    *plain, chosen, *more, chosen.shape[1], **limited, GROUP=given["group"], BLOCK=64,
                    OBSERVED_MODE=mode == _MODES["observed"], num_warps=4,
                )  # fmt: skip
                more[0] += torch.where(more[0] < LAST_KEY, tile.start, 0)
                beside = more[1] if mode == _MODES["observed"] else more[1][:, :0]
                keys[part], both[part] = merged([(keys[part], both[part]), (more[0], beside)], device, k)
        return keys, both

    found, device = over(devices, home_of, database.length, search)
    return merged(found, device, k) if len(found) > 1 else found[0]


def _range(
    home_of: Any,
    query: _Set,
    database: _Set,
    limit: int,
    exclude_self: bool,
    exclude: Exclude,
    devices: Devices,
    mode: int,
) -> tuple[torch.Tensor, ...]:
    """Offsets, index, distance, sites (0 unless OBSERVED) of the pairs of rank up to `limit`."""

    def search(device: torch.device, rows: slice) -> list[tuple[torch.Tensor, ...]]:
        given = parameters(_KERNELS[mode], device)
        whole = torch.empty(0, dtype=torch.int64, device=device)
        found: list[tuple[torch.Tensor, ...]] = [(whole, whole, whole.to(torch.int32), whole.to(torch.int32))]
        count_bytes = -(-min(database.length, TILE_BYTES // max(1, database.row_bytes)) // given["rows"]) * 12
        for part in pieces(0, query.length, max(query.row_bytes, count_bytes), SCRATCH_BYTES):
            held = query.read(part, device)
            for tile in pieces(rows.start, rows.stop, database.row_bytes, TILE_BYTES):
                shift = part.start - tile.start if exclude_self else NOT_SELF
                shape = part.stop - part.start, tile.stop - tile.start
                pairs = (
                    *_sides(held, database.read(tile, device), mode), *exclusion(exclude, part, tile, device), *shape,
                    held[0].shape[-1], shift, limit,
                )  # fmt: skip
                counts = torch.empty((shape[0], triton.cdiv(shape[1], given["rows"])), dtype=torch.int64, device=device)
                how: dict[str, Any] = {"GROUPS": exclude is not None} | _launch(mode, given)
                count_kernel[_grid(*shape, given)](*pairs, counts, **how)
                ends = counts.flatten().cumsum(0)
                total = int(ends[-1])
                index = torch.empty(total, dtype=torch.int64, device=device)
                distance, sites = (torch.zeros(total, dtype=torch.int32, device=device) for _ in range(2))
                if total:
                    starts, few = ends - counts.flatten(), given | {"queries": min(FILLED, given["queries"])}
                    how["QUERIES"] = few["queries"]
                    fill_kernel[_grid(*shape, few)](*pairs, counts, starts, index, distance, sites, **how)
                row = torch.arange(part.start, part.stop, device=device).repeat_interleave(counts.sum(dim=1))
                found.append((row, index + tile.start, distance, sites))
        return found

    found, device = over(devices, home_of, database.length, search)
    return merged_pairs([piece for pieces_found in found for piece in pieces_found], device, query.length)


def _sides(
    query: tuple[torch.Tensor, torch.Tensor], database: tuple[torch.Tensor, torch.Tensor], mode: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words and ones of both sides as the tile of this mode reads them: POPCOUNT word by word."""
    if mode != _MODES["popcount"]:
        return *query, *database
    return query[0].T.contiguous(), query[1], database[0].T.contiguous(), database[1]


def _grid(queries: int, members: int, given: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(queries, given["queries"]) * triton.cdiv(members, given["rows"]),)


def _launch(mode: int, given: dict[str, int]) -> dict[str, int]:
    return {
        "MODE": mode, "QUERIES": given["queries"], "ROWS": given["rows"], "STEP": given["step"],
        "num_warps": given["warps"], "num_stages": given["stages"],
    }  # fmt: skip


@triton.jit
def ranks_tile(  # type: ignore[no-untyped-def]
    query_ptr, query_ones_ptr, database_ptr, database_ones_ptr, n, m, queries, members, words,
    MODE: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """int32 (Q, R) each: distance, sites, and the rank by which pairs are ordered (`numba_hamming._ranks`)."""
    distance = tl.zeros((QUERIES, ROWS), dtype=tl.int32)
    sites = tl.zeros((QUERIES, ROWS), dtype=tl.int32)
    if MODE == POPCOUNT:  # words are (V, rows)
        for word in range(0, words):
            a = tl.load(query_ptr + tl.cast(word, tl.int64) * queries + n, mask=n < queries, other=0)
            b = tl.load(database_ptr + tl.cast(word, tl.int64) * members + m, mask=m < members, other=0)
            distance += popcount(a[:, None] ^ b[None, :])
        rank = distance
    elif MODE == TENSOR:
        for at in range(0, words, STEP):
            a = spread(query_ptr, n, n < queries, words, at, QUERIES, STEP)
            b = spread(database_ptr, m, m < members, words, at, ROWS, STEP)
            distance = tl.dot(a, tl.trans(b), acc=distance, out_dtype=tl.int32)
        query_ones = tl.load(query_ones_ptr + n, mask=n < queries, other=0)
        database_ones = tl.load(database_ones_ptr + m, mask=m < members, other=0)
        distance = query_ones[:, None] + database_ones[None, :] - 2 * distance
        rank = distance
    else:
        query_plane, plane = tl.cast(queries, tl.int64) * words, tl.cast(members, tl.int64) * words
        for at in range(0, words, STEP):
            a1 = spread(query_ptr, n, n < queries, words, at, QUERIES, STEP)
            a2 = spread(query_ptr + query_plane, n, n < queries, words, at, QUERIES, STEP)
            a = spread(query_ptr + 2 * query_plane, n, n < queries, words, at, QUERIES, STEP)
            b1 = spread(database_ptr, m, m < members, words, at, ROWS, STEP)
            b2 = spread(database_ptr + plane, m, m < members, words, at, ROWS, STEP)
            b = tl.trans(spread(database_ptr + 2 * plane, m, m < members, words, at, ROWS, STEP))
            distance = tl.dot((a1 + a2).to(tl.int8), b, acc=distance, out_dtype=tl.int32)
            distance = tl.dot(a, tl.trans((b1 + b2).to(tl.int8)), acc=distance, out_dtype=tl.int32)
            distance = tl.dot((-2 * a1).to(tl.int8), tl.trans(b1), acc=distance, out_dtype=tl.int32)
            distance = tl.dot((-2 * a2).to(tl.int8), tl.trans(b2), acc=distance, out_dtype=tl.int32)
            sites = tl.dot(a, b, acc=sites, out_dtype=tl.int32)
        rank = observed_rank(distance, sites)
    return distance, sites, rank


@triton.jit
def observed_rank(distance, sites):  # type: ignore[no-untyped-def]
    """Bits of float32(distance / (2 sites)), divided in float64; FAR where no site is shared."""
    share = distance.to(tl.float64) / (2 * tl.maximum(sites, 1)).to(tl.float64)
    return tl.where(sites > 0, share.to(tl.float32).to(tl.int32, bitcast=True), FAR)


@triton.jit
def cross_kernel(  # type: ignore[no-untyped-def]
    query_ptr, query_ones_ptr, database_ptr, database_ones_ptr, out_ptr, sites_ptr, queries, members, words,
    MODE: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    i, j = tile_of(queries, members, QUERIES, ROWS, 8)
    n, m = (i * QUERIES + tl.arange(0, QUERIES)).to(tl.int64), (j * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    distance, sites, _ = ranks_tile(
        query_ptr, query_ones_ptr, database_ptr, database_ones_ptr, n, m, queries, members, words,
        MODE, QUERIES, ROWS, STEP,
    )  # fmt: skip
    at, inside = n[:, None] * members + m[None, :], (n < queries)[:, None] & (m < members)[None, :]
    tl.store(out_ptr + at, distance, mask=inside)
    if MODE == OBSERVED:
        tl.store(sites_ptr + at, sites, mask=inside)


@triton.jit
def minima_kernel(  # type: ignore[no-untyped-def]
    query_ptr, query_ones_ptr, database_ptr, database_ones_ptr, query_group_ptr, database_group_ptr,
    queries, members, words, shift, minima_ptr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    MODE: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """minima int32 (queries, row tiles * ROWS / GROUP): the smallest rank in each group of columns, FAR where none is
    allowed.
    """
    i, j = tile_of(queries, members, QUERIES, ROWS, 8)
    n, m = (i * QUERIES + tl.arange(0, QUERIES)).to(tl.int64), (j * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    _, _, rank = ranks_tile(
        query_ptr, query_ones_ptr, database_ptr, database_ones_ptr, n, m, queries, members, words,
        MODE, QUERIES, ROWS, STEP,
    )  # fmt: skip
    allowed = allowed_pairs(n, m, query_group_ptr, database_group_ptr, queries, members, shift, GROUPS)
    rank = tl.where(allowed, rank, FAR)
    small = tl.min(rank.reshape(QUERIES, ROWS // GROUP, GROUP), axis=2)
    column = j * (ROWS // GROUP) + tl.arange(0, ROWS // GROUP)
    columns = tl.cdiv(members, ROWS) * (ROWS // GROUP)
    tl.store(minima_ptr + n[:, None] * columns + column[None, :], small, mask=(n < queries)[:, None])


@triton.jit
def members_kernel(  # type: ignore[no-untyped-def]
    query_ptr, database_ptr, query_group_ptr, database_group_ptr, queries, members, words, shift,
    chosen_ptr, keys_ptr, both_ptr, slots, GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    OBSERVED_MODE: tl.constexpr,
):  # fmt: skip
    """Keys of all members of one chosen group of one query, and distance << 32 | sites where OBSERVED_MODE."""
    n, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    m = tl.load(chosen_ptr + n * slots + slot).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    inside = (m < members)[:, None]
    query_plane, plane = tl.cast(queries, tl.int64) * words, tl.cast(members, tl.int64) * words
    distance, sites = tl.zeros((GROUP,), dtype=tl.int32), tl.zeros((GROUP,), dtype=tl.int32)
    for at in range(0, words, BLOCK):
        word = at + tl.arange(0, BLOCK)
        mine, theirs = n * words + word, m[:, None] * words + word[None, :]
        given = inside & (word < words)[None, :]
        a, b = (
            tl.load(query_ptr + mine, mask=word < words, other=0),
            tl.load(database_ptr + theirs, mask=given, other=0),
        )
        if OBSERVED_MODE:
            a2 = tl.load(query_ptr + query_plane + mine, mask=word < words, other=0)
            b2 = tl.load(database_ptr + plane + theirs, mask=given, other=0)
            seen = tl.load(query_ptr + 2 * query_plane + mine, mask=word < words, other=0)[None, :]
            seen = seen & tl.load(database_ptr + 2 * plane + theirs, mask=given, other=0)
            differ = popcount((a[None, :] ^ b) & seen) + popcount((a2[None, :] ^ b2) & seen)
            sites += tl.sum(popcount(seen), axis=1)
        else:
            differ = popcount(a[None, :] ^ b)
        distance += tl.sum(differ, axis=1)
    rank = distance
    if OBSERVED_MODE:
        rank = observed_rank(distance, sites)
    allowed = (m < members) & (n + shift != m) & (rank < FAR)
    if GROUPS:
        group = tl.load(database_group_ptr + m, mask=m < members, other=0)
        allowed = allowed & (group != tl.load(query_group_ptr + n))
    at = (n * slots + slot) * GROUP + tl.arange(0, GROUP)
    tl.store(keys_ptr + at, tl.where(allowed, (rank.to(tl.int64) << 32) | m, LAST))
    tl.store(both_ptr + at, (distance.to(tl.int64) << 32) | sites)


@triton.jit
def count_kernel(  # type: ignore[no-untyped-def]
    query_ptr, query_ones_ptr, database_ptr, database_ones_ptr, query_group_ptr, database_group_ptr,
    queries, members, words, shift, limit, counts_ptr, GROUPS: tl.constexpr,
    MODE: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """counts int64 (queries, row tiles): allowed pairs of rank up to `limit`."""
    i, j = tile_of(queries, members, QUERIES, ROWS, 8)
    n, m = (i * QUERIES + tl.arange(0, QUERIES)).to(tl.int64), (j * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    _, _, rank = ranks_tile(
        query_ptr, query_ones_ptr, database_ptr, database_ones_ptr, n, m, queries, members, words,
        MODE, QUERIES, ROWS, STEP,
    )  # fmt: skip
    allowed = allowed_pairs(n, m, query_group_ptr, database_group_ptr, queries, members, shift, GROUPS)
    near = (allowed & (rank <= limit)).to(tl.int32)
    tl.store(counts_ptr + n * tl.cdiv(members, ROWS) + j, tl.sum(near, axis=1).to(tl.int64), mask=n < queries)


@triton.jit
def fill_kernel(  # type: ignore[no-untyped-def]
    query_ptr, query_ones_ptr, database_ptr, database_ones_ptr, query_group_ptr, database_group_ptr,
    queries, members, words, shift, limit, counts_ptr, starts_ptr, index_ptr, distance_ptr, sites_ptr,
    GROUPS: tl.constexpr, MODE: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Writes the pairs that `count_kernel` counted, each tile where its `starts` says; a tile without any is not
    computed again.
    """
    i, j = tile_of(queries, members, QUERIES, ROWS, 8)
    n, m = (i * QUERIES + tl.arange(0, QUERIES)).to(tl.int64), (j * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    tile = n * tl.cdiv(members, ROWS) + j
    if tl.max(tl.load(counts_ptr + tile, mask=n < queries, other=0), axis=0) > 0:
        distance, sites, rank = ranks_tile(
            query_ptr, query_ones_ptr, database_ptr, database_ones_ptr, n, m, queries, members, words,
            MODE, QUERIES, ROWS, STEP,
        )  # fmt: skip
        allowed = allowed_pairs(n, m, query_group_ptr, database_group_ptr, queries, members, shift, GROUPS)
        near = allowed & (rank <= limit)
        start = tl.load(starts_ptr + tile, mask=n < queries, other=0)
        at = start[:, None] + tl.cumsum(near.to(tl.int32), axis=1) - 1
        tl.store(index_ptr + at, tl.zeros((QUERIES, ROWS), dtype=tl.int64) + m[None, :], mask=near)
        tl.store(distance_ptr + at, distance, mask=near)
        if MODE == OBSERVED:
            tl.store(sites_ptr + at, sites, mask=near)
