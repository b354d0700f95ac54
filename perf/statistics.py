"""Figures from repeated timings: spread, ratio pair by pair, interval of a median, exponent of a cost curve.

Needs NumPy only (the interval of an exponent SciPy as well). Which runs are paired, and what a figure means, is left to
the callers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SAME_WITHIN = (
    0.02  # two versions of one code whose medians differ by less are called the same, however sure the difference
)


def spread(values: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile (linear between values) and n, of at least one value."""
    low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), (0.2, 0.5, 0.8))
    return {"p20": float(low), "p50": float(middle), "p80": float(high), "n": len(values)}


def rates(work: float, seconds: Sequence[float]) -> dict[str, float]:
    """Spread of work / seconds; its p20 belongs to the slow runs."""
    return spread([work / s for s in seconds])


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Spread of theirs[i] / ours[i], run i of both lying side by side in time: above 1 says that ours is faster."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


def median_interval(values: Sequence[float], level: float = 0.99, draws: int = 4000) -> tuple[float, float]:
    """Percentile bootstrap interval of the median, from a fixed seed."""
    values_n = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(values_n), size=(draws, len(values_n)))
    medians = np.median(values_n[drawn], axis=1)
    low, high = np.quantile(medians, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def judge_ratio(ratios: Sequence[float], level: float = 0.99) -> tuple[str, float, float]:
    """("faster" | "slower" | "same", low, high) of the ratios base / head.

    "faster": the interval of the median lies above 1 and the median above 1 + SAME_WITHIN; "slower" likewise below.
    """
    low, high = median_interval(ratios, level)
    middle = float(np.median(ratios))
    if low > 1 and middle > 1 + SAME_WITHIN:
        return "faster", low, high
    if high < 1 and middle < 1 - SAME_WITHIN:
        return "slower", low, high
    return "same", low, high


@dataclass(frozen=True)
class Exponent:
    """cost ~ size ** value, with its 95 % interval and the number of sizes."""

    value: float
    low: float
    high: float
    points: int


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> Exponent:
    """Least squares of log cost on log size; the interval is Student's, so it is wide where the curve is not straight.

    Args:
        sizes: at least 3 different positive sizes.
        costs: positive cost at each, e.g. the median of its runs.
    """
    from scipy import stats

    fit = stats.linregress(np.log(np.asarray(sizes, dtype=np.float64)), np.log(np.asarray(costs, dtype=np.float64)))
    half = stats.t.ppf(0.975, len(sizes) - 2) * fit.stderr
    return Exponent(float(fit.slope), float(fit.slope - half), float(fit.slope + half), len(sizes))
