"""`check`: may this VCF or BCF be used, in a process of its own with limits on time and memory.

One worker process serves many files; it is started at the first call, started again after a file that stops it, and ends
with this process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from engine.errors import EngineError

_SECONDS = 60.0  # for one file; a larger file is judged on what was read by then
_MEMORY = 6 << 30  # address space of the worker
_worker: subprocess.Popen[bytes] | None = None


def check(path: str | Path) -> tuple[str, str]:
    """Verdict "ok", "warn" or "reject" and the reason in one line. Never raises; at most about a minute and 6 GiB.

    "warn" is read, with remarks: missing or unphased genotypes, no samples, mixed ploidy, departures from the
    specification that do not change how genotypes are read.
    """
    global _worker
    try:
        if _worker is None or _worker.poll() is not None:
            _stop()
            _worker = _start()
        assert _worker.stdin is not None
        assert _worker.stdout is not None
        _worker.stdin.write(json.dumps(os.fspath(path)).encode() + b"\n")
        _worker.stdin.flush()
        answer = _read_line(_worker.stdout, time.monotonic() + _SECONDS + 30)
    except (OSError, ValueError) as fault:
        _stop()
        return "reject", f"{path}: could not be checked ({type(fault).__name__})"
    if answer is None:
        try:
            code = _worker.wait(timeout=1)
        except subprocess.TimeoutExpired:
            code = None
        _stop()
        reason = (
            f"reading took more than {_SECONDS + 30:.0f} s" if code is None else f"reading it ended the reader ({code})"
        )
        return "reject", f"{path}: {reason}"
    verdict, why = json.loads(answer)
    return verdict, why


def _start() -> subprocess.Popen[bytes]:
    # -P: neither the working folder nor a script's folder may stand in for a module the worker needs
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.append({root!r}); from engine.files.vcf_check import _serve; _serve()"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


@atexit.register
def _stop() -> None:
    global _worker
    if _worker is not None:
        _worker.kill()
        _worker.wait()
        for pipe in (_worker.stdin, _worker.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
    _worker = None


def _read_line(stream: IO[bytes], deadline: float) -> bytes | None:
    """One line before the deadline; None at its end or when the worker has gone."""
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        part = os.read(stream.fileno(), 1 << 16) if ready else b""
        if not part:
            return None
        line += part
    return line


def _serve() -> None:
    """The worker: a path per line in, a JSON pair per line out."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints does not mix with the answers
    for line in sys.stdin.buffer:
        out.write(json.dumps(_judge(Path(json.loads(line)))).encode() + b"\n")


def _judge(path: Path) -> tuple[str, str]:
    """The verdict, in this process."""
    from engine.files import vcf_cyvcf2, vcf_structure

    try:
        deadline = time.monotonic() + _SECONDS
        structure = vcf_structure.inspect(path, thorough=True, deadline=deadline)
        notes = list(structure.notes)
        ploidy = vcf_cyvcf2.Ploidy(len(structure.header.samples))
        phased, missing, no_alt = True, 0, 0
        complete = structure.complete
        for block in vcf_cyvcf2.blocks(path, structure):
            phased &= vcf_cyvcf2.is_phased(block)
            ploidy.see(block)
            missing += int((block.alleles_bsp == -1).sum())
            no_alt += block.alt.count(".")
            if time.monotonic() > deadline + 20:
                complete = False
                break
    except EngineError as fault:
        return "reject", str(fault)
    except MemoryError:
        return "reject", f"{path}: needs more than {_MEMORY >> 30} GiB to check"
    except Exception as fault:
        return "reject", f"{path}: {type(fault).__name__}: {' '.join(str(fault).split())}"
    if not structure.header.samples:
        notes.append("no samples")
    elif structure.n_records == 0:
        notes.append("no records")
    if not phased:
        notes.append("unphased heterozygotes")
    if missing:
        notes.append(f"{missing} missing alleles")
    if no_alt:
        notes.append(f"{no_alt} records without an alternative allele")
    notes += ploidy.notes()
    if not complete:
        notes.append(f"only the first {structure.n_records} records were checked")
    if not notes:
        return "ok", ""
    more = f"; and {len(notes) - 6} more remarks" if len(notes) > 6 else ""
    return "warn", " ".join(("; ".join(notes[:6]) + more).split())
