"""The learned metrics: extractors see damage and are the same twice, floors, pairs, utility, covariates, weights of others."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import ndimage

from engine import seeding
from engine.audit.authenticity import PRDC
from engine.errors import InputError
from engine.imaging.commands import evaluate_command
from engine.imaging.quality import features
from engine.imaging.quality.assess import assess
from engine.imaging.quality.config import LearningConfig, QualityConfig, WeightsConfig, load_quality_config
from engine.imaging.quality.covariates import auc, fidelity, kind_of
from engine.imaging.quality.distances import bandwidth, floor_of, halves, mmd, ms_ssim_pairs, scales_of
from engine.imaging.quality.segmenter import dice
from engine.imaging.quality.sides import Side, label_values, volumes_mm3
from engine.imaging.quality.utility import class_utility, segmentation_utility
from engine.imaging.volume import Volume, write_volume

CPU = torch.device("cpu")
SHORT = QualityConfig.model_validate(
    {
        "extractor": {
            "volumes": {"steps": 20, "batch_size": 8},
            "slices": {"steps": 20, "batch_size": 16},
            "components": 8,
        },
        "segmenter": {"steps": 60, "batch_size": 4, "widths": [8, 16], "learning_rate": 0.01},
        "utility": {"repeats": 1, "classifier": {"steps": 40, "batch_size": 8}},
        "halves": 6,
    }
)


def people(first: int, count: int, seed: int = 0) -> Side:
    """A bright ball, half of it label 1 and half label 2, in textured tissue; the radius follows the age, the side of a dark
    spot the sex."""
    i, j, k = np.meshgrid(*(np.arange(16.0),) * 3, indexing="ij")
    x, codes, cells = [], [], []
    for number in range(first, first + count):
        draw = seeding.generator(seed, "tests.quality", number)
        centre, radius = draw.normal(7.5, 0.5, 3), draw.uniform(3.0, 6.0)
        ball = np.sqrt((i - centre[0]) ** 2 + (j - centre[1]) ** 2 + (k - centre[2]) ** 2) < radius
        sex = int(draw.integers(2))
        spot = (slice(0, 4), slice(12, 16), slice(12, 16)) if sex else (slice(12, 16), slice(0, 4), slice(0, 4))
        image = 0.35 + 0.4 * ball + 0.06 * ndimage.gaussian_filter(draw.standard_normal(i.shape), 0.5)
        image[spot] = 0.1
        x.append(np.clip(image, 0, 1))
        codes.append(np.where(ball, np.where(j < centre[1], 1, 2), 0))
        cells.append({"age": f"{10 * radius:.2f}", "sex": "MF"[sex]})
    names = np.array([f"S{seed}-{number}" for number in range(first, first + count)])
    return Side(np.stack(x).astype(np.float32), names, np.stack(codes).astype(np.uint8), tuple(cells), 8.0)


TRAIN, REAL, FRESH = people(0, 48), people(100, 24), people(200, 24)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("networks")


@pytest.fixture(scope="module")
def good(cache):
    return {f.name: f for f in assess(REAL, TRAIN, FRESH, SHORT, labels=2, cache=cache, device="cpu").findings}


def assessed(side: Side, cache, labels: int = 2):
    """Without labels neither regions nor utility, which learn segmenters of their own."""
    return {f.name: f for f in assess(REAL, TRAIN, side, SHORT, labels=labels, cache=cache, device="cpu").findings}


# --- all of it on data whose right answer is known --------------------------------------------------------------------


def test_fresh_people_are_as_near_as_the_floor(good):
    wanted = {
        "frechet_self_3d", "kid_self_3d", "mmd_self_3d", "frechet_self_25d", "pair_ms_ssim", "covariate_error_age",
        "covariate_r_age", "covariate_auc_sex", "region_w1_1", "region_w1_2", "mask_w1_1", "mask_w1_2", "pair_dice_1",
        "pair_dice_2", "tstr_dice", "tstr_dice_ratio", *(f"{name}_self_3d" for name in PRDC),
    }  # fmt: skip
    assert set(good) == wanted
    for name in ("frechet_self_3d", "tstr_dice_ratio"):
        assert good[name].verdict == "pass", (name, good[name])
    for name in ("frechet_self_3d", "frechet_self_25d"):  # 18 scans: the floor itself goes from half to twice its mean
        assert good[name].value < 2 * good[name].detail["floor_interval"][1]
    for finding in good.values():
        assert finding.floor is not None
        low, high = finding.interval
        assert low <= finding.value <= high or finding.name.startswith(("frechet", "kid", "mmd", "region", "mask"))
    assert good["covariate_r_age"].value > 0.8 < good["covariate_r_age"].floor
    assert good["covariate_auc_sex"].value > 0.8
    assert good["pair_dice_1"].value > 0.8


def test_blur_is_seen_in_both_spaces(good, cache):
    blurred = replace(FRESH, x_ndhw=np.stack([ndimage.gaussian_filter(x, 1.0) for x in FRESH.x_ndhw]))
    bad = assessed(blurred, cache, labels=0)
    for name in ("frechet_self_3d", "frechet_self_25d"):
        assert bad[name].value > 2 * good[name].value
        assert bad[name].verdict == "fail"
    assert bad["mmd_self_3d"].value > 2 * good["mmd_self_3d"].floor


def test_one_scan_many_times_is_precise_and_covers_nothing(cache):
    bad = assessed(FRESH.take(np.zeros(24, dtype=int)), cache, labels=0)
    assert bad["recall_self_3d"].value < 0.1 < bad["recall_self_3d"].floor
    assert bad["coverage_self_3d"].value < 0.5 * bad["coverage_self_3d"].floor
    assert bad["pair_ms_ssim"].value > 0.99 > bad["pair_ms_ssim"].floor
    assert bad["frechet_self_3d"].verdict == "fail"


def test_masks_that_belong_to_other_images_and_wrong_volumes_are_seen(good, cache):
    order = np.roll(np.arange(24), 5)
    shuffled = replace(FRESH, codes_ndhw=FRESH.codes_ndhw[order], covariates=tuple(FRESH.covariates[k] for k in order))
    bad = assessed(shuffled, cache)
    assert bad["pair_dice_1"].value < good["pair_dice_1"].value - 0.1
    assert abs(bad["covariate_r_age"].value) < 0.6 < good["covariate_r_age"].value
    assert bad["region_w1_1"].value == good["region_w1_1"].value
    small = replace(FRESH, codes_ndhw=np.stack([ndimage.grey_erosion(c, size=3) for c in FRESH.codes_ndhw]))
    assert assessed(small, cache)["mask_w1_1"].verdict == "fail"


def test_a_person_in_both_sides_and_too_few_scans_are_refused():
    with pytest.raises(InputError, match="1 in both"):
        assess(REAL, replace(TRAIN, person_n=np.array(["S0-100", *TRAIN.person_n[1:]])), FRESH, SHORT)
    with pytest.raises(InputError, match="at least 8"):
        assess(REAL, TRAIN, FRESH.take(np.arange(7)), SHORT)


# --- extractors -------------------------------------------------------------------------------------------------------


def test_extractors_are_a_function_of_scans_and_seed_and_are_cached(tmp_path, monkeypatch):
    settings = SHORT.extractor
    first = features.learned_extractors(TRAIN.x_ndhw, settings, 0, CPU, tmp_path)
    again = features.learned_extractors(TRAIN.x_ndhw, settings, 0, CPU)
    assert [e.sha256 for e in first] == [e.sha256 for e in again]
    other = features.learned_extractors(REAL.x_ndhw, settings, 0, CPU, tmp_path)
    assert not {e.sha256 for e in first} & {e.sha256 for e in other}
    assert len(list(tmp_path.iterdir())) == 4

    def never(*_):
        raise AssertionError("learned again")

    monkeypatch.setattr(features, "train_encoder", never)
    cached = features.learned_extractors(TRAIN.x_ndhw, settings, 0, CPU, tmp_path)
    assert [e.sha256 for e in cached] == [e.sha256 for e in first]
    both = [features.volume_features(e[0], REAL.x_ndhw[:3]) for e in (first, cached)]
    np.testing.assert_array_equal(*both)
    with pytest.raises(AssertionError, match="learned again"):
        features.learned_extractors(TRAIN.x_ndhw, settings, 1, CPU, tmp_path)


def test_learning_makes_two_crops_of_a_scan_alike():
    """Neighbours in the learned space are the two views of one scan, more often than before learning."""

    def found(network: torch.nn.Module) -> float:
        hits = []
        for draw in range(8):
            views = features.two_views(
                REAL.x_ndhw, 3, LearningConfig(batch_size=24), 0, seeding.generator(draw, "tests")
            )
            with torch.no_grad():
                x, y = (network(view).numpy()[:, -128:] for view in views)
            x, y = ((v - v.mean(axis=0)) / (v.std(axis=0) + 1e-6) for v in (x, y))
            nearest = ((x[:, None] - y[None]) ** 2).sum(axis=2).argmin(axis=1)
            hits.append((nearest == np.arange(24)).mean())
        return float(np.mean(hits))

    torch.manual_seed(0)
    before = found(features.Encoder(3).eval())
    learned = features.train_encoder(TRAIN.x_ndhw, 3, LearningConfig(), 0, CPU)
    assert found(learned) > before + 0.1


def test_vicreg_is_zero_only_for_alike_spread_and_uncorrelated_descriptions():
    z = torch.from_numpy(seeding.generator(0, "tests").standard_normal((4096, 4)).astype(np.float32)) * 1.1
    assert float(features.vicreg(z, z)) < 0.1
    assert float(features.vicreg(z, z + 1)) > 20
    assert float(features.vicreg(0.1 * z, 0.1 * z)) > 20
    assert float(features.vicreg(z[:, :1].expand(-1, 4), z[:, :1].expand(-1, 4))) > 3


def test_reducer_gives_every_level_components_of_unit_variance():
    x = seeding.generator(1, "tests").standard_normal((60, 5)) * [1, 10, 3, 0, 2] + 4
    project, kept, explained = features.reducer(x, 4, [2, 3])
    y = project(x)
    assert (y.shape, kept) == ((60, 4), 4)
    assert 0 < explained <= 1
    np.testing.assert_allclose(y.var(axis=0, ddof=1), 1.0)
    np.testing.assert_allclose(project(x.reshape(6, 10, 5)).reshape(60, 4), y, atol=1e-12)
    other = x.copy()
    other[:, :2] += 5  # of the first level
    assert np.abs(project(other) - y)[:, :2].max() > 0.1
    np.testing.assert_array_equal(project(other)[:, 2:], y[:, 2:])


# --- weights of others ------------------------------------------------------------------------------------------------


def written(path, tensors, kind, **more) -> WeightsConfig:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}}, path)
    return WeightsConfig(kind=kind, path=path, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), **more)


def random_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        k: torch.rand(t.shape, generator=draw) * 0.1 + 0.01 if t.is_floating_point() else t
        for k, t in network.state_dict().items()
    }


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_medicalnet_weights_by_path_and_hash(tmp_path, suffix):
    state = random_state(features._medicalnet(10))
    brought = features.brought_extractor(written(tmp_path / f"w{suffix}", state, "medicalnet"), CPU)
    assert torch.equal(brought.network.state_dict()["layer4.0.conv2.weight"], state["layer4.0.conv2.weight"])
    assert features.volume_features(brought, REAL.x_ndhw[:2]).shape == (2, 512)
    wrong = WeightsConfig(kind="medicalnet", path=tmp_path / f"w{suffix}", sha256="0" * 64)
    with pytest.raises(InputError, match="SHA-256"):
        features.brought_extractor(wrong, CPU)
    with pytest.raises(InputError, match="tensors of medicalnet"):
        features.brought_extractor(written(tmp_path / f"x{suffix}", state, "medicalnet", depth=18), CPU)


def test_radimagenet_is_the_network_of_its_weights(tmp_path):
    """Names and shapes as the published port has them, and one block computed by hand: stride in the first convolution."""
    network = features._radimagenet()
    state = network.state_dict()
    assert {"conv1.bias", "layer1.0.downsample.0.bias", "layer4.2.conv3.bias"} <= set(state)
    assert state["layer4.0.conv1.weight"].shape == (512, 1024, 1, 1)
    assert state["layer2.0.downsample.0.weight"].shape == (512, 256, 1, 1)
    brought = features.brought_extractor(written(tmp_path / "r.safetensors", random_state(network), "radimagenet"), CPU)
    block = brought.network.layer2[0]
    x = torch.rand(1, 256, 8, 8)
    by_hand = torch.nn.functional.conv2d(x[:, :, ::2, ::2], block.conv1.weight, block.conv1.bias)
    torch.testing.assert_close(block.conv1(x), by_hand)
    assert block.conv2.stride == (1, 1)
    found = features.slice_features(brought, REAL.x_ndhw[:2])
    assert {k: v.shape for k, v in found.items()} == dict.fromkeys(features.PLANES, (2, 8, 2048))


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"state_dict": Hostile()}, tmp_path / "bad.pth")
    sha256 = hashlib.sha256((tmp_path / "bad.pth").read_bytes()).hexdigest()
    with pytest.raises(InputError, match="plain tensors"):
        features.brought_extractor(WeightsConfig(kind="medicalnet", path=tmp_path / "bad.pth", sha256=sha256), CPU)


# --- the small parts --------------------------------------------------------------------------------------------------


def test_mmd_is_unbiased_and_sees_a_shift():
    draws = [seeding.generator(1, "tests", k) for k in range(200)]
    values = [mmd(r.standard_normal((12, 4)), r.standard_normal((12, 4)), 2.0) for r in draws]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200)
    r = seeding.generator(2, "tests")
    x = r.standard_normal((50, 4))
    assert mmd(x, r.standard_normal((50, 4)) + 1.0, bandwidth(x)) > 0.1
    assert bandwidth(np.array([[0.0], [1.0], [3.0]])) == 2.0


def test_scales_follow_the_room_there_is():
    assert [scales_of((n, n, n)) for n in (6, 7, 16, 28, 32, 56, 63, 112, 512)] == [0, 1, 2, 3, 3, 3, 4, 5, 5]
    for n in (16, 28, 63):  # MONAI takes what was chosen
        x = np.random.default_rng(0).random((3, n, n, n)).astype(np.float32)
        assert len(ms_ssim_pairs(x, np.array(list("abc")), 0)) == 3
        assert ms_ssim_pairs(x[[0, 0, 0]], np.array(list("abc")), 0) == pytest.approx(1.0)
    assert len(ms_ssim_pairs(x, np.array(list("aaa")), 0)) == 0


def test_halves_are_of_other_people_and_the_floor_is_their_mean():
    person = np.array([f"P{k // 2}" for k in range(20)])
    splits = halves(list(person), 8, 0)
    for first, second in splits:
        assert not {*person[first]} & {*person[second]}
        assert sorted([*first, *second]) == list(range(20))
    assert len({tuple(first) for first, _ in splits}) > 1
    value, (low, high) = floor_of(lambda a, b: float(len(a) + len(b)), splits, 5, 0)
    assert (value, low, high) == (10.0, 10.0, 10.0)


def test_dice_and_volumes_by_hand():
    a, b = np.zeros((2, 2, 2, 2), np.uint8), np.zeros((2, 2, 2, 2), np.uint8)
    a[0, 0, 0], b[0, 0, :, 0] = 1, 1  # two voxels each, one shared
    np.testing.assert_allclose(dice(a, b, 2), [[0.5, np.nan], [np.nan, np.nan]])
    np.testing.assert_array_equal(volumes_mm3(a, 2, 3.0), [[6.0, 0.0], [0.0, 0.0]])


def test_kinds_of_covariates():
    def cells(values):
        return [{"x": v} if v else {} for v in values]

    assert kind_of(cells([str(k / 7) for k in range(40)]), "x") == "continuous"
    assert kind_of(cells(["a", "b"] * 20), "x") == "categorical"
    assert kind_of(cells(["a", "b"] * 10), "x") is None
    assert kind_of(cells(["a"] * 38 + ["b"] * 2), "x") is None
    assert kind_of(cells([f"note {k}" for k in range(40)]), "x") is None
    assert kind_of(cells([""] * 15 + ["a", "b"] * 15), "x") == "categorical"


def test_area_of_levels_by_hand():
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.4, 0.6]])
    assert auc(p, np.array([0, 1, 0, 1])) == 1.0
    assert auc(p, np.array([1, 0, 1, 0])) == 0.0
    assert auc(p, np.array([1, 1, 1, 1])) is None


def test_covariates_that_a_side_lacks_make_no_finding():
    rows = [{"age": str(k)} for k in range(40)]
    x = np.arange(40.0)[:, None]
    person = np.arange(40).astype(str)
    assert fidelity("age", "continuous", (x, rows), (x, rows, person), (x, [{}] * 40), 0) == []
    error, r = fidelity("age", "continuous", (x, rows), (x, rows, person), (x, rows), 0)
    assert error.value < 0.5
    assert r.value > 0.999


def test_utility_of_noise_in_place_of_images_fails_the_goal():
    noise = replace(FRESH, x_ndhw=np.random.default_rng(0).random(FRESH.x_ndhw.shape, dtype=np.float32))
    bad = {f.name: f for f in segmentation_utility(TRAIN, noise, REAL, 2, SHORT, 0, CPU)}
    assert bad["tstr_dice"].n == {"trained_on": 24, "tested_on": 24}
    assert bad["tstr_dice_ratio"].verdict == "fail"
    assert bad["tstr_dice"].floor > 0.8


def test_utility_of_classes_falls_with_shuffled_ones():
    def marked(side: Side) -> Side:
        x = side.x_ndhw.copy()
        for k, row in enumerate(side.covariates):
            x[k, :6, :6, :6] = 1.0 if row["sex"] == "F" else x[k, :6, :6, :6]
        return replace(side, x_ndhw=x)

    train, fresh, real = marked(TRAIN), marked(FRESH), marked(REAL)
    good = {f.name: f for f in class_utility(train, fresh, real, "sex", SHORT, 0, CPU)}
    assert good["tstr_auc_sex"].floor > 0.9
    assert good["tstr_auc_sex_ratio"].verdict == "pass"
    swapped = replace(fresh, covariates=tuple({"sex": "FM"["FM".index(c["sex"]) ^ 1]} for c in fresh.covariates))
    assert {f.name: f for f in class_utility(train, swapped, real, "sex", SHORT, 0, CPU)}["tstr_auc_sex"].value < 0.3
    assert class_utility(train, replace(fresh, covariates=({},) * 24), real, "sex", SHORT, 0, CPU) == []


def test_config_names_the_nearest_key(tmp_path):
    (tmp_path / "q.yaml").write_text("segmenter: {stepz: 5}\n")
    with pytest.raises(InputError, match="steps"):
        load_quality_config(tmp_path / "q.yaml")
    (tmp_path / "q.yaml").write_text(
        f"extractor: {{weights: [{{kind: medicalnet, path: w.pth, sha256: '{'0' * 64}'}}]}}\n"
    )
    config = load_quality_config(tmp_path / "q.yaml", ["segmenter.steps=7"])
    assert config.segmenter.steps == 7
    assert config.extractor.weights[0].path == tmp_path / "w.pth"
    assert load_quality_config(None) == QualityConfig()


def test_shipped_configs_say_what_they_are():
    folder = Path(__file__).resolve().parents[2] / "configs" / "imaging"
    assert load_quality_config(folder / "evaluate.yaml") == QualityConfig()
    assert load_quality_config(folder / "evaluate_adrenal.yaml").utility.classes == ["class"]


def test_label_values_refuse_what_is_no_label_map():
    def volume(values):
        return Volume(np.array(values, np.float32).reshape(1, 1, 1, -1), np.eye(4), None, "arbitrary", {})

    assert label_values([volume([0, 2]), volume([0, 7])]) == [2, 7]
    for wrong in ([0.5], [-1], [300], list(range(100))):
        with pytest.raises(InputError, match="whole numbers"):
            label_values([volume(wrong)])


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_reads_labels_and_covariates_from_tables(tmp_path):
    for name, side in (("real", REAL), ("train", TRAIN), ("synthetic", FRESH)):
        folder = tmp_path / name
        folder.mkdir()
        rows = []
        for k in range(len(side)):
            image = Volume(1000 * side.x_ndhw[k][None], np.diag([2.0, 2, 2, 1]), "MR", "arbitrary", {})
            write_volume(image, folder / f"i{k}.nii.gz")
            write_volume(
                replace(image, array_cdhw=3.0 * side.codes_ndhw[k][None], modality=None), folder / f"l{k}.nii.gz"
            )
            rows.append([f"i{k}.nii.gz", f"l{k}.nii.gz", side.person_n[k], *side.covariates[k].values()])
        with (folder / "volumes.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["image", "label", "subject", "age", "sex"], *rows])
    (tmp_path / "train" / "config.yaml").write_text("")  # as in a run folder
    where = [tmp_path / name for name in ("real", "synthetic")]
    short = ["extractor.volumes.steps=3", "extractor.slices.steps=3", "segmenter.steps=3", "utility.repeats=1"]
    result = evaluate_command(*where, train=tmp_path / "train" / "volumes.csv", overrides=short, out=tmp_path / "out")
    names = {f["name"] for f in result["findings"]}
    assert {"frechet_shape", "frechet_self_25d", "mask_w1_2", "covariate_r_age", "tstr_dice_ratio"} <= names
    assert set(result["networks"]) == {"self_3d", "self_2.5d", "segmenter"}
    assert any((tmp_path / "train" / "cache").iterdir())
    quick = evaluate_command(*where, train=tmp_path / "train" / "volumes.csv", quick=True)
    assert {f["name"] for f in quick["findings"]} == {n for n in names if n in {f["name"] for f in quick["findings"]}}
    assert "frechet_self_3d" not in {f["name"] for f in quick["findings"]}
