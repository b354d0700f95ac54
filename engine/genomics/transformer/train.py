"""Fit: the copying model, its predictions of every training haplotype, then the network on them.

    RUN/config.yaml             the resolved config
    RUN/reference/              the copying model with the panel in it, as `engine genomics fit` writes it
    RUN/cache/                  predictions of the training haplotypes, each without its own person; not needed afterwards
    RUN/checkpoints/step-N/     network, average, optimizer, and the average that was best on held-out people
    RUN/log.jsonl, RUN/provenance.json

The order of haplotypes, whose group is hidden and what is dropped are named by the place in the stream of samples, so that
a resumed run draws what the uninterrupted one would have drawn, and so does a run on another number of processes. With a
budget in steps on a CPU a resumed run equals the uninterrupted one bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import devices, provenance, seeding
from engine.errors import EngineError, UsageError
from engine.genomics import li_stephens
from engine.genomics.li_stephens import LiStephens
from engine.genomics.matching import of_person
from engine.genomics.transformer import features
from engine.genomics.transformer.batches import Batch, Facts, batch, log_likelihood, nats, new_network
from engine.genomics.transformer.config import TransformerConfig, dump_config, load_config
from engine.genomics.transformer.model import HaplotypeTransformer
from engine.kernels import bits
from engine.training import checkpoint, distributed, preemption
from engine.training.ahead import Ahead
from engine.training.clock import Clock
from engine.training.ema import Ema
from engine.training.lock import RunLock
from engine.training.log import Log, Progress
from engine.training.loop import Loop, Share
from engine.training.run_folder import open_run as open_folder

JUDGED_TOGETHER = 32  # haplotypes


@dataclass(frozen=True)
class Data:
    """Training haplotypes: `stored` predictions, target_nl uint8, group_n int64, covariate_nv; which rows learn and judge."""

    facts: Facts
    stored: features.Stored
    target_nl: np.ndarray
    group_n: np.ndarray
    groups: int
    covariate_nv: np.ndarray
    learn: np.ndarray
    judge: np.ndarray

    def batch(self, index: list[int], hidden_b: np.ndarray) -> Batch:
        """Haplotypes `index`; group and phenotypes are hidden where hidden_b."""
        logit_nlc, donors_nlc = self.stored.rows(index)
        group_n = np.where(hidden_b, self.groups, self.group_n[index])
        covariate_nv = np.where(hidden_b[:, None], 0.0, self.covariate_nv[index]).astype(np.float32)
        return batch(self.facts, logit_nlc, donors_nlc, self.target_nl[index], group_n, covariate_nv)


@dataclass
class Judge:
    """The best average so far on held-out people, held by the main process; what it was, when it was found, how many judgements
    ago, and `looked`, the step of the last judgement, are the same on all ranks."""

    best: dict[str, torch.Tensor]
    nats: float = -math.inf
    step: int = 0
    since: int = 0
    looked: int = -1

    def record(self) -> dict[str, Any]:
        return {
            "nats": None if math.isinf(self.nats) else self.nats,
            "step": self.step,
            "since": self.since,
            "looked": self.looked,
        }


def train(
    config: TransformerConfig,
    reference: Callable[[], LiStephens],
    out: str | Path,
    *,
    covariates: Callable[[LiStephens], tuple[list[str], np.ndarray]] | None = None,
    inputs: list[str | Path] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit a haplotype transformer and leave a run folder at `out`; returns a JSON-ready summary.

    Args:
        reference: makes the copying model over the training panel; called once, on the main process, in a new run.
        covariates: names and values, float32 (people, V), NaN where unknown, of the panel's people; None for none.

    Raises:
        UsageError: `out` exists and `resume` is False, its config is another one, or another job writes it.
        preemption.Preempted: SIGUSR1 or SIGTERM came; what was done is on disk; exit code 85.
        distributed.PeerLost: another process of this job is gone; exit code 75.
        EngineError: more non-finite steps than `training.bad_step_limit`, or a checkpoint that cannot be written.
    """
    out = Path(out)
    with ExitStack() as stack:
        flag = stack.enter_context(preemption.watch())
        accelerator = distributed.start()
        stack.enter_context(distributed.peers(accelerator, out))
        config = _resolved(config, accelerator.device)
        main, lock = accelerator.is_main_process, None
        if main:
            open_run(out, config, resume)
            lock = stack.enter_context(RunLock(out))
        accelerator.wait_for_everyone()
        board = out / "tensorboard" if config.training.tensorboard else None
        log = Log(out / "log.jsonl", enabled=main, progress=progress, board=board)
        run = Loop("genomics", config.training, config.seed, out, accelerator, flag, log, {}, lock)

        def prepare() -> None:
            if not (out / "reference").is_dir():
                reference().save(out / "reference", inputs=inputs or [])
            model = li_stephens.load(out / "reference")
            _predictions(config, model, out, flag, progress)

        distributed.by_main(accelerator, prepare)  # minutes for a chromosome; the others find it on disk
        model = li_stephens.load(out / "reference")
        names, value_sv = (
            ([], np.zeros((len(model.samples.ids), 0), np.float32)) if covariates is None else covariates(model)
        )
        data = _data(config, model, out, value_sv)
        log.event("data", haplotypes=model.k, sites=model.n_sites, chains=len(config.bank), held_out=len(data.judge))
        log.event(
            "start", device=str(accelerator.device), processes=accelerator.num_processes,
            precision=config.training.precision,
        )  # fmt: skip
        run.model.update(covariates=names, reference_sha256=_reference_sha256(out))
        parts, state = checkpoint.load(out) if resume and checkpoint.steps(out) else ({}, {})
        if state:
            log.event("resume", step=state["step"])
            run.joules_before = state.get("gpu_joules") or 0.0
        torch.manual_seed(seeding.derived_seed(config.seed, "genomics.weights", 0))
        network = new_network(
            config.network, sites=model.n_sites, chains=len(config.bank), groups=data.groups, covariates=len(names),
            weight_c=config.weights,
        )  # fmt: skip
        if not state:
            vector_ld = components(data.target_nl[data.learn], data.facts.share_l, config.network.width, config.seed)
            network.site_in.data[: model.n_sites] += torch.from_numpy(vector_ld)
        judge = _train(run, config, network.to(accelerator.device), data, parts, state)
        summary = {
            "run": str(out), "model": "transformer", "haplotypes": model.k, "sites": model.n_sites,
            "groups": dict(zip(model.group_names, np.bincount(model.group_of_haplotype_k).tolist())),
            "held_out": len(data.judge), "held_out_nats": judge.nats, "best_step": judge.step,
            "steps": run.model["stages"]["transformer"]["steps"], "processes": accelerator.num_processes,
            "warnings": model.warnings,
        }  # fmt: skip
        joules = run.joules()
        if main:
            provenance.write(
                out, "genomics fit", config=config.model_dump(mode="json"), inputs=inputs or [], seed=config.seed,
                extra={"stages": run.model["stages"], "held_out_nats": judge.nats, "gpu_joules": joules},
            )  # fmt: skip
            log.event("done")
        accelerator.wait_for_everyone()
    return summary


def _train(
    run: Loop, config: TransformerConfig, network: HaplotypeTransformer, data: Data, parts: checkpoint.Parts,
    state: dict[str, Any],
) -> Judge:  # fmt: skip
    budget, device, patch = config.fit, run.accelerator.device, config.network.patch
    sites = data.target_nl.shape[1]
    clock = Clock(budget, state)
    if state:
        checkpoint.load_strictly(network, parts["network"], run.out)
    wrapped = distributed.distribute(network, "ddp", run.accelerator)
    groups = _parameter_groups(network, budget.weight_decay)
    optimizer: Any = torch.optim.AdamW(groups, lr=budget.learning_rate, betas=(0.9, 0.99))
    ema = Ema(network, budget.ema_decay)
    judge = Judge({name: tensor.detach().clone() for name, tensor in network.state_dict().items()})
    if state:
        checkpoint.load_optimizer(optimizer, parts["optimizer"], state["optimizer"])
        ema.load({k: t.to(device) for k, t in parts["ema"].items()}, state["ema_steps"])
        judge = _judge(parts["best"], state["judge"])
    optimizer = run.accelerator.prepare(optimizer)

    def save(done: bool) -> None:
        tensors, groups = checkpoint.optimizer_parts(optimizer)
        run.save(
            "transformer", clock, done,
            {"network": network.state_dict(), "ema": ema.tensors(), "optimizer": tensors, "best": judge.best},
            {"optimizer": groups, "ema_steps": ema.steps, "judge": judge.record()},
        )  # fmt: skip

    def make(step: int) -> list[tuple[Share, Batch]]:
        made = []
        for share in run.shares("transformer", step, budget.batch_size, len(data.learn)):
            draws = [seeding.generator(config.seed, "genomics.condition", p).random() for p in share.positions]
            made.append(
                (share, data.batch(data.learn[share.indices].tolist(), np.array(draws) < budget.condition_drop))
            )
        return made

    def enough() -> bool:
        """Judge the average; whether to end. All ranks come here, and none waits in a collective for the main one's work."""

        def look() -> list[float]:
            with ema.applied(network):
                found = judged(network, data, budget.window)
                if found > judge.nats:
                    judge.best = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
                    judge.nats, judge.step, judge.since = found, clock.step, 0
                else:
                    judge.since += 1
            network.train()
            run.log.event("judged", step=clock.step, held_out_nats=found, best=judge.nats)
            return [judge.nats, judge.step, judge.since]

        told = torch.tensor(distributed.by_main(run.accelerator, look) or [0.0] * 3, dtype=torch.float64)
        if run.accelerator.num_processes > 1:
            told = run.accelerator.reduce(told.to(device), reduction="sum").cpu()
        judge.nats, judge.step, judge.since = float(told[0]), int(told[1]), int(told[2])
        judge.looked = clock.step
        return judge.since >= budget.patience

    network.train()
    over = judge.since >= budget.patience  # resumed after the judgement that ended it; the same on all ranks
    with Ahead(make) as coming:
        while not (ended := "patience" if over else run.agree(clock, save)):
            made = coming.take(clock.step)
            rate = clock.set_rate(optimizer)
            run.begin(optimizer)
            for share, whole in made:
                torch.manual_seed(seeding.derived_seed(config.seed, "genomics.dropout", share.positions[0]))
                _backward(run, wrapped, share, whole.to(device), budget.window, patch, sites)
            if run.update(clock, wrapped, optimizer, [share for share, _ in made]):
                ema.update(network)
            clock.advance()
            run.report("transformer", clock, rate, budget.batch_size, coming.waited)
            over = clock.step % budget.judge_every_steps == 0 and enough()
    if judge.looked != clock.step:
        enough()
    run.finish_stage("transformer", clock, ended, save)
    return judge


def _backward(run: Loop, wrapped: Any, share: Share, whole: Batch, window: int, patch: int, sites: int) -> None:
    """Gradients of one share, window by window; they are exchanged in the last window of the last share."""
    size, state = window * patch, None
    length, haplotypes = whole.logit_blc.shape[1], len(whole.group_b)
    for first in range(0, length, size):
        cut = slice(first, first + size)
        last = first + size >= length
        part = Share(share.positions, share.indices, share.weight, share.last and last)
        with run.exchange(wrapped, part):
            with run.autocast():
                logits, after = wrapped(
                    whole.logit_blc[:, cut], whole.features_blf[:, cut], whole.centred_bl[:, cut],
                    whole.residual_bl[:, cut], whole.nats_blc[:, cut], (whole.group_b, whole.covariate_bv), first, state,
                )  # fmt: skip
            loss = -nats(logits.float(), whole.allele_bl[:, cut], whole.known_bl[:, cut]).sum() / (haplotypes * sites)
            run.backward(loss, part, {})
        state = after.detached()


def judged(network: HaplotypeTransformer, data: Data, window: int) -> float:
    """Mean nats per haplotype of the people that judge, their groups unknown."""
    total, device = 0.0, network.weight_c.device
    for first in range(0, len(data.judge), JUDGED_TOGETHER):
        index = data.judge[first : first + JUDGED_TOGETHER].tolist()
        whole = data.batch(index, np.ones(len(index), bool)).to(device)
        total += float(log_likelihood(network, whole, window).sum())
    return total / len(data.judge)


def _parameter_groups(network: HaplotypeTransformer, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and what is learned of single sites decay; gains, biases of layers and the chains' weights do not."""
    decays = [p for name, p in network.named_parameters() if p.ndim > 1 or name == "site_bias"]
    others = [p for name, p in network.named_parameters() if not (p.ndim > 1 or name == "site_bias")]
    return [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _judge(best: dict[str, torch.Tensor], record: dict[str, Any]) -> Judge:
    return Judge(
        best, -math.inf if record["nats"] is None else record["nats"], record["step"], record["since"], record["looked"]
    )


# --- what is learned from ---------------------------------------------------------------------------------------------


def _chosen(config: TransformerConfig, model: LiStephens) -> tuple[np.ndarray, np.ndarray]:
    """int64 haplotypes that take part, rising, and bool, which of those judge: whole people, drawn at random."""
    people = len(model.samples.ids)
    order = seeding.generator(config.seed, "genomics.held_out").permutation(people)
    order = order[: people if config.fit.people is None else config.fit.people]
    count = max(1, round(config.fit.held_out * len(order)))
    if count >= len(order):
        raise UsageError("people to learn from and people to judge", f"{len(order)}", "fit.held_out")
    part_s = np.zeros(people, np.int8)
    part_s[order], part_s[order[:count]] = 1, 2
    part_k = np.repeat(part_s, np.diff(model.samples.first_haplotype))
    rows = np.flatnonzero(part_k)
    return rows, part_k[rows] == 2


def _predictions(
    config: TransformerConfig, model: LiStephens, out: Path, flag: preemption.Flag, progress: Progress | None
) -> None:
    def between() -> None:
        if flag:
            raise preemption.Preempted(
                f"stopped by {flag.signal} between predictions", hint="the same command with --resume"
            )

    tell = None if progress is None else lambda done, total: progress("predicting", done, total)
    rows, _ = _chosen(config, model)
    target_nl = bits.unpack(bits.transpose(model.bits_lw, model.k)[rows], model.n_sites)
    bank = features.bank_of(model, config.bank)
    features.stored(
        bank,
        config.bank,
        model,
        target_nl,
        of_person(model.samples.first_haplotype)[rows],
        out / "cache",
        between=between,
        progress=tell,
    )


def _data(config: TransformerConfig, model: LiStephens, out: Path, value_sv: np.ndarray) -> Data:
    rows, judges = _chosen(config, model)
    known_sv = np.isfinite(value_sv)
    covariate_sv = np.concatenate([np.where(known_sv, value_sv, 0.0), known_sv], axis=1).astype(np.float32)
    return Data(
        facts_of(config, model),
        features.Stored(out / "cache"),
        bits.unpack(bits.transpose(model.bits_lw, model.k)[rows], model.n_sites),
        model.group_of_haplotype_k[rows].astype(np.int64),
        len(model.group_names),
        np.repeat(covariate_sv, np.diff(model.samples.first_haplotype), axis=0)[rows],
        np.flatnonzero(~judges),
        np.flatnonzero(judges),
    )


def facts_of(config: TransformerConfig, model: LiStephens) -> Facts:
    """What the batches of a model share."""
    share_l = bits.popcount_rows(model.bits_lw) / model.k
    return Facts(
        np.array(config.weights, np.float32), share_l.astype(np.float32), features.facts(model), config.network.patch
    )


def components(target_nl: np.ndarray, share_l: np.ndarray, count: int, seed: int) -> np.ndarray:
    """float32 (L, count): vectors whose sum, times (allele - frequency), over a haplotype is its place on the principal
    components of the panel, deviation 1 each; by three rounds of subspace iteration on standardised alleles."""
    deviation_l = np.sqrt(share_l * (1 - share_l)) + 0.05
    standard_nl = ((target_nl - share_l) / deviation_l).astype(np.float32)
    count_here = min(count, *standard_nl.shape)
    draw = seeding.generator(seed, "genomics.components")
    basis = draw.standard_normal((standard_nl.shape[1], count_here)).astype(np.float32)
    for _ in range(3):
        basis, _ = np.linalg.qr(standard_nl.T @ (standard_nl @ basis))
    place_nd = standard_nl @ basis
    _, size, turn = np.linalg.svd(place_nd, full_matrices=False)
    vector_ld = basis @ turn.T * (np.sqrt(len(target_nl)) / np.maximum(size, 1e-3 * size[0]))
    made = np.zeros((target_nl.shape[1], count), np.float32)
    made[:, :count_here] = vector_ld / deviation_l[:, None]
    return made


def _reference_sha256(out: Path) -> str:
    from engine.genomics import run_folder

    return run_folder.checksum(out / "reference")


def _resolved(config: TransformerConfig, device: torch.device) -> TransformerConfig:
    """`config` with precision "auto" decided: bf16 on a GPU that multiplies it, else fp32."""
    if config.training.precision != "auto":
        return config
    sound = device.type == "cuda" and devices.trains_in_bf16(device.type)
    training = config.training.model_copy(update={"precision": "bf16" if sound else "fp32"})
    return config.model_copy(update={"training": training})


def open_run(out: Path, config: TransformerConfig, resume: bool) -> None:
    """Create the run folder, or check that the one there holds this run."""

    def stored(path: Path) -> dict[str, Any]:
        try:
            return load_config(path).model_dump()
        except EngineError as error:
            raise UsageError("the config of a transformer run", str(error), path) from None

    open_folder(
        out, resume, text=dump_config(config), now=config.model_dump(), stored=stored,
        sections=("seed", "copying", "bank", "start", "network", "fit", "phenotypes"),
    )  # fmt: skip
