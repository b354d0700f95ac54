"""Evaluation: metrics by their definitions, real data passes, damaged data is seen, floors and figures are there."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage, stats

from engine import seeding
from engine.errors import InputError
from engine.imaging.commands import evaluate_command
from engine.imaging.evaluate import (
    column_w1,
    evaluate,
    frechet,
    histogram_w1,
    kernel_distance,
    montage_image,
)
from engine.imaging.volume import Volume, write_volume


def person(number: int, seed: int = 0) -> Volume:
    """A ball of varying radius and texture."""
    draw = seeding.generator(seed, "tests.evaluate", number)
    i, j, k = np.meshgrid(*(np.arange(16.0),) * 3, indexing="ij")
    centre, radius = draw.normal(7.5, 0.5, 3), draw.uniform(3.5, 6.0)
    ball = np.sqrt((i - centre[0]) ** 2 + (j - centre[1]) ** 2 + (k - centre[2]) ** 2) < radius
    array = 60.0 * ball + 10.0 * ndimage.gaussian_filter(draw.standard_normal((16, 16, 16)), 0.7) + 20.0
    return Volume(array[None].astype(np.float32), np.eye(4), "MR", "arbitrary", {})


REAL = [person(k) for k in range(48)]
FRESH = [person(k) for k in range(100, 124)]


def by_name(evaluation):
    return {finding.name: finding for finding in evaluation.findings}


def test_frechet_is_the_closed_form_of_gaussians():
    rng = seeding.generator(0, "tests")
    a = rng.standard_normal((20_000, 2)) @ np.diag([1.0, 2.0])
    b = rng.standard_normal((20_000, 2)) @ np.diag([3.0, 1.0]) + [1.0, -2.0]
    assert frechet(a, b) == pytest.approx(1 + 4 + (1 - 3) ** 2 + (2 - 1) ** 2, rel=0.03)
    assert frechet(a, a) == pytest.approx(0.0, abs=1e-9)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    values = [
        kernel_distance(rng.standard_normal((12, 4)), rng.standard_normal((12, 4)))
        for rng in (seeding.generator(1, "tests", k) for k in range(300))
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)
    rng = seeding.generator(2, "tests")
    assert kernel_distance(rng.standard_normal((50, 4)), rng.standard_normal((50, 4)) + 1.0) > 0.5


def test_wasserstein_agrees_with_scipy():
    rng = seeding.generator(3, "tests")
    a, b = rng.random((30, 2)), rng.random((30, 2)) ** 2
    expected = np.mean([stats.wasserstein_distance(a[:, c], b[:, c]) for c in range(2)])
    assert column_w1(a, b) == pytest.approx(expected)
    bins = np.histogram(a[:, 0], 200, (0, 1))[0][None] / 30, np.histogram(b[:, 0], 200, (0, 1))[0][None] / 30
    assert histogram_w1(*bins) == pytest.approx(stats.wasserstein_distance(a[:, 0], b[:, 0]), abs=0.01)


def test_fresh_real_data_is_as_near_as_the_floor():
    found = by_name(evaluate(REAL, FRESH))
    assert found["frechet_shape"].verdict == "pass"
    assert 0.9 < found["sharpness_ratio"].value < 1.1
    for finding in found.values():
        assert finding.n == 24
        assert finding.floor is not None
        low, high = finding.interval
        assert low <= finding.value <= high


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (lambda a, k: ndimage.gaussian_filter(a, (0, 1, 1, 1)), "gradient_w1"),
        (lambda a, k: a**0.5, "intensity_w1"),
        (lambda a, k: np.roll(a, 3, axis=1), "block_mean_w1"),
        (lambda a, k: FRESH[0].array_cdhw, "frechet_shape"),
        (lambda a, k: np.roll(a, 3, axis=1), "kid_shape"),
        (lambda a, k: ndimage.gaussian_filter(a, (0, 1, 1, 1)), "frechet_texture"),
    ],
)
def test_damage_is_seen_by_the_metric_meant_for_it(damage, finding):
    good = by_name(evaluate(REAL, FRESH))[finding]
    damaged = [
        replace(v, array_cdhw=np.ascontiguousarray(damage(v.array_cdhw - v.array_cdhw.min(), k), dtype=np.float32))
        for k, v in enumerate(FRESH)
    ]
    bad = by_name(evaluate(REAL, damaged))[finding]
    assert bad.value > 2.0 * max(good.value, good.floor)
    if bad.threshold is not None:
        assert bad.verdict == "fail"


def test_features_that_hardly_vary_do_not_swamp_the_texture_distance():
    """Air is the same in every real scan; a difference of a thousandth there is no distance of thousands."""
    clean = [
        replace(v, array_cdhw=np.where(v.array_cdhw > 60, v.array_cdhw, 0).astype(np.float32)) for v in REAL + FRESH
    ]
    hazy = [replace(v, array_cdhw=np.maximum(v.array_cdhw, 0.1)) for v in clean[48:]]
    assert by_name(evaluate(clean[:48], hazy))["frechet_texture"].value < 10.0


def test_a_collapsed_generator_is_less_diverse():
    found = by_name(evaluate(REAL, [FRESH[0]] * 24))["pair_ssim"]
    assert found.value > 0.99 > found.floor


def test_floor_from_the_training_side_and_from_a_reference():
    by_train = by_name(evaluate(REAL[:24], FRESH, train=REAL[24:]))["frechet_shape"]
    assert by_train.calibrated_on == "real vs real, a part of the training side that fitted no extractor"
    assert by_train.n == 12
    assert "the training side, 12 volumes" in by_train.note
    by_reference = by_name(evaluate(REAL[:24], FRESH, reference=REAL[24:]))["frechet_shape"]
    assert by_reference.calibrated_on == "real vs real, the reference set"


def test_people_are_not_split_between_the_halves():
    """Each person scanned twice alike: halves that split people would give a floor near zero for the volumes."""
    doubled = [v for v in REAL[:24] for _ in range(2)]
    persons = [f"P{k // 2}" for k in range(48)]
    apart = by_name(evaluate(doubled, FRESH, real_persons=persons))["block_mean_w1"].floor
    mixed = by_name(evaluate(doubled, FRESH))["block_mean_w1"].floor
    assert apart > mixed


def test_region_volumes():
    rng = seeding.generator(4, "tests")
    real, same, other = (rng.normal(m, 10.0, (48, 2)) for m in (100.0, 100.0, 150.0))
    options = {"real_regions_mm3": real}
    good = by_name(evaluate(REAL, FRESH, synthetic_regions_mm3=same[:24], **options))["region_volume_w1"]
    bad = by_name(evaluate(REAL, FRESH, synthetic_regions_mm3=other[:24], **options))["region_volume_w1"]
    assert bad.value == pytest.approx(50.0, abs=10.0)
    assert bad.verdict == "fail"
    assert good.value < 10.0


def test_too_few_or_unlike_volumes_are_refused():
    with pytest.raises(InputError, match="at least 8"):
        evaluate(REAL[:10], FRESH)
    with pytest.raises(InputError, match="one shape"):
        evaluate(REAL, [*FRESH, replace(FRESH[0], array_cdhw=FRESH[0].array_cdhw[:, :-1])])
    with pytest.raises(InputError, match="units"):
        evaluate([replace(v, units="HU", modality="CT") for v in REAL], FRESH)


def test_montage_is_an_image():
    image = montage_image(evaluate(REAL, FRESH).figures)
    assert image.dtype == np.uint8
    assert image.shape == (6 * 18, 8 * 18)
    assert image.std() > 20


def test_the_page_has_a_slice_slider_for_each_plane(tmp_path):
    from engine.release.evaluation import scan_report

    made = evaluate(REAL, FRESH)
    shown = made.figures["volumes"]
    assert {side: (x.dtype, len(x)) for side, x in shown.items()} == dict.fromkeys(("real", "synthetic"), (np.uint8, 8))
    assert shown["real"].shape[1:] == REAL[0].shape_dhw
    page = scan_report(tmp_path, made, 0).read_text()
    assert page.count('type="range"') == 3
    for plane, depth in zip(("sagittal", "coronal", "axial"), REAL[0].shape_dhw, strict=True):
        assert f"{plane} slice 1 of {min(12, depth)}" in page


def test_command_writes_findings_and_montage(tmp_path):
    for name, volumes in (("real", REAL[:20]), ("synthetic", FRESH[:10])):
        (tmp_path / name).mkdir()
        for k, volume in enumerate(volumes):
            write_volume(volume, tmp_path / name / f"v{k:02d}.nii.gz")
    result = evaluate_command(tmp_path / "real", tmp_path / "synthetic", out=tmp_path / "out")
    assert (result["real"], result["synthetic"]) == (20, 10)
    assert json.loads((tmp_path / "out" / "findings.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "out" / "montage.png").stat().st_size > 1000
    with pytest.raises(InputError, match="nothing there"):
        evaluate_command(tmp_path / "none", tmp_path / "synthetic")
