"""The judge for scans: copies are confirmed however they were disguised, fresh people and blurred ones are not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from engine.audit import Pool
from engine.audit.copies import Scores
from engine.audit.pools import topk
from engine.imaging import audit_judges
from engine.imaging.audit_judges import CANDIDATES, LEAST_PEOPLE, confirmation_judge, confirmed
from engine.imaging.embedding import transforms
from engine.imaging.pools import scan_pool
from engine.imaging.volume import Volume

SHAPE = (14, 16, 14)


def scan(number: int) -> Volume:
    """A template that everybody shares, and a person's own structure and noise."""
    rng = np.random.default_rng(number)
    template = ndimage.gaussian_filter(np.random.default_rng(999).standard_normal(SHAPE), 3.0)
    own = ndimage.gaussian_filter(rng.standard_normal(SHAPE), 1.5)
    array = template / template.std() + own / own.std() + 0.3 * rng.standard_normal(SHAPE)
    return Volume(array[None].astype(np.float32), np.eye(4), "MR", "arbitrary", {})


@pytest.fixture(scope="module")
def sides():
    """Train, holdout and the sets to be judged, as pools and volumes."""
    train, holdout = [scan(k) for k in range(12)], [scan(100 + k) for k in range(12)]
    copies = [transforms(volume) for volume in train[:2]]
    volumes = {
        "train": train,
        "holdout": holdout,
        "fresh": [scan(200 + k) for k in range(6)],
        "blurred": [replace(v, array_cdhw=ndimage.gaussian_filter(v.array_cdhw, 1.0, axes=(1, 2, 3)))
                    for v in (scan(300 + k) for k in range(6))],
        "one": [scan(200), scan(201), scan(202), copies[0]["noised"]],
        **{name: [made[name] for made in copies] for name in copies[0]},
    }  # fmt: skip
    return {name: (scan_pool(v, [f"{name}-{k}" for k in range(len(v))]), v) for name, v in volumes.items()}


@pytest.fixture(scope="module")
def judge(sides):
    return confirmation_judge(sides)


def scores(rows: Pool, train: Pool) -> Scores:
    """What the copy search gives, with the distance itself as the statistic."""
    distance, index = topk(rows, train, 1)
    return Scores(distance, distance[:, 0], distance[:, 0], index[:, 0], rows.person)


@pytest.mark.parametrize("name", ["flipped", "rotated", "noised", "gamma", "train"])
def test_copies_are_confirmed(judge, sides, name):
    rows = sides[name][0]
    found = {f.name: f for f in judge(name, rows, scores(rows, sides["train"][0]))}
    assert found["confirmed_copies"].value == min(len(rows), CANDIDATES)
    assert found["confirmed_copies"].verdict == "fail"
    assert found["confirmed_copies"].floor == 0  # no unseen person would have been convicted
    assert found["confirmed_copies"].detail["conformal_p"] == pytest.approx(1 / 13)
    assert found["registered_ncc"].value > 0.9 > found["registered_ncc"].floor


@pytest.mark.parametrize("name", ["fresh", "blurred"])
def test_unseen_people_and_blurred_ones_are_not(judge, sides, name):
    rows = sides[name][0]
    found = judge(name, rows, scores(rows, sides["train"][0]))[0]
    assert (found.value, found.verdict) == (0, "pass")
    assert found.n == {"rows": 6, "candidates": 6, "unseen_people": 12}


def test_pairs_that_are_known_are_not_registered_again(sides, monkeypatch):
    """A second judge of the same sides, with a set of its own, finds the null there."""
    rows, compared = sides["fresh"][0], {}
    real = {name: sides[name] for name in ("train", "holdout")}
    first = confirmation_judge({**real, "fresh": sides["fresh"]}, compared=compared)
    expected = first("fresh", rows, scores(rows, sides["train"][0]))
    registered = []
    whole = audit_judges.similarity
    monkeypatch.setattr(audit_judges, "similarity", lambda *pair: registered.append(pair) or whole(*pair))
    again = confirmation_judge({**real, "fresh": sides["fresh"]}, compared=compared)
    assert again("fresh", rows, scores(rows, sides["train"][0])) == expected
    assert registered == []
    other = sides["one"][0]
    confirmation_judge({**real, "one": sides["one"]}, compared=compared)("one", other, scores(other, sides["train"][0]))
    assert 1 <= len(registered) <= 2 * len(other)  # candidates only; two of them are known


def test_a_single_copy_among_others_convicts(judge, sides):
    rows = sides["one"][0]
    found = judge("one", rows, scores(rows, sides["train"][0]))[0]
    assert (found.value, found.verdict) == (1, "fail")


def test_people_of_the_holdout_are_judged_without_themselves(judge, sides):
    """Fresh people set aside from the holdout do not meet themselves in it or in the null."""
    rows = sides["holdout"][0].select(np.arange(4))
    found = judge("fresh_real", rows, scores(rows, sides["train"][0]))
    assert found[0].n["unseen_people"] == 8
    assert found[0].verdict == "pass"
    few = sides["holdout"][0].select(np.arange(5))
    found = judge("fresh_real", few, scores(few, sides["train"][0]))
    assert [f.verdict for f in found] == ["none"]
    assert f"needs {LEAST_PEOPLE}" in found[0].note


def test_rows_that_are_no_scan_say_nothing(judge, sides):
    rows = sides["fresh"][0]
    noisy = Pool("features", rows.data + np.float32(0.01), rows.person, views=rows.views)
    assert judge("noisy_copycat", noisy, scores(noisy, sides["train"][0])) == []


def test_nothing_of_a_person_is_in_the_findings(judge, sides):
    rows = sides["flipped"][0]
    text = str([f.to_json() for f in judge("flipped", rows, scores(rows, sides["train"][0]))])
    assert "train-" not in text
    assert "holdout-" not in text


def test_the_rule_by_hand():
    """Gap of Fisher's z and z itself beyond the prediction limit, and the gap of SSIM beyond everybody."""
    rng = np.random.default_rng(0)
    z = 0.9 + 0.1 * rng.standard_normal((20, 4))
    null = np.tanh(z)
    copy = np.tanh([[2.2, 1.8, 0.9, 0.8]])
    assert confirmed(copy, null, 50, 0.005)[0]
    assert not confirmed(np.tanh([[2.2, 1.8, 2.1, 1.7]]), null, 50, 0.005)[0]  # as near to the holdout
    assert not confirmed(np.tanh([[0.9, 1.8, -0.5, 0.8]]), null, 50, 0.005)[
        0
    ]  # far from the holdout, not near to training
    assert not confirmed(np.tanh([[2.2, 0.8, 0.9, 0.8]]), null, 50, 0.005)[0]  # correlated, but not in structure
    spread = np.std(z[:, 0] - z[:, 2], ddof=1)
    gap = np.mean(z[:, 0] - z[:, 2]) + 5.0 * spread  # a t value of 4.88 on 19 degrees of freedom: p = 5e-5
    edge = np.tanh([[0.9 + gap, 1.8, 0.9, 0.8]])
    edge[0, 0], edge[0, 2] = np.tanh(1.4 + gap / 2), np.tanh(1.4 - gap / 2)
    assert confirmed(edge, null, 50, 0.005)[0]
    assert not confirmed(edge, null, 500, 0.005)[0]  # the limit is shared over all rows


@pytest.mark.slow
def test_real_scans(real_data):
    """Hippocampus crops: copies of either kind are confirmed, scans of other people are not."""
    from engine.imaging.commands import read_folder
    from engine.imaging.config import DataConfig
    from engine.imaging.dataset import fit_volume

    folder = real_data / "imaging" / "hippocampus"
    if not folder.is_dir():
        pytest.skip("no hippocampus scans")
    volumes, persons = read_folder(folder)
    config = DataConfig.model_validate({"size": (32, 48, 32)})
    people = np.random.default_rng(0).permutation(np.unique(persons))
    parts = {"train": people[:40], "holdout": people[40:56], "fresh": people[56:64]}
    sides = {}
    for name, chosen in parts.items():
        scans = [fit_volume(v, config) for v, person in zip(volumes, persons) if person in chosen]
        sides[name] = scan_pool(scans, [p for p in persons if p in chosen]), scans
    for name in ("flipped", "rotated", "noised", "gamma"):
        copies = [transforms(volume)[name] for volume in sides["train"][1][:3]]
        sides[name] = scan_pool(copies, [f"{name}-{k}" for k in range(3)]), copies
    judge = confirmation_judge(sides)
    for name in ("fresh", "flipped", "rotated", "noised", "gamma"):
        rows = sides[name][0]
        found = judge(name, rows, scores(rows, sides["train"][0]))[0]
        assert found.value == (0 if name == "fresh" else 3), name
        assert found.floor == 0
