"""What a regression on the covariates says of a latent, taken out of what the flow has to learn.

With few scans and few steps a flow learns what scans look like long before it learns what a covariate does to them. The mean
of latents given covariates is estimated at once, by ridge regression at every place of the latent, and the network models
what is left:

    x_t = (1 - t) x0 + t noise,   x0 = m(c) + rest,   v(x_t, t, c) = network(x_t - (1 - t) m(c), t, c) - m(c)

which is the same family of velocities, begun at a better place: training and sampling do not see the difference. Where an
earlier scan of the person is given, m is that scan's latent and what the regression says of the change in covariates, so
that a follow-up begins as its baseline. A covariate that is not given counts as average.

How fast somebody changes depends on who it is, and only people with two scans can tell. People change along the directions
in which people differ: what the regression leaves of their changes is projected on its own slopes, and there, where few
numbers have to be learned, regressed on products, the change of every continuous covariate times one and every covariate of
the earlier scan. Directions of that regression with no more power than noise are left out.

The regression is learned from all training scans with one weight of the ridge, the one with the least generalised
cross-validation error (Golub, Heath and Wahba, Technometrics 21:215, 1979) over all places together.

With components, what differs between people of equal covariates begins right too. A short flow makes people too much alike:
it learns texture long before the few directions, size and shape, that hold most of the variance. So the first principal
components of the residuals are taken as normal, with deviations s_k, everything else as white with deviation s_0, and the
velocity of that normal distribution is added, which is known in closed form and linear in r = x_t - (1 - t) m:

    a(s) = (t - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2),   a(s_0) r + sum_k (a(s_k) - a(s_0)) <r, u_k> u_k.

The network learns what is not normal. For a follow-up s_k and s_0 are those of what changed between two scans of one person
beyond what the covariates say, along the same directions; where no covariate changes there is nothing to add.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.imaging.dataset import Covariate
from engine.imaging.denoiser import Condition, Denoiser
from engine.imaging.dit import DiT

_PLACES = 65_536  # of the latent in float64 at a time
_ROWS = 4_096  # scans that give components
RIDGES = torch.logspace(-2, 5, 29, dtype=torch.float64)


class LinearMean(nn.Module):
    """(condition, size) -> mean of the standardised latent, float32 (b, c, d, h, w); zero until `set`.

    Args:
        levels: number of levels of each categorical covariate. continuous: number of continuous ones.
        shape_cdhw: of the latent the regression is made for; for another size its maps are interpolated.
        earlier: the condition has an earlier scan: its covariates come after those of now, and the last channels of the
            context are its latent and a flag (`context.flagged`).
        components: principal components of the residuals, at most.
    """

    def __init__(
        self, levels: Sequence[int], continuous: int, shape_cdhw: Sequence[int], earlier: bool, components: int = 0
    ) -> None:
        super().__init__()
        self.levels, self.continuous, self.earlier = tuple(levels), continuous, earlier
        columns = continuous + sum(levels)
        # parameters that nobody trains: they are saved, averaged and sent like all others
        self.centre_k = nn.Parameter(torch.zeros(columns), requires_grad=False)
        self.weight_kcdhw = nn.Parameter(torch.zeros(1 + columns, *shape_cdhw), requires_grad=False)
        self.rate_jk = None  # what a product adds to the change, in units of the covariates
        if earlier:
            self.rate_jk = nn.Parameter(torch.zeros(continuous * (1 + columns), columns), requires_grad=False)
        self.direction_kcdhw = self.deviation_2k = None
        if components:
            self.direction_kcdhw = nn.Parameter(torch.zeros(components, *shape_cdhw), requires_grad=False)
            # of the rest first; of people, and of changes within a person
            self.deviation_2k = nn.Parameter(torch.zeros(2, 1 + components), requires_grad=False)

    def set(self, latent_bcdhw: Tensor, condition: Condition, others: Sequence[Sequence[int]] = ()) -> float:
        """Learn from standardised latents and the covariates of now; returns the ridge that was chosen.

        Rows that share a person count as others do.

        Args:
            others: other rows of the person of each row, or the row itself (`context.other_scans`); for follow-ups.
        """
        row_bk, given_bk = self._columns(condition, 0)
        row_bk, given_bk = row_bk.double().cpu(), given_bk.cpu()
        centre = (row_bk * given_bk).sum(0) / given_bk.sum(0).clamp(min=1)
        design = (row_bk - centre) * given_bk
        rows, latent = len(design), latent_bcdhw.detach().cpu().flatten(1)
        u, s, vt = _spanned(design - design.mean(0), 1e-9)
        levels, alongs, whole = [], [], 0.0
        for part in latent.split(_PLACES, dim=1):
            y = part.double()
            levels.append(y.mean(dim=0))
            whole += float((y - levels[-1]).square().sum())
            alongs.append(u.T @ y)  # u is orthogonal to the mean
        mean, along = torch.cat(levels), torch.cat(alongs, dim=1)
        power = along.square().sum(dim=1)
        best, ridge = float("inf"), float(RIDGES[-1])
        for weight in RIDGES.tolist():
            shrunk = s.square() / (s.square() + weight)
            left = whole - float(((1 - (1 - shrunk).square()) * power).sum())
            error = rows * left / max(rows - 1 - float(shrunk.sum()), 1e-9) ** 2
            if error < best:
                best, ridge = error, weight
        slopes = vt.T @ ((s / (s.square() + ridge))[:, None] * along)
        made = torch.cat([(mean - design.mean(0) @ slopes)[None], slopes]).float().view_as(self.weight_kcdhw)
        with torch.no_grad():
            self.centre_k.copy_(centre.float())
            self.weight_kcdhw.copy_(made)
        pairs = [(row, own[0]) for row, own in enumerate(others) if own[0] != row]
        if self.direction_kcdhw is None and not pairs:
            return ridge
        residual = latent - (made[0] + torch.einsum("bk,k...->b...", design.float(), made[1:])).flatten(1)
        changes = self._set_rates(residual, row_bk, given_bk, pairs) if pairs else None
        if self.direction_kcdhw is not None:
            self._set_components(residual, changes)
        return ridge

    @torch.no_grad()
    def _set_rates(
        self, residual_bp: Tensor, row_bk: Tensor, given_bk: Tensor, pairs: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Of the changes of `pairs` beyond the regression; returns what the rates leave of them, (pairs, places)."""
        assert self.rate_jk is not None
        now, then = (torch.tensor(side) for side in zip(*pairs))
        change = residual_bp[now] - residual_bp[then]
        feature = self._products(row_bk[now], given_bk[now], row_bk[then], given_bk[then])
        # a pair counts once: in the other order it is all but its negative
        once = list({frozenset(pair): k for k, pair in enumerate(pairs)}.values())
        u, s, vt = _spanned(feature[once], 1e-3)  # columns that change together differ by rounding
        slopes = self.weight_kcdhw[1:].flatten(1)
        back, size, directions = _spanned(slopes.double(), 1e-2)
        free = len(once) - len(s)
        if free < 1 or not len(size):
            return change
        y = change[once].double() @ directions.T
        along = u.T @ y
        noise = (y.square().sum() - along.square().sum()).clamp(min=0) / free
        along = along * (along.square().sum(dim=1, keepdim=True) > noise)
        self.rate_jk.copy_((vt.T @ (along / s[:, None]) / size @ back.T).float())
        return change - feature.float() @ self.rate_jk @ slopes

    def _products(self, now_bk: Tensor, is_now_bk: Tensor, then_bk: Tensor, was_then_bk: Tensor) -> Tensor:
        """(b, continuous * (1 + columns)): changes of continuous covariates, and these times what the person was."""
        k = self.continuous
        change_bj = (now_bk - then_bk)[:, :k] * (is_now_bk & was_then_bk)[:, :k]
        who_bk = (then_bk - self.centre_k.to(then_bk)) * was_then_bk
        who_bk = torch.cat([torch.ones_like(who_bk[:, :1]), who_bk], dim=1)
        return (change_bj[:, :, None] * who_bk[:, None]).flatten(1)

    @torch.no_grad()
    def _set_components(self, residual_bp: Tensor, changes_bp: Tensor | None) -> None:
        """Of residuals, of as many rows as a Gram matrix can have, and of changes within people where there are any."""
        assert self.direction_kcdhw is not None
        assert self.deviation_2k is not None
        places = residual_bp.shape[1]
        total = sum(float(part.double().square().sum()) for part in residual_bp.split(_PLACES, dim=1)) / len(
            residual_bp
        )
        rows = residual_bp[:: -(-len(residual_bp) // _ROWS)]
        power, vectors = torch.linalg.eigh((rows @ rows.T).double())  # rising
        count = min(len(self.direction_kcdhw), int((power > 1e-6 * power[-1].clamp(min=1e-12)).sum()))
        chosen = torch.arange(len(power) - 1, len(power) - 1 - count, -1)
        directions = (vectors[:, chosen] / power[chosen].sqrt()).float().T @ rows
        variance = power[chosen] / len(rows)
        of_people = [max(total - float(variance.sum()), 0.0) / max(places - count, 1), *variance.tolist()]
        self.deviation_2k[0, : 1 + count] = torch.tensor(of_people).sqrt()
        self.direction_kcdhw[:count] = directions.view(count, *self.direction_kcdhw.shape[1:])
        if changes_bp is None:
            return
        power, whole = torch.zeros(count, dtype=torch.float64), 0.0
        for change in changes_bp:
            power += (directions @ change).double().square() / len(changes_bp)
            whole += float(change.double().square().sum()) / len(changes_bp)
        of_changes = [max(whole - float(power.sum()), 0.0) / max(places - count, 1), *power.tolist()]
        self.deviation_2k[1, : 1 + count] = torch.tensor(of_changes).sqrt()

    def pull(self, centred_bcdhw: Tensor, t_b: Tensor, condition: Condition) -> Tensor | float:
        """The velocity of the normal distribution about the mean at `centred_bcdhw` = x - (1 - t) mean; 0 without
        components, and for a follow-up in which no covariate changes."""
        if self.direction_kcdhw is None or self.deviation_2k is None:
            return 0.0
        with _full_precision(centred_bcdhw):
            direction: Tensor = self.direction_kcdhw
            scale = 1.0
            if centred_bcdhw.shape[2:] != direction.shape[2:]:
                size, places = centred_bcdhw.shape[2:], direction[0].numel()
                direction = F.interpolate(direction, size=size, mode="trilinear", align_corners=False)
                norm = direction.flatten(1).norm(dim=1).clamp(min=1e-12)
                direction = direction / norm.view(-1, 1, 1, 1, 1)
                scale = (direction[0].numel() / places) ** 0.5
            follows_b, changes_b = self._follows(condition)
            deviation_bk = self.deviation_2k[follows_b.long()]
            deviation_bk = torch.cat([deviation_bk[:, :1], scale * deviation_bk[:, 1:]], dim=1)
            t = t_b[:, None]
            below = ((1 - t) ** 2 * deviation_bk**2 + t**2).clamp(min=1e-8)
            strength_bk = (t - (1 - t) * deviation_bk**2) / below
            along_bk = torch.einsum("bcdhw,kcdhw->bk", centred_bcdhw, direction)
            rest = strength_bk[:, :1]
            pulled = rest.view(-1, 1, 1, 1, 1) * centred_bcdhw
            pulled = pulled + torch.einsum("bk,kcdhw->bcdhw", (strength_bk[:, 1:] - rest) * along_bk, direction)
            return torch.where((follows_b & ~changes_b).view(-1, 1, 1, 1, 1), 0.0, pulled)

    def _follows(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """Which rows have an earlier scan, and in which a covariate that is known at both times changes."""
        if not self.earlier or condition.context_bcdhw is None:
            never = torch.zeros(len(condition.spacing_b3), dtype=torch.bool, device=condition.spacing_b3.device)
            return never, never
        now, then = self._columns(condition, 0), self._columns(condition, 1)
        changes_b = ((now[0] != then[0]) & now[1] & then[1]).any(dim=1)
        return condition.context_bcdhw[:, -1].flatten(1)[:, 0] > 0, changes_b

    def forward(self, condition: Condition, size: Sequence[int]) -> Tensor:
        with _full_precision(self.weight_kcdhw):  # a mean in bf16 would be noise to learn
            return self._mean(condition, size)

    def _mean(self, condition: Condition, size: Sequence[int]) -> Tensor:
        row_bk, given_bk = self._columns(condition, 0)
        weight: Tensor = self.weight_kcdhw
        if tuple(size) != tuple(weight.shape[2:]):
            weight = F.interpolate(weight, size=tuple(size), mode="trilinear", align_corners=False)
        slopes, level = weight[1:], weight[:1]
        own = torch.einsum("bk,kcdhw->bcdhw", (row_bk - self.centre_k) * given_bk, slopes) + level
        if not self.earlier or condition.context_bcdhw is None:
            return own
        channels = weight.shape[1]
        before, flag = condition.context_bcdhw[:, -channels - 1 : -1], condition.context_bcdhw[:, -1:]
        then_bk, known_bk = self._columns(condition, 1)
        steps_bk = (row_bk - then_bk) * (given_bk & known_bk)
        if self.rate_jk is not None:
            steps_bk = steps_bk + self._products(row_bk, given_bk, then_bk, known_bk) @ self.rate_jk
        change = torch.einsum("bk,kcdhw->bcdhw", steps_bk, slopes)
        return torch.where(flag > 0, before + change, own)

    def _columns(self, condition: Condition, time: int) -> tuple[Tensor, Tensor]:
        """(b, columns): values, one column per level for categorical covariates, 0 where not given; and whether given.

        Args:
            time: 0 for the covariates of now, 1 for those of the earlier scan.
        """
        first = time * self.continuous
        continuous = condition.continuous_bk[:, first : first + self.continuous]
        values, given = [continuous.nan_to_num(0.0)], [~continuous.isnan()]
        for k, levels in enumerate(self.levels):
            level_b = condition.categorical_bk[:, time * len(self.levels) + k]
            values.append(F.one_hot(level_b.clamp(min=0), levels).to(continuous) * (level_b >= 0)[:, None])
            given.append((level_b >= 0)[:, None].expand(-1, levels))
        return torch.cat(values, dim=1), torch.cat(given, dim=1)


def _spanned(matrix: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition without values below `least` times the largest."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > least * max(float(s.max()) if len(s) else 0.0, 1e-300)
    return u[:, kept], s[kept], vt[kept]


class Centred(nn.Module):
    """A velocity model above `LinearMean`; arguments of `forward` as those of `denoiser.Denoiser`."""

    def __init__(self, network: Denoiser | DiT, mean: LinearMean) -> None:
        super().__init__()
        self.network, self.mean = network, mean

    def forward(self, x_bcdhw: Tensor, t_b: Tensor, condition: Condition) -> Tensor:
        mean = self.mean(condition, x_bcdhw.shape[2:])
        centred = x_bcdhw - (1.0 - t_b).view(-1, 1, 1, 1, 1) * mean
        velocity: Tensor = self.network(centred, t_b, condition)
        return velocity - mean + self.mean.pull(centred, t_b, condition)


def columns_of(covariates: Sequence[Covariate]) -> tuple[list[int], int]:
    """Levels of each categorical covariate, and the number of continuous ones."""
    return [len(c.levels) for c in covariates if c.kind == "categorical"], sum(
        c.kind == "continuous" for c in covariates
    )


def _full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """No autocast inside; the meta device, on which costs are counted, has no autocast to switch off."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)
