"""Label maps as networks see them: as channels to be learned, and as shares on the latent's grid to be conditioned on.

Codes are 0 for background and k + 1 for the k-th value of `data.labels`. A model that makes label maps learns one channel
per label, +1 inside and -1 outside; a voxel of the result belongs to the largest channel, or to none where all are below
zero. As a condition, a map is the share of every label in every cell of the latent's grid (in its halves along each axis,
folded into channels), and a channel that says that a map is given.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.errors import InputError
from engine.imaging.autoencoder import space_to_depth


def codes_of(array_dhw: np.ndarray, labels: Sequence[int], where: object) -> np.ndarray:
    """uint8 codes of a label map whose values are `labels` and others, which count as background.

    Raises:
        InputError: a value is no whole number.
    """
    if not np.array_equal(array_dhw, np.rint(array_dhw)):
        raise InputError("whole numbers in a label map", "fractions", where, "nearest-neighbour resampling")
    codes = np.zeros(array_dhw.shape, dtype=np.uint8)
    for k, value in enumerate(labels):
        codes[array_dhw == value] = k + 1
    return codes


def values_of(codes_dhw: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """The label values, float32, of codes."""
    return np.array([0, *labels], dtype=np.float32)[codes_dhw]


def channels_of(codes_dhw: np.ndarray, count: int) -> np.ndarray:
    """float32 (count, d, h, w): +1 inside a label, -1 outside."""
    return np.where(codes_dhw[None] == np.arange(1, count + 1).reshape(-1, 1, 1, 1), 1.0, -1.0).astype(np.float32)


def codes_from(channels_cdhw: np.ndarray) -> np.ndarray:
    """uint8 codes: the largest channel where one is above zero, else background."""
    return np.where(channels_cdhw.max(axis=0) > 0, channels_cdhw.argmax(axis=0) + 1, 0).astype(np.uint8)


def map_context(codes_bdhw: Tensor, count: int, factor: int, fold: int) -> Tensor:
    """Label maps as context channels: float32 (b, count * fold^3 + 1, d/factor, h/factor, w/factor).

    Args:
        codes_bdhw: uint8, sizes in multiples of `factor`.
        fold: cells per latent position and axis, 1 or 2.
    """
    one_hot = torch.stack([(codes_bdhw == k + 1).float() for k in range(count)], dim=1)
    shares = torch.nn.functional.avg_pool3d(one_hot, factor // fold)
    folded = space_to_depth(shares, fold)
    return torch.cat([folded, torch.ones_like(folded[:, :1])], dim=1)
