"""The log: JSON lines that survive a resume, no NaN in JSON, silence on other ranks."""

from __future__ import annotations

import json
import math
import sys

import pytest

from engine.errors import Unsupported
from engine.training.log import Log


def test_lines_are_appended_and_are_json(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    Log(path).event("a", loss=0.5, step=1)
    Log(path).event("b", loss=math.nan)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["a", "b"]
    assert lines[0]["loss"] == 0.5
    assert lines[1]["loss"] is None
    captured = capsys.readouterr()
    assert captured.out == ""  # standard output belongs to --json
    assert "loss 0.5" in captured.err


def test_other_ranks_write_nothing(tmp_path, capsys):
    calls = []
    log = Log(tmp_path / "log.jsonl", enabled=False, progress=lambda *a: calls.append(a))
    log.event("a")
    log.bar("stage", 0.5)
    assert not (tmp_path / "log.jsonl").exists()
    assert capsys.readouterr().err == ""
    assert calls == []


def test_progress_is_given_in_per_cent(tmp_path):
    calls = []
    Log(tmp_path / "log.jsonl", progress=lambda *a: calls.append(a)).bar("flow", 0.256)
    assert calls == [("flow", 25, 100)]


def test_numbers_of_a_step_go_to_tensorboard_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(tmp_path / "log.jsonl", board=tmp_path / "board")
    log.event("flow", step=3, loss=0.5, stage="x")
    log.event("flow", step=4, loss=math.nan)
    log.event("done", seconds=1.0)
    read = EventAccumulator(str(tmp_path / "board"))
    read.Reload()
    assert read.Tags()["scalars"] == ["flow/loss"]
    assert [(e.step, e.value) for e in read.Scalars("flow/loss")] == [(3, 0.5)]


def test_tensorboard_where_there_is_none_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(Unsupported, match=r"engine\[tensorboard\]"):
        Log(tmp_path / "log.jsonl", board=tmp_path / "board")
