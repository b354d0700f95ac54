"""NCC, local NCC and SSIM against loops over voxels; registration against planted motions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from engine import seeding
from engine.errors import InputError, UsageError
from engine.imaging.similarity import (
    Registration,
    extent_mm,
    local_ncc,
    moved,
    ncc,
    register,
    similarity,
    ssim,
    turn,
)
from engine.imaging.volume import Volume

SHAPE = (20, 24, 18)


def smooth(number: int, shape: tuple[int, int, int] = SHAPE, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Volume:
    noise = seeding.generator(11, "tests.similarity", number).standard_normal(shape)
    array = ndimage.gaussian_filter(noise, 2.0)[None].astype(np.float32) * 500 + 300
    return Volume(array, np.diag([*spacing, 1.0]), "MR", "arbitrary", {})


def arrays(seed: int, shape: tuple[int, int, int] = (9, 8, 10)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal(shape)
    return a, 0.6 * a + rng.standard_normal(shape) + 2.0


def windows(a: np.ndarray, b: np.ndarray, mask: np.ndarray, width: int):
    """Every pair of cubes that lies wholly in volume and mask."""
    for i in range(a.shape[0] - width + 1):
        for j in range(a.shape[1] - width + 1):
            for k in range(a.shape[2] - width + 1):
                at = np.s_[i : i + width, j : j + width, k : k + width]
                if mask[at].all():
                    yield a[at].ravel(), b[at].ravel()


def test_ncc_by_hand_and_against_numpy():
    assert ncc(np.array([[[1.0, 2.0, 3.0]]]), np.array([[[2.0, 4.0, 9.0]]])) == pytest.approx(7 / np.sqrt(2 * 26))
    a, b = arrays(0)
    mask = np.random.default_rng(1).random(a.shape) < 0.4
    assert ncc(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-12)
    assert ncc(a, b, mask) == pytest.approx(np.corrcoef(a[mask], b[mask])[0, 1], abs=1e-12)
    assert ncc(a, -b) == pytest.approx(-ncc(a, b))
    assert ncc(a, np.full_like(a, 1e6)) == 0.0
    assert ncc(a, b, np.zeros(a.shape, bool)) == 0.0
    with pytest.raises(InputError, match="shape"):
        ncc(a, b[1:])


@pytest.mark.parametrize("masked", [False, True])
def test_local_ncc_against_every_window(masked):
    a, b = arrays(2)
    mask = np.ones(a.shape, bool)
    if masked:
        mask[4, 3, 5] = mask[0, 0, 0] = False
    brute = [np.corrcoef(x, y)[0, 1] for x, y in windows(a, b, mask, 3)]
    assert local_ncc(a, b, mask if masked else None, window=3) == pytest.approx(np.mean(brute), abs=1e-9)
    b[:, :, 5:] = 4.0  # cubes without structure count 0
    brute = [np.corrcoef(x, y)[0, 1] if y.std() > 0 else 0.0 for x, y in windows(a, b, mask, 3)]
    assert local_ncc(a, b, mask, window=3) == pytest.approx(np.mean(brute), abs=1e-6)
    with pytest.raises(UsageError, match="odd"):
        local_ncc(a, b, window=4)
    assert np.isnan(local_ncc(a, b, np.zeros(a.shape, bool)))


@pytest.mark.parametrize("masked", [False, True])
def test_ssim_against_every_window(masked):
    """Equation 13 with sample covariances, in loops."""
    a, b = arrays(3)
    mask = np.ones(a.shape, bool)
    if masked:
        mask[4, 3, 5] = False
    c1, c2 = (0.01 * 5.0) ** 2, (0.03 * 5.0) ** 2
    brute = []
    for x, y in windows(a, b, mask, 5):
        cov = np.cov(x, y)
        top = (2 * x.mean() * y.mean() + c1) * (2 * cov[0, 1] + c2)
        brute.append(top / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2)))
    found = ssim(a, b, mask if masked else None, data_range=5.0, window=5)
    assert found == pytest.approx(np.mean(brute), abs=1e-9)
    assert ssim(a, a) == pytest.approx(1.0)
    assert ssim(a, b, window=5) == pytest.approx(ssim(a, b, data_range=float(np.ptp(a)), window=5))


def planted(volume: Volume, degrees, shift_mm, mirrored: bool = False) -> Volume:
    """`volume` moved by a known motion, by SciPy, content from beyond the border being its continuation."""
    matrix = np.array(turn(degrees))
    matrix[:3, 3] = shift_mm
    spacing = np.array(volume.spacing_mm)
    centre = (np.array(volume.shape_dhw) - 1) / 2
    linear = np.diag(1 / spacing) @ matrix[:3, :3] @ np.diag(spacing)
    offset = centre + matrix[:3, 3] / spacing - linear @ centre
    array = volume.array_cdhw[0, ::-1] if mirrored else volume.array_cdhw[0]
    turned = ndimage.affine_transform(array, linear, offset, order=3, mode="nearest")
    return replace(volume, array_cdhw=turned[None].astype(np.float32))


@pytest.mark.parametrize(
    ("degrees", "shift_mm", "mirrored"),
    [
        ((0, 0, 0), (2.3, -1.2, 0.7), False),
        ((9, -4, 6), (1.0, 0.5, -2.0), True),
        ((-18, 3, 12), (-1.5, 2.0, 1.0), False),
    ],
)
def test_planted_motion_is_found(degrees, shift_mm, mirrored):
    volume = smooth(0, (24, 30, 22), (1.0, 1.5, 2.0))
    found = register(planted(volume, degrees, shift_mm, mirrored), volume)
    assert found.mirrored is mirrored
    assert found.ncc > 0.98
    expected = np.array(turn(degrees))
    expected[:3, 3] = shift_mm
    corner = np.array([*(np.array(extent_mm(volume)) / 4), 1.0])  # where the content lies, not only at the centre
    assert np.linalg.norm((found.matrix - expected) @ corner) < 0.35
    assert found.degrees == pytest.approx(np.linalg.norm(degrees), abs=1.0)


def test_affine_finds_a_stretch_that_rigid_cannot():
    volume = smooth(1, (24, 24, 24))
    linear = np.diag([1.12, 0.95, 1.0])
    centre = np.full(3, 11.5)
    stretched = ndimage.affine_transform(
        volume.array_cdhw[0], linear, centre - linear @ centre, order=3, mode="nearest"
    )
    other = replace(volume, array_cdhw=stretched[None])
    rigid, affine = (register(other, volume, motion=m, mirror=False) for m in ("rigid", "affine"))
    assert rigid.ncc < affine.ncc - 0.01
    assert affine.ncc > 0.99
    assert np.allclose(affine.matrix[:3, :3], linear, atol=0.02)


def test_a_copy_is_alike_and_another_volume_is_not():
    a, b = smooth(2), smooth(3)
    copy = replace(a, array_cdhw=np.ascontiguousarray(0.5 * a.array_cdhw[:, ::-1] + 40.0))
    seen = similarity(copy, a)
    assert min(seen.ncc, seen.local_ncc, seen.ssim) > 0.999
    assert seen.registration.mirrored
    other = similarity(a, b)
    assert other.ncc < 0.7
    assert other.ssim < 0.6
    assert similarity(a, a, mirror=False).registration.degrees == pytest.approx(0.0, abs=0.1)


def test_what_cannot_be_registered_is_refused_or_worth_nothing():
    a = smooth(4)
    flat = replace(a, array_cdhw=np.full_like(a.array_cdhw, 7.0))
    assert similarity(a, flat).ncc == 0.0
    with pytest.raises(InputError, match="spacing"):
        register(a, smooth(4, spacing=(1.0, 1.0, 2.0)))
    with pytest.raises(InputError, match="shape"):
        register(a, smooth(4, (20, 24, 20)))
    broken = a.array_cdhw.copy()
    broken[0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="finite"):
        register(a, replace(a, array_cdhw=broken))


def test_moved_by_whole_voxels_is_a_shift():
    a = smooth(5)
    matrix = np.eye(4)
    matrix[:3, 3] = (2.0, 0.0, -3.0)
    array, inside = moved(a, Registration(matrix, False, 1.0, 1.0))
    assert array[:-2, :, 3:] == pytest.approx(a.array_cdhw[0, 2:, :, :-3], abs=1e-3)
    assert inside[:-2, :, 3:].all()
    assert not inside[-2:].any()
    assert not inside[:, :, :3].any()
    assert torch.equal(turn((0.0, 0.0, 0.0)), torch.eye(4, dtype=torch.float64))
