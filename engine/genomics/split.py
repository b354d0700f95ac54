"""A panel cut by person into a training and a held-out side, so that scores and audits have people the model never saw.

Relatives, and one person under two ids, stay on one side as far as the sites can tell (`relatedness.families`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engine import provenance, seeding
from engine.atomic import atomic_folder
from engine.errors import UsageError
from engine.genomics.panel import HaplotypePanel, read_panel, write_panel
from engine.genomics.relatedness import families


def held_out(panel: HaplotypePanel, share: float, seed: int) -> np.ndarray:
    """bool (S,): the people held out, `share` of every group (of all people where there are no groups), at random.

    A family lies where its first member lies.
    """
    group = np.zeros(panel.n_samples, dtype=str) if panel.samples.group is None else panel.samples.group
    chosen = np.zeros(panel.n_samples, dtype=bool)
    for index, name in enumerate(sorted(set(group.tolist()))):
        members = np.flatnonzero(group == name)
        order = seeding.generator(seed, "genomics.split", index).permutation(len(members))
        chosen[members[order[: round(share * len(members))]]] = True
    place = {name: at for at, name in enumerate(panel.samples.ids)}
    head_of = families(panel)
    return chosen[[place[head_of[name]] for name in panel.samples.ids]]


def split_command(
    panel_path: str | Path,
    *,
    out: str | Path,
    samples: str | Path | None = None,
    group_column: str | None = None,
    holdout: float = 0.2,
    seed: int = 0,
) -> dict[str, Any]:
    """Write `train.bcf` and `holdout.bcf` with indices into the new folder `out`.

    Returns:
        {"out", "train": people, "holdout": people}.

    Raises:
        UsageError: `holdout` leaves a side without people, or `out` exists. InputError: the panel cannot be used.
    """
    panel = read_panel(panel_path, samples_tsv=samples, group_column=group_column)
    chosen = held_out(panel, holdout, seed)
    if chosen.all() or not chosen.any():
        raise UsageError("people on both sides", f"{int(chosen.sum())} of {len(chosen)} held out", "--holdout")
    inputs = [panel_path, *([] if samples is None else [samples])]
    with atomic_folder(out) as folder:
        write_panel(panel.select(samples=~chosen), folder / "train.bcf")
        write_panel(panel.select(samples=chosen), folder / "holdout.bcf")
        provenance.write(folder, "genomics split", config={"holdout": holdout}, inputs=inputs, seed=seed)
    return {"out": str(out), "train": int((~chosen).sum()), "holdout": int(chosen.sum())}
