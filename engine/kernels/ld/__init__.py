"""Linkage disequilibrium of packed genotypes: r2, r, D and D' of all pairs, of two sets, of listed pairs, inside a window; and
what is made of them without ever holding a matrix: lists above a threshold, LD scores, decay, pruning, clumps, blocks.

Input is site-major bits (`engine.kernels.bits`): `bits_lw` uint64 (L sites, ceil(n / 64) words), 1 = ALT; bits beyond
haplotype n are ignored. `missing_lw`, of the same shape, is 1 where an allele was not called: each pair is then computed over
the observations that both sites have. `unphased`: an observation is a person with a dosage (haplotypes 2 s and 2 s + 1) in
place of a haplotype with an allele. Sums are exact integers, values are made from them in float64 and rounded once to
float32 (reference_values.py has the formulas), so that all implementations agree bit for bit. Undefined is NaN.

A window is one integer per site (`window`): site i is compared with the sites in (i, end_l[i]). Which sites to compare and
what a figure means are left to the rooms above; so are contigs: positions are those of one contig.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from engine.errors import UsageError
from engine.kernels.ld import checks
from engine.kernels.ld.checks import WHERE, Implementation, Measure, Rule


def matrix(
    bits_lw: Any,
    n: int,
    other_mw: Any = None,
    *,
    missing_lw: Any = None,
    other_missing_mw: Any = None,
    unphased: bool = False,
    measure: Measure = "r2",
    out: Any = None,
    implementation: Implementation | None = None,
) -> Any:
    """One measure for all pairs of sites.

    Args:
        bits_lw: (L, ceil(n / 64)) uint64; a CUDA tensor of int64 with the same bits for triton.
        n: number of haplotypes, n <= 2**26, even where `unphased`.
        other_mw: a second set of sites over the same haplotypes; None compares `bits_lw` with itself.
        missing_lw, other_missing_mw: planes of alleles not called, like the bits; None where nothing is missing.
        unphased: compare the dosages 0, 1, 2 of people.
        measure: "r2"; "r" signed, of ALT with ALT; "d" = p_ab - p_a p_b, or of dosages half their covariance (Weir's composite
            disequilibrium, which is D under random mating); "d_prime" = D over its bound, signed, phased only.
        out: float32 (L, L) or (L, M), contiguous, to write into, such as an `np.memmap`; None makes one.
        implementation: None chooses by where the input lies (NumPy: numba, CUDA tensor: triton).

    Returns:
        float32 (L, L), or (L, M). r2 in [0, 1], r and d_prime in [-1, 1], d in [-1/4, 1/4] (unphased [-1/2, 1/2]). NaN where
        a site does not vary (d: where the two sites share no observation).

    Raises:
        UsageError: wrong shape, type or measure.
        Unsupported: the named implementation cannot run on this input; d_prime of unphased genotypes.
    """
    chosen = checks.choose(bits_lw, implementation)
    first, other = checks.pair_of_sets(bits_lw, n, other_mw, missing_lw, other_missing_mw, unphased)
    shape = (len(bits_lw), len(bits_lw if other_mw is None else other_mw))
    if out is not None:
        checks.output(out, shape, bits_lw)
    made = chosen.matrix(first, other, checks.measure_name(measure, unphased), out)
    return made


def pairs(
    bits_lw: Any,
    n: int,
    i: Any,
    j: Any,
    *,
    missing_lw: Any = None,
    unphased: bool = False,
    measure: Measure = "r2",
    implementation: Implementation | None = None,
) -> Any:
    """One measure of site i[p] with site j[p]: float32 (P,). `i`, `j`: integers (P,) in [0, L). Other arguments as `matrix`.

    Raises:
        UsageError: wrong shape or type, or an index outside the sites.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = checks.choose(bits_lw, implementation)
    first = checks.sites(bits_lw, n, missing_lw, unphased)
    i, j = checks.index_pairs(i, j, first.bits_lw, len(first.bits_lw))
    return chosen.pairs(first, i, j, checks.measure_name(measure, unphased))


def window(
    length: int,
    *,
    sites: int | None = None,
    bp: float | None = None,
    cm: float | None = None,
    position_bp: Any = None,
    position_cm: Any = None,
) -> np.ndarray:
    """Ends of windows, int64 (length,): site i is compared with the sites j in (i, end[i]).

    j is inside when j - i <= `sites`, position_bp[j] - position_bp[i] <= `bp` and position_cm[j] - position_cm[i] <= `cm`;
    a bound that is None does not bind. Positions: (length,), of one contig, never falling.

    Raises:
        UsageError: a negative bound, a bound without its positions, positions of another length or falling.
    """
    end_l = np.full(length, length, dtype=np.int64)
    if sites is not None:
        if sites < 0:
            raise UsageError("a window of 0 or more sites", str(sites), WHERE)
        end_l = np.minimum(end_l, np.arange(length, dtype=np.int64) + 1 + sites)
    for bound, values, unit in ((bp, position_bp, "bp"), (cm, position_cm, "cm")):
        if bound is None:
            continue
        if values is None or not bound >= 0:
            raise UsageError(f"position_{unit} beside {unit}, 0 or more", f"{bound}", WHERE)
        position_l = checks.numbers(values, length, f"position_{unit}", rising=True)
        reach_l = np.searchsorted(position_l, position_l + bound, side="right")
        while True:  # rounding of position + bound and of a difference are not the same: the difference decides
            outside_l = position_l[reach_l - 1] - position_l > bound
            at_l = np.minimum(reach_l, length - 1)
            inside_l = (reach_l < length) & (position_l[at_l] - position_l <= bound)
            if not (outside_l.any() or inside_l.any()):
                break
            reach_l = reach_l - outside_l + inside_l
        end_l = np.minimum(end_l, reach_l)
    return end_l


def band(
    bits_lw: Any,
    n: int,
    end_l: Any,
    *,
    missing_lw: Any = None,
    unphased: bool = False,
    measure: Measure = "r2",
    implementation: Implementation | None = None,
) -> Any:
    """One measure inside windows: float32 (L, W), [i, k] is site i with site i + 1 + k; NaN from the window's end on.

    Args:
        end_l: integers (L,), never falling, from `window`; W is the widest of them.

    Raises:
        UsageError: wrong shape, type or measure, ends that fall or lie outside the sites.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = checks.choose(bits_lw, implementation)
    first = checks.sites(bits_lw, n, missing_lw, unphased)
    ends = checks.window_ends(end_l, len(first.bits_lw))
    width = int((ends - np.arange(len(ends)) - 1).clip(min=0).max(initial=0))
    return chosen.band(first, ends, width, checks.measure_name(measure, unphased))


def threshold(
    bits_lw: Any,
    n: int,
    least: float,
    other_mw: Any = None,
    *,
    end_l: Any = None,
    missing_lw: Any = None,
    other_missing_mw: Any = None,
    unphased: bool = False,
    measure: Measure = "r2",
    implementation: Implementation | None = None,
) -> tuple[Any, Any, Any]:
    """Pairs whose measure reaches a threshold, as a sorted list; no matrix is held, and any number of threads gives the same.

    Args:
        least: kept where |value| >= least, both as float32: a listed value is a cell of `matrix`.
        other_mw: every pair of the two sets; None: pairs i < j of one set, of its windows where `end_l` is given.

    Returns:
        i, j int64 (P,), by i, then j; value float32 (P,). `csr` makes a sparse matrix of them.

    Raises:
        UsageError: wrong shape, type or measure; windows of two sets.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = checks.choose(bits_lw, implementation)
    first, other = checks.pair_of_sets(bits_lw, n, other_mw, missing_lw, other_missing_mw, unphased)
    ends = None
    if other is None:
        length = len(first.bits_lw)
        ends = np.full(length, length, dtype=np.int64) if end_l is None else checks.window_ends(end_l, length)
    elif end_l is not None:
        raise UsageError("end_l for one set of sites", "two sets", WHERE)
    if np.isnan(least):
        raise UsageError("a threshold", "nan", WHERE)
    found = chosen.threshold(first, other, ends, np.float32(least), checks.measure_name(measure, unphased))
    return found  # type: ignore[no-any-return]


class Csr(NamedTuple):
    """A sparse matrix by rows, as `scipy.sparse.csr_array((data, indices, indptr), shape)` takes it."""

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray


def csr(i: np.ndarray, j: np.ndarray, value: np.ndarray, rows: int) -> Csr:
    """A list of `threshold` by rows: indptr int64 (rows + 1,), indices int64 (P,) rising in each row, data as `value`."""
    return Csr(np.searchsorted(i, np.arange(rows + 1)), j, value)


def score(
    bits_lw: Any,
    n: int,
    end_l: Any,
    *,
    missing_lw: Any = None,
    unphased: bool = False,
    adjusted: bool = False,
    implementation: Implementation | None = None,
) -> Any:
    """LD scores: for each site the sum of r2 with itself (1) and with every site whose window it shares, before and after it.

    Args:
        adjusted: r2 - (1 - r2) / (n - 2) in place of r2, n the observations of the pair, which takes away most of the upward
            bias (Bulik-Sullivan et al., Nature Genetics 47, 2015); pairs of fewer than 3 observations are left out.

    Returns:
        float64 (L,), within 1e-12 relative of the reference, the same for any number of threads; NaN where a site does not
        vary.

    Raises:
        UsageError: wrong shape or type, ends that fall or lie outside the sites.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = checks.choose(bits_lw, implementation)
    first = checks.sites(bits_lw, n, missing_lw, unphased)
    return chosen.score(first, checks.window_ends(end_l, len(first.bits_lw)), adjusted)


def decay(
    bits_lw: Any,
    n: int,
    position_l: Any,
    edges: Any,
    *,
    missing_lw: Any = None,
    unphased: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Any, Any]:
    """Histogram of r2 by distance, over all pairs that have one, without ever holding the matrix.

    Args:
        position_l: numbers (L,), bp or cM, of one contig, never falling. Work beyond the last edge is skipped.
        edges: numbers (B + 1,) in the same unit, rising; bin b holds the pairs with edges[b] <= distance < edges[b + 1].

    Returns:
        sum of r2, float64 (B,), within 1e-12 relative of the reference and the same for any number of threads;
        number of pairs, int64 (B,), exact.

    Raises:
        UsageError: wrong shape or type, positions that fall, edges that do not rise.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = checks.choose(bits_lw, implementation)
    first = checks.sites(bits_lw, n, missing_lw, unphased)
    position_l = checks.numbers(position_l, len(first.bits_lw), "positions", rising=True)
    edges = checks.numbers(edges, None, "edges")
    if len(edges) < 2 or (edges[1:] <= edges[:-1]).any():
        raise UsageError("at least two rising edges", str(edges.tolist()[:8]), WHERE)
    kind = np.float64 if "f" in position_l.dtype.kind + edges.dtype.kind else np.int64
    sums, counts = chosen.decay(first, position_l.astype(kind), edges.astype(kind))
    return sums, counts


def prune(
    bits_lw: Any,
    n: int,
    most: float,
    *,
    sites: int | None = None,
    step: int = 1,
    bp: int | None = None,
    position_bp: Any = None,
    missing_lw: Any = None,
    unphased: bool = False,
    rule: Rule = "plink1",
    implementation: Implementation | None = None,
) -> np.ndarray:
    """Sites of one contig to keep, such that no two within a window have r2 above `most`: the set that PLINK keeps.

    Args:
        most: bound on r2, of haplotypes, or `unphased` of dosages (`--indep-pairphase`, `--indep-pairwise`).
        sites, step: windows of this many sites, each `step` further on; or
        bp: windows of this many base pairs, each one site further on, with `position_bp` integers (L,), never falling.
        rule: which pairs are looked at first. "plink1": from the left, as PLINK 1.9 and plink2 alpha 3 do (`--indep-order 1`).
            "plink2": each new site against the nearest before it, as plink2 alpha 6.9 does (`--indep-order 2`). Either way, of
            two linked sites the one with the rarer minor allele goes, and of equals the later.

    Returns:
        bool (L,), in host memory. A site that does not vary goes, unless nothing lies within `bp` of it: then it is not looked
        at, as in plink2 (PLINK 1.9 removes it, but for the first site of a contig).

    Raises:
        UsageError: wrong shape or type; both kinds of window or none; `step` beyond a window.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = checks.choose(bits_lw, implementation)
    first = checks.sites(bits_lw, n, missing_lw, unphased)
    rules = checks.prune_rules(len(first.bits_lw), most, sites, step, bp, position_bp, rule)
    kept = chosen.prune(first, rules)
    return kept  # type: ignore[no-any-return]


def clump(
    bits_lw: Any,
    n: int,
    p_l: Any,
    position_bp: Any,
    *,
    p1: float = 1e-4,
    p2: float = 0.01,
    least: float = 0.5,
    bp: int = 250_000,
    missing_lw: Any = None,
    unphased: bool = False,
    rule: Rule = "plink2",
    implementation: Implementation | None = None,
) -> np.ndarray:
    """Clumps of associated sites of one contig, as `plink --clump` makes them.

    The site of the smallest p <= p1 that is in no clump yet (of equals the first) is an index; whatever has p <= p2 (or p1),
    lies within `bp`, is in no clump yet, and has r2 above `least` with the index, joins it.

    Args:
        p_l: numbers (L,), p-values; nan where a site has none.
        position_bp: integers (L,), never falling.
        rule: r2 of unphased genotypes. "plink2": of dosages, as `--clump-unphased`. "plink1": of the most likely haplotype
            frequencies, and p < p2, as PLINK 1.9. Phased, both are r2 of haplotypes, as plink2 without that option.

    Returns:
        int64 (L,), in host memory: index site of the clump that a site is in (its own for an index), -1 where it is in none.

    Raises:
        UsageError: wrong shape or type, a p-value outside [0, 1].
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = checks.choose(bits_lw, implementation)
    first = checks.sites(bits_lw, n, missing_lw, unphased)
    rules = checks.clump_rules(len(first.bits_lw), p_l, position_bp, p1, p2, least, bp, rule, unphased)
    clump_l = chosen.clump(first, rules)
    return clump_l  # type: ignore[no-any-return]


def blocks(
    bits_lw: Any,
    n: int,
    position_bp: Any,
    *,
    min_maf: float = 0.05,
    share: float = 0.95,
    max_bp: int = 200_000,
    small_blocks_short: bool = True,
    missing_lw: Any = None,
    unphased: bool = False,
    implementation: Implementation | None = None,
) -> np.ndarray:
    """Haplotype blocks of one contig by the intervals of D', as Haploview and `plink --blocks no-pheno-req` find them.

    A pair is strong where the 90 % interval of D' lies above 0.70 and reaches 0.98, recombining where it ends below 0.90. A
    stretch of five and more sites is a block where its ends are strong and of the strong and recombining pairs more than
    `share` are strong; for two, three and four sites more is asked. The longest stretch is taken first. Source: Gabriel et al.,
    Science 296, 2002; limits of small blocks as in Haploview.

    Args:
        position_bp: integers (L,), never falling.
        min_maf: rarer sites are passed over and are in no block; so are sites that nobody has (PLINK takes them for common).
        max_bp: longest block.
        small_blocks_short: blocks of two sites span 20 kb at most, of three 30 kb.
        unphased: the likelihood of dosages, in which two heterozygous sites leave the phase open.

    Returns:
        int64 (L,), in host memory: number of a site's block from 0 on, by place; -1 where it is in none.

    Raises:
        UsageError: wrong shape or type, a limit outside its range.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = checks.choose(bits_lw, implementation)
    first = checks.sites(bits_lw, n, missing_lw, unphased)
    rules = checks.block_rules(len(first.bits_lw), position_bp, min_maf, share, max_bp, small_blocks_short)
    block_l = chosen.blocks(first, rules)
    return block_l  # type: ignore[no-any-return]


def triangle(
    bits_lw: Any,
    n: int,
    *,
    missing_lw: Any = None,
    unphased: bool = False,
    measure: Measure = "r2",
    rows: int = 1024,
    implementation: Implementation | None = None,
) -> Iterator[Any]:
    """The lower triangle with its diagonal, row by row, for matrices larger than memory.

    Args:
        rows: of the matrix, most that a piece has. On the CPU a piece has no more than 256, and up to four pieces per thread
            are held ahead of the reader; on a GPU rows * L float32.

    Yields:
        float32 (K,): the next rows, [i, 0], ..., [i, i] each. All pieces in order are what plink2 writes as `bin4 triangle`.

    Raises:
        UsageError: wrong shape, type or measure.
        Unsupported: the named implementation cannot run on this input.
    """
    chosen = checks.choose(bits_lw, implementation)
    first = checks.sites(bits_lw, n, missing_lw, unphased)
    name = checks.measure_name(measure, unphased)
    if rows < 1:
        raise UsageError("rows of 1 or more", str(rows), WHERE)
    made: Iterator[Any] = chosen.triangle(first, name, rows)
    return made


def r2(
    bits_lw: Any,
    n: int,
    other_mw: Any = None,
    *,
    missing_lw: Any = None,
    other_missing_mw: Any = None,
    unphased: bool = False,
    implementation: Implementation | None = None,
) -> Any:
    """`matrix` of r2."""
    planes = {"missing_lw": missing_lw, "other_missing_mw": other_missing_mw}
    return matrix(bits_lw, n, other_mw, **planes, unphased=unphased, implementation=implementation)


def r2_pairs(
    bits_lw: Any,
    n: int,
    i: Any,
    j: Any,
    *,
    missing_lw: Any = None,
    unphased: bool = False,
    implementation: Implementation | None = None,
) -> Any:
    """`pairs` of r2."""
    return pairs(bits_lw, n, i, j, missing_lw=missing_lw, unphased=unphased, implementation=implementation)


r2_decay = decay
