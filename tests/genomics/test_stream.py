"""Large outputs part by part: the same bytes as one job, an interrupted job goes on, shards of sites join by copying."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import InputError, UsageError
from engine.genomics import commands, li_stephens, stream
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
    monkeypatch.setattr(stream, "_PEOPLE", 7)


def test_cut_paths_give_the_alleles_of_the_whole(run):
    model = li_stephens.load(run)
    whole = model.sample(20, seed=3)
    held = stream.hold_paths(model, 20, groups=None, seed=3, start=0)
    for first, stop in ((0, 1), (0, 2500), (63, 65), (1000, 2000), (2499, 2500), (70, 70)):
        np.testing.assert_array_equal(held.rows(first, stop), whole.bits_lw[first:stop])


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
    out, cut, calls = tmp_path / "x.vcf.gz", stream.HeldPaths.rows, []

    def dies(self, first, stop):
        calls.append(first)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return cut(self, first, stop)

    monkeypatch.setattr(stream.HeldPaths, "rows", dies)
    with pytest.raises(KeyboardInterrupt):
        commands.sample_command(run, 20, seed=3, out=out)
    assert not out.exists()
    commands.sample_command(run, 20, seed=3, out=out)
    assert calls == [0, 1000, 2000, 2000]
    np.testing.assert_array_equal(read_panel(out).bits_lw, li_stephens.load(run).sample(20, seed=3).bits_lw)
