import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from perf import child, find, measure
from perf.case import Case, Peer, Timed


def case(run, *peers, **fields):
    return Case("a.b", {"n": 1}, 1.0, "things", lambda: 0, run, tuple(peers), **fields)


def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_one_thread_is_timed_in_cpu_seconds_with_children_and_more_in_wall_seconds():
    program = "import time\nend = time.process_time() + 0.1\nwhile time.process_time() < end: pass"

    def run(_):
        subprocess.run([sys.executable, "-c", program], check=True)
        time.sleep(0.15)

    assert measure.timed(run, None, threads=1)[0] >= 0.1
    assert measure.timed(lambda _: time.sleep(0.15), None, threads=1)[0] < 0.05
    assert measure.timed(lambda _: time.sleep(0.15), None, threads=2)[0] >= 0.15


def test_ours_and_peers_take_turns_and_both_are_warmed_up():
    order = []
    peer = Peer("them", lambda _: (order.append("them"), spin(0.02)))
    ours, rows = measure.measure(case(lambda _: (order.append("ours"), spin(0.02)), peer), peers=True, repeats=3)
    assert order[-6:] == ["ours", "them"] * 3
    assert len(ours.seconds) == len(rows[0].seconds) == 3
    order.clear()
    measure.measure(case(lambda _: order.append("ours"), peer), peers=False, repeats=1)
    assert "them" not in order


def test_short_work_is_repeated_within_a_reading():
    calls = []
    ours, _ = measure.measure(case(lambda _: (calls.append(1), spin(0.001))), peers=False, repeats=2)
    assert len(calls) > 10
    assert 0.001 <= min(ours.seconds) < 0.005


def test_every_kind_of_peer_has_its_row():
    def refuse(ours, theirs):
        raise AssertionError("not the same")

    peers = (
        Peer("missing", lambda _: 0, missing=lambda: "no such program"),
        Peer("raises", lambda _: 1 / 0),
        Peer("differs", lambda _: spin(0.02), same=refuse),
        Peer("timed", lambda _: Timed(2.5, "x", "from its log", 123), same=lambda ours, theirs: None),
        Peer(
            "other input",
            lambda text: (spin(0.02), text)[1],
            prepare=lambda n: f"{n}!",
            same=lambda a, b: None if b == "0!" else 1 / 0,
        ),
    )
    _, rows = measure.measure(case(lambda _: spin(0.02), *peers), peers=True, repeats=2)
    by_name = {row.name: row for row in rows}
    assert [row.status for row in rows] == ["missing", "failed", "differs", "ok", "ok"]
    assert by_name["missing"].why == "no such program"
    assert by_name["raises"].why == "ZeroDivisionError: division by zero"
    assert by_name["differs"].why == "AssertionError: not the same"
    assert by_name["timed"].seconds == [2.5, 2.5]
    assert (by_name["timed"].note, by_name["timed"].peak_bytes) == ("from its log", 123)
    assert [row.compared for row in rows] == [False, False, True, True, True]


def test_a_peer_that_fails_later_leaves_the_others_running():
    calls = []

    def late(_):
        calls.append(1)
        spin(0.02)
        if len(calls) > 3:
            raise RuntimeError("out of luck")

    _, rows = measure.measure(
        case(lambda _: spin(0.02), Peer("late", late), Peer("fine", lambda _: spin(0.02))), peers=True, repeats=4
    )
    assert [row.status for row in rows] == ["failed", "ok"]
    assert len(rows[1].seconds) == 4


def test_peak_memory_is_that_of_the_run_alone():
    inputs = np.ones(40_000_000, dtype=np.uint8)

    def run(held):
        time.sleep(0)
        return np.full(20_000_000, held[0])

    memory_case = Case("a.b", {"n": 1}, 1.0, "bytes", lambda: inputs, run)
    ours, _ = measure.measure(memory_case, peers=False, repeats=2)
    assert 19e6 < ours.peak_bytes < 30e6
    later, _ = measure.measure(case(lambda _: np.ones(1_000_000, np.uint8)), peers=False, repeats=1)
    assert later.peak_bytes < 10e6, "an earlier peak does not count"


def test_an_error_is_one_line_without_paths():
    line = measure.one_line(ValueError("cannot read /home/someone/data/x.bed:\n  truncated"))
    assert line == "ValueError: cannot read x.bed: truncated"
    assert len(measure.one_line(ValueError("x" * 1000))) == 300
    assert measure.one_line(ValueError("3/4 of it, rate in pairs/s")) == "ValueError: 3/4 of it, rate in pairs/s"


def test_environment_of_a_child(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "256")
    made = child.environment(2, Path(__file__).parent)
    assert "OPENBLAS_CORETYPE" not in made
    assert "OPENBLAS_L2_SIZE" not in made
    assert {
        made[name] for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    } == {"2"}


def test_equal_inputs_have_one_digest():
    one = {"bits": np.arange(5), "n": 3, "names": ["a", None]}
    assert child.digest(one) == child.digest({"bits": np.arange(5), "n": 3, "names": ["a", None]})
    for other in (
        {**one, "n": 4},
        {**one, "bits": np.arange(5)[::-1].copy()},
        {**one, "bits": np.arange(5, dtype=np.int32)},
    ):
        assert child.digest(one) != child.digest(other)


def test_a_curve_has_one_axis():
    def points(*sizes):
        return [Case("a.b", size, 1.0, "x", lambda: 0, lambda _: 0) for size in sizes]

    assert find.axis(points({"n": 1, "m": 5}, {"n": 2, "m": 5}, {"n": 4, "m": 5})) == "n"
    for wrong in (points({"n": 1}, {"n": 2}), points({"n": 1, "m": 1}, {"n": 2, "m": 2}, {"n": 3, "m": 3}), []):
        with pytest.raises(ValueError, match="along one axis"):
            find.axis(wrong)


def test_curves_are_named_by_case_and_axis():
    class Bench:
        @staticmethod
        def curves():
            points = [Case("a.b", {"n": n, "m": 1}, 1.0, "x", lambda: 0, lambda _: 0) for n in (1, 2, 3)]
            return {"one": points, "two": points} if Bench.twice else {"anything": points}

    Bench.twice = False
    assert list(find.curves(Bench)) == ["a.b by n"]
    Bench.twice = True
    with pytest.raises(ValueError, match="two curves"):
        find.curves(Bench)


def test_patterns():
    assert find.matches(None, "ld.r2[sites=5]")
    assert find.matches("ld", "ld.r2[sites=5]")
    assert find.matches("sites=5", "ld.r2[sites=5]")
    assert find.matches("ld.*", "ld.r2[sites=5]")
    assert not find.matches("ld.?", "ld.r2[sites=5]")
    assert not find.matches("bits", "ld.r2[sites=5]")
