"""Sampling from clusters with linked sites: for panels whose sites lie further apart than haplotypes are shared.

Where sites are sparse, copying breaks down: a piece of a donor spans a site or two, too few to tell whom to join it to. A
mixture of trees (`clusters`) has what is left there, ancestry along the whole haplotype and linkage of neighbours. One
mixture is learned of the whole panel; a group has its own shares of the clusters, and of pairs of them: the two haplotypes of
a person come from where those of real people come from together. Nobody is copied: what comes out of the panel is a few
parameters per cluster and site, each of many haplotypes.

Haplotypes are handed on as `Paths`, whose segments all name the panel's first haplotype and whose flips say where the one
that was drawn differs from it; so everything behind (files, shards, phenotypes, admixture) works as for copies, and the
first haplotype's alleles cancel. Alleles of too few carriers arise anew as everywhere (`Rare`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from engine import seeding
from engine.errors import UsageError
from engine.genomics import clusters
from engine.genomics.paths import Paths, of_lists
from engine.kernels import bits

if TYPE_CHECKING:
    from engine.genomics.li_stephens import LiStephens, Progress

MOST_ALLELES = 2e8  # of the panel: learning takes 16 bytes each
_PEOPLE = 256  # drawn at a time
_PAIR_PRIOR = 4.0  # people of a group that clusters paired at random weigh as


class Tables(NamedTuple):
    """trees: of the whole panel. pair_gss: float64 (G, S, S), symmetric, sum 1: clusters of the two haplotypes of a person of
    each group. first_l: uint8 (L,), the alleles that `LiStephens.materialise` reads off the panel's first haplotype."""

    trees: clusters.Trees
    pair_gss: np.ndarray
    first_l: np.ndarray


def check(model: LiStephens) -> None:
    """Refuse a panel that this sampler cannot draw from, before anything takes long.

    Raises:
        UsageError: rows of split multiallelic sites, or a panel too large to be learned in memory.
    """
    hint = "sampler=interchange, or fewer sites"
    if (model.sites.alt_index != 0).any():
        raise UsageError("a panel without split multiallelic sites", "some", "sampler=clusters", hint)
    if model.k * model.n_sites > MOST_ALLELES:
        found = f"{model.k:,} haplotypes at {model.n_sites:,} sites"
        raise UsageError(f"a sparse panel of at most {MOST_ALLELES:.0e} alleles", found, "sampler=clusters", hint)


def tables(model: LiStephens) -> Tables:
    """Learned anew from the model's panel, the same each time; refused as by `check`."""
    check(model)
    alleles_kl = np.ascontiguousarray(bits.unpack(model.bits_lw, model.k).T)
    trees = clusters.learn(alleles_kl, np.isinf(model.distance_l), model.config.clusters)
    weight_ks = clusters.posterior(trees, alleles_kl)
    share_gs = np.full((len(model.group_names), len(trees.share_s)), 0.5)
    np.add.at(share_gs, model.group_of_haplotype_k, weight_ks)
    share_gs /= share_gs.sum(axis=1, keepdims=True)
    first_s = model.samples.first_haplotype
    both_p = first_s[:-1][np.diff(first_s) == 2]
    pair_gss = _PAIR_PRIOR * share_gs[:, :, None] * share_gs[:, None, :]
    for group in range(len(pair_gss)):
        own_p = both_p[model.group_of_haplotype_k[both_p] == group]
        counted_ss = weight_ks[own_p].T @ weight_ks[own_p + 1]
        pair_gss[group] += (counted_ss + counted_ss.T) / 2
    pair_gss /= pair_gss.sum(axis=(1, 2), keepdims=True)
    common_l = model.rare.common_l
    first_l = np.where(common_l >= 0, common_l, alleles_kl[0]).astype(np.uint8)
    return Tables(trees, pair_gss, first_l)


def paths(model: LiStephens, group_n: np.ndarray, seed: int, start: int, progress: Progress | None) -> Paths:
    """Of people start, start + 1, ... of these groups, int64 (n,): two haplotypes each, functions of model, seed and person."""
    known, n = model.cluster_tables, len(group_n)
    contig_start, rare_l = np.flatnonzero(np.isinf(model.distance_l)), model.rare.common_l >= 0
    flips: list[np.ndarray] = []
    for at in range(0, n, _PEOPLE):
        some = group_n[at : at + _PEOPLE]
        uniform_nl, pair_n = np.empty((2 * len(some), model.n_sites)), np.empty(len(some))
        new: list[np.ndarray] = []
        for k, group in enumerate(some.tolist()):
            rng = seeding.generator(seed, "genomics.clusters.person", start + at + k)
            pair_n[k] = rng.random()
            uniform_nl[2 * k : 2 * k + 2] = rng.random((2, model.n_sites))
            new += [model.new_alleles(group, rng), model.new_alleles(group, rng)]
        cluster_n = np.empty(2 * len(some), np.int64)
        for group in np.unique(some).tolist():
            own = np.flatnonzero(some == group)
            cumulative = np.cumsum(known.pair_gss[group])
            chosen = np.searchsorted(cumulative / cumulative[-1], pair_n[own], side="right")
            cluster_n[2 * own], cluster_n[2 * own + 1] = np.divmod(chosen, known.pair_gss.shape[1])
        drawn_nl = clusters.draw(known.trees, cluster_n, uniform_nl)
        drawn_nl[:, rare_l] = known.first_l[rare_l]
        for row_l, sites in zip(drawn_nl, new, strict=True):
            row_l[sites] ^= 1
            flips.append(np.flatnonzero(row_l != known.first_l))
        if progress is not None:
            progress(at + len(some), n)
    return of_lists([contig_start] * (2 * n), [np.zeros_like(contig_start)] * (2 * n), flips)
