"""The denoiser: a 3D U-Net that predicts the velocity of a noisy latent, given time, spacing, covariates and maps.

One network; what it is conditioned on is an argument. Maps on the latent's grid (a label map, the latent of an earlier
scan; `engine.imaging.context`) are further channels of its input. Each covariate has a learned "not given" embedding,
used where the data misses it, where training drops it, and for the unguided half of classifier-free guidance (Ho &
Salimans 2022). Conditioning enters every residual block as scale and shift after normalisation. Any latent size works: a
level halves sizes rounding up, and the way back takes the size of the skip connection.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.errors import Unsupported
from engine.imaging.autoencoder import Convolution, group_norm
from engine.imaging.config import FlowConfig


@dataclass(frozen=True)
class Condition:
    """What a batch is conditioned on.

    Attributes:
        spacing_b3: log of the spacing in mm, float32.
        continuous_bk: standardised continuous covariates, float32; NaN = not given.
        categorical_bk: level of each categorical covariate, int64; -1 = not given.
        context_bcdhw: further channels of the latent's size, float32; None for a model that has none.
    """

    spacing_b3: Tensor
    continuous_bk: Tensor
    categorical_bk: Tensor
    context_bcdhw: Tensor | None = None

    def to(self, device: torch.device) -> Condition:
        """The same on `device`."""
        context = None if self.context_bcdhw is None else self.context_bcdhw.to(device)
        spacing, continuous, categorical = self.spacing_b3, self.continuous_bk, self.categorical_bk
        return Condition(spacing.to(device), continuous.to(device), categorical.to(device), context)

    def rows(self, index: Tensor) -> Condition:
        """The rows `index` (int64)."""
        plain = (self.spacing_b3[index], self.continuous_bk[index], self.categorical_bk[index])
        return Condition(*plain, None if self.context_bcdhw is None else self.context_bcdhw[index])

    def within(self, context_bcdhw: Tensor | None) -> Condition:
        """The same with these further channels."""
        return replace(self, context_bcdhw=context_bcdhw)

    def with_unguided(self) -> Condition:
        """Rows as given, followed by the same rows without covariates: both halves of classifier-free guidance."""
        both = torch.arange(len(self.spacing_b3), device=self.spacing_b3.device).repeat(2)
        without, half = self.unguided(), len(self.spacing_b3)
        doubled = self.rows(both)
        return replace(
            doubled,
            continuous_bk=torch.cat([doubled.continuous_bk[:half], without.continuous_bk]),
            categorical_bk=torch.cat([doubled.categorical_bk[:half], without.categorical_bk]),
        )

    def dropped(self, drop_continuous_bk: Tensor, drop_categorical_bk: Tensor) -> Condition:
        """The same with the covariates under the boolean masks not given."""
        continuous = self.continuous_bk.masked_fill(drop_continuous_bk, math.nan)
        categorical = self.categorical_bk.masked_fill(drop_categorical_bk, -1)
        return replace(self, continuous_bk=continuous, categorical_bk=categorical)

    def blurred(self, noise_bk: Tensor) -> Condition:
        """The same with `noise_bk` added to the continuous covariates; what is not given stays so."""
        return replace(self, continuous_bk=self.continuous_bk + noise_bk)

    def unguided(self) -> Condition:
        """The same without any covariate; spacing and maps stay, because geometry and identity are never guessed."""
        return self.dropped(torch.ones_like(self.continuous_bk, dtype=torch.bool), self.categorical_bk >= -1)


def sinusoids(value_b: Tensor, dimensions: int, longest: float = 1_000.0) -> Tensor:
    """Sines and cosines of `value_b` at geometrically spaced frequencies 1 .. `longest`: float32 (b, dimensions)."""
    frequency = torch.exp(
        torch.linspace(0.0, math.log(longest), dimensions // 2, device=value_b.device, dtype=torch.float32)
    )
    angle = value_b.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ConditionEmbedding(nn.Module):
    """Time, spacing and covariates -> one vector per sample."""

    def __init__(self, width: int, levels: list[int], continuous: int) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, width))
        self.spacing = nn.Linear(3, width)
        # level 0 of each table is "not given"
        self.categorical = nn.ModuleList(nn.Embedding(n + 1, width) for n in levels)
        self.continuous = nn.ModuleList(
            nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(continuous)
        )
        self.continuous_missing = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(continuous))

    def forward(self, t_b: Tensor, condition: Condition) -> Tensor:
        total = self.time(sinusoids(t_b, 128)) + self.spacing(condition.spacing_b3)
        for k, table in enumerate(self.categorical):
            total = total + table(condition.categorical_bk[:, k] + 1)
        for k, network in enumerate(self.continuous):
            value = condition.continuous_bk[:, k : k + 1]
            missing = value.isnan()
            given = network(value.masked_fill(missing, 0.0))
            total = total + torch.where(missing, self.continuous_missing[k].to(given.dtype), given)
        return F.silu(total)


class Block(nn.Module):
    """Residual block whose second normalisation is scaled and shifted by the conditioning vector."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), Convolution(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = group_norm(outputs), Convolution(outputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * outputs)
        self.skip = Convolution(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x_bcdhw: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_bcdhw)))
        scale, shift = self.modulate(embedding)[:, :, None, None, None].chunk(2, dim=1)
        h = self.conv2(self.dropout(F.silu(self.norm2(h) * (1.0 + scale) + shift)))
        return self.skip(x_bcdhw) + h


def attend(q_bnhc: Tensor, k_bnhc: Tensor, v_bnhc: Tensor, backend: str = "auto") -> Tensor:
    """Softmax attention, softmax(q k / sqrt(c)) v per head, by one of two libraries; (b, n, heads, c) in and out.

    Args:
        backend: "sdpa" (PyTorch's scaled_dot_product_attention), "xformers" (memory_efficient_attention, CUDA only), or
            "auto": xformers for CUDA tensors where it is installed, else sdpa.

    Raises:
        Unsupported: "xformers" was named and is not installed or the tensors are not on a CUDA device.
    """
    usable = q_bnhc.is_cuda and importlib.util.find_spec("xformers") is not None
    if backend == "xformers" and not usable:
        got = f"tensors on {q_bnhc.device.type}" if not q_bnhc.is_cuda else "no package of that name"
        raise Unsupported("xformers and CUDA tensors", got, "flow.attention=xformers", "flow.attention=auto")
    if usable and backend != "sdpa":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q_bnhc, k_bnhc, v_bnhc)
    q_bhnc, k_bhnc, v_bhnc = q_bnhc.transpose(1, 2), k_bnhc.transpose(1, 2), v_bnhc.transpose(1, 2)
    return F.scaled_dot_product_attention(q_bhnc, k_bhnc, v_bhnc).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention over all positions of a level; `backend` as in `attend`."""

    def __init__(self, channels: int, head_channels: int = 32, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.heads = max(1, channels // head_channels)
        self.norm, self.qkv = group_norm(channels), nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)

    def forward(self, x_bcdhw: Tensor) -> Tensor:
        b, c = x_bcdhw.shape[:2]
        tokens = self.norm(x_bcdhw).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).view(b, -1, 3, self.heads, c // self.heads).unbind(2)
        mixed = attend(q, k, v, self.backend).reshape(b, -1, c)
        return x_bcdhw + self.out(mixed).transpose(1, 2).reshape(x_bcdhw.shape)


class Denoiser(nn.Module):
    """Velocity model: (x_bcdhw, t_b, condition) -> velocity_bcdhw float32.

    Args:
        config: widths per level, blocks per level, the levels with attention.
        latent_channels: channels of the latent.
        levels: number of levels of each categorical covariate.
        continuous: number of continuous covariates.
        context_channels: channels of `Condition.context_bcdhw`.
        recompute: keep no activations inside blocks for the backward pass.
    """

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
        self.recompute, self.context_channels = recompute, context_channels
        widths, embedding, blocks = config.widths, config.embedding_width, config.blocks
        self.embed = ConditionEmbedding(embedding, levels, continuous)
        self.first = Convolution(latent_channels + context_channels, widths[0], 3, padding=1)

        def attention(level: int) -> nn.Module:
            if level not in config.attention_levels:
                return nn.Identity()
            return Attention(widths[level], backend=config.attention)

        self.down, self.down_attention, self.shrink = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            self.down.append(nn.ModuleList(Block(width, width, embedding, config.dropout) for _ in range(blocks)))
            self.down_attention.append(attention(level))
            if level + 1 < len(widths):
                self.shrink.append(Convolution(width, widths[level + 1], 3, stride=2, padding=1))
        self.middle = Block(widths[-1], widths[-1], embedding, config.dropout)
        self.up, self.up_attention, self.grow = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths))):
            width = widths[level]
            self.up.append(
                nn.ModuleList(
                    Block(2 * width if k == 0 else width, width, embedding, config.dropout) for k in range(blocks)
                )
            )
            self.up_attention.append(attention(level))
            if level:
                self.grow.append(Convolution(width, widths[level - 1], 3, padding=1))
        self.last_norm, self.last = group_norm(widths[0]), Convolution(widths[0], latent_channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x_bcdhw: Tensor, t_b: Tensor, condition: Condition) -> Tensor:
        embedding = self.embed(t_b, condition)
        h, skips = self.first(with_context(x_bcdhw, condition, self.context_channels)), []
        for level, blocks in enumerate(self.down):
            for block in blocks.children():
                h = self._through(block, h, embedding)
            h = self.down_attention[level](h)
            skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        h = self._through(self.middle, h, embedding)
        for step, blocks in enumerate(self.up):
            h = torch.cat([h, skips.pop()], dim=1)
            for block in blocks.children():
                h = self._through(block, h, embedding)
            h = self.up_attention[step](h)
            if step < len(self.grow):
                h = self.grow[step](F.interpolate(h, size=skips[-1].shape[2:], mode="nearest"))
        return self.last(F.silu(self.last_norm(h))).float()

    def _through(self, block: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        return recomputed(block, h, embedding) if self.recompute and self.training else block(h, embedding)


def with_context(x_bcdhw: Tensor, condition: Condition, channels: int) -> Tensor:
    """The latent and its context channels; zeros, which mean "not given", where a model with such channels gets none."""
    if not channels:
        return x_bcdhw
    context = condition.context_bcdhw
    if context is None:
        context = x_bcdhw.new_zeros((len(x_bcdhw), channels, *x_bcdhw.shape[2:]))
    return torch.cat([x_bcdhw, context], dim=1)


def recomputed(block: nn.Module, *inputs: Tensor) -> Tensor:
    """`block(*inputs)` whose activations are computed again in the backward pass (gradient checkpointing)."""
    return checkpoint(block, *inputs, use_reentrant=False)
