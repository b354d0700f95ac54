"""The copying model's ancestry chain and sums of the posterior: against sums over all paths and events, and the
implementations against the reference."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from engine.kernels import haplotype_hmm
from engine.kernels.haplotype_hmm import condense

CPU = ["reference", "numba"]
STAYS, SWITCHES, REDRAWS = range(3)


def packed(alleles_lk: np.ndarray) -> np.ndarray:
    """Site-major words, written here on its own so that the test does not share a bug with the code under test."""
    sites, k = alleles_lk.shape
    bits_lw = np.zeros((sites, (k + 63) // 64), np.uint64)
    for column in range(k):
        bits_lw[:, column // 64] |= alleles_lk[:, column].astype(np.uint64) << np.uint64(column % 64)
    return bits_lw


def problem(k: int, sites: int, n: int, groups: int, seed: int = 1):
    rng = np.random.default_rng(seed)
    alleles_lk = (rng.random((sites, k)) < 0.4).astype(np.uint8)
    target_nl = (rng.random((n, sites)) < 0.4).astype(np.uint8)
    target_nl[rng.random((n, sites)) < 0.1] = 255
    switch_l, mismatch_l = rng.random(sites) * 0.4, rng.random(sites) * 0.1 + 1e-3
    prior_ak = rng.random((groups, k)) + 0.01
    prior_ak[:1, : k // 3] = 0  # states that one group does not have
    ancestry = haplotype_hmm.Ancestry(rng.random(groups) + 0.1, prior_ak, rng.random(sites) * 0.3)
    return alleles_lk, target_nl, switch_l, mismatch_l, ancestry if groups else None


def histories(alleles_lk, target_l, switch_l, mismatch_l, ancestry):
    """Joint probability with the target of each history, ((group, haplotype) and what happened before it) per site."""
    sites, k = alleles_lk.shape
    prior_a = ancestry.prior_a / ancestry.prior_a.sum()
    prior_ak = ancestry.prior_ak / ancestry.prior_ak.sum(axis=1, keepdims=True)
    states = list(itertools.product(range(len(prior_a)), range(k)))
    found = {}

    def go(history, weight):
        site = len(history)
        if weight == 0:
            return
        if site == sites:
            found[tuple(history)] = weight
            return
        for a, state in states:
            seen = 1.0
            if target_l[site] != 255:
                seen = mismatch_l[site]
                if alleles_lk[site, state] == target_l[site]:
                    seen = 1 - mismatch_l[site]
            if site == 0:
                go([((a, state), STAYS)], seen * prior_a[a] * prior_ak[a, state])
                continue
            (was_a, was), redraw, switch = history[-1][0], ancestry.switch_l[site], switch_l[site]
            go([*history, ((a, state), REDRAWS)], weight * seen * redraw * prior_a[a] * prior_ak[a, state])
            if a == was_a:
                go([*history, ((a, state), SWITCHES)], weight * seen * (1 - redraw) * switch * prior_ak[a, state])
                if state == was:
                    go([*history, ((a, state), STAYS)], weight * seen * (1 - redraw) * (1 - switch))

    go([], 1.0)
    return found


@pytest.mark.parametrize("implementation", CPU)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_the_sum_over_all_histories(implementation, dtype):
    k, sites, groups, n = 3, 4, 2, 5
    alleles_lk, target_nl, switch_l, mismatch_l, ancestry = problem(k, sites, n, groups, seed=5)
    label_k = np.array([0, 2, 0])
    arguments = packed(alleles_lk), k, target_nl, switch_l, mismatch_l
    given = {"ancestry": ancestry, "dtype": dtype, "implementation": implementation}
    sums = haplotype_hmm.posterior_sums(*arguments, label_k=label_k, top=2, **given)
    posterior_nls = haplotype_hmm.posterior(*arguments, **given)
    log_n = haplotype_hmm.log_likelihood(*arguments, **given)
    tight = {"atol": 2e-6 if dtype == np.float32 else 1e-12, "rtol": 0}
    for i in range(n):
        all_histories = histories(alleles_lk, target_nl[i], switch_l, mismatch_l, ancestry)
        total = math.fsum(all_histories.values())
        posterior_ls, switch_l_, redraw_l = np.zeros((sites, groups * k)), np.zeros(sites), np.zeros(sites)
        for history, weight in all_histories.items():
            for site, ((a, state), event) in enumerate(history):
                posterior_ls[site, a * k + state] += weight / total
                switch_l_[site] += (event == SWITCHES) * weight / total
                redraw_l[site] += (event == REDRAWS) * weight / total
        of_state_lk = posterior_ls.reshape(sites, groups, k).sum(axis=1)
        differs_l = (of_state_lk * (alleles_lk != target_nl[i][:, None])).sum(axis=1)
        np.testing.assert_allclose([log_n[i], sums.log_likelihood_n[i]], np.log(total), atol=5e-6)
        np.testing.assert_allclose(posterior_nls[i], posterior_ls, **tight)
        np.testing.assert_allclose(sums.switch_nl[i], switch_l_, **tight)
        np.testing.assert_allclose(sums.ancestry_switch_nl[i], redraw_l, **tight)
        np.testing.assert_allclose(sums.ancestry_nla[i], posterior_ls.reshape(sites, groups, k).sum(axis=2), **tight)
        np.testing.assert_allclose(sums.dosage_nl[i], (of_state_lk * alleles_lk).sum(axis=1), **tight)
        np.testing.assert_allclose(sums.mismatch_nl[i], np.where(target_nl[i] == 255, 0, differs_l), **tight)
        of_label = [of_state_lk[:, label_k == label].sum(axis=1) for label in range(3)]
        np.testing.assert_allclose(sums.label_nlg[i], np.transpose(of_label), **tight)
        np.testing.assert_allclose(sums.top_weight_nlm[i], -np.sort(-posterior_ls, axis=1)[:, :2], **tight)
        assert (sums.top_state_nlm[i] == np.argsort(-posterior_ls, axis=1)[:, :2]).all()


def test_one_group_that_never_changes_is_the_plain_model():
    k, sites, n = 67, 40, 21
    alleles_lk, target_nl, switch_l, mismatch_l, _ = problem(k, sites, n, 1)
    weights = np.random.default_rng(2).random(k)
    one = haplotype_hmm.Ancestry(np.ones(1), weights[None], np.zeros(sites))
    two = haplotype_hmm.Ancestry(np.array([0.3, 0.7]), np.tile(weights, (2, 1)), np.full(sites, 0.2))
    arguments = packed(alleles_lk), k, target_nl, switch_l, mismatch_l
    for implementation in CPU:
        plain = haplotype_hmm.log_likelihood(*arguments, prior_k=weights, implementation=implementation)
        found = haplotype_hmm.log_likelihood(*arguments, ancestry=one, implementation=implementation)
        np.testing.assert_allclose(found, plain, atol=1e-6)
        more_l = 1 - (1 - switch_l) * 0.8  # groups that are all alike only add switches
        alike = haplotype_hmm.log_likelihood(*arguments, ancestry=two, implementation=implementation)
        arguments_ = (*arguments[:3], more_l, mismatch_l)
        plain = haplotype_hmm.log_likelihood(*arguments_, prior_k=weights, implementation=implementation)
        np.testing.assert_allclose(alike, plain, atol=2e-5)


@pytest.fixture(scope="module")
def compiled():
    """Everything is compiled before np.empty is replaced, which Numba would not recognise."""
    for groups in (0, 2):
        for dtype in (np.float32, np.float64):
            everything(problem(3, 9, 6, groups), None, dtype, "numba")


@pytest.fixture
def poisoned(compiled, monkeypatch):
    true_empty = np.empty

    def empty(shape, dtype=float, **keywords):
        made = true_empty(shape, dtype, **keywords)
        made.view(np.uint8).reshape(-1)[:] = 0xA5
        return made

    monkeypatch.setattr(np, "empty", empty)


def everything(made, exclude_ne, dtype, implementation):
    """All results of one problem by name."""
    alleles_lk, target_nl, switch_l, mismatch_l, ancestry = made
    sites, k = alleles_lk.shape
    rng = np.random.default_rng(k)
    arguments = packed(alleles_lk), k, target_nl, switch_l, mismatch_l
    given = {"ancestry": ancestry, "exclude_ne": exclude_ne, "dtype": dtype, "implementation": implementation}
    label_k, site_s = rng.integers(0, 4, k), rng.permutation(sites)[:5]
    found = {"log_likelihood": haplotype_hmm.log_likelihood(*arguments, **given)}
    found["posterior"] = haplotype_hmm.posterior(*arguments, **given)
    sums = haplotype_hmm.posterior_sums(*arguments, label_k=label_k, top=min(3, k), **given)
    found |= {name: values for name, values in sums._asdict().items() if values is not None}
    for direction in (haplotype_hmm.forward_states, haplotype_hmm.backward_states):
        states, logs = direction(*arguments, site_s, **given)
        found |= {direction.__name__: states, f"{direction.__name__}_log": logs}
    found["paths"] = haplotype_hmm.posterior_paths(*arguments, rng.random(target_nl.shape), **given)
    return found


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("k", "sites", "n", "groups"),
    [(1, 7, 2, 0), (5, 1, 3, 3), (63, 65, 17, 0), (64, 64, 16, 2), (65, 63, 1, 3), (193, 150, 19, 2), (701, 300, 9, 0)],
)
def test_numba_equals_reference_at_awkward_sizes(k, sites, n, groups, dtype):
    made = problem(k, sites, n, groups, seed=k)
    exclude_ne = None
    if k > 40:
        exclude_ne = np.full((n, 3), -1)
        exclude_ne[:, ::2] = np.random.default_rng(1).integers(k // 2, k, (n, 2))
    exact = everything(made, exclude_ne, dtype, "reference")
    found = everything(made, exclude_ne, dtype, "numba")
    assert exact.keys() == found.keys()
    for name, values in exact.items():
        if name in ("paths", "top_state_nlm"):
            assert (found[name] == values).all(), name
            continue
        assert found[name].shape == values.shape
        assert found[name].dtype == (np.float64 if "log" in name else dtype), name
        atol = (2e-4 if "log" in name else 2e-5) if dtype == np.float32 else 1e-9
        np.testing.assert_allclose(
            found[name], values, atol=atol, rtol=1e-4 if dtype == np.float32 else 1e-9, err_msg=name
        )


@pytest.mark.parametrize("implementation", CPU)
def test_backward_and_forward_states_give_likelihood_and_posterior(implementation):
    k, sites, n, groups = 70, 90, 3, 2
    alleles_lk, target_nl, switch_l, mismatch_l, ancestry = problem(k, sites, n, groups, seed=8)
    arguments = packed(alleles_lk), k, target_nl, switch_l, mismatch_l
    given = {"ancestry": ancestry, "dtype": np.float64, "implementation": implementation}
    every = np.arange(sites)[::-1]
    f, f_log = haplotype_hmm.forward_states(*arguments, every, **given)
    b, b_log = haplotype_hmm.backward_states(*arguments, every, **given)
    whole = haplotype_hmm.log_likelihood(*arguments, **given)
    joint = np.log((f * b).sum(axis=2)) + f_log + b_log
    np.testing.assert_allclose(joint, np.repeat(whole[:, None], sites, axis=1), atol=1e-9)  # the same at every site
    gamma = f * b / (f * b).sum(axis=2, keepdims=True)
    np.testing.assert_allclose(gamma[:, ::-1], haplotype_hmm.posterior(*arguments, **given), atol=1e-10)
    np.testing.assert_allclose(f.sum(axis=2), 1, atol=1e-12)


@pytest.mark.parametrize("implementation", CPU)
def test_impossible_targets_are_marked_and_leave_others_alone(implementation):
    alleles_lk = np.array([[0, 1], [0, 1], [1, 1]], np.uint8)
    target_nl = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 255]], np.uint8)
    never = np.zeros(3)
    arguments = packed(alleles_lk), 2, target_nl, never, never
    sums = haplotype_hmm.posterior_sums(*arguments, top=2, implementation=implementation)
    np.testing.assert_allclose(sums.log_likelihood_n, [np.log(0.5), -np.inf, np.log(0.5)])
    np.testing.assert_allclose(sums.dosage_nl, [[0, 0, 1], [np.nan] * 3, [1, 1, 1]])
    assert sums.top_state_nlm.tolist()[1] == [[-1, -1]] * 3
    assert sums.top_state_nlm.tolist()[2] == [[1, -1]] * 3
    states, logs = haplotype_hmm.forward_states(*arguments, [0, 1], implementation=implementation)
    np.testing.assert_allclose(states[1], [[1, 0], [np.nan, np.nan]])
    assert logs[1].tolist() == [np.log(0.5), -np.inf]
    assert np.isnan(haplotype_hmm.backward_states(*arguments, [0, 1], implementation=implementation)[0][1]).all()
    assert np.isnan(haplotype_hmm.posterior(*arguments, implementation=implementation)[1]).all()


@pytest.mark.parametrize("implementation", CPU)
def test_paths_of_the_ancestry_chain_have_their_frequencies(implementation):
    k, sites, groups, draws = 2, 3, 2, 20_000 if implementation == "numba" else 3_000
    alleles_lk, target_nl, switch_l, mismatch_l, ancestry = problem(k, sites, 1, groups, seed=9)
    uniforms = np.random.default_rng(3).random((draws, sites))
    paths = haplotype_hmm.posterior_paths(
        packed(alleles_lk), k, np.repeat(target_nl, draws, axis=0), switch_l, mismatch_l, uniforms, ancestry=ancestry,
        implementation=implementation,
    )  # fmt: skip
    weights: dict[tuple[int, ...], float] = {}
    for history, weight in histories(alleles_lk, target_nl[0], switch_l, mismatch_l, ancestry).items():
        path = tuple(a * k + state for (a, state), _ in history)
        weights[path] = weights.get(path, 0.0) + weight
    total = math.fsum(weights.values())
    found, counts = np.unique(paths, axis=0, return_counts=True)
    seen = {tuple(path): int(count) for path, count in zip(found.tolist(), counts, strict=True)}
    assert set(seen) <= set(weights)
    common = {path: draws * weight / total for path, weight in weights.items() if draws * weight / total >= 5}
    chi2 = sum((seen.get(path, 0) - expected) ** 2 / expected for path, expected in common.items())
    assert len(common) > 8
    assert chi2 < len(common) + 5 * np.sqrt(2 * len(common))  # mean and standard deviation of chi-square


def test_expectation_maximisation_by_expected_counts_climbs():
    rng = np.random.default_rng(6)
    k, sites, n = 40, 200, 30
    alleles_lk = (rng.random((sites, k)) < 0.3).astype(np.uint8)
    donors = np.repeat(rng.integers(0, k, (n, sites // 20)), 20, axis=1)
    target_nl = alleles_lk[np.arange(sites), donors] ^ (rng.random((n, sites)) < 0.02).astype(np.uint8)
    switch_l, mismatch_l, before = np.full(sites, 0.2), np.full(sites, 0.2), -np.inf
    for _ in range(6):
        arguments = packed(alleles_lk), k, target_nl, switch_l, mismatch_l
        sums = haplotype_hmm.posterior_sums(*arguments, dtype=np.float64)
        total = sums.log_likelihood_n.sum()
        assert total > before
        before, switch_l, mismatch_l = total, sums.switch_nl.mean(axis=0), sums.mismatch_nl.mean(axis=0)
    assert np.median(mismatch_l) < 0.06
    assert 0.01 < switch_l[1:].mean() < 0.1


def test_lane_bound_holds_where_an_excluded_haplotype_is_the_only_match():
    """Its class has no weight in the lane and would outgrow float32: sixty private alleles in one block."""
    k, sites = 300, 256
    rng = np.random.default_rng(2)
    alleles_lk = (rng.random((sites, k)) < 0.2).astype(np.uint8)
    alleles_lk[60:120, 7], alleles_lk[60:120, np.arange(k) != 7] = 1, 0
    target_nl = np.repeat(alleles_lk[:, 7][None], 6, axis=0)
    arguments = packed(alleles_lk), k, target_nl, np.full(sites, 1e-3), np.full(sites, 1e-4)
    given = {"exclude_ne": np.full((6, 1), 7)}
    exact = haplotype_hmm.log_likelihood(*arguments, implementation="reference", **given)
    np.testing.assert_allclose(haplotype_hmm.log_likelihood(*arguments, **given), exact, atol=1e-4, rtol=0)
    exact_sums = haplotype_hmm.posterior_sums(*arguments, implementation="reference", **given)
    found = haplotype_hmm.posterior_sums(*arguments, **given)
    np.testing.assert_allclose(found.switch_nl, exact_sums.switch_nl, atol=1e-4)
    np.testing.assert_allclose(found.dosage_nl, exact_sums.dosage_nl, atol=1e-4)


@pytest.mark.parametrize(("k", "sites"), [(1, 1), (63, 64), (65, 8), (300, 257), (130, 530)])
def test_condensed_panel_is_the_panel(k, sites):
    rng = np.random.default_rng(k)
    founders_lf = (rng.random((sites, 9)) < 0.4).astype(np.uint8)
    alleles_lk = founders_lf[:, rng.integers(0, 9, k)] ^ (rng.random((sites, k)) < 0.01).astype(np.uint8)
    label_k = rng.integers(0, 3, k).astype(np.int32)
    made = condense.condense(packed(alleles_lk), k, label_k, 3)
    assert made.block_b[0] == 0
    assert made.block_b[-1] == sites
    for b, row in enumerate(made.row_b):
        own = slice(made.offset_b[b], made.offset_b[b + 1])
        size = made.block_b[b + 1] - made.block_b[b]
        assert 1 <= size <= 64
        class_k = made.class_bk[row]
        assert set(class_k) == set(range(own.stop - own.start))
        bits = (made.pattern_c[own][class_k][None] >> np.arange(size, dtype=np.uint64)[:, None]) & np.uint64(1)
        assert (bits == alleles_lk[made.block_b[b] : made.block_b[b + 1]]).all()
        assert (made.label_c[own][class_k] == label_k).all()
