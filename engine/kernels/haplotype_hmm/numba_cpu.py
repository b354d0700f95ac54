"""The copying model on the CPU: sixty-four states per step, match masks straight from the packed reference bits.

One site is one fused pass over the states: load, f*keep + prior*enter, times the mismatch odds where the bits differ,
store, add up. The division by the sum of site l is folded into `keep` of site l+1, so that each state is touched once
per site. Four float32 accumulators of sixteen lanes carry the sum, which is finished in float64, as are all logs. The
pass is written as LLVM vector code, because a plain loop over the bits of a word is not vectorised into mask registers;
on a machine without AVX-512 LLVM splits the same sixteen lanes into what there is. Targets run in parallel.
"""

# mypy: disable-error-code="no-untyped-def"
# Functions compiled by Numba carry no annotations: their types are those of their arguments.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
GROUPS = 4  # of LANES states: one 64-bit word of the reference


def _pass_over_states(uniform: bool) -> Callable[..., Any]:
    """Intrinsic that advances `words` words of states by one site and returns their sum in float64.

    new = (old * keep + prior * enter) * (odds where word ^ flip has a 1, else 1); with `uniform` the prior is not read
    and `enter` holds its product. States are read at old[old_at:] and written at new[new_at:], which may be the same
    place.
    """

    def advance(typingctx, old, old_at, new, new_at, prior, prior_at, bits, bits_at, words, flip, keep, enter, odds):
        signature = types.float64(
            old, types.intp, new, types.intp, prior, types.intp, bits, types.intp, types.intp,
            types.uint64, types.float32, types.float32, types.float32,
        )  # fmt: skip

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vector = ir.VectorType(ir.FloatType(), LANES)
            index, word_type = ir.IntType(64), ir.IntType(64)

            def data(position: int) -> Any:
                array_type = signature.args[position]
                array = context.make_array(array_type)(context, builder, arguments[position])
                return builder.gep(array.data, [arguments[position + 1]])

            old_p, new_p, prior_p, bits_p = data(0), data(2), data(4), data(6)
            n_words, flip_v = arguments[8], arguments[9]

            def splat(value: Any) -> Any:
                first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
                return builder.shuffle_vector(
                    first,
                    ir.Constant(vector, ir.Undefined),
                    ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES),
                )

            keep_v, enter_v, odds_v = (splat(arguments[i]) for i in (10, 11, 12))
            muladd = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{LANES}f32"
            )
            zero_v = ir.Constant(vector, [0.0] * LANES)
            sums = [cgutils.alloca_once_value(builder, zero_v) for _ in range(GROUPS)]

            def load(pointer: Any, at: Any) -> Any:
                where = builder.bitcast(builder.gep(pointer, [at]), vector.as_pointer())
                return builder.load(where, align=4)

            with cgutils.for_range(builder, n_words, intp=index) as loop:
                word = builder.xor(builder.load(builder.gep(bits_p, [loop.index])), flip_v)
                base = builder.mul(loop.index, ir.Constant(index, LANES * GROUPS))
                for group in range(GROUPS):
                    part = builder.trunc(builder.lshr(word, ir.Constant(word_type, LANES * group)), ir.IntType(LANES))
                    differs = builder.bitcast(part, ir.VectorType(ir.IntType(1), LANES))
                    at = builder.add(base, ir.Constant(index, LANES * group))
                    entering = enter_v if uniform else builder.fmul(load(prior_p, at), enter_v)
                    mixed = builder.call(muladd, [load(old_p, at), keep_v, entering])
                    made = builder.select(differs, builder.fmul(mixed, odds_v), mixed)
                    where = builder.bitcast(builder.gep(new_p, [at]), vector.as_pointer())
                    builder.store(made, where, align=4)
                    builder.store(builder.fadd(builder.load(sums[group]), made), sums[group])
            first, second, third, fourth = (builder.load(total) for total in sums)
            total_v = builder.fadd(builder.fadd(first, second), builder.fadd(third, fourth))
            total = ir.Constant(ir.DoubleType(), 0.0)
            for lane in range(LANES):
                value = builder.extract_element(total_v, ir.Constant(ir.IntType(32), lane))
                total = builder.fadd(total, builder.fpext(value, ir.DoubleType()))
            return total

        return signature, code

    return intrinsic(advance)


_advance_uniform = _pass_over_states(uniform=True)
_advance_prior = _pass_over_states(uniform=False)


@njit(cache=True, nogil=True)
def _site(reference_lw, site, old, old_at, new, new_at, prior, uniform, allele, keep, enter, mismatch):
    """Advance all states by one site; `prior` is padded to whole words, or with `uniform` holds the last word only."""
    words = reference_lw.shape[1]
    bits = reference_lw.reshape(-1)
    at = site * words
    flip = np.uint64(0) if allele != 1 else ~np.uint64(0)
    seen = 1.0 if allele == 255 else 1.0 - mismatch
    if allele == 255:
        odds = np.float32(1)
    elif seen > 0:
        odds = np.float32(mismatch / seen)
    else:  # mismatch 1: only states that differ remain, so the mask is inverted
        odds, seen, flip = np.float32(0), 1.0, ~flip
    keep, enter = np.float32(keep * seen), enter * seen
    if not uniform:
        return _advance_prior(old, old_at, new, new_at, prior, 0, bits, at, words, flip, keep, np.float32(enter), odds)
    last = words - 1
    each = np.float32(enter * prior[0])
    total = _advance_uniform(old, old_at, new, new_at, prior, 0, bits, at, last, flip, keep, each, odds)
    return total + _advance_prior(
        old,
        old_at + 64 * last,
        new,
        new_at + 64 * last,
        prior,
        0,
        bits,
        at + last,
        1,
        flip,
        keep,
        np.float32(enter),
        odds,
    )


@njit(cache=True, nogil=True)
def _padded_prior(prior_k, exclude_e, k, words, uniform):
    """float32 prior of one target: whole, padded with zeros; or the last word of a uniform one."""
    if uniform:
        tail = np.zeros(64, np.float32)
        tail[: k - 64 * (words - 1)] = np.float32(1.0 / k)
        return tail
    whole = np.zeros(64 * words, np.float64)
    whole[:k] = prior_k
    for state in exclude_e:
        if state >= 0:
            whole[state] = 0.0
    return (whole / whole.sum()).astype(np.float32)


@njit(cache=True, nogil=True)
def _aligned(size):
    """Zeroed float32 buffer of `size` values and the index of its first value on a 64-byte boundary."""
    buffer = np.zeros(size + 16, np.float32)
    return buffer, ((64 - buffer.ctypes.data % 64) % 64) // 4


@njit(cache=True, nogil=True, parallel=True)
def _log_likelihood(reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, uniform, result_n):
    sites, words = reference_lw.shape
    for n in prange(len(target_nl)):
        prior = _padded_prior(prior_k, exclude_ne[n], k, words, uniform)
        state, at = _aligned(64 * words)
        log_total, scale, keep, enter = 0.0, 1.0, 0.0, 1.0
        for site in range(sites):
            if site > 0:
                enter = switch_l[site]
                keep = (1.0 - enter) / scale
            scale = _site(
                reference_lw,
                site,
                state,
                at,
                state,
                at,
                prior,
                uniform,
                target_nl[n, site],
                keep,
                enter,
                mismatch_l[site],
            )
            if scale <= 0.0:
                log_total = -np.inf
                break
            log_total += np.log(scale)
        result_n[n] = log_total


def log_likelihood(
    reference_lw: np.ndarray,
    k: int,
    target_nl: np.ndarray,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    *,
    prior_k: np.ndarray | None = None,
    exclude_ne: np.ndarray | None = None,
) -> np.ndarray:
    """As the door's `log_likelihood`."""
    result_n = np.full(len(target_nl), np.nan)
    uniform, prior, exclude = _settings(k, prior_k, exclude_ne, len(target_nl))
    _log_likelihood(reference_lw, k, target_nl, switch_l, mismatch_l, prior, exclude, uniform, result_n)
    return result_n


def _settings(
    k: int, prior_k: np.ndarray | None, exclude_ne: np.ndarray | None, n: int
) -> tuple[bool, np.ndarray, np.ndarray]:
    """Whether the cheap uniform pass serves; prior and exclusions as arrays of one type for the compiled functions."""
    uniform = prior_k is None and (exclude_ne is None or not (exclude_ne >= 0).any())
    prior = np.full(k, 1.0 / k) if prior_k is None else prior_k
    return uniform, prior, np.full((n, 0), -1, np.int64) if exclude_ne is None else exclude_ne


@njit(cache=True, nogil=True)
def _draw(states, at, k, left):
    """Index drawn from unnormalised states[at : at+k] by one uniform, in float64."""
    total = 0.0
    for i in range(k):
        total += states[at + i]
    goal, mass, last = left * total, 0.0, -1
    for i in range(k):
        value = states[at + i]
        mass += value
        if value > 0:
            last = i
            if mass > goal:
                return i
    return last


@njit(cache=True, nogil=True, parallel=True)
def _posterior_paths(
    reference_lw, k, target_nl, switch_l, mismatch_l, uniforms_nl, prior_k, exclude_ne, uniform, stride, path_nl
):
    sites, words = reference_lw.shape
    width = 64 * words
    n_kept = (sites + stride - 1) // stride
    for n in prange(len(target_nl)):
        prior = _padded_prior(prior_k, exclude_ne[n], k, words, uniform)
        kept, kept_at = _aligned(n_kept * width)  # states before each stretch of `stride` sites
        stretch, stretch_at = _aligned(stride * width)
        scale_l = np.empty(sites)
        state, at = _aligned(width)
        scale, possible = 1.0, True
        for site in range(sites):
            if site % stride == 0:
                to = kept_at + (site // stride) * width
                kept[to : to + width] = state[at : at + width]
            enter = switch_l[site] if site > 0 else 1.0
            keep = (1.0 - enter) / scale if site > 0 else 0.0
            scale = _site(
                reference_lw,
                site,
                state,
                at,
                state,
                at,
                prior,
                uniform,
                target_nl[n, site],
                keep,
                enter,
                mismatch_l[site],
            )
            scale_l[site] = scale
            if scale <= 0.0:
                possible = False
                break
        if not possible:
            continue
        here = -1
        for block in range(n_kept - 1, -1, -1):
            first, stop = block * stride, min(sites, (block + 1) * stride)
            for site in range(first, stop):  # the same arithmetic as above, so the same states
                enter = switch_l[site] if site > 0 else 1.0
                keep = (1.0 - enter) / scale_l[site - 1] if site > 0 else 0.0
                allele, mismatch = target_nl[n, site], mismatch_l[site]
                to = stretch_at + (site - first) * width
                if site == first:
                    source = kept_at + block * width
                    _site(reference_lw, site, kept, source, stretch, to, prior, uniform, allele, keep, enter, mismatch)
                else:
                    source = to - width
                    _site(
                        reference_lw, site, stretch, source, stretch, to, prior, uniform, allele, keep, enter, mismatch
                    )
            for site in range(stop - 1, first - 1, -1):
                row = stretch_at + (site - first) * width
                left = uniforms_nl[n, site]
                if site + 1 < sites:
                    enter = switch_l[site + 1]
                    stay = (1.0 - enter) * stretch[row + here] / scale_l[site]
                    change = enter * (prior[0] if uniform else prior[here])
                    left = left * (stay + change) - stay
                    if left < 0.0 or change == 0.0:
                        path_nl[n, site] = here
                        continue
                    left /= change
                here = _draw(stretch, row, k, left)
                path_nl[n, site] = here


def posterior_paths(
    reference_lw: np.ndarray,
    k: int,
    target_nl: np.ndarray,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    uniforms_nl: np.ndarray,
    *,
    prior_k: np.ndarray | None = None,
    exclude_ne: np.ndarray | None = None,
) -> np.ndarray:
    """As the door's `posterior_paths`."""
    path_nl = np.full(target_nl.shape, -1, np.int32)
    uniform, prior, exclude = _settings(k, prior_k, exclude_ne, len(target_nl))
    stride = max(1, int(np.ceil(np.sqrt(len(reference_lw)))))
    _posterior_paths(
        reference_lw, k, target_nl, switch_l, mismatch_l, uniforms_nl, prior, exclude, uniform, stride, path_nl
    )
    return path_nl


@njit(cache=True, nogil=True, parallel=True)
def _posterior(reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, result_nlk):
    sites, words = reference_lw.shape
    for n in prange(len(target_nl)):
        prior = _padded_prior(prior_k, exclude_ne[n], k, words, False)
        state, at = _aligned(64 * words)
        scale = 1.0
        for site in range(sites):
            enter = switch_l[site] if site > 0 else 1.0
            keep = (1.0 - enter) / scale if site > 0 else 0.0
            scale = _site(
                reference_lw,
                site,
                state,
                at,
                state,
                at,
                prior,
                False,
                target_nl[n, site],
                keep,
                enter,
                mismatch_l[site],
            )
            if scale <= 0.0:
                result_nlk[n, :, :] = np.nan
                break
            for i in range(k):
                result_nlk[n, site, i] = state[at + i] / scale
        if scale <= 0.0:
            continue
        backward = np.ones(k)
        for site in range(sites - 1, -1, -1):
            total, entering, largest = 0.0, 0.0, 0.0
            for i in range(k):
                gamma = result_nlk[n, site, i] * backward[i]
                result_nlk[n, site, i] = gamma
                total += gamma
            allele, mismatch = target_nl[n, site], mismatch_l[site]
            for i in range(k):
                result_nlk[n, site, i] /= total
                if allele != 255:
                    bit = (reference_lw[site, i >> 6] >> np.uint64(i & 63)) & np.uint64(1)
                    backward[i] *= 1.0 - mismatch if bit == allele else mismatch
                entering += prior[i] * backward[i]
            for i in range(k):
                backward[i] = (1.0 - switch_l[site]) * backward[i] + switch_l[site] * entering
                largest = max(largest, backward[i])
            backward /= largest if largest > 0 else 1.0


def posterior(
    reference_lw: np.ndarray,
    k: int,
    target_nl: np.ndarray,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    *,
    prior_k: np.ndarray | None = None,
    exclude_ne: np.ndarray | None = None,
) -> np.ndarray:
    """As the door's `posterior`, in float32."""
    result_nlk = np.full((*target_nl.shape, k), np.nan, np.float32)
    _, prior, exclude = _settings(k, prior_k, exclude_ne, len(target_nl))
    _posterior(reference_lw, k, target_nl, switch_l, mismatch_l, prior, exclude, result_nlk)
    return result_nlk


@njit(cache=True, nogil=True)
def _transpose64(tile):
    """Transpose 64 words as a 64 x 64 bit matrix in place (Warren, Hacker's Delight, section 7-3)."""
    width = 32
    mask = np.uint64(0x00000000FFFFFFFF)
    while width > 0:
        shift = np.uint64(width)
        for block in range(0, 64, 2 * width):
            for i in range(block, block + width):
                swap = ((tile[i] >> shift) ^ tile[i + width]) & mask
                tile[i + width] ^= swap
                tile[i] ^= swap << shift
        width >>= 1
        mask ^= mask << np.uint64(width)


@njit(cache=True, nogil=True)
def _last_at_or_before(values, low, high, wanted):
    """Largest i in [low, high) with values[i] <= wanted; low - 1 where there is none."""
    while low < high:
        middle = (low + high) // 2
        if values[middle] <= wanted:
            low = middle + 1
        else:
            high = middle
    return low - 1


@njit(cache=True, nogil=True, parallel=True)
def _materialise(reference_lw, segment_offset_n, start_s, donor_s, flip_offset_n, flip_f, first_site, made_lw):
    """Blocks of 64 sites: turn the reference so that a donor's 64 alleles are one word, take words, turn back."""
    sites, words = reference_lw.shape
    n_haplotypes = len(segment_offset_n) - 1
    one = np.uint64(1)
    for block in prange((sites + 63) // 64):
        begin = 64 * block
        height = min(64, sites - begin)
        donors = np.empty(64 * words, np.uint64)
        tile = np.empty(64, np.uint64)
        for word in range(words):
            for i in range(64):
                tile[i] = reference_lw[begin + i, word] if i < height else np.uint64(0)
            _transpose64(tile)
            donors[64 * word : 64 * word + 64] = tile
        site0 = first_site + begin
        for out_word in range(made_lw.shape[1]):
            for i in range(64):
                n = 64 * out_word + i
                value = np.uint64(0)
                if n < n_haplotypes:
                    stop = segment_offset_n[n + 1]
                    segment = _last_at_or_before(start_s, segment_offset_n[n], stop, site0)
                    value = donors[donor_s[segment]]
                    segment += 1
                    while segment < stop and start_s[segment] < site0 + height:
                        low = (one << np.uint64(start_s[segment] - site0)) - one  # sites before the segment stay
                        value = (value & low) | (donors[donor_s[segment]] & ~low)
                        segment += 1
                    flip = _last_at_or_before(flip_f, flip_offset_n[n], flip_offset_n[n + 1], site0 - 1) + 1
                    while flip < flip_offset_n[n + 1] and flip_f[flip] < site0 + height:
                        value ^= one << np.uint64(flip_f[flip] - site0)
                        flip += 1
                tile[i] = value
            _transpose64(tile)
            for i in range(height):
                made_lw[begin + i, out_word] = tile[i]


def materialise(
    reference_lw: np.ndarray,
    k: int,
    segment_offset_n: np.ndarray,
    segment_start_s: np.ndarray,
    segment_donor_s: np.ndarray,
    flip_offset_n: np.ndarray,
    flip_site_f: np.ndarray,
    *,
    first_site: int = 0,
) -> np.ndarray:
    """As the door's `materialise`."""
    made_lw = np.empty((len(reference_lw), (len(segment_offset_n) - 1 + 63) // 64), np.uint64)
    _materialise(
        reference_lw,
        segment_offset_n,
        segment_start_s,
        segment_donor_s,
        flip_offset_n,
        flip_site_f,
        first_site,
        made_lw,
    )
    return made_lw
