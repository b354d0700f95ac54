"""One case in this process: warm-up, then ours and every peer in turn, with times, peak memory and agreement.

Needs the standard library only, so that it costs the measured code nothing. Threads must have been set by the environment
before the first import (perf.child). What the figures mean is left to perf.record.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from perf.case import Case, Peer, Timed

_SHORT_SECONDS = 0.01  # shorter runs are repeated within one reading


@dataclass
class Readings:
    """Seconds of every run of one contestant and the peak memory above its inputs.

    status: "ok", "missing" (cannot be had here), "failed" (raised), "differs" (its result is not ours); `why` in one line.
    compared: whether the results were held against each other. note: how the time was taken, where not by the clock here.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    status: str = "ok"
    why: str = ""
    compared: bool = False
    note: str = ""


def clock(threads: int) -> float:
    """CPU seconds of this process and its ended children for one thread; wall seconds for more."""
    if threads > 1:
        return time.perf_counter()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def one_line(error: BaseException) -> str:
    """An exception as one line of at most 300 characters, absolute paths cut to their last part."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return re.sub(r"(?<![\w.])(?:/[\w.@+~-]+)+/([\w.@+~-]+)", r"\1", text)[:300]


class PeakMemory:
    """Highest resident memory since `start`, above what was resident then; exact where Linux can reset its mark."""

    _before: int | None = None

    def start(self) -> None:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # memory that the allocator kept would be used again unseen
            ctypes.CDLL(None).malloc_trim(0)
        try:
            with open("/proc/self/clear_refs", "w") as stream:
                stream.write("5")
            self._before = _status_bytes("VmRSS")
        except OSError:
            self._before = None
            self._mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def above_bytes(self) -> int:
        if self._before is None:
            return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._mark) * 1024
        return max(0, _status_bytes("VmHWM") - self._before)


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as stream:
        for line in stream:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"no {name}")


def timed(run: Callable[[Any], Any], inputs: Any, threads: int, times: int = 1) -> tuple[float, Any]:
    """Seconds of one of `times` runs in a row, and the last result; a Timed result is taken at its word."""
    begin = clock(threads)
    for _ in range(times - 1):
        run(inputs)
    result = run(inputs)
    seconds = (clock(threads) - begin) / times
    return (result.seconds, result) if isinstance(result, Timed) else (seconds, result)


def runs_in_a_row(seconds: float) -> int:
    """How many runs one reading takes, so that it is at least _SHORT_SECONDS long."""
    return max(1, math.ceil(_SHORT_SECONDS / max(seconds, 1e-6)))


@dataclass
class _Contestant:
    run: Callable[[Any], Any]
    inputs: Any
    readings: Readings
    times: int = 1
    timed_by_itself: bool = False

    def warm_up(self, threads: int) -> Any:
        """First run, which may compile: its result. A second one for its memory, and for how many runs make a reading."""
        first = self._with_memory(threads)
        self.timed_by_itself = isinstance(first[1], Timed)
        if self.timed_by_itself:
            return first[1].result
        self.readings.peak_bytes = 0
        self.times = runs_in_a_row(self._with_memory(threads)[0])
        return first[1]

    def read(self, threads: int) -> None:
        gc.collect()
        seconds, result = timed(self.run, self.inputs, threads, self.times)
        if self.timed_by_itself:
            self.readings.note = result.note
            self.readings.peak_bytes = max(self.readings.peak_bytes, result.peak_bytes)
        self.readings.seconds.append(seconds)

    def _with_memory(self, threads: int) -> tuple[float, Any]:
        """One run and the memory it took. Its seconds do not count: memory that was given back to the system before it must
        be paged in again, and so must that of the run after it.
        """
        memory = PeakMemory()
        memory.start()
        seconds, result = timed(self.run, self.inputs, threads)
        above = memory.above_bytes()
        if isinstance(result, Timed):
            above = result.peak_bytes or above
        self.readings.peak_bytes = max(self.readings.peak_bytes, above)
        return seconds, result


def measure(case: Case, *, peers: bool, repeats: int | None = None) -> tuple[Readings, list[Readings]]:
    """Run `case` `repeats` times (None: as the case says), alternating with its peers where wanted.

    Returns:
        readings of ours, and of each peer. A peer that is missing, fails or disagrees is a row that says so; one that
        disagrees is timed all the same.

    Raises:
        whatever the case itself raises.
    """
    inputs = case.prepare()
    ours = _Contestant(case.run, inputs, Readings("ours"))
    result = ours.warm_up(case.threads)
    rows: list[Readings] = []
    racing: list[_Contestant] = []
    for peer in case.peers if peers else ():
        row = Readings(peer.name)
        rows.append(row)
        contestant = _enter(peer, inputs, result, row, case.threads)
        if contestant is not None:
            racing.append(contestant)
    del result
    gc.disable()
    for _ in range(repeats or case.repeats):
        ours.read(case.threads)
        for contestant in list(racing):
            try:
                contestant.read(case.threads)
            except Exception as error:
                contestant.readings.status, contestant.readings.why = "failed", one_line(error)
                racing.remove(contestant)
    gc.enable()
    return ours.readings, rows


def _enter(peer: Peer, inputs: Any, result: Any, row: Readings, threads: int) -> _Contestant | None:
    """The peer, prepared, warmed up and compared with ours; None where it cannot run."""
    try:
        why = peer.missing() if peer.missing else None
        if why is not None:
            row.status, row.why = "missing", why
            return None
        contestant = _Contestant(peer.run, peer.prepare(inputs) if peer.prepare else inputs, row)
        theirs = contestant.warm_up(threads)
        if peer.same is not None:
            row.compared = True
            try:
                peer.same(result, theirs)
            except AssertionError as error:
                row.status, row.why = "differs", one_line(error)
        return contestant
    except Exception as error:
        row.status, row.why = "failed", one_line(error)
        return None
