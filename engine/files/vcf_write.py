"""Write packed bits as BCF or bgzipped VCF with an index, whole or absent, block of sites by block of sites.

The genotypes of a block are laid out as one byte matrix; only the few bytes before them are made record by record.
Compression is pysam's BGZF, the index is bcftools' (both htslib). Layouts: VCF 4.3 specification, sections 1 and 6.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pysam
import pysam.bcftools

from engine import __version__
from engine.atomic import atomic_path
from engine.errors import InputError, UsageError
from engine.files import genotypes
from engine.files.genotypes import GenotypeData

_TBI_LIMIT = 2**29  # the .tbi index ends here; longer contigs get a .csi
_OWN_KEYS = ("##fileformat", "##contig", "##INFO", "##FORMAT", "##FILTER", "#CHROM")
_MISSING_FLOAT = struct.pack("<I", 0x7F800001)


def write_vcf(
    path: str | Path,
    data: GenotypeData,
    *,
    header_lines: Sequence[str] = (),
    contigs: Mapping[str, int] | None = None,
    assembly: str | None = None,
) -> None:
    """Write `data` to `path` (.bcf with .csi, .vcf.gz with .tbi or, beyond 512 Mbp, .csi).

    VCFv4.3 with FORMAT GT and INFO AC, AN, AF. Rows of a split multiallelic (`alt_index` 1, 2, ..., in order, same position,
    REF and ID) are joined again where no haplotype carries two of them and all rows miss the same genotypes; else they are
    written as separate records of one ALT. Haploid samples have one allele; a diploid genotype of which nothing is
    called is `./.`, half-called ones are `0|.`. Nothing is written on error, and an index of a former file is removed.

    Args:
        header_lines: extra `##key=value` lines, written after the engine's own.
        contigs: length in bp by contig; default `data.contig_length`.
        assembly: genome build; default `data.assembly`.

    Raises:
        UsageError: another suffix, or a header line that is no `##key=value` or would define a contig, INFO, FORMAT, FILTER.
        InputError: unsorted sites, or an allele, ID, contig or sample name that the format cannot hold, with the site.
    """
    path = Path(path)
    if not path.name.endswith((".bcf", ".vcf.gz")):
        raise UsageError("a path ending in .bcf or .vcf.gz", path.name, "write_vcf")
    is_bcf = path.name.endswith(".bcf")
    lengths = dict(data.contig_length if contigs is None else contigs)
    _check(data, path)
    names = [*lengths, *(name for name in dict.fromkeys(data.contig.tolist()) if name not in lengths)]
    header = _header(data, header_lines, names, lengths, assembly or data.assembly)
    furthest = max([*lengths.values(), int(data.position_bp.max(initial=0))], default=0)
    suffix = ".csi" if is_bcf or furthest >= _TBI_LIMIT else ".tbi"
    index_path = path.with_name(path.name + suffix)
    with atomic_path(index_path) as partial_index, atomic_path(path) as partial:
        with pysam.BGZFile(str(partial), "wb", None) as stream:
            if is_bcf:
                text = header.encode() + b"\0"
                stream.write(b"BCF\2\2" + struct.pack("<I", len(text)) + text)
                _write_blocks_bcf(stream, data, {name: k for k, name in enumerate(names)})
            else:
                stream.write(header.encode())
                _write_blocks_text(stream, data)
        flag = "-c" if suffix == ".csi" else "-t"
        try:
            pysam.bcftools.index(flag, "-f", "-o", str(partial_index), str(partial))
        except pysam.SamtoolsError as fault:
            raise InputError("a file that can be indexed", str(fault), path) from None
        for old in (".csi", ".tbi"):
            path.with_name(path.name + old).unlink(missing_ok=True)


def _header(
    data: GenotypeData, extra: Sequence[str], names: list[str], lengths: Mapping[str, int], assembly: str | None
) -> str:
    for line in extra:
        if re.fullmatch(r"##[^=\s]+=\S.*", line) is None or line.startswith(_OWN_KEYS):
            raise UsageError("an extra header line ##key=value", repr(line[:80]), "write_vcf")
    build = re.sub(r"[\s,<>\"=]+", "_", assembly) if assembly else None
    lines = [
        "##fileformat=VCFv4.3",
        '##FILTER=<ID=PASS,Description="All filters passed">',
        f"##source=engine {__version__}",
    ]
    if build:
        lines.append(f"##reference={build}")
    for name in names:
        length = f",length={lengths[name]}" if name in lengths else ""
        lines.append(f"##contig=<ID={name}{length}{f',assembly={build}' if build else ''}>")
    lines += [
        '##INFO=<ID=AC,Number=A,Type=Integer,Description="Allele count in genotypes, for each ALT allele">',
        '##INFO=<ID=AN,Number=1,Type=Integer,Description="Total number of alleles in called genotypes">',
        '##INFO=<ID=AF,Number=A,Type=Float,Description="Allele frequency, for each ALT allele">',
        '##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">',
        *extra,
    ]
    columns = ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO"]
    if data.sample_ids:
        columns += ["FORMAT", *data.sample_ids]
    return "\n".join([*lines, "\t".join(columns)]) + "\n"


def _check(data: GenotypeData, path: Path) -> None:
    """What the format cannot hold, before anything is written."""
    genotypes.check_sorted(data.contig, data.position_bp, path)
    if data.n_sites and (data.position_bp.min() < 0 or data.position_bp.max() > 2**31 - 2):
        raise InputError(
            "positions from 0 to 2147483646", f"{data.position_bp.min()} to {data.position_bp.max()}", path
        )
    if len(set(data.sample_ids)) != len(data.sample_ids):
        raise InputError("distinct sample names", "one twice", path)
    for name in data.sample_ids:
        if not name or re.search(r"[\t\n\r\0]", name) or name != name.strip():
            raise InputError("sample names without tabs and outer blanks", repr(name), path)
    for name in dict.fromkeys(data.contig.tolist()):
        if re.fullmatch(r"[0-9A-Za-z!#$%&+./:;?@^_|~-][0-9A-Za-z!#$%&*+./:;=?@^_|~-]*", name) is None:
            raise InputError("a contig name of VCF 4.3, section 1.4.7", repr(name), path)
    text = re.compile(r"[^\s\0]+")
    ref = re.compile(r"[A-Za-z]+")
    for at in range(data.n_sites):
        if ref.fullmatch(data.ref[at]) is None or text.fullmatch(data.id[at]) is None:
            raise InputError(
                "REF of bases and an ID without blanks", f"{data.ref[at]!r}, {data.id[at]!r}", _site(data, at, path)
            )
        if text.fullmatch(data.alt[at]) is None or "," in data.alt[at]:
            raise InputError("one ALT allele without blanks", repr(data.alt[at]), _site(data, at, path))


def _site(data: GenotypeData, at: int, path: Path) -> str:
    return f"{path}, {data.contig[at]}:{data.position_bp[at]}"


def _pairs(data: GenotypeData) -> tuple[np.ndarray, np.ndarray]:
    """First haplotype of every sample (S,), and whether it has a second (S,)."""
    first = data.haplotypes_of_sample[:-1]
    return first, np.diff(data.haplotypes_of_sample) == 2


def _write_blocks_bcf(stream: pysam.BGZFile, data: GenotypeData, contig_index: Mapping[str, int]) -> None:
    """Dictionary of strings, in order of the header: PASS 0, AC 1, AN 2, AF 3, GT 4."""
    first, second = _pairs(data)
    samples = len(first)
    ploidy = 2 if second.any() else 1
    # (allele + 1) << 1 | phase; 0 = missing; the phase stands at the second allele (section 6.3.3)
    code = np.zeros(256, dtype=np.uint8)
    code[: genotypes.MAX_ALTS + 1] = (np.arange(genotypes.MAX_ALTS + 1) + 1) << 1
    head = b"\x11\x04" + bytes([ploidy << 4 | 1])
    row = 0
    for block in genotypes.joined_blocks(data):
        rows = len(block.records)
        coded_bn = code[block.allele_bn]
        gt_bsp = np.full((rows, samples, ploidy), 0x81, dtype=np.uint8)  # end of vector: a haploid call
        gt_bsp[:, :, 0] = coded_bn[:, first]
        if ploidy == 2:
            one, two = gt_bsp[:, :, 0][:, second], coded_bn[:, first[second] + 1]
            gt_bsp[:, second, 1] = two | _phase(one, two, 0, data.phased)
        body = gt_bsp.reshape(rows, -1)
        parts: list[bytes] = []
        for k, record in enumerate(block.records):
            shared = _shared(data, record, contig_index, int(block.called_b[k]), block.row_count, row, samples)
            row += record.last - record.first
            individual = len(head) + body.shape[1] if samples else 0
            parts.append(struct.pack("<II", len(shared), individual))
            parts.append(shared)
            if samples:
                parts.append(head)
                parts.append(body[k].tobytes())
        stream.write(b"".join(parts))
        row = 0


def _phase(one: np.ndarray, two: np.ndarray, missing: int, phased: bool) -> np.ndarray:
    """1 where a pair is written with '|': all but wholly missing ones; only half-called ones where data are unphased."""
    a, b = one == missing, two == missing
    return (~(a & b) if phased else a ^ b).astype(np.uint8)


def _text_value(text: str) -> bytes:
    raw = text.encode()
    if len(raw) < 15:
        return bytes([len(raw) << 4 | 7]) + raw
    if len(raw) < 128:
        return b"\xf7\x11" + bytes([len(raw)]) + raw
    return b"\xf7\x13" + struct.pack("<i", len(raw)) + raw


def _shared(
    data: GenotypeData,
    record: genotypes.Record,
    contig_index: Mapping[str, int],
    called: int,
    row_count: np.ndarray,
    row: int,
    samples: int,
) -> bytes:
    at = record.first
    alts = [] if data.alt[at] == "." else data.alt[at : record.last].tolist()
    counts = row_count[row : row + len(alts)]
    n_info = 3 if alts else 1
    parts = [
        struct.pack("<iii", contig_index[data.contig[at]], int(data.position_bp[at]) - 1, len(data.ref[at])),
        _MISSING_FLOAT,
        struct.pack("<HHI", n_info, 1 + len(alts), (1 << 24 if samples else 0) | samples),
        b"\x07" if data.id[at] == "." else _text_value(data.id[at]),
        _text_value(data.ref[at]),
        *(_text_value(alt) for alt in alts),
        b"\x11\x00",  # FILTER: PASS
    ]
    if alts:
        parts.append(b"\x11\x01" + bytes([len(alts) << 4 | 3]) + counts.astype("<i4").tobytes())
    parts.append(b"\x11\x02\x13" + struct.pack("<i", called))
    if alts:
        share = _frequency(counts, called).astype("<f4").tobytes() if called else _MISSING_FLOAT * len(alts)
        parts.append(b"\x11\x03" + bytes([len(alts) << 4 | 5]) + share)
    return b"".join(parts)


def _frequency(counts: np.ndarray, called: int) -> np.ndarray:
    return counts / called


def _write_blocks_text(stream: pysam.BGZFile, data: GenotypeData) -> None:
    first, second = _pairs(data)
    samples = len(first)
    # every sample has "a|b<TAB>" or "a<TAB>", so that all rows are equally long and columns are fixed
    width_s = np.where(second, 4, 2)
    start_s = np.concatenate([[0], np.cumsum(width_s)])[:-1].astype(np.int64)
    length = int(width_s.sum())
    code = np.full(256, ord("."), dtype=np.uint8)
    code[: genotypes.MAX_ALTS + 1] = np.arange(genotypes.MAX_ALTS + 1) + ord("0")
    separators = np.array([ord("/"), ord("|")], dtype=np.uint8)
    for block in genotypes.joined_blocks(data):
        rows = len(block.records)
        text_bt = np.full((rows, length), ord("\t"), dtype=np.uint8)
        coded_bn = code[block.allele_bn]
        text_bt[:, start_s] = coded_bn[:, first]
        if second.any():
            one, two = coded_bn[:, first[second]], coded_bn[:, first[second] + 1]
            text_bt[:, start_s[second] + 1] = separators[_phase(one, two, ord("."), data.phased)]
            text_bt[:, start_s[second] + 2] = two
        if samples:
            text_bt[:, -1] = ord("\n")
        parts: list[bytes] = []
        row = 0
        for k, record in enumerate(block.records):
            at, alts = record.first, record.last - record.first
            counts = block.row_count[row : row + alts]
            row += alts
            called = int(block.called_b[k])
            if data.alt[at] == ".":
                alt, info = ".", f"AN={called}"
            else:
                alt = ",".join(data.alt[at : record.last].tolist())
                share = [f"{f:.6g}" for f in _frequency(counts, called)] if called else ["."] * alts
                info = f"AC={','.join(map(str, counts.tolist()))};AN={called};AF={','.join(share)}"
            fixed = f"{data.contig[at]}\t{data.position_bp[at]}\t{data.id[at]}\t{data.ref[at]}\t{alt}\t.\tPASS\t{info}"
            parts.append((fixed + ("\tGT\t" if samples else "\n")).encode())
            if samples:
                parts.append(text_bt[k].tobytes())
        stream.write(b"".join(parts))
