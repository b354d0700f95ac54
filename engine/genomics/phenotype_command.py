"""What `engine genomics phenotype` calls: a panel file in, a table of phenotypes with its trait, effects and provenance
out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine import atomic, provenance
from engine.errors import UsageError
from engine.files.genotype_files import beside
from engine.genomics import phenotypes
from engine.genomics.panel import read_panel


def phenotype_command(
    panel_path: str | Path,
    *,
    out: str | Path,
    trait: str | Path | None = None,
    effects: str | Path | None = None,
    causal: int = 100,
    heritability: float | None = None,
    prevalence: float | None = None,
    case_fraction: float | None = None,
    people: int | None = None,
    covariates: str | Path | None = None,
    covariate_effects: Sequence[str] = (),
    min_maf: float = 0.01,
    alpha: float = -1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Write phenotypes of a panel's people to `out`, for plink2, and beside it the trait (`.trait.json`) and effects
    (`.effects.tsv`).

    Args:
        trait: a trait written before; its sites and effects are used, nothing of it can be set anew. Else `effects`, a
            table, or `causal` sites drawn at random with `heritability` (0.5 where not given).
        case_fraction, people: keep only so many people with this share of cases.
        covariates, covariate_effects: a table, and "column=change of the liability per standard deviation".

    Returns:
        {"out", "people", "causal", "heritability", "variance_score", "prevalence", "cases"}; heritability of the trait,
        variance of the score among the people written; cases and prevalence (of the trait) None for a quantitative one.

    Raises:
        UsageError, InputError: as `engine.genomics.phenotypes`; `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise UsageError("a file that does not exist yet", "an existing one", out, "another --out, or remove it first")
    given = [
        name
        for name, value in (("--effects", effects), ("--heritability", heritability), ("--prevalence", prevalence))
        if value
    ]
    if trait is not None and (given or covariate_effects):
        raise UsageError("a trait as it was written", f"{(given or ['--covariate'])[0]} too", "--trait")
    per_sd = _effects_of_covariates(covariate_effects)
    panel = read_panel(panel_path)
    if trait is not None:
        made = phenotypes.load_trait(trait)
    elif effects is not None:
        made = phenotypes.trait_from_effects(
            panel, effects, heritability=heritability, prevalence=prevalence, covariate_effect=per_sd
        )
    else:
        made = phenotypes.draw_trait(
            panel, causal=causal, heritability=0.5 if heritability is None else heritability, prevalence=prevalence,
            covariate_effect=per_sd, min_maf=min_maf, alpha=alpha, seed=seed,
        )  # fmt: skip
    values = None
    if made.covariate_effect:
        if covariates is None:
            raise UsageError(f"a table with {', '.join(made.covariate_effect)}", "none", "--covariates")
        values = phenotypes.read_covariates(covariates, panel.samples.ids, list(made.covariate_effect))
    known = phenotypes.simulate(panel, made, covariates=values, seed=seed)
    if case_fraction is not None:
        known = known.take(phenotypes.ascertained(known, case_fraction, people=people, seed=seed))
    elif people is not None:
        raise UsageError("--case-fraction with --people", "--people alone", "phenotype")
    phenotypes.write_effects(made, beside(out, "effects.tsv"))
    made.save(beside(out, "trait.json"))
    phenotypes.write_phenotypes(known, out)
    inputs = [Path(path) for path in (panel_path, trait, effects, covariates) if path is not None]
    config = {
        "causal": len(made.contig), "heritability": made.heritability, "prevalence": made.prevalence, "min_maf": min_maf,
        "alpha": alpha, "case_fraction": case_fraction, "people": people, "covariate_effect": made.covariate_effect,
    }  # fmt: skip
    record = provenance.record(
        "genomics phenotype",
        config=config,
        inputs=inputs,
        seed=seed,
        extra={"file": out.name, "sha256": provenance.sha256(out)},
    )
    atomic.write_json(beside(out, "provenance.json"), record)
    return {
        "out": str(out),
        "people": len(known.ids),
        "causal": len(made.contig),
        "heritability": made.heritability,
        "variance_score": float(np.var(known.score_s)),
        "prevalence": made.prevalence,
        "cases": None if known.case_s is None else int(known.case_s.sum()),
    }


def _effects_of_covariates(texts: Sequence[str]) -> dict[str, float] | None:
    made: dict[str, float] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            made[name] = float(value)
        except ValueError:
            made[name] = float("nan")
        if not name or not np.isfinite(made[name]):
            raise UsageError("COLUMN=effect per standard deviation", repr(text), "--covariate", "--covariate age=0.3")
    return made or None
