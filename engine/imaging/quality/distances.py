"""Distances between two sets of features, diversity within a set, and the floor under them over many halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from engine import seeding
from engine.imaging.evaluate import sides

MS_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli and Bovik 2003, of five scales
MS_WINDOW = 7
_LEAST_SCALES = 2
Metric = Callable[[np.ndarray, np.ndarray], float]


def bandwidth(x_nf: np.ndarray) -> float:
    """Median distance between different rows: the width of the Gaussian kernel (Gretton et al. 2012)."""
    from scipy.spatial.distance import pdist

    return float(np.median(pdist(x_nf))) or 1.0


def mmd(a_nf: np.ndarray, b_nf: np.ndarray, width: float) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel exp(-|x - y|^2 / (2 width^2)) (Gretton et al., JMLR 2012,
    equation 3); may be slightly negative."""
    from scipy.spatial.distance import cdist

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.exp(-cdist(x, y, "sqeuclidean") / (2.0 * width**2))

    def within(x: np.ndarray) -> float:
        k = kernel(x, x)
        return float((k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)))

    return within(a_nf) + within(b_nf) - 2.0 * float(kernel(a_nf, b_nf).mean())


def scales_of(shape_dhw: Sequence[int]) -> int:
    """Scales of MS-SSIM that a volume has room for: every halving must leave a window, and MONAI asks for (scales - 1)^2
    windows along each axis; five need 112 voxels."""
    smallest, scales = min(shape_dhw), 0
    while scales < len(MS_WEIGHTS) and smallest >> scales >= MS_WINDOW and smallest // max(1, scales**2) >= MS_WINDOW:
        scales += 1
    return scales


def ms_ssim_pairs(x_ndhw: np.ndarray, person_n: np.ndarray, seed: int) -> np.ndarray:
    """Multi-scale SSIM of pairs within a set: each scan with the next of another person in a random order; float64 (pairs,).

    The weights of the scales there is room for are scaled to sum to 1. Empty where there is room for less than two.
    """
    from monai.metrics.regression import MultiScaleSSIMMetric

    scales = scales_of(x_ndhw.shape[1:])
    if scales < _LEAST_SCALES:
        return np.zeros(0)
    weights = np.array(MS_WEIGHTS[:scales]) / sum(MS_WEIGHTS[:scales])
    metric = MultiScaleSSIMMetric(
        spatial_dims=3, data_range=1.0, kernel_type="uniform", kernel_size=MS_WINDOW, weights=tuple(weights)
    )
    order = seeding.generator(seed, "imaging.quality.pairs").permutation(len(x_ndhw))
    values = []
    for a, b in zip(order, np.roll(order, -1)):
        if person_n[a] != person_n[b]:
            pair = (torch.from_numpy(np.ascontiguousarray(x_ndhw[k]))[None, None] for k in (a, b))
            one: Any = metric(*pair)
            values.append(float(one))
    return np.array(values)


def halves(person_n: Sequence[str], count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """`count` random splits of scans into two sets of other people, as indices."""
    seeds = [seeding.derived_seed(seed, "imaging.quality.halves", k) for k in range(count)]
    return [sides(list(person_n), one, 0.5) for one in seeds]


def floor_of(
    value: Callable[[np.ndarray, np.ndarray], float], splits: Sequence[tuple[np.ndarray, np.ndarray]], n: int, seed: int
) -> tuple[float, list[float]]:
    """Mean of `value(first, second)` over the splits, n scans from either half, and the 2.5 and 97.5 percentiles."""
    found = []
    for k, (first, second) in enumerate(splits):
        rng = seeding.generator(seed, "imaging.quality.floor", k)
        found.append(value(np.sort(rng.permutation(first)[:n]), np.sort(rng.permutation(second)[:n])))
    return float(np.mean(found)), [float(q) for q in np.quantile(found, [0.025, 0.975])]
