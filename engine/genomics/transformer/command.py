"""What `engine genomics fit` and `sample` do where the model is a transformer: paths in, files and JSON-ready dicts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import InputError
from engine.files import delimited
from engine.genomics import li_stephens, run_folder, stream
from engine.genomics.li_stephens import LiStephens
from engine.genomics.panel import read_panel
from engine.genomics.reference import as_reference
from engine.genomics.transformer.config import TransformerConfig, load_config

Progress = Callable[[str, int, int], None]  # (what, done, total)


def fit_command(
    panel_path: str | Path,
    *,
    out: str | Path,
    config: str | Path,
    map: str | Path | Sequence[str | Path] | None = None,
    samples: str | Path | None = None,
    group_column: str | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit a transformer to a panel file; arguments as for `engine.genomics.commands.fit_command`.

    With `resume` the run goes on where it was stopped, on any number of processes.

    Returns:
        As there, and {"held_out", "held_out_nats", "best_step", "steps", "processes"}.
    """
    from engine.genomics.transformer.train import train

    settings = load_config(config, overrides)
    maps = [] if map is None else [map] if isinstance(map, str | Path) else list(map)
    inputs = [panel_path, *maps, *([] if samples is None else [samples])]

    def reference() -> LiStephens:
        panel = read_panel(panel_path, map=map, samples_tsv=samples, group_column=group_column)
        panel = as_reference(panel, settings.copying, where=panel_path)
        model = li_stephens.fit(panel, settings.copying)
        model.warnings.extend(panel.notes)
        return model

    given = _phenotypes(settings) if settings.phenotypes is not None else None
    return train(settings, reference, out, covariates=given, inputs=inputs, resume=resume, progress=progress)


def _phenotypes(settings: TransformerConfig) -> Callable[[LiStephens], tuple[list[str], np.ndarray]]:
    """Reader of the table that `settings.phenotypes` names: sample id, then columns of numbers, empty where unknown."""

    def read(model: LiStephens) -> tuple[list[str], np.ndarray]:
        assert settings.phenotypes is not None
        path = Path(settings.phenotypes)
        header, rows = delimited.read(path)
        by_id = {row[0]: row[1:] for row in rows if row}
        value_sv = np.full((len(model.samples.ids), len(header) - 1), np.nan, np.float32)
        for at, name in enumerate(model.samples.ids):
            for v, text in enumerate(by_id.get(name, [])):
                if text not in ("", "NA"):
                    try:
                        value_sv[at, v] = float(text)
                    except ValueError:
                        raise InputError("a number", f"'{text}'", f"{path}, {name}, {header[v + 1]}") from None
        return header[1:], value_sv

    return read


def sample_command(
    run: str | Path,
    n: int,
    *,
    out: str | Path,
    group: str | None = None,
    seed: int | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write synthetic people of a transformer's run; arguments and result as for `engine.genomics.commands.sample_command`.

    The people of a shard are held in memory, packed.
    """
    from engine.files import genotype_files
    from engine.genomics import commands
    from engine.genomics.transformer.run import load

    index, count = commands.checked_shard(n, shard)
    genotype_files.suffix_of(out)
    target = Path(out) if count == 1 else commands.shard_path(out, index, count)
    model = load(run)
    seed = model.config.seed if seed is None else seed
    first, stop = index * n // count, (index + 1) * n // count
    request = {
        "model": "transformer", "model_sha256": run_folder.checksum(Path(run) / "reference"), "people": n, "group": group,
        "shard": [index, count], "first_person": first, "stop_person": stop, "asked": {"checkpoint": model.digest},
    }  # fmt: skip
    warnings = [*model.warnings, *genotype_files.lost(target)]
    if count > 1 and commands.is_whole(target, request, seed):
        groups = commands.read_groups(target)
        return commands.sampled(target, model.n_sites, groups, stop - first, True, warnings)
    commands.make_way(target, count)
    tell = None if progress is None else lambda done, total: progress("drawing", done, total)
    made = model.sample(stop - first, groups=group, seed=seed, start=first, progress=tell)
    source = stream.of_panel(made, target)
    record = {"config": model.config.model_dump(), "request": request, "seed": seed, "warnings": warnings}
    job = stream.Job(target, source.layout(commands.header_lines(request, seed)), source.groups, record)
    stream.start(job)
    stream.write_parts(job, source.rows)
    commands.close(job)
    groups = [] if made.samples.group is None else made.samples.group.tolist()
    return commands.sampled(target, model.n_sites, groups, stop - first, False, warnings)
