"""The KL autoencoder: a volume to a small latent and back, and the losses that train it.

A space-to-depth stem folds blocks of 2x2x2 voxels into channels before the first convolution, so that no wide
convolution ever runs at full resolution; at equal width that is what makes a CPU budget suffice (docs/imaging.md has
the figures). Only one narrow convolution smooths the unfolded output. Normalisation statistics run over a whole volume.

It leaves to others: optimisation (`train`), per-channel latent statistics (`train`), where volumes come from
(`dataset`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.imaging.config import AutoencoderConfig


def space_to_depth(x_bcdhw: Tensor, factor: int) -> Tensor:
    """Fold blocks of factor^3 voxels into channels: (b, c, d, h, w) -> (b, c * factor^3, d/f, h/f, w/f)."""
    b, c, d, h, w = x_bcdhw.shape
    f = factor
    return (
        x_bcdhw.reshape(b, c, d // f, f, h // f, f, w // f, f)
        .permute(0, 1, 3, 5, 7, 2, 4, 6)
        .reshape(b, c * f**3, d // f, h // f, w // f)
    )


def depth_to_space(x_bcdhw: Tensor, factor: int) -> Tensor:
    """The inverse of `space_to_depth`."""
    b, c, d, h, w = x_bcdhw.shape
    f = factor
    return (
        x_bcdhw.reshape(b, c // f**3, f, f, f, d, h, w)
        .permute(0, 1, 5, 2, 6, 3, 7, 4)
        .reshape(b, c // f**3, d * f, h * f, w * f)
    )


def convolve(
    x_bcdhw: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """As `torch.nn.functional.conv3d`. Without gradients on a CPU always by oneDNN: PyTorch unfolds small maps of batch 1 into
    matrices of their windows, which takes 2 to 13 times as long and 27 times the map's memory."""
    if not torch.is_grad_enabled() and x_bcdhw.is_cpu and weight[0, 0].numel() > 1 and torch.backends.mkldnn.enabled:
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_bcdhw.dtype
        bf16 = kind == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if torch.backends.mkldnn.is_available() and (bf16 or kind == weight.dtype == torch.float32):
            x_bcdhw, weight, bias = x_bcdhw.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
            if x_bcdhw.shape[1] < 16:  # its layout of planes would fill up to 16 channels
                x_bcdhw = x_bcdhw.contiguous(memory_format=torch.channels_last_3d)
            return torch.mkldnn_convolution(x_bcdhw, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x_bcdhw, weight, bias, stride, padding)  # type: ignore[call-overload]


class Convolution(nn.Conv3d):
    """nn.Conv3d by `convolve`: zero padding, no dilation, one group."""

    def forward(self, x_bcdhw: Tensor) -> Tensor:
        return convolve(x_bcdhw, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with the largest of 8, 4, 2, 1 groups that divides `channels`."""
    return nn.GroupNorm(next(g for g in (8, 4, 2, 1) if channels % g == 0), channels)


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions with normalisation before each, added to the (projected) input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), Convolution(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = group_norm(outputs), Convolution(outputs, outputs, 3, padding=1)
        self.skip = Convolution(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # every block starts as the identity

    def forward(self, x_bcdhw: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_bcdhw)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x_bcdhw) + h


class Encoder(nn.Module):
    """Volume in [-1, 1] -> mean and log variance of the latent."""

    def __init__(self, config: AutoencoderConfig, channels: int) -> None:
        super().__init__()
        self.patch = config.patch
        widths = config.widths
        layers: list[nn.Module] = [Convolution(channels * config.patch**3, widths[0], 3, padding=1)]
        for level, width in enumerate(widths):
            if level:
                layers.append(Convolution(widths[level - 1], width, 3, stride=2, padding=1))
            layers += [ResidualBlock(width, width) for _ in range(config.blocks)]
        layers += [group_norm(widths[-1]), nn.SiLU(), Convolution(widths[-1], 2 * config.latent_channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x_bcdhw: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.layers(space_to_depth(x_bcdhw, self.patch)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-14.0, 6.0)


class Decoder(nn.Module):
    """Latent -> volume in about [-1, 1]."""

    def __init__(self, config: AutoencoderConfig, channels: int) -> None:
        super().__init__()
        self.patch = config.patch
        widths = config.widths[::-1]
        layers: list[nn.Module] = [Convolution(config.latent_channels, widths[0], 3, padding=1)]
        for level, width in enumerate(widths):
            if level:
                layers += [nn.Upsample(scale_factor=2), Convolution(widths[level - 1], width, 3, padding=1)]
            layers += [ResidualBlock(width, width) for _ in range(config.blocks)]
        narrow = config.output_width
        layers += [group_norm(widths[-1]), nn.SiLU(), Convolution(widths[-1], narrow * config.patch**3, 3, padding=1)]
        self.layers = nn.Sequential(*layers)
        self.smooth = Convolution(narrow, channels, 3, padding=1)

    def forward(self, z_bcdhw: Tensor) -> Tensor:
        unfolded = depth_to_space(self.layers(z_bcdhw), self.patch)
        return self.smooth(F.silu(unfolded)).float()


class Autoencoder(nn.Module):
    """KL autoencoder over volumes (b, c, d, h, w) float32 in [-1, 1]; every spatial size a multiple of `factor`.

    Source: Kingma & Welling 2014 for the latent; Rombach et al. 2022 for its use under a diffusion model.
    """

    def __init__(self, config: AutoencoderConfig, channels: int = 1) -> None:
        super().__init__()
        self.factor = config.factor
        self.encoder, self.decoder = Encoder(config, channels), Decoder(config, channels)

    def encode(self, x_bcdhw: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent, float32 (b, latent_channels, d/f, h/f, w/f)."""
        mean, log_variance = self.encoder(x_bcdhw)
        return mean, (0.5 * log_variance).exp()

    def decode(self, z_bcdhw: Tensor) -> Tensor:
        """Volume (b, c, d, h, w) float32 of a latent."""
        return self.decoder(z_bcdhw)

    def forward(self, x_bcdhw: Tensor, noise_bcdhw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, mean and log variance; `noise_bcdhw` is the standard normal draw of the posterior.

        Training goes through here and never through an attribute, because a distributed wrapper has only `forward`.
        """
        mean, log_variance = self.encoder(x_bcdhw)
        return self.decoder(mean + (0.5 * log_variance).exp() * noise_bcdhw), mean, log_variance


def kl_per_element(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence from N(0, 1), as the mean over elements, so that its weight does not depend on the volume's
    size."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()


def gradient_l1(a_bcdhw: Tensor, b_bcdhw: Tensor) -> Tensor:
    """Mean absolute difference of the finite differences along the three axes: edges, which plain L1 lets blur."""
    difference = a_bcdhw - b_bcdhw
    return torch.stack([difference.diff(dim=axis).abs().mean() for axis in (2, 3, 4)]).mean()


def reconstruction_loss(
    config: AutoencoderConfig, output: Tensor, target: Tensor, labels: int = 0
) -> dict[str, Tensor]:
    """Unweighted terms "l1" and "gradient", each averaged over full resolution and the coarser scales, which weigh structure
    above single-voxel noise; and "labels", where the last `labels` channels are labels (+1 inside, -1 outside).

    Labels have a loss of their own: absolute errors are least where a small region is nowhere at all, and a mean over all
    channels would let an image beside two labels learn a third as much against the same KL weight.
    """
    images = output.shape[1] - labels
    terms = {}
    if labels:
        terms["labels"] = label_loss(output[:, images:], target[:, images:])
        output, target = output[:, :images], target[:, :images]
    if not images:
        return {"l1": terms["labels"].new_zeros(()), "gradient": terms["labels"].new_zeros(()), **terms}
    terms["l1"], terms["gradient"] = (output - target).abs().mean(), gradient_l1(output, target)
    for _ in range(config.coarser_scales):
        output, target = F.avg_pool3d(output, 2), F.avg_pool3d(target, 2)
        terms["l1"] = terms["l1"] + (output - target).abs().mean()
        terms["gradient"] = terms["gradient"] + gradient_l1(output, target)
    return {name: term if name == "labels" else term / (1 + config.coarser_scales) for name, term in terms.items()}


def autoencoder_loss(config: AutoencoderConfig, terms: dict[str, Tensor]) -> Tensor:
    """The terms of `reconstruction_loss` and "kl", weighted as the config says."""
    loss = terms["l1"] + config.gradient_weight * terms["gradient"] + config.kl_weight * terms["kl"]
    return loss + config.label_weight * terms["labels"] if "labels" in terms else loss


def label_loss(logit_bcdhw: Tensor, target_bcdhw: Tensor) -> Tensor:
    """Cross-entropy of each label's logit and one minus its soft Dice (Milletari et al. 2016), in equal parts; targets +-1."""
    inside, probability = (target_bcdhw > 0).to(logit_bcdhw.dtype), logit_bcdhw.sigmoid()
    both = (probability * inside).sum(dim=(2, 3, 4))
    overlap = (2 * both + 1) / (probability.sum(dim=(2, 3, 4)) + inside.sum(dim=(2, 3, 4)) + 1)
    return F.binary_cross_entropy_with_logits(logit_bcdhw, inside) + 1 - overlap.mean()


def shown(x_bcdhw: Tensor, labels: int) -> Tensor:
    """An output as the discriminator is shown it: logits of labels as -1 .. 1, which is what it knows of real ones."""
    if not labels:
        return x_bcdhw
    return torch.cat([x_bcdhw[:, :-labels], (x_bcdhw[:, -labels:] / 2).tanh()], dim=1)


def patch_discriminator(config: AutoencoderConfig, channels: int) -> nn.Module:
    """MONAI's patch discriminator, for the least-squares adversarial term that starts late (Mao et al. 2017)."""
    from monai.networks.nets import PatchDiscriminator

    return PatchDiscriminator(
        spatial_dims=3, channels=config.discriminator_width, in_channels=channels, num_layers_d=2, norm="INSTANCE"
    )


def feature_distance(output_lbcdhw: Sequence[Tensor], target_lbcdhw: Sequence[Tensor]) -> Tensor:
    """Feature matching (Wang et al. 2018, pix2pixHD): mean absolute difference of a discriminator's maps, each layer alike."""
    pairs = zip(output_lbcdhw, target_lbcdhw, strict=True)
    return torch.stack([(a.float() - b.float()).abs().mean() for a, b in pairs]).mean()
