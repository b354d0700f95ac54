"""Haplotype bits: pack, unpack, transpose and count. One bit per allele, 64 haplotypes to a word.

`bits_lw` (L sites, W = ceil(N / 64) words, uint64) holds haplotype n of site l at word n // 64, bit n % 64, least
significant bit first; 1 is ALT. Unused high bits are zero. `bits_nw` is the same with sites and haplotypes exchanged.
A plane of missing genotypes has the same shape. Triton takes and gives torch int64 tensors of the same bit patterns.

Unphased genotypes are three planes of one bit per person (`dosage_planes`): the dosage less one is 0 where `nonzero` is
0, else -1 where `negative` is 1, else 1.

What the bits mean (which allele, which person) is left to the rooms above. Register tiles that count pairs of rows, for the
kernels of other rooms, are in `tiles` and `amx` (CPU) and `triton_tiles` (GPU).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from engine.errors import Unsupported, UsageError

if TYPE_CHECKING:
    from types import ModuleType

Implementation = Literal["reference", "numba", "triton"]


class DosagePlanes(NamedTuple):
    """Unphased genotypes of S people at L sites, each plane uint64 (L, ceil(S / 64)), unused high bits zero.

    nonzero_lw: the dosage is 0 or 2. negative_lw: the dosage is 0. observed_lw: both alleles were called; the other two
    planes are 0 where it is.
    """

    nonzero_lw: Any
    negative_lw: Any
    observed_lw: Any


def words(n: int) -> int:
    """Number of 64-bit words that hold `n` bits."""
    return (int(n) + 63) // 64


def pack(alleles_ln: Any, *, implementation: Implementation | None = None) -> Any:
    """Pack alleles into bits.

    Args:
        alleles_ln: (L, N) uint8 or bool, 0 or 1.
        implementation: None chooses by where the input lies (NumPy: numba, CUDA tensor: triton).

    Returns:
        bits_lw: (L, ceil(N / 64)) uint64, or a torch int64 tensor of the same bits for tensor input.

    Raises:
        UsageError: wrong shape or type, or a value other than 0 and 1.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = _choose(alleles_ln, implementation)
    _check_shape(alleles_ln, "alleles_ln")
    if str(alleles_ln.dtype).removeprefix("torch.") not in ("uint8", "bool"):
        raise UsageError("alleles_ln of type uint8 or bool", str(alleles_ln.dtype), "bits.pack")
    bits_lw, is_clean = chosen.pack(alleles_ln)
    if not is_clean:
        raise UsageError(
            "alleles 0 and 1", f"value {int(alleles_ln.max())}", "bits.pack", "a separate plane for missing"
        )
    return bits_lw


def unpack(bits_lw: Any, n: int, *, implementation: Implementation | None = None) -> Any:
    """Inverse of `pack`: uint8 (L, n) of 0 and 1 from bits_lw (L, ceil(n / 64)).

    Raises:
        UsageError: the word count does not match `n`.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = _choose(bits_lw, implementation)
    return chosen.unpack(_check_bits(bits_lw, n, "bits.unpack"), int(n))


def transpose(bits_lw: Any, n: int, *, implementation: Implementation | None = None) -> Any:
    """Bit-matrix transpose: bits_lw (L, ceil(n / 64)) to bits_nw (n, ceil(L / 64)). Bits beyond `n` are ignored.

    Raises:
        UsageError: the word count does not match `n`.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = _choose(bits_lw, implementation)
    return chosen.transpose(_check_bits(bits_lw, n, "bits.transpose"), int(n))


def popcount_rows(bits_lw: Any, *, implementation: Implementation | None = None) -> Any:
    """Number of ones in each row: int64 (L,).

    Raises:
        UsageError: wrong shape or type.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = _choose(bits_lw, implementation)
    return chosen.popcount_rows(_check_bits(bits_lw, None, "bits.popcount_rows"))


def dosage_planes(
    bits_lw: Any, n: int, missing_lw: Any = None, *, implementation: Implementation | None = None
) -> DosagePlanes:
    """Dosages of diploid people, whose haplotypes are 2 s and 2 s + 1, as planes for products of dosages.

    Args:
        bits_lw: (L, ceil(n / 64)) of haplotypes; `n` even. Bits beyond `n` are ignored.
        missing_lw: the same shape, 1 = not called; None where nothing is missing. A person is observed where both are called.

    Raises:
        UsageError: the word count does not match `n`, `n` is odd, or the planes differ in shape.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = _choose(bits_lw, implementation)
    bits_lw = _check_bits(bits_lw, n, "bits.dosage_planes")
    if n % 2:
        raise UsageError("two haplotypes per person", f"{n} haplotypes", "bits.dosage_planes")
    if missing_lw is not None:
        if type(missing_lw) is not type(bits_lw) or missing_lw.shape != bits_lw.shape:
            got = f"{type(missing_lw).__name__} {getattr(missing_lw, 'shape', '')}"
            raise UsageError(f"missing_lw of shape {tuple(bits_lw.shape)}", got, "bits.dosage_planes")
        missing_lw = _check_bits(missing_lw, n, "bits.dosage_planes")
    return DosagePlanes(*chosen.dosage_planes(bits_lw, int(n) // 2, missing_lw))


def _choose(array: Any, implementation: Implementation | None) -> ModuleType:
    """The module that runs: the named one or the default for where `array` lies. A named one is never replaced."""
    is_numpy = isinstance(array, np.ndarray)
    if not is_numpy and not type(array).__module__.startswith("torch"):
        raise UsageError("a NumPy array or a torch tensor", type(array).__name__, "engine.kernels.bits")
    name = implementation or ("numba" if is_numpy else "triton")
    if name == "triton":
        if is_numpy:
            raise Unsupported("a torch tensor for triton", "a NumPy array", "engine.kernels.bits", "torch.from_numpy")
        from engine.kernels.bits import triton_gpu

        if array.device.type != "cuda" and not triton_gpu.INTERPRETED:
            raise Unsupported(
                "a CUDA tensor for triton", f"a {array.device} tensor", "engine.kernels.bits", ".numpy() for the CPU"
            )
        return triton_gpu
    if not is_numpy:
        raise Unsupported(f"a NumPy array for {name}", "a torch tensor", "engine.kernels.bits", ".cpu().numpy()")
    if name == "numba":
        from engine.kernels.bits import numba_cpu

        return numba_cpu
    if name == "reference":
        from engine.kernels.bits import reference

        return reference
    raise UsageError("implementation reference, numba or triton", repr(name), "engine.kernels.bits")


def _check_shape(array: Any, name: str) -> None:
    if array.ndim != 2:
        raise UsageError(f"{name} with two axes", f"shape {tuple(array.shape)}", "engine.kernels.bits")


def _check_bits(bits: Any, n: int | None, where: str) -> Any:
    """`bits` with its type checked; torch uint64 is viewed as int64, because few torch operations know uint64."""
    _check_shape(bits, "bits")
    kind = str(bits.dtype).removeprefix("torch.")
    if isinstance(bits, np.ndarray):
        if kind != "uint64":
            raise UsageError("bits of type uint64", kind, where)
    elif kind == "uint64":
        import torch

        bits = bits.view(torch.int64)
    elif kind != "int64":
        raise UsageError("bits of type int64 or uint64", kind, where)
    if n is not None and (n < 0 or bits.shape[1] != words(n)):
        raise UsageError(f"{words(n)} words for {n} haplotypes", f"{bits.shape[1]} words", where)
    return bits
