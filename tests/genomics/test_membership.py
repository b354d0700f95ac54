"""Membership by the model: a model that holds a haplotype rewards it; one that does not, does not; both references."""

from __future__ import annotations

import numpy as np
import pytest

from engine import seeding
from engine.audit import AuditPolicy
from engine.errors import InputError
from engine.genomics.li_stephens import LiStephensConfig, fit
from engine.genomics.membership import copying_judge, member_scores, model_membership, samples_membership
from engine.genomics.panel import panel_from_alleles
from engine.genomics.pools import haplotype_pool

CONFIG = LiStephensConfig(ne=20_000, mismatch=1e-3)


def people(rng, n, tag, founders, sites=300):
    """Mosaics of common founders with new mutations."""
    path = np.repeat(rng.integers(0, len(founders), (2 * n, sites // 30)), 30, axis=1)
    alleles = founders[path, np.arange(sites)] ^ (rng.random((2 * n, sites)) < 0.01)
    return panel_from_alleles(
        alleles.T.astype(np.uint8), np.arange(sites) * 2000 + 1, "1", [f"{tag}{k}" for k in range(n)]
    )


@pytest.fixture(scope="module")
def sides():
    rng = np.random.default_rng(0)
    founders = rng.integers(0, 2, (40, 300)).astype(np.uint8)
    return people(rng, 60, "t", founders), people(rng, 120, "h", founders), people(rng, 60, "o", founders)


def test_scores_are_likelihood_ratios_of_people(sides):
    train, holdout, _ = sides
    model = fit(train, CONFIG)
    scores = member_scores(model, train, holdout, seed=4)
    rng = seeding.generator(4, "genomics.membership")
    order = rng.permutation(120)
    other = fit(holdout.select(samples=np.sort(order[:60])), CONFIG)
    chosen = holdout.select(samples=np.sort(order[60:]))
    ratio_n = model.log_likelihood(chosen) - other.log_likelihood(chosen)
    np.testing.assert_allclose(scores.nonmember_s, ratio_n[0::2] + ratio_n[1::2])
    assert len(scores.member_s) == 60

    plain = member_scores(model, train, holdout, reference="independent", people=7, seed=4)
    known = holdout.select(samples=np.sort(order[:60])).alleles_nl()
    alt = (known.sum(axis=0) + 0.5) / 121
    picked = chosen.select(samples=[chosen.samples.ids.index(holdout.samples.ids[k]) for k in np.sort(order[60:67])])
    x = picked.alleles_nl()
    expected = model.log_likelihood(picked) - np.where(x == 1, np.log(alt), np.log(1 - alt)).sum(axis=1)
    np.testing.assert_allclose(plain.nonmember_s, expected[0::2] + expected[1::2])


def test_a_model_gives_away_those_it_holds(sides):
    train, holdout, other = sides
    policy = AuditPolicy()
    found = {f.name: f for f in model_membership(fit(train, CONFIG), train, holdout, policy=policy)}
    area = found["membership_auc_model_likelihood"]
    assert area.value > 0.95
    assert area.verdict == "fail"
    assert area.n == {"members": 60, "non_members": 60}
    stranger = {f.name: f for f in model_membership(fit(other, CONFIG), train, holdout, policy=policy)}
    low, high = stranger["membership_auc_model_likelihood"].interval
    assert low < 0.5 < high
    without = member_scores(fit(train, CONFIG), train, holdout, leave_one_out=True)
    assert abs(np.median(without.member_s) - np.median(without.nonmember_s)) < without.nonmember_s.std()


def test_samples_alone_are_attacked_by_a_model_of_them(sides):
    train, holdout, _ = sides
    copies = fit(train, CONFIG.model_copy(update={"ne": 1.0, "mismatch": 0.0})).sample(60, seed=1)  # whole haplotypes
    found = model_membership(fit(copies, CONFIG), train, holdout, name="samples")
    assert found[0].name == "membership_auc_samples"
    assert found[0].value > 0.7
    assert found[0].verdict == "fail"


def test_the_audit_describes_the_attack_on_samples(sides):
    train, holdout, other = sides
    policy = AuditPolicy()
    found = {f.name: f for f in samples_membership(train, train, holdout, policy=policy)}
    assert found["membership_auc_copying_model"].value > 0.9
    assert {f.verdict for f in found.values()} == {"none"}
    low, high = samples_membership(other, train, holdout, policy=policy)[0].interval
    assert low < 0.5 < high
    assert samples_membership(other, train, holdout, policy=policy, people=20)[0].n == {
        "members": 20,
        "non_members": 20,
    }
    assert samples_membership(other, train, holdout.select(samples=slice(0, 3)), policy=policy) == []


@pytest.mark.parametrize("gate", [False, True])
def test_the_policy_gates_the_attack_on_samples(sides, gate):
    """Off, the attack is described; on, it convicts a copying model that switches rarely, and neither unseen people, nor a
    sampler of unseen people, nor the fresh control of the holdout.
    """
    train, holdout, other = sides
    policy = AuditPolicy(gate_copying_model=gate)
    judge = copying_judge(train, holdout, policy, 0)

    def area(name, panel):
        found = {f.name: f for f in judge(name, haplotype_pool(panel), None)}
        return found.get("membership_auc_copying_model")

    small = CONFIG.model_copy(update={"ne": 30.0, "mismatch": 1e-4})
    copied, unseen = (area("synthetic", fit(panel, small).sample(60, seed=1)) for panel in (train, other))
    assert copied.value > 0.65
    assert copied.interval[0] > 0.55
    assert copied.verdict == ("fail" if gate else "none")
    assert unseen.interval[0] < 0.5 < unseen.interval[1]
    assert unseen.verdict == ("pass" if gate else "none")
    fresh = area("fresh_real", holdout.select(samples=slice(0, 40)))
    copycat = area("copycat", train.select(samples=slice(0, 40)))
    if gate:
        assert (fresh.verdict, copycat.verdict) == ("pass", "fail")
        assert fresh.n == {"members": 60, "non_members": 40}  # half of the 80 people who are left
    else:
        assert fresh is copycat is None
    odd = haplotype_pool(other)
    assert judge("synthetic", odd.select(np.arange(1, 21)), None) == []  # rows that are no pairs of one person


def test_honest_sets_keep_the_rate_of_the_gated_attack():
    """Sets of unseen people, everything drawn anew: DeLong's interval and the rank test hold at 30 people a side."""
    policy, convicted, areas = AuditPolicy(gate_copying_model=True), 0, []
    for repeat in range(60):
        rng = np.random.default_rng(repeat)
        founders = rng.integers(0, 2, (40, 300)).astype(np.uint8)
        train, holdout, other = (people(rng, n, tag, founders) for n, tag in ((30, "t"), (60, "h"), (30, "o")))
        found = samples_membership(other, train, holdout, policy=policy, seed=repeat)
        convicted += any(f.verdict == "fail" for f in found)
        areas.append(found[0].value)
    assert convicted <= 2  # 60 times 0.005, shared with other attacks
    assert np.mean(areas) == pytest.approx(0.5, abs=4 * np.std(areas, ddof=1) / np.sqrt(60))


def test_a_run_folder_and_sites_in_another_order(sides, tmp_path):
    train, holdout, _ = sides
    model = fit(train, CONFIG)
    model.save(tmp_path / "run")
    expected = member_scores(model, train, holdout)
    turned = np.arange(300)[::-1]
    scores = member_scores(tmp_path / "run", train.select(sites=turned), holdout.select(sites=turned))
    np.testing.assert_allclose(scores.member_s, expected.member_s)
    np.testing.assert_allclose(scores.nonmember_s, expected.nonmember_s)
    with pytest.raises(InputError, match="4 holdout people"):
        member_scores(model, train, holdout.select(samples=slice(0, 3)))
