"""errors, seeding, atomic, provenance, devices: small, and everything stands on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine import atomic, devices, provenance, seeding
from engine.compiled import keep_by_source
from engine.errors import EngineError, GateRefused, InputError, UsageError, closest


def test_an_error_is_one_line_with_where_expected_got_and_hint() -> None:
    error = InputError("a 3D volume", "a 2D\nimage", "scan.nii", "stack the slices")
    assert str(error) == "scan.nii: expected a 3D volume, got a 2D image; try: stack the slices"
    assert isinstance(error, EngineError)
    assert (error.exit_code, GateRefused("a passing audit").exit_code) == (2, 3)
    assert closest("lerning_rate", ["learning_rate", "steps"]) == "'learning_rate'"


def test_draws_depend_on_seed_purpose_and_index_only() -> None:
    first = seeding.generator(1, "path", 5).random(1000)
    assert np.array_equal(first, seeding.generator(1, "path", 5).random(1000))
    for other in (
        seeding.generator(2, "path", 5),
        seeding.generator(1, "mutation", 5),
        seeding.generator(1, "path", 6),
    ):
        assert abs(np.corrcoef(first, other.random(1000))[0, 1]) < 0.15
    assert not np.isin(seeding.generator(1, "path", 6).random(1000), first).any()
    assert seeding.normal((3, 4), 1, "noise", 2).equal(seeding.normal((3, 4), 1, "noise", 2))
    with pytest.raises(ValueError, match="index"):
        seeding.generator(1, "path", -1)


def test_seed_and_purpose_cannot_run_into_each_other() -> None:
    assert seeding.derived_seed(1, "2x") != seeding.derived_seed(12, "x")


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    atomic.write_text(target, "old")
    with pytest.raises(RuntimeError), atomic.atomic_path(target) as partial:  # noqa: PT012
        partial.write_text("new")
        raise RuntimeError("the disk is full")
    assert target.read_text() == "old"
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_a_folder_is_whole_or_absent_and_never_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with pytest.raises(RuntimeError), atomic.atomic_folder(target) as partial:  # noqa: PT012
        (partial / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic.atomic_folder(target) as partial:
        (partial / "a").write_text("1")
    assert (target / "a").read_text() == "1"
    with pytest.raises(UsageError, match="does not exist yet"), atomic.atomic_folder(target):
        pass


def test_json_refuses_nan_and_takes_arrays(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "a.json", {"x": np.float32(1.5), "y": np.arange(2)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1.5, "y": [0, 1]}
    with pytest.raises(ValueError, match=r"JSON compliant|not JSON"):
        atomic.write_json(tmp_path / "b.json", {"x": float("nan")})
    assert not (tmp_path / "b.json").exists()


def test_provenance_names_inputs_by_hash_and_never_by_path(tmp_path: Path) -> None:
    folder = tmp_path / "secret-user" / "panel"
    folder.mkdir(parents=True)
    (folder / "x.bcf").write_bytes(b"abc")
    record = provenance.write(tmp_path, "test", inputs=[folder / "x.bcf", folder], seed=3, synthetic=True)
    text = (tmp_path / "provenance.json").read_text()
    assert "secret-user" not in text
    assert record["inputs"][0]["sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert json.loads(text)["synthetic_data"] is True
    before = record["inputs"][1]["sha256"]
    (folder / "x.bcf").write_bytes(b"abd")
    assert provenance.input_record(folder)["sha256"] != before


def test_a_named_device_is_never_replaced() -> None:
    import torch

    assert devices.cpu_count() >= 1
    assert devices.memory_bytes() > 2**28
    if not torch.cuda.is_available():
        assert devices.choose("auto").type == "cpu"
        with pytest.raises(EngineError, match="CUDA"):
            devices.choose("cuda:0")


CALLER = "import numba\nfrom package.kernels.callee import f\n\n@numba.njit(cache=True)\ndef g():\n    return f()\n"
CALLEE = "import numba\n\n@numba.njit(cache=True)\ndef f():\n    return {}\n"
MAIN = "from package.kernels.caller import g\nprint(g())"
KEEP = (
    "import os\nfrom pathlib import Path\nfrom engine.compiled import keep_by_source\n"
    "os.environ['NUMBA_CACHE_DIR'] = ''\nkeep_by_source(Path('package').resolve())\n"
)


@pytest.mark.parametrize("own_folder", [False, True])
def test_a_cached_caller_does_not_keep_an_old_callee(tmp_path: Path, own_folder: bool) -> None:
    """Numba's cache alone answers 1 after the change, which the second case shows: a folder of the user's own choice."""
    kernels = tmp_path / "package" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / "caller.py").write_text(CALLER)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    environment["NUMBA_CACHE_DIR"] = str(tmp_path / "own") if own_folder else ""
    said = []
    for answer in (1, 22):
        (kernels / "callee.py").write_text(CALLEE.format(answer))
        code = MAIN if own_folder else KEEP + MAIN
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        said.append(done.stdout.strip())
    assert said == (["1", "1"] if own_folder else ["1", "22"])


def test_where_compiled_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, base = tmp_path / "package", tmp_path / "cache" / "engine" / "numba"
    (package / "kernels").mkdir(parents=True)
    (package / "kernels" / "a.py").write_text("1")
    for name in ("old", "recent"):
        (base / name).mkdir(parents=True)
    os.utime(base / "old", (1e9, 1e9))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", "mine")
    assert keep_by_source(package) is None
    assert os.environ["NUMBA_CACHE_DIR"] == "mine"
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    chosen = keep_by_source(package)
    assert chosen is not None
    assert os.environ["NUMBA_CACHE_DIR"] == str(chosen)
    assert sorted(x.name for x in base.iterdir()) == sorted(["recent", chosen.name])
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(package / "kernels" / "a.py"))  # no folder can be made below a file
    assert keep_by_source(package) is None
    assert os.environ["NUMBA_CACHE_DIR"] == ""
