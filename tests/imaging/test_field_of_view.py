"""The guard of size x spacing: what lies within the trained grids passes, everything else states the range, `force` insists."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.errors import UsageError
from engine.imaging.config import ImagingConfig, apply_overrides, parse_config
from engine.imaging.field_of_view import check_field_of_view, trained_fields
from engine.imaging.generate import load_model, sample
from engine.imaging.train import grid_of, train

TWO_GRIDS = ("data.spacing_mm=[2,2,2]", "data.further_grids=[{size: [8, 12, 16], spacing_mm: [4, 3, 2]}]")


@pytest.fixture(scope="module")
def two_grids(tiny_config, table, tmp_path_factory) -> tuple[ImagingConfig, object]:
    """A run on 16 x 16 x 16 at 2 mm and on 8 x 12 x 16 at 4 x 3 x 2 mm."""
    config = parse_config(apply_overrides(tiny_config.model_dump(), TWO_GRIDS))
    out = tmp_path_factory.mktemp("grids") / "run"
    train(config, table, out)
    return config, out


def test_every_trained_grid_is_sampled_in_its_own_size_and_spacing(two_grids):
    model = load_model(two_grids[1], "cpu")
    for size, spacing in (((16, 16, 16), (2, 2, 2)), ((8, 12, 16), (4, 3, 2))):
        volume = next(sample(model, 1, size=size, spacing_mm=spacing))[1]
        assert volume.shape_dhw == size
        assert volume.spacing_mm == pytest.approx(spacing)
        assert volume.affine @ [*((n - 1) / 2 for n in size), 1] == pytest.approx([5, 5, 5, 1])
    one, other = (
        next(sample(model, 1, seed=1, size=(8, 16, 16), spacing_mm=(s, 2, 2), force=True))[1].array_cdhw
        for s in (2.0, 4.0)
    )
    assert not np.array_equal(one, other)  # spacing is a condition


def test_every_grid_gets_its_share_of_the_steps(two_grids):
    drawn = [grid_of(two_grids[0], "flow", step) for step in range(200)]
    assert 70 < sum(drawn) < 130
    assert {grid_of(two_grids[0], "autoencoder", step) for step in range(20)} == {0, 1}


def test_statistics_of_latents_run_over_all_grids(two_grids):
    from safetensors.torch import load_file

    cache = load_file(two_grids[1] / "cache" / "latents.safetensors")
    mean = torch.cat([cache[name].transpose(2, 0).flatten(1) for name in ("mean", "mean-1")], dim=1)
    spread = torch.cat([cache[name].transpose(2, 0).flatten(1) for name in ("deviation", "deviation-1")], dim=1)
    assert torch.allclose(cache["mean_c"], mean.mean(dim=1), atol=1e-5)
    whole = (mean.var(dim=1, correction=0) + spread.square().mean(dim=1)).sqrt()
    assert torch.allclose(cache["deviation_c"], whole, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "spacing", "said"),
    [
        ((20, 16, 16), (2, 2, 2), "size 20 x 16 x 16"),
        ((16, 16, 16), (2.5, 2, 2), "extent 40 x 32 x 32"),  # size and spacing trained, the extent not
        ((8, 12, 16), (1.9, 3, 2), "spacing 1.9 x 3 x 2"),
        ((8, 12, 16), (2, 2, 2), "extent 16 x 24 x 32"),
        ((4, 16, 16), (2, 2, 2), "size 4 x"),
    ],
)
def test_outside_is_refused_with_the_trained_range_and_force_insists(two_grids, size, spacing, said):
    model = load_model(two_grids[1], "cpu")
    with pytest.raises(UsageError) as refused:
        check_field_of_view(model.config, model.facts, size, spacing)
    text = str(refused.value)
    assert said in text
    assert "size 8-16 x 12-16 x 16, spacing 2-4 x 2-3 x 2 mm, extent 32 x 32-36 x 32 mm" in text
    assert "--force" in text
    assert check_field_of_view(model.config, model.facts, size, spacing, force=True) == (size, spacing)


def test_a_percent_of_millimetres_is_tolerated_and_nonsense_is_not(two_grids):
    model = load_model(two_grids[1], "cpu")
    check_field_of_view(model.config, model.facts, (16, 16, 16), (2.015, 1.985, 2.0))
    for size, spacing in (
        ((0, 16, 16), None),
        (None, (2.0, -1.0, 2.0)),
        ((16, 16), None),
        (None, (2.0, float("nan"), 2)),
    ):
        with pytest.raises(UsageError, match="three positive numbers"):
            check_field_of_view(model.config, model.facts, size, spacing, force=True)


def test_facts_from_before_there_were_grids_still_guard(tiny_config):
    facts = {"spacing_mm": [2.0] * 3, "spacing_mm_low": [1.8] * 3, "spacing_mm_high": [2.2] * 3}
    assert check_field_of_view(tiny_config, facts, None, None) == ((16, 16, 16), (2.0, 2.0, 2.0))
    with pytest.raises(UsageError, match=r"1\.8-2\.2"):
        check_field_of_view(tiny_config, facts, None, (3.0, 2.0, 2.0))
    kept = trained_fields([((4, 4, 4), np.array([[1.0, 2.0, 3.0], [2.0, 1.0, 3.0]]))])
    assert kept == [{"size": [4, 4, 4], "spacing_mm_low": [1.0, 1.0, 3.0], "spacing_mm_high": [2.0, 2.0, 3.0]}]
