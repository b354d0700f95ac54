"""Simulated panels: what is written is what was asked for, whatever the format, the blocks and the interruptions."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from engine.errors import Unsupported, UsageError
from engine.files import genetic_map
from engine.genomics import simulate, stream
from engine.genomics.panel import read_panel
from engine.genomics.simulate import Simulation, simulate_command

pytest.importorskip("msprime")
ASKED = Simulation({"AFR": 12, "EUR": 9}, length_bp=700_000, block_bp=300_000, seed=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("panel") / "p.bcf"
    return out, simulate_command(out, ASKED)


def test_the_panel_is_what_was_asked_for(made):
    out, told = made
    panel = read_panel(out, samples_tsv=told["samples"], map=told["map"])
    assert panel.samples.group.tolist() == ["AFR"] * 12 + ["EUR"] * 9
    assert panel.n_sites == told["sites"]
    assert panel.phased
    assert panel.missing_lw is None
    assert panel.contig_length == {"1": 700_000}
    assert {0, 1, 2} == {int(bp - 1) // 300_000 for bp in panel.sites.position_bp}
    carriers_l = panel.alleles_nl().sum(axis=0)
    assert carriers_l.min() >= 1
    # under the coalescent more alleles are carried once than twice, and those more than three times
    once, twice, thrice = (int((carriers_l == k).sum()) for k in (1, 2, 3))
    assert once > twice > thrice
    # Africans differ more from one another: Gutenkunst et al. give them the larger population
    share_gl = [panel.alleles_nl()[panel.group_n == g].mean(axis=0) for g in ("AFR", "EUR")]
    afr, eur = (float((2 * p * (1 - p)).sum()) for p in share_gl)
    assert afr > 1.1 * eur
    record = json.loads(out.with_name("p.bcf.provenance.json").read_text())
    assert record["synthetic_data"]
    assert record["config"]["seed"] == 3
    assert not stream.parts_folder(out).exists()


def test_the_map_has_the_rate_and_a_step_at_the_border_of_blocks(made):
    _, told = made
    (own,) = genetic_map.read_maps(told["map"]).values()
    assert np.diff(own.interpolate(np.array([100_000, 200_000])))[0] == pytest.approx(0.1)
    assert np.diff(own.interpolate(np.array([300_000, 300_001])))[0] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("suffix", [".pgen", ".vcz", ".haps.gz"])
def test_every_format_holds_the_same_alleles(tmp_path, made, suffix):
    simulate_command(tmp_path / f"q{suffix}", ASKED)
    ours, theirs = read_panel(tmp_path / f"q{suffix}"), read_panel(made[0])
    np.testing.assert_array_equal(ours.bits_lw, theirs.bits_lw)
    assert ours.sites.id.tolist() == theirs.sites.id.tolist()


def test_a_number_of_sites_is_kept_to_and_a_block_does_not_depend_on_the_others(tmp_path, made):
    whole = read_panel(made[0])
    wanted = Simulation(ASKED.people, sites=1000, block_bp=300_000, seed=3)
    told = simulate_command(tmp_path / "q.bcf", wanted)
    part = read_panel(tmp_path / "q.bcf")
    assert part.n_sites == told["sites"] == 1000
    np.testing.assert_array_equal(part.bits_lw, whole.bits_lw[:1000])
    other = Simulation(ASKED.people, sites=1000, block_bp=300_000, seed=4)
    simulate_command(tmp_path / "r.bcf", other)
    assert not np.array_equal(read_panel(tmp_path / "r.bcf").sites.position_bp, part.sites.position_bp)


def test_recombination_follows_a_map(tmp_path):
    """A stretch without recombination is one tree: no pair of sites there fails the four-gamete test."""
    (tmp_path / "map").write_text("pos chr cM\n1 1 0\n100000 1 0\n300000 1 6\n")
    wanted = Simulation({"all": 30}, length_bp=300_000, demography="constant", seed=1)
    simulate_command(tmp_path / "p.bcf", wanted, map=tmp_path / "map")
    panel = read_panel(tmp_path / "p.bcf")
    a_ln = panel.alleles_nl().T.astype(int)
    single = (panel.sites.alt_index == 0) & (a_ln.sum(axis=1) > 1)

    def four_gametes(rows: np.ndarray) -> int:
        x_ln = a_ln[rows]
        both = x_ln @ x_ln.T
        ones = x_ln.sum(axis=1)
        return int(((both > 0) & (ones[:, None] > both) & (ones > both) & (60 - ones[:, None] - ones + both > 0)).sum())

    still, moving = (single & (panel.sites.position_bp <= 100_000), single & (panel.sites.position_bp > 200_000))
    assert four_gametes(moving) > 100
    assert four_gametes(still) <= 0.02 * four_gametes(moving)  # a site hit twice can look like a recombination


def test_an_interrupted_run_goes_on_and_another_request_does_not_mix(tmp_path, made, monkeypatch):
    out, make = tmp_path / "p.bcf", simulate._Blocks._make_block
    done = []

    def dies(self, b):
        if b == 2 and len(done) == 2:
            raise KeyboardInterrupt
        done.append(b)
        make(self, b)

    monkeypatch.setattr(simulate._Blocks, "_make_block", dies)
    with pytest.raises(KeyboardInterrupt):
        simulate_command(out, ASKED)
    with pytest.raises(UsageError, match="another"):
        simulate_command(out, Simulation(ASKED.people, length_bp=700_000, block_bp=300_000, seed=4))
    done.append(-1)
    simulate_command(out, ASKED)
    assert done == [0, 1, -1, 2]
    assert out.read_bytes() == made[0].read_bytes()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"demography": "out-of-afrika"}, "out-of-africa"), ({"people": {"AFX": 3}}, "AFR"),
        ({"people": {"AFR": 0}}, "one person"), ({"length_bp": None}, "--sites"), ({"block_bp": 0}, "1 or more"),
        ({"mutation_rate": 1.0}, "1e-4"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_is_one_line(tmp_path, change, why):
    from dataclasses import replace

    with pytest.raises(UsageError, match=why):
        simulate_command(tmp_path / "p.bcf", replace(ASKED, **change))


def test_without_msprime_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "msprime", None)
    with pytest.raises(Unsupported, match="pip install"):
        simulate_command(tmp_path / "p.bcf", ASKED)
    assert not list(tmp_path.iterdir())


def test_the_command_is_the_function(tmp_path, made, capsys):
    from engine.cli import main

    out = tmp_path / "p.bcf"
    asked = ["--groups", "AFR=12,EUR=9", "--length-mb", "0.7", "--block-mb", "0.3", "--seed", "3", "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        main(["genomics", "simulate", *asked, "--json"])
    assert not ended.value.code
    told = json.loads(capsys.readouterr().out)
    assert told["groups"] == {"AFR": 12, "EUR": 9}
    assert out.read_bytes() == made[0].read_bytes()
    with pytest.raises(SystemExit) as ended:
        main(["genomics", "simulate", "--groups", "AFR:12", "--sites", "9", "--out", str(tmp_path / "q.bcf")])
    assert ended.value.code == 2
    assert "NAME=NUMBER" in capsys.readouterr().err
