"""Planted controls: sets of rows whose right verdict is known beforehand. An audit that does not convict its own
copycat, or that convicts fresh real people, has no verdict.

The generic ones are made here from the training rows. A caller adds those that need its modality (a flipped scan has
to be embedded again): every control whose name starts with "fresh" must pass, every other one must fail; and where a
gate is named with it (`Planted`), fail by that gate, so that a gate which has gone blind is noticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from engine.audit.findings import Finding, Verdict
from engine.audit.pools import Pool
from engine.seeding import generator


@dataclass(frozen=True)
class Planted:
    """A control, and the name of the finding that has to convict it; None where any gate may."""

    pool: Pool
    gate: str | None = None


@dataclass(frozen=True)
class ControlResult:
    """What the audit said of one control, and what it had to say; where a gate is named, `verdict` is that gate's, and
    "none" where it said nothing.
    """

    name: str
    expected: Verdict
    verdict: Verdict
    rows: int
    findings: list[Finding]
    gate: str | None = None

    @property
    def right(self) -> bool:
        """The verdict is the expected one."""
        return self.verdict == self.expected

    def to_json(self) -> dict:
        """Plain dict."""
        return {
            "name": self.name,
            "expected": self.expected,
            "verdict": self.verdict,
            "right": self.right,
            "rows": self.rows,
            "gate": self.gate,
            "findings": [finding.to_json() for finding in self.findings],
        }


def expected_verdict(name: str) -> Verdict:
    """ "pass" for controls named fresh..., "fail" for all others."""
    return "pass" if name.startswith("fresh") else "fail"


def copycat(train: Pool, rows: int, seed: int) -> Pool:
    """Training rows as they stand, each with the views it has."""
    chosen = generator(seed, "audit.control.copycat").choice(len(train), min(rows, len(train)), replace=False)
    return _anonymous(train.select(np.sort(chosen)))


def noisy_copycat(train: Pool, rows: int, noise: float, typical_distance: float, seed: int) -> Pool:
    """Training rows at about `noise` times the typical nearest distance of real people from their originals.

    Bits: every site is flipped with the probability that gives this many differing sites on average. Features:
    Gaussian noise of this length; where the rows are unit vectors they stay so.
    """
    rng = generator(seed, "audit.control.noisy")
    chosen = train.select(np.sort(rng.choice(len(train), min(rows, len(train)), replace=False)))
    away = noise * typical_distance
    if train.kind == "bits":
        length = train.length or 64 * train.data.shape[1]
        bits = np.unpackbits(chosen.data.view(np.uint8), axis=1, bitorder="little")
        flips = rng.random((len(chosen), length)) < away / length
        bits[:, :length] ^= flips.astype(np.uint8)
        data = np.packbits(bits, axis=1, bitorder="little").view(np.uint64)
    else:
        step = rng.standard_normal(chosen.data.shape) * away / np.sqrt(chosen.data.shape[1])
        data = (chosen.data + step).astype(np.float32)
        norm = np.linalg.norm(train.data, axis=1)
        if np.allclose(norm, 1, atol=1e-3):
            data /= np.linalg.norm(data, axis=1, keepdims=True)
    return _anonymous(Pool(train.kind, data, chosen.person, chosen.group, None, train.length, train.position_bp))


def mosaic(train: Pool, rows: int, seed: int, donors: int = 3) -> Pool:
    """Haplotypes pasted together from `donors` training rows at random breakpoints; bits only."""
    rng = generator(seed, "audit.control.mosaic")
    length = train.length or 64 * train.data.shape[1]
    bits_ml = np.unpackbits(train.data.view(np.uint8), axis=1, bitorder="little")
    made = np.empty((rows, bits_ml.shape[1]), dtype=np.uint8)
    for row in range(rows):
        breaks = [0, *np.sort(rng.choice(np.arange(1, length), donors - 1, replace=False)), bits_ml.shape[1]]
        for donor, (start, stop) in zip(rng.choice(len(train), donors, replace=False), pairwise(breaks)):
            made[row, start:stop] = bits_ml[donor, start:stop]
    data = np.packbits(made, axis=1, bitorder="little").view(np.uint64)
    return Pool("bits", data, np.arange(rows).astype(str), None, None, train.length, train.position_bp)


def set_aside(holdout: Pool, share: float, least: int, seed: int) -> tuple[Pool, Pool]:
    """(fresh, rest): a random share of the holdout people, at least `least`, that take no part in the null."""
    people = generator(seed, "audit.control.fresh").permutation(np.unique(holdout.person))
    n = max(min(least, len(people) - 1), round(share * len(people)))
    return holdout.select_people(people[:n]), holdout.select_people(people[n:])


def _anonymous(pool: Pool) -> Pool:
    """The pool with every row its own person: a control carries nobody's id."""
    return Pool(
        pool.kind, pool.data, np.arange(len(pool)).astype(str), pool.group, pool.views, pool.length, pool.position_bp
    )
