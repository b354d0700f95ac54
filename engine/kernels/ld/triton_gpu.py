"""Linkage disequilibrium on the GPU: bits are spread to int8 on the fly and multiplied by the tensor cores, and what becomes of
the exact int32 counts (r2 matrix, histogram) is fused behind the product, so that no count matrix is ever in memory.

Tensors are int64 with the bit patterns of the uint64 words. Runs in Triton's interpreter on CPU tensors when
TRITON_INTERPRET=1 was set before import.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

from engine.kernels.bits.triton_tiles import count_ones, popcount, spread

INTERPRETED: bool = bool(knobs.runtime.interpret)
_BLOCK = 32 if INTERPRETED else 128  # sites along each side of a tile
_STEP = 4  # 32-bit words per step: an inner axis of 128 for the tensor cores
_SPLITS = 8  # programs that share one block row of the histogram


def r2(bits_lw: torch.Tensor, n: int, other_mw: torch.Tensor | None = None) -> torch.Tensor:
    """float32 (L, L), or (L, M) against a second set of sites."""
    words_lv, count_l, reciprocal_l = _prepare(bits_lw, n)
    words_mv, count_m, reciprocal_m = (words_lv, count_l, reciprocal_l) if other_mw is None else _prepare(other_mw, n)
    out = torch.empty((len(words_lv), len(words_mv)), dtype=torch.float32, device=bits_lw.device)
    if out.numel():
        grid = (triton.cdiv(out.shape[0], _BLOCK), triton.cdiv(out.shape[1], _BLOCK))
        r2_kernel[grid](
            words_lv, count_l, reciprocal_l, words_mv, count_m, reciprocal_m, out,
            n, *out.shape, words_lv.shape[1],
            SYMMETRIC=other_mw is None, BLOCK=_BLOCK, STEP=_STEP, num_warps=8,
        )  # fmt: skip
    return out


def r2_pairs(bits_lw: torch.Tensor, n: int, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """float32 (P,): r2 of site i[p] with site j[p]."""
    words_lv, count_l, reciprocal_l = _prepare(bits_lw, n)
    out = torch.empty(len(i), dtype=torch.float32, device=bits_lw.device)
    if out.numel():
        pairs_kernel[(triton.cdiv(len(i), 32),)](
            words_lv, count_l, reciprocal_l, i, j, out, n, len(i), words_lv.shape[1], BLOCK=32, STEP=32
        )
    return out


def r2_decay(
    bits_lw: torch.Tensor, n: int, position_bp: torch.Tensor, edges_bp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of r2 (float64) and number of pairs (int64) per distance bin; the matrix is never held."""
    words_lv, count_l, reciprocal_l = _prepare(bits_lw, n)
    bins, rows = len(edges_bp) - 1, triton.cdiv(len(words_lv), _BLOCK // 2)
    sums = torch.zeros((rows, _SPLITS, bins), dtype=torch.float64, device=bits_lw.device)
    pairs = torch.zeros((rows, _SPLITS, bins), dtype=torch.int64, device=bits_lw.device)
    if rows:
        decay_kernel[(rows, _SPLITS)](
            words_lv, count_l, reciprocal_l, position_bp, edges_bp, sums, pairs,
            n, len(words_lv), words_lv.shape[1], bins,
            BLOCK=_BLOCK // 2, STEP=_STEP, BINS=triton.next_power_of_2(bins), SPLITS=_SPLITS, num_warps=4,
        )  # fmt: skip
    return sums.sum(dim=(0, 1)), pairs.sum(dim=(0, 1))


def _prepare(bits_lw: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int32 words (L, 2 W), ALT counts and reciprocal variances (L,), float64; NaN where monomorphic."""
    if n % 64 and bits_lw.numel():
        bits_lw = bits_lw.clone()
        bits_lw[:, -1] &= (1 << (n % 64)) - 1
    words_lv = bits_lw.reshape(-1).view(torch.int32).reshape(len(bits_lw), 2 * bits_lw.shape[1])
    count_l = count_ones(words_lv).to(torch.float64)
    variance_l = count_l * (n - count_l)
    return words_lv, count_l, torch.where(variance_l > 0, 1.0 / variance_l, torch.nan)


@triton.jit
def r2_tile(  # type: ignore[no-untyped-def]
    words_ptr, count_ptr, reciprocal_ptr, other_ptr, other_count_ptr, other_reciprocal_ptr,
    i, j, n, sites, others, words, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """float64 r2 of sites `i` against sites `j` of the other set."""
    counts = tl.zeros((BLOCK, BLOCK), dtype=tl.int32)
    for at in range(0, words, STEP):
        a = spread(words_ptr, i, i < sites, words, at, BLOCK, STEP)
        b = spread(other_ptr, j, j < others, words, at, BLOCK, STEP)
        counts = tl.dot(a, tl.trans(b), acc=counts, out_dtype=tl.int32)
    count_i = tl.load(count_ptr + i, mask=i < sites, other=0.0)
    count_j = tl.load(other_count_ptr + j, mask=j < others, other=0.0)
    reciprocal_i = tl.load(reciprocal_ptr + i, mask=i < sites, other=0.0)
    reciprocal_j = tl.load(other_reciprocal_ptr + j, mask=j < others, other=0.0)
    x = counts.to(tl.float64) * n - count_i[:, None] * count_j[None, :]  # exact, fused or not
    return (x * reciprocal_i[:, None]) * (x * reciprocal_j[None, :])


@triton.jit
def r2_kernel(  # type: ignore[no-untyped-def]
    words_ptr, count_ptr, reciprocal_ptr, other_ptr, other_count_ptr, other_reciprocal_ptr, out_ptr,
    n, sites, others, words, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    if SYMMETRIC and tl.program_id(1) < tl.program_id(0):
        return
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    j = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    values = r2_tile(
        words_ptr, count_ptr, reciprocal_ptr, other_ptr, other_count_ptr, other_reciprocal_ptr,
        i, j, n, sites, others, words, BLOCK, STEP,
    ).to(tl.float32)  # fmt: skip
    inside = (i < sites)[:, None] & (j < others)[None, :]
    tl.store(out_ptr + i[:, None] * others + j[None, :], values, mask=inside)
    if SYMMETRIC:
        tl.store(out_ptr + j[:, None] * others + i[None, :], tl.trans(values), mask=tl.trans(inside))


@triton.jit
def decay_kernel(  # type: ignore[no-untyped-def]
    words_ptr, count_ptr, reciprocal_ptr, position_ptr, edges_ptr, sums_ptr, pairs_ptr,
    n, sites, words, bins, BLOCK: tl.constexpr, STEP: tl.constexpr, BINS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Block row `program_id(0)`, every SPLITS-th block from the diagonal on; sums stay in registers, one writer per cell."""
    row, split = tl.program_id(0), tl.program_id(1)
    i0 = row.to(tl.int64) * BLOCK
    i = i0 + tl.arange(0, BLOCK)
    position_i = tl.load(position_ptr + i, mask=i < sites, other=0)
    first_bp = tl.load(position_ptr + i0)
    last_bp = tl.load(position_ptr + tl.minimum(i0 + BLOCK, sites) - 1)
    b = tl.arange(0, BINS)
    lower = tl.load(edges_ptr + b, mask=b < bins, other=0)
    upper = tl.load(edges_ptr + b + 1, mask=b < bins, other=0)
    end_bp = tl.load(edges_ptr + bins)
    sums, pairs = tl.zeros((BINS,), dtype=tl.float64), tl.zeros((BINS,), dtype=tl.int64)
    j0 = i0 + split * BLOCK
    near = j0 < sites
    while near:
        j = j0 + tl.arange(0, BLOCK)
        position_j = tl.load(position_ptr + j, mask=j < sites, other=0)
        near_bp = tl.load(position_ptr + j0) - last_bp  # no pair of the tile is nearer, none further than far_bp
        far_bp = tl.load(position_ptr + tl.minimum(j0 + BLOCK, sites) - 1) - first_bp
        near = near_bp < end_bp
        if near:
            r2 = r2_tile(
                words_ptr, count_ptr, reciprocal_ptr, words_ptr, count_ptr, reciprocal_ptr,
                i, j, n, sites, sites, words, BLOCK, STEP,
            )  # fmt: skip
            distance_bp = position_j[None, :] - position_i[:, None]
            wanted = (i[:, None] < j[None, :]) & (j < sites)[None, :] & (r2 == r2)
            from_bin = tl.sum(((upper <= near_bp) & (b < bins)).to(tl.int32))
            to_bin = tl.sum(((lower <= far_bp) & (b < bins)).to(tl.int32))
            for k in range(from_bin, to_bin):
                low, high = tl.load(edges_ptr + k), tl.load(edges_ptr + k + 1)
                inside = wanted & (distance_bp >= low) & (distance_bp < high)
                sums += tl.where(b == k, tl.sum(tl.sum(tl.where(inside, r2, 0.0), axis=1)), 0.0)
                pairs += tl.where(b == k, tl.sum(tl.sum(inside.to(tl.int32), axis=1)), 0).to(tl.int64)
        j0 += SPLITS * BLOCK
        near = near & (j0 < sites)
    at = (row * SPLITS + split).to(tl.int64) * bins + b
    tl.store(sums_ptr + at, sums, mask=b < bins)
    tl.store(pairs_ptr + at, pairs, mask=b < bins)


@triton.jit
def pairs_kernel(  # type: ignore[no-untyped-def]
    words_ptr, count_ptr, reciprocal_ptr, i_ptr, j_ptr, out_ptr, n, pairs, words, BLOCK: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.load(i_ptr + p, mask=p < pairs, other=0)
    j = tl.load(j_ptr + p, mask=p < pairs, other=0)
    both = tl.zeros((BLOCK,), dtype=tl.int32)
    for at in range(0, words, STEP):
        word = at + tl.arange(0, STEP)
        mask = (p < pairs)[:, None] & (word < words)[None, :]
        a = tl.load(words_ptr + i[:, None] * words + word[None, :], mask=mask, other=0)
        b = tl.load(words_ptr + j[:, None] * words + word[None, :], mask=mask, other=0)
        both += tl.sum(popcount(a & b), axis=1)
    count_i, count_j = tl.load(count_ptr + i), tl.load(count_ptr + j)
    x = both.to(tl.float64) * n - count_i * count_j
    r2 = (x * tl.load(reciprocal_ptr + i)) * (x * tl.load(reciprocal_ptr + j))
    tl.store(out_ptr + p, r2.to(tl.float32), mask=p < pairs)
