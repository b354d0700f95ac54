"""Haplotypes as a NumPy archive, with a table of sites beside it: how the 805-SNP benchmark set is laid out. Read only.

`x.npz` holds `haplotypes` (uint8 (N, ceil(L / 8)), one row per haplotype, numpy.packbits along axis 1, 1 = ALT), `n_sites`
(L) and `ids` (N names; `NAME_A` and `NAME_B` one after the other are the two haplotypes of the person NAME, any other name is
a haploid sample). `x.legend`, or `sites.legend` in the same folder, has a header `id position a0 a1` and a line for each
site, whose id begins with its contig: `1:1243896_C_T`. There is no missing allele, and phase is what the rows say.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from engine.errors import InputError
from engine.files.genotypes import GenotypeData
from engine.kernels import bits

MOST_BYTES = 1 << 32  # of all arrays, unpacked
_NEEDED = ("haplotypes", "ids", "n_sites")


def legend_path(path: str | Path) -> Path | None:
    """The table of sites of an archive: `x.legend`, else `sites.legend` beside it; None where there is neither."""
    path = Path(path)
    for legend in (path.with_suffix(".legend"), path.with_name("sites.legend")):
        if legend.is_file():
            return legend
    return None


def read_npz(path: str | Path, like: GenotypeData | None = None) -> GenotypeData:
    """Read an archive and its table of sites.

    Args:
        like: whose sites, in this order, an archive without a table has; refused if there are more or fewer.

    Raises:
        InputError: no such archive, an array that is missing or does not fit, no table, or a line of it that is none.
    """
    path = Path(path)
    packed_nb, ids, sites = _arrays(path)
    legend = legend_path(path)
    if legend is not None:
        contig, position_bp, name, ref, alt = _sites(legend)
        contig_length, assembly, alt_index = {}, None, np.zeros(len(contig), np.int16)
    elif like is not None:
        contig, position_bp, name, ref, alt = like.contig, like.position_bp, like.id, like.ref, like.alt
        contig_length, assembly, alt_index = dict(like.contig_length), like.assembly, like.alt_index
    else:
        raise InputError("a table of sites", "none beside it", path, f"{path.with_suffix('.legend').name}")
    if len(contig) != sites:
        raise InputError(f"{sites} sites", f"{len(contig)}", legend or "the model")
    samples, first = _people(ids)
    bits_lw = np.empty((sites, (len(ids) + 63) // 64), np.uint64)
    for at in range(0, sites, 1024):  # a multiple of 8: whole bytes of each row
        alleles_nl = np.unpackbits(packed_nb[:, at // 8 : (at + 1024) // 8], axis=1)[:, : min(1024, sites - at)]
        bits_lw[at : at + 1024] = bits.pack(np.ascontiguousarray(alleles_nl.T))
    return GenotypeData(
        bits_lw, len(ids), None, True, contig, position_bp, name, ref, alt, alt_index, samples, first, contig_length,
        assembly,
    )  # fmt: skip


def _arrays(path: Path) -> tuple[np.ndarray, list[str], int]:
    """Packed rows, ids and number of sites, all of which fit together."""
    try:
        with zipfile.ZipFile(path) as archive:
            stated = sum(entry.file_size for entry in archive.infolist())
            if stated > MOST_BYTES:
                raise InputError(f"at most {MOST_BYTES} bytes of arrays", str(stated), path, "BCF or PGEN")
        with np.load(path, allow_pickle=False) as stored:
            absent = [key for key in _NEEDED if key not in stored.files]
            if absent:
                raise InputError(f"arrays {', '.join(_NEEDED)}", f"no '{absent[0]}'", path)
            packed_nb, ids, n_sites = (stored[key] for key in _NEEDED)
    except OSError as error:
        raise InputError("a file that can be read", str(error.strerror or error), path) from None
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError) as error:
        raise InputError("a NumPy archive (.npz) without pickled objects", str(error), path) from None
    good = packed_nb.dtype == np.uint8 and packed_nb.ndim == 2 and ids.shape == packed_nb.shape[:1]
    if not good or ids.dtype.kind != "U" or n_sites.shape != () or n_sites.dtype.kind not in "iu":
        raise InputError(
            "haplotypes uint8 (N, bytes), ids (N,) and a number n_sites",
            f"{packed_nb.dtype} {packed_nb.shape}, {ids.dtype} {ids.shape}, {n_sites.dtype} {n_sites.shape}", path,
        )  # fmt: skip
    sites = int(n_sites)
    if sites < 0 or packed_nb.shape[1] != (sites + 7) // 8:
        raise InputError(f"{(sites + 7) // 8} bytes a row for {sites} sites", str(packed_nb.shape[1]), path)
    names = [str(each) for each in ids]
    bad = next((each for each in names if not each or not each.isprintable() or " " in each), None)
    if bad is not None:
        raise InputError("ids of printing characters without blanks", repr(bad), path)
    return packed_nb, names, sites


def _people(ids: list[str]) -> tuple[list[str], np.ndarray]:
    """Sample names, and int64 (S + 1,) the first haplotype of each."""
    samples, first = [], [0]
    while first[-1] < len(ids):
        at = first[-1]
        stem = ids[at].removesuffix("_A")
        paired = stem != ids[at] and at + 1 < len(ids) and ids[at + 1] == f"{stem}_B"
        samples.append(stem if paired else ids[at])
        first.append(at + 2 if paired else at + 1)
    return samples, np.array(first, dtype=np.int64)


def _sites(legend: Path) -> tuple[np.ndarray, ...]:
    """contig, position_bp, id, ref and alt of each line."""
    try:
        lines = legend.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("a table of sites", str(error), legend) from None
    if not lines or lines[0].split()[:4] != ["id", "position", "a0", "a1"]:
        raise InputError("a header 'id position a0 a1'", repr(lines[0][:60]) if lines else "no line", legend)
    rows = []
    for number, line in enumerate(lines[1:], 2):
        parts = line.split()
        if len(parts) < 4 or ":" not in parts[0] or not (parts[1].isascii() and parts[1].isdigit()):
            raise InputError("contig:..., a position and two alleles", repr(line[:60]), f"{legend}, line {number}")
        rows.append((parts[0].split(":")[0], int(parts[1]), *parts[:1], *parts[2:4]))
    columns = list(zip(*rows, strict=True)) if rows else [()] * 5
    name, ref, alt = (np.array(columns[i], dtype=object) for i in (2, 3, 4))
    return np.array(columns[0], dtype=str), np.array(columns[1], dtype=np.int64), name, ref, alt
