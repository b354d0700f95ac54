"""`engine files ...`: say what can be read, before a job is queued for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.cli.common import JsonFlag, emit

app = typer.Typer(no_args_is_help=True, help="Check input files without reading them into a job.")


@app.callback()
def _group() -> None:
    """Keeps `check` a sub-command while it is the only one."""


@app.command()
def check(
    paths: Annotated[list[Path], typer.Argument(help="Files, or folders (a folder of DICOM files is one series).")],
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 2 when any input is rejected (for job scripts).")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Verdict for each input: ok (read), warn (read, with the reason), reject (refused, with the reason)."""
    from engine.files.check import check_paths

    rows = check_paths(paths)
    emit(
        {"inputs": rows},
        json,
        lambda r: [
            f"{row['verdict']:<7}{row['path']}" + (f": {row['why']}" if row["why"] else "") for row in r["inputs"]
        ],
    )
    if strict and any(row["verdict"] == "reject" for row in rows):
        raise typer.Exit(2)
