"""Planes and columns of `vcf_fast` as they grow: what the walkers' tables say becomes strings and numbers, and the records
that were put aside are read by cyvcf2 into the rows left free for them.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import numpy as np

from engine.errors import InputError
from engine.files import genotypes, vcf_cyvcf2, vcf_structure
from engine.files import vcf_fast_table as t
from engine.files.bgzf import Irregular
from engine.files.vcf_cyvcf2 import Ploidy, Read
from engine.files.vcf_structure import Structure
from engine.kernels import bits

_TABLE = 8192  # records between two rounds of cyvcf2 and of turning texts into str
_HEAP = 4 << 20
_BOTH = 8  # records decoded both ways at the start of a file
_FIRST_ROWS = 1024
_SCRATCH_BYTES = 32 << 20  # rows held before the samples asked for are taken from them
_CHARACTERS = np.array([chr(k) for k in range(128)], dtype=object)


class Rows:
    """Planes and columns as they grow, and what a walker needs in order to go on.

    Args:
        raw_header: bytes of the file before the first record.
        keep: int64, samples asked for; None for all.
        bounds: contig and 1-based ends of the region.
    """

    def __init__(
        self, structure: Structure, raw_header: bytes, keep: np.ndarray | None, bounds: tuple[str, int, int] | None
    ) -> None:
        self.structure, self.raw_header, self.keep, self.bounds = structure, raw_header, keep, bounds
        samples = len(structure.header.samples)
        self.n = 2 * samples
        words = bits.words(self.n)
        kept_s = np.ones(samples, dtype=np.uint8)
        if keep is not None:
            kept_s[:] = 0
            kept_s[keep] = 1
        rows = _FIRST_ROWS if keep is None else max(1, min(_TABLE, _SCRATCH_BYTES // (8 * max(1, words))))
        self.state = np.zeros(t.SLOTS, dtype=np.int64)
        self.state[[t.CONTIG, t.REGION, t.FORMAT]] = -1
        self.state[t.BOTH_LEFT] = _BOTH
        self.out = t.Out(
            table_rk=np.zeros((_TABLE, t.COLUMNS), dtype=np.int64),
            alt_code=np.zeros(2 * _TABLE, dtype=np.int16),
            ids=np.empty(_HEAP, dtype=np.uint8),
            refs=np.empty(_HEAP, dtype=np.uint8),
            alts=np.empty(_HEAP, dtype=np.uint8),
            odd=np.empty(_HEAP, dtype=np.uint8),
            bits_lw=np.empty((rows, words), dtype=np.uint64),
            missing_lw=np.zeros((rows, words), dtype=np.uint64),
            seen_kw=np.zeros((3, words), dtype=np.uint64),
            kept_w=bits.pack(np.stack([np.zeros_like(kept_s), kept_s], axis=1).reshape(1, -1))[0],
            found=np.zeros(3, dtype=np.uint8),
        )
        self.ploidy = Ploidy(samples if keep is None else len(keep))
        self.phased, self.any_missing = True, False
        self.contig, self.contigs = -1, dict[int, str]()  # by the walker's number, in the order seen
        self.patterns: dict[int, re.Pattern[bytes]] = {}
        self.columns: dict[str, list[np.ndarray]] = {key: [] for key in vcf_cyvcf2.COLUMN_TYPES}
        self.taken: list[tuple[np.ndarray, np.ndarray]] = []  # planes of the samples asked for

    def drain(self, share: float) -> None:
        """Empty the table and make room for what is wanted; `share` of the file has been read.

        Raises:
            Irregular: a record that was put aside cannot be read, or a record reads otherwise by cyvcf2.
        """
        state, out = self.state, self.out
        table = out.table_rk[: state[t.RECORDS]]
        if len(table):
            last, count = int(state[t.ROWS]), int(state[t.ALT_ROWS])
            rows_lw, missing_lw = out.bits_lw[last - count : last], out.missing_lw[last - count : last]
            if self.keep is not None:
                index = np.stack([2 * self.keep, 2 * self.keep + 1], axis=1).ravel()
                rows_lw = genotypes.take_haplotypes(rows_lw, self.n, index)
                if out.found[0]:
                    missing_lw = genotypes.take_haplotypes(missing_lw, self.n, index)
                else:
                    missing_lw = np.zeros_like(rows_lw)
                self.taken.append((rows_lw, missing_lw))
            inside = table[table[:, t.ROW] >= 0]
            columns = self._columns(inside)
            self._see_contigs(table)
            odd = table[table[:, t.KIND] != t.PLAIN]
            if len(odd):
                row_count = np.maximum(odd[:, t.N_ALTS], 1) * (odd[:, t.ROW] >= 0)
                start = odd[:, t.ROW] - (last - count) - np.cumsum(row_count) + row_count
                row = np.repeat(start, row_count) + np.arange(row_count.sum())
                self._read_odd(odd, row, columns, rows_lw, missing_lw)
            known = np.array(list(self.contigs))
            order = np.argsort(known)
            place = order[np.searchsorted(known, inside[:, t.CONTIG_OF], sorter=order)]
            columns["contig"] = np.repeat(place, np.maximum(inside[:, t.N_ALTS], 1))
            for key, column in columns.items():
                self.columns[key].append(column)
        if self.keep is not None:
            if out.found[0]:
                out.missing_lw[: state[t.ROWS]] = 0
            state[t.ROWS] = 0
        state[[t.RECORDS, t.ALT_ROWS, t.IDS, t.REFS, t.ALTS, t.ODD]] = 0
        self._make_room(share)

    def _columns(self, table: np.ndarray) -> dict[str, np.ndarray]:
        """Columns of the records inside the region, one row per ALT; "" where cyvcf2 will say."""
        state, out = self.state, self.out
        rows = np.maximum(table[:, t.N_ALTS], 1)
        single = bool((rows == 1).all())
        made = {
            "position_bp": table[:, t.POSITION_OF].copy(),
            "id": _texts(table[:, t.ID_CODE], out.ids[: state[t.IDS]]),
            "ref": _texts(table[:, t.REF_CODE], out.refs[: state[t.REFS]]),
        }
        if not single:
            made = {key: np.repeat(column, rows) for key, column in made.items()}
        made["alt"] = _texts(out.alt_code[: state[t.ALT_ROWS]], out.alts[: state[t.ALTS]])
        index = np.zeros(len(made["alt"]), dtype=np.int16)
        if not single:
            index[:] = np.arange(1, len(index) + 1) - np.repeat(np.cumsum(rows) - rows, rows)
            index[np.repeat(rows == 1, rows)] = 0
        made["alt_index"] = index
        return made

    def _see_contigs(self, table: np.ndarray) -> None:
        """Names of the contigs that begin in the table; raises Irregular where one begins again."""
        codes = table[:, t.CONTIG_OF]
        for at in (0, *(np.flatnonzero(codes[1:] != codes[:-1]) + 1).tolist()):
            code = int(codes[at])
            if code == self.contig:
                continue
            if self.structure.kind == "bcf":
                name = self.structure.header.contig_of_index[code]
            else:
                # the first record of a contig is always among those for cyvcf2
                start, end = table[at, [t.ODD_START, t.ODD_END]]
                name = self.out.odd[start:end].tobytes().partition(b"\t")[0].decode("latin-1")
            if code in self.contigs or name in self.contigs.values():
                raise Irregular("a contig in two stretches")
            self.contig, self.contigs[code] = code, name

    def _read_odd(
        self,
        odd: np.ndarray,
        row: np.ndarray,
        columns: dict[str, np.ndarray],
        rows_lw: np.ndarray,
        missing_lw: np.ndarray,
    ) -> None:
        """Have cyvcf2 read the records of `odd`, whose rows inside the region are `row`; those that were decoded already
        must come out the same.
        """
        header, kind = self.structure.header, self.structure.kind
        records = [self.out.odd[a:b].tobytes() for a, b in odd[:, [t.ODD_START, t.ODD_END]].tolist()]
        row_count = np.maximum(odd[:, t.N_ALTS], 1) * (odd[:, t.ROW] >= 0)
        both = np.repeat(odd[:, t.KIND] == t.BOTH, row_count)
        contig = [self.contigs[code] for code in np.repeat(odd[:, t.CONTIG_OF], row_count).tolist()]
        at = 0
        try:
            for record in records:
                if kind == "bcf":
                    vcf_structure.check_record(record[8:], struct.unpack_from("<I", record)[0], header)
                else:
                    vcf_structure.check_line(record.rstrip(b"\r\n"), self.structure, "", self.patterns, None)
            # htslib reads from a name, so the records get one that is no file on a disk
            descriptor = os.memfd_create("records")
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(self.raw_header)
                stream.writelines(records)
                stream.flush()
                source, wanted = Path(f"/proc/self/fd/{descriptor}"), Structure(kind, header, n_records=len(records))
                for block in vcf_cyvcf2.blocks(source, wanted, self.keep, self.bounds):
                    self.phased &= vcf_cyvcf2.is_phased(block)
                    self.ploidy.see(block)
                    alleles_bw, holes_bw = vcf_cyvcf2.planes(block)
                    holes_bw = np.zeros_like(alleles_bw) if holes_bw is None else holes_bw
                    end = at + len(alleles_bw)
                    here = row[at:end]
                    if (contig[at:end], columns["position_bp"][here].tolist()) != (block.contig, block.position_bp):
                        raise Irregular("records that htslib counts otherwise")
                    same = (rows_lw[here] == alleles_bw).all(axis=1) & (missing_lw[here] == holes_bw).all(axis=1)
                    for key in ("id", "ref", "alt", "alt_index"):
                        values = np.array(getattr(block, key), dtype=columns[key].dtype)
                        same &= columns[key][here] == values
                        columns[key][here] = values
                    if not same[both[at:end]].all():
                        raise Irregular("a record that htslib reads otherwise")
                    rows_lw[here], missing_lw[here] = alleles_bw, holes_bw
                    self.any_missing |= bool(holes_bw.any())
                    at = end
        except (InputError, ValueError, struct.error, IndexError, KeyError, OSError) as fault:
            raise Irregular(str(fault)) from None
        if at != len(row):
            raise Irregular("records that htslib counts otherwise")

    def _make_room(self, share: float) -> None:
        """Larger heaps and planes where a record asks for them; the planes at once as large as the file promises."""
        state, out = self.state, self.out
        need_bytes, need_rows = int(state[t.NEED_BYTES]), int(state[t.NEED_ROWS])
        state[[t.NEED_BYTES, t.NEED_ROWS]] = 0
        larger: dict[str, np.ndarray] = {}
        for name in ("ids", "refs", "alts", "odd"):
            if len(getattr(out, name)) < need_bytes:
                larger[name] = np.empty(need_bytes + need_bytes // 4, dtype=np.uint8)
        if len(out.alt_code) < need_rows:
            larger["alt_code"] = np.empty(2 * need_rows, dtype=np.int16)
        used, room = int(state[t.ROWS]), len(out.bits_lw)
        if used + need_rows > room:
            if self.keep is None:
                promised = int(1.2 * used / max(share, 1e-9)) + _FIRST_ROWS
                room = min(max(promised, used + used // 4), 64 * max(used, _FIRST_ROWS))
            room = max(room, used + need_rows)
            bits_lw = np.empty((room, out.bits_lw.shape[1]), dtype=np.uint64)
            missing_lw = np.zeros(bits_lw.shape, dtype=np.uint64)  # pages that nothing is written to cost nothing
            bits_lw[:used] = out.bits_lw[:used]
            if out.found[0] or self.any_missing:
                missing_lw[:used] = out.missing_lw[:used]
            larger |= {"bits_lw": bits_lw, "missing_lw": missing_lw}
        self.out = out._replace(**larger)

    def finish(self, names: list[str]) -> Read:
        """All that was read; nothing can be added then."""
        out, used = self.out, int(self.state[t.ROWS])
        seen_ks = bits.unpack(out.seen_kw, self.n)[:, 1::2].astype(bool)
        seen_ks[0] |= bool(out.found[2])
        if self.keep is not None:
            seen_ks = seen_ks[:, self.keep]
        for mine, found in zip((self.ploidy.diploid_s, self.ploidy.haploid_s, self.ploidy.called_s), seen_ks):
            mine |= found
        missing_lw: np.ndarray | None
        if self.keep is None:
            bits_lw, missing_lw = out.bits_lw, out.missing_lw if out.found[0] or self.any_missing else None
            for plane in (bits_lw, missing_lw):
                if plane is not None:
                    plane.resize((used, plane.shape[1]), refcheck=False)  # gives back what was not used
        else:
            words = bits.words(2 * len(names))
            none = [np.zeros((0, words), dtype=np.uint64)]
            bits_lw = np.concatenate([pair[0] for pair in self.taken] or none)
            missing_lw = np.concatenate([pair[1] for pair in self.taken] or none)
            missing_lw = missing_lw if missing_lw.any() else None
        columns: dict[str, np.ndarray] = {
            key: np.concatenate(self.columns[key] or [np.zeros(0)]).astype(kind, copy=False)
            for key, kind in vcf_cyvcf2.COLUMN_TYPES.items()
            if key != "contig"
        }
        place = np.concatenate([np.zeros(0, dtype=np.int64), *self.columns["contig"]])
        inside = np.flatnonzero(np.bincount(place, minlength=len(self.contigs)))  # others must not widen the strings
        name = np.array(list(self.contigs.values()), dtype=object)[inside].astype(str)
        columns["contig"] = name[np.searchsorted(inside, place)]
        phased = self.phased and not out.found[1]
        return Read(self.structure, names, bits_lw, missing_lw, phased, self.ploidy, columns)


def _texts(code: np.ndarray, heap: np.ndarray) -> np.ndarray:
    """Object array of str from the codes and the heap of a table; anything where cyvcf2 will say."""
    long = np.flatnonzero(code == 0)
    words = np.array(heap.tobytes().decode("ascii").split("\n")[:-1], dtype=object)
    if len(long) == len(code):
        return words
    made = _CHARACTERS[np.maximum(code, 0)]
    made[long] = words
    return made
