"""The genotype among the nodes of a cohort: named loci and a score counted off haplotypes that a copying model makes.

Haplotypes come first and what they do follows (locus and score -> diagnosis), so that a person asked for by a diagnosis
has the haplotypes that such people have: cases are drawn, not edited. Candidate number i's haplotypes depend on (model,
seed, i, its group).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.cohort.association import GeneticScore, estimate_score
from engine.cohort.genotypes import dosage
from engine.cohort.profile import SCORE, Locus, Profile
from engine.errors import InputError, UsageError
from engine.genomics import admixture, li_stephens, sex_chromosomes, stream
from engine.genomics.li_stephens import LiStephens, LiStephensConfig
from engine.genomics.panel import HaplotypePanel
from engine.genomics.paths import Paths, joined_paths
from engine.kernels import bits

_NEAR_LOCUS_R2 = 0.05  # variants in more LD with a named locus are left to it


@dataclass(frozen=True)
class _Held:
    """Paths in memory, as `stream.of_paths` takes them."""

    model: LiStephens
    paths: Paths

    def rows(self, first: int, stop: int) -> np.ndarray:
        return self.model.materialise(self.paths, first, stop)


@dataclass(frozen=True)
class Genetics:
    """Haplotypes and what of them acts.

    Attributes:
        model: makes haplotypes.
        site: row of each named locus. flipped: whether REF is the allele whose count acts.
        score: over rows of the model; None where the profile has none.
        admixed: groups that are mosaics of the model's.
    """

    model: LiStephens
    site: dict[str, int]
    flipped: dict[str, bool]
    score: GeneticScore | None
    admixed: dict[str, list[admixture.Pulse]]

    def paths(self, index_n: np.ndarray, labels: list[str] | None, seed: int) -> tuple[Paths, np.ndarray]:
        """Copying paths of candidates with these numbers, and their groups, str (n,)."""
        parts: list[Paths] = []
        groups: list[str] = []
        for run in np.split(np.arange(len(index_n)), np.flatnonzero(np.diff(index_n) != 1) + 1):
            at = 0
            while at < len(run):
                stop = at + 1
                mixed = labels is not None and labels[run[at]] in self.admixed
                while stop < len(run) and labels is not None and not mixed and labels[run[stop]] not in self.admixed:
                    stop += 1
                stop = len(run) if labels is None else stop
                some, start = run[at:stop], int(index_n[run[at]])
                if mixed and labels is not None:
                    name = labels[run[at]]
                    parts.append(admixture.paths(self.model, self.admixed[name], 1, seed=seed, start=start)[0])
                    groups.append(name)
                else:
                    wanted = None if labels is None else [labels[k] for k in some]
                    made, group_n = self.model.paths(len(some), groups=wanted, seed=seed, start=start)
                    parts.append(made)
                    groups += [self.model.group_names[g] for g in group_n]
                at = stop
        return joined_paths(parts), np.array(groups, dtype=str)

    def values(self, paths: Paths) -> dict[str, np.ndarray]:
        """Counts at the named loci and the score, float64 (n,) each; only their sites are materialised."""
        n = (len(paths.segment_offset_n) - 1) // 2

        def count(site: int) -> np.ndarray:
            allele_n = bits.unpack(self.model.materialise(paths, site, site + 1), 2 * n)[0].astype(np.float64)
            return allele_n[0::2] + allele_n[1::2]

        made = {name: 2 - count(site) if self.flipped[name] else count(site) for name, site in self.site.items()}
        if self.score is not None:
            total = np.full(n, -self.score.centre)
            for site, weight in zip(self.score.site.tolist(), self.score.weight.tolist()):
                total += weight * count(site)
            made[SCORE] = total
        return made

    def draw(self, seed: int) -> Any:
        """The callback of `TableModel.draw`."""
        return lambda index_n, labels: self.values(self.paths(index_n, labels, seed)[0])

    def source(
        self, index_n: np.ndarray, labels: list[str] | None, ids: list[str], sex: list[str], seed: int, path: Path
    ) -> stream.Source:
        """What the writer of `path` takes of these people; by their paths, with X whole in memory."""
        paths, groups = self.paths(index_n, labels, seed)
        if sex_chromosomes.has_x(self.model):
            return stream.of_panel(self.panel(paths, groups, ids, sex), path)
        held: Any = _Held(self.model, paths)
        made = stream.of_paths(held, groups, start=0, sex=sex)
        return replace(made, head=replace(made.head, sample_ids=ids))

    def panel(self, paths: Paths, groups: np.ndarray, ids: list[str], sex: list[str]) -> HaplotypePanel:
        """People with these paths, whole in memory."""
        made = self.model.people(paths, groups)
        made = replace(made, samples=replace(made.samples, ids=ids))
        return sex_chromosomes.with_sexes(made, np.array(sex, dtype=str))

    def to_json(self) -> dict[str, Any]:
        """What is beside the copying model."""
        return {
            "site": self.site,
            "flipped": self.flipped,
            "score": None if self.score is None else self.score.to_json(),
        }


def find_locus(panel: HaplotypePanel | LiStephens, name: str, locus: Locus) -> tuple[int, bool]:
    """Row of a named locus, by its id, else by the position in the panel's assembly, and whether REF is its effect allele.

    Raises:
        InputError: no such variant, or one with other alleles.
    """
    sites = panel.sites
    rows = np.flatnonzero(sites.id == locus.rsid)
    if not len(rows):
        for assembly, text in locus.positions.items():
            if panel.assembly and assembly.lower() not in panel.assembly.lower():
                continue
            contig, _, position = text.partition(":")
            same = np.char.lstrip(sites.contig.astype(str), "chr") == contig.removeprefix("chr")
            rows = np.flatnonzero(same & (sites.position_bp == int(position)))
            if len(rows):
                break
    if locus.effect_allele:
        rows = np.array([r for r in rows if locus.effect_allele in (sites.ref[r], sites.alt[r])], dtype=np.int64)
    if len(rows) != 1:
        raise InputError(
            f"the locus {name} ({locus.rsid})", "several variants" if len(rows) else "no such variant", "panel",
            "a panel that has it, or a profile without this locus",
        )  # fmt: skip
    return int(rows[0]), bool(locus.effect_allele) and str(sites.ref[rows[0]]) == locus.effect_allele


def fit_genetics(
    profile: Profile,
    panel: HaplotypePanel,
    outcome_s: np.ndarray | None,
    covariates_sf: np.ndarray | None,
    config: LiStephensConfig | None = None,
) -> Genetics:
    """The copying model over the panel, the named loci in it, and the score of an association scan beside them.

    Args:
        panel: training people only, with groups where the profile has them.
        outcome_s: 0, 1, or NaN (takes no part) per person, of the score's outcome. covariates_sf: beside an intercept.
    """
    model = li_stephens.fit(panel, config)
    found = {name: find_locus(panel, name, locus) for name, locus in profile.genotypes.loci.items()}
    site, flipped = {k: v[0] for k, v in found.items()}, {k: v[1] for k, v in found.items()}
    pulses = {}
    for name, text in profile.genotypes.admixed.items():
        shares, _, generations = text.partition("@")
        try:
            pulses[name] = admixture.parse(shares, float(generations))
        except ValueError:
            raise UsageError("GROUP=share,GROUP=share@generations", repr(text), f"genotypes.admixed.{name}") from None
    score = None
    if profile.genotypes.outcome and outcome_s is not None and covariates_sf is not None:
        use = np.isfinite(outcome_s)
        if len(set(outcome_s[use])) < 2:
            raise InputError("cases and controls with genotypes", "one of them", "score", "genotypes.outcome_levels")
        counted = dosage(panel)[use].astype(np.float32)
        named = counted[:, list(site.values())]
        x = np.column_stack([np.ones(use.sum()), covariates_sf[use], named])
        free = ~_near(counted, list(site.values()))
        place = np.flatnonzero(free)
        ids = panel.sites.id[place].tolist()
        made = estimate_score(counted[:, free], outcome_s[use], x, ids, most=profile.genotypes.score_loci)
        # the best of many where none is significant is noise, and would act on everybody who is made
        score = GeneticScore([], np.zeros(0, dtype=np.int64), np.zeros(0), 0.0, 0)
        if made.significant:
            score = GeneticScore(made.ids, place[made.site], made.weight, made.centre, made.significant)
    return Genetics(model, site, flipped, score, pulses)


def _near(dosage_nl: np.ndarray, sites: list[int]) -> np.ndarray:
    """bool (l,): variants in LD with one of `sites`."""
    centred = dosage_nl - dosage_nl.mean(axis=0)
    norm = np.maximum(np.sqrt((centred**2).sum(axis=0)), 1e-9)
    near = np.zeros(dosage_nl.shape[1], dtype=bool)
    for site in sites:
        near |= (centred[:, site] @ centred / (norm * norm[site])) ** 2 > _NEAR_LOCUS_R2
    return near


def genetics_from_json(value: dict[str, Any], model: LiStephens, profile: Profile) -> Genetics:
    """The inverse of `Genetics.to_json`."""
    score = None if value["score"] is None else GeneticScore.from_json(value["score"])
    pulses = {
        name: admixture.parse(text.partition("@")[0], float(text.partition("@")[2]))
        for name, text in profile.genotypes.admixed.items()
    }
    return Genetics(model, value["site"], value["flipped"], score, pulses)
