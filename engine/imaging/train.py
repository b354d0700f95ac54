"""Training: one function, two stages. First the autoencoder, then rectified flow on its cached latents.

    RUN/config.yaml             the resolved config
    RUN/provenance.json         commit, input hashes, versions, seconds per stage
    RUN/log.jsonl               one line per interval
    RUN/checkpoints/step-N/     safetensors + JSON; N counts the steps of both stages
    RUN/cache/                  fitted volumes and latents of the training side: people's data, never released

Every draw is named by the sample it is for (order by epoch; noise, times and dropped covariates by position in the
stream of samples), never by a generator's state. So a resumed run draws what the uninterrupted one would have drawn,
and so does a run on another number of processes. With a budget in steps on a CPU a resumed run equals the
uninterrupted one bit for bit; a budget in minutes depends on the clock, and the learning rate with it.
"""

from __future__ import annotations

import math
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from engine import devices, provenance, seeding
from engine.atomic import write_text
from engine.errors import EngineError, Unsupported, UsageError
from engine.imaging.autoencoder import Autoencoder, kl_per_element, patch_discriminator, reconstruction_loss
from engine.imaging.config import Budget, ImagingConfig, dump_config, load_config
from engine.imaging.dataset import (
    Covariate,
    Scans,
    condition,
    learn_covariates,
    load_scans,
    read_table,
    shifted,
)
from engine.imaging.denoiser import Condition, Denoiser
from engine.imaging.flow import interpolate, training_times, velocity_target
from engine.imaging.latents import Latents, cached_latents, random_shift
from engine.training import checkpoint, preemption
from engine.training.clock import Clock
from engine.training.ema import Ema
from engine.training.log import Log, Progress


def train(
    config: ImagingConfig, data_csv: str | Path, out: str | Path, resume: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Train on the table `data_csv` and leave a run folder at `out`; returns a JSON-ready summary.

    Raises:
        UsageError: `out` exists and `resume` is False, or its config is another one.
        InputError: the table or a volume cannot be used.
        preemption.Preempted: SIGUSR1 or SIGTERM came; a checkpoint was written; exit code 85.
        EngineError: more non-finite steps than `training.bad_step_limit`.
    """
    if config.privacy is not None:
        from engine.imaging.private import train_private

        return train_private(config, data_csv, out, resume, progress)
    out = Path(out)
    accelerator = Accelerator()
    config = _resolved(config, accelerator.device)
    rows = [row for row in read_table(data_csv, config.data) if row.train]
    covariates = learn_covariates(rows, config.data, data_csv)
    if accelerator.is_main_process:
        open_run(out, config, resume)
    accelerator.wait_for_everyone()
    log = Log(out / "log.jsonl", enabled=accelerator.is_main_process, progress=progress)
    with preemption.watch() as flag:
        try:
            with accelerator.main_process_first():  # the others find the cache
                scans = load_scans(rows, config, out / "cache")
        except EngineError:
            if accelerator.is_main_process and not resume:
                shutil.rmtree(out)  # nothing was learned yet: a scan that cannot be used leaves no half-made run
            raise
        run = _Run(config, out, accelerator, flag, log, {})
        log.event(
            "data", scans=len(rows), people=len({r.subject for r in rows}), size="x".join(map(str, config.data.size))
        )
        run.model.update(_model_facts(scans, covariates))
        log.event(
            "start",
            device=str(accelerator.device),
            processes=accelerator.num_processes,
            precision=config.training.precision,
        )

        parts, state = checkpoint.load(out) if resume and checkpoint.steps(out) else ({}, {})
        if state:
            log.event("resume", step=state["step"], stage=state["stage"])

        torch.manual_seed(seeding.derived_seed(config.seed, "imaging.weights", 0))
        autoencoder = Autoencoder(config.autoencoder, channels=scans.x_bcdhw.shape[1]).to(accelerator.device)
        if state.get("stage") == "flow" or state.get("done"):
            checkpoint.load_strictly(autoencoder, parts["autoencoder"], out)
            run.model["stages"] = state["model"]["stages"]
        else:
            _train_autoencoder(run, autoencoder, scans, parts, state)
            parts, state = {}, {}
        cache = out / "cache" / "latents.safetensors"
        latents = cached_latents(config, autoencoder, scans, cache, state.get("latents_sha256"), accelerator)

        torch.manual_seed(seeding.derived_seed(config.seed, "imaging.weights", 1))
        denoiser = _new_denoiser(config, covariates).to(accelerator.device)
        given = condition([row.covariates for row in rows], scans.spacing_mm, covariates, data_csv)
        _train_flow(run, autoencoder, denoiser, latents, given, parts if state.get("stage") == "flow" else {}, state)

        summary = {
            "run": out.name,
            "scans": len(rows),
            "stages": run.model["stages"],
            "processes": accelerator.num_processes,
        }
        if accelerator.is_main_process:
            provenance.write(
                out,
                "imaging train",
                config=config.model_dump(mode="json"),
                inputs=[data_csv, *(r.image for r in rows)],
                seed=config.seed,
                extra={"stages": run.model["stages"]},
            )
            log.event("done")
        accelerator.wait_for_everyone()
    return summary


# --- the two stages ---------------------------------------------------------------------------------------------------


def _train_autoencoder(
    run: _Run, autoencoder: Autoencoder, scans: Scans, parts: checkpoint.Parts, state: dict[str, Any]
) -> None:
    config, budget = run.config, run.config.autoencoder
    optimizer = torch.optim.AdamW(
        autoencoder.parameters(), lr=budget.learning_rate, betas=(0.9, 0.99), weight_decay=budget.weight_decay
    )
    adversary = patch_discriminator(budget, scans.x_bcdhw.shape[1]) if budget.adversarial_weight else None
    adversary_optimizer = torch.optim.AdamW(adversary.parameters(), lr=2e-4, betas=(0.5, 0.9)) if adversary else None
    clock = Clock(budget, state)
    if state:
        checkpoint.load_strictly(autoencoder, parts["autoencoder"], run.out)
        checkpoint.load_optimizer(optimizer, parts["optimizer"], state["optimizer"])
        if adversary and adversary_optimizer:
            checkpoint.load_strictly(adversary, parts["adversary"], run.out)
            checkpoint.load_optimizer(adversary_optimizer, parts["adversary_optimizer"], state["adversary_optimizer"])
    model, optimizer = run.accelerator.prepare(autoencoder, optimizer)
    if adversary:
        judge, adversary_optimizer = run.accelerator.prepare(adversary, adversary_optimizer)
    latent_shape = (budget.latent_channels, *config.latent_size)

    def save(done: bool) -> None:
        tensors, groups = checkpoint.optimizer_parts(optimizer)
        kept: checkpoint.Parts = {"autoencoder": autoencoder.state_dict(), "optimizer": tensors}
        entries: dict[str, Any] = {"optimizer": groups}
        if adversary and adversary_optimizer:
            kept["adversary"] = adversary.state_dict()
            kept["adversary_optimizer"], entries["adversary_optimizer"] = checkpoint.optimizer_parts(
                adversary_optimizer
            )
        run.save("autoencoder", clock, done, kept, entries)

    while True:
        ended = run.agree(clock, save)
        if ended:
            break
        positions, indices = run.batch(budget, "autoencoder", clock.step, len(scans.x_bcdhw))
        x = torch.from_numpy(
            np.stack(
                [
                    shifted(scans.x_bcdhw[i], random_shift(config.seed, p, budget.shift_voxels))
                    for p, i in zip(positions, indices)
                ]
            )
        ).to(run.accelerator.device)
        noise = torch.stack(
            [
                seeding.normal(latent_shape, config.seed, "imaging.posterior", p, run.accelerator.device)
                for p in positions
            ]
        )
        rate = clock.set_rate(optimizer)
        with run.autocast():
            output, mean, log_variance = model(x, noise)
        terms = reconstruction_loss(budget, output, x)
        terms["kl"] = kl_per_element(mean, log_variance)
        loss = terms["l1"] + budget.gradient_weight * terms["gradient"] + budget.kl_weight * terms["kl"]
        adversarial = bool(adversary) and clock.progress() >= budget.adversarial_start
        if adversary and adversarial:
            adversary.requires_grad_(False)  # the plain module: a distributed wrapper would wait for its gradients
            with run.autocast():
                terms["adversarial"] = (adversary(output)[-1].float() - 1.0).square().mean()
            adversary.requires_grad_(True)
            loss = loss + budget.adversarial_weight * terms["adversarial"]
        if run.step(clock, loss, model, optimizer, indices) and adversarial and adversary_optimizer:
            with run.autocast():
                real, fake = judge(torch.cat([x, output.detach()]))[-1].float().chunk(2)
            adversary_optimizer.zero_grad()
            run.accelerator.backward(0.5 * ((real - 1.0).square().mean() + fake.square().mean()))
            adversary_optimizer.step()
        clock.advance()
        run.report("autoencoder", clock, rate, terms)
    run.finish_stage("autoencoder", clock, ended, save)


def _train_flow(
    run: _Run,
    autoencoder: Autoencoder,
    denoiser: Denoiser,
    latents: Latents,
    given: Condition,
    parts: checkpoint.Parts,
    state: dict[str, Any],
) -> None:
    config, budget, device = run.config, run.config.flow, run.accelerator.device
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), lr=budget.learning_rate, betas=(0.9, 0.99), weight_decay=budget.weight_decay
    )
    ema = Ema(denoiser, budget.ema_decay)
    clock = Clock(budget, state if parts else {})
    if parts:
        checkpoint.load_strictly(denoiser, parts["denoiser"], run.out)
        checkpoint.load_optimizer(optimizer, parts["optimizer"], state["optimizer"])
        ema.load({k: t.to(device) for k, t in parts["ema"].items()}, state["ema_steps"])
    run.model["latent_mean_c"], run.model["latent_deviation_c"] = latents.mean_c.tolist(), latents.deviation_c.tolist()
    model, optimizer = run.accelerator.prepare(denoiser, optimizer)
    given = given.to(device)

    def save(done: bool) -> None:
        tensors, groups = checkpoint.optimizer_parts(optimizer)
        run.save(
            "flow",
            clock,
            done,
            {
                "autoencoder": autoencoder.state_dict(),
                "denoiser": denoiser.state_dict(),
                "ema": ema.tensors(),
                "optimizer": tensors,
            },
            {"optimizer": groups, "ema_steps": ema.steps, "latents_sha256": latents.digest},
        )

    while True:
        ended = run.agree(clock, save)
        if ended:
            break
        positions, indices = run.batch(budget, "flow", clock.step, len(latents.mean_vbcdhw[0]))
        x0, noise, t, blur, drop_continuous, drop_categorical = _flow_draws(config, latents, given, positions, indices)
        rate = clock.set_rate(optimizer)
        if budget.dropout:
            torch.manual_seed(seeding.derived_seed(config.seed, "imaging.dropout", positions[0]))
        x0, noise, t = x0.to(device), noise.to(device), t.to(device)
        wanted = given.rows(torch.tensor(indices, device=device))
        wanted = wanted.blurred(blur.to(device)).dropped(drop_continuous.to(device), drop_categorical.to(device))
        with run.autocast():
            velocity = model(interpolate(x0, noise, t), t, wanted)
        loss = (velocity - velocity_target(x0, noise)).square().mean()
        if run.step(clock, loss, model, optimizer, indices):
            ema.update(denoiser)
        clock.advance()
        run.report("flow", clock, rate, {"velocity_mse": loss})
    run.finish_stage("flow", clock, ended, save)


def _flow_draws(
    config: ImagingConfig, latents: Latents, given: Condition, positions: list[int], indices: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What training draws for the samples at `positions`: a latent redrawn from its posterior, noise, time, what is
    added to continuous covariates, and which covariates are dropped.

    All covariates are dropped together with probability `condition_drop` (what guidance needs), and in the rest each
    one by itself with the same probability (what a user who gives only some of them needs).
    """
    x0, noise, normal, drops, blurs = [], [], [], [], []
    split = given.continuous_bk.shape[1]
    covariates = given.continuous_bk.shape[1] + given.categorical_bk.shape[1]
    shape = latents.mean_vbcdhw.shape[2:]
    for position, index in zip(positions, indices):
        draw = seeding.generator(config.seed, "imaging.flow", position)
        view = int(draw.integers(len(latents.mean_vbcdhw)))
        redrawn = draw.standard_normal(shape, dtype=np.float32)
        x0.append(latents.mean_vbcdhw[view, index] + latents.deviation_vbcdhw[view, index] * torch.from_numpy(redrawn))
        noise.append(torch.from_numpy(draw.standard_normal(shape, dtype=np.float32)))
        normal.append(draw.standard_normal())
        everything = draw.random() < config.flow.condition_drop
        drops.append(torch.from_numpy(draw.random(covariates) < config.flow.condition_drop) | bool(everything))
        blurs.append(torch.from_numpy(draw.standard_normal(split, dtype=np.float32)))
    t_b = training_times(torch.tensor(normal, dtype=torch.float32), config.flow.time_shift)
    drop = torch.stack(drops)
    blur = config.flow.condition_noise * torch.stack(blurs)
    standardised = latents.standardise(torch.stack(x0))
    return standardised, torch.stack(noise), t_b, blur, drop[:, :split], drop[:, split:]


def _new_denoiser(config: ImagingConfig, covariates: list[Covariate]) -> Denoiser:
    levels = [len(c.levels) for c in covariates if c.kind == "categorical"]
    continuous = sum(c.kind == "continuous" for c in covariates)
    return Denoiser(config.flow, config.autoencoder.latent_channels, levels, continuous)


# --- what both loops do -----------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """What a stage needs besides its own networks."""

    config: ImagingConfig
    out: Path
    accelerator: Accelerator
    flag: preemption.Flag
    log: Log
    model: dict[str, Any]  # what a sampler must know besides weights; goes into every checkpoint

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 arithmetic where the config says so; weights, losses and optimizer stay float32."""
        if self.config.training.precision == "bf16":
            return torch.autocast(self.accelerator.device.type, torch.bfloat16)
        return nullcontext()

    def batch(self, budget: Budget, stage: str, step: int, n: int) -> tuple[list[int], list[int]]:
        """This process's share of global batch `step`: positions in the stream of samples, and which of `n` items
        they are."""
        size, world = budget.batch_size, self.accelerator.num_processes
        if size % world:
            raise UsageError("a batch_size divisible by the number of processes", f"{size} over {world}", stage)
        positions = list(range(step * size + self.accelerator.process_index, (step + 1) * size, world))
        order = {
            epoch: seeding.generator(self.config.seed, f"imaging.order.{stage}", epoch).permutation(n)
            for epoch in {p // n for p in positions}
        }
        return positions, [int(order[p // n][p % n]) for p in positions]

    def agree(self, clock: Clock, save: Any) -> str:
        """Let all ranks agree on the time (rank 0's) and on a request to stop; checkpoint when one is due.

        Returns the bound that ended the stage, or "".
        """
        seen = torch.tensor([clock.read() if self.accelerator.is_main_process else 0.0, float(bool(self.flag))])
        if self.accelerator.num_processes > 1:
            seen = self.accelerator.reduce(seen.to(self.accelerator.device), reduction="sum").cpu()
        clock.seconds = float(seen[0])
        ended = clock.bound()
        if ended:
            return ended
        if seen[1] > 0:
            save(False)
            self.log.event("preempted", signal=self.flag.signal or "another rank", stage_step=clock.step)
            raise preemption.Preempted(
                f"stopped by {self.flag.signal or 'a signal'} at step {clock.step}",
                hint="the same command with --resume",
            )
        every, minutes = self.config.training.checkpoint_every_steps, self.config.training.checkpoint_every_minutes
        by_steps = bool(every) and clock.step > clock.saved_step and clock.step % (every or 1) == 0
        by_time = minutes is not None and clock.seconds - clock.saved_seconds >= 60.0 * minutes
        if by_steps or by_time:
            save(False)
        return ""

    def step(self, clock: Clock, loss: Tensor, model: nn.Module, optimizer: Any, indices: list[int]) -> bool:
        """Backward and update, unless the loss or gradient of any rank is not finite: then all skip it and count it."""
        bad = torch.tensor([float(not torch.isfinite(loss.detach()))], device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            bad = self.accelerator.reduce(bad, reduction="sum")
        optimizer.zero_grad()
        if bad.item() == 0:
            self.accelerator.backward(loss)
            norm = self.accelerator.clip_grad_norm_(model.parameters(), self.config.training.gradient_clip)
            if math.isfinite(float(norm)):  # ranks hold the same gradients here
                optimizer.step()
                return True
        clock.bad_steps += 1
        self.log.event("bad_step", stage_step=clock.step, items=indices, count=clock.bad_steps)
        if clock.bad_steps > self.config.training.bad_step_limit:
            raise EngineError(
                "finite losses",
                f"{clock.bad_steps} bad steps, the last on training items {indices}",
                f"step {clock.step}",
                "a lower learning_rate, or precision fp32",
            )
        return False

    def report(self, stage: str, clock: Clock, rate: float, terms: dict[str, Tensor]) -> None:
        """One log line per interval."""
        self.log.bar(stage, clock.progress())
        if clock.step % self.config.training.log_every_steps == 0:
            speed = clock.step * getattr(self.config, stage).batch_size / max(clock.read(), 1e-9)
            values = {name: float(term.detach()) for name, term in terms.items()}
            self.log.event(
                stage,
                step=clock.step,
                **values,
                rate=rate,
                scans_per_second=speed,
                seconds=clock.read(),
                share=clock.progress(),
            )

    def save(self, stage: str, clock: Clock, done: bool, parts: checkpoint.Parts, entries: dict[str, Any]) -> None:
        """Checkpoint from the main process; the others do not wait, because nothing they hold is written."""
        clock.saved_step, clock.saved_seconds = clock.step, clock.seconds
        if not self.accelerator.is_main_process:
            return
        step = clock.step + (self.model["stages"]["autoencoder"]["steps"] if stage == "flow" else 0)
        state = {
            "stage": stage,
            "stage_step": clock.step,
            "seconds": clock.read(),
            "bad_steps": clock.bad_steps,
            "done": done,
            "model": self.model,
            **entries,
        }
        checkpoint.save(self.out, step, parts, state, keep=self.config.training.keep_checkpoints)

    def finish_stage(self, stage: str, clock: Clock, ended: str, save: Any) -> None:
        """Note what ended the stage and write its last checkpoint."""
        facts = {
            "steps": clock.step,
            "seconds": round(clock.seconds, 1),
            "ended_by": ended,
            "bad_steps": clock.bad_steps,
        }
        self.model["stages"] = {**self.model.get("stages", {}), stage: facts}
        save(True)
        self.log.event("stage_done", stage=stage, **facts)


def _model_facts(scans: Scans, covariates: list[Covariate]) -> dict[str, Any]:
    """What a sampler must know besides weights."""
    return {
        "channels": int(scans.x_bcdhw.shape[1]),
        "covariates": [c.to_json() for c in covariates],
        "spacing_mm_low": scans.spacing_mm.min(axis=0).tolist(),
        "spacing_mm_high": scans.spacing_mm.max(axis=0).tolist(),
        "spacing_mm": np.median(scans.spacing_mm, axis=0).tolist(),
        "centre_mm": scans.centre_mm.mean(axis=0).tolist(),
    }


def _resolved(config: ImagingConfig, device: torch.device) -> ImagingConfig:
    """`config` with precision "auto" decided: bf16 where the hardware multiplies it, rightly, else fp32.

    Raises:
        Unsupported: bf16 was named for a processor whose library gets its gradients wrong.
    """
    precision = config.training.precision
    if precision == "fp32":
        return config
    sound = devices.trains_in_bf16(device.type)
    if precision == "bf16" and not sound and "avx512_bf16" in devices.cpu_flags():
        raise Unsupported(
            "right gradients of convolutions in bf16", "wrong ones from this processor's library",
            "training.precision=bf16", "training.precision=auto, or fp32",
        )  # fmt: skip
    if precision != "auto":
        return config
    training = config.training.model_copy(update={"precision": "bf16" if sound else "fp32"})
    return config.model_copy(update={"training": training})


def open_run(out: Path, config: ImagingConfig, resume: bool) -> None:
    """Create the run folder, or check that the one there holds this run."""
    stored = out / "config.yaml"
    if not resume:
        if out.exists():
            raise UsageError("a folder that does not exist yet", "an existing one", out, "another --out, or --resume")
        out.mkdir(parents=True)
        write_text(stored, dump_config(config))
        return
    if not stored.is_file():
        raise UsageError("a run folder with config.yaml", "none", out, "the folder of an earlier run, or no --resume")
    before, now = load_config(stored).model_dump(), config.model_dump()
    for section in ("data", "autoencoder", "flow", "seed", "privacy"):
        if before[section] != now[section]:
            raise UsageError(f"the config this run was started with (it differs in {section})", "another", stored)
    if before["training"]["precision"] != now["training"]["precision"]:
        raise UsageError(f"precision {before['training']['precision']}", now["training"]["precision"], stored)
