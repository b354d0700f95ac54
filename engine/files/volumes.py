"""`VolumeData`: what the readers of scans return and the writers take, whichever the format; and the geometry they
share.

A volume is an array with its own axes and an affine that says where its voxels lie. Spacing, orientation and
handedness are derived from the affine and stored nowhere else. Of a file's header only the entries of `METADATA`
survive, all of them numbers or words from a closed list, so that nothing that names a person can pass through. The
formats themselves are in `nifti.py` and `dicom.py`; what models do with a volume is in `engine.imaging.volume`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.devices import memory_bytes
from engine.errors import InputError

# DICOM Modality (0008,0060) values that describe an acquired image; anything else becomes "OT".
MODALITIES = frozenset({"CT", "MR", "PT", "NM", "US", "XA", "OCT", "OPT", "OT"})
UNITS = frozenset({"HU", "arbitrary"})

BODY_PARTS = frozenset(
    {
        "ABDOMEN",
        "BRAIN",
        "BREAST",
        "CARDIAC",
        "CHEST",
        "CSPINE",
        "HEAD",
        "HEADNECK",
        "HEART",
        "HIP",
        "KNEE",
        "LIVER",
        "LSPINE",
        "LUNG",
        "NECK",
        "PELVIS",
        "PROSTATE",
        "SHOULDER",
        "SKULL",
        "SPINE",
        "THORAX",
        "TSPINE",
        "WHOLEBODY",
    }
)
# The allow-list: key -> what the value may be. Text is admitted only from a closed list.
METADATA: dict[str, type | frozenset[str]] = {
    "source_format": frozenset({"nifti", "dicom"}),
    "body_part": BODY_PARTS,
    "kvp": float,
    "slice_thickness_mm": float,
    "repetition_time_ms": float,
    "echo_time_ms": float,
    "inversion_time_ms": float,
    "flip_angle_deg": float,
    "field_strength_tesla": float,
}

# Two axes count as perpendicular when the cosine between them is at most this (0.06 degrees): above float32 rounding,
# far below the smallest gantry tilt a scanner records.
PERPENDICULAR_COSINE = 1e-3


def allowed_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """The entries of `metadata` that are on the allow-list and have an allowed value; everything else is dropped."""
    kept: dict[str, Any] = {}
    for key, rule in METADATA.items():
        value = metadata.get(key)
        if isinstance(rule, frozenset):
            if isinstance(value, str) and value in rule:
                kept[key] = value
        elif isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
            kept[key] = float(value)
    return kept


def spacing_mm(affine: np.ndarray) -> tuple[float, float, float]:
    """Distance in mm between neighbouring voxels along each array axis: the lengths of the affine's first three
    columns.
    """
    lengths = np.linalg.norm(np.asarray(affine, dtype=np.float64)[:3, :3], axis=0)
    return float(lengths[0]), float(lengths[1]), float(lengths[2])


def largest_cosine(affine: np.ndarray) -> float:
    """Largest absolute cosine between two array axes in space: 0 for a rectangular grid, above 0 for a sheared one."""
    columns = np.asarray(affine, dtype=np.float64)[:3, :3]
    unit = columns / np.linalg.norm(columns, axis=0)
    return float(max(abs(unit[:, 0] @ unit[:, 1]), abs(unit[:, 0] @ unit[:, 2]), abs(unit[:, 1] @ unit[:, 2])))


def is_rectangular(affine: np.ndarray) -> bool:
    """True when the array axes are perpendicular in space within `PERPENDICULAR_COSINE`."""
    return largest_cosine(affine) <= PERPENDICULAR_COSINE


def affine_fault(affine: np.ndarray) -> str:
    """Why `affine` cannot place voxels in space; empty when it can."""
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4):
        return f"an affine of shape {affine.shape}"
    if not np.isfinite(affine).all():
        return "an affine with NaN or infinite entries"
    if not np.array_equal(affine[3], [0, 0, 0, 1]):
        return "an affine whose last row is not 0 0 0 1"
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if (lengths == 0).any():
        return "an affine with a zero column"
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-4:
        return "an affine whose axes lie in one plane"
    return ""


def voxel_limit_bytes() -> int:
    """Most bytes of voxels that one file may declare: half of this machine's memory."""
    return memory_bytes() // 2


@dataclass(frozen=True)
class VolumeData:
    """One scan as it was read, or as it is to be written.

    Attributes:
        array_cdhw: (channels, axis0, axis1, axis2), float32 or the integer type on disk; a 3D array given here gains a
            channel axis. Channels are times or components. Array axis a+1 is column a of the affine (nibabel's order).
        affine: float64 (4, 4), voxel index (axis0, axis1, axis2) -> millimetres, RAS+.
        modality: "CT", "MR", ... or None where the format does not say (NIfTI).
        units: "HU" or "arbitrary".
        metadata: entries of the allow-list `METADATA`; others are dropped here.
        warnings: why the file deserves a second look; empty for a clean one. Holds no text taken from the file.

    Raises:
        InputError: wrong number of axes, an empty array, an affine that places nothing, unknown units or modality.
    """

    array_cdhw: np.ndarray
    affine: np.ndarray
    modality: str | None = None
    units: str = "arbitrary"
    metadata: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        array = np.asarray(self.array_cdhw)
        if array.ndim == 3:
            array = array[np.newaxis]
        affine = np.array(self.affine, dtype=np.float64)
        if array.ndim != 4 or 0 in array.shape:
            raise InputError("a 3D array, or 4D with channels first", f"shape {array.shape}", "volume")
        if array.dtype.kind not in "biuf":
            raise InputError("real numbers", f"dtype {array.dtype}", "volume")
        if fault := affine_fault(affine):
            raise InputError("an invertible affine to mm", fault, "volume")
        if self.units not in UNITS:
            raise InputError("units 'HU' or 'arbitrary'", repr(self.units), "volume")
        if self.modality is not None and self.modality not in MODALITIES:
            raise InputError("one of the modalities " + " ".join(sorted(MODALITIES)), repr(self.modality), "volume")
        object.__setattr__(self, "array_cdhw", array)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "metadata", allowed_metadata(self.metadata))

    @property
    def array_dhw(self) -> np.ndarray:
        """The array of a single-channel volume without its channel axis.

        Raises:
            InputError: more than one channel.
        """
        if self.array_cdhw.shape[0] != 1:
            raise InputError("one channel", f"{self.array_cdhw.shape[0]}", "volume", "choose one of array_cdhw")
        return self.array_cdhw[0]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along the three array axes, in mm."""
        return spacing_mm(self.affine)


def content_warnings(array_cdhw: np.ndarray, where: object) -> list[str]:
    """What is suspicious about the voxel values; for float arrays NaN, infinities and sizes that overflow when squared.

    Raises:
        InputError: no finite voxel at all, or finite values beyond float32.
    """
    found: list[str] = []
    values = array_cdhw
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        bad = int(values.size - np.count_nonzero(finite))
        if bad == values.size:
            raise InputError("voxel values", "only NaN or infinite ones", where)
        if bad:
            found.append(f"{bad} of {values.size} voxels are NaN or infinite")
            values = values[finite]
    low, high = values.min(), values.max()
    if low == high:
        found.append("constant volume: every voxel has the same value")
    largest = max(abs(float(low)), abs(float(high)))
    if largest > float(np.finfo(np.float32).max):
        raise InputError("voxel values that fit float32", f"one of size {largest:.3g}", where)
    if largest > 1e18:  # its square overflows float32, so that no variance or loss can be computed
        found.append(f"huge values: up to {largest:.3g}")
    elif values.dtype.kind in "iu" and largest > 2**24:
        found.append(f"integers up to {largest:.0f} are not exact in float32")
    return found


def verdict(data: VolumeData) -> tuple[str, str]:
    """("ok" or "warn", why) for a volume that could be read."""
    shape = "x".join(str(n) for n in data.array_cdhw.shape[1:])
    if data.warnings:
        return "warn", "; ".join(data.warnings)
    return "ok", f"{shape} voxels of " + "x".join(f"{s:.4g}" for s in data.spacing_mm) + " mm"


def fault_line(error: InputError) -> str:
    """The error's line without its place, for tables that name the place in a column of its own."""
    return str(InputError(error.expected, error.got, "", error.hint))
