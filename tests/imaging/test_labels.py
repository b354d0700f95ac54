"""Label maps: as codes, as channels to be learned, as a condition; models of masks, of pairs, and of images given a map."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.errors import InputError, UsageError
from engine.imaging import labels
from engine.imaging.commands import sample_command
from engine.imaging.config import apply_overrides, parse_config
from engine.imaging.context import joined
from engine.imaging.dataset import learn_covariates, load_scans, read_table
from engine.imaging.draws import flow_batch, flow_data
from engine.imaging.generate import load_model, sample
from engine.imaging.latents import Latents, view_move
from engine.imaging.train import train
from engine.imaging.volume import Volume, read_volume, write_volume
from engine.training import checkpoint


def head(number: int, size: int = 16) -> Volume:
    """A bright box in noise; its length follows `number`."""
    array = 4.0 * np.random.default_rng(number).random((1, size, size, size), dtype=np.float32)
    array[0, 4:12, 4:12, 3 + number % 4 : 12] += 80.0
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = 5.0 - (size - 1)
    return Volume(array, affine, "MR", "arbitrary", {})


def drawn(number: int, size: int = 16) -> Volume:
    """The label map of `head(number)`: 4 in the upper half of its box, 7 in the lower, an unasked-for 9 in a corner."""
    scan = head(number, size)
    array = np.zeros((1, size, size, size), dtype=np.float32)
    array[0, 4:12, 4:12, 3 + number % 4 : 12] = 4
    array[0, 4:12, 4:8, 3 + number % 4 : 12] = 7
    array[0, 0, 0, 0] = 9
    return Volume(array, scan.affine, None, "arbitrary", {})


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Eight scans of eight people with label maps."""
    folder = tmp_path_factory.mktemp("labelled")
    with (folder / "volumes.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "label", "subject", "age", "sex"])
        for k in range(8):
            write_volume(head(k), folder / f"scan{k}.nii.gz")
            write_volume(drawn(k), folder / f"label{k}.nii.gz")
            writer.writerow([f"scan{k}.nii.gz", f"label{k}.nii.gz", f"P{k}", 20 + k, "MF"[k % 2]])
    return folder / "volumes.csv"


def trained(tiny_config, table, out, *overrides):
    config = parse_config(apply_overrides(tiny_config.model_dump(), ["data.labels=[4,7]", *overrides]))
    train(config, table, out)
    return config


@pytest.fixture(scope="module")
def mapped(tiny_config, labelled, tmp_path_factory):
    out = tmp_path_factory.mktemp("mapped") / "run"
    trained(tiny_config, labelled, out, "flow.label_map=true")
    return load_model(out, "cpu"), out


def test_codes_and_values_are_inverse_and_other_values_are_background():
    array = np.array([0, 4, 7, 9, 4], dtype=np.float32).reshape(1, 1, 5)
    codes = labels.codes_of(array, [4, 7], "here")
    assert codes.ravel().tolist() == [0, 1, 2, 0, 1]
    assert labels.values_of(codes, [4, 7]).ravel().tolist() == [0, 4, 7, 0, 4]
    channels = labels.channels_of(codes, 2)
    assert channels[:, 0, 0].tolist() == [[-1, 1, -1, -1, 1], [-1, -1, 1, -1, -1]]
    assert np.array_equal(labels.codes_from(channels), codes)
    assert labels.codes_from(np.array([-0.1, -0.2], dtype=np.float32).reshape(2, 1, 1, 1)).item() == 0
    with pytest.raises(InputError, match="whole numbers"):
        labels.codes_of(array + 0.5, [4, 7], "here")


def test_a_map_as_a_condition_holds_the_share_of_every_label_in_every_cell():
    codes = torch.zeros(1, 8, 4, 4, dtype=torch.uint8)
    codes[0, :2, :2, :2] = 1  # one of the eight halves of the first cell
    codes[0, 4:8, :, :] = 2  # the second cell wholly
    codes[0, 0, 0, 2] = 2
    context = labels.map_context(codes, 2, factor=4, fold=2)
    assert context.shape == (1, 2 * 8 + 1, 2, 1, 1)
    one, two, given = context[0, :8], context[0, 8:16], context[0, 16]
    assert one[:, 0, 0, 0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert two[:, 0, 0, 0].tolist() == [0, 0.125, 0, 0, 0, 0, 0, 0]
    assert two[:, 1].eq(1).all() and given.eq(1).all()  # noqa: PT018
    assert labels.map_context(codes, 2, factor=4, fold=1)[0, 0, 0].item() == pytest.approx(1 / 8)


def test_a_model_of_masks_makes_label_values_on_the_grid(tiny_config, labelled, tmp_path):
    trained(tiny_config, labelled, tmp_path / "run", "data.produce=mask")
    assert checkpoint.load(tmp_path / "run")[1]["model"]["channels"] == 2
    _, volume, _ = next(sample(tmp_path / "run", 1, device="cpu"))
    assert volume.array_cdhw.shape == (1, 16, 16, 16)
    assert set(np.unique(volume.array_cdhw)) <= {0.0, 4.0, 7.0}
    assert volume.modality is None
    with pytest.raises(UsageError, match="nifti"):
        sample_command(tmp_path / "run", 1, tmp_path / "out", format="dicom", device="cpu")
    with pytest.raises(UsageError, match=r"flow\.label_map"):
        next(sample(tmp_path / "run", 1, label_maps=[drawn(0)], device="cpu"))


def test_a_model_of_masks_reads_the_image_column_where_there_is_no_label_column(tiny_config, labelled, tmp_path):
    for k in range(2):
        write_volume(drawn(k), tmp_path / f"shape{k}.nii.gz")
    (tmp_path / "shapes.csv").write_text("image,subject,age,sex\nshape0.nii.gz,a,1,M\nshape1.nii.gz,b,2,F\n")
    config = parse_config(
        apply_overrides(tiny_config.model_dump(), ["data.labels=[4,7]", "data.produce=mask", "data.holdout_share=0"])
    )
    scans = load_scans(read_table(tmp_path / "shapes.csv", config.data), config)
    assert scans.x_bcdhw.shape == (2, 2, 16, 16, 16)
    assert np.array_equal(labels.values_of(labels.codes_from(scans.x_bcdhw[1]), [4, 7])[1:], drawn(1).array_cdhw[0][1:])


def test_pairs_are_written_as_image_and_label_and_named_in_the_table(tiny_config, labelled, tmp_path):
    trained(tiny_config, labelled, tmp_path / "run", "data.produce=pair")
    sample_command(tmp_path / "run", 2, tmp_path / "out", seed=1, device="cpu")
    with (tmp_path / "out" / "volumes.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["label"] for row in rows] == [f"SYN{k:09d}_visit0_label.nii.gz" for k in range(2)]
    image, label = (read_volume(tmp_path / "out" / rows[1][key]) for key in ("image", "label"))
    assert image.shape_dhw == label.shape_dhw == (16, 16, 16)
    assert np.array_equal(image.affine, label.affine)
    assert set(np.unique(label.array_cdhw)) <= {0.0, 4.0, 7.0}
    assert image.array_cdhw.max() > 10
    _, both, _ = next(sample(tmp_path / "run", 1, seed=1, start=1, device="cpu"))
    assert np.array_equal(both.array_cdhw[1], label.array_cdhw[0])


def test_a_map_and_its_image_must_share_a_grid_and_a_missing_map_is_named(tiny_config, labelled, tmp_path):
    write_volume(head(0), tmp_path / "scan.nii.gz")
    moved = drawn(0)
    write_volume(replace(moved, affine=moved.affine + np.outer([2, 0, 0, 0], [0, 0, 0, 1])), tmp_path / "moved.nii.gz")
    for cell, said in (("moved.nii.gz", "grid"), ("", "label map")):
        (tmp_path / "t.csv").write_text(f"image,label,subject,age,sex\nscan.nii.gz,{cell},a,1,M\n")
        with pytest.raises(InputError, match=rf"row 2.*{said}"):
            trained(tiny_config, tmp_path / "t.csv", tmp_path / "r", "data.produce=pair", "data.holdout_share=0")
        assert not (tmp_path / "r").exists()


def test_images_follow_the_map_and_lie_where_it_lies(mapped, tmp_path):
    model, run = mapped
    maps = [drawn(0), replace(drawn(3), affine=drawn(3).affine + np.outer([5, 0, 0, 0], [0, 0, 0, 1]))]
    made = [volume for _, volume, _ in sample(model, 3, seed=2, label_maps=maps)]
    assert np.allclose(made[1].affine, maps[1].affine)
    assert np.allclose(made[0].affine, made[2].affine)
    plain = [volume.array_cdhw for _, volume, _ in sample(model, 3, seed=2)]
    for one, other in zip(made, plain):
        assert np.abs(one.array_cdhw - other).max() > 1e-3  # the map reaches the output
    other = next(sample(model, 1, seed=2, label_maps=maps[1:]))[1]
    assert np.abs(other.array_cdhw - made[0].array_cdhw).max() > 1e-3
    write_volume(maps[0], tmp_path / "map.nii.gz")
    sample_command(run, 1, tmp_path / "out", seed=2, label_maps=tmp_path / "map.nii.gz", device="cpu")
    assert np.allclose(
        read_volume(tmp_path / "out" / "SYN000000000_visit0.nii.gz").array_cdhw, made[0].array_cdhw, atol=1e-3
    )


def test_training_draws_the_map_of_the_volume_in_its_view_and_drops_it_at_times(tiny_config, labelled):
    overrides = ["data.labels=[4,7]", "flow.label_map=true", "flow.condition_drop=0.4", "flow.shift_voxels=3"]
    config = parse_config(apply_overrides(tiny_config.model_dump(), overrides))
    rows = [row for row in read_table(labelled, config.data) if row.train]
    scans = load_scans(rows, config)
    n, shape = len(rows), (config.flow.views, len(rows), 2, 4, 4, 4)
    latents = Latents([torch.zeros(shape)], [torch.ones(shape)], torch.zeros(2), torch.ones(2), "")
    data = flow_data(config, rows, [scans], latents, learn_covariates(rows, config.data, labelled))
    given, views = 0, set()
    for position in range(60):
        index = position % n
        context = flow_batch(config, data, 0, [position], [index])[3].context_bcdhw
        assert context.shape == (1, 17, 4, 4, 4)
        if not context[0, -1].any():
            assert not context.any()
            continue
        given += 1
        shifts = [view_move(config, index, view).offset for view in range(config.flow.views)]  # as latents are encoded
        maps = [labels.map_context(_moved(scans.codes_bdhw[index], shift), 2, 4, 2) for shift in shifts]
        matches = [view for view, one in enumerate(maps) if torch.equal(context, one)]
        assert matches, position
        views |= set(matches)
    assert 24 <= given <= 48  # 60 % of 60, wide
    assert views == {0, 1}


def _moved(codes_dhw: np.ndarray, offset) -> torch.Tensor:
    """The map shifted by whole voxels, reflected at the border: written out, not by the engine's function."""
    indices = []
    for o, n in zip(offset, codes_dhw.shape):
        source = np.arange(n) - o
        source = np.abs(source)
        indices.append(np.where(source >= n, 2 * (n - 1) - source, source))
    return torch.from_numpy(codes_dhw[np.ix_(*indices)])[None]


def test_context_that_is_not_given_is_zero_in_the_models_order(tiny_config):
    overrides = ["data.labels=[4,7]", "flow.label_map=true", "flow.baseline=true"]
    config = parse_config(apply_overrides(tiny_config.model_dump(), overrides))
    like = torch.zeros(1, 2, 4, 4, 4)
    map_bcdhw, earlier = torch.full((1, 17, 4, 4, 4), 2.0), torch.full((1, 3, 4, 4, 4), 3.0)
    both = joined(config, map_bcdhw, earlier, like)
    assert both.shape[1] == config.map_channels + config.baseline_channels == 20
    assert torch.equal(both[:, :17], map_bcdhw)
    assert torch.equal(both[:, 17:], earlier)
    assert not joined(config, None, earlier, like)[:, :17].any()
    assert joined(tiny_config, None, None, like) is None
