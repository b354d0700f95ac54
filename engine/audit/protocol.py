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
from engine.audit.adversarial_accuracy import privacy_loss
from engine.audit.controls import ControlResult, expected_verdict
from engine.audit.copies import CopySearch, Null, Scores
from engine.audit.findings import Finding, Verdict
from engine.audit.intervals import clopper_pearson, person_weights, roc
from engine.audit.judge import Judgement, copy_share, gate_level, judge
from engine.audit.policy import AuditPolicy
from engine.audit.pools import Pool, check_alike
from engine.errors import InputError
from engine.seeding import generator

SCHEMA = "engine.audit/1"
_BINS = 40

# What only one modality can measure (kinship, registered correlation): called once with ("synthetic", rows, scores) and
# once for every control with its name. Its findings join those of that set, and gated ones count in its verdict like
# any other. It decides by one rule for all sets, calibrated on holdout against train, and returns [] where it has
# nothing to say.
Judge = Callable[[str, Pool, Scores], list[Finding]]


@dataclass(frozen=True)
class AuditResult:
    """Verdict of an audit and everything it rests on.

    Attributes:
        verdict: "pass", "fail", or "void" when a control was not judged as it must be.
        reasons: one plain sentence for each thing that decided the verdict.
        findings: on the synthetic rows, then the power figures.
        controls: what was planted and what the audit said of it.
        figures: JSON-ready arrays: "rho" (histograms), "roc" (by control).
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


def audit(
    train: Pool,
    holdout: Pool,
    synthetic: Pool,
    *,
    controls: Mapping[str, Pool] | None = None,
    policy: AuditPolicy | Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    judges: Sequence[Judge] = (),
) -> AuditResult:
    """Judge whether `synthetic` holds copies of `train`, against real people the generator has not seen.

    Args:
        train: every row the generator was trained on.
        holdout: real rows of other people from the same source. Where `controls` brings no "fresh..." pool, a share
            of these people is set aside for it.
        synthetic: the rows to be judged; its person ids group rows of one synthetic person and are not compared with
            real ones.
        controls: further planted controls by name; names that start with "fresh" must pass, all others must fail.
        policy: thresholds; a mapping is checked against AuditPolicy.
        seed: of the random subsets, controls and relabellings.
        progress: called with a short line at every stage.
        judges: further gates that need the modality; see `Judge`.

    Raises:
        InputError: pools that cannot be compared, people on both sides, or too few people for any level of the policy.
    """
    policy = policy if isinstance(policy, AuditPolicy) else AuditPolicy.model_validate(dict(policy or {}))
    say = progress or (lambda line: None)
    given = dict(controls or {})
    check_alike(train, holdout, synthetic, *given.values())
    if len(synthetic) == 0 or len(train) < 3:
        raise InputError("synthetic rows, and at least 3 training rows", f"{len(synthetic)} and {len(train)}", "audit")
    _check_people(train, holdout, {name: pool for name, pool in given.items() if expected_verdict(name) == "pass"})
    _check_views(holdout, synthetic)
    if not any(expected_verdict(name) == "pass" for name in given):
        given["fresh_real"], rest = planted.set_aside(holdout, policy.fresh_share, 5, seed)
    else:
        rest = holdout

    say("searching real against real")
    if rest.people < 3:
        raise InputError("3 or more holdout people behind the null", str(rest.people), "audit holdout", "a larger one")
    search = CopySearch(train, rest, policy, seed)
    null = search.null()
    level = gate_level(null.people, policy)

    say("searching synthetic against training and holdout")
    scores = search.score(synthetic, "synthetic")
    judged = judge(search, null, scores)
    say("adversarial accuracy")
    findings = [*judged.findings, *_aats(train, holdout, synthetic, policy, seed)]
    findings += [finding for more in judges for finding in more("synthetic", synthetic, scores)]

    say("judging the planted controls")
    noisy = planted.noisy_copycat(train, policy.control_rows, policy.control_noise, search.typical_distance, seed)
    given.setdefault("copycat", planted.copycat(train, policy.control_rows, seed))
    given.setdefault("noisy_copycat", noisy)
    if search.runs:
        given.setdefault("mosaic_copycat", planted.mosaic(train, policy.control_rows, seed))
    results, control_scores = [], {}
    for name, pool in sorted(given.items()):
        control_scores[name] = search.score(pool, name)
        said = judge(search, null, control_scores[name]).findings
        said += [finding for more in judges for finding in more(name, pool, control_scores[name])]
        verdict: Verdict = "fail" if any(finding.verdict == "fail" for finding in said) else "pass"
        results.append(ControlResult(name, expected_verdict(name), verdict, len(pool), said))
    findings.append(_power(null, search.score(noisy, "contamination"), synthetic, policy, seed))

    verdict, reasons = _verdict(findings, results, level)
    if verdict == "void":
        findings = [replace(f, verdict="void") if f.verdict in ("pass", "fail") else f for f in findings]
    order = np.argsort(judged.p_n, kind="stable")[:50]
    return AuditResult(
        verdict,
        reasons,
        findings,
        results,
        _figures(null, scores, judged, control_scores),
        policy,
        seed,
        {
            "train": {"rows": len(train), "people": train.people},
            "holdout": {"rows": len(rest), "people": rest.people},
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


def _check_views(holdout: Pool, synthetic: Pool) -> None:
    sides = (("holdout", holdout), ("synthetic", synthetic))
    count = {name: 0 if pool.views is None else len(pool.views) for name, pool in sides}
    if len(set(count.values())) > 1:
        raise InputError("as many views of each holdout row as of each synthetic row", str(count), "audit")


def _aats(train: Pool, holdout: Pool, synthetic: Pool, policy: AuditPolicy, seed: int) -> list[Finding]:
    if min(len(holdout), len(synthetic)) < 10:
        note = "not given: needs 10 rows on every side"
        return [Finding(name, math.nan, note=note) for name in ("aats_test", "aats_train", "privacy_loss")]
    test, same, loss = privacy_loss(train, holdout, synthetic, seed=seed, rows=policy.aats_rows)
    copying = same.interval is not None and same.interval[1] < policy.aats_train_min
    leaking = loss.interval is not None and loss.interval[0] > policy.privacy_loss_max
    return [
        replace(test, calibrated_on="equal n"),
        replace(
            same,
            calibrated_on="equal n",
            threshold=policy.aats_train_min,
            direction="higher",
            verdict="fail" if copying else "pass",
        ),
        replace(
            loss, calibrated_on="equal n", threshold=policy.privacy_loss_max, verdict="fail" if leaking else "pass"
        ),
    ]


def _power(null: Null, copies: Scores, synthetic: Pool, policy: AuditPolicy, seed: int) -> Finding:
    """How often a set of this size with a share of noisy copies would be convicted, by the flagged share alone.

    Each draw mixes p-values of noisy copies with p-values of the null, so that the honest part is honest by
    construction.
    """
    p_copies, p_null = null.p_values(copies), null.p_values(null.scores)
    chance_null = null.weight_n / null.weight_n.sum()
    people = synthetic.people
    planted_rows = max(1, round(policy.contamination * people))
    rng, convicted = generator(seed, "audit.contamination"), 0
    nobody_twice = np.arange(people).astype(str)
    for _ in range(policy.contamination_repeats):
        p_n = rng.choice(p_null, people, p=chance_null)
        p_n[:planted_rows] = rng.choice(p_copies, planted_rows)
        convicted += any(
            copy_share(null, p_n, nobody_twice, None, level, policy).verdict == "fail" for level in policy.levels
        )
    return Finding(
        name="power_at_contamination",
        value=convicted / policy.contamination_repeats,
        interval=clopper_pearson(convicted, policy.contamination_repeats),
        n={"people": people, "draws": policy.contamination_repeats},
        calibrated_on=f"{planted_rows} noisy copies among {people}",
        direction="higher",
        unit="share",
        note=f"chance that {policy.contamination:.0%} of near copies in a set of this size would be seen",
        detail={"contamination": planted_rows / people, "noise": policy.control_noise},
    )


def _verdict(findings: list[Finding], controls: list[ControlResult], level: float) -> tuple[Verdict, list[str]]:
    wrong = [control for control in controls if not control.right]
    if wrong:
        return "void", [
            f"The control '{c.name}' should have been judged '{c.expected}' and was judged '{c.verdict}': no verdict."
            for c in wrong
        ]
    failed = [finding for finding in findings if finding.verdict == "fail"]
    if failed:
        return "fail", [f"{_plain(f)}." for f in failed]
    return "pass", [
        f"No finding differs from what unseen real people show at a false-positive rate of {level:.0%}, "
        f"and all {len(controls)} planted controls were judged as they must be."
    ]


def _plain(finding: Finding) -> str:
    value = f"{finding.value:.1%}" if finding.unit == "share" else f"{finding.value:.3g}"
    limit = "" if finding.threshold is None else f", allowed {finding.threshold:.3g}"
    return f"{finding.name} is {value}{limit} ({finding.note})"


def _figures(null: Null, scores: Scores, judged: Judgement, controls: Mapping[str, Scores]) -> dict[str, Any]:
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
        keep = np.unique(np.linspace(0, len(fpr) - 1, 200).round().astype(int))
        curves[name] = {"fpr": fpr[keep].round(6).tolist(), "tpr": tpr[keep].round(6).tolist(), "auc": round(area, 6)}
    return {
        "rho": {
            "edges": edges.round(6).tolist(),
            "shares": shares,
            "x_label": "log ratio of distances, training to unseen",
        },
        "roc": curves,
        "p_values": np.histogram(judged.p_n, np.linspace(0, 1, 21))[0].tolist(),
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
