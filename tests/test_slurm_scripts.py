"""The job scripts: each is resources plus one command, and does the same work when bash runs it without SLURM."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.genomics.panel import read_panel, write_panel

ROOT = Path(__file__).resolve().parents[1]
JOBS = sorted((ROOT / "scripts" / "slurm").glob("*.sbatch"))


def run_job(name: str, *arguments: object, shard: tuple[int, int] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VENV": sys.prefix, "ENGINE_HOME": str(ROOT), "SLURM_SUBMIT_DIR": str(ROOT)}
    environment.pop("SLURM_JOB_ID", None)
    if shard is not None:
        environment |= {"SLURM_ARRAY_TASK_ID": str(shard[0]), "SLURM_ARRAY_TASK_COUNT": str(shard[1])}
    script = ROOT / "scripts" / "slurm" / f"{name}.sbatch"
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def panel_files(tmp_path_factory, write_mosaics):
    """A panel of 60 people, as files."""
    return write_mosaics(tmp_path_factory.mktemp("panel"), 60, 20)


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_a_job_is_resources_and_one_command(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    for resource in ("--job-name=", "--nodes=", "--cpus-per-task=", "--mem=", "--time=", "--output="):
        assert re.search(rf"^#SBATCH {resource}", text, re.M), resource
    assert len(re.findall(r"^(?:once|distributed) engine ", text, re.M)) == 1
    assert '/scripts/slurm/job.sh"' in text
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0


def test_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck: apt-get install shellcheck")
    scripts = [*JOBS, *(ROOT / "scripts").rglob("*.sh"), ROOT / "tests" / "slurm" / "cluster.sh", ROOT / ".ci" / "run"]
    done = subprocess.run(
        ["shellcheck", "-s", "bash", "-e", "SC1091", *map(str, scripts)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_fit_generate_in_an_array_and_finish(panel_files: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "synthetic.bcf"
    fitted = run_job(
        "fit_genomics", panel_files / "panel.bcf", panel_files / "map.txt", panel_files / "samples.tsv", run
    )
    assert fitted.returncode == 0, fitted.stderr
    for index in range(3):
        assert run_job("generate_genomics", run, 10, out, 5, shard=(index, 3)).returncode == 0
    assert not out.exists()
    assert run_job("finish", "genomics", out, 3).returncode == 0
    whole = tmp_path / "whole.bcf"
    assert run_job("generate_genomics", run, 10, whole, 5).returncode == 0
    assert np.array_equal(read_panel(out).bits_lw, read_panel(whole).bits_lw)


def test_the_audit_job_fails_when_the_verdict_is_no_pass(panel_files: Path, tmp_path: Path) -> None:
    """So that `afterok` stops the chain before the release."""
    panel = read_panel(panel_files / "panel.bcf")
    write_panel(panel.select(samples=np.arange(40)), tmp_path / "train.bcf")
    write_panel(panel.select(samples=np.arange(40, 60)), tmp_path / "holdout.bcf")
    shutil.copy(tmp_path / "train.bcf", tmp_path / "synthetic.bcf")
    done = run_job("audit", *(tmp_path / f"{n}.bcf" for n in ("train", "holdout", "synthetic")), tmp_path / "audit")
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "audit" / "audit.json").is_file()


def test_a_container_stands_in_front_of_every_command(tmp_path: Path) -> None:
    """With ENGINE_IMAGE, commands run inside it, folders bound; there is no Apptainer here, so that a stand-in says how it
    was called."""
    (tmp_path / "apptainer").write_text('#!/bin/bash\nprintf "%s|" "$@" > "$SAID"\n')
    (tmp_path / "apptainer").chmod(0o755)
    environment = {**os.environ, "ENGINE_HOME": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"ENGINE_IMAGE": "engine.sif", "ENGINE_BINDS": "/a b,/c", "SAID": str(tmp_path / "said")}
    script = ROOT / "scripts" / "slurm" / "finish.sbatch"
    subprocess.run(["bash", str(script), "imaging", "o u t", "4"], check=True, env=environment, timeout=60)
    said = (tmp_path / "said").read_text().replace("--nv|", "")  # a GPU machine hands its driver in
    assert said == "exec|--bind|/a b,/c|engine.sif|engine|imaging|finish|o u t|--shards|4|"


def test_the_container_recipe_copies_what_exists_and_what_the_package_needs() -> None:
    text = (ROOT / "scripts" / "slurm" / "engine.def").read_text()
    files = re.findall(r"^  (\S+) /opt/engine/(\S+)$", text, re.M)
    assert files
    assert all(source == target and (ROOT / source).exists() for source, target in files)
    assert {"pyproject.toml", "constraints.txt", "engine", "README.md", "LICENSE"} <= {source for source, _ in files}


def test_a_job_without_its_arguments_says_how_to_call_it() -> None:
    done = run_job("train_imaging")
    assert done.returncode != 0
    assert "usage: train_imaging.sbatch CONFIG CSV RUN" in done.stderr
