"""A small 3D network that learns to tell the levels of a categorical covariate from a scan."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import seeding
from engine.imaging.quality.config import LearningConfig
from engine.imaging.quality.features import Encoder, at_most, cosine, descend

_SHIFT = 2
_SEEN = 64  # voxels per axis that the network is shown; longer axes are averaged down


class Classifier(nn.Module):
    """The encoder's description and one linear layer: logits (b, levels)."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.encoder = Encoder(3)
        self.head = nn.LazyLinear(levels)

    def forward(self, x_bcdhw: Tensor) -> Tensor:
        return self.head(self.encoder(x_bcdhw))


def train_classifier(
    x_ndhw: np.ndarray, level_n: np.ndarray, levels: int, config: LearningConfig, seed: int, device: torch.device
) -> nn.Module:
    """Cross-entropy on batches with all levels equally often, scans shifted by up to two voxels.

    Args:
        level_n: int, code of each scan's level.
    """
    x, purpose = _seen(x_ndhw), "imaging.quality.classifier"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derived_seed(seed, purpose + ".weights"))
        network = Classifier(levels)
        network(x[:1])  # the width of the description
        network = network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=1e-3)
    present = [np.flatnonzero(level_n == k) for k in range(levels) if (level_n == k).any()]
    for step in range(config.steps):
        rng = seeding.generator(seed, purpose, step)
        chosen = [int(rng.choice(present[k % len(present)])) for k in range(config.batch_size)]
        batch = torch.stack([_moved(x[k], rng) for k in chosen]).to(device)
        loss = F.cross_entropy(network(batch), torch.from_numpy(level_n[chosen].astype(np.int64)).to(device))
        descend(optimizer, loss, cosine(config, step))
    return network.eval()


@torch.no_grad()
def probabilities(network: nn.Module, x_ndhw: np.ndarray) -> np.ndarray:
    """Probability of every level, float64 (n, levels)."""
    device = next(network.parameters()).device
    rows = [network(x[None].to(device)).softmax(dim=1)[0].double().cpu().numpy() for x in _seen(x_ndhw)]
    return np.stack(rows)


def _seen(x_ndhw: np.ndarray) -> Tensor:
    return at_most(torch.from_numpy(np.ascontiguousarray(x_ndhw, dtype=np.float32))[:, None], _SEEN)


def _moved(x_cdhw: Tensor, rng: np.random.Generator) -> Tensor:
    for axis, by in enumerate(rng.integers(-_SHIFT, _SHIFT + 1, 3), start=1):
        index = (torch.arange(x_cdhw.shape[axis]) + int(by)).clamp(0, x_cdhw.shape[axis] - 1)
        x_cdhw = x_cdhw.index_select(axis, index)
    return x_cdhw
