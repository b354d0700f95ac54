"""The likelihood of a few targets on the CPU, haplotype by haplotype: match masks straight from the packed bits.

One site is one fused pass over the states: load, f * keep + prior * enter, times the mismatch odds where the bits
differ, store, add up. The division by the sum of site l is folded into `keep` of site l+1, so that each state is touched
once per site. A condensed panel (see `condense`) is less work, but cutting it takes as long as a few targets do here.
Targets run in parallel.
"""

# mypy: disable-error-code="no-untyped-def"
# Functions compiled by Numba carry no annotations: their types are those of their arguments.

from __future__ import annotations

import numpy as np
from numba import njit

from engine.kernels.haplotype_hmm.lanes import (
    BYTES,
    add,
    item,
    load,
    mul,
    mul_where,
    muladd,
    splat,
    store,
    total,
    zeros,
)


@njit(cache=True, nogil=True)
def advance(state, prior, each, evenly, bits, at, flip, keep, enter, odds):
    """All states by one site, four vectors a step; their sum in float64.

    The first `evenly` steps enter by `each`, the others by their own prior. Bits start at word `at`; where one
    differs from `flip` the state is multiplied by `odds`.
    """
    lanes = BYTES // state.itemsize
    width = np.uint64(lanes)
    keep_v, enter_v, odds_v = splat(state, keep), splat(state, enter), splat(state, odds)
    each_v = mul(enter_v, splat(state, each))
    zero = splat(state, state.dtype.type(0))
    sum_0, sum_1, sum_2, sum_3 = zero, zero, zero, zero
    for step in range(evenly):
        i = 4 * step
        word = (item(bits, at + ((i * lanes) >> 6)) ^ flip) >> np.uint64((i * lanes) & 63)
        value_0 = mul_where(word, np.uint64(0), muladd(load(state, i), keep_v, each_v), odds_v)
        value_1 = mul_where(word, width, muladd(load(state, i + 1), keep_v, each_v), odds_v)
        value_2 = mul_where(word, 2 * width, muladd(load(state, i + 2), keep_v, each_v), odds_v)
        value_3 = mul_where(word, 3 * width, muladd(load(state, i + 3), keep_v, each_v), odds_v)
        store(state, i, value_0)
        store(state, i + 1, value_1)
        store(state, i + 2, value_2)
        store(state, i + 3, value_3)
        sum_0, sum_1, sum_2, sum_3 = (
            add(sum_0, value_0), add(sum_1, value_1), add(sum_2, value_2), add(sum_3, value_3),
        )  # fmt: skip
    for i in range(4 * evenly, len(state) // lanes):
        word = item(bits, at + ((i * lanes) >> 6)) ^ flip
        mixed = muladd(load(state, i), keep_v, mul(load(prior, i), enter_v))
        value = mul_where(word, np.uint64((i * lanes) & 63), mixed, odds_v)
        store(state, i, value)
        sum_0, sum_1, sum_2, sum_3 = sum_1, sum_2, sum_3, add(sum_0, value)
    return total(add(add(sum_0, sum_1), add(sum_2, sum_3)))


@njit(cache=True, nogil=True)
def log_likelihood(
    begin, end, reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, uniform, like, result_n
):
    """Log-likelihoods into result_n; `like` is an empty array of the dtype of the states."""
    sites, words = reference_lw.shape
    number = like.dtype.type
    bits = reference_lw.reshape(-1)
    one = ~np.uint64(0)
    lanes = BYTES // like.itemsize
    evenly = (words - 1) * (64 // (4 * lanes)) if uniform else 0
    for n in range(begin, end):
        prior, state = zeros(like, 64 * words // lanes), zeros(like, 64 * words // lanes)
        own_k = prior_k.copy()
        for excluded in exclude_ne[n]:
            if excluded >= 0:
                own_k[excluded] = 0.0
        own_k /= own_k.sum()
        prior[:k] = own_k.astype(like.dtype)
        each = number(own_k.max())  # what all have that are not excluded, where that is used
        log_total, product, scale = 0.0, 1.0, 1.0
        for site in range(sites):
            allele, mismatch = target_nl[n, site], mismatch_l[site]
            switch = switch_l[site] if site > 0 else 1.0
            # what most paths do, to stay and to copy rightly, has weight 1: a rounded constant would be wrong L times
            factor = 1.0 - switch if switch < 1.0 else 1.0
            keep, enter = (1.0 - switch) / factor / scale, switch / factor
            flip, odds = (one if allele == 1 else np.uint64(0)), 1.0
            if allele != 255 and mismatch < 1.0:
                odds = mismatch / (1.0 - mismatch)
                factor *= 1.0 - mismatch
            elif allele != 255:  # only states that differ remain
                flip, odds = ~flip, 0.0
            scale = advance(
                state, prior, each, evenly, bits, site * words, flip, number(keep), number(enter), number(odds)
            )
            for excluded in exclude_ne[n]:
                if excluded >= 0:  # at most what entered it just now
                    scale -= state[excluded]
                    state[excluded] = 0
            if not scale > 0.0:
                log_total = -np.inf
                break
            if product * scale * factor < 1e-200:  # logs are dear: many sites share one
                log_total += np.log(product)
                product = 1.0
            product *= scale * factor
        result_n[n] = log_total + np.log(product)
