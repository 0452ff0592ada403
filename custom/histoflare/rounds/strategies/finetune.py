"""FedAvg, after which each site goes on by itself: the plainest way to a model of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from histoflare.rounds.state import State
from histoflare.rounds.strategies.own_model import OwnModel
from histoflare.rounds.strategy import SiteOutcome, SiteRound


@dataclass(frozen=True, kw_only=True)
class FineTune(OwnModel):
    """FedAvg; a site keeps the model that its training of the last round left, and answers with it.

    Local fine-tuning so needs no round of its own: each round of FedAvg ends with every site's model trained
    further on its own data. The global model is FedAvg's.

    Under DP-SGD it is refused, as everything is that a site keeps.

    Attributes:
        weighting, weights, clients_per_round: See :class:`histoflare.rounds.strategies.fedavg.FedAvg`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "finetune"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ("its last model",)
    sees_data: ClassVar[bool] = False

    def train_own(self, ctx: SiteRound, mine: State, outcome: SiteOutcome) -> State:
        """Return what was trained."""
        return outcome.training.state
