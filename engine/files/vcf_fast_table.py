"""What the walkers of `vcf_fast_bcf` and `vcf_fast_text` share: the state they stop and go on with, and the tables they fill.

A walker goes through the records of one piece of a file. A plain record becomes rows of bits and an entry of the table at
once; any other that is whole is put aside, its rows left free, for cyvcf2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from engine.files.vcf_fast_bits import pointer

# slots of the state, int64
(
    AT,  # next byte of the piece, always the first of a record
    END,  # end of its bytes
    RECORDS,  # entries of the table
    ROWS,  # rows in use of the planes
    ALT_ROWS,  # rows in use of `alt_code`
    IDS, REFS, ALTS, ODD,  # bytes in use of the heaps
    NEED_BYTES, NEED_ROWS,  # that a record asks of what is full
    CONTIG,  # of the record before: index in the dictionary (BCF), or how many contigs have begun (text); -1 none yet
    POSITION,  # of the record before
    BOTH_LEFT,  # so many records are still decoded both ways
    REGION, FIRST, LAST,  # BCF: contig of the region (-1: all of the file); its 1-based ends
    FORMAT,  # text: entry of the last FORMAT
    TEXT_AT, TEXT_END,  # text: a FORMAT that has not been seen
    COUNT,  # records passed, whatever became of them
    SLOTS,
) = range(22)  # fmt: skip

# what stopped a walker
MORE, FULL, REJECTED, NEW_FORMAT = range(4)

# kinds of records: plain; plain, but also decoded by cyvcf2 and compared; put aside
PLAIN, BOTH, ASIDE = range(3)

# columns of the table
KIND, ROW, N_ALTS, CONTIG_OF, POSITION_OF, ID_CODE, REF_CODE, ODD_START, ODD_END, COLUMNS = range(10)

MAX_RECORD = 256 << 20
MAX_POSITION = 2**31 - 2


class Out(NamedTuple):
    """Where a walker writes.

    Attributes:
        table_rk: int64 (R, COLUMNS). ROW is -1 outside the region. A code is the character of a text of one character, 0
            where the text is in its heap, -1 where cyvcf2 will give it.
        alt_code: int16, the same for each row.
        ids, refs, alts: uint8 heaps, a newline after each text.
        odd: uint8 heap, the bytes of the records for cyvcf2.
        bits_lw, missing_lw, seen_kw, kept_w, found: see `vcf_fast_bits.decode`.
    """

    table_rk: np.ndarray
    alt_code: np.ndarray
    ids: np.ndarray
    refs: np.ndarray
    alts: np.ndarray
    odd: np.ndarray
    bits_lw: np.ndarray
    missing_lw: np.ndarray
    seen_kw: np.ndarray
    kept_w: np.ndarray
    found: np.ndarray


class Places(NamedTuple):
    """`Out` as pointers, and lengths: what the walkers pass on."""

    table: Any
    alt_code: Any
    ids: Any
    refs: Any
    alts: Any
    odd: Any
    bits: Any
    missing: Any
    seen: Any
    kept: Any
    found: Any
    n_records: int
    n_alt_codes: int
    n_text: int
    n_odd: int
    n_rows: int
    words: int


@numba.njit(cache=True, nogil=True)
def places(out: Out) -> Places:
    return Places(
        pointer(out.table_rk), pointer(out.alt_code), pointer(out.ids), pointer(out.refs), pointer(out.alts),
        pointer(out.odd), pointer(out.bits_lw), pointer(out.missing_lw), pointer(out.seen_kw), pointer(out.kept_w),
        pointer(out.found), len(out.table_rk), len(out.alt_code), min(len(out.ids), len(out.refs), len(out.alts)),
        len(out.odd), out.bits_lw.shape[0], out.bits_lw.shape[1],
    )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def add_text(buffer: Any, at: int, end: int, heap: Any, used: int) -> tuple[Any, int]:
    """Code of a text that is not empty, and how much of the heap is then used."""
    if end - at == 1:
        return np.int64(buffer[at]), used
    for k in range(at, end):
        heap[used] = buffer[k]
        used += 1
    heap[used] = 10
    return np.int64(0), used + 1


@numba.njit(cache=True, nogil=True)
def lacks_room(state: Any, rows: int, text_bytes: int, to: Places) -> bool:
    """Whether a record with so many rows, and texts of at most so many bytes, must wait; asks for what is wanted."""
    if state[ROWS] + rows > to.n_rows or state[ALT_ROWS] + rows > to.n_alt_codes:
        state[NEED_ROWS] = rows
        return True
    if max(state[IDS], state[REFS], state[ALTS]) + text_bytes > to.n_text:
        state[NEED_BYTES] = text_bytes
        return True
    return state[RECORDS] == to.n_records


@numba.njit(cache=True, nogil=True)
def enter(
    buffer: Any, at: int, end: int, kind: int, row: int, alts: int, contig: int, position: int, state: Any, to: Places
) -> bool:
    """An entry of the table, and the bytes of a record that cyvcf2 will read; False where its heap is full."""
    entry = state[RECORDS] * COLUMNS
    if kind != PLAIN:
        used = state[ODD]
        if used + end - at > to.n_odd:
            state[NEED_BYTES] = end - at
            return False
        for k in range(end - at):
            to.odd[used + k] = buffer[at + k]
        to.table[entry + ODD_START], to.table[entry + ODD_END] = used, used + end - at
        state[ODD] = used + end - at
    to.table[entry + KIND] = kind
    to.table[entry + ROW] = row
    to.table[entry + N_ALTS] = alts
    to.table[entry + CONTIG_OF] = contig
    to.table[entry + POSITION_OF] = position
    if kind == ASIDE:
        to.table[entry + ID_CODE] = to.table[entry + REF_CODE] = -1
        if row >= 0:
            for k in range(max(1, alts)):
                to.alt_code[state[ALT_ROWS] + k] = -1
    return True


@numba.njit(cache=True, nogil=True)
def advance(end: int, rows: int, entered: bool, contig: int, position: int, state: Any) -> None:
    """Go on behind a record."""
    state[ROWS] += rows
    state[ALT_ROWS] += rows
    state[RECORDS] += entered
    state[BOTH_LEFT] -= state[BOTH_LEFT] > 0
    state[COUNT] += 1
    state[CONTIG] = contig
    state[POSITION] = position
    state[AT] = end
