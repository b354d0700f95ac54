"""The learned metrics in order. What learns, learns on a part of the real training side; the rest of it and the real scans
given are unseen people, and every floor is a mean over random halves of these, at the n of the figure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import wasserstein_distance

from engine.audit.authenticity import prdc_rows
from engine.audit.findings import Finding, Verdict
from engine.audit.intervals import bootstrap_mean
from engine.audit.pools import Pool
from engine.devices import choose
from engine.errors import InputError
from engine.imaging.evaluate import frechet, jackknife, kernel_distance, sides
from engine.imaging.quality.config import QualityConfig
from engine.imaging.quality.covariates import fidelity, kind_of
from engine.imaging.quality.distances import bandwidth, floor_of, halves, mmd, ms_ssim_pairs, scales_of
from engine.imaging.quality.features import (
    PLANES,
    Extractor,
    brought_extractor,
    learned_extractors,
    reducer,
    slice_features,
    volume_features,
)
from engine.imaging.quality.segmenter import dice, segment, segmenter
from engine.imaging.quality.sides import Side, volumes_mm3
from engine.imaging.quality.utility import class_utility, segmentation_utility
from engine.seeding import generator

_LEAST = 8
_UNSEEN = 0.25  # share of the training side's scans that nothing learns from, at most
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Assessment:
    """Findings in order, and what made them: name and SHA-256 of every network that was learned or brought."""

    findings: list[Finding]
    networks: dict[str, str]


@dataclass(frozen=True)
class _Sets:
    """Everything unseen in one list: `base` are the indices of the real scans given, `splits` halves by person; `n` scans
    of every side are compared; `made` are the synthetic ones."""

    unseen: Side
    base: np.ndarray
    splits: list[tuple[np.ndarray, np.ndarray]]
    made: Side
    n: int
    seed: int


def assess(
    real: Side,
    train: Side,
    synthetic: Side,
    config: QualityConfig,
    *,
    labels: int = 0,
    seed: int = 0,
    device: str = "auto",
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Assessment:
    """Everything that the sides' columns allow: distances, diversity, covariates; with label maps of the real sides the
    volumes of regions, with those of the synthetic side too the Dice of pairs and utility.

    Args:
        labels: number of labels.
        cache: folder for networks that were learned; they are made from people's data and stay inside.

    Raises:
        InputError: fewer than 8 scans on a side, a person in both real sides, or weights that cannot be used.
    """
    both = sorted({*real.person_n} & {*train.person_n})
    if both:
        raise InputError("different people in real and train", f"{len(both)} in both", "evaluate", "a split by person")
    place, tell = choose(device), progress or (lambda what, done, total: None)
    share = min(_UNSEEN, len(real) / len(train))
    outside, inside = sides(list(train.person_n), seed, share)
    fitted, spare = train.take(inside), train.take(outside)
    sets = _sets(real, spare, synthetic, config, seed)
    if min(sets.n, len(fitted)) < _LEAST:
        got = f"{len(real)} real, {len(train)} training, {len(synthetic)} synthetic ones"
        raise InputError("at least 8 scans on each side for learned metrics", got, "evaluate", "--quick without them")
    steps = 5
    tell("learning extractors", 0, steps)
    extractors = learned_extractors(fitted.x_ndhw, config.extractor, seed, place, cache)
    extractors += [brought_extractor(weights, place) for weights in config.extractor.weights]
    networks = {f"{e.name}_{e.kind}": e.sha256 for e in extractors}
    findings: list[Finding] = []
    described: dict[str, Any] = {}
    tell("distances", 1, steps)
    for extractor in extractors:
        if extractor.kind == "3d":
            found, rows = _of_volumes(extractor, fitted, sets, config)
            described.setdefault("rows", rows)
        else:
            found = _of_slices(extractor, fitted, sets, config)
        findings += found
    findings += _diversity(sets)
    tell("covariates", 2, steps)
    base = sets.unseen.take(sets.base)
    fitted_rows, unseen_rows, made_rows = described["rows"]
    fitted_rows, base_rows, made_rows = (
        np.concatenate([rows, _coarse(side.x_ndhw)], axis=1)
        for rows, side in ((fitted_rows, fitted), (unseen_rows[sets.base], base), (made_rows, sets.made))
    )
    for name in _shared(train, synthetic, config):
        kind = kind_of(fitted.covariates, name)
        if kind is not None:
            findings += fidelity(
                name, kind, (fitted_rows, fitted.covariates), (base_rows, base.covariates, base.person_n),
                (made_rows, sets.made.covariates), seed,
            )  # fmt: skip
    tell("regions", 3, steps)
    if labels and fitted.codes_ndhw is not None and sets.unseen.codes_ndhw is not None:
        found, sha256 = _of_regions(fitted, sets, labels, config, seed, place, cache)
        findings, networks = findings + found, {**networks, "segmenter": sha256}
    tell("utility", 4, steps)
    if labels and train.codes_ndhw is not None and synthetic.codes_ndhw is not None and real.codes_ndhw is not None:
        findings += segmentation_utility(train, synthetic, real, labels, config, seed, place, cache)
    for name in config.utility.classes:
        findings += class_utility(train, synthetic, real, name, config, seed, place)
    tell("done", steps, steps)
    return Assessment(findings, networks)


def _coarse(x_ndhw: np.ndarray) -> np.ndarray:
    """Mean intensity of 4 x 4 x 4 blocks, (n, 64): the encoder's description does not say where things are."""
    x = torch.from_numpy(np.ascontiguousarray(x_ndhw, dtype=np.float32))[:, None]
    return F.adaptive_avg_pool3d(x, (4, 4, 4)).flatten(1).double().numpy()


def _sets(real: Side, spare: Side, synthetic: Side, config: QualityConfig, seed: int) -> _Sets:
    unseen = Side(
        np.concatenate([real.x_ndhw, spare.x_ndhw]),
        np.concatenate([real.person_n, spare.person_n]),
        None
        if real.codes_ndhw is None or spare.codes_ndhw is None
        else np.concatenate([real.codes_ndhw, spare.codes_ndhw]),
        (*real.covariates, *spare.covariates),
        real.voxel_mm3,
    )
    splits = halves(list(unseen.person_n), config.halves, seed)
    n = min(len(synthetic), len(real), *(min(len(a), len(b)) for a, b in splits))
    base = np.sort(generator(seed, "imaging.quality.base").permutation(len(real))[:n])
    made = synthetic.take(np.sort(generator(seed, "imaging.quality.made").permutation(len(synthetic))[:n]))
    return _Sets(unseen, base, splits, made, n, seed)


def _shared(train: Side, synthetic: Side, config: QualityConfig) -> list[str]:
    names = [{name for row in side.covariates for name in row} for side in (train, synthetic)]
    return sorted(names[0] & names[1]) if config.covariates is None else config.covariates


def _distance(
    name: str,
    metric: Callable[[np.ndarray, np.ndarray], float],
    unseen: np.ndarray,
    made: np.ndarray,
    sets: _Sets,
    note: str,
    *,
    goal: float | None = None,
    unit: str = "",
) -> Finding:
    """A distance of the real scans given to the synthetic ones, and its floor; the first axis of the arrays is scans."""
    base, person_n = unseen[sets.base], sets.unseen.person_n[sets.base]
    value, interval = jackknife(metric, base, made, person_n)
    floor, spread = floor_of(lambda a, b: metric(unseen[a], unseen[b]), sets.splits, sets.n, sets.seed)
    threshold = None if goal is None else goal * floor
    verdict: Verdict = "none" if threshold is None else "pass" if value <= threshold else "fail"
    return Finding(
        name, value, interval, sets.n, threshold, _calibrated(sets), "lower", verdict, unit, floor, note,
        {"floor_interval": spread},
    )  # fmt: skip


def _calibrated(sets: _Sets) -> str:
    return f"real vs real, mean over {len(sets.splits)} splits of unseen people"


def _of_volumes(
    extractor: Extractor, fitted: Side, sets: _Sets, config: QualityConfig
) -> tuple[list[Finding], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Frechet, KID, MMD, precision, recall, density and coverage of a 3D extractor; and its features of all three sets."""
    rows = [volume_features(extractor, side.x_ndhw) for side in (fitted, sets.unseen, sets.made)]
    project, kept, explained = reducer(rows[0], config.extractor.components, extractor.levels)
    seen, unseen, made = (project(x) for x in rows)
    width = bandwidth(seen)
    name, note = f"{extractor.name}_3d", f"{kept} components ({explained:.0%} of variance) of a {extractor.note}"
    gated = config.frechet_goal if extractor.name == "self" else None
    found = [
        _distance(f"frechet_{name}", frechet, unseen, made, sets, note, goal=gated),
        _distance(f"kid_{name}", kernel_distance, unseen, made, sets, note),
        _distance(f"mmd_{name}", lambda a, b: mmd(a, b, width), unseen, made, sets, note + ", Gaussian kernel"),
    ]
    found += _manifold(name, unseen, made, sets, config, note)
    return found, (rows[0], rows[1], rows[2])


def _of_slices(extractor: Extractor, fitted: Side, sets: _Sets, config: QualityConfig) -> list[Finding]:
    """The 2.5D Frechet distance: of slices of three planes, averaged over planes."""
    rows = [slice_features(extractor, side.x_ndhw) for side in (fitted, sets.unseen, sets.made)]
    parts: dict[str, list[np.ndarray]] = {"unseen": [], "made": []}
    for plane in PLANES:
        flat = rows[0][plane].reshape(-1, rows[0][plane].shape[-1])
        project, kept, _ = reducer(flat, config.extractor.components, extractor.levels)
        parts["unseen"].append(project(rows[1][plane]))
        parts["made"].append(project(rows[2][plane]))
    ends = np.cumsum([p.shape[1] for p in parts["unseen"]])[:-1]
    unseen, made = (np.concatenate(_alike(parts[k]), axis=1) for k in ("unseen", "made"))

    def metric(a: np.ndarray, b: np.ndarray) -> float:
        planes = zip(np.split(a, ends, axis=1), np.split(b, ends, axis=1))
        return float(np.mean([frechet(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])) for x, y in planes]))

    note = f"mean of three planes, {kept} components, slices of the middle half; {extractor.note}"
    gated = config.frechet_goal if extractor.name == "self" else None
    return [_distance(f"frechet_{extractor.name}_25d", metric, unseen, made, sets, note, goal=gated)]


def _alike(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Features of planes padded with zeros to one width, so that they lie in one array; zeros add nothing to a distance."""
    width = max(p.shape[-1] for p in parts)
    return [np.pad(p, [(0, 0), (0, 0), (0, width - p.shape[-1])]) for p in parts]


def _manifold(
    name: str, unseen: np.ndarray, made: np.ndarray, sets: _Sets, config: QualityConfig, note: str
) -> list[Finding]:
    """Precision, recall, density and coverage against the real scans given; floors with unseen real scans in place."""
    k = config.neighbours
    if sets.n <= k + 1:
        return []
    person_n = sets.unseen.person_n
    nobody = np.array([f"synthetic {i}" for i in range(len(made))])

    def pool(x: np.ndarray, who: np.ndarray) -> Pool:
        return Pool("features", x.astype(np.float32), who)

    tested = prdc_rows(pool(unseen[sets.base], person_n[sets.base]), pool(made, nobody), k)
    found = []
    for metric in ("precision", "recall", "density", "coverage"):
        people = nobody if metric in ("precision", "density") else person_n[sets.base]
        value, low, high = bootstrap_mean(tested[metric], person_n=people, seed=sets.seed)

        def real(a: np.ndarray, b: np.ndarray, metric: str = metric) -> float:
            rows = prdc_rows(pool(unseen[a], person_n[a]), pool(unseen[b], person_n[b]), k)
            return float(rows[metric].mean())

        floor, spread = floor_of(real, sets.splits, sets.n, sets.seed)
        found.append(
            Finding(
                f"{metric}_{name}", value, (low, high), sets.n, None, _calibrated(sets), "target", "none",
                "" if metric == "density" else "share", floor, f"{k} neighbours, {note}", {"floor_interval": spread},
            )
        )  # fmt: skip
    return found


def _diversity(sets: _Sets) -> list[Finding]:
    """MS-SSIM of pairs within the synthetic scans, beside pairs of real ones."""
    nobody = np.array([f"synthetic {i}" for i in range(len(sets.made))])
    made = ms_ssim_pairs(sets.made.x_ndhw, nobody, sets.seed)
    base = sets.unseen.take(sets.base)
    real = ms_ssim_pairs(base.x_ndhw, base.person_n, sets.seed)
    if not len(made) or not len(real):
        note = "not given: volumes with room for one scale only"
        return [Finding("pair_ms_ssim", float("nan"), n=sets.n, verdict="void", note=note)]

    def interval(values: np.ndarray) -> tuple[float, float]:
        error = 1.96 * float(values.std(ddof=1) / np.sqrt(len(values)))
        return float(values.mean() - error), float(values.mean() + error)

    scales = scales_of(sets.made.x_ndhw.shape[1:])
    note = f"mean MS-SSIM of pairs within a set, {scales} scales; above the floor = less diverse"
    return [
        Finding(
            "pair_ms_ssim", float(made.mean()), interval(made), sets.n, None, "pairs within real", "target", "none", "",
            float(real.mean()), note, {"floor_interval": list(interval(real))},
        )
    ]  # fmt: skip


def _of_regions(
    fitted: Side, sets: _Sets, labels: int, config: QualityConfig, seed: int, place: Any, cache: Path | None
) -> tuple[list[Finding], str]:
    """Volumes of regions by a segmenter of the training side and by the maps themselves, and the Dice of pairs."""
    assert fitted.codes_ndhw is not None
    assert sets.unseen.codes_ndhw is not None
    network, sha256 = segmenter(fitted.x_ndhw, fitted.codes_ndhw, labels, config.segmenter, seed, place, cache)
    unseen, made = (segment(network, side.x_ndhw, config.segmenter) for side in (sets.unseen, sets.made))
    mm3 = sets.unseen.voxel_mm3

    def volumes(codes: np.ndarray) -> np.ndarray:
        return volumes_mm3(codes, labels, mm3)

    note = f"volumes by a U-Net of {len(fitted)} real training scans"
    found = _volumes("region_w1", volumes(unseen), volumes(made), sets, config, note)
    if sets.made.codes_ndhw is not None:
        own = volumes(sets.unseen.codes_ndhw), volumes(sets.made.codes_ndhw)
        found += _volumes("mask_w1", *own, sets, config, "volumes of the label maps themselves")
        agree, real = dice(made, sets.made.codes_ndhw, labels), dice(unseen, sets.unseen.codes_ndhw, labels)[sets.base]
        for k in range(labels):
            value, low, high = bootstrap_mean(_known(agree[:, k]), seed=seed)
            floor, *spread = bootstrap_mean(_known(real[:, k]), seed=seed)
            found.append(
                Finding(
                    f"pair_dice_{k + 1}", value, (low, high), sets.n, None, "unseen real scans", "target", "none", "", floor,
                    "a generated map against what the U-Net of real training scans sees in the generated image",
                    {"floor_interval": spread},
                )
            )  # fmt: skip
    return found, sha256


def _volumes(
    name: str, unseen: np.ndarray, made: np.ndarray, sets: _Sets, config: QualityConfig, note: str
) -> list[Finding]:
    def w1(a: np.ndarray, b: np.ndarray) -> float:
        return float(wasserstein_distance(a, b))

    found = []
    for k in range(unseen.shape[1]):
        one = _distance(
            f"{name}_{k + 1}", w1, unseen[:, k], made[:, k], sets, note + ", Wasserstein-1", goal=config.region_goal, unit="mm3"
        )  # fmt: skip
        means = {"real_mean_sd": _mean_sd(unseen[sets.base, k]), "synthetic_mean_sd": _mean_sd(made[:, k])}
        one.detail.update(means)
        found.append(one)
    return found


def _mean_sd(values: np.ndarray) -> list[float]:
    return [round(float(values.mean()), 1), round(float(values.std(ddof=1)), 1)]


def _known(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]
