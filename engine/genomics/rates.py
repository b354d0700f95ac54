"""Switch and mismatch probabilities of single sites, learned from the panel itself by expectation maximisation.

Each round takes some people of the panel, leaves each out of it, and counts for every site how often the copied haplotype
is drawn anew before it and how often the allele there differs from the copied one (posterior expectations,
`haplotype_hmm.posterior_sums`). The new rates are those counts with a prior of `prior` haplotypes that follow the map and the
config: r_l = (prior r0_l + switches_l) / (prior + n), and the same for mismatches. People are other ones each round.

Only what the panel says of its own people is used; the people of a held-out set never enter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from engine import seeding
from engine.genomics.matching import of_person
from engine.kernels import bits, haplotype_hmm

BATCH = 64  # haplotypes counted at a time: three float32 values per haplotype and site are held
Progress = Callable[[int, int], None]


class Rates(NamedTuple):
    """switch_l, mismatch_l: float64 (L,); nats_r: mean log-likelihood of each round's people before it, nats per haplotype,
    with n_r of them, both (rounds,)."""

    switch_l: np.ndarray
    mismatch_l: np.ndarray
    nats_r: np.ndarray
    n_r: np.ndarray


def learn(
    bits_lw: np.ndarray,
    k: int,
    first_haplotype: np.ndarray,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    *,
    rounds: int,
    people: int,
    prior: float,
    seed: int = 0,
    fixed_l: np.ndarray | None = None,
    progress: Progress | None = None,
) -> Rates:
    """Rates after `rounds` of expectation maximisation from the ones given, which are the prior throughout.

    Args:
        bits_lw, k: the panel, K haplotypes; first_haplotype: int64 (S + 1,), sample s owns [first[s], first[s+1]).
        switch_l, mismatch_l: float64 (L,).
        people: people counted in each round; all of them where the panel has fewer.
        prior: how many haplotypes the given rates weigh as much as.
        fixed_l: bool (L,), sites whose mismatch stays; switch probabilities of 1 stay.
    """
    start_l, right_l = switch_l, mismatch_l
    samples = len(first_haplotype) - 1
    nats_r, n_r = np.zeros(rounds), np.zeros(rounds, np.int64)
    bits_nw, own_ke = bits.transpose(bits_lw, k), of_person(first_haplotype)
    for turn in range(rounds):
        chosen = seeding.generator(seed, "genomics.rates", turn).permutation(samples)[: min(people, samples)]
        target_n = np.concatenate([np.arange(first_haplotype[s], first_haplotype[s + 1]) for s in np.sort(chosen)])
        leave_ne = own_ke[target_n]
        switches_l, mismatches_l, nats = np.zeros(len(switch_l)), np.zeros(len(switch_l)), 0.0
        for at in range(0, len(target_n), BATCH):
            part = slice(at, at + BATCH)
            found = haplotype_hmm.posterior_sums(
                bits_lw, k, bits.unpack(np.ascontiguousarray(bits_nw[target_n[part]]), len(switch_l)), switch_l,
                mismatch_l, exclude_ne=leave_ne[part],
            )  # fmt: skip
            switches_l += found.switch_nl.sum(axis=0, dtype=np.float64)
            mismatches_l += found.mismatch_nl.sum(axis=0, dtype=np.float64)
            nats += found.log_likelihood_n.sum()
            if progress is not None:
                progress(turn * len(target_n) + min(at + BATCH, len(target_n)), rounds * len(target_n))
        n = len(target_n)
        # float32 sums of probabilities: where every haplotype switches they come out a little above their number
        switches_l, mismatches_l = switches_l.clip(0, n), mismatches_l.clip(0, n)
        nats_r[turn], n_r[turn] = nats / n, n
        switch_l = np.where(start_l < 1, (prior * start_l + switches_l) / (prior + n), 1.0)
        mismatch_l = (prior * right_l + mismatches_l) / (prior + n)
        if fixed_l is not None:
            mismatch_l = np.where(fixed_l, right_l, mismatch_l)
    return Rates(switch_l, mismatch_l, nats_r, n_r)
