"""The Li-Stephens copying model beside kalis, lshmm and tskit: likelihood, posterior, paths, and building of mosaics.

Panels are simulated (msprime, one population of 10,000, 1e-8 recombinations and 1.25e-8 mutations per base and generation), or
random bits, which no class of equal haplotypes makes smaller. Targets are haplotypes of the panel, each without itself, because
that is all that kalis does.

kalis is an R package (louisaslett/kalis); what is measured is its C core, without R. ENGINE_KALIS names a shared library built
from it with -O3 -march=native for its AVX-512 stencil, unrolled four times, that exports

    void kalis_forward(const uint32_t *haplotypes_lw, size_t words, size_t sites, size_t haplotypes, size_t from, size_t to,
                       const double *mu_l, const double *rho_l, double pi, double *alpha_nk, double *fold_n)

which runs ExactForward with vector mu and scalar Pi for recipients from .. to-1 from the first site to the last; rho_l[l] is
the switch between l and l+1. lshmm and tskit are run on a few hundred sites of one target and charged by the cell.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from engine.kernels import bits, haplotype_hmm
from perf.case import Case, Peer, Timed
from perf.peers import missing_package

HAPLOTYPES = 5_008
SWITCH, MISMATCH = 5e-5, 2e-4


@cache
def _simulated(sites: int, k: int) -> Any:
    """Tree sequence of k haplotypes with at least `sites` sites."""
    import msprime

    trees = msprime.sim_ancestry(
        k // 2, sequence_length=260.0 * sites + 20_000, recombination_rate=1e-8, population_size=10_000, random_seed=1
    )
    return msprime.sim_mutations(trees, rate=1.25e-8, random_seed=1, model=msprime.BinaryMutationModel())


@cache
def _panel(sites: int, k: int, kind: str) -> np.ndarray:
    """uint8 (sites, k) alleles."""
    if kind == "random":
        return (np.random.default_rng(1).random((sites, k)) < 0.5).astype(np.uint8)
    alleles_lk = _simulated(sites, k).genotype_matrix()
    assert len(alleles_lk) >= sites
    return np.ascontiguousarray(alleles_lk[:sites].astype(np.uint8))


def _inputs(sites: int, k: int, n: int, kind: str) -> dict[str, Any]:
    """Panel, and n of its haplotypes as targets, each of which may not copy itself."""
    alleles_lk = _panel(sites, k, kind)
    own_n = np.arange(n) * (k // n)
    switch_l = np.full(sites, SWITCH)
    return {
        "reference_lw": bits.pack(alleles_lk), "k": k, "target_nl": np.ascontiguousarray(alleles_lk[:, own_n].T),
        "switch_l": switch_l, "mismatch_l": np.full(sites, MISMATCH), "exclude_ne": own_n[:, None],
        "uniforms_nl": np.random.default_rng(2).random((n, sites)), "kind": kind,
    }  # fmt: skip


def _model(inputs: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(inputs[name] for name in ("reference_lw", "k", "target_nl", "switch_l", "mismatch_l"))


# peers


@cache
def _kalis() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ["ENGINE_KALIS"])


def _kalis_missing() -> str | None:
    path = os.environ.get("ENGINE_KALIS")
    if not path:
        return "ENGINE_KALIS names no library with kalis_forward (kalis is on CRAN and GitHub only)"
    return None if os.path.exists(path) else f"ENGINE_KALIS: no file {path}"


def _kalis_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    reference_lw = inputs["reference_lw"]
    padded_lw = np.zeros((len(reference_lw), (reference_lw.shape[1] + 7) // 8 * 8), np.uint64)
    padded_lw[:, : reference_lw.shape[1]] = reference_lw
    return {**inputs, "padded_lw": padded_lw, "rho_l": np.append(inputs["switch_l"][1:], 0.0)}


def _kalis_forward(inputs: dict[str, Any]) -> Timed:
    """The first recipients of the panel, whichever haplotypes ours are: the work is the same. Seconds are for all of ours."""
    n, k, sites = 4, inputs["k"], len(inputs["padded_lw"])
    alpha_nk, fold_n = np.zeros((n, k)), np.zeros(n)
    arrays = [inputs["padded_lw"], inputs["mismatch_l"], inputs["rho_l"], alpha_nk, fold_n]
    bits_p, mu_p, rho_p, alpha_p, fold_p = (ctypes.c_void_p(array.ctypes.data) for array in arrays)
    size = ctypes.c_size_t
    begin = time.process_time()
    _kalis().kalis_forward(
        bits_p, size(2 * inputs["padded_lw"].shape[1]), size(sites), size(k), size(0), size(n), mu_p, rho_p,
        ctypes.c_double(1 / (k - 1)), alpha_p, fold_p,
    )  # fmt: skip
    seconds = (time.process_time() - begin) * len(inputs["target_nl"]) / n
    return Timed(seconds, alpha_nk / fold_n[:, None], f"{n} recipients, charged by the cell")


def _kalis_same(inputs_of: Callable[[], dict[str, Any]]) -> Callable[[Any, Any], None]:
    def same(_: Any, theirs: np.ndarray) -> None:
        """The forward states that kalis ends with, against ours of the same recipients."""
        inputs = inputs_of()
        reference_lw, k, _targets, switch_l, mismatch_l = _model(inputs)
        target_nl = np.ascontiguousarray(_panel(len(switch_l), k, inputs["kind"])[:, : len(theirs)].T)
        ours, _logs = haplotype_hmm.forward_states(
            reference_lw, k, target_nl, switch_l, mismatch_l, [len(switch_l) - 1], dtype=np.float64,
            exclude_ne=np.arange(len(theirs))[:, None],
        )  # fmt: skip
        np.testing.assert_allclose(ours[:, 0], theirs, rtol=1e-6, atol=1e-12)

    return same


def _lshmm_forward(inputs: dict[str, Any]) -> Timed:
    import lshmm

    sites, target_nl = min(200, len(inputs["switch_l"])), inputs["target_nl"]
    alleles_lk = bits.unpack(inputs["reference_lw"][:sites], inputs["k"]).astype(np.int8)
    query, rho, mu = (
        target_nl[:1, :sites].astype(np.int8),
        inputs["switch_l"][:sites].copy(),
        inputs["mismatch_l"][:sites],
    )
    rho[0] = 0
    begin = time.process_time()
    _, _, log10 = lshmm.forwards(alleles_lk, query, 1, rho, prob_mutation=mu)
    seconds = (time.process_time() - begin) * target_nl.size / sites
    ours = haplotype_hmm.log_likelihood(
        inputs["reference_lw"][:sites], inputs["k"], query.astype(np.uint8), inputs["switch_l"][:sites], mu,
        dtype=np.float64,
    )  # fmt: skip
    np.testing.assert_allclose(ours[0], log10 * np.log(10), rtol=1e-6)
    return Timed(seconds, None, f"{sites} sites of one target, charged by the cell")


def _tskit_forward(inputs: dict[str, Any]) -> Timed:
    import _tskit

    sites, target_nl, k = min(300, len(inputs["switch_l"])), inputs["target_nl"], inputs["k"]
    whole = _simulated(len(inputs["switch_l"]), k)
    trees = whole.keep_intervals([[0, whole.sites_position[sites]]], simplify=False)
    rho, mu = inputs["switch_l"][:sites].copy(), inputs["mismatch_l"][:sites].copy()
    rho[0] = 0
    model = _tskit.LsHmm(trees.ll_tree_sequence, rho, mu)
    begin = time.process_time()
    model.forward_matrix(target_nl[0, :sites].astype(np.int8), _tskit.CompressedMatrix(trees.ll_tree_sequence))
    seconds = (time.process_time() - begin) * target_nl.size / sites
    return Timed(seconds, None, f"{sites} sites of one target over the true trees, charged by the cell")


def _peers(inputs_of: Callable[[], dict[str, Any]], goals: tuple[float | None, ...], trees: bool) -> tuple[Peer, ...]:
    kalis, lshmm = goals
    peers = [
        Peer("kalis", _kalis_forward, _kalis_inputs, _kalis_same(inputs_of), kalis, _kalis_missing, lambda: "C core"),
        Peer("lshmm", _lshmm_forward, goal=lshmm, missing=lambda: missing_package("lshmm")),
    ]
    if trees:
        peers.append(Peer("tskit", _tskit_forward, missing=lambda: missing_package("tskit")))
    return tuple(peers)


# cases


def _case(
    name: str,
    run: Callable[[dict[str, Any]], Any],
    sites: int,
    k: int,
    n: int,
    kind: str,
    goals: tuple[float | None, ...] | None,
    *,
    threads: int = 1,
    quick: bool = True,
) -> Case:
    @cache
    def inputs() -> dict[str, Any]:
        return _inputs(sites, k, n, kind)

    peers = () if goals is None else _peers(inputs, goals, kind == "simulated" and k == HAPLOTYPES)
    return Case(
        f"haplotype_hmm.{name}", {"sites": sites, "haplotypes": k, "targets": n}, float(sites) * k * n, "cells", inputs, run,
        peers, floor_bytes=sites * (k / 8 + n), floor_ops=2.0 * sites * k * n, limit="f32_fma", threads=threads,
        quick=quick,
    )  # fmt: skip


def _forward(dtype: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda inputs: haplotype_hmm.log_likelihood(*_model(inputs), exclude_ne=inputs["exclude_ne"], dtype=dtype)


def _paths(inputs: dict[str, Any]) -> Any:
    return haplotype_hmm.posterior_paths(*_model(inputs), inputs["uniforms_nl"], exclude_ne=inputs["exclude_ne"])


def _sums(inputs: dict[str, Any]) -> Any:
    return haplotype_hmm.posterior_sums(*_model(inputs), exclude_ne=inputs["exclude_ne"])


def _ancestry(inputs: dict[str, Any]) -> Any:
    k, sites, groups = inputs["k"], len(inputs["switch_l"]), 5
    prior_ak = np.full((groups, k), 0.02 / k)
    prior_ak[np.arange(k) % groups, np.arange(k)] += 0.98 * groups / k
    ancestry = haplotype_hmm.Ancestry(np.full(groups, 1 / groups), prior_ak, np.full(sites, 1e-6))
    return haplotype_hmm.log_likelihood(*_model(inputs), exclude_ne=inputs["exclude_ne"], ancestry=ancestry)


def _mosaic_inputs(sites: int, k: int, n: int) -> tuple[Any, ...]:
    """Segments of 300 sites on average and a flip in 5,000 sites."""
    rng = np.random.default_rng(3)
    starts, flips = [], []
    for _ in range(n):
        starts.append(np.unique(np.append(rng.integers(0, sites, rng.poisson(sites / 300)), 0)))
        flips.append(np.unique(rng.integers(0, sites, rng.poisson(sites / 5_000))))
    offsets = [np.concatenate([[0], np.cumsum([len(part) for part in parts])]) for parts in (starts, flips)]
    donors = rng.integers(0, k, offsets[0][-1]).astype(np.int32)
    return (
        bits.pack(_panel(sites, k, "random")),
        k,
        offsets[0],
        np.concatenate(starts),
        donors,
        offsets[1],
        np.concatenate(flips),
    )


def _mosaic(sites: int, k: int, n: int, *, threads: int = 1, quick: bool = True) -> Case:
    return Case(
        "haplotype_hmm.materialise", {"sites": sites, "haplotypes": k, "made": n}, sites * n / 2.0, "genotypes",
        lambda: _mosaic_inputs(sites, k, n), lambda inputs: haplotype_hmm.materialise(*inputs),
        floor_bytes=sites * (k + n) / 8, floor_ops=sites * (k + n) / 8, limit="copy", threads=threads, quick=quick,
    )  # fmt: skip


def cases() -> list[Case]:
    sites, n = 10_000, 64
    f32, f64 = _forward(np.float32), _forward(np.float64)
    return [
        _case("forward_f32", f32, sites, HAPLOTYPES, n, "simulated", (5.0, 400.0)),
        _case("forward_f64", f64, sites, HAPLOTYPES, n, "simulated", (2.0, None), quick=False),
        _case("forward_random_f32", f32, 2_000, HAPLOTYPES, n, "random", (5.0, 400.0)),
        _case("forward_random_f64", f64, 2_000, HAPLOTYPES, n, "random", (2.0, None), quick=False),
        _case("forward_few_f32", f32, 2_000, HAPLOTYPES, 4, "random", (4.0, None)),
        _case("forward_few_f64", f64, 2_000, HAPLOTYPES, 4, "random", (2.0, None), quick=False),
        _case("forward_f32", f32, sites, HAPLOTYPES, n, "simulated", None, threads=2),
        _case("posterior_paths", _paths, sites, HAPLOTYPES, n, "simulated", (1.0, None)),
        _case("posterior_paths_random", _paths, 2_000, HAPLOTYPES, n, "random", (1.0, None), quick=False),
        _case("posterior_sums", _sums, sites, HAPLOTYPES, n, "simulated", None),
        _case("ancestry_forward", _ancestry, 2_000, HAPLOTYPES, n, "simulated", None),
        _mosaic(20_000, HAPLOTYPES, 4_096),
        _mosaic(20_000, HAPLOTYPES, 4_096, threads=2),
    ]


def curves() -> dict[str, list[Case]]:
    def forward(sites: int, k: int, n: int) -> Case:
        return _case("forward_f32", _forward(np.float32), sites, k, n, "simulated", None, quick=False)

    return {
        "sites": [forward(sites, 2_000, 64) for sites in (1_000, 2_000, 4_000, 8_000, 16_000)],
        "haplotypes": [forward(2_000, k, 64) for k in (1_000, 2_000, 4_000, 8_000, 16_000)],
        "targets": [forward(2_000, 2_000, n) for n in (16, 64, 256, 1_024)],
    }
