"""PLINK 2 filesets (.pgen, .pvar, .psam): phased hardcalls, read with pgenlib and written by `pgen_write`.

A PGEN has no ploidy of its own: a haploid call is stored as a homozygote. As PLINK does, samples of SEX 1 are read as
haploid on X and Y, and all samples on MT, unless one of their calls there is heterozygous; and haploid samples are written
on these contigs only. The pseudo-autosomal regions of X are contigs of their own in PLINK (PAR1, PAR2, XY) and diploid.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pgenlib

from engine import __version__
from engine.atomic import atomic_path
from engine.errors import InputError, UsageError
from engine.files import genotypes, pgen_write, vcf_header
from engine.files.genetic_map import plain_contig
from engine.files.genotypes import Block, GenotypeData, Layout
from engine.kernels import bits

_BLOCK_BYTES = 1 << 20  # int32 alleles held at one time: they are packed while the caches have them
_MAX_LINE = 1 << 24
_ONE = np.uint64(1)


def read_pgen(path: str | Path, *, region: str | None = None) -> GenotypeData:
    """Read a fileset, named by its .pgen or by the common prefix.

    Multiallelic variants become one row per ALT, as in `engine.files.vcf.read_vcf`. Dosages are not read.

    Args:
        region: "contig" or "contig:first-last", 1-based inclusive.

    Raises:
        InputError: a file of the set is absent, compressed (.pvar.zst), damaged or of another size than the others, or the
            variants are not sorted.
    """
    prefix = Path(path).with_suffix("") if Path(path).suffix == ".pgen" else Path(path)
    pgen, pvar, psam = (prefix.with_name(prefix.name + suffix) for suffix in (".pgen", ".pvar", ".psam"))
    if not pvar.exists() and pvar.with_name(pvar.name + ".zst").exists():
        raise InputError("a plain .pvar", f"{pvar.name}.zst", pgen, "plink2 --make-pgen without 'vzs', or zstd -d")
    for each in (pgen, pvar, psam):
        if not each.is_file():
            raise InputError(".pgen, .pvar and .psam of one name", f"no {each.name}", path)
    ids, sex = read_psam(psam)
    contig, position, name, ref, alts, header = _read_pvar(pvar)
    _check_pgen(pgen, len(ids), len(position))
    keep = np.arange(len(position))
    if region is not None:
        low, high, wanted = _region(region, path)
        keep = np.flatnonzero((contig == wanted) & (position >= low) & (position <= high))
        if len(keep) == 0:
            raise InputError(f"variants in {region}", "none", path, "a contig name as in the .pvar")
    counts = np.array([max(1, len(each)) for each in alts], dtype=np.int64)
    row_variant = np.repeat(keep, counts[keep])
    row_alt = np.concatenate([np.arange(1, c + 1) for c in counts[keep]]) if len(keep) else np.zeros(0, dtype=np.int64)
    try:
        bits_lw, missing_lw, phased, het_s = _read_calls(pgen, len(ids), counts, keep)
    except (RuntimeError, ValueError) as fault:
        text = fault.args[0] if fault.args else ""
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
        raise InputError("a readable .pgen", text.strip(), pgen) from None
    places = {plain_contig(each) for each in np.unique(contig[keep]).tolist()}
    haploid_s = np.zeros(len(ids), dtype=bool)
    if places and places <= {"X", "Y", "24"}:
        haploid_s = (np.zeros_like(het_s) if sex is None else sex == "male") & ~het_s
    elif places and places <= {"MT", "M", "26"}:
        haploid_s = ~het_s
    bits_lw, missing_lw, first = genotypes.without_second(bits_lw, missing_lw, haploid_s)
    several = counts[row_variant] > 1
    return GenotypeData(
        bits_lw=bits_lw,
        n_haplotypes=int(first[-1]),
        missing_lw=missing_lw,
        phased=phased,
        contig=contig[row_variant],
        position_bp=position[row_variant],
        id=name[row_variant],
        ref=ref[row_variant],
        alt=np.array([alts[v][a - 1] if alts[v] else "." for v, a in zip(row_variant, row_alt)], dtype=object),
        alt_index=np.where(several, row_alt, 0).astype(np.int16),
        sample_ids=ids,
        haplotypes_of_sample=first,
        contig_length=dict(header.contig_length),
        assembly=header.assembly,
    )


def _read_calls(
    pgen: Path, samples: int, counts: np.ndarray, keep: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, bool, np.ndarray]:
    """Bits and missing plane (None where nothing is missing) of the kept variants, diploid; phase; who has a het call."""
    offsets = np.concatenate([[0], np.cumsum(counts + 1)]).astype(np.uintp)
    phased, het_s = True, np.zeros(samples, dtype=bool)
    bits_lw = np.empty((int(counts[keep].sum()), bits.words(2 * samples)), dtype=np.uint64)
    missing_lw: np.ndarray | None = None
    limit, row = max(1, _BLOCK_BYTES // max(1, 8 * samples)), 0
    if len(keep):
        reader = pgenlib.PgenReader(
            str(pgen).encode(), raw_sample_ct=samples, variant_ct=len(counts), allele_idx_offsets=offsets
        )
        most = min(limit, int(keep[-1]) + 1 - int(keep[0]))
        alleles, phases = np.empty((most, 2 * samples), dtype=np.int32), np.empty((most, samples), dtype=np.bool_)
        try:
            for start in range(int(keep[0]), int(keep[-1]) + 1, limit):  # kept variants are contiguous
                stop = min(start + limit, int(keep[-1]) + 1)
                allele_bn, phase_bs = alleles[: stop - start], phases[: stop - start]
                reader.read_alleles_and_phasepresent_range(start, stop, allele_bn, phase_bs)
                end = row + int(counts[start:stop].sum())
                lost_rw = np.empty((end - row, bits_lw.shape[1]), dtype=np.uint64)
                beyond, all_phased = _pack_calls(
                    allele_bn, phase_bs, counts[start:stop], bits_lw[row:end], lost_rw, het_s
                )
                if beyond > 0:
                    raise ValueError("an allele number beyond ALT")
                phased &= bool(all_phased)
                if lost_rw.any():
                    missing_lw = np.zeros_like(bits_lw) if missing_lw is None else missing_lw
                    missing_lw[row:end] = lost_rw
                row = end
        finally:
            reader.close()
    return bits_lw, missing_lw, phased, het_s


@numba.njit(cache=True, nogil=True)
def _pack_calls(
    allele_bn: np.ndarray,
    phase_bs: np.ndarray,
    counts_b: np.ndarray,
    bits_rw: np.ndarray,
    missing_rw: np.ndarray,
    het_s: np.ndarray,
) -> tuple[int, bool]:
    """A row of bits and of missing for each ALT of each variant; marks who has a het call. By how much an allele number is
    beyond the last ALT (0 or less: none is), and whether all are phased."""
    phased, row, beyond = True, 0, -1
    for b in range(allele_bn.shape[0]):
        called = allele_bn[b]
        most = np.int32(-1)
        for k in range(len(called)):
            most = max(most, called[k])
        beyond = max(beyond, most - counts_b[b])
        for alt in range(1, counts_b[b] + 1):
            for w in range(bits_rw.shape[1]):
                word, lost = np.uint64(0), np.uint64(0)
                part = called[64 * w : 64 * w + 64]
                for k in range(len(part)):
                    word |= np.uint64(part[k] == alt) << np.uint64(k)
                    lost |= np.uint64(part[k] < 0) << np.uint64(k)
                bits_rw[row, w], missing_rw[row, w] = word, lost
            row += 1
        for s in range(phase_bs.shape[1]):
            het = called[2 * s] != called[2 * s + 1]
            het_s[s] |= het
            phased &= phase_bs[b, s] or not het
    return beyond, phased


def _check_pgen(pgen: Path, samples: int, variants: int) -> None:
    with open(pgen, "rb") as stream:
        start = stream.read(12)
    if start[:2] != b"\x6c\x1b" or len(start) < 3:
        raise InputError("a .pgen file", f"one that starts with {start[:2]!r}", pgen)
    if start[2] == 1:
        raise InputError("a PLINK 2 .pgen", "a PLINK 1 .bed, which has no phase", pgen, "plink2 --make-pgen")
    if len(start) >= 11:
        variants_here, samples_here = struct.unpack_from("<II", start, 3)
        if (variants_here, samples_here) != (variants, samples):
            raise InputError(
                f"{variants} variants (.pvar) x {samples} samples (.psam)", f"{variants_here} x {samples_here}", pgen
            )


def _lines(path: Path) -> list[str]:
    made: list[str] = []
    try:
        with open(path, encoding="utf-8") as stream:
            while line := stream.readline(_MAX_LINE):
                if len(line) == _MAX_LINE:
                    raise InputError("lines of at most 16 MiB", "a longer one", f"{path}, line {len(made) + 1}")
                made.append(line.rstrip("\r\n"))
    except UnicodeDecodeError:
        raise InputError("a text file in UTF-8", "other bytes", path) from None
    return made


def read_psam(path: Path) -> tuple[list[str], np.ndarray | None]:
    """Sample names, and their sex, str (S,) "male", "female" or "unknown"; None without a column SEX."""
    lines = [line for line in _lines(path) if line and not line.startswith("##")]
    columns = lines[0].lstrip("#").split() if lines else []
    if not lines or not lines[0].startswith("#") or "IID" not in columns:
        raise InputError("a header line with #IID or #FID IID", repr(lines[0][:40]) if lines else "an empty file", path)
    rows = [line.split() for line in lines[1:]]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(columns):
            raise InputError(f"{len(columns)} columns", str(len(row)), f"{path}, sample {number}")
    ids = [row[columns.index("IID")] for row in rows]
    if len(set(ids)) != len(ids):
        raise InputError("distinct sample names", "one twice", path)
    if "SEX" not in columns:
        return ids, None
    sex = [genotypes.SEX_NAMES.get(row[columns.index("SEX")].lower(), "unknown") for row in rows]
    return ids, np.array(sex, dtype=str)


def _read_pvar(
    path: Path,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[list[str]], vcf_header.Header]:
    """contig, position_bp, id, ref (V,), ALT alleles of each variant, and what the ## lines say."""
    lines = _lines(path)
    at = next((k for k, line in enumerate(lines) if not line.startswith("##")), len(lines))
    columns = lines[at].lstrip("#").split("\t") if at < len(lines) else []
    if columns[:5] != ["CHROM", "POS", "ID", "REF", "ALT"] or not lines[at].startswith("#"):
        raise InputError("a header line #CHROM POS ID REF ALT", repr(lines[at][:40]) if columns else "none", path)
    fixed = "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"
    header = vcf_header.parse(
        [b"##fileformat=VCFv4.3", *(line.encode() for line in lines[:at] if "fileformat" not in line), fixed.encode()],
        path,
    )
    cells = [line.split("\t") for line in lines[at + 1 :] if line]
    for number, row in enumerate(cells, start=at + 2):
        if len(row) != len(columns) or not row[1].isdigit() or len(row[1]) > 10 or not row[4]:
            raise InputError(
                f"{len(columns)} columns with an integer POS", repr("\t".join(row)[:40]), f"{path}, line {number}"
            )
    contig = np.array([row[0] for row in cells], dtype=str)
    position = np.array([int(row[1]) for row in cells], dtype=np.int64)
    genotypes.check_sorted(contig, position, path)
    text = lambda k: np.array([row[k] for row in cells], dtype=object)  # noqa: E731
    return contig, position, text(2), text(3), [[] if row[4] == "." else row[4].split(",") for row in cells], header


def _region(region: str, path: str | Path) -> tuple[int, int, str]:
    found = re.fullmatch(r"(.+?)(?::(\d+)-(\d+))?", region)
    if found is None:
        raise InputError("a region such as 22 or 22:16000000-17000000", repr(region), path)
    return int(found[2] or 0), int(found[3] or 2**31), found[1]


def write_pgen(
    path: str | Path,
    data: GenotypeData,
    *,
    header_lines: Sequence[str] = (),
    sex: Sequence[str] | np.ndarray | None = None,
) -> None:
    """Write .pgen, .pvar and .psam, each whole or absent; the .pgen, which readers ask for, comes last.

    Split multiallelics are joined as `engine.files.vcf.write_vcf` does. `header_lines` go to the .pvar.

    Args:
        sex: "male", "female" or anything else for unknown, per sample; haploid samples on X and Y are written as male.

    Raises:
        UsageError: the path does not end in .pgen, or a header line is no `##key=value`.
        InputError: no samples or sites; a haploid sample outside X, Y and MT; a genotype of which one allele is missing; a
            name with blanks: a PGEN cannot hold them.
    """
    from engine.files.genotype_files import write_genotypes

    if Path(path).suffix != ".pgen":
        raise UsageError("a path ending in .pgen", Path(path).name, "write_pgen")
    write_genotypes(path, data, header_lines=header_lines, sex=sex)


def check(path: str | Path, layout: Layout) -> None:
    """Raise what `write_pgen` raises, before anything is written; half-missing genotypes are found on the way."""
    path, head = Path(path), layout.head
    if path.suffix != ".pgen":
        raise UsageError("a path ending in .pgen", path.name, "write_pgen")
    if any(re.fullmatch(r"##[^=\s]+=\S.*", line) is None for line in layout.header_lines):
        raise UsageError("extra header lines ##key=value", repr(list(layout.header_lines)[:1]), "write_pgen")
    check_names(head, path)
    haploid_s = np.diff(head.haplotypes_of_sample) == 1
    places = {plain_contig(each) for each in np.unique(head.contig).tolist()}
    if haploid_s.any() and not (places <= {"X", "Y", "24"} or places <= {"MT", "M", "26"}):
        name = head.sample_ids[int(np.flatnonzero(haploid_s)[0])]
        raise InputError("diploid samples outside X, Y, MT", f"haploid '{name}'", path, "BCF, which keeps ploidy")


def check_names(head: GenotypeData, path: Path) -> None:
    """Raise InputError unless there are samples and sites, with names that a file of columns can hold, in order."""
    if not head.n_sites or not head.sample_ids:
        raise InputError("at least one site and one sample", f"{head.n_sites} x {len(head.sample_ids)}", path)
    genotypes.check_sorted(head.contig, head.position_bp, path)
    bad = next((name for name in head.sample_ids if re.search(r"\s", name) or name in ("", "0")), None)
    if bad is not None or len(set(head.sample_ids)) != len(head.sample_ids):
        raise InputError("distinct sample names without blanks, not '0'", repr(bad or "one twice"), path)


def as_diploid(data: GenotypeData) -> GenotypeData:
    """Every sample with two haplotypes at every row: the allele of who has one stands twice."""
    haploid_s = np.diff(data.haplotypes_of_sample) == 1
    if haploid_s.any():
        first = data.haplotypes_of_sample[:-1]
        column = np.stack([first, first + ~haploid_s], axis=1).ravel()
        take = lambda plane: genotypes.take_haplotypes(plane, data.n_haplotypes, column)  # noqa: E731
        data = replace(
            data, bits_lw=take(data.bits_lw), missing_lw=None if data.missing_lw is None else take(data.missing_lw),
            n_haplotypes=len(column), haplotypes_of_sample=2 * np.arange(len(first) + 1),
        )  # fmt: skip
    if data.hemizygous is None or data.missing_lw is None:
        return data
    rows_l, alone_s = data.hemizygous
    first_w = bits.pack(np.stack([alone_s, np.zeros_like(alone_s)], axis=1).reshape(1, -1))[0]
    planes = [data.bits_lw.copy(), data.missing_lw.copy()]
    for plane_lw in planes:
        plane_lw[rows_l] &= ~(first_w << _ONE)
        plane_lw[rows_l] |= (plane_lw[rows_l] & first_w) << _ONE
    return replace(data, bits_lw=planes[0], missing_lw=planes[1] if planes[1].any() else None, hemizygous=None)


def write_part(path: str | Path, layout: Layout, blocks: Iterable[Block], place: Path) -> None:
    """Write to `place` the records of these blocks, and their types and lengths beside."""
    types, lengths = [np.zeros(0, np.uint8)], [np.zeros(0, np.uint32)]
    with atomic_path(place) as partial:
        with open(partial, "wb") as stream:
            for block in blocks:
                for body, type_r, length_r in pgen_write.encoded(as_diploid(block.data), block.start_r):
                    stream.write(body)
                    types.append(type_r)
                    lengths.append(length_r)
        with atomic_path(_index_of(place)) as partial_index, open(partial_index, "wb") as stream:
            np.save(stream, np.stack([np.concatenate(types).astype(np.uint32), np.concatenate(lengths)]))


def _index_of(place: Path) -> Path:
    return place.with_name(place.name + ".index")


def join_parts(path: str | Path, layout: Layout, places: Sequence[Path]) -> None:
    """Write the fileset from the parts of all its records, in order; raises as `write_pgen`."""
    path, head = Path(path), layout.head
    base = path.with_suffix("")
    types_r, length_r = np.concatenate([np.load(_index_of(place)) for place in places], axis=1)
    with (
        atomic_path(base.with_name(base.name + ".psam")) as partial_psam,
        atomic_path(base.with_name(base.name + ".pvar")) as partial_pvar,
        atomic_path(path) as partial,
    ):
        with open(partial, "wb") as stream:
            alleles_r = np.diff(layout.start_r) + 1
            stream.write(pgen_write.header(types_r, length_r, alleles_r, len(head.sample_ids)))
            genotypes.append_files(stream, places)
        _write_pvar(partial_pvar, layout)
        haploid_s = np.diff(head.haplotypes_of_sample) == 1
        places_here = {plain_contig(each) for each in np.unique(head.contig).tolist()}
        is_male = haploid_s & (not places_here <= {"MT", "M", "26"})
        if head.hemizygous is not None:
            is_male |= head.hemizygous[1]
        given = ["unknown"] * len(haploid_s) if layout.sex is None else layout.sex
        codes = ["1" if m else genotypes.SEX_CODES.get(s, "NA") for m, s in zip(is_male.tolist(), given)]
        lines = ["#IID\tSEX", *(f"{name}\t{code}" for name, code in zip(head.sample_ids, codes))]
        partial_psam.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_pvar(partial: Path, layout: Layout) -> None:
    head = layout.head
    lines = ["##fileformat=VCFv4.3", f"##source=engine {__version__}", *genotypes.contig_lines(head)]
    lines += [*layout.header_lines, "#CHROM\tPOS\tID\tREF\tALT"]
    first_r, stop_r = layout.start_r[:-1].tolist(), layout.start_r[1:].tolist()
    position_l = head.position_bp.tolist()
    with open(partial, "w", encoding="utf-8") as stream:
        stream.write("\n".join(lines) + "\n")
        for at, stop in zip(first_r, stop_r):
            alt = head.alt[at] if stop == at + 1 else ",".join(head.alt[at:stop].tolist())
            stream.write(f"{head.contig[at]}\t{position_l[at]}\t{head.id[at]}\t{head.ref[at]}\t{alt}\n")
