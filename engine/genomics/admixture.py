"""Admixed people: mosaics of ancestry tracts, each tract a mosaic of haplotypes of its source group.

The pulse model (Gravel, Genetics 191:607, 2012): G generations ago the population was founded by sources in given
shares; later pulses may have replaced part of it. Followed back, a haplotype is broken by recombination at rate 1 per
Morgan and generation for as long as its ancestors lived in the population: g_j generations where it came in with pulse
j. A break t generations ago lets the further past be drawn anew among the pulses older than t, as each is met. With one
pulse that is: breaks at rate G per Morgan, the source drawn anew at each by its share; so tracts of a source with share
p, neighbours joined, are exponential with rate G (1 - p) per Morgan. Contigs are independent, people mate at random,
and drift within the admixed population is left out.

Inside a tract the copying model of the source group holds (`LiStephens.paths`), started anew at every break: whoever is
copied after a break is independent of whoever was copied before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from engine import seeding
from engine.errors import UsageError, closest
from engine.genomics.li_stephens import LiStephens
from engine.genomics.local_ancestry import Tracts
from engine.genomics.paths import Paths

MOST_GENERATIONS = 10_000.0


@dataclass(frozen=True)
class Pulse:
    """Migrants that came `generations` ago: share of the population by source group; the oldest pulse is the whole of
    it."""

    generations: float
    share: dict[str, float]


def parse(text: str, generations: float | None) -> list[Pulse]:
    """One pulse from "AFR=0.8,EUR=0.2" and its generations, or several from a YAML file.

    The file holds `pulses`, a list of `generations` and `sources` (group: share).

    Raises:
        UsageError: text that is neither, or pulses that do not fit together (`checked`).
    """
    if text.endswith((".yaml", ".yml")):
        if generations is not None:
            raise UsageError("generations in the file, one for each pulse", "--generations too", text)
        try:
            values = yaml.safe_load(Path(text).read_text(encoding="utf-8"))
            listed = [(entry["generations"], entry["sources"]) for entry in values["pulses"]]
            return checked([Pulse(float(age), {str(k): float(v) for k, v in shares.items()}) for age, shares in listed])
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError("a YAML file", str(error).splitlines()[0], text) from None
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UsageError(
                "pulses: a list of {generations: number, sources: {GROUP: share}}", "something else", text
            ) from None
    share: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not name.strip() or not np.isfinite(number) or name.strip() in share:
            raise UsageError(
                "GROUP=share,GROUP=share, each group once", repr(text), "--admix", "--admix AFR=0.8,EUR=0.2"
            )
        share[name.strip()] = number
    if generations is None:
        raise UsageError("how many generations ago", "nothing", "--admix", "--generations 8")
    return checked([Pulse(float(generations), share)])


def checked(pulses: list[Pulse]) -> list[Pulse]:
    """The pulses, the oldest first.

    Raises:
        UsageError: no pulse, two at one time, generations outside (0, 10,000], shares that are negative or, of the
            oldest pulse, do not sum to 1, of a later one, to something in (0, 1).
    """
    made = sorted(pulses, key=lambda pulse: -pulse.generations)
    ages = [pulse.generations for pulse in made]
    if not made or len(set(ages)) != len(ages) or not all(0 < age <= MOST_GENERATIONS for age in ages):
        raise UsageError(f"pulses at different times of 0 to {MOST_GENERATIONS:g} generations", f"{ages}", "admixture")
    for at, pulse in enumerate(made):
        total = sum(pulse.share.values())
        if min(pulse.share.values(), default=-1.0) < 0:
            raise UsageError("shares of at least 0", f"{pulse.share}", "admixture")
        if at == 0 and abs(total - 1) > 1e-6:
            raise UsageError("shares of the oldest pulse that sum to 1", f"{total:g}", "admixture")
        if at > 0 and not 0 < total < 1:
            raise UsageError("shares of a later pulse that sum to something between 0 and 1", f"{total:g}", "admixture")
    return made


def label(pulses: list[Pulse]) -> str:
    """Name of the admixed group: its sources, joined by "+"."""
    return "+".join(dict.fromkeys(name for pulse in pulses for name in pulse.share))


def contig_starts_cm(model: LiStephens) -> np.ndarray:
    """float64 (C,): genetic position at which each contig's tracts begin, its first site."""
    return model.sites.centimorgans()[np.flatnonzero(np.isinf(model.distance_l))]


def paths(
    model: LiStephens,
    pulses: list[Pulse],
    n: int,
    *,
    seed: int = 0,
    start: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Paths, Tracts]:
    """Copying paths and ancestry tracts of admixed people start .. start+n-1, two haplotypes each.

    Person k's depend on the model, the pulses, `seed` and k.

    Raises:
        UsageError: a source that is no group of the model, or n or start below 0.
    """
    pulses = checked(pulses)
    sources = list(dict.fromkeys(name for pulse in pulses for name in pulse.share))
    for name in sources:
        if name not in model.group_names:
            raise UsageError("a group of the model", f"'{name}'", "admixture", closest(name, model.group_names))
    tracts = _tracts(model, pulses, sources, n, seed, start)
    parts: list[Paths] = []
    for at, name in enumerate(sources):
        # what a source's path does while another source rules is never seen: each runs along the whole genome
        own = seeding.derived_seed(seed, f"genomics.admixture.source.{name}")
        parts.append(model.paths(n, groups=name, seed=own, start=start)[0])
        if progress is not None:
            progress(at + 1, len(sources) + 1)
    donors = [np.flatnonzero(model.group_of_haplotype_k == model.group_index(name)) for name in sources]
    made = _spliced(parts, tracts, donors, model.n_sites, seed, start)
    if progress is not None:
        progress(len(sources) + 1, len(sources) + 1)
    return made, tracts


def _tracts(model: LiStephens, pulses: list[Pulse], sources: list[str], n: int, seed: int, start: int) -> Tracts:
    """The tracts of 2n haplotypes by the pulse model."""
    cm_l, bp_l = model.sites.centimorgans(), model.sites.position_bp
    first_c = np.flatnonzero(np.isinf(model.distance_l))
    stop_c = np.append(first_c[1:], model.n_sites)
    contigs = [str(name) for name in model.sites.contig[first_c]]
    length_c = [model.contig_length.get(name, 0) for name in contigs]
    age_j = np.array([pulse.generations for pulse in pulses])
    total_j = np.array([sum(pulse.share.values()) for pulse in pulses])
    # chance of coming in with pulse j: it was met, and no younger one took the line first
    weight_j = total_j * np.append(np.cumprod((1 - total_j)[::-1])[::-1][1:], 1.0)
    share_ja = np.array([[pulse.share.get(name, 0.0) for name in sources] for pulse in pulses])
    cumulative_ja = np.cumsum(share_ja, axis=1) / share_ja.sum(axis=1, keepdims=True)
    offsets, columns = [0], ([], [], [], [], [])  # type: ignore[var-annotated]
    for person in range(start, start + n):
        rng = seeding.generator(seed, "genomics.admixture.tracts", person)
        for _ in (0, 1):
            count = 0
            for c, (first, stop) in enumerate(zip(first_c.tolist(), stop_c.tolist())):
                breaks_cm, source = _one(cm_l[first], cm_l[stop - 1], age_j, weight_j, cumulative_ja, rng)
                site = first + np.searchsorted(cm_l[first:stop], breaks_cm, side="right")
                # a break lies between the sites on its two sides; its place in bp is read off the straight line there
                bp = np.floor(np.interp(breaks_cm, cm_l[first:stop], bp_l[first:stop])).astype(np.int64)
                bp = np.clip(bp, bp_l[np.maximum(site - 1, first)], bp_l[np.minimum(site, stop - 1)] - 1)
                columns[0].append(source)
                columns[1].append(np.full(len(source), c))
                columns[2].append(np.append(bp, max(int(bp_l[stop - 1]), length_c[c])))
                columns[3].append(np.append(breaks_cm, cm_l[stop - 1]))
                columns[4].append(np.concatenate([[first], site]))
                count += len(source)
            offsets.append(offsets[-1] + count)
    join = lambda parts, kind: np.concatenate(parts).astype(kind) if parts else np.zeros(0, dtype=kind)  # noqa: E731
    return Tracts(
        sources, contigs, np.array(offsets, dtype=np.int64), join(columns[0], np.int32), join(columns[1], np.int32),
        join(columns[2], np.int64), join(columns[3], np.float64), join(columns[4], np.int64),
    )  # fmt: skip


def _one(
    first_cm: float, last_cm: float, age_j: np.ndarray, weight_j: np.ndarray, cumulative_ja: np.ndarray, rng: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Breaks in cM, rising, and the sources of the tracts between them, of one contig of one haplotype.

    Breaks are drawn at the rate of the oldest pulse; one that is older than the line's own pulse is none.
    """
    oldest = float(age_j[0])
    count = rng.poisson(max(0.0, last_cm - first_cm) / 100 * oldest)
    at_cm = np.sort(first_cm + rng.random(count) * (last_cm - first_cm))
    age, pick, which = rng.random(count) * oldest, rng.random(count + 1), rng.random(count + 1)
    if len(age_j) == 1:
        return at_cm, np.searchsorted(cumulative_ja[0], which, side="right").clip(max=cumulative_ja.shape[1] - 1)
    total = np.cumsum(weight_j)  # the oldest pulse first
    pulse = int(np.searchsorted(total, pick[0] * total[-1], side="right"))
    kept, pulses = [], [pulse]
    for k in range(count):
        if age[k] >= age_j[pulse]:
            continue
        older = int((age_j > age[k]).sum())  # pulses 0 .. older-1 came before the break
        pulse = int(np.searchsorted(total[:older], pick[k + 1] * total[older - 1], side="right"))
        kept.append(k)
        pulses.append(pulse)
    which = which[np.concatenate([[0], np.array(kept, dtype=np.int64) + 1])]
    source = np.array([np.searchsorted(cumulative_ja[j], u, side="right") for j, u in zip(pulses, which)])
    return at_cm[kept], source.clip(max=cumulative_ja.shape[1] - 1)


def _spliced(
    parts: list[Paths], tracts: Tracts, donors: list[np.ndarray], n_sites: int, seed: int, start: int
) -> Paths:
    """Each tract's stretch of its source's path; a segment that runs on from the source's last tract gets a new
    donor."""
    starts: list[np.ndarray] = []
    redrawn: list[np.ndarray] = []
    segment_at: list[np.ndarray] = []
    flip_at: list[np.ndarray] = []
    segment_offset, flip_offset = [0], [0]
    shift_segment = np.cumsum([0, *(len(part.segment_start_s) for part in parts)])
    shift_flip = np.cumsum([0, *(len(part.flip_site_f) for part in parts)])
    for n in range(tracts.n_haplotypes):
        if n % 2 == 0:
            rng = seeding.generator(seed, "genomics.admixture.restart", start + n // 2)
        own = slice(tracts.offset_n[n], tracts.offset_n[n + 1])
        begin_t = tracts.start_site_t[own]
        end_t = np.append(begin_t[1:], n_sites)
        last_used = dict.fromkeys(range(len(parts)), -1)
        segments = flips = 0
        for begin, end, source in zip(begin_t.tolist(), end_t.tolist(), tracts.source_t[own].tolist()):
            if begin == end:
                continue
            part = parts[source]
            low, high = int(part.segment_offset_n[n]), int(part.segment_offset_n[n + 1])
            of_path = part.segment_start_s[low:high]
            first = low + int(np.searchsorted(of_path, begin, side="right")) - 1
            stop = low + int(np.searchsorted(of_path, end, side="left"))
            starts.append(np.maximum(part.segment_start_s[first:stop], begin))
            segment_at.append(np.arange(first, stop) + shift_segment[source])
            donor = np.full(stop - first, -1, dtype=np.int64)
            if first == last_used[source]:
                donor[0] = donors[source][rng.integers(0, len(donors[source]))]
            redrawn.append(donor)
            last_used[source] = stop - 1
            segments += stop - first
            low, high = int(part.flip_offset_n[n]), int(part.flip_offset_n[n + 1])
            inside = low + np.searchsorted(part.flip_site_f[low:high], [begin, end], side="left")
            flip_at.append(np.arange(inside[0], inside[1]) + shift_flip[source])
            flips += int(inside[1] - inside[0])
        segment_offset.append(segment_offset[-1] + segments)
        flip_offset.append(flip_offset[-1] + flips)
    empty = np.zeros(0, dtype=np.int64)
    segment_index, flip_index = np.concatenate([empty, *segment_at]), np.concatenate([empty, *flip_at])
    donor_s = np.concatenate([empty, *redrawn])
    copied_s = np.concatenate([part.segment_donor_s for part in parts])[segment_index]
    return Paths(
        np.array(segment_offset, dtype=np.int64), np.concatenate([empty, *starts]),
        np.where(donor_s >= 0, donor_s, copied_s).astype(np.int32), np.array(flip_offset, dtype=np.int64),
        np.concatenate([part.flip_site_f for part in parts])[flip_index],
    )  # fmt: skip
