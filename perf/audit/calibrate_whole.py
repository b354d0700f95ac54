"""How often the whole audit (copies, adversarial accuracy, membership, controls, verdict) convicts sets that hold no copies.

    python perf/audit/calibrate_whole.py [--repeats 200] [--only NAME] [--json OUT]
    python perf/audit/calibrate_whole.py --panel FILE.bcf --sizes 400,150 [--repeats 60] [--first 0]

Every repetition draws training, holdout and synthetic people anew and runs `engine.audit.audit` from end to end. Scans are
points of the curved sheet of `calibrate.py`; genotypes are mosaics of founder haplotypes, two rows a person, with positions.
With --panel, the people of a real panel are dealt anew into training, holdout and a third set, which is judged as if it were
synthetic, by the gates of the genotype room too.
Columns: share of runs convicted and void with their Clopper-Pearson intervals, and the gates that convicted. Contaminated
sets (5 % and 10 % of near copies) show what the same gates see.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
from calibrate import DIMENSIONS, GENERATORS, REAL, pool

from engine.audit import AuditPolicy, Judge, Pool, audit
from engine.audit.intervals import clopper_pearson
from engine.genomics.audit_judges import genotype_judges
from engine.genomics.panel import HaplotypePanel, read_panel
from engine.genomics.pools import check_sides, haplotype_pool
from engine.seeding import generator

SITES, FOUNDERS = 600, 60
SIZES = ((300, 100), (100, 400), (100, 40))  # people in training and in holdout
POLICY = AuditPolicy(contamination_repeats=1, honest_repeats=0, control_rows=60, subsets=2)


def haplotypes(rng: np.random.Generator, people: int, tag: str, switches: int = 12) -> Pool:
    """Two mosaics of the founders per person, with 1 % of the alleles changed."""
    drawn = generator(9, "calibrate.founders")
    founders = (drawn.random((FOUNDERS, SITES)) < drawn.beta(0.6, 1.5, SITES)).astype(np.uint8)
    position_bp = np.sort(drawn.choice(1_000_000, SITES, replace=False)).astype(np.int64)
    rows = np.empty((2 * people, SITES), np.uint8)
    for row in rows:
        for a, b in pairwise([0, *np.sort(rng.choice(np.arange(1, SITES), switches, replace=False)), SITES]):
            row[a:b] = founders[rng.integers(FOUNDERS), a:b]
    return packed(rows ^ (rng.random(rows.shape) < 0.01), tag, position_bp)


def packed(rows: np.ndarray, tag: str, position_bp: np.ndarray) -> Pool:
    """Alleles as a pool, two rows a person."""
    data = np.packbits(np.pad(rows, ((0, 0), (0, -SITES % 64))), axis=1, bitorder="little").view(np.uint64)
    person = np.array([f"{tag}{i // 2}" for i in range(len(rows))])
    return Pool("bits", data, person, length=SITES, position_bp=position_bp)


def sides(name: str, rng: np.random.Generator, sizes: tuple[int, int], n: int, copies: float) -> list[Pool]:
    """Training, holdout and synthetic people of one case."""
    k = round(copies * n)
    if name == "genotypes":
        train, holdout, made = (haplotypes(rng, m, tag) for m, tag in ((sizes[0], "t"), (sizes[1], "h"), (n, "s")))
        if k:
            data = made.data.copy()
            data[: 2 * k] = train.data[: 2 * k]
            flips = (rng.random((2 * k, SITES)) < 0.005).astype(np.uint8)
            data[: 2 * k] ^= packed(flips, "x", train.position_bp).data
            made = Pool("bits", data, made.person, length=SITES, position_bp=made.position_bp)
        return [train, holdout, made]
    real, make = GENERATORS[name]
    train, holdout, rows = REAL[real](rng, sizes[0]), REAL[real](rng, sizes[1]), make(rng, n)
    if k:
        near = np.median(np.partition(np.linalg.norm(holdout[:, None] - holdout[None], axis=2), 1, axis=1)[:, 1])
        rows[:k] = train[:k] + POLICY.control_noise * near / np.sqrt(DIMENSIONS) * rng.standard_normal((k, DIMENSIONS))
    return [pool(rows_, tag) for rows_, tag in ((train, "t"), (holdout, "h"), (rows, "s"))]


def dealt(
    panel: HaplotypePanel, rng: np.random.Generator, sizes: tuple[int, int], n: int
) -> tuple[list[Pool], list[Judge]]:
    """Pools of three sets of people of the panel, and the judges of genotypes."""
    order = rng.permutation(panel.n_samples)[: sum(sizes) + n]
    parts = [panel.select(samples=np.sort(p)) for p in np.split(order, [sizes[0], sum(sizes)])]
    pools = [haplotype_pool(part) for part in parts]
    resolved, noted = check_sides(parts[0], parts[1])
    return pools, genotype_judges(pools[0], pools[1], panel.sites.contig, resolved, noted, policy=POLICY)


def case(
    name: str,
    sizes: tuple[int, int],
    n: int,
    copies: float,
    repeats: int,
    seed: int,
    panel: HaplotypePanel | None = None,
    first: int = 0,
) -> dict:
    """All repetitions of one case, from number `first` on."""
    verdicts: Counter[str] = Counter()
    gates: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for repeat in range(first, first + repeats):
        rng = generator(seed, f"calibrate.whole.{name}", repeat)
        pools, judges = (sides(name, rng, sizes, n, copies), []) if panel is None else dealt(panel, rng, sizes, n)
        result = audit(*pools, policy=POLICY, seed=seed + repeat, judges=judges)
        verdicts[result.verdict] += 1
        wrong.update(control.name for control in result.controls if not control.right)
        if result.verdict == "fail":
            gates.update(finding.name for finding in result.findings if finding.verdict == "fail")
    interval = {word: list(clopper_pearson(verdicts[word], repeats)) for word in ("fail", "void")}
    sizes_ = {"train": sizes[0], "holdout": sizes[1], "synthetic": n, "near_copies": copies, "repeats": repeats}
    return {"case": name, **sizes_, **verdicts, "interval": interval, "gates": dict(gates), "misjudged": dict(wrong)}


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--synthetic", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a generator of calibrate.py, or 'genotypes'")
    parser.add_argument("--sizes", help="one pair only, e.g. 300,100")
    parser.add_argument("--copies", type=float, nargs="*", default=[0.0])
    parser.add_argument("--panel", type=Path, help="deal the people of this panel instead")
    parser.add_argument("--first", type=int, default=0, help="number of the first repetition")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    panel = None if given.panel is None else read_panel(given.panel)
    names = (
        ["real panel"]
        if panel
        else [given.only]
        if given.only
        else ["same as real", "less diverse", "off the sheet", "genotypes"]
    )
    sizes = [tuple(int(x) for x in given.sizes.split(","))] if given.sizes else SIZES
    print(
        "| people | near copies | T / H / S | convicted (95 %) | void (95 %) | gates that convicted; controls misjudged |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    made = []
    for name in names:
        for pair in sizes:
            for copies in given.copies:
                row = case(name, pair, given.synthetic, copies, given.repeats, given.seed, panel, given.first)  # type: ignore[arg-type]
                made.append(row)
                share = lambda word: (  # noqa: E731
                    f"{row.get(word, 0) / given.repeats:.1%} ({row['interval'][word][0]:.1%}-{row['interval'][word][1]:.1%})"  # noqa: B023
                )
                said = ", ".join(f"{gate} {count}" for gate, count in {**row["gates"], **row["misjudged"]}.items())
                print(
                    f"| {name} | {copies:.0%} | {pair[0]} / {pair[1]} / {given.synthetic} | {share('fail')} "
                    f"| {share('void')} | {said} |",
                    flush=True,
                )
    if given.json:
        given.json.write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
