"""Sampling with the genealogy that the panel shows: whole rounds of haplotypes, in which every donor is copied once everywhere.

A round is as many synthetic haplotypes as a group has in the panel. At each site every donor of the group is held by one of
them, so that a round has the panel's allele counts, and over a whole release of n people no donor is copied more than
ceil(n / people of the panel) times at any place. Recombination is a swap: two haplotypes exchange their donors
(`interchange`). Three things are learned from the panel, each haplotype seen as a mosaic of the others with its own person
left out:

- how often pieces end, per group and centimorgan (posterior paths of the copying model);
- how often an allele with c carriers is younger than the piece that carries it: the share of its carriers whose donor lacks
  it. So many carriers of a site lose it in a round, and as many others get it: alleles younger than their segment are not
  copied, and rare ones arise anew with the panel's frequency spectrum;
- the rate of swaps, as a multiple of the first: the longest stretch that a synthetic haplotype shares with the panel is, in
  the median, RUN_SHARE of what a real one shares with the rest of it.

A swap partner is the one of `candidates` random haplotypes of the group that differs least from the donor at hand within a
few pieces on both sides. That is a nearest relative in a random sample, which is what a lineage that recombines a few
hundred generations ago meets; and it is why pieces of unrelated ancestry are not joined.

Alleles with fewer carriers than `min_carriers` are never copied (`Rare`). Their counts are dealt anew to the sites of their
class, by the seed, so that the number of carriers of a site says nothing of who was in the panel.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from engine import seeding
from engine.errors import UsageError
from engine.genomics import interchange
from engine.genomics.matching import of_person
from engine.genomics.paths import Paths, joined_paths
from engine.kernels import bits, haplotype_hmm, nearest

if TYPE_CHECKING:
    from engine.genomics.li_stephens import LiStephens

LEARN_SITES, LEARN_HAPLOTYPES = 20_000, 400  # of which the panel's past is learned, at most
SKETCH_PER_CM, SKETCH_MAF = 512, 0.05  # sites by which haplotypes are told apart
RUN_SHARE = 0.95
FACTORS = (1 / 16, 16.0)  # of the swap rate over the rate at which pieces end
_STEPS = 8  # halvings of their range, on a log scale
_ROUNDS_HELD = 2
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Genealogy:
    """What the panel shows of its recent past.

    Attributes:
        piece_cm: mean length of the piece that a real haplotype shares with its donor, by group.
        swap_factor: swaps per slot over 1 / piece_cm.
        young_count, young_share: minor-allele counts and the share of carriers whose donor lacks the allele; in between
            it is read off straight lines over the log of the count.
        run_bp: longest stretch shared with one haplotype of the panel, median: of real haplotypes, person left out, and of
            synthetic ones at `swap_factor`.
        haplotypes, sites: how many it was learned from.
    """

    piece_cm: list[float]
    swap_factor: float
    young_count: list[float]
    young_share: list[float]
    run_bp: list[float]
    haplotypes: int
    sites: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def young(self, count_l: np.ndarray) -> np.ndarray:
        """float64, the share of an allele's carriers that lose it, by its count in the panel."""
        at = np.log(np.maximum(count_l, 1))
        return np.interp(at, np.log(self.young_count), self.young_share)


@dataclass(frozen=True)
class Tables:
    """What every round of a model needs, by site or group; contigs lie `interchange.CONTIG_GAP_CM` apart.

    Attributes:
        position_cm: float64 (L,). contig_start: first site of each contig.
        minor_l: uint8 (L,), the rarer allele; count_l: int64 (L,), its carriers; count_gl: int64 (G, L), by group; 0 where
            alleles do not move (rare ones, rows of split multiallelics).
        new_count_rg: int64 (R, G), carriers at `Rare.new_site_r`.
        donor_g: haplotypes of each group. sketch_kw: uint64 (K, words). sketch_cm: float64, where its sites lie.
    """

    position_cm: np.ndarray
    contig_start: np.ndarray
    minor_l: np.ndarray
    count_l: np.ndarray
    count_gl: np.ndarray
    new_count_rg: np.ndarray
    donor_g: list[np.ndarray]
    sketch_kw: np.ndarray
    sketch_cm: np.ndarray


def tables(model: LiStephens) -> Tables:
    """The tables of a model: one pass over its panel."""
    contig_start = np.flatnonzero(np.isinf(model.distance_l))
    step_cm = np.where(np.isinf(model.distance_l), interchange.CONTIG_GAP_CM, 100 * model.distance_l)
    step_cm[0] = 0.0
    position_cm = np.cumsum(step_cm)
    groups = len(model.group_names)
    donor_g = [np.flatnonzero(model.group_of_haplotype_k == g) for g in range(groups)]
    mask_gw = np.zeros((groups, model.bits_lw.shape[1]), dtype=np.uint64)
    for g, donors in enumerate(donor_g):
        member_k = np.zeros((1, model.k), dtype=np.uint8)
        member_k[0, donors] = 1
        mask_gw[g] = bits.pack(member_k)[0]
    alt_gl = np.empty((groups, model.n_sites), dtype=np.int64)
    for at in range(0, model.n_sites, 4096):
        block_lw = model.bits_lw[at : at + 4096]
        for g in range(groups):
            alt_gl[g, at : at + 4096] = np.bitwise_count(block_lw & mask_gw[g]).sum(axis=1, dtype=np.int64)
    alt_l = alt_gl.sum(axis=0)
    minor_l = (2 * alt_l <= model.k).astype(np.uint8)
    size_g = np.array([len(donors) for donors in donor_g])
    count_gl = np.where(minor_l == 1, alt_gl, size_g[:, None] - alt_gl)
    count_l = count_gl.sum(axis=0)
    rare = model.rare
    new_count_rg = count_gl[:, rare.new_site_r].T.copy()
    fixed_l = (rare.common_l >= 0) | (model.sites.alt_index != 0)
    count_gl[:, fixed_l] = 0
    told = np.flatnonzero(count_l >= min(SKETCH_MAF * model.k, count_l.max(initial=0)))
    most = int(SKETCH_PER_CM * max(1.0, 100 * model.distance_l[np.isfinite(model.distance_l)].sum()))
    if len(told) > most:
        told = told[np.linspace(0, len(told) - 1, most).astype(np.int64)]
    sketch_kw = bits.transpose(np.ascontiguousarray(model.bits_lw[told]), model.k)
    return Tables(
        position_cm, contig_start, minor_l, count_l, count_gl, new_count_rg, donor_g, sketch_kw, position_cm[told]
    )


# ---- learning --------------------------------------------------------------------------------------------------------


def learn(model: LiStephens, *, progress: Progress | None = None) -> Genealogy:
    """What the panel shows of its past, from at most LEARN_HAPLOTYPES of its haplotypes over at most LEARN_SITES sites.

    A panel of fewer than three people shows nothing: pieces are as long as the map and Ne say, and alleles change as often
    as `mismatch` says.
    """
    first_s = model.samples.first_haplotype
    morgans = float(model.distance_l[np.isfinite(model.distance_l)].sum())
    if len(first_s) < 4 or morgans <= 0:
        size_g = np.bincount(model.group_of_haplotype_k, minlength=len(model.group_names))
        piece_cm = [100 * int(size) / (4 * model.config.ne) for size in size_g]
        return Genealogy(piece_cm, 1.0, [1.0], [model.config.mismatch], [0.0, 0.0], 0, 0)
    some = _stretch(model)
    chosen = np.unique(np.linspace(0, model.k - 1, min(model.k, LEARN_HAPLOTYPES)).astype(np.int64))
    switches_g, length_g, seen_c, lost_c = _mosaics(some, chosen, progress)
    # groups with few haplotypes lean on all: ten pieces of the mean length
    mean_cm = (length_g.sum() + 1e-9) / max(1.0, float(switches_g.sum()))
    piece_cm = (length_g + 10 * mean_cm) / (switches_g + 10)
    count, share = _young_shares(seen_c, lost_c, model.config.mismatch)
    made = Genealogy(piece_cm.tolist(), 1.0, count, share, [0.0, 0.0], len(chosen), some.n_sites)
    return _calibrated(some, made, chosen, progress)


def _stretch(model: LiStephens) -> LiStephens:
    """The model over LEARN_SITES neighbouring sites from the middle of its sites, or over all where there are no more."""
    if model.n_sites <= LEARN_SITES:
        return replace(model, genealogy_learned=None)
    first = (model.n_sites - LEARN_SITES) // 2
    part = slice(first, first + LEARN_SITES)
    cut: dict[str, Any] = {
        each.name: np.ascontiguousarray(getattr(model, each.name)[part])
        for each in fields(model)
        if each.name.endswith(("_l", "_lw")) and getattr(model, each.name) is not None
    }
    cut["distance_l"][0] = np.inf
    sites = replace(
        model.sites,
        **{
            each.name: getattr(model.sites, each.name)[part]
            for each in fields(model.sites)
            if getattr(model.sites, each.name) is not None
        },
    )
    return replace(model, sites=sites, genealogy_learned=None, **cut)


def _mosaics(
    model: LiStephens, chosen: np.ndarray, progress: Progress | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Posterior paths of the haplotypes `chosen` through all others but their person's.

    Returns:
        by group, switches of donor and centimorgans walked; by minor-allele count, float64 (K + 1,), carriers seen and
        carriers whose donor lacks the allele.
    """
    first_s = model.samples.first_haplotype
    own_ke = of_person(first_s)
    groups = len(model.group_names)
    alt_l = bits.popcount_rows(model.bits_lw)
    minor_l, count_l = 2 * alt_l <= model.k, np.minimum(alt_l, model.k - alt_l)
    lenient_l = np.maximum(model.mismatch_l, 1e-5)  # real haplotypes differ where a model may not
    within_l = np.isfinite(model.distance_l)
    switches_g, length_g = np.zeros(groups), np.zeros(groups)
    seen_c, lost_c = np.zeros(model.k + 1), np.zeros(model.k + 1)
    alleles_kl = np.ascontiguousarray(bits.unpack(model.bits_lw, model.k).T)
    for at in range(0, len(chosen), 100):
        part = chosen[at : at + 100]
        uniform_nl = np.stack(
            [seeding.generator(0, "genomics.genealogy.learn", k).random(model.n_sites) for k in part.tolist()]
        )
        path_nl = haplotype_hmm.posterior_paths(
            model.bits_lw, model.k, alleles_kl[part], model.switch_l(), lenient_l, uniform_nl, exclude_ne=own_ke[part]
        )
        switched_n = ((np.diff(path_nl, axis=1) != 0) & within_l[1:]).sum(axis=1)
        np.add.at(switches_g, model.group_of_haplotype_k[part], switched_n)
        for row, k in enumerate(part.tolist()):
            carries_l = alleles_kl[k] == minor_l
            lacks_l = alleles_kl[path_nl[row], np.arange(model.n_sites)] != minor_l
            seen_c += np.bincount(count_l[carries_l], minlength=model.k + 1)
            lost_c += np.bincount(count_l[carries_l & lacks_l], minlength=model.k + 1)
            length_g[model.group_of_haplotype_k[k]] += 100 * model.distance_l[within_l].sum()
        if progress is not None:
            progress(at + len(part), 2 * len(chosen))
    return switches_g, length_g, seen_c, lost_c


def _young_shares(seen_c: np.ndarray, lost_c: np.ndarray, mismatch: float) -> tuple[list[float], list[float]]:
    """Bins of counts 1, 2, 3, 4-5, 6-8, ... and the share of carriers whose donor lacks the allele, never rising.

    One carrier in each bin is added that loses the allele as often as `mismatch` says.
    """
    from sklearn.isotonic import IsotonicRegression

    edges = [1]
    while edges[-1] < len(seen_c):
        edges.append(max(edges[-1] + 1, int(edges[-1] * 1.5)))
    seen, lost, centre = [], [], []
    for low, high in pairwise(edges):
        if seen_c[low:high].sum() > 0:
            seen.append(float(seen_c[low:high].sum()) + 1)
            lost.append(float(lost_c[low:high].sum()) + mismatch)
            centre.append(float(np.average(np.arange(low, low + len(seen_c[low:high])), weights=seen_c[low:high])))
    if not seen:
        return [1.0], [mismatch]
    share = np.array(lost) / np.array(seen)
    fitted = IsotonicRegression(increasing=False).fit_transform(np.array(centre), share, sample_weight=np.array(seen))
    return centre, np.asarray(fitted, dtype=np.float64).tolist()


def _calibrated(model: LiStephens, made: Genealogy, chosen: np.ndarray, progress: Progress | None) -> Genealogy:
    """`made` with the factor at which synthetic haplotypes share runs with the panel as long as real ones do."""
    known, panel_kw = tables(model), bits.transpose(model.bits_lw, model.k)
    first_s = model.samples.first_haplotype
    person_k = np.repeat(np.arange(len(first_s) - 1), np.diff(first_s))
    real = float(np.median(_longest_runs(model, panel_kw[chosen], panel_kw, (person_k[chosen], person_k))))
    low, high, found = np.log(FACTORS[0]), np.log(FACTORS[1]), 0.0
    config = model.config.model_copy(update={"max_donor_cm": None, "switching": 1.0})
    for step in range(_STEPS):
        factor = float(np.exp((low + high) / 2))
        trial = replace(model, config=config, genealogy_learned=replace(made, swap_factor=factor))
        parts = [round_paths(trial, known, g, 0, 0, "learn") for g in range(len(model.group_names))]
        order = np.argsort(np.concatenate(known.donor_g), kind="stable")
        rows_nw = bits.transpose(trial.materialise(joined_paths(parts).take(order[chosen])), len(chosen))
        shared = float(np.median(_longest_runs(model, rows_nw, panel_kw, None)))
        if shared > RUN_SHARE * real:
            low = np.log(factor)
        else:
            high, found = np.log(factor), shared
        if progress is not None:
            progress(_STEPS * len(chosen) + (step + 1) * len(chosen), 2 * _STEPS * len(chosen))
    return replace(made, swap_factor=float(np.exp(high)), run_bp=[real, found])


def _longest_runs(
    model: LiStephens, query_nw: np.ndarray, panel_kw: np.ndarray, exclude: tuple[np.ndarray, np.ndarray] | None
) -> np.ndarray:
    """float64 (N,): the longest stretch of each query, bp, that one haplotype of the panel shares; within contigs."""
    start = np.append(np.flatnonzero(np.isinf(model.distance_l)), model.n_sites)
    position_bp, best_n = model.sites.position_bp, np.zeros(len(query_nw))
    for first, stop in zip(start[:-1].tolist(), start[1:].tolist()):
        cut = [query_nw, panel_kw]
        if len(start) > 2:
            cut = [bits.pack(bits.unpack(words, model.n_sites)[:, first:stop]) for words in cut]
        run_bp = nearest.longest_run(cut[0], cut[1], stop - first, position_bp[first:stop], exclude=exclude)[0]
        best_n = np.maximum(best_n, run_bp)
    return best_n


# ---- sampling --------------------------------------------------------------------------------------------------------


def round_paths(model: LiStephens, known: Tables, group: int, number: int, seed: int, purpose: str) -> Paths:
    """Paths of all slots of one round of a group; a function of the model, its config and the arguments.

    Raises:
        UsageError: `max_donor_cm` asks for more donors than the group has.
    """
    genealogy, config, donors = model.genealogy, model.config, known.donor_g[group]
    rng = seeding.generator(seed, f"genomics.genealogy.{purpose}.{model.group_names[group]}", number)
    k, rare = len(donors), model.rare
    # two slots change with each swap
    rate = config.switching * genealogy.swap_factor / genealogy.piece_cm[group] * k / 2
    hazard_l = model.hazard_l(1.0, 1)  # where pieces end; how often, in all, the map says
    length_cm = 100 * model.distance_l[np.isfinite(model.distance_l)].sum()
    hazard_l = np.cumsum(hazard_l) * (rate * length_cm / max(hazard_l.sum(), 1e-300))
    point_e = rng.random(rng.poisson(hazard_l[-1])) * hazard_l[-1]
    swap_e = np.sort(np.minimum(np.searchsorted(hazard_l, point_e, side="right"), model.n_sites - 1))
    count_l = known.count_gl[group]
    young_l = rng.binomial(count_l, genealogy.young(known.count_l))
    young_l = np.minimum(young_l, k - count_l)
    young_e = np.flatnonzero(young_l)
    dealt = seeding.generator(seed, "genomics.genealogy.new_sites").permutation(len(rare.new_site_r))
    new_r = known.new_count_rg[dealt, group]
    new_e = np.flatnonzero(new_r)
    site_e = np.concatenate([known.contig_start, swap_e, young_e, rare.new_site_r[new_e]])
    sizes = [len(known.contig_start), len(swap_e), len(young_e), len(new_e)]
    kind_e = np.repeat([interchange.DEAL, interchange.SWAP, interchange.YOUNG, interchange.NEW], sizes)
    count_e = np.concatenate([np.zeros(sizes[0] + sizes[1], np.int64), young_l[young_e], new_r[new_e]])
    order = np.lexsort((kind_e, site_e))
    reach_cm = config.reach * genealogy.piece_cm[group]
    budget_cm = config.max_donor_cm
    if budget_cm is None and config.max_donor_pieces > 0:
        # as far as the group has the donors for it, and from each site to the next (and what adding that up may lose)
        widest_cm = 100 * model.distance_l[np.isfinite(model.distance_l)].max(initial=0.0)
        budget_cm = max(config.max_donor_pieces * genealogy.piece_cm[group], 8 * length_cm / k, 1.001 * widest_cm)
    low_l = np.searchsorted(known.sketch_cm, known.position_cm - reach_cm, side="left") >> 6
    high_l = (np.searchsorted(known.sketch_cm, known.position_cm + reach_cm, side="right") + 63) >> 6
    slot_s, start_s, donor_s, flip_slot_f, flip_site_f, failed = interchange.walk(
        site_e[order].astype(np.int64), kind_e[order].astype(np.int64), count_e[order].astype(np.int64),
        np.ascontiguousarray(known.sketch_kw[donors]), low_l.astype(np.int32), high_l.astype(np.int32), model.bits_lw,
        donors, known.minor_l, known.position_cm, config.candidates,
        np.inf if budget_cm is None else float(budget_cm),
        rng.integers(0, 2**63, 1).astype(np.uint64),
    )  # fmt: skip
    if failed and config.max_donor_cm is not None:
        name = model.group_names[group]
        raise UsageError(
            f"enough donors in group '{name}' for {config.max_donor_cm:g} cM of each in a person",
            f"{k} haplotypes", "max_donor_cm", "a larger value, or none",
        )  # fmt: skip
    order = np.argsort(slot_s, kind="stable")
    slot_s, start_s, donor_s = slot_s[order], start_s[order], donor_s[order]
    # of several swaps of a slot at one site the last counts; a swap back to the donor before is none
    last = np.append((slot_s[1:] != slot_s[:-1]) | (start_s[1:] != start_s[:-1]), True)
    slot_s, start_s, donor_s = slot_s[last], start_s[last], donor_s[last]
    new_contig = np.isin(start_s, known.contig_start)
    changed = np.append(True, (slot_s[1:] != slot_s[:-1]) | (donor_s[1:] != donor_s[:-1])) | new_contig
    slot_s, start_s, donor_s = slot_s[changed], start_s[changed], donor_s[changed]
    order = np.argsort(flip_slot_f, kind="stable")
    flip_slot_f, flip_site_f = flip_slot_f[order], flip_site_f[order]
    offsets = lambda slots: np.concatenate([[0], np.cumsum(np.bincount(slots, minlength=k))]).astype(np.int64)  # noqa: E731
    return Paths(offsets(slot_s), start_s, donors[donor_s].astype(np.int32), offsets(flip_slot_f), flip_site_f)


def people_of_rounds(model: LiStephens, people: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 (n,) twice: group of each person, and which pair of its group's slots the person is in its round.

    A round of people has the panel's groups, a pair of haplotypes each, in an order drawn by the seed.
    """
    pairs_g = _pairs(model)
    group_p = np.repeat(np.arange(len(pairs_g)), pairs_g)
    pair_p = np.concatenate([np.arange(count) for count in pairs_g.tolist()])
    total = len(group_p)
    group_n, pair_n = np.empty((2, len(people)), dtype=np.int64)
    for number in np.unique(people // total).tolist():
        order = seeding.generator(seed, "genomics.genealogy.people", number).permutation(total)
        at = np.flatnonzero(people // total == number)
        group_n[at], pair_n[at] = group_p[order[people[at] % total]], pair_p[order[people[at] % total]]
    return group_n, pair_n


def _pairs(model: LiStephens) -> np.ndarray:
    """int64 (G,): people in a round of each group."""
    size_g = np.bincount(model.group_of_haplotype_k, minlength=len(model.group_names))
    return np.maximum(size_g // 2, 1)


def round_people(model: LiStephens, group: str | None) -> int:
    """People of one round, or of one of a group that was asked for."""
    pairs_g = _pairs(model)
    return int(pairs_g.sum() if group is None else pairs_g[model.group_index(group)])


def paths(
    model: LiStephens,
    n: int,
    groups: str | Sequence[str] | None,
    seed: int,
    start: int,
    progress: Progress | None = None,
) -> tuple[Paths, np.ndarray]:
    """`LiStephens.paths` by rounds. Asked for a group that is not the one drawn, a person is of a round of that group alone."""
    people = np.arange(start, start + n, dtype=np.int64)
    total, pairs_g = int(_pairs(model).sum()), _pairs(model)
    if isinstance(groups, str):
        group_n = np.full(n, model.group_index(groups), dtype=np.int64)
        drawn_n = np.zeros(n, dtype=bool)
        pair_n = np.zeros(n, dtype=np.int64)
    else:
        group_n, pair_n = people_of_rounds(model, people, seed)
        drawn_n = np.ones(n, dtype=bool)
        if groups is not None:
            asked_n = np.array([model.group_index(name) for name in groups], dtype=np.int64)
            drawn_n, group_n = asked_n == group_n, asked_n
    number_n = people // np.where(drawn_n, total, pairs_g[group_n])
    pair_n = np.where(drawn_n, pair_n, people % pairs_g[group_n])
    keys = list(zip(group_n.tolist(), number_n.tolist(), drawn_n.tolist()))
    wanted = list(dict.fromkeys(keys))
    size_g = np.bincount(model.group_of_haplotype_k, minlength=len(model.group_names))
    parts, place, done = [], [], 0
    for at in range(0, len(wanted), 2 * len(pairs_g)):
        some = wanted[at : at + 2 * len(pairs_g)]
        for key, made in zip(some, _rounds(model, some, seed), strict=True):
            mine = np.array([at for at, other in enumerate(keys) if other == key], dtype=np.int64)
            slots = (2 * pair_n[mine][:, None] + np.arange(2)).ravel() % size_g[key[0]]
            parts.append(made.take(slots))
            place.append((2 * mine[:, None] + np.arange(2)).ravel())
            done += len(mine)
            if progress is not None:
                progress(done, n)
    if not parts:
        return _no_paths(), group_n
    return joined_paths(parts).take(np.argsort(np.concatenate(place))), group_n


def _no_paths() -> Paths:
    nothing, offset = np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
    return Paths(offset, nothing, nothing.astype(np.int32), offset, nothing)


def _rounds(model: LiStephens, keys: list[tuple[int, int, bool]], seed: int) -> list[Paths]:
    """Rounds by (group, number, of everybody or of the group alone); the last ones are kept, neighbours ask for them again."""
    held: OrderedDict[Any, Paths] = model.rounds_held
    known = model.genealogy_tables

    def one(key: tuple[int, int, bool]) -> Paths:
        made = held.get((key, seed))
        purpose = "round" if key[2] else "round_of_group"
        return made if made is not None else round_paths(model, known, key[0], key[1], seed, purpose)

    with ThreadPoolExecutor(numba.get_num_threads()) as pool:
        made = list(pool.map(one, keys))
    for key, each in zip(keys, made, strict=True):
        held[(key, seed)] = each
        held.move_to_end((key, seed))
    while len(held) > max(_ROUNDS_HELD * len(model.group_names), 1):
        held.popitem(last=False)
    return made
