"""The two sides of a table of scans as tables of their own, so that evaluation and audit can name them.

Both lie in the run folder, which holds people's data and stays inside; their paths lead back to the scans where they are.
"""

from __future__ import annotations

import os
from pathlib import Path

from engine.files.delimited import write_csv
from engine.imaging.config import DataConfig
from engine.imaging.dataset import read_records, read_table


def write_split(data_csv: str | Path, config: DataConfig, folder: str | Path) -> dict[str, int]:
    """Write `train.csv` and `holdout.csv` into `folder`; returns scans per side.

    The columns are those of `data_csv`, a table or a BIDS dataset; `image` and `label` are rewritten relative to `folder`.
    A side without people has no file.

    Raises:
        InputError: the table cannot be used; names the row.
    """
    data_csv, folder = Path(data_csv), Path(folder)
    columns, records = read_records(data_csv, config)
    counts = {}
    for side, wanted in (("train", True), ("holdout", False)):
        rows = [row for row in read_table(data_csv, config) if row.train is wanted]
        counts[side] = len(rows)
        if not rows:
            continue
        made = []
        for row in rows:
            record = dict(records[row.number - 2])
            for column, path in (("image", row.image), ("label", row.label)):
                if path is not None:
                    record[column] = os.path.relpath(path, folder)
            made.append(record)
        write_csv(folder / f"{side}.csv", columns, made)
    return counts
