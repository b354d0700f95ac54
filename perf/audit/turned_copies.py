"""How far the copy search for scans sees: training scans turned by known angles about random axes, flagged with the mirrored
view alone and with the turned views too; and how alike copies and unseen people are once registered.

    python perf/audit/turned_copies.py DATA/imaging/hippocampus --copies 40
    python perf/audit/turned_copies.py DATA/imaging/hippocampus --honest 200
    python perf/audit/turned_copies.py phantoms --honest 200

About a minute and a half on one core. People are split at random (40 to the holdout); one table on standard output. With
--honest, people are split in three anew in every repeat, and the confirmation judges the third part, people nobody has copied:
how often does it convict? Pairs of scans meet again in later repeats and are registered once; repeats share people, and an
interval that takes them as independent is too narrow. With "phantoms" in place of a folder, 100 small volumes are drawn anew
for every repeat (a common template, own structure, noise): those are independent.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from engine.audit import AuditPolicy, Pool
from engine.audit.copies import CopySearch
from engine.audit.intervals import clopper_pearson
from engine.audit.pools import topk
from engine.imaging.audit_judges import confirmation_judge
from engine.imaging.commands import read_folder
from engine.imaging.config import DataConfig
from engine.imaging.dataset import fit_volume
from engine.imaging.embedding import embed, views
from engine.imaging.similarity import extent_mm, move, similarity, turn
from engine.imaging.volume import Volume
from engine.seeding import generator

DEGREES = (5, 8, 12, 16, 20)


def turned(volume: Volume, degrees: float, rng: np.random.Generator) -> Volume:
    """`volume` turned by `degrees` about a random axis, mirrored every second time."""
    axis = rng.standard_normal(3)
    matrix = turn((axis / np.linalg.norm(axis) * degrees).tolist())
    image, _ = move(torch.from_numpy(volume.array_cdhw[0].copy()), extent_mm(volume), matrix[None])
    array = image.numpy()
    return replace(volume, array_cdhw=np.ascontiguousarray(array[:, ::-1] if rng.random() < 0.5 else array))


def phantoms(repeat: int) -> list[Volume]:
    """100 people of 14 x 16 x 14 voxels: smooth structure that all share, and as much of their own."""
    shape, people = (14, 16, 14), range(100)
    template = ndimage.gaussian_filter(generator(0, "perf.turned_copies.template").standard_normal(shape), 3.0)
    made = []
    for rng in (generator(0, f"perf.turned_copies.phantom.{repeat}", k) for k in people):
        own = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5)
        array = template / template.std() + own / own.std() + 0.3 * rng.standard_normal(shape)
        made.append(Volume(array[None].astype(np.float32), np.eye(4), "MR", "arbitrary", {}))
    return made


def honest(scans: list[Volume] | None, person_n: np.ndarray, repeats: int) -> None:
    """Print how many sets of unseen people the confirmation convicts, and how near the nearest came; phantoms where None."""
    fixed, begun = scans is not None, time.process_time()
    convicted, floors, nulls, gaps, limits = 0, 0, 0, [], []
    seen: dict[tuple[int, int], tuple[float, float]] = {}  # NCC and SSIM of a pair of scans
    for repeat in range(repeats):
        if not fixed:
            scans, seen = phantoms(repeat), {}
            person_n = np.arange(len(scans)).astype(str)
        assert scans is not None
        if repeat == 0 or not fixed:
            rows, all_views = embed(scans), views(scans)
            row_of = {row.tobytes(): k for k, row in enumerate(rows)}
        order = generator(0, "perf.turned_copies.honest", repeat).permutation(np.unique(person_n))
        parts = {"train": order[:-70], "holdout": order[-70:-30], "synthetic": order[-30:]}
        sides, index_of = {}, {}
        for name, people in parts.items():
            index_of[name] = index = np.flatnonzero(np.isin(person_n, people))
            pool = Pool("features", rows[index], person_n[index], views=all_views[:, index])
            sides[name] = pool, [scans[i] for i in index]
        at = {name: {int(scan): place for place, scan in enumerate(index_of[name])} for name in ("train", "holdout")}
        compared = {
            (rows[a].tobytes(), name, places[b]): alike
            for (a, b), alike in seen.items()
            for name, places in at.items()
            if b in places
        }
        pools = {name: pool for name, (pool, _) in sides.items()}
        scored = CopySearch(pools["train"], pools["holdout"], AuditPolicy(), repeat).score(
            pools["synthetic"], "synthetic"
        )
        found = confirmation_judge(sides, seed=repeat, compared=compared)("synthetic", pools["synthetic"], scored)[0]
        seen.update({(row_of[row], int(index_of[side][k])): alike for (row, side, k), alike in compared.items()})
        convicted, floors = convicted + (found.verdict == "fail"), floors + int(found.floor or 0)
        nulls += found.n["unseen_people"] if isinstance(found.n, dict) else 0
        gaps.append(found.detail["gap_highest"])
        limits.append(found.detail["gap_unseen_highest"])
    low, high = clopper_pearson(convicted, repeats)
    print(
        f"honest sets convicted {convicted}/{repeats} ({low:.1%}-{high:.1%}); null people convicted by the others {floors} of "
        f"{nulls}; gap of the nearest candidate {np.median(gaps):.2f} (largest {max(gaps):.2f}), of the nearest unseen person "
        f"{np.median(limits):.2f}; {time.process_time() - begun:.0f} s"
    )


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--copies", type=int, default=40)
    parser.add_argument("--registered", type=int, default=20, help="pairs of each kind that are registered")
    parser.add_argument(
        "--honest", type=int, default=0, help="repeats of the confirmation on honest sets, and nothing else"
    )
    parser.add_argument("--size", type=int, nargs=3, default=(32, 48, 32))
    given = parser.parse_args()
    if str(given.data) == "phantoms":
        honest(None, np.zeros(0), given.honest)
        return
    volumes, persons = read_folder(given.data)
    config = DataConfig.model_validate({"size": tuple(given.size)})
    scans, person_n = [fit_volume(volume, config) for volume in volumes], np.array(persons)
    if given.honest:
        honest(scans, person_n, given.honest)
        return
    rng, policy = generator(0, "perf.turned_copies"), AuditPolicy()
    held_out = rng.permutation(np.unique(person_n))[:40]
    train, holdout = np.flatnonzero(~np.isin(person_n, held_out)), np.flatnonzero(np.isin(person_n, held_out))
    chosen = rng.choice(train, given.copies, replace=False)
    copies = {degrees: [turned(scans[i], degrees, rng) for i in chosen] for degrees in DEGREES}
    start = time.process_time()
    all_views = views(scans)
    per_scan = (time.process_time() - start) / len(scans)
    rows, copy_rows = embed(scans), {d: (embed(c), views(c)) for d, c in copies.items()}
    print(
        f"{len(scans)} scans, {len(train)} in training, {len(holdout)} of 40 people held out; "
        f"{per_scan * 1e3:.0f} ms of views a scan"
    )
    for kept, name in ((1, "mirrored"), (len(all_views), "mirrored and turned")):
        side = [Pool("features", rows[i], person_n[i], views=all_views[:kept, i]) for i in (train, holdout)]
        search = CopySearch(side[0], side[1], policy, 0)
        null = search.null()
        for degrees, (data, more) in copy_rows.items():
            pool = Pool("features", data, np.arange(len(data)).astype(str), views=more[:kept])
            scored = search.score(pool, "turned")
            flagged = int((null.p_values(scored) <= 0.01 + 1e-12).sum())
            source = int((scored.index_train_n == np.searchsorted(train, chosen)).sum())
            low, high = clopper_pearson(flagged, len(data))
            print(f"{name}: {degrees} degrees: source nearest {source}/{len(data)}, flagged at 1 % "
                  f"{flagged / len(data):.0%} ({low:.0%}-{high:.0%}), null of {null.people} people")  # fmt: skip
    sides = [Pool("features", rows[i], person_n[i], views=all_views[:, i]) for i in (train, holdout)]
    nearest = topk(sides[1], sides[0], 1)[1][:, 0]
    start, pairs = time.process_time(), rng.choice(len(holdout), given.registered, replace=False)
    seen = [similarity(scans[train[nearest[k]]], scans[holdout[k]]) for k in pairs]
    seconds = (time.process_time() - start) / len(pairs)
    made = {"unseen people": seen}
    for degrees in DEGREES:
        made[f"copies turned by {degrees}"] = [
            similarity(scans[i], c) for i, c in list(zip(chosen, copies[degrees]))[: given.registered]
        ]
    for name, found in made.items():
        ncc, ssim = np.array([s.ncc for s in found]), np.array([s.ssim for s in found])
        print(f"{name}: n {len(found)}, NCC median {np.median(ncc):.3f} ({ncc.min():.3f}-{ncc.max():.3f}), "
              f"SSIM {np.median(ssim):.3f} ({ssim.min():.3f}-{ssim.max():.3f})")  # fmt: skip
    print(f"{seconds:.2f} s a registration")


if __name__ == "__main__":
    main()
