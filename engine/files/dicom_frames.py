"""One DICOM file -> its frames: where each image plane lies, how its stored numbers become values, and the numbers.

A frame is one image plane: the whole of a classic file, one frame of an enhanced multi-frame file, or one tile of a
Siemens mosaic. `dicom.py` puts frames of many files together into a volume. Nothing of a header is kept but geometry,
scaling, the numbers of the allow-list, and the identifiers needed to tell series and duplicates apart; no text of a
header reaches an error or a warning. Sources: DICOM PS3.3 C.7.6.2 (image plane), C.7.6.16 (functional groups), PS3.5
(encoding).
"""

from __future__ import annotations

import io
import logging
import os
import stat
import struct
import warnings as python_warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from engine.errors import InputError
from engine.files.volumes import MODALITIES, PERPENDICULAR_COSINE, voxel_limit_bytes

# No codec of the standard shrinks a real image more than this; a file that declares more is hostile.
_MOST_EXPANSION = 2000
# JPEG markers of a frame header: SOF0-15 without DHT, JPG and DAC, and JPEG-LS
_FRAME_HEADERS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {0xF7})
_DIRECTORY = "1.2.840.10008.1.3.10"
_OTHER_FORMATS = (
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"%PDF",
    b"NRRD",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"GIF8",
)


@dataclass(frozen=True)
class Frame:
    """One image plane. Lengths in mm; positions and directions in the DICOM patient system (LPS)."""

    path: Path
    index: int  # frame or tile within the file
    bare: bool  # the file has no preamble
    series_uid: str
    instance_uid: str
    order: tuple[float, ...]  # what tells times at one position apart: temporal index, instance number, frame
    position: np.ndarray  # (3,) centre of the first pixel
    row_direction: np.ndarray  # (3,) unit, increasing column index
    column_direction: np.ndarray  # (3,) unit, increasing row index
    row_spacing: float  # between rows, along column_direction
    column_spacing: float  # between columns, along row_direction
    thickness: float | None
    rows: int
    columns: int
    tile_width: int  # tiles per row of a mosaic; 0 for a plain frame
    slope: float
    intercept: float
    modality: str
    hounsfield: bool
    warnings: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


class NotAnImage(Exception):
    """A file that can be passed over: no DICOM, or a DICOM object without image planes. Its text says which."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom and nibabel, whose warnings quote header values, which may name a person."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "nibabel")]
    before = [logger.disabled for logger in loggers]
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.disabled = True
            yield
        finally:
            for logger, disabled in zip(loggers, before, strict=True):
                logger.disabled = disabled


def read_frames(path: Path) -> list[Frame]:
    """The frames of one file, without their pixels.

    Raises:
        NotAnImage: the file can be passed over.
        InputError: it is, or was, an image, and cannot be used.
    """
    with quiet():
        dataset, bare = _parse(path, pixels=False)
        try:
            return _frames(path, dataset, bare)
        except (InputError, NotAnImage):
            raise
        except Exception as error:  # pydicom converts values on access, and a damaged one may raise anything
            raise InputError("a readable DICOM header", f"a damaged one ({type(error).__name__})", path) from None


def read_pixels(path: Path) -> np.ndarray:
    """Stored values of one file, before rescaling: (frames, rows, columns), integer.

    Raises:
        InputError: no pixels, fewer than declared, or a stream that cannot be decoded.
    """
    with quiet():
        dataset, _ = _parse(path, pixels=True)
        if "PixelData" not in dataset:
            raise InputError("PixelData", "none", path, "the file is cut, or holds no image")
        try:
            rows, columns, frames = int(dataset.Rows), int(dataset.Columns), int(dataset.get("NumberOfFrames") or 1)
            declared = rows * columns * frames * max(1, int(dataset.BitsAllocated) // 8)
            held = len(dataset.PixelData)
            encapsulated = (
                dataset.file_meta.TransferSyntaxUID.is_encapsulated
                if "TransferSyntaxUID" in dataset.file_meta
                else False
            )
        except Exception as error:
            raise InputError("a readable pixel description", f"a damaged one ({type(error).__name__})", path) from None
        if not encapsulated and held < declared:
            raise InputError(f"{declared} bytes of PixelData", f"{held}", path, "copy the file again")
        if declared > voxel_limit_bytes() or (encapsulated and declared > held * _MOST_EXPANSION + (1 << 20)):
            raise InputError("a plausible image size", f"{declared} bytes declared, {held} held", path)
        if encapsulated:
            _refuse_lying_streams(path, dataset, rows, columns, frames)
        try:
            array = np.asarray(dataset.pixel_array)
        except Exception as error:
            raise InputError("pixels that can be decoded", f"{type(error).__name__} in decoding", path) from None
        if array.size != rows * columns * frames or array.dtype.kind not in "iu":
            raise InputError(f"{frames} grey images of {rows}x{columns}", f"shape {array.shape}", path)
        return array.reshape(frames, rows, columns)


def _refuse_lying_streams(path: Path, dataset: Dataset, rows: int, columns: int, frames: int) -> None:
    """Compare the size inside each JPEG or JPEG 2000 stream with Rows and Columns before a codec, which would believe it.

    A decoder handed a size of millions of columns allocates for it or runs for minutes.
    """
    try:
        sizes = [_stream_size(stream) for stream in generate_frames(dataset.PixelData, number_of_frames=frames)]
    except Exception as error:
        raise InputError("encapsulated pixels", f"damaged ones ({type(error).__name__})", path) from None
    for size in sizes:
        if size not in (None, (rows, columns)):
            raise InputError(f"compressed images of {rows}x{columns}", "another size inside the stream", path)


def _stream_size(stream: bytes) -> tuple[int, int] | None:
    """(rows, columns) of a JPEG, JPEG-LS or JPEG 2000 stream; (0, 0) if implausible; None for others, such as RLE.

    Sources: ITU-T T.81 B.2.2 and T.87 C.2.2 (frame header), T.800 A.5.1 (SIZ marker).
    """
    start = stream.find(b"\xff\x4f\xff\x51", 0, 512)
    if start >= 0:
        right, bottom, left, top, width, height = struct.unpack_from(">6I", stream, start + 8)
        components = struct.unpack_from(">H", stream, start + 40)[0]
        tiles = (right // width + 1) * (bottom // height + 1) if width and height else 0
        plausible = components == 1 and 1 <= tiles <= right * bottom // 256 + 4
        return (bottom - top, right - left) if plausible else (0, 0)
    if stream[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(stream) and stream[at] == 0xFF:
        marker, length = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4])
        if marker in _FRAME_HEADERS:
            height, width = struct.unpack_from(">2H", stream, at + 5)
            return height, width
        at += 1 if marker == 0xFF else 2 + length
    return 0, 0


def pixels_of(frame: Frame, stored: np.ndarray) -> np.ndarray:
    """The stored values (rows, columns) of one frame, cut from `read_pixels` of its file."""
    if not frame.tile_width:
        return stored[frame.index]
    down, across = divmod(frame.index, frame.tile_width)
    top, left = down * frame.rows, across * frame.columns
    return stored[0, top : top + frame.rows, left : left + frame.columns]


def _content(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        raise InputError("a readable file", os.strerror(error.errno or 0), path) from None
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise InputError("a regular file", "a folder, device or pipe", path)
    with os.fdopen(descriptor, "rb") as stream:
        if facts.st_size > voxel_limit_bytes():
            raise InputError("a file that fits memory", f"{facts.st_size} bytes", path)
        return stream.read()


def _parse(path: Path, *, pixels: bool) -> tuple[Dataset, bool]:
    content = _content(path)
    bare = content[128:132] != b"DICM"
    if bare and (reason := _foreign(path, content)):
        raise NotAnImage(reason)
    try:
        # BytesIO clips reads to what is there, however long an element claims to be
        if not bare:
            _refuse_bomb(path, content)
        dataset = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=not pixels, force=bare)
    except InputError:
        raise
    except Exception as error:
        raise InputError("a readable DICOM file", f"a damaged one ({type(error).__name__})", path) from None
    if bare and "SOPClassUID" not in dataset:
        raise InputError(
            "a DICOM file", "something else under the name of a slice", path, "remove it, or copy it again"
        )
    return dataset, bare


def _foreign(path: Path, content: bytes) -> str:
    """Why bytes without a DICOM preamble are certainly no slice; empty when they may be a damaged or bare one."""
    head = content[:1024]
    if not head:
        if _named_like_a_slice(path):
            raise InputError("a DICOM file", "an empty one", path, "copy it again")
        return "empty"
    if head.startswith(_OTHER_FORMATS):
        return "another format"
    if b"\0" not in head:
        try:
            head.decode("utf-8", errors="strict" if len(content) <= 1024 else "ignore")
            return "text"
        except UnicodeDecodeError:
            pass
    if int.from_bytes(head[:2], "little") in (2, 8) and len(content) > 8:
        return ""
    if not _named_like_a_slice(path):
        return "another format"
    raise InputError("a DICOM file", "other bytes under the name of a slice", path, "remove it, or copy it again")


def _named_like_a_slice(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in ("", ".dcm", ".dicom", ".ima", ".img") or suffix[1:].isdigit()


def _refuse_bomb(path: Path, content: bytes) -> None:
    """A deflated data set is inflated by pydicom without a bound; try it here first, with one."""
    if DeflatedExplicitVRLittleEndian.encode() not in content[: 1 << 16]:
        return
    meta = pydicom.filereader.read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    start = 132 + 12 + int(meta.get("FileMetaInformationGroupLength", 0))
    limit = min(voxel_limit_bytes(), (len(content) + 1) * 1032, 1 << 30)
    inflater, left, pending = zlib.decompressobj(-15), limit, content[start:]
    while pending and not inflater.eof:
        left -= len(inflater.decompress(pending, 1 << 20))
        pending = inflater.unconsumed_tail
        if left < 0:
            raise InputError(f"a data set of at most {limit} bytes", "a deflated one that grows beyond", path)


def _frames(path: Path, dataset: Dataset, bare: bool) -> list[Frame]:
    if str(dataset.get("SOPClassUID", "")) == _DIRECTORY or "DirectoryRecordSequence" in dataset:
        raise NotAnImage("a DICOM directory")
    if "Rows" not in dataset or "Columns" not in dataset:
        # a slice whose end is lost must not be passed over as if it had never been one
        meta = dataset.file_meta.get("MediaStorageSOPClassUID") if hasattr(dataset, "file_meta") else None
        sop_class = dataset.get("SOPClassUID") or meta
        if sop_class is None or "Image Storage" in UID(str(sop_class)).name:
            raise InputError("Rows and Columns", "none: the header is cut", path, "copy it again")
        raise NotAnImage("a DICOM object without pixels")
    modality = str(dataset.get("Modality", ""))
    if modality in ("SEG", "RTDOSE", "RTPLAN", "RTSTRUCT", "SR", "PR", "KO", "REG", "RWV"):
        raise NotAnImage("a DICOM object that is no acquired image")
    if int(dataset.get("SamplesPerPixel", 1)) != 1:
        raise InputError("grey values", f"{int(dataset.SamplesPerPixel)} samples per pixel (colour)", path)
    photometric = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise InputError("grey values", "a palette or colour image", path)
    if "ModalityLUTSequence" in dataset:
        raise InputError("Rescale Slope and Intercept", "a modality lookup table, which is not supported", path)
    if int(dataset.Rows) < 1 or int(dataset.Columns) < 1:
        raise InputError("at least one row and column", f"{int(dataset.Rows)}x{int(dataset.Columns)}", path)
    notes = ("MONOCHROME1: bright and dark are exchanged on screens",) if photometric == "MONOCHROME1" else ()
    common: dict[str, Any] = {
        "path": path,
        "bare": bare,
        "series_uid": str(dataset.get("SeriesInstanceUID", "")),
        "instance_uid": str(dataset.get("SOPInstanceUID", "")),
        "modality": modality if modality in MODALITIES else "OT",
        "warnings": notes,
        "metadata": _metadata(dataset),
    }
    count = int(dataset.get("NumberOfFrames") or 1)
    if "PerFrameFunctionalGroupsSequence" in dataset or "SharedFunctionalGroupsSequence" in dataset:
        return _enhanced(path, dataset, count, common)
    if count < 1:
        raise InputError("at least one frame", str(count), path)
    if count > 1:
        raise InputError(
            "a position for each frame", f"{count} frames with one position", path, "an enhanced file, or NIfTI"
        )
    if "MOSAIC" in [str(value) for value in _many(dataset.get("ImageType"))]:
        return _mosaic(path, dataset, common)
    if "ImagePositionPatient" not in dataset or "ImageOrientationPatient" not in dataset:
        raise InputError(
            "ImagePositionPatient and ImageOrientationPatient", "none", path, "a series of slices in space"
        )
    order = (_number(dataset.get("TemporalPositionIdentifier")), _number(dataset.get("InstanceNumber")), 0.0)
    thickness = _positive(dataset.get("SpacingBetweenSlices")) or _positive(dataset.get("SliceThickness"))
    return [
        Frame(
            **common,
            **_plane(path, dataset.ImagePositionPatient, dataset.ImageOrientationPatient, dataset.get("PixelSpacing")),
            **_rescale(path, dataset, modality),
            index=0,
            order=order,
            thickness=thickness,
            rows=int(dataset.Rows),
            columns=int(dataset.Columns),
            tile_width=0,
        )
    ]


def _enhanced(path: Path, dataset: Dataset, count: int, common: dict[str, Any]) -> list[Frame]:
    shared = dataset.get("SharedFunctionalGroupsSequence") or [Dataset()]
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) != count:
        raise InputError(f"functional groups for {count} frames", f"{len(groups)}", path)

    def group(item: Dataset, name: str) -> Dataset:
        found = item.get(name) or shared[0].get(name)
        return found[0] if found else Dataset()

    frames = []
    for index, item in enumerate(groups):
        position = group(item, "PlanePositionSequence").get("ImagePositionPatient")
        orientation = group(item, "PlaneOrientationSequence").get("ImageOrientationPatient")
        if position is None or orientation is None:
            raise InputError("a position and an orientation for each frame", f"none for frame {index + 1}", path)
        measures, content = group(item, "PixelMeasuresSequence"), group(item, "FrameContentSequence")
        order = (_number(content.get("TemporalPositionIndex")), _number(dataset.get("InstanceNumber")), float(index))
        frames.append(
            Frame(
                **common,
                **_plane(path, position, orientation, measures.get("PixelSpacing")),
                **_rescale(path, group(item, "PixelValueTransformationSequence"), common["modality"]),
                index=index,
                order=order,
                thickness=_positive(measures.get("SpacingBetweenSlices")) or _positive(measures.get("SliceThickness")),
                rows=int(dataset.Rows),
                columns=int(dataset.Columns),
                tile_width=0,
            )
        )
    return frames


def _mosaic(path: Path, dataset: Dataset, common: dict[str, Any]) -> list[Frame]:
    """Siemens mosaic: slices as tiles of one large image; number, order and corner come from the private CSA header."""
    from nibabel.nicom.dicomwrappers import wrapper_from_data

    try:
        wrapped = wrapper_from_data(dataset)
        tiles, width = int(wrapped.n_mosaic), int(wrapped.mosaic_size)
        first, normal = (
            np.asarray(wrapped.image_position, dtype=np.float64),
            np.asarray(wrapped.slice_normal, dtype=np.float64),
        )
        step = _positive(dataset.get("SpacingBetweenSlices")) or _positive(dataset.get("SliceThickness"))
        fits = 1 <= tiles <= width * width and dataset.Rows % width == 0 and dataset.Columns % width == 0
    except Exception as error:
        raise InputError(
            "a Siemens mosaic with its CSA header", f"none readable ({type(error).__name__})", path
        ) from None
    if not fits or step is None:
        raise InputError("a mosaic whose tiles fill its image", f"{tiles} tiles, slice distance {step}", path)
    plane = _plane(path, dataset.ImagePositionPatient, dataset.ImageOrientationPatient, dataset.get("PixelSpacing"))
    frames = []
    for index in range(tiles):
        here = {**plane, "position": first + index * step * normal}
        frames.append(
            Frame(
                **common,
                **here,
                **_rescale(path, dataset, common["modality"]),
                index=index,
                order=(0.0, _number(dataset.get("InstanceNumber")), 0.0),
                thickness=step,
                rows=int(dataset.Rows) // width,
                columns=int(dataset.Columns) // width,
                tile_width=width,
            )
        )
    return frames


def _plane(path: Path, position: Any, orientation: Any, spacing: Any) -> dict[str, Any]:
    place, directions = _vector(position, 3), _vector(orientation, 6)
    if place is None:
        raise InputError("an ImagePositionPatient of 3 numbers", "another value", path)
    if directions is None:
        raise InputError("an ImageOrientationPatient of 6 numbers", "another value", path)
    row, column = directions[:3], directions[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if abs(lengths[0] - 1) > 1e-3 or abs(lengths[1] - 1) > 1e-3 or abs(row @ column) > PERPENDICULAR_COSINE:
        raise InputError("an ImageOrientationPatient of two perpendicular unit vectors", "other ones", path)
    size = _vector(spacing, 2)
    if size is None or (size <= 0).any():
        raise InputError("a PixelSpacing of 2 numbers above 0", "none" if spacing is None else "another value", path)
    return {
        "position": place,
        "row_direction": row / lengths[0],
        "column_direction": column / lengths[1],
        "row_spacing": float(size[0]),
        "column_spacing": float(size[1]),
    }


def _rescale(path: Path, item: Dataset, modality: str) -> dict[str, Any]:
    """Modality LUT (PS3.3 C.11.1): value = slope * stored + intercept. CT values are Hounsfield units unless said
    otherwise.
    """
    given = "RescaleSlope" in item or "RescaleIntercept" in item
    slope = 1.0 if item.get("RescaleSlope") is None else float(item.RescaleSlope)
    intercept = 0.0 if item.get("RescaleIntercept") is None else float(item.RescaleIntercept)
    if not np.isfinite(slope) or slope == 0 or not np.isfinite(intercept):
        raise InputError("a finite Rescale Slope, not 0, and Intercept", f"{slope:g} and {intercept:g}", path)
    hounsfield = modality == "CT" and given and str(item.get("RescaleType") or "HU") == "HU"
    return {"slope": slope, "intercept": intercept, "hounsfield": hounsfield}


def _metadata(dataset: Dataset) -> dict[str, Any]:
    names = {
        "kvp": "KVP",
        "slice_thickness_mm": "SliceThickness",
        "repetition_time_ms": "RepetitionTime",
        "echo_time_ms": "EchoTime",
        "inversion_time_ms": "InversionTime",
        "flip_angle_deg": "FlipAngle",
        "field_strength_tesla": "MagneticFieldStrength",
    }
    found: dict[str, Any] = {key: _positive(dataset.get(name)) for key, name in names.items()}
    return {**found, "body_part": str(dataset.get("BodyPartExamined", "")), "source_format": "dicom"}


def _many(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _vector(value: Any, length: int) -> np.ndarray | None:
    try:
        numbers = np.array([float(x) for x in value], dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return numbers if numbers.shape == (length,) and np.isfinite(numbers).all() else None


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _positive(value: Any) -> float | None:
    number = _number(value)
    return number if np.isfinite(number) and number > 0 else None
