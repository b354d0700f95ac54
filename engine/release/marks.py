"""Where each kind of file says that it is synthetic, and the refusal of one that does not, or that says too much.

A mark has to survive ordinary tools, so it stands where a format keeps its header: NIfTI `descrip`, DICOM Synthetic
Data (0008,001C), a `##` line of VCF, BCF and .pvar, the sample names of a .psam. What has no header of its own (tables,
.pgen, JSON) gets a sidecar in JSON beside it. The engine's writers leave no free text in a header; here the same is
asked of every file, whoever wrote it: other text fields are empty, tags and `##` keys are on a list, and people are
called SYN. Nothing is ever added to an audited file: one without its mark is refused.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
import struct
import zlib
from pathlib import Path
from typing import Any

from engine.errors import GateRefused, InputError

MARK = "SYNTHETIC DATA. Made by a generative model. No record describes a real person."
DATASET_TYPE = "http://publications.europa.eu/resource/authority/dataset-type/SYNTHETIC_DATA"
PERSON = "SYN"  # how every synthetic person's id begins
PERSON_COLUMNS = {
    "subject", "subject_id", "participant", "participant_id", "patient", "patient_id", "person", "person_id", "sample",
    "sample_id", "iid", "#iid", "id",
}  # fmt: skip
_VCF_KEYS = re.compile(
    r"fileformat|fileDate|FILTER|source|reference|contig|INFO|FORMAT|ALT|phasing|SYNTHETIC|engine_(data|command|model)"
)
_VCF_MARK = re.compile(r"##(SYNTHETIC|engine_data)=.*synthetic", re.IGNORECASE)
_MOST_HEADER_BYTES = 256 << 20
# what engine.files.dicom_write sets; any other tag may have been inherited from somebody's scan
_DICOM_KEYWORDS = frozenset(
    [
        "SpecificCharacterSet",
        "PatientName",
        "PatientID",
        "PatientBirthDate",
        "PatientSex",
        "PatientIdentityRemoved",
        "DeidentificationMethod",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "StudyDate",
        "StudyTime",
        "ReferringPhysicianName",
        "AccessionNumber",
        "StudyID",
        "SeriesNumber",
        "SeriesDescription",
        "Modality",
        "PatientPosition",
        "FrameOfReferenceUID",
        "PositionReferenceIndicator",
        "Manufacturer",
        "ManufacturerModelName",
        "SoftwareVersions",
        "SOPClassUID",
        "SOPInstanceUID",
        "SyntheticData",
        "InstanceNumber",
        "AcquisitionNumber",
        "ContentDate",
        "ContentTime",
        "ImageType",
        "DerivationDescription",
        "BurnedInAnnotation",
        "PixelSpacing",
        "ImageOrientationPatient",
        "ImagePositionPatient",
        "SliceThickness",
        "SpacingBetweenSlices",
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "Rows",
        "Columns",
        "BitsAllocated",
        "BitsStored",
        "HighBit",
        "PixelRepresentation",
        "RescaleSlope",
        "RescaleIntercept",
        "RescaleType",
        "KVP",
        "ScanningSequence",
        "SequenceVariant",
        "ScanOptions",
        "MRAcquisitionType",
        "EchoTime",
        "EchoTrainLength",
        "RepetitionTime",
        "PixelData",
    ]
)
_DICOM_EMPTY = [
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "AccessionNumber",
    "StudyID",
    "ContentDate",
    "ContentTime",
]


def mark_of(path: Path, name: str) -> str:
    """Where the file's own mark stands, in words; "sidecar" for a kind of file that has no place for one.

    Args:
        path: the file; name: how a refusal calls it.

    Raises:
        GateRefused: the format has a place for the mark and it is not there, or the header holds other free text,
            another tag, or a person that is not called SYN.
        InputError: the header cannot be read.
    """
    lower = name.lower()
    if lower.endswith((".nii", ".nii.gz")):
        return _nifti(path, name)
    if lower.endswith(".dcm"):
        return _dicom(path, name)
    if lower.endswith((".vcf.gz", ".bcf", ".pvar")):
        return _variants(path, name)
    if lower.endswith((".csi", ".tbi")):
        return "that of the file it indexes"
    if lower.endswith(".psam"):
        return _people(path, name, "\t")
    if lower.endswith(".tsv"):
        _people(path, name, "\t")
    if lower.endswith(".csv"):
        _people(path, name, ",")
    return "sidecar"


def sidecar_name(name: str) -> str | None:
    """Name of the JSON file that goes beside `name`: `scan.json` for a scan (BIDS), `table.csv-metadata.json` for a table
    (W3C CSV on the Web), else `name.json`; None where the header's mark is enough.
    """
    lower = name.lower()
    if lower.endswith((".nii", ".nii.gz")):
        return name[: lower.rindex(".nii")] + ".json"
    if lower.endswith((".csv", ".tsv")):
        return f"{name}-metadata.json"
    if lower.endswith((".pgen", ".psam", ".json")):
        return f"{name}.synthetic.json" if lower.endswith(".json") else f"{name}.json"
    return None


def sidecar(name: str, mark: str) -> dict[str, Any]:
    """What the sidecar of `name` says."""
    made: dict[str, Any] = {"SyntheticData": True, "Description": MARK, "DatasetType": DATASET_TYPE}
    if name.lower().endswith((".csv", ".tsv")):
        made = {"@context": "http://www.w3.org/ns/csvw", "url": name.rsplit("/", 1)[-1], **made}
        made = {key if key.startswith("@") or key == "url" else f"schema:{key}": v for key, v in made.items()}
    elif mark != "sidecar":
        made["HeaderMark"] = mark
    return made


def _refuse(expected: str, got: str, name: str, hint: str = "generate it with this engine") -> GateRefused:
    return GateRefused(expected, got, name, hint)


def _nifti(path: Path, name: str) -> str:
    """Byte offsets are those of nifti1.h and nifti2.h."""
    with open(path, "rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if packed else open)(path, "rb") as stream:
            raw, length = stream.read(544), 544
            while block := stream.read(1 << 22):
                length += len(block)
    except (OSError, EOFError, zlib.error):
        raise InputError("a whole gzip file", "a damaged one", name) from None
    sizes = {int.from_bytes(raw[:4], "little"), int.from_bytes(raw[:4], "big")}
    order = ">" if raw[:1] == b"\0" else "<"
    if len(raw) == 544 and 348 in sizes:
        fields = {"descrip": (148, 80), "aux_file": (228, 24), "db_name": (14, 18), "data_type": (4, 10)}
        fields["intent_name"], end = (328, 16), 348
        dim, (bits,) = struct.unpack_from(order + "8h", raw, 40), struct.unpack_from(order + "h", raw, 72)
        (offset,) = struct.unpack_from(order + "f", raw, 108)
    elif len(raw) == 544 and 540 in sizes:
        fields, end = {"descrip": (240, 80), "aux_file": (320, 24), "intent_name": (508, 16)}, 540
        dim, (bits,) = struct.unpack_from(order + "8q", raw, 16), struct.unpack_from(order + "h", raw, 14)
        (offset,) = struct.unpack_from(order + "q", raw, 168)
    else:
        raise InputError("a NIfTI file", "something else", name)
    text = {key: raw[at : at + n].split(b"\0")[0] for key, (at, n) in fields.items()}
    if re.fullmatch(rb"SYNTHETIC[ \w.:,-]*", text.pop("descrip")) is None:
        raise _refuse("'SYNTHETIC' at the beginning of the header field descrip", "another text or none", name)
    for key, value in text.items():
        if value:
            raise _refuse(f"an empty header field {key}", "some text", name)
    if raw[end] or offset > end + 4:
        raise _refuse("no header extension", "one, whose text nobody checked", name)
    if length != offset + math.prod(dim[1 : 1 + max(0, dim[0])]) * bits // 8:
        raise _refuse("the voxels that the header declares and nothing else", f"{length} bytes in all", name)
    return "NIfTI header, descrip"


def _dicom(path: Path, name: str) -> str:
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    try:
        image = dcmread(path, stop_before_pixels=True)
    except (InvalidDicomError, OSError, EOFError, ValueError, AttributeError, struct.error):
        raise InputError("a DICOM file", "something else", name) from None
    if str(image.get("SyntheticData", "")) != "YES":
        raise _refuse("Synthetic Data (0008,001C) YES", "another value or none", name)
    kind = image.get("ImageType", "")
    if (kind if isinstance(kind, str) else next(iter(kind), "")) != "DERIVED":
        raise _refuse("ImageType DERIVED", "another", name)
    other = sorted({str(e.tag) for e in image if e.keyword not in _DICOM_KEYWORDS})
    if other:
        raise _refuse("only the tags that this engine writes", f"{len(other)} more, {other[0]} first", name)
    for keyword in ("PatientName", "PatientID"):
        if not re.fullmatch(rf"{PERSON}[A-Za-z0-9_-]*", str(image.get(keyword, ""))):
            raise _refuse(f"{keyword} of letters and digits that begins with {PERSON}", "another", name)
    filled = [keyword for keyword in _DICOM_EMPTY if str(image.get(keyword, "") or "")]
    if filled:
        raise _refuse(f"an empty {filled[0]}", "a value", name)
    return "DICOM Synthetic Data (0008,001C)"


def header_lines(path: Path, name: str) -> list[str]:
    """Header of a VCF, BCF or .pvar: the `##` lines and the column line.

    Raises:
        InputError: no such header, or one beyond 256 MiB.
    """
    with open(path, "rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if packed else open)(path, "rb") as stream:
            magic = stream.read(5)
            if magic[:3] == b"BCF":
                (length,) = struct.unpack("<I", stream.read(4))
                if length > _MOST_HEADER_BYTES:
                    raise InputError("a header of at most 256 MiB", f"{length} bytes", name)
                return stream.read(length).rstrip(b"\0\n").decode("utf-8").split("\n")
            lines, rest, total = [], magic + stream.readline(_MOST_HEADER_BYTES), 0
            while rest.startswith(b"#"):
                total += len(rest)
                if total > _MOST_HEADER_BYTES:
                    raise InputError("a header of at most 256 MiB", "a longer one", name)
                lines.append(rest.rstrip(b"\r\n").decode("utf-8"))
                rest = stream.readline(_MOST_HEADER_BYTES)
    except (OSError, EOFError, zlib.error, struct.error, UnicodeDecodeError):
        raise InputError("a VCF or BCF header", "a damaged one", name) from None
    if not lines:
        raise InputError("a VCF or BCF header", "none", name)
    return lines


def _variants(path: Path, name: str) -> str:
    *meta, columns = header_lines(path, name)
    for line in meta:
        key, _, value = line.removeprefix("##").partition("=")
        if _VCF_KEYS.fullmatch(key) is None:
            hint = "bcftools --no-version writes no command lines; bcftools annotate --remove takes others out"
            raise _refuse("only ## lines that this engine writes", f"'##{key[:30]}'", name, hint)
        if key in ("reference", "source") and ("/" in value or "\\" in value):
            raise _refuse(f"##{key} without a path", "one", name)
    if not any(_VCF_MARK.match(line) for line in meta):
        raise _refuse("a line ##SYNTHETIC=... or ##engine_data=SYNTHETIC... in the header", "none", name)
    _check_people(columns.split("\t")[9:], name)
    return "## line of the header"


def _people(path: Path, name: str, separator: str) -> str:
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, delimiter=separator)
            heads = next(reader, [])
            which = [k for k, head in enumerate(heads) if head.strip().lower() in PERSON_COLUMNS]
            for row in reader:
                _check_people([row[k] for k in which if k < len(row)], name)
    except (UnicodeDecodeError, csv.Error):
        raise InputError("a table of text in UTF-8", "something else", name) from None
    return "names of the people, and sidecar"


def _check_people(ids: list[str], name: str) -> None:
    """The refusal does not show the id: it may be that of a person."""
    if any(not text.removeprefix("sub-").startswith(PERSON) for text in ids if text):
        raise _refuse(f"people whose ids begin with {PERSON}", "others", name, "write the synthetic ids")
