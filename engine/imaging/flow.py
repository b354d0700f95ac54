"""Rectified flow: the straight path between a latent and noise, the times to walk it, and the walkers.

Conventions, stated once:  x_t = (1 - t) x0 + t noise,  velocity = d x_t / d t = noise - x0.  t = 1 is noise, t = 0 is
data, so sampling steps have negative length. (diffusers uses this sign; MONAI the opposite one.)

Everything here is a function of its arguments; there is no scheduler object.
Source: Liu et al. 2022 (rectified flow); Esser et al. 2024 (time shift by size, logit-normal times).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_bcdhw at time t, t_b) -> velocity_bcdhw, with conditioning and guidance already bound."""


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Times moved towards noise by `shift`: shift t / (1 + (shift - 1) t), as in Esser et al. 2024, eq. 23."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def flow_times(steps: int, shift: float = 1.0) -> Tensor:
    """Times of a sampler with `steps` steps: float64 (steps + 1,), falling from exactly 1 to exactly 0."""
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    return shift_times(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64), shift)


def training_times(normal_b: Tensor, shift: float = 1.0) -> Tensor:
    """Logit-normal training times in (0, 1) from standard normal draws (b,), with the sampler's own shift."""
    return shift_times(torch.sigmoid(normal_b), shift)


def interpolate(x0_bcdhw: Tensor, noise_bcdhw: Tensor, t_b: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise."""
    t = t_b.view(-1, 1, 1, 1, 1)
    return (1.0 - t) * x0_bcdhw + t * noise_bcdhw


def velocity_target(x0_bcdhw: Tensor, noise_bcdhw: Tensor) -> Tensor:
    """noise - x0, the derivative of `interpolate` with respect to t."""
    return noise_bcdhw - x0_bcdhw


def euler(velocity: Velocity, noise_bcdhw: Tensor, times: Tensor) -> Tensor:
    """Walk from noise to data with one velocity per step."""
    x = noise_bcdhw
    for here, there in zip(times[:-1].tolist(), times[1:].tolist()):
        x = x + (there - here) * velocity(x, torch.full((len(x),), here, device=x.device))
    return x


def heun(velocity: Velocity, noise_bcdhw: Tensor, times: Tensor) -> Tensor:
    """Walk with two velocities per step (trapezoid rule); the last step is Euler's, as t = 0 was never trained."""
    x = noise_bcdhw
    for here, there in zip(times[:-1].tolist(), times[1:].tolist()):
        first = velocity(x, torch.full((len(x),), here, device=x.device))
        ahead = x + (there - here) * first
        if there > 0.0:
            second = velocity(ahead, torch.full((len(x),), there, device=x.device))
            ahead = x + (there - here) * 0.5 * (first + second)
        x = ahead
    return x


SAMPLERS: dict[str, Callable[[Velocity, Tensor, Tensor], Tensor]] = {"euler": euler, "heun": heun}
