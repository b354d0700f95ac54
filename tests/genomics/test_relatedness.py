"""Kinship against plink2, against brute force and by hand; what sites can resolve; duplicates."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

from engine.errors import InputError
from engine.files.plink import write_pgen
from engine.genomics import relatedness
from engine.genomics.panel import genotypes_from_panel, panel_from_alleles, read_panel
from engine.genomics.relatedness import (
    FIRST_DEGREE,
    SAME_PERSON,
    SECOND_DEGREE,
    close_pairs,
    genotypes_of_haplotypes,
    genotypes_of_panel,
    kinship,
    kinship_tiles,
    largest_kinship,
    related_pairs,
    resolution,
    same_people,
)


def people_of(alleles_ln, position_bp=None, contig="1", ids=None):
    alleles_ln = np.asarray(alleles_ln, dtype=np.uint8)
    position_bp = np.arange(len(alleles_ln)) * 1000 + 1 if position_bp is None else position_bp
    ids = [f"p{k}" for k in range(alleles_ln.shape[1] // 2)] if ids is None else ids
    return panel_from_alleles(alleles_ln, position_bp, contig, ids)


def brute(dosage_s, dosage_t):
    """Kinship of two people, dosages with -1 for missing, from the definition."""
    both = (dosage_s >= 0) & (dosage_t >= 0)
    x, y = dosage_s[both], dosage_t[both]
    fewer = min((x == 1).sum(), (y == 1).sum())
    if fewer == 0:
        return np.nan
    return (
        ((x == 1) & (y == 1)).sum() / (2 * fewer)
        - (abs(x - y) == 2).sum() / fewer
        + 0.5
        - ((x == 1).sum() + (y == 1).sum()) / (4 * fewer)
    )


def dosages(alleles_ln):
    pairs_lsa = alleles_ln.reshape(len(alleles_ln), -1, 2).astype(int)
    return np.where((pairs_lsa == 255).any(axis=2), -1, pairs_lsa.sum(axis=2)).T


def family(rng, sites, unrelated):
    """Alleles (sites, 2 people): two parents, two children of theirs, one half-sibling, a twin of the first child, others."""
    frequency = rng.uniform(0.1, 0.9, sites)
    draw = lambda: (rng.random((sites, 2)) < frequency[:, None]).astype(np.uint8)  # noqa: E731
    gamete = lambda parent: parent[np.arange(sites), rng.integers(0, 2, sites)]  # noqa: E731
    mother, father, other = draw(), draw(), draw()
    children = [np.column_stack([gamete(mother), gamete(father)]) for _ in range(2)]
    half = np.column_stack([gamete(mother), gamete(other)])
    people = [mother, father, *children, half, children[0].copy(), *(draw() for _ in range(unrelated))]
    return np.concatenate(people, axis=1)


def test_by_hand():
    # sites of s: 1 1 1 0 2 0 ; of t: 1 1 0 2 1 1: N(Aa,Aa) = 2, opposite 1, het-hom 1, hom-het 2, fewer hets 3
    s, t = [1, 1, 1, 0, 2, 0], [1, 1, 0, 2, 1, 1]
    alleles = np.array([[a > 0, a > 1, b > 0, b > 1] for a, b in zip(s, t)], dtype=np.uint8)
    assert kinship(genotypes_of_panel(people_of(alleles)))[0, 1] == 0.5 - (4 * 1 + 1 + 2) / (4 * 3)
    nobody = people_of(np.array([[0, 0, 0, 1], [1, 1, 0, 1]]))
    assert np.isnan(kinship(genotypes_of_panel(nobody))[0, 1])
    assert largest_kinship(genotypes_of_panel(nobody.select(samples=[0])), genotypes_of_panel(nobody))[0] == -np.inf


@pytest.mark.parametrize("missing", [0.0, 0.1])
@pytest.mark.parametrize(("sites", "people"), [(1, 2), (63, 31), (64, 32), (65, 33), (200, 67)])
def test_against_brute_force(sites, people, missing):
    rng = np.random.default_rng(sites)
    alleles = (rng.random((sites, 2 * people)) < rng.uniform(0.05, 0.95, (sites, 1))).astype(np.uint8)
    alleles[rng.random(alleles.shape) < missing] = 255
    d = dosages(alleles)
    expected = np.array([[brute(x, y) for y in d] for x in d])
    panel = people_of(alleles)
    whole = genotypes_of_panel(panel)
    np.testing.assert_allclose(kinship(whole), expected, atol=1e-12)
    cut = people // 2
    one, other = (genotypes_of_panel(panel.select(samples=part)) for part in (slice(0, cut), slice(cut, people)))
    np.testing.assert_allclose(kinship(one, other), expected[:cut, cut:], atol=1e-12)
    for tile in kinship_tiles(whole, people=8):  # small tiles, as of a panel larger than memory
        row, column, values = tile
        assert column >= row
        np.testing.assert_allclose(values, expected[row : row + 8, column : column + 8], atol=1e-12)
    if not missing:
        some = np.sort(rng.choice(sites, max(1, sites // 2), replace=False))
        rows = genotypes_of_haplotypes(panel.haplotype_major(), sites, some)
        np.testing.assert_array_equal(kinship(rows), kinship(genotypes_of_panel(panel, some)))


def test_planes_may_be_memory_maps(tmp_path):
    panel = people_of(family(np.random.default_rng(1), 300, 40))
    whole = genotypes_of_panel(panel)
    maps = []
    for name in ("het_sw", "hom_sw", "zero_sw"):
        np.save(tmp_path / f"{name}.npy", getattr(whole, name))
        maps.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    mapped = relatedness.Genotypes(*maps, whole.sites, whole.complete)
    np.testing.assert_array_equal(kinship(mapped, whole), kinship(whole, whole))


def test_degrees_of_a_family():
    panel = people_of(family(np.random.default_rng(2), 20_000, 30))
    found = related_pairs(panel)
    kin = {(i, j): k for i, j, k in zip(found.first_p.tolist(), found.second_p.tolist(), found.kinship_p.tolist())}
    assert kin[2, 5] == 0.5  # twins
    first = {(0, 2), (0, 3), (0, 4), (0, 5), (1, 2), (1, 3), (1, 5), (2, 3), (3, 5)}
    second = {(2, 4), (3, 4), (4, 5)}
    assert set(kin) == {(2, 5)} | first | second
    assert all(FIRST_DEGREE < kin[pair] < SAME_PERSON for pair in first)
    assert all(SECOND_DEGREE < kin[pair] < FIRST_DEGREE for pair in second)
    assert found.kinship_p.tolist() == sorted(found.kinship_p, reverse=True)
    between = related_pairs(panel.select(samples=[2, 10]), panel.select(samples=[11, 4, 5]), FIRST_DEGREE)
    assert list(zip(between.first_p.tolist(), between.second_p.tolist())) == [(0, 2)]


@pytest.mark.parametrize("missing", [0.0, 0.05])
def test_equal_to_plink2(tmp_path, missing):
    if shutil.which("plink2") is None:
        pytest.skip("no plink2 here")
    rng = np.random.default_rng(3)
    alleles = family(rng, 1500, 60)
    lost = np.repeat(rng.random((1500, 66)) < missing, 2, axis=1)
    alleles[lost] = 255
    panel = people_of(alleles)
    write_pgen(tmp_path / "x.pgen", genotypes_from_panel(panel))
    done = subprocess.run(
        ["plink2", "--pfile", "x", "--make-king-table", "cols=id,kinship", "--out", "o", "--threads", "1"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in (tmp_path / "o.kin0").read_text().splitlines()[1:]]
    ours = kinship(genotypes_of_panel(panel))
    assert len(lines) == 66 * 65 // 2
    for first, second, value in lines:
        assert ours[int(first[1:]), int(second[1:])] == pytest.approx(float(value), abs=1e-6, rel=2e-5)


def test_what_the_sites_resolve():
    rng = np.random.default_rng(4)
    chance = lambda sites, people: (rng.random((sites, 2 * people)) < 0.5).astype(np.uint8)  # noqa: E731
    # 3,000 independent common sites over 22 contigs of 100 Mb
    contig = np.repeat([str(k + 1) for k in range(22)], 136)[:2992]
    position = np.tile(np.arange(136) * 700_000 + 1, 22)
    wide = panel_from_alleles(chance(2992, 150), position, contig, [f"p{k}" for k in range(150)])
    told = resolution(wide)
    assert len(told.site_l) > 2900
    assert told.stretches == 22 * 10
    off = kinship(genotypes_of_panel(wide, told.site_l))[np.triu_indices(150, 1)]
    assert told.error == pytest.approx(off.std(), rel=0.1)  # the deviation of unrelated people, as predicted
    assert abs(off.max()) < SECOND_DEGREE
    assert told.limit(SECOND_DEGREE, 150 * 150) == SECOND_DEGREE
    assert told.limit(0.01, 150 * 150) is None
    fewer = resolution(wide.select(sites=slice(0, None, 2)))  # at half as many sites a little more is asked of a pair
    assert SECOND_DEGREE < fewer.limit(SECOND_DEGREE, 150 * 150) < 0.125
    assert fewer.limit(FIRST_DEGREE, 150 * 150) == FIRST_DEGREE
    assert resolution(wide.select(sites=slice(0, None, 8))).limit(SECOND_DEGREE, 150 * 150) is None
    assert told.judges_identity(10**12)
    # as many sites within 2 Mb: nothing is known of families
    near = panel_from_alleles(chance(3000, 150), np.arange(3000) * 600 + 1, "1", [f"p{k}" for k in range(150)])
    told = resolution(near)
    assert told.stretches == 1
    assert told.limit(SAME_PERSON, 100) is None
    # one site seen 400 times is one site
    block = panel_from_alleles(np.repeat(chance(1, 150), 400, axis=0), np.arange(400) * 100 + 1, "1", near.samples.ids)
    told = resolution(block)
    assert len(told.site_l) == 1
    assert not told.judges_identity(100)
    # X is inherited otherwise
    assert len(resolution(panel_from_alleles(chance(50, 150), np.arange(50) + 1, "chrX", near.samples.ids)).site_l) == 0


def test_one_person_under_two_ids():
    rng = np.random.default_rng(5)
    alleles = family(rng, 2000, 40)
    alleles[:, [10, 11]] = alleles[:, [11, 10]]  # phase does not matter
    alleles[7:17, 10] ^= 1  # genotyping errs at ten sites
    panel = people_of(alleles)
    whole = genotypes_of_panel(panel)
    assert same_people(whole)[0] == [(2, 5)]
    pairs, allowed = same_people(whole, genotypes_of_panel(panel.select(samples=[7, 20, 0])))
    assert sorted(pairs) == [(0, 2), (7, 0), (20, 1)]
    assert 10 <= allowed < 100
    alleles[:, 10] ^= (rng.random(2000) < 0.2).astype(np.uint8)  # a brother, not a twin
    assert same_people(genotypes_of_panel(people_of(alleles)))[0] == []
    lost = alleles.copy()
    lost[rng.random(lost.shape) < 0.02] = 255
    assert same_people(genotypes_of_panel(people_of(lost)), genotypes_of_panel(people_of(alleles[:, :2])))[0] == [
        (0, 0)
    ]
    assert same_people(genotypes_of_panel(people_of(alleles[:, :2]))) == ([], 0)


def test_haploid_people_are_refused():
    panel = panel_from_alleles(np.zeros((4, 3), np.uint8), np.arange(4) + 1, "1", ["a", "b", "c"])
    with pytest.raises(InputError, match="diploid"):
        related_pairs(panel)
    with pytest.raises(InputError, match="same sites"):
        related_pairs(people_of(np.zeros((4, 4))), people_of(np.zeros((5, 4))))


def test_real_people_are_no_relatives_and_one_region_says_nothing(real_data):
    region = read_panel(real_data / "genomics" / "chr15_10k" / "train.bcf").select(samples=slice(0, 300))
    told = resolution(region)
    assert told.stretches == 1
    assert told.limit(SAME_PERSON, 300 * 299 // 2) is None  # 2.25 Mb
    assert (
        len(close_pairs(genotypes_of_panel(region, told.site_l), None, SECOND_DEGREE)) > 0
    )  # and it would have convicted
