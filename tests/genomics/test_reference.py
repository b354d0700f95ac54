"""What a panel must be before a model copies from it: phased, filled, of chromosomes that recombine; then end to end."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import numpy as np
import pytest

from engine.errors import InputError
from engine.genomics import commands
from engine.genomics.li_stephens import LiStephensConfig
from engine.genomics.panel import panel_from_alleles, read_panel
from engine.genomics.reference import as_reference
from engine.kernels import bits


def with_gaps(panel, share: float, seed: int):
    """The panel with single alleles missing, where they are bool (N, L), and what they were."""
    alleles_nl = panel.alleles_nl()
    gone_nl = np.random.default_rng(seed).random(alleles_nl.shape) < share
    missing_lw = bits.pack(np.ascontiguousarray(gone_nl.T.astype(np.uint8)))
    return replace(panel, bits_lw=panel.bits_lw & ~missing_lw, missing_lw=missing_lw), gone_nl, alleles_nl


def test_a_gap_is_filled_from_those_whom_its_haplotype_resembles():
    """Two haplotype families of equal size, each of one sequence: the commoner allele would be right half of the time."""
    rng = np.random.default_rng(1)
    family = rng.integers(0, 2, (2, 200)).astype(np.uint8)
    alleles_nl = np.repeat(family, 20, axis=0)
    panel = panel_from_alleles(alleles_nl.T, np.arange(200) * 100 + 1, "1", [f"p{i}" for i in range(20)])
    gappy, gone_nl, _ = with_gaps(panel, 0.05, 2)
    assert gone_nl.sum() > 300
    made = as_reference(gappy, LiStephensConfig(ne=1_000, mismatch=1e-3))
    np.testing.assert_array_equal(made.alleles_nl(), alleles_nl)
    assert made.missing_lw is None
    assert f"{gone_nl.sum()} missing alleles" in made.notes[0]
    # a person's other haplotype does not help: with both of a person alike and unlike all others, gaps get the others' allele
    alone_nl = alleles_nl.copy()
    alone_nl[:2] = 1 - family[0]
    gappy, gone_nl, _ = with_gaps(
        panel_from_alleles(alone_nl.T, np.arange(200) * 100 + 1, "1", panel.samples.ids), 0.02, 3
    )
    filled_nl = as_reference(gappy, LiStephensConfig(ne=1_000, mismatch=1e-3)).alleles_nl()
    at = gone_nl[0] & (family[0] == family[1])
    assert at.any()
    assert (filled_nl[0][at] != alone_nl[0][at]).all()


def test_filling_beats_the_commoner_allele_on_real_haplotypes(real_data):
    panel = read_panel(
        real_data / "genomics/chr15_10k/train.bcf", map=real_data / "genomics/maps/b37/chr15.b37.gmap.gz"
    )
    panel = panel.select(sites=slice(0, 1500), samples=slice(0, 300))
    gappy, gone_nl, true_nl = with_gaps(panel, 0.02, 5)
    made_nl = as_reference(gappy).alleles_nl()
    common_nl = np.broadcast_to(true_nl.mean(axis=0) > 0.5, true_nl.shape)
    varied = gone_nl & (np.minimum(true_nl.mean(axis=0), 1 - true_nl.mean(axis=0)) > 0.05)
    np.testing.assert_array_equal(made_nl[~gone_nl], true_nl[~gone_nl])
    assert (made_nl == true_nl)[varied].mean() > 0.97
    assert (common_nl == true_nl)[varied].mean() < 0.85


def test_large_gaps_are_refused_with_the_command_that_helps():
    alleles_ln = np.random.default_rng(0).integers(0, 2, (30, 20)).astype(np.uint8)
    alleles_ln[4, :11] = 255
    panel = panel_from_alleles(alleles_ln, np.arange(30) + 1, "1", [f"p{i}" for i in range(10)])
    with pytest.raises(
        InputError, match=r"11 of 20 missing at 1:5 \(1 such sites\); try: bcftools view -i 'F_MISSING<=0.5'"
    ):
        as_reference(panel, where="p.bcf")
    alleles_ln[:] = np.where(np.random.default_rng(1).random((30, 20)) < 0.2, 255, 1)
    panel = panel_from_alleles(alleles_ln, np.arange(30) + 1, "1", [f"p{i}" for i in range(10)])
    with pytest.raises(InputError, match=r"at most 10% of alleles missing.*beagle.jar gt=p.bcf"):
        as_reference(panel, where="p.bcf")


@pytest.mark.parametrize(("contig", "hint"), [("chrY", ""), ("MT", ""), ("26", "")])
def test_chromosomes_that_do_not_recombine_are_refused(contig, hint):
    alleles_ln = np.ones((3, 4), dtype=np.uint8)
    panel = panel_from_alleles(alleles_ln, np.array([1, 2, 3]), contig, list("abcd"))
    with pytest.raises(InputError, match=f"chromosomes that recombine, got {contig}"):
        as_reference(panel)
    both = panel_from_alleles(alleles_ln, np.array([1, 2, 1]), np.array(["1", "1", contig]), list("abcd"))
    with pytest.raises(InputError, match=rf"bcftools view -t \^{contig}"):
        as_reference(both)


def test_the_odd_panels_work_after_what_the_refusal_says(tmp_path, real_data):
    """The command of the message, run: without the unphased person the panel goes from fit to evaluation."""
    odd = real_data / "genomics/odd/chr20_unphased.bcf"
    maps = real_data / "genomics/maps/b37/chr20.b37.gmap.gz"
    with pytest.raises(InputError) as told:
        commands.fit_command(odd, map=maps, out=tmp_path / "run")
    command = str(told.value).split("try: ")[1].split(", or ")[0].split()
    assert command[:2] == ["bcftools", "view"]
    command[command.index("phased.bcf")] = str(tmp_path / "phased.bcf")
    subprocess.run([*command, "-r", "20:1000000-1400000"], check=True, capture_output=True)
    made = commands.fit_command(tmp_path / "phased.bcf", map=maps, out=tmp_path / "run")
    assert made["haplotypes"] == 404
    commands.sample_command(tmp_path / "run", 60, out=tmp_path / "made.bcf")
    told = commands.evaluate_command(tmp_path / "phased.bcf", tmp_path / "made.bcf")
    assert next(f["value"] for f in told["findings"] if f["name"] == "af_r") > 0.9


def test_missing_calls_of_a_phased_file_go_from_fit_to_evaluation(tmp_path, real_data):
    """The scaffold's people and gaps, at the sites where all called heterozygotes are phased."""
    odd = real_data / "genomics/odd/chr20_scaffold_missing.bcf"
    lines = subprocess.run(["bcftools", "view", odd], capture_output=True, text=True, check=True).stdout.splitlines()
    kept = [line for line in lines if line[0] == "#" or not {"0/1", "1/0"} & set(line.split("\t"))]
    kept = [line for line in kept if line.count("./.") < 100]  # as the refusal of such a site says
    assert any("./." in line for line in kept)
    (tmp_path / "p.vcf").write_text("\n".join(kept) + "\n")
    made = commands.fit_command(tmp_path / "p.vcf", out=tmp_path / "run")
    assert any("missing alleles" in warning for warning in made["warnings"])
    commands.sample_command(tmp_path / "run", 60, out=tmp_path / "made.bcf")
    assert read_panel(tmp_path / "made.bcf").missing_lw is None
    scored = commands.score_command(tmp_path / "run", tmp_path / "p.vcf")  # with its gaps
    assert scored["haplotypes"] == 406


def test_split_multiallelics_and_indels_come_back_as_they_were(tmp_path, real_data):
    """From X of 1000 Genomes, which has both, through fit and sample: the same records, and none is torn apart."""
    path = real_data / "genomics/genomewide_1126/1KG_phase3_subset_chrX.vcf.gz"
    table = real_data / "genomics/panel/integrated_call_samples_v3.20130502.ALL.panel"
    commands.fit_command(path, samples=table, group_column="super_pop", out=tmp_path / "run")
    commands.sample_command(tmp_path / "run", 40, out=tmp_path / "made.bcf")
    listed = [
        subprocess.run(
            ["bcftools", "query", "-f", "%POS %REF %ALT\n", each], capture_output=True, text=True, check=True
        )
        for each in (path, tmp_path / "made.bcf")
    ]
    records = [each.stdout.splitlines() for each in listed]
    assert records[0] == records[1]
    assert sum("," in line for line in records[0]) >= 20


@pytest.mark.slow
def test_every_odd_vcf_goes_through_or_is_refused_in_one_line(tmp_path, real_data):
    """Files of the specifications' test suites: fit, and where that works sample and score; nothing but our own errors."""
    paths = sorted(path for path in (real_data / "bad/vcf").rglob("*") if path.suffix in (".vcf", ".bcf", ".gz"))
    assert len(paths) > 500
    through, told = 0, []
    for number, path in enumerate(paths):
        run, made = tmp_path / f"run{number}", tmp_path / f"made{number}.bcf"
        try:
            commands.fit_command(path, out=run)
            commands.sample_command(run, 3, out=made)
            commands.score_command(run, made)
            through += 1
        except InputError as refused:
            told.append((path, str(refused), made.exists()))
    assert through > 20
    assert [each for each in told if "\n" in each[1] or each[2]] == []
