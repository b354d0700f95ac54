"""What this machine can do at best, measured: copy, popcount, multiply-add and matrix-product rates, for a number of threads.

A record holds a kernel against these, not against a datasheet. Each limit is the best of several short runs, because a limit
that noise has lowered would flatter the kernels; threads run the same loop on data of their own, side by side.

    copy         bytes read plus written per second, arrays far larger than the last cache
    popcount     64-bit words through and, popcount and add per second, from registers
    popcount_tile    the same by the tile of engine.kernels.bits on rows in the first-level cache, for comparison
    int8_unit    int8 multiply-adds per second by the matrix unit (Intel AMX), rows and columns from the first-level cache
    f32_fma      float32 multiply-adds per second from registers
    f32_gemm, f64_gemm, int8_gemm    multiply-adds per second of a matrix product: NumPy's BLAS or torch, whichever is
                 faster (int8: torch only)
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

NAMES = ("copy", "popcount", "popcount_tile", "int8_unit", "f32_fma", "f32_gemm", "f64_gemm", "int8_gemm")
_RUNS = 7
_COPY_BYTES = 2**28
_FEATURES = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES  # type: ignore[attr-defined]
_BYTES = 64 if "+avx512f" in _FEATURES else 32
_CHAINS = 20 if _BYTES == 64 else 10  # independent sums hide the latency; with constants they fit 32 or 16 registers


def count_limit(words: int) -> str:
    """The limit of counting bits in rows of so many words: none where they are looked up, which costs what the data costs."""
    try:
        from engine.kernels.bits import tile_lookups
    except ImportError:  # `perf compare` with a commit that only counts
        return "popcount"
    return "" if tile_lookups.preferred(words) else "popcount"


def _register_loop(kind: ir.Type, chains: int, step: Callable[[Any, Any], Any]) -> Callable[[int], float]:
    """Loop of `steps` rounds over `chains` independent vectors that never leave the registers: each becomes step(it)."""

    @intrinsic
    def rounds(typingctx: Any, steps: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            index, number = ir.IntType(64), kind.element
            entry, loop, done = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            at = builder.phi(index)
            at.add_incoming(ir.Constant(index, 0), entry)
            values = [builder.phi(kind) for _ in range(chains)]
            after = [step(builder, value) for value in values]
            for k, (value, following) in enumerate(zip(values, after, strict=True)):
                start = ir.Constant(number, 2 * k + 3)  # no two the same and no fixed point, or the compiler drops them
                value.add_incoming(ir.Constant(kind, [start] * kind.count), entry)
                value.add_incoming(following, loop)
            next_at = builder.add(at, ir.Constant(index, 1))
            at.add_incoming(next_at, loop)
            builder.cbranch(builder.icmp_signed("<", next_at, args[0]), loop, done)
            builder.position_at_end(done)
            add = builder.fadd if isinstance(number, ir.FloatType) else builder.add
            whole = after[0]
            for one in after[1:]:  # every chain must count for something, or the compiler drops it
                whole = add(whole, one)
            lane = builder.extract_element(whole, ir.Constant(ir.IntType(32), 0))
            return lane if isinstance(number, ir.FloatType) else builder.uitofp(lane, ir.FloatType())

        return types.float32(types.intp), codegen

    @numba.njit(nogil=True)
    def loop(steps: int) -> float:
        return rounds(steps)

    return loop


def _multiply_add(builder: Any, value: Any) -> Any:
    kind = ir.FunctionType(value.type, [value.type] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{value.type.count}f32")
    half, one = (ir.Constant(value.type, [x] * value.type.count) for x in (0.5, 1.0))
    return builder.call(fma, [value, half, one])


def _and_popcount_add(builder: Any, value: Any) -> Any:
    kind = ir.FunctionType(value.type, [value.type])
    popcount = cgutils.get_or_insert_function(builder.module, kind, f"llvm.ctpop.v{value.type.count}i64")
    mask = ir.Constant(value.type, [0x5DEECE66D5DEECEF] * value.type.count)
    return builder.add(value, builder.call(popcount, [builder.and_(value, mask)]))


def _best(work: float, *loops: Callable[[], object]) -> float:
    """Highest rate in _RUNS runs of the loops side by side, one thread each: `work` of every loop per second of CPU time for
    one loop, of wall time for more."""
    with ThreadPoolExecutor(len(loops)) as threads:

        def once() -> float:
            clock = time.process_time if len(loops) == 1 else time.perf_counter
            begin = clock()
            list(threads.map(lambda loop: loop(), loops))
            return work * len(loops) / (clock() - begin)

        once()
        return max(once() for _ in range(_RUNS))


def _copy(threads: int) -> float:
    pairs = [
        (np.ones(_COPY_BYTES // threads, np.uint8), np.zeros(_COPY_BYTES // threads, np.uint8)) for _ in range(threads)
    ]
    return _best(2.0 * (_COPY_BYTES // threads), *[lambda a=a, b=b: np.copyto(b, a) for a, b in pairs])


def _registers(threads: int, kind: ir.Type, step: Callable[[Any, Any], Any]) -> float:
    loop, steps = _register_loop(kind, _CHAINS, step), 10_000_000
    return _best(float(steps) * _CHAINS * kind.count, *[lambda: loop(steps)] * threads)


def _popcount_tile(threads: int) -> float:
    from engine.kernels.bits import tiles

    words, times = 64, 2000  # 32 rows of 512 bytes
    tile, block = tiles.and_tile, tiles.BLOCK

    @numba.njit(nogil=True)
    def loop(packed: np.ndarray, counts: np.ndarray) -> None:
        for _ in range(times):
            tile(packed, 0, packed, 0, counts)

    rows = np.random.default_rng(0).integers(0, 2**63, size=(block, words), dtype=np.uint64)
    data = [(tiles.interleaved(rows), np.empty(block * block, np.int32)) for _ in range(threads)]
    return _best(float(block * block * words * times), *[lambda a=a, c=c: loop(a, c) for a, c in data])


def _int8_unit(threads: int) -> float | None:
    from engine.kernels.bits import amx

    if not amx.granted():
        return None
    times, steps = 100_000, 4  # 16 KiB for both sides

    @numba.njit(nogil=True)
    def loop(values: np.ndarray) -> None:
        amx.take_unit(amx.SHAPE)
        amx.clear_sums()
        for _ in range(times):
            for step in range(steps):
                a, b, half = 2 * step * amx.STEP, (2 * step + 1) * amx.STEP, amx.STEP // 2
                amx.add_products(values, a, half, values, b, half, 64)
        amx.give_back()

    size = 2 * steps * amx.STEP
    room = [np.zeros(size + 64, np.int8) for _ in range(threads)]
    data = [
        values[-values.ctypes.data % 64 :][:size] for values in room
    ]  # rows that straddle cache lines cost three times as much
    return _best(float(times * steps * 32 * 32 * 64), *[lambda values=values: loop(values) for values in data])


def _best_product(threads: int, size: int, product: Callable[[], object]) -> float:
    """As `_best`, of one product of `size` x `size` that makes threads of its own."""
    clock, best = time.process_time if threads == 1 else time.perf_counter, 0.0
    for _ in range(_RUNS + 1):
        begin = clock()
        product()
        best = max(best, float(size) ** 3 / (clock() - begin))
    return best


def _gemm(threads: int, dtype: str) -> float | None:
    """Best of NumPy and torch; their own threads, already set by the environment, do the work."""
    size, found = 1024 * (1 if threads == 1 else 2), []
    if dtype != "int8":
        a = np.random.default_rng(0).standard_normal((size, size)).astype(dtype)
        out = np.empty_like(a)
        found.append(_best_product(threads, size, lambda: np.matmul(a, a, out=out)))
    try:
        import torch
    except ImportError:
        return max(found, default=None)
    torch.set_num_threads(threads)
    if dtype == "int8":
        left = torch.ones((size, size), dtype=torch.int8)
        right = torch.ones((size, size), dtype=torch.int8).t()
        try:
            found.append(_best_product(threads, size, lambda: torch._int_mm(left, right)))
        except (RuntimeError, AttributeError):
            return None
    else:
        b = torch.from_numpy(a)
        found.append(_best_product(threads, size, lambda: torch.mm(b, b)))
    return max(found)


def limits(threads: int) -> dict[str, float | None]:
    """Every limit in NAMES for `threads` threads side by side; None where it cannot be measured here."""
    return {
        "copy": _copy(threads),
        "popcount": _registers(threads, ir.VectorType(ir.IntType(64), _BYTES // 8), _and_popcount_add),
        "popcount_tile": _popcount_tile(threads),
        "int8_unit": _int8_unit(threads),
        "f32_fma": _registers(threads, ir.VectorType(ir.FloatType(), _BYTES // 4), _multiply_add),
        "f32_gemm": _gemm(threads, "float32"),
        "f64_gemm": _gemm(threads, "float64"),
        "int8_gemm": _gemm(threads, "int8"),
    }


if __name__ == "__main__":  # in a process of its own: threads are set by the environment before the first import
    import threadpoolctl

    found = limits(int(sys.argv[1]))
    libraries = [
        {k: info.get(k) for k in ("prefix", "version", "architecture", "num_threads")}
        for info in threadpoolctl.threadpool_info()
    ]
    print(json.dumps({"limits": found, "libraries": libraries}))
