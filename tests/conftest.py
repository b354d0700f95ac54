"""What every test shares: where the real data lies, and small inputs as files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:  # before anything imports PyTorch or NumPy: workers with all processors each wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of public real data, beside the checkout or at $ENGINE_DATA; the test is skipped where it is absent."""
    folder = Path(os.environ.get("ENGINE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: set ENGINE_DATA (looked at {folder})")
    return folder


@pytest.fixture(scope="session")
def write_noise() -> Callable[..., Path]:
    """write_noise(folder, n, side=8): n scans of noise, one of each person, and their table, which is returned."""
    import numpy as np

    from engine.imaging.volume import Volume, write_volume

    def write(folder: Path, n: int, side: int = 8) -> Path:
        rows = ["image,subject,age"]
        for k in range(n):
            array = np.random.default_rng(k).random((1, side, side, side), dtype=np.float32) * 100
            write_volume(Volume(array, np.diag([2.0, 2.0, 2.0, 1.0]), "MR", "arbitrary", {}), folder / f"{k}.nii.gz")
            rows.append(f"{k}.nii.gz,P{k},{20 + k}")
        (folder / "table.csv").write_text("\n".join(rows) + "\n")
        return folder / "table.csv"

    return write


@pytest.fixture(scope="session")
def write_mosaics() -> Callable[[Path, int, int], Path]:
    """write_mosaics(folder, people, donors): panel.bcf of two groups, mosaics of donors; samples.tsv, map.txt; the folder."""
    import numpy as np

    from engine.genomics.panel import panel_from_alleles, write_panel, write_samples

    def write(folder: Path, people: int, donors: int) -> Path:
        rng, sites = np.random.default_rng(2), np.arange(120)
        donor_nl = (rng.random((donors, 120)) < 0.4).astype(np.uint8)
        alleles = donor_nl[np.repeat(rng.integers(0, donors, (2 * people, 12)), 10, axis=1), sites]
        panel = panel_from_alleles(
            alleles.T, 1_000 + 3_000 * sites, "21", [f"p{i}" for i in range(people)],
            group=["A"] * (people // 2) + ["B"] * (people // 2), contig_length={"21": 48_129_895}, assembly="GRCh37",
        )  # fmt: skip
        write_panel(panel, folder / "panel.bcf")
        write_samples(panel, folder / "samples.tsv")
        lines = ["pos chr cM", *(f"{bp} 21 {bp * 1e-6:.6f}" for bp in range(1, 400_002, 50_000))]
        (folder / "map.txt").write_text("\n".join(lines) + "\n")
        return folder

    return write
