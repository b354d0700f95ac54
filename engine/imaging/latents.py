"""Latents of the training side: encoded once, cached, standardised per channel.

Mean and deviation of the posterior are stored, never one draw of it: a draw would be an error floor under the denoiser. The
statistics run over the whole training side. Moved copies (views) stand beside each volume.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.atomic import atomic_path, write_json
from engine.errors import CorruptRun
from engine.imaging import streamed
from engine.imaging.autoencoder import Autoencoder
from engine.imaging.config import ImagingConfig
from engine.imaging.dataset import Scans
from engine.imaging.moves import Move, random_move
from engine.provenance import sha256
from engine.training import staging
from engine.training.distributed import by_main


@dataclass(frozen=True)
class Latents:
    """Posterior mean and deviation of every training volume in every view, and the statistics that standardise them.

    Attributes:
        mean_g, deviation_g: per grid, float32 (views, volumes, channels, d, h, w).
        mean_c, deviation_c: float32 (channels,), of draws from the posteriors over the training side.
        digest: SHA-256 of the cache file.
    """

    mean_g: list[Tensor]
    deviation_g: list[Tensor]
    mean_c: Tensor
    deviation_c: Tensor
    digest: str

    def standardise(self, z_bcdhw: Tensor) -> Tensor:
        """Latents with mean 0 and deviation 1 per channel."""
        return (z_bcdhw - self.mean_c.view(1, -1, 1, 1, 1)) / self.deviation_c.view(1, -1, 1, 1, 1)


def cached_latents(
    config: ImagingConfig,
    autoencoder: Autoencoder,
    scans_g: Sequence[Scans],
    path: Path,
    wanted: str | None,
    accelerator: Accelerator,
    scratch: str | Path | None = None,
) -> Latents:
    """Latents from the cache file `path`, encoded first (by the main process) where there is none of this autoencoder.

    Args:
        wanted: SHA-256 of the file a checkpoint was trained on; None before the first step.
        scratch: a folder of this node; the file is copied there, once per node, and read from there.

    Raises:
        CorruptRun: the file is another one than the checkpoint was trained on.
    """

    def encode() -> None:
        if wanted is None or not path.is_file():
            with atomic_path(path) as partial:
                save_file(encode_scans(config, autoencoder, scans_g, accelerator.device), partial)
        if scratch is not None:
            write_json(table, staging.chunks_of(path))

    table = path.with_suffix(".json")
    by_main(accelerator, encode)
    if scratch is not None:
        path = staging.stage(path, json.loads(table.read_text(encoding="utf-8")), scratch)
    digest = sha256(path)
    if wanted is not None and digest != wanted:
        hint = "remove the file; where the same autoencoder does not give it again, train again"
        raise CorruptRun("the latents this checkpoint was trained on", "others", path, hint)
    tensors = load_file(path)
    means, deviations = (
        [tensors[f"{name}{_suffix(g)}"] for g in range(len(scans_g))] for name in ("mean", "deviation")
    )
    return Latents(means, deviations, tensors["mean_c"], tensors["deviation_c"], digest)


def _suffix(grid: int) -> str:
    return f"-{grid}" if grid else ""


@torch.no_grad()
def encode_scans(
    config: ImagingConfig, autoencoder: Autoencoder, scans_g: Sequence[Scans], device: torch.device
) -> dict[str, Tensor]:
    """View 0 is the volume itself; the others are moved copies, drawn per (volume, view). The statistics run over all
    grids, every latent position counting once."""
    autoencoder.eval()
    tensors: dict[str, Tensor] = {}
    for grid, scans in enumerate(scans_g):
        means, deviations = [], []
        for view in range(config.flow.views):
            for index in range(len(scans.x_bcdhw)):
                move = view_move(config, index, view)
                moved = move.of(scans.x_bcdhw[index], scans.spacing_mm[index], int(config.data.image_channels))
                x = torch.from_numpy(np.array(moved))[None].to(device)
                mean, deviation = encode_within(autoencoder, x, config.sampling.memory_gb)
                means.append(mean.cpu())
                deviations.append(deviation.cpu())
        shape = (config.flow.views, len(scans.x_bcdhw), *means[0].shape[1:])
        # a convolution may leave channels last in memory, and cat keeps that; safetensors refuses it
        tensors[f"mean{_suffix(grid)}"] = torch.cat(means).contiguous().view(shape)
        tensors[f"deviation{_suffix(grid)}"] = torch.cat(deviations).contiguous().view(shape)
    autoencoder.train()
    found = [(tensors[f"mean{_suffix(g)}"], tensors[f"deviation{_suffix(g)}"]) for g in range(len(scans_g))]
    if len(found) == 1:
        mean_c = found[0][0].mean(dim=(0, 1, 3, 4, 5))
    else:
        mean_c = torch.cat([m.transpose(2, 0).flatten(1) for m, _ in found], dim=1).mean(dim=1)
    everything, variance_c = sum(mean.numel() for mean, _ in found), torch.zeros_like(mean_c)
    for mean, deviation in found:
        centred = (mean - mean_c.view(1, 1, -1, 1, 1, 1)).square() + deviation.square()
        variance_c += mean.numel() / everything * centred.mean(dim=(0, 1, 3, 4, 5))
    return {**tensors, "mean_c": mean_c, "deviation_c": variance_c.sqrt()}


def encode_within(autoencoder: Autoencoder, x_bcdhw: Tensor, memory_gb: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latent: of the whole volume at once, or in a stream of planes where that would take more
    than `memory_gb`."""
    steps = streamed.steps_of(autoencoder.encoder)
    if streamed.whole_bytes(steps, x_bcdhw.shape) <= memory_gb * 1e9:
        return autoencoder.encode(x_bcdhw)
    return streamed.encode(autoencoder, x_bcdhw, budget_bytes=int(memory_gb * 1e9))


def view_move(config: ImagingConfig, index: int, view: int) -> Move:
    """How view `view` of volume `index` is moved; view 0 is the volume itself."""
    flow = config.flow
    if not view:
        return Move((0, 0, 0))
    at = index * flow.views + view
    return random_move(config.seed, at, flow.shift_voxels, flow.turn_degrees, flow.bend_mm, "view")
