"""The pieces of a table model: how a parent becomes features, and the fitted model of one node. See `longitudinal`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from engine.cohort.regressions import (
    WEAK_SD,
    Density,
    Margin,
    Nominal,
    Ordered,
    Rate,
    fit_line,
    fit_margin,
    fit_nominal,
    fit_ordered,
    linear,
)


@dataclass(frozen=True)
class Values:
    """One column of people or visits: `value_n` float64, numbers or places among the levels, 0 where absent; `kind_n` int64,
    0 where there is a value, k where it is absent for the column's k-th reason."""

    value_n: np.ndarray
    kind_n: np.ndarray

    def take(self, index: np.ndarray) -> Values:
        return Values(self.value_n[index], self.kind_n[index])


State = Mapping[str, Values]


@dataclass(frozen=True)
class Feature:
    """How a parent acts: a standardised number, one column per class of levels but the first, or that it is absent.

    `flagged`: a further column says that the value is absent, whose other columns are then 0.
    """

    name: str
    kind: str  # number | levels | missing
    mean: float = 0.0
    sd: float = 1.0
    classes: tuple[tuple[int, ...], ...] = ()
    flagged: bool = False

    @property
    def width(self) -> int:
        return (1 if self.kind != "levels" else len(self.classes) - 1) + self.flagged

    def columns(self, state: State) -> list[np.ndarray]:
        """The feature's columns, float64 (n,) each."""
        if self.kind == "missing":
            return [(state[self.name].kind_n > 0).astype(np.float64)]
        values = state[self.name]
        here = values.kind_n == 0
        if self.kind == "number":
            made = [np.where(here, (values.value_n - self.mean) / self.sd, 0.0)]
        else:
            made = [np.where(here & np.isin(values.value_n, group), 1.0, 0.0) for group in self.classes[1:]]
        return [*made, (~here).astype(np.float64)] if self.flagged else made


def design(features: tuple[Feature, ...], state: State, n: int) -> np.ndarray:
    """float64 (n, f): the features of a node."""
    columns = [column for feature in features for column in feature.columns(state)]
    return np.stack(columns, axis=1) if columns else np.zeros((n, 0))


@dataclass(frozen=True)
class Absence:
    """Why a value is absent, or that it is there: level 0 is there, level j + 1 the reason `reasons[j]` (numbered from 1)."""

    features: tuple[Feature, ...]
    model: Nominal | None
    reasons: tuple[int, ...]

    def draw(self, state: State, uniform_n: np.ndarray) -> np.ndarray:
        """int64 (n,): kinds."""
        if self.model is None:
            return np.zeros(len(uniform_n), dtype=np.int64)
        kind = self.model.draw(design(self.features, state, len(uniform_n)), uniform_n)
        return np.array([0, *self.reasons])[kind]


def fit_absence(features: tuple[Feature, ...], state: State, kind_n: np.ndarray, min_count: int) -> Absence:
    """Reasons of fewer than `min_count` people count as the commonest one; with fewer absent in all, one constant share."""
    counts = {int(k): int((kind_n == k).sum()) for k in np.unique(kind_n) if k > 0}
    if not counts:
        return Absence((), None, ())
    commonest = max(counts, key=lambda k: counts[k])
    kept = sorted({k for k, c in counts.items() if c >= min_count} | {commonest})
    level_n = np.array([0 if k == 0 else 1 + kept.index(k if k in kept else commonest) for k in kind_n.tolist()])
    if sum(counts.values()) < min_count or (level_n == 0).sum() < min_count:
        features = ()
    return Absence(features, fit_nominal(design(features, state, len(kind_n)), level_n, 1 + len(kept)), tuple(kept))


@dataclass(frozen=True)
class NumberNode:
    """A number given its parents: its normal score is linear in the features, so that its margin is that of the data."""

    features: tuple[Feature, ...]
    margin: Margin
    beta: np.ndarray  # the constant first
    sd: float
    whole: bool

    def draw(self, state: State, uniform_n: np.ndarray, within: tuple[float, float] | None = None) -> np.ndarray:
        """float64 (n,); `within` restricts a node without parents."""
        if not self.features:
            u = uniform_n
            if within is not None:
                low, high = self.margin.cdf(within[0], below=True), self.margin.cdf(within[1])
                u = low + u * (high - low)
            made = self.margin.draw(u)
        else:
            x = design(self.features, state, len(uniform_n))
            score = self.beta[0] + linear(x, self.beta[1:]) + self.sd * ndtri(np.clip(uniform_n, 1e-12, 1 - 1e-12))
            made = self.margin.draw(ndtr(score))
        return np.round(made) if self.whole else made


def fit_number(
    features: tuple[Feature, ...],
    state: State,
    value_n: np.ndarray,
    bounds: tuple[float, float],
    whole: bool,
    least: int,
) -> NumberNode:
    """Fit to the people whose value is there (`state` and `value_n` are theirs)."""
    margin = fit_margin(value_n, *bounds, whole=whole, min_count=least)
    x = np.column_stack([np.ones(len(value_n)), design(features, state, len(value_n))])
    if not len(value_n):
        return NumberNode(features, margin, np.zeros(x.shape[1]), 1.0, whole)
    beta, _ = fit_line(x, margin.normal_score(value_n))
    # a shared value has one score for all its people, which narrows the scores: what is drawn is standard normal again
    explained = x[:, 1:] @ beta[1:]
    beta[0] = -float(explained.mean())
    return NumberNode(features, margin, beta, float(np.sqrt(max(1 - explained.var(), 0.01))), whole)


@dataclass(frozen=True)
class LevelNode:
    """Levels given the parents: a class of levels by regression, and within a class by the shares of its levels."""

    features: tuple[Feature, ...]
    classes: tuple[tuple[int, ...], ...]
    within: tuple[tuple[float, ...], ...]
    model: Ordered | Nominal | None

    def draw(self, state: State, uniform_n: np.ndarray, allowed: tuple[int, ...] | None = None) -> np.ndarray:
        """float64 (n,), places among the levels; `allowed` restricts a node without parents."""
        n = len(uniform_n)
        flat = [
            (level, share) for group, shares in zip(self.classes, self.within) for level, share in zip(group, shares)
        ]
        x = design(self.features, state, n)
        if isinstance(self.model, Ordered):
            from scipy.special import expit

            above = expit(self.model.cut[None] - linear(x, self.model.beta)[:, None])
            class_nc = np.diff(np.column_stack([np.zeros(n), above, np.ones(n)]), axis=1)
        else:
            class_nc = np.ones((n, 1)) if self.model is None else self.model.shares(x)
        of_class = np.repeat(np.arange(len(self.classes)), [len(group) for group in self.classes])
        share_nl = class_nc[:, of_class] * np.array([share for _, share in flat])
        if allowed is not None:
            share_nl = share_nl * np.isin([level for level, _ in flat], allowed)
        edge = np.cumsum(share_nl, axis=1)
        total = edge[:, -1:]
        place = np.minimum((uniform_n[:, None] * total >= edge).sum(axis=1), len(flat) - 1)
        return np.array([level for level, _ in flat], dtype=np.float64)[place]

    def chance(self, allowed: tuple[int, ...]) -> float:
        """Probability of these levels, of a node without parents."""
        one = np.zeros(1)
        x = design((), {}, 1)
        if self.model is None:
            shares = np.ones(1)
        elif isinstance(self.model, Nominal):
            shares = self.model.shares(x)[0]
        else:
            shares = np.diff(np.concatenate([one, 1 / (1 + np.exp(-self.model.cut)), one + 1]))
        return float(
            sum(
                s * w
                for s, group, ws in zip(shares, self.classes, self.within)
                for level, w in zip(group, ws)
                if level in allowed
            )
        )


def classes_of(place_n: np.ndarray, levels: int, ordered: bool, min_count: int) -> tuple[tuple[int, ...], ...]:
    """Levels put together until every class has `min_count` people: ordered ones with a neighbour, others in one class of
    rare ones. Levels that nobody has belong to none, rare ones of fewer people in all to none either."""
    count = np.bincount(place_n.astype(np.int64), minlength=levels)
    seen = [level for level in range(levels) if count[level]]
    if not ordered:
        common = [(level,) for level in seen if count[level] >= min_count]
        rare = tuple(level for level in seen if count[level] < min_count)
        joined = [*common, rare] if sum(count[list(rare)]) >= min_count or not common else common
        return tuple(joined)
    groups: list[list[int]] = []
    for level in seen:
        if groups and count[groups[-1]].sum() < min_count:
            groups[-1].append(level)
        else:
            groups.append([level])
    if len(groups) > 1 and count[groups[-1]].sum() < min_count:
        rest = groups.pop()
        groups[-1] += rest
    return tuple(tuple(group) for group in groups)


def fit_levels(
    features: tuple[Feature, ...],
    state: State,
    place_n: np.ndarray,
    levels: int,
    ordered: bool,
    min_count: int,
    prior: tuple[np.ndarray, np.ndarray] | None = None,
) -> LevelNode:
    """Fit to the people whose value is there. Two levels are ordered by convention."""
    classes = classes_of(place_n, levels, ordered or levels == 2, min_count)
    count = np.bincount(place_n.astype(np.int64), minlength=levels)
    within = tuple(tuple(float(s) for s in (count[list(g)] + 0.5) / (count[list(g)] + 0.5).sum()) for g in classes)
    keep = np.isin(place_n, [level for group in classes for level in group])
    x = design(features, state, len(place_n))[keep]
    class_n = np.array(
        [next(c for c, group in enumerate(classes) if p in group) for p in place_n[keep]], dtype=np.int64
    )
    model: Ordered | Nominal | None = None
    if len(classes) > 1:
        if ordered or len(classes) == 2:
            model = fit_ordered(x, class_n, len(classes), *(prior or (None, None)))
        else:
            model = fit_nominal(x, class_n, len(classes))
    return LevelNode(features, classes, within, model)


@dataclass(frozen=True)
class Change:
    """A number at a later visit: the change is linear in (1, value before, years, years x features), with a variance
    that is that of a measurement and of a walk, s0^2 + s1^2 years; cut to the range (and, where it never falls, to rises)."""

    features: tuple[Feature, ...]
    before_mean: float
    before_sd: float
    beta: np.ndarray
    s0: float
    s1: float
    bounds: tuple[float, float]
    rises: bool
    whole: bool

    def draw(self, state: State, before_n: np.ndarray, years_n: np.ndarray, uniform_n: np.ndarray) -> np.ndarray:
        """float64 (n,): the value `years_n` after `before_n`."""
        x = change_design(design(self.features, state, len(years_n)), self._standardised(before_n), years_n)
        middle = before_n + linear(x, self.beta)
        sd = np.sqrt(self.s0**2 + self.s1**2 * years_n) + 1e-12
        floor = np.where(self.rises, np.maximum(before_n, self.bounds[0]), self.bounds[0])
        low, high = ndtr((floor - middle) / sd), ndtr((self.bounds[1] - middle) / sd)
        # beyond eight deviations both ends are one number: the nearer bound
        inside = middle + sd * ndtri(np.clip(low + uniform_n * (high - low), 1e-15, 1 - 1e-15))
        made = np.clip(inside, floor, self.bounds[1])
        return np.clip(np.round(made), np.ceil(floor), np.floor(self.bounds[1])) if self.whole else made

    def _standardised(self, before_n: np.ndarray) -> np.ndarray:
        return (before_n - self.before_mean) / self.before_sd


def change_design(x_nf: np.ndarray, before_n: np.ndarray, years_n: np.ndarray) -> np.ndarray:
    """float64 (n, 3 + f)."""
    return np.column_stack([np.ones(len(years_n)), before_n, years_n, x_nf * years_n[:, None]])


def fit_change(
    features: tuple[Feature, ...],
    state: State,
    before_n: np.ndarray,
    after_n: np.ndarray,
    years_n: np.ndarray,
    bounds: tuple[float, float],
    rises: bool,
    whole: bool,
    least: int,
) -> Change:
    """Least squares, weighted by the variance that a first round gives. With fewer than `least` pairs of visits no feature
    takes part, and with fewer than 3 nothing changes."""
    from scipy.optimize import nnls

    mean = float(before_n.mean()) if len(before_n) else 0.0
    sd = max(float(before_n.std()), 1e-9) if len(before_n) > 1 else 1.0
    if len(before_n) < least:
        features = ()
    if len(before_n) < 3:
        return Change((), mean, sd, np.zeros(3), 0.0, 0.0, bounds, rises, whole)
    x = change_design(design(features, state, len(before_n)), (before_n - mean) / sd, years_n)
    y, weight = after_n - before_n, np.ones(len(before_n))
    scale = max(float(y.std()), 1e-9)
    prior = (np.zeros(x.shape[1]), np.concatenate([[1e6], np.full(x.shape[1] - 1, WEAK_SD)]))
    s0 = s1 = 0.0
    for _ in range(3):
        beta, _ = fit_line(x, y / scale, *prior, weight_n=weight)
        rest = (y / scale - x @ beta) ** 2 * len(y) / max(len(y) - x.shape[1], 1)
        (a, b), _ = nnls(np.column_stack([np.ones(len(y)), years_n]) * weight[:, None], rest * weight)
        s0, s1 = float(np.sqrt(a)), float(np.sqrt(b))
        weight = 1 / np.maximum(a + b * years_n, 1e-6)
        weight /= weight.mean()
    return Change(features, mean, sd, beta * scale, s0 * scale, s1 * scale, bounds, rises, whole)


@dataclass(frozen=True)
class Move:
    """Levels at a later visit: the level is left at a rate per year that depends on the features and on the level, and
    another one is taken by its share among those who left it. What never falls goes up only."""

    features: tuple[Feature, ...]
    rate: Rate
    to: np.ndarray  # (levels, levels), rows sum to 1, or to 0 where nobody leaves

    def draw(
        self, state: State, before_n: np.ndarray, years_n: np.ndarray, leave_n: np.ndarray, where_n: np.ndarray
    ) -> np.ndarray:
        """float64 (n,): the place `years_n` after `before_n`, at two uniform numbers."""
        at = before_n.astype(np.int64)
        leaves = leave_n < self.rate.probability(design(self.features, state, len(at)), years_n)
        edge = np.cumsum(self.to, axis=1)[at]
        next_n = np.minimum((where_n[:, None] >= edge).sum(axis=1), self.to.shape[1] - 1)
        return np.where(leaves & (edge[:, -1] > 0), next_n, at).astype(np.float64)


@dataclass(frozen=True)
class Ends:
    """What follows a visit. The gap to the next one is drawn by the visit's number; a person may die within it, at a rate,
    may not come back, with a probability, or comes at its end. After the last planned visit the study is over."""

    death_features: tuple[Feature, ...]
    death: Rate
    dropout_features: tuple[Feature, ...]
    dropout: Ordered | None
    dropout_all: bool
    gaps: tuple[Density, ...]
    visits: int

    def draw(self, state: State, number: int, uniform_nu: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """bool (n,) died, bool (n,) dropped out, float64 (n,) years to the next visit or to death."""
        n = len(uniform_nu)
        gap = self.gaps[min(number, len(self.gaps)) - 1].draw(uniform_nu[:, 0])
        died = uniform_nu[:, 1] < self.death.probability(design(self.death_features, state, n), gap)
        if self.dropout is None:
            left = np.full(n, self.dropout_all)
        else:
            left = uniform_nu[:, 2] < self.dropout.above(design(self.dropout_features, state, n))
        return died, left & ~died, np.where(died, gap * np.maximum(uniform_nu[:, 3], 1e-3), gap)


_TYPES: dict[str, Any] = {
    c.__name__: c
    for c in (Feature, Absence, NumberNode, LevelNode, Change, Move, Ends, Ordered, Nominal, Rate, Margin, Density)
}


def to_json(value: Any) -> Any:
    """A node and everything in it as JSON-ready values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, np.ndarray):
        return {"type": "array", "values": value.tolist(), "shape": list(value.shape)}
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def from_json(value: Any) -> Any:
    """The inverse of `to_json`, with tuples for lists.

    Raises:
        KeyError, TypeError, ValueError: something else.
    """
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "type" not in value:
        return {k: from_json(v) for k, v in value.items()}
    fields = {k: v for k, v in value.items() if k != "type"}
    if value["type"] == "array":
        return np.array(fields["values"], dtype=np.float64).reshape(fields["shape"])
    return _TYPES[value["type"]](**{k: from_json(v) for k, v in fields.items()})
