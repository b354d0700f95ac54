"""Nearest rows by L2, cosine or correlation on the CPU: a coarse product proves most pairs away, the rest is computed
exactly.

All three are squared distances of some rows a, b: the rows themselves, or rows centred and scaled to norm 1, where 1 -
a.b = |a - b|^2 / 2 (a row that has no direction gets a coordinate of its own, which puts it at distance 1 from every
other). Less a common centre, which no distance sees, they are made coarse (`products`), and a pair is dropped when

    |a' - b'| > sqrt(limit) + |a - a'| + |b - b'|

holds beyond rounding; `limit` is the k-th smallest exact distance so far, or the radius. What remains is summed in
float64 in any order; where the possible error of that leaves open which float32 is the rounded one, it is summed again
as defined.

The set is streamed in tiles and indices rise, a later row must be strictly nearer, and lists of parts are merged by
(distance, index): no tile, thread or product changes an answer. Products are taken from the coarsest on; one that lets
too many pairs pass is given up for the next finer one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numba
import numpy as np

from engine.kernels.bits import amx
from engine.kernels.bits.tiles import trailing_zeros
from engine.kernels.nearest import products
from engine.kernels.nearest.checks import width
from engine.kernels.nearest.numba_exact import L2, METRICS, Side, pair_distance, side
from engine.kernels.nearest.products import BFLOAT16, COLUMNS, FLOAT32, INT8, KINDS, ROWS, UNIT, Product
from engine.kernels.nearest.rows import (  # fmt: skip
    NOT_SELF,
    Exclude,
    csr,
    each_part,
    groups,
    grown,
    in_threads,
    insert,
    merged,
    read_float32,
    skipped,
    tiles,
)

_QUERY_BYTES, _DATABASE_BYTES = 2**28, 2**24  # of float32 rows held at a time
_BLOCK = 96  # queries of a job: whole panels of ROWS, and of the matrix unit
_CHUNK = 256 // COLUMNS  # panels of database rows whose products are taken at a time
_STEPS = 512  # elements of a row whose products are taken at a time: both sides then fit the second-level cache
_UNIT_STEPS = 128  # the same on the matrix unit: 32 rows of 512 bytes of each side fit the first-level one
_SAMPLE, _SAMPLES = 128, 8  # rows that give the centre
_HELD = 256  # pairs held back per query, besides 2 k
_DIRECT = 8  # so few queries need no coarse product
_ALL = np.uint64(2**COLUMNS - 1)
_EVERY = -1  # in place of a kind of product: every pair passes


class _Coarse(NamedTuple):
    """Packed rows (`products.pack`); `size_n` no less than |a'|; maxima of `rest_n` and `size_n` over each panel; whether they
    are packed for the matrix unit."""

    packed_psw: np.ndarray
    scale_n: np.ndarray
    square_n: np.ndarray
    rest_n: np.ndarray
    whole_n: np.ndarray
    start_n: np.ndarray
    size_n: np.ndarray
    panel_rest_p: np.ndarray
    panel_size_p: np.ndarray
    for_unit: bool


class _Geometry(NamedTuple):
    """Where coarse rows live. L2: row * gain - centre. Others: (row - mean) / norm - centre.

    A distance as defined is |a - b|^2 / unit within `slack` and what rounding to float32 costs.
    """

    metric: int
    gain: float
    unit: float
    slack: float
    centre_d: np.ndarray


def features_topk(
    query_nd: Any,
    database_md: Any,
    k: int,
    metric: str,
    exclude_self: bool,
    exclude: Exclude,
    product: Product | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Distance float32 (N, k) and index int64 (N, k). Few queries share the work by parts of each tile."""
    n = query_nd.shape[0]
    distance, index = np.full((n, k), -1, dtype=np.float32), np.full((n, k), -1, dtype=np.int64)
    threads = numba.get_num_threads()
    for part in tiles(n, 4 * width(query_nd), _QUERY_BYTES, _BLOCK):
        blocks = -(-(part.stop - part.start) // _BLOCK)
        parts = -(-2 * threads // blocks) if threads > 1 else 1
        values = np.full((part.stop - part.start, parts, k), np.inf, dtype=np.float32)
        indices = np.full(values.shape, -1, dtype=np.int64)

        def search(block: int, given: tuple, parts: int = parts, found: tuple = (values, indices)) -> tuple[int, int]:
            return _topk_block(*given, block // parts, block % parts, *found)  # type: ignore[call-arg]

        _stream(query_nd, part, database_md, metric, exclude_self, exclude, product, blocks * parts, search)
        distance[part], index[part] = merged(values, indices, k)
    return distance, index


def features_range(
    query_nd: Any,
    database_md: Any,
    radius: float,
    metric: str,
    exclude_self: bool,
    exclude: Exclude,
    product: Product | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets int64 (N + 1,), index int64 (R,), distance float32 (R,)."""
    n = query_nd.shape[0]
    found = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))]
    for part in tiles(n, 4 * width(query_nd), _QUERY_BYTES, _BLOCK):

        def search(block: int, given: tuple, start: int = part.start) -> tuple[int, int]:
            row, index, distance, passed = _range_block(*given, block, np.float32(radius))  # type: ignore[call-arg]
            found.append((row + start, index, distance))
            return passed, len(row)

        blocks = -(-(part.stop - part.start) // _BLOCK)
        _stream(query_nd, part, database_md, metric, exclude_self, exclude, product, blocks, search)
    offsets, index, distance = csr(n, found)
    return offsets, index, distance


def _stream(
    query_nd: Any,
    part: slice,
    database_md: Any,
    metric: str,
    exclude_self: bool,
    exclude: Exclude,
    product: Product | None,
    jobs: int,
    search: Callable[..., tuple[int, int]],
) -> None:
    """search(job, given=arguments of a block function) for every job and every tile of the database, tiles in order.

    It returns how many pairs passed the coarse product, and how many of those were wanted.
    """
    query = side(read_float32(query_nd, part), METRICS[metric])
    geometry = _geometry(metric, query, database_md)
    axes = query.rows_nd.shape[1]
    few = product is None and len(query.rows_nd) <= _DIRECT
    levels = [_EVERY] if few else [KINDS[name] for name in products.FASTER] if product is None else [KINDS[product]]
    coarse_queries: dict[int, _Coarse] = {}
    for tile in tiles(database_md.shape[0], 4 * axes, _DATABASE_BYTES, COLUMNS):
        database, kind = side(read_float32(database_md, tile), METRICS[metric]), levels[0]
        if kind not in coarse_queries:
            coarse_queries[kind] = _coarse(query, geometry, kind, True)
        given = (
            kind,
            geometry,
            query,
            coarse_queries[kind],
            database,
            _coarse(database, geometry, kind, False),
            part.start - tile.start if exclude_self else NOT_SELF,
            *groups(exclude, part, tile),
            tile.start,
        )
        done = in_threads(partial(search, given=given), jobs)
        wasted = sum(passed - wanted for passed, wanted in done)
        # An exact sum costs about as much as (axes + 256) / 32 axes of a pair's coarser product save.
        if len(levels) > 1 and wasted * (axes + 256) > len(query.rows_nd) * len(database.rows_nd) * axes / 16:
            levels = levels[1:]


def _geometry(metric: str, query: Side, database_md: Any) -> _Geometry:
    """The centre is the mean of some rows of the database, spread over it."""
    m, axes = database_md.shape[0], query.rows_nd.shape[1]
    starts = range(0, m, max(_SAMPLE, -(-m // _SAMPLES)))
    read = [read_float32(database_md, slice(start, min(m, start + _SAMPLE))) for start in starts]
    sample = side(np.concatenate(read) if read else np.empty((0, axes), np.float32), METRICS[metric])
    if metric == "l2":
        top = max(float(side.norm_n.max(initial=0.0)) for side in (query, sample))
        gain = 2.0 ** -np.ceil(np.log2(top)) if top > 0 else 1.0
        unit, slack = gain * gain, 2.0**-149
    else:
        gain, unit, slack = 1.0, 2.0, (axes + 4) * 2.0**-50
    geometry = _Geometry(METRICS[metric], gain, unit, slack, np.zeros(axes))
    gain_n, shift_n, _ = _placed(sample, geometry)
    # not a product of NumPy's: the threads of its BLAS wait for the next one on processors that the search needs
    centre_d = (np.einsum("n,nd->d", gain_n, sample.rows_nd) - shift_n.sum()) / max(1, len(gain_n))
    return geometry._replace(centre_d=centre_d)


def _placed(side: Side, geometry: _Geometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """gain, shift and extra of `products.pack` for each row."""
    if geometry.metric == L2:
        zeros_n = np.zeros(len(side.norm_n))
        return zeros_n + geometry.gain, zeros_n, zeros_n
    directed = side.norm_n > 0
    gain_n = np.where(directed, 1.0 / np.where(directed, side.norm_n, 1.0), 0.0)
    return gain_n, side.mean_n * gain_n, np.where(directed, 0.0, 1.0)


def _coarse(side: Side, geometry: _Geometry, kind: int, of_query: bool) -> _Coarse:
    for_unit = kind in (INT8, BFLOAT16) and amx.granted()
    wide = (UNIT if for_unit else ROWS) if of_query else COLUMNS
    rows = 0 if kind == _EVERY else len(side.rows_nd)
    panels, steps = -(-rows // wide), -(-side.rows_nd.shape[1] // products.per_element(kind)) if rows else 0
    if for_unit:  # whole registers, and two of them along the queries
        panels, steps = panels + panels % 2 * of_query, -(-steps // UNIT) * UNIT
    storage = np.empty(panels * steps * wide + 16, dtype=np.int32)
    start = (-storage.ctypes.data % 64) // 4  # vectors must not straddle cache lines
    packed = storage[start : start + panels * steps * wide].reshape(panels, steps, wide)
    packed[-1:] = 0  # the panel that makes their number even holds no row
    scale_n, rest_n, whole_n, size_n = (np.zeros(panels * wide, dtype=np.float32) for _ in range(4))
    square_n = np.full(panels * wide, np.inf, dtype=np.float32)  # rows that fill the last panel are infinitely far
    start_n = np.zeros(panels * wide, dtype=np.int32)
    if rows:
        placed = _placed(side, geometry)
        found = (scale_n, square_n, rest_n, whole_n, start_n)

        def pack(part: slice) -> None:
            of_panels = packed[part.start // wide : -(-part.stop // wide)]
            gain_n, shift_n, extra_n = (x[part] for x in placed)
            made = tuple(x[part] for x in found)
            products.pack(
                side.rows_nd[part],
                gain_n,
                shift_n,
                extra_n,
                geometry.centre_d,
                kind,
                of_query,
                for_unit and of_query,
                of_panels,
                *made,
            )

        each_part(pack, rows, wide)
        size_n[:rows] = np.sqrt(square_n[:rows]) * np.float32(1 + 2.0**-20)
    panel_rest_p, panel_size_p = (x.reshape(panels, wide).max(axis=1, initial=0) for x in (rest_n, size_n))
    return _Coarse(packed, scale_n, square_n, rest_n, whole_n, start_n, size_n, panel_rest_p, panel_size_p, for_unit)


@numba.njit(cache=True, nogil=True)
def _in_vectors(
    kind: int, query: _Coarse, database: _Coarse, n0: int, n1: int, j0: int, j1: int, out: np.ndarray
) -> None:
    steps, pitch = query.packed_psw.shape[1], (j1 - j0) * COLUMNS
    a, b = query.packed_psw.reshape(-1), database.packed_psw.reshape(-1)
    for step in range(0, max(1, steps), _STEPS):
        for j in range(j0, j1):
            for i in range(n0 // ROWS, -(-n1 // ROWS)):
                at = (i * ROWS - n0) * pitch + (j - j0) * COLUMNS
                a_at, b_at = (i * steps + step) * ROWS, (j * steps + step) * COLUMNS
                number = min(_STEPS, steps - step)
                if step == 0:
                    products.tile(kind, a, a_at, b, b_at, number, database.start_n, j * COLUMNS, 0, out, at, pitch)
                else:
                    products.tile(kind, a, a_at, b, b_at, number, out, at, pitch, out, at, pitch)


@numba.njit(cache=True, nogil=True)
def _on_the_unit(
    kind: int, query: _Coarse, database: _Coarse, n0: int, n1: int, j0: int, j1: int, out: np.ndarray
) -> None:
    steps, pitch = query.packed_psw.shape[1], (j1 - j0) * COLUMNS
    a, b = query.packed_psw.reshape(-1), database.packed_psw.reshape(-1)
    amx.take_unit(amx.SHAPE)  # type: ignore[call-arg]
    for step in range(0, max(1, steps), _UNIT_STEPS):
        number = min(_UNIT_STEPS, steps - step)
        for n in range(n0, n1, 2 * UNIT):
            a_at, b_at = (n // UNIT * steps + step) * UNIT, (j0 * steps + step) * COLUMNS
            at = (n - n0) * pitch
            if step == 0:
                products.multiplied_tiles(
                    kind, a, a_at, b, b_at, steps, j1 - j0, number, database.start_n, j0 * COLUMNS, 0, out, at, pitch
                )
            else:
                products.multiplied_tiles(
                    kind, a, a_at, b, b_at, steps, j1 - j0, number, out, at, pitch, out, at, pitch
                )
    amx.give_back()


@numba.njit(cache=True, nogil=True)
def _in_vectors_or_on_the_unit(
    kind: int, query: _Coarse, database: _Coarse, n0: int, n1: int, j0: int, j1: int, out: np.ndarray
) -> None:
    """Products of queries [n0, n1) with panels [j0, j1): 32-bit elements [n - n0, j - j0, COLUMNS]."""
    if query.for_unit:
        _on_the_unit(kind, query, database, n0, n1, j0, j1, out)
    else:
        _in_vectors(kind, query, database, n0, n1, j0, j1, out)


_products = _in_vectors_or_on_the_unit if amx.COMPILED else _in_vectors


@numba.njit(cache=True, nogil=True)
def _least(query: _Coarse, n: int, panel_rest: float, panel_size: float, reach: float, loss: float) -> Any:
    """What `products.near_columns` must not stay below, for rows of a panel that are not proven further from row n than
    `reach`.

    With A, B no less than the norms, a float32 sum of products errs by less than loss (A + B)^2 / 2, and what follows
    here by less than 2**-21 (A + B)^2; both are in `loss`.
    """
    both = np.float64(query.size_n[n]) + panel_size
    furthest = reach + np.float64(query.rest_n[n]) + panel_rest
    return np.float32(np.float64(query.square_n[n]) - (furthest * furthest + loss * both * both))


@numba.njit(cache=True, nogil=True)
def _reach(geometry: _Geometry, value: float) -> float:
    """No less than |a - b| of a pair whose distance, rounded to float32, is `value`."""
    return np.sqrt(geometry.unit * (np.float64(value) * (1 + 2.0**-22) + geometry.slack))


@numba.njit(cache=True, nogil=True)
def _loss(kind: int, axes: int) -> float:
    """Of float32 sums of d products: d 2**-24 of the sum of magnitudes in any order, doubled for bfloat16, whose unit
    may flush.
    """
    return 2.0**-20 + (0 if kind == INT8 else (axes + 2) * (2.0**-24 if kind == FLOAT32 else 2.0**-23))


@numba.njit(cache=True, nogil=True)
def _bounds(product: float, query: _Coarse, n: int, database: _Coarse, m: int, loss: float) -> tuple[float, float]:
    """Of |a - b|: lower and upper, the lower one 0 where nothing can be said."""
    query_size, size = np.float64(query.size_n[n]), np.float64(database.size_n[m])
    query_rest, rest = np.float64(query.rest_n[n]), np.float64(database.rest_n[m])
    error = loss * (query_size + size) * (query_size + size)
    twice = 2.0 * np.float64(query.scale_n[n]) * np.float64(database.scale_n[m]) * product
    square = np.float64(query.square_n[n]) + np.float64(database.square_n[m]) - twice
    low = np.sqrt(square - error) - query_rest - rest
    high = np.sqrt(max(0.0, square) + error) + query_rest + rest
    # |a.b - a'.b'| <= |a - a'| |b| + |a'| |b - b'|: closer where a and b are far apart
    whole = np.float64(query.whole_n[n]) + np.float64(database.whole_n[m]) - twice
    error += 2.0 * (query_rest * (size + rest) + query_size * rest)
    low = max(low if low > 0 else 0.0, np.sqrt(whole - error) if whole > error else 0.0)
    return low, min(high, np.sqrt(max(0.0, whole) + error))


@numba.njit(cache=True, nogil=True)
def _settle(
    geometry: _Geometry,
    query: Side,
    n: int,
    database: Side,
    first: int,
    held: int,
    low: np.ndarray,
    held_m: np.ndarray,
    upper_m: np.ndarray,
    reach: float,
    values: np.ndarray,
    indices: np.ndarray,
) -> tuple[float, int, int]:
    """Exact distances of the pairs held back, in the order of their indices: (new reach, pairs computed, pairs kept).

    Where there are many, those with the smallest upper bounds are computed first, for a limit that spares most of the
    others.
    """
    k, computed, kept = len(values), 0, 0
    if held > 2 * k and upper_m[k - 1] >= 0:
        worst: Any = np.float32(0)
        for place in range(k):
            products.prefetch(database.rows_nd, upper_m[min(place + 1, k - 1)])
            worst = max(worst, pair_distance(geometry.metric, query, n, database, upper_m[place]))
        reach = min(reach, _reach(geometry, worst))
        computed += k
    left = 0
    for c in range(held):
        if low[c] <= reach:
            low[left], held_m[left] = low[c], held_m[c]
            left += 1
    for c in range(left):
        if c + 1 < left:
            products.prefetch(database.rows_nd, held_m[c + 1])
        if low[c] <= reach:
            value = pair_distance(geometry.metric, query, n, database, held_m[c])
            computed += 1
            if value < values[k - 1]:
                insert(values, indices, value, first + held_m[c])
                reach = min(reach, _reach(geometry, values[k - 1]))
                kept += 1
    return reach, computed, kept


@numba.njit(cache=True, nogil=True)
def _topk_block(
    kind: int,
    geometry: _Geometry,
    query: Side,
    coarse_query: _Coarse,
    database: Side,
    coarse_database: _Coarse,
    shift: int,
    query_group: np.ndarray,
    database_group: np.ndarray,
    first: int,
    block: int,
    piece: int,
    value_npk: np.ndarray,
    index_npk: np.ndarray,
) -> tuple[int, int]:
    """One block of queries against one part of the tile: pairs that were computed, and pairs that were kept."""
    pieces, k = value_npk.shape[1], value_npk.shape[2]
    n0, n1 = block * _BLOCK, min(len(query.rows_nd), (block + 1) * _BLOCK)
    panels = -(-len(database.rows_nd) // COLUMNS)
    j1 = (piece + 1) * panels // pieces
    out = np.empty(_BLOCK * _CHUNK * COLUMNS, dtype=np.int32)
    real = out.view(np.float32)
    scale_n, square_n = coarse_database.scale_n, coarse_database.square_n
    panel_rest_p, panel_size_p = coarse_database.panel_rest_p, coarse_database.panel_size_p
    loss = _loss(kind, query.rows_nd.shape[1])
    most, rows = _HELD + 2 * k, n1 - n0
    held, reach = np.zeros(rows, dtype=np.int64), np.empty(rows, dtype=np.float64)
    low, held_m = np.empty((rows, most), dtype=np.float64), np.empty((rows, most), dtype=np.int64)
    upper, upper_m = np.full((rows, k), np.inf), np.full((rows, k), -1)
    computed, kept = 0, 0
    for r in range(rows):
        reach[r] = _reach(geometry, value_npk[n0 + r, piece, k - 1])
    for j0 in range(piece * panels // pieces, j1, _CHUNK):
        wide = min(_CHUNK, j1 - j0)
        if kind != _EVERY:
            _products(kind, coarse_query, coarse_database, n0, n1, j0, j0 + wide, out)
        for r in range(rows):
            n = n0 + r
            twice: Any = np.float32(2) * coarse_query.scale_n[n] if kind != _EVERY else np.float32(0)
            for j in range(j0, j0 + wide):
                columns: Any = _ALL
                at = ((n - n0) * wide + j - j0) * COLUMNS
                if kind != _EVERY:
                    least = _least(coarse_query, n, panel_rest_p[j], panel_size_p[j], reach[r], loss)
                    columns = products.near_columns(kind, out, at, scale_n, square_n, j * COLUMNS, twice, least)
                while columns:
                    c = np.int64(trailing_zeros(columns))  # type: ignore[call-arg]
                    m = j * COLUMNS + c
                    columns &= columns - np.uint64(1)
                    if m >= len(database.rows_nd) or skipped(n, m, shift, query_group, database_group):
                        continue
                    nearest, furthest = 0.0, np.inf
                    if kind != _EVERY:
                        product = np.float64(out[at + c]) if kind == INT8 else np.float64(real[at + c])
                        nearest, furthest = _bounds(product, coarse_query, n, coarse_database, m, loss)
                    if furthest < upper[r, k - 1]:
                        insert(upper[r], upper_m[r], furthest, m)
                        worst = upper[r, k - 1] * upper[r, k - 1] / geometry.unit + geometry.slack
                        reach[r] = min(reach[r], _reach(geometry, worst))
                    low[r, held[r]], held_m[r, held[r]] = nearest, m
                    held[r] += 1
                    if held[r] == most:
                        reach[r], more, better = _settle(
                            geometry, query, n, database, first, most, low[r], held_m[r], upper_m[r], reach[r],
                            value_npk[n, piece], index_npk[n, piece],
                        )  # fmt: skip
                        held[r], computed, kept = 0, computed + more, kept + better
    for r in range(rows):
        _, more, better = _settle(
            geometry, query, n0 + r, database, first, held[r], low[r], held_m[r], upper_m[r], reach[r],
            value_npk[n0 + r, piece], index_npk[n0 + r, piece],
        )  # fmt: skip
        computed, kept = computed + more, kept + better
    return computed, kept


@numba.njit(cache=True, nogil=True)
def _range_block(
    kind: int,
    geometry: _Geometry,
    query: Side,
    coarse_query: _Coarse,
    database: Side,
    coarse_database: _Coarse,
    shift: int,
    query_group: np.ndarray,
    database_group: np.ndarray,
    first: int,
    block: int,
    radius: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Rows, indices and distances of the pairs of one block of queries within the radius; and how many pairs passed."""
    n0, n1 = block * _BLOCK, min(len(query.rows_nd), (block + 1) * _BLOCK)
    panels = -(-len(database.rows_nd) // COLUMNS)
    out = np.empty(_BLOCK * _CHUNK * COLUMNS, dtype=np.int32)
    scale_n, square_n = coarse_database.scale_n, coarse_database.square_n
    panel_rest_p, panel_size_p = coarse_database.panel_rest_p, coarse_database.panel_size_p
    loss, reach = _loss(kind, query.rows_nd.shape[1]), _reach(geometry, radius)
    rows, indices = np.empty(64, dtype=np.int64), np.empty(64, dtype=np.int64)
    distances = np.empty(64, dtype=np.float32)
    passed, held = 0, 0
    for j0 in range(0, panels, _CHUNK):
        width = min(_CHUNK, panels - j0)
        if kind != _EVERY:
            _products(kind, coarse_query, coarse_database, n0, n1, j0, j0 + width, out)
        for n in range(n0, n1):
            twice: Any = np.float32(2) * coarse_query.scale_n[n] if kind != _EVERY else np.float32(0)
            for j in range(j0, j0 + width):
                columns: Any = _ALL
                if kind != _EVERY:
                    at = ((n - n0) * width + j - j0) * COLUMNS
                    least = _least(coarse_query, n, panel_rest_p[j], panel_size_p[j], reach, loss)
                    columns = products.near_columns(kind, out, at, scale_n, square_n, j * COLUMNS, twice, least)
                while columns:
                    m = j * COLUMNS + np.int64(trailing_zeros(columns))  # type: ignore[call-arg]
                    columns &= columns - np.uint64(1)
                    if m >= len(database.rows_nd) or skipped(n, m, shift, query_group, database_group):
                        continue
                    passed += 1
                    value = pair_distance(geometry.metric, query, n, database, m)
                    if value <= radius:
                        if held == len(rows):
                            rows, indices, distances = grown(rows), grown(indices), grown(distances)
                        rows[held], indices[held], distances[held] = n, first + m, value
                        held += 1
    return rows[:held], indices[:held], distances[:held], passed
