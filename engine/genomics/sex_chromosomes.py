"""X in a copying model, and the sexes of synthetic people.

A model copies from whole haplotypes: of a man on X that is his maternal one, which runs through both pseudo-autosomal
regions (PAR) and what lies between; his second one, which is there inside PAR only, is left out of the reference
(`complete`). A synthetic man's second haplotype is copied like any other and kept inside PAR. Y and mitochondria are
refused: they do not recombine, so that a mosaic could only be one person's whole lineage. Which sites lie outside PAR
is told by `engine.files.ploidy`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine import seeding
from engine.errors import InputError, UsageError, closest
from engine.files import ploidy
from engine.files.genetic_map import plain_contig
from engine.genomics.li_stephens import LiStephens
from engine.genomics.panel import HaplotypePanel, genotypes_from_panel, panel_from_genotypes

SEXES = ("female", "male")


def complete(panel: HaplotypePanel) -> HaplotypePanel:
    """`panel` without the second haplotypes of men on X: everybody's haplotypes run from end to end.

    A panel in which nobody is hemizygous comes back as it is.
    """
    if panel.hemizygous is None:
        return panel
    second = panel.samples.first_haplotype[:-1][panel.hemizygous[1]] + 1
    return _like(panel, panel_from_genotypes(ploidy.without_haplotypes(genotypes_from_panel(panel), second)))


def refuse_uncopied(panel: HaplotypePanel, where: object) -> None:
    """Raise InputError where the panel has sites of Y or mitochondria."""
    names = [name for name in dict.fromkeys(panel.sites.contig.tolist()) if plain_contig(name) in ("Y", "MT")]
    if names:
        others = "" if len(names) == len(set(panel.sites.contig.tolist())) else f"bcftools view -t ^{','.join(names)}"
        raise InputError(
            "chromosomes that recombine", f"{names[0]}, of which a mosaic would be one person's whole lineage", where,
            others,
        )  # fmt: skip


def has_x(model: LiStephens) -> bool:
    """Whether the model has sites on X."""
    return bool(ploidy.is_x(model.sites.contig).any())


def male_share(model: LiStephens) -> np.ndarray | None:
    """float64 (G,): share of men among the people of known sex of each group; None where the panel has no sexes.

    A group without anybody of known sex has the share of the whole panel.
    """
    sex = model.samples.sex
    if sex is None or not np.isin(sex, SEXES).any():
        return None
    group_s = model.group_of_haplotype_k[model.samples.first_haplotype[:-1]]
    known = np.isin(sex, SEXES)
    count_g = np.bincount(group_s[known], minlength=len(model.group_names))
    male_g = np.bincount(group_s[known & (sex == "male")], minlength=len(model.group_names))
    whole = float((sex == "male").sum() / known.sum())
    return np.where(count_g > 0, male_g / np.maximum(count_g, 1), whole)


def draw_sexes(
    model: LiStephens, groups: np.ndarray, seed: int, start: int, sex: str | None = None
) -> np.ndarray | None:
    """Sexes of people start .. start + n - 1, whose groups are `groups` (n names), str (n,).

    Drawn by the share of men in the person's group, from (seed, k); `sex` asks for one of all. People of a group that
    is none of the model's (admixed ones) take the panel's share. None where the panel has no sexes and none is asked
    for.

    Raises:
        UsageError: `sex` is neither "male" nor "female". InputError: the model has X, but no sexes, and none is asked
        for.
    """
    if sex is not None:
        if sex not in SEXES:
            raise UsageError("male or female", f"'{sex}'", "--sex", closest(sex, list(SEXES)))
        return np.full(len(groups), sex)
    share_g = male_share(model)
    if share_g is None:
        if has_x(model):
            raise InputError(
                "the sexes of the panel's people, for X",
                "none known",
                "sample",
                "--sex female, or a samples table with a column sex",
            )
        return None
    place = {name: at for at, name in enumerate(model.group_names)}
    assert model.samples.sex is not None
    whole = float((model.samples.sex[np.isin(model.samples.sex, SEXES)] == "male").mean())
    share_n = np.array([share_g[place[name]] if name in place else whole for name in groups.tolist()])
    drawn_n = [seeding.generator(seed, "genomics.sex", k).random() for k in range(start, start + len(groups))]
    return np.where(np.array(drawn_n) < share_n, "male", "female")


def with_sexes(made: HaplotypePanel, sex: np.ndarray | None) -> HaplotypePanel:
    """Diploid people with these sexes, str (S,) or None: men with one haplotype on X outside PAR, their first."""
    if sex is None:
        return made
    made = replace(made, samples=replace(made.samples, sex=sex))
    if not ploidy.is_x(made.sites.contig).any():
        return made
    data = genotypes_from_panel(made)
    return _like(made, panel_from_genotypes(ploidy.with_males(data, ploidy.rows_of(data, "sample"), sex == "male")))


def _like(panel: HaplotypePanel, changed: HaplotypePanel) -> HaplotypePanel:
    """`changed` with what file formats do not hold: genetic positions, groups and sexes."""
    return replace(
        changed,
        sites=panel.sites,
        samples=replace(changed.samples, group=panel.samples.group, sex=panel.samples.sex),
    )
