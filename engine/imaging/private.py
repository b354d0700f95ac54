"""Differentially private fine-tuning: a run trained on public data learns from people who must be protected, by DP-SGD over
its covariate embedding or over low-rank additions to its linear layers, and says what epsilon that cost.

The protected unit is a person: in every step each person is drawn independently (Poisson sampling) and gives one gradient,
of one of that person's scans, cut to `clipping_norm`; the sum gets Gaussian noise and is divided by the expected, not the
drawn, number of people. Gradients of single people come from `torch.func` (Opacus' own hooks give gradients of rows, not of
people); epsilon comes from Opacus' PRV accountant.

Nothing else of the private people may reach the model. Everything that a plain run learns besides weights (latent
statistics, levels and ranges of covariates, geometry) is the base's; no loss is logged; and what would break the promise is
refused with one line (`check_sound`). Noise and draws come from the system's entropy and are kept nowhere: whoever knew the
seed could subtract them. So this is the one part of the engine in which two runs differ and a resumed run is not the
uninterrupted one.

Sources: Abadi et al., CCS 2016 (DP-SGD); Gopi et al., NeurIPS 2021 (PRV accountant); Dockhorn et al., TMLR 2023 (several noise
draws per person before clipping); Hu et al., ICLR 2022 (low-rank adapters).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from engine import provenance, seeding
from engine.errors import CorruptRun, InputError, Unsupported, UsageError
from engine.imaging.config import ImagingConfig, PrivacyConfig
from engine.imaging.dataset import Row, condition, load_scans, read_table
from engine.imaging.denoiser import Condition
from engine.imaging.flow import interpolate, training_times, velocity_target
from engine.imaging.generate import Model, load_model
from engine.imaging.velocity import Velocity
from engine.training import checkpoint, preemption
from engine.training.ema import Ema
from engine.training.lock import RunLock
from engine.training.log import Log, Progress

ADAPTED = ("modulate", "qkv", "out")  # linear layers of the denoiser's blocks and attention
CONDITION = ("embed.categorical.", "embed.continuous.", "embed.continuous_missing.")
_CHUNK = 8  # people whose gradients are computed at once
History = list[tuple[float, float, int]]
"""(noise multiplier, sampling rate, steps), as Opacus' accountants keep it."""


def train_private(
    config: ImagingConfig, data_csv: str | Path, out: str | Path, resume: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Fine-tune `config.privacy.base` on the table `data_csv` and leave a run folder at `out`, to be sampled like any other.

    Returns a JSON-ready summary with the entry "privacy".

    Raises:
        UsageError, InputError, Unsupported, CorruptRun: one line; see `check_sound`, and as `engine.imaging.train.train`.
        preemption.Preempted: SIGUSR1 or SIGTERM came; a checkpoint was written; exit code 85.
    """
    from engine.imaging.train import open_run

    rules, out = config.privacy, Path(out)
    if rules is None:
        raise UsageError("a config with a section privacy", "none", "private training")
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise Unsupported(
            "one process", str(accelerator.num_processes), "private training", "fewer processes: noise is drawn once"
        )
    base = load_model(rules.base, str(accelerator.device.type))
    rows = [row for row in read_table(data_csv, config.data) if row.train]
    people = by_person(rows)
    check_sound(config, base, rows, Path(rules.base))
    rate = rules.people_per_step / len(people)
    sigma = noise_multiplier(rules, rate)
    config = config.model_copy(update={"training": config.training.model_copy(update={"precision": "fp32"})})
    scans = load_scans(
        rows, config
    )  # read and refused before there is a folder, and not cached: nothing of theirs is kept
    given = condition([r.covariates for r in rows], scans.spacing_mm, base.covariates, data_csv).to(base.device)
    mean_bcdhw, deviation_bcdhw = _encode(base, scans.x_bcdhw)
    open_run(out, config, resume)
    log = Log(out / "log.jsonl", progress=progress)
    with preemption.watch() as flag, RunLock(out):
        learned = Learned(base.denoiser, rules, config.seed)
        optimizer = torch.optim.Adam(learned.tensors.parameters(), lr=rules.learning_rate, betas=(0.9, 0.99))
        average = Ema(learned.tensors, config.flow.ema_decay)
        history: History = []
        if resume and checkpoint.steps(out):
            history = _restore(out, learned, optimizer, average)
        step, secret = _steps(history), np.random.default_rng()  # of the system's entropy
        log.event("start", people=len(people), scans=len(rows), noise_multiplier=sigma, sample_rate=rate, step=step)

        def save(done: bool) -> dict[str, Any]:
            tensors, groups = checkpoint.optimizer_parts(optimizer)
            record = privacy_record(rules, history, len(people), len(rows), base)
            facts = {**base.facts, "privacy": record, "stages": {**base.facts["stages"], "private": {"steps": step}}}
            checkpoint.save(
                out,
                step,
                {
                    "autoencoder": base.autoencoder.state_dict(),
                    "denoiser": learned.whole(list(learned.tensors.parameters())),
                    "ema": learned.whole(average.average.shadow_params),
                    "learned": dict(learned.tensors.named_parameters()),
                    "average": average.tensors(),
                    "optimizer": tensors,
                },
                {
                    "stage": "private",
                    "done": done,
                    "model": facts,
                    "optimizer": groups,
                    "ema_steps": average.steps,
                    "accountant": [list(entry) for entry in history],
                },
                keep=config.training.keep_checkpoints,
            )
            return record

        saved = time.monotonic()
        while step < rules.steps:
            every, minutes = config.training.checkpoint_every_steps, config.training.checkpoint_every_minutes
            due = bool(every) and step > 0 and step % (every or 1) == 0
            if flag or due or (minutes is not None and time.monotonic() - saved > 60 * minutes):
                save(False)
                saved = time.monotonic()
            if flag:
                log.event("preempted", signal=flag.signal, step=step)
                raise preemption.Preempted(f"stopped at step {step}", hint="the same command with --resume")
            chosen = [scan_of(people[k], secret) for k in np.flatnonzero(secret.random(len(people)) < rate)]
            theirs = given.rows(torch.tensor(chosen, dtype=torch.int64, device=base.device))
            latents = mean_bcdhw[chosen], deviation_bcdhw[chosen]
            gradients = learned.gradients(*latents, theirs, config, secret)
            update = noisy_sum(gradients, rules.clipping_norm, sigma, secret)
            for parameter, gradient in zip(learned.tensors.parameters(), update, strict=True):
                parameter.grad = gradient / rules.people_per_step
            optimizer.step()
            average.update(learned.tensors)
            history, step = account(history, sigma, rate), step + 1
            log.bar("private", step / rules.steps)
            if step % config.training.log_every_steps == 0:
                log.event("private", step=step, noise_multiplier=sigma)
        record = save(True)
        shown = config.model_dump(mode="json")
        shown["privacy"]["base"] = Path(rules.base).name
        provenance.write(
            out,
            "imaging train",
            config=shown,
            inputs={Path(data_csv).name: data_csv, **{f"row {r.number}": r.image for r in rows}},
            seed=config.seed,
            extra={"privacy": record},
        )
        log.event("done", **{k: record[k] for k in ("epsilon", "delta", "noise_multiplier", "steps")})
    return {"run": out.name, "scans": len(rows), "people": len(people), "privacy": record, "processes": 1}


# --- the mechanism ----------------------------------------------------------------------------------------------------


def noisy_sum(
    gradients: Sequence[Tensor], clipping_norm: float, sigma: float, secret: np.random.Generator
) -> list[Tensor]:
    """Sum over people of gradients cut to `clipping_norm`, plus Gaussian noise of deviation sigma * clipping_norm.

    Args:
        gradients: per tensor, (people, ...); a person's length is taken over all tensors together. One that is not finite
            counts as none. No person at all gives noise alone.

    Source: Abadi et al. 2016, algorithm 1.
    """
    count = len(gradients[0])
    squares = sum((g.double().flatten(1).square().sum(dim=1) for g in gradients), torch.zeros(count).double())
    norm = torch.as_tensor(squares).sqrt()
    factor = torch.where(
        norm.isfinite(), (clipping_norm / norm.clamp(min=1e-30)).clamp(max=1.0), torch.zeros_like(norm)
    )
    made = []
    for g in gradients:
        scaled = g.double().nan_to_num(0.0, 0.0, 0.0) * factor.view(-1, *[1] * (g.ndim - 1))
        noise = torch.from_numpy(secret.standard_normal(tuple(g.shape[1:]))).to(g.device)
        made.append((scaled.sum(dim=0) + sigma * clipping_norm * noise).to(g.dtype))
    return made


class Learned:
    """The tensors that learn, and how they enter the denoiser, whose own weights stay as they are.

    tensors: trainable. Adapters of a weight W (out, in) are `down` (rank, in), drawn from the seed, and `up` (out, rank),
    zero, and W + up @ down is used; of the condition the parameters themselves.
    """

    def __init__(self, denoiser: Velocity, rules: PrivacyConfig, seed: int) -> None:
        self.denoiser, self.part = denoiser.requires_grad_(False), rules.part
        self.fixed = {name: p.detach() for name, p in denoiser.named_parameters()}
        started: list[Tensor] = []
        if rules.part == "condition":
            self.names = [name for name in self.fixed if name.startswith(CONDITION)]
            started = [self.fixed[name].clone() for name in self.names]
        else:
            linear = {f"{n}.weight" for n, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
            self.names = [n for n in self.fixed if n in linear and n.split(".")[-2] in ADAPTED]
            for k, name in enumerate(self.names):
                outputs, inputs = self.fixed[name].shape
                down = seeding.normal((rules.rank, inputs), seed, "imaging.private.adapters", k) / inputs**0.5
                started += [down, torch.zeros(outputs, rules.rank)]
        device = next(iter(self.fixed.values())).device
        self.tensors = nn.ParameterList(nn.Parameter(t.to(device)) for t in started)

    def whole(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """All parameters of the denoiser with `tensors` in effect."""
        if self.part == "condition":
            return {**self.fixed, **dict(zip(self.names, tensors, strict=True))}
        pairs = zip(self.names, tensors[0::2], tensors[1::2], strict=True)
        return {**self.fixed, **{name: self.fixed[name] + up @ down for name, down, up in pairs}}

    def loss(self, tensors: Sequence[Tensor], x0: Tensor, noise: Tensor, t: Tensor, *given: Tensor) -> Tensor:
        """Velocity loss of one person, averaged over the draws (k, c, d, h, w)."""
        wanted = Condition(*(g.expand(len(t), -1) for g in given))
        velocity = functional_call(self.denoiser, self.whole(tensors), (interpolate(x0, noise, t), t, wanted))
        return (velocity - velocity_target(x0, noise)).square().mean()

    def gradients(
        self,
        mean_bcdhw: Tensor,
        deviation_bcdhw: Tensor,
        given: Condition,
        config: ImagingConfig,
        secret: np.random.Generator,
    ) -> list[Tensor]:
        """Gradient of every person drawn, per tensor (people, ...), unclipped."""
        people, device = len(mean_bcdhw), mean_bcdhw.device
        if people == 0:
            return [p.new_zeros(0, *p.shape) for p in self.tensors.parameters()]
        rules = config.privacy
        assert rules is not None
        shape = (people, rules.draws, *mean_bcdhw.shape[1:])

        def normal(size: tuple[int, ...]) -> Tensor:
            return torch.from_numpy(secret.standard_normal(size, dtype=np.float32)).to(device)

        x0 = mean_bcdhw[:, None] + deviation_bcdhw[:, None] * normal(shape)
        t = training_times(normal((people, rules.draws)), config.flow.time_shift)
        dropped = torch.from_numpy(secret.random((people, 1)) < config.flow.condition_drop).to(device)
        continuous = given.continuous_bk + config.flow.condition_noise * normal(tuple(given.continuous_bk.shape))
        wanted = Condition(given.spacing_b3, continuous, given.categorical_bk)
        wanted = wanted.dropped(dropped.expand_as(continuous), dropped.expand_as(given.categorical_bk))
        return self.per_person(x0, normal(shape), t, wanted)

    def per_person(self, x0_pkcdhw: Tensor, noise_pkcdhw: Tensor, t_pk: Tensor, given: Condition) -> list[Tensor]:
        """Gradient of `loss` for each of the p people, with k draws each: per tensor (p, ...)."""
        single = vmap(grad(self.loss), in_dims=(None, 0, 0, 0, 0, 0, 0), chunk_size=_CHUNK)
        tensors = [p.detach() for p in self.tensors.parameters()]
        covariates = given.spacing_b3, given.continuous_bk, given.categorical_bk
        return list(single(tensors, x0_pkcdhw, noise_pkcdhw, t_pk, *covariates))


def by_person(rows: Sequence[Row]) -> list[list[int]]:
    """Positions of the scans of every person."""
    people: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        people.setdefault(row.subject, []).append(position)
    return list(people.values())


def scan_of(positions: Sequence[int], secret: np.random.Generator) -> int:
    """One of a person's scans: however many there are, a person gives one gradient."""
    return int(positions[int(secret.integers(len(positions)))])


# --- the account ------------------------------------------------------------------------------------------------------


def account(history: History, sigma: float, rate: float) -> History:
    """The history with one step more."""
    if history and history[-1][:2] == (sigma, rate):
        return [*history[:-1], (sigma, rate, history[-1][2] + 1)]
    return [*history, (sigma, rate, 1)]


def epsilon(history: History, delta: float) -> float:
    """Epsilon spent at `delta` (an upper bound): Poisson-subsampled Gaussians composed by Opacus' PRV accountant, neighbours
    differing by one person added or removed. 0 before the first step."""
    if not history:
        return 0.0
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(history)
    return max(0.0, float(accountant.get_epsilon(delta)))


def noise_multiplier(rules: PrivacyConfig, rate: float) -> float:
    """The configured noise, or the least that keeps the budget over all steps (to 0.01 of epsilon).

    Raises:
        UsageError: no noise meets the budget.
    """
    if rules.noise_multiplier is not None:
        return rules.noise_multiplier
    from opacus.accountants.utils import get_noise_multiplier

    try:
        return float(
            get_noise_multiplier(
                target_epsilon=rules.epsilon or 0.0,
                target_delta=rules.delta,
                sample_rate=rate,
                steps=rules.steps,
                accountant="prv",
            )
        )
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"a noise that meets epsilon {rules.epsilon}", str(error), "privacy", "a larger epsilon, or fewer steps"
        ) from None


def privacy_record(rules: PrivacyConfig, history: History, people: int, scans: int, base: Model) -> dict[str, Any]:
    """What the provenance says of the guarantee and of its limits; JSON-ready."""
    return {
        "epsilon": math.ceil(1e4 * epsilon(history, rules.delta)) / 1e4,  # a bound: rounded up
        "delta": rules.delta,
        "noise_multiplier": history[-1][0] if history else None,
        "clipping_norm": rules.clipping_norm,
        "sample_rate": history[-1][1] if history else None,
        "steps": _steps(history),
        "sampling": "poisson",
        "unit": "person",
        "neighbours": "one person added or removed",
        "accountant": "opacus PRV",
        "people": people,
        "scans": scans,
        "part": rules.part,
        "rank": rules.rank if rules.part == "adapters" else None,
        "base": {"name": Path(rules.base).name, "step": base.step},
        "not_covered": [
            "the number of people and of steps",
            "choices made by looking at the private data, such as hyperparameters or the best of several runs",
            "this run folder itself: its tables and provenance are of the people it protects",
            "floating-point attacks on the noise",
        ],
    }


def _steps(history: History) -> int:
    return sum(steps for _, _, steps in history)


# --- what is refused --------------------------------------------------------------------------------------------------


def check_sound(config: ImagingConfig, base: Model, rows: Sequence[Row], folder: Path) -> None:
    """Refuse what the accountant's epsilon would not describe.

    Raises:
        UsageError, InputError or Unsupported, one line: sampling that is not Poisson's; several scans of a person counted as
            so many people; delta of 1 / people or more; a base that is private itself, of other sections, or that cannot show
            it saw none of these scans, or saw one; statistics over a batch; bf16; nothing to fine-tune; more people per step
            than there are.
    """
    rules = config.privacy
    assert rules is not None
    people = len({row.subject for row in rows})
    if rules.sampling != "poisson":
        raise UsageError(
            "privacy.sampling poisson", rules.sampling, "privacy",
            "poisson: the accountant's epsilon holds for independent draws, and is too small for shuffled batches",
        )  # fmt: skip
    if rules.unit == "scan" and people < len(rows):
        raise UsageError(
            "one scan per person with privacy.unit scan", f"{len(rows)} scans of {people} people", "privacy",
            "unit person: counted per scan, a person with several would be protected less than epsilon says",
        )  # fmt: skip
    if rules.delta >= 1 / people:
        raise UsageError(
            f"a delta below 1 / {people} people", f"{rules.delta:g}", "privacy",
            f"{0.1 / people:.1g}: with more, publishing one person whole would count as private",
        )  # fmt: skip
    if rules.people_per_step > people:
        raise UsageError(f"at most {people} people_per_step", str(rules.people_per_step), "privacy")
    if config.training.precision == "bf16":
        raise Unsupported("fp32", "bf16", "private training", "training.precision=fp32")
    if base.config.privacy is not None:
        raise UsageError(
            "a base that was trained on public data", "a privately fine-tuned one", "privacy.base",
            "its own base: the budgets of two fine-tunings add up, and only one is accounted",
        )  # fmt: skip
    for section in ("autoencoder", "flow"):
        if getattr(config, section) != getattr(base.config, section):
            raise UsageError(f"the {section} of the base", "another", "privacy", f"a copy of {folder.name}/config.yaml")
    own, theirs = (
        c.data.model_dump(exclude={"holdout_share", "split_column", "covariates"}) for c in (config, base.config)
    )
    known = [(c.name, c.kind) for c in base.covariates]
    asked = [(name, c.kind) for name, c in config.data.covariates.items()]
    if own != theirs or sorted(asked) != sorted(known):
        differs = sorted(k for k in own if own[k] != theirs[k]) or ["covariates"]
        raise UsageError(
            "the data section of the base", f"another {differs[0]}", "privacy",
            "the base's: grids, levels and ranges learned from private people would leave without noise",
        )  # fmt: skip
    check_batch_statistics(base.denoiser)
    check_batch_statistics(base.autoencoder)
    if rules.part == "condition" and not base.covariates:
        raise UsageError("a base with covariates", "none", "privacy.part condition", "privacy.part=adapters")
    _check_public(folder, rows)


def check_batch_statistics(model: nn.Module) -> None:
    """Refuse layers whose output for one person depends on the others in the batch.

    Raises:
        Unsupported: names the layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise Unsupported(
                "layers that see one person at a time", f"{type(module).__name__} '{name}'", "private training",
                "GroupNorm: with statistics over a batch no single gradient is one person's",
            )  # fmt: skip


def _check_public(folder: Path, rows: Sequence[Row]) -> None:
    """The base's record of inputs must be there and hold none of the private scans: its autoencoder, latent statistics and
    moving average carry what they saw without noise."""
    try:
        record = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        seen = {entry["sha256"] for entry in record["inputs"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise CorruptRun(
            "a base whose provenance.json lists what it was trained on", "none", folder, "a finished run"
        ) from None
    shared = [row.number for row in rows if provenance.input_record(row.image)["sha256"] in seen]
    if shared:
        raise InputError(
            "private scans the base has not seen", f"{len(shared)} it was trained on, first in row {shared[0]}",
            "privacy.base", "a base of public data: its autoencoder and average hold these people without noise",
        )  # fmt: skip


# --- data and state ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _encode(base: Model, x_bcdhw: np.ndarray) -> tuple[Tensor, Tensor]:
    """Posterior mean and deviation of every scan, standardised by the base's statistics."""
    parts = [base.autoencoder.encode(torch.from_numpy(np.array(x))[None].to(base.device)) for x in x_bcdhw]
    shift, scale = (
        torch.tensor(base.facts[name], device=base.device).view(1, -1, 1, 1, 1)
        for name in ("latent_mean_c", "latent_deviation_c")
    )
    return (torch.cat([m for m, _ in parts]) - shift) / scale, torch.cat([d for _, d in parts]) / scale


def _restore(out: Path, learned: Learned, optimizer: torch.optim.Optimizer, average: Ema) -> History:
    """Load the newest checkpoint; returns the accountant's history.

    Raises:
        CorruptRun: there is no history, or it does not cover the steps taken.
    """
    parts, state = checkpoint.load(out)
    history = [(float(s), float(q), int(n)) for s, q, n in _entries(state)]
    if _steps(history) != state["step"]:
        raise CorruptRun(
            f"an account of {state['step']} private steps", f"one of {_steps(history)}", out,
            "train again: steps that are not accounted for would make epsilon too small",
        )  # fmt: skip
    checkpoint.load_strictly(learned.tensors, parts["learned"], out)
    checkpoint.load_optimizer(optimizer, parts["optimizer"], state["optimizer"])
    average.load(parts["average"], state["ema_steps"])
    return history


def _entries(state: Mapping[str, Any]) -> list[Any]:
    found = state.get("accountant")
    return found if isinstance(found, list) else []
