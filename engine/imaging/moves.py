"""Moves of training volumes: whole-voxel shifts, turns about the centre and smooth bends, in millimetres.

How a head lies in its field of view says nothing of the person. Shifts and turns keep every shape, and a bend keeps volumes: it
has no divergence, so that what a covariate says of the size of something stays true to first order. A network that sees a
training volume moved anew each time learns less of where exactly each of the few people lay, which is what tells an
attacker who they were (docs/imaging.md, "Hippocampus pairs").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from engine import seeding
from engine.imaging.dataset import shifted
from engine.imaging.labels import channels_of, codes_from

_KNOTS_MM = 10.0  # between the knots of a bend
_SLAB_VOXELS = 2**21


@dataclass(frozen=True)
class Move:
    """A bend, a turn about the centre, then a shift.

    Attributes:
        offset: whole voxels along the array's axes.
        angles: degrees about the array's axes, or None: not turned.
        bend: root mean square of the displacement in mm and the seed of its field, or None: not bent. Neither turned nor
            bent, no voxel is interpolated.
    """

    offset: tuple[int, ...]
    angles: tuple[float, ...] | None = None
    bend: tuple[float, int] | None = None

    def of(self, x_cdhw: np.ndarray, spacing_mm: np.ndarray, images: int) -> np.ndarray:
        """`x_cdhw` moved; float32, same shape.

        Images are interpolated by cubic splines and kept within their range. Channels of labels (1 inside, -1 outside) are
        interpolated linearly and cut at 0, so that neighbouring labels stay neighbours. What comes into view is the
        reflection of the border.

        Args:
            spacing_mm: (3,) along the array's axes.
            images: so many of the first channels are images, the others labels.
        """
        if self.angles is not None or self.bend is not None:
            x_cdhw = self._taken(x_cdhw, np.asarray(spacing_mm, dtype=np.float64), images)
        return shifted(x_cdhw, self.offset)

    def of_codes(self, codes_dhw: np.ndarray, spacing_mm: np.ndarray, labels: int) -> np.ndarray:
        """A label map as codes 0 .. labels, uint8 (d, h, w), moved as `of` moves channels of labels."""
        if self.angles is None and self.bend is None:
            return np.array(shifted(codes_dhw[None], self.offset)[0])
        return codes_from(self.of(channels_of(codes_dhw, labels), spacing_mm, 0))

    def _taken(self, x_cdhw: np.ndarray, spacing_mm: NDArray[np.float64], images: int) -> np.ndarray:
        """Every voxel's value from where it was before; some planes at a time, because places take 24 bytes a voxel."""
        shape = x_cdhw.shape[1:]
        bend = None if self.bend is None else bend_mm(shape, spacing_mm, *self.bend).astype(np.float32)
        # cubic splines go through coefficients that depend on the whole volume
        known = [ndimage.spline_filter(x, mode="mirror") if k < images else x for k, x in enumerate(x_cdhw)]
        out = np.empty(x_cdhw.shape, dtype=np.float32)
        step = max(1, _SLAB_VOXELS // max(1, shape[1] * shape[2]))
        for start in range(0, shape[0], step):
            planes = slice(start, min(shape[0], start + step))
            places = self._places(shape, planes, spacing_mm, bend)
            for k, x in enumerate(known):
                order = 3 if k < images else 1
                ndimage.map_coordinates(x, places, out[k, planes], order=order, mode="mirror", prefilter=False)
        for k, x in enumerate(x_cdhw):
            if k < images:
                np.clip(out[k], x.min(), x.max(), out=out[k])
            else:
                out[k] = np.where(out[k] > 0, np.float32(1), np.float32(-1))
        return out

    def _places(
        self, shape: Sequence[int], planes: slice, spacing_mm: NDArray[np.float64], bend: NDArray[np.float32] | None
    ) -> NDArray[np.float64]:
        """Where the values of these planes' voxels are taken from, in voxels of the volume: (3, planes, h, w)."""
        spacing = spacing_mm[:, None, None, None]
        centre = (np.array(shape)[:, None, None, None] - 1) / 2
        axes = (np.arange(planes.start, planes.stop), np.arange(shape[1]), np.arange(shape[2]))
        away_mm = (np.stack(np.meshgrid(*axes, indexing="ij")) - centre) * spacing
        if self.angles is not None:
            back = Rotation.from_euler("xyz", self.angles, degrees=True).as_matrix().T
            away_mm = np.tensordot(back, away_mm, axes=1)
        if bend is not None:
            away_mm += bend[:, planes]
        return np.asarray(away_mm / spacing + centre)


def bend_mm(shape: Sequence[int], spacing_mm: NDArray[np.floating], rms_mm: float, seed: int) -> NDArray[np.float64]:
    """A smooth random displacement without divergence: the curl of cubic splines through normal values at knots.

    Returns:
        (3, d, h, w) mm along the array's axes; the root mean square of its length over the volume is `rms_mm`.
    """
    extent_mm = (np.array(shape) - 1) * spacing_mm
    knots = np.maximum(np.ceil(extent_mm / _KNOTS_MM).astype(int), 1) + 3
    values = np.random.default_rng(seed).standard_normal((3, *knots))
    at = np.meshgrid(
        *(1 + np.arange(n) * step / _KNOTS_MM for n, step in zip(shape, spacing_mm, strict=True)), indexing="ij"
    )
    potential = [ndimage.map_coordinates(value, at, order=3, mode="nearest") for value in values]

    def slope(of: int, along: int) -> NDArray[np.float64]:
        if shape[along] == 1:
            return np.zeros(tuple(shape))
        return np.asarray(np.gradient(potential[of], float(spacing_mm[along]), axis=along))

    curl = np.stack([slope(2, 1) - slope(1, 2), slope(0, 2) - slope(2, 0), slope(1, 0) - slope(0, 1)])
    length = np.sqrt(np.square(curl).sum(axis=0).mean())
    return curl * (rms_mm / length) if length > 0 else curl


def random_move(
    seed: int, index: int, shift_voxels: int, turn_degrees: float, bend_mm: float = 0.0, purpose: str = "shift"
) -> Move:
    """A shift uniform on -shift_voxels .. shift_voxels and a turn uniform on -turn_degrees .. turn_degrees, per axis; a
    bend of `bend_mm` root mean square."""
    draw = seeding.generator(seed, f"imaging.{purpose}", index)
    offset = tuple(int(o) for o in draw.integers(-shift_voxels, shift_voxels + 1, size=3))
    angles = tuple(float(a) for a in draw.uniform(-turn_degrees, turn_degrees, size=3)) if turn_degrees else None
    return Move(offset, angles, (bend_mm, int(draw.integers(2**63))) if bend_mm else None)
