"""Features for the copy detector: which volumes look alike, whatever their brightness, without any downloaded weights.

A volume is standardised, reduced to two coarse grids, and each grid is centred and scaled to unit length. On unit
vectors the squared Euclidean distance is 2 (1 - correlation), so nearest neighbours by L2 are those of highest
correlation. `transforms` makes the turned and mirrored copies that the audit plants; `ncc` confirms a candidate at
full resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from engine import seeding
from engine.errors import InputError
from engine.imaging.volume import Volume

GRIDS = ((8, 8, 8), (16, 16, 16))
DIMENSIONS = sum(int(np.prod(grid)) for grid in GRIDS)


def embed(volumes: Sequence[Volume]) -> np.ndarray:
    """Copy-detector features, float32 (n, 4608), each row of unit length; a constant volume gives zeros.

    Of a volume with several channels the mean over channels is used. The grids are fractions of the field of view, so
    volumes to be compared must show the same field of view.

    Raises:
        InputError: a volume holds a value that is not finite.
    """
    if not volumes:
        return np.zeros((0, DIMENSIONS), dtype=np.float32)
    return np.stack([_features(volume.array_cdhw.mean(axis=0), position) for position, volume in enumerate(volumes)])


def _features(array_dhw: np.ndarray, position: int) -> np.ndarray:
    if not np.isfinite(array_dhw).all():
        raise InputError("finite intensities", "NaN or infinity", f"volume {position}")
    x = torch.from_numpy(np.ascontiguousarray(array_dhw, dtype=np.float32))[None, None]
    parts = []
    for grid in GRIDS:
        coarse = F.adaptive_avg_pool3d(x, grid).flatten().double()
        coarse = coarse - coarse.mean()
        norm = float(coarse.norm())
        parts.append(coarse / norm if norm > 1e-6 * max(1.0, float(x.abs().max())) else torch.zeros_like(coarse))
    return (torch.cat(parts) / np.sqrt(len(GRIDS))).numpy().astype(np.float32)


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


def ncc(a: Volume, b: Volume) -> float:
    """Normalised cross-correlation of two volumes of one shape, -1 .. 1; 0 where one is constant.

    Raises:
        InputError: the shapes differ.
    """
    if a.array_cdhw.shape != b.array_cdhw.shape:
        raise InputError(f"two volumes of shape {a.array_cdhw.shape}", f"{b.array_cdhw.shape}", "ncc")
    x, y = (v.array_cdhw.astype(np.float64).ravel() for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm > 0 else 0.0


def confirm(a: Volume, b: Volume) -> tuple[float, str]:
    """Highest NCC between `a` and `b` over mirroring and turns of up to 10 degrees about each axis: (value, which)."""
    best, name = ncc(a, b), "as it is"
    for mirrored in (False, True):
        array = b.array_cdhw[:, ::-1] if mirrored else b.array_cdhw
        for axes in ((1, 2), (1, 3), (2, 3)):
            for degrees in (-10.0, -5.0, 0.0, 5.0, 10.0):
                turned = ndimage.rotate(array, degrees, axes=axes, reshape=False, order=1, mode="nearest")
                value = ncc(a, replace(b, array_cdhw=np.ascontiguousarray(turned, dtype=np.float32)))
                if value > best:
                    best, name = value, f"{'mirrored, ' if mirrored else ''}turned {degrees:g} degrees about {axes}"
    return best, name
