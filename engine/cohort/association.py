"""Which variants go with a binary outcome: logistic score tests over a panel, top independent loci, and a genetic
score.

The score test needs the null model only once and is then a few matrix products (Rao 1948; as in plink2 and SAIGE
without their corrections: with few cases prefer an exact method). Effects are one-step estimates U / V. Inputs are
plain arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import expit

from engine.errors import UsageError


def fit_logistic(design_nf: np.ndarray, outcome_n: np.ndarray, ridge: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """Logistic regression by Newton's method: coefficients (f,) and their covariance (f, f).

    The tiny ridge only keeps separated data finite; the covariance is the inverse information at the estimate.

    Raises:
        UsageError: the outcome is not made of zeros and ones.
    """
    x, y = np.asarray(design_nf, dtype=np.float64), np.asarray(outcome_n, dtype=np.float64)
    if not np.isin(y, (0, 1)).all():
        raise UsageError("an outcome of 0 and 1", f"{np.unique(y)[:5]}", "fit_logistic")
    beta = np.zeros(x.shape[1])
    penalty = ridge * np.eye(x.shape[1])
    for _ in range(50):
        p = expit(x @ beta)
        information = (x * (p * (1 - p))[:, None]).T @ x + penalty
        step = np.linalg.solve(information, x.T @ (y - p) - ridge * beta)
        beta += np.clip(step, -4, 4)
        if np.abs(step).max() < 1e-9:
            break
    p = expit(x @ beta)
    return beta, np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x + penalty)


@dataclass(frozen=True)
class ScoreTest:
    """Per site: one-step log odds per allele, its standard error, z and two-sided p; NaN where the site does not
    vary."""

    beta_l: np.ndarray
    se_l: np.ndarray
    z_l: np.ndarray
    p_l: np.ndarray


def score_test(dosage_nl: np.ndarray, outcome_n: np.ndarray, covariates_nf: np.ndarray) -> ScoreTest:
    """Logistic score test of every site, given covariates.

    Args:
        dosage_nl: (people, sites) ALT allele counts, no missing values.
        outcome_n: (people,) 0 or 1.
        covariates_nf: (people, f), with the intercept as a column of ones.
    """
    y, x = np.asarray(outcome_n, dtype=np.float64), np.asarray(covariates_nf, dtype=np.float64)
    beta, _ = fit_logistic(x, y)
    p = expit(x @ beta)
    w = p * (1 - p)
    g = np.asarray(dosage_nl, dtype=np.float64)
    u_l = g.T @ (y - p)
    cross_lf = g.T @ (x * w[:, None])
    solved = np.linalg.solve((x * w[:, None]).T @ x + 1e-9 * np.eye(x.shape[1]), cross_lf.T)
    v_l = (g**2).T @ w - np.einsum("lf,fl->l", cross_lf, solved)
    v_l = np.where(v_l > 1e-6, v_l, np.nan)
    z_l = u_l / np.sqrt(v_l)
    return ScoreTest(u_l / v_l, 1 / np.sqrt(v_l), z_l, 2 * stats.norm.sf(np.abs(z_l)))


def lead_sites(
    test: ScoreTest, dosage_nl: np.ndarray, *, most: int, alpha: float, clump_r2: float = 0.1
) -> tuple[np.ndarray, int]:
    """Sites by p-value, leaving out those in LD with a better one, up to `most`; how many of them pass alpha / sites.

    At least one site is returned where any site varies, significant or not: the caller shrinks its effect.
    """
    tested = int(np.isfinite(test.p_l).sum())
    centred = np.asarray(dosage_nl, dtype=np.float64) - np.mean(dosage_nl, axis=0)
    norm = np.linalg.norm(centred, axis=0)
    chosen: list[int] = []
    for site in np.argsort(np.where(np.isfinite(test.p_l), test.p_l, np.inf), kind="stable")[:tested]:
        r2 = [(centred[:, site] @ centred[:, other] / (norm[site] * norm[other])) ** 2 for other in chosen]
        if all(value < clump_r2 for value in r2):
            chosen.append(int(site))
        if len(chosen) == most:
            break
    index = np.array(chosen, dtype=np.int64)
    return index, int((test.p_l[index] < alpha / max(tested, 1)).sum())


@dataclass(frozen=True)
class GeneticScore:
    """A weighted count of ALT alleles at named sites, centred on the people it was estimated from."""

    ids: list[str]
    site: np.ndarray
    weight: np.ndarray
    centre: float
    significant: int

    def of(self, dosage_nl: np.ndarray) -> np.ndarray:
        """Score (people,) from dosages (people, all sites of the panel)."""
        return np.asarray(dosage_nl)[:, self.site].astype(np.float64) @ self.weight - self.centre

    def to_json(self) -> dict[str, Any]:
        return {
            "ids": self.ids,
            "site": [int(s) for s in self.site],
            "weight": [float(w) for w in self.weight],
            "centre": self.centre,
            "significant": self.significant,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> GeneticScore:
        return cls(
            value["ids"],
            np.array(value["site"], dtype=np.int64),
            np.array(value["weight"]),
            value["centre"],
            value["significant"],
        )


def estimate_score(
    dosage_nl: np.ndarray,
    outcome_n: np.ndarray,
    covariates_nf: np.ndarray,
    ids: list[str],
    *,
    most: int = 3,
    alpha: float = 0.05,
) -> GeneticScore:
    """Genetic score from an association scan: the Bonferroni-significant lead sites, or the best one where none is.

    Weights are shrunk one-step effects, beta * max(0, 1 - 1 / z^2) (the positive-part James-Stein factor), because the
    best of many is too large on average; the regression that uses the score estimates its scale anyway.
    """
    test = score_test(dosage_nl, outcome_n, covariates_nf)
    site, significant = lead_sites(test, dosage_nl, most=most, alpha=alpha)
    site = site[: max(1, significant)]
    weight = test.beta_l[site] * np.maximum(0.0, 1 - 1 / test.z_l[site] ** 2)
    centre = float((np.asarray(dosage_nl)[:, site].astype(np.float64) @ weight).mean()) if len(site) else 0.0
    return GeneticScore([ids[s] for s in site], site, weight, centre, significant)
