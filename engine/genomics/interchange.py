"""Who copies whom, for all haplotypes of a group at once: at every site each donor is held by exactly one slot.

The compiled half of `genealogy`: arrays in, arrays out. It walks along the sites once. At the start of a contig donors are
dealt to slots at random. At a swap two slots exchange their donors: one donor is drawn at random, the other is the one of
`candidates` random donors whose alleles around the site differ least from its own. Where a person has copied from a donor
as much as is permitted the swap is forced. Alleles change where `genealogy` asks for it: as many carriers of a site's rarer
allele lose it as others get it, or, at sites where nothing is copied, so many slots get it.
"""

from __future__ import annotations

import heapq
from typing import Any

import numba
import numpy as np

DEAL, SWAP, YOUNG, NEW = 0, 1, 2, 3  # kinds of events, in the order in which they happen at one site
CONTIG_GAP_CM = 1e5  # between contigs, so that nothing reaches across
_LEAST = 0.125  # of the budget: with less left, a donor is not taken again
_FORCED_TRIES = 64  # times `candidates`, before a forced swap is given up


@numba.njit(cache=True, nogil=True, inline="always")
def _mixed(x: Any) -> Any:
    """splitmix64's output function (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(cache=True, nogil=True, inline="always")
def _below(state: Any, n: Any) -> Any:
    """The next random integer of 0 .. n-1; `state` uint64 (1,) moves on. Bias below n / 2**32."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    return np.int64(((_mixed(state[0]) >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32))


@numba.njit(cache=True, nogil=True, inline="always")
def _ones(x: Any) -> Any:
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@numba.njit(cache=True, nogil=True)
def _place(key_h: Any, key: Any) -> Any:
    """Where a key is in a hash table with open addressing, or the free place where it belongs; 0 is no key."""
    mask = len(key_h) - 1
    at = np.int64(_mixed(key) & np.uint64(mask))
    while key_h[at] != 0 and key_h[at] != key:
        at = (at + 1) & mask
    return at


@numba.njit(cache=True, nogil=True)
def _left_cm(
    person: Any, donor: Any, site: Any, longest_cm: Any, key_h: Any, used_h: Any, holder_k: Any, now_n: Any,
    site_s: Any, position_cm: Any,
) -> Any:  # fmt: skip
    """Of what a person may copy from a donor, what is left where its next piece begins at `site`; 0 where it is little.

    A piece reaches up to the site where the next one begins, at the end of a contig to its last site.
    """
    at = _place(key_h, np.uint64(person * len(holder_k) + donor + 1))
    left = longest_cm - (used_h[at] if key_h[at] != 0 else 0.0)
    slot = holder_k[donor]
    if slot >> 1 == person and now_n[slot] >= 0:
        left -= _length_cm(position_cm, site_s[now_n[slot]], site)
    least = _LEAST * longest_cm
    if site + 1 < len(position_cm):
        least = max(least, _length_cm(position_cm, site, site + 1))
    return left if left >= least else 0.0


@numba.njit(cache=True, nogil=True)
def _close(
    person: Any, donor: Any, length_cm: Any, key_h: Any, used_h: Any, count: Any, k: Any
) -> tuple[Any, Any, Any]:
    """Add a piece to what a person has copied from a donor; the table, grown where it was half full, and its keys."""
    if 2 * count >= len(key_h):
        more_h, more_used_h = np.zeros(2 * len(key_h), np.uint64), np.zeros(2 * len(key_h), np.float64)
        for old in range(len(key_h)):
            if key_h[old] != 0:
                at = _place(more_h, key_h[old])
                more_h[at], more_used_h[at] = key_h[old], used_h[old]
        key_h, used_h = more_h, more_used_h
    key = np.uint64(person * k + donor + 1)
    at = _place(key_h, key)
    if key_h[at] == 0:
        key_h[at] = key
        count += 1
    used_h[at] += length_cm
    return key_h, used_h, count


@numba.njit(cache=True, nogil=True, inline="always")
def _length_cm(position_cm: Any, start: Any, end: Any) -> Any:
    if end <= start:
        return 0.0
    if end == len(position_cm) or position_cm[end] - position_cm[end - 1] >= CONTIG_GAP_CM:
        end -= 1
    return position_cm[end] - position_cm[start]


@numba.njit(cache=True, nogil=True, inline="always")
def _due(position_cm: Any, site: Any, left: Any) -> Any:
    """The last site up to which no more than `left` is copied, as int64."""
    last = np.searchsorted(position_cm, position_cm[site] + left, side="right") - 1
    if last + 1 == len(position_cm) or position_cm[last + 1] - position_cm[last] >= CONTIG_GAP_CM:
        return np.int64(last + 1)
    return np.int64(last)


@numba.njit(cache=True, nogil=True)
def walk(
    event_site_e: Any, event_kind_e: Any, event_count_e: Any, sketch_kw: Any, low_l: Any, high_l: Any, bits_lw: Any,
    donor_k: Any, minor_l: Any, position_cm: Any, candidates: Any, longest_cm: Any, state: Any,
) -> tuple[Any, Any, Any, Any, Any, Any]:  # fmt: skip
    """One round of a group of K haplotypes.

    Args:
        event_site_e, event_kind_e, event_count_e: int64 (E,), by site and kind; the count of YOUNG and NEW is of slots.
        sketch_kw: uint64 (K, words), alleles at sites that tell haplotypes apart; low_l, high_l: int32 (L,), the words
            around each site.
        bits_lw, minor_l: packed panel (L, words) and the rarer allele of each site, uint8 (L,).
        donor_k: int64 (K,), where in the panel the group's haplotypes are.
        position_cm: float64 (L,), never falling, contigs one after another.
        longest_cm: the most that is copied from a donor into one person (slots 2p and 2p + 1); inf for no such rule.
        state: uint64 (1,), of the random numbers.

    Returns:
        slot, site and donor (index within the group) of each segment, int64, in the order of sites; slot
        and site of each changed allele; forced swaps for which there was nobody.
    """
    k = len(donor_k)
    bounded = longest_cm < np.inf
    room = 4 * k + 2 * len(event_site_e)
    slot_s, site_s = np.empty(room, np.int64), np.empty(room, np.int64)
    donor_s = np.empty(room, np.int64)
    key_h, used_h, pairs = np.zeros(1 << 10, np.uint64), np.zeros(1 << 10, np.float64), 0
    due = [(np.int64(0), np.int64(-1))]  # where a segment has used up what its person may copy; a heap
    due.pop()
    flips = 0
    for e in range(len(event_site_e)):
        if event_kind_e[e] == YOUNG:
            flips += 2 * event_count_e[e]
        elif event_kind_e[e] == NEW:
            flips += event_count_e[e]
    flip_slot_f, flip_site_f = np.empty(flips, np.int64), np.empty(flips, np.int64)
    holder_k, held_n = np.arange(k), np.arange(k)  # slot of a donor, donor of a slot
    now_n = np.full(k, -1)  # a slot's last segment
    chosen = np.empty(k, np.int64)
    made = flipped = failed = e = 0
    while True:
        # the next thing that happens: an event, or a segment that has become too long
        site, forced = len(position_cm), -1
        if e < len(event_site_e):
            site = event_site_e[e]
        while len(due) > 0 and now_n[slot_s[due[0][1]]] != due[0][1]:
            heapq.heappop(due)
        if len(due) > 0:
            ends = int(due[0][0])
            if ends < site or (ends == site and site < len(position_cm) and event_kind_e[e] != DEAL):
                site, forced = ends, slot_s[due[0][1]]
                heapq.heappop(due)
        if site >= len(position_cm):
            break
        if made + 2 * k + 2 > len(slot_s):
            more = 2 * len(slot_s)
            slot_s, site_s, donor_s = _grown(slot_s, more), _grown(site_s, more), _grown(donor_s, more)
        if forced < 0 and event_kind_e[e] == DEAL:
            for i in range(k - 1, 0, -1):
                j = _below(state, i + 1)
                held_n[i], held_n[j] = held_n[j], held_n[i]
            if bounded:  # who may not copy from a donor any more changes places with somebody
                for n in range(k):
                    if now_n[n] >= 0:
                        at = now_n[n]
                        length_cm = _length_cm(position_cm, site_s[at], site)
                        key_h, used_h, pairs = _close(n >> 1, donor_s[at], length_cm, key_h, used_h, pairs, k)
                        now_n[n] = -1
                for n in range(k):
                    tries = 0
                    while tries < 8 * k and _left_cm(
                        n >> 1, held_n[n], site, longest_cm, key_h, used_h, holder_k, now_n, site_s, position_cm
                    ) <= 0:  # fmt: skip
                        m = _below(state, k)
                        if _left_cm(
                            m >> 1, held_n[n], site, longest_cm, key_h, used_h, holder_k, now_n, site_s, position_cm
                        ) > 0 and _left_cm(
                            n >> 1, held_n[m], site, longest_cm, key_h, used_h, holder_k, now_n, site_s, position_cm
                        ) > 0:  # fmt: skip
                            held_n[n], held_n[m] = held_n[m], held_n[n]
                        tries += 1
                    failed += tries == 8 * k
            for n in range(k):
                holder_k[held_n[n]] = n
                slot_s[made], site_s[made], donor_s[made] = n, site, held_n[n]
                if bounded:
                    left = _left_cm(
                        n >> 1, held_n[n], site, longest_cm, key_h, used_h, holder_k, now_n, site_s, position_cm
                    )
                    heapq.heappush(due, (_due(position_cm, site, left), np.int64(made)))
                now_n[n] = made
                made += 1
        elif forced >= 0 or event_kind_e[e] == SWAP:
            i = held_n[forced] if forced >= 0 else _below(state, k)
            low, high = low_l[site], high_l[site]
            best, j = np.int64(1) << 60, -1
            tries = candidates if forced < 0 else _FORCED_TRIES * candidates
            for t in range(tries):
                if t >= candidates and j >= 0:
                    break
                other = _below(state, k)
                if other == i:
                    continue
                differ = np.int64(0)
                for w in range(low, high):
                    differ += _ones(sketch_kw[i, w] ^ sketch_kw[other, w])
                if differ >= best:
                    continue
                if bounded:
                    x, y = holder_k[i] >> 1, holder_k[other] >> 1
                    if _left_cm(
                        x, other, site, longest_cm, key_h, used_h, holder_k, now_n, site_s, position_cm
                    ) <= 0 or _left_cm(
                        y, i, site, longest_cm, key_h, used_h, holder_k, now_n, site_s, position_cm
                    ) <= 0:  # fmt: skip
                        continue
                best, j = differ, other
            if j >= 0:
                x, y = holder_k[i], holder_k[j]
                if bounded:
                    for slot in (x, y):
                        at = now_n[slot]
                        length_cm = _length_cm(position_cm, site_s[at], site)
                        key_h, used_h, pairs = _close(slot >> 1, donor_s[at], length_cm, key_h, used_h, pairs, k)
                        now_n[slot] = -1
                holder_k[i], holder_k[j] = y, x
                for donor, slot in ((i, y), (j, x)):
                    slot_s[made], site_s[made], donor_s[made] = slot, site, donor
                    held_n[slot] = donor
                    if bounded:
                        left = _left_cm(
                            slot >> 1, donor, site, longest_cm, key_h, used_h, holder_k, now_n, site_s, position_cm
                        )
                        heapq.heappush(due, (_due(position_cm, site, left), np.int64(made)))
                    now_n[slot] = made
                    made += 1
            elif forced >= 0:
                failed += 1
        elif event_kind_e[e] == NEW:
            for c in range(event_count_e[e]):
                slot = _unchosen(state, k, chosen, c)
                flip_slot_f[flipped], flip_site_f[flipped] = slot, site
                flipped += 1
        else:
            for c in range(2 * event_count_e[e]):  # carriers and others in turn
                wanted = minor_l[site] if c % 2 == 0 else 1 - minor_l[site]
                while True:
                    i = _unchosen(state, k, chosen, c)
                    at = donor_k[i]
                    if (bits_lw[site, at >> 6] >> np.uint64(at & 63)) & np.uint64(1) == wanted:
                        break
                flip_slot_f[flipped], flip_site_f[flipped] = holder_k[i], site
                flipped += 1
        if forced < 0:
            e += 1
    return slot_s[:made], site_s[:made], donor_s[:made], flip_slot_f, flip_site_f, failed


@numba.njit(cache=True, nogil=True)
def _grown(values: Any, size: Any) -> Any:
    more = np.empty(size, np.int64)
    more[: len(values)] = values
    return more


@numba.njit(cache=True, nogil=True)
def _unchosen(state: Any, k: Any, chosen: Any, count: Any) -> Any:
    """A random integer of 0 .. k-1 that is not among the `count` ones chosen; it is noted as the next of them."""
    while True:
        i = _below(state, k)
        new = True
        for c in range(count):
            if chosen[c] == i:
                new = False
                break
        if new:
            chosen[count] = i
            return i
