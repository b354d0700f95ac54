"""Who copies whom from where on, of many haplotypes: small beside their alleles, and drawn before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.files.genotypes import haplotype_index


@dataclass(frozen=True)
class Paths:
    """Copying paths of N haplotypes, in the form `haplotype_hmm.materialise` takes: segments and inverted alleles."""

    segment_offset_n: np.ndarray
    segment_start_s: np.ndarray
    segment_donor_s: np.ndarray
    flip_offset_n: np.ndarray
    flip_site_f: np.ndarray

    def take(self, index: np.ndarray) -> Paths:
        """The paths of haplotypes `index`, int64, in this order."""
        segments, segment_offset_n = haplotype_index(self.segment_offset_n, index)
        flips, flip_offset_n = haplotype_index(self.flip_offset_n, index)
        return Paths(
            segment_offset_n, self.segment_start_s[segments], self.segment_donor_s[segments], flip_offset_n,
            self.flip_site_f[flips],
        )  # fmt: skip


def joined_paths(parts: Sequence[Paths]) -> Paths:
    """The haplotypes of several tables of paths, in order."""
    column = lambda name: np.concatenate([getattr(part, name) for part in parts])  # noqa: E731
    counted = lambda name: np.concatenate([[0], *(np.diff(getattr(part, name)) for part in parts)])  # noqa: E731
    return Paths(
        np.cumsum(counted("segment_offset_n")), column("segment_start_s"), column("segment_donor_s"),
        np.cumsum(counted("flip_offset_n")), column("flip_site_f"),
    )  # fmt: skip


def of_lists(start_n: Sequence[np.ndarray], donor_n: Sequence[np.ndarray], flip_n: Sequence[np.ndarray]) -> Paths:
    """Of each haplotype where its segments begin, whom they copy, and the sites at which the allele is inverted."""
    return Paths(_offsets(start_n), joined(start_n), joined(donor_n).astype(np.int32), _offsets(flip_n), joined(flip_n))


def _offsets(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)]).astype(np.int64)


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """int64, one after another; of none too."""
    return np.concatenate([*parts, np.zeros(0, dtype=np.int64)]).astype(np.int64)
