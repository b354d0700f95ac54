"""Scaling of one config on paper: work per step, bytes between GPUs per step, and what that allows on 1 to 64 nodes.

    python perf/training/on_paper.py configs/imaging/hippocampus_cpu15.yaml --batch-per-gpu 4

Parameters and operations are those of `engine imaging estimate`, counted on the meta device: nothing is measured. Data
parallel exchanges float32 gradients in a ring, 2 (w - 1) / w of their bytes per process; sharded training gathers the
weights twice and scatters the gradients once, 3 (w - 1) / w. The rates of a GPU and of its share of the network are
assumptions, named in the output and set by options. Exchange hidden behind the backward pass is not counted on:
efficiency is compute / (compute + exchange), the worst case.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from engine.imaging.config import ImagingConfig, load_config, parse_config
from engine.imaging.estimate import autoencoder_step, flow_step
from engine.training.settings import apply_overrides


def networks(config: ImagingConfig, batch: int) -> dict[str, tuple[int, float]]:
    """(parameters, operations per step and GPU) of both stages with `batch` samples per GPU."""
    own = [f"autoencoder.batch_size={batch}", f"flow.batch_size={batch}", "training.accumulate=1"]
    alone = parse_config(apply_overrides(config.model_dump(), own))
    costs = {"autoencoder": autoencoder_step(alone, bf16=True), "flow": flow_step(alone, bf16=True)}
    return {stage: (cost.parameters, float(cost.flop)) for stage, cost in costs.items()}


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
