"""Li-Stephens copying model: a target haplotype is an imperfect mosaic of K reference haplotypes.

Here are the likelihood of targets, their forward and backward states, the posterior of who is copied where (whole, or
summed to dosages, groups, likeliest donors and expected counts), sampled copying paths, the building of mosaics from
given paths, and several chains side by side as predictors of the next allele (`bank`). Where switch and mismatch
probabilities come from (maps, Ne, groups) is decided in `engine.genomics`.

The model (Li and Stephens, Genetics 165:2213, 2003, in the form that kalis and IMPUTE use): the hidden state at site l
is the copied haplotype k. It starts from the prior, stays with probability 1 - switch_l[l] between site l-1 and l and
otherwise is drawn anew from the prior (its own state included). A reference allele is seen unchanged with probability
1 - mismatch_l[l]. A missing target allele says nothing: its emission is 1.

With an ancestry chain the hidden state is (a, k), a group and a haplotype. It starts as a ~ prior_a, k ~ prior_ak[a].
Between site l-1 and l, with s = ancestry.switch_l[l] and r = switch_l[l]:

    with probability s:         a' ~ prior_a and k' ~ prior_ak[a']       the group is drawn anew, and with it the haplotype
    with probability (1-s) r:   a' = a       and k' ~ prior_ak[a]        the haplotype is drawn anew within the group
    with probability (1-s)(1-r): a' = a      and k' = k

(what is drawn may be what was there), so that f'(a',k') = e(k') [(1-s)(1-r) f(a',k') + prior_ak[a',k'] ((1-s) r F(a') +
s prior_a[a'] F)] with F(a) = sum_k f(a,k), F = sum_a F(a): O(A K) per site. A haplotype may have weight in several groups.
With one group and s = 0 it is the plain model.

Arrays, in every function and implementation:
    reference_lw: uint64 (L, ceil(K/64)), haplotype k at word k//64, bit k%64; unused high bits zero. On a GPU the same
        bits as uint64 or int64.
    target_nl: uint8 (N, L), 0, 1, or 255 for missing.
    switch_l, mismatch_l: float64 (L,), probabilities; switch_l[0] is not used.
    prior_k: float64 (K,) weights, scaled to sum 1; None is uniform.
    exclude_ne: int64 (N, E), padded with -1: states that target n may not copy; the priors are scaled over the others.
    ancestry: `Ancestry`, in place of prior_k; states are then counted as a * K + k, S = A K of them (else S = K).
    dtype: of the states, float32 or float64; `reference` is always float64. Logs of normalisers are float64 throughout.

NumPy arrays go to Numba, torch tensors on a GPU to Triton (small arguments may be either); a named implementation is
never replaced. Log-likelihoods from float32 states are within 1e-4 nats per 1,000 sites of the float64 reference, those from
float64 states within 1e-9, provided that switches are not impossible over long stretches: float32 holds ratios down to
1e-38, so that a path some ten mismatches behind is forgotten where switch_l is 0; 1e-12 is enough to keep the tolerance.
Posteriors from float32 are within 1e-4 of the reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from engine.kernels.haplotype_hmm import checks
from engine.kernels.haplotype_hmm.bank import Bank, BankState, bank_counts, bank_predict, bank_start
from engine.kernels.haplotype_hmm.checks import Ancestry

__all__ = [
    "Ancestry",
    "Bank",
    "BankState",
    "PosteriorSums",
    "backward_states",
    "bank_counts",
    "bank_predict",
    "bank_start",
    "forward_states",
    "log_likelihood",
    "materialise",
    "posterior",
    "posterior_paths",
    "posterior_sums",
]


class PosteriorSums(NamedTuple):
    """What `posterior_sums` returns, in the dtype of the states; NaN for an impossible target.

    Attributes:
        log_likelihood_n: float64 (N,), nats.
        dosage_nl: (N, L), expected allele of the copied haplotype, 0..1. At a site where the target is missing this is
            its imputation; seen through a mismatch it is (1 - m) d + m (1 - d).
        mismatch_nl: (N, L), probability that the target's allele differs from the copied one; 0 where it is missing.
        switch_nl: (N, L), probability that the haplotype was drawn anew between l-1 and l, group kept; 0 at site 0.
        ancestry_switch_nl: (N, L), that the group was drawn anew; None without ancestry.
        ancestry_nla: (N, L, A), posterior of the groups; None without ancestry.
        label_nlg: (N, L, G), posterior summed over the haplotypes of each label; None without labels.
        top_state_nlm, top_weight_nlm: int32 and (N, L, M), the likeliest states and their posterior, falling; equal ones
            by index; -1 and 0 where fewer are possible. None without `top`.
    """

    log_likelihood_n: Any
    dosage_nl: Any
    mismatch_nl: Any
    switch_nl: Any
    ancestry_switch_nl: Any
    ancestry_nla: Any
    label_nlg: Any
    top_state_nlm: Any
    top_weight_nlm: Any


def log_likelihood(
    reference_lw: Any,
    k: int,
    target_nl: Any,
    switch_l: Any,
    mismatch_l: Any,
    *,
    prior_k: Any = None,
    exclude_ne: Any = None,
    ancestry: Ancestry | None = None,
    dtype: Any = np.float32,
    implementation: str | None = None,
) -> Any:
    """Natural-log probability of each target, summed over all copying paths; O(N S L).

    Returns:
        float64 (N,), nats; -inf where no path can give the target. A tensor where the targets are one.

    Raises:
        UsageError: shapes, ranges or dtypes that do not fit.
        Unsupported: the named implementation cannot take these arrays.
    """
    chosen = checks.module(implementation, reference_lw, target_nl)
    arrays, options = checks.checked(
        reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, ancestry, dtype
    )
    return chosen.log_likelihood(*arrays, **options)


def forward_states(
    reference_lw: Any,
    k: int,
    target_nl: Any,
    switch_l: Any,
    mismatch_l: Any,
    site_s: Any,
    *,
    prior_k: Any = None,
    exclude_ne: Any = None,
    ancestry: Ancestry | None = None,
    dtype: Any = np.float32,
    implementation: str | None = None,
) -> tuple[Any, Any]:
    """Forward states at chosen sites: the probability of a state given the target's alleles up to and with that site.

    Args:
        site_s: integers (P,), different sites in any order.

    Returns:
        (N, P, S) of the dtype of the states, each of sum 1; float64 (N, P), log-probability of the alleles so far. NaN
        and -inf from where no path can give the target.

    Raises:
        UsageError, Unsupported: as for `log_likelihood`.
    """
    chosen = checks.module(implementation, reference_lw, target_nl)
    arrays, options = checks.checked(
        reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, ancestry, dtype
    )
    site_s = checks.checked_sites(site_s, len(arrays[3]))
    return chosen.states(*arrays, site_s, direction="forward", **options)


def backward_states(
    reference_lw: Any,
    k: int,
    target_nl: Any,
    switch_l: Any,
    mismatch_l: Any,
    site_s: Any,
    *,
    prior_k: Any = None,
    exclude_ne: Any = None,
    ancestry: Ancestry | None = None,
    dtype: Any = np.float32,
    implementation: str | None = None,
) -> tuple[Any, Any]:
    """Backward states at chosen sites: the probability of all alleles after a site, given the state there.

    Args:
        site_s: integers (P,), different sites in any order.

    Returns:
        b, (N, P, S) of the dtype of the states, scaled to a prior mean of 1 and 0 in states of prior 0; log, float64
        (N, P): exp(log) * b is the probability itself. The posterior is forward * b, scaled to sum 1. NaN and -inf for an
        impossible target.

    Raises:
        UsageError, Unsupported: as for `log_likelihood`.
    """
    chosen = checks.module(implementation, reference_lw, target_nl)
    arrays, options = checks.checked(
        reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, ancestry, dtype
    )
    site_s = checks.checked_sites(site_s, len(arrays[3]))
    return chosen.states(*arrays, site_s, direction="backward", **options)


def posterior(
    reference_lw: Any,
    k: int,
    target_nl: Any,
    switch_l: Any,
    mismatch_l: Any,
    *,
    prior_k: Any = None,
    exclude_ne: Any = None,
    ancestry: Ancestry | None = None,
    dtype: Any = np.float32,
    implementation: str | None = None,
) -> Any:
    """Posterior probability of each state at each site, by forward and backward; for small use: N*L*S values are held.

    Returns:
        (N, L, S) of the dtype of the states; each (n, l) sums to 1. NaN for an impossible target.

    Raises:
        UsageError, Unsupported: as for `log_likelihood`.
    """
    chosen = checks.module(implementation, reference_lw, target_nl)
    arrays, options = checks.checked(
        reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, ancestry, dtype
    )
    return chosen.posterior(*arrays, **options)


def posterior_sums(
    reference_lw: Any,
    k: int,
    target_nl: Any,
    switch_l: Any,
    mismatch_l: Any,
    *,
    label_k: Any = None,
    top: int = 0,
    prior_k: Any = None,
    exclude_ne: Any = None,
    ancestry: Ancestry | None = None,
    dtype: Any = np.float32,
    implementation: str | None = None,
) -> PosteriorSums:
    """Sums of the posterior that are small enough to keep: imputed dosages, groups, likeliest donors, expected counts.

    Expected counts per site (sums over targets) over the number of targets are the update of site-specific switch and mismatch
    probabilities in expectation maximisation; sums over sites are those of a target.
    Memory beside the result is about 128 S sqrt(L) bytes per thread or less: states are kept before every stretch of
    sites and walked again from there.

    Args:
        label_k: integers (K,) in 0..254, a label of each haplotype, e.g. its population; None for no sums by label.
        top: how many of the likeliest states to name at each site; costs a look at every state.

    Raises:
        UsageError, Unsupported: as for `log_likelihood`.
    """
    chosen = checks.module(implementation, reference_lw, target_nl)
    arrays, options = checks.checked(
        reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, ancestry, dtype
    )
    labels_of_k, labels = checks.checked_labels(label_k, k)
    groups = 1 if ancestry is None else len(ancestry.prior_a)
    top = checks.checked_top(top, groups * k)
    return PosteriorSums(*chosen.posterior_sums(*arrays, label_k=labels_of_k, labels=labels, top=top, **options))


def posterior_paths(
    reference_lw: Any,
    k: int,
    target_nl: Any,
    switch_l: Any,
    mismatch_l: Any,
    uniforms_nl: Any,
    *,
    prior_k: Any = None,
    exclude_ne: Any = None,
    ancestry: Ancestry | None = None,
    dtype: Any = np.float32,
    implementation: str | None = None,
) -> Any:
    """One copying path per target, drawn from the posterior over paths.

    The state at the last site is drawn from the forward distribution and earlier ones given their successor, each by
    the one uniform number of its site, so that a path is a function of its inputs. Memory as for `posterior_sums`.

    Args:
        uniforms_nl: float64 (N, L) in [0, 1).

    Returns:
        int32 (N, L): the state at each site, the copied haplotype or with ancestry a * K + k (np.divmod tells them
        apart); -1 throughout where the target is impossible.

    Raises:
        UsageError, Unsupported: as for `log_likelihood`.
    """
    chosen = checks.module(implementation, reference_lw, target_nl)
    arrays, options = checks.checked(
        reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, ancestry, dtype
    )
    uniforms_nl = checks.checked_uniforms(uniforms_nl, arrays[2].shape)
    return chosen.posterior_paths(*arrays, uniforms_nl, **options)


def materialise(
    reference_lw: Any,
    k: int,
    segment_offset_n: Any,
    segment_start_s: Any,
    segment_donor_s: Any,
    flip_offset_n: Any = None,
    flip_site_f: Any = None,
    *,
    first_site: int = 0,
    implementation: str | None = None,
) -> Any:
    """Alleles of mosaic haplotypes over one block of sites, packed site-major.

    `reference_lw` holds sites first_site .. first_site + len(reference_lw) - 1; segments and flips count sites of the
    whole sequence, so that a long sequence is built block by block from one set of paths.

    Args:
        segment_offset_n: int64 (N+1,); haplotype n has segments segment_offset_n[n] .. segment_offset_n[n+1] - 1.
        segment_start_s: int64 (S,), first site of each segment, strictly rising within a haplotype, the first one 0.
        segment_donor_s: int32 (S,), reference haplotype copied up to the next segment's start.
        flip_offset_n, flip_site_f: int64 (N+1,) and (F,), sites at which the copied allele is inverted, strictly rising
            within a haplotype; None for none.

    Returns:
        uint64 (len(reference_lw), ceil(N/64)), unused high bits zero; an int64 tensor of the same bits on a GPU.

    Raises:
        UsageError: offsets, starts or donors that do not fit. Unsupported: the implementation cannot take these arrays.
    """
    chosen = checks.module(implementation, reference_lw)
    reference_lw = checks.checked_reference(reference_lw, k)
    runs = checks.checked_mosaic(k, segment_offset_n, segment_start_s, segment_donor_s, flip_offset_n, flip_site_f)
    return chosen.materialise(reference_lw, k, *runs, first_site=first_site)
