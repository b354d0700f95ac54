"""A synthetic cohort as a folder: one person per BIDS folder, one phased genotype file for all, tables, one manifest.

    visits.tsv                one row per visit, columns as in the table that was fitted, image relative to the folder
    bids/                     participants.tsv, sub-SYN.../ses-N/anat/..., sub-SYN..._sessions.tsv, dataset_description.json
    genotypes.bcf             (or .vcf.gz, .pgen) the people who have genotypes, ids as everywhere
    genotypes.samples.tsv     group and sex of each
    manifest.json             what was asked for, counts, every file with its hash

Shards are folders of the same form, `OUT.shards/shard-i-of-k`; one that is whole is recognised and passed over, a half-written
one leaves nothing. `finish` joins them; what comes out is, but for the compression of genotypes, what one job writes.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine import __version__, atomic, provenance
from engine.cohort.joint import CohortModel, Person
from engine.cohort.longitudinal import check_where
from engine.cohort.profile import NO_GENOTYPE, Profile
from engine.errors import InputError, UsageError
from engine.genomics import stream
from engine.genomics.panel import read_panel, write_panel, write_samples

SCHEMA = "engine.cohort.manifest/1"
BIDS_VERSION = "1.10.0"
MARK = "SYNTHETIC: drawn from a generative model; no row, image or genotype describes a person."
FORMATS = ("bcf", "vcf.gz", "pgen")
Progress = Callable[[str, int, int], None]
_HEADER = [f"##SYNTHETIC={MARK}"]


def generate_command(
    model: CohortModel,
    n: int,
    out: str | Path,
    *,
    where: Mapping[str, Any] | None = None,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    scans: bool = True,
    complete: bool = False,
    genotype_format: str = "bcf",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make the people of a shard of n and write their folder, `out` or `shard_folder(out, i, k)`.

    Returns:
        {"out", "people", "visits", "scans", "genotypes", "skipped", "notes"}.

    Raises:
        UsageError: a bad request, or the folder exists and is another's.
    """
    part, parts = shard
    if n < 1 or not 0 <= part < parts:
        raise UsageError("n >= 1 and shard i/k with 0 <= i < k", f"n {n}, shard {part}/{parts}", "generate")
    if genotype_format not in FORMATS:
        raise UsageError(f"one of {', '.join(FORMATS)}", repr(genotype_format), "--genotypes-as")
    check_where(model.profile, where or {})
    first, stop = n * part // parts, n * (part + 1) // parts
    target = Path(out) if parts == 1 else shard_folder(out, part, parts)
    request = {
        "profile": model.profile.name,
        "model_sha256": _digest(model),
        "people": n,
        "where": {k: list(v) if isinstance(v, (tuple, list)) else v for k, v in (where or {}).items()},
        "seed": seed,
        "scans": scans,
        "complete": complete,
        "genotype_format": genotype_format,
        "first": first,
        "stop": stop,
    }
    if target.exists():
        manifest = read_manifest(target)
        if parts == 1 or manifest["request"] != request:
            raise UsageError("a folder that does not exist yet", "an existing one", target, "another --out")
        return _told(manifest, target, True, model.notes)
    with atomic.atomic_folder(target) as folder:
        people = model.generate(stop - first, where, seed=seed, start=first, scans=scans, complete=complete)
        manifest = _write(model, people, folder, request, stop - first, progress)
    return _told(manifest, target, False, model.notes)


def shard_folder(out: str | Path, part: int, parts: int) -> Path:
    """`OUT.shards/shard-0003-of-0100`."""
    out = Path(out)
    return out.with_name(f"{out.name}.shards") / f"shard-{part:04d}-of-{parts:04d}"


def finish_command(out: str | Path, parts: int, *, progress: Progress | None = None) -> dict[str, Any]:
    """Join the shards of `out` and remove them.

    Raises:
        InputError: a shard is absent or of another request. UsageError: `out` exists.
    """
    from engine.genomics.commands import concatenate

    out = Path(out)
    folders = [shard_folder(out, part, parts) for part in range(parts)]
    manifests = []
    for part, folder in enumerate(folders):
        if not folder.is_dir():
            raise InputError(f"all {parts} shards", f"no shard {part}", folder, f"--shard {part}/{parts}")
        manifests.append(read_manifest(folder))
        same = ("model_sha256", "people", "where", "seed", "scans", "complete", "genotype_format")
        if any(manifests[-1]["request"][key] != manifests[0]["request"][key] for key in same):
            raise InputError("shards of one request", "another", folder, "removing the stale shard")
    request = {**manifests[0]["request"], "first": 0, "stop": manifests[0]["request"]["people"]}
    with atomic.atomic_folder(out) as made:
        for number, folder in enumerate(folders):
            if (folder / "bids").is_dir():
                for entry in sorted((folder / "bids").iterdir()):
                    if entry.name.startswith("sub-"):
                        shutil.copytree(entry, made / "bids" / entry.name, copy_function=_link)
                    elif number == 0 and entry.name != "participants.tsv":
                        (made / "bids").mkdir(exist_ok=True)
                        shutil.copy2(entry, made / "bids" / entry.name)
            if progress is not None:
                progress("joining", number + 1, parts)
        for table in ("visits.tsv", "bids/participants.tsv"):
            _join_tables([folder / table for folder in folders], made / table)
        name = f"genotypes.{request['genotype_format']}"
        panels = [read_panel(folder / name) for folder in folders if (folder / name).exists()]
        if panels:
            samples = [folder / "genotypes.samples.tsv" for folder in folders]
            _join_tables(samples, made / "genotypes.samples.tsv")
            # sexes are in the table; a panel that was read from BCF has none
            write_panel(concatenate(panels), made / name, header_lines=_HEADER)
        counts = {key: sum(m["counts"][key] for m in manifests) for key in manifests[0]["counts"]}
        manifest = _manifest(made, request, counts, manifests[0]["notes"])
        provenance.write(made, "cohort generate", config=request, seed=request["seed"], synthetic=True)
    shutil.rmtree(folders[0].parent)
    return _told(manifest, out, False, manifest["notes"])


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder; raises InputError where there is none."""
    try:
        value = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
        if value["schema"] != SCHEMA:
            raise ValueError(value["schema"])
    except (OSError, ValueError, KeyError) as fault:
        raise InputError("a synthetic cohort with manifest.json", str(fault)[:80], folder) from None
    return dict(value)


def verify(folder: str | Path) -> list[str]:
    """What in a folder is not as its manifest says: files that changed, are gone or were added."""
    folder, manifest = Path(folder), read_manifest(folder)
    found = _files(folder)
    listed = manifest["files"]
    wrong = [f"{name} is gone" for name in listed if name not in found]
    wrong += [f"{name} was added" for name in found if name not in listed]
    return wrong + [f"{n} changed" for n in listed if n in found and found[n]["sha256"] != listed[n]["sha256"]]


def _digest(model: CohortModel) -> str:
    """Of everything that makes people: table, genetics and the weights of the scan model."""
    import hashlib

    value: dict[str, Any] = {"table": model.table.to_json(), "scan_covariates": list(model.scan_covariates)}
    if model.genetics is not None:
        value["genetics"] = model.genetics.to_json()
        value["panel"] = hashlib.sha256(model.genetics.model.bits_lw.tobytes()).hexdigest()
        value["haplotypes"] = model.genetics.model.config.model_dump()
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode())
    if model.scan_model is not None:
        for network in (model.scan_model.autoencoder, model.scan_model.denoiser):
            for name, tensor in sorted(network.state_dict().items()):
                digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _write(
    model: CohortModel,
    people: Iterable[Person],
    folder: Path,
    request: dict[str, Any],
    n: int,
    progress: Progress | None,
) -> dict[str, Any]:
    profile, bids = model.profile, folder / "bids"
    bids.mkdir()
    participants: list[dict[str, Any]] = []
    visits: list[dict[str, Any]] = []
    kept: list[tuple[int, str, dict[str, Any]]] = []
    scans = 0
    for done, person in enumerate(people, start=1):
        sub = f"sub-{person.id}"
        sessions = []
        for row, volume in zip(person.visits, person.scans):
            image = ""
            if volume is not None:
                image = _write_scan(volume, bids, sub, int(row["visit"]), profile)
                scans += 1
            visits.append({"subject": person.id, **_public(profile, row), "image": image})
            sessions.append(_bids_row(profile, row, True))
        if person.haplotypes is not None:
            kept.append((person.candidate, person.id, person.visits[0]))
        start = person.visits[0]
        participants.append({"participant_id": sub, **_bids_row(profile, start, False)})
        (bids / sub).mkdir(exist_ok=True)
        atomic.write_text(bids / sub / f"{sub}_sessions.tsv", _tsv(sessions))
        if progress is not None:
            progress("people", done, n)
    atomic.write_text(bids / "participants.tsv", _tsv(participants))
    atomic.write_text(folder / "visits.tsv", _tsv(visits))
    _write_descriptions(bids, profile)
    if kept and model.genetics is not None:
        _write_genotypes(model, kept, folder / f"genotypes.{request['genotype_format']}", request["seed"])
    provenance.write(folder, "cohort generate", config=request, seed=request["seed"], synthetic=True)
    counts = {"people": len(participants), "visits": len(visits), "scans": scans, "genotypes": len(kept)}
    return _manifest(folder, request, counts, list(model.notes))


def _write_scan(volume: Any, bids: Path, sub: str, visit: int, profile: Profile) -> str:
    from engine.imaging.volume import write_volume

    modality = profile.modality
    place = bids / sub / f"ses-{visit}" / modality.folder
    place.mkdir(parents=True, exist_ok=True)
    name = f"{sub}_ses-{visit}_desc-synthetic_{modality.suffix}"
    write_volume(volume, place / f"{name}.nii.gz", description="SYNTHETIC")
    about = {"SyntheticData": True, "Description": MARK, "SkullStripped": modality.skull_stripped}
    atomic.write_json(place / f"{name}.json", {**about, "ModalityName": modality.name})
    return f"bids/{sub}/ses-{visit}/{modality.folder}/{name}.nii.gz"


def _write_genotypes(model: CohortModel, kept: list[tuple[int, str, dict[str, Any]]], path: Path, seed: int) -> None:
    """All people who have genotypes into one file, by their paths: block by block of sites."""
    assert model.genetics is not None
    index, ids = np.array([at for at, _, _ in kept]), [name for _, name, _ in kept]
    rows = [[row] for _, _, row in kept]
    labels, sexes = model.labels(rows), model.sexes(rows)
    source = model.genetics.source(index, labels, ids, sexes, seed, path)
    command = f"##engine_command=cohort generate, engine {__version__}"
    job = stream.Job(path, source.layout([*_HEADER, command]), source.groups, {})
    stream.start(job)
    stream.write_parts(job, source.rows)
    stream.join(job)
    stream.remove_parts(path)
    described = stream.panel_of(job)
    if described.samples.group is None:
        described = replace(described, samples=replace(described.samples, group=np.full(len(ids), "all")))
    write_samples(described, path.with_name("genotypes.samples.tsv"))


def _public(profile: Profile, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of visits.tsv: the columns of the fitted table; latent nodes of people without genotypes stay inside."""
    return {k: row[k] for k in ("visit", "years", *profile.columns, "end", "end_years")}


def _bids_row(profile: Profile, row: Mapping[str, Any], session: bool) -> dict[str, Any]:
    """A row of sessions (what may change) or of participants (what is fixed); absent values as BIDS writes them, with
    the reason beside where the profile tells several apart."""
    made: dict[str, Any] = {"session_id": f"ses-{row['visit']}", "years": row["years"]} if session else {}
    for name, column in profile.columns.items():
        if (column.over_time != "fixed") != session:
            continue
        absent = row[name] in column.missing
        made[name] = "n/a" if absent else row[name]
        if len(column.missing) > 1:
            made[f"{name}_missing"] = row[name] if absent else "n/a"
    if session:
        return made
    return {**made, "end": row["end"], "end_years": round(row["end_years"], 4), "genotypes": not row[NO_GENOTYPE]}


def _write_descriptions(bids: Path, profile: Profile) -> None:
    atomic.write_json(
        bids / "dataset_description.json",
        {
            "Name": f"Synthetic cohort: {profile.title}",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "Description": MARK,
            "SyntheticData": True,
            "GeneratedBy": [{"Name": "engine", "Version": __version__, "Description": "cohort generate"}],
        },
    )
    atomic.write_text(bids / "README", f"{profile.title}\n\n{MARK}\nGenotypes of the same ids lie one folder up.\n")
    about: dict[str, dict[str, Any]] = {}
    for name, column in profile.columns.items():
        entry: dict[str, Any] = {"Description": f"{name}, synthetic"}
        if column.unit:
            entry["Units"] = column.unit
        if column.levels:
            entry["Levels"] = {level: level for level in column.levels}
        about[name] = entry
        if len(column.missing) > 1:
            codes = {code: code for code in column.missing}
            about[f"{name}_missing"] = {"Description": f"why {name} is absent", "Levels": codes}
    fixed = [n for n, c in profile.columns.items() if c.over_time == "fixed"]
    own = lambda names: {n: about[n] for n in about if n.removesuffix("_missing") in names}  # noqa: E731
    more = {
        "end": {"Description": "how follow-up ended", "Levels": {k: k for k in ("completed", "dropout", "death")}},
        "end_years": {"Description": "when, since the first visit", "Units": "year"},
        "genotypes": {"Description": "whether the person is in the genotype file"},
    }
    atomic.write_json(bids / "participants.json", {**own(fixed), **more})
    years = {"years": {"Description": "since the first visit", "Units": "year"}}
    atomic.write_json(bids / "sessions.json", {**years, **own([n for n in profile.columns if n not in fixed])})
    if profile.modality.folder not in ("anat", "func", "dwi", "fmap", "pet"):
        atomic.write_text(bids / ".bidsignore", f"**/{profile.modality.folder}/**\n")


def _tsv(records: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    names = list(records[0]) if records else []
    writer = csv.DictWriter(text, names, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in record.items()} for record in records)
    return text.getvalue()


def _join_tables(paths: Sequence[Path], out: Path) -> None:
    lines: list[str] = []
    for path in paths:
        if not path.is_file():
            continue
        header, *rest = path.read_text(encoding="utf-8").splitlines()
        lines = lines or [header]
        if header != lines[0]:
            raise InputError(f"columns {lines[0]}", header, path)
        lines += rest
    if lines:
        atomic.write_text(out, "\n".join(lines) + "\n")


def _link(source: str, target: str) -> None:
    """A hard link where the file system has them: shards are removed afterwards."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    skip = ("manifest.json", "provenance.json")
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and str(p.relative_to(folder)) not in skip)
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": provenance.sha256(p)} for p in paths}


def _manifest(folder: Path, request: dict[str, Any], counts: dict[str, int], notes: Sequence[str]) -> dict[str, Any]:
    made = {
        "schema": SCHEMA,
        "synthetic_data": True,
        "statement": MARK,
        "engine": __version__,
        "request": request,
        "counts": counts,
        "notes": list(notes),
        "files": _files(folder),
    }
    atomic.write_json(folder / "manifest.json", made)
    return json.loads(json.dumps(made, default=str))  # type: ignore[no-any-return]


def _told(manifest: dict[str, Any], target: Path, skipped: bool, notes: Sequence[str]) -> dict[str, Any]:
    return {"out": str(target), **manifest["counts"], "skipped": skipped, "notes": list(notes)}
