"""The page that leaves with the data: what it takes from an evaluation, and what it leaves inside."""

from __future__ import annotations

import json

import pytest

from engine.release.covariates import LEAST, side_by_side, summaries
from engine.release.manifest import release
from engine.release.public_report import covariates, finding_of

SFS = {
    "minor_count_low": [1, 2, 3],
    "minor_count_high": [1, 2, 5],
    "haplotypes": 200,
    "real": [9, 4, 2],
    "synthetic": [8, 4, 3],
}
CANARY = 0.123456789


def test_averages_are_taken_and_single_people_left_inside(tmp_path, scans, audited):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    figures = {
        "ld_decay": {"distance_bp": [100, 1000, 1e5], "real": [0.6, 0.3, 0.1], "synthetic": [0.5, 0.3, 0.1]},
        "sfs": SFS,
        "pca": {"real": [[CANARY, 1]], "synthetic": [[1, 1]], "group": ["EUR"]},
        "af": {"real": [CANARY] * 5, "synthetic": [0.1] * 5},
    }
    finding = {"name": "ld_r", "value": 0.97, "interval": [0.96, 0.98], "n": 300, "floor": 0.99, "verdict": "none"}
    (folder / "evaluation.json").write_text(json.dumps({"findings": [finding], "figures": figures}))
    release(scans, audited(scans), tmp_path / "out", evaluation=[folder], title="Heads <of> nobody")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Linkage disequilibrium" in page
    assert "Site-frequency spectrum" in page
    assert "LD, correlation of r² real and synthetic" in page
    assert "Principal components" not in page
    assert "Allele frequency of each site" not in page
    assert str(CANARY) not in (page + (tmp_path / "out" / "manifest.json").read_text())
    assert "Heads &lt;of&gt; nobody" in page
    assert "May be released" in page
    assert "Internal." not in page
    assert 'alt="synthetic, axial slice 1 of 10"' in page
    assert 'alt="real' not in page


def test_covariates_are_summed_up_and_small_levels_hidden(tmp_path):
    (tmp_path / "data").mkdir()
    rows = ["image,subject,sex,diagnosis,age"]
    rows += [f"{k}.nii,SYN{k},{'FM'[k % 2]},{'rare' if k < LEAST - 1 else 'common'},{50 + k}" for k in range(40)]
    (tmp_path / "data" / "volumes.csv").write_text("\n".join([*rows, "x.nii,SYN99,,,", ""]))
    (section,) = covariates(tmp_path, {"files": [{"path": "data/volumes.csv"}]})
    (table,) = section.tables
    assert table.caption == "volumes.csv, 41 rows"
    assert not section.internal
    said = {row[0]: row[1:] for row in table.rows}
    assert set(said) == {"sex", "diagnosis", "age"}
    assert said["sex"] == (40, "F 20, M 20")
    assert said["diagnosis"] == (40, "common 36, other 4")
    assert said["age"] == (40, "mean 69.5, standard deviation 11.5, 5th to 95th percentile 52 to 87")
    assert covariates(tmp_path, {"files": []}) == []


def test_real_people_stand_beside_synthetic_ones_inside_only():
    made = [{"image": f"{k}.nii", "age": str(50 + k % 9), "extra": "1"} for k in range(20)]
    real = [{"image": f"r{k}.nii", "age": str(60 + k % 9), "remark": "x"} for k in range(30)]
    (section,) = side_by_side(real, made)
    assert section.internal
    (table,) = section.tables
    assert [row[0] for row in table.rows] == ["age"]
    assert table.rows[0][1].startswith("mean 53.6")
    assert table.rows[0][2].startswith("mean 63.7")
    assert side_by_side(real, [{"image": "a.nii"}]) == []
    assert summaries([{"a": "1"}] * 3) == {"a": (3, f"fewer than {LEAST} values")}
    assert summaries([{"a": "1"}] * 9) == {"a": (9, "all 1")}


def test_findings_come_back_from_json():
    found = finding_of(
        {"name": "x", "value": None, "interval": [0.1, None], "n": 3, "threshold": None, "verdict": "void"}
    )
    assert found.value != found.value
    assert found.interval is not None
    assert found.interval[0] == 0.1
    assert found.threshold is None
    assert finding_of({"name": "y", "value": 2, "verdict": "pass", "unknown": 1}).value == pytest.approx(2)
