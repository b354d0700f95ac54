"""`Pool`: the rows an audit compares, as bits or as feature vectors, with the person behind every row; and the exact
search over them. What made the rows (a panel, an embedding of scans) is the caller's business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.errors import InputError

_CACHED = 2**16  # elements whose differences are taken at a time: they then fit the second-level cache


@dataclass(frozen=True)
class Pool:
    """One side of an audit.

    Attributes:
        kind: "bits" (haplotypes, Hamming distance in sites) or "features" (vectors, Euclidean distance).
        data: uint64 (n, words), haplotype-major packed bits, or float32 (n, d).
        person: (n,) str; rows of one person (two haplotypes, two visits, two sides) share an id. Ids are compared and
            never written anywhere.
        group: (n,) str or None; e.g. ancestry group or site.
        views: (v, n, d) or (v, n, words): further versions of every row (flips, small rotations). A query is searched
            in all of its versions and its smallest distance counts; the database side is searched as it stands.
            Synthetic and holdout must carry the same number of versions, so that the null has the same chances as the
            test.
        length: number of sites; bits only, needed for the longest shared stretch.
        position_bp: int64 (length,), rising; bits only. Where all pools have it, the longest stretch shared with one
            person is judged beside the distance, so that mosaics and partial copies are seen.
    """

    kind: Literal["bits", "features"]
    data: NDArray
    person: NDArray
    group: NDArray | None = None
    views: NDArray | None = None
    length: int | None = None
    position_bp: NDArray | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("bits", "features"):
            raise InputError("kind 'bits' or 'features'", repr(self.kind), "audit pool")
        dtype = np.uint64 if self.kind == "bits" else np.float32
        data = np.ascontiguousarray(self.data, dtype=dtype) if self.kind == "features" else np.asarray(self.data)
        if data.ndim != 2 or data.dtype != dtype:
            raise InputError(f"2D {np.dtype(dtype)} rows", f"{data.ndim}D {data.dtype}", "audit pool")
        if self.kind == "features" and not np.isfinite(data).all():
            broken = int((~np.isfinite(data)).any(axis=1).sum())
            raise InputError("finite features", f"{broken} rows with NaN or infinity", "audit pool")
        person = np.asarray(self.person).astype(str)
        if person.shape != (len(data),):
            raise InputError(f"one person id for each of {len(data)} rows", f"shape {person.shape}", "audit pool")
        object.__setattr__(self, "data", np.ascontiguousarray(data))
        object.__setattr__(self, "person", person)
        if self.group is not None:
            group = np.asarray(self.group).astype(str)
            if group.shape != (len(data),):
                raise InputError(f"one group for each of {len(data)} rows", f"shape {group.shape}", "audit pool")
            object.__setattr__(self, "group", group)
        if self.views is not None:
            views = np.ascontiguousarray(self.views, dtype=dtype)
            if views.ndim != 3 or views.shape[1:] != data.shape:
                raise InputError(f"views of shape (v, {len(data)}, {data.shape[1]})", str(views.shape), "audit pool")
            object.__setattr__(self, "views", views)
        if self.position_bp is not None:
            position_bp = np.ascontiguousarray(self.position_bp, dtype=np.int64)
            length = len(position_bp) if self.length is None else self.length
            if self.kind != "bits" or position_bp.shape != (length,) or -(-length // 64) != data.shape[1]:
                raise InputError(
                    f"positions of the sites in {data.shape[1]} words", f"shape {position_bp.shape}", "audit pool"
                )
            object.__setattr__(self, "position_bp", position_bp)
            object.__setattr__(self, "length", length)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def people(self) -> int:
        """Number of different people."""
        return len(np.unique(self.person))

    def select(self, rows: NDArray) -> Pool:
        """The pool of these rows (indices or mask)."""
        return replace(
            self,
            data=self.data[rows],
            person=self.person[rows],
            group=None if self.group is None else self.group[rows],
            views=None if self.views is None else self.views[:, rows],
        )

    def select_people(self, people: NDArray) -> Pool:
        """The pool of the rows of these people."""
        return self.select(np.flatnonzero(np.isin(self.person, people)))


def check_alike(*pools: Pool) -> None:
    """Refuse pools that cannot be compared: different kinds or widths, or different numbers of views in the queries."""
    first = pools[0]
    for other in pools[1:]:
        if other.kind != first.kind or other.data.shape[1] != first.data.shape[1]:
            raise InputError(
                f"pools of one kind and width ({first.kind}, {first.data.shape[1]})",
                f"{other.kind}, {other.data.shape[1]}",
                "audit",
                "the same sites or the same embedding on every side",
            )


def topk(
    query: Pool, database: Pool, k: int, *, exclude: tuple[NDArray, NDArray] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The k nearest rows of `database` to every row of `query`, exact and exhaustive.

    Args:
        query: searched in its data and in every view; for each row the version with the smallest nearest distance
            counts.
        database: searched as it stands.
        k: neighbours per row.
        exclude: (query codes int64 (n,), database codes int64 (m,)); pairs of equal code are skipped.

    Returns:
        distance float64 (n, k): sites that differ, or Euclidean distance, rising; infinite where there is no candidate;
        and index int64 (n, k), -1 where there is none. Euclidean distances of the k found are computed again in
        float64, because the search in float32 cannot tell a copy from a very near row.
    """
    if query.views is None:
        return _topk_rows(query.data, database, k, exclude)
    v, n, width = query.views.shape
    tiled = None if exclude is None else (np.tile(exclude[0], v), exclude[1])
    plain_n = _topk_rows(query.data, database, 1, exclude)[0][:, 0]
    turned_vn = _topk_rows(query.views.reshape(v * n, width), database, 1, tiled)[0].reshape(v, n)
    chosen_n = np.vstack([plain_n, turned_vn]).argmin(axis=0)
    rows = query.data.copy()
    other = np.flatnonzero(chosen_n)
    rows[other] = query.views[chosen_n[other] - 1, other]
    return _topk_rows(rows, database, k, exclude)  # all k neighbours of a row only in the version that counts


def _topk_rows(
    rows: NDArray, database: Pool, k: int, exclude: tuple[NDArray, NDArray] | None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    from engine.kernels.nearest import hamming_topk, l2_topk

    if database.kind == "bits":
        found, index = hamming_topk(rows, database.data, k, exclude=exclude)
        index = np.asarray(index, dtype=np.int64)
        return np.where(index < 0, np.inf, np.asarray(found, dtype=np.float64)), index
    _, index = l2_topk(rows, database.data, k, exclude=exclude)
    index = np.asarray(index, dtype=np.int64)
    distance = np.empty(index.shape)
    block = max(1, _CACHED // max(1, k * rows.shape[1]))
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        gap = rows[part, None, :].astype(np.float64) - database.data[np.maximum(index[part], 0)]
        distance[part] = np.sqrt(np.square(gap, out=gap).sum(axis=2))
    distance[index < 0] = np.inf
    order = np.argsort(distance, axis=1, kind="stable")
    return np.take_along_axis(distance, order, 1), np.take_along_axis(index, order, 1)


def longest_shared_bp(
    query: Pool, database: Pool, *, exclude: tuple[NDArray, NDArray] | None = None
) -> NDArray[np.float64]:
    """Longest stretch of sites, in bp, on which a query row equals some one row of the database; float64 (n,)."""
    from engine.kernels.nearest import longest_run

    if database.length is None or database.position_bp is None:
        raise InputError("a pool with positions", "one without", "longest shared stretch")
    run_bp, _, _ = longest_run(query.data, database.data, database.length, database.position_bp, exclude=exclude)
    return np.asarray(run_bp, dtype=np.float64)
