"""Launch parameters by card: defaults where nothing is known, and only known names are taken."""

from __future__ import annotations

import json

from engine.kernels import tuned


def test_a_card_without_a_file_runs_with_the_defaults():
    assert tuned.launch("ld.r2", {"BLOCK": 128}, "NVIDIA Imaginary 1") == {"BLOCK": 128}
    assert tuned.launch("ld.r2", {"BLOCK": 128}, "") == {"BLOCK": 128}


def test_a_file_overrides_what_a_kernel_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "__file__", str(tmp_path / "__init__.py"))
    tuned.forget()
    (tmp_path / "nvidia-h200.json").write_text(json.dumps({"kernels": {"ld.r2": {"BLOCK": 256, "OTHER": 3}}}))
    assert tuned.launch("ld.r2", {"BLOCK": 128, "warps": 8}, "NVIDIA H200") == {"BLOCK": 256, "warps": 8}
    assert tuned.launch("ld.decay", {"BLOCK": 128}, "NVIDIA H200") == {"BLOCK": 128}
    tuned.forget()


def test_a_trial_goes_before_everything_and_leaves_nothing():
    with tuned.override({"ld.r2": {"BLOCK": 64}}):
        assert tuned.launch("ld.r2", {"BLOCK": 128}, "") == {"BLOCK": 64}
    assert tuned.launch("ld.r2", {"BLOCK": 128}, "") == {"BLOCK": 128}
