"""What the GPU kernels of several rooms share: popcount, and bits spread to int8 for the tensor cores.

Words are int32 halves of the 64-bit words (little-endian), so that a row is loaded coalesced, one register a lane.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def count_ones(words_nv: torch.Tensor) -> torch.Tensor:
    """int32 (N,): number of ones in each row of int32 words (N, V)."""
    ones = torch.empty(len(words_nv), dtype=torch.int32, device=words_nv.device)
    if len(words_nv):
        count_kernel[(len(words_nv),)](words_nv, ones, words_nv.shape[1], BLOCK=256)
    return ones


@triton.jit
def popcount(x):  # type: ignore[no-untyped-def]
    """Ones in each int32, by shifts and masks, which the compiler recognises as `popc` (Hacker's Delight, figure 5-2)."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def spread(words_ptr, rows, inside, words, at, BLOCK: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """int8 (BLOCK, 32 STEP) of 0 and 1 from words [at, at + STEP) of the rows; zeros outside."""
    word = at + tl.arange(0, STEP)
    mask = inside[:, None] & (word < words)[None, :]
    packed = tl.load(words_ptr + rows[:, None] * words + word[None, :], mask=mask, other=0)
    ones = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return ones.to(tl.int8).reshape(BLOCK, STEP * 32)


@triton.jit
def count_kernel(words_ptr, ones_ptr, words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for at in range(0, words, BLOCK):
        word = at + tl.arange(0, BLOCK)
        total += popcount(tl.load(words_ptr + row * words + word, mask=word < words, other=0))
    tl.store(ones_ptr + row, tl.sum(total))
