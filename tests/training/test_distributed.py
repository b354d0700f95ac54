"""Two processes train as one, data parallel and sharded; what one of them meets all of them agree on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.imaging.config import dump_config, parse_config
from engine.training import checkpoint
from engine.training.loop import shares

TOLERANCE = (
    2e-4  # of a loss, relative: the order of summation differs, and AdamW's first steps are signs times the rate
)
CONFIG = {
    "data": {"size": [8, 8, 8], "covariates": {"age": {"kind": "continuous"}}},
    "autoencoder": {"steps": 4, "batch_size": 3, "widths": [8], "latent_channels": 2, "warmup_steps": 20},
    "flow": {
        "steps": 8, "batch_size": 5, "widths": [8, 8], "attention_levels": [1], "embedding_width": 8, "views": 2,
        "warmup_steps": 20,
    },
    "training": {"precision": "fp32", "log_every_steps": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, write_noise) -> tuple[Path, dict[str, dict]]:
    """The folder of all scenarios, and how each ended."""
    folder = tmp_path_factory.mktemp("two")
    write_noise(folder, 9)
    (folder / "config.yaml").write_text(dump_config(parse_config(CONFIG)))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(folder)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ended = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return folder, {e["scenario"]: e for e in ended}


def losses(run: Path) -> np.ndarray:
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return np.array([e["loss"] for e in events if e["event"] in ("autoencoder", "flow")])


@pytest.mark.parametrize("name", ["ddp", "parts", "fsdp"])
def test_two_processes_train_as_one_though_batches_do_not_divide(made, name):
    """Batches of 3 and 5 over 2 processes, whole or in two parts: the losses of one process, step by step."""
    folder, ended = made
    assert ended["alone"]["codes"] == [0], ended["alone"]
    assert ended[name]["codes"] == [0, 0], ended[name]
    start = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()][1]
    assert (start["event"], start["processes"]) == ("start", 2)
    held = [float((folder / f"{name}.{rank}.share").read_text()) for rank in range(2)]
    assert max(held) < 0.7 if name == "fsdp" else held == [1, 1]  # of the denoiser's parameters
    one, two = losses(folder / "alone"), losses(folder / name)
    assert len(one) == 12
    assert np.abs(two / one - 1).max() < TOLERANCE, two / one - 1
    first, second = checkpoint.load(folder / "alone"), checkpoint.load(folder / name)
    for part, tensors in first[0].items():
        assert {k: t.shape for k, t in tensors.items()} == {k: t.shape for k, t in second[0][part].items()}
    moved = max(float((t - second[0]["ema"][k]).abs().max()) for k, t in first[0]["ema"].items())
    assert moved < 1e-3


def test_a_sharded_run_stopped_by_one_ranks_signal_goes_on_with_one_process(made):
    """Both ranks leave with 85 after one checkpoint, of whole tensors, that another number of processes resumes."""
    folder, ended = made
    assert ended["stopped"]["codes"] == [85, 85], ended["stopped"]
    assert ended["stopped resumed"]["codes"] == [0], ended["stopped resumed"]
    assert np.abs(losses(folder / "stopped") / losses(folder / "alone") - 1).max() < TOLERANCE


def test_a_killed_rank_ends_the_other_in_bounded_time_with_one_line(made):
    ended = made[1]["killed"]
    assert ended["codes"] == [75, -9]
    assert ended["seconds"] < 60
    assert "expected 2 living processes, got a lost connection on process 0" in ended["said"][0]
    assert "--resume" in ended["said"][0]


def test_a_full_disk_ends_all_ranks_with_one_line(made):
    folder, ended = made
    assert ended["full"]["codes"] == [2, 2]
    assert ended["full"]["seconds"] < 60
    assert "No space left on device" in ended["full"]["said"][0]
    assert "goes on from step 6" in ended["full"]["said"][0]  # 4 of the first stage, 2 of the second
    assert "the main process could not write it" in ended["full"]["said"][1]
    assert checkpoint.load(folder / "full")[1]["step"] == 6
    assert not list((folder / "full").rglob(".partial-*"))


def test_a_bad_loss_on_one_rank_is_skipped_by_all_and_its_items_are_named(made):
    folder, ended = made
    assert ended["guard"]["codes"] == [0, 0], ended["guard"]
    bad = [json.loads(line) for line in (folder / "guard.jsonl").read_text().splitlines()]
    assert [(e["event"], e["stage_step"], e["ranks"]) for e in bad] == [("bad_step", 2, [1])]
    assert bad[0]["items"] == json.loads((folder / "guard.1.items").read_text())


def test_work_of_the_main_process_may_last_longer_than_any_collective(made):
    """4 s of work where no wait may last 2 s; a failure ends both, each with one line."""
    _, ended = made
    assert ended["slow"]["codes"] == [0, 0], ended["slow"]
    assert ended["slow"]["seconds"] > 4
    assert ended["failing"]["codes"] == [2, 2], ended["failing"]
    assert ended["failing"]["said"][0] == "row 3: expected a scan, got none"
    assert "the main process" in ended["failing"]["said"][1]


@pytest.mark.parametrize(("world", "parts"), [(1, 1), (2, 1), (1, 2), (3, 2), (4, 3), (7, 2)])
def test_shares_make_the_global_batch(world, parts):
    """Every sample once, whatever the number of processes and parts, and weights under which gradients add up to the mean."""
    batch, items = 5, 7
    for step in (0, 1, 9):
        whole = shares(3, "order", step, batch, items)[0]
        assert (len(whole.positions), whole.weight) == (batch, 1.0)
        split = [
            s for r in range(world) for s in shares(3, "order", step, batch, items, rank=r, world=world, parts=parts)
        ]
        counted = [s for s in split if s.weight]
        assert sorted(p for s in counted for p in s.positions) == whole.positions
        assert {p: i for s in split for p, i in zip(s.positions, s.indices)} == dict(
            zip(whole.positions, whole.indices)
        )
        values = torch.arange(100.0)
        mean = sum(s.weight * values[s.positions].mean() for s in split) / world
        assert float(mean) == pytest.approx(float(values[whole.positions].mean()), rel=1e-6)
        assert sum(s.last for s in split) == world


def test_an_epoch_is_every_item_once():
    seen = [i for step in range(7) for i in shares(0, "order", step, 2, 7)[0].indices]
    assert sorted(seen) == sorted([*range(7)] * 2)
    assert seen[:7] != seen[7:]
