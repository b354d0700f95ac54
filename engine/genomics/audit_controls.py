"""Planted controls of kinship: twins, children and grandchildren of training people, made by Mendelian transmission.

A copycat of haplotypes is nobody's relative, so that the audit's other controls say nothing of the kinship judge. These do: an
audit in which relatives of training people are there and kinship does not convict them has no verdict. They are planted only
where the sites can tell that degree (`relatedness.Resolution.limit`); where they cannot, there is no kinship gate either.

A gamete is made along each contig: it begins with one of the parent's two haplotypes by chance and crosses over to the other
as often as a Poisson process of one crossover a Morgan does (Haldane 1919, no interference), at the panel's genetic positions
or, without a map, at 1 cM a megabase. Mates are drawn within a group where the people have groups: KING-robust kinship of
people of mixed ancestry is too low.
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
_CM_PER_MB = 1.0
_DEGREES = (("twins", SAME_PERSON), ("children", FIRST_DEGREE), ("grandchildren", SECOND_DEGREE))


def relatives(
    panel: HaplotypePanel, train: Pool, holdout_people: int, resolved: Resolution, seed: int = 0
) -> dict[str, Planted]:
    """Controls "twins", "children" and "grandchildren", those whose degree the sites can tell, two rows a person.

    Args:
        panel, train: the training side, diploid people; the pool is the panel's, row by row.
        holdout_people: the number of people whose kinship with training is the judge's null.

    {} where the people are not diploid or fewer than six.
    """
    if panel.n_samples < 6 or (np.diff(panel.samples.first_haplotype) != 2).any():
        return {}
    n = min(RELATIVES, panel.n_samples // 3)
    pairs = panel.n_samples * (n + holdout_people)
    made = {}
    for name, least in _DEGREES:
        if resolved.limit(least, pairs) is not None:
            rng = generator(seed, f"genomics.audit.controls.{name}")
            rows_nw = _family(name, panel, train.data, n, rng)
            person = np.repeat([f"{name}-{k}" for k in range(n)], 2)
            pool = Pool("bits", rows_nw, person, length=train.length, position_bp=train.position_bp)
            made[name] = Planted(pool, f"kinship_above_{least:g}")
    return made


def gamete(
    parent_2l: NDArray[np.uint8], sites: Sites, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """One haplotype that a parent of these two transmits, uint8 (L,), and which of the two each site is from, int64 (L,)."""
    from_l = np.empty(parent_2l.shape[1], dtype=np.int64)
    edges = np.flatnonzero(np.concatenate([[True], sites.contig[1:] != sites.contig[:-1], [True]]))
    for first, stop in zip(edges[:-1].tolist(), edges[1:].tolist()):
        if sites.position_cm is None:
            at_cm = sites.position_bp[first:stop] * (_CM_PER_MB / 1e6)
        else:
            at_cm = sites.position_cm[first:stop]
        low, high = float(at_cm.min()), float(at_cm.max())
        crossed_cm = np.sort(rng.uniform(low, high, rng.poisson((high - low) / 100)))
        from_l[first:stop] = (rng.integers(2) + np.searchsorted(crossed_cm, at_cm)) % 2
    return np.take_along_axis(parent_2l, from_l[None], axis=0)[0], from_l


# ------------------------------------------------------------------------------------------------------------------ p


def _family(
    name: str, panel: HaplotypePanel, bits_nw: NDArray[np.uint64], n: int, rng: np.random.Generator
) -> NDArray[np.uint64]:
    """Haplotypes 2 k and 2 k + 1 of relative k of a training person of their own, packed."""
    known = rng.permutation(panel.n_samples)
    group = np.zeros(panel.n_samples, dtype=int) if panel.samples.group is None else panel.samples.group
    rows = []
    for person in known[:n].tolist():
        mates = known[(group[known] == group[person]) & (known != person)]
        mates = rng.permutation(mates if len(mates) >= 2 else known[known != person])
        own_2l = _unpacked(bits_nw, person, panel.n_sites)
        if name == "twins":
            rows.append(own_2l)
            continue
        child_2l = _child(own_2l, _unpacked(bits_nw, int(mates[0]), panel.n_sites), panel.sites, rng)
        if name == "grandchildren":
            child_2l = _child(child_2l, _unpacked(bits_nw, int(mates[1]), panel.n_sites), panel.sites, rng)
        rows.append(child_2l)
    return bits.pack(np.concatenate(rows))


def _child(one_2l: NDArray[np.uint8], other_2l: NDArray[np.uint8], sites: Sites, rng: np.random.Generator) -> NDArray:
    return np.stack([gamete(one_2l, sites, rng)[0], gamete(other_2l, sites, rng)[0]])


def _unpacked(bits_nw: NDArray[np.uint64], person: int, length: int) -> NDArray[np.uint8]:
    return bits.unpack(np.ascontiguousarray(bits_nw[2 * person : 2 * person + 2]), length)
