"""The report: what a reader sees, that nothing is fetched, and how it lays out in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from engine.audit import AuditPolicy, Finding, Pool, audit
from engine.errors import InputError
from engine.release.report import Section, Table, audit_sections, label, number, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RNG = np.random.default_rng(0)


def everything(path, verdict="pass", **more):
    """A report with one of each kind of figure, long words and long lists."""
    edges = np.linspace(0, 1, 21)
    counts = RNG.integers(1, 50, 20)
    xy = RNG.normal(size=(60, 2))
    group = np.array(["AFR", "EUR", "OTH"] * 20)
    findings = [
        Finding("ld_r", 0.99, (0.98, 0.995), n=3000, floor=0.993, direction="higher", note="over pairs of sites"),
        Finding("exact_copies", 0, n={"rows": 200, "people": 100}, threshold=0, direction="lower", verdict="pass"),
        Finding("longest_run_bp", 638_000, n=4006, unit="bp", floor=621_000, note="W" * 90),
        Finding("copy_share_at_0.1_percent", float("nan"), note="not given: needs 999 people"),
    ]
    sections = [
        Section(
            "Genotypes & structure",
            "First paragraph.\n\nSecond <b>paragraph</b>.",
            findings,
            {
                "pca": {"real": xy, "synthetic": xy + 0.1, "group": {"real": group, "synthetic": group}},
                "ld_decay": {"distance_bp": [100, 1000, 1e5], "real": [0.6, 0.3, 0.1], "synthetic": [0.5, 0.3, 0.1]},
                "af": {"real": edges, "synthetic": edges},
                "sfs": {"real": counts, "synthetic": counts},
            },
        ),
        Section(
            "Scans",
            "",
            [],
            {
                "montage": RNG.integers(0, 256, (8, 30, 24)).astype(np.uint8),
                "histogram_intensity": {"edges": edges, "real": counts, "synthetic": counts},
                "scatter_age": {"kind": "scatter", "x": [1, 2], "y": [3, 4], "x_label": "age (years)"},
                "rho": {"edges": edges, "shares": {"real, unseen": counts, "synthetic": counts}},
                "roc": {"copycat": {"fpr": [0, 0, 1], "tpr": [0, 1, 1], "auc": 1.0}},
            },
            [Table("Controls", ("Control", "Rows", "Must be", "Was"), [("copycat", 200, "failed", "failed")])],
        ),
    ]
    return write_report(
        path, title="A <cohort>", verdict=verdict, summary=findings, sections=sections, facts={"commit": "c0ffee"}, **more
    )


def test_verdict_in_plain_words_comes_first(tmp_path):
    for verdict, words in (("pass", "May be released"), ("fail", "Must not be released"), ("void", "No verdict")):
        page = everything(tmp_path / f"{verdict}.html", verdict, reasons=["Because."]).read_text()
        assert words in page
        assert page.index(words, page.index("<main")) < page.index("Genotypes &amp; structure")
        assert "<li>Because.</li>" in page
    with pytest.raises(InputError, match="a verdict"):
        everything(tmp_path / "x.html", "perhaps")
    assert not (tmp_path / "x.html").exists()


def test_text_is_escaped_and_ids_are_unique(tmp_path):
    page = everything(tmp_path / "r.html").read_text()
    assert "Second &lt;b&gt;paragraph&lt;/b&gt;." in page
    assert "A &lt;cohort&gt;" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert len(wanted) > 20
    assert wanted <= set(ids), "clip paths and markers still find their definitions"


def test_nothing_is_loaded_and_nothing_runs(tmp_path):
    page = everything(tmp_path / "r.html").read_text()
    assert "<script" not in page
    assert not re.search(r"""\b(src|href)=["'](?!data:|#)""", page)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_one_name_for_every_figure_and_landmarks(tmp_path):
    page = everything(tmp_path / "r.html").read_text()
    assert page.count('role="img"') == page.count("<svg") == 8
    assert all(re.findall(r'<img [^>]*alt="([^"]+)"', page))
    for landmark in ("<main", "<nav aria-label", "<footer", "<header", 'class="skip" href="#main"', 'lang="en"'):
        assert landmark in page


def test_values_are_written_for_people():
    assert number(0.0133, "share") == "1.3\u00a0%"
    assert number(0.00364, "share") == "0.36\u00a0%"
    assert number(1.0, "share") == "100.0\u00a0%"
    assert number(638_000, "bp") == "638\u202f000 bp"
    assert number(float("nan")) == "not available"
    assert number(0.12345) == "0.123"
    assert number(-0.0643) == "\u22120.0643"
    assert label("copy_share_at_0.1_percent") == "Flagged as copies at 0.1 % false positives"
    assert label("regional_volume_r") == "Regional volume r"


def test_unknown_figure_names_the_nearest_kind(tmp_path):
    section = Section("S", figures={"histogrm": {"edges": [0, 1], "real": [1]}})
    with pytest.raises(InputError, match="'histogram'"):
        write_report(tmp_path / "r.html", title="T", verdict="none", summary=[], sections=[section])


def audited(seed=0):
    draw = lambda n: RNG.standard_normal((n, 8)).astype(np.float32)  # noqa: E731
    pool = lambda x, tag: Pool("features", x, np.array([f"{tag}{i}" for i in range(len(x))]))  # noqa: E731
    policy = AuditPolicy(control_rows=40, contamination_repeats=10, subsets=1)
    return audit(pool(draw(150), "CANARY-t"), pool(draw(120), "CANARY-h"), pool(draw(80), "s"), policy=policy, seed=seed)


def test_audit_sections_show_controls_and_name_nobody(tmp_path):
    result = audited()
    path = write_report(
        tmp_path / "r.html", title="T", verdict=result.verdict, summary=result.findings[:3], sections=audit_sections(result)
    )
    page = path.read_text()
    assert "CANARY" not in page
    for control in result.controls:
        assert control.name.replace("_", " ") in page
    for finding in result.findings:
        assert html.escape(label(finding.name)) in page
    again = write_report(
        tmp_path / "s.html", title="T", verdict=result.verdict, summary=result.findings[:3], sections=audit_sections(result)
    )
    assert again.read_text() == page


# ------------------------------------------------------------------------------------------------------ in a browser

CHECK = r"""<script>addEventListener('load',async()=>{await new Promise(r=>setTimeout(r,50));
const d=document, f=d.querySelector('iframe'), w=f.contentDocument, out={};
out.overflow=w.documentElement.scrollWidth-w.documentElement.clientWidth;
out.width=w.documentElement.clientWidth;
out.wide=[...w.body.querySelectorAll('*')].filter(e=>!e.closest('svg')&&!e.closest('.skip')&&
 !(e.closest('thead')&&out.width<700)&&e.getBoundingClientRect().right>out.width+1).map(e=>e.tagName+'.'+e.className);
out.images=[...w.images].map(i=>i.naturalWidth);
out.drawings=[...w.querySelectorAll('figure svg')].map(s=>{const b=s.getBBox(),r=s.getBoundingClientRect();
 return [b.width,b.height,r.width,r.height,s.querySelectorAll('path,use').length]});
out.small=[...w.querySelectorAll('figure svg text')].filter(t=>!/rotate\(-90/.test(t.getAttribute('transform')))
 .map(t=>t.getBoundingClientRect().height).reduce((a,b)=>Math.min(a,b),99);
const p=d.createElement('pre');p.id='out';p.textContent=JSON.stringify(out);d.body.append(p)})</script>"""


def chromium(tmp_path, url, *options):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files", "--virtual-time-budget=5000", *options,
        url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


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
@pytest.mark.parametrize("width", [1280, 400])
def test_layout_in_chromium(tmp_path, width):
    """Every figure is drawn, nothing sticks out sideways, and the console stays silent."""
    everything(tmp_path / "report.html")
    _, console = chromium(tmp_path, (tmp_path / "report.html").as_uri(), "--dump-dom", f"--window-size={width},900")
    assert console == []
    frame = f'<iframe src="report.html" style="width:{width}px;height:900px;border:0"></iframe>'  # a window cannot be 400 wide
    (tmp_path / "check.html").write_text(f"<!doctype html><body>{frame}{CHECK}")
    dom, console = chromium(tmp_path, (tmp_path / "check.html").as_uri(), "--dump-dom", "--window-size=1400,1000")
    assert console == []
    reader = Output()
    reader.feed(dom)
    found = json.loads(reader.text)
    assert abs(found["width"] - width) <= 20
    assert found["overflow"] <= 0
    assert found["wide"] == []
    assert len(found["images"]) == 1
    assert min(found["images"]) > 100
    assert len(found["drawings"]) == 8
    for box_width, box_height, wide, high, marks in found["drawings"]:
        assert min(box_width, box_height, wide, high) > 100
        assert marks > 5
    assert found["small"] >= 8, "labels can be read"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_browser_check_can_fail(tmp_path):
    """A page that logs an error is seen to log it; otherwise silence would prove nothing."""
    (tmp_path / "bad.html").write_text("<script>console.error('boom')</script>")
    assert chromium(tmp_path, (tmp_path / "bad.html").as_uri(), "--dump-dom")[1]
