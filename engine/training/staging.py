"""Large files between a parallel file system and the disk of a node: checksummed by chunks, copied once per node.

A store is one large file with a table of SHA-256 sums, one for each chunk, so that many threads can check or copy it at
once and damage is named by where it lies. Every process of a node asks for the copy; the first one makes it, and
the others wait. A copy is recognised by the hash in its name and is never read before it is whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine.atomic import fsync
from engine.errors import CorruptRun, UsageError

CHUNK_BYTES = 64 * 2**20
_THREADS = 4
_STALE_SECONDS = 60.0  # a copy whose file has not grown for so long is nobody's


def chunks_of(path: str | Path, chunk_bytes: int = CHUNK_BYTES) -> dict[str, Any]:
    """The table of a file: {"bytes", "chunk_bytes", "sha256": hex of each chunk in order}."""
    size = Path(path).stat().st_size

    def digest(start: int) -> str:
        return hashlib.sha256(_read(path, start, min(chunk_bytes, size - start))).hexdigest()

    with ThreadPoolExecutor(_THREADS) as pool:
        return {
            "bytes": size,
            "chunk_bytes": chunk_bytes,
            "sha256": list(pool.map(digest, range(0, size, chunk_bytes))),
        }


def verify(path: str | Path, table: dict[str, Any]) -> None:
    """Read the whole file and compare.

    Raises:
        CorruptRun: the length or a chunk is another; the first damaged chunk is named by its bytes.
    """
    _transfer(Path(path), None, table)


def stage(path: str | Path, table: dict[str, Any], scratch: str | Path, wait_seconds: float = 3_600.0) -> Path:
    """The copy of `path` under the folder `scratch`, made and checked by one process of this node.

    Args:
        table: `chunks_of(path)`, as it was when the file was written.
        scratch: a folder on a disk of this node.
        wait_seconds: how long to wait for another process that is still copying.

    Returns:
        Path of the copy. It stays there for the next job; whoever owns the scratch disk clears it.

    Raises:
        CorruptRun: the file is not what the table says. UsageError: scratch cannot hold it or cannot be written.
    """
    path, scratch = Path(path), Path(scratch)
    key = hashlib.sha256("".join(table["sha256"]).encode()).hexdigest()[:16]
    target, lock = scratch / f"{key}-{path.name}", scratch / f".{key}.copying"
    until = time.monotonic() + wait_seconds
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        while not (target.is_file() and target.stat().st_size == table["bytes"]):
            try:
                os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                _wait(lock, until, path)
                continue
            try:
                _copy(path, target, lock, table)
            finally:
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError("a scratch folder that can be written", error.strerror or str(error), scratch) from None
    return target


def near(path: Path, table: dict[str, Any], scratch: str | Path | None, checked: bool = False) -> Path:
    """Where to read `path` from: its copy under `scratch`, or itself, which is checked first unless it was `checked`."""
    if scratch is not None:
        return stage(path, table, scratch)
    if not checked:
        verify(path, table)
    return path


def _copy(path: Path, target: Path, lock: Path, table: dict[str, Any]) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < table["bytes"]:
        need = f"{table['bytes'] / 2**30:.1f} GiB free"
        raise UsageError(need, f"{free / 2**30:.1f} GiB", target.parent, "another scratch folder, or none")
    partial = target.with_name(f".partial-{os.getpid()}-{target.name}")
    try:
        _transfer(path, partial, table, lock)
        fsync(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _wait(lock: Path, until: float, path: Path) -> None:
    """Until the copying process is done; its lock is taken away when it has shown no life for a while.

    It is touched at every chunk, and only its changes count: the clocks of file systems differ.
    """
    seen, since = -1, time.monotonic()
    while True:
        try:
            touched = lock.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if touched != seen:
            seen, since = touched, time.monotonic()
        if time.monotonic() - since > _STALE_SECONDS:
            lock.unlink(missing_ok=True)
            return
        if time.monotonic() > until:
            raise UsageError("a copy that is finished in time", "one still being made", path, f"removing {lock}")
        time.sleep(0.2)


def _transfer(path: Path, into: Path | None, table: dict[str, Any], lock: Path | None = None) -> None:
    size, chunk = int(table["bytes"]), int(table["chunk_bytes"])
    hint = "making the file again: it was damaged after it was written"
    if path.stat().st_size != size:
        raise CorruptRun(f"{size} bytes", f"{path.stat().st_size}", path, hint)
    sums: Sequence[str] = table["sha256"]
    output = None if into is None else os.open(into, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)

    def move(k: int) -> int | None:
        part = _read(path, k * chunk, min(chunk, size - k * chunk))
        if hashlib.sha256(part).hexdigest() != sums[k]:
            return k
        if output is not None:
            done = 0
            while done < len(part):
                done += os.pwrite(output, memoryview(part)[done:], k * chunk + done)
        if lock is not None:
            lock.touch()
        return None

    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            bad = next((k for k in pool.map(move, range(len(sums))) if k is not None), None)
    finally:
        if output is not None:
            os.close(output)
    if bad is not None:
        where = f"bytes {bad * chunk} to {min((bad + 1) * chunk, size) - 1}"
        raise CorruptRun(f"SHA-256 {sums[bad][:12]}... of {where}", "another", path, hint)


def _read(path: str | Path, start: int, count: int) -> bytes:
    with open(path, "rb", buffering=0) as stream:
        stream.seek(start)
        parts, left = [], count
        while left:
            part = stream.read(left)
            if not part:
                raise CorruptRun(f"{count} bytes from {start}", f"{count - left}", path)
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
