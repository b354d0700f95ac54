"""Bits on the GPU. A 64 x 64 block is spread into registers and summed along the other axis; distinct powers of two
never carry into one another, so the wrapping integer sum is an exact OR.

Tensors are int64 with the bit patterns of the uint64 words. Runs in Triton's interpreter on CPU tensors when
TRITON_INTERPRET=1 was set before import.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

INTERPRETED: bool = bool(knobs.runtime.interpret)


def pack(alleles_ln: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """uint8 or bool (L, N) of 0 and 1 -> int64 (L, ceil(N / 64)), and whether there was nothing but 0 and 1."""
    sites, n = alleles_ln.shape
    words = (n + 63) // 64
    bits_lw = torch.empty((sites, words), dtype=torch.int64, device=alleles_ln.device)
    if bits_lw.numel():
        alleles_ln = alleles_ln.contiguous().view(torch.uint8)
        _pack[(sites, words)](alleles_ln, bits_lw, n, words)
    return bits_lw, not alleles_ln.numel() or int(alleles_ln.max()) <= 1


def unpack(bits_lw: torch.Tensor, n: int) -> torch.Tensor:
    """int64 (L, W) -> uint8 (L, n)."""
    sites, words = bits_lw.shape
    alleles_ln = torch.empty((sites, n), dtype=torch.uint8, device=bits_lw.device)
    if alleles_ln.numel():
        _unpack[(sites, words)](bits_lw.contiguous(), alleles_ln, n, words)
    return alleles_ln


def transpose(bits_lw: torch.Tensor, n: int) -> torch.Tensor:
    """int64 (L, W) -> int64 (n, ceil(L / 64))."""
    sites, words = bits_lw.shape
    out_words = (sites + 63) // 64
    bits_nw = torch.empty((n, out_words), dtype=torch.int64, device=bits_lw.device)
    if bits_nw.numel():
        _transpose[(out_words, words)](bits_lw.contiguous(), bits_nw, sites, n, words, out_words)
    return bits_nw


def popcount_rows(bits_lw: torch.Tensor) -> torch.Tensor:
    """int64 (L,) number of ones in each row."""
    sites, words = bits_lw.shape
    counts_l = torch.empty(sites, dtype=torch.int64, device=bits_lw.device)
    if sites:
        _popcount_rows[(sites,)](bits_lw.contiguous(), counts_l, words, BLOCK=256)
    return counts_l


def dosage_planes(
    bits_lw: torch.Tensor, samples: int, missing_lw: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the door's `dosage_planes`, int64."""
    sites, words = bits_lw.shape
    made = torch.empty((3, sites, (samples + 63) // 64), dtype=torch.int64, device=bits_lw.device)
    if made.numel():
        missing = bits_lw if missing_lw is None else missing_lw
        _dosage_planes[(sites, made.shape[2])](
            bits_lw.contiguous(), missing.contiguous(), made, sites, samples, words, made.shape[2],
            MISSING=missing_lw is not None,
        )  # fmt: skip
    return made[0], made[1], made[2]


@triton.jit
def _dosage_planes(  # type: ignore[no-untyped-def]
    bits_ptr, missing_ptr, out_ptr, sites, samples, words, out_words, MISSING: tl.constexpr
):  # fmt: skip
    site, word = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, 64)
    sample = word * 64 + lane
    at = site * words + sample // 32  # the word of haplotypes 2 s and 2 s + 1
    inside = sample < samples
    bit = (2 * (sample % 32)).to(tl.int64)
    pair = tl.load(bits_ptr + at, mask=inside, other=0) >> bit
    dosage = (pair & 1) + ((pair >> 1) & 1)
    observed = inside
    if MISSING:
        observed = observed & (((tl.load(missing_ptr + at, mask=inside, other=0) >> bit) & 3) == 0)
    place = lane.to(tl.int64)
    to = out_ptr + site * out_words + word
    plane = sites.to(tl.int64) * out_words
    tl.store(to, tl.sum((observed & (dosage != 1)).to(tl.int64) << place, axis=0))
    tl.store(to + plane, tl.sum((observed & (dosage == 0)).to(tl.int64) << place, axis=0))
    tl.store(to + 2 * plane, tl.sum(observed.to(tl.int64) << place, axis=0))


@triton.jit
def _pack(alleles_ptr, bits_ptr, n, words):  # type: ignore[no-untyped-def]
    site = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1)
    bit = tl.arange(0, 64)
    haplotype = word * 64 + bit
    allele = tl.load(alleles_ptr + site * n + haplotype, mask=haplotype < n, other=0).to(tl.int64)
    tl.store(bits_ptr + site * words + word, tl.sum(allele << bit.to(tl.int64), axis=0))


@triton.jit
def _unpack(bits_ptr, alleles_ptr, n, words):  # type: ignore[no-untyped-def]
    site = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1)
    bit = tl.arange(0, 64)
    haplotype = word * 64 + bit
    value = tl.load(bits_ptr + site * words + word)
    allele = (value >> bit.to(tl.int64)) & 1
    tl.store(alleles_ptr + site * n + haplotype, allele.to(tl.uint8), mask=haplotype < n)


@triton.jit
def _transpose(bits_ptr, out_ptr, sites, n, words, out_words):  # type: ignore[no-untyped-def]
    out_word = tl.program_id(0)
    word = tl.program_id(1)
    lane = tl.arange(0, 64).to(tl.int64)
    site = out_word.to(tl.int64) * 64 + lane
    haplotype = word.to(tl.int64) * 64 + lane
    value = tl.load(bits_ptr + site * words + word, mask=site < sites, other=0)
    bit = (value[:, None] >> lane[None, :]) & 1  # (64 sites, 64 haplotypes)
    turned = tl.sum(bit << lane[:, None], axis=0)
    tl.store(out_ptr + haplotype * out_words + out_word, turned, mask=haplotype < n)


@triton.jit
def _popcount_rows(bits_ptr, counts_ptr, words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    site = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    for first in range(0, words, BLOCK):
        word = first + tl.arange(0, BLOCK)
        x = tl.load(bits_ptr + site * words + word, mask=word < words, other=0).to(tl.uint64, bitcast=True)
        x = x - ((x >> 1) & 0x5555555555555555)
        x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
        total += ((x * 0x0101010101010101) >> 56).to(tl.int64)
    tl.store(counts_ptr + site, tl.sum(total, axis=0))
