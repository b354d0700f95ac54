"""What the command line and batch jobs call: fit, sample, finish, score, evaluate. Paths in, files and JSON-ready dicts
out.

Every output carries its provenance: run folders inside, genotype files as `FILE.provenance.json` beside them and as
`##` header lines that say SYNTHETIC. The groups of synthetic people are in `FILE.samples.tsv`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine import __version__, atomic, provenance
from engine.errors import InputError, Unsupported, UsageError
from engine.files import genotype_files, packed_npz
from engine.files.genotype_files import beside
from engine.genomics import admixture, exposure, li_stephens, people, run_folder, sex_chromosomes, stream
from engine.genomics.evaluate import evaluate
from engine.genomics.matching import common_sites
from engine.genomics.panel import (
    HaplotypePanel,
    Samples,
    genotypes_from_panel,
    panel_from_genotypes,
    read_panel,
    read_samples,
    write_samples,
)
from engine.genomics.phenotypes import load_trait
from engine.genomics.reference import as_reference
from engine.genomics.transformer import config as transformer
from engine.kernels import bits

Progress = Callable[[str, int, int], None]  # (what, done, total)


def fit_command(
    panel_path: str | Path,
    *,
    out: str | Path,
    map: str | Path | Sequence[str | Path] | None = None,
    samples: str | Path | None = None,
    group_column: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit the copying model, or the transformer where the config says so, to a panel file and write the run folder `out`.

    Args:
        resume: go on with the training of a transformer that was stopped.
        group_column: column of the samples table that holds the groups; None takes the usual names.

    Returns:
        {"run", "model", "haplotypes", "sites", "groups": name -> haplotypes, "warnings"}, and with a mixture
        "held_out_nats", "held_out_sem", "held_out_n" of its judges, each left out, and "plain_nats" of the best chain alone.

    Raises:
        UsageError: bad config, or `out` exists. InputError: the panel, map or table cannot be used.
    """
    if config is not None and transformer.is_transformer(config):
        from engine.genomics.transformer import command

        return command.fit_command(
            panel_path, out=out, config=config, map=map, samples=samples, group_column=group_column,
            overrides=overrides, resume=resume, progress=progress,
        )  # fmt: skip
    if resume:
        raise UsageError("--resume of a training run", "a copying model, which is fitted at once", "fit")
    settings = li_stephens.load_config(config, overrides)
    if Path(out).exists():
        raise UsageError(
            "a folder that does not exist yet", "an existing one", out, "another --out, or remove it first"
        )
    _tell(progress, "reading panel", 0, 2)
    panel = read_panel(panel_path, map=map, samples_tsv=samples, group_column=group_column)
    panel = as_reference(panel, settings, where=panel_path)
    _tell(progress, "writing run", 1, 2)
    learning = None if progress is None else lambda done, total: progress("learning", done, total)
    model = li_stephens.fit(panel, settings, progress=learning)
    model.warnings.extend(panel.notes)
    maps = [] if map is None else [map] if isinstance(map, str | Path) else list(map)
    model.save(out, inputs=[panel_path, *maps, *([] if samples is None else [samples])])
    _tell(progress, "writing run", 2, 2)
    counts = np.bincount(model.group_of_haplotype_k, minlength=len(model.group_names)).tolist()
    return {
        "run": str(out),
        "model": "li_stephens",
        "haplotypes": model.k,
        "sites": model.n_sites,
        "groups": dict(zip(model.group_names, counts, strict=True)),
        "warnings": model.warnings,
    } | ({} if model.mixture is None else model.mixture.figures())


def sample_command(
    run: str | Path,
    n: int,
    *,
    out: str | Path,
    group: str | None = None,
    admix: str | None = None,
    generations: float | None = None,
    sex: str | None = None,
    phenotype: str | Path | None = None,
    case_fraction: float | None = None,
    prs_range: tuple[float, float] | None = None,
    max_donor_cm: float | None = None,
    max_release_cm: float | None = None,
    seed: int | None = None,
    shard: tuple[int, int] = (0, 1),
    shard_by: str = "people",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write synthetic people of a run in any format of `engine.files.genotype_files`, with groups and provenance beside.

    The file is made of parts (`engine.genomics.stream`): what is done is passed over when the same command runs again.

    Args:
        n: people over all shards.
        group: all people of this group; None draws groups in the panel's proportions.
        admix, generations: admixed people, "GROUP=share,GROUP=share" and how long ago, or a YAML file of pulses
            (`admixture.parse`); their local ancestry goes to `out`.bp.
        sex: "male" or "female" for all; None draws it in the panel's proportions where the model has X.
        phenotype: a trait (`engine genomics phenotype`); everybody's goes to `out`.pheno.tsv. `case_fraction` and
            `prs_range`, in standard deviations of the score, ask for people by it (`people.Request`).
        max_donor_cm: the most that is copied from a donor into one person; None takes what the run's config says.
        max_release_cm: the most that is copied from a donor into all n people; None for no bound (`exposure`).
        seed: None takes the seed of the run's config.
        shard: (i, k), 0 <= i < k, of people or sites. `finish_command` joins shards.
        shard_by: "people": people i*n//k .. (i+1)*n//k - 1 as a file of their own, `shard_path(out, i, k)`; one that is
            there already and whole is recognised and skipped, one without its record is made again. "sites": all people
            at some of the sites, as parts of `out` itself, which are joined by copying: for large files.

    What each donor gave goes to `out`.exposure.tsv, which is no part of a release.

    Returns:
        {"out", "people", "haplotypes", "sites", "groups": name -> people, "skipped", "warnings", "exposure": the largest
        values over donors, cM}, and where asked for "ancestry": source -> mean share, "cases", "mean_prs_sd", and
        "acceptance_cases", "acceptance_controls" or "acceptance_people": share of candidates that were what was asked for.

    Raises:
        UsageError: bad n, shard, group, request or suffix, or `out` exists. CorruptRun: the run folder is not whole.
    """
    if transformer.is_run(run):
        asked = {"--admix": admix, "--generations": generations, "--sex": sex, "--phenotype": phenotype,
                 "--case-fraction": case_fraction, "--prs-range": prs_range,
                 "--max-donor-cm": max_donor_cm, "--max-release-cm": max_release_cm}  # fmt: skip
        for option, value in asked.items():
            if value is not None:
                raise Unsupported(
                    "people of a group", option, "sample from a transformer", "a run of the copying model"
                )
        if shard_by != "people":
            raise Unsupported("--shard-by people", shard_by, "sample from a transformer")
        from engine.genomics.transformer import command

        return command.sample_command(run, n, out=out, group=group, seed=seed, shard=shard, progress=progress)
    index, count = checked_shard(n, shard)
    if shard_by not in ("people", "sites"):
        raise UsageError("people or sites", repr(shard_by), "--shard-by")
    genotype_files.suffix_of(out)
    by_sites = count > 1 and shard_by == "sites"
    target = Path(out) if count == 1 or by_sites else shard_path(out, index, count)
    model = li_stephens.load(run)
    seed = model.config.seed if seed is None else seed
    if max_donor_cm is not None:
        if model.config.sampler != "interchange" or max_donor_cm <= 0:
            raise UsageError("more than 0 cM and sampler=interchange", f"{max_donor_cm:g}", "--max-donor-cm")
        model = replace(model, config=model.config.model_copy(update={"max_donor_cm": max_donor_cm}))
    if max_release_cm is not None:
        if admix is not None or case_fraction is not None or prs_range is not None:
            raise UsageError("people as the model draws them", "people who are chosen", "--max-release-cm")
        exposure.check_release(model, n, max_release_cm, group)
    first, stop = (0, n) if by_sites else (index * n // count, (index + 1) * n // count)
    request = {
        "model_sha256": run_folder.checksum(run), "people": n, "group": group,
        "shard": [0, 1] if by_sites else [index, count], "first_person": first, "stop_person": stop,
    }  # fmt: skip
    wanted = people.Request(
        group, None if admix is None else admixture.parse(admix, generations), sex,
        None if phenotype is None else load_trait(phenotype), case_fraction, prs_range,
    ).checked()  # fmt: skip
    if admix is None and generations is not None:
        raise UsageError("--admix with --generations", "--generations alone", "sample", "--admix AFR=0.8,EUR=0.2")
    if not wanted.is_plain:
        request["asked"] = wanted.to_json()
    learned = model.genealogy.to_json() if model.config.sampler == "interchange" else None
    drawn_by = json.dumps([model.config.model_dump(), learned], sort_keys=True)
    request["sampling_sha256"] = hashlib.sha256(drawn_by.encode()).hexdigest()
    in_words = not wanted.is_plain or sex_chromosomes.has_x(model)
    if in_words and by_sites:
        raise UsageError("--shard-by people for X, --admix, --sex and --phenotype", "sites", "sample")
    warnings = [*model.warnings, *genotype_files.lost(target)]
    if count > 1 and is_whole(target, request, seed):
        return sampled(target, model.n_sites, read_groups(target), stop - first, True, warnings)
    make_way(target, count)
    tell = lambda what: None if progress is None else lambda done, total: progress(what, done, total)  # noqa: E731
    told: dict[str, object] = {}
    exposed: exposure.Exposure | None = None
    if in_words:
        drawn = people.draw(model, stop - first, wanted, seed=seed, start=first, progress=tell("drawing"))
        source = people.source(model, drawn, wanted, target, seed=seed, start=first)
        people.write_beside(drawn, target, start=first)
        told = people.summary(model, drawn, wanted)
        copied = drawn.paths
        exposed = exposure.of_paths(model, copied.segment_offset_n, copied.segment_start_s, copied.segment_donor_s)
    else:
        source = stream.source(
            model, stop - first, groups=group, seed=seed, start=first, progress=tell("drawing"),
            folder=stream.paths_folder(target, request=request, seed=seed), shard=shard if by_sites else (0, 1),
        )  # fmt: skip
        if source.held is not None:
            exposed = exposure.of_held(model, source.held)
    if exposed is not None and not (by_sites and index):
        exposure.write(exposed, model, seed, beside(target, exposure.SUFFIX))
        told |= {"exposure": exposed.summary()}
    record = {"config": model.config.model_dump(), "request": request, "seed": seed, "warnings": warnings}
    job = stream.Job(target, source.layout(header_lines(request, seed)), source.groups, record)
    stream.start(job)
    written = stream.write_parts(job, source.rows, shard=shard if by_sites else (0, 1), progress=tell("writing"))
    if not by_sites:
        close(job)
    made = sampled(target, model.n_sites, source.groups.tolist(), stop - first, not written and by_sites, warnings)
    return made | {"haplotypes": source.head.n_haplotypes} | told


def finish_command(out: str | Path, count: int, *, progress: Progress | None = None) -> dict[str, Any]:
    """Join the `count` shards of `out` into `out`. Shards of people stay; shards of sites are parts of `out` and go.

    Shards of people are read into memory, packed: people * sites / 4 bytes.

    Raises:
        UsageError: `out` exists. InputError: a shard is absent, or is not part of the same request.
    """
    out = Path(out)
    genotype_files.suffix_of(out)
    if out.exists():
        raise UsageError("a file that does not exist yet", "an existing one", out, "another --out, or remove it first")
    job = stream.load(out)
    if job is None or job.record.get("joined_shards"):
        job = _join_people(out, count, progress)
    count_people, sites = len(job.layout.head.sample_ids), job.layout.head.n_sites
    _tell(progress, "joining", 0, 1)
    close(job)
    _tell(progress, "joining", 1, 1)
    groups = [] if job.groups is None else job.groups.tolist()
    made = sampled(out, sites, groups, count_people, False, job.record["warnings"])
    return made | {"haplotypes": job.layout.head.n_haplotypes}


def _join_people(out: Path, count: int, progress: Progress | None) -> stream.Job:
    """The parts of `out` from its shards of people."""
    panels: list[HaplotypePanel] = []
    records: list[dict[str, Any]] = []
    groups: list[str] = []
    for index in range(count):
        path = shard_path(out, index, count)
        if not path.exists() or not beside(path, "provenance.json").exists():
            raise InputError(f"all {count} shards", f"no shard {index}", path, f"--shard {index}/{count}")
        record = json.loads(beside(path, "provenance.json").read_text(encoding="utf-8"))
        same = ("model_sha256", "people", "group", "asked", "sampling_sha256")
        if record["sha256"] != provenance.input_record(path)["sha256"]:
            raise InputError("the file that its provenance describes", "another", path, "making this shard again")
        if records and any(record["request"].get(key) != records[0]["request"].get(key) for key in same):
            raise InputError(
                "shards of one request", "another model, n, group or wish", path, "removing the stale shard"
            )
        if records and record["seed"] != records[0]["seed"]:
            raise InputError(f"seed {records[0]['seed']}", str(record["seed"]), path, "removing the stale shard")
        records.append(record)
        if record["request"]["stop_person"] > record["request"]["first_person"]:
            panels.append(read_panel(path, samples_tsv=beside(path, "samples.tsv")))
            groups += read_groups(path)
        _tell(progress, "reading shards", index + 1, count)
    joined = concatenate(panels)
    seed = records[0]["seed"]
    request = {**records[0]["request"], "shard": [0, 1], "first_person": 0}
    request["stop_person"] = request["people"]
    record = {key: records[0][key] for key in ("config", "warnings")} | {
        "request": request,
        "seed": seed,
        "joined_shards": count,
    }
    shards = [shard_path(out, index, count) for index in range(count)]
    people.join_beside(shards, out)
    tables = [beside(shard, exposure.SUFFIX) for shard in shards]
    if all(table.exists() for table in tables):
        exposure.join(tables, beside(out, exposure.SUFFIX))
    source = stream.of_panel(replace(joined, samples=replace(joined.samples, group=np.array(groups, dtype=str))), out)
    job = stream.Job(out, source.layout(header_lines(request, seed)), source.groups, record)
    stream.start(job)
    stream.write_parts(job, source.rows)
    return job


def score_command(
    run: str | Path,
    panel: str | Path,
    *,
    leave_one_out: bool = False,
    intersect: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Log-likelihood of a panel file's haplotypes under a run's model, by its mixture where it has one.

    Returns:
        {"haplotypes": n, "mean_nats": mean per haplotype, "sem": its standard error, "leave_one_out", "warnings"}; sem
        is None for a single haplotype.
    """
    model = _load(run)
    scored = _read_scored(panel, getattr(model, "reference", model))
    mixed = {"mixed": True} if getattr(model, "mixture", None) is not None else {}
    nats_n = model.log_likelihood(
        sex_chromosomes.complete(scored), leave_one_out=leave_one_out, intersect=intersect,
        progress=None if progress is None else lambda done, total: progress("scoring", done, total),
        **mixed,
    )  # fmt: skip
    if not np.isfinite(nats_n).all():
        raise InputError("haplotypes that the model can give", "an impossible one", panel, "a mismatch above 0")
    n = len(nats_n)
    return {
        "haplotypes": n,
        "mean_nats": float(nats_n.mean()),
        "sem": float(nats_n.std(ddof=1) / np.sqrt(n)) if n > 1 else None,
        "leave_one_out": leave_one_out,
        "warnings": model.warnings,
    }


def _read_scored(path: str | Path, model: li_stephens.LiStephens) -> HaplotypePanel:
    """A panel to be scored; an archive without a table of sites has those of the model."""
    if Path(path).suffix != ".npz" or packed_npz.legend_path(path) is not None:
        return read_panel(path)
    like = genotypes_from_panel(
        HaplotypePanel(model.bits_lw, None, model.sites, model.samples, True, model.contig_length, model.assembly)
    )
    return panel_from_genotypes(packed_npz.read_npz(path, like))


def _load(run: str | Path) -> Any:
    """The model of a run folder, which has `log_likelihood` and `warnings`."""
    if not transformer.is_run(run):
        return li_stephens.load(run)
    from engine.genomics.transformer.run import load

    return load(run)


def evaluate_command(
    real: str | Path,
    synthetic: str | Path,
    *,
    train: str | Path | None = None,
    samples: str | Path | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    intersect: bool = False,
    report: Callable[[Path, Any, int], Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Findings of a synthetic panel file against held-out real haplotypes and, where given, the training ones.

    Args:
        samples: table with the groups of real (and train) people; those of synthetic people are read from
            `SYNTHETIC.samples.tsv` where it exists.
        out: folder to write evaluation.json and provenance.json to, and what `report(folder, evaluation, seed)` adds; it
            must not exist.

    Returns:
        {"findings": [...], "figures": {...}}, JSON-ready.
    """
    if out is not None and Path(out).exists():
        raise UsageError(
            "a folder that does not exist yet", "an existing one", out, "another --out, or remove it first"
        )
    inputs = [Path(path) for path in (real, synthetic, train, samples) if path is not None]
    table = beside(Path(synthetic), "samples.tsv")
    whole = sex_chromosomes.complete  # on X, haplotypes that run from end to end
    real_panel = whole(read_panel(real, samples_tsv=samples))
    synthetic_panel = whole(read_panel(synthetic, samples_tsv=table if table.exists() else None))
    train_panel = None if train is None else whole(_with_groups(train, samples))
    made = evaluate(
        real_panel, synthetic_panel, train=train_panel, seed=seed, intersect=intersect,
        progress=None if progress is None else lambda done, total: progress("evaluating", done, total),
    )  # fmt: skip
    result = made.to_json()
    if out is not None:
        with atomic.atomic_folder(out) as folder:
            atomic.write_json(folder / "evaluation.json", result)
            if report is not None:
                report(folder, made, seed)
            provenance.write(folder, "genomics evaluate", inputs=inputs, seed=seed, config={"intersect": intersect})
    return result


def _with_groups(path: str | Path, samples: str | Path | None) -> HaplotypePanel:
    """A panel, with groups where the table has all of its people."""
    panel = read_panel(path)
    try:
        group, sex = (None, None) if samples is None else read_samples(samples, panel.samples.ids)
    except InputError:
        return panel
    return replace(panel, samples=replace(panel.samples, group=group, sex=sex)) if group is not None else panel


def shard_path(out: str | Path, index: int, count: int) -> Path:
    """`dir/name.bcf` -> `dir/name.shard-0003-of-0100.bcf`."""
    out = Path(out)
    suffix = genotype_files.suffix_of(out)
    return out.with_name(f"{out.name.removesuffix(suffix)}.shard-{index:04d}-of-{count:04d}{suffix}")


def concatenate(panels: Sequence[HaplotypePanel]) -> HaplotypePanel:
    """All people of several panels with equal sites, in order, with their sexes; groups are not kept.

    Raises:
        InputError: the sites differ.
    """
    first = panels[0]
    if len(panels) == 1:
        return replace(first, samples=replace(first.samples, group=None))
    chosen = common_sites({f"panel {at}": panel.sites for at, panel in enumerate(panels)})
    offsets = np.concatenate([[0], np.cumsum([panel.n_haplotypes for panel in panels])])
    bits_lw = np.zeros((first.n_sites, bits.words(int(offsets[-1]))), dtype=np.uint64)
    block = max(1, (32 << 20) // max(1, int(offsets[-1])))
    for start in range(0, first.n_sites, block):
        parts = [
            bits.unpack(np.ascontiguousarray(panel.bits_lw[index[start : start + block]]), panel.n_haplotypes)
            for panel, index in zip(panels, chosen, strict=True)
        ]
        bits_lw[start : start + block] = bits.pack(np.concatenate(parts, axis=1))
    ids = [name for panel in panels for name in panel.samples.ids]
    ploidy = np.concatenate([np.diff(panel.samples.first_haplotype) for panel in panels])
    sexes = [np.full(len(p.samples.ids), "unknown") if p.samples.sex is None else p.samples.sex for p in panels]
    sex = np.concatenate(sexes) if any(p.samples.sex is not None for p in panels) else None
    samples = Samples(ids, None, sex, np.concatenate([[0], np.cumsum(ploidy)]).astype(np.int64))
    alone = [np.zeros(len(p.samples.ids), bool) if p.hemizygous is None else p.hemizygous[1] for p in panels]
    rows_l = next((p.hemizygous[0] for p in panels if p.hemizygous is not None), None)
    hemizygous = None if rows_l is None else (rows_l, np.concatenate(alone))
    return replace(first, bits_lw=bits_lw, missing_lw=None, samples=samples, hemizygous=hemizygous)


def read_groups(path: str | Path) -> list[str]:
    """Groups of the people in a sampled file, from the table beside it, in order."""
    table = beside(Path(path), "samples.tsv")
    lines = table.read_text(encoding="utf-8").splitlines()[1:]
    group, _ = read_samples(table, [line.split("\t")[0] for line in lines])
    return [] if group is None else group.tolist()


def _tell(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)


def checked_shard(n: int, shard: tuple[int, int]) -> tuple[int, int]:
    """`shard` as it is; UsageError where it or n cannot be."""
    index, count = shard
    if n < 1 or not 0 <= index < count:
        raise UsageError("n >= 1 and shard i/k with 0 <= i < k", f"n {n}, shard {index}/{count}", "sample")
    return shard


def make_way(target: Path, count: int) -> None:
    """Remove a shard without its record; UsageError for any other file that is there."""
    if target.exists() and (count == 1 or beside(target, "provenance.json").exists()):
        raise UsageError(
            "a file that does not exist yet", "an existing one", target, "another --out, or remove it first"
        )
    if target.exists():
        genotype_files.remove(target)


def is_whole(path: Path, request: dict[str, Any], seed: int) -> bool:
    """Whether `path` was written for this very request and has not changed since."""
    try:
        record = json.loads(beside(path, "provenance.json").read_text(encoding="utf-8"))
        same = record["request"] == request and record["seed"] == seed
        is_same = same and record["sha256"] == provenance.input_record(path)["sha256"]
        return bool(is_same and beside(path, "samples.tsv").exists())
    except (OSError, ValueError, KeyError):
        return False


def header_lines(request: dict[str, Any], seed: int) -> list[str]:
    return [
        "##engine_data=SYNTHETIC: generated by a model, no record describes a living person",
        f"##engine_command=genomics sample, engine {__version__}, commit {provenance.commit()['commit']}",
        f"##engine_model={request.get('model', 'li_stephens')}, sha256 {request['model_sha256']}, seed {seed}",
    ]


def close(job: stream.Job) -> None:
    """The genotype file first, its provenance last: a file without a record counts as not written."""
    stream.join(job)
    if job.groups is not None:
        write_samples(stream.panel_of(job), beside(job.path, "samples.tsv"))
    record = provenance.record(
        "genomics sample", config=job.record["config"], seed=job.record["seed"], synthetic=True,
        extra={
            "file": job.path.name, "sha256": provenance.input_record(job.path)["sha256"],
            "request": job.record["request"], "warnings": job.record["warnings"],
        },
    )  # fmt: skip
    atomic.write_json(beside(job.path, "provenance.json"), record)
    stream.remove_parts(job.path)


def sampled(
    path: Path, sites: int, groups: list[str], people: int, skipped: bool, warnings: list[str]
) -> dict[str, Any]:
    names, counts = np.unique(np.array(groups, dtype=str), return_counts=True)
    return {
        "out": str(path),
        "people": people,
        "haplotypes": 2 * people,
        "sites": sites,
        "groups": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "skipped": skipped,
        "warnings": warnings,
    }
