"""The judges of genotypes: brute force on small sides, planted copies and families, unseen people, all inside the audit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from engine.audit import AuditPolicy, Pool, audit
from engine.genomics import audit_judges
from engine.genomics.audit_judges import genotype_judges, kinship_judge, private_judge, sliding_windows, window_judge
from engine.genomics.panel import panel_from_alleles
from engine.genomics.pools import check_sides, haplotype_pool
from engine.genomics.relatedness import Resolution, resolution
from engine.kernels import bits

POLICY = AuditPolicy()
FAST = AuditPolicy(control_rows=60, contamination_repeats=10, subsets=2, aats_rows=150, honest_repeats=0)


def pool(alleles_nl, tag, person=None):
    person = np.array([f"{tag}{k // 2}" for k in range(len(alleles_nl))]) if person is None else person
    return Pool("bits", bits.pack(np.asarray(alleles_nl, dtype=np.uint8)), person, length=np.shape(alleles_nl)[1])


def named(findings):
    return {f.name: f for f in findings}


# ---- windows ---------------------------------------------------------------------------------------------------------


def test_windows_slide_by_half_and_stay_on_their_contig():
    contig = np.array(["1"] * 10 + ["2"] * 3 + ["3"] * 4)
    made = sliding_windows(contig, 4).tolist()
    assert made == [[0, 4], [2, 6], [4, 8], [6, 10], [10, 13], [13, 17]]
    assert sliding_windows(np.array(["1"] * 7), 4).tolist() == [[0, 4], [2, 6], [3, 7]]
    assert sliding_windows(np.array(["1"] * 3), 1).tolist() == [[0, 1], [1, 2], [2, 3]]
    many = sliding_windows(np.array(["1"] * 50_000), 4)
    assert len(many) == 1999
    assert many[[0, 1, -1]].tolist() == [[0, 50], [25, 75], [49_950, 50_000]]


def mosaics(rng, founders, n, pieces):
    length = founders.shape[1]
    rows = np.empty((n, length), np.uint8)
    for row in rows:
        edges = [0, *np.sort(rng.choice(np.arange(1, length), pieces, replace=False)), length]
        for a, b in pairwise(edges):
            row[a:b] = founders[rng.integers(len(founders)), a:b]
    return rows


@pytest.fixture(scope="module")
def sides():
    """Training, holdout, and unseen rows: mosaics of one set of founders, with new mutations, over two contigs."""
    rng = np.random.default_rng(1)
    founders = (rng.random((80, 1200)) < rng.beta(0.6, 1.5, 1200)).astype(np.uint8)
    made = lambda n: mosaics(rng, founders, n, 40) ^ (rng.random((n, 1200)) < 0.005)  # noqa: E731
    return pool(made(600), "t"), pool(made(400), "h"), made(200), np.repeat(["1", "2"], 600)


def test_windows_see_mosaics_and_let_unseen_people_pass(sides):
    train, holdout, fresh, contig = sides
    ready = window_judge(train, holdout, contig, POLICY, seed=0)
    unseen = named(ready(pool(fresh, "s")))
    assert [f.verdict for name, f in unseen.items() if "copy_share" in name] == ["pass", "pass", "none"]
    assert unseen["window_copy_share_at_5_percent"].value < 0.1
    equal = unseen["windows_equal_to_training"]
    assert equal.value < equal.floor + 0.05
    known = bits.unpack(train.data, 1200)
    for donors in (1, 4):
        copied = named(ready(pool(mosaics(np.random.default_rng(2), known, 100, donors - 1), "s")))
        assert copied["window_copy_share_at_5_percent"].verdict == "fail", donors
        assert copied["windows_equal_to_training"].value > 0.5
    # half of every row copied, half unseen: far from everybody as a whole
    half = fresh.copy()
    half[:, 600:] = known[:200, 600:]
    assert named(ready(pool(half, "s")))["window_copy_share_at_5_percent"].verdict == "fail"


def test_window_statistic_against_brute_force(monkeypatch):
    rng = np.random.default_rng(3)
    contig = np.repeat(["1", "2"], [70, 30])
    train, holdout, rows = (rng.integers(0, 2, (n, 100)).astype(np.uint8) for n in (24, 48, 6))
    seen = {}
    monkeypatch.setattr(
        audit_judges, "conformal_p", lambda null, tested, weight: seen.update(null=null, tested=tested) or tested
    )
    monkeypatch.setattr(audit_judges, "generator", lambda seed, purpose: np.random.default_rng(5))
    sides = pool(train, "t"), pool(holdout, "h")
    found = named(window_judge(*sides, contig, POLICY, seed=0)(pool(rows, "s")))
    some = np.sort(np.random.default_rng(5).permutation(48)[:400])
    runs = []
    for row in holdout[some]:
        equal = (row == train).astype(int)
        runs.append(max(len(run) for line in equal for run in "".join(map(str, line)).split("0")))
    windows = sliding_windows(contig, max(2, int(np.median(runs))))
    assert found["window_copy_share_at_5_percent"].detail["windows"] == len(windows)
    people, code = np.unique(sides[1].person, return_inverse=True)
    dropped = np.random.default_rng(5).integers(0, len(people), 6)

    def statistic(row, skip):
        values = []
        for a, b in windows:
            to_train = (row[a:b] != train[:, a:b]).sum(axis=1).min()
            to_holdout = (row[a:b] != holdout[code != skip][:, a:b]).sum(axis=1).min()
            values.append(np.log(to_train + 0.5) - np.log(to_holdout + 0.5))
        return np.mean(values)

    np.testing.assert_allclose(seen["tested"], [statistic(row, skip) for row, skip in zip(rows, dropped)])
    np.testing.assert_allclose(seen["null"][:, 0], [statistic(row, skip) for row, skip in zip(holdout, code)])


def test_too_few_people_for_any_level_are_not_judged():
    rng = np.random.default_rng(4)
    rows = rng.integers(0, 2, (36, 64)).astype(np.uint8)
    assert window_judge(pool(rows, "t"), pool(rows, "h"), np.full(64, "1"), POLICY, 0)(pool(rows, "s")) == []


# ---- private alleles -------------------------------------------------------------------------------------------------


def test_private_alleles_by_brute_force():
    rng = np.random.default_rng(6)
    train, holdout = ((rng.random((n, 130)) < rng.uniform(0, 0.06, 130)).astype(np.uint8) for n in (60, 40))
    train[:, :20] ^= 1  # REF can be the rare one
    holdout[:, :20] ^= 1
    rows = (rng.random((30, 130)) < 0.02).astype(np.uint8)
    carries = np.concatenate([train.reshape(30, 2, 130), holdout.reshape(20, 2, 130)])
    counts = {"t": [0, 0], "h": [0, 0]}
    for allele in (0, 1):
        have = (carries == allele).any(axis=1)
        shown = (rows == allele).any(axis=0)
        for site in np.flatnonzero(have.sum(axis=0) == 1):
            side = "t" if np.flatnonzero(have[:, site])[0] < 30 else "h"
            counts[side][0] += 1
            counts[side][1] += shown[site]
    found = named(private_judge(pool(train, "t"), pool(holdout, "h"), POLICY, 0)(pool(rows, "s")))[
        "private_alleles_shown"
    ]
    assert found.n == {"training_alleles": counts["t"][0], "holdout_alleles": counts["h"][0], "rows": 30}
    assert min(counts["t"][1], counts["h"][1]) > 0
    assert found.value == pytest.approx(counts["t"][1] / counts["t"][0])
    assert found.floor == pytest.approx(counts["h"][1] / counts["h"][0])


def test_private_alleles_of_copies_convict_and_of_unseen_people_do_not():
    rng = np.random.default_rng(7)
    frequency = rng.choice([0.002, 0.3], 2000, p=[0.7, 0.3])
    made = lambda n: (rng.random((n, 2000)) < frequency).astype(np.uint8)  # noqa: E731
    train, holdout = made(400), made(240)
    ready = private_judge(pool(train, "t"), pool(holdout, "h"), POLICY, 0)
    unseen = named(ready(pool(made(100), "s")))
    assert unseen["private_alleles_shown"].detail["p_value"] > 0.01
    assert unseen["membership_auc_private_alleles"].verdict == "pass"
    copied = named(ready(pool(train[:80], "s")))
    assert copied["private_alleles_shown"].floor == 0
    assert copied["private_alleles_shown"].detail["p_value"] == 0.001
    assert copied["membership_tpr_at_1_percent_private_alleles"].value > 0.1  # a fifth was copied
    assert copied["membership_tpr_at_1_percent_private_alleles"].verdict == "fail"
    common = private_judge(pool(train[:, frequency > 0.1], "t"), pool(holdout[:, frequency > 0.1], "h"), POLICY, 0)
    (nothing,) = common(pool(train[:80, frequency > 0.1], "s"))
    assert np.isnan(nothing.value)
    assert nothing.verdict == "none"


# ---- kinship ---------------------------------------------------------------------------------------------------------


def children_of(rng, alleles_nl, pairs):
    """Two haplotypes for every pair of people: one gamete of each, every site by itself."""
    gamete = lambda p: np.where(rng.random(alleles_nl.shape[1]) < 0.5, alleles_nl[2 * p], alleles_nl[2 * p + 1])  # noqa: E731
    return np.array([gamete(p) for pair in pairs for p in pair])


@pytest.fixture(scope="module")
def genome():
    """Unlinked common sites over 22 contigs: training, holdout, unseen rows; and what they resolve."""
    rng = np.random.default_rng(8)
    frequency = rng.uniform(0.2, 0.8, 4400)
    train, holdout, fresh = ((rng.random((n, 4400)) < frequency).astype(np.uint8) for n in (160, 120, 100))
    contig = np.repeat([str(k + 1) for k in range(22)], 200)
    position = np.tile(np.arange(200) * 500_000 + 1, 22)
    panels = [
        panel_from_alleles(rows.T, position, contig, [f"{tag}{k}" for k in range(len(rows) // 2)])
        for tag, rows in (("t", train), ("h", holdout))
    ]
    return *panels, train, fresh


def test_kinship_convicts_children_and_copies(genome):
    train, holdout, alleles, fresh = genome
    resolved, noted = check_sides(train, holdout)
    ready = kinship_judge(haplotype_pool(train), haplotype_pool(holdout), resolved, POLICY)
    unseen = named(ready(pool(fresh, "s")))
    assert {f.verdict for f in unseen.values()} == {"pass"}
    assert all(f.value == f.floor == 0 for f in unseen.values())
    pairs = [(2 * k, 2 * k + 1) for k in range(12)]
    bred = fresh.copy()
    bred[:24] = children_of(np.random.default_rng(9), alleles, pairs)
    found = named(ready(pool(bred, "s")))
    assert found["kinship_above_0.177"].value == 12 / 50
    assert found["kinship_above_0.177"].verdict == "fail"
    assert found["kinship_above_0.354"].value == 0
    copied = fresh.copy()
    copied[:24] = alleles[:24]
    assert named(ready(pool(copied, "s")))["kinship_above_0.354"].verdict == "fail"
    few = fresh.copy()
    few[:2] = alleles[:2]
    assert named(ready(pool(few, "s")))["kinship_above_0.354"].verdict == "pass"  # one in fifty may be chance; see n
    assert {f.name for f in noted} >= {
        "relatives_across_sides",
        "duplicates_within_training",
        "relatives_within_holdout",
    }


def test_the_largest_count_that_passes_is_exact(genome):
    train, holdout, alleles, fresh = genome
    resolved = resolution(train)
    ready = kinship_judge(haplotype_pool(train), haplotype_pool(holdout), resolved, POLICY)
    allowed = round(50 * named(ready(pool(fresh, "s")))["kinship_above_0.354"].threshold)
    for count, verdict in ((allowed, "pass"), (allowed + 1, "fail")):
        rows = fresh.copy()
        rows[: 2 * count] = alleles[: 2 * count]
        assert named(ready(pool(rows, "s")))["kinship_above_0.354"].verdict == verdict


def test_kinship_over_a_region_is_printed_without_a_verdict(genome):
    train, holdout, alleles, _ = genome
    region = [panel.select(sites=slice(0, 40)) for panel in (train, holdout)]
    resolved, noted = check_sides(*region)
    ready = kinship_judge(*(haplotype_pool(panel) for panel in region), resolved, POLICY)
    found = ready(pool(alleles[:40, :40], "s"))
    assert [f.verdict for f in found] == ["none"] * 3
    assert found[0].value == 1
    assert "not judged" in found[0].note
    across = next(f for f in noted if f.name == "relatives_across_sides")
    assert np.isnan(across.value)
    single = pool(alleles[:40, :40], "s", np.arange(40).astype(str))  # haplotypes without people
    assert ready(single) == []
    nothing = Resolution(np.zeros(0, dtype=np.int64), np.inf, 0, 1.0)
    assert kinship_judge(*(haplotype_pool(panel) for panel in region), nothing, POLICY)(single) == []


# ---- all of them in the audit ----------------------------------------------------------------------------------------


def test_the_audit_with_all_judges(sides):
    train, holdout, fresh, contig = sides
    nothing = Resolution(np.zeros(0, dtype=np.int64), np.inf, 0, 1.0)
    noted = [named(private_judge(train, holdout, POLICY, 0)(holdout))["private_alleles_shown"]]
    judges = genotype_judges(train, holdout, contig, nothing, noted, policy=FAST, seed=3)
    position = np.concatenate([np.arange(600), 600 + np.arange(600)])
    placed = [replace(side, position_bp=position) for side in (train, holdout, pool(fresh, "s"))]
    result = audit(*placed, policy=FAST, seed=3, judges=judges)
    assert result.verdict == "pass", result.reasons
    told = [f.name for f in result.findings]
    for name in (
        "window_copy_share_at_1_percent", "private_alleles_shown", "membership_auc_frequencies_likelihood",
        "membership_auc_training_frequencies_homer",
    ):  # fmt: skip
        assert name in told
    for control in result.controls:
        assert control.right, control
        names = {f.name for f in control.findings}
        assert "window_copy_share_at_1_percent" in names
        assert "membership_auc_training_frequencies_homer" not in names
    known = bits.unpack(train.data, 1200)
    rows = mosaics(np.random.default_rng(2), known, 100, 3)
    copied = audit(placed[0], placed[1], replace(pool(rows, "s"), position_bp=position), policy=FAST, judges=judges)
    assert copied.verdict == "fail"
    assert copied.finding("window_copy_share_at_5_percent").verdict == "fail"


def test_fresh_people_are_taken_out_of_the_holdout_first(sides):
    _, holdout, _, _ = sides
    asked = []

    def make(unseen):
        asked.append(set(unseen.person.tolist()))
        return lambda rows: []

    judge = audit_judges._judge(make, holdout)
    fresh = holdout.select_people(np.array(["h1", "h2"]))
    judge("fresh_real", fresh, None)
    judge("synthetic", fresh, None)  # ids of synthetic people mean nothing
    judge("copycat", fresh, None)
    everybody = set(holdout.person.tolist())
    assert asked == [everybody - {"h1", "h2"}, everybody]
    assert judge("fresh_real", holdout, None) == []
