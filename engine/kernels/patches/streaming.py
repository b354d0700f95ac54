"""What lies between a volume that may be larger than memory and the kernels: slabs in, layers out.

Volumes and outputs are known only by shape, dtype, slicing and, where they have them, chunks; no format is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from engine.kernels.patches.grid import Grid


def predictions(
    volume: Any, network: Callable[[Any], Any], grid: Grid, batch: int, cut: Callable[..., Any], device: Any
) -> Iterator[Any]:
    """Batches of what `network` makes of the windows of `grid`, in order. `cut(slab, starts, into)` gathers.

    Whole rows of windows along x are gathered at once, because they share lines of the volume, and are cut to batches
    evenly. On the CPU one buffer serves all rows; on a GPU, where the blend waits for a whole layer of windows, none does.
    """
    _, starts_y, starts_x = grid.starts
    rows = max(batch // len(starts_x), 1)
    buffer = None
    for z, first, slab in _slabs(volume, grid, device):
        for iy in range(0, len(starts_y), rows):
            y, x = np.meshgrid(starts_y[iy : iy + rows], starts_x, indexing="ij")
            starts_n3 = np.stack([np.full(y.size, z - first), y.ravel(), x.ravel()], axis=1)
            patches = cut(slab, starts_n3, buffer[: y.size] if buffer is not None else None)
            if buffer is None and isinstance(patches, np.ndarray):
                buffer = patches
            patches_ncdhw = patches if patches.ndim == 5 else patches[:, None]
            for part in np.array_split(np.arange(y.size), -(-y.size // batch)):
                result = network(patches_ncdhw[part[0] : part[-1] + 1])
                yield _as_numpy(result) if device is None and isinstance(patches, np.ndarray) else result


def readable(volume: Any) -> Any:
    """`volume` as the kernels read it: positive steps of whole voxels, the machine's order of bytes; copied if need be."""
    if not isinstance(volume, np.ndarray):
        return volume
    direct = all(s > 0 and s % volume.itemsize == 0 for s in volume.strides) and volume.dtype.isnative
    return np.asarray(volume) if direct else np.ascontiguousarray(volume, volume.dtype.newbyteorder("="))


def takes_sums(out_cdhw: Any, like: Any) -> bool:
    """Whether unfinished sums may lie in `out`: plain float32 memory beside `like`, all of which is wanted in the end.

    Not so a memory map, whose pages would go to the disk several times.
    """
    if isinstance(like, np.ndarray):
        plain = type(out_cdhw) is np.ndarray and out_cdhw.flags.c_contiguous and out_cdhw.flags.writeable
        return plain and out_cdhw.dtype == np.float32
    return (
        type(out_cdhw) is type(like)
        and out_cdhw.is_contiguous()
        and str(out_cdhw.dtype) == "torch.float32"
        and (out_cdhw.device == like.device)
    )


def write(layers: Iterator[tuple[int, Any]], out: Any) -> None:
    """Assign finished layers to `out` (c d h w) or (d h w), each once, in whole chunks where `out` has them."""
    chunks = getattr(out, "shards", None) or getattr(out, "chunks", None)
    if chunks and chunks[-3] > 1:
        layers = _by_chunks(layers, int(chunks[-3]), out.shape[-3])
    for first, layers_cdhw in layers:
        end = first + layers_cdhw.shape[1]
        if hasattr(layers_cdhw, "cpu") and not hasattr(out, "is_cuda"):
            layers_cdhw = layers_cdhw.cpu().numpy()
        if len(out.shape) == 3:
            out[first:end] = layers_cdhw[0]
        else:
            out[:, first:end] = layers_cdhw


def _by_chunks(layers: Iterator[tuple[int, Any]], chunk: int, depth: int) -> Iterator[tuple[int, np.ndarray]]:
    """The same layers, cut where chunks begin: a chunk that is written in two parts is compressed twice and read once."""
    waiting: list[np.ndarray] = []
    begin = 0
    for first, layers_cdhw in layers:
        end = first + layers_cdhw.shape[1]
        whole = end if end == depth else end // chunk * chunk
        host = layers_cdhw.cpu().numpy() if hasattr(layers_cdhw, "cpu") else layers_cdhw
        if whole <= begin:
            waiting.append(host.copy())
            continue
        yield begin, np.concatenate([*waiting, host[:, : whole - first]], axis=1)
        waiting, begin = [host[:, whole - first :].copy()], whole


def _slabs(volume: Any, grid: Grid, device: Any) -> Iterator[tuple[int, int, Any]]:
    """(start of the row of windows, first layer of the slab, slab (c d h w) or (d h w)) per row of windows along z.

    Arrays and tensors are sliced where they lie; of anything else, and for another device, each layer is read once.
    """
    depth = grid.roi[0]
    in_place = isinstance(volume, np.ndarray) or hasattr(volume, "is_cuda")
    slab, had = None, 0  # layers [had - len, had) of the volume
    for z in grid.starts[0].tolist():
        first, end = max(z, 0), min(z + depth, grid.shape[0])
        if in_place and device is None:
            view = volume[..., first:end, :, :]
            contiguous = not isinstance(view, np.ndarray) or (view.strides[-1] == view.itemsize and view.dtype.isnative)
            yield z, first, view if contiguous else np.ascontiguousarray(view, view.dtype.newbyteorder("="))
            continue
        fresh = _read(volume, max(first, had), end, device)
        keep = max(had - first, 0)
        if slab is None:
            slab = fresh.clone() if hasattr(fresh, "clone") else fresh.copy()
        else:
            kept = slab[..., slab.shape[-3] - keep :, :, :]
            slab[..., :keep, :, :] = kept.clone() if hasattr(kept, "clone") else kept
            slab[..., keep:, :, :] = fresh
        had = end
        yield z, first, slab


def _read(volume: Any, first: int, end: int, device: Any) -> Any:
    """Layers [first, end) in memory, on `device` where one is given."""
    piece = volume[first:end] if len(volume.shape) == 3 else volume[:, first:end]
    if device is None:
        return np.asarray(piece)
    import torch

    return (piece if isinstance(piece, torch.Tensor) else torch.from_numpy(np.array(piece))).to(device)


def _as_numpy(result: Any) -> Any:
    """A torch tensor as an array; bfloat16, which NumPy lacks, as float32."""
    if not hasattr(result, "detach"):
        return result
    tensor = result.detach().cpu()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
