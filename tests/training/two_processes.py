"""Two training processes, started by fork so that everything heavy is imported once; run by test_distributed.py.

    python two_processes.py FOLDER       (config.yaml and table.csv lie there)

Every scenario forks two ranks that meet over gloo, in a folder of its own; prints one JSON line each:
{"scenario", "codes": exit codes, "seconds", "said": what each rank's error was}.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from engine.errors import EngineError, InputError
from engine.imaging.config import apply_overrides, load_config, parse_config
from engine.imaging.train import train
from engine.training import checkpoint, distributed, preemption
from engine.training.clock import Clock
from engine.training.log import Log
from engine.training.loop import Loop

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()


def ranks(scenario: str, work: Callable[[int], None], world: int = 2) -> None:
    """Run `work(rank)` in forked processes and report how they ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began, children = time.monotonic(), []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        file = FOLDER / f"{scenario}.{rank}.said"
        try:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            os.environ |= {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
            if world > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            work(rank)
        except EngineError as error:
            file.write_text(str(error))
            os._exit(error.exit_code)
        except BaseException as error:
            file.write_text(f"{type(error).__name__}: {error}")
            os._exit(1)
        os._exit(0)
    codes = []
    for child in children:
        _, status = os.waitpid(child, 0)
        codes.append(os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status))
    files = [FOLDER / f"{scenario}.{rank}.said" for rank in range(world)]
    said = [f.read_text() if f.exists() else "" for f in files]
    line = {"scenario": scenario, "codes": codes, "seconds": round(time.monotonic() - began, 2), "said": said}
    print(json.dumps(line), flush=True)


def run(
    name: str,
    *overrides: str,
    resume: bool = False,
    world: int = 2,
    at: tuple[int, Callable[[int], None]] | None = None,
):
    """Train in the folder `name`; `at` = (flow step, what each rank does before it)."""
    config = parse_config(apply_overrides(load_config(FOLDER / "config.yaml").model_dump(), overrides))

    def work(rank: int) -> None:
        if at:
            agree = Loop.agree

            def watched(self, clock, save):
                if self.steps_before and clock.step == at[0]:
                    at[1](rank)
                return agree(self, clock, save)

            Loop.agree = watched
        distribute = distributed.distribute

        def counted(model, parallel, accelerator):
            made = distribute(model, parallel, accelerator)
            mine = sum(p.to_local().numel() if distributed.is_sharded(p) else p.numel() for p in model.parameters())
            (FOLDER / f"{name}.{rank}.share").write_text(str(mine / sum(p.numel() for p in model.parameters())))
            return made

        distributed.distribute = counted  # what is written last is of the denoiser
        train(config, FOLDER / "table.csv", FOLDER / name, resume=resume)

    ranks(f"{name}{' resumed' if resume else ''}", work, world)


def raise_signal(rank: int) -> None:
    """USR1 to one rank only."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)


def killed(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()


def full_disk(rank: int) -> None:
    def no_room(*_):
        raise OSError(28, "No space left on device")

    checkpoint.save_file = no_room


def not_a_number(rank: int) -> None:
    """The guard by itself: the loss of rank 1 is not finite in step 2; sums of rank 0 stay finite."""
    accelerator = distributed.start()
    config = load_config(FOLDER / "config.yaml")
    log = Log(FOLDER / "guard.jsonl", enabled=accelerator.is_main_process)
    loop = Loop("imaging", config.training, 0, FOLDER, accelerator, preemption.Flag(), log, {})
    torch.manual_seed(0)
    plain = nn.Linear(2, 1)
    model = distributed.distribute(plain, "ddp", accelerator)
    optimizer = accelerator.prepare(torch.optim.SGD(plain.parameters(), lr=0.1))
    clock = Clock(config.flow, {})
    for step in range(4):
        own = loop.shares("guard", step, 5, 7)
        loop.begin(optimizer)
        before = plain.weight.detach().clone()
        for share in own:
            with loop.exchange(model, share):
                loss = model(torch.ones(len(share.positions), 2)).square().mean()
                loop.backward(loss * (float("nan") if (step, rank) == (2, 1) else 1.0), share, {})
        moved = loop.update(clock, model, optimizer, own)
        assert moved == (step != 2), step
        assert torch.equal(before, plain.weight) == (step == 2), step
        clock.advance()
    assert clock.bad_steps == 1
    items = [i for share in loop.shares("guard", 2, 5, 7) for i in share.indices]
    (FOLDER / f"guard.{rank}.items").write_text(json.dumps(items))


def slow_main(rank: int) -> None:
    """The main process works for longer than any collective may last."""
    distributed.TIMEOUT = timedelta(seconds=2)
    accelerator = distributed.start()
    made = distributed.by_main(accelerator, lambda: time.sleep(4) or "made")
    assert made == (None if rank else "made")
    accelerator.wait_for_everyone()


def failing_main(rank: int) -> None:
    def work() -> None:
        raise InputError("a scan", "none", "row 3")

    distributed.by_main(distributed.start(), work)


def main() -> None:
    torch.set_num_threads(1)
    run("alone", world=1)
    run("ddp")
    run("parts", "training.accumulate=2")
    run("fsdp", "training.parallel=fsdp", "training.accumulate=2")
    run("stopped", "training.parallel=fsdp", at=(4, raise_signal))
    run("stopped", resume=True, world=1)
    run("killed", at=(4, killed))
    run("full", "training.checkpoint_every_steps=2", at=(3, full_disk))
    ranks("guard", not_a_number)
    ranks("slow", slow_main)
    ranks("failing", failing_main)


if __name__ == "__main__":
    main()
