"""Longest stretch of sites on which a row of bits equals some row of a set, on the GPU: one lane per row of the set,
word by word.

A run that covers a whole 32-bit word is found by words: it ends at the lowest difference of a word, and the next begins
behind the highest. A run that covers none lies within 62 sites of two words; these short runs are walked one by one,
but only at words where positions are so sparse that such a run could be as long as the longest known. The longest known
is shared by all programs of a query; it spares work, and never changes the answer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.bits.triton_tiles import popcount
from engine.kernels.nearest.triton_shared import LAST, LAST_KEY, NOT_SELF, Exclude, exclusion, parameters

_ALL = slice(None)


def longest_run(
    query_nw: torch.Tensor,
    database_mw: torch.Tensor,
    length: int,
    position_bp: torch.Tensor,
    exclude_self: bool,
    exclude: Exclude,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """run_bp, run_sites, index, all int64 (N,)."""
    n, m, device = len(query_nw), len(database_mw), query_nw.device
    given = parameters("runs", device)
    blocks = triton.cdiv(m, given["rows"])
    run_bp = torch.full((n, blocks + 1), -1, dtype=torch.int64, device=device)  # the last column is "none"
    run_sites, index = torch.zeros_like(run_bp), torch.full_like(run_bp, LAST_KEY)
    if n and blocks and length:
        words = triton.cdiv(length, 32)
        last = (torch.arange(words, device=device) * 32 + 30).clamp(max=length - 1)
        first = (torch.arange(words, device=device) * 32 - 31).clamp(min=0)
        short_bp = position_bp[last] - position_bp[first]  # no less than any short run that ends in the word
        known_bp = torch.full((n,), -1, dtype=torch.int64, device=device)
        halves = [x.reshape(-1).view(torch.int32).reshape(len(x), -1) for x in (query_nw, database_mw)]
        run_kernel[(n, blocks)](
            halves[0].contiguous(), halves[1].T.contiguous(), position_bp, short_bp, known_bp,
            *exclusion(exclude, _ALL, _ALL, device), run_bp, run_sites, index, m, length, words, halves[0].shape[1],
            blocks + 1, 0 if exclude_self else NOT_SELF,
            GROUPS=exclude is not None, LANES=given["rows"], num_warps=given["warps"],
        )  # fmt: skip
    longest = run_bp.max(dim=1, keepdim=True).values
    holder = torch.where(run_bp == longest, index, LAST_KEY).min(dim=1, keepdim=True)
    sites = run_sites.gather(1, holder.indices)
    none = longest < 0
    return longest[:, 0], sites.masked_fill(none, 0)[:, 0], holder.values.masked_fill(none, -1)[:, 0]


@triton.jit
def lowest(x):  # type: ignore[no-untyped-def]
    """Index of the lowest one of int32; 32 for 0."""
    return popcount((x & -x) - 1)


@triton.jit
def highest(x):  # type: ignore[no-untyped-def]
    """Index of the highest one of int32 other than 0: the exponent of a float32 whose next bit is cleared, so that it
    is not rounded up.
    """
    x = x.to(tl.uint32, bitcast=True)
    return ((x ^ (x & (x >> 1))).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def better(end, open_site, counts, position_ptr, length, best_bp, best_site, best_sites):  # type: ignore[no-untyped-def]
    """The best with the runs [open_site, end) where `counts`: longer in bp only, so that the first of equals stays."""
    counts = counts & (end > open_site)
    last_bp = tl.load(position_ptr + end - 1, mask=counts, other=0)
    run_bp = last_bp - tl.load(position_ptr + open_site, mask=counts, other=0)
    counts = counts & (run_bp > best_bp)
    best_bp = tl.where(counts, run_bp, best_bp)
    return best_bp, tl.where(counts, open_site, best_site), tl.where(counts, end - open_site, best_sites)


@triton.jit
def run_kernel(  # type: ignore[no-untyped-def]
    query_ptr, database_ptr, position_ptr, short_ptr, known_ptr, query_group_ptr, database_group_ptr,
    bp_ptr, sites_ptr, index_ptr, members, length, words, query_words, columns, shift,
    GROUPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One query against LANES rows of the database, which lies word by word."""
    n = tl.program_id(0).to(tl.int64)
    m = (tl.program_id(1) * LANES + tl.arange(0, LANES)).to(tl.int64)
    allowed = (m < members) & (n + shift != m)
    if GROUPS:
        allowed = allowed & (tl.load(database_group_ptr + m, mask=m < members, other=0) != tl.load(query_group_ptr + n))
    known_bp = tl.load(known_ptr + n)
    open_site = tl.zeros((LANES,), dtype=tl.int32)  # first site behind the last difference
    best_bp = tl.full((LANES,), -1, dtype=tl.int64)
    best_site, best_sites = tl.zeros((LANES,), dtype=tl.int32), tl.zeros((LANES,), dtype=tl.int32)
    for word in range(0, words):
        base = word * 32
        differ = tl.load(database_ptr + tl.cast(word, tl.int64) * members + m, mask=m < members, other=0)
        differ = differ ^ tl.load(query_ptr + n * query_words + word)
        if base + 32 > length:  # sites beyond the last differ
            differ = differ | ~((1 << (length - base)) - 1)
        if word % 16 == 0:
            known_bp = tl.maximum(known_bp, tl.max(best_bp, axis=0))
        if tl.load(short_ptr + word) >= known_bp:
            left = differ
            while tl.max((left != 0).to(tl.int32), axis=0) > 0:
                end = base + lowest(left)
                best_bp, best_site, best_sites = better(
                    end, open_site, allowed & (left != 0), position_ptr, length, best_bp, best_site, best_sites
                )
                open_site = tl.where(left != 0, end + 1, open_site)
                left = left & (left - 1)
        else:
            covers = allowed & (differ != 0) & (open_site <= base - 32)
            best_bp, best_site, best_sites = better(
                base + lowest(differ), open_site, covers, position_ptr, length, best_bp, best_site, best_sites
            )
            open_site = tl.where(differ != 0, base + highest(differ) + 1, open_site)
    if length % 32 == 0:  # no difference beyond the last site has closed the run
        end = tl.zeros((LANES,), dtype=tl.int32) + length
        best_bp, best_site, best_sites = better(
            end, open_site, allowed, position_ptr, length, best_bp, best_site, best_sites
        )
    longest = tl.max(best_bp, axis=0)
    tl.atomic_max(known_ptr + n, longest)
    holder = tl.min(tl.where(best_bp == longest, m, LAST), axis=0)
    at = n * columns + tl.program_id(1)
    tl.store(bp_ptr + at, longest)
    tl.store(index_ptr + at, tl.where(longest < 0, LAST, holder))
    tl.store(sites_ptr + at, tl.sum(tl.where(m == holder, best_sites, 0), axis=0).to(tl.int64))
