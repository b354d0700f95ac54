"""Rates of the whole audit: mixtures are judged as sets of their own would be, and honest draws take people apart."""

from __future__ import annotations

import numpy as np
import pytest

from engine.audit import AuditPolicy, Finding, Pool
from engine.audit.gates import Gates, LightJudge
from engine.audit.rates import false_positive_rate, planted_copies, power_at_contamination

POLICY = AuditPolicy(control_rows=30, contamination_repeats=3, honest_repeats=3, subsets=1, contamination=0.2)


def rows(rng, n, tag, kind, a_person=2):
    person = np.array([f"{tag}{i // a_person}" for i in range(n)])
    if kind == "bits":
        return Pool("bits", rng.integers(0, 2**63, (n, 2), dtype=np.uint64), person, length=128)
    return Pool("features", rng.standard_normal((n, 5)).astype(np.float32), person)


@pytest.mark.parametrize("kind", ["features", "bits"])
@pytest.mark.parametrize("n", [40, 6])
def test_a_mixture_is_judged_as_a_set_of_its_own(monkeypatch, kind, n):
    """What is put together from known p-values and distances equals what a search of the mixture finds."""
    rng = np.random.default_rng(n)
    train, holdout, made = rows(rng, 80, "t", kind), rows(rng, 60, "h", kind), rows(rng, n, "s", kind)
    gates = Gates.prepare(train, holdout, POLICY, 0)
    scores = gates.search.score(made, "synthetic")
    judged = gates.judge("synthetic", made, scores)
    copies, copy_scores = planted_copies(gates)
    seen = []
    whole = Gates.judge

    def check(self, name, pool, mixed, unseen=None, p_n=None, nearest=None):
        assert (name, len(pool), pool.people) == ("contaminated", n, made.people)
        is_copy = ~(pool.data[:, None] == made.data[None]).all(axis=2).any(axis=1)
        assert is_copy.sum() == 2 * max(1, round(0.2 * made.people))
        assert p_n == pytest.approx(self.null.p_values(mixed))
        for known, (distance, _) in zip(nearest, self.attackers.nearest(pool), strict=True):
            assert known == pytest.approx(distance[:, 0])
        near = np.array([np.min(self.search.score(pool.select([i]), "x").distance_train_n) for i in range(n)])
        assert mixed.distance_train_n == pytest.approx(near)
        seen.append(tuple(pool.person[is_copy]))
        return whole(self, name, pool, mixed, unseen, p_n, nearest)

    monkeypatch.setattr(Gates, "judge", check)
    found = power_at_contamination(gates, made, scores, judged, copies, copy_scores, holdout)
    assert len(set(seen)) > 1  # other people every time
    assert found.n["draws"] == 3


def test_light_judges_take_part_and_what_does_not_is_named():
    """A judge that is light is made anew for every split of honest people; a heavy one is named as left out."""
    rng = np.random.default_rng(3)
    train, holdout, made = (rows(rng, n, tag, "features") for n, tag in ((80, "t"), (60, "h"), (20, "s")))
    asked = []

    def light(side, unseen):
        def judge(name, pool, scores):
            asked.append((name, side.people, unseen.people))
            return [Finding("light", 0.0, verdict="fail" if name == "honest" else "pass")]

        return judge

    def heavy(name, pool, scores):
        asked.append(("heavy", 0, 0))
        return [Finding("heavy", 0.0, verdict="pass")]

    judges = [LightJudge(light(train, holdout), light), heavy]
    gates = Gates.prepare(train, holdout, POLICY, 0, judges)
    scores = gates.search.score(made, "synthetic")
    judged = gates.judge("synthetic", made, scores)
    asked.clear()
    found = power_at_contamination(gates, made, scores, judged, *planted_copies(gates), holdout)
    assert asked == [("contaminated", 40, 30)] * 3
    assert "light" in found.detail["gates"]
    assert found.detail["gates_left_out"] == ["heavy"]
    asked.clear()
    rate = false_positive_rate(train, holdout, made.people, POLICY, 0, judges, judged)
    assert asked == [("honest", 40, 22)] * 3  # a quarter of 30 holdout people is judged
    assert rate.value == 1
    assert rate.detail["by_gate"]["light"] == 1
    assert rate.detail["gates_left_out"] == ["heavy"]
    gates = Gates.prepare(train, holdout, POLICY, 0, [LightJudge(light(train, holdout), light, often=False)])
    found = power_at_contamination(gates, made, scores, judged, *planted_copies(gates), holdout)
    assert "light" in found.detail["gates_left_out"]


def test_honest_draws_keep_people_together_and_out_of_the_null(monkeypatch):
    rng = np.random.default_rng(1)
    train, holdout = rows(rng, 200, "t", "features"), rows(rng, 160, "h", "features")
    drawn = []
    whole = Gates.judge

    def check(self, name, pool, scores, *more):
        assert self.search.train.people == 50
        assert not set(pool.person) & set(self.search.holdout.person)
        assert pool.people + self.search.holdout.people == 50
        assert len(pool) == 2 * pool.people
        drawn.append(frozenset(pool.person))
        return whole(self, name, pool, scores, *more)

    monkeypatch.setattr(Gates, "judge", check)
    found = false_positive_rate(train, holdout, 8, POLICY.model_copy(update={"honest_people": 50}), 0)
    assert len(set(drawn)) == 3
    assert {len(people) for people in drawn} == {8}
    assert found.n == {"people": 8, "draws": 3, "training_people": 50}
    assert np.isnan(false_positive_rate(train, holdout, 8, POLICY.model_copy(update={"honest_repeats": 0}), 0).value)
