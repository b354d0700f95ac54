"""`Finding`: the one shape in which every metric of the engine is returned, so that reports, gates and benchmark
records need no branch on modality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

Direction = Literal["higher", "lower", "target", "none"]
Verdict = Literal["pass", "fail", "void", "none"]


@dataclass(frozen=True)
class Finding:
    """One measured quantity with its uncertainty and what was decided from it.

    Attributes:
        name: machine name, snake_case, e.g. "ld_r" or "copy_share".
        value: the estimate; NaN where it could not be computed (then `verdict` is "void" and `note` says why).
        interval: (low, high), 95 % unless `note` says otherwise; None where no interval was computed.
        n: number of independent units (people, haplotypes, volumes) behind the value; a dict where sides differ.
        threshold: the number the verdict compares with; None for a description without a gate.
        calibrated_on: what gave the threshold or the floor, e.g. "holdout vs holdout, matched pools".
        direction: which way is better: "higher", "lower", "target" (near `threshold`) or "none".
        verdict: "pass", "fail", "void" (could not be judged) or "none" (no gate on it).
        unit: "nats", "bp", "share", "" ...
        floor: the same metric real against real, where measured.
        note: one line for people.
        detail: further JSON-ready values (never data of a person).
    """

    name: str
    value: float
    interval: tuple[float, float] | None = None
    n: int | dict[str, int] = 0
    threshold: float | None = None
    calibrated_on: str = ""
    direction: Direction = "none"
    verdict: Verdict = "none"
    unit: str = ""
    floor: float | None = None
    note: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain dict; NaN and infinite numbers become None, because JSON has neither."""

        def number(x: float | None) -> float | None:
            return None if x is None or not math.isfinite(x) else float(x)

        return {
            "name": self.name,
            "value": number(self.value),
            "interval": None if self.interval is None else [number(x) for x in self.interval],
            "n": self.n,
            "threshold": number(self.threshold),
            "calibrated_on": self.calibrated_on,
            "direction": self.direction,
            "verdict": self.verdict,
            "unit": self.unit,
            "floor": number(self.floor),
            "note": self.note,
            "detail": self.detail,
        }
