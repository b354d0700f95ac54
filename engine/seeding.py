"""Counter-based random draws: what is drawn for item k depends on (seed, purpose, k) and on nothing else.

So synthetic subject k is the same on one process or eight, in one job or a hundred array tasks, and after a requeue.
Philox is the generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): its key is a hash of
seed and purpose, its counter starts at the item's index, so that streams of different items never overlap.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def generator(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """NumPy generator for item `index` of the stream named (`seed`, `purpose`).

    Args:
        seed: any Python integer; the run's seed.
        purpose: what the draw is for, e.g. "genomics.path"; different purposes never share a stream.
        index: the item (subject, step, sample seen), 0 <= index < 2**63.
    """
    if index < 0:
        raise ValueError(f"index must be >= 0, got {index}")
    digest = hashlib.blake2b(f"{seed}\x1f{purpose}".encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype=np.uint64)
    counter = np.array([0, 0, index, 0], dtype=np.uint64)  # 2**128 draws between neighbouring items
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def derived_seed(seed: int, purpose: str, index: int = 0) -> int:
    """A 63-bit integer seed for a library that takes only an integer (msprime, scikit-learn, torch)."""
    return int(generator(seed, purpose, index).integers(0, 2**63 - 1))


def normal(
    shape: tuple[int, ...], seed: int, purpose: str, index: int, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """Standard normal float32 tensor of `shape`, drawn on the CPU so that every device kind gets the same numbers."""
    import torch

    values = generator(seed, purpose, index).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values).to(device)
