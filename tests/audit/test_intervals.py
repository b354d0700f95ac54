"""Small statistics against SciPy, scikit-learn and cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from engine.audit import intervals
from engine.errors import InputError


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (1, 1000), (57, 201)])
def test_clopper_pearson_agrees_with_scipy(k, n):
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="exact")
    assert intervals.clopper_pearson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_clopper_pearson_edges():
    assert intervals.clopper_pearson(0, 0) == (0.0, 1.0)
    low, high = intervals.clopper_pearson(2.5, 10)  # a person who counts in parts lies between the whole counts
    assert intervals.clopper_pearson(2, 10)[0] < low < intervals.clopper_pearson(3, 10)[0]
    assert high < intervals.clopper_pearson(3, 10)[1]
    with pytest.raises(ValueError, match="0 <= k <= n"):
        intervals.clopper_pearson(4, 3)


def test_benjamini_hochberg_agrees_with_scipy():
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.random(80), rng.random(20) * 1e-3])
    expected = stats.false_discovery_control(p, method="bh") <= 0.05
    assert expected.sum() > 10
    assert (intervals.benjamini_hochberg(p, 0.05) == expected).all()
    assert not intervals.benjamini_hochberg(np.array([0.9, 0.5]), 0.05).any()
    assert intervals.benjamini_hochberg(np.array([]), 0.05).shape == (0,)


def test_conformal_p_by_hand():
    null = np.array([1.0, 2.0, 3.0, 4.0])
    assert intervals.conformal_p(null, np.array([0.5, 1.0, 2.5, 9.0])) == pytest.approx([0.2, 0.4, 0.6, 1.0])


def test_a_person_counts_once():
    weight, people = intervals.person_weights(np.array(["a", "a", "b", "a"]))
    assert people == 2
    assert weight == pytest.approx([1 / 3, 1 / 3, 1, 1 / 3])
    # the three rows of person a lie below, together they are one of two people
    p = intervals.conformal_p(np.array([0.0, 0.0, 5.0, 0.0]), np.array([1.0, -1.0, 6.0]), weight)
    assert p == pytest.approx([2 / 3, 1 / 3, 1.0])


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_conformal_p_is_valid_when_everything_is_alike(columns):
    """With exchangeable rows, P(p <= a) is at most a for every a, and with one statistic it is exactly the step."""
    rng = np.random.default_rng(columns)
    shared = rng.standard_normal((4000, 50, 1))
    values = shared + rng.standard_normal((4000, 50, columns))  # statistics of one row depend on each other
    p = np.array([intervals.conformal_p(v[1:], v[:1])[0] for v in values])
    for level in (0.02, 0.1, 0.3):
        share = (p <= level + 1e-9).mean()
        error = 3 * np.sqrt(level * (1 - level) / len(p))
        assert share <= level + error
        assert share >= (level - error if columns == 1 else 0.4 * level)


def test_several_statistics_see_what_one_alone_shows():
    rng = np.random.default_rng(1)
    null = rng.standard_normal((500, 2))
    p = intervals.conformal_p(null, np.array([[0.0, -9.0], [-9.0, 0.0], [0.0, 0.0]]))
    assert p[0] < 0.005
    assert p[1] < 0.005
    assert p[2] > 0.2


def test_excess_p_is_the_chance_of_that_many_flags():
    rng = np.random.default_rng(2)
    people, n, level = 99, 60, 0.05
    counts = []
    for _ in range(4000):
        null, tested = rng.random(people), rng.random(n)
        counts.append((intervals.conformal_p(null, tested) <= level + 1e-12).sum())
    for k in (3, 6, 9):
        assert intervals.excess_p(k, n, level, people) == pytest.approx((np.array(counts) >= k).mean(), abs=0.02)
    assert stats.binom.sf(8, n, level) < 0.5 * intervals.excess_p(
        9, n, level, people
    )  # a binomial would be overconfident
    assert intervals.excess_p(5, n, 0.001, people) == 1.0


def test_levels_and_people():
    assert intervals.people_needed(0.01) == 99
    assert intervals.people_needed(0.001) == 999
    assert intervals.attainable_level(0.01, 98) == 0.0
    assert intervals.attainable_level(0.01, 99) == pytest.approx(0.01)
    assert intervals.attainable_level(0.01, 150) == pytest.approx(1 / 151)


def test_tpr_at_fpr_is_refused_below_the_n_it_needs():
    rng = np.random.default_rng(3)
    null, positive = rng.standard_normal(500), rng.standard_normal(200) - 3
    share, (low, high) = intervals.tpr_at_fpr(null, positive, 0.01)
    assert low < share < high
    assert share == pytest.approx(stats.norm.cdf(stats.norm.ppf(0.01) + 3), abs=0.15)
    with pytest.raises(InputError, match="at least 999 people"):
        intervals.tpr_at_fpr(null, positive, 0.001)


def test_roc_area_agrees_with_scikit_learn():
    rng = np.random.default_rng(4)
    null, positive = rng.integers(0, 20, 150).astype(float), rng.integers(0, 14, 90).astype(float)
    fpr, tpr, area = intervals.roc(null, positive)
    labels = np.r_[np.zeros(150), np.ones(90)]
    assert area == pytest.approx(roc_auc_score(labels, -np.r_[null, positive]))
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()


def test_bootstrap_resamples_people():
    rng = np.random.default_rng(5)
    per_person = rng.standard_normal(60)
    value, person = np.repeat(per_person, 5), np.repeat(np.arange(60), 5)
    mean, low, high = intervals.bootstrap_mean(value, person_n=person)
    error = per_person.std(ddof=1) / np.sqrt(60)
    assert mean == pytest.approx(per_person.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    naive = intervals.bootstrap_mean(value)
    assert (naive[2] - naive[1]) < 0.6 * (high - low)
