"""What the door asks of arguments, and which implementation runs. Errors name what was expected, what came, and what to
try.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal

import numpy as np

from engine.errors import Unsupported, UsageError

Implementation = Literal["reference", "numba", "triton"]
WHERE = "engine.kernels.nearest"
FEATURES = ("float32", "bfloat16", "float16", "uint8", "int8", "uint16", "int16")  # all exact in float32
METRICS = ("l2", "cosine", "correlation")
PRODUCTS = ("int8", "bfloat16", "float32")
MOST_WORDS, MOST_AXES = 2**24, 2**20  # distances fit int32; the error bounds of the products hold


def width(rows: Any) -> int:
    """Values in a row, over all trailing axes."""
    return int(np.prod(rows.shape[1:], dtype=np.int64))


def is_tensor(array: Any) -> bool:
    return type(array).__module__.partition(".")[0] == "torch"


def choose(
    query: Any, database: Any, implementation: Implementation | None, devices: Any = None, *, on_cpu: bool = False
) -> ModuleType:
    """The module that runs: the named one, or the default for where `query` lies. A named one is never replaced.

    on_cpu: whether the CPU takes torch tensors too.
    """
    for array in (query, database):
        if not is_tensor(array) and not all(hasattr(array, name) for name in ("shape", "dtype", "__getitem__")):
            hint = "np.asarray" if isinstance(array, list | tuple) else ""
            other = ", query and database of one kind" if array is database else ""
            raise UsageError("an array or a torch tensor" + other, type(array).__name__, WHERE, hint)
    tensor = is_tensor(query)
    if tensor != is_tensor(database):
        raise UsageError("query and database of one kind", f"{type(query)} and {type(database)}", WHERE)
    host = not tensor or (on_cpu and query.device.type == "cpu" and database.device.type == "cpu")
    name = implementation or ("triton" if devices is not None or not host else "numba")
    if name not in ("reference", "numba", "triton"):
        raise UsageError("implementation reference, numba or triton", repr(name), WHERE)
    if name == "triton":
        if devices is None and not tensor:
            raise Unsupported(
                "a torch tensor for triton", "a NumPy array", WHERE, "torch.from_numpy, or devices=['cuda']"
            )
        from engine.kernels.nearest import triton_gpu

        if devices is None:
            if query.device.type != "cuda" and not triton_gpu.INTERPRETED:
                hint = ".numpy() for the CPU, or devices=['cuda']"
                raise Unsupported("a CUDA tensor for triton", f"a {query.device} tensor", WHERE, hint)
            if query.device != database.device:
                raise UsageError("query and database on one device", f"{query.device} and {database.device}", WHERE)
        return triton_gpu
    if devices is not None:
        raise Unsupported("triton for devices", name, WHERE, "no devices, or no implementation")
    if not host:
        raise Unsupported(f"a NumPy array for {name}", "a torch tensor", WHERE, ".cpu().numpy()")
    if name == "numba":
        from engine.kernels.nearest import numba_cpu

        return numba_cpu
    from engine.kernels.nearest import reference

    return reference


def bits(query: Any, database: Any) -> tuple[Any, Any]:
    """Both sides of a search of bits; torch uint64 is viewed as int64, which torch knows better."""
    kinds = ("int64", "uint64") if is_tensor(query) else ("uint64",)
    for array in (query, database):
        if len(array.shape) != 2:
            raise UsageError("two axes", f"shape {tuple(array.shape)}", WHERE)
        _type(array, kinds)
    _width(query.shape[1], database.shape[1], MOST_WORDS)
    return _as_int64(query), _as_int64(database)


def planes(query: Any, database: Any, length: int) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any]]:
    """Both sides of a search by IBS: (one, two, observed or None) each."""
    sides = []
    for side in (query, database):
        if not isinstance(side, tuple) or len(side) != 3 or side[0] is None or side[1] is None:
            raise UsageError(
                "planes (dosage >= 1, dosage = 2, observed or None)", type(side).__name__, WHERE, "ibs_planes"
            )
        given = [bits(plane, side[0])[0] for plane in side if plane is not None]
        if any(plane.shape != side[0].shape for plane in given):
            raise UsageError("planes of one shape", " and ".join(str(tuple(x.shape)) for x in given), WHERE)
        sides.append((given[0], given[1], given[2] if len(given) == 3 else None))
    words(sides[0][0], length)
    _width(sides[0][0].shape[1], sides[1][0].shape[1], MOST_WORDS // 2)
    return sides[0], sides[1]


def features(query: Any, database: Any, metric: str, product: str | None) -> tuple[Any, Any]:
    """Both sides of a search of features."""
    for array in (query, database):
        if len(array.shape) < 2:
            raise UsageError("two axes or more", f"shape {tuple(array.shape)}", WHERE)
        _type(array, FEATURES)
    _width(width(query), width(database), MOST_AXES)
    if metric not in METRICS:
        raise UsageError(f"metric {', '.join(METRICS)}", repr(metric), WHERE)
    if product is not None and product not in PRODUCTS:
        raise UsageError(f"product {', '.join(PRODUCTS)} or None", repr(product), WHERE)
    return query, database


def words(bits_nw: Any, length: int) -> None:
    if length < 0 or bits_nw.shape[1] != (length + 63) // 64:
        raise UsageError(f"{(length + 63) // 64} words for {length} sites", f"{bits_nw.shape[1]} words", WHERE)


def neighbours(k: int) -> int:
    if k < 1:
        raise UsageError("k >= 1", str(k), WHERE)
    return int(k)


def within(radius: float) -> float:
    if not radius >= 0:
        raise UsageError("radius >= 0", str(radius), WHERE)
    return radius + 0  # -0.0 is 0


def windows(windows_v2: Any, sites: int) -> np.ndarray:
    """int64 (V, 2) of 0 <= start < stop <= sites."""
    array = np.asarray(windows_v2)
    if array.size == 0:
        return np.empty((0, 2), dtype=np.int64)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        raise UsageError("windows as integers (V, 2): start, stop", f"{array.dtype} {array.shape}", WHERE)
    array = np.ascontiguousarray(array, dtype=np.int64)
    wrong = np.flatnonzero((array[:, 0] < 0) | (array[:, 0] >= array[:, 1]) | (array[:, 1] > sites))
    if len(wrong):
        start, stop = array[wrong[0]]
        raise UsageError(f"0 <= start < stop <= {sites}", f"({start}, {stop})", f"{WHERE}: window {wrong[0]}")
    return array


def positions(position_bp: Any, like: Any, length: int) -> Any:
    """int64 (L,) where `like` lies."""
    values = integers(position_bp, like, "position_bp")
    if len(values) != length:
        raise UsageError(f"{length} positions", str(len(values)), WHERE)
    if bool((values[1:] < values[:-1]).any()):
        raise UsageError("position_bp that never falls", "a falling one", WHERE, "one contig at a time, sorted")
    return values


def norms(largest: float, metric: str) -> None:
    """`largest` norm of any row: finite, and small enough that (|q| + |d|)^2 fits float32."""
    if not (largest < 0.75e38**0.5 if metric == "l2" else largest < np.inf):
        raise UsageError("finite values whose squared distances fit float32", f"a row of norm {largest:g}", WHERE)


def exclusion(exclude: tuple[Any, Any] | None, query: Any, database: Any, like: Any) -> tuple[Any, Any] | None:
    """Groups of both sides, int64, where `like` lies."""
    if exclude is None:
        return None
    if len(exclude) != 2:
        raise UsageError("exclude as (query_group, database_group)", f"{len(exclude)} items", WHERE)
    groups = integers(exclude[0], like, "query_group"), integers(exclude[1], like, "database_group")
    if (len(groups[0]), len(groups[1])) != (query.shape[0], database.shape[0]):
        got = f"{len(groups[0])} and {len(groups[1])}"
        raise UsageError(f"groups of {query.shape[0]} queries and {database.shape[0]} rows", got, WHERE)
    return groups


def integers(values: Any, like: Any, name: str) -> Any:
    """`values` as int64 (P,) where `like` lies: the host, or the device of a tensor."""
    if not is_tensor(like):
        array = np.asarray(values)
        if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
            raise UsageError(f"{name} as one axis of integers", f"{array.dtype} {array.shape}", WHERE)
        return np.ascontiguousarray(array, dtype=np.int64)
    import torch

    tensor = torch.as_tensor(values)
    if tensor.ndim != 1 or tensor.is_floating_point():
        raise UsageError(f"{name} as one axis of integers", f"{tensor.dtype} {tuple(tensor.shape)}", WHERE)
    return tensor.to(like.device, torch.int64).contiguous()


def _type(array: Any, kinds: tuple[str, ...]) -> None:
    if str(array.dtype).removeprefix("torch.") not in kinds:
        raise UsageError(f"type {' or '.join(kinds)}", str(array.dtype), WHERE)


def _width(query: int, database: int, most: int) -> None:
    if query != database or query > most:
        raise UsageError(f"query and database of equal width, at most {most}", f"{query} and {database}", WHERE)


def _as_int64(array: Any) -> Any:
    if not is_tensor(array):
        return array
    import torch

    return array.contiguous().view(torch.int64)
