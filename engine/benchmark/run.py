"""A whole comparison: split once, let every entrant train and sample with the same budget, score, record.

    OUT/split/               the three sides; real people, stays inside
    OUT/entries/NAME-seedK/  what each entrant left; controls hold real people too
    OUT/records.jsonl        one line per entrant and seed, failures included
    OUT/table.md             the table

Every entrant runs in a process of its own with one number of threads, so that its memory is its own and a crash or an
endless loop is a row of the table and not the end of the comparison. A run that was broken off goes on where it was: an
entrant and seed that has a record is not run again.
"""

from __future__ import annotations

import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.atomic import write_text
from engine.benchmark import records
from engine.benchmark.entrants import CONTROLS, GENOTYPE_ENTRANTS, SCAN_ENTRANTS
from engine.benchmark.entry import Entered, read_entry
from engine.benchmark.scores import score
from engine.benchmark.sides import Sides, check_files, load_sides, prepare
from engine.benchmark.table import markdown
from engine.benchmark.tracks import Track, load_track
from engine.errors import EngineError, InputError, UsageError, closest

Progress = Callable[[str, int, int], None]
SLACK = 1.1  # of the budget: a step that has begun is finished
START_SECONDS = 60.0  # what a process may take besides training: to start, and to sample
SAMPLING_SECONDS, SAMPLING_SHARE = 900.0, 3.0  # so long, or times the budget where that is more
WAITING = 30.0  # wall seconds that a second of the processor may take on a busy machine


def run(
    track_name: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    entrants: Sequence[str] = (),
    seeds: int = 3,
    budget_seconds: float | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run controls and entrants of a track and score them; see the head of this module for what is left in `out`.

    Args:
        entrants: which of the engine's own; default: those of the track. Controls always take part.
        seeds: seeds 0 .. seeds-1 of every entrant; fewer than 3 is allowed and said in the table.
        budget_seconds: training time of each; default: the track's.

    Returns:
        {"track", "scored", "failed", "records", "table"}.

    Raises:
        InputError: the data cannot be used. UsageError: an unknown entrant, or no seed.
    """
    track, out = load_track(track_name), Path(out)
    known = GENOTYPE_ENTRANTS if track.modality == "genotypes" else SCAN_ENTRANTS
    chosen = list(entrants) or [name for name in track.entrants if name not in CONTROLS]
    for name in chosen:
        if name not in known:
            raise UsageError(f"an entrant for {track.modality}", f"'{name}'", "--entrants", closest(name, list(known)))
    if seeds < 1:
        raise UsageError("at least 1 seed", str(seeds), "--seeds")
    budget = track.budget_seconds if budget_seconds is None else budget_seconds
    if not budget > 0:
        raise UsageError("a budget above 0 seconds", str(budget), "--budget-seconds")
    if (out / "split").exists():
        sides = load_sides(out / "split", track)
        if check_files(track, Path(data)) != sides.data:
            raise InputError("the data that this folder was begun with", "other data", data, "another --out")
    else:
        sides = prepare(track, data, out / "split", progress)
    path = out / "records.jsonl"
    done = {(r["name"], r["seed"]) for r in records.read(path)[0]} if path.exists() else set()
    # seed by seed, so that a run that is broken off has a row of everybody
    todo = [(name, seed) for seed in range(seeds) for name in dict.fromkeys([*CONTROLS, *chosen])]
    counts = {"scored": 0, "failed": 0}
    for at, (name, seed) in enumerate(todo):
        if (name, seed) not in done:
            record = _one(track, track_name, sides, out, name, seed, budget, threads)
            records.append(path, record)
            counts[record["status"]] += 1
        if progress is not None:
            progress(f"benchmark {track.name}", at + 1, len(todo))
    table = markdown(records.read(path)[0])
    write_text(out / "table.md", table)
    return {"track": track.name, **counts, "records": str(path), "table": table}


def score_entries(
    track_name: str | Path,
    data: str | Path,
    entries: Sequence[str | Path],
    out: str | Path,
    *,
    split: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score the folders of entrants and append one record each to `out`.

    Every entry.json is read before anything is scored: a folder that does not follow the format is refused whole. Samples
    that cannot be scored become a failed record.

    Args:
        split: where to find, or to leave, the three sides; by default they are made in a temporary folder.

    Returns:
        {"track", "scored", "failed", "records", "rows": [...]}.
    """
    import tempfile

    track = load_track(track_name)
    read = [read_entry(folder, track.name) for folder in entries]
    with tempfile.TemporaryDirectory() as temporary:
        where = Path(temporary) / "split" if split is None else Path(split)
        sides = load_sides(where, track) if where.exists() else prepare(track, data, where, progress)
        rows = []
        for at, entered in enumerate(read):
            entry = entered.entry
            made = records.base(track, sides, entry.name, entry.seed, control=False)
            record = _judged(track, sides, entered, made, measured=False, allowed=entry.budget_seconds)
            records.append(out, record)
            rows.append({key: record[key] for key in ("name", "seed", "status", "reason")})
            if progress is not None:
                progress(f"scoring {track.name}", at + 1, len(read))
    counts = {status: sum(row["status"] == status for row in rows) for status in ("scored", "failed")}
    return {"track": track.name, **counts, "records": str(out), "rows": rows}


def _one(
    track: Track, track_name: str | Path, sides: Sides, out: Path, name: str, seed: int, budget: float, threads: int
) -> dict[str, Any]:
    """Run one entrant in a process of its own and judge what it left."""
    made = records.base(track, sides, name, seed, control=name in CONTROLS)
    folder = out / "entries" / f"{name}-seed{seed}"
    if not folder.exists():  # else an earlier run was broken off between training and scoring
        command = [
            sys.executable, "-m", "engine", "benchmark", "enter", str(track_name), "--entrant", name, "--split",
            str(sides.folder), "--out", str(folder), "--seed", str(seed), "--budget-seconds", str(budget), "--threads",
            str(threads), "--json",
        ]  # fmt: skip
        limit = START_SECONDS + budget + max(SAMPLING_SECONDS, SAMPLING_SHARE * budget)
        reason = run_limited(command, limit, threads, cpu=track.budget_of == "cpu")
        if reason:
            return records.failed(made, reason, budget_seconds=budget)
    try:
        entered = read_entry(folder, track.name)
    except InputError as error:
        return records.failed(made, _plain_reason(error), budget_seconds=budget)
    return _judged(track, sides, entered, made, measured=True, allowed=budget)


def _judged(
    track: Track, sides: Sides, entered: Entered, made: dict[str, Any], *, measured: bool, allowed: float | None
) -> dict[str, Any]:
    """The record of an entry's samples: scored, or failed with the reason."""
    used = entered.entry.spent_seconds
    if allowed is not None and used > SLACK * allowed:
        return records.failed(
            made,
            f"over budget: {used:.0f} {entered.entry.budget_of} s of training, {allowed:.0f} allowed",
            budget_seconds=allowed,
        )
    try:
        return records.scored(made, entered, score(track, sides, entered.samples), measured=measured)
    except EngineError as error:
        return records.failed(made, _plain_reason(error), budget_seconds=allowed)
    except Exception as error:  # samples of a stranger must not end the comparison of all others
        said = f"scoring raised {type(error).__name__}: {_without_paths(str(error))}"
        return records.failed(made, said, budget_seconds=allowed)


def _without_paths(text: str) -> str:
    return re.sub(r"\S*/\S*", "...", " ".join(text.split()))[:300]


def _plain_reason(error: EngineError) -> str:
    """What was expected and what came; not where, which may be a path or somebody's id."""
    return f"expected {error.expected}, got {error.got}" if error.got else error.expected


def run_limited(command: Sequence[str], limit_seconds: float, threads: int, *, cpu: bool = False) -> str:
    """Run a command in its own process group; "" when it ended well, else why it did not, without paths.

    Args:
        cpu: the limit is of the processor, over all threads; of the wall it is then WAITING times as much.
    """
    few = {
        name: str(threads)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    }
    begun, wall_seconds = time.monotonic(), WAITING * limit_seconds if cpu else limit_seconds
    child = subprocess.Popen(
        list(command), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, **few},
    )  # fmt: skip
    if cpu:
        whole = math.ceil(limit_seconds)
        resource.prlimit(child.pid, resource.RLIMIT_CPU, (whole, whole + 5))
    try:
        _, errors = child.communicate(timeout=wall_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, 9)
        child.communicate()
        return f"over time: still running after {time.monotonic() - begun:.0f} s, ended"
    except BaseException:
        os.killpg(child.pid, 9)
        child.communicate()
        raise
    if child.returncode == 0:
        return ""
    if child.returncode == -signal.SIGXCPU:
        return f"over time: still running after {limit_seconds:.0f} s of the processor, ended"
    if child.returncode < 0:
        return f"ended by signal {-child.returncode}"
    last = (errors.strip().splitlines() or ["no message"])[-1]
    return f"exit code {child.returncode}: {_without_paths(last)}"
