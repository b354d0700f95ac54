"""`check_paths`: can the engine read this file or folder, and if not, why? One verdict per input, never a traceback.

The kind of an input is told by its content first and its name second; the verdict is that of the format's own module,
which reads the whole input. Genotype formats are judged by `engine.files.vcf`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

_NIFTI = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz")
_GENOTYPES = (".vcf", ".vcf.gz", ".vcf.bgz", ".bcf", ".pgen")
_INDEX = (".tbi", ".csi", ".pvar", ".psam", ".pvar.zst")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")
# first tags of a data set without a preamble: groups 2 and 8
_BARE_DICOM = (b"\x02\0\0\0", b"\x08\0\0\0", b"\x08\0\x05\0", b"\x08\0\x08\0")
_OTHER_SCANS = (".mha", ".mhd", ".nrrd", ".nhdr", ".mgz", ".mgh", ".mnc", ".head", ".brik")


def check_paths(paths: Iterable[str | Path]) -> list[dict[str, str]]:
    """Verdicts in order: [{"path", "verdict": "ok" | "warn" | "reject", "why"}].

    A folder with DICOM files directly in it is one series and one input. Any other folder stands for the scans and
    genotype files directly in it, or is refused when there are none. Symbolic links inside a folder are not followed.
    """
    found: list[dict[str, str]] = []
    for path in paths:
        for item in _expand(Path(path)):
            verdict, why = _check(item)
            found.append({"path": str(item), "verdict": verdict, "why": " ".join(why.split())})
    return found


def _expand(path: Path) -> list[Path]:
    try:
        if not path.is_dir():
            return [path]
        files = sorted(entry for entry in path.iterdir() if not entry.is_symlink() and entry.is_file())
        if any(_is_dicom(file) for file in files):
            return [path]
        return [file for file in files if _kind(file) in ("nifti", "genotypes") and not _is_second_half(file)] or [path]
    except OSError:
        return [path]


def _check(path: Path) -> tuple[str, str]:
    try:
        kind = _kind(path)
        if kind in ("nifti", "gzip"):
            from engine.files.nifti import check

            return check(path)
        if kind == "dicom":
            from engine.files.dicom import check as check_dicom

            return check_dicom(path)
        if kind == "genotypes":
            from engine.files.vcf import check as check_genotypes

            return check_genotypes(path)
        return "reject", kind
    except MemoryError:
        return "reject", "needs more memory than this machine has"
    except RecursionError:
        return "reject", "nested deeper than any real file"
    except Exception as error:  # the last net: an input must never end a run of checks
        return "reject", f"cannot be read ({type(error).__name__})"


def _kind(path: Path) -> str:
    """ "nifti", "dicom", "genotypes", "gzip", or why the path is none of these."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        return "no such file" if isinstance(error, FileNotFoundError) else "cannot be opened"
    if stat.S_ISDIR(mode):
        return "dicom"
    if not stat.S_ISREG(mode):
        return "neither a file nor a folder"
    name = path.name.lower()
    head = _head(path)
    if head is None:
        return "cannot be opened"
    if head[128:132] == b"DICM":
        return "dicom"
    if name.endswith(_NIFTI):
        return "nifti"
    if name.endswith(_GENOTYPES):
        return "genotypes"
    if not head:
        return "an empty file"
    if head[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c", b"\x1c\x02\0\0", b"\0\0\x02\x1c"):
        return "nifti"
    if head.startswith((b"##fileformat=VCF", b"BCF\x02", b"l\x1b")):
        return "genotypes"
    if name.endswith(_ARCHIVES) or head[:4] == b"PK\x03\x04" or head[257:262] == b"ustar":
        return "an archive: unpack it and name the files"
    if name.endswith(_OTHER_SCANS) or head.startswith((b"NRRD", b"ObjectType")):
        return "a scan in a format that is not read: convert it to NIfTI"
    if name.endswith(_INDEX):
        return "the companion of a genotype file: name the file itself"
    if name.endswith((".dcm", ".dicom", ".ima")) or head[:4] in _BARE_DICOM:
        return "dicom"
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    return "neither a scan nor a genotype file"


def _head(path: Path) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read(512)


def _is_dicom(path: Path) -> bool:
    return _kind(path) == "dicom"


def _is_second_half(path: Path) -> bool:
    """The .img of a pair, whose .hdr stands beside it and speaks for both."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    if not name.lower().endswith(".img"):
        return False
    stem = name[:-4]
    return any(path.with_name(stem + suffix).is_file() for suffix in (".hdr", ".hdr.gz", ".HDR"))
