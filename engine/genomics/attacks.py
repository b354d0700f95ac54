"""Attacks on released allele frequencies: was this person in the group behind them? (Homer's D, and the likelihood ratio.)

Whoever publishes a synthetic panel publishes its allele frequencies too. The attacker has them, the genotypes of a target,
and the frequencies of unseen people of the same population. Two scores, higher for "was in the group":

    D(y) = sum over sites of |y - reference| - |y - released|           (Homer et al., PLoS Genetics 4:e1000167, 2008)
    L(y) = sum over the target's alleles of log(released / reference)    (Sankararaman et al., Nature Genetics 41:965, 2009)

with y = dosage / 2, and in L the frequency of the allele that the target has. Members are training people; non-members one
half of the holdout, the other half gives the reference: neither has a part in the released frequencies of an honest
generator, so that the area under the ROC is one half then. What an area means is decided by `engine.audit.membership`. The
same attack on the frequencies of the training set itself is the most that any release of frequencies could give away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from engine.audit.findings import Finding
from engine.audit.membership import membership
from engine.audit.policy import AuditPolicy
from engine.audit.pools import Pool
from engine.kernels import bits
from engine.seeding import generator

ATTACKS = 2  # that share an error with the one on private alleles (`audit_judges`)
_MOST_SITES = 50_000  # attacked, evenly spread: neighbouring sites say the same again
_BLOCK_BYTES = 64 << 20  # of unpacked alleles held at a time


def homer_d(
    dosage_sl: NDArray[np.integer], released_l: NDArray[np.floating], reference_l: NDArray[np.floating], ploidy: int = 2
) -> NDArray[np.float64]:
    """Homer's D of each target, float64 (S,).

    Args:
        dosage_sl: (S, L), ALT alleles of each target, 0 .. ploidy.
        released_l, reference_l: ALT frequencies (L,) of the attacked group and of unseen people.
    """
    y_g = np.arange(ploidy + 1)[:, None] / ploidy
    return _summed(dosage_sl, np.abs(y_g - reference_l) - np.abs(y_g - released_l))


def likelihood_ratio(
    dosage_sl: NDArray[np.integer], released_l: NDArray[np.floating], reference_l: NDArray[np.floating], ploidy: int = 2
) -> NDArray[np.float64]:
    """Log-likelihood ratio of each target, nats, float64 (S,); arguments as `homer_d`, frequencies inside (0, 1)."""
    g_g = np.arange(ploidy + 1)[:, None]
    alt_l, ref_l = np.log(released_l / reference_l), np.log((1 - released_l) / (1 - reference_l))
    return _summed(dosage_sl, (g_g * alt_l + (ploidy - g_g) * ref_l).astype(np.float64))


def frequencies(rows: Pool, site_l: NDArray[np.int64]) -> NDArray[np.float64]:
    """ALT frequency of the rows at these sites with half an allele of either kind added, so that none is 0 or 1."""
    total_l = np.zeros(len(site_l), dtype=np.int64)
    for alleles_nl in _unpacked(rows, site_l):
        total_l += alleles_nl.sum(axis=0, dtype=np.int64)
    return (total_l + 0.5) / (len(rows) + 1)


def frequency_attack(
    train: Pool, holdout: Pool, policy: AuditPolicy, seed: int
) -> Callable[[Pool, bool], list[Finding]] | None:
    """The attack made ready: a function (rows, upper bound too) -> findings on the frequencies of those rows.

    People are drawn at random: up to `policy.membership_people` members and as many non-members.

    Returns:
        None where people have neither one nor two rows each, or there are fewer than two holdout people.
    """
    ploidy = _ploidy(train)
    people = np.unique(holdout.person)
    if ploidy is None or _ploidy(holdout) != ploidy or len(people) < 2:
        return None
    rng = generator(seed, "genomics.attacks")
    people = rng.permutation(people)
    reference = holdout.select_people(people[: len(people) // 2])
    length = train.length or 64 * train.data.shape[1]
    site_l = np.unique(np.linspace(0, length - 1, min(length, _MOST_SITES)).astype(np.int64))
    most = policy.membership_people
    members = rng.permutation(np.unique(train.person))[:most]
    member_sl = _dosages(train.select_people(members), site_l, ploidy)
    nonmember_sl = _dosages(holdout.select_people(people[len(people) // 2 :][:most]), site_l, ploidy)
    reference_l = frequencies(reference, site_l)

    def attack(rows: Pool, upper_bound: bool) -> list[Finding]:
        made = _judged(frequencies(rows, site_l), "frequencies")
        if upper_bound:
            bound = _judged(frequencies(train, site_l), "training_frequencies")
            made += [replace(f, threshold=None, verdict="none", note=f"{f.note}; upper bound") for f in bound]
        return made

    def _judged(released_l: NDArray[np.float64], what: str) -> list[Finding]:
        findings = []
        for name, score in (("homer", homer_d), ("likelihood", likelihood_ratio)):
            sides = (score(dosage_sl, released_l, reference_l, ploidy) for dosage_sl in (member_sl, nonmember_sl))
            findings += membership(
                *sides, policy=policy, name=f"{what}_{name}", gates=1 + ATTACKS,
                calibrated_on="half of the holdout; reference frequencies from the other half",
                note=f"allele frequencies of the {'training' if what != 'frequencies' else 'synthetic'} set",
            )[0]  # fmt: skip
        return findings

    return attack


def _ploidy(pool: Pool) -> int | None:
    """Rows per person where everybody has one, or everybody two."""
    count = np.unique(np.unique(pool.person, return_counts=True)[1])
    return int(count[0]) if len(count) == 1 and count[0] in (1, 2) else None


def _dosages(pool: Pool, site_l: NDArray[np.int64], ploidy: int) -> NDArray[np.uint8]:
    """ALT alleles of each person, uint8 (S, sites)."""
    pool = pool.select(np.argsort(pool.person, kind="stable"))
    return np.concatenate(
        [part.reshape(-1, ploidy, len(site_l)).sum(axis=1, dtype=np.uint8) for part in _unpacked(pool, site_l)]
    )


def _unpacked(pool: Pool, site_l: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    """Alleles of the rows at these sites, an even number of rows at a time: uint8 (N, sites)."""
    length = pool.length or 64 * pool.data.shape[1]
    step = 2 * max(1, _BLOCK_BYTES // (2 * length))
    for first in range(0, len(pool), step):
        yield bits.unpack(np.ascontiguousarray(pool.data[first : first + step]), length)[:, site_l]


def _summed(dosage_sl: NDArray[np.integer], value_gl: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over the sites of the value that belongs to each dosage."""
    step_gl, made_s = value_gl[1:] - value_gl[0], np.empty(len(dosage_sl))
    for first in range(0, len(dosage_sl), 64):
        part = dosage_sl[first : first + 64]
        made_s[first : first + 64] = value_gl[0].sum() + sum(
            (part == g + 1).astype(np.float64) @ step_l for g, step_l in enumerate(step_gl)
        )
    return made_s
