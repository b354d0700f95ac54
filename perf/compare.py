"""`perf compare BASE`: the same bench code against the engine of another commit and of this checkout, in turn, in one session.

Two children of each case, one importing `engine` from a git worktree of BASE, stay warm and take one reading each in turn,
so that whatever slows the machine slows both. Bench files, inputs and the perf package are those of this checkout: only
`engine` differs. Nothing is recorded; a figure that is to be kept comes from `perf run`.
"""

from __future__ import annotations

import json
import os
import signal
import statistics as plain
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf import child, find, statistics
from perf.run import LEAST_REPEATS, ask, numba_cache
from perf.words import duration

_CASE_SECONDS = 60.0  # no further rounds after this, once there are enough
_ANSWER_SECONDS = 600.0


@dataclass(frozen=True)
class Row:
    """One case: `verdict` says what this checkout is beside the base, or why there is none; ratio = base / head."""

    key: str
    verdict: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    base_seconds: float | None = None
    head_seconds: float | None = None
    rounds: int = 0
    note: str = ""

    def in_words(self) -> str:
        if self.ratio is None or self.base_seconds is None or self.head_seconds is None:
            return f"{self.key}: {self.verdict}"
        times = f"{duration(self.base_seconds)} -> {duration(self.head_seconds)}"
        interval = f"base / head {self.ratio:.3f}, 99 %: {self.low:.3f} to {self.high:.3f}, n = {self.rounds}"
        return f"{self.key}: {self.verdict} ({times}; {interval}){'; ' + self.note if self.note else ''}"


def compare(
    root: Path,
    base: str,
    pattern: str | None,
    *,
    everything: bool = False,
    repeats: int = 15,
    tell: Callable[[str], None],
) -> list[Row]:
    """Compare the checkout `root` with its commit `base`, case by case; a line is told as each is done.

    Raises:
        LookupError: git knows no such commit, or no case matches.
    """
    root = root.resolve()
    rows = []
    with tempfile.TemporaryDirectory(prefix="engine-perf-") as scratch, _worktree(root, base, Path(scratch)) as old:
        folder, cases = Path(scratch), 0
        caches = {"base": numba_cache(old), "head": numba_cache(root)}
        for file in find.bench_files(root):
            listing = ask(["list", str(file)], threads=1, code=root, folder=folder, cache=caches["head"], seconds=120)
            if "why" in listing:
                rows.append(Row(file.relative_to(root).as_posix(), f"does not load: {listing['why']}"))
                tell(rows[-1].in_words())
            for case in listing.get("cases", ()):
                if (case["quick"] or everything) and find.matches(pattern, case["key"]):
                    rows.append(_case(case, file, {"base": old, "head": root}, folder, caches, repeats))
                    tell(rows[-1].in_words())
                    cases += 1
    if not cases:
        raise LookupError(f"no case matches {pattern!r}" if pattern else "no cases")
    return rows


@contextmanager
def _worktree(root: Path, base: str, scratch: Path) -> Iterator[Path]:
    """A folder that holds `engine` as of commit `base` and nothing else that Python could import."""
    tree, alone = scratch / "base", scratch / "code"

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=120)

    made = git("worktree", "add", "--detach", str(tree), base)
    if made.returncode != 0:
        raise LookupError(f"git has no worktree of {base!r}: {' '.join(made.stderr.strip().splitlines()[-1:])}")
    try:
        alone.mkdir()
        (alone / "engine").symlink_to(tree / "engine")
        yield alone
    finally:
        git("worktree", "remove", "--force", str(tree))


class _Runner:
    """A warm child; `answer` waits for its next line."""

    def __init__(self, file: Path, key: str, threads: int, code: Path, folder: Path, cache: Path) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by `stop`
        self.process = child.start(
            ["serve", str(file), key], threads=threads, code=code, folder=folder, numba_cache=cache, errors=self._errors
        )

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        alarm = threading.Timer(_ANSWER_SECONDS, self._kill)
        alarm.start()
        line = self.process.stdout.readline()
        alarm.cancel()
        return dict(json.loads(line)) if line else {"why": "the process ended or answered too late"}

    def _kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        self._kill()
        self.process.communicate()
        self._errors.close()


def _case(
    case: dict[str, Any], file: Path, codes: dict[str, Path], folder: Path, caches: dict[str, Path], repeats: int
) -> Row:
    key, runners = case["key"], {}
    try:
        ready = {}
        for name in ("base", "head"):  # one after the other: compiling beside a measurement would disturb it
            runners[name] = _Runner(file, key, case["threads"], codes[name], folder, caches[name])
            ready[name] = runners[name].answer()
        if "why" in ready["head"]:
            return Row(key, f"failed: {ready['head']['why']}")
        if "why" in ready["base"]:
            return Row(key, f"missing in base: {ready['base']['why']}")
        seconds: dict[str, list[float]] = {"base": [], "head": []}
        begin = time.monotonic()
        for k in range(repeats):
            if k >= LEAST_REPEATS and time.monotonic() - begin > _CASE_SECONDS:
                break
            for name in ("base", "head") if k % 2 == 0 else ("head", "base"):
                runners[name].go()
                told = runners[name].answer()
                if "why" in told:
                    return Row(key, f"failed in {name}: {told['why']}")
                seconds[name].append(told["seconds"])
    finally:
        for runner in runners.values():
            runner.stop()
    ratios = [a / b for a, b in zip(seconds["base"], seconds["head"], strict=True)]
    verdict, low, high = statistics.judge_ratio(ratios)
    note = (
        "" if ready["base"]["inputs"] == ready["head"]["inputs"] else "the inputs differ: prepare depends on the engine"
    )
    medians = {name: plain.median(values) for name, values in seconds.items()}
    return Row(key, verdict, plain.median(ratios), low, high, medians["base"], medians["head"], len(ratios), note)
