"""Does the part of the audit that only genotypes have keep its rates, and what does it see? Real people in, tables out.

    python perf/audit/calibrate_genotypes.py DATA --panel chr15 --repeats 100

DATA is the folder of public panels (`data/genomics`). In every repetition people are drawn anew into training, holdout and a
third set, which is given to the judges as if it were synthetic: whoever convicts it is wrong. Then planted sets: copies, noisy
copies, mosaics, mixtures, and samples of the copying model. About 1 s a repetition for chr15 on one core.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from engine import seeding
from engine.audit import AuditPolicy
from engine.audit.intervals import clopper_pearson
from engine.audit.pools import Pool
from engine.genomics.audit_judges import genotype_judges
from engine.genomics.li_stephens import LiStephensConfig, fit
from engine.genomics.panel import HaplotypePanel, Sites, read_panel
from engine.genomics.pools import check_sides, haplotype_pool
from engine.genomics.relatedness import related_pairs, resolution
from engine.kernels import bits

FILES = {"chr15": "chr15_10k/train.bcf", "chr22": "chr22_1kg_phase1/kg_p1_chr22.bcf"}
FAMILY = {"chr15": None, "chr22": 0.2, "genomewide": 0.07}  # kinship from which one of two is left out beforehand


def read(data: Path, name: str) -> HaplotypePanel:
    """The panel, of genomewide the 22 autosomes as one, without relatives."""
    if name == "genomewide":
        parts = [read_panel(p) for p in sorted((data / "genomewide_1126").glob("*chr*.vcf.gz")) if "chrX" not in p.name]
        joined = {
            k: np.concatenate([getattr(p.sites, k) for p in parts]) for k in Sites.__annotations__ if k != "position_cm"
        }
        panel = replace(parts[0], bits_lw=np.concatenate([p.bits_lw for p in parts]), sites=Sites(**joined))
    else:
        panel = read_panel(data / FILES[name])
    if FAMILY[name] is None:
        return panel
    related = set(related_pairs(panel, threshold=FAMILY[name], site_l=resolution(panel).site_l).second_p.tolist())
    return panel.select(samples=[s for s in range(panel.n_samples) if s not in related])


def people(alleles_nl: np.ndarray, like: Pool) -> Pool:
    """Rows 2 s and 2 s + 1 as synthetic person s."""
    names = np.repeat([f"SYN{k}" for k in range(len(alleles_nl) // 2)], 2)
    return Pool("bits", bits.pack(alleles_nl), names, length=like.length, position_bp=like.position_bp)


def planted(train: Pool, fresh: Pool, n: int, rng: np.random.Generator) -> dict[str, Pool]:
    """Sets whose right verdict is known."""
    alleles_nl, fresh_nl = (bits.unpack(pool.data, pool.length or 0) for pool in (train, fresh))
    length = alleles_nl.shape[1]

    def mosaic(donors: int) -> np.ndarray:
        made = np.empty((2 * n, length), dtype=np.uint8)
        for row in made:
            edges = [0, *np.sort(rng.choice(np.arange(1, length), donors - 1, replace=False)), length]
            for k, donor in enumerate(rng.choice(len(alleles_nl), donors, replace=False)):
                row[edges[k] : edges[k + 1]] = alleles_nl[donor, edges[k] : edges[k + 1]]
        return made

    person = rng.choice(len(alleles_nl) // 2, n, replace=False)
    copy_nl = alleles_nl[np.column_stack([2 * person, 2 * person + 1]).reshape(-1)]
    noisy_nl = copy_nl ^ (rng.random(copy_nl.shape) < 0.01)
    tenth = fresh_nl.copy()
    tenth[: 2 * (n // 10)] = copy_nl[: 2 * (n // 10)]
    sets = {"copies": copy_nl, "copies, 1 % of alleles flipped": noisy_nl, "a tenth copies": tenth[: 2 * n]}
    sets |= {f"mosaics of {donors}": mosaic(donors) for donors in (3, 10, 20)}
    return {name: people(made.astype(np.uint8), train) for name, made in sets.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--panel", choices=list(FAMILY), default="chr15")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--sizes", type=int, nargs=3, default=(400, 150, 100), help="training, holdout, third set")
    parser.add_argument("--planted", type=int, nargs=3, default=(600, 250, 100), help="the same for the planted sets")
    given = parser.parse_args()
    panel, policy = read(given.data, given.panel), AuditPolicy()

    def drawn(index: int, sizes: tuple[int, int, int]) -> tuple[list[HaplotypePanel], list[Pool]]:
        order = seeding.generator(0, "calibrate.genotypes", index).permutation(panel.n_samples)
        edges = np.concatenate([[0], np.cumsum(sizes)])
        sides = [panel.select(samples=np.sort(order[a:b])) for a, b in pairwise(edges)]
        pools = [haplotype_pool(side) for side in sides]
        pools[2] = people(bits.unpack(pools[2].data, panel.n_sites), pools[2])
        return sides, pools

    def findings(sides: list[HaplotypePanel], pools: list[Pool], seed: int, sets: dict[str, Pool]) -> dict[str, list]:
        resolved, noted = check_sides(sides[0], sides[1])
        judges = genotype_judges(pools[0], pools[1], panel.sites.contig, resolved, noted, policy=policy, seed=seed)
        return {name: [f for judge in judges[:4] for f in judge(name, pool, None)] for name, pool in sets.items()}  # type: ignore[arg-type]

    print(f"{given.panel}: {panel.n_samples} people, {panel.n_sites} sites; policy alpha {policy.alpha}")
    print(f"\nUnseen real people as the synthetic set, {given.sizes}, {given.repeats} repetitions\n")
    judged: Counter[str] = Counter()
    convicted: Counter[str] = Counter()
    flagged: list[float] = []
    areas: dict[str, list[float]] = {}
    for index in range(given.repeats):
        sides, pools = drawn(index, given.sizes)
        found = findings(sides, pools, index, {"synthetic": pools[2]})["synthetic"]
        for f in found:
            if f.verdict != "none":
                judged[f.name] += 1
                convicted[f.name] += f.verdict == "fail"
            if f.name.startswith("membership_auc"):
                areas.setdefault(f.name, []).append(f.value)
            if f.name == "window_copy_share_at_5_percent":
                flagged.append(f.value)
        convicted["any"] += any(f.verdict == "fail" for f in found)
    judged["any"] = given.repeats
    print("| gate | convicted | of | 95 % interval | mean area |\n|---|---|---|---|---|")
    for name in [*sorted(set(judged) - {"any"}), "any"]:
        low, high = clopper_pearson(convicted[name], judged[name])
        area = f"{np.mean(areas[name]):.3f} (sd {np.std(areas[name]):.3f})" if name in areas else ""
        print(f"| {name} | {convicted[name]} | {judged[name]} | {low:.1%} to {high:.1%} | {area} |")
    print(f"\nflagged by windows at nominal 5 %: {np.mean(flagged):.2%} (sd {np.std(flagged):.2%}, n = {len(flagged)})")

    sides, pools = drawn(10**6, given.planted)
    sets = {"unseen people": pools[2], **planted(pools[0], pools[2], given.planted[2], np.random.default_rng(0))}
    for ne in (11_700, 100_000, 320_000):
        sets[f"copying model, Ne {ne:,}"] = haplotype_pool(
            fit(sides[0], LiStephensConfig(ne=ne)).sample(given.planted[2], seed=1)
        )
    print(f"\nPlanted sets, {given.planted}\n")
    shown = {
        "kinship_above_0.354": "kin 0.354", "window_copy_share_at_5_percent": "windows at 5 %",
        "windows_equal_to_training": "windows equal", "private_alleles_shown": "private shown",
        "membership_auc_private_alleles": "private, area", "membership_auc_frequencies_homer": "Homer, area",
        "membership_auc_frequencies_likelihood": "likelihood, area",
    }  # fmt: skip
    print(f"| set | {' | '.join(shown.values())} | convicted by |\n|{'---|' * (len(shown) + 2)}")
    for name, made in findings(sides, pools, 0, sets).items():
        by = {f.name: f for f in made}
        cells = []
        for key in shown:
            f = by.get(key)
            floor = f" ({f.floor:.3f})" if f is not None and f.floor is not None and "area" not in shown[key] else ""
            cells.append("" if f is None else f"{f.value:.3f}{floor}")
        kinds = ("kinship", "window", "private", "frequencies")
        fails = [kind for kind in kinds if any(kind in f.name and f.verdict == "fail" for f in made)]
        print(f"| {name} | {' | '.join(cells)} | {', '.join(fails) or 'nothing'} |")


if __name__ == "__main__":
    main()
