"""What the tests of nearest neighbours share: inputs with many ties, and answers found one pair at a time in plain
Python.
"""

from __future__ import annotations

import math

import numpy as np

EXCLUSIONS = ("none", "self", "groups", "both", "all")
FEATURE_KINDS = (
    "normal", "ties", "far from zero", "near copies", "tiny", "outlier", "heavy tails", "zero rows", "constant rows",
    "scaled copies",
)  # fmt: skip


def pack(alleles):
    rows, sites = alleles.shape
    words = (sites + 63) // 64
    padded = np.zeros((rows, words * 64), dtype=np.uint8)
    padded[:, :sites] = alleles
    return np.packbits(padded, axis=1, bitorder="little").reshape(-1).view(np.uint64).reshape(rows, words)


def draw(rows, sites, seed=0, noise=0.03):
    """Alleles (rows, sites) copied from three founders with noise: long runs, many ties, exact copies."""
    founders = np.random.default_rng(sites).random((3, sites)) < 0.5
    rng = np.random.default_rng(seed)
    alleles = founders[rng.integers(0, 3, rows)] ^ (rng.random((rows, sites)) < noise * rng.integers(0, 2, (rows, 1)))
    return alleles.astype(np.uint8)


def people(rows, sites, seed=0, missing=0.2):
    """Dosages (rows, sites) of people who share founders, and where they were observed; some people nowhere."""
    dosages = draw(rows, sites, 2 * seed) + draw(rows, sites, 2 * seed + 1, noise=0.2)
    rng = np.random.default_rng(seed)
    return dosages, (rng.random((rows, sites)) >= missing) & (rng.random((rows, 1)) > 0.1)


def genotype_planes(dosages, observed=None):
    """Planes of IBS; what is not observed is filled with ones, which must not count."""
    hidden = 0 if observed is None else ~observed
    return pack((dosages >= 1) | hidden), pack((dosages == 2) | hidden), None if observed is None else pack(observed)


def exclusions(kind, n, m, seed=0):
    rng = np.random.default_rng(seed)
    groups = (rng.integers(0, 3, n), rng.integers(0, 3, m))
    return {
        "none": {},
        "self": {"exclude_self": True},
        "groups": {"exclude": groups},
        "both": {"exclude_self": True, "exclude": groups},
        "all": {"exclude": (np.zeros(n, dtype=np.int64), np.zeros(m, dtype=np.int64))},
    }[kind]


def is_skipped(n, m, exclude_self=False, exclude=None):
    return (exclude_self and n == m) or (exclude is not None and exclude[0][n] == exclude[1][m])


def brute_topk(distance_nm, k, **excluded):
    """By sorting (distance, index) pairs, row by row."""
    values = np.full((len(distance_nm), k), -1, dtype=distance_nm.dtype)
    index = np.full((len(distance_nm), k), -1, dtype=np.int64)
    for n, row in enumerate(distance_nm):
        pairs = sorted((value, m) for m, value in enumerate(row) if not is_skipped(n, m, **excluded))[:k]
        for slot, (value, m) in enumerate(pairs):
            values[n, slot], index[n, slot] = value, m
    return values, index


def brute_range(rank_nm, radius, *values_nm, **excluded):
    """Pair by pair: offsets, index, and of every matrix in `values_nm` its values."""
    offsets, index, found = [0], [], [[] for _ in values_nm]
    for n, row in enumerate(rank_nm):
        for m, rank in enumerate(row):
            if rank <= radius and not is_skipped(n, m, **excluded):
                index.append(m)
                for column, values in zip(found, values_nm):
                    column.append(values[n, m])
        offsets.append(len(index))
    columns = [np.array(column, dtype=values.dtype) for column, values in zip(found, values_nm)]
    return np.array(offsets, dtype=np.int64), np.array(index, dtype=np.int64), *columns


def brute_run(query, database, position_bp, **excluded):
    """By walking every stretch from every first site."""
    results = []
    for n, q in enumerate(query):
        best = (-1, 0, -1)
        for m, d in enumerate(database):
            first = 0
            while first < len(q) and not is_skipped(n, m, **excluded):
                last = first
                while last < len(q) and q[last] == d[last]:
                    last += 1
                if last > first and position_bp[last - 1] - position_bp[first] > best[0]:
                    best = (position_bp[last - 1] - position_bp[first], last - first, m)
                first = max(last, first + 1)
        results.append(best)
    return tuple(np.array(results, dtype=np.int64).reshape(len(query), 3).T)


def hamming_by_hand(query, database):
    return np.array([[(q != d).sum() for d in database] for q in query], dtype=np.int32).reshape(
        len(query), len(database)
    )


def ibs_by_hand(query, query_seen, database, database_seen):
    """Site by site: sum of |x - y|, and sites seen in both."""
    distance = np.zeros((len(query), len(database)), dtype=np.int32)
    sites = np.zeros_like(distance)
    for n in range(len(query)):
        for m in range(len(database)):
            for x, y, x_seen, y_seen in zip(query[n].tolist(), database[m].tolist(), query_seen[n], database_seen[m]):
                if x_seen and y_seen:
                    distance[n, m] += abs(x - y)
                    sites[n, m] += 1
    return distance, sites


def _sum(values):
    """Python's own floats, one addition at a time (the built-in sum compensates)."""
    total = 0.0
    for value in values:
        total += value
    return total


def features_by_hand(query, database, metric):
    out = np.zeros((len(query), len(database)), dtype=np.float32)
    for n, q in enumerate(query.astype(np.float64).tolist()):
        for m, d in enumerate(database.astype(np.float64).tolist()):
            if metric == "l2":
                out[n, m] = np.float32(_sum((a - b) * (a - b) for a, b in zip(q, d)))
                continue
            q_mean, d_mean = (_sum(x) / len(x) if metric == "correlation" and x else 0.0 for x in (q, d))
            a, b = [x - q_mean for x in q], [x - d_mean for x in d]
            square = _sum(x * x for x in a) * _sum(x * x for x in b)
            cosine = _sum(x * y for x, y in zip(a, b)) / math.sqrt(square) if square else 0.0
            out[n, m] = np.float32(max(0.0, 1.0 - cosine))
    return out


def features(rows, axes, kind, seed):
    rng = np.random.default_rng(seed)
    return {
        "normal": lambda: rng.standard_normal((rows, axes)),
        "ties": lambda: rng.integers(-2, 3, (rows, axes)),
        "far from zero": lambda: 1e4 + rng.standard_normal((rows, axes)) * 1e-2,
        "near copies": lambda: np.ones((rows, axes)) + rng.integers(0, 3, (rows, axes)) * 2.0**-23,
        "tiny": lambda: rng.standard_normal((rows, axes)) * 1e-22,
        "outlier": lambda: rng.standard_normal((rows, axes)) * np.where(np.arange(rows) == 1, 1e8, 1.0)[:, None],
        "heavy tails": lambda: rng.standard_cauchy((rows, axes)),
        "zero rows": lambda: rng.integers(0, 2, (rows, 1)) * rng.standard_normal((rows, axes)),
        "constant rows": lambda: (
            rng.integers(1, 4, (rows, 1)) + rng.integers(0, 2, (rows, 1)) * rng.random((rows, axes))
        ),
        "scaled copies": lambda: 2.0 ** rng.integers(-3, 4, (rows, 1)) * (np.arange(axes) % 5 - 1),
    }[kind]().astype(np.float32)


def same(got, wanted):
    got, wanted = (x if isinstance(x, tuple) else (x,) for x in (got, wanted))
    assert len(got) == len(wanted)
    for g, w in zip(got, wanted):
        assert g.dtype == w.dtype
        np.testing.assert_array_equal(g, w, strict=True)
