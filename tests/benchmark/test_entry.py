"""The entry format: what is refused, each with one line that names the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.benchmark.entry import read_entry
from engine.errors import InputError

GOOD = {
    "name": "other_tool", "version": "1.2", "authors": ["A. Nother"], "track": "tiny", "seed": 0,
    "recipe": "other-tool sample -n 28", "training_data_sha256": "ab" * 32, "training_seconds": 12.5, "tuning_trials": 0,
    "peak_memory_bytes": 10, "hardware": "a laptop", "samples": "made.bcf",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "entry"
    made.mkdir()
    (made / "made.bcf").write_bytes(b"x")
    (made / "entry.json").write_text(json.dumps(GOOD))
    return made


def change(folder: Path, **values: object) -> None:
    (folder / "entry.json").write_text(json.dumps({**GOOD, **values}))


def test_a_good_entry(folder: Path) -> None:
    read = read_entry(folder, "tiny")
    assert read.entry.name == "other_tool"
    assert read.files[0]["path"] == "made.bcf"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"track": "chr22"}, "track 'tiny'"),
        ({"seeds": 1}, "'seed'"),  # the nearest known key
        ({"seed": -1}, "seed"),
        ({"seed": "nought"}, "seed"),
        ({"authors": []}, "authors"),
        ({"name": "../x"}, "name"),
        ({"training_data_sha256": "ABC"}, "training_data_sha256"),
        ({"training_seconds": -1}, "training_seconds"),
        ({"declared": {"test_nats": None}}, "declared"),
        ({"samples": "/etc/passwd"}, "inside the entry's folder"),
        ({"samples": "../made.bcf"}, "inside the entry's folder"),
        ({"samples": "absent.bcf"}, "nothing there"),
    ],
)
def test_refusals(folder: Path, values: dict, said: str) -> None:
    change(folder, **values)
    with pytest.raises(InputError, match="(?s)" + said) as caught:
        read_entry(folder, "tiny")
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named(folder: Path) -> None:
    (folder / "entry.json").write_text(json.dumps({k: v for k, v in GOOD.items() if k != "recipe"}))
    with pytest.raises(InputError, match="recipe"):
        read_entry(folder)


def test_infinite_times_and_other_text_are_refused(folder: Path) -> None:
    (folder / "entry.json").write_text(json.dumps({**GOOD, "training_seconds": float("inf")}))
    with pytest.raises(InputError, match="training_seconds"):
        read_entry(folder)
    (folder / "entry.json").write_bytes(b"\xff{")
    with pytest.raises(InputError, match="JSON"):
        read_entry(folder)
    (folder / "entry.json").unlink()
    with pytest.raises(InputError, match=r"entry\.json"):
        read_entry(folder)


def test_links_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.nii").write_bytes(b"x")
    (folder / "linked").symlink_to(tmp_path / "secret")
    change(folder, samples="linked")
    with pytest.raises(InputError, match="symbolic link"):
        read_entry(folder)
    (folder / "real").mkdir()
    (folder / "real" / "x.nii").symlink_to(tmp_path / "secret" / "x.nii")
    change(folder, samples="real")
    with pytest.raises(InputError, match="symbolic link"):
        read_entry(folder)
    change(folder, samples="linked/x.nii")
    with pytest.raises(InputError, match="symbolic link"):
        read_entry(folder)


def test_a_table_of_scans_cannot_name_files_elsewhere(folder: Path) -> None:
    (folder / "scans").mkdir()
    table = folder / "scans" / "volumes.csv"
    change(folder, samples="scans")
    table.write_text("image,subject\na.nii.gz,SYN0\n")
    assert read_entry(folder).files[0]["path"] == "volumes.csv"
    for name in ("../made.bcf", "/etc/hostname", ""):
        table.write_text(f"image,subject\na.nii.gz,SYN0\n{name},SYN1\n")
        with pytest.raises(InputError, match="row 3"):
            read_entry(folder)
    table.write_bytes(b"image,subject\n\xff.nii.gz,SYN0\n")
    with pytest.raises(InputError, match="CSV"):
        read_entry(folder)
