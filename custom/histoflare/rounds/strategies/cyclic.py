"""Cyclic weight transfer: one model, passed from site to site (Darzidehkalani et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from histoflare.errors import JobError
from histoflare.rounds.state import add
from histoflare.rounds.strategy import ServerOutcome, ServerRound, Strategy
from histoflare.rounds.topologies.cyclic import Cyclic


@dataclass(frozen=True, kw_only=True)
class CyclicWeightTransfer(Strategy):
    """In each round one site trains the model for its local epochs, and its model is the next global one.

    As many rounds as sites are one cycle; a single cycle is single weight transfer (SWT). The model leans
    towards the sites it visited last.

    Attributes:
        order, sizes, visits: See :class:`Cyclic`.
        share, batch_norm: See :class:`Strategy`.
    """

    name: ClassVar[str] = "cyclic"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    order: str = "site"
    sizes: Mapping[str, float] | None = None
    visits: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.topology  # noqa: B018 (says what is wrong with the order)

    @property
    def topology(self) -> Cyclic:
        """One site after the other."""
        return Cyclic(order=self.order, sizes=self.sizes, visits=self.visits)

    @property
    def equal_weights(self) -> bool:
        """True: a round has one update, which counts once."""
        return True

    def check_sites(self, sites: Sequence[str]) -> None:
        """Refuse sites that occur twice, and an order that does not name them."""
        super().check_sites(sites)
        self.topology.check_sites(sites)

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the site's model: the global model plus its update."""
        if len(ctx.updates) != 1:
            sites = ", ".join(update.site for update in ctx.updates)
            raise JobError(
                f"Cyclic weight transfer takes one site's model per round; updates came from {sites}.",
                reason="UPDATES_INVALID",
            )
        return ServerOutcome(add(ctx.model, ctx.updates[0].tensors))
