"""`engine cohort ...`: people as a whole, their covariates, genotypes and scans, over time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engine.cli.common import JsonFlag, Out, Overrides, Seed, Shard, emit, finding_lines, parse_shard, progress_bar
from engine.errors import UsageError

app = typer.Typer(
    no_args_is_help=True, help="People as a whole: fit covariates, genotypes and scans jointly, make synthetic people."
)

ProfileName = Annotated[
    str,
    typer.Option("--profile", help="YAML file, or a name among configs/cohort/profiles (alzheimer, lung_cancer ...)."),
]
ModelFolder = Annotated[Path, typer.Argument(help="Folder written by `engine cohort fit`.")]


@app.command()
def embedded(
    profile: ProfileName,
    out: Out,
    people: Annotated[int, typer.Option("--people", min=20, help="How many.")] = 240,
    scans: Annotated[bool, typer.Option("--scans/--no-scans", help="Heads for the visits that have a scan.")] = True,
    seed: Seed = 0,
    json: JsonFlag = False,
) -> None:
    """Write the embedded default of a profile: simulated people by its published effects, as inputs of `fit`."""
    from engine.cohort.profile import load_profile
    from engine.cohort.simulate import simulate, write_simulated

    made = simulate(load_profile(profile), people, seed=seed, scans=scans)
    write_simulated(made, out)
    told = {
        "people": people,
        "visits": len(made.table["subject"]),
        "scans": len(made.volumes),
        "sites": made.panel.n_sites,
    }
    emit({"out": str(out), **told}, json)


@app.command()
def fit(
    table: Annotated[Path, typer.Argument(help="CSV or TSV, one row per visit: subject, visit, years, the columns.")],
    profile: ProfileName,
    out: Out,
    genotypes: Annotated[
        Path | None, typer.Option("--genotypes", help="Phased panel; sample ids are subjects.")
    ] = None,
    map: Annotated[Path | None, typer.Option("--map", help="Genetic map of the panel.")] = None,
    haplotypes: Annotated[
        Path | None, typer.Option("--haplotypes", help="YAML of the haplotype model, see configs/genomics/.")
    ] = None,
    scans: Annotated[
        Path | None,
        typer.Option("--scans", help="Config to train on the table's column image, or a trained run folder."),
    ] = None,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Fit the joint model and write it with a report of its links."""
    from engine.cohort.joint import fit as fit_cohort
    from engine.genomics.li_stephens import load_config

    with progress_bar() as progress:
        made = fit_cohort(
            table,
            profile,
            genotypes=genotypes,
            scans=scans,
            out=out,
            genetic_map=map,
            haplotypes=load_config(haplotypes),
            overrides=overrides or [],
            progress=progress,
        )
    _report(made, out)
    told: dict[str, Any] = {
        "people": made.table.people,
        "visits": made.table.visits,
        "report": str(out / "report.html"),
    }
    told |= {"genotypes": made.genetics is not None, "scans": made.scan_model is not None, "notes": list(made.notes)}
    emit({"out": str(out), **told}, json)


@app.command()
def generate(
    model: ModelFolder,
    n: Annotated[int, typer.Option("-n", min=1, help="How many people, over all shards.")],
    out: Out,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", help="COLUMN=LEVEL, LEVEL|LEVEL, or FROM:TO at the first visit; repeat."),
    ] = None,
    seed: Seed = 0,
    shard: Shard = "0/1",
    scans: Annotated[bool, typer.Option("--scans/--no-scans", help="Without scans it takes seconds.")] = True,
    complete: Annotated[
        bool, typer.Option("--complete", help="Genotypes for all and a scan at every visit; else as in the data.")
    ] = False,
    genotypes_as: Annotated[str, typer.Option("--genotypes-as", help="bcf, vcf.gz or pgen.")] = "bcf",
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    json: JsonFlag = False,
) -> None:
    """Make synthetic people: a BIDS folder each, one genotype file, tables and a manifest."""
    from engine.cohort.joint import load
    from engine.cohort.write import generate_command

    fitted = load(model, scans=scans, device=device)
    with progress_bar() as progress:
        made = generate_command(
            fitted,
            n,
            out,
            where=parse_where(where),
            seed=seed,
            shard=parse_shard(shard),
            scans=scans,
            complete=complete,
            genotype_format=genotypes_as,
            progress=progress,
        )
    emit(made, json)


@app.command()
def finish(
    out: Annotated[Path, typer.Argument(help="What --out of the shards was.")],
    shards: Annotated[int, typer.Option("--shards", "-k", min=1, help="How many there are.")],
    json: JsonFlag = False,
) -> None:
    """Join the shards of `generate` into one folder."""
    from engine.cohort.write import finish_command

    with progress_bar() as progress:
        made = finish_command(out, shards, progress=progress)
    emit(made, json)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="Written by generate.")], json: JsonFlag = False) -> None:
    """Hold a folder against its manifest; exits 3 where a file changed, is gone or was added."""
    from engine.cohort.write import verify as verify_folder

    wrong = verify_folder(folder)
    emit({"out": str(folder), "whole": not wrong, "wrong": wrong}, json)
    if wrong:
        raise typer.Exit(3)


@app.command()
def judge(
    real: Annotated[
        Path | None, typer.Option("--real", help="Embedded cohort with known truth; its holdout is the test.")
    ] = None,
    synthetic: Annotated[Path | None, typer.Option("--synthetic", help="Written by generate --complete.")] = None,
    people: Annotated[
        int | None,
        typer.Option("--people", min=60, help="Instead: so many embedded people without scans, made and fitted."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for findings.json.")] = None,
    plink2: Annotated[bool, typer.Option("--plink2/--no-plink2", help="Association by plink2.")] = True,
    seed: Seed = 0,
    json: JsonFlag = False,
) -> None:
    """How much of the known truth synthetic people keep: effects, association hits, a diagnosis model on unseen people."""
    from engine import provenance
    from engine.atomic import atomic_folder, write_json
    from engine.cohort.judge import judge_folders, judge_table

    program = "plink2" if plink2 else None
    if people is not None and real is None and synthetic is None:
        findings = judge_table(people, seed=seed, plink2=program)
    elif real is not None and synthetic is not None and people is None:
        findings, _ = judge_folders(real, synthetic, seed=seed, plink2=program)
    else:
        raise UsageError("--real with --synthetic, or --people", "neither or both", "cohort judge")
    listed = [f.to_json() for f in findings]
    judged = [f for f in findings if f.verdict in ("pass", "fail")]
    told = {"kept": sum(f.verdict == "pass" for f in judged), "of": len(judged), "findings": listed}
    if out is not None:
        with atomic_folder(out) as folder:
            write_json(folder / "findings.json", told)
            provenance.write(folder, "cohort judge", seed=seed)
    emit(told, json, lambda made: [*finding_lines(made["findings"]), f"kept {made['kept']} of {made['of']}"])


@app.command()
def linkage(
    real: Annotated[Path, typer.Option("--real", help="Embedded cohort: training people and people kept out.")],
    synthetic: Annotated[Path, typer.Option("--synthetic", help="Written by generate --complete.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder for linkage.json.")] = None,
    seed: Seed = 0,
    json: JsonFlag = False,
) -> None:
    """Can a genotype find the scan made with it, or a real person a twin across modalities? Exits 3 unless it passes."""
    from engine import provenance
    from engine.atomic import atomic_folder, write_json
    from engine.cohort.judge import linkage_folders

    made = linkage_folders(real, synthetic, seed=seed)
    if out is not None:
        with atomic_folder(out) as folder:
            write_json(folder / "linkage.json", made)
            provenance.write(folder, "cohort linkage", seed=seed)

    def lines(told: dict[str, Any]) -> list[str]:
        controls = [
            f"control {name:<40} must {c['expected']:<5} was {c['verdict']}" for name, c in told["controls"].items()
        ]
        return [*finding_lines(told["findings"]), *controls, f"verdict {told['verdict'].upper()}", *told["reasons"]]

    emit(made.to_json(), json, lines)
    if made.verdict != "pass":
        raise typer.Exit(3)


def parse_where(pairs: list[str] | None) -> dict[str, Any]:
    """`["diagnosis=AD", "age=60:80"]` as what `CohortModel.generate` takes."""
    found: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip() or not text.strip():
            raise UsageError(
                "COLUMN=LEVEL or COLUMN=FROM:TO", repr(pair), "--where", "--where diagnosis=AD --where age=60:80"
            )
        low, colon, high = text.partition(":")
        value: Any = text.split("|") if "|" in text else text
        if colon:
            try:
                value = (float(low), float(high))
            except ValueError:
                value = text
        found[name.strip()] = value
    return found


def _report(model: Any, out: Path) -> None:
    """What the model links, what was left out, and its published effects, as one page in the model's folder."""
    from engine.cohort.graph import left_out, links_figure
    from engine.release.report import Section, Table, write_report

    profile, table = model.profile, model.table
    effects = [
        (f"{e.of}{f' {e.level}' if e.level else ''} on {e.to}", _effect(e), e.source, f"PMID {e.pmid}" if e.pmid else e.doi,
         "starts the fit" if e.prior_sd else "embedded default only")
        for e in profile.effects
    ]  # fmt: skip
    notes = [(note,) for note in model.notes]
    sections = [
        Section(
            "Links",
            f"{table.people} people with {table.visits} visits were fitted; the order of drawing is that of the arrows.",
            figures={"graph": links_figure(profile, left_out(model.notes))},
            tables=[Table("Pooled, left out or assumed", ("Note",), notes)] if notes else [],
        )
    ]
    if effects:
        tables = [Table("Effects", ("Effect", "Size", "Source", "Reference", "Use"), effects)]
        sections.append(Section("Effects known beforehand", "", tables=tables))
    write_report(
        out / "report.html",
        title=profile.title,
        subtitle="A joint model of covariates, genotypes and scans",
        verdict="none",
        summary=[],
        sections=sections,
    )


def _effect(effect: Any) -> str:
    per = f" per {effect.per:g}" if effect.per != 1 else ""
    if effect.odds_ratio is not None:
        return f"odds ratio {effect.odds_ratio:g}{per}"
    return (
        f"hazard ratio {effect.hazard_ratio:g}{per}"
        if effect.hazard_ratio is not None
        else f"{effect.difference:+g}{per}"
    )
