"""Panels of simulated people for load tests and examples: msprime, block of the contig by block, written as it comes.

A contig is made of blocks of some megabases. Each is a coalescent simulation of its own with its own seed, so that time
grows with the length of the contig and not with its square, memory is that of one block, and a run that was cut short goes on
at the block it was at. The price: haplotypes are not linked across the border of two blocks. The genetic map that is
written beside the panel says so: at each border it has a step of 1 cM.

Mutations follow Jukes and Cantor, one letter for another: a site that was hit twice can have two or three ALT alleles. REF is
the ancestral allele. People stand in the order of their groups.

Sources: Baumdicker et al., "Efficient ancestry and mutation simulation with msprime 1.0", Genetics 220:iyab229, 2022; the
out-of-Africa model of Gutenkunst et al., PLoS Genetics 5:e1000695, 2009 (Table 1, maximum likelihood).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine import __version__, atomic, provenance, seeding
from engine.errors import InputError, Unsupported, UsageError, closest
from engine.files import genetic_map, genotype_files, genotypes, ploidy
from engine.files.genotype_files import beside
from engine.files.genotypes import GenotypeData, Layout
from engine.genomics import stream
from engine.genomics.panel import synthetic_ids, write_samples
from engine.kernels import bits

Progress = Callable[[str, int, int], None]  # (what, done, total)

DEMOGRAPHIES: dict[str, tuple[str, ...]] = {
    "out-of-africa": ("AFR", "EUR", "EAS"),
    "split": ("A", "B"),
    "constant": ("all",),
}
_BORDER_CM = 1.0  # of the map, at the border of two blocks: enough for a copying model to change there
_VARIANTS = 1000  # unpacked at one time


@dataclass(frozen=True)
class Simulation:
    """What is to be simulated.

    Attributes:
        people: group -> diploid people; the groups are those of `demography`.
        sites: rows wanted (one per ALT allele); blocks are added until they are there. None: as many as `length_bp` gives.
        length_bp: length of the contig. None: as long as `sites` asks for.
        contig: its name.
        demography: a key of DEMOGRAPHIES: "out-of-africa"; "split", two populations of 10,000 that parted 2,000
            generations ago; "constant", one population of 10,000.
        mutation_rate, recombination_rate: per base and generation; a genetic map takes the place of the latter.
        block_bp: length of a block.
        seed: block b of the panel depends on (this record but for sites and length_bp, the map, b) only.
    """

    people: Mapping[str, int]
    sites: int | None = None
    length_bp: int | None = None
    contig: str = "1"
    demography: str = "out-of-africa"
    mutation_rate: float = 1.25e-8
    recombination_rate: float = 1e-8
    block_bp: int = 5_000_000
    seed: int = 0

    def checked(self) -> Simulation:
        """Itself; UsageError where a value cannot be."""
        if self.demography not in DEMOGRAPHIES:
            raise UsageError("a demography", repr(self.demography), "--demography",
                             closest(self.demography, list(DEMOGRAPHIES)))  # fmt: skip
        known = DEMOGRAPHIES[self.demography]
        for name, count in self.people.items():
            if name not in known:
                raise UsageError(f"groups of '{self.demography}'", f"'{name}'", "--groups", closest(name, list(known)))
            if count < 0:
                raise UsageError("0 people or more of a group", f"{count} of {name}", "--groups")
        if sum(self.people.values()) < 1:
            raise UsageError("at least one person", "none", "-n")
        if self.sites is None and self.length_bp is None:
            raise UsageError("--sites or --length-mb", "neither", "simulate")
        if min(self.sites or 1, self.length_bp or 1, self.block_bp) < 1:
            raise UsageError("numbers of sites and lengths of 1 or more", "less", "simulate")
        if not 0 < self.mutation_rate < 1e-4 or not 0 <= self.recombination_rate < 1e-4:
            raise UsageError("rates per base and generation below 1e-4",
                             f"{self.mutation_rate:g} and {self.recombination_rate:g}", "simulate")  # fmt: skip
        return self


def equal_groups(demography: str, n: int) -> dict[str, int]:
    """n people over the groups of a demography, as equally as can be."""
    names = DEMOGRAPHIES.get(demography, ("all",))
    return {name: n // len(names) + (k < n % len(names)) for k, name in enumerate(names)}


def simulate_command(
    out: str | Path,
    simulation: Simulation,
    *,
    map: str | Path | genetic_map.GeneticMap | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a simulated panel in any format of `engine.files.genotype_files`, with `OUT.samples.tsv` (groups), `OUT.gmap`
    (`pos chr cM`, for `--map`) and `OUT.provenance.json` beside it.

    Blocks and parts lie in `OUT.parts` until all is done: the same command again goes on where it was.

    Args:
        map: genetic map of the contig; recombination follows it from its first point on. None: `recombination_rate`.

    Returns:
        {"out", "people", "haplotypes", "sites", "records", "length_bp", "groups", "map", "samples"}.

    Raises:
        UsageError: a bad request, suffix or rate, `out` exists, or a folder of parts of another request.
        Unsupported: msprime is not installed. InputError: the map cannot be read.
    """
    out, simulation = Path(out), simulation.checked()
    genotype_files.suffix_of(out)
    _msprime()
    if out.exists():
        raise UsageError("a file that does not exist yet", "an existing one", out, "another --out, or remove it first")
    own = map
    if isinstance(map, str | Path):
        own = genetic_map.choose_map(list(genetic_map.read_maps(map).values()), simulation.contig, where=map)
    assert own is None or isinstance(own, genetic_map.GeneticMap)
    request = {
        **asdict(simulation),
        "people": dict(simulation.people),
        "map": None if own is None else _map_record(own),
    }
    blocks = _Blocks(stream.parts_folder(out) / "blocks", simulation, own)
    blocks.begin(request)
    blocks.make(progress)
    layout, length_bp = blocks.layout()
    groups = np.repeat(list(simulation.people), list(simulation.people.values())).astype(str)
    if out.name.endswith((".pgen", ".bed")):
        layout = Layout(ploidy.with_par_contigs(layout.head), layout.start_r, layout.header_lines)
    job = stream.Job(out, layout, groups, {"request": request, "seed": simulation.seed})
    stream.start(job)
    stream.write_parts(
        job, blocks.rows, progress=None if progress is None else lambda done, total: progress("writing", done, total)
    )
    stream.join(job)
    write_samples(stream.panel_of(job), beside(out, "samples.tsv"))
    atomic.write_text(beside(out, "gmap"), blocks.map_text(length_bp))
    record = provenance.record("genomics simulate", config=request, seed=simulation.seed, synthetic=True,
                               extra={"file": out.name, "sha256": provenance.input_record(out)["sha256"]})  # fmt: skip
    atomic.write_json(beside(out, "provenance.json"), record)
    stream.remove_parts(out)
    return {
        "out": str(out), "people": len(groups), "haplotypes": 2 * len(groups), "sites": layout.head.n_sites,
        "records": layout.n_records, "length_bp": length_bp, "groups": dict(simulation.people),
        "map": str(beside(out, "gmap")), "samples": str(beside(out, "samples.tsv")),
    }  # fmt: skip


def demography(name: str) -> Any:
    """The `msprime.Demography` of a name; sizes are diploid, times in generations (of 25 years in out-of-africa)."""
    msprime = _msprime()
    model = msprime.Demography()
    if name == "constant":
        model.add_population(name="all", initial_size=10_000)
    elif name == "split":
        for each in ("A", "B", "before"):
            model.add_population(name=each, initial_size=10_000)
        model.add_population_split(time=2_000, derived=["A", "B"], ancestral="before")
    elif name == "out-of-africa":
        years, grow_eur, grow_eas = 25, 0.004, 0.0055
        split_eur_eas = 21_200 / years
        model.add_population(name="AFR", initial_size=12_300)
        model.add_population(name="EUR", initial_size=1_000 * math.exp(grow_eur * split_eur_eas), growth_rate=grow_eur)
        model.add_population(name="EAS", initial_size=510 * math.exp(grow_eas * split_eur_eas), growth_rate=grow_eas)
        model.add_population(name="OOA", initial_size=2_100)
        model.add_population(name="AMH", initial_size=12_300)
        model.add_population(name="ANC", initial_size=7_300)
        model.set_symmetric_migration_rate(["AFR", "EUR"], 3e-5)
        model.set_symmetric_migration_rate(["AFR", "EAS"], 1.9e-5)
        model.set_symmetric_migration_rate(["EUR", "EAS"], 9.6e-5)
        model.add_population_split(time=split_eur_eas, derived=["EUR", "EAS"], ancestral="OOA")
        model.add_symmetric_migration_rate_change(time=split_eur_eas, populations=["AFR", "OOA"], rate=25e-5)
        model.add_population_split(time=140_000 / years, derived=["AFR", "OOA"], ancestral="AMH")
        model.add_population_split(time=220_000 / years, derived=["AMH"], ancestral="ANC")
    else:
        raise UsageError("a demography", repr(name), "demography", closest(name, list(DEMOGRAPHIES)))
    return model


@dataclass
class _Blocks:
    """The blocks of a contig as files of `folder`: packed rows and the columns of their sites, each whole or absent."""

    folder: Path
    simulation: Simulation
    map: genetic_map.GeneticMap | None
    held: tuple[int, np.ndarray] | None = None  # the block that was asked for last
    first_b: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))  # rows before each block, and all

    def begin(self, request: dict[str, Any]) -> None:
        """Lay down the request, or find it laid down; UsageError for another one."""
        plan = self.folder / "request.json"
        plain = json.loads(json.dumps({**request, "version": __version__}))
        if plan.exists():
            if json.loads(plan.read_text(encoding="utf-8")) != plain:
                raise UsageError("blocks of this request", "those of another", self.folder,
                                 "another --out, or remove the folder of parts")  # fmt: skip
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.write_json(plan, plain)

    def place(self, b: int) -> Path:
        return self.folder / f"block-{b:06d}.npz"

    def make(self, progress: Progress | None) -> None:
        """Simulate the blocks that are not there yet."""
        wanted, length_bp = self.simulation.sites, self.simulation.length_bp
        rows, b = [0], 0
        while (wanted is None or rows[-1] < wanted) and (length_bp is None or b * self.simulation.block_bp < length_bp):
            if not self.place(b).exists():
                self._make_block(b)
            with np.load(self.place(b)) as held:
                rows.append(rows[-1] + len(held["position_bp"]))
            b += 1
            if progress is not None:
                done, total = (rows[-1], wanted) if wanted else (b * self.simulation.block_bp, length_bp or 1)
                progress("simulating", min(done, total), total)
        if wanted is not None and rows[-1] < wanted:
            raise InputError(f"{wanted} sites", f"{rows[-1]} on {length_bp} bp", "simulate", "a longer --length-mb")
        if rows[-1] == 0:
            raise InputError("a site", "none", "simulate", "a longer --length-mb or more people")
        self.first_b = np.array(rows, dtype=np.int64)

    def _edges(self, b: int) -> tuple[int, int]:
        """Positions before the first and up to the last base of block b."""
        first, size, end = b * self.simulation.block_bp, self.simulation.block_bp, self.simulation.length_bp
        return first, first + size if end is None else min(first + size, end)

    def _make_block(self, b: int) -> None:
        msprime, wanted = _msprime(), self.simulation
        first, stop = self._edges(b)
        seed = lambda what: 1 + seeding.derived_seed(wanted.seed, f"genomics.simulate.{what}", b) % (2**31 - 2)  # noqa: E731
        trees = msprime.sim_ancestry(
            samples=[msprime.SampleSet(count, population=name, ploidy=2) for name, count in wanted.people.items() if count],
            demography=demography(wanted.demography), sequence_length=stop - first,
            recombination_rate=self._rate(msprime, first, stop), random_seed=seed("ancestry"),
        )  # fmt: skip
        trees = msprime.sim_mutations(
            trees, rate=wanted.mutation_rate, random_seed=seed("mutations"), model=msprime.JC69()
        )
        n = 2 * sum(wanted.people.values())
        rows, position, ref, alt, alt_index = [np.zeros((0, bits.words(n)), dtype=np.uint64)], [], [], [], []
        waiting: list[np.ndarray] = []
        for variant in trees.variants():
            codes = variant.genotypes
            carried = [k for k in range(1, len(variant.alleles)) if (codes == k).any()]
            for number, k in enumerate(carried, start=1):
                waiting.append((codes == k).view(np.uint8))
                position.append(first + int(variant.site.position) + 1)
                ref.append(variant.alleles[0])
                alt.append(variant.alleles[k])
                alt_index.append(number if len(carried) > 1 else 0)
            if len(waiting) >= _VARIANTS:
                rows.append(bits.pack(np.array(waiting)))
                waiting.clear()
        if waiting:
            rows.append(bits.pack(np.array(waiting)))
        with atomic.atomic_path(self.place(b)) as partial, open(partial, "wb") as target:
            np.savez(
                target, bits_lw=np.concatenate(rows), position_bp=np.array(position, dtype=np.int64),
                ref=np.array(ref, dtype="S1"), alt=np.array(alt, dtype="S1"), alt_index=np.array(alt_index, dtype=np.int16),
            )  # fmt: skip

    def _rate(self, msprime: Any, first: int, stop: int) -> Any:
        """Recombination in the block: the wanted rate, or that of the map between its points."""
        if self.map is None:
            return self.simulation.recombination_rate
        inside = self.map.position_bp[(self.map.position_bp > first) & (self.map.position_bp < stop)]
        edge_bp = np.concatenate([[first], inside, [stop]])
        rate = np.diff(self.map.interpolate(edge_bp)) / 100 / np.diff(edge_bp)
        return msprime.RateMap(position=edge_bp - first, rate=rate)

    def layout(self) -> tuple[Layout, int]:
        """Sites and people of all blocks, cut to the number of sites that was asked for, and the length of the contig."""
        columns: dict[str, list[np.ndarray]] = {name: [] for name in ("position_bp", "ref", "alt", "alt_index")}
        blocks = len(self.first_b) - 1
        for b in range(blocks):
            with np.load(self.place(b)) as held:
                for name, parts in columns.items():
                    parts.append(held[name])
        position_bp, ref, alt, alt_index = (np.concatenate(parts) for parts in columns.values())
        sites = len(position_bp) if self.simulation.sites is None else self.simulation.sites
        if sites < len(position_bp) and alt_index[sites] > 1:  # a site is not cut in two
            sites = int(np.flatnonzero(alt_index[:sites] == 1)[-1])
        letter = {code: chr(code[0]) for code in (b"A", b"C", b"G", b"T")}
        text = lambda codes: np.array([letter[code] for code in codes[:sites].tolist()], dtype=object)  # noqa: E731
        contig, n = self.simulation.contig, 2 * sum(self.simulation.people.values())
        length_bp = self.simulation.length_bp or self._edges(blocks - 1)[1]
        names = np.empty(sites, dtype=object)
        names[:] = [f"sim{at}" for at in position_bp[:sites].tolist()]
        data = GenotypeData(
            genotypes.without_alleles(sites, n), n, None, True, np.full(sites, contig), position_bp[:sites], names,
            text(ref), text(alt), alt_index[:sites], synthetic_ids(0, n // 2), 2 * np.arange(n // 2 + 1, dtype=np.int64),
            {contig: length_bp},
        )  # fmt: skip
        lines = (
            "##engine_data=SYNTHETIC: simulated with msprime, no record describes a living person",
            f"##engine_command=genomics simulate, engine {__version__}, {self.simulation.demography}, "
            f"seed {self.simulation.seed}",
        )
        return Layout(data, np.append(np.flatnonzero(data.alt_index <= 1), sites).astype(np.int64), lines), length_bp

    def rows(self, first: int, stop: int) -> np.ndarray:
        """uint64 (stop - first, words): packed alleles, from the blocks that hold them."""
        made = []
        low_b = int(np.searchsorted(self.first_b, first, side="right")) - 1
        for b in range(low_b, int(np.searchsorted(self.first_b, stop, side="left"))):
            if self.held is None or self.held[0] != b:
                with np.load(self.place(b)) as held:
                    self.held = (b, held["bits_lw"])
            at = int(self.first_b[b])
            made.append(self.held[1][max(0, first - at) : stop - at])
        return np.concatenate(made)

    def map_text(self, length_bp: int) -> str:
        """The genetic map of the contig, `pos chr cM`: two points a block or those of the map, and 1 cM more at each border."""
        lines, contig = ["pos\tchr\tcM"], self.simulation.contig
        base_cm = 0.0
        for b in range(len(self.first_b) - 1):
            first, stop = self._edges(b)
            if self.map is None:
                point_bp = np.array([first + 1, stop])
                point_cm = (point_bp - first) * 100 * self.simulation.recombination_rate
            else:
                own = self.map.position_bp
                point_bp = np.unique(np.concatenate([[first + 1], own[(own > first + 1) & (own < stop)], [stop]]))
                point_cm = self.map.interpolate(point_bp) - float(self.map.interpolate(np.array([first]))[0])
            lines += [f"{bp}\t{contig}\t{base_cm + cm:.8f}" for bp, cm in zip(point_bp.tolist(), point_cm.tolist())]
            base_cm += float(point_cm[-1]) + _BORDER_CM
        return "\n".join(lines) + "\n"


def _map_record(own: genetic_map.GeneticMap) -> list[str]:
    points = hashlib.sha256(own.position_bp.tobytes() + own.position_cm.tobytes()).hexdigest()
    return [own.source, points]


def _msprime() -> Any:
    try:
        import msprime
    except ImportError:
        raise Unsupported(
            "msprime, which simulates panels", "none", "engine genomics simulate",
            "pip install -c constraints.txt -e '.[demo]'",
        ) from None  # fmt: skip
    return msprime
