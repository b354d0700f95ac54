"""The velocity model that a config asks for: U-Net or transformer, one signature."""

from __future__ import annotations

from collections.abc import Sequence

from engine.imaging.config import ImagingConfig
from engine.imaging.dataset import Covariate
from engine.imaging.denoiser import Denoiser
from engine.imaging.dit import DiT

Velocity = Denoiser | DiT


def new_denoiser(config: ImagingConfig, covariates: Sequence[Covariate]) -> Velocity:
    """The network of `config.flow`, freshly initialised, for these covariates.

    Args:
        covariates: what the model is conditioned on, those of an earlier visit included (`context.known_covariates`).
    """
    network = DiT if config.flow.network == "dit" else Denoiser
    return network(
        config.flow,
        config.autoencoder.latent_channels,
        [len(c.levels) for c in covariates if c.kind == "categorical"],
        sum(c.kind == "continuous" for c in covariates),
        config.map_channels + config.baseline_channels,
        config.training.gradient_checkpointing,
    )
