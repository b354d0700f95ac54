"""A fitted haplotype transformer from its run folder: exact likelihood, and people drawn site by site.

The likelihood is the product over sites of what the network gives to the allele that is there, given those before it; a
missing allele says nothing to chains and network and costs nothing. People are drawn in fixed blocks of BLOCK people on
one thread, so that person k is a pure function of model, seed, k and what was asked for, whatever the shard: in another
block the last bits of a matrix product could differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine import seeding
from engine.errors import CorruptRun, InputError, UsageError
from engine.genomics import chains, li_stephens
from engine.genomics.li_stephens import LiStephens, Progress
from engine.genomics.matching import common_sites
from engine.genomics.panel import HaplotypePanel, Samples, synthetic_ids
from engine.genomics.transformer import features
from engine.genomics.transformer.batches import Facts, batch, centred, log_likelihood, new_network
from engine.genomics.transformer.config import TransformerConfig, load_config
from engine.genomics.transformer.model import HaplotypeTransformer
from engine.genomics.transformer.train import facts_of
from engine.kernels import bits
from engine.training import checkpoint

BLOCK = 64  # people drawn together
TOGETHER = 32  # haplotypes scored together


@dataclass(frozen=True)
class Transformer:
    """A fitted model.

    Attributes:
        config: settings. reference: the copying model, with the panel, its sites, groups and warnings.
        network: in evaluation mode, on the CPU. covariates: names of what people's phenotypes are conditioned on.
        digest: SHA-256 of the network's weights.
    """

    config: TransformerConfig
    reference: LiStephens
    network: HaplotypeTransformer
    covariates: list[str]
    digest: str = ""

    @property
    def warnings(self) -> list[str]:
        return self.reference.warnings

    @property
    def n_sites(self) -> int:
        return self.reference.n_sites

    @property
    def facts(self) -> Facts:
        """What its batches share."""
        return facts_of(self.config, self.reference)

    def log_likelihood(
        self,
        panel: HaplotypePanel,
        *,
        leave_one_out: bool = False,
        intersect: bool = False,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Log-probability of each haplotype of `panel`, group and phenotypes unknown, float64 (N,), nats.

        Args and errors as for `LiStephens.log_likelihood`. With leave_one_out no haplotype of the scored person is copied,
        but the network has learned from them.
        """
        model = self.reference
        if not panel.phased:
            raise InputError("a phased panel", "unphased genotypes", "score", "phase it, e.g. with SHAPEIT5 or Beagle")
        own_l, panel_l = common_sites({"model": model.sites, "panel": panel.sites}, intersect=intersect)
        panel = panel.select(sites=panel_l)
        leave_ne = model._own_haplotypes(panel, own_l) if leave_one_out else None
        bank, facts = features.bank_of(model, self.config.bank), self.facts
        bits_nw = panel.haplotype_major()
        missing_nw = None if panel.missing_lw is None else bits.transpose(panel.missing_lw, panel.n_haplotypes)
        result_n = np.empty(panel.n_haplotypes)
        for first in range(0, panel.n_haplotypes, TOGETHER):
            part = slice(first, min(first + TOGETHER, panel.n_haplotypes))
            alleles_nl = bits.unpack(bits_nw[part], panel.n_sites)
            if missing_nw is not None:
                alleles_nl[bits.unpack(missing_nw[part], panel.n_sites).astype(bool)] = 255
            target_nl = np.full((part.stop - part.start, self.n_sites), 255, dtype=np.uint8)
            target_nl[:, own_l] = alleles_nl
            foretold = features.foretold(
                bank, self.config.bank, model, target_nl, None if leave_ne is None else leave_ne[part]
            )
            unknown_n = np.full(len(target_nl), len(model.group_names))
            whole = batch(facts, *foretold, target_nl, unknown_n, self._unknown(len(target_nl)))
            result_n[part] = log_likelihood(self.network, whole, self.config.fit.window)
            if progress is not None:
                progress(part.stop, panel.n_haplotypes)
        return result_n

    def _unknown(self, n: int) -> np.ndarray:
        return np.zeros((n, 2 * len(self.covariates)), np.float32)

    def sample(
        self,
        n: int,
        *,
        groups: str | Sequence[str] | None = None,
        phenotypes: dict[str, float] | None = None,
        seed: int = 0,
        start: int = 0,
        progress: Progress | None = None,
    ) -> HaplotypePanel:
        """Synthetic people start .. start+n-1, diploid, named SYN000000000 and so on, with their groups; whole in memory.

        Alleles that too few people of the panel carry (`min_carriers`) are not drawn from the network: everybody has the
        common one, and the other arises anew, as in the copying model.

        Args:
            groups: None draws each person's group by the panel's proportions; one name for all; or n names.
            phenotypes: values by name for all people, in the units of the fit; those not named are unknown.

        Raises:
            UsageError: n or start below 0, an unknown group or phenotype, or a list of groups of another length.
        """
        if n < 0 or start < 0:
            raise UsageError("n >= 0 and start >= 0", f"{n} and {start}", "sample")
        given_v = self._given(phenotypes or {})
        model, alleles = self.reference, []
        first_block, stop_block = start // BLOCK, -(-(start + n) // BLOCK)
        group_n = self._groups(n, groups, seed, start)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for block in range(first_block, stop_block if n else first_block):
                people = np.arange(BLOCK * block, BLOCK * (block + 1))
                wanted = (people >= start) & (people < start + n)
                group_b = np.zeros(BLOCK, np.int64)  # people who are not asked for fill the block
                group_b[wanted] = group_n[people[wanted] - start]
                made_nl, _ = self._block(people, group_b, given_v, seed)
                alleles.append(made_nl[np.repeat(wanted, 2)])
                if progress is not None:
                    progress(block + 1 - first_block, stop_block - first_block)
        finally:
            torch.set_num_threads(threads)
        alleles_nl = np.concatenate([*alleles, np.zeros((0, self.n_sites), np.uint8)])
        samples = Samples(
            synthetic_ids(start, n), np.array(model.group_names, dtype=str)[group_n], None,
            2 * np.arange(n + 1, dtype=np.int64),
        )  # fmt: skip
        bits_lw = bits.pack(np.ascontiguousarray(alleles_nl.T))
        return HaplotypePanel(bits_lw, None, model.sites, samples, True, dict(model.contig_length), model.assembly)

    def _given(self, phenotypes: dict[str, float]) -> np.ndarray:
        given_v = np.zeros(2 * len(self.covariates), np.float32)
        for name, value in phenotypes.items():
            if name not in self.covariates:
                raise UsageError("a phenotype of the fit", f"'{name}'", "sample", ", ".join(self.covariates) or "none")
            at = self.covariates.index(name)
            given_v[at], given_v[len(self.covariates) + at] = value, 1.0
        return given_v

    def _groups(self, n: int, groups: str | Sequence[str] | None, seed: int, start: int) -> np.ndarray:
        """int64 (n,), drawn as the copying model draws them."""
        model = self.reference
        if groups is None:
            cumulative_g = np.cumsum(model.group_proportions())
            drawn = [seeding.generator(seed, "genomics.transformer.group", k).random() for k in range(start, start + n)]
            return np.searchsorted(cumulative_g / cumulative_g[-1], np.array(drawn), side="right").astype(np.int64)
        if isinstance(groups, str):
            return np.full(n, model.group_index(groups), dtype=np.int64)
        if len(groups) != n:
            raise UsageError(f"one group for each of {n} people", f"{len(groups)}", "sample")
        return np.array([model.group_index(name) for name in groups], dtype=np.int64)

    @torch.no_grad()
    def _block(
        self, people: np.ndarray, group_b: np.ndarray, given_v: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Alleles uint8 (2 people, L), and the log-probability float64 (2 people,) of those drawn from the network: chains,
        memories and network go on together, site by site."""
        model, network, specs, facts = self.reference, self.network, self.config.bank, self.facts
        network.eval()
        bank, rare_l = features.bank_of(model, specs), model.rare.common_l
        n, sites, patch = 2 * len(people), model.n_sites, self.config.network.patch
        uniform_nl = np.empty((n, sites), np.float32)
        new = []
        for at, k in enumerate(people.tolist()):
            rng = seeding.generator(seed, "genomics.transformer.alleles", k)
            for second in (0, 1):
                uniform_nl[2 * at + second] = rng.random(sites, dtype=np.float32)
                new.append(model.new_alleles(int(group_b[at]), rng))
        made_nl, drawn_n = np.empty((n, sites), np.uint8), np.zeros(n)
        seen_n = np.full(n, 255, np.uint8)
        memory = features.Memory(n, len(specs))
        feature_nf = np.empty((n, features.width(len(specs))), np.float32)
        residual_pn, nats_pnc = np.zeros((patch, n), np.float32), np.zeros((patch, n, len(specs)), np.float32)
        condition_nd = network.condition(
            torch.from_numpy(np.repeat(group_b, 2)), torch.from_numpy(np.tile(given_v, (n, 1)))
        )
        state, bank_state = network.begin(condition_nd), chains.start(bank, model.k, n)
        for site in range(sites):
            logit_nc, donors_nc = features.foretold_next(bank, specs, model, site, seen_n, bank_state)
            features.look_all(logit_nc, donors_nc, memory.running_nrc, memory.last_nt, facts.fact_lf[site], feature_nf)
            if rare_l[site] >= 0:  # said to nobody: who carries it would be found by those who copy them
                made_nl[:, site], seen_n = rare_l[site], np.full(n, 255, np.uint8)
            else:
                logit_n = network.at_sites(
                    torch.from_numpy(logit_nc.astype(np.float32))[:, None], torch.from_numpy(feature_nf)[:, None],
                    state.last_bd[:, None], site,
                )[:, 0]  # fmt: skip
                seen_n = (uniform_nl[:, site] < torch.sigmoid(logit_n).numpy()).astype(np.uint8)
                made_nl[:, site] = seen_n
                drawn_n += chains.nats(logit_n.numpy(), seen_n)
            at = site % patch
            features.learn_all(
                logit_nc, seen_n, facts.weight_c, memory.running_nrc, memory.last_nt, residual_pn[at], nats_pnc[at]
            )
            if at == patch - 1 and site + 1 < sites:
                here = slice(site + 1 - patch, site + 1)
                known_np = np.where(rare_l[here] >= 0, 255, made_nl[:, here]).astype(np.uint8)
                entering = network.tokens(
                    torch.from_numpy(centred(facts, known_np, here)), torch.from_numpy(residual_pn.T.copy()),
                    torch.from_numpy(nats_pnc.transpose(1, 0, 2).copy()), condition_nd, here.start,
                )  # fmt: skip
                _, state = network.through_patches(*entering, state)
        for haplotype, site_r in enumerate(new):
            made_nl[haplotype, site_r] = 1 - np.maximum(rare_l[site_r], 0)
        return made_nl, drawn_n


def load(run_folder: str | Path) -> Transformer:
    """The model of a run folder, with the average that was best on held-out people.

    Raises:
        CorruptRun: a file is absent, a checksum differs, or the checkpoint is of another panel.
    """
    run_folder = Path(run_folder)
    config, reference = load_config(run_folder / "config.yaml"), li_stephens.load(run_folder / "reference")
    parts, state = checkpoint.load(run_folder)
    from engine.genomics import run_folder as folder

    if state["model"]["reference_sha256"] != folder.checksum(run_folder / "reference"):
        raise CorruptRun(
            "the panel that the network was trained on", "another", run_folder / "reference", "fitting again"
        )
    names = state["model"]["covariates"]
    network = new_network(
        config.network, sites=reference.n_sites, chains=len(config.bank), groups=len(reference.group_names),
        covariates=len(names), weight_c=config.weights,
    )  # fmt: skip
    checkpoint.load_strictly(network, parts["best"], run_folder)
    return Transformer(config, reference, network.eval(), names, state["sha256"]["best.safetensors"])
