"""Membership by the model: does a person's genome look more likely to the fitted model than to one that never saw them?

A person's score is the log-likelihood of their haplotypes under the attacked copying model less that under a reference model
of the same class and settings, fitted to people who were not in training (Carlini et al., "Membership inference attacks from
first principles", 2022, with one reference in place of shadow models; the likelihood ratio is the best test there is for two
known models). Higher is more member-like. Nothing is trained but the reference, and the threshold comes from non-members.

Who can do this:

- **with the run folder**: the attacker has the reference panel itself, so that the score only shows how a copying model that
  contains a haplotype rewards it. This is the worst case, and the reason why a run folder must not leave.
  `leave_one_out` scores training people without their own haplotypes: what relatives and the choice of settings give away.
- **with samples only**: the attacker fits the same class to the synthetic panel and uses that as the attacked model. This is
  what a release gives away: pass `fit(synthetic_panel, config)`.

Verdicts are left to `engine.audit.membership`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine import seeding
from engine.audit.controls import expected_verdict
from engine.audit.copies import Scores
from engine.audit.findings import Finding
from engine.audit.gates import Judge
from engine.audit.membership import membership
from engine.audit.policy import AuditPolicy
from engine.audit.pools import Pool
from engine.errors import InputError
from engine.genomics import li_stephens
from engine.genomics.attacks import ATTACKS
from engine.genomics.li_stephens import LiStephens
from engine.genomics.matching import common_sites
from engine.genomics.panel import HaplotypePanel, Samples
from engine.kernels import bits

Score = Callable[[HaplotypePanel], NDArray[np.float64]]  # nats of each haplotype

_SYNTHETIC_PEOPLE, _SITES = 1000, 20_000  # that an attacker with samples only makes a model of, in the audit


@dataclass(frozen=True)
class MemberScores:
    """Log-likelihood ratios, nats per person: member_s of training people, nonmember_s of unseen ones."""

    member_s: NDArray[np.float64]
    nonmember_s: NDArray[np.float64]


def member_scores(
    run: str | Path | LiStephens,
    train: HaplotypePanel,
    holdout: HaplotypePanel,
    *,
    reference: Literal["copying", "independent"] = "copying",
    leave_one_out: bool = False,
    people: int = 2000,
    seed: int = 0,
) -> MemberScores:
    """Score training people and unseen people under the model of a run against a reference.

    Args:
        run: a run folder or a model: the one that was trained, or one fitted to synthetic people.
        train, holdout: phased panels of the model's sites. A random half of the holdout is the reference, the other half
            are the non-members.
        reference: "copying" fits the model's class and settings to the reference half; "independent" takes sites as
            independent with the frequencies of that half.
        leave_one_out: training people are scored without their own haplotypes; the model must be the one fitted to them.
        people: at most so many of each side, drawn at random.
        seed: of the draws.

    Raises:
        InputError: other sites, unphased panels, or fewer than 4 people in the holdout.
    """
    model = run if isinstance(run, LiStephens) else li_stephens.load(run)
    if holdout.n_samples < 4:
        raise InputError("at least 4 holdout people", str(holdout.n_samples), "member_scores", "a larger holdout")
    rng = seeding.generator(seed, "genomics.membership")
    order = rng.permutation(holdout.n_samples)
    half = len(order) // 2
    known = holdout.select(samples=np.sort(order[:half]))
    sides = (
        train.select(samples=np.sort(rng.permutation(train.n_samples)[:people])),
        holdout.select(samples=np.sort(order[half:][:people])),
    )
    score = _copying(model, known) if reference == "copying" else _independent(model, known)
    scores = []
    for panel, mine in zip(sides, (leave_one_out, False), strict=True):
        nats_n = model.log_likelihood(panel, leave_one_out=mine) - score(panel)
        scores.append(np.add.reduceat(nats_n, panel.samples.first_haplotype[:-1]))
    return MemberScores(scores[0], scores[1])


def model_membership(
    run: str | Path | LiStephens,
    train: HaplotypePanel,
    holdout: HaplotypePanel,
    *,
    policy: AuditPolicy | None = None,
    name: str = "model_likelihood",
    seed: int = 0,
) -> list[Finding]:
    """Findings on `member_scores`: area under the ROC and true-positive rates, where there are the people for them."""
    policy = policy or AuditPolicy()
    scores = member_scores(run, train, holdout, people=policy.membership_people, seed=seed)
    return membership(
        scores.member_s, scores.nonmember_s, policy=policy, name=name, calibrated_on="half of the holdout",
        note="likelihood ratio against a model of the other half",
    )[0]  # fmt: skip


def samples_membership(
    synthetic: HaplotypePanel,
    train: HaplotypePanel,
    holdout: HaplotypePanel,
    *,
    policy: AuditPolicy,
    people: int = 300,
    seed: int = 0,
) -> list[Finding]:
    """What an attacker with the released people alone can tell: a copying model of them, with default settings, is attacked.

    At most `people` members and non-members, 1,000 synthetic people and 20,000 sites, evenly spread, take part. [] where a
    side is too small or the synthetic panel cannot be the reference of a copying model.

    Described, because any generator that copies real stretches, however short, gives something away here; gated with
    `policy.gate_copying_model`. The null is the holdout: released people that were made without having seen anybody of
    either side are as much like a member as like a non-member, so that labels are exchangeable, and DeLong's interval and
    the rank test hold at any number of people. The holdout is unseen by the reference model and by the attacked one.
    """
    if holdout.n_samples < 4 or not synthetic.phased or (np.diff(synthetic.samples.first_haplotype) != 2).any():
        return []
    rng = seeding.generator(seed, "genomics.membership.samples")
    drawn = np.sort(rng.permutation(synthetic.n_samples)[:_SYNTHETIC_PEOPLE])
    site_l = np.unique(np.linspace(0, synthetic.n_sites - 1, min(synthetic.n_sites, _SITES)).astype(np.int64))
    model = li_stephens.fit(synthetic.select(sites=site_l, samples=drawn))
    sides = (panel.select(sites=site_l) for panel in (train, holdout))
    scores = member_scores(model, *sides, people=people, seed=seed)
    what = "a copying model of the synthetic people against one of the other half"
    found, _ = membership(
        scores.member_s, scores.nonmember_s, policy=policy, name="copying_model", calibrated_on="half of the holdout",
        gates=2 + ATTACKS if policy.gate_copying_model else 1,
        note=what if policy.gate_copying_model else f"{what}; described, not gated",
    )  # fmt: skip
    return found if policy.gate_copying_model else [replace(finding, verdict="none") for finding in found]


def copying_judge(train: HaplotypePanel, holdout: HaplotypePanel, policy: AuditPolicy, seed: int) -> Judge:
    """`samples_membership` as a judge for `engine.audit.audit`: of the synthetic set; with `policy.gate_copying_model` of
    every control too, each pair of rows as one person.

    Args:
        train, holdout: panels of the sites of the pools, in their order.
    """

    def judge(name: str, rows: Pool, scores: Scores) -> list[Finding]:
        if name == "synthetic":
            if len(rows) % 2 or (rows.person[::2] != rows.person[1::2]).any():
                return []  # the copying model is one of diploid people
        elif not policy.gate_copying_model:
            return []
        unseen = holdout
        if expected_verdict(name) == "pass":  # fresh people of the holdout do not stand for unseen ones of themselves
            others = ~np.isin(np.array(holdout.samples.ids), rows.person)
            unseen = holdout.select(samples=np.flatnonzero(others))
        return samples_membership(_panel_of(rows, train), train, unseen, policy=policy, seed=seed)

    return judge


def _panel_of(rows: Pool, like: HaplotypePanel) -> HaplotypePanel:
    """Rows 2 s and 2 s + 1 as person s, at the sites of another panel; a last odd row is left out."""
    people = len(rows) // 2
    bits_lw = bits.transpose(np.ascontiguousarray(rows.data[: 2 * people]), like.n_sites)
    samples = Samples([f"p{s}" for s in range(people)], None, None, 2 * np.arange(people + 1, dtype=np.int64))
    return replace(like, bits_lw=bits_lw, missing_lw=None, samples=samples, phased=True)


def _copying(model: LiStephens, known: HaplotypePanel) -> Score:
    """Scores under the model's class and settings over other people, at the model's sites and genetic distances."""
    _, known_l = common_sites({"model": model.sites, "holdout": known.sites})
    known = replace(known.select(sites=known_l), sites=model.sites)
    settings = model.config.model_copy(update={"group_ne": {}, "per_group": False, "learn_rounds": 0, "mix": None})
    other = li_stephens.fit(known, settings)
    # whatever map and rates the attacked model had, the reference has the same
    return replace(
        other, distance_l=model.distance_l, mismatch_l=model.mismatch_l, learned_l=model.learned_l
    ).log_likelihood


def _independent(model: LiStephens, known: HaplotypePanel) -> Score:
    """Scores under independent sites with the frequencies of other people."""
    _, known_l = common_sites({"model": model.sites, "holdout": known.sites})
    count_l = bits.popcount_rows(np.ascontiguousarray(known.bits_lw[known_l]))
    alt_l = (count_l + 0.5) / (known.n_haplotypes + 1)

    def score(panel: HaplotypePanel) -> NDArray[np.float64]:
        _, panel_l = common_sites({"model": model.sites, "panel": panel.sites})
        alleles_nl = panel.select(sites=panel_l).alleles_nl()
        at_nl = np.where(alleles_nl == 1, np.log(alt_l), np.log1p(-alt_l))
        return np.where(alleles_nl == 255, 0.0, at_nl).sum(axis=1)

    return score
