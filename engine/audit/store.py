"""Embedding stores: rows to be audited as one safetensors file, beside a table that says whose they are.

A store is a file NAME.safetensors with its table NAME.people.tsv beside it, or a folder that holds `store.safetensors` and
`people.tsv`. Tensors: `features` float32 (n, d), or `bits` uint64 (n, words) with `length` sites in the metadata; optional
`views` and `position_bp` as in `Pool`. Nothing is ever unpickled, and what the header declares is checked against the
size of the file before anything is read. What the features mean is the caller's business.

`read_people` reads the same kind of table for panels and folders of scans, where `id` is the sample or the subject.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from engine.atomic import atomic_folder, write_text
from engine.audit.pools import Pool
from engine.errors import InputError, closest

SCHEMA = "engine.store/1"
SUFFIX = ".safetensors"
_FILE, _TABLE = f"store{SUFFIX}", "people.tsv"
_DTYPES = {"features": "F32", "bits": "U64", "views": "", "position_bp": "I64"}
_COLUMNS = {"id": ("id", "row", "sample", "image", "file"), "person": ("person", "subject"), "group": ("group",)}
_LARGEST_TABLE_BYTES = 1 << 30


@dataclass(frozen=True)
class People:
    """A person table: who is behind every id, their group, and the side of the split they are meant to be on."""

    person: Mapping[str, str]
    group: Mapping[str, str]
    split: Mapping[str, str]
    where: str


def is_store(path: str | Path) -> bool:
    """Whether `path` names an embedding store, by its name alone or by the file that makes a folder one."""
    path = Path(path)
    return path.name.endswith(SUFFIX) if not path.is_dir() else (path / _FILE).is_file()


def write_store(pool: Pool, folder: str | Path) -> Path:
    """Write `pool` as a new folder with `store.safetensors` and `people.tsv` (row, person, group), whole or not at all.

    Raises:
        InputError: a person id or a group with a tab or a line break. UsageError: `folder` exists.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {pool.kind: np.ascontiguousarray(pool.data)}
    if pool.views is not None:
        tensors["views"] = np.ascontiguousarray(pool.views)
    if pool.position_bp is not None:
        tensors["position_bp"] = np.ascontiguousarray(pool.position_bp)
    metadata = {"schema": SCHEMA, "kind": pool.kind}
    if pool.length is not None:
        metadata["length"] = str(pool.length)
    columns = [np.arange(len(pool)).astype(str), pool.person]
    if pool.group is not None:
        columns.append(pool.group)
    for column in columns:
        for value in column:
            if not value.isprintable():
                raise InputError("ids without tabs and line breaks", repr(str(value)), "embedding store")
    lines = ["\t".join(("row", "person", "group")[: len(columns)])] + ["\t".join(row) for row in zip(*columns)]
    with atomic_folder(folder) as partial:
        save_file(tensors, partial / _FILE, metadata=metadata)
        write_text(partial / _TABLE, "\n".join(lines) + "\n")
    return Path(folder)


def read_store(path: str | Path, side: str = "synthetic") -> Pool:
    """The pool in a store.

    Args:
        side: "train", "holdout" or "synthetic". Synthetic rows without a table are people of their own; real rows without
            one are refused, because rows of one person would count as several.

    Raises:
        InputError: not a store, tensors of a wrong type or shape or unknown name, or a table that does not fit.
    """
    path = Path(path)
    file = path / _FILE if path.is_dir() else path
    table = path / _TABLE if path.is_dir() else path.with_name(path.name.removesuffix(SUFFIX) + ".people.tsv")
    tensors, length = _read_tensors(file)
    kind: Literal["bits", "features"] = "bits" if "bits" in tensors else "features"
    rows = [str(i) for i in range(len(tensors[kind]))]
    pool = Pool(
        kind, tensors[kind], np.array(rows, dtype=str), None, tensors.get("views"), length, tensors.get("position_bp")
    )
    if length is not None and not _unused_bits_are_zero(pool.data, length):
        raise InputError(f"zeros behind the {length} sites", "further bits", file, "unused high bits must be zero")
    if not table.is_file():
        if side == "synthetic":
            return pool
        raise InputError(
            "a table that says whose the rows are", "none", table, "columns row, person and, if known, group"
        )
    people = read_people(table)
    strange = sorted(set(people.person) - set(rows))
    missing = [row for row in rows if row not in people.person]
    if strange or missing:
        got = f"{len(missing)} rows missing and {len(strange)} unknown ({_some(missing + strange, 3)})"
        raise InputError(f"one line for each of the {len(rows)} rows, counted from 0", got, table)
    return with_people(pool, people, side)


def read_people(path: str | Path) -> People:
    """A person table, CSV or TSV by its header: `id` (or row, sample, image), `person`, and optionally `group` and `split`.

    Raises:
        InputError: no such table, a missing column, an id twice, an empty person, or people on two sides of its split;
            these are named with their ids.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("a person table (CSV or TSV)", "nothing there" if not path.exists() else "no file", path)
    if path.stat().st_size > _LARGEST_TABLE_BYTES:
        raise InputError("a table of at most 1 GiB", f"{path.stat().st_size} bytes", path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("UTF-8 text", "other bytes", path) from None
    header = text.split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text), delimiter="\t" if "\t" in header else ",", strict=True)
    try:
        lines = [(reader.line_num, line) for line in reader if line]
    except csv.Error as error:
        raise InputError("a table", str(error), f"{path}, line {reader.line_num}") from None
    if not lines:
        raise InputError("a header with the columns id and person", "an empty file", path)
    names = [name.strip().lower() for name in lines[0][1]]
    at = {column: next((names.index(n) for n in known if n in names), -1) for column, known in _COLUMNS.items()}
    at["split"] = names.index("split") if "split" in names else -1
    for column in ("id", "person"):
        if at[column] < 0:
            hint = closest(column, names) if any(names) else ""
            raise InputError(f"a column '{column}'", ", ".join(names), path, hint and f"rename {hint}")
    person: dict[str, str] = {}
    more: dict[str, dict[str, str]] = {"group": {}, "split": {}}
    for number, line in lines[1:]:
        if len(line) != len(names):
            raise InputError(f"{len(names)} columns", str(len(line)), f"{path}, line {number}")
        key, who = line[at["id"]].strip(), line[at["person"]].strip()
        if not key or not who or key in person:
            got = f"'{key}' twice" if key in person else f"id '{key}' and person '{who}'"
            raise InputError("an id that occurs once, and its person", got, f"{path}, line {number}")
        person[key] = who
        for column, values in more.items():
            if at[column] >= 0:
                values[key] = line[at[column]].strip()
    made = People(person, more["group"], more["split"], str(path))
    _check_split(made)
    return made


def with_people(pool: Pool, people: People, side: str, *, required: bool = True) -> Pool:
    """The pool with the persons and groups that the table gives for its ids.

    Args:
        side: "train", "holdout" or "synthetic"; where the table has a split, every id must be on this side of it.
        required: refuse ids that the table lacks; otherwise they are people of their own.

    Raises:
        InputError: ids that the table lacks, or that it puts on another side.
    """
    ids = [str(key) for key in pool.person]
    unknown = [key for key in dict.fromkeys(ids) if key not in people.person]
    if unknown and required:
        raise InputError(
            f"every id of {side} in the table", f"{len(unknown)} without a person ({_some(unknown)})", people.where
        )
    wrong = [key for key in dict.fromkeys(ids) if people.split.get(key, side) not in (side, "")]
    if wrong:
        shown = _some([f"{key} is in {people.split[key]}" for key in wrong])
        raise InputError(f"only {side} in --{side}", f"{len(wrong)} of other sides ({shown})", people.where)
    person = np.array([people.person.get(key, f"{side} {key}") for key in ids], dtype=str)
    group = pool.group
    if people.group and all(people.group.get(key) for key in ids):
        group = np.array([people.group[key] for key in ids], dtype=str)
    return replace(pool, person=person, group=group)


def check_sides(ids: Mapping[str, np.ndarray], people: People) -> None:
    """Refuse a person with rows in train and in holdout, naming the pairs.

    Args:
        ids: "train" and "holdout": the ids of the rows before they were mapped to people.
    """
    first: dict[str, str] = {}
    for key in ids["train"]:
        if str(key) in people.person:
            first.setdefault(people.person[str(key)], str(key))
    pairs = []
    for key in dict.fromkeys(str(k) for k in ids["holdout"]):
        who = people.person.get(key)
        if who in first:
            pairs.append(f"{first[who]} in train and {key} in holdout are {who}")
    if pairs:
        raise InputError(
            "different people in train and holdout",
            f"{len(pairs)} pairs ({_some(pairs)})",
            people.where,
            "split by person, not by file or row",
        )


# ------------------------------------------------------------------------------------------------------------ parts


def _some(items: list[str], most: int = 5) -> str:
    return ", ".join(items[:most]) + (", ..." if len(items) > most else "")


def _check_split(people: People) -> None:
    sides: dict[str, dict[str, str]] = {}
    for key, side in people.split.items():
        if side:
            sides.setdefault(people.person[key], {}).setdefault(side, key)
    both = [
        f"{who}: " + " and ".join(f"{key} in {side}" for side, key in sorted(where.items()))
        for who, where in sides.items()
        if len(where) > 1
    ]
    if both:
        got = f"{len(both)} on several ({_some(both)})"
        raise InputError("every person on one side of the split", got, people.where, "split by person")


def _read_tensors(file: Path) -> tuple[dict[str, np.ndarray], int | None]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise InputError("an embedding store", "nothing there" if not file.exists() else "no file", file)
    try:
        with safe_open(file, framework="numpy") as store:
            metadata = store.metadata() or {}
            names = set(store.keys())
            if metadata.get("schema") != SCHEMA:
                raise InputError(f"metadata with schema {SCHEMA}", repr(metadata.get("schema")), file)
            if len(names & {"features", "bits"}) != 1 or names - set(_DTYPES):
                raise InputError("one of the tensors 'features' and 'bits'", ", ".join(sorted(names)) or "none", file)
            kind = "bits" if "bits" in names else "features"
            for name in sorted(names):
                view = store.get_slice(name)
                dtype, wanted = view.get_dtype(), _DTYPES[name] or _DTYPES[kind]
                dimensions = {"views": 3, "position_bp": 1}.get(name, 2)
                if dtype != wanted or len(view.get_shape()) != dimensions:
                    got = f"{dtype} of shape {tuple(view.get_shape())}"
                    raise InputError(f"{wanted} with {dimensions} axes", got, f"{file}, tensor '{name}'")
            tensors = {name: store.get_tensor(name) for name in sorted(names)}
    except (SafetensorError, OSError) as error:
        raise InputError("a safetensors file", " ".join(str(error).split())[:120], file) from None
    length = metadata.get("length")
    if kind == "features":
        if length is not None or "position_bp" in tensors:
            raise InputError("no sites in a store of features", "a length or positions", file)
        return tensors, None
    if length is None or not length.isdigit() or not 0 < int(length) <= 64 * tensors["bits"].shape[1]:
        raise InputError(f"a length of 1 to {64 * tensors['bits'].shape[1]} sites", repr(length), file)
    return tensors, int(length)


def _unused_bits_are_zero(bits_nw: np.ndarray, length: int) -> bool:
    whole, rest = divmod(length, 64)
    if bits_nw[:, whole + bool(rest) :].any():
        return False
    return not rest or not (bits_nw[:, whole] >> np.uint64(rest)).any()


def kind_in_words(pool: Pool) -> str:
    """What a store without a modality holds, for titles."""
    return "haplotypes" if pool.kind == "bits" else "embeddings"
