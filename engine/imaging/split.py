"""The two sides of a table of scans as tables of their own, so that evaluation and audit can name them.

Both lie in the run folder, which holds people's data and stays inside; their paths lead back to the scans where they are.
"""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

from engine.atomic import write_text
from engine.imaging.config import DataConfig
from engine.imaging.dataset import read_table


def write_split(data_csv: str | Path, config: DataConfig, folder: str | Path) -> dict[str, int]:
    """Write `train.csv` and `holdout.csv` into `folder`; returns scans per side.

    The columns are those of `data_csv`; `image` and `label` are rewritten relative to `folder`. A side without people has
    no file.

    Raises:
        InputError: the table cannot be used; names the row.
    """
    data_csv, folder = Path(data_csv), Path(folder)
    with data_csv.open(newline="", encoding="utf-8-sig") as stream:
        records = list(csv.DictReader(stream))
    counts = {}
    for side, wanted in (("train", True), ("holdout", False)):
        rows = [row for row in read_table(data_csv, config) if row.train is wanted]
        counts[side] = len(rows)
        if not rows:
            continue
        text = io.StringIO()
        writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            record = dict(records[row.number - 2])
            for column, path in (("image", row.image), ("label", row.label)):
                if path is not None:
                    record[column] = os.path.relpath(path, folder)
            writer.writerow(record)
        write_text(folder / f"{side}.csv", text.getvalue())
    return counts
