"""Utility: train on synthetic, test on real, beside train on real, test on real.

Both networks see equally many scans, learn for equally many steps, and are tested on the same unseen people; each is
trained several times from other weights, and the figures are means over these. The ratio's interval resamples people.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from engine.audit.findings import Finding
from engine.imaging.quality.classifier import probabilities, train_classifier
from engine.imaging.quality.config import QualityConfig, SegmenterConfig
from engine.imaging.quality.covariates import auc
from engine.imaging.quality.segmenter import dice, segment, segmenter
from engine.imaging.quality.sides import Side
from engine.seeding import derived_seed, generator

_RESAMPLED = 1000
_LEAST_TESTED = 8


def segmentation_utility(
    train: Side,
    synthetic: Side,
    test: Side,
    count: int,
    config: QualityConfig,
    seed: int,
    device: torch.device,
    cache: Path | None = None,
) -> list[Finding]:
    """`tstr_dice` with the Dice of training on real scans as its floor, and their ratio against the goal.

    Args:
        train, synthetic, test: with label maps; the larger of the first two is cut at random to the size of the smaller.
        count: labels.
    """
    n = min(len(train), len(synthetic))
    sources = {name: _cut(side, n, seed) for name, side in (("real", train), ("synthetic", synthetic))}
    scores: dict[str, np.ndarray] = {}  # (repeats, test scans, labels)
    for name, side in sources.items():
        rows = [
            _tested(
                side, test, count, config.segmenter, derived_seed(seed, "imaging.quality.utility", k), device, cache
            )
            for k in range(config.utility.repeats)
        ]
        scores[name] = np.stack(rows)
    ours, theirs = (np.nanmean(scores[name], axis=(0, 2)) for name in ("synthetic", "real"))
    by_label = {
        name: [round(float(v), 4) for v in np.nanmean(scores[name], axis=(0, 1))] for name in ("synthetic", "real")
    }
    spread = {name: [round(float(v), 4) for v in np.nanmean(scores[name], axis=(1, 2))] for name in scores}
    sizes = {"trained_on": n, "tested_on": len(test)}
    learner = f"U-Net, {config.segmenter.steps} steps on {n} scans, {config.utility.repeats} trainings"
    note = learner + ", tested on unseen real scans"
    return _two_findings("dice", ours, theirs, test.person_n, np.mean, sizes, note, config, seed, by_label, spread)


def _tested(
    side: Side, test: Side, count: int, config: SegmenterConfig, seed: int, device: torch.device, cache: Path | None
) -> np.ndarray:
    assert side.codes_ndhw is not None
    assert test.codes_ndhw is not None
    network, _ = segmenter(side.x_ndhw, side.codes_ndhw, count, config, seed, device, cache)
    return dice(segment(network, test.x_ndhw, config), test.codes_ndhw, count)


def class_utility(
    train: Side, synthetic: Side, test: Side, name: str, config: QualityConfig, seed: int, device: torch.device
) -> list[Finding]:
    """`tstr_auc_NAME` and its ratio: a network that learns the levels of a categorical covariate; none where a side has
    fewer than 8 scans with a value, or synthetic scans of fewer than two levels."""
    levels = sorted({row[name] for row in train.covariates if name in row})
    coded = {k: _coded(side, name, levels) for k, side in (("real", train), ("synthetic", synthetic), ("test", test))}
    if min(len(side) for side, _ in coded.values()) < _LEAST_TESTED or len(set(coded["synthetic"][1])) < 2:
        return []
    n = min(len(coded["real"][0]), len(coded["synthetic"][0]))
    held, code = coded["test"]
    p: dict[str, np.ndarray] = {}
    for k in ("real", "synthetic"):
        side, level_n = coded[k]
        chosen = _chosen(len(side), n, seed)
        made = [
            probabilities(
                train_classifier(
                    side.x_ndhw[chosen], level_n[chosen], len(levels), config.utility.classifier,
                    derived_seed(seed, "imaging.quality.utility", repeat), device,
                ),
                held.x_ndhw,
            )
            for repeat in range(config.utility.repeats)
        ]  # fmt: skip
        p[k] = np.stack(made)

    def area(index_n: np.ndarray, which: str) -> float:
        found = [auc(one[index_n], code[index_n]) for one in p[which]]
        known = [v for v in found if v is not None]
        return float(np.mean(known)) if known else float("nan")

    everyone = np.arange(len(held))
    if np.isnan(area(everyone, "real")):
        return []
    sizes = {"trained_on": n, "tested_on": len(held)}
    note = f"3D network for {name}, {config.utility.classifier.steps} steps on {n} scans, {config.utility.repeats} trainings"
    areas: tuple[Mean, Mean] = (lambda index: area(index, "synthetic"), lambda index: area(index, "real"))
    return _two_findings(
        f"auc_{name}", everyone, everyone, held.person_n, areas, sizes, note + ", tested on unseen real scans", config, seed,
        {}, {},
    )  # fmt: skip


Mean = Callable[[np.ndarray], float]


def _two_findings(
    name: str,
    ours_n: np.ndarray,
    theirs_n: np.ndarray,
    person_n: np.ndarray,
    mean: Mean | tuple[Mean, Mean],
    sizes: dict[str, int],
    note: str,
    config: QualityConfig,
    seed: int,
    by_label: dict[str, list[float]],
    spread: dict[str, list[float]],
) -> list[Finding]:
    """The figure with its floor, and the ratio; `mean` makes a figure of the rows of resampled people."""
    of_ours, of_theirs = mean if isinstance(mean, tuple) else (mean, mean)
    value, floor = of_ours(ours_n), of_theirs(theirs_n)
    rng, people = generator(seed, "imaging.quality.people"), np.unique(person_n)
    rows = {p: np.flatnonzero(person_n == p) for p in people}
    drawn = []
    for _ in range(_RESAMPLED):
        index = np.concatenate([rows[p] for p in rng.choice(people, len(people))])
        drawn.append((of_ours(ours_n[index]), of_theirs(theirs_n[index])))
    ours, theirs = np.array(drawn).T

    def bounds(values: np.ndarray) -> tuple[float, float]:
        low, high = np.nanquantile(values, [0.025, 0.975])
        return float(low), float(high)

    detail = {k: v for k, v in (("by_label", by_label), ("by_training", spread)) if v}
    goal = config.utility.goal
    ratio = value / floor if floor > 0 else float("nan")
    return [
        Finding(
            f"tstr_{name}", value, bounds(ours), sizes, None, "trained on as many real scans", "higher", "none", "", floor,
            "trained on synthetic; floor: on real; " + note, {**detail, "floor_interval": list(bounds(theirs))},
        ),
        Finding(
            f"tstr_{name}_ratio", ratio, bounds(ours / np.where(theirs > 0, theirs, np.nan)), sizes, goal,
            "trained on as many real scans", "higher", "pass" if ratio >= goal else "fail", "", 1.0,
            "trained on synthetic over trained on real; " + note,
        ),
    ]  # fmt: skip


def _coded(side: Side, name: str, levels: list[str]) -> tuple[Side, np.ndarray]:
    here = np.array([k for k, row in enumerate(side.covariates) if row.get(name) in levels], dtype=np.int64)
    return side.take(here), np.array([levels.index(side.covariates[k][name]) for k in here], dtype=np.int64)


def _cut(side: Side, n: int, seed: int) -> Side:
    return side.take(_chosen(len(side), n, seed))


def _chosen(count: int, n: int, seed: int) -> np.ndarray:
    return np.sort(generator(seed, "imaging.quality.cut").permutation(count)[:n])
