"""The kernels behind `triton_gpu`: one program walks one target, or a few, through the sites.

`forward_kernel` keeps all states of its targets in registers, as one or two tiles of (words, 32) whose alleles are unpacked
from packed words by shift and mask; nothing but bits and alleles is read and one sum per site and target is exchanged.
The others hold states in global memory, (rows, A, padded) per target, and take any K and A: `walk_kernel` forward,
`smooth_kernel` backward with the sums of the posterior, `draw_kernel` for paths. Between two sites the same thread reads
what it wrote, so that no barrier is needed.

As on the CPU, the sum of site l is divided out at site l+1; staying and copying rightly have weight 1 and their true weight
goes to the likelihood, which is kept as a float64 mantissa in [1, 2) and a count of exponents.
"""

# mypy: disable-error-code="no-untyped-def"
# Functions compiled by Triton carry no annotations: their types are those of their arguments.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _wide(number):
    """A loop counter as int64; in the interpreter it is a Python integer."""
    return tl.zeros((), tl.int64) + number


@triton.jit
def _counted(mantissa, exponent, factor):
    """mantissa * 2 ** exponent times factor, the mantissa in [1, 2)."""
    bits = (mantissa * factor).to(tl.int64, bitcast=True)
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | (1023 << 52)).to(tl.float64, bitcast=True)
    return mantissa, exponent + (bits >> 52) - 1023


@triton.jit
def _emission(allele, mismatch):
    """Weights where reference and target agree and differ, the larger one 1 of two, and what they were divided by."""
    seen = allele != 255
    right = 1.0 - mismatch
    factor = tl.where(right > 0.0, right, mismatch)
    same = tl.where(seen, right / factor, 1.0)
    other = tl.where(seen, mismatch / factor, 1.0)
    return same, other, tl.where(seen, factor, 1.0)


@triton.jit
def _register_tile(
    state, bits_ptr, prior_ptr, rows, words, site, half_words, k, prior_stride, padded,
    keep, enter, same, other, allele, FIRST: tl.constexpr, WORDS: tl.constexpr, UNIFORM: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """One site for a tile (targets, WORDS, 32) of states from word FIRST on."""
    at = FIRST + tl.arange(0, WORDS)
    word = tl.load(bits_ptr + _wide(site) * half_words + at, mask=at < half_words, other=0)
    lane = tl.arange(0, 32)
    bit = ((word[:, None] >> lane[None, :]) & 1)[None, :, :]
    index = at[:, None] * 32 + lane[None, :]
    if UNIFORM:
        entering = enter[:, None, None]
        if not FULL:
            entering = tl.where((index < k)[None, :, :], entering, tl.zeros_like(entering))
    else:
        where = rows.to(tl.int64)[:, None, None] * prior_stride + index[None, :, :]
        prior = tl.load(prior_ptr + where, mask=(index < padded)[None, :, :], other=0.0)
        entering = enter[:, None, None] * prior
    mixed = state * keep[:, None, None] + entering
    return mixed * tl.where(bit == allele[:, None, None], same[:, None, None], other[:, None, None])


@triton.jit
def forward_kernel(
    bits_ptr, target_ptr, switch_ptr, mismatch_ptr, prior_ptr, result_ptr,
    n_targets, sites, half_words, k, prior_stride, padded,
    TARGETS: tl.constexpr, WORDS: tl.constexpr, MORE_WORDS: tl.constexpr, UNIFORM: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Log-likelihoods float64 (N,). bits int32 (L, half_words), target uint8 (N, L), switch and mismatch float64 (L,),
    prior (1 or N, padded) of the state's dtype, with UNIFORM its first value only. FULL: the first tile has no state beyond
    k."""
    STATE = prior_ptr.dtype.element_ty
    rows = tl.program_id(0) * TARGETS + tl.arange(0, TARGETS)
    live = rows < n_targets
    first = tl.zeros((TARGETS, WORDS, 32), STATE)
    second = tl.zeros((TARGETS, MORE_WORDS, 32), STATE) if MORE_WORDS > 0 else 0
    last = tl.full((TARGETS,), 1.0, tl.float64)
    mantissa = tl.full((TARGETS,), 1.0, tl.float64)
    exponent = tl.zeros((TARGETS,), tl.int64)
    possible = tl.full((TARGETS,), 1, tl.int32)
    each = tl.load(prior_ptr).to(tl.float64) if UNIFORM else 1.0
    for site in range(sites):
        allele = tl.load(target_ptr + rows.to(tl.int64) * sites + site, mask=live, other=255).to(tl.int32)
        switch = tl.load(switch_ptr + site)
        switch = tl.where(site == 0, 1.0, switch)
        factor = tl.where(switch < 1.0, 1.0 - switch, 1.0)
        same, other, seen_factor = _emission(allele, tl.load(mismatch_ptr + site))
        keep = ((1.0 - switch) / factor / last).to(STATE)
        enter = (tl.zeros_like(last) + switch / factor * each).to(STATE)
        same, other = same.to(STATE), other.to(STATE)
        first = _register_tile(
            first, bits_ptr, prior_ptr, rows, WORDS, site, half_words, k, prior_stride, padded, keep, enter, same,
            other, allele, 0, WORDS, UNIFORM, FULL,
        )  # fmt: skip
        total = tl.sum(tl.sum(first, axis=1), axis=1)  # words first: a thread adds up its own, then lanes shuffle once
        if MORE_WORDS > 0:
            second = _register_tile(
                second, bits_ptr, prior_ptr, rows, MORE_WORDS, site, half_words, k, prior_stride, padded, keep, enter,
                same, other, allele, WORDS, MORE_WORDS, UNIFORM, False,
            )  # fmt: skip
            total += tl.sum(tl.sum(second, axis=1), axis=1)
        last = total.to(tl.float64)
        possible = possible & (last > 0.0).to(tl.int32)
        last = tl.where(last > 0.0, last, 1.0)
        mantissa, exponent = _counted(mantissa, exponent, last * factor * seen_factor)
    log = tl.log(mantissa) + exponent.to(tl.float64) * 0.6931471805599453
    tl.store(result_ptr + rows, tl.where(possible != 0, log, float("-inf")), mask=live)


@triton.jit
def _bits(bits_ptr, site, half_words, columns):
    word = tl.load(bits_ptr + _wide(site) * half_words + columns // 32, mask=columns // 32 < half_words, other=0)
    return (word >> (columns % 32)) & 1


@triton.jit
def walk_kernel(
    bits_ptr, target_ptr, switch_ptr, redraw_ptr, mismatch_ptr, prior_ptr, prior_a_ptr, state_ptr, of_group_ptr,
    mantissa_ptr, exponent_ptr,
    first_site, stop_site, sites, half_words, groups, padded, prior_stride, state_stride, row_stride,
    GROUPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Forward through first_site .. stop_site-1. state (N, rows, A, padded): read at row 0, then each site is written
    row_stride further on (0: in place). of_group float64 (N, L + 1, GROUPS): F_a after each site, at its number plus 1.
    prior (1 or N, A, padded); mantissa 0 is an impossible target."""
    STATE = prior_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    prior_a = tl.load(prior_a_ptr + group, mask=group < groups, other=0.0)
    of_group = tl.load(of_group_ptr + (n * (sites + 1) + first_site) * GROUPS + group)
    mantissa, exponent = tl.load(mantissa_ptr + n), tl.load(exponent_ptr + n)
    source = state_ptr + n * state_stride
    for site in range(first_site, stop_site):
        allele = tl.load(target_ptr + n * sites + site).to(tl.int32)
        switch, redraw = tl.load(switch_ptr + site), tl.load(redraw_ptr + site)
        switch, redraw = tl.where(site == 0, 1.0, switch), tl.where(site == 0, 1.0, redraw)
        stay = (1.0 - redraw) * (1.0 - switch)
        factor = tl.where(stay > 0.0, stay, 1.0)
        same, other, seen_factor = _emission(allele, tl.load(mismatch_ptr + site))
        last = tl.sum(of_group, axis=0)
        last = tl.where(last > 0.0, last, 1.0)
        keep = (stay / factor / last).to(STATE)
        enter_a = ((1.0 - redraw) * switch * of_group / last + redraw * prior_a) / factor
        sums = tl.zeros((GROUPS,), tl.float64)
        for a in range(groups):
            enter = tl.sum(tl.where(group == a, enter_a, 0.0), axis=0).to(STATE)
            total = tl.zeros((TILE,), STATE)
            for start in range(0, padded, TILE):
                columns = start + tl.arange(0, TILE)
                at = _wide(a) * padded + columns
                mixed = tl.load(source + at) * keep + tl.load(prior_ptr + n * prior_stride + at) * enter
                agrees = _bits(bits_ptr, site, half_words, columns) == allele
                made = mixed * tl.where(agrees, same.to(STATE), other.to(STATE))
                tl.store(source + row_stride + at, made)
                total += made
            sums = tl.where(group == a, tl.sum(total.to(tl.float64), axis=0), sums)
        source += row_stride
        of_group = sums
        tl.store(of_group_ptr + (n * (sites + 1) + site + 1) * GROUPS + group, of_group)
        everything = tl.sum(of_group, axis=0)
        possible = (everything > 0.0) & (mantissa > 0.0)
        mantissa = tl.where(possible, mantissa, 1.0)
        mantissa, exponent = _counted(mantissa, exponent, tl.where(possible, everything * factor * seen_factor, 1.0))
        mantissa = tl.where(possible, mantissa, 0.0)
    tl.store(mantissa_ptr + n, mantissa)
    tl.store(exponent_ptr + n, exponent)


@triton.jit
def smooth_kernel(
    bits_ptr, target_ptr, switch_ptr, redraw_ptr, mismatch_ptr, prior_ptr, prior_a_ptr, label_ptr, state_ptr,
    of_group_ptr, h_ptr, carry_ptr, mantissa_ptr, exponent_ptr, gamma_ptr,
    dosage_ptr, differs_ptr, switched_ptr, redrawn_ptr, of_group_out_ptr, of_label_ptr, top_state_ptr, top_weight_ptr,
    first_site, stop_site, sites, half_words, k, groups, padded, labels, top, prior_stride, state_stride, row_stride,
    gamma_stride, gamma_site_stride,
    GROUPS: tl.constexpr, TILE: tl.constexpr, POSTERIOR: tl.constexpr,
):  # fmt: skip
    """Backward from stop_site-1 to first_site. h (N, A, padded): emission times backward state of the site after, divided
    by its prior mean; carry float64 (N, GROUPS + 3): by which b = keep * h + enter_a, the two switches still to be divided,
    and keep. With POSTERIOR, state holds the forward state of each site, row_stride apart, and sums are written:
    dosage, differs, switched, redrawn (N, L), of_group_out (N, L, GROUPS), of_label (N, L, labels), top (N, L, M), all in
    float64; gamma is scratch (N, A * K), or all of the posterior."""
    STATE = prior_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    prior_a = tl.load(prior_a_ptr + group, mask=group < groups, other=0.0)
    carry = carry_ptr + n * (GROUPS + 3)
    enter_a = tl.load(carry + group)
    switched, redrawn, keep = tl.load(carry + GROUPS), tl.load(carry + GROUPS + 1), tl.load(carry + GROUPS + 2)
    mantissa, exponent = tl.load(mantissa_ptr + n), tl.load(exponent_ptr + n)
    h = h_ptr + n * groups * padded
    for step in range(0, stop_site - first_site):
        site = stop_site - 1 - step
        allele = tl.load(target_ptr + n * sites + site).to(tl.int32)
        same, other, seen_factor = _emission(allele, tl.load(mismatch_ptr + site))
        state = state_ptr + n * state_stride + _wide(site - first_site) * row_stride
        gamma = gamma_ptr + n * gamma_stride + _wide(site) * gamma_site_stride
        with_1 = tl.zeros((TILE,), tl.float64)
        posterior_a, mean_a = tl.zeros((GROUPS,), tl.float64), tl.zeros((GROUPS,), tl.float64)
        for a in range(groups):
            enter = tl.sum(tl.where(group == a, enter_a, 0.0), axis=0).to(STATE)
            total, mean = tl.zeros((TILE,), tl.float64), tl.zeros((TILE,), tl.float64)
            for start in range(0, padded, TILE):
                columns = start + tl.arange(0, TILE)
                at = _wide(a) * padded + columns
                prior = tl.load(prior_ptr + n * prior_stride + at)
                b = tl.load(h + at) * keep.to(STATE) + tl.where(prior > 0.0, enter, tl.zeros_like(prior))
                bit = _bits(bits_ptr, site, half_words, columns)
                if POSTERIOR:
                    weight = tl.load(state + at) * b
                    tl.store(gamma + _wide(a) * k + columns, weight, mask=columns < k)
                    total += weight.to(tl.float64)
                    with_1 += tl.where(bit == 1, weight, tl.zeros_like(weight)).to(tl.float64)
                seen = b * tl.where(bit == allele, same.to(STATE), other.to(STATE))
                tl.store(h + at, seen)
                mean += (prior * seen).to(tl.float64)
            posterior_a = tl.where(group == a, tl.sum(total, axis=0), posterior_a)
            mean_a = tl.where(group == a, tl.sum(mean, axis=0), mean_a)
        if POSTERIOR:
            everything = tl.sum(posterior_a, axis=0)
            dosage = tl.sum(with_1, axis=0) / everything
            out = n * sites + site
            tl.store(dosage_ptr + out, dosage)
            differs = tl.where(allele == 0, dosage, tl.where(allele == 1, 1.0 - dosage, 0.0 * dosage))
            tl.store(differs_ptr + out, differs)
            if site + 1 < sites:
                tl.store(switched_ptr + out + 1, switched / everything)
                tl.store(redrawn_ptr + out + 1, redrawn / everything)
            tl.store(of_group_out_ptr + out * GROUPS + group, posterior_a / everything)
            tl.debug_barrier()  # gamma is read by other threads than wrote it
            for label in range(labels):
                of_label = tl.zeros((TILE,), tl.float64)
                for a in range(groups):
                    for start in range(0, padded, TILE):
                        columns = start + tl.arange(0, TILE)
                        mine = (columns < k) & (tl.load(label_ptr + columns, mask=columns < k, other=-1) == label)
                        weight = tl.load(gamma + _wide(a) * k + columns, mask=mine, other=0.0)
                        of_label += weight.to(tl.float64)
                tl.store(of_label_ptr + out * labels + label, tl.sum(of_label, axis=0) / everything)
            for m in range(top):
                best, best_at = tl.full((), 0.0, tl.float64), tl.full((), -1, tl.int32)
                for start in range(0, groups * k, TILE):
                    columns = start + tl.arange(0, TILE)
                    weight = tl.load(gamma + columns, mask=columns < groups * k, other=0.0).to(tl.float64)
                    here = tl.max(weight, axis=0)
                    where = tl.min(tl.where(weight == here, columns, 2147483647), axis=0)
                    best_at = tl.where(here > best, where, best_at)
                    best = tl.where(here > best, here, best)
                tl.store(top_state_ptr + out * top + m, best_at)
                tl.store(top_weight_ptr + out * top + m, best / everything)
                tl.debug_barrier()
                tl.store(gamma + tl.maximum(best_at, 0), tl.zeros((), STATE), mask=best_at >= 0)
                tl.debug_barrier()
        everything = tl.sum(prior_a * mean_a, axis=0)
        if site > 0:
            switch, redraw = tl.load(switch_ptr + site), tl.load(redraw_ptr + site)
            stay = (1.0 - redraw) * (1.0 - switch)
            factor = tl.where(stay > 0.0, stay, 1.0)
            everything = tl.where(everything > 0.0, everything, 1.0)
            mean_a = mean_a / everything
            enter_a = ((1.0 - redraw) * switch * mean_a + redraw) / factor
            keep = stay / factor / everything
            before = tl.load(of_group_ptr + (n * (sites + 1) + site) * GROUPS + group)
            switched = (1.0 - redraw) * switch / factor * tl.sum(before * mean_a, axis=0)
            redrawn = redraw / factor * tl.sum(before, axis=0)
            mantissa, exponent = _counted(mantissa, exponent, everything * factor * seen_factor)
    tl.store(carry + group, enter_a)
    tl.store(carry + GROUPS, switched)
    tl.store(carry + GROUPS + 1, redrawn)
    tl.store(carry + GROUPS + 2, keep)
    tl.store(mantissa_ptr + n, mantissa)
    tl.store(exponent_ptr + n, exponent)


@triton.jit
def draw_kernel(
    uniform_ptr, switch_ptr, redraw_ptr, prior_ptr, prior_a_ptr, state_ptr, of_group_ptr, path_ptr,
    first_site, stop_site, sites, k, groups, padded, prior_stride, state_stride, row_stride,
    GROUPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Paths int32 (N, L) from stop_site-1 to first_site, given what is at stop_site; uniforms float64 (N, L); state as
    for smooth_kernel."""
    n = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    here = tl.load(path_ptr + n * sites + stop_site, mask=stop_site < sites, other=0)
    for step in range(0, stop_site - first_site):
        site = stop_site - 1 - step
        state = state_ptr + n * state_stride + _wide(site - first_site) * row_stride
        of_group = tl.load(of_group_ptr + (n * (sites + 1) + site + 1) * GROUPS + group)
        left = tl.load(uniform_ptr + n * sites + site)
        begin, end = here * 0, here * 0 + groups
        if site + 1 < sites:
            a = here // k
            at = _wide(a) * padded + here % k
            switch, redraw = tl.load(switch_ptr + site + 1), tl.load(redraw_ptr + site + 1)
            prior = tl.load(prior_ptr + n * prior_stride + at).to(tl.float64)
            of_own = tl.sum(tl.where(group == a, of_group, 0.0), axis=0)
            stay = (1.0 - redraw) * (1.0 - switch) * tl.load(state + at).to(tl.float64)
            change = (1.0 - redraw) * switch * prior * of_own
            anew = redraw * tl.load(prior_a_ptr + a) * prior * tl.sum(of_group, axis=0)
            left = left * (stay + change + anew) - stay
            stays = (left < 0.0) | (change + anew == 0.0)
            within = (left < change) | (anew == 0.0)
            left = tl.where(within, left / change, (left - change) / anew)
            begin = tl.where(within, a, 0)
            end = tl.where(within, a + 1, groups)
            end = tl.where(stays, begin, end)
        goal = left * tl.sum(tl.where((group >= begin) & (group < end), of_group, 0.0), axis=0)
        mass, found, possible = goal * 0.0, here * 0 - 1, here * 0 - 1
        for a in range(begin, end):
            for start in range(0, padded, TILE):
                columns = start + tl.arange(0, TILE)
                value = tl.load(state + _wide(a) * padded + columns).to(tl.float64)
                through = mass + tl.cumsum(value, axis=0)
                index = a * k + columns
                first = tl.min(tl.where((through > goal) & (value > 0.0), index, 2147483647), axis=0)
                found = tl.where((found < 0) & (first < 2147483647), first, found)
                possible = tl.maximum(possible, tl.max(tl.where(value > 0.0, index, -1), axis=0))
                mass += tl.sum(value, axis=0)
        here = tl.where(begin == end, here, tl.where(found >= 0, found, possible))
        tl.store(path_ptr + n * sites + site, here)


@triton.jit
def materialise_kernel(
    bits_ptr, offset_ptr, start_ptr, donor_ptr, flip_offset_ptr, flip_ptr, made_ptr,
    n_haplotypes, sites, half_words, made_half_words, first_site, search_steps,
    SITES: tl.constexpr,
):  # fmt: skip
    """made int32 (L, made_half_words): 32 haplotypes and SITES sites per program, one bit of each word by lane."""
    lane = tl.arange(0, 32)
    n = tl.program_id(0) * 32 + lane
    live = n < n_haplotypes
    begin = tl.program_id(1) * SITES
    low, stop = tl.load(offset_ptr + n, mask=live, other=0), tl.load(offset_ptr + n + 1, mask=live, other=0)
    flip, flip_stop = (
        tl.load(flip_offset_ptr + n, mask=live, other=0), tl.load(flip_offset_ptr + n + 1, mask=live, other=0),
    )  # fmt: skip
    wanted = first_site + begin
    high, flip_high = stop, flip_stop
    for _ in range(search_steps):  # first segment that starts after the first site; first flip that is not before it
        middle = (low + high) // 2
        after = tl.load(start_ptr + middle, mask=low < high, other=0) <= wanted
        low, high = tl.where((low < high) & after, middle + 1, low), tl.where((low < high) & (after == 0), middle, high)
        middle = (flip + flip_high) // 2
        before = tl.load(flip_ptr + middle, mask=flip < flip_high, other=0) < wanted
        open_ = flip < flip_high
        flip, flip_high = tl.where(open_ & before, middle + 1, flip), tl.where(open_ & (before == 0), middle, flip_high)
    segment = low - 1
    donor = tl.load(donor_ptr + segment, mask=live, other=0)
    next_start = tl.load(start_ptr + segment + 1, mask=live & (segment + 1 < stop), other=9223372036854775807)
    next_flip = tl.load(flip_ptr + flip, mask=live & (flip < flip_stop), other=9223372036854775807)
    for i in range(SITES):
        site = begin + i
        if site < sites:
            place = first_site + site
            moves = next_start == place
            segment = tl.where(moves, segment + 1, segment)
            donor = tl.where(moves, tl.load(donor_ptr + segment, mask=live & moves, other=0), donor)
            more = moves & live & (segment + 1 < stop)
            following = tl.load(start_ptr + segment + 1, mask=more, other=9223372036854775807)
            next_start = tl.where(moves, following, next_start)
            word = tl.load(bits_ptr + _wide(site) * half_words + donor // 32, mask=live, other=0)
            bit = (word >> (donor % 32)) & 1
            flips = next_flip == place
            bit = bit ^ flips.to(tl.int32)
            flip = tl.where(flips, flip + 1, flip)
            following = tl.load(flip_ptr + flip, mask=flips & live & (flip < flip_stop), other=9223372036854775807)
            next_flip = tl.where(flips, following, next_flip)
            made = tl.sum(tl.where(live, bit << lane, 0), axis=0)
            tl.store(made_ptr + _wide(site) * made_half_words + tl.program_id(0), made)
