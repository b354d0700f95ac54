"""Copying paths drawn from their posterior, on the CPU: forward by vectors of targets, then backward a target at a time.

Forward states are kept before every stretch of blocks; a stretch is walked again when its paths are drawn, with alpha and
c of each of its sites left behind, so that a state of any site is one multiply-add away. A path that stays costs that one
state; only where it changes are the states of the site looked through.
"""

# mypy: disable-error-code="no-untyped-def"
# Functions compiled by Numba carry no annotations: their types are those of their arguments.

from __future__ import annotations

import numpy as np
from numba import njit

from engine.kernels.haplotype_hmm.lanes import BYTES, zeros
from engine.kernels.haplotype_hmm.numba_lanes import (
    class_weights,
    gather_group,
    largest_step,
    next_state,
    put_record,
    start_walk,
    take_record,
    walk_block,
)


@njit(cache=True, nogil=True)
def keep_stretches(condensed, moves, group, prior_ak, like, stride, kept, kept_mass, kept_record, walk):
    """Forward through everything; states, their sums by class and F_a from before every `stride`-th block are kept."""
    groups, k = prior_ak.shape
    lanes = BYTES // like.itemsize
    blocks = len(condensed.row_b)
    most = largest_step(condensed.offset_b)
    alpha, c, state = zeros(like, most), zeros(like, groups * most), zeros(like, groups * k)
    mass, record = zeros(like, groups * most), zeros(like, 0)
    for block in range(blocks):
        if block % stride == 0:
            kept[block // stride] = state
            classes = condensed.offset_b[block + 1] - condensed.offset_b[block]
            kept_mass[block // stride, : groups * classes * lanes] = mass[: groups * classes * lanes]
            put_record(kept_record, block // stride, walk)
        weight = class_weights(condensed, moves, group, block, prior_ak, like)
        walk_block(condensed, moves, group, block, alpha, c, False, mass, weight, walk, record)
        if block + 1 < blocks:
            mass = next_state(condensed, moves, group, block, state, state, alpha, c, 0)


@njit(cache=True, nogil=True)
def walk_stretch(
    condensed, moves, group, prior_ak, stretch, stride, kept, kept_mass, kept_record,
    state_b, mass_b, record_b, walk,
):  # fmt: skip
    """States, sums by class and F_a from before each block of a stretch."""
    groups, like = len(prior_ak), kept_mass[0]
    lanes = BYTES // like.itemsize
    begin, end = stretch * stride, min(len(condensed.row_b), (stretch + 1) * stride)
    most = largest_step(condensed.offset_b)
    alpha, c, record = zeros(like, most), zeros(like, groups * most), zeros(like, 0)
    state_b[0] = kept[stretch]
    mass_b[0] = kept_mass[stretch]
    take_record(kept_record, stretch, walk)
    for block in range(begin, end):
        put_record(record_b, block - begin, walk)
        if block + 1 < end:
            weight = class_weights(condensed, moves, group, block, prior_ak, like)
            walk_block(condensed, moves, group, block, alpha, c, False, mass_b[block - begin], weight, walk, record)
            mass = next_state(
                condensed, moves, group, block, state_b[block - begin], state_b[block - begin + 1], alpha, c, 0
            )
            classes = condensed.offset_b[block + 2] - condensed.offset_b[block + 1]
            mass_b[block - begin + 1, : groups * classes * lanes] = mass[: groups * classes * lanes]


@njit(cache=True, nogil=True)
def draw(state, prior, alpha, c, slot, class_k, classes, groups, first_a, stop_a, lanes, t, absent_x, goal):
    """First state, in order a * K + k, at which the summed states of lane t pass `goal`; the last possible one if none."""
    k, mass, last = len(class_k), 0.0, -1
    for a in range(first_a, stop_a):
        c_at = (slot * groups + a) * classes
        x = 0
        for j in range(k):
            if x < len(absent_x) and absent_x[x] == j:
                x += 1
                continue
            u = np.intp(class_k[j])
            value = state[(a * k + j) * lanes + t] * alpha[(slot * classes + u) * lanes + t]
            value += prior[a * k + j] * c[(c_at + u) * lanes + t]
            mass += value
            if value > 0:
                last = a * k + j
                if mass > goal:
                    return last
    return last


@njit(cache=True, nogil=True)
def posterior_paths(begin, end, condensed, moves, target_nl, exclude_ne, prior_ak, like, uniforms_nl, stride, path_nl):
    """Paths into path_nl, -1 where the target is impossible."""
    lanes = BYTES // like.itemsize
    groups, k = prior_ak.shape
    blocks, sites = len(condensed.row_b), target_nl.shape[1]
    stretches = (blocks + stride - 1) // stride
    for i in range(begin, end):
        group = gather_group(target_nl, exclude_ne, prior_ak, i * lanes, like)
        used = min(lanes, len(target_nl) - i * lanes)
        most = largest_step(condensed.offset_b)
        longest = largest_step(condensed.block_b)
        kept = zeros(like, stretches * groups * k).reshape(stretches, -1)
        kept_mass = zeros(like, stretches * groups * most).reshape(stretches, -1)
        kept_record = zeros(like, stretches * (groups + 1))
        walk = start_walk(groups, like)
        keep_stretches(condensed, moves, group, prior_ak, like, stride, kept, kept_mass, kept_record, walk)
        state_b = zeros(like, stride * groups * k).reshape(stride, -1)
        mass_b = zeros(like, stride * groups * most).reshape(stride, -1)
        record_b = zeros(like, stride * (groups + 1))
        alpha, c = zeros(like, (longest + 1) * most), zeros(like, (longest + 1) * groups * most)
        record = zeros(like, (longest + 1) * (groups + 1))
        dead_t = walk.dead_t.copy()
        absent_xt = [group.excluded_x[group.allowed_xt[t::lanes] == 0] for t in range(lanes)]
        here_t = np.full(lanes, -1, np.int64)
        for stretch in range(stretches - 1, -1, -1):
            walk_stretch(
                condensed, moves, group, prior_ak, stretch, stride, kept, kept_mass, kept_record,
                state_b, mass_b, record_b, walk,
            )  # fmt: skip
            for block in range(min(blocks, (stretch + 1) * stride) - 1, stretch * stride - 1, -1):
                at = block - stretch * stride
                state, class_k = state_b[at], condensed.class_bk[condensed.row_b[block]]
                take_record(record_b, at, walk)
                weight = class_weights(condensed, moves, group, block, prior_ak, like)
                walk_block(condensed, moves, group, block, alpha, c, True, mass_b[at], weight, walk, record)
                classes = condensed.offset_b[block + 1] - condensed.offset_b[block]
                first = condensed.block_b[block]
                for t in range(used):
                    if dead_t[t]:
                        continue
                    here = here_t[t]
                    for site in range(condensed.block_b[block + 1] - 1, first - 1, -1):
                        slot = site - first + 1
                        left = uniforms_nl[i * lanes + t, site]
                        first_a, stop_a = 0, groups
                        if site + 1 < sites:
                            a = here // k
                            j = here - a * k
                            u = np.intp(class_k[j])
                            switch, redraw = moves.switch_l[site + 1], moves.redraw_l[site + 1]
                            prior = np.float64(moves.prior_ak[here]) * group.scale_at[a * lanes + t]
                            value = state[here * lanes + t] * np.float64(alpha[(slot * classes + u) * lanes + t])
                            value += moves.prior_ak[here] * np.float64(
                                c[((slot * groups + a) * classes + u) * lanes + t]
                            )
                            row = slot * (groups + 1) * lanes + t
                            stay = (1 - redraw) * (1 - switch) * value
                            change = (1 - redraw) * switch * prior * record[row + a * lanes]
                            anew = redraw * moves.prior_a[a] * prior * record[row + groups * lanes]
                            left = left * (stay + change + anew) - stay
                            if left < 0 or change + anew == 0:
                                path_nl[i * lanes + t, site] = here
                                continue
                            if left < change or anew == 0:
                                left /= change
                                first_a, stop_a = a, a + 1
                            else:
                                left = (left - change) / anew
                        total = 0.0
                        for a in range(first_a, stop_a):
                            total += record[(slot * (groups + 1) + a) * lanes + t]
                        here = draw(
                            state, moves.prior_ak, alpha, c, slot, class_k, classes, groups, first_a, stop_a, lanes, t,
                            absent_xt[t], left * total,
                        )  # fmt: skip
                        path_nl[i * lanes + t, site] = here
                    here_t[t] = here
