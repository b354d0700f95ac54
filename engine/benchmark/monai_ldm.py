"""A latent diffusion model as MONAI's 3D tutorial builds it, trained by that recipe within a budget of time.

Networks, losses, schedules and learning rates are those of Project-MONAI/tutorials, generation/3d_ldm/3d_ldm_tutorial.ipynb
(Pinaya et al., "Brain imaging generation with latent diffusion models", 2022), with MONAI's own classes: AutoencoderKL with
an L1, KL and patch-adversarial loss, then a DiffusionModelUNet that predicts noise in its latents. What differs:
    epochs          the tutorial trains 100 and 150 epochs on a GPU; here each stage ends with its share of the budget, and
                    the adversary joins after a twentieth of the first, as it does after 5 of 100 epochs there.
    perceptual loss left out: its network needs downloaded weights.
    size            volumes are padded with air to what the networks halve evenly, and cut again.
    sampling        DDIM with 50 steps in place of DDPM with 1,000, which would take longer than the training; predicted
                    latents are not clipped to -1 .. 1, which scaled latents leave on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from monai.inferers import LatentDiffusionInferer
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet, PatchDiscriminator
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from torch.nn.functional import l1_loss, mse_loss

from engine import seeding
from engine.imaging.config import DataConfig
from engine.imaging.dataset import MR_TOP
from engine.imaging.volume import Volume

RECIPE = "MONAI tutorial generation/3d_ldm: AutoencoderKL and DiffusionModelUNet, 32/64/64, KL 1e-6, adversary 0.01, Adam 1e-4"
ADVERSARIAL_WEIGHT, KL_WEIGHT = 0.01, 1e-6
RATE = 1e-4  # of all three networks
TRAINING_TIMES, BETAS = 1000, (0.0015, 0.0195)


def train_and_sample(
    volumes: Sequence[Volume],
    grid: DataConfig,
    n: int,
    *,
    seed: int,
    used: Callable[[], float],
    autoencoder_share: float = 0.4,
    batch_size: int = 2,
    sampling_steps: int = 50,
    channels: Sequence[int] = (32, 64, 64),
    norm_groups: int = 16,
    head_channels: int = 64,
    discriminator_layers: int = 3,
) -> tuple[Iterator[Volume], str]:
    """Train on `volumes` (on the track's grid) and give an iterator over n synthetic ones.

    Args:
        used: share of the budget that is used by now; asked before every step.
        autoencoder_share: of the budget; the tutorial's epochs are 100 and 150.
        channels, norm_groups, head_channels, discriminator_layers: the tutorial's; smaller volumes need smaller ones.

    Returns:
        Volumes, each drawn when it is asked for, and what was done in words.
    """
    torch.manual_seed(seeding.derived_seed(seed, "benchmark.monai_ldm"))
    rng = seeding.generator(seed, "benchmark.monai_ldm.order")
    levels, batch = len(channels), min(batch_size, len(volumes))
    whole = [_scaled(volume, grid) for volume in volumes]
    size, padded = whole[0].shape[1:], _padding(whole[0].shape[1:], 4 ** (levels - 1))
    x_bcdhw = torch.from_numpy(np.stack([np.pad(x, ((0, 0), *padded)) for x in whole]))
    inside = tuple(slice(before, before + n) for (before, _), n in zip(padded, size, strict=True))
    attention = tuple(level == levels - 1 for level in range(levels))
    autoencoder = AutoencoderKL(
        spatial_dims=3, in_channels=1, out_channels=1, channels=tuple(channels), latent_channels=3, num_res_blocks=1,
        norm_num_groups=norm_groups, attention_levels=attention,
    )  # fmt: skip
    discriminator = PatchDiscriminator(
        spatial_dims=3, num_layers_d=discriminator_layers, channels=channels[0], in_channels=1
    )
    adversarial = PatchAdversarialLoss(criterion="least_squares")
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=RATE)
    judge_optimizer = torch.optim.Adam(discriminator.parameters(), lr=RATE)
    steps_first = 0
    while steps_first == 0 or used() < autoencoder_share:
        x = x_bcdhw[rng.choice(len(x_bcdhw), batch, replace=False)]
        output, mean, sigma = autoencoder(x)
        kl = 0.5 * (mean.square() + sigma.square() - torch.log(sigma.square()) - 1).flatten(1).sum(1).mean()
        loss = l1_loss(output, x) + KL_WEIGHT * kl
        joined = used() > 0.05 * autoencoder_share
        if joined:
            said = discriminator(output.contiguous())[-1]
            loss = loss + ADVERSARIAL_WEIGHT * adversarial(said, target_is_real=True, for_discriminator=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if joined:
            judge_optimizer.zero_grad()
            fake = adversarial(discriminator(output.detach())[-1], target_is_real=False, for_discriminator=True)
            real = adversarial(discriminator(x)[-1], target_is_real=True, for_discriminator=True)
            (ADVERSARIAL_WEIGHT * 0.5 * (fake + real)).backward()
            judge_optimizer.step()
        steps_first += 1

    autoencoder.eval()
    unet = DiffusionModelUNet(
        spatial_dims=3, in_channels=3, out_channels=3, num_res_blocks=1, channels=tuple(channels),
        attention_levels=tuple(level > 0 for level in range(levels)), norm_num_groups=min(32, channels[0]),
        num_head_channels=tuple(head_channels if level else 0 for level in range(levels)),
    )  # fmt: skip
    scheduler = DDPMScheduler(
        num_train_timesteps=TRAINING_TIMES, schedule="scaled_linear_beta", beta_start=BETAS[0], beta_end=BETAS[1]
    )
    with torch.no_grad():
        latent = autoencoder.encode_stage_2_inputs(x_bcdhw[:batch])
    scale = float(1 / latent.std())  # of one batch, as the tutorial has it
    inferer = LatentDiffusionInferer(scheduler, scale_factor=scale)
    optimizer = torch.optim.Adam(unet.parameters(), lr=RATE)
    steps_second = 0
    while steps_second == 0 or used() < 1.0:
        x = x_bcdhw[rng.choice(len(x_bcdhw), batch, replace=False)]
        noise = torch.randn((len(x), *latent.shape[1:]))
        times = torch.randint(0, TRAINING_TIMES, (len(x),)).long()
        said = inferer(inputs=x, autoencoder_model=autoencoder, diffusion_model=unet, noise=noise, timesteps=times)
        loss = mse_loss(said.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps_second += 1
    unet.eval()

    sampler = DDIMScheduler(
        num_train_timesteps=TRAINING_TIMES,
        schedule="scaled_linear_beta",
        clip_sample=False,
        beta_start=BETAS[0],
        beta_end=BETAS[1],
    )
    sampler.set_timesteps(sampling_steps)

    def draw() -> Iterator[Volume]:
        for k in range(n):
            noise = seeding.normal((1, *latent.shape[1:]), seed, "benchmark.monai_ldm.noise", k)
            image = inferer.sample(
                input_noise=noise, autoencoder_model=autoencoder, diffusion_model=unet, scheduler=sampler, verbose=False
            )
            array_cdhw = image[0].numpy()[:, *inside]  # type: ignore[union-attr,index]
            yield replace(volumes[0], array_cdhw=_unscaled(array_cdhw, grid))

    said_in_words = (
        f"{steps_first} and {steps_second} steps of batch {batch}, DDIM {sampling_steps}, no perceptual loss"
    )
    return draw(), said_in_words


def _padding(size: Sequence[int], multiple: int) -> list[tuple[int, int]]:
    """Voxels to add before and behind each axis, so that each is a multiple."""
    missing = [-n % multiple for n in size]
    return [(k // 2, k - k // 2) for k in missing]


def _scaled(volume: Volume, grid: DataConfig) -> np.ndarray:
    """Intensities in 0 .. 1, as the tutorial scales them; float32 (1, d, h, w)."""
    low, high = grid.hu_range if grid.modality == "CT" else (0.0, MR_TOP)
    return ((volume.array_cdhw[:1] - low) / (high - low)).astype(np.float32)


def _unscaled(x_cdhw: np.ndarray, grid: DataConfig) -> np.ndarray:
    low, high = grid.hu_range if grid.modality == "CT" else (0.0, MR_TOP)
    return (np.clip(x_cdhw, 0.0, 1.0) * (high - low) + low).astype(np.float32)
