"""The command line as users meet it: a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Said:
    """What a command did: exit code, its JSON, and standard error."""

    code: int
    result: dict[str, Any]
    errors: str


@pytest.fixture(scope="session")
def engine() -> Callable[..., Said]:
    """Run `engine ... --json`; standard output must be one JSON object or nothing."""

    def run(*arguments: object, cwd: Path | None = None) -> Said:
        command = [sys.executable, "-m", "engine", *map(str, arguments), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=1800, env={**os.environ})
        return Said(done.returncode, json.loads(done.stdout) if done.stdout.strip() else {}, done.stderr)

    return run


@pytest.fixture
def good(engine: Callable[..., Said]) -> Callable[..., dict[str, Any]]:
    """Run a command that must succeed and return its JSON."""

    def run(*arguments: object, code: int = 0, cwd: Path | None = None) -> dict[str, Any]:
        said = engine(*arguments, cwd=cwd)
        assert said.code == code, said.errors
        assert "Traceback" not in said.errors
        return said.result

    return run
