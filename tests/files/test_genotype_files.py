"""Every genotype format: what was written comes back, in one part or in several, and other programs read the same."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.errors import InputError, UsageError
from engine.files import genotype_files, genotypes
from engine.files.genotypes import Block, GenotypeData, Layout
from engine.kernels import bits


def data_of(samples: int, sites: int = 2300, *, seed: int = 0, multiallelic: bool = True) -> GenotypeData:
    """Phased, of all frequencies; rows 10 and 11 are one site of two ALT alleles."""
    rng = np.random.default_rng(seed)
    allele_ln = (rng.random((sites, 2 * samples)) < rng.beta(0.2, 0.8, (sites, 1))).astype(np.uint8)
    alt_index, position = np.zeros(sites, dtype=np.int16), 100 + 10 * np.arange(sites)
    alt = np.array(["G", "T"] * (sites // 2), dtype=object)
    if multiallelic:
        allele_ln[11] &= 1 - allele_ln[10]
        alt_index[10:12], position[11] = (1, 2), position[10]
    return GenotypeData(
        bits.pack(allele_ln), 2 * samples, None, True, np.full(sites, "22"), position,
        np.array(["."] * sites, dtype=object), np.array(["A"] * sites, dtype=object), alt, alt_index,
        [f"SYN{k:03d}" for k in range(samples)], 2 * np.arange(samples + 1), {"22": 51_304_566}, "GRCh37",
    )  # fmt: skip


def in_parts(path: Path, data: GenotypeData, folder: Path, step: int = 1000) -> None:
    layout, module, places = Layout(data, genotypes.record_starts(data)), genotype_files.writer(path), []
    module.check(path, layout)
    for at in range(0, layout.n_records, step):
        start_r = layout.start_r[at : at + step + 1]
        low, high = int(start_r[0]), int(start_r[-1])
        places.append(folder / f"part{at}")
        module.write_part(path, layout, [Block(genotypes.rows(data, low, high), start_r - low, at)], places[-1])
    module.join_parts(path, layout, places)


def same(a: GenotypeData, b: GenotypeData, names: tuple[str, ...]) -> None:
    np.testing.assert_array_equal(a.bits_lw, b.bits_lw)
    assert b.missing_lw is None
    assert b.phased
    for name in names:
        assert list(getattr(a, name)) == list(getattr(b, name)), name


FULL = ("contig", "position_bp", "id", "ref", "alt", "alt_index", "sample_ids", "haplotypes_of_sample", "contig_length")


@pytest.mark.parametrize("suffix", [".bcf", ".vcf.gz", ".pgen", ".vcz", ".haps", ".haps.gz"])
@pytest.mark.parametrize("samples", [1, 33])
def test_what_was_written_comes_back_in_one_part_or_several(tmp_path, suffix, samples):
    data = data_of(samples)
    genotype_files.write_genotypes(tmp_path / f"one{suffix}", data)
    in_parts(tmp_path / f"two{suffix}", data, tmp_path / "parts")
    names = tuple(n for n in FULL if "haps" not in suffix or n not in ("alt_index", "contig_length"))
    for name in ("one", "two"):
        same(data, genotype_files.read_genotypes(tmp_path / f"{name}{suffix}"), names)


def test_a_bed_says_what_plink2_says(tmp_path):
    if shutil.which("plink2") is None:
        pytest.skip("plink2 is not installed")
    data = data_of(33, multiallelic=False)
    for suffix in (".bed", ".pgen"):
        genotype_files.write_genotypes(tmp_path / f"x{suffix}", data)
    assert "phase" in genotype_files.lost("x.bed")[0]
    run(tmp_path, "plink2", "--pfile", "x", "--validate")
    run(tmp_path, "plink2", "--pfile", "x", "--make-bed", "--out", "y")
    assert (tmp_path / "x.bed").read_bytes() == (tmp_path / "y.bed").read_bytes()


def test_plink2_reads_haps_as_the_pgen(tmp_path):
    if shutil.which("plink2") is None:
        pytest.skip("plink2 is not installed")
    data = data_of(9, multiallelic=False)
    genotype_files.write_genotypes(tmp_path / "x.haps", data)
    run(tmp_path, "plink2", "--haps", "x.haps", "ref-first", "--sample", "x.sample", "--make-pgen", "--out", "y")
    np.testing.assert_array_equal(genotype_files.read_genotypes(tmp_path / "y.pgen").bits_lw, data.bits_lw)


def test_vcztools_prints_what_bcftools_prints(tmp_path):
    tool = Path(sys.executable).with_name("vcztools")
    if not tool.exists() or shutil.which("bcftools") is None:
        pytest.skip("vcztools or bcftools is not installed")
    data = data_of(5, 1200)
    for suffix in (".vcz", ".bcf"):
        genotype_files.write_genotypes(tmp_path / f"x{suffix}", data)
    ours = run(tmp_path, str(tool), "view", "--no-version", "x.vcz").splitlines()
    theirs = run(tmp_path, "bcftools", "view", "--no-version", "x.bcf").splitlines()
    cut = lambda lines: [(f := line.split("\t"))[:5] + f[9:] for line in lines if not line.startswith("##")]  # noqa: E731
    assert cut(ours) == cut(theirs)


def test_what_a_format_cannot_hold_is_one_line(tmp_path):
    data = data_of(2, 20)
    with pytest.raises(UsageError, match="ending in"):
        genotype_files.write_genotypes(tmp_path / "x.txt", data)
    with pytest.raises(InputError, match="phased"):
        genotype_files.write_genotypes(tmp_path / "x.haps", replace(data, phased=False))
    (tmp_path / "y.vcz").mkdir()
    with pytest.raises(InputError, match="VCF-Zarr"):
        genotype_files.read_genotypes(tmp_path / "y.vcz")


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "warning" not in (done.stderr + done.stdout).lower(), done.stderr + done.stdout
    return done.stdout
