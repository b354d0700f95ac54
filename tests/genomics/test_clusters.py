"""Mixtures of trees: a probability of whole haplotypes that finds clusters and linked sites, and looks back only."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engine.genomics import chains, clusters

CONTIG_START_L = np.arange(30) % 10 == 0


def clustered(n: int, seed: int):
    """Three clusters with frequencies of their own; each fifth site of a contig follows the third one before it."""
    rng = np.random.default_rng(seed)
    cluster_n = rng.integers(0, 3, n)
    alt_sl = np.random.default_rng(99).beta(0.4, 0.4, (3, 30)).clip(0.03, 0.97)
    x_nl = (rng.random((n, 30)) < alt_sl[cluster_n]).astype(np.uint8)
    for l in (5, 15, 25):  # noqa: E741
        x_nl[:, l] = x_nl[:, l - 3] ^ (rng.random(n) < 0.05)
    return x_nl, cluster_n, alt_sl


def nats(trees, x_nl):
    return chains.nats(clusters.foretell(trees, x_nl)[0], x_nl).sum(axis=1)


def test_sequences_sum_to_one_and_the_product_is_the_mixture():
    """Over all 2^8 sequences, and against the definition: sum_s share_s prod_l P_s(x_l | x_parent(l))."""
    rng = np.random.default_rng(1)
    trees = clusters.Trees(
        np.array([-1, 0, 0, 2, -1, 4, 3, 5]), rng.uniform(0.05, 0.95, (3, 8, 3)).astype(np.float32),
        np.array([0.5, 0.3, 0.2], np.float32),
    )  # fmt: skip
    every_nl = np.array(list(itertools.product((0, 1), repeat=8)), np.uint8)
    found_n = nats(trees, every_nl)
    assert np.exp(found_n).sum() == pytest.approx(1, abs=1e-5)
    expected_n = np.zeros(len(every_nl))
    for n, x in enumerate(every_nl):
        for s in range(3):
            product = float(trees.share_s[s])
            for l, parent in enumerate(trees.parent_l):  # noqa: E741
                alt = float(trees.alt_sla[s, l, 2 if parent < 0 else x[parent]])
                product *= alt if x[l] else 1 - alt
            expected_n[n] += product
    np.testing.assert_allclose(np.exp(found_n), expected_n, rtol=1e-4)
    logit_nl, number_nl = clusters.foretell(trees, every_nl)
    assert number_nl.min() >= 1
    assert number_nl.max() <= 3
    missing_nl = every_nl.copy()
    missing_nl[:, 6:] = 255  # the last two: what is foretold up to there is the same, and they cost nothing
    np.testing.assert_allclose(clusters.foretell(trees, missing_nl)[0][:, :6], logit_nl[:, :6])


def test_clusters_and_links_are_found():
    """On haplotypes not learned from nearly the likelihood of the truth, far above sites without clusters or links."""
    known_nl, _, _ = clustered(1500, 2)
    unseen_nl, cluster_n, alt_sl = clustered(600, 3)
    trees = clusters.learn(known_nl, CONTIG_START_L, 3)
    assert trees.parent_l[[5, 15, 25]].tolist() == [2, 12, 22]
    assert (trees.parent_l[CONTIG_START_L] == -1).all()
    truth_nl = np.where(unseen_nl == 1, alt_sl[cluster_n], 1 - alt_sl[cluster_n])
    for l in (5, 15, 25):  # noqa: E741
        truth_nl[:, l] = np.where(unseen_nl[:, l] == unseen_nl[:, l - 3], 0.95, 0.05)
    truth_n = np.log(truth_nl).sum(axis=1)  # told the cluster; not told, log 3 at most is lost
    found_n = nats(trees, unseen_nl)
    assert -1.6 < (found_n - truth_n).mean() < 0
    one = clusters.learn(known_nl, CONTIG_START_L, 1)
    unlinked = trees._replace(parent_l=np.full(30, -1))
    assert (found_n - nats(one, unseen_nl)).mean() > 2
    assert (found_n - nats(unlinked, unseen_nl)).mean() > 0.5
    again = clusters.learn(known_nl, CONTIG_START_L, 3)
    np.testing.assert_array_equal(again.alt_sla, trees.alt_sla)


def test_random_alleles_have_no_clusters():
    """Many clusters learned from noise are no likelier on more noise than the frequencies are."""
    rng = np.random.default_rng(4)
    alt_l = rng.uniform(0.1, 0.9, 30)
    known_nl, unseen_nl = ((rng.random((400, 30)) < alt_l).astype(np.uint8) for _ in range(2))
    found_n = nats(clusters.learn(known_nl, CONTIG_START_L, 8), unseen_nl)
    truth_n = np.log(np.where(unseen_nl == 1, alt_l, 1 - alt_l)).sum(axis=1)
    assert (found_n - truth_n).mean() < 0
    few = clusters.learn(known_nl[:3], CONTIG_START_L, 8)
    assert len(few.share_s) == 3
    assert np.isfinite(nats(few, unseen_nl)).all()
