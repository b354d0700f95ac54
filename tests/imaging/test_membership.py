"""Attacks by the model: members of an overfitted model are seen, those of a model of others are not."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from engine.audit.intervals import delong
from engine.errors import InputError
from engine.imaging.config import parse_config
from engine.imaging.generate import load_model
from engine.imaging.membership import ATTACKS, member_scores
from engine.imaging.volume import Volume, write_volume


def scan(number: int) -> Volume:
    """Eight voxels a side, every one its own draw: nothing of an unseen scan can be guessed."""
    array = 100 * np.random.default_rng(number).random((1, 8, 8, 8), dtype=np.float32)
    return Volume(array, np.eye(4), "MR", "arbitrary", {})


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Tables of 8 members, 12 unseen and 12 further unseen people; the first member has two visits."""
    folder = tmp_path_factory.mktemp("membership")
    tables = {}
    for name, numbers in (("train", range(9)), ("holdout", range(100, 112)), ("others", range(200, 212))):
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["image", "subject"])
            for k in numbers:
                write_volume(scan(k), folder / f"{k}.nii.gz")
                writer.writerow([f"{k}.nii.gz", f"P{max(k, 1)}"])  # scans 0 and 1 are of one person
        tables[name] = folder / f"{name}.csv"
    return tables


@pytest.fixture(scope="module")
def overfitted(sides, tmp_path_factory):
    """A model that learned nothing but the nine scans of eight people."""
    from engine.imaging.train import train

    config = parse_config(
        {
            "data": {"size": [8, 8, 8], "holdout_share": 0.0},
            "autoencoder": {
                "steps": 70, "batch_size": 9, "widths": [32], "latent_channels": 4, "shift_voxels": 0, "kl_weight": 1e-4,
            },
            "flow": {
                "steps": 120, "batch_size": 9, "widths": [32], "attention_levels": [], "embedding_width": 32, "views": 1,
                "warmup_steps": 5, "learning_rate": 0.004, "ema_decay": 0.98,
            },
            "training": {"precision": "fp32", "log_every_steps": 1000},
        }
    )  # fmt: skip
    out = tmp_path_factory.mktemp("runs") / "overfitted"
    train(config, sides["train"], out)
    return load_model(out, "cpu")


def test_members_of_an_overfitted_model_are_seen(overfitted, sides):
    scores = member_scores(overfitted, sides["train"], sides["holdout"])
    assert set(scores) == set(ATTACKS)
    for name, (member, nonmember) in scores.items():
        assert (len(member), len(nonmember)) == (8, 12)  # one score per person
        assert delong(member, nonmember)[0] > 0.9, name


def test_people_the_model_never_saw_are_not_told_apart(overfitted, sides):
    """Both sides unseen: the interval covers one half."""
    for name, (member, nonmember) in member_scores(overfitted, sides["others"], sides["holdout"]).items():
        _, low, high = delong(member, nonmember)
        assert low < 0.5 < high, name


def test_scores_are_the_same_every_time_and_mean_over_visits(overfitted, sides, tmp_path):
    first = member_scores(overfitted, sides["train"], sides["holdout"], times=(0.3,), draws=1)
    again = member_scores(overfitted, sides["train"], sides["holdout"], times=(0.3,), draws=1)
    assert all(np.array_equal(first[k][0], again[k][0]) for k in ATTACKS)
    alone = []
    for k in (0, 1):
        table = sides["train"].parent / f"alone{k}.csv"
        table.write_text(f"image,subject\n{k}.nii.gz,P1\n")
        alone.append(member_scores(overfitted, table, sides["holdout"], times=(0.3,), draws=1)["flow_loss"][0][0])
    assert first["flow_loss"][0][0] == pytest.approx(np.mean(alone), rel=1e-6)


def test_folders_and_covariates_that_are_not_there(overfitted, sides, tiny_run, table, tmp_path):
    """A folder without a table is its files; a table without the model's covariates leaves them out."""
    for name, numbers in (("a", (0, 1)), ("b", (100, 101))):
        (tmp_path / name).mkdir()
        for k in numbers:
            write_volume(scan(k), tmp_path / name / f"{k}.nii.gz")
    found = member_scores(overfitted, tmp_path / "a", tmp_path / "b", times=(0.3,), draws=1)
    assert [len(side) for side in found["flow_loss"]] == [2, 2]
    for name, numbers in (("known.csv", (0, 2)), ("unknown.csv", (4, 6))):
        lines = "".join(f"{table.parent}/scan{k}.nii.gz,P{k}\n" for k in numbers)
        (tmp_path / name).write_text(f"image,subject\n{lines}")
    found = member_scores(tiny_run, tmp_path / "known.csv", tmp_path / "unknown.csv", times=(0.3,), draws=1)
    assert np.isfinite(found["flow_loss"][0]).all()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither"):
        member_scores(overfitted, tmp_path / "empty", tmp_path / "b")
    with pytest.raises(InputError, match="nothing there"):
        member_scores(overfitted, tmp_path / "absent.csv", tmp_path / "b")


def test_a_person_on_both_sides_is_refused(overfitted, sides):
    with pytest.raises(InputError, match="in both"):
        member_scores(overfitted, sides["train"], sides["train"])
