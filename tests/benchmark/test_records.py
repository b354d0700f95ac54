"""Append-only records: the chain shows what was edited, removed or put between; other content is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.benchmark.records import SCHEMA, append, read
from engine.errors import InputError


def record(k: int) -> dict:
    return {
        "schema": SCHEMA, "track": "t", "name": f"n{k}", "seed": k, "status": "failed", "data_sha256": "0",
        "split_sha256": "1",
    }  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "records.jsonl"
    for k in range(4):
        append(made, record(k))
    return made


def test_what_was_appended_is_read_in_order(path: Path) -> None:
    made, broken = read(path)
    assert [r["name"] for r in made] == ["n0", "n1", "n2", "n3"]
    assert broken == []
    assert made[0]["previous"] == "0" * 64


def test_an_edited_line_breaks_the_chain_after_it(path: Path) -> None:
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace('"n1"', '"n9"')
    path.write_text("\n".join(lines) + "\n")
    assert read(path)[1] == [3]


def test_a_removed_and_a_moved_line_break_it(path: Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    assert read(path)[1] == [2]
    path.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    assert read(path)[1] == [1, 2, 3]


def test_other_content_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing there"):
        read(tmp_path / "absent.jsonl")
    whole = path.read_text()
    path.write_text(whole + "{}\n")
    with pytest.raises(InputError, match="line 5"):
        read(path)
    path.write_text(whole + json.dumps({"schema": SCHEMA}) + "\n")
    with pytest.raises(InputError, match="no data_sha256"):
        read(path)
    path.write_text(whole[:-1])
    with pytest.raises(InputError, match="whole lines"):
        append(path, record(5))
    path.write_text("")
    with pytest.raises(InputError, match="empty"):
        read(path)
