"""Which sites two tables have in common: by contig (with or without "chr"), position, REF and ALT."""

from __future__ import annotations

import numpy as np

from engine.errors import InputError
from engine.files.genetic_map import plain_contig
from engine.genomics.panel import Sites


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
