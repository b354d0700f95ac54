"""Bench files and their cases: every perf/**/bench_*.py, loaded by path, asked for `cases()` and `curves()`.

A file that cannot be loaded is a finding of its own, not the end of the run. Running the cases is left to perf.run.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from perf.case import Case


def bench_files(root: Path) -> list[Path]:
    """Every bench file under `root`/perf, the deeper first: kernels before whole stages, which a budget may leave out."""
    return sorted((root / "perf").rglob("bench_*.py"), key=lambda path: (-len(path.parts), path))


def load(path: Path) -> ModuleType:
    """The bench file as a module.

    Raises:
        whatever the file raises while it is read.
    """
    name = "perf_bench_" + hashlib.sha256(str(path).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up
    spec.loader.exec_module(module)
    return module


def cases(module: ModuleType) -> list[Case]:
    """Cases of a bench file; their keys must differ."""
    found: list[Case] = list(module.cases()) if hasattr(module, "cases") else []
    keys = [case.key for case in found]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"two cases of one name and size: {', '.join(twice)}")
    return found


def curves(module: ModuleType) -> dict[str, list[Case]]:
    """Scaling curves of a bench file, by what identifies them through all history: "ld.matrix_phased by sites".

    Raises:
        ValueError: a curve has not one axis, or two have the same case and axis.
    """
    found: dict[str, list[Case]] = {}
    for points in module.curves().values() if hasattr(module, "curves") else ():
        name = f"{points[0].name} by {axis(points)}"
        if name in found:
            raise ValueError(f"two curves of {name}")
        found[name] = list(points)
    return found


def axis(points: list[Case]) -> str:
    """The one entry of `size` in which the cases of a curve differ.

    Raises:
        ValueError: none or several do, or there are fewer than three sizes.
    """
    varying = [name for name in points[0].size if len({case.size.get(name) for case in points}) > 1] if points else []
    if len(varying) != 1 or len({case.size[varying[0]] for case in points}) < 3:
        raise ValueError(
            f"a curve needs at least 3 sizes along one axis, got {len(points)} points along {varying or 'none'}"
        )
    return varying[0]


def matches(pattern: str | None, name: str) -> bool:
    """`pattern` is a part of the name, or a shell pattern of the whole of it; None matches all."""
    if pattern is None:
        return True
    return fnmatch.fnmatch(name, pattern) if any(c in pattern for c in "*?") else pattern in name


def source_hash(path: Path) -> str:
    """Hex SHA-256 of a bench file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
