"""How often the audit flags, and convicts, generators that have seen nothing of the training side; and what it finds of
those that have.

    python perf/audit/calibrate.py [--repeats 200] [--json OUT]

Real people are points on a curved 6-dimensional sheet in 32 dimensions with a little noise, as embeddings are. Every
repetition draws training, holdout and synthetic rows anew. Leak-free generators are: the population itself; one that
draws only from the middle of it ("less diverse"); one that draws too widely; one off the sheet; and one that keeps a
rare flat part of a population of mixed dimension. Columns: mean share of synthetic people flagged at nominal 1 %
(with its 95 % interval over repetitions, and the level that this null can reach), the share of one-row-per-repetition
trials flagged with its Clopper-Pearson interval, the share of runs convicted, and two protocols that the engine does
not use: nearest distance at pools as they come, threshold 5 % (as published), and the plain log ratio without local
scale at 1 %.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from engine.audit.copies import CopySearch
from engine.audit.intervals import attainable_level, clopper_pearson, conformal_p, people_needed
from engine.audit.judge import judge
from engine.audit.policy import AuditPolicy
from engine.audit.pools import Pool, topk
from engine.seeding import generator

DIMENSIONS, INSIDE = 32, 6


def sheet(rng: np.random.Generator, n: int, spread: float = 1.0, off: float = 0.05) -> np.ndarray:
    """`n` points of the curved sheet; `spread` scales the hidden coordinates, `off` is the distance from the sheet."""
    directions = generator(7, "calibrate.sheet").standard_normal((INSIDE, DIMENSIONS)) / np.sqrt(INSIDE)
    hidden = rng.standard_normal((n, INSIDE)) * spread
    return (np.tanh(2 * hidden @ directions) + off * rng.standard_normal((n, DIMENSIONS))).astype(np.float32)


def mixed(rng: np.random.Generator, n: int, flat_share: float) -> np.ndarray:
    """A flat two-dimensional part and a 20-dimensional part."""
    frame = generator(8, "calibrate.mixed").standard_normal((22, DIMENSIONS)) / 4
    flat = rng.standard_normal((n, 2)) @ frame[:2]
    full = rng.standard_normal((n, 20)) @ frame[2:] + 8
    return np.where(rng.random(n)[:, None] < flat_share, flat, full).astype(np.float32)


REAL = {"sheet": sheet, "mixed": lambda rng, n: mixed(rng, n, 0.1)}
GENERATORS = {
    "same as real": ("sheet", sheet),
    "less diverse": ("sheet", lambda rng, n: sheet(rng, n, spread=0.4)),
    "too diverse": ("sheet", lambda rng, n: sheet(rng, n, spread=1.8)),
    "off the sheet": ("sheet", lambda rng, n: sheet(rng, n, off=0.15)),
    "only the flat tenth": ("mixed", lambda rng, n: mixed(rng, n, 1.0)),
}
SIZES = ((800, 200), (300, 300), (100, 400), (100, 40))  # people in training and in holdout


def pool(rows: np.ndarray, tag: str) -> Pool:
    """A pool with one row per person."""
    return Pool("features", rows, np.array([f"{tag}{i}" for i in range(len(rows))]))


def trial(real: str, make, sizes: tuple[int, int], n: int, seed: int, repeat: int, copies: float, null: str) -> dict:
    """One repetition."""
    rng = generator(seed, f"calibrate.{real}", repeat)
    train, holdout = pool(REAL[real](rng, sizes[0]), "t"), pool(REAL[real](rng, sizes[1]), "h")
    rows = make(rng, n)
    policy = AuditPolicy(subsets=1, null=null)
    search = CopySearch(train, holdout, policy, seed + repeat)
    if copies:
        k = round(copies * n)
        noise = policy.control_noise * search.typical_distance / np.sqrt(DIMENSIONS)
        rows[:k] = train.data[np.arange(k) % len(train)] + noise * rng.standard_normal((k, DIMENSIONS))
    tested = pool(rows, "s")
    reference, scores = search.null(), search.score(tested, "trial")
    judged = judge(search, reference, scores)
    level = 0.01 if reference.people >= people_needed(0.01) else 0.05
    real_real = topk(holdout, holdout, 1, exclude=(search.holdout_code, search.holdout_code))[0][:, 0]
    ratio = lambda s: np.log(s.distance_train_n / s.distance_holdout_n)  # noqa: E731
    return {
        "level": attainable_level(level, reference.people),
        "flagged": float((judged.p_n <= level + 1e-12).mean()),
        "first": bool(judged.p_n[-1] <= level + 1e-12),
        "convicted": judged.verdict == "fail",
        "published": float((scores.distance_train_n < np.quantile(real_real, 0.05)).mean()),
        "unscaled": float((conformal_p(ratio(reference.scores), ratio(scores), reference.weight_n) <= level).mean()),
    }


def table(repeats: int, n: int, seed: int, null: str = "auto") -> list[dict]:
    """All generators at all pool sizes, then contaminated ones."""
    made = []
    cases = [(name, 0.0) for name in GENERATORS] + [("same as real", share) for share in (0.02, 0.05, 0.1, 1.0)]
    for name, copies in cases:
        real, make = GENERATORS[name]
        for sizes in SIZES:
            runs = [trial(real, make, sizes, n, seed, r, copies, null) for r in range(repeats)]
            mean = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
            error = 1.96 * float(np.std([run["flagged"] for run in runs], ddof=1)) / np.sqrt(repeats)
            made.append(
                {
                    "generator": name,
                    "near_copies": copies,
                    "train": sizes[0],
                    "holdout": sizes[1],
                    "synthetic": n,
                    "repeats": repeats,
                    **mean,
                    "flagged_interval": [mean["flagged"] - error, mean["flagged"] + error],
                    "first_interval": list(clopper_pearson(mean["first"] * repeats, repeats)),
                }
            )
    return made


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--synthetic", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--null", default="auto", choices=("auto", "holdout", "both"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = table(given.repeats, given.synthetic, given.seed, given.null)
    print("| generator | near copies | T / H | level | flagged (95 %) | one row a run (95 %) | convicted |", end="")
    print(" published at 5 % | unscaled |\n|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["flagged_interval"]
        first = f"{row['first']:.1%} ({row['first_interval'][0]:.1%}-{row['first_interval'][1]:.1%})"
        print(
            f"| {row['generator']} | {row['near_copies']:.0%} | {row['train']} / {row['holdout']} | {row['level']:.2%} "
            f"| {row['flagged']:.2%} ({low:.2%}-{high:.2%}) | {first} | {row['convicted']:.1%} "
            f"| {row['published']:.1%} | {row['unscaled']:.2%} |"
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
