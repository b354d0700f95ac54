"""Peers that are programs, and peers that are packages: where they are or why not, their versions, their files, their time.

A bench file asks `missing_program` or `missing_package` for the reason why a peer cannot be had, writes its input with
`write_bed` or `write_pgen`, and runs it with `run_program` or, where only the computing share is to be compared, with
`computing_share`. Programs are installed by scripts/perf_peers.sh, packages by the extra `perf`. What is compared with
what is left to the bench files.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from engine.errors import InputError, UsageError
from perf.case import Timed

_INSTALL = "scripts/perf_peers.sh"
_EVEN = np.uint64(0x5555555555555555)
_DISTRIBUTIONS = {"faiss": "faiss-cpu", "sklearn": "scikit-learn", "pgenlib": "Pgenlib"}
_VERSION = {  # how each program tells its version
    "plink2": ("--version", r"v(\S+)"),
    "plink1.9": ("--version", r"v(\S+)"),
    "bcftools": ("--version", r"bcftools (\S+)"),
}


def cache_folder() -> Path:
    """Where scripts/perf_peers.sh keeps what it builds."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("ENGINE_PERF_CACHE") or home / "engine-perf")


def program(name: str) -> Path | None:
    """Path of "plink2" and the like: the one built by scripts/perf_peers.sh before the one on the PATH; None: neither."""
    built = cache_folder() / "bin" / name
    if os.access(built, os.X_OK):
        return built
    found = shutil.which(name)
    return Path(found) if found else None


@cache
def missing_program(name: str, option: str | None = None) -> str | None:
    """Why `name` cannot be had, or None when it can. `option`: an option of plink2 it must know, e.g. "r2-phased"."""
    path = program(name)
    if path is None:
        return f"{name} is not installed ({_INSTALL})"
    if option is not None:
        told = subprocess.run([path, "--help", option], capture_output=True, text=True, timeout=60)
        if "No help entry" in told.stdout + told.stderr:
            return f"{name} {version(name)} has no --{option} ({_INSTALL} builds a newer one)"
    return None


@cache
def missing_package(name: str) -> str | None:
    """Why the package `name` (as imported) cannot be had, or None when it can."""
    if importlib.util.find_spec(name) is None:
        return f"{name} is not installed (pip install -c constraints.txt -e '.[perf]')"
    return None


@cache
def version(peer: str) -> str:
    """Version of the program or package that a peer's name begins with ("faiss.IndexFlatL2", "plink2 --r2-phased").

    "unknown" where neither can be found.
    """
    first = peer.split()[0] if peer.split() else peer
    path = program(first) if first in _VERSION else None
    if path is not None:
        option, pattern = _VERSION[first]
        told = subprocess.run([path, option], capture_output=True, text=True, timeout=60).stdout
        found = re.search(pattern + r"(.*)", told)
        if found:  # the build too: AVX2 or not makes a difference
            build = re.search(r"AVX2|64-bit|SSE\S+", found.group(2))
            return found.group(1) + (f" {build.group(0)}" if build else "")
    name = re.split(r"[.\s:(]", first)[0]
    for distribution in (_DISTRIBUTIONS.get(name, name), name.lower()):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


@dataclass(frozen=True)
class Spent:
    """What one run of a program cost, by the kernel's own accounts of that process."""

    user_seconds: float
    system_seconds: float
    wall_seconds: float
    peak_bytes: int
    output: str


_LAUNCHER = """import json, os, sys
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(pid, 0)
told = [os.waitstatus_to_exitcode(status), used.ru_utime, used.ru_stime, used.ru_maxrss * 1024]
json.dump(told, open(sys.argv[1], "w"))
"""


def run_program(arguments: list[str | Path], *, folder: Path | None = None, timeout_seconds: float = 900) -> Spent:
    """Run a program to its end and say what it cost; the output is standard output and error together.

    A small process launches it: Linux charges a program with the peak memory of the process it was started from.

    Raises:
        InputError: it failed or ran past `timeout_seconds`; with the last lines of what it said.
    """
    name = Path(arguments[0]).name
    with tempfile.TemporaryFile() as said, tempfile.NamedTemporaryFile() as told:
        begin = time.perf_counter()
        launcher = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, told.name, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            cwd=folder,
            start_new_session=True,
        )
        try:
            launcher.wait(timeout_seconds)
            reason = ""
        except subprocess.TimeoutExpired:
            reason = f"still running after {timeout_seconds:g} s"
        finally:  # whatever is left of it, at a time-out or an interrupt
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
        wall_seconds = time.perf_counter() - begin
        said.seek(0)
        output = said.read().decode(errors="replace")
        costs = told.read()
    exit_code, user_seconds, system_seconds, peak_bytes = json.loads(costs) if costs else (1, 0.0, 0.0, 0)
    if reason or exit_code != 0:
        last = " | ".join(output.strip().splitlines()[-2:])
        raise InputError(
            f"{name} to end well",
            f"{reason or f'exit {exit_code}'}: {last}",
            f"{name} {' '.join(map(str, arguments[1:]))}",
        )
    return Spent(user_seconds, system_seconds, wall_seconds, peak_bytes, output)


def computing_share(
    work: list[str | Path], loading: list[str | Path], *, threads: int = 1, folder: Path | None = None
) -> Timed:
    """What a program computes, without its start, its reading and its writing: `work` less `loading`.

    Args:
        work: the whole command.
        loading: a command of the same program that reads the same files and does next to nothing with them, as
            `--freq` does.
        threads: 1 takes user CPU seconds, so that the writing of results (the kernel's time) does not count against the
            peer; more takes wall seconds, of which the writing is a part.

    Raises:
        InputError: one of them failed.
    """
    base, whole = run_program(loading, folder=folder), run_program(work, folder=folder)
    what = "user CPU" if threads == 1 else "wall"
    seconds = whole.user_seconds - base.user_seconds if threads == 1 else whole.wall_seconds - base.wall_seconds
    options = " ".join(
        str(a) for a in loading[1:] if str(a).startswith("--") and str(a) not in ("--threads", "--out", "--memory")
    )
    note = f"{what} seconds of the whole process less those of a process with {options}"
    return Timed(max(seconds, 1e-6), whole.output, note, whole.peak_bytes)


def plink_command(name: str, *arguments: str | Path, threads: int = 1, memory_mib: int = 6000) -> list[str | Path]:
    """Command of plink2 or plink1.9 with its threads and memory set, e.g. plink_command("plink2", "--bfile", prefix, ...).

    Raises:
        UsageError: the program is not installed.
    """
    path = program(name)
    if path is None:
        raise UsageError(f"{name}", "not installed", "perf.peers", _INSTALL)
    return [path, *arguments, "--threads", str(threads), "--memory", str(memory_mib)]


def write_bed(
    prefix: Path,
    bits_lw: np.ndarray,
    haplotypes: int,
    position_bp: np.ndarray | None = None,
    missing_lw: np.ndarray | None = None,
) -> Path:
    """PLINK 1 fileset `prefix`.bed .bim .fam of unphased genotypes; returns `prefix`.

    Args:
        bits_lw: uint64 (L, ceil(haplotypes / 64)), 1 = ALT; haplotypes 2k and 2k + 1 are sample k.
        position_bp: integers (L,), never falling; None: 1, 2, 3 ... One contig "1", alleles A (REF) and C (ALT = A1).
        missing_lw: a plane of the same shape; a sample is missing where either of its bits is set.

    Source: PLINK 1 .bed specification (sample-minor, 2 bits each, 00 = two A1, 01 = missing, 10 = heterozygous).
    """
    samples = _samples(haplotypes)
    first_lw, second_lw = bits_lw & _EVEN, (bits_lw >> np.uint64(1)) & _EVEN
    low_lw, high_lw = ~(first_lw | second_lw) & _EVEN, ~(first_lw & second_lw) & _EVEN
    if missing_lw is not None:
        lost_lw = (missing_lw | (missing_lw >> np.uint64(1))) & _EVEN
        low_lw, high_lw = low_lw | lost_lw, high_lw & ~lost_lw
    bytes_lb = (low_lw | (high_lw << np.uint64(1))).astype("<u8").view(np.uint8)[:, : -(-samples // 4)]
    if samples % 4 and len(bytes_lb):
        bytes_lb = bytes_lb.copy()
        bytes_lb[:, -1] &= (1 << 2 * (samples % 4)) - 1  # what lies beyond the last sample must be zero
    with open(f"{prefix}.bed", "wb") as stream:
        stream.write(b"\x6c\x1b\x01")
        stream.write(np.ascontiguousarray(bytes_lb).tobytes())
    places = _positions(position_bp, len(bits_lw))
    Path(f"{prefix}.bim").write_text("".join(f"1\ts{k}\t0\t{p}\tC\tA\n" for k, p in enumerate(places)))
    Path(f"{prefix}.fam").write_text("".join(f"0\tp{k}\t0\t0\t0\t-9\n" for k in range(samples)))
    return prefix


def write_pgen(
    prefix: Path,
    bits_lw: np.ndarray,
    haplotypes: int,
    position_bp: np.ndarray | None = None,
    missing_lw: np.ndarray | None = None,
) -> Path:
    """PLINK 2 fileset `prefix`.pgen .pvar .psam of phased genotypes (through pgenlib); arguments as for `write_bed`."""
    import pgenlib

    samples = _samples(haplotypes)
    block = max(1, 2**26 // max(1, haplotypes))
    with pgenlib.PgenWriter(
        f"{prefix}.pgen".encode(), samples, variant_ct=len(bits_lw), hardcall_phase_present=True
    ) as out:
        for begin in range(0, len(bits_lw), block):
            alleles_ln = _unpacked(bits_lw[begin : begin + block], haplotypes)
            if missing_lw is not None:
                lost_ln = _unpacked(missing_lw[begin : begin + block], haplotypes)
                lost_ln = np.repeat(lost_ln[:, 0::2] | lost_ln[:, 1::2], 2, axis=1)
                alleles_ln[lost_ln != 0] = -9
            out.append_alleles_batch(alleles_ln, all_phased=True)
    places = _positions(position_bp, len(bits_lw))
    rows = "".join(f"1\t{p}\ts{k}\tA\tC\n" for k, p in enumerate(places))
    Path(f"{prefix}.pvar").write_text("#CHROM\tPOS\tID\tREF\tALT\n" + rows)
    Path(f"{prefix}.psam").write_text("#IID\tSEX\n" + "".join(f"p{k}\tNA\n" for k in range(samples)))
    return prefix


def _samples(haplotypes: int) -> int:
    if haplotypes % 2:
        raise UsageError("an even number of haplotypes, two to a sample", str(haplotypes), "perf.peers")
    return haplotypes // 2


def _positions(position_bp: np.ndarray | None, sites: int) -> list[int]:
    return list(range(1, sites + 1)) if position_bp is None else np.asarray(position_bp).tolist()


def _unpacked(bits_lw: np.ndarray, haplotypes: int) -> np.ndarray:
    """int32 (L, haplotypes) of 0 and 1."""
    bits_lb = np.ascontiguousarray(bits_lw).astype("<u8").view(np.uint8)
    return np.unpackbits(bits_lb, axis=1, count=haplotypes, bitorder="little").astype(np.int32)
