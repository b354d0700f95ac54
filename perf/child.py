"""The process in which a case runs: fresh for each, threads set before the first import, nothing else in it.

`start` builds its environment. Two ways of use, both one JSON object a line on standard output:

    python -P -m perf.child list FILE                      names of the cases and curves of a bench file
    python -P -m perf.child case FILE KEY [--peers] ...    all readings of one case
    python -P -m perf.child serve FILE KEY                 warms up, then one reading for every line on standard input

`serve` is how two versions of the code take turns. What the case prints goes to standard error.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from perf import find, measure
from perf.case import Case

TOOL = Path(__file__).resolve().parents[1]
_THREADS = (
    "NUMBA_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "RAYON_NUM_THREADS",
)
# glibc keeps what a contestant has freed, for the next one. By default every large array is fresh memory of the machine, and
# what that costs in a virtual machine depends on its host: 0.03 s or 0.9 s of system time for the same 400 MB.
_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_ARENA_MAX": "1"}
# set on some machines for old builds of OpenBLAS; they hold a current NumPy, and so the peers, back
_HANDICAPS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


def environment(threads: int, code: Path, numba_cache: Path | None = None) -> dict[str, str]:
    """Variables of a child that may use `threads` threads and imports `engine` from the folder `code`."""
    chosen = {name: value for name, value in os.environ.items() if name not in _HANDICAPS}
    chosen.update({name: str(threads) for name in _THREADS} | _HEAP)
    chosen.update({"PYTHONPATH": os.pathsep.join(dict.fromkeys((str(code), str(TOOL)))), "PYTHONHASHSEED": "0"})
    if numba_cache is not None:
        chosen["NUMBA_CACHE_DIR"] = str(numba_cache)
    return chosen


def start(
    arguments: list[str],
    *,
    threads: int,
    code: Path,
    folder: Path,
    numba_cache: Path | None = None,
    errors: IO[bytes] | None = None,
) -> subprocess.Popen[str]:
    """A child with pipes for standard input and output. `folder`: its working directory, scratch."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "perf.child", *arguments],
        env=environment(threads, code, numba_cache), cwd=folder, text=True, stderr=errors,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def _case(file: Path, key: str) -> Case:
    module = find.load(file)
    everything = find.cases(module) + [point for points in find.curves(module).values() for point in points]
    for case in everything:
        if case.key == key:
            return case
    raise KeyError(f"{file.name} has no case {key}")


def _listing(file: Path) -> dict[str, Any]:
    module = find.load(file)

    def told(case: Case) -> dict[str, Any]:
        plain = {name: getattr(case, name) for name in _PLAIN}
        return {**plain, "key": case.key, "goals": {peer.name: peer.goal for peer in case.peers}}

    curves = {
        name: {"axis": find.axis(points), "points": [told(p) for p in points]}
        for name, points in find.curves(module).items()
    }
    return {"cases": [told(case) for case in find.cases(module)], "curves": curves}


_PLAIN = ("name", "size", "work", "unit", "floor_bytes", "floor_ops", "limit", "threads", "repeats", "quick")


def _libraries() -> list[dict[str, Any]]:
    """Which BLAS and OpenMP ran, and which kernels of it."""
    try:
        import threadpoolctl
    except ImportError:
        return []
    wanted = ("prefix", "version", "architecture", "num_threads")
    found = [{name: info.get(name) for name in wanted} for info in threadpoolctl.threadpool_info()]
    return sorted(found, key=lambda row: str(row))


def _limit_threads(threads: int) -> None:
    """What the environment does not reach: processors, and libraries that the bench file has imported already."""
    if threads == 1 and hasattr(os, "sched_setaffinity"):  # code that asks how many processors there are is told: one
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(threads)


def digest(value: Any) -> str:
    """Hash of what inputs hold, where it can be told: arrays, numbers, text, and containers and objects of these."""
    hasher = hashlib.sha256()

    def feed(item: Any, depth: int) -> None:
        if hasattr(item, "tobytes") and hasattr(item, "dtype"):
            hasher.update(f"{item.dtype}{item.shape}".encode() + item.tobytes())
        elif hasattr(item, "numpy") and hasattr(item, "dtype"):
            feed(item.detach().cpu().numpy(), depth)
        elif isinstance(item, dict):
            for name in item:
                feed(name, depth + 1)
                feed(item[name], depth + 1)
        elif isinstance(item, list | tuple):
            for one in item:
                feed(one, depth + 1)
        elif isinstance(item, int | float | str | bytes | bool | None):
            hasher.update(repr(item).encode())
        elif hasattr(item, "__dict__") and depth < 4:
            feed({name: part for name, part in vars(item).items() if not callable(part)}, depth + 1)

    feed(value, 0)
    return hasher.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("list", "case", "serve"))
    parser.add_argument("file", type=Path)
    parser.add_argument("key", nargs="?", default="")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--repeats", type=int)
    chosen = parser.parse_args()
    # an editable install would supply, unseen, whatever module the code under PYTHONPATH lacks
    sys.meta_path[:] = [
        finder for finder in sys.meta_path if "__editable__" not in str(getattr(finder, "__module__", ""))
    ]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be read as an answer

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        if chosen.what == "list":
            answer(_listing(chosen.file))
            return
        case = _case(chosen.file, chosen.key)
        _limit_threads(case.threads)
        if chosen.what == "case":
            ours, peers = measure.measure(case, peers=chosen.peers, repeats=chosen.repeats)
            answer(
                {
                    "ours": asdict(ours),
                    "peers": [asdict(row) for row in peers],
                    "libraries": _libraries(),
                    "versions": _versions(case, peers),
                }
            )
            return
        inputs = case.prepare()
        measure.timed(case.run, inputs, case.threads)
        times = measure.runs_in_a_row(measure.timed(case.run, inputs, case.threads)[0])
        answer({"inputs": digest(inputs), "libraries": _libraries()})
        gc.disable()
        for _ in sys.stdin:
            gc.collect()
            answer({"seconds": measure.timed(case.run, inputs, case.threads, times)[0]})
    except Exception as error:
        answer({"why": measure.one_line(error)})


def _versions(case: Case, rows: list[measure.Readings]) -> dict[str, str]:
    """Version of every peer that ran."""
    found = {}
    for peer, row in zip(case.peers, rows, strict=False):  # no rows where peers were not asked for
        if row.status != "missing":
            try:
                found[peer.name] = peer.version() if peer.version else _version(peer.name)
            except Exception as error:
                found[peer.name] = measure.one_line(error)
    return found


def _version(name: str) -> str:
    from perf import peers  # reads engine.errors, which the code under test may not have

    return peers.version(name)


if __name__ == "__main__":
    main()
