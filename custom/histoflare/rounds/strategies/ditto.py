"""Ditto (Li et al. 2021): beside the global model, each site has one of its own that is held near it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from histoflare import ranges
from histoflare.rounds.state import State
from histoflare.rounds.strategies.fedprox import Pull
from histoflare.rounds.strategies.own_model import OwnModel
from histoflare.rounds.strategy import SiteOutcome, SiteRound


@dataclass(frozen=True, kw_only=True)
class Ditto(OwnModel):
    """FedAvg; besides, site k trains v_k on F_k(v) + λ/2 · ‖v - W‖² (Li et al. 2021, algorithm 1).

    v_k stays at its site, which answers with it. Both are trained for the task's local epochs, so a round
    takes twice as long. A site's first v_k begins at the global model.

    Under DP-SGD it is refused, as everything is that a site keeps.

    Attributes:
        pull: λ, at least 0; at 0 sites learn alone, and with a large one v_k is the global model.
        weighting, weights, clients_per_round: See :class:`histoflare.rounds.strategies.fedavg.FedAvg`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "ditto"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ("a model of its own",)
    sees_data: ClassVar[bool] = False
    pull: float = 0.1

    def problems(self) -> list[str]:
        """Return what is wrong with ``pull``."""
        return ranges.at_least_zero("pull", self.pull)

    def train_own(self, ctx: SiteRound, mine: State, outcome: SiteOutcome) -> State:
        """Train v_k, held near the global model as it came."""
        return ctx.train(mine, Pull(ctx.model, self.pull)).state
