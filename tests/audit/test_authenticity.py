"""Authenticity, C_T and PRDC against hand-computed cases, brute force from their papers, and what they must say of copies."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from engine.audit import AuditPolicy, Pool
from engine.audit.authenticity import PRDC, authentic_rows, copying_test, fidelity, prdc_rows, rank_sum_z

POLICY = AuditPolicy()


def pool(rows, tag="p", **more):
    person = more.pop("person", np.array([f"{tag}{i}" for i in range(len(rows))]))
    return Pool("features", np.asarray(rows, np.float32), person, **more)


def packed(rows, tag="p", **more):
    data = np.packbits(np.asarray(rows, np.uint8), axis=1, bitorder="little")
    data = np.ascontiguousarray(np.pad(data, ((0, 0), (0, -data.shape[1] % 8)))).view(np.uint64)
    person = more.pop("person", np.array([f"{tag}{i}" for i in range(len(rows))]))
    return Pool("bits", data, person, length=np.asarray(rows).shape[1], **more)


def test_authenticity_by_hand():
    """Training at 0, 1, 10, 14: the next training row of each lies 1, 1, 4, 4 away (of 10 it is 14)."""
    train = pool([[0], [1], [10], [14]], "t")
    tested = pool([[0.5], [3.0], [12.5], [20.0], [10.0]], "s")
    # nearest training row of each: 0 or 1 at 0.5 < 1; 1 at 2 > 1; 14 at 1.5 < 4; 14 at 6 > 4; 10 at 0 < 4
    assert authentic_rows(train, tested).tolist() == [False, True, False, True, False]


def test_authenticity_is_indexed_by_training_rows():
    """More synthetic than training rows: indexing training distances by synthetic rows would run over the end, or mix them."""
    rng = np.random.default_rng(0)
    real, made = rng.standard_normal((40, 5)).astype(np.float32), rng.standard_normal((90, 5)).astype(np.float32)
    between = np.linalg.norm(made[:, None].astype(float) - real[None], axis=2)
    within = np.linalg.norm(real[:, None].astype(float) - real[None], axis=2) + np.diag(np.full(40, np.inf))
    nearest = between.argmin(axis=1)
    expected = within.min(axis=1)[nearest] < between.min(axis=1)
    assert 0.1 < expected.mean() < 0.9
    assert authentic_rows(pool(real, "t"), pool(made, "s")).tolist() == expected.tolist()


def test_a_second_visit_is_not_the_next_person():
    train = pool([[0], [0.01], [5], [5.01]], person=np.array(["a", "a", "b", "b"]))
    assert authentic_rows(train, pool([[1.0]])).tolist() == [False]  # 1 away from a; the next person is 5 away
    assert authentic_rows(pool([[0], [0.01], [5], [5.01]], "t"), pool([[1.0]])).tolist() == [True]


def test_prdc_by_hand():
    """One dimension, k = 1: radii of real 0, 1, 5 are 1, 1, 4; of fake 0.5, 2, 20 are 1.5, 1.5, 18."""
    found = prdc_rows(pool([[0], [1], [5]], "r"), pool([[0.5], [2], [20]], "f"), 1)
    assert found["precision"].tolist() == [
        1,
        1,
        0,
    ]  # 0.5 within 1 of 0; 2 within 4 of 5 (not of 1: strictly 1 < 1 fails)
    assert found["density"].tolist() == [2, 1, 0]
    assert found["recall"].tolist() == [1, 1, 1]  # 0 and 1 within 1.5 of 0.5; 5 within 18 of 20
    assert found["coverage"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["features", "bits"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_prdc_is_its_definition(kind, k):
    """Loops over the formulas of Naeem et al. 2020, section 3."""
    rng = np.random.default_rng(k)
    if kind == "features":
        x, y = rng.standard_normal((30, 3)), 0.7 * rng.standard_normal((24, 3)) + 0.2
        real, fake = pool(x, "r"), pool(y, "f")
        distance = lambda a, b: float(np.linalg.norm(np.float32(a).astype(float) - np.float32(b).astype(float)))  # noqa: E731
    else:
        x, y = rng.integers(0, 2, (30, 70)), rng.integers(0, 2, (24, 70))
        real, fake = packed(x, "r"), packed(y, "f")
        distance = lambda a, b: float((a != b).sum())  # noqa: E731
    radius = lambda rows, i: sorted(distance(rows[i], row) for j, row in enumerate(rows) if j != i)[k - 1]  # noqa: E731
    radius_x, radius_y = [radius(x, i) for i in range(len(x))], [radius(y, j) for j in range(len(y))]
    inside = np.array([[distance(a, b) < radius_x[i] for b in y] for i, a in enumerate(x)])
    found = prdc_rows(real, fake, k)
    assert found["precision"].mean() == inside.any(axis=0).mean()
    assert found["density"].mean() == pytest.approx(inside.sum() / (k * len(y)))
    assert found["coverage"].mean() == inside.any(axis=1).mean()
    assert found["recall"].mean() == np.mean([any(distance(a, b) < radius_y[j] for j, b in enumerate(y)) for a in x])


def test_prdc_agrees_with_its_authors():
    prdc = pytest.importorskip("prdc", reason="the authors' implementation is not installed")
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((200, 8)).astype(np.float32), 0.8 * rng.standard_normal((170, 8)).astype(np.float32)
    theirs = prdc.compute_prdc(real_features=x, fake_features=y, nearest_k=5)
    ours = {name: value.mean() for name, value in prdc_rows(pool(x, "r"), pool(y, "f"), 5).items()}
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_rank_sum_is_that_of_scipy_with_ties():
    rng = np.random.default_rng(4)
    x, y = rng.integers(0, 6, 30), rng.integers(1, 7, 45)
    theirs = stats.mannwhitneyu(x, y, alternative="two-sided", method="asymptotic", use_continuity=False)
    assert rank_sum_z(x, y) == pytest.approx(
        theirs.zscore if hasattr(theirs, "zscore") else -stats.norm.isf(theirs.pvalue / 2)
    )
    assert rank_sum_z(x, y) < 0
    assert rank_sum_z(np.ones(12), np.ones(15)) == 0


def test_c_t_weights_cells_by_unseen_rows_and_leaves_small_cells_out():
    rng = np.random.default_rng(5)
    made, test = rng.random(60), rng.random(80) + 0.2
    cell_made, cell_test = np.repeat([0, 1, 2], [30, 25, 5]), np.repeat([0, 1, 2], [20, 50, 10])
    z = [rank_sum_z(made[cell_made == c], test[cell_test == c]) for c in (0, 1)]
    assert copying_test(made, cell_made, test, cell_test) == (pytest.approx((20 * z[0] + 50 * z[1]) / 70), 2)
    value, used = copying_test(made[:3], cell_made[:3], test, cell_test)
    assert np.isnan(value)
    assert used == 0


def population(rng, n):
    return np.concatenate([rng.standard_normal((n // 2, 6)), rng.standard_normal((n - n // 2, 6)) * 0.5 + 4])


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_fresh_rows_lie_at_the_floor_and_copies_do_not():
    rng = np.random.default_rng(6)
    train, holdout, fresh = (pool(population(rng, n), tag) for n, tag in ((600, "t"), (300, "h"), (300, "s")))
    found, figure = fidelity(train, holdout, fresh, policy=POLICY, seed=1)
    honest = by_name(found)
    assert list(honest) == ["authenticity", "c_t", *PRDC]
    assert all(f.verdict == "none" for f in found)  # none of it is a gate
    for name in ("authenticity", *PRDC):
        low, high = honest[name].interval
        assert low <= honest[name].value <= high
        assert honest[name].value == pytest.approx(honest[name].floor, abs=0.12), name
    assert abs(honest["c_t"].value) < 3
    assert honest["c_t"].detail["cells"] >= 2
    assert figure["names"] == list(PRDC)
    assert figure["rows"] == 300

    copies = pool(train.data[rng.permutation(600)[:300]] + 0.01 * rng.standard_normal((300, 6)), "s")
    copied = by_name(fidelity(train, holdout, copies, policy=POLICY, seed=1)[0])
    assert copied["authenticity"].value < 0.02 < 0.3 < copied["authenticity"].floor
    assert copied["c_t"].value < -3
    assert copied["c_t"].interval[1] < -3
    assert copied["precision"].value > copied["precision"].floor + 0.05

    collapsed = pool(train.data[:1] + 0.3 * rng.standard_normal((300, 6)), "s")
    lost = by_name(fidelity(train, holdout, collapsed, policy=POLICY, seed=1)[0])
    assert lost["coverage"].value < 0.4 < lost["coverage"].floor


def test_groups_are_told_apart_and_small_ones_are_not_spoken_of():
    rng = np.random.default_rng(7)
    part = lambda n: np.array(["north"] * (n // 2) + ["south"] * (n - n // 2))  # noqa: E731
    sides = [pool(population(rng, n), tag, group=part(n)) for n, tag in ((400, "t"), (200, "h"))]
    rows, group = population(rng, 200), part(200)
    rows[100:] = sides[0].data[200:300]  # the south is copied
    group[:4] = "islands"
    found = by_name(fidelity(*sides, pool(rows, "s", group=group), policy=POLICY)[0])
    groups = found["authenticity"].detail["by_group"]
    assert set(groups) == {"north", "south"}
    assert groups["south"]["value"] == 0 < 0.3 < groups["north"]["value"]
    assert groups["south"]["floor"] > 0.3
    assert groups["north"]["n"] == 96
    assert found["c_t"].detail["by_group"]["south"]["value"] < -3


def test_small_sets_are_not_given():
    rng = np.random.default_rng(8)
    found = by_name(
        fidelity(*(pool(rng.random((n, 2)), tag) for n, tag in ((30, "t"), (20, "h"), (5, "s"))), policy=POLICY)[0]
    )
    assert np.isnan(found["precision"].value)
    assert "not given" in found["c_t"].note
    assert np.isfinite(found["authenticity"].value)
