"""Patches of 3D volumes: cut out at given places, predicted by a network, and blended to one volume again.

`gather` cuts patches with borders as numpy.pad defines them, turned by any signed permutation of the axes. `blend` takes the
patches of a grid in its order and makes the weighted mean where they overlap, with the grid, the windows and the result
of MONAI's `sliding_window_inference`; `blend_layers` yields layers as soon as they are finished, so that a ring of as many
layers as the roi is deep is all that is held. `sliding_window` drives both around a network for volumes larger than memory.

Copies are exact. Scaled values and blends are made in float32, each product and sum rounded, sums in the order of the grid:
all implementations agree bit for bit, for any number of threads, any batch size and any tile. MONAI's result differs by
rounding only, at most 1e-5 of the largest magnitude among the patches. Coordinates in mm are left to the rooms above.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engine.errors import Unsupported, UsageError
from engine.kernels.patches import grid as _grid
from engine.kernels.patches import streaming as _streaming

if TYPE_CHECKING:
    from types import ModuleType

Implementation = Literal["reference", "numba", "triton"]
Border = Literal["constant", "edge", "reflect", "symmetric", "wrap"]
Window = Literal["constant", "gaussian"]
Size = int | Sequence[int | None] | None
_WHERE = "engine.kernels.patches"
_BORDERS, _WINDOWS = ("constant", "edge", "reflect", "symmetric", "wrap"), ("constant", "gaussian")
_VOXELS = ("uint8", "int16", "uint16", "float32")
_FURTHEST = 2**30  # positions fit int32 on the GPU
_HALVES = ("float16", "bfloat16")  # on the GPU only: Numba has neither


def grid_starts(shape: Sequence[int], roi: Size, overlap: float | Sequence[float]) -> np.ndarray:
    """Corners of the windows of a sliding window, z slowest: int64 (n, 3), in voxels of the volume.

    Args:
        shape: (d, h, w).
        roi: voxels of a window, one number or three; None or a number <= 0 stands for the whole axis.
        overlap: part of the roi that neighbours share, 0 <= overlap < 1, one or three.

    The corners of MONAI's `dense_patch_slices` with `_get_scan_interval`: steps of int(roi * (1 - overlap)), at least 1, the
    last window moved back to the border. Where the volume is smaller than the roi, MONAI pads it on both sides and the one
    window begins at 0 of the padded volume; here it begins at the same place, -((roi - size) // 2).

    Raises:
        UsageError: wrong shape, roi or overlap.
    """
    shape_dhw = _shape(shape)
    axes = [_grid.axis_starts(*one) for one in zip(shape_dhw, _roi(roi, shape_dhw), _overlap(overlap))]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def random_starts(
    shape: Sequence[int], roi: Size, n: int, seed: int, *, mask_dhw: Any = None, foreground: float = 1.0
) -> np.ndarray:
    """Corners of n random patches that lie inside the volume: int64 (n, 3). A pure function of its arguments.

    Args:
        shape, roi: as for `grid_starts`; an axis smaller than the roi has the one start of `grid_starts`.
        n: number of patches; the first ones do not depend on it.
        seed: integer >= 0.
        mask_dhw: (d, h, w), nonzero = foreground; None: every start is equally likely.
        foreground: part of the patches that are centred on a foreground voxel, each voxel equally likely, moved into the
            volume where they stick out (as MONAI's RandCropByPosNegLabel does); the others lie anywhere.

    Raises:
        UsageError: wrong shape, n, seed or mask; a mask without foreground.
    """
    shape_dhw = _shape(shape)
    if int(n) < 0 or int(seed) < 0:
        raise UsageError("n and seed >= 0", f"n {n}, seed {seed}", _WHERE)
    if not 0 <= foreground <= 1:
        raise UsageError("foreground between 0 and 1", str(foreground), _WHERE)
    if mask_dhw is not None:
        mask_dhw = np.asarray(mask_dhw)
        if mask_dhw.shape != shape_dhw:
            raise UsageError(f"a mask of shape {shape_dhw}", str(mask_dhw.shape), _WHERE)
        if not mask_dhw.any():
            raise UsageError("a mask with foreground", "all zero", _WHERE, "mask_dhw=None for uniform starts")
    return _grid.random_starts(shape_dhw, _roi(roi, shape_dhw), int(n), int(seed), mask_dhw, float(foreground))


def gather(
    volume: Any,
    starts_n3: Any,
    roi: int | Sequence[int],
    *,
    flips_n3: Any = None,
    axes_n3: Any = None,
    border: Border = "constant",
    value: float = 0,
    dtype: Any = None,
    scale: float = 1.0,
    offset: float = 0.0,
    out: Any = None,
    implementation: Implementation | None = None,
) -> Any:
    """Patches of a volume, each turned in its own way.

    Args:
        volume: (d, h, w) or (c, d, h, w); uint8, int16, uint16 or float32, on the GPU float16 and bfloat16 too.
        starts_n3: integers (n, 3), first voxel along z, y, x of the volume; may lie outside, even wholly.
        roi: voxels of a patch along its own three axes.
        flips_n3: bool (n, 3): reverse axis j of the patch. None: none.
        axes_n3: integers (n, 3), each row a permutation: axis j of the patch runs along axis axes[j] of the volume. None:
            0 1 2. With flips, all 48 signed permutations of the axes.
        border: what lies outside, as numpy.pad defines it: "constant" (`value`), "edge", "reflect" (border voxel not
            repeated), "symmetric" (repeated), "wrap"; repeated as often as needed.
        value: in the volume's own type and units, before scale and offset.
        dtype: of the patches; None: the volume's, or float32 with a scale or offset. Float32, or on the GPU also half
            types, can be had of any volume; the volume's own type only without scale and offset.
        scale, offset: x * scale + offset in float32, two roundings.
        out: array of the result's shape and type to write to, contiguous; None makes one.
        implementation: None chooses by where the volume lies (NumPy: numba, CUDA tensor: triton).

    Returns:
        (n, d, h, w), or (n, c, d, h, w). The patch is np.flip(np.transpose(crop, axes), flipped axes), exactly.

    Raises:
        UsageError: wrong shape or type.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = _choose(volume, implementation)
    kind = _voxel_type(volume, "volume")
    if volume.ndim not in (3, 4) or 0 in volume.shape:
        raise UsageError("a volume (d, h, w) or (c, d, h, w) with voxels", f"shape {tuple(volume.shape)}", _WHERE)
    size = _three(roi, "roi")
    if min(size) < 1:
        raise UsageError("roi >= 1 along each axis", str(size), _WHERE)
    starts_n3 = _table(starts_n3, "starts_n3", "iu").astype(np.int64)
    if (np.abs(starts_n3) > _FURTHEST).any():
        raise UsageError(f"starts_n3 within {_FURTHEST} voxels", "others", _WHERE)
    n = len(starts_n3)
    flips_n3 = np.zeros((n, 3), dtype=bool) if flips_n3 is None else _table(flips_n3, "flips_n3", "b", n)
    axes_n3 = np.tile(np.arange(3), (n, 1)) if axes_n3 is None else _table(axes_n3, "axes_n3", "iu", n).astype(np.int64)
    if (np.sort(axes_n3, axis=1) != np.arange(3)).any():
        raise UsageError("axes_n3 with a permutation of 0 1 2 in each row", "other rows", _WHERE)
    if border not in _BORDERS:
        raise UsageError("border " + ", ".join(_BORDERS), repr(border), _WHERE)
    plain = (scale, offset) == (1, 0)
    name = str(dtype or (kind if plain else "float32"))
    wanted = (np.dtype(dtype).name if isinstance(dtype, type) else name).removeprefix("torch.")
    floats = ("float32",) if isinstance(volume, np.ndarray) else ("float32", *_HALVES)
    if wanted not in floats and not (wanted == kind and plain):
        raise UsageError(f"dtype {', '.join(floats)}, or {kind} without scale and offset", wanted, _WHERE)
    if kind not in ("float32", *_HALVES):
        bounds = np.iinfo(kind)
        if value != int(value) or not bounds.min <= value <= bounds.max:
            raise UsageError(f"value of type {kind}", str(value), _WHERE)
    shape = (n, *volume.shape[:-3], *size)
    out = _output(out, volume, shape, wanted)
    volume_cdhw, out_ncdhw = (volume[None], out[:, None]) if volume.ndim == 3 else (volume, out)
    if out_ncdhw.size if isinstance(out, np.ndarray) else out_ncdhw.numel():
        chosen.gather(
            _streaming.readable(volume_cdhw),
            out_ncdhw,
            starts_n3,
            flips_n3,
            axes_n3,
            border,
            value,
            float(scale),
            float(offset),
        )
    return out


def blend_layers(
    patches: Any,
    shape: Sequence[int],
    roi: Size,
    overlap: float | Sequence[float] = 0.5,
    *,
    window: Window = "gaussian",
    sigma_scale: float | Sequence[float] = 0.125,
    implementation: Implementation | None = None,
) -> Iterator[tuple[int, Any]]:
    """Finished layers of the blended volume, in order, each as soon as no later patch touches it.

    Args: as `blend`.

    Yields:
        (first layer, float32 (c, layers, h, w)). The layers are valid until the next step only: they lie in a ring that is
        as deep as the roi (numba). triton holds the patches of the rows of windows that reach into unfinished layers;
        reference holds everything.
    """
    grid = _checked_grid(shape, roi, overlap, window, sigma_scale)
    first, batches = _checked_batches(patches, grid)
    return _all_of(_choose(first, implementation).layers(batches, grid), batches)


def blend(
    patches: Any,
    shape: Sequence[int],
    roi: Size,
    overlap: float | Sequence[float] = 0.5,
    *,
    window: Window = "gaussian",
    sigma_scale: float | Sequence[float] = 0.125,
    out: Any = None,
    implementation: Implementation | None = None,
) -> Any:
    """One volume of the patches of `grid_starts(shape, roi, overlap)`: sum(weight * patch) / sum(weight) per voxel.

    Args:
        patches: (n, c, d, h, w) float32 (float16 too, bfloat16 on the GPU), in the order of the grid; or an iterable of such
            batches of any sizes, taken one by one.
        shape, roi, overlap: as for `grid_starts`.
        window: "constant", or "gaussian" with standard deviation sigma_scale * roi; no weight is below 1e-3 (MONAI's
            compute_importance_map, with its clamp).
        out: anything (c, d, h, w), or (d, h, w) for one channel, that takes `out[:, a:b] = layers`: array, memory map, Zarr
            array; each layer is written once, whole chunks (or shards) at a time where `out` has them. A plain float32 array is
            filled in place. None: a new float32 array (c, d, h, w).

    Returns:
        `out`.

    Raises:
        UsageError: wrong shape or type, too few or too many patches, batches that share memory.
        Unsupported: the named implementation cannot run on this input.
    """
    grid = _checked_grid(shape, roi, overlap, window, sigma_scale)
    first, batches = _checked_batches(patches, grid)
    return _write(_choose(first, implementation), first, batches, grid, out)


def sliding_window(
    volume: Any,
    network: Callable[[Any], Any],
    roi: Size,
    overlap: float | Sequence[float] = 0.5,
    *,
    batch: int = 4,
    window: Window = "gaussian",
    sigma_scale: float | Sequence[float] = 0.125,
    border: Border = "constant",
    value: float = 0,
    dtype: Any = None,
    scale: float = 1.0,
    offset: float = 0.0,
    out: Any = None,
    device: Any = None,
    implementation: Implementation | None = None,
) -> Any:
    """`blend` of what `network` makes of the patches of `volume`: MONAI's `sliding_window_inference`, streamed along z.

    Args:
        volume: (d, h, w) or (c, d, h, w): an array, a CUDA tensor, or anything with shape, dtype and slicing (memory map, Zarr
            array), of which each layer is read once. See `gather` for types.
        network: (m, c, d, h, w) patches -> (m, c', d, h, w) of the same roi, NumPy or torch. m <= `batch`: rows of the grid are
            cut evenly, or taken together where several fit. The patches given are overwritten after a row of the grid,
            and what the network returned must not be before.
        border, value: outside a volume that is smaller than the roi.
        dtype, scale, offset: as for `gather`: what the network is given; None: float32.
        out: as for `blend`; None: a new float32 array of shape (c', d, h, w), (d, h, w) for a volume (d, h, w) and c' = 1.
        device: a torch device that patches are gathered, predicted and blended on, one slab of the volume at a time; None:
            where the volume lies.

    Raises:
        UsageError: wrong shape or type, of the network's result too.
        Unsupported: the named implementation cannot run on this input.
    """
    if len(getattr(volume, "shape", ())) not in (3, 4) or not hasattr(volume, "dtype"):
        raise UsageError("a volume with a dtype and three or four axes", type(volume).__name__, _WHERE)
    if isinstance(volume, np.ndarray) and isinstance(out, np.ndarray) and np.may_share_memory(volume, out):
        raise UsageError("an out beside the volume", "memory of the volume", _WHERE, "out=None")
    if int(batch) < 1:
        raise UsageError("batch >= 1", str(batch), _WHERE)
    grid = _checked_grid(volume.shape[-3:], roi, overlap, window, sigma_scale)
    like = volume if hasattr(volume, "is_cuda") else np.empty(0)
    if device is not None:
        import torch

        like = torch.empty(0, device=device)
    chosen = _choose(like, implementation)

    def cut(slab: Any, starts_n3: np.ndarray, into: Any) -> Any:
        return gather(
            slab, starts_n3, grid.roi, border=border, value=value, dtype=dtype or "float32", scale=scale, offset=offset,
            out=into, implementation=implementation,
        )  # fmt: skip

    predicted = _streaming.predictions(volume, network, grid, int(batch), cut, device)
    first, batches = _checked_batches(predicted, grid)
    flat = out is None and len(volume.shape) == 3 and first.shape[1] == 1
    result = _write(chosen, first, batches, grid, out)
    return result[0] if flat else result


def _write(chosen: ModuleType, first: Any, batches: Iterator[Any], grid: _grid.Grid, out: Any) -> Any:
    """Blend `batches`, of which `first` is the first, into `out`, in place where that is possible."""
    shape = (first.shape[1], *grid.shape)
    if out is None:
        out = _output(None, first, shape, "float32")
    if tuple(out.shape) not in (shape, shape[1:] if shape[0] == 1 else shape):
        raise UsageError(f"out of shape {shape}", str(tuple(out.shape)), _WHERE)
    out_cdhw = out[None] if type(out) is type(first) and len(out.shape) == 3 else out
    if _streaming.takes_sums(out_cdhw, first):
        for _ in _all_of(chosen.layers(batches, grid, out_cdhw), batches):
            pass
    else:
        _streaming.write(_all_of(chosen.layers(batches, grid), batches), out)
    return out


def _all_of(layers: Iterator[tuple[int, Any]], batches: Iterator[Any]) -> Iterator[tuple[int, Any]]:
    """`layers`, and then the end of `batches`, which complains where more come than the grid has."""
    yield from layers
    for _ in batches:
        pass


def _checked_grid(shape: Any, roi: Any, overlap: Any, window: str, sigma_scale: Any) -> _grid.Grid:
    shape_dhw = _shape(shape)
    if window not in _WINDOWS:
        raise UsageError("window " + " or ".join(_WINDOWS), repr(window), _WHERE)
    sigma = _three(sigma_scale, "sigma_scale", float)
    if not min(sigma) > 0:
        raise UsageError("sigma_scale > 0", str(sigma_scale), _WHERE)
    return _grid.make_grid(shape_dhw, _roi(roi, shape_dhw), _overlap(overlap), window, sigma)


def _checked_batches(patches: Any, grid: _grid.Grid) -> tuple[Any, Iterator[Any]]:
    """The first batch, and all of them, each of the right shape and type and all together as many as the grid has."""
    total = int(np.prod([len(starts) for starts in grid.starts]))
    source = iter((patches,)) if hasattr(patches, "shape") else iter(patches)
    first = next(source, None)
    if first is None:
        raise UsageError(f"{total} patches", "none", _WHERE)
    first = _float_patches(first, grid, None)

    def checked() -> Iterator[Any]:
        seen = 0
        for number, batch in enumerate(itertools.chain((first,), source)):
            good = batch if number == 0 else _float_patches(batch, grid, first)
            seen += len(good)
            if seen > total:
                break
            yield good
        if seen != total:
            raise UsageError(
                f"{total} patches", f"{'more' if seen > total else seen}", _WHERE, "grid_starts counts them"
            )

    return first, checked()


def _float_patches(batch: Any, grid: _grid.Grid, like: Any) -> Any:
    """`batch` (n, c, *roi) of a type that can be blended, contiguous; torch tensors of a CPU only where `like` is one."""
    if not hasattr(batch, "shape") or batch.ndim != 5 or tuple(batch.shape[2:]) != grid.roi or 0 in batch.shape[:2]:
        got = f"shape {tuple(batch.shape)}" if hasattr(batch, "shape") else type(batch).__name__
        raise UsageError(f"patches (n, c, {', '.join(map(str, grid.roi))})", got, _WHERE)
    if like is not None and (
        type(batch) is not type(like) or batch.shape[1] != like.shape[1] or batch.dtype != like.dtype
    ):
        raise UsageError(
            f"batches like the first: {type(like).__name__} {like.dtype}, {like.shape[1]} channels",
            f"{type(batch).__name__} {batch.dtype}, {batch.shape[1]} channels",
            _WHERE,
        )
    kind = str(batch.dtype).removeprefix("torch.")
    if isinstance(batch, np.ndarray):
        if kind not in ("float32", "float16"):
            raise UsageError("patches of type float32 or float16", kind, _WHERE)
        return np.ascontiguousarray(batch, dtype=np.float32)
    if kind not in ("float32", *_HALVES):
        raise UsageError("patches of type float32, float16 or bfloat16", kind, _WHERE)
    return batch.detach().contiguous()


def _choose(array: Any, implementation: Implementation | None) -> ModuleType:
    """The module that runs: the named one, or the default for where `array` lies. A named one is never replaced."""
    is_numpy = isinstance(array, np.ndarray)
    if not is_numpy and not type(array).__module__.startswith("torch"):
        raise UsageError("a NumPy array or a torch tensor", type(array).__name__, _WHERE)
    name = implementation or ("numba" if is_numpy else "triton")
    if name == "triton":
        if is_numpy:
            raise Unsupported("a torch tensor for triton", "a NumPy array", _WHERE, "torch.from_numpy, or device=")
        from engine.kernels.patches import triton_gpu

        if array.device.type != "cuda" and not triton_gpu.INTERPRETED:
            raise Unsupported("a CUDA tensor for triton", f"a {array.device} tensor", _WHERE, ".numpy() for the CPU")
        return triton_gpu
    if not is_numpy:
        raise Unsupported(f"a NumPy array for {name}", "a torch tensor", _WHERE, ".cpu().numpy()")
    if name == "numba":
        from engine.kernels.patches import numba_cpu

        return numba_cpu
    if name == "reference":
        from engine.kernels.patches import reference

        return reference
    raise UsageError("implementation reference, numba or triton", repr(name), _WHERE)


def _three(values: Any, name: str, kind: type = int) -> Any:
    """One number for all axes, or one for each."""
    given = tuple(values) if isinstance(values, Sequence | np.ndarray) else (values,) * 3
    if len(given) != 3:
        raise UsageError(f"{name} with one number or three", str(values), _WHERE)
    try:
        return tuple(kind(v) for v in given)
    except (TypeError, ValueError):
        raise UsageError(f"{name} in numbers", str(values), _WHERE) from None


def _shape(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape) < 1:
        raise UsageError("a shape (d, h, w) of at least one voxel", str(tuple(shape)), _WHERE)
    return tuple(int(s) for s in shape)  # type: ignore[return-value]


def _roi(roi: Size, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    given = _three(roi, "roi", lambda v: 0 if v is None else int(v))  # type: ignore[arg-type]
    return tuple(r if r > 0 else s for r, s in zip(given, shape))  # type: ignore[return-value]


def _overlap(overlap: float | Sequence[float]) -> tuple[float, float, float]:
    given = _three(overlap, "overlap", float)
    if not all(0 <= o < 1 for o in given):
        raise UsageError("0 <= overlap < 1", str(overlap), _WHERE)
    return given


def _voxel_type(volume: Any, name: str) -> str:
    kind = volume.dtype.name if isinstance(volume, np.ndarray) else str(volume.dtype).removeprefix("torch.")
    kinds = _VOXELS if isinstance(volume, np.ndarray) else (*_VOXELS, *_HALVES)
    if kind not in kinds:
        hint = ".view(np.uint8)" if kind == "bool" else ".astype(np.float32)"
        raise UsageError(f"{name} of type {', '.join(kinds)}", kind, _WHERE, hint)
    return kind


def _table(values: Any, name: str, kinds: str, rows: int | None = None) -> np.ndarray:
    """`values` as a NumPy array (n, 3); small, so that a GPU tensor is fetched."""
    array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    if array.ndim != 2 or array.shape[1] != 3 or (rows is not None and len(array) != rows):
        raise UsageError(f"{name} of shape ({'n' if rows is None else rows}, 3)", str(array.shape), _WHERE)
    if array.dtype.kind not in kinds:
        raise UsageError(f"{name} as {'booleans' if kinds == 'b' else 'integers'}", str(array.dtype), _WHERE)
    return array


def _output(out: Any, like: Any, shape: tuple[int, ...], kind: str) -> Any:
    """`out` checked, or a new array of `shape` and type `kind` where `like` lies."""
    if isinstance(like, np.ndarray):
        if out is None:
            return np.empty(shape, dtype=kind)
        contiguous = isinstance(out, np.ndarray) and out.flags.c_contiguous and out.flags.writeable
    else:
        import torch

        if out is None:
            return torch.empty(shape, dtype=getattr(torch, kind), device=like.device)
        contiguous = isinstance(out, torch.Tensor) and out.is_contiguous() and out.device == like.device
    got = f"{type(out).__name__} {getattr(out, 'dtype', '')} {tuple(getattr(out, 'shape', ()))}"
    if not contiguous or tuple(out.shape) != shape or str(out.dtype).removeprefix("torch.") != kind:
        raise UsageError(f"out contiguous, {kind} {shape}, where the volume lies", got, _WHERE)
    return out
