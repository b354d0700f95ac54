"""LD on the GPU: in Triton's interpreter against the reference, and compiled ahead of time for GPUs that are not here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from child_python import run_python
from triton_aot import compile_jobs

pytest.importorskip("triton")

_PRELUDE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np, torch
from ld_panels import KINDS, draw, linked, lost, measures, of_kind, positions, same
from engine.kernels import ld
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True  # poisons torch.empty
assert torch.isnan(torch.empty(3)).all()
np.seterr(all="ignore")
def card(array):
    return None if array is None else torch.from_numpy(array.view(np.int64).copy())
def on_card(options):
    return options | {{"missing_lw": card(options["missing_lw"])}}
"""


@pytest.mark.parametrize("kind", ["phased", "unphased", "missing", "unphased_missing"])
def test_in_its_interpreter(kind):
    code = (
        _PRELUDE
        + f"kind = {kind!r}"
        + """
for sites, n in ((0, 6), (1, 2), (5, 0), (33, 70)):
    bits, options = of_kind(kind, sites, n)
    there = on_card(options)
    end_l = ld.window(sites, sites=20)
    for measure in measures(kind) if sites > 5 else ("r2",):
        wanted = ld.matrix(bits, n, measure=measure, implementation="reference", **options)
        same(ld.matrix(card(bits), n, measure=measure, **there).numpy(), wanted)
        if measure in ("r", "d") and kind != "phased":
            continue
        i, j = np.random.default_rng(1).integers(0, max(sites, 1), (2, 40 if sites else 0))
        same(ld.pairs(card(bits), n, i, torch.from_numpy(j), measure=measure, **there).numpy(), wanted[i, j])
        same(ld.band(card(bits), n, end_l, measure=measure, **there).numpy(),
             ld.band(bits, n, end_l, measure=measure, **options))
        for got, one in zip(ld.threshold(card(bits), n, 0.1, end_l=end_l, measure=measure, **there),
                            ld.threshold(bits, n, 0.1, end_l=end_l, measure=measure, **options)):
            same(got.numpy(), one)
    half = bits[: sites // 2]
    same(ld.r2(card(bits), n, card(half), **there).numpy(), ld.r2(bits, n, half, **options))
    for got, one in zip(ld.threshold(card(bits), n, 0.3, card(half), **there), ld.threshold(bits, n, 0.3, half, **options)):
        same(got.numpy(), one)
    for adjusted in (False, True):
        np.testing.assert_allclose(ld.score(card(bits), n, end_l, adjusted=adjusted, **there).numpy(),
                                   ld.score(bits, n, end_l, adjusted=adjusted, **options), rtol=1e-12)
    for place, edges in ((positions(sites, 300), [0, 1, 50, 200, 201]), (positions(sites, 300) / 8, [0.5, 2.25, 9.0])):
        sums, pairs = ld.decay(bits, n, place, edges, implementation="reference", **options)
        got_sums, got_pairs = ld.decay(card(bits), n, place, edges, **there)
        same(got_pairs.numpy(), pairs)
        np.testing.assert_allclose(got_sums.numpy(), sums, rtol=1e-12)
pieces = list(ld.triangle(card(bits), n, rows=20, **there))
same(torch.cat(pieces).numpy(), np.concatenate(list(ld.triangle(bits, n, **options))))
out = torch.full((33, 33), 7.0)
assert ld.matrix(card(bits), n, out=out, **there) is out
same(out.numpy(), ld.r2(bits, n, **options))
print("done")
"""
    )
    assert run_python(code, TRITON_INTERPRET="1") == "done"


def test_greedy_passes_in_the_interpreter():
    code = (
        _PRELUDE
        + """
for kind in KINDS:
    n, sites = 66, 70
    bits, options = linked(sites, n), of_kind(kind, sites, n)[1]
    there = on_card(options)
    place = np.cumsum(np.random.default_rng(0).integers(0, 9, sites))
    for rule, where in (("plink1", {"sites": 40, "step": 7}), ("plink2", {"bp": 150, "position_bp": place})):
        same(ld.prune(card(bits), n, 0.2, rule=rule, **where, **there), ld.prune(bits, n, 0.2, rule=rule, **where, **options))
    p = np.random.default_rng(1).random(sites) ** 3
    for rule in ("plink1", "plink2") if kind == "unphased" else ("plink2",):
        limits = {"p1": 0.05, "p2": 0.5, "least": 0.1, "bp": 60, "rule": rule}
        same(ld.clump(card(bits), n, p, place, **limits, **there), ld.clump(bits, n, p, place, **limits, **options))
    same(ld.blocks(card(bits), n, place * 1000, **there), ld.blocks(bits, n, place * 1000, **options))
print("done")
"""
    )
    assert run_python(code, TRITON_INTERPRET="1") == "done"


def test_popcount_is_the_same_matrix_and_long_lists_come_in_parts():
    code = (
        _PRELUDE
        + """
from engine.kernels.ld import triton_gpu, triton_sinks
from engine.kernels.ld.checks import Sites
for unphased in (False, True):
    bits, other = draw(35, 70)[1], draw(40, 70, seed=1)[1]
    first, second = Sites(card(bits), 70, None, unphased), Sites(card(other), 70, None, unphased)
    for measure in ("r2", "d"):
        same(triton_gpu.matrix(first, None, measure, method="popcount").numpy(),
             ld.matrix(bits, 70, measure=measure, unphased=unphased))
    same(triton_gpu.matrix(first, second, "r2", method="popcount").numpy(), ld.r2(bits, 70, other, unphased=unphased))
triton_sinks._COUNTS_AT_ONCE = 40  # one block of rows at a time
bits = linked(100, 66)
for got, one in zip(ld.threshold(card(bits), 66, 0.2, end_l=ld.window(100, sites=40)),
                    ld.threshold(bits, 66, 0.2, end_l=ld.window(100, sites=40))):
    same(got.numpy(), one)
same(ld.r2(card(bits).view(torch.uint64), 66).numpy(), ld.r2(bits, 66))
assert torch.isnan(ld.r2(torch.full((3, 1), -1), 5)).all()  # bits beyond the last haplotype do not count
print("done")
"""
    )
    assert run_python(code, TRITON_INTERPRET="1") == "done"


_PLANES = {"a0": "*i32", "a1": "*i32", "a3": "*i32", "a_sum": "*fp64", "a_variance": "*fp64"}
_OTHER = {"b0": "*i32", "b1": "*i32", "b3": "*i32", "b_sum": "*fp64", "b_variance": "*fp64"}
_ROWS = {"p0": "*i32", "p1": "*i32", "p2": "*i32", "p3": "*i32"}
_SIZES = {"n": "i32", "sites": "i32", "words": "i32"}


def _jobs(arch):
    """Every kernel; every kind and measure of the matrix on sm_90."""
    everything = arch == 90
    matrix = _PLANES | _OTHER | {"out_ptr": "*fp32", "others": "i32", "halves": "fp32"} | _SIZES
    listed = _ROWS | {"i_ptr": "*i64", "j_ptr": "*i64", "out_ptr": "*fp64", "n": "i32", "pairs": "i32", "words": "i32"}
    at = "triton_matrix"
    for kind, code in [(0, 0), (1, 0), (2, 0), (3, 0)] + ([(0, 1), (0, 2), (0, 3), (3, 1)] if everything else []):
        block = 64 if kind >= 2 else 128
        yield at, "matrix_kernel", matrix, {"KIND": kind, "CODE": code, "SYMMETRIC": True, "BLOCK": block, "STEP": 4}, 8
    for kind in (0, 1):
        pop = {k: v for k, v in matrix.items() if k not in ("a3", "b3")}
        yield at, "popcount_kernel", pop, {"KIND": kind, "CODE": 0, "SYMMETRIC": True, "BLOCK": 64}, 4
    for kind in (0, 3) if everything else (0,):
        tile, warps = {"KIND": kind, "BLOCK": 64, "STEP": 4}, 8 if kind else 4
        band = _PLANES | _SIZES | {"end_ptr": "*i64", "out_ptr": "*fp32", "width": "i32", "halves": "fp32"}
        yield at, "band_kernel", band, tile | {"CODE": 0}, warps
        values = listed | {"sum_ptr": "*fp64", "variance_ptr": "*fp64", "halves": "fp32"}
        yield at, "pairs_kernel", values, {"KIND": kind, "CODE": 0, "BLOCK": 32, "STEP": 32}, 4
        yield at, "tables_kernel", listed, {"KIND": kind, "BLOCK": 32, "STEP": 32}, 4
        above = (
            matrix
            | dict.fromkeys(("end_ptr", "count_ptr", "i_ptr", "j_ptr"), "*i64")
            | {"value_ptr": "*fp32", "least": "fp32"}
        ) | dict.fromkeys(("first_row", "first_column", "tiles"), "i32")
        above.pop("out_ptr")
        for write in (False, True):
            yield "triton_sinks", "above_kernel", above, tile | {"CODE": 0, "SAME": True, "WRITE": write}, warps
        score = _PLANES | _SIZES | {"start_ptr": "*i64", "end_ptr": "*i64", "out_ptr": "*fp64"}
        yield "triton_sinks", "score_kernel", score, tile | {"CODE": 4}, warps
        decay = _PLANES | _SIZES | {"sums_ptr": "*fp64", "pairs_ptr": "*i64", "bins": "i32"}
        for unit in ("*i64", "*fp64"):
            where = {"position_ptr": unit, "edges_ptr": unit}
            yield "triton_sinks", "decay_kernel", decay | where, tile | {"BINS": 64, "SPLITS": 8}, warps
        linked = _PLANES | _SIZES | {"reach_ptr": "*i64", "most_ptr": "*fp64", "rows_ptr": "*i32", "row_words": "i32"}
        for backward in (False, True):
            yield "triton_sinks", "linked_kernel", linked, tile | {"BACKWARD": backward}, warps


@pytest.mark.parametrize("arch", [80, 90, "gfx942"])
def test_compiles_ahead_of_time(arch):
    jobs = [
        {"module": f"engine.kernels.ld.{module}", "kernel": kernel, "signature": signature, "constexprs": constexprs}
        | {"num_warps": warps, "arch": arch}
        for module, kernel, signature, constexprs, warps in _jobs(arch)
    ]
    product = {80: "mma.sync", 90: "wgmma.mma_async", "gfx942": "mfma"}[arch]
    for result in compile_jobs(jobs):
        assert "error" not in result, result
        kernel, assembly = result["kernel"], result["assembly"]
        if kernel in ("popcount_kernel", "pairs_kernel", "tables_kernel"):
            assert arch == "gfx942" or "popc.b32" in assembly, f"popcount of {kernel} is not recognised"
        else:
            assert product in assembly, f"{kernel} does not use the tensor cores of {arch}"
        if arch != "gfx942" and kernel in ("matrix_kernel", "pairs_kernel"):
            assert "div.rn.f64" in assembly, (
                f"{kernel}: a quotient that is not correctly rounded differs from the CPU's"
            )
        assert "sqrt.approx" not in assembly
