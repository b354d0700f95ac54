"""Nearest rows of bits on the CPU: Hamming distance, and IBS distance of unphased genotypes.

Distances are counted in register tiles of 32 x 32 rows (`bits.tiles`), or looked up, many tiles at a time, where that is
faster (`bits.tile_lookups`); a tile reaches the lists of the nearest only through rows whose nearest column beats the worst
kept. The set is streamed in parts, indices rise and a later row must be strictly nearer, so no tile and no thread changes an
answer.

IBS. A person is two bits per site: dosage >= 1, dosage = 2. Dosages 0, 1, 2 are then 00, 10, 11, and the bits that
differ between two of them are |x - y|: a thermometer code. So where all is observed, the IBS distance is the Hamming
distance of both planes side by side; else each word is masked by the sites that both observe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

from engine.kernels import bits
from engine.kernels.bits import tile_lookups
from engine.kernels.bits.tiles import BLOCK, and_tile, interleaved, observed_tile, xor_tile
from engine.kernels.nearest.rows import (  # fmt: skip
    NOT_SELF,
    Exclude,
    csr,
    groups,
    grown,
    ibs_limit,
    in_threads,
    insert,
    merged,
    read_words,
    skipped,
    tiles,
)

Planes = tuple[Any, Any, Any]  # dosage >= 1, dosage = 2, observed or None
_STRIP, _AHEAD = 8, 16  # blocks of queries of a task, and blocks of the database that it looks up at once
_QUERY_BYTES, _DATABASE_BYTES = 2**28, 2**26  # of words held at a time
_FAR = np.iinfo(np.int32).max


class Packed(NamedTuple):
    """Interleaved planes of Planes, or one plane of bits thrice. ones_l: float64, ones of each row, where that plane is looked
    up, else empty.
    """

    one: np.ndarray
    two: np.ndarray
    observed: np.ndarray
    ones_l: np.ndarray


class _Room(NamedTuple):
    """What a task works in. rank, counts, sites: int32 (1024,), of a tile. sums: int32 (_STRIP, _AHEAD, 1024), common ones of
    many; empty where nothing is looked up.
    """

    rank: np.ndarray
    counts: np.ndarray
    sites: np.ndarray
    sums: np.ndarray
    lookups: tile_lookups.Room


class _Set(NamedTuple):
    """Rows that are compared: how many, bytes of each, and how a part of them is read and packed for the tiles."""

    length: int
    row_bytes: int
    read: Callable[[slice], Packed]


def hamming_cross(query_nw: Any, database_mw: Any) -> np.ndarray:
    """int32 (N, M): number of differing bits."""
    return _cross(_bits(query_nw), _bits(database_mw), False, _one((query_nw,), (database_mw,)))[0]


def hamming_topk(
    query_nw: Any, database_mw: Any, k: int, exclude_self: bool, exclude: Exclude
) -> tuple[np.ndarray, np.ndarray]:
    """Distance int32 (N, k) and index int64 (N, k)."""
    distance, index, _ = _topk(_bits(query_nw), _bits(database_mw), k, exclude_self, exclude, False)
    return distance, index


def hamming_range(
    query_nw: Any, database_mw: Any, radius: int, exclude_self: bool, exclude: Exclude
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets int64 (N + 1,), index int64 (R,), distance int32 (R,)."""
    offsets, index, distance, _ = _range(
        _bits(query_nw), _bits(database_mw), min(radius, _FAR - 1), exclude_self, exclude, False
    )
    return offsets, index, distance


def ibs_cross(query: Planes, database: Planes, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance and sites, int32 (N, M)."""
    observed = query[2] is not None or database[2] is not None
    distance, sites = _cross(*_genotypes(query, database, length), observed, _one(query, database))
    return distance, sites if observed else np.full_like(distance, length)


def ibs_topk(
    query: Planes, database: Planes, length: int, k: int, exclude_self: bool, exclude: Exclude
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance and sites int32 (N, k), index int64 (N, k)."""
    observed = query[2] is not None or database[2] is not None
    rank, index, both = _topk(*_genotypes(query, database, length), k, exclude_self, exclude, observed)
    if observed:
        distance, sites = (both >> 32).astype(np.int32), (both & 0xFFFFFFFF).astype(np.int32)
    else:
        distance, sites = rank, np.full_like(rank, length)
    distance[index < 0] = sites[index < 0] = -1
    return distance, sites, index


def ibs_range(
    query: Planes, database: Planes, length: int, radius: float, exclude_self: bool, exclude: Exclude
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Offsets int64 (N + 1,), index int64 (R,), distance and sites int32 (R,)."""
    observed = query[2] is not None or database[2] is not None
    limit = ibs_limit(radius, length, observed)
    return _range(*_genotypes(query, database, length), limit, exclude_self, exclude, observed, length)


def _bits(bits_nw: Any) -> _Set:
    def read(part: slice) -> Packed:
        return _packed(read_words(bits_nw, part))

    return _Set(bits_nw.shape[0], 8 * bits_nw.shape[1], read)


def _genotypes(query: Planes, database: Planes, length: int) -> tuple[_Set, _Set]:
    """Both sides: three planes where either side may be missing, else two side by side."""
    three = query[2] is not None or database[2] is not None
    all_w = np.full(-(-length // 64), np.uint64(2**64 - 1))
    if length % 64:
        all_w[-1] >>= np.uint64(64 - length % 64)

    def of(planes: Planes) -> _Set:
        def read(part: slice) -> Packed:
            one, two = read_words(planes[0], part), read_words(planes[1], part)
            if not three:
                return _packed(np.concatenate([one & all_w, two & all_w], axis=1))
            seen = np.broadcast_to(all_w, one.shape) if planes[2] is None else read_words(planes[2], part) & all_w
            return Packed(interleaved(one), interleaved(two), interleaved(np.ascontiguousarray(seen)), np.empty(0))

        return _Set(planes[0].shape[0], 24 * planes[0].shape[1], read)

    return of(query), of(database)


def _packed(bits_nw: np.ndarray) -> Packed:
    packed, ones_l = interleaved(bits_nw), np.empty(0)
    if tile_lookups.preferred(bits_nw.shape[1]):
        ones_l = np.zeros(len(packed) * BLOCK)
        ones_l[: len(bits_nw)] = bits.popcount_rows(bits_nw, implementation="numba")
    return Packed(packed, packed, packed, ones_l)


def _one(query: tuple[Any, ...], database: tuple[Any, ...]) -> bool:
    """Whether both sides are the same arrays, so that half of the pairs give all."""

    def place(x: Any) -> Any:
        return id(x) if not isinstance(x, np.ndarray) else (x.ctypes.data, x.shape, x.strides)

    return [place(x) for x in query] == [place(x) for x in database]


def _cross(query: _Set, database: _Set, observed: bool, one: bool) -> tuple[np.ndarray, np.ndarray]:
    """int32 (N, M) twice: distances, and where `observed` sites. one: of a set with itself."""
    out = np.empty((query.length, database.length), dtype=np.int32)
    sites = np.empty(out.shape if observed else (0, 0), dtype=np.int32)
    made = (out, sites) if observed else (out,)
    most_bytes = _DATABASE_BYTES if one else _QUERY_BYTES
    for part in tiles(query.length, query.row_bytes, most_bytes, BLOCK) if out.size else ():
        packed = query.read(part)
        for tile in tiles(database.length, database.row_bytes, _DATABASE_BYTES, BLOCK):
            if one and tile.start < part.start:
                continue
            diagonal = one and tile.start == part.start
            other = packed if diagonal else database.read(tile)
            _cross_tile(packed, other, observed, out[part, tile], sites[part, tile] if observed else sites, diagonal)
            if one and not diagonal:
                for x in made:
                    x[tile, part] = x[part, tile].T
    return out, sites


def _topk(
    query: _Set, database: _Set, k: int, exclude_self: bool, exclude: Exclude, observed: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rank int32, index int64 and, where `observed`, distance << 32 | sites, each (N, k). Few queries share the work by
    parts of the database.
    """
    rank_nk, index_nk = np.full((query.length, k), -1, dtype=np.int32), np.full((query.length, k), -1, dtype=np.int64)
    both_nk = np.full(rank_nk.shape if observed else (query.length, 0), -1, dtype=np.int64)
    for part in tiles(query.length, query.row_bytes, _QUERY_BYTES, BLOCK):
        packed, n = query.read(part), part.stop - part.start
        parts = max(1, min(-(-database.length // BLOCK), -(-4 * numba.get_num_threads() // _strips(packed))))
        rank, index = np.full((n, parts, k), _FAR, dtype=np.int32), np.full((n, parts, k), -1, dtype=np.int64)
        both = np.full(rank.shape if observed else (n, parts, 0), -1, dtype=np.int64)
        for tile in tiles(database.length, database.row_bytes, _DATABASE_BYTES, BLOCK):
            shift = part.start - tile.start if exclude_self else NOT_SELF
            _topk_tile(
                packed, database.read(tile), observed, tile.stop - tile.start, shift, *groups(exclude, part, tile),
                tile.start, rank, index, both,
            )  # fmt: skip
        rank_nk[part], index_nk[part], *more = merged(rank, index, k, *([both] if observed else []))
        if observed:
            both_nk[part] = more[0]
    return rank_nk, index_nk, both_nk


def _range(
    query: _Set, database: _Set, limit: int, exclude_self: bool, exclude: Exclude, observed: bool, length: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, index, distance and sites (`length` where all are observed) of the pairs of rank up to `limit`."""
    whole, narrow = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)
    found: list[tuple[np.ndarray, ...]] = [(whole, whole, narrow, narrow)]
    for part in tiles(query.length, query.row_bytes, _QUERY_BYTES, BLOCK):
        packed, n = query.read(part), part.stop - part.start
        for tile in tiles(database.length, database.row_bytes, _DATABASE_BYTES, BLOCK):
            other, m = database.read(tile), tile.stop - tile.start
            shift, group = part.start - tile.start if exclude_self else NOT_SELF, groups(exclude, part, tile)

            def block(i: int, given: tuple = (packed, other, observed, n, m, shift, *group)) -> tuple[np.ndarray, ...]:
                return _range_rows(*given, limit, i)  # type: ignore[call-arg]

            for row, index, distance, sites in in_threads(block, _strips(packed)):
                found.append((row + part.start, index + tile.start, distance, sites if observed else sites + length))
    return csr(query.length, found)  # type: ignore[return-value]


@numba.njit(cache=True, nogil=True)
def _strip(query: Packed) -> int:
    """Blocks of queries of a task."""
    return _STRIP if len(query.ones_l) else 1


@numba.njit(cache=True, nogil=True)
def _strips(query: Packed) -> int:
    """Tasks."""
    return (query.one.shape[0] + _strip(query) - 1) // _strip(query)


@numba.njit(cache=True, nogil=True)
def _new_room(query: Packed) -> _Room:
    cells, strip = BLOCK * BLOCK, _STRIP if len(query.ones_l) else 0
    return _Room(
        np.empty(cells, dtype=np.int32), np.empty(cells, dtype=np.int32), np.zeros(cells, dtype=np.int32),
        np.empty((strip, _AHEAD, cells), dtype=np.int32), tile_lookups.new_room(strip, query.one.shape[1]),
    )  # fmt: skip


@numba.njit(cache=True, nogil=True, forceinline=True)
def _look_ahead(
    query: Packed, i0: int, i1: int, database: Packed, j0: int, j1: int, diagonal: bool, room: _Room
) -> None:
    """Before `_ranks` of query blocks [i0, i1) with database blocks [j0, j1), on the `diagonal` those from the query's on."""
    if len(query.ones_l) == 0:
        return
    reach = np.empty((i1 - i0, 2), dtype=np.int64)
    for i in range(i0, i1):
        reach[i - i0, 0], reach[i - i0, 1] = i if diagonal else 0, j1
    tile_lookups.look_up(
        False, 64 * query.one.shape[1], query.one, query.ones_l, i0, database.one, database.ones_l, j0, j1, reach,
        room.lookups, room.sums,
    )  # fmt: skip


@numba.njit(cache=True, nogil=True, forceinline=True)
def _ranks(query: Packed, i: int, i0: int, database: Packed, j: int, j0: int, observed: bool, room: _Room) -> None:
    """room.rank: what pairs are ordered by, after `_look_ahead` from (i0, j0). That is the distance or, where `observed`, the
    bits of float32(distance / (2 sites)), which rise with it, or _FAR where no site is shared; room.counts and room.sites are
    filled then only.
    """
    rank, counts, sites = room.rank, room.counts, room.sites
    if len(query.ones_l):
        both, ones_j = room.sums[i - i0, j - j0], database.ones_l[j * BLOCK : (j + 1) * BLOCK]
        for r in range(BLOCK):
            own = np.int32(query.ones_l[i * BLOCK + r])
            row, common = rank[r * BLOCK : (r + 1) * BLOCK], both[r * BLOCK : (r + 1) * BLOCK]
            for c in range(BLOCK):
                row[c] = own + np.int32(ones_j[c]) - np.int32(2) * common[c]
        return
    if not observed:
        xor_tile(query.one, i, database.one, j, rank)
        return
    observed_tile(query.one, query.two, query.observed, i, database.one, database.two, database.observed, j, counts)
    and_tile(query.observed, i, database.observed, j, sites)
    share = rank.view(np.float32)
    for c in range(len(rank)):
        share[c] = np.float64(counts[c]) / np.float64(2 * max(1, sites[c]))
    for c in range(len(rank)):
        if sites[c] == 0:
            rank[c] = _FAR


@numba.njit(cache=True, nogil=True)
def _cross_rows(
    query: Packed, database: Packed, observed: bool, out: np.ndarray, sites_nm: np.ndarray, diagonal: bool, strip: int
) -> None:
    """A strip of query blocks against all, or on the diagonal against those from itself on, which go to both halves."""
    room = _new_room(query)
    i0 = strip * _strip(query)
    i1, blocks = min(query.one.shape[0], i0 + _strip(query)), database.one.shape[0]
    for j0 in range(i0 if diagonal else 0, blocks, _AHEAD):
        j1 = min(blocks, j0 + _AHEAD)
        _look_ahead(query, i0, i1, database, j0, j1, diagonal, room)
        for i in range(i0, i1):
            for j in range(max(j0, i) if diagonal else j0, j1):
                _ranks(query, i, i0, database, j, j0, observed, room)
                _place(room.counts if observed else room.rank, out, i, j, diagonal)
                if observed:
                    _place(room.sites, sites_nm, i, j, diagonal)


@numba.njit(cache=True, nogil=True)
def _place(tile: np.ndarray, out: np.ndarray, i: int, j: int, both: bool) -> None:
    """The tile into its place and, where wanted, turned into its mirror's."""
    rows, columns = min(BLOCK, out.shape[0] - i * BLOCK), min(BLOCK, out.shape[1] - j * BLOCK)
    for r in range(rows):
        row = out[i * BLOCK + r, j * BLOCK : j * BLOCK + columns]
        for c in range(columns):
            row[c] = tile[r * BLOCK + c]
    if both and i != j:
        for c in range(columns):
            row = out[j * BLOCK + c, i * BLOCK : i * BLOCK + rows]
            for r in range(rows):
                row[r] = tile[r * BLOCK + c]


@numba.njit(cache=True, nogil=True, parallel=True)
def _cross_tile(
    query: Packed, database: Packed, observed: bool, out: np.ndarray, sites_nm: np.ndarray, diagonal: bool
) -> None:
    strips = _strips(query)
    for h in numba.prange((strips + 1) // 2):  # a long strip and a short one: on the diagonal their work is even
        _cross_rows(query, database, observed, out, sites_nm, diagonal, h)
        if h != strips - 1 - h:
            _cross_rows(query, database, observed, out, sites_nm, diagonal, strips - 1 - h)


@numba.njit(cache=True, nogil=True)
def _topk_rows(
    query: Packed,
    database: Packed,
    observed: bool,
    members: int,
    shift: int,
    query_group: np.ndarray,
    database_group: np.ndarray,
    first: int,
    rank_npk: np.ndarray,
    index_npk: np.ndarray,
    both_npk: np.ndarray,
    strip: int,
    part: int,
) -> None:
    """A strip of query blocks against part `part` of this piece of the database, whose first row is row `first` of all."""
    room = _new_room(query)
    parts, k = rank_npk.shape[1], rank_npk.shape[2]
    i0, blocks = strip * _strip(query), database.one.shape[0]
    i1, end = min(query.one.shape[0], i0 + _strip(query)), (part + 1) * blocks // parts
    for j0 in range(part * blocks // parts, end, _AHEAD):
        j1 = min(end, j0 + _AHEAD)
        _look_ahead(query, i0, i1, database, j0, j1, False, room)
        for i in range(i0, i1):
            for j in range(j0, j1):
                _ranks(query, i, i0, database, j, j0, observed, room)
                for r in range(min(BLOCK, rank_npk.shape[0] - i * BLOCK)):
                    n = i * BLOCK + r
                    kept = rank_npk[n, part]
                    nearest = room.rank[r * BLOCK]
                    for c in range(1, BLOCK):
                        nearest = min(nearest, room.rank[r * BLOCK + c])
                    if nearest >= kept[k - 1]:
                        continue
                    for c in range(min(BLOCK, members - j * BLOCK)):
                        m, at = j * BLOCK + c, r * BLOCK + c
                        if room.rank[at] < kept[k - 1] and not skipped(n, m, shift, query_group, database_group):
                            place = insert(kept, index_npk[n, part], room.rank[at], first + m)
                            if observed:
                                both = both_npk[n, part]
                                for behind in range(k - 1, place, -1):
                                    both[behind] = both[behind - 1]
                                both[place] = np.int64(room.counts[at]) << 32 | np.int64(room.sites[at])


@numba.njit(cache=True, nogil=True, parallel=True)
def _topk_tile(
    query: Packed,
    database: Packed,
    observed: bool,
    members: int,
    shift: int,
    query_group: np.ndarray,
    database_group: np.ndarray,
    first: int,
    rank_npk: np.ndarray,
    index_npk: np.ndarray,
    both_npk: np.ndarray,
) -> None:
    parts = rank_npk.shape[1]
    for job in numba.prange(_strips(query) * parts):
        _topk_rows(
            query, database, observed, members, shift, query_group, database_group, first, rank_npk, index_npk, both_npk,
            job // parts, job % parts,
        )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def _range_rows(
    query: Packed,
    database: Packed,
    observed: bool,
    queries: int,
    members: int,
    shift: int,
    query_group: np.ndarray,
    database_group: np.ndarray,
    limit: int,
    strip: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows, indices, distances and sites (0 unless `observed`) of the pairs of a strip of queries of rank up to `limit`."""
    room = _new_room(query)
    rank, counts, sites = room.rank, room.counts, room.sites
    rows, indices = np.empty(BLOCK, dtype=np.int64), np.empty(BLOCK, dtype=np.int64)
    distances, shared = np.empty(BLOCK, dtype=np.int32), np.empty(BLOCK, dtype=np.int32)
    held, i0, blocks = 0, strip * _strip(query), database.one.shape[0]
    i1 = min(query.one.shape[0], i0 + _strip(query))
    for j0 in range(0, blocks, _AHEAD):
        j1 = min(blocks, j0 + _AHEAD)
        _look_ahead(query, i0, i1, database, j0, j1, False, room)
        for i in range(i0, i1):
            for j in range(j0, j1):
                _ranks(query, i, i0, database, j, j0, observed, room)
                for r in range(min(BLOCK, queries - i * BLOCK)):
                    nearest = rank[r * BLOCK]
                    for c in range(1, BLOCK):
                        nearest = min(nearest, rank[r * BLOCK + c])
                    if nearest > limit:
                        continue
                    for c in range(min(BLOCK, members - j * BLOCK)):
                        n, m, at = i * BLOCK + r, j * BLOCK + c, r * BLOCK + c
                        if rank[at] <= limit and not skipped(n, m, shift, query_group, database_group):
                            if held == len(rows):
                                rows, indices = grown(rows), grown(indices)
                                distances, shared = grown(distances), grown(shared)
                            rows[held], indices[held] = n, m
                            distances[held], shared[held] = counts[at] if observed else rank[at], sites[at]
                            held += 1
    return rows[:held], indices[:held], distances[:held], shared[:held]
