"""The moving average: its definition, its round trip, and that applying it is undone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.errors import CorruptRun
from engine.training.ema import Ema


def walk(model: nn.Linear, ema: Ema, steps: int) -> None:
    for _ in range(steps):
        with torch.no_grad():
            model.weight += 1.0
        ema.update(model)


def test_average_follows_its_definition():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = Ema(model, decay=0.5)
    expected, value = 0.0, 0.0
    for step in range(1, 30):
        walk(model, ema, 1)
        value += 1.0
        past = step - 1
        decay = 0.0 if past == 0 else min(0.5, (1 + past) / (10 + past))
        expected = decay * expected + (1 - decay) * value
    assert ema.tensors()["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_resumed_average_equals_the_straight_one():
    torch.manual_seed(0)
    one = nn.Linear(2, 2)
    two = nn.Linear(2, 2)
    two.load_state_dict(one.state_dict())
    straight = Ema(one, 0.9)
    walk(one, straight, 6)
    first = Ema(two, 0.9)
    walk(two, first, 3)
    second = Ema(two, 0.9)
    second.load({k: t.clone() for k, t in first.tensors().items()}, first.steps)
    walk(two, second, 3)
    for name, tensor in straight.tensors().items():
        assert torch.equal(tensor, second.tensors()[name])


def test_applied_is_undone():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = Ema(model, 0.99)
    walk(model, ema, 4)
    with ema.applied(model):
        assert model.weight.item() != 4.0
    assert model.weight.item() == 4.0


def test_other_parameters_are_refused():
    with pytest.raises(CorruptRun, match="bias"):
        Ema(nn.Linear(1, 1), 0.9).load({"weight": torch.zeros(1, 1)}, 1)
