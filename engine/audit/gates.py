"""Every gate on one set of rows: the synthetic set, a planted control, or a draw of honest rows. One rule for all of them,
so that what a control shows holds for the verdict too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.audit.adversarial_accuracy import privacy_loss
from engine.audit.copies import CopySearch, Null, Scores
from engine.audit.findings import Finding, Verdict
from engine.audit.judge import judge
from engine.audit.membership import Attackers
from engine.audit.policy import AuditPolicy
from engine.audit.pools import Pool

# What only one modality can measure (kinship, registered correlation): called once with ("synthetic", rows, scores) and
# once for every control with its name. Its findings join those of that set, and gated ones count in its verdict like
# any other. It decides by one rule for all sets, calibrated on holdout against train, and returns [] where it has
# nothing to say.
Judge = Callable[[str, Pool, Scores], list[Finding]]


@dataclass(frozen=True)
class LightJudge:
    """A judge that is cheap enough for the repeated draws by which an audit measures itself (`rates`); a `Judge` itself.

    Attributes:
        judge: of the sides of the audit.
        make: the same for another training side and holdout, for draws that split the people anew.
        often: also cheap enough to be asked about every contaminated set.
    """

    judge: Judge
    make: Callable[[Pool, Pool], Judge]
    often: bool = True

    def __call__(self, name: str, pool: Pool, scores: Scores) -> list[Finding]:
        """As the judge."""
        return self.judge(name, pool, scores)


@dataclass(frozen=True)
class Judged:
    """Findings on one set and their verdict, the copy search's p-value of every row, and membership ROC by attack."""

    findings: list[Finding]
    verdict: Verdict
    p_n: NDArray[np.float64]
    curves: dict[str, Any]


@dataclass(frozen=True)
class Gates:
    """Both real sides, searched and ready to judge any set of rows."""

    search: CopySearch
    null: Null
    attackers: Attackers
    judges: Sequence[Judge] = ()

    @classmethod
    def prepare(cls, train: Pool, holdout: Pool, policy: AuditPolicy, seed: int, judges: Sequence[Judge] = ()) -> Gates:
        """Search real against real; `holdout` must not hold anybody who is judged later."""
        search = CopySearch(train, holdout, policy, seed)
        return cls(search, search.null(), Attackers.prepare(train, holdout, search.floor, policy, seed), judges)

    def judge(
        self,
        name: str,
        rows: Pool,
        scores: Scores,
        unseen: Pool | None = None,
        p_n: NDArray[np.float64] | None = None,
        nearest: Sequence[NDArray[np.float64]] | None = None,
    ) -> Judged:
        """All gates on `rows`, whose `scores` are those of `search.score`.

        Args:
            unseen: real rows that the adversarial accuracy compares with; the holdout where None.
            p_n, nearest: p-values of the scores, and distances from real rows (`Attackers.judge`), where they are known.
        """
        search = self.search
        judged = judge(search, self.null, scores, p_n)
        holdout = search.holdout if unseen is None else unseen
        found, curves = self.attackers.judge(rows, nearest)
        findings = [*judged.findings, *_aats(search.train, holdout, rows, search.policy, search.seed), *found]
        findings += [finding for more in self.judges for finding in more(name, rows, scores)]
        return Judged(findings, verdict_of(findings), judged.p_n, curves)


def verdict_of(findings: Sequence[Finding]) -> Verdict:
    """ "fail" where any gate fails, else "pass"."""
    return "fail" if any(finding.verdict == "fail" for finding in findings) else "pass"


def _aats(train: Pool, holdout: Pool, synthetic: Pool, policy: AuditPolicy, seed: int) -> list[Finding]:
    if min(len(train), len(holdout), len(synthetic)) < 10:
        note = "not given: needs 10 rows on every side"
        return [Finding(name, math.nan, note=note) for name in ("aats_test", "aats_train", "privacy_loss")]
    test, same, loss = privacy_loss(train, holdout, synthetic, seed=seed, rows=policy.aats_rows)
    copying = same.interval is not None and same.interval[1] < policy.aats_train_min
    leaking = loss.interval is not None and loss.interval[0] > policy.privacy_loss_max
    return [
        replace(test, calibrated_on="equal n"),
        replace(
            same,
            calibrated_on="equal n",
            threshold=policy.aats_train_min,
            direction="higher",
            verdict="fail" if copying else "pass",
        ),
        replace(
            loss, calibrated_on="equal n", threshold=policy.privacy_loss_max, verdict="fail" if leaking else "pass"
        ),
    ]
