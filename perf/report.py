"""`perf report`: what the history says, as a table in the terminal, one self-contained page, or the table of the README.

A figure is shown with the record it comes from, a failure as a row. Of every case the latest record of the machine counts;
figures of several machines are never put in one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perf.record import PeerRecord, Record
from perf.words import duration, in_words, limits_in_words, peer_in_words, quantity, shares


def machines(records: Sequence[Record]) -> list[str]:
    """Names of the machines, the one of the latest run first."""
    latest = {record.machine["name"]: record.time for record in records}
    return sorted(latest, key=lambda name: latest[name], reverse=True)


def latest(records: Sequence[Record], kinds: tuple[str, ...] = ("case",), curves: bool = False) -> list[Record]:
    """The last record of every key, by room and name; points of curves only if asked for. One that was not run for want
    of time does not replace one that was."""
    last: dict[str, Record] = {}
    for record in records:
        if record.kind not in kinds or (record.kind == "case" and (record.curve is not None) != curves):
            continue
        before = last.get(record.key)
        if record.status == "not run" and before is not None and before.status != "not run":
            continue
        last[record.key] = record
    return sorted(last.values(), key=lambda record: (record.case, record.threads, sorted(record.size.items())))


def size_in_words(record: Record) -> str:
    sizes = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in record.size.items())
    return sizes + (f"; {record.threads} threads" if record.threads > 1 else "")


def table(records: Sequence[Record]) -> Any:
    """Rich table of the latest records of one machine."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(
        "case",
        "ours: p50 (p20 to p80)",
        "peers: times as fast",
        "record",
        box=None,
        padding=(0, 1),
        collapse_padding=True,
    )
    made.columns[3].overflow = "fold"
    for record in latest(records):
        case = f"[bold]{record.case}[/]\n{size_in_words(record)}"
        if record.status != "ok" or record.seconds is None or record.rate is None:
            made.add_row(case, f"[red]{record.status}: {escape(record.why)}", "", record.id)
            continue
        low, middle, high = (duration(x) for x in (record.seconds.p20, record.seconds.p50, record.seconds.p80))
        ours = [f"{middle} ({low} to {high})", f"{quantity(record.rate.p50, record.unit or '')}/s", shares(record)]
        if record.peak_bytes:
            ours.append(f"peak {quantity(record.peak_bytes, 'B')}")
        peers = [f"[{_colour(peer)}]{escape(peer_in_words(peer))}[/]" for peer in record.peers]
        made.add_row(case, "\n".join(filter(None, ours)), "\n".join(peers), record.id)
    for record in latest(records, ("exponent",)):
        made.add_row(f"[bold]{record.case}[/]", escape(in_words(record).removeprefix(f"{record.key}: ")), "", record.id)
    return made


def _colour(peer: PeerRecord) -> str:
    return "red" if peer.met is False or peer.status == "differs" else "green" if peer.met else "default"


def readme(records: Sequence[Record]) -> str:
    """Markdown table of one machine's ratios that have a goal, and of those where a peer is ahead; with the record's id."""
    lines = [
        "| work | size | ours | peer | times as fast, p50 (p20 to p80) | goal | record |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in latest(records):
        if record.status != "ok" or record.rate is None:
            continue
        ours = f"{quantity(record.rate.p50, record.unit or '')}/s"
        for peer in record.peers:
            name = f"{peer.name} {peer.version}" if peer.version not in (None, "unknown") else peer.name
            if peer.ratio is None:
                ratio = f"{peer.status}: {peer.why}"
            else:
                ratio = f"{peer.ratio.p50:.3g} ({peer.ratio.p20:.3g} to {peer.ratio.p80:.3g})"
                ratio += "; results differ" if peer.status == "differs" else ""
            if peer.goal is None and (peer.ratio is None or peer.ratio.p50 >= 1):
                continue
            missed = ", not met" if peer.ratio is not None else ", not measured"
            goal = "" if peer.goal is None else f"{peer.goal:g}" + ("" if peer.met else missed)
            cells = (record.case, size_in_words(record), ours, name, ratio, goal, f"`{record.id}`")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def page(records: Sequence[Record]) -> str:
    """The whole history as one HTML page that needs nothing else: tables, plots over the runs, scaling."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "duration": duration, "quantity": quantity, "shares": shares, "size_in_words": size_in_words, "words": in_words,
    }  # fmt: skip
    houses = [_of_machine([r for r in records if r.machine["name"] == name]) for name in machines(records)]
    return environment.get_template("report.html.j2").render(machines=houses)


def _of_machine(records: Sequence[Record]) -> dict[str, Any]:
    """What the page shows of one machine."""
    from perf import plots

    runs = list(dict.fromkeys(record.run for record in records))[-plots.RUNS_SHOWN :]
    now = latest(records)
    rooms: dict[str, list[dict[str, Any]]] = {}
    for record in now:
        past = [r for r in records if r.key == record.key and r.run in runs and r.seconds and r.curve is None]
        drawing = plots.over_runs(past, runs) if past else ""
        rooms.setdefault(record.case.split(".")[0], []).append({"record": record, "plot": drawing})
    glance = []
    for record in now:
        for peer in record.peers:
            if peer.ratio is not None:
                label = f"{record.case} ({size_in_words(record)}) / {peer.name}"
                glance.append((label, peer.ratio, peer.goal, peer.status == "ok" and peer.met is not False))
    by_id = {record.id: record for record in records}
    curves = []
    for record in latest(records, ("exponent",)):
        drawing = plots.scaling([by_id[point] for point in record.fit.points], record.fit) if record.fit else ""
        curves.append({"record": record, "plot": drawing})
    limits = latest(records, ("limits",))
    return {
        "machine": records[-1].machine, "last": records[-1], "runs": len(dict.fromkeys(r.run for r in records)), "rooms": rooms,
        "glance": plots.ratios(glance) if glance else "", "curves": curves,
        "broken": [r for r in latest(records, ("file",)) if r.run == records[-1].run],
        "limits": [{"record": record, "words": limits_in_words(record.limits)} for record in limits],
    }  # fmt: skip
