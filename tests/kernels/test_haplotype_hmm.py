"""The copying model: every implementation against sums over all K^L paths, and the fast ones against the reference."""

from __future__ import annotations

import itertools
import platform
import threading

import numba
import numpy as np
import pytest

from engine.errors import Unsupported, UsageError
from engine.kernels import haplotype_hmm
from engine.kernels.haplotype_hmm.threads import in_threads

CPU = ["reference", "numba"]


def packed(alleles_lk: np.ndarray) -> np.ndarray:
    """Site-major words, written here on its own so that the test does not share a bug with the code under test."""
    sites, k = alleles_lk.shape
    bits_lw = np.zeros((sites, (k + 63) // 64), np.uint64)
    for column in range(k):
        bits_lw[:, column // 64] |= alleles_lk[:, column].astype(np.uint64) << np.uint64(column % 64)
    return bits_lw


def panel(k: int, sites: int, n: int, seed: int = 1, missing: float = 0.1):
    rng = np.random.default_rng(seed)
    alleles_lk = (rng.random((sites, k)) < 0.4).astype(np.uint8)
    target_nl = (rng.random((n, sites)) < 0.4).astype(np.uint8)
    target_nl[rng.random((n, sites)) < missing] = 255
    return alleles_lk, target_nl, rng.random(sites) * 0.4, rng.random(sites) * 0.1 + 1e-3


def path_weights(alleles_lk, target_l, switch_l, mismatch_l, prior_k):
    """Joint probability of target and path for each of the K^L paths, from the definition alone."""
    sites, k = alleles_lk.shape
    weights = {}
    for path in itertools.product(range(k), repeat=sites):
        weight = prior_k[path[0]]
        for site, state in enumerate(path):
            if site > 0:
                weight *= (1 - switch_l[site]) * (state == path[site - 1]) + switch_l[site] * prior_k[state]
            if target_l[site] != 255:
                weight *= 1 - mismatch_l[site] if alleles_lk[site, state] == target_l[site] else mismatch_l[site]
        weights[path] = weight
    return weights


@pytest.mark.parametrize("implementation", CPU)
@pytest.mark.parametrize("prior", ["uniform", "weighted", "excluded"])
def test_equals_the_sum_over_all_paths(implementation, prior):
    k, sites = 4, 5
    alleles_lk, target_nl, switch_l, mismatch_l = panel(k, sites, 3)
    prior_k = {
        "uniform": np.full(k, 0.25),
        "weighted": np.array([0.5, 0.1, 0.3, 0.1]),
        "excluded": np.array([0.5, 0, 0.5, 0]),
    }
    keywords = {
        "uniform": {},
        "weighted": {"prior_k": 7 * prior_k["weighted"]},  # weights need not sum to 1
        "excluded": {"exclude_ne": np.array([[1, 3], [3, 1], [1, 3]])},
    }[prior]
    arguments = packed(alleles_lk), k, target_nl, switch_l, mismatch_l
    log_n = haplotype_hmm.log_likelihood(*arguments, implementation=implementation, **keywords)
    posterior_nlk = haplotype_hmm.posterior(*arguments, implementation=implementation, **keywords)
    for n in range(3):
        weights = path_weights(alleles_lk, target_nl[n], switch_l, mismatch_l, prior_k[prior])
        total = sum(weights.values())
        assert log_n[n] == pytest.approx(np.log(total), abs=1e-6)
        expected = np.zeros((sites, k))
        for path, weight in weights.items():
            expected[np.arange(sites), path] += weight / total
        np.testing.assert_allclose(posterior_nlk[n], expected, atol=1e-6)


@pytest.mark.parametrize("implementation", CPU)
def test_sampled_paths_have_the_posterior_frequencies(implementation):
    k, sites, draws = 3, 4, 20_000 if implementation == "numba" else 4_000
    alleles_lk, target_nl, switch_l, mismatch_l = panel(k, sites, 1, seed=5, missing=0)
    mismatch_l = mismatch_l * 3
    prior_k = np.array([0.5, 0.2, 0.3])
    uniforms = np.random.default_rng(3).random((draws, sites))
    paths = haplotype_hmm.posterior_paths(
        packed(alleles_lk), k, np.repeat(target_nl, draws, axis=0), switch_l, mismatch_l, uniforms,
        prior_k=prior_k, implementation=implementation,
    )  # fmt: skip
    weights = path_weights(alleles_lk, target_nl[0], switch_l, mismatch_l, prior_k)
    total = sum(weights.values())
    found, counts = np.unique(paths, axis=0, return_counts=True)
    seen = {tuple(int(z) for z in path): int(count) for path, count in zip(found, counts, strict=True)}
    assert set(seen) <= set(weights)
    expected = {path: draws * weight / total for path, weight in weights.items()}
    common = [path for path in expected if expected[path] >= 5]
    chi2 = sum((seen.get(path, 0) - expected[path]) ** 2 / expected[path] for path in common)
    assert len(common) > 12
    assert chi2 < len(common) + 5 * np.sqrt(2 * len(common))  # mean and standard deviation of chi-square


@pytest.mark.parametrize("k", [1, 2, 63, 64, 65, 127, 128, 193])
@pytest.mark.parametrize("keywords", ["plain", "prior", "exclude"])
def test_numba_equals_reference_at_awkward_sizes(k, keywords):
    sites, n = 41, 6
    alleles_lk, target_nl, switch_l, mismatch_l = panel(k, sites, n, seed=k)
    rng = np.random.default_rng(k)
    given = {"plain": {}, "prior": {"prior_k": rng.random(k) + 0.01}, "exclude": {"exclude_ne": np.full((n, 2), -1)}}[
        keywords
    ]
    if keywords == "exclude" and k > 2:
        given["exclude_ne"][:, 0] = rng.integers(0, k, n)
    arguments = packed(alleles_lk), k, target_nl, switch_l, mismatch_l
    uniforms = rng.random((n, sites))
    exact = haplotype_hmm.log_likelihood(*arguments, implementation="reference", **given)
    np.testing.assert_allclose(haplotype_hmm.log_likelihood(*arguments, **given), exact, atol=4e-6, rtol=0)
    exact = haplotype_hmm.posterior(*arguments, implementation="reference", **given)
    np.testing.assert_allclose(haplotype_hmm.posterior(*arguments, **given), exact, atol=1e-6)
    exact = haplotype_hmm.posterior_paths(*arguments, uniforms, implementation="reference", **given)
    assert (haplotype_hmm.posterior_paths(*arguments, uniforms, **given) == exact).all()
    if keywords == "exclude" and k > 2:
        assert not (exact == given["exclude_ne"][:, :1]).any()


@pytest.mark.parametrize(("k", "sites"), [(701, 1_000), (211, 10_000)])
@pytest.mark.parametrize("switch", [1e-2, 1e-6, 1e-12])  # the last: nearly every state decays towards underflow
@pytest.mark.parametrize("n", [3, 18])  # walked directly, and by vectors of targets
def test_float32_state_stays_within_1e_4_nats_per_1000_sites(k, sites, switch, n):
    rng = np.random.default_rng(11)
    alleles_lk = (rng.random((sites, k)) < rng.beta(0.3, 1, (sites, 1))).astype(np.uint8)
    donors = np.repeat(rng.integers(0, k, (3, sites // 100)), 100, axis=1)
    target_nl = alleles_lk[np.arange(sites), donors] ^ (rng.random((3, sites)) < 1e-3).astype(np.uint8)
    arguments = switch_l, mismatch_l = np.full(sites, switch), np.full(sites, 2e-4)
    bits_lw = packed(alleles_lk)
    exact = haplotype_hmm.log_likelihood(bits_lw, k, target_nl, *arguments, implementation="reference")
    repeated_nl = np.tile(target_nl, (n // 3, 1))
    found = haplotype_hmm.log_likelihood(bits_lw, k, repeated_nl, switch_l, mismatch_l)
    np.testing.assert_allclose(found, np.tile(exact, n // 3), atol=1e-4 * sites / 1000, rtol=0)
    found = haplotype_hmm.log_likelihood(bits_lw, k, repeated_nl, switch_l, mismatch_l, dtype=np.float64)
    np.testing.assert_allclose(found, np.tile(exact, n // 3), atol=1e-9 * sites / 1000, rtol=1e-12)


def test_float32_holds_for_thousands_of_equal_haplotypes():
    """Sums over large classes are the least exact thing that there is: 20,011 haplotypes, few of them different."""
    k, sites, rng = 20_011, 1_000, np.random.default_rng(3)
    founders_lf = (rng.random((sites, 12)) < 0.3).astype(np.uint8)
    alleles_lk = founders_lf[:, rng.integers(0, 12, k)]
    target_nl = np.ascontiguousarray(np.where(np.arange(sites) < 500, founders_lf[:, 3], founders_lf[:, 7])[None])
    arguments = packed(alleles_lk), k, target_nl, np.full(sites, 1e-5), np.full(sites, 1e-4)
    exact = haplotype_hmm.log_likelihood(*arguments, dtype=np.float64)  # one target: directly
    reference = haplotype_hmm.log_likelihood(*arguments, implementation="reference")
    np.testing.assert_allclose(exact, reference, atol=1e-9)
    arguments = (*arguments[:2], np.repeat(target_nl, 17, axis=0), *arguments[3:])
    found = haplotype_hmm.log_likelihood(*arguments)
    np.testing.assert_allclose(found, np.repeat(exact, 17), atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", CPU)
def test_missing_alleles_drop_out(implementation):
    alleles_lk, target_nl, switch_l, mismatch_l = panel(5, 6, 2, missing=0)
    target_nl[0, 2] = 255
    target_nl[1] = 255
    keep = [0, 1, 3, 4, 5]
    fewer_switch = switch_l[keep].copy()
    fewer_switch[2] = 1 - (1 - switch_l[2]) * (1 - switch_l[3])  # two steps without a switch
    both = haplotype_hmm.log_likelihood(
        packed(alleles_lk), 5, target_nl, switch_l, mismatch_l, implementation=implementation
    )
    dropped = haplotype_hmm.log_likelihood(
        packed(alleles_lk[keep]), 5, target_nl[:1, keep], fewer_switch, mismatch_l[keep], implementation=implementation
    )
    assert both[0] == pytest.approx(dropped[0], abs=1e-6)
    assert both[1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("implementation", CPU)
def test_extreme_probabilities(implementation):
    alleles_lk = np.array([[0, 1], [0, 1]], np.uint8)
    target_nl = np.array([[0, 0], [0, 1]], np.uint8)
    never = np.zeros(2)
    found = haplotype_hmm.log_likelihood(packed(alleles_lk), 2, target_nl, never, never, implementation=implementation)
    np.testing.assert_allclose(found, [np.log(0.5), -np.inf])
    certain = haplotype_hmm.log_likelihood(
        packed(alleles_lk), 2, target_nl, never, np.ones(2), implementation=implementation
    )
    np.testing.assert_allclose(certain, [np.log(0.5), -np.inf])
    paths = haplotype_hmm.posterior_paths(
        packed(alleles_lk), 2, target_nl, never, never, np.full((2, 2), 0.7), implementation=implementation
    )
    assert paths.tolist() == [[0, 0], [-1, -1]]
    empty = haplotype_hmm.log_likelihood(
        packed(alleles_lk), 2, target_nl[:0], never, never, implementation=implementation
    )
    assert empty.shape == (0,)


def mosaic(k: int, sites: int, n: int, seed: int):
    rng = np.random.default_rng(seed)
    starts, donors, flips = [], [], []
    for _ in range(n):
        starts.append(np.unique(np.append(rng.integers(0, sites, rng.integers(0, 9)), 0)))
        donors.append(rng.integers(0, k, len(starts[-1])))
        flips.append(np.unique(rng.integers(0, sites, rng.integers(0, 4))))
    offsets = [np.concatenate([[0], np.cumsum([len(x) for x in part])]) for part in (starts, flips)]
    join = lambda parts: np.concatenate([*parts, np.zeros(0, np.int64)]).astype(np.int64)  # noqa: E731
    return (offsets[0], join(starts), join(donors), offsets[1], join(flips)), starts, donors, flips


@numba.njit
def _times(a, b):
    return a * b


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="denormals are left alone on this processor"
)
@pytest.mark.parametrize("count", [1, 5])
def test_denormals_are_zero_while_a_job_runs_and_not_after_it(count):
    small = np.float32(1e-30), np.float32(1e-10)
    assert _times(*small) > 0
    seen, threads = np.ones(count, np.float32), set()

    def job(begin: int, end: int) -> None:
        threads.add(threading.get_ident())
        seen[begin:end] = _times(*small)
        if count > 1:
            raise ValueError("a job that fails leaves nothing behind either")

    if count == 1:
        in_threads(job, 1)
        assert threads == {threading.get_ident()}
        assert (seen == 0).all()
    else:
        with pytest.raises(ValueError, match="leaves nothing"):
            in_threads(job, count)
        assert (seen == 0).any()
        assert ((seen == 0) | (seen == 1)).all(), "0 in whatever thread it ran, or not run"
    assert _times(*small) > 0


@pytest.mark.parametrize(
    ("k", "sites", "n"), [(1, 1, 1), (3, 63, 64), (64, 64, 65), (65, 130, 63), (67, 200, 131), (5, 7, 0)]
)
def test_materialise_copies_donors_and_flips(k, sites, n):
    alleles_lk = (np.random.default_rng(2).random((sites, k)) < 0.5).astype(np.uint8)
    arguments, starts, donors, flips = mosaic(k, sites, n, seed=sites)
    expected_ln = np.zeros((sites, n), np.uint8)
    for column in range(n):
        for i, start in enumerate(starts[column]):
            expected_ln[start:, column] = alleles_lk[start:, donors[column][i]]
        expected_ln[flips[column], column] ^= 1
    expected = packed(expected_ln)
    for implementation in CPU:
        made = haplotype_hmm.materialise(packed(alleles_lk), k, *arguments, implementation=implementation)
        assert made.dtype == np.uint64
        assert np.array_equal(made, expected), implementation
    for cut in {0, 1, sites // 2, sites}:  # block by block gives the same bits
        parts = [
            haplotype_hmm.materialise(packed(alleles_lk[part]), k, *arguments, first_site=part.start)
            for part in (slice(0, cut), slice(cut, sites))
        ]
        assert np.array_equal(np.concatenate(parts), expected)


def test_bad_input_is_refused_in_one_line():
    alleles_lk, target_nl, switch_l, mismatch_l = panel(5, 6, 2)
    bits_lw = packed(alleles_lk)
    good = (bits_lw, 5, target_nl, switch_l, mismatch_l)
    for position, bad in [
        (0, bits_lw.astype(np.int32)),
        (1, 70),
        (2, target_nl + 1),
        (3, switch_l + 1),
        (4, mismatch_l[:-1]),
    ]:
        with pytest.raises(UsageError):
            haplotype_hmm.log_likelihood(*good[:position], bad, *good[position + 1 :])
    with pytest.raises(UsageError, match="state left"):
        haplotype_hmm.log_likelihood(*good, exclude_ne=np.tile(np.arange(5), (2, 1)))
    with pytest.raises(UsageError, match="implementation"):
        haplotype_hmm.log_likelihood(*good, implementation="cuda")
    with pytest.raises(Unsupported):
        haplotype_hmm.log_likelihood(*good, implementation="triton")
    with pytest.raises(UsageError, match="dtype"):
        haplotype_hmm.log_likelihood(*good, dtype="float16")
    with pytest.raises(UsageError, match="different sites"):
        haplotype_hmm.forward_states(*good, [1, 1])
    with pytest.raises(UsageError, match="label_k"):
        haplotype_hmm.posterior_sums(*good, label_k=np.full(5, 255))
    with pytest.raises(UsageError, match="top"):
        haplotype_hmm.posterior_sums(*good, top=6)
    with pytest.raises(UsageError, match="uniforms"):
        haplotype_hmm.posterior_paths(*good, np.ones((2, 6)))
    ancestry = haplotype_hmm.Ancestry(np.ones(2), np.ones((2, 5)), np.full(6, 0.1))
    with pytest.raises(UsageError, match="both"):
        haplotype_hmm.log_likelihood(*good, ancestry=ancestry, prior_k=np.ones(5))
    for field, bad in {"prior_a": np.zeros(2), "prior_ak": -np.ones((2, 5)), "switch_l": np.full(6, 2.0)}.items():
        with pytest.raises(UsageError, match=field):
            haplotype_hmm.log_likelihood(*good, ancestry=ancestry._replace(**{field: bad}))
    only = np.array([[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    with pytest.raises(UsageError, match="state left"):
        haplotype_hmm.log_likelihood(*good, ancestry=ancestry._replace(prior_ak=only), exclude_ne=np.zeros((2, 1), int))
    arguments = mosaic(5, 6, 2, seed=0)[0]
    with pytest.raises(UsageError, match="donors"):
        haplotype_hmm.materialise(bits_lw, 5, *arguments[:2], arguments[2] + 5, *arguments[3:])
    with pytest.raises(UsageError, match="starts at site 0"):
        haplotype_hmm.materialise(bits_lw, 5, np.array([0, 1]), np.array([2]), np.array([0]))
