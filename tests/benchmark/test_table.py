"""The table: intervals by hand, failures as rows, controls first, declared figures marked."""

from __future__ import annotations

import pytest

from engine.benchmark.table import markdown, over_seeds


def finding(name: str, value: float | None, interval: list | None = None, direction: str = "higher") -> dict:
    return {"name": name, "value": value, "interval": interval, "direction": direction, "threshold": None}


def scored(
    name: str, seed: int, value: float, *, control: bool = False, trained_on_track: bool = True, **declared
) -> dict:
    return {
        "track": "nowhere", "name": name, "seed": seed, "control": control, "status": "scored", "reason": "",
        "people": {"train": 5, "test": 3, "fresh": 3}, "samples_wanted": 2, "data_sha256": "d" * 64,
        "split_sha256": "e" * 64, "machine": {"cpu": "a cpu", "memory_gib": 1.0}, "commit": "c" * 40, "modified": True,
        "trained_on_track": trained_on_track, "findings": [finding("ld_r", value, [value - 0.02, value + 0.02])],
        "audit": {"verdict": "pass", "findings": [finding("copy_share_at_1_percent", 0.0, [0, 0.1], "lower")]},
        "entry": {"declared": declared, "training_seconds": 3.0, "peak_memory_bytes": 2**30, "budget_seconds": 9.0,
                  "threads": 1},
    }  # fmt: skip


def failed(name: str, seed: int, reason: str) -> dict:
    return {**scored(name, seed, 0.0), "status": "failed", "reason": reason}


def test_interval_over_seeds_by_hand() -> None:
    """Three seeds: mean 2, deviation 1, t(0.975, 2) = 4.302653."""
    mean, interval = over_seeds([1.0, 2.0, 3.0])
    assert mean == 2
    assert interval == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)
    assert over_seeds([4.0]) == (4.0, None)
    assert over_seeds([4.0, 4.0]) == (4.0, None)


def test_rows() -> None:
    rows = [scored("tool", seed, value, test_nats=-180.5) for seed, value in enumerate((0.8, 0.9, 1.0))]
    rows += [scored("copycat", 0, 0.99, control=True), failed("slow", 0, "over budget: 9 s | 5 allowed")]
    rows += [failed("slow", 1, "over budget: 9 s | 5 allowed"), scored("slow", 2, 0.5, trained_on_track=False)]
    text = markdown(rows)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0].startswith("| generator | seeds | ld_r ↑ | audit: copy_share_at_1_percent ↓ | audit verdict |")
    assert lines[2].startswith("| *copycat* | 1 | 0.99 ± 0.02 |")
    assert lines[3].startswith("| **tool** | 3 | 0.9 [0.652, 1.15] ± 0.02 | 0 ± 0.05 | 3 pass | -180.5 | 3 | 1 |")
    assert lines[4].startswith("| **slow** † | 1 | 0.5 ± 0.02")
    assert lines[5].startswith("| **slow** † | 2 failed | over budget: 9 s / 5 allowed |")
    assert len({line.count("|") for line in lines}) == 1
    assert "† trained on other data" in text
    assert "Commit cccccccccccc+" in text


def test_the_clock_of_the_budget_is_said() -> None:
    row = scored("tool", 0, 0.7)
    row["entry"] |= {"budget_of": "cpu", "training_cpu_seconds": 8.0}
    text = markdown([row])
    assert "| training cpu s |" in text
    assert "Budget: 9 cpu s of training" in text
    assert "| 8 | 1 |" in text
    assert "| training wall s |" in markdown([scored("tool", 0, 0.7)])


def test_of_repeated_records_the_last_counts() -> None:
    text = markdown([failed("tool", 0, "crashed"), scored("tool", 0, 0.7)])
    assert "crashed" not in text
    assert "| **tool** | 1 | 0.7" in text
