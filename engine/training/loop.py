"""What a training loop asks at each step besides its own networks: which samples are its share, whether to stop or to save,
whether the gradients are sound, and what goes into the log.

The loop itself stays visible in `train`; this is what two of them would otherwise repeat. All answers are agreed by all
ranks, in short collectives only: no rank ever waits for another's disk. The order of samples is a function of (seed,
stage, epoch), so that data position is one number, and a resumed run, or one on another number of processes, sees
the samples of the uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from engine import seeding
from engine.errors import EngineError
from engine.training import checkpoint, preemption
from engine.training.background import Background
from engine.training.clock import Clock
from engine.training.distributed import whole
from engine.training.lock import RunLock
from engine.training.log import Log
from engine.training.usage import gpu_joules, peak_memory_gib

Save = Callable[[bool], None]


class Settings(Protocol):
    """What a loop needs of a config's section `training`."""

    precision: Any
    accumulate: int
    checkpoint_every_steps: int | None
    checkpoint_every_minutes: float | None
    keep_checkpoints: int
    log_every_steps: int
    gradient_clip: float
    bad_step_limit: int


@dataclass(frozen=True)
class Share:
    """One process's part of a global batch, or of one accumulated part of it.

    Attributes:
        positions: places in the stream of samples; they name the draws.
        indices: which training items those are.
        weight: what the mean loss over this share is multiplied with, so that gradients summed over shares and averaged over
            processes are those of the mean over the global batch. 0 where a process has no sample left in an uneven batch;
            it then repeats another's, because all must take part in the exchange.
        last: gradients are exchanged in this share.
    """

    positions: list[int]
    indices: list[int]
    weight: float
    last: bool


def shares(
    seed: int, purpose: str, step: int, batch_size: int, items: int, *, rank: int = 0, world: int = 1, parts: int = 1
) -> list[Share]:
    """`parts` shares of global batch `step` for process `rank` of `world`; batch sizes need not be divisible.

    Process r takes every world-th sample from the r-th, so that the same samples make a batch on any number of processes.
    `purpose` names the draw of the order, one permutation of all `items` per epoch.
    """
    start = step * batch_size
    own = list(range(start + rank, start + batch_size, world))
    order: dict[int, Any] = {}

    def item(position: int) -> int:
        epoch = position // items
        if epoch not in order:
            order[epoch] = seeding.generator(seed, purpose, epoch).permutation(items)
        return int(order[epoch][position % items])

    made = []
    for part in range(parts):
        positions = own[part * len(own) // parts : (part + 1) * len(own) // parts]
        weight = len(positions) * world / batch_size
        positions = positions or [start]
        made.append(Share(positions, [item(p) for p in positions], weight, part + 1 == parts))
    return made


@dataclass
class Loop:
    """One run's answers; `train` makes one and asks it in both stages.

    Attributes:
        room: "imaging" or "genomics"; begins the names of its draws.
        seed: the run's seed.
        model: what a sampler must know besides weights; goes into every checkpoint.
        steps_before: steps of earlier stages; checkpoints are numbered over all stages.
        joules_before: energy of earlier sittings.
        lock: held on the run folder by the main process; asked before every checkpoint.
    """

    room: str
    settings: Settings
    seed: int
    out: Path
    accelerator: Accelerator
    flag: preemption.Flag
    log: Log
    model: dict[str, Any]
    lock: RunLock | None = None
    steps_before: int = 0
    joules_before: float = 0.0
    _writer: Background = field(default_factory=Background)
    _terms: dict[str, Tensor] = field(default_factory=dict)
    _reported: tuple[int, float, float] = (0, 0.0, 0.0)  # step, wall time, seconds waited for data

    def __post_init__(self) -> None:
        self._joules = gpu_joules(self.accelerator.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 arithmetic where the config says so; weights, losses and optimizer stay float32."""
        if self.settings.precision == "bf16":
            return torch.autocast(self.accelerator.device.type, torch.bfloat16)
        return nullcontext()

    def shares(self, stage: str, step: int, batch_size: int, items: int) -> list[Share]:
        """This process's shares of global batch `step`."""
        return shares(
            self.seed, f"{self.room}.order.{stage}", step, batch_size, items, rank=self.accelerator.process_index,
            world=self.accelerator.num_processes, parts=self.settings.accumulate,
        )  # fmt: skip

    # --- stop, save, go on ---

    def agree(self, clock: Clock, save: Save) -> str:
        """Let all ranks agree on the time (the main one's), on a request to stop, and on a failed write; checkpoint when due.

        Returns the bound that ended the stage, or "".

        Raises:
            preemption.Preempted: a signal reached any rank; the checkpoint is on disk when this is raised, on all ranks.
            EngineError: a checkpoint could not be written.
        """
        main = self.accelerator.is_main_process
        seen = self._summed([clock.read() if main else 0.0, bool(self.flag), self._writer.failed])
        clock.seconds = seen[0]
        if seen[2]:
            self._write_failed()
        ended = clock.bound()
        if ended:
            return ended
        if seen[1]:
            save(False)
            self.settle()
            signal = self.flag.signal or "another rank"
            self.log.event("preempted", signal=signal, stage_step=clock.step)
            raise preemption.Preempted(
                f"stopped by {signal} at step {clock.step}", hint="the same command with --resume"
            )
        every, minutes = self.settings.checkpoint_every_steps, self.settings.checkpoint_every_minutes
        by_steps = bool(every) and clock.step > clock.saved_step and clock.step % (every or 1) == 0
        by_time = minutes is not None and clock.seconds - clock.saved_seconds >= 60.0 * minutes
        if by_steps or by_time:
            save(False)
        return ""

    def save(self, stage: str, clock: Clock, done: bool, parts: checkpoint.Parts, entries: dict[str, Any]) -> None:
        """Hand a checkpoint to the writer; every rank calls this, because a sharded model is gathered here."""
        self.settle()
        clock.saved_step, clock.saved_seconds = clock.step, clock.seconds
        kept = {name: whole(tensors) for name, tensors in parts.items()}
        joules = self.joules()
        if not self.accelerator.is_main_process:
            return
        step = clock.step + self.steps_before
        state = {
            "stage": stage,
            "stage_step": clock.step,
            "seconds": clock.read(),
            "bad_steps": clock.bad_steps,
            "done": done,
            "gpu_joules": joules,
            "model": dict(self.model),
            **entries,
        }
        copied = checkpoint.snapshot(kept)

        def write() -> None:
            if self.lock is not None:
                self.lock.check()
            checkpoint.save(self.out, step, copied, state, keep=self.settings.keep_checkpoints)

        self._writer.start(write)

    def settle(self) -> None:
        """Return on all ranks when the last checkpoint is on disk. Ranks ask each other in short turns, so that none runs
        into a collective's time-out, however slow the disk is."""
        while True:
            _, busy, failed = self._summed([0.0, self._writer.busy, self._writer.failed])
            if failed:
                self._write_failed()
            if not busy:
                return
            time.sleep(0.05)

    def joules(self) -> float | None:
        """Energy of the GPUs of all ranks over all sittings, in joules; None where no rank can tell. All ranks call this."""
        now = gpu_joules(self.accelerator.device)
        known = now is not None and self._joules is not None
        used = (now or 0.0) - (self._joules or 0.0) if known else 0.0
        total, ranks = self._summed([used, known])
        return self.joules_before + total if ranks else None

    def _write_failed(self) -> None:
        self._writer.wait()  # raises on the main process
        raise EngineError("a checkpoint", "the main process could not write it", self.out, "its line in the log")

    def _summed(self, values: Iterable[float]) -> list[float]:
        """Sums over all ranks, float64."""
        seen = torch.tensor([float(v) for v in values], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            seen = self.accelerator.reduce(seen.to(self.accelerator.device), reduction="sum").cpu()
        return seen.tolist()

    # --- gradients ---

    @contextmanager
    def exchange(self, model: nn.Module, share: Share) -> Iterator[None]:
        """Around forward and backward of one share: gradients are exchanged in the last one only."""
        if hasattr(model, "set_requires_gradient_sync"):  # a sharded model
            model.set_requires_gradient_sync(share.last)  # type: ignore[operator]
            yield
            return
        with nullcontext() if share.last else self.accelerator.no_sync(model):
            yield

    def backward(self, loss: Tensor, share: Share, terms: dict[str, Tensor]) -> None:
        """Add the gradient of one share; `terms` are what the log will show, averaged over the global batch."""
        for name, value in {"loss": loss, **terms}.items():
            part = share.weight * value.detach()
            self._terms[name] = self._terms[name] + part if name in self._terms else part
        self.accelerator.backward(loss if share.weight == 1.0 else loss * share.weight)

    def update(self, clock: Clock, model: nn.Module, optimizer: Any, own: list[Share]) -> bool:
        """One step of the optimizer, unless the loss or gradient of any rank is not finite: then all skip it and count it.

        Call `begin` first, then `backward` for every share.

        Raises:
            EngineError: more bad steps than the limit; names the items of the last one.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        flags = torch.zeros(world, device=self.accelerator.device)
        flags[rank] = (~torch.isfinite(self._terms["loss"])).float()
        if world > 1:
            flags = self.accelerator.reduce(flags, reduction="sum")
        bad = flags.nonzero().flatten().tolist()
        if not bad:
            norm = self.accelerator.clip_grad_norm_(model.parameters(), self.settings.gradient_clip)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            if math.isfinite(float(norm)):  # ranks hold the same gradients here
                optimizer.step()
                return True
        clock.bad_steps += 1
        items = self._items(own, bad or list(range(world)))
        self.log.event("bad_step", stage_step=clock.step, items=items, ranks=bad, count=clock.bad_steps)
        if clock.bad_steps > self.settings.bad_step_limit:
            raise EngineError(
                "finite losses",
                f"{clock.bad_steps} bad steps, the last on training items {items}",
                f"step {clock.step}",
                "a lower learning_rate, or precision fp32",
            )
        return False

    def begin(self, *optimizers: Any) -> None:
        """Start a step: no gradients, no terms."""
        self._terms = {}
        for optimizer in optimizers:
            if optimizer is not None:
                optimizer.zero_grad()

    def _items(self, own: list[Share], ranks: list[int]) -> list[int]:
        """Training items of the processes `ranks` in this step."""
        mine = [i for share in own if share.weight for i in share.indices]
        world = self.accelerator.num_processes
        if world == 1:
            return mine
        most = torch.tensor([len(mine)], device=self.accelerator.device)
        width = int(self.accelerator.gather(most).max())
        row = torch.full((1, width), -1, device=self.accelerator.device)
        row[0, : len(mine)] = torch.tensor(mine, device=self.accelerator.device)
        rows = self.accelerator.gather(row).tolist()
        return [i for rank in ranks for i in rows[rank] if i >= 0]

    # --- the log ---

    def report(self, stage: str, clock: Clock, rate: float, batch_size: int, waited: float = 0.0) -> None:
        """One log line per interval: step, terms averaged over ranks, samples per second of this interval, seconds
        waited for data, peak memory, time left. Every rank calls this, after `clock.advance`."""
        self.log.bar(stage, clock.progress())
        step, then, waited_then = self._reported
        now = time.monotonic()
        if step >= clock.step or then == 0.0:  # the first step of a stage or a sitting opens the interval
            self._reported = (clock.step, now, waited)
            step, then, waited_then = clock.step, now, waited
        if clock.step % self.settings.log_every_steps:
            return
        values = dict(self._terms)
        if self.accelerator.num_processes > 1 and values:
            stacked = torch.stack([v.double() for v in values.values()])
            values = dict(zip(values, self.accelerator.reduce(stacked, reduction="mean")))
        speed = (clock.step - step) * batch_size / (now - then) if clock.step > step else math.nan
        self.log.event(
            stage,
            step=clock.step,
            **{name: float(value) for name, value in values.items()},
            rate=rate,
            samples_per_second=speed,
            waited=round(waited - waited_then, 3),
            memory_gib=peak_memory_gib(self.accelerator.device),
            seconds=clock.read(),
            seconds_left=clock.left(),
            share=clock.progress(),
        )
        self._reported = (clock.step, now, waited)

    def finish_stage(self, stage: str, clock: Clock, ended: str, save: Save) -> None:
        """Note what ended the stage and write its last checkpoint."""
        facts = {
            "steps": clock.step,
            "seconds": round(clock.seconds, 1),
            "ended_by": ended,
            "bad_steps": clock.bad_steps,
        }
        self.model["stages"] = {**self.model.get("stages", {}), stage: facts}
        save(True)
        self.settle()
        self._reported = (0, 0.0, 0.0)
        self.log.event("stage_done", stage=stage, **facts)
