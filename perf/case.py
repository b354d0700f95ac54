"""What a bench file hands over: a Case is one piece of work at one size, a Peer is other software doing the same work.

A bench file defines `cases() -> list[Case]` and, where a scaling law is meaningful, `curves() -> dict[str, list[Case]]`:
cases that differ in one entry of `size`. Both must be cheap to call (make inputs in `prepare`), and deterministic.
How and how often a case is run, and what is kept of it, is left to perf.measure and perf.record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timed:
    """Returned by a peer that knows better than the clock around it what its work cost: `seconds` replaces the reading.

    `seconds` is CPU seconds for a case of one thread and wall seconds for more. `note` says how it was taken
    ("whole process less the same process with --freq") and goes into the record. `peak_bytes` replaces the reading of
    this process's memory, for work that was done by another; 0: not known.
    """

    seconds: float
    result: Any = None
    note: str = ""
    peak_bytes: int = 0


@dataclass(frozen=True)
class Peer:
    """Other software that does the same work.

    Attributes:
        name: as in "plink2" or "faiss.IndexBinaryFlat"; unique within the case.
        run: inputs -> result, or Timed(seconds, result). Timed; a child process is counted by its CPU time.
        prepare: the case's inputs -> this peer's inputs (other layout, files on disk); not timed. None: the case's own.
        same: (ours, theirs) -> None; raises AssertionError when the two results differ. None: not compared.
        goal: wanted ratio, time of the peer / time of ours. None: no goal.
        missing: why this peer cannot be had here, or None when it can. A missing peer is a row with that reason.
        version: version of the peer; None: asked of the package or program that `name` begins with (perf.peers.version).
    """

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[Any], Any] | None = None
    same: Callable[[Any, Any], None] | None = None
    goal: float | None = None
    missing: Callable[[], str | None] | None = None
    version: Callable[[], str] | None = None


@dataclass(frozen=True)
class Case:
    """One piece of work at one size.

    Attributes:
        name: room and work, "ld.matrix_phased"; with `size` it identifies the case through all history.
        size: what makes it large, {"sites": 10000, "haplotypes": 5008}.
        work, unit: what is done once, 5e7 "pairs"; the rate of the record is work / seconds.
        prepare: makes the inputs; not timed, deterministic. The same inputs serve every repetition: `run` must not
            change them. The working directory is scratch: files may be left in it.
        run: inputs -> result. Timed: CPU time of this process and its children for one thread, wall time for more.
        peers: other software doing the same.
        floor_bytes: fewest bytes that must pass through memory, read plus written.
        floor_ops, limit: fewest operations, and the measured limit of the machine they are held against: "popcount"
            (and or xor, popcount and add of one 64-bit word), "f32_fma", "int8_unit" (multiply-adds), "copy" (bytes).
            The limits are those of one thread times `threads`.
        threads: threads that ours and the peers may use.
        repeats: alternating timed runs of ours and of each peer.
        quick: part of `make perf`; False: only with --all.
    """

    name: str
    size: dict[str, int]
    work: float
    unit: str
    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    peers: tuple[Peer, ...] = ()
    floor_bytes: float = 0
    floor_ops: float = 0
    limit: str = ""
    threads: int = 1
    repeats: int = 5
    quick: bool = True

    @property
    def key(self) -> str:
        """Identity through history: "ld.matrix_phased[haplotypes=5008,sites=10000]", with "@2" for two threads."""
        size = ",".join(f"{name}={value}" for name, value in sorted(self.size.items()))
        return f"{self.name}[{size}]" + (f"@{self.threads}" if self.threads != 1 else "")
