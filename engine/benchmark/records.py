"""Records: one JSON line per entry and seed, appended and never rewritten, each carrying the hash of the line before it.

A line that was edited, removed or put between others breaks the chain, and `verify` says where. Failures are records too.
A record holds figures and hashes; nothing of a person and no path of a machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from engine import devices, provenance
from engine.benchmark.entry import Entered, Entry
from engine.benchmark.scores import POLICY, Score
from engine.benchmark.sides import Sides
from engine.benchmark.tracks import Track
from engine.errors import InputError

SCHEMA = "engine.benchmark/1"
_LOCKFILE = Path(__file__).resolve().parents[2] / "constraints.txt"
START = "0" * 64  # what the first line names as the line before


def base(track: Track, sides: Sides, name: str, seed: int, *, control: bool) -> dict[str, Any]:
    """What every record says, scored or failed."""
    return {
        "schema": SCHEMA,
        "created_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "track": track.name,
        "name": name,
        "seed": seed,
        "control": control,
        "data_sha256": sides.data_sha256,
        "data": sides.data,
        "split_sha256": sides.split_sha256,
        "train_sha256": sides.train_sha256,
        "people": sides.people,
        "units": sides.units,
        "samples_wanted": track.samples,
        "evaluation_seed": track.evaluation_seed,
        "audit_policy": POLICY.model_dump(mode="json"),
        **provenance.commit(),
        "lockfile_sha256": provenance.sha256(_LOCKFILE) if _LOCKFILE.is_file() else None,
        "versions": provenance.versions(),
        "machine": devices.machine(),
        "load_average": round(
            os.getloadavg()[0], 2
        ),  # of the last minute; above the cores, times are not to be compared
    }


def scored(made: dict[str, Any], entered: Entered, score: Score, *, measured: bool) -> dict[str, Any]:
    """The record of an entry that was scored.

    Args:
        made: of `base`.
        measured: the engine ran the entrant; else times and memory are its authors' word.
    """
    entry: Entry = entered.entry
    return {
        **made,
        "status": "scored",
        "reason": "",
        "entry": entry.model_dump(mode="json"),
        "artefact": entered.folder.name,
        "trained_on_track": entry.training_data_sha256 == made["train_sha256"],
        "cost_by": "the engine" if measured else "its authors",
        "samples_files_sha256": files_sha256(entered.files),
        "samples_content_sha256": score.content_sha256,
        "n": score.n,
        "extractor": score.extractor,
        "findings": score.findings,
        "audit": score.audit,
    }


def failed(made: dict[str, Any], reason: str, *, budget_seconds: float | None = None) -> dict[str, Any]:
    """The record of an entrant that failed, or whose samples cannot be scored."""
    return {**made, "status": "failed", "reason": reason, "budget_seconds": budget_seconds}


def files_sha256(files: list[dict[str, Any]]) -> str:
    """One hash of the files of a set of samples."""
    return hashlib.sha256("\n".join(f"{f['path']}\t{f['sha256']}" for f in files).encode()).hexdigest()


def append(path: str | Path, record: dict[str, Any]) -> None:
    """Append one record with the hash of the line before; the file is locked meanwhile and flushed to disk.

    Raises:
        InputError: the file does not end in a whole line.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        content = stream.read()
        if content and not content.endswith(b"\n"):
            raise InputError("a file of whole lines", "a last line without an end", path, "another --out")
        lines = content.splitlines()
        previous = hashlib.sha256(lines[-1]).hexdigest() if lines else START
        line = json.dumps({**record, "previous": previous}, allow_nan=False, sort_keys=True)
        stream.write(line.encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def read(path: str | Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records of a file, and the numbers (from 1) of lines whose `previous` is not the line before them.

    Raises:
        InputError: the file is absent or empty, a line is no JSON object, or it has another schema.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("a file of records", "nothing there", path)
    records, broken, previous = [], [], START
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise InputError("one JSON object a line", "other content", f"{path} line {number}") from None
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            got = record.get("schema") if isinstance(record, dict) else type(record).__name__
            raise InputError(f"a record of schema {SCHEMA}", str(got), f"{path} line {number}")
        missing = {"track", "name", "seed", "status", "data_sha256", "split_sha256", "previous"} - set(record)
        if missing:
            raise InputError("a whole record", f"no {sorted(missing)[0]}", f"{path} line {number}")
        if record["previous"] != previous:
            broken.append(number)
        previous = hashlib.sha256(line).hexdigest()
        records.append(record)
    if not records:
        raise InputError("records", "an empty file", path)
    return records, broken
