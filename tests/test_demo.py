"""The main job on the embedded cohort, small: everything is there, it goes on where it stopped, and it says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import demo
from engine.errors import UsageError

CONFIG = """
people: 80
synthetic_people: 24
genomics: {ne: 20000, mismatch: 2.0e-4}
imaging: IMAGING
imaging_overrides:
  - autoencoder.steps=20
  - autoencoder.widths=[8,16]
  - autoencoder.adversarial_weight=0
  - flow.steps=20
  - flow.widths=[16,24,32]
  - sampling.steps=2
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, config, summary) of a demo with models too small to be good."""
    folder = tmp_path_factory.mktemp("demo")
    config = folder / "demo.yaml"
    heads = Path(demo.__file__).resolve().parents[1] / "configs" / "imaging" / "demo_heads.yaml"
    config.write_text(CONFIG.replace("IMAGING", str(heads)))
    return folder / "out", config, demo.run_demo(folder / "out", config=config, seed=3)


def test_every_stage_leaves_its_folder_with_provenance(finished) -> None:
    out, _, summary = finished
    for name in (".", "cohort", "genomics-run", "imaging-run", "synthetic", "audit-genotypes", "audit-scans"):
        record = json.loads((out / name / "provenance.json").read_text())
        assert {"commit", "config", "inputs", "versions", "seed"} <= set(record), name
    page = (out / "report.html").read_text()
    for words in ("Scans", "Genotypes", "How much of the known truth was kept", "Audit of scans", "Audit of genotypes"):
        assert words in page
    assert page.count('type="range"') == 3  # a slider per plane
    assert page.count("data:image/png;base64,") > 3 * 24  # and its slices
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert summary["made"]["people"] == 24
    assert summary["made"]["haplotypes"] == 48


def test_the_gate_opens_only_for_what_passed(finished) -> None:
    out, _, summary = finished
    for name in ("genotypes", "scans"):
        passed = summary["audit"][name]["verdict"] == "pass"
        assert (out / "release" / name / "manifest.json").is_file() == passed
        assert summary["released"][name].startswith("refused") == (not passed)


def test_an_untrained_model_is_seen_to_be_bad(finished) -> None:
    """Twenty steps make no head: the report must say so."""
    frechet = next(f for f in finished[2]["findings"]["scans"] if f["name"] == "frechet_shape")
    assert frechet["value"] > 3 * frechet["floor"]
    assert frechet["verdict"] == "fail"


def test_the_summary_fits_one_screen(finished) -> None:
    lines = demo.summary_lines(finished[2])
    text = "\n".join(lines)
    assert len(lines) <= 24
    for words in ("Made", "How good", "May it leave", "Report", "audit of genotypes", "audit of scans"):
        assert words in text


def test_it_goes_on_where_it_stopped_and_keeps_its_request(finished) -> None:
    out, config, first = finished
    before = {p: p.stat().st_mtime_ns for p in (out / "synthetic").rglob("*") if p.is_file()}
    again = demo.run_demo(out, config=config, seed=3)
    assert {p: p.stat().st_mtime_ns for p in (out / "synthetic").rglob("*") if p.is_file()} == before
    assert [f["value"] for f in again["findings"]["scans"]] == [f["value"] for f in first["findings"]["scans"]]
    with pytest.raises(UsageError, match="begun with"):
        demo.run_demo(out, config=config, seed=4)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("mine")
    with pytest.raises(UsageError, match="other things"):
        demo.run_demo(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.doc"]


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("peopel: 80\n")
    with pytest.raises(UsageError, match="'people'"):
        demo.run_demo(tmp_path / "out", config=tmp_path / "demo.yaml")
