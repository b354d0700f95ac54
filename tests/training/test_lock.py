"""One job per run folder: the second is refused, a dead holder's lock is taken over, clocks do not matter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from engine.errors import UsageError
from engine.training import lock
from engine.training.lock import LostLock, RunLock

HOLD = """import sys, time
from engine.training.lock import RunLock
RunLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(60)"""


def holder(folder) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def elsewhere(folder, beats: int = 0, **changes) -> dict:
    """A lock as a job on another machine would have left it."""
    content = {**lock.identity(), "host": "elsewhere", "boot": "another", **changes}
    (folder / "lock.json").write_text(json.dumps(content) + "\n" + str(beats).zfill(12))
    return content


def test_a_second_job_is_refused_and_told_who_holds_it(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(UsageError, match=rf"process {process.pid} on .*it is running.*another --out"):
            RunLock(tmp_path).acquire()
        assert [p.name for p in tmp_path.iterdir()] == ["lock.json"]  # the refused one leaves nothing
    finally:
        process.kill()
        process.wait()


def test_the_lock_of_a_killed_job_is_taken_over_at_once(tmp_path):
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "lock.json").exists()
    began = time.monotonic()
    with RunLock(tmp_path) as mine:
        mine.check()
    assert time.monotonic() - began < 2
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_has_the_number_of_a_dead_one_does_not_hold_its_lock(tmp_path):
    with RunLock(tmp_path):
        content = json.loads((tmp_path / "lock.json").read_text().splitlines()[0])
    content["started"] = "1"  # the number is ours, and living
    (tmp_path / "lock.json").write_text(json.dumps(content) + "\n" + "0" * 12)
    RunLock(tmp_path).acquire().release()


def test_a_restarted_slurm_job_takes_over_from_its_former_attempt(tmp_path, monkeypatch):
    elsewhere(tmp_path, slurm_job="7", slurm_restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    began = time.monotonic()
    RunLock(tmp_path).acquire().release()
    assert time.monotonic() - began < 2


def test_another_machine_is_judged_by_its_heartbeats_and_not_by_clocks(tmp_path, monkeypatch):
    """Clock skew: a silent holder is dead though its file is of next year, a beating one lives though it is of 1970."""
    content = elsewhere(tmp_path)
    os.utime(tmp_path / "lock.json", (2e9, 2e9))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    RunLock(tmp_path, patience_seconds=0.3).acquire().release()

    elsewhere(tmp_path)
    reads = iter(range(1000))
    real = lock._content

    def beating(path):
        holder_, beats = real(path)
        return holder_, f"{beats}{next(reads)}" if holder_ and holder_["host"] == "elsewhere" else beats

    monkeypatch.setattr(lock, "_content", beating)
    os.utime(tmp_path / "lock.json", (0, 0))
    with pytest.raises(UsageError, match="heartbeat goes on"):
        RunLock(tmp_path, patience_seconds=5).acquire()
    assert content["host"] == "elsewhere"


def test_a_container_on_the_same_machine_counts_as_another_machine(tmp_path):
    """Its process numbers are not ours: that none of them runs here says nothing."""
    mine = lock.identity()
    elsewhere(tmp_path, host=mine["host"], boot=mine["boot"], namespace="pid:[1]", pid=2**22 + 1)
    began = time.monotonic()
    RunLock(tmp_path, patience_seconds=0.5).acquire().release()
    assert time.monotonic() - began >= 0.5


def test_heartbeats_are_written_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    with RunLock(tmp_path) as mine:
        first = lock._content(mine.path)
        inode = mine.path.stat().st_ino
        for _ in range(200):
            time.sleep(0.01)
            if lock._content(mine.path)[1] != first[1]:
                break
        assert lock._content(mine.path)[0] == first[0]
        assert int(lock._content(mine.path)[1]) > int(first[1])
        assert mine.path.stat().st_ino == inode


def test_a_job_whose_lock_was_taken_finds_out_and_leaves_the_other_one_alone(tmp_path):
    mine = RunLock(tmp_path).acquire()
    theirs = elsewhere(tmp_path)
    with pytest.raises(LostLock, match="elsewhere"):
        mine.check()
    mine.release()
    assert json.loads((tmp_path / "lock.json").read_text().splitlines()[0])["token"] == theirs["token"]


def test_of_many_jobs_that_start_together_one_gets_the_lock(tmp_path):
    elsewhere(tmp_path, slurm_job="7")  # a dead one lies there: all want to take it over
    script = (
        "import sys, time\nfrom engine.training.lock import RunLock\nfrom engine.errors import EngineError\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "try:\n    RunLock(sys.argv[1]).acquire(); print('mine', flush=True); time.sleep(3)\n"
        "except EngineError: print('refused', flush=True)\n"
    )
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    start = str(time.time() + 1.0)
    together = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), start], stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(6)
    ]
    said = [p.communicate(timeout=30)[0].strip() for p in together]
    assert sorted(said) == ["mine"] + ["refused"] * 5


def test_damaged_lock_is_no_free_pass(tmp_path):
    (tmp_path / "lock.json").write_text("{half")
    began = time.monotonic()
    RunLock(tmp_path, patience_seconds=0.5).acquire().release()
    assert time.monotonic() - began >= 0.5  # watched first
