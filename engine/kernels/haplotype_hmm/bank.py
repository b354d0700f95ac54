"""A bank of C copying chains over the same reference, run side by side as one sequential predictor (re-exported by the door).

What a chain foretells of site l uses the alleles at sites before l only, so that the product over sites is a probability
of whole sequences, for each chain and for every mixture whose weights look back only.

A chain without a parent is the copying model of the door with a uniform prior. A chain with a parent draws the haplotype
after a switch not uniformly but from what its parent, a chain of its own that comes before it in the bank, holds likely
just then. With h_l(k) the parent's probability of haplotype k at site l given the alleles before l, and
g_l(k) = (1 - floor) h_l(k) + floor / K,

    p_l(k) = (1 - r_l) f_{l-1}(k) + r_l g_l(k)          before the allele at l is seen
    f_l(k) = e_l(k) p_l(k) / sum_k e_l(k) p_l(k)        and after.

That is a hidden Markov model whose transitions at site l, (1 - r_l) [k = k'] + r_l g_l(k'), depend on alleles seen before
l: P(x_l | x_<l) = sum_k e_l(k) p_l(k) sums to 1 over the two alleles at every site, so P sums to 1 over all sequences. A
parent may be lenient (a mismatch near 1/2) and slow (it forgets over many sites): a soft list of haplotypes that look like
the target over a long stretch, contigs included, where the chain below copies one of them. r_0 is 1 in every chain.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from engine.errors import UsageError
from engine.kernels.haplotype_hmm import checks


class Bank(NamedTuple):
    """Chains, parents before their children.

    Attributes:
        switch_cl: float64 (C, L), probability that the haplotype is drawn anew between site l-1 and l; column 0 is not used.
        mismatch_cl: float64 (C, L), 0 < mismatch < 1.
        parent_c: int64 (C,), the chain that haplotypes are drawn by after a switch; -1 draws uniformly.
        floor_c: float64 (C,), share of the draws that is uniform in spite of a parent.
    """

    switch_cl: Any
    mismatch_cl: Any
    parent_c: Any
    floor_c: Any


class BankState(NamedTuple):
    """Where N targets stand: state_nck (N, C, 64 ceil(K/64)) of the dtype of the states, p of the last site predicted, not
    scaled; sums_nct float64 (N, C, 2), its sums over haplotypes with allele 0 and 1 there. NumPy, or tensors where the
    targets are one. Changed in place."""

    state_nck: Any
    sums_nct: Any


def checked_bank(bank: Bank, sites: int) -> Bank:
    """Contiguous arrays of the stated dtypes; UsageError where they do not fit."""
    switch_cl, mismatch_cl = (checks.small(values, np.float64) for values in bank[:2])
    parent_c, floor_c = checks.small(bank.parent_c, np.int64), checks.small(bank.floor_c, np.float64)
    chains = len(parent_c)
    if not chains or switch_cl.shape != (chains, sites) or mismatch_cl.shape != (chains, sites):
        raise UsageError(
            f"switch_cl and mismatch_cl as (chains, {sites})", f"{switch_cl.shape} and {mismatch_cl.shape}", "Bank"
        )
    if not ((switch_cl[:, 1:] >= 0) & (switch_cl[:, 1:] <= 1)).all():
        raise UsageError("switch_cl in 0..1", "values outside", "Bank")
    if not ((mismatch_cl > 0) & (mismatch_cl < 1)).all():
        raise UsageError("0 < mismatch_cl < 1", "values outside", "Bank")
    if parent_c.shape != (chains,) or not ((parent_c >= -1) & (parent_c < np.arange(chains))).all():
        raise UsageError("parents before their children, or -1", str(parent_c.tolist()), "Bank")
    if floor_c.shape != (chains,) or not ((floor_c >= 0) & (floor_c <= 1)).all():
        raise UsageError(f"floor_c as {chains} shares in 0..1", str(floor_c.tolist()), "Bank")
    return Bank(switch_cl, mismatch_cl, parent_c, floor_c)


def bank_start(targets: int, chains: int, k: int, *, dtype: Any = np.float32, device: Any = None) -> BankState:
    """The state of `targets` targets before their first site; tensors on `device`, NumPy where that is None."""
    words = (k + 63) // 64
    state = BankState(np.zeros((targets, chains, 64 * words), dtype), np.ones((targets, chains, 2)))
    if device is None:
        return state
    import torch

    return BankState(*(torch.from_numpy(values).to(device) for values in state))


def bank_predict(
    reference_lw: Any,
    k: int,
    target_nl: Any,
    bank: Bank,
    *,
    exclude_ne: Any = None,
    state: BankState | None = None,
    first_site: int = 0,
    stop_site: int | None = None,
    dtype: Any = np.float32,
    implementation: str | None = None,
) -> tuple[Any, Any]:
    """What each chain foretells at sites first_site .. stop_site-1; O(N C K) per site.

    Alleles at sites before stop_site - 1 are read, so that a sequence can be drawn: predict one site with the `state` of the
    last call, draw its allele into target_nl, predict the next.

    Args:
        target_nl: uint8 (N, L), as in the door; a missing allele says nothing.
        state: of `bank_start`, or as the call for the sites before left it; needed for first_site > 0. Changed in place.

    Returns:
        logit_nlc: float32 (N, sites, C), log of P(allele 1 | alleles before) / P(allele 0 | alleles before).
        donors_nlc: float32 (N, sites, C), effective number of haplotypes that the chain may be copying there, the
            allele unseen: 1 / sum_k p(k)^2, from 1 to K. Both are tensors where the targets are one.

    Raises:
        UsageError: shapes, ranges or dtypes that do not fit, no haplotype left to copy, or first_site without `state`.
        Unsupported: the named implementation cannot take these arrays.
    """
    chosen, arrays, options, bank = _checked_call(reference_lw, k, target_nl, bank, exclude_ne, dtype, implementation)
    n, sites = arrays[2].shape
    stop_site = sites if stop_site is None else stop_site
    if not 0 <= first_site <= stop_site <= sites:
        raise UsageError(f"0 <= first_site <= stop_site <= {sites}", f"{first_site} and {stop_site}", "bank_predict")
    chains, on_device = len(bank.parent_c), checks.is_tensor(target_nl)
    if state is None:
        if first_site > 0:
            raise UsageError("the state before first_site", "none", "bank_predict", "starting at site 0")
        state = bank_start(n, chains, k, dtype=dtype, device=target_nl.device if on_device else None)
    shape = (n, chains, 64 * ((k + 63) // 64))
    name = str(state.state_nck.dtype).removeprefix("torch.")
    if tuple(state.state_nck.shape) != shape or name != options["dtype"].name:
        raise UsageError(
            f"a state of {options['dtype']} {shape}", f"{name} {tuple(state.state_nck.shape)}", "bank_predict"
        )
    if any(checks.is_tensor(values) != on_device for values in state) or (
        on_device and any(values.device != target_nl.device or not values.is_contiguous() for values in state)
    ):
        raise UsageError("a contiguous state where the targets are", "another", "bank_predict", "bank_start(device=)")
    result: tuple[Any, Any] = chosen.bank_predict(
        *arrays, bank, exclude_ne=options["exclude_ne"], state=state, first_site=first_site, stop_site=stop_site
    )
    return result


def bank_counts(
    reference_lw: Any,
    k: int,
    target_nl: Any,
    bank: Bank,
    *,
    wanted_c: Any = None,
    exclude_ne: Any = None,
    dtype: Any = np.float32,
    implementation: str | None = None,
) -> tuple[Any, Any, Any]:
    """Expected switches and mismatches of each chain at each site, given all alleles of the target: what expectation
    maximisation of a chain's rates needs, its parent's held fixed. O(N C K L), about three times `bank_predict`.

    Args:
        wanted_c: bool (C,), chains to count; None for all. Others are walked as parents only and their counts are 0.

    Returns:
        switch_ncl, mismatch_ncl: float32 (N, C, L), posterior probability of a draw (of the same haplotype, too) between
            l-1 and l, 1 at site 0, and that the allele differs from the copied one, 0 where it is missing.
        nats_nc: float64 (N, C), log-likelihood. Tensors where the targets are one.

    Raises:
        UsageError, Unsupported: as for `bank_predict`.
    """
    chosen, arrays, options, bank = _checked_call(reference_lw, k, target_nl, bank, exclude_ne, dtype, implementation)
    wanted_c = np.ones(len(bank.parent_c), bool) if wanted_c is None else checks.small(wanted_c, bool)
    if wanted_c.shape != bank.parent_c.shape:
        raise UsageError(f"{len(bank.parent_c)} booleans", str(wanted_c.shape), "bank_counts wanted_c")
    result: tuple[Any, Any, Any] = chosen.bank_counts(
        *arrays, bank, exclude_ne=options["exclude_ne"], wanted_c=wanted_c, dtype=options["dtype"]
    )
    return result


def _checked_call(
    reference_lw: Any, k: int, target_nl: Any, bank: Bank, exclude_ne: Any, dtype: Any, implementation: str | None
) -> tuple[Any, tuple[Any, int, Any], dict[str, Any], Bank]:
    """The implementation; reference, k and targets; options; the bank."""
    chosen = checks.module(implementation, reference_lw, target_nl)
    sites = len(reference_lw)
    arrays, options = checks.checked(
        reference_lw, k, target_nl, np.zeros(sites), np.full(sites, 0.5), None, exclude_ne, None, dtype
    )
    return chosen, arrays[:3], options, checked_bank(bank, sites)
