"""The velocity model that a config asks for: U-Net or transformer, one signature."""

from __future__ import annotations

from collections.abc import Sequence

from engine.imaging.config import ImagingConfig
from engine.imaging.dataset import Covariate
from engine.imaging.denoiser import Denoiser
from engine.imaging.dit import DiT
from engine.imaging.linear_mean import Centred, LinearMean, columns_of

Velocity = Denoiser | DiT | Centred


def new_denoiser(config: ImagingConfig, covariates: Sequence[Covariate]) -> Velocity:
    """The network of `config.flow`, freshly initialised, for these covariates.

    Args:
        covariates: what the model is conditioned on, those of an earlier visit included (`context.known_covariates`).
    """
    levels, continuous = columns_of(covariates)
    network = (DiT if config.flow.network == "dit" else Denoiser)(
        config.flow,
        config.autoencoder.latent_channels,
        levels,
        continuous,
        config.map_channels + config.baseline_channels,
        config.training.gradient_checkpointing,
    )
    if not config.flow.linear_mean:
        return network
    times = 2 if config.flow.baseline else 1  # the covariates of now come first
    shape = (config.autoencoder.latent_channels, *(n // config.autoencoder.factor for n in config.data.size))
    now = levels[: len(levels) // times], continuous // times
    return Centred(network, LinearMean(*now, shape, config.flow.baseline, config.flow.components))
