"""kill -9 at random points and inside checkpoint writes: nothing is lost but the steps since the last checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.imaging.config import dump_config, parse_config
from engine.training import checkpoint

CONFIG = {
    "data": {"size": [8, 8, 8], "covariates": {"age": {"kind": "continuous"}}},
    "autoencoder": {"steps": 60, "batch_size": 2, "widths": [4], "latent_channels": 1, "shift_voxels": 1},
    "flow": {
        "steps": 140, "batch_size": 3, "widths": [4], "attention_levels": [], "embedding_width": 8, "views": 2,
        "shift_voxels": 1, "dropout": 0.1,
    },
    "training": {"precision": "fp32", "log_every_steps": 1, "checkpoint_every_steps": 3, "keep_checkpoints": 2},
}  # fmt: skip


def curve(run: Path) -> dict[tuple[str, int], dict]:
    """What the log says last of each step: a killed run repeats the steps since its last checkpoint."""
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if line.endswith("}")]
    kept = ("loss", "rate", "l1", "gradient", "kl", "velocity_mse")
    return {
        (e["event"], e["step"]): {k: e[k] for k in kept if k in e}
        for e in events
        if e["event"] in ("autoencoder", "flow")
    }


@pytest.mark.parametrize("kills", [22, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_is_the_run_that_never_was(tmp_path, kills, write_noise):
    config = parse_config(CONFIG)
    write_noise(tmp_path, 6)
    if kills > 100:
        config.autoencoder.steps, config.flow.steps = 600, 1400
    (tmp_path / "config.yaml").write_text(dump_config(config))
    done = subprocess.run(
        [
            sys.executable, str(Path(__file__).with_name("killed_training.py")), str(tmp_path / "config.yaml"),
            str(tmp_path / "table.csv"), str(tmp_path), str(kills), "3",
        ],
        capture_output=True, text=True, timeout=100 + 5 * kills, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    deaths = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(deaths) >= 20
    assert len({d["where"] for d in deaths}) == 7  # anywhere, and all six points inside a write
    assert len({d["step"] for d in deaths}) > 5  # in many places of the run
    straight, killed = checkpoint.load(tmp_path / "straight"), checkpoint.load(tmp_path / "killed")
    assert straight[1]["step"] == killed[1]["step"]
    for part, tensors in straight[0].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, killed[0][part][name]), f"{part} {name}"
    assert straight[1]["optimizer"] == killed[1]["optimizer"]
    assert straight[1]["ema_steps"] == killed[1]["ema_steps"]
    assert curve(tmp_path / "straight") == curve(tmp_path / "killed")
    assert len(curve(tmp_path / "killed")) == config.autoencoder.steps + config.flow.steps
    assert not list((tmp_path / "killed").rglob(".partial-*"))
    assert not (tmp_path / "killed" / "lock.json").exists()
