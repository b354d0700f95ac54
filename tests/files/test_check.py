"""`check_paths`: one verdict per input for anything a file system can hold, and never a traceback."""

from __future__ import annotations

import csv
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.files.check import check_paths
from engine.files.dicom import write_series
from engine.files.nifti import write_nifti
from engine.files.volumes import VolumeData

VOLUME = VolumeData(np.arange(4 * 5 * 3, dtype=np.int16).reshape(4, 5, 3), np.eye(4), "CT", "HU")


def verdicts(*paths: Path) -> dict[str, str]:
    return {Path(found["path"]).name: found["verdict"] for found in check_paths(paths)}


def why(path: Path) -> str:
    (found,) = check_paths([path])
    assert found["verdict"] == "reject"
    return found["why"]


def test_files_and_folders_are_told_by_content(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", VOLUME)
    (tmp_path / "a.nii.gz").rename(tmp_path / "no_suffix")
    write_nifti(tmp_path / "b.nii", VOLUME)
    write_series(tmp_path / "series", VOLUME)
    slice_ = next((tmp_path / "series").iterdir())
    named_wrongly = tmp_path / "slice.nii"
    named_wrongly.write_bytes(slice_.read_bytes())
    found = check_paths([tmp_path / "no_suffix", tmp_path / "b.nii", tmp_path / "series", slice_, named_wrongly])
    assert [f["verdict"] for f in found] == ["warn", "ok", "ok", "warn", "warn"]
    assert "gzip" in found[0]["why"]
    assert "one slice" in found[4]["why"]


def test_a_folder_of_scans_stands_for_its_scans(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii", VOLUME)
    write_nifti(tmp_path / "b.nii.gz", VOLUME)
    (tmp_path / "b.nii.gz").write_bytes((tmp_path / "b.nii.gz").read_bytes()[:-1])
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "link.nii").symlink_to(tmp_path / "a.nii")
    assert verdicts(tmp_path) == {"a.nii": "ok", "b.nii.gz": "reject"}


def test_a_pair_in_a_folder_is_one_input(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii", VOLUME)
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[344:347] = b"ni1"
    content[108:112] = bytes(4)
    (tmp_path / "p.hdr").write_bytes(content[:348])
    (tmp_path / "p.img").write_bytes(content[352:])
    assert verdicts(tmp_path) == {"a.nii": "ok", "p.hdr": "ok"}


def test_what_is_no_scan_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text.txt").write_text("hello")
    os.mkfifo(tmp_path / "pipe")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x", "y")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "text.txt", "text.txt")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "a.nrrd").write_text("NRRD0004\n")
    assert "no DICOM" in why(tmp_path / "empty_folder") or "none" in why(tmp_path / "empty_folder")
    assert why(tmp_path / "empty") == "an empty file"
    assert why(tmp_path / "text.txt") == "neither a scan nor a genotype file"
    assert why(tmp_path / "pipe") == "neither a file nor a folder"
    assert "archive" in why(tmp_path / "a.zip")
    assert "archive" in why(tmp_path / "a.tar")
    assert why(tmp_path / "loop") == "cannot be opened"
    assert "format" in why(tmp_path / "a.nrrd")
    assert why(tmp_path / "nothing.nii") == "no such file"
    assert why(Path("bad\0name.nii")) in ("cannot be opened", "no such file")


def test_an_unforeseen_error_becomes_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nifti(tmp_path / "a.nii", VOLUME)

    def broken(path: Path) -> tuple[str, str]:
        raise ZeroDivisionError("CANARY")

    monkeypatch.setattr("engine.files.nifti.check", broken)
    (found,) = check_paths([tmp_path / "a.nii"])
    assert found["verdict"] == "reject"
    assert "ZeroDivisionError" in found["why"]
    assert "CANARY" not in found["why"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=400),
    name=st.sampled_from(["a.nii", "a.nii.gz", "a.dcm", "a", "a.hdr", "a.ima", "1.2.3"]),
)
def test_any_bytes_under_any_name_get_a_verdict(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    (found,) = check_paths([tmp_path / name])
    assert found["verdict"] in ("ok", "warn", "reject")
    assert found["why"]
    assert "\n" not in found["why"]
    (tmp_path / name).unlink()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_slices_get_a_verdict(tmp_path: Path, data: st.DataObject) -> None:
    if not (tmp_path / "series").exists():
        write_series(tmp_path / "series", VOLUME, uid_source="fuzz")
    content = bytearray((tmp_path / "series" / "slice_00002.dcm").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(120, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    folder = tmp_path / "fuzz"
    folder.mkdir(exist_ok=True)
    for name in ("slice_00001.dcm", "slice_00003.dcm"):
        (folder / name).write_bytes((tmp_path / "series" / name).read_bytes())
    (folder / "slice_00002.dcm").write_bytes(content)
    for path in (folder, folder / "slice_00002.dcm"):
        (found,) = check_paths([path])
        assert found["verdict"] in ("ok", "warn", "reject")
        assert found["why"]
        assert "\n" not in found["why"]


def test_genotype_files_go_to_their_own_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pretend(path: Path) -> tuple[str, str]:
        asked.append(path.name)
        return "ok", "genotypes"

    monkeypatch.setattr("engine.files.vcf.check", pretend)
    for name, content in [
        ("a.vcf.gz", b"\x1f\x8b"),
        ("a.bcf", b"x"),
        ("plain", b"##fileformat=VCFv4.3\n"),
        ("a.pgen", b"l\x1b"),
    ]:
        (tmp_path / name).write_bytes(content)
    assert set(verdicts(tmp_path).values()) == {"ok"}
    assert sorted(asked) == ["a.bcf", "a.pgen", "a.vcf.gz", "plain"]


# ---- real data


def test_both_bad_collections_through_the_one_door(real_data: Path) -> None:
    wrong = []
    for kind, column in (("nifti", "file"), ("dicom", "folder")):
        folder = real_data / "bad" / kind
        with open(folder / "EXPECTED.csv", newline="") as stream:
            for row in csv.DictReader(stream):
                (found,) = check_paths([folder / row[column]])
                if found["verdict"] != row["expected"]:
                    wrong.append((row[column], row["expected"], found))
    assert wrong == []


def test_everything_in_the_collections_gets_a_verdict(real_data: Path) -> None:
    """Hundreds of odd files (charsets, directories, archives with links, colour, reports): no crash, no trace."""
    folders = [real_data / "dicom" / name for name in ("panimg", "pydicom_testfiles", "highdicom", "dcmqi")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    found = check_paths(files)
    assert len(found) == len(files) > 400
    assert [f for f in found if f["why"].startswith("cannot be read (")] == []
    reasons = {Path(f["path"]).name: f["why"] for f in found}
    assert "archive" in reasons["tar_with_sym_link.tar"]
