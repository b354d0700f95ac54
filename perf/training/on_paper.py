"""Scaling of one config on paper: work per step, bytes between GPUs per step, and what that allows on 1 to 64 nodes.

    python perf/training/on_paper.py configs/imaging/hippocampus_cpu15.yaml --batch-per-gpu 4

Networks are built on the meta device, and their floating-point operations counted by running them there (forward and
backward, PyTorch's FlopCounterMode): nothing is measured. Data parallel exchanges float32 gradients in a ring,
2 (w - 1) / w of their bytes per process; sharded training gathers the weights twice and scatters the gradients once,
3 (w - 1) / w. The rates of a GPU and of its share of the network are assumptions, named in the output and set by options.
Exchange hidden behind the backward pass is not counted on: efficiency is compute / (compute + exchange), the worst case.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from engine.imaging.autoencoder import Autoencoder
from engine.imaging.config import ImagingConfig, load_config
from engine.imaging.denoiser import Condition
from engine.imaging.velocity import new_denoiser


def operations(module: nn.Module, *inputs: Any) -> float:
    """Floating-point operations of one forward and backward pass, 2 per multiply-add."""
    with FlopCounterMode(display=False) as counter:
        output = module(*inputs)
        (output[0] if isinstance(output, tuple) else output).sum().backward()
    return float(counter.get_total_flops())


def networks(config: ImagingConfig, batch: int) -> dict[str, tuple[int, float]]:
    """(parameters, operations per step and GPU) of both stages, on the largest grid of the config."""
    auto = config.autoencoder
    size = max((grid.size for grid in config.data.grids), key=lambda s: s[0] * s[1] * s[2])
    latent = tuple(n // auto.factor for n in size)
    channels = int(config.data.image_channels) + (len(config.data.labels) if config.data.produce != "image" else 0)
    crop = auto.crop_size or size
    with torch.device("meta"):
        autoencoder = Autoencoder(auto, channels)
        denoiser = new_denoiser(config, [])
        seen = torch.empty(batch, channels, *crop)
        noise = torch.empty(batch, auto.latent_channels, *(n // auto.factor for n in crop))
        x, t = torch.empty(batch, auto.latent_channels, *latent), torch.empty(batch)
        context = config.map_channels + config.baseline_channels
        given = Condition(
            torch.empty(batch, 3), torch.empty(batch, 0), torch.empty(batch, 0, dtype=torch.int64),
            torch.empty(batch, context, *latent) if context else None,
        )  # fmt: skip
    return {
        "autoencoder": (_count(autoencoder), operations(autoencoder, seen, noise)),
        "flow": (_count(denoiser), operations(denoiser, x, t, given)),
    }


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def table(found: dict[str, tuple[int, float]], per_node: int, rate: float, network: float) -> list[dict[str, Any]]:
    """One row per stage and number of nodes.

    Args:
        rate: operations per second a GPU is taken to reach. network: bytes per second between one GPU and the next.
    """
    rows = []
    for stage, (parameters, work) in found.items():
        for nodes in (1, 2, 4, 8, 16, 32, 64):
            world = nodes * per_node
            ring = 4 * parameters * (world - 1) / world
            compute = work / rate
            rows.append(
                {
                    "stage": stage, "nodes": nodes, "gpus": world, "compute_ms": 1e3 * compute,
                    "data_parallel_mb": 2 * ring / 1e6, "data_parallel_efficiency": compute / (compute + 2 * ring / network),
                    "sharded_mb": 3 * ring / 1e6, "sharded_efficiency": compute / (compute + 3 * ring / network),
                }
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--batch-per-gpu", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=4)
    parser.add_argument("--tflops", type=float, default=300.0, help="assumed, per GPU")
    parser.add_argument("--gigabytes-per-second", type=float, default=25.0, help="assumed, per GPU, between nodes")
    given = parser.parse_args()
    found = networks(load_config(given.config), given.batch_per_gpu)
    rows = table(found, given.gpus_per_node, given.tflops * 1e12, given.gigabytes_per_second * 1e9)
    print(
        json.dumps(
            {
                "config": str(given.config),
                "batch_per_gpu": given.batch_per_gpu,
                "assumed": {"tflops": given.tflops, "gigabytes_per_second": given.gigabytes_per_second},
                "parameters": {stage: p for stage, (p, _) in found.items()},
                "gflop_per_step_and_gpu": {stage: round(w / 1e9, 1) for stage, (_, w) in found.items()},
                "rows": [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
