"""`engine audit`: may these synthetic data leave the building?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.cli.common import JsonFlag, Out, Seed, emit, finding_lines, progress_bar


def audit(
    train: Annotated[
        Path,
        typer.Option("--train", help="What the model learned from: a panel, a CSV or folder of scans, or a store."),
    ],
    holdout: Annotated[Path, typer.Option("--holdout", help="Real people the model never saw, of the same kind.")],
    synthetic: Annotated[Path, typer.Option("--synthetic", help="What is to be released.")],
    out: Out,
    policy: Annotated[
        Path | None, typer.Option("--policy", help="YAML with thresholds; the default is configs/audit/default.yaml.")
    ] = None,
    people: Annotated[
        Path | None,
        typer.Option(
            "--people", help="CSV or TSV that maps sample ids or subjects to people: id, person, group, split."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="Run folder of the model, where it leaves the building too: attacks that use it."),
    ] = None,
    seed: Seed = 0,
    json: JsonFlag = False,
) -> None:
    """Copy audit with planted controls; writes audit.json and report.html; exits 3 when the verdict is not a pass."""
    from engine.release.audit_run import audit_files

    with progress_bar() as progress:
        result = audit_files(
            train, holdout, synthetic, out, policy=policy, people=people, model=model, seed=seed, progress=progress
        )
    emit(result, json, lambda r: [*finding_lines(r["findings"]), f"verdict: {r['verdict']}", f"report: {r['report']}"])
    if result["verdict"] != "pass":
        raise typer.Exit(3)


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    app.command()(audit)
