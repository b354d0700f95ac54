from __future__ import annotations

import numpy as np
import pytest

from engine.cohort.association import fit_logistic
from engine.cohort.config import EmbeddedConfig
from engine.cohort.embedded import scan_table
from engine.cohort.people import log_ventricle, make_people
from engine.cohort.tables import Table

CONFIG = EmbeddedConfig(people=20_000, seed=9)
N = 20_000


@pytest.fixture(scope="module")
def crowd() -> tuple[Table, Table, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(4))
    dosage = rng.binomial(2, CONFIG.disease.locus_frequency, size=(N, 3))
    group = rng.choice(["AFR", "EUR", "EAS"], N)
    return *make_people(CONFIG, group, dosage, [f"P{k}" for k in range(N)]), dosage


def test_a_large_sample_gives_back_every_coefficient_of_the_diagnosis(crowd: tuple[Table, Table, np.ndarray]) -> None:
    people, _, dosage = crowd
    design = np.column_stack([np.ones(N), (people["age"] - 70) / 10, people["sex"] == "M", dosage]).astype(float)
    beta, covariance = fit_logistic(design, (people["diagnosis"] == "AD").astype(float))
    d = CONFIG.disease
    truth = np.array([d.log_odds_at_70, d.log_odds_per_decade, d.log_odds_male, *d.locus_log_odds])
    z = (beta - truth) / np.sqrt(np.diag(covariance))
    assert np.abs(z).max() < 3.5
    assert np.sqrt(np.diag(covariance)).max() < 0.05  # so that the line above is a sharp test


def test_person_k_does_not_depend_on_the_others(crowd: tuple[Table, Table, np.ndarray]) -> None:
    people, latent, dosage = crowd
    some = slice(700, 760)
    alone, alone_latent = make_people(
        CONFIG, people["group"][some], dosage[some], list(people["subject"][some]), start=700
    )
    for name in ("age", "sex", "diagnosis", "visits", "interval_years"):
        assert np.array_equal(alone[name], people[name][some]), name
    assert all(np.array_equal(alone_latent[name], latent[name][some]) for name in latent)


def test_every_row_keeps_the_rules(crowd: tuple[Table, Table, np.ndarray]) -> None:
    people, _, _ = crowd
    r = CONFIG.recruitment
    assert people["age"].min() >= r.age_low
    assert people["age"].max() <= r.age_high
    years, twice = people["interval_years"], people["visits"] == 2
    assert np.all((years[twice] >= r.interval_low_years) & (years[twice] <= r.interval_high_years))
    assert np.all(years[~twice] == 0)
    for group in set(people["group"]):
        share = (people["split"][people["group"] == group] == "holdout").mean()
        assert share == pytest.approx(r.holdout, abs=0.001)


def test_scans_table_has_a_row_per_visit_and_one_split_per_person(crowd: tuple[Table, Table, np.ndarray]) -> None:
    people = {name: values[:300] for name, values in crowd[0].items()}
    scans = scan_table(people)
    assert len(scans["image"]) == people["visits"].sum()
    assert len(set(scans["image"])) == len(scans["image"])
    second = scans["visit"] == 2
    age = dict(zip(people["subject"], people["age"]))
    baseline = np.array([age[s] for s in scans["subject"]])
    assert np.allclose(scans["age"], baseline + scans["interval_years"])
    assert np.all(scans["interval_years"][second] > 0)
    assert len({(s, x) for s, x in zip(scans["subject"], scans["split"])}) == 300


def test_ventricles_grow_with_age_diagnosis_and_time() -> None:
    a = CONFIG.anatomy
    at = lambda age, ad, years: float(log_ventricle(a, age, 0.0, ad, 0.0, 0.0, years))  # noqa: E731
    assert at(80, 0, 0) - at(70, 0, 0) == pytest.approx(10 * a.ventricle_log_per_year)
    assert at(70, 1, 0) - at(70, 0, 0) == pytest.approx(a.ventricle_log_ad)
    assert at(70, 1, 2) - at(70, 1, 0) == pytest.approx(2 * (a.ventricle_log_per_year + a.rate_log_ad))
    assert np.exp(at(70, 0, 0)) == pytest.approx(a.ventricle_mm3)
