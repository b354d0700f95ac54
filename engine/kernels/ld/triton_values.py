"""Values of a tile of pairs on the GPU: bits are spread to int8 on the fly and multiplied by the tensor cores, then come the
formulas of reference_values.py, in float64.

Tensors are int64 with the bit patterns of the uint64 words. Runs in Triton's interpreter on CPU tensors when
TRITON_INTERPRET=1 was set before import. What becomes of a tile is left to triton_matrix.py and triton_sinks.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

from engine.kernels import bits
from engine.kernels.bits.triton_tiles import count_ones, popcount, spread
from engine.kernels.ld.checks import Sites
from engine.kernels.tuned import launch

INTERPRETED: bool = bool(knobs.runtime.interpret)
CODES = {"r2": 0, "r": 1, "d": 2, "d_prime": 3, "r2_adjusted": 4}
# sites along each side of a tile, 32-bit words per step (an inner axis of 32 times as many), warps; where something is missing
# four or six sums are kept a pair in place of one
LAUNCH = {
    "matrix": {"block": 128, "step": 4, "warps": 8, "stages": 3},
    "matrix_missing": {"block": 64, "step": 4, "warps": 8, "stages": 3},
    "matrix_popcount": {"block": 64, "step": 1, "warps": 4, "stages": 3},
    "sink": {"block": 64, "step": 4, "warps": 4, "stages": 3},
    "sink_missing": {"block": 64, "step": 4, "warps": 8, "stages": 3},
}


class Planes(NamedTuple):
    """Sites as the kernels read them.

    kind: 0 phased, 1 unphased, 2 and 3 the same with something missing. n: haplotypes or people. p0 ... p3: int32 words
    (L, V): the alleles, or `nonzero`, `negative` of dosage - 1, `positive`, `observed`; planes that a kind does not need are p0
    again. sum_l, variance_l: float64 (L,), of what each site has: sum, and n times the sum of squares less the square of the
    sum. seen_l: float64 (L,), observations.
    """

    kind: int
    n: int
    p0: torch.Tensor
    p1: torch.Tensor
    p2: torch.Tensor
    p3: torch.Tensor
    sum_l: torch.Tensor
    variance_l: torch.Tensor
    seen_l: torch.Tensor


def prepare(sites: Sites, missing: bool | None = None) -> Planes:
    """Planes of a set of sites; `missing`: of a missing kind, whether or not this set misses anything."""
    missing = misses(sites) if missing is None else missing
    if sites.unphased:
        made = bits.dosage_planes(sites.bits_lw, sites.n, sites.missing_lw, implementation="triton")
        n, (nonzero, negative, observed) = sites.n // 2, (_halves(plane) for plane in made)
        planes = (
            (nonzero, negative, nonzero & ~negative, observed) if missing else (nonzero, negative, nonzero, nonzero)
        )
    else:
        n, alleles = sites.n, _halves(_masked(sites.bits_lw, sites.n))
        observed = alleles
        if missing:
            called = torch.full_like(sites.bits_lw, -1) if sites.missing_lw is None else ~sites.missing_lw
            observed = _halves(_masked(called, n))
            alleles = alleles & observed
        planes = (alleles, alleles, alleles, observed)
    ones_l = count_ones(planes[0]).to(torch.float64)
    sum_l = ones_l - 2 * count_ones(planes[1]).to(torch.float64) if sites.unphased else ones_l
    seen_l = count_ones(planes[3]).to(torch.float64) if missing else torch.full_like(ones_l, n)
    kind = int(sites.unphased) + 2 * int(missing)
    return Planes(kind, n, *planes, sum_l, seen_l * ones_l - sum_l * sum_l, seen_l)


def prepare_two(first: Sites, other: Sites | None) -> tuple[Planes, Planes]:
    """Planes of both sets, of one kind (the same object twice where `other` is None)."""
    missing = misses(first) or (other is not None and misses(other))
    a = prepare(first, missing)
    return a, a if other is None else prepare(other, missing)


def misses(sites: Sites) -> bool:
    """Whether a genotype is missing at all: a plane of zeros takes the fast path and gives the same values."""
    return sites.missing_lw is not None and bool(_masked(sites.missing_lw, sites.n).any())


def launch_of(name: str, planes: Planes) -> dict[str, int]:
    """Launch parameters of a kernel for this kind of planes on this card."""
    key = f"{name}_missing" if planes.kind >= 2 else name
    device = planes.p0.device
    made = launch(f"ld.{key}", LAUNCH[key], torch.cuda.get_device_name(device) if device.type == "cuda" else "")
    return made | {"block": 32} if INTERPRETED else made


def _masked(bits_lw: torch.Tensor, n: int) -> torch.Tensor:
    if n % 64 and bits_lw.numel():
        bits_lw = bits_lw.clone()
        bits_lw[:, -1] &= (1 << (n % 64)) - 1
    return bits_lw


def _halves(bits_lw: torch.Tensor) -> torch.Tensor:
    """int32 (L, 2 W), low half first."""
    return bits_lw.contiguous().reshape(-1).view(torch.int32).reshape(len(bits_lw), 2 * bits_lw.shape[1])


@triton.jit
def formula(CODE: tl.constexpr, n, halves, sx, sy, vx, vy, x):  # type: ignore[no-untyped-def]
    """Values as reference_values.py defines them; no sum of a product is rounded once, which would differ from the CPU's."""
    if CODE == 0:
        return x * x / (vx * vy)
    elif CODE == 1:
        return x / tl.sqrt(vx * vy)
    elif CODE == 2:
        return x / (n * n * halves)
    elif CODE == 3:
        above = tl.minimum(sx * (n - sy), (n - sx) * sy)
        below = tl.minimum(sx * sy, (n - sx) * (n - sy))
        return x / tl.where(x > 0, above, below)
    else:
        r2 = x * x / (vx * vy)
        return tl.where(n > 2, r2 - (1.0 - r2) / (n - 2.0), float("nan"))


@triton.jit
def spread_signed(nonzero_ptr, negative_ptr, rows, inside, words, at, BLOCK: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """int8 (BLOCK, 32 STEP) of -1, 0 and 1."""
    word = at + tl.arange(0, STEP)
    mask = inside[:, None] & (word < words)[None, :]
    where = rows[:, None] * words + word[None, :]
    nonzero = tl.load(nonzero_ptr + where, mask=mask, other=0)
    negative = tl.load(negative_ptr + where, mask=mask, other=0)
    bit = tl.arange(0, 32)[None, None, :]
    values = ((nonzero[:, :, None] >> bit) & 1) - 2 * ((negative[:, :, None] >> bit) & 1)
    return values.to(tl.int8).reshape(BLOCK, STEP * 32)


@triton.jit
def product(a, b, total):  # type: ignore[no-untyped-def]
    return tl.dot(a, tl.trans(b), acc=total, out_dtype=tl.int32)


@triton.jit
def sums_tile(  # type: ignore[no-untyped-def]
    a0, a1, a3, a_sum, a_variance, b0, b1, b3, b_sum, b_variance, i, j, n, sites, others, words,
    KIND: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """n, sx, sy, vx, vy and x of reference_values.py, float64, for sites `i` against sites `j` of the other set."""
    inside_i, inside_j = i < sites, j < others
    sxy = tl.zeros((BLOCK, BLOCK), dtype=tl.int32)
    if KIND < 2:
        for at in range(0, words, STEP):
            if KIND == 0:
                a = spread(a0, i, inside_i, words, at, BLOCK, STEP)
                b = spread(b0, j, inside_j, words, at, BLOCK, STEP)
            else:
                a = spread_signed(a0, a1, i, inside_i, words, at, BLOCK, STEP)
                b = spread_signed(b0, b1, j, inside_j, words, at, BLOCK, STEP)
            sxy = product(a, b, sxy)
        return of_counts(sxy, a_sum, a_variance, b_sum, b_variance, i, j, n, sites, others)
    sx, sy, seen = tl.zeros_like(sxy), tl.zeros_like(sxy), tl.zeros_like(sxy)
    if KIND == 2:
        for at in range(0, words, STEP):
            a, seen_a = spread(a0, i, inside_i, words, at, BLOCK, STEP), spread(a3, i, inside_i, words, at, BLOCK, STEP)
            b, seen_b = spread(b0, j, inside_j, words, at, BLOCK, STEP), spread(b3, j, inside_j, words, at, BLOCK, STEP)
            sxy, sx = product(a, b, sxy), product(a, seen_b, sx)
            sy, seen = product(seen_a, b, sy), product(seen_a, seen_b, seen)
        sxx, syy = sx, sy
    else:
        sxx, syy = tl.zeros_like(sxy), tl.zeros_like(sxy)
        for at in range(0, words, STEP):
            a, b = (
                spread_signed(a0, a1, i, inside_i, words, at, BLOCK, STEP),
                spread_signed(b0, b1, j, inside_j, words, at, BLOCK, STEP),
            )
            seen_a, seen_b = (
                spread(a3, i, inside_i, words, at, BLOCK, STEP),
                spread(b3, j, inside_j, words, at, BLOCK, STEP),
            )
            sxy, sx, sy = product(a, b, sxy), product(a, seen_b, sx), product(seen_a, b, sy)
            sxx, syy = product(a * a, seen_b, sxx), product(seen_a, b * b, syy)
            seen = product(seen_a, seen_b, seen)
    m, sx, sy = seen.to(tl.float64), sx.to(tl.float64), sy.to(tl.float64)
    x = m * sxy.to(tl.float64) - sx * sy
    return m, sx, sy, m * sxx.to(tl.float64) - sx * sx, m * syy.to(tl.float64) - sy * sy, x


@triton.jit
def of_counts(sxy, a_sum, a_variance, b_sum, b_variance, i, j, n, sites, others):  # type: ignore[no-untyped-def]
    """The same where nothing is missing: all but sums of products belong to one site. Each is exact, fused or not."""
    x = sxy.to(tl.float64)
    sx = tl.load(a_sum + i, mask=i < sites, other=0.0)[:, None] + tl.zeros_like(x)
    vx = tl.load(a_variance + i, mask=i < sites, other=0.0)[:, None] + tl.zeros_like(x)
    sy = tl.load(b_sum + j, mask=j < others, other=0.0)[None, :] + tl.zeros_like(x)
    vy = tl.load(b_variance + j, mask=j < others, other=0.0)[None, :] + tl.zeros_like(x)
    m = tl.zeros_like(x) + n
    return m, sx, sy, vx, vy, x * m - sx * sy


@triton.jit
def pair_sums(  # type: ignore[no-untyped-def]
    p0, p1, p2, p3, sum_ptr, variance_ptr, i, j, inside, n, words,
    KIND: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The same six for listed pairs, by popcount."""
    both = tl.zeros((BLOCK,), dtype=tl.int32)
    sx, sy, sxx, syy, seen = both, both, both, both, both
    for at in range(0, words, STEP):
        word = at + tl.arange(0, STEP)
        mask = inside[:, None] & (word < words)[None, :]
        to_i, to_j = i[:, None] * words + word[None, :], j[:, None] * words + word[None, :]
        a, b = tl.load(p0 + to_i, mask=mask, other=0), tl.load(p0 + to_j, mask=mask, other=0)
        both += tl.sum(popcount(a & b), axis=1)
        if KIND % 2 == 1:
            c, d = tl.load(p1 + to_i, mask=mask, other=0), tl.load(p1 + to_j, mask=mask, other=0)
            both -= 2 * tl.sum(popcount(a & b & (c ^ d)), axis=1)
        if KIND >= 2:
            e, f = tl.load(p3 + to_i, mask=mask, other=0), tl.load(p3 + to_j, mask=mask, other=0)
            seen += tl.sum(popcount(e & f), axis=1)
            sxx += tl.sum(popcount(a & f), axis=1)
            syy += tl.sum(popcount(e & b), axis=1)
            if KIND == 3:
                sx -= 2 * tl.sum(popcount(c & f), axis=1)
                sy -= 2 * tl.sum(popcount(e & d), axis=1)
    if KIND >= 2:
        m, first, second = seen.to(tl.float64), (sx + sxx).to(tl.float64), (sy + syy).to(tl.float64)
        vx, vy = m * sxx.to(tl.float64) - first * first, m * syy.to(tl.float64) - second * second
    else:
        first, second = tl.load(sum_ptr + i, mask=inside, other=0.0), tl.load(sum_ptr + j, mask=inside, other=0.0)
        vx, vy = tl.load(variance_ptr + i, mask=inside, other=0.0), tl.load(variance_ptr + j, mask=inside, other=0.0)
        m = tl.zeros_like(first) + n
    return m, first, second, vx, vy, m * both.to(tl.float64) - first * second
