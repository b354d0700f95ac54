"""A tiny table of scans and a tiny trained run, shared by the tests of the imaging room."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from engine import seeding
from engine.imaging.config import ImagingConfig, parse_config
from engine.imaging.volume import Volume, write_volume

TINY = {
    "data": {
        "size": [16, 16, 16],
        "covariates": {"age": {"kind": "continuous"}, "sex": {"kind": "categorical"}},
    },
    "autoencoder": {"steps": 4, "batch_size": 2, "widths": [8, 16], "latent_channels": 2, "shift_voxels": 1},
    "flow": {
        "steps": 6,
        "batch_size": 2,
        "widths": [8, 16],
        "attention_levels": [1],
        "embedding_width": 16,
        "views": 2,
        "warmup_steps": 1,
        "learning_rate": 0.01,
    },
    "sampling": {"steps": 2},
    "training": {"precision": "fp32", "log_every_steps": 2},
}


def head(number: int, size: int = 16, spacing: float = 2.0, centre: float = 5.0) -> Volume:
    """A bright box in noise; its length follows `number`, so that volumes differ."""
    draw = seeding.generator(7, "tests.heads", number)
    array = 4.0 * draw.random((1, size, size, size), dtype=np.float32)
    array[0, 4:12, 4:12, 3 + number % 4 : 12] += 80.0 + 5.0 * (number % 5)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = centre - spacing * (size - 1) / 2
    return Volume(array, affine, "MR", "arbitrary", {})


@pytest.fixture(scope="session")
def table(tmp_path_factory) -> Path:
    """Twelve scans of six people, with an age missing and a sex missing."""
    folder = tmp_path_factory.mktemp("table")
    with (folder / "volumes.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "subject", "visit", "age", "sex"])
        for k in range(12):
            write_volume(head(k), folder / f"scan{k}.nii.gz")
            age, sex = ("" if k == 3 else 20 + k), ("" if k == 5 else "MF"[k % 2])
            writer.writerow([f"scan{k}.nii.gz", f"P{k // 2}", k % 2, age, sex])
    return folder / "volumes.csv"


@pytest.fixture(scope="session")
def tiny_config() -> ImagingConfig:
    """The config of `tiny_run`."""
    return parse_config(TINY)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, table, tiny_config) -> Path:
    """A run folder trained for a few steps."""
    from engine.imaging.train import train

    out = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_config, table, out)
    return out
