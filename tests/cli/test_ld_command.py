"""`engine ld` at the shell: what its options ask for, on real genotypes, some of them missing or unphased."""

from __future__ import annotations

import numpy as np
import pytest

from engine.genomics.panel import read_panel
from engine.kernels import ld


@pytest.fixture
def odd(real_data):
    return real_data / "genomics" / "odd"


def test_missing_and_unphased_genotypes(odd, good, tmp_path):
    panel = read_panel(odd / "chr20_scaffold_missing.bcf")
    assert panel.missing_lw is not None
    near = ("--unphased", "--window-kb", 200, "--min-maf", 0.05)
    said = good("ld", odd / "chr20_scaffold_missing.bcf", "--out", tmp_path / "pairs.tsv", *near)
    lines = (tmp_path / "pairs.tsv").read_text().splitlines()
    assert said["pairs_written"] == len(lines) - 1 > 10
    _, a, _, b, _, r2 = lines[1].split("\t")
    i, j = (int(np.flatnonzero(panel.sites.position_bp == int(p))[0]) for p in (a, b))
    cell = ld.r2_pairs(panel.bits_lw, panel.n_haplotypes, [i], [j], missing_lw=panel.missing_lw, unphased=True)[0]
    assert float(r2) == pytest.approx(float(cell), rel=1e-5)
    options = ("--unphased", "--measure", "r", "--window-sites", 20, "--min-maf", 0.05)
    said = good("ld", odd / "chr20_unphased.bcf", "--out", tmp_path / "r.tsv", *options)
    values = [float(line.split("\t")[5]) for line in (tmp_path / "r.tsv").read_text().splitlines()[1:]]
    assert said["pairs_written"] == len(values)
    assert min(values) < -0.2
    assert max(values) > 0.9


def test_other_results(odd, good, tmp_path):
    panel = odd / "chr20_unphased.bcf"
    said = good(
        "ld", panel, "--unphased", "--out", tmp_path / "kept.tsv", "--prune", 0.2, "--window-sites", 50, "--step", 5
    )
    assert said["kept"] == len((tmp_path / "kept.tsv").read_text().splitlines()) - 1 < said["sites"]
    assert good("ld", panel, "--unphased", "--out", tmp_path / "blocks.tsv", "--blocks")["blocks"] > 0
    said = good("ld", panel, "--unphased", "--out", tmp_path / "scores.tsv", "--scores", "--window-kb", 100)
    assert said["mean_score"] > 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--measure", "D"), "d_prime"),
        (("--scores", "--blocks"), "one result at a time"),
        (("--window-cm", 1), "--map"),
        ((), "nowhere.bcf"),
    ],
)
def test_bad_use_is_told(engine, tmp_path, options, said):
    done = engine("ld", "nowhere.bcf", "--out", "x.tsv", *options, cwd=tmp_path)
    assert done.code == 2
    assert said in done.errors
    assert list(tmp_path.iterdir()) == []
