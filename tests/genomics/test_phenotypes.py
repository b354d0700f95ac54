"""Phenotypes: variances by hand and by regression, plink2 on the outputs, people sampled by status and score."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from scipy import stats

from engine.errors import InputError, UsageError
from engine.genomics import commands, people, phenotypes
from engine.genomics.li_stephens import LiStephensConfig, fit
from engine.genomics.panel import panel_from_alleles, read_panel, write_panel, write_samples
from engine.genomics.people import Request
from engine.genomics.phenotype_command import phenotype_command


def blocks(people_n: int, sites: int = 300, seed: int = 0):
    """Phased people of two groups at sites in short blocks of LD, frequencies 0.05 to 0.6."""
    rng = np.random.default_rng(seed)
    ancestor = (
        np.random.default_rng(9).random((8, sites)) < np.random.default_rng(8).uniform(0.05, 0.6, sites)
    ).astype(np.uint8)
    pick = np.repeat(rng.integers(0, 8, (2 * people_n, sites // 5)), 5, axis=1)
    alleles_nl = ancestor[pick, np.arange(sites)]
    noise_nl = rng.random(alleles_nl.shape) < 0.1
    alleles_nl = np.where(noise_nl, rng.random(alleles_nl.shape) < 0.3, alleles_nl).astype(np.uint8)
    return panel_from_alleles(
        alleles_nl.T, np.arange(sites) * 3_000 + 1_000, "21", [f"p{seed}_{i}" for i in range(people_n)],
        group=["A"] * (people_n // 3) + ["B"] * (people_n - people_n // 3), id=[f"rs{i}" for i in range(sites)],
        position_cm=np.arange(sites) * 0.05, contig_length={"21": 48_129_895}, assembly="GRCh37",
    )  # fmt: skip


def plink2(*arguments) -> str:
    told = subprocess.run(["plink2", *map(str, arguments)], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "Warning" not in told.stdout + told.stderr, told.stdout + told.stderr
    return told.stdout


def test_a_score_by_hand():
    """Two causal sites; dosages 0/1/2 and effects by allele, REF counted for one of them; a missing call counts as 2p."""
    alleles_ln = np.array([[0, 0, 0, 1, 1, 1, 255, 0], [1, 1, 0, 0, 1, 0, 0, 0]], dtype=np.uint8)
    panel = panel_from_alleles(alleles_ln, np.array([10, 20]), "1", list("abcd"), id=["rs1", "rs2"])
    dosage = phenotypes.dosage_sc(panel, np.array([0, 1]))
    np.testing.assert_array_equal(dosage, [[0, 2], [1, 0], [2, 1], [np.nan, 0]])
    trait = phenotypes.Trait(["1", "1"], [10, 20], ["rs1", "rs2"], ["A", "A"], ["G", "G"], np.array([0.5, -1.0]),
                             np.array([0.3, 0.25]), 0.4)  # fmt: skip
    expected = [0.5 * (0 - 0.6) - (2 - 0.5), 0.5 * 0.4 + 0.5, 0.5 * 1.4 - 0.5, 0.5]
    np.testing.assert_allclose(trait.score(dosage), expected)
    assert trait.noise_sd == pytest.approx(np.sqrt(0.6))


def test_effects_of_a_table_are_per_allele_of_a1(tmp_path):
    panel = blocks(100)
    (tmp_path / "e.tsv").write_text("id\ta1\tbeta\nrs3\tG\t0.2\nrs50\tA\t0.1\n")
    trait = phenotypes.trait_from_effects(panel, tmp_path / "e.tsv")
    np.testing.assert_allclose(trait.effect_c, [0.2, -0.1])
    made = trait.score(phenotypes.dosage_sc(panel, np.array([3, 50])))
    assert trait.heritability == pytest.approx(made.var())
    scaled = phenotypes.trait_from_effects(panel, tmp_path / "e.tsv", heritability=0.3)
    assert scaled.score(phenotypes.dosage_sc(panel, np.array([3, 50]))).var() == pytest.approx(0.3)
    np.testing.assert_allclose(scaled.effect_c[1] / scaled.effect_c[0], -0.5)
    (tmp_path / "p.tsv").write_text("chrom,pos,ref,alt,beta\nchr21,10000,A,G,0.2\nchr21,151000,A,G,-0.1\n")
    np.testing.assert_allclose(phenotypes.trait_from_effects(panel, tmp_path / "p.tsv").effect_c, [0.2, -0.1])
    for rows, why in (
        ("id\tbeta\nrs3\tx\n", "a site and an effect"), ("id\tbeta\nnone\t1\n", "none for 'none'"), ("a\tb\n", "columns id"),
        ("id\ta1\tbeta\nrs3\tT\t1\n", "allele A or G"), ("id\tbeta\nrs3\t1\nrs3\t1\n", "one twice"),
        ("id\tbeta\n", "at least one"),
    ):  # fmt: skip
        (tmp_path / "f.tsv").write_text(rows)
        with pytest.raises(InputError, match=why):
            phenotypes.trait_from_effects(panel, tmp_path / "f.tsv")


@pytest.mark.parametrize("heritability", [0.2, 0.8])
def test_heritability_is_recovered_by_regression(heritability):
    """Slope of the liability on the score is 1 and its R2 the heritability, within 99.9 % of their sampling error."""
    panel = blocks(3_000)
    trait = phenotypes.draw_trait(panel, causal=40, heritability=heritability, seed=3)
    made = phenotypes.simulate(panel, trait, seed=4)
    assert made.score_s.var() == pytest.approx(heritability)
    assert made.score_s.mean() == pytest.approx(0, abs=1e-9)
    found = stats.linregress(made.score_s, made.liability_s)
    assert abs(found.slope - 1) < 3.3 * found.stderr
    error = 2 * np.sqrt(heritability) * (1 - heritability) / np.sqrt(3_000)  # of R2
    assert abs(found.rvalue**2 - heritability) < 3.3 * error


def test_effects_follow_the_frequency_as_alpha_says():
    panel = blocks(1_000)
    for alpha in (-1.0, 0.0):
        trait = phenotypes.draw_trait(panel, causal=250, alpha=alpha, seed=1)
        p = trait.frequency_c
        assert ((np.minimum(p, 1 - p)) >= 0.01).all()
        other = phenotypes.draw_trait(panel, causal=250, alpha=0.0, seed=1)
        ratio = trait.effect_c / other.effect_c
        np.testing.assert_allclose(ratio / ratio[0], ((p * (1 - p)) / (p[0] * (1 - p[0]))) ** (alpha / 2))


def test_prevalence_covariates_and_ascertainment():
    panel = blocks(4_000)
    age = np.random.default_rng(2).normal(60, 9, 4_000)
    trait = phenotypes.draw_trait(
        panel, causal=60, heritability=0.4, prevalence=0.1, covariate_effect={"age": 0.5}, seed=1
    )
    assert trait.noise_sd == pytest.approx(np.sqrt(1 - 0.4 - 0.25))
    made = phenotypes.simulate(panel, trait, covariates={"age": age}, seed=2)
    assert abs(made.case_s.mean() - 0.1) < 4 * np.sqrt(0.09 / 4_000)
    slope = stats.linregress((age - age.mean()) / age.std(), made.liability_s)
    assert abs(slope.slope - 0.5) < 4 * slope.stderr
    chosen = phenotypes.ascertained(made, 0.5, seed=3)
    assert made.case_s[chosen].mean() == 0.5
    assert len(chosen) == 2 * made.case_s.sum()
    few = phenotypes.ascertained(made, 0.25, people=400, seed=3)
    assert (len(few), made.case_s[few].sum()) == (400, 100)
    with pytest.raises(UsageError, match=r"--people \d+"):
        phenotypes.ascertained(made, 0.5, people=3_999)
    with pytest.raises(UsageError, match="covariate 'age'"):
        phenotypes.simulate(panel, trait)
    with pytest.raises(UsageError, match="at most 1 together"):
        phenotypes.draw_trait(panel, heritability=0.8, covariate_effect={"age": 0.5})


def test_plink2_finds_the_causal_locus_and_gives_the_same_score(tmp_path):
    """GWAS of a quantitative and of an ascertained binary trait; plink2 --score on the effects file is our score."""
    panel = blocks(3_000)
    write_panel(panel, tmp_path / "p.pgen")
    (tmp_path / "e.tsv").write_text("id\tbeta\nrs122\t0.5\n")
    for name, more in (("q", {}), ("b", {"prevalence": 0.2, "case_fraction": 0.5})):
        told = phenotype_command(tmp_path / "p.pgen", out=tmp_path / f"{name}.tsv", effects=tmp_path / "e.tsv",
                                 heritability=0.15, seed=5, **more)  # fmt: skip
        assert told["causal"] == 1
        plink2("--pfile", tmp_path / "p", "--pheno", tmp_path / f"{name}.tsv", "--pheno-name", "PHENO", "--glm",
               "allow-no-covars", "--keep", tmp_path / f"{name}.tsv", "--out", tmp_path / name)  # fmt: skip
        (found,) = tmp_path.glob(f"{name}.PHENO.glm.*")
        lines = [line.split() for line in found.read_text().splitlines()]
        at, of = lines[0].index("P"), lines[0].index("ID")
        best = min((float(row[at]), row[of]) for row in lines[1:] if row[at] != "NA")
        assert best[0] < 5e-8
        assert abs(int(best[1][2:]) - 122) <= 4  # the site itself or one of its block of LD
    plink2("--pfile", tmp_path / "p", "--score", tmp_path / "q.tsv.effects.tsv", 5, 7, 9, "header", "cols=scoresums", "--out",
           tmp_path / "s")  # fmt: skip
    theirs = np.array([float(line.split()[-1]) for line in (tmp_path / "s.sscore").read_text().splitlines()[1:]])
    ours = np.array([float(line.split("\t")[3]) for line in (tmp_path / "q.tsv").read_text().splitlines()[1:]])
    np.testing.assert_allclose(theirs - theirs.mean(), ours - ours.mean(), atol=1e-4)


def test_the_trait_of_a_real_panel_holds_on_synthetic_people(tmp_path):
    """Fit, sample, same trait: heritability and effect of the locus survive, by plink2 on the synthetic people."""
    write_panel(blocks(600), tmp_path / "p.bcf")
    write_samples(blocks(600), tmp_path / "p.tsv")
    commands.fit_command(tmp_path / "p.bcf", samples=tmp_path / "p.tsv", out=tmp_path / "run", overrides=["ne=2000"])
    (tmp_path / "e.tsv").write_text("id\tbeta\nrs122\t0.5\n")
    phenotype_command(tmp_path / "p.bcf", out=tmp_path / "t.tsv", effects=tmp_path / "e.tsv", heritability=0.2)
    commands.sample_command(
        tmp_path / "run", 2_000, out=tmp_path / "m.pgen", seed=1, phenotype=tmp_path / "t.tsv.trait.json"
    )
    plink2("--pfile", tmp_path / "m", "--pheno", tmp_path / "m.pgen.pheno.tsv", "--pheno-name", "PHENO", "--glm",
           "allow-no-covars", "--out", tmp_path / "g")  # fmt: skip
    lines = [line.split() for line in (tmp_path / "g.PHENO.glm.linear").read_text().splitlines()]
    columns = {name: at for at, name in enumerate(lines[0])}
    hit = next(row for row in lines[1:] if row[columns["ID"]] == "rs122")
    effect = phenotypes.load_trait(tmp_path / "t.tsv.trait.json").effect_c[0]
    beta = float(hit[columns["BETA"]]) * (1 if hit[columns["A1"]] == "G" else -1)
    assert abs(beta - effect) < 4 * float(hit[columns["SE"]])
    assert float(hit[columns["P"]]) == min(float(row[columns["P"]]) for row in lines[1:] if row[columns["P"]] != "NA")


@pytest.fixture(scope="module")
def setting():
    panel = blocks(300)
    model = fit(panel, LiStephensConfig(ne=2_000))
    trait = phenotypes.draw_trait(panel, causal=12, heritability=0.6, prevalence=0.05, seed=2)
    return model, trait


def test_sampled_cases_are_the_cases_of_the_model(setting):
    """Rejection against brute force: risk-allele frequencies and scores of cases among 8,000 people drawn without a wish."""
    model, trait = setting
    population = people.draw(model, 8_000, Request(trait=trait), seed=1)
    is_case = population.phenotypes.case_s
    rows = trait.rows(model.sites)
    asked = Request(trait=trait, case_fraction=1.0)
    cases = people.draw(model, 500, asked, seed=2)
    assert cases.phenotypes.case_s.all()
    (accepted, candidates) = cases.judged["cases"]
    assert accepted / candidates == pytest.approx(is_case.mean(), abs=0.01)
    whole = people.panel_of(model, people.take(population, np.flatnonzero(is_case)), asked)
    made = people.panel_of(model, cases, asked, seed=2)
    brute, ours = (phenotypes.dosage_sc(each, rows) for each in (whole, made))
    everybody = phenotypes.dosage_sc(people.panel_of(model, people.take(population, np.arange(2_000)), asked), rows)
    error = np.sqrt(brute.var(axis=0) / len(brute) + ours.var(axis=0) / len(ours))
    assert (np.abs(brute.mean(axis=0) - ours.mean(axis=0)) < 4 * error + 1e-9).all()
    assert np.abs(everybody.mean(axis=0) - ours.mean(axis=0)).max() > 8 * error.max() / 2  # and not those of everybody
    np.testing.assert_allclose(trait.score(ours), cases.phenotypes.score_s)
    assert stats.ks_2samp(cases.phenotypes.liability_s, population.phenotypes.liability_s[is_case]).pvalue > 1e-3
    assert stats.ks_2samp(cases.phenotypes.score_s, population.phenotypes.score_s[is_case]).pvalue > 1e-3


def test_case_fraction_and_score_range(setting, monkeypatch):
    model, trait = setting
    half = people.draw(model, 41, Request(trait=trait, case_fraction=0.5), seed=3)
    assert half.phenotypes.case_s.tolist() == [bool(k % 2) for k in range(41)]
    assert half.phenotypes.ids == [f"SYN{k:09d}" for k in range(41)]
    accepted, candidates = half.judged["controls"]
    assert accepted / candidates > 0.8
    high = people.draw(model, 60, Request(trait=trait, score_range=(1.0, np.inf)), seed=3)
    sd = np.sqrt(trait.heritability)
    assert (high.phenotypes.score_s >= sd).all()
    population = people.draw(model, 6_000, Request(trait=trait), seed=9).phenotypes
    brute = population.liability_s[population.score_s >= sd]
    assert stats.ks_2samp(high.phenotypes.liability_s, brute).pvalue > 1e-3
    group = people.draw(model, 30, Request(group="A", trait=trait, case_fraction=1.0), seed=3)
    assert set(group.group_n.tolist()) == {"A"}
    monkeypatch.setattr(people, "MOST_ROUNDS", 2)
    with pytest.raises(UsageError, match="none of 8192 candidates was one for person 0"):
        people.draw(model, 1, Request(trait=trait, score_range=(60.0, 61.0)), seed=3)
    with pytest.raises(UsageError, match="quantitative"):
        people.draw(model, 1, Request(trait=phenotypes.draw_trait(blocks(50), causal=3), case_fraction=0.5))
    with pytest.raises(UsageError, match=r"--phenotype TRAIT\.json"):
        people.draw(model, 1, Request(case_fraction=0.5))


def test_a_conditioned_person_depends_on_model_request_seed_and_number_alone(setting):
    model, trait = setting
    for request in (
        Request(trait=trait, case_fraction=0.3),
        Request(trait=trait),
        Request(trait=trait, score_range=(0.5, 2.0)),
    ):
        whole = people.draw(model, 12, request, seed=4)
        parts = people.joined([people.draw(model, n, request, seed=4, start=at) for at, n in ((0, 5), (5, 1), (6, 6))])
        np.testing.assert_array_equal(whole.paths.segment_donor_s, parts.paths.segment_donor_s)
        np.testing.assert_array_equal(whole.phenotypes.liability_s, parts.phenotypes.liability_s)
        assert whole.phenotypes.ids == parts.phenotypes.ids


def test_commands_condition_and_shards_join(tmp_path):
    write_panel(blocks(200), tmp_path / "p.bcf")
    write_samples(blocks(200), tmp_path / "p.tsv")
    commands.fit_command(tmp_path / "p.bcf", samples=tmp_path / "p.tsv", out=tmp_path / "run", overrides=["ne=2000"])
    phenotype_command(tmp_path / "p.bcf", out=tmp_path / "t.tsv", causal=10, prevalence=0.1)
    asked = {"phenotype": tmp_path / "t.tsv.trait.json", "case_fraction": 0.5, "seed": 2}
    told = commands.sample_command(tmp_path / "run", 30, out=tmp_path / "one.bcf", **asked)
    assert told["cases"] == 15
    assert told["acceptance_cases"] < 0.3 < 0.7 < told["acceptance_controls"]
    for index in (1, 0):
        commands.sample_command(tmp_path / "run", 30, out=tmp_path / "two.bcf", shard=(index, 2), **asked)
    commands.finish_command(tmp_path / "two.bcf", 2)
    assert (tmp_path / "one.bcf.pheno.tsv").read_text() == (tmp_path / "two.bcf.pheno.tsv").read_text()
    np.testing.assert_array_equal(
        read_panel(tmp_path / "one.bcf").alleles_nl(), read_panel(tmp_path / "two.bcf").alleles_nl()
    )
    with pytest.raises(UsageError, match="an existing one"):
        phenotype_command(tmp_path / "p.bcf", out=tmp_path / "t.tsv")
    with pytest.raises(InputError, match="a trait that"):
        commands.sample_command(tmp_path / "run", 3, out=tmp_path / "x.bcf", phenotype=tmp_path / "p.tsv")
    write_panel(blocks(20).select(sites=slice(0, 5)), tmp_path / "few.bcf")
    with pytest.raises(InputError, match="causal sites of the trait"):
        phenotype_command(tmp_path / "few.bcf", out=tmp_path / "u.tsv", trait=tmp_path / "t.tsv.trait.json")
