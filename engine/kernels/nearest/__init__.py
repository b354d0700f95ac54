"""Exact nearest neighbours by exhaustive search: bits (Hamming, IBS, windows, longest common run) and features (L2 and
kin).

Every search gives the true answer of its definition (`reference`), ties included, whatever the implementation, tile,
thread or device. `topk` gives the k nearest, nearest first, ties by smallest index, -1 in slots without a candidate;
`range` every row within a radius as CSR: offsets int64 (N + 1,), then index and values, row by row, indices rising;
`cross` the matrix.

Rows of bits are haplotype-major (`bits.transpose`): uint64 (N, W), unused high bits zero; torch tensors of int64 with
the same bits for triton. Query and database need not fit in memory: anything with `shape`, `dtype` and slices by rows
(np.memmap, a Zarr array) is read in tiles. `devices` = a list of CUDA devices splits the database over them; the host's
arrays are streamed to them in tiles, and the answer lies where the query lies.

Pairs that must not be neighbours: `exclude_self` skips database row n for query n (a set against itself); `exclude` =
(query_group int64 (N,), database_group int64 (M,)) skips pairs of one group, such as haplotypes of one person. What a
small distance means is left to the audit.

All functions raise UsageError for arguments of wrong shape, type or value, and Unsupported where the named
implementation cannot run on this input (triton needs CUDA tensors or `devices`).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from engine.kernels.nearest import checks
from engine.kernels.nearest.checks import Implementation

Metric = Literal["l2", "cosine", "correlation"]
Product = Literal["int8", "bfloat16", "float32"]
Devices = list[Any] | None
Groups = tuple[Any, Any] | None

__all__ = [
    "features_cross",
    "features_range",
    "features_topk",
    "hamming_cross",
    "hamming_range",
    "hamming_topk",
    "hamming_windows_topk",
    "ibs_cross",
    "ibs_planes",
    "ibs_range",
    "ibs_topk",
    "l2_topk",
    "longest_run",
]


def hamming_cross(query_nw: Any, database_mw: Any, *, implementation: Implementation | None = None) -> Any:
    """Number of differing bits of every pair: int32 (N, M)."""
    chosen = checks.choose(query_nw, database_mw, implementation)
    return chosen.hamming_cross(*checks.bits(query_nw, database_mw))


def hamming_topk(
    query_nw: Any,
    database_mw: Any,
    k: int,
    *,
    exclude_self: bool = False,
    exclude: Groups = None,
    devices: Devices = None,
    implementation: Implementation | None = None,
) -> tuple[Any, Any]:
    """The k database rows with the fewest differing bits.

    Returns:
        distance int32 (N, k); index int64 (N, k).
    """
    chosen = checks.choose(query_nw, database_mw, implementation, devices)
    query_nw, database_mw = checks.bits(query_nw, database_mw)
    exclude = checks.exclusion(exclude, query_nw, database_mw, query_nw)
    given = query_nw, database_mw, checks.neighbours(k), bool(exclude_self), exclude
    return chosen.hamming_topk(*given, **_on(devices))


def hamming_range(
    query_nw: Any,
    database_mw: Any,
    radius: int,
    *,
    exclude_self: bool = False,
    exclude: Groups = None,
    devices: Devices = None,
    implementation: Implementation | None = None,
) -> tuple[Any, Any, Any]:
    """All database rows with at most `radius` differing bits.

    Returns:
        offsets int64 (N + 1,); index int64 (R,); distance int32 (R,).
    """
    chosen = checks.choose(query_nw, database_mw, implementation, devices)
    query_nw, database_mw = checks.bits(query_nw, database_mw)
    exclude = checks.exclusion(exclude, query_nw, database_mw, query_nw)
    radius = int(min(checks.within(radius), 2**31 - 2))
    return chosen.hamming_range(query_nw, database_mw, radius, bool(exclude_self), exclude, **_on(devices))


def hamming_windows_topk(
    query_nw: Any,
    database_mw: Any,
    windows_v2: Any,
    k: int,
    *,
    exclude_self: bool = False,
    exclude: Groups = None,
    implementation: Implementation | None = None,
) -> tuple[Any, Any]:
    """The k nearest rows of each query in each window of sites, all windows in one pass.

    Args:
        windows_v2: integers (V, 2): first site and the one behind the last, 0 <= start < stop <= 64 W; in any order,
        and they
            may overlap: the sites between two edges are counted once.

    Returns:
        distance int32 (N, V, k); index int64 (N, V, k).
    """
    chosen = checks.choose(query_nw, database_mw, implementation)
    query_nw, database_mw = checks.bits(query_nw, database_mw)
    windows_v2 = checks.windows(windows_v2, 64 * query_nw.shape[1])
    exclude = checks.exclusion(exclude, query_nw, database_mw, query_nw)
    return chosen.hamming_windows_topk(
        query_nw, database_mw, windows_v2, checks.neighbours(k), bool(exclude_self), exclude
    )


def longest_run(
    query_nw: Any,
    database_mw: Any,
    length: int,
    position_bp: Any,
    *,
    exclude_self: bool = False,
    exclude: Groups = None,
    implementation: Implementation | None = None,
) -> tuple[Any, Any, Any]:
    """Per query the longest stretch of consecutive sites identical to any one database row.

    Args:
        length: number of sites L; bits beyond are ignored.
        position_bp: integers (L,), never falling. The length of a run is position[last] - position[first].

    Returns:
        run_bp, run_sites, index, all int64 (N,). Longest in bp; of equals the smallest index, then the first along the
        sites. A single equal site is a run of 0 bp; a query that has no equal site anywhere gets -1, 0, -1.
    """
    chosen = checks.choose(query_nw, database_mw, implementation)
    query_nw, database_mw = checks.bits(query_nw, database_mw)
    checks.words(query_nw, length)
    position_bp = checks.positions(position_bp, query_nw, length)
    exclude = checks.exclusion(exclude, query_nw, database_mw, query_nw)
    return chosen.longest_run(query_nw, database_mw, int(length), position_bp, bool(exclude_self), exclude)


def ibs_planes(nonzero_sw: Any, negative_sw: Any, observed_sw: Any) -> tuple[Any, Any, Any]:
    """Planes of `bits.dosage_planes`, each transposed to people (S, W), as the planes of the IBS functions."""
    return observed_sw & ~negative_sw, nonzero_sw & ~negative_sw, observed_sw


def ibs_cross(
    query: tuple[Any, Any, Any],
    database: tuple[Any, Any, Any],
    length: int,
    *,
    implementation: Implementation | None = None,
) -> tuple[Any, Any]:
    """Allele-count distance of unphased genotypes, sum of |dosage - dosage| over the sites observed in both, of every
    pair.

    1 - distance / (2 sites) is the IBS of `plink1.9 --distance ibs flat-missing` (Purcell et al. 2007; Chang et al.
    2015).

    Args:
        query, database: planes (one, two, observed) of S people each, uint64 (S, W): dosage >= 1, dosage = 2 (of no
            meaning where not observed), and both alleles were called; None for `observed`: all were (`ibs_planes`).
        length: number of sites L; bits beyond are ignored.

    Returns:
        distance int32 (N, M); sites int32 (N, M) that were compared.
    """
    chosen = checks.choose(query[0], database[0], implementation)
    return chosen.ibs_cross(*checks.planes(query, database, length), int(length))


def ibs_topk(
    query: tuple[Any, Any, Any],
    database: tuple[Any, Any, Any],
    length: int,
    k: int,
    *,
    exclude_self: bool = False,
    exclude: Groups = None,
    devices: Devices = None,
    implementation: Implementation | None = None,
) -> tuple[Any, Any, Any]:
    """The k nearest people by IBS (arguments of `ibs_cross`).

    Where either side has a plane `observed`, people are ordered by distance / (2 sites), divided in float64 and rounded
    to float32, so that few sites in common are no advantage, and a pair that shares no site is no candidate; else by
    distance.

    Returns:
        distance int32 (N, k); sites int32 (N, k); index int64 (N, k).
    """
    chosen = checks.choose(query[0], database[0], implementation, devices)
    query, database = checks.planes(query, database, length)
    exclude = checks.exclusion(exclude, query[0], database[0], query[0])
    given = query, database, int(length), checks.neighbours(k), bool(exclude_self), exclude
    return chosen.ibs_topk(*given, **_on(devices))


def ibs_range(
    query: tuple[Any, Any, Any],
    database: tuple[Any, Any, Any],
    length: int,
    radius: float,
    *,
    exclude_self: bool = False,
    exclude: Groups = None,
    devices: Devices = None,
    implementation: Implementation | None = None,
) -> tuple[Any, Any, Any, Any]:
    """All people with 1 - IBS, float32(distance / (2 sites)), of at most float32(radius) (arguments of `ibs_cross`).

    Returns:
        offsets int64 (N + 1,); index int64 (R,); distance int32 (R,); sites int32 (R,), never 0.
    """
    chosen = checks.choose(query[0], database[0], implementation, devices)
    query, database = checks.planes(query, database, length)
    exclude = checks.exclusion(exclude, query[0], database[0], query[0])
    given = query, database, int(length), checks.within(radius), bool(exclude_self), exclude
    return chosen.ibs_range(*given, **_on(devices))


def features_cross(
    query_nd: Any, database_md: Any, *, metric: Metric = "l2", implementation: Implementation | None = None
) -> Any:
    """Distance of every pair of rows of features: float32 (N, M). For small use: every pair is summed in float64.

    l2: the sum over the axes of (q - d)^2. cosine: 1 - q.d / sqrt(q.q d.d), not below 0, and 1 where a row is all
    zeros. correlation: cosine of the rows less their own means (1 - Pearson's r; 1 - NCC of patches). Every sum is the
    float64 sum over the axes in order; the result is rounded once to float32. That is the definition, to the last bit.

    Args:
        query_nd, database_md: (N, ...) and (M, ...) of float32, bfloat16, float16 or integers of 8 or 16 bits:
        features, or
            raw patches, whose trailing axes are flattened (d values, d <= 2**20). Each tile is converted when it is
            read. Finite; for l2, norms below 8.6e18. The CPU takes torch tensors too (bfloat16).
    """
    chosen = checks.choose(query_nd, database_md, implementation, on_cpu=True)
    return chosen.features_cross(*checks.features(query_nd, database_md, metric, None), metric)


def features_topk(
    query_nd: Any,
    database_md: Any,
    k: int,
    *,
    metric: Metric = "l2",
    exclude_self: bool = False,
    exclude: Groups = None,
    product: Product | None = None,
    devices: Devices = None,
    implementation: Implementation | None = None,
) -> tuple[Any, Any]:
    """The k nearest rows (metrics and arguments of `features_cross`).

    Args:
        product: type of the matrix product that proves pairs away; changes how long it takes, never the answer. None:
        the fastest
            here, given up for a finer one where it proves too little.

    Returns:
        distance float32 (N, k); index int64 (N, k).
    """
    chosen = checks.choose(query_nd, database_md, implementation, devices, on_cpu=True)
    query_nd, database_md = checks.features(query_nd, database_md, metric, product)
    exclude = checks.exclusion(exclude, query_nd, database_md, _groups_like(query_nd, chosen))
    given = query_nd, database_md, checks.neighbours(k), metric, bool(exclude_self), exclude, product
    return chosen.features_topk(*given, **_on(devices))


def features_range(
    query_nd: Any,
    database_md: Any,
    radius: float,
    *,
    metric: Metric = "l2",
    exclude_self: bool = False,
    exclude: Groups = None,
    product: Product | None = None,
    devices: Devices = None,
    implementation: Implementation | None = None,
) -> tuple[Any, Any, Any]:
    """All rows at a distance of at most float32(radius) (arguments of `features_topk`).

    Returns:
        offsets int64 (N + 1,); index int64 (R,); distance float32 (R,).
    """
    chosen = checks.choose(query_nd, database_md, implementation, devices, on_cpu=True)
    query_nd, database_md = checks.features(query_nd, database_md, metric, product)
    exclude = checks.exclusion(exclude, query_nd, database_md, _groups_like(query_nd, chosen))
    given = query_nd, database_md, checks.within(radius), metric, bool(exclude_self), exclude, product
    return chosen.features_range(*given, **_on(devices))


def l2_topk(
    query_nd: Any,
    database_md: Any,
    k: int,
    *,
    exclude_self: bool = False,
    exclude: Groups = None,
    implementation: Implementation | None = None,
) -> tuple[Any, Any]:
    """`features_topk` at the smallest squared Euclidean distance: squared distance float32 (N, k); index int64 (N,
    k).
    """
    return features_topk(
        query_nd, database_md, k, exclude_self=exclude_self, exclude=exclude, implementation=implementation
    )


def _on(devices: Devices) -> dict[str, Any]:
    """Only triton has devices."""
    return {} if devices is None else {"devices": list(devices)}


def _groups_like(query: Any, chosen: Any) -> Any:
    """Groups of tensors that the CPU searches are arrays."""
    return query if chosen.__name__.endswith("triton_gpu") else np.empty(0)
