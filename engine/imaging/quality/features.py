"""The declared feature extractors. Each is a network, the SHA-256 of its weights, and a way to show it scans.

`self`: encoders that learn from the real training side alone, offline and without labels: two random crops of a scan, with
unlike contrast, must be described alike, and the descriptions of different scans must spread over all directions (VICReg:
Bardes, Ponce and LeCun, ICLR 2022). One sees volumes, one slices of all three planes. A description is the mean of every
level's channels, so that fine texture counts as well as shape. Nothing is blurred or noised on the way, because a
description that does not see blur could not hold it against a generator.

`medicalnet` (Chen, Ma and Zheng 2019) and `radimagenet` (Mei et al. 2022): the user's file, by path and hash, strictly loaded.

Weights that were learned are cached by a hash of what they were learned from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine import provenance, seeding
from engine.atomic import atomic_path
from engine.errors import InputError
from engine.imaging.quality.config import ExtractorConfig, LearningConfig, WeightsConfig

PLANES = ("sagittal", "coronal", "axial")  # the axis that a plane leaves out is its place here (RAS)
SLICES = 16  # of each plane, evenly over the middle half
_WIDTHS = (16, 32, 64, 128)
_CROP_SHARE = 0.75
_CONTRAST = 0.25  # largest logarithm of the gamma
_SEEN = 128  # voxels per axis that a 3D network is shown; longer axes are averaged down
_VICREG = (25.0, 25.0, 1.0)  # invariance, variance, covariance, as published
_RADIMAGENET_MEAN = (0.406, 0.456, 0.485)  # subtracted from intensities in 0 .. 1, channel by channel


@dataclass(frozen=True)
class Extractor:
    """A network that describes scans.

    Attributes:
        kind: "3d": one row of features per scan; "2.5d": per plane and slice.
        sha256: of the weights.
        note: how it came to be, for the findings.
        levels: how many features each level gives; distances let every level count alike.
    """

    name: str
    kind: Literal["3d", "2.5d"]
    sha256: str
    note: str
    network: nn.Module
    levels: tuple[int, ...] = ()


class Encoder(nn.Module):
    """A convolution and four residual units (MONAI) with group normalisation, each halving the grid after the first; gives the
    means of every level's channels, (b, 240)."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        from monai.networks.blocks import Convolution, ResidualUnit

        norm = ("group", {"num_groups": 4})
        self.stem = Convolution(dimensions, 1, _WIDTHS[0], strides=2, norm=norm)
        self.levels = nn.ModuleList()
        for k, (before, after) in enumerate(zip((_WIDTHS[0], *_WIDTHS), _WIDTHS)):
            self.levels.append(ResidualUnit(dimensions, before, after, strides=1 if k == 0 else 2, norm=norm))

    def forward(self, x_bc: Tensor) -> Tensor:
        h = self.stem(x_bc)
        means = []
        for level in self.levels:
            h = level(h)
            means.append(h.flatten(2).mean(dim=2))
        return torch.cat(means, dim=1)


def learned_extractors(
    x_ndhw: np.ndarray, config: ExtractorConfig, seed: int, device: torch.device, cache: Path | None = None
) -> list[Extractor]:
    """The self-supervised encoders of volumes and of slices, learned from x_ndhw (float32 in 0 .. 1) or read from `cache`."""
    made = []
    for kind, dimensions, settings in (("3d", 3, config.volumes), ("2.5d", 2, config.slices)):

        def learn(dimensions: int = dimensions, settings: LearningConfig = settings) -> nn.Module:
            return train_encoder(x_ndhw, dimensions, settings, seed, device)

        network, sha256 = learned(
            f"encoder-{dimensions}d", Encoder(dimensions), learn, [settings.model_dump(mode="json"), seed], [x_ndhw], cache
        )  # fmt: skip
        note = f"self-supervised {kind} encoder, {settings.steps} steps on {len(x_ndhw)} scans of the training side"
        made.append(Extractor("self", kind, sha256, note, network.to(device).eval(), _WIDTHS))  # type: ignore[arg-type]
    return made


def learned(
    name: str,
    empty: nn.Module,
    learn: Callable[[], nn.Module],
    settings: Sequence[Any],
    arrays: Sequence[np.ndarray],
    cache: Path | None,
) -> tuple[nn.Module, str]:
    """A network and the SHA-256 of its weights: `empty` filled from the cache, or what `learn` gives, which is cached.

    Args:
        settings: JSON-ready; with the arrays and the versions of the libraries, what the weights depend on.
    """
    digest = hashlib.sha256(json.dumps([name, torch.__version__, *settings], sort_keys=True).encode())
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    path = None if cache is None else cache / f"{name}-{digest.hexdigest()[:32]}.safetensors"
    if path is not None and path.is_file():
        empty.load_state_dict(load_file(path), strict=True)
        return empty, weights_sha256(empty)
    network = learn()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            save_file({k: t.cpu().contiguous() for k, t in network.state_dict().items()}, partial)
    return network, weights_sha256(network)


def weights_sha256(network: nn.Module) -> str:
    """Of names, shapes and values of all tensors, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        array = tensor.detach().cpu().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def train_encoder(
    x_ndhw: np.ndarray, dimensions: int, settings: LearningConfig, seed: int, device: torch.device
) -> nn.Module:
    """Learn an `Encoder` of volumes (3) or of slices (2) from x_ndhw; the same for the same arguments on one kind of device."""
    purpose = f"imaging.quality.encoder{dimensions}d"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derived_seed(seed, purpose + ".weights"))
        encoder = Encoder(dimensions).to(device).train()
        width = _WIDTHS[-1]
        projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).to(device)
    parameters = [*encoder.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=1e-4)
    for step in range(settings.steps):
        rng = seeding.generator(seed, purpose, step)
        a, b = (view.to(device) for view in two_views(x_ndhw, dimensions, settings, step, rng))
        described = projector(encoder(torch.cat([a, b]))[:, -_WIDTHS[-1] :])
        descend(optimizer, vicreg(*described.chunk(2)), cosine(settings, step))
    return encoder.eval()


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """One step down the gradient of `loss`, whose norm is cut at 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def cosine(settings: LearningConfig, step: int) -> float:
    """Learning rate at a step: a twentieth of the steps rising, then half a cosine."""
    rise = max(1, settings.steps // 20)
    if step < rise:
        return settings.learning_rate * (step + 1) / rise
    return settings.learning_rate * 0.5 * (1 + float(np.cos(np.pi * (step - rise) / max(1, settings.steps - rise))))


def two_views(
    x_ndhw: np.ndarray, dimensions: int, settings: LearningConfig, step: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Two crops of each of a batch of scans (or of slices of one plane), each with a contrast of its own: (b, 1, ...)."""
    chosen = rng.choice(len(x_ndhw), settings.batch_size, replace=settings.batch_size > len(x_ndhw))
    axis = step % 3
    sources = []
    for k in chosen:
        if dimensions == 3:
            sources.append(x_ndhw[k])
        else:
            length = x_ndhw.shape[1 + axis]
            sources.append(np.take(x_ndhw[k], int(rng.integers(length // 4, length - length // 4)), axis))
    size = tuple(min(settings.crop, max(4, round(_CROP_SHARE * n))) for n in sources[0].shape)
    views: list[list[np.ndarray]] = [[], []]
    for source in sources:
        for view in views:
            starts = [int(rng.integers(0, n - m + 1)) for n, m in zip(source.shape, size)]
            crop = source[tuple(slice(s, s + m) for s, m in zip(starts, size))]
            view.append(np.clip(crop, 0.0, 1.0) ** np.exp(rng.uniform(-_CONTRAST, _CONTRAST)))
    a, b = (torch.from_numpy(np.stack(view).astype(np.float32))[:, None] for view in views)
    return a, b


def vicreg(a_bf: Tensor, b_bf: Tensor) -> Tensor:
    """Invariance, variance and covariance of two descriptions of one batch (Bardes et al. 2022, equations 1 to 6)."""
    alike, spread, apart = _VICREG
    loss = alike * F.mse_loss(a_bf, b_bf)
    for z in (a_bf, b_bf):
        z = z - z.mean(dim=0)
        loss = loss + spread / 2 * F.relu(1.0 - (z.var(dim=0) + 1e-4).sqrt()).mean()
        covariance = z.T @ z / (len(z) - 1)
        loss = loss + apart * (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]
    return loss


# --- weights of others ------------------------------------------------------------------------------------------------


def brought_extractor(weights: WeightsConfig, device: torch.device) -> Extractor:
    """The network of the user's file.

    Raises:
        InputError: no such file, another hash, or tensors that are not this network's; names the first.
    """
    if not weights.path.is_file():
        raise InputError(f"the weights of {weights.kind}", "nothing there", weights.path)
    found = provenance.sha256(weights.path)
    if found != weights.sha256:
        raise InputError(
            f"SHA-256 {weights.sha256[:12]}...", f"{found[:12]}...", weights.path, "the right file or hash"
        )
    tensors = _read_tensors(weights.path)
    network = _medicalnet(weights.depth) if weights.kind == "medicalnet" else _radimagenet()
    known = network.state_dict()
    # the counter of batches is in some files and in others not, and has no part in what a network says
    tensors.update({k: v for k, v in known.items() if k.endswith("num_batches_tracked") and k not in tensors})
    for name in sorted({*known} ^ {*tensors}):
        how = "an unknown tensor" if name in tensors else "none"
        raise InputError(f"the tensors of {weights.kind}", f"{how} '{name}'", weights.path)
    for name, tensor in tensors.items():
        if tensor.shape != known[name].shape:
            wanted, got = (str(tuple(t.shape)) for t in (known[name], tensor))
            raise InputError(f"'{name}' of shape {wanted}", got, weights.path, "the right extractor.weights.depth")
    network.load_state_dict(tensors, strict=True)
    kind: Literal["3d", "2.5d"] = "3d" if weights.kind == "medicalnet" else "2.5d"
    name = f"medicalnet_resnet{weights.depth}" if weights.kind == "medicalnet" else "radimagenet_resnet50"
    note = f"{name}, weights brought by the user, file {found[:12]}"
    return Extractor(weights.kind, kind, found, note, network.to(device).eval())


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors or PyTorch file, without the prefix of data-parallel training and without a classifier."""
    if path.suffix == ".safetensors":
        found: Any = load_file(path)
    else:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever the unpickler meets in a file that is not plain tensors
            got = " ".join(str(error).split())[:120]
            raise InputError("a file of plain tensors", got, path, "convert it to .safetensors") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise InputError("named tensors", type(found).__name__, path)
    named = {str(name).removeprefix("module."): tensor for name, tensor in found.items()}
    return {name: tensor for name, tensor in named.items() if not name.startswith(("fc.", "conv_seg."))}


def _medicalnet(depth: int) -> nn.Module:
    """The ResNet as MONAI builds it for these weights."""
    from monai.networks.nets.resnet import ResNet, get_inplanes, get_medicalnet_pretrained_resnet_args

    bias, shortcut = get_medicalnet_pretrained_resnet_args(depth)
    layers = {10: [1, 1, 1, 1], 18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3]}[depth]
    block = "bottleneck" if depth == 50 else "basic"
    return ResNet(
        block,
        layers,
        get_inplanes(),
        3,
        1,
        conv1_t_stride=2,
        shortcut_type=shortcut,
        bias_downsample=bias,
        feed_forward=False,
    )


def _radimagenet() -> nn.Module:
    """The ResNet-50 of Keras, as its port to PyTorch has it: convolutions with bias, strides in each block's first one."""
    from monai.networks.nets.resnet import ResNet, get_inplanes

    network = ResNet(
        "bottleneck", [3, 4, 6, 3], get_inplanes(), 2, 3, conv1_t_size=7, conv1_t_stride=2, feed_forward=False
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1.001e-5
    for level in (network.layer2, network.layer3, network.layer4):
        first: Any = level[0]
        first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
    return network


# --- describing scans -------------------------------------------------------------------------------------------------


@torch.no_grad()
def volume_features(extractor: Extractor, x_ndhw: np.ndarray) -> np.ndarray:
    """Features of scans in 0 .. 1 by a 3D extractor, float64 (n, f); one scan at a time, so that none depends on another."""
    device = next(extractor.network.parameters()).device
    rows = []
    for array in x_ndhw:
        x = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None, None].to(device)
        x = at_most(x, _SEEN)
        if extractor.name == "medicalnet":
            x = (x - x.mean()) / x.std().clamp(min=1e-6)
        rows.append(extractor.network(x)[0].double().cpu().numpy())
    return np.stack(rows)


def at_most(x_bcdhw: Tensor, voxels: int) -> Tensor:
    """Volumes with longer axes than `voxels` averaged down to it."""
    d, h, w = (min(n, voxels) for n in x_bcdhw.shape[2:])
    return x_bcdhw if x_bcdhw.shape[2:] == (d, h, w) else F.adaptive_avg_pool3d(x_bcdhw, (d, h, w))


@torch.no_grad()
def slice_features(extractor: Extractor, x_ndhw: np.ndarray) -> dict[str, np.ndarray]:
    """Features of slices of the middle half of every scan by a 2.5D extractor: float64 (n, slices, f) by plane."""
    device = next(extractor.network.parameters()).device
    found = {}
    for axis, plane in enumerate(PLANES):
        length = x_ndhw.shape[1 + axis]
        places = np.unique(np.linspace(length // 4, length - length // 4 - 1, SLICES).round().astype(int))
        rows = []
        for array in x_ndhw:
            slices = np.moveaxis(np.take(array, places, axis), axis, 0).astype(np.float32)
            x = torch.from_numpy(np.ascontiguousarray(slices))[:, None].to(device)
            if extractor.name == "radimagenet":
                x = x.expand(-1, 3, -1, -1) - torch.tensor(_RADIMAGENET_MEAN, device=device).view(1, 3, 1, 1)
            rows.append(extractor.network(x).double().cpu().numpy())
        found[plane] = np.stack(rows)
    return found


def reducer(
    x_nf: np.ndarray, components: int, levels: Sequence[int] = ()
) -> tuple[Callable[[np.ndarray], np.ndarray], int, float]:
    """Projection of standardised features on their leading principal components, fitted on x_nf: (function of (..., f),
    components kept, share of variance, the least of all levels). Every component has variance 1 on x_nf: sizes and
    positions of organs vary far more than their texture does, and would drown it.

    Args:
        levels: numbers of features of groups, each of which gives the same number of components; default: one group.
    """
    from sklearn.decomposition import PCA

    groups = list(levels) or [x_nf.shape[1]]
    kept = max(2, min(components, len(x_nf) // 4) // len(groups))
    parts, start = [], 0
    for count in groups:
        x = x_nf[:, start : start + count]
        mean, deviation = x.mean(axis=0), x.std(axis=0)
        # a channel that hardly ever answers would make one odd scan the whole distance
        deviation = np.maximum(deviation, max(0.1 * float(np.median(deviation)), 1e-12))
        pca = PCA(min(kept, count), svd_solver="full").fit((x - mean) / deviation)
        parts.append((slice(start, start + count), mean, deviation, pca))
        start += count

    def project(x: np.ndarray) -> np.ndarray:
        flat, made = x.reshape(-1, x.shape[-1]), []
        for here, mean, deviation, pca in parts:
            unit = np.sqrt(np.maximum(pca.explained_variance_, 1e-12))
            made.append(pca.transform((flat[:, here] - mean) / deviation) / unit)
        joined = np.concatenate(made, axis=1)
        return joined.reshape(*x.shape[:-1], joined.shape[1])

    explained = min(float(pca.explained_variance_ratio_.sum()) for *_, pca in parts)
    return project, sum(pca.n_components_ for *_, pca in parts), explained
