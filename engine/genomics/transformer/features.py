"""What the network sees of a site: what each chain foretells there, and how the chains did before.

Features of a site, F = 4 C + 8 for C chains, all from alleles before it:

    C      log-odds of each chain / 4; of a lenient chain those of the haplotypes it may copy, before its mismatch
    C      log(effective donors) / log(K) - 1/2
    C + 1  for a memory of 10 sites and one of 100: fading mean of the log-probability that each chain gave to what
    C + 1  came, above the mixture with the starting weights, and of the mixture's own; times 10, within -4..4
    4      allele less foretold probability at the last four sites
    2      log10 of the distance to the site before, log-odds of the allele's frequency in the panel

A missing allele changes none of the memories. `look` and `learn` are one site's two halves: a sampler stands between them.
Predictions of a training panel are made once, each haplotype with its own person left out, and kept on disk in parts.
"""

# mypy: disable-error-code="no-untyped-def"
# Functions compiled by Numba carry no annotations: their types are those of their arguments.

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numba import njit

from engine.atomic import atomic_folder
from engine.genomics import chains
from engine.genomics.chains import ChainSpec
from engine.genomics.li_stephens import LiStephens
from engine.kernels import bits
from engine.kernels.haplotype_hmm import Bank, BankState

MEMORIES = (0.9, 0.99)
LAST = 4  # residuals that are seen
LARGEST = 12.0  # log-odds
LENIENT = 0.05  # mismatch from which on a chain counts as lenient
PART = 128  # haplotypes per stored part

Progress = Callable[[int, int], None]


def width(n_chains: int) -> int:
    """F."""
    return 4 * n_chains + 2 + LAST + 2


def bank_of(model: LiStephens, specs: Sequence[ChainSpec]) -> Bank:
    """The chains over a fitted copying model, by its rates."""
    return chains.bank(specs, model.hazard_l(1.0, model.k), model.mismatch_l, np.isinf(model.distance_l))


def facts(model: LiStephens) -> np.ndarray:
    """float32 (L, 2): the last two features."""
    distance_cm = np.where(np.isfinite(model.distance_l), 100 * model.distance_l, 100.0)
    share_l = (bits.popcount_rows(model.bits_lw) + 0.5) / (model.k + 1)
    return np.stack(
        [np.log10(np.maximum(distance_cm, 1e-6)) / 2 + 1, np.log(share_l / (1 - share_l)) / 4], axis=1
    ).astype(np.float32)


def foretold(
    bank: Bank,
    specs: Sequence[ChainSpec],
    model: LiStephens,
    target_nl: np.ndarray,
    leave_out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds and donors of whole haplotypes, uint8 (N, L), as float16 (N, L, C), as the network takes them."""
    made = chains.predict(bank, model.bits_lw, model.k, target_nl, leave_out=leave_out)
    return rounded(made.logit_nlc, made.donors_nlc, specs, model.k)


def foretold_next(
    bank: Bank, specs: Sequence[ChainSpec], model: LiStephens, site: int, before_n: np.ndarray, state: BankState
) -> tuple[np.ndarray, np.ndarray]:
    """The same numbers at one site, float32 (N, C), from the allele before it (uint8) and the state, which is changed."""
    if site == 0:
        two = Bank(bank.switch_cl[:, :1], bank.mismatch_cl[:, :1], bank.parent_c, bank.floor_c)
        made = chains.predict(two, model.bits_lw[:1], model.k, before_n[:, None], state=state)
    else:
        pair = slice(site - 1, site + 1)
        two = Bank(bank.switch_cl[:, pair], bank.mismatch_cl[:, pair], bank.parent_c, bank.floor_c)
        target_n2 = np.stack([before_n, np.zeros_like(before_n)], axis=1)
        made = chains.predict(two, model.bits_lw[pair], model.k, target_n2, state=state, first_site=1)
    logit_nlc, donors_nlc = rounded(made.logit_nlc, made.donors_nlc, specs, model.k)
    return logit_nlc[:, 0].astype(np.float32), donors_nlc[:, 0].astype(np.float32)


def rounded(
    logit_nlc: np.ndarray, donors_nlc: np.ndarray, specs: Sequence[ChainSpec], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """As float16: log-odds within -LARGEST..LARGEST, of lenient chains before their mismatch; log donors / log K - 1/2."""
    logit_nlc = logit_nlc.copy()
    for c, spec in enumerate(specs):
        if spec.mismatch is not None and spec.mismatch >= LENIENT:
            seen = 1.0 / (1.0 + np.exp(-logit_nlc[..., c].astype(np.float64)))
            copied = np.clip((seen - spec.mismatch) / (1 - 2 * spec.mismatch), 0.5 / k, 1 - 0.5 / k)
            logit_nlc[..., c] = np.log(copied / (1 - copied))
    np.clip(logit_nlc, -LARGEST, LARGEST, out=logit_nlc)
    return logit_nlc.astype(np.float16), (np.log(donors_nlc) / np.log(max(k, 2)) - 0.5).astype(np.float16)


def stored(
    bank: Bank,
    specs: Sequence[ChainSpec],
    model: LiStephens,
    target_nl: np.ndarray,
    leave_out: np.ndarray,
    folder: Path,
    *,
    between: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
) -> Stored:
    """Make in `folder` what is not there yet of the predictions of all haplotypes, part by part, whole or absent.

    Args:
        between: called before each part; what it raises ends the work, and the parts made so far are kept.
    """
    parts = range(0, len(target_nl), PART)
    for at, first in enumerate(parts):
        place = folder / f"part-{at:05d}"
        if not place.is_dir():
            between()
            rows = slice(first, first + PART)
            logit_nlc, donors_nlc = foretold(bank, specs, model, target_nl[rows], leave_out[rows])
            with atomic_folder(place) as partial:
                np.save(partial / "logit.npy", logit_nlc)
                np.save(partial / "donors.npy", donors_nlc)
        if progress is not None:
            progress(at + 1, len(parts))
    return Stored(folder)


class Stored:
    """Stored predictions by haplotype; nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        parts = sorted(folder.glob("part-*"))
        self.logit = [np.load(part / "logit.npy", mmap_mode="r") for part in parts]
        self.donors = [np.load(part / "donors.npy", mmap_mode="r") for part in parts]

    def rows(self, index: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """float16 (b, L, C) each."""
        pairs = [divmod(int(at), PART) for at in index]
        return np.stack([self.logit[p][r] for p, r in pairs]), np.stack([self.donors[p][r] for p, r in pairs])


class Memory:
    """What N haplotypes remember: running_nrc float32 (N, 2, C + 1), last_n4 float32 (N, 4)."""

    def __init__(self, haplotypes: int, n_chains: int) -> None:
        self.running_nrc = np.zeros((haplotypes, len(MEMORIES), n_chains + 1), np.float32)
        self.last_nt = np.zeros((haplotypes, LAST), np.float32)


@njit(cache=True, nogil=True)
def look(logit_c, donors_c, running_rc, last_t, fact_f, out_f):
    """The features of one site."""
    count = len(logit_c)
    for c in range(count):
        out_f[c] = logit_c[c] * np.float32(0.25)
        out_f[count + c] = donors_c[c]
    at = 2 * count
    for r in range(len(running_rc)):
        for c in range(count + 1):
            out_f[at] = min(max(np.float32(10) * running_rc[r, c], np.float32(-4)), np.float32(4))
            at += 1
    for t in range(len(last_t)):
        out_f[at] = last_t[t]
        at += 1
    for f in range(len(fact_f)):
        out_f[at] = fact_f[f]
        at += 1


@njit(cache=True, nogil=True)
def _nats(logit, allele):
    """log of the probability of `allele` at these log-odds."""
    signed = -logit if allele == 1 else logit
    if signed > 0:
        return -signed - np.log1p(np.exp(-signed))
    return -np.log1p(np.exp(signed))


@njit(cache=True, nogil=True)
def learn(logit_c, allele, weight_c, running_rc, last_t, nats_c):
    """Take in the allele of one site; its residual, and into nats_c what each chain gave to it."""
    nats_c[:] = 0
    residual = np.float32(0)
    if allele <= 1:
        mixed = np.float32(0)
        for c in range(len(logit_c)):
            mixed += weight_c[c] * logit_c[c]
            nats_c[c] = _nats(logit_c[c], allele)
        of_mixed = _nats(mixed, allele)
        residual = np.float32(allele - 1.0 / (1.0 + np.exp(-mixed)))
        for r in range(len(running_rc)):
            keep = np.float32(MEMORIES[r])
            for c in range(len(logit_c)):
                running_rc[r, c] = keep * running_rc[r, c] + (1 - keep) * np.float32(nats_c[c] - of_mixed)
            running_rc[r, -1] = keep * running_rc[r, -1] + (1 - keep) * np.float32(of_mixed)
        for t in range(len(last_t) - 1, 0, -1):
            last_t[t] = last_t[t - 1]
        last_t[0] = residual
    return residual


@njit(cache=True, nogil=True)
def walk(logit_nlc, donors_nlc, target_nl, weight_c, fact_lf, running_nrc, last_nt, out_nlf, residual_nl, nats_nlc):
    """`look` and `learn` at every site of a stretch of whole haplotypes."""
    for n in range(len(target_nl)):
        for site in range(target_nl.shape[1]):
            look(logit_nlc[n, site], donors_nlc[n, site], running_nrc[n], last_nt[n], fact_lf[site], out_nlf[n, site])
            residual_nl[n, site] = learn(
                logit_nlc[n, site], target_nl[n, site], weight_c, running_nrc[n], last_nt[n], nats_nlc[n, site]
            )


@njit(cache=True, nogil=True)
def look_all(logit_nc, donors_nc, running_nrc, last_nt, fact_f, out_nf):
    """`look` at one site of N haplotypes."""
    for n in range(len(logit_nc)):
        look(logit_nc[n], donors_nc[n], running_nrc[n], last_nt[n], fact_f, out_nf[n])


@njit(cache=True, nogil=True)
def learn_all(logit_nc, allele_n, weight_c, running_nrc, last_nt, residual_n, nats_nc):
    """`learn` at one site of N haplotypes."""
    for n in range(len(logit_nc)):
        residual_n[n] = learn(logit_nc[n], allele_n[n], weight_c, running_nrc[n], last_nt[n], nats_nc[n])
