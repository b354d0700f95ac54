"""Covariate fidelity: what a regressor trained on real scans reads from a synthetic one, against what was asked for.

Continuous covariates are read by ridge regression, categorical ones by logistic regression, both on features fitted on the
real training side; how well the same regressor reads unseen real scans is the floor beside the figure.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from engine.audit.findings import Finding
from engine.audit.intervals import bootstrap_mean
from engine.imaging.dataset import is_missing
from engine.seeding import generator

_LEAST = 30  # training scans with a value
_LEAST_TESTED = 8
_MOST_LEVELS = 10
_LEAST_IN_LEVEL = 5
_RESAMPLED = 500


def kind_of(cells: Sequence[dict[str, str]], name: str) -> str | None:
    """ "continuous", "categorical", or None where too few scans have a value or there are too many levels."""
    given = [row[name] for row in cells if name in row and not is_missing(row[name])]
    if len(given) < _LEAST:
        return None
    levels = sorted(set(given))
    if len(levels) > _MOST_LEVELS:
        return "continuous" if all(_is_number(v) for v in levels) else None
    return "categorical" if len(levels) > 1 and min(given.count(v) for v in levels) >= _LEAST_IN_LEVEL else None


def fidelity(
    name: str,
    kind: str,
    fitted: tuple[np.ndarray, Sequence[dict[str, str]]],
    real: tuple[np.ndarray, Sequence[dict[str, str]], np.ndarray],
    made: tuple[np.ndarray, Sequence[dict[str, str]]],
    seed: int,
) -> list[Finding]:
    """Findings of one covariate; none where a side has fewer than 8 scans with a value, or one level only.

    Args:
        fitted, real, made: features (n, f) and cells of the training side, of unseen real scans, of synthetic ones;
            of the real ones the person of each.
    """
    x, y, _ = _given(*fitted, name, kind, None)
    tested_x, tested_y, person = _given(real[0], real[1], name, kind, real[2])
    made_x, made_y, _ = _given(*made, name, kind, None)
    if min(len(tested_y), len(made_y)) < _LEAST_TESTED:
        return []
    if kind == "continuous":
        y, tested_y, made_y = (values.astype(float) for values in (y, tested_y, made_y))
        return _continuous(name, (x, y), (tested_x, tested_y, person), (made_x, made_y), seed)
    return _categorical(name, (x, y), (tested_x, tested_y), (made_x, made_y), seed)


def _continuous(
    name: str,
    fitted: tuple[np.ndarray, np.ndarray],
    real: tuple[np.ndarray, np.ndarray, np.ndarray],
    made: tuple[np.ndarray, np.ndarray],
    seed: int,
) -> list[Finding]:
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 5, 25))).fit(*fitted)
    read_real, read_made = model.predict(real[0]), model.predict(made[0])
    error, low, high = bootstrap_mean(np.abs(read_made - made[1]), seed=seed)
    floor, *floor_interval = bootstrap_mean(np.abs(read_real - real[1]), person_n=real[2], seed=seed)
    n = {"synthetic": len(made[1]), "real": len(real[1]), "trained_on": len(fitted[1])}
    note = f"ridge regression of {name} on features of real training scans; floor: on unseen real scans"
    found = [
        Finding(
            f"covariate_error_{name}", error, (low, high), n, None, "unseen real scans", "lower", "none", "", floor,
            "mean absolute error against what was asked for; " + note, {"floor_interval": floor_interval},
        )
    ]  # fmt: skip
    if min(made[1].std(), real[1].std()) > 0:
        r, interval = _resampled(_correlation, read_made, made[1], seed)
        r_real, real_interval = _resampled(_correlation, read_real, real[1], seed)
        found.append(
            Finding(
                f"covariate_r_{name}", r, interval, n, None, "unseen real scans", "higher", "none", "", r_real,
                "correlation of what was read with what was asked for; " + note, {"floor_interval": list(real_interval)},
            )
        )  # fmt: skip
    return found


def _categorical(
    name: str,
    fitted: tuple[np.ndarray, np.ndarray],
    real: tuple[np.ndarray, np.ndarray],
    made: tuple[np.ndarray, np.ndarray],
    seed: int,
) -> list[Finding]:
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    learner = LogisticRegressionCV(
        Cs=np.logspace(-4, 2, 7), max_iter=2000, class_weight="balanced", use_legacy_attributes=False, scoring="neg_log_loss",
        l1_ratios=(0.0,),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_pipeline(StandardScaler(), learner).fit(*fitted)
    levels = list(model.classes_)
    values = {}
    for side, (x, y) in (("made", made), ("real", real)):
        known = np.isin(y, levels)
        p, code = model.predict_proba(x[known]), np.array([levels.index(v) for v in y[known]])
        values[side] = _resampled_auc(p, code, seed)
    if values["made"] is None or values["real"] is None:
        return []
    (area, interval), (floor, floor_interval) = values["made"], values["real"]
    n = {"synthetic": len(made[1]), "real": len(real[1]), "trained_on": len(fitted[1])}
    return [
        Finding(
            f"covariate_auc_{name}", area, interval, n, None, "unseen real scans", "higher", "none", "", floor,
            f"area under the ROC of reading {name} (logistic regression on features of real training scans) against what was"
            " asked for; floor: on unseen real scans",
            {"floor_interval": list(floor_interval), "levels": len(levels)},
        )
    ]  # fmt: skip


def auc(probability_nk: np.ndarray, code_n: np.ndarray) -> float | None:
    """Area under the ROC, one level against the rest, mean over the levels that occur; None where only one does.

    With two levels that is the ordinary area.
    """
    from sklearn.metrics import roc_auc_score

    present = [k for k in range(probability_nk.shape[1]) if 0 < (code_n == k).sum() < len(code_n)]
    if not present:
        return None
    return float(np.mean([roc_auc_score(code_n == k, probability_nk[:, k]) for k in present]))


def _resampled_auc(p_nk: np.ndarray, code_n: np.ndarray, seed: int) -> tuple[float, tuple[float, float]] | None:
    value = auc(p_nk, code_n) if len(code_n) else None
    if value is None:
        return None
    rng, drawn = generator(seed, "imaging.quality.auc"), []
    for _ in range(_RESAMPLED):
        index = rng.integers(0, len(code_n), len(code_n))
        one = auc(p_nk[index], code_n[index])
        if one is not None:
            drawn.append(one)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return value, (float(low), float(high))


def _resampled(metric, a_n: np.ndarray, b_n: np.ndarray, seed: int) -> tuple[float, tuple[float, float]]:  # type: ignore[no-untyped-def]
    rng = generator(seed, "imaging.quality.resample")
    drawn = [metric(a_n[k], b_n[k]) for k in (rng.integers(0, len(a_n), len(a_n)) for _ in range(_RESAMPLED))]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return metric(a_n, b_n), (float(low), float(high))


def _correlation(a_n: np.ndarray, b_n: np.ndarray) -> float:
    if a_n.std() == 0 or b_n.std() == 0:
        return float("nan")
    return float(np.corrcoef(a_n, b_n)[0, 1])


def _given(
    x_nf: np.ndarray, cells: Sequence[dict[str, str]], name: str, kind: str, person_n: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, values and people of the rows that have a value (a number, where one is needed)."""
    here = [k for k, row in enumerate(cells) if name in row and (kind == "categorical" or _is_number(row[name]))]
    person = np.arange(len(cells)).astype(str) if person_n is None else person_n
    return x_nf[here], np.array([cells[k][name] for k in here], dtype=str), person[here]


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
