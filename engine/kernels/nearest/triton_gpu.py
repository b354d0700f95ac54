"""Nearest neighbours on the GPU. A program keeps the best of its queries in registers while the database streams past it.

Hamming: bits are spread to int8 on the fly, the tensor cores count the common ones, distance = ones + ones - 2 common.
A candidate is one int64 key, distance above index, so that keys are distinct and the smallest key is the nearest row at the
smallest index; several programs share a query, and their lists are merged by sorting.

Squared distance: a float32 product (no TF32) gives the nearest few more than k by approximate distance, which are then
computed as defined. A query whose k-th exact distance is not proven smaller than anything left out is
searched again exhaustively.

Longest run: one lane per database row walks the sites.

Tensors of bits are int64. Runs in Triton's interpreter on CPU tensors when TRITON_INTERPRET=1 was set before import.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

from engine.errors import Unsupported
from engine.kernels.bits.triton_tiles import count_ones, spread

Exclude = tuple[torch.Tensor, torch.Tensor] | None

INTERPRETED: bool = bool(knobs.runtime.interpret)
_QUERIES, _ROWS = (16, 32) if INTERPRETED else (32, 128)  # a tile of the top-k kernels
_LANES = 32 if INTERPRETED else 128
_MOST = 256  # a longer list no longer fits the registers of one program
_EMPTY = 0x7F800001 << 32  # keys from here on are free slots: above an infinite float32, above any Hamming distance
_LAST = 2**63 - 1
EMPTY, LAST = tl.constexpr(_EMPTY), tl.constexpr(_LAST)
_UNIT = 2.0**-24


def hamming_cross(query_nw: torch.Tensor, database_mw: torch.Tensor) -> torch.Tensor:
    """int32 (N, M): number of differing bits."""
    out = torch.empty((len(query_nw), len(database_mw)), dtype=torch.int32, device=query_nw.device)
    if out.numel():
        query, query_ones = _words(query_nw)
        database, database_ones = _words(database_mw)
        side = 32 if INTERPRETED else 128
        cross_kernel[(triton.cdiv(out.shape[0], side), triton.cdiv(out.shape[1], side))](
            query, query_ones, database, database_ones, out, *out.shape, query.shape[1], BLOCK=side, STEP=4, num_warps=8
        )
    return out


def hamming_topk(
    query_nw: torch.Tensor, database_mw: torch.Tensor, k: int, exclude_self: bool, exclude: Exclude
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance int32 (N, k) and index int64 (N, k)."""
    query, query_ones = _words(query_nw)
    database, database_ones = _words(database_mw)
    keys, slots = _keys(len(query), len(database), k, query.device)
    if keys.numel() and len(database):
        groups = _groups(exclude, query.device)
        hamming_kernel[(triton.cdiv(len(query), _QUERIES), keys.shape[1])](
            query, query_ones, database, database_ones, *groups, keys, len(query), len(database), query.shape[1],
            SELF=exclude_self, GROUPS=exclude is not None, QUERIES=_QUERIES, ROWS=_ROWS, STEP=4, SLOTS=slots, num_warps=4,
        )  # fmt: skip
    distance, index = _nearest(keys.flatten(1), k)
    return distance.to(torch.int32), index


def l2_topk(
    query_nd: torch.Tensor, database_md: torch.Tensor, k: int, exclude_self: bool, exclude: Exclude
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distance float32 (N, k) and index int64 (N, k). The error bound is derived in numba_cpu.l2_topk."""
    n, axes = query_nd.shape
    keys, slots = _keys(n, len(database_md), k + 8, query_nd.device, most=_MOST + 8)
    groups = _groups(exclude, query_nd.device)
    if not keys.numel() or not len(database_md):
        distance, index = _nearest(keys.flatten(1), k)
        return distance.to(torch.float32), index
    mean_d = database_md.mean(dim=0, dtype=torch.float64)
    largest = 2 * max(float(x.abs().max()) if x.numel() else 0.0 for x in (query_nd, database_md, mean_d))
    scale = 2.0 ** -float(torch.tensor(largest, dtype=torch.float64).log2().ceil()) if largest > 0 else 1.0
    query, query_norm = _centred(query_nd, mean_d, scale)
    database, database_norm = _centred(database_md, mean_d, scale)
    l2_kernel[(triton.cdiv(n, _QUERIES), keys.shape[1])](
        query, query_norm, database, database_norm, *groups, keys, n, len(database_md), axes,
        SELF=exclude_self, GROUPS=exclude is not None, QUERIES=_QUERIES, ROWS=_ROWS, STEP=32, SLOTS=slots, num_warps=4,
    )  # fmt: skip
    keys = keys.flatten(1).sort(dim=1).values[:, :slots]
    candidates = torch.where(keys < _EMPTY, keys & 0xFFFFFFFF, -1)
    result = _exact(query_nd, database_md, candidates, torch.arange(n, device=query_nd.device)).sort(dim=1).values

    # What a full list of any program left out is, by its approximation, no nearer than the `slots`-th key overall.
    left_out = (keys[:, slots - 1] >> 32).to(torch.int32).view(torch.float32).to(torch.float64)
    left_out = torch.where((keys < _EMPTY).sum(dim=1) < slots, torch.inf, left_out)
    slack = (0.55 * axes + 16) * _UNIT
    margin = slack * (query_norm.double() + database_norm.double().max()) ** 2
    least = axes * 2.0**-140 + 2.0**-148 * scale * scale
    kth = (result[:, min(k, result.shape[1]) - 1] >> 32).to(torch.int32).view(torch.float32).double() * scale * scale
    proven = (left_out == torch.inf) | (left_out - margin > kth * (1 + 2.0**-20) + least)
    again = (~proven).nonzero().flatten()
    every = torch.arange(len(database_md), device=query_nd.device)
    for rows in again.split(max(1, 2**26 // len(database_md))) if len(again) else ():
        allowed = every.expand(len(rows), -1)
        if exclude_self:
            allowed = torch.where(allowed == rows[:, None], -1, allowed)
        if exclude is not None:
            allowed = torch.where(exclude[0][rows][:, None] == exclude[1][None], -1, allowed)
        exact = _exact(query_nd, database_md, allowed.contiguous(), rows)
        best = exact.topk(min(k, exact.shape[1]), dim=1, largest=False, sorted=True).values
        result[rows, : best.shape[1]] = best
    distance, index = _nearest(result[:, :k], k)
    return torch.where(index >= 0, distance.to(torch.int32).view(torch.float32), -1.0), index


def longest_run(
    query_nw: torch.Tensor,
    database_mw: torch.Tensor,
    length: int,
    position_bp: torch.Tensor,
    exclude_self: bool,
    exclude: Exclude,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """run_bp, run_sites, index, all int64 (N,)."""
    n, device = len(query_nw), query_nw.device
    blocks = triton.cdiv(len(database_mw), _LANES)
    run_bp = torch.full((n, blocks + 1), -1, dtype=torch.int64, device=device)  # the last column is "none"
    run_sites, index = torch.zeros_like(run_bp), torch.full_like(run_bp, _LAST)
    if n and blocks and length:
        run_kernel[(n, blocks)](
            _words(query_nw)[0], _words(database_mw)[0], position_bp, *_groups(exclude, device), run_bp, run_sites, index,
            len(database_mw), length, 2 * query_nw.shape[1], blocks + 1,
            SELF=exclude_self, GROUPS=exclude is not None, LANES=_LANES, num_warps=4,
        )  # fmt: skip
    longest = run_bp.max(dim=1, keepdim=True).values
    holder = torch.where(run_bp == longest, index, _LAST).min(dim=1, keepdim=True)
    sites = run_sites.gather(1, holder.indices)
    none = longest < 0
    return longest[:, 0], sites.masked_fill(none, 0)[:, 0], holder.values.masked_fill(none, -1)[:, 0]


def _words(bits_nw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 words (N, 2 W) and the number of ones of each row, int32."""
    words = bits_nw.reshape(-1).view(torch.int32).reshape(len(bits_nw), 2 * bits_nw.shape[1])
    return words, count_ones(words)


def _keys(n: int, m: int, k: int, device: torch.device, most: int = _MOST) -> tuple[torch.Tensor, int]:
    """Free key slots int64 (N, programs per query, slots), and the number of slots per program."""
    if k > most:
        raise Unsupported(f"k up to {_MOST}", "more", "triton in engine.kernels.nearest", "the numba implementation")
    slots = max(16, triton.next_power_of_2(k))
    queries, tiles = triton.cdiv(n, _QUERIES), triton.cdiv(m, _ROWS)
    programs = max(1, min(tiles, triton.cdiv(1024, max(1, queries))))
    return torch.full((n, programs, slots), _LAST, dtype=torch.int64, device=device), slots


def _nearest(keys: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k smallest keys of each row as (upper half, index), -1 for free slots."""
    keys = keys.sort(dim=1).values[:, :k]
    keys = torch.nn.functional.pad(keys, (0, k - keys.shape[1]), value=_LAST)
    free = keys >= _EMPTY
    return (keys >> 32).masked_fill(free, -1), (keys & 0xFFFFFFFF).masked_fill(free, -1)


def _groups(exclude: Exclude, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of both sides; one unread element where nothing is excluded."""
    return exclude if exclude is not None else (torch.zeros(1, dtype=torch.int64, device=device),) * 2


def _centred(rows_nd: torch.Tensor, mean_d: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows less the mean, scaled, as float32; and the norms of the rounded rows, summed in float64."""
    centred = torch.cat([((part.double() - mean_d) * scale).float() for part in rows_nd.split(65536)])
    return centred, torch.cat([part.double().square().sum(dim=1).sqrt().float() for part in centred.split(65536)])


def _exact(query: torch.Tensor, database: torch.Tensor, candidates: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Keys int64 of the distances, as defined, from query rows[i] to database rows candidates[i, :]; -1 gives a free slot."""
    keys = torch.empty(candidates.shape, dtype=torch.int64, device=query.device)
    exact_kernel[(len(candidates), triton.cdiv(candidates.shape[1], 64))](
        query, database, candidates, rows, keys, candidates.shape[1], query.shape[1], BLOCK=64, enable_fp_fusion=False
    )
    return keys


@triton.jit
def hamming_tile(  # type: ignore[no-untyped-def]
    query_ptr, query_ones_ptr, database_ptr, database_ones_ptr, n, m, queries, members, words,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """int32 distances of queries `n` to rows `m`."""
    common = tl.zeros((QUERIES, ROWS), dtype=tl.int32)
    for at in range(0, words, STEP):
        a = spread(query_ptr, n, n < queries, words, at, QUERIES, STEP)
        b = spread(database_ptr, m, m < members, words, at, ROWS, STEP)
        common = tl.dot(a, tl.trans(b), acc=common, out_dtype=tl.int32)
    query_ones = tl.load(query_ones_ptr + n, mask=n < queries, other=0)
    database_ones = tl.load(database_ones_ptr + m, mask=m < members, other=0)
    return query_ones[:, None] + database_ones[None, :] - 2 * common


@triton.jit
def cross_kernel(  # type: ignore[no-untyped-def]
    query_ptr, query_ones_ptr, database_ptr, database_ones_ptr, out_ptr, queries, members, words,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    m = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    distance = hamming_tile(
        query_ptr, query_ones_ptr, database_ptr, database_ones_ptr, n, m, queries, members, words, BLOCK, BLOCK, STEP
    )
    tl.store(
        out_ptr + n[:, None] * members + m[None, :], distance, mask=(n < queries)[:, None] & (m < members)[None, :]
    )


@triton.jit
def allowed_pairs(  # type: ignore[no-untyped-def]
    n, m, query_group_ptr, database_group_ptr, queries, members, SELF: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    allowed = (n < queries)[:, None] & (m < members)[None, :]
    if SELF:
        allowed = allowed & (n[:, None] != m[None, :])
    if GROUPS:
        query_group = tl.load(query_group_ptr + n, mask=n < queries, other=0)
        database_group = tl.load(database_group_ptr + m, mask=m < members, other=0)
        allowed = allowed & (query_group[:, None] != database_group[None, :])
    return allowed


@triton.jit
def keep(kept, keys):  # type: ignore[no-untyped-def]
    """The smallest of kept (Q, SLOTS) and keys (Q, ROWS), as many as there are slots, in no order. All keys are distinct."""
    best, worst = tl.min(keys, axis=1), tl.max(kept, axis=1)
    while tl.max((best < worst).to(tl.int32), axis=0) > 0:
        replaced = (kept == worst[:, None]) & (best < worst)[:, None]
        kept = tl.where(replaced, best[:, None], kept)
        keys = tl.where(keys == best[:, None], LAST, keys)
        best, worst = tl.min(keys, axis=1), tl.max(kept, axis=1)
    return kept


@triton.jit
def hamming_kernel(  # type: ignore[no-untyped-def]
    query_ptr, query_ones_ptr, database_ptr, database_ones_ptr, query_group_ptr, database_group_ptr, keys_ptr,
    queries, members, words, SELF: tl.constexpr, GROUPS: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    slot = tl.arange(0, SLOTS)
    kept = tl.zeros((QUERIES, SLOTS), dtype=tl.int64) + (slot.to(tl.int64) + EMPTY)[None, :]
    for first in range(part * ROWS, members, parts * ROWS):
        m = (first + tl.arange(0, ROWS)).to(tl.int64)
        distance = hamming_tile(
            query_ptr,
            query_ones_ptr,
            database_ptr,
            database_ones_ptr,
            n,
            m,
            queries,
            members,
            words,
            QUERIES,
            ROWS,
            STEP,
        )
        allowed = allowed_pairs(n, m, query_group_ptr, database_group_ptr, queries, members, SELF, GROUPS)
        kept = keep(kept, tl.where(allowed, (distance.to(tl.int64) << 32) | m[None, :], LAST))
    at = (n[:, None] * parts + part) * SLOTS + slot[None, :]
    tl.store(keys_ptr + at, kept, mask=(n < queries)[:, None])


@triton.jit
def l2_kernel(  # type: ignore[no-untyped-def]
    query_ptr, query_norm_ptr, database_ptr, database_norm_ptr, query_group_ptr, database_group_ptr, keys_ptr,
    queries, members, axes, SELF: tl.constexpr, GROUPS: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Keys of approximate distances, cut off at 0: the bits of a float32 >= 0 rise with its value."""
    n = (tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    query_norm = tl.load(query_norm_ptr + n, mask=n < queries, other=0.0)
    slot = tl.arange(0, SLOTS)
    kept = tl.zeros((QUERIES, SLOTS), dtype=tl.int64) + (slot.to(tl.int64) + EMPTY)[None, :]
    for first in range(part * ROWS, members, parts * ROWS):
        m = (first + tl.arange(0, ROWS)).to(tl.int64)
        product = tl.zeros((QUERIES, ROWS), dtype=tl.float32)
        for start in range(0, axes, STEP):
            axis = start + tl.arange(0, STEP)
            inside = (axis < axes)[None, :]
            a = tl.load(query_ptr + n[:, None] * axes + axis[None, :], mask=(n < queries)[:, None] & inside, other=0.0)
            b = tl.load(
                database_ptr + m[:, None] * axes + axis[None, :], mask=(m < members)[:, None] & inside, other=0.0
            )
            product = tl.dot(a, tl.trans(b), acc=product, input_precision="ieee")
        norm = tl.load(database_norm_ptr + m, mask=m < members, other=0.0)
        near = (query_norm * query_norm)[:, None] + (norm * norm)[None, :] - 2.0 * product
        bits = tl.maximum(near, 0.0).to(tl.int32, bitcast=True).to(tl.int64)
        allowed = allowed_pairs(n, m, query_group_ptr, database_group_ptr, queries, members, SELF, GROUPS)
        kept = keep(kept, tl.where(allowed, (bits << 32) | m[None, :], LAST))
    at = (n[:, None] * parts + part) * SLOTS + slot[None, :]
    tl.store(keys_ptr + at, kept, mask=(n < queries)[:, None])


@triton.jit
def exact_kernel(  # type: ignore[no-untyped-def]
    query_ptr, database_ptr, candidates_ptr, rows_ptr, keys_ptr, candidates, axes, BLOCK: tl.constexpr
):  # fmt: skip
    """Launched without fused multiply-add, so that every rounding is that of the definition."""
    line = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = tl.load(candidates_ptr + line * candidates + c, mask=c < candidates, other=-1)
    n = tl.load(rows_ptr + line)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for axis in range(0, axes):
        q = tl.load(query_ptr + n * axes + axis).to(tl.float64)
        step = q - tl.load(database_ptr + m * axes + axis, mask=m >= 0, other=0.0).to(tl.float64)
        total += step * step
    bits = total.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
    tl.store(keys_ptr + line * candidates + c, tl.where(m >= 0, (bits << 32) | m, LAST), mask=c < candidates)


@triton.jit
def run_kernel(  # type: ignore[no-untyped-def]
    query_ptr, database_ptr, position_ptr, query_group_ptr, database_group_ptr, bp_ptr, sites_ptr, index_ptr,
    members, length, words, columns, SELF: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One query against LANES database rows. A run that grows replaces its own shorter self even where bp stands still."""
    n = tl.program_id(0).to(tl.int64)
    m = (tl.program_id(1) * LANES + tl.arange(0, LANES)).to(tl.int64)
    allowed = m < members
    if SELF:
        allowed = allowed & (m != n)
    if GROUPS:
        allowed = allowed & (tl.load(database_group_ptr + m, mask=m < members, other=0) != tl.load(query_group_ptr + n))
    open_site = tl.full((LANES,), -1, dtype=tl.int32)  # first site of the run that is being walked, -1 between runs
    open_bp = tl.zeros((LANES,), dtype=tl.int64)
    best_bp = tl.full((LANES,), -1, dtype=tl.int64)
    best_site = tl.full((LANES,), -1, dtype=tl.int32)
    best_sites = tl.zeros((LANES,), dtype=tl.int32)
    for word in range(0, words):
        differ = tl.load(database_ptr + m * words + word, mask=m < members, other=0) ^ tl.load(
            query_ptr + n * words + word
        )
        for bit in range(0, tl.minimum(32, length - word * 32)):
            site = word * 32 + bit
            site_bp = tl.load(position_ptr + site)
            equal = allowed & (((differ >> bit) & 1) == 0)
            opens = equal & (open_site < 0)
            open_bp = tl.where(opens, site_bp, open_bp)
            open_site = tl.where(equal, tl.where(opens, site, open_site), -1)
            run_bp = site_bp - open_bp
            better = equal & ((run_bp > best_bp) | ((run_bp == best_bp) & (open_site == best_site)))
            best_bp = tl.where(better, run_bp, best_bp)
            best_site = tl.where(better, open_site, best_site)
            best_sites = tl.where(better, site - open_site + 1, best_sites)
    longest = tl.max(best_bp, axis=0)
    holder = tl.min(tl.where(best_bp == longest, m, LAST), axis=0)
    at = n * columns + tl.program_id(1)
    tl.store(bp_ptr + at, longest)
    tl.store(index_ptr + at, tl.where(longest < 0, LAST, holder))
    tl.store(sites_ptr + at, tl.sum(tl.where(m == holder, best_sites, 0), axis=0).to(tl.int64))
