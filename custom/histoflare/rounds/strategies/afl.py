"""Agnostic federated learning (Mohri et al. 2019): training for the worst mixture of the sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from histoflare import ranges
from histoflare.rounds.local import LocalResult
from histoflare.rounds.state import State, add_weighted_mean
from histoflare.rounds.strategies.hub import NamedHub
from histoflare.rounds.strategies.qfedavg import LOSS, loss_before
from histoflare.rounds.strategy import ServerOutcome, ServerRound, SiteRound

WEIGHTS = "weights"
"""What is kept at the server: λ, a weight for each site."""


@dataclass(frozen=True, kw_only=True)
class Afl(NamedHub):
    """W ← W + Σ λ_k ΔW_k; λ ← projection of λ + γ · (F_1, …, F_n) on the weights that sum to 1.

    Mohri et al. 2019, algorithm 1, with local epochs in place of one stochastic step, as the paper's remark
    on federated averaging has it. F_k is the loss of the global model at site k: a number that follows from
    its data and leaves without noise, so a site's policy has to list it, and under any privacy plan it is
    refused. λ stays at the server; of a round in which some sites are missing, the others' weights are scaled
    up.

    Attributes:
        sites: The names of all sites that train, each once.
        rate: γ, above 0.
        clients_per_round: See :class:`histoflare.rounds.topologies.federated.Federated`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "afl"
    linear: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    numbers: ClassVar[Mapping[str, bool]] = {LOSS: True}
    rate: float = 0.1

    def problems(self) -> list[str]:
        """Return what is out of range."""
        return [*super().problems(), *ranges.above_zero("rate", self.rate)]

    def begin(self, model: State) -> State:
        """Return equal weights."""
        count = max(1, len(self.sites))
        return {WEIGHTS: torch.full((count,), 1 / count, dtype=torch.float64)}

    def said(self, ctx: SiteRound, training: LocalResult) -> dict[str, float]:
        """Return the loss of the model that the site began with."""
        return {LOSS: loss_before(ctx, self.personalize(ctx.model, ctx.site_state))}

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the model under the weights as they were, and the next weights."""
        weights = ctx.own[WEIGHTS].clone()
        place = [self.sites.index(update.site) for update in ctx.updates]
        used = weights[place]
        if not bool(used.sum() > 0):  # all that count are missing: those that are there count the same
            used = torch.ones_like(used)
        model = add_weighted_mean(ctx.model, [update.tensors for update in ctx.updates], used.tolist())
        weights[place] += self.rate * torch.tensor(
            [u.numbers[LOSS] for u in ctx.updates], dtype=torch.float64
        )
        shares = {u.site: float(w / used.sum()) for u, w in zip(ctx.updates, used, strict=True)}
        return ServerOutcome(model, {WEIGHTS: on_simplex(weights)}, contribution=shares)


def on_simplex(point: torch.Tensor) -> torch.Tensor:
    """Return the nearest point (n,) whose numbers are at least 0 and sum to 1 (Duchi et al. 2008)."""
    ordered = point.sort(descending=True).values
    above = (ordered.cumsum(0) - 1) / torch.arange(1, len(point) + 1, dtype=point.dtype)
    last = int((ordered > above).nonzero().max())
    return (point - above[last]).clamp(min=0)
