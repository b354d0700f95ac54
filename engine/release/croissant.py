"""A release described as MLCommons Croissant 1.1: files with checksums, tables with typed columns, and that all is synthetic.

The format is plain JSON-LD, written here from the specification (docs/croissant-spec-1.1.md, sections "Dataset-level
information", "Resources", "RecordSets", appendix 1); the tests hold it against MLCommons' own `mlcroissant`. Limits and
sensitive information are said in the terms of its responsible-AI extension.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.release.marks import DATASET_TYPE, MARK

CONFORMS = ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"]
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{
        term: f"cr:{term}"
        for term in [
            "annotation",
            "arrayShape",
            "citeAs",
            "column",
            "containedIn",
            "equivalentProperty",
            "excludes",
            "extract",
            "field",
            "fileProperty",
            "fileObject",
            "fileSet",
            "format",
            "includes",
            "isArray",
            "isLiveDataset",
            "jsonPath",
            "key",
            "md5",
            "parentField",
            "path",
            "recordSet",
            "references",
            "regex",
            "readLines",
            "repeated",
            "replace",
            "samplingRate",
            "sdVersion",
            "separator",
            "source",
            "subField",
            "transform",
            "unArchive",
            "value",
        ]
    },
}
TABLE_TYPES = {".csv": "text/csv", ".tsv": "text/tab-separated-values"}
_TYPES = {
    ".nii.gz": "application/gzip",
    ".nii": "https://nifti.nimh.nih.gov/nifti-1",
    ".dcm": "application/dicom",
    ".vcf.gz": "application/gzip",
    ".bcf": "https://samtools.github.io/hts-specs/BCFv2_qref.pdf",
    ".pgen": "https://www.cog-genomics.org/plink/2.0/formats#pgen",
    ".pvar": "https://www.cog-genomics.org/plink/2.0/formats#pvar",
    ".psam": "https://www.cog-genomics.org/plink/2.0/formats#psam",
    ".json": "application/json",
    ".md": "text/markdown",
    ".html": "text/html",
    **TABLE_TYPES,
}


def media_type(name: str) -> str:
    """Media type of a file, or the page of its format where none is registered."""
    lower = name.lower()
    return next((kind for suffix, kind in _TYPES.items() if lower.endswith(suffix)), "application/octet-stream")


def describe(manifest: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Croissant record of the release in `folder`, whose data files `manifest["files"]` lists.

    Tables get a record set each, one field a column, typed by what all of its values are.
    """
    files = [
        {
            "@type": "cr:FileObject",
            "@id": entry["path"],
            "name": entry["path"],
            "contentUrl": entry["path"],
            "contentSize": f"{entry['bytes']} B",
            "encodingFormat": media_type(entry["path"]),
            "sha256": entry["sha256"],
        }
        for entry in manifest["files"]
    ]
    tables = [e["path"] for e in manifest["files"] if e["path"].lower().endswith(tuple(TABLE_TYPES))]
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "@id": manifest["identifier"],
        "conformsTo": CONFORMS,
        "name": manifest["title"],
        "description": f"{MARK} {manifest['description']}".strip(),
        "license": manifest["licence"],
        "url": manifest["url"],
        "creator": {"@type": "sc:Organization", "name": manifest["creator"]},
        "datePublished": manifest["created_utc"][:10],
        "version": "1.0.0",
        "citeAs": f"{manifest['creator']}. {manifest['title']}. {manifest['created_utc'][:4]}. {manifest['url']}",
        "additionalType": DATASET_TYPE,
        "keywords": ["synthetic data", *manifest["keywords"]],
        "isLiveDataset": False,
        "rai:dataCollection": f"No data were collected. {MARK}",
        "rai:personalSensitiveInformation": (
            "None by construction. An audit for copies of the people that the model learned from passed on exactly these"
            " bytes; manifest.json has its findings."
        ),
        "rai:dataLimitations": (
            "Not for decisions about a person, diagnosis, or estimates of how common a finding is. A passing audit bounds"
            " what its searches can see at its sample sizes; it is no proof that nothing leaked."
        ),
        "distribution": files,
        "recordSet": [_records(name, folder) for name in tables],
    }


def _records(name: str, folder: Path) -> dict[str, Any]:
    with (folder / name).open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream, delimiter="\t" if name.lower().endswith(".tsv") else ",")
        heads = next(reader, [])
        columns: list[list[str]] = [[] for _ in heads]
        for row in reader:
            for column, cell in zip(columns, row):
                column.append(cell)
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"{name}#records/{head}",
            "name": head,
            "description": f"column {head}",
            "dataType": _data_type(cells),
            "source": {"fileObject": {"@id": name}, "extract": {"column": head}},
        }
        for head, cells in zip(heads, columns)
    ]
    return {"@type": "cr:RecordSet", "@id": f"{name}#records", "name": f"{name}#records", "field": fields}


def _data_type(cells: list[str]) -> str:
    """The narrowest type that every cell has; empty cells and BIDS' n/a leave a column text, as no number says missing."""
    for kind, type_ in (("sc:Integer", int), ("sc:Float", float)):
        try:
            for cell in cells:
                type_(cell)
        except ValueError:
            continue
        if cells:
            return kind
    return "sc:Text"
