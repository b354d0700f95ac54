"""Membership inference: can one tell from the outside who was in training?

Members are training people, non-members are unseen real people, and a person has one score, higher for "was in
training". Whoever made the score, it is judged alike: ROC, area under it with DeLong's interval, and the true-positive
rate where 1 % and 0.1 % of the non-members are let through. The threshold comes from the non-members themselves; no
shadow model is trained.

Two attacks need the synthetic rows only: the distance to the nearest one, and the local density under the synthetic
rows against that under real rows (van Breugel et al., DOMIAS, AISTATS 2023). The density is that of the nearest
neighbour, f = 1 / (n c d^D): with more neighbours it is steadier and sees less of a single near copy. The real rows are
those of the other training people: whatever has learned what the training side has in common is near to people of its
kind, whoever they are, and where few people are held out the split alone puts more of one kind on one side. What is left
over is what a person's own rows did.
Attacks that need the model (likelihood ratio, reconstruction loss) are made by the modality that has the model and
judged here through `membership`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from engine.audit.copies import local_scale, log_distances
from engine.audit.findings import Finding
from engine.audit.intervals import clopper_pearson, delong, excess_p, people_needed, roc, thin
from engine.audit.policy import AuditPolicy
from engine.audit.pools import Pool, topk
from engine.errors import InputError
from engine.seeding import generator

LEVELS = (0.01, 0.001)  # false-positive rates at which true-positive rates are given
_LEAST = 10  # people on each side for an area


def membership(
    member_n: NDArray[np.floating],
    nonmember_m: NDArray[np.floating],
    *,
    policy: AuditPolicy,
    name: str = "model",
    gates: int = 1,
    calibrated_on: str = "non-members",
    note: str = "",
) -> tuple[list[Finding], dict[str, Any]]:
    """Findings on one attack, and its ROC.

    Args:
        member_n, nonmember_m: one finite score per person, higher is more member-like (`per_person` makes them).
        name: of the attack; the findings are membership_auc_NAME, membership_tpr_at_1_percent_NAME and _at_0.1_.
        gates: attacks judged together, among which `policy.alpha` is shared.

    Returns:
        findings, and {"fpr", "tpr", "auc"}, thinned evenly in the logarithm.

    Raises:
        InputError: a score is not finite.
    """
    member: NDArray[np.float64] = np.asarray(member_n, dtype=np.float64)
    nonmember: NDArray[np.float64] = np.asarray(nonmember_m, dtype=np.float64)
    for side, score in (("members", member), ("non-members", nonmember)):
        if score.ndim != 1 or not np.isfinite(score).all():
            raise InputError(
                "one finite score per person", f"shape {score.shape}, or NaN or infinity", f"{side}, {name}"
            )
    n = {"members": len(member), "non_members": len(nonmember)}
    findings = [_area(member, nonmember, n, policy, name, gates, calibrated_on, note)]
    findings += [_tpr(member, nonmember, n, level, policy, name, gates, calibrated_on) for level in LEVELS]
    if min(n.values()) == 0:
        return findings, {"fpr": [0.0, 1.0], "tpr": [0.0, 1.0], "auc": 0.5}
    fpr, tpr, area = roc(-nonmember, -member)
    return findings, {**thin(fpr, tpr), "auc": round(area, 6)}


def per_person(score_n: NDArray[np.floating], person_n: NDArray, largest: bool) -> NDArray[np.float64]:
    """One score per person (sorted by id): the largest of a person's rows, or their mean.

    The largest sees that one of two haplotypes was copied, but grows with the number of rows: only for people who all
    have equally many.
    """
    _, code_n, count_p = np.unique(np.asarray(person_n), return_inverse=True, return_counts=True)
    if largest:
        best_p = np.full(len(count_p), -np.inf)
        np.maximum.at(best_p, code_n, score_n)
        return best_p
    return np.bincount(code_n, weights=score_n) / count_p


@dataclass(frozen=True)
class Attackers:
    """Real people ready to be told apart by any set of rows: what does not depend on the set is computed once.

    members, nonmembers: rows of at most `policy.membership_people` people of each side.
    log_reference_*_n: log distance to the nearest row of the holdout less one person (the row's own, or one drawn at
    random), so that members and non-members see pools of one size. scale_*_n: local 1 / dimension there.
    largest: every person has equally many rows.
    """

    members: Pool
    nonmembers: Pool
    log_reference_member_n: NDArray[np.float64]
    log_reference_nonmember_n: NDArray[np.float64]
    scale_member_n: NDArray[np.float64]
    scale_nonmember_n: NDArray[np.float64]
    largest: bool
    floor: float
    policy: AuditPolicy

    @classmethod
    def prepare(cls, train: Pool, holdout: Pool, floor: float, policy: AuditPolicy, seed: int) -> Attackers:
        """Draw the people and search the training side for them.

        Args:
            floor: added to distances, so that a copy has a logarithm.
        """
        if train.views is None or holdout.views is None:
            train, holdout = replace(train, views=None), replace(holdout, views=None)
        rng = generator(seed, "audit.membership")
        members, nonmembers = (_some(pool, policy.membership_people, rng) for pool in (train, holdout))
        people, code = np.unique(train.person, return_inverse=True)
        unseen_people, unseen_code = np.unique(nonmembers.person, return_inverse=True)
        dropped = rng.integers(0, len(people), len(unseen_people))[unseen_code]
        own = np.searchsorted(people, members.person)
        k = min(policy.neighbours + 1, len(train))
        logs, scales = [], []
        for rows, skipped in ((members, own), (nonmembers, dropped)):
            log_nk = log_distances(topk(rows, train, k, exclude=(skipped, code))[0], floor)
            logs.append(log_nk[:, 0])
            scales.append(local_scale(log_nk))
        rows_of = [np.unique(pool.person, return_counts=True)[1] for pool in (members, nonmembers)]
        largest = len(np.unique(np.concatenate(rows_of))) == 1
        return cls(members, nonmembers, logs[0], logs[1], scales[0], scales[1], largest, floor, policy)

    def nearest(self, rows: Pool, k: int = 1) -> list[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """Distances and indices of the k synthetic rows nearest to every member row, and to every non-member row."""
        database = replace(rows, views=None)
        return [topk(real, database, min(k, len(rows))) for real in (self.members, self.nonmembers)]

    def judge(
        self, rows: Pool, nearest: Sequence[NDArray[np.float64]] | None = None
    ) -> tuple[list[Finding], dict[str, Any]]:
        """Findings of both model-free attacks by these synthetic rows, and their ROC by name.

        Args:
            nearest: distance of every member row, and of every non-member row, to its nearest synthetic row, where known.
        """
        if len(rows) == 0:
            return [], {}
        if nearest is None:
            nearest = [distance[:, 0] for distance, _ in self.nearest(rows)]
        distance, density = [], []
        sides = (
            (self.members, self.log_reference_member_n, self.scale_member_n),
            (self.nonmembers, self.log_reference_nonmember_n, self.scale_nonmember_n),
        )
        for (real, log_reference_n, scale_n), nearest_n in zip(sides, nearest, strict=True):
            log_n = log_distances(nearest_n, self.floor)
            distance.append(per_person(-log_n, real.person, self.largest))
            density.append(per_person((log_reference_n - log_n) / scale_n, real.person, self.largest))
        findings, curves = [], {}
        for name, scores, note in (
            ("distance", distance, "nearest synthetic row"),
            ("density_ratio", density, "local density, synthetic against other training people"),
        ):
            found_here, curves[name] = membership(
                *scores, policy=self.policy, name=name, gates=2, calibrated_on="unseen people", note=note
            )
            findings += found_here
        return findings, curves


# ------------------------------------------------------------------------------------------------------------ parts


def _some(pool: Pool, people: int, rng: np.random.Generator) -> Pool:
    known = np.unique(pool.person)
    return pool if len(known) <= people else pool.select_people(rng.choice(known, people, replace=False))


def _area(
    member_n: NDArray[np.float64],
    nonmember_m: NDArray[np.float64],
    n: Mapping[str, int],
    policy: AuditPolicy,
    name: str,
    gates: int,
    calibrated_on: str,
    note: str,
) -> Finding:
    if min(n.values()) < _LEAST:
        return Finding(
            f"membership_auc_{name}", math.nan, n=dict(n), note=f"not given: needs {_LEAST} people on each side"
        )
    area, low, high = delong(member_n, nonmember_m)
    chance = float(stats.mannwhitneyu(member_n, nonmember_m, alternative="greater", method="asymptotic").pvalue)
    chance = 1.0 if math.isnan(chance) else chance  # every score equal
    known = chance < policy.alpha / gates and low > policy.membership_auc_max
    return Finding(
        f"membership_auc_{name}",
        area,
        (low, high),
        dict(n),
        threshold=policy.membership_auc_max,
        calibrated_on=calibrated_on,
        direction="lower",
        verdict="fail" if known else "pass",
        floor=0.5,
        note=f"area under the ROC of telling training people from unseen ones{': ' if note else ''}{note}; 0.5 is right",
        detail={"p_value": chance},
    )


def _tpr(
    member_n: NDArray[np.float64],
    nonmember_m: NDArray[np.float64],
    n: Mapping[str, int],
    level: float,
    policy: AuditPolicy,
    name: str,
    gates: int,
    calibrated_on: str,
) -> Finding:
    title = f"membership_tpr_at_{level * 100:g}_percent_{name}"
    need, have = people_needed(level), n["non_members"]
    if have < need or n["members"] == 0:
        note = f"not given: needs {need} non-members, has {have}"
        return Finding(title, math.nan, n=dict(n), unit="share", note=note, detail={"people_needed": need})
    as_high_n = have - np.searchsorted(np.sort(nonmember_m), member_n, "left")
    found = int((1 + as_high_n <= level * (have + 1) + 1e-9).sum())  # those whose conformal p-value is at most `level`
    interval = clopper_pearson(found, n["members"])
    # the threshold is an order statistic of the non-members, so that the count is beta-binomial (see excess_p)
    chance = excess_p(found, n["members"], level, have)
    limit = level + policy.membership_tpr_excess
    tested = sum(have >= people_needed(x) for x in LEVELS)
    known = chance < policy.alpha / gates / tested and interval[0] > limit
    return Finding(
        title,
        found / n["members"],
        interval,
        dict(n),
        threshold=limit,
        calibrated_on=calibrated_on,
        direction="lower",
        verdict="fail" if known else "pass",
        unit="share",
        floor=level,
        note=f"training people recognised where {level:.1%} of unseen people are taken for training people",
        detail={"p_value": chance},
    )
