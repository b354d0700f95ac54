"""Differentially private fine-tuning: clipping, noise and account by brute force and by formula; what is refused."""

from __future__ import annotations

import csv
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from engine.errors import EngineError, InputError, Unsupported, UsageError
from engine.imaging import private
from engine.imaging.config import parse_config
from engine.imaging.denoiser import Condition
from engine.imaging.generate import load_model, sample
from engine.imaging.train import train
from engine.imaging.volume import Volume, write_volume
from engine.training import checkpoint
from engine.training.preemption import Preempted

PRIVACY = {"noise_multiplier": 1.0, "delta": 0.01, "people_per_step": 4, "steps": 4, "draws": 2, "rank": 2}


@pytest.fixture(scope="module")
def private_table(tmp_path_factory):
    """Ten scans of nine people whom the base has not seen."""
    folder = tmp_path_factory.mktemp("private")
    with (folder / "volumes.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "subject", "age", "sex"])
        for k in range(10):
            array = 80 * np.random.default_rng(k).random((1, 16, 16, 16), dtype=np.float32)
            write_volume(Volume(array, np.diag([2.0, 2.0, 2.0, 1.0]), "MR"), folder / f"scan{k}.nii.gz")
            writer.writerow([f"scan{k}.nii.gz", f"Q{max(k, 1)}", 30 + k, "MF"[k % 2]])
    return folder / "volumes.csv"


@pytest.fixture
def config(tiny_config, tiny_run):
    """The config of a private run over `tiny_run`, with entries of sections changed."""

    def made(**privacy):
        values = tiny_config.model_dump()
        values["data"]["holdout_share"] = 0.0
        return parse_config({**values, "privacy": {"base": str(tiny_run), **PRIVACY, **privacy}})

    return made


# --- account ----------------------------------------------------------------------------------------------------------


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """Balle and Wang, ICML 2018, theorem 5, sensitivity 1."""
    return norm.cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * norm.cdf(-0.5 / sigma - epsilon * sigma)


@pytest.mark.parametrize(("sigma", "steps"), [(2.0, 1), (4.0, 9)])
def test_epsilon_without_sampling_is_that_of_the_gaussian_mechanism(sigma, steps):
    """With everybody in every step, n steps are one Gaussian of deviation sigma / sqrt(n)."""
    found = private.epsilon([(sigma, 1.0, steps)], 1e-5)
    assert gaussian_delta(found, sigma / math.sqrt(steps)) <= 1e-5  # an upper bound
    assert gaussian_delta(found - 0.05, sigma / math.sqrt(steps)) > 1e-5  # and a tight one


def test_epsilon_is_the_accountants_and_below_the_renyi_bound():
    from opacus.accountants import PRVAccountant, RDPAccountant

    prv, rdp, history = PRVAccountant(), RDPAccountant(), []
    for _ in range(30):
        prv.step(noise_multiplier=1.1, sample_rate=0.05)
        rdp.step(noise_multiplier=1.1, sample_rate=0.05)
        history = private.account(history, 1.1, 0.05)
    assert history == [(1.1, 0.05, 30)]
    assert private.epsilon(history, 1e-5) == prv.get_epsilon(1e-5)
    assert private.epsilon(history, 1e-5) < rdp.get_epsilon(1e-5)
    assert private.account(history, 2.0, 0.05) == [(1.1, 0.05, 30), (2.0, 0.05, 1)]
    assert private.epsilon([], 1e-5) == 0.0
    assert private.epsilon([(300.0, 0.4, 4)], 0.01) == 0.0  # delta alone covers it; never negative


def test_noise_meets_the_budget(config):
    rules = config(noise_multiplier=None, epsilon=3.0).privacy
    sigma = private.noise_multiplier(rules, 0.2)
    assert 2.9 < private.epsilon([(sigma, 0.2, rules.steps)], rules.delta) <= 3.0
    assert private.noise_multiplier(config().privacy, 0.2) == 1.0


# --- mechanism --------------------------------------------------------------------------------------------------------


def test_clipping_against_a_loop():
    """Without noise: each person's tensors together have at most the clipping norm; short ones stay as they are."""
    rng = np.random.default_rng(0)
    gradients = [torch.from_numpy(rng.standard_normal((5, 3, 2))), torch.from_numpy(rng.standard_normal((5, 4)))]
    gradients[0][1] *= 0.01
    gradients[1][1] *= 0.01
    expected = [torch.zeros(3, 2).double(), torch.zeros(4).double()]
    for person in range(5):
        length = math.sqrt(sum(float((g[person] ** 2).sum()) for g in gradients))
        assert (length < 1.5) == (person == 1)
        for total, g in zip(expected, gradients):
            total += g[person] * min(1.0, 1.5 / length)
    found = private.noisy_sum(gradients, 1.5, 0.0, rng)
    assert all(torch.allclose(f, e) for f, e in zip(found, expected))


def test_one_person_moves_the_sum_by_at_most_the_clipping_norm():
    """Also one whose gradient is huge or not finite, over all tensors together."""
    rng = np.random.default_rng(1)
    others = [torch.randn(4, 6), torch.randn(4, 2, 2)]
    before = private.noisy_sum(others, 0.7, 0.0, rng)
    for value in (1e20, 3.0, math.nan, math.inf):
        joined = [torch.cat([g, torch.full((1, *g.shape[1:]), value)]) for g in others]
        after = private.noisy_sum(joined, 0.7, 0.0, rng)
        moved = math.sqrt(sum(float((a - b).double().square().sum()) for a, b in zip(after, before)))
        assert moved <= 0.7 * (1 + 1e-5), value
        assert moved > 0.69 or not math.isfinite(value)


def test_noise_has_the_stated_deviation_and_needs_nobody():
    empty = [torch.zeros(0, 200, 100)]
    one = private.noisy_sum(empty, 2.0, 1.5, np.random.default_rng(2))[0]
    other = private.noisy_sum(empty, 2.0, 1.5, np.random.default_rng(3))[0]
    assert float(one.std()) == pytest.approx(3.0, rel=0.03)
    assert abs(float(one.mean())) < 0.1
    assert not torch.equal(one, other)
    assert abs(float((one * other).mean())) < 0.3  # two draws have nothing in common


@pytest.mark.parametrize("part", ["adapters", "condition"])
def test_gradients_of_people_against_backward_one_by_one(config, tiny_run, part):
    """`torch.func` gives what plain autograd gives for each person by itself, through attention and missing covariates."""
    base = load_model(tiny_run, "cpu")
    torch.manual_seed(0)
    for parameter in base.denoiser.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # away from zero-initialised layers
    learned = private.Learned(base.denoiser, config(part=part).privacy, 0)
    for parameter in learned.tensors.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    shape = (3, 2, 2, 4, 4, 4)
    x0, noise, t = torch.randn(shape), torch.randn(shape), torch.rand(3, 2)
    given = Condition(torch.zeros(3, 3), torch.tensor([[0.3], [math.nan], [-1.0]]), torch.tensor([[0], [1], [-1]]))
    found = learned.per_person(x0, noise, t, given)
    tensors = list(learned.tensors.parameters())
    assert len(found) == len(tensors) > 0
    for person in range(3):
        only = given.rows(torch.tensor([person]))
        loss = learned.loss(
            tensors, x0[person], noise[person], t[person], only.spacing_b3, only.continuous_bk, only.categorical_bk
        )
        for g, expected in zip(found, torch.autograd.grad(loss, tensors)):
            assert torch.allclose(g[person], expected, rtol=1e-3, atol=1e-6)
    assert any(float(g.abs().max()) > 1e-4 for g in found)


def test_a_person_gives_one_gradient_however_many_scans(private_table, config):
    rows = private.read_table(private_table, config().data)
    people = private.by_person(rows)
    assert sorted(map(len, people)) == [1] * 8 + [2]
    rng = np.random.default_rng(0)
    twice = max(people, key=len)
    assert {private.scan_of(twice, rng) for _ in range(50)} == {*twice}


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["adapters", "condition"])
def test_a_private_run(config, private_table, tiny_run, tmp_path, part):
    result = train(config(part=part), private_table, tmp_path / "run")
    assert not (tmp_path / "run" / "cache").exists()
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert record["privacy"] == result["privacy"]
    privacy = record["privacy"]
    assert privacy["epsilon"] == pytest.approx(private.epsilon([(1.0, 4 / 9, 4)], 0.01), abs=1e-3)
    assert (privacy["steps"], privacy["people"], privacy["scans"], privacy["unit"]) == (4, 9, 10, "person")
    assert str(tiny_run.parent) not in json.dumps(record)  # the base by name only
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert not [key for event in log for key in event if "loss" in key or "mse" in key]
    assert log[-1]["epsilon"] == privacy["epsilon"]

    before, after = load_model(tiny_run, "cpu"), load_model(tmp_path / "run", "cpu")
    changed = {
        n for (n, a), b in zip(before.denoiser.named_parameters(), after.denoiser.parameters()) if not torch.equal(a, b)
    }
    assert changed
    if part == "condition":
        assert all(name.startswith(private.CONDITION) for name in changed)
    else:
        assert all(name.split(".")[-2] in private.ADAPTED for name in changed)
    assert after.covariates == before.covariates
    assert after.facts["latent_mean_c"] == before.facts["latent_mean_c"]
    assert "/" not in after.config.privacy.base
    _, volume, _ = next(iter(sample(after, 1, covariates={"sex": "F"})))
    assert np.isfinite(volume.array_cdhw).all()

    train(config(part=part), private_table, tmp_path / "again")
    weights = [checkpoint.load(tmp_path / name)[0]["learned"] for name in ("run", "again")]
    assert not all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])  # noise is nobody's to repeat


def test_resume_keeps_the_account_and_refuses_without_it(config, private_table, tmp_path):
    def interrupt(what, done, total):
        if what == "private" and done >= 50:
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(Preempted):
        train(config(), private_table, tmp_path / "run", progress=interrupt)
    path = checkpoint.folder_of(tmp_path / "run", 2) / "state.json"
    whole = json.loads(path.read_text())
    assert whole["accountant"] == [[1.0, 4 / 9, 2]]
    for broken in ({**whole, "accountant": [[1.0, 4 / 9, 1]]}, {k: v for k, v in whole.items() if k != "accountant"}):
        path.write_text(json.dumps(broken))
        with pytest.raises(EngineError, match="not accounted"):
            train(config(), private_table, tmp_path / "run", resume=True)
    path.write_text(json.dumps(whole))
    with pytest.raises(UsageError, match="differs in privacy"):
        train(config(noise_multiplier=0.5), private_table, tmp_path / "run", resume=True)
    result = train(config(), private_table, tmp_path / "run", resume=True)
    assert result["privacy"]["steps"] == 4
    assert checkpoint.load(tmp_path / "run")[1]["accountant"] == [[1.0, 4 / 9, 4]]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"sampling": "shuffle"}, "independent draws"),
        ({"unit": "scan"}, "10 scans of 9 people"),
        ({"delta": 0.2}, "below 1 / 9 people"),
        ({"people_per_step": 10}, "at most 9"),
    ],
)
def test_unsound_settings_are_refused_before_anything_is_written(config, private_table, tmp_path, changed, says):
    with pytest.raises(UsageError, match=says):
        train(config(**changed), private_table, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_scan_that_cannot_be_read_leaves_no_folder(config, private_table, tmp_path):
    (tmp_path / "bad.nii.gz").write_bytes(b"no scan")
    (tmp_path / "bad.csv").write_text("image,subject,age,sex\n" + "".join(f"bad.nii.gz,P{k},40,F\n" for k in range(9)))
    with pytest.raises(InputError, match="row 2"):
        train(config(), tmp_path / "bad.csv", tmp_path / "run")
    (tmp_path / "odd.csv").write_text(
        private_table.read_text().replace(",M", ",X").replace("scan", f"{private_table.parent}/scan")
    )
    with pytest.raises(InputError, match="'sex' in"):
        train(config(), tmp_path / "odd.csv", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_base_that_saw_the_private_scans_is_refused(config, table, tmp_path):
    with pytest.raises(InputError, match="has not seen"):
        train(config(), table, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bases_that_cannot_be_public_are_refused(config, private_table, tiny_config, tiny_run, tmp_path):
    train(config(steps=1), private_table, tmp_path / "first")
    with pytest.raises(UsageError, match="add up"):
        train(config(base=str(tmp_path / "first")), private_table, tmp_path / "second")
    other = config()
    other = other.model_copy(update={"flow": other.flow.model_copy(update={"dropout": 0.5})})
    with pytest.raises(UsageError, match="flow of the base"):
        train(other, private_table, tmp_path / "second")
    for changes in ({"size": (32, 16, 16)}, {"covariates": {}}, {"mr_percentile": 90.0}):
        data = config().data.model_copy(update=changes)
        with pytest.raises(UsageError, match="data section of the base"):
            train(config().model_copy(update={"data": data}), private_table, tmp_path / "second")
    (tmp_path / "silent").mkdir()
    for name in ("config.yaml", "checkpoints"):
        (tmp_path / "silent" / name).symlink_to(tiny_run / name)
    with pytest.raises(EngineError, match=r"provenance\.json lists"):
        train(config(base=str(tmp_path / "silent")), private_table, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_batch_statistics_and_bf16_are_refused(config, private_table, tmp_path):
    with pytest.raises(Unsupported, match="BatchNorm3d '1'"):
        private.check_batch_statistics(nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)))
    private.check_batch_statistics(nn.Sequential(nn.GroupNorm(1, 2), nn.InstanceNorm3d(2)))
    half = config()
    half = half.model_copy(update={"training": half.training.model_copy(update={"precision": "bf16"})})
    with pytest.raises(Unsupported, match="fp32"):
        train(half, private_table, tmp_path / "run")


def test_a_budget_that_no_noise_meets_is_one_line(config, monkeypatch):
    def never(**settings):
        raise ValueError("The privacy budget is too low.")

    monkeypatch.setattr("opacus.accountants.utils.get_noise_multiplier", never)
    with pytest.raises(UsageError, match="meets epsilon 2"):
        private.noise_multiplier(config(noise_multiplier=None, epsilon=2.0).privacy, 0.1)


def test_the_config_needs_one_budget(config):
    with pytest.raises(InputError, match="either epsilon or noise_multiplier"):
        config(epsilon=1.0)
    with pytest.raises(InputError, match="noise_multiplier"):
        config(noise_multiplyer=1.0)
