"""Budgets in steps and minutes, and the learning rate that follows from them."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from engine.training.clock import LAST_RATE, Clock


def clock(steps=None, minutes=None, minutes_of="wall", **state) -> Clock:
    budget = SimpleNamespace(
        steps=steps, max_minutes=minutes, minutes_of=minutes_of, learning_rate=1.0, warmup_steps=10
    )
    return Clock(budget, state)


def test_either_bound_ends_a_stage_and_is_named():
    assert clock(steps=5, minutes=1.0, stage_step=5).bound() == "steps"
    assert clock(steps=5, minutes=1.0, stage_step=4, seconds=61.0).bound() == "minutes"
    assert clock(steps=5, minutes=1.0, stage_step=4, seconds=59.0).bound() == ""


def test_progress_is_that_of_the_nearer_bound():
    assert clock(steps=100, minutes=10.0, stage_step=20, seconds=300.0).progress() == pytest.approx(0.5)
    assert clock(steps=100, minutes=10.0, stage_step=80, seconds=300.0).progress() == pytest.approx(0.8)


def test_rate_warms_up_and_ends_low():
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
    assert clock(steps=100).set_rate(optimizer) == pytest.approx(0.1)
    assert clock(steps=100, stage_step=100).set_rate(optimizer) == pytest.approx(LAST_RATE)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LAST_RATE)


def test_seconds_of_earlier_sittings_count():
    assert 50.0 <= clock(minutes=1.0, seconds=50.0).read() < 55.0


def test_a_budget_of_the_processor_does_not_count_waiting():
    waited, worked = clock(minutes=1.0, minutes_of="wall"), clock(minutes=1.0, minutes_of="cpu", seconds=50.0)
    time.sleep(0.3)
    assert waited.read() > 0.29
    assert 50.0 <= worked.read() < 50.2
    begun = time.process_time()
    while time.process_time() - begun < 0.1:
        pass
    assert worked.read() >= 50.08  # the system counts in hundredths
