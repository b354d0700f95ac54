"""Rows of a set that need not fit in memory, and lists of the nearest: what the host implementations share.

A set is anything with `shape`, `dtype` and slices by rows: an array, np.memmap, a Zarr array. It is read in tiles, and
a tile is converted when it is read. Which tiles are read, and what is looked for, is left to the callers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np

from engine.kernels.nearest.checks import width

Exclude = tuple[np.ndarray, np.ndarray] | None


def tiles(length: int, row_bytes: int, most_bytes: int, multiple: int) -> Iterator[slice]:
    """Slices that cover `length` rows, of a multiple of `multiple` rows each and about `most_bytes` at most."""
    step = max(1, most_bytes // max(1, row_bytes) // multiple) * multiple
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))


def read_words(bits_nw: Any, part: slice) -> np.ndarray:
    """uint64 (rows, W), contiguous."""
    return np.ascontiguousarray(bits_nw[part], dtype=np.uint64)


def read_float32(rows: Any, part: slice) -> np.ndarray:
    """float32 (rows, d), contiguous, trailing axes flattened; exact for every type that `features_topk` takes."""
    taken = rows[part]
    if type(taken).__module__.startswith("torch"):
        taken = taken.float().numpy()
    return np.ascontiguousarray(np.asarray(taken).reshape(len(taken), width(rows)), dtype=np.float32)


def groups(exclude: Exclude, query_part: slice, database_part: slice) -> tuple[np.ndarray, np.ndarray]:
    """Groups of both parts; empty where nothing is excluded."""
    if exclude is None:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    return exclude[0][query_part], exclude[1][database_part]


def in_threads(job: Callable[[int], Any], number: int) -> list[Any]:
    """Results of job(0), job(1), ..., on as many threads as Numba uses; the jobs release the interpreter's lock."""
    threads = min(number, numba.get_num_threads())
    if threads <= 1:
        return [job(i) for i in range(number)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(job, range(number)))


def each_part(job: Callable[[slice], Any], length: int, multiple: int = 1) -> None:
    """job(slice) over all of `length` rows, in one part a thread, each of a multiple of `multiple` rows but for the last."""
    step = -(-length // (multiple * numba.get_num_threads())) * multiple
    parts = [slice(start, min(length, start + step)) for start in range(0, length, step)] if length else []
    in_threads(lambda part: job(parts[part]), len(parts))


def merged(value_npk: np.ndarray, index_npk: np.ndarray, k: int, *others_npk: np.ndarray) -> tuple[np.ndarray, ...]:
    """The k smallest of the lists of all parts, ties by smallest index: each (N, parts, k) -> (N, k). -1 where there is
    none.

    Free slots hold index -1 and a value above all others. What lies in `others_npk` goes with its value.
    """
    lists = [x.reshape(len(x), -1) for x in (value_npk, index_npk, *others_npk)]
    if lists[1].shape[1] > k:
        order = np.lexsort((lists[1], lists[0]), axis=1)[:, :k]
        lists = [np.take_along_axis(x, order, axis=1) for x in lists]
    free = lists[1] < 0
    for x in lists:
        x[free] = -1
    return tuple(lists)


def csr(n: int, found: Sequence[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """Offsets int64 (n + 1,) and the columns of `found` in the order of (row, index).

    found: pieces (row, index, values...), arrays of equal length; in no order.
    """
    columns = [np.concatenate(column) for column in zip(*found)]
    order = np.lexsort((columns[1], columns[0]))
    offsets = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(np.bincount(columns[0], minlength=n), out=offsets[1:])
    return (offsets, *(column[order] for column in columns[1:]))


def ibs_limit(radius: float, length: int, observed: bool) -> int:
    """The largest rank within the radius: of a float32's bits where `observed`, else of a distance over `length` sites;
    -1: none.
    """
    if observed:
        return int(np.float32(radius).view(np.int32))
    if not length:
        return -1
    return bisect_right(range(2 * length + 1), np.float32(radius), key=lambda d: np.float32(d / (2 * length))) - 1


@numba.njit(cache=True, nogil=True)
def skipped(n: int, m: int, shift: int, query_group: np.ndarray, database_group: np.ndarray) -> bool:
    """Whether row m of a database part may not be a neighbour of row n of a query part.

    shift: row n + shift of the database part is the query's own; beyond either end where only groups count.
    """
    return n + shift == m or (len(query_group) > 0 and query_group[n] == database_group[m])


@numba.njit(cache=True, nogil=True)
def insert(values: np.ndarray, indices: np.ndarray, value: float, index: int) -> int:
    """Put `value` into the rising list behind its equals, and say where; the last falls off."""
    at = len(values) - 1
    while at > 0 and values[at - 1] > value:
        values[at] = values[at - 1]
        indices[at] = indices[at - 1]
        at -= 1
    values[at] = value
    indices[at] = index
    return at


@numba.njit(cache=True, nogil=True)
def grown(array: np.ndarray) -> np.ndarray:
    """A copy with twice the room."""
    larger = np.empty(2 * len(array), dtype=array.dtype)
    larger[: len(array)] = array
    return larger


NOT_SELF = -(2**62)  # a shift that meets no row
