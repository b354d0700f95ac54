"""Panels as pools, and the checks before an audit: people and families on both sides are refused by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.audit import audit
from engine.audit.policy import AuditPolicy
from engine.errors import InputError
from engine.genomics.panel import panel_from_alleles, write_panel
from engine.genomics.pools import audit_pools, check_sides, haplotype_pool

FAST = AuditPolicy(control_rows=60, contamination_repeats=10, subsets=2, aats_rows=150, honest_repeats=0)


@pytest.fixture(scope="module")
def genome():
    """60 unrelated people at 3,300 unlinked common sites over 22 contigs, and the parts panels are made of."""
    rng = np.random.default_rng(1)
    alleles = (rng.random((3300, 120)) < rng.uniform(0.2, 0.8, (3300, 1))).astype(np.uint8)
    contig, position = np.repeat([str(k + 1) for k in range(22)], 150), np.tile(np.arange(150) * 600_000 + 1, 22)
    return rng, alleles, contig, position


def panel(genome, alleles, tag):
    return panel_from_alleles(alleles, genome[3], genome[2], [f"{tag}{k}" for k in range(alleles.shape[1] // 2)])


def gamete(rng, alleles, person):
    return np.where(rng.random(len(alleles)) < 0.5, alleles[:, 2 * person], alleles[:, 2 * person + 1])


def test_unrelated_sides_are_described(genome):
    _, alleles, *_ = genome
    twin = alleles[:, :80].copy()
    twin[:, 6:8] = twin[:, 2:4]
    resolved, noted = check_sides(panel(genome, twin, "t"), panel(genome, alleles[:, 80:], "h"))
    assert resolved.stretches == 22 * 9
    found = {f.name: f for f in noted}
    assert found["relatives_across_sides"].value == 0
    assert found["relatives_across_sides"].n == {"pairs": 800}
    assert found["duplicates_within_training"].value == 1
    assert found["duplicates_within_holdout"].value == 0
    assert found["relatives_within_training"].value == 1
    assert {f.verdict for f in noted} == {"none"}
    assert not any("t1" in f.note or "t3" in f.note for f in noted)  # nobody is named in what may be written down


def test_one_person_under_two_ids_is_refused(genome):
    rng, alleles, *_ = genome
    holdout = alleles[:, 80:].copy()
    holdout[:, 4:6] = alleles[:, [11, 10]] ^ (rng.random((3300, 2)) < 0.002)  # phase lost, some errors
    with pytest.raises(InputError, match=r"file\.bcf: .*1 \(t5 = h2\)"):
        check_sides(panel(genome, alleles[:, :80], "t"), panel(genome, holdout, "h"), "file.bcf")


def test_families_on_both_sides_are_refused(genome):
    rng, alleles, *_ = genome
    holdout = alleles[:, 80:].copy()
    for child, parent in ((0, 7), (3, 9)):
        holdout[:, 2 * child] = gamete(rng, alleles, parent)
    with pytest.raises(InputError, match=r"relatives.*2 \(t\d ~ h\d \(0\.2\d\d\), t\d ~ h\d .*king-cutoff") as told:
        check_sides(panel(genome, alleles[:, :80], "t"), panel(genome, holdout, "h"))
    assert "t7 ~ h0" in str(told.value)
    assert "t9 ~ h3" in str(told.value)
    many = alleles[:, 80:].copy()
    for child in range(8):
        many[:, 2 * child] = gamete(rng, alleles, child)
    with pytest.raises(InputError, match=r"8 \(t.*, \.\.\.\)") as told:
        check_sides(panel(genome, alleles[:, :80], "t"), panel(genome, many, "h"))
    assert str(told.value).count(" ~ ") == 5
    assert "\n" not in str(told.value)


def test_shared_ids_are_refused(genome):
    _, alleles, *_ = genome
    with pytest.raises(InputError, match=r"1 \(t0\) on both sides"):
        check_sides(panel(genome, alleles[:, :80], "t"), panel(genome, alleles[:, 80:82], "t"))


def test_a_short_region_convicts_nobody():
    """Forty linked sites: many pairs are equal, and none is one person."""
    rng = np.random.default_rng(2)
    block = rng.integers(0, 2, (40, 6)).astype(np.uint8)
    rows = lambda n: block[:, rng.integers(0, 6, n)]  # noqa: E731
    names = lambda tag: [f"{tag}{k}" for k in range(50)]  # noqa: E731
    sides = [panel_from_alleles(rows(100), np.arange(40) * 100 + 1, "7", names(tag)) for tag in "th"]
    resolved, noted = check_sides(*sides)
    assert not resolved.judges_identity(50 * 50)
    assert [f.name for f in noted] == ["relatives_across_sides"]
    assert np.isnan(noted[0].value)
    assert "not judged" in noted[0].note


def test_haploid_panels_are_not_checked_for_kinship():
    rng = np.random.default_rng(3)
    make = lambda tag: panel_from_alleles(  # noqa: E731
        rng.integers(0, 2, (30, 9)).astype(np.uint8), np.arange(30) + 1, "Y", [f"{tag}{k}" for k in range(9)]
    )
    resolved, noted = check_sides(make("t"), make("h"))
    assert len(resolved.site_l) == 0
    assert "diploid" in noted[0].note


@pytest.fixture(scope="module")
def files(tmp_path_factory, genome):
    """Training, holdout and unseen people as files; sites of the holdout in the same order, one site fewer elsewhere."""
    rng = np.random.default_rng(4)
    folder = tmp_path_factory.mktemp("panels")
    frequency = rng.uniform(0.05, 0.5, (400, 1))
    contig, position = np.repeat(["1", "2"], 200), np.tile(np.arange(200) * 5000 + 1, 2)
    for name, people in (("train", 90), ("holdout", 60), ("synthetic", 40)):
        alleles = (rng.random((400, 2 * people)) < frequency).astype(np.uint8)
        ids = [f"{name[0]}{k}" for k in range(people)]
        made = panel_from_alleles(alleles, position, contig, ids, contig_length={"1": 2_000_000, "2": 2_000_000})
        write_panel(made, folder / f"{name}.bcf")
    write_panel(made.select(sites=slice(0, 399)), folder / "short.bcf")
    unphased = replace(made, phased=False)
    write_panel(unphased, folder / "unphased.vcf.gz")
    return folder


def test_pools_of_files_go_through_the_audit(files):
    paths = [files / f"{name}.bcf" for name in ("train", "holdout", "synthetic")]
    pools, controls, judges = audit_pools(*paths, policy=FAST, seed=1)
    assert controls == {}
    assert {name: (len(p), p.people, p.length) for name, p in pools.items()} == {
        "train": (180, 90, 400), "holdout": (120, 60, 400), "synthetic": (80, 40, 400),
    }  # fmt: skip
    assert pools["train"].position_bp is None  # two contigs
    result = audit(pools["train"], pools["holdout"], pools["synthetic"], policy=FAST, seed=1, judges=judges)
    assert result.verdict == "pass", result.reasons
    assert np.isnan(result.finding("relatives_across_sides").value)
    assert result.finding("duplicates_within_training").value == 0
    assert result.finding("kinship_above_0.354").verdict == "none"  # two stretches of 10 Mb
    assert result.finding("membership_auc_copying_model").verdict == "none"
    copied = audit(pools["train"], pools["holdout"], pools["train"].select(np.arange(80)), policy=FAST, judges=judges)
    assert copied.verdict == "fail"


def test_files_that_cannot_be_compared(files):
    with pytest.raises(InputError, match="399 shared"):
        audit_pools(files / "train.bcf", files / "holdout.bcf", files / "short.bcf")
    with pytest.raises(InputError, match=r"unphased\.vcf\.gz: expected phased"):
        audit_pools(files / "train.bcf", files / "holdout.bcf", files / "unphased.vcf.gz")


def test_positions_are_given_for_one_contig(genome):
    _, alleles, *_ = genome
    one = panel(genome, alleles, "t").select(sites=slice(0, 150))
    assert haplotype_pool(one).position_bp is not None
    assert haplotype_pool(panel(genome, alleles, "t")).position_bp is None
