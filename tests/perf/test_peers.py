import sys

import numpy as np
import pgenlib
import pytest

from engine.errors import InputError, UsageError
from perf import peers


def packed(alleles_ln):
    sites, n = alleles_ln.shape
    padded = np.zeros((sites, -(-n // 64) * 64), dtype=np.uint8)
    padded[:, :n] = alleles_ln
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint64)


def drawn(sites, haplotypes, seed=0):
    """Alleles, which samples are missing, and both as planes; of the unused high bits every other one is set, as poison."""
    rng = np.random.default_rng(seed)
    alleles_ln = rng.integers(0, 2, (sites, haplotypes), dtype=np.uint8)
    lost_ls = rng.random((sites, haplotypes // 2)) < 0.2
    missing_ln = np.repeat(lost_ls, 2, axis=1).astype(np.uint8)
    missing_ln[:, 1::2] = 0  # one of the two bits is enough
    bits_lw, missing_lw = packed(alleles_ln), packed(missing_ln)
    if haplotypes % 64:
        bits_lw[:, -1] |= np.uint64(0x5555555555555555 & ~(2 ** (haplotypes % 64) - 1))
    return alleles_ln, lost_ls, bits_lw, missing_lw


@pytest.mark.parametrize(("sites", "haplotypes"), [(1, 2), (3, 62), (5, 64), (7, 66), (11, 134), (101, 26)])
def test_files_hold_what_the_bits_say(tmp_path, sites, haplotypes):
    alleles_ln, lost_ls, bits_lw, missing_lw = drawn(sites, haplotypes)
    samples = haplotypes // 2
    dosage_ls = np.where(lost_ls, -9, alleles_ln[:, 0::2] + alleles_ln[:, 1::2].astype(np.int8))
    position_bp = np.arange(sites) * 7 + 3
    peers.write_bed(tmp_path / "b", bits_lw, haplotypes, position_bp, missing_lw)
    peers.write_pgen(tmp_path / "p", bits_lw, haplotypes, position_bp, missing_lw)
    assert (tmp_path / "b.bed").stat().st_size == 3 + sites * -(-samples // 4)
    assert len((tmp_path / "b.fam").read_text().splitlines()) == samples
    assert (tmp_path / "b.bim").read_text().splitlines()[-1].split("\t")[3] == str(position_bp[-1])
    assert (tmp_path / "p.pvar").read_text().splitlines()[-1].split("\t")[1] == str(position_bp[-1])
    for name in ("b.bed", "p.pgen"):
        reader = pgenlib.PgenReader(str(tmp_path / name).encode(), raw_sample_ct=samples)
        found = np.empty((sites, samples), dtype=np.int8)
        reader.read_range(0, sites, found)
        np.testing.assert_array_equal(found, dosage_ls)
    both = np.empty((sites, haplotypes), dtype=np.int32)
    pgenlib.PgenReader(str(tmp_path / "p.pgen").encode(), raw_sample_ct=samples).read_alleles_range(0, sites, both)
    np.testing.assert_array_equal(both, np.where(np.repeat(lost_ls, 2, axis=1), -9, alleles_ln.astype(np.int8)))
    last = (tmp_path / "b.bed").read_bytes()[-1]
    assert samples % 4 == 0 or last >> 2 * (samples % 4) == 0, "bits beyond the last sample are zero"


def test_files_without_missing_genotypes_or_positions(tmp_path):
    alleles_ln, _, bits_lw, _ = drawn(5, 130)
    peers.write_bed(tmp_path / "b", bits_lw, 130)
    found = np.empty((5, 65), dtype=np.int8)
    pgenlib.PgenReader(str(tmp_path / "b.bed").encode(), raw_sample_ct=65).read_range(0, 5, found)
    np.testing.assert_array_equal(found, alleles_ln[:, 0::2] + alleles_ln[:, 1::2])
    assert [line.split("\t")[3] for line in (tmp_path / "b.bim").read_text().splitlines()] == list("12345")
    with pytest.raises(UsageError, match="an even number of haplotypes"):
        peers.write_bed(tmp_path / "b", bits_lw, 129)


def burn(millions, *more):
    """A process that does nothing but compute; its cost is proportional to `millions`."""
    return [sys.executable, "-S", "-c", f"for _ in range({millions} * 1_000_000): pass", *more]


def test_a_program_is_charged_what_it_used(tmp_path):
    spent = peers.run_program(burn(20))
    assert 0.05 < spent.user_seconds < 10
    assert spent.wall_seconds >= 0.9 * spent.user_seconds
    assert 1e6 < spent.peak_bytes < 1e8
    ballast = np.ones(50_000_000)  # what this process holds is not the program's
    assert peers.run_program(burn(1)).peak_bytes < 1e8 < ballast.nbytes
    held = peers.run_program([sys.executable, "-c", "x = b'1' * 100_000_000; print('done')"])
    assert held.peak_bytes > 100e6
    assert held.output == "done\n"
    share = peers.computing_share(burn(30, "--work"), burn(10, "--freq", "--out", "f"))
    assert share.seconds == pytest.approx(spent.user_seconds, rel=0.5), "30 less 10 is 20"
    assert share.note == "user CPU seconds of the whole process less those of a process with --freq"


def test_a_program_that_fails_or_never_ends():
    with pytest.raises(InputError, match="exit 3: bad luck"):
        peers.run_program([sys.executable, "-c", "import sys; print('bad luck'); sys.exit(3)"])
    with pytest.raises(InputError, match=r"still running after 0\.5 s"):
        peers.run_program([sys.executable, "-c", "import time; time.sleep(60)"], timeout_seconds=0.5)


def test_what_is_not_there_is_named(monkeypatch, tmp_path):
    assert peers.missing_program("no-such-program").startswith("no-such-program is not installed")
    assert peers.missing_package("no_such_package").startswith("no_such_package is not installed")
    assert peers.missing_package("numpy") is None
    with pytest.raises(UsageError, match="not installed"):
        peers.plink_command("no-such-program", "--freq")


def test_versions():
    assert peers.version("numpy.packbits") == np.__version__
    assert peers.version("no-such-thing at all") == "unknown"


@pytest.mark.skipif(
    peers.missing_program("plink2", "r2-phased") is not None, reason=str(peers.missing_program("plink2", "r2-phased"))
)
def test_plink2_reads_the_files_alike(tmp_path):
    _, _, bits_lw, missing_lw = drawn(50, 138)
    peers.write_bed(tmp_path / "b", bits_lw, 138, None, missing_lw)
    peers.write_pgen(tmp_path / "p", bits_lw, 138, None, missing_lw)
    for kind in ("bfile", "pfile"):
        command = peers.plink_command(
            "plink2", f"--{kind}", tmp_path / kind[0], "--r2-unphased", "square", "--out", tmp_path / kind
        )
        peers.run_program(command, folder=tmp_path)
    tables = [np.loadtxt(tmp_path / f"{kind}.unphased.vcor2") for kind in ("bfile", "pfile")]
    assert tables[0].shape == (50, 50)
    np.testing.assert_array_equal(*tables)
    assert peers.version("plink2 --r2-unphased")[0] in "2"
    assert "no --no-such-thing" in peers.missing_program("plink2", "no-such-thing")
