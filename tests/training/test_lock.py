"""One job per run folder: the second is refused, a dead holder's lock is taken over, clocks do not matter."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
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


@pytest.fixture
def at_once(monkeypatch):
    """No waiting for heartbeats."""

    def waited(seconds):
        pytest.fail(f"waited {seconds} s")

    monkeypatch.setattr(time, "sleep", waited)


def test_the_lock_of_a_killed_job_is_taken_over_at_once(tmp_path, at_once):
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "lock.json").exists()
    with RunLock(tmp_path) as mine:
        mine.check()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_has_the_number_of_a_dead_one_does_not_hold_its_lock(tmp_path):
    with RunLock(tmp_path):
        content = json.loads((tmp_path / "lock.json").read_text().splitlines()[0])
    content["started"] = "1"  # the number is ours, and living
    (tmp_path / "lock.json").write_text(json.dumps(content) + "\n" + "0" * 12)
    RunLock(tmp_path).acquire().release()


def test_a_restarted_slurm_job_takes_over_from_its_former_attempt(tmp_path, monkeypatch, at_once):
    elsewhere(tmp_path, slurm_job="7", slurm_restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    RunLock(tmp_path).acquire().release()


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
        "import sys\nfrom engine.training.lock import RunLock\nfrom engine.errors import EngineError\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "try:\n    RunLock(sys.argv[1]).acquire(); print('mine', flush=True); sys.stdin.readline()\n"
        "except EngineError: print('refused', flush=True)\n"
    )
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )
        for _ in range(6)
    ]
    assert [job.stdout.readline().strip() for job in jobs] == ["ready"] * 6
    for job in jobs:
        job.stdin.write("go\n")
    said = [job.stdout.readline().strip() for job in jobs]  # nobody ends before all have answered
    for job in jobs:
        job.communicate(timeout=30)
    assert sorted(said) == ["mine"] + ["refused"] * 5


class Turns:
    """Threads that go on one at a time, from one call of the file system to the next, in an order drawn from a seed."""

    def __init__(self, threads: int, seed: int) -> None:
        self.drawn, self.changed = random.Random(seed), threading.Condition()
        self.running, self.waiting, self.next = set(range(threads)), set(), None
        self.local = threading.local()

    def _draw(self) -> None:
        if self.next is None and self.running and self.waiting == self.running:
            self.next = self.drawn.choice(sorted(self.waiting))
            self.changed.notify_all()

    def wait(self) -> None:
        me = getattr(self.local, "me", None)
        if me is None:
            return  # the heartbeat's thread, and the test itself
        with self.changed:
            self.waiting.add(me)
            self._draw()
            self.changed.wait_for(lambda: self.next == me)
            self.waiting.discard(me)
            self.next = None

    def run(self, me: int, work) -> None:
        self.local.me = me
        try:
            work()
        finally:
            self.local.me = None  # whoever prints an error touches the file system too
            with self.changed:
                self.running.discard(me)
                self._draw()


@pytest.mark.parametrize("gives_back", [False, True])
def test_in_no_order_of_their_steps_do_two_jobs_hold_the_lock(tmp_path, monkeypatch, gives_back):
    """Three jobs find a dead one's lock; 400 orders of every call in which they touch the folder."""
    turns: list[Turns] = []

    def in_turn(module, name):
        real = getattr(module, name)

        def step(*arguments, **named):
            turns[-1].wait()
            return real(*arguments, **named)

        monkeypatch.setattr(module, name, step)

    for name in ("link", "stat", "rename", "unlink"):
        in_turn(os, name)
    in_turn(lock, "_content")
    for seed in range(400):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "lock.json").write_text(json.dumps({**lock.identity(), "started": "1"}) + "\n" + "0" * 12)
        turns.append(Turns(3, seed))
        holding, most, refused, kept = [], [], [], []

        def job(folder=folder, holding=holding, most=most, refused=refused, kept=kept):
            mine = RunLock(folder)
            try:
                mine.acquire()
            except UsageError:
                refused.append(mine)
                return
            holding.append(mine)
            most.append(len(holding))
            turns[-1].wait()
            mine.check()
            if gives_back:
                holding.remove(mine)
                mine.release()
            else:
                kept.append(mine)

        threads = [threading.Thread(target=turns[-1].run, args=(me, job), daemon=True) for me in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert len(most) + len(refused) == 3, seed  # no other error
        assert set(most) == {1}, seed
        assert [f.name for f in folder.iterdir()] == ([] if gives_back else ["lock.json"]), seed
        for mine in kept:
            mine.check()
            mine.release()


def test_a_successor_that_dies_before_it_has_moved_its_file_is_succeeded_itself(tmp_path):
    process = holder(tmp_path)
    process.kill()
    process.wait()
    dying = "import os\nos.rename = lambda *_: os._exit(9)\n" + HOLD
    for _ in range(2):  # and its successor too
        assert subprocess.run([sys.executable, "-c", dying, str(tmp_path)], timeout=60).returncode == 9
    assert len(list(tmp_path.glob(".lock-after-*"))) == 2
    dead = json.loads((tmp_path / "lock.json").read_text().splitlines()[0])
    assert dead["pid"] == process.pid
    with RunLock(tmp_path) as mine:
        mine.check()
        with pytest.raises(UsageError, match=f"process {os.getpid()} .*it is running"):
            RunLock(tmp_path).acquire()
        assert not list(tmp_path.glob(".lock-after-*"))


def test_a_successor_counts_before_it_has_moved_its_file(tmp_path, monkeypatch):
    """Another job comes in the moment between the two steps: the lock is held."""
    elsewhere(tmp_path, slurm_job="7")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    real, seen = os.rename, []

    def moved(*paths):
        with pytest.raises(UsageError, match=f"process {os.getpid()} .*it is running"):
            RunLock(tmp_path).acquire()
        seen.append(paths)
        real(*paths)

    monkeypatch.setattr(os, "rename", moved)
    with RunLock(tmp_path) as mine:
        mine.check()
    assert len(seen) == 1


def test_damaged_lock_is_no_free_pass(tmp_path):
    (tmp_path / "lock.json").write_text("{half")
    began = time.monotonic()
    RunLock(tmp_path, patience_seconds=0.5).acquire().release()
    assert time.monotonic() - began >= 0.5  # watched first
