"""SCAFFOLD (Karimireddy et al. 2020): control variates take out of each step what is one site's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from histoflare.errors import JobError
from histoflare.rounds.hook import LocalHook
from histoflare.rounds.state import State, add_weighted_mean, weighted_mean
from histoflare.rounds.strategies.hub import EqualHub
from histoflare.rounds.strategy import (
    SUM,
    ServerOutcome,
    ServerRound,
    SiteOutcome,
    SiteRound,
    join,
    split,
)
from histoflare.rounds.task import Decaying, Task

CONTROL = "control/"
"""Prefix, in a site's own state, of its control variate."""


@dataclass(frozen=True, kw_only=True)
class Scaffold(EqualHub):
    """g ← g - c_k + c at each step; c_k ← c_k - c - ΔW_k / (K η); c ← c + (n/N) · mean change.

    Karimireddy et al. 2020, algorithm 1 with option II and a global step of 1; K steps of the rate η, which
    must be those of plain SGD. The control variate of a site is of its own data. It stays there; its change
    travels beside the update and is clipped and noised with it. Twice the tensors are sent, both ways.

    Under DP-SGD it is refused, as everything is that a site keeps.

    Attributes:
        clients_per_round: See :class:`histoflare.rounds.topologies.federated.Federated`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "scaffold"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ("control variates",)
    sees_data: ClassVar[bool] = False

    def begin(self, model: State) -> State:
        """Return c, of zeros."""
        return self.uplink(model)

    def downlink(self, own: State) -> State:
        """Return c."""
        return own

    def uplink(self, model: Mapping[str, Tensor]) -> State:
        """Return the form of a control variate: a number for each weight that is sent and learned."""
        return {name: torch.zeros_like(model[name]) for name in self.learned_names(model)}

    def hook(self, ctx: SiteRound) -> LocalHook:
        """Return what adds c - c_k to each gradient."""
        return _Correction({name: c - self._own(ctx, name) for name, c in ctx.downlink.items()})

    def local_round(self, ctx: SiteRound) -> SiteOutcome:
        """Train; send the change of the weights and of the control variate, which is kept."""
        rate = plain_rate(ctx.task)
        outcome = super().local_round(ctx)
        scale = max(1, outcome.training.n_steps) * rate
        change = {name: -ctx.downlink[name] - outcome.update.tensors[name] / scale for name in ctx.downlink}
        control = {CONTROL + name: self._own(ctx, name) + moved for name, moved in change.items()}
        update = replace(outcome.update, tensors=join(outcome.update.tensors, change))
        return replace(outcome, update=update, site_state={**outcome.site_state, **control})

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the mean model, and c moved by the part of the sites that trained."""
        weights = [update.weight if update.site == SUM else 1.0 for update in ctx.updates]
        sent = [split(update.tensors) for update in ctx.updates]
        model = add_weighted_mean(ctx.model, [tensors for tensors, _ in sent], weights)
        part = sum(weights) / len(ctx.sites)
        moved = weighted_mean([change for _, change in sent], weights)
        own = {name: (c.double() + part * moved[name]).to(c.dtype) for name, c in ctx.own.items()}
        return ServerOutcome(model, own)

    @staticmethod
    def _own(ctx: SiteRound, name: str) -> Tensor:
        kept = ctx.site_state.get(CONTROL + name)
        return torch.zeros_like(ctx.downlink[name]) if kept is None else kept


class _Correction(LocalHook):
    def __init__(self, terms: State) -> None:
        self._terms = terms

    def gradient(self, name: str, parameter: Tensor) -> Tensor | None:
        return self._terms[name].to(parameter.device) if name in self._terms else None


def plain_rate(task: Task) -> float:
    """Return the learning rate of a task that trains by plain SGD at one rate.

    Raises:
        JobError: It does not; a control variate would not be a gradient (JOB_INVALID).
    """
    optimizer = task.build_optimizer(task.build_model())
    group = optimizer.param_groups[0]
    falls = isinstance(task, Decaying) and len({task.decay(part / 4) for part in range(4)}) > 1
    if not isinstance(optimizer, torch.optim.SGD) or group["momentum"] or group["weight_decay"] or falls:
        raise JobError(
            "SCAFFOLD takes the way that a site went for the sum of its gradients. So it needs plain SGD in "
            "the task: optimizer sgd, no weight decay, and a learning rate that stays.",
            reason="JOB_INVALID",
        )
    return float(group["lr"])
