"""What the audit asks of genotypes beyond distances: kinship with training people, copies in windows, alleles that only one
training person has, and attacks on the released frequencies.

Every judge is made once from training and holdout and then asked about the synthetic set and about each control, by the same
rule. Its null is the same question asked of unseen people at pools of the same size:

- kinship: holdout people against training; the counts are compared exactly (hypergeometric). Only where the sites can tell
  (`relatedness.resolution`); else the figure is printed without a verdict.
- windows: a mosaic of a few people is near to nobody as a whole, and near to somebody in every window. A row's statistic is
  conformal against holdout rows, as the copy search's is.
- private alleles: alleles that exactly one real person of both sides together has. Those of training people must not show up
  more often than those of holdout people, by more than is tolerated of any membership attack.
- frequencies: see `engine.genomics.attacks`.

Where a control is made of holdout people (fresh real ones), they are taken out of the holdout first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from engine.audit.controls import expected_verdict
from engine.audit.copies import Null, Scores
from engine.audit.findings import Finding, Verdict
from engine.audit.gates import Judge, LightJudge
from engine.audit.intervals import clopper_pearson, conformal_p, people_needed, person_weights
from engine.audit.judge import copy_share
from engine.audit.membership import membership
from engine.audit.policy import AuditPolicy
from engine.audit.pools import Pool
from engine.genomics.attacks import ATTACKS, frequency_attack
from engine.genomics.relatedness import THRESHOLDS, Resolution, genotypes_of_haplotypes, largest_kinship
from engine.kernels import nearest
from engine.seeding import generator

_RELABELLINGS = 999
_WINDOW_ROWS = 400  # holdout rows that say how long a stretch unseen people share
_MOST_WINDOWS = 2000
_HALF_SITE = 0.5  # added to distances, so that a copy has a logarithm

Ready = Callable[[Pool], list[Finding]]  # findings on a set of rows


def genotype_judges(
    train: Pool,
    holdout: Pool,
    contig_l: NDArray,
    resolved: Resolution,
    noted: list[Finding],
    *,
    policy: AuditPolicy | None = None,
    seed: int = 0,
) -> list[Judge]:
    """Judges for `engine.audit.audit`.

    Args:
        train, holdout: pools of haplotypes at the same sites.
        contig_l: contig of each site; windows do not span two.
        resolved: of these sites, for kinship.
        noted: findings of the checks before the audit, handed on with those of the synthetic set.
    """
    policy = policy or AuditPolicy()

    def private(side: Pool, unseen: Pool) -> Ready:
        return private_judge(side, unseen, policy, seed)

    def attacked(side: Pool, unseen: Pool) -> Ready:
        attack = frequency_attack(side, unseen, policy, seed)
        return lambda rows: [] if attack is None else attack(rows, False)

    def light(make: Callable[[Pool, Pool], Ready], often: bool) -> LightJudge:
        def anew(side: Pool, unseen: Pool) -> Judge:
            return _judge(lambda less: make(side, less), unseen)

        return LightJudge(anew(train, holdout), anew, often)

    judges: list[Judge] = [
        _judge(lambda unseen: kinship_judge(train, unseen, resolved, policy), holdout),
        _judge(lambda unseen: window_judge(train, unseen, contig_l, policy, seed), holdout),
        light(private, True),
        light(attacked, False),
    ]

    def once(name: str, pool: Pool, scores: Scores) -> list[Finding]:
        if name != "synthetic":
            return []
        attack = frequency_attack(train, holdout, policy, seed)
        return noted + ([] if attack is None else [f for f in attack(pool, True) if "training_frequencies" in f.name])

    return [*judges, once]


def _judge(make: Callable[[Pool], Ready], holdout: Pool) -> Judge:
    """A judge that is made at its first use, and made anew without them for a control of holdout people."""
    made: list[Ready] = []

    def judge(name: str, pool: Pool, scores: Scores) -> list[Finding]:
        taken = np.isin(holdout.person, pool.person) & (expected_verdict(name) == "pass")
        if taken.any():
            return [] if taken.all() else make(holdout.select(np.flatnonzero(~taken)))(pool)
        if not made:
            made.append(make(holdout))
        return made[0](pool)

    return judge


# ------------------------------------------------------------------------------------------------------------ kinship


def kinship_judge(train: Pool, holdout: Pool, resolved: Resolution, policy: AuditPolicy) -> Ready:
    """Synthetic people who are the twin, child or cousin of a training person, against holdout people who are."""
    if not (_diploid(train) and _diploid(holdout)) or len(resolved.site_l) == 0:
        return lambda rows: []
    length = train.length or 64 * train.data.shape[1]
    known = genotypes_of_haplotypes(train.data, length, resolved.site_l)
    kin_h = largest_kinship(genotypes_of_haplotypes(holdout.data, length, resolved.site_l), known)

    def ready(rows: Pool) -> list[Finding]:
        if not _diploid(rows):
            return []
        kin_s = largest_kinship(genotypes_of_haplotypes(rows.data, length, resolved.site_l), known)
        pairs = len(known) * (len(kin_s) + len(kin_h))
        limits = [resolved.limit(least, pairs) for least in THRESHOLDS]
        gates = sum(limit is not None for limit in limits)
        return [
            _kin_share(kin_s, kin_h, least, limit, gates, resolved, policy) for least, limit in zip(THRESHOLDS, limits)
        ]

    return ready


def _kin_share(
    kin_s: NDArray[np.float64],
    kin_h: NDArray[np.float64],
    least: float,
    limit: float | None,
    gates: int,
    resolved: Resolution,
    policy: AuditPolicy,
) -> Finding:
    n_s, n_h, above = len(kin_s), len(kin_h), least if limit is None else limit
    found, natural = int((kin_s >= above).sum()), int((kin_h >= above).sum())
    chance = lambda k: float(stats.hypergeom.sf(k - 1, n_s + n_h, k + natural, n_s))  # noqa: E731
    allowed, verdict = n_s, cast(Verdict, "none")
    why = f"not judged: {len(resolved.site_l)} independent sites on {10 * resolved.stretches} Mb do not show it"
    if limit is not None:
        allowed = next((k - 1 for k in range(n_s + 1) if chance(k) < policy.alpha / gates), n_s)
        verdict = "fail" if found > allowed else "pass"
        why = "synthetic people with such kinship to a training person, against holdout people with it"
    return Finding(
        f"kinship_above_{least:g}", found / n_s, clopper_pearson(found, n_s), {"synthetic": n_s, "holdout": n_h},
        threshold=None if limit is None else allowed / n_s, calibrated_on="holdout against training", direction="lower",
        verdict=verdict, unit="share", floor=natural / n_h, note=f"KING-robust kinship of at least {above:.3g}; {why}",
        detail={
            "p_value": chance(found), "independent_sites": len(resolved.site_l), "stretches": resolved.stretches,
            "error": resolved.error if math.isfinite(resolved.error) else None,
        },
    )  # fmt: skip


def _diploid(pool: Pool) -> bool:
    """Rows 2 s and 2 s + 1 are the two haplotypes of one person, and of nobody else."""
    return len(pool) % 2 == 0 and bool((pool.person[::2] == pool.person[1::2]).all()) and 2 * pool.people == len(pool)


# ------------------------------------------------------------------------------------------------------------ windows


def sliding_windows(contig_l: NDArray, sites: int) -> NDArray[np.int64]:
    """Windows of `sites` sites, each half a window further on, none across contigs: int64 (V, 2), first and behind the last.

    A contig with fewer sites is one window; windows grow where there would be more than about 2,000 of them.
    """
    edges = np.flatnonzero(np.concatenate([[True], contig_l[1:] != contig_l[:-1], [True]]))
    sites = max(sites, 2 * (len(contig_l) // _MOST_WINDOWS))
    step = max(1, sites // 2)
    made = []
    for first, stop in zip(edges[:-1].tolist(), edges[1:].tolist()):
        starts = np.arange(first, max(first + 1, stop - sites + step), step)
        starts = np.unique(np.minimum(starts, max(first, stop - sites)))
        made.append(np.column_stack([starts, np.minimum(starts + sites, stop)]))
    return np.concatenate(made).astype(np.int64)


def window_judge(train: Pool, holdout: Pool, contig_l: NDArray, policy: AuditPolicy, seed: int) -> Ready:
    """Rows that are near to training rows in more windows than unseen people are.

    A window is as long as the longest stretch that half of the unseen people share with a training person: within it to
    equal somebody is the exception. The statistic of a row, suspicious when small, is the mean over the windows of
    log d(training) - log d(holdout), with d the distance to the nearest row there plus half a site; holdout less one
    person for rows and null alike.
    """
    people, code_n = np.unique(holdout.person, return_inverse=True)
    if len(people) < people_needed(max(policy.levels)):
        return lambda rows: []
    length = len(contig_l)
    rng = generator(seed, "genomics.judge.windows")
    some = holdout.data[np.sort(rng.permutation(len(holdout))[:_WINDOW_ROWS])]
    _, shared_n, _ = nearest.longest_run(some, train.data, length, np.arange(length))
    windows_v2 = sliding_windows(contig_l, max(2, int(np.median(shared_n))))
    everybody = np.full(len(train), -1)

    def statistic(rows_nw: NDArray[np.uint64], dropped_n: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
        near = lambda database, own, theirs: nearest.hamming_windows_topk(  # noqa: E731
            rows_nw, database.data, windows_v2, 1, exclude=(own, theirs)
        )[0][:, :, 0]
        train_nv = near(train, np.zeros(len(rows_nw), dtype=np.int64), everybody)
        holdout_nv = near(holdout, dropped_n, code_n)
        ratio_nv = np.log(train_nv + _HALF_SITE) - np.log(holdout_nv + _HALF_SITE)
        return ratio_nv.mean(axis=1), ((train_nv == 0) & (holdout_nv > 0)).mean(axis=1)

    null_n, null_share_n = statistic(holdout.data, code_n)
    weight_n, count = person_weights(holdout.person)
    null = Null(_as_scores(null_n, holdout), weight_n, count, "holdout against holdout, matched pools")
    floor = float((null_share_n * weight_n).sum() / count)

    def ready(rows: Pool) -> list[Finding]:
        dropped_n = generator(seed, "genomics.judge.windows.dropped").integers(0, len(people), len(rows))
        value_n, share_n = statistic(rows.data, dropped_n)
        p_n = conformal_p(null.scores.statistic_nc, value_n, weight_n)
        findings = []
        for level in policy.levels:
            found = copy_share(null, p_n, rows.person, rows.group, level, policy)
            findings.append(
                replace(
                    found, name=f"window_{found.name}",
                    note=found.note.replace("people nearer to training", "people nearer to training, window by window,"),
                    detail={**found.detail, "windows": len(windows_v2), "sites_per_window": int(np.diff(windows_v2).max())},
                )
            )  # fmt: skip
        weight, n = person_weights(rows.person)
        findings.append(
            Finding(
                "windows_equal_to_training", float((share_n * weight).sum() / n), n=n, direction="lower", unit="share",
                floor=floor, calibrated_on="holdout against training, matched pools",
                note="windows in which a row equals a training row and no holdout row; the floor is what unseen people show",
            )
        )  # fmt: skip
        return findings

    return ready


def _as_scores(statistic_n: NDArray[np.float64], pool: Pool) -> Scores:
    none = np.zeros(len(pool))
    return Scores(statistic_n[:, None], none, none, none.astype(np.int64), pool.person)


# ------------------------------------------------------------------------------------------------------------ private


def private_judge(train: Pool, holdout: Pool, policy: AuditPolicy, seed: int) -> Ready:
    """Alleles of one training person alone that show up in the rows, against alleles of one holdout person alone.

    Both kinds are absent from everybody else of both sides, ALT and REF alike. Whatever a generator does that has seen
    neither side, every person's private alleles have the same chance; the p-value relabels people, which is exact. A
    generator that is faithful to rare alleles shows some of them without copying anybody: the gate is what it tells
    somebody who knows a person's genome, at the tolerance of all membership attacks.
    """
    length = train.length or 64 * train.data.shape[1]
    used_w = np.zeros(train.data.shape[1] * 64, dtype=np.uint8)
    used_w[:length] = 1
    used_w = np.packbits(used_w, bitorder="little").view(np.uint64)
    carried = [_carried(pool, used_w) for pool in (train, holdout)]
    members = len(carried[0][0])
    owned = []
    for alt_pw in (np.concatenate([side[0] for side in carried]), np.concatenate([side[1] for side in carried])):
        once_w, more_w = np.zeros_like(used_w), np.zeros_like(used_w)
        for carried_w in alt_pw:
            more_w |= once_w & carried_w
            once_w |= carried_w
        owned.append(alt_pw & (once_w & ~more_w))
    private_p = sum(np.bitwise_count(plane).sum(axis=1, dtype=np.int64) for plane in owned).astype(np.float64)
    label = np.zeros((_RELABELLINGS, len(private_p)), dtype=np.float32)
    label[:, :members] = 1
    label = generator(seed, "genomics.judge.private").permuted(label, axis=1)

    def ready(rows: Pool) -> list[Finding]:
        of_train, of_holdout = private_p[:members].sum(), private_p[members:].sum()
        n = {"training_alleles": int(of_train), "holdout_alleles": int(of_holdout), "rows": len(rows)}
        if min(of_train, of_holdout) == 0:
            note = "not given: no allele is carried by exactly one person on each side"
            return [Finding("private_alleles_shown", math.nan, n=n, unit="share", note=note)]
        there = [np.bitwise_or.reduce(rows.data, axis=0), np.bitwise_or.reduce(~rows.data & used_w, axis=0)]
        shown_p = sum(np.bitwise_count(own & seen).sum(axis=1, dtype=np.int64) for own, seen in zip(owned, there))
        shown_p = shown_p.astype(np.float64)
        value, floor = shown_p[:members].sum() / of_train, shown_p[members:].sum() / of_holdout
        relabelled = (label @ shown_p) / np.maximum(label @ private_p, 1)
        chance = float((1 + (relabelled >= value - 1e-12).sum()) / (_RELABELLINGS + 1))
        shown = Finding(
            "private_alleles_shown", float(value), n=n, direction="lower", unit="share", floor=float(floor),
            calibrated_on="alleles private to one holdout person; people relabelled at random",
            note="alleles that one training person alone has and that show up; the floor is that of holdout people; a panel "
            "of sites whose rarer allele is there three times has none",
            detail={"p_value": chance},
        )  # fmt: skip
        # what somebody learns who knows a person's private alleles: whether more of them show up than is usual
        rate = shown_p.sum() / private_p.sum()
        error_p = np.sqrt(private_p * rate * (1 - rate))
        surplus_p = np.divide(shown_p - private_p * rate, error_p, out=np.zeros_like(error_p), where=error_p > 0)
        told = membership(
            surplus_p[:members], surplus_p[members:], policy=policy, name="private_alleles", gates=1 + ATTACKS,
            calibrated_on="holdout people, by their own private alleles", note="private alleles that show up",
        )[0]  # fmt: skip
        return [shown, *told]

    return ready


def _carried(pool: Pool, used_w: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Which sites each person has an ALT, and which a REF allele at: uint64 (P, words) each, people sorted by id."""
    order = np.argsort(pool.person, kind="stable")
    first_p = np.unique(pool.person[order], return_index=True)[1]
    rows_nw = pool.data[order]
    return np.bitwise_or.reduceat(rows_nw, first_p, axis=0), np.bitwise_or.reduceat(~rows_nw & used_w, first_p, axis=0)
