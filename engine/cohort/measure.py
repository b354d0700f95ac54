"""Two numbers read off a brain scan by a fixed rule: brain volume and lateral ventricle volume.

The rule is meant for the embedded cohort and for scans generated from it; it is not a segmentation tool. It is simple
on
purpose: the same rule is applied to real and to synthetic scans, and calibrated once, on real training scans whose true
volume is known. Geometry comes from the affine, so that any RAS grid will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from engine.cohort import heads
from engine.cohort.config import ScannerConfig
from engine.cohort.tables import Table
from engine.errors import InputError
from engine.imaging.volume import Volume

_REGION_TIME = 3.2  # ventricular flow time whose ventricles are the region searched: about 80 mL in the template
_DARK, _BRIGHT = 0.5, 0.8  # shares of white matter between which a voxel counts partly as fluid


@dataclass(frozen=True)
class Measures:
    """Per scan: brain volume in mm3; dark volume (mm3, uncalibrated) where lateral ventricles can be."""

    brain_mm3: np.ndarray
    dark_mm3: np.ndarray


def measure(volumes: Sequence[Volume]) -> Measures:
    """Brain and dark central volume of each scan.

    White matter is the 85th percentile of the brain, the brain is what exceeds 15 % of the scan's 99th percentile. The
    central region is the template's enlarged ventricles, scaled about the middle of the field to the scan's own brain
    volume. A voxel there is fluid fully at or below half of white matter, not at all at or above 0.8 of it.

    Raises:
        InputError: a scan has more than one channel, no finite contrast, or axes that are not RAS.
    """
    scanner = ScannerConfig()
    base = heads.template(scanner)
    region = heads.enlarged_ventricles(base, _REGION_TIME)
    middle_mm = base.affine[:3, 3] + base.affine[:3, :3] @ ((np.array(scanner.shape) - 1) / 2)
    first_mm = base.affine[:3, 3] - base.voxel_mm / 2
    brain_mm3, dark_mm3 = [], []
    for index, volume in enumerate(volumes):
        array, affine = np.asarray(volume.array_cdhw, dtype=np.float64), np.asarray(volume.affine, dtype=np.float64)
        spacing = np.diag(affine)[:3]
        if len(array) != 1 or np.abs(affine[:3, :3] - np.diag(spacing)).max() > 1e-3 or spacing.min() <= 0:
            raise InputError(
                "one channel on an RAS grid", f"{len(array)} channels", f"scan {index}", "reorient it first"
            )
        array = np.nan_to_num(array[0])
        top = np.percentile(array, 99)
        if not top > 0:
            raise InputError("a scan with contrast", f"99th percentile {top:g}", f"scan {index}")
        brain = array > 0.15 * top
        voxel_mm3 = float(np.prod(spacing))
        brain_mm3.append(float(brain.sum()) * voxel_mm3)
        scale = (brain_mm3[-1] / base.brain_mm3) ** (1 / 3)
        axes = [
            ((affine[a, 3] + spacing[a] * np.arange(n) - middle_mm[a]) / scale + middle_mm[a] - first_mm[a])
            / base.voxel_mm
            for a, n in enumerate(array.shape)
        ]
        where = np.stack(np.meshgrid(*axes, indexing="ij"))
        inside = np.clip(3 * ndimage.map_coordinates(region, where, order=1, mode="constant"), 0, 1)
        share = array / np.percentile(array[brain], 85)
        dark_mm3.append(float((np.clip((_BRIGHT - share) / (_BRIGHT - _DARK), 0, 1) * inside).sum()) * voxel_mm3)
    return Measures(np.array(brain_mm3), np.array(dark_mm3))


@dataclass(frozen=True)
class Calibration:
    """Dark volume = intercept + slope * ventricle volume, solved for the latter; R2 over people it was not fitted to.

    The line is that of the dark volume on the true one, not the reverse, which would pull every estimate towards the
    mean: ventricles are an outcome in all that follows, and an outcome's error does no harm when it is centred on zero.
    """

    intercept: float
    slope: float
    r2: float
    n: int

    def ventricle_mm3(self, measures: Measures) -> np.ndarray:
        """Ventricle volume in mm3, never below 1000: a log is taken of it."""
        return np.maximum((measures.dark_mm3 - self.intercept) / self.slope, 1000.0)


def calibrate(measures: Measures, true_mm3: np.ndarray, scans: Table, folds: int = 5) -> Calibration:
    """Least squares line; R2 by cross-validation over people, so that both visits of a person are in one fold.

    Raises:
        InputError: fewer people than folds.
    """
    people = np.unique(scans["subject"].astype(str), return_inverse=True)[1]
    if people.max(initial=-1) + 1 < folds:
        raise InputError(
            f"{folds} people or more", str(people.max(initial=-1) + 1), "calibration of the ventricle measure"
        )
    x, y = measures.dark_mm3, np.asarray(true_mm3, dtype=np.float64)
    predicted = np.empty_like(y)
    for fold in range(folds):
        out = people % folds == fold
        slope, intercept = np.polyfit(y[~out], x[~out], 1)
        predicted[out] = (x[out] - intercept) / slope
    r2 = 1 - float(((y - predicted) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    slope, intercept = np.polyfit(y, x, 1)
    return Calibration(float(intercept), float(slope), r2, len(y))
