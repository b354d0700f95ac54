"""Exponential moving average of a model's parameters: diffusers' `EMAModel` behind names, so that it can be saved
strictly.

The decay warms up as min(decay, (1 + step) / (10 + step)), so that a short run is not averaged with its own start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from engine.errors import CorruptRun


class Ema:
    """Average of the parameters of `model`; buffers are not averaged."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.average = EMAModel(model.parameters(), decay=decay, use_ema_warmup=False, foreach=True)

    def update(self, model: nn.Module) -> None:
        """Move the average towards the current parameters by one step."""
        self.average.step(model.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """Averaged parameters by name."""
        return dict(zip(self.names, self.average.shadow_params))

    @property
    def steps(self) -> int:
        """Updates so far; the warm-up depends on it."""
        return self.average.optimization_step

    def load(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Restore what `tensors` and `steps` gave.

        Raises:
            CorruptRun: the names differ.
        """
        if set(tensors) != set(self.names):
            odd = sorted(set(tensors) ^ set(self.names))[0]
            raise CorruptRun("an average over the same parameters", f"'{odd}' on one side only", "ema")
        for name, shadow in zip(self.names, self.average.shadow_params):
            shadow.copy_(tensors[name])
        self.average.optimization_step = steps

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` carries the averaged parameters."""
        self.average.store(model.parameters())
        self.average.copy_to(model.parameters())
        try:
            yield
        finally:
            self.average.restore(model.parameters())
