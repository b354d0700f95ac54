"""The engine's own entrants and the controls: each trains on the training side, draws samples, and leaves an entry.

Controls stand in every table, because a metric is only worth what it says of them:
    ceiling      real people that nobody trained on, handed in as if synthetic: as good as a perfect generator.
    copycat      people of the training side: near perfect in fidelity, and the audit has to convict it.
    marginals    every site or voxel drawn by itself from its own training values: no structure at all.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine import __version__, devices, provenance, seeding
from engine.atomic import atomic_folder
from engine.benchmark.entry import Entry, write_entry
from engine.benchmark.sides import Sides, grid_of, on_grid, write_table
from engine.benchmark.tracks import Entrant, Track
from engine.errors import UsageError, closest
from engine.training.clock import cpu_seconds

CONTROLS = ("ceiling", "copycat", "marginals")


@dataclass(frozen=True)
class Task:
    """What an entrant is given; `budget_seconds` is training time by the clock of the track (`budget_of`)."""

    track: Track
    sides: Sides
    out: Path
    seed: int
    budget_seconds: float
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Spent:
    """Seconds of the wall and of all processors."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Spent:
        """Both clocks."""
        return cls(time.monotonic(), cpu_seconds())

    def until_now(self) -> Spent:
        """What went by since these clocks were read."""
        now = Spent.now()
        return Spent(now.wall - self.wall, now.cpu - self.cpu)


NOTHING = Spent(0.0, 0.0)


@dataclass(frozen=True)
class Made:
    """What an entrant leaves: the name of its samples in `out`, and what it says of how they came about."""

    samples: str
    recipe: str
    training: Spent
    precision: str
    declared: dict[str, float] = field(default_factory=dict)


def enter(
    track: Track, name: str, sides: Sides, out: str | Path, *, seed: int, budget_seconds: float, threads: int = 1
) -> Entry:
    """Train and sample one of the engine's entrants or a control, and write the entry into the new folder `out`.

    Raises:
        UsageError: no such entrant on this kind of track, or `out` exists.
    """
    known = GENOTYPE_ENTRANTS if track.modality == "genotypes" else SCAN_ENTRANTS
    if name not in known:
        raise UsageError(f"an entrant for {track.modality}", f"'{name}'", "--entrants", closest(name, list(known)))
    wanted = track.entrants.get(name, Entrant())
    with atomic_folder(out) as folder:
        begun = time.monotonic()
        made = known[name](Task(track, sides, folder, seed, budget_seconds, wanted.settings))
        machine = devices.machine()
        entry = Entry(
            name=name,
            version=f"engine {__version__}, commit {provenance.commit()['commit'][:12]}",
            authors=["The engine authors"],
            track=track.name,
            seed=seed,
            recipe=made.recipe,
            training_data_sha256=sides.train_sha256,
            training_seconds=round(made.training.wall, 3),
            sampling_seconds=round(time.monotonic() - begun - made.training.wall, 3),
            training_cpu_seconds=round(made.training.cpu, 3),
            budget_seconds=budget_seconds,
            budget_of=track.budget_of,
            tuning_trials=wanted.tuning_trials,
            peak_memory_bytes=peak_memory_bytes(),
            hardware=", ".join([machine["cpu"], f"{machine['memory_gib']} GiB", *machine["gpus"]]),
            threads=threads,
            precision=made.precision,
            samples=made.samples,
            declared=made.declared,
        )
        write_entry(folder, entry)
    return entry


def peak_memory_bytes() -> int:
    """Largest resident memory of this process.

    VmHWM is asked where the system has it: `getrusage` would also count the peak of the process this one was started
    from.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---- genotypes -------------------------------------------------------------------------------------------------------


def _write_panel(task: Task, panel: Any) -> str:
    from engine.genomics.panel import write_panel

    write_panel(panel, task.out / "samples.bcf", header_lines=["##engine_data=BENCHMARK: samples of a generator"])
    return "samples.bcf"


def _people(task: Task, side: str) -> Any:
    """Real people of a side, as many as samples are asked for, drawn by the seed and given the ids of synthetic ones."""
    from engine.genomics.panel import read_panel, synthetic_ids

    panel = read_panel(task.sides.side(side))
    wanted = task.track.samples
    if panel.n_samples < wanted:
        raise UsageError(f"at least {wanted} people on the side '{side}'", str(panel.n_samples), task.track.name)
    order = seeding.generator(task.seed, f"benchmark.{side}").permutation(panel.n_samples)[:wanted]
    drawn = panel.select(samples=np.sort(order))
    return replace(drawn, samples=replace(drawn.samples, ids=synthetic_ids(0, wanted)))


def _ceiling_people(task: Task) -> Made:
    return Made(
        _write_panel(task, _people(task, "fresh")), "real people of the fresh side, drawn by the seed", NOTHING, "exact"
    )


def _copycat_people(task: Task) -> Made:
    return Made(
        _write_panel(task, _people(task, "train")), "people of the training side, as they are", NOTHING, "exact"
    )


def _baseline(kind: str, recipe: str) -> Callable[[Task], Made]:
    def entrant(task: Task) -> Made:
        from engine.errors import Unsupported
        from engine.genomics.baselines import BASELINES
        from engine.genomics.panel import read_panel

        begun = Spent.now()
        train = read_panel(task.sides.side("train"), map=task.sides.map, samples_tsv=task.sides.groups)
        model = BASELINES[kind](train, **task.settings)
        spent = begun.until_now()
        samples = _write_panel(task, model.sample(task.track.samples, seed=task.seed))
        try:
            nats_n = model.log_likelihood(read_panel(task.sides.side("test")))
            declared = {"test_nats": float(nats_n.mean())}
        except Unsupported:
            declared = {}
        return Made(samples, recipe, spent, "float64", declared)

    return entrant


def _li_stephens(task: Task) -> Made:
    from engine.genomics.commands import fit_command, sample_command, score_command

    overrides = [f"{key}={value}" for key, value in task.settings.items()]
    begun = Spent.now()
    run = task.out / "run"
    fit_command(task.sides.side("train"), map=task.sides.map, samples=task.sides.groups, overrides=overrides, out=run)
    spent = begun.until_now()
    sample_command(run, task.track.samples, out=task.out / "samples.bcf", seed=task.seed)
    scored = score_command(run, task.sides.side("test"))
    shutil.rmtree(run)  # the run holds the reference panel; an entry holds samples only
    settings = " ".join(f"--set {text}" for text in overrides)
    recipe = f"engine genomics fit {settings}; engine genomics sample --seed {task.seed}"
    return Made("samples.bcf", " ".join(recipe.split()), spent, "float32", {"test_nats": float(scored["mean_nats"])})


GENOTYPE_ENTRANTS: dict[str, Callable[[Task], Made]] = {
    "ceiling": _ceiling_people,
    "copycat": _copycat_people,
    "marginals": _baseline("independent", "independent sites: allele frequencies by group"),
    "markov": _baseline("markov", "Markov chain of order 1 by group"),
    "hapnest": _baseline("hapnest", "HAPNEST recipe (Wharrie et al. 2023), ages from frequencies"),
    "li_stephens": _li_stephens,
}


# ---- scans -----------------------------------------------------------------------------------------------------------


def _write_scans(task: Task, volumes: Any) -> str:
    from engine.imaging.volume import write_volume

    (task.out / "samples").mkdir()
    rows = []
    for number, volume in enumerate(volumes):
        subject = f"SYN{number:09d}"
        write_volume(volume, task.out / "samples" / f"{subject}.nii.gz", description="BENCHMARK", subject=subject)
        rows.append({"image": f"{subject}.nii.gz", "subject": subject})
    write_table(task.out / "samples", rows, ("image", "subject"))
    return "samples"


def _scans(task: Task, side: str, wanted: int | None) -> Any:
    """Real scans of a side on the track's grid: all, or `wanted` drawn by the seed."""
    from engine.imaging.commands import read_folder

    volumes, _ = read_folder(task.sides.side(side), task.track.scans.modality if task.track.scans else None)
    if wanted is None:
        return on_grid(volumes, task.track)
    if len(volumes) < wanted:
        raise UsageError(f"at least {wanted} scans on the side '{side}'", str(len(volumes)), task.track.name)
    order = np.sort(seeding.generator(task.seed, f"benchmark.{side}").permutation(len(volumes))[:wanted])
    return on_grid([volumes[k] for k in order], task.track)


def _ceiling_scans(task: Task) -> Made:
    made = _scans(task, "fresh", task.track.samples)
    return Made(_write_scans(task, made), "real scans of the fresh side, drawn by the seed", NOTHING, "fp32")


def _copycat_scans(task: Task) -> Made:
    made = _scans(task, "train", task.track.samples)
    return Made(_write_scans(task, made), "scans of the training side, as they are", NOTHING, "fp32")


def _marginal_scans(task: Task) -> Made:
    begun = Spent.now()
    volumes = _scans(task, "train", None)
    values_ncdhw = np.stack([volume.array_cdhw for volume in volumes])
    spent = begun.until_now()

    def draw(number: int) -> Any:
        rng = seeding.generator(task.seed, "benchmark.marginals", number)
        donor_cdhw = rng.integers(0, len(volumes), values_ncdhw.shape[1:])
        return replace(volumes[0], array_cdhw=np.take_along_axis(values_ncdhw, donor_cdhw[None], axis=0)[0])

    made = (draw(number) for number in range(task.track.samples))
    return Made(_write_scans(task, made), "every voxel from a training scan of its own", spent, "fp32")


def _engine_scans(task: Task) -> Made:
    """Autoencoder and flow of `engine.imaging`, half each of what is left of the budget by reading and by the latents.

    What these two take is measured beforehand, in a run of one step a stage that is thrown away and not counted.
    """
    import yaml

    import engine.imaging.train  # noqa: F401  (takes seconds to import, which are not training)
    from engine.atomic import write_text
    from engine.imaging.commands import sample_command, train_command

    settings = {key: dict(value) if isinstance(value, Mapping) else value for key, value in task.settings.items()}
    grid = grid_of(task.track)
    settings["data"] = {
        "size": list(grid.size), "spacing_mm": list(grid.spacing_mm or ()), "modality": grid.modality, "holdout_share": 0.0,
    }  # fmt: skip
    if task.track.scans is not None and task.track.scans.labels:
        settings["data"].update(produce="mask", labels=sorted(set(task.track.scans.labels)))
    settings["seed"] = task.seed
    config, run = task.out / "config.yaml", task.out / "run"

    def trained(bound: Mapping[str, Any]) -> Spent:
        stages = {stage: {**settings.get(stage, {}), **bound} for stage in ("autoencoder", "flow")}
        write_text(config, yaml.safe_dump({**settings, **stages}))
        begun = Spent.now()
        train_command(config, task.sides.side("train") / "volumes.csv", run)
        return begun.until_now()

    clock = task.track.budget_of
    besides = getattr(trained({"steps": 1}), clock)
    shutil.rmtree(run)
    left = task.budget_seconds - besides
    if left <= 0:
        raise UsageError(
            f"more than the {besides:.0f} s that reading and latents take", f"{task.budget_seconds:g}", "budget"
        )
    spent = trained({"max_minutes": left / 2 / 60, "minutes_of": clock})
    sample_command(run, task.track.samples, task.out / "samples", seed=task.seed)
    resolved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    events = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = " and ".join(str(event["steps"]) for event in events if event["event"] == "stage_done")
    shutil.rmtree(run)  # the run caches training scans; an entry holds samples only
    recipe = f"engine imaging train --config config.yaml ({steps} steps); engine imaging sample --seed {task.seed}"
    return Made("samples", recipe, spent, str(resolved["training"]["precision"]))


def _monai_ldm(task: Task) -> Made:
    from engine.benchmark.monai_ldm import RECIPE, train_and_sample

    begun = Spent.now()
    volumes = _scans(task, "train", None)
    drawn, recipe = train_and_sample(
        volumes,
        grid_of(task.track),
        task.track.samples,
        seed=task.seed,
        used=lambda: getattr(begun.until_now(), task.track.budget_of) / task.budget_seconds,
        **task.settings,
    )
    spent = begun.until_now()  # nothing is drawn before it is asked for
    return Made(_write_scans(task, drawn), f"{RECIPE}; {recipe}", spent, "fp32")


SCAN_ENTRANTS: dict[str, Callable[[Task], Made]] = {
    "ceiling": _ceiling_scans,
    "copycat": _copycat_scans,
    "marginals": _marginal_scans,
    "engine": _engine_scans,
    "monai_ldm": _monai_ldm,
}
