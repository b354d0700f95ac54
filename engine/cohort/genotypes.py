"""Phased genotypes of a three-population sample under a published human demography, simulated with msprime.

Demography: the out-of-Africa model of Gutenkunst et al., "Inferring the joint demographic history of multiple
populations from multidimensional SNP frequency data", PLoS Genetics 2009 (Table 1, maximum likelihood). Recombination:
a map with hotspots of human-like density (McVean et al., Science 2004). Everything is a function of (config, people,
seed); the groups of the people are shuffled, so that the order of people says nothing. ALT is the derived allele.
Diagnoses are not made here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msprime
import numpy as np

from engine import seeding
from engine.cohort.config import DiseaseConfig, GenotypeConfig
from engine.errors import UsageError
from engine.genomics import simulate as simulate_panel
from engine.genomics.panel import HaplotypePanel, panel_from_alleles


def demography() -> msprime.Demography:
    """Gutenkunst et al. 2009: AFR, EUR and EAS today; sizes are diploid, times in generations of 25 years."""
    model: msprime.Demography = simulate_panel.demography("out-of-africa")
    return model


def recombination_map(config: GenotypeConfig, seed: int) -> msprime.RateMap:
    """Inside windows a background rate with hotspots (distances and intensities exponential, width fixed); between
    windows the rate of the gaps. Positions start at 0.
    """
    rng = seeding.generator(seed, "cohort.recombination_map")
    edges: list[float] = [0.0]
    rates: list[float] = []

    def until(place: float, rate: float) -> None:
        if place > edges[-1]:
            edges.append(place)
            rates.append(rate)

    for first in config.window_starts:
        until(float(first), config.gap_rate)
        place, last = float(first), float(first + config.window_bp)
        while True:
            apart = max(1.0, config.hotspot_every_bp - config.hotspot_width_bp)
            place = math.floor(place + config.hotspot_width_bp + rng.exponential(apart))
            fold = 1 + rng.exponential(config.hotspot_fold - 1) if config.hotspot_fold > 1 else 1.0
            if place + config.hotspot_width_bp >= last:
                break
            until(place, config.recombination_rate)
            until(place + config.hotspot_width_bp, config.recombination_rate * fold)
        until(last, config.recombination_rate)
    return msprime.RateMap(position=edges, rate=rates)


def mutation_map(config: GenotypeConfig) -> msprime.RateMap:
    """Mutations arise in the windows only: what lies between them is not sequenced."""
    edges: list[float] = [0.0]
    rates: list[float] = []
    for first in config.window_starts:
        if first > edges[-1]:
            edges.append(float(first))
            rates.append(0.0)
        edges.append(float(first + config.window_bp))
        rates.append(config.mutation_rate)
    return msprime.RateMap(position=edges, rate=rates)


def group_counts(config: GenotypeConfig, people: int) -> dict[str, int]:
    """People per group: the shares, largest remainders first, so that they sum to `people`."""
    exact = np.array(config.shares) * people
    counts = np.floor(exact).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: people - counts.sum()]:
        counts[index] += 1
    return dict(zip(config.groups, (int(c) for c in counts)))


def simulate(config: GenotypeConfig, people: int, seed: int, sample_ids: list[str]) -> HaplotypePanel:
    """Panel of `people` phased diploids: biallelic SNPs with MAF over all people >= `min_maf`, genetic map, groups.

    Raises:
        UsageError: fewer than 50 sites are left (region too short, or the MAF filter too strict).
    """
    counts = group_counts(config, people)
    rates = recombination_map(config, seed)
    ancestry = msprime.sim_ancestry(
        samples=[msprime.SampleSet(count, population=name, ploidy=2) for name, count in counts.items() if count],
        demography=demography(),
        recombination_rate=rates,
        random_seed=1 + seeding.derived_seed(seed, "cohort.ancestry") % (2**31 - 2),
    )
    mutated = msprime.sim_mutations(
        ancestry,
        rate=mutation_map(config),
        random_seed=1 + seeding.derived_seed(seed, "cohort.mutations") % (2**31 - 2),
    )
    group = np.repeat(np.array(list(counts), dtype=object), list(counts.values()))
    order = seeding.generator(seed, "cohort.order").permutation(people)
    haplotype = (2 * order[:, None] + np.arange(2)).ravel()

    alleles, place, ref, alt = [], [], [], []
    for variant in mutated.variants():
        if len(variant.alleles) != 2:
            continue
        row = variant.genotypes.astype(np.uint8)[haplotype]
        frequency = row.mean()
        if min(frequency, 1 - frequency) >= max(config.min_maf, 1e-12):
            alleles.append(row)
            place.append(int(variant.site.position))
            ref.append(variant.alleles[0])
            alt.append(variant.alleles[1])
    if len(alleles) < 50:
        raise UsageError(
            "at least 50 sites", str(len(alleles)), "embedded genotypes", "a longer region or a lower min_maf"
        )
    position = np.array(place, dtype=np.int64)
    return panel_from_alleles(
        np.stack(alleles),
        position + config.offset_bp + 1,
        config.contig,
        sample_ids,
        id=[f"{config.contig}_{bp + config.offset_bp + 1}" for bp in place],
        ref=ref,
        alt=alt,
        group=group[order],
        position_cm=100 * (rates.get_cumulative_mass(position) - rates.get_cumulative_mass(position[0])),
        contig_length={config.contig: config.contig_length},
        assembly=config.assembly,
    )


def map_lines(panel: HaplotypePanel) -> list[str]:
    """The panel's genetic map as lines `pos chr cM`, one per site, strictly increasing positions."""
    assert panel.sites.position_cm is not None
    rows = zip(panel.sites.position_bp, panel.sites.contig, panel.sites.position_cm)
    return ["pos\tchr\tcM", *(f"{int(bp)}\t{contig}\t{float(cm):.8f}" for bp, contig, cm in rows)]


def dosage(panel: HaplotypePanel, sites: np.ndarray | None = None) -> np.ndarray:
    """ALT allele count (people, sites), int8; of all sites, or of those listed by index."""
    chosen = panel if sites is None else panel.select(sites=np.asarray(sites))
    counts = np.add.reduceat(chosen.alleles_nl().astype(np.int8), chosen.samples.first_haplotype[:-1], axis=0)
    return counts


@dataclass(frozen=True)
class Locus:
    """A causal variant: its name in reports, its site in the panel, and its effect per ALT allele on the log odds of
    AD."""

    name: str
    site: int
    id: str
    position_bp: int
    log_odds: float
    frequency: float
    frequency_by_group: dict[str, float]

    def to_json(self) -> dict[str, object]:
        return dict(self.__dict__)


def choose_loci(panel: HaplotypePanel, disease: DiseaseConfig) -> list[Locus]:
    """The causal variants: locus i is the site in the middle four fifths of the i-th equal stretch of the region whose
    ALT frequency is nearest to the wanted one, among sites with MAF >= 5 % in every group. Deterministic in the panel.

    Raises:
        UsageError: a stretch holds no such site.
    """
    position, group_n = panel.sites.position_bp, panel.group_n
    assert group_n is not None
    alleles_nl = panel.alleles_nl()
    by_group = {str(g): alleles_nl[group_n == g].mean(axis=0) for g in sorted(set(group_n))}
    overall = alleles_nl.mean(axis=0)
    common = np.min([np.minimum(f, 1 - f) for f in by_group.values()], axis=0) >= 0.05
    edges = np.linspace(position[0], position[-1] + 1, len(disease.locus_names) + 1)
    found = []
    for i, name in enumerate(disease.locus_names):
        margin = (
            edges[i + 1] - edges[i]
        ) / 10  # keeps the loci of neighbouring stretches, and the region's ends, apart
        candidates = np.flatnonzero(common & (position >= edges[i] + margin) & (position < edges[i + 1] - margin))
        if not len(candidates):
            raise UsageError(
                "a common variant in every group", "none", f"stretch {i + 1} of the region", "a longer region"
            )
        site = int(candidates[np.argmin(np.abs(overall[candidates] - disease.locus_frequency[i]))])
        found.append(
            Locus(
                name=name,
                site=site,
                id=str(panel.sites.id[site]),
                position_bp=int(position[site]),
                log_odds=disease.locus_log_odds[i],
                frequency=float(overall[site]),
                frequency_by_group={g: float(f[site]) for g, f in by_group.items()},
            )
        )
    return found
