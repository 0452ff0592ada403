"""The coordinate-wise median (Yin et al. 2018): a minority of sites pulls no number beyond the others'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from histoflare.rounds.state import add
from histoflare.rounds.strategies.hub import EqualHub
from histoflare.rounds.strategy import ServerOutcome, ServerRound


@dataclass(frozen=True, kw_only=True)
class Median(EqualHub):
    """W ← W + median of the ΔW_k, number by number (Yin et al. 2018, algorithm 1, option I).

    With an even number of sites it is the mean of the two in the middle. Where sites differ as hospitals do,
    the median leaves out the rare ones among them too. It needs each update: no secure sum.

    Attributes:
        clients_per_round: See :class:`histoflare.rounds.topologies.federated.Federated`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "median"
    linear: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the global model plus the median."""
        names = ctx.updates[0].tensors
        middle = {}
        for name in names:
            ordered = torch.stack([u.tensors[name].double() for u in ctx.updates]).sort(dim=0).values
            half = len(ctx.updates) // 2
            middle[name] = (ordered[half] + ordered[-half - 1]) / 2
        return ServerOutcome(add(ctx.model, middle))
