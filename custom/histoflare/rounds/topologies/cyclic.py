"""The cycle: one site trains in each round, in turn; the server keeps the model in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from histoflare.errors import JobError
from histoflare.rounds.topology import RoundPlan, Topology
from histoflare.seeds import derive_seed

ORDERS = ("site", "seeded")


@dataclass(frozen=True, kw_only=True)
class Cyclic(Topology):
    """As many rounds as sites are one cycle, in which each site has one turn.

    Attributes:
        order: ``"site"`` visits in site order; ``"seeded"`` draws a new order for every cycle.
    """

    name: ClassVar[str] = "cyclic"
    aggregates_at_server: ClassVar[bool] = True
    skips_sites: ClassVar[bool] = True
    order: str = "site"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise JobError(f"order must be one of {', '.join(ORDERS)}, not {self.order!r}.")

    def plan(self, round_index: int, sites: Sequence[str], seed: int) -> RoundPlan:
        """Return the one site whose turn it is."""
        cycle, turn = divmod(round_index, len(sites))
        if self.order == "site":
            return RoundPlan((sites[turn],))
        return RoundPlan((sorted(sites, key=lambda site: derive_seed(seed, "cycle", cycle, site))[turn],))
