"""Sample cells of a VCF line with more than plain diploid genotypes: GT to genotype bytes, the values after it judged.

What follows GT is not kept; it is only seen to be what htslib would parse: digits where the header says Integer, and so on.
Where all of it is integers (GT:DP:PL, GT:AD:DP:GQ:PL), 64 bytes are judged at a time by what may stand beside what; any other
FORMAT goes byte by byte through a small automaton.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from engine.files.vcf_fast_bits import count_ones, lowest_one, places_of

MOST_KEYS = 31
TEXT, INTEGER, FLOAT = range(3)  # kinds of values
_ABSENT = 0x81

# classes of bytes
_BAD, _OTHER, _DIGIT, _POINT, _COMMA, _MINUS, _PLUS, _EXPONENT, _COLON, _TAB, _RETURN, _NEWLINE = range(12)
# states; those before _FAIL go on, those after it end a value
_START, _DIGITS, _DOT, _SIGN, _FRACTION_START, _FRACTION, _POWER_START, _POWER_SIGN, _POWER, _FAIL, _END = range(11)


def _classes() -> np.ndarray:
    made = np.full(256, _BAD, dtype=np.uint8)
    made[32:127] = _OTHER
    made[48:58] = _DIGIT
    for characters, kind in (
        (".", _POINT),
        (",", _COMMA),
        ("-", _MINUS),
        ("+", _PLUS),
        ("eE", _EXPONENT),
        (":", _COLON),
    ):
        made[[ord(c) for c in characters]] = kind
    made[[9, 13, 10]] = _TAB, _RETURN, _NEWLINE
    return made


def _transitions() -> np.ndarray:
    """Uint8 (kind of value, state, class of byte): the next state."""
    made = np.full((3, _FAIL, 12), _FAIL, dtype=np.uint8)
    ends = [_COLON, _TAB, _RETURN, _NEWLINE]
    inside = [_OTHER, _DIGIT, _POINT, _COMMA, _MINUS, _PLUS, _EXPONENT]
    for state in (_START, _DIGITS):
        made[TEXT, state, inside] = _DIGITS
    made[TEXT, _DIGITS, ends] = _END
    for kind in (INTEGER, FLOAT):
        made[kind, _START, [_DIGIT, _POINT, _MINUS]] = _DIGITS, _DOT, _SIGN
        made[kind, _SIGN, _DIGIT] = _DIGITS
        for state in (_DIGITS, _DOT):
            made[kind, state, _COMMA] = _START
            made[kind, state, ends] = _END
        made[kind, _DIGITS, _DIGIT] = _DIGITS
    made[FLOAT, _DIGITS, [_POINT, _EXPONENT]] = _FRACTION_START, _POWER_START
    made[FLOAT, [_FRACTION_START, _FRACTION], _DIGIT] = _FRACTION
    made[FLOAT, _FRACTION, _EXPONENT] = _POWER_START
    made[FLOAT, _POWER_START, [_MINUS, _PLUS]] = _POWER_SIGN
    made[FLOAT, [_POWER_START, _POWER_SIGN, _POWER], _DIGIT] = _POWER
    for state in (_FRACTION, _POWER):
        made[FLOAT, state, _COMMA] = _START
        made[FLOAT, state, ends] = _END
    return made


def _alleles() -> np.ndarray:
    """Genotype byte of a digit or dot, without phase."""
    made = np.zeros(256, dtype=np.uint8)
    made[48:58] = 2 * np.arange(1, 11)
    return made


_CLASS, _NEXT, _ALLELE = _classes(), _transitions(), _alleles()
_ALL, _ONE = np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(1)
_TWO, _LAST, _LAST_TWO = np.uint64(2), np.uint64(63), np.uint64(62)


@numba.njit(cache=True, nogil=True)
def cells(b: Any, at: int, end: int, samples: int, types: Any, types_at: int, gt: Any) -> int:
    """Cells of all samples to genotype bytes.

    Args:
        b: bytes; 8 behind `end` may be read.
        types: at `types_at` the number of keys, then the kinds of values of all but GT.

    Returns:
        The newline after the last cell; `end` where the line goes on behind it; -1 where a cell is not plain.
    """
    keys = np.int64(types[types_at])
    for sample in range(samples):
        one = b[at]
        if one >= 48 and one <= 57:
            gt[2 * sample] = (one - 47) << 1
        elif one == 46:
            gt[2 * sample] = 0
        else:
            return end if at >= end else -1
        at += 1
        between = b[at]
        if between == 124 or between == 47:
            two = b[at + 1]
            if two >= 48 and two <= 57:
                gt[2 * sample + 1] = (two - 47) << 1 | (between == 124)
            elif two == 46:
                gt[2 * sample + 1] = between == 124
            else:
                return end if at + 1 >= end else -1
            at += 2
        else:
            gt[2 * sample + 1] = _ABSENT
        kind = np.int64(_CLASS[b[at]])
        key = 0
        while kind == _COLON:
            key += 1
            if key >= keys:
                return end if at >= end else -1
            value, state = np.int64(types[types_at + key]), np.int64(_START)
            while state < _FAIL:
                at += 1
                if at >= end:
                    return end
                kind = np.int64(_CLASS[b[at]])
                state = np.int64(_NEXT[value, state, kind])
            if state == _FAIL:
                return -1
        if at >= end:
            return end
        if sample < samples - 1:
            if kind != _TAB:
                return -1
            at += 1
    if b[at] == 13:
        at += 1
    if at >= end:
        return end
    return at if b[at] == 10 else -1


@numba.njit(cache=True, nogil=True)
def integer_cells(b: Any, at: int, end: int, samples: int, keys: int, gt: Any) -> int:
    """`cells` where every key after GT is INTEGER; 63 bytes behind `end` may be read.

    -1 also for some cells that `cells` takes, such as those of a line that ends in a carriage return.
    """
    zero = np.uint64(0)
    # what the last byte of the block before was: carried into the place of the first
    after_tab, after_value, after_bar, after_sign, after_dot, after_digit = _ONE, zero, zero, zero, zero, zero
    second_carried, ended_carried = zero, zero
    start, sample, colons, colons_before = at, 0, np.int64(0), np.int64(0)
    while at < end:
        tab, newline, colon, comma, dot, sign, bar, slash, digit = places_of(b, at, "\t\n:,.-|/")
        bar |= slash
        inside = _ALL if end - at >= 64 else (_ONE << np.uint64(end - at)) - _ONE
        if newline & inside != zero:
            inside &= newline ^ (newline - _ONE)
        ends, allele, value = tab | newline | colon, digit | dot, colon | comma
        first = (tab << _ONE) | after_tab  # of a cell
        second = (first << _ONE) | second_carried
        called = second & bar  # a cell with two alleles
        ended = (called << _TWO) | ended_carried
        bad = ~(ends | allele | comma | sign | bar) | (first & ~allele) | (second & ~(bar | ends)) | (bar & ~second)
        bad |= (((bar << _ONE) | after_bar) & ~allele) | (ended & ~ends)
        bad |= (((value << _ONE) | after_value) & ~(allele | sign)) | (((sign << _ONE) | after_sign) & ~digit)
        bad |= (((dot << _ONE) | after_dot) & ~(comma | ends | bar)) | (((digit << _ONE) | after_digit) & (dot | sign))
        if bad & inside != zero:
            return -1
        left = (tab | newline) & inside
        while left != zero:
            k = lowest_one(left)
            colons_here = colons + count_ones(colon & ((left & (~left + _ONE)) - _ONE))
            if colons_here - colons_before >= keys or sample == samples:
                return -1
            colons_before = colons_here
            gt[2 * sample] = _ALLELE[b[start]]
            between = b[start + 1]
            gt[2 * sample + 1] = _ABSENT
            if between == 124 or between == 47:
                gt[2 * sample + 1] = _ALLELE[b[start + 2]] | (between == 124)
            sample += 1
            start = at + k + 1
            left &= left - _ONE
        if newline & inside != zero:
            return start - 1 if sample == samples else -1
        colons += count_ones(colon)
        after_tab, after_value, after_bar = tab >> _LAST, value >> _LAST, bar >> _LAST
        after_sign, after_dot, after_digit = sign >> _LAST, dot >> _LAST, digit >> _LAST
        second_carried, ended_carried = first >> _LAST, called >> _LAST_TWO
        at += 64
    return end
