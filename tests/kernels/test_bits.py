"""The three implementations against a loop over single bits, at awkward sizes, with poisoned outputs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from engine.errors import Unsupported, UsageError
from engine.kernels import bits

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
    with pytest.raises(UsageError, match="value 2"):
        bits.pack(np.full((1, 3), 2, dtype=np.uint8))
    with pytest.raises(UsageError, match="uint8 or bool"):
        bits.pack(np.zeros((1, 3)))
    with pytest.raises(UsageError, match="2 words for 65"):
        bits.unpack(np.zeros((4, 1), dtype=np.uint64), 65)
    with pytest.raises(UsageError, match="two axes"):
        bits.popcount_rows(np.zeros(4, dtype=np.uint64))
    with pytest.raises(UsageError, match="uint64"):
        bits.popcount_rows(np.zeros((4, 1), dtype=np.int64))
    with pytest.raises(Unsupported, match="torch tensor"):
        bits.pack(np.zeros((1, 3), dtype=np.uint8), implementation="triton")
    with pytest.raises(UsageError, match="reference, numba or triton"):
        bits.pack(np.zeros((1, 3), dtype=np.uint8), implementation="fast")  # type: ignore[arg-type]


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


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
    for n in (0, 1, 63, 64, 65, 521):
        alleles = np.random.default_rng(n).integers(0, 2, (sites, n)).astype(np.uint8)
        packed = reference.pack(alleles)
        tensor = torch.from_numpy(packed.view(np.int64))
        t = lambda x: x.numpy().view(np.uint64)
        assert (t(bits.pack(torch.from_numpy(alleles))) == packed).all(), ("pack", sites, n)
        assert (bits.unpack(tensor, n).numpy() == alleles).all(), ("unpack", sites, n)
        assert (t(bits.transpose(tensor, n)) == reference.transpose(packed, n)).all(), ("transpose", sites, n)
        got = bits.popcount_rows(tensor)
        assert got.dtype == torch.int64 and (got.numpy() == alleles.sum(1)).all(), ("popcount", sites, n)
wide = torch.full((2, 300), -1, dtype=torch.int64)
assert bits.popcount_rows(wide).tolist() == [19200, 19200]
print("done")
"""
    assert run_python(code, TRITON_INTERPRET="1").strip() == "done"


@needs_triton
def test_triton_kernels_compile_for_sm_90_without_a_gpu():
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
    (k._popcount_rows, {"bits_ptr": "*i64", "counts_ptr": "*i64", "words": "i32", "BLOCK": "constexpr"},
     {"BLOCK": 256}),
]
for kernel, signature, constants in cases:
    source = ASTSource(kernel, signature, constants, attrs=div(0, 1))
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(made.asm["cubin"]) > 0
    if kernel is k._popcount_rows:
        assert "popc" in made.asm["ptx"]
print("done")
"""
    assert run_python(code, TRITON_INTERPRET="0").strip() == "done"
