"""What the command line and the SLURM jobs call: read, call one function, write whole files, return a JSON-ready
dict."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine import provenance
from engine.atomic import atomic_folder, write_json
from engine.errors import InputError, UsageError
from engine.files import bids
from engine.files.delimited import write_csv
from engine.imaging.config import BASELINE, load_config

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
    scratch: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`engine imaging train`: see `engine.imaging.train.train`; also leaves `train.csv` and `holdout.csv` in `out`."""
    from engine.imaging.split import write_split
    from engine.imaging.train import train

    config = load_config(config_path, list(overrides))
    result = train(config, data_csv, out, resume, progress, cache, scratch)
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
    label_maps: str | Path | None = None,
    baseline: str | Path | None = None,
    size: Sequence[int] | None = None,
    spacing_mm: Sequence[float] | None = None,
    memory_gb: float | None = None,
    format: str = "nifti",
    force: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`engine imaging sample`: volumes, `volumes.csv`, `checksums.json` and `provenance.json` in a new folder `out`.

    Args:
        n: subjects over all shards.
        shard: (i, k): this job's part; the volumes of all parts together are the bytes of a run without shards.
        set: covariates of every subject at the baseline visit; those left out are not given to the model, which draws
            people as they come, and with `flow.linear_mean` people of average covariates, a little less spread.
        follow_up: a second visit of every subject, with the same identity and these covariates changed.
        covariates_csv: one row per visit with a column `subject` (its number from 0, or SYN and the number) and
            covariates; replaces `set`. Columns the model was not trained with are left out and named in the result.
        label_maps: a label map, or a table of them, for a model that is conditioned on one; subject k gets map k modulo
            their number.
        baseline: an earlier scan, or a table of them with their covariates, for a model that knows follow-ups; subject k
            is a follow-up of scan k modulo their number, at the baseline's covariates changed by `set` ("+2" adds).
        size, spacing_mm, memory_gb: as `engine.imaging.generate.sample`.
        format: "nifti", or "dicom": one folder per series.

    Raises:
        UsageError: an argument does not fit the model, or `out` exists.
    """
    from engine.imaging.generate import Baseline, load_model, sample
    from engine.imaging.inputs import follow_up as at_follow_up
    from engine.imaging.inputs import read_scans
    from engine.imaging.volume import write_volume
    from engine.training.checkpoint import folder_of

    if not 0 <= shard[0] < shard[1]:
        raise UsageError("a shard (i, k) with 0 <= i < k", f"{shard}", "shard")
    if format not in ("nifti", "dicom"):
        raise UsageError("format nifti or dicom", f"'{format}'", "--format")
    subjects = shard_range(n, shard)
    model = load_model(run, device)
    produce, names = model.config.data.produce, [c.name for c in model.covariates]
    if format == "dicom" and produce != "image":
        raise UsageError("format nifti for label maps", "dicom", "--format")
    visits, ignored = _visits(subjects, set, follow_up, covariates_csv, names)
    maps = read_scans(label_maps, "label", None) if label_maps else None
    earlier = None
    if baseline:
        if covariates_csv or follow_up:
            raise UsageError("--set beside --baseline", "a table of covariates or of visits", "sample")
        scans = read_scans(baseline, "image", model.config.data.modality)
        earlier = [Baseline(volume, {k: row[k] for k in names if k in row}) for volume, row in scans]
        visits = [[at_follow_up(earlier[k % len(earlier)].covariates, set or {}, names)] for k in subjects]
    rows: list[dict[str, Any]] = []
    counts = dict.fromkeys(subjects, 0)
    with atomic_folder(out) as folder:
        for index, volume, given in sample(
            model,
            len(subjects),
            seed=seed,
            start=subjects.start,
            covariates=visits,
            label_maps=[volume for volume, _ in maps] if maps else None,
            baselines=earlier,
            size=size,
            spacing_mm=spacing_mm,
            memory_gb=memory_gb,
            force=force,
        ):
            visit = counts[index]
            counts[index] += 1
            if progress is not None:
                progress("sampling", index - subjects.start + 1, len(subjects))
            name = f"SYN{index:09d}_visit{visit}" + ("" if format == "dicom" else ".nii.gz")
            row = {"image": name, "subject": f"SYN{index:09d}", "visit": visit, **given}
            if produce == "pair":
                row["label"] = f"SYN{index:09d}_visit{visit}_label.nii.gz"
                drawn = replace(volume, array_cdhw=volume.array_cdhw[-1:], modality=None)
                write_volume(drawn, folder / row["label"], description="SYNTHETIC")
                volume = replace(volume, array_cdhw=volume.array_cdhw[:-1])
            write_volume(
                volume,
                folder / name,
                format=format,
                description="SYNTHETIC",
                subject=f"SYN{index:09d}",
            )
            rows.append(row)
        given_names = [name for name in names if not name.startswith(BASELINE) or any(name in row for row in rows)]
        labelled = ["label"] if produce == "pair" else []
        columns = list(dict.fromkeys(["image", *labelled, "subject", "visit", *given_names]))
        write_csv(folder / "volumes.csv", columns, rows)
        made = [str(row[column]) for row in rows for column in ("image", *labelled)]
        digests = {name: provenance.input_record(folder / name)["sha256"] for name in made}
        write_json(folder / "checksums.json", digests)
        provenance.write(
            folder,
            "imaging sample",
            config=model.config.model_dump(mode="json"),
            inputs=[Path(run) / "config.yaml", folder_of(run, model.step)],
            seed=seed,
            synthetic=True,
            extra={
                "subjects": len(subjects),
                "first_subject": subjects.start,
                "shard": f"{shard[0]}/{shard[1]}",
                "volumes": len(rows),
                "memory_gb": memory_gb,
                "conditioned_on": {"label_maps": bool(maps), "scans_of_people": bool(earlier)},
            },
        )
    result = {"out": Path(out).name, "volumes": len(rows), "subjects": len(subjects), "first_subject": subjects.start}
    return {**result, "seed": seed, "ignored_columns": ignored}


def paint_command(
    run: str | Path,
    image: str | Path,
    out: str | Path,
    *,
    region: str | Path | None = None,
    n: int = 1,
    seed: int = 0,
    set: Mapping[str, Any] | None = None,
    resamples: int = 5,
    force: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`engine imaging paint`: see `engine.imaging.paint.paint`; `n` volumes, the region that was generated, `volumes.csv`
    and `provenance.json` in a new folder `out`. Parts of a real scan stay a real scan: they are no synthetic data.

    Raises:
        UsageError: an argument does not fit the model, or `out` exists. InputError: a scan cannot be used.
    """
    from engine.imaging.generate import load_model
    from engine.imaging.paint import paint
    from engine.imaging.volume import read_volume, write_volume
    from engine.training.checkpoint import folder_of

    model = load_model(run, device)
    scan = read_volume(image, modality=model.config.data.modality)
    asked = read_volume(region) if region is not None else None
    rows = []
    with atomic_folder(out) as folder:
        painted = paint(
            model, scan, asked, n=n, seed=seed, covariates=set, resamples=resamples, force=force
        )  # fmt: skip
        for index, volume, outside in painted:
            name = f"PAINTED{index:06d}.nii.gz"
            write_volume(volume, folder / name, description="PARTLY SYNTHETIC")
            rows.append({"image": name, **(set or {})})
            if index == 0:
                mask = replace(volume, array_cdhw=outside[None].astype(np.float32), modality=None, units="arbitrary")
                write_volume(mask, folder / "generated.nii.gz", description="WHERE VOXELS ARE SYNTHETIC")
            if progress is not None:
                progress("painting", index + 1, n)
        write_csv(folder / "volumes.csv", ["image", *(set or {})], rows)
        provenance.write(
            folder,
            "imaging paint",
            config=model.config.model_dump(mode="json"),
            inputs=[Path(run) / "config.yaml", folder_of(run, model.step)],
            seed=seed,
            extra={"volumes": n, "resamples": resamples, "scans_of_people": True},
        )
    return {"out": Path(out).name, "volumes": n, "generated_voxels": int(outside.sum()), "seed": seed}


def evaluate_command(
    real_dir: str | Path,
    synthetic_dir: str | Path,
    *,
    train: str | Path | None = None,
    reference: str | Path | None = None,
    out: str | Path | None = None,
    modality: str | None = None,
    seed: int = 0,
    quick: bool = False,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    cache: str | Path | None = None,
    report: Callable[[Path, Any, int], Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`engine imaging evaluate`: findings of synthetic against real; a directory is read through its `volumes.csv` if
    it has one.

    `modality` says what NIfTI files hold, which does not record it ("CT" = Hounsfield units).
    With `train`, and unless `quick`, the metrics of `engine.imaging.quality` are added, as the QualityConfig at `config`
    and `overrides` say; networks are kept in `cache` (default: the cache of the run folder that `train` lies in, if it does).
    With `out`, the folder gets `findings.json`, `montage.png` and `provenance.json`, and what `report(folder, evaluation,
    seed)` adds to it.
    """
    from engine.imaging.evaluate import evaluate, montage_image

    real, persons = read_folder(real_dir, modality)
    synthetic, synthetic_persons = read_folder(synthetic_dir, modality)
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
    networks: dict[str, str] = {}
    if train is not None and not quick:
        sides = {"real": (real_dir, real, persons), "train": (train, fitted, fitted_persons)}
        learned = _learned_metrics(
            {**sides, "synthetic": (synthetic_dir, synthetic, synthetic_persons)},
            config,
            overrides,
            cache,
            seed,
            progress,
        )
        made = replace(made, findings=[*made.findings, *learned.findings])
        networks = learned.networks
    result = {"real": len(real), "synthetic": len(synthetic), "findings": [f.to_json() for f in made.findings]}
    if networks:
        result["networks"] = networks
    if out is not None:
        from matplotlib.image import imsave

        with atomic_folder(out) as folder:
            write_json(folder / "findings.json", result)
            enlarged = np.kron(montage_image(made.figures), np.ones((3, 3), dtype=np.uint8))
            imsave(folder / "montage.png", enlarged, cmap="gray", vmin=0, vmax=255)
            if report is not None:
                report(folder, made, seed)
            provenance.write(
                folder, "imaging evaluate", inputs=[real_dir, synthetic_dir], seed=seed, extra={"networks": networks}
            )
    return result


def _learned_metrics(
    folders: Mapping[str, tuple[Any, Any, Any]],
    config: str | Path | None,
    overrides: Sequence[str],
    cache: str | Path | None,
    seed: int,
    progress: Progress | None,
) -> Any:
    """The assessment of sides that are (folder, volumes, people) by name; labels are those of the training side."""
    from engine.imaging.dataset import common_grid
    from engine.imaging.quality.assess import assess
    from engine.imaging.quality.config import load_quality_config
    from engine.imaging.quality.sides import label_maps, label_values, read_cells, side_of

    settings, grid = load_quality_config(config, overrides), common_grid(folders["synthetic"][1], "evaluate")
    cells = {name: read_cells(folder, len(volumes)) for name, (folder, volumes, _) in folders.items()}
    maps = {name: label_maps(one) for name, one in cells.items()}
    values = label_values(maps["train"]) if maps["train"] and maps["real"] else []
    sides = {
        name: side_of(volumes, people, grid, maps=maps[name], labels=values, covariates=cells[name].covariates)
        for name, (_, volumes, people) in folders.items()
    }
    run = Path(str(folders["train"][0])).parent
    if cache is None and (run / "config.yaml").is_file():
        cache = run / "cache"
    return assess(
        sides["real"], sides["train"], sides["synthetic"], settings, labels=len(values), seed=seed,
        cache=None if cache is None else Path(cache), progress=progress,
    )  # fmt: skip


def read_folder(folder: str | Path, modality: str | None = None) -> tuple[list[Any], list[str]]:
    """Volumes of a folder and the person of each, in the order of `folder_paths`.

    Raises:
        InputError: no volume there, or one that cannot be read.
    """
    from engine.imaging.volume import read_volume

    paths, persons = folder_paths(folder)
    named = [f"scan {k} of {len(paths)} in {Path(folder).name}" for k in range(1, len(paths) + 1)]
    return [read_volume(path, modality=modality, where=where) for path, where in zip(paths, named)], persons


def folder_paths(folder: str | Path) -> tuple[list[Path], list[str]]:
    """Paths of the volumes of a folder and the person of each: through its `volumes.csv` if there is one, of a BIDS
    dataset its images, else every NIfTI file under it in name order. A path to a CSV file is taken as that table.

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
    elif bids.is_dataset(folder):
        rows = bids.read_table(folder)[1]
        paths, persons = [folder / row["image"] for row in rows], [row["subject"] for row in rows]
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
