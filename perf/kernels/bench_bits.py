"""Packing, unpacking, transposing and planes of dosages, beside NumPy's own packbits and unpackbits.

None of these is a hot path of its own: they are here so that a reader or a generator that got slow is seen to be slow
elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.kernels import bits
from perf.case import Case, Peer

SITES, HAPLOTYPES = 20_000, 5_008


def _alleles(sites: int, n: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 2, (sites, n), dtype=np.uint8)


def _packed(sites: int, n: int) -> np.ndarray:
    return bits.pack(_alleles(sites, n))


def _equal(ours: Any, theirs: Any) -> None:
    np.testing.assert_array_equal(ours, theirs)


def _octets(bits_lw: np.ndarray) -> np.ndarray:
    return bits_lw.view(np.uint8)


def _case(name: str, run: Any, prepare: Any, floor_bytes: float, *peers: Peer, sites: int = SITES) -> Case:
    size = {"sites": sites, "haplotypes": HAPLOTYPES}
    work = float(sites * HAPLOTYPES)
    return Case(f"bits.{name}", size, work, "alleles", prepare, run, peers, floor_bytes, floor_bytes, "copy")


def cases() -> list[Case]:
    alleles, packed = float(SITES * HAPLOTYPES), SITES * HAPLOTYPES / 8
    numpy_pack = Peer(
        "numpy.packbits",
        lambda alleles_ln: np.packbits(alleles_ln, axis=1, bitorder="little"),
        same=lambda ours, theirs: _equal(_octets(ours)[:, : theirs.shape[1]], theirs),
    )
    numpy_unpack = Peer(
        "numpy.unpackbits",
        lambda octets: np.unpackbits(octets, axis=1, bitorder="little", count=HAPLOTYPES),
        prepare=_octets,
        same=_equal,
    )
    numpy_turn = Peer(
        "numpy.unpackbits, transpose, packbits",
        lambda octets: np.packbits(
            np.unpackbits(octets, axis=1, bitorder="little", count=HAPLOTYPES).T, axis=1, bitorder="little"
        ),
        prepare=_octets,
        same=lambda ours, theirs: _equal(_octets(ours)[:, : theirs.shape[1]], theirs),
    )
    return [
        _case("pack", bits.pack, lambda: _alleles(SITES, HAPLOTYPES), alleles + packed, numpy_pack),
        _case(
            "unpack",
            lambda b: bits.unpack(b, HAPLOTYPES),
            lambda: _packed(SITES, HAPLOTYPES),
            alleles + packed,
            numpy_unpack,
        ),
        _case(
            "transpose",
            lambda b: bits.transpose(b, HAPLOTYPES),
            lambda: _packed(SITES, HAPLOTYPES),
            2 * packed,
            numpy_turn,
        ),
        _case(
            "dosage_planes",
            lambda b: bits.dosage_planes(b, HAPLOTYPES),
            lambda: _packed(SITES, HAPLOTYPES),
            2.5 * packed,
        ),
    ]


def curves() -> dict[str, list[Case]]:
    """Transposition against the number of sites: linear."""
    return {
        "sites": [
            _case(
                "transpose",
                lambda b: bits.transpose(b, HAPLOTYPES),
                lambda sites=sites: _packed(sites, HAPLOTYPES),
                sites * HAPLOTYPES / 4,
                sites=sites,
            )
            for sites in (2_500, 5_000, 10_000, 20_000)
        ]
    }
