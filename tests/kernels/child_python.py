"""Python in a process of its own, for what is decided at import: Triton's interpreter, Numba's processor."""

from __future__ import annotations

import os
import subprocess
import sys


def run_python(code: str, timeout: float = 600, **environment: str) -> str:
    """Standard output of `code`, stripped; TRITON_INTERPRET only as given. `timeout`, in seconds, ends a hang."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**variables, **environment}, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()
