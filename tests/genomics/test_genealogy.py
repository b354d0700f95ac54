"""Sampling by rounds: who copies whom, what that does to allele counts, and what is learned from the panel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.errors import UsageError
from engine.genomics import exposure, genealogy, li_stephens
from engine.genomics.evaluate import evaluate
from engine.genomics.li_stephens import LiStephensConfig, fit
from engine.genomics.panel import panel_from_alleles, read_panel
from engine.kernels import bits

LEARNED = genealogy.Genealogy([0.3, 0.3], 1.0, [1.0, 4.0, 20.0], [0.9, 0.2, 0.01], [0.0, 0.0], 0, 0)


def mosaic_panel(people: int = 40, sites: int = 300, seed: int = 0, founders: int = 12, piece: float = 40.0, contigs=2):
    """People as mosaics of a few founders, two groups with founders of their own, two contigs, 0.01 cM between sites."""
    rng = np.random.default_rng(seed)
    founder_fl = (rng.random((2 * founders, sites)) < rng.beta(0.4, 1.0, sites)).astype(np.uint8)
    group = np.arange(people) >= people // 3
    alleles_nl = np.empty((2 * people, sites), dtype=np.uint8)
    for n in range(2 * people):
        switch = rng.random(sites) < 1 / piece
        donor = rng.integers(0, founders, sites)[np.maximum.accumulate(np.where(switch, np.arange(sites), 0))]
        alleles_nl[n] = founder_fl[donor + founders * group[n // 2], np.arange(sites)]
        alleles_nl[n, rng.random(sites) < 0.004] ^= 1
    half = sites // 2 if contigs == 2 else sites
    place = np.concatenate([np.arange(half), np.arange(sites - half)])
    return panel_from_alleles(
        alleles_nl.T, place * 10_000 + 1, np.where(np.arange(sites) < half, "1", "2"), [f"p{k}" for k in range(people)],
        group=["north" if not g else "south" for g in group], position_cm=place * 0.01,
    )  # fmt: skip


def model_of(panel, learned: genealogy.Genealogy = LEARNED, **settings):
    return replace(fit(panel, LiStephensConfig(**settings)), genealogy_learned=learned)


def donors_nl(paths, sites: int) -> np.ndarray:
    """The donor of each haplotype at each site."""
    made = []
    for low, high in zip(paths.segment_offset_n[:-1], paths.segment_offset_n[1:], strict=True):
        start = paths.segment_start_s[low:high]
        assert start[0] == 0
        assert (np.diff(start) > 0).all()
        made.append(np.repeat(paths.segment_donor_s[low:high], np.diff(np.append(start, sites))))
    return np.stack(made)


def test_in_a_round_every_donor_is_held_once_at_every_site():
    panel = mosaic_panel()
    model = model_of(panel)
    paths, group_n = model.paths(40, seed=3)
    assert np.bincount(group_n).tolist() == [13, 27]
    donor_nl = donors_nl(paths, model.n_sites)
    assert (np.sort(donor_nl, axis=0) == np.arange(80)[:, None]).all()
    assert (model.group_of_haplotype_k[donor_nl] == np.repeat(group_n, 2)[:, None]).all()
    assert len(paths.segment_start_s) > 6 * 80  # they do recombine
    both, _ = model.paths(80, seed=3)
    np.testing.assert_array_equal(donors_nl(both, model.n_sites)[:80], donor_nl)
    assert (np.sort(donors_nl(both, model.n_sites)[80:], axis=0) == np.arange(80)[:, None]).all()
    assert not np.array_equal(donors_nl(both, model.n_sites)[80:], donor_nl)
    alone, _ = model.paths(27, groups="south", seed=3)
    assert (np.sort(donors_nl(alone, model.n_sites), axis=0) == np.arange(26, 80)[:, None]).all()


def test_a_round_has_the_panels_allele_counts_in_each_group():
    panel = mosaic_panel()
    model = model_of(panel)
    made = model.sample(40, seed=5)
    rare_l = model.rare.common_l >= 0
    assert 20 < rare_l.sum() < 280
    for name, index in panel.groups().items():
        real_l, made_l = panel.alleles_nl()[index].sum(axis=0), made.alleles_nl()[made.groups()[name]].sum(axis=0)
        np.testing.assert_array_equal(made_l[~rare_l], real_l[~rare_l])

    # where nothing is copied, counts are the panel's too, at other sites of the class
    def minor(p):
        alt_l = bits.popcount_rows(p.bits_lw)
        return np.where(model.rare.common_l == 1, 80 - alt_l, alt_l)

    assert sorted(minor(panel)[rare_l]) == sorted(minor(made)[rare_l])
    assert not np.array_equal(minor(panel)[rare_l], minor(made)[rare_l])


def test_alleles_move_as_often_as_they_are_young():
    panel = mosaic_panel(people=60, seed=2)
    model = model_of(panel)
    known, moved_l = model.genealogy_tables, np.zeros(model.n_sites)
    rounds = 60
    for seed in range(rounds):
        paths, _ = model.paths(60, seed=seed)
        moved_l += np.bincount(paths.flip_site_f, minlength=model.n_sites) / 2
    copied_l = (model.rare.common_l < 0) & (known.count_l <= 15)
    expected_l = rounds * known.count_l * LEARNED.young(known.count_l)
    assert moved_l[copied_l].sum() == pytest.approx(expected_l[copied_l].sum(), rel=0.03)
    two_l = copied_l & (known.count_l <= 3)
    assert moved_l[two_l].sum() == pytest.approx(expected_l[two_l].sum(), rel=0.05)


def test_partners_are_the_nearest_of_all_where_all_are_candidates():
    panel = mosaic_panel(people=12, sites=256, seed=4, piece=60, contigs=1)
    model = model_of(
        panel, replace(LEARNED, piece_cm=[0.2]), candidates=2_000, reach=100.0, per_group=False, max_donor_pieces=0
    )
    donor_nl = donors_nl(model.paths(12, seed=1)[0], model.n_sites)
    sketch_kw = model.genealogy_tables.sketch_kw
    apart_kk = np.bitwise_count(sketch_kw[:, None] ^ sketch_kw[None]).sum(axis=2).astype(np.int64)
    np.fill_diagonal(apart_kk, 1 << 30)
    swaps = 0
    for site in range(1, model.n_sites):
        changed = np.flatnonzero(donor_nl[:, site] != donor_nl[:, site - 1])
        if len(changed) == 2:  # one swap, and not several in one place
            one, other = donor_nl[changed, site - 1]
            assert donor_nl[changed, site].tolist() == [other, one]
            assert apart_kk[one, other] in (apart_kk[one].min(), apart_kk[other].min())
            swaps += 1
    assert swaps > 15


def test_haplotypes_are_compared_around_the_swap():
    """Two clades whose members change half-way: who swaps left of it is of one clade there, and right of it here."""
    rng = np.random.default_rng(0)
    clade_ncl = rng.integers(0, 2, (4, 2, 512), dtype=np.uint8)  # clade a on the left, clade b on the right
    left, right = rng.integers(0, 4, 80), rng.integers(0, 4, 80)
    alleles_nl = np.concatenate([clade_ncl[left, 0], clade_ncl[right, 1]], axis=1)
    panel = panel_from_alleles(
        alleles_nl.T, np.arange(1024) * 1_000 + 1, "1", [f"p{k}" for k in range(40)], position_cm=np.arange(1024) * 0.01
    )
    model = model_of(
        panel,
        replace(LEARNED, piece_cm=[0.5], young_share=[0.0, 0.0, 0.0]),
        candidates=400,
        reach=1.0,
        max_donor_pieces=0,
    )
    donor_nl = donors_nl(model.paths(40, seed=1)[0], 1024)
    alike = {"left": [], "right": []}
    for site in [*range(60, 400), *range(640, 980)]:
        for n in np.flatnonzero(donor_nl[:, site] != donor_nl[:, site - 1]):
            before, after = donor_nl[n, site - 1], donor_nl[n, site]
            clade = left if site < 512 else right
            alike["left" if site < 512 else "right"].append(clade[before] == clade[after])
    assert min(len(found) for found in alike.values()) > 100
    assert all(np.mean(found) > 0.98 for found in alike.values())


def test_no_more_than_the_budget_is_copied_from_a_donor_into_a_person():
    panel = mosaic_panel(people=60, sites=200)
    slow = replace(LEARNED, piece_cm=[5.0, 5.0])
    free, _ = model_of(panel, slow).paths(60, seed=2)
    model = model_of(panel, slow, max_donor_cm=0.25)
    paths, _ = model.paths(60, seed=2)
    assert (np.sort(donors_nl(paths, 200), axis=0) == np.arange(120)[:, None]).all()

    def longest(made):
        return exposure.of_paths(
            model, made.segment_offset_n, made.segment_start_s, made.segment_donor_s
        ).longest_cm.max()

    assert longest(free) > 0.5
    assert 0.2 < longest(paths) <= 0.25 + 1e-9
    made = exposure.of_paths(model, paths.segment_offset_n, paths.segment_start_s, paths.segment_donor_s)
    assert 0.2 < made.most_cm.max() <= 0.25 + 1e-9
    with pytest.raises(UsageError, match="enough donors"):
        model_of(panel, slow, max_donor_cm=0.01).paths(60, seed=2)


def test_sites_may_lie_further_apart_than_pieces_are_long():
    """Where no piece within the budget reached the next site, every swap searched all donors and found none."""
    panel = mosaic_panel(people=200, sites=12)
    short = replace(LEARNED, piece_cm=[0.004, 0.004])  # of 0.01 cM between sites
    model = model_of(panel, short)
    paths, _ = model.paths(200, seed=2)
    assert (np.sort(donors_nl(paths, 12), axis=0) == np.arange(400)[:, None]).all()
    made = exposure.of_paths(model, paths.segment_offset_n, paths.segment_start_s, paths.segment_donor_s)
    assert 0.009 < made.most_cm.max() <= 0.0101
    with pytest.raises(UsageError, match="enough donors"):
        model_of(panel, short, max_donor_cm=0.005).paths(60, seed=2)


def test_what_is_learned_from_a_panel_of_known_mosaics(tmp_path):
    """Founders' pieces are 0.4 cM; one allele in 250 is new and its own."""
    panel = mosaic_panel(people=100, sites=1_000, seed=1, founders=30)
    model = fit(panel, LiStephensConfig(ne=3_000, mismatch=4e-3))
    learned = model.genealogy
    assert 0.25 < learned.piece_cm[1] < 1.0
    young = learned.young(np.array([1, 2, 20, 60]))
    assert young[0] > 0.9
    assert (np.diff(young) <= 0).all()
    assert young[3] < 0.05
    real, made = learned.run_bp
    assert made == pytest.approx(real, rel=0.1)
    model.save(tmp_path / "run")
    loaded = li_stephens.load(tmp_path / "run")
    assert loaded.genealogy_learned == learned
    np.testing.assert_array_equal(loaded.sample(5, seed=1).bits_lw, model.sample(5, seed=1).bits_lw)


def test_a_panel_of_two_people_is_sampled_by_the_map():
    panel = mosaic_panel(people=2, sites=100)
    model = fit(panel, LiStephensConfig(ne=1_000))
    assert model.genealogy.haplotypes == 0
    assert model.sample(7, seed=1).n_haplotypes == 14


@pytest.fixture(scope="module")
def on_a_split(real_data):
    """What `evaluate` finds of as many people as were learned from, beside the floors of this split, on which the goals'
    figures are 1 to 2 % easier or harder than on the benchmark's."""
    folder = real_data / "genomics/chr15_10k"
    panel = read_panel(
        folder / "train.bcf", map=folder.parent / "maps/b37/chr15.b37.gmap.gz", samples_tsv=folder / "samples.tsv"
    )
    order = np.random.default_rng(7).permutation(panel.n_samples)
    train, held_out = panel.select(samples=np.sort(order[:1602])), panel.select(samples=np.sort(order[1602:]))
    return evaluate(held_out, fit(train).sample(1602, seed=1), train=train)


@pytest.mark.slow
def test_the_goals_of_the_benchmark_are_met_together(on_a_split):
    found = on_a_split
    floor = lambda name: found[name].floor  # noqa: E731
    assert found["ld_r"].value > floor("ld_r") - 0.0035  # 0.990 where real people reach 0.993
    assert found["three_point_r"].value > floor("three_point_r") - 0.007
    assert found["pca_w1"].value < floor("pca_w1") * 0.30 / 0.243
    assert found["aats_train"].value > 0.44
    assert found["exact_copies"].value == 0
    assert found["longest_run_bp"].value < 1.05 * floor("longest_run_bp")
    assert found["sfs_error"].value < floor("sfs_error") + 0.01


@pytest.mark.slow
@pytest.mark.xfail(
    reason="missed: 0.556 on this split, real people 0.516 (docs/genomics.md, Fidelity against copying)", strict=True
)
def test_the_goal_of_adversarial_accuracy_against_unseen_people_is_met(on_a_split):
    assert abs(on_a_split["aats_test"].value - 0.5) < 0.04
