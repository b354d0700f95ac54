"""The release gate: a synthetic set leaves the building only when an audit passed on exactly these bytes.

`release` copies files of allowed types into a new folder, hashes what it copied, compares that with the list in
audit.json, and writes beside them what makes them findable and unmistakable: manifest, marks, cards, Croissant, RO-Crate,
a HealthDCAT-AP draft, a report, checksums, and a signature where a key is given. Nothing else of the source folder is
copied: the run's own provenance names input files, so only its harmless fields are taken over. `verify` reads such a folder
again.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from engine import __version__, provenance
from engine.atomic import atomic_folder, atomic_path, write_json, write_text
from engine.audit.protocol import SCHEMA as AUDIT_SCHEMA
from engine.audit.protocol import hash_files
from engine.errors import GateRefused, InputError
from engine.provenance import sha256
from engine.release import bids as bids_layout
from engine.release import cards, croissant, health_dcat, ro_crate, signature
from engine.release.forbidden import refuse_forbidden
from engine.release.marks import MARK, mark_of, sidecar, sidecar_name
from engine.release.public_report import write_public_report

SCHEMA = "engine.release/2"
SUMS = "SHA256SUMS"
ALLOWED = (
    ".nii", ".nii.gz", ".dcm", ".bcf", ".bcf.csi", ".vcf.gz", ".vcf.gz.tbi", ".vcf.gz.csi", ".pgen", ".pvar", ".psam",
    ".csv", ".tsv", ".json",
)  # fmt: skip
_STAYS = "provenance.json"  # of the run, or FILE.provenance.json; read, reduced, never copied
_STAYS_HERE = "exposure.tsv"  # FILE.exposure.tsv: what each training haplotype gave; never read, never copied
_NEXT = "engine audit ... --out DIR writes one"


def release(
    source: str | Path,
    audit_json: str | Path,
    out: str | Path,
    *,
    title: str = "Synthetic data",
    description: str = "",
    licence: str = "to be stated by the data holder",
    creator: str = "to be stated by the data holder",
    url: str = "",
    keywords: Sequence[str] = (),
    bids: str | None = None,
    skull_stripped: bool = False,
    sources: Sequence[str] = (),
    model: str | Path | None = None,
    evaluation: Sequence[str | Path] = (),
    sign: str | Path | None = None,
    forbidden: Iterable[str] = (),
) -> dict[str, Any]:
    """Copy a synthetic set to `out` and return its manifest.

    Args:
        source: folder of the synthetic set (or its single file), as it was audited.
        audit_json: audit.json with verdict "pass" and the hashes of every file of `source`.
        out: folder to make; it must not exist.
        title, description, licence, creator, url, keywords: for the manifest, the cards and the catalogues; without a url
            the release is named by a urn made of its hashes.
        bids: contrast of the scans (T1w, FLAIR ...): lays them out as a BIDS derivative dataset, which also has to say
            whether they are `skull_stripped`. `source` may be such a dataset: its scans keep their bytes, all else is
            written anew.
        sources: DOIs or URLs of public datasets that were learned from, for BIDS.
        model: run folder that made the set, for MODEL_CARD.md.
        evaluation: folders of `engine ... evaluate --out`; their findings go into the cards and the report.
        sign: PEM file with an Ed25519 private key; leaves SHA256SUMS.sig.
        forbidden: strings that must not appear in any file or file name, e.g. the ids of the real people. They are looked
            for in the bytes and in what gzip and BGZF hold; strings shorter than 5 characters are passed over.

    Raises:
        GateRefused: the audit did not pass, or not on these bytes; a type of file is not allowed; a file lacks its mark or
            holds other free text; a forbidden string was found.
        InputError: audit.json, the key, the run or an evaluation cannot be read.
        UsageError: `out` exists, or a contrast that BIDS has no name for.
    """
    source, audit_path = Path(source), Path(audit_json)
    audit = read_audit(audit_path)
    if audit["verdict"] != "pass":
        raise GateRefused("an audit that passed", f"verdict '{audit['verdict']}'", audit_path, "see its reasons")
    present = {e["path"]: e for e in hash_files(source) if not e["path"].endswith((_STAYS, _STAYS_HERE))}
    _check_bytes(present, audit["audited"], audit_path)
    base = source.parent if source.is_file() else source
    table = bids_layout.read_table(base, bids) if bids else []
    placed = bids_layout.layout(list(present), table, bids) if bids else {name: name for name in present}
    for name in placed:
        if not name.lower().endswith(ALLOWED) or any(part.startswith(".") for part in PurePosixPath(name).parts):
            hint = "take it out of the folder, or --bids CONTRAST for a BIDS dataset"
            raise GateRefused("only " + " ".join(ALLOWED), "another type of file", name, hint)

    key = None if sign is None else signature.private_key(sign)
    about_model = None if model is None else cards.model_record(Path(model))
    judged = [cards.evaluation_record(Path(folder)) for folder in evaluation]
    marks = {name: mark_of(base / name, name) for name in present}
    made = [Path(f"{source}.{_STAYS}")] if source.is_file() else [base / _STAYS, *sorted(base.glob(f"*.{_STAYS}"))]
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "synthetic_data": True,
        "mark": MARK,
        "identifier": _identifier(present),
        "title": title,
        "description": description,
        "licence": licence,
        "creator": creator,
        "url": url or _identifier(present),
        "keywords": list(keywords),
        "created_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "engine": __version__,
        "signed_by": None if key is None else signature.fingerprint(key),
        "audit": {
            "sha256": sha256(audit_path),
            "verdict": audit["verdict"],
            "sizes": audit.get("sizes", {}),
            "findings": [_short(finding) for finding in audit.get("findings", [])],
            "controls": [
                {key_: control.get(key_) for key_ in ("name", "expected", "verdict", "rows")}
                for control in audit.get("controls", [])
            ],
            "policy": audit.get("policy", {}),
        },
        "evaluation": [finding for record in judged for finding in record["findings"]],
        "model": about_model,
        "provenance": next(filter(None, map(cards.reduced, made)), {}),
        "files": [],
    }
    taken = set(placed.values())
    with atomic_folder(out) as partial:
        for name, place in placed.items():
            if (beside := sidecar_name(place)) in taken:
                hint = "rename it and audit again"
                raise GateRefused("room for the mark of a file", "a file of that name", beside, hint)
            manifest["files"].append(_copy(base / name, partial, f"data/{place}", present[name], marks[name]))
        if bids:
            bids_layout.write_metadata(partial / "data", table, placed, manifest, sources)
        for entry in manifest["files"]:
            if entry["sidecar"]:
                more = {"SkullStripped": skull_stripped} if bids else {}
                write_json(partial / entry["sidecar"], {**sidecar(entry["path"], entry["mark"]), **more})
        write_json(partial / "manifest.json", manifest)
        write_text(partial / "DATA_CARD.md", cards.data_card(manifest))
        if about_model is not None:
            write_text(partial / "MODEL_CARD.md", cards.model_card(manifest))
        write_public_report(partial, manifest, audit, judged)
        crumbs = croissant.describe(manifest, partial)
        write_json(partial / "croissant.json", crumbs)
        write_json(partial / health_dcat.NAME, health_dcat.describe(manifest, crumbs["recordSet"]))
        provenance.write(partial, "release", inputs=[audit_path], synthetic=True)
        write_json(partial / ro_crate.NAME, ro_crate.describe(manifest, hash_files(partial)))
        refuse_forbidden(partial, forbidden)
        sums = "".join(f"{entry['sha256']}  {entry['path']}\n" for entry in hash_files(partial))
        write_text(partial / SUMS, sums)
        if key is not None:
            with atomic_path(partial / signature.NAME) as path:
                path.write_bytes(signature.sign(sums.encode(), key))
    return manifest


def verify(folder: str | Path, *, key: str | Path | None = None) -> dict[str, Any]:
    """Check a release folder: every file is there and as listed, nothing else is, every mark stands, the signature holds.

    Args:
        key: PEM file with the Ed25519 public key that the release must be signed by; without it a signature is
            reported and not checked.

    Returns:
        {"files", "data_files", "signature": "valid", "not checked" or "none", "signed_by", "verdict", "title"}.

    Raises:
        GateRefused: a file is absent, changed or extra, a mark is gone, or the signature is not by this key.
        InputError: no release folder, or the key cannot be read.
    """
    folder = Path(folder)
    try:
        sums = (folder / SUMS).read_bytes()
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        pairs = [line.split("  ", 1) for line in sums.decode("utf-8").splitlines()]
        listed = {name: digest for digest, name in pairs}
    except (OSError, ValueError):
        raise InputError("a release folder with SHA256SUMS and manifest.json", "none", folder) from None
    if manifest.get("schema") != SCHEMA or manifest.get("synthetic_data") is not True:
        raise InputError(f"a manifest of schema {SCHEMA}", "another", folder / "manifest.json")
    present = {e["path"]: e["sha256"] for e in hash_files(folder) if e["path"] not in (SUMS, signature.NAME)}
    wrong = {
        "absent": sorted(set(listed) - set(present)),
        "not listed": sorted(set(present) - set(listed)),
        "changed": sorted(name for name in set(present) & set(listed) if present[name] != listed[name]),
    }
    for what, names in wrong.items():
        if names:
            raise GateRefused(f"the files that {SUMS} lists", f"{len(names)} {what}, {names[0]} first", folder)
    for entry in manifest["files"]:
        mark_of(folder / entry["path"], entry["path"])
        if entry["sidecar"] and not _says_synthetic(folder / entry["sidecar"]):
            raise GateRefused("SyntheticData true in the sidecar", "something else", entry["sidecar"])
    signed = folder / signature.NAME
    state = "not checked" if signed.is_file() else "none"
    if key is not None:
        public = signature.public_key(key)
        if not signed.is_file():
            raise GateRefused("a signed release", "no signature", folder)
        signature.check(sums, signed.read_bytes(), public)
        if manifest["signed_by"] != signature.fingerprint(public):
            raise GateRefused("the key that the manifest names", "another", folder)
        state = "valid"
    return {
        "files": len(present),
        "data_files": len(manifest["files"]),
        "signature": state,
        "signed_by": manifest["signed_by"],
        "verdict": manifest["audit"]["verdict"],
        "title": manifest["title"],
    }


def read_audit(path: Path) -> dict[str, Any]:
    """audit.json as a dict.

    Raises:
        InputError: another file, or another schema.
    """
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
    known = {e["path"]: e["sha256"] for e in audited if not e["path"].endswith((_STAYS, _STAYS_HERE))}
    if not known:
        raise GateRefused("the hashes of the audited files", "none", audit_path, "audit files, not arrays")
    extra, missing = sorted(set(present) - set(known)), sorted(set(known) - set(present))
    changed = sorted(name for name in set(known) & set(present) if known[name] != present[name]["sha256"])
    differences = {"never audited": extra, "audited but absent": missing, "changed since the audit": changed}
    for what, names in differences.items():
        if names:
            got = f"{len(names)} files {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            raise GateRefused("exactly the audited bytes", got, audit_path, "audit this folder again")


def _copy(path: Path, folder: Path, place: str, entry: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """Copy one audited file and return its entry of the manifest."""
    target = folder / place
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target, follow_symlinks=False)
    if sha256(target) != entry["sha256"]:
        raise GateRefused("the audited bytes", "a file that changed while it was copied", entry["path"], "run it again")
    return {
        "path": place,
        "audited_as": entry["path"],
        "bytes": entry["bytes"],
        "sha256": entry["sha256"],
        "mark": mark,
        "sidecar": sidecar_name(place),
    }


def _identifier(present: Mapping[str, Mapping[str, Any]]) -> str:
    """urn:uuid made of the hashes, so that the same bytes have the same name."""
    text = "\n".join(sorted(str(entry["sha256"]) for entry in present.values()))
    return f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, text)}"


def _short(finding: Mapping[str, Any]) -> dict[str, Any]:
    return {key: finding.get(key) for key in cards.FINDING}


def _says_synthetic(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and (found.get("SyntheticData") or found.get("schema:SyntheticData")) is True
