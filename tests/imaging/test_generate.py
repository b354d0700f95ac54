"""Sampling: pure function of (model, seed, k), geometry, follow-ups, guards; and the command's folder."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from engine.errors import CorruptRun, InputError, UsageError
from engine.imaging.commands import sample_command, shard_range
from engine.imaging.generate import load_model, sample
from engine.imaging.volume import read_volume
from engine.provenance import sha256
from engine.training import checkpoint


@pytest.fixture(scope="module")
def model(tiny_run):
    return load_model(tiny_run, "cpu")


def arrays(*args, **keywords):
    return [volume.array_cdhw for _, volume, _ in sample(*args, **keywords)]


def test_subject_k_does_not_depend_on_the_others(model):
    together = arrays(model, 5, seed=3)
    for k in range(5):
        assert arrays(model, 1, seed=3, start=k)[0].tobytes() == together[k].tobytes()


def test_seed_and_index_count(model):
    a, b = arrays(model, 2, seed=3)
    assert not np.array_equal(a, b)
    assert not np.array_equal(a, arrays(model, 1, seed=4)[0])


def test_geometry_is_that_of_the_training_data(model):
    index, volume, given = next(sample(model, 1, seed=0, start=7, covariates={"age": 30}))
    assert (index, given) == (7, {"age": 30})
    assert volume.orientation == "RAS"
    assert volume.spacing_mm == pytest.approx((2.0, 2.0, 2.0))
    centre = volume.affine @ [7.5, 7.5, 7.5, 1]
    assert centre[:3] == pytest.approx([5.0, 5.0, 5.0])
    assert volume.array_cdhw.shape == (1, 16, 16, 16)
    assert 0.0 <= volume.array_cdhw.min() < volume.array_cdhw.max() <= 1000.0


def test_follow_up_shares_the_noise_and_differs_by_its_covariates(model):
    visits = [{"age": 30}, {"age": 60}, {"age": 30}]
    made = list(sample(model, 1, seed=1, start=4, covariates=[visits]))
    assert [index for index, _, _ in made] == [4, 4, 4]
    first, second, again = (volume.array_cdhw for _, volume, _ in made)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


def test_guidance_one_is_the_conditional_model_and_zero_ignores_covariates(model):
    given = {"age": 60, "sex": "M"}
    assert np.array_equal(arrays(model, 1, covariates=given), arrays(model, 1, covariates=given, guidance=1.0))
    ignored = arrays(model, 1, covariates=given, guidance=0.0)[0]
    assert np.allclose(ignored, arrays(model, 1)[0], atol=0.1)
    assert np.abs(arrays(model, 1, covariates=given)[0] - ignored).max() > 0.1


def test_field_of_view_outside_training_is_refused_with_the_range(model):
    with pytest.raises(UsageError, match=r"trained.*size 16 x 16 x 16.*2 x 2 x 2 mm.*extent 32 x.*--force"):
        arrays(model, 1, spacing_mm=(1.0, 1.0, 1.0))
    with pytest.raises(UsageError, match="within what was trained"):
        arrays(model, 1, size=(24, 16, 16))
    with pytest.raises(UsageError, match="multiples of 4"):
        arrays(model, 1, size=(15, 16, 16), force=True)
    forced = next(sample(model, 1, size=(24, 16, 12), force=True))[1]
    assert forced.array_cdhw.shape == (1, 24, 16, 12)
    assert forced.affine @ [11.5, 7.5, 5.5, 1] == pytest.approx([5.0, 5.0, 5.0, 1.0])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"covariates": {"agee": 3}}, "'age'"),
        ({"covariates": {"sex": "X"}}, "'X'"),
        ({"covariates": [{}, {}]}, "one entry"),
        ({"method": "magic"}, "magic"),
        ({"start": -1}, "start"),
    ],
)
def test_bad_requests(model, keywords, message):
    with pytest.raises((UsageError, InputError), match=message):
        arrays(model, 1, **keywords)


def test_run_without_flow_is_refused(tiny_run, tmp_path):
    with pytest.raises(CorruptRun, match="run folder"):
        load_model(tmp_path)
    with pytest.raises(CorruptRun, match="flow"):
        load_model(tiny_run, step=checkpoint.steps(tiny_run)[0])


def test_shards_partition_the_subjects():
    for n, parts in ((10, 3), (2, 4), (0, 2)):
        assert [k for i in range(parts) for k in shard_range(n, (i, parts))] == list(range(n))


def test_shards_write_the_bytes_of_the_whole(tiny_run, tmp_path):
    options = {"seed": 5, "set": {"sex": "F"}, "follow_up": {"age": "40"}}
    result = sample_command(tiny_run, 3, tmp_path / "whole", **options)
    assert result["volumes"] == 6
    parts = [tmp_path / f"part{i}" for i in range(2)]
    for i, part in enumerate(parts):
        sample_command(tiny_run, 3, part, shard=(i, 2), **options)
    whole = json.loads((tmp_path / "whole" / "checksums.json").read_text())
    joined = {k: v for part in parts for k, v in json.loads((part / "checksums.json").read_text()).items()}
    assert whole == joined
    assert len(whole) == 6
    for name, digest in whole.items():
        assert sha256(tmp_path / "whole" / name) == digest
    with (tmp_path / "whole" / "volumes.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(r["subject"], r["visit"], r["age"], r["sex"]) for r in rows[:2]] == [
        ("SYN000000000", "0", "", "F"), ("SYN000000000", "1", "40", "F"),
    ]  # fmt: skip
    record = json.loads((tmp_path / "whole" / "provenance.json").read_text())
    assert record["synthetic_data"] is True
    assert record["seed"] == 5
    assert read_volume(tmp_path / "whole" / rows[0]["image"]).spacing_mm == pytest.approx((2.0, 2.0, 2.0))


def test_covariates_from_a_table(tiny_run, tmp_path):
    (tmp_path / "people.csv").write_text("subject,age,sex,note\nSYN000000001,30,M,x\n0,40,F,x\n0,50,F,x\n")
    result = sample_command(tiny_run, 2, tmp_path / "out", covariates_csv=tmp_path / "people.csv")
    assert (result["volumes"], result["ignored_columns"]) == (3, ["note"])
    with pytest.raises(InputError, match="subject 2"):
        sample_command(tiny_run, 3, tmp_path / "more", covariates_csv=tmp_path / "people.csv")
    assert not (tmp_path / "more").exists()


def test_dicom_series(tiny_run, tmp_path):
    sample_command(tiny_run, 1, tmp_path / "out", format="dicom")
    volume = read_volume(tmp_path / "out" / "SYN000000000_visit0")
    assert sorted(volume.array_cdhw.shape) == [1, 16, 16, 16]
