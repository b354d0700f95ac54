"""How far synthetic scans are from real ones, beside how far real ones are from each other.

Every distance is computed at equal n on both sides and stands beside its floor: the same distance between two
disjoint sets of real scans of the same n, split by person. Intervals are 95 %, from a delete-a-group jackknife over
ten groups: a bootstrap would count its duplicates as closeness and shift the Frechet distance.

Declared feature extractors, both offline: `shape`, principal components of standardised low-resolution volumes,
fitted on the real training side only (on the real set given where there is none; the note says which); `texture`,
per-volume quantiles of intensity and of gradient magnitude. Neither is comparable with figures from a pretrained
network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import linalg

from engine import seeding
from engine.audit.findings import Finding
from engine.errors import InputError
from engine.imaging.config import DataConfig
from engine.imaging.dataset import common_grid, fit_volume
from engine.imaging.volume import Volume

GROUPS = 10
BINS = 200
COMPONENTS = 16
BLOCKS = (4, 4, 4)
SSIM_WINDOW = 7
SHOWN = 8  # volumes of each side in the figures
FLAT = 0.01  # quantiles that hardly vary (air) count in units of 1 % of the intensity range


@dataclass(frozen=True)
class Evaluation:
    """Findings by metric, and the arrays a report draws: "montage" (middle slices by side and plane), "volumes" (uint8 (n, d,
    h, w) by side), "pca", "intensity".
    """

    findings: list[Finding]
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """What the metrics need of a set of n volumes; `take` selects volumes.

    Attributes:
        coarse_nv: standardised low-resolution voxels.
        intensity_nb, gradient_nb: histograms over voxels of intensity in [0, 1] and of gradient magnitude, shares.
        quantile_nq: quantiles of intensity and gradient magnitude.
        block_nr: mean intensity of sub-blocks.
        thumb_ndhw: volumes in [0, 1] for SSIM and montages.
        region_nr: volume in mm3 of each label, where labels were given.
    """

    coarse_nv: np.ndarray
    intensity_nb: np.ndarray
    gradient_nb: np.ndarray
    quantile_nq: np.ndarray
    block_nr: np.ndarray
    thumb_ndhw: np.ndarray
    region_nr: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.coarse_nv)

    def take(self, index: np.ndarray) -> Profile:
        """The volumes at `index`."""
        chosen = {k: None if v is None else v[index] for k, v in self.__dict__.items()}
        return Profile(**chosen)  # type: ignore[arg-type]


def profile(volumes: Sequence[Volume], grid: DataConfig, regions_nr: np.ndarray | None = None) -> Profile:
    """Profile of `volumes` on `grid`; of several channels the first is used."""
    columns: dict[str, list[np.ndarray]] = {
        k: [] for k in ("coarse", "intensity", "gradient", "quantile", "block", "thumb")
    }
    for volume in volumes:
        array = (fit_volume(volume, grid).array_cdhw[0] + 1.0) / 2.0
        steps = np.stack(
            [
                np.diff(array, axis=a)[: -1 if a != 0 else None, : -1 if a != 1 else None, : -1 if a != 2 else None]
                for a in range(3)
            ]
        )
        gradient = np.sqrt((steps**2).sum(axis=0))
        x = torch.from_numpy(np.ascontiguousarray(array))[None, None]
        coarse = (
            F.adaptive_avg_pool3d(x, tuple(max(4, n // 4) for n in array.shape)).flatten().numpy().astype(np.float64)
        )
        columns["coarse"].append((coarse - coarse.mean()) / (coarse.std() or 1.0))
        columns["intensity"].append(np.histogram(array, BINS, (0.0, 1.0))[0] / array.size)
        columns["gradient"].append(np.histogram(np.minimum(gradient, 1.0), BINS, (0.0, 1.0))[0] / gradient.size)
        shares = np.linspace(0.05, 0.95, 7)
        columns["quantile"].append(np.concatenate([np.quantile(array, shares), np.quantile(gradient, shares)]))
        columns["block"].append(F.adaptive_avg_pool3d(x, BLOCKS).flatten().numpy().astype(np.float64))
        columns["thumb"].append(array.astype(np.float32))
    c = {name: np.stack(values) for name, values in columns.items()}
    return Profile(c["coarse"], c["intensity"], c["gradient"], c["quantile"], c["block"], c["thumb"], regions_nr)


# --- distances between two sets of features ---------------------------------------------------------------------------


def frechet(a_nf: np.ndarray, b_nf: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to two sets of features (Dowson & Landau 1982).

    |mean difference|^2 + trace(A + B - 2 (A B)^(1/2)); the trace of the root through the eigenvalues of A^(1/2) B
    A^(1/2), which are real and not negative, so that no complex part has to be discarded.
    """
    covariance_a, covariance_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a_nf, b_nf))
    values, vectors = linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.sqrt(np.maximum(linalg.eigvalsh(root @ covariance_b @ root), 0.0)).sum()
    shift = a_nf.mean(axis=0) - b_nf.mean(axis=0)
    return float(shift @ shift + np.trace(covariance_a) + np.trace(covariance_b) - 2.0 * cross)


def kernel_distance(a_nf: np.ndarray, b_nf: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018); may be slightly negative."""
    d = a_nf.shape[1]

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / d + 1.0) ** 3

    def within(x: np.ndarray) -> float:
        k = kernel(x, x)
        return float((k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)))

    return within(a_nf) + within(b_nf) - 2.0 * float(kernel(a_nf, b_nf).mean())


def histogram_w1(a_nb: np.ndarray, b_nb: np.ndarray) -> float:
    """Wasserstein-1 between the mean histograms over [0, 1] of two sets."""
    return float(np.abs(np.cumsum(a_nb.mean(axis=0) - b_nb.mean(axis=0))).sum() / a_nb.shape[1])


def column_w1(a_nr: np.ndarray, b_nr: np.ndarray) -> float:
    """Wasserstein-1 per column between two sets of equal n, averaged over columns."""
    return float(np.abs(np.sort(a_nr, axis=0) - np.sort(b_nr, axis=0)).mean())


def similarity(volumes_ndhw: np.ndarray, seed: int) -> np.ndarray:
    """SSIM between n random pairs within a set (each volume with the next in a random order), float64 (n,)."""
    from monai.metrics.regression import SSIMMetric

    order = seeding.generator(seed, "imaging.evaluate.pairs").permutation(len(volumes_ndhw))
    a = torch.from_numpy(volumes_ndhw[order])[:, None]
    metric = SSIMMetric(spatial_dims=3, data_range=1.0, win_size=SSIM_WINDOW)
    pairs: list[Any] = [metric(x[None], y[None]) for x, y in zip(a, a.roll(-1, 0))]
    return torch.cat([value.flatten() for value in pairs]).double().numpy()


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(
    real: Sequence[Volume],
    synthetic: Sequence[Volume],
    *,
    reference: Sequence[Volume] | None = None,
    train: Sequence[Volume] | None = None,
    real_persons: Sequence[str] | None = None,
    train_persons: Sequence[str] | None = None,
    real_regions_mm3: np.ndarray | None = None,
    synthetic_regions_mm3: np.ndarray | None = None,
    seed: int = 0,
) -> Evaluation:
    """Compare `synthetic` with `real` on the synthetic grid.

    Args:
        reference: a second set of real scans, of other people, for the floor; default: a part of the training side where given,
            else `real` is split in two by person.
        train: the real training side, on which the extractors are fitted; default `real`.
        real_persons, train_persons: person of each scan; default: each its own.
        real_regions_mm3, synthetic_regions_mm3: (n, regions) label volumes, where both sides have labels.

    Raises:
        InputError: fewer than 8 volumes on a side, synthetic volumes of different shapes, or different modalities.
    """
    grid = _common_grid(real, synthetic)
    made = profile(synthetic, grid, synthetic_regions_mm3)
    have = profile(real, grid, real_regions_mm3)
    fitted = have if train is None else profile(train, grid)
    if reference is None and train is not None:
        # what the floor is measured on must not have fitted the extractor: its own components would flatter nobody but it
        share = min(len(made), len(have), len(train) // 2) / len(train)
        outside, inside = sides(train_persons or [str(i) for i in range(len(train))], seed, share)
        base, other, fitted = have, fitted.take(outside), fitted.take(inside)
        floor_set = "real vs real, a part of the training side that fitted no extractor"
    elif reference is None:
        first, second = sides(real_persons or [str(i) for i in range(len(real))], seed, 0.5)
        base, other, floor_set = have.take(first), have.take(second), "real vs real, two halves by person"
    else:
        base, other, floor_set = have, profile(reference, grid), "real vs real, the reference set"
    n = min(len(made), len(base), len(other))
    if n < 8:
        got = f"{len(made)} synthetic, {len(base)} and {len(other)} real"
        raise InputError("at least 8 volumes on each side (16 real ones without a reference set)", got, "evaluate")
    rng = seeding.generator(seed, "imaging.evaluate.subset")
    base, other, made = (p.take(np.sort(rng.permutation(len(p))[:n])) for p in (base, other, made))

    shape_of, kept, explained = _shape_extractor(fitted.coarse_nv)
    texture_of = _standardiser(fitted.quantile_nq)
    source = f"{'the training side' if train is not None else 'the real set given'}, {len(fitted)} volumes"
    shape_note = f"{kept} principal components ({explained:.0%} of variance) fitted on {source}"
    texture_note = f"7 quantiles each of intensity and gradient magnitude, standardised on {source}"

    def distance(
        name: str,
        feature: Callable[[Profile], np.ndarray],
        metric: Callable[[np.ndarray, np.ndarray], float],
        note: str,
        *,
        limit: float | None = None,
        unit: str = "",
    ) -> Finding:
        a, b, s = feature(base), feature(other), feature(made)
        value, interval = jackknife(metric, a, s)
        floor, floor_interval = jackknife(metric, a, b)
        threshold = None if limit is None else limit * floor
        return Finding(
            name,
            value,
            interval,
            n,
            threshold,
            floor_set,
            "lower",
            "none" if threshold is None else "pass" if value <= threshold else "fail",
            unit,
            floor,
            note,
            {"floor_interval": list(floor_interval)},
        )

    findings = [
        distance("frechet_shape", lambda p: shape_of(p.coarse_nv), frechet, shape_note, limit=2.0),
        distance("frechet_texture", lambda p: texture_of(p.quantile_nq), frechet, texture_note),
        distance("kid_shape", lambda p: shape_of(p.coarse_nv), kernel_distance, shape_note),
        distance("intensity_w1", lambda p: p.intensity_nb, histogram_w1, "voxel intensities scaled to 0 .. 1"),
        distance("gradient_w1", lambda p: p.gradient_nb, histogram_w1, "gradient magnitude: sharpness and noise"),
        distance("block_mean_w1", lambda p: p.block_nr, column_w1, "mean intensity of 4 x 4 x 4 sub-blocks"),
        _sharpness(base, other, made, n, floor_set),
        _diversity(base, made, n, seed),
    ]
    if base.region_nr is not None and made.region_nr is not None:

        def region(p: Profile) -> np.ndarray:
            return p.region_nr  # type: ignore[return-value]

        if other.region_nr is not None:
            findings.append(distance("region_volume_w1", region, column_w1, "label volumes", limit=1.5, unit="mm3"))
    figures = {
        "montage": {"real": _slices(base, SHOWN), "synthetic": _slices(made, SHOWN)},
        "volumes": {"real": _grey(base.thumb_ndhw[:SHOWN]), "synthetic": _grey(made.thumb_ndhw[:SHOWN])},
        "pca": {"real": shape_of(base.coarse_nv)[:, :2], "synthetic": shape_of(made.coarse_nv)[:, :2]},
        "intensity": {
            "bin": (np.arange(BINS) + 0.5) / BINS,
            "real": base.intensity_nb.mean(axis=0),
            "synthetic": made.intensity_nb.mean(axis=0),
        },
    }
    return Evaluation(findings, figures)


def montage_image(figures: dict[str, Any]) -> np.ndarray:
    """The montage as one uint8 image: per plane (axial, coronal, sagittal) a row of real and a row of synthetic
    slices."""
    rows = []
    for plane in ("axial", "coronal", "sagittal"):
        for side in ("real", "synthetic"):
            rows.append(np.concatenate([np.pad(tile, 1) for tile in figures["montage"][side][plane]], axis=1))
    width = max(row.shape[1] for row in rows)
    return np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]))) for row in rows])


def _common_grid(real: Sequence[Volume], synthetic: Sequence[Volume]) -> DataConfig:
    if not real or not synthetic:
        raise InputError("volumes on both sides", f"{len(real)} real, {len(synthetic)} synthetic", "evaluate")
    grid = common_grid(synthetic, "evaluate")
    if (real[0].units == "HU") != (grid.modality == "CT"):
        raise InputError(f"real volumes in the synthetic ones' units ({synthetic[0].units})", real[0].units, "evaluate")
    return grid


def sides(persons: Sequence[str], seed: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Scans of a random `share` of the people (at least that share of the scans), and the rest; no person in both."""
    unique = sorted(set(persons))
    chosen: set[str] = set()
    scans = 0
    for k in seeding.generator(seed, "imaging.evaluate.sides").permutation(len(unique)):
        if scans >= share * len(persons):
            break
        chosen.add(unique[k])
        scans += sum(p == unique[k] for p in persons)
    side = np.array([p in chosen for p in persons])
    return np.flatnonzero(side), np.flatnonzero(~side)


def _shape_extractor(coarse_nv: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], int, float]:
    """Projection on the leading components of `coarse_nv`, scaled so that their mean variance is 1."""
    from sklearn.decomposition import PCA

    kept = max(2, min(COMPONENTS, len(coarse_nv) // 4))
    pca = PCA(kept, svd_solver="full").fit(coarse_nv)
    scale = float(np.sqrt(pca.explained_variance_.mean())) or 1.0
    return lambda x: pca.transform(x) / scale, kept, float(pca.explained_variance_ratio_.sum())


def _standardiser(x_nf: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    mean, deviation = x_nf.mean(axis=0), np.maximum(x_nf.std(axis=0), FLAT)
    return lambda x: (x - mean) / deviation


def jackknife(
    metric: Callable[[np.ndarray, np.ndarray], float],
    a: np.ndarray,
    b: np.ndarray,
    person_n: np.ndarray | None = None,
) -> tuple[float, tuple[float, float]]:
    """Value of `metric` and its 95 % interval: both sides lose one of ten groups at a time, the scans of one person (of the
    first side, where `person_n` names them) together."""
    value, groups = metric(a, b), np.arange(len(a)) % min(GROUPS, len(a))
    of_a = groups if person_n is None else np.unique(person_n, return_inverse=True)[1] % min(GROUPS, len(set(person_n)))
    parts = np.array([metric(a[of_a != g], b[groups != g]) for g in range(of_a.max() + 1)])
    error = float(np.sqrt((len(parts) - 1) / len(parts) * ((parts - parts.mean()) ** 2).sum()))
    return value, (value - 1.96 * error, value + 1.96 * error)


def _sharpness(base: Profile, other: Profile, made: Profile, n: int, floor_set: str) -> Finding:
    """Mean gradient magnitude, synthetic over real: 1 = as sharp and as noisy, below = smoothed."""
    bins = (np.arange(BINS) + 0.5) / BINS

    def ratio(a: np.ndarray, b: np.ndarray) -> float:
        return float((b @ bins).mean() / max((a @ bins).mean(), 1e-12))

    value, interval = jackknife(ratio, base.gradient_nb, made.gradient_nb)
    floor = ratio(base.gradient_nb, other.gradient_nb)
    return Finding(
        "sharpness_ratio",
        value,
        interval,
        n,
        1.0,
        floor_set,
        "target",
        "none",
        "",
        floor,
        "mean gradient magnitude, synthetic over real",
    )


def _diversity(base: Profile, made: Profile, n: int, seed: int) -> Finding:
    """SSIM between pairs of synthetic volumes, beside pairs of real ones: higher = less diverse."""
    if min(made.thumb_ndhw.shape[1:]) < SSIM_WINDOW:
        return Finding(
            "pair_ssim", float("nan"), None, n, None, "", "target", "void", note="volumes smaller than the window"
        )
    pairs, real = similarity(made.thumb_ndhw, seed), similarity(base.thumb_ndhw, seed)
    error = 1.96 * float(pairs.std(ddof=1)) / np.sqrt(len(pairs))
    value = float(pairs.mean())
    note = (
        f"mean 3D SSIM of {len(pairs)} random pairs within a set, window {SSIM_WINDOW}; above the floor = less diverse"
    )
    return Finding(
        "pair_ssim",
        value,
        (value - error, value + error),
        n,
        None,
        "pairs within real",
        "target",
        "none",
        "",
        float(real.mean()),
        note,
    )


def _grey(array: np.ndarray) -> np.ndarray:
    return np.clip(array * 255.0, 0, 255).astype(np.uint8)


def _slices(p: Profile, count: int) -> dict[str, list[np.ndarray]]:
    """Middle slices of the first volumes as uint8 images, front or top of the body up."""
    shown = _grey(p.thumb_ndhw[:count])
    _, d, h, w = shown.shape
    turn = lambda image: np.ascontiguousarray(image.T[::-1])  # noqa: E731
    return {
        "axial": [turn(v[:, :, w // 2]) for v in shown],
        "coronal": [turn(v[:, h // 2]) for v in shown],
        "sagittal": [turn(v[d // 2]) for v in shown],
    }
