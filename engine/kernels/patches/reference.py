"""Patches, as the specification: crops of np.pad, and the weighted mean of what overlapping windows say about a voxel.

Both are defined in float32 with every product and sum rounded, sums in the order of the grid (z slowest), so that the other
implementations can agree bit for bit whatever their batches, threads and tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from engine.kernels.patches.grid import Grid


def gather(
    volume_cdhw: np.ndarray,
    out_ncdhw: np.ndarray,
    starts_n3: np.ndarray,
    flips_n3: np.ndarray,
    axes_n3: np.ndarray,
    border: str,
    value: float,
    scale: float,
    offset: float,
) -> None:
    """Fill `out`: crop np.pad(volume, mode=border) at the start, transpose by axes, flip, and x * scale + offset."""
    shape, roi = np.array(volume_cdhw.shape[1:]), np.array(out_ncdhw.shape[2:])
    for patch_cdhw, start, flips, axes in zip(out_ncdhw, starts_n3, flips_n3, axes_n3):
        size = roi[np.argsort(axes)]  # out axis j runs along volume axis axes[j]
        before, after = np.maximum(-start, 0), np.maximum(start + size - shape, 0)
        widths, constant = [(0, 0), *zip(before, after)], {"constant_values": value} if border == "constant" else {}
        padded_cdhw = np.pad(volume_cdhw, widths, border, **constant)  # type: ignore[call-overload]
        at = start + before
        crop_cdhw = padded_cdhw[:, *(slice(a, a + s) for a, s in zip(at, size))]
        turned_cdhw = np.flip(crop_cdhw.transpose(0, *(axes + 1)), tuple(np.flatnonzero(flips) + 1))
        if (scale, offset) != (1, 0):
            turned_cdhw = turned_cdhw.astype(np.float32) * np.float32(scale) + np.float32(offset)
        patch_cdhw[:] = turned_cdhw


def layers(
    batches: Iterable[np.ndarray], grid: Grid, into_cdhw: np.ndarray | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """(0, the whole volume): per voxel sum(weight * prediction) / sum(weight) over the windows that cover it."""
    canvas = np.maximum(grid.shape, grid.roi)  # smaller volumes are padded, and cropped at the end
    weight_dhw = np.maximum((grid.weights[0][:, None, None] * grid.weights[1][:, None]) * grid.weights[2], grid.floor)
    patches = (patch_cdhw for batch in batches for patch_cdhw in batch)
    total, weights = None, np.zeros(canvas, dtype=np.float32)
    for start in itertools.product(*(axis - axis[0] for axis in grid.starts)):
        patch_cdhw, window = next(patches), tuple(slice(a, a + r) for a, r in zip(start, grid.roi))
        if total is None:
            total = np.zeros((len(patch_cdhw), *canvas), dtype=np.float32)
        total[:, *window] += weight_dhw * patch_cdhw
        weights[window] += weight_dhw
    inside = tuple(slice(-start[0], s - start[0]) for start, s in zip(grid.starts, grid.shape))
    assert total is not None
    volume_cdhw = (total / weights)[:, *inside]
    if into_cdhw is not None:
        into_cdhw[:] = volume_cdhw
        volume_cdhw = into_cdhw
    yield 0, volume_cdhw
