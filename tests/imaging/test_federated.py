"""Scans at two sites: equal shards learn what central training learns, nothing but declared sums and weights leaves, and the
common model is a run folder like any other.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.errors import EngineError, InputError, Unsupported, UsageError
from engine.imaging.config import apply_overrides, parse_config
from engine.imaging.dataset import learn_covariates, read_table
from engine.imaging.federated import (
    STAGES,
    Local,
    ScanSite,
    check_config,
    covariates_of,
    first_state,
    write_run,
)  # fmt: skip
from engine.imaging.generate import load_model, sample
from engine.imaging.volume import Volume, write_volume
from engine.training.federated import outgoing, total, weighted_mean


@pytest.fixture(scope="module")
def config(tiny_config):
    changes = [
        "data.spacing_mm=[2,2,2]", "data.holdout_share=0.3", "data.covariates.sex.levels=[F,M]", "training.gradient_clip=1e9",
        "flow.views=1", "autoencoder.batch_size=64", "flow.batch_size=64",
    ]  # fmt: skip
    return parse_config(apply_overrides(tiny_config.model_dump(mode="json"), changes))


@pytest.fixture(scope="module")
def rows(config, tmp_path_factory):
    """Boxes in noise: scans of 18 people; ids and names are canaries."""
    folder = tmp_path_factory.mktemp("federated")
    lines = ["image,subject,age,sex"]
    for k in range(18):
        array = np.random.default_rng(k).random((1, 16, 16, 16), dtype=np.float32) * 4
        array[0, 4:12, 4:12, 3 + k % 4 : 12] += 80 + 5 * (k % 5)
        write_volume(Volume(array, np.diag([2.0, 2, 2, 1]), "MR", "arbitrary", {}), folder / f"CANARY{k}.nii.gz")
        lines.append(f"CANARY{k}.nii.gz,CANARY-{k},{'' if k == 3 else 20.5 + k},{'MF'[k % 2]}")
    (folder / "volumes.csv").write_text("\n".join(lines) + "\n")
    return read_table(folder / "volumes.csv", config.data)


def split(rows):
    """Two shards of equally many training scans."""
    train, holdout = [r for r in rows if r.train], [r for r in rows if not r.train]
    half = len(train) // 2
    return [*train[:half], *holdout[::2]], [*train[half : 2 * half], *holdout[1::2]]


def federate(config, sites, rounds, local_rounds=1):
    """All stages among sites in one process, averaged by `engine.training.federated`; sums, states and what was refused."""
    weights, made = {}, {}
    for stage in STAGES:
        for site in sites.values():
            site.stage = stage
        first = next(iter(sites.values()))
        if stage in ("data", "latents"):
            declared = first.stats_declared()
            made[stage] = total({n: outgoing(s.local_stats(), declared) for n, s in sites.items()}, declared).tensors
            if stage == "data":
                weights = {n: float(s.local_stats()["scans"][0]) for n, s in sites.items()}
            for site in sites.values():
                site.set_stats(made[stage])
            continue
        known = covariates_of(config, made["data"])
        made[stage] = first_state(config, stage, known)
        for number in range(rounds):
            replies = {}
            for name, site in sites.items():
                site.set_state(made[stage])
                replies[name] = outgoing(site.fit(number), site.state_declared())
            made[stage] = weighted_mean(replies, weights, first.state_declared()).tensors
        for site in sites.values():
            site.set_state(made[stage])
    return made


SGD = Local(steps=1, optimizer="sgd", learning_rate=0.05)


def test_equal_shards_learn_what_central_training_learns(config, rows):
    """One step of gradient descent on everything, at two sites and averaged, is that step on the union: same draws, same
    mean. Tolerances are those of the order of summation, and far below what the steps move.
    """
    left, right = split(rows)
    shards = [[r for r in side if r.train] for side in (left, right)]
    n = len(shards[0])
    assert n == len(shards[1]) >= 5
    central = {"all": ScanSite(config, "", "all", SGD, rows=[*shards[0], *shards[1]], first_draw=0)}
    apart = {
        "a": ScanSite(config, "", "a", SGD, rows=shards[0], first_draw=0),
        "b": ScanSite(config, "", "b", SGD, rows=shards[1], first_draw=n),  # where the union has its second half
    }
    one, two = federate(config, central, 2), federate(config, apart, 2)
    for stage in ("data", "latents"):
        for name in one[stage]:
            np.testing.assert_allclose(two[stage][name], one[stage][name], rtol=1e-4, atol=1e-4)
    known = covariates_of(config, one["data"])
    for stage in ("autoencoder", "flow"):
        start = first_state(config, stage, known)
        for name, tensor in one[stage].items():
            moved = np.abs(tensor - start[name]).max()
            assert np.abs(two[stage][name] - tensor).max() <= 1e-3 * moved + 1e-6, (stage, name)
        assert max(np.abs(tensor - start[name]).max() for name, tensor in one[stage].items()) > 1e-3, "it learned"
    exact = learn_covariates([r for side in shards for r in side], config.data, "union")
    assert [c.mean for c in known] == pytest.approx([c.mean for c in exact])
    assert [c.deviation for c in known] == pytest.approx([c.deviation for c in exact])
    assert [c.levels for c in known] == [c.levels for c in exact]


def test_unequal_shards_are_weighted_by_their_scans_and_the_model_can_be_sampled(config, rows, tmp_path):
    train, holdout = [r for r in rows if r.train], [r for r in rows if not r.train]
    sites = {
        "big": ScanSite(config, "", "big", Local(steps=2), rows=[*train[:-5], *holdout]),
        "small": ScanSite(config, "", "small", Local(steps=2), rows=train[-5:]),
    }
    made = federate(config, sites, 2)
    assert float(made["data"]["scans"][0]) == len(train)
    figures, losses_b = sites["big"].evaluate(), sites["big"].losses(draws=3)
    assert figures["n"] == len(holdout) == len(losses_b)
    assert 0 < figures["velocity_mse"] < 10
    assert figures["velocity_mse"] == pytest.approx(sites["big"].losses().mean())
    assert not np.allclose(losses_b, sites["big"].losses()), "three draws of noise are not one"
    with pytest.raises(UsageError, match="kept out"):
        sites["small"].losses()
    assert sites["small"].evaluate() == {"n": 0.0}
    run = write_run(tmp_path / "run", config, made["data"], made["latents"], made["autoencoder"], made["flow"],
                    {"autoencoder": 2, "flow": 2})  # fmt: skip
    model = load_model(run, "cpu")
    volumes = [volume for _, volume, _ in sample(model, 2, seed=1, covariates={"age": 30, "sex": "F"})]
    assert volumes[0].shape_dhw == (16, 16, 16)
    assert np.isfinite(volumes[0].array_cdhw).all()
    said = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert b"CANARY" not in said
    with pytest.raises(UsageError, match="an existing one"):
        write_run(run, config, made["data"], made["latents"], made["autoencoder"], made["flow"], {})


def test_a_repeated_round_is_the_same_round_and_another_is_not(config, rows):
    site = ScanSite(config, "", "a", Local(steps=1), rows=rows)
    site.stage = "autoencoder"
    start = site.get_state()
    first = site.fit(0)
    site.set_state(start)
    again = site.fit(0)
    site.set_state(start)
    other = site.fit(1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


def test_only_weights_and_sums_leave(config, rows):
    """Every array that leaves has the shape of a weight or of a sum, and none of the smallest or largest ages is among them."""
    site = ScanSite(config, "", "CANARY-hospital", rows=rows)
    people, ages = site.people, [float(r.covariates["age"]) for r in rows if r.train and r.covariates["age"]]
    stats = outgoing(site.local_stats(), site.stats_declared())
    assert set(stats) == {"scans", "people", "centre_mm", "covariate.age"}
    assert max(array.size for array in stats.values()) == 3
    numbers = {float(x) for array in stats.values() for x in array.ravel()}
    assert not numbers & {min(ages), max(ages)}
    (age, _) = covariates_of(config, stats)
    assert age.low < min(ages) or age.high > max(ages) or age.low not in ages
    site.set_stats(stats)
    for stage in ("autoencoder", "flow"):
        site.stage = stage
        state = site.get_state()
        shapes = {name: tuple(p.shape) for name, p in site._network().state_dict().items()}
        assert {name: array.shape for name, array in state.items()} == shapes == dict(site.state_declared())
        assert not any(people in array.shape and name not in shapes for name, array in state.items())
    site.stage = "flow"
    spoiled = {**site.get_state(), "scans": np.ones(3, np.float32)}
    with pytest.raises(InputError, match="1 others"):
        outgoing(spoiled, site.state_declared())


def test_a_common_state_of_another_shape_or_with_nan_changes_nothing(config, rows):
    site = ScanSite(config, "", "a", rows=rows)
    site.stage = "autoencoder"
    before = site.get_state()
    name = next(name for name, array in before.items() if array.ndim > 1)
    for wrong in (before[name][..., :1], np.full_like(before[name], np.nan)):
        with pytest.raises(InputError, match="exactly the arrays"):
            site.set_state({**before, name: wrong})
        assert all(np.array_equal(before[key], value) for key, value in site.get_state().items())


def test_what_cannot_be_shared_is_refused(config, rows):
    for change, error in [
        ("data.spacing_mm=null", UsageError), ("data.covariates.sex.levels=null", UsageError),
        ("autoencoder.adversarial_weight=0.1", Unsupported), ("flow.baseline=true", Unsupported),
    ]:  # fmt: skip
        with pytest.raises(error):
            check_config(parse_config(apply_overrides(config.model_dump(mode="json"), [change])))
    with pytest.raises(InputError, match="at least 5 people"):
        ScanSite(config, "", "a", rows=[replace(r, train=True) for r in rows[:4]])
    site = ScanSite(config, "", "a", rows=rows)
    with pytest.raises(EngineError, match="a stage with a state"):
        site.get_state()
    site.stage = "flow"
    with pytest.raises(EngineError, match="statistics of stage data first"):
        site.get_state()
