"""Small tables as a dict of columns: what passes between the parts of a cohort, and its CSV and TSV form.

A column is a NumPy array; text columns have dtype object. Nothing here knows what the columns mean.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.atomic import atomic_path
from engine.errors import InputError, closest

Table = dict[str, np.ndarray]


def rows(table: Table) -> int:
    """Number of rows; 0 for a table without columns. Raises InputError when columns differ in length."""
    lengths = {name: len(column) for name, column in table.items()}
    if len(set(lengths.values())) > 1:
        raise InputError("columns of equal length", str(lengths), "table")
    return next(iter(lengths.values()), 0)


def from_records(records: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> Table:
    """Table of `columns` from dicts; numbers stay numbers (int64 or float64), everything else becomes text."""
    listed = list(records)
    return {name: column([record[name] for record in listed]) for name in columns}


def column(values: Sequence[Any]) -> np.ndarray:
    """One column: int64 where all are integers, float64 where all are numbers, otherwise text (object)."""
    if len(values) and all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in values):
        return np.asarray(values, dtype=np.int64)
    if len(values) and all(isinstance(v, (int, float, np.number)) and not isinstance(v, bool) for v in values):
        return np.asarray(values, dtype=np.float64)
    return np.asarray([str(v) for v in values], dtype=object)


def take(table: Table, index: np.ndarray) -> Table:
    """The rows chosen by a boolean mask or an integer index."""
    return {name: values[index] for name, values in table.items()}


def require(table: Table, names: Iterable[str], where: str) -> None:
    """Raise InputError, naming the nearest column present, when one of `names` is absent."""
    for name in names:
        if name not in table:
            raise InputError(f"a column '{name}'", f"columns {', '.join(table)}", where, closest(name, list(table)))


def write_table(path: str | Path, table: Table, columns: Sequence[str] | None = None) -> None:
    """Write CSV, or tab separated text when the name ends in .tsv; floats with 4 decimals; whole or not at all."""
    names = list(columns or table)
    require(table, names, str(path))
    with atomic_path(path) as partial, open(partial, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t" if str(path).endswith(".tsv") else ",", lineterminator="\n")
        writer.writerow(names)
        for row in range(rows(table)):
            values = (table[name][row] for name in names)
            writer.writerow([f"{v:.4f}" if isinstance(v, (float, np.floating)) else v for v in values])


def read_table(path: str | Path) -> Table:
    """Read what `write_table` wrote: a column is numeric where every cell of it is a number.

    Raises:
        InputError: no such file, no header, or a row with another number of cells than the header.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("a table", "no such file", path)
    with open(path, newline="", encoding="utf-8") as stream:
        lines = list(csv.reader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))
    if not lines:
        raise InputError("a header line", "an empty file", path)
    header, body = lines[0], lines[1:]
    for number, line in enumerate(body, start=2):
        if len(line) != len(header):
            raise InputError(f"{len(header)} cells", str(len(line)), f"{path}:{number}")
    return {name: _parse([line[i] for line in body]) for i, name in enumerate(header)}


def _parse(cells: list[str]) -> np.ndarray:
    for kind in (np.int64, np.float64):
        try:
            return np.asarray([kind(cell) for cell in cells], dtype=kind)
        except ValueError:
            continue
    return np.asarray(cells, dtype=object)
