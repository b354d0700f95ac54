"""Panels as audit pools: haplotypes as packed bits over the sites all sides share, with the person behind each."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.audit.pools import Pool
from engine.errors import InputError
from engine.genomics.matching import common_sites
from engine.genomics.panel import HaplotypePanel, read_panel
from engine.kernels import bits


def haplotype_pool(panel: HaplotypePanel, where: str = "panel") -> Pool:
    """The haplotypes of a phased, complete panel, sites in the panel's order.

    Positions are given for a panel of one contig with rising positions; then the audit also judges the longest stretch
    shared with one person, which sees mosaics that whole-panel distances hide.

    Raises:
        InputError: unphased genotypes or missing alleles; distances between haplotypes are not defined there.
    """
    if not panel.phased:
        raise InputError("phased genotypes", "unphased ones", where, "phase them, e.g. with SHAPEIT5 or Beagle")
    if panel.missing_lw is not None and panel.missing_lw.any():
        missing = int(bits.popcount_rows(panel.missing_lw).sum())
        raise InputError("complete genotypes", f"{missing} missing alleles", where, "impute them, or drop the sites")
    position_bp = panel.sites.position_bp
    one_contig = len(np.unique(panel.sites.contig)) == 1 and bool((np.diff(position_bp) >= 0).all())
    sample_n = panel.sample_of_haplotype_n
    return Pool(
        "bits",
        panel.haplotype_major(),
        np.array(panel.samples.ids, dtype=str)[sample_n],
        group=panel.group_n,
        length=panel.n_sites,
        position_bp=position_bp if one_contig else None,
    )


def audit_pools(train: Path, holdout: Path, synthetic: Path) -> dict[str, Pool]:
    """Pools "train", "holdout" and "synthetic" of three panel files over the same sites in the same order.

    Raises:
        InputError: the files do not hold the same sites; the counts are in the message.
    """
    panels = {"train": read_panel(train), "holdout": read_panel(holdout), "synthetic": read_panel(synthetic)}
    chosen = common_sites({name: panel.sites for name, panel in panels.items()})
    pools = {}
    for (name, panel), path, site_l in zip(panels.items(), (train, holdout, synthetic), chosen, strict=True):
        same_order = np.array_equal(site_l, np.arange(panel.n_sites))
        pools[name] = haplotype_pool(panel if same_order else panel.select(sites=site_l), str(path))
    return pools
