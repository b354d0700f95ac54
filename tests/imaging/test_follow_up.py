"""Follow-ups: the earlier scan as a condition in training and sampling, covariates of both times, `+` on the command line."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch

from engine.errors import InputError, UsageError
from engine.imaging.commands import sample_command
from engine.imaging.config import apply_overrides, parse_config
from engine.imaging.context import flagged, known_covariates, other_scans, with_baseline
from engine.imaging.dataset import condition, learn_covariates, load_scans, read_table
from engine.imaging.draws import flow_batch, flow_data
from engine.imaging.generate import Baseline, load_model, sample
from engine.imaging.inputs import follow_up, read_scans
from engine.imaging.latents import Latents
from engine.imaging.train import train
from engine.imaging.volume import read_volume


@pytest.fixture(scope="module")
def config(tiny_config):
    """Follow-ups, a rate at which they reach the weights in a few steps."""
    return parse_config(apply_overrides(tiny_config.model_dump(), ["flow.baseline=true", "flow.condition_drop=0.4"]))


@pytest.fixture(scope="module")
def run(config, table, tmp_path_factory):
    out = tmp_path_factory.mktemp("follow") / "run"
    train(config, table, out)
    return out


@pytest.fixture(scope="module")
def model(run):
    return load_model(run, "cpu")


def test_the_model_knows_the_covariates_of_both_times(model, config, table):
    assert [c.name for c in model.covariates] == ["age", "sex", "baseline_age", "baseline_sex"]
    learned = learn_covariates(read_table(table, config.data), config.data, table)
    now, then = known_covariates(config, learned)[::2]
    assert (now.mean, now.deviation) == (then.mean, then.deviation)  # a difference of both is the interval


def test_another_scan_of_the_person_is_the_earlier_one(table, config):
    rows = read_table(table, config.data)
    others = other_scans(rows)
    assert all(rows[j].subject == rows[k].subject and j != k for k, found in enumerate(others) for j in found)
    assert other_scans(rows[::2]) == [[k] for k in range(len(rows[::2]))]  # one scan: itself


def test_training_draws_the_other_scan_its_covariates_and_sometimes_neither(table, config):
    rows = [row for row in read_table(table, config.data) if row.train]
    learned = learn_covariates(rows, config.data, table)
    n, size = len(rows), (4, 4, 4)
    mean = torch.arange(n, dtype=torch.float32).view(1, n, 1, 1, 1, 1).expand(2, n, 2, *size).clone()
    latents = Latents([mean], [torch.zeros_like(mean)], torch.zeros(2), torch.ones(2), "")
    data = flow_data(config, rows, [load_scans(rows, config)], latents, learned)
    ages = condition([row.covariates for row in rows], np.ones((n, 3)), learned).continuous_bk[:, 0]
    given = intervals = 0
    for position in range(80):
        index = position % n
        x0, _, _, wanted = flow_batch(config, data, 0, [position], [index])
        assert x0.unique().item() == index
        context = wanted.context_bcdhw
        assert context.shape == (1, 3, *size)
        assert wanted.continuous_bk.shape == wanted.categorical_bk.shape == (1, 2)
        if context[0, -1].any():
            given += 1
            other = int(context[0, 0, 0, 0, 0])
            assert other in other_scans(rows)[index]
            now, then = wanted.continuous_bk[0]
            if not now.isnan() and not then.isnan():
                intervals += 1
                # both times are blurred alike, so that the interval is exact
                assert (now - then).item() == pytest.approx((ages[index] - ages[other]).item(), abs=1e-5)
        else:
            assert not context.any()
            assert wanted.continuous_bk[0, 1].isnan() and wanted.categorical_bk[0, 1] == -1  # noqa: PT018
    assert 32 <= given <= 64
    assert intervals >= 6


def test_not_given_means_zeros_and_missing_covariates():
    now = condition([{}, {}], np.ones((2, 3)), [])
    both = with_baseline(now, now, torch.tensor([True, False]))
    assert both.continuous_bk.shape == (2, 0)
    x = torch.ones(2, 3, 2, 2, 2)
    marked = flagged(x, torch.tensor([True, False]))
    assert marked[0].eq(1).all() and not marked[1].any()  # noqa: PT018


def test_a_follow_up_lies_where_its_baseline_lies_and_depends_on_it(model, table):
    scans = [(volume, row) for volume, row in read_scans(table, "image", "MR")][:2]
    earlier = [Baseline(volume, {"age": row["age"], "sex": row["sex"]}) for volume, row in scans]
    made = [volume for _, volume, _ in sample(model, 3, seed=1, covariates={"age": 40}, baselines=earlier)]
    assert np.allclose(made[0].affine, scans[0][0].affine)
    one = next(sample(model, 1, seed=1, covariates={"age": 40}, baselines=earlier[1:]))[1]
    assert np.abs(one.array_cdhw - made[0].array_cdhw).max() > 1e-3  # another baseline, the same noise
    older = next(sample(model, 1, seed=1, covariates={"age": 70}, baselines=earlier[:1]))[1]
    assert np.abs(older.array_cdhw - made[0].array_cdhw).max() > 1e-3  # another interval
    other = [Baseline(scans[0][0], {"age": "20"})]
    assert np.abs(next(sample(model, 1, seed=1, covariates={"age": 40}, baselines=other))[1].array_cdhw
                  - made[0].array_cdhw).max() > 1e-4  # fmt: skip


def test_visits_of_a_synthetic_subject_follow_its_first_one(model):
    visits = [{"age": 30, "sex": "F"}, {"age": 34, "sex": "F"}, {"age": 38, "sex": "F"}]
    made = [volume.array_cdhw for _, volume, _ in sample(model, 1, seed=2, start=5, covariates=[visits])]
    alone = next(sample(model, 1, seed=2, start=5, covariates=visits[0]))[1].array_cdhw
    assert np.array_equal(made[0], alone)  # the first visit knows nothing of the later ones
    assert len({a.tobytes() for a in made}) == 3
    two = [volume.array_cdhw for _, volume, _ in sample(model, 1, seed=2, start=5, covariates=[[visits[0], visits[2]]])]
    assert not np.array_equal(two[1], made[1])
    assert np.array_equal(
        made[1], [v.array_cdhw for _, v, _ in sample(model, 1, seed=2, start=5, covariates=[visits[:2]])][1]
    )


def test_a_model_without_baselines_refuses_one(tiny_run, model, table):
    scan = Baseline(read_volume(table.parent / "scan0.nii.gz", modality="MR"), {})
    with pytest.raises(UsageError, match=r"flow\.baseline"):
        next(sample(tiny_run, 1, baselines=[scan], device="cpu"))
    with pytest.raises(UsageError, match="none"):
        next(sample(model, 1, baselines=[]))


def test_plus_adds_to_the_baselines_value_and_the_rest_stays():
    names = ["age", "sex", "baseline_age", "baseline_sex"]
    baseline = {"age": "61.5", "sex": "F", "baseline_age": "1", "image": "x"}
    assert follow_up(baseline, {"age": "+2"}, names) == {"age": 63.5, "sex": "F"}
    assert follow_up(baseline, {"age": "70", "sex": ""}, names) == {"age": "70", "sex": ""}
    assert follow_up(baseline, {"dose": "3"}, names) == {"age": "61.5", "sex": "F", "dose": "3"}
    for given, said in (({"sex": "F"}, "none"), ({"age": "n/a"}, "none"), ({"age": "old"}, "'old'")):
        with pytest.raises(UsageError, match=said):
            follow_up(given, {"age": "+2"}, names)


def test_scans_are_read_from_a_file_or_a_table(table, tmp_path):
    assert len(read_scans(table, "image", "MR")) == 12
    single = read_scans(table.parent / "scan1.nii.gz", "image", "MR")
    assert single[0][1] == {}
    assert read_scans(table, "label", None)[3][1]["age"] == ""  # a table without the column falls back on image
    for content, said in (("subject\nx\n", "column 'image'"), ("image\n", "no row"), ("image,a\n,1\n", "row 2")):
        (tmp_path / "t.csv").write_text(content)
        with pytest.raises(InputError, match=said):
            read_scans(tmp_path / "t.csv", "image", None)
    with pytest.raises(InputError, match="nothing there"):
        read_scans(tmp_path / "absent.csv", "image", None)


def test_the_command_makes_follow_ups_of_a_table_in_shards(run, table, tmp_path):
    options = {"baseline": table, "set": {"age": "+2.5"}, "seed": 1, "device": "cpu"}
    with pytest.raises(UsageError, match="age"):
        sample_command(run, 4, tmp_path / "bad", **options)  # scan 3 has no age
    assert not (tmp_path / "bad").exists()
    sample_command(run, 3, tmp_path / "whole", **options)
    with (tmp_path / "whole" / "volumes.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["age"], row["sex"]) for row in rows] == [("22.5", "M"), ("23.5", "F"), ("24.5", "M")]
    sample_command(run, 3, tmp_path / "part", shard=(1, 2), **options)
    whole, part = (json.loads((tmp_path / name / "checksums.json").read_text()) for name in ("whole", "part"))
    assert part
    assert all(whole[name] == digest for name, digest in part.items())
    record = json.loads((tmp_path / "whole" / "provenance.json").read_text())
    assert record["conditioned_on"] == {"label_maps": False, "scans_of_people": True}
    with pytest.raises(UsageError, match="--set beside --baseline"):
        sample_command(run, 1, tmp_path / "bad", follow_up={"age": 3}, **options)
