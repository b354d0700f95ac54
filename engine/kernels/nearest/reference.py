"""Nearest neighbours, as the specification: every distance, then a stable sort.

`skip_nm` marks pairs that may not be neighbours. A slot without a candidate holds -1. A range search gives, row by row
and in the order of the index, every pair within the radius: offsets int64 (N + 1,), index int64 (R,), values (R,).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.kernels.nearest.checks import norms
from engine.kernels.nearest.rows import Exclude, read_float32, read_words

Planes = tuple[Any, Any, Any]
_ALL = slice(None)


def hamming_cross(query_nw: Any, database_mw: Any) -> np.ndarray:
    """int32 (N, M): number of differing bits."""
    query, database = read_words(query_nw, _ALL), read_words(database_mw, _ALL)
    return np.bitwise_count(query[:, None] ^ database[None]).sum(axis=2, dtype=np.int32)


def hamming_topk(
    query_nw: Any, database_mw: Any, k: int, exclude_self: bool, exclude: Exclude
) -> tuple[np.ndarray, np.ndarray]:
    """Distance int32 (N, k) and index int64 (N, k)."""
    distance_nm = hamming_cross(query_nw, database_mw)
    return _smallest(distance_nm, k, _skip(distance_nm, exclude_self, exclude))


def hamming_range(
    query_nw: Any, database_mw: Any, radius: int, exclude_self: bool, exclude: Exclude
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, index, distance int32: distance <= radius."""
    distance_nm = hamming_cross(query_nw, database_mw)
    return _within((distance_nm <= radius) & ~_skip(distance_nm, exclude_self, exclude), distance_nm)


def hamming_windows_topk(
    query_nw: Any, database_mw: Any, windows_v2: np.ndarray, k: int, exclude_self: bool, exclude: Exclude
) -> tuple[np.ndarray, np.ndarray]:
    """Distance int32 (N, V, k) and index int64 (N, V, k): the top-k of the sites [start, stop) of each window."""
    shape = (query_nw.shape[0], len(windows_v2), k)
    distance_nvk, index_nvk = np.empty(shape, dtype=np.int32), np.empty(shape, dtype=np.int64)
    query, database = _unpacked(read_words(query_nw, _ALL)), _unpacked(read_words(database_mw, _ALL))
    for v, (start, stop) in enumerate(windows_v2):
        differ_nml = query[:, None, start:stop] != database[None, :, start:stop]
        distance_nm = differ_nml.sum(axis=2, dtype=np.int32)
        skip_nm = _skip(distance_nm, exclude_self, exclude)
        distance_nvk[:, v], index_nvk[:, v] = _smallest(distance_nm, k, skip_nm)
    return distance_nvk, index_nvk


def ibs_cross(query: Planes, database: Planes, length: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 (N, M) each: sum of |dosage - dosage| over the sites observed in both, and the number of these sites."""
    (x_nl, seen_nl), (y_ml, seen_ml) = (_dosages(planes, length) for planes in (query, database))
    both_nml = seen_nl[:, None] & seen_ml[None]
    apart_nml = np.abs(x_nl[:, None] - y_ml[None]) * both_nml
    return apart_nml.sum(axis=2, dtype=np.int32), both_nml.sum(axis=2, dtype=np.int32)


def ibs_topk(
    query: Planes, database: Planes, length: int, k: int, exclude_self: bool, exclude: Exclude
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance and sites int32 (N, k), index int64 (N, k), in the order of `_ibs_rank`."""
    distance_nm, sites_nm = ibs_cross(query, database, length)
    observed = query[2] is not None or database[2] is not None
    skip_nm = _skip(distance_nm, exclude_self, exclude) | (observed & (sites_nm == 0))
    _, index_nk = _smallest(_ibs_rank(distance_nm, sites_nm) if observed else distance_nm, k, skip_nm)
    found = index_nk >= 0
    rows = np.nonzero(found)[0], index_nk[found]
    distance_nk, sites_nk = np.full(index_nk.shape, -1, dtype=np.int32), np.full(index_nk.shape, -1, dtype=np.int32)
    distance_nk[found], sites_nk[found] = distance_nm[rows], sites_nm[rows]
    return distance_nk, sites_nk, index_nk


def ibs_range(
    query: Planes, database: Planes, length: int, radius: float, exclude_self: bool, exclude: Exclude
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, index, distance int32, sites int32: `_ibs_rank` <= radius; pairs that share no site are never within."""
    distance_nm, sites_nm = ibs_cross(query, database, length)
    near_nm = (_ibs_rank(distance_nm, sites_nm) <= np.float32(radius)) & (sites_nm > 0)
    return _within(near_nm & ~_skip(distance_nm, exclude_self, exclude), distance_nm, sites_nm)


def features_cross(query_nd: Any, database_md: Any, metric: str) -> np.ndarray:
    """float32 (N, M). Every sum runs over the axes in order in float64; the result is rounded once.

    l2: sum of (q - d)^2. cosine: 1 - q.d / sqrt(q.q d.d), not below 0; 1 where a row is all zeros. correlation: the
    same of the rows less their means.
    """
    query, database = (read_float32(rows, _ALL).astype(np.float64) for rows in (query_nd, database_md))
    for rows in (query, database):
        norms(float(np.sqrt((rows * rows).sum(axis=1).max(initial=0.0))), metric)
    axes = query.shape[1]
    total_nm = np.zeros((len(query), len(database)))
    if metric == "l2":
        for axis in range(axes):
            total_nm += (query[:, None, axis] - database[None, :, axis]) ** 2
        return total_nm.astype(np.float32)
    if metric == "correlation" and axes:
        query, database = (rows - _ordered_sum(rows)[:, None] / axes for rows in (query, database))
    for axis in range(axes):
        total_nm += query[:, None, axis] * database[None, :, axis]
    squares_nm = _ordered_sum(query**2)[:, None] * _ordered_sum(database**2)[None]
    cosine_nm = np.divide(total_nm, np.sqrt(squares_nm), out=np.zeros_like(total_nm), where=squares_nm > 0)
    return np.maximum(1 - cosine_nm, 0).astype(np.float32)


def features_topk(
    query_nd: Any,
    database_md: Any,
    k: int,
    metric: str,
    exclude_self: bool,
    exclude: Exclude,
    product: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Distance float32 (N, k) and index int64 (N, k). `product` is not used: there is no filter."""
    distance_nm = features_cross(query_nd, database_md, metric)
    return _smallest(distance_nm, k, _skip(distance_nm, exclude_self, exclude))


def features_range(
    query_nd: Any,
    database_md: Any,
    radius: float,
    metric: str,
    exclude_self: bool,
    exclude: Exclude,
    product: str | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, index, distance float32: distance <= float32(radius). `product` is not used."""
    distance_nm = features_cross(query_nd, database_md, metric)
    near_nm = (distance_nm <= np.float32(radius)) & ~_skip(distance_nm, exclude_self, exclude)
    return _within(near_nm, distance_nm)


def longest_run(
    query_nw: Any, database_mw: Any, length: int, position_bp: np.ndarray, exclude_self: bool, exclude: Exclude
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """run_bp, run_sites, index, all int64 (N,): longest in bp; of equals the smallest index, then the first along the
    sites.
    """
    query, database = read_words(query_nw, _ALL), read_words(database_mw, _ALL)
    run_bp, run_sites, index = np.full(len(query), -1), np.zeros(len(query), np.int64), np.full(len(query), -1)
    skip_nm = _skip(np.empty((len(query), len(database))), exclude_self, exclude)
    for n, m in zip(*np.nonzero(~skip_nm)):
        breaks = np.flatnonzero(_unpacked(query[n : n + 1] ^ database[m])[0, :length])
        for before, after in zip(np.r_[-1, breaks], np.r_[breaks, length]):
            if after - before > 1 and position_bp[after - 1] - position_bp[before + 1] > run_bp[n]:
                run_bp[n] = position_bp[after - 1] - position_bp[before + 1]
                run_sites[n], index[n] = after - before - 1, m
    return run_bp, run_sites, index


def _unpacked(bits_nw: np.ndarray) -> np.ndarray:
    """uint8 (N, 64 W) of 0 and 1."""
    octets = np.ascontiguousarray(bits_nw).view(np.uint8).reshape(len(bits_nw), 8 * bits_nw.shape[1])
    return np.unpackbits(octets, axis=1, bitorder="little")


def _dosages(planes: Planes, length: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 (N, L) of 0, 1, 2 and bool (N, L): observed."""
    one, two = (_unpacked(read_words(plane, _ALL))[:, :length].astype(np.int8) for plane in planes[:2])
    if planes[2] is None:
        return one + two, np.ones(one.shape, dtype=bool)
    return one + two, _unpacked(read_words(planes[2], _ALL))[:, :length] == 1


def _ibs_rank(distance_nm: np.ndarray, sites_nm: np.ndarray) -> np.ndarray:
    """float32: distance / (2 sites), which is 1 - IBS, divided in float64 and rounded once."""
    return (distance_nm / (2.0 * np.maximum(sites_nm, 1))).astype(np.float32)


def _ordered_sum(rows_nd: np.ndarray) -> np.ndarray:
    total_n = np.zeros(len(rows_nd))
    for axis in range(rows_nd.shape[1]):
        total_n += rows_nd[:, axis]
    return total_n


def _skip(value_nm: np.ndarray, exclude_self: bool, exclude: Exclude) -> np.ndarray:
    """bool (N, M): pairs of one row with itself, pairs of one group."""
    skip_nm = np.zeros(value_nm.shape, dtype=bool)
    if exclude_self:
        np.fill_diagonal(skip_nm, True)
    if exclude is not None:
        skip_nm |= exclude[0][:, None] == exclude[1][None]
    return skip_nm


def _smallest(value_nm: np.ndarray, k: int, skip_nm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The k smallest of each row and where they stand; ties by smallest index; -1 where there is no candidate."""
    value_nk = np.full((len(value_nm), k), -1, dtype=value_nm.dtype)
    index_nk = np.full((len(value_nm), k), -1, dtype=np.int64)
    for n in range(len(value_nm)):
        kept = np.flatnonzero(~skip_nm[n])
        order = kept[np.argsort(value_nm[n, kept], kind="stable")][:k]
        value_nk[n, : len(order)], index_nk[n, : len(order)] = value_nm[n, order], order
    return value_nk, index_nk


def _within(near_nm: np.ndarray, *values_nm: np.ndarray) -> tuple[Any, ...]:
    offsets = np.concatenate([[0], np.cumsum(near_nm.sum(axis=1))]).astype(np.int64)
    return (offsets, np.nonzero(near_nm)[1], *(value_nm[near_nm] for value_nm in values_nm))
