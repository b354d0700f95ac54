"""The commands on files: fit, sample by shards, finish, score, evaluate; what lies beside each output."""

from __future__ import annotations

import json

import cyvcf2
import numpy as np
import pytest

from engine import provenance
from engine.errors import CorruptRun, InputError, UsageError
from engine.genomics import commands
from engine.genomics.panel import panel_from_alleles, read_panel, write_panel, write_samples


def panel(people: int = 40, seed: int = 0):
    rng = np.random.default_rng(seed)
    donor_kl = (np.random.default_rng(5).random((16, 60)) < 0.4).astype(np.uint8)
    path_nl = np.repeat(rng.integers(0, 16, (2 * people, 6)), 10, axis=1)
    alleles_nl = donor_kl[path_nl, np.arange(60)] ^ (rng.random((2 * people, 60)) < 0.01).astype(np.uint8)
    return panel_from_alleles(
        alleles_nl.T, np.arange(60) * 4_000 + 10_000, "21", [f"real{seed}_{i}" for i in range(people)],
        group=["A"] * (people // 4) + ["B"] * (people - people // 4), contig_length={"21": 48_129_895}, assembly="GRCh37",
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_panel(panel(), folder / "train.bcf")
    write_samples(panel(), folder / "train.tsv")
    write_panel(panel(people=20, seed=3), folder / "held_out.vcf.gz")
    write_samples(panel(people=20, seed=3), folder / "held_out.tsv")
    lines = [f"{bp} 21 {bp * 1.3e-6}" for bp in range(1, 400_001, 50_000)]
    (folder / "map.txt").write_text("\n".join(["pos chr cM", *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(files):
    told = []
    result = commands.fit_command(
        files / "train.bcf", map=files / "map.txt", samples=files / "train.tsv", config=None,
        overrides=["ne=20000", "mismatch=0.005"], out=files / "run", progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert result["haplotypes"] == 80
    assert result["sites"] == 60
    assert result["groups"] == {"A": 20, "B": 60}
    assert not any("map" in warning for warning in result["warnings"])
    assert told[-1][1] == told[-1][2]
    return files / "run"


def test_fit_writes_its_inputs_into_the_provenance(files, run):
    record = json.loads((run / "provenance.json").read_text())
    assert [entry["name"] for entry in record["inputs"]] == ["train.bcf", "map.txt", "train.tsv"]
    assert record["inputs"][0]["sha256"] == provenance.sha256(files / "train.bcf")
    assert "ne: 20000" in (run / "config.yaml").read_text()
    assert str(files) not in json.dumps(record)
    with pytest.raises(UsageError, match="does not exist yet"):
        commands.fit_command(files / "train.bcf", out=run)
    result = commands.fit_command(files / "train.bcf", out=files / "no_map")
    assert len([warning for warning in result["warnings"] if "no genetic map" in warning]) == 1


@pytest.mark.parametrize("suffix", [".bcf", ".vcf.gz", ".pgen"])
def test_sampled_files_hold_what_the_model_sampled(tmp_path, run, suffix):
    from engine.genomics import li_stephens

    out = tmp_path / f"made{suffix}"
    result = commands.sample_command(run, 30, seed=2, out=out)
    expected = li_stephens.load(run).sample(30, seed=2)
    made = read_panel(out, samples_tsv=tmp_path / f"made{suffix}.samples.tsv")
    assert np.array_equal(made.alleles_nl(), expected.alleles_nl())
    assert made.samples.ids == expected.samples.ids
    assert made.samples.group.tolist() == expected.samples.group.tolist()
    assert made.phased
    assert result["people"] == sum(result["groups"].values()) == 30
    record = json.loads((tmp_path / f"made{suffix}.provenance.json").read_text())
    assert record["synthetic_data"] is True
    assert record["seed"] == 2
    assert record["sha256"] == provenance.sha256(out)
    if suffix != ".pgen":
        header = cyvcf2.VCF(str(out)).raw_header
        assert "##engine_data=SYNTHETIC" in header
        assert "real0_" not in header
    with pytest.raises(UsageError, match="does not exist yet"):
        commands.sample_command(run, 30, seed=2, out=out)


def test_shards_join_to_the_whole_and_are_recognised(tmp_path, run):
    whole, out = tmp_path / "whole.bcf", tmp_path / "made.bcf"
    commands.sample_command(run, 11, seed=9, out=whole)
    with pytest.raises(InputError, match=r"no shard 0.*--shard 0/3"):
        commands.finish_command(out, 3)
    for index in (2, 0, 1):
        result = commands.sample_command(run, 11, seed=9, out=out, shard=(index, 3))
        assert not result["skipped"]
    assert commands.shard_path(out, 1, 3).name == "made.shard-0001-of-0003.bcf"
    stamp = commands.shard_path(out, 1, 3).stat().st_mtime_ns
    assert commands.sample_command(run, 11, seed=9, out=out, shard=(1, 3))["skipped"]
    assert commands.shard_path(out, 1, 3).stat().st_mtime_ns == stamp
    with pytest.raises(UsageError, match="existing"):  # another seed is another request
        commands.sample_command(run, 11, seed=8, out=out, shard=(1, 3))
    half_written = commands.shard_path(out, 2, 3)
    half_written.with_name(half_written.name + ".provenance.json").unlink()
    assert not commands.sample_command(run, 11, seed=9, out=out, shard=(2, 3))["skipped"]
    result = commands.finish_command(out, 3)
    assert result["people"] == 11
    one, other = read_panel(whole), read_panel(out)
    assert np.array_equal(one.bits_lw, other.bits_lw)
    assert one.samples.ids == other.samples.ids
    assert commands.read_groups(whole) == commands.read_groups(out)
    assert json.loads((tmp_path / "made.bcf.provenance.json").read_text())["sha256"] == provenance.sha256(out)


def test_finish_refuses_shards_of_different_requests(tmp_path, run):
    out = tmp_path / "made.bcf"
    commands.sample_command(run, 4, seed=1, out=out, shard=(0, 2))
    commands.sample_command(run, 4, seed=2, out=out, shard=(1, 2))
    with pytest.raises(InputError, match="seed 1"):
        commands.finish_command(out, 2)


def test_more_shards_than_people(tmp_path, run):
    out = tmp_path / "made.vcf.gz"
    for index in range(3):
        commands.sample_command(run, 2, seed=1, out=out, shard=(index, 3))
    assert commands.finish_command(out, 3)["people"] == 2
    assert read_panel(out).samples.ids == ["SYN000000000", "SYN000000001"]


def test_sample_refuses_bad_requests(tmp_path, run):
    with pytest.raises(UsageError, match=r"'C'; try"):
        commands.sample_command(run, 3, group="C", out=tmp_path / "x.bcf")
    with pytest.raises(UsageError, match=r"\.bcf"):
        commands.sample_command(run, 3, out=tmp_path / "x.txt")
    with pytest.raises(UsageError, match="shard"):
        commands.sample_command(run, 3, out=tmp_path / "x.bcf", shard=(3, 3))
    with pytest.raises(CorruptRun):
        commands.sample_command(tmp_path, 3, out=tmp_path / "x.bcf")
    assert list(tmp_path.iterdir()) == []


def test_score(files, run):
    result = commands.score_command(run, files / "held_out.vcf.gz")
    assert result["haplotypes"] == 40
    assert set(result) >= {"haplotypes", "mean_nats", "sem"}
    own = commands.score_command(run, files / "train.bcf")
    without = commands.score_command(run, files / "train.bcf", leave_one_out=True)
    assert own["mean_nats"] > without["mean_nats"] + 1
    spread = 5 * (without["sem"] + result["sem"])
    assert without["mean_nats"] == pytest.approx(result["mean_nats"], abs=spread)


def test_evaluate_writes_findings(tmp_path, files, run):
    commands.sample_command(run, 40, seed=1, out=tmp_path / "made.bcf")
    steps = []
    result = commands.evaluate_command(
        files / "held_out.vcf.gz", tmp_path / "made.bcf", train=files / "train.bcf", samples=files / "held_out.tsv",
        out=tmp_path / "evaluation", progress=lambda *step: steps.append(step),
    )  # fmt: skip
    names = {finding["name"] for finding in result["findings"]}
    assert names >= {"ld_r", "three_point_r", "pca_w1", "aats_test", "aats_train", "exact_copies", "longest_run_bp"}
    assert json.loads((tmp_path / "evaluation/evaluation.json").read_text()) == json.loads(json.dumps(result))
    record = json.loads((tmp_path / "evaluation/provenance.json").read_text())
    assert [entry["name"] for entry in record["inputs"]] == ["held_out.vcf.gz", "made.bcf", "train.bcf", "held_out.tsv"]
    assert steps[-1] == ("evaluating", 6, 6)
    per_group = next(f for f in result["findings"] if f["name"] == "pca_w1")["detail"]["per_group"]
    assert set(per_group) == {"A", "B"}


def test_chr22_phase1_from_file_to_score(tmp_path, real_data):
    folder = real_data / "genomics"
    source = folder / "chr22_1kg_phase1"
    result = commands.fit_command(
        source / "kg_p1_chr22.bcf", map=folder / "maps/b37/chr22.b37.gmap.gz", samples=source / "samples.tsv",
        out=tmp_path / "run",
    )  # fmt: skip
    assert (result["haplotypes"], result["sites"], len(result["groups"])) == (2184, 19_773, 14)
    made = commands.sample_command(tmp_path / "run", 12, group="FIN", out=tmp_path / "made.bcf")
    assert made["groups"] == {"FIN": 12}
    score = commands.score_command(tmp_path / "run", tmp_path / "made.bcf")
    assert score["haplotypes"] == 24
    # mosaics of the panel are likely under it, but not as likely as a copy would be: log(1/2184) and no switch
    assert -5_000 < score["mean_nats"] < np.log(1 / 2184)
    alleles = read_panel(tmp_path / "made.bcf").alleles_nl().mean(axis=0)
    finns = read_panel(source / "kg_p1_chr22.bcf", samples_tsv=source / "samples.tsv")
    finns = finns.select(samples=finns.samples.group == "FIN").alleles_nl().mean(axis=0)
    assert np.corrcoef(alleles, finns)[0, 1] > 0.95


def test_unphased_references_are_refused_in_one_line_that_says_what_to_do(tmp_path, real_data):
    odd = real_data / "genomics/odd"
    hint = r"1 of 203 people \(NA12878\); try: bcftools view -s \^NA12878 .*phase_common"
    with pytest.raises(InputError, match=hint) as told:
        commands.fit_command(odd / "chr20_unphased.bcf", out=tmp_path / "run")
    assert "\n" not in str(told.value)
    with pytest.raises(
        InputError, match=r"heterozygotes of \d+ of 203 people .*; try: phase_common --input .* --region 20"
    ):
        commands.fit_command(odd / "chr20_scaffold_missing.bcf", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
