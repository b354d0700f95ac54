"""How good is this audit, on these data, at this size? Its power to see a set that is contaminated with near copies, and
its rate of convicting honest people, by all of its gates together.

Of the gates that a modality brings those take part that are cheap (`LightJudge`); the others may cost minutes a set and are
tried once on every control. Both findings name the gates that took part and those that did not (`detail`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from engine.audit import controls as planted
from engine.audit.copies import Scores, join
from engine.audit.findings import Finding
from engine.audit.gates import Gates, Judge, Judged, LightJudge
from engine.audit.intervals import clopper_pearson
from engine.audit.policy import AuditPolicy
from engine.audit.pools import Pool
from engine.seeding import generator

_KEPT = 8  # nearest synthetic rows that are known of every real one, so that mixtures need no search of their own


def power_at_contamination(
    gates: Gates, synthetic: Pool, scores: Scores, judged: Judged, copies: Pool, copy_scores: Scores, unseen: Pool
) -> Finding:
    """How often this very set would be convicted if a share of its people had been near copies of training people.

    In every draw the rows of other randomly chosen synthetic people give way to randomly chosen near copies, and the
    mixture, of the size of the synthetic set, is judged as the set is.

    Args:
        scores, judged: of the synthetic set. copies, copy_scores: from `planted_copies`.
        unseen: real rows for the adversarial accuracy.
    """
    policy = gates.search.policy
    light = replace(gates, judges=[j for j in gates.judges if isinstance(j, LightJudge) and j.often])
    rng = generator(gates.search.seed, "audit.contamination")
    people, code_n = np.unique(synthetic.person, return_inverse=True)
    k = max(1, round(policy.contamination * len(people)))
    copy_p = gates.null.p_values(copy_scores)
    near, near_copies = gates.attackers.nearest(synthetic, _KEPT), gates.attackers.nearest(copies, len(copies))
    to_copies = [_by_index(*found) for found in near_copies]
    outcomes = []
    for _ in range(policy.contamination_repeats):
        out_n = np.isin(code_n, rng.choice(len(people), k, replace=False))
        kept, left = np.flatnonzero(~out_n), np.flatnonzero(out_n)
        drawn = rng.choice(len(copies), len(left), replace=len(left) > len(copies))
        person_n = np.concatenate([synthetic.person[kept], synthetic.person[left]])
        data = np.concatenate([synthetic.data[kept], copies.data[drawn]])
        rows = replace(synthetic, data=data, person=person_n, group=None, views=None)
        mixed = replace(join([scores.select(kept), copy_scores.select(drawn)]), person_n=person_n)
        p_n = np.concatenate([judged.p_n[kept], copy_p[drawn]])
        nearest = [
            np.minimum(_nearest_kept(*found, out_n), copy_nc[:, drawn].min(axis=1))
            for found, copy_nc in zip(near, to_copies, strict=True)
        ]
        outcomes.append(light.judge("contaminated", rows, mixed, unseen, p_n, nearest))
    seen = sum(outcome.verdict == "fail" for outcome in outcomes)
    already = "; it fails without any" if judged.verdict == "fail" else ""
    return Finding(
        name="power_at_contamination",
        value=seen / len(outcomes),
        interval=clopper_pearson(seen, len(outcomes)),
        n={"people": len(people), "draws": len(outcomes)},
        calibrated_on=f"{k} of {len(people)} synthetic people replaced by near copies, drawn anew each time",
        direction="higher",
        unit="share",
        note=f"chance that this set would fail if {policy.contamination:.0%} of its people were near copies{already}",
        detail={
            "contamination": k / len(people),
            "noise": policy.control_noise,
            "by_gate": _by_gate(outcomes),
            **_covered(outcomes, judged),
        },
    )


def false_positive_rate(
    train: Pool,
    holdout: Pool,
    people: int,
    policy: AuditPolicy,
    seed: int,
    judges: Sequence[Judge] = (),
    judged: Judged | None = None,
) -> Finding:
    """How often a set of fresh real people is convicted: the holdout is split anew in every draw, a part of it is judged
    by the whole audit, and the rest stands behind the null.

    Args:
        people: of the synthetic set; a draw has as many, or `policy.fresh_share` of the holdout where that is less.
        judges: of the audit; the light ones are made anew for every draw.
        judged: of the synthetic set, whose gates are named where they take no part.

    Draws share people, so that the interval, which is that of independent draws, is somewhat too narrow. Rows are compared
    as they stand, without their further views, and with 2 matched subsets at most. Views are searched alike for tested
    rows and null, and would make a draw of scans a dozen times as long; fewer subsets are noisier, so that the rate is if
    anything too high.
    """
    train, holdout = replace(train, views=None), replace(holdout, views=None)
    policy = policy.model_copy(update={"subsets": min(policy.subsets, 2)})
    known = np.unique(holdout.person)
    limit = min(len(known), policy.honest_people)
    m = max(1, min(people, round(policy.fresh_share * limit)))
    if policy.honest_repeats == 0 or limit - m < 3:
        return Finding("audit_false_positive_rate", math.nan, unit="share", note="not given: no draws of honest people")
    outcomes = []
    for repeat in range(policy.honest_repeats):
        rng = generator(seed, "audit.honest", repeat)
        side = train.select_people(_some(train, policy.honest_people, rng))
        order = rng.permutation(known)[:limit]
        fresh, rest = holdout.select_people(order[:m]), holdout.select_people(order[m:])
        light = [judge.make(side, rest) for judge in judges if isinstance(judge, LightJudge)]
        gates = Gates.prepare(side, rest, policy, seed + repeat, light)
        outcomes.append(gates.judge("honest", fresh, gates.search.score(fresh, "honest")))
    convicted = sum(judged.verdict == "fail" for judged in outcomes)
    return Finding(
        name="audit_false_positive_rate",
        value=convicted / len(outcomes),
        interval=clopper_pearson(convicted, len(outcomes)),
        n={"people": m, "draws": len(outcomes), "training_people": min(train.people, policy.honest_people)},
        threshold=policy.false_positive_max,
        calibrated_on="unseen real people, split anew in every draw",
        direction="lower",
        unit="share",
        note="sets of fresh real people that the audit convicts by the gates named in detail.gates; no verdict where it is "
        "surely above the threshold",
        detail={"by_gate": _by_gate(outcomes), **_covered(outcomes, judged)},
    )


def planted_copies(gates: Gates) -> tuple[Pool, Scores]:
    """The near copies of the noisy copycat and of contaminated sets, and their scores."""
    search = gates.search
    policy = search.policy
    copies = planted.noisy_copycat(
        search.train, policy.control_rows, policy.control_noise, search.typical_distance, search.seed
    )
    return copies, search.score(copies, "contamination")


def _by_index(distance_nk: NDArray[np.float64], index_nk: NDArray[np.int64]) -> NDArray[np.float64]:
    """Distances to all rows of a database, sorted by nearness, in the order of the database."""
    ordered = np.empty_like(distance_nk)
    np.put_along_axis(ordered, index_nk, distance_nk, axis=1)
    return ordered


def _nearest_kept(
    distance_nk: NDArray[np.float64], index_nk: NDArray[np.int64], out_m: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Distance to the nearest row that is not out; where all the known ones are, that of the furthest of them."""
    nearest_n = np.where(out_m[index_nk], np.inf, distance_nk).min(axis=1)
    return np.where(np.isinf(nearest_n), distance_nk[:, -1], nearest_n)


def _some(pool: Pool, people: int, rng: np.random.Generator) -> np.ndarray:
    known = np.unique(pool.person)
    return known if len(known) <= people else rng.choice(known, people, replace=False)


def _covered(outcomes: Sequence[Judged], judged: Judged | None) -> dict[str, list[str]]:
    """The gates that took part in the draws, and those of the audit that did not."""
    tried = {f.name for outcome in outcomes for f in outcome.findings if f.verdict in ("pass", "fail")}
    asked = set() if judged is None else {f.name for f in judged.findings if f.verdict in ("pass", "fail")}
    return {"gates": sorted(tried), "gates_left_out": sorted(asked - tried)}


def _by_gate(outcomes: Sequence[Judged]) -> dict[str, float]:
    """Share of draws that each gate convicted; gates that never did are left out."""
    failed = Counter(f.name for judged in outcomes for f in judged.findings if f.verdict == "fail")
    return {name: round(count / len(outcomes), 4) for name, count in sorted(failed.items())}
