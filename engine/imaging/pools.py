"""Scans as audit pools: copy-detector features on one common grid, with mirrored and turned views, the planted copies
that only this modality can make, the judge that confirms candidates voxel by voxel, and a refusal where the same scan or
the same person lies on both sides of the split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine import seeding
from engine.audit import Judge
from engine.audit.pools import Pool, topk
from engine.audit.store import write_store
from engine.errors import InputError
from engine.imaging.audit_judges import Compared, confirmation_judge
from engine.imaging.commands import read_folder
from engine.imaging.config import DataConfig
from engine.imaging.dataset import common_grid, fit_volume
from engine.imaging.embedding import embed, transforms, views
from engine.imaging.similarity import similarity
from engine.imaging.volume import Volume

CONTROL_SCANS = 60
SAME_SCAN_NCC = 0.95  # registered, at least; and
SAME_SCAN_RESIDUAL = 0.2  # 1 - NCC at most this share of what it is between neighbours that are different people
_SUSPECT = 0.6  # a holdout scan this share as far from training as the median one is compared voxel by voxel
_COMPARED = 10  # pairs that give the residual of different people
_NAMED = 5
Progress = Callable[[str, int, int], None]


def scan_pool(volumes: Sequence[Volume], persons: Sequence[str]) -> Pool:
    """Features of volumes that lie on one grid; every row also mirrored and turned, as views."""
    return Pool("features", embed(volumes), np.array(persons, dtype=str), views=views(volumes))


def audit_pools(
    train: Path, holdout: Path, synthetic: Path, *, seed: int = 0, progress: Progress | None = None
) -> tuple[dict[str, Pool], dict[str, Pool], list[Judge]]:
    """Pools "train", "holdout", "synthetic" of three tables or folders of scans, the planted controls, and the judges.

    Controls: training scans mirrored, turned by 5 degrees, noised and with another gamma, at most CONTROL_SCANS of each.

    Raises:
        InputError: a side cannot be read, the synthetic volumes differ in shape, or a person or a scan lies on both sides.
    """
    volumes, persons = read_folder(synthetic)
    real = real_sides(train, holdout, common_grid(volumes, "audit"), seed=seed, progress=progress)
    pool, judge = synthetic_pool(real, volumes, persons, seed=seed)
    return {**real.pools, "synthetic": pool}, real.controls, [judge]


@dataclass(frozen=True)
class RealSides:
    """Training side, holdout and planted controls on one grid: what audits of several synthetic sets have in common.

    Attributes:
        scans, pools: of "train" and "holdout". copies, controls: scans and pools of the planted copies, by name.
        compared: pairs of scans that were registered, for the judges.
    """

    grid: DataConfig
    scans: dict[str, list[Volume]]
    pools: dict[str, Pool]
    copies: dict[str, list[Volume]]
    controls: dict[str, Pool]
    compared: Compared = field(default_factory=dict)


def real_sides(
    train: Path, holdout: Path, grid: DataConfig, *, seed: int = 0, progress: Progress | None = None
) -> RealSides:
    """Read, check and embed the real sides, and plant the controls; errors as `audit_pools`."""
    sides = {"train": train, "holdout": holdout}
    tell = progress or (lambda what, done, total: None)
    read = {}
    for done, (name, path) in enumerate(sides.items()):
        read[name] = read_folder(path)
        tell("reading scans", done + 1, len(sides))
    check_people(read["train"][1], read["holdout"][1])
    check_voxels(*(read[name][0] for name in ("train", "holdout")), *(read[name][1] for name in ("train", "holdout")))
    scans = {name: [fit_volume(volume, grid) for volume in volumes] for name, (volumes, _) in read.items()}
    pools = {}
    for done, name in enumerate(sides):
        pools[name] = scan_pool(scans[name], read[name][1])
        tell("features of scans", done + 1, len(sides))
    check_same_scans((pools["train"], scans["train"]), (pools["holdout"], scans["holdout"]))

    rng = seeding.generator(seed, "imaging.audit.controls")
    chosen = np.sort(rng.permutation(len(scans["train"]))[:CONTROL_SCANS])
    copies: dict[str, list[Volume]] = {}
    for index in chosen:
        for name, volume in transforms(scans["train"][index]).items():
            copies.setdefault(f"{name}_copycat", []).append(volume)
    people = [f"control-{k}" for k in range(len(chosen))]
    controls = {}
    for done, (name, volumes) in enumerate(copies.items()):
        controls[name] = scan_pool(volumes, people)
        tell("controls of scans", done + 1, len(copies))
    return RealSides(grid, scans, pools, copies, controls)


def synthetic_pool(
    real: RealSides, volumes: Sequence[Volume], persons: Sequence[str], *, seed: int = 0
) -> tuple[Pool, Judge]:
    """The pool of a synthetic set, and the judge that knows it and all of `real`; the seed is that of `real`."""
    scans = [fit_volume(volume, real.grid) for volume in volumes]
    pool = scan_pool(scans, persons)
    sides = {name: (real.pools[name], real.scans[name]) for name in real.pools}
    planted = {name: (real.controls[name], real.copies[name]) for name in real.controls}
    known = {**sides, "synthetic": (pool, scans), **planted}
    return pool, confirmation_judge(known, seed=seed, compared=real.compared)


def write_scan_store(scans: Path, out: Path, *, grid_of: Path | None = None) -> Path:
    """Write the features of a table or folder of scans as an embedding store (`engine.audit.store`) into the new folder
    `out`, so that an audit elsewhere needs no scan. A store is data of the people in it.

    Args:
        grid_of: scans whose grid and spacing are taken, those that will be audited; default: `scans` themselves.

    Raises:
        InputError: a scan cannot be read, or the scans that give the grid differ in shape. UsageError: `out` exists.
    """
    volumes, persons = read_folder(scans)
    grid = common_grid(volumes if grid_of is None else read_folder(grid_of)[0], "embedding store")
    return write_store(scan_pool([fit_volume(volume, grid) for volume in volumes], persons), out)


def check_people(train: Sequence[str], holdout: Sequence[str]) -> None:
    """Refuse a person on both sides.

    Raises:
        InputError: with their number and the first of them.
    """
    both = sorted({*train} & {*holdout})
    if both:
        raise InputError(
            "different people in train and holdout",
            f"{len(both)} people in both ({_first(both)})",
            "audit",
            "split by person, not by scan",
        )


def check_voxels(
    train: Sequence[Volume], holdout: Sequence[Volume], train_persons: Sequence[str], holdout_persons: Sequence[str]
) -> None:
    """Refuse a scan that lies on both sides voxel for voxel under two names.

    Raises:
        InputError: with the number of pairs and the first of them.
    """
    names = {_digest(volume): person for volume, person in zip(train, train_persons, strict=True)}
    digests = [_digest(volume) for volume in holdout]
    _refuse([(person, names[d]) for d, person in zip(digests, holdout_persons, strict=True) if d in names], "")


def check_same_scans(train: tuple[Pool, Sequence[Volume]], holdout: tuple[Pool, Sequence[Volume]]) -> None:
    """Refuse a scan that lies on both sides mirrored, turned, noised or with other intensities.

    Holdout scans much nearer to training than the median one are registered with their nearest training scan. The pair is
    one scan where NCC is above SAME_SCAN_NCC and what is missing to 1 is below SAME_SCAN_RESIDUAL of what is missing, at the
    median, between neighbours of ordinary distance: heads of different people with much air about them can correlate
    above 0.95.

    Raises:
        InputError: with the number of pairs and the first of them.
    """
    distance, index = topk(holdout[0], train[0], 1)
    distance, index = distance[:, 0], index[:, 0]
    suspects = np.flatnonzero(distance < _SUSPECT * np.median(distance))
    if len(suspects) == 0:
        return
    middle = np.argsort(np.abs(distance - np.median(distance)), kind="stable")[:_COMPARED]

    def correlation(row: int) -> float:
        return similarity(train[1][index[row]], holdout[1][row]).ncc

    ordinary = float(np.median([1 - correlation(int(row)) for row in middle]))
    limit = max(SAME_SCAN_NCC, 1 - SAME_SCAN_RESIDUAL * ordinary)
    found = [(row, correlation(int(row))) for row in suspects]
    pairs = [(str(holdout[0].person[r]), str(train[0].person[index[r]])) for r, value in found if value > limit]
    _refuse(pairs, f" when registered (NCC above {limit:.4f})")


# ------------------------------------------------------------------------------------------------------------------ p


def _digest(volume: Volume) -> bytes:
    """Of shape and voxels, which are float32 whatever the file held."""
    head = str(volume.array_cdhw.shape).encode()
    return hashlib.sha256(head + np.ascontiguousarray(volume.array_cdhw).tobytes()).digest()


def _refuse(pairs: Sequence[tuple[str, str]], how: str) -> None:
    if pairs:
        shown = _first([f"'{a}' of the holdout and '{b}' of train" for a, b in sorted(set(pairs))])
        raise InputError(
            "different scans in train and holdout",
            f"{len(pairs)} pairs that are one scan under two names{how}: {shown}",
            "audit",
            "one of each pair removed, or both on one side, before training",
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
