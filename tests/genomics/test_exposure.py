"""What each donor gave: the table, its sums, shards, and the budget of a release."""

from __future__ import annotations

import csv
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from engine.errors import UsageError
from engine.genomics import commands, exposure, held_paths, li_stephens
from engine.genomics.panel import panel_from_alleles, write_panel, write_samples
from engine.release import manifest


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(1)
    allele_ln = (rng.random((600, 80)) < rng.beta(0.3, 0.8, (600, 1))).astype(np.uint8)
    panel = panel_from_alleles(
        allele_ln, np.concatenate([np.arange(300), np.arange(300)]) * 4_000 + 1, np.repeat(["20", "21"], 300),
        [f"real{k}" for k in range(40)], group=["A"] * 15 + ["B"] * 25,
        contig_length={"20": 63_025_520, "21": 48_129_895}, assembly="GRCh37",
    )  # fmt: skip
    write_panel(panel, folder / "p.bcf")
    write_samples(panel, folder / "p.tsv")
    commands.fit_command(folder / "p.bcf", samples=folder / "p.tsv", overrides=["ne=20000"], out=folder / "run")
    return folder / "run"


def table(path):
    with open(path, encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_by_hand():
    model = SimpleNamespace(
        config=SimpleNamespace(sampler="interchange"),
        k=4,
        n_sites=6,
        distance_l=np.array([np.inf, 1, 1, 2, 3, 4]),
        sites=SimpleNamespace(centimorgans=lambda: np.array([0.0, 1.0, 2.0, 4.0, 7.0, 11.0])),
    )
    # person 0: donor 0 up to site 2, donor 1 from there; donor 1 throughout. Person 1: donors 2, 1, 2; donor 3
    offset_n, start_s = np.array([0, 2, 3, 6, 7]), np.array([0, 3, 0, 0, 2, 4, 0])
    donor_s = np.array([0, 1, 1, 2, 1, 2, 3])
    made = exposure.of_paths(model, offset_n, start_s, donor_s)
    np.testing.assert_allclose(made.copied_cm, [4, 7 + 11 + 5, 2 + 4, 11])
    assert made.people.tolist() == [1, 2, 1, 1]
    np.testing.assert_allclose(made.most_cm, [4, 18, 6, 11])
    np.testing.assert_allclose(made.longest_cm, [4, 11, 4, 11])


@pytest.mark.parametrize("stretch", [64, held_paths.STRETCH])
def test_the_table_is_that_of_the_paths(tmp_path, run, monkeypatch, stretch):
    monkeypatch.setattr(held_paths, "STRETCH", stretch)
    monkeypatch.setattr(held_paths, "PEOPLE", 7)
    made = commands.sample_command(run, 40, seed=3, out=tmp_path / "x.bcf")
    model = li_stephens.load(run)
    paths, _ = model.paths(40, seed=3)
    expected = exposure.of_paths(model, paths.segment_offset_n, paths.segment_start_s, paths.segment_donor_s)
    rows = table(tmp_path / "x.bcf.exposure.tsv")
    assert [int(row["donor"]) for row in rows] == list(range(80))
    for name, values in (("copied_cm", expected.copied_cm), ("most_in_one_person_cm", expected.most_cm),
                         ("longest_piece_cm", expected.longest_cm), ("people", expected.people)):  # fmt: skip
        np.testing.assert_allclose(sorted(float(row[name]) for row in rows), np.sort(values), atol=1e-5)
    assert sum(row["group"] == "A" for row in rows) == 30
    assert made["exposure"]["longest_piece_cm"] == pytest.approx(expected.longest_cm.max())
    assert "real" not in (tmp_path / "x.bcf.exposure.tsv").read_text()
    assert [int(row["people"]) for row in rows] != expected.people.tolist()  # not in the order of the panel


def test_shards_of_people_and_of_sites_say_the_same(tmp_path, run):
    commands.sample_command(run, 40, seed=3, out=tmp_path / "x.bcf")
    whole = table(tmp_path / "x.bcf.exposure.tsv")
    for index in range(3):
        commands.sample_command(run, 40, seed=3, out=tmp_path / "p/x.bcf", shard=(index, 3))
        commands.sample_command(run, 40, seed=3, out=tmp_path / "s/x.bcf", shard=(index, 3), shard_by="sites")
    commands.finish_command(tmp_path / "p/x.bcf", 3)
    commands.finish_command(tmp_path / "s/x.bcf", 3)
    assert table(tmp_path / "s/x.bcf.exposure.tsv") == whole
    for row, same in zip(table(tmp_path / "p/x.bcf.exposure.tsv"), whole, strict=True):
        for name, value in same.items():
            assert row[name] == value or float(row[name]) == pytest.approx(float(value), abs=1e-5)
    assert (tmp_path / "p/x.bcf").read_bytes()
    np.testing.assert_array_equal(*(
        commands.read_panel(tmp_path / side / "x.bcf").bits_lw for side in ("p", "s")
    ))  # fmt: skip


def test_a_release_costs_no_donor_more_than_was_said_before(tmp_path, run):
    model = li_stephens.load(run)
    length_cm = 100 * model.distance_l[np.isfinite(model.distance_l)].sum()
    with pytest.raises(UsageError, match="at most 80 people"):
        commands.sample_command(run, 81, seed=3, max_release_cm=2.01 * length_cm, out=tmp_path / "x.bcf")
    made = commands.sample_command(run, 80, seed=3, max_release_cm=2.01 * length_cm, out=tmp_path / "x.bcf")
    copied = [float(row["copied_cm"]) for row in table(tmp_path / "x.bcf.exposure.tsv")]
    np.testing.assert_allclose(copied, 2 * length_cm, atol=1e-5)  # every donor is copied twice everywhere
    assert made["exposure"]["most_copied_cm"] == pytest.approx(max(copied), abs=1e-5)
    with pytest.raises(UsageError, match="at most 0 people"):
        commands.sample_command(run, 1, seed=3, max_release_cm=0.5 * length_cm, out=tmp_path / "y.bcf")
    alone = replace(model, config=model.config.model_copy(update={"sampler": "independent"}))
    with pytest.raises(UsageError, match="interchange"):
        exposure.check_release(alone, 5, 100.0, None)


def test_the_budget_of_a_person_holds_in_the_file(tmp_path, run):
    free = commands.sample_command(run, 40, seed=3, out=tmp_path / "x.bcf")["exposure"]["most_in_one_person_cm"]
    made = commands.sample_command(run, 40, seed=3, max_donor_cm=0.8 * free, out=tmp_path / "y.bcf")
    assert 0.7 * free < made["exposure"]["most_in_one_person_cm"] <= 0.8 * free + 1e-9
    assert (tmp_path / "x.bcf").read_bytes() != (tmp_path / "y.bcf").read_bytes()
    with pytest.raises(UsageError, match="more than 0"):
        commands.sample_command(run, 4, max_donor_cm=0.0, out=tmp_path / "z.bcf")


def test_a_release_leaves_the_table_where_it_is():
    listed = [{"path": "x.bcf", "sha256": "1"}, {"path": "x.bcf.exposure.tsv", "sha256": "2"}]
    manifest._check_bytes({"x.bcf": {"sha256": "1"}}, listed, "audit.json")
