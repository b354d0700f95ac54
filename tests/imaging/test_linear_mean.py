"""The regression on covariates that is taken out of what the flow has to learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import EngineError
from engine.imaging.config import parse_config
from engine.imaging.context import flagged
from engine.imaging.denoiser import Condition
from engine.imaging.flow import SAMPLERS, flow_times, velocity_target
from engine.imaging.generate import load_model, sample
from engine.imaging.linear_mean import Centred, LinearMean
from engine.imaging.train import train
from engine.training import checkpoint

SHAPE = (2, 3, 4, 2)


def conditions(n: int, seed: int, missing: float = 0.0) -> Condition:
    """Two continuous covariates and one of three levels."""
    rng = np.random.default_rng(seed)
    continuous = rng.standard_normal((n, 2)).astype(np.float32)
    level = rng.integers(0, 3, (n, 1))
    continuous[rng.random((n, 2)) < missing] = np.nan
    level[rng.random((n, 1)) < missing] = -1
    return Condition(torch.zeros(n, 3), torch.from_numpy(continuous), torch.from_numpy(level))


def truth(condition: Condition, seed: int = 5) -> torch.Tensor:
    """A mean that is linear in what is given."""
    generator = torch.Generator().manual_seed(seed)
    level, slope = torch.randn(SHAPE, generator=generator), torch.randn((2, *SHAPE), generator=generator)
    by_level = torch.randn((3, *SHAPE), generator=generator)
    own = torch.einsum("bk,kcdhw->bcdhw", condition.continuous_bk.nan_to_num(0.0), slope)
    return level + own + by_level[condition.categorical_bk[:, 0]]


@pytest.fixture
def learned() -> LinearMean:
    known = conditions(200, 1)
    mean = LinearMean([3], 2, SHAPE, earlier=False)
    mean.set(truth(known) + 0.01 * torch.randn(200, *SHAPE, generator=torch.Generator().manual_seed(2)), known)
    return mean


def test_what_is_linear_is_learned_and_noise_is_not(learned: LinearMean) -> None:
    unseen = conditions(50, 3)
    assert (learned(unseen, SHAPE[1:]) - truth(unseen)).abs().max() < 0.02
    noise = torch.randn(200, *SHAPE, generator=torch.Generator().manual_seed(4))
    mean = LinearMean([3], 2, SHAPE, earlier=False)
    ridge = mean.set(noise, conditions(200, 1))
    assert ridge >= 1e4  # nothing to be learned from covariates: their weight goes
    assert (mean(unseen, SHAPE[1:]) - noise.mean(dim=0)).abs().max() < 0.1


def test_it_is_the_ridge_regression_with_the_least_cross_validation_error() -> None:
    """Against the normal equations, and the error of leaving out by the diagonal's mean, both written out."""
    known, rows = conditions(30, 6), 30
    latent = truth(known) + 2.0 * torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(7))
    mean = LinearMean([3], 2, SHAPE, earlier=False)
    chosen = mean.set(latent, known)
    design = np.concatenate([known.continuous_bk.numpy(), np.eye(3)[known.categorical_bk[:, 0].numpy()]], axis=1)
    design = design.astype(np.float64) - design.mean(axis=0)
    y = latent.flatten(1).double().numpy()
    centred = y - y.mean(axis=0)

    def fitted(ridge: float) -> tuple[np.ndarray, float]:
        inverse = np.linalg.inv(design.T @ design + ridge * np.eye(5))
        hat = design @ inverse @ design.T
        left = ((centred - hat @ centred) ** 2).sum()
        return inverse @ design.T @ centred, rows * left / (rows - 1 - np.trace(hat)) ** 2

    error = {ridge: fitted(ridge)[1] for ridge in np.logspace(-2, 5, 29)}
    assert chosen == pytest.approx(min(error, key=error.__getitem__))
    said = mean(known, SHAPE[1:]).flatten(1).numpy()
    np.testing.assert_allclose(said, y.mean(axis=0) + design @ fitted(chosen)[0], atol=1e-4)


def test_what_is_not_given_counts_as_average() -> None:
    known = conditions(300, 8, missing=0.3)
    latent = truth(replace(known, categorical_bk=known.categorical_bk.clamp(min=0)))
    mean = LinearMean([3], 2, SHAPE, earlier=False)
    mean.set(latent, known)
    nothing = known.unguided()
    said = mean(nothing, SHAPE[1:])
    assert said.isfinite().all()
    assert (said - said[:1]).abs().max() == 0  # whoever it is
    given = mean(known, SHAPE[1:])
    without = known.dropped(torch.tensor([[True, False]]), torch.tensor([[False]]))
    effect = given - mean(without, SHAPE[1:])
    here = ~known.continuous_bk[:, 0].isnan()
    assert (effect[~here] == 0).all()
    assert effect[here].abs().max() > 0.1


def test_a_centred_network_is_the_velocity_about_its_mean(learned: LinearMean) -> None:
    """Of x0 ~ N(m(c), s^2) the velocity is known: a network that is right about N(0, s^2) makes the whole right."""
    s, known = 0.7, conditions(9, 9)

    def residual(x: torch.Tensor, t_b: torch.Tensor, condition: Condition) -> torch.Tensor:
        t = t_b.view(-1, 1, 1, 1, 1)
        # E[noise - x0 | x] of jointly normal x0, noise and x = (1 - t) x0 + t noise
        return x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)

    class Exact(torch.nn.Module):
        def forward(self, *arguments):
            return residual(*arguments)

    model = Centred(Exact(), learned)  # type: ignore[arg-type]
    m, generator = learned(known, SHAPE[1:]), torch.Generator().manual_seed(10)
    noise = torch.randn(9, *SHAPE, generator=generator)
    t = torch.linspace(0.05, 0.95, 9)
    place = t.view(-1, 1, 1, 1, 1)
    x0 = m + s * torch.randn(9, *SHAPE, generator=generator)
    x = (1 - place) * x0 + place * noise
    mean_of_x, variance = (1 - place) * m, (1 - place) ** 2 * s**2 + place**2
    wanted = -m + (x - mean_of_x) * (place - (1 - place) * s**2) / variance
    torch.testing.assert_close(model(x, t, known), wanted)
    made = SAMPLERS["heun"](lambda x, t: model(x, t, known), noise, flow_times(200, 1.0))
    torch.testing.assert_close(made, m + s * noise, atol=2e-3, rtol=0)
    assert velocity_target(x0, noise).shape == wanted.shape


def test_a_follow_up_begins_as_its_baseline_moved_by_what_changed() -> None:
    known = conditions(200, 11)
    mean = LinearMean([3], 2, SHAPE, earlier=True)
    mean.set(truth(known), known)
    now, then = conditions(4, 12), conditions(4, 13)
    before = torch.randn(4, *SHAPE)
    given = torch.tensor([True, True, False, True])
    now = replace(now, continuous_bk=now.continuous_bk.clone())
    now.continuous_bk[1, 0] = float("nan")
    both = Condition(
        now.spacing_b3,
        torch.cat([now.continuous_bk, then.continuous_bk], dim=1),
        torch.cat([now.categorical_bk, then.categorical_bk], dim=1),
        torch.cat([torch.ones(4, 2, *SHAPE[1:]), flagged(before, given)], dim=1),  # behind channels of a label map
    )
    said = mean(both, SHAPE[1:])
    alone = LinearMean([3], 2, SHAPE, earlier=False)
    alone.load_state_dict({name: part for name, part in mean.state_dict().items() if name != "rate_jk"})
    torch.testing.assert_close(said[2], alone(now, SHAPE[1:])[2])
    for row in (0, 3):
        change = alone(now, SHAPE[1:])[row] - alone(then, SHAPE[1:])[row]
        torch.testing.assert_close(said[row], before[row] + change, atol=1e-4, rtol=1e-4)
    # a covariate of one time only says nothing of the change
    level_only = replace(now, continuous_bk=torch.stack([then.continuous_bk[:, 0], now.continuous_bk[:, 1]], dim=1))
    change = alone(level_only, SHAPE[1:])[1] - alone(then, SHAPE[1:])[1]
    torch.testing.assert_close(said[1], before[1] + change, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mean(both.within(None), SHAPE[1:])[0], alone(now, SHAPE[1:])[0])


def test_a_normal_distribution_is_drawn_right_by_a_network_that_has_learned_nothing() -> None:
    """Means by covariates, two directions of large variance, white noise: sampled with the network at zero."""
    rng = torch.Generator().manual_seed(20)
    places, known = int(np.prod(SHAPE)), conditions(1500, 21)
    axes = torch.linalg.qr(torch.randn(places, 2, generator=rng))[0].T.reshape(2, *SHAPE)
    score = torch.randn(1500, 2, generator=rng) * torch.tensor([6.0, 3.0])
    latent = truth(known) + torch.einsum("bk,kcdhw->bcdhw", score, axes)
    latent = latent + 0.4 * torch.randn(1500, *SHAPE, generator=rng)
    mean = LinearMean([3], 2, SHAPE, earlier=False, components=2)
    mean.set(latent, known)
    assert mean.deviation_2k is not None
    assert mean.deviation_2k[0].tolist() == pytest.approx([0.4, 6.0, 3.0], rel=0.05)

    class Nothing(torch.nn.Module):
        def forward(self, x: torch.Tensor, t_b: torch.Tensor, condition: Condition) -> torch.Tensor:
            return torch.zeros_like(x)

    model = Centred(Nothing(), mean)  # type: ignore[arg-type]
    asked = conditions(2000, 22)
    noise = torch.randn(2000, *SHAPE, generator=rng)
    made = SAMPLERS["heun"](lambda x, t: model(x, t, asked), noise, flow_times(100, 1.0)) - truth(asked)
    along = torch.einsum("bcdhw,kcdhw->bk", made, axes)
    assert along.std(dim=0).tolist() == pytest.approx([6.0, 3.0], rel=0.06)
    rest = made - torch.einsum("bk,kcdhw->bcdhw", along, axes)
    assert float(rest.square().sum() / (2000 * (places - 2))) ** 0.5 == pytest.approx(0.4, rel=0.05)


def test_a_follow_up_changes_as_much_as_people_do() -> None:
    """Pairs of scans of a person: a change by the covariate, more along one direction, some noise; network at zero."""
    rng = torch.Generator().manual_seed(30)
    places, n = int(np.prod(SHAPE)), 1000
    axes = torch.linalg.qr(torch.randn(places, 2, generator=rng))[0].T.reshape(2, *SHAPE)
    one = conditions(n, 31)
    other = replace(one, continuous_bk=one.continuous_bk + torch.tensor([0.5, 0.0]))
    own = torch.einsum("bk,kcdhw->bcdhw", torch.randn(n, 2, generator=rng) * torch.tensor([6.0, 4.0]), axes)
    change = torch.einsum("bk,kcdhw->bcdhw", torch.randn(n, 1, generator=rng) * 0.8, axes[:1])
    change = change + 0.1 * torch.randn(n, *SHAPE, generator=rng)
    first, second = truth(one) + own, truth(other) + own + change
    both = Condition(
        torch.zeros(2 * n, 3),
        torch.cat([one.continuous_bk, other.continuous_bk]),
        torch.cat([one.categorical_bk, other.categorical_bk]),
    )
    mean = LinearMean([3], 2, SHAPE, earlier=True, components=2)
    mean.set(torch.cat([first, second]), both, [[(k + n) % (2 * n)] for k in range(2 * n)])
    assert mean.deviation_2k is not None
    assert mean.deviation_2k[1, 1].item() == pytest.approx((0.8**2 + 0.1**2) ** 0.5, rel=0.05)
    assert mean.deviation_2k[1, [0, 2]].tolist() == pytest.approx([0.1, 0.1], rel=0.1)

    class Nothing(torch.nn.Module):
        def forward(self, x: torch.Tensor, t_b: torch.Tensor, condition: Condition) -> torch.Tensor:
            return torch.zeros_like(x)

    model = Centred(Nothing(), mean)  # type: ignore[arg-type]
    asked = replace(
        other,
        continuous_bk=torch.cat([other.continuous_bk, one.continuous_bk], dim=1),
        categorical_bk=torch.cat([other.categorical_bk, one.categorical_bk], dim=1),
        context_bcdhw=flagged(first, torch.ones(n, dtype=torch.bool)),
    )
    noise = torch.randn(n, *SHAPE, generator=rng)
    made = SAMPLERS["heun"](lambda x, t: model(x, t, asked), noise, flow_times(100, 1.0))
    beyond = made - first - (truth(other) - truth(one))
    along = torch.einsum("bcdhw,kcdhw->bk", beyond, axes)
    assert along.std(dim=0).tolist() == pytest.approx([0.806, 0.1], rel=0.15)  # steps of 0.01 for a deviation of 0.1
    same = replace(asked, continuous_bk=torch.cat([one.continuous_bk, one.continuous_bk], dim=1))
    assert (mean.pull(noise, torch.full((n,), 0.5), same) == 0).all()  # nothing changes


@pytest.mark.parametrize("components", [0, 2])
def test_who_changes_faster_is_learned_from_few_pairs(components: int) -> None:
    """Level 2 changes three times as fast along what the first covariate does; learned from 60 pairs among 400 scans."""
    rng = torch.Generator().manual_seed(40)
    one = conditions(340, 41)
    pairs = 60
    years = 0.2 + torch.rand(pairs, generator=rng)
    later = one.rows(torch.arange(pairs))
    later = replace(later, continuous_bk=later.continuous_bk + torch.stack([years, torch.zeros(pairs)], dim=1))
    slope = truth(replace(one.rows(torch.tensor([0])), continuous_bk=torch.tensor([[1.0, 0.0]])))
    slope = (slope - truth(replace(one.rows(torch.tensor([0])), continuous_bk=torch.zeros(1, 2))))[0]

    def grown(who: Condition, years: torch.Tensor) -> torch.Tensor:
        return (2.0 * years * (who.categorical_bk[:, 0] == 2)).view(-1, 1, 1, 1, 1) * slope

    own = torch.randn(340, *SHAPE, generator=rng)
    first = truth(one) + own
    second = truth(later) + own[:pairs] + grown(later, years) + 0.3 * torch.randn(pairs, *SHAPE, generator=rng)
    both = Condition(
        torch.zeros(400, 3),
        torch.cat([one.continuous_bk, later.continuous_bk]),
        torch.cat([one.categorical_bk, later.categorical_bk]),
    )
    others = [[k + 340] if k < pairs else [k - 340] if k >= 340 else [k] for k in range(400)]
    mean = LinearMean([3], 2, SHAPE, earlier=True, components=components)
    mean.set(torch.cat([first, second]), both, others)
    then = conditions(90, 42)
    now = replace(then, continuous_bk=then.continuous_bk + torch.tensor([1.0, 0.0]))
    before = torch.randn(90, *SHAPE, generator=rng)
    asked = replace(
        now,
        continuous_bk=torch.cat([now.continuous_bk, then.continuous_bk], dim=1),
        categorical_bk=torch.cat([now.categorical_bk, then.categorical_bk], dim=1),
        context_bcdhw=flagged(before, torch.ones(90, dtype=torch.bool)),
    )
    made = (mean(asked, SHAPE[1:]) - before).flatten(1) @ slope.flatten() / slope.square().sum()
    fast = then.categorical_bk[:, 0] == 2
    assert made[fast].mean().item() == pytest.approx(3.0, rel=0.15)
    assert made[~fast].mean().item() == pytest.approx(1.0, rel=0.3)
    assert mean.rate_jk is not None
    mean.rate_jk.data.zero_()
    without = (mean(asked, SHAPE[1:]) - before).flatten(1) @ slope.flatten() / slope.square().sum()
    assert abs(without[fast].mean() - without[~fast].mean()) < 0.01  # it was the rates
    still = replace(asked, continuous_bk=torch.cat([then.continuous_bk, then.continuous_bk], dim=1))
    torch.testing.assert_close(mean(still, SHAPE[1:]), before)  # no time, no change
    if components:
        assert mean.deviation_2k is not None
        assert mean.deviation_2k[1, 0].item() == pytest.approx(0.3, rel=0.2)


def test_fewer_components_where_there_are_few_scans_and_any_size() -> None:
    known = conditions(6, 23)
    mean = LinearMean([3], 2, SHAPE, earlier=True, components=9)
    mean.set(torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(24)), known)
    assert mean.deviation_2k is not None
    assert mean.deviation_2k.isfinite().all()
    assert int((mean.deviation_2k[0, 1:] > 0).sum()) <= 5
    x, t = torch.randn(2, *SHAPE), torch.tensor([0.3, 0.0])
    pulled = mean.pull(x, t, conditions(2, 25))
    torch.testing.assert_close(pulled[1], -x[1])  # where all noise is gone, what is left of it points away
    assert mean.pull(torch.randn(2, 2, 6, 8, 4), t, conditions(2, 25)).isfinite().all()


def test_a_mean_in_mixed_precision_is_that_in_full(learned: LinearMean) -> None:
    """What rounding to bf16 would add, the network would have to learn; the pull of the components likewise."""
    unseen = conditions(50, 3)
    mean = LinearMean([3], 2, SHAPE, earlier=False, components=2)
    known = conditions(200, 1)
    mean.set(truth(known) + torch.randn(200, *SHAPE, generator=torch.Generator().manual_seed(2)), known)
    x, t = torch.randn(50, *SHAPE, generator=torch.Generator().manual_seed(8)), torch.full((50,), 0.5)
    full = learned(unseen, SHAPE[1:]), mean.pull(x, t, unseen)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = learned(unseen, SHAPE[1:]), mean.pull(x, t, unseen)
    for a, b in zip(full, mixed, strict=True):
        assert torch.equal(a, b)


def test_another_size_takes_maps_between(learned: LinearMean) -> None:
    known = conditions(3, 14)
    larger = learned(known, (6, 8, 4))
    assert larger.shape == (3, 2, 6, 8, 4)
    back = torch.nn.functional.interpolate(larger, size=SHAPE[1:], mode="trilinear")
    assert torch.corrcoef(torch.stack([back.flatten(), learned(known, SHAPE[1:]).flatten()]))[0, 1] > 0.8


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_it_is_trained_saved_and_sampled_with_the_run(tiny_config, table: Path, tmp_path: Path, network: str) -> None:
    """After steps that teach the network nothing, volumes already differ as the covariate says; maps are not trained."""
    values = tiny_config.model_dump()
    values["flow"] |= {"linear_mean": True, "components": 3, "steps": 2, "network": network, "learning_rate": 1e-9}
    config = parse_config(values)
    train(config, table, tmp_path / "run")
    model = load_model(tmp_path / "run")
    assert isinstance(model.denoiser, Centred)
    parts, _ = checkpoint.load(tmp_path / "run")
    for part in ("denoiser", "ema"):
        torch.testing.assert_close(
            parts[part]["mean.weight_kcdhw"], model.denoiser.mean.weight_kcdhw.detach(), rtol=0, atol=0
        )
    slopes = model.denoiser.mean.weight_kcdhw[1:]
    assert slopes.abs().max() > 0
    name = next(c.name for c in model.covariates if c.kind == "continuous")
    low, high = next((c.low, c.high) for c in model.covariates if c.name == name)
    one, other = (next(iter(sample(model, 1, seed=1, covariates={name: value})))[1].array_cdhw for value in (low, high))
    assert np.abs(one - other).max() > 0
    changed = model.denoiser.mean.weight_kcdhw.data.zero_()
    assert changed.abs().max() == 0
    level, again = (
        next(iter(sample(model, 1, seed=1, covariates={name: value})))[1].array_cdhw for value in (low, high)
    )
    assert np.abs(level - again).max() < 0.05 * np.abs(one - other).max()  # it was the maps that told them apart


def test_it_is_for_one_grid_and_not_for_privacy(tiny_config) -> None:
    values = tiny_config.model_dump()
    with pytest.raises(EngineError, match="linear_mean leaves"):
        parse_config({**values, "flow": {**values["flow"], "components": 2}})
    values["flow"]["linear_mean"] = True
    grids = {**values, "data": {**values["data"], "spacing_mm": [1, 1, 1],
                                "further_grids": [{"size": values["data"]["size"], "spacing_mm": [2, 2, 2]}]}}  # fmt: skip
    with pytest.raises(EngineError, match="further_grids"):
        parse_config(grids)
    with pytest.raises(EngineError, match="linear_mean"):
        parse_config({**values, "privacy": {"base": "run", "epsilon": 3.0, "steps": 5}})
