"""Updates longer than the others are shortened at the server (Sun et al. 2019)."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import ClassVar

from histoflare import ranges
from histoflare.rounds.distances import length
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import ServerOutcome, ServerRound


@dataclass(frozen=True, kw_only=True)
class NormBound(FedAvg):
    """FedAvg of ΔW_k · min(1, M / ‖ΔW_k‖) (Sun et al. 2019), with M a number or the round's median norm.

    It bounds how far a single site can pull, and not in which direction. It is the server's defence and
    protects no patient: a privacy plan's clip is at the site. It needs each update: no secure sum.

    Attributes:
        bound: M, above 0; None: the median of the round's norms.
        weighting, weights, clients_per_round: See :class:`FedAvg`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "norm_bound"
    linear: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    bound: float | None = None

    def problems(self) -> list[str]:
        """Return what is wrong with ``bound``."""
        return ranges.above_zero("bound", self.bound, or_null=True)

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return FedAvg of the shortened updates."""
        lengths = [length(update.tensors) for update in ctx.updates]
        bound = statistics.median(lengths) if self.bound is None else self.bound
        shortened = [
            replace(update, tensors={name: t.double() * (bound / norm) for name, t in update.tensors.items()})
            if norm > bound
            else update
            for update, norm in zip(ctx.updates, lengths, strict=True)
        ]
        made = super().combine(replace(ctx, updates=shortened))
        weights = [
            weight * min(1.0, bound / norm if norm else 1.0)
            for weight, norm in zip(self.weights_of(ctx), lengths, strict=True)
        ]
        shares = {u.site: weight / sum(weights) for u, weight in zip(ctx.updates, weights, strict=True)}
        return replace(made, contribution=shares)
