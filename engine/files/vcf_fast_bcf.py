"""Records of a BCF, walked with every bound checked: a plain one is decoded at once, any other is put aside.

Plain: at most MOST_ALTS ALT alleles, printable ASCII, every key defined, every value inside its block, GT of one or two bytes
per sample. That is narrower than `vcf_structure` and than htslib's own check of a record, so that what is plain here is read by
both. Layout: VCF 4.3 specification, section 6.3.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from engine.files import vcf_fast_table as t
from engine.files.vcf_fast_bits import MOST_ALTS, decode, pointer
from engine.files.vcf_fast_table import Out, Places

_TEXT = 7


@numba.njit(cache=True, nogil=True)
def walk(
    buffer: np.ndarray,
    state: np.ndarray,
    samples: int,
    gt_key: int,
    known_string: np.ndarray,
    known_contig: np.ndarray,
    out: Out,
) -> int:
    """Records from state[AT] on, until the piece ends in the middle of one, something is full, or one is refused.

    Args:
        buffer: uint8, at least 64 bytes longer than state[END].
        gt_key: index of GT in the dictionary of strings, -1 where it is not defined.
        known_string, known_contig: uint8, 1 where the dictionary has an entry.

    Returns:
        MORE, FULL or REJECTED, state[AT] at the first record that was not taken.
    """
    b, s, known, to = pointer(buffer), pointer(state), pointer(known_string), t.places(out)
    while True:
        at, end = s[t.AT], s[t.END]
        if end - at < 8:
            return t.MORE
        shared, individual = _u32(b, at), _u32(b, at + 4)
        first = at + 8
        if shared < 24 or shared + individual > t.MAX_RECORD:
            return t.REJECTED
        if end - first < shared + individual:
            return t.MORE
        end = first + shared + individual
        contig, position = _integer(b, first, 3), _integer(b, first + 4, 3) + 1
        n_info, alts = _u16(b, first + 16), _u16(b, first + 18) - 1
        n_sample, n_format = _u32(b, first + 20) & 0xFFFFFF, np.int64(b[first + 23])
        if contig < 0 or contig >= len(known_contig) or known_contig[contig] == 0:
            return t.REJECTED
        if position < 0 or n_sample != samples or alts < 0:
            return t.REJECTED
        is_new = contig != s[t.CONTIG]
        if not is_new and position < s[t.POSITION]:
            return t.REJECTED
        inside = s[t.REGION] == -1 or (contig == s[t.REGION] and s[t.FIRST] <= position <= s[t.LAST])
        rows = max(1, alts) if inside else 0
        if t.lacks_room(s, rows, shared, to):
            return t.FULL
        both = is_new or s[t.BOTH_LEFT] > 0
        row = s[t.ROWS] if inside else -1
        kind = t.ASIDE
        # outside the region a record is only checked
        if inside or not both:
            plain, gt_at, ploidy = _check(
                b, first, first + shared, end, alts, n_info, n_format, samples, gt_key, known, len(known_string)
            )
            if plain:
                if not inside:
                    kind = t.PLAIN
                elif samples == 0 or decode(
                    b, gt_at, samples, ploidy, alts, row, to.words, to.bits, to.missing, to.seen, to.kept, to.found
                ):
                    kind = t.BOTH if both else t.PLAIN
        if not t.enter(b, at, end, kind, row, alts, contig, position, s, to):
            return t.FULL
        if inside and kind != t.ASIDE:
            _add_strings(b, first + 24, first + shared, alts, s, to)
        t.advance(end, rows, inside or kind != t.PLAIN, contig, position, s)


@numba.njit(cache=True, nogil=True)
def _u16(b: Any, at: int) -> Any:
    return np.int64(b[at]) | np.int64(b[at + 1]) << 8


@numba.njit(cache=True, nogil=True)
def _u32(b: Any, at: int) -> Any:
    return _u16(b, at) | _u16(b, at + 2) << 16


@numba.njit(cache=True, nogil=True)
def _integer(b: Any, at: Any, kind: Any) -> Any:
    """Signed integer of type 1, 2 or 3."""
    if kind == 1:
        return np.int64(np.int8(b[at]))
    if kind == 2:
        return np.int64(np.int16(_u16(b, at)))
    return np.int64(np.int32(_u32(b, at)))


@numba.njit(cache=True, nogil=True)
def _width(kind: Any) -> Any:
    """Bytes of one value; 0 for a type that has none or is unknown."""
    if kind == 1 or kind == _TEXT:
        return 1
    if kind == 2:
        return 2
    return 4 if kind == 3 or kind == 5 else 0


@numba.njit(cache=True, nogil=True)
def _typed(b: Any, at: Any, end: Any) -> tuple[Any, Any, Any]:
    """Type, number of values and offset of the first of the typed value at `at`; type -1 where it is out of order.

    The values end at or before `end`.
    """
    if at >= end:
        return -1, 0, at
    kind, count = np.int64(b[at] & 15), np.int64(b[at] >> 4)
    at += 1
    if count == 15:
        if at >= end:
            return -1, 0, at
        number = np.int64(b[at] & 15)
        if b[at] >> 4 != 1 or number < 1 or number > 3 or at + 1 + _width(number) > end:
            return -1, 0, at
        count = _integer(b, at + 1, number)
        at += 1 + _width(number)
        if count < 0:
            return -1, 0, at
    if (kind == 0 and count != 0) or (kind != 0 and _width(kind) == 0) or count * _width(kind) > end - at:
        return -1, 0, at
    return kind, count, at


@numba.njit(cache=True, nogil=True)
def _key(b: Any, at: int, end: int, known: Any, strings: int) -> tuple[int, int]:
    """A defined key of the dictionary of strings, -1 where it is none, and what follows it."""
    kind, count, at = _typed(b, at, end)
    if count != 1 or kind < 1 or kind > 3:
        return -1, at
    key = _integer(b, at, kind)
    if key < 0 or key >= strings or known[key] == 0:
        return -1, at
    return key, at + _width(kind)


@numba.njit(cache=True, nogil=True)
def _is_printable(b: Any, at: int, end: int, comma: bool) -> bool:
    for k in range(at, end):
        c = b[k]
        if c < 33 or c > 126 or (c == 44 and not comma):
            return False
    return True


@numba.njit(cache=True, nogil=True)
def _check(
    b: Any,
    first: int,
    shared_end: int,
    end: int,
    alts: int,
    n_info: int,
    n_format: Any,
    samples: int,
    gt_key: int,
    known: Any,
    strings: int,
) -> tuple[bool, int, int]:
    """Whether all but the genotypes themselves is plain, where they are, and bytes per sample."""
    if alts > MOST_ALTS:
        return False, 0, 0
    at = first + 24
    for text in range(2 + alts):
        kind, count, at = _typed(b, at, shared_end)
        if kind != _TEXT or (text > 0 and count == 0) or not _is_printable(b, at, at + count, text == 0):
            return False, 0, 0
        if text > 1 and count == 1 and b[at] == 46:
            return False, 0, 0
        at += count
    kind, count, at = _typed(b, at, shared_end)
    if kind < 0 or kind == 5 or kind == _TEXT:
        return False, 0, 0
    for k in range(count):
        key = _integer(b, at + k * _width(kind), kind)
        if key < 0 or key >= strings or known[key] == 0:
            return False, 0, 0
    at += count * _width(kind)
    for _ in range(n_info):
        key, at = _key(b, at, shared_end, known, strings)
        if key < 0:
            return False, 0, 0
        kind, count, at = _typed(b, at, shared_end)
        if kind < 0:
            return False, 0, 0
        at += count * _width(kind)
    if at != shared_end:
        return False, 0, 0
    gt_at, ploidy = 0, 0
    for _ in range(n_format):
        key, at = _key(b, at, end, known, strings)
        if key < 0:
            return False, 0, 0
        kind, count, at = _typed(b, at, end)
        if kind < 0 or count * _width(kind) * samples > end - at:
            return False, 0, 0
        if key == gt_key:
            if ploidy > 0 or kind != 1 or count < 1 or count > 2:
                return False, 0, 0
            gt_at, ploidy = at, count
        at += count * _width(kind) * samples
    if at != end or (samples > 0 and ploidy == 0):
        return False, 0, 0
    return True, gt_at, ploidy


@numba.njit(cache=True, nogil=True)
def _add_strings(b: Any, at: int, end: int, alts: int, s: Any, to: Places) -> None:
    """ID, REF and ALT of a record that `_check` has passed."""
    entry = s[t.RECORDS] * t.COLUMNS
    _, count, at = _typed(b, at, end)
    if count == 0:
        to.table[entry + t.ID_CODE] = ord(".")
    else:
        to.table[entry + t.ID_CODE], s[t.IDS] = t.add_text(b, at, at + count, to.ids, s[t.IDS])
    at += count
    _, count, at = _typed(b, at, end)
    to.table[entry + t.REF_CODE], s[t.REFS] = t.add_text(b, at, at + count, to.refs, s[t.REFS])
    at += count
    if alts == 0:
        to.alt_code[s[t.ALT_ROWS]] = ord(".")
    for alt in range(alts):
        _, count, at = _typed(b, at, end)
        to.alt_code[s[t.ALT_ROWS] + alt], s[t.ALTS] = t.add_text(b, at, at + count, to.alts, s[t.ALTS])
        at += count
