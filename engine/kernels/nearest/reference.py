"""Nearest neighbours, as the specification: every distance, then a stable sort.

`skip_nm` marks pairs that may not be neighbours. A slot without a candidate holds -1.
The squared distance is a float64 sum in the order of the axis, rounded once to float32; order and ties are those of the
rounded value.
"""

from __future__ import annotations

import numpy as np

Exclude = tuple[np.ndarray, np.ndarray] | None


def hamming_cross(query_nw: np.ndarray, database_mw: np.ndarray) -> np.ndarray:
    """int32 (N, M): number of differing bits."""
    return np.bitwise_count(query_nw[:, None] ^ database_mw[None]).sum(axis=2, dtype=np.int32)


def hamming_topk(
    query_nw: np.ndarray, database_mw: np.ndarray, k: int, exclude_self: bool, exclude: Exclude
) -> tuple[np.ndarray, np.ndarray]:
    """Distance int32 (N, k) and index int64 (N, k)."""
    distance_nm = hamming_cross(query_nw, database_mw).astype(np.float64)
    distance_nk, index_nk = _smallest(distance_nm, k, _skip(len(query_nw), len(database_mw), exclude_self, exclude))
    return distance_nk.astype(np.int32), index_nk


def l2_topk(
    query_nd: np.ndarray, database_md: np.ndarray, k: int, exclude_self: bool, exclude: Exclude
) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance float32 (N, k) and index int64 (N, k)."""
    query, database = query_nd.astype(np.float64), database_md.astype(np.float64)
    total_nm = np.zeros((len(query), len(database)))
    for axis in range(query.shape[1]):
        total_nm += (query[:, None, axis] - database[None, :, axis]) ** 2
    skip_nm = _skip(len(query), len(database), exclude_self, exclude)
    return _smallest(total_nm.astype(np.float32), k, skip_nm)


def longest_run(
    query_nw: np.ndarray,
    database_mw: np.ndarray,
    length: int,
    position_bp: np.ndarray,
    exclude_self: bool,
    exclude: Exclude,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """run_bp, run_sites, index, all int64 (N,): longest in bp; of equals the smallest index, then the first along the sites."""
    run_bp, run_sites, index = np.full(len(query_nw), -1), np.zeros(len(query_nw), np.int64), np.full(len(query_nw), -1)
    skip_nm = _skip(len(query_nw), len(database_mw), exclude_self, exclude)
    for n, m in zip(*np.nonzero(~skip_nm)):
        octets = np.ascontiguousarray(query_nw[n] ^ database_mw[m]).view(np.uint8)
        breaks = np.flatnonzero(np.unpackbits(octets, bitorder="little")[:length])
        for before, after in zip(np.r_[-1, breaks], np.r_[breaks, length]):
            if after - before > 1 and position_bp[after - 1] - position_bp[before + 1] > run_bp[n]:
                run_bp[n] = position_bp[after - 1] - position_bp[before + 1]
                run_sites[n], index[n] = after - before - 1, m
    return run_bp, run_sites, index


def _skip(n: int, m: int, exclude_self: bool, exclude: Exclude) -> np.ndarray:
    """bool (N, M): pairs of one row with itself, pairs of one group."""
    skip_nm = np.zeros((n, m), dtype=bool)
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
