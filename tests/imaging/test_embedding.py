"""Copy-detector features: a copy is nearest however bright or turned, and distance means correlation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from engine import seeding
from engine.errors import InputError
from engine.imaging.embedding import DIMENSIONS, VIEWS, embed, transforms, views
from engine.imaging.volume import Volume


def smooth(number: int) -> Volume:
    noise = seeding.generator(11, "tests.embedding", number).standard_normal((20, 24, 18))
    array = ndimage.gaussian_filter(noise, 2.0)[None].astype(np.float32) * 500 + 300
    return Volume(array, np.eye(4), "MR", "arbitrary", {})


def test_unit_length_and_shape():
    features = embed([smooth(0), smooth(1)])
    assert features.dtype == np.float32
    assert features.shape == (2, DIMENSIONS)
    assert np.linalg.norm(features, axis=1) == pytest.approx([1.0, 1.0], abs=1e-5)
    assert embed([]).shape == (0, DIMENSIONS)


def test_brightness_and_contrast_do_not_matter():
    a = smooth(0)
    b = replace(a, array_cdhw=3.0 * a.array_cdhw + 70.0)
    assert np.linalg.norm(embed([a]) - embed([b])) < 1e-4


def test_every_transformed_copy_but_the_mirrored_is_nearest_to_its_source():
    database = [smooth(k) for k in range(20)]
    features = embed(database)
    copies = transforms(database[7])
    assert {*copies} == {"flipped", "rotated", "noised", "gamma"}
    for name, copy in copies.items():
        assert not np.array_equal(copy.array_cdhw, database[7].array_cdhw)
        distance = ((features - embed([copy])) ** 2).sum(axis=1)
        if name != "flipped":
            assert distance.argmin() == 7, name
    mirrored = embed([replace(copies["flipped"], array_cdhw=copies["flipped"].array_cdhw[:, ::-1].copy())])
    assert ((features - mirrored) ** 2).sum(axis=1).argmin() == 7


def test_transforms_are_the_same_every_time():
    a, b = transforms(smooth(0)), transforms(smooth(0))
    assert all(np.array_equal(a[name].array_cdhw, b[name].array_cdhw) for name in a)


def test_a_constant_volume_gives_zeros_and_nan_is_refused():
    flat = replace(smooth(0), array_cdhw=np.full((1, 20, 24, 18), 5.0, dtype=np.float32))
    assert (embed([flat]) == 0).all()
    assert (views([flat]) == 0).all()
    broken = replace(smooth(0), array_cdhw=np.full((1, 20, 24, 18), np.nan, dtype=np.float32))
    with pytest.raises(InputError, match="volume 0"):
        embed([broken])


def test_views_are_the_mirrored_and_turned_volume():
    """The first view is the mirror; a volume turned by 10 degrees has a view that brings it back to its source."""
    volume = smooth(3)
    made = views([volume, smooth(4)])
    assert made.shape == (VIEWS, 2, DIMENSIONS)
    mirrored = replace(volume, array_cdhw=np.ascontiguousarray(volume.array_cdhw[:, ::-1]))
    assert np.array_equal(made[0, :1], embed([mirrored]))
    for axes in ((0, 1), (0, 2), (1, 2)):
        array = ndimage.rotate(volume.array_cdhw[0], 10.0, axes=axes, reshape=False, order=1, mode="nearest")
        turned = replace(volume, array_cdhw=array[None])
        plain = np.linalg.norm(embed([turned]) - embed([volume]))
        best = np.linalg.norm(views([turned])[:, 0] - embed([volume]), axis=1)
        assert best.min() < 0.6 * plain
        assert best.argmin() in range(1, 7)  # turned without the mirror


def test_views_of_a_turned_mirrored_copy_find_its_source():
    database = [smooth(k) for k in range(12)]
    features = embed(database)
    array = ndimage.rotate(database[5].array_cdhw[0], 10.0, axes=(0, 1), reshape=False, order=1, mode="nearest")
    copy = replace(database[5], array_cdhw=np.ascontiguousarray(array[None, ::-1]))
    distance = np.linalg.norm(views([copy])[:, 0, None] - features[None], axis=2)
    assert np.unravel_index(distance.argmin(), distance.shape)[1] == 5
    assert distance.argmin() // len(database) in range(7, 13)
