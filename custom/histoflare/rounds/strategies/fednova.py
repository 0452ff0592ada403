"""FedNova (Wang et al. 2020): a site that takes more steps does not pull harder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from histoflare import ranges
from histoflare.rounds.local import LocalResult
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import ServerOutcome, ServerRound, SiteOutcome, SiteRound


@dataclass(frozen=True, kw_only=True)
class FedNova(FedAvg):
    """W ← W + τ · Σ p_k d_k, with d_k = ΔW_k / τ_k the change by step (Wang et al. 2020, eq. 6 and 7).

    τ_k is the number of site k's steps, p_k = N_k / Σ N_k its weight, and τ is Σ p_k τ_k unless the job says
    else. With FedAvg the same sites minimise Σ p_k τ_k F_k, which is not what was asked for. The count of
    steps is exact for plain SGD; the paper's count for momentum is not built, and Adam has none.

    Under DP-SGD all sites take the same public number of steps, and FedAvg is the same.

    Attributes:
        effective_steps: τ; None: Σ p_k τ_k.
        weighting, weights, clients_per_round: See :class:`FedAvg`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "fednova"
    linear: ClassVar[bool] = False  # each round's τ follows from who sent
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    numbers: ClassVar[Mapping[str, bool]] = {"steps": True}
    effective_steps: float | None = None

    def problems(self) -> list[str]:
        """Return what is wrong with ``effective_steps``."""
        return ranges.above_zero("effective_steps", self.effective_steps, or_null=True)

    def said(self, ctx: SiteRound, training: LocalResult) -> dict[str, float]:
        """Return how many steps the site took."""
        return {"steps": float(training.n_steps)}

    def local_round(self, ctx: SiteRound) -> SiteOutcome:
        """Train; send the change by step."""
        outcome = super().local_round(ctx)
        steps = max(1, outcome.training.n_steps)
        scaled = {name: tensor / steps for name, tensor in outcome.update.tensors.items()}
        return replace(outcome, update=replace(outcome.update, tensors=scaled))

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the global model after τ of the mean step."""
        weights = self.weights_of(ctx)
        steps = math.fsum(w * u.numbers["steps"] for w, u in zip(weights, ctx.updates, strict=True))
        tau = self.effective_steps or steps / (math.fsum(weights) or 1.0)
        scaled = [
            replace(update, tensors={name: tau * t.double() for name, t in update.tensors.items()})
            for update in ctx.updates
        ]
        return super().combine(replace(ctx, updates=scaled))
