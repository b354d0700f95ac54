"""`Volume`: the scan as models see it, float32 in space; and the exact operations on it that keep array and affine
together.

Reading and writing files is left to `engine.files`; intensity scaling to the training code. Every function here
returns a new volume whose voxels lie where they lay before: reorienting moves no voxel in space, cropping and padding
keep the grid, resampling keeps the centre of the field of view.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from scipy import ndimage

from engine.errors import InputError, UsageError
from engine.files.volumes import VolumeData, spacing_mm

AIR_HU = -1024.0


class ScanWarning(UserWarning):
    """A scan was read, and deserves a second look."""


@dataclass(frozen=True)
class Volume:
    """One scan in memory.

    Attributes:
        array_cdhw: float32 (channels, axis0, axis1, axis2); another real dtype is converted, a 3D array gains a
            channel.
        affine: float64 (4, 4), voxel index (axis0, axis1, axis2) -> millimetres, RAS+.
        modality: "CT", "MR", ... or None where unknown.
        units: "HU" or "arbitrary".
        metadata: entries of the allow-list `engine.files.volumes.METADATA`; others are dropped.

    Raises:
        InputError: as `VolumeData`, or a value that float32 cannot hold.
    """

    array_cdhw: np.ndarray
    affine: np.ndarray
    modality: str | None = None
    units: str = "arbitrary"
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked = VolumeData(self.array_cdhw, self.affine, self.modality, self.units, self.metadata)
        array = checked.array_cdhw
        if array.dtype != np.float32:
            with np.errstate(over="ignore"):
                single = array.astype(np.float32)
            if np.isinf(single).any() and not (array.dtype.kind == "f" and np.isinf(array).any()):
                raise InputError("values that fit float32", "larger ones", "volume")
            array = single
        object.__setattr__(self, "array_cdhw", array)
        object.__setattr__(self, "affine", checked.affine)
        object.__setattr__(self, "metadata", checked.metadata)

    @property
    def shape_dhw(self) -> tuple[int, int, int]:
        """Voxels along the three axes."""
        d, h, w = self.array_cdhw.shape[1:]
        return d, h, w

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along the three axes, in mm, from the affine."""
        return spacing_mm(self.affine)

    @property
    def orientation(self) -> str:
        """Where each axis points, nearest anatomical direction, e.g. "RAS" or "LPS"; from the affine."""
        return "".join(nibabel.orientations.aff2axcodes(self.affine))


def read_volume(path: str | Path, *, modality: str | None = None, where: str | None = None) -> Volume:
    """Read a NIfTI file or a DICOM series (a folder, or one file).

    Args:
        path: a folder is a DICOM series; a file is told by its content.
        modality: for NIfTI, which does not record it; "CT" also sets the units to HU.
        where: what errors and warnings call the scan in place of its path, which may name a person, e.g. "row 7".

    Raises:
        InputError: the scan cannot be used; one line. What deserves a second look is given as a `ScanWarning`.
    """
    path = Path(path)
    try:
        data = _read(path)
    except InputError as error:
        if where is None:
            raise
        raise InputError(error.expected, error.got, _said(where, path, error.where), error.hint) from None
    for note in data.warnings:
        warnings.warn(f"{where or path}: {note}", ScanWarning, stacklevel=2)
    units = data.units
    if data.modality is None and modality is not None:
        units = "HU" if modality == "CT" else "arbitrary"
    return Volume(data.array_cdhw, data.affine, data.modality or modality, units, data.metadata)


def _said(where: str, path: Path, found: str) -> str:
    """`where`, and of a series which of its files, counted by name, the error is about."""
    if not path.is_dir() or Path(found).parent != path:
        return where
    names = sorted(entry.name for entry in path.iterdir())
    number = names.index(Path(found).name) + 1 if Path(found).name in names else 0
    return f"{where}, file {number} of {len(names)} by name" if number else where


def _read(path: Path) -> VolumeData:
    from engine.files.dicom import read_series
    from engine.files.nifti import SUFFIXES, read_nifti

    if path.is_dir():
        return read_series(path)
    if path.is_file():
        with open(path, "rb") as stream:
            if stream.read(132)[128:] == b"DICM":
                return read_series(path)
    elif not path.exists():
        raise InputError("a scan", "no such file", path)
    if path.name.lower().endswith(SUFFIXES):
        return read_nifti(path)
    return read_series(path) if path.suffix.lower() in (".dcm", ".ima", ".dicom") else read_nifti(path)


def write_volume(
    volume: Volume, path: str | Path, *, format: str | None = None, description: str = "", subject: str = "SYN000000000"
) -> None:
    """Write a volume, whole or not at all.

    Args:
        path: a name that ends in .nii or .nii.gz, or with format="dicom" a folder that does not exist yet.
        format: "nifti", "dicom", or None to go by the name.
        description: the NIfTI field `descrip` or the DICOM series description, e.g. "SYNTHETIC".
        subject: for DICOM, PatientID and PatientName; starts with SYN.

    Raises:
        UsageError: no format for this name. InputError: the format cannot hold this volume.
    """
    path = Path(path)
    if format is None and path.name.endswith((".nii", ".nii.gz")):
        format = "nifti"
    data = VolumeData(volume.array_cdhw, volume.affine, volume.modality, volume.units, volume.metadata)
    if format == "nifti":
        from engine.files.nifti import write_nifti

        write_nifti(path, data, description=description)
    elif format == "dicom":
        from engine.files.dicom import write_series

        write_series(path, data, subject=subject, series_description=description or "SYNTHETIC")
    else:
        raise UsageError(
            "a name that ends in .nii or .nii.gz, or format 'dicom'", repr(format or path.name), "write_volume"
        )


def reorient(volume: Volume, orientation: str = "RAS") -> Volume:
    """Permute and flip axes so that they point as `orientation` says; no voxel is changed or moved in space.

    Args:
        orientation: three letters, one of each pair R/L, A/P, S/I. An oblique grid stays oblique: its axes then point
            nearest to these directions.
    """
    try:
        wanted = nibabel.orientations.axcodes2ornt(tuple(orientation.upper()))
        if wanted.shape != (3, 2) or sorted(wanted[:, 0]) != [0, 1, 2]:
            raise ValueError
    except (ValueError, KeyError):
        raise UsageError(
            "three letters such as RAS, one of each pair R/L A/P S/I", repr(orientation), "orientation"
        ) from None
    change = nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(volume.affine), wanted)
    array = np.stack([nibabel.orientations.apply_orientation(channel, change) for channel in volume.array_cdhw])
    affine = volume.affine @ nibabel.orientations.inv_ornt_aff(change, volume.shape_dhw)
    return replace(volume, array_cdhw=np.ascontiguousarray(array), affine=affine)


def crop_or_pad(volume: Volume, shape_dhw: Sequence[int], *, fill: float | None = None) -> Volume:
    """The same grid with `shape_dhw` voxels around the same centre; of an odd difference the larger half is at the end.

    Args:
        fill: value of voxels outside the old field of view; by default air (-1024) in HU, else the channel's minimum.
    """
    if len(shape_dhw) != 3 or any(int(n) != n or n < 1 for n in shape_dhw):
        raise UsageError("three numbers of voxels above 0", str(tuple(shape_dhw)), "shape")
    old, new = np.array(volume.shape_dhw), np.array([int(n) for n in shape_dhw])
    # towards zero, so that cropping undoes padding
    start = np.trunc((old - new) / 2).astype(
        int
    )  # index in the old grid of the new grid's first voxel; negative where padded
    array = np.empty((volume.array_cdhw.shape[0], *new), dtype=np.float32)
    for c, channel in enumerate(volume.array_cdhw):
        array[c] = _default_fill(volume, channel) if fill is None else fill
    source = tuple(slice(max(0, s), min(o, s + n)) for s, o, n in zip(start, old, new, strict=True))
    target = tuple(
        slice(max(0, -s), max(0, -s) + part.stop - part.start) for s, part in zip(start, source, strict=True)
    )
    array[(slice(None), *target)] = volume.array_cdhw[(slice(None), *source)]
    return replace(volume, array_cdhw=array, affine=_moved(volume.affine, start))


def resample(volume: Volume, spacing: Sequence[float], *, order: int = 1) -> Volume:
    """The same field of view with voxels of `spacing` mm along the volume's own axes.

    The centre of the field of view stays where it is; its size is kept to within half a new voxel on each side. Before
    coarser sampling the volume is smoothed, so that nothing aliases: a Gaussian of standard deviation (factor - 1) /
    2 old voxels. Outside the old field of view the nearest voxel counts.

    Args:
        spacing: mm along the three array axes, above 0.
        order: of the spline: 0 nearest (for labels, never smoothed), 1 linear, 3 cubic.
    """
    wanted = np.array([float(s) for s in spacing])
    if wanted.shape != (3,) or not np.isfinite(wanted).all() or (wanted <= 0).any():
        raise UsageError("three voxel sizes in mm above 0", str(tuple(spacing)), "spacing")
    old_shape = np.array(volume.shape_dhw)
    factor = wanted / np.array(volume.spacing_mm)
    new_shape = np.maximum(1, np.rint(old_shape / factor)).astype(int)
    if new_shape.prod() > 2**31:
        raise UsageError("at most 2^31 voxels", "x".join(map(str, new_shape)), "spacing", "a coarser spacing")
    first = (old_shape - 1) / 2 - factor * (new_shape - 1) / 2  # old index of the new grid's first voxel
    array = np.empty((volume.array_cdhw.shape[0], *new_shape), dtype=np.float32)
    sigma = np.maximum(0.0, (factor - 1) / 2)
    for c, channel in enumerate(volume.array_cdhw):
        smooth = ndimage.gaussian_filter(channel, sigma, mode="nearest") if order > 0 and sigma.any() else channel
        ndimage.affine_transform(
            smooth, factor, first, output_shape=tuple(new_shape), output=array[c], order=order, mode="nearest"
        )
    return replace(volume, array_cdhw=array, affine=_moved(volume.affine, first) @ np.diag([*factor, 1.0]))


def _moved(affine: np.ndarray, index: np.ndarray) -> np.ndarray:
    """`affine` with its origin at voxel `index` of the old grid."""
    moved = affine.copy()
    moved[:3, 3] = affine[:3, :3] @ index + affine[:3, 3]
    return moved


def _default_fill(volume: Volume, channel: np.ndarray) -> float:
    return AIR_HU if volume.units == "HU" else float(channel.min())
