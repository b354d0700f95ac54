"""Linkage disequilibrium, as the specification, in NumPy: reference_values.py has the formulas and the scopes,
reference_greedy.py the passes over sites in an order that matters.
"""

from __future__ import annotations

from engine.kernels.ld.reference_greedy import blocks, clump, prune
from engine.kernels.ld.reference_values import band, decay, matrix, pairs, score, threshold

__all__ = ["band", "blocks", "clump", "decay", "matrix", "pairs", "prune", "score", "threshold"]
