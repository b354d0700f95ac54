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

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import devices, provenance, seeding
from engine.errors import EngineError, Unsupported
from engine.imaging import field_of_view, monitor
from engine.imaging.autoencoder import (
    Autoencoder,
    autoencoder_loss,
    feature_distance,
    kl_per_element,
    patch_discriminator,
    reconstruction_loss,
    shown,
)
from engine.imaging.config import ImagingConfig, dump_config, load_config
from engine.imaging.context import known_covariates
from engine.imaging.dataset import Covariate, Scans, learn_covariates, load_scans, read_table
from engine.imaging.draws import FlowBatch, FlowData, flow_batch, flow_data
from engine.imaging.flow import interpolate, velocity_target
from engine.imaging.latents import cached_latents
from engine.imaging.linear_mean import Centred
from engine.imaging.moves import random_move
from engine.imaging.velocity import Velocity, new_denoiser
from engine.training import checkpoint, distributed, preemption
from engine.training.ahead import Ahead
from engine.training.clock import Clock
from engine.training.ema import Ema
from engine.training.lock import RunLock
from engine.training.log import Log, Progress
from engine.training.loop import Loop, Share
from engine.training.run_folder import open_run as open_folder


def train(
    config: ImagingConfig,
    data_csv: str | Path,
    out: str | Path,
    resume: bool = False,
    progress: Progress | None = None,
    cache: str | Path | None = None,
    scratch: str | Path | None = None,
) -> dict[str, Any]:
    """Train on the table `data_csv` and leave a run folder at `out`; returns a JSON-ready summary.

    Args:
        cache: folder of fitted volumes made by `engine imaging prepare`; default: one in the run folder.
        scratch: folder on a disk of each node: volumes and latents are copied there once and read from there.

    Raises:
        UsageError: `out` exists and `resume` is False, its config is another one, or another job writes it.
        InputError: the table or a volume cannot be used.
        preemption.Preempted: SIGUSR1 or SIGTERM came; a checkpoint was written; exit code 85.
        distributed.PeerLost: another process of this job is gone; exit code 75.
        EngineError: more non-finite steps than `training.bad_step_limit`, or a checkpoint that cannot be written.
    """
    if config.privacy is not None:
        from engine.imaging.private import train_private

        return train_private(config, data_csv, out, resume, progress)
    out = Path(out)
    with ExitStack() as stack:
        flag = stack.enter_context(preemption.watch())  # first of all: a signal while data are read must not be lost
        accelerator = distributed.start()
        stack.enter_context(distributed.peers(accelerator, out))
        config = _resolved(config, accelerator.device)
        if config.monitor and config.training.parallel == "fsdp" and accelerator.num_processes > 1:
            raise Unsupported(
                "a whole denoiser on the main process for the monitor", "a sharded one", "training.parallel=fsdp",
                "training.parallel=ddp, or no section monitor",
            )  # fmt: skip
        table = read_table(data_csv, config.data)
        rows = [row for row in table if row.train]
        covariates = learn_covariates(rows, config.data, data_csv)
        known = known_covariates(config, covariates)
        lock = None
        if accelerator.is_main_process:
            open_run(out, config, resume)
            lock = stack.enter_context(RunLock(out))
        accelerator.wait_for_everyone()
        board = out / "tensorboard" if config.training.tensorboard else None
        log = Log(out / "log.jsonl", enabled=accelerator.is_main_process, progress=progress, board=board)

        def read() -> tuple[list[Scans], Any]:
            stored = Path(cache or out / "cache")
            main = accelerator.is_main_process
            scans_g = [
                load_scans(rows, config, stored, grid, 1, progress, scratch, checked=not main)
                for grid in range(len(config.data.grids))
            ]
            return scans_g, monitor.prepare(config, table, scans_g[0], out / "cache") if config.monitor else None

        try:
            scans_g, watch = distributed.by_main(accelerator, read) or read()  # the others find the cache
        except EngineError:
            if accelerator.is_main_process and not resume:
                shutil.rmtree(out)  # nothing was learned yet: a scan that cannot be used leaves no half-made run
            raise
        run = Loop("imaging", config.training, config.seed, out, accelerator, flag, log, {}, lock)
        log.event(
            "data", scans=len(rows), people=len({r.subject for r in rows}), size="x".join(map(str, config.data.size))
        )
        run.model.update(_model_facts(scans_g, known))
        log.event(
            "start",
            device=str(accelerator.device),
            processes=accelerator.num_processes,
            precision=config.training.precision,
        )

        parts, state = checkpoint.load(out) if resume and checkpoint.steps(out) else ({}, {})
        if state:
            log.event("resume", step=state["step"], stage=state["stage"])
            run.joules_before = state.get("gpu_joules") or 0.0

        torch.manual_seed(seeding.derived_seed(config.seed, "imaging.weights", 0))
        autoencoder = Autoencoder(config.autoencoder, channels=scans_g[0].x_bcdhw.shape[1]).to(accelerator.device)
        if state.get("stage") == "flow" or state.get("done"):
            checkpoint.load_strictly(autoencoder, parts["autoencoder"], out)
            run.model["stages"] = state["model"]["stages"]
        else:
            _train_autoencoder(run, config, autoencoder, scans_g, parts, state)
            parts, state = {}, {}
        run.steps_before = run.model["stages"]["autoencoder"]["steps"]
        encoded = out / "cache" / "latents.safetensors"
        latents = cached_latents(
            config, autoencoder, scans_g, encoded, state.get("latents_sha256"), accelerator, scratch
        )

        torch.manual_seed(seeding.derived_seed(config.seed, "imaging.weights", 1))
        denoiser = new_denoiser(config, known).to(accelerator.device)
        data = flow_data(config, rows, scans_g, latents, covariates)
        own = parts if state.get("stage") == "flow" else {}
        if isinstance(denoiser, Centred) and not own:
            ridge = denoiser.mean.set(latents.standardise(latents.mean_g[0][0]), data.given_g[0], data.others)
            log.event("linear_mean", ridge=ridge)
        _train_flow(run, config, autoencoder, denoiser, data, watch, own, state)

        summary = {
            "run": out.name,
            "scans": len(rows),
            "stages": run.model["stages"],
            "processes": accelerator.num_processes,
        }
        joules = run.joules()
        if accelerator.is_main_process:
            provenance.write(
                out,
                "imaging train",
                config=config.model_dump(mode="json"),
                inputs={Path(data_csv).name: data_csv, **{f"row {r.number}": r.image for r in rows}},
                seed=config.seed,
                extra={"stages": run.model["stages"], "gpu_joules": joules},
            )
            log.event("done")
        accelerator.wait_for_everyone()
    return summary


# --- the two stages ---------------------------------------------------------------------------------------------------


def _train_autoencoder(
    run: Loop,
    config: ImagingConfig,
    autoencoder: Autoencoder,
    scans_g: list[Scans],
    parts: checkpoint.Parts,
    state: dict[str, Any],
) -> None:
    budget, device = config.autoencoder, run.accelerator.device
    channels = scans_g[0].x_bcdhw.shape[1]
    adversary = patch_discriminator(budget, channels).to(device) if budget.adversarial_weight else None
    clock = Clock(budget, state)
    if state:
        checkpoint.load_strictly(autoencoder, parts["autoencoder"], run.out)
    # always data parallel: the autoencoder is small, and its discriminator looks into it
    model = distributed.distribute(autoencoder, "ddp", run.accelerator)
    optimizer: Any = torch.optim.AdamW(
        autoencoder.parameters(), lr=budget.learning_rate, betas=(0.9, 0.99), weight_decay=budget.weight_decay
    )
    adversary_optimizer: Any = None
    if state:
        checkpoint.load_optimizer(optimizer, parts["optimizer"], state["optimizer"])
    if adversary:
        adversary_optimizer = torch.optim.AdamW(adversary.parameters(), lr=2e-4, betas=(0.5, 0.9))
        if state:
            checkpoint.load_strictly(adversary, parts["adversary"], run.out)
            checkpoint.load_optimizer(adversary_optimizer, parts["adversary_optimizer"], state["adversary_optimizer"])
        judge, adversary_optimizer = run.accelerator.prepare(adversary, adversary_optimizer)
    optimizer = run.accelerator.prepare(optimizer)

    def save(done: bool) -> None:
        tensors, groups = checkpoint.optimizer_parts(optimizer)
        kept: checkpoint.Parts = {"autoencoder": autoencoder.state_dict(), "optimizer": tensors}
        entries: dict[str, Any] = {"optimizer": groups}
        if adversary:
            kept["adversary"] = adversary.state_dict()
            kept["adversary_optimizer"], entries["adversary_optimizer"] = checkpoint.optimizer_parts(
                adversary_optimizer
            )
        run.save("autoencoder", clock, done, kept, entries)

    def make(step: int) -> list[tuple[Share, Tensor, Tensor]]:
        made, scans = [], scans_g[grid_of(config, "autoencoder", step)]
        for share in run.shares("autoencoder", step, budget.batch_size, len(scans.x_bcdhw)):
            x = np.stack(
                [
                    moved(scans.x_bcdhw[i], scans.spacing_mm[i], config, p)
                    for p, i in zip(share.positions, share.indices)
                ]
            )
            shape = (budget.latent_channels, *(n // budget.factor for n in x.shape[2:]))
            noise = [seeding.normal(shape, config.seed, "imaging.posterior", p) for p in share.positions]
            made.append((share, torch.from_numpy(x), torch.stack(noise)))
        return made

    with Ahead(make) as batches:
        while not (ended := run.agree(clock, save)):
            batch = batches.take(clock.step)
            rate = clock.set_rate(optimizer)
            adversarial = bool(adversary) and clock.progress() >= budget.adversarial_start
            run.begin(optimizer, adversary_optimizer)
            for share, x, noise in batch:
                x, noise = x.to(device), noise.to(device)
                with run.exchange(model, share):
                    with run.autocast():
                        output, mean, log_variance = model(x, noise)
                    terms = reconstruction_loss(budget, output, x, config.label_channels)
                    terms["kl"] = kl_per_element(mean, log_variance)
                    seen = shown(output, config.label_channels)
                    loss = autoencoder_loss(budget, terms)
                    if adversary and adversarial:
                        adversary.requires_grad_(False)  # the plain module: a wrapper would wait for its gradients
                        with run.autocast():
                            *features, said = adversary(seen)
                            terms["adversarial"] = (said.float() - 1.0).square().mean()
                            if budget.feature_weight:
                                terms["features"] = feature_distance(features, adversary(x)[:-1])
                        adversary.requires_grad_(True)
                        loss = loss + budget.adversarial_weight * terms["adversarial"]
                        if budget.feature_weight:
                            loss = loss + budget.feature_weight * terms["features"]
                    run.backward(loss, share, terms)
                if adversarial:
                    with run.exchange(judge, share):
                        with run.autocast():
                            real, fake = judge(torch.cat([x, seen.detach()]))[-1].float().chunk(2)
                        wrong = 0.5 * ((real - 1.0).square().mean() + fake.square().mean())
                        run.accelerator.backward(wrong * share.weight)
            if run.update(clock, model, optimizer, [share for share, *_ in batch]) and adversarial:
                adversary_optimizer.step()
            clock.advance()
            run.report("autoencoder", clock, rate, budget.batch_size, batches.waited)
    run.finish_stage("autoencoder", clock, ended, save)


def _train_flow(
    run: Loop,
    config: ImagingConfig,
    autoencoder: Autoencoder,
    denoiser: Velocity,
    data: FlowData,
    watch: monitor.Watch | None,
    parts: checkpoint.Parts,
    state: dict[str, Any],
) -> None:
    budget, device = config.flow, run.accelerator.device
    clock = Clock(budget, state if parts else {})
    if parts:
        checkpoint.load_strictly(denoiser, parts["denoiser"], run.out)
    model = distributed.distribute(denoiser, config.training.parallel, run.accelerator)
    optimizer: Any = torch.optim.AdamW(
        denoiser.parameters(), lr=budget.learning_rate, betas=(0.9, 0.99), weight_decay=budget.weight_decay
    )
    ema = Ema(denoiser, budget.ema_decay)
    if parts:
        checkpoint.load_optimizer(optimizer, parts["optimizer"], state["optimizer"])
        ema.load({k: t.to(device) for k, t in parts["ema"].items()}, state["ema_steps"])
    latents = data.latents
    run.model["latent_mean_c"], run.model["latent_deviation_c"] = latents.mean_c.tolist(), latents.deviation_c.tolist()
    if watch is not None:
        watch.resume(parts, state if parts else {})
    optimizer = run.accelerator.prepare(optimizer)

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
                **({"best": watch.best} if watch is not None and watch.best else {}),
            },
            {
                "optimizer": groups,
                "ema_steps": ema.steps,
                "latents_sha256": latents.digest,
                **({"monitor": watch.record()} if watch is not None else {}),
            },
        )

    def make(step: int) -> list[tuple[Share, FlowBatch]]:
        grid = grid_of(config, "flow", step)
        own = run.shares("flow", step, budget.batch_size, latents.mean_g[grid].shape[1])
        return [(share, flow_batch(config, data, grid, share.positions, share.indices)) for share in own]

    def copies() -> bool:
        """Judge the averaged weights for copying; whether it ends the stage. All ranks come here, and none waits in a
        collective while the main one judges."""

        def judge() -> float:
            if watch is None:
                return 0.0
            with ema.applied(denoiser):
                judged = watch.judge(config, run.model, autoencoder, denoiser, data, clock.step)
            run.log.event("monitor", step=clock.step, **judged)
            return float(watch.in_a_row >= watch.settings.patience)

        stop = torch.tensor([distributed.by_main(run.accelerator, judge) or 0.0], device=device)
        return bool(run.accelerator.reduce(stop, reduction="sum").item() > 0)

    with Ahead(make) as batches:
        while not (ended := run.agree(clock, save)):
            batch = batches.take(clock.step)
            rate = clock.set_rate(optimizer)
            run.begin(optimizer)
            for share, draws in batch:
                x0, noise, t = (d.to(device) for d in draws[:3])
                wanted = draws[3].to(device)
                if budget.dropout:
                    torch.manual_seed(seeding.derived_seed(config.seed, "imaging.dropout", share.positions[0]))
                with run.exchange(model, share):
                    with run.autocast():
                        velocity = model(interpolate(x0, noise, t), t, wanted)
                    loss = (velocity - velocity_target(x0, noise)).square().mean()
                    run.backward(loss, share, {"velocity_mse": loss})
            if run.update(clock, model, optimizer, [share for share, _ in batch]):
                ema.update(denoiser)
            clock.advance()
            run.report("flow", clock, rate, budget.batch_size, batches.waited)
            if watch is not None and clock.step % watch.settings.every_steps == 0 and copies():
                ended = "copies"
                break
    run.finish_stage("flow", clock, ended, save)


def grid_of(config: ImagingConfig, stage: str, step: int) -> int:
    """Which of the config's grids global batch `step` is of."""
    count = len(config.data.grids)
    return int(seeding.generator(config.seed, f"imaging.grid.{stage}", step).integers(count)) if count > 1 else 0


def moved(x_cdhw: np.ndarray, spacing_mm: np.ndarray, config: ImagingConfig, position: int) -> np.ndarray:
    """What the autoencoder sees of a volume: a random crop where the config asks for crops, else moved at random."""
    budget = config.autoencoder
    crop = budget.crop_size
    if crop is None:
        move = random_move(config.seed, position, budget.shift_voxels, budget.turn_degrees, budget.bend_mm)
        return move.of(x_cdhw, spacing_mm, int(config.data.image_channels))
    draw = seeding.generator(config.seed, "imaging.crop", position)
    starts = [int(draw.integers(n - c + 1)) for n, c in zip(x_cdhw.shape[1:], crop)]
    return np.asarray(x_cdhw[(slice(None), *(slice(a, a + c) for a, c in zip(starts, crop)))])


def _model_facts(scans_g: list[Scans], known: list[Covariate]) -> dict[str, Any]:
    """What a sampler must know besides weights."""
    spacing_mm = np.concatenate([scans.spacing_mm for scans in scans_g])
    return {
        "channels": int(scans_g[0].x_bcdhw.shape[1]),
        "covariates": [c.to_json() for c in known],
        "spacing_mm_low": spacing_mm.min(axis=0).tolist(),
        "spacing_mm_high": spacing_mm.max(axis=0).tolist(),
        "spacing_mm": np.median(scans_g[0].spacing_mm, axis=0).tolist(),
        "centre_mm": scans_g[0].centre_mm.mean(axis=0).tolist(),
        "fields": field_of_view.trained_fields([(s.x_bcdhw.shape[2:], s.spacing_mm) for s in scans_g]),
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
    open_folder(
        out, resume, text=dump_config(config), now=config.model_dump(), stored=lambda path: load_config(path).model_dump(),
        sections=("data", "autoencoder", "flow", "seed", "privacy"),
    )  # fmt: skip
