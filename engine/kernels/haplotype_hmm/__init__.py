"""Li-Stephens copying model: a target haplotype is an imperfect mosaic of K reference haplotypes.

Here are the likelihood of targets (`log_likelihood`), the posterior of who is copied where (`posterior`), sampled
copying paths (`posterior_paths`) and the building of mosaics from given paths (`materialise`). Where switch and
mismatch probabilities come from (maps, Ne, groups) is decided in `engine.genomics`.

The model (Li and Stephens, Genetics 165:2213, 2003, in the form that kalis and IMPUTE use): the hidden state at site l
is the copied haplotype k. It starts from the prior, stays with probability 1 - switch_l[l] between site l-1 and l and
otherwise is drawn anew from the prior (its own state included). A reference allele is seen unchanged with probability
1 - mismatch_l[l]. A missing target allele says nothing: its emission is 1.

Arrays, in every implementation:
    reference_lw: uint64 (L, ceil(K/64)), haplotype k at word k//64, bit k%64; unused high bits zero.
    target_nl: uint8 (N, L), 0, 1, or 255 for missing.
    switch_l, mismatch_l: float64 (L,), probabilities; switch_l[0] is not used.
    prior_k: float64 (K,) weights, scaled to sum 1; None is uniform.
    exclude_ne: int64 (N, E), padded with -1: states that target n may not copy; the prior is scaled over the others.

Numba and Triton keep the state in float32, scaled at each site, with float64 log normalisers: within 1e-4 nats per
1,000 sites of the float64 reference, provided that switches are not impossible over long stretches: float32 holds
ratios down to 1e-38, so that a path some ten mismatches behind is forgotten where switch_l is 0; 1e-12 is enough to
keep the tolerance.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from engine.errors import Unsupported, UsageError

__all__ = ["log_likelihood", "materialise", "posterior", "posterior_paths"]

_IMPLEMENTATIONS = (None, "reference", "numba", "triton")


def log_likelihood(
    reference_lw: Any,
    k: int,
    target_nl: Any,
    switch_l: Any,
    mismatch_l: Any,
    *,
    prior_k: Any = None,
    exclude_ne: Any = None,
    implementation: str | None = None,
) -> Any:
    """Natural-log probability of each target, summed over all copying paths; O(N K L).

    NumPy arrays go to Numba, torch tensors on a GPU to Triton (reference bits uint64 or int64 there); a named
    implementation is never replaced.

    Returns:
        float64 (N,), nats; -inf where no path can give the target. A tensor where the targets are one.

    Raises:
        UsageError: shapes, ranges or dtypes that do not fit.
        Unsupported: the named implementation cannot take these arrays.
    """
    _check_name(implementation)
    if _is_tensor(target_nl) or implementation == "triton":
        if implementation not in (None, "triton"):
            raise Unsupported(
                "NumPy arrays", "torch tensors", f"haplotype_hmm '{implementation}'", "implementation=None"
            )
        from engine.kernels.haplotype_hmm import triton_gpu

        return triton_gpu.log_likelihood(
            reference_lw, k, target_nl, switch_l, mismatch_l, prior_k=prior_k, exclude_ne=exclude_ne
        )
    arrays, options = _checked(reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne)
    if implementation == "reference":
        from engine.kernels.haplotype_hmm import reference

        return reference.log_likelihood(*arrays, **options)
    from engine.kernels.haplotype_hmm import numba_cpu

    return numba_cpu.log_likelihood(*arrays, **options)


def posterior(
    reference_lw: np.ndarray,
    k: int,
    target_nl: np.ndarray,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    *,
    prior_k: np.ndarray | None = None,
    exclude_ne: np.ndarray | None = None,
    implementation: str | None = None,
) -> np.ndarray:
    """Posterior probability of each state at each site, by forward and backward; for small use: N*L*K values are held.

    Returns:
        float64 (reference) or float32 (numba), shape (N, L, K); each (n, l) sums to 1. NaN for an impossible target.

    Raises:
        UsageError, Unsupported: as for `log_likelihood`.
    """
    _only_on_cpu("posterior", implementation, target_nl)
    arrays, options = _checked(reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne)
    if implementation == "reference":
        from engine.kernels.haplotype_hmm import reference

        return reference.posterior(*arrays, **options)
    from engine.kernels.haplotype_hmm import numba_cpu

    return numba_cpu.posterior(*arrays, **options)


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
    implementation: str | None = None,
) -> np.ndarray:
    """One copying path per target, drawn from the posterior over paths.

    The state at the last site is drawn from the forward distribution and earlier ones given their successor, each by
    the one uniform number of its site, so that a path is a function of its inputs. Memory per thread is about 8 K
    sqrt(L) bytes: forward states are kept at every sqrt(L)-th site and recomputed in between.

    Args:
        uniforms_nl: float64 (N, L) in [0, 1).

    Returns:
        int32 (N, L): the copied haplotype at each site; -1 throughout where the target is impossible.

    Raises:
        UsageError, Unsupported: as for `log_likelihood`.
    """
    _only_on_cpu("posterior_paths", implementation, target_nl)
    arrays, options = _checked(reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne)
    uniforms_nl = np.ascontiguousarray(uniforms_nl, dtype=np.float64)
    if uniforms_nl.shape != arrays[2].shape or (
        uniforms_nl.size and not (0 <= uniforms_nl.min() <= uniforms_nl.max() < 1)
    ):
        raise UsageError("uniforms in [0, 1) of the targets' shape", str(uniforms_nl.shape), "posterior_paths")
    if implementation == "reference":
        from engine.kernels.haplotype_hmm import reference

        return reference.posterior_paths(*arrays, uniforms_nl, **options)
    from engine.kernels.haplotype_hmm import numba_cpu

    return numba_cpu.posterior_paths(*arrays, uniforms_nl, **options)


def materialise(
    reference_lw: np.ndarray,
    k: int,
    segment_offset_n: np.ndarray,
    segment_start_s: np.ndarray,
    segment_donor_s: np.ndarray,
    flip_offset_n: np.ndarray | None = None,
    flip_site_f: np.ndarray | None = None,
    *,
    first_site: int = 0,
    implementation: str | None = None,
) -> np.ndarray:
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
        uint64 (len(reference_lw), ceil(N/64)), unused high bits zero.

    Raises:
        UsageError: offsets, starts or donors that do not fit. Unsupported: no such implementation.
    """
    _only_on_cpu("materialise", implementation, reference_lw)
    reference_lw = _checked_reference(reference_lw, k)
    segment_offset_n = np.ascontiguousarray(segment_offset_n, dtype=np.int64)
    n = len(segment_offset_n) - 1
    segment_start_s = np.ascontiguousarray(segment_start_s, dtype=np.int64)
    segment_donor_s = np.ascontiguousarray(segment_donor_s, dtype=np.int32)
    flip_offset_n = (
        np.zeros(n + 1, np.int64) if flip_offset_n is None else np.ascontiguousarray(flip_offset_n, np.int64)
    )
    flip_site_f = np.zeros(0, np.int64) if flip_site_f is None else np.ascontiguousarray(flip_site_f, np.int64)
    _check_runs(segment_offset_n, segment_start_s, "segments")
    _check_runs(flip_offset_n, flip_site_f, "flips")
    if len(flip_offset_n) != n + 1 or segment_donor_s.shape != segment_start_s.shape:
        raise UsageError("segments and flips of the same haplotypes", "lengths that differ", "materialise")
    if n > 0 and ((np.diff(segment_offset_n) < 1).any() or (segment_start_s[segment_offset_n[:-1]] != 0).any()):
        raise UsageError("a segment that starts at site 0 for each haplotype", "one without", "materialise")
    if segment_donor_s.size and not (0 <= segment_donor_s.min() <= segment_donor_s.max() < k):
        raise UsageError(f"donors in 0..{k - 1}", "one outside", "materialise")
    arguments = (segment_offset_n, segment_start_s, segment_donor_s, flip_offset_n, flip_site_f)
    if implementation == "reference":
        from engine.kernels.haplotype_hmm import reference

        return reference.materialise(reference_lw, k, *arguments, first_site=first_site)
    from engine.kernels.haplotype_hmm import numba_cpu

    return numba_cpu.materialise(reference_lw, k, *arguments, first_site=first_site)


def _check_name(implementation: str | None) -> None:
    if implementation not in _IMPLEMENTATIONS:
        raise UsageError("implementation None, 'reference', 'numba' or 'triton'", repr(implementation), "haplotype_hmm")


def _only_on_cpu(function: str, implementation: str | None, array: Any) -> None:
    _check_name(implementation)
    if implementation == "triton" or _is_tensor(array):
        raise Unsupported(
            "NumPy arrays and 'numba' or 'reference'",
            "the Triton implementation, which has the likelihood only",
            f"haplotype_hmm.{function}",
            "move the arrays to NumPy",
        )


def _is_tensor(array: Any) -> bool:
    torch = sys.modules.get("torch")  # an array cannot be a tensor before torch is imported
    return torch is not None and isinstance(array, torch.Tensor)


def _checked_reference(reference_lw: np.ndarray, k: int) -> np.ndarray:
    reference_lw = np.ascontiguousarray(reference_lw)
    if k < 1 or reference_lw.ndim != 2 or reference_lw.dtype != np.uint64 or reference_lw.shape[1] != (k + 63) // 64:
        raise UsageError(
            f"reference bits as uint64 (sites, {(k + 63) // 64}) for k = {k} >= 1",
            f"{reference_lw.dtype} {reference_lw.shape}",
            "haplotype_hmm",
        )
    return reference_lw


def _check_runs(offset_n: np.ndarray, value: np.ndarray, what: str) -> None:
    good = offset_n.ndim == 1 and len(offset_n) >= 1 and offset_n[0] == 0 and offset_n[-1] == len(value)
    if not good or (np.diff(offset_n) < 0).any():
        raise UsageError(f"rising offsets from 0 to {len(value)}", "others", f"materialise {what}")
    if len(value) > 1:
        falls = np.diff(value) <= 0
        new_run = np.zeros(len(value) - 1, dtype=bool)
        inner = offset_n[1:-1]
        new_run[inner[(inner > 0) & (inner < len(value))] - 1] = True
        if (falls & ~new_run).any():
            raise UsageError("sites that rise within a haplotype", "equal or falling ones", f"materialise {what}")


def _checked(
    reference_lw: Any, k: int, target_nl: Any, switch_l: Any, mismatch_l: Any, prior_k: Any, exclude_ne: Any
) -> tuple[tuple[Any, Any, Any, Any, Any], dict[str, Any]]:
    """Contiguous arrays of the stated dtypes, the prior scaled to sum 1; UsageError where they do not fit."""
    reference_lw = _checked_reference(reference_lw, k)
    sites = len(reference_lw)
    target_nl = np.ascontiguousarray(target_nl)
    if target_nl.ndim != 2 or target_nl.shape[1] != sites or target_nl.dtype != np.uint8:
        raise UsageError(f"targets as uint8 (n, {sites})", f"{target_nl.dtype} {target_nl.shape}", "haplotype_hmm")
    if ((target_nl > 1) & (target_nl != 255)).any():
        raise UsageError("target alleles 0, 1 or 255 (missing)", "another value", "haplotype_hmm")
    probabilities = []
    for name, values in (("switch_l", switch_l), ("mismatch_l", mismatch_l)):
        values = np.ascontiguousarray(values, dtype=np.float64)
        used = values[1:] if name == "switch_l" else values
        if values.shape != (sites,) or not ((used >= 0) & (used <= 1)).all():
            raise UsageError(
                f"{name} as {sites} probabilities", f"shape {values.shape} or values outside 0..1", "haplotype_hmm"
            )
        probabilities.append(values)
    if prior_k is not None:
        prior_k = np.ascontiguousarray(prior_k, dtype=np.float64)
        if prior_k.shape != (k,) or not (prior_k >= 0).all() or not 0 < prior_k.sum() < np.inf:
            raise UsageError(
                f"prior_k as {k} weights >= 0, not all zero", f"shape {prior_k.shape} or other values", "haplotype_hmm"
            )
        prior_k = prior_k / prior_k.sum()
    if exclude_ne is not None:
        exclude_ne = np.ascontiguousarray(exclude_ne, dtype=np.int64)
        n = len(target_nl)
        if (
            exclude_ne.ndim != 2
            or len(exclude_ne) != n
            or (exclude_ne.size and not -1 <= exclude_ne.min() <= exclude_ne.max() < k)
        ):
            raise UsageError(f"exclude_ne as ({n}, e) states in -1..{k - 1}", str(exclude_ne.shape), "haplotype_hmm")
        for row, states in enumerate(exclude_ne):
            left = np.ones(k) if prior_k is None else prior_k.copy()
            left[states[states >= 0]] = 0
            if left.sum() <= 0:
                raise UsageError("a state left to copy", "all excluded", f"haplotype_hmm target {row}")
    switch_l, mismatch_l = probabilities
    return (reference_lw, k, target_nl, switch_l, mismatch_l), {"prior_k": prior_k, "exclude_ne": exclude_ne}
