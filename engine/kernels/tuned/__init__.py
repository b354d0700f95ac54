"""Launch parameters of GPU kernels by card: what `python -m perf.gpu --tune` found on a card is a JSON file beside this one.

A kernel room keeps its defaults in a small dict and asks `launch` once per call. A card without a file runs with the defaults:
a tuned value changes how fast an answer comes, never the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_tried: dict[str, dict[str, int]] = {}  # what `override` puts before the files, for the length of a trial


def launch(kernel: str, defaults: dict[str, int], card: str) -> dict[str, int]:
    """`defaults` with what is known for this card.

    Args:
        kernel: room and kernel, "ld.r2".
        defaults: parameter -> value; a file may only name these.
        card: `torch.cuda.get_device_name(...)`; "" where there is no GPU (the interpreter).
    """
    known = (_file(slug(card)).get(kernel, {}) if card else {}) | _tried.get(kernel, {})
    return defaults | {name: int(value) for name, value in known.items() if name in defaults}


@contextmanager
def override(kernels: dict[str, dict[str, int]]) -> Iterator[None]:
    """Within the block these parameters go before those of the card's file: how a tuner tries them."""
    _tried.update(kernels)
    try:
        yield
    finally:
        for name in kernels:
            _tried.pop(name, None)


def slug(card: str) -> str:
    """File name of a card: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


@cache
def _file(name: str) -> dict[str, dict[str, int]]:
    path = Path(__file__).parent / f"{name}.json"
    return json.loads(path.read_text())["kernels"] if path.is_file() else {}


forget = _file.cache_clear  # after a file was written
