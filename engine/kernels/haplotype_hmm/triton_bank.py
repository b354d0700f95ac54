"""The kernels of a bank of copying chains on the GPU; the host's part is in `triton_gpu`.

A family is a chain without a parent and all that descend from it; families know nothing of one another. `bank_walk_kernel`
walks one family of one target through the sites, `bank_retreat_kernel` one chain of one target back. States lie in global
memory, (rows, chains, width) per target, as `BankState` keeps them, and are walked by tiles of (words, 32), so that a packed
word of the panel is read once for its 32 haplotypes. As on the CPU, what a chain holds likely is summed by the allele ahead
before that is seen, and divided out a site later.
"""

# mypy: disable-error-code="no-untyped-def"
# Functions compiled by Triton carry no annotations: their types are those of their arguments.

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.haplotype_hmm.triton_kernels import _wide


@triton.jit
def _unpacked(bits_ptr, site, half_words, at):
    """int32 (WORDS, 32), the alleles at a site of the haplotypes in the words `at`."""
    word = tl.load(bits_ptr + _wide(site) * half_words + at, mask=at < half_words, other=0)
    return (word[:, None] >> tl.arange(0, 32)[None, :]) & 1


@triton.jit
def _base(base_ptr, columns, inside, k, UNIFORM: tl.constexpr):
    """The uniform prior over the haplotypes that are not excluded; with UNIFORM the same value for all of them."""
    if UNIFORM:
        each = tl.load(base_ptr)
        return tl.where(columns < k, each, 0.0)
    return tl.load(base_ptr + columns, mask=inside, other=0.0)


@triton.jit
def _seen(allele, wrong):
    """Emission of an allele that is copied from a 0 and from a 1."""
    right = 1.0 - wrong
    seen_0 = tl.where(allele == 0, right, tl.where(allele == 1, wrong, 1.0))
    return seen_0, tl.where(allele == 1, right, tl.where(allele == 0, wrong, 1.0))


@triton.jit
def bank_walk_kernel(
    bits_ptr, target_ptr, switch_ptr, mismatch_ptr, parent_ptr, floor_ptr, member_ptr, begin_ptr, base_ptr, state_ptr,
    sums_ptr, logit_ptr, donors_ptr,
    first_site, stop_site, sites, half_words, k, chains, base_stride, state_stride, row_stride, sums_stride,
    sums_row_stride,
    MEMBERS: tl.constexpr, WORDS: tl.constexpr, UNIFORM: tl.constexpr, PREDICT: tl.constexpr,
):  # fmt: skip
    """Sites first_site .. stop_site-1 of program (target, family). bits int32 (L, half_words), target uint8 (N, L), switch and
    mismatch float64 (C, L), parent int32 (C,), floor float64 (C,), 1 without a parent, member int32 (C,), the chains sorted
    by family, begin int32 (families + 1,); base (1 or N, width) and state (N, rows, C, width) of one dtype, width =
    32 half_words; sums float64 (N, rows, C, 2). Row 0 of both is before `first_site`; with row strides of 0 in place, else each
    site into the next row. With PREDICT, logit and donors float32 (N, sites of this call, C) are written."""
    STATE = state_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(begin_ptr + tl.program_id(1)), tl.load(begin_ptr + tl.program_id(1) + 1)
    place = begin + tl.arange(0, MEMBERS)
    family = tl.load(member_ptr + place, mask=place < end, other=-2)  # -1 is no chain's parent
    state, sums, base = state_ptr + n * state_stride, sums_ptr + n * sums_stride, base_ptr + n * base_stride
    refs = tl.load(sums + 2 * family, mask=place < end, other=0.0)
    alts = tl.load(sums + 2 * family + 1, mask=place < end, other=0.0)
    for site in range(first_site, stop_site):
        behind = tl.where(site > 0, site - 1, 0)
        allele = tl.load(target_ptr + n * sites + behind).to(tl.int32)
        for i in range(begin, end):
            c = tl.load(member_ptr + i)
            parent, floor = tl.load(parent_ptr + c), tl.load(floor_ptr + c)
            rates = c.to(tl.int64) * sites
            switch = tl.where(site > 0, tl.load(switch_ptr + rates + site), 1.0)
            seen_0, seen_1 = _seen(allele, tl.load(mismatch_ptr + rates + behind))
            own = family == c
            ref, alt = tl.sum(tl.where(own, refs, 0.0), axis=0), tl.sum(tl.where(own, alts, 0.0), axis=0)
            keep = tl.where(switch < 1.0, (1.0 - switch) / (ref * seen_0 + alt * seen_1), 0.0)
            by_0, by_1 = (keep * seen_0).to(STATE), (keep * seen_1).to(STATE)
            of_parent = tl.sum(tl.where(family == parent, refs + alts, 0.0), axis=0)
            enter = (switch * (1.0 - floor) / tl.where(parent >= 0, of_parent, 1.0)).to(STATE)
            enter_base = (switch * floor).to(STATE)
            source = state + c.to(tl.int64) * half_words * 32
            above = state + row_stride + tl.maximum(parent, 0).to(tl.int64) * half_words * 32
            ref_t, alt_t, square_t = (
                tl.zeros((WORDS, 32), STATE), tl.zeros((WORDS, 32), STATE), tl.zeros((WORDS, 32), STATE),
            )  # fmt: skip
            for word in range(0, half_words, WORDS):
                at = word + tl.arange(0, WORDS)
                columns = at[:, None] * 32 + tl.arange(0, 32)[None, :]
                inside = columns < half_words * 32
                was, now = _unpacked(bits_ptr, behind, half_words, at), _unpacked(bits_ptr, site, half_words, at)
                value = _base(base, columns, inside, k, UNIFORM) * enter_base
                value += tl.load(above + columns, mask=inside & (parent >= 0), other=0.0) * enter
                value += tl.load(source + columns, mask=inside, other=0.0) * tl.where(was == 1, by_1, by_0)
                tl.store(source + row_stride + columns, value, mask=inside)
                alt_t += tl.where(now == 1, value, 0.0)
                ref_t += tl.where(now == 1, 0.0, value)
                square_t += value * value
            ref, alt = tl.sum(ref_t).to(tl.float64), tl.sum(alt_t).to(tl.float64)
            refs, alts = tl.where(own, ref, refs), tl.where(own, alt, alts)
            tl.store(sums + sums_row_stride + 2 * c, ref)
            tl.store(sums + sums_row_stride + 2 * c + 1, alt)
            if PREDICT:
                ref_0, ref_1 = _seen(0, tl.load(mismatch_ptr + rates + site))
                out = (n * (stop_site - first_site) + site - first_site) * chains + c
                odds = (ref * ref_1 + alt * ref_0) / (ref * ref_0 + alt * ref_1)
                tl.store(logit_ptr + out, tl.log(odds).to(tl.float32))
                tl.store(donors_ptr + out, ((ref + alt) * (ref + alt) / tl.sum(square_t).to(tl.float64)).to(tl.float32))
            tl.debug_barrier()  # children, and this chain a site on, may read what another thread wrote
        state += row_stride
        sums += sums_row_stride


@triton.jit
def bank_retreat_kernel(
    bits_ptr, target_ptr, switch_ptr, mismatch_ptr, parent_ptr, floor_ptr, wanted_ptr, base_ptr, state_ptr, sums_ptr,
    back_ptr, carry_ptr, switched_ptr, differs_ptr,
    first_site, stop_site, sites, half_words, k, chains, wanted, base_stride, state_stride, row_stride, sums_stride,
    WORDS: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Backward from stop_site-1 to first_site, program (target, wanted chain). wanted int32 (W,); state (N, rows, C, width)
    and sums (N, rows, C, 2) of bank_walk_kernel, row 0 now that of `first_site`; back (N, W, width): emission times backward
    state of the site after; carry float64 (N, W, 2): by which the backward state of a site is back * carry[0] + carry[1].
    Writes switched and differs float32 (N, C, L)."""
    STATE = state_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    c = tl.load(wanted_ptr + tl.program_id(1)).to(tl.int64)
    parent, floor = tl.load(parent_ptr + c), tl.load(floor_ptr + c)
    above = tl.maximum(parent, 0).to(tl.int64)
    row = n * wanted + tl.program_id(1)
    back, base = back_ptr + row * half_words * 32, base_ptr + n * base_stride
    scale, each = tl.load(carry_ptr + 2 * row), tl.load(carry_ptr + 2 * row + 1)
    for step in range(0, stop_site - first_site):
        site = stop_site - 1 - step
        state = state_ptr + n * state_stride + _wide(site - first_site) * row_stride
        sums = sums_ptr + n * sums_stride + _wide(site - first_site) * chains * 2
        allele = tl.load(target_ptr + n * sites + site).to(tl.int32)
        switch = tl.where(site > 0, tl.load(switch_ptr + c * sites + site), 1.0)
        seen_0, seen_1 = _seen(allele, tl.load(mismatch_ptr + c * sites + site))
        ref_t, alt_t, parent_t, base_t = (
            tl.zeros((WORDS, 32), STATE), tl.zeros((WORDS, 32), STATE), tl.zeros((WORDS, 32), STATE),
            tl.zeros((WORDS, 32), STATE),
        )  # fmt: skip
        for word in range(0, half_words, WORDS):
            at = word + tl.arange(0, WORDS)
            columns = at[:, None] * 32 + tl.arange(0, 32)[None, :]
            inside = columns < half_words * 32
            bit = _unpacked(bits_ptr, site, half_words, at)
            own = _base(base, columns, inside, k, UNIFORM)
            b = tl.load(back + columns, mask=inside, other=0.0) * scale.to(STATE)
            b += tl.where(own > 0.0, each.to(STATE), 0.0)  # an excluded one would grow without bounds
            b *= tl.where(bit == 1, seen_1.to(STATE), seen_0.to(STATE))
            tl.store(back + columns, b, mask=inside)
            weight = tl.load(state + c * half_words * 32 + columns, mask=inside, other=0.0) * b
            alt_t += tl.where(bit == 1, weight, 0.0)
            ref_t += tl.where(bit == 1, 0.0, weight)
            held = inside & (parent >= 0)
            parent_t += tl.load(state + above * half_words * 32 + columns, mask=held, other=0.0) * b
            base_t += own * b
        ref, alt = tl.sum(ref_t).to(tl.float64), tl.sum(alt_t).to(tl.float64)
        of_parent = tl.load(sums + 2 * above) + tl.load(sums + 2 * above + 1)
        entered = (1.0 - floor) * tl.sum(parent_t).to(tl.float64) / of_parent
        entered = switch * (floor * tl.sum(base_t).to(tl.float64) + entered) / (ref + alt)
        out = (n * chains + c) * sites + site
        tl.store(switched_ptr + out, entered.to(tl.float32))
        differs = tl.where(allele == 1, ref, tl.where(allele == 0, alt, 0.0)) / (ref + alt)
        tl.store(differs_ptr + out, differs.to(tl.float32))
        scale, each = (1.0 - switch) / (ref + alt), entered
        tl.debug_barrier()
    tl.store(carry_ptr + 2 * row, scale)
    tl.store(carry_ptr + 2 * row + 1, each)
