"""Pruning on the CPU: which pairs are linked is found out as the windows come, by tiles, for the sites that still live.

Where the processor has AVX2 but no popcount of vectors, and nothing is missing, numba_prune_lookups.py does it instead.

A window of a thousand sites may have but fifty that live. They stand side by side in `slots`, so that a tile of a new block of
32 sites against them wastes little; a place that becomes free is taken by the next survivor. What a window then does with the
bits is greedy.py's.
"""

from __future__ import annotations

import numba
import numpy as np

from engine.kernels.bits.lookups import AVAILABLE
from engine.kernels.bits.tiles import BLOCK, WIDE
from engine.kernels.ld import greedy, numba_prune_lookups
from engine.kernels.ld.checks import EPSILON, PruneRules, Sites
from engine.kernels.ld.numba_matrix import major_frequency, prepare
from engine.kernels.ld.numba_tiles import COUNTED, PHASED_MISSING, Planes, blocks_of, judge, misses, tile_sums


def prune(first: Sites, rules: PruneRules) -> np.ndarray:
    """bool (L,): kept."""
    length = len(first.bits_lw)
    if not len(rules.starts):
        return np.ones(length, dtype=bool)
    if AVAILABLE and not WIDE and not misses(first):
        return numba_prune_lookups.prune(first, rules)
    planes = prepare(first)
    major_l, varies_l = major_frequency(planes)
    alive = greedy.bits_of(varies_l & rules.loaded_l)
    span = int((rules.ends - rules.starts).max())
    _prune(blocks_of(planes), rules.most * (1 + EPSILON), rules.order == "backward", span,
           alive, major_l, rules.starts, rules.ends)  # fmt: skip
    return greedy.flags_of(alive, length) | ~rules.loaded_l


@numba.njit(cache=True, nogil=True)
def _prune(
    a: Planes,
    most: float,
    backward: bool,
    span: int,
    alive: np.ndarray,
    major_l: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
) -> None:
    ring = span + 2 * BLOCK
    words = ring // BLOCK + 2
    rows = np.zeros((ring, words), dtype=np.uint32)
    unchecked, held = np.zeros(len(major_l), dtype=np.int64), np.empty(len(major_l), dtype=np.int64)
    places = ring // BLOCK + 1
    shape = (places, a.p0.shape[1], BLOCK)
    p0 = np.zeros(shape, dtype=np.uint64)
    p1 = np.zeros(shape if a.kind & 1 else (0, 0, 0), dtype=np.uint64)
    p2 = np.zeros(shape if a.kind == 3 else (0, 0, 0), dtype=np.uint64)
    p3 = np.zeros(shape if a.kind >= PHASED_MISSING else (0, 0, 0), dtype=np.uint64)
    slots = Planes(a.kind, a.n, p0, p1, p2, p3, np.zeros(places * BLOCK), np.zeros(places * BLOCK), COUNTED)
    tenant = np.full(places * BLOCK, -1, dtype=np.int64)  # the site that stands in each place of `slots`
    counts, linked = np.empty(6 * BLOCK * BLOCK, dtype=np.int32), np.empty(BLOCK, dtype=np.uint32)
    judged, settled, used, carried = (
        0,
        0,
        0,
        0,
    )  # blocks; sites that stand in slots or are gone; places in use; end before
    for k in range(len(starts)):
        start, end = starts[k], ends[k]
        if judged * BLOCK < end:
            used = _vacate(tenant, used, alive, start)
            upto = min(
                judged * BLOCK, (carried + BLOCK - 1) // BLOCK * BLOCK
            )  # survivors, and what shares their last block
            used = _settle(a, slots, tenant, used, alive, max(settled, start), upto)
            settled = max(settled, upto, start // BLOCK * BLOCK)
        while judged * BLOCK < end:
            if backward:
                for j in range(judged * BLOCK, judged * BLOCK + BLOCK):
                    rows[j % ring, :] = 0
            for i in range((used + BLOCK - 1) // BLOCK):
                tile_sums(slots, i, a, judged, counts)
                judge(slots, i, a, judged, most, counts, linked)
                for r in range(BLOCK):
                    if tenant[i * BLOCK + r] >= 0:
                        _note(rows, backward, tenant[i * BLOCK + r], judged, linked[r])
            for i in range(settled // BLOCK, judged + 1):
                tile_sums(a, i, a, judged, counts)
                judge(a, i, a, judged, most, counts, linked)
                for r in range(BLOCK):
                    if i == judged:  # of a pair within the block the later site is the column
                        linked[r] &= ~((np.uint32(2) << np.uint32(r)) - np.uint32(1))
                    _note(rows, backward, i * BLOCK + r, judged, linked[r])
            judged += 1
        if backward:
            greedy.backward_window(rows, alive, major_l, start, end, carried, held)
        else:
            greedy.forward_window(rows, alive, major_l, unchecked, start, end)
        carried = end


@numba.njit(cache=True, nogil=True)
def _vacate(tenant: np.ndarray, used: int, alive: np.ndarray, start: int) -> int:
    """Free the places of sites that are gone or left the window; how many places there are to look at."""
    last = 0
    for place in range(used):
        site = tenant[place]
        if site >= 0:
            if site < start or not (alive[site >> 5] >> np.uint32(site & 31)) & np.uint32(1):
                tenant[place] = -1
            else:
                last = place + 1
    return last


@numba.njit(cache=True, nogil=True)
def _settle(a: Planes, slots: Planes, tenant: np.ndarray, used: int, alive: np.ndarray, begin: int, end: int) -> int:
    """Put the living sites of [begin, end) into places of `slots`, the lowest first."""
    place = 0
    site = greedy.next_site(alive, begin, end)
    while site < end:
        while tenant[place] >= 0:
            place += 1
        tenant[place] = site
        used = max(used, place + 1)
        block, r, to, c = site >> 5, site & 31, place >> 5, place & 31
        for w in range(a.p0.shape[1]):
            slots.p0[to, w, c] = a.p0[block, w, r]
            if a.kind & 1:
                slots.p1[to, w, c] = a.p1[block, w, r]
            if a.kind == 3:
                slots.p2[to, w, c] = a.p2[block, w, r]
            if a.kind >= PHASED_MISSING:
                slots.p3[to, w, c] = a.p3[block, w, r]
        slots.sum_l[place], slots.variance_l[place] = a.sum_l[site], a.variance_l[site]
        site = greedy.next_site(alive, site + 1, end)
    return used


@numba.njit(cache=True, nogil=True)
def _note(rows: np.ndarray, backward: bool, i: int, block: int, linked: int) -> None:
    """Site i is linked to those sites of a later block, or of its own, that have a bit."""
    ring, words = rows.shape
    if not backward:
        rows[i % ring, block % words] = linked
        return
    for c in range(BLOCK):
        if (linked >> np.uint32(c)) & np.uint32(1):
            rows[(block * BLOCK + c) % ring, (i >> 5) % words] |= np.uint32(1) << np.uint32(i & 31)
