"""What the tests of linkage disequilibrium share: small panels, brute force on plain arrays, poisoned memory."""

from __future__ import annotations

import numba
import numpy as np

from engine.kernels import ld

SITES = (0, 1, 31, 32, 33, 63, 64, 65, 131, 257)
KINDS = {
    "phased": (False, False),
    "unphased": (True, False),
    "missing": (False, True),
    "unphased_missing": (True, True),
}


def draw(sites, n, seed=0):
    """Alleles (sites, n) in linkage, some sites monomorphic, and their bits."""
    rng = np.random.default_rng(seed)
    founders = rng.random((sites, 6)) < rng.random((sites, 1))
    alleles = founders[:, rng.integers(0, 6, n)] ^ (rng.random((sites, n)) < 0.05)
    alleles[::7] = 0
    alleles[5::11] = 1
    return alleles.astype(np.uint8), pack(alleles)


def linked(sites, n, seed=0):
    """Bits of a panel whose LD falls off with distance: carriers are runs of an order that changes slowly. Some do not vary."""
    rng = np.random.default_rng(seed)
    order, alleles = rng.permutation(n), np.zeros((sites, n), dtype=np.uint8)
    start = size = 0
    for site in range(sites):
        if site % 4 == 0:
            size = int(np.exp(rng.uniform(np.log(2), np.log(n / 2 + 1))))
            start = int(rng.integers(0, n - size + 1))
        a, b = rng.integers(0, n, 2)
        order[[a, b]] = order[[b, a]]
        alleles[site, order[start : start + size]] = 1
    alleles ^= rng.random(alleles.shape) < 0.01
    alleles[rng.random(sites) < 0.05] = 0
    return pack(alleles)


def lost(sites, n, seed=0, share=0.2, whole=True):
    """A plane of alleles not called; sites without any, and (`whole`) sites that lack all."""
    plane = np.random.default_rng(seed + 1000).random((sites, n)) < share
    plane[3::9] = False
    if whole:
        plane[8::13] = True
    return pack(plane)


def pack(alleles):
    sites, n = alleles.shape
    words = (n + 63) // 64
    padded = np.zeros((sites, words * 64), dtype=np.uint8)
    padded[:, :n] = alleles
    return np.packbits(padded, axis=1, bitorder="little").reshape(-1).view(np.uint64).reshape(sites, words)


def unpack(bits, n):
    return np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, :n]


def of_kind(kind, sites, n, seed=0):
    """Bits, and keyword arguments of this kind."""
    unphased, missing = KINDS[kind]
    return draw(sites, n, seed)[1], {"unphased": unphased, "missing_lw": lost(sites, n, seed) if missing else None}


def measures(kind):
    return ("r2", "r", "d") if KINDS[kind][0] else ("r2", "r", "d", "d_prime")


def brute(bits, n, measure, unphased=False, missing_lw=None):
    """Every pair by itself, from vectors of alleles or dosages, by the textbook: means, covariances, frequencies."""
    x = unpack(bits, n).astype(float)
    seen = np.ones(x.shape) if missing_lw is None else 1 - unpack(missing_lw, n)
    if unphased:
        x, seen = x[:, 0::2] + x[:, 1::2], np.minimum(seen[:, 0::2], seen[:, 1::2])
    out = np.full((len(x), len(x)), np.nan)
    for i in range(len(x)):
        for j in range(len(x)):
            both = (seen[i] > 0) & (seen[j] > 0)
            out[i, j] = _pair(x[i, both], x[j, both], measure, unphased)
    return out


def _pair(a, b, measure, unphased):
    if len(a) == 0:
        return np.nan
    covariance = np.mean((a - a.mean()) * (b - b.mean()))
    if measure == "d":
        return covariance / 2 if unphased else covariance
    if a.std() == 0 or b.std() == 0:
        return np.nan
    if measure == "d_prime":
        p, q = a.mean(), b.mean()
        limits = (p * (1 - q), (1 - p) * q) if covariance > 0 else (p * q, (1 - p) * (1 - q))
        return covariance / min(limits)
    r = covariance / (a.std() * b.std())
    return r if measure == "r" else r * r


def positions(sites, span, seed=0):
    return np.sort(np.random.default_rng(seed).integers(0, span, sites))


def same(got, wanted):
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted, strict=True)


def poison(monkeypatch):
    """Memory from np.empty is full of ones, so that a cell that is never written is seen. Compile everything before."""
    true_empty = np.empty

    def poisoned_empty(*args, **kwargs):
        array = true_empty(*args, **kwargs)
        array.view(np.uint8).reshape(-1)[:] = 0xA5
        return array

    monkeypatch.setattr(np, "empty", poisoned_empty)


def every_sink_gives_the_reference(bits, other, n, unphased, threads):
    """All that is made of tiles, of one panel and between two, by one or two threads."""
    sites, how = len(bits), {"unphased": unphased}
    slow = how | {"implementation": "reference"}
    end_l = ld.window(sites, sites=300, bp=40_000, position_bp=positions(sites, 100_000))
    before = numba.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    try:
        for measure in ("r2", "d"):
            cells = ld.matrix(bits, n, measure=measure, **how)
            same(cells, ld.matrix(bits, n, measure=measure, **slow))
        cells = ld.matrix(bits, n, **how)
        same(ld.matrix(other, n, bits, **how), ld.matrix(other, n, bits, **slow))
        same(np.concatenate(list(ld.triangle(bits, n, rows=290, **how))), cells[np.tril_indices(sites)])
        for second, ends in ((None, None), (None, end_l), (other, None)):
            wanted = ld.threshold(bits, n, 0.1, second, end_l=ends, **slow)
            for got, one in zip(ld.threshold(bits, n, 0.1, second, end_l=ends, **how), wanted, strict=True):
                same(got, one)
        same(ld.band(bits, n, end_l, **how), ld.band(bits, n, end_l, **slow))
        np.testing.assert_allclose(ld.score(bits, n, end_l, **how), ld.score(bits, n, end_l, **slow), rtol=1e-12)
        place, edges = np.sort(positions(sites, 100_000)), [5_000, 9_000, 30_000, 70_000]
        sums, pairs = ld.decay(bits, n, place, edges, **how)
        wanted_sums, wanted_pairs = ld.decay(bits, n, place, edges, **slow)
        same(pairs, wanted_pairs)
        np.testing.assert_allclose(sums, wanted_sums, rtol=1e-12)
    finally:
        numba.set_num_threads(before)
