"""Plots of a report as SVG text, from the JSON-ready `figures` dicts of an evaluation or an audit.

Every function takes plain lists or arrays and returns one `<svg>` element: text stays text, colours are the same for
the same thing in every plot and can be told apart with any kind of colour vision (Okabe and Ito), lines differ in
dash as well as in colour, and the same input gives the same bytes. A montage is the one picture that is not a
drawing: PNG.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

REAL, SYNTHETIC, ALERT, GOOD, OTHER, QUIET = "#0072B2", "#D55E00", "#CC79A7", "#009E73", "#B8860B", "#7A7A7A"
_COLOURS = {"real": REAL, "real, unseen": REAL, "synthetic": SYNTHETIC, "fresh_real": GOOD, "truth": REAL}
_FURTHER = [ALERT, OTHER, "#56B4E9", QUIET]
_DASHES = ["-", "--", "-.", ":"]
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "engine",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
WIDTH, HEIGHT = 4.6, 3.2  # inches; drawings scale to their column
TILES = 4  # of a slice slider side by side: on a telephone they can still be judged


def pca(figure: Mapping[str, Any]) -> str:
    """Scatter of the first two principal components.

    Args:
        figure: "real" and "synthetic" (n, 2) with optional "group" (of the real rows, beside "synthetic_group", or
            {"real": ..., "synthetic": ...}) and "variance" (shares of the two components).
    """
    present = [name for name in ("real", "synthetic") if name in figure]
    sides = {name: np.asarray(figure[name], dtype=float).reshape(-1, 2) for name in present}
    groups = figure.get("group") or {}
    if not isinstance(groups, Mapping):
        groups = {"real": groups, "synthetic": figure.get("synthetic_group")}
    known = sorted({str(g) for labels in groups.values() if labels is not None for g in labels})
    with plt.rc_context(_RC):
        drawing, axis = _axes(_component(1, figure.get("variance")), _component(2, figure.get("variance")))
        for name, xy in sides.items():
            labels, marker = groups.get(name), "o" if name == "real" else "^"
            if len(known) > 1 and labels is not None and len(labels) == len(xy):
                for j, group in enumerate(known):
                    inside = np.asarray([str(g) for g in labels]) == group
                    _dots(axis, xy[inside], _palette(j), f"{group}, {name}", marker, hollow=name == "synthetic")
            else:
                colour = ALERT if known else _COLOURS[name]  # groups have the other colours
                _dots(axis, xy, colour, f"{name} (n = {len(xy)})", marker, hollow=name == "synthetic")
        columns = len(sides) if len(known) > 1 else 1
        drawing.legend(markerscale=1.5, loc="outside upper center", ncols=columns, columnspacing=1.2)
        return _svg(drawing)


def ld_decay(figure: Mapping[str, Any]) -> str:
    """Mean r2 of pairs of sites against their distance; "distance_bp", "real", "synthetic"."""
    with plt.rc_context(_RC):
        drawing, axis = _axes("distance between sites (kb)", "mean r²")
        distance_kb = np.asarray(figure["distance_bp"], dtype=float) / 1000
        for i, name in enumerate(n for n in ("real", "synthetic", "floor") if n in figure):
            values = np.asarray(figure[name], dtype=float)
            axis.plot(distance_kb, values, _DASHES[i], color=_COLOURS.get(name, QUIET), label=name, marker=".", lw=1.8)
        if len(distance_kb) > 2 and distance_kb.min() > 0:
            _log(axis, "x")
        axis.set_ylim(bottom=0)
        axis.legend()
        return _svg(drawing)


def af(figure: Mapping[str, Any]) -> str:
    """Allele frequency of every site, real against synthetic; at most 4,000 sites are drawn, evenly spaced."""
    real, synthetic = np.asarray(figure["real"], dtype=float), np.asarray(figure["synthetic"], dtype=float)
    labels = {"x_label": "allele frequency, real", "y_label": "allele frequency, synthetic"}
    return scatter({"x": real, "y": synthetic, **labels, "identity": 1})


def sfs(figure: Mapping[str, Any]) -> str:
    """Site-frequency spectrum: share of sites in each bin of allele frequency.

    Args:
        figure: "real", "synthetic", and "edges" or "frequency" (bin centres); without either, bins span 0 to 1.
    """
    real = np.asarray(figure["real"], dtype=float)
    edges = figure.get("edges")
    if edges is None:
        edges = np.linspace(0, 1, len(real) + 1) if "frequency" not in figure else _edges(figure["frequency"])
    return histogram(
        {
            "edges": edges,
            "shares": {name: figure[name] for name in ("real", "synthetic") if name in figure},
            "x_label": "allele frequency",
            "y_label": "share of sites",
            "log": True,
        }
    )


def histogram(figure: Mapping[str, Any]) -> str:
    """Step histograms on common edges.

    Args:
        figure: "edges" (b + 1), "shares" {name: (b,)} (counts are turned into shares), "x_label", "y_label", "log"
            (logarithmic shares), "x_log", "threshold", "bins" (a word under each bin instead of numbers). {"edges",
            "real", "synthetic"} works too.
    """
    edges = np.asarray(figure["edges"], dtype=float)
    shares = figure.get("shares") or {n: figure[n] for n in ("real", "synthetic", "floor") if n in figure}
    with plt.rc_context(_RC):
        drawing, axis = _axes(str(figure.get("x_label", "value")), str(figure.get("y_label", "share")))
        for i, (name, values) in enumerate(shares.items()):
            height = np.asarray(values, dtype=float)
            height = height / height.sum() if height.sum() > 0 else height
            colour = _COLOURS.get(name, _FURTHER[i % len(_FURTHER)])
            axis.stairs(height, edges, color=colour, lw=1.8, ls=_DASHES[i % 4], label=name.replace("_", " "))
            if name in ("real", "real, unseen"):
                axis.stairs(height, edges, color=colour, alpha=0.15, fill=True)
        if figure.get("threshold") is not None:
            axis.axvline(float(figure["threshold"]), color=QUIET, ls=":", lw=1.4)
            place = (float(figure["threshold"]), 0.98)
            axis.annotate("threshold", place, xycoords=("data", "axes fraction"), fontsize=8)
        for which, wanted in (("x", "x_log"), ("y", "log")):
            if figure.get(wanted):
                _log(axis, which)
        if figure.get("bins"):
            middle = (edges[1:] + edges[:-1]) / 2
            axis.set_xticks(middle, [str(word) for word in figure["bins"]], rotation=40 if len(middle) > 6 else 0)
        axis.legend()
        return _svg(drawing)


def rho(figure: Mapping[str, Any]) -> str:
    """Distance ratios of unseen real people, synthetic people and controls; the outermost bins hold what lies
    beyond.
    """
    return histogram({**figure, "y_label": figure.get("y_label", "share of people")})


def roc(figure: Mapping[str, Any]) -> str:
    """ROC on log-log axes, one curve a set; the diagonal is guessing.

    Args:
        figure: "curves" {name: {"fpr", "tpr", "auc"}}, or these alone; with "curves" also "x_label".
    """
    curves = figure.get("curves", {k: v for k, v in figure.items() if isinstance(v, Mapping)})
    with plt.rc_context(_RC):
        x_label = str(figure.get("x_label", "false-positive rate (unseen real people flagged)"))
        drawing, axis = _axes(x_label, "true-positive rate")
        low = 1e-3
        axis.plot([low, 1], [low, 1], color=QUIET, lw=1, ls=":")
        for i, (name, curve) in enumerate(sorted(curves.items(), key=lambda item: item[0] != "synthetic")):
            colour = _COLOURS.get(name, _FURTHER[i % len(_FURTHER)])
            fpr, tpr = np.clip(curve["fpr"], low, 1), np.clip(curve["tpr"], low, 1)
            label = f"{name.replace('_', ' ')} (AUC {curve['auc']:.2f})"
            axis.plot(fpr, tpr, color=colour, ls=_DASHES[i % 4], lw=1.8, label=label, drawstyle="steps-post")
        _log(axis, "x")
        _log(axis, "y")
        axis.set(xlim=(low, 1), ylim=(low, 1.1))
        drawing.legend(loc="outside upper center", ncols=2, columnspacing=1.2)  # curves may lie anywhere
        return _svg(drawing)


def scatter(figure: Mapping[str, Any]) -> str:
    """Points with optional fit lines.

    Args:
        figure: "x", "y"; or "series" {name: {"x", "y"}} for several sets. Optional "x_label", "y_label", "identity"
            (draws y = x up to this value) and "lines" {name: {"slope", "intercept"}}.
    """
    series = figure.get("series") or {"": {"x": figure["x"], "y": figure["y"]}}
    with plt.rc_context(_RC):
        drawing, axis = _axes(str(figure.get("x_label", "x")), str(figure.get("y_label", "y")))
        every_x = np.concatenate([np.asarray(s["x"], dtype=float).ravel() for s in series.values()])
        for i, (name, points) in enumerate(series.items()):
            xy = np.column_stack([np.asarray(points[key], dtype=float).ravel() for key in ("x", "y")])
            _dots(axis, xy, _COLOURS.get(name, SYNTHETIC if not name else _palette(i)), name, "o^sD"[i % 4])
        if figure.get("identity"):
            top = float(figure["identity"])
            axis.plot([0, top], [0, top], color=QUIET, lw=1, ls=":")
        for i, (name, line) in enumerate((figure.get("lines") or {}).items()):
            x = np.array([every_x.min(), every_x.max()])
            colour = _COLOURS.get(name, _palette(i))
            y = line["intercept"] + line["slope"] * x
            axis.plot(x, y, color=colour, ls=_DASHES[i % 4], lw=2, label=f"{name}, fit")
        if axis.get_legend_handles_labels()[1]:
            axis.legend(markerscale=1.6)
        return _svg(drawing)


def montage_png(tiles: NDArray[np.uint8], *, columns: int | None = None, gap: int = 2, enlarge: bool = True) -> bytes:
    """Grey tiles side by side as one PNG.

    Args:
        tiles: uint8 (n, h, w), or (rows, columns, h, w), whose layout is kept.
        columns: of a flat list; near a square where None.
        gap: pixels between tiles, in middle grey.
        enlarge: repeat pixels until the sheet is about 1,000 wide, so that small volumes are seen as they are.
    """
    from PIL import Image

    tiles = np.asarray(tiles)
    if tiles.dtype != np.uint8 or tiles.ndim not in (3, 4) or tiles.size == 0:
        raise ValueError(f"montage takes uint8 (n, h, w) or (rows, columns, h, w), got {tiles.dtype} {tiles.shape}")
    if tiles.ndim == 3:
        columns = columns or int(np.ceil(np.sqrt(len(tiles))))
        short = -len(tiles) % columns
        filler = np.full((short, *tiles.shape[1:]), 128, np.uint8)
        tiles = np.concatenate([tiles, filler]).reshape(-1, columns, *tiles.shape[1:])
    rows, across, h, w = tiles.shape
    sheet = np.full((rows * (h + gap) - gap, across * (w + gap) - gap), 128, np.uint8)
    for r in range(rows):
        for c in range(across):
            sheet[r * (h + gap) : r * (h + gap) + h, c * (w + gap) : c * (w + gap) + w] = tiles[r, c]
    scale = max(1, 1000 // sheet.shape[1]) if enlarge else 1  # whole pixels
    sheet = sheet.repeat(scale, 0).repeat(scale, 1)
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def montage(tiles: NDArray[np.uint8], **layout: Any) -> str:
    """`montage_png` as a data URI for the `src` of an image."""
    return "data:image/png;base64," + base64.b64encode(montage_png(tiles, **layout)).decode()


def stack(figure: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Frames of a slice slider: for each slice, groups of at most four tiles, each with one strip a row.

    Args:
        figure: "rows" {label: uint8 (n, s, h, w)}, n volumes of s slices, equal in all rows; "columns", n words over the
            tiles; "plane", what a slice is called.

    Returns:
        [{"name": "axial slice 3 of 12", "groups": [{"columns", "percent", "strips": [{"label", "image"}]}]}], images as
        data URIs, one pixel a voxel; percent is the share of the full width that a group's tiles take.

    Raises:
        ValueError: rows of different shapes, or not uint8 (n, s, h, w).
    """
    rows = {name: np.asarray(tiles) for name, tiles in figure["rows"].items()}
    shapes = {tiles.shape for tiles in rows.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 4 or any(t.dtype != np.uint8 for t in rows.values()):
        raise ValueError("a slice slider takes rows of uint8 (n, s, h, w), all of one shape")
    count, slices = shape[:2]
    words = list(figure.get("columns") or [])
    plane = str(figure.get("plane", ""))
    frames = []
    for k in range(slices):
        groups = []
        for start in range(0, count, TILES):
            few = slice(start, min(start + TILES, count))
            strips = []
            for label, tiles in rows.items():
                image = montage(tiles[few, k], columns=few.stop - few.start, enlarge=False)
                strips.append({"label": label, "image": image})
            percent = 100 * (few.stop - few.start) // TILES  # so that tiles are of one size in all groups
            groups.append({"columns": words[few] if words else [], "strips": strips, "percent": percent})
        frames.append({"name": f"{plane} slice {k + 1} of {slices}".strip(), "groups": groups})
    return frames


def dots(figure: Mapping[str, Any]) -> str:
    """Values with intervals, one a line, beside the same measure on real people.

    Args:
        figure: "names", "synthetic" (n), "interval" (n pairs or None), "floor" (n numbers or None), "x_label".
    """
    names = [str(name) for name in figure["names"]]
    row = np.arange(len(names))
    with plt.rc_context(_RC):
        drawing, axis = _axes(str(figure.get("x_label", "value")), "")
        for k, interval in enumerate(figure.get("interval") or []):
            if interval is not None:
                axis.plot(interval, [k, k], color=SYNTHETIC, lw=2.2, solid_capstyle="butt")
        axis.plot(figure["synthetic"], row, "o", color=SYNTHETIC, ms=7, label="synthetic, 95 % interval")
        floor = [np.nan if x is None else float(x) for x in figure.get("floor") or [None] * len(names)]
        axis.plot(floor, row, "D", mfc="none", mec=REAL, mew=1.6, ms=8, label="unseen real people")
        axis.set(yticks=row, yticklabels=names, ylim=(len(names) - 0.5, -0.5), xlim=(0, None))
        drawing.legend(loc="outside upper center", ncols=2)
        return _svg(drawing)


def stretches(figure: Mapping[str, Any]) -> str:
    """Where each of some haplotypes equals another one, as bars along the sequence: a long bar is a long shared stretch.

    Args:
        figure: "labels" (n), "segments" (n lists of (start_bp, end_bp)), "span_bp" (first, last).
    """
    with plt.rc_context({**_RC, "axes.grid": False}):
        drawing, axis = _axes("position (Mb)", "")
        low, high = (float(x) / 1e6 for x in figure["span_bp"])
        labels = [str(text) for text in figure["labels"]]
        for row, segments in enumerate(figure["segments"]):
            bars = [(start / 1e6, (stop - start) / 1e6) for start, stop in segments]
            axis.broken_barh(bars, (row - 0.38, 0.76), facecolors=SYNTHETIC, linewidth=0)
        axis.set(xlim=(low, high), ylim=(len(labels) - 0.5, -0.5), yticks=range(len(labels)), yticklabels=labels)
        return _svg(drawing)


# ------------------------------------------------------------------------------------------------------------ parts


def graph(figure: Mapping[str, Any]) -> str:
    """Nodes joined by arrows, in columns.

    Args:
        figure: "nodes", dicts with name, x (column), y (row) and kind (column, genotype, scan, absence); "edges", lists
            of source, target and whether the arrow is broken.
    """
    nodes = {str(node["name"]): node for node in figure["nodes"]}
    tallest = {x: sum(n["x"] == x for n in nodes.values()) for x in {n["x"] for n in nodes.values()}}
    columns, rows = max(tallest, default=0) + 1, max(tallest.values(), default=1)
    place = {name: (1.9 * n["x"], -0.55 * (n["y"] + (rows - tallest[n["x"]]) / 2)) for name, n in nodes.items()}
    colours = {"column": REAL, "genotype": GOOD, "scan": SYNTHETIC, "absence": QUIET}
    with plt.rc_context(_RC):
        drawing = plt.figure(figsize=(max(WIDTH, 1.55 * columns), max(1.6, 0.42 * rows + 0.4)))
        axis = drawing.add_subplot()
        axis.set_axis_off()
        for source, target, broken in figure["edges"]:
            start, stop = place[source], place[target]
            style = {"arrowstyle": "-|>", "color": QUIET, "linewidth": 0.8, "linestyle": ":" if broken else "-"}
            bend = f"arc3,rad={0.25 if start[0] == stop[0] else 0.05}"
            axis.annotate("", stop, start, arrowprops={**style, "connectionstyle": bend, "shrinkA": 16, "shrinkB": 18})
        for name, node in nodes.items():
            box = {
                "boxstyle": "round,pad=0.3",
                "facecolor": "white",
                "edgecolor": colours[node["kind"]],
                "linewidth": 1.2,
            }
            axis.text(*place[name], name, ha="center", va="center", fontsize=8, color="#1a1a1a", bbox=box)
        axis.set_xlim(-0.9, 1.9 * (columns - 1) + 0.9)
        axis.set_ylim(-0.55 * (rows - 1) - 0.5, 0.5)
    return _svg(drawing)


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    drawing, axis = plt.subplots(figsize=(WIDTH, HEIGHT))
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    return drawing, axis


def _log(axis: Axes, which: str) -> None:
    """Logarithmic axis with plain numbers: raised exponents are too small to read on a telephone."""
    side = axis.xaxis if which == "x" else axis.yaxis
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    side.set_minor_formatter(NullFormatter())


def _dots(axis: Axes, xy: NDArray, colour: str, label: str, marker: str, hollow: bool = False) -> None:
    if len(xy) > 4000:  # a drawing of every point would weigh megabytes and show no more
        xy = xy[np.linspace(0, len(xy) - 1, 4000).astype(int)]
    size = 12 if len(xy) < 800 else 5
    shown = label.replace("_", " ") or None
    ink: dict[str, Any] = {"facecolors": colour, "linewidths": 0}
    if hollow:
        ink = {"facecolors": "none", "edgecolors": colour, "linewidths": 0.8}
    axis.scatter(xy[:, 0], xy[:, 1], s=size, marker=marker, alpha=0.6, label=shown, **ink)


def _palette(i: int) -> str:
    return [REAL, SYNTHETIC, GOOD, *_FURTHER][i % 7]


def _component(number: int, variance: Sequence[float] | None) -> str:
    share = f" ({variance[number - 1]:.1%} of variance)" if variance is not None and len(variance) >= number else ""
    return f"component {number}{share}"


def _edges(centres: Sequence[float]) -> NDArray[np.float64]:
    middle = np.asarray(centres, dtype=float)
    inner = (middle[1:] + middle[:-1]) / 2
    return np.concatenate([[2 * middle[0] - inner[0]], inner, [2 * middle[-1] - inner[-1]]])


def _svg(drawing: Figure) -> str:
    """The drawing as one `<svg>` element whose ink follows the page's text colour, so that it is right on a dark
    page.
    """
    stream = io.StringIO()
    drawing.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(drawing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1, flags=re.S)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1, flags=re.S)
    text = re.sub(r"(stroke|fill): ?#(000000|b0b0b0|cccccc)\b", r"\1: currentColor", text)
    return text.replace('<text style="', '<text fill="currentColor" style="').rstrip()
