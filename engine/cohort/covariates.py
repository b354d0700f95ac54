"""A thin joint model of people: group, sex, age, diagnosis and visits, fitted to a subjects table.

The order of generation is the order of the arrows, each a small well-understood model:

    (group, sex) -> age            joint frequency with Laplace smoothing; a smooth density of age within its bounds
    group -> genotype              made by the genomics model and handed in
    genotype -> genetic score      weights from an association scan over the TRAIN people only
    (age, sex, group, score) -> diagnosis      logistic regression with an L2 penalty (scikit-learn)
    diagnosis -> second visit -> interval      smoothed frequency; a smooth density of the interval within its bounds

Person k is a pure function of (model, seed, k) and of k's genotype. The model keeps densities on a grid, never a
person's own age, and no cell probability is zero or one. Missing values, rarer tables and dropout as outcomes are not
handled here: a table with a missing value is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import expit

from engine import seeding
from engine.atomic import write_json
from engine.cohort.association import GeneticScore, estimate_score
from engine.cohort.tables import Table, require, rows
from engine.errors import CorruptRun, InputError, UsageError

SCHEMA = "engine.covariates/1"
_FEW = 12  # strata with fewer people take the density of everybody
_GRID = 161


@dataclass(frozen=True)
class Density:
    """A probability density on [low, high], linear between grid points; sampled by inversion."""

    low: float
    high: float
    cumulative: np.ndarray  # (grid,), from 0 to 1

    @classmethod
    def smooth(cls, values: np.ndarray, low: float, high: float, least_width: float) -> Density:
        """Mixture of normals truncated to the bounds, one per value, width by Silverman's rule and at least
        `least_width`.
        """
        width = least_width
        if len(values) > 1:
            width = max(width, 1.06 * float(np.std(values, ddof=1)) * len(values) ** -0.2)
        grid = np.linspace(low, high, _GRID)
        if len(values) == 0:
            return cls(low, high, (grid - low) / (high - low))
        below = stats.norm.cdf((grid[:, None] - values[None]) / width)
        share = (below - below[:1]) / (below[-1:] - below[:1])
        return cls(low, high, np.round(share.mean(axis=1), 8))  # as it is saved: a loaded model makes the same people

    def draw(self, uniform: np.ndarray) -> np.ndarray:
        """Values at the given probabilities."""
        return np.interp(uniform, self.cumulative, np.linspace(self.low, self.high, len(self.cumulative)))

    def to_json(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "cumulative": self.cumulative.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Density:
        return cls(value["low"], value["high"], np.array(value["cumulative"]))


@dataclass(frozen=True)
class CovariateModel:
    """Fitted model; make with `fit`, keep with `save`, get back with `load`."""

    groups: list[str]
    sexes: list[str]
    group_sex: np.ndarray  # (groups, sexes) joint probability
    age: dict[str, Density]  # by "group/sex"
    diagnoses: list[str]  # [reference, case]
    diagnosis_coefficients: dict[str, float]  # intercept, age_decade (from 70), sex and group contrasts, score
    score: GeneticScore | None
    second_visit: dict[str, float]  # by diagnosis
    interval: Density
    n: int

    def demographics(self, n: int, *, seed: int = 0, start: int = 0, groups: list[str] | None = None) -> Table:
        """subject, group, sex, age of people start..start+n-1; `groups` fixes the group of each (n labels).

        Raises:
            UsageError: a group the model does not know, or not n of them.
        """
        if groups is not None and (len(groups) != n or set(groups) - set(self.groups)):
            raise UsageError(f"{n} labels among {', '.join(self.groups)}", f"{len(groups)} labels", "groups")
        group, sex, age = [], [], []
        for i in range(n):
            u = seeding.generator(seed, "cohort.covariates", start + i).random(3)
            by_group = self.group_sex.sum(axis=1)
            g = self.groups.index(groups[i]) if groups is not None else _choose(by_group, u[0])
            s = _choose(self.group_sex[g] / by_group[g], u[1])
            group.append(self.groups[g])
            sex.append(self.sexes[s])
            age.append(float(self.age[f"{self.groups[g]}/{self.sexes[s]}"].draw(u[2])))
        return {
            "subject": np.array([f"SYN{start + i:09d}" for i in range(n)], dtype=object),
            "group": np.array(group, dtype=object),
            "sex": np.array(sex, dtype=object),
            "age": np.array(age, dtype=np.float64),
        }

    def probability(self, people: Table, score_n: np.ndarray | None = None) -> np.ndarray:
        """Probability of the case diagnosis for each person; `score_n` 0 (the train mean) where not given."""
        score = np.zeros(rows(people)) if score_n is None else np.asarray(score_n, dtype=np.float64)
        design, names = _design(people, self.groups, self.sexes, score)
        return expit(design @ np.array([self.diagnosis_coefficients[name] for name in names]))

    def complete(self, people: Table, dosage_nl: np.ndarray | None = None, *, seed: int = 0, start: int = 0) -> Table:
        """`people` (from `demographics`) with genetic_score, diagnosis, visits and interval_years.

        Args:
            dosage_nl: ALT counts of these people at all sites of the panel the model was fitted with; without it
                everybody gets the mean score, that is, the link from genotype to diagnosis is left out.
        """
        n = rows(people)
        score = self.score.of(dosage_nl) if self.score is not None and dosage_nl is not None else np.zeros(n)
        if len(score) != n:
            raise UsageError(f"dosages of {n} people", f"{len(score)}", "complete")
        u = np.array([seeding.generator(seed, "cohort.outcomes", start + i).random(3) for i in range(n)]).reshape(n, 3)
        case = u[:, 0] < self.probability(people, score)
        diagnosis = np.where(case, self.diagnoses[1], self.diagnoses[0]).astype(object)
        again = u[:, 1] < np.array([self.second_visit[d] for d in diagnosis], dtype=float)
        return {
            **people,
            "genetic_score": score,
            "diagnosis": diagnosis,
            "visits": 1 + again.astype(np.int64),
            "interval_years": np.where(again, self.interval.draw(u[:, 2]), 0.0),
        }

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        start: int = 0,
        genotypes: Callable[[list[str]], np.ndarray] | None = None,
    ) -> Table:
        """People start..start+n-1: demographics, then dosages (n, sites) from `genotypes(group labels)`, then the
        rest.
        """
        people = self.demographics(n, seed=seed, start=start)
        dosage = None if genotypes is None else genotypes([str(g) for g in people["group"]])
        return self.complete(people, dosage, seed=seed, start=start)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "n": self.n,
            "groups": self.groups,
            "sexes": self.sexes,
            "group_sex": self.group_sex.tolist(),
            "age": {name: density.to_json() for name, density in self.age.items()},
            "diagnoses": self.diagnoses,
            "diagnosis_coefficients": self.diagnosis_coefficients,
            "score": None if self.score is None else self.score.to_json(),
            "second_visit": self.second_visit,
            "interval": self.interval.to_json(),
        }

    def save(self, path: str | Path) -> None:
        """Write the model as JSON, whole or not at all."""
        write_json(path, self.to_json())


def load(path: str | Path) -> CovariateModel:
    """Read a saved model. Raises CorruptRun when it is not one, or of another schema."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["schema"] != SCHEMA:
            raise CorruptRun(f"schema {SCHEMA}", str(value["schema"]), path, "fit the model again")
        return CovariateModel(
            groups=value["groups"],
            sexes=value["sexes"],
            group_sex=np.array(value["group_sex"]),
            age={name: Density.from_json(d) for name, d in value["age"].items()},
            diagnoses=value["diagnoses"],
            diagnosis_coefficients=value["diagnosis_coefficients"],
            score=None if value["score"] is None else GeneticScore.from_json(value["score"]),
            second_visit=value["second_visit"],
            interval=Density.from_json(value["interval"]),
            n=value["n"],
        )
    except FileNotFoundError:
        raise InputError("a covariate model", "no such file", path) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptRun("a covariate model", repr(error), path, "fit the model again") from None


def fit(
    table: Table,
    dosage_nl: np.ndarray | None = None,
    site_ids: list[str] | None = None,
    *,
    diagnoses: tuple[str, str] = ("CN", "AD"),
    age_bounds: tuple[float, float] | None = None,
    loci: int = 3,
) -> CovariateModel:
    """Fit the model to the people of `table`; where it has a column `split`, to those with split "train" only.

    Args:
        table: one row per person: group, sex, age, diagnosis, visits (1 or 2), interval_years.
        dosage_nl: ALT counts (people of `table`, sites); without it there is no genetic score.
        site_ids: names of the sites.
        diagnoses: reference and case.
        age_bounds: no synthetic age lies outside; default: the range seen, widened to whole multiples of five years.
        loci: most lead sites in the genetic score.

    Raises:
        InputError: a column is absent, a value is missing or not allowed, or there are fewer than 10 people or only one
            diagnosis to learn from.
    """
    require(table, ("group", "sex", "age", "diagnosis", "visits", "interval_years"), "subjects table")
    keep = table["split"] == "train" if "split" in table else np.ones(rows(table), dtype=bool)
    table = {name: values[keep] for name, values in table.items()}
    n, age = rows(table), np.asarray(table["age"], dtype=np.float64)
    if n < 10 or not np.isfinite(age).all():
        raise InputError("10 people or more, each with an age", f"{n} people", "subjects table")
    if set(table["diagnosis"]) != set(diagnoses):
        raise InputError(
            f"diagnoses {diagnoses[0]} and {diagnoses[1]}, both present",
            ", ".join(sorted(set(table["diagnosis"]))),
            "subjects table",
        )
    if not np.isin(table["visits"], (1, 2)).all():
        raise InputError("visits of 1 or 2", str(np.unique(table["visits"])), "subjects table")
    groups, sexes = (sorted({str(v) for v in table[name]}) for name in ("group", "sex"))
    counts = np.array([[((table["group"] == g) & (table["sex"] == s)).sum() for s in sexes] for g in groups])
    low, high = age_bounds or (5 * np.floor(age.min() / 5), 5 * np.ceil(age.max() / 5))
    if age.min() < low or age.max() > high:
        raise InputError(f"ages within {low:g} to {high:g}", f"{age.min():.1f} to {age.max():.1f}", "subjects table")
    if low == high:
        low, high = low - 2.5, high + 2.5
    pooled = Density.smooth(age, float(low), float(high), 2.0)
    by_stratum = {}
    for g in groups:
        for s in sexes:
            values = age[(table["group"] == g) & (table["sex"] == s)]
            by_stratum[f"{g}/{s}"] = (
                pooled if len(values) < _FEW else Density.smooth(values, float(low), float(high), 2.0)
            )

    case = (table["diagnosis"] == diagnoses[1]).astype(np.float64)
    score, score_n = None, np.zeros(n)
    if dosage_nl is not None:
        dosage = np.asarray(dosage_nl)[keep]
        design, _ = _design(table, groups, sexes, None)
        score = estimate_score(dosage, case, design, site_ids or [str(i) for i in range(dosage.shape[1])], most=loci)
        score_n = score.of(dosage)
    coefficients = _logistic(table, groups, sexes, score_n, case)
    again = table["visits"] == 2
    second = {
        d: float((again & (table["diagnosis"] == d)).sum() + 1) / float((table["diagnosis"] == d).sum() + 2)
        for d in diagnoses
    }
    years = np.asarray(table["interval_years"], dtype=np.float64)[again]
    shortest, longest = (float(np.floor(years.min())), float(np.ceil(years.max()))) if len(years) else (1.0, 2.0)
    return CovariateModel(
        groups=groups,
        sexes=sexes,
        group_sex=(counts + 1) / (counts + 1).sum(),
        age=by_stratum,
        diagnoses=list(diagnoses),
        diagnosis_coefficients=coefficients,
        score=score,
        second_visit=second,
        interval=Density.smooth(years, shortest, max(longest, shortest + 1), 0.25),
        n=n,
    )


def _choose(probability: np.ndarray, uniform: float) -> int:
    return min(int(np.searchsorted(np.cumsum(probability), uniform, side="right")), len(probability) - 1)


def _design(
    people: Table, groups: list[str], sexes: list[str], score_n: np.ndarray | None
) -> tuple[np.ndarray, list[str]]:
    """Columns: intercept, age in decades from 70, sex and group contrasts against the first, and the genetic score."""
    columns = [np.ones(rows(people)), (np.asarray(people["age"], dtype=np.float64) - 70) / 10]
    names = ["intercept", "age_decade"]
    for kind, labels in (("sex", sexes), ("group", groups)):
        for label in labels[1:]:
            columns.append((people[kind] == label).astype(np.float64))
            names.append(f"{kind}={label}")
    if score_n is not None:
        columns.append(score_n)
        names.append("score")
    return np.stack(columns, axis=1), names


def _logistic(
    table: Table, groups: list[str], sexes: list[str], score_n: np.ndarray, case: np.ndarray
) -> dict[str, float]:
    """Coefficients with a weak L2 penalty (prior standard deviation about 3 on each; none on the intercept)."""
    from sklearn.linear_model import LogisticRegression

    design, names = _design(table, groups, sexes, score_n)
    model = LogisticRegression(C=10.0, max_iter=1000, tol=1e-8).fit(design[:, 1:], case)
    return {"intercept": float(model.intercept_[0]), **{n: float(b) for n, b in zip(names[1:], model.coef_[0])}}
