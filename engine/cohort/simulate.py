"""The embedded default of a profile: people made by its own published effects, with everything about them known.

It lets every profile run end to end anywhere. Columns are drawn along the profile's links: a number is its `embedded.mean` plus
the effects of its parents plus noise, cut to its range; levels are shares at the reference levels, shifted by log odds; over
time numbers change by `per_year`, levels move one up at a rate that hazard ratios (or, where there are none, odds ratios)
multiply. Genotypes are simulated (`engine.cohort.genotypes`), with the profile's loci planted at common variants that take
their ids. Scans are the embedded heads for every profile, whatever its modality: what is tried on them is the path, not
lungs. Cases (`modality.cases`) get the heads' disease effect.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, logit, ndtr, ndtri

from engine import atomic, provenance, seeding
from engine.cohort import genotypes, heads
from engine.cohort.config import AnatomyConfig, GenotypeConfig, ScannerConfig
from engine.cohort.genotypes import Locus
from engine.cohort.people import log_ventricle, split_by_person
from engine.cohort.profile import END, GENOTYPE, Column, Profile
from engine.cohort.tables import Table, column, write_table
from engine.errors import UsageError
from engine.genomics.panel import HaplotypePanel, write_panel
from engine.imaging.volume import Volume, write_volume


@dataclass(frozen=True)
class Simulated:
    """A cohort in memory: one row per visit, genotypes of those who have them, one scan per row with an image.

    truth: loci, and per row the true ventricle volume (mm3) where there is a scan.
    """

    table: Table
    panel: HaplotypePanel
    volumes: list[Volume]
    loci: list[Locus]
    ventricle_mm3: np.ndarray


def simulate(
    profile: Profile,
    people: int,
    *,
    seed: int = 0,
    scans: bool = True,
    genome: GenotypeConfig | None = None,
    holdout: float = 0.3,
) -> Simulated:
    """The embedded default of `profile`; a pure function of its arguments.

    Raises:
        UsageError: a group of the profile that the simulated demography does not have.
    """
    genome = genome or GenotypeConfig(windows=max(4, len(profile.genotypes.loci)))
    groups = profile.columns[profile.group].levels if profile.group else list(genome.groups)
    if set(groups) - {"AFR", "EUR", "EAS"}:
        raise UsageError("groups among AFR, EUR, EAS", ", ".join(groups), f"profile {profile.name}")
    shares = profile.columns[profile.group].embedded.shares if profile.group else None
    genome = genome.model_copy(
        update={"groups": tuple(groups), "shares": tuple(shares or [1 / len(groups)] * len(groups))}
    )
    ids = [f"EMB{k:05d}" for k in range(people)]
    panel = genotypes.simulate(genome, people, seed, ids)
    found = profile.genotypes.loci
    loci: list[Locus] = []
    if found:
        effect = {e.of: e.value for e in profile.effects if e.of in found}
        loci = [
            _planted(panel, genome, at % genome.windows, name, spec.frequency, effect.get(name, 0.0))
            for at, (name, spec) in enumerate(found.items())
        ]
        if len({locus.site for locus in loci}) < len(loci):
            raise UsageError("a window for each locus", f"{genome.windows} for {len(loci)}", "genome", "more windows")
        name = panel.sites.id.copy()
        alt = panel.sites.alt.copy()
        ref = panel.sites.ref.copy()
        for locus in loci:
            wanted = found[locus.name]
            name[locus.site] = wanted.rsid
            if wanted.effect_allele:
                alt[locus.site] = wanted.effect_allele
                ref[locus.site] = "A" if wanted.effect_allele != "A" else "G"
        panel = replace(panel, sites=replace(panel.sites, id=name, alt=alt, ref=ref))
    dosage = genotypes.dosage(panel, np.array([x.site for x in loci], dtype=np.int64)).astype(float)
    group_n = panel.samples.group
    assert group_n is not None
    split = split_by_person(group_n, np.array([_uniform(seed, "split", k, 1)[0] for k in range(people)]), holdout)
    rows: list[dict[str, Any]] = []
    for k in range(people):
        # ALT counts above what the panel has on average
        genetic = {locus.name: float(dosage[k, at] - 2 * locus.frequency) for at, locus in enumerate(loci)}
        rows += [
            {"subject": ids[k], "split": split[k], **row} for row in _person(profile, seed, k, str(group_n[k]), genetic)
        ]
    names = ["subject", "visit", "years", "split", *profile.columns, "end", "end_years", "image"]
    table: Table = {name: column([row[name] for row in rows]) for name in names}
    volumes, ventricle = _heads(profile, table, seed) if scans else ([], np.full(len(rows), np.nan))
    if not scans:
        table["image"] = np.full(len(rows), "", dtype=object)
    sex = profile.sex
    if sex is not None:
        first = dict(zip(table["subject"][::-1], table[sex][::-1]))
        called = np.array([{"M": "male", "F": "female"}.get(str(first[i]), "unknown") for i in ids])
        panel = replace(panel, samples=replace(panel.samples, sex=called))
    absent = profile.modality.genotypes_absent
    have = np.array([_uniform(seed, "genotypes", k, 1)[0] >= absent for k in range(people)])
    return Simulated(table, panel.select(samples=have) if absent else panel, volumes, loci, ventricle)


def _planted(
    panel: HaplotypePanel, genome: GenotypeConfig, window: int, name: str, frequency: float, effect: float
) -> Locus:
    """The site of a window, common in every group, whose ALT frequency is nearest to the wanted one."""
    position, group_n = panel.sites.position_bp, panel.group_n
    assert group_n is not None
    first = genome.offset_bp + 1 + genome.window_starts[window]
    inside = np.flatnonzero((position >= first) & (position < first + genome.window_bp))
    alleles_nl = panel.select(sites=inside).alleles_nl()
    by_group = {str(g): alleles_nl[group_n == g].mean(axis=0) for g in sorted(set(group_n))}
    overall = alleles_nl.mean(axis=0)
    common = np.min([np.minimum(f, 1 - f) for f in by_group.values()], axis=0) >= 0.03
    if not common.any():
        raise UsageError("a common variant in every group", "none", f"window {window + 1}", "longer windows")
    at = int(np.argmin(np.where(common, np.abs(overall - frequency), np.inf)))
    site = int(inside[at])
    return Locus(
        name, site, str(panel.sites.id[site]), int(position[site]), effect, float(overall[at]),
        {g: float(f[at]) for g, f in by_group.items()},
    )  # fmt: skip


def _uniform(seed: int, what: str, person: int, count: int) -> np.ndarray:
    return seeding.generator(seed, f"cohort.simulate.{what}", person).random(count)


def _person(profile: Profile, seed: int, k: int, group: str, genetic: dict[str, float]) -> list[dict[str, Any]]:
    """The rows of one person; absent values are put in last, so that they hide what is true and change nothing."""
    rng = seeding.generator(seed, "cohort.simulate.person", k)
    value: dict[str, Any] = dict(genetic)
    for name in profile.order:
        if name == GENOTYPE:
            continue
        spec = profile.columns[name]
        if name == profile.group:
            value[name] = group
            continue
        value[name] = _first(profile, name, spec, value, rng.random())
    walk = {name: rng.standard_normal() for name in profile.columns}
    visits = profile.visits
    rows, years, now, end, end_years = [], 0.0, dict(value), "completed", 0.0
    for number, planned in enumerate(visits.planned_years, start=1):
        rows.append(_seen(profile, now, number, years, rng))
        end_years = years
        if number == len(visits.planned_years):
            break
        # the planned gap, not the time left to the planned date: a late visit does not pull the next one near
        gap = visits.planned_years[number] - planned + visits.jitter_years * float(rng.standard_normal())
        gap = float(np.clip(gap, visits.least_gap_years, visits.most_gap_years))
        risk = np.exp(sum(_acts(profile, e, now) for e in profile.effects if e.to == END and e.hazard_ratio))
        death = rng.exponential(1 / max(visits.death_per_year * risk, 1e-12))
        leave = rng.exponential(1 / max(visits.dropout_per_year, 1e-12))
        if min(death, leave) < gap:
            end = "death" if death < leave else "dropout"
            end_years = years + (death if end == "death" else 0.0)
            break
        now = _later(profile, now, gap, walk, rng)
        years += gap
    for row in rows:
        row["end"], row["end_years"] = end, round(end_years, 4)
    return rows


def _acts(profile: Profile, effect: Any, value: dict[str, Any]) -> float:
    """What an effect adds, for people as they are; numeric causes are centred on their own mean."""
    if effect.of in profile.genotypes.loci:
        return float(effect.value * value[effect.of])
    spec = profile.columns.get(effect.of)
    if spec is None:
        return 0.0
    if spec.numeric:
        return float(effect.value * (float(value[effect.of]) - spec.embedded.mean))
    return float(effect.value) if value[effect.of] == effect.level else 0.0


def _first(profile: Profile, name: str, spec: Column, value: dict[str, Any], u: float) -> Any:
    made = spec.embedded
    shift = sum(_acts(profile, e, value) for e in profile.effects if e.to == name)
    if spec.numeric:
        if any(str(value.get(other)) in levels for other, levels in made.zero_for.items()):
            return 0 if spec.kind == "count" else 0.0
        low, high = spec.range or (0.0, 0.0)
        edges = [ndtr((edge - made.mean - shift) / made.sd) for edge in (low, high)]
        x = made.mean + shift + made.sd * float(ndtri(np.clip(edges[0] + u * (edges[1] - edges[0]), 1e-12, 1 - 1e-12)))
        x = float(np.clip(x, low, high))
        return int(np.clip(round(x), np.ceil(low), np.floor(high))) if spec.kind == "count" else x
    shares = np.array(made.shares or [1 / len(spec.levels)] * len(spec.levels))
    below = np.clip(np.cumsum(shares)[:-1], 1e-9, 1 - 1e-9)
    return spec.levels[int((u > expit(logit(below) - shift)).sum())]


def _later(profile: Profile, value: dict[str, Any], gap: float, walk: dict[str, float], rng: Any) -> dict[str, Any]:
    now = dict(value)
    for name in profile.order:
        if name == GENOTYPE:
            continue
        spec = profile.columns[name]
        made = spec.embedded
        if spec.over_time == "clock":
            now[name] = float(value[name]) + gap
        if spec.over_time not in ("changes", "rises"):
            continue
        if spec.numeric:
            low, high = spec.range or (0.0, 0.0)
            drift = (made.per_year + made.per_year_sd * walk[name]) * gap
            # what the parents' changes bring with them
            drift += sum(_acts(profile, e, now) - _acts(profile, e, value) for e in profile.effects if e.to == name)
            noise = 0.2 * made.sd * float(rng.standard_normal())
            x = float(value[name]) + drift + noise
            x = float(np.clip(max(x, float(value[name])) if spec.over_time == "rises" else x, low, high))
            now[name] = round(x) if spec.kind == "count" else x
        elif made.per_year > 0 and value[name] != spec.levels[-1]:
            on_it = [e for e in profile.effects if e.to == name]
            risk = np.exp(sum(_acts(profile, e, now) for e in on_it))
            if rng.random() < -np.expm1(-made.per_year * risk * gap):
                now[name] = spec.levels[spec.levels.index(str(value[name])) + 1]
    return now


def _seen(profile: Profile, value: dict[str, Any], number: int, years: float, rng: Any) -> dict[str, Any]:
    """A row as it would be recorded: rounded, with what is absent."""
    row: dict[str, Any] = {"visit": number, "years": round(years, 4)}
    for name, spec in profile.columns.items():
        x = value[name]
        row[name] = round(float(x), 2) if spec.kind == "number" else x
        share = spec.embedded.missing_with.get(str(x), spec.embedded.missing)
        absent, which = rng.random(2)
        if absent < share:
            row[name] = spec.missing[int(which * len(spec.missing))]
    row["image"] = "scan" if rng.random() >= profile.modality.absent else ""
    return row


def _heads(profile: Profile, table: Table, seed: int) -> tuple[list[Volume], np.ndarray]:
    """The embedded heads of the visits that have a scan, and the ventricles that they show."""
    anatomy, scanner = AnatomyConfig(), ScannerConfig()
    base = heads.template(scanner)
    volumes: list[Volume] = []
    ventricle = np.full(len(table["subject"]), np.nan)
    images = table["image"].astype(object)
    first: dict[str, int] = {}
    for row, subject in enumerate(table["subject"].tolist()):
        start = first.setdefault(subject, row)
        if not images[row]:
            continue
        k = int(subject.removeprefix("EMB"))
        u = np.clip(_uniform(seed, "anatomy", k, 3), 1e-3, 1 - 1e-3)
        z_head, z_ventricle, z_rate = (float(z) for z in ndtri(u))
        age = _or(table[profile.clock][start], 70.0) if profile.clock else 70.0
        male = float(profile.sex is not None and table[profile.sex][start] == "M")
        outcome = profile.genotypes.outcome
        case = float(outcome is not None and str(table[outcome][row]) in profile.modality.cases)
        years = float(table["years"][row])
        where = heads.person_map(
            base,
            seed=seed,
            person=k,
            shape_mm=anatomy.shape_mm,
            brain_mm3=anatomy.head_mm3 * float(np.exp(anatomy.head_log_male * male + anatomy.head_log_sd * z_head)),
            sulci_log=anatomy.sulci_log_per_decade * (age + years - 50) / 10 + anatomy.sulci_log_ad * case,
        )
        wanted = float(np.exp(log_ventricle(anatomy, age, male, case, z_ventricle, z_rate, years)))
        head = heads.scan(base, scanner, where, wanted, seed=seed, person=k, visit=int(table["visit"][row]))
        volumes.append(Volume(head.array_dhw[None], head.affine, "MR", "arbitrary", {"body_part": "BRAIN"}))
        images[row] = f"images/{subject}_visit-{int(table['visit'][row])}.nii.gz"
        ventricle[row] = head.ventricle_mm3
    table["image"] = images
    return volumes, ventricle


def _or(cell: Any, default: float) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return default


def write_simulated(made: Simulated, folder: str | Path) -> Path:
    """Write a cohort as the inputs of `engine cohort fit`: visits.csv, images/, genotypes.bcf, genetic_map.txt, truth.json.

    Raises:
        UsageError: the folder exists.
    """
    with atomic.atomic_folder(folder) as out:
        names = [str(image) for image in made.table["image"] if image]
        for name, volume in zip(names, made.volumes):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            write_volume(volume, out / name)
        write_table(out / "visits.csv", made.table)
        write_panel(
            made.panel, out / "genotypes.bcf", header_lines=["##engine_embedded=SIMULATED people: no row is a person"]
        )
        atomic.write_text(out / "genetic_map.txt", "\n".join(genotypes.map_lines(made.panel)) + "\n")
        atomic.write_json(out / "truth.json", {"loci": [locus.to_json() for locus in made.loci]})
        provenance.write(out, "cohort embedded", synthetic=True)
    return Path(folder)
