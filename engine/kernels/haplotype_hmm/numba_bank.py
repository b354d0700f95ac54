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
def set_base(base, k, exclude_e):
    """The uniform prior over the haplotypes that are not excluded; returns how many there are."""
    base[:k] = 1
    left = k
    for excluded in exclude_e:
        if excluded >= 0 and base[excluded] > 0:
            base[excluded] = 0
            left -= 1
    base *= base.dtype.type(1.0 / left)
    return left


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
        set_base(base, k, exclude_ne[n])
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


@njit(cache=True, nogil=True)
def retreat(back, p, parent, base, bits, at, scale, each, seen_0, seen_1):
    """back = (back * scale + base * each) * (seen_1 where the bit is set, else seen_0), in place: b of a site to e b.

    What is not in the base stays 0: an excluded haplotype that alone agrees would grow without bounds. Returns, in float64,
    its sums against p where the bit is set and where it is not, against the parent and against the base.
    """
    lanes = BYTES // back.itemsize
    scale_v, each_v, seen_0_v, seen_1_v = (
        splat(back, scale),
        splat(back, each),
        splat(back, seen_0),
        splat(back, seen_1),
    )
    zero = splat(back, back.dtype.type(0))
    alt, ref, by_parent, by_base = zero, zero, zero, zero
    for i in range(len(back) // lanes):
        word = item(bits, at + ((i * lanes) >> 6)) >> np.uint64((i * lanes) & 63)
        prior = load(base, i)
        value = mul(muladd(prior, each_v, mul(load(back, i), scale_v)), choose(word, seen_1_v, seen_0_v))
        store(back, i, value)
        weight = load(p, i)
        alt, ref = choose(word, muladd(weight, value, alt), alt), choose(word, ref, muladd(weight, value, ref))
        by_parent = muladd(load(parent, i), value, by_parent)
        by_base = muladd(prior, value, by_base)
    return total(alt), total(ref), total(by_parent), total(by_base)


@njit(cache=True, nogil=True)
def counts(
    begin, end, bits, words, k, target_nl, switch_cl, mismatch_cl, parent_c, floor_c, exclude_ne, wanted_c, stride,
    like, switch_ncl, mismatch_ncl, nats_nc,
):  # fmt: skip
    """Posterior probabilities of a switch before, and of a mismatch at, each site, of the chains `wanted_c`.

    States are kept before every `stride`-th site; a stretch is walked again before it is walked back.
    """
    chains, sites = switch_cl.shape
    stretches = (sites + stride - 1) // stride
    width = 64 * words
    number = like.dtype.type
    one_target, one_exclusion = np.empty((1, sites), np.uint8), np.empty((1, exclude_ne.shape[1]), np.int64)
    none = np.empty((1, 1, chains), np.float32)
    donors = np.empty((1, 1, chains), np.float32)
    kept_sc = zeros(like, stretches * chains * width // (BYTES // like.itemsize)).reshape(stretches, chains, width)
    kept_sums = np.empty((stretches, chains, 2))
    walked_pc = zeros(like, stride * chains * width // (BYTES // like.itemsize)).reshape(stride, chains, width)
    sums_pct = np.empty((stride, chains, 2))
    state = zeros(like, chains * width // (BYTES // like.itemsize)).reshape(1, chains, width)
    back_c = zeros(like, chains * width // (BYTES // like.itemsize)).reshape(chains, width)
    base = zeros(like, width // (BYTES // like.itemsize))
    for n in range(begin, end):
        one_target[0], one_exclusion[0] = target_nl[n], exclude_ne[n]
        left = set_base(base, k, exclude_ne[n])
        state[:] = 0
        sums = np.ones((1, chains, 2))
        for site in range(sites):
            if site % stride == 0:
                kept_sc[site // stride], kept_sums[site // stride] = state[0], sums[0]
            walk(
                0, 1, bits, words, k, one_target, switch_cl, mismatch_cl, parent_c, floor_c, one_exclusion, site, site + 1,
                state, sums, none, donors,
            )  # fmt: skip
        scale_c, each_c = np.zeros(chains), np.ones(chains)
        back_c[:] = 0
        nats_nc[n] = 0.0
        for stretch in range(stretches - 1, -1, -1):
            state[0], sums[0] = kept_sc[stretch], kept_sums[stretch]
            first, stop = stretch * stride, min(sites, (stretch + 1) * stride)
            for site in range(first, stop):
                walk(
                    0, 1, bits, words, k, one_target, switch_cl, mismatch_cl, parent_c, floor_c, one_exclusion, site,
                    site + 1, state, sums, none, donors,
                )  # fmt: skip
                walked_pc[site - first], sums_pct[site - first] = state[0], sums[0]
            for site in range(stop - 1, first - 1, -1):
                allele = target_nl[n, site]
                for c in range(chains):
                    if not wanted_c[c]:
                        continue
                    wrong, switch = mismatch_cl[c, site], 1.0 if site == 0 else switch_cl[c, site]
                    seen_0 = 1.0 - wrong if allele == 0 else wrong if allele == 1 else 1.0
                    seen_1 = 1.0 - wrong if allele == 1 else wrong if allele == 0 else 1.0
                    p, floor, parent = walked_pc[site - first, c], 1.0, base
                    if parent_c[c] >= 0:
                        parent, floor = walked_pc[site - first, parent_c[c]], floor_c[c]
                    alt, ref, by_parent, by_base = retreat(
                        back_c[c], p, parent, base, bits, site * words, number(scale_c[c]), number(each_c[c] * left),
                        number(seen_0), number(seen_1),
                    )  # fmt: skip
                    entered = floor * by_base
                    if parent_c[c] >= 0:
                        of_parent = sums_pct[site - first, parent_c[c]]
                        entered += (1.0 - floor) * by_parent / (of_parent[0] + of_parent[1])
                    weight = alt + ref
                    switch_ncl[n, c, site] = switch * entered / weight
                    mismatch_ncl[n, c, site] = (ref if allele == 1 else alt if allele == 0 else 0.0) / weight
                    scale_c[c], each_c[c] = (1.0 - switch) / weight, switch * entered / weight
                    of_state = sums_pct[site - first, c]
                    nats_nc[n, c] += np.log((of_state[0] * seen_0 + of_state[1] * seen_1) / (of_state[0] + of_state[1]))
