"""Membership attacks by someone who holds the trained model: does it fit the scans it learned from better than unseen ones?

Two scores of every scan, both higher for "was in training": minus the velocity loss of the denoiser at fixed times and fixed
noise draws, averaged over several, and minus the autoencoder's reconstruction error. Times and draws are the same for every
scan, so that what they add to the loss is common to members and non-members. No shadow model is trained: the scores of unseen
people are the calibration, and `engine.audit.membership` judges both attacks by the rule it has for all.

Sources: Carlini et al., USENIX Security 2023, section 5 (loss of diffusion models); Chen et al., CCS 2020 (reconstruction).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine import seeding
from engine.audit import AuditPolicy, Finding
from engine.errors import InputError
from engine.imaging.dataset import condition, load_scans, read_table
from engine.imaging.flow import interpolate, velocity_target
from engine.imaging.generate import Model, load_model
from engine.training.log import Progress

ATTACKS = ("flow_loss", "reconstruction")
TIMES = (0.1, 0.3, 0.5, 0.7)  # nearer to noise all scans are alike
DRAWS = 4  # of noise at every time


def membership_findings(
    run: str | Path | Model,
    train: str | Path,
    holdout: str | Path,
    *,
    policy: AuditPolicy | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[list[Finding], dict[str, Any]]:
    """Findings on both attacks (area under the ROC, true-positive rates at 1 % and 0.1 %), and their ROC by name.

    Args: as `member_scores`; policy: default `AuditPolicy()`.
    """
    from engine.audit.membership import membership

    scores = member_scores(run, train, holdout, seed=seed, progress=progress)
    findings, curves = [], {}
    for name, (member_n, nonmember_m) in scores.items():
        found, curves[name] = membership(
            member_n,
            nonmember_m,
            policy=policy or AuditPolicy(),
            name=name,
            gates=len(scores),
            calibrated_on="unseen people",
            note="by the model itself",
        )
        findings += found
    return findings, curves


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
        train, holdout: tables as `engine imaging train` takes them, e.g. `train.csv` and `holdout.csv` of the run folder;
            covariates the model knows are given to it, as someone who knows the person would.
        times: of the flow, between 0 (data) and 1 (noise). draws: of noise, at every time.

    Raises:
        InputError: a table or scan cannot be used, or a person is in both tables. CorruptRun: the run cannot be loaded.
    """
    model = run if isinstance(run, Model) else load_model(run, device)
    sides = []
    for side, table in (("train", train), ("holdout", holdout)):
        # whole tables, whatever the split: it is given by there being two
        data = model.config.data.model_copy(update={"holdout_share": 0.0, "split_column": None})
        config = model.config.model_copy(update={"data": data})
        rows = read_table(table, data)
        scans = load_scans(rows, config)
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
def _scores(model: Model, x: Tensor, given: Any, times: Sequence[float], draws: int, seed: int) -> tuple[float, float]:
    """(flow_loss, reconstruction) of one volume (1, c, d, h, w); the posterior's mean stands for the latent."""
    mean, _ = model.autoencoder.encode(x)
    error = float((model.autoencoder.decode(mean) - x).abs().mean())
    shift, scale = (
        torch.tensor(model.facts[name], device=model.device).view(1, -1, 1, 1, 1)
        for name in ("latent_mean_c", "latent_deviation_c")
    )
    x0, losses = (mean - shift) / scale, []
    for k, t in enumerate(times):
        t_b = torch.full((1,), t, device=model.device)
        for draw in range(draws):
            noise = seeding.normal(tuple(x0.shape), seed, "imaging.membership", k * draws + draw, str(model.device))
            velocity = model.denoiser(interpolate(x0, noise, t_b), t_b, given)
            losses.append(float((velocity - velocity_target(x0, noise)).square().mean()))
    return -float(np.mean(losses)), -error


def _by_person(subjects: Sequence[str], score_n: NDArray[np.float64]) -> NDArray[np.float64]:
    _, code_n, count_p = np.unique(np.array(subjects), return_inverse=True, return_counts=True)
    return np.bincount(code_n, weights=score_n) / count_p
