"""Does a synthetic cohort answer as the real one does? Findings against known truth, on people who were kept out.

Effects of age, sex, diagnosis and causal variants are those of `engine.cohort.truth`, on the embedded cohort. Beside them:

    association       plink2 logistic regression in the real training people and in the synthetic ones: what stands at the
                      causal variants, and whether the best variant of the region is one of them or stands for it
    diagnosis model   logistic regression trained on synthetic people and tested on real people that nobody was fitted to,
                      against one trained on the real training people: area under the ROC, and calibration

Estimates for the real side rest on the training people alone; the holdout is for testing.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, logit

from engine import seeding
from engine.audit.findings import Finding
from engine.audit.intervals import delong
from engine.cohort import truth
from engine.cohort.association import GeneticScore, estimate_score, fit_logistic
from engine.cohort.config import EmbeddedConfig
from engine.cohort.genotypes import Locus, dosage
from engine.cohort.measure import measure
from engine.cohort.tables import Table, read_table, rows, take
from engine.cohort.write import read_manifest
from engine.errors import InputError, Unsupported
from engine.genomics.panel import HaplotypePanel, read_panel, write_panel
from engine.imaging.volume import Volume

AUC_RATIO = 0.95
_SIGNIFICANT = 0.05  # over all variants of the region (Bonferroni)
_BOOTSTRAPS = 400


@dataclass(frozen=True)
class Side:
    """People of one cohort with what was measured on them: one row per person; dosages and first scans in that order."""

    subjects: Table
    panel: HaplotypePanel
    first_scans: Sequence[Volume] = ()

    @property
    def case(self) -> np.ndarray:
        return (self.subjects["diagnosis"] == "AD").astype(np.float64)


def judge(
    train: Side, holdout: Side, synthetic: Side, loci: Sequence[Locus], *, seed: int = 0, plink2: str | None = "plink2"
) -> list[Finding]:
    """Association and the diagnosis model. `plink2` None leaves the association out.

    Raises:
        Unsupported: plink2 is not installed.
    """
    made = [] if plink2 is None else association(train, synthetic, loci, plink2)
    return [*made, *diagnosis_model(train, holdout, synthetic, seed=seed)]


def covariates(subjects: Table) -> np.ndarray:
    """float64 (n, f): age in decades from 70, sex, groups; no intercept."""
    groups = ["AFR", "EUR", "EAS"]
    columns = [(np.asarray(subjects["age"], dtype=float) - 70) / 10, subjects["sex"] == "M"]
    columns += [subjects["group"] == name for name in groups[1:]]
    return np.stack(columns, axis=1).astype(np.float64)


def plink2_glm(side: Side, plink2: str = "plink2") -> dict[str, tuple[float, float, float]]:
    """Variant id -> (log odds per ALT allele, its standard error, p) of plink2's logistic regression (Firth where needed)
    with age, sex and group. Raises Unsupported where plink2 is not installed or fails."""
    program = shutil.which(plink2)
    if program is None:
        raise Unsupported("plink2", "no such program", "association", "scripts/test_tools.sh, or leave it out")
    x = covariates(side.subjects)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_panel(side.panel, folder / "g.pgen")
        ids = side.panel.samples.ids
        lines = ["#IID\tAD\tAGE\tMALE\tG1\tG2"]
        for name, case, row in zip(ids, side.case, x):
            lines.append("\t".join([name, str(1 + int(case)), *(f"{v:.5f}" for v in row)]))
        (folder / "p.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        places = [str(folder / name) for name in ("g", "p.txt", "o")]
        command = [program, "--pfile", places[0], "--allow-extra-chr", "--glm", "hide-covar", "omit-ref"]
        command += ["--pheno", places[1], "--pheno-name", "AD", "--covar", places[1]]
        command += [
            "--covar-name",
            "AGE,MALE,G1,G2",
            "--covar-variance-standardize",
            "--threads",
            "1",
            "--out",
            places[2],
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        found = list(folder.glob("o.AD.glm.logistic*"))
        if done.returncode or not found:
            raise Unsupported(
                "plink2 to finish", done.stderr.strip()[-200:] or done.stdout.strip()[-200:], "association"
            )
        header, *body = found[0].read_text(encoding="utf-8").splitlines()
    at = {name: k for k, name in enumerate(header.lstrip("#").split("\t"))}
    made: dict[str, tuple[float, float, float]] = {}
    for line in body:
        cells = line.split("\t")
        try:
            p = float(cells[at["P"]])
            beta = float(cells[at["BETA"]]) if "BETA" in at else float(np.log(float(cells[at["OR"]])))
            se = float(cells[at["SE"]] if "SE" in at else cells[at["LOG(OR)_SE"]])
            made[cells[at["ID"]]] = (beta, se, p)
        except (ValueError, KeyError):
            continue
    return made


def association(train: Side, synthetic: Side, loci: Sequence[Locus], plink2: str = "plink2") -> list[Finding]:
    """Per locus the effect that plink2 finds in both, and where the best variant of the real scan stands in the synthetic."""
    real, made = plink2_glm(train, plink2), plink2_glm(synthetic, plink2)
    findings = []
    for locus in loci:
        pair = [
            truth.Estimate(*side.get(locus.id, (np.nan, np.nan, np.nan))[:2], n)
            for side, n in ((real, rows(train.subjects)), (made, rows(synthetic.subjects)))
        ]
        findings.append(
            truth.kept(
                f"plink2_log_odds_{locus.name}", pair, locus.log_odds, null=0.0, unit="log odds per allele",
                note=f"p {real.get(locus.id, (0, 0, 1))[2]:.1e} real, {made.get(locus.id, (0, 0, 1))[2]:.1e} synthetic.",
            )
        )  # fmt: skip
    level = _SIGNIFICANT / max(len(real), 1)
    counted = dosage(train.panel).astype(np.float64)
    causal = [locus.site for locus in loci]
    place = {str(name): at for at, name in enumerate(train.panel.sites.id)}
    hits: dict[str, dict[str, Any]] = {}
    for name, side in (("real", real), ("synthetic", made)):
        best = min(side, key=lambda key: side[key][2])
        tagged = max(_r2(counted[:, place[best]], counted[:, site]) for site in causal) if best in place else 0.0
        hits[name] = {"id": best, "p": side[best][2], "r2_with_causal": round(tagged, 3)}
    seen = hits["real"]["p"] < level and hits["real"]["r2_with_causal"] >= 0.5
    right = hits["synthetic"]["p"] < level and hits["synthetic"]["r2_with_causal"] >= 0.5
    findings.append(
        Finding(
            name="gwas_hit_at_causal_locus",
            value=float(hits["synthetic"]["r2_with_causal"]),
            n={"real": rows(train.subjects), "synthetic": rows(synthetic.subjects)},
            threshold=0.5,
            calibrated_on="real training people",
            direction="higher",
            verdict=("pass" if right else "fail") if seen else "void",
            unit="r2 with a causal variant",
            note=f"Best variant of the scan, significant over the region at {level:.1e}."
            + ("" if seen else " The real cohort is too small to have one."),
            detail={"level": level, **hits},
        )
    )
    return findings


def _r2(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1] ** 2) if a.std() and b.std() else 0.0


def diagnosis_model(train: Side, holdout: Side, synthetic: Side, *, seed: int = 0) -> list[Finding]:
    """Area under the ROC on the holdout of models of real and of synthetic people, their ratio, and calibration.

    The model is logistic regression on age, sex, group, a genetic score estimated on its own training people, and, where
    there are scans, the logs of dark central volume and of brain volume. The interval of the ratio is a bootstrap over
    holdout people.
    """
    found = {"real": _trained(train), "synthetic": _trained(synthetic)}
    case = holdout.case
    predicted = {name: _predict(model, holdout) for name, model in found.items()}
    auc = {name: delong(p[case > 0], p[case == 0]) for name, p in predicted.items()}
    rng = seeding.generator(seed, "cohort.judge.auc")
    ratios = []
    for _ in range(_BOOTSTRAPS):
        index = rng.integers(0, len(case), len(case))
        if 0 < case[index].sum() < len(index):
            a, b = (
                delong(predicted[n][index][case[index] > 0], predicted[n][index][case[index] == 0])[0]
                for n in ("synthetic", "real")
            )
            ratios.append(a / max(b, 1e-9))
    ratio = auc["synthetic"][0] / auc["real"][0]
    n = {
        "holdout": len(case),
        "cases": int(case.sum()),
        "train": rows(train.subjects),
        "synthetic": rows(synthetic.subjects),
    }
    low, high = (float(x) for x in np.quantile(ratios, [0.025, 0.975]))
    calibration = _calibration(predicted["synthetic"], case)
    real_line = _calibration(predicted["real"], case)
    return [
        Finding(
            name="diagnosis_auc_ratio",
            value=float(ratio),
            interval=(low, high),
            n=n,
            threshold=AUC_RATIO,
            calibrated_on="model of the real training people, tested on the holdout",
            direction="higher",
            verdict="pass" if ratio >= AUC_RATIO else "fail",
            note="Trained on synthetic, tested on unseen real people, over trained on real.",
            detail={name: [round(float(x), 4) for x in value] for name, value in auc.items()},
        ),
        Finding(
            name="diagnosis_calibration_slope",
            value=calibration[0],
            interval=(calibration[0] - 1.96 * calibration[1], calibration[0] + 1.96 * calibration[1]),
            n=n,
            threshold=1.0,
            calibrated_on="holdout",
            direction="target",
            verdict="pass" if abs(calibration[0] - 1) <= 1.96 * calibration[1] else "fail",
            note="Slope of the holdout's diagnosis on the predicted log odds; 1 is calibrated, below is overconfident.",
            floor=real_line[0],
            detail={"brier": {k: round(float(((p - case) ** 2).mean()), 4) for k, p in predicted.items()},
                    "mean_predicted": round(float(predicted["synthetic"].mean()), 4), "share": round(float(case.mean()), 4)},
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Trained:
    beta: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    score: GeneticScore


def _features(side: Side, score: GeneticScore) -> np.ndarray:
    columns = [covariates(side.subjects), score.of(dosage(side.panel))[:, None]]
    if len(side.first_scans):
        seen = measure(side.first_scans)
        columns.append(np.log(np.stack([np.maximum(seen.dark_mm3, 1000.0), seen.brain_mm3], axis=1)))
    return np.concatenate(columns, axis=1)


def _trained(side: Side) -> _Trained:
    counted = dosage(side.panel)
    design = np.column_stack([np.ones(len(counted)), covariates(side.subjects)])
    score = estimate_score(counted, side.case, design, [str(name) for name in side.panel.sites.id])
    x = _features(side, score)
    mean, sd = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-9)
    beta, _ = fit_logistic(np.column_stack([np.ones(len(x)), (x - mean) / sd]), side.case, ridge=0.1)
    return _Trained(beta, mean, sd, score)


def _predict(model: _Trained, side: Side) -> np.ndarray:
    x = (_features(side, model.score) - model.mean) / model.sd
    return expit(model.beta[0] + x @ model.beta[1:])


def _calibration(predicted_n: np.ndarray, case_n: np.ndarray) -> tuple[float, float]:
    """Slope of the outcome on the predicted log odds, and its standard error."""
    x = np.column_stack([np.ones(len(case_n)), logit(np.clip(predicted_n, 1e-6, 1 - 1e-6))])
    beta, covariance = fit_logistic(x, case_n)
    return float(beta[1]), float(np.sqrt(covariance[1, 1]))


# ------------------------------------------------------------------------------------------------ folders of both cohorts


def judge_folders(
    real: str | Path, synthetic: str | Path, *, seed: int = 0, plink2: str | None = "plink2"
) -> tuple[list[Finding], dict[str, Any]]:
    """Everything, of an embedded cohort (`embedded.write_cohort`) and a synthetic one (`write.generate_command`, complete).

    Returns:
        Findings of `truth.compare` and of `judge`; the figures of the former.

    Raises:
        InputError: a folder is not what it should be, or a synthetic person lacks genotypes or a scan.
    """
    import json

    real, synthetic = Path(real), Path(synthetic)
    described = json.loads((real / "truth.json").read_text(encoding="utf-8"))
    config = EmbeddedConfig.model_validate(described["config"])
    loci = [Locus(**values) for values in described["loci"]]
    subjects, scans = read_table(real / "subjects.csv"), read_table(real / "imaging" / "volumes.csv")
    panel = read_panel(real / "genotypes.bcf", samples_tsv=real / "samples.tsv")
    sides = {}
    for split in ("train", "holdout"):
        here = subjects["split"] == split
        sides[split] = (take(subjects, here), panel.select(samples=here), take(scans, scans["split"] == split))
    made, made_panel = read_synthetic(synthetic)
    ventricle = np.array(described["scans"]["ventricle_mm3"])[scans["split"] == "train"]
    volumes = {split: _volumes(real / "imaging", sides[split][2]) for split in sides}
    compared = truth.compare(
        truth.Observed(sides["train"][0], dosage(sides["train"][1]), sides["train"][2], volumes["train"]),
        made,
        config=config,
        loci=loci,
        true_ventricle_mm3=ventricle,
        position_bp=panel.sites.position_bp,
        seed=seed,
    )
    of = lambda s, p, t, v: Side(s, p, [x for x, visit in zip(v, t["visit"]) if visit == 1])  # noqa: E731
    train, holdout = (of(*sides[split], volumes[split]) for split in ("train", "holdout"))
    assert made.scans is not None
    more = judge(
        train, holdout, of(made.subjects, made_panel, made.scans, made.volumes), loci, seed=seed, plink2=plink2
    )
    return [*compared.findings, *more], compared.figures


def read_synthetic(folder: str | Path) -> tuple[truth.Observed, HaplotypePanel]:
    """A synthetic cohort (`write.generate_command`, complete) as `truth.compare` takes it, and its genotypes.

    Raises:
        InputError: another folder, or a person without genotypes.
    """
    folder = Path(folder)
    people, scans, panel = _synthetic_tables(folder)
    return truth.Observed(people, dosage(panel), scans, _volumes(folder, scans)), panel


def _synthetic_tables(folder: Path) -> tuple[Table, Table, HaplotypePanel]:
    """People, visits with a scan, and genotypes of a synthetic cohort."""
    read_manifest(folder)
    visits = read_table(folder / "visits.tsv")
    first = visits["visit"] == 1
    count = dict(zip(*np.unique(visits["subject"].astype(str), return_counts=True)))
    people = take(visits, first)
    last = {str(s): float(y) for s, y in zip(visits["subject"], visits["years"])}
    people["visits"] = np.array([count[str(s)] for s in people["subject"]])
    people["interval_years"] = np.array([last[str(s)] for s in people["subject"]])
    name = next(
        (folder / f"genotypes.{kind}" for kind in ("bcf", "vcf.gz", "pgen") if (folder / f"genotypes.{kind}").exists()),
        None,
    )
    if name is None:
        raise InputError("a genotype file", "none", folder)
    panel = read_panel(name, samples_tsv=folder / "genotypes.samples.tsv")
    if panel.samples.ids != [str(s) for s in people["subject"]]:
        raise InputError("genotypes of everybody", f"of {panel.n_samples}", folder, "--complete")
    scans = take(visits, visits["image"].astype(str) != "")
    scans["interval_years"] = np.asarray(scans["years"], dtype=np.float64)
    return people, scans, panel


def _volumes(folder: Path, scans: Table) -> list[Volume]:
    from engine.imaging.volume import read_volume

    return [read_volume(folder / str(image), modality="MR") for image in scans["image"]]


def judge_table(people: int, *, seed: int = 0, plink2: str | None = "plink2") -> list[Finding]:
    """The same without scans on a larger embedded cohort, made, fitted and judged in memory: what images are too few for.

    As many synthetic people are made as there are training people; a second cohort of the same size, drawn by another seed
    from the same genomes, would be the ideal generator.
    """
    from engine.cohort import genotypes
    from engine.cohort.embedded import scan_table, visits_table
    from engine.cohort.joint import fit
    from engine.cohort.people import make_people
    from engine.cohort.profile import load_profile
    from engine.genomics.li_stephens import LiStephensConfig

    config = EmbeddedConfig(people=people, seed=seed)
    ids = [f"EMB{k:05d}" for k in range(people)]
    panel = genotypes.simulate(config.genotypes, people, seed, ids)
    loci = genotypes.choose_loci(panel, config.disease)
    group = panel.samples.group
    assert group is not None
    subjects, _ = make_people(config, group, dosage(panel, np.array([x.site for x in loci])), ids)
    table = visits_table(subjects, scan_table(subjects))
    table["image"] = np.full(rows(table), "", dtype=object)
    model = fit(table, load_profile("embedded"), genotypes=panel, haplotypes=LiStephensConfig(ne=20_000, mismatch=2e-4))
    here = subjects["split"] == "train"
    train = Side(take(subjects, here), panel.select(samples=here))
    holdout = Side(take(subjects, ~here), panel.select(samples=~here))
    made = synthetic_side(model, int(here.sum()), seed)
    compared = truth.compare(
        truth.Observed(train.subjects, dosage(train.panel)),
        truth.Observed(made.subjects, dosage(made.panel)),
        config=config,
        loci=loci,
        position_bp=panel.sites.position_bp,
        seed=seed,
    )
    return [*compared.findings, *judge(train, holdout, made, loci, seed=seed, plink2=plink2)]


def synthetic_side(model: Any, n: int, seed: int) -> Side:
    """n people of a model, complete and without scans, in memory."""
    from dataclasses import replace

    made = list(model.generate(n, seed=seed, scans=False, complete=True))
    names = ("group", "sex", "age", "diagnosis")
    subjects: Table = {"subject": np.array([p.id for p in made], dtype=object)}
    for name in names:
        values = [p.visits[0][name] for p in made]
        subjects[name] = np.array(values, dtype=np.float64 if name == "age" else object)
    candidate = np.array([p.candidate for p in made])
    rows_ = [p.visits for p in made]
    paths, groups = model.genetics.paths(candidate, model.labels(rows_), seed)
    ids = [p.id for p in made]
    panel = model.genetics.panel(paths, groups, ids, model.sexes(rows_))
    return Side(subjects, replace(panel, samples=replace(panel.samples, group=groups)))


def linkage_folders(real: str | Path, synthetic: str | Path, *, seed: int = 0) -> Any:
    """The linkage audit (`engine.cohort.linkage`) of an embedded cohort and a complete synthetic one; strata are group, sex
    and diagnosis, scans those of the first visit."""
    from engine.cohort.linkage import Linked, linkage, scan_features

    real, synthetic = Path(real), Path(synthetic)
    subjects, scans = read_table(real / "subjects.csv"), read_table(real / "imaging" / "volumes.csv")
    panel = read_panel(real / "genotypes.bcf", samples_tsv=real / "samples.tsv")
    made_subjects, made_scans, made_panel = _synthetic_tables(synthetic)

    def linked(people: Table, own: HaplotypePanel, table: Table, folder: Path) -> Linked:
        first = take(table, table["visit"] == 1)
        place = {str(name): at for at, name in enumerate(first["subject"])}
        absent = [str(name) for name in people["subject"] if str(name) not in place]
        if absent:
            raise InputError("a first scan of everybody", f"none of '{absent[0]}'", folder, "--complete")
        features = scan_features(_volumes(folder, first))
        rows_n = np.array([place[str(name)] for name in people["subject"]])
        stratum = np.array([f"{g}/{s}/{d}" for g, s, d in zip(people["group"], people["sex"], people["diagnosis"])])
        return Linked(dosage(own), features[rows_n], stratum)

    sides = {}
    for split in ("train", "holdout"):
        here = subjects["split"] == split
        seen = take(scans, scans["split"] == split)
        sides[split] = linked(take(subjects, here), panel.select(samples=here), seen, real / "imaging")
    return linkage(
        sides["train"], sides["holdout"], linked(made_subjects, made_panel, made_scans, synthetic), seed=seed
    )
