"""Counts of two institutions give the model of their union; what differs is refused, and rare alleles stay."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import EngineError, InputError
from engine.genomics.baselines import fit_markov
from engine.genomics.federated import PanelSite, chain_of, list_digest
from engine.genomics.panel import HaplotypePanel, panel_from_alleles
from engine.training.federated import outgoing, total


def panel(people: int = 60, sites: int = 150, seed: int = 0, groups: bool = True, shift: int = 0) -> HaplotypePanel:
    rng = np.random.default_rng(seed)
    donors = (rng.random((12, sites)) < 0.35).astype(np.uint8)
    alleles = donors[np.repeat(rng.integers(0, 12, (2 * people, sites // 10)), 10, axis=1), np.arange(sites)]
    contig = ["21"] * (sites // 2) + ["22"] * (sites - sites // 2)
    position = np.concatenate([np.arange(sites // 2), np.arange(sites - sites // 2)]) * 1000 + 500 + shift
    named = ["A"] * (people // 2) + ["B"] * (people - people // 2) if groups else None
    return panel_from_alleles(alleles.T, position, contig, [f"p{k}" for k in range(people)], group=named)


def shards(whole: HaplotypePanel, **options) -> list[PanelSite]:
    even, odd = np.arange(0, whole.n_samples, 2), np.arange(1, whole.n_samples, 2)
    return [
        PanelSite(whole.select(samples=own), whole.select(samples=other), **options)
        for own, other in ((even, odd), (odd, even))
    ]


@pytest.mark.parametrize("groups", [("A", "B"), ("all",)])
def test_sums_of_two_institutions_give_the_chain_of_their_union(groups) -> None:
    whole = panel()
    sites = shards(whole, groups=groups, least_count=1)
    declared = sites[0].stats_declared()
    summed = total({str(k): outgoing(site.local_stats(), declared) for k, site in enumerate(sites)}, declared)
    for site in sites:
        site.set_stats(summed.tensors)
    central = fit_markov(whole, per_group=len(groups) > 1)
    for site in sites:
        np.testing.assert_allclose(site.chain().p_glv, central.p_glv, rtol=1e-12)
        np.testing.assert_allclose(site.chain().share_g, central.share_g)
        assert site.evaluate()["mean_nats"] == pytest.approx(central.log_likelihood(site.holdout).mean())
        site.set_state(site.fit(0))
    states = [site.get_state() for site in sites]
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_a_count_of_one_or_two_people_stays(tmp_path) -> None:
    whole = panel()
    exact, kept = (PanelSite(whole, groups=["A", "B"], least_count=k).local_stats() for k in (1, 3))
    name = f"pairs.{list_digest(whole.sites, ['A', 'B'])}"
    rare = (exact[name] > 0) & (exact[name] < 3)
    assert rare.sum() > 0, "there is something to keep"
    assert (kept[name][rare] == 0).all()
    assert np.array_equal(kept[name][~rare], exact[name][~rare])


def test_another_list_of_variants_is_refused_and_not_summed() -> None:
    whole, other = panel(), panel(shift=1)
    sites = [*shards(whole), PanelSite(other)]
    declared = sites[0].stats_declared()
    replies = {str(k): site.local_stats() for k, site in enumerate(sites)}
    summed = total(replies, declared)
    assert summed.used == ["0", "1"]
    assert "2 declared arrays missing" in summed.refused["2"]
    with pytest.raises(EngineError, match="at least 3"):
        total(replies, declared, least_sites=3)


def test_what_a_site_cannot_give_is_refused() -> None:
    with pytest.raises(InputError, match="at least 20 people"):
        PanelSite(panel(people=10))
    with pytest.raises(InputError, match="1 other group"):
        PanelSite(panel(), groups=["A"])
    with pytest.raises(InputError, match="variants of the training panel"):
        PanelSite(panel(), panel(shift=3))
    site = PanelSite(panel())
    site.set_stats(site.local_stats())
    with pytest.raises(InputError, match="another"):
        site.set_state({**site.get_state(), "p": np.full_like(site.get_state()["p"], 0.5)})


def test_only_counts_leave_and_nobody_is_named() -> None:
    """No array is as long as the number of people, none holds an id, and one person moves counts by two at most."""
    whole = panel()
    stats = PanelSite(whole).local_stats()
    assert all(whole.n_samples not in array.shape and whole.n_haplotypes not in array.shape for array in stats.values())
    assert all(array.dtype == np.float64 for array in stats.values())
    less = PanelSite(whole.select(samples=np.arange(1, whole.n_samples)), least_count=1).local_stats()
    more = PanelSite(whole, least_count=1).local_stats()
    assert max(np.abs(more[name] - less[name]).max() for name in more) == 2
    made = chain_of(stats, whole, ["all"]).sample(5, seed=1)
    assert all(name.startswith("SYN") for name in made.samples.ids)
