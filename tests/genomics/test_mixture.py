"""Mixtures of chains: a probability of whole haplotypes, likelier than the best chain, kept in the run folder, scored."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from engine.errors import CorruptRun, UsageError
from engine.genomics import chains, clusters, commands, li_stephens, mixture
from engine.genomics.chains import BankPanel, ChainSpec, MixConfig
from engine.genomics.li_stephens import LiStephensConfig, fit
from engine.genomics.mixture import Mixture
from engine.genomics.panel import panel_from_alleles, write_panel
from engine.kernels import bits

BANK = [
    ChainSpec(redrawn=0.01, mismatch=0.4),
    ChainSpec(ne=20_000, parent=0, floor=0.1),
    ChainSpec(ne=400_000, mismatch=0.02),
    ChainSpec(redrawn=1.0, mismatch=0.001, parent=0),
]


def two_peoples(people: int, sites: int, seed: int):
    """Two groups with frequencies of their own, each a mosaic of eight founders: who they are helps to foretell them."""
    rng = np.random.default_rng(seed)
    alleles_nl = np.empty((2 * people, sites), np.uint8)
    for group in range(2):
        founder_kl = (rng.random((8, sites)) < rng.beta(0.5, 0.5, sites)).astype(np.uint8)
        for n in range(group * people, (group + 1) * people):
            switched = rng.random(sites) < 0.15
            switched[0] = True
            donor = rng.integers(0, 8, sites)[np.maximum.accumulate(np.where(switched, np.arange(sites), 0))]
            alleles_nl[n] = founder_kl[donor, np.arange(sites)] ^ (rng.random(sites) < 0.01)
    order = rng.permutation(people) * 2
    alleles_nl = alleles_nl.reshape(2, people, sites).swapaxes(0, 1).reshape(2 * people, sites)[np.r_[order, order + 1]]
    return panel_from_alleles(alleles_nl.T.copy(), np.arange(sites) * 10_000 + 1, "1", [f"p{s}" for s in range(people)])


def config(**more):
    return LiStephensConfig(
        ne=50_000, mismatch=0.01, bank=BANK, mix=MixConfig(inputs=[1, 2, 3], hidden=8, held_out=0.3, **more)
    )


def any_mixture(sites: int, inputs: list[int], seed: int, trees=()) -> Mixture:
    """Weights at random, so that no part of the network is without effect."""
    rng, c = np.random.default_rng(seed), len(inputs) + len(trees)
    shapes = {"w0": (8, 4 * c + 6), "b0": (8,), "w1": (8, 8), "b1": (8,), "w2": (c + 2, 8), "b2": (c + 2,)}
    weights = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    weights |= {"mean": np.zeros(4 * c + 6, np.float32), "scale": np.full(4 * c + 6, 3, np.float32)}
    return Mixture(BANK, inputs, weights, rng.random(sites).astype(np.float32), 0.0, 0.0, 0, 0.0, trees)


def test_sequences_sum_to_one():
    """Over all 2^7 sequences: weights, temperature and offset of a site look at alleles before it only."""
    rng = np.random.default_rng(0)
    panel = BankPanel(
        bits.pack((rng.random((7, 5)) < 0.5).astype(np.uint8)), 5, np.full(7, 1e-5), np.full(7, 0.01), np.arange(7) == 0
    )
    every_nl = np.array(list(itertools.product((0, 1), repeat=7)), dtype=np.uint8)
    trees = clusters.learn((rng.random((20, 7)) < 0.5).astype(np.uint8), np.arange(7) == 0, 3)
    assert np.exp(any_mixture(7, [1, 2], 4, (trees,)).log_likelihood(panel, every_nl)).sum() == pytest.approx(
        1, abs=1e-5
    )
    made = any_mixture(7, [1, 2, 3], 1)
    nats_n = made.log_likelihood(panel, every_nl)
    assert np.exp(nats_n).sum() == pytest.approx(1, abs=1e-5)
    assert np.ptp(nats_n) > 1
    for site in range(7):  # what is foretold of a site does not change with it, nor with what follows
        changed_nl = every_nl ^ (np.arange(7) >= site).astype(np.uint8)
        seen, others = (
            mixture._seen(mixture._bank(BANK, panel), [1, 2, 3], panel, x, None, mixture._foretold((), x))
            for x in (every_nl, changed_nl)
        )
        np.testing.assert_array_equal(
            made.logits(seen, panel)[:, : site + 1], made.logits(others, panel)[:, : site + 1]
        )


def test_missing_alleles_are_passed_over():
    """The likelihood of a haplotype with gaps is that of its other alleles, in the order they stand in."""
    rng = np.random.default_rng(3)
    panel = BankPanel(
        bits.pack((rng.random((6, 9)) < 0.5).astype(np.uint8)), 9, np.full(6, 1e-5), np.full(6, 0.01), np.arange(6) == 0
    )
    target_nl = (rng.random((4, 6)) < 0.5).astype(np.uint8)
    target_nl[:, 5] = 255
    made = any_mixture(6, [1, 2, 3], 2)
    cut = BankPanel(panel.bits_lw[:5], 9, panel.hazard_l[:5], panel.mismatch_l[:5], panel.contig_start_l[:5])
    shorter = replace(made, hardness_l=made.hardness_l[:5])
    np.testing.assert_allclose(
        made.log_likelihood(panel, target_nl), shorter.log_likelihood(cut, target_nl[:, :5]), atol=1e-5
    )


def test_mixing_is_likelier_than_any_chain_and_starts_as_their_mean():
    """One chain that switches too often and one that knows the people but no stretches, on people not learned from."""
    everybody = two_peoples(130, 60, 5)
    panel, unseen = everybody.select(samples=np.arange(100)), everybody.select(samples=np.arange(100, 130))
    settings = config(epochs=15)
    settings = settings.model_copy(update={"mix": settings.mix.model_copy(update={"inputs": [2, 3]})})
    model, target_nl = fit(panel, settings), unseen.alleles_nl()
    bank = chains.bank(BANK, *model.bank_panel()[2:])
    logit_nlc = chains.predict(bank, model.bits_lw, model.k, target_nl).logit_nlc[:, :, [2, 3]]
    single_nc = chains.nats(logit_nlc, target_nl[:, :, None]).sum(axis=1)
    mixed_n = model.log_likelihood(unseen, mixed=True)
    gained = mixed_n - single_nc[:, single_nc.mean(axis=0).argmax()]
    assert gained.mean() > 0.5
    assert gained.mean() > 3 * gained.std() / len(gained) ** 0.5
    assert model.mixture.held_out_n == 60
    assert abs(model.mixture.held_out_nats - mixed_n.mean()) < 4
    fresh, weights = mixture._network(14, 8, 2, 0), {"mean": np.zeros(14, np.float32), "scale": np.ones(14, np.float32)}
    for i, at in enumerate((0, 2, 4)):
        weights |= {f"w{i}": fresh[at].weight.detach().numpy(), f"b{i}": fresh[at].bias.detach().numpy()}
    start_n = replace(model.mixture, weights=weights).log_likelihood(model.bank_panel(), target_nl)
    np.testing.assert_allclose(start_n, chains.nats(logit_nlc.mean(axis=2), target_nl).sum(axis=1), atol=0.05)


def test_leave_one_out_takes_the_person_out():
    panel = two_peoples(40, 30, 7)
    model = fit(panel, config(epochs=2))
    some = panel.select(samples=np.arange(3))
    within = model.log_likelihood(some, mixed=True)
    left = model.log_likelihood(some, mixed=True, leave_one_out=True)
    assert (within > left).all()
    one, others = panel.select(samples=np.array([0])), panel.select(samples=np.arange(1, 40))
    rest = model.bank_panel()._replace(bits_lw=others.bits_lw, k=78)  # at the same rates only donors differ
    np.testing.assert_allclose(left[:2], model.mixture.log_likelihood(rest, one.alleles_nl()), atol=1e-3)


def test_clusters_are_mixed_in_and_kept(tmp_path):
    """They help where chains do not know whom to copy; the run folder has them; many sites have none."""
    everybody = two_peoples(130, 60, 5)
    panel, unseen = everybody.select(samples=np.arange(100)), everybody.select(samples=np.arange(100, 130))
    without, settings = (
        LiStephensConfig(
            ne=50_000, mismatch=0.01, bank=BANK,
            mix=MixConfig(inputs=[2, 3], hidden=8, held_out=0.3, epochs=6, clusters=sets, cluster_sites=60),
        )
        for sets in ([], [4, 9])
    )  # fmt: skip
    model = fit(panel, settings)
    assert len(model.mixture.trees) == 2
    nats_n = model.log_likelihood(unseen, mixed=True)
    gained_n = nats_n - fit(panel, without).log_likelihood(unseen, mixed=True)
    assert gained_n.mean() > 2 * gained_n.std() / len(gained_n) ** 0.5
    model.save(tmp_path / "run")
    np.testing.assert_array_equal(li_stephens.load(tmp_path / "run").log_likelihood(unseen, mixed=True), nats_n)
    fewer = settings.model_copy(update={"mix": settings.mix.model_copy(update={"cluster_sites": 59, "epochs": 1})})
    assert fit(panel, fewer).mixture.trees == ()


def test_a_run_is_scored_by_its_mixture(tmp_path):
    panel = two_peoples(40, 30, 8)
    model = fit(panel.select(samples=np.arange(30)), config(epochs=2))
    assert np.array_equal(
        model.mixture.weights["w0"], fit(panel.select(samples=np.arange(30)), config(epochs=2)).mixture.weights["w0"]
    )
    model.save(tmp_path / "run")
    loaded = li_stephens.load(tmp_path / "run")
    unseen = panel.select(samples=np.arange(30, 40))
    write_panel(unseen, tmp_path / "unseen.vcf.gz")
    np.testing.assert_array_equal(loaded.log_likelihood(unseen, mixed=True), model.log_likelihood(unseen, mixed=True))
    scored = commands.score_command(tmp_path / "run", tmp_path / "unseen.vcf.gz")
    assert scored["mean_nats"] == pytest.approx(model.log_likelihood(unseen, mixed=True).mean(), abs=1e-6)
    assert scored["mean_nats"] != pytest.approx(model.log_likelihood(unseen).mean(), abs=1e-3)
    with pytest.raises(UsageError, match="without"):
        replace(model, mixture=None).log_likelihood(unseen, mixed=True)
    (tmp_path / "run" / "config.yaml").write_text("ne: 50000.0\n", encoding="utf-8")
    with pytest.raises(CorruptRun, match="mixture"):
        li_stephens.load(tmp_path / "run")


def test_what_does_not_fit_is_refused():
    panel = two_peoples(12, 20, 9)
    with pytest.raises(UsageError, match=r"mix\.inputs"):
        fit(panel, config().model_copy(update={"mix": MixConfig(inputs=[7])}))
    with pytest.raises(UsageError, match="10 people"):
        fit(panel.select(samples=np.arange(5)), config())
    with pytest.raises(UsageError, match="ne or redrawn"):
        fit(panel, config().model_copy(update={"bank": [ChainSpec()], "mix": MixConfig(inputs=[0])}))
