"""Linkage disequilibrium beside plink2, PLINK 1.9 and an int8 matrix product: matrices, lists, pruning, blocks, files.

Panels are simulated so that LD looks like that of people: the carriers of a site are a run of an order of haplotypes that
changes slowly (a few move at each site), and neighbouring sites share runs. plink2 reads its own files; of it and of PLINK
1.9 the computing share counts, user CPU less that of a process that only reads (perf.peers.computing_share).
"""

from __future__ import annotations

import filecmp
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine.kernels import bits, ld
from perf.case import Case, Peer, Timed
from perf.limits import count_limit
from perf.peers import (
    computing_share,
    missing_package,
    missing_program,
    plink_command,
    run_program,
    write_bed,
    write_pgen,
)  # fmt: skip

HAPLOTYPES = 5_008
_LEAST = 0.2


def panel(sites: int, n: int, seed: int = 1) -> np.ndarray:
    """uint64 (sites, ceil(n / 64)); deterministic."""
    rng = np.random.default_rng(seed)
    clades = 256
    order, which, fresh = rng.permutation(n), rng.integers(0, clades, sites), rng.random(sites) < 0.25
    size = np.exp(rng.uniform(np.log(2), np.log(n / 2), clades + sites)).astype(int)
    start = (rng.random(clades + sites) * (n - size)).astype(int)
    clade_of, unused = np.arange(clades), clades
    bits_lw = np.zeros((sites, bits.words(n)), dtype=np.uint64)
    alleles = np.zeros(64 * bits.words(n), dtype=np.uint8)
    for site, moves in enumerate(rng.poisson(2.0, sites)):
        for a, b in rng.integers(0, n, (moves, 2)):
            moved = order[a]
            if a < b:
                order[a:b] = order[a + 1 : b + 1].copy()
            else:
                order[b + 1 : a + 1] = order[b:a].copy()
            order[b] = moved
        if fresh[site]:
            clade_of[which[site]] = unused
            unused += 1
        clade = clade_of[which[site]]
        alleles[:] = 0
        alleles[order[start[clade] : start[clade] + size[clade]]] = 1
        bits_lw[site] = np.packbits(alleles, bitorder="little").view(np.uint64)
    return bits_lw


def cases() -> list[Case]:
    return [
        _matrix("matrix_phased", 10_000, HAPLOTYPES, False, 10),
        _matrix("matrix_unphased", 10_000, HAPLOTYPES, True, 9),
        _matrix("matrix_phased", 10_000, 50_000, False, 15, quick=False, threads=2),
        _matrix("matrix_unphased", 10_000, 50_000, True, 15, quick=False, threads=2),
        _matrix("matrix_phased", 10_000, HAPLOTYPES, False, None, threads=2),
        _missing(4_000, HAPLOTYPES),
        _band(50_000, HAPLOTYPES, 1_000),
        _prune(50_000, HAPLOTYPES, "plink2", 1.5),
        _prune(50_000, HAPLOTYPES, "plink1", 1.5),
        _decay(20_000, HAPLOTYPES),
        _score(50_000, HAPLOTYPES, 1_000),
        _blocks(4_000, HAPLOTYPES),
        _file(10_000, HAPLOTYPES, 2),
        _file(10_000, HAPLOTYPES, 2, phased=True, quick=False),
        _file(10_000, 50_000, 10, quick=False),
        _file(10_000, 50_000, 10, phased=True, quick=False),
    ]


def curves() -> dict[str, list[Case]]:
    return {
        "sites": [_matrix("matrix_phased", sites, HAPLOTYPES, False, None) for sites in (1_000, 2_000, 4_000, 8_000, 16_000)],
        "haplotypes": [_matrix("matrix_phased", 4_000, n, False, None) for n in (1_024, 2_048, 4_096, 8_192, 16_384, 32_768)],
        "width": [_band(20_000, HAPLOTYPES, width, peers=False) for width in (100, 200, 400, 800, 1_600)],
    }  # fmt: skip


def _products(pairs: float, n: int, unphased: bool) -> tuple[float, str]:
    """Operations and their limit: a popcount for 64 haplotypes or two for 64 people, unless they are looked up; multiply-adds
    where the matrix unit makes products of dosages."""
    if not unphased:
        return pairs * bits.words(n), count_limit(bits.words(n))
    try:
        from engine.kernels.bits import amx
    except ImportError:  # `perf compare` with a commit that does not know the unit
        return pairs * 2 * bits.words(n // 2), "popcount"
    if amx.granted():
        return pairs * (n // 2), "int8_unit"
    return pairs * 2 * bits.words(n // 2), count_limit(bits.words(n))


def _matrix(
    name: str, sites: int, n: int, unphased: bool, goal: float | None, *, quick: bool = True, threads: int = 1
) -> Case:
    pairs = sites * (sites - 1) / 2
    operations, limit = _products(pairs, n, unphased)
    peers: tuple[Peer, ...] = ()
    if goal is not None:
        option = "--r2-unphased" if unphased else "--r2-phased"
        peers = (_plink2_matrix(option, n, goal, threads),)
        if n == HAPLOTYPES and threads == 1:
            torch_int8 = Peer(
                "torch int8 product", _torch_int8, _int8(n, unphased), _like_ours, 3, lambda: missing_package("torch")
            )
            peers += (torch_int8,)
    return Case(
        f"ld.{name}", {"sites": sites, "haplotypes": n}, pairs, "pairs", lambda: panel(sites, n),
        lambda bits_lw: ld.r2(bits_lw, n, unphased=unphased), peers, 4.0 * sites * sites, operations, limit,
        threads=threads, quick=quick,
    )  # fmt: skip


def _plink2_matrix(option: str, n: int, goal: float, threads: int) -> Peer:
    suffix = "unphased" if option.endswith("unphased") else "phased"

    def run(folder: Path) -> Timed:
        command = ("--pfile", folder / "x", option, "bin4", "triangle", "ref-based", "--out", folder / "x")
        read = ("--pfile", folder / "x", "--freq", "--out", folder / "x")
        spent = computing_share(
            plink_command("plink2", *command, threads=threads),
            plink_command("plink2", *read, threads=threads),
            threads=threads,
        )
        return Timed(spent.seconds, folder / f"x.{suffix}.vcor2.bin", spent.note)

    def same(ours: np.ndarray, path: Path) -> None:
        at, theirs = 0, np.memmap(path, np.float32, "r")
        for row in range(len(ours)):
            cells, made = theirs[at : at + row + 1], ours[row, : row + 1]
            if suffix == "unphased":
                np.testing.assert_array_equal(made, cells)  # every bit
            else:  # plink2 subtracts frequencies that are rounded already
                np.testing.assert_allclose(made, cells, rtol=2e-6, atol=1e-8)
            at += row + 1
        assert at == len(theirs)

    return Peer(f"plink2 {option}", run, _pgen(n), same, goal, lambda: missing_program("plink2", option[2:]))


def _pgen(n: int) -> Callable[[np.ndarray], Path]:
    def prepare(bits_lw: np.ndarray) -> Path:
        folder = Path(tempfile.mkdtemp(dir="."))
        write_pgen(folder / "x", bits_lw, n)
        return folder

    return prepare


def _bed(n: int) -> Callable[[np.ndarray], Path]:
    def prepare(bits_lw: np.ndarray) -> Path:
        folder = Path(tempfile.mkdtemp(dir="."))
        write_bed(folder / "x", bits_lw, n)
        return folder

    return prepare


def _values(bits_lw: np.ndarray, n: int, unphased: bool) -> np.ndarray:
    alleles = bits.unpack(bits_lw, n).astype(np.int8)
    return alleles[:, 0::2] + alleles[:, 1::2] - np.int8(1) if unphased else alleles


def _int8(n: int, unphased: bool) -> Callable[[np.ndarray], Any]:
    def prepare(bits_lw: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(_values(bits_lw, n, unphased))

    return prepare


def _torch_int8(values_ln: Any) -> np.ndarray:
    """The whole product in int32, r2 from it in place: what a user of torch would write."""
    import torch

    products = torch._int_mm(values_ln, values_ln.t().contiguous()).float()
    n, sums_l = values_ln.shape[1], values_ln.sum(dim=1, dtype=torch.float32)
    variances_l = n * products.diagonal() - sums_l * sums_l
    x = products.mul_(n).sub_(sums_l[:, None] * sums_l)
    return x.square_().div_(variances_l[:, None]).div_(variances_l).numpy()


def _like_ours(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(
        ours[::37], theirs[::37], rtol=2e-3, atol=2e-4
    )  # float32 sums of integers above 2**24 round


def _missing(sites: int, n: int) -> Case:
    """One allele in fifty was not called."""

    def prepare() -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(2)
        return panel(sites, n), bits.pack((rng.random((sites, n)) < 0.02).astype(np.uint8))

    pairs = sites * (sites - 1) / 2
    return Case(
        "ld.matrix_missing", {"sites": sites, "haplotypes": n}, pairs, "pairs", prepare,
        lambda planes: ld.r2(planes[0], n, missing_lw=planes[1]), (),
        4.0 * sites * sites, 4 * pairs * bits.words(n), "popcount",
    )  # fmt: skip


def _band(sites: int, n: int, width: int, *, peers: bool = True) -> Case:
    """Dosage r2 inside a window, as a list of pairs."""
    end_l = ld.window(sites, sites=width)
    pairs = float((end_l - np.arange(sites) - 1).sum())
    window = ("--ld-window", width + 1, "--ld-window-kb", 10**6, "--ld-window-r2", _LEAST)

    def plink2(folder: Path) -> Timed:
        options = ("--r2-unphased", "cols=id", "ref-based", *map(str, window), "--out", folder / "x")
        spent = computing_share(
            plink_command("plink2", "--pfile", folder / "x", *options),
            plink_command("plink2", "--pfile", folder / "x", "--freq", "--out", folder / "x"),
        )
        return Timed(spent.seconds, _pairs_of(folder / "x.vcor", 0, 1), spent.note)

    def plink19(folder: Path) -> Timed:
        spent = computing_share(
            plink_command("plink1.9", "--bfile", folder / "x", "--r2", *map(str, window), "--out", folder / "x"),
            plink_command("plink1.9", "--bfile", folder / "x", "--freq", "--out", folder / "x"),
        )
        return Timed(spent.seconds, _pairs_of(folder / "x.ld", 2, 5), spent.note)

    def same(ours: tuple[np.ndarray, np.ndarray, np.ndarray], theirs: np.ndarray) -> None:
        np.testing.assert_array_equal(np.stack(ours[:2], axis=1), theirs)

    others = (
        Peer("plink2 --r2-unphased", plink2, _pgen(n), same, 8, lambda: missing_program("plink2", "r2-unphased")),
        Peer("plink1.9 --r2", plink19, _bed(n), same, 8, lambda: missing_program("plink1.9")),
    )
    return Case(
        "ld.band_list", {"sites": sites, "haplotypes": n, "width": width}, pairs, "pairs", lambda: panel(sites, n),
        lambda bits_lw: ld.threshold(bits_lw, n, _LEAST, end_l=end_l, unphased=True), others if peers else (),
        sites * n / 8, *_products(pairs, n, True),
    )  # fmt: skip


def _pairs_of(path: Path, first: int, second: int) -> np.ndarray:
    """Indices of the pairs in a table whose site ids are s0, s1 ..., sorted."""
    with open(path) as stream:
        next(stream)
        found = [(int(fields[first][1:]), int(fields[second][1:])) for fields in map(str.split, stream)]
    return np.array(sorted(found), dtype=np.int64).reshape(-1, 2)


def _prune(sites: int, n: int, rule: str, goal: float) -> Case:
    """Windows of 1,000 sites, 100 further each time."""

    def plink(name: str, *options: str) -> Callable[[Path], Timed]:
        def run(folder: Path) -> Timed:
            command = (
                "--bfile",
                folder / "x",
                *options,
                "--indep-pairwise",
                "1000",
                "100",
                str(_LEAST),
                "--out",
                folder / "x",
            )
            spent = computing_share(
                plink_command(name, *command),
                plink_command(name, "--bfile", folder / "x", "--freq", "--out", folder / "x"),
            )
            return Timed(spent.seconds, np.loadtxt(folder / "x.prune.in", dtype=str), spent.note)

        return run

    def same(kept: np.ndarray, theirs: np.ndarray) -> None:
        assert [f"s{site}" for site in np.flatnonzero(kept)] == theirs.tolist()

    order = {"plink1": "1", "plink2": "2"}[rule]
    plink2 = plink("plink2", "--indep-order", order)
    peers = [
        Peer(
            f"plink2 --indep-order {order}",
            plink2,
            _bed(n),
            same,
            goal,
            lambda: missing_program("plink2", "indep-order"),
        )
    ]
    if rule == "plink1":
        peers.append(Peer("plink1.9", plink("plink1.9"), _bed(n), same, missing=lambda: missing_program("plink1.9")))
    return Case(
        f"ld.prune_{rule}", {"sites": sites, "haplotypes": n}, float(sites), "sites", lambda: panel(sites, n),
        lambda bits_lw: ld.prune(bits_lw, n, _LEAST, sites=1_000, step=100, unphased=True, rule=rule),  # type: ignore[arg-type]
        tuple(peers), sites * n / 8,
    )  # fmt: skip


def _decay(sites: int, n: int) -> Case:
    """50 bins up to 1,000 kb of sites 1 kb apart."""
    position_bp, edges_bp = np.arange(sites) * 1_000, np.arange(0, 1_000_001, 20_000)
    pairs = float((ld.window(sites, sites=999) - np.arange(sites) - 1).sum())
    return Case(
        "ld.decay", {"sites": sites, "haplotypes": n}, pairs, "pairs", lambda: panel(sites, n),
        lambda bits_lw: ld.decay(bits_lw, n, position_bp, edges_bp), (), sites * n / 8, *_products(pairs, n, False),
    )  # fmt: skip


def _score(sites: int, n: int, width: int) -> Case:
    end_l = ld.window(sites, sites=width)
    pairs = float((end_l - np.arange(sites) - 1).sum())
    return Case(
        "ld.score", {"sites": sites, "haplotypes": n, "width": width}, pairs, "pairs", lambda: panel(sites, n),
        lambda bits_lw: ld.score(bits_lw, n, end_l, unphased=True, adjusted=True), (),
        sites * n / 8, *_products(pairs, n, True),
    )  # fmt: skip


def _blocks(sites: int, n: int) -> Case:
    """Sites 1 kb apart, blocks of up to 200 kb."""
    position_bp = 1 + np.arange(sites) * 1_000

    def prepare(bits_lw: np.ndarray) -> Path:
        folder = Path(tempfile.mkdtemp(dir="."))
        write_bed(folder / "x", bits_lw, n, position_bp)
        return folder

    def run(folder: Path) -> Timed:
        spent = computing_share(
            plink_command("plink1.9", "--bfile", folder / "x", "--blocks", "no-pheno-req", "--out", folder / "x"),
            plink_command("plink1.9", "--bfile", folder / "x", "--freq", "--out", folder / "x"),
        )
        return Timed(spent.seconds, (folder / "x.blocks").read_text(), spent.note)

    def same(block_l: np.ndarray, theirs: str) -> None:
        ours = [[f"s{site}" for site in np.flatnonzero(block_l == k)] for k in range(block_l.max() + 1)]
        assert ours == [line.split()[1:] for line in theirs.splitlines()]

    peer = Peer("plink1.9 --blocks", run, prepare, same, missing=lambda: missing_program("plink1.9"))
    return Case(
        "ld.blocks", {"sites": sites, "haplotypes": n}, float(sites), "sites", lambda: panel(sites, n),
        lambda bits_lw: ld.blocks(bits_lw, n, position_bp, unphased=True), (peer,), sites * n / 8,
    )  # fmt: skip


def _file(sites: int, n: int, goal: float, *, phased: bool = False, quick: bool = True) -> Case:
    """From PGEN to a file of the triangle, whole processes of ours and of plink2, with all they import, read and write."""
    option = "r2-phased" if phased else "r2-unphased"

    def ours(prefix: Path) -> Timed:
        out = prefix.with_name("ours.bin")
        out.unlink(missing_ok=True)
        of_people = () if phased else ("--unphased",)
        spent = run_program(
            [sys.executable, "-m", "engine", "ld", f"{prefix}.pgen", *of_people, "--triangle", "--out", out]
        )
        return Timed(spent.user_seconds + spent.system_seconds, out, "whole process", spent.peak_bytes)

    def plink2(prefix: Path) -> Timed:
        command = ("--pfile", prefix, f"--{option}", "bin4", "triangle", "ref-based", "--out", prefix)
        spent = run_program(plink_command("plink2", *command))
        seconds = spent.user_seconds + spent.system_seconds
        return Timed(seconds, Path(f"{prefix}.{option[3:]}.vcor2.bin"), "whole process", spent.peak_bytes)

    def same(ours: Path, theirs: Path) -> None:
        if not phased:
            assert filecmp.cmp(ours, theirs, shallow=False)
            return
        made, given = (np.fromfile(path, dtype=np.float32) for path in (ours, theirs))
        # one unit in the last place: plink2 subtracts frequencies that are rounded already (docs/kernels.md)
        np.testing.assert_allclose(made, given, rtol=2.0**-23, atol=1e-8)

    return Case(
        f"ld.triangle_file.{option[3:]}", {"sites": sites, "haplotypes": n}, sites * (sites - 1) / 2, "pairs",
        lambda: _pgen(n)(panel(sites, n)) / "x", ours,
        (Peer(f"plink2 --{option}, whole process", plink2, None, same, goal, lambda: missing_program("plink2", option)),),
        2.0 * sites * sites + sites * n / 8, quick=quick,
    )  # fmt: skip
