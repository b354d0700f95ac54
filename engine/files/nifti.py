"""NIfTI-1 and NIfTI-2 files, single (.nii, .nii.gz) or as a pair (.hdr/.img), read with suspicion and written with
care.

nibabel opens most damaged files without a word. So the header's bytes are read and judged here first, before anything
is allocated from what they declare; gzip streams are inflated up to the declared size, to their end, with their
checksums; only then does nibabel interpret the fields and the voxels. `check` gives the same judgement as a verdict.
What is repaired is said (verdict "warn"); what would have to be guessed is refused. Sources: nifti1.h and nifti2.h of
nifti.nimh.nih.gov, in particular the three methods of orientation and the rules for scl_slope.
"""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from nibabel.volumeutils import array_from_file

from engine.atomic import atomic_path
from engine.errors import InputError
from engine.files.byte_source import MOST_EXPANSION, ByteSource
from engine.files.volumes import (
    PERPENDICULAR_COSINE,
    VolumeData,
    affine_fault,
    content_warnings,
    fault_line,
    is_rectangular,
    largest_cosine,
    spacing_mm,
    verdict,
    voxel_limit_bytes,
)

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz")
_READABLE = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_REFUSED = {
    0: "datatype 0 (unknown)",
    1: "1-bit voxels",
    32: "complex64 voxels",
    128: "RGB24 colour voxels",
    1536: "float128 voxels, which differ between machines",
    1792: "complex128 voxels",
    2048: "complex256 voxels",
    2304: "RGBA32 colour voxels",
}
_UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metre, millimetre, micron
_UNIT_NAME = {1: "metres", 3: "microns"}
# bytes after the voxels that are read for the sake of the checksum before the header is called wrong
_MOST_LEFT = 64 << 20


@dataclass
class _Layout:
    """What a header that passed says: where the voxels are, what they are, where they lie."""

    shape: tuple[int, ...]  # as on disk, first axis fastest
    dtype: np.dtype[Any]
    offset: int
    slope: float | None  # None: no scaling
    inter: float
    affine: np.ndarray
    single: bool
    extended: bool

    @property
    def voxel_bytes(self) -> int:
        total = self.dtype.itemsize
        for n in self.shape:
            total *= n  # Python integers: no overflow however large the header's numbers are
        return total


def read_nifti(path: str | Path) -> VolumeData:
    """Read one NIfTI image, scaled by scl_slope and scl_inter, with its affine in mm.

    Args:
        path: .nii or .nii.gz of NIfTI-1 or -2, or either half of a .hdr/.img pair; gzip is recognised by content.

    Returns:
        Volume with modality None and units "arbitrary": the format says neither. Voxels keep their integer type when
        the header scales nothing, else they are float32. The fourth axis (time), or the fifth with one time, become
        channels.

    Raises:
        InputError: damaged, hostile, or not a real-valued 3D image; one line with the file and the fault.
    """
    path = Path(path)
    warnings: list[str] = []
    if path.name.lower().removesuffix(".gz").endswith(".img"):
        path = _other_half(path, ".img", ".hdr")
    source = ByteSource(path, warnings)
    try:
        layout = _read_header(source, warnings)
        if layout.single:
            raw = _read_voxels(source, layout, warnings)
        else:
            voxels = ByteSource(_other_half(path, ".hdr", ".img"), warnings)
            try:
                raw = _read_voxels(voxels, layout, warnings)
            finally:
                voxels.close()
    finally:
        source.close()
    array = array_from_file(layout.shape, layout.dtype, io.BytesIO(raw), 0, "F", mmap=False)
    array_cdhw = _scaled(_channels_first(array), layout, path)
    warnings += content_warnings(array_cdhw, path)
    return VolumeData(array_cdhw, layout.affine, metadata={"source_format": "nifti"}, warnings=warnings)


def check(path: str | Path) -> tuple[str, str]:
    """("ok" | "warn" | "reject", why) for one file; reads it whole and never raises for a bad one."""
    try:
        return verdict(read_nifti(path))
    except InputError as error:
        return "reject", fault_line(error)
    except MemoryError:
        return "reject", "more voxels than this machine's memory holds"


def _other_half(path: Path, suffix: str, wanted: str) -> Path:
    """The partner of one half of a pair: same folder, same stem, plain or gzip, never a symbolic link."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    if not name.lower().endswith(suffix):
        raise InputError("a .hdr and .img pair, as the magic bytes say", "one file", path)
    wanted = wanted.upper() if name[-4:].isupper() else wanted
    for candidate in (path.with_name(name[:-4] + wanted), path.with_name(name[:-4] + wanted + ".gz")):
        if candidate.is_file() and not candidate.is_symlink():
            return candidate
    raise InputError(f"its other half, {wanted}, beside it", "none", path)


def _read_header(source: ByteSource, warnings: list[str]) -> _Layout:
    where = source.path
    start = bytes(source.read(4))
    endianness: Literal["<", ">"]
    for endianness in ("<", ">"):
        sizeof = int(np.frombuffer(start, endianness + "i4")[0]) if len(start) == 4 else 0
        if sizeof in (348, 540):
            break
    else:
        raise InputError(
            "a NIfTI header (sizeof_hdr 348 or 540)",
            "something else",
            where,
            "a NIfTI file; other formats are not read here",
        )
    block = start + bytes(source.read(sizeof - 4))
    if len(block) < sizeof:
        raise InputError(f"a header of {sizeof} bytes", f"{len(block)} bytes", where)
    kind = nibabel.Nifti1Header if sizeof == 348 else nibabel.Nifti2Header
    header = kind(block, endianness, check=False)
    magic = block[344:348] if sizeof == 348 else block[4:12]
    tail = b"" if sizeof == 348 else b"\r\n\x1a\n"
    version = b"1" if sizeof == 348 else b"2"
    if magic not in (b"n+" + version + b"\0" + tail, b"ni" + version + b"\0" + tail):
        raise InputError("NIfTI magic bytes", "others", where, "ANALYZE files carry no orientation: convert them first")
    single = magic[1:2] == b"+"
    if single and where.name.lower().removesuffix(".gz").endswith(".hdr"):
        warnings.append("a single-file image under the name of a header")
    shape = _shape(header, where, warnings)
    dtype = _datatype(header, where, warnings).newbyteorder(endianness)
    slope, inter = _scaling(header, where, warnings)
    affine = _affine(header, shape, where, warnings)
    # bytes 0-3 after the header flag extensions; a header of a pair may end before them
    flag = bytes(source.read(4))
    offset = _offset(header, sizeof, single, where, warnings)
    return _Layout(shape, dtype, offset, slope, inter, affine, single, extended=flag[:1] not in (b"", b"\0"))


def _shape(header: Any, where: Path, warnings: list[str]) -> tuple[int, ...]:
    dim = [int(n) for n in header["dim"]]
    if not 1 <= dim[0] <= 7:
        raise InputError("1 to 7 dimensions", f"dim[0]={dim[0]}", where)
    for axis in range(1, dim[0] + 1):
        if dim[axis] < 1:
            raise InputError("at least one voxel along each axis", f"dim[{axis}]={dim[axis]}", where)
    if dim[0] < 3:
        raise InputError("a 3D image", f"{dim[0]}D", where)
    shape = tuple(dim[1 : dim[0] + 1])
    if any(n > 1 for n in shape[5:]) or (len(shape) >= 5 and shape[3] > 1 and shape[4] > 1):
        raise InputError("at most one axis beside space", f"{len(shape)}D", where, "split it into 3D or 4D images")
    thin = shape[:3].count(1)
    if thin > 1:
        raise InputError("a 3D image", "a line or a point: only one axis is longer than one voxel", where)
    if thin:
        warnings.append("one slice only: an axis is one voxel long")
    if len(shape) > 3 and max(shape[3:]) > 1:
        warnings.append(f"{4 if shape[3] > 1 else 5}D: {max(shape[3:])} times or components, read as channels")
    return shape


def _datatype(header: Any, where: Path, warnings: list[str]) -> np.dtype[Any]:
    code, bits = int(header["datatype"]), int(header["bitpix"])
    if code in _REFUSED:
        raise InputError("real numbers of 8 to 64 bits", _REFUSED[code], where)
    if code not in _READABLE:
        raise InputError("a NIfTI datatype", f"code {code}", where)
    dtype = np.dtype(_READABLE[code])
    if bits != dtype.itemsize * 8:
        warnings.append(f"bitpix {bits} contradicts datatype {code} ({dtype.itemsize * 8} bits), which was used")
    return dtype


def _scaling(header: Any, where: Path, warnings: list[str]) -> tuple[float | None, float]:
    """nifti1.h: slope 0 means no scaling; NaN is what nibabel and others write for the same."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if np.isnan(slope) or slope == 0:
        return None, 0.0
    if not np.isfinite(slope):
        raise InputError("a finite scl_slope", str(slope), where)
    if not np.isfinite(inter):
        raise InputError("a finite scl_inter", str(inter), where)
    if slope < 0:
        warnings.append("scl_slope is negative: intensities are inverted")
    return (None, 0.0) if (slope, inter) == (1.0, 0.0) else (slope, inter)


def _offset(header: Any, sizeof: int, single: bool, where: Path, warnings: list[str]) -> int:
    offset, first = float(header["vox_offset"]), sizeof + 4 if single else 0
    if not np.isfinite(offset) or offset != int(offset) or offset < 0:
        raise InputError("a vox_offset that is a whole number of bytes", str(offset), where)
    if single and offset == 0:
        warnings.append(f"vox_offset is 0 in a single file: voxels taken from byte {first}")
        return first
    if offset < first:
        raise InputError(f"voxels from byte {first} on", f"vox_offset {int(offset)}, inside the header", where)
    return int(offset)


def _affine(header: Any, shape: tuple[int, ...], where: Path, warnings: list[str]) -> np.ndarray:
    """nifti1.h methods 3 (sform), 2 (qform), 1 (pixdim), in that order, scaled to mm."""
    pixdim = np.array(header["pixdim"], dtype=np.float64)
    for axis in (1, 2, 3):
        if not np.isfinite(pixdim[axis]) or pixdim[axis] == 0:
            raise InputError("a finite voxel size above 0", f"pixdim[{axis}]={pixdim[axis]:g}", where)
        if pixdim[axis] < 0:
            warnings.append(f"pixdim[{axis}] is negative: its size was used")
    unit = int(header["xyzt_units"]) & 7
    if unit not in _UNIT_MM:
        warnings.append(f"unknown code {unit} for the unit of length: taken as mm")
    elif unit in _UNIT_NAME:
        warnings.append(f"lengths are in {_UNIT_NAME[unit]}: converted to mm")
    to_mm = _UNIT_MM.get(unit, 1.0)
    qcode, scode = int(header["qform_code"]), int(header["sform_code"])
    for name, code in (("qform_code", qcode), ("sform_code", scode)):
        if not 0 <= code <= 5:
            warnings.append(f"unknown {name} {code}")
    sform = _sform(header, where) if scode > 0 else None
    qform, fault = _qform(header, np.abs(pixdim[1:4])) if qcode > 0 else (None, "")
    if fault and sform is None:
        raise InputError("a valid qform", fault, where, "repair the quaternion, or write an sform")
    if fault:
        warnings.append(f"qform ignored: {fault}")
    if qform is not None and not fault and pixdim[0] not in (-1.0, 0.0, 1.0):
        warnings.append("pixdim[0] (qfac) is neither 1 nor -1: its sign was used")
    if sform is not None:
        affine = sform
        if qform is not None and _disagree(sform, qform, shape):
            warnings.append("qform and sform disagree: sform was used")
        elif (
            qform is None
            and not np.allclose(spacing_mm(sform), np.abs(pixdim[1:4]), rtol=0.1)
            and is_rectangular(sform)
        ):
            warnings.append("voxel sizes of sform and pixdim disagree: sform was used")
        if not is_rectangular(sform):
            warnings.append(
                f"sform is sheared: cosine {largest_cosine(sform):.3g} between axes, above {PERPENDICULAR_COSINE}"
            )
    elif qform is not None:
        affine = qform
    else:
        affine = np.diag([*np.abs(pixdim[1:4]), 1.0])
        warnings.append("no orientation: qform_code and sform_code are 0, axes taken as right, anterior, superior")
    affine = affine.copy()
    affine[:3] *= to_mm
    spacing = spacing_mm(affine)
    if max(spacing) > 100 or min(spacing) < 1e-3:
        warnings.append("implausible voxel size " + " x ".join(f"{s:.3g}" for s in spacing) + " mm")
    return affine


def _sform(header: Any, where: Path) -> np.ndarray:
    affine = np.eye(4)
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        affine[row] = header[name]
    if fault := affine_fault(affine):
        raise InputError("a valid sform", fault, where, "repair sform, or set sform_code to 0 where qform is right")
    return affine


def _qform(header: Any, size: np.ndarray) -> tuple[np.ndarray | None, str]:
    quaternion = np.array([header[name] for name in ("quatern_b", "quatern_c", "quatern_d")], dtype=np.float64)
    origin = np.array([header[name] for name in ("qoffset_x", "qoffset_y", "qoffset_z")], dtype=np.float64)
    qfac = float(header["pixdim"][0])
    if not (np.isfinite(quaternion).all() and np.isfinite(origin).all() and np.isfinite(qfac)):
        return None, "NaN or infinite quaternion, offset or qfac"
    if (norm := float(quaternion @ quaternion)) > 1 + 1e-5:
        return None, f"squared quaternion norm {norm:.4g} above 1"
    a = np.sqrt(max(0.0, 1.0 - norm))
    b_c_d = quaternion if norm <= 1 else quaternion / np.sqrt(norm)
    affine = np.eye(4)
    affine[:3, :3] = nibabel.quaternions.quat2mat([a, *b_c_d]) * (size * [1, 1, -1 if qfac < 0 else 1])
    affine[:3, 3] = origin
    return affine, ""


def _disagree(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> bool:
    """True when a corner of the volume lies more than half the smallest voxel away in the other frame."""
    ends = [(0, n - 1) for n in shape[:3]]
    corners = np.array([[i, j, k, 1] for i in ends[0] for j in ends[1] for k in ends[2]], dtype=np.float64)
    apart = np.linalg.norm(corners @ (first - second).T, axis=1).max()
    return bool(apart > 0.5 * min(spacing_mm(first)))


def _read_voxels(source: ByteSource, layout: _Layout, warnings: list[str]) -> bytearray:
    """The declared voxel bytes, after checking that the file can hold them and before allocating for them."""
    where, needed = source.path, layout.voxel_bytes
    total = layout.offset + needed
    if total > source.size * (MOST_EXPANSION if source.gzip else 1):
        held = f"{source.size}" + (" compressed ones" if source.gzip else "")
        raise InputError(f"{total} bytes, as the header declares", held, where, "copy it again, or repair its header")
    limit = voxel_limit_bytes()
    if max(total, needed // layout.dtype.itemsize * 4) > limit:
        raise InputError(f"at most {limit} bytes of voxels on this machine", f"{total} declared", where)
    if layout.single and layout.extended:
        _walk_extensions(source, layout.offset, warnings)
    source.skip(layout.offset - source.position)
    raw = source.read(needed)
    if len(raw) < needed:
        raise InputError(f"{needed} bytes of voxels", f"{len(raw)}", where, "copy it again, or repair its header")
    left = source.rest(_MOST_LEFT)
    if left > _MOST_LEFT:
        raise InputError(f"{total} bytes, as the header declares", "far more", where, "repair its header")
    if left:
        warnings.append(f"{left} bytes after the voxels, ignored")
    return raw


def _walk_extensions(source: ByteSource, end: int, warnings: list[str]) -> None:
    """Follow the chain of extensions up to the voxels. Their content, often a patient's, is never looked at."""
    while source.position < end:
        head = source.read(8) if source.position + 8 <= end else b""
        size = int(np.frombuffer(head, "<i4")[0]) if len(head) == 8 else 0
        swapped = int(np.frombuffer(head, ">i4")[0]) if len(head) == 8 else 0
        for candidate in (size, swapped):
            if candidate >= 8 and candidate % 16 == 0 and source.position - 8 + candidate <= end:
                source.skip(candidate - 8)
                break
        else:
            if size or swapped:  # zeros are padding
                warnings.append("damaged header extensions, ignored")
            return


def _channels_first(array: np.ndarray) -> np.ndarray:
    """(x, y, z[, t[, c]]) as on disk -> (channels, x, y, z)."""
    return np.moveaxis(array.reshape(*array.shape[:3], -1, order="F"), 3, 0)


def _scaled(array_cdhw: np.ndarray, layout: _Layout, where: Path) -> np.ndarray:
    """Native byte order, C order; integers as they are, or float32 of slope * x + inter computed in float64 by
    slices.
    """
    native = array_cdhw.dtype.newbyteorder("=")
    if layout.slope is None and native.kind in "iu":
        return np.ascontiguousarray(array_cdhw, dtype=native)
    scaled = np.empty(array_cdhw.shape, dtype=np.float32)
    slope, inter = (1.0, 0.0) if layout.slope is None else (layout.slope, layout.inter)
    with np.errstate(over="ignore", invalid="ignore"):
        for c in range(array_cdhw.shape[0]):
            for k in range(array_cdhw.shape[3]):
                exact = array_cdhw[c, :, :, k].astype(np.float64) * slope + inter
                scaled[c, :, :, k] = exact
                if np.isinf(scaled[c, :, :, k]).any() and not np.isinf(array_cdhw[c, :, :, k].astype(np.float64)).any():
                    largest = np.abs(exact).max()
                    raise InputError("voxel values that fit float32", f"one of size {largest:.3g}", where)
    return scaled


def write_nifti(path: str | Path, data: VolumeData, *, description: str = "") -> None:
    """Write a volume as .nii or .nii.gz, whole or not at all, with sform, and with qform where the grid is rectangular.

    The voxel type is kept (float32 stays float32), nothing is scaled. Channels become the fourth axis. NIfTI-2 is
    chosen when an axis is longer than NIfTI-1 can say. The same volume gives the same bytes: no time and no name is
    in the stream.

    Args:
        path: ends in .nii or .nii.gz.
        data: anything with `array_cdhw` and `affine` (RAS+, mm); bool is stored as uint8.
        description: at most 79 ASCII characters for the field `descrip`, e.g. "SYNTHETIC".

    Raises:
        InputError: another suffix, a dtype that NIfTI has no code for, a description that does not fit.
    """
    path = Path(path)
    compressed = path.name.endswith(".nii.gz")
    if not compressed and not path.name.endswith(".nii"):
        raise InputError("a name that ends in .nii or .nii.gz", path.suffix or "none", path)
    if not description.isascii() or len(description) > 79:
        raise InputError("a description of at most 79 ASCII characters", f"{len(description)} characters", path)
    if fault := affine_fault(data.affine):
        raise InputError("an invertible affine to mm", fault, path)
    array = np.moveaxis(data.array_cdhw, 0, 3)
    if array.shape[3] == 1:
        array = array[..., 0]
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if array.dtype.newbyteorder("=").str[1:] not in _READABLE.values():
        raise InputError("a dtype that NIfTI stores", str(array.dtype), path, "float32")
    kind = nibabel.Nifti1Image if max(array.shape) < 2**15 else nibabel.Nifti2Image
    image = kind(array, data.affine, dtype=array.dtype.newbyteorder("="))
    rectangular = is_rectangular(data.affine)
    image.set_sform(data.affine, code=1)
    image.set_qform(data.affine if rectangular else None, code=1 if rectangular else 0, update_affine=False)
    header = image.header
    header["pixdim"][1:4] = spacing_mm(data.affine)
    header["pixdim"][4:] = 1.0
    header.set_xyzt_units("mm", "sec" if array.ndim > 3 else None)
    header["descrip"] = description.encode()
    header.set_slope_inter(1.0, 0.0)
    with atomic_path(path) as partial, open(partial, "wb") as stream:
        target: Any = gzip.GzipFile("", "wb", 6, stream, mtime=0) if compressed else stream
        image.file_map["image"].fileobj = target
        image.to_file_map()
        if compressed:
            target.close()
