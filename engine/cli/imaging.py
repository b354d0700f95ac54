"""`engine imaging ...`: train, sample and evaluate 3D scans."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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

app = typer.Typer(no_args_is_help=True, help="3D scans: train a latent diffusion model, sample volumes, evaluate.")


@app.command()
def train(
    config: Annotated[Path, typer.Option("--config", help="YAML, one whole run; see configs/imaging/.")],
    data: Annotated[
        Path,
        typer.Option("--data", help="CSV: image, optionally label, subject, visit, covariates; paths relative to it."),
    ],
    out: Out,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Train the autoencoder and the flow model; write a run folder with checkpoints."""
    from engine.imaging.commands import train_command

    with progress_bar() as progress:
        result = train_command(config, data, out, overrides=overrides or [], resume=resume, progress=progress)
    emit(result, json)


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="Run folder written by `engine imaging train`.")],
    n: Annotated[int, typer.Option("-n", min=1, help="How many volumes, over all shards.")],
    out: Out,
    seed: Seed = 0,
    shard: Shard = "0/1",
    overrides: Overrides = None,
    format: Annotated[str, typer.Option("--format", help="nifti, or dicom: one folder per series.")] = "nifti",
    json: JsonFlag = False,
) -> None:
    """Write synthetic volumes; `--set age=70` fixes a covariate, the others follow the training distribution."""
    from engine.imaging.commands import sample_command

    with progress_bar() as progress:
        result = sample_command(
            run,
            n,
            seed=seed,
            shard=parse_shard(shard),
            set=parse_assignments(overrides),
            out=out,
            format=format,
            progress=progress,
        )
    emit(result, json)


@app.command()
def evaluate(
    real: Annotated[Path, typer.Option("--real", help="Real volumes: a folder or a CSV.")],
    synthetic: Annotated[Path, typer.Option("--synthetic", help="Synthetic volumes: a folder or a CSV.")],
    train: Annotated[
        Path | None, typer.Option("--train", help="Training volumes: for the real-versus-real floor.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for findings and figures.")] = None,
    seed: Seed = 0,
    json: JsonFlag = False,
) -> None:
    """How far synthetic volumes are from real ones, beside how far real ones are from each other."""
    from engine.imaging.commands import evaluate_command

    with progress_bar() as progress:
        result = evaluate_command(real, synthetic, train=train, out=out, seed=seed, progress=progress)
    emit(result, json, lambda r: finding_lines(r["findings"]))
