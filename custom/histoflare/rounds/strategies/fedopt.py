"""Adaptive optimizers at the server (Reddi et al. 2021), and momentum (Hsu et al. 2019)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from histoflare import ranges
from histoflare.rounds.state import State, weighted_mean
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import ServerOutcome, ServerRound

MEAN, SQUARE = "mean/", "square/"
"""Prefixes of what is kept at the server: m, and v."""


@dataclass(frozen=True, kw_only=True)
class FedOpt(FedAvg):
    """m ← β₁ m + (1 - β₁) Δ; v by the strategy; W ← W + η m / (√v + τ), with Δ = Σ N_k ΔW_k / Σ N_k.

    Reddi et al. 2021, algorithm 2, with v = τ² before the first round. m and v stay at the server. Running
    statistics of BatchNorm are averaged. All of it follows from the mean update: it works in a secure sum,
    and costs no privacy.

    Attributes:
        learning_rate: η, above 0.
        beta1: β₁, from 0 to below 1.
        tau: τ, above 0: how far a weight is adapted.
        weighting, weights, clients_per_round: See :class:`FedAvg`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    learning_rate: float = 0.1
    beta1: float = 0.9
    tau: float = 1e-3

    def problems(self) -> list[str]:
        """Return what is out of range."""
        return [
            *ranges.above_zero("learning_rate", self.learning_rate),
            *ranges.between("beta1", self.beta1, 0, 1, without_most=True),
            *ranges.above_zero("tau", self.tau),
        ]

    def begin(self, model: State) -> State:
        """Return m and v before the first round."""
        names = self.learned_names(model)
        mean = {MEAN + name: torch.zeros_like(model[name]) for name in names}
        return mean | {SQUARE + name: torch.full_like(model[name], self.tau**2) for name in names}

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the model after the server's step, and m and v."""
        change = weighted_mean([update.tensors for update in ctx.updates], self.weights_of(ctx))
        own = dict(ctx.own)
        for name, delta in change.items():
            if MEAN + name in own:
                m, v = own[MEAN + name], own[SQUARE + name]
                mean = self.beta1 * m.double() + (1 - self.beta1) * delta
                square = self.squared(v.double(), delta)
                own[MEAN + name], own[SQUARE + name] = mean.to(m.dtype), square.to(v.dtype)
                change[name] = self.learning_rate * mean / (square.sqrt() + self.tau)
        model = {
            name: (tensor.double() + change[name]).to(tensor.dtype) if name in change else tensor.clone()
            for name, tensor in ctx.model.items()
        }
        return ServerOutcome(model, own)

    @abstractmethod
    def squared(self, v: Tensor, delta: Tensor) -> Tensor:
        """Return the next v.

        Args:
            v: The last one, in float64. delta: The mean update of this tensor, in float64.
        """


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(FedOpt):
    """v ← v + Δ². See :class:`FedOpt`."""

    name: ClassVar[str] = "fedadagrad"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    beta1: float = 0.0

    def squared(self, v: Tensor, delta: Tensor) -> Tensor:
        """Return the next v."""
        return v + delta.square()


@dataclass(frozen=True, kw_only=True)
class FedAdam(FedOpt):
    """v ← β₂ v + (1 - β₂) Δ². See :class:`FedOpt`.

    Attributes:
        beta2: β₂, from 0 to below 1.
        learning_rate, beta1, tau: See :class:`FedOpt`.
        weighting, weights, clients_per_round, share, batch_norm: See :class:`FedAvg`.
    """

    name: ClassVar[str] = "fedadam"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    beta2: float = 0.99

    def problems(self) -> list[str]:
        """Return what is out of range."""
        return [*super().problems(), *ranges.between("beta2", self.beta2, 0, 1, without_most=True)]

    def squared(self, v: Tensor, delta: Tensor) -> Tensor:
        """Return the next v."""
        return self.beta2 * v + (1 - self.beta2) * delta.square()


@dataclass(frozen=True, kw_only=True)
class FedYogi(FedAdam):
    """v ← v - (1 - β₂) Δ² sign(v - Δ²). See :class:`FedAdam`."""

    name: ClassVar[str] = "fedyogi"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False

    def squared(self, v: Tensor, delta: Tensor) -> Tensor:
        """Return the next v."""
        square = delta.square()
        return v - (1 - self.beta2) * square * torch.sign(v - square)
