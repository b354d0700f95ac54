"""How far synthetic haplotypes are from real ones, and how near to the haplotypes they were learned from.

Definitions (each returns a `Finding`; the same metric real against real, train against held-out, is its floor):
    ld_r            Pearson r, over pairs of up to 3,000 SNPs of MAF >= 1 %, of r2 in real against r2 in synthetic.
    three_point_r   Pearson r, over 20,000 triples of the same SNPs, of E[(x-p)(y-q)(z-r)]; the gaps from the first to
    the
                    second and from there to the third are drawn from 1 to 10 SNPs.
    pca_w1          joint PCA of real and synthetic; Wasserstein-1 distance per component, mean of six.
    pca_w1_group_spread  pca_w1 within each group over that of train in the same group: the worst group's over the best's.
    aats_test       nearest-neighbour adversarial accuracy against real: half the sum of mean[d_TS > d_TT] and
                    mean[d_ST > d_SS], L1 distance, equal n, strict >, self left out; 0.5 is ideal, below is copying.
                    (Yale et al., Neurocomputing 416:244, 2020)
    aats_train      the same against train; privacy_loss = aats_test - aats_train, above 0 is nearer to train than to
    real. exact_copies    number of synthetic haplotypes identical to a train haplotype at all sites.
    hamming_to_train  median over synthetic haplotypes of the distance to the nearest train haplotype, sites.
    longest_run_bp  median over synthetic haplotypes of the longest stretch identical to any one train haplotype.
    af_r, sfs_error, ld_decay_error  allele frequencies, rare-variant spectrum, LD by distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import stats

from engine import seeding
from engine.audit.findings import Finding
from engine.errors import InputError
from engine.files.genotypes import take_haplotypes
from engine.genomics.matching import common_sites
from engine.genomics.panel import HaplotypePanel
from engine.kernels import bits, ld, nearest

MAX_SNPS, MIN_MAF, TRIPLES, COMPONENTS = 3_000, 0.01, 20_000, 6
TRIPLE_REACH = 10  # neighbours, of the SNPs drawn; triples at random distances are mostly noise (r 0.70 real to real)
PCA_SITES = 20_000  # above this, evenly spaced sites stand for all
GROUP_SPREAD = 1.3  # no group is to lie further above its floor than the best one, times this
FOLDS = 10  # of people, for delete-a-group jackknife intervals
BOOTSTRAP = 500
DECAY_EDGES_BP = np.array([0, 1e3, 3e3, 1e4, 3e4, 1e5, 2e5, 3e5, 5e5, 7.5e5, 1e6], dtype=np.int64)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """`findings` in a fixed order; `figures`: JSON-ready arrays to draw (pca, ld_decay, af, sfs)."""

    findings: list[Finding]
    figures: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Finding:
        return next(finding for finding in self.findings if finding.name == name)

    def to_json(self) -> dict[str, Any]:
        return {"findings": [finding.to_json() for finding in self.findings], "figures": self.figures}


def evaluate(
    real: HaplotypePanel,
    synthetic: HaplotypePanel,
    *,
    train: HaplotypePanel | None = None,
    seed: int = 0,
    intersect: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """All metrics of `synthetic` against held-out `real` haplotypes, and against `train` where it is given.

    Floors are the same metrics of train (as many haplotypes as synthetic, where there are more) against real. Intervals
    are 95 %: delete-a-group jackknife over ten groups of people on both sides, bootstrap over haplotypes, or exact
    binomial, as each note says.

    Args:
        intersect: use the sites that all panels share where they differ.
        progress: called with (steps done, steps in all).

    Raises:
        InputError: other sites, unphased or incomplete panels, or fewer than two haplotypes on a side.
    """
    panels = {"real": real, "synthetic": synthetic} | ({} if train is None else {"train": train})
    for name, panel in panels.items():
        if not panel.phased:
            raise InputError("phased haplotypes", "unphased genotypes", name, "phase it first")
        if panel.missing_lw is not None and panel.missing_lw.any():
            raise InputError("complete haplotypes", "missing alleles", name, "impute it, or drop the sites")
        if panel.n_haplotypes < 2:
            raise InputError("at least two haplotypes", str(panel.n_haplotypes), name)
    chosen = common_sites({name: panel.sites for name, panel in panels.items()}, intersect=intersect)
    if any(not np.array_equal(index, np.arange(panel.n_sites)) for index, panel in zip(chosen, panels.values())):
        panels = {name: panel.select(sites=index) for index, (name, panel) in zip(chosen, panels.items())}
    real, synthetic, train = panels["real"], panels["synthetic"], panels.get("train")
    matched = None if train is None else _at_most(train, synthetic.n_haplotypes, seed)

    steps: list[Callable[[], tuple[list[Finding], dict[str, Any]]]] = [
        lambda: _allele_frequencies(real, synthetic, matched),
        lambda: _correlations(real, synthetic, matched, seed),
        lambda: _principal_components(real, synthetic, matched, seed),
        lambda: _ld_decay(real, synthetic, matched),
        lambda: _adversarial_accuracy(real, synthetic, train, seed),
    ]
    if train is not None:
        steps.append(lambda: _copies(real, synthetic, train, seed))
    findings: list[Finding] = []
    figures: dict[str, Any] = {}
    for at, step in enumerate(steps):
        found, drawn = step()
        findings += [
            replace(each, verdict="void", note=f"not computable here; {each.note}") if np.isnan(each.value) else each
            for each in found
        ]
        figures |= drawn
        if progress is not None:
            progress(at + 1, len(steps))
    order = ["ld_r", "three_point_r", "pca_w1", "aats_test", "aats_train", "exact_copies", "longest_run_bp"]
    findings.sort(key=lambda finding: order.index(finding.name) if finding.name in order else len(order))
    return Evaluation(findings, figures)


def _at_most(panel: HaplotypePanel, n: int, seed: int) -> HaplotypePanel:
    """Random people of `panel`, as many as have about `n` haplotypes; the panel itself where it has no more."""
    if panel.n_haplotypes <= n:
        return panel
    people = seeding.generator(seed, "genomics.evaluate.matched").permutation(panel.n_samples)
    kept = np.cumsum(np.diff(panel.samples.first_haplotype)[people]) <= n
    return panel.select(samples=np.sort(people[kept]))


def _sizes(**sides: HaplotypePanel | int) -> dict[str, int]:
    return {name: side if isinstance(side, int) else side.n_haplotypes for name, side in sides.items()}


def _jackknife(value: float, without: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval from estimates that each leave out one of len(without) groups (Efron and Tibshirani, chapter
    11)."""
    left = np.asarray(without)
    if not np.isfinite(left).all():
        return None
    groups = len(left)
    error = float(np.sqrt((groups - 1) / groups * np.sum((left - left.mean()) ** 2)))
    reach = float(stats.t.ppf(0.975, groups - 1)) * error
    return value - reach, value + reach


def _fold_of_haplotype(panel: HaplotypePanel) -> np.ndarray:
    """Jackknife group of each haplotype: people in turn, so that both haplotypes of a person are left out together."""
    return panel.sample_of_haplotype_n % FOLDS


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    good = np.isfinite(x) & np.isfinite(y)
    x, y = x[good].astype(np.float64), y[good].astype(np.float64)
    if len(x) < 2:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


# ---- allele frequencies and the spectrum of rare variants -----------------------------------------------------------


def _allele_frequencies(
    real: HaplotypePanel, synthetic: HaplotypePanel, matched: HaplotypePanel | None
) -> tuple[list[Finding], dict[str, Any]]:
    frequency = {
        name: bits.popcount_rows(panel.bits_lw) / panel.n_haplotypes
        for name, panel in (("real", real), ("synthetic", synthetic), ("floor", matched))
        if panel is not None
    }
    size = min(panel.n_haplotypes for panel in (real, synthetic, matched) if panel is not None)
    edges = spectrum_edges(size)
    spectrum = {
        name: spectrum_at(bits.popcount_rows(panel.bits_lw), panel.n_haplotypes, size, edges)
        for name, panel in (("real", real), ("synthetic", synthetic), ("floor", matched))
        if panel is not None
    }

    def error(name: str) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = spectrum[name] / spectrum["real"]
        return float(np.nanmax(np.abs(ratio - 1))) if np.isfinite(ratio).any() else float("nan")

    shown = np.linspace(0, real.n_sites - 1, min(real.n_sites, 5_000)).astype(int)
    figures = {
        "af": {name: frequency[name][shown].tolist() for name in ("real", "synthetic")},
        "sfs": {
            "minor_count_low": edges[:-1].tolist(),
            "minor_count_high": (edges[1:] - 1).tolist(),
            "haplotypes": size,
            **{("train" if name == "floor" else name): values.tolist() for name, values in spectrum.items()},
        },
    }
    findings = [
        Finding(
            "af_r", _pearson(frequency["real"], frequency["synthetic"]), n=_sizes(real=real, synthetic=synthetic),
            direction="higher", floor=_pearson(frequency["real"], frequency["floor"]) if matched is not None else None,
            note="never a headline: independent sites reach 0.998",
        ),
        Finding(
            "sfs_error", error("synthetic"), n=_sizes(real=real, synthetic=synthetic, projected_to=size),
            direction="lower", unit="share", floor=error("floor") if matched is not None else None,
            calibrated_on="train vs real",
            note="largest relative difference over bins of minor-allele count from 1 to 1 %, projected to equal n",
            detail=figures["sfs"],
        ),
    ]  # fmt: skip
    return findings, figures


def spectrum_edges(size: int) -> np.ndarray:
    """Bin edges of minor-allele counts among `size` haplotypes: 1, 2, 3-5, 6-10, 11-20, ... up to MAF 1 %."""
    last = max(1, int(MIN_MAF * size))
    edges = [1, 2, 3]
    while edges[-1] <= last:
        edges.append(6 if edges[-1] == 3 else 2 * (edges[-1] - 1) + 1)
    return np.array([edge for edge in edges if edge <= last] + [last + 1], dtype=np.int64)


def spectrum_at(count_l: np.ndarray, n: int, size: int, edges: np.ndarray) -> np.ndarray:
    """Expected number of sites per bin of minor-allele count, were `size` of the `n` haplotypes drawn without
    replacement.

    Args:
        count_l: ALT alleles per site among n haplotypes.
        edges: rising counts; bin b holds edges[b] <= minor count < edges[b+1].
    """
    counts, sites = np.unique(count_l, return_counts=True)
    minor = np.arange(edges[0], edges[-1])
    share = stats.hypergeom.pmf(minor[:, None], n, counts[None, :], size)
    other = size - minor
    share += np.where((other != minor)[:, None], stats.hypergeom.pmf(other[:, None], n, counts[None, :], size), 0)
    return np.add.reduceat(share @ sites, edges[:-1] - edges[0])


# ---- two- and three-point correlations -------------------------------------------------------------------------------


def _common_snps(real: HaplotypePanel, seed: int) -> np.ndarray:
    """Up to MAX_SNPS site indices, rising, drawn among those with MAF >= 1 % in real."""
    frequency = bits.popcount_rows(real.bits_lw) / real.n_haplotypes
    common = np.flatnonzero(np.minimum(frequency, 1 - frequency) >= MIN_MAF)
    if len(common) > MAX_SNPS:
        common = seeding.generator(seed, "genomics.evaluate.snps").choice(common, MAX_SNPS, replace=False)
    return np.sort(common)


def three_point(bits_lw: np.ndarray, n: int, triple_t3: np.ndarray) -> np.ndarray:
    """float64 (T,): E[(x-p)(y-q)(z-r)] of each triple of sites, from counts of haplotypes that carry all of several."""
    x, y, z = (bits_lw[triple_t3[:, i]] for i in range(3))
    mean = lambda words: np.bitwise_count(words).sum(axis=1, dtype=np.int64) / n  # noqa: E731
    p, q, r = mean(x), mean(y), mean(z)
    return mean(x & y & z) - p * mean(y & z) - q * mean(x & z) - r * mean(x & y) + 2 * p * q * r


def _correlations(
    real: HaplotypePanel, synthetic: HaplotypePanel, matched: HaplotypePanel | None, seed: int
) -> tuple[list[Finding], dict[str, Any]]:
    snps = _common_snps(real, seed)
    if len(snps) < 3:
        note = f"{len(snps)} SNPs of MAF >= 1 %: too few"
        return [Finding(name, float("nan"), verdict="void", note=note) for name in ("ld_r", "three_point_r")], {}
    reach = min(TRIPLE_REACH, (len(snps) - 1) // 2)
    rng = seeding.generator(seed, "genomics.evaluate.triples")
    gap_t2 = rng.integers(1, reach + 1, (TRIPLES, 2))
    first_t = rng.integers(0, len(snps) - 2 * reach, TRIPLES)
    triple_t3 = np.stack([first_t, first_t + gap_t2[:, 0], first_t + gap_t2.sum(axis=1)], axis=1)
    upper = np.triu_indices(len(snps), 1)

    def both(panel: HaplotypePanel, without: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        words = np.ascontiguousarray(panel.bits_lw[snps])
        n = panel.n_haplotypes
        if without is not None:
            kept = np.flatnonzero(_fold_of_haplotype(panel) != without)
            words, n = take_haplotypes(words, n, kept), len(kept)
        return np.asarray(ld.r2(words, n))[upper], three_point(words, n, triple_t3)

    of_real, of_synthetic = both(real), both(synthetic)
    of_floor = None if matched is None else both(matched)
    without: list[list[float]] = [[], []]
    for fold in range(FOLDS) if _enough(real, synthetic) else ():
        for at, (one, other) in enumerate(zip(both(real, fold), both(synthetic, fold), strict=True)):
            without[at].append(_pearson(one, other))
    findings = []
    for at, (name, what) in enumerate((("ld_r", "pairs"), ("three_point_r", "triples"))):
        value = _pearson(of_real[at], of_synthetic[at])
        findings.append(
            Finding(
                name, value,
                interval=_jackknife(value, without[at]) if without[at] else None,
                n=_sizes(real=real, synthetic=synthetic), direction="higher",
                floor=None if of_floor is None else _pearson(of_real[at], of_floor[at]), calibrated_on="train vs real",
                note=f"{len(of_real[at])} {what} of {len(snps)} SNPs with MAF >= 1 % in real; jackknife over people",
            )
        )  # fmt: skip
    return findings, {}


def _enough(*panels: HaplotypePanel) -> bool:
    return all(panel.n_samples >= 3 * FOLDS for panel in panels)


# ---- principal components --------------------------------------------------------------------------------------------


def _principal_components(
    real: HaplotypePanel, synthetic: HaplotypePanel, matched: HaplotypePanel | None, seed: int
) -> tuple[list[Finding], dict[str, Any]]:
    size = {"real": real.n_haplotypes, "synthetic": synthetic.n_haplotypes}
    fewest = min(panel.n_haplotypes for panel in (synthetic, matched) if panel is not None)
    components = min(COMPONENTS, size["real"] + fewest - 1, real.n_sites)
    at_real, at_synthetic = joint_components(real, synthetic, components, seed)
    value = component_distance(at_real, at_synthetic)
    interval = None
    if _enough(real, synthetic):
        fold_r, fold_s = _fold_of_haplotype(real), _fold_of_haplotype(synthetic)
        without = [component_distance(at_real[fold_r != f], at_synthetic[fold_s != f]) for f in range(FOLDS)]
        interval = _jackknife(value, without)
        interval = None if interval is None else (max(0.0, interval[0]), interval[1])  # a distance
    at_floor = None if matched is None else joint_components(real, matched, components, seed)
    floor = None if at_floor is None else component_distance(*at_floor)
    per_group = _distance_by_group(real, at_real, synthetic, at_synthetic)
    floors = {} if matched is None or at_floor is None else _distance_by_group(real, at_floor[0], matched, at_floor[1])
    figures: dict[str, Any] = {
        "pca": {
            "real": at_real[:, :2].round(4).tolist(),
            "synthetic": at_synthetic[:, :2].round(4).tolist(),
            "group": None if real.group_n is None else real.group_n.tolist(),
            "synthetic_group": None if synthetic.group_n is None else synthetic.group_n.tolist(),
        }
    }
    note = f"mean of {components} components of a joint PCA; jackknife over people with the components held"
    finding = Finding(
        "pca_w1", value, interval=interval, n=size, direction="lower", floor=floor, calibrated_on="train vs real",
        note=note + (f"; {PCA_SITES} of {real.n_sites} sites" if real.n_sites > PCA_SITES else ""),
        detail={"per_group": per_group} | ({"per_group_floor": floors} if floors else {}) if per_group else {},
    )  # fmt: skip
    to_floor = {name: per_group[name] / floors[name] for name in per_group if floors.get(name, 0.0) > 0}
    if len(to_floor) < 2:
        return [finding], figures
    worst, best = max(to_floor, key=to_floor.__getitem__), min(to_floor, key=to_floor.__getitem__)
    spread = Finding(
        "pca_w1_group_spread", to_floor[worst] / to_floor[best], n=size | {"groups": len(to_floor)}, threshold=GROUP_SPREAD,
        direction="lower", note=f"pca_w1 over its floor, the worst group ({worst}) over the best ({best})",
        detail={"over_floor": to_floor},
    )  # fmt: skip
    return [finding, spread], figures


def _distance_by_group(
    real: HaplotypePanel, at_real: np.ndarray, other: HaplotypePanel, at_other: np.ndarray
) -> dict[str, float]:
    """`component_distance` within each group that both have; {} where one has none."""
    if real.group_n is None or other.group_n is None:
        return {}
    theirs = other.groups()
    return {
        name: component_distance(at_real[index], at_other[theirs[name]])
        for name, index in real.groups().items()
        if name in theirs
    }


def joint_components(
    real: HaplotypePanel, other: HaplotypePanel, components: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (N, components) and (M, components) of both on the principal components of both together.

    Alleles 0 and 1 are centred on the joint mean and not scaled.
    """
    from sklearn.decomposition import PCA

    sites = np.unique(np.linspace(0, real.n_sites - 1, min(real.n_sites, PCA_SITES)).astype(int))
    x_nl = np.concatenate(
        [bits.unpack(np.ascontiguousarray(p.bits_lw[sites]), p.n_haplotypes).T for p in (real, other)]
    ).astype(np.float32)
    state = seeding.derived_seed(seed, "genomics.evaluate.pca") % 2**32
    if min(x_nl.shape) <= 200:
        pca = PCA(components, svd_solver="full")
    else:
        pca = PCA(components, svd_solver="randomized", iterated_power=6, n_oversamples=20, random_state=state)
    at = pca.fit_transform(x_nl)
    return at[: real.n_haplotypes], at[real.n_haplotypes :]


def component_distance(x_nc: np.ndarray, y_mc: np.ndarray) -> float:
    """Wasserstein-1 distance of each column, mean over columns."""
    return float(np.mean([stats.wasserstein_distance(x_nc[:, c], y_mc[:, c]) for c in range(x_nc.shape[1])]))


# ---- LD by distance --------------------------------------------------------------------------------------------------


def ld_decay(panel: HaplotypePanel, edges_bp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean r2 (B,), NaN where there is no pair, and number of pairs (B,) by distance, within contigs."""
    total, pairs = np.zeros(len(edges_bp) - 1), np.zeros(len(edges_bp) - 1, dtype=np.int64)
    for contig in dict.fromkeys(panel.sites.contig.tolist()):
        index = np.flatnonzero(panel.sites.contig == contig)
        words = np.ascontiguousarray(panel.bits_lw[index])
        own, count = ld.r2_decay(words, panel.n_haplotypes, panel.sites.position_bp[index], edges_bp)
        total, pairs = total + own, pairs + count
    with np.errstate(invalid="ignore"):
        return np.where(pairs > 0, total / pairs, np.nan), pairs


def _ld_decay(
    real: HaplotypePanel, synthetic: HaplotypePanel, matched: HaplotypePanel | None
) -> tuple[list[Finding], dict[str, Any]]:
    frequency = bits.popcount_rows(real.bits_lw) / real.n_haplotypes
    common = np.flatnonzero(np.minimum(frequency, 1 - frequency) >= MIN_MAF)
    sides = {"real": real, "synthetic": synthetic} | ({} if matched is None else {"train": matched})
    curves = {name: ld_decay(panel.select(sites=common), DECAY_EDGES_BP) for name, panel in sides.items()}

    def error(name: str) -> float:
        gap = np.abs(curves[name][0] - curves["real"][0])
        return float(np.nanmean(gap)) if np.isfinite(gap).any() else float("nan")

    plain = lambda values: [None if not np.isfinite(x) else float(x) for x in values]  # noqa: E731
    figure = {
        "distance_bp": ((DECAY_EDGES_BP[:-1] + DECAY_EDGES_BP[1:]) / 2).tolist(),
        **{name: plain(curve) for name, (curve, _) in curves.items()},
        "pairs": curves["real"][1].tolist(),
    }
    value = error("synthetic")
    finding = Finding(
        "ld_decay_error", value, n=_sizes(real=real, synthetic=synthetic), direction="lower",
        verdict="none" if np.isfinite(value) else "void", floor=None if matched is None else error("train"),
        calibrated_on="train vs real", note="mean absolute difference of mean r2 over bins of distance up to 1 Mb",
        detail=figure,
    )  # fmt: skip
    return [finding], {"ld_decay": figure}


# ---- nearest neighbours ----------------------------------------------------------------------------------------------


def adversarial_accuracy(
    t_nw: np.ndarray, s_nw: np.ndarray, *, seed: int = 0, bootstrap: int = BOOTSTRAP
) -> tuple[float, tuple[float, float], int]:
    """AATS of haplotype-major bits, its bootstrap interval over haplotypes, and n per side (the smaller, at random)."""
    n = min(len(t_nw), len(s_nw))
    rng = seeding.generator(seed, "genomics.evaluate.aats")
    t_nw, s_nw = (
        words if len(words) == n else np.ascontiguousarray(words[np.sort(rng.choice(len(words), n, replace=False))])
        for words in (t_nw, s_nw)
    )
    to = lambda a, b, own: nearest.hamming_topk(a, b, 1, exclude_self=own)[0][:, 0]  # noqa: E731
    real_side = to(t_nw, s_nw, False) > to(t_nw, t_nw, True)
    synthetic_side = to(s_nw, t_nw, False) > to(s_nw, s_nw, True)
    value = 0.5 * (real_side.mean() + synthetic_side.mean())
    drawn = [0.5 * (rng.choice(real_side, n).mean() + rng.choice(synthetic_side, n).mean()) for _ in range(bootstrap)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(value), (float(low), float(high)), n


def _adversarial_accuracy(
    real: HaplotypePanel, synthetic: HaplotypePanel, train: HaplotypePanel | None, seed: int
) -> tuple[list[Finding], dict[str, Any]]:
    real_nw, synthetic_nw = real.haplotype_major(), synthetic.haplotype_major()
    value, interval, n = adversarial_accuracy(real_nw, synthetic_nw, seed=seed)
    floor = None
    findings = []
    if train is not None:
        train_nw = train.haplotype_major()
        floor = adversarial_accuracy(real_nw, train_nw, seed=seed, bootstrap=1)[0]
        to_train, train_interval, n_train = adversarial_accuracy(train_nw, synthetic_nw, seed=seed)
        findings += [
            Finding(
                "aats_train", to_train, train_interval, n=_sizes(train=n_train, synthetic=n_train), threshold=0.5,
                direction="target", floor=floor, calibrated_on="train vs real",
                note="0.5 is ideal, below 0.5 synthetic haplotypes lie too near to train; bootstrap over haplotypes",
            ),
            Finding(
                "privacy_loss", value - to_train, n=_sizes(test=n, train=n_train), threshold=0.0, direction="lower",
                note="aats_test - aats_train: above 0, synthetic is nearer to train than to held-out real",
            ),
        ]  # fmt: skip
    test = Finding(
        "aats_test", value, interval, n=_sizes(real=n, synthetic=n), threshold=0.5, direction="target", floor=floor,
        calibrated_on="train vs real", note="0.5 is ideal; bootstrap over haplotypes",
    )  # fmt: skip
    return [test, *findings], {}


def longest_runs(query: HaplotypePanel, database: HaplotypePanel) -> np.ndarray:
    """int64 (N,): per query haplotype the longest stretch, bp, identical to one database haplotype, within one
    contig."""
    best_n = np.zeros(query.n_haplotypes, dtype=np.int64)
    for contig in dict.fromkeys(query.sites.contig.tolist()):
        index = np.flatnonzero(query.sites.contig == contig)
        query_nw, database_nw = (
            bits.transpose(np.ascontiguousarray(panel.bits_lw[index]), panel.n_haplotypes)
            for panel in (query, database)
        )
        run_bp, _, _ = nearest.longest_run(query_nw, database_nw, len(index), query.sites.position_bp[index])
        best_n = np.maximum(best_n, run_bp)
    return best_n


def _median(values: np.ndarray, seed: int, purpose: str) -> tuple[float, tuple[float, float]]:
    """Median and its bootstrap 95 % interval."""
    rng = seeding.generator(seed, purpose)
    drawn = [np.median(rng.choice(values, len(values))) for _ in range(BOOTSTRAP)]
    return float(np.median(values)), (float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975)))


def _copies(
    real: HaplotypePanel, synthetic: HaplotypePanel, train: HaplotypePanel, seed: int
) -> tuple[list[Finding], dict[str, Any]]:
    train_nw = train.haplotype_major()
    distance_n = nearest.hamming_topk(synthetic.haplotype_major(), train_nw, 1)[0][:, 0]
    floor_n = nearest.hamming_topk(real.haplotype_major(), train_nw, 1)[0][:, 0]
    count, n = int((distance_n == 0).sum()), len(distance_n)
    share = stats.binomtest(count, n).proportion_ci(0.95, method="exact")
    hamming, hamming_interval = _median(distance_n, seed, "genomics.evaluate.hamming")
    run_n, floor_run_n = longest_runs(synthetic, train), longest_runs(real, train)
    run, run_interval = _median(run_n, seed, "genomics.evaluate.run")
    sizes = _sizes(synthetic=synthetic, train=train, real=real)
    return [
        Finding(
            "exact_copies", float(count), interval=(n * share.low, n * share.high), n=sizes, direction="lower",
            floor=float((floor_n == 0).mean() * n), calibrated_on="real vs train, scaled to the same number",
            unit="haplotypes", note=f"share {count / n:.4g}; identical to a train haplotype at all sites",
            detail={"share": count / n, "share_interval": [share.low, share.high]},
        ),
        Finding(
            "longest_run_bp", run, run_interval, n=sizes, direction="lower", unit="bp",
            floor=float(np.median(floor_run_n)), calibrated_on="real vs train",
            note="median over synthetic haplotypes; bootstrap. The whole region is the largest possible value",
            detail={"quantiles": {str(q): float(np.quantile(run_n, q)) for q in (0.05, 0.25, 0.75, 0.95, 1.0)}},
        ),
        Finding(
            "hamming_to_train", hamming, hamming_interval, n=sizes, direction="none", unit="sites",
            floor=float(np.median(floor_n)), calibrated_on="real vs train",
            note="median over synthetic haplotypes of the distance to the nearest train haplotype; bootstrap",
        ),
    ], {}  # fmt: skip
