"""engine: learns from real 3D scans and phased genotypes, makes synthetic ones, and audits them before release.

The package is laid out in floors; imports point down only (tests/test_structure.py):

    floor 5  cli, __main__, demo         parse, load, call one function, print
    floor 4  cohort, release             people over time; what leaves the building
    floor 3  imaging, genomics           models of scans; models of haplotypes
    floor 2  files, training, audit      formats; what both training loops call; modality-blind statistics
    floor 1  kernels                     arrays in, arrays out
    floor 0  errors, devices, seeding, provenance, atomic, compiled

Nothing heavy is imported here: `import engine` is instant, and each room is imported by the caller that needs it.
"""

from pathlib import Path as _Path

from engine.compiled import keep_by_source as _keep_by_source

__version__ = "0.1.0"
_keep_by_source(_Path(__file__).parent)  # before any room imports Numba
