"""Nearest rows by L2, cosine or correlation on the GPU: a coarse product bounds every distance, few pairs are computed
exactly.

Geometry and bounds are those of `numba_features`. A first kernel multiplies rows made coarse (int8, bfloat16 or
float32) on the tensor cores and keeps, of each group of some columns, the smallest lower bound of |b - a|. Groups are
then computed exactly in the order of these bounds until the next bound proves that nothing left out can be nearer than
the k-th; a query that needs too many goes on to the next finer product. Exact is: summed in float64 in any order and,
where the possible error of that leaves open which float32 is the rounded one, summed again as defined.

Range: one pass counts per row and tile the pairs whose lower bound is within reach, a second lists them, and the exact
distance decides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.nearest.checks import norms, width
from engine.kernels.nearest.triton_shared import (
    FAR,
    FILLED,
    INTERPRETED,
    LAST_KEY,
    NOT_SELF,
    SCRATCH_BYTES,
    TILE_BYTES,
    Devices,
    Exclude,
    allowed_pairs,
    exclusion,
    float32_on,
    home,
    merged,
    merged_pairs,
    over,
    parameters,
    pieces,
    smallest_groups,
    split_keys,
    tile_of,
)

NOWHERE = tl.constexpr(NOT_SELF)
_PRODUCTS = ("int8", "bfloat16", "float32")
_SAMPLE, _SAMPLES = 128, 8  # rows that give the centre
_LEVELS, _NORM = 127, 46000.0  # of int8 rows (`products.pack`)
PRECISION = "ieee" if INTERPRETED or torch.version.hip else "tf32x3"  # of float32 products
_EXTRA = 8  # groups computed at first, besides k
_GIVE_UP = 16  # times as many groups before a finer product is taken


class _Side(NamedTuple):
    """Rows of a tile and what the definitions need of them: means (of correlation only) and norms, in float64."""

    rows_nd: torch.Tensor
    mean_n: torch.Tensor
    norm_n: torch.Tensor


class _Geometry(NamedTuple):
    """L2: row * gain - centre. Others: (row - mean) / norm - centre. A distance as defined is |a - b|^2 / unit within
    `slack`.
    """

    metric: str
    gain: float
    unit: float
    slack: float
    centre_d: torch.Tensor


class _Coarse(NamedTuple):
    """a' = scale * row; `square_n` = |a'|^2 less what products may err by; `rest_n` no less than |a - a'|."""

    rows_nd: torch.Tensor
    scale_n: torch.Tensor
    square_n: torch.Tensor
    rest_n: torch.Tensor


def features_topk(
    query_nd: Any,
    database_md: Any,
    k: int,
    metric: str,
    exclude_self: bool,
    exclude: Exclude,
    product: str | None = None,
    devices: Devices = None,
) -> tuple[Any, Any]:
    """Distance float32 (N, k) and index int64 (N, k)."""
    n, m, axes = query_nd.shape[0], database_md.shape[0], width(query_nd)

    def search(device: torch.device, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.full((n, k), LAST_KEY, dtype=torch.int64, device=device)
        group = parameters("int8", device)["group"]
        minimum_bytes = 4 * -(-min(m, TILE_BYTES // max(1, 4 * axes)) // group)
        for part in pieces(0, n, max(4 * axes, minimum_bytes), SCRATCH_BYTES):
            query = _side(float32_on(query_nd, part, device), metric)
            geometry = _geometry(metric, query, database_md, device)
            coarse: dict[str, _Coarse] = {}
            for tile in pieces(rows.start, rows.stop, 4 * axes, TILE_BYTES):
                database = _side(float32_on(database_md, tile, device), metric)
                shift = part.start - tile.start if exclude_self else NOT_SELF
                groups = exclusion(exclude, part, tile, device)
                left = torch.arange(part.stop - part.start, device=device)
                for kind in _PRODUCTS if product is None else (product,):
                    if not len(left):
                        break
                    if kind not in coarse:
                        coarse[kind] = _coarse(query, geometry, kind)
                    left = _refine(
                        kind, geometry, query, coarse[kind], database, left, shift, groups, exclude is not None,
                        tile.start, keys[part], kind == (product or _PRODUCTS[-1]),
                    )  # fmt: skip
        return keys, keys[:, :0]

    found, device = over(devices, query_nd, m, search)
    keys, _ = merged(found, device, k) if len(found) > 1 else found[0]
    rank, index = split_keys(keys)
    distance = torch.where(index >= 0, rank.view(torch.float32), -1.0)
    distance, index = home(query_nd, distance, index)
    return distance, index


def features_range(
    query_nd: Any,
    database_md: Any,
    radius: float,
    metric: str,
    exclude_self: bool,
    exclude: Exclude,
    product: str | None = None,
    devices: Devices = None,
) -> tuple[Any, Any, Any]:
    """Offsets int64 (N + 1,), index int64 (R,), distance float32 (R,)."""
    n, m, axes = query_nd.shape[0], database_md.shape[0], width(query_nd)
    kind = product or _PRODUCTS[0]

    def search(device: torch.device, rows: slice) -> list[tuple[torch.Tensor, ...]]:
        given = parameters(kind, device)
        whole = torch.empty(0, dtype=torch.int64, device=device)
        found: list[tuple[torch.Tensor, ...]] = [(whole, whole, whole.to(torch.float32))]
        limit = torch.tensor(radius, dtype=torch.float64).to(torch.float32).to(device)
        count_bytes = 16 * -(-min(m, TILE_BYTES // max(1, 4 * axes)) // given["rows"])
        for part in pieces(0, n, max(4 * axes, count_bytes), SCRATCH_BYTES):
            query = _side(float32_on(query_nd, part, device), metric)
            geometry = _geometry(metric, query, database_md, device)
            coarse = _coarse(query, geometry, kind)
            reach_n = _reach(geometry, limit.double()) + coarse.rest_n.double()
            reach_n = (reach_n * (1 + 2.0**-22)).to(torch.float32).clamp(max=3e38)
            for tile in pieces(rows.start, rows.stop, 4 * axes, TILE_BYTES):
                database = _side(float32_on(database_md, tile, device), metric)
                shift = part.start - tile.start if exclude_self else NOT_SELF
                shape = part.stop - part.start, tile.stop - tile.start
                other = _coarse(database, geometry, kind)
                pairs = (
                    *coarse, *other, *exclusion(exclude, part, tile, device), reach_n, *shape, coarse.rows_nd.shape[1], shift
                )  # fmt: skip
                counts = torch.empty((shape[0], triton.cdiv(shape[1], given["rows"])), dtype=torch.int64, device=device)
                how = {"GROUPS": exclude is not None} | _launch(given)
                grid = (triton.cdiv(shape[0], given["queries"]) * counts.shape[1],)
                count_kernel[grid](*pairs, counts, **how)
                ends = counts.flatten().cumsum(0)
                index = torch.empty(int(ends[-1]), dtype=torch.int64, device=device)
                if len(index):
                    how["QUERIES"] = few = min(FILLED, given["queries"])
                    grid = (triton.cdiv(shape[0], few) * counts.shape[1],)
                    fill_kernel[grid](*pairs, counts, ends - counts.flatten(), index, **how)
                row = torch.arange(shape[0], device=device).repeat_interleave(counts.sum(dim=1))
                value = _exact(geometry, query, database, row, index[:, None])[:, 0]
                near = value <= limit
                found.append((row[near] + part.start, index[near] + tile.start, value[near]))
        return found

    found, device = over(devices, query_nd, m, search)
    offsets, index, distance = home(query_nd, *merged_pairs([x for piece in found for x in piece], device, n))
    return offsets, index, distance


def features_cross(query_nd: torch.Tensor, database_md: torch.Tensor, metric: str) -> torch.Tensor:
    """float32 (N, M)."""
    device = query_nd.device
    query, database = (_side(float32_on(x, slice(None), device), metric) for x in (query_nd, database_md))
    geometry = _Geometry(metric, 1.0, 1.0, 0.0, torch.empty(0, device=device))
    out = torch.empty((len(query.rows_nd), len(database.rows_nd)), dtype=torch.float32, device=device)
    every = torch.arange(out.shape[1], device=device)
    for part in pieces(0, len(out), 8 * out.shape[1], SCRATCH_BYTES) if out.numel() else ():
        row = torch.arange(part.start, part.stop, device=device)
        out[part] = _exact(geometry, query, database, row, every.expand(len(row), -1).contiguous())
    return out


def _refine(
    kind: str,
    geometry: _Geometry,
    query: _Side,
    coarse: _Coarse,
    database: _Side,
    left: torch.Tensor,
    shift: int,
    groups: tuple[torch.Tensor, torch.Tensor],
    grouped: bool,
    first: int,
    keys: torch.Tensor,
    last: bool,
) -> torch.Tensor:
    """Searches one tile for the queries `left` and puts what is proven into `keys`; returns those it gave up (none if
    `last`).
    """
    given, k, device = parameters(kind, query.rows_nd.device), keys.shape[1], keys.device
    mine, other = _Coarse(*(x[left] for x in coarse)), _coarse(database, geometry, kind)
    members, axes = database.rows_nd.shape
    columns = triton.cdiv(members, given["rows"]) * (given["rows"] // given["group"])
    minima = torch.empty((len(left), columns), dtype=torch.int32, device=device)
    grid = (triton.cdiv(len(left), given["queries"]) * triton.cdiv(members, given["rows"]),)
    minima_kernel[grid](
        *mine, *other, groups[0][left] if grouped else groups[0], groups[1], left, len(left), members, axes, shift, minima,
        GROUPS=grouped, GROUP=given["group"], **_launch(given),
    )  # fmt: skip
    take = most = min(columns, k + _EXTRA)
    at = torch.arange(len(left), device=device)  # lines of `left` that are not proven yet
    while len(at):
        chosen = smallest_groups(minima[at], min(columns, take + 1))
        beyond = minima[at].gather(1, chosen[:, -1:].long())[:, 0].view(torch.float32).double()
        beyond = torch.where(torch.tensor(take >= columns, device=device), torch.inf, beyond)
        chosen = chosen[:, :take].to(torch.int64)
        m = (chosen[:, :, None] * given["group"] + torch.arange(given["group"], device=device)).flatten(1)
        allowed = (m < members) & (left[at][:, None] + shift != m)
        if grouped:
            allowed &= groups[0][left[at]][:, None] != groups[1][m.clamp(max=members - 1)]
        best = keys[left[at]]
        for line in pieces(0, len(at), 24 * m.shape[1], SCRATCH_BYTES):
            value = _exact(geometry, query, database, left[at[line]], torch.where(allowed[line], m[line], -1))
            new = value.view(torch.int32).to(torch.int64) << 32 | (m[line] + first)
            new = torch.where(allowed[line], new, LAST_KEY)
            best[line], _ = merged([(best[line], best[line, :0]), (new, new[:, :0])], device, k)
        worst = torch.where(best[:, -1] < LAST_KEY, (best[:, -1] >> 32).to(torch.int32).view(torch.float32), torch.inf)
        proven = beyond - mine.rest_n[at].double() > _reach(geometry, worst.double())
        proven |= torch.tensor(take >= columns, device=device)
        keys[left[at[proven]]] = best[proven]
        at = at[~proven]
        if not last and take >= _GIVE_UP * most:
            break
        take = min(columns, 4 * take)
    return left[at]


def _side(rows_nd: torch.Tensor, metric: str) -> _Side:
    n, axes = rows_nd.shape
    mean_n = torch.zeros(n, dtype=torch.float64, device=rows_nd.device)
    if metric == "correlation" and n and axes:
        mean_kernel[(triton.cdiv(n, 64),)](rows_nd, mean_n, n, axes, BLOCK=64)
    norm_n = torch.empty_like(mean_n)
    for part in _chunks(n, axes):
        norm_n[part] = (rows_nd[part].double() - mean_n[part, None]).square().sum(dim=1).sqrt()
    norms(float(norm_n.max()) if n else 0.0, metric)
    return _Side(rows_nd, mean_n, norm_n)


def _chunks(n: int, axes: int) -> Any:
    """Rows whose float64 copies fit the scratch memory."""
    return pieces(0, n, 32 * axes, SCRATCH_BYTES)


def _geometry(metric: str, query: _Side, database_md: Any, device: torch.device) -> _Geometry:
    """As `numba_features._geometry`: the centre is the mean of some rows of the database, spread over it."""
    m, axes = database_md.shape[0], query.rows_nd.shape[1]
    starts = range(0, m, max(_SAMPLE, -(-m // _SAMPLES)))
    read = [float32_on(database_md, slice(start, min(m, start + _SAMPLE)), device) for start in starts]
    sample = _side(torch.cat([query.rows_nd[:0], *read]), metric)
    gain, unit, slack = 1.0, 2.0, (axes + 4) * 2.0**-50
    if metric == "l2":
        top = max(float(side.norm_n.max()) if len(side.norm_n) else 0.0 for side in (query, sample))
        gain = 2.0 ** -float(torch.tensor(top, dtype=torch.float64).log2().ceil()) if top > 0 else 1.0
        unit, slack = gain * gain, 2.0**-149
    geometry = _Geometry(metric, gain, unit, slack, torch.zeros(axes, dtype=torch.float64, device=device))
    gain_n, shift_n, _ = _placed(sample, geometry)
    centre_d = (gain_n @ sample.rows_nd.double() - shift_n.sum()) / max(1, len(gain_n))
    return geometry._replace(centre_d=centre_d)


def _placed(side: _Side, geometry: _Geometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gain, shift and extra of each row (`products.pack`)."""
    if geometry.metric == "l2":
        zeros_n = torch.zeros_like(side.norm_n)
        return zeros_n + geometry.gain, zeros_n, zeros_n
    directed = side.norm_n > 0
    gain_n = torch.where(directed, 1.0 / torch.where(directed, side.norm_n, 1.0), 0.0)
    return gain_n, side.mean_n * gain_n, torch.where(directed, 0.0, 1.0)


def _coarse(side: _Side, geometry: _Geometry, kind: str) -> _Coarse:
    """As `products.pack`. Sums of float products may take any order, with terms cut off at 2**-23 of the largest: four
    times the bound of rounding to nearest.
    """
    n, axes = side.rows_nd.shape
    device = side.rows_nd.device
    dtype = {"int8": torch.int8, "bfloat16": torch.float32 if INTERPRETED else torch.bfloat16, "float32": torch.float32}
    rows_nd = torch.empty((n, axes), dtype=dtype[kind], device=device)
    scale_n, square_n, rest_n = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(3))
    loss = 2.0**-20 + (0.0 if kind == "int8" else (axes + 16) * 2.0**-22)
    gain_n, shift_n, extra_n = _placed(side, geometry)
    for part in _chunks(n, axes):
        scaled = side.rows_nd[part].double() * gain_n[part, None]
        centred = scaled - shift_n[part, None] - geometry.centre_d
        values = centred.float()
        square, top = centred.square().sum(dim=1), values.abs().amax(dim=1).double() if axes else centred.sum(dim=1)
        before = scaled.square().sum(dim=1).sqrt() + shift_n[part].abs() * axes**0.5 + geometry.centre_d.norm()
        lost = square.sqrt() * 2.0**-24 + before * (axes + 8) * 2.0**-52
        if kind == "int8":
            scale = torch.maximum(top / _LEVELS, square.sqrt() / _NORM).clamp(min=2.0**-120).float()
            kept = (values / scale[:, None]).round().clamp(-_LEVELS, _LEVELS)
            rows_nd[part] = kept.to(torch.int8)
        else:
            scale = top.clamp(min=2.0**-120).log2().ceil().exp2().float()
            kept = values / scale[:, None]
            kept = kept.bfloat16().float() if kind == "bfloat16" else kept
            rows_nd[part] = kept.to(dtype[kind])
        kept = kept.double() * scale.double()[:, None]
        lost += (values.double() - kept).square().sum(dim=1).sqrt()
        square = kept.square().sum(dim=1) + extra_n[part]
        size = square.sqrt() * (1 + 2.0**-20)
        scale_n[part], rest_n[part] = scale, lost * (1 + 2.0**-20) + 2.0**-140
        square_n[part] = square - 2 * loss * size.square()  # (A + B)^2 <= 2 A^2 + 2 B^2
    return _Coarse(rows_nd, scale_n, square_n, rest_n)


def _reach(geometry: _Geometry, value: torch.Tensor) -> torch.Tensor:
    """float64: no less than |a - b| of a pair whose distance, rounded to float32, is `value`."""
    return (geometry.unit * (value * (1 + 2.0**-22) + geometry.slack)).sqrt()


def _exact(geometry: _Geometry, query: _Side, database: _Side, row: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """float32 (R, S): distances as defined from query rows row[r] to database rows m[r, s]; not to be read where m is
    -1.
    """
    axes = query.rows_nd.shape[1]
    total = torch.empty(m.shape, dtype=torch.float64, device=m.device)
    if not m.numel():
        return total.to(torch.float32)
    l2 = geometry.metric == "l2"
    sides = query.rows_nd, database.rows_nd, query.mean_n, database.mean_n
    sums_kernel[(len(m), triton.cdiv(m.shape[1], 16))](
        *sides, row, m, total, m.shape[1], axes, L2=l2, SLOTS=16, BLOCK=128
    )
    there = m.clamp(min=0)
    if l2:
        spread: Any = total * ((axes + 4) * 2.0**-51)
    else:
        norm = query.norm_n[row][:, None] * database.norm_n[there]
        total = 1.0 - total / norm
        spread = (axes + 4) * 2.0**-50
    low, high = ((total - spread).clamp(min=0).to(torch.float32), (total + spread).clamp(min=0).to(torch.float32))
    if not l2:
        low, high = (torch.where(norm > 0, x, 1.0) for x in (low, high))
    line, slot = ((low != high) & (m >= 0)).nonzero().unbind(1)
    if len(line):
        value = torch.empty(len(line), dtype=torch.float32, device=m.device)
        ordered_kernel[(triton.cdiv(len(line), 64),)](
            *sides, row[line], m[line, slot], value, len(line), axes, L2=l2, BLOCK=64, enable_fp_fusion=False
        )
        low[line, slot] = value
    return low


def _launch(given: dict[str, int]) -> dict[str, Any]:
    return {
        "QUERIES": given["queries"], "ROWS": given["rows"], "STEP": given["step"], "PRECISION": PRECISION,
        "num_warps": given["warps"], "num_stages": given["stages"],
    }  # fmt: skip


@triton.jit
def bounds_tile(  # type: ignore[no-untyped-def]
    query_ptr, query_scale_ptr, query_square_ptr, database_ptr, scale_ptr, square_ptr, rest_ptr,
    n, m, queries, members, axes, QUERIES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 (Q, R) >= 0: no more than |a - b| + |a - a'|."""
    if query_ptr.dtype.element_ty == tl.int8:
        product = tl.zeros((QUERIES, ROWS), dtype=tl.int32)
    else:
        product = tl.zeros((QUERIES, ROWS), dtype=tl.float32)
    for start in range(0, axes, STEP):
        axis = start + tl.arange(0, STEP)
        inside = (axis < axes)[None, :]
        a = tl.load(query_ptr + n[:, None] * axes + axis[None, :], mask=(n < queries)[:, None] & inside, other=0)
        b = tl.load(database_ptr + m[:, None] * axes + axis[None, :], mask=(m < members)[:, None] & inside, other=0)
        if query_ptr.dtype.element_ty == tl.int8:
            product = tl.dot(a, tl.trans(b), acc=product, out_dtype=tl.int32)
        elif query_ptr.dtype.element_ty == tl.float32:
            product = tl.dot(a, tl.trans(b), acc=product, input_precision=PRECISION)
        else:
            product = tl.dot(a, tl.trans(b), acc=product)
    twice = 2.0 * tl.load(query_scale_ptr + n, mask=n < queries, other=0.0)
    scale = tl.load(scale_ptr + m, mask=m < members, other=0.0)
    squares = tl.load(query_square_ptr + n, mask=n < queries, other=0.0)[:, None]
    squares = squares + tl.load(square_ptr + m, mask=m < members, other=0.0)[None, :]
    least = squares - product.to(tl.float32) * (twice[:, None] * scale[None, :])
    least = tl.where(least > 0, least, 0.0)  # not a number is no bound
    rest = tl.load(rest_ptr + m, mask=m < members, other=0.0)
    return tl.maximum(tl.sqrt(least) * (1 - 1e-6) - rest[None, :], 0.0)


@triton.jit
def minima_kernel(  # type: ignore[no-untyped-def]
    query_ptr, query_scale_ptr, query_square_ptr, query_rest_ptr, database_ptr, scale_ptr, square_ptr, rest_ptr,
    query_group_ptr, database_group_ptr, row_ptr, queries, members, axes, shift, minima_ptr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """minima (queries, row tiles * ROWS / GROUP): bits of the smallest bound in each group, FAR where none is allowed.

    Line i of the queries is row row_ptr[i] of the part.
    """
    i, j = tile_of(queries, members, QUERIES, ROWS, 8)
    n, m = (i * QUERIES + tl.arange(0, QUERIES)).to(tl.int64), (j * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    bound = bounds_tile(
        query_ptr, query_scale_ptr, query_square_ptr, database_ptr, scale_ptr, square_ptr, rest_ptr,
        n, m, queries, members, axes, QUERIES, ROWS, STEP, PRECISION,
    )  # fmt: skip
    allowed = allowed_pairs(n, m, query_group_ptr, database_group_ptr, queries, members, NOWHERE, GROUPS)
    row = tl.load(row_ptr + n, mask=n < queries, other=0)
    allowed = allowed & ((row + shift)[:, None] != m[None, :])
    bits = tl.where(allowed, bound.to(tl.int32, bitcast=True), FAR)
    small = tl.min(bits.reshape(QUERIES, ROWS // GROUP, GROUP), axis=2)
    column = j * (ROWS // GROUP) + tl.arange(0, ROWS // GROUP)
    columns = tl.cdiv(members, ROWS) * (ROWS // GROUP)
    tl.store(minima_ptr + n[:, None] * columns + column[None, :], small, mask=(n < queries)[:, None])


@triton.jit
def count_kernel(  # type: ignore[no-untyped-def]
    query_ptr, query_scale_ptr, query_square_ptr, query_rest_ptr, database_ptr, scale_ptr, square_ptr, rest_ptr,
    query_group_ptr, database_group_ptr, reach_ptr, queries, members, axes, shift, counts_ptr,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """counts int64 (queries, row tiles): allowed pairs whose bound is within reach."""
    i, j = tile_of(queries, members, QUERIES, ROWS, 8)
    n, m = (i * QUERIES + tl.arange(0, QUERIES)).to(tl.int64), (j * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    bound = bounds_tile(
        query_ptr, query_scale_ptr, query_square_ptr, database_ptr, scale_ptr, square_ptr, rest_ptr,
        n, m, queries, members, axes, QUERIES, ROWS, STEP, PRECISION,
    )  # fmt: skip
    reach = tl.load(reach_ptr + n, mask=n < queries, other=0.0)
    allowed = allowed_pairs(n, m, query_group_ptr, database_group_ptr, queries, members, shift, GROUPS)
    near = (allowed & (bound <= reach[:, None])).to(tl.int32)
    tl.store(counts_ptr + n * tl.cdiv(members, ROWS) + j, tl.sum(near, axis=1).to(tl.int64), mask=n < queries)


@triton.jit
def fill_kernel(  # type: ignore[no-untyped-def]
    query_ptr, query_scale_ptr, query_square_ptr, query_rest_ptr, database_ptr, scale_ptr, square_ptr, rest_ptr,
    query_group_ptr, database_group_ptr, reach_ptr, queries, members, axes, shift, counts_ptr, starts_ptr, index_ptr,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Lists the pairs that `count_kernel` counted, each tile where its `starts` says; a tile without any is not
    computed again.
    """
    i, j = tile_of(queries, members, QUERIES, ROWS, 8)
    n, m = (i * QUERIES + tl.arange(0, QUERIES)).to(tl.int64), (j * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    tile = n * tl.cdiv(members, ROWS) + j
    if tl.max(tl.load(counts_ptr + tile, mask=n < queries, other=0), axis=0) > 0:
        bound = bounds_tile(
            query_ptr, query_scale_ptr, query_square_ptr, database_ptr, scale_ptr, square_ptr, rest_ptr,
            n, m, queries, members, axes, QUERIES, ROWS, STEP, PRECISION,
        )  # fmt: skip
        reach = tl.load(reach_ptr + n, mask=n < queries, other=0.0)
        allowed = allowed_pairs(n, m, query_group_ptr, database_group_ptr, queries, members, shift, GROUPS)
        near = allowed & (bound <= reach[:, None])
        start = tl.load(starts_ptr + tile, mask=n < queries, other=0)
        at = start[:, None] + tl.cumsum(near.to(tl.int32), axis=1) - 1
        tl.store(index_ptr + at, tl.zeros((QUERIES, ROWS), dtype=tl.int64) + m[None, :], mask=near)


@triton.jit
def mean_kernel(rows_ptr, mean_ptr, rows, axes, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """float64 sums over the axes in order, over their number."""
    n = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for axis in range(0, axes):
        total += tl.load(rows_ptr + n * axes + axis, mask=n < rows, other=0.0).to(tl.float64)
    tl.store(mean_ptr + n, total / axes, mask=n < rows)


@triton.jit
def sums_kernel(  # type: ignore[no-untyped-def]
    query_ptr, database_ptr, query_mean_ptr, mean_ptr, row_ptr, m_ptr, total_ptr, columns, axes,
    L2: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """float64: sum of (q - d)^2, or of the products of centred values, in any order; one query row and SLOTS database
    rows.
    """
    line, slot = tl.program_id(0).to(tl.int64), tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    n = tl.load(row_ptr + line)
    m = tl.load(m_ptr + line * columns + slot, mask=slot < columns, other=-1)
    q_mean, d_mean = tl.load(query_mean_ptr + n), tl.load(mean_ptr + m, mask=m >= 0, other=0.0)
    total = tl.zeros((SLOTS,), dtype=tl.float64)
    for start in range(0, axes, BLOCK):
        axis = start + tl.arange(0, BLOCK)
        inside = (axis < axes)[None, :] & (m >= 0)[:, None]
        q = tl.load(query_ptr + n * axes + axis, mask=axis < axes, other=0.0).to(tl.float64)[None, :]
        d = tl.load(database_ptr + m[:, None] * axes + axis[None, :], mask=inside, other=0.0).to(tl.float64)
        step = (q - d) * (q - d) if L2 else (q - q_mean) * (d - d_mean[:, None])
        total += tl.sum(tl.where(inside, step, 0.0), axis=1)
    tl.store(total_ptr + line * columns + slot, total, mask=slot < columns)


@triton.jit
def ordered_kernel(  # type: ignore[no-untyped-def]
    query_ptr, database_ptr, query_mean_ptr, mean_ptr, n_ptr, m_ptr, value_ptr, pairs, axes,
    L2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As defined, summed in the order of the axes. Launched without fused multiply-add, so that every rounding is that
    of the definition; sqrt and division of float64 round to nearest (those of torch need not on a CPU).
    """
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n, m = tl.load(n_ptr + pair, mask=pair < pairs, other=0), tl.load(m_ptr + pair, mask=pair < pairs, other=0)
    q_mean, d_mean = tl.load(query_mean_ptr + n), tl.load(mean_ptr + m)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    q_square, d_square = tl.zeros((BLOCK,), dtype=tl.float64), tl.zeros((BLOCK,), dtype=tl.float64)
    for axis in range(0, axes):
        q = tl.load(query_ptr + n * axes + axis).to(tl.float64)
        d = tl.load(database_ptr + m * axes + axis).to(tl.float64)
        if L2:
            total += (q - d) * (q - d)
        else:
            total += (q - q_mean) * (d - d_mean)
            q_square += (q - q_mean) * (q - q_mean)
            d_square += (d - d_mean) * (d - d_mean)
    if not L2:
        total = tl.maximum(1.0 - total / tl.sqrt(q_square * d_square), 0.0)
    tl.store(value_ptr + pair, total.to(tl.float32), mask=pair < pairs)
