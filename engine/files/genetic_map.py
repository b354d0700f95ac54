"""Genetic maps: physical position to centimorgans.

Reads, plain or gzipped, told apart by their first line:
  `pos chr cM` (SHAPEIT, GLIMPSE), `Chromosome Position(bp) Rate(cM/Mb) Map(cM)` (HapMap), `position rate map` without a
  contig (IMPUTE; the contig is then taken from the file name), and headerless PLINK `.map` (chr id cM bp).
Positions must ascend strictly and centimorgans must not descend. Nothing is repaired silently.

`check_build` finds the pairs of sites and map that cannot belong together before hours are spent on them.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.errors import InputError

_MAX_BYTES = 1 << 30  # a genome-wide map has about 3.3 M lines, 100 MB
_END_POINTS = 100  # points at each end that give the slope beyond it
_LEAST_RATE = 0.02  # cM per Mb of a whole contig; humans have about 1.2, and Morgans taken for cM would give 0.012
_INSIDE_SHARE = 0.5  # a smaller share of the panel's sites inside the map's range is taken as another build
_END_BP = 250_000  # how far from the end of its contig a map of the whole contig may stop


@dataclass(frozen=True)
class GeneticMap:
    """One contig's map: position_bp int64 (P,) strictly ascending, position_cm float64 (P,) not descending, and `source`,
    the name of the file it came from.
    """

    contig: str
    position_bp: np.ndarray
    position_cm: np.ndarray
    source: str = field(default="", compare=False)

    def interpolate(self, position_bp: np.ndarray) -> np.ndarray:
        """Centimorgans at `position_bp`, float64 of the same shape.

        Linear between points. Outside, the line goes on with the mean slope of the 100 outermost points of that end
        (fewer where the map is shorter), so that sites beyond the map keep a distance from one another; values before the
        first point can be negative. A map of one point has no slope, and 1 cM/Mb is taken.
        """
        wanted = np.asarray(position_bp, dtype=np.float64)
        bp, cm = self.position_bp.astype(np.float64), self.position_cm
        out = np.interp(wanted, bp, cm)
        k = min(_END_POINTS, len(bp)) - 1
        left = (cm[k] - cm[0]) / (bp[k] - bp[0]) if k else 1e-6
        right = (cm[-1] - cm[-1 - k]) / (bp[-1] - bp[-1 - k]) if k else 1e-6
        out = np.where(wanted < bp[0], cm[0] + (wanted - bp[0]) * left, out)
        return np.where(wanted > bp[-1], cm[-1] + (wanted - bp[-1]) * right, out)


def plain_contig(name: str) -> str:
    """Contig name for comparison: without 'chr'; X, Y and MT for their other names; RefSeq's NC_000001.10 is 1."""
    short = re.sub(r"^chr", "", str(name), flags=re.IGNORECASE)
    if refseq := re.fullmatch(r"NC_0000(\d\d)\.\d+", short):
        short = str(int(refseq[1]))
    return {"23": "X", "x": "X", "24": "Y", "y": "Y", "26": "MT", "M": "MT", "NC_012920.1": "MT"}.get(short, short)


def same_contig(a: str, b: str) -> bool:
    """Whether two names mean the same contig, with or without the prefix 'chr'."""
    return plain_contig(a) == plain_contig(b)


def read_map(path: str | Path, *, contig: str | None = None) -> GeneticMap:
    """Read a map of one contig, or the map of `contig` from a file that holds several.

    Raises:
        InputError: unknown format, a line that does not parse, positions that do not ascend, centimorgans that descend,
            several contigs and none asked for, or the asked one absent.
    """
    maps = read_maps(path)
    if contig is not None:
        return choose_map(list(maps.values()), contig, where=path)
    if len(maps) > 1:
        raise InputError("a map of one contig", f"{len(maps)}: {', '.join(list(maps)[:5])}", path, "name the contig")
    return next(iter(maps.values()))


def read_maps(path: str | Path) -> dict[str, GeneticMap]:
    """All contigs of a map file, by name. Raises InputError as `read_map`."""
    path = Path(path)
    lines = _lines(path)
    if not lines:
        raise InputError("a genetic map", "an empty file", path)
    place, header = _layout(lines[0].split(), path)
    contigs: dict[str, tuple[list[int], list[float]]] = {}
    fixed = None if "contig" in place else _contig_of_name(path)
    for number, line in enumerate(lines[header:], start=header + 1):
        cells = line.split()
        if not cells or cells[0].startswith("#"):
            continue
        try:
            bp, cm = _integer(cells[place["bp"]]), float(cells[place["cm"]])
            name = fixed if fixed is not None else cells[place["contig"]]
        except (IndexError, ValueError):
            raise InputError("contig, position and cM", repr(line[:60]), f"{path}, line {number}") from None
        if not np.isfinite(cm) or bp < 0:
            raise InputError("a finite cM and a position >= 0", repr(line[:60]), f"{path}, line {number}")
        bps, cms = contigs.setdefault(name, ([], []))
        if bps and bp <= bps[-1]:
            raise InputError("positions that ascend", f"{bp} after {bps[-1]}", f"{path}, line {number}", "sort the map")
        if cms and cm < cms[-1]:
            raise InputError("centimorgans that do not descend", f"{cm} after {cms[-1]}", f"{path}, line {number}")
        bps.append(bp)
        cms.append(cm)
    if not contigs:
        raise InputError("a genetic map", "a header without lines", path)
    for name, (bps, cms) in contigs.items():
        span_mb, span_cm = (bps[-1] - bps[0]) / 1e6, cms[-1] - cms[0]
        if len(bps) > 1 and span_cm < _LEAST_RATE * span_mb:
            raise InputError(
                f"at least {_LEAST_RATE} cM per Mb", f"{span_cm:g} over {span_mb:.3g} Mb of contig {name}", path,
                "a map in centimorgans: this one is empty or in Morgans",
            )  # fmt: skip
    return {
        name: GeneticMap(name, np.array(bps, dtype=np.int64), np.array(cms, dtype=np.float64), path.name)
        for name, (bps, cms) in contigs.items()
    }


def choose_map(maps: Sequence[GeneticMap], contig: str, *, where: object = "") -> GeneticMap:
    """The map of `contig`, with or without 'chr'; that of X for PLINK's PAR1, PAR2 and XY.

    Raises:
        InputError: none of the maps is of this contig.
    """
    for wanted in (contig, "X") if plain_contig(contig) in ("PAR1", "PAR2", "XY", "25") else (contig,):
        for each in maps:
            if same_contig(each.contig, wanted):
                return each
    known = ", ".join(f"'{each.contig}'" for each in maps[:5])
    raise InputError(
        f"a genetic map of contig '{contig}'", f"maps of {known or 'nothing'}", where, "the map of this chromosome"
    )


def check_build(
    own: GeneticMap,
    contig: str,
    position_bp: np.ndarray,
    *,
    assembly: str | None = None,
    contig_length: int | None = None,
    where: object = "",
) -> str | None:
    """Raise InputError where map and sites cannot belong together; else what could not be told, in one sentence, or None.

    They cannot where the contigs differ; where a site or the map lies beyond the contig's end; where the build of the sites
    differs from that of the map; and where less than half of the sites lie between the map's first and last position. The
    build of the sites is known by the assembly's name, by the length of a human contig, or by a site that only one build
    has room for; that of the map by its file name or by where it ends. Two builds that neither tells apart stay untold.
    """
    if not same_contig(own.contig, contig):
        raise InputError(f"a genetic map of contig '{contig}'", f"one of '{own.contig}'", where)
    hint = "a map of the same genome build (GRCh37 and GRCh38 differ)"
    first, last = int(own.position_bp[0]), int(own.position_bp[-1])
    position_bp = np.asarray(position_bp)
    furthest = int(position_bp.max(initial=0))
    named = build_of_name(assembly)
    of_length = build_of_length(contig, contig_length)
    if named and of_length and named != of_length:
        got = f"contig {contig} of {contig_length:,} bp ({of_length})"
        raise InputError(f"a header of one build, {assembly}", got, where, "bcftools reheader -f REFERENCE.fa.fai")
    length = contig_length or length_of(contig, named)
    if length and furthest > length:
        stated = "the header's length" if contig_length else str(assembly)
        raise InputError(
            f"sites within the {length:,} bp of contig {contig} ({stated})", f"one at {furthest:,}", where,
            "the header of the build that the sites are of",
        )  # fmt: skip
    if length and last > length:
        raise InputError(f"a map within {contig}'s {length:,} bp", f"one up to {last:,}", where, hint)
    of_sites = named or of_length or build_of_reach(contig, furthest)
    of_map = build_of_name(own.source) or build_of_reach(contig, last, whole_from=first)
    if of_sites and of_map and of_sites != of_map:
        raise InputError(f"a {of_sites} map for {of_sites} sites", f"{own.source} ({of_map})", where, hint)
    if len(position_bp) == 0:
        return None
    inside = float(np.mean((position_bp >= first) & (position_bp <= last)))
    if inside < _INSIDE_SHARE:
        sites = f"{len(position_bp)} sites at {int(position_bp.min()):,}-{furthest:,}"
        raise InputError(f"sites inside the map's {first:,}-{last:,}", f"{inside:.0%} of {sites} inside", where, hint)
    if of_sites is None and of_map is not None and length_of(contig, of_map):
        return f"the panel does not say of which build contig {contig} is; its map is of {of_map}"
    return None


# Lengths in bp of the human contigs, GRCh37.p13 and GRCh38.p14 (Genome Reference Consortium), 1-22, X.
_LENGTHS = {
    "GRCh37": (
        249250621, 243199373, 198022430, 191154276, 180915260, 171115067, 159138663, 146364022, 141213431, 135534747,
        135006516, 133851895, 115169878, 107349540, 102531392, 90354753, 81195210, 78077248, 59128983, 63025520,
        48129895, 51304566, 155270560,
    ),
    "GRCh38": (
        248956422, 242193529, 198295559, 190214555, 181538259, 170805979, 159345973, 145138636, 138394717, 133797422,
        135086622, 133275309, 114364328, 107043718, 101991189, 90338345, 83257441, 80373285, 58617616, 64444167,
        46709983, 50818468, 156040895,
    ),
}  # fmt: skip


def build_of_name(name: str | None) -> str | None:
    """ "GRCh37" or "GRCh38" where a name contains one of their usual spellings (b37, hg19, GRCh37, hs37d5, ...)."""
    text = (name or "").lower()
    is_37 = re.search(r"(?<![a-z0-9])(grch37|b37|hg19|build37|hs37d5|human_g1k_v37|g1k_v37)", text) is not None
    is_38 = re.search(r"(?<![a-z0-9])(grch38|b38|hg38|build38|hs38)", text) is not None
    return None if is_37 == is_38 else "GRCh37" if is_37 else "GRCh38"


def build_of_length(contig: str, length: int | None) -> str | None:
    """Human genome build whose `contig` has exactly this length."""
    return next((build for build in _LENGTHS if length and length_of(contig, build) == length), None)


def length_of(contig: str, build: str | None) -> int | None:
    """Length in bp of a human contig in "GRCh37" or "GRCh38"; None of other contigs or without a build."""
    name = plain_contig(contig)
    place = 22 if name == "X" else int(name) - 1 if name.isdigit() and 1 <= int(name) <= 22 else None
    return None if place is None or build is None else _LENGTHS[build][place]


def build_of_reach(contig: str, last_bp: int, *, whole_from: int | None = None) -> str | None:
    """Human build that alone has room for position `last_bp` of `contig`.

    Args:
        whole_from: first position of a map that ends at `last_bp`. One that spans at least half of the contig is taken to run
            to its end: it is of the build that ends within 250 kb of it, where only one does.
    """
    lengths = {build: length for build in _LENGTHS if (length := length_of(contig, build)) and length >= last_bp}
    if len(lengths) == 1 and length_of(contig, "GRCh37") is not None:
        return next(iter(lengths))
    if whole_from is None or not lengths or last_bp - whole_from < 0.5 * max(lengths.values()):
        return None
    near = [build for build, length in lengths.items() if length - last_bp <= _END_BP]
    return near[0] if len(near) == 1 else None


def _lines(path: Path) -> list[str]:
    """Text lines of a plain or gzipped file of at most 1 GiB."""
    try:
        with open(path, "rb") as stream:
            zipped = stream.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else open(path, "rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError("a genetic map", "no such file", path) from None
    except (OSError, EOFError, zlib.error) as fault:
        raise InputError("a readable genetic map", str(fault), path) from None
    if len(data) > _MAX_BYTES:
        raise InputError("a genetic map of at most 1 GiB", "more", path)
    try:
        return data.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError("a text file", "bytes that are no UTF-8", path) from None


def _layout(cells: list[str], path: Path) -> tuple[dict[str, int], int]:
    """Column of bp, cm and contig, and the number of header lines, from the first line."""
    names = [cell.lower().lstrip("#").strip('"') for cell in cells]
    place: dict[str, int] = {}
    for at, name in enumerate(names):
        if name.startswith(("chr", "contig")):
            place.setdefault("contig", at)
        elif name.startswith(("pos", "bp", "physical")):
            place.setdefault("bp", at)
        elif name in ("cm", "map") or re.search(r"map\(cm\)|genetic_?map|gen_?map|^cm$|^genpos", name):
            place.setdefault("cm", at)
    if "bp" in place and "cm" in place:
        return place, 1
    if len(cells) == 4 and all(re.fullmatch(r"-?[0-9.]+(e[-+]?\d+)?", cell, re.IGNORECASE) for cell in cells[2:]):
        return {"contig": 0, "cm": 2, "bp": 3}, 0
    raise InputError(
        "a header 'pos chr cM', 'Chromosome Position(bp) Rate(cM/Mb) Map(cM)', or PLINK .map lines",
        repr(" ".join(cells)[:60]), path,
    )  # fmt: skip


def _contig_of_name(path: Path) -> str:
    """Contig in a file name such as genetic_map_chr22_combined_b37.txt."""
    found = re.search(r"chr(\d+|X)(?![0-9])", path.name, re.IGNORECASE)
    if found is None:
        raise InputError("a column 'chr', or 'chr' and a number in the file name", path.name, path)
    return found.group(1)


def _integer(text: str) -> int:
    value = float(text)
    if value != int(value):
        raise ValueError(text)
    return int(value)
