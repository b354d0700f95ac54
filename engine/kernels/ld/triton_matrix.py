"""All pairs, two sets, bands and listed pairs on the GPU: values of tiles (triton_values.py), written where they belong.

Counts stay in registers; a value is written once, and its mirror image too, each in rows.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import triton
import triton.language as tl

from engine.kernels.bits.triton_tiles import popcount
from engine.kernels.ld.checks import Sites
from engine.kernels.ld.triton_values import (
    CODES,
    INTERPRETED,
    LAUNCH,
    Planes,
    formula,
    launch_of,
    of_counts,
    pair_sums,
    prepare,
    prepare_two,
    sums_tile,
)  # fmt: skip
from engine.kernels.tuned import launch

_PAIRS = 32  # listed pairs per program


def matrix(
    first: Sites,
    other: Sites | None,
    measure: str,
    out: torch.Tensor | None = None,
    method: Literal["tensor", "popcount"] = "tensor",
) -> torch.Tensor:
    """float32 (L, L), or (L, M) against a second set of sites; into `out` where it is given.

    `method`: tensor cores, or popcount of 32-bit words, which knows no missing genotypes; the same values.
    """
    a, b = prepare_two(first, other)
    if out is None:
        out = torch.empty((len(a.p0), len(b.p0)), dtype=torch.float32, device=a.p0.device)
    if not out.numel():
        return out
    halves, symmetric = 2.0 if a.kind % 2 else 1.0, other is None
    if method == "popcount":
        assert a.kind < 2, "the popcount variant is for complete genotypes"
        card = torch.cuda.get_device_name(out.device) if out.is_cuda else ""
        with_ = launch("ld.matrix_popcount", LAUNCH["matrix_popcount"], card) | ({"block": 32} if INTERPRETED else {})
        turned = [plane.t().contiguous() for plane in (a.p0, a.p1)]
        turned += turned if symmetric else [plane.t().contiguous() for plane in (b.p0, b.p1)]
        popcount_kernel[_grid(out, with_["block"])](
            *turned[:2], a.sum_l, a.variance_l, *turned[2:], b.sum_l, b.variance_l, out, a.n, *out.shape, a.p0.shape[1], halves,
            KIND=a.kind, CODE=CODES[measure], SYMMETRIC=symmetric, BLOCK=with_["block"], num_warps=with_["warps"],
        )  # fmt: skip
        return out
    with_ = launch_of("matrix", a)
    matrix_kernel[_grid(out, with_["block"])](
        a.p0, a.p1, a.p3, a.sum_l, a.variance_l, b.p0, b.p1, b.p3, b.sum_l, b.variance_l, out,
        a.n, *out.shape, a.p0.shape[1], halves, KIND=a.kind, CODE=CODES[measure], SYMMETRIC=symmetric,
        BLOCK=with_["block"], STEP=with_["step"], num_warps=with_["warps"], num_stages=with_["stages"],
    )  # fmt: skip
    return out


def _grid(out: torch.Tensor, block: int) -> tuple[int, int]:
    return triton.cdiv(out.shape[0], block), triton.cdiv(out.shape[1], block)


def band(first: Sites, end_l: np.ndarray, width: int, measure: str) -> torch.Tensor:
    """float32 (L, width): [i, k] is site i with site i + 1 + k where that is before end_l[i], else NaN."""
    a = prepare(first)
    out = torch.full((len(end_l), width), torch.nan, dtype=torch.float32, device=a.p0.device)
    if out.numel():
        with_ = launch_of("sink", a)
        block = with_["block"]
        grid = (triton.cdiv(len(end_l), block), triton.cdiv(width, block) + 1)
        band_kernel[grid](
            a.p0, a.p1, a.p3, a.sum_l, a.variance_l, torch.from_numpy(end_l).to(out.device), out,
            a.n, len(end_l), a.p0.shape[1], width, 2.0 if a.kind % 2 else 1.0, KIND=a.kind, CODE=CODES[measure],
            BLOCK=block, STEP=with_["step"], num_warps=with_["warps"], num_stages=with_["stages"],
        )  # fmt: skip
    return out


def pairs(first: Sites, i: torch.Tensor, j: torch.Tensor, measure: str) -> torch.Tensor:
    """float32 (P,): site i[p] with site j[p]."""
    return _pair_values(prepare(first), i, j, measure).to(torch.float32)


def pair_values(planes: Planes, i: np.ndarray, j: np.ndarray, measure: str) -> np.ndarray:
    """float64 (P,), in host memory: site i[p] with site j[p], not rounded to float32."""
    device = planes.p0.device
    return _pair_values(planes, torch.from_numpy(i).to(device), torch.from_numpy(j).to(device), measure).cpu().numpy()


def _pair_values(planes: Planes, i: torch.Tensor, j: torch.Tensor, measure: str) -> torch.Tensor:
    out = torch.empty(len(i), dtype=torch.float64, device=planes.p0.device)
    if out.numel():
        pairs_kernel[(triton.cdiv(len(i), _PAIRS),)](
            planes.p0, planes.p1, planes.p2, planes.p3, planes.sum_l, planes.variance_l, i, j, out,
            planes.n, len(i), planes.p0.shape[1], 2.0 if planes.kind % 2 else 1.0,
            KIND=planes.kind, CODE=CODES[measure], BLOCK=_PAIRS, STEP=32,
        )  # fmt: skip
    return out


def pair_tables(planes: Planes, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """float64 (P, 5), in host memory: haplotypes of site i[p] and site j[p] by their alleles, as likelihood.py takes them."""
    device = planes.p0.device
    out = torch.empty((len(i), 5), dtype=torch.float64, device=device)
    if out.numel():
        tables_kernel[(triton.cdiv(len(i), _PAIRS),)](
            planes.p0, planes.p1, planes.p2, planes.p3, torch.from_numpy(i).to(device), torch.from_numpy(j).to(device), out,
            planes.n, len(i), planes.p0.shape[1], KIND=planes.kind, BLOCK=_PAIRS, STEP=32,
        )  # fmt: skip
    return out.cpu().numpy()


def major_frequency(planes: Planes) -> tuple[np.ndarray, np.ndarray]:
    """Frequency of the commoner allele among the called ones, and whether the site varies: (L,) each, in host memory."""
    sum_l, seen_l = planes.sum_l.cpu().numpy(), planes.seen_l.cpu().numpy()
    alleles = (sum_l + seen_l, 2 * seen_l) if planes.kind % 2 else (sum_l, seen_l)
    share_l = alleles[0] / np.maximum(alleles[1], 1)
    return np.maximum(share_l, 1 - share_l), planes.variance_l.cpu().numpy() > 0


@triton.jit
def matrix_kernel(  # type: ignore[no-untyped-def]
    a0, a1, a3, a_sum, a_variance, b0, b1, b3, b_sum, b_variance, out_ptr, n, sites, others, words, halves,
    KIND: tl.constexpr, CODE: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    if SYMMETRIC and tl.program_id(1) < tl.program_id(0):
        return
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    j = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    m, sx, sy, vx, vy, x = sums_tile(
        a0, a1, a3, a_sum, a_variance, b0, b1, b3, b_sum, b_variance, i, j, n, sites, others, words, KIND, BLOCK, STEP
    )
    write(formula(CODE, m, halves, sx, sy, vx, vy, x).to(tl.float32), out_ptr, i, j, sites, others, SYMMETRIC)


@triton.jit
def popcount_kernel(  # type: ignore[no-untyped-def]
    a0, a1, a_sum, a_variance, b0, b1, b_sum, b_variance, out_ptr, n, sites, others, words, halves,
    KIND: tl.constexpr, CODE: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same by popcount, from planes (V, L), so that a word of neighbouring sites is one load."""
    if SYMMETRIC and tl.program_id(1) < tl.program_id(0):
        return
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    j = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    both = tl.zeros((BLOCK, BLOCK), dtype=tl.int32)
    at_i, at_j = i, j
    for _ in range(0, words):
        a, b = tl.load(a0 + at_i, mask=i < sites, other=0), tl.load(b0 + at_j, mask=j < others, other=0)
        common = a[:, None] & b[None, :]
        both += popcount(common)
        if KIND == 1:
            c, d = tl.load(a1 + at_i, mask=i < sites, other=0), tl.load(b1 + at_j, mask=j < others, other=0)
            both -= 2 * popcount(common & (c[:, None] ^ d[None, :]))
        at_i, at_j = at_i + sites, at_j + others
    m, sx, sy, vx, vy, x = of_counts(both, a_sum, a_variance, b_sum, b_variance, i, j, n, sites, others)
    write(formula(CODE, m, halves, sx, sy, vx, vy, x).to(tl.float32), out_ptr, i, j, sites, others, SYMMETRIC)


@triton.jit
def write(values, out_ptr, i, j, sites, others, SYMMETRIC: tl.constexpr):  # type: ignore[no-untyped-def]
    inside = (i < sites)[:, None] & (j < others)[None, :]
    tl.store(out_ptr + i[:, None] * others + j[None, :], values, mask=inside)
    if SYMMETRIC:
        tl.store(out_ptr + j[:, None] * others + i[None, :], tl.trans(values), mask=tl.trans(inside))


@triton.jit
def band_kernel(  # type: ignore[no-untyped-def]
    a0, a1, a3, a_sum, a_variance, end_ptr, out_ptr, n, sites, words, width, halves,
    KIND: tl.constexpr, CODE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    i0 = tl.program_id(0).to(tl.int64) * BLOCK
    j0 = i0 + tl.program_id(1) * BLOCK
    i, j = i0 + tl.arange(0, BLOCK), j0 + tl.arange(0, BLOCK)
    if j0 < tl.load(end_ptr + tl.minimum(i0 + BLOCK, sites) - 1):
        m, sx, sy, vx, vy, x = sums_tile(
            a0,
            a1,
            a3,
            a_sum,
            a_variance,
            a0,
            a1,
            a3,
            a_sum,
            a_variance,
            i,
            j,
            n,
            sites,
            sites,
            words,
            KIND,
            BLOCK,
            STEP,
        )
        values = formula(CODE, m, halves, sx, sy, vx, vy, x).to(tl.float32)
        end = tl.load(end_ptr + i, mask=i < sites, other=0)
        inside = (i[:, None] < j[None, :]) & (j[None, :] < end[:, None])
        tl.store(out_ptr + i[:, None] * width + (j[None, :] - i[:, None] - 1), values, mask=inside)


@triton.jit
def pairs_kernel(  # type: ignore[no-untyped-def]
    p0, p1, p2, p3, sum_ptr, variance_ptr, i_ptr, j_ptr, out_ptr, n, pairs, words, halves,
    KIND: tl.constexpr, CODE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = p < pairs
    i, j = tl.load(i_ptr + p, mask=inside, other=0), tl.load(j_ptr + p, mask=inside, other=0)
    m, sx, sy, vx, vy, x = pair_sums(p0, p1, p2, p3, sum_ptr, variance_ptr, i, j, inside, n, words, KIND, BLOCK, STEP)
    tl.store(out_ptr + p, formula(CODE, m, halves, sx, sy, vx, vy, x), mask=inside)


@triton.jit
def tables_kernel(  # type: ignore[no-untyped-def]
    p0, p1, p2, p3, i_ptr, j_ptr, out_ptr, n, pairs, words, KIND: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = p < pairs
    i, j = tl.load(i_ptr + p, mask=inside, other=0), tl.load(j_ptr + p, mask=inside, other=0)
    zero = tl.zeros((BLOCK,), dtype=tl.int32)
    ref_x, ref_y, alt_x, alt_y, ref_ref, ref_alt, alt_ref, alt_alt, seen = (
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
    )
    for at in range(0, words, STEP):
        word = at + tl.arange(0, STEP)
        mask = inside[:, None] & (word < words)[None, :]
        to_i, to_j = i[:, None] * words + word[None, :], j[:, None] * words + word[None, :]
        a, b = tl.load(p0 + to_i, mask=mask, other=0), tl.load(p0 + to_j, mask=mask, other=0)
        e, f = a | -1, b | -1  # everything is seen where nothing is missing
        if KIND >= 2:
            e, f = tl.load(p3 + to_i, mask=mask, other=0), tl.load(p3 + to_j, mask=mask, other=0)
            seen += tl.sum(popcount(e & f), axis=1)
        if KIND % 2 == 1:
            c, d = tl.load(p1 + to_i, mask=mask, other=0), tl.load(p1 + to_j, mask=mask, other=0)
            a, b = a & ~c, b & ~d
            ref_x += tl.sum(popcount(c & f), axis=1)
            ref_y += tl.sum(popcount(e & d), axis=1)
            ref_ref += tl.sum(popcount(c & d), axis=1)
            ref_alt += tl.sum(popcount(c & b), axis=1)
            alt_ref += tl.sum(popcount(a & d), axis=1)
        alt_x += tl.sum(popcount(a & f), axis=1)
        alt_y += tl.sum(popcount(e & b), axis=1)
        alt_alt += tl.sum(popcount(a & b), axis=1)
    if KIND < 2:
        seen = zero + n
    if KIND % 2 == 1:
        n11, n12 = ref_x + ref_y - ref_alt - alt_ref, ref_x + alt_y - ref_ref - alt_alt
        n21, n22 = alt_x + ref_y - ref_ref - alt_alt, alt_x + alt_y - ref_alt - alt_ref
        phase_open = seen - ref_x - alt_x - ref_y - alt_y + ref_ref + ref_alt + alt_ref + alt_alt
    else:
        n11, n12, n21, n22, phase_open = seen - alt_x - alt_y + alt_alt, alt_y - alt_alt, alt_x - alt_alt, alt_alt, zero
    to = out_ptr + p * 5
    tl.store(to, n11.to(tl.float64), mask=inside)
    tl.store(to + 1, n12.to(tl.float64), mask=inside)
    tl.store(to + 2, n21.to(tl.float64), mask=inside)
    tl.store(to + 3, n22.to(tl.float64), mask=inside)
    tl.store(to + 4, phase_open.to(tl.float64), mask=inside)
