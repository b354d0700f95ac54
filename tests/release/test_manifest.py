"""The release gate: what opens it, what keeps it shut, that nothing of a real person passes, and that a release verifies."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from engine.errors import GateRefused, InputError, UsageError
from engine.release.forbidden import refuse_forbidden
from engine.release.manifest import release, verify
from engine.release.marks import MARK

CANARY = "CANARY-PATIENT-4711"
DESCRIBED = {
    "manifest.json", "DATA_CARD.md", "report.html", "croissant.json", "ro-crate-metadata.json", "healthdcat-ap.jsonld",
    "provenance.json",
}  # fmt: skip


def test_release_of_audited_bytes(tmp_path, scans, audited):
    manifest = release(scans, audited(scans), tmp_path / "out", title="Heads")
    out = tmp_path / "out"
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    names = [p.name for p in scans.glob("*.nii.gz")]
    data = {f"data/{name}" for name in names} | {f"data/{name.replace('.nii.gz', '.json')}" for name in names}
    data |= {
        "data/volumes.csv",
        "data/volumes.csv-metadata.json",
        "data/checksums.json",
        "data/checksums.json.synthetic.json",
    }
    assert files == data | DESCRIBED | {"SHA256SUMS"}
    for name in names:
        assert (out / "data" / name).read_bytes() == (scans / name).read_bytes()
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["synthetic_data"] is True
    assert manifest["mark"] == MARK
    assert manifest["provenance"] == {"command": "imaging sample", "commit": "c0ffee", "seed": 1}
    assert MARK in (out / "DATA_CARD.md").read_text()
    listed = dict(reversed(line.split("  ")) for line in (out / "SHA256SUMS").read_text().splitlines())
    assert set(listed) == files - {"SHA256SUMS"}
    for name, digest in listed.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert verify(out) == {
        "files": len(listed), "data_files": 14, "signature": "none", "signed_by": None, "verdict": "pass", "title": "Heads",
    }  # fmt: skip


def test_every_file_is_marked(tmp_path, scans, audited):
    """In its own header, in the JSON file beside it, or by being a description that says so itself."""
    out = tmp_path / "out"
    manifest = release(scans, audited(scans), out)
    for entry in manifest["files"]:
        assert entry["mark"] != "sidecar" or entry["sidecar"]
        if entry["sidecar"]:
            said = json.loads((out / entry["sidecar"]).read_text())
            assert said.get("SyntheticData", said.get("schema:SyntheticData")) is True
    for name in DESCRIBED - {"report.html"}:
        assert "ynthetic" in (out / name).read_text()


def test_the_same_bytes_have_the_same_identifier(tmp_path, scans, audited, volume):
    first = release(scans, audited(scans), tmp_path / "a")["identifier"]
    assert release(scans, audited(scans), tmp_path / "b", title="Another")["identifier"] == first
    (scans / "volumes.csv").write_text("image,subject\n")
    assert release(scans, audited(scans), tmp_path / "c")["identifier"] != first


@pytest.mark.parametrize("verdict", ["fail", "void"])
def test_only_a_passing_audit_opens_the_gate(tmp_path, scans, audited, verdict):
    with pytest.raises(GateRefused, match=verdict) as caught:
        release(scans, audited(scans, verdict), tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def change(folder: Path, what: str) -> None:
    if what == "changed since the audit":
        (folder / "volumes.csv").write_text("image,subject\n")
    elif what == "never audited":
        (folder / "more.nii").write_bytes(b"x")
    else:
        (folder / "volumes.csv").unlink()


@pytest.mark.parametrize("what", ["changed since the audit", "never audited", "audited but absent"])
def test_other_bytes_than_the_audited_are_refused(tmp_path, scans, audited, what):
    audit = audited(scans)
    change(scans, what)
    with pytest.raises(GateRefused, match=what):
        release(scans, audit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_audit_without_hashes_opens_nothing(tmp_path, scans, audited):
    with pytest.raises(GateRefused, match="hashes of the audited files"):
        release(scans, audited(scans, audited=[]), tmp_path / "out")


def test_other_types_hidden_files_and_links_are_refused(tmp_path, scans, audited):
    (scans / "model.pt").write_bytes(b"weights")
    with pytest.raises(GateRefused, match=r"model\.pt"):
        release(scans, audited(scans), tmp_path / "out")
    (scans / "model.pt").unlink()
    (scans / ".cache.nii").write_bytes(b"x")
    with pytest.raises(GateRefused, match=r"\.cache\.nii"):
        release(scans, audited(scans), tmp_path / "out")
    (scans / ".cache.nii").unlink()
    audit = audited(scans)
    (scans / "link.nii").symlink_to(scans / "volumes.csv")
    with pytest.raises(InputError, match="symbolic link"):
        release(scans, audit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_embeddings_and_neighbours_have_no_way_in(tmp_path, scans, audited):
    """Types that hold arrays are not on the list, whatever they are called."""
    for name in ("train_embedding.npy", "store.safetensors", "nearest.npz", "pool.h5"):
        (scans / name).write_bytes(np.zeros(8, np.float32).tobytes())
        with pytest.raises(GateRefused, match=name):
            release(scans, audited(scans), tmp_path / "out")
        (scans / name).unlink()


def test_bad_audit_files_and_existing_folders(tmp_path, scans, audited):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"an audit\.json"):
        release(scans, tmp_path / "broken.json", tmp_path / "out")
    (tmp_path / "other.json").write_text(json.dumps({"schema": "else", "verdict": "pass"}))
    with pytest.raises(InputError, match="schema"):
        release(scans, tmp_path / "other.json", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="does not exist yet"):
        release(scans, audited(scans), tmp_path / "out")


def test_a_file_in_the_place_of_a_mark_is_refused(tmp_path, scans, audited):
    (scans / "SYN000000000_visit0.json").write_text('{"SyntheticData": false}')
    with pytest.raises(GateRefused, match="room for the mark"):
        release(scans, audited(scans), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_canary_of_the_provenance_stays_inside(tmp_path, scans, audited):
    """The run's provenance names its input; the release must not."""
    release(scans, audited(scans), tmp_path / "out", forbidden=[CANARY])
    for path in (tmp_path / "out").rglob("*"):
        assert CANARY not in path.name
        assert path.is_dir() or CANARY.encode() not in path.read_bytes()


@pytest.mark.parametrize("place", ["text", "compressed", "name", "title"])
def test_a_planted_canary_is_found_wherever_it_is(tmp_path, scans, audited, place):
    title = "Heads"
    if place == "text":
        (scans / "volumes.csv").write_text(f"image,remark\n,{CANARY}\n")
    elif place == "compressed":
        scan = scans / "SYN000000000_visit0.nii.gz"
        scan.write_bytes(gzip.compress(gzip.decompress(scan.read_bytes())[: -len(CANARY)] + CANARY.encode()))
    elif place == "name":
        (scans / "SYN000000000_visit0.nii.gz").rename(scans / f"{CANARY}.nii.gz")
    else:
        title = f"Heads like {CANARY}"
    with pytest.raises(GateRefused, match="forbidden string") as caught:
        release(scans, audited(scans), tmp_path / "out", title=title, forbidden=["other", CANARY])
    assert CANARY not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_word_across_two_blocks_is_found(tmp_path):
    (tmp_path / "f.gz").write_bytes(gzip.compress(b"x" * (2**22 - 5) + CANARY.encode()))
    with pytest.raises(GateRefused, match="forbidden string"):
        refuse_forbidden(tmp_path, [CANARY])
    refuse_forbidden(tmp_path, ["OTHER"])


def test_one_file_is_a_source_too(tmp_path, panel, audited):
    from engine.genomics.panel import write_panel

    write_panel(panel, tmp_path / "panel.bcf", header_lines=["##SYNTHETIC=every sample is synthetic"])
    (tmp_path / "panel.bcf.provenance.json").write_text(json.dumps({"commit": "c0ffee", "inputs": [{"name": CANARY}]}))
    made = release(tmp_path / "panel.bcf", audited(tmp_path / "panel.bcf"), tmp_path / "out", forbidden=[CANARY])
    assert (tmp_path / "out" / "data" / "panel.bcf").read_bytes() == (tmp_path / "panel.bcf").read_bytes()
    assert made["provenance"] == {"commit": "c0ffee"}
    assert verify(tmp_path / "out")["data_files"] == 1
    folder = tmp_path / "folder"  # the same in a folder, with its index and its record
    folder.mkdir()
    for path in tmp_path.glob("panel.bcf*"):
        path.rename(folder / path.name)
    made = release(folder, audited(folder), tmp_path / "more", forbidden=[CANARY])
    assert {p.name for p in (tmp_path / "more" / "data").iterdir()} == {"panel.bcf", "panel.bcf.csi"}
    assert made["provenance"] == {"commit": "c0ffee"}


# ----------------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("what", ["changed", "absent", "not listed"])
def test_verify_sees_what_happened_to_a_release(tmp_path, scans, audited, what):
    out = tmp_path / "out"
    release(scans, audited(scans), out)
    if what == "changed":
        with (out / "DATA_CARD.md").open("a") as stream:
            stream.write("May be used for diagnosis.\n")
    elif what == "absent":
        (out / "data" / "SYN000000000_visit0.json").unlink()
    else:
        (out / "data" / "real.nii").write_bytes(b"x")
    with pytest.raises(GateRefused, match=what):
        verify(out)


def test_verify_reads_the_marks_themselves(tmp_path, scans, audited):
    """A release whose checksums were written anew after the marks were wiped is not accepted."""
    out = tmp_path / "out"
    release(scans, audited(scans), out)
    beside = out / "data" / "SYN000000000_visit0.json"
    beside.write_text(beside.read_text().replace("true", "false"))
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(out).as_posix()}"
            for p in sorted(out.rglob("*")) if p.is_file() and p.name != "SHA256SUMS"]  # fmt: skip
    (out / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    with pytest.raises(GateRefused, match="SyntheticData true"):
        verify(out)


def keys(folder: Path) -> tuple[Path, Path]:
    private, public = folder / "key.pem", folder / "public.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    return private, public


def test_a_signature_covers_every_file_and_openssl_reads_it(tmp_path, scans, audited):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    private, public = keys(tmp_path / "one")
    _, stranger = keys(tmp_path / "two")
    out = tmp_path / "out"
    manifest = release(scans, audited(scans), out, sign=private)
    assert verify(out)["signature"] == "not checked"
    assert verify(out, key=public)["signature"] == "valid"
    assert manifest["signed_by"] == verify(out)["signed_by"]
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", out / "SHA256SUMS",
               "-sigfile", out / "SHA256SUMS.sig"]  # fmt: skip
    assert subprocess.run(command, capture_output=True).returncode == 0
    with pytest.raises(GateRefused, match="by this key"):
        verify(out, key=stranger)
    sums = out / "SHA256SUMS"
    (out / "DATA_CARD.md").write_text("changed")
    changed = hashlib.sha256(b"changed").hexdigest()
    sums.write_text("\n".join(f"{changed}  DATA_CARD.md" if "DATA_CARD" in line else line
                              for line in sums.read_text().splitlines()) + "\n")  # fmt: skip
    assert verify(out)["signature"] == "not checked"  # whole by itself, and not what was signed
    with pytest.raises(GateRefused, match="by this key"):
        verify(out, key=public)
    (out / "SHA256SUMS.sig").unlink()
    with pytest.raises(GateRefused, match="a signed release"):
        verify(out, key=public)


def test_a_bad_key_is_one_line_and_says_nothing_of_what_is_in_it(tmp_path, scans, audited):
    (tmp_path / "key.pem").write_text("-----BEGIN SECRET-----\nhunter2\n")
    with pytest.raises(InputError, match="Ed25519") as caught:
        release(scans, audited(scans), tmp_path / "out", sign=tmp_path / "key.pem")
    assert "hunter2" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ cards


def test_the_model_card_takes_numbers_and_leaves_text(tmp_path, scans, audited):
    run = tmp_path / "run"
    (run / "checkpoints" / "step-000040").mkdir(parents=True)
    (run / "config.yaml").write_text(
        f"flow: {{steps: 40, widths: [8, 16]}}\ndata: {{table: {CANARY}.csv, mirror: true}}\n"
    )
    made = {"command": "imaging train", "commit": "beef", "seed": 3, "versions": {"torch": "2"}, "inputs": [CANARY]}
    (run / "provenance.json").write_text(json.dumps(made))
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    finding = {"name": "frechet_shape", "value": 2.6, "interval": [1.3, 4.0], "n": 41, "floor": 3.9, "verdict": "pass"}
    (evaluation / "findings.json").write_text(json.dumps({"real": 41, "findings": [{**finding, "detail": CANARY}]}))
    out = tmp_path / "out"
    release(scans, audited(scans), out, model=run, evaluation=[evaluation], forbidden=[CANARY])
    card = (out / "MODEL_CARD.md").read_text()
    for words in ("flow.steps: 40", "flow.widths: [8, 16]", "data.mirror: True", "commit beef", "Training steps: 40",
                  "train: 30 people, 40 rows", "| frechet_shape | 2.6 | 1.3 to 4 | 41 | 3.9 |", "## Not for"):  # fmt: skip
        assert words in card
    assert "table" not in card
    assert "frechet_shape" in (out / "DATA_CARD.md").read_text()
    with pytest.raises(InputError, match=r"config\.yaml"):
        release(scans, audited(scans), tmp_path / "no", model=evaluation)
    with pytest.raises(InputError, match=r"evaluation\.json"):
        release(scans, audited(scans), tmp_path / "no", evaluation=[run])
