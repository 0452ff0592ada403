"""The cycle: one site trains in each round, in turn; the server keeps the model in between."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from histoflare.checks import is_above_zero
from histoflare.errors import JobError
from histoflare.rounds.topology import RoundPlan, Topology
from histoflare.seeds import derive_seed

ORDERS = ("site", "seeded", "size", "named")


@dataclass(frozen=True, kw_only=True)
class Cyclic(Topology):
    """As many rounds as sites are one cycle, in which each site has one turn.

    Attributes:
        order: ``"site"`` visits in site order; ``"seeded"`` draws a new order for every cycle; ``"size"``
            goes from the least of ``sizes`` to the largest, which has the last word (equal ones in site
            order); ``"named"`` visits as ``visits`` says.
        sizes: Site → its size, for ``"size"``: finite, above 0. The job names them to all, so they are public
            numbers (beds, say), and never counted from a site's patients.
        visits: The names of all sites, each once, for ``"named"``.
    """

    name: ClassVar[str] = "cyclic"
    aggregates_at_server: ClassVar[bool] = True
    skips_sites: ClassVar[bool] = True
    order: str = "site"
    sizes: Mapping[str, float] | None = None
    visits: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise JobError(f"order must be one of {', '.join(ORDERS)}, not {self.order!r}.")
        if (self.order == "size") != (self.sizes is not None):
            raise JobError("sizes (site → number) go with order = size, and only with it.")
        if (self.order == "named") != (self.visits is not None):
            raise JobError("visits (names of sites) go with order = named, and only with it.")
        if self.sizes is not None and not all(is_above_zero(size) for size in self.sizes.values()):
            raise JobError(f"sizes must be finite numbers above 0; got {dict(self.sizes)}.")
        if self.visits is not None and (
            isinstance(self.visits, str) or len(set(self.visits)) != len(self.visits)
        ):
            raise JobError(f"visits must name each site once; got {self.visits!r}.")

    def check_sites(self, sites: Sequence[str]) -> None:
        """Refuse sites that ``sizes`` or ``visits`` leaves out, and names there that are no site's."""
        named = self.sizes if self.sizes is not None else self.visits
        if named is not None and set(named) != set(sites):
            raise JobError(
                f"order = {self.order} has to name the sites that train, and no other: {', '.join(sites)}; "
                f"it names {', '.join(named) or 'none'}."
            )

    def plan(self, round_index: int, sites: Sequence[str], seed: int) -> RoundPlan:
        """Return the one site whose turn it is."""
        cycle, turn = divmod(round_index, len(sites))
        return RoundPlan((self._cycle(cycle, sites, seed)[turn],))

    def _cycle(self, cycle: int, sites: Sequence[str], seed: int) -> Sequence[str]:
        """Return the sites in the order in which a cycle visits them."""
        if self.order == "seeded":
            return sorted(sites, key=lambda site: derive_seed(seed, "cycle", cycle, site))
        # a job is checked with stand-ins for sites that nobody names: they come last, in site order
        places = self.sizes or {site: place for place, site in enumerate(self.visits or ())}
        return sorted(sites, key=lambda site: places.get(site, math.inf))
