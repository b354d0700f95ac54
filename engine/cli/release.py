"""`engine release`: audited data leave the building, whole and marked, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.cli.common import JsonFlag, Out, emit


def release(
    source: Annotated[Path, typer.Argument(help="File or folder that was audited.")],
    audit: Annotated[Path, typer.Option("--audit", help="audit.json of exactly these bytes.")],
    out: Out,
    json: JsonFlag = False,
) -> None:
    """Copy audited data to a release folder; refuses (exit 3) without a passing audit of exactly these bytes."""
    from engine.release.manifest import release as make_release

    emit(make_release(source, audit, out), json)


def register(app: typer.Typer) -> None:
    """Add the command to the main app."""
    app.command()(release)
