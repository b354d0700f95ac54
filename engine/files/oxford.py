"""Oxford .haps (plain or bgzipped) with .sample: phased haplotypes as text, one line per ALT allele, in and out.

A line is `contig id position REF ALT` and two alleles per person; a haploid person has `-` for the second, a missing allele
is `?`. There is no header: contig lengths, the build and provenance are not kept. Layout: the SHAPEIT2 and IMPUTE2
documentation, "haps/sample files"; plink2 --haps and --sample.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from engine.atomic import atomic_path
from engine.errors import InputError, UsageError
from engine.files import genotypes
from engine.files.bgzf import EOF_BLOCK
from engine.files.bgzf_write import compressed
from engine.files.genotypes import Block, GenotypeData, Layout
from engine.files.plink import check_names
from engine.kernels import bits

_TEXT_BYTES = 16 << 20  # of alleles laid out at one time
_MAX_LINE = 1 << 28
_NONE = np.zeros(0, dtype=np.uint64)
_HEADER = "ID_1 ID_2 missing sex\n0 0 0 D\n"


def sample_path(path: str | Path) -> Path:
    """`x.haps` and `x.haps.gz` -> `x.sample`."""
    path = Path(path)
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".haps") + ".sample")


def check(path: str | Path, layout: Layout) -> None:
    """Raise UsageError for another suffix; InputError for unphased data, no samples or sites, or text with blanks."""
    path, head = Path(path), layout.head
    if not path.name.endswith((".haps", ".haps.gz")):
        raise UsageError("a path ending in .haps or .haps.gz", path.name, "haps")
    check_names(head, path)
    if not head.phased:
        raise InputError("phased genotypes", "unphased ones", path, "BCF, which holds both")


def write_part(path: str | Path, layout: Layout, blocks: Iterable[Block], place: Path) -> None:
    """Write to `place` the lines of these blocks."""
    lines = (line for block in blocks for line in _lines_of(block.data))
    with atomic_path(place) as partial, open(partial, "wb") as stream:
        stream.writelines(compressed(lines) if Path(path).name.endswith(".gz") else lines)


def _lines_of(data: GenotypeData) -> Iterator[Any]:
    haploid_s = np.diff(data.haplotypes_of_sample) == 1
    first = data.haplotypes_of_sample[:-1]
    n = data.n_haplotypes
    step = max(1, _TEXT_BYTES // max(1, n))
    for at in range(0, data.n_sites, step):
        stop = min(at + step, data.n_sites)
        allele_ln = bits.unpack(data.bits_lw[at:stop], n) + np.uint8(ord("0"))
        if data.missing_lw is not None:
            allele_ln[bits.unpack(data.missing_lw[at:stop], n).astype(bool)] = ord("?")
        if haploid_s.any() or data.hemizygous is not None:
            pair_lsp = np.full((stop - at, len(first), 2), ord("-"), dtype=np.uint8)
            pair_lsp[:, :, 0] = allele_ln[:, first]
            pair_lsp[:, ~haploid_s, 1] = allele_ln[:, first[~haploid_s] + 1]
            if data.hemizygous is not None:
                pair_lsp[np.ix_(data.hemizygous[0][at:stop], data.hemizygous[1], np.array([1]))] = ord("-")
            allele_ln = pair_lsp.reshape(stop - at, -1)
        text_lt = (allele_ln.astype("<u2") | np.uint16(ord(" ") << 8)).view(np.uint8)
        text_lt[:, -1] = ord("\n")
        for k in range(at, stop):
            yield f"{data.contig[k]} {data.id[k]} {data.position_bp[k]} {data.ref[k]} {data.alt[k]} ".encode()
            yield text_lt[k - at]


def join_parts(path: str | Path, layout: Layout, places: Sequence[Path]) -> None:
    """Write .sample and, last, the .haps from the parts of all its records, in order."""
    path = Path(path)
    sexes = ["unknown"] * len(layout.head.sample_ids) if layout.sex is None else layout.sex
    with atomic_path(sample_path(path)) as partial_sample, atomic_path(path) as partial:
        with open(partial, "wb") as stream:
            genotypes.append_files(stream, places)
            if path.name.endswith(".gz"):
                stream.write(EOF_BLOCK)
        people = zip(layout.head.sample_ids, sexes)
        lines = (f"{name} {name} 0 {genotypes.SEX_CODES.get(sex, '0')}\n" for name, sex in people)
        partial_sample.write_text(_HEADER + "".join(lines))


def read_haps(path: str | Path) -> GenotypeData:
    """Read .haps or .haps.gz with the .sample of the same name; every line is a row of its own.

    Raises:
        InputError: a file is absent or damaged, a line has other columns or alleles, or the sites are not sorted.
    """
    path = Path(path)
    if not sample_path(path).is_file():
        raise InputError(".haps and .sample of one name", f"no {sample_path(path).name}", path)
    ids = _read_sample(sample_path(path))
    rows: list[np.ndarray] = []
    lost_rows: list[np.ndarray] = []
    columns: list[list[str]] = []
    haploid_s = np.ones(len(ids), dtype=bool)
    try:
        with open(path, "rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if is_gzip else open(path, "rb") as stream:
            for number, line in enumerate(_lines(stream, path), start=1):
                where = f"{path}, line {number}"
                fields = line.split(b" ", 5)
                if len(fields) != 6 or not fields[2].isdigit() or len(fields[2]) > 10:
                    raise InputError("contig, id, position, REF, ALT and alleles", repr(line[:60]), where)
                value_n = np.frombuffer(fields[5].rstrip(b"\r\n") + b" ", dtype=np.uint8)
                if len(value_n) != 4 * len(ids) or (value_n[1::2] != ord(" ")).any():
                    raise InputError(f"{2 * len(ids)} alleles", f"{len(value_n) / 2:g}", where)
                value_n = value_n[0::2]
                lost_n = value_n == ord("?")
                lost_n[1::2] |= value_n[1::2] == ord("-")
                if not ((value_n == ord("0")) | (value_n == ord("1")) | lost_n).all():
                    raise InputError("alleles 0, 1 or ?, and - for the second of a haploid person", "others", where)
                haploid_s &= value_n[1::2] == ord("-")
                rows.append(bits.pack((value_n == ord("1"))[None])[0])
                lost_rows.append(bits.pack(lost_n[None])[0] if lost_n.any() else _NONE)
                columns.append([field.decode() for field in fields[:5]])
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as fault:
        raise InputError("a readable .haps file", str(fault), path) from None
    if not rows:
        raise InputError("at least one line", "none", path)
    bits_lw, missing_lw = np.array(rows), None
    if any(len(row) for row in lost_rows):
        missing_lw = np.array([row if len(row) else np.zeros_like(rows[0]) for row in lost_rows])
    bits_lw, missing_lw, first = genotypes.without_second(bits_lw, missing_lw, haploid_s)
    text = lambda k: np.array([row[k] for row in columns], dtype=object)  # noqa: E731
    data = GenotypeData(
        bits_lw, int(first[-1]), missing_lw, True, np.array([row[0] for row in columns], dtype=str),
        np.array([int(row[2]) for row in columns], dtype=np.int64), text(1), text(3), text(4),
        np.zeros(len(rows), dtype=np.int16), ids, first,
    )  # fmt: skip
    genotypes.check_sorted(data.contig, data.position_bp, path)
    return data


def _lines(stream: IO[bytes] | Any, path: Path) -> Iterator[bytes]:
    while line := stream.readline(_MAX_LINE):
        if len(line) == _MAX_LINE:
            raise InputError("lines of at most 256 MiB", "a longer one", path)
        yield line


def _read_sample(path: Path) -> list[str]:
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError("a readable .sample file", str(fault), path) from None
    if len(rows) < 3 or rows[0][:2] != ["ID_1", "ID_2"] or any(len(row) != len(rows[0]) for row in rows):
        raise InputError("a header ID_1 ID_2 ..., a line of types, and people", "another content", path)
    ids = [row[1] for row in rows[2:]]
    if len(set(ids)) != len(ids):
        raise InputError("distinct sample names", "one twice", path)
    return ids
