"""Evaluations as pages for people: the sections of a report, and the report that `engine ... evaluate --out` leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine import provenance
from engine.audit.findings import Finding
from engine.release.images import slices_of_grey
from engine.release.report import Section, write_report

SCANS = (
    "Slices in three planes, real above synthetic. Distances are given beside the same distance between two sets of"
    " real scans of other people."
)
GENOTYPES = (
    "Allele frequencies match for almost any generator and are no evidence of quality; linkage, principal components and"
    " the longest stretches shared with the training people are."
)


def scan_section(findings: Sequence[Finding], figures: Mapping[str, Any], title: str = "Scans") -> Section:
    """Scans of both sides with a slice slider for each plane, the intensity histogram, shape components, and the findings.

    Args:
        findings, figures: of `engine.imaging.evaluate.evaluate`.
    """
    drawn: dict[str, Any] = {}
    shown = min(len(volumes) for volumes in figures["volumes"].values())
    for plane in ("axial", "coronal", "sagittal"):
        drawn[f"slices_{plane}"] = {
            "kind": "slices",
            "rows": {side: slices_of_grey(volumes[:shown], plane) for side, volumes in figures["volumes"].items()},
            "plane": plane,
            "title": f"{plane.capitalize()} slices",
            "caption": "Upper row: real. Lower row: synthetic. Arrow keys move through the slices.",
        }
    centre = np.asarray(figures["intensity"]["bin"])
    half = (centre[1] - centre[0]) / 2
    drawn["histogram_intensity"] = {
        "edges": np.append(centre - half, centre[-1] + half),
        "real": figures["intensity"]["real"],
        "synthetic": figures["intensity"]["synthetic"],
        "x_label": "intensity, scaled to 0..1",
        "log": True,
        "title": "Voxel intensities",
    }
    shape = {side: np.asarray(figures["pca"][side]) for side in ("real", "synthetic")}
    drawn["scatter_shape"] = {
        "series": {side: {"x": xy[:, 0], "y": xy[:, 1]} for side, xy in shape.items()},
        "x_label": "shape component 1",
        "y_label": "shape component 2",
        "title": "Shape features",
    }
    return Section(title, SCANS, findings, drawn, internal=True)


def genotype_section(findings: Sequence[Finding], figures: Mapping[str, Any], title: str = "Genotypes") -> Section:
    """PCA, LD decay, spectrum and frequencies, and the findings of `engine.genomics.evaluate.evaluate`."""
    titles = {"pca": "Principal components", "ld_decay": "Linkage disequilibrium", "af": "Allele frequencies"}
    drawn = {name: {**figures[name], "title": titles[name]} for name in ("pca", "ld_decay") if name in figures}
    if "sfs" in figures:
        drawn["histogram_spectrum"] = spectrum(figures["sfs"])
    drawn["af"] = {**figures["af"], "title": titles["af"]}
    return Section(title, GENOTYPES, findings, drawn, internal=True)


def spectrum(sfs: Mapping[str, Any]) -> dict[str, Any]:
    """Histogram of the site-frequency spectrum of `engine.genomics.evaluate.evaluate`: counts over many people, no point of
    it is anybody's.
    """
    low, high = sfs["minor_count_low"], sfs["minor_count_high"]
    return {
        "kind": "histogram",
        "edges": np.arange(len(low) + 1),  # bins of equal width on the page, named by their counts
        "shares": {name: sfs[name] for name in ("real", "synthetic") if name in sfs},
        "bins": [f"{a}" if a == b else f"{a}–{b}" for a, b in zip(low, high, strict=True)],
        "x_label": f"copies of the minor allele among {sfs['haplotypes']} haplotypes",
        "y_label": "share of these sites",
        "title": "Site-frequency spectrum of rare variants",
        "caption": "How many sites have a minor allele this rare, projected to the same number of haplotypes on both sides.",
    }


def write_evaluation(folder: Path, section: Section, tiles: Sequence[str], seed: int) -> Path:
    """`report.html` in `folder`: one section, the findings named in `tiles` on top.

    An evaluation describes; whether data may leave is the audit's word, so the report carries no verdict.
    """
    by_name = {finding.name: finding for finding in section.findings}
    return write_report(
        folder / "report.html",
        title=f"Evaluation of synthetic {section.title.lower()}",
        subtitle="How near to real, beside how near real is to real. Whether it may be released is the audit's word.",
        verdict="none",
        summary=[by_name[name] for name in tiles if name in by_name],
        sections=[section],
        facts={"commit": provenance.commit()["commit"], "seed": seed},
    )


def scan_report(folder: Path, evaluation: Any, seed: int) -> Path:
    """Report of an imaging evaluation, for `engine.imaging.commands.evaluate_command(report=...)`."""
    tiles = ("frechet_shape", "frechet_texture", "kid_shape", "intensity_w1")
    return write_evaluation(folder, scan_section(evaluation.findings, evaluation.figures), tiles, seed)


def genotype_report(folder: Path, evaluation: Any, seed: int) -> Path:
    """Report of a genomics evaluation, for `engine.genomics.commands.evaluate_command(report=...)`."""
    tiles = ("ld_r", "three_point_r", "pca_w1", "aats_test", "aats_train", "longest_run_bp")
    return write_evaluation(folder, genotype_section(evaluation.findings, evaluation.figures), tiles, seed)
