"""What a topology is: who trains in a round, who combines the updates, and so who sends what to whom.

A round is the same wherever its halves run: every trainer has the global model, trains, and sends its update
to the aggregator, who makes the next global model of them. A topology says who these are; it knows neither
model nor data. Its answer follows from the round, the federation's sites and the job's seed, and so is the
same in every process without a word between them.

A topology is one file in ``rounds/topologies/`` and one line in its registry. A strategy names the one that
it works in (``Strategy.topology``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

SERVER = ""
"""The aggregator that is no site: the federation's server. No site can have this name."""


@dataclass(frozen=True)
class RoundPlan:
    """Who does what in one round.

    Attributes:
        trainers: The sites that train, in site order; each sends its update to the aggregator.
        aggregator: Who combines the updates: a site, or :data:`SERVER`. It has the next global model, and
            what the strategy keeps beside it, until the next round's aggregator gets both.
    """

    trainers: tuple[str, ...]
    aggregator: str = SERVER

    @property
    def receivers(self) -> tuple[str, ...]:
        """Who must have the global model as the round begins: trainers, and an aggregator that is a site."""
        others = () if self.aggregator in (SERVER, *self.trainers) else (self.aggregator,)
        return (*self.trainers, *others)


@dataclass(frozen=True, kw_only=True)
class Topology(ABC):
    """Who sends to whom. Subclasses are frozen dataclasses of plain JSON-able fields.

    Attributes:
        name: As in the registry.
        aggregates_at_server: Whether the aggregator of every round is the server. FLARE's processes run no
            other topology, and noise that a trusted server adds needs it.
        skips_sites: Whether a site that refuses loses its turn and the others go on, however few answered.
    """

    name: ClassVar[str]
    aggregates_at_server: ClassVar[bool]
    skips_sites: ClassVar[bool]

    @abstractmethod
    def plan(self, round_index: int, sites: Sequence[str], seed: int) -> RoundPlan:
        """Return who does what in a round; the same answer in every process.

        Args:
            round_index: From 0.
            sites: All sites of the federation that train, in its fixed order.
            seed: The job's.
        """
