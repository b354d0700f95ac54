"""Recompute what records say, from the data and the entries' samples, and name everything that differs.

Checked: the chain of lines; the hashes of data, split and training side; entry.json; the hash of the samples; the value,
interval and verdict of every finding and of the audit. Where the samples are not at hand, `remake` runs the engine's own
entrant again with its seed: entrants without a clock in them give the same samples, and are checked like the rest.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.benchmark import records
from engine.benchmark.entrants import GENOTYPE_ENTRANTS, SCAN_ENTRANTS, enter
from engine.benchmark.entry import Entered, read_entry
from engine.benchmark.scores import content_sha256, score
from engine.benchmark.sides import Sides, prepare
from engine.benchmark.tracks import Track, load_track
from engine.errors import EngineError, UsageError

Progress = Callable[[str, int, int], None]
TOLERANCE = 1e-6  # relative; sums of floats come out a little differently on another processor
_LATER_KEYS = {"training_cpu_seconds": None, "budget_of": "wall"}  # that the first records do not have
_EQUAL = ("verdict", "direction", "unit", "n")


def verify(
    path: str | Path,
    data: str | Path,
    *,
    entries: str | Path | None = None,
    track_file: str | Path | None = None,
    remake: bool = False,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check every record of a file.

    Args:
        entries: folder of the entries' folders; default `entries` beside the records.
        track_file: YAML of a track that is not a standard one.
        remake: run the engine's own entrant again where its samples are not at hand.

    Returns:
        {"records", "verified", "differences": [{"line", "what", "recorded", "recomputed"}], "not_checked": [{"line",
        "why"}], "head": hash of the last line}. A record is verified when all of it was recomputed and nothing differs.

    Raises:
        InputError: the records or the data cannot be read at all.
    """
    path = Path(path)
    made, broken = records.read(path)
    where = path.parent / "entries" if entries is None else Path(entries)
    differences: list[dict[str, Any]] = [
        {"line": line, "what": "chain", "recorded": "another line before it", "recomputed": "the line that is there"}
        for line in broken
    ]
    not_checked: list[dict[str, Any]] = []
    wrong, unsure = {d["line"] for d in differences}, set()
    with tempfile.TemporaryDirectory() as temporary:
        prepared: dict[str, tuple[Track, Sides] | str] = {}
        for at, record in enumerate(made, start=1):
            name = record["track"]
            if name not in prepared:
                prepared[name] = _prepare(name, track_file, Path(data), Path(temporary) / f"split-{len(prepared)}")
            ready = prepared[name]
            if isinstance(ready, str):
                not_checked.append({"line": at, "why": ready})
                unsure.add(at)
                continue
            try:
                found, why = _check(record, *ready, where, Path(temporary) / f"remade-{at}", remake, tolerance)
            except (KeyError, TypeError, ValueError) as error:  # whoever edits a record may leave anything in it
                found, why = [{"what": "record", "recorded": f"not whole: {error}", "recomputed": "a whole record"}], ""
            differences += [{"line": at, **each} for each in found]
            wrong |= {at} if found else set()
            if why:
                not_checked.append({"line": at, "why": why})
                unsure.add(at)
            if progress is not None:
                progress("verifying", at, len(made))
    verified = sum(line not in wrong and line not in unsure for line in range(1, len(made) + 1))
    return {
        "records": len(made), "verified": verified, "differences": differences, "not_checked": not_checked,
        "head": hashlib.sha256(path.read_bytes().splitlines()[-1]).hexdigest(),
    }  # fmt: skip


def _prepare(name: str, track_file: str | Path | None, data: Path, out: Path) -> tuple[Track, Sides] | str:
    try:
        track = load_track(name if track_file is None else track_file)
        if track.name != name:
            return f"the track file is of '{track.name}'"
        return track, prepare(track, data, out)
    except EngineError as error:
        return f"track {name}: {error}"


def _check(
    record: dict[str, Any], track: Track, sides: Sides, entries: Path, remade: Path, remake: bool, tolerance: float
) -> tuple[list[dict[str, Any]], str]:
    """Differences of one record, and why some of it was not checked ("" where all was)."""
    found = [
        {"what": key, "recorded": record.get(key), "recomputed": getattr(sides, key)}
        for key in ("data_sha256", "split_sha256", "train_sha256", "people", "units")
        if record.get(key) != getattr(sides, key)
    ]
    if record["status"] != "scored":
        return found, ""  # a failure has no artefact; its data and split were compared
    try:
        entered, again, why = _find(record, track, sides, entries, remade, remake)
        if entered is None:
            return found, why
        if again:
            content = content_sha256(track, entered.samples)
            if content != record["samples_content_sha256"]:
                seeded = {"what": "samples", "recorded": record["samples_content_sha256"], "recomputed": content}
                return [*found, seeded], "samples made again differ: trained by the clock, or on another machine"
        else:
            told = entered.entry.model_dump(mode="json")
            found += _differ("entry", {**_LATER_KEYS, **record["entry"]}, told)
            files = records.files_sha256(entered.files)
            if files != record["samples_files_sha256"]:
                found.append({"what": "samples files", "recorded": record["samples_files_sha256"], "recomputed": files})
        scored = score(track, sides, entered.samples)
    except EngineError as error:
        return [*found, {"what": "samples", "recorded": "scored", "recomputed": str(error)}], ""
    if scored.content_sha256 != record["samples_content_sha256"]:
        found.append(
            {"what": "samples", "recorded": record["samples_content_sha256"], "recomputed": scored.content_sha256}
        )
    found += _differ("n", record["n"], scored.n)
    found += _differ("extractor", record["extractor"], scored.extractor)
    found += _compare("", record["findings"], scored.findings, tolerance)
    found += _compare("audit ", record["audit"]["findings"], scored.audit["findings"], tolerance)
    found += _differ("audit verdict", record["audit"]["verdict"], scored.audit["verdict"])
    known = {control["name"] for control in record["audit"]["controls"]}  # others were planted since
    controls = [control for control in scored.audit["controls"] if control["name"] in known]
    found += _differ("audit controls", record["audit"]["controls"], controls)
    return found, ""


def _find(
    record: dict[str, Any], track: Track, sides: Sides, entries: Path, remade: Path, remake: bool
) -> tuple[Entered | None, bool, str]:
    """The entry of a record, whether it was made again, and why there is none."""
    folder = entries / Path(str(record["artefact"])).name
    if folder.is_dir():
        return read_entry(folder, track.name), False, ""
    known = GENOTYPE_ENTRANTS if track.modality == "genotypes" else SCAN_ENTRANTS
    if not remake or record["cost_by"] != "the engine" or record["name"] not in known:
        return None, False, "samples are not here"
    try:
        enter(
            track.model_copy(update={"budget_of": record["entry"].get("budget_of", "wall")}), record["name"], sides, remade,
            seed=record["seed"], budget_seconds=record["entry"]["budget_seconds"] or track.budget_seconds,
        )  # fmt: skip
    except UsageError as error:
        return None, False, str(error)
    return read_entry(remade, track.name), True, ""


def _differ(what: str, recorded: Any, recomputed: Any) -> list[dict[str, Any]]:
    return [] if recorded == recomputed else [{"what": what, "recorded": recorded, "recomputed": recomputed}]


def _compare(
    kind: str, recorded: list[dict[str, Any]], recomputed: list[dict[str, Any]], tolerance: float
) -> list[dict[str, Any]]:
    """Findings by name: presence, value, interval, floor, threshold and what has to be equal."""
    ours = {finding["name"]: finding for finding in recorded}
    theirs = {finding["name"]: finding for finding in recomputed}
    found = []
    for name in sorted(set(ours) ^ set(theirs)):
        here, there = name in ours, name in theirs
        found.append({"what": f"{kind}{name}", "recorded": "given" if here else "absent",
                      "recomputed": "given" if there else "absent"})  # fmt: skip
    for name in [name for name in ours if name in theirs]:
        a, b = ours[name], theirs[name]
        for key in ("value", "floor", "threshold"):
            if not _near(a[key], b[key], tolerance):
                found.append({"what": f"{kind}{name} {key}", "recorded": a[key], "recomputed": b[key]})
        sides = (a["interval"] or [None, None], b["interval"] or [None, None])
        if not all(_near(x, y, tolerance) for x, y in zip(*sides, strict=True)):
            found.append({"what": f"{kind}{name} interval", "recorded": a["interval"], "recomputed": b["interval"]})
        for key in _EQUAL:
            found += _differ(f"{kind}{name} {key}", a[key], b[key])
    return found


def _near(a: float | None, b: float | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance * 1e-3)
