"""VCF and BCF to packed bits at the speed of inflating them: pieces of the file are walked by compiled code, which checks
every bound and decodes what is plain; all else is decoded by cyvcf2, record by record, after `vcf_structure` has checked it.

The answer is that of `vcf_cyvcf2`. The first records of a file and of each contig are decoded both ways and compared. A file
that is damaged, out of order, or unusual as a whole raises `Irregular`: who reads it the other way gets the sentence that
says what is wrong. Held in memory: the planes, and some 64 MiB.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from engine.errors import InputError
from engine.files import vcf_cyvcf2, vcf_fast_bcf, vcf_fast_cells, vcf_fast_text, vcf_header, vcf_structure
from engine.files import vcf_fast_table as t
from engine.files.bgzf import FRONT, PAD, Irregular, pieces
from engine.files.vcf_cyvcf2 import Read
from engine.files.vcf_fast_rows import Rows
from engine.files.vcf_header import Header
from engine.files.vcf_structure import Structure

__all__ = ["Irregular", "read"]

_MAX_HEADER = 256 << 20
_KINDS = {
    "Integer": vcf_fast_cells.INTEGER,
    "Float": vcf_fast_cells.FLOAT,
    "String": vcf_fast_cells.TEXT,
    "Character": vcf_fast_cells.TEXT,
}


def read(path: Path, region: str | None, samples: Sequence[str] | None, threads: int) -> Read:
    """What `vcf_cyvcf2.read` gives.

    Raises:
        Irregular: the file cannot be read, or not by this way.
    """
    with closing(_Bytes(path, threads)) as source:
        kind, header, raw_header = _header(source, path)
        names, keep = header.samples, None
        if samples is not None:
            place = {name: k for k, name in enumerate(names)}
            if not samples or len(set(samples)) != len(samples) or not place.keys() >= set(samples):
                raise Irregular("samples that the file has not")
            names, keep = list(samples), np.array([place[name] for name in samples], dtype=np.int64)
        try:
            bounds = vcf_cyvcf2.parse_region(region, header.contigs, path)
        except InputError:
            raise Irregular("a region that cannot be used") from None
        made = Rows(Structure(kind, header), raw_header, keep, bounds)
        step = _bcf_step(source, made) if kind == "bcf" else _text_step(source, made)
        full_at, tries = -1, 0
        while True:
            status = step()
            if status == t.FULL:
                # one record may lack room for its rows, its texts and its bytes in turn, but not more often
                tries = tries + 1 if source.at == full_at else 0
                if tries > 8:
                    raise Irregular("a record for which no room can be made")
                full_at = source.at
                made.drain(source.share)
            elif status == t.REJECTED:
                raise Irregular(f"record {made.state[t.COUNT] + 1}")
            elif not source.more():
                if kind == "bcf" or source.at == source.end or source.buffer[source.end - 1] == ord("\n"):
                    break
                if source.buffer[source.end - 1] == ord("\r"):
                    raise Irregular("a last line that ends with half a line end")
                source.buffer[source.end] = ord("\n")  # the last line may lack it
                source.end += 1
        if source.at != source.end:
            raise Irregular("a truncated record")
        made.drain(source.share)
        return made.finish(names)


class _Bytes:
    """Bytes `buffer[at:end]` of a file that have not been used, and how to get more behind them."""

    def __init__(self, path: Path, threads: int) -> None:
        self._pieces = pieces(path, threads)
        self.buffer, self.at, self.end = np.empty(FRONT + PAD, dtype=np.uint8), FRONT, FRONT
        self.size = max(1, path.stat().st_size) if path.is_file() else 1
        self.before, self.used = 0, 0  # bytes of the file that the last piece began and ended with

    def more(self) -> bool:
        """Get at least as many bytes as are left; False at the end of the file."""
        left = self.buffer[self.at : self.end].copy()  # the next piece may come in the same array
        found = next(self._pieces, None)
        if found is None:
            return False
        self.before, (array, end, self.used) = self.used, found
        if len(left) <= FRONT:
            array[FRONT - len(left) : FRONT] = left
            self.buffer, self.at, self.end = array, FRONT - len(left), end
            return True
        if len(left) > t.MAX_RECORD + _MAX_HEADER:
            raise Irregular("a record without end")
        parts, length = [left, array[FRONT:end].copy()], end - FRONT
        while length < len(left) and (found := next(self._pieces, None)) is not None:
            array, end, self.used = found
            parts.append(array[FRONT:end].copy())
            length += end - FRONT
        self.buffer = np.concatenate([*parts, np.zeros(PAD, dtype=np.uint8)])
        self.at, self.end = 0, len(self.buffer) - PAD
        return True

    @property
    def share(self) -> float:
        """Share of the file that lies before `at`, about."""
        left = (self.end - self.at) / max(1, self.end - FRONT)
        return max(self.used - left * (self.used - self.before), 1) / self.size

    def need(self, count: int) -> None:
        """Have at least `count` bytes."""
        while self.end - self.at < count:
            if not self.more():
                raise Irregular("a truncated header")

    def close(self) -> None:
        self._pieces.close()


def _header(source: _Bytes, path: Path) -> tuple[str, Header, bytes]:
    """Kind, header, and its bytes; `source` then stands at the first record."""
    source.need(9)
    start = source.buffer[source.at : source.at + 9].tobytes()
    try:
        if start[:3] == b"BCF":
            (length,) = struct.unpack_from("<I", start, 5)
            if start[3:5] not in (b"\2\1", b"\2\2") or length > _MAX_HEADER:
                raise Irregular("a header of other version or length")
            source.need(9 + length)
            raw = source.buffer[source.at : source.at + 9 + length].tobytes()
            source.at += len(raw)
            return "bcf", vcf_header.parse(vcf_structure.bcf_header_lines(raw[9:]), path), raw
        at = 0
        while True:
            raw = source.buffer[source.at : source.end].tobytes()
            while (end := raw.find(b"\n", at)) >= 0 and raw[at : at + 2] == b"##":
                at = end + 1
            if end >= 0:
                break
            if len(raw) > _MAX_HEADER or not source.more():
                raise Irregular("a header without end")
        if raw[at : at + 1] != b"#" or end > _MAX_HEADER:
            raise Irregular("a header without #CHROM")
        raw = raw[: end + 1]
        source.at += len(raw)
        lines = [line.rstrip(b"\r\n") for line in raw.split(b"\n")[:-1]]
        return "vcf", vcf_header.parse(lines, path), raw
    except InputError:
        raise Irregular("a header that cannot be used") from None


def _bcf_step(source: _Bytes, made: Rows) -> Callable[[], int]:
    header, state = made.structure.header, made.state
    if not _is_regular(header):
        raise Irregular("a header whose dictionary is out of order")
    strings, contigs = (
        np.zeros(max(index, default=-1) + 1, dtype=np.uint8)
        for index in (header.string_of_index, header.contig_of_index)
    )
    strings[list(header.string_of_index)] = 1
    contigs[list(header.contig_of_index)] = 1
    gt_key = next((index for index, name in header.string_of_index.items() if name == "GT"), -1)
    if made.bounds is not None:
        of_name = {name: index for index, name in header.contig_of_index.items()}
        state[t.REGION : t.LAST + 1] = of_name.get(made.bounds[0], -2), *made.bounds[1:]

    def step() -> int:
        state[t.AT], state[t.END] = source.at, source.end
        status = vcf_fast_bcf.walk(source.buffer, state, len(header.samples), gt_key, strings, contigs, made.out)
        source.at = int(state[t.AT])
        return int(status)

    return step


def _text_step(source: _Bytes, made: Rows) -> Callable[[], int]:
    header, state = made.structure.header, made.state
    gt = header.definitions.get(("FORMAT", "GT"), {})
    if header.n_columns == 9 or gt.get("Type", "String") != "String":
        raise Irregular("a FORMAT column without samples, or GT that is no text")
    samples = len(header.samples)
    known = vcf_fast_text.Known(
        contig=np.zeros(vcf_fast_text.MOST_NAME + 1, dtype=np.uint8),
        region=np.zeros(vcf_fast_text.MOST_NAME + 1, dtype=np.uint8),
        filters=np.zeros((16, vcf_fast_text.MOST_FILTER + 1), dtype=np.uint8),
        formats=np.zeros((8, vcf_fast_text.MOST_NAME + 1), dtype=np.uint8),
        format_types=np.zeros((8, vcf_fast_cells.MOST_KEYS + 1), dtype=np.uint8),
        gt=np.zeros(2 * samples + 128, dtype=np.uint8),
    )
    for k, text in enumerate((b"PASS", b".")):
        known.filters[k, : len(text) + 1] = [len(text), *text]
    if made.bounds is not None:
        name = made.bounds[0].encode()
        if len(name) > vcf_fast_text.MOST_NAME:
            raise Irregular("a contig of a long name")
        known.region[: len(name) + 1] = [len(name), *name]
        state[t.FIRST], state[t.LAST] = made.bounds[1:]
    learned = 0

    def step() -> int:
        nonlocal learned
        while True:
            state[t.AT], state[t.END] = source.at, source.end
            status = int(vcf_fast_text.walk(source.buffer, state, samples, known, made.out))
            source.at = int(state[t.AT])
            if status != t.NEW_FORMAT:
                return status
            text = source.buffer[state[t.TEXT_AT] : state[t.TEXT_END]].tobytes()
            if not 0 < len(text) <= vcf_fast_text.MOST_NAME:
                raise Irregular("an empty or a long FORMAT")
            place = learned % len(known.formats)
            known.formats[place, : len(text) + 1] = [len(text), *text]
            known.format_types[place] = _kinds(text, header)
            state[t.BOTH_LEFT] = max(1, state[t.BOTH_LEFT])
            learned += 1

    return step


def _kinds(text: bytes, header: Header) -> np.ndarray:
    """Entry of `Known.format_types` for a FORMAT: 0 keys for one that is left to cyvcf2."""
    kinds = np.zeros(vcf_fast_cells.MOST_KEYS + 1, dtype=np.uint8)
    keys = text.decode("latin-1").split(":")
    if keys[0] != "GT" or len(set(keys)) != len(keys) or len(keys) > vcf_fast_cells.MOST_KEYS:
        return kinds
    for k, key in enumerate(keys[1:], start=1):
        kind = header.definitions.get(("FORMAT", key), {}).get("Type", "String")
        if kind not in _KINDS or vcf_structure.FORMAT_KEY.fullmatch(key.encode("latin-1")) is None:
            return kinds
        kinds[k] = _KINDS[kind]
    kinds[0] = len(keys)
    return kinds


def _is_regular(header: Header) -> bool:
    """Whether every entry of BCF's dictionaries has its own IDX or none has one, so that htslib cannot count otherwise."""
    for keys in (("##INFO=", "##FORMAT=", "##FILTER="), ("##contig=",)):
        if len({",IDX=" in line for line in header.lines if line.startswith(keys)}) > 1:
            return False
    index_of_name = {name: str(index) for index, name in header.string_of_index.items()}
    given = [(name, fields["IDX"]) for (_, name), fields in header.definitions.items() if "IDX" in fields]
    return header.string_of_index[0] == "PASS" and all(index_of_name.get(name) == index for name, index in given)
