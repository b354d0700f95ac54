"""Posterior of the copying model on the CPU, by vectors of targets over a condensed panel, and what is summed from it.

Backward walks h = e b by class as forward walks f (see `numba_lanes`). With f = f0 alpha + prior c and
b = h1 beta + d, the posterior of a class is
    alpha beta sum(f0 h1) + alpha d sum(f0) + c beta sum(prior h1) + c d sum(prior),
four sums over its haplotypes that are made once per block. So dosages, groups and expected counts cost no more per site
than the classes do; only the single states of a site (the most likely ones, or all) are evaluated haplotype by haplotype.

Forward states are kept before every stretch of blocks and walked again from there, as for paths.
"""

# mypy: disable-error-code="no-untyped-def"
# Functions compiled by Numba carry no annotations: their types are those of their arguments.

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from engine.kernels.haplotype_hmm.lanes import (
    BYTES,
    add,
    any_above,
    choose,
    div,
    item,
    larger,
    load,
    mul,
    muladd,
    smaller,
    splat,
    store,
    zeros,
)  # fmt: skip
from engine.kernels.haplotype_hmm.numba_lanes import (
    LARGEST_32,
    LARGEST_64,
    class_weights,
    count_bits,
    gather_group,
    largest_step,
    start_walk,
    take_record,
    values_at,
    walk_block,
    walked_n,
)  # fmt: skip
from engine.kernels.haplotype_hmm.numba_paths import keep_stretches, walk_stretch

CHUNK = 64  # haplotypes evaluated at a time where single states are wanted


class Wanted(NamedTuple):
    """Outputs, each of size 0 where it is not wanted. *_nl (N, L): dosage, expected mismatches, switches, redraws.
    ancestry_nla (N, L, A); label_nlg (N, L, G); top_state_nlm int32 and top_weight_nlm (N, L, M); every_nls (N, L, A * K);
    backward states at the sites whose slot_l is not -1, (N, S, A * K), and their logs (N, S). log_n (N,)."""

    dosage_nl: np.ndarray
    mismatch_nl: np.ndarray
    switch_nl: np.ndarray
    redraw_nl: np.ndarray
    ancestry_nla: np.ndarray
    label_nlg: np.ndarray
    top_state_nlm: np.ndarray
    top_weight_nlm: np.ndarray
    every_nls: np.ndarray
    slot_l: np.ndarray
    backward_nss: np.ndarray
    backward_log_ns: np.ndarray
    log_n: np.ndarray


class Back(NamedTuple):
    """Where the backward walk stands. b of the site before is keep * h + enter; of_group_at: G_a, the prior mean of h;
    joint, reverse: (A * U,) sums of f0 h1 and prior h1 over classes; beta (U,), d (A * U,). likely: F_a G_a scaled as
    `switch` of the site after and the same for redraws, still to be divided by the weight of everything."""

    keep: np.ndarray
    enter: np.ndarray
    of_group_at: np.ndarray
    joint: np.ndarray
    reverse: np.ndarray
    beta: np.ndarray
    d: np.ndarray
    before_beta: np.ndarray
    before_d: np.ndarray
    gamma: np.ndarray
    allele_sum: np.ndarray
    emission: np.ndarray
    mean_t: np.ndarray
    pending: np.ndarray
    mantissa_t: np.ndarray
    exponent_t: np.ndarray


@njit(cache=True, nogil=True)
def start_back(groups, most, labels, like):
    lanes = BYTES // like.itemsize
    back = Back(
        zeros(like, 1), zeros(like, groups), zeros(like, groups), zeros(like, groups * most),
        zeros(like, groups * most), zeros(like, most), zeros(like, groups * most), zeros(like, most),
        zeros(like, groups * most), zeros(like, most), zeros(like, 2 * groups), zeros(like, 2), zeros(like, 1),
        zeros(like, 2), np.ones(lanes), np.zeros(lanes, np.int64),
    )  # fmt: skip
    back.keep[:] = 1
    return back


@njit(cache=True, nogil=True)
def fold_back(h, possible, prior, kept, beta, d, class_k, joint, reverse, next_k, begin, end):
    """h = h * beta + possible * d over haplotypes begin .. end-1, and its sums against the states `kept`
    before the next (earlier) block and against the prior, by that block's classes."""
    for k in range(begin, end):
        u, v = np.intp(item(class_k, k)), np.intp(item(next_k, k))
        value = muladd(load(h, k), load(beta, u), mul(splat(h, item(possible, k)), load(d, u)))
        store(h, k, value)
        store(joint, v, muladd(load(kept, k), value, load(joint, v)))
        store(reverse, v, muladd(splat(h, item(prior, k)), value, load(reverse, v)))


@njit(cache=True, nogil=True)
def enter_block(condensed, moves, group, h, kept, block, later, back):
    """h before the first site of block `later` (`later` = -1: h is set to 1), summed by the classes of `block`."""
    groups = len(moves.prior_a)
    k = condensed.class_bk.shape[1]
    lanes = BYTES // h.itemsize
    next_k = condensed.class_bk[condensed.row_b[block]]
    classes = condensed.offset_b[block + 1] - condensed.offset_b[block]
    back.joint[: groups * classes * lanes] = 0
    back.reverse[: groups * classes * lanes] = 0
    class_k, later_classes = next_k, classes
    if later < 0:  # one class that multiplies 0 and adds 1
        back.beta[: classes * lanes] = 0
        back.d[: groups * classes * lanes] = 1
    else:
        class_k = condensed.class_bk[condensed.row_b[later]]
        later_classes = condensed.offset_b[later + 1] - condensed.offset_b[later]
    excluded_x = group.excluded_x
    for a in range(groups):
        begin, row, own = 0, a * k * lanes, a * classes * lanes
        d = back.d[a * later_classes * lanes :]
        for x in range(len(excluded_x) + 1):
            end = excluded_x[x] if x < len(excluded_x) else k
            fold_back(
                h[row:], moves.possible_ak[a * k :], moves.prior_ak[a * k :], kept[row:], back.beta, d, class_k,
                back.joint[own:], back.reverse[own:], next_k, begin, end,
            )  # fmt: skip
            if x < len(excluded_x):
                for t in range(lanes):
                    at, u = row + end * lanes + t, np.intp(class_k[end]) * lanes + t
                    value = h[at] * back.beta[u] + moves.possible_ak[a * k + end] * d[u]
                    value *= group.allowed_xt[x * lanes + t]
                    h[at] = value
                    to = own + np.intp(next_k[end]) * lanes + t
                    back.joint[to] += kept[at] * value
                    back.reverse[to] += moves.prior_ak[a * k + end] * value
            begin = end + 1
    back.beta[: classes * lanes] = 1
    back.d[: groups * classes * lanes] = 0


@njit(cache=True, nogil=True)
def back_classes(
    alpha, c, joint, reverse, mass, weight, pattern_c, bit, beta, before_beta, d, before_d, gamma, a, classes, back
):
    """Posterior of the classes of group `a` at one site, added to gamma; its sums by allele; h of the site and G_a."""
    number = alpha.dtype.type
    zero, bound = splat(alpha, number(0)), splat(alpha, number(LARGEST_32 if alpha.itemsize == 4 else LARGEST_64))
    keep, enter, emission = load(back.keep, 0), load(back.enter, a), back.emission
    with_0, everything, by_beta, by_d = zero, zero, zero, zero
    shift = np.uint64(bit)
    for u in range(classes):
        beta_u = smaller(mul(keep, load(beta, u)), bound) if a == 0 else load(before_beta, u)
        d_u = smaller(muladd(keep, load(d, u), enter), bound)
        alpha_u, c_u = load(alpha, u), load(c, u)
        reverse_u, weight_u = load(reverse, u), load(weight, u)
        forward = muladd(alpha_u, load(joint, u), mul(c_u, reverse_u))  # sum of f h1
        gamma_u = muladd(beta_u, forward, mul(d_u, muladd(alpha_u, load(mass, u), mul(c_u, weight_u))))
        allele = np.intp((item(pattern_c, u) >> shift) & np.uint64(1))
        everything = add(everything, gamma_u)
        with_0 = muladd(gamma_u, splat(alpha, number(1 - allele)), with_0)
        store(gamma, u, gamma_u if a == 0 else add(gamma_u, load(gamma, u)))
        by = load(emission, allele)
        store(before_d, u, d_u)
        if a == 0:
            store(before_beta, u, beta_u)
            store(beta, u, mul(beta_u, by))
        d_u = mul(d_u, by)
        store(d, u, d_u)
        by_beta, by_d = muladd(mul(beta_u, by), reverse_u, by_beta), muladd(d_u, weight_u, by_d)
    store(back.allele_sum, 2 * a, with_0)
    store(back.allele_sum, 2 * a + 1, everything)
    store(back.of_group_at, a, add(by_beta, by_d))


@njit(cache=True, nogil=True)
def back_site(moves, group, site, alpha, c, slot, classes, mass, weight, pattern_c, first, bit, back):
    """Posterior of the classes at one site, and h of it from b of it."""
    number, groups, lanes = alpha.dtype.type, len(moves.prior_a), BYTES // alpha.itemsize
    one, zero = group.one_l[site], group.zero_l[site]
    right, wrong = 1.0 - moves.mismatch_l[site], moves.mismatch_l[site]
    seen_factor = right if right > 0.0 else wrong
    same, other = splat(alpha, number(right / seen_factor)), splat(alpha, number(wrong / seen_factor))
    unseen = splat(alpha, number(1))
    store(back.emission, 0, choose(zero, same, choose(one, other, unseen)))
    store(back.emission, 1, choose(one, same, choose(zero, other, unseen)))
    total = splat(alpha, number(0))
    for a in range(groups):
        own = a * classes * lanes
        back_classes(
            alpha[slot * classes * lanes :], c[(slot * groups + a) * classes * lanes :], back.joint[own:],
            back.reverse[own:], mass[own:], weight[own:], pattern_c[first:], bit, back.beta, back.before_beta, back.d[own:],
            back.before_d[own:], back.gamma, a, classes, back,
        )  # fmt: skip
        of_group = mul(load(back.of_group_at, a), load(group.scale_at, a))
        store(back.of_group_at, a, of_group)
        total = muladd(of_group, splat(alpha, number(moves.prior_a[a])), total)
    total = larger(total, splat(alpha, number(1e-37 if alpha.itemsize == 4 else 1e-300)))
    store(back.mean_t, 0, total)


@njit(cache=True, nogil=True)
def back_move(moves, group, site, slot, record, back):
    """The step from `site` into the one before, after its h is summed up; the weight of staying, which was set to 1."""
    number, groups = record.dtype.type, len(moves.prior_a)
    switch, redraw = moves.switch_l[site], moves.redraw_l[site]
    factor = (1.0 - redraw) * (1.0 - switch)
    factor = factor if factor > 0.0 else 1.0
    change_v = splat(record, number((1.0 - redraw) * switch / factor))
    anew_v = splat(record, number(redraw / factor))
    mean = load(back.mean_t, 0)
    store(back.keep, 0, div(splat(record, number((1.0 - redraw) * (1.0 - switch) / factor)), mean))
    switched = splat(record, number(0))
    before = (slot - 1) * (groups + 1)
    for a in range(groups):
        of_group = div(load(back.of_group_at, a), mean)
        store(back.enter, a, muladd(change_v, of_group, anew_v))
        switched = muladd(of_group, load(record, before + a), switched)
    store(back.pending, 0, mul(change_v, switched))
    store(back.pending, 1, mul(anew_v, load(record, before + groups)))
    right = 1.0 - moves.mismatch_l[site]
    seen_factor = right if right > 0.0 else moves.mismatch_l[site]
    seen = group.one_l[site] | group.zero_l[site]
    count_bits(back.mean_t, factor, seen_factor, seen, back.mantissa_t, back.exponent_t)
    return factor


@njit(cache=True, nogil=True)
def write_sums(wanted, group, site, first_n, used, condensed, first, classes, label_sum, back, dead_t):
    """Dosage, expected counts and group sums of one site, from sums over its classes; the switches are into site + 1."""
    lanes = len(dead_t)
    groups = back.of_group_at.size // lanes
    labels = label_sum.size // lanes
    if labels:
        label_sum[:] = 0
        for u in range(classes):
            label = condensed.label_c[first + u]
            store(label_sum, label, add(load(label_sum, label), load(back.gamma, u)))
    for t in range(used):
        n = first_n + t
        with_0, everything = 0.0, 0.0
        for a in range(groups):
            with_0 += back.allele_sum[2 * a * lanes + t]
            everything += back.allele_sum[(2 * a + 1) * lanes + t]
        scale = np.nan if dead_t[t] else 1.0 / everything
        bit = np.uint64(1) << np.uint64(t)
        if wanted.dosage_nl.size:
            dosage = (everything - with_0) * scale
            wanted.dosage_nl[n, site] = dosage
            wanted.mismatch_nl[n, site] = 0 * scale
            if group.one_l[site] & bit:
                wanted.mismatch_nl[n, site] = with_0 * scale
            elif group.zero_l[site] & bit:
                wanted.mismatch_nl[n, site] = dosage
            if site + 1 < wanted.switch_nl.shape[1]:
                wanted.switch_nl[n, site + 1] = back.pending[t] * scale
            if wanted.redraw_nl.size and site + 1 < wanted.switch_nl.shape[1]:
                wanted.redraw_nl[n, site + 1] = back.pending[lanes + t] * scale
            if site == 0:
                wanted.switch_nl[n, 0] = 0 * scale
                if wanted.redraw_nl.size:
                    wanted.redraw_nl[n, 0] = 0 * scale
        if wanted.ancestry_nla.size:
            for a in range(groups):
                wanted.ancestry_nla[n, site, a] = back.allele_sum[(2 * a + 1) * lanes + t] * scale
        for label in range(labels):
            wanted.label_nlg[n, site, label] = label_sum[label * lanes + t] * scale


@njit(cache=True, nogil=True)
def write_logs(wanted, first_n, used, walk):
    """A function of its own: Numba loses what a parallel loop writes straight into the arrays of a tuple."""
    if wanted.log_n.size:
        wanted.log_n[first_n : first_n + used] = walked_n(walk, used)


@njit(cache=True, nogil=True)
def write_backward_logs(wanted, site, first_n, used, back, factor, dead_t):
    """What the backward states of a site are to be multiplied by, where they are wanted; `factor` is in the states."""
    slot = wanted.slot_l[site]
    if slot >= 0 and wanted.backward_log_ns.size:
        for t in range(used):
            log = np.log(back.mantissa_t[t]) + back.exponent_t[t] * np.log(2.0) - np.log(factor)
            wanted.backward_log_ns[first_n + t, slot] = -np.inf if dead_t[t] else log


@njit(cache=True, nogil=True)
def chunk_values(state, prior, alpha, c, class_k, begin, end, group, out):
    """values_at, with 0 where a lane's target may not copy the haplotype."""
    lanes = BYTES // state.itemsize
    values_at(state, prior, alpha, c, class_k, begin, end, out)
    for x in range(len(group.excluded_x)):
        if begin <= group.excluded_x[x] < end:
            for t in range(lanes):
                out[(group.excluded_x[x] - begin) * lanes + t] *= group.allowed_xt[x * lanes + t]


@njit(cache=True, nogil=True)
def write_states(
    wanted, group, moves, site, first_n, used, state, h, alpha, c, slot, classes, class_k, back, factor, dead_t,
    forward, backward, best_state_tm, best_weight_tm,
):  # fmt: skip
    """All that needs single states of one site: the likeliest ones, all of them, backward states."""
    lanes = len(dead_t)
    groups, k = len(moves.prior_a), len(class_k)
    top = best_state_tm.shape[1]
    floor = zeros(state, 1)
    scale_t = np.empty(lanes)
    for t in range(lanes):
        everything = 0.0
        for a in range(groups):
            everything += back.allele_sum[(2 * a + 1) * lanes + t]
        scale_t[t] = np.nan if dead_t[t] else 1.0 / everything
        # the states that were likeliest at the site after show what is worth a look here
        lowest = np.inf
        for m in range(top):
            here = best_state_tm[t, m]
            if here < 0:
                lowest = 0.0
                continue
            a, j = here // k, here % k
            u = np.intp(class_k[j])
            f = state[here * lanes + t] * alpha[(slot * classes + u) * lanes + t]
            f += moves.prior_ak[here] * c[((slot * groups + a) * classes + u) * lanes + t]
            b = h[here * lanes + t] * back.before_beta[u * lanes + t]
            b += moves.possible_ak[here] * back.before_d[(a * classes + u) * lanes + t]
            lowest = min(lowest, f * b)
            best_weight_tm[t, m], best_state_tm[t, m] = 0.0, -1
        floor[t] = 0.9999 * lowest if lowest > 0.0 and lowest < np.inf else 0.0
    kept = wanted.slot_l[site]
    for a in range(groups):
        row = a * k * lanes
        for begin in range(0, k, CHUNK):
            end = min(k, begin + CHUNK)
            chunk_values(
                h[row:], moves.possible_ak[a * k :], back.before_beta, back.before_d[a * classes * lanes :], class_k,
                begin, end, group, backward,
            )  # fmt: skip
            if kept >= 0 and wanted.backward_nss.size:
                for t in range(used):
                    for j in range(begin, end):
                        value = np.nan if dead_t[t] else backward[(j - begin) * lanes + t] * factor
                        wanted.backward_nss[first_n + t, kept, a * k + j] = value
            if top == 0 and wanted.every_nls.size == 0:
                continue
            chunk_values(
                state[row:], moves.prior_ak[a * k :], alpha[slot * classes * lanes :],
                c[(slot * groups + a) * classes * lanes :], class_k, begin, end, group, forward,
            )  # fmt: skip
            peak = splat(state, state.dtype.type(0))
            for j in range(end - begin):
                value = mul(load(forward, j), load(backward, j))
                store(forward, j, value)
                peak = larger(value, peak)
            if wanted.every_nls.size:
                for t in range(used):
                    for j in range(begin, end):
                        wanted.every_nls[first_n + t, site, a * k + j] = forward[(j - begin) * lanes + t] * scale_t[t]
            if top and any_above(peak, load(floor, 0)):
                for t in range(used):
                    for j in range(begin, end):
                        value = forward[(j - begin) * lanes + t]
                        if value > floor[t] and value > best_weight_tm[t, top - 1]:
                            m = top - 1
                            while m > 0 and best_weight_tm[t, m - 1] < value:
                                best_weight_tm[t, m] = best_weight_tm[t, m - 1]
                                best_state_tm[t, m] = best_state_tm[t, m - 1]
                                m -= 1
                            best_weight_tm[t, m], best_state_tm[t, m] = value, a * k + j
                    floor[t] = max(floor[t], best_weight_tm[t, top - 1])
    for t in range(used):
        for m in range(top):
            wanted.top_state_nlm[first_n + t, site, m] = -1 if dead_t[t] else best_state_tm[t, m]
            wanted.top_weight_nlm[first_n + t, site, m] = best_weight_tm[t, m] * scale_t[t]


@njit(cache=True, nogil=True)
def smooth(
    first_group, stop_group, condensed, moves, target_nl, exclude_ne, prior_ak, like, stride, labels, top, wanted
):
    """Forward, backward and what is wanted of them, into the arrays of `wanted`; NaN where the target is impossible."""
    lanes = BYTES // like.itemsize
    groups, k = prior_ak.shape
    blocks = len(condensed.row_b)
    stretches = (blocks + stride - 1) // stride
    single = top > 0 or wanted.every_nls.size > 0
    for i in range(first_group, stop_group):
        group = gather_group(target_nl, exclude_ne, prior_ak, i * lanes, like)
        used = min(lanes, len(target_nl) - i * lanes)
        most, longest = largest_step(condensed.offset_b), largest_step(condensed.block_b)
        kept = zeros(like, stretches * groups * k).reshape(stretches, -1)
        kept_mass = zeros(like, stretches * groups * most).reshape(stretches, -1)
        kept_record = zeros(like, stretches * (groups + 1))
        walk = start_walk(groups, like)
        keep_stretches(condensed, moves, group, prior_ak, like, stride, kept, kept_mass, kept_record, walk)
        write_logs(wanted, i * lanes, used, walk)
        dead_t = walk.dead_t.copy()
        state_b = zeros(like, stride * groups * k).reshape(stride, -1)
        mass_b = zeros(like, stride * groups * most).reshape(stride, -1)
        record_b = zeros(like, stride * (groups + 1))
        alpha, c = zeros(like, (longest + 1) * most), zeros(like, (longest + 1) * groups * most)
        record = zeros(like, (longest + 1) * (groups + 1))
        h, back = zeros(like, groups * k), start_back(groups, most, labels, like)
        label_sum, forward, backward = zeros(like, labels), zeros(like, CHUNK), zeros(like, CHUNK)
        best_state_tm, best_weight_tm = np.full((lanes, top), -1, np.int64), np.zeros((lanes, top))
        factor, later = 1.0, -1
        for stretch in range(stretches - 1, -1, -1):
            walk_stretch(
                condensed, moves, group, prior_ak, stretch, stride, kept, kept_mass, kept_record,
                state_b, mass_b, record_b, walk,
            )  # fmt: skip
            for block in range(min(blocks, (stretch + 1) * stride) - 1, stretch * stride - 1, -1):
                at = block - stretch * stride
                state, mass, class_k = state_b[at], mass_b[at], condensed.class_bk[condensed.row_b[block]]
                take_record(record_b, at, walk)
                weight = class_weights(condensed, moves, group, block, prior_ak, like)
                walk_block(condensed, moves, group, block, alpha, c, True, mass, weight, walk, record)
                enter_block(condensed, moves, group, h, state, block, later, back)
                first, begin = condensed.offset_b[block], condensed.block_b[block]
                classes = condensed.offset_b[block + 1] - first
                for site in range(condensed.block_b[block + 1] - 1, begin - 1, -1):
                    slot = site - begin + 1
                    back_site(
                        moves, group, site, alpha, c, slot, classes, mass, weight, condensed.pattern_c, first,
                        site - begin, back,
                    )  # fmt: skip
                    write_sums(wanted, group, site, i * lanes, used, condensed, first, classes, label_sum, back, dead_t)
                    write_backward_logs(wanted, site, i * lanes, used, back, factor, dead_t)
                    if single or wanted.slot_l[site] >= 0:
                        write_states(
                            wanted, group, moves, site, i * lanes, used, state, h, alpha, c, slot, classes, class_k,
                            back, factor, dead_t, forward, backward, best_state_tm, best_weight_tm,
                        )  # fmt: skip
                    if site > 0:
                        factor = back_move(moves, group, site, slot, record, back)
                later = block
