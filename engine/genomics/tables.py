"""LD of a panel as files: what `engine ld` writes. Pairs, pruned sites, scores, blocks and clumps as TSV; a triangle as
plink2's `bin4 triangle`. Contigs one after the other, sites in blocks; a matrix is never held.

What is computed is `engine.kernels.ld`'s.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.atomic import atomic_path
from engine.errors import InputError, UsageError
from engine.genomics.panel import HaplotypePanel, read_panel
from engine.kernels import bits, ld

_BLOCK = 4096  # sites whose pairs are in memory at once, at the least
_TRIANGLE_BYTES = 1 << 24  # of a piece of a triangle: memory of that size is used again, not asked for anew


@dataclass(frozen=True)
class Window:
    """Pairs at most this far apart: base pairs, sites, centimorgans; a bound that is None does not bind."""

    bp: int | None = 1_000_000
    sites: int | None = None
    cm: float | None = None


_MEGABASE, _BLOCKS, _CLUMPS = Window(), Window(bp=200_000), Window(bp=250_000)


@dataclass(frozen=True)
class _Contig:
    """Sites of one contig that are asked for: `index` into the panel, their planes, and the keywords of every LD function."""

    name: str
    index: np.ndarray
    bits_lw: np.ndarray
    n: int
    options: dict[str, Any]
    position_bp: np.ndarray
    position_cm: np.ndarray | None

    def ends(self, window: Window) -> np.ndarray:
        return ld.window(
            len(self.index), sites=window.sites, bp=window.bp, cm=window.cm,
            position_bp=self.position_bp, position_cm=self.position_cm,
        )  # fmt: skip


def ld_table(
    panel_path: Path,
    out: Path,
    *,
    min_r2: float = 0.2,
    window: Window = _MEGABASE,
    min_maf: float = 0.0,
    measure: ld.Measure = "r2",
    unphased: bool = False,
    map: Path | None = None,
) -> dict[str, Any]:
    """Write the pairs of sites inside the window whose measure is at least `min_r2` in absolute value.

    Columns: contig, position_a, id_a, position_b, id_b, and the measure. Pairs for which it is not defined are left out.
    Missing alleles: each pair over the haplotypes (people, where `unphased`) that have both.

    Returns:
        {"sites", "pairs_tested", "pairs_written", "out"}.

    Raises:
        InputError: unphased genotypes without `unphased`; haploid people with it.
    """
    panel, contigs = _read(panel_path, min_maf, unphased, map)
    tested = written = 0
    with atomic_path(out) as partial, open(partial, "w", encoding="utf-8") as stream:
        stream.write(f"contig\tposition_a\tid_a\tposition_b\tid_b\t{measure}\n")
        for contig in contigs:
            end_l = contig.ends(window)
            tested += int((end_l - np.arange(len(end_l)) - 1).sum())
            widest = int((end_l - np.arange(len(end_l))).max(initial=0))
            rows = max(_BLOCK, 4 * widest)  # pairs of sites beyond them are computed in vain: widest^2 / 2 at most
            for start in range(0, len(end_l), rows):
                stop = min(start + rows, len(end_l))
                reach = int(end_l[stop - 1])
                part = slice(start, max(stop, reach))
                i, j, value = ld.threshold(
                    contig.bits_lw[part], contig.n, min_r2, end_l=np.minimum(end_l[part], part.stop) - start,
                    measure=measure, **_cut(contig.options, part),
                )  # fmt: skip
                here = i < stop - start
                a, b = contig.index[start + i[here]], contig.index[start + j[here]]
                stream.writelines(_pair_lines(panel, contig.name, a, b, value[here]))
                written += len(a)
    sites = int(sum(len(contig.index) for contig in contigs))
    return {"sites": sites, "pairs_tested": tested, "pairs_written": written, "out": str(out)}


def ld_prune(
    panel_path: Path,
    out: Path,
    *,
    most_r2: float,
    window: Window = _MEGABASE,
    step: int = 1,
    rule: ld.Rule = "plink2",
    min_maf: float = 0.0,
    unphased: bool = False,
) -> dict[str, Any]:
    """Write the sites that pruning keeps: contig, position, id, ref, alt. Windows are of sites where `window.sites` is given.

    Returns:
        {"sites", "kept", "out"}.

    Raises:
        InputError: as `ld_table`. UsageError: a window in centimorgans, a step beyond the window.
    """
    if window.cm is not None:
        raise UsageError("pruning windows in sites or kb", "centimorgans", "--window-cm")
    panel, contigs = _read(panel_path, min_maf, unphased, None)
    kept = 0
    with atomic_path(out) as partial, open(partial, "w", encoding="utf-8") as stream:
        stream.write("contig\tposition\tid\tref\talt\n")
        for contig in contigs:
            where: dict[str, Any] = {"sites": window.sites, "step": step}
            if window.sites is None:
                where = {"bp": window.bp, "step": step, "position_bp": contig.position_bp}
            keep_l = ld.prune(contig.bits_lw, contig.n, most_r2, rule=rule, **where, **contig.options)
            s = panel.sites
            for site in contig.index[keep_l]:
                stream.write(f"{contig.name}\t{s.position_bp[site]}\t{s.id[site]}\t{s.ref[site]}\t{s.alt[site]}\n")
            kept += int(keep_l.sum())
    return {"sites": int(sum(len(c.index) for c in contigs)), "kept": kept, "out": str(out)}


def ld_scores(
    panel_path: Path,
    out: Path,
    *,
    window: Window = _MEGABASE,
    adjusted: bool = False,
    min_maf: float = 0.0,
    unphased: bool = False,
    map: Path | None = None,
) -> dict[str, Any]:
    """Write the LD score of each site: contig, position, id, score (sum of r2 with the sites of its window, itself included).

    Returns:
        {"sites", "mean_score", "out"}.

    Raises:
        InputError: as `ld_table`.
    """
    panel, contigs = _read(panel_path, min_maf, unphased, map)
    total, sites = 0.0, 0
    with atomic_path(out) as partial, open(partial, "w", encoding="utf-8") as stream:
        stream.write("contig\tposition\tid\tscore\n")
        for contig in contigs:
            score_l = ld.score(contig.bits_lw, contig.n, contig.ends(window), adjusted=adjusted, **contig.options)
            for site, score in zip(contig.index.tolist(), score_l.tolist()):
                stream.write(f"{contig.name}\t{panel.sites.position_bp[site]}\t{panel.sites.id[site]}\t{score:.8g}\n")
            total, sites = total + float(score_l.sum()), sites + len(score_l)
    return {"sites": sites, "mean_score": total / max(sites, 1), "out": str(out)}


def ld_blocks(
    panel_path: Path, out: Path, *, window: Window = _BLOCKS, min_maf: float = 0.05, unphased: bool = False
) -> dict[str, Any]:
    """Write haplotype blocks (Gabriel et al. 2002, as Haploview and PLINK 1.9): contig, first, last, kb, sites, ids.

    Returns:
        {"sites", "blocks", "sites_in_blocks", "out"}.

    Raises:
        InputError: as `ld_table`. UsageError: a window that is not in base pairs.
    """
    if window.bp is None or window.sites is not None or window.cm is not None:
        raise UsageError("blocks of at most so many kb", "another window", "--window-kb")
    panel, contigs = _read(panel_path, 0.0, unphased, None)
    blocks = inside = 0
    with atomic_path(out) as partial, open(partial, "w", encoding="utf-8") as stream:
        stream.write("contig\tfirst\tlast\tkb\tsites\tids\n")
        for contig in contigs:
            block_l = ld.blocks(
                contig.bits_lw, contig.n, contig.position_bp, min_maf=min_maf, max_bp=window.bp, **contig.options
            )
            for block in range(int(block_l.max(initial=-1)) + 1):
                members = contig.index[block_l == block]
                first, last = (int(panel.sites.position_bp[members[k]]) for k in (0, -1))
                ids = ",".join(str(name) for name in panel.sites.id[members])
                stream.write(f"{contig.name}\t{first}\t{last}\t{(last - first + 1) / 1000:g}\t{len(members)}\t{ids}\n")
                inside += len(members)
            blocks += int(block_l.max(initial=-1)) + 1
    sites = int(sum(len(c.index) for c in contigs))
    return {"sites": sites, "blocks": blocks, "sites_in_blocks": inside, "out": str(out)}


def ld_clumps(
    panel_path: Path,
    p_values: Path,
    out: Path,
    *,
    p1: float = 1e-4,
    p2: float = 0.01,
    min_r2: float = 0.5,
    window: Window = _CLUMPS,
    rule: ld.Rule = "plink2",
    unphased: bool = False,
) -> dict[str, Any]:
    """Write clumps of associated sites: contig, position, id, p of the index, members, ids of the others.

    Args:
        p_values: tab- or space-separated with a header: a column `id` (or `snp`), or `contig` (`chrom`) and `position` (`pos`,
            `bp`); and a column `p`. Sites that the table lacks have no p-value; rows of other sites are counted.

    Returns:
        {"sites", "with_p", "rows_of_other_sites", "clumps", "out"}.

    Raises:
        InputError: as `ld_table`; a table without these columns, a value that is no probability, two rows of one site.
    """
    if window.bp is None or window.sites is not None or window.cm is not None:
        raise UsageError("clumps of at most so many kb around an index", "another window", "--window-kb")
    panel, contigs = _read(panel_path, 0.0, unphased, None)
    p_l, other_rows = _p_values(panel, p_values)
    clumps = 0
    with atomic_path(out) as partial, open(partial, "w", encoding="utf-8") as stream:
        stream.write("contig\tposition\tid\tp\tmembers\tother_ids\n")
        for contig in contigs:
            own_p = p_l[contig.index]
            clump_l = ld.clump(
                contig.bits_lw, contig.n, own_p, contig.position_bp, p1=p1, p2=p2, least=min_r2, bp=window.bp, rule=rule,
                **contig.options,
            )  # fmt: skip
            index = np.unique(clump_l[clump_l >= 0])
            for site in index[np.argsort(own_p[index], kind="stable")]:
                members = np.flatnonzero(clump_l == site)
                others = ",".join(str(panel.sites.id[k]) for k in contig.index[members[members != site]]) or "."
                at = contig.index[site]
                stream.write(
                    f"{contig.name}\t{panel.sites.position_bp[at]}\t{panel.sites.id[at]}\t{own_p[site]:.6g}"
                    f"\t{len(members)}\t{others}\n"
                )
            clumps += len(index)
    found = int(np.isfinite(p_l).sum())
    sites = int(sum(len(c.index) for c in contigs))
    return {"sites": sites, "with_p": found, "rows_of_other_sites": other_rows, "clumps": clumps, "out": str(out)}


def ld_triangle(panel_path: Path, out: Path, *, measure: ld.Measure = "r2", unphased: bool = False) -> dict[str, Any]:
    """Write the measure of all pairs of sites, of all contigs, as the lower triangle with its diagonal, float32, row by row.

    These are the bytes of plink2's `--r2-unphased bin4 triangle` (or `--r-unphased` with `ref-based`); `--r2-phased` rounds a
    few last bits otherwise. `out`.vars lists the ids of the sites, one a line.

    Returns:
        {"sites", "bytes", "out"}.

    Raises:
        InputError: as `ld_table`.
    """
    panel = read_panel(panel_path)
    _check_phase(panel, panel_path, unphased)
    rows = max(32, _TRIANGLE_BYTES // (4 * panel.n_sites))
    written = 0
    with atomic_path(out) as partial, open(partial, "wb") as stream:
        for piece in ld.triangle(
            panel.bits_lw,
            panel.n_haplotypes,
            missing_lw=panel.missing_lw,
            unphased=unphased,
            measure=measure,
            rows=rows,
        ):
            stream.write(piece.astype("<f4", copy=False))
            written += piece.nbytes
    names = Path(f"{out}.vars")
    with atomic_path(names) as partial, open(partial, "w", encoding="utf-8") as text:
        text.writelines(f"{name}\n" for name in panel.sites.id)
    return {"sites": panel.n_sites, "bytes": written, "out": str(out)}


def _read(path: Path, min_maf: float, unphased: bool, map: Path | None) -> tuple[HaplotypePanel, list[_Contig]]:
    """The panel, and the sites of each contig that vary and whose minor allele is not rarer than `min_maf`."""
    panel = read_panel(path, map=map)
    _check_phase(panel, path, unphased)
    missing_lw = panel.missing_lw if panel.missing_lw is not None and panel.missing_lw.any() else None
    alleles_lw = panel.bits_lw if missing_lw is None else panel.bits_lw & ~missing_lw
    called_l = panel.n_haplotypes - (0 if missing_lw is None else bits.popcount_rows(missing_lw))
    share_l = bits.popcount_rows(alleles_lw) / np.maximum(called_l, 1)
    kept_l = np.flatnonzero(np.minimum(share_l, 1 - share_l) >= max(min_maf, 1e-300))
    contigs = []
    for name in dict.fromkeys(panel.sites.contig[kept_l].tolist()):
        index = kept_l[panel.sites.contig[kept_l] == name]
        options = {"unphased": unphased, "missing_lw": None if missing_lw is None else missing_lw[index]}
        cm = None if panel.sites.position_cm is None else panel.sites.position_cm[index]
        bp = panel.sites.position_bp[index]
        contigs.append(_Contig(name, index, panel.bits_lw[index], panel.n_haplotypes, options, bp, cm))
    return panel, contigs


def _check_phase(panel: HaplotypePanel, path: Path, unphased: bool) -> None:
    if not unphased and not panel.phased:
        raise InputError("a phased panel", "unphased genotypes", path, "--unphased, for the LD of dosages")
    if unphased and (np.diff(panel.samples.first_haplotype) != 2).any():
        raise InputError(
            "diploid people for the LD of dosages", "haploid ones", path, "without --unphased where phased"
        )


def _cut(options: dict[str, Any], part: slice) -> dict[str, Any]:
    missing_lw = options["missing_lw"]
    return options | {"missing_lw": None if missing_lw is None else missing_lw[part]}


def _pair_lines(panel: HaplotypePanel, contig: str, a: np.ndarray, b: np.ndarray, value: np.ndarray) -> Iterator[str]:
    s = panel.sites
    columns = (s.position_bp[a].tolist(), s.id[a], s.position_bp[b].tolist(), s.id[b], value.tolist())
    for position_a, id_a, position_b, id_b, cell in zip(*columns):
        yield f"{contig}\t{position_a}\t{id_a}\t{position_b}\t{id_b}\t{cell:.6g}\n"


def _p_values(panel: HaplotypePanel, path: Path) -> tuple[np.ndarray, int]:
    """float64 (L,), nan where the table has no row; and the number of its rows that are of other sites."""
    with open(path, encoding="utf-8", newline="") as stream:
        first = stream.readline()
        stream.seek(0)
        plain = csv.reader(stream, delimiter="\t") if "\t" in first else (line.split() for line in stream)
        header = [name.strip().lstrip("#").lower() for name in next(iter(plain), [])]
        at = {name: header.index(name) for name in header}
        p_at = at.get("p")
        id_at = next((at[name] for name in ("id", "snp") if name in at), None)
        contig_at = next((at[name] for name in ("contig", "chrom", "chr") if name in at), None)
        position_at = next((at[name] for name in ("position", "pos", "bp") if name in at), None)
        if p_at is None or (id_at is None and (contig_at is None or position_at is None)):
            raise InputError("columns p and id, or p, contig and position", ", ".join(header), path)
        s = panel.sites
        place_of: dict[str, int] = {}
        for site in range(panel.n_sites):
            key = str(s.id[site]) if id_at is not None else f"{s.contig[site]}:{s.position_bp[site]}"
            place_of.setdefault(key, site)
        p_l, others = np.full(panel.n_sites, np.nan), 0
        for number, row in enumerate(plain, start=2):
            if not row:
                continue
            try:
                key = row[id_at] if id_at is not None else f"{row[contig_at]}:{int(row[position_at])}"  # type: ignore
                p = float("nan") if row[p_at].upper() in ("NA", "NAN", ".", "") else float(row[p_at])
            except (ValueError, IndexError):
                raise InputError("a site and a number", "\t".join(row)[:80], f"{path}, line {number}") from None
            if p < 0 or p > 1:
                raise InputError("p in [0, 1]", str(p), f"{path}, line {number}")
            if key not in place_of:
                others += 1
            elif not np.isnan(p_l[place_of[key]]):
                raise InputError("one row per site", f"'{key}' again", f"{path}, line {number}")
            else:
                p_l[place_of[key]] = p
    return p_l, others
