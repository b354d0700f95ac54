"""The copying model's likelihood on the GPU: one program per small block of targets, states in a float32 buffer.

A block of targets shares each load of reference bits. Alleles are unpacked on the fly by shift and mask; the division
by the sum of site l is folded into site l+1, as on the CPU, and logs are summed in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from engine.errors import Unsupported, UsageError

BLOCK_N = 4  # targets per program
BLOCK_K = 1024  # states per step


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    bits_ptr, target_ptr, switch_ptr, mismatch_ptr, prior_ptr, state_ptr, result_ptr,
    n_targets, sites, half_words, padded, prior_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """bits int32 (L, half_words), target uint8 (N, L), prior float32 (1 or N, padded), state zeros (N, padded)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < n_targets
    rows64 = rows.to(tl.int64)
    scale = tl.full((BLOCK_N,), 1.0, tl.float64)
    total = tl.zeros((BLOCK_N,), tl.float64)
    row_ptr = bits_ptr
    for site in range(sites):
        allele = tl.load(target_ptr + rows64 * sites + site, mask=live, other=255).to(tl.int32)
        enter = tl.load(switch_ptr + site)
        mismatch = tl.load(mismatch_ptr + site)
        enter = tl.where(site == 0, 1.0, enter)
        keep = ((1.0 - enter) / scale).to(tl.float32)
        missing = allele == 255
        if_same = tl.where(missing, 1.0, 1.0 - mismatch).to(tl.float32)
        if_other = tl.where(missing, 1.0, mismatch).to(tl.float32)
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(0, padded, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            half_word = columns // 32
            word = tl.load(row_ptr + half_word, mask=half_word < half_words, other=0)
            bit = (word >> (columns % 32)) & 1
            at = rows64[:, None] * padded + columns[None, :]
            old = tl.load(state_ptr + at, mask=live[:, None], other=0.0)
            prior_at = rows64[:, None] * prior_stride + columns[None, :]
            prior = tl.load(prior_ptr + prior_at, mask=live[:, None], other=0.0)
            mixed = old * keep[:, None] + prior * enter.to(tl.float32)
            made = mixed * tl.where(bit[None, :] == allele[:, None], if_same[:, None], if_other[:, None])
            tl.store(state_ptr + at, made, mask=live[:, None])
            sums += made
        scale = tl.sum(sums.to(tl.float64), axis=1)
        possible = scale > 0
        scale = tl.where(possible, scale, 1.0)
        total += tl.where(possible, tl.log(scale), float("-inf"))
        row_ptr += half_words
    tl.store(result_ptr + rows, total, mask=live)


def _tensor(array: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    made = array if isinstance(array, torch.Tensor) else torch.as_tensor(np.asarray(array))
    return made.to(device=device, dtype=dtype).contiguous()


def log_likelihood(
    reference_lw: torch.Tensor,
    k: int,
    target_nl: torch.Tensor,
    switch_l: Any,
    mismatch_l: Any,
    *,
    prior_k: Any = None,
    exclude_ne: Any = None,
) -> torch.Tensor:
    """As the door's `log_likelihood`, for tensors: reference bits uint64 or int64, targets uint8, on one GPU.

    Memory beside the inputs: 4 N K bytes of states, and as much again where targets have priors of their own.

    Raises:
        Unsupported: the tensors are not on a GPU (and Triton's interpreter is not asked for).
        UsageError: shapes or values that do not fit.
    """
    if not isinstance(target_nl, torch.Tensor) or not isinstance(reference_lw, torch.Tensor):
        raise Unsupported("torch tensors on a GPU", "NumPy arrays", "haplotype_hmm 'triton'", "implementation=None")
    if target_nl.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise Unsupported(
            "tensors on a GPU", f"tensors on {target_nl.device}", "haplotype_hmm 'triton'", "NumPy arrays"
        )
    device = target_nl.device
    n, sites = target_nl.shape
    words = (k + 63) // 64
    if k < 1 or tuple(reference_lw.shape) != (sites, words) or reference_lw.dtype not in (torch.uint64, torch.int64):
        raise UsageError(
            f"reference bits as 64-bit ({sites}, {words})", str(tuple(reference_lw.shape)), "haplotype_hmm"
        )
    if target_nl.dtype != torch.uint8 or bool(((target_nl > 1) & (target_nl != 255)).any()):
        raise UsageError("target alleles 0, 1 or 255 as uint8", str(target_nl.dtype), "haplotype_hmm")
    switch, mismatch = _tensor(switch_l, torch.float64, device), _tensor(mismatch_l, torch.float64, device)
    used = torch.cat([switch[1:], mismatch])
    if switch.shape != (sites,) or mismatch.shape != (sites,) or not bool(((used >= 0) & (used <= 1)).all()):
        raise UsageError(f"switch_l and mismatch_l as {sites} probabilities", "others", "haplotype_hmm")
    prior = _priors(k, n, prior_k, exclude_ne, device)
    padded = triton.cdiv(k, BLOCK_K) * BLOCK_K
    prior = torch.nn.functional.pad(prior, (0, padded - k)).to(torch.float32).contiguous()
    state = torch.zeros((n, padded), dtype=torch.float32, device=device)
    result = torch.full((n,), float("nan"), dtype=torch.float64, device=device)
    if n == 0:
        return result
    forward_kernel[(triton.cdiv(n, BLOCK_N),)](
        reference_lw.to(device).contiguous().view(torch.int32), target_nl.contiguous(), switch, mismatch, prior, state,
        result,
        n, sites, 2 * words, padded, 0 if len(prior) == 1 else padded, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    return result


def _priors(k: int, n: int, prior_k: Any, exclude_ne: Any, device: torch.device) -> torch.Tensor:
    """float64 (1, K) prior of all targets, or (N, K) where some exclude states; each row sums to 1."""
    prior = torch.ones((1, k), dtype=torch.float64, device=device)
    if prior_k is not None:
        prior = _tensor(prior_k, torch.float64, device)[None]
        if prior.shape != (1, k) or not bool((prior >= 0).all()):
            raise UsageError(f"prior_k as {k} weights >= 0", str(tuple(prior.shape[1:])), "haplotype_hmm")
    if exclude_ne is not None:
        exclude = _tensor(exclude_ne, torch.int64, device)
        if exclude.ndim != 2 or len(exclude) != n or bool(((exclude < -1) | (exclude >= k)).any()):
            raise UsageError(
                f"exclude_ne as ({n}, e) states in -1..{k - 1}", str(tuple(exclude.shape)), "haplotype_hmm"
            )
        marked = torch.zeros((n, k + 1), dtype=torch.bool, device=device)
        marked.scatter_(1, torch.where(exclude < 0, k, exclude), True)  # column k takes the padding
        prior = prior.expand(n, k).masked_fill(marked[:, :k], 0.0)
    total = prior.sum(1, keepdim=True)
    if not bool((total > 0).all()):
        raise UsageError("a state left to copy for each target", "all excluded or of weight 0", "haplotype_hmm")
    return prior / total
