"""Exact search of features against sums of Python's own floats: three metrics, every product, hard values, tiles of any
size.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import Unsupported, UsageError
from engine.kernels import nearest
from engine.kernels.nearest import numba_exact, numba_features, products

sys.path.insert(0, str(Path(__file__).parent))
from nearest_cases import (
    EXCLUSIONS,
    FEATURE_KINDS,
    brute_range,
    brute_topk,
    exclusions,
    features,
    features_by_hand,
    same,
)

METRICS = ("l2", "cosine", "correlation")
PRODUCTS = (None, "int8", "bfloat16", "float32")


@pytest.fixture(scope="module")
def compiled():
    """Everything is compiled before np.empty is replaced, which Numba would not recognise."""
    table = features(11, 3, "normal", 0)
    for product in PRODUCTS:
        nearest.features_topk(table, table, 1, product=product)
        nearest.features_range(table, table, 1, product=product)
    nearest.features_cross(table, table)


@pytest.fixture
def poisoned(compiled, monkeypatch):
    """Memory from np.empty is full of ones, so that a cell that is never written is seen."""
    true_empty = np.empty

    def poisoned_empty(*args, **kwargs):
        array = true_empty(*args, **kwargs)
        array.view(np.uint8).reshape(-1)[:] = 0xA5
        return array

    monkeypatch.setattr(np, "empty", poisoned_empty)


@pytest.mark.usefixtures("unit")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", FEATURE_KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_search_is_that_of_the_definition(kind, metric):
    sizes = ((0, 3, 2), (3, 0, 2), (2, 3, 0), (1, 1, 1), (9, 65, 7), (13, 131, 33))
    for at, (n, m, axes) in enumerate(sizes):
        query, database = features(n, axes, kind, 1), features(m, axes, kind, 2)
        database[: min(n, m) // 2] = query[: min(n, m) // 2]
        distance = features_by_hand(query, database, metric)
        same(nearest.features_cross(query, database, metric=metric), distance)
        same(nearest.features_cross(query, database, metric=metric, implementation="reference"), distance)
        radius = np.quantile(distance, 0.2) if distance.size else 1.0
        for exclusion in EXCLUSIONS[at % 2 :: 2]:
            excluded = exclusions(exclusion, n, m)
            nearby, inside = brute_topk(distance, 7, **excluded), brute_range(distance, radius, distance, **excluded)
            for product in PRODUCTS:
                chosen = excluded | {"metric": metric, "product": product}
                same(nearest.features_topk(query, database, 7, **chosen), nearby)
                same(nearest.features_range(query, database, radius, **chosen), inside)
            chosen = excluded | {"metric": metric, "implementation": "reference"}
            same(nearest.features_topk(query, database, 7, **chosen), nearby)
            same(nearest.features_range(query, database, radius, **chosen), inside)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(FEATURE_KINDS),
    metric=st.sampled_from(METRICS),
    product=st.sampled_from(PRODUCTS),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 200), st.integers(1, 80)),
    k=st.integers(1, 12),
    seed=st.integers(0, 10**6),
)
def test_any_values(kind, metric, product, shape, k, seed):
    n, m, axes = shape
    query, database = features(n, axes, kind, seed), features(m, axes, kind, seed + 1)
    wanted = nearest.features_topk(query, database, k, metric=metric, implementation="reference")
    same(nearest.features_topk(query, database, k, metric=metric, product=product), wanted)


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("product", PRODUCTS[1:])
def test_more_values_than_are_multiplied_at_once_and_more_pairs_than_are_held(metric, product, monkeypatch):
    query, database = features(9, 9001, "normal", 1), features(70, 9001, "normal", 2)
    chosen = {"metric": metric, "product": product}
    wanted = nearest.features_topk(query, database, 3, metric=metric, implementation="reference")
    same(nearest.features_topk(query, database, 3, **chosen), wanted)
    query, database = features(9, 4, "ties", 1), features(3000, 4, "ties", 2)
    got = nearest.features_topk(query, database, 2, **chosen)
    same(got, nearest.features_topk(query, database, 2, metric=metric, implementation="reference"))


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("metric", METRICS)
def test_levels_of_int8_whose_sums_wrap_around(metric):
    """2**17 times 127 * 127 is above 2**31: such rows take a coarser scale."""
    query = np.ones((9, 2**17), dtype=np.float32) * np.where(np.arange(2**17) % 2, 1, -1).astype(np.float32)
    query[:, :9] = np.eye(9)
    database = np.concatenate([query, -query])
    chosen = {"metric": metric, "product": "int8"}
    distance, index = nearest.features_topk(query, database, 2, **chosen)
    same(index[:, 0], np.arange(9))
    same((distance, index), nearest.features_topk(query, database, 2, metric=metric, product="float32"))


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "float16"])
@pytest.mark.parametrize("metric", METRICS)
def test_raw_patches(dtype, metric):
    rng = np.random.default_rng(3)
    low, high = (0, 200) if dtype.startswith("uint") else (-100, 100)
    patches = rng.integers(low, high, (90, 5, 4, 6)).astype(dtype)
    patches[40:50] = patches[:10]
    flat = patches.reshape(90, -1).astype(np.float32)
    chosen = {"metric": metric, "exclude_self": True}
    wanted = nearest.features_topk(flat[:20], flat, 4, **chosen, implementation="reference")
    for product in PRODUCTS:
        same(nearest.features_topk(patches[:20], patches, 4, **chosen, product=product), wanted)
    same(nearest.features_cross(patches[:20], patches, metric=metric), features_by_hand(flat[:20], flat, metric))


def test_torch_tensors_of_the_cpu_are_searched_there():
    torch = pytest.importorskip("torch")
    rows = torch.from_numpy(features(70, 33, "normal", 1)).bfloat16()
    wanted = nearest.features_topk(*(x.float().numpy() for x in (rows[:20], rows)), 5, metric="cosine")
    same(nearest.features_topk(rows[:20], rows, 5, metric="cosine"), wanted)
    groups = torch.zeros(20, dtype=torch.int64), torch.arange(70)
    got = nearest.features_topk(rows[:20], rows, 5, metric="cosine", exclude=groups, implementation="numba")
    assert not (got[1] == 0).any()


class Rows:
    """The least that a set must offer; counts what is read at a time."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.most = array, array.shape, array.dtype, 0

    def __getitem__(self, part):
        taken = self.array[part]
        self.most = max(self.most, len(taken))
        return taken


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("metric", METRICS)
def test_no_set_need_fit_in_memory_and_tiles_change_nothing(metric, monkeypatch, tmp_path):
    query, database = features(200, 9, "ties", 1), features(700, 9, "ties", 2)
    excluded = exclusions("both", 200, 700)
    wanted = nearest.features_topk(query, database, 20, metric=metric, **excluded, implementation="reference")
    inside = nearest.features_range(query, database, 0.5, metric=metric, **excluded, implementation="reference")
    matrix = nearest.features_cross(query, database, metric=metric)
    stored = np.memmap(tmp_path / "d", dtype=np.float32, mode="w+", shape=database.shape)
    stored[:] = database
    for queries, rows in ((1, 1), (7 * 36, 65 * 36), (2**20, 2**13), (2**20, 2**20)):
        for module in (numba_features, numba_exact):
            monkeypatch.setattr(module, "_QUERY_BYTES", queries)
            monkeypatch.setattr(module, "_DATABASE_BYTES", rows)
        for product in PRODUCTS:
            chosen = excluded | {"metric": metric, "product": product}
            sets = Rows(query), Rows(stored)
            same(nearest.features_topk(*sets, 20, **chosen), wanted)
            same(nearest.features_range(*sets, 0.5, **chosen), inside)
            if rows == 1:
                assert (sets[0].most, sets[1].most) == (96, 128), "tiles of a job of queries; the centre takes 128 rows"
        same(nearest.features_cross(*sets, metric=metric), matrix)


def test_the_product_computes_no_far_row(monkeypatch):
    """Well-spread values: little more than the nearest of each part of the work is computed exactly."""
    computed = {}
    true_threads = numba_features.in_threads

    def counted(job, number):
        done = true_threads(job, number)
        computed["pairs"] = computed.get("pairs", 0) + sum(pairs for pairs, _ in done)
        return done

    monkeypatch.setattr(numba_features, "in_threads", counted)
    query, database = features(96, 128, "normal", 1), features(4000, 128, "normal", 2)
    for product, most in (("int8", 300), ("bfloat16", 120), ("float32", 110)):
        computed.clear()
        nearest.features_topk(query, database, 10, product=product)
        assert 20 * 96 <= computed["pairs"] <= most * 96, product


def test_a_product_that_proves_too_little_is_given_up(monkeypatch):
    """Rows in tight pairs far from each other: int8 cannot tell the rows of a pair apart, float32 can."""
    kinds = []
    true_coarse = numba_features._coarse
    monkeypatch.setattr(numba_features, "_coarse", lambda *given: kinds.append(given[2]) or true_coarse(*given))
    monkeypatch.setattr(numba_features, "_DATABASE_BYTES", 4 * 64 * 256)
    monkeypatch.setattr(products, "FASTER", ("int8", "bfloat16", "float32"))
    rng = np.random.default_rng(1)
    database = (rng.standard_normal(64) * [[1], [-1]])[rng.integers(0, 2, 2000)] + rng.standard_normal(
        (2000, 64)
    ) * 1e-4
    database = database.astype(np.float32)
    got = nearest.features_topk(database[:50], database, 5)
    assert kinds[0] == products.INT8
    assert kinds[-1] == products.FLOAT32
    same(got, nearest.features_topk(database[:50], database, 5, implementation="reference"))


def test_sums_are_taken_as_defined_where_rounding_leaves_them_open():
    """Sums of few terms of very different size: in another order they round to another float32."""
    rng = np.random.default_rng(2)
    steps = np.concatenate([np.float32(2.0**12) * np.ones(1), np.float32(2.0**-15) * rng.integers(1, 3, 4095)])
    rows = np.stack([rng.permutation(steps) for _ in range(200)]).astype(np.float32)
    zero = np.zeros((1, 4096), dtype=np.float32)
    same(nearest.features_cross(zero, rows), nearest.features_cross(zero, rows, implementation="reference"))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: nearest.l2_topk(x.astype(np.float64), x, 1), "type float32"),
        (lambda x: nearest.l2_topk(x[0], x, 1), "two axes or more"),
        (lambda x: nearest.l2_topk(x, x[:, :2], 1), "equal width"),
        (lambda x: nearest.l2_topk(np.full_like(x, np.nan), x, 1), "finite"),
        (lambda x: nearest.l2_topk(x, np.full_like(x, np.inf), 1), "finite"),
        (lambda x: nearest.l2_topk(x, np.full_like(x, 1e19), 1), "finite"),
        (lambda x: nearest.features_topk(x, np.full_like(x, np.nan), 1, metric="cosine"), "finite"),
        (lambda x: nearest.features_topk(x, np.full_like(x, np.nan), 1, implementation="reference"), "finite"),
        (lambda x: nearest.features_topk(x, x, 1, metric="l1"), "metric l2, cosine, correlation"),
        (lambda x: nearest.features_topk(x, x, 1, product="int4"), "product int8"),
        (lambda x: nearest.features_range(x, x, -1.0), "radius >= 0"),
    ],
)
def test_bad_input_is_one_line(call, says):
    with pytest.raises(UsageError, match=says) as caught:
        call(features(5, 4, "normal", 0))
    assert "\n" not in str(caught.value)


def test_large_values_are_no_matter_to_a_cosine():
    rows = features(70, 9, "normal", 1) * np.float32(1e37)
    wanted = nearest.features_topk(rows, rows, 5, metric="cosine", implementation="reference")
    same(nearest.features_topk(rows, rows, 5, metric="cosine"), wanted)


def test_devices_are_for_triton():
    table = features(5, 4, "normal", 0)
    with pytest.raises(Unsupported, match="devices"):
        nearest.features_topk(table, table, 1, devices=["cuda:0"], implementation="numba")
