"""Trains a scan model again and again and is killed each time; run by test_kill_nine.py in a process of its own.

    python killed_training.py CONFIG TABLE OUT KILLS SEED

Everything heavy is imported once; every attempt is a forked child that resumes OUT/killed and dies by SIGKILL: at a random
moment, or at a chosen point inside a checkpoint write (in the middle of a file, before and after each rename and
removal). After each death the newest checkpoint must load whole and must not be older than before. Then the run is ended
in peace. OUT/straight is the same run, never interrupted. Prints one JSON line per death.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from engine.imaging.config import load_config
from engine.imaging.train import train
from engine.training import checkpoint

INSIDE = ("half a file", "before state.json", "before the rename", "after the rename", "before removing an old one",
          "in the middle of removing an old one")  # fmt: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def die_inside(point: str, countdown: int) -> None:
    """Let the `countdown`-th checkpoint write of this process die at `point`."""
    left = {"writes": countdown}
    save_file, write_json, rename, rmtree = checkpoint.save_file, checkpoint.write_json, os.rename, shutil.rmtree

    def half(tensors, path):
        save_file(tensors, path)
        if left["writes"] == 0 and point == "half a file":
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def json_of(path, value):
        if left["writes"] == 0 and point == "before state.json":
            die()
        write_json(path, value)

    def renamed(source, target):
        if not Path(target).name.startswith("step-"):
            return rename(source, target)
        if left["writes"] == 0 and point == "before the rename":
            die()
        rename(source, target)
        if left["writes"] == 0 and point == "after the rename":
            die()
        left["writes"] -= 1

    def removed(path, **keywords):
        if left["writes"] <= 0 and "removed" in str(path) and Path(path).exists():
            if point == "in the middle of removing an old one":
                next(Path(path).iterdir()).unlink()
                die()
            if point == "before removing an old one":
                die()
        rmtree(path, **keywords)

    checkpoint.save_file, checkpoint.write_json, os.rename, shutil.rmtree = half, json_of, renamed, removed


def wait_for_lines(log: Path, more: int, seconds: float) -> None:
    """Until the log has grown by `more` lines, or half a second has passed without any; and then some."""
    size = lambda: log.read_bytes().count(b"\n") if log.is_file() else 0  # noqa: E731
    begin = seen = size()
    since = time.monotonic()
    while size() < begin + more and time.monotonic() - since < 0.5:
        if size() > seen:
            seen, since = size(), time.monotonic()
        time.sleep(0.002)
    time.sleep(seconds)


def attempt(config, table: Path, out: Path, prepare=lambda: None) -> int:
    """Fork a child that trains; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        sys.stderr = open(out.with_suffix(".err"), "a")  # noqa: SIM115
        prepare()
        train(config, table, out, resume=(out / "config.yaml").is_file())
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def main() -> None:
    config_path, table, out, kills, seed = (
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        Path(sys.argv[3]),
        *map(int, sys.argv[4:6]),
    )
    torch.set_num_threads(1)
    config, draw = load_config(config_path), random.Random(seed)
    _, status = os.waitpid(attempt(config, table, out / "straight"), 0)
    assert status == 0, (out / "straight.err").read_text()
    run, newest, done = out / "killed", -1, 0
    while done < kills:
        inside = INSIDE[done // 2 % len(INSIDE)] if done % 2 else ""
        plan = partial(die_inside, inside, draw.randrange(1, 3)) if inside else lambda: None
        child = attempt(config, table, run, plan)
        if not inside:
            wait_for_lines(run / "log.jsonl", draw.randrange(0, 7), draw.uniform(0.0, 0.03))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):  # it was faster than its death
            assert os.WEXITSTATUS(status) == 0, (out / "killed.err").read_text()
            break
        done += 1
        steps = checkpoint.steps(run)
        if steps:
            _, state = checkpoint.load(run)  # raises when it is not whole
            assert state["step"] >= newest, f"step {newest} was lost"
            newest = state["step"]
        print(json.dumps({"death": done, "where": inside or "anywhere", "step": newest}), flush=True)
    _, status = os.waitpid(attempt(config, table, run), 0)
    assert status == 0, (out / "killed.err").read_text()


if __name__ == "__main__":
    main()
