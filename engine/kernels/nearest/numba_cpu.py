"""Nearest neighbours on the CPU. The database is streamed past the queries in tiles; no distance matrix is held.

Hamming: XOR and popcount in register tiles (`bits.tiles`). A tile reaches the top-k
lists only through rows whose nearest column beats the worst kept.

Squared distance: a float32 matrix product gives an approximation with a proven error bound, and only pairs whose lower bound
does not exceed the k-th smallest upper bound seen so far are computed as defined. So the answer is the true one, ties included.

Longest run: a run that beats the best so far must contain one of a few short anchor windows; only those are looked at, and
only a window without a difference is extended to its whole run.

Databases are read in index order and a later row must be strictly better, so ties go to the smallest index for any tiling and
any number of threads.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from engine.kernels.bits.tiles import BLOCK as _BLOCK
from engine.kernels.bits.tiles import interleaved, leading_zeros, trailing_zeros, xor_tile

Exclude = tuple[np.ndarray, np.ndarray] | None

_FAR = np.iinfo(np.int32).max
_QUERY_TILE, _DATABASE_TILE = 1024, 4096  # 16 MiB of products at a time
_UNIT = 2.0**-24  # rounding unit of float32


def hamming_cross(query_nw: np.ndarray, database_mw: np.ndarray) -> np.ndarray:
    """int32 (N, M): number of differing bits."""
    out = np.empty((len(query_nw), len(database_mw)), dtype=np.int32)
    if out.size:
        _cross(interleaved(query_nw), interleaved(database_mw), out)
    return out


def hamming_topk(
    query_nw: np.ndarray, database_mw: np.ndarray, k: int, exclude_self: bool, exclude: Exclude
) -> tuple[np.ndarray, np.ndarray]:
    """Distance int32 (N, k) and index int64 (N, k). Few queries share the work by parts of the database."""
    rows, blocks = -(-len(query_nw) // _BLOCK), -(-len(database_mw) // _BLOCK)
    parts = max(1, min(blocks, -(-4 * numba.get_num_threads() // max(1, rows)))) if rows else 1
    distance = np.full((len(query_nw), parts, k), _FAR, dtype=np.int32)
    index = np.full((len(query_nw), parts, k), -1, dtype=np.int64)
    if distance.size and blocks:
        query_group, database_group = _groups(exclude)
        query, database = interleaved(query_nw), interleaved(database_mw)
        _topk(query, database, len(database_mw), exclude_self, query_group, database_group, distance, index)
    distance_nk, index_nk = distance.reshape(len(query_nw), parts * k), index.reshape(len(query_nw), parts * k)
    if parts > 1:  # parts are in index order, so a stable sort keeps ties right
        order = np.argsort(distance_nk, axis=1, kind="stable")[:, :k]
        distance_nk, index_nk = (
            np.take_along_axis(distance_nk, order, axis=1),
            np.take_along_axis(index_nk, order, axis=1),
        )
    distance_nk[index_nk < 0] = -1
    return distance_nk, index_nk


def l2_topk(
    query_nd: np.ndarray, database_md: np.ndarray, k: int, exclude_self: bool, exclude: Exclude
) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance float32 (N, k) and index int64 (N, k).

    The filter works on values less the database's mean, scaled by a power of two so that the largest is at most 1 and
    rounded to float32: a, b. With u = 2**-24, d axes and S = |a| + |b|, rounding the inputs moves the squared distance by up to
    (2 u + u^2) S^2, the product of any summation order by d u / (1 - d u) |a| |b| <= 0.27 d u S^2 (doubled: 0.54 d u S^2, for
    d <= 2**20), norms and sums by less than 10 u S^2. The bound used is (0.55 d + 16) u S^2.
    """
    n, axes = query_nd.shape
    distance, index = np.full((n, k), np.inf, dtype=np.float32), np.full((n, k), -1, dtype=np.int64)
    upper = np.full((n, k), np.inf, dtype=np.float32)
    query_group, database_group = _groups(exclude)
    if distance.size and len(database_md):
        mean_d = database_md.mean(axis=0, dtype=np.float64)
        largest = max(float(max(x.max(initial=0), -x.min(initial=0))) for x in (query_nd, database_md, mean_d)) * 2
        scale = 2.0 ** -np.ceil(np.log2(largest)) if largest > 0 else 1.0
        query, query_norm = _centred(query_nd, mean_d, scale)
        slack: Any = np.float32((0.55 * axes + 16) * _UNIT)
        # Float32 results below the normal range, and products that underflow, are decided by the exact sum.
        least: Any = np.float32(min(axes * 2.0**-140 + 2.0**-148 * scale * scale, 1e30))
        product = np.empty((min(n, _QUERY_TILE), min(len(database_md), _DATABASE_TILE)), dtype=np.float32)
        for m in range(0, len(database_md), _DATABASE_TILE):
            tile, tile_norm = _centred(database_md[m : m + _DATABASE_TILE], mean_d, scale)
            for i in range(0, n, _QUERY_TILE):
                part = slice(i, min(n, i + _QUERY_TILE))
                out = product[: part.stop - i, : len(tile)]
                np.matmul(query[part], tile.T, out=out)
                _l2_scan(
                    out, query_norm, tile_norm, slack, least, query_nd, database_md, i, m,
                    exclude_self, query_group, database_group, upper, distance, index,
                )  # fmt: skip
    distance[index < 0] = -1
    return distance, index


def longest_run(
    query_nw: np.ndarray,
    database_mw: np.ndarray,
    length: int,
    position_bp: np.ndarray,
    exclude_self: bool,
    exclude: Exclude,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """run_bp, run_sites, index, all int64 (N,)."""
    run_bp, run_sites, index = (np.full(len(query_nw), fill, dtype=np.int64) for fill in (-1, 0, -1))
    if len(query_nw) and length:
        query_group, database_group = _groups(exclude)
        _longest_run(
            query_nw, database_mw, position_bp, exclude_self, query_group, database_group, run_bp, run_sites, index
        )
    return run_bp, run_sites, index


def _groups(exclude: Exclude) -> tuple[np.ndarray, np.ndarray]:
    """Groups of both sides; empty where nothing is excluded."""
    return exclude if exclude is not None else (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


def _centred(rows_nd: np.ndarray, mean_d: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows less the mean, scaled, as float32; and the norms of the rounded rows, summed in float64."""
    centred = ((rows_nd - mean_d) * scale).astype(np.float32)
    return centred, np.sqrt(np.einsum("nd,nd->n", centred, centred, dtype=np.float64)).astype(np.float32)


@numba.njit(cache=True, nogil=True)
def _cross_row(query: np.ndarray, database: np.ndarray, out: np.ndarray, i: int) -> None:
    counts = np.empty(_BLOCK * _BLOCK, dtype=np.int32)
    for j in range(database.shape[0]):
        xor_tile(query, i, database, j, counts)
        for r in range(min(_BLOCK, out.shape[0] - i * _BLOCK)):
            for c in range(min(_BLOCK, out.shape[1] - j * _BLOCK)):
                out[i * _BLOCK + r, j * _BLOCK + c] = counts[r * _BLOCK + c]


@numba.njit(cache=True, nogil=True, parallel=True)
def _cross(query: np.ndarray, database: np.ndarray, out: np.ndarray) -> None:
    for i in numba.prange(query.shape[0]):
        _cross_row(query, database, out, i)


@numba.njit(cache=True, nogil=True)
def _skipped(n: int, m: int, exclude_self: bool, query_group: np.ndarray, database_group: np.ndarray) -> bool:
    return (exclude_self and n == m) or (len(query_group) > 0 and query_group[n] == database_group[m])


@numba.njit(cache=True, nogil=True)
def _insert(values: np.ndarray, indices: np.ndarray, value: float, index: int) -> None:
    """Put `value` into the rising list behind its equals; the last falls off."""
    at = len(values) - 1
    while at > 0 and values[at - 1] > value:
        values[at] = values[at - 1]
        indices[at] = indices[at - 1]
        at -= 1
    values[at] = value
    indices[at] = index


@numba.njit(cache=True, nogil=True)
def _topk_row(
    query: np.ndarray,
    database: np.ndarray,
    members: int,
    exclude_self: bool,
    query_group: np.ndarray,
    database_group: np.ndarray,
    distance: np.ndarray,
    index: np.ndarray,
    i: int,
    part: int,
) -> None:
    """Query block i against part `part` of the database."""
    counts = np.empty(_BLOCK * _BLOCK, dtype=np.int32)
    parts, k = distance.shape[1], distance.shape[2]
    blocks = database.shape[0]
    for j in range(part * blocks // parts, (part + 1) * blocks // parts):
        xor_tile(query, i, database, j, counts)
        for r in range(min(_BLOCK, distance.shape[0] - i * _BLOCK)):
            n = i * _BLOCK + r
            kept = distance[n, part]
            nearest = counts[r * _BLOCK]
            for c in range(1, _BLOCK):
                nearest = min(nearest, counts[r * _BLOCK + c])
            if nearest >= kept[k - 1]:
                continue
            for c in range(min(_BLOCK, members - j * _BLOCK)):
                m = j * _BLOCK + c
                if counts[r * _BLOCK + c] < kept[k - 1] and not _skipped(
                    n, m, exclude_self, query_group, database_group
                ):
                    _insert(kept, index[n, part], counts[r * _BLOCK + c], m)


@numba.njit(cache=True, nogil=True, parallel=True)
def _topk(
    query: np.ndarray,
    database: np.ndarray,
    members: int,
    exclude_self: bool,
    query_group: np.ndarray,
    database_group: np.ndarray,
    distance: np.ndarray,
    index: np.ndarray,
) -> None:
    parts = distance.shape[1]
    for job in numba.prange(query.shape[0] * parts):
        _topk_row(
            query,
            database,
            members,
            exclude_self,
            query_group,
            database_group,
            distance,
            index,
            job // parts,
            job % parts,
        )


@numba.njit(cache=True, nogil=True)
def _l2_row(
    product: np.ndarray,
    norm: float,
    tile_norm: np.ndarray,
    slack: float,
    least: float,
    query_nd: np.ndarray,
    database_md: np.ndarray,
    n: int,
    m0: int,
    exclude_self: bool,
    query_group: np.ndarray,
    database_group: np.ndarray,
    upper: np.ndarray,
    distance: np.ndarray,
    index: np.ndarray,
) -> None:
    """One query against one tile: first the upper bounds, then the exact sum of every pair that they do not rule out."""
    k, size = len(upper), len(product)
    bound = np.empty(64, dtype=np.float32)
    places = np.empty(k, dtype=np.int64)
    for begin in range(0, size, 64):
        width = min(64, size - begin)
        if _bounds(product, norm, tile_norm, slack, begin, width, upper[k - 1], bound) == 0:
            continue
        for c in range(width):
            if bound[c] < upper[k - 1] and not _skipped(n, m0 + begin + c, exclude_self, query_group, database_group):
                _insert(upper, places, bound[c], c)
    limit: Any = upper[k - 1] * np.float32(1 + 2.0**-20) + least
    for begin in range(0, size, 64):
        width = min(64, size - begin)
        if _bounds(product, norm, tile_norm, -slack, begin, width, limit, bound) == 0:
            continue
        for c in range(width):
            m = m0 + begin + c
            if bound[c] <= limit and not _skipped(n, m, exclude_self, query_group, database_group):
                total = 0.0
                for axis in range(query_nd.shape[1]):
                    step = np.float64(query_nd[n, axis]) - np.float64(database_md[m, axis])
                    total += step * step
                value: Any = np.float32(total)
                if index[k - 1] < 0 or value < distance[k - 1]:
                    _insert(distance, index, value, m)


@numba.njit(cache=True, nogil=True)
def _bounds(
    product: np.ndarray,
    norm: float,
    tile_norm: np.ndarray,
    slack: float,
    begin: int,
    width: int,
    limit: float,
    bound: np.ndarray,
) -> int:
    """Upper (slack > 0) or lower bounds of `width` squared distances; returns how many do not exceed `limit`."""
    hits = 0
    for c in range(width):
        b = tile_norm[begin + c]
        value = (norm * norm + b * b) - np.float32(2) * product[begin + c] + slack * ((norm + b) * (norm + b))
        bound[c] = value
        hits += value <= limit
    return hits


@numba.njit(cache=True, nogil=True, parallel=True)
def _l2_scan(
    product: np.ndarray,
    query_norm: np.ndarray,
    tile_norm: np.ndarray,
    slack: float,
    least: float,
    query_nd: np.ndarray,
    database_md: np.ndarray,
    n0: int,
    m0: int,
    exclude_self: bool,
    query_group: np.ndarray,
    database_group: np.ndarray,
    upper: np.ndarray,
    distance: np.ndarray,
    index: np.ndarray,
) -> None:
    for r in numba.prange(product.shape[0]):
        n = n0 + r
        _l2_row(
            product[r], query_norm[n], tile_norm, slack, least, query_nd, database_md, n, m0,
            exclude_self, query_group, database_group, upper[n], distance[n], index[n],
        )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def _anchors(position_bp: np.ndarray, best_bp: int, anchors: np.ndarray) -> tuple[int, int]:
    """Windows such that every run longer than `best_bp` contains one: (sites per window, number), first sites in `anchors`.

    A run that contains neither of two neighbouring windows lies strictly between the first site of the one and the last
    site of the other; windows are set as far apart as that stretch stays within `best_bp`. The widest window
    that allows it is taken.
    """
    length = len(position_bp)
    width = 64
    while True:
        number, start = 0, -1  # a run lies after site `start`
        while start + 1 < length and position_bp[length - 1] - position_bp[start + 1] > best_bp:
            after = start // width + 1 if start >= 0 else 0
            furthest = -1
            while (after + 1) * width <= length:
                last = (after + 1) * width - 1
                if last - 1 > start and position_bp[last - 1] - position_bp[start + 1] > best_bp:
                    break
                furthest = after
                after += 1
            if furthest < 0:
                number = -1
                break
            anchors[number] = furthest * width
            number += 1
            start = furthest * width
        if number >= 0:
            return width, number
        width //= 2


@numba.njit(cache=True, nogil=True)
def _run_of_query(
    query_w: np.ndarray,
    database_mw: np.ndarray,
    position_bp: np.ndarray,
    n: int,
    exclude_self: bool,
    query_group: np.ndarray,
    database_group: np.ndarray,
) -> tuple[int, int, int]:
    length = len(position_bp)
    anchors = np.empty(length, dtype=np.int64)
    best_bp, best_sites, best_index = -1, 0, -1
    width, number = _anchors(position_bp, best_bp, anchors)
    for m in range(database_mw.shape[0]):
        if _skipped(n, m, exclude_self, query_group, database_group):
            continue
        reached, before = -1, best_bp
        for a in range(number):
            site = anchors[a]
            if site < reached:
                continue
            word = site >> 6
            window = (query_w[word] ^ database_mw[m, word]) >> np.uint64(site & 63)
            if window << np.uint64(64 - width):
                continue
            end = site + width  # first site behind the run
            while end < length:
                rest = (query_w[end >> 6] ^ database_mw[m, end >> 6]) >> np.uint64(end & 63)
                if rest:
                    end += np.int64(trailing_zeros(rest))  # type: ignore[call-arg]
                    break
                end = ((end >> 6) + 1) << 6
            end = min(end, length)
            reached = end
            start = site - 1  # last site before the run
            while start >= 0:
                rest = (query_w[start >> 6] ^ database_mw[m, start >> 6]) << np.uint64(63 - (start & 63))
                if rest:
                    start -= np.int64(leading_zeros(rest))  # type: ignore[call-arg]
                    break
                start = ((start >> 6) << 6) - 1
            span_bp = position_bp[end - 1] - position_bp[start + 1]
            if span_bp > best_bp:
                best_bp, best_sites, best_index = span_bp, end - 1 - start, m
        if best_bp > before:
            width, number = _anchors(position_bp, best_bp, anchors)
    return best_bp, best_sites, best_index


@numba.njit(cache=True, nogil=True, parallel=True)
def _longest_run(
    query_nw: np.ndarray,
    database_mw: np.ndarray,
    position_bp: np.ndarray,
    exclude_self: bool,
    query_group: np.ndarray,
    database_group: np.ndarray,
    run_bp: np.ndarray,
    run_sites: np.ndarray,
    index: np.ndarray,
) -> None:
    for n in numba.prange(query_nw.shape[0]):
        run_bp[n], run_sites[n], index[n] = _run_of_query(
            query_nw[n], database_mw, position_bp, n, exclude_self, query_group, database_group
        )
