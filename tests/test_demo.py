"""The main job on the embedded cohort, small: everything is there, it goes on where it stopped, and it says what it is."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from engine import demo
from engine.cohort import joint
from engine.cohort.tables import read_table
from engine.cohort.write import verify
from engine.errors import UsageError
from engine.imaging import audit_judges
from engine.release.audit_run import run_audit
from engine.release.manifest import release
from engine.release.manifest import verify as verify_release

CONFIG = """
people: 80
synthetic_people: 24
genomics: {ne: 20000, mismatch: 2.0e-4}
imaging: IMAGING
imaging_overrides:
  - autoencoder.steps=10
  - autoencoder.batch_size=2
  - autoencoder.widths=[8,16]
  - autoencoder.adversarial_weight=0
  - flow.steps=10
  - flow.batch_size=4
  - flow.widths=[16,24,32]
  - sampling.steps=2
"""


# Draws behind the audits' own rates, and scans laid on others: fewer than a demo takes, because tests/audit and
# tests/imaging look at what they say.
RATES = "contamination_repeats: 4\nhonest_repeats: 1\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, config, summary) of a demo with models too small to be good; audits are short while the module runs."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "policy.yaml").write_text(RATES)
    config = folder / "demo.yaml"
    heads = Path(demo.__file__).resolve().parents[1] / "configs" / "cohort" / "heads.yaml"
    config.write_text(CONFIG.replace("IMAGING", str(heads)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run_audit", partial(run_audit, policy=folder / "policy.yaml"))
        patch.setattr(audit_judges, "CANDIDATES", 2)
        yield folder / "out", config, demo.run_demo(folder / "out", config=config, seed=3)


def test_every_stage_leaves_its_folder_with_provenance(finished) -> None:
    out, _, summary = finished
    models = ("model", "model/genomics", "model/imaging")
    for name in (".", "cohort", *models, "synthetic", "audit-genotypes", "audit-scans"):
        record = json.loads((out / name / "provenance.json").read_text())
        assert {"commit", "config", "inputs", "versions", "seed"} <= set(record), name
    page = (out / "report.html").read_text()
    kept = ("How much of the known truth was kept", "Planted", "ventricle ad effect")
    for words in ("Scans", "Genotypes", "Who depends on whom", *kept, "Audit of scans", "Audit of genotypes"):
        assert words in page
    assert page.count('type="range"') == 3  # a slider per plane
    assert page.count("data:image/png;base64,") > 3 * 24  # and its slices
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert summary["made"]["people"] == 24
    assert summary["made"]["haplotypes"] == 48


def test_it_is_the_joint_model_that_makes_the_people(finished) -> None:
    """What lies there is what the commands on cohorts take; some have two visits; only training people were learned from."""
    out, _, summary = finished
    model = joint.load(out / "model")
    assert verify(out / "synthetic") == []
    visits = read_table(out / "synthetic" / "visits.tsv")
    again = [row for person in model.generate(24, seed=3, scans=False, complete=True) for row in person.visits]
    assert list(visits["age"]) == [round(row["age"], 4) for row in again]
    assert summary["made"]["scans"] == len(again) == len(list((out / "synthetic" / "bids").rglob("*.nii.gz"))) > 24
    assert model.scan_covariates == ("age", "sex", "group", "diagnosis", "years")
    assert model.scan_model.config.flow.baseline
    assert model.genetics.model.config.ne == 20000
    split = dict(zip(*(read_table(out / "cohort" / "subjects.csv")[name] for name in ("subject", "split"))))
    assert model.table.people == summary["made"]["learned_from_people"] == list(split.values()).count("train")
    assert all(split[name] == "train" for name in read_table(out / "model" / "imaging" / "train.csv")["subject"])


def test_what_is_made_passes_the_gate_where_its_audit_passes(finished, tmp_path: Path) -> None:
    """The gate on the real files of the demo, whatever the audit of so small a model says."""
    out = finished[0]
    for name, place, more in (("genotypes", "genotypes.bcf", {}), ("scans", "bids", {"bids": "T1w"})):
        audit = json.loads((out / f"audit-{name}" / "audit.json").read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps({**audit, "verdict": "pass"}))
        release(out / "synthetic" / place, tmp_path / f"{name}.json", tmp_path / name, forbidden=["EMB00001"], **more)
        assert verify_release(tmp_path / name)["data_files"] >= 1
    people = read_table(tmp_path / "scans" / "data" / "participants.tsv")
    assert [f"sub-SYN{k:09d}" for k in range(24)] == list(people["participant_id"])
    assert {"group", "sex", "diagnosis"} <= set(people)


def test_the_gate_opens_only_for_what_passed(finished) -> None:
    out, _, summary = finished
    for name in ("genotypes", "scans"):
        passed = summary["audit"][name]["verdict"] == "pass"
        assert (out / "release" / name / "manifest.json").is_file() == passed
        assert summary["released"][name].startswith("refused") == (not passed)


def test_an_untrained_model_is_seen_to_be_bad(finished) -> None:
    """Ten steps make no head: the report must say so."""
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
