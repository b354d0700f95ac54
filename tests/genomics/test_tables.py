"""LD of a panel as files, against the kernels and the definitions, over contigs, missing alleles and unphased genotypes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.errors import InputError, UsageError
from engine.genomics import tables
from engine.genomics.panel import panel_from_alleles, write_panel
from engine.kernels import ld

_PEOPLE, _SITES = 60, 90


def alleles(missing=0.0, seed=0):
    """uint8 (L, N): founders copied in stretches, 255 where missing; the last 30 sites are those of a second contig."""
    rng = np.random.default_rng(seed)
    founders = rng.random((_SITES, 8)) < rng.beta(0.8, 1.5, (_SITES, 1))
    made = founders[:, rng.integers(0, 8, 2 * _PEOPLE)] ^ (rng.random((_SITES, 2 * _PEOPLE)) < 0.03)
    made = made.astype(np.uint8)
    made[7] = 0
    made[rng.random(made.shape) < missing] = 255
    return made


def panel_file(folder: Path, *, missing=0.0, phased=True, name="panel.bcf"):
    position = np.concatenate([1000 + 400 * np.arange(60), 500 + 300 * np.arange(30)])
    panel = panel_from_alleles(
        alleles(missing), position, np.array(["1"] * 60 + ["2"] * 30), [f"p{k}" for k in range(_PEOPLE)],
        id=[f"s{k}" for k in range(_SITES)], phased=phased, contig_length={"1": 10**6, "2": 10**6},
    )  # fmt: skip
    write_panel(panel, folder / name)
    return folder / name, panel


def rows(path):
    header, *body = (line.split("\t") for line in path.read_text().splitlines())
    return [dict(zip(header, row, strict=True)) for row in body]


@pytest.mark.parametrize("unphased", [False, True])
@pytest.mark.parametrize("missing", [0.0, 0.05])
@pytest.mark.parametrize("block", [4096, 8])
def test_pairs_are_those_of_the_matrix(tmp_path, monkeypatch, unphased, missing, block):
    monkeypatch.setattr(tables, "_BLOCK", block)
    path, panel = panel_file(tmp_path, missing=missing)
    window = tables.Window(bp=6000, sites=9)
    for measure in ("r2", "r"):
        said = tables.ld_table(
            path, tmp_path / f"{measure}.tsv", min_r2=0.3, window=window, measure=measure, unphased=unphased
        )
        options = {"missing_lw": panel.missing_lw, "unphased": unphased, "measure": measure}
        cells = ld.matrix(panel.bits_lw, panel.n_haplotypes, **options)
        wanted = []
        for contig in ("1", "2"):  # windows count the sites that vary
            index = np.flatnonzero((panel.sites.contig == contig) & np.isfinite(np.diagonal(cells)))
            for place, i in enumerate(index):
                near = index[place + 1 : place + 10]
                hits = near[np.abs(cells[i, near]) >= np.float32(0.3)]
                wanted += [(f"s{i}", f"s{j}", f"{cells[i, j]:.6g}") for j in hits]
        assert [(r["id_a"], r["id_b"], r[measure]) for r in rows(tmp_path / f"{measure}.tsv")] == wanted
        assert said["pairs_written"] == len(wanted) > 20
        assert said["sites"] == np.isfinite(np.diagonal(ld.r2(panel.bits_lw, 2 * _PEOPLE))).sum() < _SITES
        assert said["pairs_tested"] > said["pairs_written"]


def test_windows_in_centimorgans(tmp_path):
    path, _ = panel_file(tmp_path)
    genetic_map = tmp_path / "map.txt"
    genetic_map.write_text(
        "pos\tchr\tcM\n" + "".join(f"{bp}\t{c}\t{bp * 1e-5}\n" for c in (1, 2) for bp in (1, 900_000))
    )
    said = tables.ld_table(
        path, tmp_path / "a.tsv", min_r2=0.0, window=tables.Window(bp=None, cm=0.0041), map=genetic_map
    )
    near = tables.ld_table(path, tmp_path / "b.tsv", min_r2=0.0, window=tables.Window(bp=410))
    assert said["pairs_tested"] == near["pairs_tested"] > 50
    assert rows(tmp_path / "a.tsv") == rows(tmp_path / "b.tsv")


def test_pruned_sites_by_contig(tmp_path):
    path, panel = panel_file(tmp_path)
    said = tables.ld_prune(
        path, tmp_path / "kept.tsv", most_r2=0.2, window=tables.Window(sites=20), step=5, unphased=True
    )
    varies = np.isfinite(np.diagonal(ld.r2(panel.bits_lw, 2 * _PEOPLE)))
    wanted = []
    for contig in ("1", "2"):
        index = np.flatnonzero((panel.sites.contig == contig) & varies)
        keep = ld.prune(panel.bits_lw[index], 2 * _PEOPLE, 0.2, sites=20, step=5, unphased=True, rule="plink2")
        wanted += [f"s{k}" for k in index[keep]]
    assert [row["id"] for row in rows(tmp_path / "kept.tsv")] == wanted
    assert said["kept"] == len(wanted) < _SITES
    by_kb = tables.ld_prune(path, tmp_path / "kb.tsv", most_r2=0.2, window=tables.Window(bp=3000), rule="plink1")
    assert 0 < by_kb["kept"] < _SITES
    with pytest.raises(UsageError, match="centimorgans"):
        tables.ld_prune(path, tmp_path / "x", most_r2=0.2, window=tables.Window(cm=1.0))


def test_scores_and_blocks(tmp_path):
    path, panel = panel_file(tmp_path, missing=0.02)
    said = tables.ld_scores(path, tmp_path / "scores.tsv", window=tables.Window(bp=2000), adjusted=True)
    table = rows(tmp_path / "scores.tsv")
    index = np.flatnonzero(panel.sites.contig == "2")
    end_l = ld.window(30, bp=2000, position_bp=panel.sites.position_bp[index])
    wanted = ld.score(panel.bits_lw[index], 2 * _PEOPLE, end_l, adjusted=True, missing_lw=panel.missing_lw[index])
    np.testing.assert_allclose([float(row["score"]) for row in table if row["contig"] == "2"], wanted, rtol=1e-6)
    assert said["mean_score"] == pytest.approx(np.mean([float(row["score"]) for row in table]))
    said = tables.ld_blocks(path, tmp_path / "blocks.tsv", unphased=True)
    table = rows(tmp_path / "blocks.tsv")
    assert said["blocks"] == len(table)
    for row in table:
        members = [int(name[1:]) for name in row["ids"].split(",")]
        assert len(members) == int(row["sites"])
        assert row["first"] == str(panel.sites.position_bp[members[0]])
        assert {panel.sites.contig[k] for k in members} == {row["contig"]}
    with pytest.raises(UsageError, match="kb"):
        tables.ld_blocks(path, tmp_path / "x", window=tables.Window(sites=5))


@pytest.mark.parametrize("by", ["id", "position"])
def test_clumps_of_a_table(tmp_path, by):
    path, panel = panel_file(tmp_path)
    p = np.random.default_rng(0).random(_SITES) ** 5
    key = "SNP" if by == "id" else "chrom\tpos"
    name = lambda k: f"s{k}" if by == "id" else f"{panel.sites.contig[k]}\t{panel.sites.position_bp[k]}"  # noqa: E731
    lines = [f"{key}\tP", *(f"{name(k)}\t{p[k]:.6g}" for k in range(0, _SITES, 2))]
    lines += [f"{name(1)}\tNA", "s999\t0.5" if by == "id" else "9\t1\t0.5"]
    (tmp_path / "p.tsv").write_text("\n".join(lines) + "\n")
    said = tables.ld_clumps(path, tmp_path / "p.tsv", tmp_path / "clumps.tsv", p1=0.01, p2=0.2, min_r2=0.1)
    assert (said["with_p"], said["rows_of_other_sites"]) == (45, 1)
    table = rows(tmp_path / "clumps.tsv")
    assert len(table) == said["clumps"] > 2
    seen = set()
    for row in table:
        members = {row["id"], *(row["other_ids"].split(",") if row["other_ids"] != "." else ())}
        assert len(members) == int(row["members"])
        assert not members & seen
        seen |= members
        assert float(row["p"]) <= 0.01
    for bad, says in (("id\tq\n", "columns"), ("id\tp\ns1\tx\n", "number"), ("id\tp\ns1\t2\n", r"\[0, 1\]"),
                      ("id\tp\ns1\t0.1\ns1\t0.2\n", "one row per site")):  # fmt: skip
        (tmp_path / "bad.tsv").write_text(bad)
        with pytest.raises(InputError, match=says):
            tables.ld_clumps(path, tmp_path / "bad.tsv", tmp_path / "x.tsv")
    assert not (tmp_path / "x.tsv").exists()


def test_triangle_is_the_lower_half_of_the_matrix(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_TRIANGLE_BYTES", 4 * _SITES * 7)
    path, panel = panel_file(tmp_path, missing=0.02)
    said = tables.ld_triangle(path, tmp_path / "r2.bin", unphased=True)
    cells = ld.r2(panel.bits_lw, 2 * _PEOPLE, missing_lw=panel.missing_lw, unphased=True)
    got = np.fromfile(tmp_path / "r2.bin", np.float32)
    np.testing.assert_array_equal(got, np.concatenate([cells[i, : i + 1] for i in range(_SITES)]))
    assert said["bytes"] == 4 * len(got)
    assert (tmp_path / "r2.bin.vars").read_text().split() == [f"s{k}" for k in range(_SITES)]


def test_what_has_no_meaning_is_refused(tmp_path):
    path, _ = panel_file(tmp_path, phased=False)
    with pytest.raises(InputError, match="--unphased"):
        tables.ld_table(path, tmp_path / "x.tsv")
    assert tables.ld_table(path, tmp_path / "y.tsv", unphased=True)["pairs_written"] > 0
    haploid = panel_from_alleles(alleles(), 1 + np.arange(_SITES), "Y", [f"p{k}" for k in range(2 * _PEOPLE)])
    write_panel(haploid, tmp_path / "haploid.bcf")
    with pytest.raises(InputError, match="diploid"):
        tables.ld_table(tmp_path / "haploid.bcf", tmp_path / "x.tsv", unphased=True)
    assert tables.ld_table(tmp_path / "haploid.bcf", tmp_path / "z.tsv")["pairs_written"] > 0
    assert not (tmp_path / "x.tsv").exists()
