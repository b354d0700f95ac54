"""What goes wrong on a cluster, on purpose: no room, no right to write, damage, a second job, clocks that disagree."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from engine.errors import CorruptRun, UsageError
from engine.imaging.config import parse_config
from engine.imaging.train import train
from engine.training import checkpoint
from engine.training.lock import RunLock

SAVE = """import resource, sys, torch
from engine.errors import EngineError
from engine.training import checkpoint
from engine.training.lock import RunLock
{before}
try:
    {what}
except EngineError as error:
    print(error)
"""


def said(before: str, what: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SAVE.format(before=before, what=what)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_disk_that_fills_up_in_the_middle_of_a_file_costs_nothing_but_this_checkpoint(tmp_path):
    """A real write that fails half-way: the limit on the size of a file stands for the full disk."""
    checkpoint.save(tmp_path, 1, {"model": {"w": torch.ones(3)}}, {})
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    line = said(limit, f"checkpoint.save({str(tmp_path)!r}, 2, {{'model': {{'w': torch.ones(90_000)}}}}, {{}})")
    assert "step-000002: expected room for a checkpoint" in line
    assert "with --resume goes on from step 1" in line
    assert checkpoint.steps(tmp_path) == [1]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    checkpoint.save(tmp_path, 2, {"model": {"w": torch.ones(90_000)}}, {})  # there is room again
    assert checkpoint.load(tmp_path)[1]["step"] == 2


def test_a_run_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    """Root may write anywhere: the attempt is made as nobody."""
    run = tmp_path / "run"
    checkpoint.save(run, 1, {"model": {"w": torch.ones(3)}}, {})
    for folder in (run / "checkpoints", run):
        folder.chmod(0o555)
    for parent in (tmp_path, *tmp_path.parents):  # nobody must be able to look into the folders above
        if parent.owner() == "root" and os.getuid() == 0 and parent.stat().st_mode & 0o001 == 0:
            parent.chmod(parent.stat().st_mode | 0o011)
    nobody = "import os; os.getuid() == 0 and os.setuid(65534)"
    line = said(nobody, f"checkpoint.save({str(run)!r}, 2, {{'model': {{'w': torch.ones(3)}}}}, {{}})")
    assert "expected room for a checkpoint, got Permission denied" in line
    line = said(nobody, f"RunLock({str(run)!r}).acquire()")
    assert "expected a run folder that can be written, got Permission denied" in line
    for folder in (run, run / "checkpoints"):
        folder.chmod(0o755)


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_noise):
    """A small run with a checkpoint every four steps: (config, table, run folder)."""
    folder = tmp_path_factory.mktemp("drills")
    write_noise(folder, 4)
    config = parse_config(
        {
            "data": {"size": [8, 8, 8]},
            "autoencoder": {"steps": 4, "batch_size": 2, "widths": [4], "latent_channels": 1},
            "flow": {"steps": 12, "batch_size": 2, "widths": [4], "attention_levels": [], "embedding_width": 8},
            "training": {"precision": "fp32", "checkpoint_every_steps": 4, "keep_checkpoints": 3, "log_every_steps": 1},
        }
    )
    train(config, folder / "table.csv", folder / "run")
    return config, folder / "table.csv", folder / "run"


def test_a_second_job_is_refused_before_it_changes_anything(run):
    config, table, out = run
    before = (out / "log.jsonl").read_bytes()
    with RunLock(out), pytest.raises(UsageError, match="no other job writes, got one held by process"):
        train(config, table, out, resume=True)
    assert (out / "log.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_refused_the_one_before_it_is_offered_and_goes_on_to_the_same_end(run):
    config, table, out = run
    assert checkpoint.steps(out) == [8, 12, 16]
    straight = checkpoint.snapshot(checkpoint.load(out)[0])  # what is loaded is the file itself, mapped
    file = checkpoint.folder_of(out, 16) / "denoiser.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptRun, match=r"step-000016: .*denoiser.safetensors.*remove it and resume from step 12"):
        train(config, table, out, resume=True)
    checkpoint._remove(checkpoint.folder_of(out, 16))
    train(config, table, out, resume=True)
    again = checkpoint.load(out)[0]
    assert all(torch.equal(t, again[part][k]) for part, tensors in straight.items() for k, t in tensors.items())


def test_the_newest_checkpoint_is_told_by_its_step_and_not_by_a_clock(run):
    """Nodes whose clocks differ write files of the past and of the future."""
    _, _, out = run
    for place, step in enumerate(checkpoint.steps(out)):
        for file in checkpoint.folder_of(out, step).iterdir():
            os.utime(file, (2e9 - 1e9 * place, 2e9 - 1e9 * place))
        os.utime(checkpoint.folder_of(out, step), (2e9 - 1e9 * place, 2e9 - 1e9 * place))
    assert checkpoint.load(out)[1]["step"] == 16


def test_half_a_line_in_the_log_is_closed_before_the_next(run):
    config, table, out = run
    with (out / "log.jsonl").open("ab") as stream:
        stream.write(b'{"event": "flow", "st')
    train(config, table, out, resume=True)
    lines = (out / "log.jsonl").read_text().splitlines()
    assert lines.count('{"event": "flow", "st') == 1
    assert all(json.loads(line) for line in lines if line != '{"event": "flow", "st')
