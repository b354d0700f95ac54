"""Moves of training volumes: in millimetres, volumes kept, image and labels alike; whole voxels where nothing turns."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from engine.errors import InputError
from engine.imaging import moves
from engine.imaging.config import apply_overrides, parse_config
from engine.imaging.labels import channels_of, codes_from
from engine.imaging.moves import Move, bend_mm, random_move
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
    bent = moved(x, ONE_MM, parse_config(apply_overrides(values, ["autoencoder.bend_mm=1"])), 4)
    assert 0.5 < np.corrcoef(seen[0].ravel(), bent.ravel())[0, 1] < 0.99
    for wanted in ("autoencoder.turn_degrees=10", "autoencoder.bend_mm=1"):
        with pytest.raises(InputError, match="move whole volumes"):
            parse_config(apply_overrides(values, [wanted, "autoencoder.crop_size=[8,8,8]"]))


@pytest.mark.parametrize(
    ("shape", "spacing"), [((32, 48, 30), (1.0, 1.0, 1.0)), ((20, 31, 16), (2.0, 0.9, 1.5)), ((12, 10, 1), (1, 1, 1))]
)
def test_a_bend_has_its_length_and_no_divergence(shape, spacing):
    spacing = np.array(spacing)
    field = bend_mm(shape, spacing, 1.5, 7)
    assert field.shape == (3, *shape)
    assert np.sqrt((field**2).sum(axis=0).mean()) == pytest.approx(1.5)
    sides = [np.gradient(field[a], spacing[a], axis=a) for a in range(3) if shape[a] > 1]
    divergence = sum(sides)[(slice(2, -2), slice(2, -2), slice(2, -2) if shape[2] > 1 else slice(None))]
    steepest = max(np.abs(side).max() for side in sides)
    assert 0.02 < steepest < 1, "smooth"
    assert np.abs(divergence).max() < 1e-9 * steepest
    assert np.array_equal(field, bend_mm(shape, spacing, 1.5, 7))
    assert np.abs(np.corrcoef(field.ravel(), bend_mm(shape, spacing, 1.5, 8).ravel())[0, 1]) < 0.5


def test_a_bend_is_the_same_field_on_a_finer_grid():
    coarse, fine = (bend_mm((n, n, n), np.full(3, step), 1.0, 3) for n, step in ((16, 2.0), (31, 1.0)))
    inner = (slice(None),) + (slice(2, -2),) * 3
    assert np.corrcoef(coarse[inner].ravel(), fine[:, ::2, ::2, ::2][inner].ravel())[0, 1] > 0.99


def test_bent_shapes_keep_their_volume_and_labels_follow_the_image():
    image = blob((40, 44, 36), ONE_MM, (2, -3, 1), (10, 6, 5))
    both = np.concatenate([image, np.where(image > 0, 1, -1).astype(np.float32)])
    volume, unlike = (both[1] > 0).sum(), []
    for index in range(6):
        move = random_move(5, index, 0, 0.0, 1.5)
        bent = move.of(both, ONE_MM, 1)
        inside, seen = bent[1] > 0, bent[0] > 0
        assert 2 * (inside & seen).sum() / (inside.sum() + seen.sum()) > 0.92
        assert inside.sum() == pytest.approx(volume, rel=0.05)
        assert np.array_equal(move.of_codes((both[1] > 0).astype(np.uint8), ONE_MM, 1) > 0, inside)
        unlike.append(1 - 2 * (inside & (both[1] > 0)).sum() / (inside.sum() + volume))
    assert min(unlike) > 0.03, "another shape each time"


def test_large_volumes_are_moved_in_slabs(monkeypatch):
    x = np.random.default_rng(1).uniform(-1, 1, (2, 9, 8, 7)).astype(np.float32)
    move = Move((1, 0, 0), (5.0, 8.0, -4.0), (1.0, 3))
    whole = move.of(x, ONE_MM, 1)
    monkeypatch.setattr(moves, "_SLAB_VOXELS", 130)
    assert np.array_equal(move.of(x, ONE_MM, 1), whole)


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
