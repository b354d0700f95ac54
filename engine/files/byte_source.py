"""Bytes of a plain or gzip file, forwards only, with what a damaged or hostile one can do held in check.

gzip is recognised by content, not by name; its checksums are verified; nothing is inflated that was not asked for.
"""

from __future__ import annotations

import os
import stat
import zlib
from pathlib import Path
from typing import IO

from engine.errors import InputError

# deflate cannot expand a byte to more than this
MOST_EXPANSION = 1032
_BLOCK = 1 << 20


class ByteSource:
    """Bytes of a plain or gzip file, forwards only; what the name and the first bytes disagree about becomes a
    warning.
    """

    def __init__(self, path: Path, warnings: list[str]) -> None:
        try:
            # opened without blocking, because a named pipe would wait for ever
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise InputError("a readable file", os.strerror(error.errno or 0), path) from None
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            os.close(descriptor)
            raise InputError("a regular file", "a folder" if stat.S_ISDIR(facts.st_mode) else "a device or pipe", path)
        self.path, self.warnings = path, warnings
        self.stream: IO[bytes] = os.fdopen(descriptor, "rb")
        self.size = facts.st_size
        start = self.stream.read(4)
        self.stream.seek(0)
        if not start:
            self.close()
            raise InputError("a NIfTI file", "an empty file", path)
        self.gzip = start[:2] == b"\x1f\x8b"
        named_gzip = path.name.lower().endswith(".gz")
        if self.gzip and not named_gzip:
            warnings.append("gzip bytes under a name without .gz")
        if named_gzip and not self.gzip:
            warnings.append("plain bytes under a .gz name")
        self.position = 0
        self._inflater, self._ready, self._ended = zlib.decompressobj(31), b"", False

    def close(self) -> None:
        self.stream.close()

    def read(self, count: int) -> bytearray:
        """The next `count` bytes, fewer only at the end."""
        got = bytearray()
        while len(got) < count:
            block = self._block(min(_BLOCK, count - len(got)))
            if not block:
                break
            got += block
        self.position += len(got)
        return got

    def skip(self, count: int) -> None:
        """Pass over `count` bytes without keeping them; the end of the file is noticed by the next `read`."""
        while count > 0 and (block := self.read(min(_BLOCK, count))):
            count -= len(block)

    def rest(self, limit: int) -> int:
        """Read to the end, so that the checksum is verified, and count what was left; stops when `limit` is passed."""
        if not self.gzip:
            return self.size - self.stream.tell()
        left = 0
        while left <= limit and (block := self._block(_BLOCK)):
            left += len(block)
        return left

    def _block(self, most: int) -> bytes:
        if not self.gzip:
            return self.stream.read(most)
        while not self._ended:
            if not self._ready:
                self._ready = self.stream.read(_BLOCK)
                if not self._ready and not self._inflater.eof:
                    raise InputError(
                        "a whole gzip stream", "one that ends before its end marker", self.path, "copy it again"
                    )
            try:
                block = self._inflater.decompress(self._ready, most)
            except zlib.error as error:
                kind = "a wrong checksum or length" if "incorrect" in str(error) else "damaged data"
                raise InputError("an intact gzip stream", kind, self.path, "copy it again") from None
            if self._inflater.eof:
                self._next_member(self._inflater.unused_data)
            else:
                self._ready = self._inflater.unconsumed_tail
            if block:
                return block
        return b""

    def _next_member(self, after: bytes) -> None:
        after = after or self.stream.read(_BLOCK)
        if after[:1] == b"\x1f" and len(after) == 1:
            after += self.stream.read(_BLOCK)
        if after[:2] == b"\x1f\x8b":
            self._inflater, self._ready = zlib.decompressobj(31), after
            return
        self._ended = True
        while after:
            if after.strip(b"\0"):
                self.warnings.append("bytes after the end of the gzip stream")
                return
            after = self.stream.read(_BLOCK)
