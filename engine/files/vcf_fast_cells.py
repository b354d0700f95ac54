"""Sample cells of a VCF line with more than plain diploid genotypes: GT to genotype bytes, the values after it judged.

What follows GT is not kept; it is only seen to be what htslib would parse: digits where the header says Integer, and so on.
Every byte goes through a small automaton.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

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


_CLASS, _NEXT = _classes(), _transitions()


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
