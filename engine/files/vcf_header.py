"""Headers of VCF and BCF: samples, contigs, dictionaries, and remarks on definitions that do not follow the
specification.

`parse` takes what reading needs and raises, `read` does so for a file; `judge` and `judge_record` only remark. Reserved
keys: VCF 4.3, tables 1 and 2.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import InputError
from engine.files.genetic_map import build_of_name

_FIXED = ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO"]
_VERSION = re.compile(r"##fileformat=VCFv4\.([0-5])")
_PAIR = re.compile(r'([^=,<>"]+)=("(?:[^"\\]|\\.)*"|\[[^\]]*\]|[^,"]*)(?:,|$)')
_NUMBER = re.compile(r"\d+|[ARGPM.]|LA|LR|LG")
_TYPES = {
    "INFO": ("Integer", "Float", "Flag", "Character", "String"),
    "FORMAT": ("Integer", "Float", "Character", "String"),
}
_RESERVED = {
    "INFO": {
        "AA": "1 String", "AC": "A Integer", "AD": "R Integer", "ADF": "R Integer", "ADR": "R Integer", "AF": "A Float",
        "AN": "1 Integer", "BQ": "1 Float", "CIGAR": "A String", "DB": "0 Flag", "DP": "1 Integer", "END": "1 Integer",
        "H2": "0 Flag", "H3": "0 Flag", "MQ": "1 Float", "MQ0": "1 Integer", "NS": "1 Integer", "SOMATIC": "0 Flag",
        "VALIDATED": "0 Flag", "1000G": "0 Flag", "IMPRECISE": "0 Flag", "NOVEL": "0 Flag", "EVENT": ". String",
        "MATEID": ". String", "PARID": ". String", "HOMSEQ": ". String", "HOMLEN": ". Integer",
    },
    "FORMAT": {
        "AD": "R Integer", "ADF": "R Integer", "ADR": "R Integer", "DP": "1 Integer", "EC": "A Integer", "FT": "1 String",
        "GL": "G Float", "GP": "G Float", "GQ": "1 Integer", "GT": "1 String", "HQ": "2 Integer", "MQ": "1 Integer",
        "PL": "G Integer", "PQ": "1 Integer", "PS": "1 Integer", "HAP": "1 Integer", "AHAP": "1 Integer",
    },
}  # fmt: skip

_MAX_INDEX = 10_000_000  # htslib allocates a table of this length
_MAX_BYTES = 256 << 20  # of a header

Note = Callable[[str], None]


@dataclass
class Header:
    """What a header says. `contig_of_index` and `string_of_index` are BCF's dictionaries (section 6.2.1)."""

    version: int
    samples: list[str]
    n_columns: int
    contig_length: dict[str, int] = field(default_factory=dict)
    contigs: list[str] = field(default_factory=list)
    assembly: str | None = None
    contig_of_index: dict[int, str] = field(default_factory=dict)
    string_of_index: dict[int, str] = field(default_factory=lambda: {0: "PASS"})
    definitions: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def pairs(text: str) -> dict[str, str] | None:
    """Keys and values of `<...>`; None where the line does not follow the grammar (section 1.4)."""
    if not (text.startswith("<") and text.endswith(">")):
        return None
    inner, at, found = text[1:-1], 0, {}
    while at < len(inner):
        match = _PAIR.match(inner, at)
        if match is None or match.end() == at:
            return None
        key = match.group(1).strip()
        if key in found:
            return None
        found[key] = match.group(2)
        at = match.end()
    return found


def parse(lines: list[bytes], path: Path) -> Header:
    """Header from its lines, the #CHROM line last.

    Raises:
        InputError: another format or version, wrong columns, missing or repeated sample names, text that is no UTF-8.
    """
    try:
        text = [line.decode("utf-8") for line in lines]
    except UnicodeDecodeError:
        raise InputError("a header in UTF-8", "other bytes", path) from None
    if any("\0" in line for line in text):
        raise InputError("a header of text", "a zero byte", path)
    found = _VERSION.fullmatch(text[0])
    if found is None:
        raise InputError("##fileformat=VCFv4.0 to VCFv4.5 in the first line", repr(text[0][:40]), path)
    columns = text[-1].split("\t")
    if columns[:8] != _FIXED or (len(columns) > 8 and columns[8] != "FORMAT"):
        raise InputError(
            "the column line #CHROM POS ID REF ALT QUAL FILTER INFO [FORMAT ...]", repr(text[-1][:60]), path
        )
    samples = columns[9:]
    for name in samples:
        if not name or name != name.strip():
            raise InputError("sample names", f"an empty one or one with outer blanks: {name!r}", path)
    if len(set(samples)) != len(samples):
        twice = next(name for k, name in enumerate(samples) if name in samples[:k])
        raise InputError("distinct sample names", f"'{twice}' twice", path)
    made = Header(int(found.group(1)), samples, len(columns), lines=text)
    next_string = 1
    known = {"PASS"}
    assemblies: set[str] = set()
    reference = None
    for line in text[1:-1]:
        key, _, value = line[2:].partition("=")
        fields = pairs(value) if value.startswith("<") else None
        if key == "reference":
            reference = value.strip()
        if fields is None or "ID" not in fields:
            continue
        name = fields["ID"]
        index = fields.get("IDX", "")
        if index and (not index.isdigit() or int(index) > _MAX_INDEX):
            raise InputError(f"IDX from 0 to {_MAX_INDEX}", repr(index[:20]), f"{path}, {key} {name[:40]}")
        if key == "contig":
            if name not in made.contigs:
                made.contigs.append(name)
                made.contig_of_index[int(index) if index.isdigit() else len(made.contigs) - 1] = name
            if fields.get("length", "").isdigit():
                made.contig_length[name] = int(fields["length"])
            if fields.get("assembly"):
                assemblies.add(fields["assembly"].strip('"'))
        elif key in ("INFO", "FORMAT", "FILTER"):
            made.definitions.setdefault((key, name), fields)
            if index.isdigit():
                made.string_of_index[int(index)] = name
            elif name not in known:
                made.string_of_index[next_string] = name
                next_string += 1
            known.add(name)
    if len(assemblies) == 1:
        made.assembly = assemblies.pop()
    elif not assemblies:
        made.assembly = build_of_name(reference) if reference and "/" in reference else reference
    return made


def read(path: Path) -> tuple[Header, str | None]:
    """Header of a VCF or BCF, and the contig of its first record where that can be told; the rest of the file is not
    looked at.

    Raises:
        InputError: as `parse`, or a file whose beginning cannot be read.
    """
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else open(path, "rb") as stream:
            if stream.read(3) == b"BCF":
                size = int.from_bytes(stream.read(6)[2:], "little")
                if size > _MAX_BYTES:
                    raise InputError("a header of at most 256 MiB", f"{size:,} bytes", path)
                made = parse(stream.read(size).rstrip(b"\0").rstrip(b"\n").split(b"\n"), path)
                record = stream.read(12)
                index = int.from_bytes(record[8:], "little") if len(record) == 12 else -1
                return made, made.contig_of_index.get(index)
            stream.seek(0)
            lines: list[bytes] = []
            size = 0
            while not (lines and lines[-1].startswith(b"#CHROM")):
                line = stream.readline(_MAX_BYTES)
                size += len(line)
                if not line.startswith(b"#") or size >= _MAX_BYTES:
                    raise InputError("a header that ends in #CHROM", repr(line[:40]), path)
                lines.append(line.rstrip(b"\r\n"))
            first = stream.read(256).partition(b"\t")[0].decode("utf-8", "replace")
            return parse(lines, path), first or None
    except FileNotFoundError:
        raise InputError("a VCF or BCF file", "no such file", path) from None
    except (OSError, EOFError, zlib.error) as fault:
        raise InputError("a readable file", str(fault), path) from None


def judge(header: Header, note: Note) -> None:
    """Remark on header lines outside the grammar and on definitions that differ from the reserved ones."""
    seen: set[tuple[str, str]] = set()
    if header.n_columns == 9:
        note("a FORMAT column without samples")
    for number, line in enumerate(header.lines[1:-1], start=2):
        where = f"header line {number}"
        key, equals, value = line[2:].partition("=")
        if not equals or not key or not value or " " in key:
            note(f"{where} is no ##key=value")
            continue
        structured = key in ("INFO", "FORMAT", "FILTER", "ALT", "contig", "META", "SAMPLE")
        if not structured and not (key == "PEDIGREE" and value.startswith("<")):
            if key == "PEDIGREE" or (value.startswith("<") and key != "pedigreeDB" and pairs(value) is None):
                note(f"{where} is no well-formed ##{key}")
            if key in ("pedigreeDB", "assembly") and not re.fullmatch(r"<?[a-z]+://[^\s<>]+>?", value):
                note(f"{where}: ##{key} is no URL")
            continue
        fields = pairs(value)
        if fields is None or not fields.get("ID"):
            note(f"{where} is no well-formed ##{key}=<ID=...>")
            continue
        name = fields["ID"]
        if (key, name) in seen:
            note(f"{where} defines {key} {name} again")
        seen.add((key, name))
        if key in ("INFO", "FORMAT", "FILTER", "ALT"):
            description = fields.get("Description", "")
            if len(description) < 2 or description[0] != '"' or description[-1] != '"':
                note(f"{where}: {key} {name} has no quoted Description")
        if key == "ALT" and not re.fullmatch(r"[^\s<>,]+", name):
            note(f"{where}: ALT ID {name!r}")
        if key == "ALT" and header.version < 5 and name.split(":")[0] not in (
            "DEL", "INS", "DUP", "INV", "CNV", "BND", "*", "NON_REF", "X", "TRA", "STR"
        ) and not re.fullmatch(r"[RYSWKMBDHVN]", name):  # fmt: skip
            note(f"{where}: ALT {name} is no structural variant type of section 1.4.5")
        if key == "contig" and not re.fullmatch(r"[0-9A-Za-z!#$%&+./:;?@^_|~-][0-9A-Za-z!#$%&*+./:;=?@^_|~-]*", name):
            note(f"{where}: contig ID {name!r}")
        if key == "META" and (
            fields.get("Number") != "." or fields.get("Type") != "String" or fields.get("Values", "[")[:1] != "["
        ):
            note(f"{where}: META {name} needs Type=String, Number=. and Values=[...]")
        if key in ("INFO", "FORMAT"):
            kind, count = fields.get("Type", ""), fields.get("Number", "")
            if kind not in _TYPES[key] or _NUMBER.fullmatch(count) is None:
                note(f"{where}: {key} {name} has Number={count or 'none'}, Type={kind or 'none'}")
            elif (kind == "Flag") != (count == "0"):
                note(f"{where}: {key} {name} of Type={kind} with Number={count}")
            if not re.fullmatch(r"[A-Za-z_][0-9A-Za-z_.]*|1000G", name):
                note(f"{where}: {key} ID {name!r}")
            expected = _RESERVED[key].get(name)
            if expected is not None and expected != f"{count} {kind}":
                note(f"{where}: {key} {name} is {expected} in the specification, here {count} {kind}")


def judge_record(cells: list[bytes], alts: int, header: Header, note: Note, number: int) -> None:
    """Remark on ALT, QUAL, FILTER, ID and INFO of one record (section 1.6.1)."""
    text = [cell.decode("utf-8", "replace") for cell in cells[:8]]
    where = f"line {number}"
    alleles = text[4].upper().split(",")
    if len(set(alleles)) != len(alleles) or text[3].upper() in alleles:
        note(f"{where}: repeated alleles")
    if alts and "." in alleles:
        note(f"{where}: '.' among ALT alleles")
    ids = text[2].split(";")
    if "" in ids or len(set(ids)) != len(ids):
        note(f"{where}: repeated or empty IDs")
    if text[5] != "." and not re.fullmatch(
        r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?|nan", text[5], re.I
    ):
        note(f"{where}: QUAL {text[5][:20]!r} is no number")
    elif text[5].startswith("-"):
        note(f"{where}: QUAL is negative")
    filters = text[6].split(";")
    if (
        "" in filters
        or "0" in filters
        or ("." in filters and len(filters) > 1)
        or len(set(filters)) != len(filters)
        or re.search(r"\s", text[6])
    ):
        note(f"{where}: FILTER {text[6][:30]!r}")
    elif len(filters) > 1 and "PASS" in filters:
        note(f"{where}: FILTER has PASS among others")
    _judge_info(text[7], alts, header, note, where)
    if len(cells) > 9:
        _judge_samples(cells[8].decode("latin-1"), cells[9].decode("latin-1"), alts, header, note, where)


def _judge_samples(keys: str, rest: str, alts: int, header: Header, note: Note, where: str) -> None:
    """Number of values of each FORMAT key in the first 50 samples (section 1.6.2)."""
    names = keys.split(":")
    if len(names) == 1:
        return
    for cell in rest.split("\t", 50)[:50]:
        values = cell.split(":")
        ploidy = len(re.findall(r"[/|]", values[0])) + 1 if names[0] == "GT" else 2
        for name, value in zip(names[1:], values[1:]):
            defined = header.definitions.get(("FORMAT", name))
            count = (_RESERVED["FORMAT"].get(name, ". String")).split()[0]
            if defined is not None:
                count = defined.get("Number", ".")
            genotypes = math.comb(ploidy + alts, ploidy)
            wanted = {"A": alts, "R": alts + 1, "G": genotypes}.get(count, int(count) if count.isdigit() else None)
            found = value.count(",") + 1
            if wanted is not None and value != "." and found != wanted:
                note(f"{where}: FORMAT {name} has {found} values, {wanted} expected")
                return


def _judge_info(info: str, alts: int, header: Header, note: Note, where: str) -> None:
    if info == ".":
        return
    seen: set[str] = set()
    for entry in info.split(";"):
        key, equals, value = entry.partition("=")
        if not re.fullmatch(r"[A-Za-z_][0-9A-Za-z_.]*|1000G", key) or (equals and not value) or re.search(r"\s", entry):
            note(f"{where}: INFO {entry[:30]!r}")
            continue
        if key in seen:
            note(f"{where}: INFO {key} twice")
        seen.add(key)
        defined = header.definitions.get(("INFO", key))
        count, kind = (_RESERVED["INFO"].get(key, ". String")).split()
        if defined is not None:
            count, kind = defined.get("Number", "."), defined.get("Type", "String")
        values = value.split(",") if equals else []
        if kind == "Flag":
            if values and values != ["1"]:
                note(f"{where}: INFO {key} is a flag with a value")
            continue
        wanted = {"A": alts, "R": alts + 1}.get(count, int(count) if count.isdigit() else None)
        if wanted is not None and len(values) != wanted and value != ".":
            note(f"{where}: INFO {key} has {len(values)} values, {wanted} expected")
        for each in values:
            if each == ".":
                continue
            if kind == "Integer" and not (re.fullmatch(r"[+-]?\d+", each) and -(2**31) + 8 <= int(each) < 2**31):
                note(f"{where}: INFO {key} value {each[:20]!r} is no 32-bit integer")
            elif kind == "Float" and not re.fullmatch(
                r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf(inity)?|nan)", each, re.IGNORECASE
            ):
                note(f"{where}: INFO {key} value {each[:20]!r} is no number")
            elif key in ("AC", "AN", "DP", "NS", "MQ0", "AD", "ADF", "ADR", "MQ", "BQ", "END") and each.startswith("-"):
                note(f"{where}: INFO {key} is negative")
            elif key == "AF" and not 0 <= float(each) <= 1:
                note(f"{where}: INFO AF outside 0 to 1")
            elif key == "CIGAR" and not re.fullmatch(r"(\d+[MIDNSHPX=])+", each):
                note(f"{where}: INFO CIGAR {each[:20]!r}")
            elif key == "AA" and not re.fullmatch(r"[^\s]+", each):
                note(f"{where}: INFO AA {each[:20]!r}")
