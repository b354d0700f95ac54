"""Search of a finished folder for strings that must not leave, e.g. ids of real people: names, bytes, and what gzip holds."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.errors import GateRefused, InputError

SHORTEST = 5  # shorter strings occur by chance in compressed bytes


def read_words(path: str | Path) -> list[str]:
    """Strings of a text file, one a line; of a tab separated line only the first cell.

    Raises:
        InputError: no such text file, or nothing in it that is long enough to be looked for.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise InputError("a text file with one string a line", "something else", Path(path).name) from None
    words = [line.split("\t")[0].strip() for line in lines]
    if not any(len(word) >= SHORTEST for word in words):
        raise InputError(f"strings of {SHORTEST} characters or more", "none", Path(path).name)
    return words


def refuse_forbidden(folder: Path, words: Iterable[str]) -> None:
    """Look for each word in names and contents of everything below `folder`.

    Strings shorter than SHORTEST are passed over. The refusal never shows the word, which may be a person's id.

    Raises:
        GateRefused: a word was found, or a gzip file is damaged.
    """
    looked_for = [word for word in words if len(word) >= SHORTEST]
    needles = [word.encode() for word in looked_for]
    if not needles:
        return
    longest = max(map(len, needles))
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        blocks = [name.encode()] if any(n in name.encode() for n in needles) else _contents(path, longest)
        if any(needle in block for block in blocks for needle in needles):
            for word in looked_for:
                name = name.replace(word, "[withheld]")
            raise GateRefused("nothing of a real person", "a forbidden string", f"file {name}")


def _contents(path: Path, overlap: int) -> Iterator[bytes]:
    """Blocks of a file, and of what it holds where it is gzip or BGZF, each beginning with the end of the one
    before.
    """
    with open(path, "rb") as stream:
        yield from _blocks(stream.read, overlap)
    with open(path, "rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    if packed:
        try:
            with gzip.open(path) as unpacked:
                yield from _blocks(unpacked.read, overlap)
        except (OSError, EOFError, zlib.error):
            raise GateRefused("a whole gzip file", "a damaged one", path.name) from None


def _blocks(read: Any, overlap: int) -> Iterator[bytes]:
    tail = b""
    while block := read(1 << 22):
        yield tail + block
        tail = (tail + block)[-overlap:]
