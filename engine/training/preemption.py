"""Preemption: SIGUSR1 and SIGTERM set a flag; the loop looks at it, writes a checkpoint and leaves with exit code 85.

The handler does nothing else, so that it is safe at any moment. In a distributed run the ranks agree on the flag
inside the loop (`engine.imaging.train`), because a signal reaches them at different steps. Code 85 means "whole,
unfinished, start me again with --resume"; a batch script requeues on it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from engine.errors import EngineError

EXIT_CODE = 85


class Preempted(EngineError):
    """The run stopped on request after writing a checkpoint. Exit code 85."""

    exit_code = EXIT_CODE


class Flag:
    """Whether a signal has asked the run to stop, and which."""

    def __init__(self) -> None:
        self.signal = ""

    def __bool__(self) -> bool:
        return bool(self.signal)

    def raise_(self, number: int, _frame: FrameType | None = None) -> None:
        """Signal handler."""
        self.signal = signal.Signals(number).name


@contextmanager
def watch() -> Iterator[Flag]:
    """Listen for SIGUSR1 and SIGTERM inside; the former handlers return afterwards.

    Outside the main thread Python allows no handlers; the flag then stays down.
    """
    flag = Flag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, flag.raise_) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
