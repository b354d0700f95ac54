"""Learned rates: one round against counts by enumeration, likelihood that rises, hotspots that are found, people left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.errors import CorruptRun, InputError
from engine.genomics import li_stephens, rates
from engine.genomics.li_stephens import LiStephensConfig, fit
from engine.genomics.panel import panel_from_alleles
from engine.kernels import haplotype_hmm


def mosaics(people: int, sites: int, switch_l: np.ndarray, seed: int, founders: int = 12):
    """A panel of mosaics of a few founders that switch by `switch_l`; 1 in 500 alleles is inverted, 1 in 5 at site 7."""
    rng = np.random.default_rng(seed)
    founder_kl = (rng.random((founders, sites)) < 0.5).astype(np.uint8)
    alleles_nl = np.empty((2 * people, sites), np.uint8)
    for n in range(2 * people):
        switched = rng.random(sites) < switch_l
        switched[0] = True
        donor = rng.integers(0, founders, sites)[np.maximum.accumulate(np.where(switched, np.arange(sites), 0))]
        alleles_nl[n] = founder_kl[donor, np.arange(sites)]
    wrong_l = np.full(sites, 0.002)
    wrong_l[7] = 0.2
    alleles_nl ^= rng.random(alleles_nl.shape) < wrong_l
    position = np.arange(sites) * 1_000 + 1
    return panel_from_alleles(alleles_nl.T.copy(), position, "1", [f"p{s}" for s in range(people)])


def test_one_round_is_the_counts_of_everybody_left_out():
    panel = mosaics(4, 12, np.full(12, 0.2), 1)
    model = fit(panel, LiStephensConfig(ne=20_000, mismatch=0.01))
    switch_l, mismatch_l = model.switch_l(), model.mismatch_l
    learned = rates.learn(
        model.bits_lw, 8, model.samples.first_haplotype, switch_l, mismatch_l, rounds=1, people=99, prior=5.0
    )
    switches, mismatches, nats = np.zeros(12), np.zeros(12), []
    alleles_nl = panel.alleles_nl()
    for n in range(8):
        others = panel.select(samples=np.delete(np.arange(4), n // 2))
        found = haplotype_hmm.posterior_sums(
            others.bits_lw, 6, alleles_nl[n : n + 1], switch_l, mismatch_l, implementation="reference"
        )
        switches += found.switch_nl[0]
        mismatches += found.mismatch_nl[0]
        nats.append(found.log_likelihood_n[0])
    np.testing.assert_allclose(learned.switch_l[1:], ((5 * switch_l + switches) / 13)[1:], rtol=1e-4)
    np.testing.assert_allclose(learned.mismatch_l, (5 * mismatch_l + mismatches) / 13, rtol=1e-4)
    assert learned.nats_r[0] == pytest.approx(np.mean(nats), abs=1e-4)
    assert learned.n_r.tolist() == [8]
    assert learned.switch_l[0] == 1


def test_the_map_is_corrected_and_unseen_people_are_likelier():
    """A hotspot that the map does not know and a site of many errors; people of the same kind that were not learned from."""
    true_l = np.full(60, 0.005)
    true_l[30] = 0.6
    everybody = mosaics(120, 60, true_l, 2)
    panel, unseen = everybody.select(samples=np.arange(100)), everybody.select(samples=np.arange(100, 120))
    plain = LiStephensConfig(ne=20_000, mismatch=0.002)
    before = fit(panel, plain)
    after = fit(panel, plain.model_copy(update={"learn_rounds": 5, "learn_people": 60, "learn_prior": 20.0}))
    gained = after.log_likelihood(unseen) - before.log_likelihood(unseen)
    assert gained.mean() > 0.5
    assert gained.mean() > 3 * gained.std() / len(gained) ** 0.5
    assert np.argmax(after.switch_l()[1:]) == 29
    assert np.argmax(after.mismatch_l) == 7
    assert after.hazard_l(2 * plain.ne, after.k) == pytest.approx(2 * after.hazard_l(plain.ne, after.k))


def test_nats_rise_with_each_round():
    panel = mosaics(40, 40, np.full(40, 0.05), 3)
    model = fit(panel, LiStephensConfig(ne=100_000, mismatch=0.05))
    learned = rates.learn(
        model.bits_lw, 80, model.samples.first_haplotype, model.switch_l(), model.mismatch_l, rounds=4, people=40,
        prior=1.0,
    )  # fmt: skip
    assert (np.diff(learned.nats_r) > 0).all()


def test_a_run_folder_keeps_what_was_learned(tmp_path):
    panel = mosaics(10, 20, np.full(20, 0.1), 4)
    model = fit(panel, LiStephensConfig(learn_rounds=2, learn_people=5))
    model.save(tmp_path / "run")
    loaded = li_stephens.load(tmp_path / "run")
    np.testing.assert_array_equal(loaded.learned_l, model.learned_l)
    np.testing.assert_array_equal(loaded.log_likelihood(panel), model.log_likelihood(panel))
    assert not np.array_equal(model.switch_l(), replace(model, learned_l=None).switch_l())
    (tmp_path / "run" / "checkpoints" / "step-000000" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CorruptRun):
        li_stephens.load(tmp_path / "run")


def test_one_person_cannot_be_left_out():
    with pytest.raises(InputError, match="left out"):
        fit(mosaics(1, 20, np.full(20, 0.1), 5), LiStephensConfig(learn_rounds=1))


@pytest.mark.parametrize("seed", range(4))
def test_rates_stay_probabilities_where_nearly_everybody_switches(seed):
    """Sums of float32 probabilities near 1 may come out above their number."""
    panel = mosaics(60, 50, np.full(50, 0.9), seed)
    model = fit(panel, LiStephensConfig())
    nearly_l = np.where(model.switch_l() < 1, 1 - 1e-12, 1.0)
    learned = rates.learn(
        model.bits_lw, 120, model.samples.first_haplotype, nearly_l, model.mismatch_l, rounds=2, people=60, prior=1.0
    )
    assert learned.switch_l.max() <= 1
    assert learned.mismatch_l.min() >= 0
