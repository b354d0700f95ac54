"""From scores to findings: what the copy search saw in a set of rows, with intervals, thresholds and a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from engine.audit.copies import CopySearch, Null, Scores
from engine.audit.findings import Finding, Verdict
from engine.audit.intervals import (
    attainable_level,
    benjamini_hochberg,
    clopper_pearson,
    excess_p,
    people_needed,
    person_weights,
)
from engine.audit.policy import AuditPolicy
from engine.errors import InputError


@dataclass(frozen=True)
class Judgement:
    """Findings on one set of rows, its verdict, and the p-value of every row."""

    findings: list[Finding]
    verdict: Verdict
    p_n: NDArray[np.float64]


def gate_level(people: int, policy: AuditPolicy) -> float:
    """The level the gate uses: 1 % where the null has the people for it, else the strictest level it can reach.

    Raises:
        InputError: the null cannot reach even the loosest level of the policy.
    """
    usable = [level for level in policy.levels if people >= people_needed(level)]
    if not usable:
        loosest = max(policy.levels)
        raise InputError(
            f"at least {people_needed(loosest)} real people behind the null for a level of {loosest:.0%}",
            str(people),
            "audit holdout",
            "a larger holdout",
        )
    return min((level for level in usable if level >= 0.01 - 1e-12), default=max(usable))


def judge(search: CopySearch, null: Null, scores: Scores, p_n: NDArray[np.float64] | None = None) -> Judgement:
    """Exact copies, flagged share at every level the null can reach, and the pull towards training.

    Args:
        p_n: `null.p_values(scores)`, where it is known already.
    """
    policy = search.policy
    p_n = null.p_values(scores) if p_n is None else p_n
    findings = [_exact_copies(search, null, scores)]
    findings += [copy_share(null, p_n, scores.person_n, scores.group_n, level, policy) for level in policy.levels]
    findings.append(_discoveries(p_n, policy))
    findings.append(_nearer_train(search, scores))
    verdict: Verdict = "fail" if any(f.verdict == "fail" for f in findings) else "pass"
    return Judgement(findings, verdict, p_n)


def copy_share_name(level: float) -> str:
    """Name of the finding, e.g. "copy_share_at_1_percent" or "copy_share_at_0.1_percent"."""
    return f"copy_share_at_{level * 100:g}_percent"


def _exact_copies(search: CopySearch, null: Null, scores: Scores) -> Finding:
    """Rows that equal a training row, gated by how often unseen real rows do."""
    tolerance = search.duplicate_distance
    copies = int((scores.distance_train_n <= tolerance).sum())
    in_holdout = int((scores.distance_holdout_n <= tolerance).sum())
    natural = null.scores.distance_train_n <= tolerance
    weight, people = person_weights(scores.person_n)
    copied_people = float(weight[scores.distance_train_n <= tolerance].sum())
    natural_people = float(null.weight_n[natural].sum())
    # with no duplicate among real people, one copy is one too many; otherwise it takes more copies than chance gives
    chance = excess_p(copied_people, people, (natural_people + 1) / (null.people + 1), null.people)
    failed = copies > 0 and (chance < search.policy.alpha or (natural_people == 0 and in_holdout == 0))
    return Finding(
        name="exact_copies",
        value=float(copies),
        n=len(scores),
        threshold=0.0 if natural_people == 0 else None,
        floor=float(natural.sum()),
        calibrated_on=null.calibrated_on,
        direction="lower",
        verdict="fail" if failed else "pass",
        note=f"rows equal to a training row; of {len(natural)} real rows {int(natural.sum())} equal another person's",
        detail={"tolerance": tolerance, "equal_to_holdout": in_holdout, "p_value": chance},
    )


def copy_share(
    null: Null,
    p_n: NDArray[np.float64],
    person_n: NDArray,
    group_n: NDArray | None,
    level: float,
    policy: AuditPolicy,
) -> Finding:
    """Share of people flagged at `level`, against what an honest generator shows; each person counts once."""
    name = copy_share_name(level)
    weight, people = person_weights(person_n)
    if null.people < people_needed(level):
        need = people_needed(level)
        return Finding(
            name,
            float("nan"),
            n=people,
            unit="share",
            note=f"not given: needs {need} people in the null, has {null.people}",
            detail={"people_needed": need, "people_in_null": null.people},
        )
    flagged_n = p_n <= level + 1e-12
    flagged = float(weight[flagged_n].sum())
    interval = clopper_pearson(flagged, people)
    expected = attainable_level(level, null.people)
    chance = excess_p(flagged, people, level, null.people)
    allowed = _most_allowed(people, level, null.people, policy)
    by_group = {}
    if group_n is not None:
        for group in np.unique(group_n):
            inside = group_n == group
            group_weight, group_people = person_weights(person_n[inside])
            share = float(group_weight[flagged_n[inside]].sum())
            by_group[str(group)] = {
                "n": group_people,
                "share": share / group_people,
                "interval": list(clopper_pearson(share, group_people)),
            }
    return Finding(
        name=name,
        value=flagged / people,
        interval=interval,
        n=people,
        threshold=allowed / people,
        calibrated_on=f"{null.calibrated_on}, {null.people} people",
        direction="lower",
        verdict="fail" if np.floor(flagged + 1e-9) > allowed else "pass",
        unit="share",
        note=f"people nearer to training than all but {expected:.2%} of unseen real people, which is what chance gives",
        detail={"p_value": chance, "expected": expected, "flagged_rows": int(flagged_n.sum()), "by_group": by_group},
    )


def _most_allowed(people: int, level: float, null_people: int, policy: AuditPolicy) -> int:
    """Largest number of flagged people that passes: not surely above chance, or not surely above what is tolerated."""
    tested = sum(null_people >= people_needed(x) for x in policy.levels)
    limit = attainable_level(level, null_people) + policy.tolerated_excess
    return _largest_passing(people, level, null_people, policy.alpha / max(1, tested), limit)


@cache
def _largest_passing(people: int, level: float, null_people: int, alpha: float, limit: float) -> int:
    low, high = 0, people + 1  # `low` passes, `high` fails or is beyond the end; both conditions only tighten with k
    while high - low > 1:
        k = (low + high) // 2
        fails = excess_p(k, people, level, null_people) < alpha and clopper_pearson(k, people)[0] > limit
        low, high = (low, k) if fails else (k, high)
    return low


def _discoveries(p_n: NDArray[np.float64], policy: AuditPolicy) -> Finding:
    """Single rows convicted at the false-discovery rate."""
    found = benjamini_hochberg(p_n, policy.fdr)
    return Finding(
        name="convicted_rows",
        value=float(found.sum()),
        n=len(p_n),
        direction="lower",
        note=f"single rows convicted at a false-discovery rate of {policy.fdr:.0%}; a small null may convict none",
        detail={"smallest_p": float(p_n.min()) if len(p_n) else 1.0},
    )


def _nearer_train(search: CopySearch, scores: Scores) -> Finding:
    """Share of rows nearer to m training people than to m holdout people; one half for an honest generator.

    Whatever distribution the generator has, T and H are exchangeable to it if it has seen neither. The p-value relabels
    people at random over the nearest neighbours in all of T and H: exact, and right where a few people are the
    neighbour of many rows. The interval is the value plus and minus 1.96 deviations of the same relabelling at the
    matched subsets.
    """
    pull, policy, n = scores.pull, search.policy, len(scores)
    if pull is None:
        raise ValueError("scores of tested rows carry a pull; these are of a null")
    attracted = np.bincount(pull.train_person_n, weights=pull.to_train_n, minlength=search.codes)
    attracted += np.bincount(pull.holdout_person_n, weights=1 - pull.to_train_n, minlength=search.codes)
    observed = attracted[search.train_people].sum()
    relabelled = search.relabellings @ attracted
    chance = float((1 + (relabelled >= observed - 1e-9).sum()) / (len(relabelled) + 1))

    m = min(len(search.train_people), len(search.holdout_people))
    variances = []
    for person_n in pull.person_nr.T:
        counts = np.bincount(person_n, minlength=search.codes).astype(np.float64)
        spread = (counts**2).sum() - n**2 / (2 * m)  # over the 2m people of this pair of subsets; others attract nobody
        variances.append(m / 2 * spread / (2 * m - 1) / n**2)
    value, error = float(pull.to_train_nr.mean()), float(np.sqrt(np.mean(variances)))
    interval = (max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error))
    limit = 0.5 + policy.nearer_train_tolerance
    return Finding(
        name="nearer_train_share",
        value=value,
        interval=interval,
        n={"rows": n, "people_per_side": m},
        threshold=limit,
        calibrated_on="one half by symmetry, at equal pools; people relabelled at random",
        direction="lower",
        verdict="fail" if chance < policy.alpha and interval[0] > limit else "pass",
        unit="share",
        floor=0.5,
        note="rows nearer to training than to as many unseen people; fails where the whole interval lies above",
        detail={
            "p_value": chance,
            "share_whole_training_side": float(observed / n),
            "expected_whole_training_side": len(search.train_people) / search.codes,
        },
    )
