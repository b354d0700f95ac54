"""The joint model of a cohort: table, haplotypes and scans linked as a profile declares, and the people it makes.

    model = engine.cohort.fit("visits.csv", "alzheimer", genotypes="panel.bcf", scans="heads.yaml", out="model")
    for person in model.generate(100, where={"diagnosis": "AD", "age": (60, 80)}, seed=1):
        person.id, person.visits, person.haplotypes, person.scans

Person k is a pure function of (model, seed, k, what is asked for): the order is that of the links, and a person who is not
what was asked for is drawn anew from the same stream, which is exact conditioning. Asked-for people are never edited.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from engine import atomic, provenance
from engine.cohort.genetics import Genetics, fit_genetics, genetics_from_json
from engine.cohort.genotypes import dosage
from engine.cohort.longitudinal import TableModel, check_where, coded, fit_table, model_from_json
from engine.cohort.profile import GENOTYPE, NO_GENOTYPE, NO_SCAN, PREVIOUS, SCAN, Profile, load_profile
from engine.cohort.tables import Table, read_table, rows, write_table
from engine.errors import CorruptRun, InputError, UsageError
from engine.genomics import run_folder
from engine.genomics.li_stephens import LiStephensConfig
from engine.genomics.panel import HaplotypePanel, read_panel, synthetic_ids

if TYPE_CHECKING:
    from engine.imaging.generate import Model as ScanModel
    from engine.imaging.volume import Volume

SCHEMA = "engine.cohort/1"
ROUND = 1 << 40  # candidates of one round; a person's numbers do not meet another's
MOST_CANDIDATES = 4096
_INTERVAL = "interval_years"
_TOGETHER = 256  # people drawn at one time
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Person:
    """A synthetic person.

    Attributes:
        id: SYN and nine digits. number: k. candidate: the stream's index that became this person.
        visits: a dict per visit: visit, years, the profile's columns (numbers, levels, or the code of an absent value),
            the genetic nodes, "no genotype", "no scan", "end", "end_years".
        group: of the haplotypes; "" without genotypes.
        haplotypes: a panel of one, or None where the person has no genotypes.
        scans: one volume per visit, or None where the visit has none.
    """

    id: str
    number: int
    candidate: int
    visits: list[dict[str, Any]]
    group: str
    haplotypes: HaplotypePanel | None
    scans: list[Volume | None]


@dataclass(frozen=True)
class CohortModel:
    """A fitted cohort.

    Attributes:
        table: covariates, visits and outcomes; with the profile.
        genetics: haplotypes; None where the cohort has none.
        scan_model: what draws scans; None where the cohort has none.
        scan_covariates: names that the scans are conditioned on.
        notes: what was pooled, left out or assumed.
    """

    table: TableModel
    genetics: Genetics | None = None
    scan_model: ScanModel | None = None
    scan_covariates: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def profile(self) -> Profile:
        return self.table.profile

    def generate(
        self,
        n: int,
        where: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        start: int = 0,
        scans: bool = True,
        complete: bool = False,
        most: int = MOST_CANDIDATES,
    ) -> Iterator[Person]:
        """Stream the people start .. start + n - 1, one at a time.

        Args:
            where: column -> level, list of levels, number, or (from, to); what the first visit must be. People are drawn
                until one is; at most `most` candidates for each.
            scans: False leaves the scans out, which are most of the time.
            complete: everybody has genotypes and every visit a scan; otherwise as often as in the data.

        Raises:
            UsageError: n or start below 0, `where` names no column or asks for what cannot be, or a person who is not
                among `most` candidates; the share of candidates that were right is said.
        """
        if n < 0 or start < 0 or most < 1:
            raise UsageError(
                "n and start of at least 0, and candidates", f"n {n}, start {start}, most {most}", "generate"
            )
        check_where(self.profile, where or {})
        return self._people(n, dict(where or {}), seed, start, scans, complete, most)

    def _people(
        self, n: int, where: dict[str, Any], seed: int, start: int, scans: bool, complete: bool, most: int
    ) -> Iterator[Person]:
        for first in range(start, start + n, _TOGETHER):
            numbers = np.arange(first, min(first + _TOGETHER, start + n))
            candidate_k, visits_k = self.candidates(numbers, where, seed, most)
            for at, k in enumerate(numbers.tolist()):
                yield self._person(k, int(candidate_k[at]), visits_k[at], seed, scans, complete)

    def candidates(
        self, number_k: np.ndarray, where: Mapping[str, Any], seed: int, most: int
    ) -> tuple[np.ndarray, list[list[dict[str, Any]]]]:
        """For each person's number the first of its candidates that is what was asked for, and its rows."""
        draw = None if self.genetics is None else self.genetics.draw(seed)
        found: dict[int, tuple[int, list[dict[str, Any]]]] = {}
        waiting, tried = number_k, 0
        for turn in range(most):
            index, made = self.table.draw(waiting + turn * ROUND, seed, draw, where)
            tried += len(waiting)
            found |= {int(i) - turn * ROUND: (int(i), visits) for i, visits in zip(index, made)}
            waiting = waiting[~np.isin(waiting, index - turn * ROUND)]
            if not len(waiting):
                break
        if len(waiting):
            raise UsageError(
                "people that the model makes now and then",
                f"{len(found)} of {tried} candidates were right, none of {most} for person {waiting[0]}",
                f"where {dict(where)}", "a wider range, fewer conditions, or more candidates",
            )  # fmt: skip
        return np.array([found[k][0] for k in number_k.tolist()]), [found[k][1] for k in number_k.tolist()]

    def labels(self, visits: list[list[dict[str, Any]]]) -> list[str] | None:
        """Ancestry groups of people, where haplotypes depend on them."""
        group = self.profile.group if self.profile.parents(GENOTYPE) else None
        return None if group is None else [str(v[0][group]) for v in visits]

    def sexes(self, visits: list[list[dict[str, Any]]]) -> list[str]:
        """male, female or unknown."""
        name = self.profile.sex
        words = {"M": "male", "F": "female"}
        return ["unknown" if name is None else words.get(str(v[0][name]), "unknown") for v in visits]

    def _person(
        self, k: int, candidate: int, visits: list[dict[str, Any]], seed: int, scans: bool, complete: bool
    ) -> Person:
        name, haplotypes, group = synthetic_ids(k, 1)[0], None, ""
        if complete:
            visits = [{**row, NO_GENOTYPE: False, NO_SCAN: False} for row in visits]
        if self.genetics is not None and not visits[0][NO_GENOTYPE]:
            paths, groups = self.genetics.paths(np.array([candidate]), self.labels([visits]), seed)
            haplotypes = self.genetics.panel(paths, groups, [name], self.sexes([visits]))
            group = str(groups[0])
        if self.genetics is None:
            visits = [{**row, NO_GENOTYPE: True} for row in visits]
        if self.scan_model is None:
            visits = [{**row, NO_SCAN: True} for row in visits]
        volumes: list[Volume | None] = [None] * len(visits)
        if scans and self.scan_model is not None:
            volumes = self._scans(k, visits, seed)
        return Person(name, k, candidate, visits, group, haplotypes, volumes)

    def _scans(self, k: int, visits: list[dict[str, Any]], seed: int) -> list[Volume | None]:
        from engine.imaging import generate as imaging

        assert self.scan_model is not None
        wanted = [at for at, row in enumerate(visits) if not row[NO_SCAN]]
        given = [self.scan_given(visits[at]) for at in wanted]
        made = imaging.sample(self.scan_model, 1, seed=seed, start=k, covariates=[given]) if wanted else iter(())
        volumes: list[Volume | None] = [None] * len(visits)
        for at, (_, volume, _) in zip(wanted, made):
            volumes[at] = volume
        return volumes

    def scan_given(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What of a visit the scan model is told; absent values are not given."""
        given = {}
        for name in self.scan_covariates:
            column = self.profile.columns.get(name)
            value = row["years" if name == _INTERVAL else name]
            if column is None or value not in column.missing:
                given[name] = value
        return given

    def save(self, folder: str | Path, scan_run: str | Path | None = None) -> Path:
        """Write the model: cohort.json, genomics/ (which holds the panel), imaging/ (a copy of the run `scan_run`).

        Raises:
            UsageError: the folder exists.
        """
        with atomic.atomic_folder(folder) as made:
            self._write(made, scan_run)
        return Path(folder)

    def _write(self, made: Path, scan_run: str | Path | None) -> None:
        if self.genetics is not None:
            self.genetics.model.save(made / "genomics")
        if scan_run is not None and Path(scan_run) != made / "imaging":
            keep = ("config.yaml", "provenance.json", "log.jsonl")
            (made / "imaging").mkdir()
            for name in keep:
                if (Path(scan_run) / name).is_file():
                    shutil.copy2(Path(scan_run) / name, made / "imaging" / name)
            shutil.copytree(Path(scan_run) / "checkpoints", made / "imaging" / "checkpoints")
        value = {
            "schema": SCHEMA,
            "table": self.table.to_json(),
            "genetics": None if self.genetics is None else self.genetics.to_json(),
            "scan_covariates": list(self.scan_covariates),
            "scans": scan_run is not None,
            "notes": list(self.notes),
        }
        atomic.write_json(made / "cohort.json", value)
        provenance.write(made, "cohort fit", config=self.profile.model_dump(mode="json"), synthetic=False)


def load(folder: str | Path, *, scans: bool = True, device: str = "auto") -> CohortModel:
    """The model of a folder that `fit` or `CohortModel.save` wrote; `scans` False leaves the scan model where it is.

    Raises:
        CorruptRun: something else, or of another schema.
    """
    folder = Path(folder)
    try:
        value = json.loads((folder / "cohort.json").read_text(encoding="utf-8"))
        if value["schema"] != SCHEMA:
            raise CorruptRun(SCHEMA, str(value["schema"]), folder, "fitting again")
        table = model_from_json(value["table"])
    except (OSError, ValueError, KeyError, TypeError) as fault:
        hint = "the folder given to --out of `engine cohort fit`"
        raise CorruptRun("a cohort model", repr(fault)[:200], folder, hint) from None
    genetics = scan_model = None
    if value["genetics"] is not None:
        genetics = genetics_from_json(value["genetics"], run_folder.load(folder / "genomics"), table.profile)
    if value["scans"] and scans:
        from engine.imaging.generate import load_model

        scan_model = load_model(folder / "imaging", device)
    return CohortModel(table, genetics, scan_model, tuple(value["scan_covariates"]), tuple(value["notes"]))


def fit(
    table: str | Path | Table,
    profile: str | Path | Profile,
    *,
    genotypes: str | Path | HaplotypePanel | None = None,
    scans: str | Path | ScanModel | None = None,
    out: str | Path | None = None,
    genetic_map: str | Path | None = None,
    haplotypes: LiStephensConfig | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> CohortModel:
    """Fit the joint model of a subjects table.

    Args:
        table: one row per visit (`longitudinal.fit_table`); rows with split "holdout" take no part in anything.
        profile: a name, a YAML file, or a profile.
        genotypes: phased panel, whose sample ids are subjects; people of the table may be absent from it.
        scans: config of a scan model to be trained on the table's column image (needs `out`), or a run folder or model
            that has been trained.
        out: folder for the model; must not exist. Scans are trained beside it, in `OUT.scans`, which goes when the model is
            whole: a training that was interrupted goes on when the same is asked for again.
        haplotypes: settings of the copying model. overrides: of the scan config, "a.b=c".

    Raises:
        InputError: table and profile do not fit, or a locus is not in the panel. UsageError: `out` exists, or `OUT.scans`
            holds a training on another table or of another config. Others as `engine.imaging.train.train`.
    """
    profile = profile if isinstance(profile, Profile) else load_profile(profile)
    place = Path(".") if isinstance(table, dict) else Path(table).parent
    columns = table if isinstance(table, dict) else read_table(table)
    train = columns["split"].astype(str) == "train" if "split" in columns else np.ones(rows(columns), dtype=bool)
    panel = None
    if genotypes is not None:
        panel = genotypes if isinstance(genotypes, HaplotypePanel) else read_panel(genotypes, map=genetic_map)
    genetics, genetic = _genetics(profile, columns, train, panel, haplotypes)
    if progress is not None:
        progress("haplotypes and table", 1, 2)
    made = fit_table(profile, columns, genetic)
    if progress is not None:
        progress("haplotypes and table", 2, 2)
    notes = made.notes
    if genetics is not None and genetics.score is not None and not len(genetics.score.site):
        notes = (
            *notes,
            f"score: no variant is significant for {profile.genotypes.outcome}, the score is 0 for everybody",
        )
    model = CohortModel(made, genetics, None, (), notes)
    if out is None:
        return _with_scans(model, scans, notes)
    out = Path(out)
    if out.exists():
        raise UsageError(
            "a folder that does not exist yet", "an existing one", out, "another --out, or remove it first"
        )
    if scans is not None and not isinstance(scans, (str, Path)):
        raise UsageError("a run folder or a config for scans, with out", "a model in memory", "cohort fit")
    run = None if scans is None else Path(scans)
    trained = out.with_name(f"{out.name}.scans") if run is not None and run.is_file() else None
    if run is not None and trained is not None:
        run = _train(model, columns, genetic, place, run, trained, overrides, progress)
    with atomic.atomic_folder(out) as folder:
        if run is not None and trained is not None:
            # all of it but people's scans; its tables of scans lie as deep as before, so that their paths hold
            run = shutil.copytree(run, folder / "imaging", ignore=shutil.ignore_patterns("cache"))
        model = _with_scans(model, run, notes)
        model._write(folder, run)
    if trained is not None:
        shutil.rmtree(trained)
    return model


def _with_scans(model: CohortModel, scans: Any, notes: tuple[str, ...]) -> CohortModel:
    """The model with its scan model, told what the links say and the scan model knows."""
    from engine.imaging.generate import load_model

    if scans is None:
        return model
    scan_model = load_model(scans) if isinstance(scans, (str, Path)) else scans
    wanted = [name for name in model.profile.parents(SCAN) if name != PREVIOUS]
    known = {covariate.name for covariate in scan_model.covariates}
    # the embedded cohort's own table of scans has this name for it
    wanted = [_INTERVAL if n == "years" and n not in known and _INTERVAL in known else n for n in wanted]
    unknown = [
        f"{name} -> scan is left out: the scan model was trained without" for name in wanted if name not in known
    ]
    if PREVIOUS in model.profile.parents(SCAN) and not scan_model.config.flow.baseline:
        unknown.append("previous scan -> scan: the scan model was trained without; visits share their noise instead")
    told = tuple(name for name in wanted if name in known)
    return replace(model, scan_model=scan_model, scan_covariates=told, notes=(*notes, *unknown))


def _genetics(
    profile: Profile, table: Table, train: np.ndarray, panel: HaplotypePanel | None, config: LiStephensConfig | None
) -> tuple[Genetics | None, dict[str, np.ndarray]]:
    """Haplotypes of the training people, and the genetic nodes of every row of the table, NaN without genotypes."""
    if panel is None:
        return None, {}
    subject = table["subject"].astype(str)
    first = {name: at for at, name in reversed(list(enumerate(subject.tolist())))}
    place = {name: at for at, name in enumerate(panel.samples.ids)}
    learned = [name for name in panel.samples.ids if name in first and train[first[name]]]
    if len(learned) < 10:
        raise InputError(
            "10 people or more with genotypes and rows of the table", f"{len(learned)}", "panel",
            "sample ids of the panel that are subjects of the table",
        )  # fmt: skip
    own = panel.select(samples=learned)
    at = np.array([first[name] for name in learned])
    if profile.group is not None:
        own = replace(own, samples=replace(own.samples, group=table[profile.group][at].astype(str)))
        plain = [str(g) not in profile.genotypes.admixed for g in own.samples.group]  # type: ignore[union-attr]
        own = own if all(plain) else own.select(samples=np.array(plain))
        at = at[np.array(plain)]
    outcome = covariates = None
    if profile.genotypes.outcome:
        name = profile.genotypes.outcome
        values = coded(profile.columns[name], table[name][at], f"column {name},")
        cases = [profile.columns[name].levels.index(level) for level in profile.genotypes.outcome_levels]
        outcome = np.where(values.kind_n == 0, np.isin(values.value_n, cases), np.nan).astype(float)
        covariates = _beside(profile, table, at, name)
    genetics = fit_genetics(profile, own, outcome, covariates, config)
    have = np.array([place.get(name, -1) for name in subject])
    made = {node: np.full(len(subject), np.nan) for node in profile.genetic}
    if genetics.score is not None or genetics.site:
        sites = [*genetics.site.values(), *(genetics.score.site.tolist() if genetics.score is not None else [])]
        counted = dosage(panel, np.array(sites, dtype=np.int64)).astype(float)
        for j, name in enumerate(genetics.site):
            one = 2 - counted[:, j] if genetics.flipped[name] else counted[:, j]
            made[name] = np.where(have >= 0, one[have], np.nan)
        if genetics.score is not None:
            score = counted[:, len(genetics.site) :] @ genetics.score.weight - genetics.score.centre
            made["score"] = np.where(have >= 0, score[have], np.nan)
    return genetics, made


def _beside(profile: Profile, table: Table, at: np.ndarray, outcome: str) -> np.ndarray:
    """Covariates of the association scan: the outcome's other parents and the group, absent values at the mean."""
    columns = []
    names = [n for n in profile.parents(outcome) if n in profile.columns]
    for name in dict.fromkeys([*names, *([profile.group] if profile.group else [])]):
        spec = profile.columns[name]
        values = coded(spec, table[name][at], f"column {name},")
        here = values.kind_n == 0
        if spec.numeric:
            mean, sd = float(values.value_n[here].mean()), float(values.value_n[here].std()) or 1.0
            columns.append(np.where(here, (values.value_n - mean) / sd, 0.0))
        else:
            made = [(here & (values.value_n == level)).astype(float) for level in range(1, len(spec.levels))]
            columns += [column for column in made if 0 < column.sum() < len(column)]
    return np.stack(columns, axis=1) if columns else np.zeros((len(at), 0))


def _train(
    model: CohortModel,
    table: Table,
    genetic: Mapping[str, np.ndarray],
    place: Path,
    config: Path,
    folder: Path,
    overrides: Sequence[str],
    progress: Progress | None,
) -> Path:
    """Train the scans on the rows with an image, conditioned as the links say; the run in `folder`, gone on with where it
    was interrupted.

    Raises:
        UsageError: `folder` is of another table, or its run of another config.
    """
    from engine.imaging.commands import train_command

    profile = model.profile
    wanted = [name for name in profile.parents(SCAN) if name != PREVIOUS]
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    numeric = lambda name: name not in profile.columns or profile.columns[name].numeric  # noqa: E731
    values["data"]["covariates"] = {
        name: {"kind": "continuous"}
        if numeric(name)
        else {"kind": "categorical", "levels": profile.columns[name].levels}
        for name in wanted
    }
    values["data"]["split_column"] = "split"
    values["flow"]["baseline"] = PREVIOUS in profile.parents(SCAN)
    if "image" not in table:
        raise InputError("a column 'image'", ", ".join(table), "subjects table")
    have = np.flatnonzero(table["image"].astype(str) != "")
    images = [str((place / str(table["image"][row])).resolve()) for row in have]
    made: Table = {"image": np.array(images, dtype=object)}
    for name in ("subject", "visit"):
        made[name] = table[name][have]
    made["split"] = table["split"][have] if "split" in table else np.full(len(have), "train", dtype=object)
    for name in wanted:
        cells = genetic[name] if name in genetic else table[name]
        absent = profile.columns[name].missing if name in profile.columns else []
        made[name] = np.array(
            ["" if str(cells[row]) in (*absent, "nan") else str(cells[row]) for row in have], dtype=object
        )
    folder.mkdir(parents=True, exist_ok=True)
    run, asked, begun = folder / "run", folder / "asked.csv", folder / "scans.csv"
    resume = (run / "config.yaml").is_file()
    write_table(asked, made)
    if resume and begun.read_bytes() != asked.read_bytes():
        asked.unlink()
        raise UsageError(
            "the table that this training was begun with", "another", folder, "remove it, or another --out"
        )
    os.replace(asked, begun)
    atomic.write_text(folder / "scans.yaml", yaml.safe_dump(values, sort_keys=False))
    train_command(folder / "scans.yaml", begun, run, overrides=overrides, resume=resume, progress=progress)
    return run
