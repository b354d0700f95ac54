"""`write_report`: one HTML file that a data steward can read anywhere: no network, no second file.

The verdict stands on top in plain words, then the figures that decided it, then sections with tables and drawings. The only
script moves the slice slider; without it, and on paper, all slices are there as a montage. What is in the page is only
what the caller hands over. A section that shows real people says so (`internal`), the page then warns in its first line,
and a page made for release refuses it.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import escape

from engine import __version__
from engine.atomic import write_text
from engine.audit.findings import Finding
from engine.audit.protocol import AuditResult
from engine.errors import GateRefused, InputError, closest
from engine.release import figures as drawings

VERDICTS = {
    "pass": ("May be released", "The audit found no copies, and every planted control was judged as it must be."),
    "fail": ("Must not be released", "At least one check failed; the reasons are below."),
    "void": ("No verdict", "The audit could not be trusted: a planted control was not judged as it must be."),
    "none": ("Not audited", "This report describes; it does not say whether the data may be released."),
}
_WORDS = {"pass": "passed", "fail": "failed", "void": "void", "none": "described"}
_LABELS = {
    "ld_r": "LD, correlation of r² real and synthetic",
    "three_point_r": "Three-site correlation, real and synthetic",
    "pca_w1": "Distance of principal components (W1)",
    "aats_test": "Adversarial accuracy, unseen real",
    "aats_train": "Adversarial accuracy, training",
    "privacy_loss": "Privacy loss (AATS)",
    "exact_copies": "Exact copies of training",
    "longest_run_bp": "Longest stretch shared with training",
    "af_r": "Allele frequency, correlation",
    "ld_decay_error": "Error of LD decay",
    "convicted_rows": "Single samples convicted (FDR)",
    "nearer_train_share": "Nearer to training than to unseen people",
    "power_at_contamination": "Power to see a few copies",
    "audit_false_positive_rate": "Honest sets that the audit convicts",
    "frechet_shape": "Fréchet distance, shape",
    "frechet_texture": "Fréchet distance, texture",
    "kid_shape": "Kernel distance, shape",
    "intensity_w1": "Distance of intensities (W1)",
    "gradient_w1": "Distance of gradients (W1)",
    "block_mean_w1": "Distance of regional means (W1)",
    "sharpness_ratio": "Sharpness, synthetic over real",
    "pair_ssim": "Likeness within the set (SSIM)",
    "sfs_error": "Error of the site-frequency spectrum",
    "authenticity": "Authentic samples",
    "c_t": "Nearer to training than unseen people, cell by cell (C_T)",
    "precision": "Precision",
    "recall": "Recall",
    "density": "Density",
    "coverage": "Coverage",
}
_DRAW = {
    "pca": (drawings.pca, "Principal components of real and synthetic samples, computed on both together."),
    "ld_decay": (drawings.ld_decay, "Linkage disequilibrium (mean r²) against the distance between sites."),
    "af": (drawings.af, "Allele frequency of each site, real against synthetic; the dotted line is equality."),
    "sfs": (drawings.sfs, "Site-frequency spectrum: how many sites have alleles this frequent."),
    "rho": (drawings.rho, "Distance to training against distance to unseen people; to the left is nearer to training."),
    "roc": (drawings.roc, "How well the audit separates each set from unseen real people."),
    "histogram": (drawings.histogram, "Distribution, real and synthetic."),
    "scatter": (drawings.scatter, "Each point is one subject."),
    "dots": (drawings.dots, "Each value beside the same measure on unseen real people."),
    "graph": (drawings.graph, "An arrow points from what acts to what it acts on."),
    "stretches": (drawings.stretches, "Bars are stretches that are equal in both haplotypes."),
}
SLIDER = (Path(__file__).parent / "templates" / "slider.js").read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class Table:
    """A plain table: caption, column heads, rows of cells (text or numbers)."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Attributes:
        title, text: heading and a paragraph or more (blank lines separate) in plain English.
        findings: shown as a table.
        figures: by name. A dict is drawn by its "kind" (pca, ld_decay, af, sfs, rho, roc, histogram, scatter,
            stretches, montage, slices), or where it has none by the name itself or its first word
            ("histogram_intensity"); "title" and "caption" are printed. A montage is {"kind": "montage", "tiles": uint8
            (n, h, w) or (rows, columns, h, w)}, or the array; slices are what `figures.stack` takes.
        tables: further tables.
        internal: shows something of real people: their images, or a point for each of them.
    """

    title: str
    text: str = ""
    findings: Sequence[Finding] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    internal: bool = False


def write_report(
    path: str | Path,
    *,
    title: str,
    verdict: str,
    summary: Sequence[Finding],
    sections: Sequence[Section],
    subtitle: str = "",
    reasons: Iterable[str] = (),
    facts: Mapping[str, Any] | None = None,
    public: bool = False,
) -> Path:
    """Write the report to `path`, whole or not at all, and return the path.

    Args:
        title: of the page; subtitle: one line under it.
        verdict: "pass", "fail", "void" or "none".
        summary: a handful of findings shown as tiles.
        sections: in the order they are read.
        reasons: sentences that explain the verdict.
        facts: name -> value for the foot of the page, e.g. commit, seed, machine, how many people.
        public: the page is to leave the building; internal sections are refused.

    Raises:
        InputError: an unknown verdict or kind of figure. GateRefused: an internal section in a public page.
    """
    shown_inside = [section.title for section in sections if section.internal]
    if public and shown_inside:
        raise GateRefused("a report without anything of real people", f"the section '{shown_inside[0]}'", "report")
    if verdict not in VERDICTS:
        raise InputError("a verdict", repr(verdict), "report", closest(verdict, list(VERDICTS)))
    headline, meaning = VERDICTS[verdict]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    laid_out = [_section(section, number) for number, section in enumerate(sections, 1)]
    slider = SLIDER if any(figure["frames"] for part in laid_out for figure in part["figures"]) else ""
    page = environment.get_template("report.html.j2").render(
        title=title,
        subtitle=subtitle,
        verdict=verdict,
        headline=headline,
        meaning=meaning,
        reasons=list(reasons),
        tiles=[_row(finding) for finding in summary],
        sections=laid_out,
        internal=bool(shown_inside),
        slider=slider,
        slider_hash=base64.b64encode(hashlib.sha256(slider.encode()).digest()).decode(),
        facts={**{"engine": __version__}, **{str(k): str(v) for k, v in (facts or {}).items()}},
    )
    write_text(path, page)
    return Path(path)


def audit_sections(result: AuditResult) -> list[Section]:
    """The audit as sections: the verdict's findings, the distance ratios, the controls. Nothing in them names a
    real row.
    """
    return sections_of_audit(result.to_json(), result.findings)


def sections_of_audit(audit: Mapping[str, Any], findings: Sequence[Finding]) -> list[Section]:
    """As `audit_sections`, of what audit.json holds."""
    drawn = audit.get("figures", {})
    controls = Table(
        "Planted controls: sets whose right verdict is known beforehand",
        ("Control", "Rows", "Must be", "Was", "Flagged at 1 % or nearest", "Exact copies"),
        [
            (
                str(control["name"]).replace("_", " "),
                control["rows"],
                _WORDS[control["expected"]],
                _WORDS[control["verdict"]],
                _flagged(control.get("findings", [])),
                next((int(f["value"]) for f in control.get("findings", []) if f["name"] == "exact_copies"), ""),
            )
            for control in audit.get("controls", [])
        ],
    )
    sizes = Table(
        "People and rows on each side",
        ("Side", "People", "Rows"),
        [(name, size["people"], size["rows"]) for name, size in audit.get("sizes", {}).items()],
    )
    pictures: dict[str, dict[str, Any]] = {part: {} for part in ("copies", "membership", "power", "fidelity")}
    if "rho" in drawn:
        shown = {name: s for name, s in drawn["rho"]["shares"].items() if name in ("real, unseen", "synthetic")}
        pictures["copies"]["rho"] = {**drawn["rho"], "shares": shown, "title": "Distances"}
    if drawn.get("membership"):
        pictures["membership"]["roc_membership"] = {
            "kind": "roc",
            **{
                "curves": drawn["membership"],
                "x_label": "false-alarm rate (unseen people)",
            },
            "title": "Membership attacks",
            "caption": "How many training people an attacker recognises, at how many false alarms. On the dotted line the"
            " attacker guesses.",
        }
    if "roc" in drawn:
        pictures["power"]["roc"] = {
            "curves": drawn["roc"],
            "title": "Synthetic set and controls",
            "caption": "How well the audit tells each set from unseen real people. Copies should hug the upper left, fresh real"
            " people and a synthetic set without copies the dotted line.",
        }
    if drawn.get("prdc"):
        pictures["fidelity"]["dots"] = {
            **drawn["prdc"],
            "title": "Precision, recall, density, coverage",
            "caption": "Neighbourhoods of training rows and synthetic rows in each other. Where the dot lies on the"
            " diamond, the synthetic set does as well as unseen real people.",
        }
    return [
        Section(title, text, _of(findings, part), pictures[part], tables)
        for part, title, text, tables in (
            ("copies", "Copies of training data", _COPIES, (sizes,)),
            ("membership", "Could anyone tell who was in training?", _MEMBERSHIP, ()),
            ("power", "Does the audit see copies at all?", _POWER, (controls,)),
            ("fidelity", "How true and how varied", _FIDELITY, ()),
        )
        if tables or pictures[part] or _of(findings, part)
    ]


def summary_of(findings: Sequence[Finding]) -> list[Finding]:
    """The handful for the top of the page: exact copies, the strictest share that could be judged, the leak as an attacker
    sees it, and how much the audit would have seen.
    """
    by_name = {f.name: f for f in findings if math.isfinite(f.value)}
    strictest = next((n for n in ("0.1", "1", "5") if f"copy_share_at_{n}_percent" in by_name), "1")
    wanted = ("exact_copies", f"copy_share_at_{strictest}_percent", "membership_auc_distance", "power_at_contamination")
    return [by_name[name] for name in wanted if name in by_name]


def _of(findings: Sequence[Finding], part: str) -> list[Finding]:
    """Findings of one part; what has no other place belongs to the copies, where gates are."""
    return [f for f in findings if next((p for p, names in _PARTS if re.match(names, f.name)), "copies") == part]


_PARTS = (
    ("membership", "membership_"),
    ("power", "power_at_|audit_false_positive"),
    ("fidelity", "(authenticity|c_t|precision|recall|density|coverage)$"),
)
_COPIES = (
    "For every synthetic sample, the distance to the nearest training sample is set against the distance to the nearest "
    "unseen real sample. Unseen real people give the same figure at the same pool sizes, and so say how small it gets by "
    "chance."
)
_MEMBERSHIP = (
    "An attacker who holds the synthetic data and somebody's record asks whether that person was in training. Each attack is "
    "tried on training people and on as many as there are unseen people; 0.5 is guessing."
)
_POWER = (
    "Sets of copies are planted in every run. An audit that lets its own copycat through, or that convicts fresh real people, "
    "has no verdict."
)
_FIDELITY = "Every figure stands beside the same one for unseen real people. Real rows themselves are not at 1."


def label(name: str) -> str:
    """A finding's name in words."""
    if name in _LABELS:
        return _LABELS[name]
    share = re.fullmatch(r"copy_share_at_([\d.]+)_percent", name)
    if share:
        return f"Flagged as copies at {share[1]} % false positives"
    attack = re.fullmatch(r"membership_(auc|tpr_at_([\d.]+)_percent)_(\w+)", name)
    if attack:
        by = attack[3].replace("_", " ")
        return (
            f"Attack by {by}, area under the ROC"
            if attack[1] == "auc"
            else (f"Attack by {by}, recognised at {attack[2]} % false alarms")
        )
    return name.replace("_", " ").capitalize()


def number(value: float | None, unit: str = "") -> str:
    """A value as people read it: shares in per cent, counts with thin gaps, the rest to three figures."""
    if value is None or not math.isfinite(value):
        return "not available"
    if unit == "share":
        percent = 100 * value
        return f"{percent:.1f}\u00a0%" if abs(percent) >= 1 or percent == 0 else f"{percent:.2g}\u00a0%"
    if float(value).is_integer() and abs(value) < 1e12:
        text = f"{int(value):,}".replace(",", "\u202f")
    elif abs(value) >= 1000:
        text = f"{value:,.0f}".replace(",", "\u202f")
    else:
        text = f"{value:.3g}"
    return f"{text} {unit}".strip().replace("-", "\u2212")


def _row(finding: Finding) -> dict[str, str]:
    low_high = ""
    if finding.interval is not None and all(math.isfinite(x) for x in finding.interval):
        low_high = f"{number(finding.interval[0], finding.unit)} to {number(finding.interval[1], finding.unit)}"
    n = finding.n
    if isinstance(n, dict):
        count = ", ".join(f"{number(v)} {k.replace('_', ' ')}" for k, v in n.items())
    else:
        count = number(n) if n else ""
    sign = {"higher": "at least ", "lower": "at most ", "target": "near "}.get(finding.direction, "")
    return {
        "name": finding.name,
        "label": label(finding.name),
        "value": number(finding.value, finding.unit),
        "interval": low_high,
        "n": count,
        "floor": "" if finding.floor is None else number(finding.floor, finding.unit),
        "threshold": "" if finding.threshold is None else sign + number(finding.threshold, finding.unit),
        "verdict": finding.verdict,
        "word": _WORDS[finding.verdict],
        "note": finding.note,
        "calibrated_on": finding.calibrated_on,
    }


def _flagged(findings: Sequence[Mapping[str, Any]]) -> str:
    shares = [f for f in findings if f["name"].startswith("copy_share") and f.get("value") is not None]
    if not shares:
        return ""
    at_one = min(shares, key=lambda f: abs(f.get("detail", {}).get("expected", 0.01) - 0.01))
    return number(at_one["value"], "share")


def _section(section: Section, number_: int) -> dict[str, Any]:
    shown = [_figure(name, value, f"s{number_}f{i}") for i, (name, value) in enumerate(section.figures.items(), 1)]
    return {
        "id": f"section-{number_}",
        "title": section.title,
        "paragraphs": [part.strip() for part in section.text.split("\n\n") if part.strip()],
        "rows": [_row(finding) for finding in section.findings],
        "figures": shown,
        "tables": section.tables,
        "internal": section.internal,
    }


def _figure(name: str, value: Any, prefix: str) -> dict[str, Any]:
    """Drawing, caption and the words that stand for it."""
    if isinstance(value, np.ndarray):
        value = {"kind": "montage", "tiles": value}
    kind = str(value.get("kind", name if name in _DRAW else re.split(r"[_\s]", name)[0]))
    title = str(value.get("title", "" if name == kind else name.replace("_", " ")))
    if kind == "montage":
        tiles = np.asarray(value["tiles"])
        caption = str(value.get("caption", "Slices of volumes, each tile one volume."))
        columns = value.get("columns")
        high, wide = tiles.shape[-2:]
        alt = f"{title or 'Montage'}: {math.prod(tiles.shape[:-2])} tiles, {high} by {wide} pixels"
        image = drawings.montage(tiles, columns=columns)
        return {"id": prefix, "title": title, "caption": caption, "alt": alt, "image": image, "svg": "", "frames": []}
    if kind == "slices":
        frames = drawings.stack(value)
        shown = {"title": title or "Slices", "caption": str(value.get("caption", "")), "alt": ""}
        return {"id": prefix, **shown, "image": "", "svg": "", "frames": frames}
    if kind not in _DRAW:
        raise InputError(
            "a known kind of figure",
            repr(kind),
            f"report figure '{name}'",
            closest(kind, [*_DRAW, "montage", "slices"]),
        )
    draw, words = _DRAW[kind]
    caption = str(value.get("caption", words))
    svg = re.sub(r'<g id="(figure|axes|patch|text|line2d|legend|matplotlib|xtick|ytick)[^"]*"', "<g", draw(value))
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)  # ids are unique in a page, not only in a drawing
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    described = f"{title}: {caption}" if title else caption
    svg = svg.replace("<svg ", f'<svg role="img" aria-labelledby="{prefix}-title" ', 1)
    opening = svg.index(">") + 1
    svg = f'{svg[:opening]}<title id="{prefix}-title">{escape(described)}</title>{svg[opening:]}'
    return {"id": prefix, "title": title, "caption": caption, "alt": described, "image": "", "svg": svg, "frames": []}
