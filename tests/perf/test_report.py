import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from perf import record as records
from perf import report
from perf.record import Record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RUNS = ("20260101T000000Z-aaaaaaa", "20260102T000000Z-bbbbbbb", "20260103T000000Z-ccccccc")


def spread(middle):
    return {"p20": middle * 0.95, "p50": middle, "p80": middle * 1.1, "n": 5}


def made(number, run, machine="quick", **fields):
    common = {
        "schema": 1,
        "id": f"{run}-{number:03d}",
        "run": run,
        "time": f"{run[:4]}-{run[4:6]}-{run[6:8]}T00:00:00Z",
        "kind": "case",
        "status": "ok",
        "commit": run.split("-")[1] + "0" * 33,
        "dirty": False,
        "versions": {"python": "3.11", "numpy": "2"},
        "machine": {
            "name": machine,
            "cpu": f"{machine} processor",
            "cores": 2,
            "memory_gib": 23.5,
            "gpus": [],
            "flags": ["avx2"],
        },
    }
    return Record.model_validate({**common, **fields})


def timed(number, run, case, seconds, peers=(), size=None, **fields):
    size = size or {"sites": 10000, "haplotypes": 5008}
    return made(
        number,
        run,
        case=case,
        key=f"{case}[{size}]",
        size=size,
        work=5e7,
        unit="pairs",
        seconds=spread(seconds),
        peak_bytes=400_000_000,
        rate=spread(5e7 / seconds),
        peers=list(peers),
        floor_ops=4e9,
        limit="popcount",
        limit_share=0.8,
        copy_share=0.02,
        **fields,
    )


def peer(name, seconds, ratio, goal=None, **fields):
    met = None if goal is None else ratio >= goal
    return {
        "name": name,
        "status": "ok",
        "seconds": spread(seconds),
        "ratio": spread(ratio),
        "goal": goal,
        "met": met,
        "compared": True,
        "version": "2.0.0-a.6.9 AVX2",
        **fields,
    }


def history():
    """Three runs of one machine and one of another: better and worse, missing, failed, not run, differing, a curve."""
    rows = []
    for k, run in enumerate(RUNS):
        ours = 0.4 / (k + 1)
        plink = peer(
            "plink2 --r2-phased", 4.2, 4.2 / ours, 9, note="user CPU seconds less those with --freq", peak_bytes=10**9
        )
        faiss = peer("faiss.IndexBinaryFlat", 0.7, 0.7 / 0.3, 3)
        missing = {"name": "kalis", "status": "missing", "why": "not on <this> machine", "goal": 5.0}
        differs = peer("torch", 0.2, 0.6, 0.5, status="differs", met=False, why="AssertionError: 3 of 5 & more")
        rows += [
            made(
                1,
                run,
                kind="limits",
                key="limits@1",
                case="limits",
                limits={"copy": 2.4e10, "popcount": 1.9e10, "int8_gemm": None},
            ),
            timed(2, run, "ld.matrix_phased", ours, [plink, missing]),
            timed(
                3,
                run,
                "nearest.hamming_topk",
                0.3,
                [faiss, differs],
                {"queries": 5008, "database": 5008, "bits": 10000},
            ),
            made(
                4,
                run,
                key="hmm.forward",
                case="hmm.forward",
                status="failed",
                why="ValueError: <no> states",
                work=1,
                unit="cells",
            ),
        ]
        points = [
            timed(5 + j, run, "ld.matrix_phased", 1e-8 * n**1.98, size={"sites": n}, curve="ld by sites")
            for j, n in enumerate((1000, 2000, 4000))
        ]
        fit = {"axis": "sites", "exponent": 1.98, "low": 1.9, "high": 2.06, "points": [point.id for point in points]}
        rows += [
            *points,
            made(9, run, kind="exponent", key="ld by sites(sites)", case="ld by sites", curve="ld by sites", fit=fit),
        ]
    rows.append(
        made(10, RUNS[2], key=rows[1].key, case=rows[1].case, size=rows[1].size, status="not run", why="no budget")
    )
    rows.insert(
        0,
        timed(
            1,
            "20251231T000000Z-9999999",
            "ld.matrix_phased",
            3.0,
            machine="slow",
        ),
    )
    return rows


def test_latest_record_of_every_case():
    rows = [row for row in history() if row.machine["name"] == "quick"]
    found = {row.case: row for row in report.latest(rows)}
    assert list(found) == ["hmm.forward", "ld.matrix_phased", "nearest.hamming_topk"]
    assert found["ld.matrix_phased"].id == f"{RUNS[2]}-002", "not run does not replace a figure"
    assert report.machines(history()) == ["quick", "slow"]


def test_readme_table_names_its_records():
    lines = report.readme([row for row in history() if row.machine["name"] == "quick"]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert f"| 31.5 (29.9 to 34.6) | 9 | `{RUNS[2]}-002` |" in lines[2]
    assert "| 2.33 (2.22 to 2.57) | 3, not met |" in lines[4]
    assert "missing: not on <this> machine" in lines[3]
    assert "| 5, not measured |" in lines[3]
    assert "results differ" in lines[5]


def test_command_writes_table_and_page(perf, tmp_path):
    for row in history():
        file = tmp_path / "h" / row.machine["name"] / f"{row.run}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            stream.write(records.to_line(row) + "\n")
    said = perf("report", "--history", tmp_path / "h", "--out", tmp_path / "page.html")
    for words in (
        "plink2 --r2-phased x31.5",
        "goal 3 NOT met",
        "kalis missing: not on <this> machine",
        "sites^1.98",
        "ValueError: <no> states",
    ):
        assert words in " ".join(said.split())
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r'(src|href)="(?!#|data:)', page), "nothing is fetched"
    assert "<no>" not in page
    assert perf("report", "--readme", "--machine", "slow", "--history", tmp_path / "h").count("\n") == 2
    assert "no records of machine none; there are quick, slow" in perf(
        "report", "--machine", "none", "--history", tmp_path / "h", status=2
    )
    assert "no records yet" in perf("report", "--history", tmp_path / "empty", status=2)


CHECK = """<script>addEventListener('load',()=>{const d=document.querySelector('iframe').contentDocument,
 w=d.documentElement,out={};
out.overflow=w.scrollWidth-w.clientWidth;out.rows=d.querySelectorAll('tbody tr').length;
out.drawings=[...d.querySelectorAll('figure svg')].map(s=>{const r=s.getBoundingClientRect();
 return [r.width,r.height,s.querySelectorAll('path,use').length]});
const p=document.createElement('pre');p.id='out';p.textContent=JSON.stringify(out);document.body.append(p)})</script>"""


class Output(HTMLParser):
    """Text of the element with id "out"."""

    def __init__(self):
        super().__init__()
        self.inside, self.text = False, ""

    def handle_starttag(self, tag, attrs):
        self.inside = self.inside or ("id", "out") in attrs

    def handle_data(self, data):
        self.text += data if self.inside else ""

    def handle_endtag(self, tag):
        self.inside = False


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 420])
def test_page_in_a_browser(tmp_path, width):
    """Every plot is drawn, nothing sticks out sideways, and the console stays silent."""
    (tmp_path / "page.html").write_text(report.page(history()))
    frame = f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>'
    (tmp_path / "check.html").write_text(f"<!doctype html><body>{frame}{CHECK}")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-sync",
        "--disable-component-update",
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--allow-file-access-from-files",
        "--virtual-time-budget=5000",
        "--dump-dom",
        (tmp_path / "check.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    reader = Output()
    reader.feed(done.stdout)
    found = json.loads(reader.text)
    assert found["overflow"] <= 0
    assert found["rows"] == 4
    assert len(found["drawings"]) == 5  # ratios, two cases of one machine and one of the other, one curve
    for wide, high, marks in found["drawings"]:
        assert min(wide, high) > 80
        assert marks > 5
