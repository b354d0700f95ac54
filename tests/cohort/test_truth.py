from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from engine.cohort import genotypes
from engine.cohort.config import EmbeddedConfig
from engine.cohort.embedded import Cohort, scan_table
from engine.cohort.people import log_ventricle, make_people
from engine.cohort.tables import Table
from engine.cohort.truth import Estimate, Observed, anatomy_effects, compare, diagnosis_effects, kept


def observed(cohort: Cohort) -> Observed:
    return Observed(cohort.subjects, genotypes.dosage(cohort.panel), cohort.scans, cohort.volumes)


def crowd(n: int, seed: int) -> tuple[EmbeddedConfig, Table, Table, np.ndarray]:
    config = EmbeddedConfig(people=n, seed=seed)
    rng = np.random.Generator(np.random.Philox(seed))
    dosage = rng.binomial(2, config.disease.locus_frequency, size=(n, 3))
    people, latent = make_people(config, rng.choice(["AFR", "EUR", "EAS"], n), dosage, [f"P{k}" for k in range(n)])
    return config, people, latent, dosage


def test_effects_of_a_large_cohort_are_those_of_the_generating_model() -> None:
    config, people, latent, dosage = crowd(6000, 5)
    scans = scan_table(people)
    row = {s: i for i, s in enumerate(people["subject"])}
    at = np.array([row[s] for s in scans["subject"]])
    male, ad = (people["sex"] == "M").astype(float)[at], (people["diagnosis"] == "AD").astype(float)[at]
    volume = np.exp(
        log_ventricle(
            config.anatomy,
            people["age"][at],
            male,
            ad,
            latent["z_ventricle"][at],
            latent["z_rate"][at],
            scans["interval_years"],
        )
    )
    found = anatomy_effects(scans, volume, latent["head_mm3"][at])
    a = config.anatomy
    wanted = {
        "ventricle_age_slope_CN": a.ventricle_log_per_year,
        "ventricle_age_slope_AD": a.ventricle_log_per_year,
        "ventricle_ad_effect": a.ventricle_log_ad,
        "head_sex_effect": a.head_log_male,
        "ventricle_rate_CN": a.ventricle_log_per_year,
        "ventricle_rate_AD": a.ventricle_log_per_year + a.rate_log_ad,
    }
    for name, value in wanted.items():
        assert abs(found[name].value - value) < 3.5 * found[name].se, name
        assert found[name].se < 0.08 * value, name
    assert np.tanh(found["ventricle_visit_correlation"].value) > 0.95  # only the own rate separates the visits
    odds = diagnosis_effects(people, dosage, ["AFR", "EAS", "EUR"])
    for estimate, value in zip(odds, (*config.disease.locus_log_odds, config.disease.log_odds_per_decade)):
        assert abs(estimate.value - value) < 3.5 * estimate.se


def test_verdicts_of_one_effect() -> None:
    real = Estimate(1.1, 0.2, 100)
    assert kept("x", (real, Estimate(1.0, 0.2, 100)), 1.2, null=0.0).verdict == "pass"
    assert kept("x", (real, Estimate(0.1, 0.2, 100)), 1.2, null=0.0).verdict == "fail"
    assert kept("x", (real, Estimate(0.1, 9.0, 100)), 1.2, null=0.0).verdict == "fail"  # imprecision excuses nothing
    assert kept("x", (Estimate(0.1, 0.2, 100), real), 0.3, null=0.0).verdict == "void"
    assert kept("x", (real, Estimate(float("nan"), 1.0, 100)), 1.2).verdict == "void"
    assert kept("x", (real, Estimate(1.0, 0.2, 400)), 1.2).floor == pytest.approx(1.96 * 0.1, rel=1e-3)


def test_wald_verdicts_are_calibrated() -> None:
    """Two real cohorts of the same model pass about as often as 95 % says."""
    rng = np.random.Generator(np.random.Philox(3))
    passed = [
        kept("x", [Estimate(float(v), 1.0, 50) for v in rng.normal(5, [1.0, np.sqrt(2.0)])], 5.0).verdict == "pass"
        for _ in range(4000)
    ]  # the second inherits the first one's error: variance 1 + 1
    assert np.mean(passed) == pytest.approx(0.95, abs=0.012)


def test_a_cohort_against_itself_keeps_everything_and_a_spoilt_one_does_not(small: Cohort) -> None:
    true_mm3 = np.array(small.truth["scans"]["ventricle_mm3"])
    real = observed(small)
    run = lambda synthetic: compare(  # noqa: E731
        real,
        synthetic,
        config=small.config,
        loci=small.loci,
        true_ventricle_mm3=true_mm3,
        position_bp=small.panel.sites.position_bp,
    )
    same = run(real)
    by_name = {f.name: f for f in same.findings}
    for name in ("age_mean", "head_sex_effect", "brain_visit_correlation", "fst_AFR_EUR"):
        assert by_name[name].value == pytest.approx(by_name[name].detail["real"], abs=1e-9)
        assert by_name[name].verdict == "pass", name
    assert by_name["ventricle_measure_r2"].value > 0.9
    json.dumps(same.figures, allow_nan=False)
    json.dumps([f.to_json() for f in same.findings], allow_nan=False)

    order = np.random.Generator(np.random.Philox(1)).permutation(len(small.volumes))
    shuffled = run(replace(real, volumes=[small.volumes[i] for i in order]))
    assert {f.name: f for f in shuffled.findings}["brain_visit_correlation"].verdict == "fail"
    older = {**small.subjects, "age": small.subjects["age"] + 15}
    verdicts = {f.name: f.verdict for f in run(replace(real, subjects=older)).findings}
    assert verdicts["age_mean"] == "fail"
    assert verdicts["age_outside_bounds"] == "fail"
    mixed = {**small.subjects, "group": np.roll(small.subjects["group"], 1)}
    assert {f.name: f.verdict for f in run(replace(real, subjects=mixed)).findings}["fst_AFR_EUR"] == "fail"
