"""Scans as audit pools: copy-detector features on one common grid, with mirrored views, and the planted copies that only
this modality can make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine import seeding
from engine.audit.pools import Pool
from engine.imaging.commands import read_folder
from engine.imaging.dataset import common_grid, fit_volume
from engine.imaging.embedding import embed, transforms
from engine.imaging.volume import Volume

CONTROL_SCANS = 60
Progress = Callable[[str, int, int], None]


def _mirrored(volume: Volume) -> Volume:
    return replace(volume, array_cdhw=np.ascontiguousarray(volume.array_cdhw[:, ::-1]))


def scan_pool(volumes: Sequence[Volume], persons: Sequence[str]) -> Pool:
    """Features of volumes that lie on one grid; every row also mirrored left to right, as a view."""
    mirrored = embed([_mirrored(volume) for volume in volumes])
    return Pool("features", embed(volumes), np.array(persons, dtype=str), views=mirrored[None])


def audit_pools(
    train: Path, holdout: Path, synthetic: Path, *, seed: int = 0, progress: Progress | None = None
) -> tuple[dict[str, Pool], dict[str, Pool]]:
    """Pools "train", "holdout", "synthetic" of three tables or folders of scans, and the planted controls.

    Controls: training scans mirrored, turned by 5 degrees, noised and with another gamma, at most CONTROL_SCANS of each.

    Raises:
        InputError: a side cannot be read, or the synthetic volumes differ in shape.
    """
    sides = {"train": train, "holdout": holdout, "synthetic": synthetic}
    read = {}
    for done, (name, path) in enumerate(sides.items()):
        read[name] = read_folder(path)
        if progress is not None:
            progress("reading scans", done + 1, len(sides))
    grid = common_grid(read["synthetic"][0], "audit")
    fitted = {name: [fit_volume(volume, grid) for volume in volumes] for name, (volumes, _) in read.items()}
    pools = {name: scan_pool(fitted[name], read[name][1]) for name in sides}

    rng = seeding.generator(seed, "imaging.audit.controls")
    chosen = np.sort(rng.permutation(len(fitted["train"]))[:CONTROL_SCANS])
    copies: dict[str, list[Volume]] = {}
    for index in chosen:
        for name, volume in transforms(fitted["train"][index]).items():
            copies.setdefault(f"{name}_copycat", []).append(volume)
    people = [f"control-{k}" for k in range(len(chosen))]
    return pools, {name: scan_pool(volumes, people) for name, volumes in copies.items()}
