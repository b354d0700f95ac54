"""What becomes of tiles when no matrix is wanted, on the GPU: lists of pairs above a threshold, LD scores, decay by distance,
and one bit per pair for pruning.

Every sum has one writer and a fixed order; the list is made in two passes, count and write, with a scan between them.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from engine.kernels.ld import greedy
from engine.kernels.ld.checks import EPSILON, PruneRules, Sites
from engine.kernels.ld.triton_matrix import major_frequency
from engine.kernels.ld.triton_values import CODES, Planes, formula, launch_of, prepare, prepare_two, sums_tile

_SPLITS = 8  # programs that share one block row of the histogram
_COUNTS_AT_ONCE = 1 << 24  # counts of (row, tile) held between the two passes of a list


def threshold(
    first: Sites, other: Sites | None, end_l: np.ndarray | None, least: np.float32, measure: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """i, j int64 and value float32 where |value| >= least: i < j < end_l[i] of one set, or every pair of two; by i, then j."""
    a, b = prepare_two(first, other)
    device, same = a.p0.device, other is None
    sites, others = len(a.p0), len(b.p0)
    end_l = np.full(sites, others, dtype=np.int64) if end_l is None else end_l
    with_ = launch_of("sink", a)
    block = with_["block"]
    ends = torch.from_numpy(end_l).to(device)
    found: list[tuple[torch.Tensor, ...]] = []
    row = 0
    while row < sites:
        first_block = row // block * block if same else 0  # columns are counted in tiles from here
        rows = block
        while (
            row + rows < sites
            and (rows + block) * _tiles(end_l, row, rows + block, first_block, block) <= _COUNTS_AT_ONCE
        ):
            rows += block
        tiles = _tiles(end_l, row, rows, first_block, block)
        rows = min(rows, sites - row)
        arguments = (
            a.p0, a.p1, a.p3, a.sum_l, a.variance_l, b.p0, b.p1, b.p3, b.sum_l, b.variance_l, ends,
        )  # fmt: skip
        numbers = (float(least), a.n, sites, others, a.p0.shape[1], 2.0 if a.kind % 2 else 1.0, row, first_block, tiles)
        options = {
            "KIND": a.kind, "CODE": CODES[measure], "SAME": same, "BLOCK": block, "STEP": with_["step"],
            "num_warps": with_["warps"], "num_stages": with_["stages"],
        }  # fmt: skip
        grid = (triton.cdiv(rows, block), tiles)
        counts = torch.zeros((rows, tiles), dtype=torch.int64, device=device)
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        if tiles:
            above_kernel[grid](*arguments, counts, nothing, nothing, nothing, *numbers, WRITE=False, **options)
            offset = counts.reshape(-1).cumsum(0)
            total = int(offset[-1])
            offset = (offset - counts.reshape(-1)).reshape(counts.shape)
            i, j = (torch.empty(total, dtype=torch.int64, device=device) for _ in range(2))
            value = torch.empty(total, dtype=torch.float32, device=device)
            if total:
                above_kernel[grid](*arguments, offset, i, j, value, *numbers, WRITE=True, **options)
                found.append((i, j, value))
        row += rows
    if not found:
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return empty, empty.clone(), empty.to(torch.float32)
    i, j, value = (torch.cat(part) for part in zip(*found))
    return i, j, value


def _tiles(end_l: np.ndarray, row: int, rows: int, first_block: int, block: int) -> int:
    """Tiles of columns that rows [row, row + rows) may reach, counted from `first_block`."""
    return max(0, triton.cdiv(int(end_l[min(row + rows, len(end_l)) - 1]) - first_block, block))


def score(first: Sites, end_l: np.ndarray, adjusted: bool) -> torch.Tensor:
    """float64 (L,): sum of r2 with the site itself and with every site in whose window it is or that is in its window."""
    a = prepare(first)
    out = torch.empty(len(end_l), dtype=torch.float64, device=a.p0.device)
    if out.numel():
        with_ = launch_of("sink", a)
        start_l = np.searchsorted(end_l, np.arange(len(end_l)), side="right")  # first site in whose window i may be
        starts, ends = (torch.from_numpy(bound_l).to(out.device) for bound_l in (start_l, end_l))
        score_kernel[(triton.cdiv(len(end_l), with_["block"]),)](
            a.p0, a.p1, a.p3, a.sum_l, a.variance_l, starts, ends,
            out, a.n, len(end_l), a.p0.shape[1], KIND=a.kind, CODE=CODES["r2_adjusted" if adjusted else "r2"],
            BLOCK=with_["block"], STEP=with_["step"], num_warps=with_["warps"], num_stages=with_["stages"],
        )  # fmt: skip
    return out


def decay(first: Sites, position_l: np.ndarray, edges: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of r2 (float64) and number of pairs (int64) per distance bin; the matrix is never held."""
    a = prepare(first)
    with_ = launch_of("sink", a)
    device, bins, rows = a.p0.device, len(edges) - 1, triton.cdiv(len(a.p0), with_["block"])
    sums = torch.zeros((rows, _SPLITS, bins), dtype=torch.float64, device=device)
    pairs = torch.zeros((rows, _SPLITS, bins), dtype=torch.int64, device=device)
    if rows:
        decay_kernel[(rows, _SPLITS)](
            a.p0, a.p1, a.p3, a.sum_l, a.variance_l,
            torch.from_numpy(position_l).to(device), torch.from_numpy(edges).to(device), sums, pairs,
            a.n, len(a.p0), a.p0.shape[1], bins, KIND=a.kind,
            BLOCK=with_["block"], STEP=with_["step"], BINS=triton.next_power_of_2(bins), SPLITS=_SPLITS,
            num_warps=with_["warps"], num_stages=with_["stages"],
        )  # fmt: skip
    return sums.sum(dim=(0, 1)), pairs.sum(dim=(0, 1))


def prune(first: Sites, rules: PruneRules) -> np.ndarray:
    """bool (L,), on the host: kept. The card judges every pair that a window may hold, the host runs the pass over the bits."""
    length = len(first.bits_lw)
    if not len(rules.starts):
        return np.ones(length, dtype=bool)
    a = prepare(first)
    major_l, varies_l = major_frequency(a)
    alive = greedy.bits_of(varies_l & rules.loaded_l)
    rows = linked_rows(a, rules).cpu().numpy().view(np.uint32)
    greedy.prune_rows(rows, rules.order == "backward", alive, major_l, rules.starts, rules.ends)
    return greedy.flags_of(alive, length) | ~rules.loaded_l


def linked_rows(a: Planes, rules: PruneRules) -> torch.Tensor:
    """int32 (L, words): one bit per pair, laid out as greedy.py reads it."""
    length, device = len(a.p0), a.p0.device
    site = np.arange(length)
    last = np.searchsorted(rules.starts, site, side="right") - 1  # last window that begins at or before a site
    reach_l = np.maximum(rules.ends[last], site + 1)  # no window holds the site and one from here on
    words = int((reach_l - site).max()) // 32 + 3
    rows = torch.zeros((length, words), dtype=torch.int32, device=device)
    with_ = launch_of("sink", a)
    block = with_["block"]
    most = torch.tensor(
        [rules.most * (1 + EPSILON)], dtype=torch.float64, device=device
    )  # as a number it would become float32
    linked_kernel[(triton.cdiv(length, block), triton.cdiv(int((reach_l - site).max()), block) + 1)](
        a.p0, a.p1, a.p3, a.sum_l, a.variance_l, torch.from_numpy(reach_l).to(device), most, rows,
        a.n, length, a.p0.shape[1], words, KIND=a.kind, BACKWARD=rules.order == "backward",
        BLOCK=block, STEP=with_["step"], num_warps=with_["warps"], num_stages=with_["stages"],
    )  # fmt: skip
    return rows


@triton.jit
def above_kernel(  # type: ignore[no-untyped-def]
    a0, a1, a3, a_sum, a_variance, b0, b1, b3, b_sum, b_variance, end_ptr, count_ptr, i_ptr, j_ptr, value_ptr,
    least, n, sites, others, words, halves, first_row, first_column, tiles,
    KIND: tl.constexpr, CODE: tl.constexpr, SAME: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Counts the hits of each row of a tile, or writes them from the places that the counts gave."""
    i0 = first_row + tl.program_id(0).to(tl.int64) * BLOCK
    j0 = first_column + tl.program_id(1).to(tl.int64) * BLOCK
    i, j = i0 + tl.arange(0, BLOCK), j0 + tl.arange(0, BLOCK)
    if j0 >= tl.load(end_ptr + tl.minimum(i0 + BLOCK, sites) - 1):
        return
    if SAME and j0 + BLOCK <= i0:
        return
    m, sx, sy, vx, vy, x = sums_tile(
        a0, a1, a3, a_sum, a_variance, b0, b1, b3, b_sum, b_variance, i, j, n, sites, others, words, KIND, BLOCK, STEP
    )
    values = formula(CODE, m, halves, sx, sy, vx, vy, x).to(tl.float32)
    end = tl.load(end_ptr + i, mask=i < sites, other=0)
    hit = (tl.abs(values) >= least) & (j[None, :] < end[:, None])
    if SAME:
        hit = hit & (i[:, None] < j[None, :])
    at = count_ptr + (i - first_row) * tiles + tl.program_id(1)
    ones = hit.to(tl.int32)
    if WRITE:
        place = tl.load(at, mask=i < sites, other=0)[:, None] + tl.cumsum(ones, axis=1) - 1
        tl.store(i_ptr + place, i[:, None] + tl.zeros_like(place), mask=hit)
        tl.store(j_ptr + place, j[None, :] + tl.zeros_like(place), mask=hit)
        tl.store(value_ptr + place, values, mask=hit)
    else:
        tl.store(at, tl.sum(ones, axis=1).to(tl.int64), mask=i < sites)


@triton.jit
def score_kernel(  # type: ignore[no-untyped-def]
    a0, a1, a3, a_sum, a_variance, start_ptr, end_ptr, out_ptr, n, sites, words,
    KIND: tl.constexpr, CODE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Both sides of the window of a block of sites: twice the products of one side, and no two writers of a sum."""
    i0 = tl.program_id(0).to(tl.int64) * BLOCK
    i = i0 + tl.arange(0, BLOCK)
    end_i = tl.load(end_ptr + i, mask=i < sites, other=0)
    stop = tl.maximum(tl.load(end_ptr + tl.minimum(i0 + BLOCK, sites) - 1), i0 + 1)
    j0 = tl.minimum(tl.load(start_ptr + i0), i0) // BLOCK * BLOCK
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    while j0 < stop:
        j = j0 + tl.arange(0, BLOCK)
        end_j = tl.load(end_ptr + j, mask=j < sites, other=0)
        m, sx, sy, vx, vy, x = sums_tile(
            a0,
            a1,
            a3,
            a_sum,
            a_variance,
            a0,
            a1,
            a3,
            a_sum,
            a_variance,
            i,
            j,
            n,
            sites,
            sites,
            words,
            KIND,
            BLOCK,
            STEP,
        )
        values = formula(CODE, m, 1.0, sx, sy, vx, vy, x)
        after = (i[:, None] < j[None, :]) & (j[None, :] < end_i[:, None])
        before = (j[None, :] < i[:, None]) & (i[:, None] < end_j[None, :])
        total += tl.sum(tl.where((after | before) & (values == values), values, 0.0), axis=1)
        j0 += BLOCK
    varies = tl.load(a_variance + i, mask=i < sites, other=0.0) > 0
    tl.store(out_ptr + i, tl.where(varies, total + 1.0, float("nan")), mask=i < sites)


@triton.jit
def decay_kernel(  # type: ignore[no-untyped-def]
    a0, a1, a3, a_sum, a_variance, position_ptr, edges_ptr, sums_ptr, pairs_ptr, n, sites, words, bins,
    KIND: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BINS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Block row `program_id(0)`, every SPLITS-th block from the diagonal on; sums stay in registers, one writer per cell."""
    row, split = tl.program_id(0), tl.program_id(1)
    i0 = row.to(tl.int64) * BLOCK
    i = i0 + tl.arange(0, BLOCK)
    position_i = tl.load(position_ptr + i, mask=i < sites, other=0)
    first = tl.load(position_ptr + i0)
    last = tl.load(position_ptr + tl.minimum(i0 + BLOCK, sites) - 1)
    b = tl.arange(0, BINS)
    lower = tl.load(edges_ptr + b, mask=b < bins, other=0)
    upper = tl.load(edges_ptr + b + 1, mask=b < bins, other=0)
    end = tl.load(edges_ptr + bins)
    sums, pairs = tl.zeros((BINS,), dtype=tl.float64), tl.zeros((BINS,), dtype=tl.int64)
    j0 = i0 + split * BLOCK
    near = j0 < sites
    while near:
        j = j0 + tl.arange(0, BLOCK)
        position_j = tl.load(position_ptr + j, mask=j < sites, other=0)
        nearest = tl.load(position_ptr + j0) - last  # no pair of the tile is nearer, none further than `furthest`
        furthest = tl.load(position_ptr + tl.minimum(j0 + BLOCK, sites) - 1) - first
        near = nearest < end
        if near:
            m, sx, sy, vx, vy, x = sums_tile(
                a0,
                a1,
                a3,
                a_sum,
                a_variance,
                a0,
                a1,
                a3,
                a_sum,
                a_variance,
                i,
                j,
                n,
                sites,
                sites,
                words,
                KIND,
                BLOCK,
                STEP,
            )
            r2 = formula(0, m, 1.0, sx, sy, vx, vy, x)
            distance = position_j[None, :] - position_i[:, None]
            wanted = (i[:, None] < j[None, :]) & (j < sites)[None, :] & (r2 == r2)
            from_bin = tl.sum(((upper <= nearest) & (b < bins)).to(tl.int32))
            to_bin = tl.sum(((lower <= furthest) & (b < bins)).to(tl.int32))
            for k in range(from_bin, to_bin):
                low, high = tl.load(edges_ptr + k), tl.load(edges_ptr + k + 1)
                inside = wanted & (distance >= low) & (distance < high)
                sums += tl.where(b == k, tl.sum(tl.sum(tl.where(inside, r2, 0.0), axis=1)), 0.0)
                pairs += tl.where(b == k, tl.sum(tl.sum(inside.to(tl.int32), axis=1)), 0).to(tl.int64)
        j0 += SPLITS * BLOCK
        near = near & (j0 < sites)
    at = (row * SPLITS + split).to(tl.int64) * bins + b
    tl.store(sums_ptr + at, sums, mask=b < bins)
    tl.store(pairs_ptr + at, pairs, mask=b < bins)


@triton.jit
def linked_kernel(  # type: ignore[no-untyped-def]
    a0, a1, a3, a_sum, a_variance, reach_ptr, most_ptr, rows_ptr, n, sites, words, row_words,
    KIND: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """32 pairs to a word: bit j % 32 of row i, or for the backward order bit i % 32 of row j."""
    i0 = tl.program_id(0).to(tl.int64) * BLOCK
    j0 = i0 + tl.program_id(1) * BLOCK
    i, j = i0 + tl.arange(0, BLOCK), j0 + tl.arange(0, BLOCK)
    if j0 >= tl.load(reach_ptr + tl.minimum(i0 + BLOCK, sites) - 1):
        return
    _, _, _, vx, vy, x = sums_tile(
        a0, a1, a3, a_sum, a_variance, a0, a1, a3, a_sum, a_variance, i, j, n, sites, sites, words, KIND, BLOCK, STEP
    )
    reach = tl.load(reach_ptr + i, mask=i < sites, other=0)
    hit = (x * x > tl.load(most_ptr) * vx * vy) & (i[:, None] < j[None, :]) & (j[None, :] < reach[:, None])
    if BACKWARD:
        hit = tl.trans(hit)
        i, j, j0 = j, i, i0
    bits = hit.to(tl.int32).reshape(BLOCK, BLOCK // 32, 32) << tl.arange(0, 32)[None, None, :]
    packed = tl.sum(bits, axis=2)  # distinct powers of two: an exact OR
    word = (j0 // 32 + tl.arange(0, BLOCK // 32)) % row_words
    tl.store(rows_ptr + i[:, None] * row_words + word[None, :], packed, mask=(i < sites)[:, None])
