"""`engine benchmark ...`: compare generators of anybody on standard tracks, and check what was written about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engine.cli.common import JsonFlag, Out, emit, progress_bar

app = typer.Typer(
    no_args_is_help=True, help="Benchmark: entries of any tool and the engine's own on equal terms, with controls."
)

TrackName = Annotated[str, typer.Argument(metavar="TRACK", help="A standard track, or a YAML file with the same keys.")]
Data = Annotated[Path, typer.Option("--data", help="Folder with the track's files; their hashes are checked.")]
Budget = Annotated[float | None, typer.Option("--budget-seconds", help="Training time of each; default: the track's.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of each entrant.")]


@app.command()
def tracks(json: JsonFlag = False) -> None:
    """List the standard tracks."""
    from engine.benchmark.tracks import load_track, names

    found = [load_track(name) for name in names()]
    rows = [{"name": t.name, "modality": t.modality, "about": t.about, "obtain": t.obtain} for t in found]
    emit({"tracks": rows}, json, lambda r: [f"{row['name']:<16} {row['modality']:<10} {row['about']}" for row in rows])


@app.command()
def split(track: TrackName, data: Data, out: Out, json: JsonFlag = False) -> None:
    """Write the sides of a track: `train` to learn from, `split.json` with the hash an entry has to name."""
    from engine.benchmark.sides import prepare
    from engine.benchmark.tracks import load_track

    with progress_bar() as progress:
        made = prepare(load_track(track), data, out, progress)
    emit({**made.__dict__, "folder": str(made.folder), "data": made.data}, json, _lines)


@app.command()
def enter(
    track: TrackName,
    entrant: Annotated[str, typer.Option("--entrant", help="One of the engine's own entrants, or a control.")],
    split: Annotated[Path, typer.Option("--split", help="What `engine benchmark split` wrote.")],
    out: Out,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of training and sampling.")] = 0,
    budget_seconds: Budget = None,
    threads: Threads = 1,
    json: JsonFlag = False,
) -> None:
    """Train and sample one of the engine's own entrants and leave an entry, as an example or for `run`."""
    from engine.benchmark.entrants import enter as make
    from engine.benchmark.sides import load_sides
    from engine.benchmark.tracks import load_track

    chosen = load_track(track)
    if chosen.scans is not None:
        import torch

        torch.set_num_threads(threads)
    budget = chosen.budget_seconds if budget_seconds is None else budget_seconds
    made = make(chosen, entrant, load_sides(split, chosen), out, seed=seed, budget_seconds=budget, threads=threads)
    emit({"out": str(out), **made.model_dump(mode="json")}, json, _lines)


@app.command()
def run(
    track: TrackName,
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="New folder, or one that this command left unfinished.")],
    entrants: Annotated[str, typer.Option("--entrants", help="Names with commas; default: the track's.")] = "",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds 0 .. k-1 of every entrant.")] = 3,
    budget_seconds: Budget = None,
    threads: Threads = 1,
    json: JsonFlag = False,
) -> None:
    """Train, sample and score the engine's entrants and the controls by equal budget; failures are rows."""
    from engine.benchmark.run import run as compare

    chosen = [name.strip() for name in entrants.split(",") if name.strip()]
    with progress_bar() as progress:
        result = compare(
            track,
            data,
            out,
            entrants=chosen,
            seeds=seeds,
            budget_seconds=budget_seconds,
            threads=threads,
            progress=progress,
        )
    emit(result, json, lambda r: [r["table"], f"records: {r['records']}"])


@app.command()
def score(
    track: TrackName,
    entries: Annotated[list[Path], typer.Argument(metavar="ENTRY...", help="Folders with entry.json and samples.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="RECORDS.jsonl; lines are appended.")],
    split: Annotated[
        Path | None, typer.Option("--split", help="Sides that `engine benchmark split` wrote; made where not given.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Score folders that entrants handed in, and append one record each."""
    from engine.benchmark.run import score_entries

    with progress_bar() as progress:
        result = score_entries(track, data, entries, out, split=split, progress=progress)
    emit(result, json, lambda r: [f"{x['name']} seed {x['seed']}: {x['status']} {x['reason']}" for x in r["rows"]])


@app.command()
def verify(
    records: Annotated[Path, typer.Argument(help="RECORDS.jsonl")],
    data: Data,
    entries: Annotated[
        Path | None, typer.Option("--entries", help="Folder of the entries; default: `entries` beside the records.")
    ] = None,
    track: Annotated[Path | None, typer.Option("--track", help="YAML of a track that is not a standard one.")] = None,
    remake: Annotated[
        bool, typer.Option("--remake", help="Run the engine's own entrants again where samples are not at hand.")
    ] = False,
    tolerance: Annotated[float, typer.Option("--tolerance", min=0, help="Relative difference that is none.")] = 1e-6,
    json: JsonFlag = False,
) -> None:
    """Recompute what records say and name what differs; exits 3 when something does, or nothing could be checked."""
    from engine.benchmark.verify import verify as recompute

    with progress_bar() as progress:
        result = recompute(
            records,
            data,
            entries=entries,
            track_file=track,
            remake=remake,
            tolerance=tolerance,
            progress=progress,
        )

    def lines(r: dict[str, Any]) -> list[str]:
        return [
            *(f"line {d['line']}: {d['what']}: {d['recorded']} -> {d['recomputed']}" for d in r["differences"]),
            *(f"line {d['line']}: not checked: {d['why']}" for d in r["not_checked"]),
            f"{r['verified']} of {r['records']} records verified, {len(r['differences'])} differences; head {r['head']}",
        ]

    emit(result, json, lines)
    if result["differences"] or not result["verified"]:
        raise typer.Exit(3)


@app.command()
def table(
    records: Annotated[list[Path], typer.Argument(metavar="RECORDS...", help="Files of records.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write the Markdown here; it may exist.")] = None,
    json: JsonFlag = False,
) -> None:
    """Print records as a Markdown table, with intervals over seeds and within."""
    from engine.atomic import write_text
    from engine.benchmark.records import read
    from engine.benchmark.table import markdown

    text = markdown([record for path in records for record in read(path)[0]])
    if out is not None:
        write_text(out, text)
    emit({"table": text, "out": None if out is None else str(out)}, json, lambda r: [r["table"]])


def _lines(result: dict[str, Any]) -> list[str]:
    return [f"{key}: {value}" for key, value in result.items()]
