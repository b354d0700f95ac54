"""Sides of a track: nobody on two of them, whatever the order of people; hashes pinned and refused; every source read."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.benchmark.sides import assign, check_files, load_sides, panel_sha256, prepare
from engine.benchmark.tracks import DataFile, load_track, names
from engine.errors import InputError, UsageError
from engine.genomics.panel import read_panel, write_panel
from engine.genomics.relatedness import families
from engine.genomics.split import held_out


def test_standard_tracks_load_and_name_their_columns_and_entrants() -> None:
    from engine.benchmark.entrants import GENOTYPE_ENTRANTS, SCAN_ENTRANTS

    assert {"chr15_10k", "chr22", "hippocampus", "adrenal", "demo_genotypes", "demo_scans"} <= set(names())
    for name in names():
        track = load_track(name)
        assert track.name == name
        assert set(track.entrants) <= set(GENOTYPE_ENTRANTS if track.genotypes else SCAN_ENTRANTS)
        pinned = [file.sha256 for file in track.files]
        assert all(pinned) or name.startswith("demo")


def test_pinned_hashes_are_those_of_the_data(real_data: Path) -> None:
    for name in ("chr15_10k", "chr22", "hippocampus", "adrenal"):
        assert len(check_files(load_track(name), real_data)) >= 1


def test_assignment(genotype_sides) -> None:
    track, _ = genotype_sides
    people, groups = [f"P{k}" for k in range(100)], ["A"] * 60 + ["B"] * 40
    side_of = assign(people, groups, track)
    counts = Counter((group, side_of[name]) for name, group in zip(people, groups))
    assert counts == {
        ("A", "test"): 18, ("A", "fresh"): 12, ("A", "train"): 30, ("B", "test"): 12, ("B", "fresh"): 8,
        ("B", "train"): 20,
    }  # fmt: skip
    assert assign(people[::-1], groups[::-1], track) == side_of


def test_panels_of_the_sides(genotype_sides, genotype_track) -> None:
    track, sides = genotype_sides
    panels = {side: read_panel(sides.side(side)) for side in ("train", "test", "fresh")}
    ids = [set(panel.samples.ids) for panel in panels.values()]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 150
    assert panel_sha256(panels["train"]) == sides.train_sha256
    assert sides.units == {side: panel.n_haplotypes for side, panel in panels.items()}
    changed = panels["train"].bits_lw.copy()
    changed[3, 0] ^= np.uint64(1)
    assert panel_sha256(replace(panels["train"], bits_lw=changed)) != sides.train_sha256
    assert load_sides(sides.folder, track) == sides


def test_scans_of_the_sides(scan_sides, scan_track) -> None:
    _, sides = scan_sides
    people = []
    for side in ("train", "test", "fresh"):
        with (sides.side(side) / "volumes.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert all((sides.side(side) / row["image"]).is_file() for row in rows)
        assert "label" not in rows[0]
        people += [row["subject"] for row in rows]
    assert sorted(people) == sorted(f"S{k}" for k in range(60))
    assert sides.people == {"train": 24, "test": 21, "fresh": 15}


def test_one_person_under_two_ids_lies_on_one_side(genotype_track, tmp_path: Path, write_track) -> None:
    """Twenty people a second time under other ids: each pair has to come out on one side, in every split."""
    import yaml

    panel = read_panel(genotype_track[1] / "panel.bcf", samples_tsv=genotype_track[1] / "samples.tsv")
    order = np.concatenate([np.arange(150), np.arange(20)])
    doubled = panel.select(samples=order)
    ids = [*panel.samples.ids, *(f"TWIN{k}" for k in range(20))]
    doubled = replace(doubled, samples=replace(doubled.samples, ids=ids))
    head = families(doubled)
    assert all(head[f"TWIN{k}"] == head[f"P{k:03d}"] == f"P{k:03d}" for k in range(20))
    assert len(set(head.values())) == 150
    write_panel(doubled, tmp_path / "panel.bcf")
    values = yaml.safe_load(genotype_track[0].read_text()) | {"files": [{"path": "panel.bcf"}], "name": "twins"}
    values["genotypes"] = {"panel": "panel.bcf"}
    for seed in range(3):
        chosen = dict(zip(ids, held_out(doubled, 0.3, seed).tolist(), strict=True))
        assert all(chosen[f"TWIN{k}"] == chosen[f"P{k:03d}"] for k in range(20))
        assert 30 < sum(chosen.values()) < 80
    sides = prepare(load_track(write_track(tmp_path, **values)), tmp_path, tmp_path / "split")
    lies = {name: side for side in ("train", "test", "fresh") for name in read_panel(sides.side(side)).samples.ids}
    assert all(lies[f"TWIN{k}"] == lies[f"P{k:03d}"] for k in range(20))


def test_refusals(genotype_track, genotype_sides, tmp_path: Path) -> None:
    path, data = genotype_track
    track, sides = genotype_sides
    with pytest.raises(InputError, match=r"panel\.bcf"):
        prepare(track, tmp_path, tmp_path / "a")
    other = track.model_copy(update={"files": [DataFile(path="panel.bcf", sha256="0" * 64)]})
    with pytest.raises(InputError, match="sha256 0000"):
        prepare(other, data, tmp_path / "b")
    pinned = track.model_copy(update={"split": track.split.model_copy(update={"sha256": "1" * 64})})
    with pytest.raises(InputError, match="the split 1111"):
        prepare(pinned, data, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    with pytest.raises(UsageError, match="chr22"):
        load_track("chr_22")
    with pytest.raises(InputError, match="split of track"):
        load_sides(sides.folder, track.model_copy(update={"name": "another"}))
    assert path.exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sample": 3}, "'samples'"),
        ({"scans": {"table": "x", "size": [4, 4, 4]}}, "one of them"),
        ({"split": {"test": 0.6, "fresh": 0.5}}, "nobody to train on"),
        ({"samples": 1}, "samples"),
    ],
)
def test_bad_track_files(tmp_path: Path, write_track, values: dict, said: str) -> None:
    good = {"name": "t", "files": [{"path": "p"}], "genotypes": {"panel": "p"}, "samples": 5, "columns": ["ld_r"]}
    with pytest.raises(InputError, match=said):
        load_track(write_track(tmp_path, **{**good, **values}))


def test_arrays_bring_their_own_split(tmp_path: Path, write_track) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"{name}_images": rng.integers(0, 2, (n, 6, 6, 6)).astype(np.uint8)
              for name, n in (("train", 5), ("test", 4), ("val", 3))}  # fmt: skip
    np.savez(tmp_path / "shapes.npz", **arrays)
    path = write_track(
        tmp_path, name="shapes", files=[{"path": "shapes.npz"}], scans={"arrays": "shapes.npz", "size": [6, 6, 6]},
        samples=3, columns=["frechet_shape"],
    )  # fmt: skip
    sides = prepare(load_track(path), tmp_path, tmp_path / "split")
    assert sides.units == {"train": 5, "test": 4, "fresh": 3}
    from engine.imaging.commands import read_folder

    volumes, _ = read_folder(sides.side("fresh"))
    assert (volumes[1].array_cdhw[0] == arrays["val_images"][1]).all()
    np.savez(tmp_path / "shapes.npz", other=arrays["val_images"])
    with pytest.raises(InputError, match="train_images"):
        prepare(load_track(path), tmp_path, tmp_path / "split2")
