"""The GPU kernels against the definition, in Triton's interpreter: every search, several devices, tiles from the host.

And all of it compiles for the GPUs it is meant for, within their shared memory.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from child_python import run_python

pytest.importorskip("triton")
ROOM = Path(__file__).resolve().parents[2] / "engine" / "kernels" / "nearest"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, "gfx942": 64 * 1024}  # that a program may have
PREAMBLE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np, torch
from nearest_cases import *
from engine.kernels import nearest
from engine.kernels.nearest import triton_bits, triton_features, triton_shared, triton_windows
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True  # poisons torch.empty
assert torch.isnan(torch.empty(3)).all()

def tensor(x):
    if isinstance(x, tuple):
        return tuple(map(tensor, x))
    if not isinstance(x, np.ndarray):
        return x
    return torch.from_numpy(x.view(np.int64).copy() if x.dtype == np.uint64 else x.copy())

def check(function, *given, product=None, **excluded):
    wanted = function(*given, **excluded, implementation="reference")
    excluded |= {{}} if product is None else {{"product": product}}
    got = function(*map(tensor, given), **excluded, implementation="triton")
    same(tuple(x.numpy() for x in got) if isinstance(got, tuple) else got.numpy(), wanted)
"""


def interpreted(code):
    assert run_python(PREAMBLE + code + "\nprint('done')", TRITON_INTERPRET="1") == "done"


def test_bits():
    interpreted("""
for kind, (n, m, sites) in zip(
    ("none", "self", "groups", "both", "all", "none", "self"),
    ((0, 5, 9), (5, 0, 9), (2, 3, 0), (1, 33, 64), (3, 4, 1), (17, 37, 131), (3, 37, 65)),
):
    query, database, excluded = pack(draw(n, sites, 1)), pack(draw(m, sites, 2)), exclusions(kind, n, m)
    check(nearest.hamming_cross, query, database)
    check(nearest.hamming_topk, query, database, 3, **excluded)
    for radius in (0, sites // 3, 10**9)[m % 2 :]:
        check(nearest.hamming_range, query, database, radius, **excluded)
given = tensor(query), tensor(database), 50, True, None
counted = triton_bits.hamming_topk(*given, method="popcount")
same(tuple(x.numpy() for x in counted), nearest.hamming_topk(query, database, 50, exclude_self=True))
""")


def test_genotypes():
    interpreted("""
for kind, (n, m, sites) in zip(EXCLUSIONS, ((0, 5, 9), (5, 0, 9), (17, 40, 131), (1, 33, 64), (3, 4, 1))):
    x, y, excluded = people(n, sites, 1), people(m, sites, 2), exclusions(kind, n, m)
    for query, database in ((x, y), (x[:1], y[:1])) if n < 17 else ((x, y[:1]),):
        query, database = genotype_planes(*query), genotype_planes(*database)
        check(nearest.ibs_cross, query, database, sites)
        check(nearest.ibs_topk, query, database, sites, 3, **excluded)
        check(nearest.ibs_range, query, database, sites, 0.2, **excluded)
""")


def test_windows():
    interpreted("""
for kind, (n, m, sites) in zip(EXCLUSIONS, ((0, 5, 9), (5, 0, 9), (3, 40, 131), (2, 37, 200), (3, 4, 70))):
    query, database, excluded = pack(draw(n, sites, 1)), pack(draw(m, sites, 2)), exclusions(kind, n, m)
    rng = np.random.default_rng(sites)
    start = rng.integers(0, sites, 7)
    windows = np.stack([start, start + 1 + rng.integers(0, sites - start)], axis=1)
    check(nearest.hamming_windows_topk, query, database, windows, 1 + n, **excluded)
query, database = pack(draw(5, 200, 1)), pack(draw(70, 200, 2))
triton_windows._QUERIES, triton_windows.SCRATCH_BYTES = 2, 1  # tiles of 2 x 32
check(nearest.hamming_windows_topk, query, database, [(3, 70), (50, 51), (0, 200)], 3, exclude_self=True)
check(nearest.hamming_windows_topk, query, database, np.empty((0, 2), dtype=np.int64), 3)
""")


def test_longest_run():
    interpreted("""
for kind, (n, m, sites) in zip(EXCLUSIONS, ((0, 5, 9), (5, 0, 9), (2, 40, 131), (1, 33, 96), (3, 4, 1))):
    for noise, span in ((0.02, 10**5), (0.1, 5), (1.0, 10**5)):
        query, database = pack(draw(n, sites, 1, noise)), pack(draw(m, sites, 2, noise))
        position_bp = np.sort(np.random.default_rng(n).integers(0, span, sites))
        check(nearest.longest_run, query, database, sites, position_bp, **exclusions(kind, n, m))
for sites, noise in ((500, 0.01), (512, 0.2)):  # even positions with a gap: most words are passed by
    for gap in (0, 10**6):  # short runs across the gap are not
        query, database = pack(draw(2, sites, 1, noise)), pack(draw(5, sites, 2, noise))
        position_bp = np.arange(sites) * 7 + gap * (np.arange(sites) > 200)
        check(nearest.longest_run, query, database, sites, position_bp)
check(nearest.longest_run, pack(np.ones((1, 64))), pack(np.zeros((2, 64))), 64, np.arange(64))
""")


@pytest.mark.parametrize("metric", ["l2", "cosine", "correlation"])
def test_features(metric):
    interpreted(f"""
metric, all_of_one = {metric!r}, exclusions("all", 3, 5)["exclude"]
for at, kind in enumerate(FEATURE_KINDS):
    n, m, axes, k = ((9, 40, 33, 5), (3, 33, 5, 2))[at % 2]
    query, database = features(n, axes, kind, 1), features(m, axes, kind, 2)
    database[: n // 2] = query[: n // 2]
    radius = float(np.quantile(nearest.features_cross(query, database, metric=metric), 0.2))
    for product in (None, "int8", "bfloat16", "float32")[at % 2 :: 2]:
        excluded = exclusions(EXCLUSIONS[at % 4], n, m)
        check(nearest.features_topk, query, database, k, metric=metric, product=product, **excluded)
        check(nearest.features_range, query, database, radius, metric=metric, product=product, **excluded)
check(nearest.features_cross, query, database, metric=metric)
for n, m, axes in ((0, 3, 2), (3, 0, 2), (2, 3, 0)):
    query, database = features(n, axes, "normal", 1), features(m, axes, "normal", 2)
    check(nearest.features_cross, query, database, metric=metric)
    check(nearest.features_topk, query, database, 2, metric=metric)
    check(nearest.features_range, query, database, 1.0, metric=metric)
query, database = features(3, 4, "ties", 1), features(5, 4, "ties", 2)
check(nearest.features_topk, query, database, 2, metric=metric, exclude=all_of_one)
patches = np.random.default_rng(0).integers(0, 255, (40, 3, 4, 5)).astype(np.uint8)
check(nearest.features_topk, patches[:2], patches, 3, metric=metric, exclude_self=True)
""")


def test_few_pairs_are_computed_where_values_are_spread():
    interpreted("""
exact, pairs = triton_features._exact, []
triton_features._exact = lambda *given: pairs.append(given[-1].numel()) or exact(*given)
query, database = features(2, 64, "normal", 1), features(1000, 64, "normal", 2)
for product in ("bfloat16", "float32"):
    pairs.clear()
    check(nearest.features_topk, query, database, 2, product=product)
    assert sum(pairs) == 2 * 10 * 8, "k + 8 groups of 8 columns settle it"
pairs.clear()
check(nearest.features_topk, query, np.repeat(database[:2], 200, axis=0), 2)
assert sum(pairs) >= 2 * 200, "four hundred rows at two distances are not settled by so few"
""")


def test_tiles_from_the_host_and_several_devices_change_nothing():
    """The interpreter's "devices" are the CPU, several times."""
    interpreted("""
for module in (triton_shared, triton_bits, triton_features):
    module.TILE_BYTES = 20 * 24  # rows of 3 words
triton_bits.SCRATCH_BYTES = triton_features.SCRATCH_BYTES = 1000
query, database = pack(draw(4, 131, 1)), pack(draw(50, 131, 2))
x, y = genotype_planes(*people(4, 131, 1)), genotype_planes(*people(50, 131, 2))
table, more = features(4, 6, "ties", 1), features(50, 6, "ties", 2)
excluded = exclusions("both", 4, 50)
for devices, searches in (
    (["cpu"], (0, 1)), (["cpu"] * 2, (0, 1, 2, 3, 4, 5)), (["cpu"] * 3, (0, 5))
):
    for which in searches:
        function, *given = (
            (nearest.hamming_topk, query, database, 7),
            (nearest.hamming_range, query, database, 30),
            (nearest.ibs_topk, x, y, 131, 7),
            (nearest.ibs_range, x, y, 131, 0.2),
            (nearest.features_topk, table, more, 7),
            (nearest.features_range, table, more, 9.0),
        )[which]
        got = function(*given, **excluded, devices=devices)
        assert all(isinstance(part, np.ndarray) for part in got)
        same(got, function(*given, **excluded))
same(nearest.hamming_topk(query, database[:2], 5, devices=["cpu"] * 3), nearest.hamming_topk(query, database[:2], 5))
tensors = nearest.hamming_topk(tensor(query), tensor(database), 7, devices=["cpu", "cpu"])
same(tuple(part.numpy() for part in tensors), nearest.hamming_topk(query, database, 7))
""")


def test_every_kernel_compiles_ahead_of_time():
    from nearest_aot import jobs
    from triton_aot import compile_jobs

    asked = jobs()
    named = {(job["module"].rpartition(".")[2], job["kernel"]) for job in asked}
    for path in ROOM.glob("triton_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert (path.stem, node.name) in named
    for result, job in zip(compile_jobs(asked), asked, strict=True):
        assert "error" not in result, result
        assembly, kernel, arch = result["assembly"], result["kernel"], result["arch"]
        assert result["shared"] <= SHARED_BYTES[arch], (kernel, arch, job["constexprs"])
        counts = job["constexprs"].get("MODE") == 1
        if "STEP" in job["constexprs"] and not counts:
            unit = {80: "mma.sync", 90: "wgmma", "gfx942": "mfma"}[arch]
            assert unit in assembly, f"{kernel} {job['constexprs']} does not use the matrix units of {arch}"
        if counts and arch != "gfx942":
            assert "popc" in assembly
        if kernel == "ordered_kernel" and arch != "gfx942":
            assert "sqrt.rn.f64" in assembly or job["constexprs"]["L2"]
            assert assembly.count("fma.rn.f64") == 0 or not job["constexprs"]["L2"], "fused, it rounds differently"
