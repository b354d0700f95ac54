"""What the GPU searches share: launch parameters, keys of candidates, rows brought to a device in tiles, and several
devices.

A candidate is one int64 key, its rank (int32 >= 0: a distance, or the bits of a float32 >= 0, which rise with it) above
its index, so that keys are distinct and the smallest is the nearest row at the smallest index; lists of any parts of
the database, of tiles or devices, are merged by sorting. Keys from EMPTY on are free slots.

Kernels run in Triton's interpreter on CPU tensors when TRITON_INTERPRET=1 was set before import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton import knobs

from engine.kernels.nearest.checks import width
from engine.kernels.tuned import launch

Exclude = tuple[Any, Any] | None
Devices = list[Any] | None

INTERPRETED: bool = bool(knobs.runtime.interpret)
TILE_BYTES = 2**31  # of rows that are brought to a device at a time
SCRATCH_BYTES = 2**28  # of the minima of groups that are held at a time
_EMPTY = 0x7F800001 << 32  # above an infinite float32, above any count
LAST_KEY = 2**63 - 1
FAR = tl.constexpr(2**31 - 1)  # rank of what may not be a neighbour
LAST = tl.constexpr(LAST_KEY)
FILLED = 64  # queries of a tile at most that is written down pair by pair: its scan and offsets pass through 64 KiB
NOT_SELF = -(2**62)  # a shift that meets no row

# Launch parameters by kernel: `queries` x `rows` is the tile of a program, `group` the columns one minimum stands for.
DEFAULTS: dict[str, dict[str, int]] = {
    "bits": {"queries": 128, "rows": 128, "step": 4, "group": 32, "warps": 8, "stages": 3},
    "popcount": {"queries": 64, "rows": 64, "step": 1, "group": 32, "warps": 8, "stages": 2},
    "observed": {"queries": 64, "rows": 128, "step": 2, "group": 32, "warps": 8, "stages": 2},
    "int8": {"queries": 128, "rows": 128, "step": 128, "group": 16, "warps": 8, "stages": 3},
    "bfloat16": {"queries": 128, "rows": 128, "step": 64, "group": 16, "warps": 8, "stages": 3},
    "float32": {"queries": 64, "rows": 64, "step": 32, "group": 16, "warps": 4, "stages": 2},
    "windows": {"queries": 64, "rows": 64, "step": 1, "group": 32, "warps": 8, "stages": 2},
    "runs": {"queries": 1, "rows": 128, "step": 1, "group": 1, "warps": 4, "stages": 2},
}


def parameters(kernel: str, device: torch.device) -> dict[str, int]:
    """Launch parameters on this card; small tiles in the interpreter, so that tests see edges."""
    if INTERPRETED:
        return DEFAULTS[kernel] | {"queries": 16, "rows": 32, "step": min(32, DEFAULTS[kernel]["step"]), "group": 8}
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return launch(f"nearest.{kernel}", DEFAULTS[kernel], card)


def nearest(keys: torch.Tensor, k: int, more: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The k smallest keys of each row, rising, LAST_KEY in free slots; and what stands beside them in `more` (N, 0 or
    as keys).
    """
    more = keys[:, :0] if more is None else more
    if keys.shape[1] < k:
        room = (0, k - keys.shape[1])
        keys = torch.nn.functional.pad(keys, room, value=LAST_KEY)
        more = torch.nn.functional.pad(more, room) if more.shape[1] else more
    keys, at = keys.topk(k, dim=1, largest=False, sorted=True)
    return keys.masked_fill(keys >= _EMPTY, LAST_KEY), more.gather(1, at) if more.shape[1] else more


def split_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank int32 and index int64, -1 in free slots."""
    free = keys >= _EMPTY
    return (keys >> 32).masked_fill(free, -1).to(torch.int32), (keys & 0xFFFFFFFF).masked_fill(free, -1)


def smallest_groups(minima: torch.Tensor, take: int) -> torch.Tensor:
    """int32 (N, take): groups with the smallest minima, of equals those of the smallest index.

    The k nearest lie in the k groups whose own nearest are the nearest: were one of them in another group, k nearer
    ones would have been found in as many groups.
    """
    groups = torch.arange(minima.shape[1], device=minima.device, dtype=torch.int64)
    keys = minima.to(torch.int64) << 32 | groups
    return (keys.topk(take, dim=1, largest=False).values & 0xFFFFFFFF).to(torch.int32)


def exclusion(exclude: Exclude, part: slice, tile: slice, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of both parts on the device; one unread element where nothing is excluded."""
    if exclude is None:
        return (torch.zeros(1, dtype=torch.int64, device=device),) * 2
    return tuple(torch.as_tensor(x[p]).to(device) for x, p in zip(exclude, (part, tile)))  # type: ignore[return-value]


def pieces(start: int, stop: int, row_bytes: int, most_bytes: int) -> Iterator[slice]:
    """Slices that cover [start, stop), of about `most_bytes` each."""
    step = max(1, most_bytes // max(1, row_bytes))
    for first in range(start, stop, step):
        yield slice(first, min(stop, first + step))


def bits_on(bits_nw: Any, part: slice, device: torch.device) -> torch.Tensor:
    """int32 words (rows, 2 W) of a part of a set that lies anywhere, on the device."""
    taken = bits_nw[part]
    if not isinstance(taken, torch.Tensor):
        taken = _tensor(np.ascontiguousarray(taken, dtype=np.uint64).view(np.int64))
    taken = taken.to(device, non_blocking=True).contiguous()
    return taken.reshape(-1).view(torch.int32).reshape(len(taken), 2 * taken.shape[1])


def float32_on(rows: Any, part: slice, device: torch.device) -> torch.Tensor:
    """float32 (rows, d) of a part of a set that lies anywhere, on the device; converted there."""
    taken = rows[part]
    if not isinstance(taken, torch.Tensor):
        array = np.asarray(taken)
        known = str(array.dtype) in ("float32", "float16", "uint8", "int8", "int16")
        taken = _tensor(np.ascontiguousarray(array if known else array.astype(np.float32)))
    return taken.to(device, non_blocking=True).float().reshape(len(taken), width(rows)).contiguous()


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Pinned where there is a GPU, so that the copy runs beside the kernels; read-only memory maps are copied."""
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def over(
    devices: Devices, query: Any, length: int, search: Callable[[torch.device, slice], Any]
) -> tuple[list[Any], torch.device]:
    """search(device, rows of the database) on every device at once, rows split evenly; and the device to merge on.

    Without `devices`: all rows, where the query lies.
    """
    if devices is None:
        return [search(query.device, slice(0, length))], query.device
    targets = [torch.device(device) for device in devices]
    edges = [length * i // len(targets) for i in range(len(targets) + 1)]

    def one(i: int) -> Any:
        with _current(targets[i]):
            return search(targets[i], slice(edges[i], edges[i + 1]))

    with ThreadPoolExecutor(1 if INTERPRETED else len(targets)) as pool:  # the interpreter knows one program at a time
        return list(pool.map(one, range(len(targets)))), targets[0]


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def home(query: Any, *tensors: torch.Tensor) -> tuple[Any, ...]:
    """Results where the query lies: arrays for arrays, tensors on its device for tensors."""
    if isinstance(query, torch.Tensor):
        return tuple(x.to(query.device) for x in tensors)
    return tuple(x.cpu().numpy() for x in tensors)


def merged(
    found: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest (keys, more) of several lists."""
    keys, more = (torch.cat([x.to(device) for x in lists], dim=1) for lists in zip(*found))
    return nearest(keys, k, more)


def merged_pairs(found: list[tuple[torch.Tensor, ...]], device: torch.device, n: int) -> tuple[torch.Tensor, ...]:
    """CSR of pieces (row int64, index int64, values...), in no order: offsets int64 (n + 1,), index, values."""
    columns = [torch.cat([column.to(device) for column in columns]) for columns in zip(*found)]
    row, index = columns[0], columns[1]
    order = index.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    offsets = torch.zeros(n + 1, dtype=torch.int64, device=device)
    torch.cumsum(torch.bincount(row, minlength=n), dim=0, out=offsets[1:])
    return offsets, *(column[order] for column in columns[1:])


@triton.jit
def allowed_pairs(  # type: ignore[no-untyped-def]
    n, m, query_group_ptr, database_group_ptr, queries, members, shift, GROUPS: tl.constexpr
):  # fmt: skip
    """(Q, R): both inside, not a row with itself (row n + shift of the database part), not of one group."""
    allowed = (n < queries)[:, None] & (m < members)[None, :] & ((n + shift)[:, None] != m[None, :])
    if GROUPS:
        query_group = tl.load(query_group_ptr + n, mask=n < queries, other=0)
        database_group = tl.load(database_group_ptr + m, mask=m < members, other=0)
        allowed = allowed & (query_group[:, None] != database_group[None, :])
    return allowed


@triton.jit
def tile_of(queries, members, QUERIES: tl.constexpr, ROWS: tl.constexpr, TALL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Query tile and row tile of this program: TALL query tiles share a row tile while it is in the second-level
    cache.
    """
    tiles_n, tiles_m = tl.cdiv(queries, QUERIES), tl.cdiv(members, ROWS)
    program = tl.program_id(0)
    band = program // (TALL * tiles_m)
    tall = tl.minimum(tiles_n - band * TALL, TALL)
    inside = program - band * TALL * tiles_m
    return band * TALL + inside % tall, inside // tall
