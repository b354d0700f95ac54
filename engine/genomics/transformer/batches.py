"""Haplotypes as the network takes them: predictions walked into features, padded to whole patches, cut into windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.genomics.transformer import features
from engine.genomics.transformer.config import NetworkConfig
from engine.genomics.transformer.model import HaplotypeTransformer, State


class Batch(NamedTuple):
    """B haplotypes over L sites, padded. logit_blc, features_blf, centred_bl, residual_bl, nats_blc float32, see `model`;
    allele_bl float32, 0 where unknown; known_bl float32, 1 where the allele is known; group_b int64; covariate_bv float32
    (B, 2 V)."""

    logit_blc: Tensor
    features_blf: Tensor
    centred_bl: Tensor
    residual_bl: Tensor
    nats_blc: Tensor
    allele_bl: Tensor
    known_bl: Tensor
    group_b: Tensor
    covariate_bv: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True)
class Facts:
    """What all batches of one model share: weight_c float32, the starting weights; share_l float32, frequencies of
    ALT; fact_lf float32, see `features`; patch."""

    weight_c: np.ndarray
    share_l: np.ndarray
    fact_lf: np.ndarray
    patch: int


def batch(
    facts: Facts,
    logit_nlc: np.ndarray,
    donors_nlc: np.ndarray,
    target_nl: np.ndarray,
    group_n: np.ndarray,
    covariate_nv: np.ndarray,
) -> Batch:
    """A batch from stored predictions (float16) and alleles (uint8, 255 missing).

    Args:
        group_n: int64 (N,), the number of groups where it is unknown. covariate_nv: float32 (N, 2 V).
    """
    n, sites, chains = logit_nlc.shape
    logit_nlc, donors_nlc = logit_nlc.astype(np.float32), donors_nlc.astype(np.float32)
    memory = features.Memory(n, chains)
    feature_nlf = np.empty((n, sites, features.width(chains)), np.float32)
    residual_nl, nats_nlc = np.empty((n, sites), np.float32), np.empty((n, sites, chains), np.float32)
    features.walk(
        logit_nlc, donors_nlc, target_nl, facts.weight_c, facts.fact_lf, memory.running_nrc, memory.last_nt,
        feature_nlf, residual_nl, nats_nlc,
    )  # fmt: skip
    more = -sites % facts.patch

    def padded(values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        return F.pad(tensor, (0,) * (2 * (tensor.ndim - 2)) + (0, more)) if more else tensor

    return Batch(
        padded(logit_nlc), padded(feature_nlf), padded(centred(facts, target_nl)), padded(residual_nl), padded(nats_nlc),
        padded(target_nl == 1), padded(target_nl <= 1), torch.from_numpy(group_n.astype(np.int64)),
        torch.from_numpy(covariate_nv),
    )  # fmt: skip


def centred(facts: Facts, target_nl: np.ndarray, site: slice = slice(None)) -> np.ndarray:
    """float32 (N, sites): allele less its frequency, 0 where it is missing."""
    return np.where(target_nl == 255, np.float32(0), target_nl - facts.share_l[site])


def windows(
    network: torch.nn.Module, whole: Batch, patches: int, patch: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, bool]]:
    """Logits, alleles and which are known, each (b, l), window by window, and whether it is the last.

    The state is carried from window to window without its graph.
    """
    state: State | None = None
    size, sites = patches * patch, whole.logit_blc.shape[1]
    for first in range(0, sites, size):
        cut = slice(first, first + size)
        logits, after = network(
            whole.logit_blc[:, cut], whole.features_blf[:, cut], whole.centred_bl[:, cut], whole.residual_bl[:, cut],
            whole.nats_blc[:, cut], (whole.group_b, whole.covariate_bv), first, state,
        )  # fmt: skip
        state = after.detached()
        yield logits, whole.allele_bl[:, cut], whole.known_bl[:, cut], first + size >= sites


def nats(logit_bl: Tensor, allele_bl: Tensor, known_bl: Tensor) -> Tensor:
    """float32 (b,): log-probability of the known alleles."""
    return -(F.binary_cross_entropy_with_logits(logit_bl, allele_bl, reduction="none") * known_bl).sum(dim=1)


@torch.no_grad()
def log_likelihood(network: HaplotypeTransformer, whole: Batch, patches: int) -> np.ndarray:
    """float64 (B,), in evaluation mode; the sum over windows in float64."""
    network.eval()
    total = torch.zeros(len(whole.group_b), dtype=torch.float64)
    for logits, allele, known, _ in windows(network, whole, patches, network.patch):
        total += nats(logits.float(), allele, known).double().cpu()
    return total.numpy()


def new_network(
    config: NetworkConfig, *, sites: int, chains: int, groups: int, covariates: int, weight_c: Sequence[float]
) -> HaplotypeTransformer:
    """An untrained network; its weights come from torch's generator."""
    return HaplotypeTransformer(
        sites=sites, chains=chains, features=features.width(chains), groups=groups, covariates=covariates,
        weight_c=list(weight_c), **config.model_dump(),
    )  # fmt: skip
