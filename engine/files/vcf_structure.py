"""Structure of VCF and BCF files, checked in Python before htslib sees a byte, so that a damaged file is a sentence and not
a crash of the interpreter.

Sections refer to the VCF 4.3 specification (hts-specs, VCFv4.3.pdf). `inspect` reads the whole file once, holding one
record at a time. It leaves the genotypes themselves to `engine.files.vcf`.
"""

from __future__ import annotations

import gzip
import re
import struct
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

import numpy as np

from engine.errors import InputError
from engine.files import vcf_header
from engine.files.vcf_header import Header

_MAX_HEADER = 256 << 20
_MAX_RECORD = 256 << 20  # bytes of one record; a million samples with a short FORMAT have about 4 MB
_MAX_POSITION = 2**31 - 2
_EOF_BLOCK = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")  # section 4 of SAMv1.pdf
_OTHER_FORMATS = {b"PK": "zip", b"BZh": "bzip2", b"\x1f\x9d": "compress (.Z)", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}

_CHROM = re.compile(rb"<?[0-9A-Za-z!#$%&+./:;?@^_|~-][0-9A-Za-z!#$%&*+./:;=?@^_|~-]*>?")
_BASES = re.compile(rb"[ACGTNacgtn]+")
_IUPAC = re.compile(rb"[ACGTNRYSWKMBDHVacgtnryswkmbdhv]+")
_BREAKEND = re.compile(
    rb"[ACGTNRYSWKMBDHVacgtnryswkmbdhv.]*[\[\]][^\s\[\],]+:\d+[\[\]][ACGTNRYSWKMBDHVacgtnryswkmbdhv.]*"
)
_SINGLE = re.compile(rb"\.[ACGTNacgtn]+|[ACGTNacgtn]+\.")  # single breakends, section 5.4.9
FORMAT_KEY = re.compile(rb"[A-Za-z_](?:[0-9A-Za-z_.]|%[0-9A-F]{2})*")
_INFO_KEY = re.compile(rb"[A-Za-z_0-9][0-9A-Za-z_.]*")
_GENOTYPE = rb"[/|]?(?:\.|\d{1,4})(?:[/|](?:\.|\d{1,4}))*"


@dataclass
class Structure:
    """What `inspect` found: kind "vcf" or "bcf", the header, the number of records, remarks (one sentence each), and
    whether the whole file was seen before the deadline."""

    kind: str
    header: Header
    n_records: int = 0
    notes: list[str] = field(default_factory=list)
    complete: bool = True

    def note(self, text: str) -> None:
        if text not in self.notes and len(self.notes) < 100:
            self.notes.append(text)


def inspect(path: Path, *, thorough: bool = False, deadline: float | None = None) -> Structure:
    """Check header and records.

    Args:
        thorough: also judge what reading does not depend on (definitions, ID, QUAL, FILTER, INFO) and note it.
        deadline: `time.monotonic()` at which to stop and say so in `complete`.

    Raises:
        InputError: no such file, no VCF or BCF, or a fault that would make reading wrong, with the line or record.
    """
    try:
        with open(path, "rb") as raw:
            magic = raw.read(18)
            zipped = magic[:2] == b"\x1f\x8b"
            if zipped and magic[12:14] == b"BC" and magic[3] & 4:
                _check_end(raw, path)
    except FileNotFoundError:
        raise InputError("a VCF or BCF file", "no such file", path) from None
    except OSError as fault:
        raise InputError("a readable file", fault.strerror or str(fault), path) from None
    for mark, name in _OTHER_FORMATS.items():
        if magic.startswith(mark):
            raise InputError("plain, gzipped or bgzipped VCF, or BCF", f"a {name} file", path, "bgzip it")
    if not magic:
        raise InputError("a VCF or BCF file", "an empty file", path)
    try:
        with gzip.open(path, "rb") if zipped else open(path, "rb") as stream:
            start = stream.read(3)
            stream.seek(0)
            walk = _walk_bcf if start == b"BCF" else _walk_text
            return walk(cast(IO[bytes], stream), path, thorough, deadline)
    except (EOFError, zlib.error, gzip.BadGzipFile) as fault:
        raise InputError("a whole compressed file", f"damage or truncation ({fault})", path) from None
    except OSError as fault:
        raise InputError("a readable file", str(fault), path) from None


def _check_end(raw: IO[bytes], path: Path) -> None:
    raw.seek(0, 2)
    raw.seek(max(0, raw.tell() - len(_EOF_BLOCK)))
    if raw.read() != _EOF_BLOCK:
        raise InputError("a whole bgzip file", "no end-of-file block: truncated", path, "copy or make it again")


class _Order:
    """Raises where contigs are not contiguous or positions descend."""

    def __init__(self) -> None:
        self.contig: object = None
        self.position = -1
        self.seen: set[object] = set()

    def check(self, contig: object, position: int, name: str, where: str) -> None:
        if contig != self.contig:
            if contig in self.seen:
                raise InputError("each contig in one stretch", f"'{name}' again", where, "bcftools sort")
            self.seen.add(contig)
            self.contig = contig
        elif position < self.position:
            raise InputError(
                "positions in ascending order", f"{name}:{position} after {self.position}", where, "bcftools sort"
            )
        self.position = position


def _walk_text(stream: IO[bytes], path: Path, thorough: bool, deadline: float | None) -> Structure:
    lines: list[bytes] = []
    size = 0
    while True:
        line = stream.readline(_MAX_HEADER + 1)
        size += len(line)
        if size > _MAX_HEADER:
            raise InputError("a header of at most 256 MiB", "more", path)
        if not line.startswith(b"#"):
            if not lines:
                raise InputError("##fileformat=VCFv4.x in the first line", repr(line[:40].decode("latin-1")), path)
            fault = f"line {len(lines) + 1}" if line else "the end of the file"
            raise InputError("a #CHROM line after the ## lines", fault, path)
        lines.append(line.rstrip(b"\r\n"))
        if not line.startswith(b"##"):
            break
    header = vcf_header.parse(lines, path)
    made = Structure("vcf", header)
    if thorough:
        vcf_header.judge(header, made.note)
    order = _Order()
    number = len(lines)
    patterns: dict[int, re.Pattern[bytes]] = {}
    variants: set[bytes] = set()  # of the last position
    while True:
        line = stream.readline(_MAX_RECORD + 1)
        if not line:
            break
        number += 1
        if len(line) > _MAX_RECORD:
            raise InputError("records of at most 256 MiB", "a longer one", f"{path}, line {number}")
        if thorough and not line.endswith(b"\n"):
            made.note("the last line does not end with a newline")
        line = line.rstrip(b"\r\n")
        where = f"{path}, line {number}"
        if not line:
            if stream.read(1):
                raise InputError("a record", "an empty line", where)
            break
        before = order.position
        cells, alts = check_line(line, made, where, patterns, order)
        if thorough:
            vcf_header.judge_record(cells, alts, header, made.note, number)
            here = b"\t".join((cells[0], cells[1], cells[3], cells[4]))
            if order.position != before:
                variants.clear()
            if here in variants:
                made.note(f"line {number} repeats a variant")
            variants.add(here)
        made.n_records += 1
        if deadline is not None and made.n_records % 64 == 0 and time.monotonic() > deadline:
            made.complete = False
            break
    return made


def check_line(
    line: bytes, made: Structure, where: str, patterns: dict[int, re.Pattern[bytes]], order: _Order | None
) -> tuple[list[bytes], int]:
    """One line of text without its end: its first ten cells, the last of them all samples, and the number of ALT alleles.

    `patterns` is kept from line to line; without `order` the line is judged alone.
    """
    columns, n = made.header.n_columns, len(made.header.samples)
    found = line.count(b"\t") + 1
    if found != columns:
        raise InputError(f"{columns} columns", f"{found}", where)
    if b"\0" in line:
        raise InputError("text", "a zero byte", where)
    cells = line.split(b"\t", 9)
    contig, position, alts = _check_site(cells, made, where)
    if order is not None:
        order.check(contig, position, contig.decode("latin-1"), where)
    if n:
        _check_samples(cells, n, where, patterns)
    return cells, alts


def _check_site(cells: list[bytes], made: Structure, where: str) -> tuple[bytes, int, int]:
    """CHROM, POS, REF and ALT (section 1.6.1); returns contig, position and number of ALT alleles."""
    contig, pos, ref, alt = cells[0], cells[1], cells[3], cells[4]
    if _CHROM.fullmatch(contig) is None:
        raise InputError("a contig name", repr(contig[:40].decode("latin-1")), where)
    if not pos.isdigit() or len(pos) > 10 or int(pos) > _MAX_POSITION:
        raise InputError("a position from 0 to 2147483646", repr(pos[:20].decode("latin-1")), where)
    if not cells[2] or b" " in cells[2]:
        raise InputError("an ID without blanks, or '.'", repr(cells[2][:40].decode("latin-1")), where)
    if _BASES.fullmatch(ref) is None:
        if _IUPAC.fullmatch(ref) is None:
            raise InputError("REF made of A, C, G, T, N", repr(ref[:20].decode("latin-1")), where)
        made.note("REF with ambiguity codes")
    if alt == b".":
        return contig, int(pos), 0
    alleles = alt.split(b",")
    for allele in alleles:
        if _BASES.fullmatch(allele) is not None or allele == b"*":
            continue
        if _IUPAC.fullmatch(allele) is not None:
            made.note("ALT with ambiguity codes")
        elif (
            allele[:1] == b"<" and allele[-1:] == b">" and len(allele) > 2 and not re.search(rb"[\s,<>]", allele[1:-1])
        ):
            made.note("symbolic ALT alleles, kept by name")
        elif _BREAKEND.fullmatch(allele) or _SINGLE.fullmatch(allele):
            made.note("breakends, kept by name")
        else:
            raise InputError("ALT of bases, *, <ID> or a breakend", repr(allele[:40].decode("latin-1")), where)
    return contig, int(pos), len(alleles)


def _check_samples(cells: list[bytes], n: int, where: str, patterns: dict[int, re.Pattern[bytes]]) -> None:
    """FORMAT keys, and the shape of every sample's cell (section 1.6.2)."""
    keys = cells[8].split(b":")
    if cells[8] != b"." and (
        any(FORMAT_KEY.fullmatch(key) is None for key in keys) or len(set(keys)) != len(keys) or b"GT" in keys[1:]
    ):
        raise InputError("FORMAT of distinct keys, GT first", repr(cells[8][:40].decode("latin-1")), where)
    rest = cells[9]
    has_gt = keys[0] == b"GT"
    if has_gt and len(keys) == 1 and len(rest) == 4 * n - 1 and _is_plain(rest):
        return
    at = len(keys) if has_gt else -len(keys)
    if at not in patterns:
        first = _GENOTYPE if has_gt else rb"[^\t:]*"
        # possessive quantifiers keep the match linear in the length of the line
        patterns[at] = re.compile(rb"%b(?::[^\t:]*+){0,%d}+" % (first, len(keys) - 1))
    cell = patterns[at]
    for sample, text in enumerate(rest.split(b"\t"), start=1):
        if cell.fullmatch(text) is None:
            raise InputError(
                f"a genotype and at most {len(keys) - 1} more values" if has_gt else f"at most {len(keys)} values",
                repr(text[:40].decode("latin-1")),
                f"{where}, sample {sample}",
            )


def _is_plain(rest: bytes) -> bool:
    """Whether all cells are three characters such as 0|1, ./. or 2/0."""
    text = np.frombuffer(rest, dtype=np.uint8)
    allele, phase, other = text[0::4], text[1::4], text[2::4]
    digits = ((allele - 48 < 10) | (allele == 46)) & ((other - 48 < 10) | (other == 46))
    return bool((digits & ((phase == 124) | (phase == 47))).all() and (text[3::4] == 9).all())


# --- BCF, section 6 ---

_WIDTH = {1: 1, 2: 2, 3: 4, 5: 4, 7: 1}


def _walk_bcf(stream: IO[bytes], path: Path, thorough: bool, deadline: float | None) -> Structure:
    start = stream.read(9)
    if len(start) < 9 or start[3:5] not in (b"\2\1", b"\2\2"):
        raise InputError("BCF version 2.1 or 2.2", repr(start[:5]), path, "bcftools view -Ob")
    (length,) = struct.unpack_from("<I", start, 5)
    if length > _MAX_HEADER:
        raise InputError("a header of at most 256 MiB", f"one that declares {length} bytes", path)
    text = stream.read(length)
    if len(text) < length:
        raise InputError(f"a header of {length} bytes", f"{len(text)} bytes: truncated", path)
    header = vcf_header.parse(bcf_header_lines(text), path)
    made = Structure("bcf", header)
    if thorough:
        vcf_header.judge(header, made.note)
    order = _Order()
    while True:
        sizes = stream.read(8)
        if not sizes:
            break
        where = f"{path}, record {made.n_records + 1}"
        if len(sizes) < 8:
            raise InputError("a whole record", "a truncated one", where)
        shared, individual = struct.unpack("<II", sizes)
        if shared < 24 or shared + individual > _MAX_RECORD:
            raise InputError("a record of 24 bytes to 256 MiB", f"{shared} + {individual} bytes", where)
        record = stream.read(shared + individual)
        if len(record) < shared + individual:
            raise InputError("a whole record", "a truncated one", where)
        try:
            chrom, position = check_record(record, shared, header)
        except (ValueError, struct.error, IndexError, KeyError) as fault:
            raise InputError("a well-formed BCF record", str(fault), where) from None
        order.check(chrom, position, header.contig_of_index[chrom], where)
        made.n_records += 1
        if deadline is not None and made.n_records % 64 == 0 and time.monotonic() > deadline:
            made.complete = False
            break
    return made


def bcf_header_lines(text: bytes) -> list[bytes]:
    return [line.rstrip(b"\r") for line in text.rstrip(b"\0").rstrip(b"\r\n").split(b"\n")]


def _typed(record: bytes, at: int, end: int) -> tuple[int, int, int]:
    """Type, number of values and offset of the first value of the typed descriptor at `at` (section 6.3.3)."""
    if at >= end:
        raise ValueError("a value beyond its block")
    kind, count = record[at] & 15, record[at] >> 4
    at += 1
    if count == 15:
        number_kind, number_count, at = _typed(record, at, end)
        if number_count != 1 or number_kind not in (1, 2, 3) or at + _WIDTH[number_kind] > end:
            raise ValueError("a count that is no integer")
        count = int.from_bytes(record[at : at + _WIDTH[number_kind]], "little", signed=True)
        at += _WIDTH[number_kind]
        if count < 0:
            raise ValueError("a negative count")
    if kind == 0:
        return 0, 0, at  # the missing value has no payload whatever its count
    if kind not in _WIDTH:
        raise ValueError(f"unknown value type {kind}")
    return kind, count, at


def _key(record: bytes, at: int, end: int, known: dict[int, str]) -> tuple[str, int]:
    kind, count, at = _typed(record, at, end)
    if count != 1 or kind not in (1, 2, 3) or at + _WIDTH[kind] > end:
        raise ValueError("a key that is no integer")
    index = int.from_bytes(record[at : at + _WIDTH[kind]], "little", signed=True)
    if index not in known:
        raise ValueError(f"key {index}, which the header does not define")
    return known[index], at + _WIDTH[kind]


def check_record(record: bytes, shared: int, header: Header) -> tuple[int, int]:
    """Bounds of every value of one record; returns contig index and 1-based position."""
    chrom, pos, _, _, n_info, n_allele, sample_format = struct.unpack_from("<iiifHHI", record, 0)
    n_sample, n_format = sample_format & 0xFFFFFF, sample_format >> 24
    if chrom not in header.contig_of_index:
        raise ValueError(f"contig number {chrom}, which the header does not define")
    if not -1 <= pos <= _MAX_POSITION:
        raise ValueError(f"position {pos + 1}")
    if n_sample != len(header.samples):
        raise ValueError(f"{n_sample} samples where the header names {len(header.samples)}")
    if n_allele < 1:
        raise ValueError("no alleles")
    at = 24
    for what in range(1 + n_allele):
        kind, count, at = _typed(record, at, shared)
        if kind not in (0, 7) or (what and count == 0):
            raise ValueError("an allele that is no text" if what else "an ID that is no text")
        if what and re.search(rb"[\0\s,]", record[at : at + count]):
            raise ValueError("an allele with blanks, commas or zero bytes")
        at += count
    kind, count, at = _typed(record, at, shared)
    at += count * _WIDTH.get(kind, 0)  # FILTER
    for _ in range(n_info):
        _, at = _key(record, at, shared, header.string_of_index)
        kind, count, at = _typed(record, at, shared)
        at += count * _WIDTH.get(kind, 0)
        if at > shared:
            raise ValueError("INFO beyond the record's shared block")
    if at != shared:
        raise ValueError(f"{shared - at} bytes left in the shared block")
    end = len(record)
    for _ in range(n_format):
        key, at = _key(record, at, end, header.string_of_index)
        kind, count, at = _typed(record, at, end)
        if key == "GT" and kind not in (0, 1, 2, 3):
            raise ValueError("GT that is no integer")
        at += count * _WIDTH.get(kind, 0) * n_sample
        if at > end:
            raise ValueError("FORMAT values beyond the record")
    if at != end:
        raise ValueError(f"{end - at} bytes left in the record")
    return chrom, pos + 1
