"""Linkage disequilibrium on the GPU: bits are spread to int8 on the fly and multiplied by the tensor cores, and what becomes of
the exact int32 counts is fused behind the product, so that no count matrix is ever in memory.

The functions of the door, each from the file that has its idea: triton_values.py makes values, triton_matrix.py writes them all
down, triton_sinks.py reduces them as they come. Clumps and blocks are passes on the host (passes.py) that ask for pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from engine.kernels.ld import passes
from engine.kernels.ld.checks import BlockRules, ClumpRules, Sites
from engine.kernels.ld.triton_matrix import band, major_frequency, matrix, pair_tables, pair_values, pairs
from engine.kernels.ld.triton_sinks import decay, prune, score, threshold
from engine.kernels.ld.triton_values import INTERPRETED, prepare

__all__ = [
    "INTERPRETED", "band", "blocks", "clump", "decay", "major_frequency", "matrix", "pair_tables", "pair_values", "pairs",
    "prepare", "prune", "score", "threshold", "triangle",
]  # fmt: skip


def clump(first: Sites, rules: ClumpRules) -> np.ndarray:
    """int64 (L,), on the host: index site of the clump of each site, -1 where it is in none."""
    return passes.clump(first, rules, sys.modules[__name__])


def blocks(first: Sites, rules: BlockRules) -> np.ndarray:
    """int64 (L,), on the host: number of the haplotype block of each site, -1 where it is in none."""
    return passes.blocks(first, rules, sys.modules[__name__])


def triangle(first: Sites, measure: str, rows: int) -> Iterator[Any]:
    """float32 (K,), on the card: the next rows of the lower triangle, `rows` of them."""
    return passes.triangle(first, measure, rows, sys.modules[__name__])
