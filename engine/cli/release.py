"""`engine release`, `verify-release` and `report`: audited data leave the building, whole and marked, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engine.cli.common import JsonFlag, Out, Seed, emit

Words = Annotated[list[str] | None, typer.Option("--keyword", help="For the catalogues; repeat.")]


def release(
    source: Annotated[Path, typer.Argument(help="File or folder that was audited.")],
    audit: Annotated[Path, typer.Option("--audit", help="audit.json of exactly these bytes.")],
    out: Out,
    title: Annotated[str, typer.Option("--title", help="Name of the dataset.")] = "Synthetic data",
    description: Annotated[str, typer.Option("--description", help="One or two sentences for people.")] = "",
    licence: Annotated[
        str, typer.Option("--licence", help="Terms of use: the URL of a licence, or words.")
    ] = "to be stated by the data holder",
    creator: Annotated[
        str, typer.Option("--creator", help="Who releases the data.")
    ] = "to be stated by the data holder",
    url: Annotated[str, typer.Option("--url", help="Where the data will be found; default: a urn of the hashes.")] = "",
    keyword: Words = None,
    bids: Annotated[
        str | None, typer.Option("--bids", help="Lay NIfTI scans out as a BIDS derivative of this contrast, e.g. T1w.")
    ] = None,
    skull_stripped: Annotated[
        bool, typer.Option("--skull-stripped", help="The scans show the brain only; BIDS has to be told.")
    ] = False,
    derived_from: Annotated[
        list[str] | None, typer.Option("--derived-from", help="DOI or URL of a public dataset learned from; repeat.")
    ] = None,
    model: Annotated[Path | None, typer.Option("--model", help="Run folder that made the data: MODEL_CARD.md.")] = None,
    evaluation: Annotated[
        list[Path] | None, typer.Option("--evaluation", help="Folder of `engine ... evaluate --out`; repeat.")
    ] = None,
    sign: Annotated[
        Path | None, typer.Option("--sign", help="PEM file with an Ed25519 private key: SHA256SUMS.sig.")
    ] = None,
    forbid: Annotated[
        Path | None, typer.Option("--forbid", help="Text file of strings that must not leave, e.g. ids, one a line.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Copy audited data to a release folder; refuses (exit 3) without a passing audit of exactly these bytes."""
    from engine.release.forbidden import read_words
    from engine.release.manifest import release as make_release

    made = make_release(
        source,
        audit,
        out,
        title=title,
        description=description,
        licence=licence,
        creator=creator,
        url=url,
        keywords=keyword or (),
        bids=bids,
        skull_stripped=skull_stripped,
        sources=derived_from or (),
        model=model,
        evaluation=evaluation or (),
        sign=sign,
        forbidden=() if forbid is None else read_words(forbid),
    )
    emit({**made, "out": str(out)}, json, _lines)


def _lines(made: dict[str, Any]) -> list[str]:
    total = sum(entry["bytes"] for entry in made["files"])
    return [
        f"released: {len(made['files'])} data files, {total / 1e6:.1f} MB, to {made['out']}",
        f"identifier: {made['identifier']}",
        f"signed by: {made['signed_by'] or 'nobody'}",
        f"report: {made['out']}/report.html",
    ]


def verify_release(
    folder: Annotated[Path, typer.Argument(help="Release folder.")],
    key: Annotated[
        Path | None, typer.Option("--key", help="PEM file with the Ed25519 public key it must be signed by.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Check a release folder: checksums, synthetic marks, signature; exits 3 when something is wrong."""
    from engine.release.manifest import verify

    emit(verify(folder, key=key), json)


def report(
    audit: Annotated[Path, typer.Option("--audit", help="audit.json, whatever its verdict.")],
    out: Out,
    evaluation: Annotated[
        list[Path] | None, typer.Option("--evaluation", help="Folder of `engine ... evaluate --out`; repeat.")
    ] = None,
    real: Annotated[Path | None, typer.Option("--real", help="Table or folder of real scans, to be shown.")] = None,
    synthetic: Annotated[
        Path | None, typer.Option("--synthetic", help="Table or folder of synthetic scans, to be shown.")
    ] = None,
    title: Annotated[str, typer.Option("--title")] = "Synthetic data: audit and evaluation",
    seed: Seed = 0,
    json: JsonFlag = False,
) -> None:
    """One internal page of an audit and evaluations, with real scans beside synthetic ones: for those who decide."""
    from engine.release.internal_report import internal_report

    made = internal_report(
        out, audit=audit, evaluation=evaluation or (), real=real, synthetic=synthetic, title=title, seed=seed
    )
    emit(made, json)


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    app.command()(release)
    app.command("verify-release")(verify_release)
    app.command()(report)
