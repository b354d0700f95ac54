"""A BIDS dataset, raw or derivative, as a table of scans: one row per image of one suffix, with what its tables say.

Read are the names of files, `dataset_description.json`, `participants.tsv` and the tables of sessions. JSON sidecars and
image headers are left alone: what the engine needs of a scan it measures. A link that leads out of the dataset is refused;
links inside it (as git-annex makes them) are followed. Writing is left to `engine.release.bids`. Source: BIDS 1.10, common
principles (entities, file name structure, tabular files) and modality-agnostic files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from engine.errors import InputError, closest
from engine.files import delimited

DESCRIPTION = "dataset_description.json"
_MASKS = ("dseg", "mask")  # suffixes of derivative label maps; they are labels here, not images
_NAME = re.compile(
    r"(?P<entities>sub-[A-Za-z0-9]+(?:_[A-Za-z]+-[A-Za-z0-9+]+)*)_(?P<suffix>[A-Za-z0-9]+)\.nii(?:\.gz)?"
)
# entities that say how a file was made, not which acquisition it shows: a label map need not share them
_MADE_BY = ("desc", "label", "hemi", "res", "den")


def is_dataset(path: str | Path) -> bool:
    """Whether `path` is the root of a BIDS dataset."""
    return (Path(path) / DESCRIPTION).is_file()


def read_table(root: str | Path, suffix: str | None = None) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of the scans of a dataset, ordered by subject, session and name.

    Args:
        suffix: which images, e.g. "T1w"; may be left out where the dataset has one kind only.

    Returns:
        Columns image, label, subject, visit, then those of participants.tsv and of the sessions' tables; the visit's own
        value counts where both have one. Paths are relative to `root`; subject and visit are without "sub-" and "ses-";
        label is the label map (suffix dseg, else mask) of the same acquisition, or empty.

    Raises:
        InputError: no dataset, no image of this suffix, several suffixes and none chosen, a name that disagrees with its
            folder, two label maps of one image, or a link out of the dataset.
    """
    root = Path(root)
    _described(root)
    found: dict[str, list[tuple[Path, dict[str, str]]]] = {}
    for path in sorted(root.glob("sub-*/**/*.nii*")):
        if match := _NAME.fullmatch(path.name):
            entities = dict(part.split("-", 1) for part in match["entities"].split("_"))
            _placed(root, path, entities)
            found.setdefault(match["suffix"], []).append((path, entities))
    kinds = [name for name in found if name not in _MASKS]
    if not kinds:
        raise InputError("images below sub-*/, e.g. sub-01/anat/sub-01_T1w.nii.gz", "none", root)
    if suffix is None and len(kinds) > 1:
        raise InputError("one kind of images, or a choice", " ".join(sorted(kinds)), root, "--set data.bids_suffix=T1w")
    chosen = suffix or kinds[0]
    if chosen not in found:
        raise InputError(f"images of suffix {chosen}", " ".join(sorted(kinds)), root, closest(chosen, kinds))
    people = _table(root / "participants.tsv", "participant_id", "sub-")
    sessions: dict[str, dict[str, dict[str, str]]] = {}
    rows: list[dict[str, str]] = []
    for path, entities in found[chosen]:
        who, visit = entities["sub"], entities.get("ses", "")
        if who not in sessions:
            sessions[who] = _table(root / f"sub-{who}" / f"sub-{who}_sessions.tsv", "session_id", "ses-")
        label = _label(path, entities, found)
        rows.append(
            {
                **people.get(who, {}),
                **sessions[who].get(visit, {}),
                "image": path.relative_to(root).as_posix(),
                "label": label.relative_to(root).as_posix() if label else "",
                "subject": who,
                "visit": visit,
            }
        )
    first = ["image", "label", "subject", "visit"]
    return [*first, *dict.fromkeys(name for row in rows for name in row if name not in first)], rows


def _described(root: Path) -> None:
    path = root / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8-sig"))
        version = description["BIDSVersion"]
    except FileNotFoundError:
        raise InputError(f"a BIDS dataset, with {DESCRIPTION} in it", "none", root, "a CSV table of scans") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError("a JSON object with BIDSVersion", f"damage ({type(error).__name__})", path) from None
    if not re.match(r"1\.\d+", str(version)):
        raise InputError("BIDSVersion 1.x", "another", path)


def _placed(root: Path, path: Path, entities: dict[str, str]) -> None:
    """Refuse a file whose name says another person or visit than its folders, or that lies outside the dataset."""
    folders = path.relative_to(root).parts[:-1]
    said = [f"sub-{entities['sub']}", *([f"ses-{entities['ses']}"] if "ses" in entities else [])]
    if [folder for folder in folders if folder.startswith(("sub-", "ses-"))] != said:
        raise InputError("a file in the folder of its subject and session", "/".join(folders), path, "rename it")
    if not path.resolve().is_relative_to(root.resolve()):
        raise InputError("files inside the dataset", "a link that leads out of it", path, "copy the file")


def _label(path: Path, entities: dict[str, str], found: dict[str, list[tuple[Path, dict[str, str]]]]) -> Path | None:
    def acquisition(of: dict[str, str]) -> dict[str, str]:
        return {name: value for name, value in of.items() if name not in _MADE_BY}

    for kind in _MASKS:
        maps = [at for at, own in found.get(kind, []) if acquisition(own) == acquisition(entities)]
        if len(maps) > 1:
            raise InputError(f"one {kind} for each image", str(len(maps)), path, "remove the others from a copy")
        if maps:
            return maps[0]
    return None


def _table(path: Path, key: str, prefix: str) -> dict[str, dict[str, str]]:
    """Rows of a tabular file by their id without `prefix`; "n/a" becomes an empty cell; none where there is no file."""
    if not path.is_file():
        return {}
    try:
        columns, rows = delimited.read(path)
    except UnicodeDecodeError:
        raise InputError("a table of UTF-8 text", "other bytes", path) from None
    if not columns or columns[0] != key:
        raise InputError(f"{key} as the first column", columns[0] if columns else "an empty file", path)
    made: dict[str, dict[str, str]] = {}
    for number, cells in enumerate(rows, start=2):
        if not cells:
            continue
        if len(cells) != len(columns) or not cells[0].startswith(prefix):
            raise InputError(
                f"{len(columns)} cells, the first an id {prefix}...", "another row", f"{path} line {number}"
            )
        who = cells[0].removeprefix(prefix)
        if who in made:
            raise InputError("each id once", "one a second time", f"{path} line {number}")
        made[who] = {name: "" if cell == "n/a" else cell for name, cell in zip(columns[1:], cells[1:], strict=True)}
    return made
