"""`engine genomics ...`: simulate, fit, sample, score and evaluate phased haplotype panels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.cli.common import (
    JsonFlag,
    Out,
    Overrides,
    Seed,
    Shard,
    emit,
    finding_lines,
    parse_counts,
    parse_range,
    parse_shard,
    progress_bar,
)

app = typer.Typer(
    no_args_is_help=True, help="Phased genotypes: fit a model to a panel, sample people, score, evaluate."
)

Panel = Annotated[Path, typer.Argument(help="Phased panel: .vcf.gz, .bcf or .pgen.")]
Map = Annotated[
    Path | None, typer.Option("--map", help="Genetic map (`pos chr cM`, PLINK .map or HapMap format), plain or gz.")
]
SamplesTable = Annotated[
    Path | None, typer.Option("--samples", help="TSV: sample id, then a column `group` (or pop); sex optional.")
]
GroupColumn = Annotated[
    str | None, typer.Option("--group-column", help="Column of the samples table that holds the groups.")
]


@app.command()
def split(
    panel: Panel,
    out: Out,
    samples: SamplesTable = None,
    group_column: GroupColumn = None,
    holdout: Annotated[
        float, typer.Option("--holdout", min=0.0, max=1.0, help="Share of the people of each group.")
    ] = 0.2,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draw.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Cut a panel by person into train.bcf and holdout.bcf."""
    from engine.genomics.split import split_command

    made = split_command(panel, out=out, samples=samples, group_column=group_column, holdout=holdout, seed=seed)
    emit(made, json)


@app.command()
def fit(
    panel: Panel,
    out: Out,
    map: Map = None,
    samples: SamplesTable = None,
    group_column: GroupColumn = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML, see configs/genomics/.")] = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a transformer's training in OUT.")] = False,
    json: JsonFlag = False,
) -> None:
    """Fit a haplotype model to a panel and write a run folder."""
    from engine.genomics.commands import fit_command

    with progress_bar() as progress:
        result = fit_command(
            panel,
            map=map,
            samples=samples,
            group_column=group_column,
            config=config,
            overrides=overrides or [],
            resume=resume,
            out=out,
            progress=progress,
        )
    emit(result, json)


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="Run folder written by `engine genomics fit`.")],
    n: Annotated[int, typer.Option("-n", min=1, help="How many people, over all shards.")],
    out: Annotated[Path, typer.Option("--out", help="FILE.bcf, .vcf.gz, .pgen, .vcz, .haps or .bed.")],
    group: Annotated[
        str | None, typer.Option("--group", help="Only this group; default: groups in the panel's proportions.")
    ] = None,
    admix: Annotated[
        str | None,
        typer.Option("--admix", help="Admixed people: AFR=0.8,EUR=0.2 with --generations, or a YAML of pulses."),
    ] = None,
    generations: Annotated[
        float | None, typer.Option("--generations", help="Generations since the admixture began.")
    ] = None,
    sex: Annotated[str | None, typer.Option("--sex", help="male or female; default: as in the panel.")] = None,
    phenotype: Annotated[
        Path | None, typer.Option("--phenotype", help="TRAIT.json of `engine genomics phenotype`: phenotypes for all.")
    ] = None,
    case_fraction: Annotated[
        float | None, typer.Option("--case-fraction", min=0.0, max=1.0, help="Share of cases among the people.")
    ] = None,
    prs_range: Annotated[
        str | None,
        typer.Option("--prs-range", help="FROM:TO, scores wanted, in their standard deviations (inf allowed)."),
    ] = None,
    max_donor_cm: Annotated[
        float | None, typer.Option("--max-donor-cm", help="The most copied from one donor into one person, cM.")
    ] = None,
    max_release_cm: Annotated[
        float | None, typer.Option("--max-release-cm", help="The most copied from one donor into all n people, cM.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Default: the seed of the run's config.")] = None,
    shard: Shard = "0/1",
    shard_by: Annotated[
        str, typer.Option("--shard-by", help="people: a file per shard; sites: parts of one file, for large output.")
    ] = "people",
    json: JsonFlag = False,
) -> None:
    """Write synthetic people as phased genotypes."""
    from engine.genomics.commands import sample_command

    with progress_bar() as progress:
        result = sample_command(
            run,
            n,
            group=group,
            admix=admix,
            generations=generations,
            sex=sex,
            phenotype=phenotype,
            case_fraction=case_fraction,
            prs_range=None if prs_range is None else parse_range(prs_range),
            max_donor_cm=max_donor_cm,
            max_release_cm=max_release_cm,
            seed=seed,
            shard=parse_shard(shard),
            shard_by=shard_by,
            out=out,
            progress=progress,
        )
    emit(result, json)


@app.command()
def simulate(
    out: Annotated[Path, typer.Option("--out", help="FILE.bcf, .vcf.gz, .pgen, .vcz, .haps or .bed.")],
    n: Annotated[int | None, typer.Option("-n", min=1, help="How many people, equally over the groups.")] = None,
    groups: Annotated[
        str | None, typer.Option("--groups", help="People by group in place of -n: AFR=1000,EUR=752,EAS=752.")
    ] = None,
    sites: Annotated[int | None, typer.Option("--sites", min=1, help="How many sites (rows).")] = None,
    length_mb: Annotated[
        float | None, typer.Option("--length-mb", help="Length of the contig in place of --sites.")
    ] = None,
    contig: Annotated[str, typer.Option("--contig", help="Name of the contig.")] = "1",
    demography: Annotated[
        str, typer.Option("--demography", help="out-of-africa (AFR, EUR, EAS), split (A, B) or constant (all).")
    ] = "out-of-africa",
    map: Map = None,
    recombination_rate: Annotated[
        float, typer.Option("--recombination-rate", help="Per base and generation, without --map.")
    ] = 1e-8,
    mutation_rate: Annotated[float, typer.Option("--mutation-rate", help="Per base and generation.")] = 1.25e-8,
    block_mb: Annotated[
        float, typer.Option("--block-mb", help="Length of the stretches that are simulated one by one.")
    ] = 5.0,
    seed: Seed = 0,
    json: JsonFlag = False,
) -> None:
    """Simulate a panel with msprime, for load tests: with groups and a genetic map beside it."""
    from engine.genomics import simulate as simulation

    people = parse_counts(groups, "--groups") if groups is not None else simulation.equal_groups(demography, n or 0)
    wanted = simulation.Simulation(
        people, sites, None if length_mb is None else round(length_mb * 1e6), contig, demography, mutation_rate,
        recombination_rate, round(block_mb * 1e6), seed,
    )  # fmt: skip
    with progress_bar() as progress:
        made = simulation.simulate_command(out, wanted, map=map, progress=progress)
    emit(made, json)


@app.command()
def phenotype(
    panel: Panel,
    out: Annotated[Path, typer.Option("--out", help="FILE.tsv, for plink2 --pheno.")],
    trait: Annotated[Path | None, typer.Option("--trait", help="A trait made before (FILE.trait.json).")] = None,
    effects: Annotated[
        Path | None,
        typer.Option("--effects", help="TSV of causal sites: id (or contig, position), beta, optionally a1."),
    ] = None,
    causal: Annotated[int, typer.Option("--causal", min=1, help="Causal sites to draw, without --effects.")] = 100,
    heritability: Annotated[
        float | None, typer.Option("--heritability", help="Variance of the score; default 0.5, or that of --effects.")
    ] = None,
    prevalence: Annotated[
        float | None, typer.Option("--prevalence", help="Share of cases; without it the trait is quantitative.")
    ] = None,
    case_fraction: Annotated[
        float | None, typer.Option("--case-fraction", min=0.0, max=1.0, help="Keep people with this share of cases.")
    ] = None,
    people: Annotated[
        int | None, typer.Option("--people", min=1, help="How many to keep, with --case-fraction.")
    ] = None,
    covariates: Annotated[Path | None, typer.Option("--covariates", help="TSV: sample id, then columns.")] = None,
    covariate: Annotated[
        list[str] | None, typer.Option("--covariate", help="COLUMN=effect on the liability per standard deviation.")
    ] = None,
    min_maf: Annotated[float, typer.Option("--min-maf", help="Of causal sites that are drawn.")] = 0.01,
    alpha: Annotated[
        float, typer.Option("--alpha", help="Effects grow as (2 p (1 - p))^(alpha / 2); -1: per standardised genotype.")
    ] = -1.0,
    seed: Seed = 0,
    json: JsonFlag = False,
) -> None:
    """Simulate an additive phenotype on a panel, real or synthetic: liabilities, cases, polygenic scores."""
    from engine.genomics.phenotype_command import phenotype_command

    result = phenotype_command(
        panel,
        out=out,
        trait=trait,
        effects=effects,
        causal=causal,
        heritability=heritability,
        prevalence=prevalence,
        case_fraction=case_fraction,
        people=people,
        covariates=covariates,
        covariate_effects=covariate or [],
        min_maf=min_maf,
        alpha=alpha,
        seed=seed,
    )
    emit(result, json)


@app.command()
def finish(
    out: Annotated[Path, typer.Argument(help="What --out of the shards was.")],
    shards: Annotated[int, typer.Option("--shards", min=2, help="How many shards there are.")],
    json: JsonFlag = False,
) -> None:
    """Join the shards of `engine genomics sample --shard i/k` into one file; the shards stay."""
    from engine.genomics.commands import finish_command

    with progress_bar() as progress:
        result = finish_command(out, shards, progress=progress)
    emit(result, json)


@app.command()
def score(
    run: Annotated[Path, typer.Argument(help="Run folder written by `engine genomics fit`.")],
    panel: Panel,
    intersect: Annotated[bool, typer.Option("--intersect", help="Use the sites both sides share.")] = False,
    leave_one_out: Annotated[
        bool,
        typer.Option("--leave-one-out", help="The panel is the training panel: exclude each person's own haplotypes."),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Exact log-likelihood of a panel's haplotypes, in nats."""
    from engine.genomics.commands import score_command

    with progress_bar() as progress:
        result = score_command(run, panel, leave_one_out=leave_one_out, intersect=intersect, progress=progress)
    emit(result, json)


@app.command()
def evaluate(
    real: Annotated[Path, typer.Option("--real", help="Held-out real panel.")],
    synthetic: Annotated[Path, typer.Option("--synthetic", help="Synthetic panel.")],
    train: Annotated[
        Path | None, typer.Option("--train", help="Training panel: for copying and the real-versus-real floor.")
    ] = None,
    samples: SamplesTable = None,
    intersect: Annotated[bool, typer.Option("--intersect", help="Use the sites that all sides share.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for findings and figures.")] = None,
    seed: Seed = 0,
    json: JsonFlag = False,
) -> None:
    """How near a synthetic panel is to real held-out haplotypes, and how near to the training ones."""
    from engine.genomics.commands import evaluate_command
    from engine.release.evaluation import genotype_report

    with progress_bar() as progress:
        result = evaluate_command(
            real,
            synthetic,
            train=train,
            samples=samples,
            out=out,
            seed=seed,
            intersect=intersect,
            report=genotype_report,
            progress=progress,
        )
    emit(result, json, lambda r: finding_lines(r["findings"]))
