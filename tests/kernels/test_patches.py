"""Patches against numpy.pad, a sum voxel by voxel, and MONAI; the implementations against one another, bit for bit."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import Unsupported, UsageError
from engine.kernels import patches

sys.path.insert(0, str(Path(__file__).parent))
from child_python import run_python
from triton_aot import compile_jobs

BORDERS = ("constant", "edge", "reflect", "symmetric", "wrap")
TURNS = [(axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((0, 1), repeat=3)]
AXES, FLIPS = np.array([t[0] for t in TURNS]), np.array([t[1] for t in TURNS], dtype=bool)
GRIDS = [  # shape, roi, overlap
    ((1, 1, 1), 1, 0.0),
    ((20, 17, 30), (8, 6, 8), 0.5),
    ((5, 30, 9), (8, 6, 12), 0.25),  # smaller than the roi along two axes, odd and even difference
    ((9, 9, 9), 4, 0.7),  # more than two windows along each axis
    ((13, 7, 65), (1, 7, 64), 0.5),
    ((16, 24, 67), (8, 12, 16), (0.5, 0.0, 0.9)),
    ((31, 3, 5), (0, None, -1), 0.5),  # the whole volume
]


def same(got, wanted):
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted, strict=True)


def draw(shape, dtype="float32", seed=0):
    values = np.random.default_rng(seed).standard_normal(shape) * 50
    return (np.abs(values) if dtype.startswith("u") else values).astype(dtype)


def draw_grid(case, channels=2, seed=0):
    shape, roi, overlap = case
    n = len(patches.grid_starts(shape, roi, overlap))
    sizes = patches._roi(roi, shape)
    return np.random.default_rng(seed).standard_normal((n, channels, *sizes), dtype=np.float32)


# --- where patches lie


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 60)] * 3),
    roi=st.one_of(st.integers(0, 40), st.tuples(*[st.integers(-1, 40)] * 3)),
    overlap=st.one_of(st.floats(0, 0.999), st.tuples(*[st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.625, 0.9])] * 3)),
)
def test_grid_starts_are_monais(shape, roi, overlap):
    utils = pytest.importorskip("monai.inferers.utils")
    sizes = utils.fall_back_tuple(roi, shape)
    padded = tuple(max(s, r) for s, r in zip(shape, sizes))
    interval = utils._get_scan_interval(padded, sizes, 3, utils.ensure_tuple_rep(overlap, 3))
    slices = utils.dense_patch_slices(padded, sizes, interval)
    wanted = np.array([[s.start for s in window] for window in slices])
    wanted -= [max(r - s, 0) // 2 for s, r in zip(shape, sizes)]  # MONAI counts from the corner of the padding
    same(patches.grid_starts(shape, roi, overlap), wanted.astype(np.int64))


def test_random_starts_are_a_pure_function_and_uniform():
    starts = patches.random_starts((6, 5, 20), (4, 5, 32), 6000, 3)
    same(starts, patches.random_starts((6, 5, 20), (4, 5, 32), 6000, 3))
    same(starts[:17], patches.random_starts((6, 5, 20), (4, 5, 32), 17, 3))
    assert (starts != patches.random_starts((6, 5, 20), (4, 5, 32), 6000, 4)).any()
    assert (starts[:, 1] == 0).all()
    assert (starts[:, 2] == -6).all()  # smaller than the roi: as the grid has it
    counts = np.bincount(starts[:, 0], minlength=3)
    assert len(counts) == 3
    assert (np.abs(counts - 2000) < 5 * np.sqrt(6000 * 2 / 9)).all()
    assert patches.random_starts((6, 5, 20), 4, 0, 3).shape == (0, 3)


def test_foreground_voxels_are_drawn_evenly_and_without_rejection():
    mask = np.zeros((8, 9, 70), dtype=np.uint8)
    places = [(0, 0, 0), (3, 4, 5), (3, 4, 63), (3, 8, 64), (7, 8, 69)]
    for place in places:
        mask[place] = 7
    starts = patches.random_starts(mask.shape, 1, 5000, 1, mask_dhw=mask)
    found = {tuple(place): count for place, count in zip(*np.unique(starts, axis=0, return_counts=True))}
    assert sorted(found) == places
    assert all(abs(count - 1000) < 5 * np.sqrt(5000 * 0.16) for count in found.values())
    centred = patches.random_starts(mask.shape, (4, 3, 8), 200, 1, mask_dhw=mask)
    assert {tuple(s) for s in centred} == {(0, 0, 0), (1, 3, 1), (1, 3, 59), (1, 6, 60), (4, 6, 62)}
    half = patches.random_starts(mask.shape, 1, 4000, 1, mask_dhw=mask != 0, foreground=0.5)
    assert abs(sum(tuple(s) in places for s in half) - 2000) < 5 * np.sqrt(1000) + 40
    uniform = patches.random_starts(mask.shape, 1, 50, 1)
    same(patches.random_starts(mask.shape, 1, 50, 1, mask_dhw=mask, foreground=0.0), uniform)


# --- gather


def voxel(volume_dhw, position, border, value):
    """The voxel at any position, from the words of numpy.pad's documentation; walks step by step."""
    index = []
    for p, size in zip(position, volume_dhw.shape):
        while not 0 <= p < size:
            if border == "constant":
                return value
            if border == "edge":
                p = min(max(p, 0), size - 1)
            elif border == "reflect":
                p = 0 if size == 1 else (-p if p < 0 else 2 * (size - 1) - p)
            elif border == "symmetric":
                p = -1 - p if p < 0 else 2 * size - 1 - p
            else:
                p += size if p < 0 else -size
        index.append(p)
    return volume_dhw[tuple(index)]


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("implementation", ["reference", "numba"])
def test_gather_voxel_by_voxel(border, implementation):
    volume, roi = draw((4, 3, 5), "int16"), (3, 5, 4)
    starts = np.random.default_rng(1).integers(-9, 12, (len(TURNS), 3))
    starts[::2] //= 5
    got = patches.gather(
        volume, starts, roi, axes_n3=AXES, flips_n3=FLIPS, border=border, value=-7, implementation=implementation
    )
    wanted = np.empty_like(got)
    for n, (start, (axes, flips)) in enumerate(zip(starts, TURNS)):
        for k in np.ndindex(*roi):
            position = list(start)
            for j in range(3):
                position[axes[j]] += roi[j] - 1 - k[j] if flips[j] else k[j]
            wanted[(n, *k)] = voxel(volume, position, border, -7)
    same(got, wanted)
    assert len(np.unique(got)) > 20


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
@pytest.mark.parametrize("roi", [1, (1, 3, 63), (3, 1, 64), (2, 2, 65), (7, 5, 3)])
def test_implementations_gather_the_same(dtype, roi):
    volume = draw((2, 9, 11, 68), dtype)
    rng = np.random.default_rng(2)
    starts = np.concatenate([rng.integers(-80, 90, (48, 3)), rng.integers(0, 3, (48, 3))])
    turned = {"axes_n3": np.tile(AXES, (2, 1)), "flips_n3": np.tile(FLIPS, (2, 1))}
    for border, extra in itertools.product(BORDERS, ({}, turned)):
        for arithmetic in ({}, {"dtype": "float32"}, {"scale": 0.37, "offset": -2.2}):
            options = {"border": border, "value": 5} | extra | arithmetic
            wanted = patches.gather(volume, starts, roi, implementation="reference", **options)
            out = np.full(wanted.shape, 77, dtype=wanted.dtype)
            assert patches.gather(volume, starts, roi, out=out, **options) is out
            same(out, wanted)


def test_gather_of_a_grid_shares_lines_and_is_the_same():
    volume = draw((13, 15, 70))
    starts = patches.grid_starts(volume.shape, (4, 5, 16), 0.5)
    got = patches.gather(volume, starts, (4, 5, 16))
    for patch, (z, y, x) in zip(got, starts):
        same(patch, volume[z : z + 4, y : y + 5, x : x + 16])
    starts[::3] -= 9  # runs of patches that stick out, and runs that end
    options = {"border": "reflect", "axes_n3": np.tile([0, 1, 2], (len(starts), 1))}
    wanted = patches.gather(volume, starts, (4, 5, 16), implementation="reference", **options)
    same(patches.gather(volume, starts, (4, 5, 16), **options), wanted)


def test_gather_reads_any_layout():
    volume = draw((3, 12, 14, 16), "int16")
    starts = np.random.default_rng(0).integers(-4, 12, (9, 3))
    for view in (
        volume[:, ::2, 1:, 3:],
        volume[:, :, ::-1, ::-2],
        np.asfortranarray(volume),
        volume.transpose(0, 3, 1, 2),
        volume.astype(">i2"),
        np.broadcast_to(volume[:1], volume.shape),
        volume[1],
    ):
        wanted = patches.gather(view, starts, (3, 4, 5), border="edge", implementation="reference")
        got = patches.gather(view, starts, (3, 4, 5), border="edge")
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == np.int16


def test_gather_of_nothing_and_types():
    volume = draw((4, 5, 6), "uint8")
    assert patches.gather(volume, np.empty((0, 3), dtype=int), (2, 3, 4)).shape == (0, 2, 3, 4)
    assert patches.gather(volume[None], np.zeros((1, 3), dtype=int), 2).shape == (1, 1, 2, 2, 2)
    assert patches.gather(volume, [[0, 0, 0]], 2, scale=2.0).dtype == np.float32
    assert patches.gather(volume, [[0, 0, 0]], 2, dtype=np.float32).dtype == np.float32
    assert patches.gather(volume, [[0, 0, 0]], 2).dtype == np.uint8
    scaled = patches.gather(volume, [[-2, 0, 0]], 2, value=3, scale=0.1, offset=1.0)
    assert (scaled == np.float32(3) * np.float32(0.1) + np.float32(1)).all()  # the constant is scaled like a voxel
    nan = patches.gather(volume.astype(np.float32), [[-2, 0, 0]], 2, value=np.nan)
    assert np.isnan(nan).all()


# --- blend


def weight_of(roi, window):
    """Importance of each voxel of a window, in float64, from the formula."""
    if window == "constant":
        return np.ones(roi)
    axes = [np.exp(-((np.arange(r) - (r - 1) / 2) ** 2) / (2 * (0.125 * r) ** 2)) for r in roi]
    weight = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    return np.maximum(weight, max(weight.min(), 1e-3))


@pytest.mark.parametrize("window", ["constant", "gaussian"])
@pytest.mark.parametrize("case", GRIDS, ids=str)
def test_blend_is_the_weighted_mean_of_each_voxel(case, window):
    shape, roi, overlap = case
    predicted = draw_grid(case)
    weight = weight_of(predicted.shape[2:], window)
    total, weights = np.zeros((2, *shape)), np.zeros(shape)
    for patch, start in zip(predicted, patches.grid_starts(shape, roi, overlap)):
        for k in np.ndindex(*weight.shape):
            position = tuple(np.add(start, k))
            if all(0 <= p < s for p, s in zip(position, shape)):
                total[(slice(None), *position)] += weight[k] * patch[(slice(None), *k)]
                weights[position] += weight[k]
    for implementation in ("reference", "numba"):
        got = patches.blend(predicted, shape, roi, overlap, window=window, implementation=implementation)
        np.testing.assert_allclose(got, total / weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@pytest.mark.parametrize("case", [*GRIDS[1:], ((40, 65, 50), 16, 0.5), ((7, 8, 6), (16, 9, 12), 0.5)], ids=str)
def test_sliding_window_is_monais(case, mode):
    inferers = pytest.importorskip("monai.inferers")
    torch = pytest.importorskip("torch")
    shape, roi, overlap = case
    volume = draw((2, *shape)) / 50

    def network(x):  # five channels, and no voxel like its neighbour in the patch
        ramp = torch.linspace(0.5, 1.5, x.shape[-1])
        return torch.cat([x * ramp, x.flip(2), x[:, :1] ** 2], dim=1)

    options = {"overlap": overlap, "mode": mode, "cval": 0.25, "sigma_scale": 0.2, "padding_mode": "constant"}
    sizes = patches._roi(roi, shape)
    wanted = inferers.sliding_window_inference(torch.from_numpy(volume)[None], sizes, 3, network, **options)
    got = patches.sliding_window(
        volume, lambda x: network(torch.from_numpy(x)), roi, overlap, batch=3, window=mode, sigma_scale=0.2, value=0.25
    )
    assert got.shape == (5, *shape)
    np.testing.assert_allclose(got, wanted[0].numpy(), rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize(("monais", "border"), [("replicate", "edge"), ("reflect", "reflect"), ("circular", "wrap")])
def test_borders_of_a_small_volume_are_monais(monais, border):
    inferers = pytest.importorskip("monai.inferers")
    torch = pytest.importorskip("torch")
    volume = draw((9, 14, 8)) / 50
    wanted = inferers.sliding_window_inference(
        torch.from_numpy(volume)[None, None],
        (12, 8, 11),
        2,
        lambda x: x.roll((3, -2), (2, 4)),
        overlap=0.5,
        mode="gaussian",
        padding_mode=monais,
    )
    got = patches.sliding_window(volume, lambda x: np.roll(x, (3, -2), (2, 4)), (12, 8, 11), border=border)
    np.testing.assert_allclose(got, wanted[0, 0].numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", ["constant", "gaussian"])
@pytest.mark.parametrize("case", GRIDS, ids=str)
def test_implementations_blend_the_same(case, window, tmp_path):
    shape, roi, overlap = case
    predicted = draw_grid(case, channels=3)
    wanted = patches.blend(predicted, shape, roi, overlap, window=window, implementation="reference")
    place = np.full((3, *shape), np.nan, dtype=np.float32)
    assert patches.blend(predicted, shape, roi, overlap, window=window, out=place) is place
    same(place, wanted)
    ring = np.full((3, *shape), np.nan)  # not float32: through the ring
    patches.blend(predicted, shape, roi, overlap, window=window, out=ring)
    same(ring.astype(np.float32), wanted)
    mapped = np.memmap(tmp_path / "out", np.float32, "w+", shape=(3, *shape))
    patches.blend(predicted, shape, roi, overlap, window=window, out=mapped)
    same(np.array(mapped), wanted)
    for sizes in (
        [1] * len(predicted),
        [len(predicted) // 2, len(predicted) - len(predicted) // 2],
        [3] * len(predicted),
    ):
        ends = np.cumsum(sizes)
        batches = [b for b in np.split(predicted, ends[ends < len(predicted)]) if len(b)]
        same(patches.blend(iter(batches), shape, roi, overlap, window=window), wanted)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 24)] * 3),
    roi=st.tuples(*[st.integers(1, 12)] * 3),
    overlap=st.tuples(*[st.floats(0, 0.9)] * 3),
    seed=st.integers(0, 99),
)
def test_any_grid(shape, roi, overlap, seed):
    predicted = draw_grid((shape, roi, overlap), channels=1, seed=seed)
    if predicted.size < 2e6:
        wanted = patches.blend(predicted, shape, roi, overlap, implementation="reference")
        same(patches.blend(predicted, shape, roi, overlap), wanted)


def test_half_precision_patches_and_special_values():
    shape, roi, overlap = case = GRIDS[1]
    half = draw_grid(case).astype(np.float16)
    same(patches.blend(half, shape, roi, overlap), patches.blend(half.astype(np.float32), shape, roi, overlap))
    constant = np.full_like(half, 3.0, dtype=np.float32)
    np.testing.assert_allclose(patches.blend(constant, shape, roi, overlap), 3.0, rtol=2e-6)
    constant[0, 0, 0, 0, 0] = np.nan
    assert np.isnan(patches.blend(constant, shape, roi, overlap)).sum() == 1


def test_thread_count_and_batch_change_nothing():
    volume = draw((2, 40, 33, 50), "int16")
    starts = patches.random_starts((40, 33, 50), 16, 50, 0)
    threads, results = numba.get_num_threads(), []
    try:
        for count, batch in itertools.product(sorted({1, threads}), (1, 3, 5, 11, 1000)):
            numba.set_num_threads(count)
            blended = patches.sliding_window(volume, lambda x: x * 2, 16, 0.5, batch=batch, scale=0.1)
            results.append((blended, patches.gather(volume, starts, 16)))
    finally:
        numba.set_num_threads(threads)
    for got in results:
        same(got[0], results[0][0])
        same(got[1], results[0][1])


# --- streams


class Recorder:
    """Known by shape, dtype and slicing only; counts how often each layer is read and written."""

    def __init__(self, array, chunks=None):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.reads, self.writes = np.zeros((2, array.shape[-3]), dtype=int)
        self.pieces = []
        if chunks:
            self.chunks = chunks

    def layers(self, key):
        return key[-1] if isinstance(key, tuple) else key

    def __getitem__(self, key):
        self.reads[self.layers(key)] += 1
        return self.array[key]

    def __setitem__(self, key, value):
        self.writes[self.layers(key)] += 1
        self.pieces.append((self.layers(key).start, self.layers(key).stop))
        self.array[key] = value


@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("chunk", [None, 1, 4, 7, 100])
def test_layers_are_read_once_and_written_once(axes, chunk):
    shape, roi = (29, 12, 20), (8, 6, 8)
    volume = draw(shape if axes == 3 else (2, *shape))
    wanted = patches.sliding_window(volume, lambda x: x + 1, roi, 0.5)
    before = volume.copy()
    source = Recorder(volume)
    target = Recorder(np.full(volume.shape, np.nan), chunks=chunk and (*volume.shape[:-3], chunk, 5, 5))
    assert patches.sliding_window(source, lambda x: x + 1, roi, 0.5, out=target) is target
    same(target.array.astype(np.float32), wanted)
    same(volume, before)
    assert (source.reads == 1).all()
    assert (target.writes == 1).all()
    if chunk:
        assert all(a % chunk == 0 and (b % chunk == 0 or b == 29) for a, b in target.pieces)


def test_zarr_and_memory_maps(tmp_path):
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    volume = draw((2, 37, 20, 24), "int16")
    wanted = patches.sliding_window(volume, lambda x: x[:, :1], (16, 8, 12), 0.25, scale=0.5)
    source = zarr.create_array(tmp_path / "in.zarr", shape=volume.shape, chunks=(1, 5, 20, 24), dtype="int16")
    source[:] = volume
    target = zarr.create_array(
        tmp_path / "out.zarr", shape=(1, 37, 20, 24), chunks=(1, 4, 10, 24), shards=(1, 8, 20, 24), dtype="float32"
    )
    patches.sliding_window(source, lambda x: x[:, :1], (16, 8, 12), 0.25, scale=0.5, out=target)
    same(target[:], wanted)
    np.save(tmp_path / "in.npy", volume)
    mapped = np.memmap(tmp_path / "out", np.float32, "w+", shape=wanted.shape)
    on_disk = np.load(tmp_path / "in.npy", mmap_mode="r")
    patches.sliding_window(on_disk, lambda x: x[:, :1], (16, 8, 12), 0.25, scale=0.5, out=mapped)
    same(np.array(mapped), wanted)


def test_layers_come_as_soon_as_no_later_patch_touches_them():
    shape, roi = (20, 10, 10), (8, 6, 6)
    predicted = draw_grid((shape, roi, 0.5))
    per_row = len(patches.grid_starts((*shape[1:], 1), (6, 6, 1), 0.5))
    taken = 0

    def batches():
        nonlocal taken
        for patch in predicted:
            taken += 1
            yield patch[None]

    wanted, end = patches.blend(predicted, shape, roi), 0
    for first, layers in patches.blend_layers(batches(), shape, roi):
        assert first == end
        end += layers.shape[1]
        row = 4 if end == 20 else -(-end // 4)  # rows of windows begin at 0, 4, 8 and 12
        assert taken == row * per_row
        same(layers.copy(), wanted[:, first:end])
    assert end == 20


def test_memory_does_not_grow_with_depth():
    code = """
import resource, sys
import numpy as np
from engine.kernels import patches
class Made:
    dtype = np.dtype("int16")
    def __init__(self, depth): self.shape = (depth, 160, 160)
    def __getitem__(self, layers): return np.full((layers.stop - layers.start, 160, 160), 7, dtype=np.int16)
    def __setitem__(self, layers, values): assert np.allclose(values, 7)
def peak(depth):
    volume = Made(depth)
    patches.sliding_window(volume, lambda x: x, 32, 0.5, out=volume)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(peak(64), peak(2000))
"""
    small, large = map(float, run_python(code, 900, NUMBA_NUM_THREADS="1").split())
    assert large - small < 4  # MiB; the volume has 195 MiB as float32


# --- refusals


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda v, p: patches.grid_starts((4, 4), 2, 0.5), "shape"),
        (lambda v, p: patches.grid_starts((4, 0, 4), 2, 0.5), "voxel"),
        (lambda v, p: patches.grid_starts((4, 4, 4), (2, 2), 0.5), "roi"),
        (lambda v, p: patches.grid_starts((4, 4, 4), "a", 0.5), "roi"),
        (lambda v, p: patches.grid_starts((4, 4, 4), 2, 1.0), "overlap"),
        (lambda v, p: patches.random_starts((4, 4, 4), 2, -1, 0), "n and seed"),
        (lambda v, p: patches.random_starts((4, 4, 4), 2, 1, 0, mask_dhw=np.zeros((4, 4, 4))), "foreground"),
        (lambda v, p: patches.random_starts((4, 4, 4), 2, 1, 0, mask_dhw=np.ones((4, 4))), "mask of shape"),
        (lambda v, p: patches.random_starts((4, 4, 4), 2, 1, 0, foreground=1.5), "foreground"),
        (lambda v, p: patches.gather(v.astype(np.float64), [[0, 0, 0]], 2), "float64.*astype"),
        (lambda v, p: patches.gather(v > 0, [[0, 0, 0]], 2), "view"),
        (lambda v, p: patches.gather(v[0], [[0, 0, 0]], 2), r"\(d, h, w\)"),
        (lambda v, p: patches.gather(v.tolist(), [[0, 0, 0]], 2), "NumPy"),
        (lambda v, p: patches.gather(v, [[0, 0]], 2), "starts_n3"),
        (lambda v, p: patches.gather(v, [[0.5, 0, 0]], 2), "integers"),
        (lambda v, p: patches.gather(v, [[2**40, 0, 0]], 2), "within"),
        (lambda v, p: patches.gather(v, [[0, 0, 0]], 0), "roi"),
        (lambda v, p: patches.gather(v, [[0, 0, 0]], 2, axes_n3=[[0, 0, 1]]), "permutation"),
        (lambda v, p: patches.gather(v, [[0, 0, 0]], 2, flips_n3=[[0, 0, 1]]), "booleans"),
        (lambda v, p: patches.gather(v, [[0, 0, 0]], 2, flips_n3=[[True] * 3] * 2), r"\(1, 3\)"),
        (lambda v, p: patches.gather(v, [[0, 0, 0]], 2, border="mirror"), "reflect"),
        (lambda v, p: patches.gather(v, [[0, 0, 0]], 2, dtype="int16"), "float32"),
        (lambda v, p: patches.gather(v.astype(np.uint8), [[0, 0, 0]], 2, value=-1), "value"),
        (lambda v, p: patches.gather(v.astype(np.uint8), [[0, 0, 0]], 2, dtype="uint8", scale=2.0), "without scale"),
        (lambda v, p: patches.gather(v, [[0, 0, 0]], 2, out=np.zeros((1, 2, 2, 3), np.float32)), "out"),
        (lambda v, p: patches.gather(v, [[0, 0, 0]], 2, implementation="cuda"), "reference, numba or triton"),
        (lambda v, p: patches.blend(p[1:], v.shape, 4), "8 patches, got 7"),
        (lambda v, p: patches.blend(np.concatenate([p, p[:1]]), v.shape, 4), "8 patches, got more"),
        (lambda v, p: patches.blend([p, p[:1]], v.shape, 4), "8 patches, got more"),
        (lambda v, p: patches.blend([], v.shape, 4), "8 patches, got none"),
        (lambda v, p: patches.blend(p[:, 0], v.shape, 4), "patches"),
        (lambda v, p: patches.blend([p[:4], p[4:].repeat(2, axis=1)], v.shape, 4), "2 channels"),
        (lambda v, p: patches.blend(p.astype(np.float64), v.shape, 4), "float64"),
        (lambda v, p: patches.blend(p, v.shape, 4, window="hann"), "gaussian"),
        (lambda v, p: patches.blend(p, v.shape, 4, sigma_scale=0), "sigma_scale"),
        (lambda v, p: patches.blend(p, v.shape, 4, out=np.zeros((2, 6, 6, 6), np.float32)), "out of shape"),
        (lambda v, p: patches.sliding_window(v, lambda x: x[..., 1:], 4), "patches"),
        (lambda v, p: patches.sliding_window(v, lambda x: [x], 4), "list"),
        (lambda v, p: patches.sliding_window(v, lambda x: x, 4, batch=0), "batch"),
        (lambda v, p: patches.sliding_window(v, lambda x: x, 4, out=v), "beside"),
        (lambda v, p: patches.sliding_window(v.tolist(), lambda x: x, 4), "volume"),
    ],
)
def test_bad_input_is_one_line(call, says):
    volume = draw((6, 6, 6))
    with pytest.raises(UsageError, match=says) as caught:
        call(volume, draw_grid((volume.shape, 4, 0.5), channels=1))
    assert "\n" not in str(caught.value)


def test_a_network_that_overwrites_its_last_answer_is_caught():
    answer = np.zeros((1, 1, 4, 4, 4), dtype=np.float32)
    with pytest.raises(UsageError, match="share memory"):
        patches.sliding_window(draw((6, 6, 6)), lambda x: answer[: len(x)], 4, batch=1)


def test_a_named_implementation_is_never_replaced():
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    volume = torch.zeros((4, 4, 4))
    with pytest.raises(Unsupported, match="triton"):
        patches.gather(volume.numpy(), [[0, 0, 0]], 2, implementation="triton")
    with pytest.raises(Unsupported, match="CUDA"):
        patches.gather(volume, [[0, 0, 0]], 2)
    with pytest.raises(Unsupported, match="numba"):
        patches.gather(volume, [[0, 0, 0]], 2, implementation="numba")
    with pytest.raises(Unsupported, match="CUDA"):
        patches.blend(volume[None, None], (4, 4, 4), 4)
    with pytest.raises(Unsupported, match="CUDA"):
        patches.sliding_window(volume.numpy(), lambda x: x, 4, device="cpu")


# --- other processors


def test_avx2_path_is_right_and_compiled_functions_are_cached(tmp_path):
    code = """
import json
import numpy as np
from engine.kernels import patches
from engine.kernels.patches import numba_cpu
volume = np.random.default_rng(0).integers(-999, 999, (1, 20, 31, 40), dtype=np.int16)
a, b = (patches.sliding_window(volume, lambda x: x, 12, 0.5, scale=0.3, implementation=name) for name in ("numba", "reference"))
assert np.array_equal(a, b)
stats = [f.stats for f in (numba_cpu._blend_row, numba_cpu._gather)]
code = "" if stats[0].cache_hits else "".join(numba_cpu._blend_layer.inspect_asm().values())
print(json.dumps(["zmm" in code, "ymm" in code, *(sum(s.cache_hits.values()) for s in stats)]))
"""
    variables = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    if not numba.core.codegen.get_host_cpu_features().count("+avx2"):
        pytest.skip("no AVX2 here")
    assert json.loads(run_python(code, 900, **variables)) == [False, True, 0, 0]
    assert json.loads(run_python(code, 900, **variables))[2:] == [1, 1]


def test_triton_in_its_interpreter():
    pytest.importorskip("triton")
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import itertools
import triton_interpreter
import numpy as np, torch
from test_patches import AXES, BORDERS, FLIPS, GRIDS, draw, draw_grid, same
from engine.kernels import patches
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True  # poisons torch.empty
assert torch.isnan(torch.empty(3)).all()
rng = np.random.default_rng(0)
for dtype, roi, borders, step in (
    ("uint8", (5, 7, 6), BORDERS, 5),
    ("int16", 1, ("wrap",), 1),  # all 48 turns and reflections
    ("uint16", (3, 2, 33), ("constant", "reflect"), 5),
    ("float32", (34, 2, 35), ("symmetric",), 7),
):
    volume = draw((2, 9, 11, 40), dtype)
    tensor = torch.from_numpy(volume)
    transposed = tensor.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    starts = rng.integers(-50, 60, (48, 3))
    starts[::2] //= 10
    starts = starts[::step]
    for border, arithmetic in itertools.product(borders, ({{}}, {{"scale": 0.37, "offset": -2.2}})):
        options = {{"border": border, "value": 5, "axes_n3": AXES[::step], "flips_n3": FLIPS[::step]}} | arithmetic
        wanted = patches.gather(volume, starts, roi, implementation="reference", **options)
        same(patches.gather(tensor, torch.from_numpy(starts), roi, **options).numpy(), wanted)
        if border == borders[-1]:
            same(patches.gather(transposed, starts, roi, **options).numpy(), wanted)
            half = patches.gather(tensor, starts, roi, **options, dtype=torch.float16)
            same(half.numpy(), wanted.astype(np.float16))
    assert patches.gather(tensor[0], starts[:0], 3).shape == (0, 3, 3, 3)
for number, case in enumerate(GRIDS):
    shape, roi, overlap = case
    window = ("gaussian", "constant")[number % 2]
    predicted = draw_grid(case, channels=1 + (number == 2))
    wanted = patches.blend(predicted, shape, roi, overlap, window=window, implementation="reference")
    batches = torch.from_numpy(predicted).split(3)
    same(patches.blend(iter(batches), shape, roi, overlap, window=window).numpy(), wanted)
    if number == 2:
        host = np.full(wanted.shape, np.nan)
        patches.blend(batches, shape, roi, overlap, window=window, out=host)
        same(host.astype(np.float32), wanted)
        half = predicted.astype(np.float16)
        wanted = patches.blend(half, shape, roi, overlap, window=window, implementation="reference")
        same(patches.blend(torch.from_numpy(half), shape, roi, overlap, window=window).numpy(), wanted)
volume = draw((21, 9, 14), "int16")
wanted = patches.sliding_window(volume, lambda x: x * 2, (8, 6, 8), 0.5, scale=0.3)
network = lambda x: x.mul(2)
same(patches.sliding_window(torch.from_numpy(volume), network, (8, 6, 8), 0.5, scale=0.3).numpy(), wanted)
same(patches.sliding_window(volume, lambda x: x.mul_(2), (8, 6, 8), 0.5, scale=0.3, device="cpu").numpy(), wanted)
try:
    kept = torch.zeros((9, 1, 8, 6, 8))
    patches.sliding_window(volume, lambda x: kept[: len(x)], (8, 6, 8), 0.5, batch=2, device="cpu")
except patches.UsageError as error:
    assert "share memory" in str(error)
    print("done")
"""
    assert run_python(code, 900, TRITON_INTERPRET="1") == "done"


def test_triton_compiles_ahead_of_time():
    pytest.importorskip("triton")
    gather = dict.fromkeys(("channels", "tiles", "step_w", "depth", "height", "width"), "i32")
    gather |= dict.fromkeys(("step_c", "step_d", "step_h"), "i64") | dict.fromkeys(("value", "scale", "offset"), "fp32")
    roi, blend = {"D": 96, "H": 96, "W": 96}, dict.fromkeys(("starts_z_ptr", "starts_y_ptr", "starts_x_ptr"), "*i64")
    blend |= dict.fromkeys(("weights_z_ptr", "weights_y_ptr", "weights_x_ptr", "out_ptr"), "*fp32")
    blend |= dict.fromkeys(("table_ptr", "cover_y_ptr", "cover_x_ptr"), "*i64") | {"step_c": "i64", "floor": "fp32"}
    blend |= dict.fromkeys(("oldest", "rows", "count_y", "count_x", "first", "height", "width"), "i32")
    kernels = []
    for (source, target), border in zip(
        (("i16", "fp32"), ("u8", "u8"), ("bf16", "bf16"), ("fp32", "fp16"), ("u16", "fp32")), range(5)
    ):
        pointers = {"volume_ptr": f"*{source}", "out_ptr": f"*{target}", "table_ptr": "*i64"}
        common = roi | {"BORDER": border, "SCALED": source != target}
        kernels += [
            ("gather_kernel", pointers | gather, common | {"LINES": 16, "COLUMNS": 128}),
            ("gather_turned_kernel", pointers | gather, common | {"TILE": 32}),
        ]
    for kind in ("fp32", "bf16"):
        kernels.append(("blend_kernel", blend | {"like_ptr": f"*{kind}"}, roi | {"LINES": 8, "COLUMNS": 128}))
    jobs = [
        {
            "module": "engine.kernels.patches.triton_gpu",
            "kernel": kernel,
            "signature": signature,
            "constexprs": constants,
        }
        | {"num_warps": 4, "arch": arch, "options": {"enable_fp_fusion": False}}
        for arch in (80, 90, "gfx942")
        for kernel, signature, constants in kernels
    ]
    results = compile_jobs(jobs)
    assert len(results) == 3 * len(kernels)
    for result in results:
        assert "error" not in result, result
        assert not any(word in result["assembly"] for word in ("atom.", "red.global", "atomic_")), "an atomic"
        if result["arch"] in (80, 90):
            assert "fma.rn.f32" not in result["assembly"] or result["kernel"] == "blend_kernel"
