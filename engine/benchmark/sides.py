"""The data of a track, checked by hash and split by person into three sides, as a folder that entrants train from.

    SIDES/split.json      hashes and counts; the hash of the training side is what an entry has to name
    SIDES/train ...       what entrants may see:    panel.bcf, samples.tsv, map   or   volumes.csv and NIfTI files
    SIDES/test ...        what synthetic samples are compared with
    SIDES/fresh ...       people for the ceiling: real ones, handed in as if they were synthetic

The folder holds real people and stays inside. Hashes are of content (alleles, voxels), not of a writer's bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine import provenance, seeding
from engine.atomic import atomic_folder, write_json, write_text
from engine.benchmark.tracks import Track
from engine.errors import CorruptRun, InputError
from engine.genomics.panel import HaplotypePanel, read_panel, write_panel, write_samples
from engine.imaging.config import DataConfig
from engine.imaging.volume import Volume, read_volume, write_volume

SCHEMA = "engine.benchmark.sides/1"
SIDES = ("train", "test", "fresh")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sides:
    """A prepared split.

    Attributes:
        folder: where it lies.
        data: name, size and hash of every file of the track, and `data_sha256` of all together.
        split_sha256: hash of who lies on which side.
        train_sha256: content hash of the training side.
        people, units: by side; units are haplotypes or scans.
    """

    folder: Path
    track: str
    data: list[dict[str, Any]]
    data_sha256: str
    split_sha256: str
    train_sha256: str
    people: dict[str, int]
    units: dict[str, int]

    def side(self, name: str) -> Path:
        """The panel, or the folder of scans, of one side."""
        panel = self.folder / name / "panel.bcf"
        return panel if panel.is_file() else self.folder / name

    @property
    def map(self) -> Path | None:
        """The genetic map that goes with the training side."""
        found = sorted((self.folder / "train").glob("map.*"))
        return found[0] if found else None

    @property
    def groups(self) -> Path | None:
        """The table of groups of the training people."""
        path = self.folder / "train" / "samples.tsv"
        return path if path.is_file() else None


def prepare(track: Track, data: str | Path, out: str | Path, progress: Progress | None = None) -> Sides:
    """Check the data, split them by person and write the sides into the new folder `out`.

    Raises:
        InputError: a file is absent or has another hash, the data cannot be used, one person or family would lie on two
            sides, or the split is not the pinned one.
        UsageError: `out` exists.
    """
    data = Path(data)
    files = check_files(track, data)
    with atomic_folder(out) as folder:
        write = _write_panels if track.genotypes is not None else _write_scans
        side_of, train_sha256, units = write(track, data, folder, progress)
        split_sha256 = hashlib.sha256("\n".join(sorted(f"{p}\t{s}" for p, s in side_of.items())).encode()).hexdigest()
        if track.split.sha256 not in (None, split_sha256):
            raise InputError(f"the split {track.split.sha256}", split_sha256, f"track {track.name}", "the same data")
        people = {side: sum(s == side for s in side_of.values()) for side in SIDES}
        if min(people.values()) < 2:
            raise InputError("at least 2 people on every side", str(people), f"track {track.name}")
        joined = hashlib.sha256("".join(f["sha256"] for f in files).encode()).hexdigest()
        made = Sides(Path(out), track.name, files, joined, split_sha256, train_sha256, people, units)
        write_json(
            folder / "split.json",
            {"schema": SCHEMA, **{k: v for k, v in made.__dict__.items() if k != "folder"}, "samples": track.samples},
        )
    return made


def load_sides(folder: str | Path, track: Track) -> Sides:
    """What `prepare` wrote.

    Raises:
        InputError: no split there, or one of another track. CorruptRun: its JSON is not what was written.
    """
    folder = Path(folder)
    path = folder / "split.json"
    if not path.is_file():
        raise InputError("a folder that `engine benchmark split` wrote", "no split.json", folder)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("schema") != SCHEMA:
            raise CorruptRun(SCHEMA, "another schema", path)
        values.pop("samples")
        made = Sides(folder, **values)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CorruptRun("the split.json that was written", "other content", path) from None
    if made.track != track.name or track.split.sha256 not in (None, made.split_sha256):
        raise InputError(f"a split of track '{track.name}'", f"one of '{made.track}'", folder, "another folder")
    return made


def check_files(track: Track, data: Path) -> list[dict[str, Any]]:
    """Name, size and hash of every file of the track.

    Raises:
        InputError: a file is absent, or its hash is not the track's.
    """
    found = []
    for wanted in track.files:
        path = data / wanted.path
        if not path.exists():
            raise InputError(f"'{wanted.path}' of track '{track.name}'", "nothing there", data, track.obtain)
        record = {**provenance.input_record(path), "name": wanted.path}
        if wanted.sha256 not in (None, record["sha256"]):
            raise InputError(
                f"sha256 {wanted.sha256}", record["sha256"], path, "the version of the data that is pinned"
            )
        found.append(record)
    return found


def assign(people: Sequence[str], groups: Sequence[str], track: Track) -> dict[str, str]:
    """Side of every person: of each group the shares of the split, at random by its seed, whatever order they come in."""
    side_of: dict[str, str] = {}
    group_of = dict(zip(people, groups, strict=True))
    for index, group in enumerate(sorted(set(groups))):
        members = sorted(name for name, own in group_of.items() if own == group)
        order = seeding.generator(track.split.seed, "benchmark.split", index).permutation(len(members))
        test, fresh = round(track.split.test * len(members)), round(track.split.fresh * len(members))
        for rank, at in enumerate(order.tolist()):
            side_of[members[at]] = "test" if rank < test else "fresh" if rank < test + fresh else "train"
    return side_of


# ---- genotypes -------------------------------------------------------------------------------------------------------


def panel_sha256(panel: HaplotypePanel) -> str:
    """Hash of sites and alleles; ids, headers and the writer's bytes do not count."""
    s = panel.sites
    digest = hashlib.sha256()
    for contig, position, ref, alt in zip(s.contig.tolist(), s.position_bp.tolist(), s.ref, s.alt, strict=True):
        digest.update(f"{contig}\t{position}\t{ref}\t{alt}\n".encode())
    digest.update(np.ascontiguousarray(panel.samples.first_haplotype, dtype="<i8").tobytes())
    for plane_lw in (panel.bits_lw, panel.missing_lw):
        if plane_lw is not None and plane_lw.any():
            digest.update(np.ascontiguousarray(plane_lw, dtype="<u8").tobytes())
    return digest.hexdigest()


def _write_panels(
    track: Track, data: Path, folder: Path, progress: Progress | None
) -> tuple[dict[str, str], str, dict[str, int]]:
    from engine.genomics.pools import check_sides
    from engine.genomics.relatedness import families

    wanted = track.genotypes
    assert wanted is not None
    panel = read_panel(
        data / wanted.panel, samples_tsv=None if wanted.samples is None else data / wanted.samples, region=wanted.region
    )
    group = panel.samples.group
    group_of = dict(zip(panel.samples.ids, ["all"] * panel.n_samples if group is None else group.tolist(), strict=True))
    family_of = families(panel)
    heads = sorted(set(family_of.values()))
    side_of_family = assign(heads, [group_of[name] for name in heads], track)
    side_of = {name: side_of_family[family_of[name]] for name in panel.samples.ids}
    train_sha256, units = "", {}
    own_of: dict[str, HaplotypePanel] = {}
    for done, side in enumerate(SIDES):
        own_of[side] = own = panel.select(samples=np.array([side_of[name] == side for name in panel.samples.ids]))
        (folder / side).mkdir()
        write_panel(own, folder / side / "panel.bcf")
        if group is not None:
            write_samples(own, folder / side / "samples.tsv")
        units[side] = own.n_haplotypes
        if side == "train":
            train_sha256 = panel_sha256(own)
            if wanted.map is not None:
                shutil.copyfile(data / wanted.map, folder / side / f"map.{Path(wanted.map).name}")
        if progress is not None:
            progress("splitting", done + 1, len(SIDES))
    for other in ("test", "fresh"):  # what an audit would refuse later, for every entry
        check_sides(own_of["train"], own_of[other], f"track {track.name}, side {other}")
    return side_of, train_sha256, units


# ---- scans -----------------------------------------------------------------------------------------------------------


def grid_of(track: Track) -> DataConfig:
    """The grid that every scan of a track is compared on."""
    assert track.scans is not None
    wanted = {"size": track.scans.size, "spacing_mm": track.scans.spacing_mm, "modality": track.scans.modality}
    return DataConfig.model_validate(wanted)


def volumes_sha256(volumes: Sequence[Volume]) -> str:
    """Hash of voxels and affines, in order."""
    digest = hashlib.sha256()
    for volume in volumes:
        digest.update(str(volume.array_cdhw.shape).encode())
        digest.update(np.ascontiguousarray(volume.array_cdhw, dtype="<f4").tobytes())
        digest.update(np.round(np.ascontiguousarray(volume.affine, dtype="<f8"), 6).tobytes())
    return digest.hexdigest()


def write_table(folder: Path, rows: Sequence[dict[str, str]], columns: Sequence[str]) -> None:
    """`volumes.csv` of a folder of scans."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "volumes.csv", text.getvalue())


def _write_scans(
    track: Track, data: Path, folder: Path, progress: Progress | None
) -> tuple[dict[str, str], str, dict[str, int]]:
    assert track.scans is not None
    for side in SIDES:
        (folder / side).mkdir()
    if track.scans.table is not None:
        side_of = _copy_scans(track, data / track.scans.table, folder, progress)
    else:
        side_of = _unpack_arrays(track, data / str(track.scans.arrays), folder, progress)
    from engine.imaging.commands import read_folder

    counts = {side: len((folder / side / "volumes.csv").read_text(encoding="utf-8").splitlines()) - 1 for side in SIDES}
    train_sha256 = volumes_sha256(read_folder(folder / "train", track.scans.modality)[0]) if counts["train"] else ""
    return side_of, train_sha256, counts


def _copy_scans(track: Track, table: Path, folder: Path, progress: Progress | None) -> dict[str, str]:
    with table.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        columns, rows = list(reader.fieldnames or []), list(reader)
    for column in ("image", "subject"):
        if column not in columns:
            raise InputError(f"a column '{column}'", ", ".join(columns) or "no header", table)
    people = sorted({row["subject"] for row in rows})
    side_of = assign(people, ["all"] * len(people), track)
    kept = [name for name in columns if name != "label"]
    listed: dict[str, list[dict[str, str]]] = {side: [] for side in SIDES}
    for number, row in enumerate(rows):
        source = table.parent / row["image"]
        if not source.is_file() or source.is_symlink():
            raise InputError(f"the image '{row['image']}'", "nothing there", f"{table} row {number + 2}")
        side, name = side_of[row["subject"]], f"{number:05d}{''.join(source.suffixes[-2:])}"
        read_volume(source, modality=track.scans.modality if track.scans else None)  # what cannot be read stops here
        shutil.copyfile(source, folder / side / name)
        listed[side].append({**row, "image": name})
        if progress is not None:
            progress("splitting", number + 1, len(rows))
    for side in SIDES:
        write_table(folder / side, listed[side], kept)
    return side_of


def _unpack_arrays(track: Track, arrays: Path, folder: Path, progress: Progress | None) -> dict[str, str]:
    """MedMNIST: `train_images`, `test_images` and `val_images` (n, d, h, w), in the split its authors made by patient."""
    assert track.scans is not None
    side_of: dict[str, str] = {}
    try:
        with np.load(arrays, allow_pickle=False) as stored:
            sides = {side: stored[f"{name}_images"] for side, name in zip(SIDES, ("train", "test", "val"), strict=True)}
    except (OSError, ValueError, KeyError) as error:
        raise InputError("arrays train_images, test_images and val_images", str(error)[:120], arrays) from None
    affine = np.diag([*track.scans.spacing_mm, 1.0])
    total = sum(len(array) for array in sides.values())
    for side, array_ndhw in sides.items():
        rows = []
        for number, array_dhw in enumerate(array_ndhw):
            volume = Volume(array_dhw[None].astype(np.float32), affine, track.scans.modality, "arbitrary", {})
            name, subject = f"{number:05d}.nii.gz", f"{side}-{number:05d}"
            write_volume(volume, folder / side / name, subject=subject)
            side_of[subject] = side
            rows.append({"image": name, "subject": subject})
            if progress is not None:
                progress("splitting", len(side_of), total)
        write_table(folder / side, rows, ("image", "subject"))
    return side_of


def on_grid(volumes: Sequence[Volume], track: Track) -> list[Volume]:
    """Volumes on the track's grid in the units in which volumes leave the engine (HU, or 0 .. 1000)."""
    from engine.imaging.dataset import fit_volume, unscale_intensity

    grid = grid_of(track)
    fitted = [fit_volume(volume, grid) for volume in volumes]
    return [replace(volume, array_cdhw=unscale_intensity(volume.array_cdhw, grid)) for volume in fitted]
