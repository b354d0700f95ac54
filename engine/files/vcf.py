"""VCF and BCF: read into packed bits, check, and write with an index.

Reading is by `vcf_fast`, or by `vcf_cyvcf2` where the file is damaged or nothing that the former knows; both give the same.
Writing is in `vcf_write`, the check in a process of its own is in `vcf_check`; both are reached from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numba

from engine.errors import InputError, Unsupported, UsageError
from engine.files import genotypes, vcf_cyvcf2, vcf_fast
from engine.files.genotypes import GenotypeData
from engine.files.vcf_check import check
from engine.files.vcf_cyvcf2 import Read
from engine.files.vcf_write import write_vcf

__all__ = ["check", "read_vcf", "write_vcf"]

_MOST_THREADS = 16  # by default; decoding does not keep up with more
Implementation = Literal["numba", "cyvcf2"]


def read_vcf(
    path: str | Path,
    *,
    region: str | None = None,
    samples: Sequence[str] | None = None,
    implementation: Implementation | None = None,
    threads: int | None = None,
) -> GenotypeData:
    """Read VCF, gzipped or bgzipped VCF, or BCF.

    A record with several ALT alleles becomes one row per ALT (`alt_index` 1, 2, ...; other ALT alleles count as 0).
    Indels, symbolic alleles, breakends and `*` are kept by name; a record without ALT is kept as a row without ones, and
    an allele called there is missing. A sample that is haploid in every record (as males on X: `0`, or the older `0/.`)
    owns one haplotype; one that is haploid in some records and diploid in others owns two, the second missing where the
    call is haploid, and a note says so. Records without GT are missing in every sample. `phased` is False where a called
    heterozygote is unphased.

    Args:
        region: "contig" or "contig:first-last" (1-based, inclusive, by POS). The file is read through; no index is needed.
        samples: names to keep, in this order.
        implementation: None takes "numba", and "cyvcf2" where that says no; the answer and the errors are the same.
        threads: that inflate; default as many as Numba uses, at most 16.

    Raises:
        InputError: damaged or unsorted file, more than two alleles per call, allele number beyond ALT, unknown sample or
            contig; always one line with the record.
        Unsupported: "numba" was asked for by name, and the file is damaged or needs the other.
    """
    path = Path(path)
    if implementation not in (None, "numba", "cyvcf2"):
        raise UsageError("implementation numba or cyvcf2", repr(implementation), "read_vcf")
    if implementation != "cyvcf2":
        try:
            found = vcf_fast.read(
                path, region, samples, min(numba.get_num_threads(), _MOST_THREADS) if threads is None else threads
            )
            return _genotypes(found, region, path)
        except vcf_fast.Irregular as reason:
            if implementation == "numba":
                raise Unsupported("a file for the fast reader", str(reason), path, "implementation='cyvcf2'") from None
    return _genotypes(vcf_cyvcf2.read(path, region, samples), region, path)


def _genotypes(found: Read, region: str | None, path: Path) -> GenotypeData:
    """The haplotypes that samples own, out of two for each."""
    if region is not None and not len(found.bits_lw):
        raise InputError(f"records in {region}", "none", path, "a contig name as in the file's header")
    names, bits_lw, missing_lw, ploidy = found.names, found.bits_lw, found.missing_lw, found.ploidy
    header = found.structure.header
    bits_lw, missing_lw, first = genotypes.without_second(bits_lw, missing_lw, ploidy.haploid())
    return GenotypeData(
        bits_lw=bits_lw,
        n_haplotypes=int(first[-1]),
        missing_lw=missing_lw,
        phased=found.phased,
        **found.columns,  # type: ignore[arg-type]
        sample_ids=list(names),
        haplotypes_of_sample=first,
        contig_length=dict(header.contig_length),
        assembly=header.assembly,
        notes=found.structure.notes + ploidy.notes(),
    )
