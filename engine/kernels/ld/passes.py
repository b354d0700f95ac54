"""Clumps and haplotype blocks: passes on the host that ask an implementation for the pairs they need, a few thousand at a time.
And the triangle of one that makes rectangles.

`source` is the implementation's module, with `prepare(sites)`, `pair_values(prepared, i, j, measure)`,
`pair_tables(prepared, i, j)` and `major_frequency(prepared)`; all but the first give arrays in host memory.
reference_greedy.py has the definitions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np

from engine.kernels.ld import likelihood
from engine.kernels.ld.checks import EPSILON, BlockRules, ClumpRules, Sites

_PAIRS_AT_ONCE = 1 << 18


def triangle(first: Sites, measure: str, rows: int, source: Any) -> Iterator[Any]:
    """The lower triangle, `rows` rows at a time, from the rectangles of `source.matrix`."""

    def cut(start: int, stop: int) -> Sites:
        missing_lw = None if first.missing_lw is None else first.missing_lw[start:stop]
        return first._replace(bits_lw=first.bits_lw[start:stop], missing_lw=missing_lw)

    for start in range(0, len(first.bits_lw), rows):
        stop = min(start + rows, len(first.bits_lw))
        below = source.matrix(cut(start, stop), cut(0, stop), measure, None)
        parts = [below[k, : start + k + 1] for k in range(stop - start)]
        if isinstance(below, np.ndarray):
            yield np.concatenate(parts)
        else:
            import torch

            yield torch.cat(parts)


def clump(first: Sites, rules: ClumpRules, source: Any) -> np.ndarray:
    """int64 (L,): index site of the clump of each site, -1 where it is in none."""
    prepared = source.prepare(first)
    clump_l = np.full(len(first.bits_lw), -1, dtype=np.int64)
    for index in rules.candidates.tolist():
        if clump_l[index] >= 0:
            continue
        clump_l[index] = index
        start, end = int(rules.start_l[index]), int(rules.end_l[index])
        j = start + np.flatnonzero(rules.joins_l[start:end] & (clump_l[start:end] < 0))
        if not len(j):
            continue
        i = np.full(len(j), index, dtype=np.int64)
        if rules.likelihood:
            r2 = np.empty(len(j))
            likelihood.likely_r2_of(source.pair_tables(prepared, i, j), r2)
        else:
            r2 = source.pair_values(prepared, i, j, "r2")
        clump_l[j[r2 > rules.least]] = index
    return clump_l


def blocks(first: Sites, rules: BlockRules, source: Any) -> np.ndarray:
    """int64 (L,): number of the haplotype block of each site, -1 where it is in none."""
    prepared = source.prepare(first)
    common = np.flatnonzero(1 - source.major_frequency(prepared)[0] >= rules.min_maf * (1 - EPSILON))
    position_bp, count = rules.position_bp[common], len(common)
    earliest = np.searchsorted(
        position_bp, position_bp - rules.max_bp
    )  # first site of the longest block that ends in m
    totals = np.zeros((3, count), dtype=np.int64)  # strong, recombining, informative pairs of the stretch from i to m
    found = []
    m = 0
    while m < count:
        pairs_to = np.cumsum(np.arange(m, count) - earliest[m:])
        stop = m + max(1, int(np.searchsorted(pairs_to, _PAIRS_AT_ONCE)))
        later = np.repeat(np.arange(m, stop), np.arange(m, stop) - earliest[m:stop])
        sizes = np.arange(m, stop) - earliest[m:stop]
        offset = np.concatenate([[0], np.cumsum(sizes)])
        earlier = np.arange(len(later)) - offset[later - m] + earliest[later]
        kinds = np.empty(len(later), dtype=np.uint8)
        likelihood.kinds_of(source.pair_tables(prepared, common[earlier], common[later]), kinds)
        found.append(
            _stretches(
                kinds, offset, m, earliest, position_bp, totals, rules.share, rules.max_bp_of_two, rules.max_bp_of_three
            )
        )
        m = stop
    i, m_of = (np.concatenate([part[k] for part in found] or [np.empty(0, np.int64)]) for k in (0, 1))
    order = np.lexsort((-m_of, -i, position_bp[i] - position_bp[m_of]))  # longest first; of equals the last
    taken, block_l = np.zeros(count, dtype=bool), np.full(len(first.bits_lw), -1, dtype=np.int64)
    for i_k, m_k in zip(i[order].tolist(), m_of[order].tolist()):
        if not (taken[i_k] or taken[m_k]):
            taken[i_k : m_k + 1] = True
            block_l[common[i_k : m_k + 1]] = common[i_k]
    inside = block_l >= 0
    block_l[inside] = np.unique(block_l[inside], return_inverse=True)[1]
    return block_l


@numba.njit(cache=True, nogil=True)
def _stretches(
    kinds: np.ndarray,
    offset: np.ndarray,
    start: int,
    earliest: np.ndarray,
    position_bp: np.ndarray,
    totals: np.ndarray,
    share: float,
    max_bp_of_two: int,
    max_bp_of_three: int,
) -> tuple[np.ndarray, np.ndarray]:
    """First and last site of every stretch that may be a block and ends in this batch of sites."""
    firsts, lasts, found = np.empty(64, dtype=np.int64), np.empty(64, dtype=np.int64), 0
    for m in range(start, start + len(offset) - 1):
        strong, recombining, informative = 0, 0, 0  # pairs of m with the sites from i on
        for i in range(m - 1, earliest[m] - 1, -1):
            kind = kinds[offset[m - start] + i - earliest[m]]
            strong += kind >= 5
            recombining += kind == 0
            informative += kind >= 3
            totals[0, i] += strong
            totals[1, i] += recombining
            totals[2, i] += informative
            size, span = m - i + 1, position_bp[m] - position_bp[i]
            if size == 2:
                good = kind == 6 and span <= max_bp_of_two
            elif size == 3:
                good = kind >= 4 and span <= max_bp_of_three and totals[2, i] >= 1 + int(3 * share)
            elif size == 4:
                good = kind >= 4 and totals[2, i] - 1 >= int(6 * share)
            else:
                judged = totals[0, i] + totals[1, i]
                good = kind >= 4 and judged >= 6 and judged * share < totals[0, i]
            if good:
                if found == len(firsts):
                    firsts, lasts = np.concatenate((firsts, firsts)), np.concatenate((lasts, lasts))
                firsts[found], lasts[found] = i, m
                found += 1
    return firsts[:found].copy(), lasts[:found].copy()
