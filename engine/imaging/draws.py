"""What training draws for a batch of the flow: every draw is named by the position of its sample in the stream, so that a
resumed run, or one on another number of processes, draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine import seeding
from engine.imaging.config import ImagingConfig
from engine.imaging.context import flagged, joined, other_scans, with_baseline
from engine.imaging.dataset import Covariate, Row, Scans, condition
from engine.imaging.denoiser import Condition
from engine.imaging.flow import training_times
from engine.imaging.labels import map_context
from engine.imaging.latents import Latents, view_move

FlowBatch = tuple[Tensor, Tensor, Tensor, Condition]


@dataclass(frozen=True)
class FlowData:
    """The training side as the flow sees it.

    Attributes:
        latents: of every scan on every grid. given_g: the table's covariates and the spacing, per grid.
        codes_g: label maps (b, d, h, w) per grid, where they are a condition. spacing_g: (b, 3) mm, per grid.
        others: rows of the same person, where an earlier scan is a condition.
        drop_k: probability of training without a covariate, continuous ones first.
    """

    latents: Latents
    given_g: list[Condition]
    codes_g: list[np.ndarray]
    spacing_g: list[np.ndarray]
    others: list[list[int]]
    drop_k: np.ndarray


def flow_data(
    config: ImagingConfig, rows: Sequence[Row], scans_g: Sequence[Scans], latents: Latents, known: Sequence[Covariate]
) -> FlowData:
    """Everything but the latents is small and lies in memory; `known` are the table's covariates."""
    covariates = [row.covariates for row in rows]
    ordered = [c for kind in ("continuous", "categorical") for c in known if c.kind == kind]
    declared = [config.data.covariates[c.name].drop for c in ordered]
    return FlowData(
        latents,
        [condition(covariates, scans.spacing_mm, known) for scans in scans_g],
        [scans.codes_bdhw for scans in scans_g if scans.codes_bdhw is not None] if config.flow.label_map else [],
        [scans.spacing_mm for scans in scans_g],
        other_scans(rows) if config.flow.baseline else [],
        np.array([config.flow.condition_drop if p is None else p for p in declared]),
    )


def flow_batch(
    config: ImagingConfig, data: FlowData, grid: int, positions: Sequence[int], indices: Sequence[int]
) -> FlowBatch:
    """Standardised latents redrawn from their posteriors, noise, times and conditions of the samples at `positions`.

    All covariates are dropped together with probability `condition_drop` (what guidance needs), and in the rest each one
    by itself with its own probability (what a user who gives only some of them needs). Label map and earlier scan are
    each left out with probability `condition_drop`. The covariates of both times are blurred alike: their difference is
    the interval.
    """
    mean, deviation = data.latents.mean_g[grid], data.latents.deviation_g[grid]
    given, flow, shape = data.given_g[grid], config.flow, mean.shape[2:]
    split, covariates = given.continuous_bk.shape[1], len(data.drop_k)
    x0, noise, normal, drops, blurs, maps, pairs = [], [], [], [], [], [], []
    for position, index in zip(positions, indices):
        draw = seeding.generator(config.seed, "imaging.flow", position)
        view = int(draw.integers(len(mean)))
        redrawn = torch.from_numpy(draw.standard_normal(shape, dtype=np.float32))
        noise.append(torch.from_numpy(draw.standard_normal(shape, dtype=np.float32)))
        normal.append(draw.standard_normal())
        everything = draw.random() < flow.condition_drop
        drops.append(torch.from_numpy(draw.random(covariates) < data.drop_k) | bool(everything))
        blurs.append(torch.from_numpy(draw.standard_normal(split, dtype=np.float32)))
        if data.others:
            other = data.others[index][int(draw.integers(len(data.others[index])))]
            again = torch.from_numpy(draw.standard_normal(shape, dtype=np.float32))
            known = draw.random() >= flow.condition_drop
            view = 0 if known else view  # moved copies of two scans would not lie on each other
            pairs.append((other, mean[0, other] + deviation[0, other] * again, known, draw.random(covariates)))
        if data.codes_g:
            labels, spacing = len(config.data.labels), data.spacing_g[grid][index]
            code = torch.from_numpy(view_move(config, index, view).of_codes(data.codes_g[grid][index], spacing, labels))
            one = map_context(code[None], labels, config.autoencoder.factor, config.map_fold)
            maps.append(one * float(draw.random() >= flow.condition_drop))
        x0.append(mean[view, index] + deviation[view, index] * redrawn)
    t_b = training_times(torch.tensor(normal, dtype=torch.float32), flow.time_shift)
    drop, blur = torch.stack(drops), flow.condition_noise * torch.stack(blurs)
    standardised = data.latents.standardise(torch.stack(x0))
    wanted = given.rows(torch.tensor(indices)).blurred(blur).dropped(drop[:, :split], drop[:, split:])
    earlier = None
    if pairs:
        known_b = torch.tensor([known for _, _, known, _ in pairs])
        then = given.rows(torch.tensor([other for other, _, _, _ in pairs])).blurred(blur)
        lost = torch.from_numpy(np.stack([uniform for *_, uniform in pairs]) < data.drop_k)
        wanted = with_baseline(wanted, then.dropped(lost[:, :split], lost[:, split:]), known_b)
        earlier = flagged(data.latents.standardise(torch.stack([latent for _, latent, _, _ in pairs])), known_b)
    context = joined(config, torch.cat(maps) if maps else None, earlier, standardised)
    return standardised, torch.stack(noise), t_b, wanted.within(context)
