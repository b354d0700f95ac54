"""From a table of scans to arrays a model can train on: rows, the split by person, covariates, fitted and scaled
volumes.

The table is a CSV with the columns image, optionally label, subject, visit, and covariates; paths are relative to the
file; or it is the root of a BIDS dataset (`engine.files.bids`). Volumes are read once, reoriented to RAS, brought to the
config's grid, scaled to [-1, 1] and cached in the run folder; the cache holds people's data and stays inside
(docs/imaging.md). A row that cannot be used is one line with its number: names of files may name people, so none is said.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.atomic import atomic_path, write_json
from engine.errors import EngineError, InputError, UsageError, closest
from engine.files import bids
from engine.imaging.config import DataConfig, ImagingConfig
from engine.imaging.denoiser import Condition
from engine.imaging.labels import channels_of, codes_of
from engine.imaging.volume import Volume, crop_or_pad, read_volume, reorient, resample
from engine.training import staging
from engine.training.log import Progress

MR_TOP = 1000.0  # MR volumes leave the engine in arbitrary units, 0 .. MR_TOP
_MISSING = {"", "na", "nan", "n/a", "none", "null"}


@dataclass(frozen=True)
class Row:
    """One scan of the table; `number` is its line in the file, the header being line 1."""

    number: int
    image: Path
    label: Path | None
    subject: str
    visit: str
    covariates: dict[str, str]
    train: bool


@dataclass(frozen=True)
class Covariate:
    """How one covariate enters the model, learned from the training side.

    Attributes:
        kind: "categorical" or "continuous".
        levels: categorical: the values in the order of their codes.
        mean, deviation: continuous: what standardises it.
        low, high: continuous: the trained range.
    """

    name: str
    kind: str
    levels: tuple[str, ...] = ()
    mean: float = 0.0
    deviation: float = 1.0
    low: float = 0.0
    high: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain dict; `Covariate(**d)` is the inverse."""
        return {**asdict(self), "levels": list(self.levels)}


def covariate_from_json(values: dict[str, Any]) -> Covariate:
    """The inverse of `Covariate.to_json`."""
    return Covariate(**{**values, "levels": tuple(values["levels"])})


def is_missing(value: object) -> bool:
    """Whether a covariate's value counts as not given."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or str(value).strip().lower() in _MISSING


def person_is_training(subject: str, holdout_share: float) -> bool:
    """Side of a person by a hash of the subject id: every scan of a person lies on one side, in every run and table."""
    digest = hashlib.blake2b(f"engine.split\x1f{subject}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64 >= holdout_share


def read_table(path: str | Path, config: DataConfig) -> list[Row]:
    """Rows of the table at `path`.

    Raises:
        InputError: the table or a needed column is absent, a row has no image or no such file, a person is on
            both sides, or the split column holds something else than train / holdout; names the row.
    """
    path = Path(path)
    columns, records = read_records(path, config)
    root = path if path.is_dir() else path.parent
    needed = ["image", *config.covariates, *([config.split_column] if config.split_column else [])]
    for column in needed:
        if column not in columns:
            raise InputError(f"a column '{column}'", ", ".join(columns) or "no header", path, closest(column, columns))
    rows = []
    for number, record in enumerate(records, start=2):
        where = f"{path.name} row {number}"
        image = (record["image"] or "").strip()
        if not image:
            raise InputError("the path of an image", "an empty cell", where)
        if not (root / image).exists():
            raise InputError("the image of this row", "nothing there", where, "paths are relative to the table")
        label = (record.get("label") or "").strip()
        subject = (record.get("subject") or "").strip() or Path(image).name
        side = (record[config.split_column] or "").strip().lower() if config.split_column else ""
        if config.split_column and side not in ("train", "holdout"):
            raise InputError("train or holdout", f"'{side}'", f"{where}, column {config.split_column}")
        rows.append(
            Row(
                number=number,
                image=root / image,
                label=root / label if label else None,
                subject=subject,
                visit=(record.get("visit") or "").strip(),
                covariates={name: (record.get(name) or "").strip() for name in config.covariates},
                train=side == "train" if side else person_is_training(subject, config.holdout_share),
            )
        )
    both = {r.subject for r in rows if r.train} & {r.subject for r in rows if not r.train}
    if both:
        raise InputError(
            "each person on one side of the split", f"{len(both)} on both", path, "split by subject, not by scan"
        )
    if not any(r.train for r in rows):
        raise InputError(
            "at least one row on the training side", f"none of {len(rows)}", path, "a smaller holdout_share"
        )
    return rows


def read_records(path: str | Path, config: DataConfig) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and cells of a CSV table of scans, or of a BIDS dataset as such a table; row 2 is the first.

    Raises:
        InputError: neither is there, or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return bids.read_table(path, config.bids_suffix)
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            return list(reader.fieldnames or []), list(reader)
    except FileNotFoundError:
        raise InputError("a CSV table of scans, or a BIDS dataset", "nothing there", path) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError("a CSV table of scans", str(error), path) from None


def learn_covariates(rows: Sequence[Row], config: DataConfig, where: object) -> list[Covariate]:
    """Levels, means and ranges of the declared covariates, from the training rows alone.

    Raises:
        InputError: a continuous value is no number, a categorical one not among the declared levels, or all are
            missing.
    """
    learned = []
    for name, declared in config.covariates.items():
        given = [(r.number, r.covariates[name]) for r in rows if r.train and not is_missing(r.covariates[name])]
        if not given:
            raise InputError(
                f"values of '{name}' on the training side", "none", where, "remove it from data.covariates"
            )
        if declared.kind == "categorical":
            levels = tuple(declared.levels or sorted({value for _, value in given}))
            for number, value in given:
                if value not in levels:
                    raise InputError(f"'{name}' in {list(levels)}", f"'{value}'", f"{where} row {number}")
            learned.append(Covariate(name, "categorical", levels=levels))
        else:
            numbers = np.array([_number(value, name, f"{where} row {number}") for number, value in given])
            learned.append(
                Covariate(
                    name,
                    "continuous",
                    mean=float(numbers.mean()),
                    deviation=float(numbers.std()) or 1.0,
                    low=float(numbers.min()),
                    high=float(numbers.max()),
                )
            )
    return learned


def _number(value: object, name: str, where: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"a number for '{name}'", f"'{value}'", where)
    return number


def condition(
    covariates: Sequence[dict[str, Any]],
    spacing_mm: np.ndarray,
    known: Sequence[Covariate],
    where: object = "covariates",
) -> Condition:
    """Encode what is given per sample; a covariate that is absent or empty is "not given".

    Args:
        covariates: one dict per sample, values as text or numbers.
        spacing_mm: float (n, 3).
        known: the model's covariates.

    Raises:
        UsageError: a name the model was not trained with (suggests the nearest).
        InputError: a value that is no number, or a level never seen.
    """
    categorical = [c for c in known if c.kind == "categorical"]
    continuous = [c for c in known if c.kind == "continuous"]
    codes = np.full((len(covariates), len(categorical)), -1, dtype=np.int64)
    values = np.full((len(covariates), len(continuous)), np.nan, dtype=np.float32)
    names = [c.name for c in known]
    for row, given in enumerate(covariates):
        for name in given:
            if name not in names:
                hint = closest(name, names) if names else "a model trained with covariates"
                raise UsageError("a covariate the model was trained with", f"'{name}'", where, hint)
        for k, covariate in enumerate(categorical):
            value = given.get(covariate.name)
            if not is_missing(value):
                if str(value) not in covariate.levels:
                    raise InputError(f"'{covariate.name}' in {list(covariate.levels)}", f"'{value}'", where)
                codes[row, k] = covariate.levels.index(str(value))
        for k, covariate in enumerate(continuous):
            value = given.get(covariate.name)
            if not is_missing(value):
                values[row, k] = (_number(value, covariate.name, where) - covariate.mean) / covariate.deviation
    spacing = np.log(np.asarray(spacing_mm, dtype=np.float32).reshape(len(covariates), 3))
    return Condition(torch.from_numpy(spacing), torch.from_numpy(values), torch.from_numpy(codes))


def scale_intensity(array: np.ndarray, config: DataConfig) -> np.ndarray:
    """To [-1, 1], float32. CT: HU clipped to the range. MR: 0 .. the percentile of this volume, clipped."""
    array = np.nan_to_num(array.astype(np.float32), nan=0.0)
    if config.modality == "CT":
        low, high = config.hu_range
    else:
        low, high = 0.0, float(np.percentile(array, config.mr_percentile))
        high = high if high > 0 else 1.0
    return np.clip((array - low) / (high - low), 0.0, 1.0) * 2.0 - 1.0


def unscale_intensity(array: np.ndarray, config: DataConfig) -> np.ndarray:
    """From [-1, 1] to HU (CT) or 0 .. MR_TOP arbitrary units (MR); values outside are clipped."""
    low, high = config.hu_range if config.modality == "CT" else (0.0, MR_TOP)
    return ((np.clip(array, -1.0, 1.0) + 1.0) / 2.0 * (high - low) + low).astype(np.float32)


def fit_volume(volume: Volume, config: DataConfig) -> Volume:
    """`volume` in RAS on the config's grid, scaled to [-1, 1].

    Intensities are scaled before padding, so that the border does not move the percentile. A volume smaller than the
    grid is continued by reflection (crops of a larger scene have tissue at their border), in air simply by more air.
    """
    volume = reorient(volume, "RAS")
    if config.spacing_mm is not None and not np.allclose(volume.spacing_mm, config.spacing_mm, rtol=1e-3):
        volume = resample(volume, config.spacing_mm)
    volume = replace(volume, array_cdhw=scale_intensity(volume.array_cdhw, config))
    return crop_or_pad(_reflected(volume, config.size), config.size, fill=-1.0)


def common_grid(volumes: Sequence[Volume], where: str) -> DataConfig:
    """The grid, spacing and intensity scale of `volumes` (the synthetic side), to which every side is brought before it
    is compared.

    Raises:
        InputError: the volumes do not share one shape.
    """
    shapes = sorted({volume.shape_dhw for volume in volumes})
    if len(shapes) != 1:
        raise InputError("synthetic volumes of one shape", f"{len(shapes)} shapes", where)
    modality = "CT" if volumes[0].units == "HU" else "MR"
    spacing = [float(s) for s in volumes[0].spacing_mm]
    return DataConfig.model_validate({"size": shapes[0], "spacing_mm": spacing, "modality": modality})


def _reflected(volume: Volume, size: Sequence[int]) -> Volume:
    """`volume` extended by reflection to at least `size`, as far as one reflection reaches, affine moved along."""
    missing = [max(0, m - n) for n, m in zip(volume.array_cdhw.shape[1:], size)]
    width = [(min(k // 2, n - 1), min(k - k // 2, n - 1)) for k, n in zip(missing, volume.array_cdhw.shape[1:])]
    if not any(before or after for before, after in width):
        return volume
    affine = volume.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.array([before for before, _ in width], dtype=float)
    return replace(volume, array_cdhw=np.pad(volume.array_cdhw, [(0, 0), *width], mode="reflect"), affine=affine)


@dataclass(frozen=True)
class Scans:
    """Volumes of a table on one grid.

    Attributes:
        x_bcdhw: float32 in [-1, 1].
        spacing_mm: float64 (b, 3).
        centre_mm: float64 (b, 3), position of the field of view's centre in RAS mm.
        codes_bdhw: uint8 codes of the label maps (`labels`) where the config has labels, else None.
    """

    x_bcdhw: np.ndarray
    spacing_mm: np.ndarray
    centre_mm: np.ndarray
    codes_bdhw: np.ndarray | None = None


def load_scans(
    rows: Sequence[Row],
    config: ImagingConfig,
    cache: Path | None = None,
    grid: int = 0,
    workers: int = 1,
    progress: Progress | None = None,
    scratch: str | Path | None = None,
    checked: bool = False,
) -> Scans:
    """Read, fit and scale every row; with `cache`, keep the result there and read it next time.

    A cache is a few large files with a sum of each chunk, which are checked when it is read. What an interrupted call has
    fitted lies there as one file for each scan, under a hash, and is not fitted again. The result does not depend on `workers`.

    Args:
        grid: which of `config.data.grids`.
        workers: processes; above 1 needs a cache, and a main module that can be imported.
        scratch: a folder of this node; the arrays are copied there, once per node, and read from there.
        checked: another process of this job has just checked the cache.

    Raises:
        InputError: a row's volume cannot be used; one line with the row's number and the reader's reason.
        CorruptRun: the cache was damaged after it was written.
    """
    data = config.data.grids[grid]
    keys = [_key(row, data) for row in rows]
    key = hashlib.sha256("\n".join(keys).encode()).hexdigest()
    suffix = f"-{grid}" if grid else ""
    names = [f"scans{suffix}.npy", *([f"labels{suffix}.npy"] if data.labels else [])]
    if cache is None:
        return _stacked([_fit_named(row, data) for row in rows], rows)
    if all((cache / name).is_file() for name in (f"scans{suffix}.json", *names)):
        record = json.loads((cache / f"scans{suffix}.json").read_text(encoding="utf-8"))
        if record["key"] == key:
            geometry = np.array(record["geometry_mm"], dtype=np.float64)
            near = [staging.near(cache / name, record["chunks"][name], scratch, checked) for name in names]
            arrays = [np.load(path, mmap_mode="r") for path in near]
            return Scans(arrays[0], geometry[:, :3], geometry[:, 3:], arrays[1] if data.labels else None)
    parts = cache / f"parts{suffix}"
    parts.mkdir(parents=True, exist_ok=True)
    paths = [parts / f"{own}.npz" for own in keys]
    missing = [(row, data, path) for row, path in zip(rows, paths) if not path.is_file()]
    for done, _ in enumerate(_each(missing, workers), start=1 + len(rows) - len(missing)):
        if progress is not None:
            progress("reading scans", done, len(rows))
    scans = _stacked([_part(path) for path in paths], rows)
    for name, array in zip(names, [scans.x_bcdhw] if scans.codes_bdhw is None else [scans.x_bcdhw, scans.codes_bdhw]):
        with atomic_path(cache / name) as partial, partial.open("wb") as stream:
            np.save(stream, array)
    geometry = np.concatenate([scans.spacing_mm, scans.centre_mm], axis=1)
    chunks = {name: staging.chunks_of(cache / name) for name in names}
    write_json(cache / f"scans{suffix}.json", {"key": key, "geometry_mm": geometry.tolist(), "chunks": chunks})
    shutil.rmtree(parts)
    return scans


Fitted = tuple[np.ndarray, np.ndarray | None, np.ndarray]
"""One row: channels (c, d, h, w), codes (d, h, w) or none, and spacing and centre in mm, float64 (6,)."""


def _key(row: Row, data: DataConfig) -> str:
    """Names a fitted scan: changes with its files, its place in the table, and what is asked of it."""

    def stamp(path: Path) -> list[Any]:
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]

    label = row.label if row.label and row.label.exists() and data.labels else None
    said = [3, data.model_dump(mode="json"), row.number, stamp(row.image), stamp(label) if label else None]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _fit_named(row: Row, data: DataConfig) -> Fitted:
    try:
        volume, code_dhw = fit_row(row, data)
    except EngineError as error:
        where = error.where if error.where.startswith(f"row {row.number}") else f"row {row.number}"
        raise InputError(error.expected, error.got, where, error.hint) from None
    return volume.array_cdhw, code_dhw, np.array([*volume.spacing_mm, *centre_of(volume)], dtype=np.float64)


def _fit_part(task: tuple[Row, DataConfig, Path]) -> None:
    row, data, path = task
    array_cdhw, code_dhw, geometry = _fit_named(row, data)
    arrays = {"x": array_cdhw, "geometry_mm": geometry, **({} if code_dhw is None else {"codes": code_dhw})}
    with atomic_path(path) as partial, partial.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def _each(tasks: Sequence[tuple[Row, DataConfig, Path]], workers: int) -> Iterator[None]:
    if workers <= 1 or len(tasks) <= 1:
        yield from map(_fit_part, tasks)
        return
    # spawned: a fork of a process with threads of PyTorch can hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context) as pool:
        try:
            yield from pool.map(_fit_part, tasks)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _part(path: Path) -> Fitted:
    with np.load(path, allow_pickle=False) as held:
        return held["x"], held.get("codes"), held["geometry_mm"]


def _stacked(fitted: Sequence[Fitted], rows: Sequence[Row]) -> Scans:
    channels = fitted[0][0].shape
    for (array_cdhw, _, _), row in zip(fitted, rows):
        if array_cdhw.shape != channels:
            raise InputError(
                f"{channels[0]} channels, as in the first row", f"{array_cdhw.shape[0]}", f"row {row.number}"
            )
    geometry = np.stack([own for _, _, own in fitted])
    codes = [code_dhw for _, code_dhw, _ in fitted if code_dhw is not None]
    x_bcdhw = np.stack([array_cdhw for array_cdhw, _, _ in fitted])
    return Scans(x_bcdhw, geometry[:, :3], geometry[:, 3:], np.stack(codes) if codes else None)


def fit_row(row: Row, data: DataConfig) -> tuple[Volume, np.ndarray | None]:
    """One row on the config's grid: the channels to be learned in [-1, 1], and the codes of its label map if there are
    labels.

    Raises:
        InputError: a file cannot be used, the label map lies elsewhere than the image, or there is none where one is needed.
    """
    where = f"row {row.number}"
    if not data.labels:
        return fit_volume(read_volume(row.image, modality=data.modality, where=where), data), None
    path = row.label if row.label is not None or data.image_channels else row.image
    if path is None:
        raise InputError("a label map (column label)", "an empty cell", where)
    drawn = read_volume(path, where=f"{where}, label")
    codes = fit_codes(drawn, data, f"{where}, label")
    if not data.image_channels:
        return replace(codes, array_cdhw=channels_of(_codes(codes), len(data.labels))), _codes(codes)
    image = read_volume(row.image, modality=data.modality, where=where)
    apart = image.shape_dhw != drawn.shape_dhw or not np.allclose(image.affine, drawn.affine, atol=0.05)
    if apart:
        raise InputError("a label map on the image's grid", "another grid", where, "resample it to the image")
    fitted = fit_volume(image, data)
    if data.produce == "pair":
        channels = channels_of(_codes(codes), len(data.labels))
        fitted = replace(fitted, array_cdhw=np.concatenate([fitted.array_cdhw, channels]))
    return fitted, _codes(codes)


def _codes(volume: Volume) -> np.ndarray:
    return volume.array_cdhw[0].astype(np.uint8)


def fit_codes(volume: Volume, data: DataConfig, where: object) -> Volume:
    """A label map as codes, in RAS on the config's grid as `fit_volume` lays images: nearest neighbour, never smoothed."""
    if len(volume.array_cdhw) != 1:
        raise InputError("a label map of one channel", f"{len(volume.array_cdhw)} channels", where)
    volume = replace(volume, array_cdhw=codes_of(volume.array_cdhw[0], data.labels, where)[None].astype(np.float32))
    volume = reorient(volume, "RAS")
    if data.spacing_mm is not None and not np.allclose(volume.spacing_mm, data.spacing_mm, rtol=1e-3):
        volume = resample(volume, data.spacing_mm, order=0)
    return crop_or_pad(_reflected(volume, data.size), data.size, fill=0.0)


def centre_of(volume: Volume) -> np.ndarray:
    """Centre of the field of view in RAS mm, float64 (3,)."""
    middle = (np.array(volume.array_cdhw.shape[1:], dtype=float) - 1) / 2
    return volume.affine[:3, :3] @ middle + volume.affine[:3, 3]


def shifted(x_cdhw: np.ndarray, offset: Sequence[int]) -> np.ndarray:
    """`x_cdhw` moved by whole voxels; what comes into view is the reflection of the border."""
    most = max(abs(o) for o in offset)
    if most == 0:
        return np.asarray(x_cdhw)
    padded = np.pad(x_cdhw, [(0, 0), *((most, most) for _ in range(3))], mode="reflect")
    window = tuple(slice(most - o, most - o + n) for o, n in zip(offset, x_cdhw.shape[1:]))
    return padded[(slice(None), *window)]
