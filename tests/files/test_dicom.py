"""DICOM: slices are put in space by their positions, what is no volume is refused, what is written names nobody."""

from __future__ import annotations

import csv
import gzip
import random
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from engine.errors import InputError, UsageError
from engine.files.dicom import check, list_series, read_series, write_series
from engine.files.nifti import read_nifti
from engine.files.volumes import VolumeData

SHAPE = (6, 5, 8)  # columns, rows, slices
AFFINE = np.array([[-0.7, 0, 0, 90.0], [0, -0.9, 0, 80.0], [0, 0, 2.5, -40.0], [0, 0, 0, 1]])


def ct(seed: int = 0) -> VolumeData:
    array = np.random.default_rng(seed).integers(-1024, 2000, size=SHAPE, dtype=np.int16)
    return VolumeData(array, AFFINE, "CT", "HU")


@pytest.fixture
def series(tmp_path: Path) -> Path:
    write_series(tmp_path / "series", ct(), uid_source="series")
    return tmp_path / "series"


def edit(path: Path, **attributes: object) -> None:
    dataset = pydicom.dcmread(path)
    for name, value in attributes.items():
        if value is None:
            del dataset[name]
        else:
            setattr(dataset, name, value)
    dataset.save_as(path)


def nth(folder: Path, number: int) -> Path:
    return folder / f"slice_{number:05d}.dcm"


def random_affine(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * rng.uniform(0.3, 5, size=3)
    affine[:3, 3] = rng.uniform(-300, 300, size=3)
    return affine


def canonical(array_cdhw: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(np.moveaxis(array_cdhw, 0, 3).astype(np.float64), affine))
    return np.asarray(image.dataobj), image.affine


def assert_same_in_space(a: VolumeData, b: VolumeData, atol: float = 0.0) -> None:
    """Equal voxels at equal places, whatever the order and direction of the array axes."""
    (array_a, affine_a), (array_b, affine_b) = canonical(a.array_cdhw, a.affine), canonical(b.array_cdhw, b.affine)
    np.testing.assert_allclose(affine_a, affine_b, atol=1e-3)
    assert array_a.shape == array_b.shape
    assert np.abs(array_a - array_b).max() <= atol


# ---- writing and reading back


def test_a_written_series_comes_back_in_place(series: Path) -> None:
    data = read_series(series)
    assert data.warnings == []
    assert (data.modality, data.units, data.array_cdhw.dtype) == ("CT", "HU", np.int16)
    np.testing.assert_array_equal(data.array_dhw, ct().array_dhw)
    np.testing.assert_allclose(data.affine, AFFINE, atol=1e-9)
    assert check(series)[0] == "ok"


@pytest.mark.parametrize("seed", range(8))
def test_any_rectangular_affine_survives(tmp_path: Path, seed: int) -> None:
    """Random rotations and reflections; a left-handed grid comes back with its slices reversed, in the same place."""
    array = np.random.default_rng(seed).integers(0, 4000, size=SHAPE).astype(np.uint16)
    data = VolumeData(array, random_affine(seed), "MR")
    write_series(tmp_path / "out", data)
    back = read_series(tmp_path / "out")
    assert back.warnings == []
    order = slice(None) if np.linalg.det(back.affine) * np.linalg.det(data.affine) > 0 else slice(None, None, -1)
    np.testing.assert_array_equal(back.array_dhw, array[:, :, order])
    corner = data.affine @ [0, 0, 0 if order.step is None else SHAPE[2] - 1, 1]
    np.testing.assert_allclose(back.affine[:, 3], corner, atol=1e-6)
    np.testing.assert_allclose(back.affine[:, :2], data.affine[:, :2], atol=1e-9)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (np.array([-1024.0, 3071.0]), 0.0),
        (np.array([0.0, 65535.0]), 0.0),
        (np.array([-40000.0, 20000.0]), 0.0),
        (np.array([0.0, 1.0]), 0.5 / 65535),
        (np.array([-1000.7, 2999.3]), 4000 / 131070),
        (np.array([1e-6, 3e-6]), 2e-6 / 131070),
        (np.array([0.0, 1e9]), 1e9 / 131070),
        (np.array([5.5, 5.5]), 1e-6),
    ],
)
def test_values_survive_within_the_stated_step(tmp_path: Path, values: np.ndarray, error: float) -> None:
    low, high = values
    array = np.random.default_rng(0).uniform(low, high, size=SHAPE)
    array = np.rint(array) if error == 0 else array
    array.flat[:2] = values
    write_series(tmp_path / "out", VolumeData(array.astype(np.float32), np.eye(4), "MR"))
    back = read_series(tmp_path / "out").array_dhw.astype(np.float64)
    rounding = np.abs(values).max() * 2.0**-23 if error else 0.0
    assert np.abs(back - array.astype(np.float32)).max() <= error * 1.001 + rounding


def test_what_is_written_names_nobody_and_says_synthetic(series: Path) -> None:
    uids = set()
    for path in series.iterdir():
        dataset = pydicom.dcmread(path)
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
        assert dataset[0x0008, 0x001C].value == "YES"
        assert list(dataset.ImageType)[:2] == ["DERIVED", "SECONDARY"]
        assert str(dataset.PatientID).startswith("SYN")
        assert str(dataset.PatientName).startswith("SYN")
        for name in ("PatientBirthDate", "PatientSex", "StudyDate", "AccessionNumber", "ReferringPhysicianName"):
            assert not dataset[name].value
        assert not any(element.tag.is_private for element in dataset)
        assert all(len(str(number)) <= 16 for number in dataset.ImageOrientationPatient)
        uids |= {dataset.SOPInstanceUID}
        assert all(re.fullmatch(r"2\.25\.\d{1,39}", uid) for uid in (dataset.SOPInstanceUID, dataset.StudyInstanceUID))
    assert len(uids) == SHAPE[2]


def test_uids_are_fresh_unless_a_source_is_given(tmp_path: Path, series: Path) -> None:
    for name, source in [("a", None), ("b", None), ("c", "series")]:
        write_series(tmp_path / name, ct(), uid_source=source)
    a, b, c = (read_bytes(tmp_path / name) for name in "abc")
    assert a != b
    assert c == read_bytes(series)


def read_bytes(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def test_what_dicom_cannot_hold_is_refused_and_nothing_left(tmp_path: Path) -> None:
    sheared = AFFINE.copy()
    sheared[0, 1] = 0.3
    with_nan = np.zeros(SHAPE, dtype=np.float32)
    with_nan[0, 0, 0] = np.nan
    cases: list[tuple[VolumeData, dict[str, str]]] = [
        (VolumeData(ct().array_cdhw, sheared, "CT", "HU"), {}),
        (VolumeData(with_nan, AFFINE, "MR"), {}),
        (VolumeData(np.zeros((2, *SHAPE)), AFFINE, "MR"), {}),
        (VolumeData(ct().array_cdhw, AFFINE), {}),
        (ct(), {"subject": "Doe^John"}),
        (ct(), {"subject": "SYN^John"}),
        (ct(), {"series_description": "x" * 65}),
    ]
    for data, options in cases:
        with pytest.raises(InputError):
            write_series(tmp_path / "out", data, **options)  # type: ignore[arg-type]
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError):
        write_series(tmp_path / "there", ct())
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


@pytest.mark.skipif(shutil.which("dcm2niix") is None, reason="dcm2niix (a Debian package) is not installed")
@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("seed", range(3))
def test_dcm2niix_converts_a_series_back(tmp_path: Path, seed: int, modality: str) -> None:
    shape, rng = (32, 24, 12), np.random.default_rng(seed)
    values = rng.integers(-1024, 3000, size=shape) if modality == "CT" else rng.integers(0, 3000, size=shape)
    data = VolumeData(values.astype(np.int16), random_affine(seed), modality, "HU" if modality == "CT" else "arbitrary")
    write_series(tmp_path / "series", data)
    (tmp_path / "nii").mkdir()
    command = ["dcm2niix", "-b", "n", "-z", "n", "-f", "out", "-o", str(tmp_path / "nii"), str(tmp_path / "series")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    (converted,) = (tmp_path / "nii").glob("*.nii")
    assert_same_in_space(data, read_nifti(converted))


# ---- damage: what is wrong -> (change of a good series, verdict, words of the reason)


def swap_names(folder: Path) -> None:
    names = sorted(folder.iterdir())
    for i, path in enumerate(names):
        path.rename(folder / f"x{i}")
    random.Random(0).shuffle(names)
    for i, path in enumerate(names):
        (folder / f"x{i}").rename(path.with_suffix(""))


def another_slice(folder: Path, source: int, name: str, **attributes: object) -> None:
    shutil.copy(nth(folder, source), folder / name)
    edit(folder / name, **attributes)


def tilt(folder: Path) -> None:
    for number in range(1, SHAPE[2] + 1):
        x, y, z = pydicom.dcmread(nth(folder, number)).ImagePositionPatient
        edit(nth(folder, number), ImagePositionPatient=[x, float(y) + 0.25 * number, z])


def spread(folder: Path) -> None:
    for number in range(4, SHAPE[2] + 1):
        x, y, z = pydicom.dcmread(nth(folder, number)).ImagePositionPatient
        edit(nth(folder, number), ImagePositionPatient=[x, y, float(z) + 0.5 * number])


def jitter(folder: Path) -> None:
    x, y, z = pydicom.dcmread(nth(folder, 4)).ImagePositionPatient
    edit(nth(folder, 4), ImagePositionPatient=[x, y, float(z) + 0.05])


def aside(folder: Path) -> None:
    x, y, z = pydicom.dcmread(nth(folder, 4)).ImagePositionPatient
    edit(nth(folder, 4), ImagePositionPatient=[float(x) + 5, y, z])


def bare(folder: Path, number: int) -> None:
    content = nth(folder, number).read_bytes()
    nth(folder, number).write_bytes(content[132:])


def cut(folder: Path, number: int, size: int) -> None:
    nth(folder, number).write_bytes(nth(folder, number).read_bytes()[:size])


def every(folder: Path, **attributes: object) -> None:
    for path in folder.iterdir():
        edit(path, **attributes)


def second_series(folder: Path) -> None:
    write_series(folder.parent / "other", ct(1), uid_source="other")
    for path in (folder.parent / "other").iterdir():
        path.rename(folder / f"other_{path.name}")


def second_time(folder: Path) -> None:
    for number in range(1, SHAPE[2] + 1):
        pixels = np.full((SHAPE[1], SHAPE[0]), number, dtype="<i2").tobytes()
        uid = f"1.2.3.{number}"
        another_slice(folder, number, f"t{number}.dcm", SOPInstanceUID=uid, InstanceNumber=number + 8, PixelData=pixels)


ONES = np.ones(SHAPE[:2], dtype="<i2").tobytes()
DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "nothing": (lambda f: None, "ok", "6x5x8"),
    "names in any order": (swap_names, "ok", "6x5x8"),
    "instance numbers reversed": (
        lambda f: [edit(nth(f, n), InstanceNumber=9 - n) for n in range(1, 9)], "ok", "6x5x8"),
    "no instance numbers": (lambda f: every(f, InstanceNumber=None), "ok", "6x5x8"),
    "one slice missing": (lambda f: nth(f, 4).unlink(), "reject", "1 slice(s) missing"),
    "three slices missing": (lambda f: [nth(f, n).unlink() for n in (3, 4, 5)], "reject", "3 slice(s) missing"),
    "spacing changes": (spread, "reject", "mm apart"),
    "spacing rounded": (jitter, "warn", "vary by"),
    "one slice aside": (aside, "reject", "aside"),
    "tilt": (tilt, "reject", "tilt"),
    "same file twice": (lambda f: shutil.copy(nth(f, 3), f / "copy.dcm"), "warn", "duplicate"),
    "same pixels under another UID": (
        lambda f: another_slice(f, 3, "c.dcm", SOPInstanceUID="1.2"), "warn", "duplicate"),
    "other pixels under the same UID": (
        lambda f: another_slice(f, 3, "c.dcm", PixelData=ONES), "reject", "SOP Instance"),
    "other pixels at the same place": (
        lambda f: another_slice(f, 3, "c.dcm", SOPInstanceUID="1.2", PixelData=ONES), "reject", "at every position"),
    "two times": (second_time, "warn", "4D: 2 images"),
    "two series": (second_series, "warn", "2 series of 8 and 8"),
    "rows differ": (lambda f: edit(nth(f, 5), Rows=3, PixelData=ONES[:36]), "reject", "slice_00005.dcm"),
    "orientation differs": (
        lambda f: edit(nth(f, 5), ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), "reject", "slice_00005.dcm"),
    "pixel spacing differs": (lambda f: edit(nth(f, 5), PixelSpacing=[2, 2]), "reject", "slice_00005.dcm"),
    "no pixels": (lambda f: edit(nth(f, 5), PixelData=None), "reject", "slice_00005.dcm"),
    "pixels short": (lambda f: edit(nth(f, 5), PixelData=ONES[:10]), "reject", "60 bytes of PixelData"),
    "file cut in the pixels": (lambda f: cut(f, 5, -20), "reject", "slice_00005.dcm"),
    "file cut in the header": (lambda f: cut(f, 5, 900), "reject", "slice_00005.dcm"),
    "file cut in the preamble": (lambda f: cut(f, 5, 60), "reject", "slice_00005.dcm"),
    "file empty": (lambda f: cut(f, 5, 0), "reject", "empty"),
    "no preamble": (lambda f: bare(f, 5), "warn", "preamble"),
    "no preamble anywhere": (lambda f: [bare(f, n) for n in range(1, 9)], "warn", "8 file(s) without"),
    "no position": (lambda f: edit(nth(f, 5), ImagePositionPatient=None), "reject", "ImagePositionPatient"),
    "no orientation": (lambda f: every(f, ImageOrientationPatient=None), "reject", "ImageOrientationPatient"),
    "orientation of zeros": (lambda f: every(f, ImageOrientationPatient=[0] * 6), "reject", "unit vectors"),
    "orientation askew": (lambda f: every(f, ImageOrientationPatient=[1, 0, 0, .6, .8, 0]), "reject", "perpendicular"),
    "zero spacing": (lambda f: every(f, PixelSpacing=[0, 0]), "reject", "PixelSpacing"),
    "no spacing": (lambda f: every(f, PixelSpacing=None), "reject", "PixelSpacing"),
    "slope zero": (lambda f: every(f, RescaleSlope=0), "reject", "Rescale Slope"),
    "no rescale in CT": (lambda f: every(f, RescaleSlope=None, RescaleIntercept=None), "warn", "arbitrary"),
    "colour": (lambda f: every(f, SamplesPerPixel=3, PhotometricInterpretation="RGB"), "reject", "colour"),
    "palette": (lambda f: every(f, PhotometricInterpretation="PALETTE COLOR"), "reject", "palette"),
    "MONOCHROME1": (lambda f: every(f, PhotometricInterpretation="MONOCHROME1"), "warn", "MONOCHROME1"),
    "huge image declared": (lambda f: every(f, Rows=65535, Columns=65535), "reject", " declared"),
    "frames without positions": (lambda f: every(f, NumberOfFrames=2), "reject", "position for each frame"),
    "a text file inside": (lambda f: (f / "notes").write_text("seen by me"), "warn", "text"),
    "a README inside": (lambda f: (f / "README.md").write_text("x"), "ok", "6x5x8"),
    "junk named like a slice": (lambda f: (f / "junk.dcm").write_bytes(bytes(range(256)) * 9), "reject", "junk.dcm"),
    "a picture inside": (lambda f: (f / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0"), "warn", "another format"),
    "a link inside": (lambda f: (f / "z.dcm").symlink_to(nth(f, 1)), "warn", "symbolic link"),
    "one slice": (lambda f: [nth(f, n).unlink() for n in range(2, 9)], "warn", "one slice only"),
    "two slices": (lambda f: [nth(f, n).unlink() for n in range(3, 9)], "warn", "two slices"),
    "constant": (lambda f: every(f, PixelData=ONES), "warn", "constant"),
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "reject", "none directly"),
    "only a subfolder": (lambda f: f.rename(f.parent / "s") and (f.mkdir(), (f.parent / "s").rename(f / "s")), "reject",
                         "subfolders"),
    "no folder": (lambda f: shutil.rmtree(f), "reject", "nothing there"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_gets_its_verdict(series: Path, what: str) -> None:
    change, expected, words = DAMAGE[what]
    change(series)
    verdict, why = check(series)
    assert (verdict, words in why) == (expected, True), why
    if expected == "reject":
        with pytest.raises(InputError) as caught:
            read_series(series)
        assert str(series) in str(caught.value)
        assert "\n" not in str(caught.value)
    elif what not in ("two series", "two times", "one slice", "two slices", "constant"):
        data = read_series(series)
        np.testing.assert_array_equal(data.array_dhw, ct().array_dhw)
        np.testing.assert_allclose(data.affine, AFFINE, atol=2e-2)


def test_a_bare_slice_that_does_not_continue_the_series_is_left_out(series: Path) -> None:
    x, y, z = pydicom.dcmread(nth(series, 1)).ImagePositionPatient
    another_slice(series, 1, "far.dcm", SOPInstanceUID="1.2", ImagePositionPatient=[x, y, float(z) - 90])
    (series / "far.dcm").write_bytes((series / "far.dcm").read_bytes()[132:])
    assert "left out" in check(series)[1]
    np.testing.assert_array_equal(read_series(series).array_dhw, ct().array_dhw)


def test_a_series_can_be_chosen(series: Path) -> None:
    second_series(series)
    found = list_series(series)
    assert [entry["images"] for entry in found] == [8, 8]
    arrays = [read_series(series, series_uid=entry["series_uid"]).array_dhw for entry in found]
    assert {array[0, 0, 0] for array in arrays} == {ct(0).array_dhw[0, 0, 0], ct(1).array_dhw[0, 0, 0]}
    with pytest.raises(InputError):
        read_series(series, series_uid="1.2.3")


def test_times_become_channels_in_order(series: Path) -> None:
    second_time(series)
    data = read_series(series)
    assert data.array_cdhw.shape == (2, *SHAPE)
    np.testing.assert_array_equal(data.array_cdhw[0], ct().array_dhw)
    np.testing.assert_array_equal(data.array_cdhw[1, 0, 0], np.arange(1, 9))


def test_the_rescale_of_each_slice_is_applied(series: Path) -> None:
    edit(nth(series, 1), RescaleSlope="2.5", RescaleIntercept="-7")
    data = read_series(series)
    assert data.array_cdhw.dtype == np.float32
    np.testing.assert_allclose(data.array_dhw[:, :, 0], ct().array_dhw[:, :, 0] * 2.5 - 7)
    np.testing.assert_array_equal(data.array_dhw[:, :, 1:], ct().array_dhw[:, :, 1:])


def test_compressed_and_deflated_slices_are_read_alike_and_a_bomb_is_not(series: Path) -> None:
    for path in sorted(series.iterdir())[:4]:
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.save_as(path)
    path = nth(series, 6)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    np.testing.assert_array_equal(read_series(series).array_dhw, ct().array_dhw)
    dataset.add_new(0x00191001, "OB", bytes(200 << 20))
    dataset.save_as(path)
    assert path.stat().st_size < 1 << 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.files.dicom_frames.voxel_limit_bytes", lambda: 100 << 20)
        verdict, why = check(series)
    assert (verdict, "grows beyond" in why) == ("reject", True), why


def test_a_stream_that_claims_another_size_never_reaches_the_codec(real_data: Path, tmp_path: Path) -> None:
    """A JPEG 2000 stream of 8 million columns keeps its decoder busy for minutes."""
    folder = real_data / "dicom" / "dicom2nifti" / "tests" / "data" / "generic"
    for codec, marker, at in [("compressed_j2k", b"\xff\x4f\xff\x51", 9), ("compressed_jpegls", b"\xff\xf7", 5)]:
        content = bytearray(sorted((folder / codec / "001").glob("*.dcm"))[0].read_bytes())
        content[content.find(marker) + at] = 0x7A
        (tmp_path / "lying.dcm").write_bytes(content)
        verdict, why = check(tmp_path / "lying.dcm")
        assert (verdict, "another size" in why) == ("reject", True), why


def test_nothing_a_header_says_about_a_person_is_kept_or_told(
    tmp_path: Path, series: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Canaries in every text attribute, a private tag and as invalid values: in no result, output, log or error."""
    for path in series.iterdir():
        dataset = pydicom.dcmread(path)
        for name in ("PatientName", "PatientID", "StudyDescription", "InstitutionName", "OperatorsName", "StudyID"):
            setattr(dataset, name, "CANARY")
        dataset.private_block(0x0011, "CANARY", create=True).add_new(1, "LO", "CANARY")
        dataset.BodyPartExamined = "CANARY"
        with warnings.catch_warnings():  # pydicom says that these are no UIDs, quoting them
            warnings.simplefilter("ignore")
            dataset.StudyInstanceUID = dataset.SeriesInstanceUID = "CANARY"
        dataset.save_as(path)
    capfd.readouterr()
    caplog.clear()
    with warnings.catch_warnings(record=True) as warned:  # pytest would keep them from standard error
        warnings.simplefilter("always")
        data = read_series(series)
        write_series(tmp_path / "out", data)
        said = [repr(data), *check(series)]
    said += [*(str(warning.message) for warning in warned), caplog.text, *capfd.readouterr()]
    with pytest.raises(InputError) as caught:
        read_series(series, series_uid="1.2")
    said.append(str(caught.value))
    second_series(series)
    said += check(series)
    edit(nth(series, 2), PixelSpacing=None)
    said += [*check(series), caplog.text, *capfd.readouterr()]
    assert not [text for text in said if "CANARY" in text]
    assert not [path for path in (tmp_path / "out").iterdir() if b"CANARY" in path.read_bytes()]


# ---- real data


def test_the_bad_series_get_their_verdicts(real_data: Path) -> None:
    folder = real_data / "bad" / "dicom"
    wrong = []
    with open(folder / "EXPECTED.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        verdict, why = check(folder / row["folder"])
        if verdict != row["expected"]:
            wrong.append((row["folder"], row["expected"], verdict, why))
    assert len(rows) >= 16
    assert wrong == []


def read_nrrd(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A gzip NRRD of shorts in LPS or RAS: array (i, j, k) and affine RAS."""
    header, _, body = path.read_bytes().partition(b"\n\n")
    fields = dict(line.split(": ", 1) for line in header.decode().splitlines() if ": " in line)
    assert (fields["type"], fields["encoding"], fields["endian"]) == ("short", "gzip", "little")
    sizes = [int(n) for n in fields["sizes"].split()]
    array = np.frombuffer(gzip.decompress(body), "<i2").reshape(sizes, order="F")

    def vectors(text: str) -> np.ndarray:
        return np.array([[float(x) for x in v.split(",")] for v in re.findall(r"\(([^)]*)\)", text)])

    affine = np.eye(4)
    affine[:3, :3] = vectors(fields["space directions"]).T
    affine[:3, 3] = vectors(fields["space origin"])[0]
    return array, (np.diag([-1.0, -1, 1, 1]) if fields["space"].startswith("left") else np.eye(4)) @ affine


def test_the_chest_series_equals_its_nrrd(real_data: Path) -> None:
    array, affine = read_nrrd(real_data / "dicom" / "chest_ct64_nrrd" / "ct-64.nrrd")
    data = read_series(real_data / "dicom" / "chest_ct64")
    assert data.units == "HU"
    assert_same_in_space(data, VolumeData(array, affine))


# series -> the NIfTI that its publishers made of it with dcm2niix
REFERENCES = {
    **{f"dcm_qa_ts/In/{i}.dcm": f"dcm_qa_ts/Ref/{i}.nii" for i in range(1, 10)},  # nine transfer syntaxes
    "dcm_qa_nih/In/20180918GE/mr_0004": "dcm_qa_nih/Ref/DCM2NIIX_regression_test_4.nii",  # 4D in one folder
    "dcm_qa_nih/In/20180918Si/mr_0003": "dcm_qa_nih/Ref/EPI_PE=AP_3.nii",  # mosaic, two times
    "dcm_qa_nih/In/20180918Si/mr_0004": "dcm_qa_nih/Ref/EPI_PE=PA_4.nii",
    "dcm_qa_enh/In/Siemens/XA10": "dcm_qa_enh/Ref/Siemens_REST1_w_SMS_PF7-8_6.nii",  # enhanced multi-frame, 4D
}


@pytest.mark.parametrize("series_name", REFERENCES)
def test_series_equal_their_published_conversion(real_data: Path, series_name: str) -> None:
    data = read_series(real_data / "dicom" / series_name)
    assert_same_in_space(data, read_nifti(real_data / "dicom" / REFERENCES[series_name]))


CODECS = ["compressed_j2k", "compressed_jpeg", "compressed_jpegls", "compressed_rle"]


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_gives_the_same_volume(real_data: Path, codec: str) -> None:
    folder = real_data / "dicom" / "dicom2nifti" / "tests" / "data" / "generic"
    first, other = read_series(folder / "compressed" / "001"), read_series(folder / codec / "001")
    np.testing.assert_array_equal(other.array_cdhw, first.array_cdhw)
    np.testing.assert_allclose(other.affine, first.affine)


@pytest.mark.skipif(shutil.which("dcm2niix") is None, reason="dcm2niix (a Debian package) is not installed")
@pytest.mark.parametrize(
    "series_name",
    [
        "abdomen_ct_20",
        "dcm_qa_siemens_mosaic/In/Orientation/cor/corasc35",
        "dcm_qa_siemens_mosaic/In/Orientation/sag/sagasc35",
        "dcm_qa_siemens_mosaic/In/Orientation/axmb/AxInt36mb",
        "dicom2nifti/tests/data/hitachi/anatomical/001",
        "dicom2nifti/tests/data/siemens_multiframe/anatomical/001",
        "dicom2nifti/tests/data/generic/compressed_rle/001",
        "dicom2nifti/tests/data/generic/anatomical/002_non_isotropic",
    ],
)
def test_series_equal_what_dcm2niix_makes_of_them(real_data: Path, tmp_path: Path, series_name: str) -> None:
    folder = real_data / "dicom" / series_name
    command = ["dcm2niix", "-b", "n", "-z", "n", "-f", "out", "-o", str(tmp_path), str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (converted,) = tmp_path.glob("*.nii")
    assert_same_in_space(read_series(folder), read_nifti(converted), atol=1e-4)


def test_series_that_are_no_volume_are_refused(real_data: Path) -> None:
    folder = real_data / "dicom" / "dicom2nifti" / "tests" / "data" / "failing"
    for name, words in [
        ("gantrytilting", "14.00 degrees"),
        ("notavolume", "at one position"),
        ("sliceincrement", "1 slice(s) missing"),
        ("sliceorientation", "another ImageOrientationPatient"),
    ]:
        verdict, why = check(folder / name / "001")
        assert (verdict, words in why) == ("reject", True), (name, why)
    assert check(folder / "slicecount" / "001")[0] == "warn"
