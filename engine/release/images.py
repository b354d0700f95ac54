"""Slices of volumes and shared stretches of haplotypes, as figures of a report.

Two kinds, kept apart: what shows synthetic data only (`synthetic_slices`), for any report; and what sets real people beside
them (`suspect_section`, `scans_side_by_side`), for the internal report of an audit. Sections of the second kind are marked
internal, and a public report refuses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import seeding
from engine.audit import AuditResult, Pool
from engine.release.covariates import read_rows, side_by_side
from engine.release.report import Section

SHOWN = 8  # volumes in a row
SLICES = 12
WIDEST = 112  # pixels of a tile; a page with thousands more shows nothing more


def slices_of(volumes: Sequence[Any], plane: str = "axial") -> NDArray[np.uint8]:
    """uint8 (n, s, h, w): up to SLICES slices of each volume, front or top of the body up, as `Volume`s on one grid in
    RAS and scaled to [-1, 1] give them (`engine.imaging.dataset.fit_volume`).

    Slices are spaced evenly over the middle nine tenths. Axial: columns run from left to right of the body, as RAS does.
    """
    grey = [np.clip((volume.array_cdhw[0] + 1) * 127.5, 0, 255).astype(np.uint8) for volume in volumes]
    return slices_of_grey(grey, plane)


def slices_of_grey(volumes_dhw: Sequence[NDArray[np.uint8]], plane: str = "axial") -> NDArray[np.uint8]:
    """As `slices_of`, of volumes that are grey values in RAS, all of one shape."""
    axis = {"sagittal": 0, "coronal": 1, "axial": 2}[plane]
    depth = volumes_dhw[0].shape[axis]
    chosen = np.unique(np.linspace(0.05 * (depth - 1), 0.95 * (depth - 1), min(SLICES, depth)).round().astype(int))
    stacks = [np.moveaxis(grey, axis, 0)[chosen] for grey in volumes_dhw]  # (s, first, second) of the two axes left
    tiles = np.stack([stack.transpose(0, 2, 1)[:, ::-1] for stack in stacks])
    step = int(np.ceil(max(tiles.shape[2:]) / WIDEST))
    return np.ascontiguousarray(tiles[:, :, ::step, ::step])


def read_fitted(paths: Sequence[Path], grid: Any = None) -> tuple[list[Any], Any]:
    """Volumes of `paths` on the grid of the first of them, or on `grid`, and the grid."""
    from engine.imaging.dataset import common_grid, fit_volume
    from engine.imaging.volume import read_volume

    read = [read_volume(path) for path in paths]
    grid = common_grid(read[:1], "report") if grid is None else grid
    return [fit_volume(volume, grid) for volume in read], grid


def synthetic_slices(paths: Sequence[Path], seed: int = 0) -> dict[str, Any]:
    """The slice slider of up to SHOWN synthetic scans, drawn at random."""
    volumes, _ = read_fitted([paths[k] for k in _draw(len(paths), seed)])
    return {
        "slices": {
            "kind": "slices",
            "rows": {"synthetic": slices_of(volumes)},
            "plane": "axial",
            "title": "Synthetic scans",
            "caption": f"{len(volumes)} of {len(paths)} scans, drawn at random. Arrow keys move through the slices; the left"
            " of the body is on the left.",
        }
    }


def scans_side_by_side(others: Path, synthetic: Path, seed: int = 0) -> Section:
    """Internal: random synthetic scans above random real ones, on one grid, with a slice slider."""
    from engine.imaging.commands import folder_paths

    made, real = folder_paths(synthetic)[0], folder_paths(others)[0]
    shown, grid = read_fitted([made[k] for k in _draw(len(made), seed)])
    beside, _ = read_fitted([real[k] for k in _draw(len(real), seed)], grid)
    n = min(len(shown), len(beside))
    figure = {
        "kind": "slices",
        "rows": {"synthetic": slices_of(shown[:n]), "real": slices_of(beside[:n])},
        "plane": "axial",
        "title": "Random scans",
        "caption": f"Drawn at random: {n} of {len(made)} synthetic scans above {n} of {len(real)} real scans, which are"
        " not their neighbours. Arrow keys move through the slices; the left of the body is on the left.",
    }
    return Section(
        "What the scans look like",
        "Read them as scans: are the structures there, in the right place, as sharp and as varied as in real ones?",
        figures={"slices": figure},
        internal=True,
    )


def internal_sections(
    kind: str, result: AuditResult, pools: dict[str, Pool], train: Path, synthetic: Path, seed: int = 0
) -> list[Section]:
    """Internal: what `engine audit` adds to its own report: suspects beside their neighbours, scans at random,
    and covariates.

    Args:
        kind: "scans", "genotypes" or another (an embedding store of features has no picture); pools: "train" and
            "synthetic" as they were audited; train, synthetic: the inputs, whose scans are read again.
    """
    if kind == "scans":
        from engine.imaging.commands import folder_paths

        rows = [len(folder_paths(path)[0]) for path in (train, synthetic)]
        if rows != [len(pools["train"]), len(pools["synthetic"])]:
            return []  # some scans were left out of the audit: a row is no longer a place in the folder
        tables = [path if path.suffix == ".csv" else path / "volumes.csv" for path in (train, synthetic)]
        people = side_by_side(*(read_rows(table) for table in tables)) if all(t.is_file() for t in tables) else []
        return [
            suspect_section(kind, result, pools, train, synthetic),
            scans_side_by_side(train, synthetic, seed),
            *people,
        ]
    if pools["synthetic"].kind == "bits":
        return [suspect_section("genotypes", result, pools, train, synthetic)]
    return []


def suspect_section(kind: str, result: AuditResult, pools: dict[str, Pool], train: Path, synthetic: Path) -> Section:
    """Internal: the most suspicious synthetic samples, each beside its nearest training sample.

    Args:
        kind: "scans" or "genotypes"; pools: "train" and "synthetic" as they were audited; train, synthetic: the inputs,
            whose scans are read again.
    """
    suspects = _spread(result.suspects, pools["synthetic"])[:SHOWN]
    words = [f"p {p:.2g}" for _, _, p in suspects]
    if kind == "scans":
        from engine.imaging.commands import folder_paths

        made, real = folder_paths(synthetic)[0], folder_paths(train)[0]
        shown, grid = read_fitted([made[row] for row, _, _ in suspects])
        beside, _ = read_fitted([real[row] for _, row, _ in suspects], grid)
        figure: dict[str, Any] = {
            "kind": "slices",
            "rows": {"synthetic": slices_of(shown), "nearest training scan": slices_of(beside)},
            "columns": words,
            "plane": "axial",
            "title": "Most suspicious scans",
            "caption": "Each synthetic scan above the training scan that lies nearest to it, most suspicious first. A copy"
            " agrees in folds and vessels, not only in outline. The left of the body is on the left.",
        }
    else:
        figure = {
            "kind": "stretches",
            "labels": words,
            "segments": [shared_stretches(pools["synthetic"], a, pools["train"], b) for a, b, _ in suspects],
            "span_bp": _span(pools["train"]),
            "title": "Most suspicious haplotypes",
            "caption": "Each bar is a stretch in which a synthetic haplotype equals the training haplotype nearest to it;"
            " most suspicious on top. Unrelated people of one population share short stretches everywhere.",
        }
    return Section(
        "The most suspicious samples",
        "Not all of these are copies: in a set without copies somebody is the most suspicious too. The p-value says how"
        " often an unseen real person lies as near to a training person as this sample does.",
        figures={"suspects": figure},
        internal=True,
    )


def shared_stretches(one: Pool, row: int, other: Pool, beside: int, most: int = 400) -> list[tuple[float, float]]:
    """(start, end) in bp of the stretches where row `row` of `one` equals row `beside` of `other`, both bits.

    Stretches shorter than 1 / `most` of the region are left out: on paper they are dust.
    """
    length = one.length or 64 * one.data.shape[1]
    different = np.unpackbits((one.data[row] ^ other.data[beside]).view(np.uint8), bitorder="little")[:length]
    position = np.asarray(one.position_bp if one.position_bp is not None else np.arange(length), dtype=float)
    ends = np.concatenate([[-1], np.flatnonzero(different), [length]])
    first, last = _span(one)
    shortest = (last - first) / most
    spans = [(position[a + 1], position[b - 1]) for a, b in pairwise(ends.tolist()) if b - a > 1]
    return [(float(a), float(b)) for a, b in spans if b - a >= shortest]


def _span(pool: Pool) -> tuple[float, float]:
    if pool.position_bp is None:
        return 0.0, float(pool.length or 64 * pool.data.shape[1])
    return float(pool.position_bp[0]), float(pool.position_bp[-1])


def _spread(suspects: Sequence[tuple[int, int, float]], synthetic: Pool) -> list[tuple[int, int, float]]:
    """One row a synthetic person, so that two haplotypes or visits of one do not fill the page."""
    seen: set[str] = set()
    kept = []
    for row, nearest, p in suspects:
        person = str(synthetic.person[row])
        if person not in seen and nearest >= 0:
            seen.add(person)
            kept.append((row, nearest, p))
    return kept


def _draw(n: int, seed: int) -> list[int]:
    return sorted(seeding.generator(seed, "release.images").permutation(n)[:SHOWN].tolist())
