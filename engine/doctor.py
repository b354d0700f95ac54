"""`engine doctor`: what this machine has and lacks, each line with the next step.

States: "ok"; "absent" (optional, the engine works without it); "missing" (the engine needs it).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import sys
from typing import Any

from engine import devices
from engine.provenance import commit

_REQUIRED = (
    "torch", "numpy", "numba", "triton", "scipy", "sklearn", "monai", "diffusers", "accelerate", "safetensors",
    "nibabel", "pydicom", "pysam", "cyvcf2", "pgenlib", "pydantic", "typer", "rich", "jinja2", "matplotlib",
)  # fmt: skip
_OPTIONAL = {
    "msprime": "pip install 'engine[demo]' to run the demo",
    "nilearn": "pip install 'engine[demo]' to run the demo",
    "xformers": "pip install 'engine[gpu]' on a GPU machine; attention runs through PyTorch without it",
}
_PROGRAMS = {
    "bcftools": "checks VCF/BCF output in the tests",
    "dcm2niix": "checks DICOM output in the tests",
    "chromium": "checks reports in the tests",
    "sbatch": "submits scripts/slurm/; the same commands run without it",
}
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "pgenlib": "Pgenlib"}


def examine() -> dict[str, Any]:
    """Checks as `{"checks": [{"what", "state", "found", "advice"}], "commit": ...}`; imports every package once."""
    rows: list[dict[str, str]] = []

    def add(what: str, state: str, found: str, advice: str = "") -> None:
        rows.append({"what": what, "state": state, "found": found, "advice": advice})

    version = sys.version.split()[0]
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    add("python", "ok" if supported else "missing", version, "" if supported else "install Python 3.11, 3.12 or 3.13")
    for name in _REQUIRED:
        add(name, *_package(name, "missing", "make env, or pip install -c constraints.txt -e '.[demo,test]'"))
    for name, advice in _OPTIONAL.items():
        add(name, *_package(name, "absent", advice))

    flags = devices.cpu_flags()
    vector = "AVX-512 with vpopcntdq" if "avx512_vpopcntdq" in flags else "AVX2" if "avx2" in flags else "baseline"
    add("cpu", "ok", f"{devices.cpu_model()}, {devices.cpu_count()} usable cores, {vector}")
    memory_gib = devices.memory_bytes() / 2**30
    add(
        "memory",
        "ok" if memory_gib >= 8 else "absent",
        f"{memory_gib:.0f} GiB",
        "" if memory_gib >= 8 else "the demo needs about 4 GiB free",
    )
    free_gib = shutil.disk_usage(".").free / 2**30
    add(
        "disk here",
        "ok" if free_gib >= 2 else "absent",
        f"{free_gib:.0f} GiB free",
        "" if free_gib >= 2 else "runs need a few GiB",
    )
    add("gpu", *_gpu())
    for program, purpose in _PROGRAMS.items():
        found = shutil.which(program)
        add(
            program,
            "ok" if found else "absent",
            "found" if found else "not found",
            "" if found else f"optional: {purpose}",
        )
    return {"checks": rows, **commit()}


def _package(name: str, lacking: str, advice: str) -> tuple[str, str, str]:
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken binary raises anything; the report must go on
        reason = " ".join(str(error).split())[:120]
        return lacking, f"cannot be imported ({type(error).__name__}: {reason})", advice
    try:
        return "ok", importlib.metadata.version(_DISTRIBUTIONS.get(name, name)), ""
    except importlib.metadata.PackageNotFoundError:
        return "ok", "version unknown", ""


def _gpu() -> tuple[str, str, str]:
    try:
        import torch
    except ImportError:
        return "absent", "torch cannot be imported", "see torch above"
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return "ok", f"{names}, CUDA {torch.version.cuda}", ""
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return "absent", "a GPU, but a CPU build of PyTorch", "rm -rf .venv && make env"
    return "absent", "none: everything runs on the CPU", ""
