"""The joint model of a mixed-type longitudinal table: one row per visit, fitted and drawn by a profile's links.

Baseline: an autoregression along the links, node by node. A number's normal score is linear in its parents, so that its margin
is the data's (a Gaussian copula along the graph); levels are logistic: proportional odds where they have an order. Whether a
value is absent, and for which reason, is a node before the value; parents that are absent act through an indicator and their
reason is kept as the code it was. A value that is absent for reasons within itself cannot be told from the data: what is
modelled is that absence depends on the parents and that what comes later depends on absence.
Over time: numbers change by a walk with a measurement's scatter, levels are left at a rate, both for intervals of any length;
dropout and death end a person. Rules of the profile hold in every row that is drawn.
Small counts: levels, reasons and events of fewer than `min_count` people are pooled; no row keeps a person's own number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine import seeding
from engine.cohort import nodes
from engine.cohort.nodes import Absence, Change, Ends, Feature, LevelNode, Move, NumberNode, Values, design
from engine.cohort.profile import END, GENOTYPE, NO_GENOTYPE, NO_SCAN, Column, Profile
from engine.cohort.regressions import WEAK_SD, Density, Ordered, fit_ordered, fit_rate
from engine.cohort.tables import Table, require, rows
from engine.errors import InputError, UsageError, closest

Where = Mapping[str, Any]
Genetics = Callable[
    [np.ndarray, "list[str] | None"], dict[str, np.ndarray]
]  # indices, groups -> value of genetic nodes
_PER_NODE = 3
_PER_VISIT = 6


@dataclass(frozen=True)
class TableModel:
    """A fitted table; `nodes.to_json` saves it.

    Attributes:
        absence, first: of each column, at the first visit. later_absence, later: of those that change.
        ends: visits. no_genotype, no_scan: absence of modalities.
        people, visits: of the fit. notes: what was pooled or could not be fitted, one sentence each.
    """

    profile: Profile
    absence: dict[str, Absence]
    first: dict[str, NumberNode | LevelNode]
    later_absence: dict[str, Absence]
    later: dict[str, Change | Move]
    ends: Ends
    no_genotype: Absence
    no_scan: Absence
    genetic_sd: dict[str, float]
    people: int
    visits: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "profile"}
        return {"profile": self.profile.model_dump(mode="json"), **{k: nodes.to_json(v) for k, v in parts.items()}}

    def draw(
        self, index_n: np.ndarray, seed: int, genetics: Genetics | None = None, where: Where | None = None
    ) -> tuple[np.ndarray, list[list[dict[str, Any]]]]:
        """Candidates with these numbers: which of them are what was asked for, and their rows, one list of visits each.

        A candidate's rows depend on the model, the seed and its number. `where` is looked at as soon as a value is
        there, and the genotype is drawn for those who are left.
        """
        alive, state = self._first_visit(np.asarray(index_n, dtype=np.int64), seed, genetics, where or {})
        return alive, self._visits(alive, state, seed) if len(alive) else []

    def _first_visit(
        self, index_n: np.ndarray, seed: int, genetics: Genetics | None, where: Where
    ) -> tuple[np.ndarray, dict[str, Values]]:
        order = self.profile.order
        u = np.array([seeding.generator(seed, "cohort.first", k).random(_PER_NODE * len(order) + 2) for k in index_n])
        u = u.reshape(len(index_n), _PER_NODE * len(order) + 2)
        state: dict[str, Values] = {}
        for at, name in enumerate(order):
            n = len(index_n)
            if n == 0:
                break
            if name == GENOTYPE:
                group = self.profile.group if self.profile.parents(GENOTYPE) else None
                labels = None if group is None else self._labels(group, state[group])
                values = {} if genetics is None else genetics(index_n, labels)
                for node in self.profile.genetic:
                    known = values.get(node)
                    state[node] = Values(np.zeros(n), np.ones(n, dtype=np.int64)) if known is None else _present(known)
                    if known is None:  # the link is left out: everybody is average
                        state[node] = _present(np.full(n, self._mean_of(node)))
                continue
            column, absence, node_model = self.profile.columns[name], self.absence[name], self.first[name]
            wanted = _wanted(column, name, where)
            kind_n = absence.draw(state, u[:, _PER_NODE * at])
            if wanted is not None and not absence.features:
                kind_n[:] = 0  # exact: absence does not depend on anybody
            if isinstance(node_model, NumberNode):
                within = wanted if isinstance(wanted, tuple) and not node_model.features else None
                value_n = node_model.draw(state, u[:, _PER_NODE * at + 1], within)
            else:
                allowed = tuple(wanted) if isinstance(wanted, list) and not node_model.features else None
                if allowed is not None and node_model.chance(allowed) <= 0:
                    raise UsageError(f"levels of {name} that the model makes", f"{where[name]}", "where")
                value_n = node_model.draw(state, u[:, _PER_NODE * at + 1], allowed)
            state[name] = Values(np.where(kind_n == 0, value_n, 0.0), kind_n)
            if wanted is not None:
                keep = kind_n == 0
                if isinstance(wanted, tuple):
                    keep &= (value_n >= wanted[0]) & (value_n <= wanted[1])
                else:
                    keep &= np.isin(value_n, list(wanted))
                chosen = np.flatnonzero(keep)
                index_n, u = index_n[chosen], u[chosen]
                state = {node: values.take(chosen) for node, values in state.items()}
        if len(index_n):
            state["\0no genotype"] = _present(self.no_genotype.draw(state, u[:, -1]).astype(float))
        return index_n, state

    def _mean_of(self, node: str) -> float:
        for model in (*self.first.values(), *self.later.values()):
            for feature in model.features:
                if feature.name == node:
                    return feature.mean
        return 0.0

    def _labels(self, name: str, values: Values) -> list[str]:
        levels = self.profile.columns[name].levels
        return [levels[int(v)] for v in values.value_n]

    def _visits(self, index_n: np.ndarray, state: dict[str, Values], seed: int) -> list[list[dict[str, Any]]]:
        n, profile = len(index_n), self.profile
        changing, clock = profile.changing, profile.clock
        width = _PER_VISIT + 4 * len(changing)
        u = np.array([seeding.generator(seed, "cohort.visits", k).random(width * self.ends.visits) for k in index_n])
        u = u.reshape(n, self.ends.visits, width)
        made: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        end, end_years = np.full(n, "completed", dtype=object), np.zeros(n)
        active, years = np.arange(n), np.zeros(n)
        known = dict(state)  # of what never falls: the last value that was there
        for number in range(1, self.ends.visits + 1):
            no_scan = self.no_scan.draw(state, u[active, number - 1, 5])
            for at, person in enumerate(active.tolist()):
                made[person].append(self._row(state, at, number, float(years[person]), int(no_scan[at])))
            if number == self.ends.visits:
                end_years[active] = years[active]
                break
            died, left, gap = self.ends.draw(state, number, u[active, number - 1, :4])
            end[active[died]], end[active[left]] = "death", "dropout"
            end_years[active] = years[active] + np.where(died, gap, 0.0)
            stay = np.flatnonzero(~died & ~left)
            active, gap = active[stay], gap[stay]
            if not len(active):
                break
            before = {node: values.take(stay) for node, values in state.items()}
            known = {node: values.take(stay) for node, values in known.items()}
            years[active] += gap
            state = dict(before)
            if clock is not None:
                state[clock] = replace(before[clock], value_n=before[clock].value_n + gap)
            for at, name in enumerate(changing):
                draws = u[active, number, _PER_VISIT + 4 * at : _PER_VISIT + 4 * at + 4]
                state[name] = self._later_value(name, state, before, known, gap, draws)
            for name in changing:
                here = state[name].kind_n == 0
                last = known[name]
                known[name] = Values(np.where(here, state[name].value_n, last.value_n), np.where(here, 0, last.kind_n))
        for person, visits in enumerate(made):
            for row in visits:
                row["end"], row["end_years"] = str(end[person]), float(end_years[person])
        return made

    def _later_value(
        self,
        name: str,
        state: dict[str, Values],
        before: dict[str, Values],
        known: dict[str, Values],
        gap_n: np.ndarray,
        u_n4: np.ndarray,
    ) -> Values:
        """A column at the next visit. Where the value before is absent it is drawn as at a first visit; what never falls
        starts from the last value that was there."""
        now = {**state, name: before[name]}
        kind_n = self.later_absence[name].draw(now, u_n4[:, 0])
        column, later, first = self.profile.columns[name], self.later[name], self.first[name]
        earlier = known[name] if column.over_time == "rises" else before[name]
        lacking = earlier.kind_n > 0
        start = np.where(lacking, first.draw(state, u_n4[:, 3]), earlier.value_n)
        conditions = {**state, name: _present(start)}
        if isinstance(later, Change):
            value_n = later.draw(conditions, start, gap_n, u_n4[:, 1])
        else:
            value_n = later.draw(conditions, start, gap_n, u_n4[:, 1], u_n4[:, 2])
        return Values(np.where(kind_n == 0, np.where(lacking, start, value_n), 0.0), kind_n)

    def _row(self, state: dict[str, Values], at: int, number: int, years: float, no_scan: int) -> dict[str, Any]:
        row: dict[str, Any] = {"visit": number, "years": round(years, 4)}
        for name, column in self.profile.columns.items():
            value, kind = float(state[name].value_n[at]), int(state[name].kind_n[at])
            if kind:
                row[name] = column.missing[kind - 1]
            elif column.numeric:
                row[name] = int(value) if column.kind == "count" else round(value, 4)
            else:
                row[name] = column.levels[int(value)]
        for node in self.profile.genetic:
            row[node] = round(float(state[node].value_n[at]), 6)
        row[NO_GENOTYPE] = bool(state["\0no genotype"].value_n[at])
        row[NO_SCAN] = bool(no_scan)
        return row


def _present(value_n: np.ndarray) -> Values:
    value_n = np.asarray(value_n, dtype=np.float64)
    return Values(value_n, np.zeros(len(value_n), dtype=np.int64))


def _wanted(column: Column, name: str, where: Where) -> tuple[float, float] | list[int] | None:
    """What `where` asks of a column: a range of numbers, or places of levels; None for nothing."""
    if name not in where:
        return None
    asked = where[name]
    if column.numeric:
        low, high = asked if isinstance(asked, (tuple, list)) and len(asked) == 2 else (asked, asked)
        try:
            pair = float(low), float(high)
        except (TypeError, ValueError):
            raise UsageError("a number or a pair of numbers", repr(asked), f"where {name}") from None
        bounds = column.range or pair
        if not pair[0] <= pair[1] or pair[1] < bounds[0] or pair[0] > bounds[1]:
            raise UsageError(f"a range within {bounds[0]:g} to {bounds[1]:g}", f"{asked}", f"where {name}")
        return pair
    listed = [asked] if isinstance(asked, str) else list(asked)
    for level in listed:
        if level not in column.levels:
            raise UsageError("a level of the column", repr(level), f"where {name}", closest(str(level), column.levels))
    return [column.levels.index(level) for level in listed]


def check_where(profile: Profile, where: Where) -> None:
    """Raise UsageError where `where` names no column or asks for what no row can be."""
    for name in where:
        if name not in profile.columns:
            raise UsageError("a column of the profile", f"'{name}'", "where", closest(name, list(profile.columns)))
        _wanted(profile.columns[name], name, where)


# ---------------------------------------------------------------------------------------------------------------- fitting


def coded(column: Column, cells: np.ndarray, where: str) -> Values:
    """Cells of a table (text or numbers) as values and reasons of absence; an empty cell counts as the first reason.

    Raises:
        InputError: a cell that is neither a value of the column nor one of its codes.
    """
    value_n, kind_n = np.zeros(len(cells)), np.zeros(len(cells), dtype=np.int64)
    for at, cell in enumerate(cells.tolist()):
        text = "" if cell is None or cell != cell else str(cell).strip()
        if text == "" or text in column.missing:
            kind_n[at] = 1 + (column.missing.index(text) if text else 0)
        elif column.numeric:
            try:
                value_n[at] = float(text)
            except ValueError:
                codes = ", ".join(column.missing)
                raise InputError(f"a number, or one of {codes}", f"'{text}'", f"{where} row {at + 2}") from None
        elif text in column.levels:
            value_n[at] = column.levels.index(text)
        else:
            raise InputError(
                f"one of {', '.join((*column.levels, *column.missing))}", f"'{text}'", f"{where} row {at + 2}",
                closest(text, column.levels),
            )  # fmt: skip
    return Values(value_n, kind_n)


def fit_table(profile: Profile, table: Table, genetic: Mapping[str, np.ndarray] | None = None) -> TableModel:
    """Fit to a table of visits: columns subject, visit (1, 2, ...), years (since the first visit) and those of the profile;
    rows of a person stand together in the order of visits. Optional: end ("completed", "dropout", "death"), end_years,
    split (rows of "holdout" take no part), image (empty where there is no scan).

    Args:
        genetic: by node (`profile.genetic`) a value per row, NaN where the person has no genotype.

    Raises:
        InputError: a column is absent, a row breaks a rule of the profile, or fewer than 20 people are left.
    """
    from engine.cohort.profile import check_rows

    require(table, ("subject", "visit", "years", *profile.columns), "subjects table")
    genetic = dict(genetic or {})
    keep = np.flatnonzero(table["split"] == "train") if "split" in table else np.arange(rows(table))
    table, genetic = {k: v[keep] for k, v in table.items()}, {k: np.asarray(v)[keep] for k, v in genetic.items()}
    state = {name: coded(column, table[name], f"column {name},") for name, column in profile.columns.items()}
    subject, years = table["subject"].astype(str), np.asarray(table["years"], dtype=np.float64)
    check_rows(profile, _records(profile, state, subject, years))
    for node in profile.genetic:
        value = np.asarray(genetic.get(node, np.full(len(years), np.nan)), dtype=np.float64)
        state[node] = Values(np.nan_to_num(value), np.isnan(value).astype(np.int64))
    starts = np.flatnonzero(np.concatenate([[True], subject[1:] != subject[:-1]])) if len(subject) else np.zeros(0, int)
    if len(set(subject[starts])) != len(starts):
        raise InputError("the visits of a person together", "apart", "subjects table", "sort it by subject and visit")
    if len(starts) < 20:
        raise InputError("20 people or more", str(len(starts)), "subjects table")
    fit = _Fit(
        profile, state, starts, np.flatnonzero(subject[1:] == subject[:-1]) if len(subject) else starts, years, []
    )
    return fit.model(table)


def _records(profile: Profile, state: dict[str, Values], subject: np.ndarray, years: np.ndarray) -> Any:
    for at in range(len(subject)):
        row: dict[str, Any] = {"subject": subject[at], "years": years[at]}
        for name, column in profile.columns.items():
            value, kind = state[name].value_n[at], int(state[name].kind_n[at])
            row[name] = column.missing[kind - 1] if kind else value if column.numeric else column.levels[int(value)]
        yield row


@dataclass
class _Fit:
    """What fitting passes around: coded rows, first rows of people, rows that have a next visit, and notes."""

    profile: Profile
    state: dict[str, Values]
    starts: np.ndarray
    before: np.ndarray
    years: np.ndarray
    notes: list[str]

    def at(self, index: np.ndarray) -> dict[str, Values]:
        return {name: values.take(index) for name, values in self.state.items()}

    def features(self, node: str, index: np.ndarray, extra: Sequence[str] = ()) -> tuple[Feature, ...]:
        made = []
        for name in [*self.profile.parents(node), *extra]:
            if name.startswith("missing "):
                made.append(Feature(name.removeprefix("missing "), "missing"))
                continue
            values = self.state[name].take(index)
            here = values.kind_n == 0
            if not here.any():
                self.notes.append(f"{name} -> {node} is left out: no value of {name}")
                continue
            flagged = bool((~here).sum() >= self.profile.min_count)
            column = self.profile.columns.get(name)
            if column is None or column.numeric:
                sd = 1.0 if name in self.profile.genotypes.loci else float(values.value_n[here].std()) or 1.0
                made.append(Feature(name, "number", float(values.value_n[here].mean()), sd, (), flagged))
            else:
                place = values.value_n[here]
                classes = nodes.classes_of(place, len(column.levels), column.kind == "ordered", self.profile.min_count)
                if len(classes) > 1:
                    made.append(Feature(name, "levels", 0.0, 1.0, classes, flagged))
                else:
                    self.notes.append(f"{name} -> {node} is left out: one common level of {name}")
        return tuple(made)

    def prior(self, node: str, features: tuple[Feature, ...], rate: bool) -> tuple[np.ndarray, np.ndarray]:
        """Mean and sd of each coefficient: a published effect with `prior_sd` where there is one."""
        mean, sd = [], []
        for feature in features:
            m, s = np.zeros(feature.width), np.full(feature.width, WEAK_SD)
            column = self.profile.columns.get(feature.name)
            for effect in self.profile.effects:
                wanted = effect.hazard_ratio if rate else effect.odds_ratio
                if effect.to != node or effect.of != feature.name or wanted is None or effect.prior_sd is None:
                    continue
                if feature.kind == "number":
                    m[0], s[0] = effect.value * feature.sd, effect.prior_sd * feature.sd / effect.per
                elif feature.kind == "levels" and column is not None:
                    level = column.levels.index(effect.level)
                    at = next((c for c, group in enumerate(feature.classes[1:]) if level in group), None)
                    if at is not None:
                        m[at], s[at] = effect.value, effect.prior_sd
            mean.append(m)
            sd.append(s)
        return np.concatenate([*mean, np.zeros(0)]), np.concatenate([*sd, np.zeros(0)])

    def model(self, table: Table) -> TableModel:
        profile, least = self.profile, self.profile.min_count
        absence: dict[str, Absence] = {}
        first: dict[str, NumberNode | LevelNode] = {}
        later_absence: dict[str, Absence] = {}
        later: dict[str, Change | Move] = {}
        now = self.at(self.starts)
        for name, column in profile.columns.items():
            values = now[name]
            missing = self.features(f"missing {name}", self.starts) if values.kind_n.any() else ()
            absence[name] = nodes.fit_absence(missing, now, values.kind_n, least)
            rare = [column.missing[k - 1] for k in np.unique(values.kind_n) if k and k not in absence[name].reasons]
            self.notes += [f"{name}: '{code}' is rare and counts as another reason" for code in rare]
            here = np.flatnonzero(values.kind_n == 0)
            if len(here) < least:
                raise InputError(f"{least} people with {name}", str(len(here)), "subjects table", "drop the column")
            features, of_these = self.features(name, self.starts[here]), self.at(self.starts[here])
            if column.numeric:
                low, high = column.range or (0.0, 0.0)
                whole = column.kind == "count"
                first[name] = nodes.fit_number(features, of_these, values.value_n[here], (low, high), whole, least)
            else:
                prior = self.prior(name, features, False)
                made = nodes.fit_levels(
                    features, of_these, values.value_n[here], len(column.levels), column.kind == "ordered", least, prior
                )
                first[name] = made
                for group in made.classes:
                    if len(group) > 1:
                        self.notes.append(f"{name}: {', '.join(column.levels[g] for g in group)} are pooled")
                never = [s for k, s in enumerate(column.levels) if k not in {x for g in made.classes for x in g}]
                self.notes += [f"{name}: {', '.join(never)} of too few people, never made"] if never else []
        for name in profile.changing:
            later_absence[name], later[name] = self._over_time(name, profile.columns[name])
        no_scan = np.zeros(len(self.years), dtype=np.int64)
        if "image" in table:
            no_scan = (table["image"].astype(str) == "").astype(np.int64)
        no_gene = np.zeros(len(self.starts), dtype=np.int64)
        if profile.genetic:
            no_gene = now[profile.genetic[0]].kind_n
        everywhere = np.arange(len(self.years))
        return TableModel(
            profile,
            absence,
            first,
            later_absence,
            later,
            self._ends(table),
            nodes.fit_absence(self.features(NO_GENOTYPE, self.starts), now, no_gene, least),
            nodes.fit_absence(self.features(NO_SCAN, everywhere), self.state, no_scan, least),
            {n: float(now[n].value_n[now[n].kind_n == 0].std()) for n in profile.genetic if (now[n].kind_n == 0).any()},
            len(self.starts),
            len(self.years),
            tuple(dict.fromkeys(self.notes)),
        )

    def _over_time(self, name: str, column: Column) -> tuple[Absence, Change | Move]:
        least, after = self.profile.min_count, self.before + 1
        then, now = self.at(self.before), self.at(after)
        gap = self.years[after] - self.years[self.before]
        seen = {**now, name: then[name]}
        missing = self.features(f"missing {name}", after) if now[name].kind_n.any() else ()
        missing = (*missing, Feature(name, "missing"))
        absence = nodes.fit_absence(missing, seen, now[name].kind_n, least)
        both = np.flatnonzero((then[name].kind_n == 0) & (now[name].kind_n == 0))
        seen = {node: values.take(both) for node, values in seen.items()}
        start, stop, gap = then[name].value_n[both], now[name].value_n[both], gap[both]
        features = self.features(name, after[both]) if len(both) else ()
        rises = column.over_time == "rises"
        if column.numeric:
            bounds = column.range or (0.0, 0.0)
            whole = column.kind == "count"
            return absence, nodes.fit_change(features, seen, start, stop, gap, bounds, rises, whole, least)
        levels = len(column.levels)
        own = nodes.classes_of(start, levels, column.kind == "ordered", least) if len(start) else ()
        if len(own) > 1:
            features = (*features, Feature(name, "levels", classes=own))
        moved = (stop != start).astype(np.float64)
        movable = start < levels - 1 if rises else np.ones(len(start), dtype=bool)
        x = design(features, seen, len(start))[movable]
        rate = fit_rate(x, moved[movable], gap[movable], *self.prior(name, features, True), least=least)
        if moved.sum() < least:
            self.notes.append(
                f"{name}: {int(moved.sum())} changes, their rate depends on nothing but published effects"
            )
        share = np.bincount(np.concatenate([start, stop]).astype(int), minlength=levels) / max(2 * len(start), 1)
        to = np.tile(share, (levels, 1))
        np.fill_diagonal(to, 0)
        if rises:
            to = np.triu(to, 1)
        counted = np.zeros((levels, levels))
        np.add.at(counted, (start[moved > 0].astype(int), stop[moved > 0].astype(int)), 1)
        total = to.sum(axis=1, keepdims=True)
        to = counted + np.divide(to, total, out=np.zeros_like(to), where=total > 0)  # one person's worth of the margin
        total = to.sum(axis=1, keepdims=True)
        return absence, Move(features, rate, np.divide(to, total, out=np.zeros_like(to), where=total > 0))

    def _ends(self, table: Table) -> Ends:
        v, least = self.profile.visits, self.profile.min_count
        number = (
            np.arange(len(self.years)) - np.repeat(self.starts, np.diff(np.append(self.starts, len(self.years)))) + 1
        )
        most = max(len(v.planned_years), 1)
        end = table["end"].astype(str) if "end" in table else np.full(len(self.years), "")
        last = np.ones(len(self.years), dtype=bool)
        last[self.before] = False
        gap = np.zeros(len(self.years))
        gap[self.before] = self.years[self.before + 1] - self.years[self.before]
        if "end_years" in table:
            end_years = np.array([_number(x) for x in table["end_years"].tolist()])
            gap = np.where(last & (end == "death") & np.isfinite(end_years), end_years - self.years, gap)
        gaps, pooled = [], gap[self.before]
        out = (pooled < v.least_gap_years) | (pooled > v.most_gap_years)
        if out.any():
            got = f"{pooled[out][0]:.3g}"
            raise InputError(
                f"visits {v.least_gap_years:g} to {v.most_gap_years:g} years apart", got, "subjects table",
                "visits.least_gap_years and most_gap_years of the profile",
            )  # fmt: skip
        for slot in range(1, most):
            own = gap[self.before][number[self.before] == slot]
            values = own if len(own) >= least else pooled
            gaps.append(Density.smooth(values, v.least_gap_years, v.most_gap_years, 0.05))
        unknown = last & (number < most) & (end != "death") & (end != "completed")
        died = last & (end == "death")
        risk = np.flatnonzero(~last | (died & (gap > 0)))
        features = self.features(END, risk) if len(risk) else ()
        x = design(features, self.at(risk), len(risk))
        death = fit_rate(x, died[risk].astype(float), gap[risk], *self.prior(END, features, True), least=least)
        if not died.any():
            features, death = (), replace(death, intercept=-50.0, beta=np.zeros(0))
        elif died.sum() < least:
            self.notes.append(f"end: {int(died.sum())} deaths, their rate depends on nothing but published effects")
        choice = np.flatnonzero((~last | unknown) & (number < most))
        dropout: Ordered | None = None
        left_features: tuple[Feature, ...] = ()
        if len(choice) and most > 1:
            left = unknown[choice].astype(np.int64)
            left_features = self.features(END, choice) if min(left.sum(), (1 - left).sum()) >= least else ()
            prior = self.prior(END, left_features, False)
            dropout = fit_ordered(design(left_features, self.at(choice), len(choice)), left, 2, *prior)
        return Ends(features, death, left_features, dropout, most > 1, tuple(gaps), most)


def _number(cell: Any) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return float("nan")


def model_from_json(value: dict[str, Any]) -> TableModel:
    """The inverse of `TableModel.to_json`; raises what `nodes.from_json` raises, or UsageError."""
    from engine.cohort.profile import parse_profile

    parts = {k: nodes.from_json(v) for k, v in value.items() if k != "profile"}
    return TableModel(parse_profile(value["profile"], "saved model"), **parts)
