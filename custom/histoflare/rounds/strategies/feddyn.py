"""FedDyn (Acar et al. 2021): each site's loss is bent so that all agree on where it is least."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from histoflare import ranges
from histoflare.rounds.hook import LocalHook
from histoflare.rounds.state import State, weighted_mean
from histoflare.rounds.strategies.hub import EqualHub
from histoflare.rounds.strategy import SUM, ServerOutcome, ServerRound, SiteOutcome, SiteRound

PULL = "gradient/"
"""Prefix, in a site's own state, of the gradient that it takes off its loss."""


@dataclass(frozen=True, kw_only=True)
class FedDyn(EqualHub):
    """Sites minimise F_k(w) - ⟨g_k, w⟩ + α/2 · ‖w - W‖²; g_k ← g_k - α ΔW_k; h ← h - α/N · Σ ΔW_k;
    W ← W + mean ΔW_k - h/α.

    Acar et al. 2021, algorithm 1. g_k stays at the site and h at the server, so no more is sent than with
    FedAvg. Running statistics of BatchNorm are averaged.

    Under DP-SGD it is refused, as everything is that a site keeps.

    Attributes:
        alpha: α, above 0. Large values hold the sites together; a step of h goes by 1/α.
        clients_per_round: See :class:`histoflare.rounds.topologies.federated.Federated`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "feddyn"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ("a gradient of its own",)
    sees_data: ClassVar[bool] = False
    alpha: float = 0.1

    def problems(self) -> list[str]:
        """Return what is wrong with ``alpha``."""
        return ranges.above_zero("alpha", self.alpha)

    def begin(self, model: State) -> State:
        """Return h, of zeros. It stays at the server."""
        return {name: torch.zeros_like(model[name]) for name in self.learned_names(model)}

    def hook(self, ctx: SiteRound) -> LocalHook:
        """Return the site's own gradient and the pull to the global model."""
        return _Bend(ctx.model, ctx.site_state, list(self.begin(ctx.model)), self.alpha)

    def local_round(self, ctx: SiteRound) -> SiteOutcome:
        """Train; send the change, and keep the gradient."""
        outcome = super().local_round(ctx)
        kept = {}
        for name in self.begin(ctx.model):
            change = outcome.update.tensors[name]
            before = ctx.site_state.get(PULL + name, torch.zeros_like(change))
            kept[PULL + name] = before - self.alpha * change
        return replace(outcome, site_state={**outcome.site_state, **kept})

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the mean model less h/α, and h."""
        weights = [update.weight if update.site == SUM else 1.0 for update in ctx.updates]
        part = sum(weights) / len(ctx.sites)
        mean = weighted_mean([update.tensors for update in ctx.updates], weights)
        own = {n: (h.double() - self.alpha * part * mean[n]).to(h.dtype) for n, h in ctx.own.items()}
        model = {}
        for name, tensor in ctx.model.items():
            moved = tensor.double() + mean[name] if name in mean else tensor
            if name in own:
                moved = moved - own[name].double() / self.alpha
            model[name] = moved.to(tensor.dtype, copy=True)
        return ServerOutcome(model, own)


class _Bend(LocalHook):
    def __init__(self, centre: State, site_state: State, names: list[str], alpha: float) -> None:
        self._centre = {name: centre[name] for name in names}
        self._own = {name: site_state.get(PULL + name) for name in names}
        self._alpha = alpha

    def gradient(self, name: str, parameter: Tensor) -> Tensor | None:
        if name not in self._centre:
            return None
        term: Tensor = self._alpha * (parameter - self._centre[name].to(parameter.device))
        own = self._own[name]
        return term if own is None else term - own.to(parameter.device)
