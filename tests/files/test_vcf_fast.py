"""The fast reader of VCF and BCF beside cyvcf2: the same answer, or the same sentence, on every file there is to be had."""

from __future__ import annotations

import gzip
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pysam.bcftools
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import EngineError, InputError, Unsupported, UsageError
from engine.files import bgzf, vcf, vcf_cyvcf2, vcf_fast_cells, vcf_fast_rows
from engine.files.bgzf import EOF_BLOCK, Irregular
from engine.files.genotypes import GenotypeData
from engine.files.vcf_fast_bits import decode, pointer

HEAD = """##fileformat=VCFv4.2
##FILTER=<ID=PASS,Description="All filters passed">
##FILTER=<ID=q10,Description="Low">
##contig=<ID=1,length=1000000,assembly=b37>
##contig=<ID=chrX>
##INFO=<ID=AC,Number=A,Type=Integer,Description="Count">
##INFO=<ID=END,Number=1,Type=Integer,Description="End">
##INFO=<ID=FL,Number=0,Type=Flag,Description="Flag">
##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">
##FORMAT=<ID=DP,Number=1,Type=Integer,Description="Depth">
##FORMAT=<ID=PL,Number=G,Type=Integer,Description="Likelihoods">
##FORMAT=<ID=GP,Number=G,Type=Float,Description="Probabilities">
##FORMAT=<ID=FT,Number=1,Type=String,Description="Filter">
"""
# what the records below use besides
MORE_HEAD = """##contig=<ID=new>
##FILTER=<ID=new1,Description="New">
##FILTER=<ID=new2,Description="New">
##INFO=<ID=UNKNOWN,Number=1,Type=Integer,Description="Unknown">
##INFO=<ID=LONG,Number=1,Type=String,Description="Long">
##FORMAT=<ID=ZZ,Number=1,Type=String,Description="Unknown">
"""


def text_of(records: list[str], samples: int, head: str = HEAD) -> bytes:
    """A VCF with blanks standing for tabs."""
    names = "#CHROM POS ID REF ALT QUAL FILTER INFO"
    names += " FORMAT " + " ".join(f"s{k}" for k in range(samples)) if samples else ""
    return (head + "".join(line.replace(" ", "\t") + "\n" for line in [names, *records])).encode()


def block(data: bytes) -> bytes:
    """One block of BGZF (SAMv1.pdf, section 4.1)."""
    squeeze = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = squeeze.compress(data) + squeeze.flush()
    head = bytes.fromhex("1f8b08040000000000ff0600424302") + b"\0" + struct.pack("<H", len(body) + 25)
    return head + body + struct.pack("<II", zlib.crc32(data), len(data))


def bgzip(data: bytes, size: int = 60_000) -> bytes:
    return b"".join(block(data[k : k + size]) for k in range(0, len(data), size)) + EOF_BLOCK


def bcf_of(folder: Path, text: bytes) -> bytes:
    """BCF of a text, not compressed."""
    source, target = folder / "source.vcf", folder / "target.bcf"
    source.write_bytes(text)
    pysam.bcftools.view("-Ou", "-o", str(target), str(source), catch_stdout=False)
    return gzip.decompress(target.read_bytes())


def outcome(path: Path, **arguments: Any) -> GenotypeData | str:
    try:
        return vcf.read_vcf(path, **arguments)
    except EngineError as error:
        return f"{type(error).__name__}: {error}"


def assert_same(a: GenotypeData | str, b: GenotypeData | str) -> None:
    if isinstance(a, str) or isinstance(b, str):
        assert a == b
        return
    for name, one in vars(a).items():
        two = getattr(b, name)
        if isinstance(one, np.ndarray):
            assert isinstance(two, np.ndarray), name
            assert (one.dtype, one.shape) == (two.dtype, two.shape), name
            assert one.tolist() == two.tolist(), name
        else:
            assert one == two, name
    assert all(type(text) is str for name in ("id", "ref", "alt") for text in getattr(b, name).tolist())


def both(path: Path, **arguments: Any) -> GenotypeData | str:
    """What cyvcf2 makes of a file, after the default has been seen to make the same of it."""
    wanted = outcome(path, implementation="cyvcf2", **arguments)
    assert_same(wanted, outcome(path, **arguments))
    return wanted


def check_fast(path: Path, **arguments: Any) -> GenotypeData:
    """`both`, of a file that the fast reader must read itself."""
    wanted = both(path, **arguments)
    assert isinstance(wanted, GenotypeData), wanted
    assert_same(wanted, vcf.read_vcf(path, implementation="numba", **arguments))
    return wanted


# --- genotype bytes to bits ---


def brute_force(gt: np.ndarray, alts: int) -> tuple[list[list[int]], list[int]] | None:
    """Rows of alleles and the row of missing ones, written from the specification; None where a byte has no meaning."""
    alleles = []
    for sample in gt.tolist():
        for place, byte in enumerate([*sample, 0x81][:2]):
            if byte == 0x81:
                if place == 0:
                    return None
                alleles.append(-2)
            elif byte // 2 - 1 > alts:
                return None
            else:
                alleles.append(byte // 2 - 1)
    rows = [[int(allele == k) for allele in alleles] for k in range(1, max(1, alts) + 1)]
    return rows, [int(allele < 0) for allele in alleles]


def brute_ploidy(gt: np.ndarray) -> tuple[list[int], list[int], list[int], bool]:
    """Per sample: second allele called or missing in a phased pair; a call of one allele; such a call with its allele. And
    whether a called heterozygote is unphased."""
    diploid, haploid, called, unphased = [], [], [], False
    for sample in gt.tolist():
        one, two = [*sample, 0x81][:2]
        first, second = one // 2 - 1, -2 if two == 0x81 else two // 2 - 1
        phased = two % 2 == 1
        diploid.append(int(second >= 0 or (second == -1 and phased)))
        haploid.append(int(second == -2 or (second == -1 and not phased and first >= 0)))
        called.append(int(haploid[-1] and first >= 0))
        unphased |= first >= 0 and second >= 0 and first != second and not phased
    return diploid, haploid, called, unphased


@pytest.mark.parametrize("samples", [1, 2, 31, 32, 33, 63, 64, 65, 97, 331])
@pytest.mark.parametrize("kind", ["usual", "one unphased", "missing", "haploid", "wrong"])
def test_bytes_become_the_bits_of_the_specification(samples, kind):
    from engine.kernels import bits

    rng = np.random.default_rng(samples)
    for alts in (0, 1, 2, 3, 60):
        for ploidy in (1, 2):
            gt = (rng.integers(0, alts + 1, (samples, ploidy)) + 1).astype(np.uint8) << 1
            if ploidy == 2:
                gt[:, 1] |= rng.random(samples) < (1.0 if kind in ("usual", "one unphased") else 0.5)
            if kind == "one unphased" and ploidy == 2:
                gt[rng.integers(samples)] = 2, 4 if alts else 2
            if kind in ("missing", "haploid", "wrong"):
                gt[rng.random(gt.shape) < 0.2] &= 1
            if kind == "haploid" and ploidy == 2:
                gt[rng.random(samples) < 0.3, 1] = 0x81
            if kind == "wrong":
                gt[rng.integers(samples), rng.integers(ploidy)] = rng.choice([2 * alts + 4, 0x80, 0x82, 0xFF])
            words = bits.words(2 * samples)
            plane = np.full((alts + 3, words), 0xDEADBEEF, dtype=np.uint64)  # poisoned
            missing, seen = np.zeros_like(plane), np.zeros((3, words), dtype=np.uint64)
            buffer = np.full(gt.size + 164, 0x83, dtype=np.uint8)
            buffer[100 : 100 + gt.size] = gt.ravel()
            kept, found = np.full(words, 0xAAAAAAAAAAAAAAAA, dtype=np.uint64), np.zeros(3, dtype=np.uint8)
            fine = run_decode(buffer, 100, samples, ploidy, alts, 1, plane, missing, seen, kept, found)
            wanted = brute_force(gt, alts)
            assert fine == (wanted is not None)
            if wanted is None:
                assert not seen.any()
                assert not found.any()
                continue
            rows, holes = wanted
            count = len(rows)
            np.testing.assert_array_equal(plane[1 : 1 + count], bits.pack(np.array(rows, dtype=np.uint8)))
            np.testing.assert_array_equal(
                missing[1 : 1 + count], np.repeat(bits.pack(np.array([holes], dtype=np.uint8)), count, 0)
            )
            assert (plane[[0, *range(1 + count, alts + 3)]] == 0xDEADBEEF).all()
            assert found[0] == any(holes)
            diploid, haploid, called, unphased = brute_ploidy(gt)
            assert bool(found[1]) == unphased
            if found[2]:
                assert all(diploid)
            else:
                assert bits.unpack(seen, 2 * samples)[:, 1::2].tolist() == [diploid, haploid, called]


def run_decode(gt: np.ndarray, at: int, samples: int, ploidy: int, alts: int, row: int, *planes: np.ndarray) -> bool:
    import numba

    global _run_decode
    if _run_decode is None:

        @numba.njit
        def call(gt, at, samples, ploidy, alts, row, plane, missing, seen, kept, found):
            return decode(
                pointer(gt), at, samples, ploidy, alts, row, plane.shape[1],
                pointer(plane), pointer(missing), pointer(seen), pointer(kept), pointer(found),
            )  # fmt: skip

        _run_decode = call
    return bool(_run_decode(gt, at, samples, ploidy, alts, row, *planes))


_run_decode: Any = None
BYTES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 0x20, 0x7E, 0x7F, 0x80, 0x81, 0x82, 0xFF]


@pytest.mark.parametrize("alts", ["G", "G,T", "."])
def test_every_pair_of_genotype_bytes_means_what_htslib_says(tmp_path, alts):
    whole = bytearray(bcf_of(tmp_path, text_of([f"1 10 . A {alts} . . . GT 0|0 0|0 0|0"] * 2, 3)))
    path = tmp_path / "x.bcf"
    read = 0
    for one in BYTES:
        for two in BYTES:
            whole[-4:-2] = bytes([one, two])  # the second sample of three
            path.write_bytes(whole)
            read += isinstance(both(path), GenotypeData)
    assert read > 50


# --- the same answer on files of every kind ---


def odd_record(draw: random.Random, samples: int, position: int, share: float, haploid: list[bool]) -> str:
    """A line with blanks for tabs: mostly plain, with the given share of what is not."""

    def odd() -> bool:
        return draw.random() < share

    alts = draw.choice(["G", "G", "G", "G", "G,T", "AT,C,*", ".", "C" * 20 + "," + "G" * 90])
    if odd():
        alts = draw.choice(["<DEL>", "<DEL>,A", "A[1:5[", "R", ".", "A.", ",".join("A" * k for k in range(1, 80))])
    count = 0 if alts == "." else alts.count(",") + 1
    keys = draw.choice(["GT", "GT", "GT", "GT:DP", "GT:DP:PL", "GT:GP", "GT:FT:DP"]).split(":")
    if odd():
        keys = draw.choice(["DP", "GT:ZZ", "DP:FT", "."]).split(":")

    def allele() -> str:
        return "." if draw.random() < draw.choice([0, 0, 0.1]) else str(min(9, draw.randint(0, count)))

    def cell(sample: int) -> str:
        values = []
        for key in keys:
            if key == "GT":
                call = f"{allele()}{draw.choice('|||/')}{allele()}"
                call = draw.choice([allele(), f"{allele()}/."]) if haploid[sample] and not odd() else call
                values.append(draw.choice([".", "./.", "0/.", ".|0", "1", "10|0"]) if odd() else call)
            elif odd():
                values.append(draw.choice([".", "-1", "1,2", "1e5", "x", ".5"]) if key in ("GP", "FT") else ".")
            else:
                number = str(draw.randint(0, 1000))
                values.append({"DP": number, "PL": f"0,{number},7", "GP": "0.5,1e-05,1", "FT": "PASS"}.get(key, "."))
        return ":".join(values[: draw.randint(1, len(values))] if odd() else values)

    fixed = [
        draw.choice(["1"]), str(position), draw.choice([".", "rs1", "a;b"]), draw.choice(["A", "A", "ACG"]), alts,
        draw.choice([".", "30"]), draw.choice(["PASS", ".", "q10", "new1;new2"]),
        draw.choice([".", "AC=1", "FL", "AC=1,2;FL", "UNKNOWN=5"]),
    ]  # fmt: skip
    if odd():
        fixed[draw.choice([2, 5, 7])] = draw.choice(["é", "x<y", "x"])
    return " ".join(fixed + ([":".join(keys)] + [cell(k) for k in range(samples)] if samples else []))


def odd_text(seed: int, head: str) -> bytes:
    draw = random.Random(seed)
    samples = draw.choice([0, 1, 2, 3, 16, 31, 32, 33, 64, 65])
    share = draw.choice([0, 0, 0.01, 0.1])
    haploid = [draw.random() < 0.1 for _ in range(samples)]
    lines, position = [], 0
    for contig in draw.choice([["1"], ["1", "chrX"], ["new", "1"]]):
        position = 0
        for _ in range(draw.choice([0, 1, 5, 30])):
            position += draw.choice([0, 1, 500])
            lines.append(contig + odd_record(draw, samples, position, share, haploid)[1:])
    text = text_of(lines, samples, head)
    text = text.replace(b"\n", b"\r\n") if draw.random() < 0.1 else text
    return text[:-1] if draw.random() < 0.1 else text


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), size=st.sampled_from([1, 61, 700, 60_000]), as_bcf=st.booleans())
def test_mixed_records_are_read_as_by_cyvcf2(tmp_path, seed, size, as_bcf):
    data = odd_text(seed, HEAD + MORE_HEAD if as_bcf else HEAD)
    if as_bcf and b"\r" not in data:
        try:
            data = bcf_of(tmp_path, data)
        except pysam.SamtoolsError:
            return
    path = tmp_path / "x"
    for raw in (data, gzip.compress(data), bgzip(data, size if len(data) < 5000 * size else 60_000)):
        path.write_bytes(raw)
        both(path)
    both(path, samples=["s2", "s0"], threads=2)
    both(path, region="1:2-1500")
    both(path, region="chrX", samples=["s1"])


PLAIN = [
    "1 10 rs1 A G . PASS AC=1 GT 0|1 1|1 .|0",
    "1 20 . C T,G 9 q10 . GT 2/1 0 0|2",
    "chrX 5 . G A . . . GT:DP 0|1:3 1:4 .",
]


def test_plain_files_of_every_wrapping_are_read_by_the_fast_reader(tmp_path):
    text = text_of(PLAIN, 3)
    path = tmp_path / "x"
    for data in (text, text.replace(b"\n", b"\r\n"), text[:-1], bcf_of(tmp_path, text)):
        middle = len(data) // 2
        for raw in (
            data, gzip.compress(data), gzip.compress(data[:middle]) + gzip.compress(data[middle:]),
            *(bgzip(data, size) for size in (1, 7, 100, 60_000)),
            bgzip(data[:middle]) + bgzip(data[middle:]),  # an end-of-file block in the middle
        ):  # fmt: skip
            path.write_bytes(raw)
            made = check_fast(path)
            assert made.alt.tolist() == ["G", "T", "G", "A"]


def test_records_longer_than_a_piece(tmp_path, monkeypatch):
    lines = [
        f"1 {k} . A G . PASS LONG={'x' * length} GT 0|1 1|1 .|0" for k, length in enumerate([5, 3 << 20, 9, 1 << 21, 7])
    ]
    text = text_of(lines, 3, HEAD + MORE_HEAD)
    path = tmp_path / "x"
    for data in (text, bcf_of(tmp_path, text)):
        path.write_bytes(bgzip(data))
        check_fast(path)
        check_fast(path, threads=3)
    monkeypatch.setattr(bgzf, "_PIECE", 1 << 16)
    check_fast(path)


def test_more_records_than_a_table_holds(tmp_path, monkeypatch):
    """Tables, heaps and planes run full, with rows for cyvcf2 among the others."""
    monkeypatch.setattr(vcf_fast_rows, "_TABLE", 7)
    monkeypatch.setattr(vcf_fast_rows, "_HEAP", 300)
    monkeypatch.setattr(vcf_fast_rows, "_FIRST_ROWS", 3)
    draw = random.Random(5)
    lines = [odd_record(draw, 33, 10 + k, 0, [k == 3 for k in range(33)]) for k in range(300)]
    lines[::11] = [f"1 {10 + k} . A <DEL>,T . . . GT " + " ".join(["0|2"] * 33) for k in range(0, 300, 11)]
    lines[200] = f"1 210 . A {','.join('C' * k for k in range(1, 50))} . . . GT " + " ".join(["0|7"] * 33)
    path = tmp_path / "x.vcf.gz"
    path.write_bytes(bgzip(text_of(lines, 33)))
    assert check_fast(path).n_sites > 300
    check_fast(path, samples=["s30", "s3", "s4"], region="1:100-250")


def test_cells_are_judged_as_htslib_does(tmp_path):
    """Integers, floats and text after GT: what the automaton takes htslib takes, and the other way it falls to cyvcf2."""
    path = tmp_path / "x.vcf"
    numbers = ["3", "-4", "1,2", "1.5", "1.", ".5", "1-2", "1,", "1e5", "1e", "1e-5", "+1", "1.2.3", "nan"]
    values = [*numbers, "", ".", ".,.", "-", "x", "a b"]
    seen = set()
    for key in ("DP", "PL", "GP", "FT"):
        for value in values:
            for tail in (f"0|1:{value}", f"0|1:{value}:9", f".:{value}", f"0|1:9:{value}"):
                for keys in (f"GT:{key}", f"GT:{key}:DP", f"GT:PL:{key}"):
                    line = f"1 10 . A G . . . {keys} 0|0 CELL 1|1".replace(" ", "\t").replace("CELL", tail)
                    path.write_bytes(text_of([], 3) + line.encode() + b"\n")
                    seen.add(isinstance(both(path), GenotypeData))
    assert seen == {True, False}


@pytest.mark.parametrize("samples", [1, 3, 15, 16, 17, 64, 331])
def test_both_ways_through_cells_agree(samples):
    """Sixty-four bytes at a time and byte by byte: the same genotype bytes, and the same line end."""
    import numba

    @numba.njit
    def call(b, at, end, samples, types, gt, other):
        return (
            vcf_fast_cells.cells(pointer(b), at, end, samples, pointer(types), 0, pointer(gt)),
            vcf_fast_cells.integer_cells(pointer(b), at, end, samples, types[0], pointer(other)),
        )

    types = np.array([3, vcf_fast_cells.INTEGER, vcf_fast_cells.INTEGER], dtype=np.uint8)
    draw = random.Random(samples)
    taken = 0
    for turn in range(300):
        cells = []
        for _ in range(samples):
            genotype = draw.choice(["0|1", "1/1", "0", ".", ".|.", "9|0"])
            values = [draw.choice(["3", "-17", ".", "1024"]), draw.choice(["0,12,345", ".,.", "-1"])]
            cells.append(":".join([genotype, *values][: draw.randint(1, 3)]))
        text = bytearray("\t".join(cells).encode() + b"\n")
        if turn % 2:
            text[draw.randrange(len(text))] = draw.choice(b"0.,-:|/\t\n x9")
        buffer = np.frombuffer(b"\x39" * 20 + bytes(text) + b"7" * 256, dtype=np.uint8).copy()
        for end in (20 + len(text), 20 + draw.randrange(len(text))):
            gt, other = np.full((2, 2 * samples), 0xEE, dtype=np.uint8)
            slow, fast = call(buffer, 20, end, samples, types, gt, other)
            # a surplus cell is seen by the one when it begins, by the other when it ends
            assert fast in (slow, -1) or (fast == end and 10 not in buffer[20:end]), bytes(text)
            if fast not in (-1, end):
                taken += 1
                assert fast == slow
                assert gt.tobytes() == other.tobytes(), bytes(text)
    assert taken > 100


# --- damage ---


@pytest.mark.parametrize("kind", ["bcf", "vcf"])
def test_every_damage_ends_in_the_same_sentence(tmp_path, kind):
    """Bytes of the content and of the compressed file changed, cut or doubled, in some 900 places."""
    text = text_of([*PLAIN[:2], "1 30 x A <DEL> . PASS END=90 GT:DP:PL 0|1:3:0,1,2 ./.:. 0|0:1:2,3,4", PLAIN[2]], 3)
    data = bcf_of(tmp_path, text) if kind == "bcf" else text
    body = data.index(b"#CHROM")
    draw = random.Random(3)
    path = tmp_path / "x"
    whole = bgzip(data, 200)
    outcomes: set[bool] = set()
    for turn in range(900):
        if turn % 3 == 0:
            raw = bytearray(whole)
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        elif turn % 3 == 1:
            changed = bytearray(data)
            at = draw.randrange(body, len(data))
            how = draw.random()
            if how < 0.7:
                changed[at] = draw.choice([draw.randrange(256), (changed[at] + 1) % 256, 0, 9, 10])
            elif how < 0.85:
                del changed[at : at + draw.randint(1, 9)]
            else:
                changed[at:at] = changed[at : at + draw.randint(1, 9)]
            raw = bytearray(draw.choice([bytes, bgzip, gzip.compress])(bytes(changed)))
        else:
            raw = bytearray(draw.choice([whole, data, gzip.compress(data)]))
            del raw[draw.randrange(len(raw)) :]
        path.write_bytes(raw)
        outcomes.add(isinstance(both(path), GenotypeData))
    assert outcomes == {True, False}


def test_checksum_length_and_growth_of_every_block_are_verified(tmp_path):
    text = text_of(PLAIN, 3)
    first, second = block(text[:700]), block(text[700:])
    path = tmp_path / "x.vcf.gz"

    def refused(raw: bytes) -> None:
        path.write_bytes(raw)
        for functions in (bgzf._FUNCTIONS, None):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(bgzf, "_FUNCTIONS", functions)
                with pytest.raises(Irregular):
                    for _ in bgzf.pieces(path):
                        pass

    for at in (-8, -5, -4, -1, 3, 16, 30):
        changed = bytearray(second)
        changed[at] ^= 1
        refused(first + bytes(changed) + EOF_BLOCK)
    empty = block(b"")
    refused(first + empty[:-4] + struct.pack("<I", 60_000) + EOF_BLOCK)  # grows by more than deflate can
    refused(first + second)  # no end
    refused(first + second[:-9] + EOF_BLOCK)
    refused(first + gzip.compress(b"x") + EOF_BLOCK)
    refused(first + second + b"\0" + EOF_BLOCK)


def test_the_package_without_open_functions_gives_the_same(tmp_path, monkeypatch):
    path = tmp_path / "x.bcf"
    path.write_bytes(bgzip(bcf_of(tmp_path, text_of(PLAIN, 3)), 100))
    wanted = check_fast(path)
    monkeypatch.setattr(bgzf, "_FUNCTIONS", None)
    assert_same(wanted, vcf.read_vcf(path, implementation="numba"))
    assert_same(wanted, vcf.read_vcf(path, implementation="numba", threads=4))


def test_bytes_too_many_or_too_few_in_a_bcf_record(tmp_path):
    """Lengths of the two blocks and counts of INFO and FORMAT that do not fit their content."""
    data = bcf_of(tmp_path, text_of(["1 10 rs1 A G . PASS AC=1 GT:DP 0|1:3 1|1:4 .|0:5"] * 12, 3))
    start = 9 + int.from_bytes(data[5:9], "little")
    shared, individual = struct.unpack_from("<II", data, start)
    length = 8 + shared + individual
    at = start + 10 * length  # beyond the records that are decoded both ways
    record = data[at : at + length]
    path = tmp_path / "x.bcf"
    outcomes = set()
    for more_shared in (-1, 0, 1, 3):
        for more_individual in (-1, 0, 1, 3):
            for info, formats in ((1, 2), (0, 2), (2, 2), (1, 1), (1, 3)):
                first = record[8 : 8 + shared + min(0, more_shared)] + bytes(max(0, more_shared))
                second = record[8 + shared : length + min(0, more_individual)] + bytes(max(0, more_individual))
                changed = bytearray(struct.pack("<II", len(first), len(second)) + first + second)
                changed[8 + 16], changed[8 + 23] = info, formats
                path.write_bytes(data[:at] + bytes(changed) + data[at + length :])
                outcomes.add((more_shared, more_individual, isinstance(both(path), GenotypeData)))
    assert (0, 0, True) in outcomes
    assert (1, 0, True) not in outcomes
    assert (0, 1, True) not in outcomes


# --- the choice ---


def test_a_named_implementation_is_never_replaced(tmp_path):
    path = tmp_path / "x.vcf"
    path.write_bytes(text_of(PLAIN, 3) + b"\n")  # an empty last line, which only the other way reads
    assert isinstance(both(path), GenotypeData)
    with pytest.raises(Unsupported, match="implementation='cyvcf2'"):
        vcf.read_vcf(path, implementation="numba")
    with pytest.raises(UsageError, match="numba or cyvcf2"):
        vcf.read_vcf(path, implementation="fast")
    with pytest.raises(InputError, match="no such file"):
        vcf.read_vcf(tmp_path / "none.vcf")
    assert outcome(tmp_path) == outcome(tmp_path, implementation="cyvcf2")


def test_records_that_htslib_reads_otherwise_are_noticed(tmp_path, monkeypatch):
    """The first records are decoded both ways: were the fast decoder wrong, cyvcf2 would read the file."""
    path = tmp_path / "x.vcf"
    path.write_bytes(text_of(PLAIN, 3))
    right = vcf_cyvcf2.planes
    monkeypatch.setattr(vcf_cyvcf2, "planes", lambda block: (right(block)[0] ^ np.uint64(2), right(block)[1]))
    with pytest.raises(Unsupported, match="reads otherwise"):
        vcf.read_vcf(path, implementation="numba")


def test_a_contig_in_two_stretches_is_noticed_across_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(vcf_fast_rows, "_TABLE", 3)
    line = "{} {} . A G . . . GT 0|1"
    lines = [line.format("1", k) for k in range(5)] + [line.format("chrX", k) for k in range(5)] + [line.format("1", 9)]
    text = text_of(lines, 1)
    path = tmp_path / "x"
    for data in (text, bcf_of(tmp_path, text)):
        path.write_bytes(bgzip(data))
        assert "'1' again" in str(both(path))
        assert "'1' again" in str(both(path, region="chrX"))


def test_a_bcf_whose_dictionary_is_out_of_order_is_left_to_htslib(tmp_path):
    data = bcf_of(tmp_path, text_of(PLAIN, 3))
    assert data.count(b"ID=GT,") == 1
    path = tmp_path / "x.bcf"
    at = data.index(b"IDX=", data.index(b"ID=GT,"))
    path.write_bytes(data[:at] + b"idx=" + data[at + 4 :])
    both(path)
    with pytest.raises(Unsupported, match="dictionary"):
        vcf.read_vcf(path, implementation="numba")


# --- real files ---


def test_every_real_file_reads_the_same(real_data):
    """Panels, and what the specification's own test files and htslib's hold: some 1,200 files, most of them damaged."""
    panels = [p for p in (real_data / "genomics").rglob("*") if p.name.endswith((".vcf.gz", ".bcf"))]
    for path in sorted(panels):
        check_fast(path)
    slow, files = 0, sorted(p for p in (real_data / "bad" / "vcf").rglob("*") if p.is_file())
    for path in files:
        if isinstance(both(path), GenotypeData):
            slow += isinstance(outcome(path, implementation="numba"), str)
    assert len(panels) > 25
    assert len(files) > 1000
    assert slow < 25  # read, but not by the fast reader


def test_samples_and_regions_of_a_real_file(real_data):
    for name in ("odd/chr20_unphased.bcf", "genomewide_1126/1KG_phase3_subset_chrX.vcf.gz"):
        path = real_data / "genomics" / name
        data = check_fast(path)
        chosen = data.sample_ids[200:100:-7]
        middle = int(data.position_bp[len(data.position_bp) // 2])
        check_fast(path, samples=chosen)
        check_fast(path, region=f"{data.contig[0]}:{middle}-", threads=2)
        check_fast(path, region=str(data.contig[0]), samples=chosen)
