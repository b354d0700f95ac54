"""Linkage disequilibrium on the CPU: AND and popcount in register tiles (`bits.tiles`), values from the counts at once.

The functions of the door, each from the file that has its idea: numba_tiles.py makes values, numba_matrix.py writes them all
down, numba_sinks.py reduces them as they come.
"""

from __future__ import annotations

import sys

import numpy as np

from engine.kernels.ld import passes
from engine.kernels.ld.checks import BlockRules, ClumpRules, Sites
from engine.kernels.ld.numba_matrix import (
    band,
    major_frequency,
    matrix,
    pair_tables,
    pair_values,
    pairs,
    prepare,
    triangle,
)
from engine.kernels.ld.numba_prune import prune
from engine.kernels.ld.numba_sinks import decay, score, threshold

__all__ = [
    "band", "blocks", "clump", "decay", "major_frequency", "matrix", "pair_tables", "pair_values", "pairs", "prepare",
    "prune", "score", "threshold", "triangle",
]  # fmt: skip


def clump(first: Sites, rules: ClumpRules) -> np.ndarray:
    """int64 (L,): index site of the clump of each site, -1 where it is in none."""
    return passes.clump(first, rules, sys.modules[__name__])


def blocks(first: Sites, rules: BlockRules) -> np.ndarray:
    """int64 (L,): number of the haplotype block of each site, -1 where it is in none."""
    return passes.blocks(first, rules, sys.modules[__name__])
