"""Small regressions with a prior: of ordered levels, of rates, of a number's normal score; and smooth margins.

Each coefficient has a normal prior, by default weak (mean 0, sd 3 on a feature of unit scale), which keeps few people from
giving infinite effects; a published effect can stand in as another mean and sd. What is fitted is the posterior's mode. All
predictions go row by row, so that a person's figure does not depend on who is predicted beside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize
from scipy.special import expit, log_expit, ndtr, ndtri

WEAK_SD = 3.0
_GRID = 161  # points of a density
_ATOM_SHARE = 0.05  # a value that so many people share is one of its own (no pack-years, full marks)


def linear(x_nf: np.ndarray, beta_f: np.ndarray) -> np.ndarray:
    """float64 (n,): x beta, each row by itself."""
    if x_nf.shape[1] == 0:
        return np.zeros(len(x_nf))
    return np.add.reduce(np.ascontiguousarray(x_nf) * beta_f, axis=1)


@dataclass(frozen=True)
class Ordered:
    """Proportional odds: P(level <= j) = expit(cut_j - x beta); two levels are logistic regression.

    McCullagh, Journal of the Royal Statistical Society B 42:109 (1980).
    """

    cut: np.ndarray
    beta: np.ndarray

    def draw(self, x_nf: np.ndarray, uniform_n: np.ndarray) -> np.ndarray:
        """int64 (n,): level of each row at its uniform number."""
        return (uniform_n[:, None] > expit(self.cut[None] - linear(x_nf, self.beta)[:, None])).sum(axis=1)

    def above(self, x_nf: np.ndarray) -> np.ndarray:
        """float64 (n,): probability of any level but the first."""
        return 1 - expit(self.cut[0] - linear(x_nf, self.beta))


def fit_ordered(
    x_nf: np.ndarray,
    level_n: np.ndarray,
    levels: int,
    prior_mean: np.ndarray | None = None,
    prior_sd: np.ndarray | None = None,
) -> Ordered:
    """Mode of proportional odds under the prior; each level gets half a person more, spread over all, for the cuts.

    Args:
        x_nf: float64 (n, f), features of about unit scale.
        level_n: int (n,), 0 .. levels - 1; levels at least 2.
    """
    f = x_nf.shape[1]
    mean = np.zeros(f) if prior_mean is None else prior_mean
    sd = np.full(f, WEAK_SD) if prior_sd is None else prior_sd
    count = np.bincount(level_n, minlength=levels) + 0.5
    share = np.cumsum(count)[:-1] / count.sum()
    start = np.log(share / (1 - share))
    theta0 = np.concatenate([start[:1], np.log(np.maximum(np.diff(start), 1e-3)), mean])
    pseudo = 0.5 / levels  # of a person without features at each level

    def cuts(theta: np.ndarray) -> np.ndarray:
        return theta[0] + np.concatenate([[0.0], np.cumsum(np.exp(theta[1 : levels - 1]))])

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        cut, beta = cuts(theta), theta[levels - 1 :]
        value, grad_cut = 0.0, np.zeros(levels - 1)
        x, y = np.vstack([x_nf, np.zeros((levels, f))]), np.concatenate([level_n, np.arange(levels)])
        weight = np.concatenate([np.ones(len(level_n)), np.full(levels, pseudo)])
        eta = x @ beta
        edge = np.concatenate([[-np.inf], cut, [np.inf]])
        low, high = edge[y] - eta, edge[y + 1] - eta
        p = np.maximum(expit(high) - expit(low), 1e-12)
        slope_low, slope_high = (np.exp(log_expit(v) + log_expit(-v)) for v in (low, high))
        slope_low, slope_high = np.nan_to_num(slope_low), np.nan_to_num(slope_high)
        value = -float(weight @ np.log(p)) + 0.5 * float((((beta - mean) / sd) ** 2).sum())
        grad_beta = x.T @ (weight * (slope_high - slope_low) / p) + (beta - mean) / sd**2
        np.add.at(grad_cut, y[y < levels - 1], -(weight * slope_high / p)[y < levels - 1])
        np.add.at(grad_cut, y[y > 0] - 1, (weight * slope_low / p)[y > 0])
        step = np.exp(theta[1 : levels - 1])
        after = np.cumsum(grad_cut[::-1])[::-1]
        return value, np.concatenate([[after[0]], after[1:] * step, grad_beta])

    found = optimize.minimize(loss, theta0, jac=True, method="L-BFGS-B", options={"maxiter": 500, "ftol": 1e-12})
    return Ordered(cuts(found.x), found.x[levels - 1 :])


@dataclass(frozen=True)
class Nominal:
    """Levels without an order: each level against the first, softmax(a_j + x b_j)."""

    intercept: np.ndarray
    beta_jf: np.ndarray

    def draw(self, x_nf: np.ndarray, uniform_n: np.ndarray) -> np.ndarray:
        """int64 (n,): level of each row at its uniform number."""
        p = self.shares(x_nf)
        return np.minimum((uniform_n[:, None] > np.cumsum(p, axis=1)).sum(axis=1), p.shape[1] - 1)

    def shares(self, x_nf: np.ndarray) -> np.ndarray:
        """float64 (n, levels): probabilities."""
        score = np.stack([a + linear(x_nf, b) for a, b in zip(self.intercept, self.beta_jf)], axis=1)
        weight = np.exp(score - score.max(axis=1, keepdims=True))
        return weight / weight.sum(axis=1, keepdims=True)


def fit_nominal(x_nf: np.ndarray, level_n: np.ndarray, levels: int) -> Nominal:
    """Multinomial logistic regression with the weak prior; half a person more, spread over all levels."""
    from sklearn.linear_model import LogisticRegression

    f = x_nf.shape[1]
    if f == 0:
        share = np.bincount(level_n, minlength=levels) + 0.5 / levels
        return Nominal(np.log(share / share.sum()), np.zeros((levels, 0)))
    x, y = np.vstack([x_nf, np.zeros((levels, f))]), np.concatenate([level_n, np.arange(levels)])
    weight = np.concatenate([np.ones(len(level_n)), np.full(levels, 0.5 / levels)])
    made = LogisticRegression(C=WEAK_SD**2, max_iter=2000, tol=1e-8).fit(x, y, sample_weight=weight)
    if levels == 2:
        return Nominal(np.array([0.0, made.intercept_[0]]), np.stack([np.zeros(f), made.coef_[0]]))
    return Nominal(made.intercept_, made.coef_)


@dataclass(frozen=True)
class Rate:
    """A hazard per year, exp(a + x beta): P(within t years) = 1 - exp(-t hazard). The intervals may differ."""

    intercept: float
    beta: np.ndarray

    def probability(self, x_nf: np.ndarray, years_n: np.ndarray) -> np.ndarray:
        """float64 (n,): that it happens within the years."""
        return -np.expm1(-years_n * np.exp(np.minimum(self.intercept + linear(x_nf, self.beta), 50.0)))


def fit_rate(
    x_nf: np.ndarray,
    happened_n: np.ndarray,
    years_n: np.ndarray,
    prior_mean: np.ndarray | None = None,
    prior_sd: np.ndarray | None = None,
    *,
    least: int = 0,
) -> Rate:
    """Mode of the rate under the prior, of intervals in which it did or did not happen.

    With fewer than `least` events only the mean rate is fitted, and published effects (a prior mean) are taken as they
    are. Where nothing happened the rate is half an event over all years.
    """
    f = x_nf.shape[1]
    mean = np.zeros(f) if prior_mean is None else prior_mean
    sd = np.full(f, WEAK_SD) if prior_sd is None else prior_sd
    events, total = float(happened_n.sum()), float(years_n.sum())
    if total <= 0:
        return Rate(-50.0, np.zeros(f))
    start = np.log(max(events, 0.5) / total)
    free = events >= max(least, 1)

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        beta = theta[1:] if free else mean
        hazard = years_n * np.exp(np.minimum(theta[0] + x_nf @ beta, 30.0))
        hazard = np.maximum(hazard, 1e-12)
        log_p = np.log(-np.expm1(-hazard))
        value = -float(happened_n @ log_p - (1 - happened_n) @ hazard)
        slope = hazard * (1 - happened_n) - happened_n * hazard * np.exp(-hazard - log_p)
        value += 0.5 * float((((beta - mean) / sd) ** 2).sum())
        return value, np.concatenate([[slope.sum()], (x_nf.T @ slope + (beta - mean) / sd**2) if free else []])

    if events == 0:
        return Rate(float(start), np.zeros(f))
    theta0 = np.concatenate([[start], mean if free else []])
    found = optimize.minimize(loss, theta0, jac=True, method="L-BFGS-B", options={"maxiter": 500, "ftol": 1e-12})
    return Rate(float(found.x[0]), found.x[1:] if free else mean)


def fit_line(
    x_nf: np.ndarray,
    y_n: np.ndarray,
    prior_mean: np.ndarray | None = None,
    prior_sd: np.ndarray | None = None,
    weight_n: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """Coefficients of a linear regression under the prior, the first column without one, and the residuals' sd.

    The prior's sd is in units of the residual sd, which is found by two rounds.
    """
    f = x_nf.shape[1]
    mean = np.zeros(f) if prior_mean is None else prior_mean
    sd = np.concatenate([[1e6], np.full(f - 1, WEAK_SD)]) if prior_sd is None else prior_sd
    w = np.ones(len(y_n)) if weight_n is None else weight_n
    spread, beta = max(float(np.std(y_n)), 1e-9), mean.copy()
    for _ in range(2):
        precision = spread**2 / sd**2 if prior_sd is not None else 1 / sd**2
        left = (x_nf * w[:, None]).T @ x_nf + np.diag(precision)
        beta = np.linalg.solve(left, x_nf.T @ (w * y_n) + precision * mean)
        rest = y_n - x_nf @ beta
        spread = float(np.sqrt(max((w * rest**2).sum() / max(len(y_n) - f, 1), 1e-12)))
    return beta, spread


@dataclass(frozen=True)
class Density:
    """A probability density on [low, high], linear between grid points; sampled by inversion."""

    low: float
    high: float
    cumulative: np.ndarray  # (grid,), from 0 to 1

    @classmethod
    def smooth(cls, values: np.ndarray, low: float, high: float, least_width: float) -> Density:
        """Mixture of normals truncated to the bounds, one per value, width by Silverman's rule and at least
        `least_width`.
        """
        width = least_width
        if len(values) > 1:
            width = max(width, 1.06 * float(np.std(values, ddof=1)) * len(values) ** -0.2)
        grid = np.linspace(low, high, _GRID)
        if len(values) == 0:
            return cls(low, high, (grid - low) / (high - low))
        below = ndtr((grid[:, None] - values[None]) / width)
        share = (below - below[:1]) / (below[-1:] - below[:1])
        return cls(low, high, np.round(share.mean(axis=1), 8))  # as it is saved: a loaded model makes the same people

    def draw(self, uniform: np.ndarray) -> np.ndarray:
        """Values at the given probabilities."""
        return np.interp(uniform, self.cumulative, np.linspace(self.low, self.high, len(self.cumulative)))


@dataclass(frozen=True)
class Margin:
    """Distribution of a number within its range: a smooth density, and atoms where many people share a value."""

    smooth: Density
    share: float
    atom: np.ndarray
    atom_share: np.ndarray

    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        grid = np.linspace(self.smooth.low, self.smooth.high, len(self.smooth.cumulative))
        value = np.concatenate([grid, self.atom, self.atom])
        below = [self.share * np.interp(self.atom, grid, self.smooth.cumulative)]
        before = np.concatenate([[0.0], np.cumsum(self.atom_share)])
        at_grid = self.share * self.smooth.cumulative + before[np.searchsorted(self.atom, grid, side="right")]
        # at an atom the distribution steps; a grid point that is an atom stands after the step
        step = np.concatenate([at_grid, below[0] + before[:-1], below[0] + before[1:]])
        order = np.lexsort((step, value))
        return value[order], np.maximum.accumulate(step[order])

    def draw(self, uniform_n: np.ndarray) -> np.ndarray:
        """Values at these probabilities."""
        value, step = self._steps()
        return np.interp(uniform_n, step / step[-1], value)

    def cdf(self, value: float, below: bool = False) -> float:
        """Probability of at most `value`, or with `below` of less."""
        values, step = self._steps()
        at = float(np.interp(value, values, step / step[-1]))
        for atom, share in zip(self.atom, self.atom_share):
            if abs(value - atom) < 1e-9:
                first = float((step / step[-1])[np.searchsorted(values, atom, side="left")])
                at = first if below else first + float(share)
        return at

    def normal_score(self, value_n: np.ndarray) -> np.ndarray:
        """Normal score of each value, that of the middle of its step at an atom."""
        value, step = self._steps()
        step = step / step[-1]
        low = np.interp(value_n, value, step)  # at a step np.interp takes one of its ends: both ends are looked up
        for at, share in zip(self.atom, self.atom_share):
            inside = np.isclose(value_n, at, rtol=0, atol=1e-9)
            first = step[np.searchsorted(value, at, side="left")]
            low = np.where(inside, first + share / 2, low)
        return ndtri(np.clip(low, 1e-4, 1 - 1e-4))


def fit_margin(value_n: np.ndarray, low: float, high: float, whole: bool, min_count: int) -> Margin:
    """Margin of values within [low, high]; a value of fewer than `min_count` people is no atom, and nobody's own."""
    values, count = np.unique(value_n, return_counts=True)
    is_atom = (count >= max(min_count, _ATOM_SHARE * len(value_n))) & (not whole or len(values) > 40)
    # whole numbers in few values are smoothed over one unit and rounded when drawn; otherwise they are all atoms
    if whole and len(values) <= 40:
        is_atom = (count >= max(min_count, 0.2 * len(value_n))) & np.isin(values, (low, high))
    atom = values[is_atom]
    rest = value_n[~np.isin(value_n, atom)]
    # whole numbers are rounded when drawn, and so need half a unit on both sides
    width = 0.5 if whole else 0.01 * (high - low)
    smooth = Density.smooth(rest, low, high, max(width, 1e-6 * (high - low)))
    share = len(rest) / max(len(value_n), 1) if len(value_n) else 1.0
    return Margin(smooth, share, atom.astype(float), count[is_atom] / max(len(value_n), 1))
