"""Files and folders that are either whole or absent: written beside their place, flushed to disk, then renamed.

A reader never sees half a file; a job killed at any moment leaves at most a `.partial-*` entry beside the target.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import UsageError


def _beside(path: Path) -> Path:
    # the suffixes are kept last, because writers choose the format by them (.nii.gz, .vcf.gz, .bcf)
    return path.with_name(f".partial-{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}")


def fsync(path: Path) -> None:
    """Flush a file, or a folder's entries so that a rename in it survives a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it is fsynced and renamed onto `path`, on error removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    try:
        yield partial
        fsync(partial)
        os.replace(partial, path)
        fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a folder beside `path` to fill; on success it is renamed to `path`, on error removed.

    Raises:
        UsageError: `path` exists already; a folder is never overwritten or merged.
    """
    path = Path(path)
    if path.exists():
        raise UsageError(
            "a folder that does not exist yet", "an existing one", path, "another --out, or remove it first"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    partial.mkdir()
    try:
        yield partial
        for entry in (partial, *partial.rglob("*")):  # folders too: a name that is not on disk is a lost file
            if entry.is_file() or entry.is_dir():
                fsync(entry)
        try:
            os.rename(partial, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise UsageError(
                "a folder that does not exist yet", "one made by another job meanwhile", path, "another --out"
            ) from None
        fsync(path.parent)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def sweep(path: str | Path) -> None:
    """Remove what killed attempts at `path` left beside it; call it only when `path` is whole and nobody makes it again."""
    path = Path(path)
    for partial in path.parent.glob(f".partial-*-{glob.escape(path.name)}"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. NaN and infinity are refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False, allow_nan=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays, paths and dataclasses as plain JSON values."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
