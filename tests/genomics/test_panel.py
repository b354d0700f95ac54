"""The panel: selections against plain arrays, groups and sexes, genetic positions, and every format."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import InputError, UsageError
from engine.genomics.panel import (
    HaplotypePanel,
    panel_from_alleles,
    read_panel,
    read_samples,
    write_panel,
    write_samples,
)
from engine.kernels import bits


def small(missing: bool = True) -> tuple[np.ndarray, HaplotypePanel]:
    rng = np.random.default_rng(3)
    allele_ln = rng.integers(0, 2, (7, 140)).astype(np.uint8)
    if missing:
        allele_ln[2, 4] = allele_ln[2, 5] = 255
    ids = [f"p{k}" for k in range(70)]
    group = ["AFR"] * 30 + ["EUR"] * 40
    panel = panel_from_alleles(
        allele_ln, np.array([5, 15, 25, 35, 2, 12, 22]), np.array(["1"] * 4 + ["2"] * 3), ids, group=group,
        sex=["female"] * 70, contig_length={"1": 100, "2": 90}, assembly="GRCh37",
    )  # fmt: skip
    return allele_ln, panel


def test_the_panel_is_its_alleles():
    allele_ln, panel = small()
    assert (panel.n_sites, panel.n_haplotypes, panel.n_samples) == (7, 140, 70)
    np.testing.assert_array_equal(panel.alleles_nl(), allele_ln.T)
    np.testing.assert_array_equal(panel.haplotype_major(), bits.pack((allele_ln == 1).T.copy()))
    assert panel.sample_of_haplotype_n.tolist() == [k // 2 for k in range(140)]
    assert panel.group_n.tolist() == ["AFR"] * 60 + ["EUR"] * 80
    assert {name: (index[0], len(index)) for name, index in panel.groups().items()} == {"AFR": (0, 60), "EUR": (60, 80)}


@pytest.mark.parametrize("sites", [None, slice(1, 5), [6, 0, -2], [False, True] * 3 + [True]])
@pytest.mark.parametrize("samples", [None, slice(3, 50, 2), [69, 0, 5], ["p5", "p1"], [k % 3 == 0 for k in range(70)]])
def test_selections_are_those_of_plain_arrays(sites, samples):
    allele_ln, panel = small()
    made = panel.select(sites, samples)
    at = np.arange(7)[np.asarray(sites) if isinstance(sites, list) else sites or slice(None)]
    if samples == ["p5", "p1"]:
        people = np.array([5, 1])
    else:
        people = np.arange(70)[np.asarray(samples) if isinstance(samples, list) else samples or slice(None)]
    haplotypes = (people[:, None] * 2 + [0, 1]).ravel()
    np.testing.assert_array_equal(made.alleles_nl(), allele_ln[np.ix_(at, haplotypes)].T)
    assert made.sites.position_bp.tolist() == panel.sites.position_bp[at].tolist()
    assert made.samples.ids == [f"p{k}" for k in people]
    assert made.samples.group.tolist() == panel.samples.group[people].tolist()
    assert made.n_haplotypes == 2 * len(people)


def test_selecting_a_stretch_of_sites_copies_nothing():
    _, panel = small(missing=False)
    assert np.shares_memory(panel.select(sites=slice(2, 4)).bits_lw, panel.bits_lw)


def test_haploid_samples_in_selections():
    allele_ln = np.array([[0, 1, 1, 0, 1]], dtype=np.uint8)
    panel = panel_from_alleles(allele_ln, np.array([5]), "X", ["m", "f", "g"], first_haplotype=np.array([0, 1, 3, 5]))
    made = panel.select(samples=["g", "m"])
    assert made.alleles_nl().ravel().tolist() == [0, 1, 0]
    assert made.samples.first_haplotype.tolist() == [0, 2, 3]


def test_wrong_selections_and_shapes_are_refused():
    _, panel = small()
    for selection in ({"sites": [7]}, {"sites": [True]}, {"samples": ["zz"]}, {"samples": [-71]}):
        with pytest.raises(UsageError):
            panel.select(**selection)
    with pytest.raises(UsageError, match="one or two haplotypes"):
        panel_from_alleles(np.zeros((1, 3), np.uint8), np.array([1]), "1", ["a", "b"])
    with pytest.raises(InputError, match="ascending"):
        panel_from_alleles(np.zeros((2, 2), np.uint8), np.array([2, 1]), "1", ["a"])


@pytest.mark.parametrize("suffix", [".bcf", ".vcf.gz", ".pgen"])
def test_every_format_gives_the_panel_back(tmp_path, suffix):
    _, panel = small()
    path, table = tmp_path / f"x{suffix}", tmp_path / "s.tsv"
    write_panel(panel, path, header_lines=["##engine=SYNTHETIC"])
    write_samples(panel, table)
    back = read_panel(path, samples_tsv=table)
    np.testing.assert_array_equal(back.alleles_nl(), panel.alleles_nl())
    assert back.samples.ids == panel.samples.ids
    assert back.samples.group.tolist() == panel.samples.group.tolist()
    assert back.samples.sex.tolist() == panel.samples.sex.tolist()
    assert back.sites.contig.tolist() == panel.sites.contig.tolist()
    assert (back.contig_length, back.assembly, back.phased) == (panel.contig_length, "GRCh37", True)
    part = read_panel(path, region="2:3-20")
    np.testing.assert_array_equal(part.alleles_nl(), panel.alleles_nl()[:, 5:6])


def test_paths_that_cannot_be(tmp_path):
    _, panel = small()
    with pytest.raises(UsageError, match=r"\.bcf"):
        write_panel(panel, tmp_path / "x.txt")
    with pytest.raises(InputError, match="no such file"):
        read_panel(tmp_path / "none.bcf")
    write_panel(panel.select(sites=slice(0, 0)), tmp_path / "empty.bcf")
    with pytest.raises(InputError, match="at least one site"):
        read_panel(tmp_path / "empty.bcf")


def test_samples_tables(tmp_path):
    path = tmp_path / "s.tsv"
    path.write_text("sample\tpop\tsuper_pop\tgender\t\t\nb\tGBR\tEUR\tmale\na\tYRI\tAFR\tF\nz\tYRI\tAFR\t2\n")
    group, sex = read_samples(path, ["a", "b"])
    assert (group.tolist(), sex.tolist()) == (["YRI", "GBR"], ["female", "male"])
    path.write_text("id\tgroup\tpop\na\tG1\tP\nb\tG2\tP\n")
    group, sex = read_samples(path, ["b", "a"])
    assert group.tolist() == ["G2", "G1"]
    assert sex is None
    for text, why in [
        ("id\tgroup\na\tG\n", "no row for 'b'"),
        ("id\tx\na\tG\nb\tG\n", "a column 'group'"),
        ("id\tgroup\na\tG\nb\t\n", "none for 'b'"),
        ("id\tgroup\na\tG\nb\tG\na\tH\n", "line 4.*'a' again"),
        ("", "header"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=why):
            read_samples(path, ["a", "b"])


def test_genetic_positions_restart_on_each_contig(tmp_path):
    _, panel = small()
    write_panel(panel, tmp_path / "x.bcf")
    for contig in "12":
        (tmp_path / f"{contig}.gmap").write_text(f"pos chr cM\n1 {contig} 0\n101 {contig} {contig}\n")
    maps = [tmp_path / "1.gmap", tmp_path / "2.gmap"]
    with pytest.raises(InputError, match="within 1's 100 bp"):
        read_panel(tmp_path / "x.bcf", map=maps)
    for contig in "12":
        (tmp_path / f"{contig}.gmap").write_text(f"pos chr cM\n1 chr{contig} 0\n51 chr{contig} {contig}\n")
    made = read_panel(tmp_path / "x.bcf", map=maps)
    expected = [(p - 1) / 50 for p in (5, 15, 25, 35)] + [(p - 1) / 50 * 2 for p in (2, 12, 22)]
    np.testing.assert_allclose(made.sites.position_cm, expected)
    np.testing.assert_allclose(made.select(sites=[6]).sites.position_cm, expected[6:])
    with pytest.raises(InputError, match="contig '2'"):
        read_panel(tmp_path / "x.bcf", map=maps[0])


def test_real_panel_with_map_and_groups(real_data):
    folder = real_data / "genomics"
    made = read_panel(
        folder / "chr15_10k" / "train.bcf",
        map=folder / "maps" / "b37" / "chr15.b37.gmap.gz",
        samples_tsv=folder / "chr15_10k" / "samples.tsv",
    )
    assert (made.n_haplotypes, made.n_sites, made.phased, made.missing_lw) == (4006, 10_000, True, None)
    assert sorted(made.groups()) == ["AFR", "EUR", "OTH"]
    assert (np.diff(made.sites.position_cm) >= 0).all()
    with pytest.raises(InputError, match="GRCh37 and GRCh38 differ"):
        read_panel(folder / "chr15_10k" / "train.bcf", map=folder / "maps" / "b38" / "chr15.b38.gmap.gz")
