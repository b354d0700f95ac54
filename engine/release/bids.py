"""Released scans as a BIDS derivative dataset: names, descriptions, participants and sessions.

BIDS has no name for an image whose contrast is unknown, so this layout is used only where the caller names it (T1w, FLAIR
...). The bytes of a scan stay the audited ones; only its name changes. Tables of the generated folder are not copied,
because they name scans as they were: their columns come back as participants.tsv and sessions.tsv. The generated folder may
be a BIDS dataset itself (`engine cohort generate`): then everything in it but the scans is written anew. Source: BIDS 1.10,
common principles, modality-agnostic files, derivatives.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine import __version__
from engine.atomic import write_json, write_text
from engine.errors import GateRefused, InputError, UsageError, closest
from engine.files import bids as dataset
from engine.release.marks import DATASET_TYPE, MARK

VERSION = "1.10.0"
SUFFIXES = ("T1w", "T2w", "PDw", "T2starw", "FLAIR", "inplaneT1", "inplaneT2", "PDT2", "angio")  # BIDS: datatype anat
TABLES = ("volumes.csv", "checksums.json")  # of the generated folder; said again in BIDS' own files and SHA256SUMS
_COLUMNS = {
    "age": {"Description": "age of the synthetic person at the visit", "Units": "year"},
    "sex": {"Description": "sex of the synthetic person", "Levels": {"M": "male", "F": "female"}},
    "interval_years": {"Description": "time since the first visit", "Units": "year"},
    "years": {"Description": "time since the first visit", "Units": "year"},
    "end": {"Description": "how the follow-up of the synthetic person ended"},
    "end_years": {"Description": "when it ended, since the first visit", "Units": "year"},
    "genotypes": {"Description": "whether the synthetic person has genotypes, which are no part of this dataset"},
}
_DATASET = re.compile(  # what a dataset says of its scans
    r"dataset_description\.json|(README|CHANGES)(\.(md|rst|txt))?|LICENSE|\.bidsignore|(participants|sessions)\.(tsv|json)"
    r"|sub-\w+/sub-\w+_sessions\.(tsv|json)"
)
_NOT_COVARIATES = {"image", "label", "subject", "visit"}


def layout(names: Sequence[str], table: Sequence[Mapping[str, str]], suffix: str) -> dict[str, str]:
    """BIDS path below the dataset's root of every scan in `names`; other files are left out.

    Args:
        names: audited files, relative; table: of `read_table` (image, subject, visit), or none, when names must be
            SYN..._visitN.nii.gz; suffix: one of SUFFIXES.

    Raises:
        UsageError: a suffix that BIDS does not have for anatomy.
        GateRefused: a file that is no NIfTI scan, a scan without a row, or two that would have one name.
    """
    if suffix not in SUFFIXES:
        hint = closest(suffix, list(SUFFIXES))
        raise UsageError("a BIDS suffix of anatomical images", repr(suffix), "--bids", hint)
    by_image = {row["image"]: row for row in table}
    said_again = set(TABLES)
    if dataset.DESCRIPTION in names:
        beside = {image[: image.rindex(".nii")] + ".json" for image in by_image}
        said_again |= {name for name in names if name in beside or _DATASET.fullmatch(name)}
    made: dict[str, str] = {}
    for name in names:
        if name in said_again:
            continue
        lower = name.lower()
        if not lower.endswith((".nii", ".nii.gz")):
            raise GateRefused("only NIfTI scans and their tables", "another file", name, "leave --bids out")
        subject, visit = _who(name, by_image.get(name))
        stem = f"sub-{subject}" + (f"_ses-{visit}" if visit else "")
        folder = f"sub-{subject}/" + (f"ses-{visit}/" if visit else "")
        made[name] = f"{folder}anat/{stem}_desc-synthetic_{suffix}{lower[lower.rindex('.nii') :]}"
    if len(set(made.values())) < len(made):
        raise GateRefused("one scan for each person and visit", "several", "volumes.csv", "give them visits")
    return made


def _who(name: str, row: Mapping[str, str] | None) -> tuple[str, str]:
    if row is not None:
        subject, visit = row.get("subject") or "", row.get("visit") or ""
    else:
        found = re.fullmatch(r"(?:.*/)?([A-Za-z0-9]+)(?:_visit-?([A-Za-z0-9]+))?\.nii(?:\.gz)?", name)
        subject, visit = (found[1], found[2] or "") if found else ("", "")
    if not re.fullmatch(r"[A-Za-z0-9]+", subject) or not re.fullmatch(r"[A-Za-z0-9]*", visit):
        raise GateRefused("a subject and visit of letters and digits for every scan", "others", name, "a volumes.csv")
    return subject, visit


def read_table(folder: Path, suffix: str) -> list[dict[str, str]]:
    """Rows of a folder's volumes.csv, or of the scans of this suffix where the folder is a BIDS dataset; else none.

    Raises:
        InputError: no column image, or a dataset that cannot be read.
    """
    path = folder / "volumes.csv"
    if not path.is_file() and dataset.is_dataset(folder):
        return dataset.read_table(folder, suffix)[1]
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    if rows and "image" not in rows[0]:
        raise InputError("a column 'image'", ", ".join(rows[0]), path.name)
    return rows


def write_metadata(
    root: Path,
    table: Sequence[Mapping[str, str]],
    placed: Mapping[str, str],
    manifest: Mapping[str, Any],
    sources: Sequence[str] = (),
) -> None:
    """dataset_description.json, README.md, participants and sessions, into the dataset's root.

    Args:
        table: rows of volumes.csv; placed: `layout`; manifest: of the release; sources: DOIs or URLs of the datasets that
            were learned from, where they are public.
    """
    description: dict[str, Any] = {
        "Name": manifest["title"],
        "BIDSVersion": VERSION,
        "DatasetType": "derivative",
        "License": manifest["licence"],
        "SyntheticData": True,
        "Description": f"{MARK} {manifest['description']}".strip(),
        "EUDatasetType": DATASET_TYPE,
        "GeneratedBy": [
            {
                "Name": "engine",
                "Version": __version__,
                "Description": "Images drawn from a generative model, one per synthetic visit; no scanner took part.",
            }
        ],
    }
    if manifest.get("creator"):
        description["Authors"] = [manifest["creator"]]
    if sources:
        description["SourceDatasets"] = [
            {"DOI": f"doi:{text.removeprefix('doi:')}"}
            if text.removeprefix("doi:").startswith("10.")
            else {"URL": text}
            for text in sources
        ]
    write_json(root / "dataset_description.json", description)
    write_text(root / "README.md", _readme(manifest, sources))

    people: dict[str, list[tuple[str, Mapping[str, str]]]] = {}
    rows = table or [{"image": name} for name in placed]
    for row in rows:
        if row["image"] in placed:
            subject, visit = _who(row["image"], row if table else None)
            people.setdefault(subject, []).append((visit, row))
    names = [name for name in (table[0] if table else {}) if name not in _NOT_COVARIATES]
    fixed = [n for n in names if all(len({row.get(n) for _, row in visits}) == 1 for visits in people.values())]
    moving = [n for n in names if n not in fixed]
    rows_out = [[f"sub-{who}", *(visits[0][1].get(n) or "n/a" for n in fixed)] for who, visits in people.items()]
    write_text(root / "participants.tsv", _tsv(["participant_id", *fixed], rows_out))
    write_json(root / "participants.json", _dictionary("participant_id", "id of the synthetic person", fixed))
    if any(visit for visits in people.values() for visit, _ in visits):
        for who, visits in people.items():
            cells = [[f"ses-{visit}", *(row.get(n) or "n/a" for n in moving)] for visit, row in visits]
            write_text(root / f"sub-{who}" / f"sub-{who}_sessions.tsv", _tsv(["session_id", *moving], cells))
        write_json(root / "sessions.json", _dictionary("session_id", "visit of the synthetic person", moving))


def _readme(manifest: Mapping[str, Any], sources: Sequence[str]) -> str:
    learned = ", ".join(sources) or "real scans that are not part of this dataset and are not named"
    return f"""# {manifest["title"]}

{MARK}

{manifest["description"]}

This is a BIDS derivative dataset. Each image was drawn from a generative model (engine {__version__}) that had learned from
{learned}; no scanner took part, and no person was imaged.
Ids begin with SYN. Every image says SYNTHETIC in the `descrip` field of its NIfTI header and `"SyntheticData": true` in
the JSON file beside it. Before release an audit looked for copies of the people
the model had learned from and passed on exactly these bytes; `DATA_CARD.md`, one folder up, has its findings and what the
data are not for.
"""


def _dictionary(key: str, meaning: str, names: Sequence[str]) -> dict[str, Any]:
    """Data dictionary of a table, which also marks it."""
    columns = {
        name: _COLUMNS.get(name, {"Description": f"covariate '{name}' of the synthetic person"}) for name in names
    }
    return {"Description": MARK, "SyntheticData": True, key: {"Description": meaning}, **columns}


def _tsv(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return text.getvalue()
