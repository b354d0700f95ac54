"""Canaries through the whole job: real people's ids, names, headers and paths go in, and no byte of them comes out.

Scans and genotypes go from files to a release at a size of seconds. Every file that the sample, the audit and the release leave
is searched, inside gzip and base64 as well, and so is everything that was printed.
"""

from __future__ import annotations

import base64
import csv
import gzip
import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest

from engine.errors import EngineError
from engine.genomics.panel import panel_from_alleles, write_panel
from engine.release.audit_run import audit_files
from engine.release.manifest import release, verify

NEEDLE = b"CANARY"
POLICY = "honest_repeats: 1\ncontamination_repeats: 1\nsubsets: 1\naats_rows: 50\nmembership_people: 50\n"
CONFIG = """
data: {size: [16, 16, 16], covariates: {age: {kind: continuous}}, holdout_share: 0.4}
autoencoder: {steps: 4, batch_size: 2, widths: [8, 16], latent_channels: 2, shift_voxels: 1, adversarial_weight: 0}
flow: {steps: 6, batch_size: 2, widths: [8, 16], attention_levels: [1], embedding_width: 16, views: 2, warmup_steps: 1}
sampling: {steps: 2}
training: {precision: fp32, log_every_steps: 2}
"""


def contents(path: Path):
    """The bytes of a file, of what gzip holds, and of what base64 in a page holds."""
    raw = path.read_bytes()
    yield raw
    if raw[:2] == b"\x1f\x8b":
        yield gzip.decompress(raw)
    for text in re.findall(rb"base64,([A-Za-z0-9+/=]+)", raw):
        yield base64.b64decode(text)


def search(*folders: Path) -> list[str]:
    """Names of the files below, in which the needle stands or whose name it is."""
    found = []
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            inside = path.is_file() and any(NEEDLE in text.upper() for text in contents(path))
            if NEEDLE.decode() in path.relative_to(folder).as_posix().upper() or inside:
                found.append(path.name)
    return found


def passed(audit: Path) -> Path:
    """The audit.json with a passing verdict: models this small may be judged in any way, and the gate has tests of its own."""
    path = audit / "audit.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "verdict": "pass"}))
    return path


def said(capfd, caplog) -> str:
    printed = capfd.readouterr()
    return (printed.out + printed.err + caplog.text).upper()


def test_no_canary_of_a_genotype_panel_comes_out(tmp_path, capfd, caplog):
    from engine.genomics.commands import fit_command, sample_command

    rng = np.random.default_rng(0)
    sites, people = 200, {"train": 60, "holdout": 60}
    founders = rng.integers(0, 2, (sites, 40)).astype(np.uint8)
    inside = tmp_path / "CANARY-ward"
    inside.mkdir()
    real = {}
    for side, n in people.items():
        source = rng.integers(0, 40, (2 * n, sites))
        keep = np.arange(sites)[None] // rng.integers(10, 40, (2 * n, 1))  # founders are copied in stretches
        source = np.take_along_axis(source, np.minimum(keep, sites - 1), axis=1)
        alleles_ln = founders[np.arange(sites)[:, None], source.T] ^ (rng.random((sites, 2 * n)) < 0.01)
        panel = panel_from_alleles(
            alleles_ln.astype(np.uint8), np.arange(sites) * 5000 + 1000, "22", [f"{side}CANARY{k}" for k in range(n)],
            contig_length={"22": 51304566}, assembly="GRCh37",
        )  # fmt: skip
        real[side] = inside / f"CANARY-{side}.bcf"
        write_panel(panel, real[side], header_lines=["##CANARY=Jane Canary", "##reference_file=/home/canary/hg19.fa"])
    (inside / "canary.map").write_text("pos chr cM\n1000 22 0\n1600000 22 3\n")
    (inside / "policy.yaml").write_text(POLICY)

    fit_command(real["train"], out=tmp_path / "CANARY-run", map=inside / "canary.map")
    capfd.readouterr()
    out = tmp_path / "out"
    sample_command(tmp_path / "CANARY-run", 40, out=out / "synthetic.bcf", seed=1)
    audit_files(real["train"], real["holdout"], out / "synthetic.bcf", out / "audit", policy=inside / "policy.yaml")
    made = release(out / "synthetic.bcf", passed(out / "audit"), out / "release", model=tmp_path / "CANARY-run")
    assert verify(out / "release")["data_files"] == 1
    assert made["provenance"]["seed"] == 1
    assert search(out) == []
    assert NEEDLE.decode() not in said(capfd, caplog)
    assert search(tmp_path / "CANARY-run"), "the search can find one: the run folder stays inside and names its input"


def scan(path: Path, k: int) -> None:
    """A real scan that is full of names."""
    rng = np.random.default_rng(k)
    array = 4 * rng.random((16, 16, 16), dtype=np.float32)
    array[4:12, 4:12, 3 + k % 4 : 12] += 80 + 5 * (k % 5) + 10 * rng.random()
    image = nibabel.Nifti1Image(array, np.diag([2.0, 2, 2, 1]))
    image.header["descrip"] = b"CANARY^JANE 19600101"
    image.header["aux_file"] = b"/home/canary"
    image.header["db_name"] = b"CANARY"
    image.header["intent_name"] = b"CANARY"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"CANARY, Jane"))
    nibabel.save(image, path)


@pytest.fixture(scope="module")
def ward(tmp_path_factory) -> Path:
    """120 people with a scan each, and a run that learned from most of them."""
    from engine.imaging.commands import train_command

    folder = tmp_path_factory.mktemp("ward")
    with (folder / "volumes.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "subject", "age", "remark"])
        for k in range(48):
            scan(folder / f"CANARY-{k}.nii.gz", k)
            writer.writerow([f"CANARY-{k}.nii.gz", f"CANARYID{k}", 20 + k % 60, "referred by Dr Canary"])
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "policy.yaml").write_text(POLICY)
    train_command(folder / "config.yaml", folder / "volumes.csv", folder / "CANARY-run")
    return folder


@pytest.mark.parametrize("form", ["nifti", pytest.param("bids", marks=pytest.mark.slow), "dicom"])
def test_no_canary_of_a_scan_comes_out(tmp_path, ward, audited, capfd, caplog, form):
    from engine.imaging.commands import sample_command

    out, run = tmp_path / "out", ward / "CANARY-run"
    capfd.readouterr()
    sample_command(run, 6, out / "synthetic", seed=2, format="dicom" if form == "dicom" else "nifti")
    audit = audited(out / "synthetic")
    release(out / "synthetic", audit, out / "release", bids="T1w" if form == "bids" else None, model=run)
    verify(out / "release")
    assert search(out) == []
    assert NEEDLE.decode() not in said(capfd, caplog)
    assert search(ward), "the search can find one"


@pytest.mark.slow  # registers scans: minutes
def test_no_canary_and_no_real_image_passes_an_audit_of_scans(tmp_path, ward, capfd, caplog):
    from engine.imaging.commands import sample_command

    out, run = tmp_path / "out", ward / "CANARY-run"
    capfd.readouterr()
    sample_command(run, 12, out / "synthetic", seed=2)
    audit_files(run / "train.csv", run / "holdout.csv", out / "synthetic", out / "audit", policy=ward / "policy.yaml")
    release(out / "synthetic", passed(out / "audit"), out / "release", model=run)
    assert search(out) == []
    assert NEEDLE.decode() not in said(capfd, caplog)
    inside, outside = ((out / where / "report.html").read_text() for where in ("audit", "release"))
    strip = r'<img style="[^"]*" src="([^"]+)" alt="({}), '
    real = [image for image, _ in re.findall(strip.format("real|nearest training scan"), inside)]
    made = [image for image, _ in re.findall(strip.format("synthetic"), outside)]
    assert len(real) > 20
    assert len(made) > 20
    assert not any(image in outside for image in real)
    assert not re.search(strip.format("real|nearest training scan"), outside)
    assert "Internal." in inside
    assert "Internal." not in outside


def test_refusals_name_nobody(tmp_path, ward, capfd, caplog):
    """Every way in which a release is refused for what a file holds, with a person's id in that place."""
    from engine.audit import hash_files

    source = tmp_path / "synthetic"
    source.mkdir()
    cases = {
        "CANARYID7.csv": b"image,subject\na.nii,CANARYID7\n",
        "a.csv": b"image,subject\na.nii,CANARYID7\n",
        "a.nii.gz": (ward / "CANARY-7.nii.gz").read_bytes(),
        "a.vcf.gz": gzip.compress(b"##fileformat=VCFv4.3\n##SYNTHETIC=yes, synthetic\n##CANARY=1\n#CHROM\n"),
    }
    for name, content in cases.items():
        (source / name).write_bytes(content)
        record = {"schema": "engine.audit/1", "verdict": "pass", "audited": hash_files(source)}
        (tmp_path / "audit.json").write_text(json.dumps(record))
        with pytest.raises(EngineError) as caught:
            release(source, tmp_path / "audit.json", tmp_path / "out", forbidden=["CANARYID7"])
        if not name.startswith("CANARY"):  # a file's name has to be said, or nobody could take it out
            assert "CANARYID" not in str(caught.value)
            assert "JANE" not in str(caught.value)
        (source / name).unlink()
    assert "CANARYID7" not in said(capfd, caplog)
    assert not (tmp_path / "out").exists()
