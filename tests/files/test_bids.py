"""BIDS in: names and tables become rows; what does not fit together is refused. And what a release writes is read back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.errors import InputError
from engine.files import bids
from engine.files.nifti import write_nifti
from engine.files.volumes import VolumeData

VALIDATOR = shutil.which("bids-validator-deno") or shutil.which("bids-validator-deno", path=Path(sys.executable).parent)
PEOPLE = "participant_id\tage\tsex\nsub-01\t61\tF\nsub-02\tn/a\tM\nsub-03\t70\tF\n"


def scan(path: Path, seed: int = 0) -> Path:
    array = np.random.default_rng(seed).integers(0, 900, (8, 8, 8)).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, VolumeData(array, np.eye(4), "MR"))
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Three people, the second with two sessions, one of them with a FLAIR; a BIDS dataset that its validator accepts."""
    root = tmp_path / "ds"
    scan(root / "sub-01" / "anat" / "sub-01_T1w.nii.gz", 1)
    for visit, seed in (("a", 2), ("b", 3)):
        scan(root / "sub-02" / f"ses-{visit}" / "anat" / f"sub-02_ses-{visit}_T1w.nii.gz", seed)
    scan(root / "sub-02" / "ses-b" / "anat" / "sub-02_ses-b_FLAIR.nii.gz", 4)
    scan(root / "sub-03" / "anat" / "sub-03_run-1_T1w.nii.gz", 5)
    (root / "sub-02" / "sub-02_sessions.tsv").write_text("session_id\tage\nses-a\t50\nses-b\t52.5\n")
    (root / "participants.tsv").write_text(PEOPLE)
    (root / "README.md").write_text("# Heads\n\nNoise in the shape of heads.\n")
    (root / "dataset_description.json").write_text(json.dumps({"Name": "Heads", "BIDSVersion": "1.10.0"}))
    return root


@pytest.mark.skipif(VALIDATOR is None, reason="bids-validator-deno is not installed")
def test_the_dataset_of_these_tests_is_one(raw: Path) -> None:
    done = subprocess.run([str(VALIDATOR), str(raw), "--json"], capture_output=True, text=True, timeout=120)
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []


def test_rows_have_what_names_and_tables_say(raw: Path) -> None:
    columns, rows = bids.read_table(raw, "T1w")
    assert columns[:4] == ["image", "label", "subject", "visit"]
    assert set(columns[4:]) == {"age", "sex"}
    assert [(row["subject"], row["visit"], row["age"], row["sex"]) for row in rows] == [
        ("01", "", "61", "F"), ("02", "a", "50", "M"), ("02", "b", "52.5", "M"), ("03", "", "70", "F"),
    ]  # fmt: skip
    assert all((raw / row["image"]).is_file() for row in rows)
    assert len(bids.read_table(raw, "FLAIR")[1]) == 1


def test_the_label_map_of_an_image_is_found_whatever_made_it(raw: Path) -> None:
    folder = raw / "sub-03" / "anat"
    scan(folder / "sub-03_run-1_desc-hippocampus_dseg.nii.gz")
    scan(folder / "sub-03_run-2_dseg.nii.gz")
    labels = {row["subject"]: row["label"] for row in bids.read_table(raw, "T1w")[1]}
    assert labels["03"] == "sub-03/anat/sub-03_run-1_desc-hippocampus_dseg.nii.gz"
    assert labels["01"] == ""
    scan(folder / "sub-03_run-1_desc-other_dseg.nii.gz")
    with pytest.raises(InputError, match="one dseg for each image, got 2"):
        bids.read_table(raw, "T1w")


def rename(old: Path, new: str) -> None:
    old.rename(old.with_name(new))


def link_out(root: Path) -> None:
    outside = scan(root.parent / "outside" / "x.nii.gz")
    (root / "sub-01" / "anat" / "sub-01_acq-x_T1w.nii.gz").symlink_to(outside)


FAULTS = {
    "several kinds": (lambda r: None, None, "one kind of images, or a choice, got FLAIR T1w"),
    "no such kind": (lambda r: None, "T1W", "try: 'T1w'"),
    "no dataset": (lambda r: (r / "dataset_description.json").unlink(), "T1w", "a BIDS dataset"),
    "broken description": (lambda r: (r / "dataset_description.json").write_text("{"), "T1w", "damage"),
    "no version": (lambda r: (r / "dataset_description.json").write_text("{}"), "T1w", "BIDSVersion"),
    "no images": (lambda r: [shutil.rmtree(p) for p in r.glob("sub-*")], "T1w", "images below sub-"),
    "another person's name": (
        lambda r: rename(r / "sub-01" / "anat" / "sub-01_T1w.nii.gz", "sub-02_T1w.nii.gz"), "T1w", "in the folder of its"),
    "a person twice": (lambda r: (r / "participants.tsv").write_text(PEOPLE + "sub-01\t3\tF\n"), "T1w", "line 5"),
    "a short row": (lambda r: (r / "participants.tsv").write_text(PEOPLE + "sub-09\t3\n"), "T1w", "line 5"),
    "another first column": (lambda r: (r / "participants.tsv").write_text("age\tid\n3\tsub-01\n"), "T1w", "participant_id"),
    "a link out": (link_out, "T1w", "leads out"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_faults_are_one_line(raw: Path, what: str) -> None:
    change, suffix, words = FAULTS[what]
    change(raw)
    with pytest.raises(InputError) as caught:
        bids.read_table(raw, suffix)
    assert words in str(caught.value)


def test_links_inside_the_dataset_are_followed(raw: Path) -> None:
    """As git-annex keeps files."""
    image = raw / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    (raw / ".git" / "annex").mkdir(parents=True)
    image.rename(raw / ".git" / "annex" / "object")
    image.symlink_to(Path("../../.git/annex/object"))
    assert len(bids.read_table(raw, "T1w")[1]) == 4


def test_training_takes_a_dataset_and_its_tables(raw: Path, tmp_path: Path) -> None:
    """The same people on the same side, the same covariates and the same voxels as through a CSV of the same rows."""
    import csv

    from engine.files.delimited import write_csv
    from engine.imaging.config import parse_config
    from engine.imaging.dataset import learn_covariates, load_scans, read_table
    from engine.imaging.split import write_split

    config = parse_config({
        "data": {"size": [8, 8, 8], "bids_suffix": "T1w", "holdout_share": 0.4,
                 "covariates": {"age": {"kind": "continuous"}, "sex": {"kind": "categorical"}}},
        "autoencoder": {"steps": 1}, "flow": {"steps": 1},
    })  # fmt: skip
    columns, records = bids.read_table(raw, "T1w")
    write_csv(raw / "volumes.csv", columns, records)
    rows, same = read_table(raw, config.data), read_table(raw / "volumes.csv", config.data)
    assert rows == same
    assert {row.train for row in rows} == {True, False}
    assert learn_covariates(rows, config.data, raw) == learn_covariates(same, config.data, raw)
    assert np.array_equal(load_scans(rows, config).x_bcdhw, load_scans(same, config).x_bcdhw)
    counts = write_split(raw, config.data, tmp_path / "run")
    assert counts == {"train": sum(r.train for r in rows), "holdout": sum(not r.train for r in rows)}
    with (tmp_path / "run" / "train.csv").open(newline="") as stream:
        (first, *_) = csv.DictReader(stream)
    assert (tmp_path / "run" / first["image"]).resolve() == rows[[r.train for r in rows].index(True)].image.resolve()


def test_evaluation_and_audit_see_people_and_not_files(raw: Path) -> None:
    from engine.imaging.commands import folder_paths

    (raw / "sub-02" / "ses-b" / "anat" / "sub-02_ses-b_FLAIR.nii.gz").unlink()
    paths, persons = folder_paths(raw)
    assert persons == ["01", "02", "02", "03"]
    assert len(paths) == 4
