"""Stores by chunks: checked, copied once per node, and never half."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time

import numpy as np
import pytest

from engine.errors import CorruptRun, UsageError
from engine.training import staging

CHUNK = 1_000


def store(folder, size=10_500):
    path = folder / "scans.npy"
    path.write_bytes(np.random.default_rng(1).bytes(size))
    return path, staging.chunks_of(path, CHUNK)


@pytest.mark.parametrize("size", [0, 1, 999, 1_000, 1_001, 10_500])
def test_sums_are_those_of_the_chunks_and_a_copy_has_the_same_bytes(tmp_path, size):
    path, table = store(tmp_path, size)
    data = path.read_bytes()
    assert table["bytes"] == size
    assert table["sha256"] == [hashlib.sha256(data[k : k + CHUNK]).hexdigest() for k in range(0, size, CHUNK)]
    staging.verify(path, table)
    copy = staging.stage(path, table, tmp_path / "scratch")
    assert copy.read_bytes() == data
    assert [p.name for p in (tmp_path / "scratch").iterdir()] == [copy.name]


@pytest.mark.parametrize("at", [0, 3_456, 10_499])
def test_one_changed_byte_is_named_by_its_chunk_and_nothing_is_copied(tmp_path, at):
    path, table = store(tmp_path)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    first = at // CHUNK * CHUNK
    said = re.escape(f"bytes {first} to {min(first + CHUNK, 10_500) - 1}")
    with pytest.raises(CorruptRun, match=said):
        staging.verify(path, table)
    with pytest.raises(CorruptRun, match=said):
        staging.stage(path, table, tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []
    path.write_bytes(data[:-1])
    with pytest.raises(CorruptRun, match="10500 bytes, got 10499"):
        staging.verify(path, table)


def test_many_ask_and_one_copies(tmp_path, monkeypatch):
    path, table = store(tmp_path)
    copies, whole = [], staging._copy

    def counted(*given):
        copies.append(1)
        time.sleep(0.3)  # the others come while it is being made
        whole(*given)

    monkeypatch.setattr(staging, "_copy", counted)
    found: list = []
    asking = [
        threading.Thread(target=lambda: found.append(staging.stage(path, table, tmp_path / "s"))) for _ in range(5)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(20)
    assert len(copies) == 1
    assert len(found) == 5
    assert {f.read_bytes() for f in found} == {path.read_bytes()}


def test_the_lock_of_a_dead_copier_is_taken_away_and_one_that_lives_is_waited_for(tmp_path, monkeypatch):
    path, table = store(tmp_path)
    monkeypatch.setattr(staging, "_STALE_SECONDS", 0.5)
    key = hashlib.sha256("".join(table["sha256"]).encode()).hexdigest()[:16]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    lock = scratch / f".{key}.copying"
    lock.touch()  # left by a killed process
    assert staging.stage(path, table, scratch).read_bytes() == path.read_bytes()
    (scratch / f"{key}-scans.npy").unlink()
    stop = threading.Event()

    def alive() -> None:
        clock = 0
        while not stop.wait(0.05):
            clock += 1
            os.utime(lock, ns=(clock, clock))

    lock.touch()
    beat = threading.Thread(target=alive)
    beat.start()
    try:
        with pytest.raises(UsageError, match="still being made"):
            staging.stage(path, table, scratch, wait_seconds=1.5)
    finally:
        stop.set()
        beat.join()
    assert lock.exists()


def test_a_scratch_that_is_too_small_or_cannot_be_made_is_refused_in_one_line(tmp_path, monkeypatch):
    path, table = store(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: type("usage", (), {"free": 10_499})())
    with pytest.raises(UsageError, match="GiB free") as told:
        staging.stage(path, table, tmp_path / "scratch")
    assert "\n" not in str(told.value)
    assert not list((tmp_path / "scratch").iterdir())
    with pytest.raises(UsageError, match="scratch folder that can be written"):
        staging.stage(path, table, path / "below a file")
