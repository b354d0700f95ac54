"""All haplotype models on the same splits of the same people: likelihood of unseen haplotypes, and fidelity beside copying.

    python perf/genomics/compare_models.py DATA/genomics/chr15_10k/train.bcf --map MAP --samples TSV --out runs/models-chr15
    python perf/genomics/compare_models.py DATA/genomics/snp805/train.npz --out runs/models-805

Each seed holds out a fifth of the people (`engine genomics split --seed`), fits every model to the rest, scores the held-out
haplotypes (none of whom any model has seen), makes as many people as were held out and evaluates them against these. One
JSON line per model and seed is added to OUT/rows.jsonl, and what is there is not done again; then the table is printed: mean
over seeds, and in brackets least and most. Configs are those of the repository; `--limit` gives the transformer a cap of steps.

    python perf/genomics/compare_models.py PANEL ... --cross-fit 4 --judged 400 --out runs/cross-fit

says what the mixture of chains has on unseen people when it is fitted to all of PANEL: people fall into folds, all that is
learned (rates, clusters, network) is learned from the other folds alone, and then each person of the fold is scored with the
whole panel but the person to copy from. The probability of a haplotype so depends on nobody's alleles but those of other people
(a test sums it over all sequences of one). `--judged` people at random in all, `--folds` does some folds only;
OUT/cross_fit.jsonl keeps one line per fold, with every haplotype's nats. Printed are the mean and its standard error, and the
gain over plain Li-Stephens, paired.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine import seeding
from engine.genomics import baselines, chains, clusters, li_stephens
from engine.genomics.evaluate import evaluate
from engine.genomics.panel import HaplotypePanel, read_panel
from engine.genomics.relatedness import families
from engine.genomics.split import held_out
from engine.kernels import bits

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "genomics"
FIGURES = ("ld_r", "three_point_r", "pca_w1", "aats_test", "aats_train", "exact_copies", "longest_run_bp")
HOLDOUT = 0.2


def transformer(panel: HaplotypePanel, out: Path, seed: int, limit: int) -> Any:
    """The shipped config, at most `limit` steps."""
    from engine.genomics.transformer.config import load_config
    from engine.genomics.transformer.run import load
    from engine.genomics.transformer.train import train

    config = load_config(CONFIGS / "transformer.yaml", [f"seed={seed}", f"fit.steps={limit}"])
    train(config, lambda: li_stephens.fit(panel, config.copying), out)
    return load(out)


def mixture(panel: HaplotypePanel, seed: int) -> Any:
    """Chains mixed into one likelihood; samples are those of the copying model."""
    return li_stephens.fit(panel, li_stephens.load_config(CONFIGS / "copying_bank.yaml", [f"seed={seed}"]))


def fitter(name: str, known: HaplotypePanel, seed: int, out: Path, limit: int) -> Callable[[], Any]:
    """What fits the model of that name."""
    known_models: dict[str, Callable[[], Any]] = {
        "independent": lambda: baselines.fit_independent(known),
        "markov": lambda: baselines.fit_markov(known),
        "hapnest": lambda: baselines.fit_hapnest(known),
        "li_stephens": lambda: li_stephens.fit(known),
        "clusters": lambda: li_stephens.fit(known, li_stephens.LiStephensConfig(sampler="clusters")),
        "mixture": lambda: mixture(known, seed),
        "transformer": lambda: transformer(known, out / f"transformer-{seed}", seed, limit),
    }
    return known_models[name]


def scored(name: str, model: Any, unseen: HaplotypePanel) -> np.ndarray | None:
    if name == "hapnest":
        return None  # a sampler without a likelihood
    if name == "clusters":  # what its samples are drawn from
        alleles_nl = np.ascontiguousarray(bits.unpack(unseen.bits_lw, unseen.n_haplotypes).T)
        return chains.nats(clusters.foretell(model.cluster_tables.trees, alleles_nl)[0], alleles_nl).sum(axis=1)
    more = {"mixed": True} if name == "mixture" else {}
    return np.asarray(model.log_likelihood(unseen, **more))


def row(name: str, fit: Callable[[], Any], known: HaplotypePanel, unseen: HaplotypePanel, seed: int) -> dict[str, Any]:
    """Fit, score, sample and evaluate one model."""
    began = time.process_time()
    model = fit()
    fitted = time.process_time()
    nats = scored(name, model, unseen)
    made = None if name == "mixture" else model.sample(unseen.n_samples, seed=seed)
    figures: dict[str, Any] = {}
    if made is not None:
        found = evaluate(unseen, made, train=known, seed=seed)
        figures = {f: {"value": found[f].value, "floor": found[f].floor} for f in FIGURES}
    return {
        "model": name, "seed": seed, "reference_haplotypes": known.n_haplotypes, "n": unseen.n_haplotypes,
        "nats": None if nats is None else float(nats.mean()),
        "sem": None if nats is None else float(nats.std(ddof=1) / np.sqrt(len(nats))),
        "fit_cpu_seconds": round(fitted - began, 1), "figures": figures,
    }  # fmt: skip


def fold_of(panel: HaplotypePanel, folds: int, seed: int) -> np.ndarray:
    """int64 (S,): the fold of each person, at random; families stay together."""
    head_of = families(panel)
    heads = sorted(set(head_of.values()))
    at = seeding.generator(seed, "perf.compare_models.folds").permutation(len(heads)) % folds
    place = dict(zip(heads, at.tolist(), strict=True))
    return np.array([place[head_of[name]] for name in panel.samples.ids], np.int64)


def cross_fitted(
    whole: HaplotypePanel, away: np.ndarray, judged: np.ndarray, config: li_stephens.LiStephensConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods of the haplotypes of `judged`, nats, float64 (N,) each: by the mixture, and by plain Li-Stephens.

    Args:
        away: bool (S,), the fold: people of whom nothing is learned. judged: int64, people of the fold.
    """
    model = li_stephens.fit(whole.select(samples=~away), config)
    plain = li_stephens.fit(whole, li_stephens.LiStephensConfig(ne=config.ne, mismatch=config.mismatch))
    complete = replace(
        plain, config=config, mismatch_l=model.mismatch_l, learned_l=model.learned_l, mixture=model.mixture
    )
    unseen = whole.select(samples=judged)
    return (
        complete.log_likelihood(unseen, leave_one_out=True, mixed=True),
        plain.log_likelihood(unseen, leave_one_out=True),
    )


def cross_fit(whole: HaplotypePanel, config: li_stephens.LiStephensConfig, folds: int, only: Sequence[int], judged: int,
              file: Path) -> str:  # fmt: skip
    """Every fold of `only` that is not in `file` yet, one line each; then what all lines say."""
    fold_s = fold_of(whole, folds, config.seed)
    chosen_s = np.zeros(whole.n_samples, bool)
    chosen_s[seeding.generator(config.seed, "perf.compare_models.judged").permutation(whole.n_samples)[:judged]] = True
    read = lambda: [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []  # noqa: E731
    for fold in only:
        if any(r["fold"] == fold for r in read()):
            continue
        began = time.process_time()
        mixed_n, plain_n = cross_fitted(whole, fold_s == fold, np.flatnonzero(chosen_s & (fold_s == fold)), config)
        line = {
            "fold": fold, "folds": folds, "reference_haplotypes": whole.n_haplotypes, "mixed": mixed_n.tolist(),
            "plain": plain_n.tolist(), "cpu_seconds": round(time.process_time() - began, 1),
        }  # fmt: skip
        with file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
    rows = read()
    mixed_n, plain_n = (np.concatenate([r[name] for r in rows]) for name in ("mixed", "plain"))
    said = lambda v: f"{v.mean():.2f} +- {v.std(ddof=1) / len(v) ** 0.5:.2f}"  # noqa: E731
    by_fold = ", ".join(f"{np.mean(r['mixed']) - np.mean(r['plain']):.2f}" for r in rows)
    return (
        f"n = {len(mixed_n)} of {len(rows)} folds: mixture {said(mixed_n)}, plain {said(plain_n)}, "
        f"gain {said(mixed_n - plain_n)} nats per haplotype; by fold {by_fold}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| model | seeds | nats per haplotype | " + " | ".join(FIGURES) + " | CPU s to fit |"]
    lines.append("|---" * (4 + len(FIGURES)) + "|")
    spread = lambda v: "" if not v else f"{np.mean(v):.4g} ({min(v):.4g} to {max(v):.4g})"  # noqa: E731
    for name in dict.fromkeys(r["model"] for r in rows):
        own = [r for r in rows if r["model"] == name]
        nats = [r["nats"] for r in own if r["nats"] is not None]
        sem = f" +- {np.mean([r['sem'] for r in own]):.1f}" if nats else "none"
        cells = [spread([r["figures"][f]["value"] for r in own if f in r["figures"]]) for f in FIGURES]
        lines.append(f"| {name} | {len(own)} | {spread(nats)}{sem} | {' | '.join(cells)} | "
                     f"{np.mean([r['fit_cpu_seconds'] for r in own]):.0f} |")  # fmt: skip
    floors = [
        spread([r["figures"][f]["floor"] for r in rows if f in r["figures"] and r["figures"][f]["floor"] is not None])
        for f in FIGURES
    ]
    return "\n".join([*lines, f"| real (training people) | | | {' | '.join(floors)} | |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("panel", type=Path)
    parser.add_argument("--map", type=Path)
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--models",
        nargs="+",
        default=["independent", "markov", "hapnest", "li_stephens", "clusters", "mixture", "transformer"],
    )
    parser.add_argument("--limit", type=int, default=500, help="steps of the transformer")
    parser.add_argument("--cross-fit", type=int, metavar="FOLDS", help="the mixture fitted to all people, by folds")
    parser.add_argument("--folds", type=int, nargs="+", help="with --cross-fit: these folds, from 0; all without")
    parser.add_argument("--judged", type=int, default=10**9, help="with --cross-fit: people who judge, in all folds")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of copying_bank.yaml")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    whole = read_panel(given.panel, map=given.map, samples_tsv=given.samples)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.cross_fit:
        config = li_stephens.load_config(CONFIGS / "copying_bank.yaml", given.set)
        only = range(given.cross_fit) if given.folds is None else given.folds
        print(cross_fit(whole, config, given.cross_fit, only, given.judged, given.out / "cross_fit.jsonl"))
        return
    file = given.out / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    for name in given.models:
        for seed in given.seeds:
            if any(r["model"] == name and r["seed"] == seed for r in rows):
                continue
            away = held_out(whole, HOLDOUT, seed)
            known, unseen = whole.select(samples=~away), whole.select(samples=away)
            rows.append(row(name, fitter(name, known, seed, given.out, given.limit), known, unseen, seed))
            with file.open("a") as stream:
                stream.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
