"""The table, the split by person, covariates with gaps, intensities, fitting and the cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.errors import InputError, UsageError
from engine.imaging import dataset
from engine.imaging.config import DataConfig, apply_overrides, parse_config
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
from engine.imaging.volume import Volume


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
        ("image,subject\na.nii.gz,S1\nb.nii.gz,S2\n", "row 3.*b.nii.gz"),
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
    with pytest.raises(InputError, match=r"row 2.*broken.nii.gz"):
        load_scans(rows, tiny_config)


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
