"""Who can be found across modalities: the audit of what links a person's genotype to a scan.

Two attacks, each on the release as it is and on planted controls whose right verdict is known:

    pair    An attacker holds a synthetic person's genotype and a heap of scans whose ids were removed, and has learned from
            other people's pairs how the two go together (ridge regression of genotype components on scan features, the
            other half of the people). Is the person's own scan ranked above those of others? Where the attacker knows group,
            sex and diagnosis as well, only people alike in these are compared: what is left is a link that was not declared.
    twin    An attacker holds a real person's genotype and scan. The synthetic person whose genotype is nearest: is its scan
            nearer to the real person's scan than those of other synthetic people, and the other way round? For training
            people against people who were kept out: a twin in both modalities is a copy of a person, whatever the audits of
            single modalities say.

Controls. Pair: scans with a trace of their genotype must be found, pairs drawn anew among people alike must not. Twin: copies
of training people in both modalities must be found, the same copies with scans shuffled among them must not (each modality is
then a copy by itself, which is the other audits' to find). A control that is not judged as it must be makes the verdict void.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import rankdata

from engine import seeding
from engine.audit.findings import Finding, Verdict
from engine.audit.membership import membership
from engine.audit.policy import AuditPolicy
from engine.errors import InputError
from engine.imaging.volume import Volume

COMPONENTS = 10  # of genotypes, and of scans, that the attacker works with
_PERMUTATIONS = 1000
_RIDGE = 10.0
_TRACE = 1.0  # deviation of the planted trace, in deviations of a scan component
_LEAST = 40  # people; fewer give no verdict


@dataclass(frozen=True)
class Linked:
    """People with both modalities: dosage_nl (n, sites), scan_nf (n, features), stratum_n (n,) what the attacker knows."""

    dosage_nl: np.ndarray
    scan_nf: np.ndarray
    stratum_n: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.dosage_nl) == len(self.scan_nf) == len(self.stratum_n):
            counts = f"{len(self.dosage_nl)}, {len(self.scan_nf)} and {len(self.stratum_n)}"
            raise InputError("one genotype, one scan and one stratum per person", counts, "linkage")

    def take(self, index: np.ndarray) -> Linked:
        return Linked(self.dosage_nl[index], self.scan_nf[index], self.stratum_n[index])


@dataclass(frozen=True)
class Linkage:
    """findings of the release; controls by name: what must be, what was found; verdict pass, fail or void, and why."""

    findings: list[Finding]
    controls: dict[str, dict[str, Any]]
    verdict: str
    reasons: list[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "reasons": self.reasons,
            "findings": [f.to_json() for f in self.findings],
            "controls": self.controls,
        }


def scan_features(volumes: Sequence[Volume]) -> np.ndarray:
    """float64 (n, f): means of 4 x 4 x 4 blocks of each scan over its own 95th percentile."""
    made = []
    for volume in volumes:
        array = np.nan_to_num(np.asarray(volume.array_cdhw[0], dtype=np.float64))
        edges = [np.arange(0, n, 4) for n in array.shape]
        for axis, starts in enumerate(edges):
            array = np.add.reduceat(array, starts, axis=axis)
        made.append((array / max(float(np.percentile(array, 95)), 1e-9)).ravel())
    if len({len(row) for row in made}) > 1:
        raise InputError("scans of one size", "several", "linkage")
    return np.stack(made)


def linkage(
    train: Linked, holdout: Linked, synthetic: Linked, *, policy: AuditPolicy | None = None, seed: int = 0
) -> Linkage:
    """Both attacks with their controls."""
    policy = policy or AuditPolicy()  # type: ignore[call-arg]
    findings = [*pair_attack(synthetic, policy, seed), *twin_attack(train, holdout, synthetic, policy, seed)]
    rng = seeding.generator(seed, "cohort.linkage.controls")
    copies = _copies(train, len(synthetic.stratum_n), rng)
    controls: dict[str, dict[str, Any]] = {}
    for name, expected, found in (
        ("pairs with a trace of the genotype", "fail", pair_attack(_traced(synthetic, rng), policy, seed)),
        ("pairs drawn anew", "pass", _middle([pair_attack(_repaired(synthetic, rng), policy, seed) for _ in range(3)])),
        ("twins of training people", "fail", twin_attack(train, holdout, copies, policy, seed)),
        ("the same, scans shuffled", "pass", twin_attack(train, holdout, _shuffled(copies, rng), policy, seed)),
    ):
        gates = [f for f in found if f.verdict != "none"]
        verdict = _worst(gates)
        values = {f.name: f.value if np.isfinite(f.value) else None for f in gates}
        controls[name] = {"expected": expected, "verdict": verdict, "values": values}
    wrong = [name for name, c in controls.items() if c["verdict"] != c["expected"]]
    verdict = "void" if wrong else _worst([f for f in findings if f.verdict != "none"])
    reasons = [f"the control '{n}' was {controls[n]['verdict']}, must be {controls[n]['expected']}" for n in wrong]
    reasons += [f"{f.name} {f.value:.3g}" for f in findings if f.verdict == "fail"]
    return Linkage(findings, controls, verdict, reasons)


def _middle(draws: list[list[Finding]]) -> list[Finding]:
    """The draw whose link has the middle p-value: one draw in 1 / alpha is convicted by chance."""
    return sorted(draws, key=lambda found: found[-1].detail.get("p", 1.0))[len(draws) // 2]


def _worst(findings: Sequence[Finding]) -> str:
    verdicts = {f.verdict for f in findings}
    return "fail" if "fail" in verdicts else "void" if "void" in verdicts or not verdicts else "pass"


def components(rows_nf: np.ndarray, fitted_nf: np.ndarray, count: int = COMPONENTS) -> np.ndarray:
    """float64 (n, c): standardised principal components of `fitted_nf`, of other rows."""
    mean = fitted_nf.mean(axis=0)
    _, singular, axes = np.linalg.svd(fitted_nf - mean, full_matrices=False)
    keep = min(count, int((singular > 1e-9 * max(singular[0], 1e-300)).sum()))
    scale = singular[:keep] / np.sqrt(max(len(fitted_nf) - 1, 1))
    return np.asarray((rows_nf - mean) @ axes[:keep].T / scale)


def pair_attack(people: Linked, policy: AuditPolicy, seed: int) -> list[Finding]:
    """Findings link_all (described) and link_within (gated): how often a person's own scan outranks another's.

    Both halves of the people are attacked by what the other half teaches. The p-value is that of permuted pairs, within
    strata for the latter.
    """
    n = len(people.stratum_n)
    if n < _LEAST:
        reason = f"{n} people; {_LEAST} are needed."
        return [Finding("link_within", float("nan"), n=n, verdict="void", note=reason, unit="area")]
    rng = seeding.generator(seed, "cohort.linkage.pair")
    half = rng.permutation(n) % 2
    likeness = np.full((n, n), np.nan)
    for side in (0, 1):
        own, other = np.flatnonzero(half == side), np.flatnonzero(half != side)
        x = components(people.scan_nf, people.scan_nf[other])
        y = components(people.dosage_nl.astype(np.float64), people.dosage_nl[other].astype(np.float64))
        beta = np.linalg.solve(x[other].T @ x[other] + _RIDGE * np.eye(x.shape[1]), x[other].T @ y[other])
        told = x[own] @ beta
        # minus the squared distance of what the scan tells from the genotype, in units of the residual
        spread = np.maximum((y[other] - x[other] @ beta).std(axis=0), 1e-9)
        likeness[np.ix_(own, own)] = -cdist(y[own] / spread, told / spread, "sqeuclidean")
    made = []
    for name, stratum in (("link_all", np.zeros(n, dtype=int)), ("link_within", people.stratum_n)):
        code = np.unique(stratum, return_inverse=True)[1]
        alike = (code[:, None] == code) & (half[:, None] == half) & ~np.eye(n, dtype=bool)
        judged = alike.sum(axis=1) > 0
        if judged.sum() < _LEAST:
            made.append(Finding(name, float("nan"), n=int(judged.sum()), verdict="void", unit="area",
                                note=f"{int(judged.sum())} people with others alike; {_LEAST} are needed."))  # fmt: skip
            continue
        groups = [np.flatnonzero((code == c) & (half == h)) for c in np.unique(code) for h in (0, 1)]
        groups = [g for g in groups if len(g) > 1]
        ranks = [_ranks(likeness[np.ix_(g, g)]) for g in groups]
        share_n = np.concatenate([np.diag(table) for table in ranks])
        value = float(share_n.mean())
        total = np.zeros(_PERMUTATIONS)
        for table in ranks:  # a column for every row, drawn anew each time
            size = len(table)
            order = rng.permuted(np.tile(np.arange(size), (_PERMUTATIONS, 1)), axis=1)
            total += table[np.arange(size), order].sum(axis=1)
        null = total / len(share_n)
        p = float((1 + (null >= value - 1e-12).sum()) / (1 + len(null)))
        error = 1.96 * float(share_n.std(ddof=1)) / np.sqrt(len(share_n))
        gate = name == "link_within"
        verdict: Verdict = "none" if not gate else "fail" if p <= policy.alpha else "pass"
        made.append(
            Finding(
                name=name,
                value=value,
                interval=(max(0.0, value - error), min(1.0, value + error)),
                n=len(share_n),
                threshold=float(np.quantile(null, 1 - policy.alpha)),
                calibrated_on=f"pairs permuted {'among people alike' if gate else 'among all'}",
                direction="lower",
                verdict=verdict,
                unit="area",
                note=f"p {p:.2g}; "
                + ("the attacker knows group, sex and diagnosis." if gate else "declared links count too."),
                detail={
                    "p": p,
                    "first_of_heap": round(_first(likeness, groups), 4),
                    "by_chance": round(_chance(groups), 4),
                },
            )
        )
    return made


def _ranks(table: np.ndarray) -> np.ndarray:
    """float64 (n, n): of each row the share of the other columns that a column outranks; ties count half."""
    return np.asarray((rankdata(table, axis=1) - 1) / (len(table) - 1))


def _first(likeness: np.ndarray, groups: Sequence[np.ndarray]) -> float:
    hits = [np.argmax(likeness[np.ix_(g, g)], axis=1) == np.arange(len(g)) for g in groups]
    return float(np.concatenate(hits).mean())


def _chance(groups: Sequence[np.ndarray]) -> float:
    return len(groups) / sum(len(g) for g in groups)


def twin_attack(train: Linked, holdout: Linked, synthetic: Linked, policy: AuditPolicy, seed: int) -> list[Finding]:
    """Findings of `membership` named "twin": training people against people kept out, by one score each."""
    scores = []
    fitted = np.concatenate([train.scan_nf, holdout.scan_nf])
    made_x = components(synthetic.scan_nf, fitted, 20)
    for real in (train, holdout):
        x = components(real.scan_nf, fitted, 20)
        by_genotype = cdist(real.dosage_nl.astype(np.float32), synthetic.dosage_nl.astype(np.float32), "cityblock")
        by_scan = cdist(x, made_x, "sqeuclidean")
        rows_n = np.arange(len(x))
        scan_of_nearest = _percentile(by_scan, by_genotype.argmin(axis=1), rows_n)
        genotype_of_nearest = _percentile(by_genotype, by_scan.argmin(axis=1), rows_n)
        scores.append(-(scan_of_nearest + genotype_of_nearest))
    return membership(
        scores[0], scores[1], policy=policy, name="twin", calibrated_on="real people kept out",
        note="How near the nearest synthetic person by one modality lies by the other.",
    )[0]  # fmt: skip


def _percentile(distance: np.ndarray, column: np.ndarray, row: np.ndarray) -> np.ndarray:
    own = distance[row, column]
    return ((distance < own[:, None]).sum(axis=1) + 0.5 * (distance == own[:, None]).sum(axis=1)) / distance.shape[1]


def _traced(people: Linked, rng: np.random.Generator) -> Linked:
    """Scans that carry a trace of the genotype in random directions, as strong as a component of theirs."""
    y = components(people.dosage_nl.astype(np.float64), people.dosage_nl.astype(np.float64))
    mean = people.scan_nf.mean(axis=0)
    _, singular, axes = np.linalg.svd(people.scan_nf - mean, full_matrices=False)
    keep = min(COMPONENTS, len(singular))
    strength = singular[:keep] / np.sqrt(len(people.scan_nf))
    mix = np.linalg.qr(rng.standard_normal((max(y.shape[1], keep), max(y.shape[1], keep))))[0][: y.shape[1], :keep]
    return replace(people, scan_nf=people.scan_nf + _TRACE * (y @ mix * strength) @ axes[:keep])


def _repaired(people: Linked, rng: np.random.Generator) -> Linked:
    """Pairs drawn anew among people alike."""
    order = np.arange(len(people.stratum_n))
    for stratum in np.unique(people.stratum_n):
        members = np.flatnonzero(people.stratum_n == stratum)
        order[members] = members[rng.permutation(len(members))]
    return replace(people, scan_nf=people.scan_nf[order])


def _copies(train: Linked, n: int, rng: np.random.Generator) -> Linked:
    """n near copies of training people in both modalities: 2 % of alleles changed, a tenth of the scans' spread added."""
    chosen = train.take(rng.permutation(np.resize(np.arange(len(train.stratum_n)), max(n, 1))))
    changed = rng.random(chosen.dosage_nl.shape) < 0.02
    other = chosen.dosage_nl[rng.permutation(len(chosen.stratum_n))]
    noise = 0.1 * train.scan_nf.std(axis=0) * rng.standard_normal(chosen.scan_nf.shape)
    return Linked(np.where(changed, other, chosen.dosage_nl), chosen.scan_nf + noise, chosen.stratum_n)


def _shuffled(copies: Linked, rng: np.random.Generator) -> Linked:
    return replace(copies, scan_nf=copies.scan_nf[rng.permutation(len(copies.stratum_n))])
