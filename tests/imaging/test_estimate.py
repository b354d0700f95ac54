"""What a config takes: counted on the meta device, held against hand counts and real tensors; the shipped configs build."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from engine.errors import UsageError
from engine.imaging import estimate as module
from engine.imaging.autoencoder import Autoencoder
from engine.imaging.config import apply_overrides, load_config, parse_config
from engine.imaging.estimate import autoencoder_step, decoding, estimate, flow_step, sampling_flop
from engine.imaging.velocity import new_denoiser

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "imaging").glob("*.yaml"))


def changed(config, *overrides):
    return parse_config(apply_overrides(config.model_dump(), overrides))


@pytest.mark.parametrize("path", [p for p in CONFIGS if not p.stem.startswith("evaluate")], ids=lambda p: p.stem)
def test_every_shipped_config_builds_without_memory_and_says_what_it_takes(path):
    config = load_config(path)
    said = estimate(config, tflops=100.0, processes=8 if path.stem.startswith("ct512") else 1)
    for stage in ("autoencoder", "flow"):
        assert said[stage]["parameters"] > 1e6
        assert 0 < said[stage]["memory_gb"] < 60  # a GPU of 80 GB with a quarter left free
        assert said[stage]["steps"] > 0
    budget = config.sampling.memory_gb
    assert min(said["sample"]["decode"]["whole_gb"], said["sample"]["decode"].get("streamed_gb", 1e9)) <= budget
    if path.stem == "ct512_gpu":
        assert said["latent"] == [4, 128, 128, 128]
        assert said["sample"]["decode"]["streamed"] is True
    if path.stem == "mr192_gpu":
        assert said["latent"] == [8, 48, 48, 48]


def test_arithmetic_is_that_of_the_convolutions_by_hand():
    """One convolution 2 -> 3 of 3x3x3 over 5x6x7: 2 * 27 * 2 * 3 * 210 forward, and as much for the weights."""
    with torch.device("meta"):
        layer, x = nn.Conv3d(2, 3, 3, padding=1), torch.empty(1, 2, 5, 6, 7)
    forward = 2 * 27 * 2 * 3 * 210
    assert module._flop(lambda: layer(x)) == forward
    cost = module._cost(layer, lambda: layer(x).mean(), False, averaged=True, repeats=3)
    assert cost.flop == 3 * 2 * forward  # nobody asks for the gradient of x
    assert cost.parameters == 27 * 6 + 3
    assert cost.state_bytes == 20 * cost.parameters
    assert cost.activation_bytes == 4 * x.numel()


def test_the_counted_activations_are_those_of_real_tensors(tiny_config):
    """The same sum over a real network's saved tensors, weights left out, each storage once."""
    model = Autoencoder(tiny_config.autoencoder)
    weights, kept = {p.data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel() * 4
        return tensor

    x, noise = torch.randn(2, 1, 16, 16, 16), torch.randn(2, 2, 4, 4, 4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, mean, log_variance = model(x, noise)
        ((output - x).abs().mean() + mean.mean() + log_variance.mean()).backward()
    counted = autoencoder_step(tiny_config, bf16=False)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert counted.activation_bytes == pytest.approx(sum(kept.values()), rel=0.1)
    assert autoencoder_step(tiny_config, bf16=True).activation_bytes == counted.activation_bytes // 2


def test_recomputation_takes_less_memory_and_more_arithmetic(tiny_config):
    plain, recomputed = (
        flow_step(changed(tiny_config, f"training.gradient_checkpointing={on}"), False) for on in ("false", "true")
    )
    assert recomputed.activation_bytes < 0.8 * plain.activation_bytes
    assert 1.1 * plain.flop < recomputed.flop < 1.5 * plain.flop
    assert plain.parameters == sum(
        p.numel() for p in new_denoiser(tiny_config, module._covariates(tiny_config)).parameters()
    )


def test_shares_accumulation_and_sharding_divide_what_one_device_holds(tiny_config):
    whole = flow_step(changed(tiny_config, "flow.batch_size=8"), False)
    half = flow_step(changed(tiny_config, "flow.batch_size=8"), False, processes=2)
    parts = flow_step(changed(tiny_config, "flow.batch_size=8", "training.accumulate=4"), False)
    sharded = flow_step(changed(tiny_config, "flow.batch_size=8", "training.parallel=fsdp"), False, processes=2)
    assert half.activation_bytes < 0.6 * whole.activation_bytes
    assert half.flop == pytest.approx(whole.flop / 2, rel=0.1)
    assert parts.flop == pytest.approx(whole.flop, rel=0.1)
    assert parts.activation_bytes < 0.4 * whole.activation_bytes
    assert sharded.state_bytes == half.state_bytes // 2


def test_sampling_counts_calls_and_guidance(tiny_config):
    euler = sampling_flop(changed(tiny_config, "sampling.method=euler", "sampling.steps=10"))
    heun = sampling_flop(changed(tiny_config, "sampling.method=heun", "sampling.steps=10"))
    guided = sampling_flop(changed(tiny_config, "sampling.method=euler", "sampling.steps=10", "sampling.guidance=2"))
    assert heun[0] == euler[0] * 19 // 10  # the last step of Heun is Euler's
    assert guided[0] == 2 * euler[0]
    assert euler[1] == heun[1] > 0


def test_decoding_says_whether_it_is_streamed(tiny_config):
    assert decoding(tiny_config)["streamed"] is False
    large = changed(tiny_config, "data.size=[128,128,128]", "sampling.memory_gb=0.05")
    found = decoding(large)
    assert found["streamed"] is True
    assert found["streamed_gb"] <= 0.05 < found["whole_gb"]


def test_minutes_bound_the_steps(tiny_config):
    said = estimate(changed(tiny_config, "flow.max_minutes=1e-6"), tflops=1e-3)
    assert said["flow"]["steps"] < tiny_config.flow.steps
    for tflops, processes in ((0.0, 1), (float("nan"), 1), (1.0, 0)):
        with pytest.raises(UsageError, match="positive"):
            estimate(tiny_config, tflops, processes)
