"""Records: what is kept of every measurement, where, and whether it is still what it was.

A run appends to one file of its own, perf/history/<machine>/<time>-<commit>.jsonl, one JSON object a line, and no file is
ever written again. A record stands alone: work, times, peers of the same run, commit, versions, machine and its measured
limits, hash of the bench file. Failures are records too. How a figure is measured is left to perf.measure.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from perf.find import source_hash

SCHEMA = 1
_FLAGS = (
    "avx2", "fma", "bmi2", "avx512f", "avx512bw", "avx512vl", "avx512_vpopcntdq", "avx512_vnni", "avx512_bf16", "amx_int8",
    "amx_bf16", "asimd", "sve",
)  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# six digits are more than any of these figures carries
Figure = Annotated[float, AfterValidator(lambda value: float(f"{value:.6g}"))]


class Spread(_Strict):
    p20: Figure
    p50: Figure
    p80: Figure
    n: int = Field(ge=1)


class PeerRecord(_Strict):
    """A peer in the same run. `ratio`: its time / our time, run by run; above 1, ours is faster."""

    name: str
    version: str | None = None
    status: Literal["ok", "missing", "failed", "differs"]
    why: str = ""
    compared: bool = False
    note: str = ""
    seconds: Spread | None = None
    ratio: Spread | None = None
    peak_bytes: int | None = None
    goal: float | None = None
    met: bool | None = None


class Fit(_Strict):
    """cost ~ axis ** exponent, 95 % interval, from the records named in `points`."""

    axis: str
    exponent: Figure
    low: Figure
    high: Figure
    points: list[str]


class Bench(_Strict):
    path: str
    sha256: str


class Record(_Strict):
    """One line of the history; see perf.case.Case for the fields of the case."""

    version: Literal[1] = Field(alias="schema")
    id: str
    run: str
    time: str
    kind: Literal["limits", "case", "exponent", "file"]
    status: Literal["ok", "failed", "not run"]
    why: str = ""
    key: str
    case: str
    size: dict[str, int] = {}
    curve: str | None = None
    work: float | None = None
    unit: str | None = None
    threads: int = 1
    clock: Literal["cpu", "wall"] = "cpu"
    seconds: Spread | None = None
    rate: Spread | None = None
    peak_bytes: int | None = None
    floor_bytes: float = 0
    floor_ops: float = 0
    limit: str = ""
    copy_share: Figure | None = Field(None, description="floor_bytes / seconds, as a share of the measured copy rate")
    limit_share: Figure | None = Field(None, description="floor_ops / seconds, as a share of the measured `limit`")
    limits: dict[str, Figure | None] = {}
    peers: list[PeerRecord] = []
    fit: Fit | None = None
    bench: Bench | None = None
    commit: str
    dirty: bool | None
    versions: dict[str, str]
    libraries: list[dict[str, Any]] = []
    machine: dict[str, Any]


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, the vector units that matter, what hides some of them, and the folder name of it all."""
    from engine import devices

    flags = devices.cpu_flags()
    found: dict[str, Any] = {**devices.machine(), "flags": [flag for flag in _FLAGS if flag in flags]}
    hidden = {name: os.environ[name] for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES") if os.environ.get(name)}
    widest = (
        "avx512-vpopcntdq"
        if "avx512_vpopcntdq" in flags
        else "avx512"
        if "avx512f" in flags
        else "avx2"
        if "avx2" in flags
        else ""
    )
    words = [str(found["cpu"]).split("@")[0], f"{found['cores']} cores", widest, *found["gpus"]]
    if hidden:
        found["numba"] = hidden
        words.append(f"numba as {hidden.get('NUMBA_CPU_NAME', 'fewer features')}")
    found["name"] = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
    return found


def state_of(root: Path) -> tuple[str, bool | None]:
    """Commit of `root` and whether code that the figures depend on differs from it; ("unknown", None) outside git."""
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return "unknown", None
    changed = _git(
        root,
        "status",
        "--porcelain",
        "--",
        "engine",
        "perf",
        "pyproject.toml",
        "constraints.txt",
        ":(exclude)perf/history",
    )
    return head.strip(), bool((changed or "").strip())


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def history_folder(root: Path) -> Path:
    return root / "perf" / "history"


class Log:
    """The file of one run; every record is on disk before the next case begins."""

    def __init__(self, history: Path, machine: str, run: str) -> None:
        self.path = history / machine / f"{run}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch(exist_ok=False)  # never over a file that is there
        self.run, self.count = run, 0

    def next_id(self) -> str:
        return f"{self.run}-{self.count + 1:03d}"

    def append(self, record: Record) -> None:
        self.count += 1
        with open(self.path, "a") as stream:
            stream.write(to_line(record) + "\n")


def to_line(record: Record) -> str:
    """One line of JSON; what is at its default is left out."""
    return record.model_dump_json(by_alias=True, exclude_defaults=True)


def read(history: Path) -> list[Record]:
    """Every record under a history folder, oldest run first.

    Raises:
        ValidationError: a line is no record; `verify` says which.
    """
    files = sorted(history.rglob("*.jsonl"), key=lambda path: path.name)
    return [Record.model_validate_json(line) for path in files for line in path.read_text().splitlines()]


def verify(root: Path, history: Path) -> tuple[list[str], list[str]]:
    """What is wrong with the history, and what could not be checked, one line each.

    Checked: every line is a record of this schema; ids are unique and belong to their file; the bench file of a record made
    from a clean commit has the hash that it has in that commit; in git, no committed file was deleted or changed other than
    by lines added at its end.
    """
    wrong: list[str] = []
    unknown: list[str] = []
    seen: dict[str, Path] = {}
    hashes: dict[tuple[str, str], str | None] = {}
    for path in sorted(history.rglob("*.jsonl")):
        name = path.relative_to(history)
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                record = Record.model_validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                wrong.append(f"{name}:{number}: {'.'.join(map(str, first['loc'])) or 'line'}: {first['msg']}")
                continue
            if record.id in seen:
                wrong.append(f"{name}:{number}: id {record.id} is also in {seen[record.id]}")
            seen[record.id] = name
            if record.run != path.stem:
                wrong.append(f"{name}:{number}: belongs to run {record.run}")
            if record.bench is not None and record.dirty is False:
                at = (record.commit, record.bench.path)
                if at not in hashes:
                    hashes[at] = _hash_in(root, *at)
                if hashes[at] is None:
                    unknown.append(f"{name}:{number}: no {at[1]} of commit {at[0][:7]} in this repository")
                elif hashes[at] != record.bench.sha256:
                    wrong.append(f"{name}:{number}: {at[1]} of commit {at[0][:7]} is not what was run")
    wrong += list(_rewritten(root, history))
    return wrong, unknown


def _hash_in(root: Path, commit: str, path: str) -> str | None:
    import hashlib

    done = subprocess.run(["git", "-C", str(root), "show", f"{commit}:{path}"], capture_output=True, timeout=60)
    return hashlib.sha256(done.stdout).hexdigest() if done.returncode == 0 else None


def _rewritten(root: Path, history: Path) -> Iterable[str]:
    """Committed files of the history that git saw deleted or changed in what they already said, or the working tree has so."""
    try:
        where = history.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        return
    log = (
        _git(root, "log", "--format=%h", "--raw", "--no-abbrev", "--no-renames", "--diff-filter=MD", "--", where) or ""
    )
    commit = ""
    for line in log.splitlines():
        if not line.startswith(":"):
            commit = line.strip() or commit
            continue
        _, _, old, new, rest = line.split(" ", 4)
        kind, path = rest.split("\t", 1)
        if path.endswith(".jsonl") and (kind == "D" or not _blob(root, new).startswith(_blob(root, old))):
            yield f"{path}: {'deleted' if kind == 'D' else 'rewritten'} by commit {commit}"
    for path in (_git(root, "ls-tree", "-r", "--name-only", "HEAD", "--", where) or "").splitlines():
        if path.endswith(".jsonl"):
            now = root / path
            if not now.is_file():
                yield f"{path}: deleted since the last commit"
            elif not now.read_bytes().startswith(_blob(root, f"HEAD:{path}")):
                yield f"{path}: rewritten since the last commit"


def _blob(root: Path, name: str) -> bytes:
    return subprocess.run(["git", "-C", str(root), "cat-file", "blob", name], capture_output=True, timeout=60).stdout


def bench_of(root: Path, path: Path) -> Bench:
    return Bench(path=path.relative_to(root).as_posix(), sha256=source_hash(path))
