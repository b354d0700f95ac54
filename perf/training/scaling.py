"""Training of one config on 1 and 2 processes of one thread each, and its loader without the model.

    python perf/training/scaling.py configs/imaging/hippocampus_cpu15.yaml DATA/volumes.csv --steps 40 --repeats 3

Each repeat trains `--steps` steps of both stages on 1, then on 2 processes (gloo), and reads samples per second, the share
of time in which the model waited for data, and peak memory off the log. The loader alone makes the same batches with
nobody taking them. One JSON object on standard output: medians, least and most over the repeats. A busy machine slows
both sides; the two stand in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def train(config: Path, data: Path, out: Path, steps: int, processes: int) -> list[dict[str, Any]]:
    """Log of a short run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    sets = ["autoencoder.adversarial_start=0", "training.log_every_steps=10", "training.precision=fp32"]
    sets += [f"{stage}.{key}" for stage in ("autoencoder", "flow") for key in (f"steps={steps}", "max_minutes=null")]
    command = [sys.executable, "-m", "engine", "imaging", "train", "--config", str(config), "--data", str(data)]
    command += ["--out", str(out), *(word for pair in sets for word in ("--set", pair))]
    started = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = {**os.environ, **shared, **(place if processes > 1 else {})}
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    for process in started:
        _, said = process.communicate(timeout=600)
        if process.returncode:
            raise SystemExit(said.decode()[-2000:])
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def loader(run: Path, data: Path, steps: int) -> dict[str, float]:
    """Samples per second of both stages' batches, made by one thread with no model."""
    from engine.imaging.config import load_config
    from engine.imaging.dataset import learn_covariates, load_scans, read_table
    from engine.imaging.draws import flow_batch, flow_data
    from engine.imaging.latents import cached_latents
    from engine.imaging.train import moved
    from engine.provenance import sha256
    from engine.training import distributed
    from engine.training.loop import shares

    config = load_config(run / "config.yaml")
    rows = [row for row in read_table(data, config.data) if row.train]
    covariates = learn_covariates(rows, config.data, data)
    scans_g = [load_scans(rows, config, run / "cache")]
    file = run / "cache" / "latents.safetensors"
    latents = cached_latents(config, None, scans_g, file, sha256(file), distributed.start())  # type: ignore[arg-type]
    prepared = flow_data(config, rows, scans_g, latents, covariates)
    found = {}
    for stage in ("autoencoder", "flow"):
        size, began = getattr(config, stage).batch_size, time.perf_counter()
        for step in range(steps):
            share = shares(config.seed, f"imaging.order.{stage}", step, size, len(rows))[0]
            if stage == "flow":
                flow_batch(config, prepared, 0, share.positions, share.indices)
            else:
                [moved(scans_g[0].x_bcdhw[i], config, p) for p, i in zip(share.positions, share.indices)]
        found[stage] = steps * size / (time.perf_counter() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    seen: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(given.repeats):
            for processes in (1, 2):
                run = Path(folder) / f"{repeat}-{processes}"
                events = train(given.config, given.data, run, given.steps, processes)
                for stage in ("autoencoder", "flow"):
                    lines = [e for e in events if e["event"] == stage][1:]  # the first interval warms up
                    of = f"{stage} on {processes}"
                    speeds = [e["samples_per_second"] for e in lines]
                    seconds = lines[-1]["seconds"] - lines[0]["seconds"]
                    seen.setdefault(f"{of}: samples/s", []).append(statistics.median(speeds))
                    share = sum(e["waited"] for e in lines[1:]) / seconds
                    seen.setdefault(f"{of}: share of time waiting for data", []).append(share)
                    seen.setdefault(f"{of}: peak GiB of a process", []).append(lines[-1]["memory_gib"])
            for stage, speed in loader(Path(folder) / f"{repeat}-1", given.data, given.steps).items():
                seen.setdefault(f"{stage}, loader alone: samples/s", []).append(speed)
    table = {k: [round(f(v), 4) for f in (statistics.median, min, max)] for k, v in seen.items()}
    print(json.dumps({"repeats": given.repeats, "steps": given.steps, "median, least, most": table}, indent=2))


if __name__ == "__main__":
    main()
