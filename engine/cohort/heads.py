"""Heads with known anatomy: the MNI152 T1 template that nilearn ships, deformed, and scanned at low resolution.

The template (ICBM 2009a symmetric, brain extracted, 1 mm) is averaged onto a working grid twice as fine as the scan.
A head is the template pulled back through four maps, outermost first,

    template point = ventricles( sulci( shape( size( scan point ))))

- size: isotropic scaling that gives the wanted brain volume;
- shape: exponential of a random smooth stationary velocity field, the person's own (scaling and squaring; Arsigny et
  al., "A log-Euclidean framework for statistics on diffeomorphisms", MICCAI 2006);
- sulci, ventricles: flows along fields whose divergence is prescribed: fluid spaces expand, tissue yields everywhere by
  the same small share, the outer surface stays (in the spirit of Khanal, Ayache and Pennec, "Simulating longitudinal
  brain MRIs with known volume changes", Frontiers in Neuroscience 2017; here the field is the gradient of a potential,
  one FFT).

The time of the ventricular flow is solved for, so that the deformed ventricle mask has the wanted volume; what is
returned as truth is the volume it has in the end, summed over fractional voxels of the working grid, before
down-sampling. What a person looks like (wanted volumes, age, sex) is decided in `engine.cohort.people`; files are
written elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage

from engine import seeding
from engine.cohort.config import ScannerConfig

_FOV_CENTRE_MM = np.array([0.0, -17.0, 5.0])  # middle of the template's brain; head size scales about it
_FLOW_STEP, _FLOW_NODES = 0.4, (-4, 17)  # ventricular flow times tabulated: -1.6 to 6.8
_KNOT_MM = 20.0  # distance between the knots of the random fields


@dataclass(frozen=True)
class Template:
    """The template on the working grid and the fields that deform it; all tensors float32, axes (i, j, k) = RAS+."""

    channels_cdhw: torch.Tensor  # T1 (white matter = 1), brain fraction, lateral ventricle fraction
    ventricle_flow_acdhw: torch.Tensor  # displacement of the pull-back at each tabulated flow time
    sulci_cdhw: torch.Tensor  # displacement per unit of log volume
    growth_a: np.ndarray  # log ventricle volume at each tabulated flow time, undeformed head
    box: tuple[slice, slice, slice]  # where ventricles can be
    voxel_mm: float
    brain_mm3: float
    affine: np.ndarray  # of the scan, (4, 4), voxel -> mm RAS+

    @property
    def flow_times_a(self) -> np.ndarray:
        return np.arange(_FLOW_NODES[0], _FLOW_NODES[1] + 1) * _FLOW_STEP


@dataclass(frozen=True)
class Head:
    """One scan: float32 array (i, j, k), affine, and the truth of its anatomy in mm3."""

    array_dhw: np.ndarray
    affine: np.ndarray
    ventricle_mm3: float
    brain_mm3: float


def scan_affine(scanner: ScannerConfig) -> np.ndarray:
    """Voxel -> mm (RAS+) of every scan: axis-aligned, isotropic, the template's head in the middle."""
    affine = np.diag([scanner.spacing_mm] * 3 + [1.0])
    affine[:3, 3] = _FOV_CENTRE_MM - scanner.spacing_mm * (np.array(scanner.shape) - 1) / 2
    return affine


def _packaged(tissue: str) -> tuple[np.ndarray, np.ndarray]:
    """A template image that lies inside the nilearn package (no network), scaled to [0, 1], and its affine."""
    import nilearn.datasets as datasets

    load = {
        "t1": datasets.load_mni152_template,
        "gm": datasets.load_mni152_gm_template,
        "wm": datasets.load_mni152_wm_template,
    }[tissue]
    image = load(resolution=1)
    values = np.asarray(image.get_fdata(), dtype=np.float32)
    return np.clip(values / values.max(), 0.0, 1.0), np.asarray(image.affine, dtype=float)


def _lateral_ventricles(t1: np.ndarray, depth_mm: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Boolean mask of the lateral ventricles in the 1 mm template: the two dark components on either side of the
    midline, grown to the half-way intensity between CSF and white matter. Third ventricle and cisterns are separate
    components.
    """
    label, _ = ndimage.label((t1 < 0.52 * np.median(t1[t1 > 0.8])) & (depth_mm > 15))
    mask = np.zeros(t1.shape, dtype=bool)
    for x in (-13.0, 13.0):  # body of each lateral ventricle, mm
        i, j, k = np.rint(np.linalg.solve(affine, [x, -14.0, 20.0, 1.0])[:3]).astype(int)
        near = label[i - 6 : i + 7, j - 6 : j + 7, k - 6 : k + 7]
        values, counts = np.unique(near[near > 0], return_counts=True)
        if len(values):
            mask |= label == values[np.argmax(counts)]
    if not 5e3 < mask.sum() < 5e4:
        raise RuntimeError(f"the template's lateral ventricles were not found: {int(mask.sum())} mm3")
    midline = np.abs(affine[0, 0] * np.arange(t1.shape[0]) + affine[0, 3]) < 2.5  # keeps the third ventricle out
    allowed = (t1 < 0.68) & (depth_mm > 15) & ~midline[:, None, None]
    return ndimage.binary_dilation(mask, iterations=2, mask=allowed | mask)


def _to_grid(
    values: np.ndarray, affine: np.ndarray, origin_mm: np.ndarray, voxel_mm: float, shape: tuple[int, ...]
) -> np.ndarray:
    """Average a 1 mm image over working voxels: box filter of the voxel's width, sampled at its centre (linear)."""
    smooth = ndimage.uniform_filter(values.astype(np.float32), size=max(1, round(voxel_mm)), mode="constant")
    start = np.linalg.solve(affine, np.append(origin_mm, 1.0))[:3]
    step = voxel_mm / np.diag(affine)[:3]
    return ndimage.affine_transform(smooth, step, start, output_shape=shape, order=1, mode="constant")


def _prescribed_divergence(source: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """Velocity (3, d, h, w) in voxels with divergence `source` minus what `tissue` must yield so that the total is
    zero.

    The field is the gradient of a potential, solved by FFT on a padded grid (zero outside)."""
    pad = 16
    rhs = np.pad(source - tissue * (source.sum() / tissue.sum()), pad)
    k = np.meshgrid(*(2 * np.pi * np.fft.fftfreq(n) for n in rhs.shape), indexing="ij")
    square = sum(axis**2 for axis in k)
    square[0, 0, 0] = 1.0
    potential = -np.fft.fftn(rhs) / square
    potential[0, 0, 0] = 0.0
    inner = tuple(slice(pad, -pad) for _ in range(3))
    return np.stack([np.fft.ifftn(1j * axis * potential).real[inner] for axis in k]).astype(np.float32)


def _sample(image_cdhw: torch.Tensor, where_dhw3: torch.Tensor) -> torch.Tensor:
    """Linear interpolation of (c, ...) at places (d, h, w, 3); zero outside. Returns (c, d, h, w).

    Places and displacements are in grid_sample's own coordinates, to save the conversions: from -1 to 1 edge to edge,
    which is the same for a grid of any spacing, and the last array axis first.
    """
    return torch.nn.functional.grid_sample(image_cdhw[None], where_dhw3[None], mode="bilinear", align_corners=False)[0]


@lru_cache(maxsize=4)
def _identity(shape: tuple[int, ...]) -> torch.Tensor:
    """The place (d, h, w, 3) of every voxel centre of a grid."""
    axes = [(2 * torch.arange(n, dtype=torch.float32) + 1) / n - 1 for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flip(-1).contiguous()


def _displacement(voxel_cdhw: np.ndarray) -> torch.Tensor:
    """Displacement (3, d, h, w) in voxels, array order of axes, as (d, h, w, 3) in the coordinates of `_sample`."""
    scale = 2 / np.array(voxel_cdhw.shape[:0:-1], dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(voxel_cdhw[::-1], 0, -1), dtype=np.float32) * scale)


def _then(first_dhw3: torch.Tensor, second_cdhw: torch.Tensor) -> torch.Tensor:
    """Displacement (d, h, w, 3) of the map x -> second(first(x)), both on the same grid."""
    where = first_dhw3 + _identity(tuple(first_dhw3.shape[:3]))
    return _sample(second_cdhw, where).permute(1, 2, 3, 0).add(first_dhw3).contiguous()


def exponential(velocity_dhw3: torch.Tensor, squarings: int = 5) -> torch.Tensor:
    """Displacement of the flow of a stationary velocity field for unit time, by scaling and squaring; same units."""
    displacement = velocity_dhw3 / 2**squarings
    for _ in range(squarings):
        displacement = _then(displacement, displacement.permute(3, 0, 1, 2))
    return displacement


def _spline_matrix(points: int, spacing_mm: float, knot_mm: float) -> np.ndarray:
    """(points, knots) cubic B-spline weights of knots `knot_mm` apart at points `spacing_mm` apart, centred on each
    other.
    """
    knots = int(np.ceil((points - 1) * spacing_mm / knot_mm)) + 4
    place = (np.arange(points) - (points - 1) / 2) * spacing_mm / knot_mm
    t = np.abs(place[:, None] - (np.arange(knots) - (knots - 1) / 2)[None])
    return np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.where(t < 2, (2 - t) ** 3 / 6, 0.0))


def smooth_field(
    rng: np.random.Generator, shape: tuple[int, ...], spacing_mm: float, knot_mm: float, fields: int
) -> np.ndarray:
    """`fields` random smooth fields (fields, d, h, w), float32, mean 0 and standard deviation 1 over draws and
    voxels.
    """
    a, b, c = (_spline_matrix(n, spacing_mm, knot_mm) for n in shape)
    knots = rng.standard_normal((fields, a.shape[1], b.shape[1], c.shape[1]))
    variance = np.prod([(w**2).sum(axis=1).mean() for w in (a, b, c)])
    return (np.einsum("nijk,di,hj,wk->ndhw", knots, a, b, c, optimize=True) / np.sqrt(variance)).astype(np.float32)


@lru_cache(maxsize=2)
def template(scanner: ScannerConfig) -> Template:
    """Load and prepare the template for a scan grid (seconds); cached. No network is used."""
    voxel_mm, shape = scanner.spacing_mm / 2, tuple(2 * n for n in scanner.shape)
    affine = scan_affine(scanner)
    origin_mm = affine[:3, 3] - voxel_mm / 2
    t1, source_affine = _packaged("t1")
    tissue = _packaged("gm")[0] + _packaged("wm")[0]
    brain = ndimage.binary_fill_holes(t1 > 0.01)
    depth_mm = ndimage.distance_transform_edt(brain)
    ventricle = _lateral_ventricles(t1, depth_mm, source_affine)
    sulci = brain & (tissue < 0.5) & ~ndimage.binary_dilation(ventricle, iterations=6) & (depth_mm < 25)
    t1 = t1 / np.median(t1[_packaged("wm")[0] > 0.9])
    grid = [_to_grid(v, source_affine, origin_mm, voxel_mm, shape) for v in (t1, brain, ventricle, sulci, tissue)]
    t1_g, brain_g, ventricle_g, sulci_g, tissue_g = (np.clip(v, 0, None) for v in grid)

    source = ndimage.gaussian_filter(ventricle_g, 4.0 / voxel_mm)
    velocity = _displacement(_prescribed_divergence(source / source.max(), tissue_g * brain_g))
    source = ndimage.gaussian_filter(sulci_g, 2.5 / voxel_mm) * brain_g
    sulci_v = _displacement(_prescribed_divergence(source / source.max(), tissue_g * brain_g))

    flow = {0: torch.zeros_like(velocity)}
    for sign, last in ((-1, -_FLOW_NODES[0]), (1, _FLOW_NODES[1])):
        step = exponential(-sign * _FLOW_STEP * velocity)  # a pull-back runs against the flow
        for node in range(1, last + 1):
            flow[sign * node] = _then(step, flow[sign * (node - 1)].permute(3, 0, 1, 2))
    nodes = range(_FLOW_NODES[0], _FLOW_NODES[1] + 1)
    flow_acdhw = torch.stack([flow[node].permute(3, 0, 1, 2) for node in nodes]).contiguous()
    mask_cdhw = torch.from_numpy(ventricle_g)[None]
    grown = [_sample(mask_cdhw, flow[node] + _identity(shape))[0].numpy() for node in nodes]
    growth_a = np.log([float(g.sum(dtype=np.float64)) * voxel_mm**3 for g in grown])
    where = np.argwhere(grown[-1] > 0)
    margin = int(np.ceil(15 / voxel_mm))
    box = tuple(slice(max(0, int(lo) - margin), int(hi) + margin + 1) for lo, hi in zip(where.min(0), where.max(0)))
    return Template(
        channels_cdhw=torch.from_numpy(np.stack([t1_g, brain_g, ventricle_g])),
        ventricle_flow_acdhw=flow_acdhw,
        sulci_cdhw=-sulci_v.permute(3, 0, 1, 2).contiguous(),
        growth_a=growth_a,
        box=(box[0], box[1], box[2]),
        voxel_mm=voxel_mm,
        brain_mm3=float(brain.sum()) * abs(float(np.prod(np.diag(source_affine)[:3]))),
        affine=affine,
    )


def person_map(
    base: Template, *, seed: int, person: int, shape_mm: float, brain_mm3: float, sulci_log: float
) -> torch.Tensor:
    """Where each working voxel of the scan lies in the template before the ventricular flow: places (d, h, w, 3).

    Depends on (seed, person) for the person's own shape, and on the wanted brain volume and sulcal widening.
    """
    shape = base.channels_cdhw.shape[1:]
    coarse = tuple(n // 2 for n in shape)
    rng = seeding.generator(seed, "cohort.shape", person)
    amplitude = float(shape_mm / np.sqrt(3) / (2 * base.voxel_mm))  # voxels of the coarse grid, each axis
    own = exponential(_displacement(smooth_field(rng, coarse, 2 * base.voxel_mm, _KNOT_MM, 3) * amplitude))
    own = torch.nn.functional.interpolate(
        own.permute(3, 0, 1, 2)[None], scale_factor=2, mode="trilinear", align_corners=False
    )
    scale = (brain_mm3 / base.brain_mm3) ** (1 / 3)
    where = torch.add(own[0].permute(1, 2, 3, 0), _identity(tuple(shape)), alpha=1 / scale).contiguous()
    return _sample(base.sulci_cdhw, where).permute(1, 2, 3, 0).mul(sulci_log).add(where).contiguous()


def _flow(base: Template, time: float, where_dhw3: torch.Tensor) -> torch.Tensor:
    """`where` moved by the pull-back of the ventricular flow; linear between tabulated times."""
    place = np.clip(time / _FLOW_STEP - _FLOW_NODES[0], 0, len(base.growth_a) - 1)
    low = min(int(place), len(base.growth_a) - 2)
    table = base.ventricle_flow_acdhw
    field = torch.lerp(table[low], table[low + 1], float(place - low))
    return _sample(field, where_dhw3).permute(1, 2, 3, 0).add(where_dhw3).contiguous()


def enlarged_ventricles(base: Template, time: float) -> np.ndarray:
    """The template's ventricle fraction on the working grid, after the ventricular flow for `time`."""
    places = _identity(tuple(base.channels_cdhw.shape[1:]))
    return _sample(base.channels_cdhw[2:3], _flow(base, time, places))[0].numpy()


def solve_flow(
    base: Template, where_dhw3: torch.Tensor, ventricle_mm3: float, tolerance: float = 1e-3
) -> tuple[float, float]:
    """Flow time at which the ventricles of the mapped head have the wanted volume, and the volume they have.

    Secant on the log volume, which is nearly linear in time; stops at a relative error of `tolerance` or at the ends of
    the tabulated range (then the volume returned is the one reached, not the one wanted).
    """
    inner = where_dhw3[base.box].contiguous()
    mask = base.channels_cdhw[2:3]
    times = base.flow_times_a

    def log_volume(time: float) -> float:
        fraction = _sample(mask, _flow(base, time, inner)).numpy()
        return float(np.log(fraction.sum(dtype=np.float64) * base.voxel_mm**3))

    goal = float(np.log(ventricle_mm3))
    time, value = 0.0, log_volume(0.0)
    offset = value - float(np.interp(0.0, times, base.growth_a))
    for _ in range(12):
        if abs(value - goal) < tolerance:
            break
        nearer = float(np.interp(goal - offset, base.growth_a, times))
        if nearer == time:
            break
        time, value = nearer, log_volume(nearer)
        offset = value - float(np.interp(time, times, base.growth_a))
    return time, float(np.exp(value))


def scan(
    base: Template,
    scanner: ScannerConfig,
    where_dhw3: torch.Tensor,
    ventricle_mm3: float,
    *,
    seed: int,
    person: int,
    visit: int,
) -> Head:
    """One visit's scan of a mapped head: ventricles grown to volume, then contrast, bias field, box average, Rician
    noise.

    Args:
        where_dhw3: from `person_map`.
        ventricle_mm3: wanted lateral ventricle volume.
        seed, person, visit: of the scanner's draws; 1 <= visit < 1000.
    """
    time, reached_mm3 = solve_flow(base, where_dhw3, ventricle_mm3)
    t1, brain, _ = _sample(base.channels_cdhw, _flow(base, time, where_dhw3))
    rng = seeding.generator(seed, "cohort.scanner", person * 1000 + visit)
    gamma, gain = np.exp(rng.normal(0, [scanner.contrast_sd, scanner.gain_sd]))
    bias = smooth_field(rng, scanner.shape, scanner.spacing_mm, 80.0, 1)[0] * scanner.bias_sd
    t1 = t1.clamp_min(0) ** float(gamma)
    signal, inside = torch.nn.functional.avg_pool3d(torch.stack([t1, brain])[None], 2)[0].numpy()
    noise = rng.standard_normal((2, *scanner.shape), dtype=np.float32) * scanner.noise
    magnitude = np.hypot(signal * np.exp(bias) + noise[0], noise[1])
    array = np.where(inside > 0.1, magnitude * (scanner.gain * gain), 0.0).astype(
        np.float32
    )  # brain extracted, as the template
    brain_mm3 = float(brain.numpy().sum(dtype=np.float64)) * base.voxel_mm**3
    return Head(array, base.affine.copy(), reached_mm3, brain_mm3)
