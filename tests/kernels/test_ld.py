"""r2 against NumPy's own correlation; the implementations against one another, bit for bit, at awkward sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import Unsupported, UsageError
from engine.kernels import ld

sys.path.insert(0, str(Path(__file__).parent))
from triton_aot import compile_jobs

SITES = (0, 1, 31, 32, 33, 63, 64, 65, 131, 257)


@pytest.fixture(scope="module")
def compiled():
    """Everything is compiled before np.empty is replaced, which Numba would not recognise."""
    _, bits = draw(3, 5)
    ld.r2(bits, 5)
    ld.r2(bits, 5, bits)
    ld.r2_pairs(bits, 5, [0], [1])
    ld.r2_decay(bits, 5, [1, 2, 3], [0, 5])


@pytest.fixture
def poisoned(compiled, monkeypatch):
    """Memory from np.empty is full of ones, so that a cell that is never written is seen."""
    true_empty = np.empty

    def poisoned_empty(*args, **kwargs):
        array = true_empty(*args, **kwargs)
        array.view(np.uint8).reshape(-1)[:] = 0xA5
        return array

    monkeypatch.setattr(np, "empty", poisoned_empty)


def draw(sites, n, seed=0):
    """Alleles (sites, n) in linkage, some sites monomorphic, and their bits."""
    rng = np.random.default_rng(seed)
    founders = rng.random((sites, 6)) < rng.random((sites, 1))
    alleles = founders[:, rng.integers(0, 6, n)] ^ (rng.random((sites, n)) < 0.05)
    alleles[::7] = 0
    alleles[5::11] = 1
    return alleles.astype(np.uint8), pack(alleles)


def pack(alleles):
    sites, n = alleles.shape
    words = (n + 63) // 64
    padded = np.zeros((sites, words * 64), dtype=np.uint8)
    padded[:, :n] = alleles
    return np.packbits(padded, axis=1, bitorder="little").reshape(-1).view(np.uint64).reshape(sites, words)


def correlation(a, b):
    """r2 of two allele vectors by NumPy alone."""
    return np.nan if a.std() == 0 or b.std() == 0 else float(np.corrcoef(a, b)[0, 1] ** 2)


def same(got, wanted):
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted, strict=True)


def test_reference_is_the_squared_correlation():
    alleles, bits = draw(23, 67)
    wanted = np.array([[correlation(a, b) for b in alleles] for a in alleles])
    assert np.isnan(wanted).any()
    assert np.isfinite(wanted).any()
    np.testing.assert_allclose(ld.r2(bits, 67, implementation="reference"), wanted, rtol=2e-7, atol=1e-9)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 131])
def test_all_pairs_agree_bit_for_bit(n):
    for sites in SITES:
        _, bits = draw(sites, n, seed=sites)
        same(ld.r2(bits, n), ld.r2(bits, n, implementation="reference"))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("others", [0, 1, 33, 65])
def test_two_sets_agree_bit_for_bit(others):
    _, bits = draw(67, 131)
    _, other = draw(others, 131, seed=1)
    same(ld.r2(bits, 131, other), ld.r2(bits, 131, other, implementation="reference"))
    same(ld.r2(bits, 131, bits), ld.r2(bits, 131))


def test_more_words_than_are_counted_at_once():
    rng = np.random.default_rng(3)
    n = 64 * 2050 + 5
    bits = rng.integers(0, 2**64, (7, (n + 63) // 64), dtype=np.uint64)
    bits[:, -1] &= np.uint64(31)
    same(ld.r2(bits, n), ld.r2(bits, n, implementation="reference"))


@settings(max_examples=30, deadline=None)
@given(sites=st.integers(0, 70), n=st.integers(0, 200), seed=st.integers(0, 1000))
def test_any_size(sites, n, seed):
    _, bits = draw(sites, n, seed)
    same(ld.r2(bits, n), ld.r2(bits, n, implementation="reference"))


def test_extremes():
    alleles = np.array([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1], [0] * 4, [1] * 4], dtype=np.uint8)
    r2 = ld.r2(pack(alleles), 4)
    assert r2[:3, :3].tolist() == [[1.0] * 3] * 3  # a perfect pair is exactly 1, whichever allele is named ALT
    assert r2[3, :4].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert np.isnan(r2[4:]).all()
    assert np.isnan(r2[:, 4:]).all()


@pytest.mark.parametrize("implementation", ["reference", "numba"])
def test_bits_beyond_the_last_haplotype_do_not_count(implementation):
    _, bits = draw(40, 70)
    dirty = bits | np.uint64(0xFFFFFFFFFFFFFFC0) * (np.arange(2) == 1).astype(np.uint64)
    before = dirty.copy()
    same(ld.r2(dirty, 70, implementation=implementation), ld.r2(bits, 70))
    same(ld.r2_pairs(dirty, 70, [0, 1], [2, 3], implementation=implementation), ld.r2_pairs(bits, 70, [0, 1], [2, 3]))
    same(dirty, before)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("pairs", [0, 1, 63, 65, 521])
def test_listed_pairs_are_cells_of_the_matrix(pairs):
    _, bits = draw(45, 131)
    i, j = np.random.default_rng(pairs).integers(0, 45, (2, pairs))
    same(ld.r2_pairs(bits, 131, i, j), ld.r2(bits, 131)[i, j])
    same(ld.r2_pairs(bits, 131, i, j, implementation="reference"), ld.r2(bits, 131)[i, j])


def positions(sites, span, seed=0):
    return np.sort(np.random.default_rng(seed).integers(0, span, sites))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("edges", [(0, 1, 5, 20, 21, 400), (3, 9), (0, 10**9), (-5, 0, 2), (5000, 6000)])
@pytest.mark.parametrize("span", [30, 3000])
def test_decay_is_the_histogram_of_the_matrix(edges, span):
    for sites in SITES:
        _, bits = draw(sites, 131, seed=sites)
        position_bp = positions(sites, span)
        r2 = ld.r2(bits, 131, implementation="reference").astype(np.float64)
        sums, pairs = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1, dtype=np.int64)
        for i in range(sites):
            for j in range(i + 1, sites):
                b = np.searchsorted(edges, position_bp[j] - position_bp[i], side="right") - 1
                if 0 <= b < len(pairs) and not np.isnan(r2[i, j]):
                    sums[b] += r2[i, j]
                    pairs[b] += 1
        for implementation in ("reference", "numba"):
            got_sums, got_pairs = ld.r2_decay(bits, 131, position_bp, edges, implementation=implementation)
            same(got_pairs, pairs)
            np.testing.assert_allclose(got_sums, sums, rtol=1e-6)
        exact_sums, _ = ld.r2_decay(bits, 131, position_bp, edges, implementation="reference")
        np.testing.assert_allclose(got_sums, exact_sums, rtol=1e-12)


def test_thread_count_changes_nothing():
    _, bits = draw(500, 131)
    position_bp, edges = positions(500, 10_000), np.arange(0, 10_001, 100)
    threads = numba.get_num_threads()
    results = []
    try:
        for count in sorted({1, threads}):
            numba.set_num_threads(count)
            results.append((ld.r2(bits, 131), *ld.r2_decay(bits, 131, position_bp, edges)))
    finally:
        numba.set_num_threads(threads)
    for got, wanted in zip(results[-1], results[0]):
        same(got, wanted)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda b: ld.r2(b[0], 131), "two axes"),
        (lambda b: ld.r2(b.astype(np.int64), 131), "uint64"),
        (lambda b: ld.r2(b, 200), "4 words"),
        (lambda b: ld.r2(b, -1), "haplotypes"),
        (lambda b: ld.r2(b, 2**26 + 1), "haplotypes"),
        (lambda b: ld.r2(b, 131, b[:, :2]), "other_mw"),
        (lambda b: ld.r2(b.tolist(), 131), "NumPy"),
        (lambda b: ld.r2(b, 131, implementation="cuda"), "reference, numba or triton"),
        (lambda b: ld.r2_pairs(b, 131, [0], [20]), r"\[0, 20\)"),
        (lambda b: ld.r2_pairs(b, 131, [-1], [2]), r"\[0, 20\)"),
        (lambda b: ld.r2_pairs(b, 131, [1, 2], [2]), "one length"),
        (lambda b: ld.r2_pairs(b, 131, [1.5], [2]), "integers"),
        (lambda b: ld.r2_decay(b, 131, np.arange(19), [0, 1]), "20 positions"),
        (lambda b: ld.r2_decay(b, 131, np.arange(20)[::-1], [0, 1]), "never falls"),
        (lambda b: ld.r2_decay(b, 131, np.arange(20), [0]), "edges"),
        (lambda b: ld.r2_decay(b, 131, np.arange(20), [0, 2, 2]), "edges"),
    ],
)
def test_bad_input_is_one_line(call, says):
    _, bits = draw(20, 131)
    with pytest.raises(UsageError, match=says) as caught:
        call(bits)
    assert "\n" not in str(caught.value)


def test_a_named_implementation_is_never_replaced():
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    _, bits = draw(5, 65)
    tensor = torch.from_numpy(bits.view(np.int64))
    with pytest.raises(Unsupported, match="triton"):
        ld.r2(bits, 65, implementation="triton")
    with pytest.raises(Unsupported, match="CUDA"):
        ld.r2(tensor, 65)
    with pytest.raises(Unsupported, match="numba"):
        ld.r2(tensor, 65, implementation="numba")


def run_python(code, **environment):
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**variables, **environment}, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_avx2_path_is_right_and_compiled_functions_are_cached(tmp_path):
    code = """
import json
import numpy as np
from engine.kernels import ld
from engine.kernels.bits import tiles
from engine.kernels.ld import numba_cpu
bits = np.random.default_rng(0).integers(0, 2**64, (70, 3), dtype=np.uint64)
got = ld.r2(bits, 131)
assert np.array_equal(got, ld.r2(bits, 131, implementation="reference"), equal_nan=True)
code = "".join(tiles.and_tile.inspect_asm().values()) if not tiles.and_tile.stats.cache_hits else ""
tile = numba_cpu._r2_triangle.stats
print(json.dumps([tiles.WIDE, "zmm" in code, "ymm" in code, sum(tile.cache_hits.values())]))
"""
    variables = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    if not numba.core.codegen.get_host_cpu_features().count("+avx2"):
        pytest.skip("no AVX2 here")
    assert json.loads(run_python(code, **variables)) == [False, False, True, 0]
    assert json.loads(run_python(code, **variables))[3] == 1


def test_triton_in_its_interpreter():
    pytest.importorskip("triton")
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np, torch
from test_ld import draw, positions, same
from engine.kernels import ld
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True  # poisons torch.empty
assert torch.isnan(torch.empty(3)).all()
for sites, n in ((0, 5), (1, 1), (5, 0), (31, 64), (65, 131)):
    _, bits = draw(sites, n)
    bits_gpu = torch.from_numpy(bits.view(np.int64).copy())
    wanted = ld.r2(bits, n, implementation="reference")
    same(ld.r2(bits_gpu, n).numpy(), wanted)
    same(ld.r2(bits_gpu, n, bits_gpu[: sites // 2]).numpy(), wanted[:, : sites // 2])
    same(ld.r2(bits_gpu.view(torch.uint64), n).numpy(), wanted)
    i, j = np.random.default_rng(1).integers(0, max(sites, 1), (2, 50 if sites else 0))
    same(ld.r2_pairs(bits_gpu, n, i, torch.from_numpy(j)).numpy(), wanted[i, j])
    for span, edges in ((30, [0, 1, 5, 20, 21]), (100000, [0, 100, 20000]), (3000, [700, 800]), (30, [100, 200])):
        sums, pairs = ld.r2_decay(bits, n, positions(sites, span), edges, implementation="reference")
        got_sums, got_pairs = ld.r2_decay(bits_gpu, n, positions(sites, span), edges)
        same(got_pairs.numpy(), pairs)
        np.testing.assert_allclose(got_sums.numpy(), sums, rtol=1e-12)
dirty = torch.full((3, 1), -1)
assert torch.isnan(ld.r2(dirty, 5)).all()
print("done")
"""
    assert run_python(code, TRITON_INTERPRET="1") == "done"


def test_triton_compiles_ahead_of_time():
    pytest.importorskip("triton")
    sites = {"words_ptr": "*i32", "count_ptr": "*fp64", "reciprocal_ptr": "*fp64"}
    other = {"other_ptr": "*i32", "other_count_ptr": "*fp64", "other_reciprocal_ptr": "*fp64"}
    kernels = [
        (
            "r2_kernel",
            sites | other | {"out_ptr": "*fp32"} | dict.fromkeys(("n", "sites", "others", "words"), "i32"),
            {"SYMMETRIC": True, "BLOCK": 128, "STEP": 4},
            8,
        ),
        (
            "decay_kernel",
            sites
            | dict.fromkeys(("position_ptr", "edges_ptr", "pairs_ptr"), "*i64")
            | {"sums_ptr": "*fp64"}
            | dict.fromkeys(("n", "sites", "words", "bins"), "i32"),
            {"BLOCK": 64, "STEP": 4, "BINS": 64, "SPLITS": 8},
            4,
        ),
        (
            "pairs_kernel",
            sites
            | {"i_ptr": "*i64", "j_ptr": "*i64", "out_ptr": "*fp32"}
            | dict.fromkeys(("n", "pairs", "words"), "i32"),
            {"BLOCK": 32, "STEP": 32},
            4,
        ),
    ]
    jobs = [
        {"module": "engine.kernels.ld.triton_gpu", "kernel": kernel, "signature": signature, "constexprs": constexprs}
        | {"num_warps": warps, "arch": arch}
        for arch in (80, 90, "gfx942")
        for kernel, signature, constexprs, warps in kernels
    ]
    results = compile_jobs(jobs)
    assert len(results) == 9
    for result in results:
        assert "error" not in result, result
        product = {80: "mma.sync", 90: "wgmma.mma_async", "gfx942": "mfma"}[result["arch"]]
        if result["kernel"] in ("r2_kernel", "decay_kernel"):
            assert product in result["assembly"], (
                f"{result['kernel']} does not use the tensor cores of {result['arch']}"
            )
        elif result["arch"] in (80, 90):
            assert "popc.b32" in result["assembly"], f"popcount of {result['kernel']} is not recognised"
