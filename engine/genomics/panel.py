"""`HaplotypePanel`: phased haplotypes as packed bits with their sites and samples, the one value that genomics passes
on.

Reading and writing of formats is left to `engine.files`; this module adds genetic positions, groups and sexes, and cuts
panels by site or sample. Memory is about `haplotypes * sites / 8` bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engine.atomic import write_text
from engine.errors import InputError, UsageError, closest
from engine.files import delimited, genetic_map, genotype_files, genotypes, ploidy
from engine.files.genotypes import SEX_NAMES, GenotypeData
from engine.kernels import bits

Selection = Any  # None, slice, integer indices, boolean mask; for samples also a list of ids
DEFAULT_CM_PER_MB = 1.0  # of sites without a map


@dataclass(frozen=True)
class Sites:
    """One row per ALT allele: contig str (L,), position_bp int64 (L,) 1-based, id / ref / alt object (L,),
    alt_index int16 (L,) (0 = was biallelic), position_cm float64 (L,) restarting on each contig, or None without a map.
    """

    contig: np.ndarray
    position_bp: np.ndarray
    id: np.ndarray
    ref: np.ndarray
    alt: np.ndarray
    alt_index: np.ndarray
    position_cm: np.ndarray | None = None

    def centimorgans(self) -> np.ndarray:
        """float64 (L,): genetic positions; without a map DEFAULT_CM_PER_MB is assumed throughout."""
        return self.position_bp * (DEFAULT_CM_PER_MB / 1e6) if self.position_cm is None else self.position_cm


@dataclass(frozen=True)
class Samples:
    """ids (S names), group str (S,) or None, sex "male" / "female" / "unknown" (S,) or None, first_haplotype int64
    (S + 1,): sample s owns haplotypes [first[s], first[s+1]).
    """

    ids: list[str]
    group: np.ndarray | None
    sex: np.ndarray | None
    first_haplotype: np.ndarray


@dataclass(frozen=True)
class HaplotypePanel:
    """Packed haplotypes. `bits_lw` uint64 (L, ceil(N / 64)), 1 = ALT; `missing_lw` of the same shape or None.

    `hemizygous`: rows bool (L,) and samples bool (S,), men on X outside PAR, whose second haplotype is missing there;
    None where nobody is. `notes`: what reading had to decide, one sentence each.
    """

    bits_lw: np.ndarray
    missing_lw: np.ndarray | None
    sites: Sites
    samples: Samples
    phased: bool = True
    contig_length: dict[str, int] = field(default_factory=dict)
    assembly: str | None = None
    hemizygous: tuple[np.ndarray, np.ndarray] | None = None
    notes: tuple[str, ...] = ()

    @property
    def n_haplotypes(self) -> int:
        return int(self.samples.first_haplotype[-1])

    @property
    def n_sites(self) -> int:
        return len(self.sites.position_bp)

    @property
    def n_samples(self) -> int:
        return len(self.samples.ids)

    @cached_property
    def sample_of_haplotype_n(self) -> np.ndarray:
        """int64 (N,): index of the sample that owns each haplotype."""
        return np.repeat(np.arange(self.n_samples), np.diff(self.samples.first_haplotype))

    @cached_property
    def group_n(self) -> np.ndarray | None:
        """str (N,): group of each haplotype; None where the panel has no groups."""
        return None if self.samples.group is None else self.samples.group[self.sample_of_haplotype_n]

    def groups(self) -> dict[str, np.ndarray]:
        """Group name -> int64 indices of its haplotypes, in order of first appearance; empty without groups."""
        if self.group_n is None:
            return {}
        return {str(g): np.flatnonzero(self.group_n == g) for g in dict.fromkeys(self.group_n.tolist())}

    def haplotype_major(self) -> np.ndarray:
        """bits_nw uint64 (N, ceil(L / 64)) for neighbour search; a transposed copy."""
        return bits.transpose(self.bits_lw, self.n_haplotypes)

    def alleles_nl(self) -> np.ndarray:
        """uint8 (N, L): 0, 1, and 255 where missing. Eight times the packed size: for small panels."""
        alleles_nl = bits.unpack(self.haplotype_major(), self.n_sites)
        if self.missing_lw is not None:
            missing_nw = bits.transpose(self.missing_lw, self.n_haplotypes)
            alleles_nl[bits.unpack(missing_nw, self.n_sites).astype(bool)] = 255
        return alleles_nl

    def select(self, sites: Selection = None, samples: Selection = None) -> HaplotypePanel:
        """The panel with only these sites and samples, in the order asked for.

        Args:
            sites: None, slice (a view), integer indices or boolean mask (L,).
            samples: None, slice, integer indices, boolean mask (S,), or a list of sample ids.

        Raises:
            UsageError: an index is out of range, or a sample id is not in the panel.
        """
        made = self
        if sites is not None:
            at = sites if isinstance(sites, slice) else _indices(sites, self.n_sites, "sites")
            s = made.sites
            made = replace(
                made,
                bits_lw=made.bits_lw[at],
                missing_lw=None if made.missing_lw is None else made.missing_lw[at],
                sites=Sites(
                    s.contig[at], s.position_bp[at], s.id[at], s.ref[at], s.alt[at], s.alt_index[at],
                    None if s.position_cm is None else s.position_cm[at],
                ),
                hemizygous=_present(None if made.hemizygous is None else (made.hemizygous[0][at], made.hemizygous[1])),
            )  # fmt: skip
        if samples is not None:
            chosen = self._sample_indices(samples)
            index, first = genotypes.haplotype_index(self.samples.first_haplotype, chosen)
            take = lambda plane: genotypes.take_haplotypes(plane, self.n_haplotypes, index)  # noqa: E731
            made = replace(
                made,
                bits_lw=take(made.bits_lw),
                missing_lw=None if made.missing_lw is None else take(made.missing_lw),
                samples=Samples(
                    [self.samples.ids[k] for k in chosen],
                    None if self.samples.group is None else self.samples.group[chosen],
                    None if self.samples.sex is None else self.samples.sex[chosen],
                    first,
                ),
                hemizygous=_present(
                    None if made.hemizygous is None else (made.hemizygous[0], made.hemizygous[1][chosen])
                ),
            )
        return made

    def _sample_indices(self, samples: Selection) -> np.ndarray:
        if isinstance(samples, slice):
            return np.arange(self.n_samples)[samples]
        if len(samples) and isinstance(next(iter(samples)), str):
            place = {name: k for k, name in enumerate(self.samples.ids)}
            absent = [name for name in samples if name not in place]
            if absent:
                raise UsageError("sample ids of the panel", f"'{absent[0]}' ({len(absent)} not found)", "select")
            return np.array([place[name] for name in samples], dtype=np.int64)
        return _indices(samples, self.n_samples, "samples")


def _present(hemizygous: tuple[np.ndarray, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray] | None:
    """None where no row or no sample is left of it."""
    return hemizygous if hemizygous is not None and hemizygous[0].any() and hemizygous[1].any() else None


def _indices(selection: Selection, size: int, what: str) -> np.ndarray:
    array = np.asarray(selection)
    if array.dtype == bool:
        if array.shape != (size,):
            raise UsageError(f"a mask of {size} {what}", f"shape {array.shape}", "select")
        return np.flatnonzero(array)
    array = array.astype(np.int64)
    if array.ndim != 1 or (len(array) and (array.min() < -size or array.max() >= size)):
        raise UsageError(f"indices of {size} {what}", f"{array.min()} to {array.max()}", "select")
    return np.where(array < 0, array + size, array)


def read_panel(
    path: str | Path,
    *,
    map: str | Path | genetic_map.GeneticMap | Sequence[str | Path] | None = None,
    samples_tsv: str | Path | None = None,
    group_column: str | None = None,
    region: str | None = None,
) -> HaplotypePanel:
    """Read a panel from .vcf, .vcf.gz, .bcf, .pgen, .vcz, .haps or .npz (`engine.files.packed_npz`).

    Maps, the samples table and the file's header are compared before genotypes are read.

    Args:
        map: genetic map, or maps of several contigs; every contig of the panel must have one. Gives `position_cm`.
        samples_tsv: table of sample, group and sex (see `read_samples`); every sample of the panel must be in it.
        group_column: column of that table that holds the groups; None takes the usual names.
        region: "contig" or "contig:first-last", 1-based inclusive.

    Raises:
        InputError: the file cannot be read or has no samples, the map is of another contig or build, a sample is not in
            the table, or sexes, ploidy and build do not fit on X (`engine.files.ploidy`). Unphased and missing
            genotypes are read; `phased` and `missing_lw` say so.
    """
    path = Path(path)
    maps = _maps(map)
    group = sex = None
    if not path.name.endswith((".pgen", ".vcz", ".haps", ".haps.gz", ".npz")):
        _check_header(path, maps, region, samples_tsv, group_column)
    data = genotype_files.read_genotypes(path, region=region)
    if not data.sample_ids:
        raise InputError("genotypes of at least one sample", "none", path, "a file with sample columns")
    if data.n_sites == 0:
        raise InputError("at least one site", "none", path, "another region" if region else "a file with records")
    if samples_tsv is not None:
        group, sex = read_samples(samples_tsv, data.sample_ids, group_column=group_column)
    stated = sex
    if sex is None and path.suffix == ".pgen":
        from engine.files.plink import read_psam

        stated = read_psam(path.with_suffix(".psam"))[1]
    data = ploidy.mark(data, sex=stated, where=path)
    panel = panel_from_genotypes(data)
    if maps:
        position_cm, notes = _positions_cm(panel, maps, path)
        panel = replace(panel, sites=replace(panel.sites, position_cm=position_cm), notes=(*panel.notes, *notes))
    sex = stated if sex is None else sex
    if sex is None and data.hemizygous is not None:
        sex = np.where(data.hemizygous[1], "male", "female")
    elif sex is None and ploidy.is_x(data.contig).all() and (np.diff(data.haplotypes_of_sample) == 1).any():
        sex = np.where(np.diff(data.haplotypes_of_sample) == 1, "male", "female")
    return replace(panel, samples=replace(panel.samples, group=group, sex=sex))


def _maps(given: Any) -> list[genetic_map.GeneticMap]:
    if given is None:
        return []
    if isinstance(given, genetic_map.GeneticMap):
        return [given]
    files = [given] if isinstance(given, str | Path) else list(given)
    return [each for file in files for each in genetic_map.read_maps(file).values()]


def _check_header(
    path: Path, maps: list[genetic_map.GeneticMap], region: str | None, samples_tsv: Any, group_column: str | None
) -> None:
    """What a header alone shows to be wrong: samples without a row in the table, a map of another contig or build."""
    from engine.files import vcf_header

    header, contig = vcf_header.read(path)
    if region is not None:
        contig = next((name for name in header.contigs if region == name or region.startswith(f"{name}:")), None)
    if samples_tsv is not None:
        read_samples(samples_tsv, header.samples, group_column=group_column)
    if maps and contig is not None:
        own = genetic_map.choose_map(maps, contig, where=path)
        genetic_map.check_build(
            own, contig, np.zeros(0), assembly=header.assembly, contig_length=header.contig_length.get(contig), where=path
        )  # fmt: skip


def write_panel(panel: HaplotypePanel, path: str | Path, *, header_lines: Sequence[str] = ()) -> None:
    """Write a panel in one of the formats of `engine.files.genotype_files`, whole or absent.

    Args:
        header_lines: extra `##key=value` lines, e.g. the statement that the data are synthetic.

    Raises:
        UsageError: another suffix.
        InputError: the panel cannot be written in this format, with the site.
    """
    path = Path(path)
    data = genotypes_from_panel(panel)
    if path.name.endswith((".pgen", ".bed")):
        data = ploidy.with_par_contigs(data)
    genotype_files.write_genotypes(path, data, header_lines=list(header_lines), sex=panel.samples.sex)


def panel_from_genotypes(data: GenotypeData) -> HaplotypePanel:
    """The panel of what a file held, without groups, sexes and genetic positions. Arrays are shared, not copied."""
    sites = Sites(data.contig, data.position_bp, data.id, data.ref, data.alt, data.alt_index)
    samples = Samples(list(data.sample_ids), None, None, data.haplotypes_of_sample)
    return HaplotypePanel(
        data.bits_lw, data.missing_lw, sites, samples, data.phased, dict(data.contig_length), data.assembly,
        data.hemizygous, tuple(data.notes),
    )  # fmt: skip


def genotypes_from_panel(panel: HaplotypePanel) -> GenotypeData:
    """What the file writers take. Arrays are shared, not copied."""
    s = panel.sites
    return GenotypeData(
        panel.bits_lw, panel.n_haplotypes, panel.missing_lw, panel.phased, s.contig, s.position_bp, s.id, s.ref, s.alt,
        s.alt_index, list(panel.samples.ids), panel.samples.first_haplotype, dict(panel.contig_length), panel.assembly,
        list(panel.notes), panel.hemizygous,
    )  # fmt: skip


def panel_from_alleles(
    alleles_ln: np.ndarray,
    position_bp: np.ndarray,
    contig: str | np.ndarray,
    sample_ids: Sequence[str],
    *,
    group: Sequence[str] | np.ndarray | None = None,
    sex: Sequence[str] | np.ndarray | None = None,
    first_haplotype: np.ndarray | None = None,
    id: Sequence[str] | None = None,
    ref: Sequence[str] | None = None,
    alt: Sequence[str] | None = None,
    position_cm: np.ndarray | None = None,
    contig_length: dict[str, int] | None = None,
    assembly: str | None = None,
    phased: bool = True,
) -> HaplotypePanel:
    """Panel from unpacked alleles.

    Args:
        alleles_ln: uint8 (L, N): 0, 1, or 255 for missing.
        position_bp: (L,) 1-based, ascending within each contig.
        contig: one name, or one per site.
        sample_ids: S names. N must be S (haploid) or 2 S (diploid) unless `first_haplotype` (S + 1,) is given.
        ref, alt: alleles per site; A and G where not given.

    Raises:
        UsageError: shapes that do not fit together.
    """
    sites, n = alleles_ln.shape
    names = np.full(sites, contig) if isinstance(contig, str) else np.asarray(contig)
    count = len(sample_ids)
    if first_haplotype is None:
        if count == 0 or n not in (count, 2 * count):
            raise UsageError("one or two haplotypes per sample", f"{n} for {count} samples", "panel_from_alleles")
        first_haplotype = np.arange(count + 1, dtype=np.int64) * (n // count)
    missing_ln = alleles_ln == 255
    text = lambda values, default: np.array(default if values is None else list(values), dtype=object)  # noqa: E731
    data = GenotypeData(
        bits_lw=bits.pack(np.where(missing_ln, 0, alleles_ln).astype(np.uint8)),
        n_haplotypes=n,
        missing_lw=bits.pack(missing_ln) if missing_ln.any() else None,
        phased=phased,
        contig=names.astype(str),
        position_bp=np.asarray(position_bp, dtype=np.int64),
        id=text(id, ["."] * sites),
        ref=text(ref, ["A"] * sites),
        alt=text(alt, ["G"] * sites),
        alt_index=np.zeros(sites, dtype=np.int16),
        sample_ids=list(sample_ids),
        haplotypes_of_sample=np.asarray(first_haplotype, dtype=np.int64),
        contig_length=dict(contig_length or {}),
        assembly=assembly,
    )
    genotypes.check_sorted(data.contig, data.position_bp, "panel_from_alleles")
    panel = panel_from_genotypes(data)
    return replace(
        panel,
        sites=replace(panel.sites, position_cm=None if position_cm is None else np.asarray(position_cm, np.float64)),
        samples=replace(
            panel.samples,
            group=None if group is None else np.asarray(group, dtype=str),
            sex=None if sex is None else np.asarray(sex, dtype=str),
        ),
    )


def read_samples(
    path: str | Path, wanted: Sequence[str], *, group_column: str | None = None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Group and sex of the `wanted` samples from a table with a header, separated by tabs, else commas, else blanks.

    The sample id is column `sample`, `iid`, `id` or `sample_id`, else the first. The group is `group_column`, else
    `group`, `pop` or `super_pop`, in this order; the sex is `sex` or `gender` (male / female, M / F, 1 / 2). Names of
    columns are compared without regard to case and a leading `#`. Rows of other samples are ignored.

    Raises:
        InputError: a wanted sample is absent or listed twice with different values, or the table has no group column.
    """
    rows: dict[str, list[str]] = {}
    names, lines = delimited.read(path)
    header = [name.lower() for name in names]
    if len(header) < 2:
        raise InputError("a header such as 'sample<TAB>group'", f"{header}", path)
    id_at = next((header.index(name) for name in ("sample", "iid", "id", "sample_id") if name in header), 0)
    for number, row in enumerate(lines, start=2):
        if len(row) <= id_at or not row[id_at]:
            continue
        if rows.setdefault(row[id_at], row) != row:
            raise InputError("one row per sample", f"'{row[id_at]}' again with other values", f"{path}, line {number}")
    absent = [name for name in wanted if name not in rows]
    if absent:
        raise InputError(
            f"all {len(wanted)} samples of the panel", f"no row for '{absent[0]}' ({len(absent)} absent)", path,
            "the samples table that belongs to this panel",
        )  # fmt: skip

    def column(*names: str) -> list[str] | None:
        for name in names:
            places = [at for at, each in enumerate(header) if each == name and at != id_at]
            if places:
                return [rows[sample][places[0]] if places[0] < len(rows[sample]) else "" for sample in wanted]
        return None

    known = [name for at, name in enumerate(header) if name and at != id_at]
    group = column("group", "pop", "super_pop") if group_column is None else column(group_column.lstrip("#").lower())
    if group is None and group_column is not None:
        raise InputError(f"a column '{group_column}'", ", ".join(known), path, closest(group_column.lower(), known))
    if group is None:
        raise InputError("a column 'group', 'pop' or 'super_pop'", ", ".join(known), path, f"--group-column {known[0]}")
    if "" in group:
        raise InputError("a group for every sample", f"none for '{wanted[group.index('')]}'", path)
    sex = column("sex", "gender")
    return (
        np.array(group, dtype=str),
        None if sex is None else np.array([SEX_NAMES.get(value.lower(), "unknown") for value in sex], dtype=str),
    )


def synthetic_ids(start: int, n: int) -> list[str]:
    """Names of synthetic people start .. start+n-1: SYN000000000 and so on."""
    return [f"SYN{k:09d}" for k in range(start, start + n)]


def write_samples(panel: HaplotypePanel, path: str | Path) -> None:
    """Write the table that `read_samples` reads, whole or absent.

    Raises:
        UsageError: the panel has no groups.
    """
    s = panel.samples
    if s.group is None:
        raise UsageError("a panel with groups", "none", "write_samples")
    sex = np.full(len(s.ids), "unknown") if s.sex is None else s.sex
    lines = ["sample\tgroup\tsex", *("\t".join(row) for row in zip(s.ids, s.group.tolist(), sex.tolist()))]
    write_text(path, "\n".join(lines) + "\n")


def _positions_cm(
    panel: HaplotypePanel, maps: list[genetic_map.GeneticMap], path: Path
) -> tuple[np.ndarray, list[str]]:
    """Genetic position of every site, and what could not be told; each contig must have a map that covers it."""
    position_cm, notes = np.empty(panel.n_sites, dtype=np.float64), []
    contig_l = panel.sites.contig
    for contig in dict.fromkeys(contig_l.tolist()):
        at = contig_l == contig
        own = genetic_map.choose_map(maps, contig, where=path)
        note = genetic_map.check_build(
            own,
            contig,
            panel.sites.position_bp[at],
            assembly=panel.assembly,
            contig_length=panel.contig_length.get(contig),
            where=path,
        )
        notes += [note] if note else []
        position_cm[at] = own.interpolate(panel.sites.position_bp[at])
    return position_cm, notes
