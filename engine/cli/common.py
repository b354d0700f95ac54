"""What every command shares: the options that mean the same everywhere, progress bars, and how results are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.errors import UsageError

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else there.")]
Out = Annotated[Path, typer.Option("--out", help="Where the result goes; must not exist yet.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed; synthetic person k depends on (model, seed, k) only.")]
Shard = Annotated[str, typer.Option("--shard", metavar="i/k", help="Make only part i of k, counted from 0.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=c", help="Override one value of the config or a covariate; repeat."),
]

Progress = Callable[[str, int, int], None]  # (what, done, total)


def parse_shard(text: str) -> tuple[int, int]:
    """`"i/k"` as (i, k) with 0 <= i < k."""
    parts = text.split("/")
    if len(parts) == 2 and all(part.isdigit() for part in parts) and int(parts[0]) < int(parts[1]):
        return int(parts[0]), int(parts[1])
    raise UsageError("--shard i/k with 0 <= i < k, e.g. 0/4", repr(text), "--shard")


def parse_range(text: str) -> tuple[float, float]:
    """`"FROM:TO"` as two numbers, `inf` and `-inf` allowed."""
    low, colon, high = text.partition(":")
    try:
        made = float(low), float(high)
    except ValueError:
        made = 1.0, 0.0
    if not colon or not made[0] < made[1]:
        raise UsageError("FROM:TO with FROM below TO, e.g. 1.5:inf", repr(text), "range")
    return made


def parse_counts(text: str, option: str) -> dict[str, int]:
    """`"AFR=100,EUR=50"` as whole numbers by name."""
    found: dict[str, int] = {}
    for pair in text.split(","):
        name, equals, value = pair.partition("=")
        if not equals or not name.strip() or not value.strip().isdigit() or name.strip() in found:
            raise UsageError("NAME=NUMBER,NAME=NUMBER", repr(text), option)
        found[name.strip()] = int(value)
    return found


def parse_assignments(pairs: list[str] | None) -> dict[str, str]:
    """`["age=70", "sex=F"]` as a dict of strings."""
    found: dict[str, str] = {}
    for pair in pairs or []:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise UsageError("--set name=value", repr(pair), "--set")
        found[name.strip()] = value.strip()
    return found


def emit(result: dict[str, Any], as_json: bool, lines: Callable[[dict[str, Any]], list[str]] | None = None) -> None:
    """Print a command's result: JSON on request, otherwise the lines that `lines` makes of it, or key: value."""
    if as_json:
        from engine.atomic import _plain

        print(json.dumps(result, allow_nan=False, default=_plain))
        return
    for line in lines(result) if lines else [f"{key}: {value}" for key, value in result.items()]:
        print(line)


def finding_lines(findings: list[dict[str, Any]]) -> list[str]:
    """A table of findings as text, one line each: name, value, interval, floor, n, verdict."""

    def number(x: float | None) -> str:
        return "n/a" if x is None else f"{x:.4g}"

    rows = []
    for finding in findings:
        line = f"{finding['name']:<28} {number(finding['value']):>10} {finding['unit']:<6}"
        if finding["interval"]:
            line += " [" + ", ".join(number(x) for x in finding["interval"]) + "]"
        if finding["floor"] is not None:
            line += f"  real vs real {number(finding['floor'])}"
        if finding["threshold"] is not None:
            line += f"  threshold {number(finding['threshold'])}"
        n = finding["n"]
        line += "  n " + (" ".join(f"{k}={v}" for k, v in n.items()) if isinstance(n, dict) else str(n))
        if finding["verdict"] != "none":
            line += f"  {finding['verdict'].upper()}"
        rows.append(line)
    return rows


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress]:
    """A callback `(what, done, total)`: a bar drawn with rich on a terminal, a plain line at every tenth elsewhere."""
    if quiet:
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        tasks: dict[str, Any] = {}
        with Bars(*columns, console=Console(stderr=True)) as bars:

            def draw(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total)
                bars.update(tasks[what], completed=done, total=total)

            yield draw
    else:
        shown: dict[str, int] = {}

        def say(what: str, done: int, total: int) -> None:
            tenth = 10 * done // max(total, 1)
            if done and tenth > shown.get(what, -1):
                shown[what] = tenth
                print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)

        yield say
