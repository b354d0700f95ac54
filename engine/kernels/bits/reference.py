"""The definition, in NumPy."""

from __future__ import annotations

import numpy as np


def pack(alleles_ln: np.ndarray) -> tuple[np.ndarray, bool]:
    """uint8 or bool (L, N) of 0 and 1 -> uint64 (L, ceil(N / 64)), and whether there was nothing but 0 and 1."""
    sites, n = alleles_ln.shape
    bytes_l = np.zeros((sites, (n + 63) // 64 * 8), dtype=np.uint8)
    bytes_l[:, : (n + 7) // 8] = np.packbits(alleles_ln, axis=1, bitorder="little")
    return bytes_l.view("<u8").astype(np.uint64, copy=False), bool((alleles_ln <= 1).all())


def unpack(bits_lw: np.ndarray, n: int) -> np.ndarray:
    """uint64 (L, W) -> uint8 (L, n)."""
    bytes_l = np.ascontiguousarray(bits_lw.astype("<u8", copy=False)).view(np.uint8)
    return np.unpackbits(bytes_l, axis=1, count=n, bitorder="little")


def transpose(bits_lw: np.ndarray, n: int) -> np.ndarray:
    """uint64 (L, W) -> uint64 (n, ceil(L / 64))."""
    return pack(np.ascontiguousarray(unpack(bits_lw, n).T))[0]


def popcount_rows(bits_lw: np.ndarray) -> np.ndarray:
    """int64 (L,) number of ones in each row."""
    return np.bitwise_count(bits_lw).sum(axis=1, dtype=np.int64)


def dosage_planes(bits_lw: np.ndarray, samples: int, missing_lw: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """As the door's `dosage_planes`."""
    alleles_ln = unpack(bits_lw, 2 * samples)
    missing_ln = np.zeros_like(alleles_ln) if missing_lw is None else unpack(missing_lw, 2 * samples)
    dosage_ls = alleles_ln[:, 0::2] + alleles_ln[:, 1::2]
    observed_ls = (missing_ln[:, 0::2] | missing_ln[:, 1::2]) == 0
    return tuple(
        pack(plane_ls)[0] for plane_ls in ((dosage_ls != 1) & observed_ls, (dosage_ls == 0) & observed_ls, observed_ls)
    )
