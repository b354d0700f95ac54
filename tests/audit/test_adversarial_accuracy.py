"""AATS against its definition written out, for bits and for features."""

from __future__ import annotations

import numpy as np
import pytest

from engine.audit import Pool, aats, privacy_loss
from engine.audit.pools import topk


def features(rows, tag="p"):
    return Pool("features", np.asarray(rows, np.float32), np.array([f"{tag}{i}" for i in range(len(rows))]))


def bits(alleles, tag="p"):
    packed = np.packbits(alleles.astype(np.uint8), axis=1, bitorder="little")
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8)))
    person = np.array([f"{tag}{i}" for i in range(len(alleles))])
    return Pool("bits", packed.view(np.uint64), person, length=alleles.shape[1])


def by_definition(distance_ts, distance_tt, distance_ss):
    tt, ss = (
        distance_tt + np.diag(np.full(len(distance_tt), np.inf)),
        distance_ss + np.diag(np.full(len(distance_ss), np.inf)),
    )
    real = (distance_ts.min(1) > tt.min(1)).mean()
    synthetic = (distance_ts.min(0) > ss.min(1)).mean()
    return (real + synthetic) / 2


def test_features_follow_the_definition():
    rng = np.random.default_rng(0)
    t, s = rng.standard_normal((70, 5)), rng.standard_normal((70, 5)) * 0.8
    d = lambda a, b: np.linalg.norm(a[:, None] - b[None], axis=2)  # noqa: E731
    found = aats(features(t, "t"), features(s, "s"))
    assert found.value == pytest.approx(by_definition(d(t, s), d(t, t), d(s, s)))
    assert found.n == 70
    assert found.interval[0] < found.value < found.interval[1]


def test_bits_follow_the_definition_with_ties():
    rng = np.random.default_rng(1)
    t, s = rng.integers(0, 2, (60, 21)), rng.integers(0, 2, (60, 21))  # few sites: many equal distances, so `>` matters
    d = lambda a, b: (a[:, None] != b[None]).sum(2).astype(float)  # noqa: E731
    assert aats(bits(t, "t"), bits(s, "s")).value == pytest.approx(by_definition(d(t, s), d(t, t), d(s, s)))


def test_copies_give_zero_and_strangers_one():
    t = np.random.default_rng(2).standard_normal((50, 4))
    assert aats(features(t, "t"), features(t, "s")).value == 0.0
    assert aats(features(t, "t"), features(t + 100, "s")).value == 1.0


def test_unequal_sides_are_cut_to_equal_n():
    rng = np.random.default_rng(3)
    found = aats(features(rng.standard_normal((200, 4)), "t"), features(rng.standard_normal((60, 4)), "s"))
    assert found.n == 60


def test_sign_of_the_privacy_loss():
    """Positive where the synthetic rows lie near training, about zero where they do not."""
    rng = np.random.default_rng(4)
    draw = lambda: rng.standard_normal((150, 6))  # noqa: E731
    train, holdout = draw(), draw()
    near = train + 0.05 * draw()
    test, same, loss = privacy_loss(features(train, "t"), features(holdout, "h"), features(near, "s"))
    assert loss.value == pytest.approx(test.value - same.value)
    assert loss.value > 0.3
    assert loss.interval[0] > 0.2
    fresh = privacy_loss(features(train, "t"), features(holdout, "h"), features(draw(), "s"))[2]
    assert fresh.interval[0] < 0 < fresh.interval[1]


def test_jackknife_interval_covers():
    """The interval of two draws of one population holds 0.5 nearly as often as it says."""
    rng = np.random.default_rng(5)
    covered = 0
    for i in range(60):
        found = aats(features(rng.standard_normal((120, 4)), "t"), features(rng.standard_normal((120, 4)), "s"), seed=i)
        covered += found.interval[0] <= 0.5 <= found.interval[1]
    assert covered >= 50


def test_a_copy_has_distance_exactly_zero():
    """The float32 search cannot tell a copy from a very near row; the distances found are exact."""
    rows = np.random.default_rng(6).standard_normal((40, 64)).astype(np.float32) + 30
    distance, index = topk(features(rows), features(rows[::-1].copy()), 2)
    assert (distance[:, 0] == 0).all()
    assert (index[:, 0] == np.arange(40)[::-1]).all()
    assert (distance[:, 1] > 0).all()


def test_second_visits_do_not_read_as_leakage() -> None:
    """Two near-equal visits of everybody; the training side is larger, so that a draw from it splits more pairs."""
    rng = np.random.default_rng(3)

    def visits(people: int, name: str) -> Pool:
        first = rng.standard_normal((people, 6))
        rows = np.repeat(first, 2, axis=0) + 0.01 * rng.standard_normal((2 * people, 6))
        return Pool("features", rows.astype(np.float32), np.repeat([f"{name}{i}" for i in range(people)], 2))

    test, same, loss = privacy_loss(visits(300, "t"), visits(60, "h"), visits(60, "s"))
    assert abs(test.value - 0.5) < 0.12
    assert abs(same.value - 0.5) < 0.12
    assert abs(loss.value) < 0.1
