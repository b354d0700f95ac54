"""Two visits of a real patient come to lie on one another."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import affine_transform, gaussian_filter


@pytest.fixture
def module(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "perf" / "imaging"))
    return importlib.import_module("follow_up_ms")


def itk(matrix: np.ndarray, translation: list[float], centre: list[float]) -> str:
    parameters = " ".join(map(str, [*matrix.ravel(), *translation]))
    return f"#Insight Transform File V1.0\nParameters: {parameters}\nFixedParameters: {' '.join(map(str, centre))}\n"


def test_visits_come_to_the_common_space_by_itks_transforms(module, tmp_path):
    """A phantom is moved as ITK would move it: raw(T(x)) = common(x), x in LPS mm."""
    shape, affine = (48, 56, 24), np.diag([-0.75, -0.75, 3.0, 1.0])
    affine[:3, 3] = 20.0, 25.0, -30.0
    common = gaussian_filter(np.random.default_rng(0).normal(size=shape), 2).astype(np.float32)
    common += 5 * common.std() - common.min()
    angle = np.deg2rad(7.0)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    brain = np.zeros(shape, np.uint8)
    brain[12:-12, 14:-14, 6:-6] = 1
    for folder in ("raw/patient01", "coregistered/patient01"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("brainmask", "gt"):
        nib.save(nib.Nifti1Image(brain, affine), tmp_path / "coregistered/patient01" / f"{name}.nii.gz")
    for study, matrix, translation, centre in (
        (1, np.eye(3), [1.5, -2.25, 3.0], [0.0, 0.0, 0.0]),
        (2, turn, [0.0, 1.0, 0.0], [-25.0, 30.0, 4.0]),  # an offset of 5 mm by the centre alone
    ):
        point = np.eye(4)  # common LPS to raw LPS, written out: matrix (x - centre) + centre + translation
        point[:3, :3], point[:3, 3] = matrix, np.array(translation) + centre - matrix @ centre
        lps = np.diag([-1.0, -1.0, 1.0, 1.0])
        back = np.linalg.inv(affine) @ np.linalg.inv(lps @ point @ lps) @ affine  # raw index to common index
        raw = affine_transform(common, back[:3, :3], back[:3, 3], order=3)
        nib.save(nib.Nifti1Image(raw, affine), tmp_path / f"raw/patient01/study{study}_FLAIR.nii.gz")
        text = itk(matrix, translation, centre)
        (tmp_path / f"raw/patient01/study{study}_FLAIR_to_common_space.txt").write_text(text)
    patient = module.Patient(tmp_path, "patient01", 0.5)
    truth, inside = module.coarser(common), patient.brain
    assert inside.sum() == 12 * 14 * 12
    for visit in patient.visits:
        assert np.corrcoef(visit[inside], truth[inside])[0, 1] > 0.98
