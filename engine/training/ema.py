"""Exponential moving average of a model's parameters: diffusers' `EMAModel` behind names, so that it can be saved
strictly.

The decay warms up as min(decay, (1 + step) / (10 + step)), so that a short run is not averaged with its own start. Of a sharded
model every process averages its own part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from engine.errors import CorruptRun
from engine.training.distributed import is_sharded, like


def _own(parameters: Iterable[Any]) -> list[Any]:
    """What this process holds of each parameter, in the same memory."""
    return [p.to_local() if is_sharded(p) else p for p in parameters]


class Ema:
    """Average of the parameters of `model`; buffers are not averaged."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        # imports take seconds, which a site that is set up anew for each message would pay each time
        from diffusers.training_utils import EMAModel

        self.names = [name for name, _ in model.named_parameters()]
        self.model = model
        self.average = EMAModel(_own(model.parameters()), decay=decay, use_ema_warmup=False, foreach=True)

    def update(self, model: nn.Module) -> None:
        """Move the average towards the current parameters by one step."""
        self.average.step(_own(model.parameters()))

    def tensors(self) -> dict[str, Tensor]:
        """Averaged parameters by name; sharded where the model is."""
        found: dict[str, Tensor] = {}
        own: Any
        for name, own, shadow in zip(self.names, self.model.parameters(), self.average.shadow_params):
            if is_sharded(own):
                from torch.distributed.tensor import DTensor

                place = own.device_mesh, own.placements
                shadow = DTensor.from_local(shadow, *place, run_check=False, shape=own.shape, stride=own.stride())
            found[name] = shadow
        return found

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
        for name, own, shadow in zip(self.names, self.model.parameters(), self.average.shadow_params):
            shadow.copy_(_own([like(tensors[name], own)])[0])
        self.average.optimization_step = steps

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` carries the averaged parameters."""
        self.average.store(_own(model.parameters()))
        self.average.copy_to(_own(model.parameters()))
        try:
            yield
        finally:
            self.average.restore(_own(model.parameters()))
