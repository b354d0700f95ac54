"""Linkage disequilibrium, as the specification, in NumPy: reference_values.py has the formulas and the scopes,
reference_greedy.py the passes over sites in an order that matters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

from engine.kernels.ld import passes
from engine.kernels.ld.checks import Sites
from engine.kernels.ld.reference_greedy import blocks, clump, prune
from engine.kernels.ld.reference_values import band, decay, matrix, pairs, score, threshold

__all__ = ["band", "blocks", "clump", "decay", "matrix", "pairs", "prune", "score", "threshold", "triangle"]


def triangle(first: Sites, measure: str, rows: int) -> Iterator[np.ndarray]:
    """float32 (K,): the next rows of the lower triangle, `rows` of them."""
    return passes.triangle(first, measure, rows, sys.modules[__name__])
