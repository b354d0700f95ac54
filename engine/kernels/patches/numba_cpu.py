"""Patches on the CPU, where everything is a matter of how often a line of voxels passes through memory.

Gather: per patch and axis a table of offsets into the volume (flips, axes and border are in the table), then lines are copied;
neighbouring patches of one row of the grid are copied line by line together, so that the source is read as one stream.

Blend: the patches of a whole row of the grid (all x) are added to a ring of layers line by line; the line stays in the
first-level cache meanwhile. The first window at a voxel stores, later ones add, and after the last one the line is divided
by its sum of weights, computed then and there: the clamp of the Gaussian makes the sum no product of three sums,
and reading a volume of weights would cost more than making them. Each line belongs to one thread and its sum runs in
the order of the grid: no thread count and no batch size changes a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.patches.grid import Grid, addresses, collected

_Three = tuple[np.ndarray, np.ndarray, np.ndarray]  # along z, y and x
_AHEAD = 8  # lines; 4 to 16 do as well
_BORDERS = {"constant": 0, "edge": 1, "reflect": 2, "symmetric": 3, "wrap": 4}


def gather(
    volume_cdhw: np.ndarray,
    out_ncdhw: np.ndarray,
    starts_n3: np.ndarray,
    flips_n3: np.ndarray,
    axes_n3: np.ndarray,
    border: str,
    value: float,
    scale: float,
    offset: float,
) -> None:
    """Fill `out` (n c d h w) with patches of `volume` (c d h w) that start at `starts`, turned by `axes` and then `flips`."""
    if not out_ncdhw.size:
        return
    steps = np.array(volume_cdhw.strides) // volume_cdhw.itemsize
    span = int(np.dot(np.array(volume_cdhw.shape) - 1, steps)) + 1
    flat = np.lib.stride_tricks.as_strided(volume_cdhw, (span,), (volume_cdhw.itemsize,), writeable=False)
    sizes, roi = np.array(volume_cdhw.shape[1:]), np.array(out_ncdhw.shape[2:])
    table = np.empty((len(out_ncdhw), int(roi.sum())), dtype=np.int64)
    inside = np.empty((len(out_ncdhw), 3), dtype=np.int64)
    run = np.empty(len(out_ncdhw) + 1, dtype=np.int64)
    runs = _tables(sizes, steps[1:], roi, starts_n3, flips_n3, axes_n3, _BORDERS[border], table, inside, run)
    scaled = (scale, offset) != (1, 0) or out_ncdhw.dtype != volume_cdhw.dtype
    outside = volume_cdhw.dtype.type(value)
    _gather(
        flat,
        steps[0],
        table,
        inside,
        run[: runs + 1],
        outside,
        scaled,
        np.float32(scale),
        np.float32(offset),
        out_ncdhw,
    )


def layers(
    batches: Iterable[np.ndarray], grid: Grid, into_cdhw: np.ndarray | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """(first layer, finished layers (c d h w)), in order; the layers are a view of the ring until the next step, or of `into`,
    which then serves as the ring.
    """
    depth, height, width = grid.shape
    acc_cdhw = into_cdhw
    weights_kx, floors_kx, third = _weights_along_x(grid)
    rows = collected(batches, len(grid.starts[2]))
    for iz in range(len(grid.starts[0])):
        for iy in range(len(grid.starts[1])):
            parts = next(rows)
            if acc_cdhw is None:
                channels = parts[0].shape[1]
                acc_cdhw = np.empty((channels, min(grid.roi[0], depth), height, width), dtype=np.float32)
            _blend_row(
                acc_cdhw, addresses(parts), iz, iy, depth, *grid.starts, *grid.weights, grid.floor,
                *grid.cover[:2], weights_kx, floors_kx, third,
            )  # fmt: skip
        first, end = grid.finished(iz)
        assert acc_cdhw is not None
        while first < end:  # at most twice: where the ring begins anew
            at = first % acc_cdhw.shape[1]
            count = min(end - first, acc_cdhw.shape[1] - at)
            yield first, acc_cdhw[:, at : at + count]
            first += count


def _weights_along_x(grid: Grid) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """For each position along x the weight in the k-th window that covers it and the least weight there, float32 (K, width),
    K even; both 0 where fewer windows do, so that max(scale * weight, least) is 0. And the part of x that has more than two.
    """
    first, end = grid.cover[2]
    count = int((end - first).max())
    window = first + np.arange(count + count % 2)[:, None]
    covered = window < end
    at = np.arange(grid.shape[2]) - grid.starts[2][np.minimum(window, end - 1)]
    weights_kx = np.where(covered, grid.weights[2][at], np.float32(0))
    more = np.flatnonzero(end - first > 2)
    third = (int(more[0]), int(more[-1]) + 1) if len(more) else (0, 0)
    return weights_kx, np.where(covered, grid.floor, np.float32(0)), third


@numba.njit(cache=True, nogil=True)
def _mirrored(i: int, size: int, border: int) -> int:
    """Index that position `i` of an axis reads, by numpy.pad's definition of the border; -1: the constant."""
    if 0 <= i < size:
        return i
    if border == 0:
        return -1
    if border == 1:
        return 0 if i < 0 else size - 1
    if border == 2:
        period = max(2 * (size - 1), 1)
        i %= period
        return i if i < size else period - i
    if border == 3:
        i %= 2 * size
        return i if i < size else 2 * size - 1 - i
    return i % size


@numba.njit(cache=True, nogil=True)
def _tables(sizes, steps, roi, starts_n3, flips_n3, axes_n3, border, table, inside, run):  # type: ignore[no-untyped-def]
    """Offsets of each patch along z, y and x of `out`, -1 outside; per patch (first, end, step) of the part of x that is
    inside the volume; returns how many runs of patches share z and y, with their beginnings in `run`.
    """
    runs = 0
    for p in range(len(table)):
        at = 0
        for j in range(3):
            axis = axes_n3[p, j]
            start, size, step = starts_n3[p, axis], sizes[axis], steps[axis]
            for k in range(roi[j]):
                i = _mirrored(start + (roi[j] - 1 - k if flips_n3[p, j] else k), size, border)
                table[p, at + k] = i * step if i >= 0 else -1
            at += roi[j]
            if j == 2:
                first, end = max(-start, 0), min(size - start, roi[j])
                if flips_n3[p, j]:
                    first, end = roi[j] - end, roi[j] - first
                inside[p, 0] = min(max(first, 0), roi[j])
                inside[p, 1] = min(max(end, inside[p, 0]), roi[j])
                inside[p, 2] = -step if flips_n3[p, j] else step
        if p == 0 or not np.array_equal(table[p, : roi[0] + roi[1]], table[p - 1, : roi[0] + roi[1]]):
            run[runs] = p
            runs += 1
    run[runs] = len(table)
    return runs


@numba.njit(cache=True, nogil=True, forceinline=True)
def _copy(source, out, scaled, scale, offset):  # type: ignore[no-untyped-def]
    if scaled:
        for k in range(len(out)):
            out[k] = np.float32(source[k]) * scale + offset
    else:
        for k in range(len(out)):
            out[k] = source[k]


@numba.njit(cache=True, nogil=True, forceinline=True)
def _copy_mirrored(source: np.ndarray, out: np.ndarray, scaled: bool, scale: np.float32, offset: np.float32) -> None:
    last = np.uint64(len(out) - 1)  # unsigned, or a negative index would be looked for
    if scaled:
        for k in range(len(out)):
            out[k] = np.float32(source[last - np.uint64(k)]) * scale + offset
    else:
        for k in range(len(out)):
            out[k] = source[last - np.uint64(k)]


@numba.njit(cache=True, nogil=True)
def _copy_listed(flat, base, table, outside, out, scaled, scale, offset):  # type: ignore[no-untyped-def]
    for k in range(len(out)):
        source = flat[base + table[k]] if table[k] >= 0 else outside
        if scaled:
            out[k] = np.float32(source) * scale + offset
        else:
            out[k] = source


@intrinsic
def _prefetch(typing_context, array, at):  # type: ignore[no-untyped-def]
    """Ask for the cache line of array[at], for reading; an address outside the array does no harm."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@numba.njit(cache=True, nogil=True, forceinline=True)
def _fetch_ahead(
    flat: np.ndarray, base: int, table: np.ndarray, z: int, y: int, depth: int, height: int, width: int
) -> None:
    """Ask for the line `_AHEAD` lines on: those of a lone patch are too short and too far apart to be foreseen."""
    y += _AHEAD
    if y >= height:
        z, y = z + 1, y - height
    if z < depth and y < height:
        at = base + table[z] + table[depth + y] + table[depth + height]
        for x in range(0, width, 64 // flat.itemsize):
            _prefetch(flat, at + x)  # type: ignore[call-arg]
        _prefetch(flat, at + width - 1)  # type: ignore[call-arg]


@numba.njit(cache=True, nogil=True)
def _gather_layer(
    flat: np.ndarray, base: int, table: np.ndarray, inside: np.ndarray, outside: Any,
    scaled: bool, scale: np.float32, offset: np.float32, out_ncdhw: np.ndarray, first_p: int, end_p: int, c: int, z: int,
) -> None:  # fmt: skip
    """Layer z of channel c of the patches of one run, line by line over all of them."""
    depth, height, width = out_ncdhw.shape[2:]
    z_offset = table[first_p, z]
    for y in range(height):
        y_offset = table[first_p, depth + y]
        for p in range(first_p, end_p):
            first, end, step = inside[p]
            if first == 0 and end == width and step == 1 and z_offset >= 0 and y_offset >= 0:  # nearly always
                if end_p - first_p == 1:
                    _fetch_ahead(flat, base, table[p], z, y, depth, height, width)
                at = base + z_offset + y_offset + table[p, depth + height]
                _copy(flat[at : at + width], out_ncdhw[p, c, z, y], scaled, scale, offset)
                continue
            out, table_x = out_ncdhw[p, c, z, y], table[p, depth + height :]
            if z_offset < 0 or y_offset < 0:
                out[:] = np.float32(outside) * scale + offset if scaled else outside
                continue
            line = base + z_offset + y_offset
            if first < end and step == 1:
                at = line + table_x[first]
                _copy(flat[at : at + end - first], out[first:end], scaled, scale, offset)
            elif first < end and step == -1:
                at = line + table_x[end - 1]
                _copy_mirrored(flat[at : at + end - first], out[first:end], scaled, scale, offset)
            else:
                first, end = width, width
            if first > 0 or end < width:
                _copy_listed(flat, line, table_x[:first], outside, out[:first], scaled, scale, offset)
                _copy_listed(flat, line, table_x[end:], outside, out[end:], scaled, scale, offset)


@numba.njit(cache=True, nogil=True, parallel=True)
def _gather(
    flat: np.ndarray, step_c: int, table: np.ndarray, inside: np.ndarray, run: np.ndarray, outside: Any,
    scaled: bool, scale: np.float32, offset: np.float32, out_ncdhw: np.ndarray,
) -> None:  # fmt: skip
    channels, depth = out_ncdhw.shape[1:3]
    per_run = channels * depth
    for task in numba.prange((len(run) - 1) * per_run):
        r, c, z = task // per_run, task % per_run // depth, task % depth
        _gather_layer(
            flat, c * step_c, table, inside, outside, scaled, scale, offset, out_ncdhw, run[r], run[r + 1], c, z
        )


@intrinsic
def _pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """An integer as a pointer to float32, for numba.carray."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], ir.PointerType(ir.FloatType()))

    return types.CPointer(types.float32)(types.int64), codegen


@numba.njit(cache=True, nogil=True, forceinline=True)
def _add(out, patch, weights, scale, floor):  # type: ignore[no-untyped-def]
    for x in range(len(out)):
        w = scale * weights[x]
        w = w if w > floor else floor
        out[x] += w * patch[x]


@numba.njit(cache=True, nogil=True, forceinline=True)
def _store(out, patch, weights, scale, floor):  # type: ignore[no-untyped-def]
    for x in range(len(out)):
        w = scale * weights[x]
        w = w if w > floor else floor
        out[x] = w * patch[x]


@numba.njit(cache=True, nogil=True, forceinline=True)
def _larger(a: np.float32, b: np.float32) -> np.float32:
    return a if a > b else b


@numba.njit(cache=True, nogil=True, forceinline=True)
def _add_two(
    out: np.ndarray,
    weights_0: np.ndarray,
    floors_0: np.ndarray,
    weights_1: np.ndarray,
    floors_1: np.ndarray,
    scale: np.float32,
) -> None:
    for x in range(len(out)):
        out[x] = (out[x] + _larger(scale * weights_0[x], floors_0[x])) + _larger(scale * weights_1[x], floors_1[x])


@numba.njit(cache=True, nogil=True, forceinline=True)
def _add_eight(
    out: np.ndarray,
    weights_0: np.ndarray,
    floors_0: np.ndarray,
    weights_1: np.ndarray,
    floors_1: np.ndarray,
    scales: np.ndarray,
) -> None:
    """`_add_two` for four scales at once, with the sum in a register meanwhile."""
    a, b, c, d = scales[0], scales[1], scales[2], scales[3]
    for x in range(len(out)):
        v, w, f, g = weights_0[x], weights_1[x], floors_0[x], floors_1[x]
        total = ((out[x] + _larger(a * v, f)) + _larger(a * w, g)) + _larger(b * v, f)
        total = ((total + _larger(b * w, g)) + _larger(c * v, f)) + _larger(c * w, g)
        out[x] = (total + _larger(d * v, f)) + _larger(d * w, g)


@numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
def _divide(out: np.ndarray, line: np.ndarray) -> None:
    for x in range(len(out)):
        out[x] /= line[x]


@numba.njit(cache=True, nogil=True)
def _sum_weights(
    sums: np.ndarray, scales: np.ndarray, weights_kx: np.ndarray, floors_kx: np.ndarray, third: tuple[int, int]
) -> None:
    """Weights of all windows over a line, in the order of the grid; `scales`: those of the rows of windows over it."""
    sums[:] = 0
    for a, b in ((0, third[0]), (third[1], len(sums))):
        v, f, w, g = weights_kx[0, a:b], floors_kx[0, a:b], weights_kx[1, a:b], floors_kx[1, a:b]
        fours = len(scales) // 4 * 4
        for i in range(0, fours, 4):
            _add_eight(sums[a:b], v, f, w, g, scales[i : i + 4])
        for i in range(fours, len(scales)):
            _add_two(sums[a:b], v, f, w, g, scales[i])
    a, b = third
    for scale in scales:
        for k in range(0, len(weights_kx), 2):
            _add_two(
                sums[a:b], weights_kx[k, a:b], floors_kx[k, a:b], weights_kx[k + 1, a:b], floors_kx[k + 1, a:b], scale
            )


@numba.njit(cache=True, nogil=True)
def _blend_layer(
    acc_hw: np.ndarray, addresses: np.ndarray, channels: int, c: int, z: int, iz: int, iy: int,
    starts: _Three, weights: _Three, floor: np.float32, cover_z: np.ndarray, cover_y: np.ndarray,
    weights_kx: np.ndarray, floors_kx: np.ndarray, third: tuple[int, int],
) -> None:  # fmt: skip
    """Layer z of channel c: add the row of patches (iz, iy), and divide the lines that no later row touches."""
    height, width = acc_hw.shape
    starts_z, starts_y, starts_x = starts
    weights_z, weights_y, weights_x = weights
    shape, dz, start_y = (channels, len(weights_z), len(weights_y), len(weights_x)), z - starts_z[iz], starts_y[iy]
    sums = np.empty(width, dtype=np.float32)
    scales = np.empty((iz + 1 - cover_z[0, z]) * len(starts_y), dtype=np.float32)
    for y in range(max(start_y, 0), min(start_y + len(weights_y), height)):
        line, scale = acc_hw[y], weights_z[dz] * weights_y[y - start_y]
        fresh = cover_z[0, z] == iz and cover_y[0, y] == iy
        begun = 0  # on a fresh line nothing has been written from here on
        for ix in range(len(addresses)):
            start = starts_x[ix]
            patch = numba.carray(_pointer(addresses[ix]), shape)[c, dz, y - start_y]  # type: ignore[call-arg]
            a, b = max(start, 0), min(start + len(weights_x), width)
            m = max(begun, a) if fresh else b
            if a < m:
                _add(line[a:m], patch[a - start : m - start], weights_x[a - start : m - start], scale, floor)
            if m < b:
                _store(line[m:b], patch[m - start : b - start], weights_x[m - start : b - start], scale, floor)
            begun = b
        if cover_z[1, z] == iz + 1 and cover_y[1, y] == iy + 1:
            rows = 0
            for jz in range(cover_z[0, z], iz + 1):
                for jy in range(cover_y[0, y], iy + 1):
                    scales[rows] = weights_z[z - starts_z[jz]] * weights_y[y - starts_y[jy]]
                    rows += 1
            _sum_weights(sums, scales[:rows], weights_kx, floors_kx, third)
            _divide(line, sums)


@numba.njit(cache=True, nogil=True, parallel=True)
def _blend_row(
    acc_cdhw: np.ndarray, addresses: np.ndarray, iz: int, iy: int, depth: int,
    starts_z: np.ndarray, starts_y: np.ndarray, starts_x: np.ndarray,
    weights_z: np.ndarray, weights_y: np.ndarray, weights_x: np.ndarray, floor: np.float32,
    cover_z: np.ndarray, cover_y: np.ndarray,
    weights_kx: np.ndarray, floors_kx: np.ndarray, third: tuple[int, int],
) -> None:  # fmt: skip
    """Add the row of patches (iz, iy) to the ring `acc`, where layer z lies at z modulo its depth."""
    channels, ring = acc_cdhw.shape[:2]
    roi_d = len(weights_z)
    for task in numba.prange(channels * roi_d):
        c, k = task // roi_d, task % roi_d
        dz = k // 2 if k % 2 == 0 else roi_d - 1 - k // 2  # only upper layers are divided: let threads share both kinds
        z = starts_z[iz] + dz
        if 0 <= z < depth:
            _blend_layer(
                acc_cdhw[c, z % ring], addresses, channels, c, z, iz, iy,
                (starts_z, starts_y, starts_x), (weights_z, weights_y, weights_x), floor,
                cover_z, cover_y, weights_kx, floors_kx, third,
            )  # fmt: skip
