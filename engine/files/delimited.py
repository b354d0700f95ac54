"""Small tables of text with a header, as people write them: separated by tabs, else by commas, else by blanks.

What columns mean is left to the reader of each table.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.atomic import write_text


def read(path: str | Path) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, without a leading `#`, and the cells of every line after them; an empty line has none."""
    with open(path, encoding="utf-8", newline="") as stream:
        first = stream.readline()
        stream.seek(0)
        mark = next((each for each in "\t," if each in first), None)
        lines: Iterable[list[str]]
        lines = (line.split() for line in stream) if mark is None else csv.reader(stream, delimiter=mark)
        rows = [[cell.strip() for cell in row] for row in lines]
    return [name.lstrip("#") for name in rows[0]] if rows else [], rows[1:]


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table separated by commas, whole or absent; a cell that a row does not have is empty.

    Raises:
        ValueError: a row with a cell beyond `columns`.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
