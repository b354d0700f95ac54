"""Plots of the report as SVG text: ratios to peers at a glance, one case over the runs, one scaling curve.

Ink follows the page's text colour; contestants differ in marker and dash as well as in colour (Okabe and Ito). The same
records give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from perf.record import Fit, Record, Spread
from perf.words import duration

OURS, GOAL = "#0072B2", "#D55E00"
_PEERS = ("#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#7A7A7A")
_MARKS, _DASHES = "s^Dv<>", ("--", "-.", ":")
_RC: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "engine", "font.family": "sans-serif", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6,
    "legend.frameon": False, "legend.fontsize": 9, "figure.constrained_layout.use": True, "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip
RUNS_SHOWN = 24


def ratios(rows: Sequence[tuple[str, Spread, float | None, bool]]) -> str:
    """Dot plot of (label, ratio, goal, sound): p50 with p20 to p80, the goal as a tick, 1 = equal speed as a line; log
    axis. The dot is hollow where the ratio is not sound."""
    with plt.rc_context(_RC):
        drawing, axis = plt.subplots(figsize=(9.2, 0.9 + 0.27 * len(rows)))
        for y, (_, ratio, goal, sound) in enumerate(rows):
            axis.plot([ratio.p20, ratio.p80], [y, y], color=OURS, linewidth=2, solid_capstyle="butt")
            axis.plot([ratio.p50], [y], "o", color=OURS, markersize=6, markerfacecolor=OURS if sound else "none")
            if goal is not None:
                axis.plot([goal], [y], "|", color=GOAL, markersize=13, markeredgewidth=2)
        axis.axvline(1, color="#000000", linewidth=1)
        _log(axis, "x", lambda value: f"{value:g}")
        axis.set_yticks(range(len(rows)), [label for label, *_ in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("times as fast")
        return _svg(drawing)


def over_runs(records: Sequence[Record], runs: Sequence[str]) -> str:
    """Seconds of one case, and of its peers, against the runs in order of time; bars from p20 to p80, log axis."""
    place = {run: x for x, run in enumerate(runs)}
    peers = list(dict.fromkeys(peer.name for record in records for peer in record.peers if peer.seconds))
    with plt.rc_context(_RC):
        columns = 2 if max(map(len, peers), default=0) < 22 else 1
        drawing, axis = plt.subplots(figsize=(4.6, 2.7 + 0.2 * math.ceil((len(peers) + 1) / columns)))
        for k, name in enumerate(peers):
            points = [(place[r.run], p.seconds) for r in records for p in r.peers if p.name == name and p.seconds]
            _series(axis, points, name, _PEERS[k % len(_PEERS)], _MARKS[k % len(_MARKS)], _DASHES[k % len(_DASHES)])
        _series(axis, [(place[r.run], r.seconds) for r in records if r.seconds], "ours", OURS, "o", "-")
        _log(axis, "y", duration)
        labels = [run.split("-", 1)[1] for run in runs]
        step = math.ceil(len(runs) / 8)
        axis.set_xticks(range(0, len(runs), step), labels[::step], rotation=0 if len(runs) <= 4 else 35)
        axis.set_xlim(-0.5, len(runs) - 0.5)
        axis.grid(axis="x", visible=False)
        if peers:
            drawing.legend(loc="outside upper center", ncols=columns, columnspacing=1.2)
        return _svg(drawing)


def scaling(points: Sequence[Record], fit: Fit) -> str:
    """Seconds against size on log axes, with the fitted power through their middle."""
    size = np.array([point.size[fit.axis] for point in points], dtype=float)
    middle = np.array([point.seconds.p50 for point in points if point.seconds])
    with plt.rc_context(_RC):
        drawing, axis = plt.subplots(figsize=(4.6, 3.0))
        centre = np.exp(np.log(size).mean()), np.exp(np.log(middle).mean())
        ends = np.array([size.min(), size.max()])
        axis.plot(
            ends,
            centre[1] * (ends / centre[0]) ** fit.exponent,
            "--",
            color=GOAL,
            label=f"~ {fit.axis}^{fit.exponent:.2f}",
        )
        _series(axis, [(x, p.seconds) for x, p in zip(size, points, strict=True) if p.seconds], "ours", OURS, "o", "")
        _log(axis, "x", lambda value: f"{value:g}")
        _log(axis, "y", duration)
        axis.set_xlabel(fit.axis)
        drawing.legend(loc="outside upper center", ncols=2)
        return _svg(drawing)


def _series(axis: Axes, points: Sequence[tuple[float, Spread]], label: str, colour: str, mark: str, dash: str) -> None:
    x = [place for place, _ in points]
    middle = np.array([spread.p50 for _, spread in points])
    bars = np.array([[s.p50 - s.p20 for _, s in points], [s.p80 - s.p50 for _, s in points]])
    axis.errorbar(
        x,
        middle,
        yerr=bars,
        color=colour,
        marker=mark,
        linestyle=dash or "none",
        markersize=5,
        linewidth=1.3,
        label=label,
    )


def _log(axis: Axes, which: str, words: Any) -> None:
    """Logarithmic axis labelled in plain words, the more densely the shorter it is."""
    side = axis.xaxis if which == "x" else axis.yaxis
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    low, high = axis.get_xlim() if which == "x" else axis.get_ylim()
    decades = math.log10(high / low)
    if decades < 0.4:  # a flat line: zooming into its noise would draw a mountain
        middle = math.sqrt(low * high)
        (axis.set_xlim if which == "x" else axis.set_ylim)(middle / 1.8, middle * 1.8)
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
    side.set_major_locator(LogLocator(subs=steps))
    side.set_minor_locator(NullLocator())
    side.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    side.set_minor_formatter(NullFormatter())


def _svg(drawing: Figure) -> str:
    """One `<svg>` element without size of its own, black turned into the page's text colour."""
    stream = io.StringIO()
    drawing.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(drawing)
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1, flags=re.S)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1, flags=re.S)
    text = re.sub(r"(stroke|fill): ?#(000000|b0b0b0|cccccc)\b", r"\1: currentColor", text)
    return text.replace('<text style="', '<text fill="currentColor" style="').rstrip()
