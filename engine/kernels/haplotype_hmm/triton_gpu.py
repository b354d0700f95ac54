"""The copying model on the GPU; the kernels are in `triton_kernels`, those of a bank of chains in `triton_bank`.

The likelihood of a plain chain over up to LAUNCH["forward"]["most_states"] haplotypes keeps its states in registers. All
else goes through global memory by stretches of sqrt(L) sites: states are kept before each stretch, then each stretch is walked
again with all its states kept, and read backward. Targets are taken in batches, so that this needs no more than BUDGET
bytes at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton

from engine.kernels import tuned
from engine.kernels.haplotype_hmm import triton_bank
from engine.kernels.haplotype_hmm import triton_kernels as kernels

INTERPRETED = triton.knobs.runtime.interpret

# how kernels are launched; a card's tuning file may replace entries of "forward" and "bank"
LAUNCH: dict[str, dict[str, int]] = {
    "forward": {"targets": 2, "warps": 8, "most_states": 16384},
    "walk": {"tile": 1024, "warps": 4},
    "smooth": {"tile": 1024, "warps": 4},
    "draw": {"tile": 1024, "warps": 4},
    "bank": {"tile": 1024, "warps": 8},
    "materialise": {"sites": 64, "warps": 1},
}
BUDGET = 2**30  # bytes of states held at a time


class Problem:
    """Everything that the kernels read, on the device.

    Attributes:
        bits: int32 (L, half_words). target: uint8 (N, L). switch, redraw, mismatch: float64 (L,). prior: (1 or N, A, padded)
        of the state's dtype; prior_a: float64 (A,). For a bank, switch and mismatch are (C, L).
    """

    def __init__(
        self, reference_lw: Any, k: int, target_nl: Any, switch_l: np.ndarray, mismatch_l: np.ndarray, prior_k: Any,
        exclude_ne: Any, ancestry: Any, dtype: np.dtype,
    ) -> None:  # fmt: skip
        self.device, self.k = target_nl.device, k
        self.n, self.sites = target_nl.shape
        self.dtype = torch.float32 if dtype == np.float32 else torch.float64
        self.target = target_nl
        self.bits = reference_lw.view(torch.int32)
        self.half_words = self.bits.shape[1]
        self.switch, self.mismatch = self._put(switch_l), self._put(mismatch_l)
        self.redraw = torch.zeros_like(self.switch) if ancestry is None else self._put(ancestry.switch_l)
        self.prior_a = self._put(np.ones(1) if ancestry is None else ancestry.prior_a)
        self.groups = len(self.prior_a)
        self.padded_groups = triton.next_power_of_2(self.groups)
        tile = max(LAUNCH[name]["tile"] for name in ("walk", "smooth", "draw"))
        self.padded = triton.cdiv(k, tile) * tile
        self.uniform = prior_k is None and ancestry is None and exclude_ne is None
        prior = torch.full((1, 1, k), 1.0 / k, dtype=torch.float64, device=self.device)
        if prior_k is not None:
            prior = self._put(prior_k)[None, None]
        if ancestry is not None:
            prior = self._put(ancestry.prior_ak)[None]
        if exclude_ne is not None:
            exclude = torch.as_tensor(exclude_ne, device=self.device)
            marked = torch.zeros((self.n, k + 1), dtype=torch.bool, device=self.device)
            marked.scatter_(1, torch.where(exclude < 0, k, exclude), True)  # column k takes the padding
            prior = prior.expand(self.n, -1, k).masked_fill(marked[:, None, :k], 0.0)
            prior = prior / prior.sum(-1, keepdim=True)
        self.prior = torch.nn.functional.pad(prior, (0, self.padded - k)).to(self.dtype).contiguous()

    def _put(self, array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(array, dtype=torch.float64, device=self.device)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def batches(self, rows: int) -> list[slice]:
        """Targets that may be held at a time with `rows` rows of states each."""
        size = rows * self.groups * self.padded * self.prior.element_size()
        step = max(1, BUDGET // max(size, 1))
        return [slice(first, min(first + step, self.n)) for first in range(0, self.n, step)]


class Walk:
    """A batch of targets on its way through the sites: F_a after each site, float64 (n, L + 1, GROUPS), and the
    likelihood so far, mantissa * 2 ** exponent, mantissa 0 where it is 0."""

    def __init__(self, problem: Problem, batch: slice) -> None:
        self.problem, self.n = problem, batch.stop - batch.start
        self.target = problem.target[batch]
        self.prior = problem.prior if len(problem.prior) == 1 else problem.prior[batch]
        self.of_group = problem.zeros(self.n, problem.sites + 1, problem.padded_groups, dtype=torch.float64)
        self.mantissa = problem.zeros(self.n, dtype=torch.float64) + 1
        self.exponent = problem.zeros(self.n, dtype=torch.int64)

    def prior_stride(self) -> int:
        return 0 if len(self.prior) == 1 else self.prior[0].numel()

    def forward(self, state: torch.Tensor, first: int, stop: int, row_stride: int = 0) -> None:
        """state (n, rows, A, padded): row 0 is before `first`; in place, or each site into the next row."""
        problem = self.problem
        kernels.walk_kernel[(self.n,)](
            problem.bits, self.target, problem.switch, problem.redraw, problem.mismatch, self.prior, problem.prior_a,
            state, self.of_group, self.mantissa, self.exponent,
            first, stop, problem.sites, problem.half_words, problem.groups, problem.padded, self.prior_stride(),
            state.stride(0), row_stride,
            GROUPS=problem.padded_groups, TILE=LAUNCH["walk"]["tile"],
            num_warps=LAUNCH["walk"]["warps"],
        )  # fmt: skip

    def log(self) -> torch.Tensor:
        """float64 (n,), log-likelihood of the sites walked so far."""
        return torch.log(self.mantissa) + self.exponent.to(torch.float64) * np.log(2.0)


def _launch(name: str, device: torch.device) -> dict[str, int]:
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return tuned.launch(f"haplotype_hmm.{name}", LAUNCH[name], card)


def _stretches(sites: int) -> list[tuple[int, int]]:
    stride = max(1, int(np.ceil(np.sqrt(sites))))
    return [(first, min(first + stride, sites)) for first in range(0, sites, stride)]


def _register_words(k: int) -> tuple[int, int]:
    """Two powers of two, the second perhaps 0, that cover the 32-bit words of k states with little to spare."""
    words = triton.cdiv(k, 32)
    first = triton.next_power_of_2(words)
    if first == words:
        return first, 0
    half = first // 2
    rest = triton.next_power_of_2(words - half)
    return (first, 0) if rest == half else (half, rest)


def log_likelihood(
    reference_lw: torch.Tensor,
    k: int,
    target_nl: torch.Tensor,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    *,
    prior_k: Any = None,
    exclude_ne: Any = None,
    ancestry: Any = None,
    dtype: Any = np.float32,
) -> torch.Tensor:
    """As the door's `log_likelihood`."""
    problem = Problem(reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, ancestry, dtype)
    result = problem.zeros(problem.n, dtype=torch.float64)
    if problem.n == 0 or problem.sites == 0:
        return result
    launch = _launch("forward", problem.device)
    if ancestry is None and k * problem.prior.element_size() <= 4 * launch["most_states"]:
        words, more_words = _register_words(k)
        kernels.forward_kernel[(triton.cdiv(problem.n, launch["targets"]),)](
            problem.bits, problem.target, problem.switch, problem.mismatch, problem.prior, result,
            problem.n, problem.sites, problem.half_words, k, 0 if len(problem.prior) == 1 else problem.padded,
            problem.padded,
            TARGETS=launch["targets"], WORDS=words, MORE_WORDS=more_words, UNIFORM=problem.uniform,
            FULL=k >= 32 * words, num_warps=launch["warps"],
        )  # fmt: skip
        return result
    for batch in problem.batches(1):
        walk = Walk(problem, batch)
        walk.forward(problem.zeros(walk.n, 1, problem.groups, problem.padded), 0, problem.sites)
        result[batch] = walk.log()
    return result


def _smooth(
    problem: Problem,
    walk: Walk,
    state: torch.Tensor,
    back: dict[str, torch.Tensor],
    out: dict[str, torch.Tensor],
    label: torch.Tensor,
    first: int,
    stop: int,
    labels: int,
    top: int,
    posterior: bool,
) -> None:
    """Backward through one stretch; `state` (n, rows, A, padded) holds the forward state of each of its sites."""
    dense = out["gamma"].ndim == 3
    kernels.smooth_kernel[(walk.n,)](
        problem.bits, walk.target, problem.switch, problem.redraw, problem.mismatch, walk.prior, problem.prior_a, label,
        state, walk.of_group, back["h"], back["carry"], back["mantissa"], back["exponent"], out["gamma"],
        out["dosage"], out["mismatch"], out["switch"], out["redraw"], out["ancestry"], out["label"], out["top_state"],
        out["top_weight"],
        first, stop, problem.sites, problem.half_words, problem.k, problem.groups, problem.padded, labels, top,
        walk.prior_stride(), state.stride(0), state.stride(1), out["gamma"].stride(0),
        out["gamma"].stride(1) if dense else 0,
        GROUPS=problem.padded_groups, TILE=LAUNCH["smooth"]["tile"], POSTERIOR=posterior,
        num_warps=LAUNCH["smooth"]["warps"],
    )  # fmt: skip


def _start_back(problem: Problem, walk: Walk) -> dict[str, torch.Tensor]:
    """h of 1 in all states of prior > 0, so that b of the last site is h."""
    carry = problem.zeros(walk.n, problem.padded_groups + 3, dtype=torch.float64)
    carry[:, -1] = 1
    h = (walk.prior > 0).to(problem.dtype).expand(walk.n, -1, -1).contiguous()
    mantissa = problem.zeros(walk.n, dtype=torch.float64) + 1
    return {"h": h, "carry": carry, "mantissa": mantissa, "exponent": problem.zeros(walk.n, dtype=torch.int64)}


def _outputs(problem: Problem, n: int, labels: int, top: int, dense: bool) -> dict[str, torch.Tensor]:
    sites, wide = problem.sites, torch.float64
    every = problem.groups * problem.k
    out = {name: problem.zeros(n, sites, dtype=wide) for name in ("dosage", "mismatch", "switch", "redraw")}
    out["ancestry"] = problem.zeros(n, sites, problem.padded_groups, dtype=wide)
    out["label"] = problem.zeros(n, sites, labels, dtype=wide)
    out["top_state"] = problem.zeros(n, sites, top, dtype=torch.int32)
    out["top_weight"] = problem.zeros(n, sites, top, dtype=wide)
    out["gamma"] = problem.zeros(n, sites, every) if dense else problem.zeros(n, every)
    return out


def _posterior(
    problem: Problem, batch: slice, label: Any, labels: int, top: int, dense: bool
) -> dict[str, torch.Tensor]:
    """Sums of the posterior of a batch of targets; with `dense` the posterior itself as "gamma"."""
    walk = Walk(problem, batch)
    out = _outputs(problem, walk.n, labels, top, dense)
    stretches = _stretches(problem.sites)
    kept = _keep(problem, walk, stretches)
    out["log"] = walk.log()
    back = _start_back(problem, walk)
    names = problem.zeros(1, dtype=torch.int32) if label is None else torch.as_tensor(label, device=problem.device)
    rows = problem.zeros(walk.n, stretches[0][1] + 1, problem.groups, problem.padded)
    for i, (first, stop) in reversed(list(enumerate(stretches))):
        rows[:, 0] = kept[:, i]
        walk.forward(rows, first, stop, rows.stride(1))
        _smooth(problem, walk, rows[:, 1:], back, out, names, first, stop, labels, top, True)
    impossible = out["log"] == -np.inf
    for name, values in out.items():
        if name not in ("log", "top_state"):
            values[impossible] = float("nan")
    out["top_state"][impossible] = -1
    return out


def _keep(problem: Problem, walk: Walk, stretches: list[tuple[int, int]]) -> torch.Tensor:
    """Forward through everything; states (n, stretches, A, padded) from before each stretch."""
    state = problem.zeros(walk.n, 1, problem.groups, problem.padded)
    kept = problem.zeros(walk.n, len(stretches), problem.groups, problem.padded)
    for i, (first, stop) in enumerate(stretches):
        kept[:, i] = state[:, 0]
        walk.forward(state, first, stop)
    return kept


def posterior(
    reference_lw: torch.Tensor,
    k: int,
    target_nl: torch.Tensor,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    *,
    prior_k: Any = None,
    exclude_ne: Any = None,
    ancestry: Any = None,
    dtype: Any = np.float32,
) -> torch.Tensor:
    """As the door's `posterior`."""
    problem = Problem(reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, ancestry, dtype)
    found = problem.zeros(problem.n, problem.sites, problem.groups * k)
    if found.numel():
        for batch in problem.batches(2 * len(_stretches(problem.sites)) + 3):
            gamma = _posterior(problem, batch, None, 0, 0, True)["gamma"]
            found[batch] = gamma / gamma.sum(-1, keepdim=True)
    return found


def posterior_sums(
    reference_lw: torch.Tensor,
    k: int,
    target_nl: torch.Tensor,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    *,
    label_k: Any = None,
    labels: int = 0,
    top: int = 0,
    prior_k: Any = None,
    exclude_ne: Any = None,
    ancestry: Any = None,
    dtype: Any = np.float32,
) -> tuple[torch.Tensor | None, ...]:
    """As the door's `posterior_sums`, its fields in order."""
    problem = Problem(reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, ancestry, dtype)
    out = {"log": problem.zeros(problem.n, dtype=torch.float64), **_outputs(problem, problem.n, labels, top, False)}
    if problem.n and problem.sites:
        for batch in problem.batches(2 * len(_stretches(problem.sites)) + 3):
            part = _posterior(problem, batch, label_k, labels, top, False)
            for name in out:
                if name != "gamma":
                    out[name][batch] = part[name]
    made = {name: out[name].to(problem.dtype) for name in out if name not in ("log", "top_state")}
    return (
        out["log"], made["dosage"], made["mismatch"], made["switch"], None if ancestry is None else made["redraw"],
        None if ancestry is None else made["ancestry"][..., : problem.groups], made["label"] if labels else None,
        out["top_state"] if top else None, made["top_weight"] if top else None,
    )  # fmt: skip


def states(
    reference_lw: torch.Tensor,
    k: int,
    target_nl: torch.Tensor,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    site_s: np.ndarray,
    *,
    direction: str,
    prior_k: Any = None,
    exclude_ne: Any = None,
    ancestry: Any = None,
    dtype: Any = np.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the door's `forward_states` and `backward_states`: walked from one wanted site to the next."""
    problem = Problem(reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, ancestry, dtype)
    found = problem.zeros(problem.n, len(site_s), problem.groups * k)
    logs = problem.zeros(problem.n, len(site_s), dtype=torch.float64)
    if not found.numel():
        return found, logs
    order = np.argsort(site_s, kind="stable")
    for batch in problem.batches(4):
        walk = Walk(problem, batch)
        state = problem.zeros(walk.n, 1, problem.groups, problem.padded)
        at = 0
        if direction == "forward":
            for place in order:
                walk.forward(state, at, int(site_s[place]) + 1)
                at = int(site_s[place]) + 1
                scale = walk.of_group[:, at].sum(1).to(problem.dtype)
                found[batch, place] = (state[:, 0, :, :k] / scale[:, None, None]).reshape(walk.n, -1)
                logs[batch, place] = walk.log()
                found[batch, place][logs[batch, place] == -np.inf] = float("nan")
            continue
        walk.forward(state, 0, problem.sites)
        impossible = walk.mantissa == 0
        back, out = _start_back(problem, walk), _outputs(problem, 0, 0, 0, False)
        at = problem.sites
        for place in order[::-1]:
            stop = int(site_s[place]) + 1
            _smooth(problem, walk, state, back, out, problem.zeros(1, dtype=torch.int32), stop, at, 0, 0, False)
            at = stop
            carry = back["carry"].to(problem.dtype)
            b = back["h"] * carry[:, -1, None, None] + carry[:, : problem.groups, None] * (walk.prior > 0)
            mean = torch.einsum("a,nak->n", problem.prior_a, (b * walk.prior).to(torch.float64))
            found[batch, place] = (b[:, :, :k] / mean[:, None, None]).reshape(walk.n, -1)
            log = torch.log(back["mantissa"]) + back["exponent"].to(torch.float64) * np.log(2.0) + torch.log(mean)
            logs[batch, place] = torch.where(impossible, -np.inf, log)
            found[batch, place][impossible] = float("nan")
    return found, logs


def posterior_paths(
    reference_lw: torch.Tensor,
    k: int,
    target_nl: torch.Tensor,
    switch_l: np.ndarray,
    mismatch_l: np.ndarray,
    uniforms_nl: np.ndarray,
    *,
    prior_k: Any = None,
    exclude_ne: Any = None,
    ancestry: Any = None,
    dtype: Any = np.float32,
) -> torch.Tensor:
    """As the door's `posterior_paths`."""
    problem = Problem(reference_lw, k, target_nl, switch_l, mismatch_l, prior_k, exclude_ne, ancestry, dtype)
    path = problem.zeros(problem.n, problem.sites, dtype=torch.int32) - 1
    if not path.numel():
        return path
    uniforms = torch.as_tensor(uniforms_nl, device=problem.device)
    stretches = _stretches(problem.sites)
    for batch in problem.batches(2 * len(stretches) + 2):
        walk, own, drawn = Walk(problem, batch), uniforms[batch], path[batch].clone()
        kept = _keep(problem, walk, stretches)
        impossible = walk.mantissa == 0
        rows = problem.zeros(walk.n, stretches[0][1] + 1, problem.groups, problem.padded)
        for i, (first, stop) in reversed(list(enumerate(stretches))):
            rows[:, 0] = kept[:, i]
            walk.forward(rows, first, stop, rows.stride(1))
            state = rows[:, 1:]
            kernels.draw_kernel[(walk.n,)](
                own, problem.switch, problem.redraw, walk.prior, problem.prior_a, state, walk.of_group, drawn,
                first, stop, problem.sites, k, problem.groups, problem.padded, walk.prior_stride(), state.stride(0),
                state.stride(1),
                GROUPS=problem.padded_groups, TILE=LAUNCH["draw"]["tile"], num_warps=LAUNCH["draw"]["warps"],
            )  # fmt: skip
        drawn[impossible] = -1
        path[batch] = drawn
    return path


class Families:
    """The chains of a bank on the device.

    Attributes:
        member: int32 (C,), the chains, those that descend from one another side by side, parents first.
        begin: int32 (families + 1,), where each family begins in `member`; most: chains of the largest one.
        parent: int32 (C,). floor: float64 (C,), 1 where there is no parent.
        base: (1 or N, width) of the dtype of the states, the uniform prior over the states that are not excluded.
    """

    def __init__(self, problem: Problem, bank: Any) -> None:
        root_c = np.arange(len(bank.parent_c))
        for c, parent in enumerate(bank.parent_c):
            root_c[c] = c if parent < 0 else root_c[parent]
        member_c = np.argsort(root_c, kind="stable")
        begin = np.append(np.flatnonzero(np.diff(root_c[member_c], prepend=-1)), len(root_c))
        self.count, self.most = len(begin) - 1, int(np.diff(begin).max())
        put = lambda array: torch.as_tensor(array.astype(np.int32), device=problem.device)  # noqa: E731
        self.member, self.begin, self.parent = put(member_c), put(begin), put(bank.parent_c)
        self.floor = torch.as_tensor(np.where(bank.parent_c < 0, 1.0, bank.floor_c), device=problem.device)
        self.problem, self.chains, self.width = problem, len(root_c), 32 * problem.half_words
        prior = problem.prior[:, 0, : problem.k]
        self.base = torch.nn.functional.pad(prior, (0, self.width - problem.k)).contiguous()
        self.launch = _launch("bank", problem.device)

    def options(self, batch: slice) -> tuple[torch.Tensor, torch.Tensor, int, dict[str, Any]]:
        """Targets and base of a batch, the stride of the base, and what kernels are compiled and launched by."""
        base = self.base if len(self.base) == 1 else self.base[batch]
        fixed = {"WORDS": self.launch["tile"] // 32, "UNIFORM": self.problem.uniform, "num_warps": self.launch["warps"]}
        return self.problem.target[batch], base, 0 if len(base) == 1 else self.width, fixed

    def walk(
        self, batch: slice, state: torch.Tensor, sums: torch.Tensor, first: int, stop: int,
        predicted: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        """state (n, rows, C, width) and sums (n, rows, C, 2), row 0 before `first`: in place if that is all, else each site
        into the next row. Predictions (n, stop - first, C) where they are wanted."""
        problem, (target, base, base_stride, fixed) = self.problem, self.options(batch)
        rows = state.shape[1] > 1
        logit, donors = (sums, sums) if predicted is None else predicted
        triton_bank.bank_walk_kernel[(len(target), self.count)](
            problem.bits, target, problem.switch, problem.mismatch, self.parent, self.floor, self.member, self.begin, base,
            state, sums, logit, donors,
            first, stop, problem.sites, problem.half_words, problem.k, self.chains, base_stride, state.stride(0),
            state.stride(1) if rows else 0, sums.stride(0), sums.stride(1) if rows else 0,
            MEMBERS=triton.next_power_of_2(self.most), PREDICT=predicted is not None, **fixed,
        )  # fmt: skip

    def retreat(
        self, batch: slice, state: torch.Tensor, sums: torch.Tensor, back: torch.Tensor, carry: torch.Tensor,
        wanted: torch.Tensor, switched: torch.Tensor, differs: torch.Tensor, first: int, stop: int,
    ) -> None:  # fmt: skip
        """Backward through one stretch; state and sums hold a row for each of its sites."""
        problem, (target, base, base_stride, fixed) = self.problem, self.options(batch)
        triton_bank.bank_retreat_kernel[(len(target), len(wanted))](
            problem.bits, target, problem.switch, problem.mismatch, self.parent, self.floor, wanted, base, state, sums, back,
            carry, switched, differs,
            first, stop, problem.sites, problem.half_words, problem.k, self.chains, len(wanted), base_stride,
            state.stride(0), state.stride(1), sums.stride(0),
            **fixed,
        )  # fmt: skip


def bank_predict(
    reference_lw: torch.Tensor,
    k: int,
    target_nl: torch.Tensor,
    bank: Any,
    *,
    exclude_ne: np.ndarray | None,
    state: Any,
    first_site: int,
    stop_site: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the door's `bank_predict`; only the sites from the one behind `first_site` on go to the device."""
    low = max(0, first_site - 1)
    switch_cl, mismatch_cl = (np.ascontiguousarray(rates[:, low:stop_site]) for rates in bank[:2])
    problem = Problem(
        reference_lw[low:stop_site], k, target_nl[:, low:stop_site].contiguous(), switch_cl, mismatch_cl, None,
        exclude_ne, None, np.dtype(str(state.state_nck.dtype)[6:]),
    )  # fmt: skip
    shape = (problem.n, stop_site - first_site, len(bank.parent_c))
    logit, donors = problem.zeros(*shape, dtype=torch.float32), problem.zeros(*shape, dtype=torch.float32)
    if logit.numel():
        Families(problem, bank).walk(
            slice(0, problem.n), state.state_nck[:, None], state.sums_nct[:, None], first_site - low, stop_site - low,
            (logit, donors),
        )  # fmt: skip
    return logit, donors


def bank_counts(
    reference_lw: torch.Tensor,
    k: int,
    target_nl: torch.Tensor,
    bank: Any,
    *,
    exclude_ne: np.ndarray | None,
    wanted_c: np.ndarray,
    dtype: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the door's `bank_counts`, by stretches."""
    problem = Problem(reference_lw, k, target_nl, bank.switch_cl, bank.mismatch_cl, None, exclude_ne, None, dtype)
    chains, sites = bank.switch_cl.shape
    switched, differs = (problem.zeros(problem.n, chains, sites, dtype=torch.float32) for _ in range(2))
    nats = problem.zeros(problem.n, chains, dtype=torch.float64)
    wanted = torch.as_tensor(np.flatnonzero(wanted_c).astype(np.int32), device=problem.device)
    if not switched.numel() or not len(wanted):
        return switched, differs, nats
    families, stretches = Families(problem, bank), _stretches(sites)
    for batch in problem.batches(chains * (2 * len(stretches) + 3)):
        n = batch.stop - batch.start
        state, sums = (
            problem.zeros(n, 1, chains, families.width),
            problem.zeros(n, 1, chains, 2, dtype=torch.float64) + 1,
        )
        kept = []
        for first, stop in stretches:
            kept.append((state[:, 0].clone(), sums[:, 0].clone()))
            families.walk(batch, state, sums, first, stop)
        rows = problem.zeros(n, stretches[0][1] + 1, chains, families.width)
        sums_rows = problem.zeros(n, rows.shape[1], chains, 2, dtype=torch.float64)
        back = problem.zeros(n, len(wanted), families.width)
        carry = problem.zeros(n, len(wanted), 2, dtype=torch.float64)
        carry[..., 1] = 1
        for (first, stop), (state, sums) in reversed(list(zip(stretches, kept))):
            rows[:, 0], sums_rows[:, 0] = state, sums
            families.walk(batch, rows, sums_rows, first, stop)
            held = rows[:, 1:], sums_rows[:, 1:]
            families.retreat(batch, *held, back, carry, wanted, switched[batch], differs[batch], first, stop)
            nats[batch] += _nats(problem, batch, held[1][:, : stop - first], first, stop)
    nats[:, torch.as_tensor(~wanted_c, device=problem.device)] = 0
    return switched, differs, nats


def _nats(problem: Problem, batch: slice, sums: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """float64 (n, C), log-probability of the alleles of a stretch; sums (n, sites, C, 2), the alleles unseen."""
    target = problem.target[batch, first:stop, None]
    wrong, (ref, alt) = problem.mismatch[:, first:stop].T, sums.unbind(-1)
    right, other = torch.where(target == 1, alt, ref), torch.where(target == 1, ref, alt)
    return torch.where(target == 255, 0.0, torch.log((right * (1 - wrong) + other * wrong) / (ref + alt))).sum(1)


def materialise(
    reference_lw: torch.Tensor,
    k: int,
    segment_offset_n: np.ndarray,
    segment_start_s: np.ndarray,
    segment_donor_s: np.ndarray,
    flip_offset_n: np.ndarray,
    flip_site_f: np.ndarray,
    *,
    first_site: int = 0,
) -> torch.Tensor:
    """As the door's `materialise`."""
    device, n, sites = reference_lw.device, len(segment_offset_n) - 1, len(reference_lw)
    made = torch.zeros((sites, (n + 63) // 64), dtype=torch.int64, device=device)
    if made.numel() == 0:
        return made
    bits, out = reference_lw.view(torch.int32), made.view(torch.int32)
    lists = (segment_offset_n, segment_start_s, segment_donor_s, flip_offset_n, np.append(flip_site_f, 0))
    longest = max(int(np.diff(segment_offset_n).max()), int(np.diff(flip_offset_n).max()))
    kernels.materialise_kernel[(triton.cdiv(n, 32), triton.cdiv(sites, LAUNCH["materialise"]["sites"]))](
        bits, *(torch.as_tensor(values, device=device) for values in lists), out,
        n, sites, bits.shape[1], out.shape[1], first_site, longest.bit_length() + 1,
        SITES=LAUNCH["materialise"]["sites"], num_warps=LAUNCH["materialise"]["warps"],
    )  # fmt: skip
    return made
