"""Tracks: which data are split how, how many samples an entry brings, which findings the table shows, and who enters.

A track is one YAML file of configs/benchmark, or a file of one's own with the same keys. It names the data by path and
hash; the data themselves are nowhere in this project.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import InputError, UsageError, closest

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "benchmark"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataFile(_Strict):
    """One file or folder under --data. A folder's hash is that of its names and contents; null = taken as it comes."""

    path: str
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")


class Split(_Strict):
    """Shares of the people of each group; the rest is the training side. `sha256` pins who lies where."""

    seed: int = 0
    test: float = Field(0.2, gt=0, lt=1)
    fresh: float = Field(0.2, gt=0, lt=1)
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")


class GenotypeData(_Strict):
    """A phased panel, the table of groups, and the genetic map; paths as in `files`."""

    panel: str
    samples: str | None = None
    map: str | None = None
    region: str | None = Field(None, description="contig:first-last; only these sites")


class ScanData(_Strict):
    """A table of scans (image, subject), or arrays of a MedMNIST file with its published split; and the grid."""

    table: str | None = None
    arrays: str | None = None
    size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    modality: Literal["MR", "CT"] = "MR"
    labels: list[Annotated[int, Field(ge=1, le=255)]] = Field(
        default_factory=list, description="the scans are label maps of these values, and modelled as such by ours"
    )


class Entrant(_Strict):
    """Settings of one of the engine's own entrants, and how many configurations were tried on this track before."""

    settings: dict[str, Any] = {}
    tuning_trials: int = Field(0, ge=0)


class Track(_Strict):
    """One comparison.

    Attributes:
        obtain, licence: where the data come from and under which terms.
        files: everything that is read, with its hash.
        samples: people (genotypes) or scans that an entry holds, exactly.
        columns: findings of the fidelity that the table shows; `audit_columns`: findings of the audit.
        entrants: who of the engine's own takes part, besides the controls.
        budget_seconds: training time that every entrant gets where the command names none.
        budget_of: what it counts. "cpu": seconds that processors work for the entrant, the same amount of training on a
            machine with other work as on a quiet one; "wall": for entrants on a GPU, on a machine of their own.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,39}$")
    about: str
    obtain: str
    licence: str
    files: list[DataFile] = Field(min_length=1)
    genotypes: GenotypeData | None = None
    scans: ScanData | None = None
    split: Split = Split()
    samples: int = Field(ge=2)
    columns: list[str] = Field(min_length=1)
    audit_columns: list[str] = ["copy_share_at_1_percent"]
    entrants: dict[str, Entrant] = {}
    budget_seconds: float = Field(600, gt=0)
    budget_of: Literal["cpu", "wall"] = "cpu"
    evaluation_seed: int = 0

    @model_validator(mode="after")
    def _one_kind(self) -> Track:
        if (self.genotypes is None) == (self.scans is None):
            raise ValueError("give genotypes or scans, one of them")
        if self.scans is not None and (self.scans.table is None) == (self.scans.arrays is None):
            raise ValueError("scans: give table or arrays, one of them")
        if self.split.test + self.split.fresh >= 1:
            raise ValueError("split.test and split.fresh leave nobody to train on")
        return self

    @property
    def modality(self) -> Literal["genotypes", "scans"]:
        """What the track compares."""
        return "genotypes" if self.genotypes is not None else "scans"


def names() -> list[str]:
    """Names of the standard tracks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_track(name: str | Path) -> Track:
    """A standard track by name, or one's own by the path of its YAML file.

    Raises:
        UsageError: no such track. InputError: the file is no YAML mapping or does not fit; names the key.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in names():
            raise UsageError("a track", f"'{name}'", "TRACK", closest(str(name), names()))
        path = FOLDER / f"{name}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("a track file", "nothing there", path) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError("a YAML file", " ".join(str(error).split())[:160], path) from None
    if not isinstance(values, dict):
        raise InputError("a YAML mapping", type(values).__name__, path)
    try:
        return Track.model_validate(values)
    except ValidationError as error:
        fault = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in fault["loc"]) or "track"
        if fault["type"] == "extra_forbidden":
            raise InputError("a known key", f"'{key}'", path, closest(key, list(Track.model_fields))) from None
        raise InputError(f"{key}: {fault['msg']}", where=path) from None
