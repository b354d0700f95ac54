"""Large outputs part by part: the same bytes as one job, an interrupted job goes on, shards of sites join by copying."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import CorruptRun, InputError, UsageError
from engine.genomics import commands, held_paths, li_stephens, stream
from engine.genomics.held_paths import HeldPaths
from engine.genomics.panel import panel_from_alleles, read_panel, write_panel, write_samples


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(1)
    allele_ln = (rng.random((2500, 80)) < rng.beta(0.3, 0.8, (2500, 1))).astype(np.uint8)
    panel = panel_from_alleles(
        allele_ln, np.arange(2500) * 400 + 1, "21", [f"r{k}" for k in range(40)], group=["A"] * 20 + ["B"] * 20,
        contig_length={"21": 48_129_895}, assembly="GRCh37",
    )  # fmt: skip
    write_panel(panel, folder / "p.bcf")
    write_samples(panel, folder / "p.tsv")
    commands.fit_command(folder / "p.bcf", samples=folder / "p.tsv", overrides=["ne=20000"], out=folder / "run")
    return folder / "run"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(stream, "_PART_GENOTYPES", 1000)
    monkeypatch.setattr(stream, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(held_paths, "PEOPLE", 7)
    monkeypatch.setattr(held_paths, "STRETCH", 700)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("stretch", [1, 64, 700, 2500, 16384])
def test_held_paths_give_the_alleles_of_the_whole(tmp_path, run, on_disk, stretch, monkeypatch):
    monkeypatch.setattr(held_paths, "STRETCH", stretch)
    model = li_stephens.load(run)
    whole, folder = model.sample(20, seed=3), tmp_path if on_disk else None
    paths = lambda first, count: model.paths(count, seed=3, start=first)  # noqa: E731
    held = held_paths.draw(model, 20, paths, folder=folder, shard=(1, 2))
    blocks = ((0, 1), (0, 2500), (63, 65), (1000, 2000), (699, 701), (2499, 2500), (70, 70), (0, 0))
    for first, stop in blocks if stretch > 1 else blocks[4:]:
        np.testing.assert_array_equal(held.rows(first, stop), whole.bits_lw[first:stop])
    assert np.array(model.group_names)[held.group_n].tolist() == whole.samples.group.tolist()
    assert all(isinstance(each, bytes) != on_disk for each in held.packs)


def test_paths_are_drawn_once_and_damage_is_seen(tmp_path, run):
    model, drawn = li_stephens.load(run), []

    def paths(first, count):
        drawn.append(first)
        return model.paths(count, seed=3, start=first)

    held_paths.draw(model, 20, paths, folder=tmp_path, shard=(2, 3))
    assert drawn == [0, 14, 0, 7]  # the template, then from the third shard's place on
    again = held_paths.draw(model, 20, paths, folder=tmp_path)
    assert drawn == [0, 14, 0, 7, 0]
    np.testing.assert_array_equal(again.rows(600, 900), model.sample(20, seed=3).bits_lw[600:900])
    place = tmp_path / "pack-000001"
    place.write_bytes(place.read_bytes()[:-1])
    with pytest.raises(CorruptRun, match="shorter"):
        held_paths.draw(model, 20, paths, folder=tmp_path).rows(2400, 2500)


def test_a_large_panel_has_donors_of_four_bytes(run):
    model = li_stephens.load(run)
    paths, _ = model.paths(20, seed=3)
    paths.segment_donor_s[::3] += 70_000
    short = held_paths.pack(paths, 2500, 80, np.zeros(20))
    held = held_paths.HeldPaths(
        replace_k(model, 80_000), [held_paths.pack(paths, 2500, 80_000, np.zeros(20))], paths, np.zeros(20)
    )
    cut = held.cut(0, 700)
    want = paths.segment_donor_s[paths.segment_start_s < 700]
    assert cut.segment_donor_s.tolist() == want.tolist()
    assert len(short) < len(held.packs[0])


def replace_k(model, k):
    class Larger:
        n_sites = model.n_sites

    Larger.k = k
    return Larger()


@pytest.mark.parametrize("name", ["x.pgen", "x.bcf"])
def test_shards_of_sites_are_one_job(tmp_path, run, name):
    one, many = tmp_path / "one" / name, tmp_path / "many" / name
    commands.sample_command(run, 20, seed=3, out=one)
    with pytest.raises(InputError, match="shard"):
        commands.finish_command(many, 3)
    for index in (2, 0):
        commands.sample_command(run, 20, seed=3, out=many, shard=(index, 3), shard_by="sites")
    assert commands.sample_command(run, 20, seed=3, out=many, shard=(0, 3), shard_by="sites")["skipped"]
    with pytest.raises(InputError, match="all parts"):
        commands.finish_command(many, 3)
    with pytest.raises(UsageError, match="another"):
        commands.sample_command(run, 20, seed=4, out=many, shard=(1, 3), shard_by="sites")
    commands.sample_command(run, 20, seed=3, out=many, shard=(1, 3), shard_by="sites")
    commands.finish_command(many, 3)
    assert one.read_bytes() == many.read_bytes()
    assert not stream.parts_folder(many).exists()
    np.testing.assert_array_equal(read_panel(many).bits_lw, li_stephens.load(run).sample(20, seed=3).bits_lw)


def test_an_interrupted_job_goes_on_where_it_was(tmp_path, run, monkeypatch):
    out, cut, calls = tmp_path / "x.vcf.gz", HeldPaths.rows, []

    def dies(self, first, stop):
        calls.append(first)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return cut(self, first, stop)

    monkeypatch.setattr(HeldPaths, "rows", dies)
    with pytest.raises(KeyboardInterrupt):
        commands.sample_command(run, 20, seed=3, out=out)
    assert not out.exists()
    commands.sample_command(run, 20, seed=3, out=out)
    assert calls == [0, 1000, 2000, 2000]
    np.testing.assert_array_equal(read_panel(out).bits_lw, li_stephens.load(run).sample(20, seed=3).bits_lw)
