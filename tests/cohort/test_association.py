from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from engine.cohort.association import estimate_score, fit_logistic, lead_sites, score_test

N, L, CAUSAL = 3000, 400, 123


@pytest.fixture(scope="module")
def study() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(8))
    dosage = rng.binomial(2, rng.uniform(0.1, 0.5, L), size=(N, L))
    dosage[:, 200] = np.where(rng.random(N) < 0.9, dosage[:, CAUSAL], dosage[:, 200])  # in LD with the causal one
    dosage[:, 300] = 0  # does not vary
    covariates = np.column_stack([np.ones(N), rng.standard_normal(N)])
    outcome = rng.random(N) < expit(-1 + 0.5 * covariates[:, 1] + 0.4 * dosage[:, CAUSAL])
    return dosage, outcome.astype(float), covariates


def test_logistic_regression_agrees_with_scikit_learn(study: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    dosage, outcome, covariates = study
    design = np.column_stack([covariates, dosage[:, CAUSAL]])
    beta, _ = fit_logistic(design, outcome)
    peer = LogisticRegression(C=1e8, tol=1e-10, max_iter=1000).fit(design[:, 1:], outcome)
    assert beta == pytest.approx([*peer.intercept_, *peer.coef_[0]], abs=1e-4)


def test_score_test_finds_the_locus_and_is_calibrated_elsewhere(
    study: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    dosage, outcome, covariates = study
    test = score_test(dosage, outcome, covariates)
    assert int(np.nanargmin(test.p_l)) == CAUSAL
    beta, covariance = fit_logistic(np.column_stack([covariates, dosage[:, CAUSAL]]), outcome)
    assert test.beta_l[CAUSAL] == pytest.approx(beta[2], abs=0.05)
    assert test.se_l[CAUSAL] == pytest.approx(np.sqrt(covariance[2, 2]), rel=0.1)
    others = np.setdiff1d(np.arange(L), [CAUSAL, 200, 300])
    assert stats.kstest(test.p_l[others], "uniform").pvalue > 1e-3
    assert np.isnan(test.p_l[300])


def test_lead_sites_leave_out_the_shadow_of_the_first(study: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    dosage, outcome, covariates = study
    site, significant = lead_sites(score_test(dosage, outcome, covariates), dosage, most=5, alpha=0.05)
    assert site[0] == CAUSAL
    assert 200 not in site
    assert significant == 1


def test_score_is_centred_shrunk_and_survives_json(study: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    dosage, outcome, covariates = study
    score = estimate_score(dosage, outcome, covariates, [f"rs{i}" for i in range(L)])
    assert score.ids == ["rs123"]
    assert 0 < score.weight[0] < score_test(dosage, outcome, covariates).beta_l[CAUSAL]
    assert abs(score.of(dosage).mean()) < 1e-9
    assert np.array_equal(type(score).from_json(score.to_json()).of(dosage), score.of(dosage))
