"""A small synthetic set of scans and of genotypes, as the engine's writers leave them, and an audit.json of exact bytes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.audit import hash_files
from engine.genomics.panel import HaplotypePanel, panel_from_alleles
from engine.imaging.volume import Volume, write_volume

_SPEC = importlib.util.spec_from_file_location("chromium", Path(__file__).with_name("chromium.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
chromium = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(chromium)


@pytest.fixture(scope="session")
def page(tmp_path_factory) -> Iterator[Any]:
    """A page of a headless Chromium; the test is skipped where there is none."""
    if chromium.PROGRAM is None:
        pytest.skip("no Chromium on this machine")
    with chromium.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def volume() -> Callable[[int], Volume]:
    """Volume number k: noise on a small oblique-free grid."""

    def make(k: int) -> Volume:
        array = np.random.default_rng(k).normal(500, 50, (1, 12, 14, 10)).astype(np.float32)
        return Volume(array, np.diag([1.0, 1.0, 2.0, 1.0]), "MR", "arbitrary", {})

    return make


@pytest.fixture
def scans(tmp_path, volume) -> Path:
    """Six people with two visits, as `engine imaging sample` leaves them, the run's provenance naming a real input."""
    folder = tmp_path / "synthetic"
    folder.mkdir()
    rows = ["image,subject,visit,age,sex"]
    for k in range(6):
        for visit in range(2):
            name = f"SYN{k:09d}_visit{visit}.nii.gz"
            write_volume(volume(10 * k + visit), folder / name, description="SYNTHETIC")
            rows.append(f"{name},SYN{k:09d},{visit},{60 + k + visit},{'FM'[k % 2]}")
    (folder / "volumes.csv").write_text("\n".join(rows) + "\n")
    (folder / "checksums.json").write_text("{}")
    made = {"command": "imaging sample", "commit": "c0ffee", "seed": 1, "inputs": [{"name": "CANARY-PATIENT-4711.nii"}]}
    (folder / "provenance.json").write_text(json.dumps(made))
    return folder


@pytest.fixture
def panel() -> HaplotypePanel:
    """Eight synthetic people, 30 sites."""
    alleles_ln = np.random.default_rng(0).integers(0, 2, (30, 16)).astype(np.uint8)
    return panel_from_alleles(
        alleles_ln, np.arange(1000, 4000, 100), "22", [f"SYN{k:09d}" for k in range(8)],
        contig_length={"22": 51304566}, assembly="GRCh37",
    )  # fmt: skip


@pytest.fixture
def audited(tmp_path) -> Callable[..., Path]:
    """audit.json that passed on exactly the bytes of a folder or file; keywords replace entries."""

    def write(source: Path, verdict: str = "pass", **more: object) -> Path:
        path = tmp_path / "audit.json"
        findings = [
            {"name": "exact_copies", "value": 0.0, "interval": None, "n": 10, "threshold": 0.0, "verdict": "pass"},
            {
                "name": "aats_train",
                "value": None,
                "interval": [None, None],
                "n": 0,
                "threshold": None,
                "verdict": "none",
            },
        ]
        control = {"name": "copycat", "expected": "fail", "verdict": "fail", "rows": 9, "findings": findings[:1]}
        record = {
            "schema": "engine.audit/1", "verdict": verdict, "reasons": ["No finding differs."], "findings": findings,
            "controls": [control], "sizes": {"synthetic": {"people": 6, "rows": 12}, "train": {"people": 30, "rows": 40}},
            "figures": {}, "policy": {}, "audited": hash_files(source), **more,
        }  # fmt: skip
        path.write_text(json.dumps(record))
        return path

    return write
