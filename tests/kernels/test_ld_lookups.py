"""Tiles by lookups: the same integers as by popcount, on processors that have a byte shuffle."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.kernels import ld
from engine.kernels.bits import amx, lookups, tile_lookups, tiles
from engine.kernels.ld import numba_tiles
from engine.kernels.ld.checks import Sites

sys.path.insert(0, str(Path(__file__).parent))
from child_python import run_python
from ld_panels import draw, every_sink_gives_the_reference, linked, pack, same, unpack

needs_lookups = pytest.mark.skipif(not lookups.AVAILABLE, reason="no AVX2")


@pytest.fixture
def looked_up(monkeypatch):
    """As on a processor without a vector popcount and without a matrix unit, however few words there are."""
    monkeypatch.setattr(tile_lookups, "_LISTED_FROM", 1)
    monkeypatch.setattr(tile_lookups, "WIDE", False)
    monkeypatch.setattr(amx, "granted", lambda: False)


def way(bits, n, missing=None, unphased=False):
    return numba_tiles.blocks(Sites(bits, n, missing, unphased))[0].way


@needs_lookups
def test_when_tiles_are_looked_up(looked_up, monkeypatch):
    bits = draw(40, 130)[1]
    assert way(bits, 130) == way(bits, 130, unphased=True) == numba_tiles.LOOKED_UP
    missing = np.zeros_like(bits)
    assert way(bits, 130, missing) == numba_tiles.LOOKED_UP  # nothing is missing
    missing[3, 0] = 1
    assert way(bits, 130, missing) == way(bits, 130, missing, True) == numba_tiles.COUNTED
    wide = np.zeros((2, tile_lookups._LISTED_TO + 1), dtype=np.uint64)
    assert way(wide, 64 * wide.shape[1]) == numba_tiles.COUNTED
    assert way(wide[:, 1:].copy(), 64 * (wide.shape[1] - 1)) == numba_tiles.LOOKED_UP
    monkeypatch.setattr(tile_lookups, "_LISTED_FROM", 4)
    assert way(bits, 130) == numba_tiles.COUNTED  # three words
    assert way(wide[:, :4].copy(), 256) == numba_tiles.LOOKED_UP
    monkeypatch.setattr(tile_lookups, "_LISTED_FROM", 1)
    monkeypatch.setattr(tile_lookups, "WIDE", True)
    assert way(bits, 130) == numba_tiles.COUNTED
    monkeypatch.setattr(tile_lookups, "WIDE", False)
    monkeypatch.setattr(lookups, "AVAILABLE", False)
    assert way(bits, 130) == numba_tiles.COUNTED


@needs_lookups
@pytest.mark.usefixtures("looked_up")
@pytest.mark.parametrize("unphased", [False, True])
@pytest.mark.parametrize("sites", [1, 33, 257, 1100])
def test_every_sink_gives_the_reference(sites, unphased):
    n = 602
    every_sink_gives_the_reference(linked(sites, n, seed=sites), linked(177, n, seed=5), n, unphased, 1 + sites % 2)


def everything(rows, n):
    """Alleles that are rare, common, the rule, of all and of nobody, at random."""
    rng = np.random.default_rng(n)
    share = rng.choice([0.0, 0.01, 0.3, 0.5, 0.7, 0.99, 1.0], (rows, 1))
    return (rng.random((rows, n)) < share).astype(np.uint8)


@needs_lookups
@pytest.mark.usefixtures("looked_up")
@pytest.mark.parametrize("unphased", [False, True])
@pytest.mark.parametrize("n", [2, 62, 64, 66, 6_142, 6_144, 6_146, 12_400, 18_600])
def test_sums_of_a_strip(n, unphased):
    """As many words as are looked up at once, fewer, one more, and several times as many; strips and columns from the middle
    on, and what each row of blocks asks for begins and ends where it likes."""
    alleles, others = everything(9 * 32 - 5, n), everything(11 * 32 - 7, n + 1)[:, :n]
    a, b = numba_tiles.blocks(Sites(pack(alleles), n, None, unphased), Sites(pack(others), n, None, unphased))
    assert a.way == b.way == numba_tiles.LOOKED_UP
    if unphased:
        alleles, others = (x.reshape(len(x), -1, 2).sum(axis=2).astype(np.int64) - 1 for x in (alleles, others))
    wanted = np.zeros((9 * 32, 11 * 32), dtype=np.int64)
    wanted[: len(alleles), : len(others)] = alleles.astype(np.int64) @ others.astype(np.int64).T
    room = numba_tiles.scratch(a)
    asked = set()
    for i0, rows in ((0, 8), (1, 8), (8, 1)):
        for j0, last in ((0, 11), (2, 6), (5, 6), (4, 11)):
            reach = np.sort(np.random.default_rng(j0 + i0).integers(0, 12, (rows, 2)), axis=1)
            reach[rows // 2] = 0, 11
            reach[-1, 1] = last
            room.sums[:] = -12345
            numba_tiles.look_ahead(a, i0, b, j0, reach, room)
            for i in range(rows):
                for j in range(11):
                    if max(j0, reach[i, 0]) <= j < min(last, reach[i, 1]):
                        size = min(32, len(alleles) - 32 * (i0 + i)), min(32, len(others) - 32 * j)
                        got = room.sums[i, j - j0].reshape(32, 32)[: size[0], : size[1]]
                        corner = wanted[32 * (i0 + i) :, 32 * j :][: size[0], : size[1]]
                        same(got.astype(np.int64), corner)
                        asked.add((i0, i, j))
    assert len(asked) > 60
    assert room.sums[0, 15, 0] == -12345


@needs_lookups
@pytest.mark.usefixtures("looked_up")
def test_what_is_asked_for_twice_and_from_another_strip():
    """Lists of a strip are kept from one look ahead to the next, and made anew for another strip."""
    n = 700
    alleles = everything(520, n)
    a, _ = numba_tiles.blocks(Sites(pack(alleles), n, None, False))
    wanted, room = alleles.astype(np.int64) @ alleles.astype(np.int64).T, numba_tiles.scratch(a)
    for i0, j0 in ((0, 0), (0, 4), (8, 0), (8, 8), (0, 8)):
        reach = np.array([[0, 17]] * 8)
        numba_tiles.look_ahead(a, i0, a, j0, reach, room)
        for i in range(8):
            cell = room.sums[i, 3].reshape(32, 32).astype(np.int64)
            same(cell, wanted[32 * (i0 + i) :, 32 * (j0 + 3) :][:32, :32])


@needs_lookups
@pytest.mark.usefixtures("looked_up")
@pytest.mark.parametrize("unphased", [False, True])
def test_bits_beyond_the_last_haplotype_do_not_count(unphased):
    n = 70
    bits = draw(50, n)[1]
    dirty = bits.copy()
    dirty[:, -1] |= np.uint64((1 << 64) - (1 << (n - 64)))
    assert not np.array_equal(unpack(dirty, 128), unpack(bits, 128))
    same(ld.matrix(dirty, n, unphased=unphased), ld.matrix(bits, n, unphased=unphased))
    assert way(dirty, n, None, unphased) == numba_tiles.LOOKED_UP


@needs_lookups
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_columns_from_blocks(blocks):
    """As from rows; what is beyond keeps what it had."""
    bits = pack(everything(6 * 32, 450))
    packed, words = tiles.interleaved(bits), bits.shape[1]
    made, wanted, part = lookups.new_columns(3, words)
    made[:], wanted[:], part[:] = 255, 255, 255
    lookups.fill_columns(bits, np.arange(32, 32 * (1 + blocks)), wanted)
    lookups.fill_blocks(packed, 1, blocks, 0, words, made)
    same(made, wanted)
    lookups.fill_blocks(packed, 1, blocks, 2, 5, part)
    same(part[:48], wanted[32:80])
    assert (part[48:] == 255).all()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 processors")
@pytest.mark.parametrize("name", ["nehalem", "haswell"])
def test_processors_without_and_with_a_byte_shuffle(name):
    """What the processor lacks must not even be compiled."""
    code = """
import numpy as np
from engine.kernels import bits, ld, nearest
from engine.kernels.bits import lookups, tile_lookups
alleles = (np.random.default_rng(1).random((70, 600)) < 0.3).astype(np.uint8)
rows = bits.pack(alleles)
for unphased in (False, True):
    made, wanted = (ld.r2(rows, 600, unphased=unphased, implementation=which) for which in ("numba", "reference"))
    np.testing.assert_array_equal(made, wanted)
    ld.threshold(rows, 600, 0.2, unphased=unphased)
np.testing.assert_array_equal(nearest.hamming_cross(rows, rows), (alleles[:, None] != alleles[None]).sum(axis=2))
print(lookups.AVAILABLE, tile_lookups.preferred(rows.shape[1]))
"""
    wanted = "True True" if name == "haswell" else "False False"
    assert run_python(code, 900, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES="") == wanted
