"""The transformer behind the U-Net's signature: any size, every input counts, it learns, trains and samples; recomputation."""

from __future__ import annotations

import math

import pytest
import torch

from engine.errors import Unsupported
from engine.imaging.config import FlowConfig, apply_overrides, parse_config
from engine.imaging.denoiser import Condition, Denoiser
from engine.imaging.dit import DiT, positions
from engine.imaging.generate import load_model, sample
from engine.imaging.train import train
from engine.imaging.velocity import new_denoiser
from engine.training import checkpoint

NETWORKS = {
    "unet": (Denoiser, {"widths": [8, 16], "attention_levels": [1]}),
    "dit": (DiT, {"widths": [32], "depth": 2}),
}


def build(network: str, context: int = 0, recompute: bool = False, **more):
    """A network whose zero-initialised layers are filled, so that every input can reach the output."""
    kind, settings = NETWORKS[network]
    config = FlowConfig.model_validate({"steps": 1, "attention_levels": [], "embedding_width": 16, **settings, **more})
    torch.manual_seed(0)
    model = kind(config, 3, [2], 1, context, recompute)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def given(b=2, age=0.5, sex=1, context=None) -> Condition:
    return Condition(torch.zeros(b, 3), torch.full((b, 1), age), torch.full((b, 1), sex), context)


@pytest.fixture(scope="module")
def model() -> DiT:
    return build("dit")


@pytest.mark.parametrize("size", [(4, 4, 4), (5, 2, 3), (1, 7, 4)])
@pytest.mark.parametrize("patch", [1, 2, 3])
def test_any_latent_size_and_patch(size, patch):
    made = build("dit", patch=patch)(torch.randn(2, 3, *size), torch.rand(2), given())
    assert made.shape == (2, 3, *size)
    assert made.dtype == torch.float32


def test_everything_it_is_given_counts(model):
    x, t = torch.randn(2, 3, 4, 4, 4), torch.full((2,), 0.5)
    base = model(x, t, given())
    for other in (given(age=-1.0), given(sex=0), given(age=math.nan), given(sex=-1)):
        assert (model(x, t, other) - base).abs().max() > 1e-4
    assert (model(x, torch.full((2,), 0.6), given()) - base).abs().max() > 1e-4
    spaced = Condition(torch.ones(2, 3), given().continuous_bk, given().categorical_bk)
    assert (model(x, t, spaced) - base).abs().max() > 1e-4


def test_tokens_know_their_place_and_see_each_other(model):
    """Attention without places would turn a turned input into the turned output; and one voxel reaches the far corner."""
    x, t = torch.randn(1, 3, 8, 4, 4), torch.full((1,), 0.5)
    base = model(x, t, given(1))
    assert (model(x.roll(2, dims=2), t, given(1)) - base.roll(2, dims=2)).abs().max() > 1e-3
    changed = x.clone()
    changed[0, 0, 0, 0, 0] += 5.0
    assert (model(changed, t, given(1)) - base)[0, :, -1, -1, -1].abs().max() > 1e-5
    places = positions((3, 4, 5), torch.device("cpu"))
    assert places.shape == (60, 96)
    assert torch.unique(places, dim=0).shape[0] == 60


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_missing_covariates_leave_no_nan(network):
    model = build(network)
    mixed = Condition(torch.zeros(2, 3), torch.tensor([[0.5], [math.nan]]), torch.tensor([[-1], [1]]))
    output = model(torch.randn(2, 3, 4, 4, 4), torch.rand(2), mixed)
    output.square().mean().backward()
    assert torch.isfinite(output).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_context_channels_count_and_none_means_not_given(network):
    model = build(network, context=2)
    x, t, context = torch.randn(1, 3, 4, 4, 4), torch.full((1,), 0.5), torch.randn(1, 2, 4, 4, 4)
    without = model(x, t, given(1))
    assert torch.equal(without, model(x, t, given(1, context=torch.zeros_like(context))))
    assert (model(x, t, given(1, context=context)) - without).abs().max() > 1e-4


@pytest.mark.parametrize("network", ["unet", "dit"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputed_activations_give_the_same_gradients_and_are_not_kept(network, dropout):
    x, t = torch.randn(2, 3, 6, 6, 6), torch.rand(2)
    gradients, kept = [], []
    for recompute in (False, True):
        model = build(network, recompute=recompute, dropout=dropout).train()
        saved = [0]

        def keep(tensor, saved=saved):
            saved[0] += tensor.numel()
            return tensor

        torch.manual_seed(3)  # of dropout, whose mask has to be the same when activations are made again
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(x, t, given()).square().mean()
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        kept.append(saved[0])
    assert kept[1] < 0.7 * kept[0]
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_a_named_attention_backend_is_never_replaced(network):
    model = build(network, attention="xformers")
    with pytest.raises(Unsupported, match="xformers"):
        model(torch.randn(1, 3, 4, 4, 4), torch.rand(1), given(1))
    assert torch.equal(
        *(build(network, attention=a)(torch.ones(1, 3, 4, 4, 4), torch.ones(1), given(1)) for a in ("auto", "sdpa"))
    )


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_bf16_autocast_is_close_to_fp32_and_its_output_is_fp32(network):
    model = build(network)
    x, t = torch.randn(2, 3, 4, 4, 4), torch.rand(2)
    with torch.no_grad():
        single = model(x, t, given())
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(x, t, given())
    assert cast.dtype == torch.float32
    assert 0 < (cast - single).abs().max() < 0.1 * single.abs().max()


def test_it_learns_one_latent():
    """The velocity of one datum: the loss falls well below that of predicting the mean."""
    config = FlowConfig.model_validate(
        {"steps": 1, "widths": [32], "depth": 2, "attention_levels": [], "embedding_width": 32}
    )
    torch.manual_seed(0)
    model, x0 = DiT(config, 2, [], 0), torch.randn(1, 2, 4, 4, 4)
    empty = Condition(torch.zeros(8, 3), torch.zeros(8, 0), torch.zeros(8, 0, dtype=torch.int64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        noise, t = torch.randn(8, 2, 4, 4, 4), torch.rand(8)
        x = (1 - t.view(-1, 1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1, 1) * noise
        loss = (model(x, t, empty) - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.4 * sum(losses[:3]) / 3 * 20


def test_it_trains_resumes_its_weights_and_samples(tiny_config, table, tmp_path):
    overrides = ["flow.network=dit", "flow.widths=[32]", "flow.depth=2", "flow.attention_levels=[]",
                 "training.gradient_checkpointing=true"]  # fmt: skip
    config = parse_config(apply_overrides(tiny_config.model_dump(), overrides))
    train(config, table, tmp_path / "run")
    parts, state = checkpoint.load(tmp_path / "run")
    assert state["bad_steps"] == 0
    assert parts["denoiser"]["blocks.1.modulate.weight"].abs().max() > 0  # left its zeros: gradients reach every block
    model = load_model(tmp_path / "run", "cpu")
    assert isinstance(model.denoiser, DiT)
    a, b = (volume.array_cdhw for _, volume, _ in sample(model, 2, seed=1, covariates={"sex": "F"}))
    assert a.shape == (1, 16, 16, 16)
    assert (a != b).any()
    again = next(sample(model, 1, seed=1, start=1, covariates={"sex": "F"}))[1].array_cdhw
    assert again.tobytes() == b.tobytes()


def test_the_config_chooses_the_network(tiny_config):
    assert isinstance(new_denoiser(tiny_config, []), Denoiser)
    changed = parse_config(apply_overrides(tiny_config.model_dump(), ["flow.network=dit", "flow.attention_levels=[]"]))
    assert isinstance(new_denoiser(changed, []), DiT)
