"""One likelihood from a bank of copying chains: at each site a small network weighs what the chains foretell.

Where sites are sparse, clusters of haplotypes (`engine.genomics.clusters`) are mixed in as further chains.

The network sees, for each chain, what it foretells (log-odds), among how many haplotypes it is undecided, and how
surprised it has been lately and over a longer while; and of the site its frequency, the distance to the last one, its
learned rates, how hard it was to foretell in other people, and how many sites have passed. It gives weights of the chains
(sum 1), a temperature and an offset: logit = exp(t) sum_c w_c logit_c + b. All of that looks back only, so the product over
sites is a probability of whole haplotypes. It starts as the plain mean of the log-odds and is trained on people of the
panel, each left out of it.

One network serves all sites: it learns how chains behave, not what a site's alleles are, which is why some hundred people
are enough. What a network could learn about single sites and long contexts is left to `engine.genomics.transformer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine import seeding
from engine.errors import UsageError
from engine.genomics import chains, clusters
from engine.genomics.chains import BankPanel, ChainSpec, MixConfig, Predictions
from engine.genomics.clusters import Trees
from engine.genomics.matching import of_person
from engine.kernels import bits
from engine.kernels.haplotype_hmm import Bank

BATCH = 16  # haplotypes run through the bank at a time
CELLS = 4096  # haplotypes times sites in one step of training, less where an epoch would be fewer steps than
STEPS = 20
PLAIN, PLAIN_SHARE = 0.01, 0.04  # cells foretold with less doubt, and rightly; the share of them that is learned from
FEW = 1_000_000  # cells: fewer are all learned from
DECAYS = (0.9, 0.995)  # of the running surprise, per site
LEAST = 1e-3  # nats, below which surprise is not told apart
FOLDS = 3  # of all people: clusters that foretell one are learned from the others
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Mixture:
    """A trained mixture.

    Attributes:
        specs: the bank; inputs: the chains that are mixed.
        weights: float32 arrays of the network by name, and "mean" and "scale" (F,) of its features.
        hardness_l: float32 (L,), mean surprise at each site of the people learned from, nats.
        held_out_nats, held_out_sem, held_out_n: of the people that judged, each left out of the panel.
        plain_nats: the same people under the best single chain.
        trees: clusters that are mixed in after the chains.
    """

    specs: list[ChainSpec]
    inputs: list[int]
    weights: dict[str, np.ndarray]
    hardness_l: np.ndarray
    held_out_nats: float
    held_out_sem: float
    held_out_n: int
    plain_nats: float
    trees: tuple[Trees, ...] = ()

    def figures(self) -> dict[str, float]:
        """How it did on the people that judged."""
        return {
            "held_out_nats": self.held_out_nats, "held_out_sem": self.held_out_sem, "held_out_n": self.held_out_n,
            "plain_nats": self.plain_nats,
        }  # fmt: skip

    def log_likelihood(
        self,
        panel: BankPanel,
        target_nl: np.ndarray,
        leave_ne: np.ndarray | None = None,
        *,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Log-probability of each haplotype, nats, float64 (N,).

        Args:
            target_nl: uint8 (N, L): 0, 1, or 255 where missing, which is passed over.
            leave_ne: int64 (N, E), panel haplotypes that target n may not copy, -1-padded.
        """
        bank = _bank(self.specs, panel)
        nats_n = np.empty(len(target_nl))
        for at in range(0, len(target_nl), BATCH):
            part = slice(at, at + BATCH)
            more = _foretold(self.trees, target_nl[part])
            left_ne = None if leave_ne is None else leave_ne[part]
            logit_nl = self.logits(_seen(bank, self.inputs, panel, target_nl[part], left_ne, more), panel)
            nats_n[part] = chains.nats(logit_nl, target_nl[part]).sum(axis=1)
            if progress is not None:
                progress(min(at + BATCH, len(target_nl)), len(target_nl))
        return nats_n

    def logits(self, seen_nlf: np.ndarray, panel: BankPanel) -> np.ndarray:
        """float32 (N, L): log-odds of ALT at each site given the alleles before it; seen_nlf as `_seen` makes it."""
        hardness_nl = np.broadcast_to(self.hardness_l, seen_nlf.shape[:2])
        features_nlf = _features(seen_nlf, _site_features(panel), hardness_nl)
        out = (features_nlf - self.weights["mean"]) / self.weights["scale"]
        for layer in (0, 1):
            out = out @ self.weights[f"w{layer}"].T + self.weights[f"b{layer}"]
            out *= 1 / (1 + np.exp(-out))  # SiLU
        out = out @ self.weights["w2"].T + self.weights["b2"]
        return _mixed(out, seen_nlf[..., : len(self.inputs) + len(self.trees)].astype(np.float32))


def _bank(specs: Sequence[ChainSpec], panel: BankPanel) -> Bank:
    return chains.bank(specs, panel.hazard_l, panel.mismatch_l, panel.contig_start_l)


def _foretold(trees: Sequence[Trees], target_nl: np.ndarray) -> Predictions:
    """What clusters foretell, in the form of chains, (N, L, E); "donors" are clusters."""
    made = np.empty((2, *target_nl.shape, len(trees)), np.float32)
    for e, each in enumerate(trees):
        made[0, :, :, e], made[1, :, :, e] = clusters.foretell(each, target_nl)
    return Predictions(*made)


def _seen(
    bank: Bank, inputs: list[int], panel: BankPanel, target_nl: np.ndarray, leave_ne: np.ndarray | None,
    more: Predictions,
) -> np.ndarray:  # fmt: skip
    """float16 (N, L, 4 C + 1): of each chain mixed, those of `more` last, the log-odds, the log of the effective number of
    donors, and the logs of its running surprise before the site at each of DECAYS; then the log-odds of the frequency."""
    from scipy.signal import lfilter

    made = chains.predict(bank, panel.bits_lw, panel.k, target_nl, leave_out=leave_ne)
    logit_nlc = np.concatenate([made.logit_nlc[:, :, inputs], more.logit_nlc], axis=2)
    donors_nlc = np.concatenate([made.donors_nlc[:, :, inputs], more.donors_nlc], axis=2)
    seen_nlf = np.empty((*logit_nlc.shape[:2], 4 * logit_nlc.shape[2] + 1), np.float16)
    parts = np.split(seen_nlf[:, :, :-1], 4, axis=2)
    parts[0][:], parts[1][:] = logit_nlc, np.log(donors_nlc)
    surprise_nlc = -chains.nats(logit_nlc, target_nl[:, :, None])
    for part, decay in zip(parts[2:], DECAYS, strict=True):
        part[:, 0] = np.log(LEAST)
        part[:, 1:] = np.log(lfilter([1 - decay], [1, -decay], surprise_nlc, axis=1)[:, :-1] + LEAST)
    seen_nlf[:, :, -1] = _frequency(panel, len(target_nl), leave_ne)
    return seen_nlf


def _frequency(panel: BankPanel, n: int, leave_ne: np.ndarray | None) -> np.ndarray:
    """float32 (N, L): log-odds of ALT's frequency in the panel, without the haplotypes left out: with them, an allele that
    no chain expects and the frequency knows would tell that the target has it."""
    count_nl = np.repeat(bits.popcount_rows(panel.bits_lw)[None].astype(np.int64), n, axis=0)
    left_n = np.full(n, panel.k)
    for at, own in np.ndenumerate(np.empty((0, 0)) if leave_ne is None else leave_ne):
        if own >= 0:
            left_n[at[0]] -= 1
            count_nl[at[0]] -= ((panel.bits_lw[:, own >> 6] >> np.uint64(own & 63)) & np.uint64(1)).astype(np.int64)
    share_nl = (count_nl + 0.5) / (left_n[:, None] + 1)
    return np.asarray(np.log(share_nl / (1 - share_nl)), np.float32)


def _mixed(out_nlo: np.ndarray, logit_nlc: np.ndarray) -> np.ndarray:
    """exp(t) sum_c softmax(o)_c logit_c + b; the network's last two outputs are t and b."""
    raised = np.exp(out_nlo[..., :-2] - out_nlo[..., :-2].max(axis=-1, keepdims=True))
    mean = (raised * logit_nlc).sum(axis=-1) / raised.sum(axis=-1)
    return np.asarray(np.exp(out_nlo[..., -2]) * mean + out_nlo[..., -1], np.float32)


def _site_features(panel: BankPanel) -> np.ndarray:
    """float32 (L, 4): logs of the expected switches and of the mismatch, of the sites passed on this contig and in all."""
    sites = len(panel.hazard_l)
    first_l = np.maximum.accumulate(np.where(panel.contig_start_l, np.arange(sites), 0))
    return np.stack(
        [
            np.log(np.where(panel.contig_start_l, 1.0, panel.hazard_l) + 1e-12),
            np.log(panel.mismatch_l + 1e-9),
            np.log1p(np.arange(sites) - first_l),
            np.log1p(np.arange(sites)),
        ],
        axis=1,
    ).astype(np.float32)  # fmt: skip


def _features(seen_nlf: np.ndarray, site_lf: np.ndarray, hardness_nl: np.ndarray) -> np.ndarray:
    """float32 (N, L, F), not yet scaled, or (cells, F) where all are given by cell; F = 4 C + 6."""
    seen = seen_nlf.shape[-1]
    features_nlf = np.empty((*seen_nlf.shape[:-1], seen + site_lf.shape[1] + 1), np.float32)
    features_nlf[..., :seen], features_nlf[..., seen:-1] = seen_nlf, site_lf
    features_nlf[..., -1] = np.log(hardness_nl + LEAST)
    return features_nlf


def train(
    panel: BankPanel,
    first_haplotype: np.ndarray,
    specs: Sequence[ChainSpec],
    config: MixConfig,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Mixture:
    """A mixture trained on people of the panel, each with all their haplotypes left out.

    Memory: 8 bytes per haplotype, site and chain mixed, of `config.cells`.

    Raises:
        UsageError: `inputs` that are no chains of the bank, or fewer than 10 people.
    """
    import torch

    if not all(0 <= c < len(specs) for c in config.inputs):
        raise UsageError(f"mix.inputs in 0..{len(specs) - 1}", str(config.inputs), "mix")
    samples, sites = len(first_haplotype) - 1, len(panel.hazard_l)
    sizes = config.clusters if sites <= config.cluster_sites else []
    inputs = len(config.inputs) + len(sizes)
    if samples < 10:
        raise UsageError("at least 10 people to learn a mixture from", str(samples), "mix", "a config without a bank")
    order = seeding.generator(seed, "genomics.mixture.people").permutation(samples)
    people = order[: max(10, min(samples, config.cells // (2 * sites)))]
    judges = max(1, round(config.held_out * len(people)))
    own = [np.arange(first_haplotype[s], first_haplotype[s + 1]) for s in people]
    row_n = np.concatenate(own)
    leave_ne = of_person(first_haplotype)[row_n]
    learn = np.arange(sum(len(each) for each in own[judges:])) + sum(len(each) for each in own[:judges])
    judge = np.arange(learn[0])
    target_nl = bits.unpack(np.ascontiguousarray(bits.transpose(panel.bits_lw, panel.k)[row_n]), sites)
    bank = _bank(specs, panel)
    trees, foretold = _clusters(panel, first_haplotype, people, sizes, seed)
    seen_nlf = np.empty((len(row_n), sites, 4 * inputs + 1), np.float16)
    mean_nl = np.empty((len(row_n), sites), np.float32)  # surprise under the mean of the log-odds
    doubt_nl = np.empty((len(row_n), sites), np.float32)  # probability of the less likely allele
    for part in _parts(np.arange(len(row_n)), BATCH):
        seen_nlf[part] = _seen(
            bank, config.inputs, panel, target_nl[part], leave_ne[part], Predictions(*(each[part] for each in foretold))
        )
        mean_logit_nl = seen_nlf[part, :, :inputs].mean(axis=2, dtype=np.float32)
        mean_nl[part], doubt_nl[part] = (
            -chains.nats(mean_logit_nl, target_nl[part]),
            1 / (1 + np.exp(abs(mean_logit_nl))),
        )
        if progress is not None:
            progress(int(part[-1]) + 1, 2 * len(row_n))
    hardness_l = mean_nl[learn].mean(axis=0, dtype=np.float32)
    weight_nl = np.broadcast_to(hardness_l, mean_nl.shape).copy()
    weight_nl[learn] = (hardness_l * len(learn) - mean_nl[learn]) / max(1, len(learn) - 1)  # of the others
    site_lf = _site_features(panel)
    # Most cells of a dense panel are foretold nearly surely: a few of them, with the weight of all, tell as much.
    plain_share = PLAIN_SHARE if len(learn) * sites >= FEW else 1.0
    chance_nl = np.where(np.maximum(mean_nl, doubt_nl) > PLAIN, 1.0, plain_share)[learn]
    taken_nl = seeding.generator(seed, "genomics.mixture.cells").random(chance_nl.shape) < chance_nl
    row_c, site_c = learn[np.nonzero(taken_nl)[0]], np.nonzero(taken_nl)[1]
    times_c = (1 / chance_nl[taken_nl]).astype(np.float32)

    def features_of(at: np.ndarray) -> np.ndarray:
        row, site = row_c[at], site_c[at]
        return _features(seen_nlf[row, site], site_lf[site], weight_nl[row, site])

    some = features_of(np.arange(0, len(row_c), -(-len(row_c) // 500_000)))
    mean, scale = some.mean(axis=0), some.std(axis=0) + 1e-3
    network = _network(some.shape[1], config.hidden, inputs, seed)
    batch = max(1, min(CELLS, len(row_c) // STEPS))
    steps = config.epochs * -(-len(row_c) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps + 1)
    done = 0
    for epoch in range(config.epochs):
        shuffled = seeding.generator(seed, "genomics.mixture.order", epoch).permutation(len(row_c))
        for at in _parts(shuffled, batch):
            logit_cc = torch.from_numpy(seen_nlf[row_c[at], site_c[at], :inputs].astype(np.float32))
            out = network(torch.from_numpy((features_of(at) - mean) / scale))
            logit = torch.exp(out[..., -2]) * (torch.softmax(out[..., :-2], -1) * logit_cc).sum(-1) + out[..., -1]
            allele = torch.from_numpy(target_nl[row_c[at], site_c[at]].astype(np.float32))
            times = torch.from_numpy(times_c[at])
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, allele, times, reduction="sum")
            loss = loss / (len(at) * float(times_c.mean()))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            if progress is not None:
                progress(len(row_n) + done * len(row_n) // steps, 2 * len(row_n))
    weights = {"mean": mean, "scale": scale}
    for i, layer in enumerate(each for each in network if isinstance(each, torch.nn.Linear)):
        weights[f"w{i}"], weights[f"b{i}"] = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    made = Mixture(list(specs), config.inputs, weights, hardness_l, 0.0, 0.0, 0, 0.0, trees)
    nats_n, single_nc = np.empty(len(judge)), np.empty((len(judge), inputs))
    for at in _parts(judge, BATCH):
        nats_n[at] = chains.nats(made.logits(seen_nlf[at], panel), target_nl[at]).sum(axis=1)
        single_nc[at] = chains.nats(seen_nlf[at, :, :inputs], target_nl[at][:, :, None]).sum(axis=1)
    return Mixture(
        list(specs), config.inputs, weights, hardness_l, float(nats_n.mean()),
        float(nats_n.std(ddof=1) / len(nats_n) ** 0.5) if len(nats_n) > 1 else 0.0, len(nats_n),
        float(single_nc.mean(axis=0).max()), trees,
    )  # fmt: skip


def _clusters(
    panel: BankPanel, first_haplotype: np.ndarray, people: np.ndarray, sizes: Sequence[int], seed: int
) -> tuple[tuple[Trees, ...], Predictions]:
    """Clusters of the whole panel, and what those of others (FOLDS folds of all people) foretell of `people`'s haplotypes."""
    samples = len(first_haplotype) - 1
    alleles_nl = bits.unpack(bits.transpose(panel.bits_lw, panel.k), len(panel.bits_lw)) if len(sizes) else None
    fold_s = seeding.generator(seed, "genomics.mixture.folds").permutation(samples) % FOLDS
    row_n = np.concatenate([np.arange(first_haplotype[s], first_haplotype[s + 1]) for s in people])
    made = np.empty((2, len(row_n), len(panel.bits_lw), len(sizes)), np.float32)
    fold_k = np.repeat(fold_s, np.diff(first_haplotype))
    trees = []
    for e, size in enumerate(sizes):
        assert alleles_nl is not None
        own_seed = seeding.derived_seed(seed, f"genomics.mixture.clusters.{e}")
        trees.append(clusters.learn(alleles_nl, panel.contig_start_l, size, seed=own_seed))
        for fold in range(FOLDS):
            others = clusters.learn(alleles_nl[fold_k != fold], panel.contig_start_l, size, seed=own_seed)
            at = np.flatnonzero(fold_k[row_n] == fold)
            made[0, at, :, e], made[1, at, :, e] = clusters.foretell(others, alleles_nl[row_n[at]])
    return tuple(trees), Predictions(*made)


def _parts(index: np.ndarray, size: int) -> list[np.ndarray]:
    return [index[at : at + size] for at in range(0, len(index), size)]


def _network(features: int, hidden: int, inputs: int, seed: int) -> Any:
    """Two hidden layers; the last one starts at 0, so that the mixture starts as the mean of the log-odds."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(int(seeding.generator(seed, "genomics.mixture.weights").integers(2**62)))
    first, second, last = nn.Linear(features, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, inputs + 2)
    with torch.no_grad():
        for layer in (first, second):
            layer.weight.normal_(0.0, layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
        last.weight.zero_()
        last.bias.zero_()
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
