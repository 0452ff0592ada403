"""What strategies have in common in which each site has a model of its own beside the global one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from histoflare.ensemble import tensor_name
from histoflare.rounds.state import State
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import SiteOutcome, SiteRound

MINE = "mine/"
"""Prefix, in a site's own state, of the model of its own."""


@dataclass(frozen=True, kw_only=True)
class OwnModel(FedAvg):
    """FedAvg whose sites keep a model of their own, and answer with it.

    Under DP-SGD it is refused, as everything is that a site keeps.

    Attributes:
        weighting, weights, clients_per_round: See :class:`FedAvg`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    own_models: ClassVar[bool] = True

    @abstractmethod
    def train_own(self, ctx: SiteRound, mine: State, outcome: SiteOutcome) -> State:
        """Return what the site keeps as its own, a tensor for each of the model.

        Args:
            mine: What it kept before; the model that the round began with, in its first round.
            outcome: Of the round's training of the global model.
        """

    def local_round(self, ctx: SiteRound) -> SiteOutcome:
        """Train the global model and send its change; train the site's own and keep it."""
        others = {name: t for name, t in ctx.site_state.items() if not name.startswith(MINE)}
        outcome = super().local_round(replace(ctx, site_state=others))
        start = super().personalize(ctx.model, others)
        mine = {name: ctx.site_state.get(MINE + name, tensor) for name, tensor in start.items()}
        kept = {MINE + name: t for name, t in self.train_own(ctx, mine, outcome).items()}
        return replace(outcome, site_state={**outcome.site_state, **kept})

    def personalize(self, model: Mapping[str, Tensor], site_state: Mapping[str, Tensor]) -> State:
        """Return the site's own model, if it has one."""
        shared = super().personalize(model, site_state)
        return {name: site_state.get(MINE + tensor_name(name), tensor) for name, tensor in shared.items()}
