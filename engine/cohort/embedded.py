"""The embedded cohort: paired scans and genotypes of people who never existed, with everything about them known.

It stands in for a site's real data, so that the whole engine can be run and judged anywhere: `make_cohort` draws it in
memory, `write_cohort` writes the files that the ordinary commands take. The order of making is genotypes -> people
(age, sex, diagnosis, visits) -> heads. Throughout, "real" means this cohort and "synthetic" what a generator made from
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine import atomic, provenance
from engine.cohort import genotypes, heads
from engine.cohort.config import EmbeddedConfig
from engine.cohort.genotypes import Locus
from engine.cohort.people import SUBJECT_COLUMNS, log_ventricle, make_people
from engine.cohort.tables import Table, from_records, rows, take, write_table
from engine.genomics.panel import HaplotypePanel, write_panel
from engine.imaging.volume import Volume, write_volume

Progress = Callable[[str, int, int], None]
SCAN_COLUMNS = ("image", "subject", "visit", "age", "sex", "group", "diagnosis", "interval_years", "split")
_HEADER = ["##engine_embedded=SIMULATED people: no row is a person; coalescent simulation with a planted disease model"]


@dataclass(frozen=True)
class Cohort:
    """A cohort in memory.

    Attributes:
        config: what it was made from; with `loci` the generating model.
        panel: phased genotypes, one diploid per subject, in the order of `subjects`, with groups, sexes and genetic
        map.
        subjects: one row per person: subject, group, sex (F/M), age (years, first visit), diagnosis (CN/AD), visits
            (1/2), interval_years (0 without second visit), split (train/holdout).
        scans: one row per visit: image, subject, visit (1/2), age (at that visit), sex, group, diagnosis,
            interval_years (since the first visit), split.
        volumes: one scan per row of `scans`.
        loci: the causal variants.
        truth: JSON-ready: coefficients, loci, latent values by subject, ventricle and brain mm3 by scan.
    """

    config: EmbeddedConfig
    panel: HaplotypePanel
    subjects: Table
    scans: Table
    volumes: list[Volume]
    loci: list[Locus]
    truth: dict[str, Any]

    def part(self, split: str) -> Cohort:
        """The people of one split, "train" or "holdout", with their scans."""
        people = self.subjects["split"] == split
        seen = self.scans["split"] == split
        truth = {**self.truth}
        truth["subjects"] = {k: [x for x, keep in zip(v, people) if keep] for k, v in self.truth["subjects"].items()}
        truth["scans"] = {k: [x for x, keep in zip(v, seen) if keep] for k, v in self.truth["scans"].items()}
        return replace(
            self,
            panel=self.panel.select(samples=people),
            subjects=take(self.subjects, people),
            scans=take(self.scans, seen),
            volumes=[volume for volume, keep in zip(self.volumes, seen) if keep],
            truth=truth,
        )


def scan_table(subjects: Table) -> Table:
    """The visits of a subjects table, one row each (SCAN_COLUMNS), subject by subject."""
    records = []
    for row in range(rows(subjects)):
        for visit in range(1, int(subjects["visits"][row]) + 1):
            years = float(subjects["interval_years"][row]) if visit == 2 else 0.0
            record: dict[str, Any] = {
                name: subjects[name][row] for name in ("subject", "sex", "group", "diagnosis", "split")
            }
            record.update(
                image=f"images/{record['subject']}_visit-{visit}.nii.gz",
                visit=visit,
                age=float(subjects["age"][row]) + years,
                interval_years=years,
            )
            records.append(record)
    return from_records(records, SCAN_COLUMNS)


def visits_table(subjects: Table, scans: Table) -> Table:
    """Tables of a cohort (`Cohort.subjects`, `Cohort.scans`) as one table of visits, as `engine.cohort.fit` takes it; images
    relative to the cohort's folder."""
    row = {str(name): at for at, name in enumerate(subjects["subject"])}
    at = np.array([row[str(name)] for name in scans["subject"]])
    twice = subjects["visits"][at] == 2
    made = {name: scans[name] for name in ("subject", "visit")}
    made["years"] = np.asarray(scans["interval_years"], dtype=np.float64)
    made |= {name: scans[name] for name in ("group", "sex", "age", "diagnosis")}
    made["end"] = np.where(twice, "completed", "dropout").astype(object)
    made["end_years"] = np.where(twice, subjects["interval_years"][at], 0.0)
    made["split"] = scans["split"] if "split" in scans else np.full(len(at), "train", dtype=object)
    made["image"] = np.array([f"imaging/{image}" for image in scans["image"]], dtype=object)
    return made


def scan_person(
    config: EmbeddedConfig, base: heads.Template, subjects: Table, latent: Table, row: int, person: int
) -> Iterator[heads.Head]:
    """The head of one person at each visit; `row` is the place in the tables, `person` the index that seeds the
    draws.
    """
    anatomy = config.anatomy
    age, ad = float(subjects["age"][row]), float(subjects["diagnosis"][row] == "AD")
    male = float(subjects["sex"][row] == "M")
    for visit in range(1, int(subjects["visits"][row]) + 1):
        years = float(subjects["interval_years"][row]) if visit == 2 else 0.0
        where = heads.person_map(
            base,
            seed=config.seed,
            person=person,
            shape_mm=anatomy.shape_mm,
            brain_mm3=float(latent["head_mm3"][row]),
            sulci_log=anatomy.sulci_log_per_decade * (age + years - 50) / 10 + anatomy.sulci_log_ad * ad,
        )
        z, z_rate = float(latent["z_ventricle"][row]), float(latent["z_rate"][row])
        wanted = float(np.exp(log_ventricle(anatomy, age, male, ad, z, z_rate, years)))
        yield heads.scan(base, config.scanner, where, wanted, seed=config.seed, person=person, visit=visit)


def make_cohort(config: EmbeddedConfig | None = None, progress: Progress | None = None) -> Cohort:
    """Make the cohort; a pure function of the config (see EmbeddedConfig on what depends on what).

    Args:
        config: sizes and generating model; the default has 240 people and about 320 scans of 32 x 40 x 32 at 5 mm.
        progress: called as progress("embedded cohort", people done, people).
    """
    config = config or EmbeddedConfig()
    ids = [f"EMB{k:05d}" for k in range(config.people)]
    panel = genotypes.simulate(config.genotypes, config.people, config.seed, ids)
    loci = genotypes.choose_loci(panel, config.disease)
    group = panel.samples.group
    assert group is not None
    subjects, latent = make_people(config, group, genotypes.dosage(panel, np.array([x.site for x in loci])), ids)
    sex = np.where(subjects["sex"] == "M", "male", "female")
    panel = replace(panel, samples=replace(panel.samples, sex=sex))
    scans = scan_table(subjects)

    base = heads.template(config.scanner)
    volumes: list[Volume] = []
    measured: dict[str, list[float]] = {"ventricle_mm3": [], "brain_mm3": []}
    for person in range(config.people):
        for head in scan_person(config, base, subjects, latent, person, person):
            volumes.append(
                Volume(
                    array_cdhw=head.array_dhw[None],
                    affine=head.affine,
                    modality="MR",
                    units="arbitrary",
                    metadata={"body_part": "BRAIN"},
                )
            )
            measured["ventricle_mm3"].append(round(head.ventricle_mm3, 3))
            measured["brain_mm3"].append(round(head.brain_mm3, 1))
        if progress is not None:
            progress("embedded cohort", person + 1, config.people)
    truth = {
        "note": "simulated cohort; no row is a person",
        "config": config.model_dump(mode="json"),
        "loci": [locus.to_json() for locus in loci],
        "subjects": {"subject": ids, **{name: values.tolist() for name, values in latent.items()}},
        "scans": {"image": scans["image"].tolist(), **measured},
    }
    return Cohort(config, panel, subjects, scans, volumes, loci, truth)


def write_cohort(cohort: Cohort, folder: str | Path, progress: Progress | None = None) -> Path:
    """Write the cohort as the inputs of the ordinary commands; the folder is whole or absent.

    visits.csv, which names the images; imaging/volumes.csv, imaging/train.csv, imaging/holdout.csv and
    imaging/images/*.nii.gz; genotypes.bcf, genotypes_train.bcf and genotypes_holdout.bcf with indices; samples.tsv;
    genetic_map.txt; subjects.csv; truth.json; provenance.json.

    Raises:
        UsageError: the folder exists.
    """
    folder = Path(folder)
    with atomic.atomic_folder(folder) as made:
        for i, (image, volume) in enumerate(zip(cohort.scans["image"], cohort.volumes)):
            (made / "imaging" / image).parent.mkdir(parents=True, exist_ok=True)
            write_volume(volume, made / "imaging" / image)
            if progress is not None:
                progress("embedded scans written", i + 1, len(cohort.volumes))
        write_table(made / "imaging" / "volumes.csv", cohort.scans, SCAN_COLUMNS)
        write_panel(cohort.panel, made / "genotypes.bcf", header_lines=_HEADER)
        for split in ("train", "holdout"):
            write_table(
                made / "imaging" / f"{split}.csv", take(cohort.scans, cohort.scans["split"] == split), SCAN_COLUMNS
            )
            people = cohort.subjects["split"] == split
            if people.any():
                write_panel(cohort.panel.select(samples=people), made / f"genotypes_{split}.bcf", header_lines=_HEADER)
        write_table(
            made / "samples.tsv", {name: cohort.subjects[name] for name in ("subject", "group", "sex", "split")}
        )
        write_table(made / "subjects.csv", cohort.subjects, SUBJECT_COLUMNS)
        write_table(made / "visits.csv", visits_table(cohort.subjects, cohort.scans))
        atomic.write_text(made / "genetic_map.txt", "\n".join(genotypes.map_lines(cohort.panel)) + "\n")
        atomic.write_json(made / "truth.json", cohort.truth)
        provenance.write(
            made,
            "cohort embedded",
            config=cohort.config.model_dump(mode="json"),
            seed=cohort.config.seed,
            synthetic=True,
            extra={"note": "simulated input data with known truth; stands in for a real cohort"},
        )
    return folder
