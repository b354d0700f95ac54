"""Nearest-neighbour adversarial accuracy (AATS) and the privacy loss made from it.

AATS asks, for two sets T and S of equal size, how often a row's nearest neighbour lies in its own set:
half the sum of mean[d_TS > d_TT] and mean[d_ST > d_SS], with strict comparison and the distance of a row to itself
infinite. 0.5 is ideal, below is copying, above is too different. Source: Yale et al., Neurocomputing 416 (2020)
244-255. Here the distance to every row of the same person is infinite too: otherwise a second visit is its own set's
nearest neighbour, more often on the side whose visits happen to be drawn together, and the difference of two AATS
reads as leakage.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.audit.findings import Finding
from engine.audit.pools import Pool, check_alike, topk
from engine.errors import InputError
from engine.seeding import generator

_BLOCKS = 25  # of the jackknife
_LOSS_NOTE = "AATS(holdout) - AATS(train): positive is nearer to training; fails where the whole interval lies above"
_KEEP = 12  # neighbours kept, so that the nearest one outside a deleted block is known


def aats(real: Pool, synthetic: Pool, *, seed: int = 0, rows: int | None = None, name: str = "aats") -> Finding:
    """AATS of `synthetic` against `real`, with a block jackknife interval over people.

    Args:
        real, synthetic: pools of one kind; the larger is cut at random to the size of the smaller.
        rows: at most this many rows per side.
        name: of the finding, e.g. "aats_test" or "aats_train".
    """
    value, block_b, n = _aats_blocks(real, synthetic, seed, rows)
    low, high = _jackknife_interval(value, block_b)
    return Finding(
        name=name,
        value=value,
        interval=(max(0.0, low), min(1.0, high)),
        n=n,
        threshold=0.5,
        direction="target",
        note="share of rows whose nearest neighbour lies in their own set; 0.5 is ideal, below is copying",
    )


def privacy_loss(
    train: Pool, holdout: Pool, synthetic: Pool, *, seed: int = 0, rows: int | None = None
) -> tuple[Finding, Finding, Finding]:
    """(aats_test, aats_train, privacy_loss), all at one n, on the same synthetic rows.

    privacy_loss = AATS(holdout) - AATS(train). Its sign: positive means that the synthetic rows lie nearer to the
    training rows than to unseen ones, which is leakage; about zero is right; negative has no reading as leakage.
    """
    n = min(len(train), len(holdout), len(synthetic), rows or len(synthetic))
    synthetic = _draw(synthetic, n, seed, "synthetic")
    holdout, train = _draw(holdout, n, seed, "real"), _draw(train, n, seed, "real")
    # as many blocks on both sides of the difference, however many people each drew
    blocks = min(_BLOCKS, holdout.people, train.people, synthetic.people)
    test, test_b, n = _aats_blocks(holdout, synthetic, seed, n, blocks)
    same, same_b, n = _aats_blocks(train, synthetic, seed, n, blocks)
    findings = []
    for name, value, block_b, note in (
        ("aats_test", test, test_b, "adversarial accuracy against unseen real rows; 0.5 is ideal"),
        ("aats_train", same, same_b, "against training rows; fails where the whole interval lies below"),
        ("privacy_loss", test - same, test_b - same_b, _LOSS_NOTE),
    ):
        findings.append(
            Finding(
                name=name,
                value=value,
                interval=_jackknife_interval(value, block_b),
                n=n,
                threshold=0.0 if name == "privacy_loss" else 0.5,
                direction="lower" if name == "privacy_loss" else "target",
                note=note,
            )
        )
    return findings[0], findings[1], findings[2]


def _draw(pool: Pool, n: int, seed: int, side: str) -> Pool:
    if len(pool) == n:
        return pool
    chosen = generator(seed, f"audit.aats.{side}").choice(len(pool), size=n, replace=False)
    return pool.select(np.sort(chosen))


def _aats_blocks(
    real: Pool, synthetic: Pool, seed: int, rows: int | None, most: int | None = None
) -> tuple[float, NDArray[np.float64], int]:
    """AATS, its value with each block of people left out (at most `most` blocks), and n per side."""
    check_alike(real, synthetic)
    n = min(len(real), len(synthetic), rows or len(real))
    if n < 2:
        raise InputError("at least 2 rows on each side for the adversarial accuracy", str(n))
    real, synthetic = _draw(real, n, seed, "real"), _draw(synthetic, n, seed, "synthetic")
    real = Pool(real.kind, real.data, real.person)  # views are for the copy search
    synthetic = Pool(synthetic.kind, synthetic.data, synthetic.person)
    # a person's other visit is no neighbour, and how many visits were drawn together differs between the sides
    person_t, person_s = (np.unique(pool.person, return_inverse=True)[1] for pool in (real, synthetic))
    near = {
        "ts": topk(real, synthetic, min(_KEEP, n)),
        "tt": topk(real, real, min(_KEEP, n - 1), exclude=(person_t, person_t)),
        "st": topk(synthetic, real, min(_KEEP, n)),
        "ss": topk(synthetic, synthetic, min(_KEEP, n - 1), exclude=(person_s, person_s)),
    }
    block_t, block_s = _blocks(real.person, seed, most or _BLOCKS), _blocks(synthetic.person, seed, most or _BLOCKS)

    def value(left_out: int | None) -> float:
        def nearest(pair: str) -> NDArray[np.float64]:
            distance, index = near[pair]
            if left_out is None:
                return distance[:, 0]
            outside = (block_t if pair[1] == "t" else block_s)[index] != left_out
            return np.where(outside, distance, np.inf).min(axis=1)

        keep_t = slice(None) if left_out is None else block_t != left_out
        keep_s = slice(None) if left_out is None else block_s != left_out
        real_own = (nearest("ts") > nearest("tt"))[keep_t].mean()
        synthetic_own = (nearest("st") > nearest("ss"))[keep_s].mean()
        return float((real_own + synthetic_own) / 2)

    blocks = min(len(np.unique(block_t)), len(np.unique(block_s)))
    return value(None), np.array([value(b) for b in range(blocks)]), n


def _blocks(person_n: NDArray, seed: int, most: int) -> NDArray[np.int64]:
    """A block for every row, people kept together, blocks of nearly equal size."""
    _, code_n = np.unique(person_n, return_inverse=True)
    people = int(code_n.max()) + 1
    order = generator(seed, "audit.aats.blocks").permutation(people)
    return (order % min(most, people))[code_n]


def _jackknife_interval(value: float, block_b: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval from leave-one-block-out values (Efron and Tibshirani 1993, chapter 11)."""
    b = len(block_b)
    error = float(np.sqrt((b - 1) / b * ((block_b - block_b.mean()) ** 2).sum())) if b > 1 else float("nan")
    return value - 1.96 * error, value + 1.96 * error
