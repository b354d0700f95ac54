"""A diffusion transformer as the second denoiser: patches of the noisy latent as tokens, modulated by the conditioning
vector, behind the signature of `denoiser.Denoiser`.

Positions enter as sines and cosines of a token's place in patches from the middle of the grid, so that any latent size
works; a size that the patch does not divide is padded and cut again. Every block is scaled, shifted and gated by time,
spacing and covariates, with gates that start at zero (adaLN-Zero). Source: Peebles and Xie, ICCV 2023.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.imaging.autoencoder import depth_to_space, space_to_depth
from engine.imaging.config import FlowConfig
from engine.imaging.denoiser import Condition, ConditionEmbedding, attend, recomputed, sinusoids, with_context


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer network, each scaled, shifted and gated by the conditioning vector."""

    def __init__(self, width: int, embedding: int, dropout: float, backend: str) -> None:
        super().__init__()
        head_channels = 64 if width >= 512 and width % 64 == 0 else 32
        self.heads, self.backend = max(1, width // head_channels), backend
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.modulate = nn.Linear(embedding, 6 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x_bnc: Tensor, embedding: Tensor) -> Tensor:
        b, n, c = x_bnc.shape
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulate(embedding)[:, None].chunk(6, dim=2)
        h = self.norm1(x_bnc) * (1.0 + scale1) + shift1
        q, k, v = self.qkv(h).view(b, n, 3, self.heads, c // self.heads).unbind(2)
        x_bnc = x_bnc + gate1 * self.out(attend(q, k, v, self.backend).reshape(b, n, c))
        return x_bnc + gate2 * self.network(self.norm2(x_bnc) * (1.0 + scale2) + shift2)


class DiT(nn.Module):
    """Velocity model: (x_bcdhw, t_b, condition) -> velocity_bcdhw float32; arguments as `denoiser.Denoiser`."""

    def __init__(
        self,
        config: FlowConfig,
        latent_channels: int,
        levels: list[int],
        continuous: int,
        context_channels: int = 0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        width, embedding = config.widths[0], config.embedding_width
        self.patch, self.recompute, self.context_channels = config.patch, recompute, context_channels
        self.embed = ConditionEmbedding(embedding, levels, continuous)
        self.first = nn.Linear((latent_channels + context_channels) * config.patch**3, width)
        self.place = nn.Linear(3 * 32, width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, embedding, config.dropout, config.attention) for _ in range(config.depth)
        )
        self.last_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.last_modulate = nn.Linear(embedding, 2 * width)
        self.last = nn.Linear(width, latent_channels * config.patch**3)
        for layer in (self.last_modulate, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_bcdhw: Tensor, t_b: Tensor, condition: Condition) -> Tensor:
        size = x_bcdhw.shape[2:]
        x_bcdhw = with_context(x_bcdhw, condition, self.context_channels)
        missing = [-n % self.patch for n in size]
        x_bcdhw = F.pad(x_bcdhw, [0, missing[2], 0, missing[1], 0, missing[0]])
        folded = space_to_depth(x_bcdhw, self.patch)
        grid = folded.shape[2:]
        embedding = self.embed(t_b, condition)
        h = self.first(folded.flatten(2).transpose(1, 2)) + self.place(positions(tuple(grid), folded.device))
        for block in self.blocks:
            h = recomputed(block, h, embedding) if self.recompute and self.training else block(h, embedding)
        scale, shift = self.last_modulate(embedding)[:, None].chunk(2, dim=2)
        h = self.last(self.last_norm(h) * (1.0 + scale) + shift).float()
        unfolded = depth_to_space(h.transpose(1, 2).reshape(len(h), -1, *grid), self.patch)
        return unfolded[:, :, : size[0], : size[1], : size[2]]


def positions(grid: tuple[int, ...], device: torch.device) -> Tensor:
    """Sines and cosines of every token's place from the middle of the grid, in tokens: float32 (tokens, 96)."""
    axes = [torch.arange(n, device=device, dtype=torch.float32) - (n - 1) / 2 for n in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    # wavelengths from about 6 tokens to 600
    return torch.cat([sinusoids(places[:, k] / 100.0, 32, longest=100.0) for k in range(3)], dim=1)
