"""One side of a comparison on one grid: intensities, label maps, covariates and the person of each scan."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.errors import InputError
from engine.imaging.config import DataConfig
from engine.imaging.dataset import fit_codes, fit_volume, is_missing
from engine.imaging.volume import Volume, read_volume

_NO_COVARIATES = {"image", "label", "subject", "visit"}
_MOST_LABELS = 64


@dataclass(frozen=True)
class Side:
    """n scans of people.

    Attributes:
        x_ndhw: float32 in 0 .. 1; of several channels the first.
        person_n: str.
        codes_ndhw: uint8, 0 = background and k + 1 = the k-th label; None where a row has no label map.
        covariates: cells of each row, empty ones left out.
        voxel_mm3: volume of a voxel.
    """

    x_ndhw: np.ndarray
    person_n: np.ndarray
    codes_ndhw: np.ndarray | None
    covariates: tuple[dict[str, str], ...]
    voxel_mm3: float

    def __len__(self) -> int:
        return len(self.x_ndhw)

    def take(self, index: np.ndarray) -> Side:
        """The scans at `index`."""
        return replace(
            self,
            x_ndhw=self.x_ndhw[index],
            person_n=self.person_n[index],
            codes_ndhw=None if self.codes_ndhw is None else self.codes_ndhw[index],
            covariates=tuple(self.covariates[int(k)] for k in index),
        )


@dataclass(frozen=True)
class Cells:
    """What the table of a folder says beside the images, row by row: paths of label maps, and covariates."""

    labels: list[Path | None]
    covariates: list[dict[str, str]]


def read_cells(folder: str | Path, rows: int) -> Cells:
    """Cells of the table that `engine.imaging.commands.folder_paths` reads; of a folder without one nothing, `rows` times."""
    folder = Path(folder)
    table = folder if folder.suffix == ".csv" else folder / "volumes.csv"
    if not table.is_file():
        return Cells([None] * rows, [{}] * rows)
    with table.open(newline="", encoding="utf-8-sig") as stream:
        records = list(csv.DictReader(stream))
    labels = [table.parent / r["label"].strip() if (r.get("label") or "").strip() else None for r in records]
    given = [
        {k: v.strip() for k, v in r.items() if k and k not in _NO_COVARIATES and v is not None and not is_missing(v)}
        for r in records
    ]
    return Cells(labels, given)


def label_maps(cells: Cells) -> list[Volume] | None:
    """The label maps of a side; None where a row has none.

    Raises:
        InputError: a map cannot be read.
    """
    if not cells.labels or any(path is None for path in cells.labels):
        return None
    return [read_volume(path) for path in cells.labels if path is not None]


def label_values(maps: Sequence[Volume]) -> list[int]:
    """The values other than 0 that occur, rising.

    Raises:
        InputError: fractions, values outside 1 .. 255, or more than 64 of them: no label maps.
    """
    values = sorted({float(v) for m in maps for v in np.unique(m.array_cdhw)} - {0.0})
    if len(values) > _MOST_LABELS or any(v != int(v) or not 1 <= v <= 255 for v in values):
        raise InputError(
            f"label maps with at most {_MOST_LABELS} whole numbers between 1 and 255",
            f"{len(values)} values between {values[0]:g} and {values[-1]:g}",
            "column label",
        )
    return [int(v) for v in values]


def side_of(
    volumes: Sequence[Volume],
    persons: Sequence[str],
    grid: DataConfig,
    *,
    maps: Sequence[Volume] | None = None,
    labels: Sequence[int] = (),
    covariates: Sequence[dict[str, str]] | None = None,
) -> Side:
    """`volumes` on `grid`, with their label maps as codes of `labels`.

    Raises:
        InputError: a label map does not lie on its image's grid.
    """
    x, codes = [], []
    with_labels = grid.model_copy(update={"labels": list(labels)})
    for k, volume in enumerate(volumes):
        x.append((fit_volume(volume, grid).array_cdhw[0] + 1.0) / 2.0)
        if maps is not None and labels:
            if maps[k].shape_dhw != volume.shape_dhw or not np.allclose(maps[k].affine, volume.affine, atol=0.05):
                raise InputError("a label map on the image's grid", "another grid", f"scan {k}, column label")
            codes.append(fit_codes(maps[k], with_labels, f"scan {k}, column label").array_cdhw[0].astype(np.uint8))
    spacing = grid.spacing_mm or tuple(float(s) for s in volumes[0].spacing_mm)
    return Side(
        np.stack(x).astype(np.float32),
        np.array(persons, dtype=str),
        np.stack(codes) if codes else None,
        tuple(covariates) if covariates is not None else ({},) * len(x),
        float(np.prod(spacing)),
    )


def volumes_mm3(codes_ndhw: np.ndarray, count: int, voxel_mm3: float) -> np.ndarray:
    """Volume of every label of every scan, float64 (n, labels)."""
    return np.stack([(codes_ndhw == k + 1).sum(axis=(1, 2, 3)) * voxel_mm3 for k in range(count)], axis=1).astype(float)
