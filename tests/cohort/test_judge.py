from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from engine.cohort import genotypes
from engine.cohort.config import DiseaseConfig, EmbeddedConfig, GenotypeConfig
from engine.cohort.genotypes import Locus, dosage
from engine.cohort.judge import Side, association, diagnosis_model, plink2_glm
from engine.cohort.people import make_people
from engine.cohort.tables import take
from engine.errors import Unsupported


@pytest.fixture(scope="module")
def people() -> tuple[Side, list[Locus]]:
    """People without scans, one strong locus."""
    disease = DiseaseConfig(locus_log_odds=(1.8,), locus_names=("LARGE1",), locus_frequency=(0.35,))
    config = EmbeddedConfig(people=400, seed=6, genotypes=GenotypeConfig(windows=1, window_bp=100_000), disease=disease)
    ids = [f"P{k:04d}" for k in range(config.people)]
    panel = genotypes.simulate(config.genotypes, config.people, config.seed, ids)
    loci = genotypes.choose_loci(panel, disease)
    assert panel.samples.group is not None
    subjects, _ = make_people(config, panel.samples.group, dosage(panel, np.array([loci[0].site])), ids)
    return Side(subjects, panel), loci


def half(side: Side, which: int) -> Side:
    here = np.arange(len(side.subjects["subject"])) % 2 == which
    return Side(take(side.subjects, here), side.panel.select(samples=here))


def with_diagnosis(side: Side, diagnosis: np.ndarray) -> Side:
    return replace(side, subjects={**side.subjects, "diagnosis": diagnosis})


def test_a_model_of_people_like_the_real_ones_passes_and_one_of_shuffled_diagnoses_fails(
    people: tuple[Side, list[Locus]],
) -> None:
    train, holdout = half(people[0], 0), half(people[0], 1)
    same = {f.name: f for f in diagnosis_model(train, holdout, train)}
    assert same["diagnosis_auc_ratio"].value == 1.0
    assert same["diagnosis_auc_ratio"].verdict == "pass"
    assert same["diagnosis_auc_ratio"].detail["real"][0] > 0.65
    flipped = np.where(train.subjects["diagnosis"] == "AD", "CN", "AD").astype(object)
    wrong = {f.name: f for f in diagnosis_model(train, holdout, with_diagnosis(train, flipped))}
    assert wrong["diagnosis_auc_ratio"].value < 0.6
    assert wrong["diagnosis_auc_ratio"].verdict == "fail"
    assert wrong["diagnosis_calibration_slope"].verdict == "fail"


@pytest.mark.skipif(shutil.which("plink2") is None, reason="plink2 is not installed")
def test_plink2_finds_the_locus_and_sees_when_it_is_gone(people: tuple[Side, list[Locus]]) -> None:
    side, loci = people
    found = plink2_glm(side)
    beta, se, p = found[loci[0].id]
    assert abs(beta - 1.8) < 3.5 * se
    assert p < 1e-6
    same = {f.name: f for f in association(side, side, loci)}
    assert same["gwas_hit_at_causal_locus"].verdict == "pass"
    assert same["plink2_log_odds_LARGE1"].verdict == "pass"
    shuffled = np.random.Generator(np.random.Philox(3)).permutation(side.subjects["diagnosis"])
    gone = {f.name: f for f in association(side, with_diagnosis(side, shuffled), loci)}
    assert gone["gwas_hit_at_causal_locus"].verdict == "fail"
    assert gone["plink2_log_odds_LARGE1"].verdict == "fail"


def test_without_plink2_it_says_so(people: tuple[Side, list[Locus]]) -> None:
    with pytest.raises(Unsupported, match="no such program"):
        plink2_glm(people[0], "no-such-plink2")
