"""How alike two volumes are once one has been moved onto the other: normalised cross-correlation (NCC), global and local,
and 3D-SSIM, after a rigid or affine registration that may also mirror left and right.

The registration maximises NCC by Gauss-Newton steps on a pyramid, from many turned starts on its coarsest level; every
start of a pair is refined in one batch, which takes about a tenth of a second for 32 x 48 x 32 voxels on one core. It is
made for confirming that one scan is a copy of another. It is no normalisation to a template, and knows nothing of
anatomy: which pairs to compare, and what a value means, is left to `audit_judges`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from engine.errors import InputError, UsageError
from engine.imaging.volume import Volume

SSIM_WINDOW = 7  # voxels, as Wang et al. and scikit-image use it with a flat window
_START_DEGREES = (-20.0, 0.0, 20.0)  # of the coarsest level, about every axis
_KEPT = (6, 3, 1)  # starts refined on the coarsest level, the second, and later ones, of each of plain and mirrored
_ITERATIONS = (12, 8, 6)  # Gauss-Newton steps on the coarsest, the second, every later level
_SETTLED = 1e-6  # NCC: two steps that gain less end a level
_COARSEST = 7  # voxels: a level whose smallest axis would have fewer is not made
_MOST_VOXELS = 48**3  # of the finest level; NCC and SSIM are measured at full resolution all the same
_LEAST_OVERLAP = 0.6  # share of the fixed volume; less, and a match is of the margins
_FLAT = 1e-6  # a deviation below this share of the largest value is no structure

Motion = Literal["rigid", "affine"]


@dataclass(frozen=True)
class Registration:
    """How a moving volume lies on a fixed one.

    Attributes:
        matrix: float64 (4, 4); a point of the fixed grid, in mm from the centre of its field of view along the grid's own
            axes, to the point of the moving grid, likewise, that belongs there.
        mirrored: the moving volume is mirrored along its first axis (left-right in RAS) before.
        overlap: share of the fixed voxels that fall inside the moving field of view.
        ncc: on the finest level registered, over the overlap.
    """

    matrix: NDArray[np.float64]
    mirrored: bool
    overlap: float
    ncc: float

    @property
    def degrees(self) -> float:
        """Angle of the turn."""
        u, _, v = np.linalg.svd(self.matrix[:3, :3])
        return math.degrees(math.acos(float(np.clip((np.trace(u @ v) - 1) / 2, -1, 1))))


@dataclass(frozen=True)
class Similarity:
    """Registered similarity over the overlap: `ncc`, `local_ncc` and `ssim`, each at most 1; and how it was reached."""

    ncc: float
    local_ncc: float
    ssim: float
    registration: Registration


def ncc(a_dhw: NDArray, b_dhw: NDArray, mask_dhw: NDArray | None = None) -> float:
    """Pearson correlation of two arrays of one shape, -1 .. 1, over the voxels of a boolean mask; 0 where one is constant
    or the mask is empty.

    Raises:
        InputError: the shapes differ.
    """
    _check_shapes(a_dhw, b_dhw, mask_dhw)
    x = np.asarray(a_dhw, np.float64)[slice(None) if mask_dhw is None else mask_dhw].ravel()
    y = np.asarray(b_dhw, np.float64)[slice(None) if mask_dhw is None else mask_dhw].ravel()
    if len(x) == 0:
        return 0.0
    scale_x, scale_y = np.abs(x).max(), np.abs(y).max()
    x, y = x - x.mean(), y - y.mean()
    norm_x, norm_y = np.linalg.norm(x), np.linalg.norm(y)
    few = _FLAT * math.sqrt(len(x))
    if norm_x <= few * scale_x or norm_y <= few * scale_y:
        return 0.0
    return float(np.clip(x @ y / (norm_x * norm_y), -1.0, 1.0))


def local_ncc(a_dhw: NDArray, b_dhw: NDArray, mask_dhw: NDArray | None = None, window: int = SSIM_WINDOW) -> float:
    """Mean over voxels of the correlation within a cube of `window` voxels about each; -1 .. 1.

    Only cubes that lie wholly in the volume and in the mask count, and a cube in which a side has no structure counts 0.
    NaN where no cube is left.

    Raises:
        InputError: the shapes differ. UsageError: an even window.
    """
    _check_shapes(a_dhw, b_dhw, mask_dhw)
    return _local_ncc(_moments(a_dhw, b_dhw, mask_dhw, window), a_dhw, b_dhw)


def ssim(
    a_dhw: NDArray,
    b_dhw: NDArray,
    mask_dhw: NDArray | None = None,
    *,
    data_range: float | None = None,
    window: int = SSIM_WINDOW,
) -> float:
    """Mean structural similarity in three dimensions, at most 1: flat cubic window, sample covariances, K1 = 0.01, K2 =
    0.03, over the windows that lie wholly in the volume and in the mask. NaN where there is none.

    Args:
        data_range: of the intensities; default: that of `a_dhw`.

    Raises:
        InputError: the shapes differ. UsageError: an even window.

    Source: Wang, Bovik, Sheikh and Simoncelli, IEEE Transactions on Image Processing 13 (2004), equation 13.
    """
    _check_shapes(a_dhw, b_dhw, mask_dhw)
    span = float(np.ptp(a_dhw)) if data_range is None else data_range
    return _ssim(_moments(a_dhw, b_dhw, mask_dhw, window), span, window)


def similarity(fixed: Volume, moving: Volume, *, motion: Motion = "rigid", mirror: bool = True) -> Similarity:
    """Register `moving` onto `fixed` and compare them at full resolution, over the overlap. Of volumes with several
    channels the mean over channels is compared.

    For SSIM, which sees brightness, the moved volume first gets the gain and offset that fit it best to the fixed one.

    Raises:
        InputError: shapes or spacings differ, or a value is not finite.
    """
    found = register(fixed, moving, motion=motion, mirror=mirror)
    a = _single(fixed)
    b, inside = moved(moving, found)
    gain, offset = _linear_fit(b[inside], a[inside])
    fitted = gain * b + offset
    moments = _moments(a, fitted, inside, SSIM_WINDOW)
    return Similarity(
        ncc(a, b, inside), _local_ncc(moments, a, fitted), _ssim(moments, float(np.ptp(a)), SSIM_WINDOW), found
    )


def register(fixed: Volume, moving: Volume, *, motion: Motion = "rigid", mirror: bool = True) -> Registration:
    """The motion of `moving` that gives the highest NCC with `fixed` over their overlap (at least 60 %).

    Turns up to about 30 degrees about any axis and shifts of about a quarter of the field of view are found.

    Args:
        motion: "rigid" (6 parameters) or "affine" (12).
        mirror: also try the moving volume mirrored along its first axis.

    Raises:
        InputError: shapes or spacings differ, or a value is not finite.

    Source: Lucas and Kanade, IJCAI 1981, with gain and offset of the intensities as in Evangelidis and Psarakis, IEEE
    PAMI 30 (2008).
    """
    a, b = _single(fixed), _single(moving)
    if a.shape != b.shape or not np.allclose(fixed.spacing_mm, moving.spacing_mm, rtol=1e-3):
        raise InputError(
            f"two volumes of shape {a.shape} and spacing {_short(fixed.spacing_mm)} mm",
            f"{b.shape}, {_short(moving.spacing_mm)} mm",
            "registration",
        )
    extent = extent_mm(fixed)
    with one_thread():
        return _search(a, b, extent, motion, mirror)


def moved(moving: Volume, registration: Registration) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The (mean channel of the) moving volume on the fixed grid, trilinear, float32; and which voxels it covers."""
    x = _single(moving)
    image = torch.from_numpy(np.ascontiguousarray(x[::-1] if registration.mirrored else x))
    found, inside = move(image, extent_mm(moving), torch.from_numpy(registration.matrix)[None])
    return found[0].numpy(), inside[0].numpy()


def move(image_dhw: Tensor, extent: Tensor, matrix_s44: Tensor) -> tuple[Tensor, Tensor]:
    """The image under every matrix (as in `Registration`), float32 (s, d, h, w), its border continued; and what lay inside.

    Args:
        image_dhw: float32; may be a coarser version of a volume.
        extent: of the field of view in mm, float64 (3,), as `extent_mm` gives it.
    """
    size = image_dhw.shape
    points, half = _points(tuple(size), extent)
    found, inside = _sample(image_dhw[None, None].expand(len(matrix_s44), -1, -1, -1, -1), points, half, matrix_s44)
    return found[:, 0].view(-1, *size), inside.view(-1, *size)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch uses one thread: the tensors here are small, and on a busy machine threads that wait for each other took
    twenty times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def coarser(x_bcdhw: Tensor, size: Sequence[int]) -> Tensor:
    """Means over `size` equal parts of the field of view."""
    d, h, w = size
    return F.adaptive_avg_pool3d(x_bcdhw, (d, h, w))


def turn(degrees: Sequence[float]) -> Tensor:
    """Matrix that turns by these angles, as one rotation vector; float64 (4, 4)."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.matrix_exp(torch.einsum("k,kij->ij", angles, _generators("rigid")[3:]))


def extent_mm(volume: Volume) -> Tensor:
    """Size of the field of view along the grid's axes, in mm: voxels times spacing, float64 (3,)."""
    return torch.tensor([n * s for n, s in zip(volume.shape_dhw, volume.spacing_mm)], dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------------ p


def _search(
    a: NDArray[np.float32], b: NDArray[np.float32], extent: Tensor, motion: Motion, mirror: bool
) -> Registration:
    sizes = _pyramid(a.shape)
    images_vdhw = torch.from_numpy(np.stack([b, b[::-1]] if mirror else [b]))  # as it is and mirrored
    matrix_s44 = _starts().repeat(len(images_vdhw), 1, 1)
    version_s = torch.arange(len(images_vdhw)).repeat_interleave(len(_starts()))
    for level, size in enumerate([sizes[0], *sizes]):  # the first time to choose among the starts
        target, images = coarser(torch.from_numpy(a)[None, None], size)[0, 0], coarser(images_vdhw[None], size)[0]
        steps = ((0, *_ITERATIONS) + _ITERATIONS[-1:] * len(sizes))[level]
        matrix_s44, score_s, overlap_s = _refine(target, images[version_s], extent, matrix_s44, motion, steps)
        order = score_s.argsort(descending=True, stable=True)
        kept = (_KEPT + _KEPT[-1:] * len(sizes))[level]
        order = torch.cat([order[version_s[order] == v][:kept] for v in range(len(images_vdhw))])
        matrix_s44, score_s, overlap_s, version_s = (x[order] for x in (matrix_s44, score_s, overlap_s, version_s))
    best = int(score_s.argmax())
    return Registration(matrix_s44[best].numpy(), bool(version_s[best]), float(overlap_s[best]), float(score_s[best]))


def _check_shapes(*arrays: NDArray | None) -> None:
    shapes = [np.shape(array) for array in arrays if array is not None]
    if len(set(shapes)) > 1:
        raise InputError(f"two volumes of shape {shapes[0]}", str(shapes[1:])[1:-1], "similarity")


def _short(values: tuple[float, ...]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def _single(volume: Volume) -> NDArray[np.float32]:
    array = np.ascontiguousarray(volume.array_cdhw.mean(axis=0, dtype=np.float32))
    if not np.isfinite(array).all():
        raise InputError("finite intensities", "NaN or infinity", "registration")
    return array


def _moments(a_dhw: NDArray, b_dhw: NDArray, mask_dhw: NDArray | None, window: int) -> list[NDArray[np.float64]]:
    """Means of both, their population variances and covariance within every cube of `window` voxels that lies wholly in
    the volume and in the mask, each (cubes,)."""
    if window < 3 or window % 2 == 0:
        raise UsageError("an odd window of 3 or more voxels", str(window), "similarity")
    mask = np.ones(np.shape(a_dhw), bool) if mask_dhw is None else np.asarray(mask_dhw, bool)
    whole_dhw = ndimage.minimum_filter(mask, window, mode="constant", cval=0)
    a, b = np.asarray(a_dhw, np.float64), np.asarray(b_dhw, np.float64)
    centre_a, centre_b = a.mean(), b.mean()
    a, b = a - centre_a, b - centre_b  # for the digits' sake

    def mean(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return ndimage.uniform_filter(x, window, mode="nearest")[whole_dhw]

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = np.maximum(mean(a * a) - mean_a**2, 0), np.maximum(mean(b * b) - mean_b**2, 0)
    return [mean_a + centre_a, mean_b + centre_b, var_a, var_b, mean(a * b) - mean_a * mean_b]


def _local_ncc(moments: list[NDArray[np.float64]], a_dhw: NDArray, b_dhw: NDArray) -> float:
    _, _, var_a, var_b, cov = moments
    if len(cov) == 0:
        return math.nan
    flat_a, flat_b = ((_FLAT * float(np.abs(x).max())) ** 2 for x in (a_dhw, b_dhw))
    structured = (var_a > flat_a) & (var_b > flat_b)
    value = np.where(structured, cov / np.sqrt(np.where(structured, var_a * var_b, 1.0)), 0.0)
    return float(np.clip(value, -1.0, 1.0).mean())


def _ssim(moments: list[NDArray[np.float64]], span: float, window: int) -> float:
    mean_a, mean_b, var_a, var_b, cov = moments
    if len(cov) == 0:
        return math.nan
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    sample = window**3 / (window**3 - 1)
    top = (2 * mean_a * mean_b + c1) * (2 * sample * cov + c2)
    bottom = (mean_a**2 + mean_b**2 + c1) * (sample * (var_a + var_b) + c2)
    return float(np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), 1.0).mean())


def _linear_fit(x_n: NDArray, y_n: NDArray) -> tuple[float, float]:
    """Gain and offset of least squares from x to y; a negative or undetermined gain becomes 0."""
    x, y = x_n.astype(np.float64), y_n.astype(np.float64)
    if len(x) == 0:
        return 1.0, 0.0
    spread = x.var()
    flat = spread <= (_FLAT * np.abs(x).max()) ** 2
    gain = 0.0 if flat else max(0.0, float(((x - x.mean()) * (y - y.mean())).mean() / spread))
    return gain, float(y.mean() - gain * x.mean())


def _pyramid(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Sizes from coarse to fine, each axis about twice the one before, the finest of at most `_MOST_VOXELS`."""
    factor = max(1.0, (math.prod(shape) / _MOST_VOXELS) ** (1 / 3))
    sizes = [tuple(max(1, round(n / factor)) for n in shape)]
    while len(sizes) < 4 and min(math.ceil(n / 2) for n in sizes[0]) >= _COARSEST:
        sizes.insert(0, tuple(math.ceil(n / 2) for n in sizes[0]))
    return sizes


@cache
def _starts() -> Tensor:
    """The identity and turns of `_START_DEGREES` about every axis, float64 (s, 4, 4)."""
    return torch.stack([turn(degrees) for degrees in itertools.product(_START_DEGREES, repeat=3)])


def _generators(motion: Motion) -> Tensor:
    """Directions in which a matrix may move, float64 (k, 4, 4): shifts in mm, then turns in radians or any linear map."""
    made = torch.zeros(6 if motion == "rigid" else 12, 4, 4, dtype=torch.float64)
    for axis in range(3):
        made[axis, axis, 3] = 1.0
    if motion == "affine":
        for k, (row, column) in enumerate(itertools.product(range(3), repeat=2)):
            made[3 + k, row, column] = 1.0
        return made
    for k, (i, j) in enumerate(((1, 2), (2, 0), (0, 1))):
        made[3 + k, i, j], made[3 + k, j, i] = -1.0, 1.0
    return made


def _points(size: tuple[int, ...], extent: Tensor) -> tuple[Tensor, Tensor]:
    """Voxel centres in mm from the centre of the field of view, float32 (n, 3), and the outermost ones (3,)."""
    spacing = extent / torch.tensor(size)
    axes = [(torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * s for n, s in zip(size, spacing)]
    half = spacing * (torch.tensor(size, dtype=torch.float64) - 1) / 2
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, 3).float(), half.clamp(min=1e-6).float()


def _sample(image_scdhw: Tensor, point_n3: Tensor, half_mm: Tensor, matrix_s44: Tensor) -> tuple[Tensor, Tensor]:
    """Values (s, c, n) of the images at the moved points, trilinear, and whether each lies inside (s, n)."""
    matrix = matrix_s44.float()
    at = (point_n3 @ matrix[:, :3, :3].mT + matrix[:, None, :3, 3]) / half_mm
    inside = (at.abs() <= 1.0 + 1e-5).all(dim=-1)
    grid = at.flip(-1)[:, :, None, None]
    found = F.grid_sample(image_scdhw, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return found[..., 0, 0], inside


def _refine(
    target_dhw: Tensor, image_sdhw: Tensor, extent: Tensor, matrix_s44: Tensor, motion: Motion, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Damped Gauss-Newton steps on every start, each with its image: matrices, NCC (-1 below the least overlap), overlap.

    The target is regressed on the moved image, its change along every direction of motion, and 1: the coefficients of the
    changes over that of the image are the step, and brightness and contrast drop out.
    """
    size = tuple(target_dhw.shape)
    points, half = _points(size, extent)
    spacing = (extent / torch.tensor(size)).tolist()
    image_scdhw = torch.stack([image_sdhw, *torch.gradient(image_sdhw, spacing=spacing, dim=(1, 2, 3))], dim=1)
    basis = _generators(motion)
    along = torch.einsum("kij,nj->kni", basis[:, :3, :3].float(), points) + basis[:, None, :3, 3].float()
    target = target_dhw.reshape(-1)

    def look(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found, inside = _sample(image_scdhw, points, half, matrix)
        weight = inside.float()
        total = weight.sum(dim=1, keepdim=True).clamp(min=1.0)
        overlap = weight.mean(dim=1)
        x = (found[:, 0] - (weight * found[:, 0]).sum(1, keepdim=True) / total) * weight
        y = (target - (weight * target).sum(1, keepdim=True) / total) * weight
        norm = (x.square().sum(1) * y.square().sum(1)).sqrt()
        score = torch.where(norm > 0, (x * y).sum(1) / norm.clamp(min=1e-20), torch.zeros_like(norm))
        return found, weight, torch.where(overlap >= _LEAST_OVERLAP, score, -torch.ones_like(score)), overlap

    found, weight, score, overlap = look(matrix_s44)
    damping = torch.full((len(matrix_s44),), 1e-3, dtype=torch.float64)
    idle = 0
    for _ in range(iterations):
        slopes = matrix_s44[:, :3, :3].float().mT @ found[:, 1:]
        changes = torch.stack([(slopes * direction.mT).sum(dim=1) for direction in along], dim=1)
        columns = torch.cat([torch.ones_like(found[:, :1]), found[:, :1], changes], dim=1)
        weighted = columns * weight[:, None]
        normal = (weighted @ columns.mT).double()
        right = (weighted @ target.expand(len(columns), -1)[..., None]).double()
        ridge = torch.diagonal(normal, dim1=1, dim2=2) * damping[:, None] + 1e-9
        ridge[:, :2] = 1e-9
        solved = torch.linalg.solve(normal + torch.diag_embed(ridge), right)[..., 0]
        gain = solved[:, 1:2]
        step = torch.where(gain > 1e-3, solved[:, 2:] / gain.clamp(min=1e-3), torch.zeros_like(solved[:, 2:]))
        tried = matrix_s44 @ torch.matrix_exp(torch.einsum("sk,kij->sij", step, basis))
        new = look(tried)
        better = new[2] > score
        idle = 0 if float((new[2] - score).max()) > _SETTLED else idle + 1
        matrix_s44 = torch.where(better[:, None, None], tried, matrix_s44)
        found = torch.where(better[:, None, None], new[0], found)
        weight = torch.where(better[:, None], new[1], weight)
        score, overlap = torch.where(better, new[2], score), torch.where(better, new[3], overlap)
        damping = torch.where(better, damping / 4, damping * 8)
        if idle == 2:
            break
    return matrix_s44, score, overlap
