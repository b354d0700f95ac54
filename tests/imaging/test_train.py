"""Training: the run folder, resume bit for bit, two processes, guards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from engine import devices
from engine.errors import CorruptRun, EngineError, Unsupported, UsageError
from engine.imaging import train as train_module
from engine.imaging.config import apply_overrides, dump_config, load_config, parse_config
from engine.imaging.train import train
from engine.training import checkpoint
from engine.training.preemption import Preempted


def lines(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def changed(config, *overrides):
    return parse_config(apply_overrides(config.model_dump(), overrides))


def test_run_folder_is_complete(tiny_run, tiny_config, table):
    assert load_config(tiny_run / "config.yaml") == tiny_config
    record = json.loads((tiny_run / "provenance.json").read_text())
    assert record["stages"]["flow"]["ended_by"] == "steps"
    assert record["inputs"][0]["name"] == "volumes.csv"
    assert str(table.parent) not in (tiny_run / "provenance.json").read_text()
    assert checkpoint.steps(tiny_run) == [4, 10]
    parts, state = checkpoint.load(tiny_run)
    assert {*parts} == {"autoencoder", "denoiser", "ema", "optimizer"}
    assert [c["name"] for c in state["model"]["covariates"]] == ["age", "sex"]
    assert state["model"]["centre_mm"] == pytest.approx([5.0, 5.0, 5.0])
    assert not list(tiny_run.rglob("*.pt")) + list(tiny_run.rglob("*.pkl")) + list(tiny_run.rglob("*.bin"))


def test_latents_have_unit_statistics_over_the_training_side(tiny_run):
    """Mean and deviation are stored, and standardised draws have mean 0 and deviation 1 per channel."""
    from safetensors.torch import load_file

    cache = load_file(tiny_run / "cache" / "latents.safetensors")
    draws = cache["mean"] + cache["deviation"] * torch.randn(cache["mean"].shape, generator=torch.manual_seed(0))
    standard = (draws - cache["mean_c"].view(1, 1, -1, 1, 1, 1)) / cache["deviation_c"].view(1, 1, -1, 1, 1, 1)
    assert standard.mean(dim=(0, 1, 3, 4, 5)).abs().max() < 0.05
    assert (standard.std(dim=(0, 1, 3, 4, 5)) - 1).abs().max() < 0.05
    assert not torch.equal(cache["mean"][0], cache["mean"][1])  # the second view is a shifted one


@pytest.mark.parametrize(("stage", "share"), [("autoencoder", 0.5), ("flow", 0.5)])
def test_interrupted_run_resumes_bit_for_bit(tiny_run, tiny_config, table, tmp_path, stage, share):
    """SIGUSR1 in the middle of a stage: checkpoint, exit code 85; resumed parameters equal the uninterrupted ones."""

    def interrupt(what, done, total):
        if what == stage and done >= share * total:
            os.kill(os.getpid(), signal.SIGUSR1)

    out = tmp_path / "run"
    with pytest.raises(Preempted) as stopped:
        train(tiny_config, table, out, progress=interrupt)
    assert stopped.value.exit_code == 85
    _, state = checkpoint.load(out)
    assert (state["stage"], state["stage_step"], state["done"]) == (stage, 2 if stage == "autoencoder" else 3, False)
    train(tiny_config, table, out, resume=True)
    straight, resumed = checkpoint.load(tiny_run)[0], checkpoint.load(out)[0]
    assert straight.keys() == resumed.keys()
    for part, tensors in straight.items():
        assert tensors.keys() == resumed[part].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, resumed[part][name]), f"{part} {name}"


def test_adversarial_stage_resumes_bit_for_bit(tiny_config, table, tmp_path):
    config = changed(
        tiny_config, "autoencoder.adversarial_weight=0.1", "autoencoder.adversarial_start=0.25", "flow.steps=1",
        "data.size=[32,32,32]", "autoencoder.discriminator_width=4",
    )  # fmt: skip

    def interrupt(what, done, total):
        if what == "autoencoder" and done >= 50:
            os.kill(os.getpid(), signal.SIGUSR1)

    train(config, table, tmp_path / "straight")
    with pytest.raises(Preempted):
        train(config, table, tmp_path / "resumed", progress=interrupt)
    assert "adversary_optimizer" in checkpoint.load(tmp_path / "resumed")[0]
    train(config, table, tmp_path / "resumed", resume=True)
    one, two = (checkpoint.load(tmp_path / name)[0]["autoencoder"] for name in ("straight", "resumed"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    plain = changed(config, "autoencoder.adversarial_weight=0")
    train(plain, table, tmp_path / "plain")
    other = checkpoint.load(tmp_path / "plain")[0]["autoencoder"]
    assert not all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_what_the_discriminator_sees_is_part_of_the_loss(tiny_config, table, tmp_path):
    config = changed(
        tiny_config, "autoencoder.steps=6", "autoencoder.adversarial_weight=0.1", "autoencoder.adversarial_start=0",
        "autoencoder.feature_weight=0.7", "autoencoder.discriminator_width=4", "data.size=[32,32,32]", "flow.steps=1",
        "training.log_every_steps=1",
    )  # fmt: skip
    train(config, table, tmp_path / "run")
    said, budget = [e for e in lines(tmp_path / "run") if e["event"] == "autoencoder"], config.autoencoder
    assert len(said) == 6
    for e in said:
        assert e["features"] > 0
        whole = e["l1"] + budget.gradient_weight * e["gradient"] + budget.kl_weight * e["kl"]
        whole += budget.adversarial_weight * e["adversarial"] + 0.7 * e["features"]
        assert e["loss"] == pytest.approx(whole, rel=1e-4)


def test_minutes_end_a_stage_and_the_log_says_so(tiny_config, table, tmp_path):
    config = changed(tiny_config, "autoencoder.steps=1000000", "autoencoder.max_minutes=0.01", "flow.max_minutes=1")
    train(config, table, tmp_path / "run")
    ended = {e["stage"]: e["ended_by"] for e in lines(tmp_path / "run") if e["event"] == "stage_done"}
    assert ended == {"autoencoder": "minutes", "flow": "steps"}


def test_checkpoints_every_few_steps(tiny_config, table, tmp_path):
    train(
        changed(tiny_config, "training.checkpoint_every_steps=2", "training.keep_checkpoints=9"), table, tmp_path / "r"
    )
    assert checkpoint.steps(tmp_path / "r") == [2, 4, 6, 8, 10]


def test_an_existing_folder_is_not_overwritten(tiny_run, tiny_config, table):
    with pytest.raises(UsageError, match="--resume"):
        train(tiny_config, table, tiny_run)


def test_resume_with_another_config_is_refused(tiny_run, tiny_config, table):
    with pytest.raises(UsageError, match="differs in flow"):
        train(changed(tiny_config, "flow.learning_rate=0.5"), table, tiny_run, resume=True)


def test_resume_without_its_latents_is_refused_or_they_are_made_again(tiny_config, table, tmp_path):
    def interrupt(what, done, total):
        if what == "flow" and done >= 50:
            os.kill(os.getpid(), signal.SIGUSR1)

    out = tmp_path / "run"
    with pytest.raises(Preempted):
        train(tiny_config, table, out, progress=interrupt)
    (out / "cache" / "latents.safetensors").write_bytes((out / "cache" / "scans.npy").read_bytes())
    with pytest.raises(CorruptRun, match="latents"):
        train(tiny_config, table, out, resume=True)
    (out / "cache" / "latents.safetensors").unlink()
    train(tiny_config, table, out, resume=True)
    assert lines(out)[-1]["event"] == "done"


def test_bad_losses_are_skipped_counted_and_end_the_run(tiny_config, table, tmp_path, monkeypatch):
    monkeypatch.setattr(
        train_module, "kl_per_element", lambda mean, log_variance: mean.sum() * float("nan"),
    )  # fmt: skip
    config = changed(tiny_config, "training.bad_step_limit=2")
    with pytest.raises(EngineError, match=r"3 bad steps.*training items \["):
        train(config, table, tmp_path / "run")
    assert [e["count"] for e in lines(tmp_path / "run") if e["event"] == "bad_step"] == [1, 2, 3]


def test_a_single_bad_step_changes_no_weight(tiny_config, table, tmp_path, monkeypatch):
    """With every step bad but within the limit, weights stay as they were initialised."""
    monkeypatch.setattr(train_module, "velocity_target", lambda x0, noise: noise * float("inf"))
    train(tiny_config, table, tmp_path / "run")
    parts, state = checkpoint.load(tmp_path / "run")
    assert state["bad_steps"] == 6
    assert parts["denoiser"]["last.weight"].abs().max() == 0  # zero-initialised


def test_two_processes_train_as_one(tiny_config, table, tmp_path):
    """Equal global batch: the same draws, the same order of samples, weights equal up to the order of summation."""
    config = changed(tiny_config, "autoencoder.adversarial_weight=0.1", "autoencoder.adversarial_start=0.25")
    train(config, table, tmp_path / "alone")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "main.py").write_text(
        "import sys\n"
        "from engine.imaging.commands import train_command\n"
        "result = train_command(sys.argv[1], sys.argv[2], sys.argv[3])\n"
        "assert result['processes'] == 2, result\n"
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone",
        str(tmp_path / "main.py"), str(tmp_path / "config.yaml"), str(table), str(tmp_path / "run"),
    ]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    start = next(e for e in lines(tmp_path / "run") if e["event"] == "start")
    assert start["processes"] == 2
    one, two = (checkpoint.load(tmp_path / name)[0] for name in ("alone", "run"))
    for part in ("autoencoder", "denoiser"):
        assert one[part].keys() == two[part].keys()  # no wrapper's prefix got in
    largest = max((one["autoencoder"][k] - two["autoencoder"][k]).abs().max().item() for k in one["autoencoder"])
    assert largest < 2e-3  # AdamW's first steps are signs times the rate: rounding of near-zero gradients shows


def test_precision_auto_is_resolved_and_recorded(tiny_config, table, tmp_path):
    train(changed(tiny_config, "training.precision=auto", "flow.steps=2"), table, tmp_path / "run")
    assert load_config(tmp_path / "run" / "config.yaml").training.precision in ("fp32", "bf16")


def test_bf16_trains_or_is_refused_where_its_gradients_are_wrong(tiny_config, table, tmp_path):
    if not devices.trains_in_bf16("cpu") and "avx512_bf16" in devices.cpu_flags():
        with pytest.raises(Unsupported, match="wrong ones from this processor"):
            train(changed(tiny_config, "training.precision=bf16"), table, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return
    train(changed(tiny_config, "training.precision=bf16"), table, tmp_path / "run")
    parts, state = checkpoint.load(tmp_path / "run")
    assert all(t.dtype == torch.float32 for t in parts["denoiser"].values())
    assert state["bad_steps"] == 0
    assert np.isfinite([e["velocity_mse"] for e in lines(tmp_path / "run") if e["event"] == "flow"]).all()


def test_a_run_that_reads_from_a_disk_of_the_node_is_the_same_run(tiny_run, tiny_config, table, tmp_path):
    """The prepared cache and the latents are copied once, what is read is the copy, and damage of the store is told."""
    from engine.imaging.prepare import prepare_command

    (tmp_path / "config.yaml").write_text(dump_config(tiny_config))
    prepare_command(tmp_path / "config.yaml", table, tmp_path / "cache", workers=1)
    train(tiny_config, table, tmp_path / "run", cache=tmp_path / "cache", scratch=tmp_path / "scratch")
    names = sorted(path.name.split("-", 1)[1] for path in (tmp_path / "scratch").iterdir())
    assert names == ["latents.safetensors", "scans.npy"]
    straight, staged = checkpoint.load(tiny_run)[0], checkpoint.load(tmp_path / "run")[0]
    assert all(torch.equal(t, staged[part][name]) for part, tensors in straight.items() for name, t in tensors.items())
    store = tmp_path / "cache" / "scans.npy"
    data = bytearray(store.read_bytes())
    data[-1] ^= 1
    store.write_bytes(data)
    with pytest.raises(CorruptRun, match=r"scans\.npy"):
        train(tiny_config, table, tmp_path / "again", cache=tmp_path / "cache")
    assert not (tmp_path / "again").exists()
