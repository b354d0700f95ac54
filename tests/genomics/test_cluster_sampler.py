"""Sampling from clusters: the distribution that was learned, pairs of haplotypes, groups, rare alleles, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from engine.errors import UsageError
from engine.genomics import cluster_sampler, clusters, exposure, li_stephens, run_folder
from engine.genomics.li_stephens import LiStephensConfig, fit
from engine.genomics.panel import panel_from_alleles
from engine.kernels import bits

SITES = 40


def panel_of_clusters(people: int = 300, seed: int = 0, alt_index=None):
    """Two groups: A of clusters 0 and 1, both haplotypes of a person of the same one; B of cluster 2. A private allele."""
    rng = np.random.default_rng(seed)
    alt_sl = np.random.default_rng(99).beta(0.4, 0.4, (3, SITES)).clip(0.04, 0.96)
    group = np.arange(people) < people // 2
    cluster_n = np.repeat(np.where(group, rng.integers(0, 2, people), 2), 2)
    x_nl = (rng.random((2 * people, SITES)) < alt_sl[cluster_n]).astype(np.uint8)
    x_nl[:, SITES - 1] = 0
    x_nl[7, SITES - 1] = 1
    panel = panel_from_alleles(
        x_nl.T, np.arange(SITES) % 20 * 3_000_000 + 1, np.where(np.arange(SITES) < 20, "1", "2"),
        [f"p{k}" for k in range(people)], group=["A" if a else "B" for a in group],
    )  # fmt: skip
    if alt_index is not None:
        panel.sites.alt_index[:] = alt_index
    return panel, alt_sl


CONFIG = LiStephensConfig(sampler="clusters", clusters=3, ne=1000)


@pytest.fixture(scope="module")
def model():
    return fit(panel_of_clusters()[0], CONFIG)


def alleles(panel) -> np.ndarray:
    return np.ascontiguousarray(bits.unpack(panel.bits_lw, panel.n_haplotypes).T)


def test_drawn_haplotypes_have_the_probabilities_of_the_definition():
    """Of one cluster over all 2^5 sequences."""
    rng = np.random.default_rng(1)
    parent_l = np.array([-1, 0, 0, 2, -1])
    trees = clusters.Trees(parent_l, rng.uniform(0.1, 0.9, (2, 5, 3)).astype(np.float32), np.full(2, 0.5, np.float32))
    drawn_nl = clusters.draw(trees, np.ones(60_000, np.int64), rng.random((60_000, 5)))
    found = np.bincount(drawn_nl @ (1 << np.arange(5)), minlength=32) / 60_000
    expected = np.zeros(32)
    for x in itertools.product((0, 1), repeat=5):
        alt = [float(trees.alt_sla[1, l, 2 if parent < 0 else x[parent]]) for l, parent in enumerate(parent_l)]  # noqa: E741
        expected[np.dot(x, 1 << np.arange(5))] = np.prod([p if allele else 1 - p for p, allele in zip(alt, x)])
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max() / 60_000)


def test_posterior_is_bayes_rule(model):
    trees = model.cluster_tables.trees
    some_nl = alleles(panel_of_clusters(seed=5)[0])[:6]
    logit_nl, _ = clusters.foretell(trees, some_nl)
    total_n = -np.logaddexp(0, np.where(some_nl == 1, -logit_nl, logit_nl)).sum(axis=1)
    joint_ns = np.zeros((6, 3))
    for s in range(3):
        alone = clusters.Trees(trees.parent_l, trees.alt_sla[s : s + 1], np.ones(1, np.float32))
        logit_nl, _ = clusters.foretell(alone, some_nl)
        joint_ns[:, s] = -np.logaddexp(0, np.where(some_nl == 1, -logit_nl, logit_nl)).sum(axis=1)
    expected_ns = np.exp(joint_ns + np.log(trees.share_s) - total_n[:, None])
    np.testing.assert_allclose(clusters.posterior(trees, some_nl), expected_ns, atol=1e-4)


def test_groups_and_pairs_are_those_of_the_panel(model):
    made = model.sample(3000, groups=["A"] * 1500 + ["B"] * 1500, seed=2)
    x_nl, (panel, alt_sl) = alleles(made), panel_of_clusters()
    odds_sl = np.log(alt_sl / (1 - alt_sl))
    near_n = (x_nl @ odds_sl.T + np.log1p(-alt_sl).sum(axis=1)).argmax(axis=1)
    first_n, second_n = near_n[0::2], near_n[1::2]
    assert (first_n[:1500] < 2).mean() > 0.95
    assert (first_n[1500:] == 2).mean() > 0.95
    assert (first_n == second_n)[:1500].mean() > 0.85, "not one half: the haplotypes of a person are of one kind"
    for group, part in (("A", x_nl[:3000]), ("B", x_nl[3000:])):
        real_nl = alleles(panel)
        real_nl = real_nl[:300] if group == "A" else real_nl[300:]
        assert np.abs(part.mean(axis=0) - real_nl.mean(axis=0)).max() < 0.08


def test_a_person_is_a_function_of_model_seed_and_number(model, tmp_path):
    whole = alleles(model.sample(600, seed=4))
    assert np.array_equal(alleles(model.sample(3, seed=4, start=300)), whole[600:606])
    assert not np.array_equal(alleles(model.sample(3, seed=5)), whole[:6])
    run_folder.save(model, tmp_path / "run")
    loaded = li_stephens.load(tmp_path / "run")
    assert loaded.config.sampler == "clusters"
    assert np.array_equal(alleles(loaded.sample(3, seed=4, start=300)), whole[600:606])
    assert len(np.unique(whole, axis=0)) > 1150, "nobody twice"


def test_nobody_is_copied_and_a_private_allele_is_not_either(model):
    paths, _ = model.paths(400, seed=1)
    exposed = exposure.of_paths(model, paths.segment_offset_n, paths.segment_start_s, paths.segment_donor_s)
    assert exposed.summary() == {"most_copied_cm": 0, "most_in_one_person_cm": 0, "longest_piece_cm": 0}
    assert model.rare.common_l[SITES - 1] == 0
    x_nl = alleles(model.sample(2000, seed=1))
    rate = model.rare.rate_g.mean()
    assert 0 < rate < 0.01
    assert abs(x_nl[:, SITES - 1].mean() - rate) < 5 * np.sqrt(rate / 4000)
    for told in (0.0, 0.9):  # whatever the clusters say of that site
        other = replace(model)
        trees = model.cluster_tables.trees
        alt_sla = trees.alt_sla.copy()
        alt_sla[:, SITES - 1] = told
        other.__dict__["cluster_tables"] = model.cluster_tables._replace(trees=trees._replace(alt_sla=alt_sla))
        assert np.array_equal(alleles(other.sample(2000, seed=1))[:, SITES - 1], x_nl[:, SITES - 1])
    assert x_nl[:, SITES - 1].any()


def test_what_it_cannot_draw_is_refused_when_it_is_fitted(monkeypatch):
    with pytest.raises(UsageError, match="split multiallelic"):
        fit(panel_of_clusters(alt_index=np.arange(SITES) == 3)[0], CONFIG)
    monkeypatch.setattr(cluster_sampler, "MOST_ALLELES", 1e3)
    with pytest.raises(UsageError, match="sparse panel"):
        fit(panel_of_clusters()[0], CONFIG)
