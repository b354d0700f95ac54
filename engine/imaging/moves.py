"""Rigid moves of training volumes: whole-voxel shifts, and turns about the centre in millimetres.

How a head lies in its field of view says nothing of the person, and shapes, volumes and covariates stay what they are. So a
network that sees a training volume moved anew each time learns less of where exactly each of the few people lay, which is
what tells an attacker who they were (docs/imaging.md, "Hippocampus pairs").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from engine import seeding
from engine.imaging.dataset import shifted
from engine.imaging.labels import channels_of, codes_from


@dataclass(frozen=True)
class Move:
    """A turn about the centre, then a shift.

    Attributes:
        offset: whole voxels along the array's axes.
        angles: degrees about the array's axes, or None: not turned, and no voxel is interpolated.
    """

    offset: tuple[int, ...]
    angles: tuple[float, ...] | None = None

    def of(self, x_cdhw: np.ndarray, spacing_mm: np.ndarray, images: int) -> np.ndarray:
        """`x_cdhw` moved; float32, same shape.

        Images are interpolated by cubic splines and kept within their range. Channels of labels (1 inside, -1 outside) are
        interpolated linearly and cut at 0, so that neighbouring labels stay neighbours. What comes into view is the
        reflection of the border.

        Args:
            spacing_mm: (3,) along the array's axes.
            images: so many of the first channels are images, the others labels.
        """
        if self.angles is not None:
            x_cdhw = np.stack([_turned(x, self.angles, spacing_mm, k < images) for k, x in enumerate(x_cdhw)])
        return shifted(x_cdhw, self.offset)

    def of_codes(self, codes_dhw: np.ndarray, spacing_mm: np.ndarray, labels: int) -> np.ndarray:
        """A label map as codes 0 .. labels, uint8 (d, h, w), moved as `of` moves channels of labels."""
        if self.angles is None:
            return np.array(shifted(codes_dhw[None], self.offset)[0])
        return codes_from(self.of(channels_of(codes_dhw, labels), spacing_mm, 0))


def random_move(seed: int, index: int, shift_voxels: int, turn_degrees: float, purpose: str = "shift") -> Move:
    """A shift uniform on -shift_voxels .. shift_voxels and a turn uniform on -turn_degrees .. turn_degrees, per axis."""
    draw = seeding.generator(seed, f"imaging.{purpose}", index)
    offset = tuple(int(o) for o in draw.integers(-shift_voxels, shift_voxels + 1, size=3))
    angles = tuple(float(a) for a in draw.uniform(-turn_degrees, turn_degrees, size=3)) if turn_degrees else None
    return Move(offset, angles)


def _turned(x_dhw: np.ndarray, angles: Sequence[float], spacing_mm: np.ndarray, image: bool) -> np.ndarray:
    """Voxel at index i takes the value at centre + S^-1 R^-1 S (i - centre), S = diag(spacing)."""
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    back = turn.T * spacing / spacing[:, None]
    centre = (np.array(x_dhw.shape) - 1) / 2
    order = 3 if image else 1
    turned = ndimage.affine_transform(x_dhw, back, centre - back @ centre, order=order, mode="mirror")
    return np.clip(turned, x_dhw.min(), x_dhw.max()) if image else np.where(turned > 0, np.float32(1), np.float32(-1))
