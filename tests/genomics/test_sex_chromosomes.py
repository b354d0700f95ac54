"""X through the copying model: whole haplotypes as reference, men of one allele outside PAR in what is sampled."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from engine.errors import InputError, UsageError
from engine.genomics import commands, sex_chromosomes
from engine.genomics.li_stephens import LiStephensConfig, fit, load
from engine.genomics.panel import panel_from_alleles, read_panel
from engine.genomics.reference import as_reference
from engine.genomics.sex_chromosomes import complete, draw_sexes, male_share, with_sexes

POSITION = np.array([1_000_000, 2_000_000, 50_000_000, 60_000_000, 155_100_000])
OUTSIDE = [False, False, True, True, False]


def people_on_x(n: int = 40):
    """People of two groups, a quarter and three quarters of them men, with alleles at random."""
    rng = np.random.default_rng(0)
    group = np.repeat(["A", "B"], n // 2)
    sex = np.where(np.arange(n) % 4 < np.where(group == "A", 1, 3), "male", "female")
    made = panel_from_alleles(
        rng.integers(0, 2, (5, 2 * n)).astype(np.uint8), POSITION, "chrX", [f"p{i}" for i in range(n)], group=group,
        assembly="GRCh37",
    )  # fmt: skip
    return with_sexes(made, sex)


def test_the_reference_is_whole_haplotypes():
    panel = people_on_x()
    assert panel.hemizygous[0].tolist() == OUTSIDE
    whole = complete(panel)
    male = panel.samples.sex == "male"
    assert np.diff(whole.samples.first_haplotype).tolist() == np.where(male, 1, 2).tolist()
    kept = np.ones(80, dtype=bool)
    kept[2 * np.flatnonzero(male) + 1] = False
    np.testing.assert_array_equal(whole.alleles_nl(), panel.alleles_nl()[kept])
    assert whole.missing_lw is None
    assert whole.samples.sex.tolist() == panel.samples.sex.tolist()
    assert complete(whole) is whole


def test_selections_keep_who_has_one_allele_where():
    panel = people_on_x()
    some = panel.select(sites=[2, 4], samples=[0, 1, 30])
    assert some.hemizygous[0].tolist() == [True, False]
    assert some.hemizygous[1].tolist() == [True, False, True]
    np.testing.assert_array_equal(some.alleles_nl(), panel.alleles_nl()[np.ix_([0, 1, 2, 3, 60, 61], [2, 4])])
    assert panel.select(sites=[0, 1]).hemizygous is None


def test_sexes_are_drawn_by_the_shares_of_the_groups():
    model = fit(as_reference(people_on_x()), LiStephensConfig())
    assert male_share(model).tolist() == [0.25, 0.75]
    groups = np.array(["A", "B"] * 2_000)
    sex = draw_sexes(model, groups, seed=1, start=0)
    for name, p in (("A", 0.25), ("B", 0.75)):
        assert abs((sex[groups == name] == "male").mean() - p) < 4 * np.sqrt(p * (1 - p) / 2_000)
    assert (draw_sexes(model, groups[10:20], seed=1, start=10) == sex[10:20]).all()
    assert set(draw_sexes(model, groups, seed=1, start=0, sex="female")) == {"female"}
    mixed = draw_sexes(model, np.full(4_000, "A+B"), seed=2, start=0)
    assert abs((mixed == "male").mean() - 0.5) < 4 * np.sqrt(0.25 / 4_000)
    with pytest.raises(UsageError, match="'female'"):
        draw_sexes(model, groups, seed=1, start=0, sex="femal")
    unknown = fit(as_reference(people_on_x().select(sites=[0, 1])), LiStephensConfig())
    assert draw_sexes(unknown, groups, seed=1, start=0) is not None


def test_a_model_of_x_without_sexes_asks_for_them():
    panel = panel_from_alleles(np.ones((5, 8), dtype=np.uint8), POSITION, "X", list("abcd"), assembly="GRCh37")
    model = fit(panel, LiStephensConfig())
    with pytest.raises(InputError, match="--sex female"):
        draw_sexes(model, np.array(["all"]), seed=0, start=0)


@pytest.fixture(scope="module")
def x_run(tmp_path_factory, real_data):
    run = tmp_path_factory.mktemp("x") / "run"
    told = commands.fit_command(
        real_data / "genomics/genomewide_1126/1KG_phase3_subset_chrX.vcf.gz", out=run, group_column="super_pop",
        samples=real_data / "genomics/panel/integrated_call_samples_v3.20130502.ALL.panel", overrides=["ne=20000"],
    )  # fmt: skip
    assert told["haplotypes"] == 2 * 1126 - 551
    assert sum("one allele at 1057 sites of X outside PAR (GRCh37)" in each for each in told["warnings"]) == 1
    return run


@pytest.mark.parametrize("suffix", [".bcf", ".vcf.gz", ".pgen"])
def test_real_x_from_fit_to_file(tmp_path, x_run, suffix):
    out = tmp_path / f"made{suffix}"
    told = commands.sample_command(x_run, 80, seed=4, out=out)
    made = read_panel(out, samples_tsv=tmp_path / f"made{suffix}.samples.tsv")
    male = made.samples.sex == "male"
    assert 20 < male.sum() < 60
    np.testing.assert_array_equal(made.hemizygous[1], male)
    assert made.hemizygous[0].sum() == 1057
    assert told["people"] == 80
    again = load(x_run).sample(80, seed=4)  # what the model gives, but for what men do not have
    kept = made.alleles_nl() != 255
    np.testing.assert_array_equal(made.alleles_nl()[kept], again.alleles_nl()[kept])
    assert (~kept).sum() == male.sum() * 1057
    if suffix == ".pgen":
        command = ["plink2", "--pfile", tmp_path / "made", "--validate", "--freq", "--out", tmp_path / "p"]
    else:
        listed = subprocess.run(
            ["bcftools", "query", "-f", "%POS[ %GT]\n", out], capture_output=True, text=True, check=True
        )
        outside = [
            row.split()[1:] for row in listed.stdout.splitlines() if 2_699_520 < int(row.split()[0]) < 154_931_044
        ]
        assert all(("|" in call) != man for row in outside for call, man in zip(row, male.tolist()))
        command = ["bcftools", "stats", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "arning" not in done.stderr + (done.stdout if suffix == ".pgen" else "")


def test_shards_of_x_join_into_what_one_job_writes(tmp_path, x_run):
    for suffix in (".bcf", ".pgen"):
        commands.sample_command(x_run, 21, seed=4, out=tmp_path / f"one{suffix}")
        for index in range(2):
            commands.sample_command(x_run, 21, seed=4, out=tmp_path / f"two{suffix}", shard=(index, 2))
        commands.finish_command(tmp_path / f"two{suffix}", 2)
        one, two = (read_panel(tmp_path / f"{name}{suffix}") for name in ("one", "two"))
        np.testing.assert_array_equal(one.alleles_nl(), two.alleles_nl())
        assert one.samples.sex.tolist() == two.samples.sex.tolist()
        tables = [(tmp_path / f"{name}{suffix}.samples.tsv").read_text() for name in ("one", "two")]
        assert tables[0] == tables[1]
    with pytest.raises(UsageError, match="--shard-by people"):
        commands.sample_command(x_run, 21, out=tmp_path / "three.bcf", shard=(0, 2), shard_by="sites")


def test_x_is_scored_and_evaluated_on_whole_haplotypes(tmp_path, x_run, real_data):
    commands.sample_command(x_run, 60, seed=4, sex="male", out=tmp_path / "made.bcf")
    assert set(read_panel(tmp_path / "made.bcf").samples.sex) == {"male"}
    assert commands.score_command(x_run, tmp_path / "made.bcf")["haplotypes"] == 60
    real = real_data / "genomics/genomewide_1126/1KG_phase3_subset_chrX.vcf.gz"
    told = commands.score_command(x_run, real, leave_one_out=True)
    assert told["haplotypes"] == 1701
    assert -400 < told["mean_nats"] < -20
    found = {each["name"]: each for each in commands.evaluate_command(real, tmp_path / "made.bcf")["findings"]}
    assert found["af_r"]["value"] > 0.97
    assert found["ld_r"]["n"] == {"real": 1701, "synthetic": 60}


def test_linkage_across_the_boundary_of_par_is_kept():
    """A site on each side of it, equal in all haplotypes: a mosaic that broke there would part them."""
    alleles = np.repeat(np.array([[0, 1] * 30], dtype=np.uint8), 2, axis=0)
    panel = panel_from_alleles(
        alleles, np.array([2_699_000, 2_700_000]), "X", [f"p{i}" for i in range(30)], assembly="GRCh37",
        position_cm=np.array([0.0, 1e-9]),
    )  # fmt: skip
    model = fit(as_reference(with_sexes(panel, np.array(["male", "female"] * 15))), LiStephensConfig(mismatch=0.0))
    made = with_sexes(model.sample(50, seed=1), np.full(50, "male"))
    alleles_nl = made.alleles_nl()
    assert sex_chromosomes.has_x(model)
    np.testing.assert_array_equal(alleles_nl[0::2, 0], alleles_nl[0::2, 1])
    assert (alleles_nl[1::2, 1] == 255).all()
