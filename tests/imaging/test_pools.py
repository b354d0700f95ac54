"""Audit pools of scans: views, controls, and the refusal of people and scans on both sides."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from scipy import ndimage

from engine.audit.pools import Pool, topk
from engine.audit.store import read_store
from engine.errors import InputError
from engine.imaging import pools as pools_module
from engine.imaging.embedding import DIMENSIONS, VIEWS
from engine.imaging.pools import audit_pools, write_scan_store
from engine.imaging.volume import Volume, write_volume

SHAPE = (14, 16, 14)


def array(number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    return 100 + 30 * ndimage.gaussian_filter(rng.standard_normal(SHAPE), 1.5) / 0.07


def side(folder, name: str, scans: dict[str, np.ndarray]):
    """A table of scans: subject -> array."""
    (folder / name).mkdir()
    with (folder / name / "volumes.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "subject"])
        for k, (subject, values) in enumerate(scans.items()):
            volume = Volume(values[None].astype(np.float32), np.eye(4), "MR", "arbitrary", {})
            write_volume(volume, folder / name / f"{name}{k}.nii.gz")
            writer.writerow([f"{name}{k}.nii.gz", subject])
    return folder / name


@pytest.fixture(autouse=True)
def few_controls(monkeypatch):
    monkeypatch.setattr(pools_module, "CONTROL_SCANS", 2)


@pytest.fixture
def train(tmp_path):
    return side(tmp_path, "train", {f"T{k}": array(k) for k in range(8)})


@pytest.fixture
def synthetic(tmp_path):
    return side(tmp_path, "synthetic", {f"S{k}": array(50 + k) for k in range(3)})


def honest(first: int = 20, count: int = 10) -> dict[str, np.ndarray]:
    return {f"H{k}": array(first + k) for k in range(count)}


def test_pools_controls_and_a_judge(train, synthetic, tmp_path):
    pools, controls, judges = audit_pools(train, side(tmp_path, "holdout", honest()), synthetic)
    assert {*pools} == {"train", "holdout", "synthetic"}
    assert {*controls} == {f"{name}_copycat" for name in ("flipped", "rotated", "noised", "gamma")}
    assert len(judges) == 1
    for pool in (*pools.values(), *controls.values()):
        assert pool.views.shape == (VIEWS, len(pool), DIMENSIONS)
    assert not {p for c in controls.values() for p in c.person} & {*pools["train"].person}
    assert list(pools["train"].person) == [f"T{k}" for k in range(8)]


def test_a_person_on_both_sides_is_refused(train, synthetic, tmp_path):
    holdout = side(tmp_path, "holdout", {**honest(), "T3": array(90), "T1": array(91)})
    with pytest.raises(InputError, match=r"2 people in both \(T1, T3\)"):
        audit_pools(train, holdout, synthetic)


def test_the_same_voxels_under_two_names_are_refused(train, synthetic, tmp_path):
    holdout = side(tmp_path, "holdout", {**honest(), "other": array(3)})
    with pytest.raises(InputError, match=r"1 pairs.*'other' of the holdout and 'T3' of train.*before training"):
        audit_pools(train, holdout, synthetic)


@pytest.mark.parametrize("how", ["mirrored and noised", "turned and darkened"])
def test_a_disguised_scan_under_two_names_is_refused(train, synthetic, tmp_path, how):
    copy = array(5)
    if how == "mirrored and noised":
        copy = copy[::-1] + 2.0 * np.random.default_rng(0).standard_normal(SHAPE)
    else:
        copy = 0.5 * ndimage.rotate(copy, 6.0, axes=(1, 2), reshape=False, order=1, mode="nearest")
    holdout = side(tmp_path, "holdout", {**honest(), "other": copy})
    with pytest.raises(InputError, match=r"registered \(NCC above 0\.9.*'other' of the holdout and 'T5' of train"):
        audit_pools(train, holdout, synthetic)


def test_people_who_look_alike_are_not_one_scan(tmp_path, synthetic):
    """Heads with much in common correlate above 0.95 and are not refused for it."""
    common = 10 * array(999)
    train = side(tmp_path, "alike", {f"T{k}": common + array(k) for k in range(8)})
    holdout = side(tmp_path, "holdout", {f"H{k}": common + array(20 + k) for k in range(10)})
    pools, _, _ = audit_pools(train, holdout, synthetic)
    assert pools["holdout"].people == 10


def test_search_in_views_against_a_loop():
    """The version with the smallest nearest distance gives all k neighbours; a person's own rows are skipped."""
    rng = np.random.default_rng(0)
    rows, more, base = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 5), (3, 6, 5), (9, 5)))
    codes, others = np.array([0, 0, 1, 2, 3, 4]), np.array([0, 1, 2, 3, 4, 5, 6, 7, 0])
    query, database = Pool("features", rows, np.arange(6), views=more), Pool("features", base, np.arange(9))
    distance, index = topk(query, database, 3, exclude=(codes, others))
    for k in range(6):
        allowed = np.flatnonzero(others != codes[k])
        versions = [
            np.linalg.norm(base[allowed].astype(float) - v.astype(float), axis=1) for v in (rows[k], *more[:, k])
        ]
        best = min(versions, key=min)
        order = np.argsort(best)[:3]
        assert list(index[k]) == list(allowed[order])
        assert distance[k] == pytest.approx(best[order])


def test_a_store_of_scans_is_read_back(train, synthetic, tmp_path):
    out = write_scan_store(train, tmp_path / "store", grid_of=synthetic)
    pools, _, _ = audit_pools(train, side(tmp_path, "holdout", honest()), synthetic)
    read = read_store(out, "train")
    assert np.array_equal(read.data, pools["train"].data)
    assert np.array_equal(read.views, pools["train"].views)
    assert list(read.person) == list(pools["train"].person)
