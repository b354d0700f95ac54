"""Memory of a large output does not grow with the people: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.genomics import commands
from engine.genomics.panel import panel_from_alleles, write_panel

SITES, PEOPLE, FEW = 12_000, 80_000, 100
MIB = 1 << 20
WHOLE = SITES * 2 * PEOPLE // 8  # bytes of all alleles, packed: 229 MiB
# one block of alleles, what is laid out of it for the file, the stretch of paths at hand, and about 1.3 KiB for each person
BOUND = 128 * MIB

CHILD = """
import json, sys
from pathlib import Path
from engine.files import vcf_zarr
from engine.genomics import commands, held_paths, stream

# so that what is held at one time is small beside all alleles
stream._BLOCK_BYTES, vcf_zarr.SAMPLES, held_paths.STRETCH = 4 << 20, 2_000, 2_000

def line(name):
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(each for each in text.splitlines() if each.startswith(name)).split()[1])

run, out, few, many = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
def most(people, name):
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark from here on
    commands.sample_command(run, people, seed=1, out=out.with_name(name + out.name))
    return line("VmHWM:")

most(few, "first")  # everything is loaded and compiled
# beside a run of few people, not beside what is resident at rest: systems take idle pages away, and both runs fetch them back
of_few = most(few, "few")
print(json.dumps({"before": of_few, "grown": most(many, "") - of_few}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(1)
    allele_ln = (rng.random((SITES, 60)) < rng.beta(0.2, 1.0, (SITES, 1))).astype(np.uint8)
    ids = [f"r{k}" for k in range(30)]
    panel = panel_from_alleles(allele_ln, 100 + 5 * np.arange(SITES), "21", ids, contig_length={"21": 48_129_895})
    write_panel(panel, folder / "p.bcf")
    settings = ["sampler=independent", "ne=2000", "per_group=false"]
    commands.fit_command(folder / "p.bcf", overrides=settings, out=folder / "run")
    return folder / "run"


@pytest.mark.parametrize("suffix", [".pgen", ".vcz"])
def test_memory_does_not_grow_with_the_people(tmp_path, run, suffix):
    assert WHOLE > 1.7 * BOUND  # or the bound would say nothing
    out = tmp_path / f"x{suffix}"
    command = [sys.executable, "-c", CHILD, str(run), str(out), str(FEW), str(PEOPLE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["grown"] < BOUND, measured
    assert measured["before"] > 50 * MIB  # it was measured at all
    assert Path(out).exists()
