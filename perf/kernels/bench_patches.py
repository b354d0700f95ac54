"""Patches beside MONAI: the blend of a whole sliding window around an identity network, and random crops to one batch.

Blend: both cut the windows out, call the network and blend, float32, roi 96^3, overlap 0.5, Gaussian. MONAI is run with the
batch of ours (4) and with 1, where it need not copy a window but the identity must, because MONAI multiplies the network's
answer in place. Ours writes to memory that it is given (`out=`, which MONAI lacks): after MONAI has freed its pages,
the first touch of fresh huge pages costs anything from 0.04 to 0.7 s at 512 x 512 x 400, the kernel's time to find them.
Gather: the same corners, with and without MONAI's own draw of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.kernels import patches
from perf.case import Case, Peer
from perf.peers import missing_package

ROI, OVERLAP = 96, 0.5
_LARGE = (512, 512, 400)


def volume(shape: tuple[int, int, int]) -> np.ndarray:
    """float32 (d, h, w); deterministic."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def cases() -> list[Case]:
    return [
        blend((256, 256, 256), goal=2.5),
        blend((256, 256, 256), goal=1.4, threads=2),
        blend(_LARGE, goal=2.5, quick=False),
        gather(32, 256, goal=8.0),
        gather(96, 24),
    ]


def curves() -> dict[str, list[Case]]:
    """Cost along the first axis, which is streamed, and along the last, which is one stream of memory."""
    return {
        "depth": [blend((depth, 192, 192)) for depth in (144, 288, 576)],
        "width": [blend((192, 192, width)) for width in (144, 288, 576)],
    }


def blend(shape: tuple[int, int, int], goal: float | None = None, threads: int = 1, quick: bool = True) -> Case:
    """Sliding window with the identity. Floor: windows written and read once, the volume read once, the result written once."""
    voxels, windows = float(np.prod(shape)), len(patches.grid_starts(shape, ROI, OVERLAP))

    def prepare() -> tuple[np.ndarray, np.ndarray]:
        return volume(shape), np.zeros(shape, dtype=np.float32)

    def run(inputs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return patches.sliding_window(inputs[0], lambda x: x, ROI, OVERLAP, batch=4, out=inputs[1])

    return Case(
        "patches.blend",
        dict(zip(("depth", "height", "width"), shape)),
        voxels,
        "voxels",
        prepare,
        run,
        peers=tuple(
            Peer(
                f"monai.sliding_window_inference batch {batch}",
                _monai_blend(batch, threads),
                prepare=lambda inputs: inputs[0],
                same=_close,
                goal=goal,
                missing=lambda: missing_package("monai"),
            )
            for batch in (4, 1)
        ),
        floor_bytes=4 * (2 * windows * ROI**3 + 2 * voxels),
        limit="copy",
        threads=threads,
        quick=quick,
    )


def gather(roi: int, n: int, goal: float | None = None) -> Case:
    """n random crops of a 256^3 volume. Floor: each voxel read and written once."""
    shape = (256, 256, 256)

    def prepare() -> tuple[np.ndarray, np.ndarray]:
        return volume(shape), patches.random_starts(shape, roi, n, seed=0)

    def run(inputs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return patches.gather(inputs[0], inputs[1], roi)

    return Case(
        "patches.gather",
        {"roi": roi, "patches": n},
        float(n),
        "patches",
        prepare,
        run,
        peers=(
            Peer(
                "monai.SpatialCrop", _monai_crop(roi), same=_equal, goal=goal, missing=lambda: missing_package("monai")
            ),
            Peer(
                "monai.RandSpatialCropSamples",
                _monai_random(roi, n),
                goal=goal,
                missing=lambda: missing_package("monai"),
            ),
        ),
        floor_bytes=8.0 * n * roi**3,
        limit="copy",
    )


def _monai_blend(batch: int, threads: int) -> Any:
    def run(volume_dhw: np.ndarray) -> np.ndarray:
        import torch
        from monai.inferers import sliding_window_inference

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            blended = sliding_window_inference(
                torch.from_numpy(volume_dhw)[None, None],
                (ROI,) * 3,
                batch,
                (lambda x: x) if batch > 1 else (lambda x: x.clone()),
                overlap=OVERLAP,
                mode="gaussian",
            )
        finally:
            torch.set_num_threads(before)
        return blended[0, 0].numpy()

    return run


def _monai_crop(roi: int) -> Any:
    def run(inputs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        import torch
        from monai.transforms import SpatialCrop

        image = torch.from_numpy(inputs[0])[None]
        crops = [SpatialCrop(roi_start=s, roi_end=[a + roi for a in s])(image) for s in inputs[1].tolist()]
        return torch.stack([crop.as_tensor() for crop in crops])[:, 0].numpy()

    return run


def _monai_random(roi: int, n: int) -> Any:
    def run(inputs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        import torch
        from monai.transforms import RandSpatialCropSamples

        crop = RandSpatialCropSamples((roi,) * 3, n, random_size=False)
        crop.set_random_state(0)
        return torch.stack([c.as_tensor() for c in crop(torch.from_numpy(inputs[0])[None])])[:, 0].numpy()

    return run


def _close(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def _equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_array_equal(ours, theirs)
