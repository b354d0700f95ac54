"""Records as a Markdown table: one row per generator, mean over seeds with two intervals, audit beside fidelity.

A cell reads `0.972 [0.969, 0.975] ± 0.005`: the mean over seeds, its 95 % t-interval over seeds, and half the width of the
95 % interval within a seed (over people or scans), averaged over seeds. Where all seeds agree, or there is one, the first
interval is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from engine.benchmark.entrants import CONTROLS
from engine.benchmark.tracks import load_track
from engine.errors import EngineError

_ARROW = {"higher": "↑", "lower": "↓", "target": "→", "none": ""}


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """Tables of all tracks in the records; of repeated records of one entrant and seed the last one counts."""
    return "\n".join(_track(name, [r for r in records if r["track"] == name]) for name in _unique(records, "track"))


def over_seeds(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean, and its 95 % t-interval; None where there is one value or all are equal."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2 or np.ptp(array) == 0:
        return mean, None
    reach = float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))
    return mean, (mean - reach, mean + reach)


def _unique(records: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(record[key] for record in records))


def _track(name: str, records: list[dict[str, Any]]) -> str:
    last = {(r["name"], r["seed"]): r for r in records}
    scored = [r for r in last.values() if r["status"] == "scored"]
    fidelity, audit = _columns(name, scored)
    declared = sorted({key for r in scored for key in r["entry"]["declared"]})
    clock = "/".join(sorted({_clock(r) for r in scored})) or "wall"
    shown = [(c, "findings") for c in fidelity] + [(c, "audit") for c in audit]
    head = [
        "generator", "seeds", *(_label(c, kind, scored) for c, kind in shown), "audit verdict",
        *(f"{key} (declared)" for key in declared), f"training {clock} s", "peak GiB",
    ]  # fmt: skip
    lines = [f"### {name}", "", *_facts(records, scored), "", _row(head), _row(["---"] * len(head))]
    names = _unique(list(last.values()), "name")
    for entrant in sorted(names, key=lambda n: (n not in CONTROLS, CONTROLS.index(n) if n in CONTROLS else 0)):
        own = [r for r in last.values() if r["name"] == entrant]
        good = [r for r in own if r["status"] == "scored"]
        bad = [r for r in own if r["status"] != "scored"]
        label = f"*{entrant}*" if own[0]["control"] else f"**{entrant}**"
        if any(not r["trained_on_track"] for r in good):
            label += " †"
        if good:
            verdicts = [r["audit"]["verdict"] for r in good]
            counted = ", ".join(f"{verdicts.count(v)} {v}" for v in ("pass", "fail", "void") if v in verdicts)
            spent = ["training_cpu_seconds" if _clock(r) == "cpu" else "training_seconds" for r in good]
            seconds = float(np.mean([r["entry"][key] for r, key in zip(good, spent, strict=True)]))
            memory = max(r["entry"]["peak_memory_bytes"] for r in good) / 2**30
            cells = [_cell([_finding(r, c, kind) for r in good]) for c, kind in shown]
            told = [_plain([r["entry"]["declared"].get(key) for r in good]) for key in declared]
            lines.append(_row([label, f"{len(good)}", *cells, counted, *told, _number(seconds), _number(memory, 2)]))
        for reason in dict.fromkeys(r["reason"] for r in bad):
            seeds = [str(r["seed"]) for r in bad if r["reason"] == reason]
            text = reason.replace("|", "/")
            lines.append(_row([label, f"{len(seeds)} failed", text, *[""] * (len(head) - 3)]))
    if any("†" in line for line in lines):
        lines += ["", "† trained on other data than the track's training side: its audit says nothing of what it saw."]
    return "\n".join([*lines, ""])


def _columns(name: str, scored: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """The track's columns; for a track that is not at hand, every finding that has a direction."""
    try:
        track = load_track(name)
        return track.columns, track.audit_columns
    except EngineError:
        found = [f["name"] for r in scored[:1] for f in r["findings"] if f["direction"] != "none"]
        return found, ["copy_share_at_1_percent"]


def _facts(records: list[dict[str, Any]], scored: list[dict[str, Any]]) -> list[str]:
    first = records[0]
    people = ", ".join(f"{first['people'][side]} {side}" for side in ("train", "test", "fresh"))
    budgets = sorted({(r["entry"]["budget_seconds"], _clock(r)) for r in scored if r["entry"]["budget_seconds"]})
    machines = _unique([{"m": f"{r['machine']['cpu']}, {r['machine']['memory_gib']} GiB"} for r in records], "m")
    commits = _unique([{"c": r["commit"][:12] + ("+" if r.get("modified") else "")} for r in records], "c")
    threads = sorted({r["entry"]["threads"] for r in scored})
    return [
        f"People: {people}; n of each entry: {first['samples_wanted']}; data {first['data_sha256'][:12]}, split "
        f"{first['split_sha256'][:12]}. Budget: {', '.join(f'{b:g} {c}' for b, c in budgets) or 'none'} s of training, "
        f"{', '.join(map(str, threads)) or '?'} thread(s). Machine: {'; '.join(machines)}. Commit {', '.join(commits)}."
    ]


def _clock(record: dict[str, Any]) -> str:
    """What the budget of a record counts; the first records count the wall and do not say so."""
    return str(record["entry"].get("budget_of", "wall"))


def _finding(record: dict[str, Any], name: str, kind: str) -> dict[str, Any] | None:
    findings = record["findings"] if kind == "findings" else record["audit"]["findings"]
    return next((f for f in findings if f["name"] == name), None)


def _label(name: str, kind: str, scored: list[dict[str, Any]]) -> str:
    found = next((f for r in scored if (f := _finding(r, name, kind))), None)
    if found is None:
        return name
    arrow = _ARROW[found["direction"]]
    aim = f"{found['threshold']:g}" if found["direction"] == "target" and found["threshold"] is not None else ""
    return " ".join(part for part in (f"audit: {name}" if kind == "audit" else name, arrow + aim) if part)


def _cell(findings: list[dict[str, Any] | None]) -> str:
    values = [f["value"] for f in findings if f is not None and f["value"] is not None]
    if not values:
        return "not given"
    mean, interval = over_seeds(values)
    text = _number(mean)
    if interval is not None:
        text += f" [{_number(interval[0])}, {_number(interval[1])}]"
    halves = [
        (f["interval"][1] - f["interval"][0]) / 2
        for f in findings
        if f is not None and f["interval"] and None not in f["interval"]
    ]
    return text + (f" ± {_number(float(np.mean(halves)), 2)}" if halves else "")


def _number(x: float, digits: int = 3) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.{digits}g}"


def _plain(values: list[float | None]) -> str:
    given = [value for value in values if value is not None]
    if not given:
        return "none"
    mean, interval = over_seeds(given)
    return f"{mean:.4g}" + ("" if interval is None else f" [{interval[0]:.4g}, {interval[1]:.4g}]")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
