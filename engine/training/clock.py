"""Steps and time of one training stage over all its sittings, what ends it, and the learning rate that follows.

A stage has a budget in steps, in minutes, or both. In minutes the clock of one process counts; the loop makes all
ranks agree on it (`seconds`), so that they stop together and use one learning rate. Minutes are of the wall, or of the
processor: on a machine that is shared with other work only the second is the same amount of training twice.
"""

from __future__ import annotations

import math
import os
import time
from typing import Any, Literal, Protocol

LAST_RATE = 0.02  # the cosine schedule ends at this share of the learning rate


class Budget(Protocol):
    """What a clock needs of a config section."""

    steps: int | None
    max_minutes: float | None
    minutes_of: Literal["wall", "cpu"]
    learning_rate: float
    warmup_steps: int


def cpu_seconds() -> float:
    """Seconds that processors have worked for this process, all its threads, and the children it has waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


class Clock:
    """Steps and seconds of one stage, over all its sittings, and the learning rate that follows from them."""

    def __init__(self, budget: Budget, state: dict[str, Any]) -> None:
        self.budget = budget
        self._now = cpu_seconds if budget.minutes_of == "cpu" else time.monotonic
        self.step = self._first = int(state.get("stage_step", 0))
        self.bad_steps = int(state.get("bad_steps", 0))
        self._earlier, self._since = float(state.get("seconds", 0.0)), self._now()
        self.seconds = self._earlier  # as agreed by all ranks at the start of the step
        self.saved_step, self.saved_seconds = self.step, self._earlier

    def read(self) -> float:
        """Seconds now, on this process."""
        return self._earlier + self._now() - self._since

    def progress(self) -> float:
        """Share of the budget used, by the bound that is nearer."""
        shares = [0.0]
        if self.budget.steps:
            shares.append(self.step / self.budget.steps)
        if self.budget.max_minutes:
            shares.append(self.seconds / 60.0 / self.budget.max_minutes)
        return min(1.0, max(shares))

    def left(self) -> float:
        """Seconds left at the pace of this sitting, NaN before its first step; never more than the budget in minutes."""
        done = self.step - self._first
        bounds = []
        if self.budget.steps and done:
            bounds.append((self.budget.steps - self.step) * (self.read() - self._earlier) / done)
        if self.budget.max_minutes:
            bounds.append(60.0 * self.budget.max_minutes - self.read())
        return max(0.0, min(bounds)) if bounds else math.nan

    def bound(self) -> str:
        """Which bound has been reached: "steps", "minutes" or none ("")."""
        if self.budget.steps and self.step >= self.budget.steps:
            return "steps"
        return "minutes" if self.budget.max_minutes and self.seconds >= 60.0 * self.budget.max_minutes else ""

    def set_rate(self, optimizer: Any) -> float:
        """Linear warm-up times a cosine over the budget; sets and returns the learning rate."""
        warm = min(1.0, (self.step + 1) / max(1, self.budget.warmup_steps))
        cosine = LAST_RATE + (1.0 - LAST_RATE) * 0.5 * (1.0 + math.cos(math.pi * self.progress()))
        rate = self.budget.learning_rate * warm * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate

    def advance(self) -> None:
        """One step done."""
        self.step += 1
