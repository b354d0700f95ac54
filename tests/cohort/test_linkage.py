from __future__ import annotations

import json

import numpy as np
import pytest

from engine.audit.policy import AuditPolicy
from engine.cohort.linkage import Linked, linkage, pair_attack, scan_features, twin_attack
from engine.errors import InputError
from engine.imaging.volume import Volume

POLICY = AuditPolicy()  # type: ignore[call-arg]


def people(n: int, seed: int, link: float = 0.0) -> Linked:
    """Genotypes in two ancestries, scans that differ by ancestry (a declared link) and with `link` by ten variants."""
    rng = np.random.Generator(np.random.Philox(seed))
    stratum = rng.integers(0, 2, n)
    frequency = np.random.Generator(np.random.Philox(99)).uniform(0.1, 0.9, (2, 300))
    dosage = rng.binomial(2, frequency[stratum])
    axes = np.random.Generator(np.random.Philox(98)).standard_normal((12, 60))
    latent = rng.standard_normal((n, 12))
    latent[:, 0] += 1.5 * stratum
    if link:
        # the first direction in which the genotypes of people alike differ most
        within = dosage - np.array([dosage[stratum == s].mean(axis=0) for s in (0, 1)])[stratum]
        direction = np.linalg.svd(within, full_matrices=False)[0][:, :3] * np.sqrt(n)
        latent[:, 1:4] += link * direction
    return Linked(dosage, latent @ axes + 0.3 * rng.standard_normal((n, 60)), stratum)


def test_declared_links_are_described_and_others_convicted() -> None:
    honest = {f.name: f for f in pair_attack(people(160, 1), POLICY, 0)}
    assert honest["link_all"].value > 0.55  # ancestry shows in both
    assert honest["link_all"].verdict == "none"
    assert honest["link_within"].verdict == "pass"
    leaking = {f.name: f for f in pair_attack(people(160, 1, link=2.0), POLICY, 0)}
    assert leaking["link_within"].verdict == "fail"
    assert leaking["link_within"].value > leaking["link_within"].threshold  # type: ignore[operator]


def test_honest_pairs_are_seldom_convicted() -> None:
    p = [pair_attack(people(80, 100 + k), POLICY, k)[1].detail["p"] for k in range(24)]
    assert np.mean(np.array(p) <= 0.05) <= 0.2
    assert np.mean(p) == pytest.approx(0.5, abs=0.15)


def test_twins_are_found_and_shuffled_copies_are_not() -> None:
    train, holdout, fresh = people(120, 1), people(60, 2), people(120, 3)
    auc = lambda made: next(f for f in twin_attack(train, holdout, made, POLICY, 0) if "auc" in f.name)  # noqa: E731
    assert auc(fresh).verdict == "pass"
    assert auc(train).verdict == "fail"
    assert auc(train).value > 0.95
    order = np.random.Generator(np.random.Philox(5)).permutation(120)
    assert auc(Linked(train.dosage_nl, train.scan_nf[order], train.stratum_n)).value < 0.65


def test_the_whole_audit_with_its_controls() -> None:
    train, holdout = people(120, 1), people(60, 2)
    result = linkage(train, holdout, people(120, 3))
    assert {name: c["verdict"] for name, c in result.controls.items()} == {
        name: c["expected"] for name, c in result.controls.items()
    }
    assert result.verdict == "pass"
    assert linkage(train, holdout, people(120, 3, link=2.0)).verdict == "fail"
    copied = linkage(train, holdout, train)
    assert copied.verdict == "fail"
    assert any("twin" in reason for reason in copied.reasons)
    json.dumps(result.to_json(), allow_nan=False)


def test_too_few_people_have_no_verdict() -> None:
    result = linkage(people(30, 1), people(12, 2), people(20, 3))
    assert result.verdict == "void"
    with pytest.raises(InputError):
        Linked(np.zeros((3, 2)), np.zeros((2, 2)), np.zeros(3))


def test_scan_features_are_block_means_whatever_the_gain() -> None:
    array = np.random.Generator(np.random.Philox(1)).random((1, 8, 12, 8)).astype(np.float32)
    one, two = (scan_features([Volume(array * gain, np.eye(4), "MR", "arbitrary", {})]) for gain in (1.0, 700.0))
    assert one.shape == (1, 12)
    assert two == pytest.approx(one, rel=1e-5)
