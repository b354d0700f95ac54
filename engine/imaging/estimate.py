"""What a config will take before anything runs: parameters, arithmetic, memory of a training step, and of decoding.

Both networks are built on PyTorch's meta device, which has shapes and no data, and run there once: forward and backward of a
training step, and one call of the sampler. Arithmetic is counted operator by operator (`torch.utils.flop_counter`), activations
are what autograd keeps for the backward pass. Memory is that plus weights, gradients, AdamW's two moments and the average; a
library's workspace and the fragments between allocations are not in it, so leave a quarter of the device free. Time is
arithmetic over a rate that the caller states, since it depends on the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from engine.errors import UsageError
from engine.imaging import streamed
from engine.imaging.autoencoder import Autoencoder
from engine.imaging.config import ImagingConfig
from engine.imaging.context import known_covariates
from engine.imaging.dataset import Covariate
from engine.imaging.denoiser import Condition
from engine.imaging.velocity import new_denoiser

_STATE_BYTES = 16  # per parameter: weight, gradient and two moments of AdamW, float32
_AVERAGE_BYTES = 4


@dataclass(frozen=True)
class StepCost:
    """One training step of one stage, on one device.

    Attributes:
        parameters: of the network. flop: multiplications and additions of forward and backward.
        state_bytes: weights, gradients, moments and average. activation_bytes: what the backward pass keeps.
    """

    parameters: int
    flop: int
    state_bytes: int
    activation_bytes: int


def estimate(config: ImagingConfig, tflops: float, processes: int = 1) -> dict[str, Any]:
    """JSON-ready: what each stage and one sample take.

    Args:
        tflops: sustained 10^12 operations per second of one device in the config's precision; a measured figure.
        processes: devices that share a batch.

    Raises:
        UsageError: a rate or a number of devices that is not positive.
    """
    if not tflops > 0 or processes < 1:
        raise UsageError("a positive rate and at least one device", f"{tflops}, {processes}", "estimate")
    rate, bf16 = tflops * 1e12, config.training.precision != "fp32"
    first, second = autoencoder_step(config, bf16, processes), flow_step(config, bf16, processes)
    stages: dict[str, Any] = {}
    for name, budget, step in (("autoencoder", config.autoencoder, first), ("flow", config.flow, second)):
        seconds = step.flop / rate
        steps = budget.steps if budget.steps is not None else int((budget.max_minutes or 0) * 60 / seconds)
        if budget.steps is not None and budget.max_minutes is not None:
            steps = min(steps, int(budget.max_minutes * 60 / seconds))
        stages[name] = {
            "parameters": step.parameters,
            "tflop_per_step": round(step.flop / 1e12, 4),
            "memory_gb": round((step.state_bytes + step.activation_bytes) / 1e9, 3),
            "seconds_per_step": _short(seconds),
            "steps": steps,
            "hours": _short(steps * seconds / 3600),
        }
    walk, decode = sampling_flop(config)
    return {
        "name": config.name,
        "size": list(config.data.size),
        "latent": [config.autoencoder.latent_channels, *config.latent_size],
        "precision": "bf16" if bf16 else "fp32",
        "tflops": tflops,
        "processes": processes,
        **stages,
        "sample": {
            "walk_tflop": round(walk / 1e12, 3),
            "decode_tflop": round(decode / 1e12, 3),
            "seconds": _short((walk + decode) / rate),
            "decode": decoding(config),
        },
    }


def autoencoder_step(config: ImagingConfig, bf16: bool, processes: int = 1) -> StepCost:
    """A step of the first stage without its discriminator, which is small and joins late."""
    budget = config.autoencoder
    channels = _channels(config)
    share = _share(budget.batch_size, processes, config.training.accumulate)
    size = budget.crop_size or config.data.size
    with torch.device("meta"):
        network = Autoencoder(budget, channels)
        x = torch.empty(share, channels, *size)
        noise = torch.empty(share, budget.latent_channels, *(n // budget.factor for n in size))

    def loss() -> Tensor:
        output, mean, log_variance = network(x, noise)
        return (output - x).abs().mean() + mean.mean() + log_variance.mean()

    return _cost(network, loss, bf16, averaged=False, repeats=config.training.accumulate)


def flow_step(config: ImagingConfig, bf16: bool, processes: int = 1) -> StepCost:
    """A step of the second stage; with recomputation the forward pass counts twice and only the blocks' inputs are kept."""
    known = _covariates(config)
    share = _share(config.flow.batch_size, processes, config.training.accumulate)
    with torch.device("meta"):
        network = new_denoiser(config, known)
        x = torch.empty(share, config.autoencoder.latent_channels, *config.latent_size)
        wanted, t = _condition(config, known, share), torch.empty(share)
    parts = processes if config.training.parallel == "fsdp" else 1
    cost = _cost(network, lambda: network(x, t, wanted).square().mean(), bf16, True, config.training.accumulate)
    return StepCost(cost.parameters, cost.flop, cost.state_bytes // parts, cost.activation_bytes)


def sampling_flop(config: ImagingConfig) -> tuple[int, int]:
    """Arithmetic of one subject's walk and of its decoding."""
    known, settings = _covariates(config), config.sampling
    calls = settings.steps * (2 if settings.method == "heun" else 1) - (1 if settings.method == "heun" else 0)
    rows = 2 if settings.guidance != 1.0 and known else 1
    with torch.device("meta"):
        denoiser, autoencoder = new_denoiser(config, known).eval(), _autoencoder(config)
        z = torch.empty(1, config.autoencoder.latent_channels, *config.latent_size)
        x, wanted, t = z.expand(rows, -1, -1, -1, -1), _condition(config, known, rows), torch.empty(rows)
    with torch.no_grad():
        walk = calls * _flop(lambda: denoiser(x, t, wanted))
        return walk, _flop(lambda: autoencoder.decode(z))


def decoding(config: ImagingConfig) -> dict[str, Any]:
    """Whether one volume is decoded whole or in a stream of planes, and the memory beyond latent and volume, in GB."""
    with torch.device("meta"):
        autoencoder = _autoencoder(config)
    latent = (config.autoencoder.latent_channels, *config.latent_size)
    whole = streamed.whole_bytes(streamed.steps_of(autoencoder.decoder), (1, *latent))
    budget = int(config.sampling.memory_gb * 1e9)
    found: dict[str, Any] = {"whole_gb": round(whole / 1e9, 3), "streamed": whole > budget}
    if whole > budget:
        plan = streamed.decode_plan(autoencoder, latent, budget)
        found |= {"streamed_gb": round(plan.peak_bytes / 1e9, 3), "planes": plan.chunk, "maps_kept": len(plan.kept)}
    return found


def _autoencoder(config: ImagingConfig) -> Autoencoder:
    return Autoencoder(config.autoencoder, _channels(config)).eval()


def _channels(config: ImagingConfig) -> int:
    return int(config.data.image_channels) + config.label_channels


def _covariates(config: ImagingConfig) -> list[Covariate]:
    """The declared covariates; of a categorical one without levels the number is not known before the data: ten."""
    made = []
    for name, declared in config.data.covariates.items():
        levels = tuple(declared.levels or map(str, range(10))) if declared.kind == "categorical" else ()
        made.append(Covariate(name, declared.kind, levels=levels))
    return known_covariates(config, made)


def _condition(config: ImagingConfig, known: list[Covariate], rows: int) -> Condition:
    continuous = sum(c.kind == "continuous" for c in known)
    context = config.map_channels + config.baseline_channels
    return Condition(
        torch.empty(rows, 3),
        torch.empty(rows, continuous),
        torch.empty(rows, len(known) - continuous, dtype=torch.int64),
        torch.empty(rows, context, *config.latent_size) if context else None,
    )


def _share(batch: int, processes: int, accumulate: int) -> int:
    return -(-batch // (processes * accumulate))


def _cost(network: nn.Module, loss: Callable[[], Tensor], bf16: bool, averaged: bool, repeats: int) -> StepCost:
    own = {p.data_ptr() if p.device.type != "meta" else id(p) for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = max(kept.get(storage._cdata, 0), tensor.numel() * tensor.element_size())
        return tensor

    network.train()
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        value.backward()
    parameters = sum(p.numel() for p in network.parameters())
    state = parameters * (_STATE_BYTES + (_AVERAGE_BYTES if averaged else 0))
    activations = sum(kept.values()) // (2 if bf16 else 1)
    return StepCost(parameters, repeats * counter.get_total_flops(), state, activations)


def _flop(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def _short(value: float) -> float:
    return float(f"{value:.3g}")
