"""Canaries through training: every text of a header, private tags, sidecars and names of files hold a word that no log, error,
warning, checkpoint, cache or output may hold.

Scans come as DICOM series and as NIfTI. Searched are all bytes and names below the run folder, the fitted scans, what was
sampled in both formats, and all that was printed, warned or logged. Left out are `train.csv` and
`holdout.csv` of the run folder: they are the user's table, cut in two, and lead back to the scans.
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from engine.errors import EngineError
from engine.files.dicom import write_series
from engine.files.volumes import VolumeData
from engine.imaging.commands import sample_command, train_command
from engine.imaging.prepare import prepare_command

NEEDLES = (b"CANARY", b"18480318", b"184803", b"1.2.826.777777", b"77777.125", b"777Y")
DECIMAL, WARD = "77777.125", "CANARY_JANE_18480318"
TEXT = {"LO", "SH", "PN", "LT", "ST", "UT", "UC", "UR", "AE", "CS"}
SPECIAL = {
    "DA": "18480318",
    "TM": "184803",
    "DT": "18480318184803",
    "AS": "777Y",
    "DS": DECIMAL,
    "UI": "1.2.826.777777",
}
# what says how the pixels are to be read and where they lie; and objects that make a file no image
STRUCTURE = {
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "Modality", "PhotometricInterpretation",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient",
    "SliceThickness", "SpacingBetweenSlices", "ImageType", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "ModalityLUTSequence", "DirectoryRecordSequence", "EncryptedAttributesSequence",
}  # fmt: skip
CONFIG = """
data: {size: [16, 16, 8], covariates: {age: {kind: continuous}}, holdout_share: 0.5}
autoencoder: {steps: 3, batch_size: 2, widths: [8, 16], latent_channels: 2, shift_voxels: 1, adversarial_weight: 0}
flow: {steps: 4, batch_size: 2, widths: [8, 16], attention_levels: [1], embedding_width: 16, views: 2, warmup_steps: 1}
sampling: {steps: 2}
training: {precision: fp32, log_every_steps: 1, checkpoint_every_steps: 2}
"""


def voxels(k: int) -> np.ndarray:
    rng = np.random.default_rng(k)
    array = rng.integers(0, 9, (16, 16, 8))
    array[4:12, 4:12, 1 + k % 4 : 6] += 80 + 5 * (k % 5)
    return array.astype(np.int16)


@cache
def canaries() -> tuple[Dataset, int]:
    """Every attribute of the dictionary that holds text, a date, a number as text or an id, with a canary; how many."""
    dataset = Dataset()
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        group = tag >> 16
        if not keyword or keyword in STRUCTURE or group in (0x0000, 0x0002, 0x0004, 0x0006, 0x0028) or group % 2:
            continue
        if vr in TEXT or vr in SPECIAL:
            dataset.add_new(tag, vr, SPECIAL.get(vr, "CANARY" if vr != "PN" else "CANARY^JANE"))
        elif vr == "SQ":
            inner = Dataset()
            inner.PatientName, inner.CodeMeaning, inner.StudyDate = "CANARY", "CANARY", "18480318"
            dataset.add_new(tag, "SQ", Sequence([inner]))
    block = dataset.private_block(0x0011, "CANARY", create=True)
    block.add_new(1, "LO", "CANARY")
    block.add_new(2, "OB", b"CANARY")
    return dataset, len(dataset)


def series(folder: Path, k: int) -> None:
    write_series(folder / "plain", VolumeData(voxels(k), np.diag([2.0, 2, 2, 1]), "MR"), uid_source=str(k))
    for number, path in enumerate(sorted((folder / "plain").iterdir())):
        dataset = pydicom.dcmread(path)
        dataset.update(canaries()[0])
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.777777.{k}.{number}"
        dataset.SeriesInstanceUID = f"1.2.826.777777.{k}"
        dataset.save_as(folder / f"CANARY_JANE_{number}.dcm")
    assert canaries()[1] > 3000
    shutil.rmtree(folder / "plain")
    (folder / "CANARY.json").write_text('{"PatientName": "CANARY"}')


def nifti(path: Path, k: int) -> None:
    image = nibabel.Nifti1Image(voxels(k), np.diag([2.0, 2, 2, 1]))
    for name in ("descrip", "aux_file", "db_name", "intent_name", "data_type"):
        image.header[name] = b"CANARY"
    for code in (2, 4, 6):
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension(code, b"CANARY, Jane, 18480318"))
    with path.open("wb") as raw, gzip.GzipFile("CANARY.nii", "wb", fileobj=raw) as stream:
        stream.write(image.to_bytes())
    path.with_name(path.name.replace(".nii.gz", ".json")).write_text('{"PatientName": "CANARY"}')


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six people, three as DICOM and three as NIfTI, in a folder that is named after one."""
    folder = tmp_path_factory.mktemp("ward") / "CANARY-ward"
    folder.mkdir()
    with (folder / "volumes.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "subject", "age", "remark"])
        for k in range(6):
            name = f"{WARD}_{k}" + (".nii.gz" if k % 2 else "")
            if k % 2:
                nifti(folder / name, k)
            else:
                (folder / name).mkdir()
                series(folder / name, k)
            writer.writerow([name, f"CANARY-{k}", 30 + k, "referred by Dr CANARY"])
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def contents(path: Path) -> list[bytes]:
    raw = path.read_bytes()
    return [raw.upper(), gzip.decompress(raw).upper()] if raw[:2] == b"\x1f\x8b" else [raw.upper()]


def found_in(folder: Path, without: tuple[str, ...] = ()) -> list[str]:
    """Files below `folder` that hold a needle, or are named by one."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        texts = [name.upper().encode(), *(contents(path) if path.is_file() else [])]
        if name not in without and any(needle in text for needle in NEEDLES for text in texts):
            found.append(name)
    return found


def assert_silent(texts: list[str]) -> None:
    assert not [text for text in texts if any(needle in text.upper().encode() for needle in NEEDLES)]


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    """Everything said since: on both streams, to loggers, and as warnings, which are raised to be heard."""
    caplog.set_level("DEBUG")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [*capfd.readouterr(), caplog.text, *(str(warning.message) for warning in caught)]


def test_the_search_finds_what_was_planted(ward: Path) -> None:
    assert len(found_in(ward)) > 3 * 9
    dataset = pydicom.dcmread(next((ward / f"{WARD}_0").glob("*.dcm")))
    assert dataset.PatientName == "CANARY^JANE"
    assert dataset.RequestAttributesSequence[0].CodeMeaning == "CANARY"


def test_no_canary_gets_into_a_run_or_out_of_it(ward: Path, tmp_path: Path, told) -> None:
    config, table, run = ward / "config.yaml", ward / "volumes.csv", tmp_path / "run"
    prepare_command(config, table, tmp_path / "fitted", workers=1)
    train_command(config, table, run, cache=tmp_path / "fitted")
    sample_command(run, 2, tmp_path / "out" / "nifti", seed=1)
    sample_command(run, 2, tmp_path / "out" / "dicom", seed=1, format="dicom")
    names = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    assert {"checkpoints", "provenance.json", "log.jsonl", "train.csv"} <= names
    assert len(list((tmp_path / "fitted").iterdir())) >= 2
    assert found_in(tmp_path, without=("run/train.csv", "run/holdout.csv")) == []
    assert_silent(told())
    inputs = json.loads((run / "provenance.json").read_text())["inputs"]
    assert [entry["name"].split()[0] for entry in inputs] == ["volumes.csv", *["row"] * (len(inputs) - 1)]
    assert len(inputs) > 2
    assert all(len(entry["sha256"]) == 64 for entry in inputs)


def test_a_stopped_preparation_names_nobody(ward: Path, tmp_path: Path, told) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_command(ward / "config.yaml", ward / "volumes.csv", tmp_path / "fitted", workers=1, progress=stop)
    assert len(list((tmp_path / "fitted" / "parts").iterdir())) == 2
    assert found_in(tmp_path) == []
    assert_silent(told())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def first_slice(folder: Path) -> Path:
    return sorted(folder.glob("*.dcm"))[0]


def set_in(path: Path, **values: object) -> None:
    dataset = pydicom.dcmread(path)
    for name, value in values.items():
        setattr(dataset, name, value)
    dataset.save_as(path)


def pair_without_image(folder: Path) -> None:
    nibabel.save(nibabel.Nifti1Pair(voxels(1), np.eye(4)), folder / "CANARY.img")
    (folder / "CANARY.img").unlink()


N, D = "CANARY_JANE_1.nii.gz", "CANARY_JANE_0"  # one of each, as copied
FAULTS = {
    "NIfTI cut": (N, lambda f: cut(f / N)),
    "NIfTI empty": (N, lambda f: (f / N).write_bytes(b"")),
    "not NIfTI": (N, lambda f: (f / N).write_bytes(b"CANARY" * 100)),
    "gone": ("CANARY_9.nii.gz", lambda f: None),
    "half a pair": ("CANARY.hdr", pair_without_image),
    "a slice cut": (D, lambda f: cut(first_slice(f / D))),
    "a slice gone": (D, lambda f: sorted((f / D).glob("*.dcm"))[5].unlink()),
    "another size": (D, lambda f: set_in(first_slice(f / D), Rows=3)),
    "no position": (D, lambda f: set_in(first_slice(f / D), ImagePositionPatient=None)),
    "spacing of text": (D, lambda f: set_in(first_slice(f / D), PixelSpacing=[0, 0])),
    "colour": (D, lambda f: set_in(first_slice(f / D), PhotometricInterpretation="CANARY")),
    "a directory": ("CANARY_empty", lambda f: (f / "CANARY_empty").mkdir()),
    "two series": (D, lambda f: set_in(first_slice(f / D), SeriesInstanceUID="1.2.826.777777.9")),
}  # fmt: skip


@pytest.fixture
def spoiled(ward: Path, tmp_path: Path) -> Callable[[str], Path]:
    """spoiled(what): a folder with one row, whose scan has this fault."""

    def make(what: str) -> Path:
        image, spoil = FAULTS[what]
        folder = tmp_path / "CANARY-ward"
        shutil.copytree(ward / f"{WARD}_0", folder / D)
        shutil.copy(ward / f"{WARD}_1.nii.gz", folder / N)
        spoil(folder)
        (folder / "config.yaml").write_text(CONFIG.replace("holdout_share: 0.5", "holdout_share: 0"))
        (folder / "volumes.csv").write_text(f"image,subject,age\n{image},CANARY-1,30\n")
        return folder

    return make


@pytest.mark.parametrize("what", [what for what in FAULTS if what != "two series"])
def test_errors_say_the_row_and_name_nobody(tmp_path: Path, told, spoiled, what: str) -> None:
    folder = spoiled(what)
    with pytest.raises(EngineError) as caught:
        train_command(folder / "config.yaml", folder / "volumes.csv", tmp_path / "run")
    assert "row 2" in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert_silent([str(caught.value), *told()])


def test_warnings_say_the_row_and_name_nobody(tmp_path: Path, told, spoiled) -> None:
    folder = spoiled("two series")
    prepare_command(folder / "config.yaml", folder / "volumes.csv", tmp_path / "fitted", workers=1)
    said = told()
    assert any("row 2: 2 series of 7 and 1 images" in text for text in said)
    assert_silent(said)
