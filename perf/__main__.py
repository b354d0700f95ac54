"""`python -m perf`: the command line of the benchmarks. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

ROOT = Path(__file__).resolve().parents[1]
app = typer.Typer(
    add_completion=False, no_args_is_help=True, help=(__doc__ or "").splitlines()[0], rich_markup_mode=None
)

Root = Annotated[Path, typer.Option(help="checkout whose perf/**/bench_*.py are run")]
History = Annotated[Path | None, typer.Option(help="folder of records; default: perf/history of the checkout")]


def _say(line: str) -> None:
    typer.echo(line, err=True)


@app.command()
def run(
    pattern: Annotated[str | None, typer.Argument(help="part of a case's name, or a shell pattern")] = None,
    peers: Annotated[bool, typer.Option("--peers", help="the peers as well, in turn with ours")] = False,
    everything: Annotated[bool, typer.Option("--all/--quick", help="the long cases as well")] = False,
    curves: Annotated[bool, typer.Option("--curves", help="scaling curves as well, and their exponents")] = False,
    limits: Annotated[bool, typer.Option(help="measure what the machine can do at best first")] = True,
    repeats: Annotated[int | None, typer.Option(min=1, help="timed runs; default: the case's own, at least 5")] = None,
    budget_seconds: Annotated[float | None, typer.Option(help="cases that begin later are recorded as not run")] = None,
    case_seconds: Annotated[
        float | None, typer.Option(help="longest for one case; default: 300, or 3600 for a long one")
    ] = None,
    root: Root = ROOT,
    history: History = None,
) -> None:
    """Run cases; a record of each is appended under perf/history/."""
    from perf.record import history_folder
    from perf.run import Wanted
    from perf.run import run as run_cases

    wanted = Wanted(root, pattern, peers, everything, curves, limits, repeats, budget_seconds, case_seconds)
    try:
        made = run_cases(wanted, history or history_folder(root), _say)
    except LookupError as error:
        _fail(str(error))
    typer.echo(str(made))


@app.command()
def verify(root: Root = ROOT, history: History = None) -> None:
    """Check schema, unique ids, hashes of bench files, and that no record was ever rewritten."""
    from perf.record import history_folder
    from perf.record import verify as check

    wrong, unknown = check(root, history or history_folder(root))
    for line in unknown:
        _say(f"cannot be checked: {line}")
    for line in wrong:
        typer.echo(line)
    if wrong:
        raise typer.Exit(2)
    typer.echo("the history is sound")


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="the HTML page")] = Path("runs/perf/report.html"),
    readme: Annotated[bool, typer.Option("--readme", help="print the README's table of ratios instead")] = False,
    machine: Annotated[
        str | None, typer.Option(help="folder under the history; default: the machine of the last run")
    ] = None,
    root: Root = ROOT,
    history: History = None,
) -> None:
    """Table in the terminal and one HTML page of the whole history."""
    from perf import report as reports
    from perf.record import history_folder, read

    records = read(history or history_folder(root))
    known = reports.machines(records)
    if not known:
        _fail("no records yet; try: python -m perf run --peers")
    if machine is not None and machine not in known:
        _fail(f"no records of machine {machine}; there are {', '.join(known)}")
    chosen = [record for record in records if record.machine["name"] == (machine or known[0])]
    if readme:
        typer.echo(reports.readme(chosen), nl=False)
        return
    from rich.console import Console

    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console.width = 140
    console.print(reports.table(chosen))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(reports.page(records))
    typer.echo(str(out))


@app.command()
def compare(
    base: Annotated[str, typer.Argument(help="commit, branch or tag to compare this checkout with")],
    pattern: Annotated[str | None, typer.Argument(help="part of a case's name, or a shell pattern")] = None,
    everything: Annotated[bool, typer.Option("--all/--quick", help="the long cases as well")] = False,
    repeats: Annotated[int, typer.Option(min=5, help="rounds, at least 5 and at most this many or a minute")] = 15,
    root: Root = ROOT,
) -> None:
    """This checkout beside another commit, in turn in one session. Exit code 3 when a case is slower."""
    from perf.compare import compare as compare_cases

    try:
        rows = compare_cases(root, base, pattern, everything=everything, repeats=repeats, tell=typer.echo)
    except LookupError as error:
        _fail(str(error))
    if any(row.verdict == "slower" for row in rows):
        raise typer.Exit(3)


def _fail(line: str) -> NoReturn:
    _say(line)
    raise typer.Exit(2)


if __name__ == "__main__":
    sys.exit(app())
