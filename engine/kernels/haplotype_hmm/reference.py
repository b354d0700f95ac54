"""The copying model straight from its recursions, in float64 NumPy: the specification the fast versions are held to.

States are laid out as in the door: (A, K) here, flattened to a * K + k in what is returned. Without an ancestry chain
A is 1 and its switch is 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Chain(NamedTuple):
    """What one target moves by: alleles_lk uint8, target_l uint8, switch_l, mismatch_l, redraw_l (of the group),
    prior_a, prior_ak, each row of sum 1."""

    alleles_lk: np.ndarray
    target_l: np.ndarray
    switch_l: np.ndarray
    mismatch_l: np.ndarray
    redraw_l: np.ndarray
    prior_a: np.ndarray
    prior_ak: np.ndarray


def unpack(bits_lw: np.ndarray, k: int) -> np.ndarray:
    """uint8 (L, k) alleles of packed bits (little-endian bit order)."""
    return np.unpackbits(bits_lw.astype("<u8", copy=False).view(np.uint8), axis=1, bitorder="little")[:, :k]


def chains(
    reference_lw: np.ndarray,
    k: int,
    target_nl: np.ndarray,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    prior_k: np.ndarray | None,
    exclude_ne: np.ndarray | None,
    ancestry: Any,
) -> list[Chain]:
    """The chain of each target, its excluded states with prior 0."""
    alleles_lk = unpack(reference_lw, k)
    made = []
    for n, target_l in enumerate(target_nl):
        prior_ak = np.full((1, k), 1.0 / k) if prior_k is None else prior_k[None].copy()
        prior_a, redraw_l = np.ones(1), np.zeros(len(switch_l))
        if ancestry is not None:
            prior_ak, prior_a, redraw_l = ancestry.prior_ak.copy(), ancestry.prior_a, ancestry.switch_l
        if exclude_ne is not None:
            prior_ak[:, exclude_ne[n][exclude_ne[n] >= 0]] = 0
        prior_ak = prior_ak / prior_ak.sum(axis=1, keepdims=True)
        made.append(Chain(alleles_lk, target_l, switch_l, mismatch_l, redraw_l, prior_a, prior_ak))
    return made


def emission(chain: Chain, site: int) -> np.ndarray:
    """e_l(k) of one site: 1 - mismatch on a match, mismatch otherwise, 1 where the target is missing."""
    allele, mismatch = chain.target_l[site], chain.mismatch_l[site]
    if allele == 255:
        return np.ones(chain.alleles_lk.shape[1])
    return np.where(chain.alleles_lk[site] == allele, 1 - mismatch, mismatch)


def forward(chain: Chain) -> tuple[np.ndarray, np.ndarray]:
    """Scaled forward states (L, A, K), each site of sum 1, and the normalisers (L,), whose logs sum to the result."""
    sites = len(chain.target_l)
    states = np.full((sites, *chain.prior_ak.shape), np.nan)
    scale = np.zeros(sites)
    before = chain.prior_a[:, None] * chain.prior_ak
    for site in range(sites):
        if site > 0:
            switch, redraw = chain.switch_l[site], chain.redraw_l[site]
            of_group_a = states[site - 1].sum(axis=1)
            enter_a = (1 - redraw) * switch * of_group_a + redraw * chain.prior_a * of_group_a.sum()
            before = (1 - redraw) * (1 - switch) * states[site - 1] + enter_a[:, None] * chain.prior_ak
        state = emission(chain, site) * before
        scale[site] = state.sum()
        if scale[site] == 0:
            break
        states[site] = state / scale[site]
    return states, scale


def backward(chain: Chain) -> tuple[np.ndarray, np.ndarray]:
    """Backward states (L, A, K) over the states of prior > 0, scaled at each site to a prior mean of 1, and the logs
    (L,) of what they were divided by: exp(log) * state is the probability of all later alleles given the state."""
    sites = len(chain.target_l)
    allowed = chain.prior_ak > 0
    states, logs = np.empty((sites, *chain.prior_ak.shape)), np.zeros(sites)
    if sites:
        states[-1] = allowed
    for site in range(sites - 2, -1, -1):
        switch, redraw = chain.switch_l[site + 1], chain.redraw_l[site + 1]
        seen = emission(chain, site + 1) * states[site + 1]
        of_group_a = (chain.prior_ak * seen).sum(axis=1)
        enter_a = (1 - redraw) * switch * of_group_a + redraw * (chain.prior_a @ of_group_a)
        state = ((1 - redraw) * (1 - switch) * seen + enter_a[:, None]) * allowed
        mean = chain.prior_a @ (chain.prior_ak * state).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            states[site] = state / mean
            logs[site] = logs[site + 1] + np.log(mean)
    return states, logs


def log_likelihood(
    reference_lw: np.ndarray,
    k: int,
    target_nl: np.ndarray,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    *,
    prior_k: np.ndarray | None = None,
    exclude_ne: np.ndarray | None = None,
    ancestry: Any = None,
    dtype: Any = np.float64,
) -> np.ndarray:
    """As the door's `log_likelihood`; `dtype` is always float64."""
    made = chains(reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, ancestry)
    with np.errstate(divide="ignore"):
        return np.array([np.log(forward(chain)[1]).sum() for chain in made], dtype=np.float64)


def states(
    reference_lw: np.ndarray,
    k: int,
    target_nl: np.ndarray,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    site_s: np.ndarray,
    *,
    direction: str,
    prior_k: np.ndarray | None = None,
    exclude_ne: np.ndarray | None = None,
    ancestry: Any = None,
    dtype: Any = np.float64,
) -> tuple[np.ndarray, np.ndarray]:
    """As the door's `forward_states` and `backward_states`."""
    made = chains(reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, ancestry)
    groups = 1 if ancestry is None else len(ancestry.prior_a)
    found, logs = np.empty((len(made), len(site_s), groups * k)), np.empty((len(made), len(site_s)))
    for n, chain in enumerate(made):
        all_states, scale = forward(chain)
        with np.errstate(divide="ignore"):
            all_logs = np.cumsum(np.log(scale))
        if direction == "backward":
            possible = (scale > 0).all()
            all_states, all_logs = backward(chain)
            if not possible:
                all_states[:], all_logs[:] = np.nan, -np.inf
        found[n] = all_states[site_s].reshape(len(site_s), -1)
        logs[n] = all_logs[site_s]
    return found, logs


def bank_predict(
    reference_lw: np.ndarray,
    k: int,
    target_nl: np.ndarray,
    bank: Any,
    *,
    exclude_ne: np.ndarray | None,
    state: Any,
    first_site: int,
    stop_site: int,
) -> tuple[np.ndarray, np.ndarray]:
    """As the door's `bank_predict`."""
    alleles_lk = unpack(reference_lw, k)
    shape = (len(target_nl), stop_site - first_site, len(bank.parent_c))
    logit_nlc, donors_nlc = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for n, target_l in enumerate(target_nl):
        uniform_k = np.ones(k)
        if exclude_ne is not None:
            uniform_k[exclude_ne[n][exclude_ne[n] >= 0]] = 0
        uniform_k /= uniform_k.sum()
        p_ck = state.state_nck[n, :, :k].astype(np.float64)
        for site in range(first_site, stop_site):
            for c, parent in enumerate(bank.parent_c):
                draw_k, switch = uniform_k, 1.0
                if parent >= 0:
                    draw_k = (1 - bank.floor_c[c]) * p_ck[parent] + bank.floor_c[c] * uniform_k
                f_k = np.zeros(k)
                if site > 0:
                    switch, wrong = bank.switch_cl[c, site], bank.mismatch_cl[c, site - 1]
                    seen_k = np.where(alleles_lk[site - 1] == target_l[site - 1], 1 - wrong, wrong)
                    f_k = p_ck[c] * (seen_k if target_l[site - 1] != 255 else 1.0)
                    f_k /= f_k.sum()
                p_ck[c] = (1 - switch) * f_k + switch * draw_k
                wrong = bank.mismatch_cl[c, site]
                is_alt, is_ref = (p_ck[c] @ np.where(alleles_lk[site] == allele, 1 - wrong, wrong) for allele in (1, 0))
                logit_nlc[n, site - first_site, c] = np.log(is_alt / is_ref)
                donors_nlc[n, site - first_site, c] = 1 / (p_ck[c] ** 2).sum()
        state.state_nck[n, :, :k] = p_ck
        if stop_site > first_site:
            state.sums_nct[n, :, 1] = p_ck @ alleles_lk[stop_site - 1]
            state.sums_nct[n, :, 0] = p_ck @ (1 - alleles_lk[stop_site - 1])
    return logit_nlc, donors_nlc


def bank_counts(
    reference_lw: np.ndarray,
    k: int,
    target_nl: np.ndarray,
    bank: Any,
    *,
    exclude_ne: np.ndarray | None,
    wanted_c: np.ndarray,
    dtype: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As the door's `bank_counts`: forward and backward with the transitions (1 - r) [k = k'] + r g(k') written out."""
    alleles_lk = unpack(reference_lw, k)
    n, sites, chains = *target_nl.shape, len(bank.parent_c)
    switch_ncl, mismatch_ncl = np.zeros((n, chains, sites), np.float32), np.zeros((n, chains, sites), np.float32)
    nats_nc = np.zeros((n, chains))
    for i, target_l in enumerate(target_nl):
        uniform_k = np.ones(k)
        if exclude_ne is not None:
            uniform_k[exclude_ne[i][exclude_ne[i] >= 0]] = 0
        uniform_k /= uniform_k.sum()
        ahead_clk = np.zeros((chains, sites, k))
        for c, parent in enumerate(bank.parent_c):
            draw_lk = np.tile(uniform_k, (sites, 1))
            if parent >= 0:
                draw_lk = (1 - bank.floor_c[c]) * ahead_clk[parent] + bank.floor_c[c] * draw_lk
            switch_l, wrong_l = bank.switch_cl[c].copy(), bank.mismatch_cl[c][:, None]
            switch_l[0] = 1
            emission_lk = np.where(alleles_lk == target_l[:, None], 1 - wrong_l, wrong_l)
            emission_lk[target_l == 255] = 1
            after_lk, b_lk = np.zeros((sites, k)), np.tile(1.0 * (uniform_k > 0), (sites, 1))
            for site in range(sites):
                ahead_clk[c, site] = switch_l[site] * draw_lk[site]
                if site > 0:
                    ahead_clk[c, site] += (1 - switch_l[site]) * after_lk[site - 1]
                seen_k = ahead_clk[c, site] * emission_lk[site]
                nats_nc[i, c] += np.log(seen_k.sum())
                after_lk[site] = seen_k / seen_k.sum()
            for site in range(sites - 1, -1, -1):
                seen_k = emission_lk[site] * b_lk[site]
                weight_k, entered = ahead_clk[c, site] * seen_k, switch_l[site] * (draw_lk[site] @ seen_k)
                switch_ncl[i, c, site] = entered / weight_k.sum()
                if target_l[site] != 255:
                    mismatch_ncl[i, c, site] = weight_k[alleles_lk[site] != target_l[site]].sum() / weight_k.sum()
                if site > 0:
                    b_lk[site - 1] *= ((1 - switch_l[site]) * seen_k + entered) / weight_k.sum()
        nats_nc[i, ~wanted_c], switch_ncl[i, ~wanted_c], mismatch_ncl[i, ~wanted_c] = 0, 0, 0
    return switch_ncl, mismatch_ncl, nats_nc


def _posterior(chain: Chain) -> np.ndarray:
    """float64 (L, A, K), each site of sum 1; NaN for an impossible target."""
    forward_states, scale = forward(chain)
    if (scale == 0).any():
        return np.full(forward_states.shape, np.nan)
    gamma = forward_states * backward(chain)[0]
    return gamma / gamma.sum(axis=(1, 2), keepdims=True)


def posterior(
    reference_lw: np.ndarray,
    k: int,
    target_nl: np.ndarray,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    *,
    prior_k: np.ndarray | None = None,
    exclude_ne: np.ndarray | None = None,
    ancestry: Any = None,
    dtype: Any = np.float64,
) -> np.ndarray:
    """As the door's `posterior`."""
    made = chains(reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, ancestry)
    groups = 1 if ancestry is None else len(ancestry.prior_a)
    result = np.empty((*target_nl.shape, groups * k))
    for n, chain in enumerate(made):
        result[n] = _posterior(chain).reshape(len(switch_l), -1)
    return result


def posterior_sums(
    reference_lw: np.ndarray,
    k: int,
    target_nl: np.ndarray,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    *,
    label_k: np.ndarray | None = None,
    labels: int = 0,
    top: int = 0,
    prior_k: np.ndarray | None = None,
    exclude_ne: np.ndarray | None = None,
    ancestry: Any = None,
    dtype: Any = np.float64,
) -> tuple[np.ndarray | None, ...]:
    """As the door's `posterior_sums`, its fields in order.

    A switch between l-1 and l has posterior weight (1 - redraw_l) switch_l sum_a F_{l-1}(a) G_l(a) and a redraw of the
    group redraw_l F_{l-1} sum_a prior(a) G_l(a), with F(a) = sum_k f(a,k) and G_l(a) = sum_k prior_a(k) e_l(k) b_l(a,k),
    out of the weight of everything, sum f_{l-1} b_{l-1}.
    """
    made = chains(reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, ancestry)
    groups = 1 if ancestry is None else len(ancestry.prior_a)
    n, sites = target_nl.shape
    log_likelihood_n = np.empty(n)
    dosage_nl, mismatch_nl, switch_nl, redraw_nl = (np.zeros((n, sites)) for _ in range(4))
    ancestry_nla, label_nlg = np.zeros((n, sites, groups)), np.zeros((n, sites, labels))
    top_state_nlm, top_weight_nlm = np.full((n, sites, top), -1, np.int32), np.zeros((n, sites, top))
    for i, chain in enumerate(made):
        gamma = _posterior(chain)
        forward_states, scale = forward(chain)
        backward_states, _ = backward(chain)
        with np.errstate(divide="ignore"):
            log_likelihood_n[i] = np.log(scale).sum()
        for site in range(sites):
            of_state = gamma[site].sum(axis=0)
            alleles = chain.alleles_lk[site]
            dosage_nl[i, site] = of_state @ alleles
            if chain.target_l[site] != 255:
                mismatch_nl[i, site] = of_state @ (alleles != chain.target_l[site])
            else:
                mismatch_nl[i, site] = 0 * of_state.sum()  # NaN for an impossible target
            ancestry_nla[i, site] = gamma[site].sum(axis=1)
            for label in range(labels):
                label_nlg[i, site, label] = of_state[label_k == label].sum()
            flat = gamma[site].reshape(-1)
            order = np.argsort(-flat, kind="stable")[:top]
            top_weight_nlm[i, site, : len(order)] = flat[order]
            top_state_nlm[i, site, : len(order)] = np.where(flat[order] > 0, order, -1)
            if site > 0:
                seen = emission(chain, site) * backward_states[site]
                of_group_a = (chain.prior_ak * seen).sum(axis=1)
                before_a = forward_states[site - 1].sum(axis=1)
                switch, redraw = chain.switch_l[site], chain.redraw_l[site]
                stayed = (1 - redraw) * (1 - switch) * (forward_states[site - 1] * seen).sum()
                switched = (1 - redraw) * switch * (before_a @ of_group_a)
                redrawn = redraw * before_a.sum() * (chain.prior_a @ of_group_a)
                everything = stayed + switched + redrawn
                with np.errstate(invalid="ignore"):  # an impossible target
                    switch_nl[i, site] = switched / everything
                    redraw_nl[i, site] = redrawn / everything
    return (
        log_likelihood_n, dosage_nl, mismatch_nl, switch_nl,
        redraw_nl if ancestry is not None else None, ancestry_nla if ancestry is not None else None,
        label_nlg if labels else None, top_state_nlm if top else None, top_weight_nlm if top else None,
    )  # fmt: skip


def posterior_paths(
    reference_lw: np.ndarray,
    k: int,
    target_nl: np.ndarray,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    uniforms_nl: np.ndarray,
    *,
    prior_k: np.ndarray | None = None,
    exclude_ne: np.ndarray | None = None,
    ancestry: Any = None,
    dtype: Any = np.float64,
) -> np.ndarray:
    """As the door's `posterior_paths`.

    Given z = (a, k) at site l+1, the state at l is z itself with weight (1-s)(1-r) f_l(z); or the haplotype was drawn
    anew, weight (1-s) r prior_a(k) F_l(a), and the state is drawn from f_l(a, .); or the group was, weight
    s prior(a) prior_a(k) F_l, and the state is drawn from all f_l. One uniform decides all of it: what it leaves over
    after a choice is uniform again.
    """
    made = chains(reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, ancestry)
    paths = np.full(target_nl.shape, -1, dtype=np.int32)
    for n, chain in enumerate(made):
        states, scale = forward(chain)
        if (scale == 0).any():
            continue
        for site in range(len(scale) - 1, -1, -1):
            left = uniforms_nl[n, site]
            first, stop = 0, states[site].size
            if site + 1 < len(scale):
                here = int(paths[n, site + 1])
                a, state = divmod(here, k)
                switch, redraw = chain.switch_l[site + 1], chain.redraw_l[site + 1]
                stay = (1 - redraw) * (1 - switch) * states[site, a, state]
                change = (1 - redraw) * switch * chain.prior_ak[a, state] * states[site, a].sum()
                anew = redraw * chain.prior_a[a] * chain.prior_ak[a, state] * states[site].sum()
                left = left * (stay + change + anew) - stay
                if left < 0 or change + anew == 0:
                    paths[n, site] = here
                    continue
                if left < change or anew == 0:
                    left /= change
                    first, stop = a * k, (a + 1) * k
                else:
                    left = (left - change) / anew
            mass = np.cumsum(states[site].reshape(-1)[first:stop])
            drawn = np.searchsorted(mass, left * mass[-1], side="right")
            last = np.flatnonzero(states[site].reshape(-1)[first:stop])[-1]
            paths[n, site] = first + min(drawn, last)
    return paths


def materialise(
    reference_lw: np.ndarray,
    k: int,
    segment_offset_n: np.ndarray,
    segment_start_s: np.ndarray,
    segment_donor_s: np.ndarray,
    flip_offset_n: np.ndarray,
    flip_site_f: np.ndarray,
    *,
    first_site: int = 0,
) -> np.ndarray:
    """As the door's `materialise`: at each site take the donor's allele, invert it where a flip is listed, pack."""
    alleles_lk = unpack(reference_lw, k)
    sites, n_haplotypes = len(alleles_lk), len(segment_offset_n) - 1
    made_ln = np.zeros((sites, 64 * ((n_haplotypes + 63) // 64)), dtype=np.uint8)
    for n in range(n_haplotypes):
        own = slice(segment_offset_n[n], segment_offset_n[n + 1])
        segment = np.searchsorted(segment_start_s[own], np.arange(first_site, first_site + sites), side="right") - 1
        made_ln[:, n] = alleles_lk[np.arange(sites), segment_donor_s[own][segment]]
        flips = flip_site_f[flip_offset_n[n] : flip_offset_n[n + 1]] - first_site
        made_ln[flips[(flips >= 0) & (flips < sites)], n] ^= 1
    return np.packbits(made_ln, axis=1, bitorder="little").view("<u8").astype(np.uint64)
