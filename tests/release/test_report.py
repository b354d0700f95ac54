"""The report: what a reader sees, that nothing is fetched, and how it lays out in a real browser."""

from __future__ import annotations

import base64
import hashlib
import html
import re

import numpy as np
import pytest

from engine.audit import AuditPolicy, Finding, Pool, audit
from engine.errors import GateRefused, InputError
from engine.release.report import Section, Table, audit_sections, label, number, write_report

RNG = np.random.default_rng(0)
SLICES = RNG.integers(0, 256, (10, 5, 30, 24)).astype(np.uint8)  # ten volumes of five slices


_MADE = {}


def everything(path, verdict="pass", **more):
    """A report with one of each kind of figure, long words and long lists; drawn once, as the same input gives the same
    bytes.
    """
    key = (verdict, *more)
    if key not in _MADE:
        _MADE[key] = _everything(path, verdict, **more).read_text()
    path.write_text(_MADE[key])
    return path


def _everything(path, verdict, **more):
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
                "dots": {"names": ["precision"], "synthetic": [0.9], "interval": [[0.8, 1]], "floor": [0.95]},
                "stretches": {"labels": ["p 0.1"], "segments": [[(1e6, 2e6), (3e6, 3.5e6)]], "span_bp": (1e6, 4e6)},
                "slices": {
                    "rows": {"synthetic": SLICES, "real": SLICES[::-1]},
                    "columns": list("abcdefghij"),
                    "plane": "axial",
                },
            },
            [Table("Controls", ("Control", "Rows", "Must be", "Was"), [("copycat", 200, "failed", "failed")])],
        ),
    ]
    return write_report(
        path,
        title="A <cohort>",
        verdict=verdict,
        summary=findings,
        sections=sections,
        facts={"commit": "c0ffee"},
        **more,
    )


def test_verdict_in_plain_words_comes_first(tmp_path):
    for verdict, words in (("pass", "May be released"), ("fail", "Must not be released"), ("void", "No verdict")):
        section = [Section("Genotypes & structure", "Words.")]
        path = write_report(
            tmp_path / f"{verdict}.html", title="T", verdict=verdict, summary=[], sections=section, reasons=["Because."]
        )
        page = path.read_text()
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


def test_nothing_is_loaded_and_only_the_slider_runs(tmp_path):
    page = everything(tmp_path / "r.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{allowed}'" in page
    assert not re.search(r"""\b(src|href)=["'](?!data:|#)""", page)
    assert not re.search(r"@import|url\((?!#)", page)
    assert not re.search(r"\son\w+=", page)


def test_a_page_without_slices_has_no_script(tmp_path):
    path = write_report(tmp_path / "r.html", title="T", verdict="none", summary=[], sections=[Section("S", "Words.")])
    assert "<script" not in path.read_text()
    assert "script-src" not in path.read_text()
    assert "runs no script" in path.read_text()


def test_an_internal_page_says_so_and_never_leaves(tmp_path):
    inside = Section("Nearest", figures={"slices": {"rows": {"real": SLICES}}}, internal=True)
    path = write_report(tmp_path / "r.html", title="T", verdict="pass", summary=[], sections=[inside])
    page = path.read_text()
    assert page.index("Internal.") < page.index("<h1>")
    assert "must not leave" in page
    assert "no image, identifier or record of a real person" not in page
    with pytest.raises(GateRefused, match="'Nearest'"):
        write_report(tmp_path / "p.html", title="T", verdict="pass", summary=[], sections=[inside], public=True)
    assert not (tmp_path / "p.html").exists()


def test_one_name_for_every_figure_and_landmarks(tmp_path):
    page = everything(tmp_path / "r.html").read_text()
    assert page.count('role="img"') == page.count("<svg") == 10
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
    policy = AuditPolicy(control_rows=40, contamination_repeats=4, subsets=1, honest_repeats=2)
    return audit(
        pool(draw(150), "CANARY-t"), pool(draw(120), "CANARY-h"), pool(draw(80), "s"), policy=policy, seed=seed
    )


def test_audit_sections_show_controls_and_name_nobody(tmp_path):
    result = audited()
    path = write_report(
        tmp_path / "r.html",
        title="T",
        verdict=result.verdict,
        summary=result.findings[:3],
        sections=audit_sections(result),
    )
    page = path.read_text()
    assert "CANARY" not in page
    for control in result.controls:
        assert control.name.replace("_", " ") in page
    for finding in result.findings:
        assert html.escape(label(finding.name)) in page
    again = write_report(
        tmp_path / "s.html",
        title="T",
        verdict=result.verdict,
        summary=result.findings[:3],
        sections=audit_sections(result),
    )
    assert again.read_text() == page


# ------------------------------------------------------------------------------------------------------ in a browser

LAYOUT = r"""(() => { const d = document, wide = d.documentElement.clientWidth, out = {};
out.overflow = d.documentElement.scrollWidth - wide;
out.wide = [...d.body.querySelectorAll('*')].filter(e => !e.closest('svg') && !e.closest('.skip') &&
  !(e.closest('thead') && wide < 700) && e.getBoundingClientRect().right > wide + 1).map(e => e.tagName + '.' + e.className);
out.images = [...d.images].filter(i => i.getClientRects().length).map(i => [i.naturalWidth, i.getBoundingClientRect().width]);
out.drawings = [...d.querySelectorAll('figure svg')].map(s => { const b = s.getBBox(), r = s.getBoundingClientRect();
  return [b.width, b.height, r.width, r.height, s.querySelectorAll('path,use').length] });
out.small = [...d.querySelectorAll('figure svg text')].filter(t => !/rotate\(-90/.test(t.getAttribute('transform')))
  .map(t => t.getBoundingClientRect().height).reduce((a, b) => Math.min(a, b), 99);
out.frames = [...d.querySelectorAll('.slices')].map(f => [...f.querySelectorAll('.frame')].map(e => e.offsetHeight > 0));
out.bars = [...d.querySelectorAll('.bar')].map(e => e.offsetHeight > 0);
out.said = [...d.querySelectorAll('.bar output')].map(e => e.value);
out.focus = d.activeElement.id || d.activeElement.className || d.activeElement.tagName;
out.outline = getComputedStyle(d.activeElement).outlineStyle + ' ' + getComputedStyle(d.activeElement).outlineWidth;
return out })()"""
CONTRAST = r"""(() => { const light = c => { const [r, g, b] = c.match(/[\d.]+/g).map(Number).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b };
const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\)$|transparent/.test(c)) return c } return 'rgb(255,255,255)' };
return [...document.querySelectorAll('body *')].filter(e => !e.closest('svg') && e.getClientRects().length &&
    [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(e => {
    const a = light(getComputedStyle(e).color), b = light(behind(e));
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.tagName + '.' + e.className] })
  .sort((x, y) => x[0] - y[0])[0] })()"""


@pytest.mark.parametrize("width", [1280, 400])
def test_layout_in_chromium(tmp_path, page, width):
    """Every figure is drawn, nothing sticks out sideways, the console stays silent, and nothing is fetched."""
    path = everything(tmp_path / "report.html")
    page.open(path, width)
    found = page.ask(LAYOUT)
    assert page.complaints() == []
    assert page.requests() == [path.as_uri()]
    assert found["overflow"] <= 0
    assert found["wide"] == []
    assert len(found["images"]) == 1 + 2 * 3  # the montage, and one slice: two rows in three groups of at most four
    assert min(shown for _, shown in found["images"]) > 60
    assert len(found["drawings"]) == 10
    for box_width, box_height, wide, high, marks in found["drawings"]:
        assert min(box_width, box_height, wide, high) > 100
        assert marks > 5
    assert found["small"] >= 8, "labels can be read"


def test_the_slider_moves_by_keyboard(tmp_path, page):
    page.open(everything(tmp_path / "report.html"), 1280)
    assert page.ask(LAYOUT)["frames"] == [[False, False, True, False, False]]
    for _ in range(30):  # with the tab key alone, as somebody without a mouse comes there
        page.press("Tab", 9)
        found = page.ask(LAYOUT)
        if found["focus"].endswith("-slice"):
            break
    assert found["focus"].endswith("-slice")
    assert found["outline"] == "solid 3px"
    page.press("ArrowRight", 39)
    found = page.ask(LAYOUT)
    assert found["frames"] == [[False, False, False, True, False]]
    assert found["said"] == ["axial slice 4 of 5"]
    assert page.ask("document.activeElement.getAttribute('aria-valuetext')") == "axial slice 4 of 5"
    for _ in range(3):
        page.press("ArrowLeft", 37)
    assert page.ask(LAYOUT)["frames"] == [[True, False, False, False, False]]
    page.press("End", 35)
    assert page.ask(LAYOUT)["said"] == ["axial slice 5 of 5"]
    assert page.ask("document.activeElement.labels[0].textContent") == "Slice"
    assert page.complaints() == []


def test_the_first_tab_stop_skips_to_the_findings(tmp_path, page):
    page.open(everything(tmp_path / "report.html"), 1280)
    page.press("Tab", 9)
    assert page.ask("document.activeElement.className") == "skip"
    assert page.ask("document.activeElement.getBoundingClientRect().left") >= 0
    page.press("Enter", 13)
    assert page.ask("location.hash") == "#main"


def test_without_scripts_and_on_paper_all_slices_are_there(tmp_path, page):
    path = everything(tmp_path / "report.html")
    page.open(path, 1280, scripts=False)
    found = page.ask(LAYOUT)
    assert found["frames"] == [[True] * 5]
    assert found["bars"] == [False]
    page.open(path, 1280)
    page.call("Emulation.setEmulatedMedia", media="print")
    found = page.ask(LAYOUT)
    page.call("Emulation.setEmulatedMedia", media="")
    assert found["frames"] == [[True] * 5]
    assert found["bars"] == [False]
    assert page.pdf().count(b"/Type /Page\n") >= 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(tmp_path, page, scheme):
    """WCAG 2.2, success criterion 1.4.3: a contrast of 4.5 to 1."""
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.open(everything(tmp_path / "report.html", "fail", reasons=["Because."]), 1280)
    worst, where = page.ask(CONTRAST)
    page.call("Emulation.setEmulatedMedia", features=[])
    assert worst >= 4.5, where


def test_the_browser_check_can_fail(tmp_path, page):
    """A page that logs an error and fetches something is seen to; otherwise silence would prove nothing."""
    (tmp_path / "bad.html").write_text("<script>console.error('boom')</script><img src='file:///nowhere.png'>")
    page.open(tmp_path / "bad.html", 800)
    assert page.complaints()
    assert len(page.requests()) == 2
