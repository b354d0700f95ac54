"""Planted relatives: gametes by hand, kinship as expected of each degree; an audit whose kinship is blind has no verdict."""

from __future__ import annotations

import numpy as np
import pytest

from engine.audit import AuditPolicy, audit
from engine.genomics import audit_judges
from engine.genomics.audit_controls import gamete, relatives
from engine.genomics.audit_judges import genotype_judges
from engine.genomics.panel import panel_from_alleles
from engine.genomics.pools import check_sides, haplotype_pool
from engine.genomics.relatedness import Resolution, genotypes_of_haplotypes, kinship, resolution

FAST = AuditPolicy(control_rows=60, contamination_repeats=2, subsets=2, aats_rows=150, honest_repeats=0)


def panel_of(rng, people, tag, per_contig=150, groups=False):
    """Unlinked common sites over 22 contigs; with groups, of frequencies of their own."""
    sites = 22 * per_contig
    frequency = np.random.default_rng(5).uniform(0.2, 0.8, (2, sites))
    group = rng.integers(0, 2, people) if groups else np.zeros(people, dtype=int)
    alleles = rng.random((2 * people, sites)) < np.repeat(frequency[group], 2, axis=0)
    contig = np.repeat([str(k + 1) for k in range(22)], per_contig)
    return panel_from_alleles(
        alleles.T.astype(np.uint8), np.tile(np.arange(per_contig) * 600_000 + 1, 22), contig,
        [f"{tag}{k}" for k in range(people)], group=[f"g{g}" for g in group] if groups else None,
    )  # fmt: skip


def test_a_gamete_crosses_over_once_a_morgan_and_starts_each_contig_by_chance():
    rng = np.random.default_rng(0)
    panel = panel_of(rng, 3, "t")  # 22 contigs of 0.89 Morgan at 1 cM a megabase
    parent = np.array([np.zeros(panel.n_sites), np.ones(panel.n_sites)], dtype=np.uint8)
    first, crossings = [], []
    for _ in range(200):
        alleles_l, from_l = gamete(parent, panel.sites, rng)
        assert (alleles_l == from_l).all()  # the second haplotype is all ones
        of_contig = from_l.reshape(22, -1)
        first.append(of_contig[:, 0])
        crossings.append((of_contig[:, 1:] != of_contig[:, :-1]).sum())
    assert np.mean(first) == pytest.approx(0.5, abs=0.03)  # 4,400 draws: 4 standard errors
    expected = 22 * 149 * (1 - np.exp(-2 * 0.006)) / 2  # Haldane: odd numbers of crossovers between neighbours
    assert np.mean(crossings) == pytest.approx(expected, rel=0.07)


@pytest.fixture(scope="module", params=[False, True], ids=["one group", "two groups"])
def sides(request):
    rng = np.random.default_rng(1)
    return panel_of(rng, 80, "t", groups=request.param), panel_of(rng, 60, "h", groups=request.param)


def test_relatives_have_the_kinship_of_their_degree(sides):
    train, holdout = sides
    pool, unseen, resolved = haplotype_pool(train), haplotype_pool(holdout), resolution(train)
    made = relatives(train, pool, unseen, resolved, seed=3)
    assert {name: control.gate for name, control in made.items()} == {
        "twins": "kinship_above_0.354", "children": "kinship_above_0.177", "grandchildren": "kinship_above_0.0884",
    }  # fmt: skip
    everywhere = np.arange(train.n_sites)
    known = genotypes_of_haplotypes(pool.data, train.n_sites, everywhere)
    for name, expected in (("twins", 0.5), ("children", 0.25), ("grandchildren", 0.125)):
        rows = made[name].pool
        assert rows.people == 26
        assert len(rows) == 52
        kin_sp = kinship(genotypes_of_haplotypes(rows.data, train.n_sites, everywhere), known)
        largest = kin_sp.max(axis=1)
        assert np.median(largest) == pytest.approx(expected, abs=0.04), name
        if name == "children":  # both parents are there
            assert np.median(np.sort(kin_sp, axis=1)[:, -2]) == pytest.approx(0.25, abs=0.04)
    again = relatives(train, pool, unseen, resolved, seed=3)
    assert (again["children"].pool.data == made["children"].pool.data).all()
    assert not (
        relatives(train, pool, unseen, resolved, seed=4)["children"].pool.data == made["children"].pool.data
    ).all()


def test_only_degrees_that_the_sites_can_tell_are_planted(sides):
    train, holdout = sides
    short = train.select(sites=slice(0, 5 * 150))  # 45 stretches of 10 Mb, 750 sites
    resolved = resolution(short)
    unseen = haplotype_pool(holdout.select(sites=slice(0, 5 * 150)))
    made = relatives(short, haplotype_pool(short), unseen, resolved)
    judged = {f"kinship_above_{t:g}" for t in (0.354, 0.177, 0.0884) if resolved.limit(t, 80 * 86) is not None}
    assert {control.gate for control in made.values()} == judged
    assert 0 < len(judged) < 3
    nothing = Resolution(np.zeros(0, dtype=np.int64), np.inf, 0, 1.0)
    assert relatives(train, haplotype_pool(train), haplotype_pool(holdout), nothing) == {}


def test_an_audit_whose_kinship_judge_is_blind_has_no_verdict(monkeypatch):
    rng = np.random.default_rng(2)
    train, holdout, fresh = (panel_of(rng, n, tag, 60) for n, tag in ((60, "t"), (48, "h"), (30, "s")))
    resolved, noted = check_sides(train, holdout)
    pools = [haplotype_pool(panel) for panel in (train, holdout, fresh)]
    controls = relatives(train, pools[0], pools[1], resolved)
    assert "children" in controls

    def judged():
        judges = genotype_judges(pools[0], pools[1], train.sites.contig, resolved, noted, policy=FAST)
        return audit(*pools, policy=FAST, judges=judges, controls=controls)

    seeing = judged()
    assert seeing.verdict == "pass", seeing.reasons
    assert {c.name: c.verdict for c in seeing.controls if c.gate} == dict.fromkeys(controls, "fail")
    monkeypatch.setattr(audit_judges, "largest_kinship", lambda one, other: np.zeros(len(one)))
    blind = judged()
    assert blind.verdict == "void"
    assert any("'children' should have been judged 'fail' by kinship_above_0.177" in text for text in blind.reasons)
