import pytest
from pydantic import ValidationError

from perf import record as records
from perf.record import Record


def made(number=1, run="20260101T000000Z-abcdef0", **fields) -> Record:
    common = {
        "schema": 1, "id": f"{run}-{number:03d}", "run": run, "time": "2026-01-01T00:00:00Z", "kind": "case", "status": "ok",
        "key": "a.b[n=1]", "case": "a.b", "size": {"n": 1}, "work": 10.0, "unit": "pairs",
        "seconds": {"p20": 1.0, "p50": 1.23456789, "p80": 3.0, "n": 5},
        "peers": [{"name": "p", "status": "missing", "why": "not here"}],
        "commit": "abcdef0" + "0" * 33, "dirty": True, "versions": {"python": "3.11"},
        "machine": {"name": "m", "cpu": "c", "cores": 2},
    }  # fmt: skip
    return Record.model_validate({**common, **fields})


def write(history, *rows, name="20260101T000000Z-abcdef0"):
    (history / "m").mkdir(parents=True, exist_ok=True)
    (history / "m" / f"{name}.jsonl").write_text("".join(records.to_line(row) + "\n" for row in rows))


def test_round_trip(tmp_path):
    rows = [made(), made(2, status="failed", why="ValueError: x", seconds=None)]
    write(tmp_path, *rows)
    assert records.read(tmp_path) == rows
    assert rows[0].seconds.p50 == 1.23457, "six digits"


@pytest.mark.parametrize(
    "wrong",
    [
        {"unknown": 1},
        {"schema": 2},
        {"status": "fine"},
        {"work": float("nan")},
        {"seconds": {"p20": 1, "p50": 1, "p80": 1, "n": 0}},
    ],
    ids=str,
)
def test_what_is_no_record_is_refused(wrong):
    with pytest.raises(ValidationError):
        made(**wrong)


def test_verify_names_the_line(tmp_path):
    write(tmp_path, made(), made(2))
    assert records.verify(tmp_path, tmp_path) == ([], [])
    file = tmp_path / "m" / "20260101T000000Z-abcdef0.jsonl"
    file.write_text(file.read_text() + '{"schema": 1}\n' + "nothing\n")
    wrong, _ = records.verify(tmp_path, tmp_path)
    assert [line.split(": ")[0].rsplit(":", 1)[1] for line in wrong] == ["3", "4"]
    write(tmp_path, made(), made())
    assert "is also in" in records.verify(tmp_path, tmp_path)[0][0]
    write(tmp_path, made(run="20260102T000000Z-abcdef0"))
    assert "belongs to run" in records.verify(tmp_path, tmp_path)[0][0]


def test_a_record_without_its_commit_cannot_be_checked(tmp_path):
    write(tmp_path, made(dirty=False, bench={"path": "perf/bench_x.py", "sha256": "0" * 64}))
    wrong, unknown = records.verify(tmp_path, tmp_path)
    assert wrong == []
    assert "no perf/bench_x.py of commit abcdef0" in unknown[0]


def test_git_remembers_what_was_rewritten(checkout, git):
    history = checkout / "perf" / "history"
    first, second = "20260101T000000Z-abcdef0", "20260102T000000Z-abcdef0"
    write(history, made(), name=first)
    write(history, made(run=second), name=second)
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "records")
    assert records.verify(checkout, history)[0] == []
    write(history, made(), made(2), name=first)
    assert records.verify(checkout, history)[0] == [], "lines at the end are no rewriting"
    write(history, made(work=11.0), name=first)
    assert records.verify(checkout, history)[0] == [f"perf/history/m/{first}.jsonl: rewritten since the last commit"]
    (history / "m" / f"{first}.jsonl").unlink()
    assert records.verify(checkout, history)[0] == [f"perf/history/m/{first}.jsonl: deleted since the last commit"]
    write(history, made(work=11.0), name=first)
    (history / "m" / f"{second}.jsonl").unlink()
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "history as one would like it")
    kinds = sorted(line.rsplit(": ", 1)[1].split(" by ")[0] for line in records.verify(checkout, history)[0])
    assert kinds == ["deleted", "rewritten"]
