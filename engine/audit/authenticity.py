"""How synthetic rows lie among real ones: authenticity, the data-copying test C_T, and precision, recall, density and
coverage. All of it describes; none of it is a gate, because a generator that favours the crowded middle of a population
moves every one of these without having copied anybody.

Every figure stands beside its floor: unseen real rows in place of the synthetic ones, in the same number, against the
same training rows. Real rows that are better than the floor are as suspicious as ones that are worse. Intervals are
bootstraps over people, with the training side held fixed. Rows of one person are never each other's neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from engine.audit.findings import Finding
from engine.audit.intervals import bootstrap_mean
from engine.audit.policy import AuditPolicy
from engine.audit.pools import Pool, check_alike, topk
from engine.seeding import generator

PRDC = ("precision", "recall", "density", "coverage")
_LEAST_IN_CELL = 10  # rows of each side, for the normal approximation of a rank sum
_LEAST_IN_GROUP = 10  # people; figures of fewer say more about them than about the generator
_RESAMPLED = 500
_NOTES = {
    "authenticity": "rows further from their nearest training row than that row is from the next person; low is copying",
    "c_t": "are synthetic rows nearer to training than unseen ones, cell by cell? below -3 is copying, above 3 is misfit",
    "precision": "synthetic rows inside the neighbourhood of a training row",
    "recall": "training rows inside the neighbourhood of a synthetic row",
    "density": "training neighbourhoods that a synthetic row lies in, over the number of neighbours",
    "coverage": "training rows whose neighbourhood holds a synthetic row",
}


def fidelity(
    train: Pool, holdout: Pool, synthetic: Pool, *, policy: AuditPolicy, seed: int = 0
) -> tuple[list[Finding], dict[str, Any]]:
    """The six findings with floors and, where rows carry groups, `detail["by_group"]`; and the figure "prdc".

    PRDC is measured at equal numbers of rows on all sides (at most `policy.aats_rows`), the others against all of
    training.
    """
    check_alike(train, holdout, synthetic)
    train, holdout, synthetic = (
        replace(pool, views=None) for pool in (train, holdout, synthetic)
    )  # views are for copies
    findings = [_authenticity(train, holdout, synthetic, seed), _copying(train, holdout, synthetic, policy, seed)]
    n = min(len(train), len(holdout), len(synthetic), policy.aats_rows)
    k = policy.prdc_neighbours
    if n <= k + 1:
        missing = f"not given: needs more than {k + 1} rows on every side"
        return [*findings, *(Finding(name, math.nan, note=missing) for name in PRDC)], {}
    real, fresh, made = (_draw(pool, n, seed) for pool in (train, holdout, synthetic))
    tested, floor = prdc_rows(real, made, k), prdc_rows(real, fresh, k)
    for name in PRDC:
        ours = made if name in ("precision", "density") else real
        theirs = fresh if name in ("precision", "density") else real
        findings.append(_mean_finding(name, tested[name], ours, floor[name], theirs, seed, f"{n} rows on every side"))
    shown = findings[-len(PRDC) :]
    figure = {
        "names": list(PRDC),
        "synthetic": [round(f.value, 6) for f in shown],
        "interval": [None if f.interval is None else [round(x, 6) for x in f.interval] for f in shown],
        "floor": [None if f.floor is None else round(f.floor, 6) for f in shown],
        "neighbours": k,
        "rows": n,
    }
    return findings, figure


def authentic_rows(train: Pool, tested: Pool) -> NDArray[np.bool_]:
    """Whether each tested row is authentic: its nearest training row r lies further from it than from the next
    training person. bool (n,).

    The distance between real rows is that of r, the *training* row found; indexing it by synthetic rows, as one public
    implementation does, compares unrelated pairs. Source: Alaa et al., ICML 2022, section 4.3 (strict comparison).
    """
    distance, index = topk(tested, train, 1)
    found, back = np.unique(index[:, 0], return_inverse=True)
    _, code = np.unique(train.person, return_inverse=True)
    next_person, _ = topk(train.select(found), train, 1, exclude=(code[found], code))
    return np.asarray(next_person[back, 0] < distance[:, 0])


def copying_test(
    train_n: NDArray[np.floating], cell_n: NDArray, test_m: NDArray[np.floating], cell_m: NDArray
) -> tuple[float, int]:
    """C_T of distances to training: mean over cells of the rank-sum z, weighted by unseen rows; and the cells used.

    Args:
        train_n, cell_n: of the tested (synthetic) rows: distance to the nearest training row, and the cell.
        test_m, cell_m: of the unseen real rows.

    Negative: tested rows are nearer to training than unseen ones. NaN where no cell holds 10 rows of each side.
    Source: Meehan, Chaudhuri and Dasgupta, AISTATS 2020, equations 1 to 3.
    """
    total, weight, used = 0.0, 0, 0
    for cell in np.unique(cell_m):
        ours, theirs = np.asarray(train_n)[cell_n == cell], np.asarray(test_m)[cell_m == cell]
        if min(len(ours), len(theirs)) < _LEAST_IN_CELL:
            continue
        total, weight, used = total + len(theirs) * rank_sum_z(ours, theirs), weight + len(theirs), used + 1
    return (total / weight if weight else math.nan), used


def rank_sum_z(x_m: NDArray[np.floating], y_n: NDArray[np.floating]) -> float:
    """Standardised Mann-Whitney U of x over y, with the variance corrected for ties; 0 where all values are equal."""
    m, n = len(x_m), len(y_n)
    rank = stats.rankdata(np.concatenate([x_m, y_n]))
    u = rank[:m].sum() - m * (m + 1) / 2
    _, ties = np.unique(rank, return_counts=True)
    size = m + n
    variance = m * n / 12 * (size + 1 - (ties**3 - ties).sum() / (size * (size - 1)))
    return 0.0 if variance <= 0 else float((u - m * n / 2) / math.sqrt(variance))


def prdc_rows(real: Pool, fake: Pool, k: int) -> dict[str, NDArray[np.float64]]:
    """Precision and density of every fake row, recall and coverage of every real row; their means are the metrics.

    Source: Naeem et al., ICML 2020 (precision and recall as in Kynkaanniemi et al., NeurIPS 2019), strict comparisons.
    """
    radius_n, radius_m = _radius(real, k), _radius(fake, k)
    between_nm = _cross(real, fake)
    inside_real_nm, inside_fake_nm = between_nm < radius_n[:, None], between_nm < radius_m[None]
    return {
        "precision": inside_real_nm.any(axis=0).astype(np.float64),
        "recall": inside_fake_nm.any(axis=1).astype(np.float64),
        "density": inside_real_nm.sum(axis=0) / k,
        "coverage": inside_real_nm.any(axis=1).astype(np.float64),
    }


# ------------------------------------------------------------------------------------------------------------ parts


def _cross(a: Pool, b: Pool) -> NDArray[np.float64]:
    """Distance of every pair; squared for features, which orders pairs alike."""
    from engine.kernels.nearest import hamming_cross

    if a.kind == "bits":
        return np.asarray(hamming_cross(a.data, b.data), dtype=np.float64)
    middle = b.data.mean(axis=0, dtype=np.float64)  # smaller norms, less cancellation
    x, y = a.data - middle, b.data - middle
    return np.maximum((x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None] - 2 * (x @ y.T), 0.0)


def _radius(pool: Pool, k: int) -> NDArray[np.float64]:
    """Distance of every row to its k-th nearest row of another person (squared for features)."""
    between = _cross(pool, pool)
    between[pool.person[:, None] == pool.person[None]] = np.inf
    return np.partition(between, k - 1, axis=1)[:, k - 1]


def _draw(pool: Pool, n: int, seed: int) -> Pool:
    if len(pool) == n:
        return pool
    return pool.select(np.sort(generator(seed, "audit.prdc").choice(len(pool), n, replace=False)))


def _mean_finding(
    name: str,
    value_n: NDArray[np.float64],
    rows: Pool,
    floor_m: NDArray[np.float64],
    floor_rows: Pool,
    seed: int,
    calibrated_on: str,
) -> Finding:
    """Mean over people with its bootstrap, the floor beside it, and both by group."""

    def mean(value: NDArray, pool: Pool) -> tuple[float, float, float]:
        return bootstrap_mean(value, person_n=pool.person, repeats=_RESAMPLED, seed=seed)

    value, low, high = mean(value_n, rows)
    by_group: dict[str, Any] = {}
    for group in _groups(rows):
        inside = rows.group == group
        part, floor = rows.select(np.flatnonzero(inside)), None
        if floor_rows.group is not None and group in _groups(floor_rows):
            there = floor_rows.group == group
            floor = mean(floor_m[there], floor_rows.select(np.flatnonzero(there)))[0]
        one, *bounds = mean(value_n[inside], part)
        by_group[group] = {"n": part.people, "value": one, "interval": bounds, "floor": floor}
    return Finding(
        name,
        value,
        (low, high),
        rows.people,
        calibrated_on=f"holdout against training, {calibrated_on}",
        direction="target",
        unit="" if name == "density" else "share",
        floor=mean(floor_m, floor_rows)[0],
        note=_NOTES[name],
        detail={"by_group": by_group} if by_group else {},
    )


def _groups(pool: Pool) -> list[str]:
    """Groups with enough people to be spoken of."""
    if pool.group is None:
        return []
    known = np.unique(pool.group)
    return [str(g) for g in known if len(np.unique(pool.person[pool.group == g])) >= _LEAST_IN_GROUP]


def _authenticity(train: Pool, holdout: Pool, synthetic: Pool, seed: int) -> Finding:
    if train.people < 3:
        return Finding("authenticity", math.nan, note="not given: needs 3 training people")
    ours, floor = (authentic_rows(train, rows).astype(np.float64) for rows in (synthetic, holdout))
    return _mean_finding("authenticity", ours, synthetic, floor, holdout, seed, "all training rows")


def _copying(train: Pool, holdout: Pool, synthetic: Pool, policy: AuditPolicy, seed: int) -> Finding:
    """C_T with one row of every person, so that rows are independent; the floor is one half of the unseen people
    against the other.
    """
    rng = generator(seed, "audit.c_t")
    theirs, ours = _one_row_each(holdout, rng), _one_row_each(synthetic, rng)
    seeds = train.select(_spread(train, min(policy.cells, len(train)), rng))
    place: Callable[[Pool], tuple[NDArray, NDArray]] = lambda rows: (  # noqa: E731
        topk(rows, train, 1)[0][:, 0],
        topk(rows, seeds, 1)[1][:, 0],
    )
    (test_m, cell_m), (made_n, cell_n) = place(theirs), place(ours)
    value, used = copying_test(made_n, cell_n, test_m, cell_m)
    n = {"synthetic": len(ours), "unseen": len(theirs)}
    if not used:
        return Finding("c_t", math.nan, n=n, note=f"not given: no cell holds {_LEAST_IN_CELL} rows of each side")

    def bounds(inside_n: NDArray, inside_m: NDArray) -> list[float]:
        drawn = []
        for _ in range(_RESAMPLED // 2):
            a, b = rng.choice(inside_n, len(inside_n)), rng.choice(inside_m, len(inside_m))
            drawn.append(copying_test(made_n[a], cell_n[a], test_m[b], cell_m[b])[0])
        known = np.array(drawn)[~np.isnan(drawn)]
        return [float(x) for x in np.quantile(known, [0.025, 0.975])] if len(known) else [math.nan, math.nan]

    half = rng.permutation(len(theirs)) < len(theirs) // 2
    floor, _ = copying_test(test_m[half], cell_m[half], test_m[~half], cell_m[~half])
    by_group = {}
    for group in _groups(ours):
        here_n = np.flatnonzero(ours.group == group)
        here_m = np.flatnonzero(theirs.group == group) if theirs.group is not None else np.arange(0)
        one, cells = copying_test(made_n[here_n], cell_n[here_n], test_m[here_m], cell_m[here_m])
        if cells:
            by_group[group] = {"n": len(here_n), "value": one, "interval": bounds(here_n, here_m), "cells": cells}
    low, high = bounds(np.arange(len(ours)), np.arange(len(theirs)))
    return Finding(
        "c_t",
        value,
        (low, high),
        n,
        calibrated_on="holdout against holdout, distances to all training rows",
        direction="target",
        floor=None if math.isnan(floor) else floor,
        note=_NOTES["c_t"],
        detail={"cells": used, **({"by_group": by_group} if by_group else {})},
    )


def _one_row_each(pool: Pool, rng: np.random.Generator) -> Pool:
    order = rng.permutation(len(pool))
    _, first = np.unique(pool.person[order], return_index=True)
    return pool.select(np.sort(order[first]))


def _spread(pool: Pool, k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of `k` rows far from each other, the centres of the cells: each is drawn with a chance proportional to its
    squared distance from those before (Arthur and Vassilvitskii, k-means++, SODA 2007). Fewer where rows are equal.
    """
    chosen = [int(rng.integers(len(pool)))]
    nearest = topk(pool, pool.select(np.array(chosen)), 1)[0][:, 0]
    while len(chosen) < k and nearest.max() > 0:
        weight = nearest**2 / (nearest**2).sum()
        chosen.append(int(rng.choice(len(pool), p=weight)))
        nearest = np.minimum(nearest, topk(pool, pool.select(np.array(chosen[-1:])), 1)[0][:, 0])
    return np.array(chosen, dtype=np.int64)
