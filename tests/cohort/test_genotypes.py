from __future__ import annotations

import numpy as np
import pytest

from engine.cohort import genotypes
from engine.cohort.config import DiseaseConfig, GenotypeConfig
from engine.cohort.truth import hudson_fst
from engine.errors import UsageError
from engine.genomics.panel import HaplotypePanel

CONFIG = GenotypeConfig(windows=1, window_bp=300_000)
IDS = [f"P{k}" for k in range(90)]


@pytest.fixture(scope="module")
def panel() -> HaplotypePanel:
    return genotypes.simulate(CONFIG, 90, 11, IDS)


def test_same_seed_same_panel_other_seed_another(panel: HaplotypePanel) -> None:
    again = genotypes.simulate(CONFIG, 90, 11, IDS)
    assert np.array_equal(panel.bits_lw, again.bits_lw)
    assert np.array_equal(panel.sites.position_cm, again.sites.position_cm)
    other = genotypes.simulate(CONFIG, 90, 12, IDS)
    assert not np.array_equal(panel.sites.position_bp[:50], other.sites.position_bp[:50])


def test_sites_are_common_biallelic_snps_inside_the_region(panel: HaplotypePanel) -> None:
    frequency = panel.alleles_nl().mean(axis=0)
    assert np.minimum(frequency, 1 - frequency).min() >= CONFIG.min_maf
    place = panel.sites.position_bp
    assert np.all(np.diff(place) > 0)
    assert place[0] > CONFIG.offset_bp
    assert place[-1] <= CONFIG.offset_bp + CONFIG.length_bp
    assert {len(a) for a in (*panel.sites.ref, *panel.sites.alt)} == {1}
    assert not np.any(panel.sites.ref == panel.sites.alt)


def test_dosage_counts_the_two_haplotypes_of_each_person(panel: HaplotypePanel) -> None:
    alleles = panel.alleles_nl()
    assert np.array_equal(genotypes.dosage(panel), alleles[0::2] + alleles[1::2])
    assert np.array_equal(genotypes.dosage(panel, np.array([7, 3])), genotypes.dosage(panel)[:, [7, 3]])


def test_groups_differ_as_continents_do(panel: HaplotypePanel) -> None:
    group = panel.samples.group
    assert group is not None
    assert [int((group == g).sum()) for g in ("AFR", "EUR", "EAS")] == [27, 36, 27]
    assert len(set(group[:12])) > 1  # shuffled
    counts = genotypes.dosage(panel)
    fst = hudson_fst(counts[group == "AFR"], counts[group == "EUR"])
    assert 0.03 < fst < 0.3
    assert abs(hudson_fst(counts[group == "AFR"][::2], counts[group == "AFR"][1::2])) < 0.02
    variety = {g: counts[group == g].mean(axis=0) / 2 for g in ("AFR", "EUR")}
    heterozygosity = {g: (2 * p * (1 - p)).mean() for g, p in variety.items()}
    assert heterozygosity["AFR"] > heterozygosity["EUR"]  # the bottleneck out of Africa


def test_recombination_map_has_hotspots_and_a_human_mean() -> None:
    rates = [genotypes.recombination_map(GenotypeConfig(), seed) for seed in range(8)]
    mean = np.mean([r.mean_rate for r in rates])
    assert 0.7e-8 < mean < 2e-8
    hot = np.concatenate([r.rate for r in rates])
    assert (hot > 10 * GenotypeConfig().recombination_rate).sum() > 8 * 8


def test_causal_loci_are_common_in_every_group_and_apart(panel: HaplotypePanel) -> None:
    loci = genotypes.choose_loci(panel, DiseaseConfig())
    assert [x.log_odds for x in loci] == list(DiseaseConfig().locus_log_odds)
    for locus in loci:
        assert all(0.05 <= f <= 0.95 for f in locus.frequency_by_group.values())
        assert panel.sites.position_bp[locus.site] == locus.position_bp
    assert np.diff([x.position_bp for x in loci]).min() > 0.05 * CONFIG.length_bp


def test_too_short_a_region_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 50 sites"):
        genotypes.simulate(GenotypeConfig(windows=1, window_bp=50_000, min_maf=0.49), 6, 1, IDS[:6])


def test_demography_is_the_published_one() -> None:
    """Sizes of Gutenkunst et al. 2009, Table 1, at times that lie inside each epoch; growth ends at 29,725 and 54,090."""
    model = genotypes.demography()
    names = [p.name for p in model.populations]
    size = model.debug().population_size_trajectory([0, 847, 3000, 7000, 12_000])
    at = {name: size[:, i] for i, name in enumerate(names)}
    assert at["EUR"][0] == pytest.approx(29_725, rel=0.01)
    assert at["EAS"][0] == pytest.approx(54_090, rel=0.01)
    assert at["EUR"][1] == pytest.approx(1_000, rel=0.01)
    assert at["EAS"][1] == pytest.approx(510, rel=0.01)
    assert at["OOA"][2] == 2_100
    assert at["AMH"][3] == 12_300
    assert at["ANC"][4] == 7_300


def test_sites_lie_in_windows_that_are_nearly_unlinked() -> None:
    config = GenotypeConfig(windows=3, window_bp=60_000, gap_bp=4_000_000)
    panel = genotypes.simulate(config, 60, 5, [f"p{i}" for i in range(60)])
    place = panel.sites.position_bp - config.offset_bp - 1
    window = np.full(len(place), -1)
    for i, first in enumerate(config.window_starts):
        window[(place >= first) & (place < first + config.window_bp)] = i
    assert set(window) == {0, 1, 2}
    alleles = panel.alleles_nl().astype(float)
    r2 = np.corrcoef(alleles.T) ** 2
    across = r2[np.ix_(window == 0, window == 2)].mean()
    within = r2[np.ix_(window == 0, window == 0)].mean()
    assert across < 0.5 * within
    cm = panel.sites.position_cm
    assert cm is not None
    step = cm[window == 1][0] - cm[window == 0][-1]
    assert abs(step - 4.0) < 0.2
