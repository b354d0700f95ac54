"""Entrants and controls of scans on tiny volumes, and the score of what they leave."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from engine.benchmark import entrants
from engine.benchmark.entrants import enter
from engine.benchmark.entry import read_entry
from engine.benchmark.scores import Score, score
from engine.benchmark.sides import prepare
from engine.errors import InputError
from engine.imaging.commands import read_folder
from engine.imaging.volume import Volume, read_volume, write_volume
from engine.training import clock

TRAINED = ("engine", "monai_ldm")
BUDGET_SECONDS = 6.0
LOOK_SECONDS = 0.05  # that each look at the processor's clock takes below, so that no test depends on the machine


def count_looks(patched: pytest.MonkeyPatch) -> None:
    looks = itertools.count()
    for module in (clock, entrants):
        patched.setattr(module, "cpu_seconds", lambda: LOOK_SECONDS * next(looks))


@pytest.fixture(scope="module")
def entered(scan_sides, tmp_path_factory) -> Path:
    track, sides = scan_sides
    out = tmp_path_factory.mktemp("entries")
    with pytest.MonkeyPatch.context() as patched:
        count_looks(patched)
        for name in (*TRAINED, "ceiling", "copycat", "marginals"):
            enter(track, name, sides, out / name, seed=0, budget_seconds=BUDGET_SECONDS)
    return out


def test_entries_of_scans(entered: Path, scan_sides) -> None:
    for name in (*TRAINED, "ceiling", "copycat", "marginals"):
        read = read_entry(entered / name, "tinyscans")
        volumes, people = read_folder(read.samples)
        assert len(volumes) == len(set(people)) == 12
        assert {v.shape_dhw for v in volumes} == {(16, 16, 16)}
        assert all(v.array_cdhw.min() >= 0 and v.array_cdhw.max() <= 1000 for v in volumes)
    assert "steps of batch 2" in read_entry(entered / "monai_ldm").entry.recipe


@pytest.mark.parametrize("name", TRAINED)
def test_trained_entrants_end_by_the_processor_and_say_how_many_steps_that_was(entered: Path, name: str) -> None:
    """The clock is looked at before each step and by a few besides, so that both stages have many."""
    entry = read_entry(entered / name).entry
    assert entry.budget_of == "cpu"
    assert entry.spent_seconds == entry.training_cpu_seconds
    assert 0.9 < entry.training_cpu_seconds / BUDGET_SECONDS < 1.2
    first, second = (int(text) for text in re.search(r"(\d+) and (\d+) steps", entry.recipe).groups())
    assert min(first, second) > 10


def test_marginals_are_training_values_without_structure(entered: Path, scan_sides) -> None:
    from engine.benchmark.sides import on_grid

    track, sides = scan_sides
    train = np.stack([v.array_cdhw for v in on_grid(read_folder(sides.side("train"))[0], track)])
    made = np.stack([v.array_cdhw for v in read_folder(entered / "marginals" / "samples")[0]])
    assert all(np.isclose(train, one, atol=0.02).any(axis=0).all() for one in made)
    neighbours = lambda x: np.corrcoef(x[..., 7].ravel(), x[..., 8].ravel())[0, 1]  # noqa: E731
    assert neighbours(made - train.mean(axis=0)) < 0.2 < neighbours(train - train.mean(axis=0))


def rank(scan_sides, entered: Path, names: tuple[str, ...]) -> dict[str, Score]:
    track, sides = scan_sides
    made = {name: score(track, sides, entered / name / "samples") for name in names}
    by = {name: {f["name"]: f["value"] for f in [*s.findings, *s.audit["findings"]]} for name, s in made.items()}
    assert by["copycat"]["copy_share_at_5_percent"] > 0.9
    assert by["ceiling"]["copy_share_at_5_percent"] < 0.4
    assert by["copycat"]["frechet_shape"] < by["ceiling"]["frechet_shape"] + 2
    assert made["ceiling"].n == {"train": 24, "test": 21, "fresh": 15, "samples": 12}
    assert len({s.extractor["sha256"] for s in made.values() if s.extractor}) == 1  # one extractor, whatever is judged
    return made


def test_copycat_and_ceiling(entered: Path, scan_sides, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what registers pairs of scans and turns copies: most of an audit's time, with tests of their own."""
    from engine.benchmark import scores
    from engine.imaging import pools

    monkeypatch.setattr(pools, "confirmation_judge", lambda *a, **k: lambda name, rows, scores: [])
    monkeypatch.setattr(pools, "transforms", lambda volume: {})
    scores._real_scans.cache_clear()
    rank(scan_sides, entered, ("ceiling", "copycat"))
    scores._real_scans.cache_clear()


@pytest.mark.slow
def test_scores_rank_the_controls(entered: Path, scan_sides) -> None:
    made = rank(scan_sides, entered, ("ceiling", "copycat", "marginals"))
    sharpness = {
        name: next(f["value"] for f in s.findings if f["name"] == "sharpness_ratio") for name, s in made.items()
    }
    assert sharpness["marginals"] > 1.15 > sharpness["ceiling"] > 0.85
    assert made["copycat"].audit["verdict"] == "fail"


def test_unusable_scans_are_refused(entered: Path, scan_sides, tmp_path: Path) -> None:
    import shutil

    track, sides = scan_sides
    shutil.copytree(entered / "ceiling" / "samples", tmp_path / "samples")
    one = sorted((tmp_path / "samples").glob("*.nii.gz"))[0]
    volume = read_volume(one)
    from dataclasses import replace

    write_volume(replace(volume, affine=np.diag([3.0, 2, 2, 1])), one)
    with pytest.raises(InputError, match="voxels of"):
        score(track, sides, tmp_path / "samples")
    write_volume(replace(volume, array_cdhw=volume.array_cdhw[:, :12]), one)
    with pytest.raises(InputError, match="voxels of"):
        score(track, sides, tmp_path / "samples")
    one.unlink()
    with pytest.raises(InputError):
        score(track, sides, tmp_path / "samples")


def test_sizes_that_do_not_halve_evenly_are_padded_and_cut_again(scan_sides) -> None:
    from engine.benchmark.monai_ldm import _padding, train_and_sample
    from engine.imaging.config import DataConfig
    from engine.imaging.volume import Volume

    assert _padding((32, 40, 31), 16) == [(0, 0), (4, 4), (0, 1)]
    rng = np.random.default_rng(0)
    volumes = [
        Volume(rng.uniform(0, 900, (1, 10, 16, 13)).astype(np.float32), np.eye(4), "MR", "arbitrary", {})
        for _ in range(3)
    ]
    grid = DataConfig.model_validate({"size": (10, 16, 13)})
    used, tiny = iter(np.linspace(0, 1, 8)), scan_sides[0].entrants["monai_ldm"].settings
    made, words = train_and_sample(volumes, grid, 2, seed=0, used=lambda: float(next(used, 1.0)), **tiny)
    assert {volume.shape_dhw for volume in made} == {(10, 16, 13)}
    assert "steps of batch 2" in words


def test_label_maps_are_modelled_as_such(scan_sides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Balls of 255 in nothing: an image of them would hold what lies between."""
    track, _ = scan_sides
    shapes = track.model_copy(update={"scans": track.scans.model_copy(update={"labels": [255]})})
    (tmp_path / "images").mkdir()
    grid, rows = np.indices((16, 16, 16)) - 7.5, ["image,subject"]
    for k in range(60):
        at = np.random.default_rng(k).uniform(-2.5, 2.5, (3, 1, 1, 1))
        ball = 255.0 * (np.sqrt(((grid - at) ** 2).sum(axis=0)) < 4)
        volume = Volume(ball[None].astype(np.float32), np.diag([2.0, 2, 2, 1]), "MR", "arbitrary", {})
        write_volume(volume, tmp_path / f"images/{k}.nii.gz")
        rows.append(f"images/{k}.nii.gz,S{k}")
    (tmp_path / "volumes.csv").write_text("\n".join(rows) + "\n")
    sides = prepare(shapes, tmp_path, tmp_path / "split")
    count_looks(monkeypatch)
    enter(shapes, "engine", sides, tmp_path / "entry", seed=0, budget_seconds=4)
    volumes, _ = read_folder(read_entry(tmp_path / "entry", "tinyscans").samples)
    values = np.stack([v.array_cdhw for v in volumes])
    assert set(np.unique(values)) == {0, 255}
    assert 0.01 < (values > 0).mean() < 0.2  # a ball of 4 voxels has 0.065
