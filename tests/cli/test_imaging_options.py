"""Label maps, follow-ups, field of view, memory, painting and estimates through the command line, on a run of seconds."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml

CONFIG = {
    "data": {"size": [16, 16, 16], "labels": [1], "covariates": {"age": {"kind": "continuous"}}},
    "autoencoder": {"steps": 3, "batch_size": 2, "widths": [8, 16], "latent_channels": 2, "shift_voxels": 1},
    "flow": {"steps": 4, "batch_size": 2, "widths": [8, 16], "attention_levels": [1], "embedding_width": 16, "views": 1,
             "label_map": True, "baseline": True, "warmup_steps": 1, "learning_rate": 0.01},
    "sampling": {"steps": 2},
    "training": {"precision": "fp32"},
}  # fmt: skip
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


@pytest.fixture(scope="module")
def run(tmp_path_factory, engine) -> Path:
    folder = tmp_path_factory.mktemp("options")
    draw = np.random.default_rng(0)
    with (folder / "volumes.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "label", "subject", "visit", "age"])
        for k in range(8):
            array = draw.random((16, 16, 16), dtype=np.float32) * 10
            label = np.zeros((16, 16, 16), dtype=np.uint8)
            label[4:12, 4:12, 3 + k % 3 : 12] = 1
            nibabel.save(nibabel.Nifti1Image(array + 80 * label, AFFINE), folder / f"scan{k}.nii.gz")
            nibabel.save(nibabel.Nifti1Image(label, AFFINE), folder / f"label{k}.nii.gz")
            writer.writerow([f"scan{k}.nii.gz", f"label{k}.nii.gz", f"P{k // 2}", k % 2, 50 + k])
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    said = engine("imaging", "train", "--config", folder / "config.yaml", "--data", folder / "volumes.csv",
                  "--out", folder / "run")  # fmt: skip
    assert said.code == 0, said.errors
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "volumes.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_follow_ups_of_a_table_given_label_maps(run, good, tmp_path):
    good("imaging", "sample", run / "run", "-n", 2, "--baseline", run / "volumes.csv", "--set", "age=+2.5",
         "--label-maps", run / "label1.nii.gz", "--out", tmp_path / "out")  # fmt: skip
    assert [row["age"] for row in rows(tmp_path / "out")] == ["52.5", "53.5"]
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["conditioned_on"] == {"label_maps": True, "scans_of_people": True}
    first = nibabel.load(tmp_path / "out" / rows(tmp_path / "out")[0]["image"])
    assert np.allclose(first.affine, AFFINE)


def test_the_field_of_view_guard_and_force_within_a_small_memory(run, engine, tmp_path):
    asked = ["imaging", "sample", run / "run", "-n", 1, "--size", "24x16x16", "--out", tmp_path / "out"]
    refused = engine(*asked)
    assert refused.code == 2
    assert "--force" in refused.errors
    assert "16 x 16 x 16" in refused.errors
    assert not (tmp_path / "out").exists()
    said = engine(*asked, "--force", "--memory-gb", "0.003")
    assert said.code == 0, said.errors
    assert nibabel.load(tmp_path / "out" / "SYN000000000_visit0.nii.gz").shape == (24, 16, 16)


def test_painting_keeps_the_voxels_outside_the_region(run, good, tmp_path):
    region = np.zeros((16, 16, 16), dtype=np.uint8)
    region[:, :8] = 1
    nibabel.save(nibabel.Nifti1Image(region, AFFINE), tmp_path / "region.nii.gz")
    said = good("imaging", "paint", run / "run", run / "scan0.nii.gz", "--region", tmp_path / "region.nii.gz", "--set",
                "age=60", "--resamples", 2, "--out", tmp_path / "out")  # fmt: skip
    assert said["generated_voxels"] == 16 * 8 * 16
    made, whole = (
        nibabel.load(p).get_fdata() for p in (tmp_path / "out" / "PAINTED000000.nii.gz", run / "scan0.nii.gz")
    )
    assert np.array_equal(made[:, 8:], whole[:, 8:])
    assert not np.array_equal(made[:, :8], whole[:, :8])


def test_an_estimate_says_what_a_config_takes(run, good):
    said = good("imaging", "estimate", "--config", run / "config.yaml", "--tflops", "0.05", "--set", "flow.steps=1000")
    assert said["latent"] == [2, 4, 4, 4]
    assert said["flow"]["steps"] == 1000
    assert said["flow"]["hours"] > 0
