"""FedProx (Li et al. 2020): a site's model is held near the global one while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from histoflare import ranges
from histoflare.rounds.hook import LocalHook
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import SiteRound


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """FedAvg of sites that minimise loss + μ/2 · ‖w - w_global‖² (Li et al. 2020, eq. 2).

    The term needs the global model alone, so under DP-SGD it is added after clip and noise and costs nothing.

    Attributes:
        mu: μ, at least 0; 0 is FedAvg.
        weighting, weights, clients_per_round: See :class:`FedAvg`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`. Layers that are not shared are
            held near where they began the round.
    """

    name: ClassVar[str] = "fedprox"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    mu: float = 0.01

    def problems(self) -> list[str]:
        """Return what is wrong with ``mu``."""
        return ranges.at_least_zero("mu", self.mu)

    def hook(self, ctx: SiteRound) -> LocalHook:
        """Return the pull towards the model that the site began with."""
        return Pull(self.personalize(ctx.model, ctx.site_state), self.mu)


class Pull(LocalHook):
    """Adds the gradient of strength/2 · ‖w - centre‖².

    Args:
        centre: Name → tensor.
        strength: At least 0.
    """

    def __init__(self, centre: Mapping[str, Tensor], strength: float) -> None:
        self._centre, self._strength = dict(centre), strength

    def gradient(self, name: str, parameter: Tensor) -> Tensor:
        """Return strength · (w - centre)."""
        centre = self._centre[name] = self._centre[name].to(parameter.device)
        pull: Tensor = self._strength * (parameter - centre)
        return pull
