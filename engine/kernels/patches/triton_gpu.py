"""Patches on the GPU, where every voxel passes through memory as few times as can be.

Gather: a program copies some lines of one patch; loads and stores run along x, and border, flip and scale are arithmetic in
between. Patches whose x is another axis of the volume go through square tiles that are read along the volume's lines and
transposed on the way.

Blend: a program makes a piece of one finished layer: it sums the windows that cover it in the order of the grid and writes
once. No atomics and no zeroed memory; a voxel costs one read per window and one write. The patches are read where the network
left them, through a table of addresses, and let go as soon as no unfinished layer needs them.

Multiplications and additions are never fused, so that results equal the other implementations bit for bit. Runs in Triton's
interpreter on CPU tensors when TRITON_INTERPRET=1 was set before import.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import triton
import triton.language as tl
from triton import knobs

from engine.kernels.patches.grid import Grid, addresses, collected

INTERPRETED: bool = bool(knobs.runtime.interpret)
_BORDERS = {"constant": 0, "edge": 1, "reflect": 2, "symmetric": 3, "wrap": 4}
_PIECE = 2048  # voxels of a patch per program
_TILE = 32
_LINES, _COLUMNS = 8, 128  # piece of a layer per program


def gather(
    volume_cdhw: torch.Tensor,
    out_ncdhw: torch.Tensor,
    starts_n3: np.ndarray,
    flips_n3: np.ndarray,
    axes_n3: np.ndarray,
    border: str,
    value: float,
    scale: float,
    offset: float,
) -> None:
    """Fill `out` (n c d h w) with patches of `volume` (c d h w) that start at `starts`, turned by `axes` and then `flips`."""
    channels, *roi = out_ncdhw.shape[1:]
    turned_n = axes_n3[:, 2] != 2
    rows_k = np.concatenate([starts_n3, axes_n3, flips_n3], axis=1)
    scaled = (scale, offset) != (1, 0) or (out_ncdhw.dtype != volume_cdhw.dtype)
    for turned in (False, True):
        which = np.flatnonzero(turned_n == turned)
        if not len(which):
            continue
        table = torch.from_numpy(np.concatenate([which[:, None], rows_k[which]], axis=1)).to(volume_cdhw.device)
        if turned:
            kernel, size = gather_turned_kernel, {"TILE": _TILE}
            tiles = triton.cdiv(max(roi[:2]), _TILE) * triton.cdiv(roi[2], _TILE) * max(roi[:2])
        else:
            columns = min(triton.next_power_of_2(roi[2]), 128)
            kernel, size = gather_kernel, {"LINES": _PIECE // columns, "COLUMNS": columns}
            tiles = triton.cdiv(roi[0] * roi[1], _PIECE // columns) * triton.cdiv(roi[2], columns)
        kernel[(len(which) * tiles, channels)](
            volume_cdhw, out_ncdhw, table, channels, tiles, *volume_cdhw.stride(), *volume_cdhw.shape[1:],
            value, scale, offset,
            D=roi[0], H=roi[1], W=roi[2], BORDER=_BORDERS[border], SCALED=scaled, **size, enable_fp_fusion=False,
        )  # fmt: skip


def layers(
    batches: Iterable[torch.Tensor], grid: Grid, into_cdhw: torch.Tensor | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first layer, finished layers (c d h w)), in order, after every row of windows along z; written to `into` if given."""
    _, height, width = grid.shape
    starts_z, starts_y, starts_x = grid.starts
    rows = collected(batches, len(starts_y) * len(starts_x))
    held: list[list[torch.Tensor]] = []  # the last of them reach into unfinished layers
    on_device: list[torch.Tensor] = []
    for iz in range(len(starts_z)):
        held.append(next(rows))
        first, end = grid.finished(iz)
        oldest = int(grid.cover[0][0, first])
        held = held[len(held) - (iz + 1 - oldest) :]
        like = held[-1][0]
        if not on_device:
            tables = (*grid.starts, *grid.weights, *grid.cover[1:])
            on_device = [torch.from_numpy(np.ascontiguousarray(array)).to(like.device) for array in tables]
        table = torch.from_numpy(addresses([part for row in held for part in row])).to(like.device)
        channels = like.shape[1]
        if into_cdhw is not None:
            done = into_cdhw[:, first:end]
        else:
            done = torch.empty((channels, end - first, height, width), dtype=torch.float32, device=like.device)
        pieces = triton.cdiv(width, _COLUMNS) * triton.cdiv(height, _LINES)
        blend_kernel[(pieces, end - first, channels)](
            like, table, done, *on_device, oldest, len(held), len(starts_y), len(starts_x), first, height, width,
            done.stride(0), float(grid.floor),
            D=grid.roi[0], H=grid.roi[1], W=grid.roi[2], LINES=_LINES, COLUMNS=_COLUMNS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        yield first, done


@triton.jit
def mirrored(i, size, BORDER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Index that position `i` of an axis reads by numpy.pad's definition; clamped for the constant, which is masked apart."""
    if BORDER == 2:
        period = tl.maximum(2 * (size - 1), 1)
        i = i % period
        i = tl.where(i < 0, i + period, i)
        i = tl.where(i < size, i, period - i)
    elif BORDER == 3:
        i = i % (2 * size)
        i = tl.where(i < 0, i + 2 * size, i)
        i = tl.where(i < size, i, 2 * size - 1 - i)
    elif BORDER == 4:
        i = i % size
        i = tl.where(i < 0, i + size, i)
    return tl.minimum(tl.maximum(i, 0), size - 1)


@triton.jit
def converted(x, value, inside, scale, offset, SCALED: tl.constexpr):  # type: ignore[no-untyped-def]
    """`x`, the constant where not inside, scaled."""
    x = tl.where(inside, x, value.to(x.dtype))
    if SCALED:
        x = x.to(tl.float32) * scale + offset
    return x


@triton.jit
def picked(axis, a, b, c):  # type: ignore[no-untyped-def]
    return tl.where(axis == 0, a, tl.where(axis == 1, b, c))


@triton.jit
def gather_kernel(  # type: ignore[no-untyped-def]
    volume_ptr, out_ptr, table_ptr, channels, tiles, step_c, step_d, step_h, step_w, depth, height, width,
    value, scale, offset,
    D: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BORDER: tl.constexpr, SCALED: tl.constexpr,
    LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Patches whose x is x of the volume; z and y may be exchanged. A row of the table: patch, start, axes, flips."""
    row_ptr = table_ptr + (tl.program_id(0) // tiles) * 10
    c, tile = tl.program_id(1).to(tl.int64), tl.program_id(0) % tiles
    across: tl.constexpr = (W + COLUMNS - 1) // COLUMNS
    line = tile // across * LINES + tl.arange(0, LINES)
    k2 = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    k0, k1 = line // H, line % H
    k0 = tl.where(tl.load(row_ptr + 7) != 0, D - 1 - k0, k0)
    k1 = tl.where(tl.load(row_ptr + 8) != 0, H - 1 - k1, k1)
    exchanged = tl.load(row_ptr + 4) != 0
    z = tl.load(row_ptr + 1).to(tl.int32) + tl.where(exchanged, k1, k0)
    y = tl.load(row_ptr + 2).to(tl.int32) + tl.where(exchanged, k0, k1)
    x = tl.load(row_ptr + 3).to(tl.int32) + tl.where(tl.load(row_ptr + 9) != 0, W - 1 - k2, k2)
    real = (line < D * H)[:, None] & (k2 < W)[None, :]
    inside = real
    if BORDER == 0:
        in_line = (z >= 0) & (z < depth) & (y >= 0) & (y < height)
        inside = real & in_line[:, None] & ((x >= 0) & (x < width))[None, :]
    z, y, x = mirrored(z, depth, BORDER), mirrored(y, height, BORDER), mirrored(x, width, BORDER)
    at = z.to(tl.int64) * step_d + y.to(tl.int64) * step_h + c * step_c
    voxels = tl.load(volume_ptr + at[:, None] + (x.to(tl.int64) * step_w)[None, :], mask=inside)
    voxels = converted(voxels, value, inside, scale, offset, SCALED)
    out = out_ptr + (tl.load(row_ptr) * channels + c) * (D * H * W) + (line * W)[:, None] + k2[None, :]
    tl.store(out, voxels.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def gather_turned_kernel(  # type: ignore[no-untyped-def]
    volume_ptr, out_ptr, table_ptr, channels, tiles, step_c, step_d, step_h, step_w, depth, height, width,
    value, scale, offset,
    D: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BORDER: tl.constexpr, SCALED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Patches of which axis a, 0 or 1, is x of the volume: tiles of axis 2 by axis a, read along a and written along 2."""
    row_ptr = table_ptr + (tl.program_id(0) // tiles) * 10
    c = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) % tiles
    LONGER: tl.constexpr = D if D > H else H
    a_tiles: tl.constexpr = (LONGER + TILE - 1) // TILE
    a = tl.where(tl.load(row_ptr + 4) == 2, 0, 1)
    size_a, size_b = tl.where(a == 0, D, H), tl.where(a == 0, H, D)
    kb = tile % LONGER  # position along the remaining axis
    ka = (tile // LONGER % a_tiles) * TILE + tl.arange(0, TILE)
    k2 = (tile // (LONGER * a_tiles)) * TILE + tl.arange(0, TILE)
    axis_2, axis_b = tl.load(row_ptr + 6), tl.load(row_ptr + 5 - a)
    flip_a, flip_b, flip_2 = tl.load(row_ptr + 7 + a), tl.load(row_ptr + 8 - a), tl.load(row_ptr + 9)
    x = tl.load(row_ptr + 3).to(tl.int32) + tl.where(flip_a != 0, size_a - 1 - ka, ka)
    at_2 = tl.load(row_ptr + 1 + axis_2).to(tl.int32) + tl.where(flip_2 != 0, W - 1 - k2, k2)
    at_b = tl.load(row_ptr + 1 + axis_b).to(tl.int32) + tl.where(flip_b != 0, size_b - 1 - kb, kb)
    size_2, size_other = picked(axis_2, depth, height, width), picked(axis_b, depth, height, width)
    real = (k2 < W)[:, None] & (ka < size_a)[None, :] & (kb < size_b)
    inside = real
    if BORDER == 0:
        inside = real & ((at_2 >= 0) & (at_2 < size_2))[:, None] & ((x >= 0) & (x < width))[None, :]
        inside = inside & (at_b >= 0) & (at_b < size_other)
    line = mirrored(at_2, size_2, BORDER).to(tl.int64) * picked(axis_2, step_d, step_h, step_w) + c * step_c
    line += mirrored(at_b, size_other, BORDER).to(tl.int64) * picked(axis_b, step_d, step_h, step_w)
    at_x = mirrored(x, width, BORDER).to(tl.int64) * step_w
    voxels = tl.load(volume_ptr + line[:, None] + at_x[None, :], mask=inside)
    voxels = tl.trans(converted(voxels, value, inside, scale, offset, SCALED))
    at = tl.where(a == 0, ka * (H * W) + kb * W, kb * (H * W) + ka * W)
    out = out_ptr + (tl.load(row_ptr) * channels + c) * (D * H * W) + at[:, None] + k2[None, :]
    tl.store(out, voxels.to(out_ptr.dtype.element_ty), mask=tl.trans(real))


@triton.jit
def blend_kernel(  # type: ignore[no-untyped-def]
    like_ptr, table_ptr, out_ptr, starts_z_ptr, starts_y_ptr, starts_x_ptr, weights_z_ptr, weights_y_ptr, weights_x_ptr,
    cover_y_ptr, cover_x_ptr, oldest, rows, count_y, count_x, first, height, width, step_c, floor,
    D: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """LINES x COLUMNS voxels of layer first + program_id(1); the table has the patches of rows oldest, oldest + 1, ...,
    each of the type of `like`.
    """
    across = tl.cdiv(width, COLUMNS)
    y0, x0 = tl.program_id(0) // across * LINES, tl.program_id(0) % across * COLUMNS
    y, x = y0 + tl.arange(0, LINES), x0 + tl.arange(0, COLUMNS)
    layer, c = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_y, end_y = tl.load(cover_y_ptr + y0), tl.load(cover_y_ptr + height + tl.minimum(y0 + LINES, height) - 1)
    first_x, end_x = tl.load(cover_x_ptr + x0), tl.load(cover_x_ptr + width + tl.minimum(x0 + COLUMNS, width) - 1)
    total, weights = tl.zeros((LINES, COLUMNS), dtype=tl.float32), tl.zeros((LINES, COLUMNS), dtype=tl.float32)
    for row in range(rows):
        dz = first + layer - tl.load(starts_z_ptr + oldest + row)
        if dz < D:
            weight_z = tl.load(weights_z_ptr + dz)
            for iy in range(first_y, end_y):
                dy = y - tl.load(starts_y_ptr + iy)
                in_y = (dy >= 0) & (dy < H) & (y < height)
                weight_zy = weight_z * tl.load(weights_y_ptr + dy, mask=in_y, other=0.0)
                for ix in range(first_x, end_x):
                    dx = x - tl.load(starts_x_ptr + ix)
                    in_x = (dx >= 0) & (dx < W) & (x < width)
                    inside = in_y[:, None] & in_x[None, :]
                    weight_x = tl.load(weights_x_ptr + dx, mask=in_x, other=0.0)
                    weight = tl.maximum(weight_zy[:, None] * weight_x[None, :], floor)
                    patch_ptr = tl.load(table_ptr + (row * count_y + iy) * count_x + ix).to(
                        tl.pointer_type(like_ptr.dtype.element_ty)
                    )
                    at = patch_ptr + (c * D + dz) * (H * W) + dy[:, None] * W + dx[None, :]
                    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                    total = tl.where(inside, total + weight * value, total)
                    weights += tl.where(inside, weight, 0.0)
    out = out_ptr + c * step_c + layer.to(tl.int64) * height * width + (y * width)[:, None] + x[None, :]
    weights = tl.where(weights > 0, weights, 1.0)
    tl.store(out, tl.div_rn(total, weights), mask=(y < height)[:, None] & (x < width)[None, :])
