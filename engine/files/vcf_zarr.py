"""VCF-Zarr 0.4: a folder .vcz of chunked, compressed arrays (Zarr format 2), in and out.

Genotypes are written chunk file by chunk file with numcodecs, as parts come; zarr-python lays down everything else when all
are there. A call is phased by the fill value of `call_genotype_phased`, so that this array takes no room but where calls are
missing. Source: VCF Zarr specification 0.4 (https://github.com/sgkit-dev/vcf-zarr-spec); Zarr specification version 2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numba
import numpy as np

from engine import __version__
from engine.atomic import atomic_folder
from engine.errors import InputError, UsageError
from engine.files import genotypes, vcf_write
from engine.files.genotypes import Block, GenotypeData, Layout
from engine.kernels import bits

VARIANTS, SAMPLES = 1000, 10_000  # of a chunk at most, as bio2zarr's
_LEVEL = 3  # of zstd, behind blosc's bit shuffle: level 5 makes files 5 per cent smaller in twice the time
_COUNTS, _PHASED = "counts.npy", "phased-"
_MISSING_FLOAT = np.array(0x7F800001, dtype="<u4").view("<f4")
_FILL_FLOAT = np.array(0x7F800002, dtype="<u4").view("<f4")


def check(path: str | Path, layout: Layout) -> None:
    """Raise UsageError for another suffix or an existing folder; InputError for what VCF cannot hold either."""
    path, head = Path(path), layout.head
    if path.suffix != ".vcz":
        raise UsageError("a path ending in .vcz", path.name, "vcz")
    if path.exists():
        raise UsageError(
            "a folder that does not exist yet", "an existing one", path, "another name, or remove it first"
        )
    vcf_write.check(path.with_suffix(".bcf"), layout)
    if not head.n_sites or not head.sample_ids:
        raise InputError("at least one site and one sample", f"{head.n_sites} x {len(head.sample_ids)}", path)


def write_part(path: str | Path, layout: Layout, blocks: Iterable[Block], place: Path) -> None:
    """Write a folder `place` of chunk files and counts; the first record of every block but the last part's end must be a
    multiple of VARIANTS.
    """
    ploidy, wide = _ploidy(layout.head), _chunk_samples(layout.head)
    codec = _codec()
    counted: list[np.ndarray] = []
    threads = numba.get_num_threads()
    with atomic_folder(place) as folder, ThreadPoolExecutor(threads) as pool:
        for block in blocks:
            for at in range(0, len(block.start_r) - 1, VARIANTS):
                start_v = block.start_r[at : at + VARIANTS + 1]
                chunk = (block.first_record + at) // VARIANTS
                samples = range(0, len(layout.head.sample_ids), wide)

                def write(first: int, start_v: np.ndarray = start_v, chunk: int = chunk, block: Block = block) -> None:
                    call_vsp = _calls(block.data, start_v, first, wide, ploidy)
                    (folder / f"{chunk}.{first // wide}.0").write_bytes(codec.encode(call_vsp))
                    unphased_vs = (call_vsp < 0).all(axis=2)  # what is missing as a whole has no phase, as in VCF
                    if layout.head.phased and block.data.missing_lw is not None and unphased_vs.any():
                        (folder / f"{_PHASED}{chunk}.{first // wide}").write_bytes(codec.encode(~unphased_vs))

                for _ in pool.map(write, samples):
                    pass
                counted.append(_counts(block.data, start_v))
        np.save(folder / _COUNTS, np.concatenate(counted, axis=1))


def _codec() -> Any:
    import numcodecs

    return numcodecs.Blosc(cname="zstd", clevel=_LEVEL, shuffle=numcodecs.Blosc.BITSHUFFLE)


def _ploidy(head: GenotypeData) -> int:
    return 2 if head.n_haplotypes > len(head.sample_ids) else 1


def _chunk_samples(head: GenotypeData) -> int:
    return min(SAMPLES, len(head.sample_ids))


def _calls(data: GenotypeData, start_v: np.ndarray, first: int, wide: int, ploidy: int) -> np.ndarray:
    """int8 (VARIANTS, wide, ploidy) of samples from `first` on; what lies beyond the records or the samples is -1."""
    stop = min(first + wide, len(data.sample_ids))
    low, high = int(data.haplotypes_of_sample[first]), int(data.haplotypes_of_sample[stop])
    head_v, rows = start_v[:-1], slice(int(start_v[0]), int(start_v[-1]))
    words = slice(low // 64, (high + 63) // 64)

    def columns(plane_lw: np.ndarray) -> np.ndarray:
        width = plane_lw.shape[1] * 64
        return np.asarray(bits.unpack(np.ascontiguousarray(plane_lw), width)[:, low % 64 : low % 64 + high - low])

    bits_rn = columns(data.bits_lw[rows, words])
    allele_vn = (
        bits_rn[head_v - start_v[0]].view(np.int8) if rows.stop - rows.start != len(head_v) else bits_rn.view(np.int8)
    )
    for v in np.flatnonzero(np.diff(start_v) > 1).tolist():
        for row in range(int(start_v[v]) + 1, int(start_v[v + 1])):
            allele_vn[v] += bits_rn[row - rows.start].view(np.int8) * np.int8(row - int(start_v[v]) + 1)
    if data.missing_lw is not None:
        allele_vn[columns(data.missing_lw[head_v][:, words]).astype(bool)] = -1
    made_vsp = np.full((VARIANTS, wide, ploidy), -1, dtype=np.int8)
    own_n = data.haplotypes_of_sample[first : stop + 1] - low
    if own_n[-1] == ploidy * (stop - first):
        made_vsp[: len(head_v), : stop - first] = allele_vn.reshape(len(head_v), stop - first, ploidy)
    else:
        double_s = np.diff(own_n) == 2
        made_vsp[: len(head_v), : stop - first, 1] = -2
        made_vsp[: len(head_v), : stop - first, 0] = allele_vn[:, own_n[:-1]]
        made_vsp[: len(head_v), np.flatnonzero(double_s), 1] = allele_vn[:, own_n[:-1][double_s] + 1]
    if data.hemizygous is not None:
        alone_v, alone_s = data.hemizygous[0][head_v], data.hemizygous[1][first:stop]
        made_vsp[np.ix_(np.flatnonzero(alone_v), np.flatnonzero(alone_s), np.array([1]))] = -2
    return made_vsp


def _counts(data: GenotypeData, start_v: np.ndarray) -> np.ndarray:
    """int32 (2, rows): carriers of each row's ALT, called alleles of its record."""
    rows = slice(int(start_v[0]), int(start_v[-1]))
    called_l = np.full(rows.stop - rows.start, data.n_haplotypes)
    if data.missing_lw is not None:
        called_l -= bits.popcount_rows(data.missing_lw[rows])
    return np.stack([bits.popcount_rows(data.bits_lw[rows]), called_l]).astype(np.int32)


def join_parts(path: str | Path, layout: Layout, places: Sequence[Path]) -> None:
    """Write the folder `path` from the parts of all its records, in order; genotypes are linked, not copied."""
    import zarr
    from numcodecs import VLenUTF8

    path, head = Path(path), layout.head
    samples, records, ploidy = len(head.sample_ids), layout.n_records, _ploidy(head)
    with atomic_folder(path) as folder:
        root: Any = zarr.open_group(folder, mode="w", zarr_format=2)
        codec = _codec()

        def add(name: str, values: Any, dimensions: list[str], kind: str | None = None) -> None:
            values = np.asarray(values, dtype=np.dtypes.StringDType() if kind == "str" else kind)
            shape = tuple(max(1, size) for size in values.shape)
            # as those of call_genotype, or vcztools does not read the store
            chunk = {"variants": VARIANTS, "samples": _chunk_samples(head)}.get(dimensions[0], shape[0])
            array = root.create_array(
                name, shape=values.shape, chunks=(chunk, *shape[1:]), dtype=values.dtype,
                filters=[VLenUTF8()] if kind == "str" else None, compressors=[codec], fill_value=None,
            )  # fmt: skip
            array[...] = values
            array.attrs["_ARRAY_DIMENSIONS"] = dimensions

        lines = vcf_write.header_text(head, layout.header_lines).splitlines()[:-1]
        meta = [line[2:].split("=", 1) for line in lines]
        own = ("contig", "FILTER", "INFO", "FORMAT")
        root.attrs.update(
            {
                "vcf_zarr_version": "0.4",
                "source": f"engine {__version__}",
                "vcf_meta_information": [pair for pair in meta if pair[0] not in own],
            }
        )
        contigs = genotypes.contig_names(head)
        add("sample_id", head.sample_ids, ["samples"], "str")
        add("contig_id", contigs, ["contigs"], "str")
        if all(name in head.contig_length for name in contigs):
            add("contig_length", [head.contig_length[name] for name in contigs], ["contigs"], "<i8")
        add("filter_id", ["PASS"], ["filters"], "str")
        add("filter_description", ["All filters passed"], ["filters"], "str")
        _add_variants(add, layout, contigs, np.concatenate([np.load(place / _COUNTS) for place in places], axis=1))
        shape, chunks = (records, samples, ploidy), (VARIANTS, _chunk_samples(head), ploidy)
        root.create_array(
            "call_genotype", shape=shape, chunks=chunks, dtype="i1", compressors=[codec], filters=None, fill_value=-1,
            chunk_key_encoding={"name": "v2", "separator": "."},
        ).attrs["_ARRAY_DIMENSIONS"] = ["variants", "samples", "ploidy"]  # fmt: skip
        root["call_genotype"].attrs["description"] = "Genotype"
        phased = root.create_array(
            "call_genotype_phased", shape=shape[:2], chunks=chunks[:2], dtype="bool", compressors=[codec], filters=None,
            fill_value=bool(head.phased),
        )  # fmt: skip
        phased.attrs["_ARRAY_DIMENSIONS"] = ["variants", "samples"]
        for place in places:
            for chunk in place.iterdir():
                if chunk.name.startswith(_PHASED):
                    os.link(chunk, folder / "call_genotype_phased" / chunk.name.removeprefix(_PHASED))
                elif chunk.name != _COUNTS:
                    os.link(chunk, folder / "call_genotype" / chunk.name)
        zarr.consolidate_metadata(folder, zarr_format=2)


def _add_variants(add: Any, layout: Layout, contigs: list[str], count_2l: np.ndarray) -> None:
    head, first_r = layout.head, layout.start_r[:-1]
    records, alts_r = layout.n_records, np.diff(layout.start_r)
    most = int(alts_r.max())
    index = {name: k for k, name in enumerate(contigs)}
    record_l = np.repeat(np.arange(records), alts_r)
    alt_l = np.arange(head.n_sites) - first_r[record_l]
    has_alt_l = head.alt != "."
    allele_ra = np.full((records, most + 1), "", dtype=object)
    allele_ra[:, 0] = head.ref[first_r]
    allele_ra[record_l[has_alt_l], 1 + alt_l[has_alt_l]] = head.alt[has_alt_l]
    ac_ra = np.full((records, most), -2, dtype=np.int32)
    ac_ra[record_l, alt_l] = np.where(has_alt_l, count_2l[0], -2)
    called_r = count_2l[1][first_r]
    af_ra = np.full((records, most), _FILL_FLOAT, dtype="<f4")
    with np.errstate(invalid="ignore", divide="ignore"):
        share_l = (count_2l[0] / count_2l[1]).astype("<f4")
    af_ra[record_l, alt_l] = np.where(has_alt_l, np.where(count_2l[1] > 0, share_l, _MISSING_FLOAT), _FILL_FLOAT)
    contig_r = np.array([index[name] for name in head.contig[first_r].tolist()], dtype=np.int32)
    length_r = np.array([len(ref) for ref in head.ref[first_r]], dtype=np.int32)
    position_r = head.position_bp[first_r].astype(np.int32)
    add("variant_contig", contig_r, ["variants"], "<i4")
    add("variant_position", position_r, ["variants"], "<i4")
    add("variant_length", length_r, ["variants"], "<i4")
    add("variant_id", head.id[first_r].tolist(), ["variants"], "str")
    add("variant_id_mask", head.id[first_r] == ".", ["variants"], "?")
    add("variant_allele", allele_ra.tolist(), ["variants", "alleles"], "str")
    add("variant_quality", np.full(records, _MISSING_FLOAT, dtype="<f4"), ["variants"], "<f4")
    add("variant_filter", np.ones((records, 1), dtype=bool), ["variants", "filters"], "?")
    add("variant_AC", ac_ra, ["variants", "alt_alleles"], "<i4")
    add("variant_AN", called_r, ["variants"], "<i4")
    add("variant_AF", af_ra, ["variants", "alt_alleles"], "<f4")
    add(
        "region_index",
        _region_index(contig_r, position_r, length_r),
        ["region_index_values", "region_index_fields"],
        "<i4",
    )


def _region_index(contig_r: np.ndarray, position_r: np.ndarray, length_r: np.ndarray) -> np.ndarray:
    """A row for each contig in each chunk: chunk, contig, first and last position, last base, records."""
    rows = []
    for at in range(0, len(contig_r), VARIANTS):
        contig_v = contig_r[at : at + VARIANTS]
        edges = [0, *(np.flatnonzero(np.diff(contig_v)) + 1).tolist(), len(contig_v)]
        for low, high in pairwise(edges):
            position_v, length_v = position_r[at + low : at + high], length_r[at + low : at + high]
            end = int((position_v + length_v - 1).max())
            rows.append([at // VARIANTS, contig_v[low], position_v[0], position_v[-1], end, high - low])
    return np.array(rows, dtype=np.int32).reshape(-1, 6)


def read_vcz(path: str | Path) -> GenotypeData:
    """Read a .vcz folder of any VCF-Zarr writer (Zarr format 2 or 3), chunk of variants by chunk of variants.

    As `engine.files.vcf.read_vcf` does: one row per ALT, haploid samples own one haplotype, calls beyond two are refused.

    Raises:
        InputError: no VCF-Zarr, an array that is absent or of another shape, an allele beyond ALT, or unsorted sites.
    """
    import zarr

    path = Path(path)
    try:
        root: Any = zarr.open_group(path, mode="r")
        attributes: dict[str, Any] = dict(root.attrs)
        if "vcf_zarr_version" not in attributes:
            raise InputError("a VCF-Zarr store", "a group without vcf_zarr_version", path)
        names = [str(each) for each in root["sample_id"][:]]
        contigs = [str(each) for each in root["contig_id"][:]]
        lengths = [int(each) for each in root["contig_length"][:]] if "contig_length" in root else []
        contig_v, position_v = (
            np.asarray(root["variant_contig"][:]),
            np.asarray(root["variant_position"][:]).astype(np.int64),
        )
        id_v = np.array([str(each) or "." for each in root["variant_id"][:]], dtype=object)
        allele_va = np.array(np.asarray(root["variant_allele"][:]).tolist(), dtype=str)
        calls, phased = root["call_genotype"], root.get("call_genotype_phased")
    except InputError:
        raise
    except (KeyError, ValueError, OSError, json.JSONDecodeError, zarr.errors.BaseZarrError) as fault:
        raise InputError("a VCF-Zarr store", str(fault).splitlines()[0][:200] if str(fault) else "none", path) from None
    variants, samples = len(position_v), len(names)
    if calls.ndim != 3 or calls.shape[:2] != (variants, samples) or not 1 <= calls.shape[2] <= 2:
        raise InputError(f"call_genotype of {variants} x {samples} x 1 or 2", str(calls.shape), path)
    alts_v = np.maximum(1, (np.isin(allele_va[:, 1:], ["", "."], invert=True)).sum(axis=1))
    row_v = np.concatenate([[0], np.cumsum(alts_v)])
    bits_lw = np.zeros((int(row_v[-1]), bits.words(2 * samples)), dtype=np.uint64)
    missing_lw: np.ndarray | None = None
    haploid_s, all_phased = np.ones(samples, dtype=bool), True
    step = max(1, min(calls.chunks[0], (64 << 20) // max(1, 2 * samples)))
    for at in range(0, variants, step):
        stop = min(at + step, variants)
        call_vsp = np.asarray(calls[at:stop])
        if calls.shape[2] == 1:
            call_vsp = np.concatenate([call_vsp, np.full_like(call_vsp, -2)], axis=2)
        if (
            call_vsp.max(axis=(1, 2), initial=0) >= np.array([(each != "").sum() for each in allele_va[at:stop]])
        ).any():
            raise InputError("alleles of the variant", "an allele number beyond ALT", path)
        called_vs = (call_vsp >= 0).all(axis=2) & (call_vsp[:, :, 0] != call_vsp[:, :, 1])
        all_phased &= not (called_vs & ~(np.asarray(phased[at:stop]) if phased is not None else False)).any()
        haploid_s &= (call_vsp[:, :, 1] == -2).all(axis=0)
        call_vn = call_vsp.reshape(stop - at, -1)
        row_alt = np.arange(row_v[at], row_v[stop]) - np.repeat(row_v[at:stop], alts_v[at:stop]) + 1
        repeated_rn = np.repeat(call_vn, alts_v[at:stop], axis=0)
        bits_lw[row_v[at] : row_v[stop]] = bits.pack(repeated_rn == row_alt[:, None])
        if (repeated_rn < 0).any():
            missing_lw = np.zeros_like(bits_lw) if missing_lw is None else missing_lw
            missing_lw[row_v[at] : row_v[stop]] = bits.pack(repeated_rn < 0)
    variant_l = np.repeat(np.arange(variants), alts_v)
    alt_l = np.arange(len(variant_l)) - row_v[:-1][variant_l] + 1
    padded_va = np.concatenate([allele_va, np.full((variants, 1), "")], axis=1)
    meta = {str(key): str(value) for key, value in attributes.get("vcf_meta_information", [])}
    bits_lw, missing_lw, first = genotypes.without_second(bits_lw, missing_lw, haploid_s)
    data = GenotypeData(
        bits_lw, int(first[-1]), missing_lw, all_phased, np.array(contigs, dtype=str)[contig_v][variant_l],
        position_v[variant_l], id_v[variant_l], allele_va[variant_l, 0].astype(object),
        np.array([each or "." for each in padded_va[variant_l, alt_l].tolist()], dtype=object),
        np.where(alts_v[variant_l] > 1, alt_l, 0).astype(np.int16), names, first, dict(zip(contigs, lengths)),
        meta.get("reference"),
    )  # fmt: skip
    genotypes.check_sorted(data.contig, data.position_bp, path)
    return data
