import numpy as np
import pytest

from perf import statistics


def test_spread_is_of_the_runs_and_a_ratio_is_taken_pair_by_pair():
    assert statistics.spread([3.0]) == {"p20": 3.0, "p50": 3.0, "p80": 3.0, "n": 1}
    assert statistics.spread([5, 1, 2, 4, 3, 6]) == {"p20": 2.0, "p50": 3.5, "p80": 5.0, "n": 6}
    # the machine slows to half its speed for two rounds: both contestants do, the ratio does not move
    ours, theirs = [1.0, 2.0, 2.0, 1.0, 1.0], [4.0, 8.0, 8.0, 4.0, 4.0]
    assert statistics.paired_ratio(theirs, ours) == {"p20": 4.0, "p50": 4.0, "p80": 4.0, "n": 5}
    assert statistics.rates(10.0, [2.0, 5.0, 2.0])["p50"] == 5.0
    with pytest.raises(ValueError):
        statistics.paired_ratio([1.0], [1.0, 2.0])


def test_judgement_covers_the_truth_and_calls_equals_equal():
    rng = np.random.default_rng(1)
    verdicts = {1.0: [], 0.8: [], 1.25: []}
    covered = 0
    for true in verdicts:
        for _ in range(60):
            ratios = true * np.exp(0.05 * rng.standard_normal(15))
            verdict, low, high = statistics.judge_ratio(ratios.tolist())
            verdicts[true].append(verdict)
            covered += low <= true <= high
    assert covered / 180 > 0.95
    assert verdicts[1.0].count("same") >= 58
    assert verdicts[0.8].count("slower") == 60
    assert verdicts[1.25].count("faster") == 60


def test_a_sure_but_tiny_difference_is_the_same():
    assert statistics.judge_ratio([1.01] * 20)[0] == "same"
    assert statistics.judge_ratio([1.03] * 20)[0] == "faster"


@pytest.mark.parametrize("true", [0.0, 1.0, 1.7, 3.0])
def test_exponent_is_recovered_with_its_interval(true):
    rng = np.random.default_rng(2)
    sizes = np.array([100, 200, 400, 800, 1600, 3200])
    inside = 0
    for _ in range(60):
        fit = statistics.fit_exponent(sizes, 3e-6 * sizes**true * np.exp(0.05 * rng.standard_normal(6)))
        inside += fit.low <= true <= fit.high
        assert abs(fit.value - true) < 0.15
    assert 0.85 < inside / 60 <= 1.0
    assert fit.points == 6


def test_a_bent_curve_has_a_wide_interval():
    sizes = np.array([1.0, 10.0, 100.0, 1000.0])
    straight = statistics.fit_exponent(sizes, 2 * sizes)
    bent = statistics.fit_exponent(sizes, 100 + 2 * sizes)
    assert straight.value == pytest.approx(1)
    assert straight.high - straight.low < 1e-6
    assert bent.high - bent.low > 0.5
