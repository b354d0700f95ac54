"""The network: a causal transformer over patches of sites, and a small network at each site that mixes the chains.

The probability of the allele at site l is read off a logit

    z_l = sum_c (w_c + d_lc) x_lc + b_l + o_l . h_j + e_l

with x_lc the log-odds that chain c gives to ALT from the alleles before l, w_c one weight per chain, d_lc and e_l what
the network at the site makes of what it sees there (`features`) and of the context h_j, o_l a vector of the site, b_l its
bias. h_j is the transformer's output at the last patch that ended before l. d, b, o and e begin at 0 and w as given, so
that an untrained network is the mixture of the chains with those weights, and learning begins there.

A patch enters the transformer when its last allele is known: the sum over its sites of (allele - its frequency) times a
vector of the site, which of its alleles surprised, how each chain did, and the condition (group, phenotypes). The
vectors begin as principal components of the training panel, so that their sum over a haplotype is where it lies among
people. Attention looks back over `attention` patches; sums that fade with 4 to 1,024 patches reach further. A window of patches
is computed from the keys, values and sums that the window before it left, so that a chromosome is one sequence however
it is cut: the logits do not depend on the cuts (but for rounding).

Arrays: b haplotypes, j patches of a window, p sites of a patch, l sites, c chains, f features, d width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FADES = (4.0, 32.0)  # patches
LONG_FADE = 1024.0


class State(NamedTuple):
    """What one window leaves to the next: keys_bad and values_bad of the last patches of each layer; sums_bd, faded; last_bd,
    the output at the last patch."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    sums_bd: Tensor
    last_bd: Tensor

    def detached(self) -> State:
        """Without the graph behind it."""
        return State(
            tuple(t.detach() for t in self.keys), tuple(t.detach() for t in self.values), self.sums_bd.detach(),
            self.last_bd.detach(),
        )  # fmt: skip


class Block(nn.Module):
    """Attention over the last patches, then a network of each patch, both added to what came in."""

    def __init__(self, width: int, heads: int, reach: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.reach = heads, reach
        self.before_attention, self.before_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.in_projection = nn.Linear(width, 3 * width)
        self.out_projection = nn.Linear(width, width)
        self.nearness = nn.Parameter(-torch.outer(2.0 ** -torch.arange(1.0, heads + 1), torch.arange(reach + 1.0)))
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_bjd: Tensor, keys_bad: Tensor, values_bad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_bjd after the block, and the keys and values of the last `reach` patches for the next window."""
        query, key, value = self.in_projection(self.before_attention(x_bjd)).chunk(3, dim=-1)
        keys, values = torch.cat([keys_bad, key], dim=1), torch.cat([values_bad, value], dim=1)
        back = torch.arange(keys.shape[1], device=keys.device)
        distance_jk = back[keys_bad.shape[1] :, None] - back[None]
        allowed_jk = (distance_jk >= 0) & (distance_jk <= self.reach)
        bias_hjk = self.nearness[:, distance_jk.clamp(0, self.reach)].masked_fill(~allowed_jk, -math.inf)
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        mixed = F.scaled_dot_product_attention(
            split(query), split(keys), split(values), attn_mask=bias_hjk.to(query.dtype)
        )
        x_bjd = x_bjd + self.dropout(self.out_projection(mixed.transpose(1, 2).flatten(2)))
        x_bjd = x_bjd + self.dropout(self.network(self.before_network(x_bjd)))
        return x_bjd, keys[:, -self.reach :], values[:, -self.reach :]


class HaplotypeTransformer(nn.Module):
    """See the head of this module.

    Args:
        sites, chains, features: L, C and F.
        groups: how many groups; index `groups` means unknown.
        covariates: how many values a person's phenotype has.
        patch, width, depth, heads, attention, hidden, site_width, dropout: as in `config.NetworkConfig`.
        weight_c: the weights w at the start.
    """

    def __init__(
        self, *, sites: int, chains: int, features: int, groups: int, covariates: int, patch: int, width: int, depth: int,
        heads: int, attention: int, hidden: int, site_width: int, dropout: float, site_dropout: float, weight_c: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sites, self.patch, self.width, self.reach, self.chains = sites, patch, width, attention, chains
        padded = -(-sites // patch) * patch
        self.weight_c = nn.Parameter(torch.as_tensor(weight_c, dtype=torch.float32).clone())
        self.group = nn.Embedding(groups + 1, width)
        self.covariates = nn.Linear(2 * covariates, width, bias=False) if covariates else None
        self.site_in = nn.Parameter(0.1 * torch.randn(padded, width) / math.sqrt(sites))
        self.patch_in = nn.Linear(patch + chains + 1, width)
        self.start = nn.Parameter(torch.zeros(width))
        self.sums_in = nn.Linear(width, width * len(FADES), bias=False)
        self.sums_out = nn.Linear(width * (1 + len(FADES)), width, bias=False)
        self.blocks = nn.ModuleList([Block(width, heads, attention, dropout) for _ in range(depth)])
        self.after = nn.LayerNorm(width)
        self.site_features = nn.Parameter(0.1 * torch.randn(padded, site_width))
        self.to_hidden = nn.Linear(features + site_width, hidden)
        self.context_to_hidden = nn.Linear(width, hidden, bias=False)
        self.hidden = nn.Linear(hidden, hidden)
        self.to_weights = nn.Linear(hidden, chains + 1)
        self.site_bias = nn.Parameter(torch.zeros(padded))
        self.site_out = nn.Parameter(torch.zeros(padded, width))
        self.dropout, self.site_dropout = nn.Dropout(dropout), nn.Dropout(site_dropout)
        nn.init.zeros_(self.to_weights.weight)
        nn.init.zeros_(self.to_weights.bias)

    def begin(self, condition_bd: Tensor) -> State:
        """The state before the first patch of haplotypes of this condition."""
        haplotypes, depth = len(condition_bd), len(self.blocks)
        empty = condition_bd.new_zeros(haplotypes, 0, self.width)
        sums_bd = condition_bd.new_zeros(haplotypes, self.width * (1 + len(FADES)))
        return State((empty,) * depth, (empty,) * depth, sums_bd, self.start + condition_bd)

    def condition(self, group_b: Tensor, covariate_bv: Tensor | None) -> Tensor:
        """float32 (b, d) from group indices int64 (b,) and, with covariates, (b, 2 V): values, and 1 where they are known."""
        made: Tensor = self.group(group_b)
        return made if self.covariates is None or covariate_bv is None else made + self.covariates(covariate_bv)

    def at_sites(self, logit_blc: Tensor, features_blf: Tensor, context_bld: Tensor, first_site: int) -> Tensor:
        """Logits (b, l) of sites first_site .. first_site + l - 1, from the context that each has."""
        here = slice(first_site, first_site + logit_blc.shape[1])
        site_ls = self.site_dropout(self.site_features[here]).expand(len(logit_blc), -1, -1)
        hidden = self.to_hidden(torch.cat([features_blf, site_ls], dim=-1)) + self.context_to_hidden(context_bld)
        hidden = F.gelu(self.hidden(F.gelu(hidden)))
        more = self.to_weights(hidden).float()
        weights_blc = self.weight_c + more[..., :-1]
        own = (context_bld * self.site_dropout(self.site_out[here])).sum(dim=-1)
        return (weights_blc * logit_blc).sum(dim=-1) + more[..., -1] + self.site_bias[here] + own

    def tokens(
        self, centred_bl: Tensor, residual_bl: Tensor, nats_blc: Tensor, condition_bd: Tensor, first_site: int
    ) -> tuple[Tensor, Tensor]:
        """What enters the transformer of whole patches from site first_site on: b j d, and its first part alone.

        Args:
            centred_bl: allele less its frequency in the panel; residual_bl: allele less foretold probability; 0 where missing.
            nats_blc: log-probability that each chain gave to the allele.
        """
        here = slice(first_site, first_site + residual_bl.shape[1])
        site_jpd = self.site_dropout(self.site_in[here]).unflatten(0, (-1, self.patch))
        summed_bjd = torch.einsum("bjp,jpd->bjd", centred_bl.unflatten(1, (-1, self.patch)), site_jpd)
        residual_bjp = residual_bl.unflatten(1, (-1, self.patch))
        chains_bjc = nats_blc.unflatten(1, (-1, self.patch)).mean(dim=2)
        seen = torch.cat([residual_bjp, chains_bjc, chains_bjc.mean(dim=-1, keepdim=True)], dim=-1)
        return summed_bjd + self.patch_in(seen) + condition_bd[:, None], summed_bjd

    def through_patches(self, token_bjd: Tensor, summed_bjd: Tensor, state: State) -> tuple[Tensor, State]:
        """Outputs h_bjd at the patches of a window and the state after it."""
        window = token_bjd.shape[1]
        step_j = torch.arange(window, device=token_bjd.device, dtype=torch.float32)
        ago_jk = step_j[:, None] - step_j[None]
        sums = []
        parts = [summed_bjd, *self.sums_in(token_bjd).chunk(len(FADES), dim=-1)]
        for part, fade, before in zip(parts, (LONG_FADE, *FADES), state.sums_bd.chunk(1 + len(FADES), dim=-1)):
            kept_jk = torch.exp(-ago_jk / fade).tril() / (1.0 if fade == LONG_FADE else math.sqrt(fade))
            carried = torch.exp(-(step_j[:, None] + 1) / fade) * before[:, None]
            sums.append(torch.einsum("jk,bkd->bjd", kept_jk, part.float()) + carried)
        sums_bjd = torch.cat(sums, dim=-1)
        x_bjd = self.dropout(token_bjd + self.sums_out(sums_bjd))
        keys, values = [], []
        for block, key, value in zip(self.blocks, state.keys, state.values):
            x_bjd, key, value = block(x_bjd, key, value)
            keys.append(key)
            values.append(value)
        x_bjd = self.after(x_bjd)
        return x_bjd, State(tuple(keys), tuple(values), sums_bjd[:, -1], x_bjd[:, -1])

    def forward(
        self, logit_blc: Tensor, features_blf: Tensor, centred_bl: Tensor, residual_bl: Tensor, nats_blc: Tensor,
        condition: tuple[Tensor, Tensor | None], first_site: int, state: State | None,
    ) -> tuple[Tensor, State]:  # fmt: skip
        """Logits (b, l) of a window of whole patches, all of whose alleles are known, and the state after it.

        The last window is padded to whole patches by its caller.
        """
        condition_bd = self.condition(*condition)
        state = self.begin(condition_bd) if state is None else state
        token_bjd, summed_bjd = self.tokens(centred_bl, residual_bl, nats_blc, condition_bd, first_site)
        h_bjd, after = self.through_patches(token_bjd, summed_bjd, state)
        context_bjd = torch.cat([state.last_bd[:, None], h_bjd[:, :-1]], dim=1)
        context_bld = context_bjd.repeat_interleave(self.patch, dim=1)
        # data parallel training waits for a gradient of every parameter, in a window without history too
        context_bld = context_bld + 0.0 * (h_bjd[:, -1:] + self.start)
        return self.at_sites(logit_blc, features_blf, context_bld, first_site), after
