"""Federated SGD (McMahan et al. 2017): sites send gradients, and the optimizer is the server's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from histoflare.checks import is_above_zero, is_number
from histoflare.errors import JobError
from histoflare.rounds.state import State, batch_norm_names, weighted_mean
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import ServerOutcome, ServerRound, SiteOutcome, SiteRound, Update

VELOCITY, MEAN, COUNT = "velocity/", "mean/", "averaged"
"""What is kept at the server: V and the mean of the last models, under these prefixes; of how many models."""


@dataclass(frozen=True, kw_only=True)
class FedSgd(FedAvg):
    """V ← momentum · V + Σ N_k g_k / Σ N_k; W ← W - learning_rate · V: one step of SGD a round.

    A site sends minus the gradient of one batch of the task, or under DP-SGD of one sample. With batches that
    hold all of a site's samples and ``weighting = "samples"``, the rounds are gradient descent on the data of
    all sites together. Under DP-SGD with shared noise they are DP-SGD on the patients of all sites together.
    The task's own optimizer and local epochs are not used.

    BatchNorm's running statistics move by the mean of what the sites' batches moved them.

    What is handed out may be the mean of the models after the last rounds (Polyak and Juditsky 1992): noise
    of single steps then averages out, and that costs no privacy, for all of them were released.

    Attributes:
        learning_rate: Of the server's step, above 0.
        momentum: From 0 to below 1.
        averaged_part: Which part of the job's rounds, at its end, the model handed out is the mean of; from 0
            (the last model alone) to 1.
        weighting, weights, clients_per_round: See :class:`FedAvg`.
        share, batch_norm: See :class:`Strategy`. What is not shared takes the same step at its site, without
            momentum.

    >>> from histoflare import FedSgd
    >>> FedSgd(learning_rate=0.5, weighting="uniform").linear
    True
    """

    name: ClassVar[str] = "fedsgd"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    one_step: ClassVar[bool] = True
    learning_rate: float = 0.1
    momentum: float = 0.0
    averaged_part: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_above_zero(self.learning_rate):
            raise JobError(f"learning_rate must be a number above 0, not {self.learning_rate!r}.")
        if not (is_number(self.momentum) and 0 <= self.momentum < 1):
            raise JobError(f"momentum must be a number from 0 to below 1, not {self.momentum!r}.")
        if not (is_number(self.averaged_part) and 0 <= self.averaged_part <= 1):
            raise JobError(f"averaged_part must be a number from 0 to 1, not {self.averaged_part!r}.")

    def begin(self, model: State) -> State:
        """Return V before the first round if there is momentum, and room for the mean of the last models.

        Both stay at the server.
        """
        stepped = self._stepped(model, self.shared_names(model)) if self.momentum else []
        averaged = self.shared_names(model) if self.averaged_part else []
        velocity = {VELOCITY + name: torch.zeros_like(model[name]) for name in stepped}
        # In float64: thousands of rounds add up in it.
        mean = {MEAN + name: torch.zeros_like(model[name], dtype=torch.float64) for name in averaged}
        return velocity | mean | ({COUNT: torch.zeros(1)} if averaged else {})

    def models(self, model: State, own: State) -> dict[str, State]:
        """Return the mean of the last models, where that is asked for and there is one; else the last."""
        if COUNT not in own or not own[COUNT]:
            return super().models(model, own)
        return {"global": {name: own.get(MEAN + name, t).to(t.dtype) for name, t in model.items()}}

    def local_round(self, ctx: SiteRound) -> SiteOutcome:
        """Send minus the gradient of what is shared; let the rest take its step here."""
        start = self.personalize(ctx.model, ctx.site_state)
        made = ctx.gradient(start)
        shared = {name: made.change[name] for name in self.shared_names(start)}
        update = Update(ctx.site, shared, self.weight(ctx.site, made.training.n_samples))
        kept = self._moved(start, made.change) if self.keeps else start
        return SiteOutcome(update, self.personal_state(kept), made.training)

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the model after the step, and V for the next."""
        step = weighted_mean([update.tensors for update in ctx.updates], self.weights_of(ctx))
        own = dict(ctx.own)
        for name in step:
            before = own.get(VELOCITY + name)
            if before is not None:
                step[name] += self.momentum * before.double()
                own[VELOCITY + name] = step[name].to(before.dtype)
        model = self._moved(ctx.model, step)
        last = max(1, round(self.averaged_part * ctx.total_rounds))
        if self.averaged_part and ctx.round_index >= ctx.total_rounds - last:
            own[COUNT] = own[COUNT] + 1
            for name in step:
                mean = own[MEAN + name]
                own[MEAN + name] = mean + (model[name].double() - mean) / own[COUNT].double()
        return ServerOutcome(model, own)

    def _moved(self, model: State, change: Mapping[str, Tensor]) -> State:
        """Return a model after a step; what ``change`` does not hold stays as it is."""
        rates = dict.fromkeys(self._stepped(model, change), self.learning_rate)
        return {
            name: (tensor.double() + rates.get(name, 1.0) * change[name].double()).to(tensor.dtype)
            if name in change
            else tensor.clone()
            for name, tensor in model.items()
        }

    @staticmethod
    def _stepped(model: State, names: Collection[str]) -> list[str]:
        """Return which of ``names`` a gradient moves: all but running statistics."""
        statistics = batch_norm_names(model, "local-statistics")
        return [name for name in names if name not in statistics]
