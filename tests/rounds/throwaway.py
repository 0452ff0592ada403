"""Strategies that no job can name: one for each thing that the interface offers and no shipped one uses.

The contract suite runs them beside the registered ones, so that the interface is known to carry them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from histoflare.rounds.hook import LocalHook
from histoflare.rounds.local import LocalResult
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import (
    SiteRound,
    Strategy,
)
from histoflare.rounds.topology import RoundPlan, Topology


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

THROWAWAY: dict[str, type[Strategy]] = {kind.name: kind for kind in (Paced, Swarm)}
