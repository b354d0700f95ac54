"""Which module reads and writes a genotype file, by its name: the door to all formats.

Every writer is a module of three functions: `check(path, layout)` raises before anything is written, `write_part(path, layout,
blocks, place)` writes some records to a place of their own, `join_parts(path, layout, places)` makes the file of them. What a
part holds depends on its records only: parts may be written by different jobs, and again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np

from engine.errors import InputError, UsageError
from engine.files import genotypes
from engine.files.genotypes import Block, GenotypeData, Layout

SUFFIXES = (".vcf.gz", ".bcf", ".pgen", ".vcz", ".haps.gz", ".haps", ".bed")


def suffix_of(path: str | Path) -> str:
    """The suffix of an output; UsageError for another."""
    name = Path(path).name
    for suffix in SUFFIXES:
        if name.endswith(suffix) and name != suffix:
            return suffix
    raise UsageError(f"a file name ending in {', '.join(SUFFIXES)}", name, "--out")


def writer(path: str | Path) -> ModuleType:
    """The module that writes `path`; UsageError for another suffix."""
    suffix = suffix_of(path)
    if suffix in (".vcf.gz", ".bcf"):
        from engine.files import vcf_write

        return vcf_write
    if suffix == ".pgen":
        from engine.files import plink

        return plink
    if suffix == ".vcz":
        from engine.files import vcf_zarr

        return vcf_zarr
    if suffix == ".bed":
        from engine.files import bed

        return bed
    from engine.files import oxford

    return oxford


def beside(path: Path, what: str) -> Path:
    """`PATH.what`: a table or record that belongs to a genotype file."""
    return path.with_name(f"{path.name}.{what}")


def lost(path: str | Path) -> list[str]:
    """What the format of an output cannot keep, one sentence each."""
    suffix = suffix_of(path)
    if suffix == ".bed":
        return ["BED cannot keep phase: which haplotype of a person carries an allele is lost (PGEN and BCF keep it)"]
    if suffix in (".haps", ".haps.gz"):
        return ["Oxford haps has no header: contig lengths, build and provenance are not in the file"]
    return []


def write_genotypes(
    path: str | Path,
    data: GenotypeData,
    *,
    header_lines: Sequence[str] = (),
    sex: Sequence[str] | np.ndarray | None = None,
) -> None:
    """Write `data` in the format that `path` is named for, whole or absent.

    Args:
        header_lines: extra `##key=value` lines, for formats with a header.
        sex: "male", "female" or anything else for unknown, per sample, for formats that keep it.

    Raises:
        UsageError: another suffix, or bad header lines. InputError: what the format cannot hold, with the site.
    """
    path, module = Path(path), writer(path)
    layout = Layout(
        data, np.zeros(1, np.int64), tuple(header_lines), None if sex is None else [str(each) for each in sex]
    )
    module.check(path, layout)
    layout = replace(layout, start_r=genotypes.record_starts(data))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
        place = Path(folder) / "part"
        module.write_part(path, layout, [Block(data, layout.start_r)], place)
        module.join_parts(path, layout, [place])


def read_genotypes(path: str | Path, *, region: str | None = None) -> GenotypeData:
    """Read .vcf, .vcf.gz, .bcf, .pgen, .vcz, .haps, .haps.gz or .npz (`packed_npz`).

    Args:
        region: "contig" or "contig:first-last", 1-based inclusive; VCF, BCF and PGEN only.

    Raises:
        InputError: the file cannot be read, or a region of a format without regions.
    """
    path = Path(path)
    if path.suffix == ".pgen":
        from engine.files.plink import read_pgen

        return read_pgen(path, region=region)
    if path.suffix in (".vcz", ".npz") or path.name.endswith((".haps", ".haps.gz")):
        if region is not None:
            raise InputError("no region, or a VCF, BCF or PGEN", region, path)
        if path.suffix == ".npz":
            from engine.files.packed_npz import read_npz

            return read_npz(path)
        if path.suffix == ".vcz":
            from engine.files.vcf_zarr import read_vcz

            return read_vcz(path)
        from engine.files.oxford import read_haps

        return read_haps(path)
    from engine.files.vcf import read_vcf

    return read_vcf(path, region=region)


def remove(path: str | Path) -> None:
    """Remove a file or a folder, if it is there."""
    path = Path(path)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
