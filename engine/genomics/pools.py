"""Panels as audit pools: haplotypes as packed bits over the sites all sides share, with the person behind each; checked before
the audit for people and families that are on both sides.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from engine.audit.controls import Planted
from engine.audit.findings import Finding
from engine.audit.gates import Judge
from engine.audit.policy import AuditPolicy
from engine.audit.pools import Pool
from engine.errors import InputError
from engine.genomics.audit_controls import relatives
from engine.genomics.audit_judges import genotype_judges
from engine.genomics.matching import common_sites
from engine.genomics.membership import copying_judge
from engine.genomics.panel import HaplotypePanel, read_panel
from engine.genomics.relatedness import (
    THRESHOLDS,
    Resolution,
    close_pairs,
    genotypes_of_panel,
    resolution,
    same_people,
)
from engine.kernels import bits

_MOST_SITES = 50_000  # compared for duplicates, evenly spread


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


def audit_pools(
    train: Path, holdout: Path, synthetic: Path, *, policy: AuditPolicy | None = None, seed: int = 0
) -> tuple[dict[str, Pool], dict[str, Planted], list[Judge]]:
    """Pools "train", "holdout" and "synthetic" of three panel files over the same sites, in any order; controls of kinship;
    judges.

    Training and holdout are checked first: one person under two ids (equal genotypes, or a kinship of twins) and relatives
    (KING-robust kinship >= 0.0884) make the holdout no holdout. Where the sites are too few or span too little of the genome
    to tell (`relatedness.resolution`), nothing is refused and the findings say so.

    Returns:
        pools by side, planted relatives of training people (`audit_controls`), judges for `engine.audit.audit`.

    Raises:
        InputError: the files do not hold the same sites (counts in the message), or a person or a family is on both sides
            (the pairs are named).
    """
    paths = {"train": train, "holdout": holdout, "synthetic": synthetic}
    panels = {name: read_panel(path) for name, path in paths.items()}
    chosen = common_sites({name: panel.sites for name, panel in panels.items()})
    for (name, panel), site_l in zip(list(panels.items()), chosen, strict=True):
        if not np.array_equal(site_l, np.arange(panel.n_sites)):
            panels[name] = panel.select(sites=site_l)
    pools = {name: haplotype_pool(panel, str(paths[name])) for name, panel in panels.items()}
    resolved, noted = check_sides(panels["train"], panels["holdout"], str(holdout))
    judges = genotype_judges(
        pools["train"], pools["holdout"], panels["train"].sites.contig, resolved, noted, policy=policy, seed=seed
    )
    judges.append(copying_judge(panels["train"], panels["holdout"], policy or AuditPolicy(), seed))
    controls = relatives(panels["train"], pools["train"], pools["holdout"], resolved, seed)
    return pools, controls, judges


def check_sides(
    train: HaplotypePanel, holdout: HaplotypePanel, where: str = "holdout"
) -> tuple[Resolution, list[Finding]]:
    """Refuse a person or a family on both sides; count duplicates and relatives within each.

    Args:
        train, holdout: panels of the same sites in the same order.
        where: what an error names, e.g. the holdout file.

    Returns:
        what the sites resolve, and findings: pairs across the sides, within training, within the holdout; NaN where they cannot
        tell.

    Raises:
        InputError: as `audit_pools`.
    """
    if any((np.diff(panel.samples.first_haplotype) != 2).any() for panel in (train, holdout)):
        note = "not given: kinship is defined for diploid people"
        return Resolution(np.zeros(0, dtype=np.int64), math.inf, 0, 1.0), [_kin(math.nan, {}, note)]
    shared = sorted(set(train.samples.ids) & set(holdout.samples.ids))
    if shared:
        raise InputError(
            "different people in training and holdout", f"{_some(shared)} on both sides", where,
            "split by person (engine genomics split)",
        )  # fmt: skip
    resolved = resolution(train)
    site_l = None if train.n_sites <= _MOST_SITES else np.linspace(0, train.n_sites - 1, _MOST_SITES).astype(np.int64)
    whole = [genotypes_of_panel(panel, site_l) for panel in (train, holdout)]
    n = {"training": train.n_samples, "holdout": holdout.n_samples}
    across, within = n["training"] * n["holdout"], [m * (m - 1) // 2 for m in n.values()]
    findings = []
    if resolved.judges_identity(across):
        found, allowed = same_people(*whole)
        if found:
            same = [f"{train.samples.ids[i]} = {holdout.samples.ids[j]}" for i, j in found]
            raise InputError(
                "no person on both sides",
                f"under two ids genotypes that differ in at most {allowed} alleles at {whole[0].sites} sites: {_some(same)}",
                where, "leave these people out of the holdout, and split by person before training",
            )  # fmt: skip
        for name, people, pairs in zip(n, whole, within):
            note = f"pairs of ids in {name} that are one person by their genotypes"
            findings.append(_kin(len(same_people(people)[0]), {"pairs": pairs}, note, f"duplicates_within_{name}"))
    level = next(
        (limit for least in reversed(THRESHOLDS) if (limit := resolved.limit(least, across)) is not None), None
    )
    if level is None:
        note = (
            f"not judged: {len(resolved.site_l)} independent sites on {10 * resolved.stretches} Mb do not show kinship"
        )
        return resolved, [*findings, _kin(math.nan, {"pairs": across}, note)]
    known = [genotypes_of_panel(panel, resolved.site_l) for panel in (train, holdout)]
    kin = close_pairs(known[0], known[1], level)
    if len(kin):
        named = [
            f"{train.samples.ids[i]} ~ {holdout.samples.ids[j]} ({value:.3f})"
            for i, j, value in zip(kin.first_p.tolist(), kin.second_p.tolist(), kin.kinship_p.tolist())
        ]
        raise InputError(
            "no relatives across training and holdout", f"KING-robust kinship of at least {level:.3g}: {_some(named)}", where,
            "leave one of each pair out (plink2 --king-cutoff lists them), and split by family before training",
        )  # fmt: skip
    note = f"pairs across training and holdout with a kinship of at least {level:.3g}; any would have been refused"
    findings.append(_kin(0, {"pairs": across}, note))
    for name, people, pairs in zip(n, known, within):
        count = len(close_pairs(people, None, level))
        note = f"pairs in {name} with a kinship of at least {level:.3g}: they weaken every count of people"
        findings.append(_kin(count, {"pairs": pairs}, note, f"relatives_within_{name}"))
    return resolved, findings


def _kin(value: float, n: dict[str, int], note: str, name: str = "relatives_across_sides") -> Finding:
    return Finding(name, float(value), n=n, direction="lower", unit="pairs", note=note)


def _some(named: list[str]) -> str:
    """The first five, and how many there are."""
    return f"{len(named)} ({', '.join(named[:5])}{', ...' if len(named) > 5 else ''})"
