"""Banks of copying chains over a panel: what each foretells of every allele, given the alleles before it.

A `ChainSpec` says what a chain is in words (its Ne, its mismatch, whose child it is); `bank` makes probabilities per site of
it, from a model's map and, where they were learned, from the model's own rates; `predict` runs the bank over haplotypes.
The recursion and the model of a child below a parent are defined in `engine.kernels.haplotype_hmm.bank`. Mixing the chains
into one likelihood is left to `engine.genomics.mixture` and `engine.genomics.transformer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from engine.errors import UsageError
from engine.kernels import haplotype_hmm
from engine.kernels.haplotype_hmm import Bank, BankState

LEAST_SWITCH = 1e-12
LEAST_MISMATCH = 1e-9


class ChainSpec(BaseModel):
    """One chain.

    Attributes:
        ne: effective size; how often the haplotype changes, by the map. None: the chain is of the slow kind.
        redrawn: of a slow chain, probability per site that the haplotype is drawn anew, contigs included.
        mismatch: probability that an allele differs from the copied one; None takes the model's own per site.
        parent: place in the bank, from 0, of the chain that haplotypes are drawn by after a switch; None draws uniformly.
        floor: share of those draws that is uniform.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ne: float | None = Field(default=None, gt=0)
    redrawn: float | None = Field(default=None, gt=0, le=1)
    mismatch: float | None = Field(default=None, gt=0, lt=1)
    parent: int | None = Field(default=None, ge=0)
    floor: float = Field(default=0.0, ge=0, le=1)


class MixConfig(BaseModel):
    """Training of the mixture.

    Attributes:
        inputs: chains of the bank that are mixed; the others are parents only.
        cells: haplotypes times sites to learn from; as many people as that makes, at most all.
        held_out: share of those people that judges and is not learned from.
        hidden: width of the two hidden layers.
        epochs, learning_rate, weight_decay: of AdamW, with one cycle of the rate.
        clusters: mixtures of trees (`engine.genomics.clusters`) that are mixed in, each by its number of clusters.
        cluster_sites: panels of more sites than this have none: there a few clusters tell less than who is copied.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: list[int] = Field(min_length=1)
    cells: int = Field(default=8_000_000, ge=1)
    held_out: float = Field(default=0.1, gt=0, lt=1)
    hidden: int = Field(default=48, ge=1)
    epochs: int = Field(default=6, ge=1)
    learning_rate: float = Field(default=4e-3, gt=0)
    weight_decay: float = Field(default=1e-3, ge=0)
    clusters: list[int] = []
    cluster_sites: int = Field(default=2000, ge=0)


class BankPanel(NamedTuple):
    """What the bank copies from and is told of its sites: bits_lw, k; hazard_l (expected switches at Ne 1), mismatch_l and
    contig_start_l as in `chains.bank`."""

    bits_lw: np.ndarray
    k: int
    hazard_l: np.ndarray
    mismatch_l: np.ndarray
    contig_start_l: np.ndarray


class Predictions(NamedTuple):
    """What C chains foretold of N haplotypes.

    Attributes:
        logit_nlc: float32 (N, L, C), log of P(ALT | alleles before) / P(REF | alleles before).
        donors_nlc: float32 (N, L, C), effective number of haplotypes that may be copied there, 1..K, the allele unseen.
    """

    logit_nlc: np.ndarray
    donors_nlc: np.ndarray


def bank(specs: Sequence[ChainSpec], hazard_l: np.ndarray, mismatch_l: np.ndarray, contig_start_l: np.ndarray) -> Bank:
    """Chains as probabilities per site.

    Args:
        hazard_l: float64 (L,), expected switches between site l-1 and l at Ne 1 (4 d_l / K, or what was learned of it).
        mismatch_l: float64 (L,), the model's own.
        contig_start_l: bool (L,), first sites of contigs: chains with an `ne` start anew there, slow ones run on.

    Raises:
        UsageError: a chain has both or none of `ne` and `redrawn`, or its parent does not come before it.
    """
    switch_cl, mismatch_cl = np.empty((2, len(specs), len(hazard_l)))
    for c, spec in enumerate(specs):
        if (spec.ne is None) == (spec.redrawn is None):
            raise UsageError("either ne or redrawn", "both or none", f"chain {c}")
        if spec.parent is not None and spec.parent >= c:
            raise UsageError("a parent that comes before its child", str(spec.parent), f"chain {c}")
        if spec.ne is not None:
            switch_cl[c] = np.where(contig_start_l, 1.0, np.maximum(-np.expm1(-spec.ne * hazard_l), LEAST_SWITCH))
        else:
            switch_cl[c] = spec.redrawn
        mismatch_cl[c] = np.maximum(mismatch_l, LEAST_MISMATCH) if spec.mismatch is None else spec.mismatch
    parent_c = np.array([-1 if spec.parent is None else spec.parent for spec in specs], dtype=np.int64)
    return Bank(switch_cl, mismatch_cl, parent_c, np.array([spec.floor for spec in specs]))


def predict(
    chains: Bank,
    reference_lw: np.ndarray,
    k: int,
    target_nl: np.ndarray,
    *,
    leave_out: np.ndarray | None = None,
    state: BankState | None = None,
    first_site: int = 0,
    stop_site: int | None = None,
) -> Predictions:
    """What each chain foretells at sites first_site .. stop_site-1 of each haplotype; 8 bytes each are held.

    Arguments and errors as for `haplotype_hmm.bank_predict`.

    Args:
        reference_lw: uint64 (L, ceil(K/64)), the panel; k: its haplotypes.
        target_nl: uint8 (N, L): 0, 1, or 255 where missing.
        leave_out: int64 (N, E), panel haplotypes that target n may not copy (its own person's), -1-padded.
        state: of `start`: carried from one stretch of sites to the next, and changed in place.
    """
    return Predictions(
        *haplotype_hmm.bank_predict(
            reference_lw, k, target_nl, chains, exclude_ne=leave_out, state=state, first_site=first_site,
            stop_site=stop_site,
        )
    )  # fmt: skip


def start(chains: Bank, k: int, targets: int) -> BankState:
    """State of `targets` haplotypes before the first site, for `predict` by stretches or site by site (float32, C K each)."""
    return haplotype_hmm.bank_start(targets, len(chains.parent_c), k)


def nats(logit_nl: np.ndarray, target_nl: np.ndarray) -> np.ndarray:
    """float64 of the shape of logit_nl: log-probability of each allele; 0 where it is missing."""
    signed = np.where(target_nl == 1, logit_nl, -logit_nl.astype(np.float64))
    return np.where(target_nl == 255, 0.0, -np.logaddexp(0.0, -signed))
