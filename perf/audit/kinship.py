"""Kinship of all pairs beside plink2: the same numbers, and how long both take.

    python perf/audit/kinship.py DATA/chr15_10k/train.bcf DATA/chr22_1kg_phase1/kg_p1_chr22.bcf

plink2 is timed as a whole process that reads a PGEN and writes the triangle, the engine from a panel in memory to a matrix.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import numba
import numpy as np

from engine.files.plink import write_pgen
from engine.genomics.panel import genotypes_from_panel, read_panel
from engine.genomics.relatedness import genotypes_of_panel, kinship


def main() -> None:
    """Print the largest difference, medians and ratio for each panel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("panels", type=Path, nargs="+")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    threads = numba.get_num_threads()
    for path in given.panels:
        panel = read_panel(path)
        kinship(genotypes_of_panel(panel.select(samples=slice(0, 40))))  # compiled
        ours, theirs = [], []
        with tempfile.TemporaryDirectory() as folder:
            write_pgen(Path(folder) / "x.pgen", genotypes_from_panel(panel))
            command = [
                "plink2",
                "--pfile",
                "x",
                "--make-king",
                "triangle",
                "bin4",
                "--threads",
                str(threads),
                "--out",
                "o",
            ]
            for _ in range(given.repeats):
                begun = time.perf_counter()
                made = kinship(genotypes_of_panel(panel))
                ours.append(time.perf_counter() - begun)
                begun = time.perf_counter()
                subprocess.run(command, cwd=folder, capture_output=True, check=True)
                theirs.append(time.perf_counter() - begun)
            triangle = np.fromfile(Path(folder) / "o.king.bin", dtype=np.float32)
        i, j = np.tril_indices(panel.n_samples, -1)
        middle, beside = float(np.median(ours)), float(np.median(theirs))
        print(
            f"{path.name}: {len(triangle)} pairs, largest difference {np.nanmax(abs(made[i, j] - triangle)):.1e}; "
            f"engine {middle:.2f} s ({min(ours):.2f}-{max(ours):.2f}), plink2 {beside:.2f} s "
            f"({min(theirs):.2f}-{max(theirs):.2f}), ratio {beside / middle:.1f}, {threads} threads, n = {given.repeats}"
        )


if __name__ == "__main__":
    main()
