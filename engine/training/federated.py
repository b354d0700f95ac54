"""Federated use: what a site and whoever averages must agree on, without any framework.

A site is an adapter around one model and one institution's data: `get_state`, `set_state`, `fit`, `evaluate`,
`local_stats` (`Site`; `engine.imaging.federated`, `engine.genomics.federated`). All that leaves it are arrays of numbers
under declared names, of declared shapes, which `outgoing` enforces at the site and the averaging again where they arrive.
What a framework adds (transport, TLS, retries) is its own affair: `examples/federated` shows Flower.

    weighted_mean   FedAvg (McMahan et al., AISTATS 2017): the sites' states, weighted by what they said they learn from
    total           sums of local statistics: those of the union of the sites' data

A site that is late, not finite, of another shape or that sends what nobody declared is left out of a round and named with the
reason; too few sites left end the round with the state as it was. A mean of two sites shows each what the other sent: this is
no secure aggregation, and weights remember people (docs/federated.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine.errors import EngineError, InputError

Tensors = dict[str, np.ndarray]
Declared = Mapping[str, tuple[int, ...]]
"""Name and shape of every array that may leave a site; all are float32 (states) or float64 (statistics)."""


class Site(Protocol):
    """One institution's side of one stage of learning. Methods may be called in any order and repeated."""

    def state_declared(self) -> Declared:
        """What `get_state` returns, and nothing else."""

    def stats_declared(self) -> Declared:
        """What `local_stats` returns: sums over the site's data, so that the sums of two sites are those of their union."""

    def get_state(self) -> Tensors:
        """The model as it is here, float32."""

    def set_state(self, state: Tensors) -> None:
        """Take the common model; another name, shape or a number that is not finite is refused and changes nothing."""

    def fit(self, round_number: int) -> Tensors:
        """Learn from the local training data, starting from the state that was set; returns `get_state()`."""

    def evaluate(self) -> dict[str, float]:
        """Figures on the local unseen data, "n" among them."""

    def local_stats(self) -> Tensors:
        """Sums over the local training data, float64."""

    def set_stats(self, total: Tensors) -> None:
        """Take the sums over all sites."""


def fault(tensors: Mapping[str, np.ndarray], declared: Declared) -> str:
    """Why `tensors` are not what was declared; empty when they are."""
    missing, more = sorted(declared.keys() - tensors.keys()), sorted(tensors.keys() - declared.keys())
    if missing or more:
        return f"{len(missing)} declared arrays missing, {len(more)} others"
    for name, shape in declared.items():
        array = tensors[name]
        if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.float64):
            return f"'{name}' is no array of float32 or float64"
        if array.shape != tuple(shape):
            return f"'{name}' of shape {array.shape} in place of {tuple(shape)}"
        if not np.isfinite(array).all():
            return f"'{name}' is not finite"
    return ""


def checked(tensors: Tensors, declared: Declared, where: str) -> Tensors:
    """`tensors` if they are exactly what was declared.

    Raises:
        InputError: they are not; says what is wrong, and no value.
    """
    if found := fault(tensors, declared):
        raise InputError("exactly the arrays that were declared", found, where)
    return tensors


def outgoing(tensors: Tensors, declared: Declared) -> Tensors:
    """What may leave a site: as `checked`, and as plain contiguous copies, so that no buffer behind a view goes along."""
    checked(tensors, declared, "leaving this site")
    return {name: np.array(tensors[name], copy=True, order="C", subok=False) for name in declared}


@dataclass(frozen=True)
class Combined:
    """What came of a round. `used` and `refused` (site -> reason) name every site that was asked."""

    tensors: Tensors
    used: list[str]
    refused: dict[str, str]


def weighted_mean(
    replies: Mapping[str, Tensors | None],
    weights: Mapping[str, float],
    declared: Declared,
    *,
    least_sites: int = 1,
    farthest: float | None = None,
    start: Tensors | None = None,
) -> Combined:
    """FedAvg: sum of weight x state over the sites that answered well, divided by the sum of their weights; in float64.

    Args:
        replies: of every site that was asked; None where none came.
        weights: of every site, from its statistics and not from this reply, so that none can outweigh the others at will.
        least_sites: with fewer good replies there is no new state.
        farthest, start: a reply whose distance from the state `start` of this round is more than `farthest` times the median
            distance of the good ones is left out too (needs three of them). It bounds accidents, and not an adversary.

    Raises:
        EngineError: too few good replies; the caller goes on with the state it has.
    """
    refused: dict[str, str] = {}
    good: dict[str, Tensors] = {}
    for name, reply in replies.items():
        weight = weights.get(name, 0.0)
        reason = "no reply" if reply is None else fault(reply, declared)
        if not reason and not (np.isfinite(weight) and weight > 0):
            reason = "no weight"
        if reason or reply is None:
            refused[name] = reason
        else:
            good[name] = reply
    if farthest is not None and start is not None and len(good) >= 3:
        apart = {name: _distance(reply, start) for name, reply in good.items()}
        usual = float(np.median(list(apart.values())))
        for name, distance in apart.items():
            if distance > farthest * usual > 0:
                refused[name] = f"{distance / usual:.3g} times the median distance from where the round began"
                del good[name]
    _enough(good, refused, least_sites)
    total = sum(weights[name] for name in good)
    made = {}
    for name in declared:
        mean = sum((weights[site] / total) * reply[name].astype(np.float64) for site, reply in good.items())
        made[name] = np.asarray(mean).astype(next(iter(good.values()))[name].dtype)
    return Combined(made, list(good), refused)


def total(replies: Mapping[str, Tensors | None], declared: Declared, *, least_sites: int = 1) -> Combined:
    """Sums of statistics over the sites that answered well, float64.

    Raises:
        EngineError: fewer than `least_sites`.
    """
    refused = {name: "no reply" if r is None else fault(r, declared) for name, r in replies.items()}
    good = {name: reply for name, reply in replies.items() if reply is not None and not refused[name]}
    refused = {name: reason for name, reason in refused.items() if reason}
    _enough(good, refused, least_sites)
    summed = {name: np.sum([reply[name] for reply in good.values()], axis=0, dtype=np.float64) for name in declared}
    return Combined({name: np.asarray(value) for name, value in summed.items()}, list(good), refused)


def _distance(a: Tensors, b: Tensors) -> float:
    return float(np.sqrt(sum(np.square(a[name].astype(np.float64) - b[name]).sum() for name in b)))


def _enough(good: Mapping[str, Tensors], refused: Mapping[str, str], least: int) -> None:
    if len(good) < max(1, least):
        reasons = ", ".join(f"{name} ({reason})" for name, reason in refused.items()) or "nobody was asked"
        raise EngineError(
            f"good replies of at least {max(1, least)} sites", f"{len(good)}: {reasons}", "federated round"
        )
