"""A tiny checkout with a bench file, and the command line of perf run on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # perf is no installed package

BENCH = """
from perf.case import Case, Peer, Timed

def equal(ours, theirs):
    assert ours == theirs, f"{ours} is not {theirs}"

def absent():
    return "not on this machine"

def total(n):
    from engine.work import total
    return total(n)

def newer(n):
    from engine.work import newer
    return newer(n)

def elsewhere(n):
    import engine.errors  # the installed engine has it, this checkout has not

def broken(n):
    raise ValueError("cannot read /some/where/secret.bed")

def cases():
    peers = (
        Peer("builtin", lambda n: sum(range(n)), same=equal, goal=1e-9, version=lambda: "7"),
        Peer("greedy", lambda n: Timed(1.0, n, "by hand", 4096), goal=1e9),
        Peer("wrong", lambda n: -1, same=equal, goal=1e-9),
        Peer("absent", None, missing=absent),
        Peer("raising", broken),
    )
    size = {"n": 20000}
    return [
        Case("tiny.total", size, 2e4, "numbers", lambda: 20000, total, peers, floor_bytes=8, floor_ops=2e4, limit="popcount"),
        Case("tiny.broken", size, 2e4, "numbers", lambda: 20000, broken),
        Case("tiny.newer", size, 2e4, "numbers", lambda: 20000, newer),
        Case("tiny.elsewhere", size, 2e4, "numbers", lambda: 20000, elsewhere),
        Case("tiny.long", size, 2e4, "numbers", lambda: 20000, total, quick=False),
    ]

def curves():
    points = [Case("tiny.total", {"n": n}, n, "numbers", lambda n=n: n, total) for n in (20000, 80000, 320000)]
    return {"tiny.total by n": points}
"""
WORK = "def total(n):\n    return sum(k for k in range(n))\n"


def _git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _perf(*arguments: str | Path, status: int = 0) -> str:
    """Output of `python -m perf ...`, standard error included; its exit code must be `status`."""
    done = subprocess.run(
        [sys.executable, "-m", "perf", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def git():
    return _git


@pytest.fixture(scope="session")
def perf():
    return _perf


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A git repository with an `engine` of two functions and one bench file, committed."""
    root = tmp_path / "checkout"
    (root / "engine").mkdir(parents=True)
    (root / "perf").mkdir()
    (root / "engine" / "__init__.py").write_text("")
    (root / "engine" / "work.py").write_text(WORK + "\ndef newer(n):\n    return n\n")
    (root / "perf" / "bench_tiny.py").write_text(BENCH)
    _git(root, "init", "-q")
    _git(root, "add", "-A")
    _git(root, "commit", "-q", "-m", "one")
    return root
