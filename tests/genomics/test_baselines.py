"""The baselines: probabilities that sum to one, samples that follow them, and the HAPNEST recipe segment by segment."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from engine import seeding
from engine.errors import InputError, Unsupported, UsageError
from engine.genomics.baselines import PSEUDOCOUNT, fit_hapnest, fit_independent, fit_markov
from engine.genomics.panel import HaplotypePanel, panel_from_alleles


def panel(alleles_ln: np.ndarray, contig=None, group=None, position_cm=None) -> HaplotypePanel:
    sites, n = alleles_ln.shape
    return panel_from_alleles(
        alleles_ln.astype(np.uint8), np.arange(1, sites + 1) * 1000, "1" if contig is None else np.array(contig),
        [f"P{k}" for k in range(n // 2)], group=group, position_cm=position_cm,
    )  # fmt: skip


@pytest.fixture
def small() -> HaplotypePanel:
    """Five sites on two contigs, 20 haplotypes of two groups that differ."""
    rng = np.random.default_rng(1)
    alleles_ln = np.repeat(rng.random((1, 20)) < 0.5, 5, axis=0) ^ (rng.random((5, 20)) < 0.15)
    alleles_ln[:, 12:] ^= rng.random((5, 8)) < 0.4
    return panel(alleles_ln, contig=["1", "1", "1", "2", "2"], group=["A"] * 6 + ["B"] * 4)


def everything(like: HaplotypePanel) -> HaplotypePanel:
    """All 32 haplotypes of five sites, as haploid people."""
    alleles_ln = np.array(list(itertools.product((0, 1), repeat=5)), dtype=np.uint8).T
    return panel_from_alleles(alleles_ln, like.sites.position_bp, like.sites.contig, [f"H{k}" for k in range(32)])


@pytest.mark.parametrize("fit", [fit_independent, fit_markov])
def test_probabilities_of_all_haplotypes_sum_to_one(fit, small: HaplotypePanel) -> None:
    assert np.exp(fit(small).log_likelihood(everything(small))).sum() == pytest.approx(1, abs=1e-12)


def test_likelihood_by_hand(small: HaplotypePanel) -> None:
    """One group: product over sites of counts with half a pseudocount each, the second contig starting anew."""
    a = small.alleles_nl().astype(int)
    n = len(a)
    x = np.array([1, 0, 1, 1, 0])
    nats = 0.0
    for site in range(5):
        rows = np.ones(n, bool) if site in (0, 3) else a[:, site - 1] == x[site - 1]
        nats += np.log(((a[rows, site] == x[site]).sum() + PSEUDOCOUNT) / (rows.sum() + 2 * PSEUDOCOUNT))
    every = everything(small)
    row = int("".join(map(str, x)), 2)
    assert fit_markov(small, per_group=False).log_likelihood(every)[row] == pytest.approx(nats, abs=1e-12)
    alone = sum(np.log(((a[:, s] == x[s]).sum() + PSEUDOCOUNT) / (n + 2 * PSEUDOCOUNT)) for s in range(5))
    assert fit_independent(small, per_group=False).log_likelihood(every)[row] == pytest.approx(alone, abs=1e-12)


def test_groups_are_a_mixture(small: HaplotypePanel) -> None:
    every, model = everything(small), fit_markov(small)
    parts = [
        fit_markov(small.select(samples=small.samples.group == name), per_group=False).log_likelihood(every)
        for name in ("A", "B")
    ]
    assert model.group_names == ["A", "B"]
    assert np.exp(model.log_likelihood(every)) == pytest.approx(0.6 * np.exp(parts[0]) + 0.4 * np.exp(parts[1]))


@pytest.mark.parametrize("fit", [fit_independent, fit_markov])
def test_samples_follow_the_likelihood(fit, small: HaplotypePanel) -> None:
    model = fit(small)
    made = model.sample(6000, seed=3)
    code_n = made.alleles_nl() @ (1 << np.arange(4, -1, -1))
    seen = np.bincount(code_n, minlength=32) / len(code_n)
    p = np.exp(model.log_likelihood(everything(small)))
    # both haplotypes of a person come from one group, so that the deviation is at most that of 6,000 draws
    assert np.abs(seen - p).max() < 5 * np.sqrt(p.max() / 6000)
    assert (np.abs(seen - p) < 6 * np.sqrt(p / 6000) + 1e-3).all()


@pytest.mark.parametrize("fit", [fit_independent, fit_markov, fit_hapnest])
def test_person_k_is_a_function_of_seed_and_k(fit, small: HaplotypePanel) -> None:
    model = fit(small)
    many, few = model.sample(130, seed=7), model.sample(5, seed=7)
    assert (many.alleles_nl()[:10] == few.alleles_nl()).all()
    assert many.samples.group[:5].tolist() == few.samples.group.tolist()
    assert (model.sample(130, seed=8).alleles_nl() != many.alleles_nl()).any()
    assert many.samples.ids[129] == "SYN000000129"
    assert set(model.sample(9, groups="B", seed=1).samples.group) == {"B"}
    assert model.sample(0).n_haplotypes == 0


def test_markov_keeps_neighbours_and_independent_sites_do_not() -> None:
    rng = np.random.default_rng(0)
    row_n = rng.random(200) < 0.5
    source = panel(np.stack([row_n ^ (rng.random(200) < 0.02) for _ in range(6)]))
    correlation = {}
    for fit in (fit_independent, fit_markov):
        a = fit(source).sample(500, seed=0).alleles_nl().astype(float)
        correlation[fit] = np.corrcoef(a[:, 2], a[:, 3])[0, 1]
    assert correlation[fit_markov] > 0.8
    assert abs(correlation[fit_independent]) < 0.15


def test_hapnest_mutation_ages() -> None:
    """Kimura and Ohta: -4 Ne p ln(p) / (1 - p); never where nobody carries it, always where all do."""
    alleles_ln = np.zeros((4, 20), dtype=np.uint8)
    alleles_ln[1, :10], alleles_ln[2, 0], alleles_ln[3] = 1, 1, 1
    age_l = fit_hapnest(panel(alleles_ln), ne=1000).age_l
    assert age_l[0] == 0
    assert age_l[1] == pytest.approx(4000 * 0.5 * np.log(2) / 0.5)
    assert age_l[2] == pytest.approx(4000 * 0.05 * np.log(20) / 0.95)
    assert age_l[3] == np.inf


def test_hapnest_copies_donors_and_drops_young_mutations(small: HaplotypePanel) -> None:
    """Every haplotype is rebuilt by hand from its segments."""
    # ages about that of a segment (mean 2 Ne / N = 50 and 75), so that some mutations are younger and some older
    model = replace(fit_hapnest(small, ne=300, rho=40.0), age_l=np.array([20.0, 60.0, 80.0, 40.0, np.inf]))
    made = model.sample(40, seed=5)
    alleles_nl, dropped = made.alleles_nl(), 0
    for person in range(40):
        group = model.group_names.index(made.samples.group[person])
        rng = seeding.generator(5, "genomics.baselines.hapnest", person)
        for row in (2 * person, 2 * person + 1):
            covered = []
            for first, stop, donor, age in model.segments(group, rng):
                assert donor in model.members[group]
                assert stop <= 3 or first >= 3  # a segment ends where a contig ends
                for site in range(first, stop):
                    was = model.alleles_nl[donor, site]
                    kept = was if model.age_l[site] > age else 0
                    dropped += was != kept
                    assert alleles_nl[row, site] == kept
                covered += range(first, stop)
            assert covered == list(range(5))
    assert dropped > 0


def test_hapnest_segment_lengths() -> None:
    """T ~ Gamma(2, Ne/N) and length ~ Exp(1 / (2 T rho)) have mean 1 / (2 rho Ne / N) cM."""
    sites, n, ne, rho = 40_000, 20, 100.0, 0.5
    cm = np.arange(sites) * 0.001
    model = fit_hapnest(panel(np.zeros((sites, n), np.uint8), position_cm=cm), ne=ne, rho=rho)
    lengths = []
    for k in range(60):
        segments = model.segments(0, seeding.generator(0, "test", k))
        lengths += [(stop - first) * 0.001 for first, stop, _, _ in segments[:-1]]
    mean = 1 / (2 * rho * ne / n)
    # a site that ends a segment is whole: half a site more on average; segments cut by the end are left out
    assert np.median(lengths) < mean < 1.3 * np.mean(lengths)
    assert np.mean(lengths) == pytest.approx(mean, rel=0.12)


def test_refusals(small: HaplotypePanel) -> None:
    model = fit_markov(small)
    with pytest.raises(Unsupported, match="only samples"):
        fit_hapnest(small).log_likelihood(small)
    with pytest.raises(UsageError, match="'C'"):
        model.sample(2, groups="C")
    with pytest.raises(UsageError, match="2 people"):
        model.sample(2, groups=["A"])
    with pytest.raises(UsageError, match="above 0"):
        fit_hapnest(small, ne=0)
    holes = small.alleles_nl().T.copy()
    holes[2, 3] = 255
    with pytest.raises(InputError, match="missing"):
        fit_independent(panel(holes))
    with pytest.raises(InputError, match="same sites"):
        model.log_likelihood(small.select(sites=slice(0, 4)))
    with pytest.raises(InputError, match="do not fall"):
        fit_hapnest(panel(np.zeros((3, 4), np.uint8), position_cm=np.array([0.0, 2.0, 1.0])))
