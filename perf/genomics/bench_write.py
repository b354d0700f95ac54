"""Synthetic people from their copying paths into files, beside programs that write the same records.

The panel has the LD of bench_ld; people copy it by `sampler="independent"`, three groups. Ours starts at the paths, makes
alleles of them block by block, writes parts and joins them; BCF with its index. The programs are given the finished records as
a file and are counted whole: they also start, and read. `pgenlib` is given packed alleles in memory. All files say the same,
which is checked by reading them again.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from engine.files import genotype_files
from engine.genomics import held_paths, li_stephens, stream
from engine.genomics.panel import HaplotypePanel, Samples, Sites
from perf.case import Case, Peer, Timed
from perf.kernels.bench_ld import panel
from perf.peers import missing_package, missing_program, plink_command, program, run_program, write_pgen

HAPLOTYPES = 5_008


def _source(people: int, sites: int) -> stream.Source:
    text = lambda values: np.array(values, dtype=object)  # noqa: E731
    place = np.arange(sites, dtype=np.int64)
    group = np.repeat(["AFR", "EUR", "EAS"], [1000, 752, 752])
    reference = HaplotypePanel(
        panel(sites, HAPLOTYPES), None,
        Sites(np.full(sites, "1"), 100 + 100 * place, text([f"rs{k}" for k in place]), text(["A"] * sites),
              text(["C"] * sites), np.zeros(sites, dtype=np.int16)),
        Samples([f"P{k}" for k in range(HAPLOTYPES // 2)], group, None, 2 * np.arange(HAPLOTYPES // 2 + 1)),
        contig_length={"1": 248_956_422}, assembly="GRCh38",
    )  # fmt: skip
    model = li_stephens.fit(reference, li_stephens.LiStephensConfig(sampler="independent"))
    held = held_paths.draw(model, people, lambda first, count: model.paths(count, seed=1, start=first))
    return stream.of_paths(held, np.array(model.group_names, dtype=str)[held.group_n])


def _alleles(source: stream.Source) -> int:
    """Alleles of all people, block by block, and nothing kept of them but how many are ALT."""
    carried = 0
    for at in range(0, source.head.n_sites, 1000):
        carried += int(np.bitwise_count(source.rows(at, min(at + 1000, source.head.n_sites))).sum())
    return carried


def _write(suffix: str) -> Any:
    def run(source: stream.Source) -> Path:
        shutil.rmtree(f"ours{suffix}", ignore_errors=True)
        path = Path(f"ours{suffix}") / f"x{suffix}"
        job = stream.Job(path, source.layout([]), None, {})
        stream.start(job)
        stream.write_parts(job, source.rows)
        stream.join(job)
        stream.remove_parts(path)
        return path

    return run


def _same(ours: Path, theirs: Path) -> None:
    a, b = genotype_files.read_genotypes(ours), genotype_files.read_genotypes(theirs)
    np.testing.assert_array_equal(a.bits_lw, b.bits_lw)
    np.testing.assert_array_equal(a.position_bp, b.position_bp)


def _as_bcf(source: stream.Source) -> Path:
    """The finished records as BCF, with an index: what the programs read."""
    path = Path(f"given-{source.head.n_sites}") / "x.bcf"  # the folder is that of all cases
    if not path.exists():
        genotype_files.write_genotypes(path, _whole(source))
    return path


def _whole(source: stream.Source) -> Any:
    from dataclasses import replace

    return replace(source.head, bits_lw=source.rows(0, source.head.n_sites))


def _program(arguments: list[str | Path], result: Path) -> Timed:
    spent = run_program(arguments)
    return Timed(spent.user_seconds + spent.system_seconds, result, "whole process", spent.peak_bytes)


def _plink2(given: Path) -> Timed:
    command = plink_command("plink2", "--bcf", given, "--make-pgen", "--out", given.with_name("plink2"))
    return _program(command, given.with_name("plink2.pgen"))


def _pgenlib(data: Any) -> Path:
    prefix = Path("given-pgenlib")
    write_pgen(prefix, data.bits_lw, data.n_haplotypes, data.position_bp)
    return Path("given-pgenlib.pgen")


def _bcftools(given: Path) -> Timed:
    found = program("bcftools")
    assert found is not None
    out = given.with_name("bcftools.bcf")
    return _program([found, "view", "-Ob", "-o", out, given], out)


def vcf2zarr() -> Path | None:
    """bio2zarr's command: beside this Python, or on the PATH."""
    beside, found = Path(sys.executable).with_name("vcf2zarr"), shutil.which("vcf2zarr")
    return beside if beside.exists() else None if found is None else Path(found)


def _bio2zarr(given: Path) -> Timed:
    found, out = vcf2zarr(), given.with_name("bio2zarr.vcz")
    assert found is not None
    return _program([found, "convert", "-f", "-Q", given, out], out)


def _case(name: str, people: int, sites: int, run: Any, peers: tuple[Peer, ...] = (), **options: Any) -> Case:
    work = float(people) * sites
    return Case(
        f"write.{name}", {"people": people, "sites": sites}, work, "genotypes", lambda: _source(people, sites), run, peers,
        floor_bytes=work / 4, repeats=3, **options,
    )  # fmt: skip


def _pgen_peers() -> tuple[Peer, ...]:
    return (
        Peer("pgenlib append_alleles_batch", _pgenlib, _whole, _same, 2, lambda: missing_package("pgenlib")),
        Peer("plink2 --bcf --make-pgen, whole process", _plink2, _as_bcf, _same, 1, lambda: missing_program("plink2")),
    )


def _bcf_peers() -> tuple[Peer, ...]:
    return (
        Peer("bcftools view -Ob, whole process", _bcftools, _as_bcf, _same, 1, lambda: missing_program("bcftools")),
    )


def _vcz_peers() -> tuple[Peer, ...]:
    def missing() -> str | None:
        return None if vcf2zarr() else missing_package("bio2zarr") or "bio2zarr without its command vcf2zarr"

    return (Peer("bio2zarr vcf2zarr convert, whole process", _bio2zarr, _as_bcf, _same, 3, missing),)


def cases() -> list[Case]:
    return [
        _case("materialise", 20_000, 4_000, _alleles),
        _case("pgen", 20_000, 4_000, _write(".pgen"), _pgen_peers()),
        _case("bcf", 20_000, 2_000, _write(".bcf"), _bcf_peers()),
        _case("vcz", 20_000, 2_000, _write(".vcz"), _vcz_peers()),
        _case("materialise", 100_000, 4_000, _alleles, threads=2, quick=False),
        _case("pgen", 100_000, 4_000, _write(".pgen"), threads=2, quick=False),
        _case("bcf", 100_000, 4_000, _write(".bcf"), threads=2, quick=False),
        _case("vcz", 100_000, 4_000, _write(".vcz"), threads=2, quick=False),
    ]


def curves() -> dict[str, list[Case]]:
    return {
        "write.pgen by people": [_case("pgen", n, 1_000, _write(".pgen")) for n in (1_000, 4_000, 16_000, 64_000)],
    }
