"""PLINK 1 filesets (.bed, .bim, .fam): written for tools that know nothing newer.

A BED has no phase and two alleles: each ALT of a multiallelic site is a variant of its own, and which haplotype of a person
carries it is lost. A haploid call stands as a homozygote. Layout: https://www.cog-genomics.org/plink/1.9/formats#bed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from engine.atomic import atomic_path
from engine.errors import UsageError
from engine.files import genotypes
from engine.files.genotypes import Block, GenotypeData, Layout
from engine.files.plink import as_diploid, check_names

_EVEN = np.uint64(0x5555555555555555)
_ONE = np.uint64(1)
_ROWS_BYTES = 16 << 20  # of calls laid out at one time


def check(path: str | Path, layout: Layout) -> None:
    """Raise UsageError for a path that does not end in .bed; InputError for no samples or sites, or names with blanks."""
    path = Path(path)
    if path.suffix != ".bed":
        raise UsageError("a path ending in .bed", path.name, "bed")
    check_names(layout.head, path)


def write_part(path: str | Path, layout: Layout, blocks: Iterable[Block], place: Path) -> None:
    """Write to `place` the calls of these blocks, a variant for each row."""
    with atomic_path(place) as partial, open(partial, "wb") as stream:
        for block in blocks:
            data = as_diploid(block.data)
            step = max(1, _ROWS_BYTES // max(1, 8 * data.bits_lw.shape[1]))
            for at in range(0, data.n_sites, step):
                stream.write(_calls(data, at, min(at + step, data.n_sites)).tobytes())


def _calls(data: GenotypeData, first: int, stop: int) -> np.ndarray:
    """uint8 (rows, ceil(S / 4)): two bits a person, 3 both REF, 2 heterozygous, 0 both ALT, 1 missing."""
    samples = data.n_haplotypes // 2
    bits_lw = data.bits_lw[first:stop]
    one_lw, two_lw = bits_lw & _EVEN, (bits_lw >> _ONE) & _EVEN
    low_lw, high_lw = ~(one_lw | two_lw) & _EVEN, ~(one_lw & two_lw) & _EVEN
    if data.missing_lw is not None:
        missing_lw = data.missing_lw[first:stop]
        lost_lw = (missing_lw | (missing_lw >> _ONE)) & _EVEN  # half a call is none
        low_lw, high_lw = low_lw | lost_lw, high_lw & ~lost_lw
    calls_lb = np.ascontiguousarray((low_lw | (high_lw << _ONE)).astype("<u8").view(np.uint8)[:, : (samples + 3) // 4])
    if samples % 4:
        calls_lb[:, -1] &= np.uint8((1 << 2 * (samples % 4)) - 1)  # what lies beyond the last person is zero
    return calls_lb


def join_parts(path: str | Path, layout: Layout, places: Sequence[Path]) -> None:
    """Write the fileset from the parts of all its records, in order; the .bed comes last."""
    path, head = Path(path), layout.head
    base = path.with_suffix("")
    sexes = ["unknown"] * len(head.sample_ids) if layout.sex is None else layout.sex
    with (
        atomic_path(base.with_name(base.name + ".fam")) as partial_fam,
        atomic_path(base.with_name(base.name + ".bim")) as partial_bim,
        atomic_path(path) as partial,
    ):
        with open(partial, "wb") as stream:
            stream.write(b"\x6c\x1b\x01")
            genotypes.append_files(stream, places)
        with open(partial_bim, "w", encoding="utf-8") as text:
            position_l = head.position_bp.tolist()
            for at in range(head.n_sites):
                alt = "0" if head.alt[at] == "." else head.alt[at]
                text.write(f"{head.contig[at]}\t{head.id[at]}\t0\t{position_l[at]}\t{alt}\t{head.ref[at]}\n")
        people = zip(head.sample_ids, sexes)
        partial_fam.write_text(
            "".join(f"0\t{name}\t0\t0\t{genotypes.SEX_CODES.get(sex, '0')}\t-9\n" for name, sex in people)
        )
