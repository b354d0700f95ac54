"""A draft description for a HealthDCAT-AP catalogue, as JSON-LD.

What the release knows is filled in. What only the data holder can say (access rights, the health data access body, contacts,
the legal basis) is not invented: it is listed in the draft itself, under rdfs:comment, so that it is a draft that nobody
takes for a finished record. Source: HealthDCAT-AP release 8 on DCAT-AP 3.0, classes Dataset, Distribution and the CSVW
tables of structured data; `tests/release/healthdcat_ap.ttl` holds their constraints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.release.marks import DATASET_TYPE, MARK

NAME = "healthdcat-ap.jsonld"
CONTEXT = {
    "adms": "http://www.w3.org/ns/adms#",
    "csvw": "http://www.w3.org/ns/csvw#",
    "cv": "http://data.europa.eu/m8g/",
    "dcat": "http://www.w3.org/ns/dcat#",
    "dcatap": "http://data.europa.eu/r5r/",
    "dct": "http://purl.org/dc/terms/",
    "foaf": "http://xmlns.com/foaf/0.1/",
    "healthdcatap": "http://healthdataportal.eu/ns/health#",
    "rdfs": "http://www.w3.org/2000/01/rdf-schema#",
    "spdx": "http://spdx.org/rdf/terms#",
    "xsd": "http://www.w3.org/2001/XMLSchema#",
}
EHDS = "http://data.europa.eu/eli/reg/2025/327/oj"
TO_COMPLETE = (
    "dct:accessRights",
    "dcat:contactPoint",
    "healthdcatap:hdab",
    "healthdcatap:healthCategory",
    "cv:contactPoint of the publisher",
    "healthdcatap:trustedDataHolder of the publisher",
    "dcat:accessURL of the distribution",
)


def describe(manifest: Mapping[str, Any], tables: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """dcat:Dataset with one dcat:Distribution, the release folder.

    Args:
        tables: record sets of the released tables, as `croissant.describe` makes them.
    """
    total = sum(entry["bytes"] for entry in manifest["files"])
    missing = ", ".join(name for name in TO_COMPLETE if not (name.startswith("dcat:accessURL") and _web(manifest)))
    people = manifest["audit"]["sizes"].get("synthetic", {}).get("people")
    distribution: dict[str, Any] = {
        "@type": "dcat:Distribution",
        "dct:title": _text("The release folder"),
        "dct:description": _text(f"{len(manifest['files'])} data files; SHA256SUMS has their checksums."),
        "dcat:byteSize": {"@type": "xsd:nonNegativeInteger", "@value": str(total)},
        "dct:license": _iri_or_text(manifest["licence"]),
        "dcatap:applicableLegislation": {"@id": EHDS},
    }
    if _web(manifest):
        distribution["dcat:accessURL"] = {"@id": manifest["url"]}
    made: dict[str, Any] = {
        "@context": CONTEXT,
        "@id": manifest["identifier"],
        "@type": "dcat:Dataset",
        "rdfs:comment": _text(f"DRAFT. To be completed by the data holder: {missing}."),
        "dct:title": _text(manifest["title"]),
        "dct:description": _text(f"{MARK} {manifest['description']}".strip()),
        "dct:identifier": manifest["identifier"],
        "dct:type": {"@id": DATASET_TYPE},
        "dct:issued": {"@type": "xsd:dateTime", "@value": manifest["created_utc"]},
        "dcat:theme": {"@id": "http://publications.europa.eu/resource/authority/data-theme/HEAL"},
        "dcat:keyword": [_text(word) for word in ("synthetic data", *manifest["keywords"])],
        "dct:publisher": {"@type": "foaf:Agent", "foaf:name": manifest["creator"]},
        "dct:provenance": {
            "@type": "dct:ProvenanceStatement",
            "rdfs:label": _text(
                f"Drawn from a generative model by engine {manifest['engine']}; the audit for copies of real people gave"
                f" '{manifest['audit']['verdict']}' on exactly these bytes."
            ),
        },
        "healthdcatap:populationCoverage": _text("No real person. Synthetic people that resemble the training cohort."),
        "dcatap:applicableLegislation": {"@id": EHDS},
        "dcat:distribution": distribution,
    }
    made["healthdcatap:hasStructuredData"] = {"@type": "xsd:boolean", "@value": "true" if tables else "false"}
    if tables:
        made["healthdcatap:hasVariables"] = {
            "@type": "csvw:TableGroup",
            "dct:title": _text("Tables of the release"),
            "csvw:table": [_table(table) for table in tables],
        }
    if people is not None:
        made["healthdcatap:numberOfRecords"] = {"@type": "xsd:nonNegativeInteger", "@value": str(people)}
    return made


def _table(table: Mapping[str, Any]) -> dict[str, Any]:
    """csvw:Table of a record set."""
    kinds = {"sc:Integer": "integer", "sc:Float": "double"}
    columns = [
        {
            "@type": "csvw:Column",
            "csvw:name": field["name"],
            "csvw:title": field["name"],
            "csvw:datatype": kinds.get(field["dataType"], "string"),
            "dct:description": _text(field["description"]),
        }
        for field in table["field"]
    ]
    return {"@type": "csvw:Table", "dct:title": table["name"].removesuffix("#records"), "csvw:column": columns}


def _web(manifest: Mapping[str, Any]) -> bool:
    return manifest["url"].startswith(("http://", "https://"))


def _text(words: str) -> dict[str, str]:
    return {"@language": "en", "@value": words}


def _iri_or_text(licence: str) -> dict[str, Any]:
    if licence.startswith(("http://", "https://")):
        return {"@id": licence}
    return {"@type": "dct:LicenseDocument", "rdfs:label": _text(licence)}
