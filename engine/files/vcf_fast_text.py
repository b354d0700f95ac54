"""Records of a VCF, walked line by line: a plain one is decoded at once, any other is put aside.

Plain: REF and ALT of bases, at most MOST_ALTS ALT alleles, printable ASCII, INFO keys of letters and digits, GT of one or two
alleles of one digit, and numbers in FORMAT where the header says numbers. That is narrower than `vcf_structure` and than
htslib's parser, so that what is plain here is read by both. A record with a contig, FORMAT or FILTER that has not been seen is
decoded both ways. Layout: VCF 4.3 specification, section 1.6.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from engine.files import vcf_fast_table as t
from engine.files.vcf_fast_bits import MOST_ALTS, decode, pointer, text_to_bytes
from engine.files.vcf_fast_cells import INTEGER, cells, integer_cells
from engine.files.vcf_fast_table import Out, Places

MOST_NAME = 255  # bytes of a contig's name, and of a FORMAT
MOST_FILTER = 63
_TAB, _NEWLINE, _RETURN, _DOT, _COMMA = 9, 10, 13, 46, 44
_BASE, _IN_KEY, _PRINTABLE = 1, 2, 4


def _classes() -> np.ndarray:
    made = np.zeros(256, dtype=np.uint8)
    made[33:127] = _PRINTABLE
    made[[ord(c) for c in "ACGTNacgtn"]] |= _BASE
    made[[ord(c) for c in "0123456789._ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"]] |= _IN_KEY
    return made


_CLASS = _classes()


class Known(NamedTuple):
    """What a walker has seen of a file, kept from piece to piece.

    Attributes:
        contig: uint8 (MOST_NAME + 1,), name of the contig of the record before, its length first.
        region: uint8, the same for the contig of the region.
        filters: uint8 (F, MOST_FILTER + 1), the same for FILTERs; unused ones are empty.
        formats: uint8 (F, MOST_NAME + 1), the same for FORMATs.
        format_types: uint8 (F, MOST_KEYS + 1), number of keys (0: a FORMAT that is left to cyvcf2), then kinds of values of the
            keys after GT (see `vcf_fast_cells`).
        gt: uint8 (2 * samples + 128,), genotype bytes of one record.
    """

    contig: np.ndarray
    region: np.ndarray
    filters: np.ndarray
    formats: np.ndarray
    format_types: np.ndarray
    gt: np.ndarray


@numba.njit(cache=True, nogil=True)
def walk(buffer: np.ndarray, state: np.ndarray, samples: int, known: Known, out: Out) -> int:
    """Lines from state[AT] on, until the piece ends in the middle of one, something is full, or one is refused.

    Args:
        buffer: uint8, at least 256 bytes longer than state[END].

    Returns:
        MORE, FULL, REJECTED, or NEW_FORMAT with its place in state[TEXT_AT:]; state[AT] at the first line that was not taken.
    """
    b, s, to, gt = pointer(buffer), pointer(state), t.places(out), pointer(known.gt)
    contig_name, formats, types = pointer(known.contig), pointer(known.formats), pointer(known.format_types)
    while True:
        at, end = s[t.AT], s[t.END]
        # the columns before INFO, each up to its tab
        pos_at = _column_end(b, at, end) + 1
        id_at = _column_end(b, pos_at, end) + 1
        ref_at = _column_end(b, id_at, end) + 1
        alt_at = _column_end(b, ref_at, end) + 1
        qual_at = _column_end(b, alt_at, end) + 1
        filter_at = _column_end(b, qual_at, end) + 1
        info_at = _column_end(b, filter_at, end) + 1
        info_end = _column_end(b, info_at, end)
        if info_end >= end:
            # a line that ends before its INFO is refused at once, for the bytes after it would be waited for
            return t.REJECTED if _has_newline(b, at, min(info_at, end)) else t.MORE
        columns = b[pos_at - 1] == _TAB and b[id_at - 1] == _TAB and b[ref_at - 1] == _TAB and b[alt_at - 1] == _TAB
        columns = columns and b[qual_at - 1] == _TAB and b[filter_at - 1] == _TAB and b[info_at - 1] == _TAB
        if not columns or b[info_end] != (_TAB if samples > 0 else _NEWLINE):
            return t.REJECTED
        position = _number(b, pos_at, id_at - 1)
        if position < 0 or position > t.MAX_POSITION or pos_at - 1 == at:
            return t.REJECTED
        is_new = not _is_text(b, at, pos_at - 1, contig_name, 0)
        if is_new and pos_at - 1 - at > MOST_NAME:
            return t.REJECTED
        if not is_new and position < s[t.POSITION]:
            return t.REJECTED
        contig = s[t.CONTIG] + 1 if is_new else s[t.CONTIG]
        inside = True
        if known.region[0] > 0:
            inside = _is_text(b, at, pos_at - 1, pointer(known.region), 0) and s[t.FIRST] <= position <= s[t.LAST]
        alts = 0 if qual_at - alt_at == 2 and b[alt_at] == _DOT else 1
        for k in range(alt_at, qual_at - 1):
            alts += b[k] == _COMMA
        rows = max(1, alts) if inside else 0
        if t.lacks_room(s, rows, info_end - at, to):
            return t.FULL
        both = is_new or s[t.BOTH_LEFT] > 0
        plain = alts <= MOST_ALTS and _is_plain(b, id_at, ref_at, alt_at, qual_at, filter_at, info_at, info_end)
        if plain and not _knows_filter(b, filter_at, info_at - 1, known.filters):
            both = True
        line_end, keys = info_end, 1
        if samples > 0:
            first = _column_end(b, info_end + 1, end) + 1
            if first >= end:
                return t.REJECTED if _has_newline(b, info_end, end) else t.MORE
            f = s[t.FORMAT]
            if f < 0 or not _is_text(b, info_end + 1, first - 1, formats, f * (MOST_NAME + 1)):
                f = 0
                while f < len(known.formats) and not _is_text(b, info_end + 1, first - 1, formats, f * (MOST_NAME + 1)):
                    f += 1
                if f == len(known.formats):
                    s[t.TEXT_AT], s[t.TEXT_END] = info_end + 1, first - 1
                    return t.NEW_FORMAT
                s[t.FORMAT] = f
            keys = types[f * known.format_types.shape[1]]
            if not plain or keys == 0:
                line_end = -1
            else:
                line_end = -1
                if keys == 1:
                    line_end = _plain_cells(b, first, end, samples, gt)
                elif _is_integers(types, f * known.format_types.shape[1]):
                    line_end = integer_cells(b, first, end, samples, keys, gt)
                if line_end < 0:
                    line_end = cells(b, first, end, samples, types, f * known.format_types.shape[1], gt)
            if line_end < 0:
                plain = False
                line_end = _line_end(b, first, end)
            if line_end >= end:
                return t.MORE
        if line_end - at >= t.MAX_RECORD:
            return t.REJECTED
        row = s[t.ROWS] if inside else -1
        kind = t.ASIDE
        if plain and inside and samples > 0:
            plain = decode(gt, 0, samples, 2, alts, row, to.words, to.bits, to.missing, to.seen, to.kept, to.found)
        if plain and not both:
            kind = t.PLAIN
        elif plain and inside:
            kind = t.BOTH
        if not t.enter(b, at, line_end + 1, kind, row, alts, contig, position, s, to):
            return t.FULL
        if is_new:
            known.contig[0] = pos_at - 1 - at
            for k in range(pos_at - 1 - at):
                known.contig[1 + k] = b[at + k]
        if inside and kind != t.ASIDE:
            _add_strings(b, id_at, ref_at, alt_at, qual_at, s, to)
        if kind == t.BOTH:
            _learn_filter(b, filter_at, info_at - 1, known.filters)
        t.advance(line_end + 1, rows, inside or kind != t.PLAIN, contig, position, s)


@numba.njit(cache=True, nogil=True)
def _column_end(b: Any, at: int, end: int) -> int:
    """The next tab or newline, `end` where there is none."""
    while at < end and b[at] != _TAB and b[at] != _NEWLINE:
        at += 1
    return min(at, end)


@numba.njit(cache=True, nogil=True)
def _line_end(b: Any, at: int, end: int) -> int:
    while at < end and b[at] != _NEWLINE:
        at += 1
    return at


@numba.njit(cache=True, nogil=True)
def _has_newline(b: Any, at: int, end: int) -> bool:
    return _line_end(b, at, end) < end


@numba.njit(cache=True, nogil=True)
def _number(b: Any, at: int, end: int) -> Any:
    """Digits to a number, -1 where it is none or has more than ten digits."""
    if end <= at or end - at > 10:
        return -1
    value = np.int64(0)
    for k in range(at, end):
        digit = np.int64(b[k]) - 48
        if digit < 0 or digit > 9:
            return -1
        value = 10 * value + digit
    return value


@numba.njit(cache=True, nogil=True)
def _is_text(b: Any, at: int, end: int, texts: Any, start: int) -> bool:
    """Whether the bytes are those of a text that is kept with its length first."""
    if texts[start] != end - at or end == at:
        return False
    for k in range(end - at):  # noqa: SIM110
        if texts[start + 1 + k] != b[at + k]:
            return False
    return True


@numba.njit(cache=True, nogil=True)
def _is_plain(
    b: Any, id_at: int, ref_at: int, alt_at: int, qual_at: int, filter_at: int, info_at: int, info_end: int
) -> bool:
    """ID, REF, ALT, QUAL and INFO."""
    if ref_at - id_at < 2 or alt_at - ref_at < 2 or qual_at - alt_at < 2 or filter_at - qual_at < 2:
        return False
    for k in range(id_at, ref_at - 1):
        if _CLASS[b[k]] & _PRINTABLE == 0:
            return False
    for k in range(qual_at, filter_at - 1):
        if _CLASS[b[k]] & _PRINTABLE == 0:
            return False
    for k in range(ref_at, alt_at - 1):
        if _CLASS[b[k]] & _BASE == 0:
            return False
    if not (qual_at - alt_at == 2 and b[alt_at] == _DOT):
        length = 0
        for k in range(alt_at, qual_at):
            c = b[k]
            if _CLASS[c] & _BASE:
                length += 1
            elif c == 42 and length == 0 and b[k + 1] in (_COMMA, _TAB):  # a lone *
                length = 1
            elif c in (_COMMA, _TAB) and length > 0:
                length = 0
            else:
                return False
    if info_end - info_at == 1 and b[info_at] == _DOT:
        return True
    in_key, length, entries = True, 0, 0
    for k in range(info_at, info_end):
        c = b[k]
        kind = _CLASS[c]
        if c == 59:  # ;
            if in_key and length == 0:
                return False
            in_key, length = True, 0
            entries += 1
        elif in_key and c == 61:  # =
            if length == 0:
                return False
            in_key = False
        elif kind & (_IN_KEY if in_key else _PRINTABLE):
            length += 1
        else:
            return False
    return not (in_key and length == 0) and entries < 60000


@numba.njit(cache=True, nogil=True)
def _knows_filter(b: Any, at: int, end: int, filters: np.ndarray) -> bool:
    for k in range(len(filters)):  # noqa: SIM110
        if _is_text(b, at, end, pointer(filters), k * (MOST_FILTER + 1)):
            return True
    return False


@numba.njit(cache=True, nogil=True)
def _learn_filter(b: Any, at: int, end: int, filters: np.ndarray) -> None:
    """Remember a FILTER that cyvcf2 is going to see as well, where there is room."""
    if end - at > MOST_FILTER or _knows_filter(b, at, end, filters):
        return
    for k in range(len(filters)):
        if filters[k, 0] == 0:
            filters[k, 0] = end - at
            for i in range(end - at):
                filters[k, 1 + i] = b[at + i]
            return


@numba.njit(cache=True, nogil=True)
def _is_integers(types: Any, at: int) -> bool:
    for k in range(1, types[at]):  # noqa: SIM110
        if types[at + k] != INTEGER:
            return False
    return True


@numba.njit(cache=True, nogil=True)
def _plain_cells(b: Any, at: int, end: int, samples: int, gt: Any) -> int:
    """Cells `a|b` of all samples to genotype bytes; the newline after them, -1 where they are anything else."""
    if end - at < 4 * samples:
        return -1
    groups = (samples - 1) // 32
    if text_to_bytes(b, at, groups, gt, 0) != 0:
        return -1
    for k in range(32 * groups, samples):
        p = at + 4 * k
        one, between, two, after = b[p], b[p + 1], b[p + 2], b[p + 3]
        last = k == samples - 1
        if after != (_NEWLINE if last else _TAB) and not (last and after == _RETURN and b[p + 4] == _NEWLINE):
            return -1
        if (one < 48 or one > 57) and one != _DOT:
            return -1
        if (two < 48 or two > 57) and two != _DOT:
            return -1
        if between != 124 and between != 47:
            return -1
        gt[2 * k] = 0 if one == _DOT else (one - 47) << 1
        gt[2 * k + 1] = (0 if two == _DOT else (two - 47) << 1) | (between == 124)
    line_end = at + 4 * samples - 1
    return line_end + (b[line_end] == _RETURN)


@numba.njit(cache=True, nogil=True)
def _add_strings(b: Any, id_at: int, ref_at: int, alt_at: int, qual_at: int, s: Any, to: Places) -> None:
    entry = s[t.RECORDS] * t.COLUMNS
    to.table[entry + t.ID_CODE], s[t.IDS] = t.add_text(b, id_at, ref_at - 1, to.ids, s[t.IDS])
    to.table[entry + t.REF_CODE], s[t.REFS] = t.add_text(b, ref_at, alt_at - 1, to.refs, s[t.REFS])
    row, start = s[t.ALT_ROWS], alt_at
    for k in range(alt_at, qual_at):
        if b[k] == _COMMA or b[k] == _TAB:
            to.alt_code[row], s[t.ALTS] = t.add_text(b, start, k, to.alts, s[t.ALTS])
            row, start = row + 1, k + 1
