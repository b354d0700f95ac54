"""Ploidy on X: at which rows of a file males have one allele, and who the males are, by their calls and their stated
sex.

`mark` brings every spelling of a male call outside the pseudo-autosomal regions (`0`, `0/.`, `0|.`, the homozygote
`0/0` of PLINK filesets) to one form. Y and mitochondria, where everybody or no woman has one allele, need nothing of
this.

Bounds of the pseudo-autosomal regions: Genome Reference Consortium, GRCh37.p13 and GRCh38.p14.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.errors import InputError
from engine.files import genotypes
from engine.files.genetic_map import build_of_length, build_of_name, plain_contig
from engine.files.genotypes import GenotypeData
from engine.kernels import bits

# first and last position of PAR1 and PAR2 on X, 1-based, both included
PAR_BP = {
    "GRCh37": ((60_001, 2_699_520), (154_931_044, 155_260_560)),
    "GRCh38": ((10_001, 2_781_479), (155_701_383, 156_030_895)),
}
PAR_CONTIGS = ("PAR1", "PAR2", "XY", "25")  # PLINK's names of the pseudo-autosomal regions
_LEAST_HETS = 20.0  # heterozygotes expected of a woman; without a single one she is taken for a man
_BLOCK_BYTES = 32 << 20


def outside_par(contig: np.ndarray, position_bp: np.ndarray, build: str) -> np.ndarray:
    """bool (L,): sites on X between PAR1 and PAR2, where a male has one haplotype.

    Args:
        contig: str (L,); PLINK's PAR1, PAR2 and XY lie inside. build: "GRCh37" or "GRCh38".
    """
    first, last = PAR_BP[build][0][1], PAR_BP[build][1][0]
    return is_x(contig) & (position_bp > first) & (position_bp < last)


def rows_of(data: GenotypeData, where: object = "") -> np.ndarray:
    """bool (L,): rows on X outside PAR, by the build that the header states, or by both where they agree on these rows.

    Raises:
        InputError: no build is stated, and the bounds of the two differ at some row.
    """
    stated = build_of(data)
    made = {build: outside_par(data.contig, data.position_bp, build) for build in ([stated] if stated else PAR_BP)}
    rows_l = next(iter(made.values()))
    if any((other_l != rows_l).any() for other_l in made.values()):
        raise InputError("a header that states the build of X", "none", where, "bcftools reheader -f REFERENCE.fa.fai")
    return rows_l


def is_x(contig: np.ndarray) -> np.ndarray:
    """bool (L,): rows on X under one of its names (X, chrX, 23)."""
    names = np.unique(contig)
    return np.isin(contig, [name for name in names.tolist() if plain_contig(name) == "X"])


def build_of(data: GenotypeData) -> str | None:
    """Build that the header states for X by name or by length; None where it states none."""
    names = [name for name in np.unique(data.contig).tolist() if plain_contig(name) == "X"]
    by_length = [build_of_length(name, data.contig_length.get(name)) for name in names]
    return build_of_name(data.assembly) or next((each for each in by_length if each), None)


def mark(data: GenotypeData, *, sex: np.ndarray | None = None, where: object = "") -> GenotypeData:
    """`data` with its males known: `hemizygous` is set, and what stands as their second allele outside PAR is missing.

    Where all rows lie outside PAR a male owns one haplotype instead. PLINK's PAR1, PAR2 and XY become X and are sorted
    in. Without X the data come back as they are.

    Args:
        sex: str (S,) "male" / "female" / "unknown"; None where nothing is known. Who has calls of one allele is male;
            of those with two equal alleles everywhere, who is stated as male, or of unknown sex where a woman would
            have more than 20 heterozygotes.

    Raises:
        InputError: a woman with calls of one allele, a man with heterozygotes outside PAR or one allele inside (of a
            wrong sex, or another build), or a build that is neither stated nor to be told from the calls.
    """
    data = _one_x(data)
    x_l = is_x(data.contig)
    if not x_l.any() or not data.sample_ids:
        return data
    stated = build_of(data)
    build = stated or _build_by_calls(data, where)
    rows_l = outside_par(
        data.contig, data.position_bp, build or "GRCh38"
    )  # without a build no site lies between the two
    if not rows_l.any():
        return data
    named = f" ({build})" if build else ""
    sex = np.full(len(data.sample_ids), "unknown") if sex is None else sex
    data = _whole(data, rows_l, where)
    single_s, het_s, hom_s = _calls(data, rows_l)
    alone_s = np.diff(data.haplotypes_of_sample) == 1
    male_s = single_s > 0
    male_s |= (
        (het_s == 0)
        & (hom_s > 0)
        & ((sex == "male") | ((sex == "unknown") & (_expected_hets(data, rows_l) > _LEAST_HETS)))
    )
    _refuse(
        data, (male_s | alone_s) & (sex == "female"), f"two alleles of women on X outside PAR{named}", "one, of", where
    )
    wrong_s = ((sex == "male") | male_s) & (het_s > 0)
    _refuse(data, wrong_s, f"one allele of men on X outside PAR{named}", "heterozygotes of", where)
    inside_l = x_l & ~rows_l
    if inside_l.any():
        _refuse(data, _calls(data, inside_l)[0] > 0, f"two alleles inside PAR{named}", "one, of", where)
    count = int((male_s | alone_s).sum())
    said = [f"{count} men have one allele at {int(rows_l.sum())} sites of X outside PAR{named}"] if count else []
    notes = [*(note for note in data.notes if "haploid in some records" not in note), *said]
    return with_males(replace(data, assembly=data.assembly or build, notes=notes), rows_l, male_s)


def with_males(data: GenotypeData, rows_l: np.ndarray, male_s: np.ndarray) -> GenotypeData:
    """`data` in which the samples `male_s`, bool (S,), have one allele at `rows_l`, bool (L,): their first.

    They own one haplotype where that is so at all rows; else `hemizygous` is set and their second allele is missing
    there.
    """
    male_s = male_s & (np.diff(data.haplotypes_of_sample) == 2)
    if not male_s.any():
        return data
    second = data.haplotypes_of_sample[:-1][male_s] + 1
    if rows_l.all():
        return without_haplotypes(data, second)
    return with_absent(replace(data, hemizygous=(rows_l.copy(), male_s)))


def with_absent(data: GenotypeData) -> GenotypeData:
    """`data` with the second alleles of its hemizygous samples missing, as `hemizygous` says."""
    if data.hemizygous is None or not data.hemizygous[0].any():
        return data
    rows_l, male_s = data.hemizygous
    second = data.haplotypes_of_sample[:-1][male_s] + 1
    mask_w = np.zeros(bits.words(data.n_haplotypes), dtype=np.uint64)
    np.bitwise_or.at(mask_w, second // 64, np.uint64(1) << (second % 64).astype(np.uint64))
    bits_lw = data.bits_lw.copy()
    bits_lw[rows_l] &= ~mask_w
    missing_lw = np.zeros_like(bits_lw) if data.missing_lw is None else data.missing_lw.copy()
    missing_lw[rows_l] |= mask_w
    return replace(data, bits_lw=bits_lw, missing_lw=missing_lw)


def with_par_contigs(data: GenotypeData) -> GenotypeData:
    """`data` with the sites of X inside PAR on contigs PAR1 and PAR2, as PLINK wants them, where men are told apart."""
    if data.hemizygous is None:
        return data
    inside = np.flatnonzero(is_x(data.contig) & ~data.hemizygous[0])
    if len(inside) == 0:
        return data
    name = str(data.contig[inside[0]])
    chromosome = "chr" if name.startswith("chr") else ""
    middle_bp = int(np.median(data.position_bp[data.hemizygous[0]]))
    contig = data.contig.astype(object)
    contig[inside] = [f"{chromosome}PAR1" if bp < middle_bp else f"{chromosome}PAR2" for bp in data.position_bp[inside]]
    lengths: dict[str, int] = {}
    for each, length in data.contig_length.items():
        ends = [f"{chromosome}PAR1", each, f"{chromosome}PAR2"] if each == name else [each]
        lengths |= dict.fromkeys(ends, length)
    return replace(data, contig=contig.astype(str), contig_length=lengths)


def without_haplotypes(data: GenotypeData, dropped: np.ndarray) -> GenotypeData:
    """`data` without the haplotypes `dropped`, int64 indices, each the second of a sample; nobody is hemizygous any
    more."""
    kept = np.ones(data.n_haplotypes, dtype=bool)
    kept[dropped] = False
    index = np.flatnonzero(kept)
    count_s = np.add.reduceat(kept, data.haplotypes_of_sample[:-1])
    missing_lw = data.missing_lw
    if missing_lw is not None:
        missing_lw = genotypes.take_haplotypes(missing_lw, data.n_haplotypes, index)
    return replace(
        data,
        bits_lw=genotypes.take_haplotypes(data.bits_lw, data.n_haplotypes, index),
        missing_lw=missing_lw if missing_lw is not None and missing_lw.any() else None,
        n_haplotypes=len(index),
        haplotypes_of_sample=np.concatenate([[0], np.cumsum(count_s)]).astype(np.int64),
        hemizygous=None,
    )


def _one_x(data: GenotypeData) -> GenotypeData:
    """PLINK's contigs of the pseudo-autosomal regions under the name of X, in the order of positions."""
    names = np.unique(data.contig).tolist()
    apart = [name for name in names if plain_contig(name) in PAR_CONTIGS]
    if not apart:
        return data
    own = next((name for name in names if plain_contig(name) == "X"), "chrX" if apart[0].startswith("chr") else "X")
    contig = data.contig.astype(object)
    contig[np.isin(data.contig, apart)] = own
    contig = contig.astype(str)
    at = np.flatnonzero(contig == own)
    order = np.arange(len(contig))
    # all of X where its first row stands, the other contigs as they were
    rest_before, rest_after = order[: at[0]], np.setdiff1d(order[at[0] :], at)
    order = np.concatenate([rest_before, at[np.argsort(data.position_bp[at], kind="stable")], rest_after])
    lengths = {name: length for name, length in data.contig_length.items() if name not in apart}
    return replace(
        data,
        bits_lw=data.bits_lw[order],
        missing_lw=None if data.missing_lw is None else data.missing_lw[order],
        contig=contig[order],
        position_bp=data.position_bp[order],
        id=data.id[order],
        ref=data.ref[order],
        alt=data.alt[order],
        alt_index=data.alt_index[order],
        contig_length=lengths,
    )


def _whole(data: GenotypeData, rows_l: np.ndarray, where: object) -> GenotypeData:
    """Samples of one haplotype, where rows inside PAR or on autosomes ask for two: theirs are equal there, as PLINK
    means."""
    alone_s = np.diff(data.haplotypes_of_sample) == 1
    if not alone_s.any() or rows_l.all():
        return data
    if not str(where).endswith(".pgen"):
        _refuse(data, alone_s, "two alleles inside PAR and on autosomes", "one, of", where)
    index = np.repeat(
        np.arange(data.n_haplotypes), np.repeat(np.where(alone_s, 2, 1), np.diff(data.haplotypes_of_sample))
    )
    return replace(
        data,
        bits_lw=genotypes.take_haplotypes(data.bits_lw, data.n_haplotypes, index),
        missing_lw=None
        if data.missing_lw is None
        else genotypes.take_haplotypes(data.missing_lw, data.n_haplotypes, index),
        n_haplotypes=len(index),
        haplotypes_of_sample=2 * np.arange(len(alone_s) + 1, dtype=np.int64),
    )


def _build_by_calls(data: GenotypeData, where: object) -> str | None:
    """The build whose bounds of PAR alone agree with the calls of one allele; None where no site lies between the two
    builds'."""
    fitting = {}
    for build in PAR_BP:
        rows_l = outside_par(data.contig, data.position_bp, build)
        inside_l = is_x(data.contig) & ~rows_l
        single_s, het_s, _ = _calls(data, rows_l)
        if not ((single_s > 0) & (het_s > 0)).any() and not _calls(data, inside_l)[0].any():
            fitting[build] = rows_l
    chosen = list(fitting)
    if not chosen or (len(chosen) == 2 and (fitting[chosen[0]] != fitting[chosen[1]]).any()):
        got = "neither" if not chosen else "both"
        raise InputError(
            "a header that states the build of X", f"none, and {got} of GRCh37 and GRCh38 fits the calls of men", where,
            "bcftools reheader -f REFERENCE.fa.fai, which adds the lengths of contigs",
        )  # fmt: skip
    return chosen[0] if len(chosen) == 1 else None


def _blocks(rows: np.ndarray, n: int) -> list[np.ndarray]:
    size = max(1, _BLOCK_BYTES // max(1, n))
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _calls(data: GenotypeData, rows_l: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many calls at `rows_l` are of one allele only, heterozygous, homozygous: int64 (S,) each; 0 of who owns
    one."""
    pair_s = np.diff(data.haplotypes_of_sample) == 2
    first = data.haplotypes_of_sample[:-1][pair_s]
    made = np.zeros((3, len(pair_s)), dtype=np.int64)
    for rows in _blocks(np.flatnonzero(rows_l), data.n_haplotypes):
        allele_ln = bits.unpack(np.ascontiguousarray(data.bits_lw[rows]), data.n_haplotypes)
        called_ln = np.ones_like(allele_ln, dtype=bool)
        if data.missing_lw is not None:
            called_ln = bits.unpack(np.ascontiguousarray(data.missing_lw[rows]), data.n_haplotypes) == 0
        both = called_ln[:, first] & called_ln[:, first + 1]
        differ = allele_ln[:, first] != allele_ln[:, first + 1]
        made[0, pair_s] += (called_ln[:, first] & ~called_ln[:, first + 1]).sum(axis=0)
        made[1, pair_s] += (both & differ).sum(axis=0)
        made[2, pair_s] += (both & ~differ).sum(axis=0)
    return made[0], made[1], made[2]


def _expected_hets(data: GenotypeData, rows_l: np.ndarray) -> float:
    """Heterozygous calls that a woman would have at `rows_l` under Hardy-Weinberg proportions."""
    rows = np.flatnonzero(rows_l)
    called_l = np.full(len(rows), data.n_haplotypes)
    if data.missing_lw is not None:
        called_l = called_l - bits.popcount_rows(np.ascontiguousarray(data.missing_lw[rows]))
    share_l = bits.popcount_rows(np.ascontiguousarray(data.bits_lw[rows])) / np.maximum(called_l, 1)
    return float(np.sum(2 * share_l * (1 - share_l)))


def _refuse(data: GenotypeData, wrong_s: np.ndarray, expected: str, got: str, where: object) -> None:
    if wrong_s.any():
        name = data.sample_ids[int(np.flatnonzero(wrong_s)[0])]
        raise InputError(
            expected, f"{got} '{name}' ({int(wrong_s.sum())} people)", where,
            "the build and the sexes; bcftools +fixploidy or plink2 --set-invalid-haploid-missing clear stray heterozygotes",
        )  # fmt: skip
