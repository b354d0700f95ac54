"""Planted controls of kinship: twins, children and grandchildren of training people, made by Mendelian transmission.

A copycat of haplotypes is nobody's relative, so that the audit's other controls say nothing of the kinship judge. These do: an
audit in which relatives of training people are there and kinship does not convict them has no verdict. They are planted only
where the sites can tell that degree (`relatedness.Resolution.limit`); where they cannot, there is no kinship gate either.

A gamete is made along each contig: it begins with one of the parent's two haplotypes by chance and crosses over to the other
as often as a Poisson process of one crossover a Morgan does (Haldane 1919, no interference), at the panel's genetic positions
or, without a map, at 1 cM a megabase. A child has two training people for parents. The other parent of a grandchild is of the
holdout: one in training would be a first-degree relative there. Mates are drawn within a group where the people have groups,
because the KING-robust kinship of people of mixed ancestry is too low.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.audit.controls import Planted
from engine.audit.pools import Pool
from engine.genomics.panel import HaplotypePanel, Sites
from engine.genomics.relatedness import FIRST_DEGREE, SAME_PERSON, SECOND_DEGREE, Resolution
from engine.kernels import bits
from engine.seeding import generator

RELATIVES = 30  # people in each control, at most
_DEGREES = (("twins", SAME_PERSON), ("children", FIRST_DEGREE), ("grandchildren", SECOND_DEGREE))


def relatives(
    panel: HaplotypePanel, train: Pool, holdout: Pool, resolved: Resolution, seed: int = 0
) -> dict[str, Planted]:
    """Controls "twins", "children" and "grandchildren", those whose degree the sites can tell, two rows a person.

    Args:
        panel, train: the training side, diploid people; the pool is the panel's, row by row.
        holdout: diploid people too, at the same sites; their kinship with training is the judge's null.

    {} where the people are not diploid or fewer than six.
    """
    if panel.n_samples < 6 or any(2 * side.people != len(side) for side in (train, holdout)):
        return {}
    n = min(RELATIVES, panel.n_samples // 3)
    pairs = panel.n_samples * (n + holdout.people)
    made = {}
    for name, least in _DEGREES:
        if resolved.limit(least, pairs) is not None:
            rng = generator(seed, f"genomics.audit.controls.{name}")
            rows_nw = _family(name, panel.sites, train, holdout, n, rng)
            person = np.repeat([f"{name}-{k}" for k in range(n)], 2)
            pool = Pool("bits", rows_nw, person, length=train.length, position_bp=train.position_bp)
            made[name] = Planted(pool, f"kinship_above_{least:g}")
    return made


def gamete(
    parent_2l: NDArray[np.uint8], sites: Sites, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """One haplotype that a parent of these two transmits, uint8 (L,), and which of the two each site is from, int64 (L,)."""
    from_l, position_cm = np.empty(parent_2l.shape[1], dtype=np.int64), sites.centimorgans()
    edges = np.flatnonzero(np.concatenate([[True], sites.contig[1:] != sites.contig[:-1], [True]]))
    for first, stop in zip(edges[:-1].tolist(), edges[1:].tolist()):
        at_cm = position_cm[first:stop]
        low, high = float(at_cm.min()), float(at_cm.max())
        crossed_cm = np.sort(rng.uniform(low, high, rng.poisson((high - low) / 100)))
        from_l[first:stop] = (rng.integers(2) + np.searchsorted(crossed_cm, at_cm)) % 2
    return np.take_along_axis(parent_2l, from_l[None], axis=0)[0], from_l


def _family(
    name: str, sites: Sites, train: Pool, holdout: Pool, n: int, rng: np.random.Generator
) -> NDArray[np.uint64]:
    """Haplotypes 2 k and 2 k + 1 of relative k of a training person of their own, packed."""
    length = len(sites.position_bp)
    known = rng.permutation(len(train) // 2)
    rows = []
    for person in known[:n].tolist():
        own_2l = _unpacked(train, person, length)
        if name == "twins":
            rows.append(own_2l)
            continue
        mates = _of_group(train, train, person, rng)
        child_2l = _child(own_2l, _unpacked(train, mates[mates != person][0], length), sites, rng)
        if name == "grandchildren":
            mate = int(_of_group(holdout, train, person, rng)[0])
            child_2l = _child(child_2l, _unpacked(holdout, mate, length), sites, rng)
        rows.append(child_2l)
    return bits.pack(np.concatenate(rows))


def _of_group(side: Pool, train: Pool, person: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """People of a side in random order, of the group of a training person where there are two of it or more."""
    people = np.arange(len(side) // 2)
    if side.group is not None and train.group is not None:
        alike = people[side.group[::2] == train.group[2 * person]]
        people = alike if len(alike) >= 2 else people
    return rng.permutation(people)


def _child(one_2l: NDArray[np.uint8], other_2l: NDArray[np.uint8], sites: Sites, rng: np.random.Generator) -> NDArray:
    return np.stack([gamete(one_2l, sites, rng)[0], gamete(other_2l, sites, rng)[0]])


def _unpacked(side: Pool, person: int, length: int) -> NDArray[np.uint8]:
    return bits.unpack(np.ascontiguousarray(side.data[2 * person : 2 * person + 2]), length)
