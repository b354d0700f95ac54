"""What a scan is conditioned on besides covariates: a label map, and an earlier scan of the same person.

Both are further channels on the latent's grid, each with a channel that says whether it is given, so that a model trained
with them can be asked without. Of an earlier scan the covariates at its time are conditions too, under their names with
`baseline_` before them. In training any other scan of the person is the earlier one (also a later one: the covariates of
both times tell which way time runs), and of a person with one scan that scan itself, which teaches that nothing changes
where no covariate does.

It leaves to others: drawing (`draws`), encoding (`latents`, `generate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.imaging.config import BASELINE, ImagingConfig
from engine.imaging.dataset import Covariate, Row
from engine.imaging.denoiser import Condition


def known_covariates(config: ImagingConfig, learned: Sequence[Covariate]) -> list[Covariate]:
    """What the denoiser is conditioned on: the table's covariates, and those of an earlier visit where it knows one."""
    if not config.flow.baseline:
        return list(learned)
    return [*learned, *(replace(c, name=BASELINE + c.name) for c in learned)]


def other_scans(rows: Sequence[Row]) -> list[list[int]]:
    """For every row the other rows of its person, or the row itself where there is no other."""
    by_person: dict[str, list[int]] = {}
    for k, row in enumerate(rows):
        by_person.setdefault(row.subject, []).append(k)
    return [[j for j in by_person[row.subject] if j != k] or [k] for k, row in enumerate(rows)]


def with_baseline(now: Condition, earlier: Condition, given_b: Tensor) -> Condition:
    """Covariates of both times in the order of `known_covariates`; those of the earlier time only where `given_b`."""
    drop = (~given_b)[:, None]
    earlier = earlier.dropped(drop.expand_as(earlier.continuous_bk), drop.expand_as(earlier.categorical_bk))
    return replace(
        now,
        continuous_bk=torch.cat([now.continuous_bk, earlier.continuous_bk], dim=1),
        categorical_bk=torch.cat([now.categorical_bk, earlier.categorical_bk], dim=1),
    )


def flagged(x_bcdhw: Tensor, given_b: Tensor) -> Tensor:
    """`x_bcdhw` and a channel of ones where it is given; zeros in all channels where it is not."""
    given = given_b.to(x_bcdhw).view(-1, 1, 1, 1, 1)
    return torch.cat([x_bcdhw * given, given.expand_as(x_bcdhw[:, :1])], dim=1)


def joined(
    config: ImagingConfig, map_bcdhw: Tensor | None, earlier_bcdhw: Tensor | None, like_bcdhw: Tensor
) -> Tensor | None:
    """Context channels in the model's order, map before earlier scan; what is None is not given.

    Args:
        map_bcdhw: `labels.map_context`. earlier_bcdhw: `flagged` latent. like_bcdhw: a latent of the wanted size.
    """
    parts = []
    for wanted, channels in ((map_bcdhw, config.map_channels), (earlier_bcdhw, config.baseline_channels)):
        if channels:
            shape = (len(like_bcdhw), channels, *like_bcdhw.shape[2:])
            parts.append(like_bcdhw.new_zeros(shape) if wanted is None else wanted.to(like_bcdhw))
    return torch.cat(parts, dim=1) if parts else None
