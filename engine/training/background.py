"""One write at a time in a thread of its own, so that no rank waits for another's disk inside the training loop.

A checkpoint on a parallel file system takes minutes at scale; collectives time out meanwhile. The main process copies what
is to be written (`checkpoint.snapshot`), hands it over here, and goes on; what went wrong is told at the next look.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Background:
    """At most one piece of work under way; a second one waits for the first."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._work: Future[Any] | None = None

    def start(self, work: Callable[[], Any]) -> None:
        """Begin `work` when the one before it is done; raises what that one raised."""
        self.wait()
        self._work = self._pool.submit(work)

    @property
    def busy(self) -> bool:
        """Whether work is under way."""
        return self._work is not None and not self._work.done()

    @property
    def failed(self) -> bool:
        """Whether the last work raised; `wait` raises it."""
        return self._work is not None and self._work.done() and self._work.exception() is not None

    def wait(self) -> None:
        """Return when nothing is under way; raises what the last work raised, once."""
        work, self._work = self._work, None
        if work is not None:
            work.result()
