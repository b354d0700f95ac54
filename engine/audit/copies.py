"""The copy search: is a synthetic row nearer to the training side than an unseen real row would be?

For a row s, with d the exact distance to the nearest of all rows of a side,

    rho(s) = (log d(s, T) - log d(s, H')) / lambda(s),

where T is the whole training side, H' the holdout less one person, and lambda(s) the local scale: the mean Hill
estimate of 1 / dimension from the neighbours of s in H' and in T (the nearest one in T left out, because it is the
suspect). Were the rows points of a smooth density f in D dimensions, log d(s, pool of n) would be (log E - log(n
f(s))) / D with E exponential, so that in rho both f(s) and D cancel: rho does not care whether the generator favours
crowded or empty regions, or flat or wide ones. What is left is the ratio of the pool sizes, and that is the same for
s and for the null.

The null is the same number for real rows: h against T and H less h's own person. It sees pools of the same size as s,
which is the point: comparing nearest distances over pools of different size flags leak-free generators many times too
often.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from engine.audit.intervals import conformal_p, excess_p, person_weights
from engine.audit.policy import AuditPolicy
from engine.audit.pools import Pool, longest_shared_bp, topk
from engine.seeding import generator

_HALF_SITE = 0.5  # added to Hamming distances, so that a copy has a logarithm
_MIN_SCALE = 1e-3  # of lambda, where all neighbours are equally far


@dataclass(frozen=True)
class Pull:
    """Which side each row is nearer to, with the whole sides and with random subsets of equal numbers of people.

    to_train_n, to_train_nr: 1 where the nearest row is a training row, 0 where it is a holdout row, 0.5 on a tie.
    train_person_n, holdout_person_n: codes of the people behind the nearest rows of the whole sides.
    person_nr: code of the person behind the nearest row of the r-th pair of subsets.
    """

    to_train_n: NDArray[np.float64]
    train_person_n: NDArray[np.int64]
    holdout_person_n: NDArray[np.int64]
    to_train_nr: NDArray[np.float64]
    person_nr: NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """What the search found for a set of rows.

    statistic_nc: rho, and where positions are known the log ratio of the longest shared stretches; small is suspicious.
    distance_train_n, distance_holdout_n: nearest distances; index_train_n: the nearest training row.
    person_n, group_n: of the rows. pull: for tested rows; None for the null.
    """

    statistic_nc: NDArray[np.float64]
    distance_train_n: NDArray[np.float64]
    distance_holdout_n: NDArray[np.float64]
    index_train_n: NDArray[np.int64]
    person_n: NDArray
    group_n: NDArray | None = None
    pull: Pull | None = None

    def __len__(self) -> int:
        return len(self.statistic_nc)

    def select(self, rows: NDArray) -> Scores:
        """Scores of these rows."""
        pull = self.pull
        return Scores(
            self.statistic_nc[rows],
            self.distance_train_n[rows],
            self.distance_holdout_n[rows],
            self.index_train_n[rows],
            self.person_n[rows],
            None if self.group_n is None else self.group_n[rows],
            None if pull is None else Pull(*(getattr(pull, field.name)[rows] for field in fields(Pull))),
        )


def join(parts: list[Scores]) -> Scores:
    """Scores of several sets as one; groups are dropped, pulls are kept where all parts have one."""
    names = ("statistic_nc", "distance_train_n", "distance_holdout_n", "index_train_n", "person_n")
    pulls = [part.pull for part in parts if part.pull is not None]
    pull = None
    if len(pulls) == len(parts):
        pull = Pull(*(np.concatenate([getattr(p, field.name) for p in pulls]) for field in fields(Pull)))
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return Scores(**joined, pull=pull)


@dataclass(frozen=True)
class Null:
    """Real rows under the same protocol: their scores, person weights, and how many people they are."""

    scores: Scores
    weight_n: NDArray[np.float64]
    people: int
    calibrated_on: str

    def p_values(self, scores: Scores) -> NDArray[np.float64]:
        """Conformal p-value of each row of `scores`."""
        return conformal_p(self.scores.statistic_nc, scores.statistic_nc, self.weight_n)


class CopySearch:
    """Training and holdout sides, ready to score any rows against pools of the same sizes. Nothing in it changes later.

    Attributes:
        train, holdout, policy, seed: as given.
        train_code, holdout_code: person of every row as an integer, one numbering for both sides; train_people,
            holdout_people: the different codes; codes: how many there are.
        runs: longest shared stretches are judged too (both pools carry positions).
        typical_distance: median distance of a holdout row to the nearest other holdout person.
        duplicate_distance: at or below it two rows are copies. floor: added to distances before their logarithm.
    """

    def __init__(self, train: Pool, holdout: Pool, policy: AuditPolicy, seed: int) -> None:
        self.train, self.holdout, self.policy, self.seed = train, holdout, policy, seed
        people, code = np.unique(np.concatenate([train.person, holdout.person]), return_inverse=True)
        self.codes = len(people)
        self.train_code, self.holdout_code = code[: len(train)], code[len(train) :]
        self.train_people, self.holdout_people = np.unique(self.train_code), np.unique(self.holdout_code)
        self.runs = train.position_bp is not None and holdout.position_bp is not None
        plain = replace(holdout, views=None)
        distance, _ = topk(plain, plain, 1, exclude=(self.holdout_code, self.holdout_code))
        self.typical_distance = float(np.median(distance[:, 0]))
        if train.kind == "bits":
            self.duplicate_distance, self.floor = 0.0, _HALF_SITE
        else:
            self.duplicate_distance = policy.duplicate_relative * self.typical_distance
            self.floor = max(1e-6 * self.typical_distance, 1e-12)
        rng, m = generator(seed, "audit.matched"), min(len(self.train_people), len(self.holdout_people))
        draw = lambda people: rng.choice(people, m, replace=False)  # noqa: E731
        self._matched = [(draw(self.train_people), draw(self.holdout_people)) for _ in range(policy.subsets)]

    @cached_property
    def relabellings(self) -> NDArray[np.float32]:
        """999 random choices of as many people of both sides together as training has; 1 where chosen, (999, people)."""
        label = np.zeros((999, self.codes), dtype=np.float32)
        label[:, : len(self.train_people)] = 1
        return generator(self.seed, "audit.relabel").permuted(label, axis=1)

    def score(self, rows: Pool, purpose: str) -> Scores:
        """Score synthetic or control rows: all of T, and the holdout less one person drawn at random for each row."""
        rng = generator(self.seed, f"audit.dropped.{purpose}")
        dropped = self.holdout_people[rng.integers(0, len(self.holdout_people), len(rows))]
        return replace(self._score(rows, self._nobody(rows), dropped), pull=self._pull(rows))

    def null(self) -> Null:
        """Null from the holdout, or from both sides where the policy or a small holdout asks for it."""
        scores = [self._score(self.holdout, self._nobody(self.holdout), self.holdout_code)]
        weight, people = person_weights(self.holdout.person)
        weights, origin = [weight], "holdout against holdout"
        both = self.policy.null == "both" or (self.policy.null == "auto" and people < self.policy.null_people)
        if both and (self.train.views is None) == (self.holdout.views is None):
            # a training row against the other training people and the holdout less one person: the same pool sizes
            # but for one person in T; where the split was random it is as good a draw of an unseen person as a
            # holdout row
            rng = generator(self.seed, "audit.dropped.null")
            dropped = self.holdout_people[rng.integers(0, len(self.holdout_people), len(self.train_people))]
            dropped_n = dropped[np.searchsorted(self.train_people, self.train_code)]
            found = self._score(self.train, self.train_code, dropped_n)
            if self.train.kind == "features":  # a duplicate inside training says nothing about unseen people
                found = found.select(np.flatnonzero(found.distance_train_n > self.duplicate_distance))
            if len(found) and _alike(scores[0], weights[0], found):
                scores.append(found)
                weight, more = person_weights(found.person_n)
                weights.append(weight)
                people, origin = people + more, "real rows of both sides, each against the others"
        return Null(join(scores), np.concatenate(weights), people, f"{origin}, matched pools")

    def _nobody(self, rows: Pool) -> NDArray[np.int64]:
        return np.full(len(rows), self.codes, dtype=np.int64)

    def _score(self, rows: Pool, own_train_n: NDArray[np.int64], own_holdout_n: NDArray[np.int64]) -> Scores:
        """Search `rows` in both sides; rows of the person coded own_*_n are skipped there."""
        skip_t, skip_h = (own_train_n, self.train_code), (own_holdout_n, self.holdout_code)
        train_d, train_i = topk(rows, self.train, self._k(self.train), exclude=skip_t)
        holdout_d, _ = topk(rows, self.holdout, self._k(self.holdout), exclude=skip_h)
        log_t, log_h = log_distances(train_d, self.floor), log_distances(holdout_d, self.floor)
        scale_n = np.maximum((_hill(log_h) + _hill(log_t)) / 2, _MIN_SCALE)
        columns = [(log_t[:, 0] - log_h[:, 0]) / scale_n]
        if self.runs:
            shared_t = longest_shared_bp(rows, self.train, exclude=skip_t)
            shared_h = longest_shared_bp(rows, self.holdout, exclude=skip_h)
            columns.append(np.log(shared_h + 1.0) - np.log(shared_t + 1.0))
        return Scores(np.column_stack(columns), train_d[:, 0], holdout_d[:, 0], train_i[:, 0], rows.person, rows.group)

    def _k(self, pool: Pool) -> int:
        return min(self.policy.neighbours + 1, len(pool))

    def _pull(self, rows: Pool) -> Pull:
        train_d, train_i = topk(rows, self.train, 1)
        holdout_d, holdout_i = topk(rows, self.holdout, 1)
        shares, people = [], []
        for inside_t, inside_h in self._matched:
            rows_t = np.flatnonzero(np.isin(self.train_code, inside_t))
            rows_h = np.flatnonzero(np.isin(self.holdout_code, inside_h))
            all_t, all_h = len(rows_t) == len(self.train), len(rows_h) == len(self.holdout)
            near_t = (train_d, train_i) if all_t else topk(rows, self.train.select(rows_t), 1)
            near_h = (holdout_d, holdout_i) if all_h else topk(rows, self.holdout.select(rows_h), 1)
            shares.append(_nearer(near_t[0][:, 0], near_h[0][:, 0]))
            person_t, person_h = self.train_code[rows_t][near_t[1][:, 0]], self.holdout_code[rows_h][near_h[1][:, 0]]
            people.append(np.where(shares[-1] >= 0.5, person_t, person_h))
        return Pull(
            _nearer(train_d[:, 0], holdout_d[:, 0]),
            self.train_code[train_i[:, 0]],
            self.holdout_code[holdout_i[:, 0]],
            np.column_stack(shares),
            np.column_stack(people),
        )


def _alike(holdout: Scores, weight_n: NDArray[np.float64], train: Scores) -> bool:
    """False where training rows lie nearer to each other than holdout rows lie to them.

    Then the split was not random, or training holds relatives or duplicates under different ids, and a null made from
    training rows would hide copies.
    """
    weight, people = person_weights(train.person_n)
    level, holdout_people = 0.05, round(weight_n.sum())
    flagged = weight[conformal_p(holdout.statistic_nc, train.statistic_nc, weight_n) <= level + 1e-12].sum()
    return excess_p(float(flagged), people, level, holdout_people) > 0.001


def _nearer(train_n: NDArray[np.float64], holdout_n: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(train_n == holdout_n, 0.5, (train_n < holdout_n).astype(np.float64))


def log_distances(distance: NDArray[np.float64], floor: float) -> NDArray[np.float64]:
    """Logarithms of distances (any shape) raised by `floor`, so that a copy has one."""
    return np.log(distance + floor)


def local_scale(log_distance_nk: NDArray[np.float64]) -> NDArray[np.float64]:
    """Local 1 / dimension of each row from its neighbours, not below a small number."""
    return np.maximum(_hill(log_distance_nk), _MIN_SCALE)


def _hill(log_distance_nk: NDArray[np.float64]) -> NDArray[np.float64]:
    """Hill estimate of 1 / dimension from neighbours 2..k: mean of log d_k - log d_j. The nearest, the suspect, is
    left out.

    Neighbours that do not exist (infinite) are ignored; 0 where fewer than three are left. Source: Levina and Bickel,
    NIPS 17 (2004).
    """
    known = np.isfinite(log_distance_nk[:, 1:])
    last = np.maximum(known.sum(axis=1), 1)
    values = np.where(known, log_distance_nk[:, 1:], 0.0)
    furthest = values[np.arange(len(values)), last - 1]
    total = np.where(known, furthest[:, None] - values, 0.0).sum(axis=1)
    return np.where(last > 1, total / np.maximum(last - 1, 1), 0.0)
