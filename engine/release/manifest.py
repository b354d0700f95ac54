"""The release gate: a synthetic set leaves the building only when an audit passed on exactly these bytes.

`release` copies files of allowed types into a new folder, hashes what it copied, compares that with the list in
audit.json, and writes checksums, a manifest with the synthetic mark, and a data card. Nothing else of the source
folder is copied: the run's own provenance names input files, so only its harmless fields are taken over.
"""

from __future__ import annotations

import gzip
import json
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from engine import __version__, provenance
from engine.atomic import atomic_folder, write_json, write_text
from engine.audit.protocol import SCHEMA as AUDIT_SCHEMA
from engine.audit.protocol import hash_files
from engine.errors import GateRefused, InputError
from engine.provenance import sha256

SCHEMA = "engine.release/1"
MARK = "SYNTHETIC DATA. Made by a generative model. No record describes a real person."
ALLOWED = (
    ".nii", ".nii.gz", ".dcm", ".bcf", ".bcf.csi", ".vcf.gz", ".vcf.gz.tbi", ".vcf.gz.csi", ".pgen", ".pvar", ".psam",
    ".csv", ".tsv", ".json",
)  # fmt: skip
_STAYS = {"provenance.json"}  # of the run; read, reduced, never copied
_PROVENANCE = ("command", "created_utc", "commit", "modified", "seed", "versions", "synthetic_data")
_SHORTEST_FORBIDDEN = 5
_NEXT = "engine audit ... --out DIR writes one"


def release(
    source: str | Path,
    audit_json: str | Path,
    out: str | Path,
    *,
    title: str = "Synthetic data",
    description: str = "",
    licence: str = "to be stated by the data holder",
    report: str | Path | None = None,
    forbidden: Iterable[str] = (),
) -> dict[str, Any]:
    """Copy a synthetic set to `out` and return its manifest.

    Args:
        source: folder of the synthetic set (or its single file), as it was audited.
        audit_json: audit.json with verdict "pass" and the hashes of every file of `source`.
        out: folder to make; it must not exist.
        title, description, licence: for the manifest and the data card.
        report: a release report to go with the data, copied as report.html.
        forbidden: strings that must not appear in any file, file name or the report, e.g. the ids of the real people.
            They are looked for in the bytes and in what gzip and BGZF hold; strings shorter than 5 characters are
            passed over.

    Raises:
        GateRefused: the audit did not pass, or not on these bytes; a type of file is not allowed; a forbidden string
            was found.
        InputError: audit.json cannot be read.
        UsageError: `out` exists.
    """
    source, audit_path = Path(source), Path(audit_json)
    audit = _read_audit(audit_path)
    if audit["verdict"] != "pass":
        raise GateRefused("an audit that passed", f"verdict '{audit['verdict']}'", audit_path, "see its reasons")
    present = {e["path"]: e for e in hash_files(source) if PurePosixPath(e["path"]).name not in _STAYS}
    _check_bytes(present, audit["audited"], audit_path)
    for name in present:
        if not name.lower().endswith(ALLOWED) or any(part.startswith(".") for part in PurePosixPath(name).parts):
            raise GateRefused("only " + " ".join(ALLOWED), "another type of file", name, "take it out of the folder")

    base = source.parent if source.is_file() else source
    words = [word for word in forbidden if len(word) >= _SHORTEST_FORBIDDEN]
    with atomic_folder(out) as partial:
        for name, entry in present.items():
            target = partial / "data" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / name, target, follow_symlinks=False)
            if sha256(target) != entry["sha256"]:
                raise GateRefused("the audited bytes", "a file that changed while it was copied", name, "run it again")
        if report is not None:
            shutil.copyfile(report, partial / "report.html")
        manifest = {
            "schema": SCHEMA,
            "synthetic_data": True,
            "mark": MARK,
            "title": title,
            "description": description,
            "licence": licence,
            "created_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "engine": __version__,
            "audit": {
                "sha256": sha256(audit_path),
                "verdict": audit["verdict"],
                "sizes": audit.get("sizes", {}),
                "findings": [_short(finding) for finding in audit.get("findings", [])],
                "controls": [
                    {key: control.get(key) for key in ("name", "expected", "verdict", "rows")}
                    for control in audit.get("controls", [])
                ],
                "policy": audit.get("policy", {}),
            },
            "provenance": _reduced(base / "provenance.json"),
            "files": [{**entry, "path": f"data/{name}"} for name, entry in present.items()],
        }
        write_json(partial / "manifest.json", manifest)
        write_text(partial / "DATA_CARD.md", _card(manifest))
        provenance.write(partial, "release", inputs=[audit_path], synthetic=True)
        _refuse_forbidden(partial, words)
        listed = hash_files(partial)
        write_text(partial / "SHA256SUMS", "".join(f"{entry['sha256']}  {entry['path']}\n" for entry in listed))
    return manifest


def _read_audit(path: Path) -> dict[str, Any]:
    try:
        audit = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("an audit.json", type(error).__name__, path, _NEXT) from None
    if not isinstance(audit, dict) or audit.get("schema") != AUDIT_SCHEMA or "verdict" not in audit:
        raise InputError(f"schema {AUDIT_SCHEMA}", "something else", path, _NEXT)
    listed = audit.get("audited", [])
    if not isinstance(listed, list) or not all(isinstance(e, dict) and "path" in e and "sha256" in e for e in listed):
        raise InputError("a list of audited files with path and sha256", "something else", path)
    return audit


def _check_bytes(present: Mapping[str, Mapping[str, Any]], audited: list[dict[str, Any]], audit_path: Path) -> None:
    known = {e["path"]: e["sha256"] for e in audited if PurePosixPath(e["path"]).name not in _STAYS}
    if not known:
        raise GateRefused("the hashes of the audited files", "none", audit_path, "audit files, not arrays")
    extra, missing = sorted(set(present) - set(known)), sorted(set(known) - set(present))
    changed = sorted(name for name in set(known) & set(present) if known[name] != present[name]["sha256"])
    differences = {"never audited": extra, "audited but absent": missing, "changed since the audit": changed}
    for what, names in differences.items():
        if names:
            got = f"{len(names)} files {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            raise GateRefused("exactly the audited bytes", got, audit_path, "audit this folder again")


def _short(finding: Mapping[str, Any]) -> dict[str, Any]:
    return {key: finding.get(key) for key in ("name", "value", "interval", "n", "threshold", "verdict", "note")}


def _reduced(path: Path) -> dict[str, Any]:
    """The fields of a run's provenance that name no input, no config and no path; empty where there is none."""
    if not path.is_file() or path.is_symlink():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return {key: found[key] for key in _PROVENANCE if key in found} if isinstance(found, dict) else {}


def _refuse_forbidden(folder: Path, words: list[str]) -> None:
    """Look for each word in names and contents. The refusal never shows the word, which may be a person's id."""
    needles = [word.encode() for word in words]
    if not needles:
        return
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        longest = max(map(len, needles))
        blocks = [name.encode()] if any(n in name.encode() for n in needles) else _contents(path, longest)
        if any(needle in block for block in blocks for needle in needles):
            raise GateRefused("nothing of a real person", "a forbidden string", f"file {_masked(name, words)}")


def _masked(name: str, words: list[str]) -> str:
    for word in words:
        name = name.replace(word, "[withheld]")
    return name


def _contents(path: Path, overlap: int) -> Iterator[bytes]:
    """Blocks of a file, and of what it holds where it is gzip or BGZF, each beginning with the end of the one
    before.
    """
    with open(path, "rb") as stream:
        yield from _blocks(stream.read, overlap)
    with open(path, "rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    if packed:
        try:
            with gzip.open(path) as unpacked:
                yield from _blocks(unpacked.read, overlap)
        except (OSError, EOFError, zlib.error):
            raise GateRefused("a whole gzip file", "a damaged one", path.name) from None


def _blocks(read: Any, overlap: int) -> Iterator[bytes]:
    tail = b""
    while block := read(1 << 22):
        yield tail + block
        tail = (tail + block)[-overlap:]


def _card(manifest: Mapping[str, Any]) -> str:
    """A page for people: what it is, how it was judged, what it is not for."""
    audit, made = manifest["audit"], manifest["provenance"]
    total = sum(entry["bytes"] for entry in manifest["files"])
    lines = [
        f"# {manifest['title']}",
        "",
        f"**{manifest['mark']}**",
        "",
        *([manifest["description"], ""] if manifest["description"] else []),
        f"- Files: {len(manifest['files'])}, {total / 1e6:.1f} MB; hashes in `SHA256SUMS`",
        f"- Licence: {manifest['licence']}",
        f"- Made by: engine {manifest['engine']}, commit {made.get('commit', 'unknown')}, "
        f"seed {made.get('seed', 'unknown')}",
        f"- Audit: {audit['verdict']}, on exactly these bytes (audit.json {audit['sha256'][:16]}...)",
        "",
        "## What the audit found",
        "",
        "| finding | value | 95 % interval | allowed | verdict |",
        "|---|---|---|---|---|",
    ]
    for finding in audit["findings"]:
        low_high = finding["interval"]
        interval = "" if low_high is None or None in low_high else f"{low_high[0]:.3g} to {low_high[1]:.3g}"
        value, limit = ("" if finding[key] is None else f"{finding[key]:.3g}" for key in ("value", "threshold"))
        lines.append(f"| {finding['name']} | {value} | {interval} | {limit} | {finding['verdict']} |")
    controls = ", ".join(f"{c['name']} ({c['verdict']}, as it must)" for c in audit["controls"])
    lines += [
        "",
        f"Planted controls: {controls}." if controls else "",
        "",
        "## Not for",
        "",
        "- Decisions about any person, diagnosis, or as evidence of how common a finding is in the population.",
        "- Being mixed with real data without keeping the synthetic mark.",
        "- A passing audit bounds what its searches can see at its sample sizes; it is no proof that nothing leaked.",
        "",
    ]
    return "\n".join(lines)
