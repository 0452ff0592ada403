"""An ensemble: every site trains a model alone, and all of them are asked together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from histoflare.rounds.state import State, add, without_negative_variances
from histoflare.rounds.strategies.hub import NamedHub
from histoflare.rounds.strategy import ServerOutcome, ServerRound, SiteOutcome, SiteRound


@dataclass(frozen=True, kw_only=True)
class Ensemble(NamedHub):
    """Each site's own model is kept at the server and never averaged; their answers are (Darzidehkalani et
    al. 2022).

    The models begin at the same weights and go on from round to round as if nobody else were there. What is
    handed out is all of them, and ``classify`` averages what they say of a slide. A site is sent all of them,
    and can ask each by itself. It needs each update: no secure sum.

    Attributes:
        sites: The names of all sites that train, each once.
        clients_per_round: See :class:`histoflare.rounds.topologies.federated.Federated`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "ensemble"
    linear: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False

    def begin(self, model: State) -> State:
        """Return how far each site's model is from the first one: nowhere yet."""
        return {
            f"{site}/{name}": torch.zeros_like(model[name])
            for site in self.sites
            for name in self.shared_names(model)
        }

    def downlink(self, own: State) -> State:
        """Return all of it: each site goes on with its own, and is asked for the figures of all."""
        return own

    def models(self, model: State, own: State) -> dict[str, State]:
        """Return each site's model."""
        return {site: _of(site, model, own) for site in self.sites}

    def local_round(self, ctx: SiteRound) -> SiteOutcome:
        """Train the site's own model; send its change."""
        return super().local_round(replace(ctx, model=_of(ctx.site, ctx.model, ctx.downlink)))

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the first model as it was, and each site's model further on."""
        own = dict(ctx.own)
        for update in ctx.updates:
            for name, change in update.tensors.items():
                own[f"{update.site}/{name}"] = own[f"{update.site}/{name}"] + change
        return ServerOutcome({name: tensor.clone() for name, tensor in ctx.model.items()}, own)


def _of(site: str, model: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> State:
    """Return one site's model."""
    way = {name: own[f"{site}/{name}"] for name in model if f"{site}/{name}" in own}
    return without_negative_variances(add(model, way))
