"""Homer's D and the likelihood ratio: by hand, on a small pool that gives its people away, on a population that does not."""

from __future__ import annotations

import numpy as np
import pytest

from engine.audit import AuditPolicy, Pool
from engine.genomics import attacks
from engine.kernels import bits


def pool(alleles_nl, tag, rows_per_person=2):
    person = np.array([f"{tag}{k // rows_per_person}" for k in range(len(alleles_nl))])
    return Pool("bits", bits.pack(np.asarray(alleles_nl, dtype=np.uint8)), person, length=np.shape(alleles_nl)[1])


def population(rng, people, frequency_l):
    return (rng.random((2 * people, len(frequency_l))) < frequency_l).astype(np.uint8)


def test_homer_by_hand():
    # y = 0, 1/2, 1; |y - reference| - |y - released|: (.2 - .1) + (.1 - .3) + (.5 - .25) = .1 - .2 + .25
    dosage = np.array([[0, 1, 2]])
    released, reference = np.array([0.1, 0.8, 0.75]), np.array([0.2, 0.6, 0.5])
    np.testing.assert_allclose(attacks.homer_d(dosage, released, reference), [0.15])
    np.testing.assert_allclose(attacks.homer_d(np.array([[0, 1]]), released[:2], reference[:2], ploidy=1), [0.1 + 0.2])


def test_likelihood_ratio_by_hand():
    dosage = np.array([[0, 1, 2], [2, 2, 0]])
    released, reference = np.array([0.1, 0.8, 0.75]), np.array([0.2, 0.6, 0.5])
    first = 2 * np.log(0.9 / 0.8) + np.log(0.8 / 0.6) + np.log(0.2 / 0.4) + 2 * np.log(0.75 / 0.5)
    second = 2 * np.log(0.1 / 0.2) + 2 * np.log(0.8 / 0.6) + 2 * np.log(0.25 / 0.5)
    np.testing.assert_allclose(attacks.likelihood_ratio(dosage, released, reference), [first, second])


def test_frequencies_are_never_zero_or_one():
    rows = pool(np.array([[0, 1, 1], [0, 1, 0]]), "a")
    np.testing.assert_allclose(attacks.frequencies(rows, np.array([0, 1, 2])), [0.5 / 3, 2.5 / 3, 1.5 / 3])
    np.testing.assert_allclose(attacks.frequencies(rows, np.array([2])), [0.5])


@pytest.fixture(scope="module")
def sides():
    rng = np.random.default_rng(0)
    frequency_l = rng.beta(0.8, 0.8, 3000)
    train, holdout = population(rng, 50, frequency_l), population(rng, 240, frequency_l)
    return pool(train, "t"), pool(holdout, "h"), population(rng, 60, frequency_l)


def by_name(findings):
    return {f.name: f for f in findings}


def test_frequencies_of_a_small_pool_give_its_people_away(sides):
    train, holdout, fresh = sides
    attack = attacks.frequency_attack(train, holdout, AuditPolicy(), seed=1)
    found = by_name(attack(train, True))
    for name in ("homer", "likelihood"):
        area = found[f"membership_auc_frequencies_{name}"]
        assert area.value > 0.9
        assert area.verdict == "fail"
        assert area.n == {"members": 50, "non_members": 120}
        rate = found[f"membership_tpr_at_1_percent_frequencies_{name}"]
        assert rate.value > 0.5
        assert rate.verdict == "fail"
        rare = found[f"membership_tpr_at_0.1_percent_frequencies_{name}"]
        assert np.isnan(rare.value)  # needs 999 people
        bound = found[f"membership_auc_training_frequencies_{name}"]
        assert bound.value == area.value
        assert bound.verdict == "none"
    unseen = by_name(attack(pool(fresh, "s"), False))
    assert not any("training" in name for name in unseen)
    for name in ("homer", "likelihood"):
        low, high = unseen[f"membership_auc_frequencies_{name}"].interval
        assert low < 0.5 < high
        assert unseen[f"membership_auc_frequencies_{name}"].verdict == "pass"


def test_people_are_scored_whatever_the_order_of_their_rows(sides):
    train, _, _ = sides
    site_l = np.arange(0, 3000, 7)
    alleles = bits.unpack(train.data, 3000)[:, site_l]
    expected = [alleles[train.person == name].sum(axis=0) for name in np.unique(train.person)]
    mixed = np.random.default_rng(1).permutation(len(train))
    np.testing.assert_array_equal(attacks._dosages(train.select(mixed), site_l, 2), expected)


def test_haploid_people_are_attacked_and_mixed_ones_are_not(sides):
    train, holdout, _ = sides
    rows = bits.unpack(train.data, 3000)
    one = pool(rows, "t", 1), pool(bits.unpack(holdout.data, 3000), "h", 1)
    found = by_name(attacks.frequency_attack(*one, AuditPolicy(), seed=1)(one[0], False))
    assert found["membership_auc_frequencies_likelihood"].n["members"] == 100
    assert found["membership_auc_frequencies_likelihood"].value > 0.8
    assert attacks.frequency_attack(one[0], holdout, AuditPolicy(), seed=1) is None
    three = Pool("bits", train.data[:3], np.array(["a", "a", "b"]), length=3000)
    assert attacks.frequency_attack(three, holdout, AuditPolicy(), seed=1) is None
