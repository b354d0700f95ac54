"""The Li-Stephens generator: likelihood against the kernel's definition, samples against their law, runs on disk."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine import provenance
from engine.errors import CorruptRun, InputError, UsageError
from engine.genomics import li_stephens
from engine.genomics.li_stephens import LiStephensConfig, fit
from engine.genomics.panel import panel_from_alleles, read_panel
from engine.kernels import haplotype_hmm


def small_panel(people: int = 30, sites: int = 120, seed: int = 0, groups=("north", "south"), contigs=("1", "2")):
    rng = np.random.default_rng(seed)
    alleles_ln = (rng.random((sites, 2 * people)) < rng.uniform(0.05, 0.6, (sites, 1))).astype(np.uint8)
    half = sites // 2
    contig = np.array([contigs[0]] * half + [contigs[1]] * (sites - half))
    position = np.concatenate([np.arange(half), np.arange(sites - half)]) * 5_000 + 1_000
    return panel_from_alleles(
        alleles_ln, position, contig, [f"p{i}" for i in range(people)],
        group=[groups[0] if i < people // 3 else groups[1] for i in range(people)], position_cm=position * 2e-6,
    )  # fmt: skip


def equal(one, other) -> bool:
    return (
        np.array_equal(one.bits_lw, other.bits_lw)
        and one.samples.ids == other.samples.ids
        and one.samples.group.tolist() == other.samples.group.tolist()
    )


def test_likelihood_is_the_recursion_of_the_anchors():
    panel = small_panel(people=6, sites=20)
    model = fit(panel, LiStephensConfig(ne=10_000, mismatch=0.01))
    targets = small_panel(people=2, sites=20, seed=9)
    alleles, reference = targets.alleles_nl(), panel.alleles_nl()
    k = panel.n_haplotypes
    for n in range(targets.n_haplotypes):
        f, total = np.full(k, 1 / k), 0.0
        for site in range(20):
            if site == 10:  # a new contig starts
                f = np.full(k, 1 / k)
            elif site > 0:
                morgans = 5_000 * 2e-6 / 100
                r = 1 - np.exp(-4 * 10_000 * morgans / k)
                f = (1 - r) * f + r / k
            f = f * np.where(reference[:, site] == alleles[n, site], 0.99, 0.01)
            total += np.log(f.sum())
            f /= f.sum()
        assert model.log_likelihood(targets)[n] == pytest.approx(total, abs=1e-4)


def test_missing_alleles_sites_in_another_order_and_intersect():
    panel = small_panel(people=8, sites=30)
    model = fit(panel)
    targets = small_panel(people=3, sites=30, seed=4)
    whole = model.log_likelihood(targets)
    alleles_ln = targets.alleles_nl().T.copy()
    alleles_ln[7] = 255
    missing = panel_from_alleles(alleles_ln, targets.sites.position_bp, targets.sites.contig, targets.samples.ids)
    without = targets.select(sites=np.delete(np.arange(30), 7))
    assert not np.allclose(model.log_likelihood(missing), whole, atol=1e-6)
    np.testing.assert_allclose(model.log_likelihood(missing), model.log_likelihood(without, intersect=True), atol=1e-6)
    np.testing.assert_allclose(model.log_likelihood(targets.select(sites=np.arange(30)[::-1])), whole, atol=1e-6)
    with pytest.raises(InputError, match="29 shared of model 30, panel 29"):
        model.log_likelihood(without)
    renamed = replace(targets, sites=replace(targets.sites, contig=np.char.add("chr", targets.sites.contig)))
    np.testing.assert_allclose(model.log_likelihood(renamed), whole, atol=1e-6)
    with pytest.raises(InputError, match="phased"):
        model.log_likelihood(replace(targets, phased=False))


def test_leave_one_out_leaves_out_the_person():
    panel = small_panel(people=8, sites=30)
    model = fit(panel)
    subset = panel.select(samples=np.array([5, 2]))
    found = model.log_likelihood(subset, leave_one_out=True)
    for person, at in ((5, 0), (2, 2)):
        others = np.delete(np.arange(16), [2 * person, 2 * person + 1])
        rest = panel.alleles_nl()[others]
        words = panel_from_alleles(rest.T, panel.sites.position_bp, panel.sites.contig, list("abcdefg")).bits_lw
        expected = haplotype_hmm.log_likelihood(
            words, 14, subset.alleles_nl()[at : at + 2], model.switch_l(), model.mismatch_l, implementation="reference"
        )
        np.testing.assert_allclose(found[at : at + 2], expected, atol=1e-5)
    assert (model.log_likelihood(subset) > found + 1).all()  # with themselves to copy they are likely
    strangers = replace(subset, samples=replace(subset.samples, ids=["p5", "stranger"]))
    with pytest.raises(InputError, match="people of the reference"):
        model.log_likelihood(strangers, leave_one_out=True)
    with pytest.raises(InputError, match="alleles that these people have"):
        model.log_likelihood(replace(subset, bits_lw=subset.bits_lw ^ np.uint64(1)), leave_one_out=True)


def test_person_k_depends_on_model_seed_and_k_only():
    model = fit(small_panel())
    whole = model.sample(10, seed=3)
    assert whole.samples.ids[0] == "SYN000000000"
    assert whole.n_haplotypes == 20
    parts = [model.sample(3, seed=3, start=7), model.sample(2, seed=3), model.sample(5, seed=3, start=2)]
    order = [parts[1], parts[2], parts[0]]
    assert [name for part in order for name in part.samples.ids] == whole.samples.ids
    assert np.array_equal(np.concatenate([part.alleles_nl() for part in order]), whole.alleles_nl())
    assert [g for part in order for g in part.samples.group] == whole.samples.group.tolist()
    assert not np.array_equal(model.sample(10, seed=4).bits_lw, whole.bits_lw)
    listed = model.sample(10, seed=3, groups=whole.samples.group.tolist())
    assert equal(listed, whole)  # asking for the drawn groups gives the same people


def test_paths_follow_their_law():
    """Switches, donors and flips have the probabilities that the model states, within five standard errors."""
    panel = small_panel(people=30, sites=40)
    model = fit(panel, LiStephensConfig(ne=60_000, mismatch=0.02, sampler="independent"))
    people = 3_000
    paths, group_n = model.paths(people, groups="south", seed=1)
    assert (group_n == model.group_names.index("south")).all()
    south = panel.groups()["south"]
    assert set(np.unique(paths.segment_donor_s)) == set(south)
    counts = np.bincount(paths.segment_donor_s, minlength=60)[south]
    expected = len(paths.segment_donor_s) / len(south)
    assert ((counts - expected) ** 2 / expected).sum() < len(south) + 5 * np.sqrt(2 * len(south))
    starts = np.bincount(paths.segment_start_s, minlength=40) / (2 * people)
    r = 1 - np.exp(-4 * 60_000 * 5_000 * 2e-8 / len(south))
    assert 0.1 < r < 0.9
    law = np.full(40, r)
    law[[0, 20]] = 1
    error = np.sqrt(law * (1 - law) / (2 * people))
    assert (np.abs(starts - law) <= 5 * error).all()
    flips = np.bincount(paths.flip_site_f, minlength=40) / (2 * people)
    assert (np.abs(flips - 0.02) < 5 * np.sqrt(0.02 * 0.98 / (2 * people))).all()


def test_samples_copy_only_donors_of_their_group_and_flip_at_the_stated_rate():
    panel = small_panel(people=24, sites=64)
    alleles_ln = np.zeros((64, 48), np.uint8)
    alleles_ln[:, 16:] = 1  # north is all REF, south all ALT
    panel = replace(panel, bits_lw=panel_from_alleles(alleles_ln, np.arange(64) + 1, "1", panel.samples.ids).bits_lw)
    made = fit(
        replace(panel, sites=replace(panel.sites, position_cm=None)),
        LiStephensConfig(mismatch=0.01, sampler="independent"),
    ).sample(500)
    share = {group: made.alleles_nl()[index].mean() for group, index in made.groups().items()}
    assert share["north"] == pytest.approx(0.01, abs=0.004)
    assert share["south"] == pytest.approx(0.99, abs=0.004)
    proportions = np.mean(made.samples.group == "north")
    assert proportions == pytest.approx(8 / 24, abs=5 * np.sqrt(2 / 9 / 500))
    pooled = fit(panel, LiStephensConfig(per_group=False, mismatch=0))
    assert pooled.group_names == ["all"]
    assert 0.5 < pooled.sample(200).alleles_nl().mean() < 0.8  # of all 48 donors, 32 are ALT


def test_split_multiallelics_are_not_inverted():
    panel = small_panel(people=20, sites=40)
    alt_index = np.zeros(40, np.int16)
    alt_index[[4, 5]] = 1, 2
    model = fit(
        replace(panel, sites=replace(panel.sites, alt_index=alt_index)),
        LiStephensConfig(mismatch=0.3, sampler="independent"),
    )
    paths, _ = model.paths(200)
    hit = np.bincount(paths.flip_site_f, minlength=40)
    assert hit[4] == hit[5] == 0
    assert (np.delete(hit, [4, 5]) > 50).all()


def private_panel(people: int = 40, groups=("north", "south")):
    """Person i alone carries the rare allele of sites i and people + i (there REF is the rare one), homozygous where i is
    even; the next sites are carried by two people, the next by nobody; then some that vary."""
    own = np.zeros((people, 2 * people), dtype=np.uint8)
    for i in range(people):
        own[i, 2 * i : 2 * i + 1 + (i % 2 == 0)] = 1
    pairs = own[0::2] | own[1::2]
    common = np.random.default_rng(1).integers(0, 2, (40, 2 * people), dtype=np.uint8)
    alleles_ln = np.concatenate([own, 1 - own, pairs, np.zeros((10, 2 * people), dtype=np.uint8), common])
    return panel_from_alleles(
        alleles_ln, np.arange(len(alleles_ln)) * 5_000 + 1, "1", [f"p{i}" for i in range(people)],
        group=[groups[i % 2] for i in range(people)], position_cm=np.arange(len(alleles_ln)) * 1e-2,
    )  # fmt: skip


def test_what_one_person_carries_arises_anew_and_is_not_copied():
    people, n = 40, 3_000
    panel = private_panel(people)
    model = fit(panel, LiStephensConfig(ne=10_000, mismatch=0.0))
    rare = model.rare
    assert rare.common_l.tolist() == [0] * people + [1] * people + [-1] * 20 + [0] * 10 + [-1] * 40
    assert rare.new_site_r.tolist() == [*range(2 * people), *range(2 * people + 20, 2 * people + 30)]
    carried = people * 1.5 / 2 * 2  # by the haplotypes of a group: 1 or 2 of each of its people, at two sites
    by_group = [2 * 2 * 20, 2 * 1 * 20]  # even people are homozygous and the first group's
    assert sum(by_group) == 2 * carried
    np.testing.assert_allclose(rare.rate_g, np.array(by_group) / (people * 90))
    paths, group_n = model.paths(n, seed=1)
    alleles_ln = panel_of(model.materialise(paths), 2 * n)
    other_ln = alleles_ln[rare.new_site_r] != rare.common_l[rare.new_site_r, None]
    for g, rate in enumerate(rare.rate_g):
        of_group = other_ln[:, np.repeat(group_n, 2) == g]
        deviation = np.sqrt(rate / of_group.size)
        assert of_group.mean() == pytest.approx(rate, abs=4 * deviation)
        assert of_group[80:].mean() == pytest.approx(rate, abs=4 * np.sqrt(rate / of_group[80:].size)), (
            "nobody's sites too"
        )
    # who copies person i at i's site has the allele no more often than others of the group; by seeds, because rounds deal the
    # sites their counts once for each seed
    more = []
    for seed in range(1, 13):
        some, some_group_n = model.paths(200, seed=seed)
        made_ln = panel_of(model.materialise(some), 400)[:people] != rare.common_l[:people, None]
        own_ln = np.stack([donors_at(some, site, 400) for site in range(people)]) // 2 == np.arange(people)[:, None]
        group_ln = np.repeat(some_group_n, 2)[None] == (np.arange(people) % 2)[:, None]
        assert group_ln[own_ln].all()
        more.append(made_ln[own_ln].mean() - made_ln[group_ln & ~own_ln].mean())
    assert abs(np.mean(more)) < 4 * np.std(more) / np.sqrt(len(more))
    # what two people carry is copied
    pair_ln = alleles_ln[2 * people : 2 * people + 20]
    first = np.stack([donors_at(paths, 2 * people + j, 2 * n) for j in range(20)])
    np.testing.assert_array_equal(
        pair_ln, panel_of(panel.bits_lw, 2 * people)[2 * people + np.arange(20)[:, None], first]
    )


def test_rare_alleles_are_copied_where_that_is_asked_for_and_split_sites_get_none():
    panel = private_panel()
    copied = fit(panel, LiStephensConfig(ne=10_000, mismatch=0.0, min_carriers=1, sampler="independent"))
    assert (copied.rare.common_l == -1).all()
    paths, _ = copied.paths(50, seed=1)
    donor_ln = np.stack([donors_at(paths, site, 100) for site in range(panel.n_sites)])
    expected = np.take_along_axis(panel_of(panel.bits_lw, panel.n_haplotypes), donor_ln, axis=1)
    np.testing.assert_array_equal(panel_of(copied.materialise(paths), 100), expected)
    assert (fit(panel, LiStephensConfig(min_carriers=3)).rare.common_l[80:100] == 0).all()
    split = replace(
        panel, sites=replace(panel.sites, alt_index=np.repeat([1, 0], [80, panel.n_sites - 80]).astype(np.int16))
    )
    rare = fit(split).rare
    assert (rare.common_l[:40] == 0).all(), "one ALT of several is not copied"
    assert (rare.common_l[40:80] == -1).all(), "a rare REF says nothing of which ALT is common"
    assert rare.new_site_r.tolist() == [*range(100, 110)]


def panel_of(bits_lw, n):
    return np.unpackbits(bits_lw.view(np.uint8), axis=1, bitorder="little")[:, :n]


def donors_at(paths, site, n):
    """Donor of each haplotype at a site."""
    found = []
    for k in range(n):
        part = slice(paths.segment_offset_n[k], paths.segment_offset_n[k + 1])
        at = np.searchsorted(paths.segment_start_s[part], site, side="right") - 1
        found.append(paths.segment_donor_s[part][at])
    return np.array(found)


def test_materialised_by_blocks_is_the_same():
    model = fit(small_panel())
    paths, _ = model.paths(40, seed=2)
    whole = model.materialise(paths)
    parts = [model.materialise(paths, a, b) for a, b in ((0, 1), (1, 64), (64, 100), (100, None))]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(whole, model.sample(40, seed=2).bits_lw)


def test_what_cannot_be_a_reference_is_refused():
    panel = small_panel()
    with pytest.raises(InputError, match=r"phased panel as reference.*SHAPEIT5"):
        fit(replace(panel, phased=False))
    alleles_ln = panel.alleles_nl().T.copy()
    alleles_ln[3, 4] = 255
    missing = panel_from_alleles(alleles_ln, panel.sites.position_bp, panel.sites.contig, panel.samples.ids)
    with pytest.raises(InputError, match=r"1 missing alleles.*impute"):
        fit(missing)
    with pytest.raises(InputError, match="do not fall"):
        fit(replace(panel, sites=replace(panel.sites, position_cm=-panel.sites.position_cm)))
    with pytest.raises(UsageError, match="'north'"):
        fit(panel, LiStephensConfig(group_ne={"nort": 1e4}))
    model = fit(panel)
    with pytest.raises(UsageError, match=r"got 'NORHT'; try: 'north'"):
        model.sample(1, groups="NORHT")
    with pytest.raises(UsageError, match="one group for each of 3"):
        model.sample(3, groups=["north"])


def test_a_missing_map_is_stated_and_one_cm_per_mb():
    panel = small_panel()
    model = fit(replace(panel, sites=replace(panel.sites, position_cm=None)))
    assert any("1 cM per Mb" in text for text in model.warnings)
    assert model.distance_l[1] == pytest.approx(5_000 * 1e-8)
    assert not any("cM" in text for text in fit(panel).warnings)


def test_haploid_people_in_the_reference():
    alleles_ln = (np.random.default_rng(0).random((10, 5)) < 0.5).astype(np.uint8)
    panel = panel_from_alleles(
        alleles_ln, np.arange(10) * 1000 + 1, "X", ["f", "m", "g"], first_haplotype=np.array([0, 2, 3, 5])
    )
    model = fit(panel)
    assert model.k == 5
    assert model.sample(3).n_haplotypes == 6
    assert model._own_haplotypes(panel, np.arange(10)).tolist() == [[0, 1], [0, 1], [2, -1], [3, 4], [3, 4]]


def test_config_files_name_the_nearest_key(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("ne: 1000\nmissmatch: 0.1\n")
    with pytest.raises(UsageError, match="'missmatch'; try: 'mismatch'"):
        li_stephens.load_config(path)
    path.write_text("ne: 1000\n")
    config = li_stephens.load_config(path, ["mismatch=0.01", "group_ne.north=5e4"])
    assert (config.ne, config.mismatch, config.group_ne) == (1000, 0.01, {"north": 5e4})
    with pytest.raises(UsageError, match="mismatch"):
        li_stephens.load_config(None, ["mismatch=0.7"])


def test_run_folder_round_trip_and_strict_loading(tmp_path):
    model = fit(small_panel(), LiStephensConfig(ne=12_345, group_ne={"north": 5_000}, seed=7))
    run = tmp_path / "run"
    model.save(run)
    again = li_stephens.load(run)
    assert again.config == model.config
    assert equal(again.sample(5, seed=1), model.sample(5, seed=1))
    assert again.sites.alt.tolist() == model.sites.alt.tolist()
    targets = small_panel(people=3, seed=8)
    assert np.array_equal(again.log_likelihood(targets), model.log_likelihood(targets))
    record = json.loads((run / "provenance.json").read_text())
    assert record["command"] == "genomics fit"
    assert record["config"]["ne"] == 12_345
    with pytest.raises(UsageError, match="does not exist yet"):
        model.save(run)

    arrays_path, sums_path = (
        run / "checkpoints/step-000000" / name for name in ("model.safetensors", "checksums.json")
    )
    content = arrays_path.read_bytes()
    arrays_path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptRun, match="checksum"):
        li_stephens.load(run)
    arrays_path.write_bytes(content)
    arrays = load_file(arrays_path)
    arrays["surplus"] = arrays.pop("mismatch_l")
    save_file(arrays, arrays_path)
    sums = json.loads(sums_path.read_text())
    sums_path.write_text(json.dumps({**sums, "model.safetensors": provenance.sha256(arrays_path)}))
    with pytest.raises(CorruptRun, match=r"missing \['mismatch_l'\], unexpected \['surplus'\]"):
        li_stephens.load(run)
    with pytest.raises(CorruptRun):
        li_stephens.load(tmp_path / "nothing")


def test_chr15_leave_one_out_is_near_the_anchor(real_data):
    """All 4,006 haplotypes as panel, Ne 320k, mismatch 2e-4, b37 map: held-out people get -168 nats; so do train's
    own."""
    folder = real_data / "genomics"
    panel = read_panel(
        folder / "chr15_10k/train.bcf",
        map=folder / "maps/b37/chr15.b37.gmap.gz",
        samples_tsv=folder / "chr15_10k/samples.tsv",
    )
    model = fit(panel)
    assert (model.k, model.n_sites) == (4006, 10_000)
    assert model.warnings == []
    some = panel.select(samples=np.arange(0, 2003, 40))
    nats = model.log_likelihood(some, leave_one_out=True)
    sem = nats.std(ddof=1) / np.sqrt(len(nats))
    assert abs(nats.mean() + 168.4) < 4 * sem
    assert sem < 8
    # float32 state against the float64 definition: 1e-4 nats per 1,000 sites
    own = model._own_haplotypes(some, np.arange(10_000))[:1]
    arguments = model.bits_lw, 4006, some.alleles_nl()[:1], model.switch_l(), model.mismatch_l
    exact = haplotype_hmm.log_likelihood(*arguments, exclude_ne=own, implementation="reference")
    assert abs(exact[0] - nats[0]) < 1e-3
