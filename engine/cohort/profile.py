"""What a cohort consists of, as a config: columns and their rules, visits, modalities, who depends on whom, known effects.

A profile says how a table is to be read, what holds in every row of it, and which links a model of it has; the figures come
from the data it is fitted to. `links` names the parents of every node. Nodes are the columns and, beside them,

    genotype          both haplotypes of a person; may depend on one nominal column, the ancestry group
    score             weighted count of ALT alleles away from the named loci; LOCUS names themselves count one variant
    missing COLUMN    that a value is absent, and why; without an entry the parents of the column
    end               how a visit is followed: by another, by dropout, by death
    no genotype, no scan      that a person has no genotypes, a visit no scan
    scan              the image; `previous scan` among its parents makes later visits follow the first one

What is not named as a parent has no influence: a link is left out by leaving it out of the list. `embedded` says how the
column looks in the embedded default (`engine.cohort.simulate`) and plays no part in fitting.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import InputError, UsageError, closest

GENOTYPE, SCORE, SCAN, PREVIOUS, END = "genotype", "score", "scan", "previous scan", "end"
NO_GENOTYPE, NO_SCAN = "no genotype", "no scan"
RESERVED = ("subject", "visit", "years", "end", "end_years", "image", "split", "synthetic")
MISSING = "n/a"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EmbeddedColumn(_Strict):
    """How a column is made in the embedded default."""

    mean: float = Field(0.0, description="numbers: of people at the reference levels")
    sd: float = Field(1.0, gt=0)
    zero_for: dict[str, list[str]] = Field(
        default_factory=dict, description="numbers: 0 where another column has one of these levels"
    )
    shares: list[float] | None = Field(None, description="levels: their shares among people at the reference levels")
    per_year: float = Field(0.0, description="numbers: change per year; levels: rate of moving one up, per year")
    per_year_sd: float = Field(0.0, ge=0, description="numbers: between people")
    missing: float = Field(0.0, ge=0, lt=1, description="share of values that are absent")
    missing_with: dict[str, float] = Field(
        default_factory=dict, description="share absent at LEVEL of the column itself (not at random)"
    )


class Column(_Strict):
    """One column of the table and the rules of its values."""

    kind: Literal["number", "count", "levels", "ordered"] = Field(
        description="count: whole numbers; ordered: levels with an order; levels: without"
    )
    levels: list[str] = Field(default_factory=list, description="allowed values, ordered ones in order")
    range: tuple[float, float] | None = Field(None, description="of numbers and counts; no row lies outside")
    over_time: Literal["fixed", "clock", "changes", "rises"] = Field(
        "fixed",
        description="fixed: one value per person; clock: runs with the years (age); changes; rises: never falls",
    )
    unit: str = ""
    missing: list[str] = Field([MISSING], min_length=1, description="codes of absent values; each is kept as it is")
    embedded: EmbeddedColumn = EmbeddedColumn()  # type: ignore[call-arg]

    @property
    def numeric(self) -> bool:
        return self.kind in ("number", "count")

    @model_validator(mode="after")
    def _check(self) -> Column:
        if self.numeric and (self.range is None or not self.range[0] < self.range[1] or self.levels):
            raise ValueError("numbers need a rising range and have no levels")
        if not self.numeric and (len(set(self.levels)) < 2 or len(set(self.levels)) != len(self.levels)):
            raise ValueError("levels: at least two different ones")
        if self.over_time == "clock" and self.kind != "number":
            raise ValueError("a clock is a number")
        if self.over_time == "rises" and self.kind == "levels":
            raise ValueError("levels without an order cannot rise")
        if set(self.levels) & set(self.missing):
            raise ValueError("a level cannot be a code of an absent value")
        shares = self.embedded.shares
        if shares is not None and (len(shares) != len(self.levels) or abs(sum(shares) - 1) > 1e-6):
            raise ValueError("embedded.shares: one per level, with sum 1")
        return self


class Locus(_Strict):
    """A variant named for itself; it is found in a panel by its id, else by a position."""

    rsid: str
    positions: dict[str, str] = Field(default_factory=dict, description="assembly: CONTIG:POSITION")
    gene: str = ""
    effect_allele: str = Field("", description="the allele whose count acts; empty takes ALT")
    frequency: float = Field(0.3, gt=0, lt=1, description="of that allele in the embedded default")


class Genotypes(_Strict):
    """What of the genotype acts."""

    loci: dict[str, Locus] = Field(default_factory=dict)
    outcome: str | None = Field(None, description="column whose association scan gives the score; None: no score")
    outcome_levels: list[str] = Field(default_factory=list, description="its levels that count as cases")
    score_loci: int = Field(3, ge=1, description="most independent variants in the score")
    admixed: dict[str, str] = Field(
        default_factory=dict, description="group: AFR=0.8,EUR=0.2@8, shares of the panel's groups and generations"
    )


class Visits(_Strict):
    """When people are seen, and for how long."""

    planned_years: list[float] = Field([0.0], min_length=1, description="after the first visit, which is at 0")
    least_gap_years: float = Field(0.1, gt=0, description="two visits are never nearer than this")
    most_gap_years: float = Field(5.0, gt=0, description="nor further apart")
    dropout_per_year: float = Field(0.1, ge=0, description="of the embedded default")
    death_per_year: float = Field(0.0, ge=0, description="of the embedded default")
    jitter_years: float = Field(0.1, ge=0, description="of the embedded default: visits are early or late by this sd")

    @model_validator(mode="after")
    def _check(self) -> Visits:
        if self.planned_years[0] != 0 or sorted(set(self.planned_years)) != self.planned_years:
            raise ValueError("planned_years must begin at 0 and rise")
        if self.least_gap_years >= self.most_gap_years:
            raise ValueError("least_gap_years must lie below most_gap_years")
        return self


class Modality(_Strict):
    """How scans are called."""

    name: str = "T1-weighted MR of the head"
    suffix: str = Field("T1w", pattern=r"^[A-Za-z0-9]+$", description="BIDS suffix")
    skull_stripped: bool = Field(False, description="whether the scans show the brain only; BIDS has to be told")
    folder: str = Field("anat", pattern=r"^[a-z]+$", description="BIDS data type")
    absent: float = Field(0.0, ge=0, lt=1, description="of the embedded default: share of visits without a scan")
    genotypes_absent: float = Field(0.0, ge=0, lt=1, description="of the embedded default: people without genotypes")
    cases: list[str] = Field(
        default_factory=list, description="of the embedded default: levels of genotypes.outcome shown as disease"
    )


class Effect(_Strict):
    """A published effect of one node on another, per unit of the cause."""

    to: str
    of: str
    level: str = Field("", description="of a column with levels: the level, against the first one")
    odds_ratio: float | None = Field(None, gt=0)
    hazard_ratio: float | None = Field(None, gt=0)
    difference: float | None = None
    per: float = Field(1.0, gt=0, description="units of a numeric cause that the figure stands for")
    source: str = Field(min_length=3, description="who found it; 'chosen' where it only shapes the embedded default")
    pmid: str = ""
    doi: str = ""
    prior_sd: float | None = Field(
        None, gt=0, description="fitting starts from the effect with this sd of its log; None: data alone decide"
    )

    @model_validator(mode="after")
    def _check(self) -> Effect:
        if sum(value is not None for value in (self.odds_ratio, self.hazard_ratio, self.difference)) != 1:
            raise ValueError("one of odds_ratio, hazard_ratio and difference")
        return self

    @property
    def value(self) -> float:
        """Log ratio or difference per one unit of the cause."""
        import math

        ratio = self.odds_ratio if self.odds_ratio is not None else self.hazard_ratio
        return (float(self.difference or 0.0) if ratio is None else math.log(ratio)) / self.per


class Profile(_Strict):
    """A whole profile; see the module's text."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    title: str
    columns: dict[str, Column]
    group: str | None = Field(None, description="column of the ancestry groups of the genotypes")
    sex: str | None = Field(None, description="column with levels F and M")
    visits: Visits = Visits()  # type: ignore[call-arg]
    genotypes: Genotypes = Genotypes()  # type: ignore[call-arg]
    modality: Modality = Modality()  # type: ignore[call-arg]
    links: dict[str, list[str]] = Field(default_factory=dict)
    effects: list[Effect] = Field(default_factory=list)
    min_count: int = Field(10, ge=3, description="levels, codes and events of fewer people are pooled")

    @property
    def clock(self) -> str | None:
        """The column that runs with the years."""
        return next((name for name, column in self.columns.items() if column.over_time == "clock"), None)

    @property
    def changing(self) -> list[str]:
        """Columns that may differ between visits, the clock left out, in the order of drawing."""
        return [n for n in self.order if n in self.columns and self.columns[n].over_time in ("changes", "rises")]

    @property
    def genetic(self) -> list[str]:
        """Nodes counted off the genotype."""
        return [*self.genotypes.loci, *([SCORE] if self.genotypes.outcome else [])]

    @property
    def order(self) -> list[str]:
        """Columns, and the genotype before what it acts on, each after its parents."""
        return _sorted(self)

    def parents(self, node: str) -> list[str]:
        """Who acts on `node`."""
        if node.startswith("missing ") and node not in self.links:
            return self.links.get(node.removeprefix("missing "), [])
        return self.links.get(node, [])

    @model_validator(mode="after")
    def _check(self) -> Profile:
        taken = [name for name in self.columns if name in RESERVED or name in (GENOTYPE, SCORE, SCAN, PREVIOUS)]
        if taken:
            raise ValueError(f"a column cannot be called {taken[0]}")
        if sum(column.over_time == "clock" for column in self.columns.values()) > 1:
            raise ValueError("one clock at most")
        both = set(self.columns) & set(self.genotypes.loci)
        if both:
            raise ValueError(f"{min(both)} is a column and a locus")
        for role, name in (("group", self.group), ("sex", self.sex), ("genotypes.outcome", self.genotypes.outcome)):
            if name is not None and name not in self.columns:
                raise ValueError(f"{role}: no column {name}")
        if self.genotypes.outcome and not set(self.genotypes.outcome_levels) <= set(
            self.columns[self.genotypes.outcome].levels
        ):
            raise ValueError("genotypes.outcome_levels: levels of the outcome")
        causes = {*self.columns, *self.genetic}
        missing = {f"missing {name}" for name in self.columns}
        nodes = {*self.columns, *missing, GENOTYPE, END, NO_GENOTYPE, NO_SCAN, SCAN}
        for child, parents in self.links.items():
            if child not in nodes:
                raise ValueError(f"links: no node {child}, try {closest(child, sorted(nodes))}")
            allowed = causes | missing
            allowed = {self.group or ""} if child == GENOTYPE else allowed
            allowed = allowed | {PREVIOUS, "years"} if child == SCAN else allowed
            for parent in parents:
                if parent not in allowed or parent == child:
                    raise ValueError(f"links: {parent} cannot act on {child}")
        for effect in self.effects:
            if effect.to not in {*self.columns, END} or effect.of not in causes:
                raise ValueError(f"effects: no nodes {effect.of} and {effect.to}")
            if effect.of not in self.parents(effect.to):
                raise ValueError(f"effects: {effect.of} on {effect.to}, but no such link")
            levels = self.columns[effect.of].levels if effect.of in self.columns else []
            if bool(levels) != bool(effect.level) or (levels and effect.level not in levels[1:]):
                raise ValueError(
                    f"effects: {effect.of} on {effect.to} needs a level other than the first of its column"
                )
        _sorted(self)
        return self


def _sorted(profile: Profile) -> list[str]:
    """Kahn's algorithm in the order of the file; raises ValueError where nodes act on each other in a circle."""
    waiting = [*profile.columns, GENOTYPE]
    done: list[str] = []
    while waiting:
        for node in waiting:
            needs = {*profile.parents(node), *profile.parents(f"missing {node}")}
            needs = {GENOTYPE if n in profile.genetic else n.removeprefix("missing ") for n in needs} - {node}
            if needs <= {*done}:
                done.append(node)
                waiting.remove(node)
                break
        else:
            raise ValueError(f"links: {', '.join(waiting)} act on each other in a circle")
    return done


def parse_profile(values: Any, where: object = "profile") -> Profile:
    """Profile of plain values; the first fault becomes one line.

    Raises:
        UsageError: an unknown key (the nearest one is named), or values that do not fit together.
    """
    if not isinstance(values, dict):
        raise UsageError("a mapping", type(values).__name__, where)
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        fault = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        key = ".".join(map(str, fault["loc"])) or "profile"
        known = {*Profile.model_fields, *Column.model_fields, *EmbeddedColumn.model_fields, *Effect.model_fields}
        known |= {*Visits.model_fields, *Genotypes.model_fields, *Locus.model_fields, *Modality.model_fields}
        hint = closest(str(fault["loc"][-1]), sorted(known)) if fault["type"] == "extra_forbidden" else ""
        raise UsageError(f"{key}: {fault['msg']}", where=where, hint=hint) from None


def load_profile(path: str | Path) -> Profile:
    """Profile of a YAML file, or of a name among configs/cohort of the checkout.

    Raises:
        UsageError: no such file or name, not YAML, or a profile that does not fit together.
    """
    place = Path(path)
    if not place.suffix and not place.is_file():
        shipped = Path(__file__).resolve().parents[2] / "configs" / "cohort" / "profiles"
        place = shipped / f"{path}.yaml"
        if not place.is_file():
            raise UsageError(
                "a profile", f"'{path}'", shipped.name, closest(str(path), [p.stem for p in shipped.glob("*.yaml")])
            )
    try:
        return parse_profile(yaml.safe_load(place.read_text(encoding="utf-8")), place)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError("a YAML file", " ".join(str(error).split())[:160], place) from None


def check_row(profile: Profile, row: dict[str, Any], before: dict[str, Any] | None = None) -> list[str]:
    """What in a row (and after the person's row before it) breaks the rules; one sentence each."""
    broken = []
    for name, column in profile.columns.items():
        value, earlier = row[name], None if before is None else before[name]
        if value in column.missing:
            continue
        if column.numeric:
            low, high = column.range or (0.0, 0.0)
            years = float(row["years"]) if column.over_time == "clock" else 0.0
            if not low <= float(value) - years <= high:  # the clock's range is that of the first visit
                broken.append(f"{name} {value} outside {low:g} to {high:g}")
            if column.kind == "count" and float(value) != round(float(value)):
                broken.append(f"{name} {value} is no whole number")
        elif value not in column.levels:
            broken.append(f"{name} '{value}' is no level")
            continue
        if earlier is None or earlier in column.missing:
            continue
        at = float if column.numeric else column.levels.index
        if column.over_time in ("clock", "rises") and at(value) < at(earlier):  # type: ignore[operator]
            broken.append(f"{name} falls from {earlier} to {value}")
        if column.over_time == "fixed" and value != earlier:
            broken.append(f"{name} differs between visits")
    if before is not None and float(row["years"]) <= float(before["years"]):
        broken.append("a visit is not after the one before")
    return broken


def check_rows(profile: Profile, rows: Iterable[dict[str, Any]], where: object = "subjects table") -> None:
    """Raise InputError at the first row that breaks a rule; rows of a person stand together, in the order of visits.

    An absent value between two others is skipped: what never falls is compared with the last value known.
    """
    last: dict[str, Any] | None = None
    for number, row in enumerate(rows, start=2):
        same = last is not None and last["subject"] == row["subject"]
        broken = check_row(profile, row, last if same else None)
        if broken:
            raise InputError(f"rows that keep the rules of '{profile.name}'", broken[0], f"{where} row {number}")
        known = {n: last[n] for n in profile.columns if same and row[n] in profile.columns[n].missing} if last else {}
        last = {**row, **known}
