"""What a release says about itself, held against the reference implementations of the formats it says it in."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from engine.errors import GateRefused, UsageError
from engine.release.manifest import release, verify
from engine.release.marks import DATASET_TYPE

DETAILS = {
    "title": "Heads", "description": "Six heads.", "licence": "https://creativecommons.org/licenses/by/4.0/",
    "creator": "St Elsewhere", "keywords": ["head", "MRI"],
}  # fmt: skip
VALIDATOR = shutil.which("bids-validator-deno") or shutil.which("bids-validator-deno", path=Path(sys.executable).parent)


def test_croissant_is_valid_and_its_records_are_the_table(tmp_path, scans, audited):
    mlcroissant = pytest.importorskip("mlcroissant")
    out = tmp_path / "out"
    release(scans, audited(scans), out, **DETAILS)
    dataset = mlcroissant.Dataset(out / "croissant.json")
    assert not dataset.metadata.issues.errors
    assert not dataset.metadata.issues.warnings
    assert "http://mlcommons.org/croissant/1.1" in [str(url) for url in dataset.metadata.conforms_to]
    (table,) = dataset.metadata.record_sets
    said = [
        {key.rsplit("/", 1)[-1]: value.decode() if isinstance(value, bytes) else value for key, value in record.items()}
        for record in dataset.records(table.id)
    ]
    with (scans / "volumes.csv").open(newline="") as stream:
        held = [{**row, "visit": int(row["visit"]), "age": int(row["age"])} for row in csv.DictReader(stream)]
    assert said == held
    described = json.loads((out / "croissant.json").read_text())
    assert described["additionalType"] == DATASET_TYPE
    assert {f["@id"] for f in described["distribution"]} == {
        f["path"] for f in json.loads((out / "manifest.json").read_text())["files"]
    }


def test_the_croissant_check_can_fail(tmp_path, scans, audited):
    mlcroissant = pytest.importorskip("mlcroissant")
    out = tmp_path / "out"
    release(scans, audited(scans), out)
    described = json.loads((out / "croissant.json").read_text())
    described["recordSet"][0]["field"][0]["source"]["fileObject"]["@id"] = "nowhere"
    (out / "croissant.json").write_text(json.dumps(described))
    with pytest.raises(mlcroissant.ValidationError):
        mlcroissant.Dataset(out / "croissant.json")


def test_ro_crate_after_the_specification(tmp_path, scans, audited):
    """RO-Crate 1.2: the descriptor, a whole root, every file a data entity that exists, every reference answered."""
    out = tmp_path / "out"
    release(scans, audited(scans), out, **DETAILS)
    crate = json.loads((out / "ro-crate-metadata.json").read_text())
    assert crate["@context"] == "https://w3id.org/ro/crate/1.2/context"
    by_id = {entity["@id"]: entity for entity in crate["@graph"]}
    assert len(by_id) == len(crate["@graph"])
    assert all(entity["@type"] and entity.get("name", entity["@id"]) for entity in crate["@graph"])
    descriptor, root = by_id["ro-crate-metadata.json"], by_id["./"]
    assert descriptor["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.2"}
    assert descriptor["about"] == {"@id": "./"}
    for name in ("name", "description", "datePublished", "license"):
        assert root[name]
    parts = {part["@id"] for part in root["hasPart"]}
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert {unquote(part) for part in parts} == files - {"SHA256SUMS", "ro-crate-metadata.json"}
    for part in parts:
        entity = by_id[part]
        assert entity["@type"] == "File"
        assert int(entity["contentSize"]) == (out / unquote(part)).stat().st_size
        assert entity["sha256"] == hashlib.sha256((out / unquote(part)).read_bytes()).hexdigest()

    def references(value):
        if isinstance(value, dict):
            if set(value) == {"@id"}:
                yield value["@id"]
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    outside = {ref for entity in crate["@graph"] for ref in references(entity)} - set(by_id)
    assert outside == {"https://w3id.org/ro/crate/1.2"}


def test_ro_crate_is_read_by_its_library(tmp_path, scans, audited):
    rocrate = pytest.importorskip("rocrate.rocrate")
    out = tmp_path / "out"
    release(scans, audited(scans), out, **DETAILS)
    crate = rocrate.ROCrate(out)
    assert crate.version == "1.2"
    assert crate.root_dataset["name"] == "Heads"
    assert crate.root_dataset["creator"]["name"] == "St Elsewhere"
    assert {"manifest.json", "data/volumes.csv"} <= {entity.id for entity in crate.data_entities}
    assert crate.dereference("#generation")["instrument"]["name"] == "engine"


def test_healthdcat_is_a_draft_that_says_what_it_lacks(tmp_path, scans, audited):
    rdflib = pytest.importorskip("rdflib")
    out = tmp_path / "out"
    manifest = release(scans, audited(scans), out, **DETAILS)
    graph = rdflib.Graph().parse(out / "healthdcat-ap.jsonld")
    assert len(graph) == len(rdflib.Graph().parse(data=graph.serialize(format="turtle"), format="turtle"))
    dcat, dct = rdflib.Namespace("http://www.w3.org/ns/dcat#"), rdflib.DCTERMS
    (dataset,) = graph.subjects(rdflib.RDF.type, dcat.Dataset)
    assert str(dataset) == manifest["identifier"]
    assert graph.value(dataset, dct.type) == rdflib.URIRef(DATASET_TYPE)
    for name in (dct.title, dct.description, dct.identifier, dct.publisher, dct.provenance, dcat.theme, dcat.keyword,
                 dcat.distribution):  # fmt: skip
        assert graph.value(dataset, name) is not None or len(list(graph.objects(dataset, name))) > 1
    comment = str(graph.value(dataset, rdflib.RDFS.comment))
    for missing in ("dct:accessRights", "dcat:contactPoint", "healthdcatap:hdab", "dcat:accessURL"):
        assert missing in comment
    release(scans, audited(scans), tmp_path / "web", url="https://example.org/heads")
    assert (
        "dcat:accessURL"
        not in json.loads((tmp_path / "web" / "healthdcat-ap.jsonld").read_text())["rdfs:comment"]["@value"]
    )


HOLDER = """
@prefix cv: <http://data.europa.eu/m8g/> .
@prefix dcat: <http://www.w3.org/ns/dcat#> .
@prefix dct: <http://purl.org/dc/terms/> .
@prefix foaf: <http://xmlns.com/foaf/0.1/> .
@prefix hd: <http://healthdataportal.eu/ns/health#> .
@prefix vcard: <http://www.w3.org/2006/vcard/ns#> .
<%s> dct:accessRights <http://publications.europa.eu/resource/authority/access-right/RESTRICTED> ;
  dcat:contactPoint [ a vcard:Kind ; vcard:hasEmail <mailto:data@example.org> ] ;
  hd:healthCategory <https://example.org/health-category/IMAGING> ;
  hd:hdab [ a foaf:Agent ; foaf:name "An access body" ; cv:contactPoint [ a cv:ContactPoint ] ] .
<urn:publisher> cv:contactPoint [ a cv:ContactPoint ] .
"""


def violations(graph) -> set[str]:
    """Local names of the paths that break `healthdcat_ap.ttl`."""
    pyshacl, rdflib = pytest.importorskip("pyshacl"), pytest.importorskip("rdflib")
    _, results, _ = pyshacl.validate(graph, shacl_graph=str(Path(__file__).parent / "healthdcat_ap.ttl"))
    sh = rdflib.Namespace("http://www.w3.org/ns/shacl#")
    found = set()
    for result in results.subjects(rdflib.RDF.type, sh.ValidationResult):
        path = results.value(result, sh.resultPath)
        found.add(str(results.value(result, sh.resultMessage)) if path is None else re.split("[#/]", str(path))[-1])
    return found


def completed(path: Path):
    """The draft with what the holder has to say."""
    rdflib = pytest.importorskip("rdflib")
    graph = rdflib.Graph().parse(path)
    (dataset,) = graph.subjects(rdflib.RDF.type, rdflib.Namespace("http://www.w3.org/ns/dcat#").Dataset)
    graph.parse(data=HOLDER % dataset, format="turtle")
    publisher = graph.value(dataset, rdflib.DCTERMS.publisher)
    contact = rdflib.URIRef("http://data.europa.eu/m8g/contactPoint")
    graph.add((publisher, contact, graph.value(rdflib.URIRef("urn:publisher"), contact)))
    return graph, dataset


@pytest.mark.parametrize("kind", ["scans", "genotypes"])
def test_healthdcat_holds_the_published_constraints(tmp_path, scans, panel, audited, kind):
    """The draft lacks what it says it lacks and nothing else; with that it conforms."""
    rdflib = pytest.importorskip("rdflib")
    source = scans
    if kind == "genotypes":
        from engine.genomics.panel import write_panel

        source = tmp_path / "p.bcf"
        write_panel(panel, source, header_lines=["##SYNTHETIC=synthetic"])
    release(source, audited(source), tmp_path / "out", **DETAILS)
    draft = rdflib.Graph().parse(tmp_path / "out" / "healthdcat-ap.jsonld")
    lacking = {"accessRights", "contactPoint", "hdab", "healthCategory", "publisher", "accessURL"}
    assert violations(draft) == lacking
    assert all(name in str(next(draft.objects(None, rdflib.RDFS.comment))) for name in lacking)
    release(source, audited(source), tmp_path / "web", **DETAILS | {"url": "https://example.org/heads"})
    graph, dataset = completed(tmp_path / "web" / "healthdcat-ap.jsonld")
    assert violations(graph) == set()
    health = rdflib.Namespace("http://healthdataportal.eu/ns/health#")
    assert graph.value(dataset, health.hasStructuredData).toPython() is (kind == "scans")
    graph.remove((dataset, health.hasStructuredData, None))
    graph.set((dataset, health.numberOfRecords, rdflib.Literal("many")))
    assert violations(graph) >= {"hasStructuredData", "numberOfRecords"}


# ------------------------------------------------------------------------------------------------------------- BIDS


def test_bids_keeps_the_bytes_and_moves_the_columns(tmp_path, scans, audited):
    out = tmp_path / "out"
    manifest = release(scans, audited(scans), out, bids="T1w", sources=["10.5281/zenodo.1", "https://example.org/ixi"])
    data = out / "data"
    scan = data / "sub-SYN000000002" / "ses-1" / "anat" / "sub-SYN000000002_ses-1_desc-synthetic_T1w.nii.gz"
    assert scan.read_bytes() == (scans / "SYN000000002_visit1.nii.gz").read_bytes()
    sidecar = json.loads(scan.with_name(scan.name.replace(".nii.gz", ".json")).read_text())
    assert sidecar["SyntheticData"] is True
    assert sidecar["SkullStripped"] is False
    assert {e["audited_as"] for e in manifest["files"]} == {p.name for p in scans.glob("*.nii.gz")}
    description = json.loads((data / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "engine"
    assert description["SourceDatasets"] == [{"DOI": "doi:10.5281/zenodo.1"}, {"URL": "https://example.org/ixi"}]
    people = (data / "participants.tsv").read_text().splitlines()
    assert people[:2] == ["participant_id\tsex", "sub-SYN000000000\tF"]
    assert len(people) == 7
    visits = (data / "sub-SYN000000002" / "sub-SYN000000002_sessions.tsv").read_text().splitlines()
    assert visits == ["session_id\tage", "ses-0\t62", "ses-1\t63"]
    assert not (data / "volumes.csv").exists()  # it would name scans as they were
    assert verify(out)["data_files"] == 12


def test_a_bids_dataset_keeps_its_scans_and_has_all_else_written_anew(tmp_path, scans, audited):
    """As `engine cohort generate` leaves one: with tables, sidecars and words of its own."""
    release(scans, audited(scans), tmp_path / "first", bids="T1w")
    source = tmp_path / "first" / "data"
    (source / "README").write_text("free text")
    anat = source / "sub-SYN000000002" / "ses-1" / "anat"
    (anat / "sub-SYN000000002_ses-1_desc-synthetic_T1w.json").write_text('{"Description": "free text"}')
    out = tmp_path / "out"
    manifest = release(source, audited(source), out, bids="T1w", forbidden=["free text"], **DETAILS)
    names = sorted(p.relative_to(source).as_posix() for p in source.rglob("*.nii.gz"))
    assert sorted(e["audited_as"] for e in manifest["files"]) == names
    assert all((out / "data" / name).read_bytes() == (source / name).read_bytes() for name in names)
    for table in ("participants.tsv", "sub-SYN000000002/sub-SYN000000002_sessions.tsv"):
        assert (out / "data" / table).read_text() == (source / table).read_text()
    assert verify(out)["data_files"] == 12
    with pytest.raises(GateRefused, match=r"--bids|README"):
        release(source, audited(source), tmp_path / "plain")
    (anat / "weights.json").write_text("{}")
    with pytest.raises(GateRefused, match=r"weights\.json"):
        release(source, audited(source), tmp_path / "more", bids="T1w")


@pytest.mark.skipif(VALIDATOR is None, reason="bids-validator-deno is not installed")
@pytest.mark.parametrize("table", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_bids_validator_finds_no_error(tmp_path, scans, audited, table):
    if not table:  # then people and visits are read from the names
        (scans / "volumes.csv").unlink()
    out = tmp_path / "out"
    release(scans, audited(scans), out, bids="T1w", **DETAILS)

    def errors() -> set[str]:
        done = subprocess.run([VALIDATOR, out / "data", "--json"], capture_output=True, text=True, timeout=120)
        issues = json.loads(done.stdout)["issues"]["issues"]
        return {issue["code"] for issue in issues if issue.get("severity") == "error"}

    assert errors() == set()
    (out / "data" / "sub-SYN000000002" / "extra.nii.gz").write_bytes(b"")
    assert errors(), "the check can fail"


def test_what_bids_cannot_hold_is_refused(tmp_path, scans, audited, panel, volume):
    from engine.genomics.panel import write_panel
    from engine.imaging.volume import write_volume

    with pytest.raises(UsageError, match="'T1w'"):
        release(scans, audited(scans), tmp_path / "out", bids="T1")
    write_volume(volume(0), scans / "SYN000000000-visit0.nii.gz", description="SYNTHETIC")
    with pytest.raises(GateRefused, match="letters and digits"):
        release(scans, audited(scans), tmp_path / "out", bids="T1w")
    (scans / "SYN000000000-visit0.nii.gz").unlink()
    (scans / "volumes.csv").write_text((scans / "volumes.csv").read_text().replace(",1,", ",0,"))
    with pytest.raises(GateRefused, match="one scan for each person and visit"):
        release(scans, audited(scans), tmp_path / "out", bids="T1w")
    write_panel(panel, tmp_path / "p.bcf", header_lines=["##SYNTHETIC=synthetic"])
    with pytest.raises(GateRefused, match="NIfTI"):
        release(tmp_path / "p.bcf", audited(tmp_path / "p.bcf"), tmp_path / "out", bids="T1w")
    assert not (tmp_path / "out").exists()
