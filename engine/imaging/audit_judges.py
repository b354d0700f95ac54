"""The audit's judge for scans: are the most suspicious rows of a set copies when they are laid on their nearest training
scan and compared voxel by voxel?

The copy search finds candidates in coarse features. Here each candidate is registered with its nearest training scan and
with its nearest holdout scan (`similarity`: rigid, or mirrored and rigid), and NCC and 3D-SSIM are measured on both. What
is judged is how much nearer training is, gap = atanh(NCC, training) - atanh(NCC, holdout): a blurred generator is more
alike to everybody, and in the gap that drops out. The null are unseen people under the same procedure: one scan of each,
against all of training and against the holdout less its own person, as a candidate is against all of training and the
holdout less one person.

A holdout of tens of people cannot give a p-value small enough to convict a single copy among hundreds of rows without an
assumption, and a single copy must be convicted. So the null's gaps (and correlations with training) are taken as normal
on the scale of Fisher's z, and the prediction limit of a new value is shared over all rows of the set, not over the
candidates alone: candidates are picked because they look like copies. Beside it the conformal p-value, which assumes
nothing, is given; a copy must also lie beyond every unseen person. The same rule is applied to every null person against
the others, and how many it would convict is printed as the floor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from engine.audit import AuditPolicy, Finding, Judge, Pool
from engine.audit.copies import Scores
from engine.audit.pools import topk
from engine.imaging.similarity import similarity
from engine.imaging.volume import Volume
from engine.seeding import generator

CANDIDATES = 6  # most suspicious rows of a set that are registered
NULL_PEOPLE = 30  # at most; a pair takes about a quarter of a second on one core
LEAST_PEOPLE = 8  # in the null, for its spread
_LEAST_SPREAD = 0.02  # of Fisher's z; where all unseen people are equally alike, a digit of NCC is no evidence
_CLIP = 1 - 1e-9

Side = tuple[Pool, Sequence[Volume]]


Compared = dict[tuple[bytes, str, int], tuple[float, float]]  # (features, side, row there) -> (NCC, SSIM)


def confirmation_judge(
    sides: Mapping[str, Side], *, seed: int = 0, alpha: float | None = None, compared: Compared | None = None
) -> Judge:
    """A judge that confirms candidates by registered NCC and 3D-SSIM.

    Args:
        sides: pool and volumes, row by row, of "train", "holdout", and of every set whose rows may be asked about. A set
            made elsewhere of these rows (a copycat, fresh people set aside) is recognised by them; of rows that are no
            scan (features with noise) nothing is said.
        seed: of the people drawn for the null.
        alpha: error allowed to the set; default that of the audit's gates.
        compared: pairs that were registered already, by a judge of the same training side and holdout; added to.

    The judge returns "confirmed_copies" (gated) and "registered_ncc", "registered_ssim" (the candidates' highest, beside
    the highest of unseen people); nothing for rows that are no scans.
    """
    alpha = AuditPolicy().alpha if alpha is None else alpha
    train, train_volumes = sides["train"]
    holdout, holdout_volumes = sides["holdout"]
    volumes = {row.tobytes(): v for pool, scans in sides.values() for row, v in zip(pool.data, scans, strict=True)}
    people, code_n = np.unique(holdout.person, return_inverse=True)
    row_of = {row.tobytes(): k for k, row in enumerate(holdout.data)}
    found: Compared = {} if compared is None else compared

    def compare(row: bytes, side: str, index: int) -> tuple[float, float]:
        """(NCC, SSIM) of a row's scan with a training or holdout scan."""
        if (row, side, index) not in found:
            other = train_volumes[index] if side == "train" else holdout_volumes[index]
            seen = similarity(other, volumes[row])
            found[row, side, index] = seen.ncc, 0.0 if math.isnan(seen.ssim) else seen.ssim
        return found[row, side, index]

    def measure(rows: Pool, train_index_k: NDArray[np.int64], skipped_k: NDArray[np.int64]) -> NDArray[np.float64]:
        """NCC and SSIM with the nearest training scan, then with the nearest holdout scan of others: (k, 4)."""
        _, holdout_index = topk(rows, holdout, 1, exclude=(skipped_k, code_n))
        return np.array(
            [
                compare(row.tobytes(), "train", int(t)) + compare(row.tobytes(), "holdout", int(h))
                for row, t, h in zip(rows.data, train_index_k, holdout_index[:, 0], strict=True)
            ]
        ).reshape(-1, 4)

    @cache
    def natural() -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Person codes of the null and what was measured of them."""
        rng = generator(seed, "imaging.audit.confirmation.null")
        drawn = rng.permutation(len(people))[:NULL_PEOPLE]
        rows = holdout.select(np.array([rng.choice(np.flatnonzero(code_n == person)) for person in drawn], dtype=int))
        _, train_index = topk(rows, train, 1)
        return drawn, measure(rows, train_index[:, 0], drawn)

    def judge(name: str, rows: Pool, scores: Scores) -> list[Finding]:
        if rows.kind != "features" or not all(row.tobytes() in volumes for row in rows.data):
            return []
        own_n = np.array([code_n[row_of[row.tobytes()]] if row.tobytes() in row_of else -1 for row in rows.data])
        null_people, null_p4 = natural()
        null_p4 = null_p4[~np.isin(null_people, own_n)]
        if len(null_p4) < LEAST_PEOPLE or len(people) < 3:
            note = f"not given: needs {LEAST_PEOPLE} unseen people, has {len(null_p4)}"
            return [Finding("confirmed_copies", math.nan, n=len(rows), note=note)]
        chosen = np.argsort(scores.statistic_nc[:, 0], kind="stable")[:CANDIDATES]
        dropped = generator(seed, f"imaging.audit.confirmation.{name}").integers(0, len(people), len(rows))
        skipped = np.where(own_n >= 0, own_n, dropped)[chosen].astype(np.int64)
        tested_k4 = measure(rows.select(chosen), scores.index_train_n[chosen], skipped)
        return _findings(tested_k4, null_p4, len(rows), alpha)

    return judge


def confirmed(
    tested_k4: NDArray[np.float64], null_p4: NDArray[np.float64], rows: int, alpha: float
) -> NDArray[np.bool_]:
    """Which candidates are copies, bool (k,): more alike to training than any unseen person, and by more than a prediction
    limit of `alpha` shared over all `rows` allows, in NCC with training and in its gap; and in the gap of SSIM beyond any
    unseen person.

    Args:
        tested_k4, null_p4: NCC and SSIM with training, NCC and SSIM with the holdout.
    """
    tested, null = _statistics(tested_k4), _statistics(null_p4)
    beyond = (tested > null.max(axis=0)).all(axis=1)
    people = len(null)
    spread = np.maximum(null[:, :2].std(axis=0, ddof=1), _LEAST_SPREAD) * math.sqrt(1 + 1 / people)
    p_k2 = stats.t.sf((tested[:, :2] - null[:, :2].mean(axis=0)) / spread, people - 1)
    return beyond & (p_k2.max(axis=1) * rows <= alpha)


# ------------------------------------------------------------------------------------------------------------------ p


def _statistics(measured_k4: NDArray[np.float64]) -> NDArray[np.float64]:
    """Columns: gap in NCC, NCC with training, gap in SSIM; as Fisher's z."""
    z = np.arctanh(np.clip(measured_k4, -_CLIP, _CLIP))
    return np.column_stack([z[:, 0] - z[:, 2], z[:, 0], z[:, 1] - z[:, 3]])


def _findings(tested_k4: NDArray[np.float64], null_p4: NDArray[np.float64], rows: int, alpha: float) -> list[Finding]:
    people = len(null_p4)
    copies = int(confirmed(tested_k4, null_p4, rows, alpha).sum())
    others = [np.delete(null_p4, k, axis=0) for k in range(people)]
    false = sum(bool(confirmed(null_p4[k : k + 1], rest, people, alpha)[0]) for k, rest in enumerate(others))
    gap_k, gap_p = _statistics(tested_k4)[:, 0], _statistics(null_p4)[:, 0]
    least_p = float((1 + (gap_p >= gap_k.max()).sum()) / (people + 1))
    n = {"rows": rows, "candidates": len(tested_k4), "unseen_people": people}
    calibrated = "unseen people, each against training and the holdout less itself"
    findings = [
        Finding(
            "confirmed_copies",
            float(copies),
            n=n,
            threshold=0.0,
            calibrated_on=calibrated,
            direction="lower",
            verdict="fail" if copies else "pass",
            floor=float(false),
            note="most suspicious scans that are copies when laid on their nearest training scan (NCC and 3D-SSIM)",
            detail={
                "gap_highest": float(gap_k.max()),
                "gap_unseen_mean": float(gap_p.mean()),
                "gap_unseen_highest": float(gap_p.max()),
                "conformal_p": least_p,
                "alpha": alpha,
            },
        )
    ]
    for column, name in enumerate(("registered_ncc", "registered_ssim")):
        findings.append(
            Finding(
                name,
                float(tested_k4[:, column].max()),
                n=n,
                calibrated_on=calibrated,
                direction="lower",
                floor=float(null_p4[:, column].max()),
                note="highest of the candidates with their nearest training scan; floor: the highest of unseen people",
            )
        )
    return findings
