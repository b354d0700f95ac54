"""Figures in words: quantities with a prefix, times with a unit, a record on one line. Used by the terminal and the report."""

from __future__ import annotations

from perf.record import PeerRecord, Record


def limits_in_words(limits: dict[str, float | None]) -> str:
    return ", ".join(
        f"{name} {quantity(value, 'B' if name == 'copy' else '')}/s" for name, value in limits.items() if value
    )


def quantity(value: float, unit: str) -> str:
    """Three digits and a prefix: 1.49e8 "pairs" -> "149 Mpairs"; a small one as it is."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def in_words(record: Record) -> str:
    """A record on one line of the terminal."""
    if record.status != "ok":
        return f"{record.key}: {record.status}: {record.why}"
    if record.fit is not None:
        fit = record.fit
        return f"{record.key}: cost ~ {fit.axis}^{fit.exponent:.2f} ({fit.low:.2f} to {fit.high:.2f}, {len(fit.points)} sizes)"
    parts = []
    if record.seconds and record.rate:
        low, high = duration(record.seconds.p20), duration(record.seconds.p80)
        parts.append(f"{duration(record.seconds.p50)} ({low} to {high})")
        parts.append(f"{quantity(record.rate.p50, record.unit or '')}/s")
    parts += [shares(record)] if shares(record) else []
    parts += [peer_in_words(peer) for peer in record.peers]
    return f"{record.key}: " + ", ".join(parts)


def shares(record: Record) -> str:
    """ "87% of popcount, 12% of copy", as far as floors were given."""
    parts = {record.limit: record.limit_share, "copy": record.copy_share}
    return ", ".join(f"{100 * share:.2g}% of {name}" for name, share in parts.items() if share is not None)


def peer_in_words(peer: PeerRecord) -> str:
    """A peer's ratio, goal and whether met, or why there is none."""
    if peer.ratio is None:
        return f"{peer.name} {peer.status}: {peer.why}"
    goal = "" if peer.goal is None else f", goal {peer.goal:g} {'met' if peer.met else 'NOT met'}"
    differs = f" DIFFERS: {peer.why}" if peer.status == "differs" else ""
    return f"{peer.name} x{peer.ratio.p50:.3g} ({peer.ratio.p20:.3g} to {peer.ratio.p80:.3g}{goal}){differs}"
