"""A bank of copying chains over one target, site by site, on the CPU: what each chain foretells of the next allele.

Between sites a chain's state p is the probability of copying each haplotype at the site ahead, its allele unseen: one pass over
the haplotypes takes in the allele of the site behind, moves on, and sums p by the allele that each haplotype has
at the site ahead, so that both outcomes are known to full relative accuracy before either is seen. Chains that others
descend from come first; their p is what the others enter by.

Each (target, chain) is walked directly over the packed bits, as in `numba_direct`: where the entry probabilities change
with every site, haplotypes that look alike over a block cannot be walked as one (`condense`).
"""

# mypy: disable-error-code="no-untyped-def"
# Functions compiled by Numba carry no annotations: their types are those of their arguments.

from __future__ import annotations

import numpy as np
from numba import njit

from engine.kernels.haplotype_hmm.lanes import BYTES, add, choose, item, load, mul, muladd, splat, store, total, zeros


@njit(cache=True, nogil=True)
def advance(state, parent, base, bits, behind, ahead, by_0, by_1, enter, enter_base):
    """state = state * (by_1 where the bit behind is set, else by_0) + parent * enter + base * enter_base, in place.

    Returns the sums of the new state where the bit ahead is set, where it is not, and of its squares, in float64.
    """
    lanes = BYTES // state.itemsize
    by_0_v, by_1_v = splat(state, by_0), splat(state, by_1)
    enter_v, base_v = splat(state, enter), splat(state, enter_base)
    zero = splat(state, state.dtype.type(0))
    alt_0, alt_1, ref_0, ref_1, square_0, square_1 = zero, zero, zero, zero, zero, zero
    for step in range(len(state) // (2 * lanes)):
        i = 2 * step
        shift = np.uint64((i * lanes) & 63)
        was = item(bits, behind + ((i * lanes) >> 6)) >> shift
        now = item(bits, ahead + ((i * lanes) >> 6)) >> shift
        width = np.uint64(lanes)
        value_0 = muladd(load(base, i), base_v, mul(load(parent, i), enter_v))
        value_1 = muladd(load(base, i + 1), base_v, mul(load(parent, i + 1), enter_v))
        value_0 = muladd(load(state, i), choose(was, by_1_v, by_0_v), value_0)
        value_1 = muladd(load(state, i + 1), choose(was >> width, by_1_v, by_0_v), value_1)
        store(state, i, value_0)
        store(state, i + 1, value_1)
        alt_0, ref_0 = choose(now, add(alt_0, value_0), alt_0), choose(now, ref_0, add(ref_0, value_0))
        now >>= width
        alt_1, ref_1 = choose(now, add(alt_1, value_1), alt_1), choose(now, ref_1, add(ref_1, value_1))
        square_0, square_1 = muladd(value_0, value_0, square_0), muladd(value_1, value_1, square_1)
    return total(add(alt_0, alt_1)), total(add(ref_0, ref_1)), total(add(square_0, square_1))


@njit(cache=True, nogil=True)
def advance_plain(state, base, bits, behind, ahead, by_0, by_1, enter_base):
    """`advance` of a chain that enters by `base` alone."""
    lanes = BYTES // state.itemsize
    by_0_v, by_1_v, base_v = splat(state, by_0), splat(state, by_1), splat(state, enter_base)
    zero = splat(state, state.dtype.type(0))
    alt_0, alt_1, ref_0, ref_1, square_0, square_1 = zero, zero, zero, zero, zero, zero
    for step in range(len(state) // (2 * lanes)):
        i = 2 * step
        shift = np.uint64((i * lanes) & 63)
        was = item(bits, behind + ((i * lanes) >> 6)) >> shift
        now = item(bits, ahead + ((i * lanes) >> 6)) >> shift
        width = np.uint64(lanes)
        value_0 = muladd(load(state, i), choose(was, by_1_v, by_0_v), mul(load(base, i), base_v))
        value_1 = muladd(load(state, i + 1), choose(was >> width, by_1_v, by_0_v), mul(load(base, i + 1), base_v))
        store(state, i, value_0)
        store(state, i + 1, value_1)
        alt_0, ref_0 = choose(now, add(alt_0, value_0), alt_0), choose(now, ref_0, add(ref_0, value_0))
        now >>= width
        alt_1, ref_1 = choose(now, add(alt_1, value_1), alt_1), choose(now, ref_1, add(ref_1, value_1))
        square_0, square_1 = muladd(value_0, value_0, square_0), muladd(value_1, value_1, square_1)
    return total(add(alt_0, alt_1)), total(add(ref_0, ref_1)), total(add(square_0, square_1))


@njit(cache=True, nogil=True)
def walk(
    begin, end, bits, words, k, target_nl, switch_cl, mismatch_cl, parent_c, floor_c, exclude_ne, first, stop,
    state_nck, sums_nct, logit_nlc, donors_nlc,
):  # fmt: skip
    """Predictions for sites first .. stop-1 of targets begin .. end-1, from their states before site `first`."""
    chains = len(parent_c)
    like = state_nck[:0, 0, 0]
    number = like.dtype.type
    for n in range(begin, end):
        base = zeros(like, 64 * words // (BYTES // like.itemsize))
        base[:k] = 1
        for excluded in exclude_ne[n]:
            if excluded >= 0:
                base[excluded] = 0
        left = 0.0
        for j in range(k):
            left += base[j]
        base *= number(1.0 / left)
        for site in range(first, stop):
            behind = max(0, site - 1)
            allele = np.uint8(255) if site == 0 else target_nl[n, behind]
            for c in range(chains):
                switch = 1.0 if site == 0 else switch_cl[c, site]
                wrong = mismatch_cl[c, behind]
                seen_0 = 1.0 - wrong if allele == 0 else wrong if allele == 1 else 1.0
                seen_1 = 1.0 - wrong if allele == 1 else wrong if allele == 0 else 1.0
                alt, ref = sums_nct[n, c, 1], sums_nct[n, c, 0]
                keep = 0.0 if switch >= 1.0 else (1.0 - switch) / (alt * seen_1 + ref * seen_0)
                by_0, by_1 = number(keep * seen_0), number(keep * seen_1)
                state = state_nck[n, c]
                if parent_c[c] >= 0:
                    parent = parent_c[c]
                    scale = 1.0 / (sums_nct[n, parent, 0] + sums_nct[n, parent, 1])
                    alt, ref, square = advance(
                        state, state_nck[n, parent], base, bits, behind * words, site * words, by_0, by_1,
                        number(switch * (1.0 - floor_c[c]) * scale), number(switch * floor_c[c]),
                    )  # fmt: skip
                else:
                    alt, ref, square = advance_plain(
                        state, base, bits, behind * words, site * words, by_0, by_1, number(switch)
                    )
                sums_nct[n, c, 0], sums_nct[n, c, 1] = ref, alt
                wrong = mismatch_cl[c, site]
                is_alt, is_ref = alt * (1.0 - wrong) + ref * wrong, ref * (1.0 - wrong) + alt * wrong
                logit_nlc[n, site - first, c] = np.log(is_alt / is_ref)
                donors_nlc[n, site - first, c] = (alt + ref) * (alt + ref) / square
