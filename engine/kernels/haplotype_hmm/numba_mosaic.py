"""Mosaics built on the CPU: alleles of haplotypes given as runs of donors, by blocks of 64 sites."""

# mypy: disable-error-code="no-untyped-def"
# Functions compiled by Numba carry no annotations: their types are those of their arguments.

from __future__ import annotations

import numpy as np
from numba import njit

from engine.kernels.haplotype_hmm.condense import transpose64
from engine.kernels.haplotype_hmm.threads import in_threads


@njit(cache=True, nogil=True)
def _last_at_or_before(values, low, high, wanted):
    """Largest i in [low, high) with values[i] <= wanted; low - 1 where there is none."""
    while low < high:
        middle = (low + high) // 2
        if values[middle] <= wanted:
            low = middle + 1
        else:
            high = middle
    return low - 1


@njit(cache=True, nogil=True)
def _materialise(
    first_block,
    stop_block,
    reference_lw,
    segment_offset_n,
    start_s,
    donor_s,
    flip_offset_n,
    flip_f,
    first_site,
    made_lw,
):
    """Blocks of 64 sites: turn the reference so that a donor's 64 alleles are one word, take words, turn back."""
    sites, words = reference_lw.shape
    n_haplotypes = len(segment_offset_n) - 1
    one = np.uint64(1)
    for block in range(first_block, stop_block):
        begin = 64 * block
        height = min(64, sites - begin)
        donors = np.empty(64 * words, np.uint64)
        tile = np.empty(64, np.uint64)
        for word in range(words):
            for i in range(64):
                tile[i] = reference_lw[begin + i, word] if i < height else np.uint64(0)
            transpose64(tile)
            donors[64 * word : 64 * word + 64] = tile
        site0 = first_site + begin
        for out_word in range(made_lw.shape[1]):
            for i in range(64):
                n = 64 * out_word + i
                value = np.uint64(0)
                if n < n_haplotypes:
                    stop = segment_offset_n[n + 1]
                    segment = _last_at_or_before(start_s, segment_offset_n[n], stop, site0)
                    value = donors[donor_s[segment]]
                    segment += 1
                    while segment < stop and start_s[segment] < site0 + height:
                        low = (one << np.uint64(start_s[segment] - site0)) - one  # sites before the segment stay
                        value = (value & low) | (donors[donor_s[segment]] & ~low)
                        segment += 1
                    flip = _last_at_or_before(flip_f, flip_offset_n[n], flip_offset_n[n + 1], site0 - 1) + 1
                    while flip < flip_offset_n[n + 1] and flip_f[flip] < site0 + height:
                        value ^= one << np.uint64(flip_f[flip] - site0)
                        flip += 1
                tile[i] = value
            transpose64(tile)
            for i in range(height):
                made_lw[begin + i, out_word] = tile[i]


def materialise(
    reference_lw: np.ndarray,
    k: int,
    segment_offset_n: np.ndarray,
    segment_start_s: np.ndarray,
    segment_donor_s: np.ndarray,
    flip_offset_n: np.ndarray,
    flip_site_f: np.ndarray,
    *,
    first_site: int = 0,
) -> np.ndarray:
    """As the door's `materialise`."""
    made_lw = np.empty((len(reference_lw), (len(segment_offset_n) - 1 + 63) // 64), np.uint64)
    in_threads(
        _materialise,
        (len(reference_lw) + 63) // 64,
        reference_lw,
        segment_offset_n,
        segment_start_s,
        segment_donor_s,
        flip_offset_n,
        flip_site_f,
        first_site,
        made_lw,
    )
    return made_lw
