"""The release gate: what opens it, what keeps it shut, and that nothing of a real person passes."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from engine.audit import hash_files
from engine.errors import GateRefused, InputError, UsageError
from engine.release.manifest import MARK, release

CANARY = "CANARY-PATIENT-4711"


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "synthetic"
    (folder / "sub-1").mkdir(parents=True)
    (folder / "sub-1" / "t1.nii.gz").write_bytes(gzip.compress(b"voxels" * 1000))
    (folder / "participants.tsv").write_text("participant\tage\nSYN000\t70\n")
    made = {"command": "imaging sample", "commit": "c0ffee", "seed": 1, "inputs": [{"name": f"{CANARY}.nii"}]}
    (folder / "provenance.json").write_text(json.dumps(made))
    return folder


def audit_json(tmp_path, source, verdict="pass", **more):
    path = tmp_path / "audit.json"
    finding = {"name": "exact_copies", "value": 0.0, "interval": None, "n": 10, "threshold": 0.0, "verdict": "pass"}
    record = {"schema": "engine.audit/1", "verdict": verdict, "findings": [finding], "audited": hash_files(source), **more}
    path.write_text(json.dumps(record))
    return path


def test_release_of_audited_bytes(tmp_path, source):
    manifest = release(source, audit_json(tmp_path, source), tmp_path / "out", title="Heads")
    out = tmp_path / "out"
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert files == {
        "data/sub-1/t1.nii.gz", "data/participants.tsv", "manifest.json", "DATA_CARD.md", "SHA256SUMS", "provenance.json",
    }  # fmt: skip
    assert (out / "data/sub-1/t1.nii.gz").read_bytes() == (source / "sub-1/t1.nii.gz").read_bytes()
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["synthetic_data"] is True
    assert manifest["mark"] == MARK
    assert manifest["provenance"] == {"command": "imaging sample", "commit": "c0ffee", "seed": 1}
    assert MARK in (out / "DATA_CARD.md").read_text()
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert len((out / "SHA256SUMS").read_text().splitlines()) == 5


@pytest.mark.parametrize("verdict", ["fail", "void"])
def test_only_a_passing_audit_opens_the_gate(tmp_path, source, verdict):
    with pytest.raises(GateRefused, match=verdict) as caught:
        release(source, audit_json(tmp_path, source, verdict), tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def change(folder: Path, what: str) -> None:
    if what == "changed since the audit":
        (folder / "participants.tsv").write_text("participant\tage\nSYN000\t71\n")
    elif what == "never audited":
        (folder / "more.nii").write_bytes(b"x")
    else:
        (folder / "participants.tsv").unlink()


@pytest.mark.parametrize("what", ["changed since the audit", "never audited", "audited but absent"])
def test_other_bytes_than_the_audited_are_refused(tmp_path, source, what):
    audit = audit_json(tmp_path, source)
    change(source, what)
    with pytest.raises(GateRefused, match=what):
        release(source, audit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_audit_without_hashes_opens_nothing(tmp_path, source):
    with pytest.raises(GateRefused, match="hashes of the audited files"):
        release(source, audit_json(tmp_path, source, audited=[]), tmp_path / "out")


def test_other_types_hidden_files_and_links_are_refused(tmp_path, source):
    (source / "model.pt").write_bytes(b"weights")
    with pytest.raises(GateRefused, match=r"model\.pt"):
        release(source, audit_json(tmp_path, source), tmp_path / "out")
    (source / "model.pt").unlink()
    (source / ".cache.nii").write_bytes(b"x")
    with pytest.raises(GateRefused, match=r"\.cache\.nii"):
        release(source, audit_json(tmp_path, source), tmp_path / "out")
    (source / ".cache.nii").unlink()
    audit = audit_json(tmp_path, source)
    (source / "link.nii").symlink_to(source / "participants.tsv")
    with pytest.raises(InputError, match="symbolic link"):
        release(source, audit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_audit_files_and_existing_folders(tmp_path, source):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"an audit\.json"):
        release(source, tmp_path / "broken.json", tmp_path / "out")
    (tmp_path / "other.json").write_text(json.dumps({"schema": "else", "verdict": "pass"}))
    with pytest.raises(InputError, match="schema"):
        release(source, tmp_path / "other.json", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="does not exist yet"):
        release(source, audit_json(tmp_path, source), tmp_path / "out")


def test_the_canary_of_the_provenance_stays_inside(tmp_path, source):
    """The run's provenance names its input; the release must not."""
    release(source, audit_json(tmp_path, source), tmp_path / "out", forbidden=[CANARY])
    for path in (tmp_path / "out").rglob("*"):
        assert CANARY not in path.name
        assert path.is_dir() or CANARY.encode() not in path.read_bytes()


@pytest.mark.parametrize("place", ["text", "compressed", "name", "report"])
def test_a_planted_canary_is_found_wherever_it_is(tmp_path, source, place):
    report = None
    if place == "text":
        (source / "participants.tsv").write_text(f"participant\n{CANARY}\n")
    elif place == "compressed":
        (source / "sub-1" / "t1.nii.gz").write_bytes(gzip.compress(b"x" * (2**22 - 5) + CANARY.encode()))
    elif place == "name":
        (source / f"{CANARY}.nii").write_bytes(b"x")
    else:
        report = tmp_path / "page.html"
        report.write_text(f"<p>{CANARY}")
    with pytest.raises(GateRefused, match="forbidden string") as caught:
        release(source, audit_json(tmp_path, source), tmp_path / "out", report=report, forbidden=["other", CANARY])
    assert CANARY not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_file_is_a_source_too(tmp_path):
    panel = tmp_path / "panel.bcf"
    panel.write_bytes(b"genotypes")
    release(panel, audit_json(tmp_path, panel), tmp_path / "out")
    assert (tmp_path / "out" / "data" / "panel.bcf").read_bytes() == b"genotypes"
