"""What this machine has: processors, memory, GPUs, vector units; and which device a job should use."""

from __future__ import annotations

import os
import platform
from functools import cache
from typing import TYPE_CHECKING, Any

from engine.errors import Unsupported

if TYPE_CHECKING:
    import torch


def cpu_count() -> int:
    """Processors this process may use: the affinity mask, which SLURM and containers set, not the machine's total."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Physical memory in bytes, or the cgroup limit where that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as stream:
                text = stream.read().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def cpu_flags() -> set[str]:
    """Feature flags of the first processor, from /proc/cpuinfo; empty where there is none."""
    try:
        with open("/proc/cpuinfo") as stream:
            for line in stream:
                if line.startswith(("flags", "Features")):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def cpu_model() -> str:
    """Processor name as the kernel reports it."""
    try:
        with open("/proc/cpuinfo") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB and GPUs of this machine; no host name, no user, no path."""
    import sys

    gpus: list[str] = []
    if "torch" in sys.modules:  # asking must not cost a torch import
        import torch

        if torch.cuda.is_available():
            gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu_model(), "cores": cpu_count(), "memory_gib": round(memory_bytes() / 2**30, 1), "gpus": gpus}


def choose(device: str = "auto") -> torch.device:
    """Torch device for `device`: "auto" takes the GPU where there is one; a named one is never replaced.

    Raises:
        Unsupported: a named device is not on this machine.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Unsupported(
            "a CUDA device", "none on this machine", f"device '{device}'", "--device cpu or --device auto"
        )
    return torch.device(device)


@cache
def trains_in_bf16(device_type: str) -> bool:
    """Whether convolutions in bfloat16 have the right weight gradients here: always asked, never assumed.

    On processors with AVX512-BF16 but without AMX, PyTorch's CPU library (seen with 2.13) returns unwritten memory for the
    gradient of a 3D convolution over a few voxels. The answer comes from small convolutions held against float32.
    """
    import torch

    if device_type == "cuda":
        return torch.cuda.is_bf16_supported()
    if not {"amx_bf16", "avx512_bf16"} & cpu_flags():
        return False  # emulated: right, but slower than float32
    draw = torch.Generator().manual_seed(0)
    for side, channels in ((2, 16), (2, 64), (3, 32), (4, 64)):
        x, grad = (torch.randn((2, channels, side, side, side), generator=draw) for _ in range(2))
        weight = torch.randn((channels, channels, 3, 3, 3), generator=draw).requires_grad_()
        wanted = torch.autograd.grad(torch.nn.functional.conv3d(x, weight, padding=1), weight, grad)[0]
        half = weight.detach().bfloat16().requires_grad_()
        made = torch.nn.functional.conv3d(x.bfloat16(), half, padding=1)
        got = torch.autograd.grad(made, half, grad.bfloat16())[0].float()
        if not bool((got - wanted).norm() < 0.05 * wanted.norm()):  # NaN is not below
            return False
    return True
