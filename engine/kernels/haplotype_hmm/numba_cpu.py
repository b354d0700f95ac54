"""The copying model on the CPU.

A batch of targets is walked sixteen (float32) or eight (float64) at a time over a condensed panel (`condense`,
`numba_lanes`, and on top of them `numba_paths` and `numba_smooth`); fewer targets than it takes to earn back the cutting of the
panel are walked directly (`numba_direct`, likelihood only), and so are banks of chains (`numba_bank`). Mosaics are built
in `numba_mosaic`. All run in parallel.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.kernels.haplotype_hmm import numba_bank, numba_direct, numba_lanes, numba_paths, numba_smooth
from engine.kernels.haplotype_hmm.condense import Condensed, condense
from engine.kernels.haplotype_hmm.lanes import BYTES
from engine.kernels.haplotype_hmm.numba_mosaic import materialise
from engine.kernels.haplotype_hmm.threads import in_threads

__all__ = [
    "bank_counts",
    "bank_predict",
    "log_likelihood",
    "materialise",
    "posterior",
    "posterior_paths",
    "posterior_sums",
    "states",
]

FEW = 4  # targets: up to so many are walked directly


def _excluded(exclude_ne: np.ndarray | None, n: int) -> np.ndarray:
    return np.full((n, 0), -1, np.int64) if exclude_ne is None else exclude_ne


def _prepared(
    reference_lw: np.ndarray,
    k: int,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    prior_k: np.ndarray | None,
    ancestry: Any,
    dtype: Any,
    label_k: np.ndarray | None = None,
    labels: int = 1,
) -> tuple[Condensed, numba_lanes.Moves, np.ndarray, np.ndarray]:
    """Condensed panel, moves, prior (A, K) in float64, and an empty array of the dtype of the states."""
    condensed = condense(reference_lw, k, label_k, labels)
    prior_ak = np.full((1, k), 1.0 / k) if prior_k is None else prior_k[None]
    prior_a, redraw_l = np.ones(1), np.zeros(len(switch_l))
    if ancestry is not None:
        prior_ak, prior_a, redraw_l = ancestry.prior_ak, ancestry.prior_a, ancestry.switch_l
    prior_ak = np.ascontiguousarray(prior_ak)
    classes = int(condensed.offset_b[-1])
    weight_ac, members_ac = np.empty((len(prior_a), classes)), np.empty((len(prior_a), classes), np.int32)
    in_threads(numba_lanes.weigh, len(condensed.row_b), condensed, prior_ak, weight_ac, members_ac)
    flat = prior_ak.ravel().astype(dtype)
    moves = numba_lanes.Moves(
        switch_l, mismatch_l, redraw_l, prior_a, flat, (prior_ak.ravel() > 0).astype(dtype), weight_ac, members_ac
    )
    return condensed, moves, prior_ak, np.empty(0, dtype)


def _vectors(target_nl: np.ndarray, dtype: Any) -> int:
    lanes = BYTES // np.dtype(dtype).itemsize
    return (len(target_nl) + lanes - 1) // lanes


def _stride(condensed: Condensed) -> int:
    """Blocks per stretch: as many stretches as blocks in one keep the least memory."""
    return max(1, int(np.ceil(np.sqrt(len(condensed.row_b)))))


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
    dtype: Any = np.float32,
) -> np.ndarray:
    """As the door's `log_likelihood`."""
    result_n = np.zeros(len(target_nl))
    if target_nl.size == 0:
        return result_n
    excluded = _excluded(exclude_ne, len(target_nl))
    if len(target_nl) <= FEW and ancestry is None:
        prior = np.full(k, 1.0 / k) if prior_k is None else prior_k
        in_threads(
            numba_direct.log_likelihood, len(target_nl), reference_lw, k, target_nl, switch_l, mismatch_l, prior,
            excluded, prior_k is None, np.empty(0, dtype), result_n, chunk=1,
        )  # fmt: skip
        return result_n
    condensed, moves, prior_ak, like = _prepared(reference_lw, k, switch_l, mismatch_l, prior_k, ancestry, dtype)
    in_threads(
        numba_lanes.log_likelihood,
        _vectors(target_nl, dtype),
        condensed,
        moves,
        target_nl,
        excluded,
        prior_ak,
        like,
        result_n,
        chunk=1,
    )
    return result_n


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
    shape = (len(target_nl), stop_site - first_site, len(bank.parent_c))
    logit_nlc, donors_nlc = np.empty(shape, np.float32), np.empty(shape, np.float32)
    if logit_nlc.size:
        in_threads(
            numba_bank.walk, len(target_nl), reference_lw.reshape(-1), reference_lw.shape[1], k, target_nl,
            bank.switch_cl, bank.mismatch_cl, bank.parent_c, bank.floor_c, _excluded(exclude_ne, len(target_nl)), first_site,
            stop_site, state.state_nck, state.sums_nct, logit_nlc, donors_nlc, chunk=1,
        )  # fmt: skip
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
    """As the door's `bank_counts`."""
    n, sites = target_nl.shape
    chains = len(bank.parent_c)
    switch_ncl, mismatch_ncl = np.zeros((n, chains, sites), np.float32), np.zeros((n, chains, sites), np.float32)
    nats_nc = np.zeros((n, chains))
    if target_nl.size:
        in_threads(
            numba_bank.counts, n, reference_lw.reshape(-1), reference_lw.shape[1], k, target_nl, bank.switch_cl,
            bank.mismatch_cl, bank.parent_c, bank.floor_c, _excluded(exclude_ne, n), wanted_c,
            max(1, int(np.sqrt(sites))), np.empty(0, dtype), switch_ncl, mismatch_ncl, nats_nc,
        )  # fmt: skip
    return switch_ncl, mismatch_ncl, nats_nc


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
    dtype: Any = np.float32,
) -> np.ndarray:
    """As the door's `posterior_paths`."""
    path_nl = np.full(target_nl.shape, -1, np.int32)
    if target_nl.size:
        condensed, moves, prior_ak, like = _prepared(reference_lw, k, switch_l, mismatch_l, prior_k, ancestry, dtype)
        in_threads(
            numba_paths.posterior_paths, _vectors(target_nl, dtype), condensed, moves, target_nl,
            _excluded(exclude_ne, len(target_nl)), prior_ak, like, uniforms_nl,
            _stride(condensed), path_nl, chunk=1,
        )  # fmt: skip
    return path_nl


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
    dtype: Any = np.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """As the door's `forward_states` and `backward_states`."""
    groups = 1 if ancestry is None else len(ancestry.prior_a)
    n = len(target_nl)
    state_nss, log_ns = np.empty((n, len(site_s), groups * k), dtype), np.empty((n, len(site_s)))
    if state_nss.size == 0:
        return state_nss, log_ns
    condensed, moves, prior_ak, like = _prepared(reference_lw, k, switch_l, mismatch_l, prior_k, ancestry, dtype)
    slot_l = np.full(len(switch_l), -1, np.int64)
    slot_l[site_s] = np.arange(len(site_s))
    excluded = _excluded(exclude_ne, n)
    if direction == "forward":
        in_threads(
            numba_lanes.forward_states,
            _vectors(target_nl, dtype),
            condensed,
            moves,
            target_nl,
            excluded,
            prior_ak,
            like,
            slot_l,
            state_nss,
            log_ns,
            chunk=1,
        )
    else:
        wanted = _nothing(len(switch_l), dtype)._replace(slot_l=slot_l, backward_nss=state_nss, backward_log_ns=log_ns)
        in_threads(
            numba_smooth.smooth,
            _vectors(target_nl, dtype),
            condensed,
            moves,
            target_nl,
            excluded,
            prior_ak,
            like,
            _stride(condensed),
            0,
            0,
            wanted,
            chunk=1,
        )
    return state_nss, log_ns


def _nothing(sites: int, dtype: Any) -> numba_smooth.Wanted:
    nl, nlx = np.empty((0, 0), dtype), np.empty((0, 0, 0), dtype)
    return numba_smooth.Wanted(
        nl, nl, nl, nl, nlx, nlx, np.empty((0, 0, 0), np.int32), nlx, nlx, np.full(sites, -1, np.int64), nlx,
        np.empty((0, 0)), np.empty(0),
    )  # fmt: skip


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
    dtype: Any = np.float32,
) -> np.ndarray:
    """As the door's `posterior`."""
    groups = 1 if ancestry is None else len(ancestry.prior_a)
    every_nls = np.full((*target_nl.shape, groups * k), np.nan, dtype)
    if every_nls.size:
        condensed, moves, prior_ak, like = _prepared(reference_lw, k, switch_l, mismatch_l, prior_k, ancestry, dtype)
        in_threads(
            numba_smooth.smooth, _vectors(target_nl, dtype), condensed, moves, target_nl, _excluded(exclude_ne,
            len(target_nl)), prior_ak, like, _stride(condensed), 0,
            0, _nothing(len(switch_l), dtype)._replace(every_nls=every_nls), chunk=1,
        )  # fmt: skip
    return every_nls


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
    dtype: Any = np.float32,
) -> tuple[np.ndarray | None, ...]:
    """As the door's `posterior_sums`, its fields in order."""
    n, sites = target_nl.shape
    groups = 0 if ancestry is None else len(ancestry.prior_a)
    found = _nothing(sites, dtype)._replace(
        dosage_nl=np.empty((n, sites), dtype),
        mismatch_nl=np.empty((n, sites), dtype),
        switch_nl=np.empty((n, sites), dtype),
        redraw_nl=np.empty((n, sites) if groups else (0, 0), dtype),
        ancestry_nla=np.empty((n, sites, groups), dtype),
        label_nlg=np.empty((n, sites, labels), dtype),
        top_state_nlm=np.empty((n, sites, top), np.int32),
        top_weight_nlm=np.empty((n, sites, top), dtype),
        log_n=np.zeros(n),
    )
    if target_nl.size:
        condensed, moves, prior_ak, like = _prepared(
            reference_lw, k, switch_l, mismatch_l, prior_k, ancestry, dtype, label_k, max(labels, 1)
        )
        in_threads(
            numba_smooth.smooth,
            _vectors(target_nl, dtype),
            condensed,
            moves,
            target_nl,
            _excluded(exclude_ne, n),
            prior_ak,
            like,
            _stride(condensed),
            labels,
            top,
            found,
        )
    return (
        found.log_n, found.dosage_nl, found.mismatch_nl, found.switch_nl, found.redraw_nl if groups else None,
        found.ancestry_nla if groups else None, found.label_nlg if labels else None,
        found.top_state_nlm if top else None, found.top_weight_nlm if top else None,
    )  # fmt: skip
