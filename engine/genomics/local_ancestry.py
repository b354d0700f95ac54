"""Local ancestry: which source population each stretch of a haplotype comes from, as tracts in memory and as haptools'
`.bp` files.

A `.bp` file has a line `SAMPLE_1` or `SAMPLE_2` for each haplotype, then one line a block, tab separated: population,
contig, last position in bp, last position in cM (haptools documentation, "Breakpoints"). A site belongs to the first
block whose end is not before it; so the last block of a contig ends at the contig's end. haptools cuts population names
after six characters and contig names after ten; they are written whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.atomic import atomic_path
from engine.errors import InputError
from engine.files.genotypes import haplotype_index


@dataclass(frozen=True)
class Tracts:
    """Tracts of N haplotypes in the order of sites, those of haplotype n at offset_n[n] .. offset_n[n + 1] - 1.

    Attributes:
        sources: names of the source populations; contigs: of the contigs.
        offset_n: int64 (N + 1,).
        source_t, contig_t: int32 (T,), indices into these names. Neighbouring tracts can be of one source: between them
            lies a recombination all the same.
        end_bp_t: int64 (T,), last position of the tract, the contig's end for its last one; end_cm_t: float64 (T,).
        start_site_t: int64 (T,), the first site at or after the tract's beginning; a tract can be without sites.
    """

    sources: list[str]
    contigs: list[str]
    offset_n: np.ndarray
    source_t: np.ndarray
    contig_t: np.ndarray
    end_bp_t: np.ndarray
    end_cm_t: np.ndarray
    start_site_t: np.ndarray

    @property
    def n_haplotypes(self) -> int:
        return len(self.offset_n) - 1

    def take(self, index: np.ndarray) -> Tracts:
        """The tracts of haplotypes `index`, int64, in this order."""
        at, offset_n = haplotype_index(self.offset_n, index)
        return Tracts(
            self.sources, self.contigs, offset_n, self.source_t[at], self.contig_t[at], self.end_bp_t[at],
            self.end_cm_t[at], self.start_site_t[at],
        )  # fmt: skip

    def blocks(self, haplotype: int) -> list[tuple[str, str, int, float]]:
        """(population, contig, last bp, last cM) of one haplotype, neighbours of one source joined."""
        made: list[tuple[str, str, int, float]] = []
        for at in range(int(self.offset_n[haplotype]), int(self.offset_n[haplotype + 1])):
            name, contig = self.sources[self.source_t[at]], self.contigs[self.contig_t[at]]
            if made and made[-1][:2] == (name, contig):
                made.pop()
            made.append((name, contig, int(self.end_bp_t[at]), float(self.end_cm_t[at])))
        return made

    def source_nl(self, n_sites: int) -> np.ndarray:
        """int32 (N, L): source of every site; for small panels."""
        made_nl = np.empty((self.n_haplotypes, n_sites), dtype=np.int32)
        for n in range(self.n_haplotypes):
            part = slice(self.offset_n[n], self.offset_n[n + 1])
            stops = np.append(self.start_site_t[part][1:], n_sites)
            made_nl[n] = np.repeat(self.source_t[part], stops - self.start_site_t[part])
        return made_nl

    def shares(self, start_cm_c: np.ndarray) -> np.ndarray:
        """float64 (N, A): share of each source in a haplotype's length in cM; `start_cm_c` is where each contig
        begins."""
        first_of_contig = np.ones(len(self.contig_t), dtype=bool)
        first_of_contig[1:] = self.contig_t[1:] != self.contig_t[:-1]
        first_of_contig[self.offset_n[:-1]] = True
        before = np.concatenate([[0.0], self.end_cm_t[:-1]])
        length_t = self.end_cm_t - np.where(first_of_contig, start_cm_c[self.contig_t], before)
        owner_t = np.repeat(np.arange(self.n_haplotypes), np.diff(self.offset_n))
        made_na = np.zeros((self.n_haplotypes, len(self.sources)))
        np.add.at(made_na, (owner_t, self.source_t), length_t)
        total_n = made_na.sum(axis=1, keepdims=True)
        return made_na / np.where(total_n > 0, total_n, 1.0)


def joined(parts: Sequence[Tracts]) -> Tracts:
    """The haplotypes of several tables of equal sources and contigs, in order."""
    offsets = np.cumsum([0, *(len(part.source_t) for part in parts)])
    column = lambda name: np.concatenate([getattr(part, name) for part in parts])  # noqa: E731
    return Tracts(
        parts[0].sources, parts[0].contigs,
        np.concatenate([[0], *(part.offset_n[1:] + shift for part, shift in zip(parts, offsets))]).astype(np.int64),
        column("source_t"), column("contig_t"), column("end_bp_t"), column("end_cm_t"), column("start_site_t"),
    )  # fmt: skip


def write_bp(path: str | Path, sample_ids: Sequence[str], tracts: Tracts) -> None:
    """Write the tracts of diploid people, two haplotypes each, whole or not at all."""
    with atomic_path(path) as partial, open(partial, "w", encoding="utf-8") as stream:
        stream.writelines(_lines(sample_ids, tracts))


def _lines(sample_ids: Sequence[str], tracts: Tracts) -> Iterator[str]:
    for s, name in enumerate(sample_ids):
        for strand in (0, 1):
            yield f"{name}_{strand + 1}\n"
            for population, contig, bp, cm in tracts.blocks(2 * s + strand):
                yield f"{population}\t{contig}\t{bp}\t{cm:.6f}\n"


def read_bp(path: str | Path) -> dict[str, list[list[tuple[str, str, int, float]]]]:
    """Sample -> its two haplotypes, each a list of (population, contig, last bp, last cM).

    Raises:
        InputError: lines that are neither a haplotype's name nor a block, or a second haplotype that does not follow
        its first.
    """
    made: dict[str, list[list[tuple[str, str, int, float]]]] = {}
    blocks: list[tuple[str, str, int, float]] | None = None
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            cells = line.rstrip("\n").split("\t")
            if line.startswith("#"):
                continue
            if len(cells) == 1:
                name, _, strand = cells[0].rpartition("_")
                own = made.setdefault(name, [])
                if strand not in ("1", "2") or len(own) != int(strand) - 1 or next(reversed(made)) != name:
                    raise InputError("SAMPLE_1, then SAMPLE_2", repr(cells[0][:40]), f"{path}, line {number}")
                blocks = []
                own.append(blocks)
                continue
            try:
                population, contig, bp, cm = cells
                assert blocks is not None
                blocks.append((population, contig, int(bp), float(cm)))
            except (ValueError, AssertionError):
                raise InputError("population, contig, bp, cM", repr(line[:60]), f"{path}, line {number}") from None
    return made


def join_bp(paths: Iterable[str | Path], out: str | Path) -> None:
    """Write the people of several files, in order, into one."""
    with atomic_path(out) as partial, open(partial, "w", encoding="utf-8") as stream:
        for path in paths:
            with open(path, encoding="utf-8") as part:
                stream.writelines(part)
