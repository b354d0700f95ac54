"""The main job on the embedded cohort: files -> fit -> generate -> evaluate + audit -> release, and one report.

Every stage calls what its command calls and leaves a folder; a folder that is there is taken as it is, so an interrupted
demo goes on where it stopped. Because the cohort's truth is known, the report also says how much of it was kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine import provenance
from engine.atomic import write_json
from engine.audit import AuditResult, Finding
from engine.cohort import embedded, joint, judge, truth
from engine.cohort.config import EmbeddedConfig
from engine.cohort.genotypes import dosage
from engine.cohort.graph import left_out, links_figure
from engine.cohort.profile import Modality
from engine.cohort.write import generate_command, read_manifest
from engine.errors import GateRefused, UsageError, closest
from engine.genomics import li_stephens
from engine.genomics.evaluate import evaluate as evaluate_genomics
from engine.imaging.evaluate import evaluate as evaluate_imaging
from engine.release.audit_run import run_audit
from engine.release.evaluation import genotype_section, scan_section
from engine.release.manifest import release
from engine.release.report import Section, Table, audit_sections, write_report

Progress = Callable[[str, int, int], None]
SUMMARY = "summary.json"
PROFILE = "embedded"


class DemoConfig(BaseModel):
    """Sizes of the demo; see configs/demo.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    people: int = Field(240, ge=60, description="people of the embedded cohort")
    synthetic_people: int = Field(120, ge=20)
    genomics: dict[str, Any] = Field(default_factory=dict, description="settings of the haplotype model")
    imaging: str = Field("cohort/heads.yaml", description="config of the scan model, relative to this file")
    imaging_overrides: list[str] = Field(default_factory=list, description="a.b=c, as --set")


@dataclass(frozen=True)
class _Folders:
    """What lies where in the demo's folder."""

    cohort: Path
    model: Path
    synthetic: Path
    audit_genotypes: Path
    audit_scans: Path
    release: Path


def load_demo_config(path: Path | None) -> tuple[DemoConfig, Path]:
    """(config, folder its paths are relative to); without a path, configs/demo.yaml of the checkout.

    Raises:
        UsageError: no such file, not YAML, an unknown key or a value out of range.
    """
    path = path or Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
    if not path.is_file():
        raise UsageError("configs/demo.yaml of a checkout", "nothing there", path, "--config FILE")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return DemoConfig.model_validate(values), path.parent
    except yaml.YAMLError as error:
        raise UsageError("a YAML file", " ".join(str(error).split())[:160], path) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        hint = closest(key, list(DemoConfig.model_fields)) if first["type"] == "extra_forbidden" else ""
        raise UsageError(f"{key or 'config'}: {first['msg']}", where=path, hint=hint) from None


def run_demo(
    out: str | Path, *, config: str | Path | None = None, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Run what is not done yet under `out` and return the summary (also written as summary.json).

    Raises:
        UsageError: a bad config, or `out` holds a demo made with another config or seed.
    """
    out = Path(out)
    settings, base = load_demo_config(None if config is None else Path(config))
    haplotypes = li_stephens.load_config(None, [f"{key}={value}" for key, value in settings.genomics.items()])
    resolved = {**settings.model_dump(mode="json"), "seed": seed}
    _same_request(out, resolved)
    tell = progress or (lambda what, done, total: None)
    at = _Folders(
        out / "cohort", out / "model", out / "synthetic", out / "audit-genotypes", out / "audit-scans", out / "release"
    )  # fmt: skip
    seconds: dict[str, float] = {}

    def timed(name: str, since: float) -> None:
        seconds[name] = round(time.monotonic() - since, 1)

    begun = time.monotonic()
    cohort = embedded.make_cohort(EmbeddedConfig(people=settings.people, seed=seed), progress=tell)
    if not at.cohort.exists():
        embedded.write_cohort(cohort, at.cohort, progress=tell)
    timed("cohort", begun)

    begun = time.monotonic()
    if not at.model.exists():
        joint.fit(
            at.cohort / "visits.csv",
            PROFILE,
            genotypes=at.cohort / "genotypes_train.bcf",
            genetic_map=at.cohort / "genetic_map.txt",
            haplotypes=haplotypes,
            scans=base / settings.imaging,
            out=at.model,
            overrides=[f"seed={seed}", *settings.imaging_overrides],
            progress=tell,
        )
    timed("fit", begun)

    begun = time.monotonic()
    model = joint.load(at.model, scans=not at.synthetic.exists())
    if not at.synthetic.exists():
        generate_command(model, settings.synthetic_people, at.synthetic, seed=seed, complete=True, progress=tell)
    counts = read_manifest(at.synthetic)["counts"]
    timed("generate", begun)

    begun = time.monotonic()
    judged = _evaluate(cohort, at, seed, tell)
    timed("evaluate", begun)

    begun = time.monotonic()
    audits = {
        "genotypes": run_audit(
            at.cohort / "genotypes_train.bcf",
            at.cohort / "genotypes_holdout.bcf",
            at.synthetic / "genotypes.bcf",
            _fresh(at.audit_genotypes),
            seed=seed,
            progress=tell,
        )[0],
        "scans": run_audit(
            at.cohort / "imaging" / "train.csv",
            at.cohort / "imaging" / "holdout.csv",
            at.synthetic / "bids",
            _fresh(at.audit_scans),
            seed=seed,
            progress=tell,
        )[0],
    }
    timed("audit", begun)
    released = _release(at, model.profile.modality, [str(subject) for subject in cohort.subjects["subject"]])
    learned = cohort.part("train")
    result = {
        "out": str(out),
        "report": str(out / "report.html"),
        "made": {
            "people": counts["people"],
            "scans": counts["scans"],
            "haplotypes": 2 * counts["genotypes"],
            "sites": learned.panel.n_sites,
            "learned_from_people": len(learned.subjects["subject"]),
            "learned_from_scans": len(learned.volumes),
        },
        "audit": {name: {"verdict": result.verdict, "reasons": result.reasons} for name, result in audits.items()},
        "released": released,
        "findings": {name: [f.to_json() for f in part.findings] for name, part in judged.items()},
        "training": json.loads((at.model / "imaging" / "provenance.json").read_text(encoding="utf-8"))["stages"],
        "seconds": seconds,
    }
    _report(out, result, judged, audits, links_figure(model.profile, left_out(model.notes)), seed)
    provenance.write(out, "demo", config=resolved, seed=seed, synthetic=True, extra={"seconds": seconds})
    write_json(out / SUMMARY, result)
    return result


def summary_lines(result: dict[str, Any]) -> list[str]:
    """The one-screen summary."""
    made, seconds = result["made"], sum(result["seconds"].values())
    findings = {f["name"]: f for part in result["findings"].values() for f in part}

    def figure(name: str, what: str) -> str:
        found = findings.get(name)
        if found is None or found["value"] is None:
            return f"  {what:<44} not available"
        floor = "" if found["floor"] is None else f"   (real against real {found['floor']:.3g})"
        return f"  {what:<44} {found['value']:.3g}{floor}"

    kept = [f for f in result["findings"]["truth"] if f["verdict"] in ("pass", "fail")]
    unclear = sum(f["verdict"] == "void" for f in result["findings"]["truth"])
    lines = [
        "",
        f"Made      {made['people']} synthetic people: {made['scans']} head scans, {made['haplotypes']} haplotypes at"
        f" {made['sites']} sites",
        f"          learned from {made['learned_from_people']} people and {made['learned_from_scans']} scans",
        "How good",
        figure("ld_r", "genotypes: LD correlation"),
        figure("pca_w1", "genotypes: distance in six PCs"),
        figure("frechet_shape", "scans: Frechet distance, shape"),
        figure("frechet_texture", "scans: Frechet distance, texture"),
        f"  known effects kept                           {sum(f['verdict'] == 'pass' for f in kept)} of {len(kept)}"
        + (f", {unclear} more cannot be judged at this size" if unclear else ""),
        "May it leave",
    ]
    for name, audit in result["audit"].items():
        lines.append(
            f"  audit of {name:<12} {audit['verdict'].upper():<5} {audit['reasons'][0] if audit['reasons'] else ''}"
        )
    for name, where in result["released"].items():
        lines.append(f"  release of {name:<10} {where}")
    return [*lines, f"Report    {result['report']}   ({seconds:.0f} s in all)", ""]


def _same_request(out: Path, resolved: dict[str, Any]) -> None:
    """The demo's request is recorded first, so that a folder is only continued by the request that began it."""
    record = out / "request.json"
    if record.is_file():
        if json.loads(record.read_text(encoding="utf-8")) != resolved:
            raise UsageError("the config and seed this folder was begun with", "others", out, "another folder")
        return
    if out.exists() and any(out.iterdir()):
        raise UsageError("a new folder or one of an earlier demo", "a folder with other things in it", out)
    write_json(record, resolved)


def _fresh(folder: Path) -> Path:
    """An audit is cheap and judges what is there now: an earlier one of this demo is replaced."""
    import shutil

    if folder.exists():
        shutil.rmtree(folder)
    return folder


@dataclass(frozen=True)
class _Part:
    """Findings and figures of one part of the report."""

    findings: list[Finding]
    figures: dict[str, Any]


def _evaluate(cohort: embedded.Cohort, at: _Folders, seed: int, tell: Progress) -> dict[str, _Part]:
    train, holdout = cohort.part("train"), cohort.part("holdout")
    synthetic, synthetic_panel = judge.read_synthetic(at.synthetic)
    made = evaluate_genomics(holdout.panel, synthetic_panel, train=train.panel, seed=seed)
    tell("evaluating", 1, 3)
    scans = evaluate_imaging(
        holdout.volumes,
        synthetic.volumes,
        train=train.volumes,
        real_persons=[str(s) for s in holdout.scans["subject"]],
        seed=seed,
    )
    tell("evaluating", 2, 3)
    kept = truth.compare(
        truth.Observed(train.subjects, dosage(train.panel), train.scans, train.volumes),
        synthetic,
        config=cohort.config,
        loci=cohort.loci,
        true_ventricle_mm3=np.array(train.truth["scans"]["ventricle_mm3"]),
        position_bp=train.panel.sites.position_bp,
        seed=seed,
    )
    tell("evaluating", 3, 3)
    return {
        "genotypes": _Part(made.findings, made.figures),
        "scans": _Part(scans.findings, scans.figures),
        "truth": _Part(kept.findings, kept.figures),
    }


def _release(at: _Folders, modality: Modality, real_ids: list[str]) -> dict[str, str]:
    """Try to release each modality; the gate decides and its refusal is part of the summary."""
    layout = {"bids": modality.suffix, "skull_stripped": modality.skull_stripped}
    sources: dict[str, tuple[Path, Path, dict[str, Any]]] = {
        "genotypes": (at.synthetic / "genotypes.bcf", at.audit_genotypes, {}),
        "scans": (at.synthetic / "bids", at.audit_scans, layout),
    }
    said = {}
    for name, (source, audit, more) in sources.items():
        target, title = _fresh(at.release / name), f"Synthetic {name} of the demo"
        try:
            release(source, audit / "audit.json", target, title=title, forbidden=real_ids, **more)
            said[name] = str(target)
        except GateRefused as refusal:
            said[name] = f"refused: {refusal.expected}, got {refusal.got}"
    return said


def _report(
    out: Path,
    result: dict[str, Any],
    judged: dict[str, _Part],
    audits: dict[str, AuditResult],
    links: dict[str, Any],
    seed: int,
) -> None:
    verdicts = {audit.verdict for audit in audits.values()}
    verdict = "fail" if "fail" in verdicts else "void" if "void" in verdicts else "pass"
    reasons = [f"{name.capitalize()}: {reason}" for name, audit in audits.items() for reason in audit.reasons]
    by_name = {f.name: f for part in judged.values() for f in part.findings}
    tiles = [by_name[name] for name in ("ld_r", "pca_w1", "frechet_shape", "frechet_texture") if name in by_name]
    made = result["made"]
    genotypes, scans, kept = (judged[name] for name in ("genotypes", "scans", "truth"))
    sections = [
        Section(
            "What was made",
            f"{made['people']} synthetic people with {made['scans']} head scans and {made['haplotypes']} haplotypes at"
            f" {made['sites']} sites, learned from {made['learned_from_people']} people of the embedded cohort."
            " Everybody in that cohort is simulated, so that the truth is known.",
            figures={"graph": links},
            tables=[Table("Seconds per stage", ("Stage", "Seconds"), list(result["seconds"].items()))],
        ),
        scan_section(scans.findings, scans.figures),
        genotype_section(genotypes.findings, genotypes.figures),
        Section(
            "How much of the known truth was kept",
            _TRUTH,
            kept.findings,
            _truth_figures(kept.figures),
            _effects(kept.figures),
        ),
    ]
    for name, audit in audits.items():
        for section in audit_sections(audit):
            sections.append(Section(f"Audit of {name}: {section.title.lower()}", section.text, section.findings,
                                    section.figures, section.tables))  # fmt: skip
    write_report(
        out / "report.html",
        title="Synthetic cohort: the demo",
        subtitle="Paired head scans and genotypes, from the embedded cohort with known truth",
        verdict=verdict,
        reasons=reasons,
        summary=tiles,
        sections=sections,
        facts={"commit": provenance.commit()["commit"], "seed": seed, **provenance.versions()},
    )


_TRUTH = (
    "Effects that were built into the embedded cohort, estimated by one rule in the real and in the synthetic people. An effect"
    " counts as kept when the synthetic estimate lies within the error that a real cohort of this size would have around the"
    " truth; where the real cohort itself cannot see an effect, it cannot be judged."
)


def _truth_figures(figures: dict[str, Any]) -> dict[str, Any]:
    """Ventricle volume against age by cohort and diagnosis, and the association scan over the region."""
    drawn: dict[str, Any] = {}
    if "ventricle_age" in figures:
        series = {}
        for side in ("real", "synthetic"):
            points = figures["ventricle_age"][side]
            diagnosis = np.array(points["diagnosis"])
            for label in ("CN", "AD"):
                chosen = diagnosis == label
                volume_ml = np.array(points["ventricle_mm3"])[chosen] / 1000
                series[f"{side}, {label}"] = {"x": np.array(points["age"])[chosen], "y": volume_ml}
        drawn["scatter_ventricle"] = {
            "series": series,
            "x_label": "age (years)",
            "y_label": "lateral ventricles (ml)",
            "title": "Ventricle volume against age",
            "caption": "Measured in the images. Built into the cohort: ventricles grow with age and are larger with AD.",
        }
    gwas = figures.get("gwas")
    if gwas:
        place_kb = np.array(gwas["position_bp"]) / 1000
        causal = ", ".join(f"{bp / 1000:.0f}" for bp in gwas["causal_bp"])
        drawn["scatter_gwas"] = {
            "series": {side: {"x": place_kb, "y": gwas[f"{side}_log10_p"]} for side in ("real", "synthetic")},
            "x_label": "position (kb)",
            "y_label": "-log10 p of the association with AD",
            "title": "Association scan",
            "caption": f"Causal variants were planted at {causal} kb.",
        }
    return drawn


def _effects(figures: dict[str, Any]) -> list[Table]:
    """Effects as planted, as the real cohort shows them, and as the synthetic one does."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.3g}"

    rows = [
        (
            effect["name"].replace("_", " "),
            cell(effect.get("truth")),
            cell(effect.get("real")),
            cell(effect["synthetic"]),
            {"pass": "kept", "fail": "not kept", "void": "cannot be judged"}.get(effect["verdict"], ""),
        )
        for effect in figures.get("effects", [])
    ]
    return [Table("Effects", ("Effect", "Planted", "Real cohort", "Synthetic cohort", ""), rows)] if rows else []
