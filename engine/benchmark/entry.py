"""The entry format: a folder with samples and `entry.json`, so that any tool in any language can enter.

Nothing in it is trusted: keys are checked strictly, the path of the samples must lie inside the folder, and links are
refused. What the samples are worth is left to `scores`.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from engine.atomic import write_json
from engine.audit import hash_files
from engine.errors import InputError, closest

ENTRY_FILE = "entry.json"
_LARGEST_BYTES = 1 << 20  # of entry.json
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,39}$")]


class Entry(BaseModel):
    """What an entrant says of itself; times and memory are the authors' word unless the engine ran the entrant.

    Attributes:
        name, version, authors: of the generator.
        track: name of the track it was made for.
        seed: of training and sampling; one entry is one seed.
        recipe: command or recipe that made the samples.
        training_data_sha256: content hash of what it was trained on; that of the track's training side is in the
            `split.json` that `engine benchmark split` writes.
        training_seconds, sampling_seconds: wall time.
        training_cpu_seconds: time of all processors in training; null where it was not measured.
        budget_seconds: time of training that was allowed; null where none was set.
        budget_of: what the budget counts, "cpu" or "wall" seconds.
        tuning_trials: configurations tried on this track before this one was chosen.
        peak_memory_bytes: largest resident memory of the process.
        hardware, threads, precision: what it ran on and in.
        samples: file (.vcf.gz, .bcf, .pgen) or folder (NIfTI with volumes.csv), relative to the entry's folder.
        declared: figures that cannot be computed from samples, e.g. {"test_nats": -176.1}; shown as declared.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Name
    version: Text
    authors: list[Text] = Field(min_length=1)
    track: Name
    seed: int = Field(ge=0)
    recipe: Text
    training_data_sha256: Sha256
    training_seconds: float = Field(ge=0)
    sampling_seconds: float = Field(0.0, ge=0)
    training_cpu_seconds: float | None = Field(None, ge=0)
    budget_seconds: float | None = Field(None, gt=0)
    budget_of: Literal["wall", "cpu"] = "wall"
    tuning_trials: int = Field(ge=0)
    peak_memory_bytes: int = Field(ge=0)
    hardware: Text
    threads: int = Field(1, ge=1)
    precision: Text = "fp32"
    samples: Text
    declared: dict[Name, float] = {}

    @model_validator(mode="after")
    def _measured(self) -> Entry:
        if self.budget_of == "cpu" and self.budget_seconds is not None and self.training_cpu_seconds is None:
            raise ValueError("a budget in cpu seconds needs training_cpu_seconds")
        return self

    @property
    def spent_seconds(self) -> float:
        """Training time by the clock of the budget."""
        return self.training_seconds if self.budget_of == "wall" else self.training_cpu_seconds or 0.0


@dataclass(frozen=True)
class Entered:
    """An entry that was read: what it says, where its samples lie, and the hash of every file of the samples."""

    entry: Entry
    folder: Path
    samples: Path
    files: list[dict]


def read_entry(folder: str | Path, track: str | None = None) -> Entered:
    """Read and check an entry's folder.

    Args:
        track: the track that is scored, where one is.

    Raises:
        InputError: no entry.json, an unknown or missing key, a value that does not fit, another track, samples outside
            the folder or not there, or a symbolic link anywhere in them.
    """
    folder = Path(folder)
    path = folder / ENTRY_FILE
    if not path.is_file() or path.is_symlink():
        raise InputError(f"a folder with {ENTRY_FILE}", "none", folder, "docs/benchmark.md has the format")
    if path.stat().st_size > _LARGEST_BYTES:
        raise InputError("an entry.json below 1 MiB", f"{path.stat().st_size} bytes", path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        entry = Entry.model_validate(values)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError("JSON", " ".join(str(error).split())[:120], path) from None
    except ValidationError as error:
        fault = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in fault["loc"]) or "entry"
        if fault["type"] == "extra_forbidden":
            raise InputError("a known key", f"'{key}'", path, closest(key, list(Entry.model_fields))) from None
        raise InputError(f"{key}: {fault['msg']}", where=path) from None
    if track is not None and entry.track != track:
        raise InputError(f"an entry of track '{track}'", f"'{entry.track}'", path)
    _check_inside(entry.samples, path)
    samples = folder / entry.samples
    for part in (samples, *samples.parents):
        if part == folder:
            break
        if part.is_symlink():
            raise InputError("plain files", "a symbolic link", part)
    if not samples.exists():
        raise InputError("the samples that entry.json names", "nothing there", samples)
    return Entered(entry, folder, samples, sample_files(samples))


def _check_inside(name: str, where: object) -> None:
    """Raise InputError unless `name` is a relative path that stays inside its folder."""
    inside = PurePosixPath(name)
    if not name or inside.is_absolute() or ".." in inside.parts or "\\" in name or "\0" in name:
        raise InputError("samples inside the entry's folder", f"'{name}'", where)


def sample_files(samples: Path) -> list[dict]:
    """Path, size and SHA-256 of every file of the samples; of a .pgen with the .pvar and .psam beside it.

    Raises:
        InputError: a symbolic link among them, no file at all, or a table that names a file outside.
    """
    files = hash_files(samples)
    if samples.suffix == ".pgen":
        for suffix in (".pvar", ".psam"):
            files += hash_files(samples.with_suffix(suffix))
    if not files:
        raise InputError("samples", "an empty folder", samples)
    table = samples / "volumes.csv"
    if table.is_file():
        try:
            with table.open(newline="", encoding="utf-8-sig") as stream:
                rows = list(csv.DictReader(stream))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError("a CSV table of scans", " ".join(str(error).split())[:120], table) from None
        for number, row in enumerate(rows, start=2):
            _check_inside(row.get("image") or "", f"{table} row {number}")
    return files


def write_entry(folder: Path, entry: Entry) -> None:
    """Write `entry.json` into `folder`, whole or not at all."""
    write_json(folder / ENTRY_FILE, entry.model_dump(mode="json"))
