"""The shipped jobs, as they stand, on a real SLURM of this one machine (`cluster.sh`): two nodes, two training processes, an
array of four shards, chains by afterok, jobs that are stopped and requeued in the middle. Skipped with the reason where
SLURM is not there and cannot be installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from engine.genomics.commands import finish_command as finish_people
from engine.genomics.commands import sample_command as sample_people
from engine.imaging.commands import sample_command as sample_scans
from engine.imaging.shards import finish as finish_scans
from engine.imaging.shards import sample_shard
from engine.provenance import sha256
from engine.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = Path(__file__).with_name("cluster.sh")
SITE = """
ENGINE_PREPARE_RESOURCES="--cpus-per-task=1"
ENGINE_TRAIN_RESOURCES="${TEST_TRAIN_RESOURCES:-} --cpus-per-task=1"
ENGINE_FIT_RESOURCES="--cpus-per-task=1"
ENGINE_GENERATE_RESOURCES="--cpus-per-task=1"
ENGINE_FINISH_RESOURCES="--cpus-per-task=1"
ENGINE_AUDIT_RESOURCES="--cpus-per-task=1"
export ENGINE_REQUEUE=yes GLOO_SOCKET_IFNAME=lo
"""
SCANS = {
    "data": {"size": [16, 16, 16], "covariates": {"age": {"kind": "continuous"}}},
    "autoencoder": {"steps": 10, "batch_size": 3, "widths": [8, 16], "latent_channels": 2},
    "flow": {
        "steps": 300, "batch_size": 3, "widths": [8, 16], "attention_levels": [1], "embedding_width": 16, "views": 2,
    },
    "sampling": {"steps": 8},
    "training": {"precision": "fp32", "log_every_steps": 1, "checkpoint_every_steps": 100},
}  # fmt: skip


HAPLOTYPES = {
    "model": "transformer",
    "copying": {"ne": 20_000, "mismatch": 0.01, "min_carriers": 1},
    "bank": [{"redrawn": 0.01, "mismatch": 0.45}, {"ne": 20_000, "parent": 0, "floor": 0.1}, {"ne": 80_000}],
    "start": [0.0, 0.5, 0.5],
    "network": {
        "patch": 4,
        "width": 8,
        "depth": 2,
        "heads": 2,
        "attention": 3,
        "hidden": 8,
        "site_width": 2,
        "dropout": 0.1,
    },
    "fit": {"steps": 250, "batch_size": 6, "judge_every_steps": 125, "window": 4, "held_out": 0.2},
    "training": {"precision": "fp32", "log_every_steps": 1, "checkpoint_every_steps": 50},
}


class Slurm:
    """The cluster's commands."""

    def __init__(self, conf: str, site: Path) -> None:
        self.environment = {**os.environ, "SLURM_CONF": conf, "ENGINE_ENV": str(site), "VENV": sys.prefix}
        self.environment |= {"ENGINE_HOME": str(ROOT), "PYTHONPATH": str(ROOT)}

    def __call__(self, *command: object, **more: str) -> str:
        done = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, timeout=60, env={**self.environment, **more}
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def chain(self, *arguments: object, **more: str) -> dict[str, int]:
        """Submit a pipeline: stage -> job."""
        printed = self(ROOT / "scripts" / "slurm" / "pipeline.sh", *arguments, **more)
        return {stage: int(job) for stage, job in map(str.split, printed.splitlines())}

    def jobs(self, job: int) -> list[dict[str, str]]:
        """Records of a job, one for each task of an array."""
        lines = self("scontrol", "--oneliner", "show", "job", job).splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines if line]

    def ended(self, job: int, state: str = "COMPLETED") -> bool:
        """Whether all of a job has ended; fails when one of it ended in another state."""
        states = {record["JobState"] for record in self.jobs(job)}
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        assert not (states & final) - {state}, f"job {job} is {states}"
        return states == {state}


def wait_for(what: Callable[[], object], seconds: float, logs: Path | None = None) -> None:
    """Until `what()` is true; fails after `seconds` with the ends of the jobs' logs."""
    until = time.monotonic() + seconds
    while not what():
        if time.monotonic() > until:
            said = [f"== {p.name}\n" + p.read_text()[-1500:] for p in sorted(logs.glob("*.log"))] if logs else []
            pytest.fail(f"not within {seconds} s\n" + "\n".join(said))
        time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    installed = subprocess.run(["bash", str(CLUSTER), "install"], capture_output=True, text=True, timeout=300)
    if installed.returncode == 3:
        pytest.skip(installed.stderr.strip())
    folder = Path(tempfile.mkdtemp(prefix="engine-slurm-"))  # a short path: sockets allow about 100 characters
    try:
        started = subprocess.run(
            ["bash", str(CLUSTER), "start", str(folder)], stdout=subprocess.PIPE, text=True, timeout=60, check=True
        )
        site = folder / "site.sh"
        site.write_text(SITE)
        yield Slurm(started.stdout.strip(), site)
    finally:
        subprocess.run(["bash", str(CLUSTER), "stop", str(folder)], timeout=60, check=False)


@pytest.fixture(scope="module")
def scans(tmp_path_factory, write_noise) -> Path:
    """Twelve noisy scans and a config."""
    folder = tmp_path_factory.mktemp("scans")
    write_noise(folder, 12, 16)
    (folder / "config.yaml").write_text(yaml.safe_dump(SCANS))
    return folder


@pytest.fixture(scope="module")
def panel(tmp_path_factory, write_mosaics) -> Path:
    """A panel of 80 people, as files."""
    return write_mosaics(tmp_path_factory.mktemp("panel"), 80, 40)


def events(run: Path) -> list[dict]:
    file = run / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def last_step(run: Path, stage: str) -> int:
    return max((e["step"] for e in events(run)[-3:] if e["event"] == stage), default=0)


def test_scans_on_two_nodes_stopped_and_requeued(slurm: Slurm, scans: Path, tmp_path: Path) -> None:
    """Training on two nodes stops on USR1 and puts itself back, is requeued by an administrator, and goes on each time; then
    four shards, one of them requeued in the middle; then the shards are the bytes of a run without shards."""
    out = tmp_path / "out"
    jobs = slurm.chain(
        "imaging", scans / "config.yaml", scans / "table.csv", out, 64, 4, 5,
        TEST_TRAIN_RESOURCES="--nodes=2 --ntasks-per-node=1",
    )  # fmt: skip
    slurm("scancel", jobs["audit"])  # twelve people are too few to audit
    run, train = out / "run", jobs["train"]
    wait_for(lambda: last_step(run, "flow") >= 10, 120, out / "logs")
    slurm("scancel", "--batch", "--signal=USR1", train)
    wait_for(lambda: [e for e in events(run) if e["event"] == "preempted"], 30, out / "logs")
    wait_for(lambda: slurm.jobs(train)[0]["Restarts"] == "1", 30)
    assert {r["JobState"] for r in slurm.jobs(jobs["generate"])} == {
        "PENDING"
    }  # it waits for the end, not for the stop
    stopped = events(run)[-1]["stage_step"]
    assert 10 <= stopped < 290
    wait_for(lambda: last_step(run, "flow") >= stopped + 10, 120, out / "logs")
    slurm("scontrol", "requeue", train)
    wait_for(lambda: slurm.jobs(train)[0]["Restarts"] == "2", 60)
    partial = lambda: list(out.glob(".partial-*synthetic.shard-0002-*"))  # noqa: E731
    wait_for(partial, 180, out / "logs")
    slurm("scontrol", "requeue", f"{jobs['generate']}_2")
    wait_for(lambda: slurm.ended(jobs["finish"]), 180, out / "logs")

    story = [e for e in events(run) if e["event"] in ("start", "preempted", "resume", "done")]
    assert [e["event"] for e in story] == ["start", *["preempted", "start", "resume"] * 2, "done"]
    assert all(e["processes"] == 2 for e in story if e["event"] == "start")
    assert "requeueing job" in (out / "logs" / f"train-{train}.log").read_text()
    steps = [e["step"] for e in events(run) if e["event"] == "flow"]
    assert steps == list(range(1, 301))  # every step once: nothing was lost and nothing repeated
    assert checkpoint.load(run)[1]["done"] is True
    assert sorted(r.get("Restarts") for r in slurm.jobs(jobs["generate"])) == ["0", "0", "0", "1"]
    assert not partial(), "what a requeued shard had begun is left behind"

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the jobs: sums over threads may differ in the last bit
    sample_scans(run, 64, tmp_path / "whole", seed=5, device="cpu")
    whole = json.loads((tmp_path / "whole" / "checksums.json").read_text())
    assert json.loads((out / "synthetic" / "checksums.json").read_text()) == whole
    assert len(whole) == 64
    assert all(sha256(out / "synthetic" / name) == digest for name, digest in whole.items())
    for shard in (0, 1):
        sample_shard(run, 64, tmp_path / "pair", seed=5, shard=(shard, 2), device="cpu")
    torch.set_num_threads(threads)
    finish_scans(tmp_path / "pair", 2)
    assert json.loads((tmp_path / "pair" / "checksums.json").read_text()) == whole


def test_genotypes_from_the_panel_to_the_audit(slurm: Slurm, panel: Path, tmp_path: Path) -> None:
    """Every stage begins when the one before it has ended; the shards are the bytes of a run without shards; the audit's job
    ends as its verdict says."""
    out = tmp_path / "out"
    jobs = slurm.chain("genomics", panel / "panel.bcf", panel / "map.txt", panel / "samples.tsv", out, 64, 4, 1)
    assert list(jobs) == ["prepare", "fit", "generate", "finish", "audit"]
    over = ("COMPLETED", "FAILED")
    wait_for(lambda: slurm.jobs(jobs["audit"])[0]["JobState"] in over, 240, out / "logs")
    ends = ""
    for stage in ("prepare", "fit", "generate", "finish"):
        assert slurm.ended(jobs[stage])
        records = slurm.jobs(jobs[stage])
        assert len(records) == (4 if stage == "generate" else 1)
        assert min(r["StartTime"] for r in records) >= ends
        ends = max(r["EndTime"] for r in records)
    audit = slurm.jobs(jobs["audit"])[0]
    verdict = json.loads((out / "audit" / "audit.json").read_text())["verdict"]
    assert (audit["JobState"], audit["ExitCode"]) == (("COMPLETED", "0:0") if verdict == "pass" else ("FAILED", "3:0"))
    sample_people(out / "run", 64, out=tmp_path / "whole.bcf", seed=1)
    assert (tmp_path / "whole.bcf").read_bytes() == (out / "synthetic.bcf").read_bytes()
    for shard in (0, 1):
        sample_people(out / "run", 64, out=tmp_path / "pair.bcf", seed=1, shard=(shard, 2))
    finish_people(tmp_path / "pair.bcf", 2)
    assert (tmp_path / "pair.bcf").read_bytes() == (tmp_path / "whole.bcf").read_bytes()
    record = json.loads((out / "synthetic.bcf.provenance.json").read_text())
    assert record["sha256"] == sha256(tmp_path / "whole.bcf")


def test_transformer_on_two_nodes_stopped_and_requeued(slurm: Slurm, panel: Path, tmp_path: Path) -> None:
    """The chain of a transformer: trained by two processes, stopped on USR1 in the middle, put back by itself; two shards."""
    out, config = tmp_path / "out", tmp_path / "transformer.yaml"
    config.write_text(yaml.safe_dump(HAPLOTYPES))
    jobs = slurm.chain(
        "genomics", panel / "panel.bcf", panel / "map.txt", panel / "samples.tsv", out, 8, 2, 1,
        TEST_TRAIN_RESOURCES="--nodes=2 --ntasks-per-node=1", ENGINE_TRANSFORMER=str(config),
    )  # fmt: skip
    assert list(jobs) == ["prepare", "train", "generate", "finish", "audit"]
    slurm("scancel", jobs["audit"])  # eight people are too few to audit
    run = out / "run"
    wait_for(lambda: last_step(run, "transformer") >= 10, 120, out / "logs")
    slurm("scancel", "--batch", "--signal=USR1", jobs["train"])
    wait_for(lambda: slurm.ended(jobs["finish"]), 240, out / "logs")
    story = [e for e in events(run) if e["event"] in ("start", "preempted", "resume", "done")]
    assert [e["event"] for e in story] == ["start", "preempted", "start", "resume", "done"]
    assert all(e["processes"] == 2 for e in story if e["event"] == "start")
    assert [e["step"] for e in events(run) if e["event"] == "transformer"] == list(range(1, 251))
    sample_people(run, 8, out=tmp_path / "whole.bcf", seed=1)
    assert (tmp_path / "whole.bcf").read_bytes() == (out / "synthetic.bcf").read_bytes()


def test_a_stage_that_fails_takes_the_rest_out_of_the_queue(slurm: Slurm, tmp_path: Path) -> None:
    jobs = slurm.chain("genomics", tmp_path / "absent.bcf", "map", "samples", tmp_path / "out", 8, 2)
    wait_for(lambda: slurm.jobs(jobs["audit"])[0]["JobState"] == "CANCELLED", 60, tmp_path / "out" / "logs")
    assert [slurm.jobs(jobs[s])[0]["JobState"] for s in ("prepare", "fit", "finish")] == [
        "FAILED",
        "CANCELLED",
        "CANCELLED",
    ]
    said = (tmp_path / "out" / "logs" / f"prepare-{jobs['prepare']}.log").read_text()
    assert "absent.bcf" in said
    assert "Traceback" not in said


def test_a_cancelled_training_stays_cancelled(slurm: Slurm, tmp_path: Path) -> None:
    """`scancel` ends a job with TERM, on which it saves its work and leaves with 85; it must not put itself back."""
    home = tmp_path / "home"
    shutil.copytree(ROOT / "scripts", home / "scripts")
    (home / "bin").mkdir()
    (home / "bin" / "activate").write_text(f"PATH={home}/bin:$PATH\n")
    (home / "bin" / "engine").write_text(
        "#!/bin/bash\ntrap 'exit 85' TERM USR1\ntouch begun\nwhile :; do sleep 0.1; done\n"
    )
    (home / "bin" / "engine").chmod(0o755)
    job = slurm(
        "sbatch", "--parsable", "--cpus-per-task=1", f"--chdir={tmp_path}",
        home / "scripts/slurm/train_imaging.sbatch", "c", "d", "r",
        ENGINE_HOME=str(home), VENV=str(home),
    ).strip()  # fmt: skip
    wait_for((tmp_path / "begun").exists, 30)
    slurm("scancel", job)
    wait_for(lambda: slurm.jobs(int(job))[0]["JobState"] == "CANCELLED", 60)
    time.sleep(1)
    record = slurm.jobs(int(job))[0]
    assert (record["JobState"], record["Restarts"]) == ("CANCELLED", "0")
    assert "stopped with its work saved" in next(tmp_path.glob("*.log")).read_text()
