"""People as a whole, on small embedded cohorts of the shipped profiles. Heads take most of a second each, so that all tests
share those of one cohort."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import engine.cohort
from engine.cohort.config import EmbeddedConfig, GenotypeConfig
from engine.cohort.embedded import Cohort, make_cohort
from engine.cohort.joint import CohortModel
from engine.cohort.profile import Profile, check_rows, load_profile, parse_profile
from engine.cohort.simulate import Simulated, simulate, write_simulated
from engine.cohort.tables import read_table
from engine.cohort.write import finish_command, generate_command, verify
from engine.errors import InputError, UsageError
from engine.genomics.panel import read_panel
from engine.imaging.volume import Volume

NAMES = ("alzheimer", "lung_cancer", "breast_cancer", "multiple_myeloma", "dlbcl", "type2_diabetes")
VALIDATOR = shutil.which("bids-validator-deno") or shutil.which("bids-validator-deno", path=Path(sys.executable).parent)
TINY = {
    "name": "tiny",
    "data": {"size": [8, 12, 8], "spacing_mm": [20, 20, 20], "modality": "MR", "covariates": {}},
    "autoencoder": {"steps": 2, "batch_size": 2, "widths": [4, 8], "latent_channels": 2},
    "flow": {"steps": 2, "batch_size": 2, "widths": [8, 8], "attention_levels": [1], "embedding_width": 8, "views": 1,
             "shift_voxels": 0},
    "sampling": {"steps": 1, "method": "euler"},
    "training": {"precision": "fp32", "checkpoint_every_minutes": None},
}  # fmt: skip


def embedded_default(name: str, people: int, cohort: Cohort | None = None, seed: int = 3) -> Simulated:
    """The embedded default of a profile, with every scan one of `cohort`'s heads where it is given."""
    profile = load_profile(name)
    genome = GenotypeConfig(windows=max(1, len(profile.genotypes.loci)), window_bp=60_000)
    made = simulate(profile, people, seed=seed, scans=False, genome=genome)
    if cohort is None:
        return made
    table, volumes = dict(made.table), list[Volume]()
    images = np.full(len(table["subject"]), "", dtype=object)
    for row in range(0, len(images), 3):
        images[row] = f"images/{table['subject'][row]}_visit-{table['visit'][row]}.nii.gz"
        volumes.append(cohort.volumes[len(volumes) % len(cohort.volumes)])
    return Simulated({**table, "image": images}, made.panel, volumes, made.loci, np.zeros(len(images)))


@pytest.fixture(scope="module")
def few() -> Cohort:
    """A handful of heads."""
    return make_cohort(EmbeddedConfig(people=8, seed=3, genotypes=GenotypeConfig(windows=1)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, few: Cohort) -> Path:
    """Input files of the Alzheimer profile's embedded default."""
    out = tmp_path_factory.mktemp("cohort")
    write_simulated(embedded_default("alzheimer", 90, few), out / "real")
    (out / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> CohortModel:
    return engine.cohort.fit(
        folder / "real" / "visits.csv",
        "alzheimer",
        genotypes=folder / "real" / "genotypes.bcf",
        genetic_map=folder / "real" / "genetic_map.txt",
        scans=folder / "tiny.yaml",
        out=folder / "model",
    )


def test_the_example(model: CohortModel) -> None:
    """The call that another component makes, as docs/cohort.md shows it."""
    people = model.generate(3, where={"diagnosis": "AD", "age": (60, 80)}, seed=1)
    assert isinstance(people, Iterator)
    for k, person in enumerate(people):
        assert person.id == f"SYN{k:09d}"
        assert person.visits[0]["diagnosis"] == "AD"
        assert 60 <= person.visits[0]["age"] <= 80
        assert len(person.scans) == len(person.visits)
        for row, volume in zip(person.visits, person.scans):
            assert (volume is None) == row["no scan"]
            assert volume is None or (np.isfinite(volume.array_cdhw).all() and volume.array_cdhw.shape == (1, 8, 12, 8))
        if person.haplotypes is not None:
            assert person.haplotypes.samples.ids == [person.id]
            assert person.haplotypes.n_haplotypes == 2
            site = model.genetics.site["APOE"]  # type: ignore[union-attr]
            assert person.haplotypes.alleles_nl()[:, site].sum() == person.visits[0]["APOE"]


def test_person_k_is_a_function_of_model_seed_and_k(model: CohortModel, folder: Path) -> None:
    whole = list(model.generate(12, seed=4, scans=False))
    part = list(engine.cohort.load(folder / "model").generate(3, seed=4, start=7))
    assert [p.visits for p in part] == [p.visits for p in whole[7:10]]
    for a, b in zip(part, whole[7:10]):
        assert (a.haplotypes is None) == (b.haplotypes is None)
        assert a.haplotypes is None or np.array_equal(a.haplotypes.bits_lw, b.haplotypes.bits_lw)  # type: ignore[union-attr]
    alone = next(iter(model.generate(1, seed=4, start=8)))
    assert all(
        (x is None and y is None) or np.array_equal(x.array_cdhw, y.array_cdhw)  # type: ignore[union-attr]
        for x, y in zip(alone.scans, part[1].scans)
    )
    assert [p.visits for p in model.generate(12, seed=5, scans=False)] != [p.visits for p in whole]


def test_what_hardly_ever_happens_is_refused_with_the_share(model: CohortModel) -> None:
    with pytest.raises(UsageError, match=r"of \d+ candidates were right.*more candidates"):
        list(model.generate(1, where={"age": (94.999, 95), "education_years": 0}, scans=False, most=8))
    with pytest.raises(UsageError, match="diagnosis"):
        model.generate(1, where={"diagnose": "AD"})
    with pytest.raises(UsageError, match="-1"):
        model.generate(-1)


def test_a_folder_is_bids_and_its_ids_are_one(model: CohortModel, folder: Path) -> None:
    out = folder / "made"
    told = generate_command(model, 6, out, seed=2)
    assert verify(out) == []
    visits, manifest = read_table(out / "visits.tsv"), json.loads((out / "manifest.json").read_text())
    check_rows(model.profile, [{n: visits[n][k] for n in visits} for k in range(len(visits["subject"]))])
    listed = {f"sub-{name}" for name in visits["subject"]}
    people = read_table(out / "bids" / "participants.tsv")
    assert {str(p) for p in people["participant_id"]} == {p.name for p in (out / "bids").glob("sub-*")} == listed
    with_genes = [str(p)[4:] for p, yes in zip(people["participant_id"], people["genotypes"]) if str(yes) == "True"]
    assert read_panel(out / "genotypes.bcf").samples.ids == with_genes
    images = [str(image) for image in visits["image"] if image]
    assert len(images) == told["scans"] == len(list((out / "bids").rglob("*.nii.gz")))
    assert all((out / image).is_file() and image in manifest["files"] for image in images)
    assert manifest["request"]["seed"] == 2
    if VALIDATOR is not None:
        done = subprocess.run([VALIDATOR, str(out / "bids"), "--json"], capture_output=True, text=True, timeout=120)
        issues = json.loads(done.stdout)["issues"]["issues"]
        assert [i for i in issues if i["severity"] == "error"] == []
    (out / "bids" / "README").write_text("changed")
    assert verify(out) == ["bids/README changed"]


def test_shards_join_to_what_one_job_makes(model: CohortModel, folder: Path) -> None:
    whole, parts = folder / "whole", folder / "parts"
    generate_command(model, 9, whole, seed=3, scans=False, genotype_format="pgen")
    for shard in range(3):
        generate_command(model, 9, parts, seed=3, scans=False, genotype_format="pgen", shard=(shard, 3))
    assert generate_command(model, 9, parts, seed=3, scans=False, genotype_format="pgen", shard=(1, 3))["skipped"]
    with pytest.raises(UsageError):
        generate_command(model, 9, parts, seed=4, scans=False, genotype_format="pgen", shard=(1, 3))
    finish_command(parts, 3)
    for name in ("visits.tsv", "bids/participants.tsv", "genotypes.samples.tsv"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    a, b = read_panel(whole / "genotypes.pgen"), read_panel(parts / "genotypes.pgen")
    assert a.samples.ids == b.samples.ids
    assert np.array_equal(a.bits_lw, b.bits_lw)
    assert not parts.with_name("parts.shards").exists()
    with pytest.raises(InputError, match="no shard"):
        finish_command(folder / "absent", 2)


def test_genotypes_go_with_the_diagnosis_as_far_as_the_link_is_there() -> None:
    """Cases carry the planted allele more often; without the link as often; and never more than the groups allow."""
    profile = load_profile("alzheimer")
    genome = GenotypeConfig(windows=2, window_bp=60_000)
    real = simulate(profile, 240, seed=5, scans=False, genome=genome)
    linked = engine.cohort.fit(real.table, profile, genotypes=real.panel)
    values: dict[str, Any] = profile.model_dump(mode="json")
    values["links"]["diagnosis"] = ["age", "sex"]
    values["effects"] = [e for e in values["effects"] if e["to"] != "diagnosis" or e["of"] == "age"]
    unlinked = engine.cohort.fit(real.table, parse_profile(values), genotypes=real.panel)
    means = {}
    for name, each in (("linked", linked), ("unlinked", unlinked)):
        for level in ("CN", "AD"):
            made = each.generate(100, where={"diagnosis": level, "group": "EUR"}, seed=7, scans=False, complete=True)
            means[name, level] = float(np.mean([p.visits[0]["APOE"] for p in made]))
    assert means["linked", "AD"] - means["linked", "CN"] > 0.2
    assert abs(means["unlinked", "AD"] - means["unlinked", "CN"]) < 0.2


def test_modalities_are_missing_as_in_the_data_or_not_at_all(model: CohortModel) -> None:
    rows = [row for p in model.generate(80, seed=1, scans=False) for row in p.visits]
    assert 0.55 < np.mean([row["no scan"] for row in rows]) < 0.8  # two of three visits have none in the table
    first = [p.visits[0]["no genotype"] for p in model.generate(80, seed=1, scans=False)]
    assert 0.02 < np.mean(first) < 0.3
    for person in model.generate(20, seed=1, scans=False, complete=True):
        assert person.haplotypes is not None
        assert not any(row["no scan"] for row in person.visits)


def test_scans_are_told_what_the_links_say(model: CohortModel) -> None:
    assert set(model.scan_covariates) == {"age", "sex", "group", "diagnosis", "years"}
    assert model.scan_model is not None
    assert model.scan_model.config.flow.baseline
    row = next(iter(model.generate(1, seed=0, scans=False))).visits[0]
    assert set(model.scan_given({**row, "diagnosis": "n/a"})) == {"age", "sex", "group", "years"}


def test_an_interrupted_training_of_scans_goes_on(model: CohortModel, folder: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if what == "flow":
            raise Stopped

    asked: dict[str, Any] = {
        "genotypes": folder / "real" / "genotypes.bcf",
        "genetic_map": folder / "real" / "genetic_map.txt",
        "scans": folder / "tiny.yaml",
        "out": tmp_path / "model",
        "overrides": ["training.log_every_steps=1"],
    }
    with pytest.raises(Stopped):
        engine.cohort.fit(folder / "real" / "visits.csv", "alzheimer", progress=stop, **asked)
    assert [p.name for p in tmp_path.iterdir()] == ["model.scans"]
    other = read_table(folder / "real" / "visits.csv")
    other["age"] = other["age"] + 1
    other["image"] = np.array([f"{folder / 'real'}/{i}" if i else "" for i in other["image"]], dtype=object)
    with pytest.raises(UsageError, match="another"):
        engine.cohort.fit(other, "alzheimer", **asked)
    again = engine.cohort.fit(folder / "real" / "visits.csv", "alzheimer", **asked)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    log = [json.loads(line) for line in (tmp_path / "model" / "imaging" / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in log if line["event"] == "resume"] == ["autoencoder"]
    assert not (tmp_path / "model" / "imaging" / "cache").exists()
    for side in ("train", "holdout"):
        listed = read_table(tmp_path / "model" / "imaging" / f"{side}.csv")
        assert all((tmp_path / "model" / "imaging" / str(image)).is_file() for image in listed["image"])
    one, two = (next(iter(m.generate(1, seed=1, complete=True))).scans[0] for m in (again, model))
    assert one is not None
    assert two is not None
    assert np.array_equal(one.array_cdhw, two.array_cdhw)  # as if it had not been interrupted
    with pytest.raises(UsageError, match="does not exist yet"):
        engine.cohort.fit(folder / "real" / "visits.csv", "alzheimer", **asked)


def test_a_panel_without_a_locus_is_refused() -> None:
    made = embedded_default("alzheimer", 40)
    panel = made.panel.select(sites=made.panel.sites.id != "rs429358")
    with pytest.raises(InputError, match="rs429358"):
        engine.cohort.fit(made.table, "alzheimer", genotypes=panel)


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_every_profile_runs_end_to_end_on_the_embedded_default(name: str, tmp_path: Path, few: Cohort) -> None:
    from engine.cli import main

    write_simulated(embedded_default(name, 90, few), tmp_path / "real")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    at = {key: str(tmp_path / key) for key in ("real", "model", "made")}
    for command in (
        ["fit", f"{at['real']}/visits.csv", "--profile", name, "--genotypes", f"{at['real']}/genotypes.bcf",
         "--map", f"{at['real']}/genetic_map.txt", "--scans", str(tmp_path / "tiny.yaml"), "--out", at["model"], "--json"],
        ["generate", at["model"], "-n", "3", "--complete", "--out", at["made"], "--json"],
        ["verify", at["made"], "--json"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as done:
            main(["cohort", *command])
        assert done.value.code == 0, command
    profile: Profile = load_profile(name)
    visits = read_table(tmp_path / "made" / "visits.tsv")
    assert set(profile.columns) < set(visits)
    assert (visits["image"].astype(str) != "").all()
    page = (tmp_path / "model" / "report.html").read_text()
    assert "<svg" in page
    assert all(effect.source.split(",")[0] in page for effect in profile.effects)
    assert any(effect.pmid for effect in profile.effects)
