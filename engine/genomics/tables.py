"""LD of a panel as a table of pairs: what `engine ld` writes. The matrix is never held; sites pass in blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engine.atomic import atomic_path
from engine.errors import InputError
from engine.genomics.panel import read_panel
from engine.kernels import bits, ld

_BLOCK = 512


def ld_table(
    panel_path: Path, out: Path, *, min_r2: float = 0.2, window_bp: int = 1_000_000, min_maf: float = 0.0
) -> dict[str, Any]:
    """Write pairs of sites with r2 >= `min_r2` at most `window_bp` apart as TSV.

    Columns: contig, position_a, id_a, position_b, id_b, r2 (haplotype r2, Hill & Robertson 1968). Pairs with a monomorphic
    site have no r2 and are left out.

    Returns:
        {"sites", "pairs_tested", "pairs_written", "out"}.

    Raises:
        InputError: the panel is unphased or has missing alleles: haplotype r2 is not defined there.
    """
    panel = read_panel(panel_path)
    if not panel.phased:
        raise InputError("a phased panel", "unphased genotypes", panel_path, "phase it first, e.g. with SHAPEIT5 or Beagle")
    if panel.missing_lw is not None and panel.missing_lw.any():
        raise InputError("a complete panel", "missing alleles", panel_path, "impute it, or drop the sites")
    count_l = bits.popcount_rows(panel.bits_lw)
    frequency_l = count_l / max(panel.n_haplotypes, 1)
    kept_l = np.flatnonzero(np.minimum(frequency_l, 1 - frequency_l) >= max(min_maf, 1e-300))
    tested = written = 0
    with atomic_path(out) as partial, open(partial, "w", encoding="utf-8") as stream:
        stream.write("contig\tposition_a\tid_a\tposition_b\tid_b\tr2\n")
        for contig in dict.fromkeys(panel.sites.contig[kept_l].tolist()):
            index_l = kept_l[panel.sites.contig[kept_l] == contig]
            position_l = panel.sites.position_bp[index_l]
            words_lw = np.ascontiguousarray(panel.bits_lw[index_l])
            for start in range(0, len(index_l), _BLOCK):
                stop = min(start + _BLOCK, len(index_l))
                end = int(np.searchsorted(position_l, position_l[stop - 1] + window_bp, side="right"))
                r2_ab = ld.r2(words_lw[start:stop], panel.n_haplotypes, words_lw[start:end])
                a, b = np.arange(start, stop)[:, None], np.arange(start, end)[None, :]
                inside_ab = (b > a) & (position_l[start:end][None, :] - position_l[start:stop][:, None] <= window_bp)
                tested += int(inside_ab.sum())
                for i, j in zip(*np.nonzero(inside_ab & (r2_ab >= min_r2))):
                    left, right = index_l[start + i], index_l[start + j]
                    sites = panel.sites
                    stream.write(
                        f"{contig}\t{sites.position_bp[left]}\t{sites.id[left]}\t{sites.position_bp[right]}"
                        f"\t{sites.id[right]}\t{r2_ab[i, j]:.6g}\n"
                    )
                    written += 1
    return {"sites": len(kept_l), "pairs_tested": tested, "pairs_written": written, "out": str(out)}
