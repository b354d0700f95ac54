"""Pruning, clumping and blocks: against the definition, and against the programs whose rules they are, where they are there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UsageError
from engine.kernels import ld
from engine.kernels.bits import lookups
from engine.kernels.ld import likelihood, numba_prune, numba_prune_lookups, reference_greedy
from engine.kernels.ld.numba_cpu import pair_tables, prepare

sys.path.insert(0, str(Path(__file__).parent))
from ld_panels import KINDS, draw, linked, lost, of_kind, pack, same, unpack

_NEWER = Path.home() / ".cache/engine-perf/bin/plink2"  # built by scripts/perf_peers.sh


@settings(max_examples=80, deadline=None)
@given(
    sites=st.integers(0, 140),
    people=st.integers(1, 70),
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(list(KINDS)),
    most=st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.8]),
    rule=st.sampled_from(["plink1", "plink2"]),
    window=st.integers(2, 90),
    step=st.integers(1, 90),
    bp=st.none() | st.integers(0, 500),
)
def test_pruning_is_the_definition(sites, people, seed, kind, most, rule, window, step, bp):
    unphased, missing = KINDS[kind]
    n = 2 * people
    bits = linked(sites, n, seed)
    options = {"unphased": unphased, "missing_lw": lost(sites, n, seed, 0.05) if missing else None, "rule": rule}
    position_bp = np.cumsum(np.random.default_rng(seed).integers(0, 40, sites))
    where = {"sites": window, "step": min(step, window)} if bp is None else {"bp": bp, "position_bp": position_bp}
    got = ld.prune(bits, n, most, **where, **options)
    same(got, ld.prune(bits, n, most, **where, **options, implementation="reference"))


needs_lookups = pytest.mark.skipif(not lookups.AVAILABLE, reason="no AVX2")


@needs_lookups
@settings(max_examples=80, deadline=None)
@given(
    sites=st.integers(1, 420),
    people=st.integers(1, 140),
    seed=st.integers(0, 10_000),
    unphased=st.booleans(),
    flipped=st.booleans(),
    most=st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.8]),
    rule=st.sampled_from(["plink1", "plink2"]),
    window=st.integers(2, 400),
    step=st.integers(1, 400),
    bp=st.none() | st.integers(0, 500),
)
def test_pruning_by_lookups_is_the_definition(sites, people, seed, unphased, flipped, most, rule, window, step, bp):
    n, rng = 2 * people, np.random.default_rng(seed)
    alleles = unpack(linked(sites, n, seed), n)
    if flipped:  # sites whose commoner allele is ALT
        alleles = alleles ^ (rng.random((sites, 1)) < 0.5).astype(np.uint8)
    position_bp = np.cumsum(rng.integers(0, 40, sites))
    step = min(step, window)
    chosen = (window, step, None) if bp is None else (None, 1, bp)
    first = ld.checks.sites(pack(alleles), n, None, unphased)
    rules = ld.checks.prune_rules(sites, most, *chosen, position_bp, rule)
    same(numba_prune_lookups.prune(first, rules), reference_greedy.prune(first, rules))


@needs_lookups
def test_pruning_by_lookups_in_blocks_of_many_groups():
    """A window of 700 new sites stands in six groups of columns, which are squeezed as sites go; then steps of one site."""
    bits = linked(700, 300, seed=8)
    first = ld.checks.sites(bits, 300, None, True)
    for rule in ("plink1", "plink2"):
        for window, step in ((700, 700), (500, 1), (129, 129), (128, 64)):
            rules = ld.checks.prune_rules(700, 0.2, window, step, None, None, rule)
            wanted = reference_greedy.prune(first, rules)
            same(numba_prune_lookups.prune(first, rules), wanted)
            assert 50 < wanted.sum() < 500


@needs_lookups
def test_pruning_takes_lookups_where_the_processor_does_not_count(monkeypatch):
    bits = linked(90, 100, seed=3)
    called = []
    pruned = numba_prune_lookups.prune
    monkeypatch.setattr(numba_prune_lookups, "prune", lambda *given: called.append(1) or pruned(*given))
    for wide, missing_lw, times in ((False, None, 1), (True, None, 0), (False, lost(90, 100, whole=False), 0)):
        monkeypatch.setattr(numba_prune, "WIDE", wide)
        called.clear()
        kept = ld.prune(bits, 100, 0.2, sites=50, unphased=True, missing_lw=missing_lw)
        same(kept, ld.prune(bits, 100, 0.2, sites=50, unphased=True, missing_lw=missing_lw, implementation="reference"))
        assert len(called) == times


@pytest.mark.parametrize("rule", ["plink1", "plink2"])
def test_no_linked_pair_is_left_and_none_goes_without_cause(rule):
    bits = linked(300, 200, seed=5)
    kept = ld.prune(bits, 200, 0.2, sites=300, rule=rule)
    r2 = ld.r2(bits, 200)
    left = r2[np.ix_(kept, kept)] - np.eye(kept.sum())
    assert not (left > 0.2).any()
    varies = np.isfinite(np.diagonal(r2))
    assert not kept[~varies].any()
    for site in np.flatnonzero(~kept & varies):
        assert (np.nan_to_num(np.delete(r2[site], site)) > 0.2).any()
    assert 10 < kept.sum() < 200


@settings(max_examples=60, deadline=None)
@given(
    sites=st.integers(0, 40),
    people=st.integers(1, 60),
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(list(KINDS)),
    rule=st.sampled_from(["plink1", "plink2"]),
)
def test_clumps_are_the_definition(sites, people, seed, kind, rule):
    bits, options = linked(sites, 2 * people, seed), of_kind(kind, sites, 2 * people, seed)[1]
    rng = np.random.default_rng(seed)
    p_l, position_bp = rng.random(sites) ** 4, np.cumsum(rng.integers(0, 3000, sites))
    p_l[rng.random(sites) < 0.1] = np.nan
    limits = {"p1": 0.05, "p2": 0.3, "least": 0.2, "bp": 9000, "rule": rule}
    got = ld.clump(bits, 2 * people, p_l, position_bp, **limits, **options)
    same(got, ld.clump(bits, 2 * people, p_l, position_bp, **limits, **options, implementation="reference"))
    index = np.unique(got[got >= 0])
    assert (got[index] == index).all()
    assert (p_l[index] <= 0.05).all()


@settings(max_examples=40, deadline=None)
@given(
    sites=st.integers(0, 25),
    people=st.integers(1, 80),
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(list(KINDS)),
    max_bp=st.sampled_from([0, 20_000, 50_000, 200_000]),
    short=st.booleans(),
)
def test_blocks_are_the_definition(sites, people, seed, kind, max_bp, short):
    bits, options = linked(sites, 2 * people, seed), of_kind(kind, sites, 2 * people, seed)[1]
    position_bp = np.cumsum(np.random.default_rng(seed).integers(0, 6000, sites))
    options |= {"max_bp": max_bp, "small_blocks_short": short}
    got = ld.blocks(bits, 2 * people, position_bp, **options)
    same(got, ld.blocks(bits, 2 * people, position_bp, **options, implementation="reference"))


def test_blocks_of_a_planted_panel():
    """Two stretches that never recombine, between them sites that are independent of all."""
    rng = np.random.default_rng(2)
    one = np.repeat(rng.integers(0, 2, (3, 400)), 4, axis=0)  # three haplotype-informative sites, four times each
    one[4:8] = one[0:4] & one[4:8]
    one[8:] = one[0:4] & ~one[4:8] | one[8:]
    alleles = np.concatenate([one[:8], rng.integers(0, 2, (4, 400)), one[:8][::-1] ^ 1]).astype(np.uint8)
    block_l = ld.blocks(pack(alleles), 400, np.arange(20) * 1000)
    assert block_l[:8].tolist() == [0] * 8
    assert (block_l[8:12] == -1).all() or len(set(block_l[8:12].tolist())) > 1
    assert block_l[12] >= 0


@settings(max_examples=300, deadline=None)
@given(st.tuples(*[st.integers(0, 30)] * 5))
def test_likelihood_of_a_table(counts):
    """Bracketed roots against solved ones; a maximum is no lower than any place of a fine grid."""
    table = np.array(counts, dtype=np.float64)
    wanted = reference_greedy.Table(*table)
    kind = np.full(1, 255, dtype=np.uint8)
    likelihood.kinds_of(table[None], kind)
    assert kind[0] == reference_greedy.interval_kind(wanted)
    np.testing.assert_allclose(likelihood.likely_r2(table), reference_greedy.likely_r2(wanted), rtol=1e-6, atol=1e-9)
    p11, p1, q1, _ = likelihood.likely_share(table)
    if np.isnan(p11):
        return
    at = lambda p: reference_greedy._ln_likelihood(wanted, p, p1 - p, q1 - p, 1 - p1 - q1 + p)  # noqa: E731
    grid = np.linspace(max(0.0, p1 + q1 - 1), min(p1, q1), 201)[1:-1]
    inside = min(max(p11, 1e-12), min(p1, q1) - 1e-12)
    assert at(inside) >= max(at(p) for p in grid) - 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_tables_by_counting(kind):
    bits, options = of_kind(kind, 12, 66)
    first = ld.checks.sites(bits, 66, options["missing_lw"], options["unphased"])
    i, j = (k.ravel() for k in np.meshgrid(np.arange(12), np.arange(12), indexing="ij"))
    wanted = [reference_greedy.haplotype_table(first, a, b) for a, b in zip(i, j)]
    np.testing.assert_array_equal(pair_tables(prepare(first), i, j), np.array(wanted))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda b: ld.prune(b, 131, 0.2), "sites or in bp"),
        (lambda b: ld.prune(b, 131, 0.2, sites=5, bp=7), "sites or in bp"),
        (lambda b: ld.prune(b, 131, 0.2, sites=5, step=6), "step"),
        (lambda b: ld.prune(b, 131, 0.2, sites=1), "2 or more"),
        (lambda b: ld.prune(b, 131, 1.0, sites=5), r"\[0, 1\)"),
        (lambda b: ld.prune(b, 131, 0.2, bp=5), "position_bp"),
        (lambda b: ld.prune(b, 131, 0.2, bp=5, step=2, position_bp=np.arange(20)), "step of 1"),
        (lambda b: ld.prune(b, 131, 0.2, sites=5, rule="plink3"), "plink1 or plink2"),
        (lambda b: ld.clump(b, 131, np.ones(19), np.arange(20)), "20 p-values"),
        (lambda b: ld.clump(b, 131, np.full(20, 2.0), np.arange(20)), r"\[0, 1\]"),
        (lambda b: ld.clump(b, 131, np.ones(20), np.arange(20), bp=-1), "0 or more"),
        (lambda b: ld.clump(b, 131, np.ones(20), np.arange(20), rule=""), "plink1 or plink2"),
        (lambda b: ld.blocks(b, 131, np.arange(20), share=1.0), "share"),
        (lambda b: ld.blocks(b, 131, np.arange(20)[::-1]), "never falls"),
    ],
)
def test_bad_input_is_one_line(call, says):
    with pytest.raises(UsageError, match=says) as caught:
        call(draw(20, 131)[1])
    assert "\n" not in str(caught.value)


def write_bed(folder, bits, n, position_bp, missing_lw=None):
    """`x`.bed, .bim, .fam: the PLINK 1 format, two bits per person."""
    alleles = unpack(bits, n)
    code = np.array([3, 2, 0])[alleles[:, 0::2] + alleles[:, 1::2]]  # of A1 = ALT: 00 two, 10 one, 11 none, 01 missing
    if missing_lw is not None:
        away = unpack(missing_lw, n)
        code[(away[:, 0::2] | away[:, 1::2]) > 0] = 1
    padded = np.zeros((len(code), -(-code.shape[1] // 4) * 4), dtype=np.uint8)
    padded[:, : code.shape[1]] = code
    octets = (padded.reshape(len(code), -1, 4) << np.array([0, 2, 4, 6])).sum(axis=2).astype(np.uint8)
    (folder / "x.bed").write_bytes(b"\x6c\x1b\x01" + octets.tobytes())
    (folder / "x.bim").write_text("".join(f"1\ts{k}\t0\t{p}\tC\tA\n" for k, p in enumerate(position_bp)))
    (folder / "x.fam").write_text("".join(f"0\tp{k}\t0\t0\t0\t-9\n" for k in range(n // 2)))


def write_vcf(folder, bits, n, position_bp):
    """`x`.vcf, phased."""
    names = "\t".join(f"p{k}" for k in range(n // 2))
    head = "##fileformat=VCFv4.3\n##contig=<ID=1>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\t"
    rows = [head + names + "\n"]
    for k, (site, bp) in enumerate(zip(unpack(bits, n), position_bp)):
        calls = "\t".join(f"{a}|{b}" for a, b in zip(site[0::2], site[1::2]))
        rows.append(f"1\t{bp}\ts{k}\tA\tC\t.\t.\t.\tGT\t{calls}\n")
    (folder / "x.vcf").write_text("".join(rows))


def program(name):
    """The program, or a skip with the reason. "plink2-a3" is Debian 12's, "plink2" a newer one that has `--indep-order`."""
    if name == "plink2":
        path = _NEWER if _NEWER.exists() else shutil.which("plink2")
        told = subprocess.run([path, "--help", "indep-order"], capture_output=True, text=True) if path else None
        if told is None or "No help entry" in told.stdout + told.stderr:
            pytest.skip("no plink2 with --indep-order here (scripts/perf_peers.sh builds one)")
        return path
    path = shutil.which("plink2" if name == "plink2-a3" else name)
    if path is None:
        pytest.skip(f"no {name} here")
    if (
        name == "plink2-a3"
        and "v2.00a3" not in subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    ):
        pytest.skip("plink2 here is no alpha 3")
    return path


def run(folder, *command):
    done = subprocess.run(
        [str(c) for c in command] + ["--out", "o", "--threads", "1"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def ids(path):
    return [int(word[1:]) for word in path.read_text().split()]


@pytest.mark.parametrize(
    ("name", "rule", "options", "phased"),
    [
        ("plink1.9", "plink1", (), False),
        ("plink2-a3", "plink1", ("--bad-ld",), False),
        ("plink2", "plink1", ("--bad-ld", "--indep-order", "1"), False),
        ("plink2", "plink2", ("--bad-ld", "--indep-order", "2"), False),
        ("plink2", "plink1", ("--bad-ld", "--indep-order", "1"), True),
        ("plink2", "plink2", ("--bad-ld", "--indep-order", "2"), True),
    ],
)
@pytest.mark.parametrize("by", ["tiles", pytest.param("lookups", marks=needs_lookups)])
def test_pruning_keeps_what_the_program_keeps(tmp_path, monkeypatch, name, rule, options, phased, by):
    monkeypatch.setattr(numba_prune, "WIDE", by == "tiles")
    path, rng = program(name), np.random.default_rng(1)
    for trial in range(6):
        sites, n = int(rng.integers(50, 400)), 2 * int(rng.integers(30, 300))
        bits, position_bp = linked(sites, n, trial), 1000 + np.cumsum(rng.integers(0, 400, sites))
        missing_lw = lost(sites, n, trial, 0.03) if trial % 2 and not phased else None
        if phased:
            write_vcf(tmp_path, bits, n, position_bp)
        else:
            write_bed(tmp_path, bits, n, position_bp, missing_lw)
        most, window, kb = float(rng.choice([0.1, 0.2, 0.5, 0.8])), int(rng.integers(2, 80)), int(rng.integers(2, 12))
        step = int(rng.integers(1, window + 1))
        # a site far from all others is not looked at by plink2, and removed by PLINK 1.9 where it does not vary
        for where, words in (
            ({"sites": window, "step": step}, (window, step)),
            ({"bp": kb * 1000, "position_bp": position_bp}, (f"{kb}kb", 1)),
        ):
            command = "--indep-pairphase" if phased else "--indep-pairwise"
            run(tmp_path, path, *(("--vcf", "x.vcf") if phased else ("--bfile", "x")), *options, command, *words, most)
            kept = ld.prune(bits, n, most, missing_lw=missing_lw, unphased=not phased, rule=rule, **where)
            assert ids(tmp_path / "o.prune.in") == np.flatnonzero(kept).tolist(), (trial, words, most)
            assert 0 < kept.sum() < sites


@pytest.mark.parametrize(
    ("name", "rule", "options"),
    [
        ("plink1.9", "plink1", ()),
        ("plink2", "plink2", ("--bad-ld", "--clump-unphased")),
        ("plink2", "phased", ("--bad-ld",)),
    ],
)
def test_clumps_are_those_of_the_program(tmp_path, name, rule, options):
    path, rng = program(name), np.random.default_rng(2)
    for trial in range(6):
        sites, n = int(rng.integers(50, 400)), 2 * int(rng.integers(30, 300))
        bits, position_bp = linked(sites, n, trial), 1000 + np.cumsum(rng.integers(0, 2000, sites))
        phased = rule == "phased"
        missing_lw = lost(sites, n, trial, 0.03) if trial % 2 and not phased else None
        if phased:
            write_vcf(tmp_path, bits, n, position_bp)
        else:
            write_bed(tmp_path, bits, n, position_bp, missing_lw)
        p_l = np.round(rng.random(sites) ** 6, 4)
        (tmp_path / "p.txt").write_text("SNP P\n" + "".join(f"s{k} {p}\n" for k, p in enumerate(p_l.tolist())))
        (tmp_path / "p2.txt").write_text("#ID\tP\n" + "".join(f"s{k}\t{p}\n" for k, p in enumerate(p_l.tolist())))
        least, kb = float(rng.choice([0.1, 0.2, 0.5, 0.8])), int(rng.choice([20, 100, 250]))
        run(tmp_path, path, *(("--vcf", "x.vcf") if phased else ("--bfile", "x")), *options,
            "--clump", "p.txt" if name == "plink1.9" else "p2.txt",
            "--clump-p1", 0.01, "--clump-p2", 0.05, "--clump-r2", least, "--clump-kb", kb)  # fmt: skip
        lines = (tmp_path / ("o.clumped" if name == "plink1.9" else "o.clumps")).read_text().splitlines()
        head = lines[0].split()
        index, members = head.index("SNP" if "SNP" in head else "ID"), head.index("SP2")
        theirs = {}
        for fields in (line.split() for line in lines[1:] if line.strip()):
            listed = [] if fields[members] in (".", "NONE") else fields[members].split(",")
            theirs[int(fields[index][1:])] = sorted(int(word.split("(")[0][1:]) for word in listed)
        clump_l = ld.clump(bits, n, p_l, position_bp, p1=0.01, p2=0.05, least=least, bp=kb * 1000, missing_lw=missing_lw,
                           unphased=not phased, rule="plink2" if phased else rule)  # fmt: skip
        ours = {
            int(k): [int(x) for x in np.flatnonzero(clump_l == k) if x != k] for k in np.unique(clump_l[clump_l >= 0])
        }
        assert ours == theirs, trial
        assert len(ours) > 2


@pytest.mark.parametrize("modifiers", [("no-pheno-req",), ("no-pheno-req", "no-small-max-span")])
def test_blocks_are_those_of_plink(tmp_path, modifiers):
    path, rng = program("plink1.9"), np.random.default_rng(3)
    total = 0
    for trial in range(8):
        sites, n = int(rng.integers(50, 400)), 2 * int(rng.integers(30, 300))
        bits, position_bp = linked(sites, n, trial), 1000 + np.cumsum(rng.integers(0, 2000, sites))
        missing_lw = lost(sites, n, trial, 0.03, whole=False) if trial % 2 else None
        write_bed(tmp_path, bits, n, position_bp, missing_lw)
        kb = int(rng.choice([20, 100, 200]))
        run(tmp_path, path, "--bfile", "x", "--blocks", *modifiers, "--blocks-max-kb", kb)
        theirs = [
            [int(word[1:]) for word in line.split()[1:]] for line in (tmp_path / "o.blocks").read_text().splitlines()
        ]
        block_l = ld.blocks(bits, n, position_bp, missing_lw=missing_lw, unphased=True, max_bp=kb * 1000,
                            small_blocks_short=len(modifiers) == 1)  # fmt: skip
        assert [np.flatnonzero(block_l == k).tolist() for k in range(block_l.max() + 1)] == theirs, trial
        total += len(theirs)
    assert total > 20
