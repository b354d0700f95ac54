"""The audit from end to end: checks, search, null, controls, verdict. Modality-blind: it sees pools, never scans
or panels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.atomic import write_json
from engine.audit import controls as planted
from engine.audit.authenticity import fidelity
from engine.audit.controls import ControlResult, Planted, expected_verdict
from engine.audit.copies import Null, Scores
from engine.audit.findings import Finding, Verdict
from engine.audit.gates import Gates, Judge
from engine.audit.intervals import person_weights, roc, thin
from engine.audit.judge import gate_level
from engine.audit.membership import membership
from engine.audit.policy import AuditPolicy
from engine.audit.pools import Pool, check_alike
from engine.audit.rates import false_positive_rate, planted_copies, power_at_contamination
from engine.errors import InputError

SCHEMA = "engine.audit/1"
_BINS = 40
STAGES = 7  # lines that `audit` says to `progress`


@dataclass(frozen=True)
class AuditResult:
    """Verdict of an audit and everything it rests on.

    Attributes:
        verdict: "pass", "fail", or "void" when a control was not judged as it must be.
        reasons: one plain sentence for each thing that decided the verdict.
        findings: on the synthetic rows, then the power figures.
        controls: what was planted and what the audit said of it.
        figures: JSON-ready arrays, described in docs/audit.md: "rho", "roc" (by control), "p_values", "membership" (ROC by
            attack), "prdc".
        sizes: rows and people of each side.
        suspects: (synthetic row, training row, p-value), most suspicious first. Names training rows: for internal use
            only, and not part of `to_json`.
    """

    verdict: Verdict
    reasons: list[str]
    findings: list[Finding]
    controls: list[ControlResult]
    figures: dict[str, Any]
    policy: AuditPolicy
    seed: int
    sizes: dict[str, dict[str, int]]
    suspects: list[tuple[int, int, float]] = field(default_factory=list)

    def finding(self, name: str) -> Finding:
        """The finding of this name.

        Raises:
            KeyError: there is none.
        """
        for found in self.findings:
            if found.name == name:
                return found
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """Plain dict without anything of a real person: no ids, no rows, no nearest neighbours."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "reasons": self.reasons,
            "sizes": self.sizes,
            "findings": [finding.to_json() for finding in self.findings],
            "controls": [control.to_json() for control in self.controls],
            "figures": self.figures,
            "policy": self.policy.model_dump(mode="json"),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Prepared:
    """Both real sides, searched, and every control, judged: what audits of several sets against them have in common.

    Attributes:
        train, holdout: as given; rest: the holdout without the people set aside as fresh ones.
        gates: made of train and rest. level: the strictest of the policy that their null can reach, 1 % or above.
        controls, control_scores: what was said of each control, and the search's scores of it.
        noisy, noisy_scores: the near copies that contaminated sets are made of.
    """

    train: Pool
    holdout: Pool
    rest: Pool
    gates: Gates
    level: float
    controls: list[ControlResult]
    control_scores: dict[str, Scores]
    noisy: Pool
    noisy_scores: Scores


def audit(
    train: Pool,
    holdout: Pool,
    synthetic: Pool,
    *,
    controls: Mapping[str, Pool | Planted] | None = None,
    policy: AuditPolicy | Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    judges: Sequence[Judge] = (),
    model_scores: Mapping[str, tuple[NDArray, NDArray]] | None = None,
) -> AuditResult:
    """Judge whether `synthetic` holds copies of `train`, against real people the generator has not seen.

    Args:
        train: every row the generator was trained on.
        holdout: real rows of other people from the same source. Where `controls` brings no "fresh..." pool, a share
            of these people is set aside for it.
        synthetic: the rows to be judged; its person ids group rows of one synthetic person and are not compared with
            real ones.
        controls: further planted controls by name; names that start with "fresh" must pass, all others must fail, by
            any gate or by the one that comes with it.
        policy: thresholds; a mapping is checked against AuditPolicy.
        seed: of the random subsets, controls and relabellings.
        progress: called with a short line at every stage.
        judges: further gates that need the modality; see `engine.audit.gates.Judge`.
        model_scores: membership attacks that use the model, by name: (scores of training people, scores of unseen
            people), one per person, higher is more member-like. Give them where the model leaves the building too.

    Raises:
        InputError: pools that cannot be compared, people on both sides, or too few people for any level of the policy.
    """
    policy = policy if isinstance(policy, AuditPolicy) else AuditPolicy.model_validate(dict(policy or {}))
    _check_synthetic(train, holdout, synthetic)
    prepared = prepare(train, holdout, controls=controls, policy=policy, seed=seed, progress=progress, judges=judges)
    return audit_prepared(prepared, synthetic, progress=progress, judges=judges, model_scores=model_scores)


def prepare(
    train: Pool,
    holdout: Pool,
    *,
    controls: Mapping[str, Pool | Planted] | None = None,
    policy: AuditPolicy | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    judges: Sequence[Judge] = (),
) -> Prepared:
    """Everything of an audit that does not depend on the synthetic set; arguments and errors as `audit`."""
    policy, say = policy or AuditPolicy(), progress or (lambda line: None)
    given = {name: c.pool if isinstance(c, Planted) else c for name, c in (controls or {}).items()}
    gate_of = {name: c.gate for name, c in (controls or {}).items() if isinstance(c, Planted)}
    check_alike(train, holdout, *given.values())
    if len(train) < 3:
        raise InputError("at least 3 training rows", str(len(train)), "audit")
    _check_people(train, holdout, {name: pool for name, pool in given.items() if expected_verdict(name) == "pass"})
    if not any(expected_verdict(name) == "pass" for name in given):
        given["fresh_real"], rest = planted.set_aside(holdout, policy.fresh_share, 5, seed)
    else:
        rest = holdout

    say("searching real against real")
    if rest.people < 3:
        raise InputError("3 or more holdout people behind the null", str(rest.people), "audit holdout", "a larger one")
    gates = Gates.prepare(train, rest, policy, seed, judges)
    search = gates.search
    level = gate_level(gates.null.people, policy)
    say("judging the planted controls")
    given.setdefault("copycat", planted.copycat(train, policy.control_rows, seed))
    noisy, noisy_scores = planted_copies(gates)
    given.setdefault("noisy_copycat", noisy)
    if search.runs:
        given.setdefault("mosaic_copycat", planted.mosaic(train, policy.control_rows, seed))
    results, control_scores = [], {}
    for name, pool in sorted(given.items()):
        expected = expected_verdict(name)
        control_scores[name] = search.score(pool, name)
        said = gates.judge(name, pool, control_scores[name], rest if expected == "pass" else holdout)
        gate = gate_of.get(name)
        verdict: Verdict = said.verdict
        if gate is not None:
            verdict = next((f.verdict for f in said.findings if f.name == gate), "none")
        results.append(ControlResult(name, expected, verdict, len(pool), said.findings, gate))
    return Prepared(train, holdout, rest, gates, level, results, control_scores, noisy, noisy_scores)


def audit_prepared(
    prepared: Prepared,
    synthetic: Pool,
    *,
    progress: Callable[[str], None] | None = None,
    judges: Sequence[Judge] | None = None,
    model_scores: Mapping[str, tuple[NDArray, NDArray]] | None = None,
) -> AuditResult:
    """Judge one synthetic set against sides that are prepared; as `audit`.

    Args:
        judges: where those that the sides were prepared with do not know this set: others, that decide by the same rules.
    """
    train, holdout, results = prepared.train, prepared.holdout, prepared.controls
    _check_synthetic(train, holdout, synthetic)
    gates = prepared.gates if judges is None else replace(prepared.gates, judges=judges)
    search, null = gates.search, gates.null
    policy, seed, say = search.policy, search.seed, progress or (lambda line: None)
    say("searching synthetic against training and holdout")
    scores = search.score(synthetic, "synthetic")
    judged = gates.judge("synthetic", synthetic, scores, holdout)
    findings, curves = list(judged.findings), dict(judged.curves)
    attacks = dict(model_scores or {})
    for attack, (member_n, nonmember_n) in attacks.items():
        found, curves[attack] = membership(
            member_n, nonmember_n, policy=policy, name=attack, gates=len(attacks), note="by someone who has the model"
        )
        findings += found
    say("authenticity, precision and coverage")
    described, prdc = fidelity(train, holdout, synthetic, policy=policy, seed=seed)
    findings += described
    say("contaminated sets")
    copies = (prepared.noisy, prepared.noisy_scores)
    findings.append(power_at_contamination(gates, synthetic, scores, judged, *copies, holdout))
    say("sets of honest people")
    findings.append(false_positive_rate(train, holdout, synthetic.people, policy, seed, gates.judges, judged))

    verdict, reasons = _verdict(findings, results, prepared.level)
    if verdict == "void":
        findings = [replace(f, verdict="void") if f.verdict in ("pass", "fail") else f for f in findings]
    order = np.argsort(judged.p_n, kind="stable")[:50]
    return AuditResult(
        verdict,
        reasons,
        findings,
        results,
        {**_figures(null, scores, judged.p_n, prepared.control_scores), "membership": curves, "prdc": prdc},
        policy,
        seed,
        {
            "train": {"rows": len(train), "people": train.people},
            "holdout": {"rows": len(prepared.rest), "people": prepared.rest.people},
            "null": {"rows": len(null.scores), "people": null.people},
            "synthetic": {"rows": len(synthetic), "people": synthetic.people},
        },
        [(int(i), int(scores.index_train_n[i]), float(judged.p_n[i])) for i in order],
    )


def hash_files(root: str | Path) -> list[dict[str, Any]]:
    """Path relative to `root`, bytes and SHA-256 of every file below it (or of the one file), sorted by path.

    Call it before the files are read for the audit: what is hashed is then what was judged.

    Raises:
        InputError: a symbolic link, which could change what is behind the name.
    """
    root = Path(root)
    entries = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_symlink() or p.is_file())
    listed = []
    for path in entries:
        if path.is_symlink():
            raise InputError("plain files", "a symbolic link", path)
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        name = path.name if path == root else path.relative_to(root).as_posix()
        listed.append({"path": name, "bytes": path.stat().st_size, "sha256": digest})
    return listed


def write_audit(result: AuditResult, folder: str | Path, *, audited: Iterable[Mapping[str, Any]] = ()) -> Path:
    """Write `audit.json` into `folder` and return its path.

    Args:
        audited: the files that were judged, as `hash_files` lists them; the release gate opens for exactly these bytes.
    """
    path = Path(folder) / "audit.json"
    write_json(path, {**result.to_json(), "audited": [dict(entry) for entry in audited]})
    return path


# ------------------------------------------------------------------------------------------------------------------ p


def _check_people(train: Pool, holdout: Pool, fresh: Mapping[str, Pool]) -> None:
    sides = {"train": train, "holdout": holdout, **fresh}
    names = list(sides)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            shared = np.intersect1d(sides[first].person, sides[second].person)
            if len(shared):
                shown = ", ".join(shared[:5]) + (", ..." if len(shared) > 5 else "")
                raise InputError(
                    f"different people in {first} and {second}",
                    f"{len(shared)} people in both ({shown})",
                    "audit",
                    "split by person, not by file or row",
                )


def _check_synthetic(train: Pool, holdout: Pool, synthetic: Pool) -> None:
    check_alike(train, holdout, synthetic)
    if len(synthetic) == 0:
        raise InputError("synthetic rows", "none", "audit")
    _check_views(holdout, synthetic)


def _check_views(holdout: Pool, synthetic: Pool) -> None:
    sides = (("holdout", holdout), ("synthetic", synthetic))
    count = {name: 0 if pool.views is None else len(pool.views) for name, pool in sides}
    if len(set(count.values())) > 1:
        raise InputError("as many views of each holdout row as of each synthetic row", str(count), "audit")


def _verdict(findings: list[Finding], controls: list[ControlResult], level: float) -> tuple[Verdict, list[str]]:
    wrong = [control for control in controls if not control.right]
    if wrong:
        return "void", [
            f"The control '{c.name}' should have been judged '{c.expected}'{f' by {c.gate}' if c.gate else ''} and was "
            f"judged '{c.verdict}': no verdict."
            for c in wrong
        ]
    by_name = {finding.name: finding for finding in findings}
    rate, power = by_name["audit_false_positive_rate"], by_name["power_at_contamination"]
    if rate.interval is not None and rate.threshold is not None and rate.interval[0] > rate.threshold:
        return "void", [f"{_rate(rate)} of sets of fresh real people were convicted: no verdict."]
    known = [] if rate.interval is None else [f"Of sets of fresh real people it convicts {_rate(rate)}."]
    failed = [finding for finding in findings if finding.verdict == "fail"]
    if failed:
        return "fail", [*(f"{_plain(f)}." for f in failed), *known]
    return "pass", [
        f"No finding differs from what unseen real people show at a false-positive rate of {level:.0%}, "
        f"and all {len(controls)} planted controls were judged as they must be.",
        f"Had {power.detail['contamination']:.0%} of the people been near copies, the set would have failed in "
        f"{_rate(power)} of draws.",
        *known,
    ]


def _rate(finding: Finding) -> str:
    low, high = finding.interval or (math.nan, math.nan)
    draws = finding.n["draws"] if isinstance(finding.n, dict) else finding.n
    return f"{finding.value:.0%} (95 % interval {low:.0%} to {high:.0%}, {draws} draws)"


def _plain(finding: Finding) -> str:
    value = f"{finding.value:.1%}" if finding.unit == "share" else f"{finding.value:.3g}"
    limit = "" if finding.threshold is None else f", allowed {finding.threshold:.3g}"
    return f"{finding.name} is {value}{limit} ({finding.note})"


def _figures(null: Null, scores: Scores, p_n: NDArray[np.float64], controls: Mapping[str, Scores]) -> dict[str, Any]:
    """Histograms of rho on common edges, as shares of people, and one ROC per control."""
    sets = {"real, unseen": null.scores, "synthetic": scores, **dict(controls)}
    weights = {name: person_weights(s.person_n)[0] for name, s in sets.items()} | {"real, unseen": null.weight_n}
    low, high = np.quantile(null.scores.statistic_nc[:, 0], [0.001, 0.999])
    middle = np.concatenate([null.scores.statistic_nc[:, 0], scores.statistic_nc[:, 0]])
    pad = 0.75 * (high - low) + 1e-9
    edges = np.linspace(max(middle.min(), low - pad), min(middle.max(), high + pad), _BINS + 1)
    shares = {}
    for name, s in sets.items():
        inside = np.clip(s.statistic_nc[:, 0], edges[0], edges[-1])  # what lies beyond is counted in the outer bins
        counts, _ = np.histogram(inside, edges, weights=weights[name])
        shares[name] = (counts / weights[name].sum()).round(6).tolist()
    null_rank = _combined(null, null.scores)
    curves = {}
    for name, s in {"synthetic": scores, **dict(controls)}.items():
        fpr, tpr, area = roc(null_rank, _combined(null, s))
        curves[name] = {**thin(fpr, tpr), "auc": round(area, 6)}
    return {
        "rho": {
            "edges": edges.round(6).tolist(),
            "shares": shares,
            "x_label": "log ratio of distances, training to unseen",
        },
        "roc": curves,
        "p_values": np.histogram(p_n, np.linspace(0, 1, 21))[0].tolist(),
    }


def _combined(null: Null, scores: Scores) -> NDArray[np.float64]:
    """Smallest mid-rank over the statistics within the null; with one statistic, the statistic itself."""
    if scores.statistic_nc.shape[1] == 1:
        return scores.statistic_nc[:, 0]
    ranks = []
    for column, reference in zip(scores.statistic_nc.T, null.scores.statistic_nc.T):
        ordered = np.sort(reference)
        ranks.append((np.searchsorted(ordered, column, "left") + np.searchsorted(ordered, column, "right")) / 2)
    return np.min(ranks, axis=0)
