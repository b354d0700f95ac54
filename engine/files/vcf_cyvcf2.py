"""Records of a VCF or BCF through cyvcf2, after `vcf_structure` has checked the file, so that htslib never meets a damaged
one.

This is what every answer of the readers is defined by: `vcf_fast` gives the same, and hands over whatever it does not know.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cyvcf2
import numpy as np

from engine.errors import InputError
from engine.files import vcf_structure
from engine.kernels import bits

_BLOCK_BYTES = 48 << 20  # decoded genotypes held at one time
_MISSING, _ABSENT = -1, -2  # cyvcf2: allele not called; no second allele (haploid call)

COLUMN_TYPES = {
    "contig": str,
    "position_bp": np.int64,
    "id": object,
    "ref": object,
    "alt": object,
    "alt_index": np.int16,
}

# htslib writes its remarks to standard error; the structure check says the same as one line
ctypes.CDLL(cyvcf2.cyvcf2.__file__).hts_set_log_level(0)


@dataclass
class Block:
    """Decoded records: alleles int16 (B, S, 2), phase bool (B, S), and one row per ALT allele."""

    alleles_bsp: np.ndarray
    phased_bs: np.ndarray
    row_record: list[int]
    row_alt: list[int]
    contig: list[str]
    position_bp: list[int]
    id: list[str]
    ref: list[str]
    alt: list[str]
    alt_index: list[int]


@dataclass
class Read:
    """What was read of a file: planes with two haplotypes per sample asked for, and the columns of GenotypeData."""

    structure: vcf_structure.Structure
    names: list[str]
    bits_lw: np.ndarray
    missing_lw: np.ndarray | None
    phased: bool
    ploidy: Ploidy
    columns: dict[str, np.ndarray]


def read(path: Path, region: str | None, samples: Sequence[str] | None) -> Read:
    """See `engine.files.vcf.read_vcf`."""
    structure = vcf_structure.inspect(path)
    names = structure.header.samples
    keep: np.ndarray | None = None
    if samples is not None:
        place = {name: k for k, name in enumerate(names)}
        absent = [name for name in samples if name not in place]
        if absent:
            raise InputError("samples of the file", f"'{absent[0]}' ({len(absent)} not found)", path)
        if len(set(samples)) != len(samples):
            raise InputError("distinct samples", "one asked for twice", path)
        keep = np.array([place[name] for name in samples], dtype=np.int64)
        names = list(samples)
    ploidy = Ploidy(len(names))
    phased = True
    rows: list[np.ndarray] = []
    missing: list[np.ndarray | None] = []
    columns: dict[str, list] = {key: [] for key in COLUMN_TYPES}
    for block in blocks(path, structure, keep, parse_region(region, structure.header.contigs, path)):
        phased &= is_phased(block)
        ploidy.see(block)
        bits_bw, missing_bw = planes(block)
        rows.append(bits_bw)
        missing.append(missing_bw)
        for key, values in columns.items():
            values.extend(getattr(block, key))
    bits_lw = np.concatenate(rows) if rows else np.zeros((0, bits.words(2 * len(names))), dtype=np.uint64)
    missing_lw: np.ndarray | None = None
    if any(plane is not None for plane in missing):
        missing_lw = np.concatenate([np.zeros_like(b) if m is None else m for b, m in zip(rows, missing)])
    made: dict[str, np.ndarray] = {key: np.array(columns[key], dtype=kind) for key, kind in COLUMN_TYPES.items()}
    return Read(structure, names, bits_lw, missing_lw, phased, ploidy, made)


def planes(block: Block) -> tuple[np.ndarray, np.ndarray | None]:
    """Alleles and, where one is, missing alleles of the rows of a block, uint64 (rows, words of 2 S haplotypes)."""
    allele_bn = block.alleles_bsp.reshape(len(block.alleles_bsp), -1)
    row = np.array(block.row_record, dtype=np.int64)
    missing_bn = allele_bn < 0
    return (
        bits.pack(allele_bn[row] == np.array(block.row_alt, dtype=np.int16)[:, None]),
        bits.pack(missing_bn[row]) if missing_bn.any() else None,
    )


class Ploidy:
    """Which samples are haploid, from all records seen."""

    def __init__(self, n: int) -> None:
        self.diploid_s = np.zeros(n, dtype=bool)  # a second allele was called, or is missing in a phased pair
        self.haploid_s = np.zeros(n, dtype=bool)  # a call of one allele: "0", "." or "0/."
        self.called_s = np.zeros(n, dtype=bool)  # such a call with its allele

    def see(self, block: Block) -> None:
        first, second = block.alleles_bsp[:, :, 0], block.alleles_bsp[:, :, 1]
        paired = (second >= 0) | ((second == _MISSING) & block.phased_bs)
        single = (second == _ABSENT) | ((second == _MISSING) & ~block.phased_bs & (first >= 0))
        self.diploid_s |= paired.any(axis=0)
        self.haploid_s |= single.any(axis=0)
        self.called_s |= (single & (first >= 0)).any(axis=0)

    def haploid(self) -> np.ndarray:
        return self.haploid_s & ~self.diploid_s

    def notes(self) -> list[str]:
        mixed = int((self.called_s & self.diploid_s).sum())
        if not mixed:
            return []
        return [
            f"{mixed} samples are haploid in some records and diploid in others; kept diploid, second allele missing"
        ]


def is_phased(block: Block) -> bool:
    """False where a called heterozygote is unphased."""
    first, second = block.alleles_bsp[:, :, 0], block.alleles_bsp[:, :, 1]
    return not bool(((first >= 0) & (second >= 0) & (first != second) & ~block.phased_bs).any())


def unphased_samples(path: Path) -> list[str]:
    """Names of the samples with a called heterozygote that is unphased, in the file's order. Raises InputError as `read`."""
    structure = vcf_structure.inspect(path)
    found_s = np.zeros(len(structure.header.samples), dtype=bool)
    for block in blocks(path, structure):
        first, second = block.alleles_bsp[:, :, 0], block.alleles_bsp[:, :, 1]
        found_s |= ((first >= 0) & (second >= 0) & (first != second) & ~block.phased_bs).any(axis=0)
    return [name for name, found in zip(structure.header.samples, found_s.tolist()) if found]


def blocks(
    path: Path,
    structure: vcf_structure.Structure,
    keep: np.ndarray | None = None,
    region: tuple[str, int, int] | None = None,
) -> Iterator[Block]:
    """Decoded records of a file whose structure has been checked, a bounded number at a time."""
    n = len(structure.header.samples) if keep is None else len(keep)
    limit = int(np.clip(_BLOCK_BYTES // (8 * max(1, n)), 1, 4096))
    alleles_bsp = np.empty((limit, n, 2), dtype=np.int16)
    phased_bs = np.empty((limit, n), dtype=bool)
    block, used, record = _new_block(alleles_bsp, phased_bs), 0, 0
    if structure.n_records == 0:
        return
    try:
        reader = cyvcf2.VCF(str(path))
        # exactly the records that were checked: htslib crashes on what may follow them, an empty last line for one
        for _, variant in zip(range(structure.n_records), reader):
            record += 1
            if region is not None and (region[0] != variant.CHROM or not region[1] <= variant.POS <= region[2]):
                continue
            alts = list(variant.ALT)
            where = f"{path}, record {record} ({variant.CHROM}:{variant.POS})"
            decode(variant, len(alts), keep, alleles_bsp[used], phased_bs[used], where)
            for k, alt in enumerate(alts or ["."], start=1):
                block.row_record.append(used)
                block.row_alt.append(k)
                block.contig.append(variant.CHROM)
                block.position_bp.append(variant.POS)
                block.id.append(variant.ID or ".")
                block.ref.append(variant.REF)
                block.alt.append(alt)
                block.alt_index.append(k if len(alts) > 1 else 0)
            used += 1
            if used == limit:
                yield block
                block, used = _new_block(alleles_bsp, phased_bs), 0
        reader.close()
    except InputError:
        raise
    except Exception as fault:  # cyvcf2 raises bare Exception and OSError
        raise InputError("a file that htslib reads", str(fault), f"{path}, after record {record}") from None
    if record < structure.n_records and structure.complete:
        raise InputError(f"{structure.n_records} records", f"{record} that htslib could read", path)
    if used:
        block.alleles_bsp, block.phased_bs = alleles_bsp[:used], phased_bs[:used]
        yield block


def _new_block(alleles_bsp: np.ndarray, phased_bs: np.ndarray) -> Block:
    return Block(alleles_bsp, phased_bs, [], [], [], [], [], [], [], [])


def decode(
    variant: cyvcf2.Variant, alts: int, keep: np.ndarray | None, out_sp: np.ndarray, phased_s: np.ndarray, where: str
) -> None:
    """Alleles and phase of one record into `out_sp` (S, 2) and `phased_s` (S,)."""
    if not len(phased_s):
        return
    genotype = variant.genotype if "GT" in variant.FORMAT else None
    if genotype is None:
        out_sp[:], phased_s[:] = _MISSING, False
        return
    array = genotype.array()  # (S, ploidy + 1) int16, the last column is the phase
    if keep is not None:
        array = array[keep]
    ploidy = array.shape[1] - 1
    out_sp[:, 0] = array[:, 0]
    if ploidy == 1:
        out_sp[:, 1], phased_s[:] = _ABSENT, False
    else:
        out_sp[:, 1], phased_s[:] = array[:, 1], array[:, ploidy] != 0
        if ploidy > 2 and (array[:, 2:ploidy] != _ABSENT).any():
            raise InputError(
                "one or two alleles per genotype", f"up to {ploidy}", where, "polyploid calls are not read"
            )
    if alts == 0:
        out_sp[out_sp > 0] = _MISSING  # an allele that has no name
    elif out_sp.max() > alts:
        raise InputError(f"allele numbers up to {alts}", f"{int(out_sp.max())}", where)


def parse_region(region: str | None, contigs: list[str], path: Path) -> tuple[str, int, int] | None:
    """Contig and 1-based ends of a region; a name of a contig is never taken for a region of another."""
    if region is None:
        return None
    if region in contigs:
        return region, 0, 2**31
    found = re.fullmatch(r"(.+?)(?::([\d,]+)(?:(-)([\d,]+)?)?)?", region)
    if found is None:
        raise InputError("a region such as 22 or 22:16000000-17000000", repr(region), path)
    contig, first, dash, last = found.groups()
    low = int(first.replace(",", "")) if first else 0
    high = int(last.replace(",", "")) if last else 2**31 if dash or not first else low
    if high < low:
        raise InputError("a region whose end is not before its start", repr(region), path)
    return contig, low, high
