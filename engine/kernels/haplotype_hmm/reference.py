"""The copying model straight from its recursion, in float64 NumPy: the specification the fast versions are held to."""

from __future__ import annotations

import numpy as np


def unpack(bits_lw: np.ndarray, k: int) -> np.ndarray:
    """uint8 (L, k) alleles of packed bits (little-endian bit order)."""
    return np.unpackbits(bits_lw.astype("<u8", copy=False).view(np.uint8), axis=1, bitorder="little")[:, :k]


def target_prior(k: int, prior_k: np.ndarray | None, exclude_e: np.ndarray | None) -> np.ndarray:
    """Prior over the states that one target may copy, float64 (k,), sum 1."""
    prior = np.full(k, 1.0 / k) if prior_k is None else prior_k.copy()
    if exclude_e is not None:
        prior[exclude_e[exclude_e >= 0]] = 0
    return prior / prior.sum()


def emission(reference_k: np.ndarray, allele: int, mismatch: float) -> np.ndarray:
    """e_l(k) of one site: 1 - mismatch on a match, mismatch otherwise, 1 where the target is missing."""
    if allele == 255:
        return np.ones(len(reference_k))
    return np.where(reference_k == allele, 1 - mismatch, mismatch)


def forward(
    alleles_lk: np.ndarray, target_l: np.ndarray, switch_l: np.ndarray, mismatch_l: np.ndarray, prior_k: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scaled forward states (L, K), each row of sum 1, and the normalisers (L,), whose logs sum to the result."""
    states = np.empty(alleles_lk.shape)
    scale = np.empty(len(alleles_lk))
    for site in range(len(alleles_lk)):
        before = prior_k if site == 0 else (1 - switch_l[site]) * states[site - 1] + switch_l[site] * prior_k
        states[site] = emission(alleles_lk[site], target_l[site], mismatch_l[site]) * before
        scale[site] = states[site].sum()
        if scale[site] == 0:
            states[site:], scale[site:] = np.nan, 0
            break
        states[site] /= scale[site]
    return states, scale


def log_likelihood(
    reference_lw: np.ndarray,
    k: int,
    target_nl: np.ndarray,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    *,
    prior_k: np.ndarray | None = None,
    exclude_ne: np.ndarray | None = None,
) -> np.ndarray:
    """As the door's `log_likelihood`."""
    alleles_lk = unpack(reference_lw, k)
    result = np.empty(len(target_nl))
    for n, target_l in enumerate(target_nl):
        prior = target_prior(k, prior_k, None if exclude_ne is None else exclude_ne[n])
        with np.errstate(divide="ignore"):
            result[n] = np.log(forward(alleles_lk, target_l, switch_l, mismatch_l, prior)[1]).sum()
    return result


def posterior(
    reference_lw: np.ndarray,
    k: int,
    target_nl: np.ndarray,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    *,
    prior_k: np.ndarray | None = None,
    exclude_ne: np.ndarray | None = None,
) -> np.ndarray:
    """As the door's `posterior`.

    gamma_l(k) ~ f_l(k) b_l(k) with b_{l-1}(j) = (1-r) e_l(j) b_l(j) + r sum_k prior(k) e_l(k) b_l(k).
    """
    alleles_lk = unpack(reference_lw, k)
    result = np.empty((*target_nl.shape, k))
    for n, target_l in enumerate(target_nl):
        prior = target_prior(k, prior_k, None if exclude_ne is None else exclude_ne[n])
        states, _ = forward(alleles_lk, target_l, switch_l, mismatch_l, prior)
        backward = np.ones(k)
        for site in range(len(alleles_lk) - 1, -1, -1):
            gamma = states[site] * backward
            result[n, site] = gamma / gamma.sum()
            seen = emission(alleles_lk[site], target_l[site], mismatch_l[site]) * backward
            backward = (1 - switch_l[site]) * seen + switch_l[site] * (prior @ seen)
            backward /= backward.max() or 1
    return result


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
) -> np.ndarray:
    """As the door's `posterior_paths`.

    Given z at site l+1, the state at l is z itself without a switch, with weight (1-r) f_l(z); or there was a switch,
    of weight r prior(z) in all, and the state is drawn from f_l. One uniform decides both: what it leaves over after
    the first choice is uniform again.
    """
    alleles_lk = unpack(reference_lw, k)
    paths = np.full(target_nl.shape, -1, dtype=np.int32)
    for n, target_l in enumerate(target_nl):
        prior = target_prior(k, prior_k, None if exclude_ne is None else exclude_ne[n])
        states, scale = forward(alleles_lk, target_l, switch_l, mismatch_l, prior)
        if (scale == 0).any():
            continue
        for site in range(len(alleles_lk) - 1, -1, -1):
            left = uniforms_nl[n, site]
            if site + 1 < len(alleles_lk):
                here = paths[n, site + 1]
                stay = (1 - switch_l[site + 1]) * states[site, here]
                change = switch_l[site + 1] * prior[here]
                left = left * (stay + change) - stay
                if left < 0 or change == 0:
                    paths[n, site] = here
                    continue
                left /= change
            mass = np.cumsum(states[site])
            drawn = np.searchsorted(mass, left * mass[-1], side="right")
            paths[n, site] = min(drawn, np.flatnonzero(states[site])[-1])
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
