"""The star: sites train side by side, and the server combines what they send (Rieke et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from histoflare.errors import JobError
from histoflare.rounds.topology import RoundPlan, Topology
from histoflare.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class Federated(Topology):
    """All sites, or a seeded subset of them, train in each round; the server aggregates.

    Attributes:
        clients_per_round: So many sites train in each round; None = all. Where fewer sites are there, all of
            them train.
    """

    name: ClassVar[str] = "federated"
    aggregates_at_server: ClassVar[bool] = True
    skips_sites: ClassVar[bool] = False
    clients_per_round: int | None = None

    def __post_init__(self) -> None:
        if self.clients_per_round is not None and self.clients_per_round < 1:
            raise JobError(f"clients_per_round must be at least 1, not {self.clients_per_round}.")

    def plan(self, round_index: int, sites: Sequence[str], seed: int) -> RoundPlan:
        """Return all sites, or those with the lowest of hashes that depend on seed, round and name only."""
        if self.clients_per_round is None:
            return RoundPlan(tuple(sites))
        drawn = sorted(sites, key=lambda site: derive_seed(seed, "participants", round_index, site))
        chosen = drawn[: self.clients_per_round]
        return RoundPlan(tuple(site for site in sites if site in chosen))
