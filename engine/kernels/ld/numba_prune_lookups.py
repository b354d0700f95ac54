"""Pruning on the CPU by lookups (bits/lookups.py): each site as a sparse row against many later sites.

The sites of a block stand in columns. A row is what one site has with all of them that come later, made when the greedy rule
first asks for it. A site whose commoner allele is ALT is listed by its REF alleles: the covariance changes its sign, nothing
else. Columns of sites that are gone, or whose turn is over, are squeezed out where that saves a vector.

A block ends where a window ends: it holds the new sites of one window, or of several where they bring few. In the forward
order rows are asked for as in reference_greedy.py. In the backward order the specification takes each new site j from the last
and looks at earlier ones i, nearest first; here each i is taken, nearest first, and looks at those j, from the last, whose
turn is on. It is the same: a pair (i, j) depends on whether the turn of j is on, which pairs (i', j) with i' > i decide, and on
whether i is alive, which former windows and pairs (i, j') with j' > j decide, and these come before it either way.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from engine.kernels.bits import lookups
from engine.kernels.bits.lookups import LANES, VECTOR
from engine.kernels.bits.tiles import ctpop, trailing_zeros
from engine.kernels.ld import greedy
from engine.kernels.ld.checks import EPSILON, PruneRules, Sites

_SITE, _LENGTH, _SUM, _BLOCK = range(4)


class Work(NamedTuple):
    """bits_lw: uint64 (L, W). n: haplotypes; people: as many, or half as many where dosages count. sum_l, variance_l: float64
    (L,), of alleles or dosages: sum, and n times the sum of squares less the square of the sum. major_l: float64 (L,).
    most: r2 above it links. alive: words of 32 sites.

    Rows, at site % ring: entries, uint32 (ring, 16 W + 4), the site's list; facts, int64 (ring, 4), the site, the length of its
    list, the sum of what is listed, the block that `linked` is of; linked, uint32 (ring, words), a bit for each site of that
    block. Columns: member, int64, the site of each; moments, float64 (2, columns), its sum and variance; columns, uint8
    (groups, 16 W, 128). turn: uint32 (words,), sites of the block that may still be asked about. counts: int32 (128,), scratch.
    """

    bits_lw: np.ndarray
    n: int
    people: int
    sum_l: np.ndarray
    variance_l: np.ndarray
    major_l: np.ndarray
    most: float
    alive: np.ndarray
    entries: np.ndarray
    facts: np.ndarray
    linked: np.ndarray
    member: np.ndarray
    moments: np.ndarray
    columns: np.ndarray
    turn: np.ndarray
    counts: np.ndarray


def prune(first: Sites, rules: PruneRules) -> np.ndarray:
    """bool (L,): kept, of sites where nothing is missing. AVX2 is needed (`lookups.AVAILABLE`)."""
    length, words = first.bits_lw.shape
    if not len(rules.starts):
        return np.ones(length, dtype=bool)
    people = first.n // 2 if first.unphased else first.n
    sum_l, variance_l, major_l = np.empty(length), np.empty(length), np.empty(length)
    _moments(first.bits_lw, first.n, people, sum_l, variance_l, major_l)
    new = np.diff(rules.ends, prepend=0)
    ring, groups = int((rules.ends - rules.starts).max()) + LANES, -(-max(int(new.max()), LANES) // LANES)
    work = Work(
        first.bits_lw, first.n, people, sum_l, variance_l, major_l, rules.most * (1 + EPSILON),
        alive=greedy.bits_of((variance_l > 0) & rules.loaded_l),
        entries=np.empty((ring, 16 * words + lookups.SPARE), dtype=np.uint32),
        facts=np.full((ring, 4), -1, dtype=np.int64),
        linked=np.zeros((ring, groups * LANES // 32), dtype=np.uint32),
        member=np.zeros(groups * LANES, dtype=np.int64),
        moments=np.zeros((2, groups * LANES)),
        columns=lookups.new_columns(groups, words),
        turn=np.zeros(groups * LANES // 32, dtype=np.uint32),
        counts=np.zeros(LANES, dtype=np.int32),
    )  # fmt: skip
    _prune(work, rules.order == "backward", rules.starts, rules.ends)
    return greedy.flags_of(work.alive, length) | ~rules.loaded_l


@numba.njit(cache=True, nogil=True)
def _moments(
    bits_lw: np.ndarray, n: int, people: int, sum_l: np.ndarray, variance_l: np.ndarray, major_l: np.ndarray
) -> None:
    length, words = bits_lw.shape
    whole, even = ~np.uint64(0), np.uint64(0x5555555555555555) if people < n else np.uint64(0)
    for site in range(length):
        ones, both = np.uint64(0), np.uint64(0)
        for w in range(words):
            x = bits_lw[site, w] & (whole >> np.uint64((64 * words - n) & 63) if w == words - 1 else whole)
            ones += ctpop(x)  # type: ignore[call-arg]
            both += ctpop(x & (x >> np.uint64(1)) & even)  # type: ignore[call-arg]
        total, squares = np.float64(ones), np.float64(ones + np.uint64(2) * both)
        share = total / max(n, 1)
        sum_l[site], variance_l[site], major_l[site] = total, people * squares - total * total, max(share, 1 - share)


@numba.njit(cache=True, nogil=True)
def _prune(work: Work, backward: bool, starts: np.ndarray, ends: np.ndarray) -> None:
    block, begin, stop, members, carried = -1, 0, 0, 0, 0
    for k in range(len(starts)):
        start, end = starts[k], ends[k]
        if end > stop:
            block, begin, stop = block + 1, stop, end
            for later in ends[k + 1 :]:
                if later - begin > LANES:
                    break
                stop = later
            work.turn[:] = 0
            site = greedy.next_site(work.alive, begin, stop)
            while site < stop:
                work.turn[(site - begin) >> 5] |= np.uint32(1) << np.uint32((site - begin) & 31)
                site = greedy.next_site(work.alive, site + 1, stop)
            members = _stand(work, begin)
        if backward:
            members = _backward(work, block, begin, members, start, carried, end)
        else:
            members = _forward(work, block, begin, members, start, carried, end)
        carried = end


@numba.njit(cache=True, nogil=True)
def _stand(work: Work, begin: int) -> int:
    """Put the block's sites whose turn may come into columns; how many they are. `begin`: the block's first site."""
    count = 0
    for w in range(len(work.turn)):
        word = np.uint64(work.turn[w])
        while word:
            site = begin + (w << 5) + np.int64(trailing_zeros(word))  # type: ignore[call-arg]
            work.member[count], work.moments[0, count], work.moments[1, count] = (
                site,
                work.sum_l[site],
                work.variance_l[site],
            )
            count += 1
            word &= word - np.uint64(1)
    for group in range((count + LANES - 1) // LANES):
        lookups.fill_columns(
            work.bits_lw, work.member[group * LANES : min(count, (group + 1) * LANES)], work.columns[group]
        )
    return count


@numba.njit(cache=True, nogil=True)
def _backward(work: Work, block: int, begin: int, members: int, start: int, carried: int, end: int) -> int:
    """One window; how many columns the block has after it."""
    alive, turn, major_l, linked, facts = work.alive, work.turn, work.major_l, work.linked, work.facts
    on, left = _ones(turn, 0, 32 * len(turn)), _ones(turn, carried - begin, end - begin)
    i = end
    while i > start and left:
        w = (i - 1) >> 5
        bit = greedy.last_one(alive[w], i - (w << 5))
        i = (w << 5) + max(bit, 0)
        if bit < 0 or i < start:
            continue
        at = i % len(facts)
        if facts[at, _SITE] != i:
            _list(work, i, at)
        if facts[at, _BLOCK] != block:
            facts[at, _BLOCK] = block
            _link(
                i, at, begin, members, work.n, work.people, work.most, work.variance_l, work.entries, facts, linked,
                work.member, work.moments, work.columns, work.counts,
            )  # fmt: skip
        was = on
        for word in range((end - begin - 1) >> 5, ((carried - begin) >> 5) - 1, -1):
            hits = np.uint64(turn[word] & linked[at, word]) & _within(word, carried - begin, end - begin)
            while hits:
                bit = greedy.last_one(hits, 32)  # type: ignore[arg-type]
                j = begin + (word << 5) + bit
                if major_l[i] > major_l[j] * (1 + EPSILON):
                    greedy.kill(alive, i)
                    break
                greedy.kill(alive, j)
                greedy.kill(turn, j - begin)
                on, left = on - 1, left - 1
                hits &= ~(np.uint64(1) << np.uint64(bit))
            if hits:
                break
        if on < was and _vectors(on) < _vectors(members):
            members = _stand(work, begin)
    for j in range(carried, end):  # their turns are over
        greedy.kill(turn, j - begin)
    return members


@numba.njit(cache=True, nogil=True)
def _forward(work: Work, block: int, begin: int, members: int, start: int, carried: int, end: int) -> int:
    """One window; how many columns the block has after it. Pairs of sites before `carried` were settled by former windows."""
    alive, turn, major_l, linked, facts = work.alive, work.turn, work.major_l, work.linked, work.facts
    on, gone = _ones(turn, 0, 32 * len(turn)), True
    while gone:
        gone = False
        i = greedy.next_site(alive, start, end)
        while i < end:
            at = i % len(facts)
            if facts[at, _SITE] != i:
                _list(work, i, at)
            if facts[at, _BLOCK] != block:
                facts[at, _BLOCK] = block
                _link(
                    i, at, begin, members, work.n, work.people, work.most, work.variance_l, work.entries, facts, linked,
                    work.member, work.moments, work.columns, work.counts,
                )  # fmt: skip
            for word in range((max(carried, i + 1) - begin) >> 5, (end - begin + 31) >> 5):
                hits = np.uint64(turn[word] & linked[at, word]) & _within(word, carried - begin, end - begin)
                if hits:
                    j = begin + (word << 5) + np.int64(trailing_zeros(hits))  # type: ignore[call-arg]
                    lost = i if major_l[i] > major_l[j] * (1 + EPSILON) else j
                    greedy.kill(alive, lost)
                    gone = True
                    if lost >= begin:
                        greedy.kill(turn, lost - begin)
                        on -= 1
                        if _vectors(on) < _vectors(members):
                            members = _stand(work, begin)
                    break
            i = greedy.next_site(alive, i + 1, end)
    return members


@numba.njit(cache=True, nogil=True)
def _list(work: Work, site: int, at: int) -> None:
    """Make the list of a site, of its rarer allele."""
    facts, ones = work.facts, np.int64(work.sum_l[site])
    inverse = bool(2 * ones > work.n)
    facts[at, _SITE], facts[at, _SUM], facts[at, _BLOCK] = site, work.n - ones if inverse else ones, -1
    facts[at, _LENGTH] = lookups.list_nibbles(work.bits_lw, site, work.n, inverse, work.entries, at)


# Arrays one by one: a tuple of them costs as many counts of references at each call as it has arrays, 0.3 us a row in all.
@numba.njit(cache=True, nogil=True)
def _link(
    i: int,
    at: int,
    begin: int,
    members: int,
    n: int,
    people: int,
    most: float,
    variance_l: np.ndarray,
    entries: np.ndarray,
    facts: np.ndarray,
    linked: np.ndarray,
    member: np.ndarray,
    moments: np.ndarray,
    columns: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Make the row of site i: its bits with the later ones of `members` columns."""
    for w in range(linked.shape[1]):
        linked[at, w] = 0
    scale, sx, bound, table = np.float64(people), np.float64(facts[at, _SUM]), most * variance_l[i], int(people < n)
    for group in range((members + LANES - 1) // LANES):
        first, end = group * LANES, min(members, (group + 1) * LANES)
        while first < end and member[min(first + VECTOR, end) - 1] <= i:
            first += VECTOR
        vectors = _vectors(end - first)
        if vectors:
            lookups.sums(entries, at, facts[at, _LENGTH], columns, group, first - group * LANES, vectors, table, counts)
        for v in range(vectors):
            c0 = first + v * VECTOR
            products = counts[v * VECTOR : (v + 1) * VECTOR]
            sums, variances, word = moments[0, c0 : c0 + VECTOR], moments[1, c0 : c0 + VECTOR], np.uint32(0)
            for c in range(VECTOR):
                x = scale * np.float64(products[c]) - sx * sums[c]
                word |= np.uint32(x * x > bound * variances[c]) << np.uint32(c)
            while word:
                c = c0 + np.int64(trailing_zeros(np.uint64(word)))  # type: ignore
                word &= word - np.uint32(1)
                if c < end and member[c] > i:
                    bit = member[c] - begin
                    linked[at, bit >> 5] |= np.uint32(1) << np.uint32(bit & 31)


@numba.njit(cache=True, nogil=True)
def _vectors(columns: int) -> int:
    return (columns + VECTOR - 1) // VECTOR


@numba.njit(cache=True, nogil=True)
def _within(word: int, first: int, end: int) -> int:
    """Bits of a word of 32 that are bits [first, end) of the whole."""
    low, high = max(first - (word << 5), 0), min(end - (word << 5), 32)
    if high <= low:
        return np.uint64(0)  # type: ignore[return-value]
    return (np.uint64(1) << np.uint64(high)) - (np.uint64(1) << np.uint64(low))  # type: ignore[return-value]


@numba.njit(cache=True, nogil=True)
def _ones(words: np.ndarray, first: int, end: int) -> int:
    """How many of bits [first, end) are set."""
    count = 0
    for w in range(first >> 5, (end + 31) >> 5):
        count += np.int64(ctpop(np.uint64(words[w]) & _within(w, first, end)))  # type: ignore
    return count
