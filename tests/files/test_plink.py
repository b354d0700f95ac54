"""PLINK filesets: exact round trips, beside plink2 where it is installed, and what a PGEN cannot hold."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.errors import InputError, UsageError
from engine.files import plink
from engine.files.genotypes import GenotypeData
from engine.files.plink import read_pgen, write_pgen
from engine.files.vcf import read_vcf
from engine.kernels import bits

needs_plink2 = pytest.mark.skipif(shutil.which("plink2") is None, reason="plink2 is not installed")


def data_of(allele_ln: np.ndarray, first: list[int] | None = None, contig: str = "1", **changes) -> GenotypeData:
    """Biallelic rows at 10, 20, ...; 255 is missing."""
    sites, n = allele_ln.shape
    first_n = np.arange(n // 2 + 1) * 2 if first is None else np.array(first)
    missing = allele_ln == 255
    fields: dict = {
        "bits_lw": bits.pack(np.where(missing, 0, allele_ln).astype(np.uint8)), "n_haplotypes": n,
        "missing_lw": bits.pack(missing) if missing.any() else None, "phased": True,
        "contig": np.full(sites, contig), "position_bp": np.arange(1, sites + 1) * 10,
        "id": np.array(["."] * sites, dtype=object), "ref": np.array(["A"] * sites, dtype=object),
        "alt": np.array(["G"] * sites, dtype=object), "alt_index": np.zeros(sites, dtype=np.int16),
        "sample_ids": [f"s{k}" for k in range(len(first_n) - 1)], "haplotypes_of_sample": first_n,
        "contig_length": {contig: 1000}, "assembly": "GRCh37",
    }  # fmt: skip
    return GenotypeData(**{**fields, **changes})


def assert_same(a: GenotypeData, b: GenotypeData) -> None:
    np.testing.assert_array_equal(a.bits_lw, b.bits_lw)
    assert (a.missing_lw is None) == (b.missing_lw is None)
    if a.missing_lw is not None:
        np.testing.assert_array_equal(a.missing_lw, b.missing_lw)
    for name in ("contig", "position_bp", "id", "ref", "alt", "alt_index", "haplotypes_of_sample"):
        assert getattr(a, name).tolist() == getattr(b, name).tolist(), name
    assert (a.sample_ids, a.phased, a.contig_length, a.assembly) == (
        b.sample_ids,
        b.phased,
        b.contig_length,
        b.assembly,
    )


@pytest.mark.parametrize("samples", [1, 31, 32, 33, 257])
def test_round_trip_with_missing_calls(tmp_path, samples):
    rng = np.random.default_rng(samples)
    allele_ln = rng.integers(0, 2, (37, 2 * samples)).astype(np.uint8)
    holes = rng.random((37, samples)) < 0.1
    allele_ln[np.repeat(holes, 2, axis=1)] = 255
    data = data_of(allele_ln)
    write_pgen(tmp_path / "x.pgen", data, header_lines=["##engine=SYNTHETIC"])
    assert_same(data, read_pgen(tmp_path / "x.pgen"))
    assert_same(data, read_pgen(tmp_path / "x"))
    assert "##engine=SYNTHETIC\n" in (tmp_path / "x.pvar").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pgen", "x.psam", "x.pvar"]


def test_split_multiallelics_are_joined_in_the_file_and_split_again(tmp_path):
    rows = np.array([[0, 1, 0, 0], [1, 0, 0, 2], [1, 1, 0, 0]], dtype=np.uint8)
    table = np.stack([rows[0] == 1, rows[1] == 1, rows[1] == 2, rows[2] == 1]).astype(np.uint8)
    data = data_of(
        table, position_bp=np.array([5, 7, 7, 9]), alt=np.array(["G", "T", "<DEL>", "."], dtype=object),
        alt_index=np.array([0, 1, 2, 0], dtype=np.int16),
    )  # fmt: skip
    data.bits_lw[3] = 0
    write_pgen(tmp_path / "x.pgen", data)
    assert "T,<DEL>" in (tmp_path / "x.pvar").read_text()
    assert_same(data, read_pgen(tmp_path / "x.pgen"))
    assert read_pgen(tmp_path / "x.pgen", region="1:6-8").alt.tolist() == ["T", "<DEL>"]
    assert read_pgen(tmp_path / "x.pgen", region="1:6-8").bits_lw.tolist() == data.bits_lw[1:3].tolist()


def test_haploid_males_on_x_and_nowhere_else(tmp_path):
    allele_ln = np.array([[0, 1, 1], [1, 0, 1], [0, 0, 1]], dtype=np.uint8)
    data = data_of(allele_ln, first=[0, 1, 3], contig="chrX")
    write_pgen(tmp_path / "x.pgen", data, sex=["male", "female"])
    assert (tmp_path / "x.psam").read_text() == "#IID\tSEX\ns0\t1\ns1\t2\n"
    assert_same(data, read_pgen(tmp_path / "x.pgen"))
    with pytest.raises(InputError, match="haploid 's0'"):
        write_pgen(tmp_path / "y.pgen", replace(data, contig=np.full(3, "2")))
    assert not (tmp_path / "y.pgen").exists()


def test_what_a_pgen_cannot_hold_is_refused_and_leaves_nothing(tmp_path):
    good = np.array([[0, 1, 1, 0]], dtype=np.uint8)
    path = tmp_path / "x.pgen"
    with pytest.raises(InputError, match="one allele of s1 missing"):
        write_pgen(path, data_of(np.array([[0, 1, 255, 0]], dtype=np.uint8)))
    with pytest.raises(InputError, match="without blanks"):
        write_pgen(path, data_of(good, sample_ids=["a b", "c"]))
    with pytest.raises(InputError, match="at least one"):
        write_pgen(path, data_of(good[:0]))
    with pytest.raises(UsageError):
        write_pgen(tmp_path / "x.bed", data_of(good))
    with pytest.raises(UsageError):
        write_pgen(path, data_of(good), header_lines=["x"])
    assert list(tmp_path.iterdir()) == []


def test_damage_is_one_sentence(tmp_path):
    path = tmp_path / "x.pgen"
    rng = np.random.default_rng(0)
    write_pgen(path, data_of(rng.integers(0, 2, (50, 80)).astype(np.uint8)))
    whole = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def with_change(name: str, data: bytes | None) -> str:
        for each, content in whole.items():
            (tmp_path / each).write_bytes(content)
        if data is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError) as caught:
            read_pgen(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for name in whole:
        assert f"no {name}" in with_change(name, None)
    with_change("x.pgen", whole["x.pgen"][:-100])
    with_change("x.pgen", b"")
    assert "PLINK 1" in with_change("x.pgen", b"\x6c\x1b\x01" + whole["x.pgen"][3:])
    assert "starts with" in with_change("x.pgen", b"BAM\1" + whole["x.pgen"])
    assert "50 x 40" in with_change("x.psam", whole["x.psam"] + b"extra\tNA\n")
    assert "40 samples" in with_change("x.pvar", whole["x.pvar"] + b"1\t900\t.\tA\tC\n")
    assert "ascending" in with_change("x.pvar", whole["x.pvar"].replace(b"1\t20\t", b"1\t5\t"))
    assert "POS" in with_change("x.pvar", whole["x.pvar"].replace(b"1\t20\t", b"1\tx\t"))
    assert "distinct" in with_change("x.psam", whole["x.psam"].replace(b"s1\t", b"s0\t", 1))
    (tmp_path / "x.pvar").rename(tmp_path / "x.pvar.zst")
    with pytest.raises(InputError, match="zst"):
        read_pgen(path)


def test_an_allele_beyond_the_last_alt_is_refused(tmp_path, monkeypatch):
    """pgenlib refuses most such files itself; what it hands out is looked at all the same, in every block and the last cell."""
    path = tmp_path / "x.pgen"
    write_pgen(path, data_of(np.zeros((50, 80), dtype=np.uint8)))
    read = read_pgen(path)
    monkeypatch.setattr(plink, "_BLOCK_BYTES", 8 * 40 * 20)  # 20 variants

    class Reader:
        def __init__(self, *_, **__):
            pass

        def close(self):
            pass

        def read_alleles_and_phasepresent_range(self, start, stop, allele_bn, phase_bs):
            allele_bn[:], phase_bs[:] = 0, True
            if stop == 50:
                allele_bn[-1, -1] = last

    monkeypatch.setattr(plink.pgenlib, "PgenReader", Reader)
    last = 0
    np.testing.assert_array_equal(read_pgen(path).bits_lw, read.bits_lw)
    last = 2
    with pytest.raises(InputError, match="beyond ALT"):
        read_pgen(path)


def test_real_panel(real_data, tmp_path):
    data = read_vcf(real_data / "genomics" / "genomewide_1126" / "1KG_phase3_subset_chr2.vcf.gz")
    write_pgen(tmp_path / "x.pgen", data)
    assert_same(data, read_pgen(tmp_path / "x.pgen"))


def test_unphased_calls_keep_their_dosage(real_data, tmp_path):
    """An unphased heterozygote has no order: 1/0 comes back as 0/1."""
    data = read_vcf(real_data / "genomics" / "odd" / "chr20_unphased.bcf")
    assert not data.phased
    write_pgen(tmp_path / "x.pgen", data)
    back = read_pgen(tmp_path / "x.pgen")
    assert not back.phased
    dosage = [bits.unpack(each.bits_lw, each.n_haplotypes).reshape(each.n_sites, -1, 2).sum(2) for each in (data, back)]
    np.testing.assert_array_equal(*dosage)


@needs_plink2
def test_plink2_accepts_the_files_and_reads_the_same_haplotypes(real_data, tmp_path):
    source = real_data / "genomics" / "genomewide_1126" / "1KG_phase3_subset_chr2.vcf.gz"
    data = read_vcf(source)
    write_pgen(tmp_path / "x.pgen", data)
    plink2(tmp_path, "--pfile", "x", "--validate")
    plink2(tmp_path, "--pfile", "x", "--export", "bcf", "--out", "back")
    back = read_vcf(tmp_path / "back.bcf")
    np.testing.assert_array_equal(back.bits_lw, data.bits_lw)
    assert back.phased
    plink2(tmp_path, "--vcf", str(source), "--make-pgen", "--out", "theirs")
    theirs = read_pgen(tmp_path / "theirs.pgen")
    np.testing.assert_array_equal(theirs.bits_lw, data.bits_lw)
    assert theirs.alt.tolist() == data.alt.tolist()


def plink2(folder: Path, *arguments: str) -> None:
    done = subprocess.run(["plink2", *arguments], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "Warning" not in done.stderr + done.stdout, done.stderr
