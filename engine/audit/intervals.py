"""Intervals, conformal p-values and error rates: the small statistics every other module of the audit stands on.

Everything here is a function of arrays and numbers and knows nothing of pools, policies or modalities. People, not
items, are the independent units: functions that count take weights, so that a person with four scans counts once.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from engine.errors import InputError
from engine.seeding import generator

_ROUNDING = 1e-9  # sums of person weights such as 1/3 are compared with this slack


def clopper_pearson(k: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Exact (conservative) interval of a binomial share.

    Args:
        k: successes, 0 <= k <= n; may be fractional where a person counts in parts (the beta quantiles extend).
        n: trials; n = 0 gives (0, 1).
        confidence: two-sided, e.g. 0.95.

    Source: Clopper and Pearson, Biometrika 26 (1934) 404-413, through the quantiles of the beta distribution.
    """
    if not 0 <= k <= n + _ROUNDING:
        raise ValueError(f"need 0 <= k <= n, got k={k}, n={n}")
    if n <= 0:
        return 0.0, 1.0
    tail, k = (1 - confidence) / 2, min(k, n)
    low = 0.0 if k <= 0 else float(stats.beta.ppf(tail, k, n - k + 1))
    high = 1.0 if k >= n else float(stats.beta.ppf(1 - tail, k + 1, n - k))
    return low, high


def benjamini_hochberg(p_n: NDArray[np.floating], q: float) -> NDArray[np.bool_]:
    """Which hypotheses are rejected at false-discovery rate `q`, bool (n,).

    Valid for conformal p-values that share one null sample, because these are positively dependent
    (Bates et al., Annals of Statistics 51 (2023) 149-178). Source: Benjamini and Hochberg, JRSS B 57 (1995) 289-300.
    """
    p_n = np.asarray(p_n, dtype=np.float64)
    n = len(p_n)
    if n == 0:
        return np.zeros(0, dtype=bool)
    ordered = np.sort(p_n)
    below = np.flatnonzero(ordered <= q * np.arange(1, n + 1) / n + 1e-15)
    return np.zeros(n, dtype=bool) if len(below) == 0 else p_n <= ordered[below[-1]]


def person_weights(person_n: NDArray) -> tuple[NDArray[np.float64], int]:
    """Weight 1/(items of that person) of every item, float64 (n,), and the number of people."""
    _, code_n, count_p = np.unique(np.asarray(person_n), return_inverse=True, return_counts=True)
    return 1.0 / count_p[code_n], len(count_p)


def people_needed(level: float) -> int:
    """Smallest number of people in the null for which a conformal p-value can reach `level`: ceil(1 / level) - 1."""
    return math.ceil(1 / level - _ROUNDING) - 1


def attainable_level(level: float, people: int) -> float:
    """Largest level <= `level` that a null of `people` people can give exactly: floor(level (P + 1)) / (P + 1)."""
    return math.floor(level * (people + 1) + _ROUNDING) / (people + 1)


def conformal_p(
    null_nc: NDArray[np.floating], tested_mc: NDArray[np.floating], weight_n: NDArray[np.floating] | None = None
) -> NDArray[np.float64]:
    """Conformal p-value of each tested item against a null; small values of a statistic are the suspicious ones.

    With one statistic, p = (1 + sum of w_h [x_h <= x_s]) / (P + 1), where the weights of one person's items sum to 1
    and
    P is the number of people: valid when people are exchangeable, whatever happens within a person.
    With several statistics, item s is put into the null, every item is ranked within each statistic, and the smallest of
    an item's ranks (on a tie the one with the smaller mean rank) is itself the statistic that is compared. That is a
    Bonferroni combination whose loss is given back, because the smallest rank is calibrated on the same null. Without
    the tie rule every rank would occur once per statistic, and the smallest p-values could not be reached.

    Args:
        null_nc: (n,) or (n, c) statistics of the null.
        tested_mc: (m,) or (m, c) statistics to be judged.
        weight_n: (n,) person weights; all 1 where None.

    Returns:
        float64 (m,), in [1 / (P + 1), 1].

    Source: Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World (2005); weights as in Lee, Barber and
    Willett, "Distribution-free inference with hierarchical data" (2023).
    """
    null_nc = np.asarray(null_nc, dtype=np.float64).reshape(len(null_nc), -1)
    tested_mc = np.asarray(tested_mc, dtype=np.float64).reshape(len(tested_mc), -1)
    weights: NDArray[np.float64] = np.ones(len(null_nc)) if weight_n is None else np.asarray(weight_n, dtype=np.float64)
    people = weights.sum()
    rank_null_nc = np.column_stack([_mass_up_to(column, weights, column) for column in null_nc.T])
    rank_tested_mc = 1 + np.column_stack(
        [_mass_up_to(null_nc[:, c], weights, tested_mc[:, c]) for c in range(null_nc.shape[1])]
    )
    p_m = np.empty(len(tested_mc))
    block = max(1, 4_000_000 // max(1, null_nc.size))
    for start in range(0, len(tested_mc), block):
        rows = slice(start, start + block)
        # rank of each null item once the tested item has joined: one more where the tested item lies at or below it
        joined_cbn = [rank_null_nc[:, c] + (tested_mc[rows, c, None] <= null_nc[:, c]) for c in range(null_nc.shape[1])]
        smallest_bn = np.minimum.reduce(joined_cbn) + sum(joined_cbn) / len(joined_cbn) / (2 * people + 2)
        own_b = rank_tested_mc[rows].min(axis=1) + rank_tested_mc[rows].mean(axis=1) / (2 * people + 2)
        p_m[rows] = (1 + (smallest_bn <= own_b[:, None] + _ROUNDING) @ weights) / (people + 1)
    return p_m


def _mass_up_to(
    value_n: NDArray[np.float64], weight_n: NDArray[np.float64], at_m: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Total weight of the values <= each point."""
    order = np.argsort(value_n, kind="stable")
    mass = np.concatenate([[0.0], np.cumsum(weight_n[order])])
    return mass[np.searchsorted(value_n[order], at_m, side="right")]


def excess_p(flagged: float, n: int, level: float, people: int) -> float:
    """Probability that at least `flagged` of `n` leak-free people are flagged at `level` by a null of `people` people.

    The threshold is an order statistic of the null, so its true false-positive rate is Beta(r, P + 1 - r) with
    r = floor(level (P + 1)), and the count is beta-binomial. A binomial test would treat the threshold as known and
    would raise false alarms whenever the null is small. Fractions of a person are rounded down.

    Returns 1.0 where r = 0 (nobody can be flagged at this level).
    """
    r = math.floor(level * (people + 1) + _ROUNDING)
    if r == 0 or n == 0:
        return 1.0
    return float(stats.betabinom.sf(math.floor(flagged + _ROUNDING) - 1, n, r, people + 1 - r))


def tpr_at_fpr(
    null_n: NDArray[np.floating], positive_m: NDArray[np.floating], level: float, people: int | None = None
) -> tuple[float, tuple[float, float]]:
    """Share of `positive_m` at or below the threshold that lets a share `level` of the null through, with its interval.

    Raises:
        InputError: the null holds fewer than `people_needed(level)` people; the figure would be an extrapolation.
    """
    people = len(null_n) if people is None else people
    if people < people_needed(level):
        raise InputError(
            f"at least {people_needed(level)} people in the null for a true-positive rate at {level:.1%}",
            str(people),
            hint="a larger holdout, or a higher false-positive rate",
        )
    found = int((conformal_p(null_n, positive_m) <= level + _ROUNDING).sum())
    return found / max(1, len(positive_m)), clopper_pearson(found, len(positive_m))


def roc(null_n: NDArray[np.floating], positive_m: NDArray[np.floating]) -> tuple[NDArray, NDArray, float]:
    """False-positive rates, true-positive rates and area under the curve; low values are positive, ties count half."""
    null_n, positive_m = np.sort(null_n), np.sort(positive_m)
    cut = np.unique(np.concatenate([null_n, positive_m]))
    fpr = np.concatenate([[0.0], np.searchsorted(null_n, cut, side="right") / len(null_n)])
    tpr = np.concatenate([[0.0], np.searchsorted(positive_m, cut, side="right") / len(positive_m)])
    return fpr, tpr, float(np.trapezoid(tpr, fpr))


def delong(positive_m: NDArray[np.floating], negative_n: NDArray[np.floating]) -> tuple[float, float, float]:
    """Area under the ROC (high values are positive, ties count half) and its 95 % interval: (area, low, high).

    The variance is that of the two sets of placement values. Where the sets are apart altogether it is zero; then the
    bound is that of as many agreeing pairs as the smaller set has members, (0.025)^(1 / n).
    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988) 837-845, equations 3 and 6; computed from ranks as in
    Sun and Xu, IEEE Signal Processing Letters 21 (2014).
    """
    positive_m, negative_n = np.asarray(positive_m, np.float64), np.asarray(negative_n, np.float64)
    m, n = len(positive_m), len(negative_n)
    rank = stats.rankdata(np.concatenate([positive_m, negative_n]))
    above_m = (rank[:m] - stats.rankdata(positive_m)) / n  # share of negatives below each positive
    below_n = 1 - (rank[m:] - stats.rankdata(negative_n)) / m
    area = float(above_m.mean())
    variance = (above_m.var(ddof=1) / m if m > 1 else 0.0) + (below_n.var(ddof=1) / n if n > 1 else 0.0)
    if variance <= 0 and area in (0.0, 1.0):
        bound = 0.025 ** (1 / min(m, n))
        return (area, bound, 1.0) if area == 1 else (area, 0.0, 1 - bound)
    error = 1.96 * math.sqrt(variance)
    return area, max(0.0, area - error), min(1.0, area + error)


def thin(fpr: NDArray[np.floating], tpr: NDArray[np.floating], most: int = 200) -> dict[str, list[float]]:
    """At most about `most` points of a ROC as JSON, evenly spaced in the logarithm, where small rates are read."""
    last = len(fpr) - 1
    wanted = np.concatenate([[0, last], np.geomspace(1, max(last, 1), most).round()]).astype(int)
    keep = np.unique(np.minimum(wanted, last))
    return {"fpr": np.asarray(fpr)[keep].round(6).tolist(), "tpr": np.asarray(tpr)[keep].round(6).tolist()}


def bootstrap_mean(
    value_n: NDArray[np.floating],
    *,
    person_n: NDArray | None = None,
    repeats: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean over people and its percentile bootstrap interval (mean, low, high); people are resampled, not items."""
    value_n = np.asarray(value_n, dtype=np.float64)
    if person_n is not None:
        _, code_n, count_p = np.unique(np.asarray(person_n), return_inverse=True, return_counts=True)
        value_n = np.bincount(code_n, weights=value_n) / count_p
    if len(value_n) == 0:
        return math.nan, math.nan, math.nan
    rng = generator(seed, "audit.bootstrap")
    means = np.array([value_n[rng.integers(0, len(value_n), len(value_n))].mean() for _ in range(repeats)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(value_n.mean()), float(low), float(high)
