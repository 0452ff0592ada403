"""APFL (Deng et al. 2020): each site answers with a mixture of the global model and one of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from histoflare import ranges
from histoflare.rounds.state import State
from histoflare.rounds.strategies.own_model import MINE, OwnModel
from histoflare.rounds.strategy import SiteOutcome, SiteRound, Strategy


@dataclass(frozen=True, kw_only=True)
class Apfl(OwnModel):
    """Site k answers with m_k = α v_k + (1 - α) W (Deng et al. 2020); v_k stays at its site.

    The paper moves W and v_k by turns in every step. Here a site first trains W for the task's local epochs
    and sends the change, then trains the mixture with what it made of W held still, and v_k follows from it.
    α is the job's and does not adapt.

    Under DP-SGD it is refused, as everything is that a site keeps.

    Attributes:
        alpha: α, above 0 and at most 1; 1: each site answers with a model of its own alone.
        weighting, weights, clients_per_round: See :class:`histoflare.rounds.strategies.fedavg.FedAvg`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "apfl"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ("a model of its own",)
    sees_data: ClassVar[bool] = False
    alpha: float = 0.5

    def problems(self) -> list[str]:
        """Return what is wrong with ``alpha``."""
        return ranges.between("alpha", self.alpha, 0, 1, without_least=True)

    def train_own(self, ctx: SiteRound, mine: State, outcome: SiteOutcome) -> State:
        """Train the mixture; return the site's part of it."""
        local = outcome.training.state
        mixed = ctx.train(_mix(self.alpha, mine, local)).state
        return _mix(1 / self.alpha, mixed, local)

    def personalize(self, model: Mapping[str, Tensor], site_state: Mapping[str, Tensor]) -> State:
        """Return the mixture, at a site that has a part in one."""
        shared = Strategy.personalize(self, model, site_state)
        mine = OwnModel.personalize(self, model, site_state)
        return _mix(self.alpha, mine, shared) if any(n.startswith(MINE) for n in site_state) else shared


def _mix(alpha: float, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> State:
    """Return α · one + (1 - α) · other; whole numbers are the other's."""
    return {
        name: (alpha * one[name].double() + (1 - alpha) * tensor.double()).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in other.items()
    }
