"""Several processes: what wraps a model, what makes a sharded one whole again, and what is said when a process is lost.

Two ways to train on several processes. Data parallel ("ddp", Accelerate): every process holds the model, and gradients
are averaged. Sharded ("fsdp", PyTorch's `fully_shard`): every process holds a part of weights, gradients, optimizer and
average, and fetches a block when it is needed. Sharding is done here and not by Accelerate, which on a CPU silently gives
data parallel instead (seen with 1.15), so that the sharded path can be tested where there is no GPU.

A checkpoint holds whole tensors either way; it can be resumed on another number of processes and in the other way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from engine.errors import EngineError, UsageError

Made = TypeVar("Made")
TIMEOUT = timedelta(minutes=10)  # no step, and nothing between two steps, may keep another process waiting longer
PEER_LOST_EXIT_CODE = 75


class PeerLost(EngineError):
    """Another process of this job is gone. Exit code 75: not requeued by itself, because it may happen again."""

    exit_code = PEER_LOST_EXIT_CODE


def start() -> Accelerator:
    """Accelerate's view of this process among its peers, with a bound on every wait."""
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])


def distribute(model: nn.Module, parallel: str, accelerator: Accelerator) -> nn.Module:
    """`model` ready for several processes; call it before the optimizer is made, because sharding replaces the parameters.

    Args:
        parallel: "ddp" or "fsdp". Sharding changes `model` in place and returns it; data parallel returns a wrapper.

    Raises:
        UsageError: another word.
    """
    if parallel not in ("ddp", "fsdp"):
        raise UsageError("parallel ddp or fsdp", f"'{parallel}'", "training.parallel")
    if accelerator.num_processes == 1 or parallel == "ddp":
        return accelerator.prepare(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # in place
    return model


def _blocks(model: nn.Module) -> Iterable[nn.Module]:
    """What is fetched at once: every module that stands in a list of modules and has parameters and a forward of its own."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for child in module:
                if not isinstance(child, nn.ModuleList) and any(True for _ in child.parameters()):
                    yield child


def by_main(accelerator: Accelerator, work: Callable[[], Made]) -> Made | None:
    """`work()` of the main process, in a thread of its own; None on the others, who return when it is done.

    Meanwhile all processes ask each other in short turns, so that none runs into a time-out, however long it takes.

    Raises:
        EngineError: on the main process what `work` raised, on the others that it failed.
    """
    if accelerator.num_processes == 1:
        return work()
    main, device = accelerator.is_main_process, accelerator.device

    def here() -> Made:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device is one of each thread
        return work()

    with ThreadPoolExecutor(max_workers=1) as pool:
        made = pool.submit(here) if main else None
        while True:
            over = made is not None and made.done()
            state = [float(not over), float(over and made is not None and made.exception() is not None)]
            busy, failed = accelerator.reduce(torch.tensor([state[0] * main, state[1]], device=device)).tolist()
            if failed and not main:
                raise EngineError("the main process to go on", "it failed", hint="its own line in the log")
            if not busy:
                return made.result() if made is not None else None
            time.sleep(0.05)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of `tensor`."""
    return hasattr(tensor, "full_tensor")


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with sharded ones gathered; every process must call this with the same names."""
    return {name: t.full_tensor() if is_sharded(t) else t for name, t in tensors.items()}  # type: ignore[attr-defined]


def like(value: Tensor, own: Tensor) -> Tensor:
    """The part of whole tensor `value` that belongs beside `own`; itself where `own` is not sharded or has another shape."""
    if not is_sharded(own) or value.shape != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = own.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(value.to(own.device), mesh, own.placements)  # type: ignore[attr-defined]


@contextmanager
def peers(accelerator: Accelerator, where: object) -> Iterator[None]:
    """Inside, the end of another process becomes one line and exit code 75 instead of a trace.

    Gloo notices a closed connection at once; NCCL notices after `TIMEOUT` at the latest, and `srun --wait` before that.
    """
    try:
        yield
    except RuntimeError as error:  # torch raises it, and subclasses, for a lost connection and for a time-out
        if accelerator.num_processes == 1 or not _of_collectives(error):
            raise
        raise PeerLost(
            f"{accelerator.num_processes} living processes",
            f"a lost connection on process {accelerator.process_index} ({str(error).splitlines()[0][:120]})",
            where,
            "its own line in the log; then the same command with --resume",
        ) from None


def _of_collectives(error: RuntimeError) -> bool:
    kinds = tuple(
        kind
        for name in ("DistError", "DistBackendError", "DistNetworkError")
        if (kind := getattr(torch.distributed, name, None))
    )
    words = ("connection", "gloo", "nccl", "timed out", "timeout", "closed by peer", "reset by peer")
    return isinstance(error, kinds) or any(word in str(error).lower() for word in words)
