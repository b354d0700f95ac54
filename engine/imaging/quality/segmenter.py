"""A 3D U-Net that learns label maps, and Dice: the judge of image and mask pairs, and what utility is measured with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import seeding
from engine.imaging.quality.config import SegmenterConfig
from engine.imaging.quality.features import cosine, descend, learned

_SHIFT = 3  # voxels
_CONTRAST = 0.25  # largest logarithm of the gamma
_NOISE = 0.03


def new_segmenter(count: int, config: SegmenterConfig) -> nn.Module:
    """An untrained U-Net (MONAI) from one channel to background and `count` labels."""
    from monai.networks.nets import UNet

    strides = (2,) * (len(config.widths) - 1)
    return UNet(3, 1, count + 1, tuple(config.widths), strides, num_res_units=1, norm="instance")


def segmenter(
    x_ndhw: np.ndarray,
    codes_ndhw: np.ndarray,
    count: int,
    config: SegmenterConfig,
    seed: int,
    device: torch.device,
    cache: Path | None = None,
) -> tuple[nn.Module, str]:
    """A U-Net trained on scans (float32 in 0 .. 1) and codes, and the SHA-256 of its weights."""
    network, sha256 = learned(
        "segmenter",
        new_segmenter(count, config),
        lambda: train_segmenter(x_ndhw, codes_ndhw, count, config, seed, device),
        [config.model_dump(mode="json"), count, seed],
        [x_ndhw, codes_ndhw],
        cache,
    )
    return network.to(device).eval(), sha256


def train_segmenter(
    x_ndhw: np.ndarray, codes_ndhw: np.ndarray, count: int, config: SegmenterConfig, seed: int, device: torch.device
) -> nn.Module:
    """Dice and cross-entropy in equal parts; scans are shifted, their contrast moved and a little noise added."""
    from monai.losses import DiceCELoss

    purpose = "imaging.quality.segmenter"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derived_seed(seed, purpose + ".weights"))
        network = new_segmenter(count, config).to(device).train()
    loss_of = DiceCELoss(softmax=True, to_onehot_y=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=1e-4)
    fold = _fold(config)
    for step in range(config.steps):
        x, codes = _batch(x_ndhw, codes_ndhw, config, seeding.generator(seed, purpose, step))
        loss = loss_of(network(_padded(x, fold).to(device)), _padded(codes, fold).to(device))
        descend(optimizer, loss, cosine(config, step))
    return network.eval()


@torch.no_grad()
def segment(network: nn.Module, x_ndhw: np.ndarray, config: SegmenterConfig) -> np.ndarray:
    """Codes of scans, uint8 (n, d, h, w); longer axes than the crops are worked through by MONAI's sliding window."""
    from monai.inferers.utils import sliding_window_inference

    device, fold, made = next(network.parameters()).device, _fold(config), []
    for array in x_ndhw:
        x = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None, None]
        size, padded = x.shape[2:], _padded(x, fold).to(device)
        if max(size) > config.crop:
            roi = [min(config.crop - config.crop % fold, n) for n in padded.shape[2:]]
            logits: Tensor = sliding_window_inference(padded, roi, 2, network, overlap=0.5, mode="gaussian")  # type: ignore[assignment]
        else:
            logits = network(padded)
        codes = logits[0, :, : size[0], : size[1], : size[2]].argmax(dim=0)
        made.append(codes.to(torch.uint8).cpu().numpy())
    return np.stack(made)


def dice(a_ndhw: np.ndarray, b_ndhw: np.ndarray, count: int) -> np.ndarray:
    """Dice of every label in every scan, float64 (n, count), 0 .. 1; NaN where neither side has the label."""
    found = np.full((len(a_ndhw), count), np.nan)
    for k in range(count):
        a, b = ((codes == k + 1).reshape(len(codes), -1) for codes in (a_ndhw, b_ndhw))
        both, either = (a & b).sum(axis=1), a.sum(axis=1) + b.sum(axis=1)
        found[:, k] = np.where(either > 0, 2.0 * both / np.maximum(either, 1), np.nan)
    return found


def _batch(
    x_ndhw: np.ndarray, codes_ndhw: np.ndarray, config: SegmenterConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Scans (b, 1, d, h, w) float32 and codes, moved alike by whole voxels; what comes into view repeats the border."""
    images, maps = [], []
    for k in rng.choice(len(x_ndhw), config.batch_size, replace=config.batch_size > len(x_ndhw)):
        size = tuple(min(config.crop, n) for n in x_ndhw.shape[1:])
        starts = [int(rng.integers(-_SHIFT, n - m + _SHIFT + 1)) for n, m in zip(x_ndhw.shape[1:], size)]
        index = np.ix_(*(np.clip(np.arange(s, s + m), 0, n - 1) for s, m, n in zip(starts, size, x_ndhw.shape[1:])))
        image = np.clip(x_ndhw[k][index], 0.0, 1.0) ** np.exp(rng.uniform(-_CONTRAST, _CONTRAST))
        image = image + rng.uniform(0.0, _NOISE) * rng.standard_normal(image.shape)
        images.append(image.astype(np.float32))
        maps.append(codes_ndhw[k][index])
    return torch.from_numpy(np.stack(images))[:, None], torch.from_numpy(np.stack(maps).astype(np.int64))[:, None]


def _fold(config: SegmenterConfig) -> int:
    return int(2 ** (len(config.widths) - 1))


def _padded(x_bcdhw: Tensor, fold: int) -> Tensor:
    """The border repeated up to multiples of `fold`."""
    missing = [-n % fold for n in x_bcdhw.shape[2:]]
    if not any(missing):
        return x_bcdhw
    padding = [p for m in reversed(missing) for p in (0, m)]
    return F.pad(x_bcdhw.float(), padding, mode="replicate").to(x_bcdhw.dtype)
