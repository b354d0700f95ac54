"""Memorisation watched while the flow trains: every so many steps a few volumes are sampled from the averaged weights and
held against training and holdout with the audit's own copy statistic, and the velocity loss of both sides is taken.

A sample is flagged where its nearest training scan is nearer, against its nearest holdout scan, than it would be for all
but a share `level` of unseen real scans (`engine.audit.copies`: pools of matched size, conformal p-values). Copying is
certain where the lower end of the 95 % interval of the flagged share lies above `level`. That in `patience` judgements in
a row ends the stage. The best step is the one with the lowest loss on the holdout among those without certain copying, or
the one that copies least where all do; its weights go into every later checkpoint as the part `best`, and that is what is
sampled. A gap between holdout and training loss grows before copies appear, and is logged beside them.

The holdout is read for this and for nothing else. It has then chosen the step, so that the loss on it is a little too
good; an audit's verdict does not rest on the loss. Source: Gu et al., "On memorization in diffusion models", TMLR 2023;
Carlini et al., USENIX Security 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import seeding
from engine.audit.copies import CopySearch, Null
from engine.audit.intervals import clopper_pearson
from engine.audit.policy import AuditPolicy
from engine.audit.pools import Pool
from engine.errors import InputError
from engine.imaging.autoencoder import Autoencoder
from engine.imaging.config import ImagingConfig, MonitorConfig
from engine.imaging.context import with_baseline
from engine.imaging.dataset import Row, Scans, condition, covariate_from_json, load_scans
from engine.imaging.denoiser import Condition
from engine.imaging.draws import FlowData
from engine.imaging.embedding import embed
from engine.imaging.flow import interpolate, velocity_target
from engine.imaging.generate import Model, as_written, latent_statistics, sample
from engine.imaging.latents import encode_within
from engine.imaging.velocity import Velocity
from engine.imaging.volume import Volume
from engine.training import checkpoint

LEAST_PEOPLE = 5  # in the holdout: below that a share of 5 % is not a number
_TIMES, _DRAWS, _LOSS_SCANS = (0.1, 0.3, 0.5, 0.7), 2, 40


@dataclass
class Watch:
    """What a judgement needs, and what earlier ones found.

    Attributes:
        search, null: the audit's copy search over training and holdout, and its null.
        train_rows, holdout_rows, holdout: the two sides.
        judged: one record per judgement; in_a_row: how many of the last ones were certain of copying.
        best: averaged weights of the best step; empty before the first judgement.
    """

    settings: MonitorConfig
    search: CopySearch
    null: Null
    train_rows: list[Row]
    holdout_rows: list[Row]
    holdout: Scans
    judged: list[dict[str, Any]] = field(default_factory=list)
    in_a_row: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    _latents: tuple[Tensor, Condition] | None = None

    def resume(self, parts: checkpoint.Parts, state: dict[str, Any]) -> None:
        """Take up what an earlier sitting had judged."""
        earlier = state.get("monitor") or {}
        self.judged, self.in_a_row = list(earlier.get("judged", [])), int(earlier.get("in_a_row", 0))
        self.best = dict(parts.get("best", {}))

    def record(self) -> dict[str, Any]:
        """JSON-ready, for the checkpoint's state."""
        return {"judged": self.judged, "in_a_row": self.in_a_row}

    def judge(
        self,
        config: ImagingConfig,
        facts: dict[str, Any],
        autoencoder: Autoencoder,
        denoiser: Velocity,
        data: FlowData,
        step: int,
    ) -> dict[str, Any]:
        """Judge the weights that `denoiser` carries now; keeps them where they are the best so far.

        Returns:
            copies (flagged share), its interval, certain, holdout_loss, train_loss, best (whether this is the best step).
        """
        training = denoiser.training, autoencoder.training
        denoiser.eval(), autoencoder.eval()
        known = tuple(covariate_from_json(c) for c in facts["covariates"])
        device = next(denoiser.parameters()).device
        model = Model(config, autoencoder, denoiser, known, facts, step, device)
        flagged, n = self._flagged(model), self.settings.samples
        low, high = clopper_pearson(flagged, n)
        if self._latents is None:
            self._latents = _encoded(model, self.holdout, self.holdout_rows)
        chosen = torch.linspace(0, len(self.train_rows) - 1, min(_LOSS_SCANS, len(self.train_rows))).long()
        mean = data.latents.standardise(data.latents.mean_g[0][0, chosen])
        record = {
            "copies": flagged / n,
            "interval": [low, high],
            "certain": low > self.settings.level,
            "holdout_loss": _loss(model, *self._latents),
            "train_loss": _loss(model, mean, _known(model, data.given_g[0].rows(chosen))),
        }
        denoiser.train(training[0]), autoencoder.train(training[1])
        self.in_a_row = self.in_a_row + 1 if record["certain"] else 0
        record["best"] = all(_rank(record) < _rank(earlier) for earlier in self.judged)
        if record["best"]:
            self.best = {name: p.detach().cpu().clone() for name, p in denoiser.named_parameters()}
        self.judged.append({"step": step, **record})
        return record

    def _flagged(self, model: Model) -> int:
        """How many of the samples the copy search flags; sampled under covariates of training people, which is where a
        model would remember one."""
        n, rows = self.settings.samples, self.train_rows
        asked = [rows[k * len(rows) // n].covariates for k in range(n)]
        made = sample(
            model, n, seed=model.config.seed, covariates=asked, steps=self.settings.steps, method="euler", guidance=1.0
        )
        pool = Pool("features", embed([volume for _, volume, _ in made]), np.array([f"sample-{k}" for k in range(n)]))
        return int((self.null.p_values(self.search.score(pool, "monitor")) <= self.settings.level).sum())


def prepare(config: ImagingConfig, table: Sequence[Row], train: Scans, cache: Path) -> Watch:
    """A watch over the people of `table`.

    Args:
        train: fitted scans of the training rows on the first grid.
        cache: folder for the fitted scans of the holdout; people's data, like the training side's.

    Raises:
        InputError: fewer than LEAST_PEOPLE people in the holdout, or one of its scans cannot be used.
    """
    if config.monitor is None:
        raise InputError("a config with a section monitor", "none", "monitor")
    sides = [[row for row in table if row.train is wanted] for wanted in (True, False)]
    people = len({row.subject for row in sides[1]})
    if people < LEAST_PEOPLE:
        raise InputError(
            f"at least {LEAST_PEOPLE} people in the holdout", str(people), "monitor",
            "a larger data.holdout_share, or no section monitor",
        )  # fmt: skip
    holdout = load_scans(sides[1], config, cache / "holdout")
    pools = [
        Pool("features", embed(_volumes(config, scans)), np.array([row.subject for row in rows], dtype=str))
        for rows, scans in zip(sides, (train, holdout))
    ]
    search = CopySearch(pools[0], pools[1], AuditPolicy(), config.seed)
    return Watch(config.monitor, search, search.null(), sides[0], sides[1], holdout)


def _rank(record: dict[str, Any]) -> tuple[bool, float, float]:
    """Smaller is better: without certain copying by the loss on the holdout, with it by the share of copies."""
    if record["certain"]:
        return True, record["copies"], record["holdout_loss"]
    return False, record["holdout_loss"], record["copies"]


def _volumes(config: ImagingConfig, scans: Scans) -> list[Volume]:
    """Scans as the sampler would write them, so that both sides of a comparison are alike."""
    return [as_written(config, x, np.eye(4)) for x in scans.x_bcdhw]


@torch.no_grad()
def _encoded(model: Model, scans: Scans, rows: Sequence[Row]) -> tuple[Tensor, Condition]:
    """Standardised posterior means and conditions of at most `_LOSS_SCANS` scans."""
    chosen = np.linspace(0, len(rows) - 1, min(_LOSS_SCANS, len(rows))).astype(int)
    means = []
    for k in chosen:
        x = torch.from_numpy(np.array(scans.x_bcdhw[k]))[None].to(model.device)
        means.append(encode_within(model.autoencoder, x, model.config.sampling.memory_gb)[0].cpu())
    mean_c, deviation_c = (each.cpu() for each in latent_statistics(model))
    given = condition([rows[k].covariates for k in chosen], scans.spacing_mm[chosen], model.covariates, "holdout")
    return (torch.cat(means) - mean_c) / deviation_c, given


def _known(model: Model, given: Condition) -> Condition:
    """Covariates of the table as the model takes them: those of an earlier visit not given."""
    if not model.config.flow.baseline:
        return given
    return with_baseline(given, given, torch.zeros(len(given.spacing_b3), dtype=torch.bool))


@torch.no_grad()
def _loss(model: Model, x0_bcdhw: Tensor, given: Condition) -> float:
    """Mean squared error of the velocity at fixed times and fixed noise, scan by scan."""
    errors = []
    t_b = torch.tensor(_TIMES, device=model.device).repeat_interleave(_DRAWS)
    noise = torch.stack(
        [
            seeding.normal(tuple(x0_bcdhw.shape[1:]), model.config.seed, "imaging.monitor", k, model.device)
            for k in range(len(t_b))
        ]
    )
    for k in range(len(x0_bcdhw)):
        x0 = x0_bcdhw[k : k + 1].to(model.device).expand(len(t_b), -1, -1, -1, -1)
        one = given.rows(torch.full((len(t_b),), k)).to(model.device)
        velocity = model.denoiser(interpolate(x0, noise, t_b), t_b, one)
        errors.append(float((velocity - velocity_target(x0, noise)).square().mean()))
    return float(np.mean(errors))
