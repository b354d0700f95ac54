"""What two panels have in common: sites, by contig (with or without "chr"), position, REF and ALT; and people, by id."""

from __future__ import annotations

import numpy as np

from engine.errors import InputError
from engine.files.genetic_map import plain_contig
from engine.genomics.panel import HaplotypePanel, Samples, Sites
from engine.kernels import bits


def site_keys(sites: Sites) -> list[tuple[str, int, str, str]]:
    """(contig without "chr", position_bp, REF, ALT) of each site."""
    short = {name: plain_contig(name) for name in dict.fromkeys(sites.contig.tolist())}
    return [
        (short[contig], position, ref, alt)
        for contig, position, ref, alt in zip(
            sites.contig.tolist(), sites.position_bp.tolist(), sites.ref.tolist(), sites.alt.tolist(), strict=True
        )
    ]


def common_sites(tables: dict[str, Sites], *, intersect: bool = False) -> list[np.ndarray]:
    """For each named table the int64 indices of the sites that all share, in the first table's order.

    Raises:
        InputError: the tables differ and `intersect` is False; or nothing is shared; or a table lists a site twice. The
            message gives the counts.
    """
    keys = {name: site_keys(sites) for name, sites in tables.items()}
    place = {}
    for name, own in keys.items():
        place[name] = {key: at for at, key in enumerate(own)}
        if len(place[name]) != len(own):
            repeated = next(key for at, key in enumerate(own) if place[name][key] != at)
            raise InputError("each site once", "{}:{} {}>{} twice".format(*repeated), name, "bcftools norm -d exact")
    first = next(iter(keys))
    shared = [key for key in keys[first] if all(key in other for other in place.values())]
    if not shared or (not intersect and any(len(shared) < len(own) for own in keys.values())):
        sizes = ", ".join(f"{name} {len(own)}" for name, own in keys.items())
        raise InputError(
            "the same sites (contig, position, REF, ALT) on every side",
            f"{len(shared)} shared of {sizes}",
            " and ".join(keys),
            "intersect=True (--intersect)" if shared else "panels of the same build and region",
        )
    return [np.array([place[name][key] for key in shared], dtype=np.int64) for name in keys]


def of_person(first_haplotype: np.ndarray) -> np.ndarray:
    """int64 (K, most haplotypes of a person): all haplotypes of the person of each haplotype, -1-padded.

    Args:
        first_haplotype: int64 (S + 1,), sample s owns haplotypes first[s] .. first[s + 1] - 1.
    """
    count_s = np.diff(first_haplotype)
    place = np.arange(count_s.max(initial=0))
    own_sp = np.where(place < count_s[:, None], first_haplotype[:-1, None] + place, -1)
    return np.repeat(own_sp, count_s, axis=0)


def own_haplotypes(samples: Samples, bits_lw: np.ndarray, panel: HaplotypePanel, own_l: np.ndarray) -> np.ndarray:
    """The haplotypes of a reference that belong to the person of each panel haplotype, for leaving them out.

    Args:
        samples, bits_lw: of the reference. own_l: its sites, int64, in the order of the panel's.

    Returns:
        int64 (N, 2), -1-padded.

    Raises:
        InputError: a person who is not in the reference, or who has another number of haplotypes or other alleles there.
    """
    place = {name: at for at, name in enumerate(samples.ids)}
    absent = [name for name in panel.samples.ids if name not in place]
    if absent:
        raise InputError(
            "people of the reference panel, for leave-one-out", f"'{absent[0]}' ({len(absent)} not in it)", "score",
            "scoring without leave_one_out",
        )  # fmt: skip
    first_s = samples.first_haplotype
    exclude_ne = np.full((panel.n_haplotypes, 2), -1, dtype=np.int64)
    mine_n = np.empty(panel.n_haplotypes, dtype=np.int64)
    for s, name in enumerate(panel.samples.ids):
        theirs = slice(panel.samples.first_haplotype[s], panel.samples.first_haplotype[s + 1])
        ours = np.arange(first_s[place[name]], first_s[place[name] + 1])
        if len(ours) != theirs.stop - theirs.start:
            raise InputError(f"{len(ours)} haplotypes", f"{theirs.stop - theirs.start}", f"score, sample {name}")
        exclude_ne[theirs, : len(ours)] = ours
        mine_n[theirs] = ours
    different_l = np.empty(len(own_l), dtype=bool)
    for at in range(0, len(own_l), 1024):
        ours_ln = bits.unpack(np.ascontiguousarray(bits_lw[own_l[at : at + 1024]]), int(first_s[-1]))[:, mine_n]
        theirs_ln = bits.unpack(np.ascontiguousarray(panel.bits_lw[at : at + 1024]), panel.n_haplotypes)
        unequal = ours_ln != theirs_ln
        if panel.missing_lw is not None:
            unequal &= ~bits.unpack(np.ascontiguousarray(panel.missing_lw[at : at + 1024]), panel.n_haplotypes).astype(
                bool
            )
        different_l[at : at + 1024] = unequal.any(axis=1)
    if different_l.any():
        raise InputError(
            "the alleles that these people have in the reference panel",
            f"others at {int(different_l.sum())} sites",
            "score with leave_one_out",
        )  # fmt: skip
    return exclude_ne
