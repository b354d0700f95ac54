"""The velocity model: any size, each covariate counts, a missing one does not poison, dropping equals not giving."""

from __future__ import annotations

import math

import pytest
import torch

from engine.errors import Unsupported
from engine.imaging.config import FlowConfig
from engine.imaging.denoiser import Attention, Condition, Denoiser, sinusoids


def config(**more) -> FlowConfig:
    return FlowConfig.model_validate(
        {"steps": 1, "widths": [8, 16], "attention_levels": [1], "embedding_width": 16, **more}
    )


def woken(model: Denoiser) -> Denoiser:
    """The model with its zero-initialised layers filled, so that every input can reach the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def given(b=2, age=0.5, sex=1) -> Condition:
    return Condition(torch.zeros(b, 3), torch.full((b, 1), age), torch.full((b, 1), sex))


@pytest.fixture(scope="module")
def model() -> Denoiser:
    torch.manual_seed(0)
    return woken(Denoiser(config(), 3, [2], 1)).eval()


@pytest.mark.parametrize("size", [(4, 4, 4), (9, 13, 9), (5, 2, 3)])
def test_any_latent_size(model, size):
    assert model(torch.randn(2, 3, *size), torch.rand(2), given()).shape == (2, 3, *size)


def test_everything_it_is_given_counts(model):
    x, t = torch.randn(2, 3, 4, 4, 4), torch.full((2,), 0.5)
    base = model(x, t, given())
    for other in (given(age=-1.0), given(sex=0), given(age=math.nan), given(sex=-1)):
        assert (model(x, t, other) - base).abs().max() > 1e-4
    assert (model(x, torch.full((2,), 0.6), given()) - base).abs().max() > 1e-4
    spaced = Condition(torch.ones(2, 3), given().continuous_bk, given().categorical_bk)
    assert (model(x, t, spaced) - base).abs().max() > 1e-4


def test_missing_covariates_leave_no_nan_in_values_or_gradients(model):
    x = torch.randn(2, 3, 4, 4, 4)
    mixed = Condition(torch.zeros(2, 3), torch.tensor([[0.5], [math.nan]]), torch.tensor([[-1], [1]]))
    model.zero_grad()
    output = model(x, torch.rand(2), mixed)
    assert torch.isfinite(output).all()
    output.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_unguided_is_the_same_as_giving_nothing(model):
    x, t = torch.randn(2, 3, 4, 4, 4), torch.rand(2)
    assert torch.equal(model(x, t, given().unguided()), model(x, t, given(age=math.nan, sex=-1)))


def test_samples_do_not_mix(model):
    x, t = torch.randn(2, 3, 4, 4, 4), torch.rand(2)
    changed = x.clone()
    changed[1] += 1.0
    assert torch.allclose(model(x, t, given())[0], model(changed, t, given())[0], atol=1e-5)


def test_no_covariates_at_all():
    model = Denoiser(config(), 3, [], 0)
    empty = Condition(torch.zeros(2, 3), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int64))
    assert model(torch.randn(2, 3, 4, 4, 4), torch.rand(2), empty).shape == (2, 3, 4, 4, 4)
    assert empty.unguided().continuous_bk.shape == (2, 0)


def test_attention_is_softmax_attention():
    torch.manual_seed(0)
    layer = Attention(16, head_channels=8)
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(1, 16, 2, 3, 2)
    tokens = layer.norm(x).flatten(2).transpose(1, 2)
    q, k, v = layer.qkv(tokens).chunk(3, dim=-1)
    heads = [slice(0, 8), slice(8, 16)]
    mixed = torch.cat(
        [torch.softmax(q[..., h] @ k[..., h].transpose(1, 2) / math.sqrt(8), -1) @ v[..., h] for h in heads], -1
    )
    expected = x + layer.out(mixed).transpose(1, 2).reshape(x.shape)
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_a_named_attention_backend_is_never_replaced():
    layer = Attention(16, head_channels=8, backend="xformers")
    with pytest.raises(Unsupported, match="xformers"):
        layer(torch.randn(1, 16, 2, 2, 2))


def test_xformers_is_called_where_it_can_be(monkeypatch):
    """The layout it expects is (b, n, heads, c): a stand-in with that contract must give PyTorch's numbers."""
    import sys
    import types

    from engine.imaging import denoiser

    called = []

    def memory_efficient_attention(q, k, v):
        called.append(q.shape)
        weights = torch.einsum("bnhc,bmhc->bhnm", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhnm,bmhc->bnhc", weights.softmax(-1), v)

    stand_in = types.ModuleType("xformers.ops")
    stand_in.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", stand_in)
    monkeypatch.setattr(denoiser.importlib.util, "find_spec", lambda name: object())

    class OnGpu(torch.Tensor):
        is_cuda = True

    q, k, v = torch.randn(3, 2, 7, 2, 8).unbind(0)
    by_torch = denoiser.attend(q, k, v, "sdpa")
    by_xformers = denoiser.attend(q.as_subclass(OnGpu), k, v, "auto")
    assert called == [(2, 7, 2, 8)]
    assert torch.allclose(by_torch, by_xformers.as_subclass(torch.Tensor), atol=1e-5)


def test_sinusoids_tell_close_times_apart():
    a, b = sinusoids(torch.tensor([0.500, 0.505]), 128)
    assert (a - b).norm() > 0.5
