"""q-FedAvg (Li et al. 2020): the worse a site is served, the more it counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from histoflare import ranges
from histoflare.rounds.distances import length
from histoflare.rounds.local import LocalResult, training_loss
from histoflare.rounds.state import State, add
from histoflare.rounds.strategies.hub import EqualHub
from histoflare.rounds.strategy import ServerOutcome, ServerRound, SiteRound

LOSS = "loss_before"
"""The number that a site sends: the global model's mean loss on its training data, as the round began."""


@dataclass(frozen=True, kw_only=True)
class QFedAvg(EqualHub):
    """W ← W - Σ F_k^q Δ_k / Σ h_k, with Δ_k = -L ΔW_k and h_k = q F_k^(q-1) ‖Δ_k‖² + L F_k^q.

    Li et al. 2020, algorithm 2. F_k is the loss of the global model at site k, L = 1 / ``learning_rate``.
    With q = 0 it is the plain mean. A site's loss follows from its data and leaves without noise: its policy
    has to list the number, and under any privacy plan it is refused.

    Attributes:
        q: At least 0: how much the sites that are served worst count.
        learning_rate: Of the sites' training, above 0.
        clients_per_round: See :class:`histoflare.rounds.topologies.federated.Federated`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "qfedavg"
    linear: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    numbers: ClassVar[Mapping[str, bool]] = {LOSS: True}
    q: float = 1.0
    learning_rate: float = 0.1

    def problems(self) -> list[str]:
        """Return what is out of range."""
        return [*ranges.at_least_zero("q", self.q), *ranges.above_zero("learning_rate", self.learning_rate)]

    def said(self, ctx: SiteRound, training: LocalResult) -> dict[str, float]:
        """Return the loss of the model that the site began with."""
        return {LOSS: loss_before(ctx, self.personalize(ctx.model, ctx.site_state))}

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the model after the step."""
        scale = 1 / self.learning_rate
        powers, total = [], []
        for update in ctx.updates:
            loss = max(
                update.numbers[LOSS], 1e-10
            )  # as in the authors' code: a loss of 0 has no power below 1
            power = loss**self.q
            powers.append(power)
            norm = (scale * length(update.tensors)) ** 2
            total.append(self.q * loss ** (self.q - 1) * norm + scale * power)
        whole = math.fsum(total)
        step = {
            name: sum(
                power * scale * update.tensors[name].double()
                for power, update in zip(powers, ctx.updates, strict=True)
            )
            / whole
            for name in ctx.updates[0].tensors
        }
        return ServerOutcome(add(ctx.model, step))


def loss_before(ctx: SiteRound, start: State) -> float:
    """Return the mean training loss of the model that a site's round begins with."""
    return training_loss(ctx.task, start, ctx.data, ctx.train_seed, ctx.device)
