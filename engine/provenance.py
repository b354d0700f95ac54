"""What made this folder: commit, command, resolved config, input hashes, versions, machine, seed.

Every output folder carries `provenance.json`. Inputs are named by file name and hash only; no path of the machine and
no user name is written, because records travel with releases.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from engine import __version__
from engine.atomic import write_json

SCHEMA = "engine.provenance/1"
_PACKAGES = (
    "torch", "numpy", "numba", "triton", "scipy", "scikit-learn", "monai", "diffusers", "accelerate", "nibabel",
    "pydicom",
    "pysam", "cyvcf2", "Pgenlib", "msprime", "nilearn",
)  # fmt: skip


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def input_record(path: str | Path) -> dict[str, Any]:
    """Name, size in bytes and hash of one input; a folder is hashed over its sorted relative names and contents."""
    path = Path(path)
    if path.is_dir():
        digest, total, count = hashlib.sha256(), 0, 0
        for entry in sorted(p for p in path.rglob("*") if p.is_file() and not p.is_symlink()):
            digest.update(str(entry.relative_to(path)).encode() + b"\0" + bytes.fromhex(sha256(entry)))
            total, count = total + entry.stat().st_size, count + 1
        return {"name": path.name, "files": count, "bytes": total, "sha256": digest.hexdigest()}
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


@cache
def commit() -> dict[str, Any]:
    """Git commit of the installed source and whether it was modified; outside a checkout $ENGINE_COMMIT, or unknown."""
    here = Path(__file__).resolve().parent
    outside = {"commit": os.environ.get("ENGINE_COMMIT") or "unknown", "modified": None}
    try:
        run = lambda *a: subprocess.run(["git", "-C", str(here), *a], capture_output=True, text=True, timeout=10)  # noqa: E731
        head = run("rev-parse", "HEAD")
        if head.returncode != 0:
            return outside
        return {"commit": head.stdout.strip(), "modified": bool(run("status", "--porcelain", "--", ".").stdout.strip())}
    except (OSError, subprocess.TimeoutExpired):
        return outside


@cache
def versions() -> dict[str, str]:
    """Versions of Python, the engine, and those of the libraries it stands on that are installed."""
    found = {"python": platform.python_version(), "engine": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def record(
    command: str,
    *,
    config: dict[str, Any] | None = None,
    inputs: Iterable[str | Path] | Mapping[str, str | Path] = (),
    seed: int | None = None,
    synthetic: bool = False,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Provenance record as a JSON-ready dict.

    Args:
        command: the engine's own name of the step, e.g. "genomics sample" (not the raw command line: it holds paths).
        config: the complete resolved config.
        inputs: files and folders that were read; recorded by name, size and SHA-256. A mapping names them itself, where
            the name of a file may name a person.
        seed: the run's seed where one was used.
        synthetic: the folder holds synthetic data; marked in words a machine can find.
        extra: further entries of the step, e.g. seconds per stage.
    """
    from engine.devices import machine

    return {
        "schema": SCHEMA,
        "synthetic_data": synthetic,
        "command": command,
        "created_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **commit(),
        "config": config or {},
        "inputs": [{**input_record(path), "name": name} for name, path in inputs.items()]
        if isinstance(inputs, Mapping)
        else [input_record(path) for path in inputs],
        "seed": seed,
        "versions": versions(),
        "machine": machine(),
        **(extra or {}),
    }


def write(folder: str | Path, command: str, **fields: Any) -> dict[str, Any]:
    """Write `provenance.json` into `folder` and return the record; fields as for `record`."""
    made = record(command, **fields)
    write_json(Path(folder) / "provenance.json", made)
    return made
