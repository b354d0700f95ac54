"""Linkage disequilibrium of packed haplotypes: r2 of all pairs, of two sets, of listed pairs, and its decay with distance.

Input is site-major bits (`engine.kernels.bits`): `bits_lw` uint64 (L sites, ceil(n / 64) words), 1 = ALT; bits beyond
haplotype n are ignored. Counts are exact integers, r2 is made from them in float64 and rounded once to float32, so that all
implementations agree bit for bit. A monomorphic site has no r2: NaN.

Which sites to compare and what a figure means are left to the rooms above; so are missing genotypes, for now.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engine.errors import Unsupported, UsageError

if TYPE_CHECKING:
    from types import ModuleType

Implementation = Literal["reference", "numba", "triton"]
_WHERE = "engine.kernels.ld"
_MOST_HAPLOTYPES = 2**26  # n * c11 must stay below 2**53 to be exact in float64


def r2(bits_lw: Any, n: int, other_mw: Any = None, *, implementation: Implementation | None = None) -> Any:
    """Squared correlation of alleles for all pairs of sites.

    Args:
        bits_lw: (L, ceil(n / 64)) uint64; a CUDA tensor of int64 with the same bits for triton.
        n: number of haplotypes, n <= 2**26.
        other_mw: a second set of sites over the same haplotypes; None compares `bits_lw` with itself.
        implementation: None chooses by where the input lies (NumPy: numba, CUDA tensor: triton).

    Returns:
        float32 (L, L), or (L, M); in [0, 1]; NaN where a site is monomorphic. Source: Hill and Robertson 1968.

    Raises:
        UsageError: wrong shape or type.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = _choose(bits_lw, implementation)
    bits_lw = _check_bits(bits_lw, n, "bits_lw")
    if other_mw is not None:
        if type(other_mw) is not type(bits_lw):
            raise UsageError(f"other_mw as {type(bits_lw).__name__}", type(other_mw).__name__, _WHERE)
        other_mw = _check_bits(other_mw, n, "other_mw")
    return chosen.r2(bits_lw, int(n), other_mw)


def r2_pairs(bits_lw: Any, n: int, i: Any, j: Any, *, implementation: Implementation | None = None) -> Any:
    """r2 of site i[p] with site j[p]: float32 (P,). `i`, `j`: integers (P,) in [0, L).

    Raises:
        UsageError: wrong shape or type, or an index outside the sites.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = _choose(bits_lw, implementation)
    bits_lw = _check_bits(bits_lw, n, "bits_lw")
    i, j = _integers(i, bits_lw, "i"), _integers(j, bits_lw, "j")
    if i.shape != j.shape:
        raise UsageError("i and j of one length", f"{tuple(i.shape)} and {tuple(j.shape)}", _WHERE)
    for name, index in (("i", i), ("j", j)):
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= len(bits_lw)):
            raise UsageError(f"{name} in [0, {len(bits_lw)})", f"{int(index.min())} to {int(index.max())}", _WHERE)
    return chosen.r2_pairs(bits_lw, int(n), i, j)


def r2_decay(
    bits_lw: Any, n: int, position_bp: Any, edges_bp: Any, *, implementation: Implementation | None = None
) -> tuple[Any, Any]:
    """Histogram of r2 by distance, over all pairs of polymorphic sites, without ever holding the matrix.

    Args:
        position_bp: integers (L,), never falling. Work beyond the last edge is skipped.
        edges_bp: integers (B + 1,), rising; bin b holds the pairs with edges[b] <= distance < edges[b + 1].

    Returns:
        sum of r2, float64 (B,), within 1e-12 relative of the reference and the same for any number of threads;
        number of pairs, int64 (B,), exact.

    Raises:
        UsageError: wrong shape or type, positions that fall, edges that do not rise.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = _choose(bits_lw, implementation)
    bits_lw = _check_bits(bits_lw, n, "bits_lw")
    position_bp, edges_bp = _integers(position_bp, bits_lw, "position_bp"), _integers(edges_bp, bits_lw, "edges_bp")
    if len(position_bp) != len(bits_lw):
        raise UsageError(f"{len(bits_lw)} positions", str(len(position_bp)), _WHERE)
    if bool((position_bp[1:] < position_bp[:-1]).any()):
        raise UsageError("position_bp that never falls", "a falling one", _WHERE, "one contig at a time, sorted")
    if len(edges_bp) < 2 or bool((edges_bp[1:] <= edges_bp[:-1]).any()):
        raise UsageError("at least two rising edges_bp", str(edges_bp.tolist()[:8]), _WHERE)
    sums, pairs = chosen.r2_decay(bits_lw, int(n), position_bp, edges_bp)
    return sums, pairs


def _choose(array: Any, implementation: Implementation | None) -> ModuleType:
    """The module that runs: the named one, or the default for where `array` lies. A named one is never replaced."""
    is_numpy = isinstance(array, np.ndarray)
    if not is_numpy and not type(array).__module__.startswith("torch"):
        raise UsageError("a NumPy array or a torch tensor", type(array).__name__, _WHERE)
    name = implementation or ("numba" if is_numpy else "triton")
    if name == "triton":
        if is_numpy:
            raise Unsupported("a torch tensor for triton", "a NumPy array", _WHERE, "torch.from_numpy")
        from engine.kernels.ld import triton_gpu

        if array.device.type != "cuda" and not triton_gpu.INTERPRETED:
            raise Unsupported("a CUDA tensor for triton", f"a {array.device} tensor", _WHERE, ".numpy() for the CPU")
        return triton_gpu
    if not is_numpy:
        raise Unsupported(f"a NumPy array for {name}", "a torch tensor", _WHERE, ".cpu().numpy()")
    if name == "numba":
        from engine.kernels.ld import numba_cpu

        return numba_cpu
    if name == "reference":
        from engine.kernels.ld import reference

        return reference
    raise UsageError("implementation reference, numba or triton", repr(name), _WHERE)


def _check_bits(bits: Any, n: int, name: str) -> Any:
    """`bits` contiguous, its shape and type checked; torch uint64 is viewed as int64, which torch knows better."""
    if bits.ndim != 2:
        raise UsageError(f"{name} with two axes", f"shape {tuple(bits.shape)}", _WHERE)
    if not 0 <= n <= _MOST_HAPLOTYPES:
        raise UsageError(f"0 to {_MOST_HAPLOTYPES} haplotypes", str(n), _WHERE)
    if bits.shape[1] != (n + 63) // 64:
        raise UsageError(f"{name} of {(n + 63) // 64} words for {n} haplotypes", f"{bits.shape[1]} words", _WHERE)
    kind = str(bits.dtype).removeprefix("torch.")
    if isinstance(bits, np.ndarray):
        if kind != "uint64":
            raise UsageError(f"{name} of type uint64", kind, _WHERE)
        return np.ascontiguousarray(bits)
    if kind not in ("int64", "uint64"):
        raise UsageError(f"{name} of type int64 or uint64", kind, _WHERE)
    import torch

    return bits.contiguous().view(torch.int64)


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
