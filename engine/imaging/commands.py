"""What the command line and the SLURM jobs call: read, call one function, write whole files, return a JSON-ready
dict."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine import provenance
from engine.atomic import atomic_folder, write_json, write_text
from engine.errors import InputError, UsageError
from engine.imaging.config import load_config

Progress = Callable[[str, int, int], None]
_SUFFIXES = (".nii", ".nii.gz")


def train_command(
    config_path: str | Path,
    data_csv: str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`engine imaging train`: see `engine.imaging.train.train`; also leaves `train.csv` and `holdout.csv` in `out`."""
    from engine.imaging.split import write_split
    from engine.imaging.train import train

    config = load_config(config_path, list(overrides))
    result = train(config, data_csv, out, resume, progress, cache)
    return {**result, "scans": write_split(data_csv, config.data, out)}


def shard_range(n: int, shard: tuple[int, int]) -> range:
    """The subjects of one shard: consecutive, sizes differing by at most one."""
    part, parts = shard
    return range(n * part // parts, n * (part + 1) // parts)


def sample_command(
    run: str | Path,
    n: int,
    out: str | Path,
    *,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    set: Mapping[str, Any] | None = None,
    follow_up: Mapping[str, Any] | None = None,
    covariates_csv: str | Path | None = None,
    format: str = "nifti",
    force: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`engine imaging sample`: volumes, `volumes.csv`, `checksums.json` and `provenance.json` in a new folder `out`.

    Args:
        n: subjects over all shards.
        shard: (i, k): this job's part; the volumes of all parts together are the bytes of a run without shards.
        set: covariates of every subject at the baseline visit; those left out follow the training distribution.
        follow_up: a second visit of every subject, with the same identity and these covariates changed.
        covariates_csv: one row per visit with a column `subject` (its number from 0, or SYN and the number) and
            covariates; replaces `set`. Columns the model was not trained with are left out and named in the result.
        format: "nifti", or "dicom": one folder per series.

    Raises:
        UsageError: an argument does not fit the model, or `out` exists.
    """
    from engine.imaging.generate import load_model, sample
    from engine.imaging.volume import write_volume

    if not 0 <= shard[0] < shard[1]:
        raise UsageError("a shard (i, k) with 0 <= i < k", f"{shard}", "shard")
    if format not in ("nifti", "dicom"):
        raise UsageError("format nifti or dicom", f"'{format}'", "--format")
    subjects = shard_range(n, shard)
    model = load_model(run, device)
    visits, ignored = _visits(subjects, set, follow_up, covariates_csv, [c.name for c in model.covariates])
    rows, counts = [], dict.fromkeys(subjects, 0)
    with atomic_folder(out) as folder:
        for index, volume, given in sample(
            model, len(subjects), seed=seed, start=subjects.start, covariates=visits, force=force
        ):
            visit = counts[index]
            counts[index] += 1
            if progress is not None:
                progress("sampling", index - subjects.start + 1, len(subjects))
            name = f"SYN{index:09d}_visit{visit}" + ("" if format == "dicom" else ".nii.gz")
            write_volume(
                volume,
                folder / name,
                format=format,
                description="SYNTHETIC",
                subject=f"SYN{index:09d}",
            )
            rows.append({"image": name, "subject": f"SYN{index:09d}", "visit": visit, **given})
        columns = list(dict.fromkeys(["image", "subject", "visit", *(c.name for c in model.covariates)]))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_text(folder / "volumes.csv", text.getvalue())
        digests = {row["image"]: provenance.input_record(folder / str(row["image"]))["sha256"] for row in rows}
        write_json(folder / "checksums.json", digests)
        provenance.write(
            folder,
            "imaging sample",
            config=model.config.model_dump(mode="json"),
            inputs=[Path(run) / "config.yaml", Path(run) / "checkpoints" / f"step-{model.step:06d}"],
            seed=seed,
            synthetic=True,
            extra={
                "subjects": len(subjects),
                "first_subject": subjects.start,
                "shard": f"{shard[0]}/{shard[1]}",
                "volumes": len(rows),
            },
        )
    result = {"out": Path(out).name, "volumes": len(rows), "subjects": len(subjects), "first_subject": subjects.start}
    return {**result, "seed": seed, "ignored_columns": ignored}


def evaluate_command(
    real_dir: str | Path,
    synthetic_dir: str | Path,
    *,
    train: str | Path | None = None,
    reference: str | Path | None = None,
    out: str | Path | None = None,
    modality: str | None = None,
    seed: int = 0,
    report: Callable[[Path, Any, int], Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`engine imaging evaluate`: findings of synthetic against real; a directory is read through its `volumes.csv` if
    it has one.

    `modality` says what NIfTI files hold, which does not record it ("CT" = Hounsfield units).
    With `out`, the folder gets `findings.json`, `montage.png` and `provenance.json`, and what `report(folder, evaluation,
    seed)` adds to it.
    """
    from engine.imaging.evaluate import evaluate, montage_image

    real, persons = read_folder(real_dir, modality)
    synthetic, _ = read_folder(synthetic_dir, modality)
    fitted, fitted_persons = read_folder(train, modality) if train else (None, None)
    made = evaluate(
        real,
        synthetic,
        reference=read_folder(reference, modality)[0] if reference else None,
        train=fitted,
        real_persons=persons,
        train_persons=fitted_persons,
        seed=seed,
    )
    if progress is not None:
        progress("evaluating", 1, 1)
    result = {"real": len(real), "synthetic": len(synthetic), "findings": [f.to_json() for f in made.findings]}
    if out is not None:
        from matplotlib.image import imsave

        with atomic_folder(out) as folder:
            write_json(folder / "findings.json", result)
            enlarged = np.kron(montage_image(made.figures), np.ones((3, 3), dtype=np.uint8))
            imsave(folder / "montage.png", enlarged, cmap="gray", vmin=0, vmax=255)
            if report is not None:
                report(folder, made, seed)
            provenance.write(folder, "imaging evaluate", inputs=[real_dir, synthetic_dir], seed=seed)
    return result


def read_folder(folder: str | Path, modality: str | None = None) -> tuple[list[Any], list[str]]:
    """Volumes of a folder and the person of each, in the order of `folder_paths`.

    Raises:
        InputError: no volume there, or one that cannot be read.
    """
    from engine.imaging.volume import read_volume

    paths, persons = folder_paths(folder)
    return [read_volume(path, modality=modality) for path in paths], persons


def folder_paths(folder: str | Path) -> tuple[list[Path], list[str]]:
    """Paths of the volumes of a folder and the person of each: through its `volumes.csv` if there is one, else every NIfTI
    file under it in name order. A path to a CSV file is taken as that table.

    Raises:
        InputError: no volume there.
    """
    folder = Path(folder)
    table = folder if folder.suffix == ".csv" else folder / "volumes.csv"
    if table.is_file():
        with table.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
        if not rows or "image" not in rows[0]:
            raise InputError(
                "a table with a column 'image' and rows", "neither" if not rows else ", ".join(rows[0]), table
            )
        paths = [table.parent / row["image"] for row in rows]
        persons = [row.get("subject") or row["image"] for row in rows]
    else:
        if not folder.is_dir():
            raise InputError("a folder of volumes", "nothing there", folder)
        paths = sorted(p for p in folder.rglob("*") if p.name.endswith(_SUFFIXES) and p.is_file())
        persons = [p.name for p in paths]
    if not paths:
        raise InputError("NIfTI volumes or a volumes.csv", "neither", folder)
    return paths, persons


def _visits(
    subjects: range,
    set: Mapping[str, Any] | None,
    follow_up: Mapping[str, Any] | None,
    covariates_csv: str | Path | None,
    known: Sequence[str],
) -> tuple[list[list[Mapping[str, Any]]], list[str]]:
    """Visits of each subject as lists of covariates, and the table's columns that the model does not know."""
    if covariates_csv is None:
        baseline = dict(set or {})
        visits: list[Mapping[str, Any]] = [baseline]
        if follow_up:
            visits.append({**baseline, **follow_up})
        return [visits for _ in subjects], []
    try:
        with Path(covariates_csv).open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except FileNotFoundError:
        raise InputError("a table of covariates", "nothing there", covariates_csv) from None
    table: dict[int, list[Mapping[str, Any]]] = {}
    for number, row in enumerate(rows, start=2):
        text = str(row.get("subject") or "").removeprefix("SYN")
        if not text.isdigit():
            raise InputError("a subject number from 0", f"'{text}'", f"{covariates_csv} row {number}, column subject")
        table.setdefault(int(text), []).append({name: row[name] for name in known if name in row})
    missing = [k for k in subjects if k not in table]
    if missing:
        raise InputError(f"rows for subject {missing[0]}", "none", covariates_csv)
    ignored = sorted({name for name in rows[0] if name != "subject"} - {*known}) if rows else []
    return [table[k] for k in subjects], ignored
