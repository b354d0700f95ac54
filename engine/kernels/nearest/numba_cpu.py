"""The CPU implementation, by idea: bits (`numba_hamming`), windows, runs, and features (`numba_features` on
`products`).
"""

from engine.kernels.nearest.numba_exact import features_cross
from engine.kernels.nearest.numba_features import features_range, features_topk
from engine.kernels.nearest.numba_hamming import (
    hamming_cross,
    hamming_range,
    hamming_topk,
    ibs_cross,
    ibs_range,
    ibs_topk,
)
from engine.kernels.nearest.numba_runs import longest_run
from engine.kernels.nearest.numba_windows import hamming_windows_topk

__all__ = [
    "features_cross",
    "features_range",
    "features_topk",
    "hamming_cross",
    "hamming_range",
    "hamming_topk",
    "hamming_windows_topk",
    "ibs_cross",
    "ibs_range",
    "ibs_topk",
    "longest_run",
]
