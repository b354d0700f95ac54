"""Passes over sites in an order that matters, as the specification: pruning, clumping, haplotype blocks.

The rules are those of PLINK (Purcell et al. 2007; Chang et al. 2015), worked out again from what its versions do, so that equal
input gives the same sites. Here every value of every pair is at hand; the other implementations make only what a pass asks for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.kernels.ld.checks import EPSILON, BlockRules, ClumpRules, PruneRules, Sites
from engine.kernels.ld.reference_values import observations, sums, values


def prune(first: Sites, rules: PruneRules) -> np.ndarray:
    """bool (L,): kept. Windows slide over the sites; in each, of two sites with r2 above the bound one goes."""
    s = sums(first, first)
    x, vx, vy = s.n * s.sxy - s.sx * s.sy, s.n * s.sxx - s.sx * s.sx, s.n * s.syy - s.sy * s.sy
    linked = x * x > (rules.most * (1 + EPSILON)) * vx * vy
    major_l, varies_l = major_frequency(first)
    alive = varies_l | ~rules.loaded_l
    unchecked = np.arange(len(alive)) + 1  # of site i, the pairs (i, j) with j from here on were not looked at
    carried = 0
    for start, end in zip(rules.starts.tolist(), rules.ends.tolist()):
        if rules.order == "forward":
            _forward(linked, alive, major_l, unchecked, start, end)
        else:
            _backward(linked, alive, major_l, start, end, carried)
            carried = end
    return alive


def _goes_first(major_l: np.ndarray, i: int, j: int) -> bool:
    """Whether i goes in place of j, i < j: the one whose minor allele is rarer, and of equals the later."""
    return bool(major_l[i] > major_l[j] * (1 + EPSILON))


def _forward(
    linked: np.ndarray, alive: np.ndarray, major_l: np.ndarray, unchecked: np.ndarray, start: int, end: int
) -> None:
    """Each site is held against the later ones until one of the two goes; over and over until none goes."""
    gone = True
    while gone:
        gone = False
        for i in range(start, end):
            if not alive[i]:
                continue
            later = [j for j in range(max(i + 1, unchecked[i]), end) if alive[j]]
            unchecked[i] = end
            for place, j in enumerate(later):
                if linked[i, j]:
                    gone = True
                    if _goes_first(major_l, i, j):
                        alive[i] = False
                    else:
                        alive[j] = False
                        unchecked[i] = later[place + 1] if place + 1 < len(later) else end
                    break


def _backward(linked: np.ndarray, alive: np.ndarray, major_l: np.ndarray, start: int, end: int, carried: int) -> None:
    """Each new site from the last, nearest earlier ones first. One that went as the earlier of a pair still has its turn."""
    held = [i for i in range(start, end) if alive[i]]
    for place in reversed(range(len(held))):
        j = held[place]
        if j < carried:
            break
        for i in reversed(held[:place]):
            if alive[i] and linked[i, j]:
                if not _goes_first(major_l, i, j):
                    alive[j] = False
                    break
                alive[i] = False


def major_frequency(first: Sites) -> tuple[np.ndarray, np.ndarray]:
    """Frequency of the commoner allele among the called ones, float64 (L,), and whether the site varies, bool (L,)."""
    x_ln, seen_ln = observations(first)
    n_l, ploidy = seen_ln.sum(axis=1), 2 if first.unphased else 1
    share_l = x_ln.sum(axis=1) / np.maximum(ploidy * n_l, 1)
    return np.maximum(share_l, 1 - share_l), n_l * (x_ln * x_ln).sum(axis=1) > x_ln.sum(axis=1) ** 2


def clump(first: Sites, rules: ClumpRules) -> np.ndarray:
    """int64 (L,): index site of the clump of each site, -1 where it is in none."""
    clump_l = np.full(len(first.bits_lw), -1, dtype=np.int64)
    for index in rules.candidates.tolist():  # by rising p, then by place
        if clump_l[index] >= 0:
            continue
        clump_l[index] = index
        for j in range(rules.start_l[index], rules.end_l[index]):
            if j != index and clump_l[j] < 0 and rules.joins_l[j]:
                table = haplotype_table(first, index, j)
                r2 = likely_r2(table) if rules.likelihood else values(_one(first, index), _one(first, j), "r2")[0, 0]
                if r2 > rules.least:
                    clump_l[j] = index
    return clump_l


def blocks(first: Sites, rules: BlockRules) -> np.ndarray:
    """int64 (L,): number of the haplotype block of each site, -1 where it is in none."""
    major_l, _ = major_frequency(first)
    common = np.flatnonzero(1 - major_l >= rules.min_maf * (1 - EPSILON))
    position, count = rules.position_bp[common], len(common)
    kind = np.ones((count, count), dtype=np.int64)
    for m in range(count):
        for i in range(m):
            if position[m] - position[i] <= rules.max_bp:
                kind[i, m] = interval_kind(haplotype_table(first, common[i], common[m]))
    found = []
    for m in range(count):
        for i in range(m):
            span = position[m] - position[i]
            if span <= rules.max_bp and _is_block(kind[i : m + 1, i : m + 1], int(span), rules):
                found.append((-span, -i, -m))  # longest first; of equals the last
    block_l, taken = np.full(len(first.bits_lw), -1, dtype=np.int64), np.zeros(count, dtype=bool)
    for _, i, m in sorted(found):
        if not (taken[-i] or taken[-m]):
            taken[-i : -m + 1] = True
            block_l[common[-i : -m + 1]] = common[-i]
    return np.where(block_l < 0, -1, np.unique(block_l[block_l >= 0]).searchsorted(block_l))


def _is_block(kind: np.ndarray, span: int, rules: BlockRules) -> bool:
    """Gabriel et al. 2002 as Haploview has it, for a stretch of sites whose pairs have these kinds (upper triangle)."""
    size, ends = len(kind), kind[0, -1]
    pairs = kind[np.triu_indices(size, k=1)]
    informative, strong, recombining = (pairs >= 3).sum(), (pairs >= 5).sum(), (pairs == 0).sum()
    if size == 2:
        return bool(ends == 6 and span <= rules.max_bp_of_two)
    if size == 3:
        return bool(ends >= 4 and span <= rules.max_bp_of_three and informative >= 1 + int(3 * rules.share))
    if size == 4:
        return bool(ends >= 4 and informative - 1 >= int(6 * rules.share))
    judged = strong + recombining
    return bool(ends >= 4 and judged >= 6 and judged * rules.share < strong)


class Table(NamedTuple):
    """Haplotypes of two sites by their alleles, and people whose phase is open (two heterozygous sites)."""

    n11: float
    n12: float
    n21: float
    n22: float
    open: float


def haplotype_table(first: Sites, i: int, j: int) -> Table:
    """Over the observations that both sites have."""
    (x, seen_x), (y, seen_y) = (tuple(a[0] for a in observations(_one(first, k))) for k in (i, j))
    both = (seen_x * seen_y).astype(bool)
    x, y = x[both], y[both]
    if not first.unphased:
        n11, n12, n21, n22 = (float(((x == a) & (y == b)).sum()) for a in (0, 1) for b in (0, 1))
        return Table(n11, n12, n21, n22, 0.0)
    open_phase = (x == 1) & (y == 1)
    carried = (
        (2 - x, 2 - y),
        (2 - x, y),
        (x, 2 - y),
        (x, y),
    )  # alleles 1 or 2 of each person that a haplotype could pair
    n11, n12, n21, n22 = (float(np.minimum(*two)[~open_phase].sum()) for two in carried)
    return Table(n11, n12, n21, n22, float(open_phase.sum()))


def likely_frequency(table: Table) -> tuple[float, float, float] | None:
    """(p11, p1, q1): likeliest frequency of haplotype 11 under random mating, and of alleles 1; None: a site does not vary."""
    total = table.n11 + table.n12 + table.n21 + table.n22 + 2 * table.open
    if total == 0:
        return None
    f11, f12, f21, f22, share = (value / total for value in table)
    p1, q1 = f11 + f12 + share, f11 + f21 + share
    if min(table.n11 + table.n12, table.n21 + table.n22) + table.open == 0:
        return None
    if min(table.n11 + table.n21, table.n12 + table.n22) + table.open == 0:
        return None
    if table.open == 0:
        return f11, p1, q1
    linear = f11 * f22 + f12 * f21 + share * (f12 + f21 - f11 - f22 + share)
    roots = np.roots([2.0, f11 + f22 - f12 - f21 - 3 * share, linear, -share * f11 * f22])
    real = roots[np.abs(roots.imag) < 1e-7].real
    tried = np.array([0.0, share, *real[(real > 0) & (real < share)]])
    ln = [_ln_likelihood(table, f11 + t, f12 + share - t, f21 + share - t, f22 + t) for t in tried]
    return float(f11 + tried[int(np.argmax(ln))]), p1, q1


def _ln_likelihood(table: Table, p11: float, p12: float, p21: float, p22: float) -> float:
    counts = (table.n11, table.n12, table.n21, table.n22, table.open)
    chances = (p11, p12, p21, p22, p11 * p22 + p12 * p21)
    with np.errstate(divide="ignore"):
        return float(sum(n * np.log(p) for n, p in zip(counts, chances) if n))


def likely_r2(table: Table) -> float:
    """r2 of the most likely haplotype frequencies (Hill, Heredity 33, 1974); NaN where a site does not vary."""
    found = likely_frequency(table)
    if found is None:
        return np.nan
    p11, p1, q1 = found
    d = p11 - p1 * q1
    return 0.0 if abs(d) < EPSILON else d * d / (p1 * q1 * (1 - p1) * (1 - q1))


def interval_kind(table: Table) -> int:
    """What the 90 % interval of D' says of a pair, from its likelihood at 0, 0.01 ... 1 (allele frequencies held).

    0: recombining, upper bound below 0.90. 1: says nothing. 2 ... 6: upper bound at least 0.98, and the lower one below 0.51;
    from 0.51; 0.70; from 0.71; from 0.81.
    """
    found = likely_frequency(table)
    if found is None:
        return 1
    p11, p1, q1 = found
    n11, n12, n21, n22, open_phase = table
    if p11 - p1 * q1 < -EPSILON:  # D of 0 is no less than 0, whatever the rounding
        n11, n12, n21, n22, q1 = n12, n11, n22, n21, 1 - q1
    bound = min(q1 * (1 - p1), (1 - q1) * p1)
    p11_q = p1 * q1 + np.arange(101) / 100 * bound
    p_q = np.array([p11_q, p1 - p11_q, q1 - p11_q, 1 - p1 - (q1 - p11_q)])
    p_q[:, 100] = np.maximum(p_q[:, 100], 1e-10)
    chances = (*p_q, p_q[0] * p_q[3] + p_q[1] * p_q[2])
    ln_q = sum(n * np.log(p) for n, p in zip((n11, n12, n21, n22, open_phase), chances))
    likelihood_q = np.exp(ln_q - ln_q.max())
    from_q = likelihood_q[::-1].cumsum()[::-1]
    total = from_q[0]
    if total >= 20 * from_q[89]:
        return 0
    if total >= 20 * from_q[97]:
        return 1
    return 2 + sum(bool(0.95 * total < from_q[q]) for q in (52, 71, 72, 82))


def _one(first: Sites, i: int) -> Sites:
    missing_lw = None if first.missing_lw is None else first.missing_lw[i : i + 1]
    return first._replace(bits_lw=first.bits_lw[i : i + 1], missing_lw=missing_lw)
