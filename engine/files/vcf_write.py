"""Write packed bits as BCF or bgzipped VCF with an index, whole or absent, block of sites by block of sites.

The genotypes of a block are laid out as one byte matrix; only the few bytes before them are made record by record.
Compression is in `bgzf_write`, the index is bcftools' (htslib). A file may be written in parts, which are whole BGZF blocks and
are joined by copying. Layouts: VCF 4.3 specification, sections 1 and 6.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pysam
import pysam.bcftools

from engine import __version__
from engine.atomic import atomic_path
from engine.errors import InputError, UsageError
from engine.files import genotypes
from engine.files.bgzf import EOF_BLOCK
from engine.files.bgzf_write import compressed
from engine.files.genotypes import Block, GenotypeData, Layout

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
    head = replace(
        data,
        contig_length=data.contig_length if contigs is None else dict(contigs),
        assembly=assembly or data.assembly,
    )
    layout = Layout(head, np.zeros(1, np.int64), tuple(header_lines))
    check(path, layout)
    layout = replace(layout, start_r=genotypes.record_starts(data))
    _write(Path(path), layout, compressed(_encoded(Path(path), layout, [Block(data, layout.start_r)])))


def write_part(path: str | Path, layout: Layout, blocks: Iterable[Block], place: Path) -> None:
    """Write to `place` what stands in `path` of these blocks."""
    with atomic_path(place) as partial, open(partial, "wb") as stream:
        stream.writelines(compressed(_encoded(Path(path), layout, blocks)))


def join_parts(path: str | Path, layout: Layout, places: Sequence[Path]) -> None:
    """Write `path` from the parts of all its records, in order; raises as `write_vcf`."""
    _write(Path(path), layout, places)


def _write(path: Path, layout: Layout, bodies: Iterable[bytes | Path]) -> None:
    """Header, then BGZF blocks or files of them, then the index."""
    head = layout.head
    text = header_text(head, layout.header_lines).encode()
    if is_bcf(path):
        text = b"BCF\2\2" + struct.pack("<I", len(text) + 1) + text + b"\0"
    furthest = max([*head.contig_length.values(), int(head.position_bp.max(initial=0))], default=0)
    suffix = ".csi" if is_bcf(path) or furthest >= _TBI_LIMIT else ".tbi"
    with atomic_path(path.with_name(path.name + suffix)) as partial_index, atomic_path(path) as partial:
        with open(partial, "wb") as stream:
            for body in chain(compressed([text]), bodies, [EOF_BLOCK]):
                if isinstance(body, Path):
                    genotypes.append_files(stream, [body])
                else:
                    stream.write(body)
        options = ["-c" if suffix == ".csi" else "-t", "-f", "-o", str(partial_index)]
        try:
            pysam.bcftools.index(*options, "--threads", str(numba.get_num_threads()), str(partial))
        except pysam.SamtoolsError as fault:
            raise InputError("a file that can be indexed", str(fault), path) from None
        for old in (".csi", ".tbi"):
            path.with_name(path.name + old).unlink(missing_ok=True)


def is_bcf(path: Path) -> bool:
    """BCF by its name; else bgzipped VCF."""
    return path.name.endswith(".bcf")


def header_text(head: GenotypeData, extra: Sequence[str]) -> str:
    """The header up to and with #CHROM, each line ended."""
    lines = [
        "##fileformat=VCFv4.3",
        '##FILTER=<ID=PASS,Description="All filters passed">',
        f"##source=engine {__version__}",
        *genotypes.contig_lines(head),
        '##INFO=<ID=AC,Number=A,Type=Integer,Description="Allele count in genotypes, for each ALT allele">',
        '##INFO=<ID=AN,Number=1,Type=Integer,Description="Total number of alleles in called genotypes">',
        '##INFO=<ID=AF,Number=A,Type=Float,Description="Allele frequency, for each ALT allele">',
        '##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">',
        *extra,
    ]
    columns = ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO"]
    if head.sample_ids:
        columns += ["FORMAT", *head.sample_ids]
    return "\n".join([*lines, "\t".join(columns)]) + "\n"


def check(path: str | Path, layout: Layout) -> None:
    """Raise what `write_vcf` raises, before anything is written."""
    path, data = Path(path), layout.head
    if not path.name.endswith((".bcf", ".vcf.gz")):
        raise UsageError("a path ending in .bcf or .vcf.gz", path.name, "write_vcf")
    for line in layout.header_lines:
        if re.fullmatch(r"##[^=\s]+=\S.*", line) is None or line.startswith(_OWN_KEYS):
            raise UsageError("an extra header line ##key=value", repr(line[:80]), "write_vcf")
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


def _encoded(path: Path, layout: Layout, blocks: Iterable[Block]) -> Iterator[Any]:
    """The records of all blocks, as pieces of bytes to be compressed."""
    contig_index = {name: k for k, name in enumerate(genotypes.contig_names(layout.head))}
    for block in blocks:
        if is_bcf(path):
            yield from _records_bcf(block.data, block.start_r, contig_index)
        else:
            yield from _records_text(block.data, block.start_r)


def _is_plain(data: GenotypeData) -> bool:
    """Every sample diploid, nothing missing, all phased: what generators make, and what is laid out fastest."""
    return bool(data.phased and data.missing_lw is None and data.n_haplotypes == 2 * len(data.sample_ids))


def _records_bcf(data: GenotypeData, start_r: np.ndarray, contig_index: Mapping[str, int]) -> Iterator[Any]:
    """Dictionary of strings, in order of the header: PASS 0, AC 1, AN 2, AF 3, GT 4."""
    first, second = _pairs(data)
    samples = len(first)
    ploidy = 2 if second.any() else 1
    # (allele + 1) << 1 | phase; 0 = missing; the phase stands at the second allele (section 6.3.3)
    code = np.zeros(256, dtype=np.uint8)
    code[: genotypes.MAX_ALTS + 1] = (np.arange(genotypes.MAX_ALTS + 1) + 1) << 1
    plain_n = np.resize(np.array([2, 3], dtype=np.uint8), data.n_haplotypes)
    head = b"\x11\x04" + bytes([ploidy << 4 | 1])
    for block in genotypes.joined_blocks(data, start_r):
        records = len(block.start_b) - 1
        if _is_plain(data):
            body = block.allele_bn
            body <<= np.uint8(1)
            body += plain_n
        else:
            coded_bn = code[block.allele_bn]
            gt_bsp = np.full((records, samples, ploidy), 0x81, dtype=np.uint8)  # end of vector: a haploid call
            gt_bsp[:, :, 0] = coded_bn[:, first]
            if ploidy == 2:
                one, two = gt_bsp[:, :, 0][:, second], coded_bn[:, first[second] + 1]
                gt_bsp[:, second, 1] = two | _phase(one, two, 0, data.phased)
            if data.hemizygous is not None:
                gt_bsp[np.ix_(data.hemizygous[0][block.start_b[:-1]], data.hemizygous[1], np.array([1]))] = 0x81
            body = gt_bsp.reshape(records, -1)
        individual = len(head) + body.shape[1] if samples else 0
        for k in range(records):
            shared = _shared(data, block, k, contig_index, samples)
            yield struct.pack("<II", len(shared), individual) + shared + (head if samples else b"")
            if samples:
                yield body[k]


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
    data: GenotypeData, block: genotypes.JoinedBlock, k: int, contig_index: Mapping[str, int], samples: int
) -> bytes:
    at, stop, called = int(block.start_b[k]), int(block.start_b[k + 1]), int(block.called_b[k])
    alts = [] if data.alt[at] == "." else data.alt[at:stop].tolist()
    first_row = at - int(block.start_b[0])
    counts = block.row_count[first_row : first_row + len(alts)]
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
        share = (counts / called).astype("<f4").tobytes() if called else _MISSING_FLOAT * len(alts)
        parts.append(b"\x11\x03" + bytes([len(alts) << 4 | 5]) + share)
    return b"".join(parts)


def _records_text(data: GenotypeData, start_r: np.ndarray) -> Iterator[Any]:
    first, second = _pairs(data)
    samples = len(first)
    # every sample has "a|b<TAB>" or "a<TAB>", so that all rows are equally long and columns are fixed
    width_s = np.where(second, 4, 2)
    start_s = np.concatenate([[0], np.cumsum(width_s)])[:-1].astype(np.int64)
    length = int(width_s.sum())
    code = np.full(256, ord("."), dtype=np.uint8)
    code[: genotypes.MAX_ALTS + 1] = np.arange(genotypes.MAX_ALTS + 1) + ord("0")
    separators = np.array([ord("/"), ord("|")], dtype=np.uint8)
    for block in genotypes.joined_blocks(data, start_r):
        records = len(block.start_b) - 1
        if _is_plain(data):
            text_bt = _pair_text()[block.allele_bn.view(np.uint16)].view(np.uint8)
        else:
            text_bt = np.full((records, length), ord("\t"), dtype=np.uint8)
            coded_bn = code[block.allele_bn]
            text_bt[:, start_s] = coded_bn[:, first]
            if second.any():
                one, two = coded_bn[:, first[second]], coded_bn[:, first[second] + 1]
                text_bt[:, start_s[second] + 1] = separators[_phase(one, two, ord("."), data.phased)]
                text_bt[:, start_s[second] + 2] = two
        alone_b = np.zeros(records, dtype=bool)
        if data.hemizygous is not None:
            alone_b = data.hemizygous[0][block.start_b[:-1]]
            kept_t = np.ones(length, dtype=bool)
            kept_t[np.concatenate([start_s[data.hemizygous[1]] + k for k in (1, 2)])] = False
        if samples:
            text_bt[:, -1] = ord("\n")
        for k in range(records):
            yield (_fixed(data, block, k) + ("\tGT\t" if samples else "\n")).encode()
            if samples:
                yield text_bt[k][kept_t] if alone_b[k] else text_bt[k]


def _pair_text() -> np.ndarray:
    """uint32 by two alleles as one uint16: the bytes of "a|b<TAB>"."""
    table = np.zeros(256 * (genotypes.MAX_ALTS + 1), dtype="<u4")
    for a in range(genotypes.MAX_ALTS + 1):
        for b in range(genotypes.MAX_ALTS + 1):
            table[a | b << 8] = int.from_bytes(f"{a}|{b}\t".encode(), "little")
    return table


def _fixed(data: GenotypeData, block: genotypes.JoinedBlock, k: int) -> str:
    """The columns before FORMAT."""
    at, stop, called = int(block.start_b[k]), int(block.start_b[k + 1]), int(block.called_b[k])
    if data.alt[at] == ".":
        alt, info = ".", f"AN={called}"
    else:
        alt = ",".join(data.alt[at:stop].tolist())
        first_row = at - int(block.start_b[0])
        counts = block.row_count[first_row : first_row + stop - at]
        share = [f"{f:.6g}" for f in counts / called] if called else ["."] * len(counts)
        info = f"AC={','.join(map(str, counts.tolist()))};AN={called};AF={','.join(share)}"
    return f"{data.contig[at]}\t{data.position_bp[at]}\t{data.id[at]}\t{data.ref[at]}\t{alt}\t.\tPASS\t{info}"
