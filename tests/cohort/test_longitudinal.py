from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from engine.cohort.longitudinal import TableModel, fit_table, model_from_json
from engine.cohort.nodes import classes_of
from engine.cohort.profile import Profile, check_row, check_rows, parse_profile
from engine.cohort.regressions import Density, fit_line, fit_margin, fit_ordered, fit_rate
from engine.cohort.tables import Table, column, take
from engine.errors import InputError, UsageError

PROFILE: dict[str, Any] = {
    "name": "trial",
    "title": "A trial",
    "columns": {
        "sex": {"kind": "levels", "levels": ["F", "M"]},
        "site": {"kind": "levels", "levels": ["a", "b", "c", "d", "e"]},
        "age": {"kind": "number", "range": [40, 90], "over_time": "clock"},
        "packs": {"kind": "number", "range": [0, 80]},
        "stage": {"kind": "ordered", "levels": ["0", "I", "II", "III"], "over_time": "rises"},
        "points": {"kind": "count", "range": [0, 30], "over_time": "changes", "missing": ["n/a", "too-ill"]},
    },
    "visits": {"planned_years": [0, 1, 2, 3], "least_gap_years": 0.2, "most_gap_years": 3},
    "links": {
        "age": ["sex"],
        "packs": ["sex"],
        "stage": ["age", "packs"],
        "points": ["stage"],
        "missing points": ["stage"],
        "end": ["stage"],
    },
}
N = 4000
STAGES = ["0", "I", "II", "III"]


def made_table(n: int = N, seed: int = 1) -> Table:
    """A table whose every coefficient is written here, independently of the model's own code."""
    rng = np.random.Generator(np.random.Philox(seed))
    rows: list[dict[str, Any]] = []
    for k in range(n):
        sex = "M" if rng.random() < 0.4 else "F"
        age = float(np.clip(rng.normal(65 + 3 * (sex == "M"), 6), 40, 90))
        packs = 0.0 if rng.random() < 0.4 else float(np.clip(rng.gamma(3, 8), 0, 80))
        site = rng.choice(list("abcde"), p=[0.5, 0.3, 0.197, 0.002, 0.001])
        cuts = np.array([0.0, 1.2, 2.2]) - 0.08 * (age - 65) - 0.03 * packs
        stage = int((rng.random() > 1 / (1 + np.exp(-cuts))).sum())
        score, years = 26 - 2.0 * stage + rng.normal(0, 1.5), 0.0
        for visit in range(1, 5):
            absent = rng.random() < 0.02 + 0.2 * (stage == 3)
            cell: Any = ("too-ill" if rng.random() < 0.7 else "n/a") if absent else int(np.clip(round(score), 0, 30))
            row = {"subject": f"P{k}", "visit": visit, "years": years, "sex": sex, "site": site, "age": age + years}
            rows.append({**row, "packs": packs, "stage": STAGES[stage], "points": cell, "end": "", "end_years": 0.0})
            if visit == 4:
                rows[-1]["end"] = "completed"
                break
            gap = float(np.clip(rng.normal(1, 0.25), 0.3, 2.5))
            death = rng.exponential(1 / (0.03 * np.exp(0.6 * stage)))
            if death < gap:
                rows[-1].update(end="death", end_years=years + death)
                break
            if rng.random() < 0.1:
                break
            if stage < 3 and rng.random() < 1 - np.exp(-0.15 * gap):
                stage += 1
            score += gap * (-0.5 - 0.5 * stage) + rng.normal(0, 0.8 * np.sqrt(gap))
            years += gap
    return {name: column([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module")
def profile() -> Profile:
    return parse_profile(PROFILE)


@pytest.fixture(scope="module")
def real() -> Table:
    return made_table()


@pytest.fixture(scope="module")
def model(profile: Profile, real: Table) -> TableModel:
    return fit_table(profile, real)


@pytest.fixture(scope="module")
def drawn(model: TableModel) -> list[list[dict[str, Any]]]:
    return model.draw(np.arange(N), seed=5)[1]


def cells(people: list[list[dict[str, Any]]], name: str, first: bool = True) -> np.ndarray:
    return np.array([row[name] for visits in people for row in (visits[:1] if first else visits)], dtype=object)


def test_regressions_find_their_coefficients() -> None:
    rng = np.random.Generator(np.random.Philox(4))
    x = rng.normal(size=(20_000, 2))
    cuts = np.array([-0.5, 1.0])
    level = (rng.random(len(x))[:, None] > 1 / (1 + np.exp(-(cuts - (x @ [0.8, -0.4])[:, None])))).sum(axis=1)
    found = fit_ordered(x, level, 3)
    assert found.beta == pytest.approx([0.8, -0.4], abs=0.06)
    assert found.cut == pytest.approx(cuts, abs=0.06)
    years = rng.uniform(0.2, 4, len(x))
    happened = (rng.random(len(x)) < 1 - np.exp(-years * 0.1 * np.exp(0.7 * x[:, 0]))).astype(float)
    rate = fit_rate(x, happened, years)
    assert [rate.intercept, *rate.beta] == pytest.approx([np.log(0.1), 0.7, 0.0], abs=0.06)
    beta, sd = fit_line(np.column_stack([np.ones(len(x)), x]), 1 + x @ [2.0, -1.0] + rng.normal(0, 0.5, len(x)))
    assert [*beta, sd] == pytest.approx([1, 2, -1, 0.5], abs=0.02)


def test_a_prior_replaces_data_that_are_not_there() -> None:
    rng = np.random.Generator(np.random.Philox(8))
    x = rng.normal(size=(30, 1))
    level = rng.integers(0, 2, 30)
    free = fit_ordered(x, level, 2)
    held = fit_ordered(x, level, 2, np.array([1.3]), np.array([0.01]))
    assert held.beta[0] == pytest.approx(1.3, abs=0.02)
    assert abs(free.beta[0] - 1.3) > 0.2
    assert fit_rate(x, np.zeros(30), np.ones(30), np.array([1.0]), np.array([0.1])).intercept == pytest.approx(
        np.log(0.5 / 30)
    )


def test_a_margin_keeps_atoms_and_nobodys_own_value() -> None:
    rng = np.random.Generator(np.random.Philox(6))
    value = np.where(rng.random(3000) < 0.3, 0.0, rng.gamma(3, 8, 3000)).clip(0, 80)
    margin = fit_margin(value, 0, 80, whole=False, min_count=10)
    again = margin.draw(np.linspace(0, 1, 9001)[1:-1])
    assert (again == 0).mean() == pytest.approx((value == 0).mean(), abs=0.005)
    assert np.quantile(again, [0.5, 0.75, 0.95]) == pytest.approx(np.quantile(value, [0.5, 0.75, 0.95]), rel=0.06)
    assert not np.isin(np.round(again[again > 0], 9), np.round(value, 9)).any()
    assert margin.normal_score(value).std() == pytest.approx(0.95, abs=0.05)
    assert margin.cdf(0) - margin.cdf(0, below=True) == pytest.approx((value == 0).mean())


def test_a_density_is_smooth_within_its_bounds() -> None:
    rng = np.random.Generator(np.random.Philox(12))
    value = np.concatenate([rng.normal(55, 2, 600), rng.normal(80, 3, 400)]).clip(50, 90)
    density = Density.smooth(value, 50, 90, 2.0)
    assert density.cumulative[[0, -1]] == pytest.approx([0, 1])
    again = density.draw(np.linspace(0, 1, 9001))
    assert [again.min(), again.max()] == [50, 90]
    assert again.mean() == pytest.approx(value.mean(), abs=0.5)
    assert not np.isin(again[1:-1], value).any()  # nobody's own age
    # two hills stay two: a kernel as wide as the whole would fill the valley between them
    assert np.diff(density.draw(np.array([0.55, 0.65]))) > 5
    one = Density.smooth(np.array([60.0]), 50, 90, 2.0).draw(np.array([0.1587, 0.5, 0.8413]))
    assert one == pytest.approx([58, 60, 62], abs=0.05)
    assert Density.smooth(np.zeros(0), 1, 3, 0.1).draw(np.array([0.25, 0.75])) == pytest.approx([1.5, 2.5])


def test_people_held_out_teach_the_table_nothing(profile: Profile, real: Table) -> None:
    small = take(real, np.isin(real["subject"], np.unique(real["subject"])[:300]))
    out = np.isin(small["subject"], np.unique(small["subject"])[::3])
    split = np.where(out, "holdout", "train").astype(object)
    young = np.where(out, small["age"] - small["age"].min() + 40, small["age"])
    told = fit_table(profile, {**small, "split": split})
    other = fit_table(profile, {**small, "split": split, "age": young, "packs": np.where(out, 80.0, small["packs"])})
    assert told.people == len(set(small["subject"][~out]))
    assert told.to_json() == other.to_json()
    assert told.to_json() != fit_table(profile, small).to_json()


def test_every_row_keeps_the_rules(profile: Profile, drawn: list[list[dict[str, Any]]]) -> None:
    check_rows(profile, [{"subject": k, **row} for k, visits in enumerate(drawn) for row in visits])
    for visits in drawn:
        gaps = np.diff([row["years"] for row in visits])
        assert (gaps >= 0.2 - 1e-3).all()
        assert (gaps <= 3 + 1e-3).all()
        assert visits[0]["end_years"] >= visits[-1]["years"] - 1e-3
        assert (visits[0]["end"] == "completed") == (len(visits) == 4)


def test_broken_rows_are_seen(profile: Profile) -> None:
    row = {"years": 1.0, "sex": "F", "site": "a", "age": 60.0, "packs": 1.0, "stage": "II", "points": 20}
    assert check_row(profile, row) == []
    before = {**row, "years": 0.0, "age": 59.0, "stage": "III"}
    assert any("falls" in text for text in check_row(profile, row, before))
    assert check_row(profile, {**row, "packs": 81})
    assert check_row(profile, {**row, "points": 20.5})
    assert check_row(profile, {**row, "sex": "M"}, {**row, "years": 0.5})
    assert check_row(profile, row, row)


def test_margins_and_links_come_back(real: Table, drawn: list[list[dict[str, Any]]]) -> None:
    start = real["visit"] == 1
    here = take(real, start)
    age, packs, stage = (cells(drawn, n) for n in ("age", "packs", "stage"))
    male = cells(drawn, "sex") == "M"
    assert age.astype(float)[male].mean() - age.astype(float)[~male].mean() == pytest.approx(3, abs=0.6)
    assert (packs.astype(float) == 0).mean() == pytest.approx(0.4, abs=0.03)
    for level in STAGES:
        assert (stage == level).mean() == pytest.approx((here["stage"].astype(str) == level).mean(), abs=0.03)
    x = np.column_stack([(age.astype(float) - 65), packs.astype(float)])
    place = np.array([STAGES.index(s) for s in stage])
    found = fit_ordered(x / [6, 15], place, 4).beta / [6, 15]
    assert found == pytest.approx([0.08, 0.03], abs=0.012)


def test_absence_depends_on_stage_and_keeps_its_reasons(drawn: list[list[dict[str, Any]]]) -> None:
    stage, score = cells(drawn, "stage", False), cells(drawn, "points", False)
    absent = np.isin(score, ["n/a", "too-ill"])
    assert absent[stage == "III"].mean() == pytest.approx(0.22, abs=0.04)
    assert absent[stage == "0"].mean() == pytest.approx(0.02, abs=0.012)
    assert (score[absent] == "too-ill").mean() == pytest.approx(0.7, abs=0.06)


def test_change_over_irregular_intervals_comes_back(drawn: list[list[dict[str, Any]]]) -> None:
    rates: dict[str, list[float]] = {"0": [], "III": []}
    moved, exposed = 0, 0.0
    for visits in drawn:
        for a, b in pairwise(visits):
            gap = b["years"] - a["years"]
            if a["stage"] != "III":
                moved, exposed = moved + (a["stage"] != b["stage"]), exposed + gap
            numbers = not isinstance(a["points"], str) and not isinstance(b["points"], str)
            if numbers and a["stage"] == b["stage"] and a["stage"] in rates and min(a["points"], b["points"]) > 0:
                rates[a["stage"]].append((b["points"] - a["points"]) / gap)
    assert moved / exposed == pytest.approx(0.14, abs=0.02)
    assert np.mean(rates["0"]) == pytest.approx(-0.5, abs=0.25)
    assert np.mean(rates["III"]) == pytest.approx(-2.0, abs=0.3)


def test_death_and_dropout_come_back(real: Table, drawn: list[list[dict[str, Any]]]) -> None:
    start = real["visit"] == 1
    last = np.append(real["subject"][1:] != real["subject"][:-1], True)
    end = np.where(real["end"] == "", "dropout", real["end"].astype(str))[last]
    ill = np.isin(real["stage"].astype(str)[start], ["II", "III"])
    made, made_ill = cells(drawn, "end"), np.isin(cells(drawn, "stage"), ["II", "III"])
    for state in ("death", "dropout", "completed"):
        for group, group_made in ((ill, made_ill), (~ill, ~made_ill)):
            assert (made == state)[group_made].mean() == pytest.approx((end == state)[group].mean(), abs=0.035), state
    assert Counter(made)["death"] > 100


def test_rare_levels_are_pooled_or_never_made(
    profile: Profile, model: TableModel, drawn: list[list[dict[str, Any]]]
) -> None:
    few = fit_table(profile, made_table(400, seed=3))
    sites = set(cells(few.draw(np.arange(3000), seed=0)[1], "site"))
    assert sites == {"a", "b", "c"}
    assert any("site" in note and "never made" in note for note in few.notes)
    assert set(cells(drawn, "site")) >= {"a", "b", "c"}


def test_person_k_is_the_same_whoever_is_drawn_beside(model: TableModel, drawn: list[list[dict[str, Any]]]) -> None:
    assert model.draw(np.array([70, 7, 3999]), seed=5)[1] == [drawn[70], drawn[7], drawn[3999]]
    assert model.draw(np.array([7]), seed=6)[1] != [drawn[7]]
    loaded = model_from_json(json.loads(json.dumps(model.to_json())))
    assert loaded.draw(np.arange(60), seed=5)[1] == drawn[:60]


def test_conditioning_is_exact(model: TableModel, drawn: list[list[dict[str, Any]]]) -> None:
    where = {"sex": "M", "age": (60, 66), "stage": ["II", "III"]}
    index, people = model.draw(np.arange(40_000), seed=9, where=where)
    assert 0.02 < len(index) / 40_000 < 0.5
    assert set(cells(people, "sex")) == {"M"}
    assert 60 <= cells(people, "age").astype(float).min() <= cells(people, "age").astype(float).max() <= 66
    big = model.draw(np.arange(40_000), seed=10)[1]
    like = [v for v in big if v[0]["sex"] == "M" and 60 <= v[0]["age"] <= 66 and v[0]["stage"] in ("II", "III")]
    assert cells(people, "packs").astype(float).mean() == pytest.approx(
        cells(like, "packs").astype(float).mean(), abs=1.2
    )
    assert (cells(people, "stage") == "III").mean() == pytest.approx((cells(like, "stage") == "III").mean(), abs=0.04)


def test_bad_requests_and_bad_tables_are_refused(profile: Profile, model: TableModel, real: Table) -> None:
    from engine.cohort.longitudinal import check_where

    for where, text in (
        ({"sxe": "M"}, "sex"),
        ({"sex": "X"}, "level"),
        ({"age": (95, 99)}, "range"),
        ({"age": "old"}, "number"),
    ):
        with pytest.raises(UsageError, match=text):
            check_where(profile, where)
    small = take(real, np.arange(300))
    older = {**small, "age": small["age"].copy()}
    older["age"][0] = 95.0
    with pytest.raises(InputError, match="age 95"):
        fit_table(profile, older)
    with pytest.raises(InputError, match="stage"):
        fit_table(
            profile, {**small, "stage": np.where(np.arange(300) == 5, "IV", small["stage"].astype(str)).astype(object)}
        )
    with pytest.raises(InputError, match="packs"):
        fit_table(profile, {k: v for k, v in small.items() if k != "packs"})
    with pytest.raises(UsageError, match="circle"):
        parse_profile({**PROFILE, "links": {"age": ["sex"], "sex": ["age"]}})
    with pytest.raises(UsageError, match="'columns'"):
        parse_profile({**PROFILE, "colums": {}})


def test_classes_put_rare_levels_with_neighbours() -> None:
    place = np.repeat([0, 1, 2, 3], [40, 3, 30, 4])
    assert classes_of(place, 5, ordered=True, min_count=10) == ((0,), (1, 2, 3))
    assert classes_of(np.repeat([0, 1, 2], [40, 3, 2]), 3, ordered=True, min_count=10) == ((0, 1, 2),)
    assert classes_of(place, 5, ordered=False, min_count=7) == ((0,), (2,), (1, 3))
    assert classes_of(place, 5, ordered=False, min_count=10) == ((0,), (2,))
