"""Scans that sampling starts from: a file, or a table with the column image (label maps: label, else image) and covariates.

A baseline's covariates are those of its row. What is asked at the follow-up is the same with changes; a change that begins
with + is added to the baseline's value (`age=+2`).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import InputError, UsageError
from engine.imaging.config import BASELINE
from engine.imaging.dataset import is_missing
from engine.imaging.volume import Volume, read_volume


def read_scans(path: str | Path, column: str, modality: str | None) -> list[tuple[Volume, dict[str, str]]]:
    """Volumes with the cells of their rows; of a single file the cells are empty.

    Args:
        column: which holds the path, relative to the table; where a table lacks it, `image`.

    Raises:
        InputError: nothing there, or a row whose file cannot be used; names the row.
    """
    path = Path(path)
    if path.suffix.lower() != ".csv":
        return [(read_volume(path, modality=modality), {})]
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except FileNotFoundError:
        raise InputError("a scan or a table of scans", "nothing there", path) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError("a CSV table of scans", str(error), path) from None
    name = column if rows and column in rows[0] else "image"
    if not rows or name not in rows[0]:
        raise InputError(f"rows and a column '{name}'", ", ".join(rows[0]) if rows else "no row", path)
    made = []
    for number, row in enumerate(rows, start=2):
        cell = (row[name] or "").strip()
        if not cell:
            raise InputError("the path of a scan", "an empty cell", f"{path} row {number}")
        made.append(
            (read_volume(path.parent / cell, modality=modality), {k: (v or "").strip() for k, v in row.items()})
        )
    return made


def follow_up(baseline: Mapping[str, Any], changes: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Covariates at the follow-up: the baseline's with `changes`; names the model does not know are kept only in `changes`.

    Raises:
        UsageError: a change by + of a covariate that the baseline does not have.
    """
    asked = {name: baseline[name] for name in known if not name.startswith(BASELINE) and name in baseline}
    for name, value in changes.items():
        text = str(value)
        if not text.startswith("+"):
            asked[name] = value
            continue
        try:
            asked[name] = float(baseline[name]) + float(text)
        except (KeyError, ValueError):
            got = "none" if is_missing(baseline.get(name)) else f"'{baseline[name]}'"
            raise UsageError(
                f"a number for '{name}' at the baseline, to which {text} is added", got, "--set", f"{name}=VALUE"
            ) from None
    return asked
