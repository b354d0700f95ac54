"""Each metric against a case small enough to work out by hand or by brute force, then all of them on real
haplotypes."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from engine import seeding
from engine.errors import InputError
from engine.genomics import evaluate as module
from engine.genomics.evaluate import evaluate
from engine.genomics.li_stephens import LiStephensConfig, fit
from engine.genomics.panel import panel_from_alleles, read_panel
from engine.kernels import bits


def panel_of(alleles_ln, contig="1", position=None, group=None):
    alleles_ln = np.asarray(alleles_ln, dtype=np.uint8)
    sites, n = alleles_ln.shape
    position = np.arange(sites) * 1_000 + 1 if position is None else position
    people = n // 2 if n % 2 == 0 else n
    return panel_from_alleles(alleles_ln, position, contig, [f"s{i}" for i in range(people)], group=group)


def haplotype_bits(alleles_nl):
    return panel_of(np.asarray(alleles_nl).T).haplotype_major()


def blocks(n: int, sites: int, seed: int, donors: int = 20):
    """Haplotypes with LD: mosaics of a few donors, so that r2 and runs are not noise."""
    rng = np.random.default_rng(1)
    donor_kl = (rng.random((donors, sites)) < rng.uniform(0.1, 0.6, sites)).astype(np.uint8)
    rng = np.random.default_rng(seed)
    path_nl = np.repeat(rng.integers(0, donors, (n, -(-sites // 8))), 8, axis=1)[:, :sites]
    return donor_kl[path_nl, np.arange(sites)] ^ (rng.random((n, sites)) < 0.01).astype(np.uint8)


def test_three_point_is_the_mean_of_the_product():
    alleles_ln = (np.random.default_rng(0).random((6, 75)) < 0.3).astype(np.uint8)
    triples = np.array(list(itertools.combinations(range(6), 3)))
    centred = alleles_ln - alleles_ln.mean(axis=1, keepdims=True)
    expected = [(centred[i] * centred[j] * centred[k]).mean() for i, j, k in triples]
    np.testing.assert_allclose(module.three_point(bits.pack(alleles_ln), 75, triples), expected, atol=1e-12)


def test_adversarial_accuracy_by_hand():
    # T = 0000, 0001 ; S = 0011, 1111.  d_TT = 1, 1.  d_SS = 2, 2.  d_TS = 2, 1.  d_ST = 1, 3.
    # mean[d_TS > d_TT] = 1/2, mean[d_ST > d_SS] = 1/2
    t, s = haplotype_bits([[0, 0, 0, 0], [0, 0, 0, 1]]), haplotype_bits([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert module.adversarial_accuracy(t, s)[0] == 0.5
    # ties do not count: d_TS = d_TT = d_ST = d_SS = 2
    t, s = haplotype_bits([[0, 0, 0, 0], [1, 1, 0, 0]]), haplotype_bits([[1, 0, 1, 0], [0, 1, 1, 0]])
    assert module.adversarial_accuracy(t, s)[0] == 0
    assert module.adversarial_accuracy(t, t)[0] == 0  # a copy
    far = haplotype_bits(np.ones((4, 90)) - np.eye(4, 90)), haplotype_bits(np.eye(4, 90))
    assert module.adversarial_accuracy(*far)[0] == 1


def test_adversarial_accuracy_against_brute_force_at_equal_n():
    t, s = blocks(40, 70, 2), blocks(40, 70, 3)
    cross = (t[:, None] != s[None]).sum(axis=2)
    own = [np.where(np.eye(40, dtype=bool), 999, (x[:, None] != x[None]).sum(axis=2)).min(axis=1) for x in (t, s)]
    expected = 0.5 * ((cross.min(axis=1) > own[0]).mean() + (cross.min(axis=0) > own[1]).mean())
    value, (low, high), n = module.adversarial_accuracy(haplotype_bits(t), haplotype_bits(s))
    assert value == expected
    assert n == 40
    assert 0 < low < value < high < 1
    assert module.adversarial_accuracy(haplotype_bits(t), haplotype_bits(blocks(90, 70, 4)))[2] == 40


def test_ld_r_is_pearson_over_pairs_of_squared_correlations():
    real, synthetic = panel_of(blocks(120, 30, 2).T), panel_of(blocks(200, 30, 3).T)
    found = evaluate(real, synthetic)["ld_r"]
    frequency = real.alleles_nl().mean(axis=0)
    common = np.flatnonzero(np.minimum(frequency, 1 - frequency) >= 0.01)
    upper = np.triu_indices(len(common), 1)
    r2 = [np.corrcoef(panel.alleles_nl()[:, common].T)[upper] ** 2 for panel in (real, synthetic)]
    assert found.value == pytest.approx(np.corrcoef(*r2)[0, 1], abs=1e-5)
    low, high = found.interval
    assert low < found.value < high
    assert found.n == {"real": 120, "synthetic": 200}


def test_component_distance_and_joint_components():
    x = np.random.default_rng(0).random((50, 2))
    assert module.component_distance(x, x + np.array([3, 1])) == pytest.approx(2)
    one, other = panel_of(np.zeros((10, 4))), panel_of(np.ones((10, 6)))
    at_one, at_other = module.joint_components(one, other, 3, 0)
    assert np.ptp(at_one[:, 0]) < 1e-4
    assert abs(at_one[0, 0] - at_other[0, 0]) == pytest.approx(np.sqrt(10), rel=1e-5)
    # centred on the joint mean of 4 and 6 haplotypes
    assert abs(at_one[0, 0]) == pytest.approx(0.6 * np.sqrt(10), rel=1e-5)


def test_spectrum_is_the_expectation_over_all_subsets():
    alleles_ln = (np.random.default_rng(5).random((12, 7)) < 0.4).astype(np.uint8)
    edges = np.array([1, 2, 3])
    counts = np.zeros(2)
    subsets = list(itertools.combinations(range(7), 5))
    for subset in subsets:
        count = alleles_ln[:, subset].sum(axis=1)
        minor = np.minimum(count, 5 - count)
        counts += [(minor == 1).sum(), (minor == 2).sum()]
    found = module.spectrum_at(alleles_ln.sum(axis=1), 7, 5, edges)
    np.testing.assert_allclose(found, counts / len(subsets), atol=1e-9)
    even = module.spectrum_at(np.array([2, 2, 1, 3, 0]), 4, 4, np.array([1, 2, 3]))
    np.testing.assert_allclose(even, [2, 2], atol=1e-9)  # 1 of 4 and 3 of 4 are minor count 1


def test_spectrum_edges():
    assert module.spectrum_edges(50).tolist() == [1, 2]
    assert module.spectrum_edges(300).tolist() == [1, 2, 3, 4]
    assert module.spectrum_edges(1002).tolist() == [1, 2, 3, 6, 11]
    assert module.spectrum_edges(4006).tolist() == [1, 2, 3, 6, 11, 21, 41]


def test_ld_decay_stays_within_contigs():
    alleles_ln = blocks(60, 20, 3).T
    contig = np.array(["1"] * 10 + ["2"] * 10)
    position = np.concatenate([np.arange(10), np.arange(10)]) * 100 + 1
    mean, pairs = module.ld_decay(panel_of(alleles_ln, contig, position), np.array([0, 150, 10_000]))
    r2 = np.corrcoef(alleles_ln) ** 2
    near = [r2[i, i + 1] for i in range(19) if i != 9]
    far = [r2[i, j] for i in range(20) for j in range(i + 2, 20) if (i < 10) == (j < 10)]
    assert pairs.tolist() == [18, 72]
    np.testing.assert_allclose(mean, [np.mean(near), np.mean(far)], rtol=1e-5)


def test_copies_are_counted_and_runs_measured():
    train = panel_of(blocks(60, 80, 2).T)
    held_out = panel_of(blocks(60, 80, 3).T)
    made = blocks(60, 80, 4)
    made[[3, 10, 11]] = train.alleles_nl()[[7, 0, 0]]
    found = evaluate(held_out, panel_of(made.T), train=train)
    copies = found["exact_copies"]
    assert copies.value == 3
    assert copies.detail["share"] == 0.05
    assert copies.interval[0] / 60 == pytest.approx(0.01043, abs=1e-4)  # Clopper-Pearson 3 of 60
    assert copies.floor == 0
    equal = made[:, None, :] == train.alleles_nl()[None]
    longest = np.zeros(60)
    for i, j in itertools.product(range(60), range(60)):
        run = 0
        for site in range(80):
            run = run + 1 if equal[i, j, site] else 0
            longest[i] = max(longest[i], run)
    assert found["longest_run_bp"].value == np.median(1_000 * (longest - 1))
    assert found["hamming_to_train"].value == np.median((~equal).sum(axis=2).min(axis=1))
    loss = found["aats_test"].value - found["aats_train"].value
    assert found["privacy_loss"].value == pytest.approx(loss)


def test_a_copycat_is_seen():
    train, held_out = panel_of(blocks(60, 80, 2, donors=60).T), panel_of(blocks(60, 80, 3, donors=60).T)
    found = evaluate(held_out, train, train=train)
    assert found["aats_train"].value == 0
    assert found["privacy_loss"].value > 0.3
    assert found["exact_copies"].value == 60
    assert found["longest_run_bp"].value == 79_000
    assert found["ld_r"].value == found["ld_r"].floor


def test_findings_are_complete_and_plain_json():
    real_nl, synthetic_nl = blocks(60, 40, 2), blocks(80, 40, 3)
    for alleles_nl in (real_nl, synthetic_nl):
        alleles_nl[:, 0] = np.arange(len(alleles_nl)) == 5  # a singleton, so that the spectrum has one
    real = panel_of(real_nl.T, group=["a"] * 10 + ["b"] * 20)
    synthetic = panel_of(synthetic_nl.T, group=["a"] * 20 + ["b"] * 20)
    without = evaluate(real, synthetic)
    whole = evaluate(real, synthetic, train=panel_of(blocks(100, 40, 4).T))
    named = [f.name for f in whole.findings]
    assert named[:7] == ["ld_r", "three_point_r", "pca_w1", "aats_test", "aats_train", "exact_copies", "longest_run_bp"]
    assert {"af_r", "ld_decay_error", "sfs_error", "privacy_loss", "hamming_to_train"} <= set(named)
    assert {"aats_train", "exact_copies", "longest_run_bp"}.isdisjoint(f.name for f in without.findings)
    for finding in whole.findings:
        assert finding.n, finding.name
        assert finding.name == "privacy_loss" or finding.floor is not None, finding.name
        assert np.isfinite(finding.value), finding.name
    text = json.dumps(whole.to_json(), allow_nan=False)
    figures = json.loads(text)["figures"]
    assert np.array(figures["pca"]["real"]).shape == (60, 2)
    assert np.array(figures["pca"]["synthetic"]).shape == (80, 2)
    assert len(figures["ld_decay"]["distance_bp"]) == len(figures["ld_decay"]["synthetic"])
    assert len(figures["af"]["real"]) == 40
    assert set(whole["pca_w1"].detail["per_group"]) == {"a", "b"}
    assert evaluate(real, synthetic, seed=0).to_json() == without.to_json()


def test_what_cannot_be_computed_is_void():
    flat = panel_of(np.zeros((5, 8)))
    found = evaluate(flat, flat)
    assert {f.name for f in found.findings if f.verdict == "void"} >= {"ld_r", "three_point_r", "af_r", "sfs_error"}
    json.dumps(found.to_json(), allow_nan=False)


def test_other_sites_are_refused_with_counts_unless_intersect():
    real, synthetic = panel_of(blocks(60, 40, 2).T), panel_of(blocks(60, 40, 3).T)
    fewer = synthetic.select(sites=np.arange(5, 40)[::-1])
    with pytest.raises(InputError, match="35 shared of real 40, synthetic 35"):
        evaluate(real, fewer)
    both = evaluate(real, fewer, intersect=True)
    cut = evaluate(real.select(sites=slice(5, 40)), synthetic.select(sites=slice(5, 40)))
    assert both.to_json() == cut.to_json()
    other = replace(synthetic, sites=replace(synthetic.sites, position_bp=synthetic.sites.position_bp + 1))
    with pytest.raises(InputError, match="0 shared of real 40, synthetic 40"):
        evaluate(real, other, intersect=True)
    with pytest.raises(InputError, match="phased"):
        evaluate(real, replace(synthetic, phased=False))


def test_chr15_real_against_real_and_both_kinds_of_failure(real_data):
    """Train against held-out gives the anchors' row "real"; a small Ne copies, a large one does not."""
    folder = real_data / "genomics"
    panel = read_panel(
        folder / "chr15_10k/train.bcf",
        map=folder / "maps/b37/chr15.b37.gmap.gz",
        samples_tsv=folder / "chr15_10k/samples.tsv",
    )
    order = seeding.generator(1, "docs.genomics.split").permutation(panel.n_samples)
    train, held_out = panel.select(samples=np.sort(order[:1602])), panel.select(samples=np.sort(order[1602:]))
    small = LiStephensConfig(ne=11_700, sampler="independent")
    found = evaluate(held_out, fit(train, small).sample(1602, seed=1), train=train)
    floor = {f.name: f.floor for f in found.findings}
    assert floor["ld_r"] == pytest.approx(0.993, abs=0.005)
    assert floor["three_point_r"] == pytest.approx(0.992, abs=0.006)
    assert floor["pca_w1"] == pytest.approx(0.243, abs=0.12)
    assert floor["aats_test"] == pytest.approx(0.482, abs=0.04)
    assert floor["hamming_to_train"] == pytest.approx(690, abs=40)
    assert floor["longest_run_bp"] == pytest.approx(621_000, rel=0.05)
    assert floor["exact_copies"] == 0
    assert found["aats_train"].value < 0.3
    assert found["exact_copies"].value > 20
    assert found["longest_run_bp"].value > 1_000_000
    assert found["ld_r"].value > 0.98
    wide = module.adversarial_accuracy(
        train.haplotype_major(),
        fit(train, LiStephensConfig(sampler="independent")).sample(1602, seed=1).haplotype_major(),
        bootstrap=1,
    )[0]
    assert wide > 0.5  # Ne 320k does not lie near to train
