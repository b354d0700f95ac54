"""The autoencoder: shapes, folding, losses by their definition, and that it learns."""

from __future__ import annotations

import pytest
import torch

from engine.imaging.autoencoder import (
    Autoencoder,
    depth_to_space,
    gradient_l1,
    kl_per_element,
    reconstruction_loss,
    space_to_depth,
)
from engine.imaging.config import AutoencoderConfig

SMALL = AutoencoderConfig(steps=1, widths=[8, 16], latent_channels=3)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_folding_is_undone_and_keeps_blocks_together(factor):
    x = torch.randn(2, 3, 8, 4, 12)
    folded = space_to_depth(x, factor)
    assert folded.shape == (2, 3 * factor**3, 8 // factor, 4 // factor, 12 // factor)
    assert torch.equal(depth_to_space(folded, factor), x)
    block = x[0, 1, :factor, :factor, :factor].flatten()
    assert torch.equal(folded[0, factor**3 : 2 * factor**3, 0, 0, 0], block)


@pytest.mark.parametrize(("patch", "widths", "factor"), [(1, [8], 1), (2, [8, 16], 4), (4, [8], 4), (2, [8, 8, 8], 8)])
def test_any_size_that_divides_comes_back(patch, widths, factor):
    config = AutoencoderConfig(steps=1, patch=patch, widths=widths, latent_channels=3)
    assert config.factor == factor
    x = torch.randn(1, 2, 2 * factor, 3 * factor, factor)
    model = Autoencoder(config, channels=2)
    mean, deviation = model.encode(x)
    assert mean.shape == deviation.shape == (1, 3, 2, 3, 1)
    assert (deviation > 0).all()
    assert model.decode(mean).shape == x.shape


def test_forward_adds_the_given_noise_scaled_by_the_posterior():
    model = Autoencoder(SMALL)
    x, noise = torch.randn(1, 1, 8, 8, 8), torch.randn(1, 3, 2, 2, 2)
    mean, deviation = model.encode(x)
    assert torch.equal(model(x, noise)[0], model.decode(mean + deviation * noise))


def test_kl_is_a_mean_per_element_and_zero_for_the_prior():
    zeros = torch.zeros(2, 3, 4, 4, 4)
    assert kl_per_element(zeros, zeros) == 0
    normal = torch.distributions.Normal(torch.tensor(0.7), torch.tensor(0.3))
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    small = kl_per_element(
        torch.full((1, 1, 2, 2, 2), 0.7), torch.full((1, 1, 2, 2, 2), 2 * torch.log(torch.tensor(0.3)))
    )
    large = kl_per_element(
        torch.full((4, 2, 8, 8, 8), 0.7), torch.full((4, 2, 8, 8, 8), 2 * torch.log(torch.tensor(0.3)))
    )
    assert small.item() == pytest.approx(expected.item(), rel=1e-5)
    assert large.item() == pytest.approx(small.item(), rel=1e-5)


def test_gradient_term_sees_blur_and_not_brightness():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 8, 8, 8)
    assert gradient_l1(x + 3.0, x).item() == pytest.approx(0.0, abs=1e-6)
    assert gradient_l1(torch.nn.functional.avg_pool3d(x, 3, 1, 1), x) > 0.5


def test_losses_of_a_perfect_output_are_zero():
    x = torch.randn(1, 1, 8, 8, 8)
    assert all(term == 0 for term in reconstruction_loss(SMALL, x, x).values())


def test_it_learns_one_volume():
    torch.manual_seed(0)
    model = Autoencoder(SMALL)
    x = torch.nn.functional.interpolate(torch.randn(1, 1, 4, 4, 4), size=(16, 16, 16), mode="trilinear").clamp(-1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        output, mean, log_variance = model(x, torch.zeros(1, 3, 4, 4, 4))
        loss = reconstruction_loss(SMALL, output, x)["l1"] + 1e-3 * kl_per_element(mean, log_variance)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
