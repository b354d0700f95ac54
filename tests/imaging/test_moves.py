"""Moves of training volumes: rigid in millimetres, the same for image and labels, and whole voxels where nothing turns."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from engine.errors import InputError
from engine.imaging.config import apply_overrides, parse_config
from engine.imaging.labels import channels_of, codes_from
from engine.imaging.moves import Move, random_move
from engine.imaging.train import moved

ONE_MM = np.ones(3)


def blob(shape, spacing_mm, middle_mm=(0, 0, 0), radii_mm=(5, 5, 5)) -> np.ndarray:
    """An ellipsoid with a soft border, -1 outside and 1 inside; float32 (1, d, h, w)."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing_mm)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    far = np.sqrt(sum(((g - m) / r) ** 2 for g, m, r in zip(grid, middle_mm, radii_mm)))
    return np.tanh(4 * (1 - far)).astype(np.float32)[None]


@pytest.mark.parametrize("axis", range(3))
def test_a_quarter_turn_is_that_of_numpy(axis):
    x = np.random.default_rng(axis).uniform(-1, 1, (2, 7, 7, 7)).astype(np.float32)
    angles = tuple(90.0 if a == axis else 0.0 for a in range(3))
    plane = [a + 1 for a in range(3) if a != axis]
    wanted = np.rot90(x, 1 if axis != 1 else -1, axes=plane)
    assert np.allclose(Move((0, 0, 0), angles).of(x, ONE_MM, 2), wanted, atol=1e-5)
    assert np.allclose(Move((1, 0, 0), angles).of(x, ONE_MM, 2)[:, 1:], wanted[:, :-1], atol=1e-5)


def test_it_turns_millimetres_not_voxels():
    shape, spacing = (30, 40, 24), np.array([1.0, 0.8, 1.5])
    x = blob(shape, spacing, middle_mm=(6, 0, 0), radii_mm=(4, 4, 4))
    turned = Move((0, 0, 0), (0.0, 0.0, 30.0)).of(x, spacing, 1)
    assert np.abs(turned - blob(shape, spacing, (6 * np.cos(np.pi / 6), 3, 0), (4, 4, 4))).max() < 0.15
    assert np.abs(x - turned).max() > 1


def test_image_and_labels_go_together_and_keep_their_volume():
    image = blob((32, 36, 28), ONE_MM, (2, -3, 1), (9, 5, 4))
    both = np.concatenate([image, np.where(image > 0, 1, -1).astype(np.float32)])
    for index in range(6):
        move = random_move(3, index, 2, 15.0)
        turned = move.of(both, ONE_MM, 1)
        assert turned.dtype == np.float32
        assert turned.shape == both.shape
        assert set(np.unique(turned[1])) == {-1.0, 1.0}
        inside, seen = turned[1] > 0, turned[0] > 0
        assert 2 * (inside & seen).sum() / (inside.sum() + seen.sum()) > 0.92
        assert inside.sum() == pytest.approx((both[1] > 0).sum(), rel=0.03)
        assert np.abs(turned[0]).max() <= 1


def test_draws_are_uniform_and_shifts_do_not_depend_on_turns():
    moves = [random_move(0, index, 2, 10.0) for index in range(400)]
    angles = np.array([move.angles for move in moves])
    assert np.abs(angles).max() <= 10
    assert np.abs(angles.mean(axis=0)).max() < 1
    assert angles.std(axis=0) == pytest.approx([10 / np.sqrt(3)] * 3, rel=0.1)
    assert {o for move in moves for o in move.offset} == {-2, -1, 0, 1, 2}
    still = [random_move(0, index, 2, 0.0) for index in range(400)]
    assert [move.offset for move in still] == [move.offset for move in moves]
    assert {move.angles for move in still} == {None}


def test_what_the_autoencoder_sees_is_turned_where_the_config_says_so(tiny_config):
    x = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(1, 16, 16, 16)), 1.5).astype(np.float32)
    values = tiny_config.model_dump()
    seen = {
        turn: moved(x, ONE_MM, parse_config(apply_overrides(values, [f"autoencoder.turn_degrees={turn}"])), 4)
        for turn in (0, 10)
    }
    shift = random_move(tiny_config.seed, 4, tiny_config.autoencoder.shift_voxels, 0.0)
    assert np.array_equal(seen[0], shift.of(x, ONE_MM, 1))
    assert 0.5 < np.corrcoef(seen[0].ravel(), seen[10].ravel())[0, 1] < 0.99
    crops = ["autoencoder.turn_degrees=10", "autoencoder.crop_size=[8,8,8]"]
    with pytest.raises(InputError, match="turns whole volumes"):
        parse_config(apply_overrides(values, crops))


def test_neighbouring_labels_stay_neighbours():
    codes = np.zeros((20, 20, 20), dtype=np.uint8)
    codes[4:16, 6:14, 4:10], codes[4:16, 6:14, 10:16] = 1, 2
    turn = Move((0, 0, 0), (9.0, 12.0, -7.0))
    turned = turn.of_codes(codes, ONE_MM, 2)
    assert np.array_equal(turned, codes_from(turn.of(channels_of(codes, 2), ONE_MM, 0)))
    assert (turned != codes).sum() > 200
    shift = Move((1, 0, -2))
    assert np.array_equal(shift.of_codes(codes, ONE_MM, 2), codes_from(shift.of(channels_of(codes, 2), ONE_MM, 0)))
    inner = ndimage.binary_erosion(turned > 0, iterations=1)
    holes = ndimage.binary_fill_holes(turned > 0) & (turned == 0)
    assert inner.sum() > 400
    assert holes.sum() == 0
    for label in (1, 2):
        assert (turned == label).sum() == pytest.approx((codes == label).sum(), rel=0.05)
