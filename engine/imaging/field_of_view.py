"""The field-of-view guard: which size and spacing a model may be asked for.

A network generates whatever size it is asked for, and outside what it was trained on the anatomy it makes is too large,
too small or repeated. So a request must lie within the trained sizes, spacings and extents (size x spacing) on every
axis; 1 % of tolerance on millimetres. `--force` insists, and the caller then knows the range.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from engine.errors import UsageError
from engine.imaging.config import ImagingConfig

_TOLERANCE = 0.01


def trained_fields(grids: Sequence[tuple[Sequence[int], np.ndarray]]) -> list[dict[str, Any]]:
    """What a checkpoint keeps per trained grid: its size and the range of its spacing (b, 3) in mm."""
    return [
        {
            "size": [int(n) for n in size],
            "spacing_mm_low": spacing_mm.min(axis=0).tolist(),
            "spacing_mm_high": spacing_mm.max(axis=0).tolist(),
        }
        for size, spacing_mm in grids
    ]


def check_field_of_view(
    config: ImagingConfig,
    facts: Mapping[str, Any],
    size: Sequence[int] | None,
    spacing_mm: Sequence[float] | None,
    *,
    force: bool = False,
) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """Size and spacing to generate, defaults filled in.

    Args:
        facts: of the checkpoint; one from before there were several grids holds only the range of spacing.

    Raises:
        UsageError: no such grid, a size that the autoencoder cannot make, or outside the trained range and not `force`;
            the message states the range.
    """
    factor = config.autoencoder.factor
    wanted = tuple(int(n) for n in (size if size is not None else config.data.size))
    spacing = tuple(float(s) for s in (spacing_mm if spacing_mm is not None else facts["spacing_mm"]))
    positive = all(math.isfinite(mm) and mm > 0 for mm in spacing) and min(wanted) >= 1
    if len(wanted) != 3 or len(spacing) != 3 or not positive:
        raise UsageError("three positive numbers", f"size {wanted}, spacing {spacing} mm", "field of view")
    if any(n % factor for n in wanted):
        raise UsageError(f"a size in multiples of {factor}", f"{wanted}", "field of view")
    old = {"size": config.data.size, **{k: facts[k] for k in ("spacing_mm_low", "spacing_mm_high")}}
    fields = facts.get("fields") or [old]
    sizes = np.array([f["size"] for f in fields])
    low, high = np.array([f["spacing_mm_low"] for f in fields]), np.array([f["spacing_mm_high"] for f in fields])
    extents = (sizes * low).min(axis=0), (sizes * high).max(axis=0)
    n, mm = np.array(wanted), np.array(spacing)
    inside = (n >= sizes.min(axis=0)) & (n <= sizes.max(axis=0))
    for value, least, most in ((mm, low.min(axis=0), high.max(axis=0)), (n * mm, *extents)):
        inside &= (value >= least * (1 - _TOLERANCE)) & (value <= most * (1 + _TOLERANCE))
    if not inside.all() and not force:
        seen = (
            f"size {_range(sizes.min(axis=0), sizes.max(axis=0))}, spacing {_range(low.min(axis=0), high.max(axis=0))} mm, "
            f"extent {_range(*extents)} mm"
        )
        raise UsageError(
            f"a field of view within what was trained ({seen})",
            f"size {_range(n, n)}, spacing {_range(mm, mm)} mm, extent {_range(n * mm, n * mm)} mm",
            "field of view",
            "the trained one, or --force",
        )
    return (wanted[0], wanted[1], wanted[2]), (spacing[0], spacing[1], spacing[2])


def _range(low: Iterable[float], high: Iterable[float]) -> str:
    return " x ".join(f"{a:.4g}" if abs(a - b) < 1e-6 * abs(b) else f"{a:.4g}-{b:.4g}" for a, b in zip(low, high))
