"""`engine report`: audit and evaluations on one page, for the people who decide. It shows real people and says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import provenance
from engine.errors import UsageError
from engine.release import cards
from engine.release.covariates import read_rows, side_by_side
from engine.release.evaluation import genotype_section
from engine.release.images import scans_side_by_side
from engine.release.manifest import read_audit
from engine.release.public_report import finding_of
from engine.release.report import Section, sections_of_audit, summary_of, write_report


def internal_report(
    out: str | Path,
    *,
    audit: str | Path,
    evaluation: Sequence[str | Path] = (),
    real: str | Path | None = None,
    synthetic: str | Path | None = None,
    title: str = "Synthetic data: audit and evaluation",
    seed: int = 0,
) -> dict[str, Any]:
    """Write one page to `out` and return {"report", "verdict"}.

    Args:
        out: HTML file that does not exist yet.
        audit: audit.json, whatever its verdict; evaluation: folders of `engine ... evaluate --out`.
        real, synthetic: tables or folders of scans, both or none: random ones of each beside each other, and covariates.

    Raises:
        InputError: an input cannot be read. UsageError: `out` exists, or one of real and synthetic without the other.
    """
    out, path = Path(out), Path(audit)
    if out.exists():
        raise UsageError("a file that does not exist yet", "an existing one", out, "another --out, or remove it first")
    if (real is None) != (synthetic is None):
        raise UsageError("--real and --synthetic together", "one of them", "report")
    judged = read_audit(path)
    findings = [finding_of(found) for found in judged.get("findings", [])]
    sections: list[Section] = []
    if real is not None and synthetic is not None:
        folders = [Path(real), Path(synthetic)]
        sections.append(scans_side_by_side(folders[0], folders[1], seed))
        tables = [folder if folder.suffix == ".csv" else folder / "volumes.csv" for folder in folders]
        if all(table.is_file() for table in tables):
            sections += side_by_side(*(read_rows(table) for table in tables))
    for folder in evaluation:
        record = cards.evaluation_record(Path(folder))
        found = [finding_of(finding) for finding in record["findings"]]
        if "af" in record["figures"]:
            sections.append(genotype_section(found, record["figures"], "How near to real: genotypes"))
        else:
            sections.append(Section("How near to real: scans", findings=found))
    write_report(
        out,
        title=title,
        verdict=judged["verdict"],
        reasons=judged.get("reasons", []),
        summary=summary_of(findings),
        sections=[*sections, *sections_of_audit(judged, findings)],
        facts={"commit": provenance.commit()["commit"], "seed": seed},
    )
    return {"report": str(out), "verdict": judged["verdict"]}
