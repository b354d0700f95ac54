"""The run folder of a training: made with its config in it, or opened again for the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.atomic import atomic_folder, write_text
from engine.errors import UsageError


def open_run(
    out: Path,
    resume: bool,
    *,
    text: str,
    now: dict[str, Any],
    stored: Callable[[Path], dict[str, Any]],
    sections: Sequence[str],
) -> None:
    """Create the run folder, or check that the one there holds this run.

    Args:
        text: the resolved config as it is written. now: the same as values.
        stored: reads the values of a config that a run folder holds.
        sections: what a resumed run may not change, beside the precision.

    Raises:
        UsageError: the folder exists and `resume` is False, or it holds no run, or one of another config.
    """
    path = out / "config.yaml"
    if not resume:
        if out.exists():
            raise UsageError("a folder that does not exist yet", "an existing one", out, "another --out, or --resume")
        with atomic_folder(out) as folder:  # a folder without its config could neither be resumed nor begun
            write_text(folder / "config.yaml", text)
        return
    if not path.is_file():
        raise UsageError("a run folder with config.yaml", "none", out, "the folder of an earlier run, or no --resume")
    before = stored(path)
    for section in sections:
        if before[section] != now[section]:
            raise UsageError(f"the config this run was started with (it differs in {section})", "another", path)
    if before["training"]["precision"] != now["training"]["precision"]:
        raise UsageError(f"precision {before['training']['precision']}", now["training"]["precision"], path)
