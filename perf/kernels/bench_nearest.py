"""Nearest neighbours beside FAISS, torch, plink1.9 and usearch: bits, genotypes, windows, runs, and features by three metrics.

Inputs are drawn at random, which is the hard case for features: in many axes all distances are alike, and a filter has
little to go by. Every peer's distances are held against ours; of plink1.9 the computing share counts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from engine.kernels import bits, nearest
from perf.case import Case, Peer, Timed
from perf.limits import count_limit
from perf.peers import computing_share, missing_package, missing_program, plink_command, write_bed

K = 10


def cases() -> list[Case]:
    return [
        _hamming(5_008, 5_008, 10_000, goal=2.5),
        _hamming(1_000, 20_000, 65_536, goal=4, quick=False),  # FAISS takes minutes of it on some processors
        _hamming(5_008, 5_008, 10_000, goal=2.5, threads=2),
        _hamming_range(5_008, 5_008, 10_000),
        _ibs(2_504, 10_000, missing=0.0),
        _ibs(2_504, 10_000, missing=0.02, quick=False),
        _windows(2_000, 2_000, 10_000),
        _longest_run(1_000, 4_000, 20_000),
        *(_features("l2", 2_000, 20_000, 512, product) for product in (None, "bfloat16", "float32")),
        *(_features("l2", 10_000, 50_000, 512, product, quick=False) for product in (None, "bfloat16", "float32")),
        _features("cosine", 2_000, 20_000, 512, None, quick=False),
        _features("correlation", 2_000, 20_000, 512, None, quick=False),
        _features("l2", 2_000, 20_000, 512, None, threads=2, quick=False),
        _features("l2", 10_000, 50_000, 512, None, threads=2, quick=False),
        _patches(500, 2_000, 24),
    ]


def curves() -> dict[str, list[Case]]:
    return {
        "rows": [_hamming(1_000, rows, 10_000, peers=False) for rows in (5_000, 10_000, 20_000, 40_000)],
        "bits": [_hamming(1_000, 5_000, width, peers=False) for width in (4_096, 16_384, 65_536, 262_144)],
        "k": [_hamming(1_000, 20_000, 10_000, k=k, peers=False) for k in (1, 10, 100)],
        "axes": [_features("l2", 1_000, 10_000, axes, None, peers=False) for axes in (64, 256, 1_024, 4_096)],
    }


def random_bits(rows: int, width: int, seed: int) -> np.ndarray:
    """uint64 (rows, ceil(width / 64)); nothing beyond `width`."""
    bits_nw = np.random.default_rng(seed).integers(0, 2**64, (rows, bits.words(width)), dtype=np.uint64)
    if width % 64:
        bits_nw[:, -1] &= np.uint64((1 << (width % 64)) - 1)
    return bits_nw


def related_bits(rows: int, sites: int, seed: int) -> np.ndarray:
    """uint64 (rows, words): mosaics of 50 founders in stretches of about 300 sites, one site in 500 changed."""
    founders = np.random.default_rng(0).random((50, sites)) < 0.3
    rng = np.random.default_rng(seed)
    alleles_nl = np.empty((rows, sites), dtype=np.uint8)
    for row in alleles_nl:
        switches = np.cumsum(rng.random(sites) < 1 / 300)
        row[:] = founders[rng.integers(0, 50, switches[-1] + 1)[switches], np.arange(sites)]
    alleles_nl ^= rng.random((rows, sites)) < 0.002
    return bits.pack(alleles_nl)


def _hamming(
    queries: int,
    rows: int,
    width: int,
    *,
    k: int = K,
    goal: float | None = None,
    threads: int = 1,
    peers: bool = True,
    quick: bool = True,
) -> Case:
    words = bits.words(width)

    def prepare() -> dict[str, Any]:
        return {"query": random_bits(queries, width, 1), "database": random_bits(rows, width, 2)}

    def faiss_index(inputs: dict[str, Any]) -> tuple[Any, np.ndarray]:
        import faiss

        faiss.omp_set_num_threads(threads)
        index = faiss.IndexBinaryFlat(64 * words)
        index.add(inputs["database"].view(np.uint8))
        return index, inputs["query"].view(np.uint8)

    def usearch_rows(inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        return inputs["database"].view(np.uint8), inputs["query"].view(np.uint8)

    def usearch(inputs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        from usearch.index import MetricKind, search

        return search(*inputs, k, MetricKind.Hamming, exact=True, threads=threads).distances

    return Case(
        name="nearest.hamming_topk",
        size={"queries": queries, "rows": rows, "bits": width, "k": k},
        work=queries * rows,
        unit="pairs",
        prepare=prepare,
        run=lambda inputs: nearest.hamming_topk(inputs["query"], inputs["database"], k)[0],
        peers=(
            Peer(
                "faiss.IndexBinaryFlat",
                lambda inputs: inputs[0].search(inputs[1], k)[0],
                faiss_index,
                same=_equal,
                goal=goal,
                missing=lambda: missing_package("faiss"),
            ),
            Peer("usearch", usearch, usearch_rows, same=_equal, missing=lambda: missing_package("usearch")),
        )
        if peers
        else (),
        floor_bytes=8.0 * words * (queries + rows) + 12.0 * queries * k,
        floor_ops=queries * rows * words,
        limit=count_limit(words),
        threads=threads,
        quick=quick,
    )


def _hamming_range(queries: int, rows: int, width: int) -> Case:
    """A radius that holds about one pair in a thousand."""
    words, radius = bits.words(width), int(width / 2 - 3.09 * np.sqrt(width) / 2)

    def faiss_index(inputs: dict[str, Any]) -> tuple[Any, np.ndarray]:
        import faiss

        faiss.omp_set_num_threads(1)
        index = faiss.IndexBinaryFlat(64 * words)
        index.add(inputs["database"].view(np.uint8))
        return index, inputs["query"].view(np.uint8)

    return Case(
        name="nearest.hamming_range",
        size={"queries": queries, "rows": rows, "bits": width},
        work=queries * rows,
        unit="pairs",
        prepare=lambda: {"query": random_bits(queries, width, 1), "database": random_bits(rows, width, 2)},
        run=lambda inputs: nearest.hamming_range(inputs["query"], inputs["database"], radius),
        peers=(
            Peer(
                "faiss.IndexBinaryFlat range_search",
                lambda inputs: inputs[0].range_search(inputs[1], radius + 1),
                faiss_index,
                missing=lambda: missing_package("faiss"),
            ),
        ),
        floor_bytes=8.0 * words * (queries + rows),
        floor_ops=queries * rows * words,
        limit=count_limit(words),
        quick=False,
    )


def _ibs(people: int, sites: int, missing: float, *, quick: bool = True) -> Case:
    """All people against each other: half of the pairs, which gives the whole matrix, as plink1.9 does."""
    words = bits.words(sites)

    def prepare() -> dict[str, Any]:
        rng = np.random.default_rng(3)
        alleles_ln = (rng.random((sites, 2 * people)) < rng.random((sites, 1)) * 0.5).astype(np.uint8)
        lost_ln = np.repeat(rng.random((sites, people)) < missing, 2, axis=1)
        bits_lw, missing_lw = bits.pack(alleles_ln), bits.pack(lost_ln) if missing else None
        planes = bits.dosage_planes(bits_lw, 2 * people, missing_lw)
        turned = nearest.ibs_planes(*(bits.transpose(plane, people) for plane in planes))
        return {"bits_lw": bits_lw, "missing_lw": missing_lw, "planes": turned if missing else (*turned[:2], None)}

    def fileset(inputs: dict[str, Any]) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="ibs-"))
        return write_bed(folder / "panel", inputs["bits_lw"], 2 * people, missing_lw=inputs["missing_lw"])

    def plink(prefix: Path) -> Timed:
        files = ("--bfile", prefix, "--out", prefix)
        flat = ("flat-missing",) if missing else ()
        work = plink_command("plink1.9", *files, "--distance", "square", "bin4", "1-ibs", *flat)
        timed = computing_share(work, plink_command("plink1.9", *files, "--freq"))
        matrix = np.fromfile(f"{prefix}.mdist.bin", dtype=np.float32).reshape(people, people)
        return Timed(timed.seconds, matrix, timed.note, timed.peak_bytes)

    def same(ours: Any, theirs: Any) -> None:
        np.testing.assert_allclose(ours[0] / (2.0 * ours[1]), theirs, atol=2e-6)

    return Case(
        name="nearest.ibs_cross" + ("_missing" if missing else ""),
        size={"people": people, "sites": sites},
        work=people * (people + 1) / 2,
        unit="pairs",
        prepare=prepare,
        run=lambda inputs: nearest.ibs_cross(inputs["planes"], inputs["planes"], sites),
        peers=(
            Peer(
                "plink1.9 --distance",
                plink,
                fileset,
                same=same,
                goal=6,
                missing=lambda: missing_program("plink1.9"),
            ),
        ),
        floor_bytes=8.0 * (3 if missing else 2) * words * people + 8.0 * people * people,
        floor_ops=people * (people + 1) / 2 * words * (3 if missing else 2),
        limit="popcount" if missing else count_limit(2 * words),
        quick=quick,
    )


def _windows(queries: int, rows: int, sites: int) -> Case:
    """Windows of 200 sites every 100, nearest one each; beside it one search per window."""
    windows = [(start, start + 200) for start in range(0, sites - 199, 100)]

    def one_by_one(cut: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        return np.stack([nearest.hamming_topk(query, database, 1)[0] for query, database in cut], axis=1)

    def cut(inputs: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        alleles = [bits.unpack(inputs[side], sites) for side in ("query", "database")]
        pairs = [[np.ascontiguousarray(x[:, first:stop]) for x in alleles] for first, stop in windows]
        return [(bits.pack(query), bits.pack(database)) for query, database in pairs]

    return Case(
        name="nearest.hamming_windows_topk",
        size={"queries": queries, "rows": rows, "sites": sites, "windows": len(windows)},
        work=queries * rows * len(windows),
        unit="pairs in a window",
        prepare=lambda: {"query": random_bits(queries, sites, 1), "database": random_bits(rows, sites, 2)},
        run=lambda inputs: nearest.hamming_windows_topk(inputs["query"], inputs["database"], windows, 1)[0],
        peers=(
            Peer("engine, one search per window", one_by_one, cut, same=_equal),
            Peer(
                "faiss.IndexBinaryFlat, one search per window",
                _faiss_windows,
                cut,
                same=_equal,
                missing=lambda: missing_package("faiss"),
            ),
        ),
        floor_bytes=8.0 * bits.words(sites) * (queries + rows),
        floor_ops=queries * rows * bits.words(sites),
        limit="popcount",
    )


def _faiss_windows(cut: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    import faiss

    faiss.omp_set_num_threads(1)
    found = []
    for query, database in cut:
        index = faiss.IndexBinaryFlat(64 * query.shape[1])
        index.add(database.view(np.uint8))
        found.append(index.search(query.view(np.uint8), 1)[0])
    return np.stack(found, axis=1)


def _longest_run(queries: int, rows: int, sites: int) -> Case:
    return Case(
        name="nearest.longest_run",
        size={"queries": queries, "rows": rows, "sites": sites},
        work=queries * rows,
        unit="pairs",
        prepare=lambda: {"query": related_bits(queries, sites, 1), "database": related_bits(rows, sites, 2)},
        run=lambda inputs: nearest.longest_run(inputs["query"], inputs["database"], sites, 100 * np.arange(sites)),
        floor_bytes=8.0 * bits.words(sites) * (queries + rows),
        floor_ops=queries * rows * bits.words(sites),
        limit="popcount",
    )


def _features(
    metric: nearest.Metric,
    queries: int,
    rows: int,
    axes: int,
    product: nearest.Product | None,
    *,
    threads: int = 1,
    peers: bool = True,
    quick: bool = True,
) -> Case:
    def prepare() -> dict[str, Any]:
        rng = np.random.default_rng(4)
        query = rng.standard_normal((queries, axes), dtype=np.float32)
        return {"query": query, "database": rng.standard_normal((rows, axes), dtype=np.float32)}

    def placed(inputs: dict[str, Any]) -> list[np.ndarray]:
        """Rows whose inner products are the similarities: peers are given them for nothing."""
        sides = [inputs["query"], inputs["database"]]
        if metric == "correlation":
            sides = [x - x.mean(axis=1, keepdims=True) for x in sides]
        if metric != "l2":
            sides = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in sides]
        return sides

    def faiss_index(inputs: dict[str, Any]) -> tuple[Any, np.ndarray]:
        import faiss

        faiss.omp_set_num_threads(threads)
        query, database = placed(inputs)
        index = faiss.IndexFlatL2(axes) if metric == "l2" else faiss.IndexFlatIP(axes)
        index.add(database)
        return index, query

    def faiss_search(inputs: tuple[Any, np.ndarray]) -> np.ndarray:
        distance = inputs[0].search(inputs[1], K)[0]
        return distance if metric == "l2" else 1 - distance

    def torch_rows(inputs: dict[str, Any]) -> list[Any]:
        import torch

        return [torch.from_numpy(x) for x in placed(inputs)]

    def torch_search(inputs: list[Any]) -> np.ndarray:
        import torch

        torch.set_num_threads(threads)
        query, database = inputs
        found = []
        for part in query.split(1024):
            near = torch.cdist(part, database).square() if metric == "l2" else 1 - part @ database.T
            found.append(near.topk(K, dim=1, largest=False).values)
        return torch.cat(found).numpy()

    def same(ours: np.ndarray, theirs: np.ndarray) -> None:
        np.testing.assert_allclose(theirs, ours, rtol=1e-3)

    goal = {None: 1.6, "bfloat16": 1.6, "float32": 0.95}[product] if metric == "l2" and axes == 512 else None
    return Case(
        name=f"nearest.features_topk.{metric}" + (f".{product}" if product else ""),
        size={"queries": queries, "rows": rows, "axes": axes},
        work=queries * rows,
        unit="pairs",
        prepare=prepare,
        run=lambda inputs: nearest.features_topk(
            inputs["query"], inputs["database"], K, metric=metric, product=product
        )[0],
        peers=(
            Peer(
                "faiss.IndexFlatL2" if metric == "l2" else "faiss.IndexFlatIP",
                faiss_search,
                faiss_index,
                same=same,
                goal=goal,
                missing=lambda: missing_package("faiss"),
            ),
            Peer("torch", torch_search, torch_rows, same=same),
        )
        if peers
        else (),
        floor_bytes=4.0 * axes * (queries + rows),
        floor_ops=queries * rows * axes,
        limit="f32_fma",
        threads=threads,
        quick=quick,
    )


def _patches(queries: int, rows: int, side: int) -> Case:
    """Raw uint8 patches of a smooth field by normalised cross-correlation; the peer must centre and scale them, as we do."""
    axes = side**3

    def prepare() -> dict[str, Any]:
        from scipy.ndimage import gaussian_filter

        rng = np.random.default_rng(5)
        field = gaussian_filter(rng.normal(size=(256, 256, 256)).astype(np.float32), 4)
        field = np.clip(128 + field / field.std() * 40, 0, 255).astype(np.uint8)
        corner = rng.integers(0, 256 - side, (queries + rows, 3))
        taken = np.stack([field[z : z + side, y : y + side, x : x + side] for z, y, x in corner])
        return {"query": taken[:queries], "database": taken[queries:]}

    def search(inputs: dict[str, Any]) -> np.ndarray:
        import faiss

        faiss.omp_set_num_threads(1)
        index = faiss.IndexFlatIP(axes)
        for name in ("database", "query"):
            side_nd = inputs[name].reshape(len(inputs[name]), -1).astype(np.float32)
            side_nd -= side_nd.mean(axis=1, keepdims=True)
            side_nd /= np.linalg.norm(side_nd, axis=1, keepdims=True)
            if name == "database":
                index.add(side_nd)
        return 1 - index.search(side_nd, K)[0]  # type: ignore[no-any-return]

    def same(ours: np.ndarray, theirs: np.ndarray) -> None:
        np.testing.assert_allclose(theirs, ours, atol=1e-4)

    return Case(
        name="nearest.features_topk.patches",
        size={"queries": queries, "rows": rows, "axes": axes},
        work=queries * rows,
        unit="pairs",
        prepare=prepare,
        run=lambda inputs: nearest.features_topk(inputs["query"], inputs["database"], K, metric="correlation")[0],
        peers=(Peer("faiss.IndexFlatIP and NumPy", search, same=same, missing=lambda: missing_package("faiss")),),
        floor_bytes=float(axes) * (queries + rows),
        floor_ops=queries * rows * axes,
        limit="f32_fma",
    )


def _equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_array_equal(ours, theirs.astype(ours.dtype))
