"""Bytes of a BGZF, gzip or plain file in large pieces, forwards only, the blocks of BGZF inflated by several threads.

CRC and length of every block are verified (libdeflate, which lets go of the interpreter's lock), no block grows beyond what
deflate can, and a file that does not end with the end-of-file block is noticed. Anything out of order raises `Irregular`:
the caller hands such a file to a reader that says what is wrong with it. Layout: SAMv1.pdf, section 4.
"""

from __future__ import annotations

import ctypes
import gzip
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import IO, Any, cast

import deflate
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.files.byte_source import MOST_EXPANSION

EOF_BLOCK = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
PAD = 256  # bytes behind a piece that may be read, though they mean nothing
FRONT = 1 << 20  # bytes before a piece, for the record that began in the piece before
_PIECE = (
    1 << 20
)  # inflated bytes of a piece: with its compressed bytes and the rows made from it, a second-level cache full
_RAW = 1 << 18  # compressed bytes read at one time
_MOST_BLOCKS = 4096  # of one piece: empty blocks take no room in it
_HEAD, _TAIL = 18, 8
_intrinsic: Any = intrinsic  # called with one argument less than defined, which a type checker cannot know


_Job = tuple[np.ndarray, np.ndarray, int]  # compressed bytes, blocks, bytes of the file used so far


class Irregular(Exception):
    """What the fast path does not take, in a few words."""


def pieces(path: Path, threads: int = 1) -> Generator[tuple[np.ndarray, int, int], None, None]:
    """Uint8 arrays with FRONT free bytes, the next bytes of the file, and at least PAD more; (array, end of the bytes, bytes of
    the file used so far).

    An array is overwritten when the next is asked for.

    Raises:
        Irregular: no such file, damage, truncation, or BGZF that is mixed with other gzip.
    """
    try:
        with open(path, "rb") as raw:
            size = raw.seek(0, 2)
            raw.seek(0)
            start = raw.read(_HEAD)
            if start[:2] != b"\x1f\x8b":
                raw.seek(0)
                yield from _from_stream(raw, raw)
            elif start[12:14] != b"BC" or not start[3] & 4:
                raw.seek(0)
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield from _from_stream(cast(IO[bytes], stream), raw)
            else:
                raw.seek(max(0, size - len(EOF_BLOCK)))
                if raw.read() != EOF_BLOCK:
                    raise Irregular("no end-of-file block")
                raw.seek(0)
                with closing(_from_blocks(raw, threads)) as made:
                    yield from made
    except (OSError, EOFError, zlib.error) as fault:
        raise Irregular(str(fault)) from None


def _from_stream(stream: IO[bytes], raw: IO[bytes]) -> Generator[tuple[np.ndarray, int, int], None, None]:
    array = np.empty(FRONT + _PIECE + PAD, dtype=np.uint8)
    while count := stream.readinto(array[FRONT : FRONT + _PIECE].data):  # type: ignore[attr-defined]
        yield array, FRONT + count, raw.tell()


def _from_blocks(raw: IO[bytes], threads: int) -> Generator[tuple[np.ndarray, int, int], None, None]:
    jobs = _jobs(raw)
    ahead = threads if threads > 1 else 0
    free = deque(np.empty(FRONT + _PIECE + PAD, dtype=np.uint8) for _ in range(ahead + 1))
    if not ahead:
        for job in jobs:
            yield free[0], _inflate(job, free[0]), job[2]
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[np.ndarray, Future[int], int]] = deque()
        try:
            more = True
            while more or waiting:
                while more and free and len(waiting) < ahead:
                    found = next(jobs, None)
                    if found is None:
                        more = False
                        break
                    array = free.popleft()
                    waiting.append((array, pool.submit(_inflate, found, array), found[2]))
                if waiting:
                    array, done, used = waiting.popleft()
                    yield array, done.result(), used
                    free.append(array)
        finally:
            for _, done, _ in waiting:
                done.cancel()


def _jobs(raw: IO[bytes]) -> Iterator[_Job]:
    """(compressed bytes, blocks, bytes of the file used so far): as many blocks as one piece holds and one read gave.

    `blocks` int64 (B, 4): first byte, end, inflated length, CRC.
    """
    data, at, used = np.empty(0, dtype=np.uint8), 0, 0
    blocks_bk = np.empty((_MOST_BLOCKS, 4), dtype=np.int64)
    while True:
        count, end, whole = _find_blocks(data, at, _PIECE, blocks_bk)
        if count < 0:
            raise Irregular("a block that is no BGZF")
        if count:
            used += end - at
            yield data, blocks_bk[:count].copy(), used
            at = end
        if whole:  # what is left of the data ends within a block
            left = len(data) - at
            more = np.empty(left + _RAW, dtype=np.uint8)
            more[:left] = data[at:]
            got = raw.readinto(more[left:].data)  # type: ignore[attr-defined]
            if not got:
                if left:
                    raise Irregular("a truncated block")
                return
            data, at = more[: left + got], 0


@numba.njit(cache=True, nogil=True)
def _find_blocks(data: np.ndarray, at: Any, room: Any, blocks_bk: np.ndarray) -> tuple[int, int, bool]:
    """Number of blocks from `at` that fit in `room`, the end of the last, and whether the data ended first; -1: no BGZF."""
    count = 0
    while count < len(blocks_bk):
        if len(data) - at < _HEAD + _TAIL:
            return count, at, True
        known = data[at] == 0x1F and data[at + 1] == 0x8B and data[at + 2] == 8 and data[at + 3] == 4
        known = known and data[at + 10] == 6 and data[at + 11] == 0 and data[at + 12] == 66 and data[at + 13] == 67
        if not (known and data[at + 14] == 2 and data[at + 15] == 0):
            return -1, at, False
        end = at + 1 + np.int64(data[at + 16]) + (np.int64(data[at + 17]) << 8)
        if end - at < _HEAD + _TAIL:
            return -1, at, False
        if end > len(data):
            return count, at, True
        crc, length = np.int64(0), np.int64(0)
        for k in range(4):
            crc |= np.int64(data[end - 8 + k]) << (8 * k)
            length |= np.int64(data[end - 4 + k]) << (8 * k)
        if length > 65536 or length > MOST_EXPANSION * (end - at - _HEAD - _TAIL):
            return -1, at, False
        if length > room:
            return count, at, False
        room -= length
        blocks_bk[count, 0], blocks_bk[count, 1], blocks_bk[count, 2], blocks_bk[count, 3] = at, end, length, crc
        count += 1
        at = end
    return count, at, False


def _inflate(job: _Job, array: np.ndarray) -> int:
    """Blocks of one job into `array` behind FRONT; the end of the bytes."""
    data, blocks_bk, _ = job
    if _FUNCTIONS is None:
        return _inflate_by_block(data, blocks_bk, array)
    alloc, free, decompress, crc32 = _FUNCTIONS
    decompressor = alloc()
    try:
        at = _inflate_all(decompress, crc32, decompressor, data, blocks_bk, array, FRONT)
    finally:
        free(decompressor)
    if at < 0:
        raise Irregular("a damaged block")
    return int(at)


def _inflate_by_block(data: np.ndarray, blocks_bk: np.ndarray, array: np.ndarray) -> int:
    """`_inflate` by the package's own functions: a copy and some microseconds more for each block."""
    source, target, at = data.data, array.data, FRONT
    for first, end, length, crc in blocks_bk.tolist():
        try:
            block = deflate.deflate_decompress(source[first + _HEAD : end - _TAIL], length)
        except deflate.DeflateError:
            raise Irregular("a damaged block") from None
        if len(block) != length or deflate.crc32(block) != crc:
            raise Irregular("a damaged block")
        target[at : at + length] = block
        at += length
    return at


def _functions() -> tuple[Any, Any, int, int] | None:
    """libdeflate's own functions inside the package: two to call from here, two addresses; None where a build hides them."""
    try:
        library = ctypes.CDLL(deflate._deflate.__file__)
        alloc, free = library.libdeflate_alloc_decompressor, library.libdeflate_free_decompressor
        addresses = [
            ctypes.cast(getattr(library, f"libdeflate_{name}"), ctypes.c_void_p).value
            for name in ("deflate_decompress", "crc32")
        ]
    except (AttributeError, OSError):
        return None
    alloc.restype, alloc.argtypes = ctypes.c_void_p, []
    free.restype, free.argtypes = None, [ctypes.c_void_p]
    return alloc, free, addresses[0] or 0, addresses[1] or 0


@_intrinsic
def _call_decompress(
    typingctx: Any, function: Any, decompressor: Any, source: Any, at: Any, count: Any, target: Any, to: Any, room: Any
) -> Any:
    """libdeflate_deflate_decompress: bytes written, -1 on damage."""
    signature = types.int64(types.intp, types.intp, source, types.intp, types.intp, target, types.intp, types.intp)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, byte = ir.IntType(64), ir.IntType(8).as_pointer()
        written = cgutils.alloca_once(builder, size)
        kind = ir.FunctionType(ir.IntType(32), [byte, byte, size, byte, size, size.as_pointer()])
        call = builder.inttoptr(args[0], kind.as_pointer())
        source, target = (context.make_array(signature.args[k])(context, builder, args[k]).data for k in (2, 5))
        status = builder.call(
            call,
            [
                builder.inttoptr(args[1], byte), builder.gep(source, [args[3]]), args[4],
                builder.gep(target, [args[6]]), args[7], written,
            ],
        )  # fmt: skip
        fine = builder.icmp_unsigned("==", status, ir.Constant(status.type, 0))
        return builder.select(fine, builder.load(written), ir.Constant(size, -1))

    return signature, codegen


@_intrinsic
def _call_crc32(typingctx: Any, function: Any, source: Any, at: Any, count: Any) -> Any:
    """libdeflate_crc32 of `count` bytes."""
    signature = types.uint32(types.intp, source, types.intp, types.intp)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, byte, word = ir.IntType(64), ir.IntType(8).as_pointer(), ir.IntType(32)
        call = builder.inttoptr(args[0], ir.FunctionType(word, [word, byte, size]).as_pointer())
        source = context.make_array(signature.args[1])(context, builder, args[1]).data
        return builder.call(call, [ir.Constant(word, 0), builder.gep(source, [args[2]]), args[3]])

    return signature, codegen


@numba.njit(cache=True, nogil=True)
def _inflate_all(
    decompress: int, crc32: int, decompressor: int, data: np.ndarray, blocks_bk: np.ndarray, array: np.ndarray, at: int
) -> int:
    """`_inflate` in one call without the interpreter's lock; -1 on damage."""
    for k in range(len(blocks_bk)):
        first, length = blocks_bk[k, 0] + _HEAD, blocks_bk[k, 2]
        count = blocks_bk[k, 1] - _TAIL - first
        if _call_decompress(decompress, decompressor, data, first, count, array, at, length) != length:
            return -1
        if np.int64(_call_crc32(crc32, array, at, length)) != blocks_bk[k, 3]:
            return -1
        at += length
    return at


_FUNCTIONS = _functions()
