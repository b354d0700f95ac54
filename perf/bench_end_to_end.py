"""Whole stages through the Python API: genotypes sampled into files, training steps, scans sampled.

These cost what a user waits for, files and checks included, and have no peer; they show when a stage has become slower.
All on one thread. Scans: the demo's networks on eight small volumes; steps are timed from the end of the first, so that
set-up and checkpoints do not count.
"""

from __future__ import annotations

import csv
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine import seeding
from perf.case import Case, Timed

_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "cohort" / "heads.yaml"
_PANEL_PEOPLE, _PEOPLE, _SITES = 400, 200, 10_000
_SCANS, _SAMPLED = 8, 1
_ONE_VISIT = "flow.baseline=false"  # nobody here has a second one
_STEPS = {"autoencoder": 3, "flow": 3}


def cases() -> list[Case]:
    size = {"people": _PEOPLE, "sites": _SITES, "panel_haplotypes": 2 * _PANEL_PEOPLE}
    found = [
        Case(
            f"end_to_end.sample_{kind}",
            size,
            float(_PEOPLE * _SITES),
            "genotypes",
            _fitted_run,
            _sample_genotypes(kind),
        )
        for kind in ("bcf", "pgen")
    ]
    for stage, steps in _STEPS.items():
        # the other stage takes one step
        most = {f"{name}.steps": steps if name == stage else 1 for name in _STEPS}
        size = {"scans": _SCANS}
        found.append(Case(f"end_to_end.train_{stage}", size, float(steps - 1), "steps", _scans, _train(stage, most)))
    return [
        *found,
        Case("end_to_end.sample_scans", {"scans": _SAMPLED}, _SAMPLED, "scans", _trained_run, _sample_scans),
    ]


def _fitted_run() -> Path:
    """Run folder of the copying model of a mosaic panel: every haplotype copies 40 random founders in stretches."""
    from engine.genomics import li_stephens
    from engine.genomics.panel import panel_from_alleles

    draw = seeding.generator(0, "perf.panel")
    n, sites = 2 * _PANEL_PEOPLE, np.arange(_SITES)
    founders_kl = draw.random((40, _SITES)) < draw.beta(0.3, 1.0, _SITES)
    switch_nl = draw.random((n, _SITES)) < 0.002
    switch_nl[:, 0] = True
    last_nl = np.maximum.accumulate(np.where(switch_nl, sites, 0), axis=1)
    copied_nl = np.take_along_axis(draw.integers(0, 40, (n, _SITES)), last_nl, axis=1)
    alleles_ln = np.ascontiguousarray(np.take_along_axis(founders_kl, copied_nl, axis=0).T).astype(np.uint8)
    panel = panel_from_alleles(
        alleles_ln, 1 + 500 * sites, "1", [f"P{k}" for k in range(_PANEL_PEOPLE)], contig_length={"1": 500 * _SITES},
        position_cm=sites * 5e-4,
    )  # fmt: skip
    run = Path(tempfile.mkdtemp(dir=".")) / "run"
    li_stephens.fit(panel).save(run)
    return run


def _sample_genotypes(kind: str) -> Callable[[Path], dict[str, Any]]:
    def run(folder: Path) -> dict[str, Any]:
        from engine.genomics.commands import sample_command

        return sample_command(folder, _PEOPLE, out=Path(tempfile.mkdtemp(dir=".")) / f"synthetic.{kind}", seed=1)

    return run


def _scans() -> Path:
    """Table of _SCANS noisy blobs with the demo's covariates."""
    from engine.imaging.volume import Volume, write_volume

    folder = Path(tempfile.mkdtemp(dir="."))
    affine = np.diag([5.0, 5.0, 5.0, 1.0])
    grid = np.indices((32, 40, 32)) - np.array([16, 20, 16]).reshape(3, 1, 1, 1)
    with (folder / "volumes.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["image", "subject", "visit", "age", "sex", "group", "diagnosis", "interval_years", "split"])
        for k in range(_SCANS):
            draw = seeding.generator(0, "perf.scans", k)
            blob = 100.0 * (np.square(grid).sum(axis=0) < (11 + draw.integers(0, 4)) ** 2)
            array = (blob + 5.0 * draw.standard_normal(blob.shape))[None].astype(np.float32)
            write_volume(Volume(array, affine, "MR", "arbitrary", {}), folder / f"scan{k}.nii.gz")
            table.writerow(
                [
                    f"scan{k}.nii.gz",
                    f"P{k}",
                    0,
                    50 + 3 * k,
                    "MF"[k % 2],
                    "AB"[k // 4],
                    ["CN", "AD"][k % 2],
                    0,
                    "train",
                ]
            )
    return folder / "volumes.csv"


def _train(stage: str, steps: dict[str, int]) -> Callable[[Path], Timed]:
    def run(table: Path) -> Timed:
        from engine.imaging.commands import train_command

        out = Path(tempfile.mkdtemp(dir=".")) / "run"
        # the adversary takes part from the first step, so that every step of a stage costs the same
        overrides = [
            *(f"{name}={value}" for name, value in steps.items()),
            _ONE_VISIT,
            "autoencoder.adversarial_start=0",
        ]
        after_step: list[float] = []

        def progress(what: str, done: int, total: int) -> None:
            if what == stage:
                after_step.append(time.process_time())

        train_command(_CONFIG, table, out, overrides=overrides, progress=progress)
        return Timed(after_step[-1] - after_step[0], note="from the end of the first step to the end of the last")

    return run


def _trained_run() -> Path:
    from engine.imaging.commands import train_command

    out = Path(tempfile.mkdtemp(dir=".")) / "run"
    train_command(_CONFIG, _scans(), out, overrides=["autoencoder.steps=1", "flow.steps=1", _ONE_VISIT])
    return out


def _sample_scans(run: Path) -> dict[str, Any]:
    from engine.imaging.commands import sample_command

    return sample_command(run, _SAMPLED, Path(tempfile.mkdtemp(dir=".")) / "out", seed=1)
