"""Exact nearest neighbours by exhaustive search: Hamming distance and longest common run on packed bits, L2 on features.

Packed rows are haplotype-major (`engine.kernels.bits.transpose`): `query_nw` uint64 (N, W), `database_mw` uint64 (M, W),
equal W, unused high bits zero; CUDA tensors of int64 with the same bits for triton. Neither a tile size nor a thread count
changes an answer.

Pairs that must not be neighbours: `exclude_self` skips database row n for query n (a set against itself); `exclude` =
(query_group int64 (N,), database_group int64 (M,)) skips pairs of one group, such as haplotypes of one person. Ties go to the
smallest index. A slot without a candidate holds -1. What a small distance means is left to the audit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engine.errors import Unsupported, UsageError

if TYPE_CHECKING:
    from types import ModuleType

Implementation = Literal["reference", "numba", "triton"]
_WHERE = "engine.kernels.nearest"
_MOST_WORDS, _MOST_AXES = 2**24, 2**20  # distances fit int32; the error bound of the float32 filter holds


def hamming_cross(query_nw: Any, database_mw: Any, *, implementation: Implementation | None = None) -> Any:
    """Number of differing bits of every pair: int32 (N, M), exact.

    Raises:
        UsageError: wrong shape or type.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = _choose(query_nw, database_mw, implementation)
    return chosen.hamming_cross(*_check_bits(query_nw, database_mw))


def hamming_topk(
    query_nw: Any,
    database_mw: Any,
    k: int,
    *,
    exclude_self: bool = False,
    exclude: tuple[Any, Any] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Any, Any]:
    """The k database rows with the fewest differing bits, nearest first.

    Returns:
        distance int32 (N, k), exact; index int64 (N, k).

    Raises:
        UsageError: wrong shape or type, k < 1.
        Unsupported: the named implementation cannot run on this input; triton takes k up to 256.
    """
    chosen = _choose(query_nw, database_mw, implementation)
    query_nw, database_mw = _check_bits(query_nw, database_mw)
    exclude = _check_exclude(exclude, query_nw, database_mw)
    return chosen.hamming_topk(query_nw, database_mw, _check_k(k), bool(exclude_self), exclude)


def l2_topk(
    query_nd: Any,
    database_md: Any,
    k: int,
    *,
    exclude_self: bool = False,
    exclude: tuple[Any, Any] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Any, Any]:
    """The k database rows at the smallest squared Euclidean distance, nearest first.

    The distance is defined as the float64 sum over the axes in order, rounded once to float32; the answer is exactly the
    top-k of that definition, ties included, in every implementation: what a float32 product filters out is proven to be
    further away.

    Args:
        query_nd, database_md: float32 (N, d) and (M, d), finite, d <= 2**20; squares of their differences must fit float32.

    Returns:
        squared distance float32 (N, k); index int64 (N, k).

    Raises:
        UsageError: wrong shape or type, a value that is not finite or too large, k < 1.
        Unsupported: the named implementation cannot run on this input; triton takes k up to 256.
    """
    chosen = _choose(query_nd, database_md, implementation)
    query_nd, database_md = _check_features(query_nd, database_md)
    exclude = _check_exclude(exclude, query_nd, database_md)
    return chosen.l2_topk(query_nd, database_md, _check_k(k), bool(exclude_self), exclude)


def longest_run(
    query_nw: Any,
    database_mw: Any,
    length: int,
    position_bp: Any,
    *,
    exclude_self: bool = False,
    exclude: tuple[Any, Any] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Any, Any, Any]:
    """Per query the longest stretch of consecutive sites identical to any one database row.

    Args:
        length: number of sites L; bits beyond are ignored.
        position_bp: integers (L,), never falling. The length of a run is position[last] - position[first].

    Returns:
        run_bp, run_sites, index, all int64 (N,). Longest in bp; of equals the smallest index, then the first along the
        sites. A single equal site is a run of 0 bp; a query that has no equal site anywhere gets -1, 0, -1.

    Raises:
        UsageError: wrong shape or type, positions that fall.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = _choose(query_nw, database_mw, implementation)
    query_nw, database_mw = _check_bits(query_nw, database_mw)
    if length < 0 or query_nw.shape[1] != (length + 63) // 64:
        raise UsageError(f"{(length + 63) // 64} words for {length} sites", f"{query_nw.shape[1]} words", _WHERE)
    position_bp = _integers(position_bp, query_nw, "position_bp")
    if len(position_bp) != length:
        raise UsageError(f"{length} positions", str(len(position_bp)), _WHERE)
    if bool((position_bp[1:] < position_bp[:-1]).any()):
        raise UsageError("position_bp that never falls", "a falling one", _WHERE, "one contig at a time, sorted")
    exclude = _check_exclude(exclude, query_nw, database_mw)
    return chosen.longest_run(query_nw, database_mw, int(length), position_bp, bool(exclude_self), exclude)


def _choose(query: Any, database: Any, implementation: Implementation | None) -> ModuleType:
    """The module that runs: the named one, or the default for where `query` lies. A named one is never replaced."""
    is_numpy = isinstance(query, np.ndarray)
    if not is_numpy and not type(query).__module__.startswith("torch"):
        raise UsageError("a NumPy array or a torch tensor", type(query).__name__, _WHERE)
    if type(query) is not type(database):
        raise UsageError("query and database of one kind", f"{type(query)} and {type(database)}", _WHERE)
    name = implementation or ("numba" if is_numpy else "triton")
    if name == "triton":
        if is_numpy:
            raise Unsupported("a torch tensor for triton", "a NumPy array", _WHERE, "torch.from_numpy")
        from engine.kernels.nearest import triton_gpu

        if query.device.type != "cuda" and not triton_gpu.INTERPRETED:
            raise Unsupported("a CUDA tensor for triton", f"a {query.device} tensor", _WHERE, ".numpy() for the CPU")
        if query.device != database.device:
            raise UsageError("query and database on one device", f"{query.device} and {database.device}", _WHERE)
        return triton_gpu
    if not is_numpy:
        raise Unsupported(f"a NumPy array for {name}", "a torch tensor", _WHERE, ".cpu().numpy()")
    if name == "numba":
        from engine.kernels.nearest import numba_cpu

        return numba_cpu
    if name == "reference":
        from engine.kernels.nearest import reference

        return reference
    raise UsageError("implementation reference, numba or triton", repr(name), _WHERE)


def _check_pair(query: Any, database: Any, kinds: tuple[str, ...], most: int) -> None:
    for array in (query, database):
        if array.ndim != 2:
            raise UsageError("two axes", f"shape {tuple(array.shape)}", _WHERE)
        if str(array.dtype).removeprefix("torch.") not in kinds:
            raise UsageError(f"type {' or '.join(kinds)}", str(array.dtype), _WHERE)
    if query.shape[1] != database.shape[1] or query.shape[1] > most:
        got = f"{query.shape[1]} and {database.shape[1]}"
        raise UsageError(f"query and database of equal width, at most {most}", got, _WHERE)


def _check_bits(query: Any, database: Any) -> tuple[Any, Any]:
    """Both contiguous; torch uint64 is viewed as int64, which torch knows better."""
    if isinstance(query, np.ndarray):
        _check_pair(query, database, ("uint64",), _MOST_WORDS)
        return np.ascontiguousarray(query), np.ascontiguousarray(database)
    _check_pair(query, database, ("int64", "uint64"), _MOST_WORDS)
    import torch

    return query.contiguous().view(torch.int64), database.contiguous().view(torch.int64)


def _check_features(query: Any, database: Any) -> tuple[Any, Any]:
    _check_pair(query, database, ("float32",), _MOST_AXES)
    largest = max(float(abs(array).max()) if 0 not in array.shape else 0.0 for array in (query, database))
    if not 4.0 * query.shape[1] * largest**2 < 3e38 or any(bool((array != array).any()) for array in (query, database)):
        raise UsageError("finite values whose squared distances fit float32", f"largest {largest:g} or NaN", _WHERE)
    if isinstance(query, np.ndarray):
        return np.ascontiguousarray(query), np.ascontiguousarray(database)
    return query.contiguous(), database.contiguous()


def _check_k(k: int) -> int:
    if k < 1:
        raise UsageError("k >= 1", str(k), _WHERE)
    return int(k)


def _check_exclude(exclude: tuple[Any, Any] | None, query: Any, database: Any) -> tuple[Any, Any] | None:
    if exclude is None:
        return None
    if len(exclude) != 2:
        raise UsageError("exclude as (query_group, database_group)", f"{len(exclude)} items", _WHERE)
    groups = _integers(exclude[0], query, "query_group"), _integers(exclude[1], query, "database_group")
    if (len(groups[0]), len(groups[1])) != (len(query), len(database)):
        got = f"{len(groups[0])} and {len(groups[1])}"
        raise UsageError(f"groups of {len(query)} queries and {len(database)} rows", got, _WHERE)
    return groups


def _integers(values: Any, like: Any, name: str) -> Any:
    """`values` as int64 (P,) where `like` lies."""
    if isinstance(like, np.ndarray):
        array = np.asarray(values)
        if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
            raise UsageError(f"{name} as one axis of integers", f"{array.dtype} {array.shape}", _WHERE)
        return np.ascontiguousarray(array, dtype=np.int64)
    import torch

    tensor = torch.as_tensor(values)
    if tensor.ndim != 1 or tensor.is_floating_point():
        raise UsageError(f"{name} as one axis of integers", f"{tensor.dtype} {tuple(tensor.shape)}", _WHERE)
    return tensor.to(like.device, torch.int64).contiguous()
