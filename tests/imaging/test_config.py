"""Configs: shipped ones load, faults are one line that names the key, overrides apply, the resolved copy is complete."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from engine.errors import InputError, UsageError
from engine.imaging.config import apply_overrides, dump_config, load_config, parse_config

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(
    p
    for p in (*(CONFIGS / "imaging").glob("*.yaml"), *(CONFIGS / "cohort").glob("*.yaml"))
    if not p.name.startswith("evaluate")
)
GOOD = {"data": {"size": [16, 16, 16]}, "autoencoder": {"steps": 1}, "flow": {"steps": 1}}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_configs_load_and_say_how_to_run_them(path, tmp_path):
    config = load_config(path)
    assert path.read_text().startswith("#")
    assert "engine " in path.read_text().split("name:")[0]
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_there_are_shipped_configs():
    assert {p.stem for p in SHIPPED} >= {"hippocampus_cpu15", "heads"}


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [("flow", "batchsize", "batch_size"), ("data", "spacing", "spacing_mm"), (None, "autoencodr", "autoencoder")],
)
def test_unknown_key_names_the_nearest(section, key, nearest):
    values = copy.deepcopy(GOOD)
    (values[section] if section else values)[key] = 1
    with pytest.raises(InputError, match=f"{key}.*'{nearest}'"):
        parse_config(values, "my.yaml")


def test_unknown_key_of_a_covariate_names_the_nearest():
    values = copy.deepcopy(GOOD)
    values["data"]["covariates"] = {"age": {"knd": "continuous"}}
    with pytest.raises(InputError, match="'kind'"):
        parse_config(values)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.size=[16,16,18]", "multiples of 4"),
        ("flow.attention_levels=[7]", "attention_levels"),
        ("flow.steps=null", "max_minutes"),
        ("flow.steps=0", "flow.steps"),
        ("data.hu_range=[100,-100]", "hu_range"),
    ],
)
def test_values_that_do_not_fit(override, message):
    with pytest.raises(InputError, match=message):
        parse_config(apply_overrides(GOOD, [override]))


def test_overrides_apply_and_leave_the_original():
    values = apply_overrides(GOOD, ["flow.steps=9", "training.precision=bf16", "data.covariates.age.kind=continuous"])
    config = parse_config(values)
    assert (config.flow.steps, config.training.precision) == (9, "bf16")
    assert config.data.covariates["age"].kind == "continuous"
    assert GOOD["flow"] == {"steps": 1}


@pytest.mark.parametrize("bad", ["flow.steps", "=3", "flow.steps.more=1"])
def test_bad_overrides(bad):
    with pytest.raises(UsageError):
        apply_overrides(GOOD, [bad])


def test_absent_and_broken_files(tmp_path):
    with pytest.raises(InputError, match="nothing there"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(InputError, match="YAML"):
        load_config(tmp_path / "bad.yaml")
