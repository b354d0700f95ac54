"""A whole comparison on a tiny panel: records, table, verification; tampering is named; failures are rows."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from engine.benchmark import records
from engine.benchmark.entrants import enter
from engine.benchmark.run import run_limited, score_entries
from engine.benchmark.verify import verify
from engine.cli import app
from engine.errors import InputError, UsageError
from engine.genomics.panel import read_panel, write_panel


@pytest.fixture(scope="module")
def compared(genotype_track, tmp_path_factory) -> Path:
    """Folder of `engine benchmark run` with one seed; every entrant in a process of its own."""
    track, data = genotype_track
    out = tmp_path_factory.mktemp("run") / "out"
    said = CliRunner().invoke(
        app, ["benchmark", "run", str(track), "--data", str(data), "--out", str(out), "--seeds", "1", "--json"]
    )
    assert said.exit_code == 0, said.output
    result = json.loads(said.stdout)
    assert (result["scored"], result["failed"]) == (4, 0)
    return out


@pytest.fixture
def copied(compared: Path, tmp_path: Path) -> Path:
    for name in ("entries", "records.jsonl"):
        source = compared / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, tmp_path / name)
    return tmp_path


def finding(record: dict, name: str) -> float:
    return next(f["value"] for f in record["findings"] if f["name"] == name)


def test_controls_are_ranked_as_they_must_be(compared: Path) -> None:
    made = {r["name"]: r for r in records.read(compared / "records.jsonl")[0]}
    assert list(made) == ["ceiling", "copycat", "marginals", "markov"]
    ld_r = {name: finding(record, "ld_r") for name, record in made.items()}
    assert min(ld_r["ceiling"], ld_r["copycat"]) > 0.4 > 0.1 > max(ld_r["markov"], ld_r["marginals"]), ld_r
    assert finding(made["copycat"], "exact_copies") == 56
    assert finding(made["ceiling"], "exact_copies") == 0
    assert finding(made["copycat"], "aats_train") < 0.35 < finding(made["ceiling"], "aats_train")
    shares = {
        name: next(f["value"] for f in r["audit"]["findings"] if f["name"] == "copy_share_at_5_percent")
        for name, r in made.items()
    }
    assert shares["copycat"] > 0.8 > 0.3 > shares["ceiling"]
    assert made["copycat"]["audit"]["verdict"] != "pass"


def test_a_record_is_whole(compared: Path, genotype_track) -> None:
    record = records.read(compared / "records.jsonl")[0][3]
    assert record["control"] is False
    assert record["cost_by"] == "the engine"
    assert record["trained_on_track"]
    assert record["n"] == {"train": 150, "test": 90, "samples": 56, "sites": 400}
    assert record["entry"]["peak_memory_bytes"] > 50e6
    assert record["entry"]["declared"]["test_nats"] < 0
    assert len(record["lockfile_sha256"]) == 64
    assert record["machine"]["cpu"]
    text = (compared / "records.jsonl").read_text()
    assert not any(person in text for person in ("P000", "P149"))  # nothing of a person
    assert str(compared) not in text
    table = (compared / "table.md").read_text()
    assert "| *ceiling* | 1 |" in table
    assert "| **markov** | 1 |" in table


def test_a_finished_run_is_not_run_again(compared: Path, genotype_track) -> None:
    track, data = genotype_track
    before = (compared / "records.jsonl").read_bytes()
    said = CliRunner().invoke(
        app, ["benchmark", "run", str(track), "--data", str(data), "--out", str(compared), "--seeds", "1", "--json"]
    )
    assert said.exit_code == 0, said.output
    assert (compared / "records.jsonl").read_bytes() == before


def test_verify_agrees(compared: Path, genotype_track) -> None:
    track, data = genotype_track
    said = CliRunner().invoke(
        app,
        ["benchmark", "verify", str(compared / "records.jsonl"), "--data", str(data), "--track", str(track), "--json"],
    )
    assert said.exit_code == 0, said.output
    result = json.loads(said.stdout)
    assert result["verified"] == 4
    assert result["differences"] == result["not_checked"] == []


def test_verify_names_a_tampered_sample_and_a_tampered_figure(copied: Path, genotype_track) -> None:
    track, data = genotype_track
    path = copied / "entries" / "markov-seed0" / "samples.bcf"
    panel = read_panel(path)
    panel.bits_lw[5, 0] ^= np.uint64(0xFF)
    write_panel(panel, path)
    lines = (copied / "records.jsonl").read_text().splitlines()
    ceiling = json.loads(lines[0])
    next(f for f in ceiling["findings"] if f["name"] == "ld_r")["value"] += 0.01
    lines[0] = json.dumps(ceiling, sort_keys=True)
    (copied / "records.jsonl").write_text("\n".join(lines) + "\n")
    shutil.rmtree(copied / "entries" / "copycat-seed0")
    result = verify(copied / "records.jsonl", data, track_file=track)
    what = {(d["line"], d["what"]) for d in result["differences"]}
    assert (1, "ld_r value") in what
    assert (2, "chain") in what  # the line after the edited one
    assert {(4, "samples"), (4, "samples files")} <= what
    assert [n["line"] for n in result["not_checked"]] == [2]
    assert result["verified"] == 1  # the marginals
    said = CliRunner().invoke(
        app, ["benchmark", "verify", str(copied / "records.jsonl"), "--data", str(data), "--track", str(track)]
    )
    assert said.exit_code == 3
    assert "line 1: ld_r value" in said.output


def test_verify_survives_a_mangled_record(copied: Path, genotype_track) -> None:
    track, data = genotype_track
    lines = (copied / "records.jsonl").read_text().splitlines()
    mangled = [json.loads(line) for line in lines[:2]]
    del mangled[0]["audit"]
    mangled[1]["findings"][0]["interval"] = "wide"
    (copied / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in mangled))
    result = verify(copied / "records.jsonl", data, track_file=track)
    assert {(1, "record"), (2, "ld_r interval")} <= {(d["line"], d["what"]) for d in result["differences"]}
    assert result["verified"] == 0


def test_verify_makes_samples_again_where_asked(copied: Path, genotype_track) -> None:
    track, data = genotype_track
    for name in ("ceiling", "copycat", "marginals"):
        shutil.rmtree(copied / "entries" / f"{name}-seed0")
    first = (copied / "records.jsonl").read_text().splitlines(keepends=True)[:2]
    (copied / "records.jsonl").write_text("".join(first))
    result = verify(copied / "records.jsonl", data, track_file=track, remake=True)
    assert result["verified"] == 2, result


def test_verify_names_other_data(copied: Path, genotype_track, tmp_path_factory) -> None:
    track, data = genotype_track
    other = tmp_path_factory.mktemp("other")
    for name in ("panel.bcf", "samples.tsv"):
        shutil.copyfile(data / name, other / name)
    panel = read_panel(data / "panel.bcf")
    panel.bits_lw[0] ^= panel.bits_lw[1]
    write_panel(panel, other / "panel.bcf")
    first = (copied / "records.jsonl").read_text().splitlines(keepends=True)[:1]
    (copied / "records.jsonl").write_text("".join(first))
    what = {d["what"] for d in verify(copied / "records.jsonl", other, track_file=track)["differences"]}
    assert {"data_sha256", "train_sha256", "ld_r value"} <= what
    assert "split_sha256" not in what  # the same people


# ---- failures --------------------------------------------------------------------------------------------------------


def entry_of(compared: Path, into: Path, **values: object) -> Path:
    """A copy of the Markov chain's entry as if another tool had handed it in."""
    shutil.copytree(compared / "entries" / "markov-seed0", into)
    entry = json.loads((into / "entry.json").read_text())
    (into / "entry.json").write_text(json.dumps({**entry, "name": "other_tool", **values}))
    return into


def test_other_tools_enter_and_failures_are_rows(compared: Path, genotype_track, tmp_path: Path) -> None:
    track, data = genotype_track
    good = entry_of(compared, tmp_path / "good", training_data_sha256="0" * 64)
    late = entry_of(compared, tmp_path / "late", seed=1, training_seconds=112.0, budget_of="wall")
    few = entry_of(compared, tmp_path / "few", seed=2)
    write_panel(read_panel(few / "samples.bcf").select(samples=slice(0, 20)), few / "samples.bcf")
    odd = entry_of(compared, tmp_path / "odd", seed=3)
    write_panel(read_panel(odd / "samples.bcf").select(sites=slice(0, 300)), odd / "samples.bcf")
    broken = entry_of(compared, tmp_path / "broken", seed=4)
    (broken / "samples.bcf").write_bytes(b"BCF\2\2 and no more")
    out = tmp_path / "records.jsonl"
    result = score_entries(track, data, [good, late, few, odd, broken], out, split=compared / "split")
    assert (result["scored"], result["failed"]) == (1, 4)
    reasons = [row["reason"] for row in result["rows"]]
    assert reasons[1] == "over budget: 112 wall s of training, 100 allowed"
    assert reasons[2] == "expected 28 people, got 20"
    assert "same sites" in reasons[3]
    assert reasons[4]
    assert str(tmp_path) not in out.read_text()
    made, _ = records.read(out)
    assert made[0]["cost_by"] == "its authors"
    assert made[0]["trained_on_track"] is False
    said = CliRunner().invoke(app, ["benchmark", "table", str(out)])
    assert "**other_tool** † | 1 failed | over budget" in said.output


def test_a_bad_entry_refuses_the_whole_command(compared: Path, genotype_track, tmp_path: Path) -> None:
    track, data = genotype_track
    good = entry_of(compared, tmp_path / "good")
    bad = entry_of(compared, tmp_path / "bad", colour="red")
    with pytest.raises(InputError, match="'colour'"):
        score_entries(track, data, [good, bad], tmp_path / "r.jsonl", split=compared / "split")
    assert not (tmp_path / "r.jsonl").exists()


def test_crashes_and_endless_processes_have_reasons() -> None:
    assert run_limited([sys.executable, "-c", "pass"], 60, 1) == ""
    crash = run_limited([sys.executable, "-c", "raise MemoryError('no room in /home/anna/x')"], 60, 1)
    assert crash == "exit code 1: MemoryError: no room in ..."
    assert run_limited([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], 60, 1) == "ended by signal 9"
    begun = time.monotonic()
    code = "import subprocess; subprocess.run(['sleep', '600'])"
    assert run_limited([sys.executable, "-c", code], 1.0, 1).startswith("over time: still running after 1 s")
    assert time.monotonic() - begun < 300  # its children are ended with it


def test_a_limit_of_the_processor_does_not_count_waiting() -> None:
    assert run_limited([sys.executable, "-c", "import time; time.sleep(2.5)"], 2.0, 1, cpu=True) == ""
    busy = run_limited([sys.executable, "-c", "while True: pass"], 1.0, 1, cpu=True)
    assert busy == "over time: still running after 1 s of the processor, ended"


def test_a_budget_counts_by_its_own_clock(compared: Path, genotype_track, tmp_path: Path) -> None:
    track, data = genotype_track
    slow = entry_of(compared, tmp_path / "slow", training_seconds=900.0, training_cpu_seconds=90.0, budget_of="cpu")
    over = entry_of(
        compared, tmp_path / "over", seed=1, training_seconds=90.0, training_cpu_seconds=112.0, budget_of="cpu"
    )
    unsaid = entry_of(compared, tmp_path / "unsaid", seed=2, training_cpu_seconds=None, budget_of="cpu")
    result = score_entries(track, data, [slow, over], tmp_path / "r.jsonl", split=compared / "split")
    assert [row["reason"] for row in result["rows"]] == ["", "over budget: 112 cpu s of training, 100 allowed"]
    with pytest.raises(InputError, match="needs training_cpu_seconds"):
        score_entries(track, data, [unsaid], tmp_path / "r.jsonl", split=compared / "split")


def test_a_crashed_entrant_is_a_row_and_the_run_goes_on(genotype_track, tmp_path: Path, write_track) -> None:
    """More samples than the fresh side has people: the ceiling cannot be made."""
    import yaml

    from engine.benchmark.run import run

    path, data = genotype_track
    values = yaml.safe_load(path.read_text()) | {"samples": 40, "name": "greedy"}
    track = write_track(tmp_path, **values)
    monkey = pytest.MonkeyPatch()
    monkey.setattr("engine.benchmark.run.CONTROLS", ("ceiling",))
    try:
        result = run(track, data, tmp_path / "out", entrants=["ceiling"], seeds=1)
    finally:
        monkey.undo()
    assert (result["scored"], result["failed"]) == (0, 1)
    assert "at least 40 people on the side 'fresh'" in result["table"]


def test_usage(genotype_sides, genotype_track, tmp_path: Path) -> None:
    from engine.benchmark.run import run

    track, sides = genotype_sides
    with pytest.raises(UsageError, match="'markov'"):
        enter(track, "markow", sides, tmp_path / "x", seed=0, budget_seconds=1)
    with pytest.raises(UsageError, match="entrant for genotypes"):
        run(genotype_track[0], genotype_track[1], tmp_path / "y", entrants=["monai_ldm"])
    with pytest.raises(UsageError, match="budget"):
        run(genotype_track[0], genotype_track[1], tmp_path / "y", budget_seconds=0)
    assert not (tmp_path / "y").exists()
    enter(track, "hapnest", sides, tmp_path / "h", seed=0, budget_seconds=1)
    assert read_panel(tmp_path / "h" / "samples.bcf").n_haplotypes == 56
