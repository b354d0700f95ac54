"""How much of each donor went into a release: the table beside synthetic people, and the budget of a whole release.

Within one person `max_donor_cm` bounds what is copied from a donor, all pieces together (`interchange`: where it is used up
the donor is swapped for another one, and a donor with less than an eighth of it left is not taken again). Over a release the
interchange sampler copies each donor once everywhere per round, so n people cost every donor at most ceil(n / people of a
round) times the length of the genome: that is known before anything is drawn, and shards need not agree on more than n.
Alleles that one person alone carries are never copied; they are no part of this.

The table names donors by an index that the seed shuffles. It stays with the run: a release refuses to copy it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import atomic, seeding
from engine.errors import InputError, UsageError

if TYPE_CHECKING:
    from engine.genomics.held_paths import HeldPaths
    from engine.genomics.li_stephens import LiStephens

SUFFIX = "exposure.tsv"
_COLUMNS = ("donor", "group", "copied_cm", "people", "most_in_one_person_cm", "longest_piece_cm")


@dataclass(frozen=True)
class Exposure:
    """Of each donor, (K,): centimorgans copied in all, people who copy it, the most copied into one person, the longest
    piece."""

    copied_cm: np.ndarray
    people: np.ndarray
    most_cm: np.ndarray
    longest_cm: np.ndarray

    def summary(self) -> dict[str, float]:
        """The largest values, JSON-ready."""
        return {
            "most_copied_cm": float(self.copied_cm.max(initial=0.0)),
            "most_in_one_person_cm": float(self.most_cm.max(initial=0.0)),
            "longest_piece_cm": float(self.longest_cm.max(initial=0.0)),
        }


def of_paths(model: LiStephens, offset_n: np.ndarray, start_s: np.ndarray, donor_s: np.ndarray) -> Exposure:
    """What people, two haplotypes each, copy of each donor.

    A piece reaches up to the site where the next one begins, at the end of a contig to its last site. The clusters sampler
    copies nobody.
    """
    copied_cm, most_cm, longest_cm = np.zeros((3, model.k))
    people = np.zeros(model.k, dtype=np.int64)
    if len(start_s) and model.config.sampler != "clusters":
        place_cm = model.sites.centimorgans()
        end_s = np.append(start_s[1:], model.n_sites)
        end_s[offset_n[1:] - 1] = model.n_sites
        end_s -= np.append(np.isinf(model.distance_l), True)[end_s]
        piece_cm = place_cm[end_s] - place_cm[start_s]
        person_s = np.repeat(np.arange(len(offset_n) - 1) // 2, np.diff(offset_n))
        donor_s = donor_s.astype(np.int64)
        np.maximum.at(longest_cm, donor_s, piece_cm)
        np.add.at(copied_cm, donor_s, piece_cm)
        pair, where = np.unique(person_s * model.k + donor_s, return_inverse=True)
        shared_cm = np.bincount(where, weights=piece_cm)
        np.maximum.at(most_cm, pair % model.k, shared_cm)
        people += np.bincount(pair % model.k, minlength=model.k)
    return Exposure(copied_cm, people, most_cm, longest_cm)


def of_held(model: LiStephens, held: HeldPaths) -> Exposure:
    """The same of many people, pack by pack."""
    made = of_paths(model, np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
    for pack in held.packs:
        offset_n, start_s, donor_s = held.segments(pack)
        haplotype_s = np.repeat(np.arange(len(offset_n) - 1), np.diff(offset_n))
        goes_on = (haplotype_s[1:] == haplotype_s[:-1]) & (donor_s[1:] == donor_s[:-1])
        begins = np.append(True, ~goes_on | np.isinf(model.distance_l[start_s[1:]]))  # packs cut pieces
        offset_n = np.searchsorted(haplotype_s[begins], np.arange(len(offset_n)))
        made = _together(made, of_paths(model, offset_n, start_s[begins], donor_s[begins]))
    return made


def _together(one: Exposure, other: Exposure) -> Exposure:
    return Exposure(
        one.copied_cm + other.copied_cm,
        one.people + other.people,
        np.maximum(one.most_cm, other.most_cm),
        np.maximum(one.longest_cm, other.longest_cm),
    )


def write(exposure: Exposure, model: LiStephens, seed: int, path: Path) -> None:
    """The table, donors by an index that the seed shuffles."""
    order = seeding.generator(seed, "genomics.exposure.names").permutation(model.k)
    lines = ["\t".join(_COLUMNS)]
    for index, k in enumerate(order.tolist()):
        lines.append(
            f"{index}\t{model.group_names[model.group_of_haplotype_k[k]]}\t{exposure.copied_cm[k]:.6f}\t"
            f"{exposure.people[k]}\t{exposure.most_cm[k]:.6f}\t{exposure.longest_cm[k]:.6f}"
        )
    atomic.write_text(path, "\n".join(lines) + "\n")


def join(parts: list[Path], out: Path) -> None:
    """One table of the tables of shards of people: what is copied is summed, the largest of the rest is kept."""
    rows: list[list[Any]] = []
    for part in parts:
        own = [line.split("\t") for line in part.read_text(encoding="utf-8").splitlines()[1:]]
        if rows and [row[:2] for row in own] != [row[:2] for row in rows]:
            raise InputError("the donors of the other shards", "others", part, "making this shard again")
        if not rows:
            rows = [[*row[:2], 0.0, 0, 0.0, 0.0] for row in own]
        for row, new in zip(rows, own, strict=True):
            row[2] += float(new[2])
            row[3] += int(new[3])
            row[4], row[5] = max(row[4], float(new[4])), max(row[5], float(new[5]))
    lines = ["\t".join(_COLUMNS)]
    lines += [f"{row[0]}\t{row[1]}\t{row[2]:.6f}\t{row[3]}\t{row[4]:.6f}\t{row[5]:.6f}" for row in rows]
    atomic.write_text(out, "\n".join(lines) + "\n")


def check_release(model: LiStephens, n: int, max_release_cm: float, group: str | None) -> None:
    """Refuse a release of n people that costs a donor more than `max_release_cm`; told before anything is drawn.

    Raises:
        UsageError: n is too large, and how many people the budget allows; or the sampler makes no promise.
    """
    if model.config.sampler != "interchange":
        raise UsageError("sampler=interchange for a budget of the release", model.config.sampler, "--max-release-cm")
    from engine.genomics.genealogy import round_people

    length_cm = 100 * float(model.distance_l[np.isfinite(model.distance_l)].sum())
    per_round = round_people(model, group)
    rounds = int(max_release_cm / max(length_cm, 1e-12) + 1e-9)
    if -(-n // per_round) > rounds:
        raise UsageError(
            f"at most {rounds * per_round} people, {length_cm:.4g} cM of every donor for each {per_round}",
            f"{n} people, {-(-n // per_round) * length_cm:.4g} cM", "--max-release-cm", "fewer people or a larger budget",
        )  # fmt: skip
