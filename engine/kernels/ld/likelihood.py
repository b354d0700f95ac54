"""Two sites of unknown phase: most likely haplotype frequencies, and what the interval of D' says; compiled, for one pair.

A table is n11, n12, n21, n22 (haplotypes by their alleles, 1 for REF, as far as they are known) and `open`, people
heterozygous at both sites, who carry 11 and 22 or 12 and 21. reference_greedy.py has the definitions; here the roots are
bracketed rather than solved for, and the likelihood is summed no further than it matters.
"""

from __future__ import annotations

from math import log, sqrt

import numba
import numpy as np

from engine.kernels.ld.checks import EPSILON


@numba.njit(cache=True, nogil=True)
def likely_share(table: np.ndarray) -> tuple[float, float, float, bool]:
    """(p11, p1, q1, single): most likely frequency of 11, frequencies of allele 1; whether the likelihood has one peak.

    p11 is NaN where a site does not vary.
    """
    n11, n12, n21, n22, unknown = table[0], table[1], table[2], table[3], table[4]
    total = n11 + n12 + n21 + n22 + 2 * unknown
    if unknown == 0 and (
        n11 + n12 == 0 or n21 + n22 == 0 or n11 + n21 == 0 or n12 + n22 == 0
    ):  # where a phase is open, both sites vary
        return np.nan, np.nan, np.nan, False
    f11, f12, f21, f22, share = n11 / total, n12 / total, n21 / total, n22 / total, unknown / total
    p1, q1 = f11 + f12 + share, f11 + f21 + share
    if unknown == 0:
        return f11, p1, q1, True
    # (f11 + t) (f22 + t) (share - t) = t (f12 + share - t) (f21 + share - t) where the likelihood of p11 = f11 + t is flat
    b = f11 + f22 - f12 - f21 - 3 * share
    c = f11 * f22 + f12 * f21 + share * (f12 + f21 - f11 - f22 + share)
    d = -share * f11 * f22
    roots, found = np.empty(3), 0
    corners, pieces = np.empty(4), 1
    corners[0] = 0.0
    square = b * b - 6 * c  # the cubic 2 t^3 + b t^2 + c t + d turns where 6 t^2 + 2 b t + c = 0
    if square > 0:
        for turn in ((-b - sqrt(square)) / 6, (-b + sqrt(square)) / 6):
            if 0 < turn < share:
                corners[pieces] = turn
                pieces += 1
    corners[pieces] = share
    for k in range(pieces):
        low, high = corners[k], corners[k + 1]
        at_low, at_high = ((2 * low + b) * low + c) * low + d, ((2 * high + b) * high + c) * high + d
        if (k == 0 and at_low == 0) or (k == pieces - 1 and at_high == 0) or (at_low > 0) == (at_high > 0):
            continue
        roots[found] = _root(b, c, d, low, high, at_low > 0)
        found += 1
    if found == 1 and f11 * f22 > 0 and f12 * f21 > 0:  # the slope of the likelihood is up at 0 and down at `share`
        return f11 + roots[0], p1, q1, True
    best, best_ln, inner = 0.0, _ln(table, f11, f12 + share, f21 + share, f22), False
    for k in range(found):
        ln = _ln(table, f11 + roots[k], f12 + share - roots[k], f21 + share - roots[k], f22 + roots[k])
        if ln > best_ln:
            best, best_ln, inner = roots[k], ln, True
    if _ln(table, f11 + share, f12, f21, f22 + share) > best_ln:
        best, inner = share, False
    return f11 + best, p1, q1, found == 0 or (found == 1 and inner)


@numba.njit(cache=True, nogil=True)
def _root(b: float, c: float, d: float, low: float, high: float, falls: bool) -> float:
    """Root of 2 t^3 + b t^2 + c t + d between places of unlike sign: Newton's step, or half the bracket where that fails."""
    t = (low + high) / 2
    for _ in range(80):
        value = ((2 * t + b) * t + c) * t + d
        if (value > 0) == falls:
            low = t
        else:
            high = t
        slope = (6 * t + 2 * b) * t + c
        after = t - value / slope if slope != 0 else (low + high) / 2
        if not low < after < high:
            after = (low + high) / 2
        if abs(after - t) <= 1e-16:
            return after
        t = after
    return t


@numba.njit(cache=True, nogil=True)
def _ln(table: np.ndarray, p11: float, p12: float, p21: float, p22: float) -> float:
    """Logarithm of the likelihood; -inf where something seen has no chance."""
    ln = 0.0
    for count, chance in (
        (table[0], p11), (table[1], p12), (table[2], p21), (table[3], p22), (table[4], p11 * p22 + p12 * p21),
    ):  # fmt: skip
        if count > 0:
            ln += count * log(chance) if chance > 0 else -np.inf
    return ln


@numba.njit(cache=True, nogil=True)
def likely_r2(table: np.ndarray) -> float:
    """r2 of the most likely haplotype frequencies; NaN where a site does not vary."""
    p11, p1, q1, _ = likely_share(table)
    d = p11 - p1 * q1
    if abs(d) < EPSILON:
        return 0.0
    return d * d / (p1 * q1 * (1 - p1) * (1 - q1))


@numba.njit(cache=True, nogil=True)
def interval_kind(table: np.ndarray, likelihood_q: np.ndarray, chances: np.ndarray) -> int:
    """Kind of the interval of D', 0 ... 6 as in reference_greedy.py. Scratch, float64: likelihood_q (104,), chances (40,)."""
    p11, p1, q1, single = likely_share(table)
    if p11 != p11:
        return 1
    n11, n12, n21, n22, unknown = table[0], table[1], table[2], table[3], table[4]
    d = p11 - p1 * q1
    if d < -EPSILON:
        n11, n12, n21, n22, q1, d = n12, n11, n22, n21, 1 - q1, -d
    counts, bound = (n11, n12, n21, n22, unknown), min(q1 * (1 - p1), (1 - q1) * p1)
    peak = min(100, int(100 * d / bound + 0.5))
    at_peak = _ln_at(peak, counts, p1, q1, bound)
    if single and peak < 89 and _ln_at(89, counts, p1, q1, bound) - at_peak < -5.4294:
        return 0  # ln(1 / 228): then 12 values from 0.89 on, none above the first, are at most a twentieth of all
    likelihood_q[:] = 0.0
    low = peak // _LANES
    high = low + 1  # eights [low, high) of likelihood_q are known
    _eight(low, counts, p1, q1, bound, at_peak, likelihood_q, chances)
    least = _NEGLIGIBLE if single else -1.0
    while True:
        while low > 0 and likelihood_q[low * _LANES] >= least:
            low -= 1
            _eight(low, counts, p1, q1, bound, at_peak, likelihood_q, chances)
        while high * _LANES <= 100 and likelihood_q[high * _LANES - 1] >= least:
            _eight(high, counts, p1, q1, bound, at_peak, likelihood_q, chances)
            high += 1
        kind, margin = _kind(likelihood_q)
        if margin > 101 * least or least <= _NOTHING:
            return kind
        least = _NOTHING


_LANES = 8
_NEGLIGIBLE, _NOTHING = 1e-9, 1e-18  # beyond the only peak all is below; summed on where the sums lie too near a limit


@numba.njit(cache=True, nogil=True)
def _from(likelihood_q: np.ndarray, first: int, stop: int, above: float) -> float:
    """`above`, what lies from `stop` on, and the places first .. stop-1, from the last down."""
    for q in range(stop - 1, first - 1, -1):
        above += likelihood_q[q]
    return above


@numba.njit(cache=True, nogil=True)
def _kind(likelihood_q: np.ndarray) -> tuple[int, float]:
    """Kind, and how near the nearest limit that was looked at lies."""
    from_97 = _from(likelihood_q, 97, 101, 0.0)
    from_89 = _from(likelihood_q, 89, 97, from_97)
    from_82 = _from(likelihood_q, 82, 89, from_89)
    from_72 = _from(likelihood_q, 72, 82, from_82)
    from_71 = from_72 + likelihood_q[71]
    from_52 = _from(likelihood_q, 52, 72, from_72)
    total = _from(likelihood_q, 0, 52, from_52)
    margin = abs(total - 20 * from_89)
    if total >= 20 * from_89:
        return 0, margin
    margin = min(margin, abs(total - 20 * from_97))
    if total >= 20 * from_97:
        return 1, margin
    kind = 2
    for above in (from_82, from_72, from_71, from_52):
        kind += 0.95 * total < above
        margin = min(margin, abs(0.95 * total - above))
    return kind, margin


@numba.njit(cache=True, nogil=True)
def _ln_at(q: int, counts: tuple[float, float, float, float, float], p1: float, q1: float, bound: float) -> float:
    """Logarithm of the likelihood of D' = q / 100, alleles 1 and 1 in coupling, with the allele frequencies held."""
    p11 = p1 * q1 + q / 100 * bound
    p12, p21 = p1 - p11, q1 - p11
    p22 = 1 - p1 - p21
    if q == 100:  # one of the four is zero but for rounding
        p11, p12, p21, p22 = max(p11, 1e-10), max(p12, 1e-10), max(p21, 1e-10), max(p22, 1e-10)
    n11, n12, n21, n22, unknown = counts
    return n11 * log(p11) + n12 * log(p12) + n21 * log(p21) + n22 * log(p22) + unknown * log(p11 * p22 + p12 * p21)


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def _eight(
    eight: int,
    counts: tuple[float, float, float, float, float],
    p1: float,
    q1: float,
    bound: float,
    at_peak: float,
    likelihood_q: np.ndarray,
    chances: np.ndarray,
) -> None:
    """likelihood_q[8 eight : 8 eight + 8]: exp(_ln_at - at_peak) of each q up to 100, and 0 beyond.

    Logarithm and exponential are series, correct to some units in the last place: loops of fixed length without calls, which
    LLVM turns into vectors. The logarithm of x = 2^e m, m within sqrt(2) of 1, is e ln 2 + 2 artanh((m - 1) / (m + 1)).
    """
    first, hundredth = eight * _LANES, bound / 100
    for k in range(_LANES):
        p11 = p1 * q1 + (first + k) * hundredth
        p12, p21 = p1 - p11, q1 - p11
        p22 = 1 - p1 - p21
        p11, p12 = p11 if p11 > 1e-10 else 1e-10, p12 if p12 > 1e-10 else 1e-10
        p21, p22 = p21 if p21 > 1e-10 else 1e-10, p22 if p22 > 1e-10 else 1e-10
        chances[k], chances[8 + k], chances[16 + k], chances[24 + k] = p11, p12, p21, p22
        chances[32 + k] = p11 * p22 + p12 * p21
    bits = chances.view(np.int64)
    for k in range(5 * _LANES):
        exponent = (bits[k] - _ROOT_HALF) >> 52
        bits[k] -= exponent << 52
        m = chances[k]
        s = (m - 1) / (m + 1)
        z = s * s
        high = 2 / 13 + z * (2 / 15 + z * (2 / 17 + z * (2 / 19 + z * (2 / 21 + z * (2 / 23)))))
        series = 2 / 3 + z * (2 / 5 + z * (2 / 7 + z * (2 / 9 + z * (2 / 11 + z * high))))
        chances[k] = exponent * _LN_2 + (2 * s + s * z * series)
    n11, n12, n21, n22, unknown = counts
    for k in range(_LANES):
        x = n11 * chances[k] + n12 * chances[8 + k] + n21 * chances[16 + k] + n22 * chances[24 + k]
        x += unknown * chances[32 + k] - at_peak
        x = x if x > -700.0 else -700.0
        x = x if x < 700.0 else 700.0
        twos = np.int64(x * _LOG2_E + (0.5 if x >= 0 else -0.5))
        r = (x - twos * _LN_2_HIGH) - twos * _LN_2_LOW
        high = 1 / 5040 + r * (1 / 40320 + r * (1 / 362880 + r * (1 / 3628800 + r * (1 / 39916800 + r / 479001600))))
        chances[k] = 1.0 + r * (
            1.0 + r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720 + r * high)))))
        )
        bits[k] += twos << 52
    for k in range(_LANES):
        likelihood_q[first + k] = chances[k] if first + k <= 100 else 0.0


_ROOT_HALF = np.int64(0x3FE6A09E667F3BCD)  # the float64 sqrt(1 / 2)
_LN_2, _LOG2_E = 0.6931471805599453, 1.4426950408889634
_LN_2_HIGH, _LN_2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10  # their sum is ln 2 to 32 more bits


@numba.njit(cache=True, nogil=True)
def kinds_of(tables: np.ndarray, kinds: np.ndarray) -> None:
    """kinds uint8 (P,) of tables float64 (P, 5)."""
    likelihood_q, chances = np.empty(104), np.empty(5 * _LANES)
    for p in range(len(kinds)):
        kinds[p] = interval_kind(tables[p], likelihood_q, chances)


@numba.njit(cache=True, nogil=True)
def likely_r2_of(tables: np.ndarray, r2: np.ndarray) -> None:
    """r2 float64 (P,) of tables float64 (P, 5)."""
    for p in range(len(r2)):
        r2[p] = likely_r2(tables[p])
