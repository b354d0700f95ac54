"""`Volume`: array and affine stay together through reading, writing, turning, cropping and resampling."""

from __future__ import annotations

import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest

from engine.errors import InputError, UsageError
from engine.imaging.volume import ScanWarning, Volume, crop_or_pad, read_volume, reorient, resample, write_volume


def random_affine(seed: int, *, shear: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * rng.uniform(0.5, 3, size=3)
    affine[:3, 1] += shear * affine[:3, 0]
    affine[:3, 3] = rng.uniform(-100, 100, size=3)
    return affine


def places(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """World coordinates (*shape, 3) of all voxel centres."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def position_volume(affine: np.ndarray, shape: tuple[int, int, int]) -> Volume:
    """Three channels that hold the x, y and z in mm of each voxel: any misplacement shows in the values."""
    return Volume(np.moveaxis(places(affine, shape), 3, 0), affine)


def misplacement_mm(volume: Volume) -> float:
    """How far from where they say they are the voxels of a `position_volume` lie."""
    return float(np.abs(np.moveaxis(volume.array_cdhw, 0, 3) - places(volume.affine, volume.shape_dhw)).max())


def test_a_volume_is_float32_four_axes_and_checked() -> None:
    volume = Volume(
        np.zeros((2, 3, 4), dtype=np.int16), np.diag([1.0, 2, 3, 1]), "MR", metadata={"kvp": 120, "name": "x"}
    )
    assert volume.array_cdhw.dtype == np.float32
    assert volume.array_cdhw.shape == (1, 2, 3, 4)
    assert (volume.spacing_mm, volume.orientation) == ((1.0, 2.0, 3.0), "RAS")
    assert volume.metadata == {"kvp": 120.0}
    good = np.zeros((2, 3, 4))
    for array, affine, modality, units in [
        (np.zeros((2, 3)), np.eye(4), None, "arbitrary"),
        (np.zeros((0, 3, 4)), np.eye(4), None, "arbitrary"),
        (good.astype(complex), np.eye(4), None, "arbitrary"),
        (good, np.zeros((4, 4)), None, "arbitrary"),
        (good, np.eye(3), None, "arbitrary"),
        (good, np.diag([1, 1, np.nan, 1]), None, "arbitrary"),
        (good, np.diag([1, 1, 1, 2]), None, "arbitrary"),
        (good, np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), None, "arbitrary"),
        (good, np.eye(4), "CANARY", "arbitrary"),
        (good, np.eye(4), None, "furlongs"),
        (good + 1e300, np.eye(4), None, "arbitrary"),
    ]:
        with pytest.raises(InputError):
            Volume(array, affine, modality, units)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SPR", "IAL"])
def test_reorienting_moves_no_voxel(seed: int, orientation: str) -> None:
    volume = position_volume(random_affine(seed, shear=0.2 * (seed % 2)), (4, 5, 6))
    turned = reorient(volume, orientation)
    assert turned.orientation == orientation
    assert misplacement_mm(turned) < 1e-4
    assert sorted(turned.shape_dhw) == [4, 5, 6]
    back = reorient(turned, volume.orientation)
    np.testing.assert_array_equal(back.array_cdhw, volume.array_cdhw)
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-9)


@pytest.mark.parametrize("orientation", ["RAR", "RA", "XYZ", "RASS", ""])
def test_no_orientation_is_refused(orientation: str) -> None:
    with pytest.raises(UsageError):
        reorient(position_volume(np.eye(4), (2, 2, 2)), orientation)


@pytest.mark.parametrize("shape", [(4, 5, 6), (3, 2, 1), (9, 8, 11), (2, 9, 6), (7, 6, 9)])
def test_cropping_and_padding_keep_the_grid(shape: tuple[int, int, int]) -> None:
    volume = position_volume(random_affine(1), (4, 5, 6))
    out = crop_or_pad(volume, shape, fill=np.nan)
    assert out.shape_dhw == shape
    kept = np.isfinite(out.array_cdhw[0])
    assert kept.sum() == np.prod(np.minimum(shape, (4, 5, 6)))
    apart = np.moveaxis(out.array_cdhw, 0, 3)[kept] - places(out.affine, shape)[kept]
    assert np.abs(apart).max() < 1e-4
    old_centre = volume.affine @ [1.5, 2, 2.5, 1]
    new_centre = out.affine @ [*(np.array(shape) - 1) / 2, 1]
    assert np.linalg.norm(np.linalg.solve(volume.affine, new_centre - old_centre)) < 0.9  # half a voxel in each axis
    back = crop_or_pad(crop_or_pad(volume, np.maximum(shape, (4, 5, 6))), (4, 5, 6))
    np.testing.assert_array_equal(back.array_cdhw, volume.array_cdhw)
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-9)


def test_padding_is_air_in_ct_and_the_minimum_elsewhere() -> None:
    array = np.full((2, 2, 2), 40.0)
    assert crop_or_pad(Volume(array, np.eye(4), "CT", "HU"), (4, 4, 4)).array_cdhw.min() == -1024
    assert crop_or_pad(Volume(array, np.eye(4), "MR"), (4, 4, 4)).array_cdhw.min() == 40
    with pytest.raises(UsageError):
        crop_or_pad(Volume(array, np.eye(4)), (0, 4, 4))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.4, 2.5, 1.1), (3.0, 0.7, 2.0)])
def test_resampling_keeps_everything_in_place(seed: int, spacing: tuple[float, float, float]) -> None:
    """A linear function of position is reproduced by linear interpolation exactly, away from the border."""
    volume = position_volume(random_affine(seed), (40, 36, 38))
    out = resample(volume, spacing)
    np.testing.assert_allclose(out.spacing_mm, spacing, rtol=1e-6)
    extent = np.array(volume.shape_dhw) * volume.spacing_mm
    assert (np.abs(np.array(out.shape_dhw) * out.spacing_mm - extent) <= np.array(spacing) / 2 + 1e-6).all()
    centre = volume.affine @ [*(np.array(volume.shape_dhw) - 1) / 2, 1]
    np.testing.assert_allclose(out.affine @ [*(np.array(out.shape_dhw) - 1) / 2, 1], centre, atol=1e-6)
    inner = tuple(slice(int(np.ceil(n * 0.3)), int(np.floor(n * 0.7))) for n in out.shape_dhw)
    apart = np.moveaxis(out.array_cdhw, 0, 3)[inner] - places(out.affine, out.shape_dhw)[inner]
    assert apart.size
    assert np.abs(apart).max() < 0.02


def test_resampling_keeps_labels_and_does_not_alias() -> None:
    labels = np.random.default_rng(0).integers(0, 5, size=(20, 20, 20)) * 7
    out = resample(Volume(labels, np.eye(4)), (1.7, 2.3, 0.6), order=0)
    assert set(np.unique(out.array_cdhw)) <= set(np.unique(labels))
    checkers = (np.indices((40, 40, 40)).sum(axis=0) % 2).astype(np.float32)
    smooth = resample(Volume(checkers, np.eye(4)), (4.0, 4.0, 4.0)).array_cdhw
    assert np.abs(smooth - 0.5).max() < 0.05
    same = resample(Volume(checkers, np.eye(4)), (1.0, 1.0, 1.0)).array_cdhw
    np.testing.assert_array_equal(same[0], checkers)
    for spacing in [(0, 1, 1), (1, 1), (np.nan, 1, 1), (1e-6, 1e-6, 1e-6)]:
        with pytest.raises(UsageError):
            resample(Volume(checkers, np.eye(4)), spacing)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "folder"])
@pytest.mark.parametrize("seed", range(3))
def test_every_format_keeps_voxels_in_place(tmp_path: Path, name: str, seed: int) -> None:
    values = np.random.default_rng(seed).integers(-1000, 3000, size=(5, 6, 7))
    volume = Volume(values, random_affine(seed), "CT", "HU", {"kvp": 120.0})
    write_volume(volume, tmp_path / name, format="dicom" if name == "folder" else None, description="SYNTHETIC")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = read_volume(tmp_path / name, modality="CT")
    assert (back.modality, back.units, back.array_cdhw.dtype) == ("CT", "HU", np.float32)
    a, b = reorient(volume), reorient(back)
    np.testing.assert_array_equal(a.array_cdhw, b.array_cdhw)
    np.testing.assert_allclose(a.affine, b.affine, atol=1e-4)


def test_a_warning_reaches_the_caller_and_bad_names_are_refused(tmp_path: Path) -> None:
    flat = Volume(np.full((3, 3, 3), 2.0), np.eye(4))
    write_volume(flat, tmp_path / "a.nii")
    with pytest.warns(ScanWarning, match="constant"):
        read_volume(tmp_path / "a.nii")
    for name, format in [("a.mha", None), ("a.nii", "png"), ("folder", None)]:
        with pytest.raises(UsageError):
            write_volume(flat, tmp_path / name, format=format)
    with pytest.raises(InputError):
        read_volume(tmp_path / "none.nii")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError):
        read_volume(tmp_path / "notes.txt")


def test_the_48_orientations_are_one_volume(real_data: Path) -> None:
    folder = real_data / "nifti" / "niivue_tests" / "packages" / "niivue" / "tests" / "images" / "nifti_space"
    files = sorted(folder.glob("*.nii.gz"))
    assert len(files) == 48
    first = reorient(read_volume(folder / "RAS.nii.gz"))
    assert first.array_cdhw.std() > 0
    for path in files:
        volume = read_volume(path)
        assert volume.orientation == path.name[:3]
        turned = reorient(volume)
        assert turned.orientation == "RAS"
        np.testing.assert_array_equal(turned.array_cdhw, first.array_cdhw, err_msg=path.name)
        np.testing.assert_allclose(turned.affine, first.affine, atol=1e-3, err_msg=path.name)


def test_real_scans_make_the_round_trip_through_dicom(real_data: Path, tmp_path: Path) -> None:
    for name, modality in [("ct/example_ct.nii.gz", "CT"), ("ct/example_mr_sm.nii.gz", "MR")]:
        volume = read_volume(real_data / "imaging" / name, modality=modality)
        write_volume(volume, tmp_path / modality, format="dicom")
        back = reorient(read_volume(tmp_path / modality))
        expected = reorient(volume)
        np.testing.assert_allclose(back.affine, expected.affine, atol=1e-3)
        step = np.ptp(expected.array_cdhw) / 65535
        assert np.abs(back.array_cdhw - expected.array_cdhw).max() <= 0.51 * step


def test_orientation_agrees_with_nibabel(tmp_path: Path) -> None:
    for seed in range(5):
        affine = random_affine(seed)
        image = nibabel.Nifti1Image(np.arange(60, dtype=np.float32).reshape(3, 4, 5), affine)
        nibabel.save(image, tmp_path / "a.nii")
        turned, expected = reorient(read_volume(tmp_path / "a.nii")), nibabel.as_closest_canonical(image)
        np.testing.assert_array_equal(turned.array_cdhw[0], np.asarray(expected.dataobj))
        np.testing.assert_allclose(turned.affine, expected.affine, atol=1e-4)
