"""The autoencoder: shapes, folding, losses by their definition, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch

from engine.imaging.autoencoder import (
    Autoencoder,
    depth_to_space,
    feature_distance,
    gradient_l1,
    kl_per_element,
    label_loss,
    reconstruction_loss,
    shown,
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


def test_layers_of_features_count_alike_whatever_their_size():
    near, far = torch.zeros(1, 2, 8, 8, 8), torch.zeros(1, 64, 2, 2, 2)
    assert feature_distance([near + 0.5, far - 0.25], [near, far]).item() == pytest.approx(0.375)
    assert feature_distance([near, far], [near, far]).item() == 0


def test_losses_of_a_perfect_output_are_zero():
    x = torch.randn(1, 1, 8, 8, 8)
    assert all(term == 0 for term in reconstruction_loss(SMALL, x, x).values())


def test_labels_beside_an_image_take_nothing_from_it():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 8, 8, 8), torch.randn(2, 3, 8, 8, 8).sign()
    made, alone = reconstruction_loss(SMALL, a, b, labels=2), reconstruction_loss(SMALL, a[:, :1], b[:, :1])
    assert all(torch.equal(made[name], alone[name]) for name in ("l1", "gradient"))
    masks = reconstruction_loss(SMALL, a[:, 1:], b[:, 1:], labels=2)
    assert (float(masks["l1"]), float(masks["gradient"])) == (0.0, 0.0)
    assert torch.equal(masks["labels"], made["labels"])


def test_label_loss_by_hand():
    target = torch.tensor([1.0, -1.0]).view(1, 1, 1, 1, 2)
    expected = math.log(2) + 1 - (2 * 0.5 + 1) / (1 + 1 + 1)
    assert float(label_loss(torch.zeros(1, 1, 1, 1, 2), target)) == pytest.approx(expected)
    assert float(label_loss(20 * target, target)) == pytest.approx(0.0, abs=1e-5)


def test_a_small_region_is_learned_and_not_left_out():
    """4 % of the voxels, as of a hippocampus: absolute errors are least with none of them."""
    torch.manual_seed(0)
    place = torch.stack(torch.meshgrid(*[torch.arange(16.0)] * 3, indexing="ij"))
    centres = torch.tensor([[5.0, 6, 6], [10, 8, 9], [7, 10, 8], [9, 5, 10]])
    near = torch.stack([((place - c.view(3, 1, 1, 1)).square().sum(0).sqrt() < 3.4) for c in centres])[:, None]
    assert 0.03 < near.float().mean() < 0.05
    x = torch.cat([0.5 * near.float(), 2.0 * near.float() - 1.0], dim=1)

    def dice(labels: int) -> float:
        torch.manual_seed(1)
        model = Autoencoder(SMALL, channels=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(60):
            output, _, _ = model(x, torch.zeros(4, 3, 4, 4, 4))
            terms = reconstruction_loss(SMALL, output, x, labels)
            optimizer.zero_grad()
            (terms["l1"] + terms["gradient"] + SMALL.label_weight * terms.get("labels", torch.zeros(()))).backward()
            optimizer.step()
        inside = model(x, torch.zeros(4, 3, 4, 4, 4))[0][:, 1:] > 0
        return float(2 * (inside & near).sum() / (inside.sum() + near.sum()))

    assert dice(0) < 0.5 < 0.8 < dice(1)


def test_the_discriminator_is_shown_labels_in_the_range_of_real_ones():
    x = torch.tensor([3.0, 30.0, -30.0]).view(1, 3, 1, 1, 1)
    assert shown(x, 2).flatten().tolist() == pytest.approx([3.0, 1.0, -1.0])
    assert shown(x, 0) is x


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
