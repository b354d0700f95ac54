"""The log: JSON lines that survive a resume, no NaN in JSON, silence on other ranks."""

from __future__ import annotations

import json
import math

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
