"""The Li-Stephens generator: synthetic haplotypes as imperfect mosaics of a reference panel, and their exact
likelihood.

`fit` keeps the packed panel, the genetic distances and the groups; `sample` draws copying paths first, which are small,
and then materialises alleles; `log_likelihood` scores any haplotypes against the whole panel. The recursions themselves
are in `engine.kernels.haplotype_hmm`.

Conventions. With d_l the genetic distance in Morgans between site l-1 and l and K the number of haplotypes that may be
copied, the probability of a switch is r_l = 1 - exp(-4 Ne d_l / K) (Li and Stephens, Genetics 165:2213, 2003, equation
A1), after which the donor is uniform over the K, the last one included; an allele is copied wrongly with probability
`mismatch`. With `learn_rounds` the panel itself corrects both at each site (`engine.genomics.rates`). Sampling copies
within a group and K counts the haplotypes of that group; scoring copies from all groups and K counts all. What only one
person carries is not copied, and arises anew elsewhere (`min_carriers`); scoring knows of no such rule. Contigs are
unlinked. A distance of 0 still leaves a switch probability of 1e-12: maps are flat where they are unresolved, but
recombination is never impossible.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine import seeding
from engine.errors import InputError, UsageError, closest
from engine.genomics import rates
from engine.genomics.chains import BankPanel, ChainSpec, MixConfig
from engine.genomics.matching import common_sites, own_haplotypes
from engine.genomics.panel import DEFAULT_CM_PER_MB, HaplotypePanel, Samples, Sites, synthetic_ids
from engine.genomics.paths import Paths, joined, of_lists
from engine.kernels import bits, haplotype_hmm

if TYPE_CHECKING:
    from engine.genomics import cluster_sampler
    from engine.genomics.genealogy import Genealogy, Tables
    from engine.genomics.mixture import Mixture

LEAST_SWITCH = 1e-12
MOST_SWITCH = 1 - 1e-9  # within a contig, of what is learned
LEAST_MISMATCH = 1e-9  # from which learning can rise
Progress = Callable[[int, int], None]  # (done, total)


class LiStephensConfig(BaseModel):
    """Settings of the copying model.

    Attributes:
        ne: effective population size, diploid people; scales how often the copied haplotype changes.
        group_ne: Ne of single groups where it differs from `ne`.
        mismatch: probability that an allele is copied wrongly, per site.
        per_group: sample within groups; False pools the panel as one group named "all".
        min_carriers: an allele that fewer reference people carry is not copied (it would say who was in the panel) but
            arises anew, in people and at sites of its kind at random, as often as in the panel; 1 copies all.
        sampler: "interchange": whole rounds in which every donor is copied once everywhere (`genealogy`); "independent": the
            chain of the model run forward, each haplotype by itself; "clusters": from a mixture of trees, for sparse sites
            (`cluster_sampler`).
        clusters: how many clusters that sampler has.
        switching: of the interchange sampler: swaps as a multiple of the rate at which synthetic haplotypes share stretches
            just shorter than real ones do; below 1 longer pieces, above shorter ones.
        candidates: haplotypes among which a swap partner is the nearest; 1 swaps at random.
        reach: how far around a swap haplotypes are compared, in mean pieces.
        max_donor_pieces: the most that is copied from a donor into one person, all pieces together, in mean pieces of the
            group; more where the group has too few donors for that. 0 for no bound.
        max_donor_cm: the same in centimorgans, in its place; a group with too few donors is then refused.
        learn_rounds: rounds of expectation maximisation that correct switches and mismatches at each site, by the panel's
            own people; 0 keeps the map and `mismatch` as they are.
        learn_people: people counted in a round.
        learn_prior: how many haplotypes the map and `mismatch` weigh as much as, at each site.
        bank, mix: chains and how they are mixed into one likelihood (`engine.genomics.mixture`); none without `mix`.
        seed: seed of sampling where the caller names none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ne: float = Field(default=320_000.0, gt=0)
    group_ne: dict[str, float] = {}
    mismatch: float = Field(default=2e-4, ge=0, lt=0.5)
    per_group: bool = True
    min_carriers: int = Field(default=2, ge=1)
    sampler: Literal["interchange", "independent", "clusters"] = "interchange"
    clusters: int = Field(default=12, ge=1)
    switching: float = Field(default=2.0, gt=0)
    candidates: int = Field(default=64, ge=1)
    reach: float = Field(default=4.0, gt=0)
    max_donor_pieces: float = Field(default=2.0, ge=0)
    max_donor_cm: float | None = Field(default=None, gt=0)
    learn_rounds: int = Field(default=0, ge=0)
    learn_people: int = Field(default=250, ge=1)
    learn_prior: float = Field(default=150.0, gt=0)
    bank: list[ChainSpec] = []
    mix: MixConfig | None = None
    seed: int = 0


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> LiStephensConfig:
    """Config from YAML (None: the defaults) with `key=value` or `group_ne.NAME=value` overrides.

    Raises:
        UsageError: unknown key (the nearest one is named), a value outside its range, or text that is not YAML.
    """
    where: object = path or "config"
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError("a YAML file", str(error).splitlines()[0], where) from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UsageError("a mapping of settings", type(values).__name__, where)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError("key=value", text, "--set")
        outer, dot, inner = key.partition(".")
        if dot:
            values[outer] = {**(values.get(outer) or {}), inner: yaml.safe_load(value)}
        else:
            values[outer] = yaml.safe_load(value)
    known = list(LiStephensConfig.model_fields)
    for key in values:
        if key not in known:
            raise UsageError("a known setting", f"'{key}'", where, closest(str(key), known))
    try:
        return LiStephensConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{name}: {first['msg']}", repr(first["input"]), where) from None


@dataclass(frozen=True)
class Rare:
    """Alleles that too few people carry to be copied.

    Attributes:
        common_l: int8 (L,): the allele that everybody copies at a site; -1 where alleles are copied as they are.
        new_site_r: sites where the other allele arises anew; rate_g: float64 (G,), how often, per haplotype and site.
    """

    common_l: np.ndarray
    new_site_r: np.ndarray
    rate_g: np.ndarray


@dataclass(frozen=True)
class LiStephens:
    """A fitted model.

    Attributes:
        config: settings.
        bits_lw: uint64 (L, ceil(K/64)), the reference panel.
        sites, samples, contig_length, assembly: of the reference panel.
        distance_l: float64 (L,), Morgans from the site before; +inf at the first site of a contig.
        mismatch_l: float64 (L,), copying error per site, learned where the config says so.
        group_names: names in order of first appearance; ["all"] where the model does not tell groups apart.
        group_of_haplotype_k: int32 (K,), index into group_names.
        warnings: what had to be assumed, one sentence each; shown with every result.
        genealogy_learned: what the panel shows of its past; None learns it when it is first needed (`genealogy`).
        learned_l: float64 (L,), the Morgans that the panel's own switches tell, in place of `distance_l` for copying; +inf at
            the first site of a contig. None where the map is used as it is.
        mixture: several chains as one likelihood; None where the config has none.
    """

    config: LiStephensConfig
    bits_lw: np.ndarray
    sites: Sites
    samples: Samples
    contig_length: dict[str, int]
    assembly: str | None
    distance_l: np.ndarray
    mismatch_l: np.ndarray
    group_names: list[str]
    group_of_haplotype_k: np.ndarray
    warnings: list[str] = field(default_factory=list)
    genealogy_learned: Genealogy | None = None
    learned_l: np.ndarray | None = None
    mixture: Mixture | None = None

    @property
    def k(self) -> int:
        """Number of reference haplotypes."""
        return int(self.samples.first_haplotype[-1])

    @property
    def n_sites(self) -> int:
        return len(self.distance_l)

    def hazard_l(self, ne: float, k: int) -> np.ndarray:
        """float64 (L,): expected switches between site l-1 and l, 4 Ne d_l / K, d_l learned where it was; 0 at the first
        site of a contig."""
        morgans_l = self.distance_l if self.learned_l is None else self.learned_l
        return np.where(np.isfinite(self.distance_l), 4 * ne * morgans_l / k, 0.0)

    def switch_l(self) -> np.ndarray:
        """float64 (L,): switch probabilities of scoring, over all K haplotypes; 1 at the first site of a contig."""
        switch_l = -np.expm1(-self.hazard_l(self.config.ne, self.k))
        return np.where(np.isfinite(self.distance_l), np.maximum(switch_l, LEAST_SWITCH), 1.0)

    def bank_panel(self) -> BankPanel:
        """What banks of chains copy from."""
        return BankPanel(self.bits_lw, self.k, self.hazard_l(1.0, self.k), self.mismatch_l, np.isinf(self.distance_l))

    def group_proportions(self) -> np.ndarray:
        """float64 (G,): share of the panel's people in each group."""
        first_k = self.samples.first_haplotype[:-1]
        counts = np.bincount(self.group_of_haplotype_k[first_k], minlength=len(self.group_names))
        return counts / counts.sum()

    def group_index(self, name: str) -> int:
        """Index of a group; UsageError naming the nearest known group where there is none of this name."""
        if name not in self.group_names:
            folded = {known.lower(): known for known in self.group_names}
            near = get_close_matches(name.lower(), list(folded), n=1, cutoff=0.3)
            hint = f"'{folded[near[0]]}'" if near else closest(name, self.group_names)
            raise UsageError("a group of the model", f"'{name}'", "group", hint)
        return self.group_names.index(name)

    @cached_property
    def genealogy(self) -> Genealogy:
        """What the panel shows of its past, for the interchange sampler."""
        from engine.genomics import genealogy

        return self.genealogy_learned or genealogy.learn(self)

    @cached_property
    def genealogy_tables(self) -> Tables:
        from engine.genomics import genealogy

        return genealogy.tables(self)

    @cached_property
    def cluster_tables(self) -> cluster_sampler.Tables:
        """What the clusters sampler draws from."""
        from engine.genomics import cluster_sampler

        return cluster_sampler.tables(self)

    @cached_property
    def rounds_held(self) -> OrderedDict[Any, Paths]:
        """The rounds drawn last."""
        return OrderedDict()

    @cached_property
    def rare(self) -> Rare:
        """What is not copied. All sites where an allele has too few carriers, or none, are one class: were only those
        with a carrier to get new ones, their number would still tell which sites the panel's people have.
        """
        first_s, most = self.samples.first_haplotype, self.config.min_carriers - 1
        common_l = np.full(self.n_sites, -1, dtype=np.int8)
        count_g, haplotypes_g = np.zeros(len(self.group_names)), np.bincount(self.group_of_haplotype_k)
        new_sites = []
        if most and len(first_s) - 1 > 2 * most:  # among fewer people an allele could be rare on both sides
            count_l = bits.popcount_rows(self.bits_lw)
            near_l = np.flatnonzero(
                np.minimum(count_l, self.k - count_l) <= 2 * most
            )  # two haplotypes a person at most
            for at in range(0, len(near_l), 1024):
                site_l = near_l[at : at + 1024]
                common = (2 * count_l[site_l] > self.k).astype(np.int8)
                other_lk = bits.unpack(np.ascontiguousarray(self.bits_lw[site_l]), self.k) != common[:, None]
                few = np.logical_or.reduceat(other_lk, first_s[:-1], axis=1).sum(axis=1) <= most
                split = self.sites.alt_index[site_l] != 0  # a haplotype has one of several ALTs, or REF
                few &= ~(split & (common == 1))
                common_l[site_l[few]] = common[few]
                new = few & ~split
                new_sites.append(site_l[new])
                count_g += np.bincount(self.group_of_haplotype_k, other_lk[new].sum(axis=0), len(count_g))
        new_site_r = joined(new_sites)
        return Rare(common_l, new_site_r, count_g / np.maximum(1, haplotypes_g * len(new_site_r)))

    def paths(
        self,
        n: int,
        *,
        groups: str | Sequence[str] | None = None,
        seed: int = 0,
        start: int = 0,
        progress: Progress | None = None,
    ) -> tuple[Paths, np.ndarray]:
        """Copying paths of people start .. start+n-1, two haplotypes each, and the group of each person.

        Person k's path depends on the model, `seed`, k and the group asked for, and on nothing else. With the interchange
        sampler a person is part of a round as large as the panel, which is drawn whole.

        Args:
            groups: None draws each person's group by the panel's proportions; one name for all; or n names.

        Returns:
            Paths of 2n haplotypes; int64 (n,) group indices.

        Raises:
            UsageError: n or start below 0, an unknown group, or a list of groups of another length.
        """
        if n < 0 or start < 0:
            raise UsageError("n >= 0 and start >= 0", f"{n} and {start}", "sample")
        if groups is not None and not isinstance(groups, str) and len(groups) != n:
            raise UsageError(f"one group for each of {n} people", f"{len(groups)}", "sample")
        if self.config.sampler == "interchange":
            from engine.genomics import genealogy

            return genealogy.paths(self, n, groups, seed, start, progress)
        if groups is None:
            cumulative_g = np.cumsum(self.group_proportions())
            drawn = [seeding.generator(seed, "genomics.li_stephens.group", k).random() for k in range(start, start + n)]
            group_n = np.searchsorted(cumulative_g / cumulative_g[-1], np.array(drawn), side="right").astype(np.int64)
        elif isinstance(groups, str):
            group_n = np.full(n, self.group_index(groups), dtype=np.int64)
        else:
            group_n = np.array([self.group_index(name) for name in groups], dtype=np.int64)

        if self.config.sampler == "clusters":
            from engine.genomics import cluster_sampler

            return cluster_sampler.paths(self, group_n, seed, start, progress), group_n
        contig_start = np.flatnonzero(np.isinf(self.distance_l))
        donors_g = [np.flatnonzero(self.group_of_haplotype_k == g) for g in range(len(self.group_names))]
        switch_g: dict[int, np.ndarray] = {}
        # one ALT of a split multiallelic site cannot be inverted without regard to the others
        mutable_l = np.where(self.sites.alt_index == 0, -np.log1p(-self.mismatch_l), 0.0)
        mutation_l = np.cumsum(mutable_l)
        starts, donors, flips = [], [], []
        for at, g in enumerate(group_n.tolist()):
            if g not in switch_g:
                ne = self.config.group_ne.get(self.group_names[g], self.config.ne)
                switch_g[g] = np.cumsum(self.hazard_l(ne, len(donors_g[g])))
            rng = seeding.generator(seed, "genomics.li_stephens.path", start + at)
            for _ in range(2):
                begin = np.union1d(contig_start, _arrivals(switch_g[g], rng))
                starts.append(begin)
                donors.append(donors_g[g][rng.integers(0, len(donors_g[g]), len(begin))])
                flips.append(np.union1d(_arrivals(mutation_l, rng), self.new_alleles(g, rng)))
            if progress is not None and (at + 1 == n or at % 64 == 63):
                progress(at + 1, n)
        return of_lists(starts, donors, flips), group_n

    def new_alleles(self, group: int, rng: np.random.Generator) -> np.ndarray:
        """Sites at which one haplotype of `group` has an allele that is not copied."""
        sites, hazard = self.rare.new_site_r, -np.log1p(-self.rare.rate_g[group])
        return np.unique(sites[rng.integers(0, max(1, len(sites)), rng.poisson(len(sites) * hazard))])

    def materialise(self, paths: Paths, first_site: int = 0, stop_site: int | None = None) -> np.ndarray:
        """Alleles of `paths` at sites first_site .. stop_site-1, packed (sites, ceil(N/64)): one block of a long
        output."""
        stop_site = self.n_sites if stop_site is None else stop_site
        block_lw, common_l = self.bits_lw[first_site:stop_site], self.rare.common_l[first_site:stop_site]
        if (common_l >= 0).any():
            block_lw = block_lw.copy()
            block_lw[common_l == 0] = 0
            block_lw[common_l == 1] = bits.pack(np.ones((1, self.k), dtype=np.uint8))
        return haplotype_hmm.materialise(
            block_lw, self.k, paths.segment_offset_n, paths.segment_start_s, paths.segment_donor_s,
            paths.flip_offset_n, paths.flip_site_f, first_site=first_site,
        )  # fmt: skip

    def sample(
        self,
        n: int,
        *,
        groups: str | Sequence[str] | None = None,
        seed: int = 0,
        start: int = 0,
        progress: Progress | None = None,
    ) -> HaplotypePanel:
        """Synthetic people start .. start+n-1, diploid, named SYN000000000 and so on, with their groups.

        Args and errors as for `paths`. The whole result is held in memory, 2 n L / 8 bytes.
        """
        paths, group_n = self.paths(n, groups=groups, seed=seed, start=start, progress=progress)
        return self.people(paths, np.array(self.group_names, dtype=str)[group_n], start)

    def people(self, paths: Paths, groups: np.ndarray, start: int = 0) -> HaplotypePanel:
        """People start, start + 1, ... with these paths, two haplotypes each, and groups, str (n,); whole in memory."""
        n = len(groups)
        samples = Samples(synthetic_ids(start, n), groups, None, 2 * np.arange(n + 1, dtype=np.int64))
        return HaplotypePanel(
            self.materialise(paths), None, self.sites, samples, True, dict(self.contig_length), self.assembly
        )

    def log_likelihood(
        self,
        panel: HaplotypePanel,
        *,
        leave_one_out: bool = False,
        intersect: bool = False,
        mixed: bool = False,
        progress: Progress | None = None,
        implementation: str | None = None,
    ) -> np.ndarray:
        """Log-probability of each haplotype of `panel` as a mosaic of all K reference haplotypes, nats.

        Missing alleles are summed over. The panel need not be ordered as the model's; its sites must be the same.

        Args:
            leave_one_out: the panel's people are in the reference: each is scored without any haplotype of that person,
                because two haplotypes of one person can be related. Ids and alleles must agree.
            intersect: score a panel that lacks some of the model's sites (taken as missing) or has others (left out).
            mixed: by the mixture of chains, which is likelier and takes some twenty times as long.

        Returns:
            float64 (N,).

        Raises:
            InputError: unphased panel, other sites, or with leave_one_out people who are not those of the reference.
        """
        if mixed and self.mixture is None:
            raise UsageError("a model with a mixture", "one without", "score", "mixed=False, or fitting with `mix`")
        if not panel.phased:
            raise InputError("a phased panel", "unphased genotypes", "score", "phase it, e.g. with SHAPEIT5 or Beagle")
        own_l, panel_l = common_sites({"model": self.sites, "panel": panel.sites}, intersect=intersect)
        panel = panel.select(sites=panel_l)
        exclude_ne = self._own_haplotypes(panel, own_l) if leave_one_out else None
        switch_l, bits_nw = self.switch_l(), panel.haplotype_major()
        missing_nw = None if panel.missing_lw is None else bits.transpose(panel.missing_lw, panel.n_haplotypes)
        result_n = np.empty(panel.n_haplotypes)
        for first in range(0, panel.n_haplotypes, 128):
            part = slice(first, min(first + 128, panel.n_haplotypes))
            alleles_nl = bits.unpack(bits_nw[part], panel.n_sites)
            if missing_nw is not None:
                alleles_nl[bits.unpack(missing_nw[part], panel.n_sites).astype(bool)] = 255
            target_nl = np.full((part.stop - part.start, self.n_sites), 255, dtype=np.uint8)
            target_nl[:, own_l] = alleles_nl
            leave_ne = None if exclude_ne is None else exclude_ne[part]
            if mixed:
                assert self.mixture is not None
                result_n[part] = self.mixture.log_likelihood(self.bank_panel(), target_nl, leave_ne)
            else:
                result_n[part] = haplotype_hmm.log_likelihood(
                    self.bits_lw, self.k, target_nl, switch_l, self.mismatch_l, exclude_ne=leave_ne,
                    implementation=implementation,
                )  # fmt: skip
            if progress is not None:
                progress(part.stop, panel.n_haplotypes)
        return result_n

    def _own_haplotypes(self, panel: HaplotypePanel, own_l: np.ndarray) -> np.ndarray:
        """int64 (N, 2): the reference haplotypes of the person that each panel haplotype belongs to, -1-padded."""
        return own_haplotypes(self.samples, self.bits_lw, panel, own_l)

    def save(self, run_folder: str | Path, *, inputs: Sequence[str | Path] = ()) -> None:
        """Write the run folder: config.yaml, provenance.json, log.jsonl and checkpoints/step-000000. It must not exist.

        The folder holds the reference panel itself: it is as sensitive as the panel.
        """
        from engine.genomics.run_folder import save

        save(self, run_folder, inputs=inputs)


def load(run_folder: str | Path) -> LiStephens:
    """The model of a run folder.

    Raises:
        CorruptRun: a file is absent, a checksum differs, or a key is missing or unexpected; it is named.
    """
    from engine.genomics import run_folder as folder

    return folder.load(run_folder)


def fit(
    panel: HaplotypePanel, config: LiStephensConfig | None = None, *, progress: Progress | None = None
) -> LiStephens:
    """The copying model over `panel`, with its map, groups and settings, and with rates learned where they say so.

    Raises:
        InputError: the panel is unphased, has missing alleles, is empty, or its genetic positions fall.
        UsageError: `group_ne` names a group that the panel does not have.
    """
    config = config or LiStephensConfig()
    if not panel.phased:
        raise InputError(
            "a phased panel as reference", "unphased genotypes", "fit", "phase it first, e.g. with SHAPEIT5 or Beagle"
        )
    if panel.missing_lw is not None and panel.missing_lw.any():
        count = int(bits.popcount_rows(panel.missing_lw).sum())
        raise InputError(
            "a complete panel as reference", f"{count} missing alleles", "fit",
            "impute it, e.g. with Beagle, or drop sites with missing alleles (bcftools view -g ^miss)",
        )  # fmt: skip
    if panel.n_haplotypes == 0 or panel.n_sites == 0:
        raise InputError("haplotypes and sites", f"{panel.n_haplotypes} and {panel.n_sites}", "fit")
    warnings: list[str] = []
    contig_l = panel.sites.contig
    new_contig = np.ones(panel.n_sites, dtype=bool)
    new_contig[1:] = contig_l[1:] != contig_l[:-1]
    if panel.sites.position_cm is None:
        warnings.append(f"no genetic map was given: {DEFAULT_CM_PER_MB:g} cM per Mb assumed throughout")
    distance_l = np.diff(panel.sites.centimorgans(), prepend=0.0) / 100
    distance_l[new_contig] = np.inf
    if not (distance_l >= 0).all():
        at = int(np.flatnonzero(~(distance_l >= 0))[0])
        where = f"{contig_l[at]}:{panel.sites.position_bp[at]}"
        raise InputError("genetic positions that do not fall", f"{100 * distance_l[at]:.3g} cM", where)
    if config.per_group and panel.samples.group is None:
        warnings.append("the panel has no groups: sampled as one group")
    if config.per_group and panel.group_n is not None:
        group_names = list(panel.groups())
        numbers = {name: at for at, name in enumerate(group_names)}
        group_k = np.array([numbers[name] for name in panel.group_n.tolist()], dtype=np.int32)
    else:
        group_names, group_k = ["all"], np.zeros(panel.n_haplotypes, dtype=np.int32)
    for name in config.group_ne:
        if name not in group_names:
            raise UsageError("a group of the panel", f"'{name}'", "group_ne", closest(name, group_names))
    for g, name in enumerate(group_names):
        if (count := int((group_k == g).sum())) < 20:
            warnings.append(f"group '{name}' has {count} haplotypes: mosaics are close copies of few people")
    model = LiStephens(
        config, panel.bits_lw, panel.sites, panel.samples, dict(panel.contig_length), panel.assembly, distance_l,
        np.full(panel.n_sites, config.mismatch), group_names, group_k, warnings,
    )  # fmt: skip
    if config.sampler == "clusters":
        from engine.genomics import cluster_sampler

        cluster_sampler.check(model)
    if config.learn_rounds:
        model = _with_learned_rates(model, progress)
    if config.mix is not None:
        from engine.genomics import mixture

        made = mixture.train(
            model.bank_panel(),
            model.samples.first_haplotype,
            config.bank,
            config.mix,
            seed=config.seed,
            progress=progress,
        )
        model = replace(model, mixture=made)
    return model


def _with_learned_rates(model: LiStephens, progress: Progress | None) -> LiStephens:
    """The model with the rates that its own people tell, each left out in turn."""
    config = model.config
    if model.k - np.diff(model.samples.first_haplotype).max() < 1:
        raise InputError("people of whom one can be left out", f"{len(model.samples.ids)}", "fit", "learn_rounds=0")
    learned = rates.learn(
        model.bits_lw, model.k, model.samples.first_haplotype, model.switch_l(),
        np.maximum(model.mismatch_l, LEAST_MISMATCH), rounds=config.learn_rounds, people=config.learn_people,
        prior=config.learn_prior, seed=config.seed, progress=progress,
    )  # fmt: skip
    hazard_l = -np.log1p(-np.minimum(learned.switch_l, MOST_SWITCH))
    learned_l = np.where(np.isfinite(model.distance_l), hazard_l * model.k / (4 * config.ne), np.inf)
    return replace(model, mismatch_l=learned.mismatch_l, learned_l=learned_l)


def _arrivals(cumulative_l: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sites, rising, in whose interval a Poisson process of cumulative hazard `cumulative_l` has a point.

    Each site l is hit with probability 1 - exp(-hazard_l), independently, at a cost of the number of hits and not of
    sites.
    """
    total = cumulative_l[-1]
    points = rng.random(rng.poisson(total)) * total
    points.sort()  # searched for in order they are found in a fraction of the time: the table does not fit the cache
    hits = np.minimum(np.searchsorted(cumulative_l, points, side="right"), len(cumulative_l) - 1)
    return hits[np.diff(hits, prepend=-1) > 0]
