from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine.cohort import heads
from engine.cohort.config import EmbeddedConfig
from engine.cohort.embedded import Cohort, scan_person, write_cohort
from engine.cohort.longitudinal import fit_table
from engine.cohort.measure import calibrate, measure
from engine.cohort.people import make_people
from engine.cohort.profile import load_profile
from engine.cohort.tables import read_table
from engine.errors import UsageError
from engine.genomics.panel import read_panel
from engine.imaging.volume import read_volume


def test_one_person_made_alone_is_the_person_of_the_cohort(small: Cohort, small_config: EmbeddedConfig) -> None:
    person = int(np.flatnonzero(small.subjects["visits"] == 2)[-1])
    alleles = small.panel.alleles_nl()[2 * person : 2 * person + 2, [x.site for x in small.loci]]
    subjects, latent = make_people(
        small_config,
        small.subjects["group"][[person]],
        alleles.sum(axis=0)[None],
        [str(small.subjects["subject"][person])],
        person,
    )
    assert subjects["diagnosis"][0] == small.subjects["diagnosis"][person]
    made = list(scan_person(small_config, heads.template(small_config.scanner), subjects, latent, 0, person))
    rows = np.flatnonzero(small.scans["subject"] == small.subjects["subject"][person])
    assert len(made) == len(rows) == 2
    for head, row in zip(made, rows):
        assert np.array_equal(head.array_dhw, small.volumes[row].array_cdhw[0])


def test_the_image_measure_recovers_the_truth(small: Cohort) -> None:
    true_mm3 = np.array(small.truth["scans"]["ventricle_mm3"])
    measures = measure(small.volumes)
    line = calibrate(measures, true_mm3, small.scans)
    assert np.corrcoef(measures.dark_mm3, true_mm3)[0, 1] > 0.96  # 0.988 in the default cohort
    assert line.r2 > 0.9
    assert np.corrcoef(measures.brain_mm3, small.truth["scans"]["brain_mm3"])[0, 1] > 0.98
    bias = np.mean(np.log(line.ventricle_mm3(measures) / true_mm3))
    assert abs(bias) < 0.03


def test_true_volumes_follow_the_generating_equation(small: Cohort) -> None:
    row = {s: i for i, s in enumerate(small.subjects["subject"])}
    person = np.array([row[s] for s in small.scans["subject"]])
    latent, a = small.truth["subjects"], small.config.anatomy
    rate = np.array(latent["rate_per_year"])[person]
    expected = (
        np.log(a.ventricle_mm3)
        + a.ventricle_log_per_year * (small.subjects["age"][person] - 70)
        + a.ventricle_log_ad * (small.scans["diagnosis"] == "AD")
        + a.ventricle_log_male * (small.scans["sex"] == "M")
        + a.ventricle_log_sd * np.array(latent["z_ventricle"])[person]
        + rate * small.scans["interval_years"]
    )
    assert np.log(small.truth["scans"]["ventricle_mm3"]) == pytest.approx(expected.astype(float), abs=0.003)


def test_files_are_the_inputs_of_the_ordinary_commands(small: Cohort, tmp_path: Path) -> None:
    folder = write_cohort(small, tmp_path / "cohort")
    scans = read_table(folder / "imaging" / "volumes.csv")
    assert list(scans["image"]) == list(small.scans["image"])
    parts = [read_table(folder / "imaging" / f"{split}.csv") for split in ("train", "holdout")]
    assert not set(parts[0]["subject"]) & set(parts[1]["subject"])
    assert sum(len(p["image"]) for p in parts) == len(scans["image"])
    back = read_volume(folder / "imaging" / str(scans["image"][5]))
    assert np.array_equal(back.array_cdhw, small.volumes[5].array_cdhw)
    assert np.allclose(back.affine, small.volumes[5].affine)

    panel = read_panel(folder / "genotypes.bcf", map=folder / "genetic_map.txt", samples_tsv=folder / "samples.tsv")
    assert np.array_equal(panel.bits_lw, small.panel.bits_lw)
    assert panel.phased
    assert panel.sites.position_cm == pytest.approx(small.panel.sites.position_cm, abs=1e-6)
    assert np.array_equal(panel.samples.group, small.panel.samples.group)
    train = read_panel(folder / "genotypes_train.bcf", samples_tsv=folder / "samples.tsv")
    assert set(train.samples.ids) == set(parts[0]["subject"])

    visits = read_table(folder / "visits.csv")
    assert all((folder / str(image)).is_file() for image in visits["image"])
    assert list(visits["split"]) == list(small.scans["split"])
    fitted = fit_table(load_profile("embedded"), visits)  # which checks every rule of the profile
    assert fitted.people == len(set(parts[0]["subject"]))
    assert fitted.visits == len(parts[0]["subject"])

    truth = json.loads((folder / "truth.json").read_text())
    assert truth["loci"][0]["log_odds"] == 1.2
    record = json.loads((folder / "provenance.json").read_text())
    assert record["synthetic_data"] is True
    assert EmbeddedConfig.model_validate(record["config"]) == small.config
    with pytest.raises(UsageError):
        write_cohort(small, tmp_path / "cohort")


def test_part_takes_people_with_everything_of_theirs(small: Cohort) -> None:
    train = small.part("train")
    assert list(train.panel.samples.ids) == list(train.subjects["subject"])
    assert set(train.scans["subject"]) == set(train.subjects["subject"])
    assert len(train.volumes) == len(train.scans["image"]) == len(train.truth["scans"]["ventricle_mm3"])
    assert len(train.truth["subjects"]["z_rate"]) == len(train.subjects["subject"])
