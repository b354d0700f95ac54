"""Banks of chains: each a proper sequential model, equal to the plain recursion where it is one, step by step as in one go."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engine.errors import Unsupported, UsageError
from engine.kernels import bits, haplotype_hmm
from engine.kernels.haplotype_hmm import Bank


def case(sites: int, k: int, n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    reference_lk = (rng.random((sites, k)) < rng.uniform(0.05, 0.6, (sites, 1))).astype(np.uint8)
    target_nl = (rng.random((n, sites)) < 0.4).astype(np.uint8)
    bank = Bank(rng.uniform(0, 0.5, (4, sites)), rng.uniform(0.01, 0.49, (4, sites)), [-1, -1, 0, 2], [0, 0, 0.1, 0])
    return reference_lk, bits.pack(reference_lk), target_nl, bank


def nats(logit_nlc, target_nl):
    """Log-probability of each target under each chain, float64 (N, C)."""
    signed = np.where(target_nl[:, :, None] == 1, 1.0, -1.0) * logit_nlc
    return -np.logaddexp(0, -signed).sum(axis=1)


def emission(reference_k, allele, wrong):
    return np.where(reference_k == allele, 1 - wrong, wrong)


@pytest.mark.parametrize("implementation", ["reference", "numba"])
def test_sequences_sum_to_one(implementation):
    """Over all 2^6 sequences of a panel of three, for chains with and without parents and floors."""
    _, packed, _, bank = case(6, 3, 1)
    every_nl = np.array(list(itertools.product((0, 1), repeat=6)), dtype=np.uint8)
    logit_nlc, _ = haplotype_hmm.bank_predict(
        packed, 3, every_nl, bank, dtype=np.float64, implementation=implementation
    )
    np.testing.assert_allclose(np.exp(nats(logit_nlc, every_nl)).sum(axis=0), 1, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "numba"])
def test_a_child_is_the_sum_over_paths(implementation):
    """Against all K^L paths of the copied haplotype, its transitions taken from the parent by hand."""
    reference_lk, packed, target_nl, bank = case(5, 3, 1, seed=4)
    target, parent = target_nl[0], np.full(3, 1 / 3)
    moves = [np.tile(parent, (3, 1))]
    for site in range(1, 5):
        seen = parent * emission(reference_lk[site - 1], target[site - 1], bank.mismatch_cl[0, site - 1])
        parent = (1 - bank.switch_cl[0, site]) * seen / seen.sum() + bank.switch_cl[0, site] / 3
        switch = bank.switch_cl[2, site]
        moves.append((1 - switch) * np.eye(3) + switch * (0.9 * parent + 0.1 / 3))
    total = 0.0
    for path in itertools.product(range(3), repeat=5):
        weight = 1.0
        for site, copied in enumerate(path):
            weight *= moves[site][path[site - 1], copied]
            weight *= emission(reference_lk[site, copied], target[site], bank.mismatch_cl[2, site])
        total += weight
    logit_nlc, _ = haplotype_hmm.bank_predict(
        packed, 3, target_nl, bank, dtype=np.float64, implementation=implementation
    )
    assert nats(logit_nlc, target_nl)[0, 2] == pytest.approx(np.log(total), abs=1e-6)


@pytest.mark.parametrize("k", [2, 63, 64, 65, 131])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_implementations_agree(k, dtype):
    _, packed, target_nl, bank = case(40, k, 3, seed=k)
    target_nl[0, 7] = 255
    bank.switch_cl[:, 11] = 1  # a contig starts
    bank.switch_cl[1, 12:20] = 0
    exclude_ne = np.array([[0, -1], [k - 1, -1], [-1, -1]])
    for found, expected in zip(
        haplotype_hmm.bank_predict(packed, k, target_nl, bank, exclude_ne=exclude_ne, dtype=dtype),
        haplotype_hmm.bank_predict(packed, k, target_nl, bank, exclude_ne=exclude_ne, implementation="reference"),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_plain_chain_is_the_copying_model():
    _, packed, target_nl, bank = case(90, 70, 3, seed=5)
    exclude_ne = np.array([[3, 4], [0, 1], [69, -1]])
    target_nl[1, 30:40] = 255
    logit_nlc, _ = haplotype_hmm.bank_predict(packed, 70, target_nl, bank, exclude_ne=exclude_ne)
    expected = haplotype_hmm.log_likelihood(
        packed, 70, target_nl, bank.switch_cl[1], bank.mismatch_cl[1], exclude_ne=exclude_ne, implementation="reference"
    )
    found = [nats(logit_nlc[[n]][:, row != 255], row[None, row != 255])[0, 1] for n, row in enumerate(target_nl)]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_steps_are_the_whole():
    """Site by site, as a sequence is drawn: the allele at a site is not there yet when the site is predicted."""
    _, packed, target_nl, bank = case(90, 70, 3, seed=6)
    exclude_ne = np.array([[3, 4], [0, 1], [69, -1]])
    logit_nlc, donors_nlc = haplotype_hmm.bank_predict(packed, 70, target_nl, bank, exclude_ne=exclude_ne)
    assert 0.99 < donors_nlc.min() <= donors_nlc.max() < 70
    drawn_nl, state = np.zeros_like(target_nl), haplotype_hmm.bank_start(3, 4, 70)
    for site in range(90):
        one, donors = haplotype_hmm.bank_predict(
            packed, 70, drawn_nl, bank, exclude_ne=exclude_ne, state=state, first_site=site, stop_site=site + 1
        )
        np.testing.assert_array_equal(one[:, 0], logit_nlc[:, site])
        np.testing.assert_array_equal(donors[:, 0], donors_nlc[:, site])
        drawn_nl[:, site] = target_nl[:, site]


@pytest.mark.parametrize("implementation", ["reference", "numba"])
def test_counts_are_sums_over_paths(implementation):
    """Posterior switches and mismatches against all paths and all patterns of switches, for a child and its parent."""
    reference_lk, packed, target_nl, bank = case(5, 3, 1, seed=7)
    target_nl[0, 2] = 255
    target = target_nl[0]
    parent = np.full(3, 1 / 3)
    draws = {0: [parent] * 5, 2: [parent]}
    for site in range(1, 5):
        seen = parent
        if target[site - 1] != 255:
            seen = parent * emission(reference_lk[site - 1], target[site - 1], bank.mismatch_cl[0, site - 1])
        parent = (1 - bank.switch_cl[0, site]) * seen / seen.sum() + bank.switch_cl[0, site] / 3
        draws[2].append(0.9 * parent + 0.1 / 3)
    switch_ncl, mismatch_ncl, nats_nc = haplotype_hmm.bank_counts(
        packed, 3, target_nl, bank, wanted_c=[True, False, True, False], dtype=np.float64, implementation=implementation
    )
    for c, draw in draws.items():
        total, switches, mismatches = 0.0, np.zeros(5), np.zeros(5)
        for path in itertools.product(range(3), repeat=5):
            right = np.array([target[site] == reference_lk[site, path[site]] for site in range(5)])
            for switched in itertools.product((False, True), repeat=4):
                weight = draw[0][path[0]]
                for site in range(1, 5):
                    rate = bank.switch_cl[c, site]
                    stays = (1 - rate) * (path[site] == path[site - 1])
                    weight *= rate * draw[site][path[site]] if switched[site - 1] else stays
                for site in np.flatnonzero(target != 255):
                    weight *= 1 - bank.mismatch_cl[c, site] if right[site] else bank.mismatch_cl[c, site]
                total += weight
                switches += weight * np.array([True, *switched])
                mismatches += weight * (~right & (target != 255))
        assert nats_nc[0, c] == pytest.approx(np.log(total), abs=1e-9)
        np.testing.assert_allclose(switch_ncl[0, c], switches / total, rtol=1e-6)
        np.testing.assert_allclose(mismatch_ncl[0, c], mismatches / total, rtol=1e-6)
    assert not switch_ncl[:, [1, 3]].any()


@pytest.mark.parametrize("k", [2, 64, 131])
def test_implementations_count_alike(k):
    _, packed, target_nl, bank = case(40, k, 3, seed=k)
    target_nl[0, 7] = 255
    bank.switch_cl[:, 11] = 1
    exclude_ne = np.array([[0, -1], [k - 1, k - 1], [-1, -1]])
    for dtype in (np.float32, np.float64):
        for found, expected in zip(
            haplotype_hmm.bank_counts(packed, k, target_nl, bank, exclude_ne=exclude_ne, dtype=dtype),
            haplotype_hmm.bank_counts(packed, k, target_nl, bank, exclude_ne=exclude_ne, implementation="reference"),
            strict=True,
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "numba"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_excluded_haplotype_that_alone_agrees_counts_for_nothing(implementation, dtype):
    """A hundred private alleles in a row: its backward state would be 1e400 times that of the others."""
    reference_lk, _, target_nl, bank = case(110, 70, 1, seed=9)
    reference_lk[5:105], reference_lk[5:105, 7] = 0, 1
    target_nl[0] = reference_lk[:, 7]
    bank = bank._replace(switch_cl=np.full((4, 110), 1e-3), mismatch_cl=np.full((4, 110), 1e-4))
    given = {"dtype": dtype, "implementation": implementation}
    found = haplotype_hmm.bank_counts(bits.pack(reference_lk), 70, target_nl, bank, exclude_ne=np.array([[7]]), **given)
    without = haplotype_hmm.bank_counts(bits.pack(np.delete(reference_lk, 7, axis=1)), 69, target_nl, bank, **given)
    for got, wanted in zip(found, without, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused():
    _, packed, target_nl, bank = case(10, 5, 2)

    def call(changed, **more):
        return haplotype_hmm.bank_predict(packed, 5, target_nl, changed, **more)

    with pytest.raises(UsageError, match="parents before their children"):
        call(bank._replace(parent_c=[-1, 2, 0, 0]))
    with pytest.raises(UsageError, match="0 < mismatch_cl < 1"):
        call(bank._replace(mismatch_cl=np.zeros((4, 10))))
    with pytest.raises(UsageError, match="switch_cl and mismatch_cl"):
        call(bank._replace(switch_cl=bank.switch_cl[:, 1:]))
    with pytest.raises(UsageError, match="starting at site 0"):
        call(bank, first_site=3)
    with pytest.raises(UsageError, match="left to copy"):
        call(bank, exclude_ne=np.tile(np.arange(5), (2, 1)))
    with pytest.raises(Unsupported, match="tensors on a GPU"):
        call(bank, implementation="triton")
