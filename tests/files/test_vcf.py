"""VCF and BCF: reading against bcftools' own text, exact round trips, and damage that must end in one sentence."""

from __future__ import annotations

import collections
import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import EngineError, InputError, UsageError
from engine.files import vcf, vcf_structure
from engine.files.genotypes import GenotypeData
from engine.kernels import bits

HEAD = '##fileformat=VCFv4.2\n##contig=<ID=1,length=1000,assembly=b37>\n##FORMAT=<ID=GT,Number=1,Type=String,Description="G">\n'
needs_bcftools = pytest.mark.skipif(shutil.which("bcftools") is None, reason="bcftools is not installed")


def text_vcf(path: Path, records: list[str], samples: str = "a b c", head: str = HEAD) -> Path:
    """A VCF with blanks standing for tabs."""
    names = "#CHROM POS ID REF ALT QUAL FILTER INFO" + (f" FORMAT {samples}" if samples else "")
    path.write_text(head + "\n".join(line.replace(" ", "\t") for line in [names, *records]) + "\n")
    return path


def alleles(data: GenotypeData) -> list[list[int]]:
    """Allele per row and haplotype, -1 where missing."""
    out = bits.unpack(data.bits_lw, data.n_haplotypes).astype(int)
    if data.missing_lw is not None:
        out[bits.unpack(data.missing_lw, data.n_haplotypes).astype(bool)] = -1
    return out.tolist()


def assert_same(a: GenotypeData, b: GenotypeData) -> None:
    np.testing.assert_array_equal(a.bits_lw, b.bits_lw)
    assert (a.missing_lw is None) == (b.missing_lw is None)
    if a.missing_lw is not None:
        np.testing.assert_array_equal(a.missing_lw, b.missing_lw)
    for name in ("contig", "position_bp", "id", "ref", "alt", "alt_index", "haplotypes_of_sample"):
        assert getattr(a, name).tolist() == getattr(b, name).tolist(), name
    assert a.sample_ids == b.sample_ids
    assert a.phased == b.phased
    assert a.contig_length == b.contig_length
    assert a.assembly == b.assembly


# --- what a record means ---


def test_alleles_missing_indels_and_split_multiallelics(tmp_path):
    path = text_vcf(
        tmp_path / "x.vcf",
        [
            "1 10 rs1 A G . PASS . GT 0|0 0|1 1|0",
            "1 10 . A AT,C,<DEL> . PASS . GT 1|2 3|0 .|.",
            "1 20 . AC A . . . GT:DP 1|1:3 0|.:. .|1",
            "1 30 . T . . . . GT 0|0 0|0 0|0",
        ],
    )
    data = vcf.read_vcf(path)
    assert alleles(data) == [
        [0, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, -1, -1],
        [0, 1, 0, 0, -1, -1],
        [0, 0, 1, 0, -1, -1],
        [1, 1, 0, -1, -1, 1],
        [0, 0, 0, 0, 0, 0],
    ]
    assert data.alt.tolist() == ["G", "AT", "C", "<DEL>", "A", "."]
    assert data.alt_index.tolist() == [0, 1, 2, 3, 0, 0]
    assert data.position_bp.tolist() == [10, 10, 10, 10, 20, 30]
    assert data.id[0] == "rs1"
    assert data.phased
    assert data.contig_length == {"1": 1000}
    assert data.assembly == "b37"
    bits_lw = data.bits_lw & data.missing_lw
    assert not bits_lw.any()  # a missing allele has no bit


@pytest.mark.parametrize(("calls", "phased"), [("0/0 1/1 ./.", True), ("0/1 0|1 0|0", False), ("0|1 1|0 1/0", False)])
def test_phase_matters_where_a_call_is_heterozygous(tmp_path, calls, phased):
    assert vcf.read_vcf(text_vcf(tmp_path / "x.vcf", [f"1 10 . A G . . . GT {calls}"])).phased is phased


def test_haploid_samples_own_one_haplotype(tmp_path):
    records = ["1 10 . A G . . . GT 1 0|1 0/.", "1 20 . A G . . . GT . 1|1 1/."]
    data = vcf.read_vcf(text_vcf(tmp_path / "x.vcf", records))
    assert data.haplotypes_of_sample.tolist() == [0, 1, 3, 4]
    assert alleles(data) == [[1, 0, 1, 0], [-1, 1, 1, 1]]


def test_mixed_ploidy_is_kept_diploid_and_noted(tmp_path):
    records = ["1 10 . A G . . . GT 1 0|1 0|0", "1 20 . A G . . . GT 0|1 1|1 0|0"]
    data = vcf.read_vcf(text_vcf(tmp_path / "x.vcf", records))
    assert data.haplotypes_of_sample.tolist() == [0, 2, 4, 6]
    assert alleles(data) == [[1, -1, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0]]
    assert "1 samples are haploid in some records" in data.notes[0]


def test_records_without_gt_are_missing(tmp_path):
    data = vcf.read_vcf(text_vcf(tmp_path / "x.vcf", ["1 10 . A G . . . DP 1 2 3", "1 20 . A G . . . GT 0|1 0|0 0|0"]))
    assert alleles(data) == [[-1] * 6, [0, 1, 0, 0, 0, 0]]


def test_samples_in_the_order_asked_for_and_regions(tmp_path):
    records = [f"{c} {p} . A G . . . GT 0|1 1|1 0|0" for c in "12" for p in (10, 20, 30)]
    path = text_vcf(tmp_path / "x.vcf", records)
    data = vcf.read_vcf(path, samples=["b", "a"], region="2:15-30")
    assert data.sample_ids == ["b", "a"]
    assert alleles(data) == [[1, 1, 0, 1]] * 2
    assert data.contig.tolist() == ["2", "2"]
    assert vcf.read_vcf(path, region="1:20").position_bp.tolist() == [20]
    assert vcf.read_vcf(path, region="1:20-").position_bp.tolist() == [20, 30]
    for wrong in ({"samples": ["z"]}, {"samples": ["a", "a"]}, {"region": "chr1"}, {"region": "1:30-20"}):
        with pytest.raises(InputError):
            vcf.read_vcf(path, **wrong)


def test_no_samples_and_no_records(tmp_path):
    data = vcf.read_vcf(text_vcf(tmp_path / "x.vcf", ["1 10 . A G . . ."], samples=""))
    assert data.bits_lw.shape == (1, 0)
    data = vcf.read_vcf(text_vcf(tmp_path / "y.vcf", []))
    assert data.bits_lw.shape == (0, 1)


GOOD = "1 10 . A G . . . GT 0|0 0|1 1|0"


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([GOOD, GOOD.replace("10", "5")], "ascending order.*1:5 after 10"),
        ([GOOD, GOOD.replace("1 10", "2 10"), GOOD], "one stretch, got '1' again"),
        ([GOOD + " 0|0"], "line 5.*12 columns, got 13"),
        ([GOOD.replace("10", "x")], "position"),
        ([GOOD.replace("10", "99999999999")], "position"),
        ([GOOD.replace("0|1", "0|1|1")], "one or two alleles"),
        ([GOOD.replace("0|1", "0|2")], "allele numbers up to 1, got 2"),
        ([GOOD.replace("0|1", "0-1")], "sample 2.*a genotype"),
        ([GOOD.replace("0|1", "0|1:9")], "sample 2.*at most 0 more values"),
        ([GOOD.replace("GT", "DP:GT")], "GT first"),
        ([GOOD.replace(" A ", " 7 ")], "REF made of"),
        ([GOOD.replace(" G ", " G,<A B ")], "columns"),
        ([GOOD.replace(" G ", " G;T ")], "ALT of bases"),
        ([GOOD, "", GOOD], "empty line"),
        ([GOOD.replace("0|1", "0|\0")], "zero byte"),
    ],
)
def test_faults_are_one_sentence_with_the_place(tmp_path, records, why):
    path = text_vcf(tmp_path / "x.vcf", records)
    with pytest.raises(InputError, match=why) as caught:
        vcf.read_vcf(path)
    assert "\n" not in str(caught.value)
    assert "x.vcf" in str(caught.value)
    verdict, reason = vcf.check(path)
    assert verdict == "reject"
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("head", "samples", "why"),
    [
        ("", "a b c", "fileformat"),
        (HEAD.replace("4.2", "3.3"), "a b c", "fileformat"),
        (HEAD, "a b a", "'a' twice"),
        (HEAD + "##contig=<ID=2,IDX=2000000000>\n", "a b c", "IDX"),
    ],
)
def test_headers_that_cannot_be_used(tmp_path, head, samples, why):
    with pytest.raises(InputError, match=why):
        vcf.read_vcf(text_vcf(tmp_path / "x.vcf", [GOOD], samples=samples, head=head))


def test_an_empty_last_line_does_not_end_the_interpreter(tmp_path):
    path = text_vcf(tmp_path / "x.vcf", [GOOD])
    path.write_text(path.read_text() + "\n\n")  # htslib through cyvcf2 reads this as a record and crashes
    code = f"from engine.files.vcf import read_vcf; print(read_vcf({str(path)!r}).n_sites)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) in ((0, "1"), (1, "")), done.stderr
    assert done.returncode == 0 or "empty line" in done.stderr


def test_check_says_ok_warn_and_reject(tmp_path):
    good = text_vcf(tmp_path / "ok.vcf", [GOOD])
    assert vcf.check(good) == ("ok", "")
    assert vcf.check(text_vcf(tmp_path / "u.vcf", [GOOD.replace("0|1", "0/1")])) == ("warn", "unphased heterozygotes")
    verdict, why = vcf.check(text_vcf(tmp_path / "m.vcf", [GOOD.replace("0|1", "./.")]))
    assert (verdict, why) == ("warn", "2 missing alleles")
    assert vcf.check(text_vcf(tmp_path / "s.vcf", ["1 10 . A G . . ."], samples="")) == ("warn", "no samples")
    assert vcf.check(tmp_path / "none.vcf")[0] == "reject"
    assert vcf.check(tmp_path)[0] == "reject"


# --- round trips ---


@st.composite
def genotype_data(draw) -> GenotypeData:
    ploidy = np.array(draw(st.lists(st.sampled_from([1, 2]), min_size=1, max_size=40)))
    first = np.concatenate([[0], np.cumsum(ploidy)]).astype(np.int64)
    n = int(first[-1])
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    contig, position, ident, ref, alt, index, rows, holes = [], [], [], [], [], [], [], []
    at = {"1": 0, "HLA:2": 0}
    share = draw(st.sampled_from([0.0, 0.2]))
    for name in ["1"] * draw(st.integers(0, 6)) + ["HLA:2"] * draw(st.integers(0, 4)):
        at[name] += draw(st.integers(0, 5))
        alts = draw(st.sampled_from([["G"], ["."], ["G", "T"], ["AT", "<DEL>", "*"], ["C" * 20, "G" * 200]]))
        allele = rng.integers(0, len(alts) + (alts != ["."]), n)
        hole = rng.random(n) < share
        label = draw(st.sampled_from([".", "rs1", "a-very-long-name;rs2"]))
        for k, one in enumerate(alts, start=1):
            contig.append(name)
            position.append(at[name] + 1)
            ident.append(label)
            ref.append("A")
            alt.append(one)
            index.append(k if len(alts) > 1 else 0)
            rows.append((allele == k) & ~hole)
            holes.append(hole)
    plane = np.array(rows, dtype=np.uint8).reshape(-1, n)
    missing = np.array(holes, dtype=np.uint8).reshape(-1, n)
    missing_lw = bits.pack(missing)
    text = lambda values: np.array(values, dtype=object)  # noqa: E731
    return GenotypeData(
        bits.pack(plane), n, missing_lw if missing_lw.any() else None, True, np.array(contig, dtype=str),
        np.array(position, dtype=np.int64), text(ident), text(ref), text(alt), np.array(index, dtype=np.int16),
        [f"s {k}" for k in range(len(ploidy))], first, {"1": 1000, "HLA:2": 500}, "GRCh38",
    )  # fmt: skip


@pytest.mark.parametrize("suffix", [".bcf", ".vcf.gz"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=genotype_data())
def test_what_is_written_is_read_back(tmp_path, suffix, data):
    path = tmp_path / f"x{suffix}"
    vcf.write_vcf(path, data, header_lines=["##engine=SYNTHETIC"])
    back = vcf.read_vcf(path)
    if data.n_sites == 0:  # no call tells ploidy
        assert back.sample_ids == data.sample_ids
        return
    assert_same(data, back)


def one_row_data(**changes) -> GenotypeData:
    fields: dict = {
        "bits_lw": bits.pack(np.array([[0, 1, 1, 0]], dtype=np.uint8)), "n_haplotypes": 4, "missing_lw": None,
        "phased": True, "contig": np.array(["1"]), "position_bp": np.array([7]), "id": np.array(["."], dtype=object),
        "ref": np.array(["A"], dtype=object), "alt": np.array(["G"], dtype=object), "alt_index": np.zeros(1, np.int16),
        "sample_ids": ["a", "b"], "haplotypes_of_sample": np.array([0, 2, 4]), "contig_length": {"1": 100},
    }  # fmt: skip
    return GenotypeData(**{**fields, **changes})


def two_alt_rows(second: list[int]) -> GenotypeData:
    text = lambda *values: np.array(values, dtype=object)  # noqa: E731
    return one_row_data(
        bits_lw=bits.pack(np.array([[0, 1, 1, 0], second], dtype=np.uint8)), contig=np.array(["1", "1"]),
        position_bp=np.array([7, 7]), id=text(".", "."), ref=text("A", "A"), alt=text("G", "T"),
        alt_index=np.array([1, 2], dtype=np.int16),
    )  # fmt: skip


def body_of(path: Path) -> list[list[str]]:
    lines = gzip.decompress(path.read_bytes()).decode().splitlines(keepends=True)
    return [line.split("\t") for line in lines if not line.startswith("#")]


def test_split_alleles_that_meet_on_a_haplotype_stay_separate_records(tmp_path):
    path = tmp_path / "x.vcf.gz"
    vcf.write_vcf(path, two_alt_rows([1, 0, 0, 0]))
    body = body_of(path)
    assert [row[4] for row in body] == ["G,T"]
    assert body[0][7:] == ["AC=2,1;AN=4;AF=0.5,0.25", "GT", "2|1", "1|0\n"]
    vcf.write_vcf(path, two_alt_rows([0, 1, 0, 0]))
    body = body_of(path)
    assert [row[4] for row in body] == ["G", "T"]
    assert [row[9] for row in body] == ["0|1", "0|1"]


def test_the_header_says_what_the_file_is(tmp_path):
    path = tmp_path / "x.vcf.gz"
    vcf.write_vcf(path, one_row_data(), header_lines=["##engine=SYNTHETIC"], contigs={"1": 100}, assembly="GRCh37")
    text = gzip.decompress(path.read_bytes()).decode()
    assert text.startswith("##fileformat=VCFv4.3\n")
    for part in (
        "##source=engine ",
        "##reference=GRCh37",
        "##contig=<ID=1,length=100,assembly=GRCh37>",
        "##engine=SYNTHETIC",
    ):
        assert part in text


def test_nothing_is_left_behind_on_error_and_no_stale_index(tmp_path):
    path = tmp_path / "x.bcf"
    for wrong in (
        {"ref": np.array(["A\tC"], dtype=object)},
        {"alt": np.array(["G,T"], dtype=object)},
        {"id": np.array(["a b"], dtype=object)},
        {"contig": np.array(["a b"])},
        {"sample_ids": ["a", "a"]},
        {"position_bp": np.array([2**31])},
    ):
        with pytest.raises(InputError):
            vcf.write_vcf(path, one_row_data(**wrong))
    for line in ("no hashes", "##contig=<ID=9>", "##key", "##INFO=<ID=AC>", "##a=b\n##c=d"):
        with pytest.raises(UsageError):
            vcf.write_vcf(path, one_row_data(), header_lines=[line])
    with pytest.raises(UsageError):
        vcf.write_vcf(tmp_path / "x.vcf", one_row_data())
    assert list(tmp_path.iterdir()) == []
    gz = tmp_path / "x.vcf.gz"
    (tmp_path / "x.vcf.gz.csi").write_text("of an older file")
    vcf.write_vcf(gz, one_row_data())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.vcf.gz", "x.vcf.gz.tbi"]
    assert gzip.decompress((tmp_path / "x.vcf.gz.tbi").read_bytes())[:4] == b"TBI\1"
    vcf.write_vcf(gz, one_row_data(contig_length={"1": 2**30}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.vcf.gz", "x.vcf.gz.csi"]


def test_a_haploid_call_ends_its_vector(tmp_path):
    """BCF pads a shorter call with 0x81 (section 6.3.3), and nothing else is a haploid call."""
    path = tmp_path / "x.bcf"
    data = one_row_data(
        bits_lw=bits.pack(np.array([[1, 0, 1]], dtype=np.uint8)),
        n_haplotypes=3,
        haplotypes_of_sample=np.array([0, 1, 3]),
    )
    vcf.write_vcf(path, data)
    assert gzip.decompress(path.read_bytes()).endswith(b"\x11\x04\x21" + bytes([4, 0x81, 2, 5]))


def test_a_record_of_other_sample_count_is_refused(tmp_path):
    path = tmp_path / "x.bcf"
    vcf.write_vcf(path, one_row_data())
    whole = bytearray(gzip.decompress(path.read_bytes()))
    length = int.from_bytes(whole[5:9], "little")
    at = 9 + length + 8 + 20  # n_sample of the first record
    assert whole[at] == 2
    whole[at] = 1
    path.write_bytes(gzip.compress(bytes(whole)))
    with pytest.raises(InputError, match="1 samples where the header names 2"):
        vcf.read_vcf(path)


# --- beside bcftools, on real data ---


def bcftools(*arguments: object) -> str:
    done = subprocess.run(["bcftools", *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


REAL = [
    "chr15_10k/train.bcf",
    "genomewide_1126/1KG_phase3_subset_chr2.vcf.gz",
    "genomewide_1126/1KG_phase3_subset_chrX.vcf.gz",
    "odd/chr20_scaffold_missing.bcf",
    "odd/chr20_unphased.bcf",
]


@needs_bcftools
@pytest.mark.parametrize("name", REAL)
def test_real_files_agree_with_bcftools_and_come_back_exactly(real_data, tmp_path, name):
    source = real_data / "genomics" / name
    data = vcf.read_vcf(source)
    people = data.sample_ids[:3] + data.sample_ids[-1:]
    wanted = bcftools("query", "-s", ",".join(people), "-f", "%CHROM %POS %REF %ALT[ %GT]\n", source).splitlines()
    sub = vcf.read_vcf(source, samples=people)
    table, row = alleles(sub), 0
    for line in wanted:
        contig, position, ref, alts, *calls = line.split(" ")
        for k, alt in enumerate(alts.split(","), start=1):
            assert (sub.contig[row], sub.position_bp[row], sub.ref[row], sub.alt[row]) == (
                contig,
                int(position),
                ref,
                alt,
            )
            expected = []
            for s, call in enumerate(calls):
                own = [-1 if a == "." else int(int(a) == k) for a in call.replace("|", "/").split("/")]
                size = int(np.diff(sub.haplotypes_of_sample)[s])
                expected += [*own, -1][:size]
            assert table[row] == expected, line
            row += 1
    assert row == sub.n_sites
    for suffix in (".bcf", ".vcf.gz"):
        out = tmp_path / f"out{suffix}"
        vcf.write_vcf(out, data, header_lines=["##engine=SYNTHETIC"])
        assert_same(data, vcf.read_vcf(out))
        assert bcftools("view", "-H", "-G", out).count("\n") == len(wanted)
        assert f"number of samples:\t{len(data.sample_ids)}" in bcftools("stats", out)
        if suffix == ".vcf.gz":  # bcftools' own .csi of a BCF does not answer this without a warning either
            assert bcftools("index", "-n", out).strip() == str(len(wanted))
        first = f"{data.contig[0]}:{data.position_bp[0]}"
        assert bcftools("view", "-H", "-G", "-r", first, out).startswith(f"{data.contig[0]}\t{data.position_bp[0]}\t")
        filled = bcftools("query", "-f", "%AC %AN\n", out)
        assert filled == bcftools_counts(out)


def bcftools_counts(path: Path) -> str:
    """AC and AN as bcftools counts them itself from the genotypes when samples are chosen (here all of them)."""
    names = path.with_name("names")
    names.write_text(bcftools("query", "-l", path))
    counted = path.with_name("counted.bcf")
    bcftools("view", "-Ob", "-S", names, "-o", counted, path)
    return bcftools("query", "-f", "%AC %AN\n", counted)


def test_every_real_file_is_read(real_data):
    for path in sorted((real_data / "genomics").rglob("*")):
        if path.name.endswith((".vcf.gz", ".bcf")):
            data = vcf.read_vcf(path)
            assert data.n_sites > 1000
            assert not (data.bits_lw & ~tail(data.n_haplotypes)).any()


def tail(n: int) -> np.ndarray:
    from engine.files.genotypes import tail_mask

    return tail_mask(n)


# --- damage ---


def test_truncated_and_corrupted_files_are_refused(real_data, tmp_path):
    source = (real_data / "genomics" / "odd" / "chr20_scaffold_missing.bcf").read_bytes()
    for name, damaged in {
        "half": source[: len(source) // 2],
        "no end": source[:-28],
        "one byte": source[:5000] + bytes([source[5000] ^ 1]) + source[5001:],
        "empty": b"",
        "other": b"PK\3\4" + source,
    }.items():
        path = tmp_path / f"{name}.bcf"
        path.write_bytes(damaged)
        with pytest.raises(InputError) as caught:
            vcf.read_vcf(path)
        assert "\n" not in str(caught.value)
        assert vcf.check(path)[0] == "reject"


def test_mutated_files_never_end_the_interpreter(tmp_path):
    """Thousands of random edits of a BCF and a VCF: each is read or refused with an InputError, in one process."""
    vcf.write_vcf(tmp_path / "x.bcf", two_alt_rows([1, 0, 0, 0]))
    vcf.write_vcf(tmp_path / "x.vcf.gz", two_alt_rows([1, 0, 0, 0]))
    code = """
import gzip, random, sys, time
from engine.errors import InputError
from engine.files.vcf import read_vcf
folder, draw, seen = sys.argv[1], random.Random(7), {"read": 0, "refused": 0}
whole = {k: gzip.open(f"{folder}/x.{k}").read() for k in ("bcf", "vcf.gz")}
end = time.monotonic() + 20
for _ in range(3000):
    kind = draw.choice(list(whole)); data = bytearray(whole[kind])
    for _ in range(draw.choice([1, 1, 2, 5])):
        at, how = draw.randrange(len(data)), draw.random()
        if how < 0.6: data[at] = draw.randrange(256)
        elif how < 0.7: del data[at:at + draw.randrange(1, 9)]
        elif how < 0.9: data[at:at] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
        else: data[at + 1:] = b""
        if not data: break
    with open(f"{folder}/m", "wb") as out: out.write(data)
    try: read_vcf(f"{folder}/m"); seen["read"] += 1
    except InputError: seen["refused"] += 1
    if time.monotonic() > end: break
print(seen["read"] > 20, seen["refused"] > 20)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "True True\n"), done.stderr[-2000:]


def test_a_bcf_that_lies_about_its_size_is_refused_before_memory_is_taken(tmp_path):
    path = tmp_path / "x.bcf"
    path.write_bytes(gzip.compress(b"BCF\2\2" + b"\xff\xff\xff\x7f" + b"##fileformat=VCFv4.2\n"))
    with pytest.raises(InputError, match="header of at most 256 MiB"):
        vcf_structure.inspect(path)


def test_the_specification_files_are_read_or_refused(real_data):
    """All of `bad/vcf`: a verdict in one line each, and reading in one process agrees with it."""
    root = real_data / "bad" / "vcf"
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    verdicts = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        verdict, why = vcf.check(path)
        assert "\n" not in why
        assert (verdict == "ok") == (why == "")
        assert "ended the reader" not in why
        kind = next((part for part in ("passed", "failed") if part in path.parts), "other")
        counts[kind][verdict] += 1
        verdicts[path] = verdict
    assert len(verdicts) > 1000
    assert counts["passed"]["reject"] <= 7, counts  # named with reasons in docs/formats.md
    assert counts["failed"]["ok"] <= 9, counts
    for path, verdict in verdicts.items():
        try:
            vcf.read_vcf(path)
            assert verdict != "reject", path
        except EngineError:
            assert verdict == "reject", path


def test_check_outlives_a_reader_that_dies(tmp_path, monkeypatch):
    from engine.files import vcf_check

    path = text_vcf(tmp_path / "x.vcf", [GOOD])
    assert vcf.check(path)[0] == "ok"
    os.kill(vcf_check._worker.pid, 9)
    assert vcf.check(path)[0] in ("ok", "reject")  # the dead worker may still be taken for alive once
    assert vcf.check(path) == ("ok", "")
