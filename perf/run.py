"""`perf run`: finds the cases, measures the machine, runs each case in a child, and keeps a record of each.

Everything is a record: a case that raises, one that the budget left no time for, a bench file that does not load. The
process here only waits, so that it takes nothing from what is measured.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf import child, find, statistics
from perf import record as records
from perf.peers import cache_folder
from perf.record import Bench, Fit, PeerRecord, Record
from perf.words import in_words, limits_in_words

_PACKAGES = ("numpy", "numba", "llvmlite", "torch", "triton", "scipy")
_CASE_SECONDS, _LONG_CASE_SECONDS = 300.0, 3600.0
_CACHES_KEPT = 4
LEAST_REPEATS = 5


@dataclass(frozen=True)
class Wanted:
    """What to run; `root` holds perf/ and engine/. limits: measure the machine first. repeats: None takes the case's own, at
    least LEAST_REPEATS."""

    root: Path
    pattern: str | None = None
    peers: bool = False
    everything: bool = False
    curves: bool = False
    limits: bool = True
    repeats: int | None = None
    budget_seconds: float | None = None
    case_seconds: float | None = None


def run(wanted: Wanted, history: Path, tell: Callable[[str], None]) -> Path:
    """Run what is wanted and return the new file of records.

    Raises:
        LookupError: no case matches.
    """
    begin = time.monotonic()
    root = wanted.root.resolve()
    commit, dirty = records.state_of(root)
    machine = records.describe_machine()
    now = time.gmtime()
    run_name = f"{time.strftime('%Y%m%dT%H%M%SZ', now)}-{commit[:7]}"
    common: dict[str, Any] = {
        "schema": records.SCHEMA, "run": run_name, "commit": commit, "dirty": dirty, "machine": machine,
        "versions": _versions(),
    }  # fmt: skip
    cache = numba_cache(root)

    with tempfile.TemporaryDirectory(prefix="engine-perf-") as scratch:
        folder = Path(scratch)
        todo, broken, left_out = _select(wanted, root, folder, cache)
        if not todo and not broken:
            raise LookupError(
                f"no case matches {wanted.pattern!r}" + (f" ({left_out} only with --all)" if left_out else "") if wanted.pattern
                else f"no cases in {root.name}/perf/**/bench_*.py"
            )  # fmt: skip
        log = records.Log(history, machine["name"], run_name)

        def keep(**fields: Any) -> Record:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            made = Record.model_validate({**common, "id": log.next_id(), "time": stamp, **fields})
            log.append(made)
            return made

        for bench, why in broken:
            keep(kind="file", status="failed", why=why, key=bench.path, case=bench.path, bench=bench)
            tell(f"{bench.path}: {why}")
        limits: dict[int, dict[str, float | None]] = {}
        for threads in sorted({item.case["threads"] for item in todo}):
            if not wanted.limits:
                limits[threads] = {}
                continue
            limits[threads], libraries, why = measure_limits(threads, root, folder, cache)
            keep(
                kind="limits", status="failed" if why else "ok", why=why, key=f"limits@{threads}", case="limits",
                threads=threads, limits=limits[threads], libraries=libraries,
            )  # fmt: skip
            tell(f"limits of {threads} thread{'s' * (threads > 1)}: {why or limits_in_words(limits[threads])}")
        if left_out:
            tell(f"{left_out} cases are left out (--all)")

        points: dict[str, list[Record]] = {}
        for item in todo:
            spent = time.monotonic() - begin
            if wanted.budget_seconds is not None and spent > wanted.budget_seconds:
                fields = {"status": "not run", "why": f"the budget of {wanted.budget_seconds:.0f} s was spent"}
            else:
                seconds = wanted.case_seconds or (_CASE_SECONDS if item.case["quick"] else _LONG_CASE_SECONDS)
                if wanted.budget_seconds is not None:  # the last case may overdraw by a minute, no more
                    seconds = min(seconds, wanted.budget_seconds - spent + 60)
                fields = _measured(item, wanted, root, folder, cache, limits[item.case["threads"]], seconds)
            made = keep(**_described(item), limits=limits[item.case["threads"]], **fields)
            tell(in_words(made))
            if item.curve is not None:
                points.setdefault(item.curve, []).append(made)
        for curve, made_points in points.items():
            axis = next(item.axis for item in todo if item.curve == curve)
            tell(in_words(keep(**fitted(curve, str(axis), made_points))))
    return log.path


@dataclass(frozen=True)
class _Item:
    case: dict[str, Any]
    bench: Bench
    file: Path
    curve: str | None = None
    axis: str | None = None


def _select(wanted: Wanted, root: Path, folder: Path, cache: Path) -> tuple[list[_Item], list[tuple[Bench, str]], int]:
    """Cases that match, curves last; bench files that do not load; how many cases only --all would run.

    A budget may end before the last ones: those with a goal come first, then those of ours alone, which cost little.
    """
    items: list[_Item] = []
    curved: list[_Item] = []
    broken = []
    left_out = 0
    for file in find.bench_files(root):
        bench = records.bench_of(root, file)
        listing = ask(["list", str(file)], threads=1, code=root, folder=folder, cache=cache, seconds=120)
        if "why" in listing:
            broken.append((bench, listing["why"]))
            continue
        for case in listing["cases"]:
            if not find.matches(wanted.pattern, case["key"]) and not find.matches(wanted.pattern, case["name"]):
                continue
            if case["quick"] or wanted.everything:
                items.append(_Item(case, bench, file))
            else:
                left_out += 1
        for name, curve in listing["curves"].items() if wanted.curves else ():
            if find.matches(wanted.pattern, name):
                curved += [_Item(case, bench, file, name, curve["axis"]) for case in curve["points"]]
    promised = lambda item: any(goal is not None for goal in item.case["goals"].values())  # noqa: E731
    items.sort(key=lambda item: (not promised(item), len(item.case["goals"]) > 0))
    return items + curved, broken, left_out


def ask(
    arguments: list[str], *, threads: int, code: Path, folder: Path, cache: Path | None, seconds: float
) -> dict[str, Any]:
    """The answer of one child; {"why": ...} where it died or ran past `seconds`."""
    with tempfile.TemporaryFile() as errors:
        process = child.start(arguments, threads=threads, code=code, folder=folder, numba_cache=cache, errors=errors)
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the programs that it started as well
            process.communicate()
            return {"why": f"ran past {seconds:.0f} s"}
        except BaseException:  # an interrupt reaches only this process: the child is in a session of its own
            os.killpg(process.pid, signal.SIGKILL)
            raise
        lines = said.strip().splitlines()
        if process.returncode == 0 and lines:
            return dict(json.loads(lines[-1]))
        errors.seek(0)
        last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
    return {"why": " ".join([f"exit {process.returncode}:", *last])[:300]}


def _described(item: _Item) -> dict[str, Any]:
    """What a record says of a case before it has run."""
    case = item.case
    plain = ("size", "work", "unit", "floor_bytes", "floor_ops", "limit", "threads", "key")
    return {
        **{name: case[name] for name in plain}, "kind": "case", "case": case["name"], "curve": item.curve,
        "clock": "cpu" if case["threads"] == 1 else "wall", "bench": item.bench,
    }  # fmt: skip


def _measured(
    item: _Item,
    wanted: Wanted,
    root: Path,
    folder: Path,
    cache: Path,
    limits: dict[str, float | None],
    limit_seconds: float,
) -> dict[str, Any]:
    """Run a case in a child: the fields of its record that only the run can tell."""
    case = item.case
    repeats = wanted.repeats or max(LEAST_REPEATS, case["repeats"])
    arguments = ["case", str(item.file), case["key"], "--repeats", str(repeats)]
    if wanted.peers and item.curve is None:
        arguments.append("--peers")
    told = ask(arguments, threads=case["threads"], code=root, folder=folder, cache=cache, seconds=limit_seconds)
    if "why" in told:
        return {"status": "failed", "why": told["why"]}
    ours = told["ours"]
    seconds = statistics.spread(ours["seconds"])
    return {
        "status": "ok",
        "seconds": seconds,
        "rate": statistics.rates(case["work"], ours["seconds"]),
        "peak_bytes": ours["peak_bytes"],
        "copy_share": _share(case["floor_bytes"], seconds["p50"], limits.get("copy")),
        "limit_share": _share(case["floor_ops"], seconds["p50"], limits.get(case["limit"])),
        "peers": [_peer(row, ours["seconds"], case["goals"], told["versions"]) for row in told["peers"]],
        "libraries": told["libraries"],
    }


def _share(floor: float, seconds: float, limit: float | None) -> float | None:
    return floor / seconds / limit if floor and limit else None


def _peer(
    row: dict[str, Any], ours: list[float], goals: dict[str, float | None], versions: dict[str, str]
) -> PeerRecord:
    made: dict[str, Any] = {name: row[name] for name in ("name", "status", "why", "compared", "note")}
    made["version"], made["goal"] = versions.get(row["name"]), goals.get(row["name"])
    if row["status"] in ("ok", "differs"):
        ratio = statistics.paired_ratio(row["seconds"], ours)
        made |= {"seconds": statistics.spread(row["seconds"]), "ratio": ratio, "peak_bytes": row["peak_bytes"]}
        if made["goal"] is not None:
            made["met"] = row["status"] == "ok" and ratio["p50"] >= made["goal"]
    return PeerRecord.model_validate(made)


def fitted(curve: str, axis: str, points: list[Record]) -> dict[str, Any]:
    """Fields of the record that says how the cost of a curve grows."""
    fields: dict[str, Any] = {
        "kind": "exponent", "key": curve, "case": curve, "curve": curve, "bench": points[0].bench,
        "threads": points[0].threads, "clock": points[0].clock,
    }  # fmt: skip
    good = [point for point in points if point.seconds is not None]
    if len(good) < 3:
        return {
            **fields,
            "status": "not run",
            "why": f"{len(good)} of {len(points)} points were measured, 3 are needed",
        }
    fit = statistics.fit_exponent([p.size[axis] for p in good], [p.seconds.p50 for p in good if p.seconds])
    return {
        **fields, "status": "ok",
        "fit": Fit(axis=axis, exponent=fit.value, low=fit.low, high=fit.high, points=[point.id for point in good]),
    }  # fmt: skip


def measure_limits(
    threads: int, code: Path, folder: Path, cache: Path
) -> tuple[dict[str, float | None], list[dict[str, Any]], str]:
    """Limits of the machine for `threads` threads from a process of its own, the libraries it used, and why it failed."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "perf.limits", str(threads)],
        env=child.environment(threads, code, cache), cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode != 0:
        return {}, [], " ".join(done.stderr.strip().splitlines()[-1:])[:300]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    return told["limits"], told["libraries"], ""


def numba_cache(root: Path) -> Path:
    """A folder for Numba's cache that belongs to exactly this source: its own does not see a change in another file."""
    hasher = hashlib.sha256(importlib.metadata.version("numba").encode())
    for path in sorted((root / "engine").rglob("*.py")):
        hasher.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    parent = cache_folder() / "numba"
    chosen = parent / hasher.hexdigest()[:16]
    chosen.mkdir(parents=True, exist_ok=True)
    os.utime(chosen)
    for old in sorted(parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-_CACHES_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return chosen


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
