"""Cross-fitting of perf/genomics/compare_models.py: no haplotype's probability depends on its own person."""

from __future__ import annotations

import importlib.util
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.genomics.chains import ChainSpec, MixConfig
from engine.genomics.li_stephens import LiStephensConfig
from engine.genomics.panel import panel_from_alleles
from engine.kernels import bits

SPEC = importlib.util.spec_from_file_location(
    "compare_models", Path(__file__).resolve().parents[2] / "perf" / "genomics" / "compare_models.py"
)
compare_models = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compare_models)
BANK = [
    ChainSpec(redrawn=0.01, mismatch=0.4),
    ChainSpec(ne=20_000, parent=0, floor=0.1),
    ChainSpec(redrawn=1.0, mismatch=0.001, parent=0),
]
CONFIG = LiStephensConfig(
    ne=50_000, mismatch=0.01, learn_rounds=1, learn_people=20, learn_prior=5, bank=BANK,
    mix=MixConfig(inputs=[1, 2], hidden=8, held_out=0.2, epochs=2, clusters=[3]),
)  # fmt: skip


def random_panel(people: int, sites: int, seed: int):
    """Alleles without any structure but their frequencies; those of rare ones too, which own carriers would give away."""
    rng = np.random.default_rng(seed)
    alt_l = np.where(np.arange(sites) % 2 == 0, rng.uniform(0.1, 0.9, sites), 0.02)
    x_nl = (rng.random((2 * people, sites)) < alt_l).astype(np.uint8)
    made = panel_from_alleles(x_nl.T.copy(), np.arange(sites) * 20_000 + 1, "1", [f"p{s}" for s in range(people)])
    return made, x_nl, alt_l


def test_probabilities_of_one_haplotype_sum_to_one():
    """Over all 2^4 sequences of it, everybody else given: were anything learned from its own alleles, they would not."""
    panel, x_nl, _ = random_panel(24, 4, 1)
    away = np.arange(24) < 6
    total = 0.0
    for sequence in itertools.product((0, 1), repeat=4):
        alleles_nl = x_nl.copy()
        alleles_nl[3] = sequence  # the second haplotype of person 1
        changed = replace(panel, bits_lw=bits.pack(np.ascontiguousarray(alleles_nl.T)))
        mixed_n, plain_n = compare_models.cross_fitted(changed, away, np.array([1]), CONFIG)
        assert np.isfinite(plain_n).all()
        total += np.exp(mixed_n[1])
    assert total == pytest.approx(1, abs=1e-4)


def test_random_alleles_are_no_likelier_than_independent_sites(tmp_path):
    """The frequencies that made them are the most that can be known; every person judges once, and lines are kept."""
    panel, x_nl, alt_l = random_panel(60, 80, 2)
    file = tmp_path / "cross_fit.jsonl"
    said = compare_models.cross_fit(panel, CONFIG, 3, range(3), 10**9, file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(r["fold"] for r in rows) == [0, 1, 2]
    assert sum(len(r["mixed"]) for r in rows) == 120
    assert "n = 120 of 3 folds" in said
    fold_s = compare_models.fold_of(panel, 3, 0)
    truth_n = np.log(np.where(x_nl == 1, alt_l, 1 - alt_l)).sum(axis=1)
    order = np.concatenate([np.flatnonzero(np.repeat(fold_s == r["fold"], 2)) for r in rows])
    gained_n = np.concatenate([r["mixed"] for r in rows]) - truth_n[order]
    assert gained_n.mean() < 0
    before = file.read_text()
    compare_models.cross_fit(panel, CONFIG, 3, range(3), 10**9, file)  # done: nothing is fitted again
    assert file.read_text() == before
