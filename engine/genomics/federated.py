"""Haplotypes at several institutions: the adapter of `engine.training.federated` for what can be learned from counts.

The copying model is its reference haplotypes, so it cannot leave a site. What can are counts: for every variant and group, how
many haplotypes have each pair of alleles at this variant and the one before. Their sums over institutions are those of the
union, and give allele frequencies and the Markov chain of `engine.genomics.baselines` (one round). The names of the arrays
carry a digest of the list of variants and groups: an institution with another list is refused by name, not summed wrongly.

Counts below `least_count` leave as 0, because an allele that one or two people of a site carry can tell that a person is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from engine.errors import InputError, UsageError
from engine.genomics.baselines import PSEUDOCOUNT, SiteChain
from engine.genomics.panel import HaplotypePanel, Sites
from engine.kernels import bits
from engine.training.federated import Declared, Tensors, checked

LEAST_COUNT = 3
LEAST_PEOPLE = 20


def list_digest(sites: Sites, groups: Sequence[str]) -> str:
    """Names a list of variants (contig, position, alleles) and groups."""
    digest = hashlib.sha256("\x1f".join(groups).encode())
    for column in (sites.contig, sites.position_bp, sites.ref, sites.alt):
        digest.update("\x1f".join(map(str, column.tolist())).encode() + b"\x1e")
    return digest.hexdigest()[:16]


def declared(sites: Sites, groups: Sequence[str]) -> Declared:
    """Name and shape of the counts: (groups, variants, allele before, allele); and of the numbers of haplotypes."""
    name = list_digest(sites, groups)
    return {f"pairs.{name}": (len(groups), len(sites.position_bp), 2, 2), f"haplotypes.{name}": (len(groups),)}


def chain_of(total: Tensors, like: HaplotypePanel, groups: Sequence[str]) -> SiteChain:
    """The chain that the summed counts give; samples take the variants, contigs and build of `like`."""
    name = list_digest(like.sites, groups)
    checked(total, declared(like.sites, groups), "the common statistics")
    pairs_glvv, haplotypes_g = total[f"pairs.{name}"], total[f"haplotypes.{name}"]
    p_glv = (pairs_glvv[..., 1] + PSEUDOCOUNT) / (pairs_glvv.sum(axis=-1) + 2 * PSEUDOCOUNT)
    first = _starts(like.sites)
    p_glv[:, first, 1] = p_glv[:, first, 0]
    return SiteChain(like, 1, list(groups), haplotypes_g / haplotypes_g.sum(), p_glv)


class PanelSite:
    """One institution: its panel, and unseen people of its own to judge the common model by.

    Args:
        groups: names every site uses, e.g. ["AFR", "EUR"]; ["all"] where people are not told apart.
        least_count: smaller counts leave as 0; 1 sends every count.

    Raises:
        InputError: unphased or missing genotypes, a person of another group, fewer than LEAST_PEOPLE people, or another list of
            variants among the unseen people.
    """

    def __init__(
        self,
        train: HaplotypePanel,
        holdout: HaplotypePanel | None = None,
        groups: Sequence[str] = ("all",),
        least_count: int = LEAST_COUNT,
    ) -> None:
        for panel in (train, holdout):
            if panel is not None and (not panel.phased or (panel.missing_lw is not None and panel.missing_lw.any())):
                raise InputError("complete phased haplotypes", "others", "federated site", "phase and impute them")
        if train.n_samples < LEAST_PEOPLE:
            raise InputError(f"at least {LEAST_PEOPLE} people", str(train.n_samples), "federated site")
        self.train, self.holdout, self.groups, self.least_count = train, holdout, list(groups), least_count
        if holdout is not None and list_digest(holdout.sites, groups) != list_digest(train.sites, groups):
            raise InputError("the variants of the training panel", "others", "federated site, holdout")
        self._members()
        self._total: Tensors | None = None

    def state_declared(self) -> Declared:
        """The chain's probabilities, float32."""
        return {"p": (len(self.groups), self.train.n_sites, 2), "share": (len(self.groups),)}

    def stats_declared(self) -> Declared:
        """See `declared`."""
        return declared(self.train.sites, self.groups)

    def get_state(self) -> Tensors:
        """The common chain's probabilities, once the sums of all sites are known."""
        chain = self.chain()
        return {"p": chain.p_glv.astype(np.float32), "share": chain.share_g.astype(np.float32)}

    def set_state(self, state: Tensors) -> None:
        """Nothing is learned by states: refused unless it is the chain that the sums give."""
        checked(state, self.state_declared(), "the common state")
        if any(not np.array_equal(state[name], value) for name, value in self.get_state().items()):
            raise InputError("the chain that the sums of all sites give", "another", "the common state")

    def fit(self, round_number: int) -> Tensors:
        """Nothing is left to learn once the sums are known."""
        return self.get_state()

    def local_stats(self) -> Tensors:
        """Counts of this site, float64; see `declared`."""
        alleles_ln = bits.unpack(self.train.bits_lw, self.train.n_haplotypes)
        first, members = _starts(self.train.sites), self._members()
        pairs = np.zeros((len(self.groups), self.train.n_sites, 2, 2))
        for g, index in enumerate(members):
            own_ln = alleles_ln[:, index]
            one_l = own_ln.sum(axis=1, dtype=np.int64)
            both_l = np.zeros_like(one_l)
            both_l[1:] = (own_ln[1:] & own_ln[:-1]).sum(axis=1, dtype=np.int64)
            before_l = np.concatenate([[0], one_l[:-1]])
            both_l[first], before_l[first] = 0, 0  # a contig's first variant has REF before it
            pairs[g, :, 1, 1], pairs[g, :, 1, 0] = both_l, before_l - both_l
            pairs[g, :, 0, 1], pairs[g, :, 0, 0] = one_l - both_l, len(index) - before_l - one_l + both_l
        pairs[pairs < self.least_count] = 0
        name = list_digest(self.train.sites, self.groups)
        return {f"pairs.{name}": pairs, f"haplotypes.{name}": np.array([float(len(m)) for m in members])}

    def set_stats(self, total: Tensors) -> None:
        """Take the sums over all sites."""
        self._total = checked(total, self.stats_declared(), "the common statistics")

    def chain(self) -> SiteChain:
        """The common model.

        Raises:
            UsageError: the sums of all sites are not known yet.
        """
        if self._total is None:
            raise UsageError("the sums of all sites first", "none", "set_stats")
        return chain_of(self._total, self.train, self.groups)

    def evaluate(self) -> dict[str, float]:
        """Mean log-likelihood of this site's unseen haplotypes, nats; "n" haplotypes."""
        if self.holdout is None:
            return {"n": 0.0}
        nats_n = self.chain().log_likelihood(self.holdout)
        return {"n": float(len(nats_n)), "mean_nats": float(nats_n.mean())}

    def _members(self) -> list[np.ndarray]:
        if self.groups == ["all"]:
            return [np.arange(self.train.n_haplotypes)]
        found = self.train.groups()
        if others := sorted(set(found) - set(self.groups)):
            raise InputError("people of the agreed groups", f"{len(others)} other group(s)", "federated site")
        return [found.get(name, np.arange(0)) for name in self.groups]


def _starts(sites: Sites) -> np.ndarray:
    """bool (L,): first variant of a contig."""
    starts = np.ones(len(sites.position_bp), dtype=bool)
    starts[1:] = sites.contig[1:] != sites.contig[:-1]
    return starts
