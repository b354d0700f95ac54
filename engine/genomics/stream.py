"""Large genotype files part by part: plan, write parts, finish. Whoever is interrupted loses the part at hand.

A job is a file to be written and what it is to hold. Its parts are stretches of records, so long that a part is some half a
billion genotypes; each is written whole or not at all into the folder `FILE.parts` and depends on nothing but the job, so that
one process or a hundred may write them, again where one died. `finish` joins them and removes the folder.

Memory is bounded: the sites and people by name, one block of packed alleles (32 MiB, or 1,000 records where those are more),
what a writer lays out of it, and what the source of alleles holds. For the copying model that is the packed panel and one
stretch of the paths of all people, which lie on disk (`held_paths`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine import __version__, atomic, provenance
from engine.errors import InputError, UsageError
from engine.files import genotype_files, genotypes, ploidy
from engine.files.genotypes import Block, GenotypeData, Layout
from engine.genomics import held_paths
from engine.genomics.held_paths import HeldPaths
from engine.genomics.panel import HaplotypePanel, Samples, genotypes_from_panel, panel_from_genotypes, synthetic_ids
from engine.kernels import bits

Rows = Callable[[int, int], np.ndarray]  # first row, end -> uint64 (rows, words)
Progress = Callable[[int, int], None]  # (records done, of)

_BLOCK_BYTES = 32 << 20  # of packed alleles
_RECORDS = 1000  # blocks are multiples of it: VCF-Zarr's chunks
_PART_GENOTYPES = 1 << 29


@dataclass(frozen=True)
class Job:
    """A file to be written: its layout, the group of each person (str (S,) or None), and a JSON-ready record that tells
    this job from others and goes on to `finish`."""

    path: Path
    layout: Layout
    groups: np.ndarray | None
    record: dict[str, Any]

    @property
    def folder(self) -> Path:
        return parts_folder(self.path)

    @property
    def edge_p(self) -> np.ndarray:
        """int64 (P + 1,), first record of each part, and the number of records."""
        records, people = self.layout.n_records, max(1, len(self.layout.head.sample_ids))
        step = max(1, _PART_GENOTYPES // people // _RECORDS) * _RECORDS
        return np.array([*range(0, records, step), records], dtype=np.int64)

    def place(self, part: int) -> Path:
        """Where a part lies once it is whole."""
        return self.folder / f"part-{part:06d}"


def parts_folder(path: str | Path) -> Path:
    """`dir/name.bcf` -> `dir/name.bcf.parts`."""
    path = Path(path)
    return path.with_name(path.name + ".parts")


def start(job: Job) -> None:
    """Lay down the plan of a job, or find it laid down.

    Raises:
        UsageError: the folder of parts is that of another job. What the format refuses (`genotype_files`).
    """
    genotype_files.writer(job.path).check(job.path, job.layout)
    plan = {"record": job.record, "records": job.layout.n_records, "parts": len(job.edge_p) - 1}
    path = job.folder / "plan.json"
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(plan)):
            raise UsageError(
                "parts of this job", "those of another (model, n, group, seed or version)", job.folder,
                "another --out, or remove the folder",
            )  # fmt: skip
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    _save_layout(job)
    atomic.write_json(path, plan)


def write_parts(job: Job, rows: Rows, *, shard: tuple[int, int] = (0, 1), progress: Progress | None = None) -> int:
    """Write the parts of shard i of k that are not there yet, from `rows`; returns how many those were."""
    index, count = shard
    edge_p, module, written = job.edge_p, genotype_files.writer(job.path), 0
    parts = len(edge_p) - 1
    first, stop = index * parts // count, (index + 1) * parts // count
    for part in range(first, stop):
        if not job.place(part).exists():
            blocks = _blocks(job.layout, rows, int(edge_p[part]), int(edge_p[part + 1]))
            module.write_part(job.path, job.layout, _told(blocks, job, int(edge_p[first]), int(edge_p[stop]), progress),
                              job.place(part))  # fmt: skip
            written += 1
        if progress is not None:
            progress(int(edge_p[part + 1] - edge_p[first]), int(edge_p[stop] - edge_p[first]))
    return written


def _told(blocks: Iterator[Block], job: Job, first: int, stop: int, progress: Progress | None) -> Iterator[Block]:
    for block in blocks:
        if progress is not None:
            progress(block.first_record - first, stop - first)
        yield block


def _blocks(layout: Layout, rows: Rows, first: int, stop: int) -> Iterator[Block]:
    """Records first .. stop-1 with their alleles, a bounded number at a time."""
    words = bits.words(layout.head.n_haplotypes)
    step = max(1, _BLOCK_BYTES // max(1, 8 * words) // _RECORDS) * _RECORDS
    for at in range(first, stop, step):
        start_r = layout.start_r[at : min(at + step, stop) + 1]
        low, high = int(start_r[0]), int(start_r[-1])
        cut = genotypes.rows(layout.head, low, high, rows(low, high))
        yield Block(ploidy.with_absent(cut), start_r - low, at)


def missing_parts(job: Job) -> list[int]:
    """Parts that are not there yet."""
    return [part for part in range(len(job.edge_p) - 1) if not job.place(part).exists()]


def join(job: Job) -> None:
    """Make the file of its parts; raises InputError where one is absent. The parts stay until `remove_parts`."""
    absent = missing_parts(job)
    if absent:
        total = len(job.edge_p) - 1
        shards = f"{len(absent)} of {total} absent, the first {absent[0]}"
        raise InputError(
            "all parts", shards, job.folder, "running the shards again: those that are done are passed over"
        )
    places = [job.place(part) for part in range(len(job.edge_p) - 1)]
    genotype_files.writer(job.path).join_parts(job.path, job.layout, places)


def remove_parts(path: str | Path) -> None:
    """Remove the folder of parts of a file that is done."""
    shutil.rmtree(parts_folder(path), ignore_errors=True)


def load(path: str | Path) -> Job | None:
    """The job whose parts lie beside `path`; None where there are none.

    Raises:
        InputError: the folder holds something else.
    """
    folder = parts_folder(path)
    if not (folder / "plan.json").exists():
        return None
    try:
        record = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["record"]
        with np.load(folder / "layout.npz") as held:
            layout, groups = _layout_of(held)
    except (OSError, ValueError, KeyError) as fault:
        raise InputError("the plan of a job", str(fault), folder, "removing the folder and beginning anew") from None
    return Job(Path(path), layout, groups, record)


def _save_layout(job: Job) -> None:
    """As arrays and UTF-8 text, a line for each value: no value can hold a newline, because they come from lines."""
    head = job.layout.head

    def text(values: Any) -> np.ndarray:
        return np.frombuffer("\n".join(map(str, values)).encode(), dtype=np.uint8)

    held: dict[str, Any] = {
        "start_r": job.layout.start_r, "position_bp": head.position_bp, "alt_index": head.alt_index,
        "haplotypes_of_sample": head.haplotypes_of_sample, "contig": text(head.contig), "id": text(head.id),
        "ref": text(head.ref), "alt": text(head.alt), "sample_ids": text(head.sample_ids),
        "rest": text([json.dumps([head.contig_length, head.assembly, head.phased, list(job.layout.header_lines),
                                  job.layout.sex])]),
    }  # fmt: skip
    if job.groups is not None:
        held["groups"] = text(job.groups)
    if head.hemizygous is not None:
        held["hemizygous_l"], held["hemizygous_s"] = head.hemizygous
    with atomic.atomic_path(job.folder / "layout.npz") as partial, open(partial, "wb") as stream:
        np.savez(stream, **held)


def _layout_of(held: Any) -> tuple[Layout, np.ndarray | None]:
    def lines(name: str) -> list[str]:
        return list(held[name].tobytes().decode().split("\n"))

    def objects(name: str) -> np.ndarray:
        return np.array(lines(name), dtype=object)

    first = held["haplotypes_of_sample"]
    contig_length, assembly, phased, header_lines, sex = json.loads(lines("rest")[0])
    head = GenotypeData(
        genotypes.without_alleles(len(held["position_bp"]), int(first[-1])), int(first[-1]), None, phased,
        np.array(lines("contig"), dtype=str), held["position_bp"], objects("id"), objects("ref"), objects("alt"),
        held["alt_index"], lines("sample_ids") if len(first) > 1 else [], first, contig_length, assembly,
        hemizygous=(held["hemizygous_l"], held["hemizygous_s"]) if "hemizygous_l" in held else None,
    )  # fmt: skip
    groups = np.array(lines("groups"), dtype=str) if "groups" in held else None
    return Layout(head, held["start_r"], tuple(header_lines), sex), groups


@dataclass(frozen=True)
class Source:
    """What is to be written: all sites and people, the group of each person, and whence alleles come.

    joinable: genotypes at the same sites from which the rows that make one record are told (`genotypes.record_starts`).
    """

    head: GenotypeData
    groups: np.ndarray
    rows: Rows
    joinable: GenotypeData
    sex: list[str] | None = None
    held: HeldPaths | None = None  # the paths, where alleles are made of them

    def layout(self, header_lines: list[str]) -> Layout:
        return Layout(self.head, genotypes.record_starts(self.joinable), tuple(header_lines), self.sex)


def of_panel(panel: HaplotypePanel, path: Path | None = None) -> Source:
    """A panel in memory, phased, with groups and with nothing missing but what hemizygous people do not have."""
    assert panel.samples.group is not None
    data = genotypes_from_panel(panel)
    if path is not None and path.name.endswith((".pgen", ".bed")):
        data = ploidy.with_par_contigs(data)
    sex = None if panel.samples.sex is None else [str(each) for each in panel.samples.sex]
    return Source(data, panel.samples.group, lambda first, stop: data.bits_lw[first:stop], data, sex)


def source(
    model: Any,
    n: int,
    *,
    groups: str | None,
    seed: int,
    start: int,
    folder: Path | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> Source:
    """People start .. start+n-1 of a model: by paths that are materialised block by block, where it has paths; else whole.

    Args:
        folder: where the paths of many people may lie (`held_paths.draw`): a folder of this model and request alone. None:
            they are held in memory.
        shard: (i, k) of the processes that share the drawing.
    """
    if not hasattr(model, "materialise"):
        return of_panel(model.sample(n, groups=groups, seed=seed, start=start, progress=progress))

    def paths(first: int, count: int) -> tuple[Any, np.ndarray]:
        made: tuple[Any, np.ndarray] = model.paths(count, groups=groups, seed=seed, start=start + first)
        return made

    held = held_paths.draw(model, n, paths, folder=folder, shard=shard, progress=progress)
    return of_paths(held, np.array(model.group_names, dtype=str)[held.group_n], start=start)


def paths_folder(path: str | Path, **what: Any) -> Path:
    """Where the drawn paths of a file lie: in its folder of parts, under a name that another request does not have."""
    told = json.dumps({"engine": __version__, **provenance.commit(), **what}, sort_keys=True)
    return parts_folder(path) / f"paths-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def of_paths(held: HeldPaths, groups: np.ndarray, *, start: int = 0, sex: list[str] | None = None) -> Source:
    """People start, start + 1, ... with these groups, str (n,), by their paths."""
    model, n = held.model, len(groups)
    samples = Samples(model.samples.ids, None, None, model.samples.first_haplotype)
    reference = HaplotypePanel(
        model.bits_lw, None, model.sites, samples, True, dict(model.contig_length), model.assembly
    )
    joinable = genotypes_from_panel(reference)
    first = 2 * np.arange(n + 1, dtype=np.int64)
    head = replace(
        joinable, bits_lw=genotypes.without_alleles(model.n_sites, 2 * n), n_haplotypes=2 * n, haplotypes_of_sample=first,
        sample_ids=synthetic_ids(start, n),
    )  # fmt: skip
    return Source(head, groups, held.rows, joinable, sex, held)


def panel_of(job: Job) -> HaplotypePanel:
    """People and sites of a job as a panel without alleles, for tables."""
    panel = panel_from_genotypes(job.layout.head)
    sex = None if job.layout.sex is None else np.array(job.layout.sex, dtype=str)
    return replace(panel, samples=replace(panel.samples, group=job.groups, sex=sex))
