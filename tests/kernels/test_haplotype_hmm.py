"""The copying model: every implementation against sums over all K^L paths, and the fast ones against the reference."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from engine.errors import Unsupported, UsageError
from engine.kernels import haplotype_hmm

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


def test_float32_state_stays_within_1e_4_nats_per_1000_sites():
    k, sites = 700, 3_000
    rng = np.random.default_rng(11)
    alleles_lk = (rng.random((sites, k)) < rng.beta(0.3, 1, (sites, 1))).astype(np.uint8)
    donors = np.repeat(rng.integers(0, k, (4, sites // 100)), 100, axis=1)
    target_nl = alleles_lk[np.arange(sites), donors] ^ (rng.random((4, sites)) < 1e-3).astype(np.uint8)
    for switch in (1e-2, 1e-6, 1e-12):  # the last: nearly every state decays towards underflow
        arguments = packed(alleles_lk), k, target_nl, np.full(sites, switch), np.full(sites, 2e-4)
        exact = haplotype_hmm.log_likelihood(*arguments, implementation="reference")
        np.testing.assert_allclose(haplotype_hmm.log_likelihood(*arguments), exact, atol=1e-4 * sites / 1000, rtol=0)


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
    with pytest.raises(Unsupported):
        haplotype_hmm.posterior(*good, implementation="triton")
    arguments = mosaic(5, 6, 2, seed=0)[0]
    with pytest.raises(UsageError, match="donors"):
        haplotype_hmm.materialise(bits_lw, 5, *arguments[:2], arguments[2] + 5, *arguments[3:])
    with pytest.raises(UsageError, match="starts at site 0"):
        haplotype_hmm.materialise(bits_lw, 5, np.array([0, 1]), np.array([2]), np.array([0]))


IN_THE_INTERPRETER = """
import numpy as np, torch
from engine.kernels import haplotype_hmm
rng = np.random.default_rng(4)
for k, sites, n in [(1, 3, 1), (65, 20, 5), (1100, 7, 4)]:
    words = rng.integers(0, 2**63, (sites, (k + 63) // 64), dtype=np.uint64)
    words[:, -1] &= np.uint64(2 ** (k % 64 or 64) - 1)
    target = rng.choice(np.array([0, 1, 255], np.uint8), (n, sites))
    switch, mismatch = rng.random(sites) * 0.3, rng.random(sites) * 0.1
    exclude = np.full((n, 2), -1)
    exclude[:, 1] = rng.integers(0, k, n) if k > 1 else -1
    for given in ({}, {"prior_k": rng.random(k) + 0.1}, {"exclude_ne": exclude}):
        exact = haplotype_hmm.log_likelihood(words, k, target, switch, mismatch, implementation="reference", **given)
        found = haplotype_hmm.log_likelihood(
            torch.from_numpy(words.view(np.int64)), k, torch.from_numpy(target), switch, mismatch,
            implementation="triton", **given
        )
        np.testing.assert_allclose(found.numpy(), exact, atol=1e-5)
print("the same")
"""

AHEAD_OF_TIME = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from engine.kernels.haplotype_hmm import triton_gpu
pointers = dict(zip(("bits_ptr", "target_ptr", "switch_ptr", "mismatch_ptr", "prior_ptr", "state_ptr", "result_ptr"),
                    ("*i32", "*u8", "*fp64", "*fp64", "*fp32", "*fp32", "*fp64")))
numbers = dict.fromkeys(("n_targets", "sites", "half_words", "padded", "prior_stride"), "i32")
constants = {"BLOCK_N": triton_gpu.BLOCK_N, "BLOCK_K": triton_gpu.BLOCK_K}
signature = {**pointers, **numbers, **dict.fromkeys(constants, "constexpr")}
divisible = {(i,): [["tt.divisibility", 16]] for i in (*range(7), 10, 11)}
for arch in (80, 90):
    source = ASTSource(fn=triton_gpu.forward_kernel, signature=signature, constexprs=constants, attrs=divisible)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    assert len(made.asm["cubin"]) > 1000 and f"sm_{arch}" in made.asm["ptx"], arch
print("compiled")
"""


def in_own_process(script: str, **environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env={**variables, **environment}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_triton_equals_reference_in_the_interpreter():
    assert in_own_process(IN_THE_INTERPRETER, TRITON_INTERPRET="1").endswith("the same")


def test_triton_compiles_ahead_of_time_for_sm_80_and_sm_90():
    assert in_own_process(AHEAD_OF_TIME).endswith("compiled")


def test_triton_equals_reference_on_a_gpu():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    alleles_lk, target_nl, switch_l, mismatch_l = panel(1500, 200, 9)
    bits_lw = packed(alleles_lk)
    exact = haplotype_hmm.log_likelihood(bits_lw, 1500, target_nl, switch_l, mismatch_l, implementation="reference")
    found = haplotype_hmm.log_likelihood(
        torch.from_numpy(bits_lw.view(np.int64)).cuda(), 1500, torch.from_numpy(target_nl).cuda(), switch_l, mismatch_l
    )
    np.testing.assert_allclose(found.cpu().numpy(), exact, atol=2e-5)
