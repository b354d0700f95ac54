"""DICOM image series: a folder of slices -> one volume with its affine, and a volume -> one file per slice.

Reading never trusts names or instance numbers for geometry: slices are ordered by their position along the normal of
the image plane, and the distance between them is measured from those positions. What does not form one regular,
rectangular grid (missing slices, mixed orientation, gantry tilt) is refused with the place of the fault; duplicates
are dropped and said; several images at every position become channels. Single files are the business of
`dicom_frames.py`, writing that of `dicom_write.py`, whose `write_series` is offered here too. Sources: DICOM PS3.3
C.7.6.2 (image plane), C.11.1 (rescale).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import InputError
from engine.files.dicom_frames import Frame, NotAnImage, pixels_of, read_frames, read_pixels
from engine.files.dicom_write import write_series
from engine.files.volumes import (
    PERPENDICULAR_COSINE,
    VolumeData,
    content_warnings,
    fault_line,
    verdict,
    voxel_limit_bytes,
)

__all__ = ["check", "list_series", "read_series", "write_series"]

# Slice distances may differ from their median by this share: below the first it is rounding, above the second a fault.
_ROUNDING_SHARE, _FAULT_SHARE = 0.01, 0.05
_LPS_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_ASIDE = frozenset({".txt", ".md", ".json", ".csv", ".tsv", ".xml", ".html", ".pdf", ".log", ".yaml", ".yml"})
_ASIDE_NAMES = frozenset({"dicomdir", "license", "readme", "thumbs.db", "notice"})


def read_series(folder_or_files: str | Path | Iterable[str | Path], *, series_uid: str | None = None) -> VolumeData:
    """Read one series as a volume.

    Args:
        folder_or_files: a folder, read without its subfolders and without symbolic links; one file; or a list of files.
        series_uid: which series, where there are several. Without it the one with most images is read, the first by
            UID of equal ones, and a warning says so; `list_series` names them.

    Returns:
        array_cdhw: axis 1 along the columns' index, axis 2 along the rows' index, axis 3 along the plane's normal
            (row direction x column direction); int16, uint16 or int32 where slope is 1 and intercept whole, else
            float32.
        affine: RAS+, mm. units "HU" for CT with Rescale Slope and Intercept, else "arbitrary".

    Raises:
        InputError: one line with the file or position and the fault.
    """
    files, where, warnings = _files(folder_or_files)
    frames = _all_frames(files, where, warnings)
    by_series: dict[str, list[Frame]] = {}
    for frame in frames:
        by_series.setdefault(frame.series_uid, []).append(frame)
    if series_uid is not None:
        if series_uid not in by_series:
            raise InputError(
                "the series asked for", f"{len(by_series)} others", where, "engine.files.dicom.list_series"
            )
        chosen = by_series[series_uid]
    else:
        chosen = max((by_series[uid] for uid in sorted(by_series)), key=len)
        if len(by_series) > 1:
            counts = sorted((len(group) for group in by_series.values()), reverse=True)
            several = " and ".join(map(str, counts)) if len(counts) <= 4 else f"{counts[0]} to {counts[-1]}"
            warnings.append(
                f"{len(counts)} series of {several} images: one of {len(chosen)} was read; choose by series_uid"
            )
    bare = [frame for frame in chosen if frame.bare]
    if not bare:
        return _assemble(chosen, where, warnings)
    count = len({frame.path for frame in bare})
    try:
        return _assemble(chosen, where, [*warnings, f"{count} file(s) without the 128-byte preamble"])
    except InputError:
        if len(bare) == len(chosen):
            raise
        # such a file is no DICOM file by PS3.10; where it does not fit the others it is no part of them
        left_out = f"{count} file(s) without the 128-byte preamble that do not continue the series, left out"
        return _assemble([frame for frame in chosen if not frame.bare], where, [*warnings, left_out])


def list_series(folder_or_files: str | Path | Iterable[str | Path]) -> list[dict[str, Any]]:
    """The series in a folder: [{"series_uid", "modality", "images"}], in the order in which `read_series` prefers
    them.
    """
    files, where, warnings = _files(folder_or_files)
    found: dict[str, dict[str, Any]] = {}
    for frame in _all_frames(files, where, warnings):
        entry = found.setdefault(
            frame.series_uid, {"series_uid": frame.series_uid, "modality": frame.modality, "images": 0}
        )
        entry["images"] += 1
    return sorted(found.values(), key=lambda entry: (-entry["images"], entry["series_uid"]))


def check(folder_or_files: str | Path | Iterable[str | Path]) -> tuple[str, str]:
    """("ok" | "warn" | "reject", why) for one series; reads it whole and never raises for a bad one."""
    try:
        return verdict(read_series(folder_or_files))
    except InputError as error:
        name = Path(error.where).name
        inside = isinstance(folder_or_files, str | Path) and error.where not in ("", str(folder_or_files))
        return "reject", f"{name}: {fault_line(error)}" if inside else fault_line(error)
    except MemoryError:
        return "reject", "more voxels than this machine's memory holds"


def _files(folder_or_files: str | Path | Iterable[str | Path]) -> tuple[list[Path], Path | str, list[str]]:
    """Regular files to look at, what to call them together, and warnings about what was passed over."""
    warnings: list[str] = []
    if not isinstance(folder_or_files, str | Path):
        files = sorted(Path(path) for path in folder_or_files)
        if not files:
            raise InputError("DICOM files", "an empty list", "series")
        return files, "series", warnings
    where = Path(folder_or_files)
    if not where.exists():
        raise InputError("a DICOM folder or file", "nothing there", where)
    if not where.is_dir():
        return [where], where, warnings
    links, files, folders = 0, [], 0
    try:
        entries = sorted(where.iterdir())
    except OSError as error:
        raise InputError("a readable folder", type(error).__name__, where) from None
    for entry in entries:
        if entry.is_symlink():
            links += 1
        elif entry.is_dir():
            folders += 1
        elif entry.is_file() and not _aside(entry):
            files.append(entry)
    if links:
        warnings.append(f"{links} symbolic link(s) not followed")
    if not files:
        hint = "name one of its subfolders" if folders else ""
        raise InputError("DICOM files", "none directly in this folder", where, hint)
    return files, where, warnings


def _aside(path: Path) -> bool:
    """Companions of a series that are known by name and never slices."""
    name = path.name.lower()
    return name.startswith(".") or path.suffix.lower() in _ASIDE or name in _ASIDE_NAMES


def _all_frames(files: list[Path], where: Path | str, warnings: list[str]) -> list[Frame]:
    frames: list[Frame] = []
    passed: dict[str, int] = {}
    for path in files:
        try:
            frames += read_frames(path)
        except NotAnImage as reason:
            passed[str(reason)] = passed.get(str(reason), 0) + 1
    if not frames:
        what = ", ".join(f"{count} file(s) of {reason}" for reason, count in passed.items())
        raise InputError("DICOM images", what or "none", where)
    warnings += [
        f"{count} file(s) passed over: {reason}" for reason, count in passed.items() if "directory" not in reason
    ]
    return frames


def _assemble(frames: list[Frame], where: Path | str, warnings: list[str]) -> VolumeData:
    """Frames of one series -> volume: one plane, one grid, one direction, then the pixels."""
    warnings = list(warnings)
    _same_plane(frames)
    first = frames[0]
    depth = first.rows * first.columns * len(frames) * 4
    if depth > voxel_limit_bytes():
        raise InputError(f"at most {voxel_limit_bytes()} bytes of voxels on this machine", f"{depth} declared", where)
    stored = _stored(frames)
    frames, keep = _without_repeats(frames, stored, warnings)
    normal = np.cross(first.row_direction, first.column_direction)
    stacks = _stacks(frames, normal)
    stacks = _times(stacks, frames, keep, where, normal, warnings)
    affine = _affine([[frames[i] for i in stack] for stack in stacks], normal, where, warnings)
    array_cdhw = _values(stacks, frames, keep)
    units = {(frame.modality, frame.hounsfield) for frame in frames}
    if len({modality for modality, _ in units}) > 1:
        raise InputError("one modality in a series", f"{len(units)}", where)
    if first.modality == "CT" and not all(hounsfield for _, hounsfield in units):
        warnings.append("CT without Rescale Slope and Intercept in HU: values are arbitrary")
        hounsfield_units = "arbitrary"
    else:
        hounsfield_units = "HU" if first.modality == "CT" else "arbitrary"
    warnings += sorted({note for frame in frames for note in frame.warnings})
    warnings += content_warnings(array_cdhw, where)
    return VolumeData(array_cdhw, affine, first.modality, hounsfield_units, first.metadata, warnings)


def _same_plane(frames: list[Frame]) -> None:
    """Refuse frames that cannot share a grid, naming the file that is in the minority."""

    def odd_one(keys: list[Any]) -> int | None:
        common = max(keys, key=keys.count)
        return next((i for i, key in enumerate(keys) if key != common), None)

    sizes = [(frame.rows, frame.columns) for frame in frames]
    if (odd := odd_one(sizes)) is not None:
        common = max(sizes, key=sizes.count)
        got = "x".join(map(str, sizes[odd]))
        raise InputError(
            "Rows x Columns " + "x".join(map(str, common)) + " as in the other slices", got, frames[odd].path
        )
    directions = np.array([np.concatenate([f.row_direction, f.column_direction]) for f in frames])
    middle = np.median(directions, axis=0)
    apart = np.abs(directions - middle).max(axis=1)
    if apart.max() > PERPENDICULAR_COSINE:
        odd = int(apart.argmax())
        hint = "remove localizer images from the folder"
        raise InputError("one orientation in a series", "another ImageOrientationPatient", frames[odd].path, hint)
    spacing = np.array([(f.row_spacing, f.column_spacing) for f in frames])
    usual = np.median(spacing, axis=0)
    apart = np.abs(spacing / usual - 1).max(axis=1)
    if apart.max() > 1e-3:
        odd = int(apart.argmax())
        got = "{:g}x{:g} mm".format(*spacing[odd])
        raise InputError("PixelSpacing {:g}x{:g} mm as in the other slices".format(*usual), got, frames[odd].path)


def _stored(frames: list[Frame]) -> list[np.ndarray]:
    """Stored pixels of each frame; each file is decoded once."""
    by_file: dict[Path, list[int]] = {}
    for i, frame in enumerate(frames):
        by_file.setdefault(frame.path, []).append(i)
    planes: list[np.ndarray] = [np.empty(0)] * len(frames)
    for path, members in by_file.items():
        pixels = read_pixels(path)
        for i in members:
            frame = frames[i]
            if not frame.tile_width and pixels.shape[1:] != (frame.rows, frame.columns):
                raise InputError(
                    f"pixels of {frame.rows}x{frame.columns}", f"{pixels.shape[1]}x{pixels.shape[2]}", path
                )
            planes[i] = pixels_of(frame, pixels)
    return planes


def _without_repeats(
    frames: list[Frame], stored: list[np.ndarray], warnings: list[str]
) -> tuple[list[Frame], list[np.ndarray]]:
    """Drop frames that came twice under one SOP Instance UID; two different images under one UID are a fault."""
    seen: dict[tuple[str, int], int] = {}
    keep: list[int] = []
    for i, frame in enumerate(frames):
        key = (frame.instance_uid, frame.index)
        before = seen.setdefault(key, i) if frame.instance_uid else i
        if before == i:
            keep.append(i)
        elif not _same_image(frames[before], frame, stored[before], stored[i]):
            raise InputError("one image for each SOP Instance UID", "another image under a UID seen before", frame.path)
    if len(keep) < len(frames):
        warnings.append(f"{len(frames) - len(keep)} duplicate image(s), the same slice under the same UID, dropped")
    return [frames[i] for i in keep], [stored[i] for i in keep]


def _same_image(a: Frame, b: Frame, stored_a: np.ndarray, stored_b: np.ndarray) -> bool:
    return (
        np.allclose(a.position, b.position, atol=1e-3)
        and (a.slope, a.intercept) == (b.slope, b.intercept)
        and np.array_equal(stored_a, stored_b)
    )


def _stacks(frames: list[Frame], normal: np.ndarray) -> list[list[int]]:
    """Indices of frames grouped by position along the normal, in its direction."""
    along = np.array([frame.position @ normal for frame in frames])
    same = min(0.01, 0.01 * frames[0].column_spacing)
    stacks: list[list[int]] = []
    for i in np.argsort(along, kind="stable"):
        if stacks and along[i] - along[stacks[-1][0]] <= same:
            stacks[-1].append(int(i))
        else:
            stacks.append([int(i)])
    return stacks


def _times(
    stacks: list[list[int]],
    frames: list[Frame],
    stored: list[np.ndarray],
    where: Path | str,
    normal: np.ndarray,
    warnings: list[str],
) -> list[list[int]]:
    """The same number of images at every position, in the order of acquisition; identical surplus ones are dropped."""
    if len({len(stack) for stack in stacks}) > 1:
        dropped = 0
        for s, stack in enumerate(stacks):
            unique: list[int] = []
            for i in stack:
                if not any(_same_image(frames[j], frames[i], stored[j], stored[i]) for j in unique):
                    unique.append(i)
            dropped += len(stack) - len(unique)
            stacks[s] = unique
        if dropped:
            warnings.append(f"{dropped} duplicate image(s), equal pixels at the same position, dropped")
    counts = [len(stack) for stack in stacks]
    if len(set(counts)) > 1:
        usual = max(counts, key=counts.count)
        odd = next(s for s, count in enumerate(counts) if count != usual)
        frame = frames[stacks[odd][0]]
        place = f"{counts[odd]} at {frame.position @ normal:.3f} mm along the normal"
        raise InputError(
            f"{usual} image(s) at every position", place, frame.path, "one time or echo, or a whole series"
        )
    if counts[0] > 1 and len(stacks) == 1:
        raise InputError("slices at several positions", f"{counts[0]} different images at one position", where)
    if counts[0] > 1:
        orders = [[frames[i].order for i in stack] for stack in stacks]
        plain = [[tuple(-1.0 if np.isnan(x) else x for x in order) for order in stack] for stack in orders]
        if any(len(set(stack)) < len(stack) for stack in plain):
            got = f"{counts[0]} at each position that nothing puts in order"
            raise InputError("one image at each position, or an order in time", got, where, "split the series")
        stacks = [
            [i for _, i in sorted(zip(keys, stack, strict=True))] for keys, stack in zip(plain, stacks, strict=True)
        ]
        warnings.append(f"4D: {counts[0]} images at each position, read as channels in the order of their numbers")
    return stacks


def _affine(stacks: list[list[Frame]], normal: np.ndarray, where: Path | str, warnings: list[str]) -> np.ndarray:
    """Affine to RAS from positions, PS3.3 equation C.7.6.2.1-1, after proving that the positions form a straight
    regular row.
    """
    first = stacks[0][0]
    places = np.array([stack[0].position for stack in stacks])
    if len(places) == 1:
        distance = first.thickness
        warnings.append("one slice only" + ("" if distance else ", and no thickness: 1 mm assumed"))
        step = normal * (distance or 1.0)
    else:
        step = (places[-1] - places[0]) / (len(places) - 1)
        extent = float((places[-1] - places[0]) @ normal)
        drift = float(np.linalg.norm((places[-1] - places[0]) - extent * normal))
        pixel = min(first.row_spacing, first.column_spacing)
        if drift > PERPENDICULAR_COSINE * extent and drift > 0.05 * pixel:
            angle = np.degrees(np.arctan2(drift, extent))
            hint = "resample it upright with a DICOM tool (gantry tilt correction)"
            raise InputError("slices stacked along their normal", f"a tilt of {angle:.2f} degrees", where, hint)
        _regular(places @ normal, stacks, where, warnings)
        aside = places - places[0] - np.outer((places - places[0]) @ normal, step) / (step @ normal)
        if (worst := float(np.linalg.norm(aside, axis=1).max())) > 0.5 * pixel:
            raise InputError("slices stacked in a straight row", f"one {worst:.3g} mm aside", where)
    affine = np.eye(4)
    affine[:3, 0] = first.row_direction * first.column_spacing
    affine[:3, 1] = first.column_direction * first.row_spacing
    affine[:3, 2] = step
    affine[:3, 3] = places[0]
    return _LPS_RAS @ affine


def _regular(along: np.ndarray, stacks: list[list[Frame]], where: Path | str, warnings: list[str]) -> None:
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    worst = int(np.abs(gaps - usual).argmax())
    share = abs(gaps[worst] - usual) / usual
    if share > _FAULT_SHARE:
        place = f"{gaps[worst]:.3f} mm between {along[worst]:.3f} and {along[worst + 1]:.3f} mm along the normal"
        missing = gaps[worst] / usual - 1
        some = (
            missing > 0.5
            and abs(missing - round(missing)) < 0.1
            and np.count_nonzero(np.abs(gaps - usual) > 0.05 * usual) <= 3
        )
        what = f"{place}: {round(missing)} slice(s) missing" if some else place
        raise InputError(
            f"slices {usual:.3f} mm apart", what, where, "find the missing slices, or choose a regular part"
        )
    if share > _ROUNDING_SHARE:
        warnings.append(f"slice distances vary by {100 * share:.1f} % around {usual:.3f} mm: the mean was used")
    if len(gaps) == 1:
        warnings.append(f"two slices only: nothing confirms that their distance of {usual:.3f} mm is regular")


def _values(stacks: list[list[int]], frames: list[Frame], stored: list[np.ndarray]) -> np.ndarray:
    """(channels, columns, rows, slices): integers where the rescale keeps them whole, else float32."""
    times, depth = len(stacks[0]), len(stacks)
    rescales = {(frame.slope, frame.intercept) for frame in frames}
    whole = len(rescales) == 1 and next(iter(rescales))[0] == 1 and next(iter(rescales))[1].is_integer()
    shape = (times, frames[0].columns, frames[0].rows, depth)
    if whole and abs(frames[0].intercept) < 2**30:
        shift = int(frames[0].intercept)
        low = min(int(plane.min()) for plane in stored) + shift
        high = max(int(plane.max()) for plane in stored) + shift
        kinds = (np.int16, np.uint16, np.int32, np.int64)
        kind = next(k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max)
        array = np.empty(shape, dtype=kind)
        for k, stack in enumerate(stacks):
            for c, i in enumerate(stack):
                array[c, :, :, k] = (stored[i].astype(np.int64) + shift).T
        return array
    scaled = np.empty(shape, dtype=np.float32)
    for k, stack in enumerate(stacks):
        for c, i in enumerate(stack):
            scaled[c, :, :, k] = (stored[i].astype(np.float64) * frames[i].slope + frames[i].intercept).T
    return scaled
