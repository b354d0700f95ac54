"""Rectified flow: the steps sum to one, the sign, the samplers' order of accuracy."""

from __future__ import annotations

import math

import pytest
import torch

from engine.imaging.flow import (
    euler,
    flow_times,
    heun,
    interpolate,
    shift_times,
    training_times,
    velocity_target,
)


@pytest.mark.parametrize("steps", [1, 3, 10, 30, 77])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_times_fall_from_one_to_zero_and_their_steps_sum_to_one(steps, shift):
    times = flow_times(steps, shift)
    assert times.dtype == torch.float64
    assert times.shape == (steps + 1,)
    assert (times[0], times[-1]) == (1.0, 0.0)
    assert (times[:-1] > times[1:]).all()
    assert (times[:-1] - times[1:]).sum().item() == pytest.approx(1.0, abs=1e-12)


def test_shift_moves_times_towards_noise_in_sampling_and_training_alike():
    assert shift_times(torch.tensor(0.5), 3.0).item() == pytest.approx(0.75)
    assert (flow_times(4, 3.0)[1:-1] > flow_times(4)[1:-1]).all()
    assert training_times(torch.zeros(1), 3.0).item() == pytest.approx(0.75)


def test_no_steps_is_refused():
    with pytest.raises(ValueError, match="steps"):
        flow_times(0)


def test_velocity_is_the_derivative_of_the_path():
    x0, noise = torch.randn(2, 1, 2, 2, 2, dtype=torch.float64), torch.randn(2, 1, 2, 2, 2, dtype=torch.float64)
    t, h = torch.full((2,), 0.3, dtype=torch.float64), 1e-6
    slope = (interpolate(x0, noise, t + h) - interpolate(x0, noise, t - h)) / (2 * h)
    assert torch.allclose(slope, velocity_target(x0, noise), atol=1e-8)
    assert torch.equal(interpolate(x0, noise, torch.zeros(2, dtype=torch.float64)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(2, dtype=torch.float64)), noise)


@pytest.mark.parametrize("sampler", [euler, heun])
@pytest.mark.parametrize("steps", [1, 7])
def test_the_true_velocity_leads_back_to_the_data(sampler, steps):
    x0, noise = torch.randn(2, 1, 2, 2, 2), torch.randn(2, 1, 2, 2, 2)
    made = sampler(lambda x, t: velocity_target(x0, noise), noise, flow_times(steps, 2.0))
    assert torch.allclose(made, x0, atol=1e-5)


def test_heun_is_of_higher_order_than_euler():
    """dx/dt = x from t = 1 down to 0 multiplies by exp(-1)."""
    start = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)

    def error(sampler, steps):
        return abs(sampler(lambda x, t: x, start, flow_times(steps)).item() - math.exp(-1.0))

    assert error(euler, 20) / error(euler, 40) == pytest.approx(2.0, rel=0.1)
    # Heun's last step is Euler's, so its error falls as the square of that step
    assert error(heun, 20) / error(heun, 40) == pytest.approx(4.0, rel=0.2)
    assert error(heun, 20) < 0.2 * error(euler, 20)
