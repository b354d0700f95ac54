"""What the kernel tests share."""

from __future__ import annotations

import numpy as np
import pytest

from engine.kernels import bits
from engine.kernels.bits import amx


@pytest.fixture(scope="session", autouse=True)
def _compiled_before_np_empty_is_replaced():
    """Tests replace np.empty by one that poisons its memory. Numba must not compile while that lasts: it does not know the
    replacement, and were it the first compilation of the process, it would never know the true np.empty either.
    """
    bits_lw = bits.pack(np.ones((3, 5), dtype=np.uint8))
    bits.unpack(bits_lw, 5)
    bits.transpose(bits_lw, 5)
    bits.popcount_rows(bits_lw)


@pytest.fixture(
    params=[True, False] if amx.granted() else [False], ids=lambda on: "on the matrix unit" if on else "in vectors"
)
def unit(request, monkeypatch):
    """Both ways where the processor has a matrix unit, one where it has none."""
    if not request.param:
        monkeypatch.setattr(amx, "granted", lambda: False)
    return request.param
