"""The house stands: imports point down, kernels need only a bare PyTorch, no file is two rooms in one."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "engine"
FLOORS = {
    "errors": 0, "devices": 0, "seeding": 0, "provenance": 0, "atomic": 0, "compiled": 0,
    "kernels": 1,
    "files": 2, "training": 2, "audit": 2,
    "imaging": 3, "genomics": 3,
    "cohort": 4, "release": 4, "benchmark": 4,
    "cli": 5, "demo": 5, "doctor": 5, "__main__": 5,
}  # fmt: skip
KERNEL_IMPORTS = {"torch", "numpy", "numba", "triton", "llvmlite", "engine", *sys.stdlib_module_names}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.AST) -> list[tuple[str, int]]:
    """Every absolute module name a file imports, at any depth of nesting, with its line."""
    names: list[tuple[str, int]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            if node.module == "engine":
                names += [(f"engine.{alias.name}", node.lineno) for alias in node.names]
            else:
                names.append((node.module or "", node.lineno))
    return names


def violations(path: Path, source: str) -> list[str]:
    here, found = room(path), []
    for name, line in imported(ast.parse(source)):
        parts = name.split(".")
        if parts[0] != "engine" or len(parts) == 1 or parts[1] == "__version__":
            continue
        there = parts[1]
        if there not in FLOORS:
            found.append(f"{path.name}:{line} imports {name}, which is on no floor")
        elif FLOORS[there] > FLOORS[here]:
            found.append(f"{path.name}:{line} imports {name}, which is above it")
        elif there != here and FLOORS[there] == FLOORS[here] and FLOORS[here] not in (0, 5):
            found.append(f"{path.name}:{line} imports {name}, a room on the same floor")
    return found


@pytest.mark.parametrize(
    "path", [p for p in modules() if room(p) != "__init__"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_down(path: Path) -> None:
    assert room(path) in FLOORS, f"{room(path)} is on no floor: add it here and to the picture in the README"
    assert violations(path, path.read_text()) == []


def test_an_upward_import_is_seen() -> None:
    path = PACKAGE / "kernels" / "ld" / "reference.py"
    assert violations(path, "def f():\n    from engine.genomics.panel import read_panel\n")
    assert violations(PACKAGE / "imaging" / "train.py", "from engine.genomics import panel\n")
    assert not violations(PACKAGE / "imaging" / "train.py", "from engine.audit.findings import Finding\n")


def test_kernel_rooms_import_bits_and_tuned_at_most_and_need_a_bare_pytorch_only() -> None:
    for path in (PACKAGE / "kernels").rglob("*.py"):
        kernel = path.relative_to(PACKAGE / "kernels").parts[0]
        for name, line in imported(ast.parse(path.read_text())):
            parts = name.split(".")
            assert parts[0] in KERNEL_IMPORTS, f"{path}:{line} imports {name}"
            if parts[:2] == ["engine", "kernels"] and len(parts) > 2:
                assert parts[2] in (kernel, "bits", "tuned"), f"{path}:{line} imports {name}, another kernel room"


def test_kernels_import_on_a_machine_with_a_bare_pytorch() -> None:
    """Every kernel module, with every other installed package made impossible to import."""
    code = f"""
import importlib, importlib.metadata, pathlib, sys
allowed = {sorted(KERNEL_IMPORTS)!r}
needed = {{"torch", "numpy", "numba", "triton", "llvmlite"}}
providers = importlib.metadata.packages_distributions()
def closure(names):
    import re
    seen, todo = set(), list(names)
    while todo:
        name = todo.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in seen:
            continue
        seen.add(key)
        try:
            todo += [re.split(r"[ ;<>=!~\\[(]", r)[0] for r in importlib.metadata.requires(name) or [] if "extra" not in r]
        except importlib.metadata.PackageNotFoundError:
            pass
    return seen
import re
usable = closure(needed)
class Bare:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        owners = {{re.sub(r"[-_.]+", "-", d).lower() for d in providers.get(top, [])}}
        if owners and not owners & usable and top != "engine":
            raise ImportError(top + " is not part of a bare PyTorch")
        return None
sys.meta_path.insert(0, Bare())
root = pathlib.Path({str(PACKAGE)!r})
for path in sorted((root / "kernels").rglob("*.py")):
    parts = path.relative_to(root.parent).with_suffix("").parts
    importlib.import_module(".".join(p for p in parts if p != "__init__"))
try:
    import scipy
except ImportError:
    print("bare")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "bare"


def test_no_file_is_two_rooms_in_one() -> None:
    too_long = {str(p.relative_to(PACKAGE)): n for p in modules() if (n := len(p.read_text().splitlines())) > 600}
    assert too_long == {}


def test_the_readme_draws_every_room() -> None:
    readme = (PACKAGE.parent / "README.md").read_text()
    for name in sorted({room(p) for p in modules()} - {"__init__", "__main__"}):
        assert name in readme, f"README's tree lacks {name}"
