"""Admixture: tracts against the theory of pulses, mosaics against their sources, people as a function of their number."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from engine.errors import UsageError
from engine.genomics import admixture, commands, people
from engine.genomics.admixture import Pulse
from engine.genomics.li_stephens import LiStephensConfig, fit
from engine.genomics.local_ancestry import read_bp
from engine.genomics.panel import panel_from_alleles, read_panel, write_panel, write_samples
from engine.genomics.people import Request

SITES = 400


def panel(people_each: int = 12, cm: float = 200.0):
    """Three groups; every haplotype has 1 at the sites of its group's class and, as a name, a pattern of its own elsewhere."""
    groups = ["A", "B", "C"]
    n = 2 * people_each * len(groups)
    rng = np.random.default_rng(3)
    alleles_nl = (rng.random((n, SITES)) < 0.5).astype(np.uint8)
    for g in range(3):
        own = slice(2 * people_each * g, 2 * people_each * (g + 1))
        alleles_nl[own, 0::4] = g == 0
        alleles_nl[own, 1::4] = g == 1
    half = SITES // 2
    position = np.concatenate([np.arange(half), np.arange(SITES - half)]) * 100_000 + 5_000
    return panel_from_alleles(
        alleles_nl.T, position, np.array(["1"] * half + ["2"] * (SITES - half)), [f"p{i}" for i in range(n // 2)],
        group=np.repeat(groups, people_each), position_cm=(position - 5_000) * cm / (half - 1) / 1e5,
        contig_length={"1": 30_000_000},
    )  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return fit(panel(), LiStephensConfig(ne=50, mismatch=0.0, min_carriers=1, sampler="independent"))


def inner_lengths(tracts, sources):
    """Lengths in Morgans of joined tracts by source, those that end within their contig."""
    made = {name: [] for name in sources}
    for n in range(tracts.n_haplotypes):
        last = {}
        blocks = tracts.blocks(n)
        for at, (name, contig, _, cm) in enumerate(blocks):
            ends_inside = at + 1 < len(blocks) and blocks[at + 1][1] == contig
            if contig in last and ends_inside:
                made[name].append((cm - last[contig]) / 100)
            last[contig] = cm
    return {name: np.array(values) for name, values in made.items()}


def test_one_pulse_breaks_at_rate_g_and_tracts_are_exponential(model):
    """Breaks per contig are Poisson(G L); tracts of a source of share p, joined, have mean 1 / (G (1 - p)) Morgans."""
    pulses = [Pulse(40, {"A": 0.7, "B": 0.3})]
    _, tracts = admixture.paths(model, pulses, 150, seed=1)
    breaks = np.diff(tracts.offset_n) - 2
    expected = 40 * 2 * 2.0  # generations, contigs, Morgans
    assert abs(breaks.mean() - expected) < 4 * np.sqrt(expected / len(breaks))
    assert breaks.var() == pytest.approx(expected, rel=0.3)
    share = tracts.shares(admixture.contig_starts_cm(model)).mean(axis=0)
    # a haplotype's share over n = 160 independent pieces
    np.testing.assert_allclose(share, [0.7, 0.3], atol=4 * np.sqrt(2 * 0.21 / 160 / 300))
    for name, p in (("A", 0.7), ("B", 0.3)):
        lengths = inner_lengths(tracts, "AB")[name]
        rate = 40 * (1 - p)
        # whole tracts within a window of 2 Morgans: their law is the exponential seen through the window, nearly itself here
        assert len(lengths) > 1_000
        weight = 1 / np.clip(2.0 - lengths, 0.05, None)  # a tract of length x fits in 2 - x places
        mean = np.average(lengths, weights=weight)
        assert abs(mean - 1 / rate) < 5 / rate / np.sqrt(len(lengths))


def test_the_law_of_a_single_pulse_is_exponential_by_its_distribution():
    """Tracts followed from one end of a contig of 200 Morgans: no window to speak of."""
    rng = np.random.default_rng(0)
    cumulative = np.array([[0.25, 0.8, 1.0]])
    cm, source = admixture._one(0.0, 20_000.0, np.array([6.0]), np.array([1.0]), cumulative, rng)
    change = np.flatnonzero(np.diff(source)) + 1
    edge = np.concatenate([[0.0], cm])[change]
    length, of = np.diff(edge) / 100, source[change][:-1]
    for a, p in enumerate((0.25, 0.55, 0.2)):
        assert stats.kstest(length[of == a], "expon", args=(0, 1 / (6 * (1 - p)))).pvalue > 1e-3


def test_several_pulses_against_people_drawn_generation_by_generation():
    """Shares, and how often two places d apart have one ancestor pulse, by simulating the line of each place back in time."""
    pulses = [Pulse(10, {"A": 0.6, "B": 0.4}), Pulse(4, {"C": 0.3}), Pulse(2, {"A": 0.1, "B": 0.1})]
    age = np.array([10.0, 4.0, 2.0])
    total = np.array([1.0, 0.3, 0.2])
    weight = np.array([0.7 * 0.8, 0.3 * 0.8, 0.2])
    shares = np.array([[0.6, 0.4, 0.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.0]])
    expected = weight @ shares
    d = 0.08  # Morgans
    rng = np.random.default_rng(4)
    same, n = 0, 40_000
    for _ in range(n):  # the two places' lines: one person's chromosome until a recombination parts them
        parted, pulse, other = rng.exponential(1 / d), None, None
        for j in (2, 1, 0):
            if pulse is None and (rng.random() < total[j] or j == 0):
                pulse = (j, rng.random())
        if parted >= age[pulse[0]]:
            other = pulse
        else:
            for j in (2, 1, 0):
                if age[j] > parted and other is None and (rng.random() < total[j] or j == 0):
                    other = (j, rng.random())
        a = np.searchsorted(np.cumsum(shares[pulse[0]]), pulse[1])
        b = a if other == pulse else np.searchsorted(np.cumsum(shares[other[0]]), other[1])
        same += a == b
    checked = admixture.checked(pulses)
    assert [each.generations for each in checked] == [10, 4, 2]
    rng = np.random.default_rng(5)
    cumulative = np.cumsum(shares, axis=1)
    cm, source = admixture._one(0.0, 400_000.0, age, weight, cumulative, rng)
    place = np.arange(0, 399_900, 100.0)
    here = source[np.searchsorted(cm, place, side="left")]
    there = source[np.searchsorted(cm, place + 100 * d, side="left")]
    np.testing.assert_allclose(np.bincount(here, minlength=3) / len(here), expected, atol=0.025)
    assert (here == there).mean() == pytest.approx(same / n, abs=4 * np.sqrt(0.25 * (1 / n + 1 / len(place))))


def test_each_tract_is_a_mosaic_of_its_source(model):
    """Sites of class 0 and 1 say the group of whoever is copied: they must be those of the truth, everywhere."""
    request = Request(pulses=[Pulse(30, {"A": 0.5, "B": 0.3, "C": 0.2})])
    drawn = people.draw(model, 25, request, seed=2)
    made = people.panel_of(model, drawn, request, seed=2)
    alleles_nl, source_nl = made.alleles_nl(), drawn.tracts.source_nl(SITES)
    np.testing.assert_array_equal(alleles_nl[:, 0::4] == 1, source_nl[:, 0::4] == 0)
    np.testing.assert_array_equal(alleles_nl[:, 1::4] == 1, source_nl[:, 1::4] == 1)
    assert set(np.unique(source_nl)) == {0, 1, 2}
    assert set(made.samples.group.tolist()) == {"A+B+C"}
    donors = np.repeat(drawn.paths.segment_donor_s, 1)
    counts = np.bincount(donors, minlength=model.k)
    assert (counts > 0).all()  # everybody is copied


def test_whoever_is_copied_after_a_break_does_not_depend_on_before(model):
    """One source, few switches of its own: at a break the donor is drawn anew, equal by chance once in K."""
    slow = fit(panel(), LiStephensConfig(ne=1e-6, mismatch=0.0, min_carriers=1, sampler="independent"))
    paths, tracts = admixture.paths(slow, [Pulse(30, {"A": 1.0})], 60, seed=1)
    same = total = 0
    for n in range(120):
        donor = paths.segment_donor_s[paths.segment_offset_n[n] : paths.segment_offset_n[n + 1]]
        begin = tracts.start_site_t[tracts.offset_n[n] : tracts.offset_n[n + 1]]
        assert set(paths.segment_start_s[paths.segment_offset_n[n] : paths.segment_offset_n[n + 1]]) == set(begin)
        same += int((donor[1:] == donor[:-1]).sum())
        total += len(donor) - 1
    assert total > 3_000
    assert abs(same / total - 1 / 24) < 4 * np.sqrt(1 / 24 / total)


def test_a_person_depends_on_model_seed_and_number_alone(model):
    request = Request(pulses=[Pulse(12, {"A": 0.5, "C": 0.5})])
    whole = people.draw(model, 9, request, seed=7)
    parts = [people.draw(model, n, request, seed=7, start=at) for at, n in ((0, 4), (4, 1), (5, 4))]
    joined = people.joined(parts)
    for name in ("segment_offset_n", "segment_start_s", "segment_donor_s", "flip_offset_n", "flip_site_f"):
        np.testing.assert_array_equal(getattr(whole.paths, name), getattr(joined.paths, name))
    for name in ("offset_n", "source_t", "end_bp_t", "end_cm_t", "start_site_t"):
        np.testing.assert_array_equal(getattr(whole.tracts, name), getattr(joined.tracts, name))
    other = people.draw(model, 9, request, seed=8)
    assert len(other.paths.segment_start_s) != len(whole.paths.segment_start_s)


def test_commands_write_the_truth_beside_the_people_and_shards_join(tmp_path, model):
    write_panel(panel(), tmp_path / "p.bcf")
    write_samples(panel(), tmp_path / "p.tsv")
    lines = [f"{bp} {c} {bp * 1e-5}" for c in (1, 2) for bp in range(1, 20_000_002, 10_000_000)]
    (tmp_path / "map.txt").write_text("\n".join(["pos chr cM", *lines]) + "\n")
    commands.fit_command(
        tmp_path / "p.bcf", map=tmp_path / "map.txt", samples=tmp_path / "p.tsv", out=tmp_path / "run",
        overrides=["ne=50", "mismatch=0", "min_carriers=1"],
    )  # fmt: skip
    (tmp_path / "pulses.yaml").write_text(
        "pulses:\n- {generations: 9, sources: {A: 0.5, B: 0.5}}\n- {generations: 3, sources: {C: 0.25}}\n"
    )
    asked = {"admix": str(tmp_path / "pulses.yaml"), "seed": 5}
    told = commands.sample_command(tmp_path / "run", 10, out=tmp_path / "one.bcf", **asked)
    assert sum(told["ancestry"].values()) == pytest.approx(1, abs=1e-3)
    assert told["groups"] == {"A+B+C": 10}
    for index in range(3):
        commands.sample_command(tmp_path / "run", 10, out=tmp_path / "two.bcf", shard=(index, 3), **asked)
    commands.finish_command(tmp_path / "two.bcf", 3)
    assert (tmp_path / "one.bcf.bp").read_text() == (tmp_path / "two.bcf.bp").read_text()
    made = read_panel(tmp_path / "one.bcf")
    np.testing.assert_array_equal(made.alleles_nl(), read_panel(tmp_path / "two.bcf").alleles_nl())
    blocks = read_bp(tmp_path / "one.bcf.bp")
    assert list(blocks) == made.samples.ids
    alleles_nl = made.alleles_nl()
    for s, name in enumerate(made.samples.ids):
        for strand, own in enumerate(blocks[name]):
            assert {contig: bp for _, contig, bp, _ in own} == {"1": 30_000_000, "2": made.sites.position_bp[-1]}
            for site in range(0, SITES, 4):  # a site belongs to the first block that does not end before it
                contig, bp = made.sites.contig[site], made.sites.position_bp[site]
                source = next(p for p, c, end, _ in own if c == contig and end >= bp)
                assert (source == "A") == (alleles_nl[2 * s + strand, site] == 1)
    record = json.loads((tmp_path / "one.bcf.provenance.json").read_text())
    assert record["request"]["asked"]["pulses"][1] == {"generations": 3.0, "share": {"C": 0.25}}


@pytest.mark.parametrize(
    ("text", "generations", "why"),
    [
        ("A=0.5,B=0.4", 8, "sum to 1, got 0.9"),
        ("A=0.5,B=0.5", None, "--generations 8"),
        ("A=0.5,A=0.5", 8, "each group once"),
        ("A,B", 8, "GROUP=share"),
        ("A=1.5,B=-0.5", 8, "at least 0"),
        ("A=1", 0, "different times"),
        ("none.yaml", None, "YAML file"),
        ("A=0.5,b=0.5", 8, None),
    ],
)
def test_requests_that_mean_nothing_are_refused(model, text, generations, why):
    if why is None:
        with pytest.raises(UsageError, match="a group of the model, got 'b'"):
            admixture.paths(model, admixture.parse(text, generations), 1)
        return
    with pytest.raises(UsageError, match=why):
        admixture.parse(text, generations)


def test_a_later_pulse_takes_less_than_all(model):
    for shares in ({"C": 1.0}, {"C": 0.0}):
        with pytest.raises(UsageError, match="between 0 and 1"):
            admixture.checked([Pulse(8, {"A": 1.0}), Pulse(3, shares)])
    with pytest.raises(UsageError, match="one of --group and --admix"):
        people.draw(model, 1, Request(group="A", pulses=[Pulse(3, {"A": 1.0})]))


def test_real_groups(real_data):
    """chr15: the people's allele frequencies are those of the sources, mixed by the shares asked for."""
    folder = real_data / "genomics/chr15_10k"
    real = read_panel(
        folder / "train.bcf", map=real_data / "genomics/maps/b37/chr15.b37.gmap.gz", samples_tsv=folder / "samples.tsv"
    )
    real = real.select(sites=slice(0, None, 10))
    request = Request(pulses=[Pulse(8, {"AFR": 0.8, "EUR": 0.2})])
    model = fit(real, LiStephensConfig())
    made = people.panel_of(model, people.draw(model, 400, request, seed=1), request)
    p = {g: real.select(samples=real.samples.group == g).alleles_nl().mean(axis=0) for g in ("AFR", "EUR")}
    mixed = 0.8 * p["AFR"] + 0.2 * p["EUR"]
    q = made.alleles_nl().mean(axis=0)
    assert np.sqrt(np.mean((q - mixed) ** 2)) < 0.6 * np.sqrt(np.mean((q - p["AFR"]) ** 2))
    assert abs((q - mixed).mean()) < 0.01
