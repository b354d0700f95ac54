"""What the door takes in, checked and brought to one form; every error is one line.

Panels and targets stay where they lie (NumPy or a torch tensor on its device); all that is small becomes NumPy in float64.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from engine.errors import Unsupported, UsageError

WHERE = "haplotype_hmm"
IMPLEMENTATIONS = (None, "reference", "numba", "triton")
MOST_LABELS = 255


class Ancestry(NamedTuple):
    """The second, slow chain: which of A groups the copied haplotypes come from.

    Attributes:
        prior_a: float64 (A,) weights >= 0, scaled to sum 1.
        prior_ak: float64 (A, K) weights >= 0, each row scaled to sum 1: who is copied in each group.
        switch_l: float64 (L,), probability that the group is drawn anew between site l-1 and l; switch_l[0] is not used.
    """

    prior_a: Any
    prior_ak: Any
    switch_l: Any


class Checked(NamedTuple):
    """Arguments in the form that every implementation takes."""

    arrays: tuple[Any, int, Any, np.ndarray, np.ndarray]
    options: dict[str, Any]


def is_tensor(array: Any) -> bool:
    torch = sys.modules.get("torch")  # an array cannot be a tensor before torch is imported
    return torch is not None and isinstance(array, torch.Tensor)


def module(implementation: str | None, *arrays: Any) -> Any:
    """The implementation that runs: the named one, or the one for where the arrays lie. A named one is never replaced."""
    if implementation not in IMPLEMENTATIONS:
        raise UsageError("implementation None, 'reference', 'numba' or 'triton'", repr(implementation), WHERE)
    tensors = [is_tensor(array) for array in arrays]
    if implementation == "triton" or (implementation is None and any(tensors)):
        if not all(tensors):
            raise Unsupported("torch tensors on a GPU", "NumPy arrays", f"{WHERE} 'triton'", "implementation=None")
        from engine.kernels.haplotype_hmm import triton_gpu

        if arrays[0].device.type != "cuda" and not triton_gpu.INTERPRETED:
            raise Unsupported("tensors on a GPU", f"tensors on {arrays[0].device}", f"{WHERE} 'triton'", "NumPy arrays")
        if len({array.device for array in arrays}) > 1:
            raise UsageError("tensors on one device", "tensors on several", WHERE)
        return triton_gpu
    if any(tensors):
        raise Unsupported("NumPy arrays", "torch tensors", f"{WHERE} '{implementation}'", "implementation=None")
    if implementation == "reference":
        from engine.kernels.haplotype_hmm import reference

        return reference
    from engine.kernels.haplotype_hmm import numba_cpu

    return numba_cpu


def checked_reference(reference_lw: Any, k: int) -> Any:
    """Contiguous 64-bit words (L, ceil(k / 64)): uint64 NumPy, or a uint64 or int64 tensor."""
    words = (k + 63) // 64
    if is_tensor(reference_lw):
        torch = sys.modules["torch"]
        good = reference_lw.dtype in (torch.uint64, torch.int64)
        reference_lw = reference_lw.contiguous()
    else:
        reference_lw = np.ascontiguousarray(reference_lw)
        good = reference_lw.dtype == np.uint64
    if k < 1 or reference_lw.ndim != 2 or not good or reference_lw.shape[1] != words:
        raise UsageError(
            f"reference bits as 64-bit words (sites, {words}) for k = {k} >= 1",
            f"{reference_lw.dtype} {tuple(reference_lw.shape)}",
            WHERE,
        )
    return reference_lw


def _checked_targets(target_nl: Any, sites: int) -> Any:
    if is_tensor(target_nl):
        good = target_nl.dtype == sys.modules["torch"].uint8
        target_nl = target_nl.contiguous()
    else:
        target_nl = np.ascontiguousarray(target_nl)
        good = target_nl.dtype == np.uint8
    if target_nl.ndim != 2 or target_nl.shape[1] != sites or not good:
        raise UsageError(f"targets as uint8 (n, {sites})", f"{target_nl.dtype} {tuple(target_nl.shape)}", WHERE)
    if bool(((target_nl > 1) & (target_nl != 255)).any()):
        raise UsageError("target alleles 0, 1 or 255 (missing)", "another value", WHERE)
    return target_nl


def small(array: Any, dtype: Any) -> np.ndarray:
    """A small array as contiguous NumPy of `dtype`, from wherever it lies."""
    return np.ascontiguousarray(array.cpu().numpy() if is_tensor(array) else array, dtype=dtype)


def _probabilities(name: str, values: Any, sites: int, from_site: int) -> np.ndarray:
    values = small(values, np.float64)
    if values.shape != (sites,) or not ((values[from_site:] >= 0) & (values[from_site:] <= 1)).all():
        raise UsageError(f"{name} as {sites} probabilities", f"shape {values.shape} or values outside 0..1", WHERE)
    return values


def _weights(name: str, weights: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Weights scaled to sum 1 along the last axis."""
    weights = small(weights, np.float64)
    if weights.shape != shape or not (weights >= 0).all():
        raise UsageError(f"{name} as {shape} weights >= 0", f"shape {weights.shape} or negative values", WHERE)
    total = weights.sum(axis=-1, keepdims=True)
    if not ((total > 0) & (total < np.inf)).all():
        raise UsageError(f"{name} with weights that are not all 0", "weights of sum 0 or infinity", WHERE)
    return weights / total


def _checked_ancestry(ancestry: Any, k: int, sites: int) -> Ancestry:
    if not isinstance(ancestry, Ancestry):
        raise UsageError("ancestry as haplotype_hmm.Ancestry", type(ancestry).__name__, WHERE)
    prior_a = small(ancestry.prior_a, np.float64)
    if prior_a.ndim != 1 or not len(prior_a):
        raise UsageError("prior_a as weights of at least one group", f"shape {prior_a.shape}", WHERE)
    return Ancestry(
        _weights("prior_a", prior_a, prior_a.shape),
        _weights("prior_ak", ancestry.prior_ak, (len(prior_a), k)),
        _probabilities("ancestry.switch_l", ancestry.switch_l, sites, 1),
    )


def _checked_exclusions(exclude_ne: Any, n: int, k: int, prior_ak: np.ndarray) -> np.ndarray:
    exclude_ne = small(exclude_ne, np.int64)
    good = exclude_ne.ndim == 2 and len(exclude_ne) == n
    if not good or (exclude_ne.size and not -1 <= exclude_ne.min() <= exclude_ne.max() < k):
        raise UsageError(f"exclude_ne as ({n}, e) states in -1..{k - 1}", str(exclude_ne.shape), WHERE)
    listed = np.where(exclude_ne[None] >= 0, prior_ak[:, exclude_ne], 0.0).sum(axis=2)
    for row in np.flatnonzero((listed > 1 - 1e-9).any(axis=0)):
        left_ak = prior_ak.copy()
        left_ak[:, exclude_ne[row][exclude_ne[row] >= 0]] = 0
        if (left_ak.sum(axis=1) <= 0).any():
            raise UsageError("a state left to copy, in each group", "all excluded", f"{WHERE} target {row}")
    return exclude_ne


def checked(
    reference_lw: Any,
    k: int,
    target_nl: Any,
    switch_l: Any,
    mismatch_l: Any,
    prior_k: Any,
    exclude_ne: Any,
    ancestry: Any,
    dtype: Any,
) -> Checked:
    """Contiguous arrays of the stated dtypes, priors scaled to sum 1; UsageError where they do not fit."""
    reference_lw = checked_reference(reference_lw, k)
    sites = len(reference_lw)
    target_nl = _checked_targets(target_nl, sites)
    switch_l = _probabilities("switch_l", switch_l, sites, 1)
    mismatch_l = _probabilities("mismatch_l", mismatch_l, sites, 0)
    if prior_k is not None and ancestry is not None:
        raise UsageError("prior_k or ancestry", "both", WHERE, "the rows of ancestry.prior_ak are the priors")
    if prior_k is not None:
        prior_k = _weights("prior_k", prior_k, (k,))
    if ancestry is not None:
        ancestry = _checked_ancestry(ancestry, k, sites)
    if exclude_ne is not None:
        prior_ak = np.full((1, k), 1.0 / k) if prior_k is None else prior_k[None]
        prior_ak = prior_ak if ancestry is None else ancestry.prior_ak
        exclude_ne = _checked_exclusions(exclude_ne, len(target_nl), k, prior_ak)
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        dtype = None
    if dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise UsageError("dtype float32 or float64", str(dtype), WHERE)
    options = {"prior_k": prior_k, "exclude_ne": exclude_ne, "ancestry": ancestry, "dtype": dtype}
    return Checked((reference_lw, k, target_nl, switch_l, mismatch_l), options)


def checked_uniforms(uniforms_nl: Any, shape: tuple[int, ...]) -> np.ndarray:
    uniforms_nl = small(uniforms_nl, np.float64)
    good = uniforms_nl.shape == tuple(shape)
    if not good or (uniforms_nl.size and not (0 <= uniforms_nl.min() <= uniforms_nl.max() < 1)):
        raise UsageError("uniforms in [0, 1) of the targets' shape", str(uniforms_nl.shape), "posterior_paths")
    return uniforms_nl


def checked_sites(site_s: Any, sites: int) -> np.ndarray:
    site_s = small(site_s, np.int64)
    if site_s.ndim != 1 or len(np.unique(site_s)) != len(site_s) or not ((site_s >= 0) & (site_s < sites)).all():
        raise UsageError(f"different sites in 0..{sites - 1}", f"shape {site_s.shape} or others", WHERE)
    return site_s


def checked_labels(label_k: Any, k: int) -> tuple[np.ndarray | None, int]:
    """Labels as int32 (K,), and one more than the largest; (None, 0) for none."""
    if label_k is None:
        return None, 0
    label_k = small(label_k, np.int32)
    if label_k.shape != (k,) or not 0 <= label_k.min() <= label_k.max() < MOST_LABELS:
        raise UsageError(f"label_k as {k} integers in 0..{MOST_LABELS - 1}", f"shape {label_k.shape} or others", WHERE)
    return label_k, int(label_k.max()) + 1


def checked_top(top: int, states: int) -> int:
    if top != int(top) or not 0 <= top <= min(states, 1024):
        raise UsageError(f"top in 0..{min(states, 1024)}", str(top), "posterior_sums")
    return int(top)


def checked_mosaic(
    k: int, segment_offset_n: Any, segment_start_s: Any, segment_donor_s: Any, flip_offset_n: Any, flip_site_f: Any
) -> tuple[np.ndarray, ...]:
    """Segments and flips of `materialise` as contiguous NumPy."""
    segment_offset_n = small(segment_offset_n, np.int64)
    n = len(segment_offset_n) - 1
    segment_start_s, segment_donor_s = small(segment_start_s, np.int64), small(segment_donor_s, np.int32)
    flip_offset_n = np.zeros(n + 1, np.int64) if flip_offset_n is None else small(flip_offset_n, np.int64)
    flip_site_f = np.zeros(0, np.int64) if flip_site_f is None else small(flip_site_f, np.int64)
    _check_runs(segment_offset_n, segment_start_s, "segments")
    _check_runs(flip_offset_n, flip_site_f, "flips")
    if len(flip_offset_n) != n + 1 or segment_donor_s.shape != segment_start_s.shape:
        raise UsageError("segments and flips of the same haplotypes", "lengths that differ", "materialise")
    if n > 0 and ((np.diff(segment_offset_n) < 1).any() or (segment_start_s[segment_offset_n[:-1]] != 0).any()):
        raise UsageError("a segment that starts at site 0 for each haplotype", "one without", "materialise")
    if segment_donor_s.size and not (0 <= segment_donor_s.min() <= segment_donor_s.max() < k):
        raise UsageError(f"donors in 0..{k - 1}", "one outside", "materialise")
    return segment_offset_n, segment_start_s, segment_donor_s, flip_offset_n, flip_site_f


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
