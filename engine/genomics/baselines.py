"""Baselines that a haplotype generator has to beat: independent sites, a Markov chain of order 1, the HAPNEST recipe.

All three are fitted to a panel by one function and answer to one interface: `sample(n, groups=, seed=)` gives a panel of
synthetic people of whom person k depends on (model, seed, k) only, and `log_likelihood(panel)` gives nats per haplotype
where the model defines a likelihood. HAPNEST does not, and says so. Reading and writing of files is left to others.

    independent   every site drawn from its own allele frequency: no linkage at all.
    markov        every site drawn given the site before: the linkage of neighbours and what follows from it.
    hapnest       segments copied from the panel, their lengths set by a coalescent age, mutations younger than that age
                  dropped (Wharrie et al., Bioinformatics 39:btad535, 2023), from its published formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.special import logsumexp

from engine import seeding
from engine.errors import InputError, Unsupported, UsageError, closest
from engine.genomics.matching import common_sites
from engine.genomics.panel import HaplotypePanel, Samples, synthetic_ids
from engine.kernels import bits

PSEUDOCOUNT = 0.5  # of each allele; the Krichevsky-Trofimov estimate, so that no allele is impossible
HAPNEST_NE, HAPNEST_RHO = (
    11_700.0,
    0.7,
)  # within the ranges the authors' tuning gives, Ne 10-12 thousand and rho 0.6-0.8
_PEOPLE = 64  # drawn at one time


@dataclass(frozen=True)
class SiteChain:
    """Sites drawn one after another, each given at most the site before; one chain per group of people.

    Attributes:
        panel: what was fitted; samples take its sites, contigs and build.
        order: 0 (independent sites) or 1 (Markov chain).
        group_names, share_g: groups and their shares of the panel's haplotypes, float64 (G,).
        p_glv: float64 (G, L, 2): probability of ALT at a site given allele v at the site before. At the first site of a
            contig, and with order 0 everywhere, both columns are equal.
    """

    panel: HaplotypePanel
    order: int
    group_names: list[str]
    share_g: np.ndarray
    p_glv: np.ndarray

    def sample(self, n: int, groups: str | Sequence[str] | None = None, seed: int = 0) -> HaplotypePanel:
        """Synthetic people 0 .. n-1, diploid, both haplotypes of one group.

        Args:
            groups: None draws each person's group by the panel's shares; one name for all; or n names.

        Raises:
            UsageError: n below 0, an unknown group, or a list of another length.
        """
        group_n = _person_groups(self.group_names, self.share_g, n, groups, seed)
        sites = self.p_glv.shape[1]
        made_lw = np.zeros((sites, bits.words(2 * n)), dtype=np.uint64)
        alleles_ln = np.empty((sites, 2 * _PEOPLE), dtype=np.uint8)
        for first in range(0, n, _PEOPLE):
            people = range(first, min(first + _PEOPLE, n))
            uniform = [seeding.generator(seed, "genomics.baselines.chain", k).random((sites, 2)) for k in people]
            uniform_ln = np.concatenate(uniform, axis=1)
            g_n = np.repeat(group_n[people.start : people.stop], 2)
            before_n = np.zeros(len(g_n), dtype=np.int64)
            for site in range(sites):
                before_n = (uniform_ln[site] < self.p_glv[g_n, site, before_n]).astype(np.int64)
                alleles_ln[site, : len(g_n)] = before_n
            words = bits.pack(np.ascontiguousarray(alleles_ln[:, : len(g_n)]))
            made_lw[:, 2 * first // 64 : 2 * first // 64 + words.shape[1]] = words  # _PEOPLE fill whole words
        return _synthetic(self.panel, made_lw, [self.group_names[g] for g in group_n])

    def log_likelihood(self, panel: HaplotypePanel) -> np.ndarray:
        """Log-probability of each haplotype, nats, float64 (N,): a mixture of the groups' chains by their shares.

        Raises:
            InputError: other sites, unphased genotypes or missing alleles.
        """
        _check(panel, "score")
        _, chosen = common_sites({"model": self.panel.sites, "panel": panel.sites})
        alleles_ln = bits.unpack(np.ascontiguousarray(panel.bits_lw[chosen]), panel.n_haplotypes).astype(np.int64)
        before_ln = np.zeros_like(alleles_ln)
        before_ln[1:] = alleles_ln[:-1]
        per_group = []
        for share, p_lv in zip(self.share_g, self.p_glv, strict=True):
            p_ln = np.take_along_axis(p_lv, before_ln, axis=1)
            nats_n = np.log(np.where(alleles_ln == 1, p_ln, 1 - p_ln)).sum(axis=0)
            per_group.append(np.log(share) + nats_n)
        return np.asarray(logsumexp(np.stack(per_group), axis=0))


def fit_independent(panel: HaplotypePanel, *, per_group: bool = True) -> SiteChain:
    """Independent sites by the allele frequencies of each group."""
    return _fit_chain(panel, 0, per_group)


def fit_markov(panel: HaplotypePanel, *, per_group: bool = True) -> SiteChain:
    """Markov chain of order 1 along each contig by the pairs of neighbouring sites in each group."""
    return _fit_chain(panel, 1, per_group)


def _fit_chain(panel: HaplotypePanel, order: int, per_group: bool) -> SiteChain:
    _check(panel, "fit")
    names, members = _groups(panel, per_group)
    alleles_ln = bits.unpack(panel.bits_lw, panel.n_haplotypes)
    starts = np.ones(panel.n_sites, dtype=bool)
    starts[1:] = panel.sites.contig[1:] != panel.sites.contig[:-1]
    p_glv = np.empty((len(names), panel.n_sites, 2))
    for g, index in enumerate(members):
        own_ln = alleles_ln[:, index]
        total_l = own_ln.sum(axis=1, dtype=np.int64)
        p_glv[g] = _estimate(total_l, len(index))[:, None]
        if order == 1:
            both_l = (own_ln[1:] & own_ln[:-1]).sum(axis=1, dtype=np.int64)
            after_ref = _estimate(total_l[1:] - both_l, len(index) - total_l[:-1])
            after_alt = _estimate(both_l, total_l[:-1])
            linked = np.flatnonzero(~starts)
            p_glv[g, linked] = np.stack([after_ref, after_alt], axis=1)[linked - 1]
    share_g = np.array([len(index) for index in members], dtype=np.float64) / panel.n_haplotypes
    return SiteChain(panel, order, names, share_g, p_glv)


def _estimate(ones: np.ndarray, of: np.ndarray | int) -> np.ndarray:
    return (ones + PSEUDOCOUNT) / (of + 2 * PSEUDOCOUNT)


@dataclass(frozen=True)
class Hapnest:
    """The HAPNEST recipe over a panel: a new haplotype is a row of segments, each copied from one reference haplotype.

    For each segment, in the group of the person with N reference haplotypes: a coalescent age T ~ Gamma(2, Ne / N)
    generations; a length ~ exponential with mean 1 / (2 T rho), in cM; a uniform haplotype; and its ALT alleles only
    where the mutation is older than T, because a younger one arose on the reference's own branch.

    The recipe takes mutation ages from a published atlas of dated variants. Where there is none, as here, an age is that
    expected in a population of constant size from the ALT frequency p in the whole panel, -4 Ne p ln(p) / (1 - p)
    generations (Kimura and Ohta, Genetics 75:199, 1973, equation 13), with ALT taken for the derived allele.

    Attributes:
        alleles_nl: uint8 (N, L), the reference haplotypes.
        position_cm: float64 (L,), restarting on each contig; `start_l` the first sites of contigs.
        age_l: float64 (L,), generations.
        members: int64 indices of the haplotypes of each group.
    """

    panel: HaplotypePanel
    ne: float
    rho: float
    group_names: list[str]
    share_g: np.ndarray
    members: list[np.ndarray]
    alleles_nl: np.ndarray
    position_cm: np.ndarray
    start_l: np.ndarray
    age_l: np.ndarray

    def segments(self, group: int, rng: np.random.Generator) -> list[tuple[int, int, int, float]]:
        """Segments of one haplotype: (first site, stop site, reference haplotype, age in generations), in order."""
        own, made = self.members[group], []
        bounds = [*self.start_l.tolist(), len(self.position_cm)]
        for first, stop in pairwise(bounds):
            at = first
            while at < stop:
                age = float(rng.gamma(2.0, self.ne / len(own)))
                reach_cm = self.position_cm[at] + rng.exponential(1 / (2 * age * self.rho))
                end = at + max(1, int(np.searchsorted(self.position_cm[at:stop], reach_cm, side="right")))
                made.append((at, end, int(own[rng.integers(len(own))]), age))
                at = end
        return made

    def sample(self, n: int, groups: str | Sequence[str] | None = None, seed: int = 0) -> HaplotypePanel:
        """Synthetic people 0 .. n-1, diploid; arguments and errors as for `SiteChain.sample`."""
        group_n = _person_groups(self.group_names, self.share_g, n, groups, seed)
        made_nl = np.zeros((2 * n, len(self.position_cm)), dtype=np.uint8)
        for person, group in enumerate(group_n.tolist()):
            rng = seeding.generator(seed, "genomics.baselines.hapnest", person)
            for row in (2 * person, 2 * person + 1):
                for first, stop, donor, age in self.segments(group, rng):
                    made_nl[row, first:stop] = self.alleles_nl[donor, first:stop] & (self.age_l[first:stop] > age)
        made_lw = bits.pack(np.ascontiguousarray(made_nl.T))
        return _synthetic(self.panel, made_lw, [self.group_names[g] for g in group_n])

    def log_likelihood(self, panel: HaplotypePanel) -> np.ndarray:
        """Not defined.

        Raises:
            Unsupported: always; the recipe draws segments but states no probability of a haplotype, and rejected
                mutations depend on ages that are summed over no closed form.
        """
        raise Unsupported("a model with a likelihood", "the HAPNEST recipe, which only samples", "score")


def fit_hapnest(
    panel: HaplotypePanel, *, ne: float = HAPNEST_NE, rho: float = HAPNEST_RHO, per_group: bool = True
) -> Hapnest:
    """The HAPNEST recipe over `panel`; 1 cM per Mb where the panel has no genetic positions.

    Raises:
        UsageError: ne or rho not above 0. InputError: unphased genotypes, missing alleles, or falling genetic positions.
    """
    _check(panel, "fit")
    if not (ne > 0 and rho > 0):
        raise UsageError("ne and rho above 0", f"{ne} and {rho}", "fit")
    names, members = _groups(panel, per_group)
    starts = np.flatnonzero(np.r_[True, panel.sites.contig[1:] != panel.sites.contig[:-1]])
    position_cm = panel.sites.centimorgans()
    falls = np.flatnonzero(np.diff(position_cm) < 0) + 1
    if len(np.setdiff1d(falls, starts)):
        raise InputError("genetic positions that do not fall", f"a fall at site {int(falls[0])}", "fit")
    p_l = bits.popcount_rows(panel.bits_lw) / panel.n_haplotypes
    with np.errstate(divide="ignore", invalid="ignore"):
        age_l = np.where(p_l >= 1, np.inf, -4 * ne * p_l * np.log(p_l) / (1 - p_l))
    age_l = np.where(p_l <= 0, 0.0, age_l)
    share_g = np.array([len(index) for index in members], dtype=np.float64) / panel.n_haplotypes
    return Hapnest(
        panel, ne, rho, names, share_g, members, panel.alleles_nl(), np.asarray(position_cm, dtype=np.float64), starts,
        age_l,
    )  # fmt: skip


Fit = Callable[[HaplotypePanel], SiteChain | Hapnest]
BASELINES: Mapping[str, Fit] = {"independent": fit_independent, "markov": fit_markov, "hapnest": fit_hapnest}


def _check(panel: HaplotypePanel, where: str) -> None:
    if not panel.phased:
        raise InputError("phased haplotypes", "unphased genotypes", where, "phase it, e.g. with SHAPEIT5 or Beagle")
    if panel.missing_lw is not None and panel.missing_lw.any():
        raise InputError("complete haplotypes", "missing alleles", where, "impute it, or drop the sites")
    if panel.n_haplotypes == 0 or panel.n_sites == 0:
        raise InputError("haplotypes and sites", f"{panel.n_haplotypes} and {panel.n_sites}", where)


def _groups(panel: HaplotypePanel, per_group: bool) -> tuple[list[str], list[np.ndarray]]:
    """Names and haplotypes of the groups; one group "all" where the panel has none or they are not wanted."""
    if per_group and panel.samples.group is not None:
        groups = panel.groups()
        return list(groups), list(groups.values())
    return ["all"], [np.arange(panel.n_haplotypes)]


def _person_groups(
    names: list[str], share_g: np.ndarray, n: int, groups: str | Sequence[str] | None, seed: int
) -> np.ndarray:
    """int64 (n,): index of each person's group."""
    if n < 0:
        raise UsageError("n >= 0", str(n), "sample")
    if groups is None:
        drawn = [seeding.generator(seed, "genomics.baselines.group", k).random() for k in range(n)]
        cumulative_g = np.cumsum(share_g)
        return np.searchsorted(cumulative_g / cumulative_g[-1], np.array(drawn), side="right").astype(np.int64)
    wanted = [groups] * n if isinstance(groups, str) else list(groups)
    if len(wanted) != n:
        raise UsageError(f"one group for each of {n} people", str(len(wanted)), "sample")
    for name in wanted:
        if name not in names:
            raise UsageError("a group of the model", f"'{name}'", "group", closest(name, names))
    return np.array([names.index(name) for name in wanted], dtype=np.int64)


def _synthetic(like: HaplotypePanel, bits_lw: np.ndarray, groups: list[str]) -> HaplotypePanel:
    n = len(groups)
    samples = Samples(synthetic_ids(0, n), np.array(groups, dtype=str), None, 2 * np.arange(n + 1, dtype=np.int64))
    return HaplotypePanel(bits_lw, None, like.sites, samples, True, dict(like.contig_length), like.assembly)
