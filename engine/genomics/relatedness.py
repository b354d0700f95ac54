"""Kinship of people from their genotypes, unphased and with gaps: who is whose twin, child or cousin, within a panel or
between two; and whether the sites at hand can tell at all.

The estimator is KING-robust between families (Manichaikul et al., Bioinformatics 26:2867, 2010, equation 11), the number
that `plink2 --make-king-table` prints: of the sites that both people have,

    kinship = 1/2 - (4 N(AA, aa) + N(Aa, hom) + N(hom, Aa)) / (4 min(N(Aa) of one, N(Aa) of the other)).

It needs no allele frequencies, so that ancestry does not look like kinship; people of different ancestry come out below 0.
It does need sites that are independent of each other and spread over the genome: over one short region everybody's kinship
is any number between -1/2 and 1/2. `resolution` says what the sites of a panel can resolve. What follows from a pair (two
sides of an audit that share a family) is left to `pools` and `audit_judges`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from engine.errors import InputError
from engine.files.genetic_map import plain_contig
from engine.genomics.panel import HaplotypePanel
from engine.kernels import bits, ld, nearest
from engine.kernels.bits.tiles import BLOCK, and_tile, dot_tile, interleaved
from engine.kernels.haplotype_hmm.threads import in_threads

# 2**-1.5, 2**-2.5, 2**-3.5: Manichaikul et al., table 1
SAME_PERSON, FIRST_DEGREE, SECOND_DEGREE = 0.354, 0.177, 0.0884
THRESHOLDS = (SAME_PERSON, FIRST_DEGREE, SECOND_DEGREE)
_NOT_AUTOSOMES = {"X", "Y", "XY", "M", "MT", "PAR1", "PAR2", "23", "24", "25", "26"}
_MIN_MAF, _MOST_R2, _WINDOW_BP = 0.05, 0.1, 1_000_000  # of sites called independent
_SITES_PER_CONTIG, _MOST_SITES = 20_000, 20_000  # looked at for independence; used: their error is below 0.01
_STRETCH_BP = 10_000_000
_STRETCHES = {SAME_PERSON: 3, FIRST_DEGREE: 20, SECOND_DEGREE: 20}
_FALSE_PAIRS = 0.01  # expected number of unrelated pairs above the threshold, at which it can still be judged
_TILE_PEOPLE = 2048


@dataclass(frozen=True)
class Genotypes:
    """Genotypes by person: planes uint64 (S, ceil(sites / 64)), unused bits 0. Arrays may be memory maps: they are read in
    tiles of rows.

    het_sw: heterozygous. hom_sw: homozygous, of either allele. zero_sw: no ALT allele. A site is in none where an allele is
    not called. complete: there is no such site. sites: their number.
    """

    het_sw: NDArray[np.uint64]
    hom_sw: NDArray[np.uint64]
    zero_sw: NDArray[np.uint64]
    sites: int
    complete: bool

    def __len__(self) -> int:
        return len(self.het_sw)


@dataclass(frozen=True)
class RelatedPairs:
    """Pairs, closest first: first_p, second_p int64 (P,) are indices of people; kinship_p float64 (P,)."""

    first_p: NDArray[np.int64]
    second_p: NDArray[np.int64]
    kinship_p: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.kinship_p)


@dataclass(frozen=True)
class Resolution:
    """What a panel's sites can say about kinship.

    Attributes:
        site_l: int64, sites that are about independent: autosomal, MAF >= 5 %, no two within 1 Mb with r2 > 0.1, at most
            20,000 of them.
        error: standard deviation of the kinship of two unrelated people over these sites.
        stretches: of 10 Mb, with at least one of them. Few stretches are inherited whole: second cousins can then be as
            alike as brothers, whatever the number of sites.
        match: probability that two unrelated people have equal genotypes at all of them.
    """

    site_l: NDArray[np.int64]
    error: float
    stretches: int
    match: float

    def limit(self, threshold: float, pairs: int) -> float | None:
        """Kinship from which on a pair among so many is related and not lucky: `threshold`, or more where the sites are few.

        None where they cannot tell: not even the kinship expected of the degree (1/2, 1/4, 1/8: sqrt(2) times its threshold)
        stands out, or too few stretches are seen.
        """
        needed = min(
            (n for least, n in _STRETCHES.items() if least <= threshold + 1e-9), default=max(_STRETCHES.values())
        )
        lucky = self.error * float(stats.norm.isf(_FALSE_PAIRS / max(1, pairs)))
        if self.stretches < needed or lucky > math.sqrt(2) * threshold:
            return None
        return max(threshold, lucky)

    def judges_identity(self, pairs: int) -> bool:
        """Whether equal genotypes among so many pairs mean the same person (or a twin)."""
        return self.match * pairs <= _FALSE_PAIRS


def genotypes_of_panel(panel: HaplotypePanel, site_l: NDArray[np.int64] | None = None) -> Genotypes:
    """Genotypes of a panel of diploid people, phased or not, at all sites or at `site_l`.

    Raises:
        InputError: a person who is not diploid.
    """
    _diploid(panel)
    chosen = slice(None) if site_l is None else site_l
    words_lw = np.ascontiguousarray(panel.bits_lw[chosen])
    missing_lw = None if panel.missing_lw is None else np.ascontiguousarray(panel.missing_lw[chosen])
    planes = bits.dosage_planes(words_lw, panel.n_haplotypes, missing_lw)
    by_person = lambda plane_lw: bits.transpose(plane_lw, panel.n_samples)  # noqa: E731
    complete = missing_lw is None or not missing_lw.any()
    return Genotypes(
        by_person(planes.observed_lw & ~planes.nonzero_lw), by_person(planes.nonzero_lw), by_person(planes.negative_lw),
        len(words_lw), complete,
    )  # fmt: skip


def genotypes_of_haplotypes(bits_nw: NDArray[np.uint64], length: int, site_l: NDArray[np.int64]) -> Genotypes:
    """Genotypes at `site_l` of people whose complete haplotypes are rows 2 s and 2 s + 1, uint64 (2 S, ceil(length / 64))."""
    people = len(bits_nw) // 2
    planes = [np.empty((people, bits.words(len(site_l))), dtype=np.uint64) for _ in range(3)]
    for first in range(0, people, 256):
        rows = np.ascontiguousarray(bits_nw[2 * first : 2 * min(first + 256, people)])
        dosage_sl = np.ascontiguousarray(bits.unpack(rows, length)[:, site_l].reshape(-1, 2, len(site_l)).sum(axis=1))
        for plane_sw, holds in zip(planes, (dosage_sl == 1, dosage_sl != 1, dosage_sl == 0), strict=True):
            plane_sw[first : first + len(holds)] = bits.pack(holds)
    return Genotypes(planes[0], planes[1], planes[2], len(site_l), True)


def kinship_tiles(
    one: Genotypes, other: Genotypes | None = None, *, people: int = _TILE_PEOPLE
) -> Iterator[tuple[int, int, NDArray[np.float64]]]:
    """Kinship of all pairs, in tiles of at most `people` x `people`.

    Args:
        other: people at the same sites; None compares `one` with itself, tiles above and on the diagonal only.

    Yields:
        first row, first column, kinship float64 (rows, columns); NaN where no site is heterozygous in one of the two.
    """
    second = one if other is None else other
    for row in range(0, len(one), people):
        first, het_a = _read(one, row, people)
        for column in range(0, len(second), people):
            if other is None and column < row:
                continue
            blocks, het_b = (first, het_a) if other is None and column == row else _read(second, column, people)
            tile_ab = np.empty((len(het_a), len(het_b)))
            complete = one.complete and second.complete
            in_threads(_rows_of_blocks, len(first[0]), first, blocks, het_a, het_b, one.sites, complete, tile_ab)
            yield row, column, tile_ab


def kinship(one: Genotypes, other: Genotypes | None = None) -> NDArray[np.float64]:
    """Kinship of all pairs as a matrix float64 (S, M); of one set with itself the diagonal is 1/2 by definition."""
    second = one if other is None else other
    made = np.full((len(one), len(second)), np.nan)
    for row, column, tile_ab in kinship_tiles(one, other):
        rows, columns = slice(row, row + tile_ab.shape[0]), slice(column, column + tile_ab.shape[1])
        made[rows, columns] = tile_ab
        if other is None:
            made[columns, rows] = tile_ab.T
    return made


def related_pairs(
    panel_a: HaplotypePanel,
    panel_b: HaplotypePanel | None = None,
    threshold: float = SECOND_DEGREE,
    *,
    site_l: NDArray[np.int64] | None = None,
) -> RelatedPairs:
    """Pairs of people with a kinship of at least `threshold`: i < j within one panel, or all of two panels.

    Args:
        panel_b: a panel of the same sites in the same order; the caller sees to that (`matching.common_sites`).
        threshold: 0.354 twins and duplicates, 0.177 parents, children and full siblings, 0.0884 second degree.
        site_l: sites to use; None takes all. Whether they can resolve the threshold is for `resolution` to say.

    Raises:
        InputError: people who are not diploid, or panels of different numbers of sites.
    """
    if panel_b is not None and panel_b.n_sites != panel_a.n_sites:
        raise InputError("panels of the same sites", f"{panel_a.n_sites} and {panel_b.n_sites}", "kinship")
    one = genotypes_of_panel(panel_a, site_l)
    return close_pairs(one, None if panel_b is None else genotypes_of_panel(panel_b, site_l), threshold)


def close_pairs(one: Genotypes, other: Genotypes | None, threshold: float) -> RelatedPairs:
    """As `related_pairs`, of genotypes."""
    found: list[tuple[NDArray, NDArray, NDArray]] = []
    for row, column, tile_ab in kinship_tiles(one, other):
        a, b = np.nonzero(tile_ab >= threshold)
        keep = slice(None) if other is not None else a + row < b + column
        a, b = a[keep], b[keep]
        found.append((a + row, b + column, tile_ab[a, b]))
    parts = [np.concatenate(column) for column in zip(*found)] if found else [np.zeros(0)] * 3
    order = np.argsort(-parts[2], kind="stable")
    return RelatedPairs(parts[0][order].astype(np.int64), parts[1][order].astype(np.int64), parts[2][order])


def largest_kinship(one: Genotypes, other: Genotypes) -> NDArray[np.float64]:
    """Largest kinship of each person of `one` with anybody of `other`, float64 (S,); -inf where none is defined."""
    best_s = np.full(len(one), -np.inf)
    for row, _, tile_ab in kinship_tiles(one, other):
        part = slice(row, row + len(tile_ab))
        best_s[part] = np.fmax(best_s[part], np.where(np.isnan(tile_ab), -np.inf, tile_ab).max(axis=1))
    return best_s


def same_people(one: Genotypes, other: Genotypes | None = None) -> tuple[list[tuple[int, int]], int]:
    """Pairs under two ids that are one person, as far as genotypes tell: equal but for what genotyping errs.

    The allowance is a tenth of the distance that the closest 5 % of the people of `one` have to their nearest (0 where that is
    small): some 1 % of the genotypes over a dense region, where unrelated people never come nearer than half of it.

    Returns:
        pairs i < j of `one`, or (of one, of other), each person of the other with the nearest; and the allowance: alleles that
        may differ.
    """
    if len(one) < 2:
        return [], 0
    mine = _by_alleles(one)
    near_s, _, at_s = (x[:, 0] for x in nearest.ibs_topk(mine, mine, one.sites, 1, exclude_self=True))
    allowed = int(0.1 * np.quantile(near_s, 0.05))
    if other is None:
        twins = np.flatnonzero((near_s <= allowed) & (at_s >= 0))
        return sorted({(min(s, t), max(s, t)) for s, t in zip(twins.tolist(), at_s[twins].tolist())}), allowed
    near_s, _, at_s = (x[:, 0] for x in nearest.ibs_topk(_by_alleles(other), mine, one.sites, 1))
    found = np.flatnonzero((near_s <= allowed) & (at_s >= 0))
    return [(s, t) for t, s in zip(found.tolist(), at_s[found].tolist())], allowed


def _by_alleles(people: Genotypes) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64] | None]:
    """Planes of `nearest.ibs_topk`: dosage at least 1, dosage 2, observed."""
    two_sw = people.hom_sw & ~people.zero_sw
    return people.het_sw | two_sw, two_sw, None if people.complete else people.het_sw | people.hom_sw


def resolution(panel: HaplotypePanel) -> Resolution:
    """Which sites of a panel are about independent, and what kinship over them can resolve.

    With N(Aa) of the first the smaller one, the kinship is the sum over the sites of [Aa, Aa] - 2 [AA, aa] + ([Aa, hom] -
    [hom, Aa]) / 2, divided by 2 N(Aa). For two unrelated people of one population a site with heterozygosity H = 2 p (1 - p)
    adds 0 in the mean, with variance H / 2 + 5 H^2 / 2. Over independent sites the kinship then deviates from 0 by
    sqrt(sum of H / 2 + 5 H^2 / 2) / (2 sum of H), 0.94 / sqrt(sites) for common alleles.

    Raises:
        InputError: a person who is not diploid.
    """
    _diploid(panel)
    n = panel.n_haplotypes
    missing_lw = panel.missing_lw
    called_l = np.full(panel.n_sites, n) if missing_lw is None else n - bits.popcount_rows(missing_lw)
    frequency_l = bits.popcount_rows(panel.bits_lw) / np.maximum(1, called_l)
    common_l = np.minimum(frequency_l, 1 - frequency_l) >= _MIN_MAF
    kept: list[NDArray[np.int64]] = []
    for contig in dict.fromkeys(panel.sites.contig.tolist()):
        if plain_contig(contig).upper() in _NOT_AUTOSOMES:
            continue
        at = _thinned(np.flatnonzero(common_l & (panel.sites.contig == contig)), _SITES_PER_CONTIG)
        if len(at) == 0:
            continue
        alone = ld.prune(
            np.ascontiguousarray(panel.bits_lw[at]), n, _MOST_R2, bp=_WINDOW_BP, unphased=True,
            position_bp=panel.sites.position_bp[at],
            missing_lw=None if missing_lw is None else np.ascontiguousarray(missing_lw[at]),
        )  # fmt: skip
        kept.append(at[alone])
    site_l = _thinned(np.concatenate([*kept, np.zeros(0, dtype=np.int64)]).astype(np.int64), _MOST_SITES)
    het_l = 2 * frequency_l[site_l] * (1 - frequency_l[site_l])
    error = float(np.sqrt((het_l / 2 + 2.5 * het_l**2).sum()) / (2 * het_l.sum())) if len(site_l) else np.inf
    places = {
        (contig, bp // _STRETCH_BP)
        for contig, bp in zip(panel.sites.contig[site_l].tolist(), panel.sites.position_bp[site_l].tolist())
    }
    # P(equal genotypes) at a site: p^4 + 4 p^2 q^2 + q^4 = (1 - H)^2 + H^2 / 2
    match = float(np.exp(np.log((1 - het_l) ** 2 + het_l**2 / 2).sum()))
    return Resolution(site_l, error, len(places), match)


def _diploid(panel: HaplotypePanel) -> None:
    odd = int((np.diff(panel.samples.first_haplotype) != 2).sum())
    if odd:
        raise InputError("diploid people", f"{odd} of {panel.n_samples} who are not", "kinship")


def _thinned(index: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most `most` of the indices, evenly spread."""
    return index if len(index) <= most else index[np.linspace(0, len(index) - 1, most).astype(np.int64)]


_Blocks = tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]


def _read(people: Genotypes, first: int, count: int) -> tuple[_Blocks, NDArray[np.int64]]:
    """Register tiles of some people, and how many sites of each are heterozygous."""
    part = slice(first, first + count)
    het_sw, hom_sw, zero_sw = (np.ascontiguousarray(p[part]) for p in (people.het_sw, people.hom_sw, people.zero_sw))
    return (interleaved(het_sw), interleaved(hom_sw), interleaved(zero_sw)), bits.popcount_rows(het_sw)


@numba.njit(cache=True, nogil=True)
def _rows_of_blocks(
    begin: int,
    end: int,
    a: _Blocks,
    b: _Blocks,
    het_a: np.ndarray,
    het_b: np.ndarray,
    sites: int,
    complete: bool,
    tile_ab: np.ndarray,
) -> None:
    """Kinship of the people of blocks begin .. end-1 of `a` with all of `b`."""
    cells = BLOCK * BLOCK
    both_het, product, both_hom, het_hom, hom_het = (
        np.empty(cells, dtype=np.int32),
        np.empty(cells, dtype=np.int32),
        np.empty(cells, dtype=np.int32),
        np.empty(cells, dtype=np.int32),
        np.empty(cells, dtype=np.int32),
    )
    for i in range(begin, end):
        for j in range(b[0].shape[0]):
            and_tile(a[0], i, b[0], j, both_het)
            dot_tile(a[1], a[2], i, b[1], b[2], j, product)  # equal homozygotes less opposite ones
            if not complete:
                and_tile(a[1], i, b[1], j, both_hom)
                and_tile(a[0], i, b[1], j, het_hom)
                and_tile(a[1], i, b[0], j, hom_het)
            for r in range(min(BLOCK, tile_ab.shape[0] - i * BLOCK)):
                for c in range(min(BLOCK, tile_ab.shape[1] - j * BLOCK)):
                    at = r * BLOCK + c
                    hets = both_het[at]
                    if complete:
                        mine, theirs = het_a[i * BLOCK + r] - hets, het_b[j * BLOCK + c] - hets
                        homs = sites - mine - theirs - hets
                    else:
                        mine, theirs, homs = np.int64(het_hom[at]), np.int64(hom_het[at]), np.int64(both_hom[at])
                    opposite = (homs - product[at]) // 2
                    fewer = hets + min(mine, theirs)
                    if fewer == 0:
                        tile_ab[i * BLOCK + r, j * BLOCK + c] = np.nan
                    else:
                        apart = 4 * opposite + mine + theirs
                        tile_ab[i * BLOCK + r, j * BLOCK + c] = 0.5 - apart / (4.0 * fewer)


def families(panel: HaplotypePanel) -> dict[str, str]:
    """Who has to lie on one side: the id of the first of each family, by the id of every person.

    A family is joined by equal genotypes under two ids and by kinship of the second degree or closer, as far as the sites
    can tell; people whose sites cannot tell are families of their own.
    """
    head = {name: name for name in panel.samples.ids}
    if (np.diff(panel.samples.first_haplotype) != 2).any():
        return head  # kinship is defined for diploid people
    resolved, pairs = resolution(panel), panel.n_samples * (panel.n_samples - 1) // 2
    joined: list[tuple[int, int]] = []
    if resolved.judges_identity(pairs):
        joined += same_people(genotypes_of_panel(panel))[0]
    levels = (resolved.limit(least, pairs) for least in reversed(THRESHOLDS))
    level = next((limit for limit in levels if limit is not None), None)
    if level is not None:
        kin = close_pairs(genotypes_of_panel(panel, resolved.site_l), None, level)
        joined += zip(kin.first_p.tolist(), kin.second_p.tolist(), strict=True)
    for first, second in joined:
        one, other = sorted((head[panel.samples.ids[first]], head[panel.samples.ids[second]]))
        head = {name: one if own == other else own for name, own in head.items()}
    return head
