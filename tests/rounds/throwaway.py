"""Strategies that no job can name: one for each thing that the interface offers and no shipped one uses.

The contract suite runs them beside the registered ones, so that the interface is known to carry them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from histoflare.rounds.hook import LocalHook
from histoflare.rounds.local import LocalResult
from histoflare.rounds.state import State, add, add_weighted_mean
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import (
    ServerOutcome,
    ServerRound,
    SiteOutcome,
    SiteRound,
    Strategy,
    join,
    split,
)
from histoflare.rounds.topology import RoundPlan, Topology


@dataclass(frozen=True, kw_only=True)
class Momentum(FedAvg):
    """The mean update passes through momentum (Hsu et al. 2019): state at the server that nobody is sent."""

    name: ClassVar[str] = "momentum"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    weighting: str = "uniform"
    beta: float = 0.5

    def begin(self, model: State) -> State:
        return {name: torch.zeros_like(model[name]) for name in self.shared_names(model)}

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        step = (
            super()
            .combine(replace(ctx, model={name: 0 * tensor for name, tensor in ctx.model.items()}))
            .model
        )
        velocity = {name: self.beta * before + step[name] for name, before in ctx.own.items()}
        return ServerOutcome(add(ctx.model, velocity), velocity)


@dataclass(frozen=True, kw_only=True)
class Scaffold(Strategy):
    """SCAFFOLD (Karimireddy et al. 2020), option II: control variates at both ends, sent both ways."""

    name: ClassVar[str] = "scaffold"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ("control variates",)
    sees_data: ClassVar[bool] = False
    equal_weights: ClassVar[bool] = True
    learning_rate: float = 0.1

    def begin(self, model: State) -> State:
        return self.uplink(model)

    def downlink(self, own: State) -> State:
        return own

    def uplink(self, model: Mapping[str, Tensor]) -> State:
        return {name: torch.zeros_like(model[name]) for name in self.shared_names(model)}

    def hook(self, ctx: SiteRound) -> LocalHook:
        return _Controlled(ctx)

    def local_round(self, ctx: SiteRound) -> SiteOutcome:
        outcome = super().local_round(ctx)
        scale = outcome.training.n_steps * self.learning_rate
        before = {name: ctx.site_state.get(name, torch.zeros(())) for name in ctx.downlink}
        control = {
            name: before[name] - ctx.downlink[name] - change / scale
            for name, change in outcome.update.tensors.items()
        }
        change = {name: control[name] - before[name] for name in control}
        update = replace(outcome.update, tensors=join(outcome.update.tensors, change))
        return replace(outcome, update=update, site_state={**outcome.site_state, **control})

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        tensors, weights = [update.tensors for update in ctx.updates], [1.0] * len(ctx.updates)
        return ServerOutcome(*split(add_weighted_mean(join(ctx.model, ctx.own), tensors, weights)))


class _Controlled(LocalHook):
    def __init__(self, ctx: SiteRound) -> None:
        self._ctx = ctx

    def gradient(self, name: str, parameter: Tensor) -> Tensor | None:
        if name not in self._ctx.downlink:
            return None
        term: Tensor = self._ctx.downlink[name] - self._ctx.site_state.get(name, 0.0)
        return term


@dataclass(frozen=True, kw_only=True)
class Proximal(FedAvg):
    """FedProx (Li et al. 2020): a term in the loss, μ/2 ‖w - w_global‖², of the model alone."""

    name: ClassVar[str] = "proximal"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    mu: float = 0.1

    def hook(self, ctx: SiteRound) -> LocalHook:
        start = self.personalize(ctx.model, ctx.site_state)
        mu = self.mu

        class Pull(LocalHook):
            def gradient(self, name: str, parameter: Tensor) -> Tensor:
                pull: Tensor = mu * (parameter - start[name])
                return pull

        return Pull()


@dataclass(frozen=True, kw_only=True)
class LossyLoss(FedAvg):
    """Doubles the loss of each batch: a hook that looks at data."""

    name: ClassVar[str] = "lossy"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = True

    def hook(self, ctx: SiteRound) -> LocalHook:
        class Double(LocalHook):
            def loss(self, model: torch.nn.Module, batch: object, loss: Tensor) -> Tensor:
                return 2 * loss

        return Double()


@dataclass(frozen=True, kw_only=True)
class Median(FedAvg):
    """The coordinate-wise median (Yin et al. 2018); says which site lies farthest from it."""

    name: ClassVar[str] = "median"
    least_updates: ClassVar[int] = 1
    linear: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    weighting: str = "uniform"

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        stacked = {
            name: torch.stack([update.tensors[name] for update in ctx.updates])
            for name in ctx.updates[0].tensors
        }
        middle = {name: tensor.double().quantile(0.5, dim=0) for name, tensor in stacked.items()}
        far = {
            update.site: sum(float((update.tensors[name] - middle[name]).square().sum()) for name in middle)
            ** 0.5
            for update in ctx.updates
        }
        return ServerOutcome(add(ctx.model, middle), contribution=far)


@dataclass(frozen=True, kw_only=True)
class Normalised(FedAvg):
    """FedNova (Wang et al. 2020): a site says how many steps it took, and counts by the step."""

    name: ClassVar[str] = "normalised"
    linear: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    numbers: ClassVar[Mapping[str, bool]] = {"steps": True, "loss": True}

    def said(self, ctx: SiteRound, training: LocalResult) -> dict[str, float]:
        return {"steps": float(training.n_steps), "loss": training.mean_loss}

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        steps = [update.numbers["steps"] for update in ctx.updates]
        mean = sum(steps) / len(steps)
        scaled = [
            {name: tensor * (mean / taken) for name, tensor in update.tensors.items()}
            for update, taken in zip(ctx.updates, steps, strict=True)
        ]
        return ServerOutcome(add_weighted_mean(ctx.model, scaled, [1.0] * len(scaled)))


@dataclass(frozen=True, kw_only=True)
class Paced(FedAvg):
    """A site says how many steps it was to take: the job's number, which tells nothing."""

    name: ClassVar[str] = "paced"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    numbers: ClassVar[Mapping[str, bool]] = {"planned_steps": False}
    weighting: str = "uniform"

    def said(self, ctx: SiteRound, training: LocalResult) -> dict[str, float]:
        return {"planned_steps": 3.0}


@dataclass(frozen=True, kw_only=True)
class Gathered(Strategy):
    """Each site's own model is kept at the server and never averaged: the job hands out the ensemble.

    Attributes:
        members: The sites.
    """

    name: ClassVar[str] = "gathered"
    linear: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    equal_weights: ClassVar[bool] = True
    members: Sequence[str] = field(default_factory=lambda: ["site_0", "site_1", "site_2"])

    def begin(self, model: State) -> State:
        """Return how far each site's model is from the first one: nowhere yet."""
        return {
            f"{site}/{name}": torch.zeros_like(model[name])
            for site in self.members
            for name in self.shared_names(model)
        }

    def downlink(self, own: State) -> State:
        return own

    def models(self, model: State, own: State) -> dict[str, State]:
        return {site: self._of(site, model, own) for site in self.members}

    def _of(self, site: str, model: State, own: State) -> State:
        way = {name: own[f"{site}/{name}"] for name in model if f"{site}/{name}" in own}
        return add(model, way)

    def local_round(self, ctx: SiteRound) -> SiteOutcome:
        return super().local_round(replace(ctx, model=self._of(ctx.site, ctx.model, ctx.downlink)))

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        own = dict(ctx.own)
        for update in ctx.updates:
            for name, change in update.tensors.items():
                own[f"{update.site}/{name}"] = own[f"{update.site}/{name}"] + change
        return ServerOutcome({name: tensor.clone() for name, tensor in ctx.model.items()}, own)


@dataclass(frozen=True, kw_only=True)
class Rotating(Topology):
    """Swarm learning's star without a hub: all sites train, and in each round another one aggregates."""

    name: ClassVar[str] = "rotating"
    aggregates_at_server: ClassVar[bool] = False
    skips_sites: ClassVar[bool] = False

    def plan(self, round_index: int, sites: Sequence[str], seed: int) -> RoundPlan:
        return RoundPlan(tuple(sites), sites[round_index % len(sites)])


@dataclass(frozen=True, kw_only=True)
class Swarm(FedAvg):
    """FedAvg without a server."""

    name: ClassVar[str] = "swarm"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    topology: ClassVar[Topology] = Rotating()  # type: ignore[assignment, misc]


@dataclass(frozen=True, kw_only=True)
class Passing(Topology):
    """One site trains, the one after it aggregates."""

    name: ClassVar[str] = "passing"
    aggregates_at_server: ClassVar[bool] = False
    skips_sites: ClassVar[bool] = True

    def plan(self, round_index: int, sites: Sequence[str], seed: int) -> RoundPlan:
        return RoundPlan((sites[round_index % len(sites)],), sites[(round_index + 1) % len(sites)])


class Pushing(LocalHook):
    """Adds the same number to every gradient."""

    def __init__(self, term: float) -> None:
        self._term = term

    def gradient(self, name: str, parameter: Tensor) -> Tensor:
        return torch.full_like(parameter, self._term)


THROWAWAY_TOPOLOGIES: dict[str, type[Topology]] = {kind.name: kind for kind in (Rotating, Passing)}

THROWAWAY: dict[str, type[Strategy]] = {
    kind.name: kind
    for kind in (Momentum, Scaffold, Proximal, LossyLoss, Median, Normalised, Paced, Gathered, Swarm)
}
