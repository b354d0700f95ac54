"""Who the people of the embedded cohort are: age, sex, diagnosis, visits, and the anatomy they should have.

The generating model, vectorised over people; person k's draws come from their own stream, so that person k is a pure
function of (config, seed, k) and of the genotype given for k. Equations in docs/cohort.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit, ndtr, ndtri

from engine import seeding
from engine.cohort.config import AnatomyConfig, DiseaseConfig, EmbeddedConfig, PeopleConfig
from engine.cohort.tables import Table

_DRAWS = ("age", "sex", "diagnosis", "return", "interval", "split", "ventricle", "rate", "head")
SUBJECT_COLUMNS = ("subject", "group", "sex", "age", "diagnosis", "visits", "interval_years", "split")


def draws(seed: int, people: int, start: int = 0) -> dict[str, np.ndarray]:
    """Uniform(0, 1) numbers of each person start..start+people-1, by what they are for."""
    table = np.stack(
        [seeding.generator(seed, "cohort.people", k).random(len(_DRAWS)) for k in range(start, start + people)]
    )
    return {name: table[:, i] for i, name in enumerate(_DRAWS)}


def ages(model: PeopleConfig, uniform: np.ndarray) -> np.ndarray:
    """Normal truncated to [age_low, age_high], by inversion."""
    low, high = (ndtr((edge - model.age_mean) / model.age_sd) for edge in (model.age_low, model.age_high))
    return np.clip(model.age_mean + model.age_sd * ndtri(low + uniform * (high - low)), model.age_low, model.age_high)


def log_odds(disease: DiseaseConfig, age: np.ndarray, male: np.ndarray, dosage_nm: np.ndarray) -> np.ndarray:
    """Log odds of AD against CN; dosage_nm counts ALT alleles at the causal loci, in the config's order."""
    effect = np.asarray(dosage_nm, dtype=float) @ np.array(disease.locus_log_odds)
    return (
        disease.log_odds_at_70 + disease.log_odds_per_decade * (age - 70) / 10 + disease.log_odds_male * male + effect
    )


def log_ventricle(anatomy: AnatomyConfig, age: Any, male: Any, ad: Any, z: Any, z_rate: Any, years: Any) -> Any:
    """Log of the lateral ventricle volume in mm3, `years` after the first visit; numbers or arrays, `age` at visit
    1.
    """
    a = anatomy
    first = np.log(a.ventricle_mm3) + a.ventricle_log_per_year * (age - 70)
    first = first + a.ventricle_log_ad * ad + a.ventricle_log_male * male + a.ventricle_log_sd * z
    return first + years * (a.ventricle_log_per_year + a.rate_log_ad * ad + a.rate_log_sd * z_rate)


def split_by_person(group: np.ndarray, uniform: np.ndarray, holdout: float) -> np.ndarray:
    """ "train" or "holdout" per person: within every group the people with the smallest numbers are held out."""
    split = np.full(len(group), "train", dtype=object)
    for name in sorted(set(group)):
        members = np.flatnonzero(group == name)
        split[members[np.argsort(uniform[members], kind="stable")[: round(holdout * len(members))]]] = "holdout"
    return split


def make_people(
    config: EmbeddedConfig, group: np.ndarray, dosage_nm: np.ndarray, ids: list[str], start: int = 0
) -> tuple[Table, Table]:
    """Subjects table (SUBJECT_COLUMNS) and, row by row, their latent truth.

    Args:
        group: (n,) group labels.
        dosage_nm: (n, loci) ALT allele counts at the causal loci.
        ids: subject ids.
        start: index of the first person.

    The latent table holds log_odds, z_ventricle, z_rate (standard normal), head_mm3 and own rate per year: never given
    to a generator.
    """
    uniform = draws(config.seed, len(group), start)
    recruit, anatomy = config.recruitment, config.anatomy
    age = ages(recruit, uniform["age"])
    male = (uniform["sex"] < recruit.male).astype(float)
    odds = log_odds(config.disease, age, male, dosage_nm)
    ad = (uniform["diagnosis"] < expit(odds)).astype(float)
    returns = uniform["return"] < np.where(ad > 0, recruit.second_visit_ad, recruit.second_visit)
    years = recruit.interval_low_years + uniform["interval"] * (
        recruit.interval_high_years - recruit.interval_low_years
    )
    clip = lambda u: ndtri(np.clip(u, 1e-3, 1 - 1e-3))  # noqa: E731  anatomy beyond 3 sd would leave the field of view
    z_head, z_ventricle, z_rate = (clip(uniform[name]) for name in ("head", "ventricle", "rate"))
    subjects: Table = {
        "subject": np.array(ids, dtype=object),
        "group": np.asarray(group, dtype=object),
        "sex": np.where(male > 0, "M", "F").astype(object),
        "age": age,
        "diagnosis": np.where(ad > 0, "AD", "CN").astype(object),
        "visits": 1 + returns.astype(np.int64),
        "interval_years": np.where(returns, years, 0.0),
        "split": split_by_person(np.asarray(group), uniform["split"], recruit.holdout),
    }
    latent: Table = {
        "log_odds": odds,
        "z_ventricle": z_ventricle,
        "z_rate": z_rate,
        "head_mm3": anatomy.head_mm3 * np.exp(anatomy.head_log_male * male + anatomy.head_log_sd * z_head),
        "rate_per_year": anatomy.ventricle_log_per_year + anatomy.rate_log_ad * ad + anatomy.rate_log_sd * z_rate,
    }
    return subjects, latent
