"""How much of the known truth a synthetic cohort kept: effects estimated in the same way in both cohorts, beside the
truth.

Each effect is estimated by one fixed rule from the real cohort and from the synthetic one. The floor of an effect is
the half width of the 95 % interval that a *real* cohort of the synthetic one's size would have. An effect counts as
kept when the synthetic estimate is within 1.96 * sqrt(se_real^2 + se_size^2) of the truth, where se_size = se_real *
sqrt(n_real / n_synthetic): a generator learns from the real cohort and inherits its sampling error, and a synthetic
estimate that is merely imprecise gains nothing. Where the real interval holds zero effect, the cohort is too small to
judge it: "void". What cannot be known from here: whether a kept effect was kept by copying (that is the audit's
question).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine import seeding
from engine.audit.findings import Finding
from engine.cohort.association import fit_logistic, score_test
from engine.cohort.config import EmbeddedConfig
from engine.cohort.genotypes import Locus
from engine.cohort.measure import Calibration, Measures, calibrate, measure
from engine.cohort.tables import Table, require, rows, take
from engine.errors import InputError
from engine.imaging.volume import Volume

_Z = 1.959964


@dataclass(frozen=True)
class Observed:
    """What a user would have of a cohort: tables, scans and dosages; no truth.

    Attributes:
        subjects: one row per person: subject, group, sex, age, diagnosis (CN/AD).
        dosage_nl: (people, sites) ALT counts in the order of `subjects`; None where there are no genotypes.
        scans: one row per scan: subject, visit, age, sex, diagnosis, interval_years; None where there are no scans.
        volumes: one per row of `scans`.
    """

    subjects: Table
    dosage_nl: np.ndarray | None = None
    scans: Table | None = None
    volumes: Sequence[Volume] = ()


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error and the units it rests on."""

    value: float
    se: float
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        return float(self.value - _Z * self.se), float(self.value + _Z * self.se)


@dataclass(frozen=True)
class TruthReport:
    """Findings (one per effect) and JSON-ready figures: effects, ventricle_age, calibration, af, gwas, ages."""

    findings: list[Finding]
    figures: dict[str, Any]


def compare(
    real: Observed,
    synthetic: Observed,
    *,
    config: EmbeddedConfig,
    loci: Sequence[Locus] = (),
    true_ventricle_mm3: np.ndarray | None = None,
    position_bp: np.ndarray | None = None,
    seed: int = 0,
) -> TruthReport:
    """Compare two cohorts with the generating model.

    Args:
        real: the embedded cohort's training people.
        synthetic: what was generated from them; either modality may be absent on both sides.
        config: the generating model.
        loci: the causal variants, as sites of the dosages.
        true_ventricle_mm3: truth per scan of `real`, for the calibration of the ventricle measure.
        position_bp: of the sites, for the association figure.
        seed: of the bootstrap over people (Fst only).

    Raises:
        InputError: a table lacks a column, or scans are given without their truth.
    """
    for name, side in (("real", real), ("synthetic", synthetic)):
        require(side.subjects, ("group", "sex", "age", "diagnosis"), f"{name} subjects")
    findings, figures = _people(real.subjects, synthetic.subjects, config)
    if real.dosage_nl is not None and synthetic.dosage_nl is not None:
        more, drawn = _genetics(real, synthetic, loci, position_bp, seed)
        findings += more
        figures |= drawn
    if real.scans is not None and synthetic.scans is not None:
        if true_ventricle_mm3 is None:
            raise InputError("the true ventricle volume of every real scan", "none", "compare")
        more, drawn = _anatomy(real, synthetic, config, true_ventricle_mm3)
        findings += more
        figures |= drawn
    figures["effects"] = [
        {"name": f.name, "synthetic": f.value, "interval": list(f.interval or ()), "verdict": f.verdict, **f.detail}
        for f in findings
        if "real" in f.detail
    ]
    return TruthReport(findings, figures)


def kept(
    name: str,
    pair: Sequence[Estimate],
    truth: float | None,
    *,
    null: float | None = None,
    unit: str = "",
    note: str = "",
) -> Finding:
    """Finding for one effect, judged as the module says; against the real estimate where the truth is not a number.

    Args:
        pair: the real and the synthetic estimate.
        truth: of the generating model; None for a quantity that has no closed form.
        null: the value that means "no effect"; where the real interval holds it, the verdict is "void".
    """
    real, synthetic = pair
    floor = _Z * real.se * np.sqrt(real.n / max(synthetic.n, 1))
    target = real.value if truth is None else truth
    allowed = float(np.hypot(_Z * real.se, floor))
    verdict: Any = "pass" if abs(synthetic.value - target) <= allowed else "fail"
    if null is not None and real.interval[0] <= null <= real.interval[1]:
        verdict, note = "void", f"{note} The real cohort cannot tell this effect from none.".strip()
    if not np.isfinite([synthetic.value, target, allowed]).all():
        verdict, note = "void", f"{note} Could not be estimated in both cohorts.".strip()
    return Finding(
        name=name,
        value=synthetic.value,
        interval=synthetic.interval if np.isfinite(synthetic.se) else None,
        n={"real": real.n, "synthetic": synthetic.n},
        threshold=float(target),
        calibrated_on="truth of the generating model" if truth is not None else "real cohort",
        direction="target",
        verdict=verdict,
        unit=unit,
        floor=float(floor),
        note=note,
        detail={
            "truth": truth,
            "real": _plain(real.value),
            "real_interval": [_plain(x) for x in real.interval],
            "allowed": _plain(allowed),
        },
    )


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _least_squares(design_nf: np.ndarray, y_n: np.ndarray, column: int) -> Estimate:
    """One coefficient of a linear regression with its standard error (homoscedastic); NaN where it cannot be had."""
    n, f = design_nf.shape
    if n <= f + 1 or np.linalg.matrix_rank(design_nf) < f:
        return Estimate(float("nan"), float("nan"), n)
    inverse = np.linalg.inv(design_nf.T @ design_nf)
    beta = inverse @ (design_nf.T @ y_n)
    residual = y_n - design_nf @ beta
    return Estimate(float(beta[column]), float(np.sqrt(residual @ residual / (n - f) * inverse[column, column])), n)


def _mean(values: np.ndarray) -> Estimate:
    n = len(values)
    if n < 3:
        return Estimate(float("nan"), float("nan"), n)
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(n)), n)


def _share(flags: np.ndarray) -> Estimate:
    """Share with a Wald standard error; half an event is added to both sides, so that 0 of n has an interval too."""
    n = len(flags)
    p = (float(np.sum(flags)) + 0.5) / (n + 1)
    return Estimate(float(np.mean(flags)), float(np.sqrt(p * (1 - p) / (n + 1))), n)


def _people(real: Table, synthetic: Table, config: EmbeddedConfig) -> tuple[list[Finding], dict[str, Any]]:
    """Marginals: mean and spread of age, sex, groups, diagnosis; and the age effect on the diagnosis."""
    sides = (real, synthetic)
    age = [_mean(np.asarray(s["age"], dtype=float)) for s in sides]
    spread = [
        Estimate(float(np.std(s["age"], ddof=1)), float(np.std(s["age"], ddof=1) / np.sqrt(2 * (rows(s) - 1))), rows(s))
        for s in sides
    ]
    findings = [
        kept("age_mean", age, None, unit="years"),
        kept("age_sd", spread, None, unit="years"),
        kept("male_share", [_share(s["sex"] == "M") for s in sides], config.recruitment.male, unit="share"),
        kept("ad_share", [_share(s["diagnosis"] == "AD") for s in sides], None, unit="share"),
    ]
    for group, share in zip(config.genotypes.groups, config.genotypes.shares):
        findings.append(kept(f"group_share_{group}", [_share(s["group"] == group) for s in sides], share, unit="share"))
    outside = (synthetic["age"] < config.recruitment.age_low) | (synthetic["age"] > config.recruitment.age_high)
    findings.append(
        Finding(
            name="age_outside_bounds",
            value=float(outside.sum()),
            n=rows(synthetic),
            threshold=0.0,
            calibrated_on="recruitment bounds",
            direction="lower",
            verdict="fail" if outside.any() else "pass",
            unit="people",
        )
    )
    edges = np.arange(config.recruitment.age_low, config.recruitment.age_high + 5, 5.0)
    figures = {
        "ages": {
            "edges": edges.tolist(),
            **{n: np.histogram(s["age"], edges)[0].tolist() for n, s in zip(("real", "synthetic"), sides)},
        }
    }
    return findings, figures


def diagnosis_effects(subjects: Table, dosage_nm: np.ndarray, groups: Sequence[str]) -> list[Estimate]:
    """Log odds of AD per ALT allele of each locus and, last, per decade of age: one logistic regression with sex and
    group."""
    columns = [
        np.ones(rows(subjects)),
        *np.asarray(dosage_nm, dtype=float).T,
        (np.asarray(subjects["age"], dtype=float) - 70) / 10,
    ]
    columns.append((subjects["sex"] == "M").astype(float))
    columns += [(subjects["group"] == g).astype(float) for g in groups[1:]]
    beta, covariance = fit_logistic(
        np.stack(columns, axis=1), (subjects["diagnosis"] == "AD").astype(float), ridge=1e-3
    )
    wanted = range(1, dosage_nm.shape[1] + 2)
    return [Estimate(float(beta[i]), float(np.sqrt(covariance[i, i])), rows(subjects)) for i in wanted]


def hudson_fst(dosage_a: np.ndarray, dosage_b: np.ndarray) -> float:
    """Hudson's Fst, ratio of averages over sites (Bhatia et al., Genome Research 2013, equation 10); inputs (people,
    sites)."""
    n_a, n_b = 2 * len(dosage_a), 2 * len(dosage_b)
    p, q = dosage_a.mean(axis=0) / 2, dosage_b.mean(axis=0) / 2
    within = p * (1 - p) / (n_a - 1) + q * (1 - q) / (n_b - 1)
    return float(((p - q) ** 2 - within).sum() / (p * (1 - q) + q * (1 - p)).sum())


def _fst(dosage_nl: np.ndarray, group: np.ndarray, pair: tuple[str, str], seed: int, repeats: int = 40) -> Estimate:
    """Fst with a bootstrap standard error over people (sites of one region are not independent, people are)."""
    a, b = (np.asarray(dosage_nl[group == g], dtype=np.float32) for g in pair)
    if min(len(a), len(b)) < 4:
        return Estimate(float("nan"), float("nan"), len(a) + len(b))
    rng = seeding.generator(seed, "cohort.truth.fst")
    drawn = [hudson_fst(a[rng.integers(0, len(a), len(a))], b[rng.integers(0, len(b), len(b))]) for _ in range(repeats)]
    return Estimate(hudson_fst(a, b), float(np.std(drawn, ddof=1)), len(a) + len(b))


def _genetics(
    real: Observed, synthetic: Observed, loci: Sequence[Locus], position_bp: np.ndarray | None, seed: int
) -> tuple[list[Finding], dict[str, Any]]:
    assert real.dosage_nl is not None
    assert synthetic.dosage_nl is not None
    if real.dosage_nl.shape[1] != synthetic.dosage_nl.shape[1]:
        raise InputError(f"{real.dosage_nl.shape[1]} sites", str(synthetic.dosage_nl.shape[1]), "synthetic genotypes")
    groups = [str(g) for g in dict.fromkeys(sorted(real.subjects["group"]))]
    sides = ((real.subjects, real.dosage_nl), (synthetic.subjects, synthetic.dosage_nl))
    findings: list[Finding] = []
    if loci:
        sites = np.array([locus.site for locus in loci])
        estimates = [diagnosis_effects(s, d[:, sites], groups) for s, d in sides]
        for i, locus in enumerate(loci):
            findings.append(
                kept(
                    f"log_odds_{locus.name}",
                    (estimates[0][i], estimates[1][i]),
                    locus.log_odds,
                    null=0.0,
                    unit="log odds per allele",
                )
            )
    for i, first in enumerate(groups):
        for second in groups[i + 1 :]:
            pair = [_fst(d, s["group"], (first, second), seed) for s, d in sides]
            findings.append(kept(f"fst_{first}_{second}", pair, None, unit="Hudson Fst", note="Bootstrap over people."))
    figures: dict[str, Any] = {"af": {}, "gwas": {}}
    for group in groups:
        frequency = [d[s["group"] == group].mean(axis=0) / 2 if (s["group"] == group).any() else [] for s, d in sides]
        figures["af"][group] = {
            "real": np.round(frequency[0], 4).tolist(),
            "synthetic": np.round(frequency[1], 4).tolist(),
        }
    place = position_bp if position_bp is not None else np.arange(real.dosage_nl.shape[1])
    figures["gwas"] = {"position_bp": place.tolist(), "causal_bp": [int(place[locus.site]) for locus in loci]}
    for name, (s, d) in zip(("real", "synthetic"), sides):
        columns = [np.ones(rows(s)), (s["age"] - 70) / 10, s["sex"] == "M", *(s["group"] == g for g in groups[1:])]
        p = score_test(d, (s["diagnosis"] == "AD").astype(float), np.stack(columns, axis=1).astype(float)).p_l
        figures["gwas"][f"{name}_log10_p"] = np.round(
            -np.log10(np.clip(np.nan_to_num(p, nan=1.0), 1e-300, 1)), 3
        ).tolist()
    return findings, figures


def anatomy_effects(scans: Table, ventricle_mm3: np.ndarray, brain_mm3: np.ndarray) -> dict[str, Estimate]:
    """The anatomy's effects: regressions of log volumes on first visits, and changes between visits within a person."""
    first = scans["visit"] == 1
    log_v, log_b = np.log(ventricle_mm3), np.log(brain_mm3)
    age, male = np.asarray(scans["age"], dtype=float) - 70, (scans["sex"] == "M").astype(float)
    ad = (scans["diagnosis"] == "AD").astype(float)
    one = np.ones(len(age))
    found = {}
    for name, value in (("CN", 0.0), ("AD", 1.0)):
        rows_of = first & (ad == value)
        design = np.stack([one, age, male], axis=1)[rows_of]
        found[f"ventricle_age_slope_{name}"] = _least_squares(design, log_v[rows_of], 1)
    found["ventricle_ad_effect"] = _least_squares(np.stack([one, age, male, ad], axis=1)[first], log_v[first], 3)
    found["head_sex_effect"] = _least_squares(np.stack([one, male], axis=1)[first], log_b[first], 1)
    before, after = visit_pairs(scans)
    rate = (log_v[after] - log_v[before]) / np.maximum(np.asarray(scans["interval_years"], dtype=float)[after], 1e-6)
    for name, value in (("CN", 0.0), ("AD", 1.0)):
        found[f"ventricle_rate_{name}"] = _mean(rate[ad[after] == value])
    for name, y in (("ventricle", log_v), ("brain", log_b)):
        found[f"{name}_visit_correlation"] = _partial_correlation(
            y, before, after, np.stack([one, age, male, ad], axis=1)
        )
    return found


def visit_pairs(scans: Table) -> tuple[np.ndarray, np.ndarray]:
    """Row indices of the first and second visits of people who have both."""
    row = {(str(s), int(v)): i for i, (s, v) in enumerate(zip(scans["subject"], scans["visit"]))}
    both = [s for s, v in row if v == 2 and (s, 1) in row]
    pick = lambda visit: np.array([row[s, visit] for s in both], dtype=np.int64)  # noqa: E731
    return pick(1), pick(2)


def _partial_correlation(y: np.ndarray, before: np.ndarray, after: np.ndarray, design: np.ndarray) -> Estimate:
    """Correlation between a person's two visits of what age, sex and diagnosis leave over, as Fisher's z (se
    1/sqrt(n-3-f))."""
    n = len(before)
    if n < design.shape[1] + 6:
        return Estimate(float("nan"), float("nan"), n)
    rest = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    r = float(np.clip(np.corrcoef(rest[before], rest[after])[0, 1], -0.9999, 0.9999))
    return Estimate(float(np.arctanh(r)), float(1 / np.sqrt(n - 3 - (design.shape[1] - 1))), n)


def _anatomy(
    real: Observed, synthetic: Observed, config: EmbeddedConfig, true_mm3: np.ndarray
) -> tuple[list[Finding], dict[str, Any]]:
    assert real.scans is not None
    assert synthetic.scans is not None
    for name, side in (("real", real), ("synthetic", synthetic)):
        require(side.scans or {}, ("subject", "visit", "age", "sex", "diagnosis", "interval_years"), f"{name} scans")
        if rows(side.scans or {}) != len(side.volumes):
            raise InputError(f"{rows(side.scans or {})} volumes", str(len(side.volumes)), f"{name} scans")
    seen: list[Measures] = [measure(real.volumes), measure(synthetic.volumes)]
    line: Calibration = calibrate(seen[0], true_mm3, real.scans)
    ventricle = [line.ventricle_mm3(m) for m in seen]
    a = config.anatomy
    truth: dict[str, tuple[float | None, float | None, str]] = {
        "ventricle_age_slope_CN": (a.ventricle_log_per_year, 0.0, "log mm3 per year"),
        "ventricle_age_slope_AD": (a.ventricle_log_per_year, 0.0, "log mm3 per year"),
        "ventricle_ad_effect": (a.ventricle_log_ad, 0.0, "log mm3"),
        "head_sex_effect": (a.head_log_male, 0.0, "log mm3"),
        "ventricle_rate_CN": (a.ventricle_log_per_year, 0.0, "log mm3 per year, within person"),
        "ventricle_rate_AD": (a.ventricle_log_per_year + a.rate_log_ad, 0.0, "log mm3 per year, within person"),
        "ventricle_visit_correlation": (None, 0.0, "Fisher z"),
        "brain_visit_correlation": (None, 0.0, "Fisher z"),
    }
    effects = [anatomy_effects(s.scans or {}, v, m.brain_mm3) for s, v, m in zip((real, synthetic), ventricle, seen)]
    findings = [
        Finding(
            name="ventricle_measure_r2",
            value=line.r2,
            n=line.n,
            calibrated_on="true volumes of the real scans, five folds of people",
            direction="higher",
            note="How well the image measure, on which the ventricle findings rest, recovers the true volume.",
            detail={"slope": line.slope, "intercept_mm3": line.intercept},
        )
    ]
    for name, (value, null, unit) in truth.items():
        findings.append(kept(name, (effects[0][name], effects[1][name]), value, null=null, unit=unit))
    points: dict[str, Any] = {}
    for name, side, volume in zip(("real", "synthetic"), (real, synthetic), ventricle):
        table = take(side.scans or {}, np.arange(len(volume)))
        points[name] = {
            "age": np.round(np.asarray(table["age"], dtype=float), 2).tolist(),
            "ventricle_mm3": np.round(volume).tolist(),
            "diagnosis": [str(d) for d in table["diagnosis"]],
            "visit": [int(v) for v in table["visit"]],
        }
    calibration = {
        "true_mm3": np.round(true_mm3).tolist(),
        "measured_mm3": np.round(ventricle[0]).tolist(),
        "r2": line.r2,
    }
    return findings, {"ventricle_age": points, "calibration": calibration}
