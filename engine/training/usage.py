"""What a run uses: peak memory and, where there is NVML, the energy of its GPU.

NVML is the driver's own library and counts millijoules since the driver was loaded; two readings bound a run. It is called
directly, because that takes four functions and no package.
"""

from __future__ import annotations

import ctypes
import resource
from functools import cache
from typing import Any

import torch

_NVML = "libnvidia-ml.so.1"


def peak_memory_gib(device: torch.device) -> float:
    """Most memory in use so far, GiB: allocated on the GPU, or resident on a CPU (this process)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@cache
def _nvml() -> Any:
    """NVML, started, or None where the driver has none."""
    try:
        library = ctypes.CDLL(_NVML)
    except OSError:
        return None
    return library if library.nvmlInit_v2() == 0 else None


def gpu_joules(device: torch.device, library: Any = None) -> float | None:
    """Energy the GPU `device` has drawn since its driver was loaded, in joules; None without a GPU or without a counter.

    Args:
        library: NVML; default: the driver's.
    """
    if device.type != "cuda":
        return None
    library = library or _nvml()
    if library is None:
        return None
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    # by UUID: CUDA_VISIBLE_DEVICES renumbers the cards for PyTorch and not for NVML
    identity = str(torch.cuda.get_device_properties(device).uuid)
    name = identity if identity.startswith(("GPU-", "MIG-")) else f"GPU-{identity}"
    if library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle)) != 0:
        return None
    if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) != 0:
        return None
    return millijoules.value / 1000.0
