"""Membership attacks: the judgement of any scores against brute force, and what the model-free attacks must say of copies."""

from __future__ import annotations

import numpy as np
import pytest

from engine.audit import AuditPolicy, Pool
from engine.audit.intervals import attainable_level, delong, thin
from engine.audit.membership import Attackers, membership, per_person
from engine.errors import InputError

POLICY = AuditPolicy()


def pool(rows, tag="p", **more):
    person = more.pop("person", np.array([f"{tag}{i}" for i in range(len(rows))]))
    return Pool("features", np.asarray(rows, np.float32), person, **more)


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_area_is_the_share_of_pairs_and_its_deviation_that_of_delong():
    positive, negative = np.array([3.0, 5.0, 5.0, 9.0]), np.array([1.0, 3.0, 5.0])
    psi = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    area, low, high = delong(positive, negative)
    assert area == pytest.approx(psi.mean())
    s10, s01 = psi.mean(axis=1).var(ddof=1), psi.mean(axis=0).var(ddof=1)
    assert (high - low) / 2 <= 1.96 * np.sqrt(s10 / 4 + s01 / 3) + 1e-12  # cut at 1
    assert area - low == pytest.approx(1.96 * np.sqrt(s10 / 4 + s01 / 3))
    assert delong(np.arange(5) + 9.0, np.arange(4.0)) == (1.0, pytest.approx(0.025**0.25), 1.0)
    assert delong(np.ones(5), np.ones(4)) == (0.5, 0.5, 0.5)


def test_delong_covers():
    """Two normal samples a deviation apart: the area is Phi(1 / sqrt 2) = 0.7602."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        _, low, high = delong(rng.standard_normal(60) + 1, rng.standard_normal(40))
        inside += low <= 0.76025 <= high
    assert 0.92 < inside / 400 < 0.98


def test_rates_are_counted_at_the_threshold_of_the_non_members():
    rng = np.random.default_rng(1)
    member, nonmember = rng.standard_normal(300) + 3, rng.standard_normal(1200)
    found = by_name(membership(member, nonmember, policy=POLICY)[0])
    for level, name in ((0.01, "1"), (0.001, "0.1")):
        threshold = np.sort(nonmember)[-int(level * 1201)]  # the r-th largest; r = 12 and 1
        finding = found[f"membership_tpr_at_{name}_percent_model"]
        assert finding.value == pytest.approx((member > threshold).mean())
        assert finding.verdict == "fail"
        assert finding.interval[0] < finding.value < finding.interval[1]
    assert found["membership_auc_model"].verdict == "fail"


def test_rates_below_the_n_they_need_are_not_given():
    rng = np.random.default_rng(2)
    found = by_name(membership(rng.random(500), rng.random(98), policy=POLICY)[0])
    assert np.isnan(found["membership_tpr_at_1_percent_model"].value)
    assert "needs 99 non-members, has 98" in found["membership_tpr_at_1_percent_model"].note
    found = by_name(membership(rng.random(500), rng.random(99), policy=POLICY)[0])
    assert np.isfinite(found["membership_tpr_at_1_percent_model"].value)
    assert np.isnan(found["membership_tpr_at_0.1_percent_model"].value)
    assert np.isnan(by_name(membership(rng.random(500), rng.random(9), policy=POLICY)[0])["membership_auc_model"].value)


def test_scores_without_information_pass_and_hardly_ever_fail():
    failed = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        findings, curve = membership(rng.random(60), rng.random(120), policy=POLICY)
        failed += any(f.verdict == "fail" for f in findings)
        assert curve["fpr"][0] == 0
        assert curve["fpr"][-1] == 1
    assert failed <= 3


def test_a_small_known_part_is_seen_at_low_false_positive_rates():
    """5 % of the members are certain: the area hardly moves, the true-positive rate at 1 % does."""
    rng = np.random.default_rng(3)
    member, nonmember = rng.standard_normal(1000), rng.standard_normal(1000)
    member[:60] = 9
    found = by_name(membership(member, nonmember, policy=POLICY)[0])
    assert found["membership_auc_model"].verdict == "pass"
    assert found["membership_tpr_at_1_percent_model"].verdict == "fail"


def test_broken_scores_are_refused():
    with pytest.raises(InputError, match="finite score"):
        membership(np.array([1.0, np.nan]), np.ones(3), policy=POLICY)


def test_one_score_per_person():
    score, person = np.array([1.0, 5.0, 2.0, 0.0]), np.array(["b", "b", "a", "a"])
    assert per_person(score, person, largest=True).tolist() == [2, 5]
    assert per_person(score, person, largest=False).tolist() == [1, 3]


def test_thinned_curves_keep_small_rates():
    fpr = np.arange(5001) / 5000
    kept = np.array(thin(fpr, fpr)["fpr"])
    assert len(kept) <= 202
    assert (kept < 0.01).sum() > 40
    assert kept[-1] == 1


def sides(rng, n, m):
    return rng.standard_normal((n, 8)), rng.standard_normal((m, 8))


def attack(train, holdout, rows, policy=POLICY):
    return Attackers.prepare(pool(train, "t"), pool(holdout, "h"), 1e-6, policy, 0).judge(pool(rows, "s"))


def test_copies_are_seen_and_fresh_rows_are_not():
    rng = np.random.default_rng(4)
    train, holdout = sides(rng, 400, 200)
    found, curves = attack(train, holdout, rng.standard_normal((300, 8)))
    assert set(curves) == {"distance", "density_ratio"}
    assert all(f.verdict in ("pass", "none") for f in found)
    assert len(found) == 6
    found = by_name(attack(train, holdout, train + 0.2 * rng.standard_normal(train.shape))[0])
    for name in ("distance", "density_ratio"):
        assert found[f"membership_auc_{name}"].verdict == "fail"
        assert found[f"membership_tpr_at_1_percent_{name}"].verdict == "fail"


def test_the_density_ratio_does_not_mind_where_the_crowd_is():
    """Members in a crowded place, non-members too: only the ratio knows whether the synthetic rows are too many there."""
    rng = np.random.default_rng(5)
    mixed = lambda n: np.where(rng.random(n)[:, None] < 0.5, 0.1, 1.0) * rng.standard_normal((n, 6))  # noqa: E731
    train, holdout = mixed(300), mixed(300)
    rows = train + 0.2 * train.std(axis=1, keepdims=True) * rng.standard_normal((300, 6))
    found = by_name(attack(train, holdout, rows)[0])
    assert found["membership_auc_density_ratio"].value > found["membership_auc_distance"].value + 0.1


def test_members_and_non_members_see_reference_pools_of_one_size():
    """Nobody is compared with themselves, and a non-member misses one training person as well."""
    rng = np.random.default_rng(6)
    train = rng.standard_normal((30, 4))
    person = np.repeat([f"t{i}" for i in range(15)], 2)
    holdout = pool(np.repeat(train[:1], 600, 0), person=np.repeat([f"h{i}" for i in range(300)], 2))
    ready = Attackers.prepare(pool(train, person=person), holdout, 1e-6, POLICY, 0)
    assert ready.largest
    assert (ready.log_reference_member_n > np.log(1e-3)).all()  # not even the person's other row
    missed = (ready.log_reference_nonmember_n > np.log(1e-3)).mean()
    assert missed == pytest.approx(1 / 15, abs=0.05)


def test_a_split_that_puts_a_kind_of_people_on_one_side_convicts_nobody():
    """Two kinds of people; the second is three in four of training and one in four of the unseen. Rows like training's as a
    whole, made by none of these people, lie near to training; near copies of training are still seen."""
    failed, areas = 0, []
    for seed in range(40):
        rng = np.random.default_rng([8, seed])
        train, holdout, rows = (
            np.where(rng.random(n)[:, None] < share, 4.0, 0.0) + rng.standard_normal((n, 6))
            for n, share in ((120, 0.75), (40, 0.25), (100, 0.75))
        )
        found = by_name(attack(train, holdout, rows)[0])
        failed += found["membership_auc_density_ratio"].verdict == "fail"
        areas.append(found["membership_auc_density_ratio"].value)
    assert failed <= 1
    assert np.mean(areas) == pytest.approx(0.5, abs=0.03)
    rng = np.random.default_rng(9)
    train, holdout = (
        np.vstack([rng.standard_normal((90, 6)) + 4, rng.standard_normal((30, 6))]),
        rng.standard_normal((40, 6)),
    )
    near = train[rng.permutation(120)] + 0.3 * rng.standard_normal((120, 6))
    assert by_name(attack(train, holdout, near)[0])["membership_auc_density_ratio"].verdict == "fail"


def test_people_beyond_the_limit_are_drawn():
    rng = np.random.default_rng(7)
    train, holdout = sides(rng, 90, 70)
    policy = AuditPolicy(membership_people=40)
    ready = Attackers.prepare(pool(train, "t"), pool(holdout, "h"), 1e-6, policy, 0)
    assert (ready.members.people, ready.nonmembers.people) == (40, 40)


@pytest.mark.parametrize(("train_n", "holdout_n"), [(240, 110), (60, 130)])
def test_leak_free_rows_tell_nobody_apart(train_n, holdout_n):
    """200 repetitions at unequal pools: the area is one half, its interval holds, TPR at 1 % is 1 %, hardly any set fails."""
    areas, inside, rates, failed = {"distance": [], "density_ratio": []}, 0, [], 0
    for seed in range(200):
        rng = np.random.default_rng([seed, train_n])
        found = by_name(attack(*sides(rng, train_n, holdout_n), 0.6 * rng.standard_normal((30, 8)))[0])
        failed += any(f.verdict == "fail" for f in found.values())
        for name, values in areas.items():
            finding = found[f"membership_auc_{name}"]
            values.append(finding.value)
            inside += finding.interval[0] <= 0.5 <= finding.interval[1]
        rates.append(found["membership_tpr_at_1_percent_density_ratio"].value)
    for values in areas.values():
        assert np.mean(values) == pytest.approx(0.5, abs=4 * np.std(values) / np.sqrt(200))
    assert 0.91 < inside / 400 < 0.98
    assert np.mean(rates) == pytest.approx(attainable_level(0.01, holdout_n), abs=4 * np.std(rates) / np.sqrt(200))
    assert failed <= 4  # 2 %; the gates allow 1 % together
