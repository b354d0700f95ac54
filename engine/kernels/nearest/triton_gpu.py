"""The GPU implementation, by idea: bits (`triton_bits`), windows, runs, and features, on what they share
(`triton_shared`).
"""

from engine.kernels.nearest.triton_bits import (
    hamming_cross,
    hamming_range,
    hamming_topk,
    ibs_cross,
    ibs_range,
    ibs_topk,
)
from engine.kernels.nearest.triton_features import features_cross, features_range, features_topk
from engine.kernels.nearest.triton_runs import longest_run
from engine.kernels.nearest.triton_shared import INTERPRETED
from engine.kernels.nearest.triton_windows import hamming_windows_topk

__all__ = [
    "INTERPRETED",
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
