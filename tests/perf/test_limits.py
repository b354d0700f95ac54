import numpy as np
import pytest
from llvmlite import ir

from perf import limits

MASK = 0x5DEECE66D5DEECEF


@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_popcount_loop_does_all_its_work(lanes, steps):
    """Every chain counts for the result: were one folded away by the compiler, the limit would be too high."""
    loop = limits._register_loop(ir.VectorType(ir.IntType(64), lanes), 5, limits._and_popcount_add)
    whole = 0
    for k in range(5):
        value = 2 * k + 3
        for _ in range(steps):
            value += (value & MASK).bit_count()
        whole += value
    assert loop(steps) == whole


@pytest.mark.parametrize("steps", [1, 3])
def test_the_multiply_add_loop_does_all_its_work(steps):
    loop = limits._register_loop(ir.VectorType(ir.FloatType(), 8), 4, limits._multiply_add)
    values = np.array([3, 5, 7, 9], dtype=np.float32)
    for _ in range(steps):
        values = values * np.float32(0.5) + np.float32(1)
    assert loop(steps) == values.sum()


def test_rates_of_one_thread_and_of_two_side_by_side():
    kind = ir.VectorType(ir.IntType(64), 4)
    loop = limits._register_loop(kind, 4, limits._and_popcount_add)
    # a machine does between a tenth of a word and a hundred words in a nanosecond
    assert 1e8 < limits._best(1e5 * 16, lambda: loop(100_000)) < 1e11
    assert 1e8 < limits._best(1e5 * 16, lambda: loop(100_000), lambda: loop(100_000)) < 2e11


@pytest.mark.slow
def test_every_limit_is_measured():
    found = limits.limits(1)
    assert tuple(found) == limits.NAMES
    assert all(value is None or value > 1e8 for value in found.values())
    assert found["popcount_tile"] < 1.2 * found["popcount"], "the tile does not do more than registers allow"
    assert found["f64_gemm"] < found["f32_fma"]
