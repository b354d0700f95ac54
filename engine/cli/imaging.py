"""`engine imaging ...`: train, sample and evaluate 3D scans."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engine.cli.common import (
    JsonFlag,
    Out,
    Overrides,
    Seed,
    Shard,
    emit,
    finding_lines,
    parse_assignments,
    parse_shard,
    progress_bar,
)
from engine.errors import UsageError

app = typer.Typer(no_args_is_help=True, help="3D scans: train a latent diffusion model, sample volumes, evaluate.")


@app.command()
def prepare(
    config: Annotated[Path, typer.Option("--config", help="YAML, one whole run; see configs/imaging/.")],
    data: Annotated[Path, typer.Option("--data", help="CSV or BIDS dataset, as for train.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the fitted scans; it holds people's data.")],
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes; default: the job's cores.")
    ] = None,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Read, check and fit the scans that training will read; `train --cache` takes the folder."""
    from engine.imaging.prepare import prepare_command

    with progress_bar() as progress:
        made = prepare_command(config, data, out, overrides=overrides or [], workers=workers, progress=progress)
    emit(made, json)


@app.command()
def train(
    config: Annotated[Path, typer.Option("--config", help="YAML, one whole run; see configs/imaging/.")],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="CSV: image, optionally label, subject, visit, covariates; paths relative to it. Or a BIDS dataset.",
        ),
    ],
    out: Out,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    cache: Annotated[Path | None, typer.Option("--cache", help="Folder made by `engine imaging prepare`.")] = None,
    scratch: Annotated[
        Path | None,
        typer.Option("--scratch", help="Folder on a disk of each node; what training reads is copied there."),
    ] = None,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Train the autoencoder and the flow model; write a run folder with checkpoints."""
    from engine.imaging.commands import train_command

    with progress_bar() as progress:
        result = train_command(
            config, data, out, overrides=overrides or [], resume=resume, cache=cache, scratch=scratch, progress=progress
        )
    emit(result, json)


@app.command()
def estimate(
    config: Annotated[Path, typer.Option("--config", help="YAML, one whole run; see configs/imaging/.")],
    tflops: Annotated[
        float, typer.Option("--tflops", help="Sustained 10^12 operations per second of one device; a measured figure.")
    ],
    processes: Annotated[int, typer.Option("--processes", min=1, help="Devices that share a batch.")] = 1,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Say what a config takes before anything runs: parameters, arithmetic, memory and time of training and sampling."""
    from engine.imaging.config import load_config
    from engine.imaging.estimate import estimate as estimated

    emit(estimated(load_config(config, overrides or []), tflops, processes), json)


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="Run folder written by `engine imaging train`.")],
    n: Annotated[int, typer.Option("-n", min=1, help="How many volumes, over all shards.")],
    out: Out,
    seed: Seed = 0,
    shard: Shard = "0/1",
    overrides: Overrides = None,
    covariates: Annotated[
        Path | None, typer.Option("--covariates", help="CSV: one row per visit, column `subject` and covariates.")
    ] = None,
    label_maps: Annotated[
        Path | None, typer.Option("--label-maps", help="A label map or a CSV of them, for a model conditioned on them.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", help="An earlier scan or a CSV of them: makes follow-ups; --set age=+2 adds."),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="DxHxW", help="Voxels, within what was trained.")
    ] = None,
    spacing: Annotated[str | None, typer.Option("--spacing", metavar="AxBxC", help="Millimetres per voxel.")] = None,
    memory_gb: Annotated[
        float | None, typer.Option("--memory-gb", help="Decode in a stream of planes above this.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Generate outside the trained field of view.")] = False,
    format: Annotated[str, typer.Option("--format", help="nifti, or dicom: one folder per series.")] = "nifti",
    json: JsonFlag = False,
) -> None:
    """Write synthetic volumes; `--set age=70` fixes a covariate, the others are left open (with flow.linear_mean: average)."""
    from engine.imaging.shards import sample_shard

    with progress_bar() as progress:
        result = sample_shard(
            run,
            n,
            seed=seed,
            shard=parse_shard(shard),
            set=parse_assignments(overrides),
            out=out,
            format=format,
            covariates_csv=covariates,
            label_maps=label_maps,
            baseline=baseline,
            size=parse_triple(size, "--size", int),
            spacing_mm=parse_triple(spacing, "--spacing", float),
            memory_gb=memory_gb,
            force=force,
            progress=progress,
        )
    emit(result, json)


@app.command()
def paint(
    run: Annotated[Path, typer.Argument(help="Run folder written by `engine imaging train`.")],
    image: Annotated[Path, typer.Argument(help="Scan of which a part is kept exactly.")],
    out: Out,
    region: Annotated[
        Path | None, typer.Option("--region", help="Mask of what is generated; default: what lies outside the scan.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many different ones.")] = 1,
    seed: Seed = 0,
    resamples: Annotated[int, typer.Option("--resamples", min=1, help="Times each step is taken.")] = 5,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Also at a spacing that was not trained.")] = False,
    json: JsonFlag = False,
) -> None:
    """Generate part of a scan anew, or what lies beyond its field of view; the rest is kept voxel for voxel."""
    from engine.imaging.commands import paint_command

    with progress_bar() as progress:
        result = paint_command(
            run,
            image,
            out,
            region=region,
            n=n,
            seed=seed,
            set=parse_assignments(overrides),
            resamples=resamples,
            force=force,
            progress=progress,
        )
    emit(result, json)


@app.command()
def finish(
    out: Annotated[Path, typer.Argument(help="What --out of the shards was.")],
    shards: Annotated[int, typer.Option("--shards", min=2, help="How many shards there are.")],
    json: JsonFlag = False,
) -> None:
    """Join the shards of `engine imaging sample --shard i/k` into the folder a run without shards would have made."""
    from engine.imaging.shards import finish as join

    with progress_bar() as progress:
        result = join(out, shards, progress=progress)
    emit(result, json)


@app.command()
def evaluate(
    real: Annotated[Path, typer.Option("--real", help="Real volumes: a folder or a CSV.")],
    synthetic: Annotated[Path, typer.Option("--synthetic", help="Synthetic volumes: a folder or a CSV.")],
    train: Annotated[
        Path | None, typer.Option("--train", help="Training volumes: for the real-versus-real floor.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for findings and a montage.")] = None,
    modality: Annotated[str | None, typer.Option("--modality", help="What NIfTI files hold: CT (HU) or MR.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Without the metrics that learn on --train.")] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML of the learned metrics; see configs/imaging/evaluate.yaml.")
    ] = None,
    overrides: Overrides = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Folder for networks learned on --train; made of people's data.")
    ] = None,
    seed: Seed = 0,
    json: JsonFlag = False,
) -> None:
    """How far synthetic volumes are from real ones, beside how far real ones are from each other."""
    from engine.imaging.commands import evaluate_command
    from engine.release.evaluation import scan_report

    with progress_bar() as progress:
        result = evaluate_command(
            real,
            synthetic,
            train=train,
            out=out,
            modality=modality,
            seed=seed,
            quick=quick,
            config=config,
            overrides=overrides or [],
            cache=cache,
            report=scan_report,
            progress=progress,
        )
    emit(result, json, lambda r: finding_lines(r["findings"]))


def parse_triple(text: str | None, where: str, kind: type) -> list[Any] | None:
    """`"32x48x32"` as three numbers."""
    if text is None:
        return None
    try:
        values = [kind(part) for part in text.lower().replace(",", "x").split("x")]
    except ValueError:
        values = []
    if len(values) != 3:
        raise UsageError("three numbers, e.g. 32x48x32", repr(text), where)
    return values
