"""Clusters of haplotypes with linked neighbours: a mixture of trees, which foretells sites far apart from ancestry.

A haplotype belongs to one of S clusters. Within a cluster its allele at site l depends on the one at site parent(l), an
earlier site of the contig, or on nothing:

    P(x) = sum_s share_s prod_l P_s(x_l | x_parent(l)).

This is a mixture of trees (Meila and Jordan, JMLR 1:1, 2000) with one tree for all clusters, whose edges look back only, so
that the next allele is foretold site by site: the posterior of the cluster, given the alleles so far, weighs what the
clusters say. Copying chains (`engine.genomics.chains`) have to find out whom a haplotype resembles among thousands of
others; where sites are sparse and each tells little, a few clusters are found out sooner.

Shares, tables and edges are learned by expectation maximisation. A site's parent is, of the few sites before it, the one that
tells most of it within the clusters. Frequencies are drawn to those of the panel, tables to one shift of the log-odds
that all clusters share, by pseudo-counts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine import seeding

FREQUENCY_PRIOR = 4.0  # haplotypes of a cluster that the panel's frequencies weigh as
TABLE_PRIOR = 20.0  # and the shift of the log-odds that all clusters share
BACK = 6  # sites before, among which the parent is
LEAST_INFORMATION = 0.006  # nats per haplotype, below which a site has no parent: 3,200 haplotypes make 0.002 by chance
ROUNDS, TREE_ROUNDS = 20, 4
COMPONENTS, COMPONENT_SITES, STARTS = 12, 1000, 8
LEAST = 2e-4  # probability of an allele


class Trees(NamedTuple):
    """S clusters over L sites.

    Attributes:
        parent_l: int64 (L,), -1 where a site depends on the cluster alone.
        alt_sla: float32 (S, L, 3), P(ALT) where the parent's allele is REF, ALT, or not known (or there is no parent).
        share_s: float32 (S,), sum 1.
    """

    parent_l: np.ndarray
    alt_sla: np.ndarray
    share_s: np.ndarray


def learn(alleles_nl: np.ndarray, contig_start_l: np.ndarray, clusters: int, *, seed: int = 0) -> Trees:
    """Trees of N haplotypes. O(N L S) a round; 16 N L bytes.

    Args:
        alleles_nl: uint8 (N, L), 0 or 1, complete; at least as many haplotypes as clusters are used.
        contig_start_l: bool (L,), first sites of contigs.
    """
    x_nl = alleles_nl.astype(np.float32)
    mean_l = (x_nl.sum(axis=0) + 0.5) / (len(x_nl) + 1)
    weight_ns = _start(x_nl - mean_l, min(clusters, len(x_nl)), seed)
    for _ in range(ROUNDS):
        alt_sl = _frequencies(x_nl, weight_ns, mean_l)
        weight_ns = _posterior(x_nl @ np.log(alt_sl / (1 - alt_sl)).T + np.log1p(-alt_sl).sum(axis=1), weight_ns)
    parent_l = _parents(x_nl, weight_ns, np.cumsum(contig_start_l))
    before_nl = _before(x_nl, parent_l)
    for _ in range(TREE_ROUNDS):
        weight_ns = _posterior(_log_within(_tables(x_nl, weight_ns, mean_l, parent_l), x_nl, before_nl), weight_ns)
    return Trees(parent_l, _tables(x_nl, weight_ns, mean_l, parent_l).astype(np.float32), _shares(weight_ns))


def foretell(trees: Trees, target_nl: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds of ALT at each site given the alleles before it, effective number of clusters there; both float32 (N, L).

    Args:
        target_nl: uint8 (N, L): 0, 1, or 255 where missing, which says nothing.
    """
    weight_ns = np.repeat(trees.share_s[None].astype(np.float64), len(target_nl), axis=0)
    logit_nl, number_nl = np.empty((2, *target_nl.shape), np.float32)
    for l, parent in enumerate(trees.parent_l.tolist()):  # noqa: E741
        column_n = np.full(len(target_nl), 2) if parent < 0 else np.minimum(target_nl[:, parent], 2)
        alt_ns = trees.alt_sla[:, l][:, column_n].T.astype(np.float64)
        alt_n = (weight_ns * alt_ns).sum(axis=1)
        logit_nl[:, l] = np.log(alt_n) - np.log1p(-alt_n)
        number_nl[:, l] = 1 / np.square(weight_ns).sum(axis=1)
        allele_n1 = target_nl[:, l, None]
        weight_ns *= np.where(allele_n1 == 1, alt_ns, np.where(allele_n1 == 0, 1 - alt_ns, 1.0))
        weight_ns /= weight_ns.sum(axis=1, keepdims=True)
    return logit_nl, number_nl


def posterior(trees: Trees, alleles_nl: np.ndarray) -> np.ndarray:
    """Probability of each cluster given a whole haplotype: uint8 (N, L), complete, to float64 (N, S), rows of sum 1."""
    x_nl = alleles_nl.astype(np.float32)
    log_ns = _log_within(trees.alt_sla.astype(np.float64), x_nl, _before(x_nl, trees.parent_l))
    return _rows_to_one(log_ns + np.log(trees.share_s))


def draw(trees: Trees, cluster_n: np.ndarray, uniform_nl: np.ndarray) -> np.ndarray:
    """Haplotypes of these clusters, int64 (N,): uint8 (N, L), from numbers in [0, 1), float64 (N, L)."""
    drawn_nl = np.empty(uniform_nl.shape, np.uint8)
    for l, parent in enumerate(trees.parent_l.tolist()):  # noqa: E741
        column_n = np.full(len(drawn_nl), 2) if parent < 0 else drawn_nl[:, parent]
        drawn_nl[:, l] = uniform_nl[:, l] < trees.alt_sla[cluster_n, l, column_n]
    return drawn_nl


def _before(x_nl: np.ndarray, parent_l: np.ndarray) -> np.ndarray:
    """The allele of each site's parent, 0 where it has none; (N, L)."""
    return np.where(parent_l >= 0, x_nl[:, np.maximum(parent_l, 0)], 0)


def _rows_to_one(log_ns: np.ndarray) -> np.ndarray:
    """Probabilities, rows of sum 1, in proportion to exp(log_ns)."""
    raised_ns = np.exp(log_ns - log_ns.max(axis=1, keepdims=True))
    return np.asarray(raised_ns / raised_ns.sum(axis=1, keepdims=True))


def _log_within(alt_sla: np.ndarray, x_nl: np.ndarray, before_nl: np.ndarray) -> np.ndarray:
    """log P_s(x), (N, S); `before_nl` as by `_before`."""
    ref, shift = np.log1p(-alt_sla), np.log(alt_sla / (1 - alt_sla))
    log_ns = x_nl @ shift[:, :, 0].T + (x_nl * before_nl) @ (shift[:, :, 1] - shift[:, :, 0]).T
    return np.asarray(log_ns + before_nl @ (ref[:, :, 1] - ref[:, :, 0]).T + ref[:, :, 0].sum(axis=1))


def _start(centred_nl: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """float32 (N, S), 0 or 1: k-means of the first principal components of some sites; the best of some starts, each from
    centres far apart (Arthur and Vassilvitskii, SODA 2007)."""
    rng = seeding.generator(seed, "genomics.clusters.start")
    some_nl = centred_nl[:, :: -(-centred_nl.shape[1] // COMPONENT_SITES)]
    vectors = np.linalg.eigh(some_nl.T @ some_nl)[1][:, -COMPONENTS:]
    place_nc = some_nl @ vectors
    least, best_n = np.inf, np.zeros(len(place_nc), np.int64)
    for _ in range(STARTS):
        centre_sc = place_nc[rng.integers(len(place_nc), size=1)]
        while len(centre_sc) < clusters:
            away_n = np.maximum(_square_distances(place_nc, centre_sc).min(axis=1), 0) + 1e-9
            centre_sc = np.vstack([centre_sc, place_nc[rng.choice(len(place_nc), p=away_n / away_n.sum())]])
        for _ in range(8):
            nearest_n = _square_distances(place_nc, centre_sc).argmin(axis=1)
            for s in np.unique(nearest_n):
                centre_sc[s] = place_nc[nearest_n == s].mean(axis=0)
        spread = float(_square_distances(place_nc, centre_sc).min(axis=1).sum(dtype=np.float64))
        if spread < least:
            least, best_n = spread, nearest_n
    return np.eye(clusters, dtype=np.float32)[best_n]


def _square_distances(place_nc: np.ndarray, centre_sc: np.ndarray) -> np.ndarray:
    own_n = np.square(place_nc).sum(axis=1, keepdims=True)
    return np.asarray(own_n + np.square(centre_sc).sum(axis=1) - 2 * place_nc @ centre_sc.T)


def _shares(weight_ns: np.ndarray) -> np.ndarray:
    share_s = weight_ns.sum(axis=0, dtype=np.float64) + 0.5
    return np.asarray(share_s / share_s.sum(), np.float32)


def _posterior(log_ns: np.ndarray, weight_ns: np.ndarray) -> np.ndarray:
    """float32 (N, S): of the clusters, from log P(x | s) and the weights of the round before, whose sums are the shares."""
    return np.asarray(_rows_to_one(log_ns + np.log(_shares(weight_ns))), np.float32)


def _frequencies(x_nl: np.ndarray, weight_ns: np.ndarray, mean_l: np.ndarray) -> np.ndarray:
    alt_sl = weight_ns.T @ x_nl + FREQUENCY_PRIOR * mean_l
    return np.asarray((alt_sl / (weight_ns.sum(axis=0) + FREQUENCY_PRIOR)[:, None]).clip(LEAST, 1 - LEAST), np.float64)


def _parents(x_nl: np.ndarray, weight_ns: np.ndarray, contig_l: np.ndarray) -> np.ndarray:
    """int64 (L,): by the squared correlation within clusters, half of which is nearly the mutual information."""
    size_s = weight_ns.sum(axis=0) + 1e-6
    alt_sl = (weight_ns.T @ x_nl + 0.5) / (size_s + 1)[:, None]
    spread_sl = alt_sl * (1 - alt_sl)
    parent_l = np.full(x_nl.shape[1], -1, np.int64)
    for l in range(x_nl.shape[1]):  # noqa: E741
        most = LEAST_INFORMATION
        for before in range(max(0, l - BACK), l):
            if contig_l[before] != contig_l[l]:
                continue
            covariance_s = weight_ns.T @ (x_nl[:, before] * x_nl[:, l]) / size_s - alt_sl[:, before] * alt_sl[:, l]
            shared_s = np.square(covariance_s) / (spread_sl[:, before] * spread_sl[:, l] + 1e-3)
            if (told := float((size_s * shared_s).sum() / size_s.sum() / 2)) > most:
                most, parent_l[l] = told, before
    return parent_l


def _tables(x_nl: np.ndarray, weight_ns: np.ndarray, mean_l: np.ndarray, parent_l: np.ndarray) -> np.ndarray:
    """float64 (S, L, 3) as in `Trees`."""
    alt_sl = _frequencies(x_nl, weight_ns, mean_l)
    alt_sla = np.repeat(alt_sl[:, :, None], 3, axis=2)
    odds_sl = np.log(alt_sl / (1 - alt_sl))
    for l in np.flatnonzero(parent_l >= 0):  # noqa: E741
        for allele in (0, 1):
            has_n = x_nl[:, parent_l[l]] == allele
            size_s = weight_ns[has_n].sum(axis=0, dtype=np.float64)
            count_s = (weight_ns[has_n].T @ x_nl[has_n, l]).astype(np.float64)
            shift = 0.0
            for _ in range(6):  # Newton's steps to the shift that all clusters share
                p_s = 1 / (1 + np.exp(-(odds_sl[:, l] + shift)))
                step = ((count_s - size_s * p_s).sum() - 0.1 * shift) / ((size_s * p_s * (1 - p_s)).sum() + 1.1)
                shift = min(6.0, max(-6.0, shift + step))
            p_s = 1 / (1 + np.exp(-(odds_sl[:, l] + shift)))
            alt_sla[:, l, allele] = (count_s + TABLE_PRIOR * p_s) / (size_s + TABLE_PRIOR)
    return alt_sla.clip(LEAST, 1 - LEAST)
