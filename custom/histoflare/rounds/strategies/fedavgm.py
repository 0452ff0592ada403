"""FedAvgM (Hsu et al. 2019): the mean update passes through momentum at the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from histoflare import ranges
from histoflare.rounds.state import State, add, weighted_mean
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import ServerOutcome, ServerRound


@dataclass(frozen=True, kw_only=True)
class FedAvgM(FedAvg):
    """V ← β V + Σ N_k ΔW_k / Σ N_k; W ← W + V (Hsu et al. 2019, section 4.3).

    V stays at the server. Running statistics of BatchNorm are averaged.

    Attributes:
        momentum: β, from 0 (FedAvg) to below 1.
        weighting, weights, clients_per_round: See :class:`FedAvg`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "fedavgm"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    momentum: float = 0.9

    def problems(self) -> list[str]:
        """Return what is wrong with ``momentum``."""
        return ranges.between("momentum", self.momentum, 0, 1, without_most=True)

    def begin(self, model: State) -> State:
        """Return V, of zeros."""
        return {name: torch.zeros_like(model[name]) for name in self.learned_names(model)}

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the model after the step, and V."""
        step = weighted_mean([update.tensors for update in ctx.updates], self.weights_of(ctx))
        own = {}
        for name, velocity in ctx.own.items():
            step[name] += self.momentum * velocity.double()
            own[name] = step[name].to(velocity.dtype)
        return ServerOutcome(add(ctx.model, step), own)
