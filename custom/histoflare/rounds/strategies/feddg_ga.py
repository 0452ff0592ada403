"""Generalization adjustment (Zhang et al. 2023): for sites that nobody has seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from histoflare import ranges
from histoflare.rounds.local import LocalResult, training_loss
from histoflare.rounds.state import State, add_weighted_mean
from histoflare.rounds.strategies.hub import NamedHub
from histoflare.rounds.strategies.qfedavg import LOSS, loss_before
from histoflare.rounds.strategy import ServerOutcome, ServerRound, SiteRound

LOSS_AFTER = "loss_after"
"""The number that a site sends: its own model's mean loss on its training data, as the round ended."""

WEIGHTS, LOSSES = "weights", "losses"
"""What is kept at the server: a weight for each site, and its ``loss_after`` of its last round (NaN-free: -1
before the first)."""


@dataclass(frozen=True, kw_only=True)
class FedDgGa(NamedHub):
    """W ← W + Σ a_k ΔW_k; a_k ← a_k + d_r · (G_k - mean G) / max |G - mean G|, at least 0, and scaled to sum
    1.

    Zhang et al. 2023. G_k, the generalization gap, is by how much the global model's loss at site k is above
    that of the site's own model of the round before. d_r falls from ``step`` to 0 over the run. Sites that
    the global model serves badly count more, which made it better at sites that nobody trained on.

    The losses follow from a site's data and leave without noise: its policy has to list them, and under any
    privacy plan it is refused.

    Attributes:
        sites: The names of all sites that train, each once.
        step: d, from above 0 to 1.
        clients_per_round: See :class:`histoflare.rounds.topologies.federated.Federated`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "feddg_ga"
    linear: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    numbers: ClassVar[Mapping[str, bool]] = {LOSS: True, LOSS_AFTER: True}
    step: float = 0.2

    def problems(self) -> list[str]:
        """Return what is out of range."""
        return [*super().problems(), *ranges.between("step", self.step, 0, 1, without_least=True)]

    def begin(self, model: State) -> State:
        """Return equal weights, and no loss."""
        count = max(1, len(self.sites))
        return {
            WEIGHTS: torch.full((count,), 1 / count, dtype=torch.float64),
            LOSSES: torch.full((count,), -1.0, dtype=torch.float64),
        }

    def said(self, ctx: SiteRound, training: LocalResult) -> dict[str, float]:
        """Return both losses."""
        after = training_loss(ctx.task, training.state, ctx.data, ctx.train_seed, ctx.device)
        return {LOSS: loss_before(ctx, self.personalize(ctx.model, ctx.site_state)), LOSS_AFTER: after}

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the model under the weights adjusted by this round's gaps, and those weights."""
        weights, losses = ctx.own[WEIGHTS].clone(), ctx.own[LOSSES].clone()
        place = {update.site: self.sites.index(update.site) for update in ctx.updates}
        gaps = {
            u.site: u.numbers[LOSS] - float(losses[place[u.site]])
            for u in ctx.updates
            if losses[place[u.site]] >= 0
        }
        if gaps:
            mean = math.fsum(gaps.values()) / len(gaps)
            widest = max(abs(gap - mean) for gap in gaps.values())
            falling = self.step * (1 - ctx.round_index / ctx.total_rounds)
            for site, gap in gaps.items():
                weights[place[site]] += falling * (gap - mean) / widest if widest else 0.0
            weights = weights.clamp(min=0)
            weights /= weights.sum()
        for update in ctx.updates:
            losses[place[update.site]] = update.numbers[LOSS_AFTER]
        used = [float(weights[place[update.site]]) for update in ctx.updates]
        if not sum(used):  # all that count are missing: those that are there count the same
            used = [1.0] * len(used)
        model = add_weighted_mean(ctx.model, [update.tensors for update in ctx.updates], used)
        shares = {u.site: weight / sum(used) for u, weight in zip(ctx.updates, used, strict=True)}
        return ServerOutcome(model, {WEIGHTS: weights, LOSSES: losses}, contribution=shares)
