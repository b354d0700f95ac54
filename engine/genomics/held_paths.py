"""Copying paths of many people, laid down by stretches of sites, so that a block of sites needs what is copied there only.

Paths are drawn person by person and each runs over all sites; alleles are wanted block of sites by block of sites for all
people. So the paths of some thousand people, once drawn, are cut at every 16,384th site and packed stretch by stretch: 4
bytes a segment (6 where the panel has more than 65,536 haplotypes), 2 a changed allele, 4 a haplotype and stretch more.

Packs lie in memory, or as files in a folder: then memory is that of one stretch, and whoever comes later (the same command
again, another shard) finds what is drawn already. A pack depends on the model, the request and the seed only, so that two
processes that write the same one write the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numba
import numpy as np

from engine import atomic
from engine.errors import CorruptRun
from engine.kernels import bits

STRETCH = 1 << 14  # sites: places inside take 16 bits
PEOPLE = 1024  # whose paths are drawn at one time

Draw = Callable[[int, int], tuple[Any, np.ndarray]]  # (first person, how many) -> paths.Paths, int64 groups
Progress = Callable[[int, int], None]


@dataclass
class HeldPaths:
    """Packs of the paths of all people, in order; `rows` makes alleles of them.

    Attributes:
        model: what the paths are of: `k`, `n_sites` and `materialise(paths, first, stop)`.
        packs: bytes, or the files that hold them.
        template: `paths.Paths` whose columns are replaced by those of a block.
        group_n: int64 (n,), group of each person.
    """

    model: Any
    packs: Sequence[bytes | Path]
    template: Any
    group_n: np.ndarray
    _now: tuple[int, list[Any]] = field(default=(-1, []), repr=False)  # the stretch that was asked for last

    def rows(self, first: int, stop: int) -> np.ndarray:
        """Packed alleles at sites first .. stop-1, uint64 (stop - first, words)."""
        if first == stop:
            return np.zeros((0, bits.words(2 * len(self.group_n))), dtype=np.uint64)
        cuts = [first, *range((first // STRETCH + 1) * STRETCH, stop, STRETCH), stop]
        pieces = [self._piece(low, high) for low, high in pairwise(cuts)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _piece(self, first: int, stop: int) -> np.ndarray:
        return np.asarray(self.model.materialise(self.cut(first, stop), first, stop))

    def cut(self, first: int, stop: int) -> Any:
        """`Paths` that agree with the whole ones at sites first .. stop-1, all of one stretch."""
        stretch, low, high = first // STRETCH, first % STRETCH, first % STRETCH + stop - first
        if self._now[0] != stretch:
            self._now = (stretch, [])  # two stretches are never held at one time
            self._now = (stretch, [_read(pack, stretch, self.model.k) for pack in self.packs])
        parts = self._now[1]
        begin_c = np.concatenate([[0], np.cumsum([len(part[0]) for part in parts])]).astype(np.int64)
        segments, flips = np.zeros((2, begin_c[-1] + 1), dtype=np.int64)
        with ThreadPoolExecutor(numba.get_num_threads()) as pool:

            def count(c: int) -> None:
                segment_n, flip_n, start_s, _, flip_f = parts[c]
                at = slice(begin_c[c] + 1, begin_c[c + 1] + 1)
                _count_inside(segment_n, start_s, low, high, True, segments[at])
                _count_inside(flip_n, flip_f, low, high, False, flips[at])

            list(pool.map(count, range(len(parts))))
            np.cumsum(segments, out=segments)
            np.cumsum(flips, out=flips)
            start_s, donor_s = np.empty(segments[-1], dtype=np.int64), np.empty(segments[-1], dtype=np.int32)
            flip_f = np.empty(flips[-1], dtype=np.int64)

            def fill(c: int) -> None:
                segment_n, flip_n, in_start_s, in_donor_s, in_flip_f = parts[c]
                at = slice(begin_c[c], begin_c[c + 1] + 1)
                base = stretch * STRETCH
                _fill_segments(segment_n, in_start_s, in_donor_s, low, high, base, segments[at], start_s, donor_s)
                _fill_flips(flip_n, in_flip_f, low, high, base, flips[at], flip_f)

            list(pool.map(fill, range(len(parts))))
        return replace(
            self.template, segment_offset_n=segments, segment_start_s=start_s, segment_donor_s=donor_s,
            flip_offset_n=flips, flip_site_f=flip_f,
        )  # fmt: skip

    def segments(self, pack: bytes | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the people of one pack: offsets int64 (haplotypes + 1,), first site and donor of each segment, int64; a
        segment is cut where a stretch begins."""
        stretches, haplotypes, _ = np.frombuffer(_bytes(pack, 0, 24), dtype="<i8").tolist()
        owner, start, donor = [], [], []
        for stretch in range(stretches):
            segment_n, _, start_s, donor_s, _ = _read(pack, stretch, self.model.k)
            owner.append(np.repeat(np.arange(haplotypes), segment_n))
            start.append(stretch * STRETCH + start_s.astype(np.int64))
            donor.append(donor_s.astype(np.int64))
        owner_s, start_s, donor_s = np.concatenate(owner), np.concatenate(start), np.concatenate(donor)
        order = np.argsort(owner_s, kind="stable")
        owner_s, start_s, donor_s = owner_s[order], start_s[order], donor_s[order]
        return np.searchsorted(owner_s, np.arange(haplotypes + 1)), start_s, donor_s


def hold(model: Any, paths: Any, group_n: np.ndarray) -> HeldPaths:
    """Paths that are drawn already, in memory."""
    return HeldPaths(model, [pack(paths, model.n_sites, model.k, group_n)], paths, group_n)


def draw(
    model: Any,
    n: int,
    of: Draw,
    *,
    folder: Path | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> HeldPaths:
    """The paths of n people, `of(first, count)` at a time, in memory or as files of `folder`.

    Args:
        shard: (i, k) begins i / k of the way: processes that begin at different places and find one another's files share
            the work.

    Raises:
        CorruptRun: a file of the folder is not whole.
    """
    template, _ = of(0, 0)
    starts = list(range(0, n, PEOPLE))
    packs: list[bytes | Path] = [b""] * len(starts)
    group_n = np.zeros(n, dtype=np.int64)
    turn = shard[0] * len(starts) // shard[1]
    for done, c in enumerate([*range(turn, len(starts)), *range(turn)]):
        count = min(PEOPLE, n - starts[c])
        place = None if folder is None else folder / f"pack-{c:06d}"
        if place is None or not place.exists():
            paths, own = of(starts[c], count)
            made = pack(paths, model.n_sites, model.k, own)
            if place is not None:
                with atomic.atomic_path(place) as partial:
                    partial.write_bytes(made)
            packs[c] = made if place is None else place
        else:
            packs[c] = place
        group_n[starts[c] : starts[c] + count] = _groups(packs[c], count)
        if progress is not None:
            progress(min(n, (done + 1) * PEOPLE), n)
    return HeldPaths(model, packs, template, group_n)


def pack(paths: Any, n_sites: int, k: int, group_n: np.ndarray) -> bytes:
    """Paths cut at every STRETCH-th site. Layout, little endian: stretches, haplotypes, people, then the offset of each
    stretch and the end, int64; groups int32; per stretch the segments and the changed alleles of each haplotype, uint16,
    then first sites uint16, donors uint16 or int32, sites of changed alleles uint16, counted from the stretch's first.
    """
    haplotypes, stretches = len(paths.segment_offset_n) - 1, max(1, -(-n_sites // STRETCH))
    donor_type = _donor_type(k)
    head = np.array([stretches, haplotypes, len(group_n)], dtype="<i8")
    offset_t = np.zeros(stretches + 1, dtype="<i8")
    offset_t[0] = 8 * (3 + stretches + 1) + 4 * len(group_n)
    segment_at, flip_at = paths.segment_offset_n[:-1].copy(), paths.flip_offset_n[:-1].copy()
    bodies: list[bytes] = []
    for t in range(stretches):
        low, high = t * STRETCH, (t + 1) * STRETCH
        segment_n, flip_n = np.empty((2, haplotypes), dtype=np.uint16)
        _advance(paths.segment_offset_n, paths.segment_start_s, segment_at, low, high, True, segment_n)
        _advance(paths.flip_offset_n, paths.flip_site_f, flip_at, low, high, False, flip_n)
        start_s = np.empty(int(segment_n.sum(dtype=np.int64)), dtype=np.uint16)
        donor_s = np.empty(len(start_s), dtype=donor_type)
        flip_f = np.empty(int(flip_n.sum(dtype=np.int64)), dtype=np.uint16)
        _take(segment_at, segment_n, paths.segment_start_s, low, start_s)
        _take(segment_at, segment_n, paths.segment_donor_s, 0, donor_s)
        _take(flip_at, flip_n, paths.flip_site_f, low, flip_f)
        bodies += [each.tobytes() for each in (segment_n, flip_n, start_s, donor_s, flip_f)]
        offset_t[t + 1] = offset_t[t] + sum(map(len, bodies[-5:]))
        segment_at += segment_n
        flip_at += flip_n
    return b"".join([head.tobytes(), offset_t.tobytes(), group_n.astype("<i4").tobytes(), *bodies])


def _donor_type(k: int) -> Any:
    return np.uint16 if k <= 1 << 16 else np.int32


def _bytes(held: bytes | Path, first: int, stop: int) -> memoryview:
    if isinstance(held, bytes):
        return memoryview(held)[first:stop]
    try:
        with open(held, "rb") as stream:
            stream.seek(first)
            got = stream.read(stop - first)
    except OSError as fault:
        raise CorruptRun("the paths that were drawn", str(fault), held, "removing the folder of parts") from None
    if len(got) < stop - first:
        raise CorruptRun("the paths that were drawn", "a shorter file", held, "removing the folder of parts")
    return memoryview(got)


def _groups(held: bytes | Path, people: int) -> np.ndarray:
    stretches, _, own = np.frombuffer(_bytes(held, 0, 24), dtype="<i8").tolist()
    if own != people:
        raise CorruptRun(f"the paths of {people} people", f"of {own}", held, "removing the folder of parts")
    at = 8 * (3 + stretches + 1)
    return np.frombuffer(_bytes(held, at, at + 4 * people), dtype="<i4").astype(np.int64)


def _read(held: bytes | Path, stretch: int, k: int) -> tuple[np.ndarray, ...]:
    """Of one stretch: segments and changed alleles of each haplotype, first sites, donors, changed sites."""
    _, haplotypes, _ = np.frombuffer(_bytes(held, 0, 24), dtype="<i8").tolist()
    low, high = np.frombuffer(_bytes(held, 24 + 8 * stretch, 24 + 8 * (stretch + 2)), dtype="<i8").tolist()
    body = np.frombuffer(_bytes(held, low, high), dtype=np.uint8)
    count = body[: 4 * haplotypes].view("<u2")
    segment_n, flip_n = count[:haplotypes], count[haplotypes:]
    segments, donor_type = int(segment_n.sum(dtype=np.int64)), np.dtype(_donor_type(k))
    at = 4 * haplotypes
    ends = np.cumsum([at, 2 * segments, donor_type.itemsize * segments]).tolist()
    start_s, donor_s = body[at : ends[1]].view("<u2"), body[ends[1] : ends[2]].copy().view(donor_type)
    return segment_n, flip_n, start_s, donor_s, body[ends[2] :].view("<u2")


@numba.njit(cache=True, nogil=True)
def _advance(offset_n: Any, site_s: Any, at_n: Any, low: Any, high: Any, is_path: Any, count_n: Any) -> None:
    """How many of each haplotype's rising sites, from `at_n` on, are below `high`; of a path, what is copied at `low` too:
    `at_n` is then moved back to the segment that began before.
    """
    for n in range(len(at_n)):
        at, end = at_n[n], offset_n[n + 1]
        if is_path and at > offset_n[n] and (at == end or site_s[at] > low):
            at -= 1
            at_n[n] = at
        last = at
        while last < end and site_s[last] < high:
            last += 1
        count_n[n] = last - at


@numba.njit(cache=True, nogil=True)
def _take(at_n: Any, count_n: Any, value_s: Any, base: Any, made: Any) -> None:
    """The values of each haplotype's next entries, less `base` where they are not below it."""
    put = 0
    for n in range(len(at_n)):
        for k in range(count_n[n]):
            made[put] = max(0, value_s[at_n[n] + k] - base)
            put += 1


@numba.njit(cache=True, nogil=True)
def _count_inside(in_n: Any, site_s: Any, low: Any, high: Any, is_path: Any, count_n: Any) -> None:
    """Of each haplotype's entries in a stretch: how many are in [low, high), for a path the one at or before `low` too."""
    at = 0
    for n in range(len(in_n)):
        found = 0
        before = 0
        for k in range(at, at + in_n[n]):
            site = site_s[k]
            if site >= high:
                break
            if site > low or (site == low and not is_path):
                found += 1
            elif is_path:
                before = 1
        count_n[n] = found + before
        at += in_n[n]


@numba.njit(cache=True, nogil=True)
def _fill_segments(
    in_n: Any, site_s: Any, donor_s: Any, low: Any, high: Any, base: Any, offset_n: Any, start: Any, donor: Any
) -> None:
    """What is copied at the first site is taken to go back to the beginning: its start is 0."""
    at = 0
    for n in range(len(in_n)):
        put = offset_n[n]
        if offset_n[n + 1] > put:
            start[put] = 0
            put += 1
        for k in range(at, at + in_n[n]):
            site = site_s[k]
            if site >= high:
                break
            if site <= low:
                donor[offset_n[n]] = donor_s[k]
            else:
                start[put] = base + site
                donor[put] = donor_s[k]
                put += 1
        at += in_n[n]


@numba.njit(cache=True, nogil=True)
def _fill_flips(in_n: Any, site_f: Any, low: Any, high: Any, base: Any, offset_n: Any, made: Any) -> None:
    at = 0
    for n in range(len(in_n)):
        put = offset_n[n]
        for k in range(at, at + in_n[n]):
            if low <= site_f[k] < high:
                made[put] = base + site_f[k]
                put += 1
        at += in_n[n]
