"""`engine imaging prepare`: what training reads, made once by a job that holds no GPU.

Every scan of the training side is read, checked and fitted, and lies in the cache folder that `engine imaging train --cache`
takes; a scan or covariate that cannot be used is told here, not after the GPUs were allotted. Several processes share the
work; a job that was stopped goes on where it was, because each fitted scan is a file until all are there. The folder holds
people's data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import UsageError
from engine.imaging.config import load_config
from engine.training.log import Progress


def prepare_command(
    config_path: str | Path,
    data_csv: str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fill the folder `out`; one that is filled already, from the same files, is left as it is.

    Args:
        data_csv: table of scans, or a BIDS dataset. workers: processes; by default as many as the job has cores.

    Returns:
        {"out", "scans", "people", "shape": (channels, d, h, w)}.

    Raises:
        InputError: a row of the table cannot be used. UsageError: `out` is a run folder.
    """
    from engine.devices import cpu_count
    from engine.imaging.dataset import learn_covariates, load_scans, read_table

    config, out = load_config(config_path, list(overrides)), Path(out)
    if (out / "config.yaml").exists():
        raise UsageError("a folder for the fitted scans", "a run folder", out, "another --out")
    rows = [row for row in read_table(data_csv, config.data) if row.train]
    learn_covariates(rows, config.data, data_csv)
    many = workers or cpu_count()
    made = [load_scans(rows, config, out, grid, many, progress) for grid in range(len(config.data.grids))]
    shape = [int(n) for n in made[0].x_bcdhw.shape[1:]]
    return {"out": out.name, "scans": len(rows), "people": len({r.subject for r in rows}), "shape": shape}
