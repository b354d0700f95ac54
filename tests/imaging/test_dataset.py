"""The table, the split by person, covariates with gaps, intensities, fitting and the cache."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, ResizeWithPadOrCrop, ScaleIntensityRange, Spacing

from engine.errors import InputError, UsageError
from engine.imaging import dataset
from engine.imaging.config import DataConfig, apply_overrides, dump_config, parse_config
from engine.imaging.dataset import (
    condition,
    covariate_from_json,
    fit_volume,
    learn_covariates,
    load_scans,
    person_is_training,
    read_table,
    scale_intensity,
    shifted,
    unscale_intensity,
)
from engine.imaging.volume import Volume, crop_or_pad, reorient, resample


def test_people_stay_on_one_side_whatever_the_table(table, tiny_config):
    rows = read_table(table, tiny_config.data)
    sides = {}
    for row in rows:
        assert sides.setdefault(row.subject, row.train) == row.train
        assert row.train == person_is_training(row.subject, tiny_config.data.holdout_share)
    shares = np.mean([person_is_training(f"person {k}", 0.2) for k in range(4000)])
    assert shares == pytest.approx(0.8, abs=0.03)


def write(folder, text):
    (folder / "a.nii.gz").touch()
    (folder / "t.csv").write_text(text)
    return folder / "t.csv"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,subject\n,S1\n", "row 2.*path of an image"),
        ("image,subject\na.nii.gz,S1\nb.nii.gz,S2\n", "t.csv row 3: expected the image"),
        ("picture\na.nii.gz\n", "column 'image'"),
        ("image,subject,side\na.nii.gz,S1,train\na.nii.gz,S2,maybe\n", "row 3.*maybe"),
        ("image,subject,side\na.nii.gz,S1,train\na.nii.gz,S1,holdout\n", "1 on both"),
        ("image,subject,side\na.nii.gz,S1,holdout\n", "training side"),
    ],
)
def test_bad_tables_are_one_line_with_the_row(tmp_path, text, message):
    config = DataConfig(size=(16, 16, 16), split_column="side" if "side" in text else None)
    with pytest.raises(InputError, match=message):
        read_table(write(tmp_path, text), config)


def test_a_missing_covariate_column_suggests_the_nearest(table):
    config = DataConfig.model_validate({"size": (16, 16, 16), "covariates": {"agee": {"kind": "continuous"}}})
    with pytest.raises(InputError, match=r"'agee'.*'age'"):
        read_table(table, config)


def test_bad_volume_is_named_by_its_row(table, tiny_config, tmp_path):
    (tmp_path / "broken.nii.gz").write_bytes(b"no volume")
    (tmp_path / "t.csv").write_text("image,subject,age,sex\nbroken.nii.gz,S1,3,M\n")
    rows = read_table(tmp_path / "t.csv", tiny_config.data.model_copy(update={"holdout_share": 0.0}))
    with pytest.raises(InputError, match=r"^row 2: expected a NIfTI header") as caught:
        load_scans(rows, tiny_config)
    assert "broken" not in str(caught.value), "the name of a file may name a person"


def test_covariates_are_learned_from_training_rows_only(table, tiny_config):
    rows = read_table(table, tiny_config.data)
    age, sex = learn_covariates(rows, tiny_config.data, table)
    ages = [float(r.covariates["age"]) for r in rows if r.train and r.covariates["age"]]
    assert age.mean == pytest.approx(np.mean(ages))
    assert (age.low, age.high) == (min(ages), max(ages))
    assert sex.levels == ("F", "M")
    assert covariate_from_json(sex.to_json()) == sex


def test_condition_marks_what_is_not_given(table, tiny_config):
    known = learn_covariates(read_table(table, tiny_config.data), tiny_config.data, table)
    given = condition([{"age": known[0].mean, "sex": "M"}, {"age": "", "sex": None}, {}], np.full((3, 3), 2.0), known)
    assert given.continuous_bk[0, 0] == pytest.approx(0.0, abs=1e-6)
    assert torch.isnan(given.continuous_bk[1:, 0]).all()
    assert given.categorical_bk[:, 0].tolist() == [1, -1, -1]
    assert torch.allclose(given.spacing_b3, torch.full((3, 3), np.log(2.0)))


def test_condition_refuses_what_the_model_does_not_know(table, tiny_config):
    known = learn_covariates(read_table(table, tiny_config.data), tiny_config.data, table)
    spacing = np.ones((1, 3))
    with pytest.raises(UsageError, match="'age'"):
        condition([{"agee": 3}], spacing, known)
    with pytest.raises(InputError, match="'X'"):
        condition([{"sex": "X"}], spacing, known)
    with pytest.raises(InputError, match="number for 'age'"):
        condition([{"age": "old"}], spacing, known)


def test_ct_keeps_bone_and_metal():
    config = DataConfig(size=(4, 4, 4), modality="CT")
    hu = np.array([-3000.0, -1000.0, 0.0, 1500.0, 2000.0, 9000.0])
    back = unscale_intensity(scale_intensity(hu, config), config)
    assert np.allclose(back, [-1000, -1000, 0, 1500, 2000, 2000], atol=1e-3)


def test_mr_scale_ignores_a_bright_spot():
    config = DataConfig(size=(4, 4, 4))
    array = np.linspace(0, 100, 10_000)
    spotted = array.copy()
    spotted[-1] = 1e6
    assert np.abs(scale_intensity(array, config)[:9000] - scale_intensity(spotted, config)[:9000]).max() < 1e-4


def test_fit_keeps_content_where_it_is_in_space():
    """A marked voxel keeps its position in mm through flips, permuted axes, cropping and padding."""
    array = np.zeros((1, 10, 24, 17), dtype=np.float32)
    array[0, 6, 11, 9] = 100.0
    array[0, 5, 10, 8] = 50.0
    affine = np.array([[0, 0, -1.5, 20], [-2.0, 0, 0, 30], [0, 1.0, 0, -40], [0, 0, 0, 1]])
    fitted = fit_volume(Volume(array, affine, "MR", "arbitrary", {}), DataConfig(size=(16, 16, 16), mr_percentile=100))
    assert fitted.orientation == "RAS"
    brightest = np.argwhere(fitted.array_cdhw[0] == fitted.array_cdhw.max())
    wanted = affine @ [6, 11, 9, 1]
    assert any(np.allclose((fitted.affine @ [*voxel, 1])[:3], wanted[:3]) for voxel in brightest)


def test_fit_resamples_to_the_wanted_spacing():
    volume = Volume(np.ones((1, 16, 16, 16), dtype=np.float32), np.diag([1.0, 1.0, 1.0, 1.0]), "MR", "arbitrary", {})
    fitted = fit_volume(volume, DataConfig(size=(8, 8, 8), spacing_mm=(2.0, 2.0, 2.0)))
    assert fitted.spacing_mm == pytest.approx((2.0, 2.0, 2.0))
    assert fitted.array_cdhw.shape == (1, 8, 8, 8)


def test_cache_gives_the_same_and_is_dropped_when_the_config_changes(table, tiny_config, tmp_path, monkeypatch):
    rows = read_table(table, tiny_config.data)
    first = load_scans(rows, tiny_config, tmp_path)

    def refuse(*_args, **_keywords):
        raise AssertionError("read again")

    monkeypatch.setattr(dataset, "read_volume", refuse)
    again = load_scans(rows, tiny_config, tmp_path)
    assert np.array_equal(first.x_bcdhw, again.x_bcdhw)
    assert np.array_equal(first.centre_mm, again.centre_mm)
    other = parse_config(apply_overrides(tiny_config.model_dump(), ["data.mr_percentile=90"]))
    with pytest.raises(AssertionError, match="read again"):
        load_scans(rows, other, tmp_path)


def test_shift_moves_whole_voxels():
    x = np.arange(5 * 6 * 7, dtype=np.float32).reshape(1, 5, 6, 7)
    moved = shifted(x, (1, 0, -2))
    assert np.array_equal(moved[0, 1:, :, :-2], x[0, :-1, :, 2:])
    assert np.array_equal(moved[0, 0], np.pad(x[0], ((1, 0), (0, 0), (0, 2)), mode="reflect")[0, :, 2:])
    assert np.array_equal(shifted(x, (0, 0, 0)), x)


# --- made once, in parts, by several processes ------------------------------------------------------------------------


def prepared(table, config, out, workers=1, progress=None):
    rows = [row for row in read_table(table, config.data) if row.train]
    return load_scans(rows, config, out, workers=workers, progress=progress)


def same(a, b):
    return all(
        np.array_equal(x, y)
        for x, y in zip((a.x_bcdhw, a.spacing_mm, a.centre_mm), (b.x_bcdhw, b.spacing_mm, b.centre_mm))
    )


def test_processes_share_the_reading_and_the_result_is_the_same(table, tiny_config, tmp_path):
    told = []
    shared = prepared(table, tiny_config, tmp_path / "a", 2, lambda what, done, total: told.append((what, done, total)))
    assert same(shared, prepared(table, tiny_config, tmp_path / "b"))
    assert same(shared, prepared(table, tiny_config, None))
    n = len(shared.x_bcdhw)
    assert told == [("reading scans", k, n) for k in range(1, n + 1)]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["scans.json", "scans.npy"], "parts are gone"


def test_what_was_read_before_a_stop_is_not_read_again(table, tiny_config, tmp_path, monkeypatch):
    whole = prepared(table, tiny_config, tmp_path / "whole")

    def stop(what, done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(table, tiny_config, tmp_path / "out", progress=stop)
    parts = sorted((tmp_path / "out" / "parts").iterdir())
    assert len(parts) == 4
    assert all(len(part.stem) == 64 for part in parts), "a hash names a part, and not its scan"
    read, numbers = dataset.read_volume, []
    monkeypatch.setattr(dataset, "read_volume", lambda path, **k: numbers.append(k["where"]) or read(path, **k))
    told = []
    (tmp_path / "out" / "parts" / ".partial-1-x-half.npz").write_bytes(b"of a killed process")
    again = prepared(table, tiny_config, tmp_path / "out", progress=lambda _, done, __: told.append(done))
    assert same(again, whole)
    assert told == list(range(5, len(whole.x_bcdhw) + 1))
    assert len(numbers) == len(told)
    # a scan that changed meanwhile is read again
    with pytest.raises(KeyboardInterrupt):
        prepared(table, tiny_config, tmp_path / "third", progress=stop)
    first = next(row for row in read_table(table, tiny_config.data) if row.train).image
    before = first.stat()
    numbers.clear()
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    try:
        prepared(table, tiny_config, tmp_path / "third")
    finally:
        os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(numbers) == len(whole.x_bcdhw) - 3


def test_a_bad_scan_ends_all_processes_with_its_row(table, tiny_config, tmp_path):
    (tmp_path / "bad.nii.gz").write_bytes(b"no volume")
    text = table.read_text().replace("scan", f"{table.parent}/scan")
    (tmp_path / "t.csv").write_text(text + "bad.nii.gz,S9,0,30,M\n")
    config = parse_config(apply_overrides(tiny_config.model_dump(), ["data.holdout_share=0"]))
    with pytest.raises(InputError, match=r"^row 14: expected a NIfTI header"):
        prepared(tmp_path / "t.csv", config, tmp_path / "out", 2)
    assert not (tmp_path / "out" / "scans.npy").exists()


def test_prepare_fills_a_folder_that_training_takes(table, tiny_config, tmp_path, monkeypatch):
    from engine.imaging.prepare import prepare_command

    (tmp_path / "config.yaml").write_text(dump_config(tiny_config))
    made = prepare_command(tmp_path / "config.yaml", table, tmp_path / "out", workers=2)
    assert made["shape"] == [1, 16, 16, 16]
    monkeypatch.setattr(dataset, "read_volume", lambda *_, **__: pytest.fail("read again"))
    rows = [row for row in read_table(table, tiny_config.data) if row.train]
    assert len(load_scans(rows, tiny_config, tmp_path / "out").x_bcdhw) == made["scans"]


# --- held against MONAI's transforms ----------------------------------------------------------------------------------


def meta(volume):
    return MetaTensor(torch.from_numpy(volume.array_cdhw.copy()), affine=torch.from_numpy(volume.affine.copy()))


def oblique(seed=0, shape=(20, 13, 17)):
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    turned = np.linalg.qr(np.eye(3) + 0.2 * rng.normal(size=(3, 3)))[0] * [1.0, 1.5, 2.0]
    affine[:3, :3] = turned[:, rng.permutation(3)] * rng.choice([-1, 1], 3)
    affine[:3, 3] = rng.uniform(-50, 50, 3)
    return Volume(rng.random((1, *shape), dtype=np.float32) * 100, affine, "MR", "arbitrary", {})


@pytest.mark.parametrize("seed", range(4))
def test_reorienting_is_that_of_monai(seed):
    volume = oblique(seed)
    turned, theirs = reorient(volume, "RAS"), Orientation("RAS")(meta(volume))
    assert np.array_equal(turned.array_cdhw, theirs.numpy())
    assert np.allclose(turned.affine, theirs.affine, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 9, 15), (26, 17, 21)])
def test_cropping_and_padding_by_even_numbers_are_those_of_monai(shape):
    volume = oblique(1)
    shape = tuple(n + (n - m) % 2 for n, m in zip(shape, volume.shape_dhw))
    ours, theirs = crop_or_pad(volume, shape, fill=-1.0), ResizeWithPadOrCrop(shape, value=-1.0)(meta(volume))
    assert np.array_equal(ours.array_cdhw, theirs.numpy())
    assert np.allclose(ours.affine, theirs.affine, atol=1e-5)


def test_finer_sampling_is_that_of_monai():
    volume = reorient(oblique(2), "RAS")
    ours = resample(volume, [s / 2 for s in volume.spacing_mm])
    spacing = Spacing([s / 2 for s in volume.spacing_mm], mode="bilinear", padding_mode="border", scale_extent=True)
    theirs = spacing(meta(volume))
    assert ours.array_cdhw.shape == tuple(theirs.shape)
    assert np.allclose(ours.affine, theirs.affine, atol=1e-4)
    assert np.allclose(ours.array_cdhw, theirs.numpy(), atol=1e-2)  # of values up to 100


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_intensities_are_those_of_monai(modality):
    config = DataConfig(size=(16, 16, 16), modality=modality)
    array = np.random.default_rng(3).normal(200, 900, (1, 16, 16, 16)).astype(np.float32)
    if modality == "CT":
        theirs = ScaleIntensityRange(-1000, 2000, -1, 1, clip=True)(array)
    else:
        top = float(np.percentile(array, 99.5))
        theirs = ScaleIntensityRange(0, top, -1, 1, clip=True)(array)
    assert np.allclose(scale_intensity(array, config), np.asarray(theirs), atol=1e-5)
