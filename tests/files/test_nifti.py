"""NIfTI: every kind of damage gets its verdict, and what is read or written lies where the header says."""

from __future__ import annotations

import csv
import gzip
import os
import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import InputError
from engine.files import nifti
from engine.files.nifti import check, read_nifti, write_nifti
from engine.files.volumes import VolumeData

SHAPE = (7, 6, 5)


def values_dhw(dtype: str = "u1") -> np.ndarray:
    return (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 100).astype(dtype)


def good(dtype: str = "u1", endianness: str = "<", version: int = 1) -> bytes:
    """A correct single-file image of `values_dhw`, identity sform, made with nibabel."""
    kind = nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header
    header = kind(endianness=endianness)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(endianness))
    header.set_data_shape(SHAPE)
    header.set_sform(np.eye(4), 2)
    header["magic"] = header.single_magic
    header["vox_offset"] = 352 if version == 1 else 544
    header["scl_slope"], header["scl_inter"] = 1, 0
    voxels = values_dhw(dtype).astype(np.dtype(dtype).newbyteorder(endianness)).tobytes("F")
    return header.binaryblock + b"\0\0\0\0" + voxels


def put(offset: int, layout: str, *numbers: float) -> Callable[[bytes], bytes]:
    """A change of header fields: `numbers` packed as little-endian `layout` at byte `offset`."""

    def change(content: bytes) -> bytes:
        packed = struct.pack("<" + layout, *numbers)
        return content[:offset] + packed + content[offset + len(packed) :]

    return change


def both(*changes: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        for one in changes:
            content = one(content)
        return content

    return change


NAN, INF = float("nan"), float("inf")
IDENTITY = (1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
# what is wrong -> (change of a good file, verdict, words that the reason must contain)
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str, str]] = {
    "nothing": (lambda b: b, "ok", "7x6x5"),
    "empty": (lambda b: b"", "reject", "empty"),
    "one byte": (lambda b: b[:1], "reject", "header"),
    "header cut": (lambda b: b[:347], "reject", "348"),
    "no voxels": (lambda b: b[:352], "reject", "352"),
    "voxels cut by one byte": (lambda b: b[:-1], "reject", "562"),
    "bytes after the voxels": (lambda b: b + b"abc", "warn", "3 bytes after"),
    "sizeof_hdr 0": (put(0, "i", 0), "reject", "sizeof_hdr"),
    "sizeof_hdr 349": (put(0, "i", 349), "reject", "sizeof_hdr"),
    "dim[0] 0": (put(40, "h", 0), "reject", "dim[0]=0"),
    "dim[0] 8": (put(40, "h", 8), "reject", "dim[0]=8"),
    "dim[0] negative": (put(40, "h", -3), "reject", "dim[0]=-3"),
    "1D": (put(40, "h", 1), "reject", "1D"),
    "2D": (put(40, "h", 2), "reject", "2D"),
    "dim[2] 0": (put(44, "h", 0), "reject", "dim[2]=0"),
    "dim[3] negative": (put(46, "h", -1), "reject", "dim[3]=-1"),
    "dim beyond the file": (put(42, "3h", 32767, 32767, 32767), "reject", "as the header declares"),
    "all dims at their limit": (put(40, "8h", 4, 32767, 32767, 32767, 32767, 1, 1, 1), "reject", "as the header"),
    "a line": (put(40, "4h", 3, 210, 1, 1), "reject", "only one axis"),
    "one slice": (put(40, "4h", 3, 7, 30, 1), "warn", "one slice"),
    "4D of one time": (put(40, "5h", 4, 7, 6, 5, 1), "ok", "7x6x5"),
    "4D": (put(40, "5h", 4, 7, 6, 1, 5), "warn", "4D: 5 times"),
    "5D vector": (put(40, "6h", 5, 7, 6, 1, 1, 5), "warn", "5D: 5"),
    "5D vector in time": (put(40, "6h", 5, 7, 3, 2, 2, 2), "reject", "at most one axis"),
    "6D": (put(40, "7h", 6, 7, 6, 1, 1, 1, 5), "reject", "at most one axis"),
    "datatype 0": (put(70, "h", 0), "reject", "datatype 0"),
    "datatype 1": (put(70, "2h", 1, 1), "reject", "1-bit"),
    "datatype complex": (put(70, "2h", 32, 64), "reject", "complex"),
    "datatype RGB": (put(70, "2h", 128, 24), "reject", "RGB"),
    "datatype RGBA": (put(70, "2h", 2304, 32), "reject", "RGBA"),
    "datatype float128": (put(70, "2h", 1536, 128), "reject", "float128"),
    "datatype 9999": (put(70, "h", 9999), "reject", "9999"),
    "bitpix wrong": (put(72, "h", 16), "warn", "bitpix 16"),
    "vox_offset 0": (put(108, "f", 0), "warn", "vox_offset is 0"),
    "vox_offset in header": (put(108, "f", 100), "reject", "inside the header"),
    "vox_offset negative": (put(108, "f", -352), "reject", "vox_offset"),
    "vox_offset fraction": (put(108, "f", 352.5), "reject", "vox_offset"),
    "vox_offset NaN": (put(108, "f", NAN), "reject", "vox_offset"),
    "vox_offset inf": (put(108, "f", INF), "reject", "vox_offset"),
    "vox_offset beyond": (put(108, "f", 1e9), "reject", "as the header declares"),
    "pixdim[2] 0": (put(84, "f", 0), "reject", "pixdim[2]"),
    "pixdim[3] NaN": (put(88, "f", NAN), "reject", "pixdim[3]"),
    "pixdim[1] -inf": (put(80, "f", -INF), "reject", "pixdim[1]"),
    "pixdim[2] negative": (put(84, "f", -1), "warn", "pixdim[2] is negative"),
    "pixdim against sform": (put(80, "3f", 3, 3, 3), "warn", "disagree"),
    "slope 0": (put(112, "2f", 0, NAN), "ok", "7x6x5"),
    "slope NaN": (put(112, "2f", NAN, NAN), "ok", "7x6x5"),
    "slope inf": (put(112, "f", -INF), "reject", "scl_slope"),
    "slope negative": (put(112, "f", -1), "warn", "negative"),
    "inter NaN": (put(112, "2f", 2, NAN), "reject", "scl_inter"),
    "inter inf": (put(112, "2f", 1, INF), "reject", "scl_inter"),
    "scaled beyond float32": (put(112, "2f", 3e38, 0), "reject", "float32"),
    "metres": (put(123, "B", 1), "warn", "metres"),
    "microns": (put(123, "B", 3), "warn", "microns"),
    "unit 7": (put(123, "B", 7), "warn", "unknown code 7"),
    "sform zero": (put(280, "12f", *[0] * 12), "reject", "zero column"),
    "sform NaN": (put(280, "f", NAN), "reject", "NaN"),
    "sform inf in origin": (put(292, "f", INF), "reject", "NaN or infinite"),
    "sform singular": (put(280, "12f", 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0), "reject", "one plane"),
    "sform sheared": (put(284, "f", 0.4), "warn", "sheared"),
    "sform code 99": (put(254, "h", 99), "warn", "sform_code 99"),
    "no orientation": (put(252, "2h", 0, 0), "warn", "no orientation"),
    "qform agrees": (both(put(252, "h", 1), put(76, "f", 1)), "ok", "7x6x5"),
    "qform disagrees": (both(put(252, "h", 1), put(268, "f", 99)), "warn", "qform and sform disagree"),
    "qform alone": (both(put(252, "2h", 1, 0), put(76, "f", 1)), "ok", "7x6x5"),
    "quaternion too long": (both(put(252, "2h", 1, 0), put(256, "3f", 0.9, 0.9, 0.9)), "reject", "quaternion"),
    "quaternion NaN": (both(put(252, "2h", 1, 0), put(256, "f", NAN)), "reject", "quaternion"),
    "qoffset inf": (both(put(252, "2h", 1, 0), put(268, "f", INF)), "reject", "offset"),
    "bad qform beside sform": (both(put(252, "h", 1), put(256, "f", 2)), "warn", "qform ignored"),
    "qfac 7": (both(put(252, "2h", 1, 0), put(76, "f", 7)), "warn", "qfac"),
    "magic of a pair": (put(344, "4s", b"ni1\0"), "reject", "pair"),
    "magic 0": (put(344, "4s", b"\0\0\0\0"), "reject", "magic"),
    "magic of NIfTI-2": (put(344, "4s", b"n+2\0"), "reject", "magic"),
    "extension damaged": (
        both(put(108, "f", 384), put(348, "4s", b"\1\0\0\0"), lambda b: b[:352] + b"\xff" * 32 + b[352:]),
        "warn",
        "extensions",
    ),
    "extension intact": (
        both(
            put(108, "f", 384),
            put(348, "4s", b"\1\0\0\0"),
            lambda b: b[:352] + struct.pack("<2i", 32, 6) + b"CANARY".ljust(24, b"\0") + b[352:],
        ),
        "ok",
        "7x6x5",
    ),
    "text": (lambda b: b"hello world\n" * 100, "reject", "something else"),
    "PNG": (lambda b: b"\x89PNG\r\n\x1a\n" + b, "reject", "something else"),
    "zip": (lambda b: b"PK\3\4" + b, "reject", "something else"),
    "gzip under .nii": (gzip.compress, "warn", "without .gz"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_gets_its_verdict(tmp_path: Path, what: str) -> None:
    change, expected, words = DAMAGE[what]
    path = tmp_path / "scan.nii"
    path.write_bytes(change(good()))
    verdict, why = check(path)
    assert (verdict, words in why) == (expected, True), why
    assert "CANARY" not in why
    if expected == "reject":
        with pytest.raises(InputError) as caught:
            read_nifti(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


GZIP_DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str, str]] = {
    "nothing": (lambda b: b, "ok", "7x6x5"),
    "cut in the middle": (lambda b: b[: len(b) // 2], "reject", "ends before"),
    "trailer cut": (lambda b: b[:-1], "reject", "ends before"),
    "only the magic": (lambda b: b[:2], "reject", "ends before"),
    "CRC wrong": (lambda b: b[:-8] + bytes([b[-8] ^ 1]) + b[-7:], "reject", "checksum"),
    "length wrong": (lambda b: b[:-1] + b"\1", "reject", "checksum or length"),
    "a bit flipped": (lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 16]) + b[len(b) // 2 + 1 :], "reject", ""),
    "garbage after": (lambda b: b + b"garbage", "warn", "after the end of the gzip"),
    "zeros after": (lambda b: b + bytes(1000), "ok", "7x6x5"),
    "two members": (lambda b: gzip.compress(good()[:300]) + gzip.compress(good()[300:]), "ok", "7x6x5"),
    "a second image after": (lambda b: b + b, "warn", "bytes after the voxels"),
    "plain": (lambda b: good(), "warn", "plain bytes"),
    "header only": (lambda b: gzip.compress(good()[:352]), "reject", "210 bytes of voxels"),
    "PNG": (lambda b: b"\x89PNG\r\n\x1a\n", "reject", ""),
}


@pytest.mark.parametrize("what", GZIP_DAMAGE)
def test_gzip_damage_gets_its_verdict(tmp_path: Path, what: str) -> None:
    change, expected, words = GZIP_DAMAGE[what]
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(change(gzip.compress(good())))
    verdict, why = check(path)
    assert (verdict, words in why) == (expected, True), why


def test_voxel_values_are_judged(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    some = values_dhw("f4")
    cases = []
    for name, fill, expected, words in [
        ("all NaN", np.full(SHAPE, np.nan), "reject", "NaN"),
        ("all infinite", np.full(SHAPE, np.inf), "reject", "infinite"),
        ("constant", np.full(SHAPE, 3.5), "warn", "constant"),
        ("one NaN", np.where(some == 7, np.nan, some), "warn", "NaN"),
        ("huge", np.where(some == 7, 1e32, some), "warn", "huge"),
        ("plain", some, "ok", ""),
    ]:
        path.write_bytes(good("f4")[:352] + fill.astype("<f4").tobytes("F"))
        verdict, why = check(path)
        cases.append((name, verdict == expected and words in why, why))
    path.write_bytes(good("f8")[:352] + np.where(some == 7, 1e200, some.astype("f8")).tobytes("F"))
    cases.append(("beyond float32", check(path)[0] == "reject", check(path)[1]))
    path.write_bytes(good("i8")[:352] + np.where(some == 7, 2**40 + 1, some).astype("<i8").tobytes("F"))
    cases.append(("not exact", check(path)[0] == "warn" and "exact" in check(path)[1], check(path)[1]))
    assert not [case for case in cases if not case[1]]


def test_a_bomb_is_stopped_before_it_grows(tmp_path: Path) -> None:
    """A few kilobytes that inflate to 4 GiB: refused by the declared size, or once far beyond it; memory stays
    small.
    """
    declared = put(40, "5h", 4, 4096, 4096, 255, 1)(good()[:352])
    bomb = zlib.compressobj(9, wbits=31)
    small = bomb.compress(good()) + b"".join(bomb.compress(bytes(1 << 24)) for _ in range(12)) + bomb.flush()
    lying = tmp_path / "lying.nii.gz"
    lying.write_bytes(gzip.compress(declared))
    growing = tmp_path / "growing.nii.gz"
    growing.write_bytes(small)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert check(lying)[0] == "reject"
    verdict, why = check(growing)
    assert (verdict, "far more" in why) == ("reject", True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_no_folder_pipe_or_missing_file_hangs_or_crashes(tmp_path: Path) -> None:
    (tmp_path / "folder.nii").mkdir()
    os.mkfifo(tmp_path / "pipe.nii")
    assert check(tmp_path / "folder.nii") == ("reject", "expected a regular file, got a folder")
    assert check(tmp_path / "pipe.nii") == ("reject", "expected a regular file, got a device or pipe")
    assert check(tmp_path / "none.nii")[0] == "reject"


@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_every_type_order_and_version_is_read_alike(tmp_path: Path, dtype: str, version: int, endianness: str) -> None:
    path = tmp_path / "scan.nii"
    path.write_bytes(good(dtype, endianness, version))
    data = read_nifti(path)
    assert data.warnings == []
    assert data.array_cdhw.dtype == (np.dtype(dtype) if dtype[0] in "iu" else np.dtype("f4"))
    assert data.array_cdhw.dtype.isnative
    np.testing.assert_array_equal(data.array_dhw, values_dhw())
    np.testing.assert_array_equal(data.affine, np.eye(4))


def test_the_scaling_rule_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    path.write_bytes(put(112, "2f", 2, -1024)(good()))
    data = read_nifti(path)
    assert data.array_cdhw.dtype == np.float32
    np.testing.assert_array_equal(data.array_dhw, values_dhw("f4") * 2 - 1024)
    path.write_bytes(put(112, "2f", 0, 5)(good()))
    np.testing.assert_array_equal(read_nifti(path).array_dhw, values_dhw())


def test_lengths_in_other_units_become_mm(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    path.write_bytes(put(123, "B", 3)(good()))
    np.testing.assert_allclose(read_nifti(path).affine, np.diag([1e-3, 1e-3, 1e-3, 1]))


def test_times_become_channels_in_order(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    array = np.random.default_rng(0).normal(size=(4, 5, 6, 3)).astype("f4")
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    data = read_nifti(path)
    assert data.array_cdhw.shape == (3, 4, 5, 6)
    np.testing.assert_array_equal(data.array_cdhw[2], array[..., 2])


@pytest.mark.parametrize("suffixes", [(".hdr", ".img"), (".hdr.gz", ".img.gz")])
def test_a_pair_is_read_from_either_half_and_not_through_a_link(tmp_path: Path, suffixes: tuple[str, str]) -> None:
    content = both(put(344, "4s", b"ni1\0"), put(108, "f", 0))(good())
    squeeze = gzip.compress if suffixes[0].endswith("gz") else bytes
    header, image = tmp_path / f"a{suffixes[0]}", tmp_path / f"a{suffixes[1]}"
    header.write_bytes(squeeze(content[:348]))
    assert check(header)[0] == "reject"
    image.write_bytes(squeeze(content[352:]))
    for path in (header, image):
        assert check(path)[0] == "ok"
        np.testing.assert_array_equal(read_nifti(path).array_dhw, values_dhw())
    image.rename(tmp_path / "elsewhere")
    image.symlink_to(tmp_path / "elsewhere")
    assert check(header)[0] == "reject"


def random_affine(seed: int, *, shear: float = 0.0) -> np.ndarray:
    """A random rotation (or reflection) with uneven spacing and a far origin."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = rotation * rng.uniform(0.3, 5, size=3)
    affine[:3, 1] += shear * affine[:3, 0]
    affine[:3, 3] = rng.uniform(-300, 300, size=3)
    return affine


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("seed", range(6))
def test_geometry_and_values_survive_a_round_trip(tmp_path: Path, name: str, seed: int) -> None:
    affine = random_affine(seed)
    array = np.random.default_rng(seed).normal(size=(1, 4, 5, 6)).astype("f4")
    write_nifti(tmp_path / name, VolumeData(array, affine), description="SYNTHETIC")
    data = read_nifti(tmp_path / name)
    assert data.warnings == []
    assert data.array_cdhw.dtype == np.float32
    np.testing.assert_array_equal(data.array_cdhw, array)
    np.testing.assert_allclose(data.affine, affine, rtol=1e-6, atol=1e-4)
    header = nibabel.load(tmp_path / name).header
    np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=2e-3)
    assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 1)
    assert header.get_xyzt_units()[0] == "mm"
    assert header["descrip"].tobytes().rstrip(b"\0") == b"SYNTHETIC"
    np.testing.assert_allclose(header.get_zooms()[:3], data.spacing_mm, rtol=1e-6)


def test_a_sheared_affine_is_written_without_qform_and_comes_back(tmp_path: Path) -> None:
    affine = random_affine(3, shear=0.4)
    write_nifti(tmp_path / "a.nii", VolumeData(np.arange(24.0).reshape(2, 3, 4), affine))
    header = nibabel.load(tmp_path / "a.nii").header
    assert int(header["qform_code"]) == 0
    data = read_nifti(tmp_path / "a.nii")
    np.testing.assert_allclose(data.affine, affine, rtol=1e-6, atol=1e-4)
    assert "sheared" in data.warnings[0]


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "i8", "f4", "bool"])
def test_the_type_is_kept_and_channels_too(tmp_path: Path, dtype: str) -> None:
    array = (np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5) % 2).astype(dtype)
    write_nifti(tmp_path / "a.nii.gz", VolumeData(array, np.eye(4)))
    data = read_nifti(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(data.array_cdhw, array)
    assert data.array_cdhw.dtype == (np.uint8 if dtype == "bool" else np.dtype(dtype))


def test_a_long_axis_is_written_as_nifti_2(tmp_path: Path) -> None:
    array = np.arange(40_000, dtype="i4").reshape(40_000, 1, 1).repeat(2, axis=1)
    write_nifti(tmp_path / "a.nii", VolumeData(array, np.eye(4)))
    np.testing.assert_array_equal(read_nifti(tmp_path / "a.nii").array_dhw, array)


def test_writing_is_repeatable_whole_or_absent_and_names_nothing(tmp_path: Path) -> None:
    data = VolumeData(values_dhw("f4"), np.eye(4))
    write_nifti(tmp_path / "CANARY.nii.gz", data)
    first = (tmp_path / "CANARY.nii.gz").read_bytes()
    time.sleep(1.1)  # a gzip header holds a time in seconds
    write_nifti(tmp_path / "b.nii.gz", data)
    assert first == (tmp_path / "b.nii.gz").read_bytes()
    assert b"CANARY" not in first
    assert b"CANARY" not in gzip.decompress(first)
    for name, description in [("a.img", ""), ("a.nii", "x" * 80), ("a.nii", "ä")]:
        with pytest.raises(InputError):
            write_nifti(tmp_path / name, data, description=description)
    with pytest.raises(InputError):
        write_nifti(tmp_path / "a.nii", VolumeData(values_dhw("f2"), np.eye(4)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["CANARY.nii.gz", "b.nii.gz"]


def test_nothing_a_header_says_about_a_person_is_kept(tmp_path: Path) -> None:
    content = both(
        put(4, "10s", b"CANARY1"), put(14, "18s", b"CANARY2"), put(148, "80s", b"CANARY3"),
        put(228, "24s", b"CANARY4"), put(328, "16s", b"CANARY5"),
    )(good())  # fmt: skip
    (tmp_path / "a.nii").write_bytes(content)
    data = read_nifti(tmp_path / "a.nii")
    assert "CANARY" not in repr(data)
    assert data.metadata == {"source_format": "nifti"}
    write_nifti(tmp_path / "b.nii", data)
    assert b"CANARY" not in (tmp_path / "b.nii").read_bytes()


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_bytes_always_get_a_verdict(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(good(data.draw(st.sampled_from(["u1", "f4"])), version=data.draw(st.sampled_from([1, 2]))))
    for _ in range(data.draw(st.integers(1, 8))):
        # mostly in the header, where a byte means most
        where = data.draw(st.one_of(st.integers(0, 351), st.integers(0, len(content) - 1)))
        content[where] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    squeezed = data.draw(st.booleans())
    path = tmp_path / ("fuzz.nii.gz" if squeezed else "fuzz.nii")
    if squeezed:
        content = bytearray(gzip.compress(bytes(content)))
        for _ in range(data.draw(st.integers(0, 2))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    verdict, why = check(path)
    assert verdict in ("ok", "warn", "reject")
    assert why
    assert "\n" not in why


# ---- real data


def test_the_bad_files_get_their_verdicts(real_data: Path) -> None:
    folder = real_data / "bad" / "nifti"
    wrong = []
    with open(folder / "EXPECTED.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        verdict, why = check(folder / row["file"])
        if verdict != row["expected"]:
            wrong.append((row["file"], row["expected"], verdict, why))
    assert len(rows) >= 30
    assert wrong == []


def test_real_files_are_read_as_nibabel_reads_them(real_data: Path) -> None:
    """Independent of the reader's own parsing: values, scaling and affine against nibabel's high-level interface."""
    folders = [real_data / "nifti", real_data / "imaging" / "ct", real_data / "imaging" / "ms_longitudinal"]
    compared = 0
    for path in sorted(p for folder in folders for p in folder.rglob("*.nii*")):
        if "nifti_space" in path.parts and path.name not in ("LPS.nii.gz", "IRA.nii.gz"):
            continue  # all 48 are read in tests/imaging/test_volume.py
        verdict, why = check(path)
        if verdict == "reject":
            assert any(word in why for word in ("RGB24", "complex", "sizeof_hdr")), (path.name, why)
            continue
        data, image = read_nifti(path), nibabel.load(path)
        expected = image.get_fdata(dtype=np.float32)
        expected = np.moveaxis(expected.reshape(*expected.shape[:3], -1, order="F"), 3, 0)
        assert data.array_cdhw.shape == expected.shape, path.name
        assert np.abs(data.array_cdhw - expected).max() <= 1e-6 * np.abs(expected).max(), path.name
        if "no orientation" not in why:
            np.testing.assert_allclose(data.affine, image.affine, atol=1e-4, err_msg=path.name)
        compared += 1
    assert compared > 25


def test_every_hippocampus_image_is_clean(real_data: Path) -> None:
    images = sorted((real_data / "imaging" / "hippocampus" / "images").glob("*.nii.gz"))
    assert len(images) == 202
    assert [path.name for path in images if check(path)[0] != "ok"] == []


def test_the_limit_on_declared_voxels_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scan.nii"
    path.write_bytes(good())
    monkeypatch.setattr(nifti, "voxel_limit_bytes", lambda: 800)
    verdict, why = check(path)
    assert (verdict, "at most 800 bytes" in why) == ("reject", True)
