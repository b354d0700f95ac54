"""`engine ld` and `engine nearest`: the kernels at the shell."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from engine.cli.common import JsonFlag, Out, emit

Measure = Literal["r2", "r", "d", "d_prime"]  # those of engine.kernels.ld, which is too heavy to import here
Rule = Literal["plink1", "plink2"]


def ld(
    panel: Annotated[Path, typer.Argument(help="Panel: .vcf.gz, .bcf or .pgen.")],
    out: Annotated[Path, typer.Option("--out", help="Table of pairs (TSV), or what the options below ask for.")],
    measure: Annotated[Measure, typer.Option("--measure", help="r2, r, d or d_prime.")] = "r2",
    unphased: Annotated[
        bool, typer.Option("--unphased", help="LD of dosages 0, 1, 2 of people in place of haplotypes.")
    ] = False,
    min_r2: Annotated[
        float | None,
        typer.Option(
            "--min-r2",
            min=0.0,
            max=1.0,
            help="Keep pairs whose measure is at least this in absolute value [0.2; clumps 0.5].",
        ),
    ] = None,
    window_kb: Annotated[
        float | None,
        typer.Option("--window-kb", min=0.001, help="Pairs at most so far apart [1000; blocks 200, clumps 250]."),
    ] = None,
    window_sites: Annotated[
        int | None, typer.Option("--window-sites", min=1, help="And at most so many sites.")
    ] = None,
    window_cm: Annotated[
        float | None, typer.Option("--window-cm", min=0.0, help="And so many cM; needs --map.")
    ] = None,
    map: Annotated[Path | None, typer.Option("--map", help="Genetic map of every contig.")] = None,
    min_maf: Annotated[
        float | None, typer.Option("--min-maf", min=0.0, max=0.5, help="Leave out rarer sites [0; blocks 0.05].")
    ] = None,
    prune: Annotated[
        float | None,
        typer.Option("--prune", min=0.0, max=1.0, help="Sites to keep, so that no two have r2 above this."),
    ] = None,
    step: Annotated[int, typer.Option("--step", min=1, help="Sites from one pruning window to the next.")] = 1,
    rule: Annotated[Rule, typer.Option("--rule", help="Pruning and clumping as plink1 or plink2.")] = "plink2",
    scores: Annotated[bool, typer.Option("--scores", help="LD score of each site.")] = False,
    adjusted: Annotated[bool, typer.Option("--adjusted", help="Scores of r2 less its bias of a small sample.")] = False,
    blocks: Annotated[bool, typer.Option("--blocks", help="Haplotype blocks (Gabriel et al. 2002).")] = False,
    clump: Annotated[Path | None, typer.Option("--clump", help="Clumps of the p-values in this table.")] = None,
    p1: Annotated[float, typer.Option("--p1", help="Largest p of an index of a clump.")] = 1e-4,
    p2: Annotated[float, typer.Option("--p2", help="Largest p of a member of a clump.")] = 0.01,
    triangle: Annotated[
        bool, typer.Option("--triangle", help="All pairs: float32 lower triangle, as plink2's bin4 triangle.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Linkage disequilibrium of a panel: pairs above a threshold, or pruned sites, scores, blocks, clumps, a triangle."""
    from engine.errors import UsageError
    from engine.genomics import tables

    modes = {
        "--prune": prune is not None, "--scores": scores, "--blocks": blocks, "--clump": clump is not None,
        "--triangle": triangle,
    }  # fmt: skip
    asked = [name for name, given in modes.items() if given]
    if len(asked) > 1:
        raise UsageError("one result at a time", " and ".join(asked), "engine ld")
    if window_cm is not None and map is None:
        raise UsageError("--map beside --window-cm", "none", "engine ld")
    kb = window_kb or (200.0 if blocks else 250.0 if clump is not None else 1000.0)
    by_kb = window_kb is not None or blocks or clump is not None or (window_sites is None and window_cm is None)
    window = tables.Window(round(kb * 1000) if by_kb else None, window_sites, window_cm)
    maf = min_maf if min_maf is not None else 0.05 if blocks else 0.0
    shared: dict[str, Any] = {"unphased": unphased}
    if prune is not None:
        made = tables.ld_prune(panel, out, most_r2=prune, window=window, step=step, rule=rule, min_maf=maf, **shared)
    elif scores:
        made = tables.ld_scores(panel, out, window=window, adjusted=adjusted, min_maf=maf, map=map, **shared)
    elif blocks:
        made = tables.ld_blocks(panel, out, window=window, min_maf=maf, **shared)
    elif clump is not None:
        least = 0.5 if min_r2 is None else min_r2
        made = tables.ld_clumps(panel, clump, out, p1=p1, p2=p2, min_r2=least, window=window, rule=rule, **shared)
    elif triangle:
        made = tables.ld_triangle(panel, out, measure=measure, **shared)
    else:
        least = 0.2 if min_r2 is None else min_r2
        made = tables.ld_table(panel, out, min_r2=least, window=window, min_maf=maf, measure=measure, map=map, **shared)
    emit(made, json)


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
