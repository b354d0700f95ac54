"""In- and outpainting in 3D: part of a scan is kept exactly, the rest is generated to fit.

Inside the walk from noise to data the latent cells that are wholly known are replaced, at every time, by the known latent
on the same path, and each step is taken several times with fresh noise in between, so that what is generated can adapt to
what is known (RePaint: Lugmayr et al., CVPR 2022, for the steps of rectified flow). At the end the known voxels are the
input's own, bit for bit; what the decoder makes of them where they meet the generated ones differs a little, and that
difference is carried into the generated side and fades out over a few voxels, so that no step shows.

Where the model's grid reaches beyond the scan, what lies outside is generated too. An input of another spacing is resampled
first, and what is kept is then the resampled scan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from engine import seeding
from engine.errors import Unsupported, UsageError
from engine.imaging import decoding
from engine.imaging.config import DataConfig
from engine.imaging.dataset import condition
from engine.imaging.field_of_view import check_field_of_view
from engine.imaging.flow import Velocity, flow_times
from engine.imaging.generate import Model, latent_statistics, velocity_of
from engine.imaging.latents import encode_within
from engine.imaging.volume import Volume, crop_or_pad, reorient, resample

_FADE_VOXELS = 2.0  # of the difference at the border, e-fold


@torch.no_grad()
def paint(
    model: Model,
    volume: Volume,
    region: Volume | None = None,
    *,
    n: int = 1,
    seed: int = 0,
    start: int = 0,
    covariates: Mapping[str, Any] | None = None,
    steps: int | None = None,
    resamples: int = 5,
    guidance: float | None = None,
    force: bool = False,
) -> Iterator[tuple[int, Volume, np.ndarray]]:
    """Yield (index, volume, generated) for the draws start .. start + n - 1; each is a function of (model, seed, index).

    Args:
        volume: one channel; brought to RAS and to the model's size about its centre.
        region: nonzero where voxels are to be generated, on the grid of `volume`. None: only what lies outside `volume`.
        resamples: times each step is taken.

    Yields:
        The volume on the model's grid, in the units of the input, and a boolean (d, h, w): True where it was generated;
        elsewhere its voxels are the input's.

    Raises:
        UsageError: nothing or everything would be generated, the grids differ, or the spacing was not trained.
        Unsupported: a model of label maps or pairs.
    """
    config, data = model.config, model.config.data
    if data.produce != "image":
        raise Unsupported("a model of images", f"one of {data.produce}s", "paint", "a run with data.produce: image")
    if resamples < 1:
        raise UsageError("at least one taking of each step", f"{resamples}", "resamples")
    known, outside = _on_grid(volume, region, data)
    check_field_of_view(config, model.facts, known.shape_dhw, known.spacing_mm, force=force)
    low, high = _range(known.array_cdhw[0][~outside], data)
    scaled = np.clip((known.array_cdhw - low) / (high - low), 0.0, 1.0) * 2.0 - 1.0
    nearest = ndimage.distance_transform_edt(outside, return_distances=False, return_indices=True)
    filled = scaled[:, *nearest]  # what the encoder sees in place of the unknown: the nearest known voxel
    z, _ = encode_within(model.autoencoder, _tensor(filled)[None].to(model.device), config.sampling.memory_gb)
    mean, deviation = latent_statistics(model)
    x0 = (z.to(model.device) - mean) / deviation
    unknown = torch.nn.functional.max_pool3d(_tensor(outside)[None, None], config.autoencoder.factor)
    kept = (unknown == 0).to(model.device)
    given = condition([dict(covariates or {})], np.array([known.spacing_mm]), model.covariates, "paint")
    guidance = config.sampling.guidance if guidance is None else guidance
    velocity = velocity_of(model, given.to(model.device), guidance)
    times = flow_times(config.sampling.steps if steps is None else steps, config.flow.time_shift)
    for index in range(start, start + n):
        latent = repaint(velocity, x0, kept, times, resamples, seed, index)
        made = decoding.decode(
            model.autoencoder, latent * deviation + mean, memory_gb=config.sampling.memory_gb,
            bf16=config.sampling.precision == "bf16",
        )[0, 0]  # fmt: skip
        made = joined(made, scaled[0], outside)
        array = np.where(outside, (np.clip(made, -1.0, 1.0) + 1.0) / 2.0 * (high - low) + low, known.array_cdhw[0])
        yield index, replace(known, array_cdhw=array[None].astype(np.float32), metadata={}), outside


def repaint(
    velocity: Velocity, x0_bcdhw: Tensor, kept_bcdhw: Tensor, times: Tensor, resamples: int, seed: int, index: int
) -> Tensor:
    """Euler's walk from noise to data with the cells `kept` held on the path to `x0`; there the result is x0 itself.

    Between two takings of a step the latent goes back from t' to t by x_t = a x_t' + b noise with a = (1 - t) / (1 - t')
    and b = sqrt(t^2 - (a t')^2), which is the path's own distribution of x_t given x_t'.
    """
    draw = seeding.generator(seed, "imaging.paint", index)
    shape, device = tuple(x0_bcdhw.shape), x0_bcdhw.device

    def noise() -> Tensor:
        return torch.from_numpy(draw.standard_normal(shape, dtype=np.float32)).to(device)

    x, path = noise(), noise()
    for here, there in zip(times[:-1].tolist(), times[1:].tolist()):
        for taken in range(resamples):
            x = torch.where(kept_bcdhw, (1.0 - here) * x0_bcdhw + here * path, x)
            ahead = x + (there - here) * velocity(x, torch.full((len(x),), here, device=device))
            if taken + 1 < resamples:
                a = (1.0 - here) / (1.0 - there)
                x = a * ahead + max(0.0, here**2 - (a * there) ** 2) ** 0.5 * noise()
                path = noise()
        x = ahead
    return torch.where(kept_bcdhw, x0_bcdhw, x)


def joined(made_dhw: np.ndarray, known_dhw: np.ndarray, outside_dhw: np.ndarray) -> np.ndarray:
    """The known voxels, and elsewhere `made` plus what it misses at the nearest known voxels, fading with the distance.

    What is missed is smoothed over the known side first, so that a voxel's noise is not drawn out into a streak.
    """
    inside = (~outside_dhw).astype(np.float32)
    weight = ndimage.gaussian_filter(inside, 1.0, mode="nearest")
    missed = ndimage.gaussian_filter((known_dhw - made_dhw) * inside, 1.0, mode="nearest") / np.maximum(weight, 1e-6)
    distance, nearest = ndimage.distance_transform_edt(outside_dhw, return_indices=True)
    carried = made_dhw + missed[tuple(nearest)] * np.exp(-(distance - 1.0) / _FADE_VOXELS)
    return np.where(outside_dhw, carried, known_dhw)


def _on_grid(volume: Volume, region: Volume | None, data: DataConfig) -> tuple[Volume, np.ndarray]:
    """The scan on the model's grid, and True where voxels are to be generated."""
    if len(volume.array_cdhw) != 1:
        raise UsageError("a scan of one channel", f"{len(volume.array_cdhw)}", "paint")
    if region is not None and (
        region.shape_dhw != volume.shape_dhw or not np.allclose(region.affine, volume.affine, atol=0.05)
    ):
        raise UsageError("a region on the grid of the scan", "another grid", "--region", "resample it to the scan")
    inside = np.ones((1, *volume.shape_dhw)) if region is None else region.array_cdhw[:1] == 0
    mask = replace(volume, array_cdhw=inside.astype(np.float32))
    fitted = []
    for one, order in ((volume, 1), (mask, 0)):
        one = reorient(one, "RAS")
        if data.spacing_mm is not None and not np.allclose(one.spacing_mm, data.spacing_mm, rtol=1e-3):
            one = resample(one, data.spacing_mm, order=order)
        fitted.append(crop_or_pad(one, data.size, fill=0.0))
    outside = fitted[1].array_cdhw[0] == 0
    if outside.all() or not outside.any():
        got = "everything" if outside.all() else "nothing"
        raise UsageError(
            "a part to keep and a part to generate", f"{got} to generate", "paint",
            "--region, or a scan smaller than the model's field of view",
        )  # fmt: skip
    return fitted[0], outside


def _range(values: np.ndarray, data: DataConfig) -> tuple[float, float]:
    """The intensities that become -1 and 1, from the known voxels."""
    if data.modality == "CT":
        return data.hu_range
    high = float(np.percentile(values, data.mr_percentile))
    return 0.0, high if high > 0 else 1.0


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
