"""Painting: what is known comes back bit for bit, what is unknown is drawn and fits where they meet; refusals."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.errors import Unsupported, UsageError
from engine.imaging.commands import paint_command
from engine.imaging.flow import flow_times
from engine.imaging.generate import load_model
from engine.imaging.paint import joined, paint, repaint
from engine.imaging.volume import Volume, read_volume, reorient, write_volume


@pytest.fixture(scope="module")
def model(tiny_run):
    return load_model(tiny_run, "cpu")


def scan(size=(16, 16, 16), spacing: float = 2.0) -> Volume:
    array = np.random.default_rng(0).random((1, *size), dtype=np.float32) * 300 + 7.3
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = [-3.0, 11.0, 0.5]
    return Volume(array, affine, "MR", "arbitrary", {})


def region_of(volume: Volume, *where: slice) -> Volume:
    array = np.zeros_like(volume.array_cdhw)
    array[(0, *where)] = 1
    return replace(volume, array_cdhw=array, modality=None)


def test_given_voxels_come_back_bit_for_bit_and_the_others_are_drawn(model):
    whole = scan()
    region = region_of(whole, slice(3, 9), slice(2, 14), slice(5, 16))
    made = list(paint(model, whole, region, n=2, seed=3, steps=3, resamples=2))
    inside = region.array_cdhw[0] > 0
    for index, (k, volume, generated) in enumerate(made):
        assert k == index
        assert np.array_equal(generated, inside)
        assert volume.array_cdhw[0][~inside].tobytes() == whole.array_cdhw[0][~inside].tobytes()
        assert np.array_equal(volume.affine, whole.affine)
        assert (volume.array_cdhw[0][inside] != whole.array_cdhw[0][inside]).mean() > 0.9
    assert not np.array_equal(made[0][1].array_cdhw, made[1][1].array_cdhw)
    again = next(paint(model, whole, region, seed=3, start=1, steps=3, resamples=2))
    assert again[0] == 1
    assert again[1].array_cdhw.tobytes() == made[1][1].array_cdhw.tobytes()


def test_what_was_under_the_region_does_not_reach_the_result(model):
    """The removed voxels are nowhere in what is generated: another content there gives the same painting."""
    whole = scan()
    region = region_of(whole, slice(4, 12), slice(4, 12), slice(4, 12))
    other = whole.array_cdhw.copy()
    other[region.array_cdhw > 0] = 4444.0
    one, two = (next(paint(model, v, region, steps=2))[1] for v in (whole, replace(whole, array_cdhw=other)))
    assert one.array_cdhw.tobytes() == two.array_cdhw.tobytes()


def test_a_scan_smaller_than_the_model_is_painted_outwards_where_it_lies(model):
    small = scan((16, 10, 16))
    _, volume, generated = next(paint(model, small, steps=2))
    assert volume.shape_dhw == (16, 16, 16)
    assert generated.sum() == 16 * 6 * 16
    kept = np.argwhere(~generated)
    low, high = kept.min(axis=0), kept.max(axis=0) + 1
    assert (
        volume.array_cdhw[0][tuple(slice(a, b) for a, b in zip(low, high))].tobytes() == small.array_cdhw[0].tobytes()
    )
    assert volume.affine @ [*low, 1] == pytest.approx(small.affine @ [0, 0, 0, 1])


def test_another_orientation_is_painted_in_ras_with_the_same_voxels(model):
    whole = scan()
    region = region_of(whole, slice(0, 8), slice(0, 16), slice(0, 16))
    turned = [reorient(v, "PSL") for v in (whole, region)]
    straight, again = next(paint(model, whole, region, steps=2)), next(paint(model, *turned, steps=2))
    assert again[1].orientation == "RAS"
    assert again[1].array_cdhw.tobytes() == straight[1].array_cdhw.tobytes()
    assert np.allclose(again[1].affine, straight[1].affine)


def test_known_cells_of_the_latent_stay_on_their_path_and_end_at_their_own():
    """With the true velocity of one datum the unknown cells arrive at it too; known ones end at x0 exactly."""
    x0 = torch.randn(1, 2, 4, 4, 4)
    kept = torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool)
    kept[..., :2] = True
    seen = []

    def velocity(x, t):
        seen.append((t.item(), x))
        return (x - x0) / t.view(-1, 1, 1, 1, 1)  # along the straight path to x0

    made = repaint(velocity, x0, kept, flow_times(4), 3, seed=1, index=0)
    assert len(seen) == 12  # every step as often as asked
    assert torch.equal(made[kept.expand_as(made)], x0[kept.expand_as(made)])
    assert torch.allclose(made, x0, atol=1e-4)
    for t, x in seen:  # known cells lie on the path: x_t - (1 - t) x0 is t times standard noise
        noise = ((x - (1 - t) * x0) / t)[kept.expand_as(x)]
        assert noise.std().item() == pytest.approx(1.0, abs=0.35)


def test_going_back_in_time_keeps_the_variance_of_the_path():
    """Of cells that are not kept, taken again from t' to t: mean (1 - t) x0 and variance t^2, over many cells."""
    x0 = torch.full((1, 1, 24, 24, 24), 2.0)
    kept = torch.zeros(1, 1, 24, 24, 24, dtype=torch.bool)
    seen = []

    def velocity(x, t):
        seen.append((t.item(), x.mean().item(), x.std().item()))
        return (x - x0) / t.view(-1, 1, 1, 1, 1)

    repaint(velocity, x0, kept, flow_times(5), 4, seed=2, index=0)
    for t, mean, spread in seen:
        assert mean == pytest.approx((1 - t) * 2.0, abs=0.05)
        assert spread == pytest.approx(t, rel=0.05)


def test_the_border_is_carried_into_the_generated_side_and_fades():
    known = np.full((4, 4, 20), 0.5, dtype=np.float32)
    made = np.zeros_like(known)
    outside = np.zeros(known.shape, dtype=bool)
    outside[..., 10:] = True
    result = joined(made, known, outside)
    assert np.array_equal(result[~outside], known[~outside])
    line = result[2, 2, 9:]
    assert line[1] == pytest.approx(0.5, abs=1e-6)  # no step beside the known voxel
    assert (np.diff(line[1:]) < 0).all()
    assert line[-1] < 0.02


def test_nonsense_is_refused(model, tiny_config, tmp_path):
    whole = scan()
    everything, nothing = region_of(whole, slice(None)), region_of(whole, slice(0, 0))
    for region, said in ((everything, "everything"), (nothing, "nothing"), (None, "nothing")):
        with pytest.raises(UsageError, match=f"{said} to generate"):
            next(paint(model, whole, region))
    with pytest.raises(UsageError, match="another grid"):
        next(paint(model, whole, region_of(scan((8, 16, 16)), slice(0, 2))))
    with pytest.raises(UsageError, match="resamples"):
        next(paint(model, whole, region_of(whole, slice(0, 2)), resamples=0))
    with pytest.raises(UsageError, match=r"trained.*--force"):
        next(paint(model, scan(spacing=1.0), region_of(scan(spacing=1.0), slice(0, 2))))
    masks = tiny_config.model_copy(
        update={"data": tiny_config.data.model_copy(update={"produce": "mask", "labels": [1]})}
    )
    with pytest.raises(Unsupported, match="masks"):
        next(paint(replace(model, config=masks), whole, region_of(whole, slice(0, 2))))


def test_the_command_writes_volumes_the_region_and_says_that_people_are_in_it(tiny_run, tmp_path):
    whole = scan()
    write_volume(whole, tmp_path / "scan.nii.gz")
    write_volume(region_of(whole, slice(0, 8)), tmp_path / "region.nii.gz")
    result = paint_command(
        tiny_run, tmp_path / "scan.nii.gz", tmp_path / "out", region=tmp_path / "region.nii.gz", n=2, set={"age": "30"},
        resamples=1, device="cpu",
    )  # fmt: skip
    assert result == {"out": "out", "volumes": 2, "generated_voxels": 8 * 16 * 16, "seed": 0}
    with (tmp_path / "out" / "volumes.csv").open() as stream:
        assert [row["age"] for row in csv.DictReader(stream)] == ["30", "30"]
    made, generated = (read_volume(tmp_path / "out" / name) for name in ("PAINTED000001.nii.gz", "generated.nii.gz"))
    assert generated.array_cdhw.sum() == 8 * 16 * 16
    assert np.array_equal(made.array_cdhw[0][8:], read_volume(tmp_path / "scan.nii.gz").array_cdhw[0][8:])
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["scans_of_people"] is True
    assert not record.get("synthetic_data")
