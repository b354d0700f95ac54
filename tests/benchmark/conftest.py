"""Tiny tracks: a simulated panel of 150 people, and 60 blurred blocks as scans; each a folder and a track file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from engine.benchmark.sides import Sides, prepare
from engine.benchmark.tracks import Track, load_track
from engine.genomics.panel import panel_from_alleles, write_panel, write_samples
from engine.imaging.volume import Volume, write_volume

TINY_LDM = {"channels": [8, 8], "norm_groups": 4, "head_channels": 4, "sampling_steps": 2, "discriminator_layers": 1}
TINY_ENGINE = {
    "name": "tiny",
    "autoencoder": {"batch_size": 2, "widths": [8, 16], "latent_channels": 2},
    "flow": {"batch_size": 2, "widths": [8, 16], "attention_levels": [1], "embedding_width": 16, "views": 1},
    "sampling": {"steps": 2},
    "training": {"precision": "fp32"},
}
COLUMNS = ["ld_r", "pca_w1", "aats_train", "exact_copies"]


def _write_track(folder: Path, **values: object) -> Path:
    path = folder / f"{values['name']}.yaml"
    path.write_text(yaml.safe_dump({"about": "tiny", "obtain": "made by the test", "licence": "none", **values}))
    return path


@pytest.fixture(scope="session")
def write_track():
    """Write a track file with these values into a folder and return its path."""
    return _write_track


def tiny_panel(people: int = 150, sites: int = 400):
    """Mosaics of 14 ancestors with a little noise: linked, no two people alike."""
    rng = np.random.default_rng(2)
    frequency_l = rng.beta(0.6, 0.8, sites)
    ancestor_kl = rng.random((14, sites)) < frequency_l
    alleles_nl = np.empty((2 * people, sites), dtype=bool)
    for n in range(2 * people):
        switch_l = np.cumsum(rng.random(sites) < 0.01)
        donor = rng.integers(0, 14, switch_l[-1] + 1)
        alleles_nl[n] = ancestor_kl[donor[switch_l], np.arange(sites)] ^ (rng.random(sites) < 0.005)
    return panel_from_alleles(
        alleles_nl.T.astype(np.uint8), np.arange(1, sites + 1) * 2000, "22", [f"P{k:03d}" for k in range(people)],
        group=["A" if k % 3 else "B" for k in range(people)], contig_length={"22": 2000 * sites + 1},
    )  # fmt: skip


@pytest.fixture(scope="session")
def genotype_track(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(track file, data folder)."""
    folder = tmp_path_factory.mktemp("genotypes")
    panel = tiny_panel()
    write_panel(panel, folder / "panel.bcf")
    write_samples(panel, folder / "samples.tsv")
    path = _write_track(
        folder, name="tiny", files=[{"path": "panel.bcf"}, {"path": "samples.tsv"}],
        genotypes={"panel": "panel.bcf", "samples": "samples.tsv"}, split={"seed": 1, "test": 0.3, "fresh": 0.2},
        samples=28, columns=COLUMNS, entrants={"markov": {}}, budget_seconds=100,
    )  # fmt: skip
    return path, folder


@pytest.fixture(scope="session")
def genotype_sides(genotype_track: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Track, Sides]:
    track = load_track(genotype_track[0])
    return track, prepare(track, genotype_track[1], tmp_path_factory.mktemp("sides") / "split")


@pytest.fixture(scope="session")
def scan_track(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """60 people with a scan each, 16 x 16 x 16: a ball of random place and size in noise."""
    folder = tmp_path_factory.mktemp("scans")
    (folder / "images").mkdir()
    rng = np.random.default_rng(3)
    grid = np.indices((16, 16, 16)) - 7.5
    lines = ["image,subject,label"]
    for k in range(60):
        at, size = rng.uniform(-2.5, 2.5, 3), rng.uniform(3, 5)
        ball = np.sqrt(((grid - at[:, None, None, None]) ** 2).sum(axis=0)) < size
        array = (400 * ball + rng.normal(100, 20, ball.shape)).clip(0).astype(np.float32)
        write_volume(Volume(array[None], np.diag([2.0, 2, 2, 1]), "MR", "arbitrary", {}), folder / f"images/{k}.nii.gz")
        lines.append(f"images/{k}.nii.gz,S{k},nowhere.nii.gz")
    (folder / "volumes.csv").write_text("\n".join(lines) + "\n")
    path = _write_track(
        folder, name="tinyscans", files=[{"path": "volumes.csv"}, {"path": "images"}],
        scans={"table": "volumes.csv", "size": [16, 16, 16], "spacing_mm": [2.0, 2.0, 2.0]},
        split={"seed": 1, "test": 0.35, "fresh": 0.25}, samples=12, columns=["frechet_shape", "pair_ssim"], budget_seconds=3,
        entrants={"monai_ldm": {"settings": TINY_LDM}, "engine": {"settings": TINY_ENGINE}},
    )  # fmt: skip
    return path, folder


@pytest.fixture(scope="session")
def scan_sides(scan_track: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Track, Sides]:
    track = load_track(scan_track[0])
    return track, prepare(track, scan_track[1], tmp_path_factory.mktemp("sides") / "split")
