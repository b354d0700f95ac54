"""Follow-ups judged where the truth is known: synthetic second visits of unseen people of the embedded cohort.

    python perf/imaging/follow_up.py RUN COHORT --people 24

RUN is a run with `flow.baseline: true` trained on COHORT's scans, COHORT a folder of `engine.cohort.embedded.write_cohort`. Of
every holdout person with two visits the first scan is given, and a second one is asked for at its true interval, at
interval 0 and at twice the interval. Said of them:

- identity: how many of the synthetic follow-ups correlate best with their own person's first scan among those of all people
  judged; beside it the real second visits, which is the ceiling, and synthetic scans of the same covariates without a baseline.
- change: the ventricles, measured by the cohort's own rule (`engine.cohort.measure`), in mL after minus before: asked for at
  interval 0, at the true one and at twice as much, and the correlation with the truth over people.

One JSON object on standard output. People are the unit; brackets are 95 % bootstrap intervals over them.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.cohort.measure import measure
from engine.imaging.dataset import fit_volume
from engine.imaging.generate import Baseline, Model, as_written, load_model, sample
from engine.imaging.volume import Volume, read_volume

SCALES = (0.0, 1.0, 2.0)


def pairs(cohort: Path, people: int) -> list[tuple[dict[str, str], dict[str, str]]]:
    """Rows of the first and second visit of holdout people, evenly over the table."""
    with (cohort / "imaging" / "volumes.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == "holdout"]
    first = {row["subject"]: row for row in rows if row["visit"] == "1"}
    found = [(first[row["subject"]], row) for row in rows if row["visit"] == "2"]
    return [found[int(k)] for k in np.linspace(0, len(found) - 1, min(people, len(found))).round()]


def asked(names: list[str], before: dict[str, str], after: dict[str, str], scale: float) -> dict[str, Any]:
    """Covariates of a second visit at `scale` times the true interval."""
    years = scale * float(after["interval_years"])
    given: dict[str, Any] = {name: before[name] for name in names if name in before}
    given.update(age=float(before["age"]) + years, interval_years=years)
    return {name: value for name, value in given.items() if name in names and name != "visit"} | (
        {"visit": after["visit"]} if "visit" in names else {}
    )


def matched(made: list[np.ndarray], first: list[np.ndarray]) -> np.ndarray:
    """Of every scan whether its own person's first scan is the one it correlates best with."""

    def unit(arrays: list[np.ndarray]) -> np.ndarray:
        flat = np.stack([a.ravel() for a in arrays]).astype(np.float64)
        flat -= flat.mean(axis=0)  # what all heads share tells nobody apart
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    return (unit(made) @ unit(first).T).argmax(axis=1) == np.arange(len(made))


def interval(values: np.ndarray, statistic: Any = np.mean, seed: int = 0) -> list[float]:
    """Value and its 95 % bootstrap interval over the first axis."""
    draw = np.random.default_rng(seed)
    drawn = [statistic(values[draw.integers(len(values), size=len(values))]) for _ in range(2000)]
    return [round(float(x), 3) for x in (statistic(values), *np.nanpercentile(drawn, [2.5, 97.5]))]


def correlation(xy_n2: np.ndarray) -> float:
    """Pearson's r of two columns."""
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(xy_n2.T)[0, 1])


def main() -> None:
    """Parse, sample, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--montage", type=Path, help="PNG: rows first visit, follow-ups at 0, 1 and 2 intervals, truth")
    options = parser.parse_args()
    model = load_model(options.run, "cpu")
    names = [c.name for c in model.covariates if not c.name.startswith("baseline_")]
    visits = pairs(options.cohort, options.people)
    folder = options.cohort / "imaging"
    real = [[read_volume(folder / row["image"]) for row in pair] for pair in visits]
    baselines = [Baseline(one[0], {k: pair[0][k] for k in names if k in pair[0]}) for one, pair in zip(real, visits)]
    made: dict[float, list[Volume]] = {}
    for scale in SCALES:
        given = [asked(names, *pair, scale) for pair in visits]
        drawn = sample(model, len(visits), covariates=given, baselines=baselines, steps=options.steps)
        made[scale] = [volume for _, volume, _ in drawn]
    given = [asked(names, *pair, 1.0) for pair in visits]
    alone = [volume for _, volume, _ in sample(model, len(visits), covariates=given, steps=options.steps)]

    rebuilt = [_rebuilt(model, one[0]) for one in real]
    size = made[1.0][0].shape_dhw
    assert all(one[0].shape_dhw == size for one in real), "the cohort's scans lie on the model's grid"
    first = [one[0].array_cdhw for one in real]
    identity = {
        "follow_ups": matched([v.array_cdhw for v in made[1.0]], first),
        "real_second_visits": matched([one[1].array_cdhw for one in real], first),
        "without_baseline": matched([v.array_cdhw for v in alone], first),
    }
    before, after = (measure([one[k] for one in real]).dark_mm3 / 1000 for k in (0, 1))
    change = {scale: measure(volumes).dark_mm3 / 1000 - before for scale, volumes in made.items()}
    grown = {
        scale: change[scale] - change[0.0] for scale in SCALES[1:]
    }  # against the same person and noise at interval 0
    truth = after - before
    print(json.dumps({
        "people": len(visits), "step": model.step,
        "identity": {name: interval(hits.astype(float)) for name, hits in identity.items()},
        "autoencoder_alone_ml": interval(measure(rebuilt).dark_mm3 / 1000 - before),
        "change_ml": {"truth": interval(truth), **{f"interval x {s:g}": interval(change[s]) for s in SCALES}},
        "growth_over_interval_0_ml": {f"interval x {s:g}": interval(g) for s, g in grown.items()},
        "r_of_growth_with_truth": interval(np.stack([grown[1.0], truth], axis=1), correlation),
        "ad_minus_cn_growth_ml": _difference(grown[1.0], visits), "ad_minus_cn_truth_ml": _difference(truth, visits),
    }, indent=1))  # fmt: skip
    if options.montage:
        _montage(options.montage, [[v.array_cdhw[0] for v in row] for row in (
            [one[0] for one in real], made[0.0], made[1.0], made[2.0], [one[1] for one in real]
        )])  # fmt: skip


def _rebuilt(model: Model, volume: Volume) -> Volume:
    """A scan through encoder and decoder: what every synthetic scan loses."""
    fitted = fit_volume(volume, model.config.data)
    with torch.no_grad():
        z, _ = model.autoencoder.encode(torch.from_numpy(fitted.array_cdhw)[None])
        return as_written(model.config, model.autoencoder.decode(z)[0].numpy(), fitted.affine)


def _difference(values: np.ndarray, visits: list[tuple[dict[str, str], dict[str, str]]]) -> float:
    ill = np.array([pair[0].get("diagnosis") == "AD" for pair in visits])
    return round(float(values[ill].mean() - values[~ill].mean()), 3) if ill.any() and not ill.all() else float("nan")


def _montage(path: Path, rows: list[list[np.ndarray]], columns: int = 8) -> None:
    from matplotlib.image import imsave

    def slice_of(array_dhw: np.ndarray) -> np.ndarray:  # axial, the eye's way up, each scan by its own top
        plane = array_dhw[:, :, array_dhw.shape[2] // 2].T[::-1]
        return np.clip(plane / max(1e-6, float(np.percentile(array_dhw, 99.5))), 0, 1)

    image = np.concatenate([np.concatenate([slice_of(a) for a in row[:columns]], axis=1) for row in rows], axis=0)
    imsave(path, np.kron(image, np.ones((3, 3))), cmap="gray", vmin=0, vmax=1)


if __name__ == "__main__":
    main()
