"""The coordinate-wise trimmed mean (Yin et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from histoflare import ranges
from histoflare.rounds.state import add
from histoflare.rounds.strategies.hub import EqualHub
from histoflare.rounds.strategy import ServerOutcome, ServerRound


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(EqualHub):
    """W ← W + mean of the ΔW_k without the ``trimmed`` largest and smallest, number by number.

    Yin et al. 2018, algorithm 1, option II. It needs each update: no secure sum.

    Attributes:
        trimmed: How many at either end, at least 1: of so many faulty sites none can pull a number beyond the
            others' own.
        clients_per_round: See :class:`histoflare.rounds.topologies.federated.Federated`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "trimmed_mean"
    linear: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    trimmed: int = 1

    def problems(self) -> list[str]:
        """Return what is wrong with ``trimmed``."""
        return ranges.whole("trimmed", self.trimmed, 1000)

    @property
    def least_updates(self) -> int:
        """One more than are trimmed at both ends."""
        return 2 * self.trimmed + 1

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the global model plus the trimmed mean."""
        mean = {}
        for name in ctx.updates[0].tensors:
            ordered = torch.stack([u.tensors[name].double() for u in ctx.updates]).sort(dim=0).values
            mean[name] = ordered[self.trimmed : len(ordered) - self.trimmed].mean(dim=0)
        return ServerOutcome(add(ctx.model, mean))
