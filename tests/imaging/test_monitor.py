"""The monitor of memorisation: what it calls copying, when it ends the stage, which step it keeps, and that a resumed run
goes on where it was."""

from __future__ import annotations

import csv
import json
import os
import signal

import numpy as np
import pytest
import torch

from engine.audit.copies import CopySearch
from engine.audit.pools import Pool
from engine.errors import InputError
from engine.imaging import monitor
from engine.imaging.config import apply_overrides, parse_config
from engine.imaging.embedding import embed
from engine.imaging.generate import as_written, load_model
from engine.imaging.train import train
from engine.imaging.volume import Volume, write_volume
from engine.training import checkpoint
from engine.training.preemption import Preempted

SETTINGS = ["data.holdout_share=0.4", "monitor.every_steps=2", "monitor.samples=8", "monitor.steps=1", "flow.steps=8",
            "training.keep_checkpoints=9"]  # fmt: skip


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Forty people with one smooth random scan each."""
    from scipy import ndimage

    folder = tmp_path_factory.mktemp("people")
    with (folder / "volumes.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "subject", "age", "sex"])
        for k in range(40):
            noise = ndimage.gaussian_filter(np.random.default_rng(k).standard_normal((16, 16, 16)), 2.0)
            array = (200 + 1000 * noise / noise.std() / 6).clip(0)[None].astype(np.float32)
            write_volume(Volume(array, np.diag([2.0, 2, 2, 1]), "MR", "arbitrary", {}), folder / f"{k}.nii.gz")
            writer.writerow([f"{k}.nii.gz", f"P{k}", 20 + k, "MF"[k % 2]])
    return folder / "volumes.csv"


@pytest.fixture(scope="module")
def config(tiny_config):
    return parse_config(apply_overrides(tiny_config.model_dump(), SETTINGS))


@pytest.fixture(scope="module")
def copying(config, people):
    """`sample` as a generator that hands out training scans, noised a little."""
    from engine.imaging.dataset import load_scans, read_table

    scans = load_scans([row for row in read_table(people, config.data) if row.train], config)

    def sample(model, n, **keywords):
        for k in range(n):
            x = scans.x_bcdhw[k] + 0.02 * np.random.default_rng(k).standard_normal(scans.x_bcdhw[k].shape).astype(
                np.float32
            )
            yield k, as_written(config, x, np.eye(4)), {}

    return sample


def test_copies_end_the_stage_after_patience_and_the_best_step_is_kept(config, people, copying, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "sample", copying)
    train(config, people, tmp_path / "run")
    parts, state = checkpoint.load(tmp_path / "run")
    judged = state["monitor"]["judged"]
    assert [record["step"] for record in judged] == [2, 4]  # patience 2, the stage would have had 8
    assert all(record["certain"] and record["copies"] == 1.0 for record in judged)
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert next(e["ended_by"] for e in events if e["event"] == "stage_done" and e["stage"] == "flow") == "copies"
    best = min(judged, key=lambda record: record["holdout_loss"])
    assert [r["best"] for r in judged].count(True) >= 1
    assert judged[0]["best"]
    loaded = load_model(tmp_path / "run", "cpu").denoiser.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in parts["best"].items())
    same_as_last = all(torch.equal(parts["ema"][name], tensor) for name, tensor in parts["best"].items())
    assert same_as_last == (best["step"] == 4)


def test_an_honest_model_is_not_stopped_and_the_lowest_holdout_loss_wins(config, people, tmp_path, monkeypatch):
    losses = iter([3.0, 9.0, 2.0, 9.0, 1.0, 9.0, 2.5, 9.0])  # holdout, training, of four judgements
    monkeypatch.setattr(monitor, "_loss", lambda model, x0, given: next(losses))
    monkeypatch.setattr(monitor.Watch, "_flagged", lambda watch, model: 0)
    train(config, people, tmp_path / "run")
    parts, state = checkpoint.load(tmp_path / "run")
    assert [(r["step"], r["best"], r["certain"]) for r in state["monitor"]["judged"]] == [
        (2, True, False), (4, True, False), (6, True, False), (8, False, False),
    ]  # fmt: skip
    assert not all(torch.equal(parts["ema"][name], tensor) for name, tensor in parts["best"].items())


def test_a_resumed_run_keeps_what_was_judged_and_equals_the_uninterrupted_one(config, people, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor.Watch, "_flagged", lambda watch, model: 0)

    def interrupt(what, done, total):
        if what == "flow" and done >= 0.5 * total:
            os.kill(os.getpid(), signal.SIGUSR1)

    train(config, people, tmp_path / "straight")
    with pytest.raises(Preempted):
        train(config, people, tmp_path / "run", progress=interrupt)
    assert 1 <= len(checkpoint.load(tmp_path / "run")[1]["monitor"]["judged"]) < 4
    train(config, people, tmp_path / "run", resume=True)
    one, two = (checkpoint.load(tmp_path / name) for name in ("straight", "run"))
    assert one[1]["monitor"] == two[1]["monitor"]
    for part, tensors in one[0].items():
        assert all(torch.equal(tensor, two[0][part][name]) for name, tensor in tensors.items()), part


def test_fresh_people_are_flagged_at_the_level_and_copies_always(config, people, tmp_path):
    """The statistic itself, with no training: unseen scans at about the level, noised and shifted training scans all."""
    from engine.imaging.dataset import load_scans, read_table

    table = read_table(people, config.data)
    train_rows, holdout_rows = ([r for r in table if r.train is side] for side in (True, False))
    watch = monitor.prepare(config, table, load_scans(train_rows, config), tmp_path)
    assert isinstance(watch.search, CopySearch)
    copies = [as_written(config, x + 0.02, np.eye(4)) for x in load_scans(train_rows, config).x_bcdhw[:8]]
    pool = Pool("features", embed(copies), np.array([f"s{k}" for k in range(8)]))
    assert (watch.null.p_values(watch.search.score(pool, "monitor")) <= 0.05).all()
    from scipy import ndimage

    fresh = []
    for k in range(60):
        noise = ndimage.gaussian_filter(np.random.default_rng(1000 + k).standard_normal((16, 16, 16)), 2.0)
        fresh.append(as_written(config, (noise / noise.std() / 3).clip(-1, 1)[None].astype(np.float32), np.eye(4)))
    pool = Pool("features", embed(fresh), np.array([f"s{k}" for k in range(60)]))
    assert (watch.null.p_values(watch.search.score(pool, "monitor")) <= 0.05).mean() < 0.2
    assert len(holdout_rows) >= monitor.LEAST_PEOPLE


def test_too_few_people_in_the_holdout_are_refused_before_anything_is_trained(config, people, tmp_path):
    few = parse_config(apply_overrides(config.model_dump(), ["data.holdout_share=0.02"]))
    with pytest.raises(InputError, match="at least 5 people in the holdout"):
        train(few, people, tmp_path / "run")
    assert not (tmp_path / "run").exists()
