"""Synthetic people, whole: covariates, genotypes and scans that belong together, under one id.

Person k is a pure function of (models, seed, k). The order follows the links of the cohort: group -> genotype ->
score -> diagnosis -> visits -> scans. Every visit of a person starts from the same latent noise, with the age,
diagnosis and visit of that day as conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine import atomic, provenance
from engine.cohort.covariates import CovariateModel
from engine.cohort.embedded import SCAN_COLUMNS, scan_table
from engine.cohort.genotypes import dosage
from engine.cohort.tables import Table, rows, write_table
from engine.genomics.li_stephens import LiStephens
from engine.genomics.panel import HaplotypePanel, write_panel
from engine.imaging import generate as imaging
from engine.imaging.volume import Volume, write_volume

Progress = Callable[[str, int, int], None]
_HEADER = ["##SYNTHETIC=every sample of this file is synthetic; no row is a person"]


@dataclass(frozen=True)
class People:
    """Covariates, genotypes and a scans table of synthetic people; the scans themselves are made by `scans`."""

    subjects: Table
    panel: HaplotypePanel
    scans: Table


def people(n: int, covariates: CovariateModel, haplotypes: LiStephens, *, seed: int = 0, start: int = 0) -> People:
    """Persons start .. start+n-1 without their scans.

    Args:
        covariates: model fitted to the training people, with a genetic score over the sites of `haplotypes`.
        haplotypes: model that makes genotypes of a named group.
    """
    made: list[HaplotypePanel] = []

    def genotypes(groups: list[str]) -> np.ndarray:
        made.append(haplotypes.sample(n, groups=groups, seed=seed, start=start))
        return dosage(made[-1])

    subjects = covariates.sample(n, seed=seed, start=start, genotypes=genotypes)
    return People(subjects, made[0], scan_table({**subjects, "split": np.full(n, "synthetic", dtype=object)}))


def scans(who: People, model: imaging.Model, *, seed: int = 0, start: int = 0) -> Iterator[tuple[int, Volume]]:
    """(row of `who.scans`, volume) for every visit of every person, person by person."""
    names = [covariate.name for covariate in model.covariates if covariate.name in who.scans]
    visits: list[list[dict[str, Any]]] = [[] for _ in range(rows(who.subjects))]
    place = {str(subject): at for at, subject in enumerate(who.subjects["subject"])}
    for row in range(rows(who.scans)):
        visits[place[str(who.scans["subject"][row])]].append({name: who.scans[name][row] for name in names})
    made = imaging.sample(model, len(visits), seed=seed, start=start, covariates=visits)
    for row, (_, volume, _) in enumerate(made):
        yield row, volume


def write_people(
    who: People,
    model: imaging.Model,
    folder: str | Path,
    *,
    seed: int = 0,
    start: int = 0,
    config: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Make the scans and write everything under the ids of `who`; the folder is whole or absent.

    imaging/volumes.csv and imaging/images/*.nii.gz; genotypes.bcf with index; subjects.csv; provenance.json. The
    layout is that of `embedded.write_cohort`, so that both can be given to the same commands.

    Raises:
        UsageError: the folder exists.
    """
    folder = Path(folder)
    with atomic.atomic_folder(folder) as made:
        total = rows(who.scans)
        for row, volume in scans(who, model, seed=seed, start=start):
            write_volume(volume, made / "imaging" / str(who.scans["image"][row]), description="SYNTHETIC")
            if progress is not None:
                progress("synthetic scans", row + 1, total)
        columns = [name for name in SCAN_COLUMNS if name != "split"]
        write_table(made / "imaging" / "volumes.csv", who.scans, columns)
        write_panel(who.panel, made / "genotypes.bcf", header_lines=_HEADER)
        write_table(made / "subjects.csv", who.subjects)
        provenance.write(made, "cohort generate", config=config, seed=seed, synthetic=True)
    return folder
