"""`engine ld` and `engine nearest`: the kernels at the shell."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.cli.common import JsonFlag, Out, emit


def ld(
    panel: Annotated[Path, typer.Argument(help="Phased panel: .vcf.gz, .bcf or .pgen.")],
    out: Annotated[Path, typer.Option("--out", help="TSV of pairs: contig, both positions and ids, r2.")],
    min_r2: Annotated[
        float, typer.Option("--min-r2", min=0.0, max=1.0, help="Keep pairs with r2 at least this.")
    ] = 0.2,
    window_kb: Annotated[
        float, typer.Option("--window-kb", min=0.001, help="Only pairs at most this far apart.")
    ] = 1000.0,
    min_maf: Annotated[float, typer.Option("--min-maf", min=0.0, max=0.5, help="Leave out rarer sites.")] = 0.0,
    json: JsonFlag = False,
) -> None:
    """r2 between the sites of a phased panel, pairs above a threshold as a table."""
    from engine.genomics.tables import ld_table

    emit(ld_table(panel, out, min_r2=min_r2, window_bp=int(window_kb * 1000), min_maf=min_maf), json)


def nearest(
    query: Annotated[Path, typer.Argument(help="Panel, or CSV or folder of scans.")],
    database: Annotated[Path, typer.Argument(help="The same kind as the query.")],
    out: Out,
    k: Annotated[int, typer.Option("-k", min=1, help="How many neighbours of each.")] = 1,
    exclude_self: Annotated[
        bool, typer.Option("--exclude-self", help="Query and database are the same: skip the item itself.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Exact nearest neighbours, exhaustively: Hamming distance for haplotypes, copy-detector distance for scans."""
    from engine.release.audit_run import nearest_table

    emit(nearest_table(query, database, out, k=k, exclude_self=exclude_self), json)


def register(app: typer.Typer) -> None:
    """Add the commands to the main app."""
    app.command()(ld)
    app.command()(nearest)
