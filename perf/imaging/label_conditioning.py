"""How a label map should enter the denoiser: as channels of its input, or by a ControlNet branch beside a frozen model.

    python perf/imaging/label_conditioning.py DATA/imaging/hippocampus/volumes.csv OUT --steps 600

One small autoencoder, then three trainings of `--steps` steps on the same latents, batches and noise (`engine.imaging.draws`):
"channels" has the map among its input channels from the start; "base" never sees one; "branch" is a copy of base's way down
that reads the map and adds to base's skip connections through convolutions that start at zero, base frozen (Zhang et al.,
ICCV 2023), so that it has had twice the steps in all. Held against people who were held out: mean squared error of the
velocity at fixed times and noise with the right map, with none, and with another person's map, per scan; differences are
paired by scan. One JSON object on standard output.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from engine import seeding
from engine.imaging.autoencoder import Autoencoder, Convolution
from engine.imaging.config import ImagingConfig, load_config
from engine.imaging.dataset import condition, learn_covariates, load_scans, read_table
from engine.imaging.denoiser import Condition, Denoiser
from engine.imaging.draws import FlowData, flow_batch, flow_data
from engine.imaging.flow import interpolate, velocity_target
from engine.imaging.labels import map_context
from engine.imaging.latents import cached_latents
from engine.imaging.train import train
from engine.imaging.velocity import new_denoiser
from engine.training import checkpoint
from engine.training.ema import Ema

_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "imaging" / "hippocampus_cpu15.yaml"
_TIMES, _DRAWS = (0.2, 0.4, 0.6, 0.8), 1


class Branch(nn.Module):
    """A frozen denoiser and a trained copy of its way down that reads the map."""

    base: Any
    embed: Any
    first: Any

    def __init__(self, base: Any, channels: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        for name in ("embed", "first", "down", "down_attention", "shrink", "middle"):
            setattr(self, name, copy.deepcopy(getattr(base, name)).requires_grad_(True))
        widths = [blocks[0].conv1.in_channels for blocks in base.down]
        self.hint = Convolution(channels, widths[0], 3, padding=1)
        self.zero = nn.ModuleList(Convolution(width, width, 1) for width in [*widths, widths[-1]])
        for layer in (self.hint, *self.zero):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, given: Condition) -> Tensor:
        context = given.context_bcdhw
        assert context is not None
        own = self._down(self, self.first(x) + self.hint(context), self.embed(t, given))
        embedding = self.base.embed(t, given)
        frozen = self._down(self.base, self.base.first(x), embedding)
        *skips, h = [a + zero(b) for a, b, zero in zip(frozen, own, self.zero)]
        for step, blocks in enumerate(self.base.up):
            h = torch.cat([h, skips.pop()], dim=1)
            for block in blocks:
                h = block(h, embedding)
            h = self.base.up_attention[step](h)
            if step < len(self.base.grow):
                h = self.base.grow[step](F.interpolate(h, size=skips[-1].shape[2:], mode="nearest"))
        return self.base.last(F.silu(self.base.last_norm(h))).float()

    @staticmethod
    def _down(network: Any, h: Tensor, embedding: Tensor) -> list[Tensor]:
        """Skip connections, and what comes out of the middle."""
        found = []
        for level, blocks in enumerate(network.down):
            for block in blocks:
                h = block(h, embedding)
            h = network.down_attention[level](h)
            found.append(h)
            if level < len(network.shrink):
                h = network.shrink[level](h)
        return [*found, network.middle(h, embedding)]


def learn(config: ImagingConfig, network: nn.Module, data: FlowData, steps: int, mapped: bool) -> float:
    """Train in place and leave the averaged weights; returns processor seconds."""
    own = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=config.flow.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    average, begin, n = Ema(network, config.flow.ema_decay), time.process_time(), data.latents.mean_g[0].shape[1]
    network.train()
    for step in range(steps):
        positions = range(step * config.flow.batch_size, (step + 1) * config.flow.batch_size)
        order = [int(seeding.generator(config.seed, "order", p // n).permutation(n)[p % n]) for p in positions]
        x0, noise, t, given = flow_batch(config, data, 0, positions, order)
        if not mapped:
            given = given.within(None)
        for group in optimizer.param_groups:
            group["lr"] = (
                config.flow.learning_rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * step / steps))
            )
        loss = (network(interpolate(x0, noise, t), t, given) - velocity_target(x0, noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        average.update(network)
    seconds = time.process_time() - begin
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in average.tensors():
                parameter.copy_(average.tensors()[name])
    return seconds


@torch.no_grad()
def errors(network: nn.Module, x0_bcdhw: Tensor, given: Condition, map_bcdhw: Tensor | None) -> np.ndarray:
    """Mean squared error of the velocity per scan, float64 (scans,)."""
    network.eval()
    found = []
    for k in range(len(x0_bcdhw)):
        row = torch.full((len(_TIMES) * _DRAWS,), k)
        t = torch.tensor(_TIMES).repeat_interleave(_DRAWS)
        noise = torch.stack(
            [seeding.normal(tuple(x0_bcdhw.shape[1:]), 0, "map", k * len(t) + j) for j in range(len(t))]
        )
        one = given.rows(row).within(None if map_bcdhw is None else map_bcdhw[k : k + 1].expand(len(t), -1, -1, -1, -1))
        x0 = x0_bcdhw[row]
        found.append(float((network(interpolate(x0, noise, t), t, one) - velocity_target(x0, noise)).square().mean()))
    return np.array(found)


def said(values: np.ndarray) -> list[float]:
    """Mean and 95 % bootstrap interval over scans."""
    draw = np.random.default_rng(0)
    means = [values[draw.integers(len(values), size=len(values))].mean() for _ in range(2000)]
    return [round(float(x), 4) for x in (values.mean(), *np.percentile(means, [2.5, 97.5]))]


def main() -> None:
    """Parse, train three times, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("table", type=Path)
    parser.add_argument("out", type=Path, help="run folder of the autoencoder, made where absent")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--autoencoder-steps", type=int, default=300)
    parser.add_argument("--scans", type=int, default=40, help="of held-out people, at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    overrides = [
        "data.labels=[1,2]", "flow.label_map=true", f"autoencoder.steps={options.autoencoder_steps}", "flow.steps=1",
        "autoencoder.widths=[16,32]", "autoencoder.latent_channels=4", "autoencoder.adversarial_weight=0",
        "flow.widths=[32,64]", "flow.attention_levels=[1]", "flow.embedding_width=128", "flow.views=2",
        "flow.linear_mean=false", "flow.components=0",
        "training.precision=fp32", *(f"{stage}.max_minutes=null" for stage in ("autoencoder", "flow")),
    ]  # fmt: skip
    config = load_config(_CONFIG, overrides)
    if not (options.out / "checkpoints").is_dir():
        train(config, options.table, options.out)
    autoencoder = Autoencoder(config.autoencoder)
    checkpoint.load_strictly(autoencoder, checkpoint.load(options.out)[0]["autoencoder"], options.out)
    autoencoder.eval()
    table = read_table(options.table, config.data)
    rows, unseen = ([row for row in table if row.train is side] for side in (True, False))
    unseen = unseen[: options.scans]
    learned = learn_covariates(rows, config.data, options.table)
    scans = load_scans(rows, config, options.out / "cache")
    cache = options.out / "cache" / "again.safetensors"
    latents = cached_latents(config, autoencoder, [scans], cache, None, Accelerator(cpu=True))
    data = flow_data(config, rows, [scans], latents, learned)

    plain = config.model_copy(update={"flow": config.flow.model_copy(update={"label_map": False})})
    torch.manual_seed(0)
    networks: dict[str, nn.Module] = {"channels": new_denoiser(config, learned)}
    torch.manual_seed(0)
    base = new_denoiser(plain, learned)
    assert isinstance(base, Denoiser)
    seconds = {
        "channels": learn(config, networks["channels"], data, options.steps, mapped=True),
        "base": learn(config, base, data, options.steps, mapped=False),
    }
    networks["branch"] = Branch(base, config.map_channels)
    seconds["branch"] = learn(config, networks["branch"], data, options.steps, mapped=True)

    held = load_scans(unseen, config)
    assert held.codes_bdhw is not None
    with torch.no_grad():
        means = torch.cat([autoencoder.encode(torch.from_numpy(np.array(x))[None])[0] for x in held.x_bcdhw])
    x0 = latents.standardise(means)
    given = condition([row.covariates for row in unseen], held.spacing_mm, learned)
    factor, fold = config.autoencoder.factor, config.map_fold
    right = map_context(torch.from_numpy(np.array(held.codes_bdhw)), len(config.data.labels), factor, fold)
    none = torch.zeros_like(right)
    found = {"base": errors(base, x0, given, None)}
    for name, network in networks.items():
        for what, context in (("right", right), ("none", none), ("another's", right.roll(7, dims=0))):
            found[f"{name}, {what} map"] = errors(network, x0, given, context)
    print(json.dumps({
        "scans": len(unseen), "steps": options.steps, "cpu_seconds": {k: round(v, 1) for k, v in seconds.items()},
        "parameters_trained": {k: sum(p.numel() for p in n.parameters() if p.requires_grad) for k, n in networks.items()},
        "velocity_mse": {k: said(v) for k, v in found.items()},
        "branch_minus_channels": said(found["branch, right map"] - found["channels, right map"]),
        "right_minus_none": {k: said(found[f"{k}, right map"] - found[f"{k}, none map"]) for k in networks},
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
