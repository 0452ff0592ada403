"""The geometric median of the updates (Pillutla et al. 2022, RFA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from histoflare import ranges
from histoflare.rounds.distances import distance
from histoflare.rounds.state import add, weighted_mean
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import ServerOutcome, ServerRound


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(FedAvg):
    """W ← W + the point with the least weighted sum of distances Σ N_k ‖v - ΔW_k‖ to the updates.

    Found by the smoothed Weiszfeld algorithm (Pillutla et al. 2022): a few weighted means, each update's
    weight N_k / max(ν, distance). Sites of less than half the weight cannot drag it far. It needs each
    update: no secure sum.

    Attributes:
        iterations: Of the algorithm; the paper found a few enough.
        smoothing: ν, above 0: distances below it count as it.
        weighting, weights, clients_per_round: See :class:`FedAvg`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "geometric_median"
    linear: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    weighting: str = "uniform"
    iterations: int = 10
    smoothing: float = 1e-6

    def problems(self) -> list[str]:
        """Return what is out of range."""
        return [
            *ranges.whole("iterations", self.iterations, 1000),
            *ranges.above_zero("smoothing", self.smoothing),
        ]

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the global model plus the geometric median."""
        updates, weights = [update.tensors for update in ctx.updates], self.weights_of(ctx)
        middle, used = weighted_mean(updates, weights), weights
        for _ in range(self.iterations):
            used = [
                weight / max(self.smoothing, distance(update, middle))
                for weight, update in zip(weights, updates, strict=True)
            ]
            middle = weighted_mean(updates, used)
        total = sum(used)
        shares = {u.site: weight / total for u, weight in zip(ctx.updates, used, strict=True)}
        return ServerOutcome(add(ctx.model, middle), contribution=shares)
