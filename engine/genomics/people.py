"""People that were asked for in more words than a number: admixed, of one sex, with a phenotype. Paths are drawn,
alleles follow.

`draw` gives people in the order of their numbers; person k's depend on the model, the request, the seed and k.
Conditioning on a phenotype is by rejection, which is exact: candidates are drawn from the model, each with its noise,
until one is what was asked for. Nothing about a candidate but that decides, so that cases carry risk alleles as often
as the model's cases do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import ndtr

from engine.errors import InputError, UsageError
from engine.files.genotype_files import beside
from engine.genomics import admixture, held_paths, local_ancestry, sex_chromosomes, stream
from engine.genomics.admixture import Pulse
from engine.genomics.li_stephens import LiStephens
from engine.genomics.local_ancestry import Tracts
from engine.genomics.panel import HaplotypePanel, synthetic_ids
from engine.genomics.paths import Paths, joined_paths
from engine.genomics.phenotypes import Phenotypes, Trait, join_phenotypes, noise, phenotypes, write_phenotypes
from engine.kernels import bits

ROUND = 1 << 40  # candidates of one round; rounds do not overlap
MOST_ROUNDS = 64
_TOGETHER = 4096  # candidates drawn at one time
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What people are to be.

    Attributes:
        group: all of this group; None in the panel's proportions.
        pulses: admixture; None for none.
        sex: "male", "female", or None in the panel's proportions.
        trait: gives everybody a phenotype; None for none.
        case_fraction: share of cases (1 cases only, 0 controls only); None as many as the trait's prevalence gives.
        score_range: scores wanted, from and to, in standard deviations of the score in the trait's panel.
    """

    group: str | None = None
    pulses: list[Pulse] | None = None
    sex: str | None = None
    trait: Trait | None = None
    case_fraction: float | None = None
    score_range: tuple[float, float] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing but a group is asked for."""
        return self.pulses is None and self.sex is None and self.trait is None

    def to_json(self) -> dict[str, object]:
        """The request by value, the trait by its hash, so that two can be compared."""
        return {
            "pulses": None if self.pulses is None else [asdict(pulse) for pulse in self.pulses],
            "sex": self.sex,
            "trait_sha256": None if self.trait is None else self.trait.sha256,
            "case_fraction": self.case_fraction,
            "score_range": None if self.score_range is None else list(self.score_range),
        }

    def checked(self) -> Request:
        """Itself.

        Raises:
            UsageError: parts that do not fit together.
        """
        if self.group is not None and self.pulses is not None:
            raise UsageError("one of --group and --admix", "both", "sample")
        if self.trait is None and (self.case_fraction is not None or self.score_range is not None):
            raise UsageError("a trait for --case-fraction and --prs-range", "none", "sample", "--phenotype TRAIT.json")
        if self.case_fraction is not None:
            if self.trait is None or self.trait.prevalence is None:
                raise UsageError("a trait with a prevalence for --case-fraction", "a quantitative one", "sample")
            if not 0 <= self.case_fraction <= 1:
                raise UsageError("a case fraction of 0 to 1", str(self.case_fraction), "--case-fraction")
        if self.score_range is not None and not self.score_range[0] < self.score_range[1]:
            raise UsageError("a range FROM:TO with FROM below TO", "{}:{}".format(*self.score_range), "--prs-range")
        return self


@dataclass(frozen=True)
class Drawn:
    """n people: copying paths of 2n haplotypes, names of their groups str (n,), tracts and phenotypes where asked for.

    `judged`: of the candidates for "cases", "controls" or "people", how many were what was asked for and how many there were.
    """

    paths: Paths
    group_n: np.ndarray
    tracts: Tracts | None
    phenotypes: Phenotypes | None
    judged: dict[str, tuple[int, int]]

    @property
    def n(self) -> int:
        return len(self.group_n)


def draw(
    model: LiStephens, n: int, request: Request, *, seed: int = 0, start: int = 0, progress: Progress | None = None
) -> Drawn:
    """People start .. start+n-1.

    Raises:
        UsageError: parts of the request that do not fit together, an unknown group or source, or people that the model
            hardly ever gives. InputError: the trait's sites are not the model's.
    """
    request.checked()
    if n < 0 or start < 0:
        raise UsageError("n >= 0 and start >= 0", f"{n} and {start}", "sample")
    trait = request.trait
    if trait is None:
        return _candidates(model, n, request, seed, start)
    site_c = trait.rows(model.sites, "the model")
    if request.case_fraction is None and request.score_range is None:
        made = _candidates(model, n, request, seed, start)
        score_n = _scores(model, trait, site_c, made.paths)
        beside_n = noise(trait, range(start, start + n), seed, with_covariates=True)
        known = phenotypes(trait, synthetic_ids(start, n), score_n, beside_n)
        return Drawn(made.paths, made.group_n, made.tracts, known, {})
    people, kept, done = np.arange(start, start + n), [], 0
    for wanted in (None,) if request.case_fraction is None else (True, False):
        chosen, number = _numbered(people, request.case_fraction, wanted)
        each = _candidates_each(trait, request, wanted)
        size = max(1, _TOGETHER // each)
        for first in range(0, len(chosen), size):
            part = slice(first, first + size)
            kept.append(
                (chosen[part], _accepted(model, request, site_c, chosen[part], number[part], wanted, each, seed))
            )
            done += len(chosen[part])
            if progress is not None:
                progress(done, n)
    if not kept:
        return _candidates(model, 0, request, seed, start)
    order = np.argsort(np.concatenate([numbers for numbers, _ in kept]))
    made = joined([each for _, each in kept])
    assert made.phenotypes is not None
    return replace(take(made, order), phenotypes=made.phenotypes.take(order))


def panel_of(model: LiStephens, drawn: Drawn, request: Request, *, seed: int = 0, start: int = 0) -> HaplotypePanel:
    """The people with their alleles, groups and sexes, named SYN000000000 and so on; on X men have one haplotype
    outside PAR."""
    sex = sex_chromosomes.draw_sexes(model, drawn.group_n, seed, start, request.sex)
    return sex_chromosomes.with_sexes(model.people(drawn.paths, drawn.group_n, start), sex)


def source(
    model: LiStephens, drawn: Drawn, request: Request, path: Path, *, seed: int = 0, start: int = 0
) -> stream.Source:
    """What the writer of `path` takes of these people; with X whole in memory, else by their paths."""
    if sex_chromosomes.has_x(model):
        return stream.of_panel(panel_of(model, drawn, request, seed=seed, start=start), path)
    sex = sex_chromosomes.draw_sexes(model, drawn.group_n, seed, start, request.sex)
    held = held_paths.hold(model, drawn.paths, np.zeros(drawn.n, dtype=np.int64))
    return stream.of_paths(held, drawn.group_n, start=start, sex=None if sex is None else sex.tolist())


def write_beside(drawn: Drawn, path: Path, *, start: int = 0) -> None:
    """Write what a genotype file does not hold: local ancestry (`PATH.bp`) and phenotypes (`PATH.pheno.tsv`)."""
    if drawn.tracts is not None:
        local_ancestry.write_bp(beside(path, "bp"), synthetic_ids(start, drawn.n), drawn.tracts)
    if drawn.phenotypes is not None:
        write_phenotypes(drawn.phenotypes, beside(path, "pheno.tsv"))


def join_beside(shards: list[Path], out: Path) -> None:
    """The local ancestry and phenotypes of shards of people, in order, beside `out`."""
    for what, join in (("bp", local_ancestry.join_bp), ("pheno.tsv", join_phenotypes)):
        parts = [beside(shard, what) for shard in shards]
        if any(part.exists() for part in parts):
            absent = [part for part in parts if not part.exists()]
            if absent:
                raise InputError(f"{what} beside every shard", "none", absent[0], "making this shard again")
            join(parts, beside(out, what))


def take(drawn: Drawn, index: np.ndarray) -> Drawn:
    """The people `index`, int64, in this order, without phenotypes."""
    haplotypes = np.stack([2 * index, 2 * index + 1], axis=1).ravel()
    tracts = None if drawn.tracts is None else drawn.tracts.take(haplotypes)
    return Drawn(drawn.paths.take(haplotypes), drawn.group_n[index], tracts, None, drawn.judged)


def joined(parts: list[Drawn]) -> Drawn:
    """The people of several draws, in order."""
    tracts = [part.tracts for part in parts if part.tracts is not None]
    known = [part.phenotypes for part in parts if part.phenotypes is not None]
    together = None
    if known:
        case_s = None if known[0].case_s is None else np.concatenate([each.case_s for each in known])  # type: ignore[misc]
        together = Phenotypes(
            [name for each in known for name in each.ids],
            np.concatenate([each.score_s for each in known]),
            np.concatenate([each.liability_s for each in known]),
            case_s,
            {},
        )
    judged: dict[str, tuple[int, int]] = {}
    for part in parts:
        for name, (accepted, candidates) in part.judged.items():
            before = judged.get(name, (0, 0))
            judged[name] = (before[0] + accepted, before[1] + candidates)
    return Drawn(
        joined_paths([part.paths for part in parts]),
        np.concatenate([part.group_n for part in parts]),
        local_ancestry.joined(tracts) if tracts else None,
        together,
        judged,
    )


def _candidates(model: LiStephens, n: int, request: Request, seed: int, start: int) -> Drawn:
    if request.pulses is not None:
        paths, tracts = admixture.paths(model, request.pulses, n, seed=seed, start=start)
        return Drawn(paths, np.full(n, admixture.label(request.pulses)), tracts, None, {})
    paths, group_n = model.paths(n, groups=request.group, seed=seed, start=start)
    return Drawn(paths, np.array(model.group_names, dtype=str)[group_n], None, None, {})


def _numbered(people: np.ndarray, fraction: float | None, wanted: bool | None) -> tuple[np.ndarray, np.ndarray]:
    """Who of consecutive `people` is to be a case (control, anybody), and their numbers among all such people from 0 on."""
    if fraction is None or wanted is None:
        return people, people
    cases_before = np.floor(people * fraction + 1e-9).astype(np.int64)
    chosen = _is_case(people, fraction) == wanted
    return people[chosen], (cases_before if wanted else people - cases_before)[chosen]


def _candidates_each(trait: Trait, request: Request, wanted: bool | None) -> int:
    """Candidates of a person in the first round: a power of two near twice what one acceptance takes under a normal
    score.

    It depends on the request alone, so that a person's candidates do too.
    """
    chance = 1.0
    if request.score_range is not None:
        chance *= float(ndtr(request.score_range[1]) - ndtr(request.score_range[0]))
    if wanted is not None:
        assert trait.prevalence is not None
        chance *= trait.prevalence if wanted else 1 - trait.prevalence
    return int(2 ** np.clip(np.ceil(np.log2(2 / max(chance, 1e-12))), 1, 12))


def _accepted(
    model: LiStephens,
    request: Request,
    site_c: np.ndarray,
    people: np.ndarray,
    number: np.ndarray,
    wanted: bool | None,
    each: int,
    seed: int,
) -> Drawn:
    """For each of `people` the first of its candidates that is what was asked for.

    Candidates are people of the model too, with numbers of their own: those of person `number` in one round follow one
    another, and neighbours who wait together are drawn together; who is drawn with whom changes nothing.
    """
    trait = request.trait
    assert trait is not None
    offset = ROUND // 2 if wanted is False else 0
    found: dict[int, tuple[Drawn, int]] = {}
    waiting, candidates, accepted = np.arange(len(people)), 0, 0
    for turn in range(MOST_ROUNDS):
        for run in np.split(waiting, np.flatnonzero(np.diff(number[waiting]) != 1) + 1):
            first = turn * ROUND + offset + int(number[run[0]]) * each
            made = _candidates(model, len(run) * each, request, seed, first)
            score = _scores(model, trait, site_c, made.paths)
            beside = noise(trait, range(first, first + made.n), seed, with_covariates=True)
            right = np.ones(made.n, dtype=bool)
            if request.score_range is not None:
                sd = np.sqrt(trait.heritability)
                right &= (score >= request.score_range[0] * sd) & (score <= request.score_range[1] * sd)
            if wanted is not None:
                right &= (score + beside > trait.threshold) == wanted
            hits = np.flatnonzero(right)
            candidates, accepted = candidates + made.n, accepted + len(hits)
            owner, where = np.unique(hits // each, return_index=True)
            chosen = take(made, hits[where])
            ids = [synthetic_ids(int(people[run[at]]), 1)[0] for at in owner]
            known = phenotypes(trait, ids, score[hits[where]], beside[hits[where]])
            for at, place in enumerate(owner.tolist()):
                found[int(run[place])] = (replace(chosen, phenotypes=known), at)
        waiting = np.array([k for k in range(len(people)) if k not in found], dtype=np.int64)
        if len(waiting) == 0:
            break
    if len(waiting):
        raise UsageError(
            "people that the model gives now and then",
            f"none of {MOST_ROUNDS * each} candidates was one for person {people[waiting[0]]}", "sample",
            "a wider --prs-range, a higher prevalence, or another group",
        )  # fmt: skip
    parts = []
    for k in range(len(people)):
        drawn, at = found[k]
        assert drawn.phenotypes is not None
        parts.append(replace(take(drawn, np.array([at])), phenotypes=drawn.phenotypes.take(np.array([at])), judged={}))
    name = "people" if wanted is None else "cases" if wanted else "controls"
    return replace(joined(parts), judged={name: (accepted, candidates)})


def _is_case(person: np.ndarray, fraction: float) -> np.ndarray:
    """bool: whether person k is to be a case, so that of the first n people round(fraction n) or so are, whatever n."""
    return np.floor((person + 1) * fraction + 1e-9) > np.floor(person * fraction + 1e-9)


def _scores(model: LiStephens, trait: Trait, site_c: np.ndarray, paths: Paths) -> np.ndarray:
    """float64 (n,): polygenic scores of people by their paths; only causal sites are materialised."""
    haplotypes = len(paths.segment_offset_n) - 1
    dosage_sc = np.empty((haplotypes // 2, len(site_c)))
    for c, site in enumerate(site_c.tolist()):
        allele_n = bits.unpack(model.materialise(paths, site, site + 1), haplotypes)[0]
        dosage_sc[:, c] = allele_n[0::2].astype(np.int64) + allele_n[1::2]
    return trait.score(dosage_sc)


def summary(model: LiStephens, drawn: Drawn, request: Request) -> dict[str, object]:
    """What the command reports of a draw beside the counts of people, JSON-ready."""
    told: dict[str, object] = {}
    if drawn.tracts is not None:
        share_na = drawn.tracts.shares(admixture.contig_starts_cm(model))
        told["ancestry"] = dict(zip(drawn.tracts.sources, np.round(share_na.mean(axis=0), 4).tolist()))
    if drawn.phenotypes is not None:
        for name, (accepted, candidates) in drawn.judged.items():
            told[f"acceptance_{name}"] = accepted / max(1, candidates)
        if drawn.phenotypes.case_s is not None:
            told["cases"] = int(drawn.phenotypes.case_s.sum())
        told["mean_prs_sd"] = float(drawn.phenotypes.score_s.mean() / np.sqrt(request.trait.heritability))  # type: ignore[union-attr]
    return told
