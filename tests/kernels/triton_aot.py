"""Compiles Triton kernels for GPUs that are not here. A script, because Triton decides at import whether it interprets.

Reads a JSON list of jobs from standard input and writes a JSON list of results to standard output. A job is {"module",
"kernel", "signature": {argument: "*i32" | "i64" | ...}, "constexprs": {argument: value}, "num_warps", "arch"};
arguments are in the kernel's order. Pointers, and the integers named in "divisible", are taken as divisible by 16, as a
launch would find them. `arch` is 80 or 90 for NVIDIA, "gfx942" and the like for AMD. A result is {"kernel", "arch",
"assembly", "shared": bytes of shared memory} or {"kernel", "arch", "error"}.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def compile_jobs(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of `jobs`, from this script in a process of its own without the interpreter."""
    root = Path(__file__).resolve().parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(jobs), capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def typed(kind: str, *names: str) -> dict[str, str]:
    """Part of a job's signature: arguments of one kind; those of pointers end in _ptr."""
    return {f"{name}_ptr" if kind.startswith("*") else name: kind for name in names}


def _compile(job: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(job["module"]), job["kernel"])
    names = list(kernel.arg_names)
    given = job["signature"] | dict.fromkeys(job["constexprs"], "constexpr")
    assert set(given) == set(names), f"arguments of {job['kernel']} are {names}, given {sorted(given)}"
    signature = {name: given[name] for name in names}
    divisible = [name for name in names if signature[name].startswith("*") or name in job.get("divisible", ())]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, signature, constexprs=job["constexprs"], attrs=attributes)
    amd = isinstance(job["arch"], str)
    target = GPUTarget("hip", job["arch"], 64) if amd else GPUTarget("cuda", job["arch"], 32)
    options = {"num_warps": job.get("num_warps", 4)} | job.get("options", {})
    compiled = triton.compile(source, target=target, options=options)
    return {"assembly": compiled.asm["amdgcn" if amd else "ptx"], "shared": compiled.metadata.shared}


def main() -> None:
    results = []
    for job in json.load(sys.stdin):
        outcome = {"kernel": job["kernel"], "arch": job["arch"]}
        try:
            results.append(outcome | _compile(job))
        except Exception as error:
            results.append(outcome | {"error": f"{type(error).__name__}: {error}"[-2000:]})
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
