"""What every test shares: where the real data lies, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of public real data, beside the checkout or at $ENGINE_DATA; the test is skipped where it is absent."""
    folder = Path(os.environ.get("ENGINE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: set ENGINE_DATA (looked at {folder})")
    return folder
