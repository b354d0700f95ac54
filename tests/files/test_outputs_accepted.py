"""What we write, in every format, hard cases included: bcftools, plink2 and vcztools take it without a warning and read the
alleles that were written.

Hard cases: missing calls, calls of which one allele is missing, three ALT alleles of one site (an indel among them), long
indels, REF N; and X with both pseudo-autosomal regions and men, who have one allele between them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.errors import InputError
from engine.files import genotype_files, ploidy
from engine.files.genotypes import GenotypeData
from engine.kernels import bits

SUFFIXES = [".bcf", ".vcf.gz", ".pgen", ".vcz", ".haps", ".haps.gz", ".bed"]
TEXT = ("contig", "position_bp", "id", "ref", "alt", "alt_index", "sample_ids")


def data_of(a_ln: np.ndarray, lost_ln: np.ndarray, contig: str, position: np.ndarray, length: int) -> GenotypeData:
    sites, n = a_ln.shape
    a_ln[lost_ln] = 0
    text = lambda value: np.array([value] * sites, dtype=object)  # noqa: E731
    return GenotypeData(
        bits.pack(a_ln), n, bits.pack(lost_ln) if lost_ln.any() else None, True, np.full(sites, contig), position,
        np.array([f"{contig}v{k}" for k in range(sites)], dtype=object), text("A"), text("G"),
        np.zeros(sites, dtype=np.int16), [f"SYN{k:03d}" for k in range(n // 2)], np.arange(0, n + 1, 2),
        {contig: length}, "GRCh38",
    )  # fmt: skip


def autosome(samples: int, *, missing: bool = True, half: bool = False) -> GenotypeData:
    rng, sites = np.random.default_rng(0), 1100
    a_ln = (rng.random((sites, 2 * samples)) < rng.beta(0.4, 0.8, (sites, 1))).astype(np.uint8)
    lost_ls = (rng.random((sites, samples)) < 0.08) & missing
    lost_ls[:3], lost_ls[3] = False, missing
    lost_ln = np.repeat(lost_ls, 2, axis=1)
    if half:
        lost_ln[200:220, ::2] |= rng.random((20, samples)) < 0.3
    sites_of_three = range(10, sites - 3, 90)
    for k in sites_of_three:
        a_ln[k + 1] &= 1 - a_ln[k]
        a_ln[k + 2] &= 1 - (a_ln[k] | a_ln[k + 1])
        lost_ln[k + 1] = lost_ln[k + 2] = lost_ln[k]
    data = data_of(a_ln, lost_ln, "22", 1000 + 10 * np.arange(sites), 50_818_468)
    for k in sites_of_three:
        three = slice(k, k + 3)
        data.alt_index[three], data.position_bp[three], data.id[three] = (1, 2, 3), data.position_bp[k], data.id[k]
        data.ref[three], data.alt[three] = "AT", ["A", "ATT", "GT"]
    data.ref[5], data.alt[5], data.alt[6], data.ref[7] = "ACGT" * 9, "A", "A" + "T" * 60, "N"
    return data


def on_x(samples: int, *, missing: bool = True) -> tuple[GenotypeData, np.ndarray]:
    """PAR1, between, PAR2; every second person is a man."""
    rng, bounds = np.random.default_rng(1), ploidy.PAR_BP["GRCh38"]
    stretches = [(2_000_000, bounds[0][1], 200), (bounds[0][1] + 1, bounds[1][0] - 1, 300), (*bounds[1], 200)]
    position = np.concatenate([np.linspace(*each) for each in stretches]).astype(np.int64)
    a_ln = (rng.random((700, 2 * samples)) < rng.beta(0.8, 0.8, (700, 1))).astype(np.uint8)
    lost_ls = (rng.random((700, samples)) < 0.05) & missing
    data = data_of(a_ln, np.repeat(lost_ls, 2, axis=1), "X", position, 156_040_895)
    male_s = np.arange(samples) % 2 == 0
    made = ploidy.with_males(data, ploidy.outside_par(data.contig, position, "GRCh38"), male_s)
    return made, np.where(male_s, "male", "female")


def written(folder: Path, data: GenotypeData, suffix: str, sex: np.ndarray | None = None) -> Path:
    path = folder / f"x{suffix}"
    apart = ploidy.with_par_contigs(data) if suffix in (".pgen", ".bed") else data
    genotype_files.write_genotypes(path, apart, sex=sex)
    return path


def run(folder: Path, *command: str | Path) -> str:
    if Path(command[0]).name == command[0] and shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, timeout=120)
    said = done.stderr + (done.stdout if command[0] == "plink2" else "")
    assert done.returncode == 0, said
    assert "warning" not in said.lower(), said
    assert "[w::" not in said.lower(), said
    return done.stdout


def same(read: GenotypeData, data: GenotypeData, but: tuple[str, ...] = ()) -> None:
    np.testing.assert_array_equal(read.bits_lw, data.bits_lw)
    assert (read.missing_lw is None) == (data.missing_lw is None)
    if data.missing_lw is not None:
        np.testing.assert_array_equal(read.missing_lw, data.missing_lw)
    for name in set(TEXT) - set(but):
        assert list(getattr(read, name)) == list(getattr(data, name)), name


@pytest.mark.parametrize("suffix", [".bcf", ".vcf.gz", ".vcz", ".haps", ".haps.gz", ".pgen"])
@pytest.mark.parametrize("samples", [1, 13, 33])
@pytest.mark.parametrize("half", [False, True])
def test_missing_alleles_and_several_alts_come_back(tmp_path, suffix, samples, half):
    data = autosome(samples, half=half)
    if suffix == ".pgen" and half:
        with pytest.raises(InputError, match=r"22:3\d\d\d.*one allele of SYN"):
            written(tmp_path, data, suffix)
        assert not list(tmp_path.iterdir())
        return
    path = written(tmp_path, data, suffix)
    same(genotype_files.read_genotypes(path), data, ("alt_index",) if "haps" in suffix else ())


@pytest.mark.parametrize("suffix", [".bcf", ".vcf.gz", ".vcz", ".haps", ".haps.gz", ".pgen"])
@pytest.mark.parametrize("missing", [False, True])
def test_men_on_x_come_back(tmp_path, suffix, missing):
    data, sex = on_x(13, missing=missing)
    read = ploidy.mark(genotype_files.read_genotypes(written(tmp_path, data, suffix, sex)), sex=sex)
    same(read, data)
    np.testing.assert_array_equal(read.hemizygous[0], data.hemizygous[0])
    np.testing.assert_array_equal(read.hemizygous[1], data.hemizygous[1])


def records(text: str) -> list[list[str]]:
    """Position, alleles, counts and calls of VCF text; counts as bcftools and vcztools both print them."""
    rows = [line.split("\t") for line in text.splitlines() if not line.startswith("##")]
    info = lambda cell: sorted(pair for pair in cell.split(";") if pair[:3] in ("AC=", "AN="))  # noqa: E731
    return [[*row[:5], *info(row[7]), *row[9:]] for row in rows]


@pytest.mark.parametrize("case", ["autosome", "half-missing", "x"])
def test_vcf_and_bcf_and_vcf_zarr_are_one_file_to_their_tools(tmp_path, case):
    data = on_x(13)[0] if case == "x" else autosome(13, half=case == "half-missing")
    shown = {}
    for suffix in (".bcf", ".vcf.gz"):
        path = written(tmp_path, data, suffix)
        shown[suffix] = records(run(tmp_path, "bcftools", "view", "--no-version", path.name))
        run(tmp_path, "bcftools", "stats", path.name)
        run(tmp_path, "bcftools", "index", "--stats", path.name)
        contig = str(data.contig[0])
        part = run(tmp_path, "bcftools", "view", "-H", "-r", f"{contig}:{data.position_bp[300]}-", path.name)
        assert len(part.splitlines()) == sum(int(row[1]) >= data.position_bp[300] for row in shown[suffix][1:])
    assert shown[".bcf"] == shown[".vcf.gz"]
    assert any(row[4].count(",") == 2 for row in shown[".bcf"][1:]) == (case != "x")
    # bcftools counts alleles itself; what it counts is what stands in the file
    counted = run(tmp_path, "bcftools", "+fill-tags", "x.bcf", "-Ov", "--", "-t", "AN,AC")
    assert records(counted) == shown[".bcf"]
    tool = Path(sys.executable).with_name("vcztools")
    if not tool.exists():
        pytest.skip("vcztools is not installed")
    written(tmp_path, data, ".vcz")
    for zarr, bcf in zip(records(run(tmp_path, tool, "view", "--no-version", "x.vcz")), shown[".bcf"], strict=True):
        if "AN=0" in bcf:  # a record without any call: vcztools prints one dot a person
            bcf = [cell.replace("./.", ".") for cell in bcf]
        assert zarr == bcf


@pytest.mark.parametrize("case", ["autosome", "x"])
def test_plink2_reads_pgen_bed_and_bcf_alike(tmp_path, case):
    data, sex = on_x(13) if case == "x" else (autosome(13), np.array(["female"] * 13))
    written(tmp_path, data, ".pgen", sex)
    run(tmp_path, "plink2", "--pfile", "x", "--validate", "--out", "v")
    run(tmp_path, "plink2", "--pfile", "x", "--freq", "counts", "--missing", "--out", "pgen")
    written(tmp_path, data, ".bed", sex)
    run(tmp_path, "plink2", "--bfile", "x", "--freq", "counts", "--out", "bed")
    (tmp_path / "sex.txt").write_text("#IID\tSEX\n" + "".join(f"{s}\t{w}\n" for s, w in zip(data.sample_ids, sex)))
    written(tmp_path, data, ".bcf")
    split = ["--split-par", "hg38"] if case == "x" else []
    import_bcf = ["--bcf", "x.bcf", "--update-sex", "sex.txt", *split]
    run(tmp_path, "plink2", *import_bcf, "--make-pgen", "--out", "bcf")
    run(tmp_path, "plink2", "--pfile", "bcf", "--freq", "counts", "--missing", "--out", "bcf")
    for kind in ("acount", "smiss", "vmiss"):
        assert (tmp_path / f"pgen.{kind}").read_text() == (tmp_path / f"bcf.{kind}").read_text(), kind
    # each ALT of a site is a variant of its own in a BED, where a carrier of another ALT counts as REF
    ours = {tuple(row[1:5]): row[5:] for row in table(tmp_path / "pgen.acount") if "," not in row[3]}
    theirs = {tuple(row[1:5]): row[5:] for row in table(tmp_path / "bed.acount")}
    assert len(theirs) == data.n_sites
    assert all(theirs[key] == value for key, value in ours.items())
    export = ["--export", "vcf", "--out"]
    run(tmp_path, "plink2", "--pfile", "x", *export, "pgen")
    run(tmp_path, "plink2", "--pfile", "bcf", *export, "bcf")
    cut = lambda name: [[*row[1:5], *row[9:]] for row in table(tmp_path / name)]  # noqa: E731
    assert cut("pgen.vcf") == cut("bcf.vcf")


def table(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("case", ["autosome", "x"])
def test_plink2_reads_haps_as_the_pgen(tmp_path, case):
    """Complete data: plink2 knows no missing allele in .haps."""
    data, sex = on_x(13, missing=False) if case == "x" else (autosome(13, missing=False), np.array(["female"] * 13))
    written(tmp_path, data, ".haps", sex)
    split = ["--split-par", "hg38"] if case == "x" else []
    run(
        tmp_path, "plink2", "--haps", "x.haps", "ref-first", "--sample", "x.sample", *split, "--make-pgen", "--out", "y"
    )
    read = replace(genotype_files.read_genotypes(tmp_path / "y.pgen"), assembly="GRCh38")
    same(ploidy.mark(read, sex=sex), data, ("alt_index",))
