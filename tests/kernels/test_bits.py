"""The three implementations against a loop over single bits, at awkward sizes, with poisoned outputs."""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.errors import Unsupported, UsageError
from engine.kernels import bits
from engine.kernels.bits import lookups, tiles

sys.path.insert(0, str(Path(__file__).parent))
from child_python import run_python

SIZES = [0, 1, 63, 64, 65, 127, 521]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from np.empty is full of ones, so that a word that is never written is seen."""
    true_empty = np.empty

    def empty(*args, **kwargs):
        array = true_empty(*args, **kwargs)
        array.view(np.uint8).fill(0xFF)
        return array

    monkeypatch.setattr(np, "empty", empty)


def slow_pack(alleles_ln: np.ndarray) -> list[list[int]]:
    """Python integers, bit by bit: the layout as the contract words it."""
    rows = []
    for row in alleles_ln:
        words = [0] * ((len(row) + 63) // 64)
        for n, allele in enumerate(row):
            words[n // 64] |= int(allele) << (n % 64)
        rows.append(words)
    return rows


def random_alleles(sites: int, n: int) -> np.ndarray:
    return np.random.default_rng(sites * 1000 + n).integers(0, 2, (sites, n)).astype(np.uint8)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("implementation", ["reference", "numba"])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("sites", [0, 1, 63, 64, 65, 131])
def test_cpu_implementations_follow_the_definition(implementation, sites, n):
    alleles_ln = random_alleles(sites, n)
    bits_lw = bits.pack(alleles_ln, implementation=implementation)
    assert bits_lw.dtype == np.uint64
    assert bits_lw.shape == (sites, (n + 63) // 64)
    assert bits_lw.tolist() == slow_pack(alleles_ln)
    np.testing.assert_array_equal(bits.pack(alleles_ln.astype(bool), implementation=implementation), bits_lw)
    np.testing.assert_array_equal(bits.unpack(bits_lw, n, implementation=implementation), alleles_ln)
    turned = bits.transpose(bits_lw, n, implementation=implementation)
    assert turned.shape == (n, (sites + 63) // 64)
    assert turned.tolist() == slow_pack(alleles_ln.T)
    counts = bits.popcount_rows(bits_lw, implementation=implementation)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, alleles_ln.sum(axis=1))


def slow_dosage_planes(alleles_ln: np.ndarray, missing_ln: np.ndarray) -> list[list[list[int]]]:
    """Person by person."""
    planes: list[list[list[int]]] = [[], [], []]
    for alleles, missing in zip(alleles_ln.tolist(), missing_ln.tolist()):
        people = [(a + b, not (x or y)) for a, b, x, y in zip(alleles[::2], alleles[1::2], missing[::2], missing[1::2])]
        planes[0].append([int(called and dosage in (0, 2)) for dosage, called in people])
        planes[1].append([int(called and dosage == 0) for dosage, called in people])
        planes[2].append([int(called) for _, called in people])
    return [slow_pack(np.array(plane, dtype=np.uint8).reshape(len(alleles_ln), -1)) for plane in planes]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("implementation", ["reference", "numba"])
@pytest.mark.parametrize("n", [0, 2, 62, 64, 66, 126, 128, 130, 262])
def test_dosage_planes_follow_the_definition(implementation, n):
    alleles_ln = random_alleles(67, n)
    missing_ln = (np.random.default_rng(n).random((67, n)) < 0.1).astype(np.uint8)
    alleles_ln[missing_ln == 1] = 0
    packed, missing = bits.pack(alleles_ln), bits.pack(missing_ln)
    got = bits.dosage_planes(packed, n, missing, implementation=implementation)
    assert [plane.tolist() for plane in got] == slow_dosage_planes(alleles_ln, missing_ln)
    got = bits.dosage_planes(packed, n, implementation=implementation)
    assert [plane.tolist() for plane in got] == slow_dosage_planes(alleles_ln, np.zeros_like(missing_ln))
    if n % 64:
        dirty = packed.copy()
        dirty[:, -1] |= ~np.uint64((1 << (n % 64)) - 1)
        for clean, plane in zip(got, bits.dosage_planes(dirty, n, implementation=implementation)):
            np.testing.assert_array_equal(clean, plane)


@pytest.mark.parametrize("shape", [(5, 3), (33, 7), (64, 1), (70, 2)])
def test_tiles_count_pairs_of_rows(shape):
    rng = np.random.default_rng(shape[0])
    a, sign = rng.integers(0, 2**64, (2, *shape), dtype=np.uint64)
    packed, signs = tiles.interleaved(a), tiles.interleaved(sign)
    counts = np.empty(1024, dtype=np.int32)
    rows = (
        np.zeros((len(packed) * 32, shape[1]), dtype=np.uint64),
        np.zeros((len(packed) * 32, shape[1]), dtype=np.uint64),
    )
    rows[0][: shape[0]], rows[1][: shape[0]] = a, sign
    for i in range(len(packed)):
        for j in range(len(packed)):
            left, right = slice(32 * i, 32 * i + 32), slice(32 * j, 32 * j + 32)
            both = rows[0][left, None] & rows[0][None, right]
            unlike = rows[1][left, None] ^ rows[1][None, right]
            tiles.and_tile(packed, i, packed, j, counts)
            np.testing.assert_array_equal(counts.reshape(32, 32), np.bitwise_count(both).sum(axis=2))
            tiles.xor_tile(packed, i, packed, j, counts)
            differ = rows[0][left, None] ^ rows[0][None, right]
            np.testing.assert_array_equal(counts.reshape(32, 32), np.bitwise_count(differ).sum(axis=2))
            tiles.dot_tile(packed, signs, i, packed, signs, j, counts)
            wanted = np.bitwise_count(both & ~unlike).sum(axis=2).astype(int) - np.bitwise_count(both & unlike).sum(
                axis=2
            )
            np.testing.assert_array_equal(counts.reshape(32, 32), wanted)


@pytest.mark.parametrize("implementation", ["reference", "numba"])
def test_views_that_are_not_contiguous(implementation):
    alleles_ln = random_alleles(97, 201)[::3, ::2]
    bits_lw = bits.pack(alleles_ln, implementation=implementation)
    assert bits_lw.tolist() == slow_pack(alleles_ln)
    part = np.repeat(bits_lw, 2, axis=0)[::2]
    np.testing.assert_array_equal(bits.unpack(part, 101, implementation=implementation), alleles_ln)
    assert bits.transpose(part, 101, implementation=implementation).tolist() == slow_pack(alleles_ln.T)


def test_bits_beyond_n_are_ignored_by_transpose_and_unpack():
    dirty = np.full((3, 1), np.uint64(0xFFFFFFFFFFFFFFFF))
    for implementation in ("reference", "numba"):
        assert bits.unpack(dirty, 5, implementation=implementation).tolist() == [[1] * 5] * 3
        assert bits.transpose(dirty, 5, implementation=implementation).tolist() == [[7]] * 5


def test_the_door_refuses_what_it_cannot_do():
    for implementation in ("reference", "numba"):
        for where in (2, 70, 129):  # in a whole word and in the last one
            alleles_ln = np.zeros((3, 131), dtype=np.uint8)
            alleles_ln[1, where] = 2
            with pytest.raises(UsageError, match="value 2"):
                bits.pack(alleles_ln, implementation=implementation)
    with pytest.raises(UsageError, match="uint8 or bool"):
        bits.pack(np.zeros((1, 3)))
    with pytest.raises(UsageError, match="2 words for 65"):
        bits.unpack(np.zeros((4, 1), dtype=np.uint64), 65)
    with pytest.raises(UsageError, match="two axes"):
        bits.popcount_rows(np.zeros(4, dtype=np.uint64))
    with pytest.raises(UsageError, match="uint64"):
        bits.popcount_rows(np.zeros((4, 1), dtype=np.int64))
    with pytest.raises(UsageError, match="two haplotypes per person"):
        bits.dosage_planes(np.zeros((4, 1), dtype=np.uint64), 5)
    with pytest.raises(UsageError, match="missing_lw of shape"):
        bits.dosage_planes(np.zeros((4, 1), dtype=np.uint64), 6, np.zeros((3, 1), dtype=np.uint64))
    with pytest.raises(Unsupported, match="torch tensor"):
        bits.pack(np.zeros((1, 3), dtype=np.uint8), implementation="triton")
    with pytest.raises(UsageError, match="reference, numba or triton"):
        bits.pack(np.zeros((1, 3), dtype=np.uint8), implementation="fast")  # type: ignore[arg-type]


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_triton_in_the_interpreter_agrees_with_the_reference():
    code = """
import numpy as np, torch
from engine.kernels import bits
from engine.kernels.bits import reference, triton_gpu
assert triton_gpu.INTERPRETED
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True   # poisons torch.empty
assert torch.empty(3, dtype=torch.int64).tolist() == [2**63 - 1] * 3
for sites in (0, 1, 63, 65, 131):
    for n in (0, 1, 62, 63, 64, 65, 130, 521):
        alleles = np.random.default_rng(n).integers(0, 2, (sites, n)).astype(np.uint8)
        packed, _ = reference.pack(alleles)
        tensor = torch.from_numpy(packed.view(np.int64))
        t = lambda x: x.numpy().view(np.uint64)
        assert (t(bits.pack(torch.from_numpy(alleles))) == packed).all(), ("pack", sites, n)
        assert (bits.unpack(tensor, n).numpy() == alleles).all(), ("unpack", sites, n)
        assert (t(bits.transpose(tensor, n)) == reference.transpose(packed, n)).all(), ("transpose", sites, n)
        got = bits.popcount_rows(tensor)
        assert got.dtype == torch.int64 and (got.numpy() == alleles.sum(1)).all(), ("popcount", sites, n)
        if n % 2 == 0:
            missing, _ = reference.pack((np.random.default_rng(n).random((sites, n)) < 0.1).astype(np.uint8))
            for holes in (None, missing):
                wanted = bits.dosage_planes(packed, n, holes, implementation="reference")
                got = bits.dosage_planes(tensor, n, None if holes is None else torch.from_numpy(holes.view(np.int64)))
                for one, other in zip(got, wanted):
                    assert (t(one) == other).all(), ("dosage", sites, n)
wide = torch.full((2, 300), -1, dtype=torch.int64)
assert bits.popcount_rows(wide).tolist() == [19200, 19200]
print("done")
"""
    assert run_python(code, 900, TRITON_INTERPRET="1") == "done"


@needs_triton
def test_triton_kernels_compile_without_a_gpu():
    code = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from engine.errors import Unsupported
from engine.kernels import bits
from engine.kernels.bits import triton_gpu as k
try:
    bits.popcount_rows(torch.zeros((1, 1), dtype=torch.int64))
    raise SystemExit("a CPU tensor was accepted by the compiled kernel")
except Unsupported:
    pass
div = lambda *places: {(p,): [["tt.divisibility", 16]] for p in places}
cases = [
    (k._pack, {"alleles_ptr": "*u8", "bits_ptr": "*i64", "n": "i32", "words": "i32"}, {}),
    (k._unpack, {"bits_ptr": "*i64", "alleles_ptr": "*u8", "n": "i32", "words": "i32"}, {}),
    (k._transpose, {"bits_ptr": "*i64", "out_ptr": "*i64", "sites": "i32", "n": "i32", "words": "i32",
                    "out_words": "i32"}, {}),
    (k._dosage_planes, {"bits_ptr": "*i64", "missing_ptr": "*i64", "out_ptr": "*i64", "sites": "i32", "samples": "i32",
                        "words": "i32", "out_words": "i32", "MISSING": "constexpr"}, {"MISSING": True}),
    (k._popcount_rows, {"bits_ptr": "*i64", "counts_ptr": "*i64", "words": "i32", "BLOCK": "constexpr"},
     {"BLOCK": 256}),
]
for kernel, signature, constants in cases:
    source = ASTSource(kernel, signature, constants, attrs=div(0, 1))
    for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
        made = triton.compile(source, target=target)
        assert len(made.asm["hsaco" if target.backend == "hip" else "cubin"]) > 0
        if kernel is k._popcount_rows and target.backend == "cuda":
            assert "popc" in made.asm["ptx"]
print("done")
"""
    assert run_python(code, 900, TRITON_INTERPRET="0") == "done"


@pytest.mark.skipif(not lookups.AVAILABLE, reason="no AVX2")
@pytest.mark.parametrize("n", [1, 63, 64, 130, 4_000, 40_000])
@pytest.mark.parametrize("inverse", [False, True])
def test_lookups_are_sums_of_products(n, inverse):
    """40,000 ones are more entries than sums of 16 bits hold, each as large as it can be."""
    rng = np.random.default_rng(n)
    alleles = (rng.random((70, n)) < rng.choice([0.02, 0.5, 1.0], (70, 1))).astype(np.uint8)
    alleles[0] = not inverse
    packed = bits.pack(alleles)
    columns = lookups.new_columns(2, packed.shape[1])
    columns[:] = 255
    lookups.fill_columns(packed, np.arange(70)[::-1].copy(), columns[1])
    listed = alleles ^ np.uint8(inverse)
    entries, counts = (
        np.zeros((3, 16 * packed.shape[1] + lookups.SPARE), dtype=np.uint32),
        np.empty(128, dtype=np.int32),
    )
    for site in range(0, 70, 9):
        length = lookups.list_nibbles(packed, site, n, inverse, entries, 2)
        padded = np.pad(listed[site], (0, -n % 4)).reshape(-1, 4)
        assert length == padded.any(axis=1).sum()
        for first in (0, 32):
            members, vectors = alleles[::-1][first:].astype(np.int64), 3 - first // 32
            lookups.sums(entries, 2, length, columns, 1, first, vectors, 0, counts)
            np.testing.assert_array_equal(counts[: len(members)], members @ listed[site].astype(np.int64))
            if n % 2 == 0:
                lookups.sums(entries, 2, length, columns, 1, first, vectors, 1, counts)
                dosage = listed[site].reshape(-1, 2).sum(axis=1, dtype=np.int64)
                np.testing.assert_array_equal(
                    counts[: len(members)], members.reshape(len(members), -1, 2).sum(axis=2) @ dosage
                )


def test_whether_there_are_lookups_is_asked_of_the_named_processor():
    probe = "from engine.kernels.bits.lookups import AVAILABLE; print(AVAILABLE)"
    for name, wanted in (("haswell", True), ("sandybridge", False), ("nehalem", False)):
        if platform.machine() != "x86_64":
            pytest.skip("names of x86 processors")
        assert run_python(probe, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES="") == str(wanted)
