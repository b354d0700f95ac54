"""`engine doctor` and `engine demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engine.cli.common import JsonFlag, Seed, emit, progress_bar


def doctor(json: JsonFlag = False) -> None:
    """What this machine can do, what is missing, and what to do about it."""
    from engine.doctor import examine

    def lines(report: dict[str, Any]) -> list[str]:
        return [
            f"{row['state']:<8}{row['what']:<26}{row['found']}" + (f"  -> {row['advice']}" if row["advice"] else "")
            for row in report["checks"]
        ]

    report = examine()
    emit(report, json, lines)
    if any(row["state"] == "missing" for row in report["checks"]):
        raise typer.Exit(2)


def demo(
    out: Annotated[Path, typer.Argument(help="Folder for the run.")] = Path("runs/demo"),
    config: Annotated[
        Path | None,
        typer.Option("--config", help="YAML; default configs/demo.yaml of the checkout or the built-in values."),
    ] = None,
    seed: Seed = 0,
    json: JsonFlag = False,
) -> None:
    """The main job on the embedded cohort, from files to the release; goes on where an earlier run stopped."""
    from engine.demo import run_demo, summary_lines

    with progress_bar() as progress:
        result = run_demo(out, config=config, seed=seed, progress=progress)
    emit(result, json, summary_lines)


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    app.command()(doctor)
    app.command()(demo)
