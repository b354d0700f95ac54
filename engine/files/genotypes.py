"""`GenotypeData`: what every genotype file is read into and written from, one bit per allele.

The readers and writers of one format each live beside this module; what the writers share, the grouping of rows into
records, is here. Groups, genetic positions and whatever else a model needs are added above, in the genomics room.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np

from engine.errors import InputError
from engine.kernels import bits

MAX_ALTS = 9  # of a rejoined record: one digit in text
SEX_NAMES = {"1": "male", "m": "male", "male": "male", "2": "female", "f": "female", "female": "female"}
SEX_CODES = {"male": "1", "female": "2"}  # of PLINK and Oxford; who is neither has their word for unknown
_JOINED_BYTES = 16 << 20  # unpacked alleles held at one time by a writer
_BLOCK_BYTES = 32 << 20  # unpacked alleles held at one time while haplotypes are selected
_COPY_BYTES = 16 << 20


@dataclass
class GenotypeData:
    """Genotypes as packed bits, one row per ALT allele.

    Attributes:
        bits_lw: uint64 (L, ceil(N / 64)); 1 = this row's ALT allele (layout: `engine.kernels.bits`).
        n_haplotypes: N.
        missing_lw: uint64 of the same shape, 1 = not called (the allele bit is then 0); None where nothing is missing.
        phased: False where a called heterozygous genotype is unphased.
        contig: str (L,).
        position_bp: int64 (L,), 1-based, as in VCF.
        id, ref, alt: object (L,) of str; "." is no id, and as `alt` no alternative allele.
        alt_index: int16 (L,), which ALT (1, 2, ...) of a multiallelic record this row is; 0 = the record had one ALT.
        sample_ids: S names.
        haplotypes_of_sample: int64 (S + 1,), sample s owns haplotypes [h[s], h[s+1]): two if diploid, one if haploid.
        contig_length: length in bp of every contig whose length is known.
        assembly: name of the genome build, where stated.
        notes: what a reader had to decide, one sentence each.
        hemizygous: rows bool (L,) and samples bool (S,) (men on X outside PAR, `engine.files.ploidy`): there these samples have
            one allele, their first, and their second haplotype is missing. None where there are none.
    """

    bits_lw: np.ndarray
    n_haplotypes: int
    missing_lw: np.ndarray | None
    phased: bool
    contig: np.ndarray
    position_bp: np.ndarray
    id: np.ndarray
    ref: np.ndarray
    alt: np.ndarray
    alt_index: np.ndarray
    sample_ids: list[str]
    haplotypes_of_sample: np.ndarray
    contig_length: dict[str, int] = field(default_factory=dict)
    assembly: str | None = None
    notes: list[str] = field(default_factory=list)
    hemizygous: tuple[np.ndarray, np.ndarray] | None = None

    def __post_init__(self) -> None:
        sites = len(self.position_bp)
        shape = (sites, bits.words(self.n_haplotypes))
        if self.bits_lw.shape != shape or self.bits_lw.dtype != np.uint64:
            raise ValueError(f"bits_lw must be uint64 {shape}, got {self.bits_lw.dtype} {self.bits_lw.shape}")
        if self.missing_lw is not None and self.missing_lw.shape != shape:
            raise ValueError(f"missing_lw must have shape {shape}, got {self.missing_lw.shape}")
        for name in ("contig", "id", "ref", "alt", "alt_index"):
            if len(getattr(self, name)) != sites:
                raise ValueError(f"{name} must have {sites} entries, got {len(getattr(self, name))}")
        first = self.haplotypes_of_sample
        if len(first) != len(self.sample_ids) + 1 or first[0] != 0 or first[-1] != self.n_haplotypes:
            raise ValueError(
                "haplotypes_of_sample must run from 0 to n_haplotypes, one entry more than there are samples"
            )
        if not np.isin(np.diff(first), (1, 2)).all():
            raise ValueError("every sample must own one or two haplotypes")

    @property
    def n_sites(self) -> int:
        """Number of rows L."""
        return len(self.position_bp)


def check_sorted(contig: Iterable[str], position_bp: np.ndarray, where: object) -> None:
    """Raise InputError unless contigs are contiguous and positions do not decrease within each."""
    names = np.asarray(contig)
    if len(names) == 0:
        return
    change = np.flatnonzero(names[1:] != names[:-1]) + 1
    starts = names[np.r_[0, change]]
    if len(set(starts.tolist())) != len(starts):
        seen: set[str] = set()
        for start, name in zip(np.r_[0, change], starts.tolist()):
            if name in seen:
                raise InputError(
                    "each contig in one stretch", f"{name} again at site {start + 1}", where, "bcftools sort"
                )
            seen.add(name)
    back = np.flatnonzero((np.diff(position_bp) < 0) & (names[1:] == names[:-1]))
    if len(back):
        at = int(back[0]) + 1
        raise InputError(
            "positions in ascending order",
            f"{names[at]}:{position_bp[at]} after {names[at]}:{position_bp[at - 1]} (site {at + 1})",
            where,
            "bcftools sort",
        )


def take_haplotypes(bits_lw: np.ndarray, n: int, index: np.ndarray) -> np.ndarray:
    """Packed columns `index` (int64, any order) of bits_lw; works through blocks of sites to hold memory down."""
    out_lw = np.zeros((bits_lw.shape[0], bits.words(len(index))), dtype=np.uint64)
    block = max(1, _BLOCK_BYTES // max(1, n))
    for start in range(0, bits_lw.shape[0], block):
        alleles_ln = bits.unpack(bits_lw[start : start + block], n)
        out_lw[start : start + block] = bits.pack(np.ascontiguousarray(alleles_ln[:, index]))
    return out_lw


def haplotype_index(first_haplotype: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Haplotypes of the chosen samples in their order, and their new offsets (S' + 1,); so too for any table by offsets."""
    count = np.diff(first_haplotype)[samples]
    offsets = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
    index = np.repeat(first_haplotype[:-1][samples] - offsets[:-1], count) + np.arange(offsets[-1])
    return index.astype(np.int64), offsets


def without_second(
    bits_lw: np.ndarray, missing_lw: np.ndarray | None, haploid_s: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Planes of two haplotypes a sample without the second of those that are haploid, bool (S,).

    Returns:
        bits_lw; missing_lw, None where nothing is missing any more; int64 (S + 1,), what each sample owns.
    """
    first = np.concatenate([[0], np.cumsum(np.where(haploid_s, 1, 2))]).astype(np.int64)
    if haploid_s.any():
        n = 2 * len(haploid_s)
        index = np.flatnonzero(np.stack([np.ones_like(haploid_s), ~haploid_s], axis=1).ravel())
        bits_lw = take_haplotypes(bits_lw, n, index)
        if missing_lw is not None:
            missing_lw = take_haplotypes(missing_lw, n, index)
            missing_lw = missing_lw if missing_lw.any() else None
    return bits_lw, missing_lw, first


def tail_mask(n: int) -> np.ndarray:
    """uint64 (ceil(n / 64),) with ones at the n bits in use."""
    mask = np.full(bits.words(n), np.uint64(0xFFFFFFFFFFFFFFFF))
    if n % 64:
        mask[-1] = np.uint64((1 << (n % 64)) - 1)
    return mask


@dataclass(frozen=True)
class Layout:
    """What a genotype file says apart from its alleles, which come block of sites by block of sites.

    Attributes:
        head: all sites and samples; its alleles are not looked at (`without_alleles` gives one that holds none).
        start_r: int64 (R + 1,), record r joins rows start_r[r] .. start_r[r + 1] - 1, one per ALT.
        header_lines: extra `##key=value` lines.
        sex: "male", "female" or anything else for unknown, per sample; None where nothing is known.
    """

    head: GenotypeData
    start_r: np.ndarray
    header_lines: tuple[str, ...] = ()
    sex: list[str] | None = None

    @property
    def n_records(self) -> int:
        return len(self.start_r) - 1


@dataclass(frozen=True)
class Block:
    """Some records of a file in a row: their rows of `data`, `start_r` of them counted from 0, and the first one's number."""

    data: GenotypeData
    start_r: np.ndarray
    first_record: int = 0


def without_alleles(n_sites: int, n_haplotypes: int) -> np.ndarray:
    """bits_lw of the right shape that takes no memory: for the head of a layout."""
    return np.broadcast_to(np.uint64(0), (n_sites, bits.words(n_haplotypes)))


def rows(data: GenotypeData, first: int, stop: int, bits_lw: np.ndarray | None = None) -> GenotypeData:
    """Rows first .. stop-1 of `data`, views; with `bits_lw` (stop - first, W) in place of its alleles, nothing missing."""
    cut = slice(first, stop)
    missing_lw = None if data.missing_lw is None or bits_lw is not None else data.missing_lw[cut]
    return replace(
        data,
        bits_lw=data.bits_lw[cut] if bits_lw is None else bits_lw,
        missing_lw=missing_lw if missing_lw is not None and missing_lw.any() else None,
        contig=data.contig[cut], position_bp=data.position_bp[cut], id=data.id[cut], ref=data.ref[cut],
        alt=data.alt[cut], alt_index=data.alt_index[cut],
        hemizygous=None if data.hemizygous is None else (data.hemizygous[0][cut], data.hemizygous[1]),
    )  # fmt: skip


def record_starts(data: GenotypeData) -> np.ndarray:
    """Rows grouped into records: a complete run of alt_index 1, 2, ... is one record, any other row its own.

    A run stays split where a haplotype carries two of its ALT alleles or its rows do not miss the same genotypes.

    Returns:
        int64 (R + 1,), first row of each record, and L.
    """
    starts = np.ones(data.n_sites + 1, dtype=bool)
    indices = data.alt_index
    for at in np.flatnonzero(indices[:-1] == 1).tolist():
        end = at + 1
        while (
            end < data.n_sites
            and indices[end] == indices[end - 1] + 1
            and data.position_bp[end] == data.position_bp[at]
            and data.contig[end] == data.contig[at]
            and data.ref[end] == data.ref[at]
            and data.id[end] == data.id[at]
        ):
            end += 1
        if 1 < end - at <= MAX_ALTS and _can_join(data, at, end):
            starts[at + 1 : end] = False
    return np.flatnonzero(starts).astype(np.int64)


def _can_join(data: GenotypeData, first: int, last: int) -> bool:
    """No haplotype carries two of the ALT alleles, no allele is '.', none is repeated, and the missing planes agree."""
    alts = data.alt[first:last].tolist()
    if "." in alts or len(set(alts)) != len(alts):
        return False
    bits_rw = data.bits_lw[first:last]
    union = np.bitwise_or.reduce(bits_rw, axis=0)
    if int(bits.popcount_rows(bits_rw).sum()) != int(np.bitwise_count(union).sum()):
        return False
    return data.missing_lw is None or bool((data.missing_lw[first:last] == data.missing_lw[first]).all())


@dataclass
class JoinedBlock:
    """B records: `start_b` int64 (B + 1,) rows of the data; alleles uint8 (B, N): 0 = REF, k = k-th ALT, 255 = missing.

    called_b int64 (B,) called alleles; row_count int64, carriers of the ALT of each row from start_b[0] on.
    """

    start_b: np.ndarray
    allele_bn: np.ndarray
    called_b: np.ndarray
    row_count: np.ndarray


def joined_blocks(data: GenotypeData, start_r: np.ndarray) -> Iterator[JoinedBlock]:
    """The records of `data` (as of `record_starts`) with unpacked alleles, a bounded number at a time."""
    n = data.n_haplotypes
    limit = max(1, _JOINED_BYTES // max(1, n))
    for begin in range(0, len(start_r) - 1, limit):
        start_b = start_r[begin : begin + limit + 1]
        first, last, head_b = int(start_b[0]), int(start_b[-1]), start_b[:-1] - start_b[0]
        allele_ln = bits.unpack(data.bits_lw[first:last], n)
        row_count = bits.popcount_rows(data.bits_lw[first:last])
        allele_bn = allele_ln
        if last - first != len(head_b):
            allele_bn = allele_ln[head_b]
            for k in np.flatnonzero(np.diff(start_b) > 1).tolist():
                for alt in range(1, int(start_b[k + 1] - start_b[k])):
                    allele_bn[k] += np.uint8(alt + 1) * allele_ln[head_b[k] + alt]
        called_b = np.full(len(head_b), n, dtype=np.int64)
        if data.missing_lw is not None:
            missing_bw = data.missing_lw[first:last][head_b]
            called_b -= bits.popcount_rows(missing_bw)
            if (called_b < n).any():
                allele_bn[bits.unpack(missing_bw, n).astype(bool)] = 255
        yield JoinedBlock(start_b, allele_bn, called_b, row_count)


def append_files(stream: IO[bytes], places: Sequence[Path]) -> None:
    """Copy the files `places` to `stream`, one after another."""
    for place in places:
        with open(place, "rb") as source:
            shutil.copyfileobj(source, stream, _COPY_BYTES)


def contig_names(data: GenotypeData) -> list[str]:
    """Contigs of the header: those of known length first, then what else the sites name, in order."""
    return [*data.contig_length, *(c for c in dict.fromkeys(data.contig.tolist()) if c not in data.contig_length)]


def build_name(data: GenotypeData) -> str | None:
    """The assembly as one word that a header line can hold."""
    return re.sub(r"[\s,<>\"=]+", "_", data.assembly) if data.assembly else None


def contig_lines(data: GenotypeData) -> list[str]:
    """##reference, where the assembly is known, and ##contig with what is known of each."""
    build = build_name(data)
    lines = [f"##reference={build}"] if build else []
    for name in contig_names(data):
        length = f",length={data.contig_length[name]}" if name in data.contig_length else ""
        lines.append(f"##contig=<ID={name}{length}{f',assembly={build}' if build else ''}>")
    return lines
