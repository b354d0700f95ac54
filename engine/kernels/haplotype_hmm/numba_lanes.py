"""The copying model on the CPU, a vector of targets at a time over a condensed panel.

A lane is a target: sixteen in float32, eight in float64. All that a step does is the same in every lane, so that
nothing is gathered, summed across or masked: the alleles of a class choose between two emission vectors.

Forward over one block with classes u (see `condense`): a state is f(a,k) = f0(a,k) * alpha_u + prior_a(k) * c_{a,u}. At
each site
    alpha_u <- e_u keep alpha_u,    c_{a,u} <- e_u (keep c_{a,u} + enter_a),
    F_a = sum_u mass_{a,u} alpha_u + weight_{a,u} c_{a,u},
with mass the sum of f0 and weight that of the prior over a class; keep holds the division by the last site's sum, and
enter_a = (1-s) r F_a + s prior(a) of normalised F. Only at the end of a block are all haplotypes touched, when f is written out
and summed by the next block's classes. Backward is the same recursion with h = e b in place of f: h(a,k) = h1(a,k) beta_u +
d_{a,u}, summed against the prior.

A haplotype that a target may not copy is kept at 0 in that lane. A class without any weight in a lane can outgrow float
range while it multiplies zeros, so alpha and c stop at a large number.

Targets are dealt out to threads by the vector.
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
)

LARGEST_32, LARGEST_64 = 1e30, 1e290  # where alpha, c and their backward fellows stop


class Moves(NamedTuple):
    """switch_l, mismatch_l, redraw_l (of the group), prior_a: float64. prior_ak, possible_ak: (A * K,) in the dtype of
    the states, the prior, each group's of sum 1, and 1 where it is not 0. weight_ac: float64 (A, C), prior of each class;
    members_ac: int32 (A, C), its haplotypes of prior > 0."""

    switch_l: np.ndarray
    mismatch_l: np.ndarray
    redraw_l: np.ndarray
    prior_a: np.ndarray
    prior_ak: np.ndarray
    possible_ak: np.ndarray
    weight_ac: np.ndarray
    members_ac: np.ndarray


class Group(NamedTuple):
    """Targets of one vector. one_l, zero_l: uint64 (L,), bit t set where the target of lane t has that allele.
    excluded_x: int64 (X,), rising, what some lane's target may not copy; allowed_xt: (X * lanes,), 0 in those lanes, else 1.
    scale_at: (A * lanes,), 1 / the prior that is left."""

    one_l: np.ndarray
    zero_l: np.ndarray
    excluded_x: np.ndarray
    allowed_xt: np.ndarray
    scale_at: np.ndarray


@njit(cache=True, nogil=True)
def weigh(begin, end, condensed, prior_ak, weight_ac, members_ac):
    """Prior and number of haplotypes of prior > 0 in each class."""
    for b in range(begin, end):
        class_k = condensed.class_bk[condensed.row_b[b]]
        first, stop = condensed.offset_b[b], condensed.offset_b[b + 1]
        for a in range(len(weight_ac)):
            weight_ac[a, first:stop] = 0.0
            members_ac[a, first:stop] = 0
            for k in range(len(class_k)):
                if prior_ak[a, k] > 0.0:
                    weight_ac[a, first + class_k[k]] += prior_ak[a, k]
                    members_ac[a, first + class_k[k]] += 1


@njit(cache=True, nogil=True)
def largest_step(values):
    """Largest difference of neighbours."""
    largest = 0
    for i in range(len(values) - 1):
        largest = max(largest, values[i + 1] - values[i])
    return largest


@njit(cache=True, nogil=True)
def gather_group(target_nl, exclude_ne, prior_ak, first, like):
    """The `Group` of targets first .. first + lanes - 1; prior_ak float64 (A, K)."""
    lanes = BYTES // like.itemsize
    groups, k = prior_ak.shape
    used = min(lanes, len(target_nl) - first)
    one_l, zero_l = np.zeros(target_nl.shape[1], np.uint64), np.zeros(target_nl.shape[1], np.uint64)
    for t in range(used):
        for site in range(len(one_l)):
            one_l[site] |= np.uint64(target_nl[first + t, site] == 1) << np.uint64(t)
            zero_l[site] |= np.uint64(target_nl[first + t, site] == 0) << np.uint64(t)
    listed = np.full(used * exclude_ne.shape[1], k, np.int64)
    for t in range(used):
        for j in range(exclude_ne.shape[1]):
            if exclude_ne[first + t, j] >= 0:
                listed[t * exclude_ne.shape[1] + j] = exclude_ne[first + t, j]
    listed.sort()
    different = 0
    for j in range(len(listed)):
        if listed[j] < k and (j == 0 or listed[j] != listed[j - 1]):
            listed[different] = listed[j]
            different += 1
    excluded_x = listed[:different].copy()
    allowed_xt = np.ones((len(excluded_x), lanes), like.dtype)
    scale_at = zeros(like, groups)
    scale_at[:] = 1
    for t in range(used):
        for state in exclude_ne[first + t]:
            for x in range(different):
                if excluded_x[x] == state:
                    allowed_xt[x, t] = 0
        for a in range(groups):
            left = 1.0
            for x in range(len(excluded_x)):
                if allowed_xt[x, t] == 0:
                    left -= prior_ak[a, excluded_x[x]]
            if left < 1e-6:  # too little is left to be had by subtraction
                left = 0.0
                x = 0
                for state in range(k):
                    if x < len(excluded_x) and excluded_x[x] == state:
                        left += prior_ak[a, state] * allowed_xt[x, t]
                        x += 1
                    else:
                        left += prior_ak[a, state]
            scale_at[a * lanes + t] = 1.0 / left
    return Group(one_l, zero_l, excluded_x, allowed_xt.ravel(), scale_at)


@njit(cache=True, nogil=True)
def class_weights(condensed, moves, group, block, prior_ak, like):
    """(A * U * lanes,): prior of the block's classes, less what each lane's target may not copy."""
    lanes = BYTES // like.itemsize
    groups = len(moves.prior_a)
    first, classes = condensed.offset_b[block], condensed.offset_b[block + 1] - condensed.offset_b[block]
    class_k = condensed.class_bk[condensed.row_b[block]]
    weight = zeros(like, groups * classes)
    for a in range(groups):
        for u in range(classes):
            store(weight, a * classes + u, splat(like, like.dtype.type(moves.weight_ac[a, first + u])))
        if len(group.excluded_x):
            for t in range(lanes):
                for x in range(len(group.excluded_x)):
                    state = group.excluded_x[x]
                    if group.allowed_xt[x * lanes + t] == 0 and prior_ak[a, state] > 0.0:
                        u = class_k[state]
                        left, members = moves.weight_ac[a, first + u], moves.members_ac[a, first + u]
                        for other in range(len(group.excluded_x)):  # all that this lane lacks of the class
                            absent = group.allowed_xt[other * lanes + t] == 0 and class_k[group.excluded_x[other]] == u
                            if absent and prior_ak[a, group.excluded_x[other]] > 0.0:
                                left -= prior_ak[a, group.excluded_x[other]]
                                members -= 1
                        weight[(a * classes + u) * lanes + t] = max(left, 0.0) if members > 0 else 0.0
    return weight


class Walk(NamedTuple):
    """Where a vector of targets stands between two sites, and scratch. of_group_at: (A * lanes,), F_a as summed;
    mantissa_t float64 and exponent_t int64: the likelihood so far is mantissa * 2 ** exponent; dead_t: bool, it is 0."""

    of_group_at: np.ndarray
    mantissa_t: np.ndarray
    exponent_t: np.ndarray
    dead_t: np.ndarray
    step: np.ndarray
    enter: np.ndarray
    sum_t: np.ndarray


@njit(cache=True, nogil=True)
def start_walk(groups, like):
    lanes = BYTES // like.itemsize
    return Walk(
        zeros(like, groups), np.ones(lanes), np.zeros(lanes, np.int64), np.zeros(lanes, np.bool_),
        zeros(like, 2), zeros(like, 2 * groups), zeros(like, 1),
    )  # fmt: skip


@njit(cache=True, nogil=True)
def count_bits(sum_t, factor, seen_factor, seen, mantissa_t, exponent_t):
    """mantissa * 2 ** exponent times sum * factor, and seen_factor in the lanes of `seen`. Logs are dear: the mantissa is
    kept in [1, 2), and exponents are counted."""
    bits_t = mantissa_t.view(np.int64)
    for t in range(len(bits_t)):
        mantissa_t[t] *= sum_t[t] * (factor * seen_factor if (seen >> np.uint64(t)) & np.uint64(1) else factor)
    for t in range(len(bits_t)):
        exponent_t[t] += (bits_t[t] >> 52) - 1023
        bits_t[t] = (bits_t[t] & 0xFFFFFFFFFFFFF) | (1023 << 52)


@njit(cache=True, nogil=True)
def walked_n(walk, used):
    """Log-likelihoods of the first lanes."""
    log_t = np.empty(used)
    for t in range(used):
        log_t[t] = np.log(walk.mantissa_t[t]) + walk.exponent_t[t] * np.log(2.0)
        if walk.dead_t[t]:
            log_t[t] = -np.inf
    return log_t


@njit(cache=True, nogil=True)
def step_classes(alpha, c, alpha_to, c_to, classes, a, mass, weight, pattern_c, bit, step, enter, of_group_at):
    """One site for all classes of group `a`: alpha (with a = 0 only) and c into alpha_to and c_to, and the new F_a."""
    number = alpha.dtype.type
    bound = splat(alpha, number(LARGEST_32 if alpha.itemsize == 4 else LARGEST_64))
    total, entered = splat(alpha, number(0)), splat(alpha, number(0))
    shift = np.uint64(bit)
    for u in range(classes):
        allele = np.intp((item(pattern_c, u) >> shift) & np.uint64(1))
        by = load(step, allele)
        if a == 0:
            alpha_u = smaller(mul(load(alpha, u), by), bound)
            store(alpha_to, u, alpha_u)
        else:
            alpha_u = load(alpha_to, u)
        c_u = smaller(muladd(load(c, u), by, load(enter, allele)), bound)
        store(c_to, u, c_u)
        total = muladd(load(mass, u), alpha_u, total)
        entered = muladd(load(weight, u), c_u, entered)
    store(of_group_at, a, add(total, entered))


@njit(cache=True, nogil=True)
def walk_site(condensed, moves, group, block, site, alpha, c, before, after, mass, weight, walk):
    """Forward by one site: the classes, F_a and the likelihood so far."""
    number, groups, lanes = alpha.dtype.type, len(moves.prior_a), BYTES // alpha.itemsize
    one, zero = group.one_l[site], group.zero_l[site]
    # what most paths do, to stay and to copy rightly, has weight 1: a rounded constant would be wrong L times over
    right, wrong = 1.0 - moves.mismatch_l[site], moves.mismatch_l[site]
    seen_factor = right if right > 0.0 else wrong
    same, other = splat(alpha, number(right / seen_factor)), splat(alpha, number(wrong / seen_factor))
    unseen = splat(alpha, number(1))
    if_0 = choose(zero, same, choose(one, other, unseen))
    if_1 = choose(one, same, choose(zero, other, unseen))
    switch, redraw = (1.0, 1.0) if site == 0 else (moves.switch_l[site], moves.redraw_l[site])
    stay = (1.0 - redraw) * (1.0 - switch)
    factor = stay if stay > 0.0 else 1.0
    last = larger(load(walk.sum_t, 0), splat(alpha, number(1e-37 if alpha.itemsize == 4 else 1e-300)))
    keep = div(splat(alpha, number(stay / factor)), last)
    store(walk.step, 0, mul(keep, if_0))
    store(walk.step, 1, mul(keep, if_1))
    change = div(splat(alpha, number((1.0 - redraw) * switch / factor)), last)
    for a in range(groups):
        anew = splat(alpha, number(redraw * moves.prior_a[a] / factor))
        enter = mul(muladd(load(walk.of_group_at, a), change, anew), load(group.scale_at, a))
        store(walk.enter, 2 * a, mul(enter, if_0))
        store(walk.enter, 2 * a + 1, mul(enter, if_1))
    first, classes = condensed.offset_b[block], condensed.offset_b[block + 1] - condensed.offset_b[block]
    bit = site - condensed.block_b[block]
    total = splat(alpha, number(0))
    for a in range(groups):
        c_at, c_to = (before * groups + a) * classes * lanes, (after * groups + a) * classes * lanes
        step_classes(
            alpha[before * classes * lanes :], c[c_at:], alpha[after * classes * lanes :], c[c_to:], classes, a,
            mass[a * classes * lanes :], weight[a * classes * lanes :], condensed.pattern_c[first:], bit, walk.step,
            walk.enter[2 * a * lanes :], walk.of_group_at,
        )  # fmt: skip
        total = add(total, load(walk.of_group_at, a))
    store(walk.sum_t, 0, total)
    for t in range(len(walk.dead_t)):
        walk.dead_t[t] |= not walk.sum_t[t] > 0
    count_bits(walk.sum_t, factor, seen_factor, one | zero, walk.mantissa_t, walk.exponent_t)


@njit(cache=True, nogil=True)
def write_out(state, new, prior, alpha, c, class_k, even, odd, next_k, begin, end):
    """new = state * alpha + prior * c over haplotypes begin .. end-1, summed by the next block's classes.

    The two tables of sums are used in turn: neighbours tend to be of one class, and one sum cannot be added to faster
    than what was written can be read again.
    """
    for k in range(begin, end - 1, 2):
        u, v = np.intp(item(class_k, k)), np.intp(item(next_k, k))
        mixed = mul(splat(state, item(prior, k)), load(c, u))
        value = muladd(load(state, k), load(alpha, u), mixed)
        store(new, k, value)
        store(even, v, add(load(even, v), value))
        u, v = np.intp(item(class_k, k + 1)), np.intp(item(next_k, k + 1))
        mixed = mul(splat(state, item(prior, k + 1)), load(c, u))
        value = muladd(load(state, k + 1), load(alpha, u), mixed)
        store(new, k + 1, value)
        store(odd, v, add(load(odd, v), value))
    if (end - begin) % 2 == 1:
        u, v = np.intp(item(class_k, end - 1)), np.intp(item(next_k, end - 1))
        mixed = mul(splat(state, item(prior, end - 1)), load(c, u))
        value = muladd(load(state, end - 1), load(alpha, u), mixed)
        store(new, end - 1, value)
        store(even, v, add(load(even, v), value))


@njit(cache=True, nogil=True)
def next_state(condensed, moves, group, block, state, new, alpha, c, slot):
    """States after the last site of `block`, and their sums by the next block's classes, (A * U' * lanes,)."""
    groups = len(moves.prior_a)
    k = condensed.class_bk.shape[1]
    lanes = BYTES // state.itemsize
    class_k, next_k = condensed.class_bk[condensed.row_b[block]], condensed.class_bk[condensed.row_b[block + 1]]
    classes = condensed.offset_b[block + 1] - condensed.offset_b[block]
    next_classes = condensed.offset_b[block + 2] - condensed.offset_b[block + 1]
    stride = groups * next_classes
    even, odd = zeros(state, stride), zeros(state, stride)
    excluded_x = group.excluded_x
    own_alpha = alpha[slot * classes * lanes :]
    for a in range(groups):
        begin, row, own = 0, a * k * lanes, slice(a * next_classes * lanes, (a + 1) * next_classes * lanes)
        own_c = c[(slot * groups + a) * classes * lanes :]
        for x in range(len(excluded_x) + 1):
            end = excluded_x[x] if x < len(excluded_x) else k
            write_out(
                state[row:], new[row:], moves.prior_ak[a * k :], own_alpha, own_c, class_k, even[own], odd[own], next_k,
                begin, end,
            )  # fmt: skip
            if x < len(excluded_x):  # one haplotype that some lane may not copy
                for t in range(lanes):
                    at, u = row + end * lanes + t, np.intp(class_k[end]) * lanes + t
                    value = state[at] * own_alpha[u] + moves.prior_ak[a * k + end] * own_c[u]
                    value *= group.allowed_xt[x * lanes + t]
                    new[at] = value
                    even[(a * next_classes + np.intp(next_k[end])) * lanes + t] += value
            begin = end + 1
    for v in range(stride):
        store(even, v, add(load(even, v), load(odd, v)))
    return even


@njit(cache=True, nogil=True)
def walk_block(condensed, moves, group, block, alpha, c, traced, mass, weight, walk, record):
    """Forward through the sites of one block. Traced: alpha and c after its i-th site are left in slot i + 1, and F_a and
    their sum at its vectors (i + 1) * (A + 1) .. of `record`; else only the last are left, in slot 0."""
    groups = len(moves.prior_a)
    classes = condensed.offset_b[block + 1] - condensed.offset_b[block]
    lanes = BYTES // alpha.itemsize
    alpha[: classes * lanes] = 1
    c[: groups * classes * lanes] = 0
    first = condensed.block_b[block]
    for site in range(first, condensed.block_b[block + 1]):
        before, after = (site - first, site - first + 1) if traced else (0, 0)
        if site == first and traced:
            put_record(record, 0, walk)
        walk_site(condensed, moves, group, block, site, alpha, c, before, after, mass, weight, walk)
        if traced:
            put_record(record, after, walk)


@njit(cache=True, nogil=True)
def put_record(record, slot, walk):
    """F_a and their sum as slot `slot`."""
    groups = walk.of_group_at.size // walk.sum_t.size
    for a in range(groups):
        store(record, slot * (groups + 1) + a, load(walk.of_group_at, a))
    store(record, slot * (groups + 1) + groups, load(walk.sum_t, 0))


@njit(cache=True, nogil=True)
def take_record(record, slot, walk):
    """The walk put back to where slot `slot` was recorded."""
    groups = walk.of_group_at.size // walk.sum_t.size
    for a in range(groups):
        store(walk.of_group_at, a, load(record, slot * (groups + 1) + a))
    store(walk.sum_t, 0, load(record, slot * (groups + 1) + groups))


@njit(cache=True, nogil=True)
def log_likelihood(begin, end, condensed, moves, target_nl, exclude_ne, prior_ak, like, result_n):
    """Log-likelihoods into result_n; `like` is an empty array of the dtype of the states."""
    lanes = BYTES // like.itemsize
    groups, k = prior_ak.shape
    blocks = len(condensed.row_b)
    for i in range(begin, end):
        group = gather_group(target_nl, exclude_ne, prior_ak, i * lanes, like)
        most = largest_step(condensed.offset_b)
        alpha, c, state = zeros(like, most), zeros(like, groups * most), zeros(like, groups * k)
        mass, record = zeros(like, groups * most), zeros(like, 0)
        walk = start_walk(groups, like)
        for block in range(blocks):
            weight = class_weights(condensed, moves, group, block, prior_ak, like)
            walk_block(condensed, moves, group, block, alpha, c, False, mass, weight, walk, record)
            if block + 1 < blocks:
                mass = next_state(condensed, moves, group, block, state, state, alpha, c, 0)
        used = min(lanes, len(target_nl) - i * lanes)
        result_n[i * lanes : i * lanes + used] = walked_n(walk, used)


@njit(cache=True, nogil=True)
def values_at(state, prior, alpha, c, class_k, begin, end, out):
    """out = state * alpha + prior * c over haplotypes begin .. end-1."""
    for k in range(begin, end):
        u = np.intp(item(class_k, k))
        mixed = mul(splat(state, item(prior, k)), load(c, u))
        store(out, k - begin, muladd(load(state, k), load(alpha, u), mixed))


@njit(cache=True, nogil=True)
def forward_states(begin, end, condensed, moves, target_nl, exclude_ne, prior_ak, like, slot_l, state_nsk, log_ns):
    """Scaled forward states, and the log-likelihood so far, at the sites whose slot_l is not -1."""
    lanes = BYTES // like.itemsize
    groups, k = prior_ak.shape
    blocks = len(condensed.row_b)
    for i in range(begin, end):
        group = gather_group(target_nl, exclude_ne, prior_ak, i * lanes, like)
        used = min(lanes, len(target_nl) - i * lanes)
        most = largest_step(condensed.offset_b)
        alpha, c, state = zeros(like, most), zeros(like, groups * most), zeros(like, groups * k)
        mass, out = zeros(like, groups * most), zeros(like, k)
        walk = start_walk(groups, like)
        for block in range(blocks):
            weight = class_weights(condensed, moves, group, block, prior_ak, like)
            classes = condensed.offset_b[block + 1] - condensed.offset_b[block]
            alpha[:] = 1
            c[:] = 0
            for site in range(condensed.block_b[block], condensed.block_b[block + 1]):
                walk_site(condensed, moves, group, block, site, alpha, c, 0, 0, mass, weight, walk)
                slot = slot_l[site]
                if slot < 0:
                    continue
                log_ns[i * lanes : i * lanes + used, slot] = walked_n(walk, used)
                class_k = condensed.class_bk[condensed.row_b[block]]
                for a in range(groups):
                    values_at(
                        state[a * k * lanes :],
                        moves.prior_ak[a * k :],
                        alpha,
                        c[a * classes * lanes :],
                        class_k,
                        0,
                        k,
                        out,
                    )
                    for t in range(used):
                        scale = np.nan if walk.dead_t[t] else 1.0 / walk.sum_t[t]
                        for j in range(k):
                            state_nsk[i * lanes + t, slot, a * k + j] = out[j * lanes + t] * scale
                        for x in range(len(group.excluded_x)):
                            state_nsk[i * lanes + t, slot, a * k + group.excluded_x[x]] *= group.allowed_xt[
                                x * lanes + t
                            ]
            if block + 1 < blocks:
                mass = next_state(condensed, moves, group, block, state, state, alpha, c, 0)
