"""One job writes a run folder; a second one is refused in one line that says who holds it.

`RUN/lock.json` is made by linking a finished file into place, which is atomic on NFS too. It names host, boot, process and the
start time of that process, the SLURM job and how often it was restarted, and ends in a count of heartbeats that the holder
rewrites in place. A lock outlives `kill -9`, so the next job asks whether its holder still lives:

    same machine                process id and start time, exactly
    same SLURM job, restarted   dead: SLURM starts an attempt when the one before it is over
    another machine             its heartbeats are watched for a while on our own clock

No two clocks are ever compared, so that nodes whose clocks differ do no harm.

A dead holder is succeeded by linking `.lock-after-HOLDER`, again one atomic step that one job alone can take, and which is then
moved over `lock.json`. Nothing is ever taken away to be looked at, so there is no moment at which a late job finds the folder
free. A successor that dies before it has moved its file is itself succeeded: who holds the lock is the end of that chain.

A lock taken over wrongly, because its holder was stopped for minutes and then went on, is found out too: the holder asks
`check` before it writes, and finds another's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.errors import EngineError, UsageError

HEARTBEAT_SECONDS = 10.0
PATIENCE_SECONDS = 60.0  # attribute caches of NFS show another machine's writes up to a minute late
_BEATS = 12  # digits of the count
_TRIES = 10  # to take a lock; each that fails means that another job has just taken or released it


class LostLock(EngineError):
    """Another job has taken over this run folder; nothing more is written. Exit code 2."""


def _start_of(pid: int) -> str:
    """Start time of a process in ticks since boot, from /proc; "" when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return "" if fields[0] in "ZX" else fields[19]


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def identity() -> dict[str, Any]:
    """This process: host, boot and process namespace, process and its start time, SLURM job, task and restart."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")  # containers on one machine do not see each other's processes
    except OSError:
        namespace = ""
    return {
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "namespace": namespace,
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "slurm_restart": int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0),
        "since_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "token": uuid.uuid4().hex,
    }


class RunLock:
    """The lock of one run folder, held from `acquire` to `release` (or inside `with`)."""

    def __init__(self, run: str | Path, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.path = Path(run) / "lock.json"
        self.patience_seconds = patience_seconds
        self.mine: dict[str, Any] = {}
        self._descriptor, self._stop = -1, threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> RunLock:
        """Take the lock, from a dead holder where there is one.

        Raises:
            UsageError: a living job holds it. EngineError: the folder cannot be written.
        """
        self.mine = identity()
        waiting = self.path.with_name(f".lock-{self.mine['token']}")
        try:
            self._descriptor = os.open(waiting, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
            os.write(self._descriptor, (json.dumps(self.mine) + "\n" + "0".zfill(_BEATS)).encode())
            os.fsync(self._descriptor)
            if not any(self._linked(waiting, self.path) or self._succeeded(waiting) for _ in range(_TRIES)):
                raise UsageError("a run folder that no other job takes at the same moment", "one", self.path.parent)
        except OSError as error:
            os.close(self._descriptor) if self._descriptor >= 0 else None
            raise EngineError(
                "a run folder that can be written", error.strerror or str(error), self.path.parent, "another --out"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                waiting.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")
        self._thread.start()
        return self

    def _linked(self, waiting: Path, name: Path) -> bool:
        """Whether our file has that name now. NFS may do the link and lose the answer: whose file is there is what counts."""
        with contextlib.suppress(FileExistsError):
            os.link(waiting, name)
        return os.stat(waiting).st_nlink == 2

    def _succeeded(self, waiting: Path) -> bool:
        """Take over from a dead holder; False when another job was faster, UsageError when the holder lives."""
        chain = self._chain()
        if not chain:
            return False  # released meanwhile
        holder, beats, after = chain[-1]
        why = self._lives(holder, beats)
        if why:
            where = f"process {holder.get('pid')} on {holder.get('host')}"
            job = f", SLURM job {holder['slurm_job']}" if holder.get("slurm_job") else ""
            raise UsageError(
                "a run folder that no other job writes",
                f"one held by {where}{job} since {holder.get('since_utc')} ({why})",
                self.path.parent,
                "waiting for it, or another --out",
            )
        if not self._linked(waiting, after):
            return False
        # `after` counts only as long as the chain leads to it: while we looked, another may have succeeded and been moved
        if [name for _, _, name in self._chain()][: len(chain)] != [name for _, _, name in chain]:
            after.unlink()
            return False
        try:
            os.rename(after, self.path)
        except FileNotFoundError:  # we were stopped here, counted as dead and were succeeded
            return False
        for _, _, name in chain[:-1]:
            name.unlink(missing_ok=True)
        return True

    def _chain(self) -> list[tuple[dict[str, Any], str, Path]]:
        """Who holds the lock and who has succeeded whom since: content, heartbeats and the name their successor would take."""
        chain: list[tuple[dict[str, Any], str, Path]] = []
        path = self.path
        while True:
            holder, beats = _content(path)
            if holder is None:
                return chain
            key = hashlib.sha256(json.dumps(holder).encode()).hexdigest()[:32]
            path = self.path.with_name(f".lock-after-{key}")
            if any(path == name for _, _, name in chain):
                return chain  # two damaged files, which are told apart by nothing
            chain.append((holder, beats, path))

    def _lives(self, holder: dict[str, Any], beats: str) -> str:
        """Why the holder counts as living; "" when it is dead."""
        here = ("host", "boot", "namespace")
        if all(holder.get(key) == self.mine[key] for key in here):
            alive = _start_of(int(holder.get("pid", -1))) == holder.get("started")
            return "it is running" if alive else ""
        again = self.mine["slurm_job"] and holder.get("slurm_job") == self.mine["slurm_job"]
        if again and int(holder.get("slurm_restart", 0)) < self.mine["slurm_restart"]:
            return ""
        until = time.monotonic() + self.patience_seconds
        while time.monotonic() < until:
            time.sleep(min(1.0, self.patience_seconds / 10))
            chain = self._chain()
            if not chain:
                return ""
            now, later, _ = chain[-1]
            if now.get("token") != holder.get("token") or later != beats:
                return "its heartbeat goes on"
        return ""

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(HEARTBEAT_SECONDS):
            count += 1
            try:
                os.pwrite(self._descriptor, str(count).zfill(_BEATS).encode(), len(json.dumps(self.mine)) + 1)
                os.fsync(self._descriptor)
            except OSError:
                continue  # a full or lost disk is told by what writes there next

    def check(self) -> None:
        """Raise LostLock unless the lock in the folder is ours."""
        holder, _ = _content(self.path)
        if holder is None or holder.get("token") != self.mine.get("token"):
            got = "no lock" if holder is None else f"that of process {holder.get('pid')} on {holder.get('host')}"
            raise LostLock("the lock this job took", got, self.path, "one job per run folder; nothing was written")

    def release(self) -> None:
        """Give the lock back; another's is left alone."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        holder, _ = _content(self.path)
        if holder is not None and holder.get("token") == self.mine.get("token"):
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _content(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Holder and count of a lock file; (None, "") when there is none. One that cannot be read has an unknown holder."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None, ""
    first, _, beats = text.partition("\n")
    try:
        holder = json.loads(first)
    except json.JSONDecodeError:
        holder = {}
    return (holder if isinstance(holder, dict) else {}), beats
