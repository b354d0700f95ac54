"""The commands around the Flower example: shards by person, samples of the common models, a verdict of every site, and what
central training reaches. Flower itself is not needed here.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "federated"))

import two_sites

from engine.errors import GateRefused
from engine.genomics.federated import PanelSite
from engine.genomics.panel import read_panel, write_panel
from engine.imaging.config import dump_config, load_config, parse_config
from engine.imaging.dataset import read_table
from engine.imaging.federated import ScanSite, covariates_of, first_state, write_run
from engine.training.federated import total

NAMES = ("north", "south")


@pytest.fixture(scope="module")
def dealt(tmp_path_factory, write_mosaics: Callable[[Path, int, int], Path]) -> Path:
    """Shards of a panel of 300 people and of a table of 36 scans of 24 people."""
    folder = write_mosaics(tmp_path_factory.mktemp("shards"), 300, 40)
    rows = [f"images/{k}.nii.gz,person-{k // 3 if k < 18 else k - 12},{50 + k}" for k in range(36)]
    (folder / "volumes.csv").write_text("\n".join(["image,subject,age", *rows]) + "\n")
    two_sites.shard(
        folder / "sites", folder / "volumes.csv", folder / "panel.bcf", folder / "samples.tsv", holdout=0.25
    )
    return folder


def people_of(table: Path) -> set[str]:
    with table.open(newline="") as stream:
        return {row["subject"] for row in csv.DictReader(stream)}


def test_shards_are_dealt_out_by_person(dealt: Path) -> None:
    """Nobody is at two sites or on two sides; sites are of equal size as far as groups can be halved; every
    scan of a person is where the person is."""
    sides = {
        (name, side): people_of(dealt / "sites" / name / f"{side}.csv")
        for name in NAMES
        for side in ("train", "holdout")
    }
    assert [len(people) for people in sides.values()] == [9, 3, 9, 3]
    assert set().union(*sides.values()) == people_of(dealt / "volumes.csv")
    rows = [row for name in NAMES for row in csv.DictReader((dealt / "sites" / name / "volumes.csv").open())]
    assert len(rows) == 36
    assert {Path(row["image"]).parent for row in rows} == {dealt / "images"}, "images are found from the site's folder"
    assert all(row["subject"] in people_of(dealt / "sites" / name / f"{row['split']}.csv")
               for name in NAMES for row in csv.DictReader((dealt / "sites" / name / "volumes.csv").open()))  # fmt: skip

    panels = {
        (n, s): read_panel(dealt / "sites" / n / f"{s}.bcf").samples.ids for n in NAMES for s in ("train", "unseen")
    }
    public = read_panel(dealt / "sites" / "public.bcf").samples.ids
    everybody = [who for ids in (*panels.values(), public) for who in ids]
    assert len(everybody) == len(set(everybody)) == 300
    train, unseen = ([len(panels[name, side]) for name in NAMES] for side in ("train", "unseen"))
    assert abs(train[0] - train[1]) <= 2, "each of two groups is halved and rounded"
    assert unseen == pytest.approx([0.25 * (300 - len(public)) / 2] * 2, abs=2)
    for name in NAMES:
        site = read_panel(dealt / "sites" / name / "train.bcf", samples_tsv=dealt / "sites" / name / "samples.tsv")
        assert site.groups()["A"].size / site.n_haplotypes == pytest.approx(0.5, abs=0.02)


@pytest.fixture(scope="module")
def common(dealt: Path) -> Path:
    """The common models' folder as a run leaves it: sums of both sites."""
    sites = {}
    for name in NAMES:
        own = dealt / "sites" / name
        sites[name] = PanelSite(read_panel(own / "train.bcf", samples_tsv=own / "samples.tsv"), None, ["A", "B"])
    summed = total({name: site.local_stats() for name, site in sites.items()}, sites["north"].stats_declared()).tensors
    (dealt / "common").mkdir()
    np.savez(dealt / "common" / "haplotypes.npz", **summed)
    return dealt / "common"


@pytest.mark.slow  # four audits
def test_every_site_judges_by_its_own_people_and_one_refusal_is_a_refusal(
    dealt: Path, common: Path, tmp_path: Path
) -> None:
    """What the common chain makes passes at both; the training people of one site, handed out as its samples, are refused
    there, and not at the other site, which cannot know them.
    """
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "honest_repeats: 4\ncontamination_repeats: 4\nsubsets: 2\naats_rows: 100\nmembership_people: 100\n"
    )
    two_sites.sample(common, tmp_path / "made", dealt / "sites" / "public.bcf", people=100)
    made = read_panel(tmp_path / "made" / "haplotypes.bcf")
    assert made.n_samples == 100
    for name in NAMES:
        two_sites.audit(dealt / "sites" / name, tmp_path / "made", tmp_path / f"honest-{name}", policy)
    (tmp_path / "copies").mkdir()
    write_panel(read_panel(dealt / "sites" / "north" / "train.bcf"), tmp_path / "copies" / "haplotypes.bcf")
    two_sites.audit(dealt / "sites" / "south", tmp_path / "copies", tmp_path / "south", policy)
    with pytest.raises(GateRefused, match="haplotypes: fail"):
        two_sites.audit(dealt / "sites" / "north", tmp_path / "copies", tmp_path / "north", policy)
    assert json.loads((tmp_path / "north" / "haplotypes" / "audit.json").read_text())["verdict"] == "fail"


def test_central_training_is_compared_on_the_same_unseen_people(
    tmp_path: Path, write_noise: Callable[..., Path]
) -> None:
    """Without a step all are the same network and no difference is left; after one they are not."""
    config = parse_config({
        "data": {"size": [16, 16, 16], "spacing_mm": [2, 2, 2], "split_column": "split",
                 "covariates": {"age": {"kind": "continuous"}}},
        "autoencoder": {"steps": 1, "batch_size": 4, "widths": [8, 16], "latent_channels": 2, "learning_rate": 0.01},
        "flow": {"steps": 1, "batch_size": 4, "widths": [8, 16], "attention_levels": [1], "embedding_width": 16, "views": 1,
                 "learning_rate": 0.01},
        "training": {"precision": "fp32"},
    })  # fmt: skip
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "config.yaml")) == config
    (tmp_path / "scans").mkdir()
    two_sites.shard(tmp_path / "sites", write_noise(tmp_path / "scans", 20, side=16), holdout=0.4)
    rows = [row for name in NAMES for row in read_table(tmp_path / "sites" / name / "volumes.csv", config.data)]
    union = ScanSite(config, "", "all", rows=rows)
    data = union.local_stats()
    union.set_stats(data)
    states = {stage: first_state(config, stage, covariates_of(config, data)) for stage in ("autoencoder", "flow")}
    union.stage = "autoencoder"
    union.set_state(states["autoencoder"])
    union.stage = "latents"
    write_run(tmp_path / "common" / "scans", config, data, union.local_stats(), states["autoencoder"], states["flow"],
              {"autoencoder": 0, "flow": 0})  # fmt: skip
    for rounds in (0, 1):
        out = tmp_path / f"central-{rounds}.json"
        two_sites.central(tmp_path / "sites", tmp_path / "common", out, tmp_path / "config.yaml",
                          rounds_autoencoder=rounds, rounds_flow=rounds, local_steps=1, draws=2)  # fmt: skip
        said = json.loads(out.read_text())
        assert said["unseen"]["people"] == sum(not row.train for row in rows) == 8
        for stage in ("autoencoder", "flow"):
            assert said[stage]["before"]["mean"] == said[stage]["federated"]["mean"] > 0
            for other in ("central", "north alone"):
                difference = said[stage][f"federated - {other}"]
                assert (difference["mean"] == 0) == (rounds == 0), (stage, other)
                assert np.isfinite(difference["interval"])


def test_what_left_a_site_is_counted_from_its_own_list(tmp_path: Path) -> None:
    array = {"shape": [2, 3], "bytes": 24}
    lines = [
        {"stage": "flow", "round": 0, "arrays": {"a": array, "b": array}, "figures": {}},
        {"stage": "flow", "round": 1, "arrays": {"a": array, "b": array}, "figures": {}},
        {"stage": "flow", "round": 0, "arrays": {}, "figures": {"n": 3.0, "velocity_mse": 1.0}},
    ]
    (tmp_path / "sent.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert two_sites.left(tmp_path / "sent.jsonl") == {"flow": {"replies": 3, "arrays": 2, "bytes": 96, "figures": 2}}
