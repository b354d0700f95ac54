"""What is made of LD without a matrix: lists, scores, decay, triangles; against the matrix, on any number of threads."""

from __future__ import annotations

import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from engine.errors import UsageError
from engine.kernels import ld

sys.path.insert(0, str(Path(__file__).parent))
from ld_panels import KINDS, SITES, brute, draw, linked, lost, measures, of_kind, poison, positions, same


@pytest.fixture(scope="module")
def compiled():
    for kind in KINDS:
        bits, options = of_kind(kind, 3, 6)
        end_l = ld.window(3, sites=1)
        ld.threshold(bits, 6, 0.1, end_l=end_l, **options)
        ld.threshold(bits, 6, 0.1, bits, **options)
        ld.score(bits, 6, end_l, **options)
        ld.decay(bits, 6, [1, 2, 3], [0, 5], **options)
        ld.decay(bits, 6, [1.0, 2.0, 3.0], [0, 5], **options)


@pytest.fixture
def poisoned(compiled, monkeypatch):
    poison(monkeypatch)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("least", [0.0, 0.1, 0.5, 1.0])
def test_threshold_lists_cells_of_the_matrix(kind, least):
    for sites in SITES:
        bits, options = of_kind(kind, sites, 66, seed=sites)
        end_l = ld.window(sites, sites=70, bp=900, position_bp=positions(sites, 3000))
        for measure in measures(kind):
            cells = ld.matrix(bits, 66, measure=measure, **options)
            for ends in (None, end_l):
                i, j, value = ld.threshold(bits, 66, least, end_l=ends, measure=measure, **options)
                stop = np.full(sites, sites) if ends is None else ends
                wanted = [
                    (a, b) for a in range(sites) for b in range(a + 1, stop[a]) if abs(cells[a, b]) >= np.float32(least)
                ]
                assert list(zip(i.tolist(), j.tolist())) == wanted
                same(value, cells[i, j])
                if ends is not None:
                    for got, other in zip(
                        (i, j, value),
                        ld.threshold(
                            bits, 66, least, end_l=ends, measure=measure, implementation="reference", **options
                        ),
                    ):
                        same(got, other)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
def test_threshold_of_two_sets(kind):
    bits, options = of_kind(kind, 67, 66)
    for others in (0, 1, 33, 300):
        other, other_options = of_kind(kind, others, 66, seed=1)
        options["other_missing_mw"] = other_options["missing_lw"]
        cells = ld.matrix(bits, 66, other, **options)
        i, j, value = ld.threshold(bits, 66, 0.05, other, **options)
        wanted_i, wanted_j = np.nonzero(cells >= np.float32(0.05))
        same(i, wanted_i)
        same(j, wanted_j)
        same(value, cells[i, j])


def test_a_threshold_that_is_met_exactly_is_met():
    """r2 = 1/4 and the like: the value and the threshold are rounded in the same way."""
    bits = draw(60, 20, seed=4)[1]
    cells = ld.r2(bits, 20)
    for least in np.unique(cells[np.isfinite(cells)]):
        assert len(ld.threshold(bits, 20, float(least))[0]) == np.triu(cells >= least, k=1).sum()


def test_csr_is_the_matrix_again():
    bits = linked(90, 66)
    i, j, value = ld.threshold(bits, 66, 0.2)
    sparse = ld.csr(i, j, value, 90)
    dense = np.zeros((90, 90), dtype=np.float32)
    for row in range(90):
        part = slice(sparse.indptr[row], sparse.indptr[row + 1])
        assert (np.diff(sparse.indices[part]) > 0).all()
        dense[row, sparse.indices[part]] = sparse.data[part]
    r2 = np.triu(ld.r2(bits, 66), k=1)
    same(dense, np.where(r2 >= np.float32(0.2), r2, np.float32(0)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adjusted", [False, True])
def test_scores_are_sums_over_the_window(kind, adjusted):
    for sites in SITES:
        for n in (2, 66):
            bits, options = of_kind(kind, sites, n, seed=sites)
            end_l = ld.window(sites, sites=50, bp=900, position_bp=positions(sites, 3000))
            got = ld.score(bits, n, end_l, adjusted=adjusted, **options)
            wanted = ld.score(bits, n, end_l, adjusted=adjusted, implementation="reference", **options)
            assert got.dtype == wanted.dtype == np.float64
            np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_scores_by_brute_force():
    bits, options = of_kind("unphased_missing", 40, 66)
    r2 = brute(bits, 66, "r2", **options)
    seen = np.ones((40, 66)) - np.unpackbits(options["missing_lw"].view(np.uint8), axis=1, bitorder="little")[:, :66]
    seen = np.minimum(seen[:, 0::2], seen[:, 1::2])
    wanted = []
    for i in range(40):
        total = 1.0
        for j in range(40):
            n = (seen[i] * seen[j]).sum()
            if j != i and abs(i - j) <= 6 and n > 2 and not np.isnan(r2[i, j]):
                total += r2[i, j] - (1 - r2[i, j]) / (n - 2)
        wanted.append(np.nan if np.isnan(r2[i, i]) else total)
    got = ld.score(bits, 66, ld.window(40, sites=6), adjusted=True, **options)
    np.testing.assert_allclose(got, wanted, rtol=1e-9)
    assert np.isnan(got).any()
    assert np.isfinite(got).any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "edges", [(0, 1, 5, 20, 21, 400), (3, 9), (0, 10**9), (-5, 0, 2), (5000, 6000), (0.0, 0.5, 7.25)]
)
@pytest.mark.parametrize("span", [30, 3000])
def test_decay_is_the_histogram_of_the_matrix(edges, span):
    for kind in KINDS:
        for sites in SITES:
            bits, options = of_kind(kind, sites, 66, seed=sites)
            position = positions(sites, span)
            position = position / 4 if isinstance(edges[0], float) else position  # centimorgans
            r2 = ld.r2(bits, 66, **options).astype(np.float64)
            i, j = np.triu_indices(sites, k=1)
            distance, value = position[j] - position[i], r2[i, j]
            got_sums, got_pairs = ld.decay(bits, 66, position, edges, **options)
            sums, pairs = ld.decay(bits, 66, position, edges, implementation="reference", **options)
            for b in range(len(edges) - 1):
                inside = (distance >= edges[b]) & (distance < edges[b + 1]) & ~np.isnan(value)
                assert got_pairs[b] == pairs[b] == inside.sum()
                np.testing.assert_allclose(got_sums[b], value[inside].sum(), rtol=1e-6)
            np.testing.assert_allclose(got_sums, sums, rtol=1e-12)
            assert got_pairs.dtype == np.int64


@pytest.mark.parametrize("rows", [1, 7, 32, 100, 1000])
def test_triangle_is_streamed_row_by_row(rows):
    for kind in KINDS:
        bits, options = of_kind(kind, 75, 66)
        pieces = list(ld.triangle(bits, 66, rows=rows, measure="r", **options))
        cells = ld.matrix(bits, 66, measure="r", **options)
        same(np.concatenate(pieces), np.concatenate([cells[i, : i + 1] for i in range(75)]))
    assert max(len(piece) for piece in pieces) <= rows * 75
    assert list(ld.triangle(bits[:0], 66)) == []


def test_thread_count_changes_nothing():
    bits = linked(900, 132)
    missing = lost(900, 132, share=0.02)
    position, edges, end_l = positions(900, 10_000), np.arange(0, 10_001, 100), ld.window(900, sites=200)
    threads = numba.get_num_threads()
    results = []
    try:
        for count in sorted({1, threads}):
            numba.set_num_threads(count)
            results.append(
                (
                    *ld.threshold(bits, 132, 0.1, end_l=end_l), *ld.threshold(bits, 132, 0.1, missing_lw=missing),
                    ld.score(bits, 132, end_l), *ld.decay(bits, 132, position, edges),
                )
            )  # fmt: skip
    finally:
        numba.set_num_threads(threads)
    assert len(results[0][0]) > 500
    for got, wanted in zip(results[-1], results[0]):
        same(got, wanted)


def test_bits_are_not_changed():
    bits = linked(70, 70) | np.uint64(1 << 63)
    missing = lost(70, 70) | np.uint64(1 << 63)
    before, missing_before = bits.copy(), missing.copy()
    for options in ({}, {"missing_lw": missing}, {"missing_lw": missing, "unphased": True}):
        ld.threshold(bits, 70, 0.1, **options)
        ld.score(bits, 70, ld.window(70), **options)
        ld.prune(bits, 70, 0.1, sites=20, **options)
    same(bits, before)
    same(missing, missing_before)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda b: ld.decay(b, 131, np.arange(19), [0, 1]), "20 values of positions"),
        (lambda b: ld.decay(b, 131, np.arange(20)[::-1], [0, 1]), "never falls"),
        (lambda b: ld.decay(b, 131, np.arange(20), [0]), "edges"),
        (lambda b: ld.decay(b, 131, np.arange(20), [0, 2, 2]), "edges"),
        (lambda b: ld.decay(b, 131, ["a"] * 20, [0, 2]), "numbers"),
        (lambda b: ld.threshold(b, 131, np.nan), "threshold"),
        (lambda b: ld.threshold(b, 131, 0.1, b, end_l=np.full(20, 20)), "two sets"),
        (lambda b: ld.threshold(b, 131, 0.1, end_l=np.arange(3)), "20 integers"),
        (lambda b: ld.score(b, 131, np.zeros(20)), "20 integers"),
        (lambda b: ld.triangle(b, 131, rows=0), "1 or more"),
        (lambda b: ld.triangle(b, 131, measure="x"), "measure"),
    ],
)
def test_bad_input_is_one_line(call, says):
    with pytest.raises(UsageError, match=says) as caught:
        call(draw(20, 131)[1])
    assert "\n" not in str(caught.value)
