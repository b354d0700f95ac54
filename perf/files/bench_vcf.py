"""Reading BCF and VCF.gz to packed bits with all site columns, beside cyvcf2, plink2 and bcftools.

Haplotypes come from msprime (neutral, constant size), because how fast a file inflates depends on how well it was packed: most
sites are rare there, as in a sequenced panel. cyvcf2 is given its faster idiom, a loop over `genotype.array()` that looks at no
other column (`gt_types` with gts012 takes longer). The programs are counted whole: they also start, and write.
"""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from engine.files import vcf
from engine.files.genotypes import GenotypeData
from engine.kernels import bits
from perf.case import Case, Peer, Timed
from perf.peers import missing_program, plink_command, program, run_program

SAMPLES = 2_504


def _panel(sites: int) -> GenotypeData:
    """Phased biallelic sites of one contig."""
    import msprime

    length = 400.0 * sites  # of which about 1.1 in 250 bp vary
    trees = msprime.sim_ancestry(
        SAMPLES, population_size=1e4, sequence_length=length, recombination_rate=1e-8, random_seed=7
    )
    trees = msprime.sim_mutations(trees, rate=1.25e-8, random_seed=7, model=msprime.BinaryMutationModel())
    rows, position = [], []
    for variant in trees.variants():
        if len(variant.alleles) == 2:
            rows.append(bits.pack(variant.genotypes.astype(np.uint8)[None])[0])
            position.append(int(variant.site.position) + 1)
            if len(rows) == sites:
                break
    assert len(rows) == sites
    draw = np.random.default_rng(7)
    base = np.array(list("ACGT"), dtype=object)
    ref = draw.integers(0, 4, sites)
    alt = (ref + draw.integers(1, 4, sites)) % 4
    return GenotypeData(
        np.array(rows), 2 * SAMPLES, None, True, np.full(sites, "22"), np.array(position, dtype=np.int64),
        np.array([f"rs{k}" for k in draw.integers(1, 10**9, sites)], dtype=object), base[ref], base[alt],
        np.zeros(sites, dtype=np.int16), [f"S{k}" for k in range(SAMPLES)], np.arange(0, 2 * SAMPLES + 1, 2),
        {"22": 50_818_468}, "GRCh38",
    )  # fmt: skip


def _plain(sites: int, suffix: str) -> Path:
    path = Path(tempfile.mkdtemp(dir=".")) / f"panel{suffix}"
    vcf.write_vcf(path, _panel(sites))
    return path


def _with_values(sites: int, suffix: str) -> Path:
    """The same with FORMAT GT:DP:PL, depths and likelihoods drawn for every genotype."""
    import pysam
    import pysam.bcftools

    plain = _plain(sites, ".vcf.gz")
    draw = np.random.default_rng(11)
    depth = draw.poisson(30, 4096) + 1
    near, far = 3 * depth + draw.integers(0, 20, 4096), 34 * depth + draw.integers(0, 90, 4096)
    values = np.array(
        [
            [f"{d}:0,{a},{b}\t", f"{d}:{b},0,{b + a}\t", f"{d}:{b},{a},0\t"]
            for d, a, b in zip(depth.tolist(), near.tolist(), far.tolist())
        ],
        dtype=object,
    )
    path = plain.with_name(f"values{suffix}")
    text = path if suffix == ".vcf.gz" else path.with_name("text.vcf.gz")
    with gzip.open(plain, "rt") as lines, pysam.BGZFile(str(text), "wb", None) as out:
        for line in lines:
            if line.startswith("#CHROM"):
                out.write(b'##FORMAT=<ID=DP,Number=1,Type=Integer,Description="Depth">\n')
                out.write(b'##FORMAT=<ID=PL,Number=G,Type=Integer,Description="Likelihoods">\n')
            if line.startswith("#"):
                out.write(line.encode())
                continue
            cells = line.rstrip("\n").split("\t")
            calls = cells[9:]
            dose = [call.count("1") for call in calls]
            chosen = values[draw.integers(0, 4096, len(calls)), dose].tolist()
            body = "".join([f"{call}:{value}" for call, value in zip(calls, chosen)])
            out.write(("\t".join([*cells[:8], "GT:DP:PL", body[:-1]]) + "\n").encode())
    if suffix == ".bcf":
        pysam.bcftools.view("-Ob", "-o", str(path), str(text), catch_stdout=False)
    return path


def _read(path: Path) -> GenotypeData:
    return vcf.read_vcf(path, implementation="numba", threads=1)


def _cyvcf2(path: Path) -> np.ndarray:
    import cyvcf2

    array = np.zeros(0)
    for variant in cyvcf2.VCF(str(path)):
        array = variant.genotype.array()
    return array


def _last_row(ours: GenotypeData, theirs: np.ndarray) -> None:
    np.testing.assert_array_equal(bits.unpack(ours.bits_lw[-1:], ours.n_haplotypes)[0], theirs[:, :2].ravel())


def _plink2(path: Path) -> Timed:
    kind = "--bcf" if path.name.endswith(".bcf") else "--vcf"
    out = path.with_name("plink2")
    spent = run_program(plink_command("plink2", kind, path, "--make-pgen", "--out", out))
    return Timed(spent.user_seconds + spent.system_seconds, out, "whole process", spent.peak_bytes)


def _pgen(ours: GenotypeData, theirs: Path) -> None:
    from engine.files.plink import read_pgen

    np.testing.assert_array_equal(ours.bits_lw, read_pgen(theirs.with_suffix(".pgen")).bits_lw)


def _bcftools(path: Path) -> Timed:
    found = program("bcftools")
    assert found is not None
    spent = run_program([found, "view", "-Ou", "-o", path.with_name("bcftools.bcf"), path])
    return Timed(spent.user_seconds + spent.system_seconds, None, "whole process", spent.peak_bytes)


def _case(
    name: str, sites: int, prepare: Any, cyvcf2_goal: float, plink2_goal: float | None, *, quick: bool = True
) -> Case:
    peers: tuple[Peer, ...] = (
        Peer("cyvcf2 genotype.array()", _cyvcf2, same=_last_row, goal=cyvcf2_goal),
        Peer("plink2 --make-pgen, whole process", _plink2, same=_pgen, goal=plink2_goal,
             missing=lambda: missing_program("plink2")),
    )  # fmt: skip
    if not quick:
        peers += (Peer("bcftools view -Ou, whole process", _bcftools, missing=lambda: missing_program("bcftools")),)
    out_bytes = sites * 8.0 * bits.words(2 * SAMPLES)
    return Case(
        f"vcf.{name}", {"sites": sites, "samples": SAMPLES}, float(sites) * SAMPLES, "genotypes", prepare, _read, peers,
        floor_bytes=sites * 2.0 * SAMPLES + out_bytes, quick=quick,
    )  # fmt: skip


def cases() -> list[Case]:
    return [
        _case("bcf", 50_000, lambda: _plain(50_000, ".bcf"), 15, 3),
        _case("vcf_gz", 20_000, lambda: _plain(20_000, ".vcf.gz"), 5, 3),
        _case("vcf_gz", 50_000, lambda: _plain(50_000, ".vcf.gz"), 5, 3, quick=False),
        _case("bcf_dp_pl", 2_000, lambda: _with_values(2_000, ".bcf"), 2, None),
        _case("vcf_gz_dp_pl", 2_000, lambda: _with_values(2_000, ".vcf.gz"), 2, None, quick=False),
    ]


def curves() -> dict[str, list[Case]]:
    return {
        "vcf.bcf by sites": [
            _case("bcf", sites, lambda sites=sites: _plain(sites, ".bcf"), 15, 3) for sites in (2_000, 10_000, 50_000)
        ]
    }
