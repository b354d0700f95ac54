"""Checks, times and tunes the Triton kernels on a GPU: `python -m perf.gpu`, or `make gpu`. Needs torch, numpy, numba, triton.

Every check draws fresh inputs (the seed is in the record), poisons the outputs and compares with the CPU implementation; what
was timed is compared too. Plain torch does the same work beside each kernel in the same run. Ends within `--seconds`; what did
not fit is a row that says so. One JSON object is written to --out, the table is printed last. `--tune` tries launch parameters
first and writes engine/kernels/tuned/<card>.json.

On a machine without a GPU, `--dry` runs the checks in Triton's interpreter at tiny sizes and times nothing: it shows that this
file still fits the kernels.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np
import torch

from engine.kernels import tuned

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1


@dataclass(frozen=True)
class Check:
    """Same answer as the CPU: `run(rng, device)` returns (ours, wanted, tolerance); tolerance 0 is bit for bit."""

    name: str
    run: Callable[[np.random.Generator, str], list[tuple[Any, Any, float]]]


@dataclass(frozen=True)
class Bench:
    """One kernel at one size.

    Attributes:
        prepare: (rng, device) -> inputs on the card.
        run: inputs -> result, timed.
        variants: other ways of ours by name (a popcount version beside the tensor cores), timed too.
        peers: plain torch by name, timed too.
        same: (ours, other) -> None for results of variants and peers; raises AssertionError.
        work, unit: what is done once. ops, limit: operations against a measured limit of the card.
        bytes: fewest bytes through memory.
        goal: {peer or "limit" or "copy" or "rate": wanted ratio, share or rate}.
    """

    name: str
    size: dict[str, int]
    work: float
    unit: str
    prepare: Callable[[np.random.Generator, str], Any]
    run: Callable[[Any], Any]
    variants: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    peers: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    same: Callable[[Any, Any], None] | None = None
    ops: float = 0
    limit: str = ""
    bytes: float = 0
    goal: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuning:
    """Launch parameters to try: `kernel` as in engine.kernels.tuned, every combination of `grid`, timed through `run`."""

    kernel: str
    grid: dict[str, tuple[int, ...]]
    prepare: Callable[[np.random.Generator, str], Any]
    run: Callable[[Any], Any]


def spread(milliseconds: list[float]) -> dict[str, float]:
    low, middle, high = np.quantile(milliseconds, (0.2, 0.5, 0.8))
    return {"p20": float(low) / 1e3, "p50": float(middle) / 1e3, "p80": float(high) / 1e3, "n": len(milliseconds)}


def timed(run: Callable[[], Any], least: int = 5, most: int = 50, seconds: float = 1.5) -> dict[str, float]:
    """Seconds of the device between events around each call, after two warm-up calls (compilation, caches)."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < least or (len(taken) < most and time.perf_counter() - begin < seconds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(stop))
    return spread(taken)


def limits() -> dict[str, float]:
    """Measured ceilings: bytes/s read plus written by a copy, operations/s (2 per multiply-add) of torch's products."""
    found: dict[str, float] = {}
    big = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_(0, 255)
    to = torch.empty_like(big)
    found["copy"] = 2 * big.numel() / timed(functools.partial(to.copy_, big))["p50"]
    del big, to
    side = 8192
    whole = {
        "int8": lambda: torch.randint(-1, 2, (side, side), dtype=torch.int8, device="cuda"),
        "bf16": lambda: torch.randn(side, side, device="cuda", dtype=torch.bfloat16),
        "fp32": lambda: torch.randn(side, side, device="cuda"),
        "fp64": lambda: torch.randn(side, side, device="cuda", dtype=torch.float64),
    }
    for name, make in whole.items():
        a, b = make(), make()
        product = torch._int_mm if name == "int8" else torch.mm
        found[name] = 2 * side**3 / timed(functools.partial(product, a, b.t()))["p50"]
    return found


def compare(ours: Any, wanted: Any, tolerance: float) -> str:
    """Empty where they agree, else one line."""
    a = ours.detach().cpu().numpy() if isinstance(ours, torch.Tensor) else np.asarray(ours)
    b = wanted.detach().cpu().numpy() if isinstance(wanted, torch.Tensor) else np.asarray(wanted)
    if a.dtype == np.int64 and b.dtype == np.uint64:
        a = a.view(np.uint64)
    if a.shape != b.shape:
        return f"shape {a.shape} for {b.shape}"
    if tolerance == 0:
        equal = np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        return "" if equal else f"{int((a != b).sum())} of {a.size} values differ"
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return "NaN in other places"
    a, b = np.nan_to_num(a.astype(np.float64)), np.nan_to_num(b.astype(np.float64))
    gap = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)
    return "" if gap <= tolerance else f"relative difference {gap:.3g}, allowed {tolerance:g}"


def run_checks(checks: list[Check], device: str, seed: int, until: float) -> list[dict[str, Any]]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty is full of NaN
    rows = []
    for number, check in enumerate(checks):
        row: dict[str, Any] = {"check": check.name, "seed": [seed, number]}
        if time.monotonic() > until:
            rows.append(row | {"status": "not run", "why": "out of time"})
            continue
        try:
            why = [w for triple in check.run(np.random.default_rng([seed, number]), device) if (w := compare(*triple))]
            row |= {"status": "differs" if why else "ok", "why": "; ".join(why)}
        except Exception as error:
            row |= {"status": "failed", "why": f"{type(error).__name__}: {str(error)[:300]}"}
        rows.append(row)
        print(f"{check.name}: {row['status']} {row['why']}", file=sys.stderr, flush=True)
    torch.use_deterministic_algorithms(False)
    return rows


def run_bench(bench: Bench, found: dict[str, float], seed: int) -> dict[str, Any]:
    row: dict[str, Any] = {"bench": bench.name, "size": bench.size, "work": bench.work, "unit": bench.unit}
    inputs = bench.prepare(np.random.default_rng(seed), "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = bench.run(inputs)
    torch.cuda.synchronize()
    row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    row["seconds"] = timed(functools.partial(bench.run, inputs))
    row["rate"] = bench.work / row["seconds"]["p50"]
    if bench.ops:
        row["limit"], row["limit_share"] = bench.limit, bench.ops / row["seconds"]["p50"] / found[bench.limit]
    if bench.bytes:
        row["copy_share"] = bench.bytes / row["seconds"]["p50"] / found["copy"]
    row["beside"] = {}
    for kind, others in (("variant", bench.variants), ("torch", bench.peers)):
        for name, other in others.items():
            beside: dict[str, Any] = {"kind": kind}
            try:
                other_result = other(inputs)
                if bench.same is not None:
                    bench.same(result, other_result)
                del other_result
                beside["seconds"] = timed(functools.partial(other, inputs))
                beside["ratio"] = beside["seconds"]["p50"] / row["seconds"]["p50"]
            except Exception as error:
                beside["why"] = f"{type(error).__name__}: {str(error)[:300]}"
            row["beside"][name] = beside
            torch.cuda.empty_cache()
    row["goals"] = {}
    for name, wanted in bench.goal.items():
        reached = {"limit": row.get("limit_share"), "copy": row.get("copy_share"), "rate": row["rate"]}.get(name)
        reached = row["beside"].get(name, {}).get("ratio") if reached is None else reached
        row["goals"][name] = {"goal": wanted, "reached": reached, "met": reached is not None and reached >= wanted}
    return row


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, or for floating-point sums equal to rounding: another order of a sum is no error."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(torch.nan_to_num(a), torch.nan_to_num(b), rtol=1e-5, atol=1e-5)


def tune(tunings: list[Tuning], card: str, seed: int, until: float) -> dict[str, Any]:
    """The fastest parameters of each kernel; every result must equal that of the defaults. Written for `card`."""
    path = Path(tuned.__file__).parent / f"{tuned.slug(card)}.json"
    kernels: dict[str, dict[str, int]] = json.loads(path.read_text())["kernels"] if path.is_file() else {}
    tried: dict[str, Any] = {}
    for tuning in tunings:
        inputs = tuning.prepare(np.random.default_rng(seed), "cuda")
        wanted = tuning.run(inputs)
        rows = []
        for values in itertools.product(*tuning.grid.values()):
            if time.monotonic() > until:
                break
            chosen = dict(zip(tuning.grid, values))
            try:
                with tuned.override({tuning.kernel: chosen}):
                    got = tuning.run(inputs)
                    pairs = zip(got, wanted) if isinstance(got, tuple) else [(got, wanted)]
                    if all(_alike(a, b) for a, b in pairs):
                        rows.append(
                            chosen | {"seconds": timed(functools.partial(tuning.run, inputs), 3, 10, 0.3)["p50"]}
                        )
            except Exception as error:  # too much shared memory, a shape the compiler refuses
                rows.append(chosen | {"why": f"{type(error).__name__}: {str(error)[:120]}"})
        good = sorted((row for row in rows if "seconds" in row), key=lambda row: row["seconds"])
        if good:
            kernels[tuning.kernel] = {name: good[0][name] for name in tuning.grid}
            print(
                f"{tuning.kernel}: {kernels[tuning.kernel]} {good[0]['seconds'] * 1e3:.3f} ms",
                file=sys.stderr,
                flush=True,
            )
        tried[tuning.kernel] = rows
    path.write_text(json.dumps({"card": card, "versions": versions(), "kernels": kernels}, indent=1) + "\n")
    tuned.forget()
    return {"file": path.name, "kernels": kernels, "tried": tried}


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0], "cuda": str(torch.version.cuda)}
    for name in ("torch", "triton", "numpy", "numba", "llvmlite"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def commit() -> str:
    """Short commit, with "+" where tracked files differ; ENGINE_COMMIT where the tree came without git."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ENGINE_COMMIT", "unknown")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern of checks and benches, e.g. 'ld.*'")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu.json", help="where the JSON goes")
    parser.add_argument("--seconds", type=float, default=440, help="time for everything")
    parser.add_argument("--tune", action="store_true", help="try launch parameters first, write engine/kernels/tuned/")
    parser.add_argument(
        "--dry", action="store_true", help="checks only, in Triton's interpreter, on a machine without a GPU"
    )
    arguments = parser.parse_args()
    begin = time.monotonic()
    until = begin + arguments.seconds
    if not arguments.dry and not torch.cuda.is_available():
        print(
            "expected a CUDA or ROCm device, got none; try: --dry for the checks in Triton's interpreter",
            file=sys.stderr,
        )
        return 2

    from perf import gpu_cases

    seed = time.time_ns() % 2**31
    chosen = lambda made: [one for one in made if fnmatch.fnmatch(one.name, arguments.pattern)]  # noqa: E731
    record: dict[str, Any] = {"schema": SCHEMA, "commit": commit(), "versions": versions(), "seed": seed}
    if arguments.dry:
        record["checks"] = run_checks(chosen(gpu_cases.checks(tiny=True)), "cpu", seed, until)
    else:
        torch.backends.cuda.matmul.allow_tf32 = False
        card = torch.cuda.get_device_name()
        facts = torch.cuda.get_device_properties(0)
        record |= {"card": card, "memory_bytes": facts.total_memory, "multiprocessors": facts.multi_processor_count}
        record["limits"] = limits()
        print({name: f"{value:.3g}/s" for name, value in record["limits"].items()}, file=sys.stderr, flush=True)
        record["checks"] = run_checks(
            chosen(gpu_cases.checks(tiny=False)), "cuda", seed, begin + 0.35 * arguments.seconds
        )
        if arguments.tune:
            record["tuned"] = tune(
                [t for t in gpu_cases.tunings() if fnmatch.fnmatch(t.kernel, arguments.pattern)],
                card, seed, begin + 0.65 * arguments.seconds,
            )  # fmt: skip
        rows = record["benches"] = []
        for bench in chosen(gpu_cases.benches()):
            row: dict[str, Any] = {"bench": bench.name, "size": bench.size}
            if time.monotonic() > until - 10:
                row |= {"why": "not run: out of time"}
            else:
                try:
                    row = run_bench(bench, record["limits"], seed)
                except Exception as error:
                    row |= {"why": f"{type(error).__name__}: {str(error)[:300]}"}
            torch.cuda.empty_cache()
            rows.append(row)
    record["took_seconds"] = round(time.monotonic() - begin, 1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    for row in record.get("benches", []):
        print(in_words(row))
    bad = [row for row in record["checks"] if row["status"] in ("differs", "failed")]
    for row in bad:
        print(f"CHECK {row['check']}: {row['status']}: {row['why']}")
    print(f"{len(record['checks'])} checks, {len(bad)} bad; {arguments.out} ({record['took_seconds']} s)")
    return 1 if bad else 0


def in_words(row: dict[str, Any]) -> str:
    name = f"{row['bench']} {row['size']}"
    if "seconds" not in row:
        return f"{name}: {row['why']}"
    parts = [f"{row['seconds']['p50'] * 1e3:.3f} ms, {row['rate']:.3g} {row['unit']}/s"]
    if "limit_share" in row:
        parts.append(f"{row['limit_share']:.0%} of {row['limit']}")
    if "copy_share" in row:
        parts.append(f"{row['copy_share']:.0%} of copy")
    for other, beside in row["beside"].items():
        parts.append(f"{other} x{beside['ratio']:.2f}" if "ratio" in beside else f"{other}: {beside['why'][:60]}")
    parts += [f"goal {g} {v['goal']:g} {'met' if v['met'] else 'NOT met'}" for g, v in row["goals"].items()]
    return f"{name}: " + ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
