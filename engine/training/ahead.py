"""Batches made ahead of time: while the model works on one step, a thread draws and cuts the next ones.

A batch is a function of its step alone (every draw is named by the sample it is for), so that it is the same batch
whoever makes it and whenever. NumPy and PyTorch release the interpreter inside their loops, so one thread keeps a GPU
busy until a batch takes longer to make than to learn from; the log's `waited` says when that is so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class Ahead(Generic[Batch]):
    """`make(step)` of the steps to come, in the order 0, 1, 2, ... from the first one asked for.

    Args:
        make: step -> batch; called in one thread only, in rising order.
        depth: how many batches are ready or being made beyond the one asked for.

    Attributes:
        waited: seconds that `take` has waited so far.
    """

    def __init__(self, make: Callable[[int], Batch], depth: int = 2) -> None:
        self.make, self.depth, self.waited = make, depth, 0.0
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._coming: dict[int, Future[Batch]] = {}

    def take(self, step: int) -> Batch:
        """The batch of `step`; what `make` raised for it is raised here."""
        for wanted in range(step, step + self.depth + 1):
            if wanted not in self._coming:
                self._coming[wanted] = self._pool.submit(self.make, wanted)
        began = time.monotonic()
        batch = self._coming.pop(step).result()
        self.waited += time.monotonic() - began
        return batch

    def __enter__(self) -> Ahead[Batch]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
