"""Averaging by hand, and sites that are late, broken or say more than was agreed."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import EngineError, InputError
from engine.training.federated import checked, fault, outgoing, total, weighted_mean

DECLARED = {"w": (2, 3), "b": (3,)}


def state(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in DECLARED.items()}


def test_fedavg_is_the_weighted_mean_computed_by_hand() -> None:
    a, b, c = state(1), state(2), state(3)
    made = weighted_mean({"a": a, "b": b, "c": c}, {"a": 10, "b": 30, "c": 2}, DECLARED)
    for name in DECLARED:
        by_hand = (10.0 * a[name].astype(float) + 30.0 * b[name].astype(float) + 2.0 * c[name].astype(float)) / 42.0
        np.testing.assert_allclose(made.tensors[name], by_hand, rtol=1e-6)
        assert made.tensors[name].dtype == np.float32
    assert (made.used, made.refused) == (["a", "b", "c"], {})
    # in numbers anyone can check: (1 x 1 + 3 x 5) / 4 = 4
    one = weighted_mean({"a": {"x": np.float32([1])}, "b": {"x": np.float32([5])}}, {"a": 1, "b": 3}, {"x": (1,)})
    assert one.tensors["x"].tolist() == [4.0]


def nan(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors["w"][1, 1] = np.nan
    return tensors


BROKEN = {
    "killed": (lambda s: None, "no reply"),
    "not a number": (nan, "'w' is not finite"),
    "infinite": (lambda s: {**s, "b": s["b"] + np.inf}, "'b' is not finite"),
    "another shape": (lambda s: {**s, "w": s["w"].T.copy()}, "of shape (3, 2) in place of (2, 3)"),
    "broadcastable": (lambda s: {**s, "b": s["b"][:1]}, "of shape (1,)"),
    "a scalar": (lambda s: {**s, "b": np.float32(3)}, "no array"),
    "an array of words": (lambda s: {**s, "b": np.array(["x", "y", "z"])}, "no array of float"),
    "one missing": (lambda s: {"w": s["w"]}, "1 declared arrays missing, 0 others"),
    "one more": (lambda s: {**s, "patients": np.ones(3, np.float32)}, "0 declared arrays missing, 1 others"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_site_does_no_harm(what: str) -> None:
    spoil, reason = BROKEN[what]
    good = {"a": state(1), "b": state(2)}
    weights = {"a": 4.0, "b": 6.0, "c": 90.0}
    without = weighted_mean(good, weights, DECLARED)
    beside = weighted_mean({**good, "c": spoil(state(3))}, weights, DECLARED)
    assert all(np.array_equal(beside.tensors[name], without.tensors[name]) for name in DECLARED)
    assert beside.used == ["a", "b"]
    assert reason in beside.refused["c"]
    summed = total(
        {**{k: {n: v.astype(float) for n, v in s.items()} for k, s in good.items()}, "c": spoil(state(3))}, DECLARED
    )
    np.testing.assert_allclose(summed.tensors["w"], good["a"]["w"].astype(float) + good["b"]["w"])
    with pytest.raises(EngineError, match="at least 3 sites"):
        weighted_mean({**good, "c": spoil(state(3))}, weights, DECLARED, least_sites=3)


@pytest.mark.parametrize("weight", [0.0, -5.0, float("nan"), float("inf"), None])
def test_a_weight_that_is_none_counts_as_none(weight: float | None) -> None:
    weights = {"a": 4.0, **({} if weight is None else {"b": weight})}
    made = weighted_mean({"a": state(1), "b": state(2)}, weights, DECLARED)
    assert (made.used, made.refused) == (["a"], {"b": "no weight"})


def test_a_state_far_from_the_others_can_be_left_out() -> None:
    start = state(0)
    near = {name: {k: start[k] + 0.01 * v for k, v in state(n).items()} for n, name in enumerate("abc", start=1)}
    far = {k: start[k] + 1e6 * v for k, v in state(9).items()}
    weights = dict.fromkeys("abcd", 1.0)
    made = weighted_mean({**near, "d": far}, weights, DECLARED, farthest=10.0, start=start)
    assert made.used == ["a", "b", "c"]
    assert "times the median distance" in made.refused["d"]
    assert weighted_mean({**near, "d": far}, weights, DECLARED).used == ["a", "b", "c", "d"]


def test_no_site_at_all_is_an_error_with_the_reasons() -> None:
    with pytest.raises(EngineError, match=r"0: a \(no reply\)"):
        weighted_mean({"a": None}, {"a": 1.0}, DECLARED)
    with pytest.raises(EngineError, match="nobody"):
        total({}, DECLARED)


def test_only_what_was_declared_leaves() -> None:
    held = state(1)
    leaving = outgoing(held, DECLARED)
    assert leaving.keys() == DECLARED.keys()
    assert all(leaving[name].base is None for name in leaving), "no buffer behind a view goes along"
    # a view of a larger array of people's data must not carry that array
    people = np.arange(1000, dtype=np.float32)
    view = outgoing({"w": held["w"], "b": people[5:8]}, DECLARED)["b"]
    assert (view.base, view.nbytes) == (None, 12)
    with pytest.raises(InputError, match="1 others"):
        outgoing({**held, "scans": np.ones((4, 4), np.float32)}, DECLARED)
    with pytest.raises(InputError, match="not finite"):
        checked(nan(state(1)), DECLARED, "here")
    assert fault(held, DECLARED) == ""
