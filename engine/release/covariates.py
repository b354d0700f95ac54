"""Columns of tables in words: for people who want to see at a glance whom a set is made of.

Ids and file names are left out, and levels with few rows are put together, so that no row is somebody's alone.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.release.report import Section, Table

Rows = list[dict[str, str]]
LEAST = 5  # rows behind every count that is printed
_MOST_LEVELS = 12


def read_rows(path: Path) -> Rows:
    """Rows of a CSV, or of a TSV where the name ends in .tsv."""
    with path.open(newline="", encoding="utf-8-sig") as stream:
        return list(csv.DictReader(stream, delimiter="\t" if path.name.lower().endswith(".tsv") else ","))


def summaries(rows: Rows) -> dict[str, tuple[int, str]]:
    """Column -> (rows with a value, what it holds); ids, file names and free text are left out."""
    found = {column: _summary([row.get(column) or "" for row in rows]) for column in (rows[0] if rows else {})}
    return {column: said for column, said in found.items() if said is not None}


def section_of(tables: Sequence[tuple[str, Rows]]) -> list[Section]:
    """One table for each of some released tables, given as (name, rows); no section where nothing can be said."""
    made = []
    for name, rows in tables:
        lines = [(column, n, words) for column, (n, words) in summaries(rows).items()]
        if lines:
            made.append(Table(f"{name}, {len(rows)} rows", ("Column", "Rows with a value", "What it holds"), lines))
    text = f"All of them synthetic. Levels with fewer than {LEAST} rows are not told apart."
    return [Section("Covariates", text, tables=made)] if made else []


def side_by_side(real: Rows, synthetic: Rows) -> list[Section]:
    """Internal: columns that real and synthetic scans both have, beside each other."""
    here, there = summaries(synthetic), summaries(real)
    lines = [(column, here[column][1], there[column][1]) for column in here if column in there]
    if not lines:
        return []
    caption = f"{len(synthetic)} synthetic and {len(real)} real rows"
    table = Table(caption, ("Column", "Synthetic", "Real"), lines)
    return [
        Section("Covariates", "Who the synthetic people are, and who the real ones.", tables=[table], internal=True)
    ]


def _summary(cells: Sequence[str]) -> tuple[int, str] | None:
    cells = [text for text in cells if text not in ("", "n/a")]
    if not cells:
        return None
    try:
        values = np.array([float(text) for text in cells])
    except ValueError:
        levels: dict[str, int] = {}
        for text in cells:
            levels[text] = levels.get(text, 0) + 1
        if len(levels) > _MOST_LEVELS:
            return None
        often = {text: n for text, n in sorted(levels.items()) if n >= LEAST}
        if not often:
            return None
        rest = len(cells) - sum(often.values())
        return len(cells), ", ".join(
            [*(f"{text} {n}" for text, n in often.items()), *([f"other {rest}"] if rest else [])]
        )
    if len(values) < LEAST:
        return len(cells), f"fewer than {LEAST} values"
    if (values == values[0]).all():
        return len(cells), f"all {values[0]:g}"
    low, high = np.quantile(values, [0.05, 0.95])
    spread = f"mean {values.mean():.3g}, standard deviation {values.std():.3g}"
    return len(cells), f"{spread}, 5th to 95th percentile {low:.3g} to {high:.3g}"
