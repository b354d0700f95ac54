"""What perf.gpu checks, times and tunes, room by room.

Checks compare the Triton kernels with the CPU implementations at awkward sizes. Benches are the sizes of the project's goals;
beside each stands plain torch doing the same with its own matrix product, and other variants of ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engine.kernels import bits, haplotype_hmm, ld, nearest, patches
from perf.gpu import Bench, Check, Tuning

Triples = list[tuple[Any, Any, float]]
K = 10  # neighbours


# --- inputs ---


def words(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    """uint64 (rows, ceil(n / 64)) of random bits, nothing beyond n."""
    made = rng.integers(0, 2**64, (rows, bits.words(n)), dtype=np.uint64)
    if n % 64 and made.size:
        made[:, -1] &= np.uint64((1 << (n % 64)) - 1)
    return made


def haplotypes(rng: np.random.Generator, sites: int, n: int) -> np.ndarray:
    """Site-major bits in linkage: mosaics of 64 founders with errors."""
    founders_lf = rng.random((sites, 64)) < rng.random((sites, 1)) ** 2
    alleles_ln = np.empty((sites, n), dtype=np.uint8)
    for begin in range(0, sites, 200):
        stop = min(sites, begin + 200)
        alleles_ln[begin:stop] = founders_lf[begin:stop][:, rng.integers(0, 64, n)]
    alleles_ln ^= rng.random((sites, n)) < 0.002
    return bits.pack(alleles_ln)


def tensor(array: np.ndarray, device: str) -> torch.Tensor:
    return torch.from_numpy(array.view(np.int64) if array.dtype == np.uint64 else array).to(device)


def random_bits(rows: int, n: int) -> torch.Tensor:
    """int64 (rows, words) on the card, for timing."""
    made = torch.randint(-(2**63), 2**63 - 1, (rows, bits.words(n)), dtype=torch.int64, device="cuda")
    if n % 64:
        made[:, -1] &= (1 << (n % 64)) - 1
    return made


def spread_int8(bits_lw: torch.Tensor, n: int) -> torch.Tensor:
    """int8 (rows, n padded to a multiple of 64) of 0 and 1, as a product of plain torch needs it."""
    octets = bits_lw.view(torch.uint8)
    shifts = torch.arange(8, device=bits_lw.device, dtype=torch.uint8)
    return ((octets[:, :, None] >> shifts) & 1).reshape(len(bits_lw), -1).to(torch.int8)


# --- checks ---


def check_bits(rng: np.random.Generator, device: str, tiny: bool) -> Triples:
    found: Triples = []
    for sites, n in ((1, 1), (65, 130), (131, 322) if tiny else (5003, 4098)):
        alleles = rng.integers(0, 2, (sites, n), dtype=np.uint8)
        packed, missing = bits.pack(alleles), words(rng, sites, n) & words(rng, sites, n)
        on_card = tensor(packed, device)
        found += [
            (bits.pack(tensor(alleles, device)), packed, 0),
            (bits.unpack(on_card, n), alleles, 0),
            (bits.transpose(on_card, n), bits.transpose(packed, n), 0),
            (bits.popcount_rows(on_card), bits.popcount_rows(packed), 0),
        ]
        if n % 2 == 0:
            planes = bits.dosage_planes(on_card, n, tensor(missing, device))
            found += [(a, b, 0) for a, b in zip(planes, bits.dosage_planes(packed, n, missing))]
    return found


def check_ld(rng: np.random.Generator, device: str, tiny: bool) -> Triples:
    found: Triples = []
    for sites, n in ((33, 66), (70, 130) if tiny else (1021, 5008)):
        packed = haplotypes(rng, sites, n)
        missing = words(rng, sites, n) & words(rng, sites, n) & words(rng, sites, n)
        on_card, holes = tensor(packed, device), tensor(missing, device)
        position = np.sort(rng.integers(0, 40 * sites, sites))
        ends = ld.window(sites, sites=40)
        for unphased in (False, True):
            for with_holes in (False, True):
                here = {"unphased": unphased, "missing_lw": missing if with_holes else None}
                there = {"unphased": unphased, "missing_lw": holes if with_holes else None}
                for measure in ("r2", "r", "d") if unphased else ("r2", "r", "d", "d_prime"):
                    wanted = ld.matrix(packed, n, measure=measure, **here)
                    found.append((ld.matrix(on_card, n, measure=measure, **there), wanted, 0))
                wanted = ld.matrix(packed, n, packed[: sites // 2], other_missing_mw=missing[: sites // 2], **here)
                other = {"other_missing_mw": holes[: sites // 2]}
                found.append((ld.matrix(on_card, n, on_card[: sites // 2], **other, **there), wanted, 0))
                listed = ld.threshold(packed, n, 0.2, end_l=ends, **here)
                found += [(a, b, 0) for a, b in zip(ld.threshold(on_card, n, 0.2, end_l=ends, **there), listed)]
                found.append((ld.band(on_card, n, ends, **there), ld.band(packed, n, ends, **here), 0))
                found.append((ld.score(on_card, n, ends, **there), ld.score(packed, n, ends, **here), 1e-12))
                edges = [0, 10, 100, 1000]
                sums, counts = ld.decay(packed, n, position, edges, **here)
                got_sums, got_counts = ld.decay(on_card, n, position, edges, **there)
                found += [(got_sums, sums, 1e-12), (got_counts, counts, 0)]
                kept = ld.prune(packed, n, 0.2, sites=50, step=5, **here)
                found.append((ld.prune(on_card, n, 0.2, sites=50, step=5, **there), kept, 0))
    return found


def check_ld_popcount(rng: np.random.Generator, device: str, tiny: bool) -> Triples:
    from engine.kernels.ld import triton_matrix
    from engine.kernels.ld.checks import Sites

    sites, n = (70, 130) if tiny else (1021, 5008)
    packed = haplotypes(rng, sites, n)
    return [
        (
            triton_matrix.matrix(Sites(tensor(packed, device), n, None, unphased), None, "r2", method="popcount"),
            ld.matrix(packed, n, unphased=unphased),
            0,
        )
        for unphased in (False, True)
    ]


def check_patches(rng: np.random.Generator, device: str, tiny: bool) -> Triples:
    found: Triples = []
    shape, roi = ((9, 11, 13), (5, 4, 6)) if tiny else ((67, 129, 83), (32, 48, 33))
    for kind in ("uint8", "int16", "float32"):
        volume = (rng.random((2, *shape)) * 200).astype(kind)
        starts = rng.integers(-6, 10, (17, 3))
        flips, axes = rng.random((17, 3)) < 0.5, np.array([rng.permutation(3) for _ in range(17)])
        for border in ("constant", "edge", "reflect", "symmetric", "wrap"):
            turned = {"flips_n3": flips, "axes_n3": axes, "border": border}
            scaled = turned | {"dtype": "float32", "scale": 0.01, "offset": -1.5}
            for options in (turned, scaled):
                wanted = patches.gather(volume, starts, roi, **options)
                found.append((patches.gather(tensor(volume, device), starts, roi, **options), wanted, 0))
    for window in ("constant", "gaussian"):
        grid = patches.grid_starts(shape, roi, 0.4)
        predicted = rng.standard_normal((len(grid), 2, *roi)).astype(np.float32)
        wanted = patches.blend(predicted, shape, roi, 0.4, window=window)
        found.append((patches.blend(tensor(predicted, device), shape, roi, 0.4, window=window), wanted, 0))
    return found


def check_nearest(rng: np.random.Generator, device: str, tiny: bool) -> Triples:
    found: Triples = []
    for n, m, sites, k in ((5, 7, 65, 3), (37, 70, 130, 5) if tiny else (700, 5003, 4098, K)):
        query, database = words(rng, n, sites), words(rng, m, sites)
        database[:2] = query[:2]  # exact copies, and ties
        groups = rng.integers(0, 9, n), rng.integers(0, 9, m)
        q, d = tensor(query, device), tensor(database, device)
        for options in ({}, {"exclude": groups}):
            pairs = zip(nearest.hamming_topk(q, d, k, **options), nearest.hamming_topk(query, database, k, **options))
            found += [(a, b, 0) for a, b in pairs]
            radius = int(sites * 0.48)
            pairs = zip(
                nearest.hamming_range(q, d, radius, **options),
                nearest.hamming_range(query, database, radius, **options),
            )
            found += [(a, b, 0) for a, b in pairs]
        found += [(a, b, 0) for a, b in zip(_by_popcount(q, d, k), nearest.hamming_topk(query, database, k))]
        windows = np.array([[0, sites // 2], [sites // 3, sites], [1, 2]])
        pairs = zip(
            nearest.hamming_windows_topk(q, d, windows, k), nearest.hamming_windows_topk(query, database, windows, k)
        )
        found += [(a, b, 0) for a, b in pairs]
        position = np.sort(rng.integers(0, 50 * sites, sites))
        pairs = zip(nearest.longest_run(q, d, sites, position), nearest.longest_run(query, database, sites, position))
        found += [(a, b, 0) for a, b in pairs]
        one, both, seen = (
            words(rng, 2 * n, sites),
            words(rng, 2 * n, sites),
            words(rng, 2 * n, sites) | words(rng, 2 * n, sites),
        )
        for observed in (None, seen):
            people = (one | both, one & both, observed)
            halves = [tuple(None if p is None else p[part] for p in people) for part in (slice(0, n), slice(n, None))]
            there = [tuple(None if p is None else tensor(p, device) for p in half) for half in halves]
            pairs = zip(nearest.ibs_topk(*there, sites, k), nearest.ibs_topk(*halves, sites, k))
            found += [(a, b, 0) for a, b in pairs]
    return found


def check_features(rng: np.random.Generator, device: str, tiny: bool) -> Triples:
    found: Triples = []
    n, m, axes, k = (20, 45, 12, 3) if tiny else (501, 4001, 130, K)
    query = rng.standard_normal((n, axes)).astype(np.float32)
    database = np.concatenate([query[: n // 2] + np.float32(0.01), rng.standard_normal((m, axes)).astype(np.float32)])
    q, d = tensor(query, device), tensor(database, device)
    for metric in ("l2", "cosine", "correlation"):
        wanted = nearest.features_topk(query, database, k, metric=metric)
        for product in (None, "float32") if tiny else (None, "float32", "bfloat16", "int8"):
            got = nearest.features_topk(q, d, k, metric=metric, product=product)
            found += [(a, b, 0) for a, b in zip(got, wanted)]
        radius = float(np.median(wanted[0]))
        pairs = zip(
            nearest.features_range(q, d, radius, metric=metric),
            nearest.features_range(query, database, radius, metric=metric),
        )
        found += [(a, b, 0) for a, b in pairs]
    return found


def _chain(rng: np.random.Generator, k: int, sites: int, n: int) -> tuple[np.ndarray, ...]:
    reference = haplotypes(rng, sites, k)
    target = bits.unpack(reference, k).T[rng.integers(0, k, n)] ^ (rng.random((n, sites)) < 0.01)
    target = np.where(rng.random((n, sites)) < 0.02, 255, target).astype(np.uint8)
    return reference, target, rng.uniform(1e-4, 0.05, sites), rng.uniform(1e-4, 0.02, sites)


def check_hmm(rng: np.random.Generator, device: str, tiny: bool) -> Triples:
    """Likelihoods within 1e-4 nats per 1,000 sites, posteriors within 1e-4, paths the same but for draws at a rounding."""
    found: Triples = []
    for k, sites, n in ((5, 20, 3), (131, 40, 4) if tiny else (5008, 1500, 37)):
        reference, target, switch, mismatch = _chain(rng, k, sites, n)
        r, t = tensor(reference, device), tensor(target, device)
        exclude = rng.integers(-1, k, (n, 1))
        prior_ak = rng.random((3, k)) * (rng.random((3, k)) < 0.7) + 1e-6
        slow = haplotype_hmm.Ancestry(
            prior_a=np.array([0.5, 0.3, 0.2]), prior_ak=prior_ak, switch_l=np.full(sites, 0.003)
        )
        for options in ({}, {"exclude_ne": exclude}, {"prior_k": prior_ak[0]}, {"ancestry": slow}):
            wanted = haplotype_hmm.log_likelihood(reference, k, target, switch, mismatch, dtype=np.float64, **options)
            got = haplotype_hmm.log_likelihood(r, k, t, switch, mismatch, **options).cpu().numpy()
            allowed = 1e-4 * max(1, sites / 1000)
            found.append((np.abs(got - wanted) <= allowed, np.ones(n, dtype=bool), 0))
            sums = haplotype_hmm.posterior_sums(r, k, t, switch, mismatch, **options)
            expected = haplotype_hmm.posterior_sums(reference, k, target, switch, mismatch, dtype=np.float64, **options)
            for name in ("dosage_nl", "mismatch_nl", "switch_nl"):
                gap = np.abs(getattr(sums, name).cpu().numpy() - getattr(expected, name))
                found.append((gap <= 1e-4, np.ones_like(gap, dtype=bool), 0))
        uniforms = rng.random((n, sites))
        path = haplotype_hmm.posterior_paths(r, k, t, switch, mismatch, uniforms, dtype=np.float64).cpu().numpy()
        wanted = haplotype_hmm.posterior_paths(reference, k, target, switch, mismatch, uniforms, dtype=np.float64)
        found.append((np.mean(path == wanted) > 0.999, True, 0))  # a draw may fall on the other side of a rounding
    return found


def _bank(rng: np.random.Generator, chains: int, sites: int) -> haplotype_hmm.Bank:
    """Chains with and without parents, grandparents among them, a contig that starts, floors of 0 and more."""
    parent_c = np.array([-1, -1, 0, 2, 1, 0, 3, -1][:chains])
    switch_cl = rng.uniform(1e-4, 0.2, (chains, sites))
    switch_cl[:, sites // 2] = 1
    mismatch_cl = np.where(parent_c < 0, 0.3, 0.01)[:, None] * rng.uniform(0.1, 1, (chains, sites))
    return haplotype_hmm.Bank(switch_cl, mismatch_cl, parent_c, rng.choice([0, 0.1, 0.5], chains))


def check_bank(rng: np.random.Generator, device: str, tiny: bool) -> Triples:
    """Log-odds, donors, expected counts and log-likelihoods within 1e-4 (norms); the last stretch from a state."""
    found: Triples = []
    for k, sites, n, chains in ((5, 4, 1, 2), (1100, 5, 2, 4) if tiny else (5008, 700, 37, 8)):
        reference, target, _, _ = _chain(rng, k, sites, n)
        bank, exclude, cut = _bank(rng, chains, sites), rng.integers(-1, k, (n, 2)), sites // 2
        r, t = tensor(reference, device), tensor(target, device)
        state = haplotype_hmm.bank_start(n, chains, k, device=device)
        here, there = (reference, k, target, bank), (r, k, t, bank)
        wanted = haplotype_hmm.bank_predict(*here, exclude_ne=exclude, dtype=np.float64)
        haplotype_hmm.bank_predict(*there, exclude_ne=exclude, state=state, stop_site=cut)
        got = haplotype_hmm.bank_predict(*there, exclude_ne=exclude, state=state, first_site=cut)
        found += [(a, b[:, cut:], 1e-4) for a, b in zip(got, wanted)]
        got = haplotype_hmm.bank_counts(*there, exclude_ne=exclude)
        found += [
            (a, b, 1e-4) for a, b in zip(got, haplotype_hmm.bank_counts(*here, exclude_ne=exclude, dtype=np.float64))
        ]
        found += [(a, b, 1e-4) for a, b in zip(haplotype_hmm.bank_predict(*there), haplotype_hmm.bank_predict(*here))]
    return found


def checks(*, tiny: bool) -> list[Check]:
    """All checks; `tiny`: sizes for Triton's interpreter."""
    made = {
        "bits": check_bits,
        "ld": check_ld,
        "ld.popcount": check_ld_popcount,
        "patches": check_patches,
        "nearest": check_nearest,
        "nearest.features": check_features,
        "haplotype_hmm": check_hmm,
        "haplotype_hmm.bank": check_bank,
    }
    return [Check(name, lambda rng, device, run=run: run(rng, device, tiny)) for name, run in made.items()]


# --- benches ---


def _torch_r2(bits_lw: torch.Tensor, n: int, kind: torch.dtype) -> torch.Tensor:
    """r2 of all pairs as one would write it with torch: unpack, one product of the whole square, elementwise float32."""
    alleles = spread_int8(bits_lw, n)
    if kind == torch.int8:
        both = torch._int_mm(alleles, alleles.t()).to(torch.float32)
    else:
        wide = alleles.to(kind)
        both = torch.mm(wide, wide.t()).to(torch.float32)
    count = alleles.sum(dim=1, dtype=torch.int32).to(torch.float32)
    x = n * both - count[:, None] * count
    variance = count * (n - count)
    return (x / variance[:, None]) * (x / variance)


def _close(tolerance: float) -> Any:
    def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        gap = (torch.nan_to_num(ours) - torch.nan_to_num(theirs)).abs().max()
        assert float(gap) <= tolerance, f"largest difference {float(gap):.3g}"

    return same


def bench_ld(sites: int, n: int) -> Bench:
    from engine.kernels.ld import triton_matrix
    from engine.kernels.ld.checks import Sites

    pairs = sites * (sites - 1) / 2
    return Bench(
        "ld.matrix",
        {"sites": sites, "haplotypes": n},
        pairs,
        "pairs",
        prepare=lambda rng, device: random_bits(sites, n),
        run=lambda b: ld.matrix(b, n),
        variants={"popcount": lambda b: triton_matrix.matrix(Sites(b, n), None, "r2", method="popcount")},
        peers={
            "torch int8": lambda b: _torch_r2(b, n, torch.int8),
            "torch bf16": lambda b: _torch_r2(b, n, torch.bfloat16),
        },
        same=_close(1e-3),  # float32 elementwise rounds what ours does in float64
        ops=2 * pairs * n,
        limit="int8",
        bytes=4 * sites * sites + sites * n / 8,
        goal={"limit": 0.4, "torch int8": 3, "torch bf16": 3},
    )


def bench_ld_decay(sites: int, n: int) -> Bench:
    pairs = sites * (sites - 1) / 2
    edges = np.linspace(0, 100 * sites, 65).astype(np.int64)
    return Bench(
        "ld.decay",
        {"sites": sites, "haplotypes": n, "bins": 64},
        pairs,
        "pairs",
        prepare=lambda rng, device: (random_bits(sites, n), np.arange(sites) * 100),
        run=lambda x: ld.decay(x[0], n, x[1], edges),
        ops=2 * pairs * n,
        limit="int8",
        goal={"limit": 0.4},
    )


def bench_ld_threshold(sites: int, n: int, width: int) -> Bench:
    pairs = float(sites * width)
    return Bench(
        "ld.threshold",
        {"sites": sites, "haplotypes": n, "window": width},
        pairs,
        "pairs",
        prepare=lambda rng, device: (random_bits(sites, n), ld.window(sites, sites=width)),
        run=lambda x: ld.threshold(x[0], n, 0.2, end_l=x[1]),
        ops=2 * pairs * n,
        limit="int8",
        goal={"limit": 0.4},
    )


def bench_blend(shape: tuple[int, int, int], roi: int) -> Bench:
    voxels = float(np.prod(shape))

    def prepare(rng: np.random.Generator, device: str) -> Any:
        return torch.randn((len(patches.grid_starts(shape, roi, 0.5)), 1, roi, roi, roi), device="cuda")

    windows = len(patches.grid_starts(shape, roi, 0.5))
    return Bench(
        "patches.blend",
        {"d": shape[0], "h": shape[1], "w": shape[2], "roi": roi},
        voxels,
        "voxels",
        prepare=prepare,
        run=lambda p: patches.blend(p, shape, roi, 0.5),
        peers={"torch slices": lambda p: _torch_blend(p, shape, roi)},
        same=_close(1e-4),
        bytes=4 * (windows * roi**3 + voxels),
        goal={"copy": 0.7},
    )


def _torch_blend(predicted: torch.Tensor, shape: tuple[int, int, int], roi: int) -> torch.Tensor:
    """As a loop over windows adds them up, with the importance map of MONAI."""
    axis = torch.arange(roi, device="cuda", dtype=torch.float32) - (roi - 1) / 2
    line = torch.exp(-(axis**2) / (2 * (0.125 * roi) ** 2))
    weight = line[:, None, None] * line[:, None] * line
    weight = weight.clamp(min=max(float(weight.min()), 1e-3))
    total = torch.zeros((1, *shape), device="cuda")
    weights = torch.zeros(shape, device="cuda")
    for start, patch in zip(patches.grid_starts(shape, roi, 0.5).tolist(), predicted):
        window = tuple(slice(s, s + roi) for s in start)
        total[:, *window] += weight * patch
        weights[window] += weight
    return total / weights


def bench_gather(side: int, roi: int, count: int) -> Bench:
    voxels = float(count * roi**3)

    def prepare(rng: np.random.Generator, device: str) -> Any:
        volume = torch.randn((side, side, side), device="cuda")
        return volume, patches.random_starts((side,) * 3, roi, count, 1)

    def slices(x: Any) -> torch.Tensor:
        return torch.stack([x[0][z : z + roi, y : y + roi, w : w + roi] for z, y, w in x[1].tolist()])

    return Bench(
        "patches.gather",
        {"side": side, "roi": roi, "patches": count},
        voxels,
        "voxels",
        prepare=prepare,
        run=lambda x: patches.gather(x[0], x[1], roi),
        peers={"torch slices": slices},
        same=_close(0),
        bytes=8 * voxels,
        goal={"copy": 0.7},
    )


def _by_popcount(query: torch.Tensor, database: torch.Tensor, k: int) -> Any:
    from engine.kernels.nearest import triton_bits

    return triton_bits.hamming_topk(query, database, k, False, None, method="popcount")


def _torch_hamming(query: torch.Tensor, database: torch.Tensor, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 product of the unpacked bits, distance, topk, over parts of the database that leave room for the matrix."""
    q = spread_int8(query, n)
    q_ones = q.sum(dim=1, dtype=torch.int32)
    kept: list[torch.Tensor] = []
    part = max(1024, 2**31 // (8 * len(query)) // 1024 * 1024)
    for begin in range(0, len(database), part):
        d = spread_int8(database[begin : begin + part], n)
        rows = len(d)
        d = torch.nn.functional.pad(d, (0, 0, 0, -rows % 8))
        both = torch._int_mm(torch.nn.functional.pad(q, (0, 0, 0, max(0, 32 - len(q)))), d.t())[: len(q), :rows]
        distance = q_ones[:, None] + d[:rows].sum(dim=1, dtype=torch.int32) - 2 * both
        index = torch.arange(begin, begin + rows, device=query.device)
        kept.append(((distance.long() << 32) | index).topk(k, dim=1, largest=False).values)
    keys = torch.cat(kept, dim=1).topk(k, dim=1, largest=False).values
    return (keys >> 32).int(), keys & 0xFFFFFFFF


def bench_hamming(n: int, m: int, sites: int) -> Bench:
    return Bench(
        "nearest.hamming_topk",
        {"queries": n, "rows": m, "bits": sites, "k": K},
        float(n) * m,
        "pairs",
        prepare=lambda rng, device: (random_bits(n, sites), random_bits(m, sites)),
        run=lambda x: nearest.hamming_topk(x[0], x[1], K),
        variants={"popcount": lambda x: _by_popcount(x[0], x[1], K)},
        peers={"torch int8": lambda x: _torch_hamming(x[0], x[1], sites, K)},
        same=_same_neighbours,
        ops=2.0 * n * m * sites,
        limit="int8",
        goal={"limit": 0.4, "torch int8": 3},
    )


def _same_neighbours(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours[0].long(), theirs[0].long()), "other distances"
    assert torch.equal(ours[1], theirs[1].long()), "other neighbours"


def bench_features(n: int, m: int, axes: int, metric: str) -> Bench:
    def plain(x: Any) -> Any:
        q, d = x
        if metric == "cosine":
            q, d = torch.nn.functional.normalize(q), torch.nn.functional.normalize(d)
            return torch.mm(q, d.t()).topk(K, dim=1)
        near = q.square().sum(1)[:, None] + d.square().sum(1) - 2 * torch.mm(q, d.t())
        return near.topk(K, dim=1, largest=False)

    def same(ours: Any, theirs: Any) -> None:
        agree = (ours[1] == theirs[1]).float().mean()
        assert float(agree) > 0.99, f"{float(agree):.4f} of the neighbours agree"

    return Bench(
        f"nearest.features_topk.{metric}",
        {"queries": n, "rows": m, "axes": axes, "k": K},
        float(n) * m,
        "pairs",
        prepare=lambda rng, device: (torch.randn(n, axes, device="cuda"), torch.randn(m, axes, device="cuda")),
        run=lambda x: nearest.features_topk(x[0], x[1], K, metric=metric),
        variants={
            product: lambda x, p=product: nearest.features_topk(x[0], x[1], K, metric=metric, product=p)
            for product in ("int8", "bfloat16", "float32")
        },
        peers={"torch float32": plain},
        same=same,
        ops=2.0 * n * m * axes,
        limit="bf16",
        goal={"torch float32": 1},
    )


def bench_forward(targets: int, k: int, sites: int) -> Bench:
    cells = float(targets) * k * sites

    def prepare(rng: np.random.Generator, device: str) -> Any:
        reference, target, switch, mismatch = _chain(rng, k, sites, targets)
        return tensor(reference, device), tensor(target, device), switch, mismatch

    return Bench(
        "haplotype_hmm.forward",
        {"targets": targets, "haplotypes": k, "sites": sites},
        cells,
        "cells",
        prepare=prepare,
        run=lambda x: haplotype_hmm.log_likelihood(x[0], k, x[1], x[2], x[3]),
        peers={"torch float32": lambda x: _torch_forward(x, k)} if targets <= 256 else {},
        same=lambda a, b: _close(1e-2)(a.float(), b.float()),
        goal={"rate": 2e12},
    )


def _torch_forward(x: Any, k: int) -> torch.Tensor:
    """The recursion as one would write it with torch, all targets at a time, alleles unpacked site by site."""
    reference, target, switch, mismatch = x
    state = torch.full((len(target), k), 1 / k, device="cuda")
    total = torch.zeros(len(target), dtype=torch.float64, device="cuda")
    for site in range(len(reference)):
        allele = spread_int8(reference[site : site + 1], k)[0, :k]
        if site:
            state = state * (1 - switch[site]) + switch[site] / k
        seen = target[:, site : site + 1]
        state = state * torch.where(seen == 255, 1.0, torch.where(seen == allele, 1 - mismatch[site], mismatch[site]))
        scale = state.sum(dim=1, keepdim=True)
        state = state / scale
        total += scale[:, 0].double().log()
    return total


def bench_paths(targets: int, k: int, sites: int) -> Bench:
    def prepare(rng: np.random.Generator, device: str) -> Any:
        reference, target, switch, mismatch = _chain(rng, k, sites, targets)
        return tensor(reference, device), tensor(target, device), switch, mismatch, rng.random((targets, sites))

    return Bench(
        "haplotype_hmm.posterior_paths",
        {"targets": targets, "haplotypes": k, "sites": sites},
        float(targets) * k * sites,
        "cells",
        prepare=prepare,
        run=lambda x: haplotype_hmm.posterior_paths(x[0], k, *x[1:]),
    )


def _bank_inputs(rng: np.random.Generator, targets: int, k: int, sites: int, chains: int) -> Any:
    reference, target, _, _ = _chain(rng, k, sites, targets)
    return tensor(reference, "cuda"), k, tensor(target, "cuda"), _bank(rng, chains, sites)


def bench_bank(targets: int, k: int, sites: int, chains: int) -> Bench:
    cells = float(targets) * k * sites * chains
    return Bench(
        "haplotype_hmm.bank_predict",
        {"targets": targets, "haplotypes": k, "sites": sites, "chains": chains},
        cells,
        "cells",
        prepare=lambda rng, device: _bank_inputs(rng, targets, k, sites, chains),
        run=lambda x: haplotype_hmm.bank_predict(*x),
        peers={"torch float32": _torch_bank},
        same=lambda a, b: _close(1e-3)(a[0], b),
    )


def _torch_bank(x: Any) -> torch.Tensor:
    """Log-odds of each chain as one would write them with torch, all targets at a time."""
    reference, k, target, bank = x
    p = torch.zeros((len(bank.parent_c), len(target), k), device="cuda")
    logit = torch.empty((*target.shape, len(p)), device="cuda")
    before = None
    for site in range(len(reference)):
        allele = spread_int8(reference[site : site + 1], k)[0, :k]
        for c, parent in enumerate(bank.parent_c):
            drawn = torch.full_like(p[c], 1 / k)
            if parent >= 0:
                drawn = (1 - bank.floor_c[c]) * p[parent] + bank.floor_c[c] / k
            if site:
                wrong, seen = bank.mismatch_cl[c, site - 1], target[:, site - 1, None]
                held = p[c] * torch.where(seen == 255, 1.0, torch.where(seen == before, 1 - wrong, wrong))
                switch = bank.switch_cl[c, site]
                drawn = held * ((1 - switch) / held.sum(dim=1, keepdim=True)) + switch * drawn
            p[c] = drawn
            wrong, alt, ref = bank.mismatch_cl[c, site], drawn @ allele.float(), drawn @ (1 - allele).float()
            logit[:, site, c] = ((alt * (1 - wrong) + ref * wrong) / (ref * (1 - wrong) + alt * wrong)).log()
        before = allele
    return logit


def benches() -> list[Bench]:
    return [
        bench_hamming(5_008, 5_008, 10_000),
        bench_hamming(20_000, 200_000, 65_536),
        bench_features(10_000, 50_000, 512, "l2"),
        bench_features(10_000, 50_000, 512, "cosine"),
        bench_forward(132, 5_008, 2_000),
        bench_forward(2_112, 5_008, 10_000),
        bench_paths(264, 5_008, 4_000),
        bench_bank(264, 5_008, 1_000, 8),
        bench_ld(10_000, 5_008),
        bench_ld(20_000, 50_048),
        bench_ld_decay(10_000, 5_008),
        bench_ld_threshold(50_000, 5_008, 1_000),
        bench_blend((256, 256, 256), 96),
        bench_blend((400, 512, 512), 96),
        bench_gather(512, 32, 4096),
        bench_gather(512, 96, 128),
    ]


# --- launch parameters ---


def tunings() -> list[Tuning]:
    return [
        Tuning(
            "ld.matrix",
            {"block": (64, 128, 256), "step": (2, 4, 8), "warps": (4, 8), "stages": (2, 3, 4)},
            lambda rng, device: random_bits(10_000, 5_008),
            lambda b: ld.matrix(b, 5_008),
        ),
        Tuning(
            "ld.matrix_popcount",
            {"block": (32, 64, 128), "warps": (4, 8)},
            lambda rng, device: random_bits(10_000, 5_008),
            lambda b: _popcount_matrix(b, 5_008),
        ),
        Tuning(
            "ld.sink",
            {"block": (32, 64, 128), "step": (2, 4, 8), "warps": (4, 8), "stages": (2, 3)},
            lambda rng, device: (random_bits(20_000, 5_008), ld.window(20_000, sites=1_000)),
            lambda x: ld.threshold(x[0], 5_008, 0.2, end_l=x[1]),
        ),
        Tuning(
            "nearest.bits",
            {"queries": (64, 128, 256), "rows": (64, 128, 256), "step": (2, 4), "warps": (4, 8), "stages": (2, 3)},
            lambda rng, device: (random_bits(5_008, 10_000), random_bits(20_000, 10_000)),
            lambda x: nearest.hamming_topk(x[0], x[1], K),
        ),
        Tuning(
            "nearest.popcount",
            {"queries": (32, 64, 128), "rows": (32, 64, 128), "warps": (4, 8)},
            lambda rng, device: (random_bits(5_008, 10_000), random_bits(20_000, 10_000)),
            lambda x: _by_popcount(x[0], x[1], K),
        ),
        *(
            Tuning(
                f"nearest.{product}",
                {"queries": (64, 128), "rows": (64, 128, 256), "warps": (4, 8), "stages": (2, 3)},
                lambda rng, device: (torch.randn(4_000, 512, device="cuda"), torch.randn(50_000, 512, device="cuda")),
                lambda x, product=product: nearest.features_topk(x[0], x[1], K, product=product),
            )
            for product in ("int8", "bfloat16", "float32")
        ),
        Tuning(
            "haplotype_hmm.forward",
            {"targets": (1, 2, 4), "warps": (4, 8, 16)},
            lambda rng, device: _forward_inputs(rng),
            lambda x: haplotype_hmm.log_likelihood(x[0], 5_008, x[1], x[2], x[3]),
        ),
        Tuning(
            "haplotype_hmm.bank",
            {"tile": (512, 1024, 2048, 4096), "warps": (4, 8, 16)},
            lambda rng, device: _bank_inputs(rng, 264, 5_008, 300, 8),
            lambda x: haplotype_hmm.bank_predict(*x),
        ),
    ]


def _forward_inputs(rng: np.random.Generator) -> Any:
    reference, target, switch, mismatch = _chain(rng, 5_008, 1_000, 528)
    return tensor(reference, "cuda"), tensor(target, "cuda"), switch, mismatch


def _popcount_matrix(bits_lw: torch.Tensor, n: int) -> torch.Tensor:
    from engine.kernels.ld import triton_matrix
    from engine.kernels.ld.checks import Sites

    return triton_matrix.matrix(Sites(bits_lw, n), None, "r2", method="popcount")
