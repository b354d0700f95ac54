"""Records of a PGEN from packed bits, many at a time: two bits to a call straight from the two bits of a person's haplotypes.

A call of two alleles is 0 both REF, 1 heterozygous, 2 both ALT, 3 missing; which of a heterozygote's haplotypes has the
ALT stands behind, one bit each. A record in which few people differ from all REF, or from all ALT, is a list of those who
do. Names of samples and sites, and what a PGEN cannot hold, are left to `plink`.

Layout: PLINK 2 File Format Specification (draft), sections 2.2 (header) and 2.3 (variant records, difflists, tracks 1 and 2).
"""

# mypy: disable-error-code="no-untyped-call, operator, assignment"

from __future__ import annotations

import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np

from engine.errors import InputError
from engine.files.genotypes import GenotypeData
from engine.kernels import bits

_EVEN = np.uint64(0x5555555555555555)
_ONE = np.uint64(1)
_CHUNK_BYTES = 8 << 20  # of encoded records, per thread
_MOST_LISTED = 8  # a list holds at most 1 / 8 of the samples: readers refuse longer ones
_TYPE_FEW_ALT, _TYPE_FEW_REF, _SEVERAL_ALTS, _PHASE = 4, 6, 8, 16
_BLOCK = 1 << 16  # records of a variant block


def encoded(data: GenotypeData, start_r: np.ndarray) -> Iterator[tuple[memoryview, np.ndarray, np.ndarray]]:
    """Records of `data`, whose samples must all be diploid (`plink` repeats the allele of haploid ones).

    Args:
        start_r: the rows of each record, as of `genotypes.record_starts`.

    Yields:
        bytes of some records, their types uint8 and their lengths uint32.

    Raises:
        InputError: a genotype of which one allele is missing.
    """
    several = np.diff(start_r) > 1
    edges = np.flatnonzero(np.diff(several.astype(np.int8), prepend=2, append=2))
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist()):
        if several[begin]:
            for r in range(begin, end):
                yield _several_alts(data, int(start_r[r]), int(start_r[r + 1]))
        else:
            yield from _biallelic(data, int(start_r[begin]), int(start_r[end]))


def header(types_r: np.ndarray, length_r: np.ndarray, alleles_r: np.ndarray, samples: int) -> bytes:
    """Everything before the first record: storage mode 0x10, REF alleles not provisional.

    Args:
        types_r, length_r: type and bytes of each record; alleles_r: its number of alleles, REF included.
    """
    records = len(length_r)
    width = 4 if records == 0 else max(1, (int(length_r.max()).bit_length() + 7) // 8)
    with_alleles = bool((alleles_r > 2).any())
    blocks = -(-records // _BLOCK)
    per_record = 1 + width + with_alleles
    first_byte = 12 + 8 * blocks + records * per_record
    start_b = first_byte + np.concatenate([[0], np.cumsum(length_r, dtype=np.int64)])[:-1][::_BLOCK]
    parts = [
        b"\x6c\x1b\x10", struct.pack("<IIB", records, samples, 4 + width - 1 | with_alleles << 4 | 1 << 6),
        start_b.astype("<u8").tobytes(),
    ]  # fmt: skip
    for at in range(0, records, _BLOCK):
        block = slice(at, at + _BLOCK)
        length_rb = np.ascontiguousarray(length_r[block]).astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width]
        parts += [types_r[block].astype(np.uint8).tobytes(), np.ascontiguousarray(length_rb).tobytes()]
        if with_alleles:
            parts.append(alleles_r[block].astype(np.uint8).tobytes())
    return b"".join(parts)


def _biallelic(data: GenotypeData, first: int, stop: int) -> Iterator[tuple[memoryview, np.ndarray, np.ndarray]]:
    samples = data.n_haplotypes // 2
    most = _most_bytes(samples)
    threads = numba.get_num_threads()
    step = max(1, _CHUNK_BYTES // most)
    chunks = [(at, min(at + step, stop)) for at in range(first, stop, step)]
    nothing = np.zeros((0, 0), dtype=np.uint64)

    def encode(chunk: tuple[int, int]) -> tuple[memoryview, np.ndarray, np.ndarray]:
        low, high = chunk
        out = np.empty((high - low) * most, dtype=np.uint8)
        types, lengths = np.empty(high - low, dtype=np.uint8), np.empty(high - low, dtype=np.uint32)
        missing_lw = nothing if data.missing_lw is None else data.missing_lw[low:high]
        end = _encode(data.bits_lw[low:high], missing_lw, samples, data.phased, out, types, lengths)
        if end < 0:
            raise half_missing(data, low - end - 1)
        return out[:end].data, types, lengths

    if threads == 1 or len(chunks) == 1:
        yield from map(encode, chunks)
        return
    with ThreadPoolExecutor(threads) as pool:
        for begin in range(0, len(chunks), 2 * threads):
            yield from pool.map(encode, chunks[begin : begin + 2 * threads])


def half_missing(data: GenotypeData, row: int) -> InputError:
    """What to say of the first genotype in `row` with one allele missing."""
    assert data.missing_lw is not None
    lost_n = bits.unpack(data.missing_lw[row : row + 1], data.n_haplotypes)[0]
    s = int(np.flatnonzero(lost_n[0::2] != lost_n[1::2])[0])
    return InputError(
        "genotypes called or missing as a whole",
        f"one allele of {data.sample_ids[s]} missing",
        f"{data.contig[row]}:{data.position_bp[row]}",
        "BCF, which holds half-called genotypes",
    )


def _most_bytes(samples: int) -> int:
    """Of one biallelic record: calls as they are and everybody heterozygous (a list is shorter)."""
    return (samples + 3) // 4 + samples // 8 + 1 + 16


@numba.njit(cache=True, nogil=True)
def _put_varint(out: Any, at: Any, value: Any) -> Any:
    while value > 127:
        out[at] = np.uint8((value & 127) | 128)
        value >>= 7
        at += 1
    out[at] = np.uint8(value)
    return at + 1


@numba.njit(cache=True, nogil=True)
def _put_list(out: Any, at: Any, sample_i: Any, call_i: Any, count: Any, samples: Any) -> Any:
    """A difflist with calls (section 2.3.1)."""
    at = _put_varint(out, at, count)
    if count == 0:
        return at
    id_bytes = 1 if samples <= 1 << 8 else 2 if samples <= 1 << 16 else 3 if samples <= 1 << 24 else 4
    groups = (count + 63) // 64
    for g in range(groups):
        for b in range(id_bytes):
            out[at] = np.uint8((sample_i[64 * g] >> (8 * b)) & 255)
            at += 1
    sizes = at
    at += groups - 1
    for i in range(0, count, 4):
        value = 0
        for j in range(min(4, count - i)):
            value |= np.int64(call_i[i + j]) << (2 * j)
        out[at] = np.uint8(value)
        at += 1
    for g in range(groups):
        begin = at
        for i in range(64 * g + 1, min(64 * g + 64, count)):
            at = _put_varint(out, at, sample_i[i] - sample_i[i - 1])
        if g < groups - 1:
            out[sizes + g] = np.uint8(at - begin - 63)
    return at


@numba.njit(cache=True, nogil=True)
def _count(x: Any) -> Any:
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@numba.njit(cache=True, nogil=True)
def _lowest(x: Any) -> Any:
    """Place of the lowest set bit."""
    return _count((x & (~x + _ONE)) - _ONE)


@numba.njit(cache=True, nogil=True)
def _encode(bits_lw: Any, missing_lw: Any, samples: Any, phased: Any, out: Any, types: Any, lengths: Any) -> Any:
    """Records of two alleles into `out`; the end, or -1 - the row with a half-missing call."""
    at = 0
    words = bits_lw.shape[1]
    listed = np.empty(samples // _MOST_LISTED + 1, dtype=np.int64)
    called = np.empty(samples // _MOST_LISTED + 1, dtype=np.uint8)
    last = _EVEN
    if samples % 32:
        last = _EVEN & ((_ONE << np.uint64(2 * (samples % 32))) - _ONE)
    for row in range(bits_lw.shape[0]):
        begin = at
        not_ref, not_alt, hets = 0, 0, 0
        for w in range(words):
            x = bits_lw[row, w]
            here = last if w == words - 1 else _EVEN
            low, high = x & here, (x >> _ONE) & here
            lost = np.uint64(0)
            if missing_lw.size:
                lost = missing_lw[row, w] & here
                if lost != (missing_lw[row, w] >> _ONE) & here:
                    return -1 - row
            not_ref += _count(low | high | lost)
            not_alt += _count((here & ~(low & high)) | lost)
            hets += _count(low ^ high)
        kind = 0
        if not_ref * _MOST_LISTED <= samples:
            kind = _TYPE_FEW_ALT
        elif not_alt * _MOST_LISTED <= samples:
            kind = _TYPE_FEW_REF
        if kind == 0:
            for w in range(words):
                x = bits_lw[row, w]
                here = last if w == words - 1 else _EVEN
                low, high = x & here, (x >> _ONE) & here
                code = (low ^ high) | ((low & high) << _ONE)
                if missing_lw.size:
                    lost = missing_lw[row, w] & here
                    code |= lost | (lost << _ONE)
                for b in range(min(8, (samples + 3) // 4 - 8 * w)):
                    out[at] = np.uint8((code >> np.uint64(8 * b)) & np.uint64(255))
                    at += 1
        else:
            count = 0
            for w in range(words):
                x = bits_lw[row, w]
                here = last if w == words - 1 else _EVEN
                low, high = x & here, (x >> _ONE) & here
                lost = missing_lw[row, w] & here if missing_lw.size else np.uint64(0)
                left = (low | high | lost) if kind == _TYPE_FEW_ALT else (here & ~(low & high)) | lost
                while left:
                    place = _lowest(left)
                    bit = _ONE << np.uint64(place)
                    listed[count] = 32 * w + place // 2
                    called[count] = 3 if lost & bit else 2 if low & high & bit else 1 if (low ^ high) & bit else 0
                    count += 1
                    left &= left - _ONE
            at = _put_list(out, at, listed, called, count, samples)
        if phased and hets:
            kind |= _PHASE
            held, filled = np.uint64(0), 1  # the first bit is 0: all heterozygotes are phased
            for w in range(words):
                x = bits_lw[row, w]
                here = last if w == words - 1 else _EVEN
                low = x & here
                left = low ^ ((x >> _ONE) & here)
                while left:
                    bit = left & (~left + _ONE)
                    held |= np.uint64((low & bit) != 0) << np.uint64(filled)  # 1 where the first haplotype has the ALT
                    filled += 1
                    if filled == 64:
                        for b in range(8):
                            out[at] = np.uint8((held >> np.uint64(8 * b)) & np.uint64(255))
                            at += 1
                        held, filled = np.uint64(0), 0
                    left ^= bit
            for b in range((filled + 7) // 8):
                out[at] = np.uint8((held >> np.uint64(8 * b)) & np.uint64(255))
                at += 1
        types[row] = kind
        lengths[row] = at - begin
    return at


def _several_alts(data: GenotypeData, first: int, stop: int) -> tuple[memoryview, np.ndarray, np.ndarray]:
    """One record of several ALT alleles (section 2.3.3): the calls as if all were ALT 1, then who has another.

    In NumPy: such records are few.
    """
    alts = stop - first
    allele_n = np.zeros(data.n_haplotypes, dtype=np.int64)
    for alt in range(alts):
        allele_n += (alt + 1) * bits.unpack(data.bits_lw[first + alt : first + alt + 1], data.n_haplotypes)[0]
    one_s, two_s = allele_n[0::2], allele_n[1::2]
    call_s = (one_s > 0).astype(np.uint8) + (two_s > 0)
    if data.missing_lw is not None:
        lost_n = bits.unpack(data.missing_lw[first : first + 1], data.n_haplotypes)[0]
        if (lost_n[0::2] != lost_n[1::2]).any():
            raise half_missing(data, first)
        call_s[lost_n[0::2] == 1] = 3
    low_s, high_s = np.minimum(one_s, two_s), np.maximum(one_s, two_s)
    padded = np.zeros(-(-len(call_s) // 4) * 4, dtype=np.uint8)
    padded[: len(call_s)] = call_s
    made = [(padded.reshape(-1, 4) << np.array([0, 2, 4, 6], dtype=np.uint8)).sum(axis=1, dtype=np.uint8).tobytes()]
    other_ref = call_s == 1, high_s > 1  # REF with an ALT beyond the first
    other_alt = call_s == 2, high_s > 1
    modes, patches = 0, []
    for shift, (among, other) in ((0, other_ref), (4, other_alt)):
        chosen = other[among]
        if not chosen.any():
            modes |= 15 << shift
            continue
        patches.append(np.packbits(chosen, bitorder="little").tobytes())
        who = among & other
        if shift == 0:
            width = 0 if alts == 2 else 1 if alts == 3 else 2 if alts <= 5 else 4
            patches.append(_fixed_width(high_s[who] - 2, width))
        elif alts == 2:
            patches.append(_fixed_width((low_s[who] == 2).astype(np.int64), 1))
        else:
            width = 2 if alts <= 4 else 4
            patches.append(_fixed_width(np.stack([low_s[who] - 1, high_s[who] - 1], axis=1).ravel(), width))
    kind = 0
    if patches:
        kind = _SEVERAL_ALTS
        made += [bytes([modes]), *patches]
    het_s = (one_s != two_s) & (call_s != 3)
    if data.phased and het_s.any():
        kind |= _PHASE
        swapped = np.concatenate([[False], (one_s > two_s)[het_s]])
        made.append(np.packbits(swapped, bitorder="little").tobytes())
    body = b"".join(made)
    return memoryview(body), np.array([kind], dtype=np.uint8), np.array([len(body)], dtype=np.uint32)


def _fixed_width(values: np.ndarray, width: int) -> bytes:
    """Packed array of `width` bits each, lowest first."""
    flat = (values[:, None] >> np.arange(width)) & 1
    return np.packbits(flat.astype(np.uint8).ravel(), bitorder="little").tobytes()
