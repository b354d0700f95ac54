"""Follow-ups of real scans: learned on the two FLAIR visits of one patient, judged on those of another.

    python perf/imaging/follow_up_ms.py DATA/imaging/ms_longitudinal --out OUT

DATA is as Lesjak et al. 2016 publish it: `raw/patient*/study{1,2}_FLAIR.nii.gz` with the transforms into a common space, and in
`coregistered/` the brain and the lesion changes found there by readers. Two patients are too few for a model of people, but
a patient has two hundred bricks of brain, each with two visits: what can be asked is whether a follow-up of a brain never
seen stays that brain. For each of the two directions: both visits come to the common space, in units of the brain's mean and
deviation; bricks of the one patient (half overlapping) train a model with `flow.baseline`; the bricks of the other (side by
side) give their first visit, and a second one is asked for at the true interval and at none. Said of the patient not learned
from, over bricks:

- identity: how many follow-ups correlate best with their own first visit among all bricks; beside it the real second visits;
- r of the brain's voxels with the first visit and with the true second one; beside it real first with real second, which is
  what a scan unchanged would have;
- change: mean of second less first within what readers marked as changed, and the root mean square elsewhere in the brain.

One JSON object a direction. One patient each way: there is no interval over people to give; brackets are 95 % bootstrap
intervals over bricks.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from follow_up import interval, matched
from scipy.ndimage import affine_transform

from engine.imaging.config import parse_config
from engine.imaging.dataset import fit_volume
from engine.imaging.generate import Baseline, load_model, sample
from engine.imaging.train import train
from engine.imaging.volume import Volume, read_volume, write_volume

BRICK = (24, 24, 12)  # voxels; 35 x 35 x 36 mm
FINER = 2  # voxels of the common space, in plane, to one of a brick
LEVEL, DEVIATION = 500.0, 120.0  # of the brain, in the units that are written

CONFIG: dict[str, Any] = {
    "name": "follow_up_ms",
    "data": {"size": list(BRICK), "modality": "MR", "split_column": "split",
             "covariates": {"interval_years": {"kind": "continuous"}}},
    "autoencoder": {"max_minutes": 30, "steps": 1200, "batch_size": 8, "learning_rate": 0.002, "widths": [48, 96],
                    "latent_channels": 8, "kl_weight": 0.0003, "shift_voxels": 2},
    "flow": {"max_minutes": 30, "steps": 800, "batch_size": 16, "learning_rate": 0.001, "widths": [64, 96],
             "attention_levels": [1], "baseline": True, "linear_mean": True, "condition_noise": 0.0, "ema_decay": 0.99,
             "views": 4, "shift_voxels": 2},
    "sampling": {"steps": 10, "method": "heun"},
    "training": {"checkpoint_every_minutes": 30},
}  # fmt: skip


def transform(path: Path) -> np.ndarray:
    """float64 (4, 4), LPS mm to LPS mm, from ITK's text: offset = translation + centre - matrix centre."""
    text = path.read_text()
    matrix_translation, centre = (
        np.array(re.search(rf"^{key}: (.*)$", text, re.M)[1].split(), float)  # type: ignore[index]
        for key in ("Parameters", "FixedParameters")
    )
    found = np.eye(4)
    found[:3, :3] = matrix_translation[:9].reshape(3, 3)
    found[:3, 3] = matrix_translation[9:] + centre - found[:3, :3] @ centre
    return found


class Patient:
    """Both visits in the common space at brick resolution: float32 (2, d, h, w), brain and change bool (d, h, w)."""

    def __init__(self, folder: Path, name: str, years: float) -> None:
        self.name, self.years = name, years
        space = nib.load(folder / "coregistered" / name / "brainmask.nii.gz")
        brain = np.asarray(space.dataobj) > 0
        changed = np.asarray(nib.load(folder / "coregistered" / name / "gt.nii.gz").dataobj) > 0
        lps = np.diag([-1.0, -1.0, 1.0, 1.0])
        visits = []
        for study in (1, 2):
            image = nib.load(folder / "raw" / name / f"study{study}_FLAIR.nii.gz")
            to_raw = transform(folder / "raw" / name / f"study{study}_FLAIR_to_common_space.txt")
            index = np.linalg.inv(image.affine) @ lps @ to_raw @ lps @ space.affine
            scan = affine_transform(
                np.asarray(image.dataobj, np.float32), index[:3, :3], index[:3, 3], output_shape=brain.shape, order=1
            )
            mean, deviation = scan[brain].mean(), scan[brain].std()
            visits.append(np.clip(LEVEL + DEVIATION * (scan - mean) / deviation, 0, None))
        self.visits = np.stack([coarser(v) for v in visits])
        self.brain, self.changed = coarser(brain.astype(np.float32)) >= 0.5, coarser(changed.astype(np.float32)) >= 0.5
        self.affine = space.affine @ np.diag([FINER, FINER, 1, 1.0])

    def bricks(self, step: tuple[int, int, int], share: float = 0.5) -> list[tuple[slice, ...]]:
        """Places of bricks of which at least `share` is brain."""
        corners = np.stack(np.meshgrid(*(
            range(0, n - b + 1, s) for n, b, s in zip(self.brain.shape, BRICK, step)
        ), indexing="ij"), -1).reshape(-1, 3)  # fmt: skip
        places = [tuple(slice(int(c), int(c) + b) for c, b in zip(corner, BRICK)) for corner in corners]
        return [place for place in places if self.brain[place].mean() >= share]


def coarser(array_dhw: np.ndarray) -> np.ndarray:
    """Means of FINER x FINER voxels in plane."""
    d, h, w = array_dhw.shape[0] // FINER, array_dhw.shape[1] // FINER, array_dhw.shape[2]
    cut = array_dhw[: d * FINER, : h * FINER]
    return cut.reshape(d, FINER, h, FINER, w).mean(axis=(1, 3))


def write_bricks(patient: Patient, places: list[tuple[slice, ...]], split: str, out: Path) -> list[dict[str, str]]:
    """Scans of both visits of every place, and their rows; a place stands as a subject."""
    rows = []
    for k, place in enumerate(places):
        for visit in (0, 1):
            affine = patient.affine.copy()
            affine[:3, 3] = (patient.affine @ [*(s.start for s in place), 1.0])[:3]
            name = f"{patient.name}-{k:03d}-{visit + 1}.nii.gz"
            volume = Volume(patient.visits[visit][place][None], affine, "MR", "arbitrary", {})
            write_volume(volume, out / name, subject=f"{patient.name}-{k:03d}")
            rows.append({"image": name, "subject": f"{patient.name}-{k:03d}", "visit": str(visit + 1),
                         "interval_years": f"{visit * patient.years:.4f}", "split": split})  # fmt: skip
    return rows


def direction(learned: Patient, judged: Patient, out: Path) -> dict[str, Any]:
    """Train on one patient, judge on the other."""
    out.mkdir(parents=True)
    places = judged.bricks(BRICK)
    rows = write_bricks(learned, learned.bricks((BRICK[0] // 2, BRICK[1] // 2, BRICK[2] // 2)), "train", out)
    rows += write_bricks(judged, places, "holdout", out)
    with (out / "volumes.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    train(parse_config(CONFIG), out / "volumes.csv", out / "run")
    model = load_model(out / "run", "cpu")
    fitted = lambda row: fit_volume(read_volume(out / row["image"]), model.config.data)  # noqa: E731
    own = [row for row in rows if row["split"] == "holdout"]
    first, second = ([fitted(row).array_cdhw[0] for row in own if row["visit"] == v] for v in "12")
    baselines = [
        Baseline(read_volume(out / row["image"]), {"interval_years": 0.0}) for row in own if row["visit"] == "1"
    ]
    made = {}
    for name, years in (("follow_up", judged.years), ("at_interval_0", 0.0)):
        drawn = sample(model, len(baselines), covariates={"interval_years": years}, baselines=baselines)
        made[name] = [fit_volume(volume, model.config.data).array_cdhw[0] for _, volume, _ in drawn]
    brain = [oriented(judged, place, judged.brain) for place in places]
    changed = [oriented(judged, place, judged.changed) for place in places]

    def r(a: list[np.ndarray], b: list[np.ndarray]) -> list[float]:
        return interval(np.array([np.corrcoef(x[m], y[m])[0, 1] for x, y, m in zip(a, b, brain)]))

    def change(a: list[np.ndarray]) -> dict[str, float]:
        less = [x - f for x, f in zip(a, first)]
        inside = np.concatenate([d[c & m] for d, c, m in zip(less, changed, brain)])
        rest = np.concatenate([d[m & ~c] for d, c, m in zip(less, changed, brain)])
        return {"mean where readers saw change": round(float(inside.mean()), 3),
                "root mean square elsewhere": round(float(np.sqrt((rest**2).mean())), 3)}  # fmt: skip

    scans = {"real second visit": second, **made}
    return {
        "learned_from": learned.name, "judged_on": judged.name, "bricks_learned": len(rows) // 2 - len(places),
        "bricks_judged": len(places), "changed_voxels": int(sum((c & m).sum() for c, m in zip(changed, brain))),
        "identity": {name: interval(matched(a, first).astype(float)) for name, a in scans.items()},
        "r_with_first": {name: r(a, first) for name, a in scans.items()},
        "r_with_second": {name: r(a, second) for name, a in {"real first visit": first, **made}.items()},
        "change": {name: change(a) for name, a in scans.items()},
    }  # fmt: skip


def oriented(patient: Patient, place: tuple[slice, ...], mask: np.ndarray) -> np.ndarray:
    """A mask of the common space as scans come out of the dataset: RAS."""
    codes = nib.orientations.io_orientation(patient.affine)
    return np.asarray(nib.orientations.apply_orientation(mask[place].astype(np.uint8), codes)) > 0


def main() -> None:
    """Both directions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    days = {row["patient_id"]: float(row["days_between_studies"])
            for row in csv.DictReader((options.data / "patient_info.csv").open())}  # fmt: skip
    names = sorted(p.name for p in (options.data / "raw").iterdir())
    patients = [Patient(options.data, name, days[str(int(name[-2:]))] / 365.25) for name in names]
    for learned, judged in (patients, patients[::-1]):
        print(
            json.dumps(direction(learned, judged, options.out / f"{learned.name}-to-{judged.name}"), indent=1),
            flush=True,
        )


if __name__ == "__main__":
    main()
