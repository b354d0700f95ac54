"""Products on the matrix unit: the same integers as popcount, whether or not this processor has the unit."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest
from numba import types
from numba.extending import intrinsic

from engine.kernels import ld, nearest
from engine.kernels.bits import amx, tiles
from engine.kernels.ld import numba_tiles
from engine.kernels.ld.checks import Sites
from engine.kernels.nearest import numba_features
from engine.kernels.nearest.numba_exact import L2, side
from engine.kernels.nearest.products import COLUMNS, KINDS

sys.path.insert(0, str(Path(__file__).parent))
from child_python import run_python
from ld_panels import draw, every_sink_gives_the_reference, linked, pack, same

GUARD = 64


def scratch(rows, columns):
    """int8 that begins on a cache line, and the same with guards around it."""
    size = amx.STEP * amx.STRETCH * (rows + columns)
    whole = np.full(size + 2 * GUARD + 64, 77, dtype=np.int8)
    start = GUARD + (-(whole.ctypes.data + GUARD) % 64)
    return whole[start : start + size], whole, start


def draw_values(rows, people, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(-1, 2, (rows, people)).astype(np.int8)
    minus = (values < 0) | ((values == 0) & (rng.random(values.shape) < 0.5))  # not read where the value is 0
    return values, tiles.interleaved(pack(values != 0)), tiles.interleaved(pack(minus))


implementations = [amx._dot_tiles_counted] + [amx._dot_tiles_multiplied] * amx.granted()


@pytest.mark.parametrize("dot_tiles", implementations)
@pytest.mark.parametrize("people", [1, 63, 64, 65, 448, 511, 512, 513, 1500])
@pytest.mark.parametrize("shape", [(1, 1, 0, 0), (3, 5, 1, 2), (8, 16, 2, 4)])
def test_sums_of_products(dot_tiles, people, shape):
    rows, columns, i0, j0 = shape
    a, a_some, a_minus = draw_values((i0 + rows) * 32 - 3, people, 1)
    b, b_some, b_minus = draw_values((j0 + columns) * 32 - 5, people, 2)
    reach = np.sort(np.random.default_rng(3).integers(0, j0 + columns + 3, (rows, 2)), axis=1)
    reach[0] = 0, j0 + columns + 7
    values, whole, start = scratch(rows, columns)
    sums = np.full((rows, columns + 1, 1024), -12345, dtype=np.int32)
    dot_tiles(a_some, a_minus, i0, b_some, b_minus, j0, j0 + columns, reach, values, sums)
    wanted = np.zeros(((i0 + rows) * 32, (j0 + columns) * 32), dtype=np.int32)
    wanted[: len(a), : len(b)] = a.astype(np.int32) @ b.T.astype(np.int32)
    asked = 0
    for i in range(rows):
        for j in range(max(j0, reach[i, 0]), min(j0 + columns, reach[i, 1])):
            block = wanted[(i0 + i) * 32 : (i0 + i + 1) * 32, j * 32 : (j + 1) * 32]
            same(sums[i, j - j0].reshape(32, 32), block)
            asked += 1
    assert asked >= columns
    assert (sums[:, columns] == -12345).all()
    assert (whole[:start] == 77).all()
    assert (whole[start + len(values) :] == 77).all()


@pytest.mark.parametrize("dot_tiles", implementations)
def test_nobody(dot_tiles):
    nothing = np.empty((1, 0, 32), dtype=np.uint64)
    sums = np.full((1, 1, 1024), 7, dtype=np.int32)
    dot_tiles(nothing, nothing, 0, nothing, nothing, 0, 1, np.array([[0, 1]]), scratch(1, 1)[0], sums)
    assert not sums.any()


PEOPLE = 300


def test_it_is_taken_from_some_number_of_people_on(unit):
    for people, wanted in ((255, False), (256, unit)):
        bits = draw(40, 2 * people)[1]
        planes, _ = numba_tiles.blocks(Sites(bits, 2 * people, None, True))
        assert (planes.way == numba_tiles.MULTIPLIED) == wanted
    assert numba_tiles.blocks(Sites(bits, 2 * people, None, False))[0].way != numba_tiles.MULTIPLIED
    missing = np.zeros_like(bits)
    missing[3, 0] = 1
    assert numba_tiles.blocks(Sites(bits, 2 * people, missing, True))[0].way == numba_tiles.COUNTED


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sites", [1, 33, 255, 257, 530, 1100])
def test_every_sink_gives_the_reference(threads, sites):
    n = 2 * PEOPLE
    every_sink_gives_the_reference(linked(sites, n, seed=sites), linked(77, n, seed=5), n, True, threads)


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(1, 2, 1), (16, 64, 63), (17, 65, 64), (33, 300, 65), (96, 257, 513), (97, 130, 1030)]
)
def test_products_of_features_are_those_of_vectors(kind, shape):
    if not amx.granted():
        pytest.skip("no matrix unit in this processor, or not for this process")
    n, m, axes = shape
    rng = np.random.default_rng(n)
    rows = [side(rng.standard_normal((count, axes)).astype(np.float32), L2) for count in (n, m)]
    geometry = numba_features._geometry("l2", rows[0], rows[1].rows_nd)
    found = []
    for granted in (amx.granted, lambda: False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(amx, "granted", granted)
            query, database = (
                numba_features._coarse(one, geometry, KINDS[kind], of_query)
                for one, of_query in zip(rows, (True, False))
            )
        assert query.for_unit == database.for_unit == (granted is amx.granted)
        first = n // 96 * 96 if n % 96 else n - 96
        panels, parts = -(-m // COLUMNS), []
        for j in range(0, panels, 3):
            out = np.full((96, min(3, panels - j) * COLUMNS), 12345, dtype=np.int32)
            numba_features._products(KINDS[kind], query, database, first, n, j, min(panels, j + 3), out.reshape(-1))
            parts.append(out[: n - first])
        found.append(np.concatenate(parts, axis=1)[:, :m])
    assert found[0].any()
    if kind == "int8":
        same(found[0], found[1])
    else:
        np.testing.assert_allclose(
            found[0].view(np.float32), found[1].view(np.float32), rtol=1e-4, atol=1e-5 * axes**0.5
        )


def test_other_users_of_the_unit_are_not_disturbed():
    """PyTorch multiplies int8 and bfloat16 on the same registers, in this thread."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.integers(-9, 9, (64, 64)).astype(np.int8)) for _ in range(2))
    real = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole, product = torch._int_mm(a, b), real.float() @ real.float()
    bits = linked(100, 2 * PEOPLE)
    wanted = ld.r2(bits, 2 * PEOPLE, unphased=True, implementation="reference")
    for _ in range(3):
        same(ld.r2(bits, 2 * PEOPLE, unphased=True), wanted)
        assert torch.equal(torch._int_mm(a, b), whole)
        torch.testing.assert_close((real @ real).float(), product, rtol=2e-2, atol=0.2)


@intrinsic
def _shapes(typingctx, out):
    """The 64 bytes that say how the registers are shaped; zeros where nobody holds them."""

    def codegen(context, builder, signature, args):
        place = amx._data(context, builder, signature.args[0], args[0], amx._INDEX(0))
        amx._call(builder, "sttilecfg", [amx._ADDRESS], [place])
        return context.get_dummy_value()

    return types.void(out), codegen


@pytest.mark.skipif(not amx.granted(), reason="no matrix unit in this processor, or not for this process")
def test_the_unit_is_given_back():
    @numba.njit
    def read(out):
        _shapes(out)

    @numba.njit
    def take():
        amx.take_unit(amx.SHAPE)

    shapes, before = np.zeros(64, dtype=np.uint8), numba.get_num_threads()
    read(shapes)
    numba.set_num_threads(1)  # in this thread
    try:
        ld.r2(linked(100, 2 * PEOPLE), 2 * PEOPLE, unphased=True)
        read(shapes)
        assert not shapes.any()
        rows = np.random.default_rng(0).standard_normal((50, 20)).astype(np.float32)
        nearest.features_topk(rows, rows, 1, product="int8")
        read(shapes)
        assert not shapes.any()
        take()
        read(shapes)
        assert shapes.any(), "or nothing is read at all"
    finally:
        numba.set_num_threads(before)
        ld.r2(linked(100, 2 * PEOPLE), 2 * PEOPLE, unphased=True)


def test_without_the_unit_or_without_leave(monkeypatch):
    code = "from engine.kernels.bits import amx; print(amx.COMPILED, amx.granted(), amx.dot_tiles is amx._dot_tiles_counted)"
    hidden = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}
    assert run_python(code, **hidden) == "False False True"
    refused = SimpleNamespace(syscall=lambda *_: -1)
    monkeypatch.setattr(amx.ctypes, "CDLL", lambda *_, **__: refused)
    assert not amx.granted.__wrapped__()
