"""Membership attacks by someone who holds the trained model: does it fit the scans it learned from better than unseen ones?

Two scores of every scan, both higher for "was in training": minus the velocity loss of the denoiser at fixed times and fixed
noise draws, averaged over several, and minus the autoencoder's reconstruction error. Times and draws are the same for every
scan, so that what they add to the loss is common to members and non-members. No shadow model is trained: the scores of unseen
people are the calibration, and `engine.audit.membership` judges both attacks by the rule it has for all.

Sources: Carlini et al., USENIX Security 2023, section 5 (loss of diffusion models); Chen et al., CCS 2020 (reconstruction).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine import seeding
from engine.errors import InputError
from engine.imaging.config import DataConfig
from engine.imaging.dataset import Row, condition, load_scans, read_table
from engine.imaging.denoiser import Condition
from engine.imaging.flow import interpolate, velocity_target
from engine.imaging.generate import Model, load_model
from engine.training.log import Progress

ATTACKS = ("flow_loss", "reconstruction")
TIMES = (0.1, 0.3, 0.5, 0.7)  # nearer to noise all scans are alike
DRAWS = 4  # of noise at every time


def member_scores(
    run: str | Path | Model,
    train: str | Path,
    holdout: str | Path,
    *,
    times: Sequence[float] = TIMES,
    draws: int = DRAWS,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """{"flow_loss": (training people, holdout people), "reconstruction": likewise}: one score per person, the mean over the
    person's scans, higher is more member-like; people in the order of their ids.

    Args:
        run: run folder, or a model from `load_model`.
        train, holdout: tables or folders of scans, e.g. `train.csv` and `holdout.csv` of the run folder; covariates that a
            table has and the model knows are given to it, as someone who knows the person would.
        times: of the flow, between 0 (data) and 1 (noise). draws: of noise, at every time.

    Raises:
        InputError: a table or scan cannot be used, or a person is in both tables. CorruptRun: the run cannot be loaded.
    """
    model = run if isinstance(run, Model) else load_model(run, device)
    sides = []
    for side, table in (("train", train), ("holdout", holdout)):
        rows = _rows(Path(table), model.config.data)
        scans = load_scans(rows, model.config)
        given = condition([row.covariates for row in rows], scans.spacing_mm, model.covariates, table).to(model.device)
        scores = []
        for k, x_cdhw in enumerate(scans.x_bcdhw):
            x = torch.from_numpy(np.array(x_cdhw))[None].to(model.device)
            one = given.rows(torch.tensor([k], device=model.device))
            scores.append(_scores(model, x, one, times, draws, seed))
            if progress is not None:
                progress(f"membership, {side}", k + 1, len(rows))
        sides.append(([row.subject for row in rows], np.array(scores)))
    both = {*sides[0][0]} & {*sides[1][0]}
    if both:
        raise InputError("different people in train and holdout", f"{len(both)} in both", "membership")
    return {
        name: (_by_person(sides[0][0], sides[0][1][:, k]), _by_person(sides[1][0], sides[1][1][:, k]))
        for k, name in enumerate(ATTACKS)
    }


@torch.no_grad()
def _scores(
    model: Model, x: Tensor, given: Condition, times: Sequence[float], draws: int, seed: int
) -> tuple[float, float]:
    """(flow_loss, reconstruction) of one volume (1, c, d, h, w); the posterior's mean stands for the latent."""
    mean, _ = model.autoencoder.encode(x)
    error = float((model.autoencoder.decode(mean) - x).abs().mean())
    shift, scale = (
        torch.tensor(model.facts[name], device=model.device).view(1, -1, 1, 1, 1)
        for name in ("latent_mean_c", "latent_deviation_c")
    )
    x0 = (mean - shift) / scale
    shape = tuple(x0.shape[1:])
    noise = torch.stack(
        [seeding.normal(shape, seed, "imaging.membership", k, model.device) for k in range(len(times) * draws)]
    )
    t_b = torch.tensor(list(times), device=model.device).repeat_interleave(draws)
    velocity = model.denoiser(interpolate(x0, noise, t_b), t_b, given.rows(torch.zeros_like(t_b, dtype=torch.int64)))
    return -float((velocity - velocity_target(x0, noise)).square().mean()), -error


def _rows(path: Path, data: DataConfig) -> list[Row]:
    """Every scan of a table or folder; covariates that a table lacks are not given."""
    table = path / "volumes.csv" if path.is_dir() else path
    if path.is_dir() and not table.is_file():
        images = sorted(p for p in path.rglob("*") if p.name.endswith((".nii", ".nii.gz")) and p.is_file())
        if not images:
            raise InputError("NIfTI volumes or a volumes.csv", "neither", path)
        return [Row(k, image, None, image.name, "", {}, True) for k, image in enumerate(images, start=1)]
    known = data.covariates
    if table.is_file():
        with table.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
            header = next(csv.reader(stream), [])
        known = {name: covariate for name, covariate in known.items() if name in header}
    # all of it, whatever the split: that is given by there being two tables
    return read_table(table, data.model_copy(update={"holdout_share": 0.0, "split_column": None, "covariates": known}))


def _by_person(subjects: Sequence[str], score_n: NDArray[np.float64]) -> NDArray[np.float64]:
    _, code_n, count_p = np.unique(np.array(subjects), return_inverse=True, return_counts=True)
    return np.bincount(code_n, weights=score_n) / count_p
