"""Checkpoints: exact round trip, strict loading, checksums, nothing half-written."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from engine.errors import CorruptRun
from engine.training import checkpoint


def parts(value: float) -> checkpoint.Parts:
    return {"model": {"weight": torch.full((2, 3), value)}}


def test_round_trip_is_exact_and_the_newest_is_taken(tmp_path):
    checkpoint.save(tmp_path, 3, parts(0.1), {"stage": "a"})
    checkpoint.save(tmp_path, 12, parts(0.2), {"stage": "b"})
    loaded, state = checkpoint.load(tmp_path)
    assert (state["step"], state["stage"]) == (12, "b")
    assert torch.equal(loaded["model"]["weight"], torch.full((2, 3), 0.2))
    assert torch.equal(checkpoint.load(tmp_path, 3)[0]["model"]["weight"], torch.full((2, 3), 0.1))


def test_only_the_newest_are_kept(tmp_path):
    for step in range(5):
        checkpoint.save(tmp_path, step, parts(step), {}, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 4]


def test_changed_weights_are_refused_and_the_previous_checkpoint_is_named(tmp_path):
    checkpoint.save(tmp_path, 1, parts(1.0), {})
    checkpoint.save(tmp_path, 2, parts(2.0), {})
    file = checkpoint.folder_of(tmp_path, 2) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptRun, match=r"model.safetensors.*checksum.*step 1"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("damage", ["no state", "bad state", "no part"])
def test_incomplete_checkpoint_is_refused(tmp_path, damage):
    folder = checkpoint.save(tmp_path, 1, parts(1.0), {})
    if damage == "no state":
        (folder / "state.json").unlink()
    elif damage == "bad state":
        (folder / "state.json").write_text("{")
    else:
        (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptRun, match="whole checkpoint"):
        checkpoint.load(tmp_path)


def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path):
    checkpoint.save(tmp_path, 1, parts(1.0), {})
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 2, parts(2.0), {"unwritable": object()})
    assert checkpoint.steps(tmp_path) == [1]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_same_step_is_replaced_only_when_it_says_something_else(tmp_path):
    checkpoint.save(tmp_path, 1, parts(1.0), {"done": False})
    checkpoint.save(tmp_path, 1, parts(1.0), {"done": True})
    assert checkpoint.load(tmp_path)[1]["done"] is True
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.pop("bias"), "missing.*bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected.*extra"),
        (lambda t: t.update(bias=torch.zeros(9)), "shaped.*bias"),
    ],
)
def test_strict_loading_names_the_key(change, word):
    tensors = {k: v.clone() for k, v in nn.Linear(2, 2).state_dict().items()}
    change(tensors)
    with pytest.raises(CorruptRun, match=word):
        checkpoint.load_strictly(nn.Linear(2, 2), tensors, "here")


def test_optimizer_state_survives(tmp_path):
    def made() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()

    straight, optimizer = made()
    step(straight, optimizer)
    tensors, groups = checkpoint.optimizer_parts(optimizer)
    saved = {k: v.clone() for k, v in straight.state_dict().items()}
    checkpoint.save(tmp_path, 1, {"model": saved, "optimizer": tensors}, {"groups": groups})
    step(straight, optimizer)

    resumed, other = made()
    loaded, state = checkpoint.load(tmp_path)
    checkpoint.load_strictly(resumed, loaded["model"], tmp_path)
    checkpoint.load_optimizer(other, loaded["optimizer"], json.loads(json.dumps(state["groups"])))
    step(resumed, other)
    assert torch.equal(straight.weight, resumed.weight)
    assert torch.equal(straight.bias, resumed.bias)
