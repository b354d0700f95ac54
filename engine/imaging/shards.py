"""Sampling in shards: each is a folder of its own beside the final one, recognised when whole, joined at the end."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine import provenance
from engine.atomic import atomic_folder, sweep, write_json
from engine.errors import CorruptRun, InputError, UsageError
from engine.files.delimited import write_csv
from engine.imaging.commands import sample_command, shard_range

Progress = Callable[[str, int, int], None]


def shard_path(out: str | Path, index: int, count: int) -> Path:
    """`dir/name` -> `dir/name.shard-0003-of-0100`."""
    out = Path(out)
    return out.with_name(f"{out.name}.shard-{index:04d}-of-{count:04d}")


def sample_shard(
    run: str | Path,
    n: int,
    out: str | Path,
    *,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    set: Mapping[str, Any] | None = None,
    format: str = "nifti",
    progress: Progress | None = None,
    **further: Any,
) -> dict[str, Any]:
    """`sample_command` into `out`, or of one shard of several into `shard_path(out, i, k)`.

    A shard that is there already, whole and of the same request is left alone ("skipped": true); one that was cut short
    was never renamed into place and is made again.

    Raises:
        UsageError: the arguments do not fit the model, or the folder holds another request's scans.
    """
    index, count = shard
    if count == 1:
        return sample_command(run, n, out, seed=seed, set=set, format=format, progress=progress, **further)
    target = shard_path(out, index, count)
    subjects = shard_range(n, shard)
    if target.exists():
        record = _record(target)
        same = record.get("seed") == seed and record.get("shard") == f"{index}/{count}"
        if same and record.get("subjects") == len(subjects) and record.get("first_subject") == subjects.start:
            _verify(target)
            return {"out": target.name, "volumes": record["volumes"], "subjects": len(subjects), "skipped": True}
        raise UsageError("a shard of this request", "one of another", target, "another --out, or remove it first")
    return sample_command(run, n, target, seed=seed, shard=shard, set=set, format=format, progress=progress, **further)


def finish(out: str | Path, count: int, *, progress: Progress | None = None) -> dict[str, Any]:
    """Join the `count` shards of `out` into the folder a run without shards would have made; the shards stay.

    Raises:
        UsageError: `out` exists. InputError: a shard is absent or of another seed or model. CorruptRun: a volume does not
            match its checksum.
    """
    out = Path(out)
    shards = [shard_path(out, index, count) for index in range(count)]
    records = []
    for index, path in enumerate(shards):
        if not path.is_dir():
            raise InputError(f"all {count} shards", f"no shard {index}", path, f"--shard {index}/{count}")
        records.append(_record(path))
        _verify(path)
        if any(records[-1].get(key) != records[0].get(key) for key in ("seed", "inputs", "config")):
            raise InputError("shards of one model and seed", "another", path, "removing the stale shard")
        if progress is not None:
            progress("checking shards", index + 1, count)
    rows: list[dict[str, str]] = []
    digests: dict[str, str] = {}
    columns: list[str] = []
    with atomic_folder(out) as folder:
        for path in shards:
            with (path / "volumes.csv").open(newline="", encoding="utf-8") as stream:
                reader = csv.DictReader(stream)
                columns = list(reader.fieldnames or [])
                rows += list(reader)
            own = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
            for name in own:
                source = path / name
                (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
            digests |= own
        write_csv(folder / "volumes.csv", columns, rows)
        write_json(folder / "checksums.json", digests)
        provenance.write(
            folder,
            "imaging sample",
            config=records[0]["config"],
            seed=records[0]["seed"],
            synthetic=True,
            extra={"model": records[0]["inputs"], "shards": count, "volumes": len(rows)},
        )
    for path in shards:
        sweep(path)
    return {"out": out.name, "volumes": len(rows), "shards": count}


def _record(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptRun("a shard with its provenance.json", type(error).__name__, folder, "remove it") from None


def _verify(folder: Path) -> None:
    """Every volume matches the checksum written with it."""
    for name, digest in json.loads((folder / "checksums.json").read_text(encoding="utf-8")).items():
        if not (folder / name).exists() or provenance.input_record(folder / name)["sha256"] != digest:
            raise CorruptRun("the volume that was written", "another or none", folder / name, "remove this shard")
