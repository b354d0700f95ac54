"""Latents of the training side: encoded once, cached, standardised per channel.

Mean and deviation of the posterior are stored, never one draw of it: a draw would be an error floor under the denoiser. The
statistics run over the whole training side. Shifted copies (views) stand beside each volume.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import seeding
from engine.atomic import atomic_path
from engine.errors import CorruptRun
from engine.imaging.autoencoder import Autoencoder
from engine.imaging.config import ImagingConfig
from engine.imaging.dataset import Scans, shifted
from engine.provenance import sha256


@dataclass(frozen=True)
class Latents:
    """Posterior mean and deviation of every training volume in every view, and the statistics that standardise them.

    Attributes:
        mean_vbcdhw, deviation_vbcdhw: float32 (views, volumes, channels, d, h, w).
        mean_c, deviation_c: float32 (channels,), of draws from the posteriors over the training side.
        digest: SHA-256 of the cache file.
    """

    mean_vbcdhw: Tensor
    deviation_vbcdhw: Tensor
    mean_c: Tensor
    deviation_c: Tensor
    digest: str

    def standardise(self, z_bcdhw: Tensor) -> Tensor:
        """Latents with mean 0 and deviation 1 per channel."""
        return (z_bcdhw - self.mean_c.view(1, -1, 1, 1, 1)) / self.deviation_c.view(1, -1, 1, 1, 1)


def cached_latents(
    config: ImagingConfig,
    autoencoder: Autoencoder,
    scans: Scans,
    path: Path,
    wanted: str | None,
    accelerator: Accelerator,
) -> Latents:
    """Latents from the cache file `path`, encoded first (by the main process) where there is none of this autoencoder.

    Args:
        wanted: SHA-256 of the file a checkpoint was trained on; None before the first step.

    Raises:
        CorruptRun: the file is another one than the checkpoint was trained on.
    """
    if accelerator.is_main_process and (wanted is None or not path.is_file()):
        with atomic_path(path) as partial:
            save_file(_encode(config, autoencoder, scans, accelerator.device), partial)
    accelerator.wait_for_everyone()
    digest = sha256(path)
    if wanted is not None and digest != wanted:
        hint = "remove the file; where the same autoencoder does not give it again, train again"
        raise CorruptRun("the latents this checkpoint was trained on", "others", path, hint)
    tensors = load_file(path)
    return Latents(tensors["mean"], tensors["deviation"], tensors["mean_c"], tensors["deviation_c"], digest)


@torch.no_grad()
def _encode(config: ImagingConfig, autoencoder: Autoencoder, scans: Scans, device: torch.device) -> dict[str, Tensor]:
    """View 0 is the volume itself; the others are shifted copies, drawn per (volume, view)."""
    autoencoder.eval()
    means, deviations = [], []
    for view in range(config.flow.views):
        for index in range(len(scans.x_bcdhw)):
            offset = random_shift(
                config.seed, index * config.flow.views + view, config.flow.shift_voxels if view else 0, "view"
            )
            x = torch.from_numpy(np.array(shifted(scans.x_bcdhw[index], offset)))[None].to(device)
            mean, deviation = autoencoder.encode(x)
            means.append(mean.cpu())
            deviations.append(deviation.cpu())
    autoencoder.train()
    shape = (config.flow.views, len(scans.x_bcdhw), *means[0].shape[1:])
    mean_z, deviation_z = torch.cat(means).view(shape), torch.cat(deviations).view(shape)
    mean_c = mean_z.mean(dim=(0, 1, 3, 4, 5))
    centred = (mean_z - mean_c.view(1, 1, -1, 1, 1, 1)).square() + deviation_z.square()
    return {
        "mean": mean_z,
        "deviation": deviation_z,
        "mean_c": mean_c,
        "deviation_c": centred.mean(dim=(0, 1, 3, 4, 5)).sqrt(),
    }


def random_shift(seed: int, index: int, most: int, purpose: str = "shift") -> tuple[int, ...]:
    """A whole-voxel shift per axis, each uniform on -most .. most."""
    return tuple(int(o) for o in seeding.generator(seed, f"imaging.{purpose}", index).integers(-most, most + 1, size=3))
