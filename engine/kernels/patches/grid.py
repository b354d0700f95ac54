"""Where patches lie and how much their voxels count: the grid of a sliding window, random starts, importance windows.

Small arrays in NumPy, shared by all implementations, so that they can only differ in how they move voxels. The positions and
the windows are those of MONAI's `sliding_window_inference`. Moving voxels is left to the implementations, checks to the door.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from engine.errors import UsageError

_LEAST_WEIGHT = 1e-3  # MONAI compute_importance_map: no weight is smaller, so that a quotient is never 0 / 0


class Grid(NamedTuple):
    """The windows that cover a volume. Window (iz, iy, ix) has its corner at (starts[0][iz], starts[1][iy], starts[2][ix]) and
    voxel (z, y, x) of it counts max((weights[0][z] * weights[1][y]) * weights[2][x], floor), in float32.
    """

    shape: tuple[int, int, int]
    roi: tuple[int, int, int]
    starts: tuple[np.ndarray, np.ndarray, np.ndarray]  # int64, rising; one negative start where the roi is larger
    weights: tuple[np.ndarray, np.ndarray, np.ndarray]  # float32, as long as the roi
    floor: np.float32
    cover: tuple[np.ndarray, np.ndarray, np.ndarray]  # int64 (2, size): first and end of the windows over each position

    def finished(self, iz: int) -> tuple[int, int]:
        """Layers [first, end) that row `iz` of windows along z is the last to touch."""
        starts_z = self.starts[0]
        return max(int(starts_z[iz]), 0), self.shape[0] if iz + 1 == len(starts_z) else int(starts_z[iz + 1])


def axis_starts(size: int, roi: int, overlap: float) -> np.ndarray:
    """int64 starts along one axis. MONAI pads a volume that is smaller than the roi, the smaller half in front."""
    if roi >= size:
        return np.array([-((roi - size) // 2)], dtype=np.int64)
    step = max(int(roi * (1 - overlap)), 1)
    return np.minimum(np.arange(-((roi - size) // step) + 1, dtype=np.int64) * step, size - roi)


def _axis_cover(starts: np.ndarray, roi: int, size: int) -> np.ndarray:
    """For each position along an axis the first and the end of the windows that cover it, int64 (2, size)."""
    position = np.arange(size)
    first, end = np.searchsorted(starts + roi, position, side="right"), np.searchsorted(starts, position, side="right")
    return np.stack([first, end]).astype(np.int64)


def make_grid(
    shape: tuple[int, int, int],
    roi: tuple[int, int, int],
    overlap: tuple[float, float, float],
    window: str,
    sigma_scale: tuple[float, float, float],
) -> Grid:
    """The grid of `shape`; a Gaussian window has standard deviation sigma_scale * roi and is centred."""
    z, y, x = (axis_starts(size, r, o) for size, r, o in zip(shape, roi, overlap))
    cover_z, cover_y, cover_x = (_axis_cover(s, r, size) for s, r, size in zip((z, y, x), roi, shape))
    if window == "constant":
        weights_z, weights_y, weights_x = (np.ones(r, dtype=np.float32) for r in roi)
        floor = 0.0
    else:
        weights_z, weights_y, weights_x = (_gaussian(r, scale * r) for r, scale in zip(roi, sigma_scale))
        floor = max((weights_z.min() * weights_y.min()) * weights_x.min(), _LEAST_WEIGHT)
    return Grid(
        shape, roi, (z, y, x), (weights_z, weights_y, weights_x), np.float32(floor), (cover_z, cover_y, cover_x)
    )


def _gaussian(size: int, sigma: float) -> np.ndarray:
    """float32 (size,), unscaled, step by step as MONAI computes it."""
    x = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
    return np.exp(x**2 / np.float32(-2 * sigma**2))


def random_starts(
    shape: tuple[int, int, int],
    roi: tuple[int, int, int],
    n: int,
    seed: int,
    mask_dhw: np.ndarray | None,
    foreground: float,
) -> np.ndarray:
    """int64 (n, 3). Five uniform numbers belong to each patch, so that a longer list begins with the shorter one."""
    uniform_n5 = np.random.Generator(np.random.Philox(seed)).random((n, 5))
    room = np.maximum(np.subtract(shape, roi), 0)
    lowest = np.where(np.less(shape, roi), -(np.subtract(roi, shape) // 2), 0)
    starts_n3 = lowest + (uniform_n5[:, :3] * (room + 1)).astype(np.int64)
    if mask_dhw is not None:
        chosen = np.flatnonzero(uniform_n5[:, 3] < foreground)
        centre = _foreground_voxels(mask_dhw, uniform_n5[chosen, 4])
        starts_n3[chosen] = np.clip(centre - np.array(roi) // 2, lowest, lowest + room)
    return starts_n3


def _foreground_voxels(mask_dhw: np.ndarray, uniform_k: np.ndarray) -> np.ndarray:
    """int64 (K, 3): voxel number floor(u * total) of the foreground, found by prefix sums over lines, then within a line."""
    lines = mask_dhw.reshape(-1, mask_dhw.shape[2])
    until = np.cumsum(np.count_nonzero(lines, axis=1))  # foreground voxels in the lines up to and with this one
    rank = (uniform_k * until[-1]).astype(np.int64)
    line = np.searchsorted(until, rank, side="right")
    x = np.empty(len(rank), dtype=np.int64)
    for number in np.unique(line):
        inside = np.flatnonzero(lines[number])
        here = line == number
        x[here] = inside[rank[here] - (until[number] - len(inside))]
    return np.stack([*np.divmod(line, mask_dhw.shape[1]), x], axis=1)


def collected(batches: Iterable[Any], count: int) -> Iterator[list[Any]]:
    """Lists of parts of batches (n c d h w) that hold `count` patches together, in order and not copied."""
    parts: list[Any] = []
    missing = count
    for batch in batches:
        at = 0
        while at < len(batch):
            part = batch[at : at + missing]
            parts.append(part)
            at, missing = at + len(part), missing - len(part)
            if missing == 0:
                yield parts
                parts, missing = [], count


def addresses(parts: list[Any]) -> np.ndarray:
    """int64: where each patch of `parts` lies in memory; arrays or tensors (n c d h w), each patch contiguous.

    Raises:
        UsageError: two parts share memory: the later one has overwritten the earlier one.
    """
    found, spans = [], []
    for part in parts:
        if isinstance(part, np.ndarray):
            address, step, size = part.ctypes.data, part.strides[0], part[0].nbytes
        else:
            width = part.element_size()
            address, step, size = part.data_ptr(), part.stride(0) * width, part[0].numel() * width
        found += [address + i * step for i in range(len(part))]
        spans.append((address, found[-1] + size))
    spans.sort()
    if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
        raise UsageError(
            "patches in memory of their own until they are blended",
            "two batches that share memory",
            "engine.kernels.patches",
            "let the network return a new array each time, or copy its result",
        )
    return np.array(found, dtype=np.int64)
