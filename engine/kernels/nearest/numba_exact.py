"""Distances of rows of features as defined, one pair at a time, on the CPU (`reference.features_cross`).

A sum of float64 in any order, which vectors can take, differs from the one in order by little; where the possible
difference leaves open which float32 is the rounded one, the sum is taken again in order. So an exact distance costs
little more than a careless one. Which pairs are worth it is left to `numba_features`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from engine.kernels.nearest.checks import norms, width
from engine.kernels.nearest.rows import each_part, in_threads, read_float32, tiles

L2, COSINE, CORRELATION = 0, 1, 2
METRICS = {"l2": L2, "cosine": COSINE, "correlation": CORRELATION}
_QUERY_BYTES, _DATABASE_BYTES = 2**28, 2**24  # of float32 rows held at a time


class Side(NamedTuple):
    """Rows of a tile as they are, and what the definitions need of them: means (of correlation only) and norms, in
    float64.
    """

    rows_nd: np.ndarray
    mean_n: np.ndarray
    norm_n: np.ndarray


def features_cross(query_nd: Any, database_md: Any, metric: str) -> np.ndarray:
    """float32 (N, M)."""
    out = np.empty((query_nd.shape[0], database_md.shape[0]), dtype=np.float32)
    kind = METRICS[metric]
    for part in tiles(out.shape[0], 4 * width(query_nd), _QUERY_BYTES, 1):
        query = side(read_float32(query_nd, part), kind)
        for tile in tiles(out.shape[1], 4 * width(query_nd), _DATABASE_BYTES, 1):
            database, cells = side(read_float32(database_md, tile), kind), out[part, tile]
            rows = max(1, -(-len(cells) // (4 * numba.get_num_threads())))

            def fill(i: int, given: tuple = (query, database), cells: np.ndarray = cells, rows: int = rows) -> None:
                _cross_rows(kind, *given, i * rows, cells[i * rows : (i + 1) * rows])  # type: ignore[call-arg]

            in_threads(fill, -(-len(cells) // rows))
    return out


def side(rows_nd: np.ndarray, metric: int) -> Side:
    mean_n, norm_n = np.zeros(len(rows_nd)), np.empty(len(rows_nd))

    def fill(part: slice) -> None:
        _statistics(rows_nd[part], metric == CORRELATION, mean_n[part], norm_n[part])

    each_part(fill, len(rows_nd))
    norms(float(norm_n.max(initial=0.0)), "l2" if metric == L2 else "")
    return Side(rows_nd, mean_n, norm_n)


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})
def _square_sum(row_d: np.ndarray, mean: float) -> float:
    total = 0.0
    for axis in range(len(row_d)):
        value = np.float64(row_d[axis]) - mean
        total += value * value
    return total


@numba.njit(cache=True, nogil=True)
def _statistics(rows_nd: np.ndarray, centred: bool, mean_n: np.ndarray, norm_n: np.ndarray) -> None:
    """Means as defined: sums in order; four rows at a time, because each addition waits for the one before."""
    n, axes = rows_nd.shape
    if centred and axes:
        for first in range(0, n, 4):
            if first + 4 <= n:
                a, b, c, d = 0.0, 0.0, 0.0, 0.0
                for axis in range(axes):
                    a += rows_nd[first, axis]
                    b += rows_nd[first + 1, axis]
                    c += rows_nd[first + 2, axis]
                    d += rows_nd[first + 3, axis]
                mean_n[first], mean_n[first + 1] = a / axes, b / axes
                mean_n[first + 2], mean_n[first + 3] = c / axes, d / axes
            else:
                for row in range(first, n):
                    total = 0.0
                    for axis in range(axes):
                        total += rows_nd[row, axis]
                    mean_n[row] = total / axes
    for row in range(n):
        norm_n[row] = np.sqrt(_square_sum(rows_nd[row], mean_n[row]))


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})
def _gaps(a_d: np.ndarray, b_d: np.ndarray) -> float:
    total = 0.0
    for axis in range(len(a_d)):
        step = np.float64(a_d[axis]) - np.float64(b_d[axis])
        total += step * step
    return total


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})
def _dot(a_d: np.ndarray, a_mean: float, b_d: np.ndarray, b_mean: float) -> float:
    total = 0.0
    for axis in range(len(a_d)):
        total += (np.float64(a_d[axis]) - a_mean) * (np.float64(b_d[axis]) - b_mean)
    return total


@numba.njit(cache=True, nogil=True)
def _as_defined(metric: int, a_d: np.ndarray, a_mean: float, b_d: np.ndarray, b_mean: float) -> Any:
    """Sums in the order of the axes (`reference.features_cross`)."""
    total, a_square, b_square = 0.0, 0.0, 0.0
    if metric == L2:
        for axis in range(len(a_d)):
            step = np.float64(a_d[axis]) - np.float64(b_d[axis])
            total += step * step
        return np.float32(total)
    for axis in range(len(a_d)):
        a, b = np.float64(a_d[axis]) - a_mean, np.float64(b_d[axis]) - b_mean
        total += a * b
        a_square += a * a
        b_square += b * b
    return np.float32(max(0.0, 1.0 - total / np.sqrt(a_square * b_square)))


@numba.njit(cache=True, nogil=True)
def pair_distance(metric: int, a: Side, n: int, b: Side, m: int) -> Any:
    """As defined. A sum in any order differs from that in order by less than 2 (d + 2) 2**-53 of the sum of magnitudes
    (twice that for a cosine, whose norms are sums too); where all of that rounds to one float32, that is it.
    """
    a_d, b_d, a_norm, b_norm = a.rows_nd[n], b.rows_nd[m], a.norm_n[n], b.norm_n[m]
    if metric == L2:
        total = _gaps(a_d, b_d)
        spread = total * (len(a_d) + 4) * 2.0**-51
    elif a_norm == 0 or b_norm == 0:
        return np.float32(1)
    else:
        total = 1.0 - _dot(a_d, a.mean_n[n], b_d, b.mean_n[m]) / (a_norm * b_norm)
        spread = (len(a_d) + 4) * 2.0**-50
    low, high = np.float32(max(0.0, total - spread)), np.float32(max(0.0, total + spread))
    return low if low == high else _as_defined(metric, a_d, a.mean_n[n], b_d, b.mean_n[m])


@numba.njit(cache=True, nogil=True)
def _cross_rows(metric: int, query: Side, database: Side, first: int, out: np.ndarray) -> None:
    for m in range(out.shape[1]):
        for i in range(out.shape[0]):
            out[i, m] = pair_distance(metric, query, first + i, database, m)
