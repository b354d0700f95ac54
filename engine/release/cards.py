"""The two pages for people that go with a release: DATA_CARD.md and MODEL_CARD.md.

Both are written from the release's manifest; the model card also from a run's own record, of which only commit, versions,
seeds and numbers of the config are taken over: file names, paths and other text of a config may name somebody.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.errors import InputError

HARMLESS = ("command", "created_utc", "commit", "modified", "seed", "versions", "synthetic_data")
FINDING = ("name", "value", "interval", "n", "floor", "threshold", "direction", "unit", "verdict", "note")
NOT_FOR = [
    "- Decisions about any person, diagnosis, or as evidence of how common a finding is in the population.",
    "- Being mixed with real data without keeping the synthetic mark.",
    "- A passing audit bounds what its searches can see at its sample sizes; it is no proof that nothing leaked.",
]


def reduced(path: Path) -> dict[str, Any]:
    """The fields of a provenance.json that name no input, no config and no path; empty where there is none."""
    if not path.is_file() or path.is_symlink():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return {key: found[key] for key in HARMLESS if key in found} if isinstance(found, dict) else {}


def model_record(run: Path) -> dict[str, Any]:
    """What a run folder may say in public: {"made", "config", "steps"}; of the config only numbers and switches.

    Raises:
        InputError: no run folder.
    """
    if not (run / "config.yaml").is_file():
        raise InputError("a run folder with config.yaml", "none", run.name, "the --out of train or fit")
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError("a config.yaml", "no YAML", run.name) from None
    steps = sorted(p.name for p in run.glob("checkpoints/step-*") if p.name.removeprefix("step-").isdigit())
    return {
        "made": reduced(run / "provenance.json"),
        "config": dict(_numbers(config)),
        "steps": int(steps[-1].removeprefix("step-")) if steps else None,
    }


def evaluation_record(folder: Path) -> dict[str, Any]:
    """{"findings", "figures"} of the folder that `engine ... evaluate --out` wrote.

    Raises:
        InputError: neither evaluation.json nor findings.json, or no findings in it.
    """
    for name in ("evaluation.json", "findings.json"):
        if (folder / name).is_file():
            try:
                found = json.loads((folder / name).read_text(encoding="utf-8"))
                findings = [{key: finding.get(key) for key in FINDING} for finding in found["findings"]]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError("findings of an evaluation", "something else", name) from None
            return {"findings": findings, "figures": found.get("figures", {})}
    raise InputError("evaluation.json or findings.json", "neither", folder.name, "engine ... evaluate --out")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and switches of a nested config by dotted name; text is left out."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, bool | int | float) or (
        isinstance(value, list) and value and all(isinstance(v, int | float) for v in value)
    ):
        yield key, value


def data_card(manifest: Mapping[str, Any]) -> str:
    """What it is, how it was judged, what it is not for."""
    audit, made = manifest["audit"], manifest["provenance"]
    total = sum(entry["bytes"] for entry in manifest["files"])
    controls = ", ".join(f"{c['name']} ({c['verdict']}, as it must)" for c in audit["controls"])
    return "\n".join(
        [
            f"# {manifest['title']}",
            "",
            f"**{manifest['mark']}**",
            "",
            *([manifest["description"], ""] if manifest["description"] else []),
            f"- Files: {len(manifest['files'])}, {total / 1e6:.1f} MB; hashes in `SHA256SUMS`",
            f"- Licence: {manifest['licence']}",
            f"- Holder: {manifest['creator']}",
            f"- Made by: engine {manifest['engine']}, commit {made.get('commit', 'unknown')}, "
            f"seed {made.get('seed', 'unknown')}",
            f"- Audit: {audit['verdict']}, on exactly these bytes (audit.json {audit['sha256'][:16]}...)",
            f"- Signed by the key {manifest['signed_by']}" if manifest["signed_by"] else "- Not signed",
            "",
            "## How to tell that a file is synthetic",
            "",
            *sorted({f"- {_kind(entry['path'])}: {_mark(entry)}" for entry in manifest["files"]}),
            "",
            "## What the audit found",
            "",
            *_table(audit["findings"]),
            "",
            f"Planted controls: {controls}." if controls else "",
            "",
            *_quality(manifest),
            "## Not for",
            "",
            *NOT_FOR,
            "",
        ]
    )


def model_card(manifest: Mapping[str, Any]) -> str:
    """What the model is, what it learned from in numbers, how it was judged, what it is for and not for.

    Args:
        manifest: with "model", made by `model_record`.
    """
    model, audit = manifest["model"], manifest["audit"]
    made = model["made"]
    sizes = [
        f"- {name}: {s.get('people', '?')} people, {s.get('rows', '?')} rows" for name, s in audit["sizes"].items()
    ]
    config = [f"- {name}: {value}" for name, value in sorted(model["config"].items())]
    return "\n".join(
        [
            f"# Model behind: {manifest['title']}",
            "",
            f"- Made by: engine, `{made.get('command', 'unknown')}`, commit {made.get('commit', 'unknown')}"
            f"{' (modified)' if made.get('modified') else ''}, seed {made.get('seed', 'unknown')}",
            f"- Date: {made.get('created_utc', 'unknown')}",
            *([f"- Training steps: {model['steps']}"] if model["steps"] is not None else []),
            f"- Versions: {', '.join(f'{k} {v}' for k, v in made.get('versions', {}).items()) or 'unknown'}",
            "- The weights are not part of this release. A model can hold more of its training people than its samples"
            " show, and the audit judged the samples.",
            "",
            "## Meant for",
            "",
            "- Developing and testing software and methods where real data cannot be used.",
            "- Teaching, and planning a study before access to real data.",
            "",
            "## Not for",
            "",
            *NOT_FOR,
            "- Groups, ages and pathologies that were rare in training: the model has little to say about them.",
            "",
            "## What it learned from",
            "",
            "Sizes as the audit saw them; who they are is not said.",
            "",
            *sizes,
            "",
            *_quality(manifest),
            "## What the audit found",
            "",
            f"Verdict: {audit['verdict']}.",
            "",
            *_table(audit["findings"]),
            "",
            "## Settings",
            "",
            "Numbers and switches of the config; text is left out.",
            "",
            *config,
            "",
        ]
    )


def _quality(manifest: Mapping[str, Any]) -> list[str]:
    findings = manifest["evaluation"]
    if not findings:
        return ["## How near to real", "", "No evaluation was given to this release.", ""]
    return ["## How near to real", "", *_table(findings), ""]


def _table(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| finding | value | 95 % interval | n | real against real | allowed | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for finding in findings:
        low_high = finding.get("interval")
        interval = "" if low_high is None or None in low_high else f"{low_high[0]:.3g} to {low_high[1]:.3g}"
        value, floor, limit = (
            "" if finding.get(key) is None else f"{finding[key]:.3g}" for key in ("value", "floor", "threshold")
        )
        n = finding.get("n")
        count = (
            ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in n.items()) if isinstance(n, Mapping) else str(n or "")
        )
        verdict = {"none": "described"}.get(str(finding["verdict"]), finding["verdict"])
        lines.append(f"| {finding['name']} | {value} | {interval} | {count} | {floor} | {limit} | {verdict} |")
    return lines


def _kind(name: str) -> str:
    suffix = name.rsplit("/", 1)[-1].split(".", 1)[-1]
    return f"`.{suffix}`"


def _mark(entry: Mapping[str, Any]) -> str:
    beside = entry.get("sidecar")
    where = "" if entry["mark"] == "sidecar" else entry["mark"]
    if beside:
        where += (", and " if where else "") + "`SyntheticData` in the JSON file beside it"
    return where
