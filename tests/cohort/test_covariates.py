from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine.cohort import covariates
from engine.cohort.config import EmbeddedConfig
from engine.cohort.people import make_people
from engine.cohort.tables import Table
from engine.errors import CorruptRun, InputError

N = 1200


@pytest.fixture(scope="module")
def real() -> tuple[Table, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(2))
    dosage = rng.binomial(2, 0.3, size=(N, 60))
    group = rng.choice(["AFR", "EUR", "EAS"], N, p=[0.3, 0.5, 0.2])
    config = EmbeddedConfig(seed=21)
    people, _ = make_people(config, group, dosage[:, [10, 30, 50]], [f"P{k}" for k in range(N)])
    return people, dosage


@pytest.fixture(scope="module")
def model(real: tuple[Table, np.ndarray]) -> covariates.CovariateModel:
    return covariates.fit(*real)


def test_coefficients_come_back(model: covariates.CovariateModel) -> None:
    assert model.score is not None
    assert 10 in model.score.site
    assert model.diagnosis_coefficients["age_decade"] == pytest.approx(0.7, abs=0.3)
    effect = model.diagnosis_coefficients["score"] * model.score.weight[list(model.score.site).index(10)]
    assert effect == pytest.approx(1.2, abs=0.35)


def test_every_synthetic_row_keeps_the_rules(model: covariates.CovariateModel, real: tuple[Table, np.ndarray]) -> None:
    people = model.sample(2000, seed=1)
    assert people["age"].min() >= 50
    assert people["age"].max() <= 90
    assert set(people["sex"]) <= {"F", "M"}
    assert set(people["group"]) == {"AFR", "EUR", "EAS"}
    assert set(people["diagnosis"]) == {"CN", "AD"}
    assert set(people["visits"]) == {1, 2}
    twice = people["visits"] == 2
    assert np.all((people["interval_years"] > 0) == twice)
    assert people["interval_years"].max() <= 4
    assert not np.isin(people["age"], real[0]["age"]).any()  # nobody's own age


def test_marginals_and_links_follow_the_fitted_people(
    model: covariates.CovariateModel, real: tuple[Table, np.ndarray]
) -> None:
    table = {name: values[real[0]["split"] == "train"] for name, values in real[0].items()}
    rng = np.random.Generator(np.random.Philox(5))
    made = model.sample(6000, seed=3, genotypes=lambda groups: rng.binomial(2, 0.3, size=(len(groups), 60)))
    assert made["age"].mean() == pytest.approx(table["age"].mean(), abs=0.8)
    assert (made["group"] == "EUR").mean() == pytest.approx((table["group"] == "EUR").mean(), abs=0.03)
    assert (made["diagnosis"] == "AD").mean() == pytest.approx((table["diagnosis"] == "AD").mean(), abs=0.04)
    old, young = made["age"] > 75, made["age"] < 65
    assert (made["diagnosis"][old] == "AD").mean() > (made["diagnosis"][young] == "AD").mean() + 0.1
    carriers = made["genetic_score"] > np.quantile(made["genetic_score"], 0.8)
    assert (made["diagnosis"][carriers] == "AD").mean() > (made["diagnosis"][~carriers] == "AD").mean() + 0.1


def test_person_k_is_the_same_in_any_shard(model: covariates.CovariateModel) -> None:
    whole = model.sample(40, seed=6)
    part = model.sample(10, seed=6, start=25)
    assert all(np.array_equal(whole[name][25:35], part[name]) for name in whole)
    assert not np.array_equal(model.sample(40, seed=7)["age"], whole["age"])


def test_groups_can_be_asked_for(model: covariates.CovariateModel) -> None:
    people = model.demographics(5, seed=1, groups=["EAS"] * 5)
    assert list(people["group"]) == ["EAS"] * 5


def test_saved_and_loaded_model_makes_the_same_people(model: covariates.CovariateModel, tmp_path: Path) -> None:
    model.save(tmp_path / "covariates.json")
    loaded = covariates.load(tmp_path / "covariates.json")
    a, b = model.sample(50, seed=2), loaded.sample(50, seed=2)
    assert all(np.array_equal(a[name], b[name]) for name in a)
    (tmp_path / "bad.json").write_text(json.dumps({"schema": "other/1"}))
    with pytest.raises(CorruptRun):
        covariates.load(tmp_path / "bad.json")


def test_people_held_out_teach_the_model_nothing(
    model: covariates.CovariateModel, real: tuple[Table, np.ndarray]
) -> None:
    table, dosage = {name: values.copy() for name, values in real[0].items()}, real[1].copy()
    out = table["split"] == "holdout"
    table["diagnosis"][out] = np.where(table["diagnosis"][out] == "AD", "CN", "AD")
    table["age"][out] = 55.0
    dosage[out] = 0
    assert covariates.fit(table, dosage).to_json() == model.to_json()


def test_the_model_file_holds_no_persons_age(model: covariates.CovariateModel, real: tuple[Table, np.ndarray]) -> None:
    text = json.dumps(model.to_json())
    assert not any(f"{age:.6f}" in text for age in real[0]["age"])


def test_a_missing_value_is_refused(real: tuple[Table, np.ndarray]) -> None:
    table = {name: values.copy() for name, values in real[0].items()}
    table["age"][np.flatnonzero(table["split"] == "train")[0]] = np.nan
    with pytest.raises(InputError):
        covariates.fit(table)
    del table["sex"]
    with pytest.raises(InputError, match="sex"):
        covariates.fit(table)
