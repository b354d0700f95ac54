import pytest

from perf import record as records
from perf.record import Record


def rows(history) -> list[Record]:
    return records.read(history)


def test_run_keeps_a_record_of_everything(checkout, perf, tmp_path):
    (checkout / "perf" / "bench_bad.py").write_text("import no_such_module\n")
    history = tmp_path / "history"
    said = perf("run", "--peers", "--curves", "--no-limits", "--root", checkout, "--history", history)
    (file,) = history.rglob("*.jsonl")
    assert file.parent.name == records.describe_machine()["name"]
    assert str(file) in said
    found = rows(history)
    assert [row.kind for row in found] == ["file"] + ["case"] * 7 + ["exponent"]
    assert len({row.id for row in found}) == 9
    by_key = {row.key: row for row in found if row.kind != "case" or row.curve is None}
    assert "long" not in str(by_key.keys())
    assert "1 cases are left out" in said

    total = by_key["tiny.total[n=20000]"]
    assert (total.status, total.clock, total.dirty) == ("ok", "cpu", True)
    assert total.seconds.n == 5
    assert total.seconds.p20 <= total.seconds.p50 <= total.seconds.p80
    assert total.rate.p50 == pytest.approx(2e4 / total.seconds.p50, rel=1e-3)
    assert total.bench.path == "perf/bench_tiny.py"
    assert {"python", "numpy", "numba", "llvmlite", "torch", "triton"} <= set(total.versions)
    peers = {peer.name: peer for peer in total.peers}
    assert {name: peer.status for name, peer in peers.items()} == {
        "builtin": "ok", "greedy": "ok", "wrong": "differs", "absent": "missing", "raising": "failed",
    }  # fmt: skip
    assert (peers["builtin"].met, peers["builtin"].compared, peers["builtin"].version) == (True, True, "7")
    assert peers["builtin"].ratio.p50 == pytest.approx(peers["builtin"].seconds.p50 / total.seconds.p50, rel=0.5)
    assert (peers["greedy"].met, peers["greedy"].seconds.p50, peers["greedy"].peak_bytes) == (False, 1.0, 4096)
    assert peers["wrong"].met is False, "a different result meets no goal, however fast"
    assert peers["absent"].why == "not on this machine"
    assert peers["absent"].ratio is None

    assert by_key["tiny.broken[n=20000]"].why == "ValueError: cannot read secret.bed"
    assert by_key["tiny.elsewhere[n=20000]"].why == "ModuleNotFoundError: No module named 'engine.errors'"
    assert "no_such_module" in by_key["perf/bench_bad.py"].why
    fit = by_key["tiny.total by n"].fit
    assert len(fit.points) == 3
    assert 0.6 < fit.exponent < 1.4
    assert fit.points == [row.id for row in found if row.kind == "case" and row.curve == "tiny.total by n"]
    assert str(checkout) not in file.read_text()


def test_two_runs_are_two_files_and_a_clean_commit_is_verified(checkout, perf, git, tmp_path):
    history = checkout / "perf" / "history"
    perf("run", "tiny.newer", "--no-limits", "--repeats", "5", "--root", checkout)
    (file,) = history.rglob("*.jsonl")
    (row,) = rows(history)
    assert row.dirty is False, "records themselves do not make a checkout dirty"
    assert "the history is sound" in perf("verify", "--root", checkout)
    with pytest.raises(FileExistsError):
        records.Log(history, file.parent.name, file.stem)

    changed = row.model_copy(update={"bench": row.bench.model_copy(update={"sha256": "0" * 64})})
    file.write_text(records.to_line(changed) + "\n")
    assert "is not what was run" in perf("verify", "--root", checkout, status=2)


def test_what_the_budget_left_no_time_for_is_a_record(checkout, perf, tmp_path):
    perf("run", "newer", "--no-limits", "--budget-seconds", "0", "--root", checkout, "--history", tmp_path / "h")
    (row,) = rows(tmp_path / "h")
    assert (row.status, row.why) == ("not run", "the budget of 0 s was spent")


def test_cases_with_a_goal_come_before_a_budget_can_end(checkout, perf, tmp_path):
    (checkout / "perf" / "bench_tiny.py").write_text(
        "from perf.case import Case, Peer\ndef cases():\n"
        "    peers = {'compared': (Peer('p', len),), 'plain': (), 'promised': (Peer('p', len, goal=1),)}\n"
        "    return [Case(f'tiny.{n}', {}, 1, 'x', lambda: [0], len, peers=p) for n, p in peers.items()]\n"
    )
    perf("run", "--no-limits", "--root", checkout, "--history", tmp_path / "h")
    names = [row.case for row in rows(tmp_path / "h") if row.bench.path == "perf/bench_tiny.py"]
    assert names == ["tiny.promised", "tiny.plain", "tiny.compared"]


def test_a_case_that_never_ends_is_stopped(checkout, perf, tmp_path):
    (checkout / "perf" / "bench_tiny.py").write_text(
        "import time\nfrom perf.case import Case\ndef cases():\n"
        "    return [Case('tiny.hang', {}, 1, 'x', lambda: 0, lambda _: time.sleep(60))]\n"
    )
    perf("run", "--no-limits", "--case-seconds", "2", "--root", checkout, "--history", tmp_path / "h")
    (row,) = rows(tmp_path / "h")
    assert (row.status, row.why) == ("failed", "ran past 2 s")


def test_no_case_matches(checkout, perf, tmp_path):
    said = perf("run", "nothing", "--root", checkout, "--history", tmp_path / "h", status=2)
    assert said == "no case matches 'nothing'\n"
    assert "only with --all" in perf("run", "long", "--root", checkout, "--history", tmp_path / "h", status=2)
    assert not (tmp_path / "h").exists()


def test_base_and_head_in_turn(checkout, perf, git):
    work = checkout / "engine" / "work.py"
    work.write_text(
        "def total(n):\n    return sum(range(n)) + sum(k for k in range(2 * n)) - sum(k for k in range(2 * n))\n"
    )
    said = perf("compare", "HEAD", "total", "--root", checkout, "--repeats", "9", status=3)
    assert said.startswith("tiny.total[n=20000]: slower (")
    assert "long" not in said

    git(checkout, "commit", "-qam", "slow, and newer is gone")
    work.write_text("def total(n):\n    return n * (n - 1) // 2\n\ndef newer(n):\n    return n\n")
    lines = perf("compare", "HEAD", "--root", checkout, "--repeats", "9").splitlines()
    assert lines[0].startswith("tiny.total[n=20000]: faster (")
    assert lines[1].startswith("tiny.broken[n=20000]: failed: ValueError")
    assert lines[2].startswith("tiny.newer[n=20000]: missing in base: ImportError")
    assert len(git(checkout, "worktree", "list").splitlines()) == 1
    assert "git has no worktree of 'nowhere'" in perf("compare", "nowhere", "--root", checkout, status=2)
