"""A volume -> a folder of classic CT or MR images, one file per slice, that names nobody and says that it is synthetic.

Every attribute is set here from the volume and from constants; nothing is copied from a file that was read, so
nothing can be inherited. The files are encoded by pydicom. Sources: DICOM PS3.3 A.3 (CT image), A.4 (MR image),
C.7.6.2 (image plane), C.11.1 (rescale), C.12.1.1 (Synthetic Data); PS3.5 6.2 (a decimal string has at most 16
characters).
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, MRImageStorage
from pydicom.valuerep import DSfloat

from engine import __version__
from engine.atomic import atomic_folder
from engine.errors import InputError
from engine.files.volumes import VolumeData, affine_fault, is_rectangular, spacing_mm

_LPS_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_series(
    folder: str | Path,
    data: VolumeData,
    *,
    modality: str | None = None,
    subject: str = "SYN000000000",
    series_description: str = "SYNTHETIC",
    uid_source: str | None = None,
) -> None:
    """Write a single-channel volume as a new folder of DICOM slices, whole or not at all.

    Values survive exactly where they are whole numbers spanning at most 65,535; others are stored in 65,536 steps
    between the smallest and the largest, so that no value is off by more than half a step, (max - min) / 131,070,
    apart from float32; of MR images these steps (Rescale Slope and Intercept) extend the standard's object, as scanners'
    own do. The affine survives to the 16 characters of a decimal string. Slices are numbered along the
    plane's normal.

    Args:
        folder: must not exist.
        data: anything with `array_cdhw`, `affine` (RAS+, mm), `modality` and `units`. Array axis 1 becomes columns,
            axis 2 rows, axis 3 slices.
        modality: "CT" or "MR"; by default the volume's own.
        subject: PatientID and PatientName; starts with SYN.
        series_description: at most 64 ASCII characters.
        uid_source: text from which UIDs are derived, so that the same volume written twice is the same study; by
            default they are random.

    Raises:
        InputError: several channels, a sheared affine, NaN, another modality, or a subject that does not start with
            SYN.
    """
    folder, modality = Path(folder), modality or data.modality
    if modality not in ("CT", "MR"):
        raise InputError("modality CT or MR", repr(modality), folder, 'modality="MR"')
    if not re.fullmatch(r"SYN[A-Za-z0-9_-]{0,61}", subject):
        raise InputError("a subject that starts with SYN, of letters, digits, - and _", "another", folder)
    if not series_description.isascii() or not series_description.isprintable() or len(series_description) > 64:
        raise InputError("a series description of at most 64 ASCII characters", "another", folder)
    if data.array_cdhw.shape[0] != 1:
        raise InputError(
            "one channel", f"{data.array_cdhw.shape[0]}", folder, "write each channel as a series of its own"
        )
    if max(data.array_cdhw.shape[1:3]) > 65535:
        raise InputError("at most 65535 rows and columns", str(data.array_cdhw.shape[1:3]), folder)
    if fault := affine_fault(data.affine):
        raise InputError("an invertible affine to mm", fault, folder)
    if not is_rectangular(data.affine):
        raise InputError("perpendicular axes, as DICOM slices have", "a sheared affine", folder, "resample it first")
    stored_dhw, slope, intercept = _stored(data.array_cdhw[0], folder)
    with atomic_folder(folder) as partial:
        for number, dataset in enumerate(
            _slices(stored_dhw, slope, intercept, data, modality, subject, series_description, uid_source), start=1
        ):
            dataset.save_as(partial / f"slice_{number:05d}.dcm", enforce_file_format=True)


def _stored(array_dhw: np.ndarray, where: Path) -> tuple[np.ndarray, DSfloat, DSfloat]:
    """16-bit stored values with the slope and intercept, as decimal strings, that give the values back."""
    array = array_dhw.astype(np.uint8) if array_dhw.dtype == np.bool_ else array_dhw
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError("finite voxels, as DICOM images hold", "NaN or infinite ones", where, "replace them first")
    low, high = array.min().item(), array.max().item()
    whole = array.dtype.kind in "iu" or bool((array == np.rint(array)).all())
    if whole:
        for kind in (np.int16, np.uint16):
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return array.astype(kind), DSfloat("1"), DSfloat("0")
        if high - low <= 65535 and abs(low) < 2**53:
            return (array - array.dtype.type(low)).astype(np.uint16), DSfloat("1"), DSfloat(f"{int(low)}")
    low, high = float(low), float(high)
    if low == high:
        return np.zeros(array.shape, dtype=np.uint16), DSfloat("1"), DSfloat(low, auto_format=True)
    # the slope must cover the range after rounding to 16 characters, so it is widened by more than that rounding
    intercept = DSfloat(low, auto_format=True)
    slope = DSfloat((high - low) / 65535 * (1 + 1e-9) + abs(float(intercept) - low) / 65535, auto_format=True)
    if not float(slope) > 0:
        raise InputError("a range of values that DICOM's decimal strings can say", f"{low:g} to {high:g}", where)
    stored = np.rint((array.astype(np.float64) - float(intercept)) / float(slope))
    return np.clip(stored, 0, 65535).astype(np.uint16), slope, intercept


def _slices(
    stored_dhw: np.ndarray,
    slope: DSfloat,
    intercept: DSfloat,
    data: VolumeData,
    modality: str,
    subject: str,
    series_description: str,
    uid_source: str | None,
) -> Iterator[FileDataset]:
    affine = _LPS_RAS @ np.asarray(data.affine, dtype=np.float64)
    size = spacing_mm(affine)
    row = affine[:3, 0] / size[0]
    column = affine[:3, 1] / size[1]
    column = column - (column @ row) * row  # exactly perpendicular: is_rectangular allows rounding
    column /= np.linalg.norm(column)
    depth = stored_dhw.shape[2]
    # numbered along the normal, so that viewers that sort by number and readers that sort by position agree
    order = range(depth) if np.cross(row, column) @ affine[:3, 2] > 0 else range(depth - 1, -1, -1)

    def uid(purpose: str) -> UID:
        """2.25 and a UUID as one integer, PS3.5 B.2: random, or derived from `uid_source`."""
        if uid_source is None:
            return UID(f"2.25.{uuid.uuid4().int}")
        digest = hashlib.blake2b(f"{uid_source}\x1f{purpose}".encode(), digest_size=16).digest()
        return UID(f"2.25.{uuid.UUID(bytes=digest, version=4).int}")

    study, series, frame_of_reference = uid("study"), uid("series"), uid("frame of reference")
    sop_class = CTImageStorage if modality == "CT" else MRImageStorage
    for number, k in enumerate(order, start=1):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = sop_class
        meta.MediaStorageSOPInstanceUID = uid(f"slice {number}")
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        # patient, study, series: type 2 attributes are present and empty where there is nobody to describe
        image.SpecificCharacterSet = "ISO_IR 100"
        image.PatientName, image.PatientID, image.PatientBirthDate, image.PatientSex = subject, subject, "", ""
        image.PatientIdentityRemoved, image.DeidentificationMethod = "YES", "Synthetic data: no patient was imaged"
        image.StudyInstanceUID, image.SeriesInstanceUID = study, series
        image.StudyDate = image.StudyTime = image.ReferringPhysicianName = image.AccessionNumber = ""
        image.StudyID, image.SeriesNumber, image.SeriesDescription = "", "1", series_description
        image.Modality, image.PatientPosition = modality, "HFS"
        image.Laterality = ""  # type 2C: of which side of a paired part is not known
        image.FrameOfReferenceUID, image.PositionReferenceIndicator = frame_of_reference, ""
        image.Manufacturer, image.ManufacturerModelName, image.SoftwareVersions = "engine", "engine", __version__
        # SOP common and image
        image.SOPClassUID, image.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
        image.SyntheticData = "YES"
        image.InstanceNumber, image.AcquisitionNumber = str(number), ""
        image.ContentDate = image.ContentTime = ""
        image.ImageType = ["DERIVED", "SECONDARY", "AXIAL" if modality == "CT" else "OTHER"]
        image.DerivationDescription = "Generated by a statistical model"
        image.BurnedInAnnotation = "NO"
        # plane
        image.PixelSpacing = [DSfloat(size[1], auto_format=True), DSfloat(size[0], auto_format=True)]
        image.ImageOrientationPatient = [DSfloat(float(x), auto_format=True) for x in (*row, *column)]
        origin = affine[:3, 3] + k * affine[:3, 2]
        image.ImagePositionPatient = [DSfloat(float(x), auto_format=True) for x in origin]
        image.SliceThickness = DSfloat(size[2], auto_format=True)
        # pixels
        plane = np.ascontiguousarray(stored_dhw[:, :, k].T)
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.Rows, image.Columns = plane.shape
        image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
        image.PixelRepresentation = 1 if plane.dtype.kind == "i" else 0
        if modality == "CT" or (slope, intercept) != (1, 0):
            # no part of the MR image IOD: where the values need them the series is of a Standard Extended SOP Class, PS3.2
            image.RescaleSlope, image.RescaleIntercept = slope, intercept
            image.RescaleType = "HU" if modality == "CT" and data.units == "HU" else "US"
        if modality == "CT":
            image.KVP = None
        else:
            image.SpacingBetweenSlices = DSfloat(size[2], auto_format=True)
            image.ScanningSequence, image.SequenceVariant, image.ScanOptions = "RM", "NONE", ""
            image.MRAcquisitionType, image.EchoTime, image.EchoTrainLength, image.RepetitionTime = (
                "3D",
                None,
                None,
                None,
            )
        image.PixelData = plane.astype("<i2" if plane.dtype.kind == "i" else "<u2").tobytes()
        yield image
