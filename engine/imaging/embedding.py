"""Features for the copy detector: which volumes look alike, whatever their brightness, without any downloaded weights.

A volume is standardised, reduced to two coarse grids, and each grid is centred and scaled to unit length. On unit
vectors the squared Euclidean distance is 2 (1 - correlation), so nearest neighbours by L2 are those of highest
correlation. `views` gives the features of the mirrored and slightly turned volume, in which a query is searched too;
`transforms` makes the turned and mirrored copies that the audit plants. Candidates are confirmed at full resolution by
`similarity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from engine import seeding
from engine.errors import InputError
from engine.imaging.similarity import coarser, extent_mm, move, one_thread, turn
from engine.imaging.volume import Volume

GRIDS = ((8, 8, 8), (16, 16, 16))
DIMENSIONS = sum(int(np.prod(grid)) for grid in GRIDS)
TURN_DEGREES = 10.0  # of the turned views: copies turned by up to 12 degrees are then found (docs/imaging.md)
VIEWS = 13  # mirrored; and both turned either way about each axis
_TURNED_FROM = 32  # voxels per axis: turning happens on this coarser version, twice as fine as the finer grid


def embed(volumes: Sequence[Volume]) -> np.ndarray:
    """Copy-detector features, float32 (n, 4608), each row of unit length; a constant volume gives zeros.

    Of a volume with several channels the mean over channels is used. The grids are fractions of the field of view, so
    volumes to be compared must show the same field of view.

    Raises:
        InputError: a volume holds a value that is not finite.
    """
    if not volumes:
        return np.zeros((0, DIMENSIONS), dtype=np.float32)
    return np.concatenate([_features(_image(volume, k)[None]) for k, volume in enumerate(volumes)])


def views(volumes: Sequence[Volume]) -> np.ndarray:
    """Features of every volume mirrored along its first axis, and of both turned by 10 degrees either way about each
    axis: float32 (13, n, 4608), rows as `embed` gives them.

    Raises:
        InputError: a volume holds a value that is not finite.
    """
    turns = []
    for axis in range(3):
        for sign in (-1.0, 1.0):
            degrees = [0.0, 0.0, 0.0]
            degrees[axis] = sign * TURN_DEGREES
            turns.append(turn(degrees))
    made = np.empty((VIEWS, len(volumes), DIMENSIONS), dtype=np.float32)
    with one_thread():
        for k, volume in enumerate(volumes):
            made[:, k] = _views(_image(volume, k), extent_mm(volume), torch.stack(turns))
    return made


def _views(image: Tensor, extent: Tensor, turns: Tensor) -> np.ndarray:
    coarse = coarser(image[None, None], [min(n, _TURNED_FROM) for n in image.shape])[0, 0]
    turned = [move(side, extent, turns)[0] for side in (coarse, coarse.flip(0))]
    return np.concatenate([_features(image.flip(0)[None]), *(_features(x) for x in turned)])


def _image(volume: Volume, position: int) -> Tensor:
    if not np.isfinite(volume.array_cdhw).all():
        raise InputError("finite intensities", "NaN or infinity", f"volume {position}")
    return torch.from_numpy(np.ascontiguousarray(volume.array_cdhw.mean(axis=0, dtype=np.float32)))


def _features(image_bdhw: Tensor) -> np.ndarray:
    parts = []
    least = 1e-6 * image_bdhw.flatten(1).abs().amax(dim=1, keepdim=True).double().clamp(min=1.0)
    for grid in GRIDS:
        coarse = coarser(image_bdhw[:, None], grid).flatten(1).double()
        coarse = coarse - coarse.mean(dim=1, keepdim=True)
        norm = coarse.norm(dim=1, keepdim=True)
        parts.append(torch.where(norm > least, coarse / norm.clamp(min=1e-30), torch.zeros_like(coarse)))
    return (torch.cat(parts, dim=1) / np.sqrt(len(GRIDS))).numpy().astype(np.float32)


def transforms(volume: Volume) -> dict[str, Volume]:
    """Copies as a careless generator might make them: mirrored left to right, turned a little, noised, darkened.

    The affine is kept: the content moves inside its field of view. Deterministic: the noise is the same in every call.
    """
    array = volume.array_cdhw
    scale = float(array.std()) or 1.0
    noise = seeding.generator(0, "imaging.embedding.noise").standard_normal(array.shape)
    low = float(array.min())
    turned = ndimage.rotate(array, 5.0, axes=(1, 2), reshape=False, order=1, mode="nearest")
    made = {
        "flipped": array[:, ::-1],
        "rotated": turned,
        "noised": array + 0.1 * scale * noise,
        "gamma": low + (np.ptp(array) or 1.0) * ((array - low) / (np.ptp(array) or 1.0)) ** 0.8,
    }
    return {name: replace(volume, array_cdhw=np.ascontiguousarray(a, dtype=np.float32)) for name, a in made.items()}
