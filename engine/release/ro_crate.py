"""A release described as RO-Crate 1.2: what is in the folder, and the two actions it came from, generation and audit.

Plain JSON-LD after the specification (https://w3id.org/ro/crate/1.2: root data entity, data entities, provenance). Every
file of the folder is a data entity of its own, except SHA256SUMS, which is written last and hashes this description.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from engine import __version__, provenance
from engine.release.croissant import media_type
from engine.release.marks import DATASET_TYPE, MARK

CONTEXT = "https://w3id.org/ro/crate/1.2/context"
PROFILE = "https://w3id.org/ro/crate/1.2"
NAME = "ro-crate-metadata.json"
_MEANING = {
    "manifest.json": "Files with hashes and marks, findings of the audit, reduced provenance",
    "DATA_CARD.md": "What the data are, how they were judged, and what they are not for",
    "MODEL_CARD.md": "What the model is, what it was judged by, and what it is not for",
    "croissant.json": "Description in MLCommons Croissant 1.1",
    "healthdcat-ap.jsonld": "Draft description for a HealthDCAT-AP catalogue",
    "report.html": "Report for people",
    "provenance.json": "How this release was made",
    "SHA256SUMS": "SHA-256 of every file of the release",
    "SHA256SUMS.sig": "Ed25519 signature of SHA256SUMS",
}


def describe(manifest: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """RO-Crate metadata document.

    Args:
        manifest: of the release; entries: path, bytes and sha256 of every file that is in the folder by now.
    """
    licence = manifest["licence"]
    licence_id = licence if licence.startswith(("http://", "https://")) else "#licence"
    marks = {entry["path"]: entry["mark"] for entry in manifest["files"]}
    files = []
    for entry in entries:
        name = entry["path"]
        files.append(
            {
                "@id": quote(name),
                "@type": "File",
                "name": name.rsplit("/", 1)[-1],
                "description": _MEANING.get(name, _described(name, marks)),
                "contentSize": str(entry["bytes"]),
                "encodingFormat": media_type(name),
                "sha256": entry["sha256"],
                **({"additionalType": DATASET_TYPE} if name in marks else {}),
            }
        )
    data = [{"@id": quote(name)} for name in marks]
    root: dict[str, Any] = {
        "@id": "./",
        "@type": "Dataset",
        "name": manifest["title"],
        "description": f"{MARK} {manifest['description']}".strip(),
        "datePublished": manifest["created_utc"],
        "license": {"@id": licence_id},
        "identifier": manifest["identifier"],
        "additionalType": DATASET_TYPE,
        "creator": {"@id": "#creator"},
        "publisher": {"@id": "#creator"},
        "keywords": ", ".join(["synthetic data", *manifest["keywords"]]),
        "hasPart": [{"@id": entry["@id"]} for entry in files],
        "mentions": [{"@id": "#generation"}, {"@id": "#audit"}],
    }
    made, commit = manifest["provenance"], provenance.commit()["commit"]
    graph = [
        {
            "@id": NAME,
            "@type": "CreativeWork",
            "conformsTo": {"@id": PROFILE},
            "about": {"@id": "./"},
            "description": "RO-Crate metadata of this release",
        },
        root,
        *files,
        {
            "@id": licence_id,
            "@type": "CreativeWork",
            "name": licence,
            "description": "Terms of use, as the data holder stated them",
        },
        {"@id": "#creator", "@type": "Organization", "name": manifest["creator"]},
        {
            "@id": "#engine",
            "@type": "SoftwareApplication",
            "name": "engine",
            "version": __version__,
            "url": f"swh:1:rev:{commit}" if commit != "unknown" else "#engine",  # a commit names itself; it has no page
            "description": "Generates and audits synthetic scans and genotypes",
        },
        {
            "@id": "#generation",
            "@type": "CreateAction",
            "name": f"Generation ({made.get('command', 'unknown command')})",
            "description": f"commit {made.get('commit', 'unknown')}, seed {made.get('seed', 'unknown')}",
            "instrument": {"@id": "#engine"},
            "result": data,
            **({"endTime": made["created_utc"]} if "created_utc" in made else {}),
        },
        {
            "@id": "#audit",
            "@type": "AssessAction",
            "name": f"Audit for copies of real people: {manifest['audit']['verdict']}",
            "description": f"audit.json with SHA-256 {manifest['audit']['sha256']}",
            "instrument": {"@id": "#engine"},
            "object": data,
            "result": {"@id": "manifest.json"},
        },
    ]
    return {"@context": CONTEXT, "@graph": graph}


def _described(name: str, marks: Mapping[str, str]) -> str:
    return f"Synthetic data; mark: {marks[name]}" if name in marks else "Description that goes with the data"
