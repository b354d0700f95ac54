from __future__ import annotations

import nibabel
import numpy as np
import pytest
import torch
from nilearn import datasets, image

from engine.cohort import heads
from engine.cohort.config import ScannerConfig
from engine.cohort.measure import measure
from engine.imaging.volume import Volume

SCANNER = ScannerConfig()
CLEAN = ScannerConfig(noise=0.0, contrast_sd=0.0, bias_sd=0.0, gain_sd=0.0)


@pytest.fixture(scope="module")
def base() -> heads.Template:
    return heads.template(SCANNER)


def place(base: heads.Template, person: int = 0, shape_mm: float = 2.5, brain_mm3: float = 1.5e6) -> torch.Tensor:
    return heads.person_map(base, seed=5, person=person, shape_mm=shape_mm, brain_mm3=brain_mm3, sulci_log=0.1)


def centre_mm(scan: nibabel.Nifti1Image) -> np.ndarray:
    """Centre of mass in mm, by the image's own affine."""
    return nibabel.affines.apply_affine(scan.affine, heads.ndimage.center_of_mass(scan.get_fdata()))


def test_the_ventricles_of_the_template_keep_their_volume_on_the_working_grid(base: heads.Template) -> None:
    t1, affine = heads._packaged("t1")
    depth_mm = heads.ndimage.distance_transform_edt(heads.ndimage.binary_fill_holes(t1 > 0.01))
    at_1mm = heads._lateral_ventricles(t1, depth_mm, affine)
    on_grid = float(base.channels_cdhw[2].sum()) * base.voxel_mm**3
    assert on_grid == pytest.approx(at_1mm.sum(), rel=0.01)
    left, right = at_1mm[: at_1mm.shape[0] // 2].sum(), at_1mm[at_1mm.shape[0] // 2 :].sum()
    assert abs(left - right) < 0.1 * at_1mm.sum()  # the template is symmetric: one side missing would show


@pytest.mark.parametrize("wanted_mm3", [12_000.0, 30_000.0, 80_000.0])
def test_the_wanted_ventricle_volume_is_reached(base: heads.Template, wanted_mm3: float) -> None:
    _, reached = heads.solve_flow(base, place(base), wanted_mm3)
    assert reached == pytest.approx(wanted_mm3, rel=0.002)


def test_truth_is_the_volume_of_the_whole_field_not_only_of_the_searched_box(base: heads.Template) -> None:
    where = place(base)
    time, reached = heads.solve_flow(base, where, 90_000.0)
    everywhere = heads._sample(base.channels_cdhw[2:3], heads._flow(base, time, where))
    assert float(everywhere.sum(dtype=torch.float64)) * base.voxel_mm**3 == pytest.approx(reached, rel=1e-4)


def test_brain_volume_follows_the_wanted_one_and_darkness_the_ventricles(base: heads.Template) -> None:
    found = []
    for volume in (15_000.0, 30_000.0, 45_000.0, 60_000.0):
        head = heads.scan(base, CLEAN, place(base), volume, seed=1, person=0, visit=1)
        assert head.brain_mm3 == pytest.approx(1.5e6, rel=0.03)
        found.append(float(measure([Volume(head.array_dhw[None], head.affine)]).dark_mm3[0]))
    assert np.all(np.diff(found) > 8_000)  # steps of 15 mL


def test_maps_do_not_fold(base: heads.Template) -> None:
    for person, time in ((0, 0.0), (1, -1.2), (2, 5.0)):
        where = heads._flow(base, time, place(base, person)).flip(-1).numpy().astype(float)
        size = np.array(where.shape[:3])
        voxel = (where + 1) * size / 2
        steps = np.stack(np.gradient(voxel, axis=(0, 1, 2)), axis=-1)
        inside = base.channels_cdhw[1].numpy() > 0.5
        assert np.linalg.det(steps)[inside].min() > 0


def test_geometry_is_ras_and_agrees_with_the_template_in_space(base: heads.Template) -> None:
    where = place(base, shape_mm=0.0, brain_mm3=base.brain_mm3)
    natural = float(np.exp(np.interp(0.0, base.flow_times_a, base.growth_a)))
    head = heads.scan(base, CLEAN, where, natural, seed=1, person=0, visit=1)
    assert head.array_dhw.shape == (32, 40, 32)
    assert head.array_dhw.dtype == np.float32
    assert nibabel.aff2axcodes(head.affine) == ("R", "A", "S")
    made = nibabel.Nifti1Image(head.array_dhw, head.affine)
    moved = image.resample_to_img(image.smooth_img(datasets.load_mni152_template(resolution=2), 4), made)
    r = np.corrcoef(moved.get_fdata().ravel(), head.array_dhw.ravel())[0, 1]
    assert r > 0.97
    template = datasets.load_mni152_template(resolution=2)
    assert centre_mm(made) == pytest.approx(centre_mm(template), abs=1.0)  # half a voxel would be 2.5 mm
    flipped = np.corrcoef(moved.get_fdata().ravel(), head.array_dhw[:, ::-1].ravel())[0, 1]
    assert flipped < 0.9  # the correlation can tell a wrong axis


def test_shape_belongs_to_the_person_and_noise_to_the_visit(base: heads.Template) -> None:
    assert torch.equal(place(base, 4), place(base, 4))
    assert not torch.equal(place(base, 4), place(base, 5))
    first, again, second = (
        heads.scan(base, SCANNER, place(base, 4), 3e4, seed=1, person=4, visit=v).array_dhw for v in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


def test_random_fields_have_unit_spread() -> None:
    drawn = heads.smooth_field(np.random.Generator(np.random.Philox(1)), (16, 20, 16), 5.0, 20.0, 200)
    assert drawn.std() == pytest.approx(1.0, abs=0.05)
    assert abs(drawn.mean()) < 0.08  # 200 fields of a few independent knots each
